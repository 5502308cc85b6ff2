"""How much robust accuracy a training loses after its best epoch."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks


class RobustOverfitting(NamedTuple):
    """The best epoch of a training against its end.

    Attributes:
        best: scalar, the largest accuracy.
        best_epoch: scalar int32, the first epoch that has it, counted from 0.
        last: scalar, the last accuracy, or the mean of the last few.
        gap: scalar, ``best - last``.
        clean_at_best: scalar, the clean accuracy at ``best_epoch``; None without a clean curve.
    """

    best: jax.Array
    best_epoch: jax.Array
    last: jax.Array
    gap: jax.Array
    clean_at_best: jax.Array | None


def robust_overfitting(
    curve: ArrayLike, *, clean: ArrayLike | None = None, last: int = 1
) -> RobustOverfitting:
    """The gap between the best robust accuracy of a training and its last one.

        gap = max_e curve_e - mean of the last epochs,   best epoch = the first with the maximum

    Take the curve on a held-out part of the training set: an epoch chosen on the test set makes
    its accuracy there too good.

    Args:
        curve: [epochs] floating point, robust accuracy after each epoch. NaN is never the best.
        clean: [epochs] floating point, clean accuracy after each epoch.
        last: how many epochs the end is averaged over, from 1 to the number of epochs.

    Returns:
        `RobustOverfitting`; all NaN (epoch 0) where the whole curve is.

    Raises:
        TypeError: ``curve`` or ``clean`` is not floating point, or ``last`` no integer.
        ValueError: there are no epochs, shapes differ, or ``last`` is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import metrics
        >>> found = metrics.robust_overfitting(jnp.array([0.25, 0.5, 0.5, 0.25]))
        >>> int(found.best_epoch), float(found.gap)
        (1, 0.25)

    Reference:
        L. Rice, E. Wong, Z. Kolter, "Overfitting in Adversarially Robust Deep Learning", ICML
        2020, table 1 (best, final, difference).
    """
    curve = _checks.floating("curve", curve, ndim=1)
    if len(curve) == 0:
        raise ValueError(f"curve must have at least one epoch, got {_checks.describe(curve)}.")
    last = _checks.count("last", last, high=len(curve))
    known = jnp.where(jnp.isnan(curve), -jnp.inf, curve)
    epoch = jnp.argmax(known).astype(jnp.int32)
    best, end = curve[epoch], jnp.mean(curve[-last:])
    at_best = None
    if clean is not None:
        clean = _checks.floating("clean", clean)
        _checks.same_shape("clean", clean, "curve", curve)
        at_best = clean[epoch]
    return RobustOverfitting(best, epoch, end, best - end, at_best)
