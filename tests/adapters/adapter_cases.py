"""One small network with batch norm and dropout, in each of the three forms that adapters take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import kdjax as kd
from kdjax.core import Model

WIDTH, HIDDEN, CLASSES, ROWS = 3, 6, 4, 8


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dense(HIDDEN, name="dense")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        self.sow("intermediates", "before_relu", x)
        return nn.relu(x)


class LinenNet(nn.Module):
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i in range(11):
            if i in (0, 2, 10):
                x = LinenBlock(name=f"block{i}")(x, train)
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        twice = nn.Dense(HIDDEN, name="twice")
        return nn.Dense(CLASSES, name="classifier")(twice(twice(x)))


class NnxBlock(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.dense = nnx.Linear(width, HIDDEN, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(self.dense(x))
        self.sow(nnx.Intermediate, "before_relu", x)
        return nnx.relu(x)


class InheritedBlock(NnxBlock):
    """Its __call__ is inherited, which nnx.capture(method_outputs=) misses."""


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, dropout: float = 0.5):
        self.block0 = NnxBlock(WIDTH, rngs)
        self.block2 = InheritedBlock(HIDDEN, rngs)
        self.block10 = NnxBlock(HIDDEN, rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.twice = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)
        self.classifier = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dropout(self.block10(self.block2(self.block0(x))))
        return self.classifier(self.twice(self.twice(x)))


def plain_init(key: jax.Array, x: jax.Array) -> tuple[Any, Any]:
    keys = jax.random.split(key)
    params = {
        "w0": jax.random.normal(keys[0], (x.shape[-1], HIDDEN)),
        "w1": jax.random.normal(keys[1], (HIDDEN, CLASSES)),
    }
    return params, {"mean": jnp.zeros(HIDDEN)}


def plain_apply(
    params: Any, extra: Any, x: jax.Array, *, train: bool, key: Any
) -> tuple[dict[str, jax.Array], Any]:
    x = x @ params["w0"]
    if train:
        mean = x.mean(0)
        extra = {"mean": 0.9 * extra["mean"] + 0.1 * mean}
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        hidden = jnp.where(keep, 2 * (x - mean[None]), 0)
    else:
        hidden = x - extra["mean"][None].astype(x.dtype)
    return {"logits": hidden @ params["w1"], "hidden": hidden}, extra


class AdapterCase(NamedTuple):
    name: str
    make: Callable[..., Model]
    tap: dict[str, Any]
    weight: Callable[[Any], Any]  # a weight that every gradient must reach


CASES = [
    AdapterCase(
        "linen",
        lambda **options: kd.from_linen(LinenNet(), **options),
        {"taps": {"hidden": "block10"}},
        lambda params: params["block0"]["dense"]["kernel"],
    ),
    AdapterCase(
        "nnx",
        lambda **options: kd.from_nnx(NnxNet, **options),
        {"taps": {"hidden": "block10"}},
        lambda params: params["block0"]["dense"]["kernel"],
    ),
    AdapterCase(
        "plain",
        lambda **options: kd.from_fn(plain_init, plain_apply, stateful=True, **options),
        {},
        lambda params: params["w0"],
    ),
]


def images() -> jax.Array:
    return jax.random.normal(jax.random.key(7), (ROWS, WIDTH)) + 1.0
