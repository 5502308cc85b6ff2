"""Losses of feature maps that train nothing of their own: attention, selectivity, flow.

Maps are [B, H, W, C]. Those of one side that are larger are averaged down to the other's size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.losses._inputs import hyperparameter, select
from kdjax.losses._spatial import blank_rows, resize_mean


def attention_map(features: ArrayLike, *, power: ArrayLike = 2.0) -> jax.Array:
    """Where a network's features are large: the mean of their powers over channels, normalised.

        A = m / max(|m|, 1e-12),   m[h, w] = mean over c of f[h, w, c]^p,   |m| over all places

    Args:
        features: [B, H, W, C] floating point.
        power: p, a finite scalar above 0. Odd numbers keep the sign of the features, as the codes
            do; for all others it is that of their size. (Behind a ReLU that is the same.)

    Returns:
        [B, H, W] in at least float32, each map of length 1; 0, also in its gradient, where all
        features are 0.

    Raises:
        TypeError: features are not floating point.
        ValueError: features are not [B, H, W, C], or ``power`` is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> maps = jnp.zeros((1, 2, 2, 3)).at[0, 0, 1].set(5.0)
        >>> losses.attention_map(maps)[0].tolist()
        [[0.0, 1.0], [0.0, 0.0]]

    Reference:
        S. Zagoruyko, N. Komodakis, "Paying More Attention to Attention: Improving the Performance
        of Convolutional Neural Networks via Attention Transfer", ICLR 2017, section 3.1.
    """
    features = _checks.floating("features", features, ndim=4)
    power = hyperparameter("power", power, features.dtype, above=0)
    return unit(jnp.mean(_power(features, power), axis=-1), axis=(1, 2))


def attention_transfer(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    power: ArrayLike = 2.0,
    squared: bool = True,
    where: ArrayLike | None = None,
) -> jax.Array:
    """How far the student's attention map is from the teacher's.

        mean over places of (A(s) - A(t))^2,   or |A(s) - A(t)|_2 with squared=False

    A is `attention_map`. The squared form is that of the authors' published code, RepDistiller and
    mdistiller, whose weight is 1000; the paper prints the norm, whose gradient has no limit at
    equality (0 is returned there). Features are averaged down to the smaller size, in both height
    and width, before their map is made.

    Args:
        student: [B, H, W, C] floating point.
        teacher: [B, H', W', C'] floating point; no gradient flows to it.
        power: of the attention maps, a finite scalar above 0.
        squared: False for the paper's norm.
        where: [B] bool, False for rows to leave out; they count 0.

    Returns:
        [B] in at least float32.

    Raises:
        TypeError: features are not floating point, or ``where`` is not boolean.
        ValueError: features are not maps of equally many examples, or ``power`` is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> one, other = (jnp.zeros((1, 2, 2, 3)).at[0, 0, i].set(5.0) for i in (0, 1))
        >>> losses.attention_transfer(one, other).tolist()  # 2 of 4 places differ by 1
        [0.5]

    Reference:
        S. Zagoruyko, N. Komodakis, "Paying More Attention to Attention: Improving the Performance
        of Convolutional Neural Networks via Attention Transfer", ICLR 2017, equation 2.
    """
    student, teacher, mask = pair(student, teacher, where)
    student, teacher = same_size(student, teacher)
    difference = attention_map(student, power=power) - attention_map(teacher, power=power)
    difference = difference.reshape(len(difference), -1)
    values = jnp.mean(difference**2, axis=-1) if squared else length(difference)
    return select(values, mask)


def nst(student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Neuron selectivity transfer: the discrepancy (MMD) of the channels' spatial patterns.

        mean k(t, t) + mean k(s, s) - 2 mean k(s, t),   k(a, b) = (a . b)^2

    Means are over all pairs of channels, each channel's map divided by its length over all places.
    Equal to ``|S S^T / C - T T^T / C'|^2`` with S [H W, C], which is how it is computed where that
    is cheaper. The published weight is 50 (RepDistiller, mdistiller).

    Args:
        student: [B, H, W, C] floating point.
        teacher: [B, H', W', C'] floating point; no gradient flows to it. The larger maps are
            averaged down to the size of the smaller.
        where: [B] bool, False for rows to leave out; they count 0.

    Returns:
        [B] in at least float32, at least 0 up to rounding.

    Raises:
        TypeError: features are not floating point, or ``where`` is not boolean.
        ValueError: features are not maps of equally many examples.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> one, other = (jnp.zeros((1, 2, 2, 1)).at[0, 0, i].set(5.0) for i in (0, 1))
        >>> losses.nst(one, other).tolist()
        [2.0]

    Reference:
        Z. Huang, N. Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
        arXiv 1707.01219, 2017, section 4 (the polynomial kernel, d = 2, c = 0).
    """
    student, teacher, mask = pair(student, teacher, where)
    student, teacher = same_size(student, teacher)
    s, t = (unit(x, axis=(1, 2)).reshape(x.shape[0], -1, x.shape[-1]) for x in (student, teacher))
    places, widths = s.shape[1], (s.shape[-1], t.shape[-1])
    if places * sum(widths) <= widths[0] ** 2 + widths[1] ** 2 + widths[0] * widths[1]:
        # No difference of large numbers, either.
        between = [_product("bnc,bmc->bnm", x, x) / x.shape[-1] for x in (s, t)]
        values = jnp.sum((between[0] - between[1]) ** 2, axis=(1, 2))
    else:
        ss, tt, st = (
            jnp.mean(_product("bnc,bnd->bcd", a, b) ** 2, axis=(1, 2))
            for a, b in ((s, s), (t, t), (s, t))
        )
        values = tt + ss - 2 * st
    return select(values, mask)


def fsp(
    student_first: ArrayLike,
    student_second: ArrayLike,
    teacher_first: ArrayLike,
    teacher_second: ArrayLike,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The flow of solution procedure: how features of one stage go with those of the next.

        mean over pairs of channels of (G(s) - G(t))^2,   G[c, d] = mean over places of f_c g_d

    f is the first and g the second stage's map, the larger of the two averaged down to the other's
    size. As in RepDistiller; torchdistill takes the maximum there, and sums norms.

    Args:
        student_first: [B, H, W, C] floating point, the earlier stage.
        student_second: [B, H', W', D] floating point, the later stage.
        teacher_first: [B, ., ., C] floating point, of any size; no gradient flows to it.
        teacher_second: [B, ., ., D] floating point, of any size; no gradient flows to it.
        where: [B] bool, False for rows to leave out; they count 0.

    Returns:
        [B] in at least float32.

    Raises:
        TypeError: features are not floating point, or ``where`` is not boolean.
        ValueError: features are not maps of equally many examples, or the student's have other
            channels than the teacher's.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> s, t = jnp.ones((1, 4, 4, 2)), jnp.zeros((1, 2, 2, 2))
        >>> losses.fsp(s, 3 * s[:, ::2, ::2], t, t).tolist()
        [9.0]

    Reference:
        J. Yim, D. Joo, J. Bae, J. Kim, "A Gift from Knowledge Distillation: Fast Optimization,
        Network Minimization and Transfer Learning", CVPR 2017, equations 1 and 2 (there a sum over
        the channels).
    """
    student_first = _checks.floating("student_first", student_first, ndim=4)
    mask = _checks.mask("where", where, student_first.shape[:1])
    rows, channels = student_first.shape[0], student_first.shape[-1]
    student_second = _checks.floating("student_second", student_second, ndim=4)
    _of_rows("student_second", student_second, rows, None)
    teacher_first = _checks.floating("teacher_first", teacher_first, ndim=4)
    _of_rows("teacher_first", teacher_first, rows, channels)
    teacher_second = _checks.floating("teacher_second", teacher_second, ndim=4)
    _of_rows("teacher_second", teacher_second, rows, student_second.shape[-1])
    given = (student_first, student_second, teacher_first, teacher_second)
    dtype = jnp.result_type(*given)
    s1, s2, t1, t2 = (blank_rows(x.astype(dtype), mask) for x in given)
    t1, t2 = jax.lax.stop_gradient((t1, t2))
    difference = _flow(s1, s2) - _flow(t1, t2)
    return select(jnp.mean(difference**2, axis=(1, 2)), mask)


def pair(
    student: ArrayLike, teacher: ArrayLike, where: ArrayLike | None, *, maps: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Features of both sides in one dtype, the teacher without gradient, masked rows zeroed.

    Args:
      student: as the loss got it.
      teacher: as the loss got it.
      where: as the loss got it.
      maps: [B, H, W, C] of any sizes and channels; False is [B, ...], alike on both sides.
    """
    student, teacher = (
        _checks.floating(name, x, ndim=4 if maps else None, min_ndim=2)
        for name, x in (("student", student), ("teacher", teacher))
    )
    if student.size == 0:
        raise ValueError(f"student must not be empty, got {_checks.describe(student)}.")
    mask = _checks.mask("where", where, student.shape[:1])
    if maps:
        _of_rows("teacher", teacher, student.shape[0], None)
    else:
        _checks.same_shape("student", student, "teacher", teacher)
    dtype = jnp.promote_types(student.dtype, teacher.dtype)
    teacher = jax.lax.stop_gradient(teacher)
    student, teacher = (blank_rows(x.astype(dtype), mask) for x in (student, teacher))
    return student, teacher, mask


def same_size(*maps: jax.Array) -> list[jax.Array]:
    """Maps averaged down to the smallest of their heights and of their widths."""
    size = min(x.shape[1] for x in maps), min(x.shape[2] for x in maps)
    return [resize_mean(x, size) for x in maps]


def unit(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """``x / max(|x|, 1e-12)``, the length over ``axis``; 0 with gradient 0 where all is 0."""
    squares = jnp.sum(x**2, axis=axis, keepdims=True)
    none = squares == 0
    size = jnp.maximum(jnp.sqrt(jnp.where(none, 1, squares)), 1e-12)
    return jnp.where(none, 0, x / size)


def length(x: jax.Array) -> jax.Array:
    """The length over the last axis, with gradient 0 where it is 0."""
    squares = jnp.sum(x**2, axis=-1)
    none = squares == 0
    return jnp.where(none, 0, jnp.sqrt(jnp.where(none, 1, squares)))


def _of_rows(name: str, x: jax.Array, rows: int, channels: int | None) -> None:
    wanted = (rows, *x.shape[1:3], x.shape[-1] if channels is None else channels)
    why = "(examples" + (")" if channels is None else " and channels as the student's)")
    _checks.shape(name, x, wanted, why)


def _power(x: jax.Array, power: jax.Array) -> jax.Array:
    """``x^p`` for odd p, ``|x|^p`` for any other, with finite slopes."""
    size = x * jax.lax.stop_gradient(jnp.sign(x))
    some = x != 0
    rest = jnp.where(some, size, 1) ** (power - 1)
    rest = jnp.where(some, rest, (power == 1).astype(x.dtype))
    return jnp.where(power % 2 == 1, x, size) * rest


def _product(of: str, a: jax.Array, b: jax.Array) -> jax.Array:
    # Accelerators multiply float32 in fewer digits unless they are told.
    return jnp.einsum(of, a, b, precision=jax.lax.Precision.HIGHEST)


def _flow(first: jax.Array, second: jax.Array) -> jax.Array:
    first, second = same_size(first, second)
    return _product("bhwc,bhwd->bcd", first, second) / (first.shape[1] * first.shape[2])
