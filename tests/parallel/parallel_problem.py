"""One small distillation problem on which every wrong reduction over devices shows.

Labelled rows, the mask and the example weights fall unevenly over the row blocks of 4 and 8
devices: one block has no labelled row at all.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax import terms
from kdjax.core import Learner, Method, Model, Term, distill, minimize

ROWS, WIDTH, CLASSES = 16, 6, 5


def mlp(hidden: int = 8) -> Model:
    def init(key, x):
        first, second = jax.random.split(key)
        return {
            "in": {"w": 0.5 * jax.random.normal(first, (x.shape[-1], hidden))},
            "out": {
                "w": 0.5 * jax.random.normal(second, (hidden, CLASSES)),
                "b": jnp.zeros(CLASSES),
            },
        }, {}

    def apply(params, extra, x, *, train=False, key=None):
        hidden = jnp.tanh(x @ params["in"]["w"])
        logits = hidden @ params["out"]["w"] + params["out"]["b"][None]
        return {"logits": logits, "hidden": hidden}, extra

    return Model(init, apply, "x")


def masked() -> Term:
    """Squared error of the logits on the rows and entries that the batch's mask selects."""

    def loss(tparams, student_out, teacher_out, batch, *, step, key):
        return (student_out["logits"] - teacher_out["logits"]) ** 2, batch["mask"]

    return Term(terms.no_params, loss)


def log_sum() -> Term:
    """A loss of the whole batch: the log of a sum, so that no mean of its parts is right."""

    def loss(tparams, student_out, teacher_out, batch, *, step, key, axis_name=None):
        total = ((student_out["hidden"] - teacher_out["hidden"]) ** 4).sum()
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)
        return jnp.log(total)

    return Term(terms.no_params, loss, coupled=True)


TERMS = {
    "hard": (0.7, terms.hard_labels(smoothing=0.1)),
    "soft": (
        optax.linear_schedule(1.0, 0.5, 4),
        terms.soft_labels(temperature=optax.linear_schedule(4.0, 1.0, 4)),
    ),
    "masked": (0.3, masked()),
    "log_sum": (0.2, log_sum()),
}


def method(*names: str, model: Model | None = None) -> Method:
    chosen = {name: TERMS[name] for name in names or TERMS}
    return distill(mlp() if model is None else model, mlp(), chosen)


def learner(*names: str, optimizer=None, model: Model | None = None, **options) -> Learner:
    # SGD: Adam divides a wrong scale of the gradient away.
    return minimize(method(*names, model=model), optimizer or optax.sgd(0.3), **options)


def batch(seed: int = 0, *, weight: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, ROWS)
    label[:5] = -1
    label[9] = -1
    made = {
        "x": rng.normal(size=(ROWS, WIDTH)).astype(np.float32),
        "label": label.astype(np.int32),
        "index": np.arange(ROWS, dtype=np.int32),
        "mask": (rng.random((ROWS, CLASSES)) < np.linspace(0, 1, ROWS)[:, None]).astype(np.float32),
    }
    if weight:
        made["weight"] = np.where(np.arange(ROWS) % 5 == 1, 0, np.linspace(0.2, 2, ROWS)).astype(
            np.float32
        )
    return made


@functools.cache
def teacher():
    return jax.jit(mlp().init)(jax.random.key(7), batch()["x"])


@functools.cache
def start(*names: str):
    """The first State for the terms named; no route uses it up, as it isn't on a mesh."""
    return jax.jit(learner(*names).init)(jax.random.key(0), batch(), teacher())


@functools.cache
def one_device(*names: str):
    """Three steps on one device, without any parallel code."""
    return train(jax.jit(learner(*names).update), start(*names), teacher())


def train(update, state, frozen, steps: int = 3):
    for seed in range(steps):
        state, metrics = update(state, batch(seed), frozen)
    return state, metrics


def distance(a, b) -> float:
    """The largest difference between two trees of arrays."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(
        (float(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max(initial=0)))
        for x, y in [*pairs, (0, 0)]
    )


def resumable():
    """A smaller problem, with optimizer state to restore, and its first State."""
    made = learner("hard", "masked", optimizer=optax.sgd(0.05, momentum=0.9))
    return made, jax.jit(made.init)(jax.random.key(0), batch(), teacher())
