"""The projector + LogSum step of `step_overhead`: kdjax's, and one written by hand.

The bare one is what a competent user writes from the paper: the features before the classifier by
``capture_intermediates``, a linear projector, batch normalisation as three lines, and the logarithm
of the sum with its largest entry taken out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import kdjax as kd
from kdjax.models import MLP, resnet8, resnet8x4, resnet20, resnet32x4

WEIGHT, ALPHA, EPS = 0.5, 4.0, 1e-4
TAPS = {"feat": "pool"}
MODULES: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "mlp": lambda classes: (MLP(classes, (32,)), MLP(classes, (64,))),
    "resnet20-resnet8": lambda classes: (resnet8(classes), resnet20(classes)),
    "resnet32x4-resnet8x4": lambda classes: (resnet8x4(classes), resnet32x4(classes)),
}


def method(student: kd.Model, teacher: kd.Model, weight: Any = WEIGHT, alpha: Any = ALPHA) -> Any:
    """Hard labels and the projector term."""
    return kd.distill(
        student,
        teacher,
        {
            "hard": (1.0, kd.terms.hard_labels()),
            "feature": (weight, kd.terms.projector("feat", "feat", alpha=alpha)),
        },
    )


def bare_step(
    student: Any, teacher: Any, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """The same training step, from two Linen modules."""

    def run(module: Any, variables: Any, images: jax.Array, train: bool) -> Any:
        logits, state = module.apply(
            variables,
            images,
            train=train,
            mutable=["batch_stats", "intermediates"] if train else ["intermediates"],
            capture_intermediates=lambda submodule, _: submodule.name == "pool",
        )
        feature = state.pop("intermediates")["pool"]["__call__"][0]
        return logits, feature, state

    def step(state: Any, batch: dict[str, jax.Array], frozen: Any) -> Any:
        params, extra, opt, count = state
        target = normalised(run(teacher, frozen, batch["image"], False)[1])

        def loss_fn(params: Any) -> Any:
            variables = {"params": params["student"], **extra}
            logits, feature, new_extra = run(student, variables, batch["image"], True)
            hard = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
            layer = params["projector"]
            projected = feature @ layer["kernel"] + layer["bias"][None]
            distance = log_sum(normalised(projected) - target)
            loss = hard + WEIGHT * distance
            accuracy = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
            metrics = {"loss": loss, "loss/hard": hard, "loss/feature": distance}
            return loss, (new_extra, {**metrics, "accuracy": accuracy})

        (_, (extra, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt = optimizer.update(grads, opt, params)
        return (optax.apply_updates(params, updates), extra, opt, count + 1), metrics

    return step


def normalised(x: jax.Array) -> jax.Array:
    """Batch normalisation of [B, D] without scale, offset and running averages."""
    centred = x - x.mean(axis=0, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(axis=0, keepdims=True) + EPS)


def log_sum(difference: jax.Array) -> jax.Array:
    """``log(sum |d|^4)``; the fourth powers of small differences would underflow."""
    largest = jax.lax.stop_gradient(jnp.abs(difference).max())
    return ALPHA * jnp.log(largest) + jnp.log(((jnp.abs(difference) / largest) ** ALPHA).sum())
