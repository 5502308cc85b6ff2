"""How a linear projector moves under gradient descent, in closed form.

Features are [B, Cs] of the student and [B, Ct] of the teacher, the kernel W is [Cs, Ct], and

    D(W) = |Z_s W - Z_t|^2 / 2,   C_s = Z_s' Z_s,   C_st = Z_s' Z_t   (sums over the rows, no means)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks


def projector_velocity(kernel: ArrayLike, student: ArrayLike, teacher: ArrayLike) -> jax.Array:
    """Where gradient flow moves the projector's kernel: ``-dD/dW = C_st - C_s W``.

    The student's features enter through their own and their cross-correlation only. LogSum with
    alpha = 2 and without normalisation has the same direction: its negative gradient is this times
    ``2 / |Z_s W - Z_t|^2``.

    Args:
        kernel: W, [Cs, Ct] floating point.
        student: Z_s, [B, Cs] floating point.
        teacher: Z_t, [B, Ct] floating point.

    Returns:
        [Cs, Ct] in at least float32.

    Raises:
        TypeError: an argument is not floating point.
        ValueError: the shapes don't fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import metrics
        >>> metrics.projector_velocity(jnp.zeros((2, 1)), jnp.eye(2), jnp.array([[3.0], [4.0]]))
        Array([[3.],
               [4.]], dtype=float32)

    Reference:
        R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
        Distillation", AAAI 2024 (the projector's update equation).
    """
    student, teacher = _features(student, teacher)
    kernel = _kernel(kernel, student, teacher)
    # And not C_st - C_s W: near the fixed point that would be a difference of two large numbers.
    return student.T @ (teacher - student @ kernel)


def projector_fixed_point(
    student: ArrayLike, teacher: ArrayLike, *, ridge: ArrayLike = 0.0
) -> jax.Array:
    """Where the projector comes to rest: ``W* = (C_s + ridge I)^-1 C_st``, ridge regression.

    Under ``W <- (1 - decay) W + rate (C_st - C_s W)`` the ridge is ``decay / rate``. For whitened
    features (C_s = I) without decay it is C_st itself, reached in one step of rate 1.

    Args:
        student: Z_s, [B, Cs] floating point.
        teacher: Z_t, [B, Ct] floating point.
        ridge: a finite scalar, at least 0.

    Returns:
        [Cs, Ct] in at least float32. Directions of the student's features whose eigenvalue, ridge
        included, can't be told from 0 in that precision get 0: without a ridge it is the solution
        of least norm, to which gradient descent from 0 goes. Differentiable, but for those.

    Raises:
        TypeError: features are not floating point.
        ValueError: the shapes don't fit, or ``ridge`` is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import metrics
        >>> z_s, z_t = jnp.array([[1.0], [2.0]]), jnp.array([[2.0], [4.0]])
        >>> print(f"{metrics.projector_fixed_point(z_s, z_t)[0, 0]:.3f}")
        2.000
        >>> print(f"{metrics.projector_fixed_point(z_s, z_t, ridge=5.0)[0, 0]:.3f}")
        1.000

    Reference:
        R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
        Distillation", AAAI 2024 (the update with weight decay, whose fixed point this is).
    """
    student, teacher = _features(student, teacher)
    ridge = jnp.asarray(_checks.number("ridge", ridge, low=0), student.dtype)
    return _fixed_point(student, teacher, ridge)


@jax.jit
def _fixed_point(student: jax.Array, teacher: jax.Array, ridge: jax.Array) -> jax.Array:
    gram = student.T @ student + ridge * jnp.eye(student.shape[1], dtype=student.dtype)
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(gram))
    size = max(student.shape)
    some = values > size * jnp.finfo(values.dtype).eps * values[-1]
    inverses = jnp.where(some, 1 / jnp.where(some, values, 1), 0)
    inverse = vectors @ (inverses[:, None] * vectors.T)
    # The derivative is that of the linear system: equal eigenvalues do no harm to it.
    return jax.lax.custom_linear_solve(
        lambda w: gram @ w, student.T @ teacher, lambda _, b: inverse @ b, symmetric=True
    )


def projector_after_steps(
    kernel: ArrayLike,
    student: ArrayLike,
    teacher: ArrayLike,
    steps: ArrayLike,
    *,
    rate: ArrayLike,
    decay: ArrayLike = 0.0,
) -> jax.Array:
    """The kernel after k steps of gradient descent with weight decay, without taking them.

        W <- (1 - decay) W + rate (C_st - C_s W),   k times; with C_s = U diag(l) U'
        W_k = W* + U diag(q^k) U' (W_0 - W*),   q = 1 - decay - rate l

    Computed as ``U diag(q^k) U' W_0 + rate U diag((1 - q^k) / (1 - q)) U' C_st``, which holds for
    singular C_s too. For optax's sgd after add_decayed_weights, decay is learning rate times weight
    decay. One step of rate r on the mean of squares is one of rate r * 2 / (B Ct) on D.

    Args:
        kernel: W_0, [Cs, Ct] floating point.
        student: Z_s, [B, Cs] floating point.
        teacher: Z_t, [B, Ct] floating point.
        steps: k, an integer scalar at least 0; also traced, so that ``jax.vmap`` gives a curve.
        rate: a finite scalar, at least 0.
        decay: a finite scalar from 0 to 1.

    Returns:
        [Cs, Ct] in at least float32; it diverges with k above `projector_rate_limit`. Derivatives
        by the student's features need distinct eigenvalues of C_s (as those of `jax.numpy.linalg
        .eigh` do); those by all else exist always.

    Raises:
        TypeError: features are not floating point, or ``steps`` is no integer.
        ValueError: the shapes don't fit, or a number is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax import metrics
        >>> z_s, z_t = jnp.array([[1.0], [2.0]]), jnp.array([[2.0], [4.0]])
        >>> steps = jnp.array([0, 1, 100])
        >>> curve = jax.vmap(
        ...     lambda k: metrics.projector_after_steps(jnp.zeros((1, 1)), z_s, z_t, k, rate=0.1)
        ... )(steps)
        >>> [f"{w:.3f}" for w in curve[:, 0, 0]]
        ['0.000', '1.000', '2.000']

    Reference:
        R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
        Distillation", AAAI 2024: the update with weight decay; the closed form follows from it.
    """
    student, teacher = _features(student, teacher)
    kernel = _kernel(kernel, student, teacher)
    k = _steps(steps)
    rate = jnp.asarray(_checks.number("rate", rate, low=0), student.dtype)
    decay = jnp.asarray(_checks.number("decay", decay, low=0, high=1), student.dtype)
    return _after_steps(kernel, student, teacher, k, rate, decay)


@jax.jit
def _after_steps(
    kernel: jax.Array,
    student: jax.Array,
    teacher: jax.Array,
    k: jax.Array,
    rate: jax.Array,
    decay: jax.Array,
) -> jax.Array:
    values, vectors = jnp.linalg.eigh(student.T @ student)
    values = jnp.maximum(values, 0)  # rounding
    loss = decay + rate * values  # 1 - q
    odd = jnp.where(k % 2 == 1, -1, 1).astype(loss.dtype)
    floating_k = k.astype(loss.dtype)
    # For q near 1 the digits of q^k are in 1 - q; for q <= 0 the sign is that of k.
    close = loss < 0.5
    small, q = jnp.where(close, loss, 0), jnp.where(close, 0.5, 1 - loss)
    exponent = floating_k * jnp.log1p(-small)
    size = jnp.where(q == 0, 1, jnp.abs(q))
    far = jnp.where(q == 0, k == 0, size**floating_k * jnp.where(q < 0, odd, 1))
    left = jnp.where(close, jnp.exp(exponent), far)
    gone = jnp.where(close, -jnp.expm1(exponent), 1 - far)
    drift = jnp.where(loss == 0, floating_k, gone / jnp.where(loss == 0, 1, loss))
    start, target = vectors.T @ kernel, vectors.T @ (student.T @ teacher)
    return vectors @ (left[:, None] * start + rate * drift[:, None] * target)


def projector_rate_limit(student: ArrayLike, *, decay: ArrayLike = 0.0) -> jax.Array:
    """The rate at which gradient descent on D stops converging: ``(2 - decay) / l_max``.

    Args:
        student: Z_s, [B, Cs] floating point; l_max is the largest eigenvalue of C_s.
        decay: weight decay of one step, as in `projector_after_steps`; from 0 to 1.

    Returns:
        Scalar in at least float32: below it the steps converge, above it they diverge. inf for
        features that are all 0.

    Raises:
        TypeError: ``student`` is not floating point.
        ValueError: it is not [B, Cs], or ``decay`` is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import metrics
        >>> print(f"{metrics.projector_rate_limit(jnp.array([[1.0], [2.0]])):.3f}")
        0.400

    Reference:
        The step-size limit of gradient descent on a quadratic, for the update of R. Miles,
        K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge Distillation",
        AAAI 2024.
    """
    student = _filled("student", student)
    decay = jnp.asarray(_checks.number("decay", decay, low=0, high=1), student.dtype)
    return (2 - decay) / jnp.linalg.norm(student, ord=2) ** 2


def batch_norm_orthogonality(
    kernel: ArrayLike, student: ArrayLike, gradient: ArrayLike, *, eps: ArrayLike = 1e-4
) -> tuple[jax.Array, jax.Array]:
    """Why batch normalisation stops collapse: a kernel's columns get no gradient along themselves.

        f = Z_s W,   g = dL/dBN(f),   m_j = sum over rows of g_nj BN(f)_nj
        w_j . dL/dw_j  =  m_j eps / (var_j + eps)

    for any loss L of BN(f). As eps -> 0 both are 0: each column's gradient is orthogonal to it, so
    that a step of plain gradient descent can only lengthen the column. Only weight decay shortens
    it. A bias gets no gradient at all.

    Args:
        kernel: W, [Cs, Ct] floating point.
        student: Z_s, [B, Cs] floating point, at least 2 rows.
        gradient: g, [B, Ct] floating point: the loss's gradient by the normalised features.
        eps: what batch normalisation adds to the variance, a finite scalar at least 0.

    Returns:
        Both sides, [Ct] each, in at least float32: the left one by differentiating through the
        projector and the normalisation, the right one by the formula. A column whose outputs don't
        vary gets 0 with eps = 0.

    Raises:
        TypeError: an argument is not floating point.
        ValueError: the shapes don't fit, there are fewer than 2 rows, or ``eps`` is negative.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax import losses, metrics
        >>> z_s, z_t, w = jnp.eye(3)[:, :2], jnp.eye(3), jnp.ones((2, 3))
        >>> normalised = losses.standardize(z_s @ w)
        >>> g = jax.grad(lambda s: losses.log_sum(s, losses.standardize(z_t)))(normalised)
        >>> along, predicted = metrics.batch_norm_orthogonality(w, z_s, g)
        >>> bool(jnp.allclose(along, predicted, rtol=1e-2, atol=1e-7))
        True

    Reference:
        The exact form of a claim of R. Miles, K. Mikolajczyk, "Understanding the Role of the
        Projector in Knowledge Distillation", AAAI 2024 (normalisation and the projector's
        collapse).
    """
    student, gradient = _features(student, gradient, "gradient")
    if student.shape[0] < 2:
        raise ValueError(f"student must have at least 2 rows, got {_checks.describe(student)}.")
    kernel = _kernel(kernel, student, gradient, "gradient")
    eps = jnp.asarray(_checks.number("eps", eps, low=0), student.dtype)
    return _orthogonality(kernel, student, gradient, eps)


@jax.jit
def _orthogonality(
    kernel: jax.Array, student: jax.Array, gradient: jax.Array, eps: jax.Array
) -> tuple[jax.Array, jax.Array]:
    student = student - jnp.mean(student, axis=0, keepdims=True)

    def normalised(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        f = student @ w
        f = f - jnp.mean(f, axis=0, keepdims=True)  # rounding
        total = jnp.mean(f**2, axis=0, keepdims=True) + eps
        return f * jnp.where(total == 0, 0, jax.lax.rsqrt(jnp.where(total == 0, 1, total))), total

    output, pull, total = jax.vjp(normalised, kernel, has_aux=True)
    along = jnp.sum(kernel * pull(gradient)[0], axis=0)
    m = jnp.sum(gradient * output, axis=0)
    share = jnp.where(total == 0, 0, eps / jnp.where(total == 0, 1, total))
    return along, m * share[0]


def _filled(name: str, x: ArrayLike) -> jax.Array:
    x = _checks.floating(name, x, ndim=2)
    if x.size == 0:
        raise ValueError(f"{name} must have rows and channels, got {_checks.describe(x)}.")
    return x


def _features(
    student: ArrayLike, other: ArrayLike, name: str = "teacher"
) -> tuple[jax.Array, jax.Array]:
    """Features of the same examples in one dtype."""
    student, other = _filled("student", student), _filled(name, other)
    if other.shape[0] != student.shape[0]:
        raise ValueError(
            f"{name} must have {student.shape[0]} rows like student, got {_checks.describe(other)}."
        )
    dtype = jnp.promote_types(student.dtype, other.dtype)
    return student.astype(dtype), other.astype(dtype)


def _kernel(
    kernel: ArrayLike, student: jax.Array, other: jax.Array, name: str = "teacher"
) -> jax.Array:
    kernel = _checks.floating("kernel", kernel)
    wanted = (student.shape[1], other.shape[1])
    _checks.shape("kernel", kernel, wanted, f"(channels of student and {name})")
    return kernel.astype(jnp.promote_types(kernel.dtype, student.dtype))


def _steps(steps: Any) -> jax.Array:
    steps = _checks.integer("steps", steps, ndim=0)
    if not _checks.is_traced(steps) and int(steps) < 0:
        raise ValueError(f"steps must be an integer at least 0, got {int(steps)}.")
    return steps
