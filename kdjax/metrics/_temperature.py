"""The temperature that calibrates a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.metrics._calibration import _at_label, _counted, _invalid

Slopes = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
Bracket = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]

# Of the mean spread of a row's logits: far beyond what any data can tell apart.
_BOUND = 1e3
# Bisection alone needs 55 halvings of the bracket to reach neighbouring float64 numbers.
_MOST_STEPS = 100


def fit_temperature(
    logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """The temperature T at which softmax(z / T) gives the labels the largest likelihood.

        T = argmin_T mean of -log softmax(z / T)_label,   T > 0

    Fit it on held-out logits and divide the test logits by it: predictions stay, confidence
    changes. The problem is convex in 1 / T. The result scales with the logits, and lies within
    1/1000 and 1000 times the mean spread (largest minus smallest logit of a row): it is at the
    lower bound where no row is wrong, because then the likelihood rises for ever as T falls, and
    at the upper one where the logits tell nothing of the labels. Both give a warning where the
    logits are known.

    Args:
        logits: [..., C] floating point; logits, not probabilities.
        labels: [...] integer class indices, -1 for rows to leave out.
        where: [...] bool, False for rows to leave out. None keeps all.

    Returns:
        Scalar in at least float32, above 0; 1 where all logits of every row are equal. NaN without
        rows and where a logit is not finite. It is held fixed: no gradient flows through it.

    Raises:
        TypeError: ``logits`` are not floating point or ``labels`` not integers.
        ValueError: shapes do not fit, or a label outside -1 .. C-1 (NaN inside jit).

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import metrics
        >>> logits = jnp.array([[8.0, 0.0]] * 4)  # sure, but right in 3 cases of 4
        >>> temperature = metrics.fit_temperature(logits, jnp.array([0, 0, 0, 1]))
        >>> float((8 / temperature - jnp.log(3.0)).round(4))
        0.0

    Reference:
        C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern Neural Networks",
        ICML 2017, equation 9.
    """
    z = _checks.floating("logits", logits, min_ndim=1)
    labels, counted = _counted(labels, z, where)
    temperature, at_bound = _fit(z, labels, counted)
    if not _checks.is_traced(at_bound) and at_bound.ndim == 0 and at_bound != 0:
        why = (
            "no row is wrong, so that the likelihood rises for ever as it falls"
            if at_bound < 0
            else "the logits do not speak for the labels"
        )
        warnings.warn(
            f"the temperature is at its bound of {float(temperature):.3g}: {why}.", stacklevel=2
        )
    return temperature


@jax.jit
def _fit(z: jax.Array, labels: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The temperature, and -1, 0 or 1: at the lower bound, inside, at the upper one."""
    z = jax.lax.stop_gradient(jnp.where(counted[..., None], z, 0))
    valid = ~jnp.any(_invalid(labels, z.shape[-1]) & counted) & jnp.any(counted)
    valid &= jnp.isfinite(z).all()
    rows = jnp.sum(counted).astype(z.dtype)
    spread = jnp.sum(jnp.max(z, axis=-1) - jnp.min(z, axis=-1)) / rows
    scale = jnp.where(spread > 0, spread, 1)
    z = z / scale
    # How far each class lies above the label: where the label leads no term is positive, so that
    # the sign of the slope is exact there.
    lead = jnp.where(counted[..., None], z - _at_label(z, labels)[..., None], 0)

    def slopes(a: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First and second derivative of the mean loss by the inverse temperature."""
        p = jax.nn.softmax(a * z, axis=-1)
        mean = jnp.sum(p * lead, axis=-1)
        variance = jnp.sum(p * jnp.square(lead - mean[..., None]), axis=-1)
        return jnp.sum(mean) / rows, jnp.sum(variance) / rows

    low, high = jnp.full((), 1 / _BOUND, z.dtype), jnp.full((), _BOUND, z.dtype)
    cold, hot = slopes(high)[0] <= 0, slopes(low)[0] >= 0
    inverse = _root(slopes, low, high)
    inverse = jnp.where(cold, high, jnp.where(hot, low, inverse))
    flat = spread == 0
    temperature = jnp.where(flat, 1, scale / inverse)
    at_bound = jnp.where(flat | ~valid, 0, hot.astype(jnp.int32) - cold.astype(jnp.int32))
    return jnp.where(valid, temperature, jnp.nan), at_bound


def _root(slopes: Slopes, low: jax.Array, high: jax.Array) -> jax.Array:
    """Newton's steps inside a bracket, which is halved (geometrically) where they are slow."""
    tolerance = 4 * jnp.finfo(low.dtype).eps

    def unfinished(carry: Bracket) -> jax.Array:
        low, high, a, step, count = carry
        return (jnp.abs(step) > tolerance * a) & (high > low) & (count < _MOST_STEPS)

    def improve(carry: Bracket) -> Bracket:
        low, high, a, step, count = carry
        slope, curvature = slopes(a)
        low, high = jnp.where(slope < 0, a, low), jnp.where(slope < 0, high, a)
        newton = -slope / jnp.where(curvature > 0, curvature, 1)
        inside = (a + newton > low) & (a + newton < high) & (curvature > 0)
        fast = jnp.abs(newton) < 0.5 * jnp.abs(step)
        step = jnp.where(slope == 0, 0, jnp.where(inside & fast, newton, jnp.sqrt(low * high) - a))
        return low, high, a + step, step, count + 1

    carry = (low, high, jnp.sqrt(low * high), high - low, jnp.int32(0))
    return jax.lax.while_loop(unfinished, improve, carry)[2]
