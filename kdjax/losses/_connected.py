"""Losses of features that come out of a trained layer: variational, factors, boundaries.

The layers are parts of the Terms of the same names.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.losses._inputs import hyperparameter, select
from kdjax.losses._maps import length, pair, unit
from kdjax.losses._spatial import blank_rows


def vid(
    mean: ArrayLike,
    teacher: ArrayLike,
    log_scale: ArrayLike,
    *,
    eps: ArrayLike = 1e-5,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Variational information distillation: the teacher's features under a Gaussian, as a loss.

        mean over places and channels of ((mu - t)^2 / v + log v) / 2,   v = log(1 + e^a) + eps

    That is the negative logarithm of the density without its constant, ``log(2 pi) / 2``: it may
    be negative. mu is predicted from the student's features and a is trained. As in RepDistiller
    and mdistiller (weight 1), except that ``log(1 + e^a)`` does not overflow.

    Args:
        mean: mu, [B, ..., C] floating point: the student's features behind a trained regressor.
        teacher: [B, ..., C] floating point; no gradient flows to it.
        log_scale: a, [C] floating point, or of the shape of ``teacher``.
        eps: smallest variance, a finite scalar above 0.
        where: [B] bool, False for rows to leave out; they count 0.

    Returns:
        [B] in at least float32.

    Raises:
        TypeError: arrays are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, or ``eps`` is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> one = jnp.log(jnp.expm1(jnp.ones(3)))  # a variance of 1
        >>> print(f"{losses.vid(jnp.zeros((1, 3)), 2 * jnp.ones((1, 3)), one)[0]:.3f}")
        2.000

    Reference:
        S. Ahn, S. X. Hu, A. Damianou, N. D. Lawrence, Z. Dai, "Variational Information
        Distillation for Knowledge Transfer", CVPR 2019, equations 5 and 6.
    """
    mean = _checks.floating("mean", mean, min_ndim=2)
    teacher = _checks.floating("teacher", teacher, min_ndim=2)
    _checks.same_shape("mean", mean, "teacher", teacher)
    log_scale = _checks.floating("log_scale", log_scale, min_ndim=1)
    mask = _checks.mask("where", where, mean.shape[:1])
    dtype = jnp.result_type(mean, teacher, log_scale)
    mean, teacher = (blank_rows(x.astype(dtype), mask) for x in (mean, teacher))
    log_scale = log_scale.astype(dtype)
    if log_scale.ndim == 1:
        _checks.shape("log_scale", log_scale, mean.shape[-1:], "(one for each channel)")
        log_scale = jnp.expand_dims(log_scale, range(mean.ndim - 1))
    else:
        _checks.shape("log_scale", log_scale, mean.shape, "like teacher, or one for each channel")
        log_scale = blank_rows(log_scale, mask)
    variance = jax.nn.softplus(log_scale) + hyperparameter("eps", eps, dtype, above=0)
    error = (mean - jax.lax.stop_gradient(teacher)) ** 2
    values = (error / variance + jnp.log(variance)) / 2
    return select(jnp.mean(values, axis=tuple(range(1, mean.ndim))), mask)


def factor_transfer(
    student: ArrayLike, teacher: ArrayLike, *, p: float = 1.0, where: ArrayLike | None = None
) -> jax.Array:
    """The distance of the student's and the teacher's factors, each divided by its length.

        d = s / |s| - t / |t|,   mean of |d| over all entries (p = 1), or |d|_2 (p = 2)

    As in the authors' code (p = 1) and torchdistill. RepDistiller's function of this name is
    another one: the mean of |A(s) - A(t)| with the maps A of `attention_map`, which sees no
    channels. Weights don't carry over between the two: published are 500 (the authors' code) and
    1000 (torchdistill) with this one, 200 with RepDistiller's.

    Args:
        student: [B, ...] floating point: the factor that the translator makes of the student's
            features.
        teacher: [B, ...] floating point, of the same shape: the paraphraser's factor of the
            teacher's features; no gradient flows to it.
        p: 1 or 2.
        where: [B] bool, False for rows to leave out; they count 0.

    Returns:
        [B] in at least float32. The gradient is 0 at equality, and of a factor of zeros.

    Raises:
        TypeError: factors are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, or ``p`` is something else.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> s, t = jnp.array([[3.0, 4.0]]), jnp.array([[4.0, 3.0]])
        >>> print(f"{losses.factor_transfer(s, t)[0]:.3f}")
        0.200

    Reference:
        J. Kim, S. Park, N. Kwak, "Paraphrasing Complex Network: Network Compression via Factor
        Transfer", NeurIPS 2018, equation 4.
    """
    power = check_p(p)
    student, teacher, mask = pair(student, teacher, where, maps=False)
    student, teacher = (unit(x.reshape(x.shape[0], -1), axis=1) for x in (student, teacher))
    difference = student - teacher
    if power == 2:
        return select(length(difference), mask)
    # abs has the slope 1 at 0 in JAX, the sign has 0 there.
    size = difference * jax.lax.stop_gradient(jnp.sign(difference))
    return select(jnp.mean(size, axis=-1), mask)


def activation_boundary(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    margin: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Activation boundaries: the student's neurons should be on where the teacher's are, and off.

        sum over all entries of  max(0, m - s)^2 where t > 0,  max(0, s + m)^2 elsewhere

    Only the sign of the teacher's responses counts: both sides are features before their ReLU. A
    sum over the map, as published; weights of stages are left to the Term.

    Args:
        student: [B, ...] floating point, behind a connector to the teacher's shape.
        teacher: [B, ...] floating point; no gradient flows to it.
        margin: m, a finite scalar at least 0.
        where: [B] bool, False for rows to leave out; they count 0.

    Returns:
        [B] in at least float32.

    Raises:
        TypeError: features are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, or ``margin`` is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> s, t = jnp.array([[3.0, 0.5, 0.5]]), jnp.array([[0.1, 0.1, -0.1]])
        >>> losses.activation_boundary(s, t).tolist()  # 0 + 0.5^2 + 1.5^2
        [2.5]

    Reference:
        B. Heo, M. Lee, S. Yun, J. Y. Choi, "Knowledge Transfer via Distillation of Activation
        Boundaries Formed by Hidden Neurons", AAAI 2019, equation 5.
    """
    student, teacher, mask = pair(student, teacher, where, maps=False)
    margin = hyperparameter("margin", margin, student.dtype, low=0)
    short = jax.nn.relu(jnp.where(teacher > 0, margin - student, student + margin))
    short = jnp.where(jnp.isnan(teacher), jnp.nan, short)  # it has no sign
    return select(jnp.sum(short**2, axis=tuple(range(1, student.ndim))), mask)


def check_p(p: float) -> int:
    """The exponent of `factor_transfer`, which is one of two programs."""
    if not (isinstance(p, (int, float)) and not isinstance(p, bool) and p in (1, 2)):
        raise ValueError(f"p must be 1 or 2, got {_checks.describe(p)}.")
    return int(p)
