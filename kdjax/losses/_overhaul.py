"""Distances of feature maps that are already as wide as the teacher's: partial and pooled ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.losses._inputs import select
from kdjax.losses._spatial import blank_rows, resize_mean

# The probability of a negative response below which the margin is -3 standard deviations.
_RARE = 0.001


def hierarchical_context(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    levels: Sequence[int] = (4, 2, 1),
    where: ArrayLike | None = None,
) -> jax.Array:
    """The hierarchical context loss (HCL) of ReviewKD: differences at several resolutions.

        sum_j 2^-j mean((P_j s - P_j t)^2) / sum_j 2^-j,   j = 0 .. number of levels used

    where P_0 keeps the map and P_j averages it down to the j-th level that is smaller than the
    map. The mean is over the positions and channels of an example, so that the mean over the batch
    is the published value of one stage; the published loss is the sum over stages.

    Args:
        student: [B, H, W, C] floating point, already of the teacher's shape.
        teacher: [B, H, W, C] floating point; no gradient flows to it.
        levels: sides of the pooled maps, in the order of their weights 1/2, 1/4, ... Those not
            below both height and width are left out (the published code looks at the height only
            and is meant for square maps).
        where: [B] bool, False for rows to leave out; they count 0.

    Returns:
        [B] in at least float32.

    Raises:
        TypeError: features are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ or are not [B, H, W, C], or a level is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> s, t = 3 * jnp.ones((1, 8, 8, 5)), jnp.ones((1, 8, 8, 5))
        >>> losses.hierarchical_context(s, t).tolist()  # the same 4 at every level
        [4.0]

    Reference:
        P. Chen, S. Liu, H. Zhao, J. Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021,
        section 3.3.
    """
    student, teacher, mask = map_pair(student, teacher, where)
    _checks.same_shape("teacher", teacher, "student", student)
    used = [level for level in checked_levels(levels) if level < min(student.shape[1:3])]
    difference = student - teacher
    value = jnp.mean(difference**2, axis=(1, 2, 3))
    for j, level in enumerate(used, 1):
        # Pooling is linear, so that the difference can be pooled.
        pooled = resize_mean(difference, (level, level))
        value = value + 2.0**-j * jnp.mean(pooled**2, axis=(1, 2, 3))
    return select(value / (2 - 2.0 ** -len(used)), mask)


def ofd_margin(scale: ArrayLike, bias: ArrayLike) -> jax.Array:
    """The margin of OFD: the mean of a channel's negative responses, by its batch normalisation.

        m = E[x | x < 0],  x ~ N(bias, scale^2)
          = bias - |scale| phi(bias / |scale|) / Phi(-bias / |scale|)

    where Phi(-bias / |scale|), the probability of a negative response, is above 0.001, and
    -3 |scale| elsewhere, as in the published code. phi and Phi are the standard normal density and
    distribution function.

    Args:
        scale: [C] floating point, the scale (torch: weight) of the teacher's batch normalisation
            before the activation; of any sign. For 0, which the published code can't take, the
            limit is returned.
        bias: [C] floating point, its offset.

    Returns:
        [C] in at least float32, not above 0.

    Raises:
        TypeError: not floating point.
        ValueError: shapes differ or are not [C].

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> margin = losses.ofd_margin(jnp.array([1.0, 1.0]), jnp.array([0.0, 9.0]))
        >>> [f"{m:.3f}" for m in margin]  # half a normal distribution; hardly ever negative
        ['-0.798', '-3.000']

    Reference:
        B. Heo, J. Kim, S. Yun, H. Park, N. Kwak, J. Y. Choi, "A Comprehensive Overhaul of Feature
        Distillation", ICCV 2019, equation 2 and its appendix.
    """
    scale = _checks.floating("scale", scale, ndim=1)
    bias = _checks.floating("bias", bias, ndim=1)
    _checks.same_shape("bias", bias, "scale", scale)
    dtype = jnp.promote_types(scale.dtype, bias.dtype)
    scale, bias = jnp.abs(scale.astype(dtype)), bias.astype(dtype)
    spread = jnp.where(scale == 0, 1, scale)
    z = bias / spread
    negative = jax.scipy.stats.norm.cdf(-z)
    common = (negative > _RARE) & (scale > 0)
    density = jnp.exp(-(jnp.where(common, z, 0) ** 2) / 2) / math.sqrt(2 * math.pi)
    truncated = bias - scale * density / jnp.where(common, negative, 1)
    rare = jnp.where(scale == 0, jnp.minimum(bias, 0), -3 * scale)
    return jnp.where(common, truncated, rare)


def ofd(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    margin: ArrayLike,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The partial L2 distance of OFD, of maps before the activation: the sum over a map.

        sum over positions and channels of
          (s - t)^2   where t > 0
          (s - t)^2   where m < t <= 0 and s > t
          (s - m)^2   where t <= m and s > m
          0           elsewhere: the activation drops what is negative on both sides

    The teacher's map is first pooled to the student's height and width. The mean over the batch is
    the published value of one stage.

    Args:
        student: [B, H, W, C] floating point, through a connector to the teacher's channels.
        teacher: [B, H', W', C] floating point, before the activation; no gradient flows to it.
        margin: [C] floating point, not above 0: the teacher's `ofd_margin`; no gradient flows to
            it.
        where: [B] bool, False for rows to leave out; they count 0.

    Returns:
        [B] in at least float32.

    Raises:
        TypeError: an input is not floating point, or ``where`` is not boolean.
        ValueError: shapes don't fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> s = jnp.array([1.0, -5.0, 1.0]).reshape(1, 1, 1, 3)
        >>> t = jnp.array([3.0, -2.0, -2.0]).reshape(1, 1, 1, 3)
        >>> losses.ofd(s, t, margin=jnp.full(3, -1.0)).tolist()  # 2^2, nothing, and 2^2
        [8.0]

    Reference:
        B. Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, equations 1
        to 4.
    """
    student, teacher, mask = map_pair(student, teacher, where)
    margin = _checks.floating("margin", margin, ndim=1)
    _checks.shape("margin", margin, student.shape[-1:], "(one per channel)")
    teacher = resize_mean(teacher, (student.shape[1], student.shape[2]))
    m = jax.lax.stop_gradient(margin).astype(student.dtype)[None, None, None]
    target = jnp.where(teacher <= m, m, teacher)  # NaN is passed on
    dropped = (teacher <= 0) & (student <= target)
    value = jnp.sum(jnp.where(dropped, 0, (student - target) ** 2), axis=(1, 2, 3))
    return select(value, mask)


def checked_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """Sides of pooled maps."""
    if not isinstance(levels, Sequence) or isinstance(levels, str):
        raise TypeError(f"levels must be a sequence of integers, got {_checks.describe(levels)}.")
    return tuple(_checks.count("levels", level) for level in levels)


def map_pair(
    student: ArrayLike, teacher: ArrayLike, where: ArrayLike | None, *, channels: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Maps of the same examples, and channels, in one dtype, the teacher's without gradient."""
    student = _checks.floating("student", student, ndim=4)
    teacher = _checks.floating("teacher", teacher, ndim=4)
    if student.size == 0:
        raise ValueError(
            f"student must have examples and channels, got {_checks.describe(student)}."
        )
    wanted = (student.shape[0], *teacher.shape[1:3], (student if channels else teacher).shape[3])
    _checks.shape("teacher", teacher, wanted, "to fit student")
    mask = _checks.mask("where", where, student.shape[:1])
    dtype = jnp.promote_types(student.dtype, teacher.dtype)
    student, teacher = blank_rows(student, mask), blank_rows(teacher, mask)
    return student.astype(dtype), jax.lax.stop_gradient(teacher).astype(dtype), mask
