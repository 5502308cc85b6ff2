"""Ridge regression on features: its solution, its predictions and the loss of KRR-ST."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.kernels import _solve

METHODS = ("auto", "dual", "primal", "svd")
SCALES = ("absolute", "mean_trace", "trace")


class Ridge(NamedTuple):
    """A fitted linear map.

    Attributes:
        weights: [d, k].
        bias: [k], zeros without one.
        penalty: scalar, the lambda that was used.
    """

    weights: jax.Array
    bias: jax.Array
    penalty: jax.Array

    @property
    def finite(self) -> jax.Array:
        """Whether the matrix was positive definite in its precision: a scalar, boolean."""
        return jnp.isfinite(self.weights).all() & jnp.isfinite(self.bias).all()


def ridge(
    features: ArrayLike,
    targets: ArrayLike,
    *,
    reg: ArrayLike = 1e-6,
    reg_scale: str = "trace",
    reg_grad: bool = False,
    add_bias: bool = True,
    method: str = "auto",
    solve_dtype: Any = None,
) -> Ridge:
    """The linear map from features to targets with the least penalised squared error.

        W = F^T (F F^T + lam I)^-1 Y = (F^T F + lam I)^-1 F^T Y,   F = [features, 1]

    The bias is a column of ones, penalised as the rest is. Both forms are exact; the smaller
    matrix is cheaper and, in float32, also right where the other isn't. The gradient with respect
    to features and targets reuses the one factor.

    Args:
        features: [m, d] floating point.
        targets: [m, k] floating point.
        reg: the size of the penalty, a finite scalar above 0.
        reg_scale: what it is multiplied by to give lam: "trace" of F F^T, "mean_trace" (the trace
            divided by m, as in neural-tangents and FRePo) or "absolute" (1).
        reg_grad: whether the gradient sees lam change with the features.
        add_bias: whether F has the column of ones. It counts in the trace.
        method: "dual" (m x m), "primal" (D x D), "svd" (orthogonal, for ill-conditioned features
            in float32), or "auto": primal where D <= m, dual otherwise.
        solve_dtype: dtype of the Gram matrix and the solve, such as jnp.float64; None takes that of
            the features.

    Returns:
        `Ridge`. Where the matrix isn't positive definite in its precision, NaN.

    Raises:
        TypeError: features or targets are not floating point.
        ValueError: shapes do not fit or are empty, ``reg`` not above 0, an unknown name, or
            ``solve_dtype`` float64 while x64 is off.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import kernels
        >>> x = jnp.array([[0.0], [1.0], [2.0]])
        >>> fit = kernels.ridge(x, 3 * x + 1, reg=1e-6)
        >>> fit.weights.round(2), fit.bias.round(2)
        (Array([[3.]], dtype=float32), Array([1.], dtype=float32))

    Reference:
        A. Hoerl, R. Kennard, "Ridge Regression", Technometrics 1970; the trace scaling and the bias
        are those of Lee et al., "Self-Supervised Dataset Distillation for Transfer Learning", ICLR
        2024 (code).
    """
    f, y = pair("features", features, "targets", targets)
    _checks.choice("method", method, METHODS)
    _checks.choice("reg_scale", reg_scale, SCALES)
    dtype = solve_dtype_of(solve_dtype, f.dtype)
    m, wide = f.shape[0], f.shape[1] + bool(add_bias)
    if method == "auto":
        method = "primal" if wide <= m else "dual"
    lam = penalty(f, reg, reg_scale, reg_grad, add_bias, dtype)
    found, offset = _solve.weights(f, y, lam, bool(add_bias), method, dtype)
    return Ridge(found, offset, lam)


def ridge_predict(fit: Ridge, features: ArrayLike) -> jax.Array:
    """What a fitted map makes of features.

        features W + b

    Args:
        fit: of `ridge`.
        features: [n, d] floating point.

    Returns:
        [n, k].

    Raises:
        TypeError: features are not floating point.
        ValueError: they have another width than those of the fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import kernels
        >>> x = jnp.array([[0.0], [1.0], [2.0]])
        >>> kernels.ridge_predict(kernels.ridge(x, 3 * x + 1), jnp.array([[3.0]])).round(2)
        Array([[10.]], dtype=float32)

    Reference:
        See `ridge`.
    """
    f = _checks.floating("features", features, ndim=2)
    if f.shape[1] != fit.weights.shape[0]:
        raise ValueError(
            f"features must have {fit.weights.shape[0]} columns, as those of the fit have, got "
            f"{_checks.describe(f)}."
        )
    return _solve.matmul(f, fit.weights) + fit.bias[None]


def krr_loss(
    f_s: ArrayLike,
    y_s: ArrayLike,
    f_t: ArrayLike,
    y_t: ArrayLike,
    *,
    reg: ArrayLike = 1e-6,
    reg_scale: str = "trace",
    reg_grad: bool = False,
    add_bias: bool = True,
    method: str = "auto",
    solve_dtype: Any = None,
) -> jax.Array:
    """How badly ridge regression on synthetic pairs predicts the targets of real ones.

        mean over all entries of (F_t W - Y_t)^2,   W = F_s^T (F_s F_s^T + lam I)^-1 Y_s

    The gradient flows to the synthetic side only; the real side is data. Gradients are checked
    against finite differences with lam held fixed, because by default it carries none.

    Args:
        f_s: [m, d] floating point, features of the synthetic images.
        y_s: [m, k] floating point, their targets.
        f_t: [B, d] floating point, features of real images; no gradient.
        y_t: [B, k] floating point, their targets; no gradient.
        reg: as in `ridge`.
        reg_scale: as in `ridge`.
        reg_grad: as in `ridge`.
        add_bias: as in `ridge`.
        method: as in `ridge`.
        solve_dtype: as in `ridge`.

    Returns:
        Scalar in at least float32; NaN where the matrix isn't positive definite in its precision.

    Raises:
        TypeError: an array is not floating point.
        ValueError: as `ridge`, or shapes of the two sides do not fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax import kernels
        >>> f_s, f_t = jnp.eye(3), jnp.ones((4, 3))
        >>> y_s, y_t = jnp.ones((3, 2)), jnp.zeros((4, 2))
        >>> gradient = jax.grad(kernels.krr_loss)(f_s, y_s, f_t, y_t)
        >>> gradient.shape
        (3, 3)

    Reference:
        D. B. Lee et al., "Self-Supervised Dataset Distillation for Transfer Learning", ICLR 2024,
        the outer objective, by its published code (bias in the kernel, lam from the trace).
    """
    real, targets = pair("f_t", f_t, "y_t", y_t)
    f, y = pair("f_s", f_s, "y_s", y_s)
    same_width("f_t", real, "f_s", f)
    same_width("y_t", targets, "y_s", y)
    fit = ridge(
        f, y, reg=reg, reg_scale=reg_scale, reg_grad=reg_grad, add_bias=add_bias, method=method,
        solve_dtype=solve_dtype,
    )  # fmt: skip
    error = ridge_predict(fit, jax.lax.stop_gradient(real)) - jax.lax.stop_gradient(targets)
    return jnp.mean(error**2)


def penalty(
    f: jax.Array, reg: ArrayLike, scale: str, grad: bool, add_bias: bool, dtype: Any
) -> jax.Array:
    """lam for features f [m, d]."""
    value = jnp.asarray(_checks.number("reg", reg, above=0), dtype)
    if scale == "absolute":
        return value
    f = f if grad else jax.lax.stop_gradient(f)
    trace = jnp.sum(jnp.square(f.astype(dtype))) + (f.shape[0] if add_bias else 0)
    return value * (trace / f.shape[0] if scale == "mean_trace" else trace)


def pair(
    name: str, features: ArrayLike, other: str, targets: ArrayLike, *, ndim: int | None = 2
) -> tuple[jax.Array, jax.Array]:
    """Inputs and targets in one dtype, as many of the one as of the other."""
    f = _checks.floating(name, features, ndim=ndim, min_ndim=2)
    y = _checks.floating(other, targets, ndim=2)
    if f.size == 0 or y.size == 0:
        empty, array = (name, f) if f.size == 0 else (other, y)
        raise ValueError(f"{empty} must not be empty, got {_checks.describe(array)}.")
    if f.shape[0] != y.shape[0]:
        raise ValueError(
            f"{other} must have {f.shape[0]} rows, as {name} has, got {_checks.describe(y)}."
        )
    dtype = jnp.promote_types(f.dtype, y.dtype)
    return f.astype(dtype), y.astype(dtype)


def same_width(name: str, x: jax.Array, other: str, like: jax.Array) -> None:
    """Refuses rows of another shape."""
    if x.shape[1:] != like.shape[1:]:
        columns = " x ".join(map(str, like.shape[1:])) + " columns" * (like.ndim == 2)
        raise ValueError(
            f"{name} must have rows of {columns}, as {other} has, got {_checks.describe(x)}."
        )


def solve_dtype_of(wanted: Any, default: Any) -> Any:
    if wanted is None:
        return default
    try:
        dtype = jnp.dtype(wanted)
    except TypeError:
        raise TypeError(
            f"solve_dtype must be float32 or float64, got {_checks.describe(wanted)}."
        ) from None
    if dtype == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "solve_dtype must be float32 while x64 is off (jax.config.update('jax_enable_x64', "
            "True) turns it on); got float64, which would silently become float32."
        )
    if dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"solve_dtype must be float32 or float64, got {dtype}.")
    return dtype
