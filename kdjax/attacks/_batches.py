"""A model over a whole data set on the host: batches of one shape, compiled once per model.

The compiled functions take the model as an argument, a `jax.tree_util.Partial`: its function is
part of the program, its weights are not, so that other weights do not compile anew.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from kdjax import _checks, losses
from kdjax.attacks import _inputs
from kdjax.attacks._gradient import pgd
from kdjax.attacks._inputs import LINF

# Images in a batch where the caller does not say.
_SIZE = 256
Loss = Callable[[jax.Array, jax.Array], jax.Array]
# Name -> loss and steps. The steps and the start are the same, so that the first is the beginning
# of the second.
ATTACKS: dict[str, tuple[Loss, int]] = {
    "pgd_20": (losses.hard_label_cross_entropy, 20),
    "pgd_100": (losses.hard_label_cross_entropy, 100),
    "cw_100": (losses.margin, 100),
}


class Split(NamedTuple):
    """Images and labels on the host, and how many go into a batch."""

    x: np.ndarray
    labels: np.ndarray
    size: int


class Batch(NamedTuple):
    """Rows of a split; ``places`` [b] in it are repeated to fill the last batch."""

    x: jax.Array
    labels: jax.Array
    places: jax.Array


class Ball(NamedTuple):
    """The perturbations allowed, and the step of the attacks of fixed step size."""

    eps: jax.Array
    step_size: jax.Array
    norm: str


def model(logits_fn: Any) -> Partial:
    """The logits function as a pytree."""
    if isinstance(logits_fn, Partial):
        return logits_fn
    if not callable(logits_fn):
        raise TypeError(
            "logits_fn must be a function from images [B, ...] to logits [B, C], got "
            f"{_checks.describe(logits_fn)}."
        )
    return Partial(logits_fn)


def single_key(key: Any) -> jax.Array:
    """One typed key, from which each image gets its own by its place."""
    if getattr(key, "ndim", 0):
        raise ValueError(f"key must be a single typed key, got {_checks.describe(key)}.")
    _inputs.keys(key, 1)
    return key


def split(x: ArrayLike, labels: ArrayLike, batch_size: int | None, *, name: str = "x") -> Split:
    """Checked images and labels, on the host."""
    for each in (x, labels):
        if _checks.is_traced(each):
            raise TypeError(f"{name} must be known: this runs on the host, not inside jit.")
    images = x if isinstance(x, np.ndarray) else np.asarray(_checks.as_array(name, x))
    if images.ndim < 2 or images.size == 0:
        raise ValueError(f"{name} must be images [N, ...], got {_checks.describe(images)}.")
    classes = np.asarray(_inputs.class_labels(labels, len(images)))
    size = _SIZE if batch_size is None else _checks.count("batch_size", batch_size)
    return Split(images, classes, min(size, len(images)))


def ball(eps: Any, step_size: Any, norm: str) -> Ball:
    """The checked radius; a step of a quarter of it unless given."""
    norm = _inputs.norm(norm)
    eps = jnp.asarray(_checks.number("eps", eps, low=0), float)
    _inputs.check_radius(eps, norm)
    step_size = eps / 4 if step_size is None else _checks.number("step_size", step_size, low=0)
    return Ball(eps, jnp.asarray(step_size, float), norm)


def batches(rows: Split, start: int = 0) -> Iterator[tuple[int, Batch]]:
    """Every batch from a row on, of one shape, with the number of its rows that are no filling."""
    for first in range(start, len(rows.x), rows.size):
        places = np.minimum(np.arange(first, first + rows.size), len(rows.x) - 1)
        x, labels = _inputs.images(rows.x[places]), jnp.asarray(rows.labels[places])
        yield min(rows.size, len(rows.x) - first), Batch(x, labels, jnp.asarray(places))


def collect(
    rows: Split,
    work: Callable[[Batch], jax.Array],
    *,
    before: np.ndarray | None = None,
    report: Callable[[np.ndarray], None] = lambda found: None,
) -> np.ndarray:
    """[N, ...] results of ``work`` on every batch, after the rows that are there ``before``.

    ``report`` hears of all rows so far after every batch.
    """
    found = [] if before is None or len(before) == 0 else [before]
    start = sum(map(len, found))
    for count, batch in batches(rows, start):
        found.append(np.asarray(work(batch))[:count])
        report(np.concatenate(found))
    return np.concatenate(found)


@jax.jit
def logits_of(logits_fn: Partial, x: jax.Array) -> jax.Array:
    """[b, C]"""
    return _inputs.logits(logits_fn, x)


@functools.partial(jax.jit, static_argnames=("loss", "steps", "norm", "best", "random"))
def attacked(
    logits_fn: Partial,
    batch: Batch,
    key: jax.Array,
    eps: jax.Array,
    step_size: jax.Array,
    *,
    loss: Loss,
    steps: int,
    norm: str = LINF,
    best: bool = False,
    random: bool = True,
) -> jax.Array:
    """[b, ...] the last iterates of projected gradient ascent from random starts."""

    def loss_fn(images: jax.Array) -> jax.Array:
        return loss(_inputs.logits(logits_fn, images), batch.labels)

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.places) if random else None
    eps, step_size = eps.astype(batch.x.dtype), step_size.astype(batch.x.dtype)
    # Never unrolled: of 20 steps it would gain little beside the loops of 100.
    return pgd(
        loss_fn, batch.x, eps=eps, step_size=step_size, steps=steps, norm=norm, key=keys, best=best,
        unroll=False,
    )  # fmt: skip


def attack(
    logits_fn: Partial, key: jax.Array, around: Ball, name: str
) -> Callable[[Batch], jax.Array]:
    """batch -> what one of `ATTACKS` makes of it."""
    loss, steps = ATTACKS[name]
    return lambda batch: attacked(
        logits_fn, batch, key, around.eps, around.step_size,
        loss=loss, steps=steps, norm=around.norm,
    )  # fmt: skip


def under_attack(
    logits_fn: Partial, key: jax.Array, around: Ball, name: str
) -> Callable[[Batch], jax.Array]:
    """batch -> logits on what one of `ATTACKS` makes of it."""
    move = attack(logits_fn, key, around, name)
    return lambda batch: logits_of(logits_fn, move(batch))


def under_noise(logits_fn: Partial, key: jax.Array, around: Ball) -> Callable[[Batch], jax.Array]:
    """batch -> logits at a random place of the ball, as where gradient ascent starts."""

    def work(batch: Batch) -> jax.Array:
        noisy = attacked(
            logits_fn, batch, key, around.eps, around.step_size,
            loss=losses.margin, steps=0, norm=around.norm,
        )  # fmt: skip
        return logits_of(logits_fn, noisy)

    return work


def correct(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[N] bool; a row that is not finite is wrong."""
    return np.asarray(_inputs.correct(jnp.asarray(logits), jnp.asarray(labels)))


def check_logits(logits: np.ndarray, rows: Split) -> None:
    """Clean logits must be finite and of these labels' classes; says where they look otherwise."""
    _inputs.in_range(jnp.asarray(rows.labels), logits.shape[1])
    wrong = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if wrong.size:
        raise ValueError(
            f"logits_fn must return finite logits for the clean images, got others for "
            f"{wrong.size} of {len(logits)}, image {wrong[0]} first."
        )
    warn_of_probabilities(logits, stacklevel=4)


def warn_of_probabilities(logits: np.ndarray, *, stacklevel: int = 3) -> None:
    """Says so where rows are from 0 to 1 and sum to 1."""
    if (logits >= 0).all() and (np.abs(logits.sum(axis=1) - 1) < 1e-2).all():
        warnings.warn(
            "logits_fn seems to return probabilities rather than logits: the softmax before the "
            "loss then hides gradients, and what is computed from the logits is wrong.",
            stacklevel=stacklevel,
        )
