"""Feature distances of projector distillation: normalise both sides, then LogSum or another.

Everything of this file takes features [B, D]: `pool` makes them of maps and tokens.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.losses._inputs import blank, hyperparameter, select

AxisName = str | tuple[str, ...]


def pool(features: ArrayLike, *, skip_tokens: int = 0) -> jax.Array:
    """Features of images as one vector per example: the mean over positions or tokens.

    Args:
        features: [B, D] (returned as they are), tokens [B, N, D], or maps [B, H, W, D].
        skip_tokens: leading tokens to leave out of the mean (class and distillation tokens), at
            least 0 and below N; 0 for other features.

    Returns:
        [B, D], in at least float32.

    Raises:
        TypeError: features are not floating point.
        ValueError: another number of dimensions, or too many tokens to skip.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> losses.pool(jnp.ones((8, 7, 7, 512))).shape
        (8, 512)

    Reference:
        R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
        Distillation", AAAI 2024 (features before the classifier, averaged over
        positions; without class and distillation token for transformers).
    """
    x = _checks.floating("features", features, min_ndim=2)
    if x.ndim > 4:
        raise ValueError(
            "features must be [B, D], tokens [B, N, D] or maps [B, H, W, D], got "
            f"{_checks.describe(x)}."
        )
    tokens = x.shape[1] if x.ndim == 3 else 1
    skip = _checks.count("skip_tokens", skip_tokens, low=0, high=tokens - 1)
    return jnp.mean(x[:, skip:] if skip else x, axis=tuple(range(1, x.ndim - 1)))


def center(
    x: ArrayLike, *, axis_name: AxisName | None = None, where: ArrayLike | None = None
) -> jax.Array:
    """Features less their mean over the batch.

    Args:
        x: [B, D] floating point.
        axis_name: the named axis (or axes) of shard_map or pmap over which the batch is split.
        where: [B] bool, False for rows to leave out of the mean; they come out as 0.

    Returns:
        [B, D] in at least float32.

    Raises:
        TypeError: ``x`` is not floating point, or ``where`` is not boolean.
        ValueError: ``x`` is not [B, D].

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> losses.center(jnp.array([[1.0], [3.0]])).tolist()
        [[-1.0], [1.0]]

    Reference:
        R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
        Distillation", AAAI 2024.
    """
    x, mask = _features("x", x, where)
    return blank(x - _total(x, axis_name) / _count(x, mask, axis_name), mask)


def standardize(
    x: ArrayLike,
    *,
    eps: ArrayLike = 1e-4,
    axis_name: AxisName | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Batch normalisation without state: each channel by its own mean and deviation in the batch.

        (x - mean) / sqrt(var + eps),   mean and (biased) var over the examples

    The variance is computed in two passes. There is no scale, no offset and no running average:
    the same in training and evaluation. Batch-coupled.

    Args:
        x: [B, D] floating point.
        eps: added to the variance, a finite scalar at least 0. With 0, constant channels give 0.
        axis_name: the named axis (or axes) of shard_map or pmap over which the batch is split; the
            statistics are then those of the whole batch.
        where: [B] bool, False for rows to leave out of the statistics; they come out as 0.

    Returns:
        [B, D] in at least float32.

    Raises:
        TypeError: ``x`` is not floating point, or ``where`` is not boolean.
        ValueError: ``x`` is not [B, D], the whole batch has fewer than 2 rows, or ``eps`` is
            negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> losses.standardize(jnp.array([[1.0], [3.0]]), eps=0.0).tolist()
        [[-1.0], [1.0]]

    Reference:
        R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
        Distillation", AAAI 2024.
    """
    x, mask = _features("x", x, where)
    _check_examples(x, axis_name)
    eps = hyperparameter("eps", eps, x.dtype, low=0)
    count = _count(x, mask, axis_name)
    mean = _total(x, axis_name) / count
    centred = blank(x - mean, mask)
    variance = _total(centred**2, axis_name) / count
    # A constant channel seldom equals its mean to the last digit; that isn't spread.
    rounding = 16 * jnp.finfo(x.dtype).eps * jax.lax.stop_gradient(mean)
    return centred * _inverse_root(jnp.where(variance <= rounding**2, 0, variance) + eps)


def l2_normalize(x: ArrayLike, *, eps: ArrayLike = 1e-12) -> jax.Array:
    """Each example divided by its length: ``x / max(|x|, eps)``.

    Args:
        x: [..., D] floating point.
        eps: smallest length to divide by, a finite scalar above 0.

    Returns:
        [..., D] in at least float32; zero vectors stay zero, with a finite gradient.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``eps`` is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> print([f"{x:.3f}" for x in losses.l2_normalize(jnp.array([3.0, 4.0]))])
        ['0.600', '0.800']

    Reference:
        R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
        Distillation", AAAI 2024 (the ablation of normalisations).
    """
    x = _checks.floating("x", x, min_ndim=1)
    eps = hyperparameter("eps", eps, x.dtype, above=0)
    squares = jnp.sum(x**2, axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.where(squares == 0, 1, squares))
    return x / jnp.where(squares == 0, eps, jnp.maximum(length, eps))


def group_standardize(x: ArrayLike, *, groups: int = 4, eps: ArrayLike = 0.0) -> jax.Array:
    """Group normalisation without scale and offset: within each example, by groups of channels.

    Args:
        x: [B, D] floating point.
        groups: number of groups of neighbouring channels; divides D.
        eps: added to the variance, a finite scalar at least 0. With 0, constant groups give 0.

    Returns:
        [B, D] in at least float32.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``groups`` does not divide D, or ``eps`` is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> losses.group_standardize(jnp.array([[1.0, 3.0, 10.0, 20.0]]), groups=2).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]

    Reference:
        Y. Wu, K. He, "Group Normalization", ECCV 2018; as one of the normalisations compared by
        R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
        Distillation", AAAI 2024.
    """
    x, _ = _features("x", x, None)
    groups = _checks.count("groups", groups)
    if x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels of x, got {groups}.")
    eps = hyperparameter("eps", eps, x.dtype, low=0)
    grouped = x.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(axis=-1, keepdims=True)
    centred = grouped - mean
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    rounding = 16 * jnp.finfo(x.dtype).eps * jax.lax.stop_gradient(mean)
    scale = _inverse_root(jnp.where(variance <= rounding**2, 0, variance) + eps)
    return (centred * scale).reshape(x.shape)


def log_sum(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    alpha: ArrayLike = 4.0,
    log_eps: ArrayLike = 0.0,
    axis_name: AxisName | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The LogSum distance of (normalised) features.

        log(sum over examples and channels of |s - t|^alpha + log_eps)

    Its gradient is ``alpha p / (s - t)`` with ``p`` the softmax of ``alpha log|s - t|``: pairs that
    match closely hardly count. It grows as the match gets better, up to ``alpha / max|s - t|``, so
    clip gradients or give a ``log_eps``. Batch-coupled.

    Args:
        student: [B, D] floating point, already projected and normalised (`standardize`).
        teacher: [B, D] floating point, normalised; no gradient flows to it.
        alpha: exponent, a finite scalar above 0. Below 1 the gradient of small differences is
            unbounded; a warning says so.
        log_eps: floor inside the logarithm, a finite scalar at least 0. The published ImageNet
            form has none.
        axis_name: the named axis (or axes) of shard_map or pmap over which the batch is split; the
            sum inside the logarithm is then that of the whole batch.
        where: [B] bool, False for rows to leave out; 0 is returned if none is left.

    Returns:
        Scalar in at least float32. At a perfect match -inf, or ``log(log_eps)``; the gradients
        there are 0. Nothing underflows: the largest difference is taken out of the power.

    Raises:
        TypeError: features are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ or are not [B, D], or an option is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> s, t = jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 0.0]])
        >>> print(f"{jnp.exp(losses.log_sum(s, t)):.1f}")  # 1^4 + 2^4
        17.0

    Reference:
        R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
        Distillation", AAAI 2024, the LogSum distance (alpha = 4).
    """
    student, teacher, mask = _pair(student, teacher, where)
    difference = blank(student - teacher, mask)
    value = _log_power_sum(difference, alpha, log_eps, axis_name, "alpha")
    return _of_any(value, mask, axis_name)


def correlation_log_sum(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    power: ArrayLike = 4.0,
    log_eps: ArrayLike = 1e-5,
    axis_name: AxisName | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The LogSum of correlations, which the DeiT experiments ran.

        rho_j = mean over examples of s_j t_j
        loss = log(sum over channels of |rho_j - 1|^power + log_eps)

    For standardised features (`standardize` with ``eps=0``) rho is the correlation of a student
    channel with its teacher channel, and ``1 - rho_j`` is half the mean of ``(s_j - t_j)^2``.
    Batch-coupled.

    Args:
        student: [B, D] floating point, already projected and standardised.
        teacher: [B, D] floating point, standardised; no gradient flows to it.
        power: exponent, a finite scalar above 0.
        log_eps: floor inside the logarithm, a finite scalar at least 0.
        axis_name: the named axis (or axes) of shard_map or pmap over which the batch is split.
        where: [B] bool, False for rows to leave out; 0 is returned if none is left.

    Returns:
        Scalar in at least float32.

    Raises:
        TypeError: features are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ or are not [B, D], the whole batch has fewer than 2 rows, or an
            option is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> x = losses.standardize(jnp.array([[0.0, 5.0], [1.0, 4.0], [2.0, 9.0]]), eps=0.0)
        >>> print(f"{jnp.exp(losses.correlation_log_sum(x, -x)):.3f}")  # two channels of (-1 - 1)^4
        32.000

    Reference:
        R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
        Distillation", AAAI 2024, and its published DeiT code.
    """
    correlation, mask = _correlation(student, teacher, axis_name, where)
    value = _log_power_sum(correlation - 1, power, log_eps, None, "power")
    return _of_any(value, mask, axis_name)


def correlation_distance(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    power: ArrayLike = 2.0,
    axis_name: AxisName | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """How far the channels' correlations are from 1, as a norm: ``(sum |rho_j - 1|^p)^(1/p)``.

    Rows of the distance ablation (p = 2 and 4). Batch-coupled.

    Args:
        student: [B, D] floating point, already projected and standardised.
        teacher: [B, D] floating point, standardised; no gradient flows to it.
        power: p, a finite scalar above 0.
        axis_name: the named axis (or axes) of shard_map or pmap over which the batch is split.
        where: [B] bool, False for rows to leave out; 0 is returned if none is left.

    Returns:
        Scalar in at least float32, with gradient 0 where it is 0.

    Raises:
        TypeError: features are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ or are not [B, D], the whole batch has fewer than 2 rows, or
            ``power`` is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> x = losses.standardize(jnp.array([[0.0], [1.0], [2.0]]), eps=0.0)
        >>> print(f"{losses.correlation_distance(x, -x):.3f}")
        2.000

    Reference:
        R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
        Distillation", AAAI 2024 (the ablation of distances).
    """
    correlation, mask = _correlation(student, teacher, axis_name, where)
    log_sum_of_powers = _log_power_sum(correlation - 1, power, 0.0, None, "power")
    value = jnp.exp(log_sum_of_powers / hyperparameter("power", power, correlation.dtype, above=0))
    return _of_any(value, mask, axis_name)


def feature_mse(
    student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Mean squared difference of the features of each example.

    Args:
        student: [B, D] floating point, already projected.
        teacher: [B, D] floating point; no gradient flows to it.
        where: [B] bool, False for rows to leave out; they count 0.

    Returns:
        [B] in at least float32.

    Raises:
        TypeError: features are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ or are not [B, D].

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> losses.feature_mse(jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2))).tolist()
        [5.0]

    Reference:
        A. Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, equation 3.
    """
    student, teacher, mask = _pair(student, teacher, where)
    return select(jnp.mean((student - teacher) ** 2, axis=-1), mask)


def log_sum_shares(student: ArrayLike, teacher: ArrayLike, *, alpha: ArrayLike = 4.0) -> jax.Array:
    """Which entries LogSum listens to: ``|s - t|^alpha`` as a share of its sum.

    The gradient of `log_sum` is ``alpha * shares / (student - teacher)``.

    Args:
        student: [B, D] floating point.
        teacher: [B, D] floating point.
        alpha: exponent, a finite scalar above 0.

    Returns:
        [B, D] in at least float32, not negative, of sum 1 (all 0 at a perfect match).

    Raises:
        TypeError: features are not floating point.
        ValueError: shapes differ or are not [B, D], or ``alpha`` is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> losses.log_sum_shares(jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2)), alpha=1.0).tolist()
        [[0.25, 0.75]]

    Reference:
        R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
        Distillation", AAAI 2024 (why LogSum helps across a large gap in
        capacity).
    """
    student, teacher, _ = _pair(student, teacher, None)
    alpha = hyperparameter("alpha", alpha, student.dtype, above=0)
    size = jnp.abs(student - teacher)
    largest = jnp.max(size)
    powers = (size / jnp.where(largest == 0, 1, largest)) ** alpha
    return powers / jnp.where(largest == 0, 1, jnp.sum(powers))


def _features(
    name: str, x: ArrayLike, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array | None]:
    x = _checks.floating(name, x, ndim=2)
    if x.size == 0:
        raise ValueError(f"{name} must have examples and channels, got {_checks.describe(x)}.")
    mask = _checks.mask("where", where, x.shape[:1])
    return blank(x, mask), mask


def _inverse_root(variance: jax.Array) -> jax.Array:
    """``1 / sqrt(variance)``; 0, also in the gradient, where there is none. NaN is passed on."""
    root = jax.lax.rsqrt(jnp.where(variance > 0, variance, 1))
    return jnp.where(variance == 0, 0, root + 0 * variance)


def _pair(
    student: ArrayLike, teacher: ArrayLike, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    student, mask = _features("student", student, where)
    teacher, _ = _features("teacher", teacher, where)
    _checks.same_shape("student", student, "teacher", teacher)
    dtype = jnp.promote_types(student.dtype, teacher.dtype)
    return student.astype(dtype), jax.lax.stop_gradient(teacher).astype(dtype), mask


def _check_examples(x: jax.Array, axis_name: AxisName | None) -> None:
    shards = 1 if axis_name is None else jax.lax.psum(1, axis_name)
    if x.shape[0] * shards < 2:
        raise ValueError(
            f"statistics over the batch need at least 2 samples, got {_checks.describe(x)}."
        )


def _total(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The sum over the examples of all shards, kept as an axis of 1."""
    x = jnp.sum(x, axis=0, keepdims=True)
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def _count(x: jax.Array, mask: jax.Array | None, axis_name: AxisName | None) -> Any:
    if mask is None:
        return x.shape[0] * (1 if axis_name is None else jax.lax.psum(1, axis_name))
    return jnp.maximum(_total(mask.astype(x.dtype)[:, None], axis_name), 1)


def _correlation(
    student: ArrayLike,
    teacher: ArrayLike,
    axis_name: AxisName | None,
    where: ArrayLike | None,
) -> tuple[jax.Array, jax.Array | None]:
    student, teacher, mask = _pair(student, teacher, where)
    _check_examples(student, axis_name)
    return _total(student * teacher, axis_name) / _count(student, mask, axis_name), mask


def _of_any(value: jax.Array, mask: jax.Array | None, axis_name: AxisName | None) -> jax.Array:
    """The value of a batch, 0 if no row of it is left."""
    if mask is None:
        return value
    rows = jnp.sum(mask)
    return jnp.where((rows if axis_name is None else jax.lax.psum(rows, axis_name)) > 0, value, 0)


def _log_power_sum(
    difference: jax.Array, alpha: Any, log_eps: Any, axis_name: AxisName | None, name: str
) -> jax.Array:
    """``log(sum |d|^alpha + log_eps)`` over all entries, and shards, of ``difference`` [B, D]."""
    _warn_below_one(name, alpha)
    alpha = hyperparameter(name, alpha, difference.dtype, above=0)
    log_eps = hyperparameter("log_eps", log_eps, difference.dtype, low=0)
    # abs has the slope 1 at 0 in JAX, the sign has 0 there.
    size = difference * jax.lax.stop_gradient(jnp.sign(difference))
    largest = jax.lax.stop_gradient(jnp.max(size))
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    unit = jnp.where(largest == 0, 1, largest)
    # The power of 0 apart: its slope isn't finite below alpha = 1.
    some = size > 0
    powers = jnp.where(size == 0, 0, jnp.where(some, size / unit, 1 + 0 * size) ** alpha)
    total = jnp.sum(powers)
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    perfect = largest == 0
    value = alpha * jnp.log(unit) + jnp.log(jnp.where(perfect, 1, total))
    value = jnp.where(perfect, -jnp.inf, value)
    floor = jnp.where(log_eps > 0, jnp.log(jnp.where(log_eps > 0, log_eps, 1)), -jnp.inf)
    return jnp.where(log_eps > 0, jnp.logaddexp(value, floor), value)


def _warn_below_one(name: str, alpha: Any) -> None:
    if isinstance(alpha, (int, float, np.number)) and 0 < alpha < 1:
        warnings.warn(
            f"{name} = {alpha:g} is below 1: the gradient of small differences is unbounded.",
            stacklevel=4,
        )
