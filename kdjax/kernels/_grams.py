"""Kernels as functions ``(x [n, d], y [m, d]) -> [n, m]``, and kernel ridge regression with them.

Kernels with a feature map of moderate width (linear, a network's features) are cheaper in
`kdjax.kernels.krr_loss`, which never forms a Gram matrix of the wrong side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.kernels import _ridge, _solve

Kernel = Callable[[Any, Any], jax.Array]


def linear(*, bias: ArrayLike = 0.0) -> Kernel:
    """Inner products.

        k(x, y) = x . y + bias

    Args:
        bias: a finite number, at least 0; 1 is the column of ones of `kdjax.kernels.krr_loss`.

    Returns:
        A function ``(x [n, d], y [m, d]) -> [n, m]`` in at least float32.

    Raises:
        ValueError: a bias below 0; when called, shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import kernels
        >>> kernels.linear(bias=1.0)(jnp.ones((2, 3)), jnp.ones((4, 3))).shape
        (2, 4)
    """
    _checks.number("bias", bias, low=0)

    def kernel(x: Any, y: Any) -> jax.Array:
        x, y = _rows(x, y)
        return _solve.matmul(x, y.T) + jnp.asarray(bias, x.dtype)

    return kernel


def rbf(*, scale: ArrayLike) -> Kernel:
    """The Gaussian kernel.

        k(x, y) = exp(-||x - y||^2 / (2 scale^2))

    Args:
        scale: the length over which the kernel decays, a finite number above 0.

    Returns:
        A function ``(x [n, d], y [m, d]) -> [n, m]`` in at least float32.

    Raises:
        ValueError: a scale that is not above 0; when called, shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import kernels
        >>> x = jnp.array([[0.0], [1.0]])
        >>> print(kernels.rbf(scale=1.0)(x, x).round(1))
        [[1.  0.6]
         [0.6 1. ]]

    Reference:
        C. Rasmussen, C. Williams, "Gaussian Processes for Machine Learning", MIT Press 2006,
        equation 4.9.
    """
    _checks.number("scale", scale, above=0)

    def kernel(x: Any, y: Any) -> jax.Array:
        x, y = _rows(x, y)
        # Distances do not see the origin, but the digits of the squares below do.
        centre = jax.lax.stop_gradient(y.mean(0, keepdims=True))
        x, y = x - centre, y - centre
        squares = jnp.sum(x**2, 1)[:, None] + jnp.sum(y**2, 1)[None]
        distances = jnp.maximum(squares - 2 * _solve.matmul(x, y.T), 0)
        return jnp.exp(-distances / (2 * jnp.asarray(scale, x.dtype) ** 2))

    return kernel


def arc_cosine(*, order: int = 1) -> Kernel:
    """The kernel of an infinitely wide layer of step, ReLU or squared ReLU units.

        k_n(x, y) = ||x||^n ||y||^n J_n(theta) / pi,   theta the angle between x and y
        J_0 = pi - theta
        J_1 = sin(theta) + (pi - theta) cos(theta)
        J_2 = 3 sin(theta) cos(theta) + (pi - theta) (1 + 2 cos(theta)^2)

    A row of zeros has a right angle to every other. Order 0 has no gradient where two rows point
    the same way or apart; there (by rounding) it is taken to be 0.

    Args:
        order: 0 (step), 1 (ReLU) or 2 (its square).

    Returns:
        A function ``(x [n, d], y [m, d]) -> [n, m]`` in at least float32.

    Raises:
        ValueError: another order; when called, shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import kernels
        >>> print(kernels.arc_cosine()(jnp.eye(2), jnp.eye(2)).round(1))
        [[1.  0.3]
         [0.3 1. ]]

    Reference:
        Y. Cho, L. Saul, "Kernel Methods for Deep Learning", NeurIPS 2009, equations 3 to 7.
    """
    order = _checks.count("order", order, low=0, high=2)

    def kernel(x: Any, y: Any) -> jax.Array:
        x, y = _rows(x, y)
        sizes = _lengths(x)[:, None] * _lengths(y)[None]
        cosine = _solve.matmul(x, y.T) / jnp.where(sizes > 0, sizes, 1)
        return sizes**order * _angular(order, cosine) / math.pi

    return kernel


class FeatureKernel:
    """A kernel of features, which lets regression compute each image's features once."""

    def __init__(self, feature_fn: Callable[[Any], jax.Array], kernel: Kernel) -> None:
        self.feature_fn, self.kernel = feature_fn, kernel

    def features(self, x: Any) -> jax.Array:
        """[n, d], flattened."""
        found = jnp.asarray(self.feature_fn(x))
        return found.reshape(found.shape[0], -1)

    def __call__(self, x: Any, y: Any) -> jax.Array:
        left = self.features(x)
        return self.kernel(left, left if y is x else self.features(y))


def of_features(feature_fn: Callable[[Any], jax.Array], kernel: Kernel) -> Kernel:
    """A kernel between the features of its arguments.

        k'(x, y) = k(f(x), f(y))

    Args:
        feature_fn: from a batch ``[n, ...]`` to features ``[n, ...]``, which are flattened; such as
            a network's in evaluation mode.
        kernel: a kernel of vectors.

    Returns:
        A function ``(x [n, ...], y [m, ...]) -> [n, m]``.

    Raises:
        TypeError: an argument is not a function.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import kernels
        >>> kernel = kernels.of_features(jnp.tanh, kernels.arc_cosine(order=1))
        >>> kernel(jnp.ones((2, 4, 4, 1)), jnp.ones((3, 4, 4, 1))).shape
        (2, 3)
    """
    for name, value in (("feature_fn", feature_fn), ("kernel", kernel)):
        _check_function(name, value)
    return FeatureKernel(feature_fn, kernel)


def kernel_ridge_loss(
    kernel: Kernel,
    x_s: ArrayLike,
    y_s: ArrayLike,
    x_t: ArrayLike,
    y_t: ArrayLike,
    *,
    reg: ArrayLike = 1e-6,
    reg_scale: str = "trace",
    reg_grad: bool = False,
    solve_dtype: Any = None,
) -> jax.Array:
    """How badly kernel ridge regression on synthetic pairs predicts the targets of real ones.

        mean over all entries of (K_ts (K_ss + lam I)^-1 Y_s - Y_t)^2

    With `linear` of bias 1 this is `kdjax.kernels.krr_loss`, which is cheaper where there are
    features to give it. The gradient flows to the synthetic side only and reuses the one factor.

    Args:
        kernel: a function ``(x, y) -> [n, m]``, such as `rbf`, `arc_cosine` or `of_features`.
        x_s: [m, ...] floating point, the synthetic inputs.
        y_s: [m, k] floating point, their targets.
        x_t: [B, ...] floating point, real inputs; no gradient.
        y_t: [B, k] floating point, their targets; no gradient.
        reg: as in `kdjax.kernels.ridge`.
        reg_scale: as in `kdjax.kernels.ridge`, for the trace of K_ss.
        reg_grad: as in `kdjax.kernels.ridge`.
        solve_dtype: dtype of the kernel and of the solve, such as jnp.float64; None takes that of
            the inputs. The features of `of_features` keep their own.

    Returns:
        Scalar in at least float32; NaN where the matrix isn't positive definite in its precision.

    Raises:
        TypeError: the kernel is no function, or an array is not floating point.
        ValueError: as `kdjax.kernels.ridge`, shapes of the two sides do not fit, or a kernel that
            returns another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import kernels
        >>> x_s, x_t = jnp.eye(3), jnp.ones((4, 3))
        >>> loss = kernels.kernel_ridge_loss(
        ...     kernels.rbf(scale=1.0), x_s, jnp.ones((3, 2)), x_t, jnp.zeros((4, 2)))
        >>> loss.shape
        ()

    Reference:
        T. Nguyen, Z. Chen, J. Lee, "Dataset Meta-Learning from Kernel Ridge-Regression", ICLR 2021,
        equation 1.
    """
    _check_function("kernel", kernel)
    _checks.choice("reg_scale", reg_scale, _ridge.SCALES)
    _checks.number("reg", reg, above=0)
    real, wanted = _ridge.pair("x_t", x_t, "y_t", y_t, ndim=None)
    x, y = _ridge.pair("x_s", x_s, "y_s", y_s, ndim=None)
    _ridge.same_width("x_t", real, "x_s", x)
    _ridge.same_width("y_t", wanted, "y_s", y)
    if isinstance(kernel, FeatureKernel):
        x, real, kernel = kernel.features(x), kernel.features(real), kernel.kernel
        x, real = _checks.floating("features", x), _checks.floating("features", real)
    found_dtype = jnp.promote_types(x.dtype, y.dtype)
    dtype = _ridge.solve_dtype_of(solve_dtype, found_dtype)
    x, real = x.astype(dtype), jax.lax.stop_gradient(real).astype(dtype)
    own, cross = _gram(kernel, x, x), _gram(kernel, real, x)
    trace = jnp.trace(own if reg_grad else jax.lax.stop_gradient(own))
    penalty = jnp.asarray(reg, dtype)
    if reg_scale != "absolute":
        penalty *= trace / len(x) if reg_scale == "mean_trace" else trace
    error = _solve.matmul(cross, _solve.positive(own, y.astype(dtype), penalty))
    return jnp.mean((error.astype(found_dtype) - jax.lax.stop_gradient(wanted)) ** 2)


def _gram(kernel: Kernel, x: jax.Array, y: jax.Array) -> jax.Array:
    found = jnp.asarray(kernel(x, y))
    _checks.shape("the kernel's matrix", found, (len(x), len(y)))
    return found.astype(x.dtype)


def _check_function(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {_checks.describe(value)}.")


def _rows(x: Any, y: Any) -> tuple[jax.Array, jax.Array]:
    x, y = _checks.floating("x", x, ndim=2), _checks.floating("y", y, ndim=2)
    _ridge.same_width("y", y, "x", x)
    return x, y


def _lengths(x: jax.Array) -> jax.Array:
    """[n], with the gradient 0 at rows of zeros."""
    squares = jnp.sum(x**2, axis=1)
    some = squares > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _angular(order: int, cosine: jax.Array) -> jax.Array:
    """J_n as a function of the cosine, which rounding may put outside of [-1, 1]."""
    cosine = jnp.clip(cosine, -1, 1)
    sine, rest = jnp.sqrt((1 - cosine) * (1 + cosine)), jnp.pi - jnp.arccos(cosine)
    if order == 0:
        return rest
    if order == 1:
        return sine + rest * cosine
    return 3 * sine * cosine + rest * (1 + 2 * cosine**2)


@_angular.defjvp
def _angular_jvp(order: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # Autodiff's terms are infinite at the ends and cancel there: dJ_1 = J_0, dJ_2 = 4 J_1.
    (cosine,), (tangent,) = primals, tangents
    if order > 0:
        return _angular(order, cosine), (1, 4)[order - 1] * _angular(order - 1, cosine) * tangent
    squares = (1 - cosine) * (1 + cosine)
    inside = squares > 32 * jnp.finfo(cosine.dtype).eps  # below this, rounding
    slope = jnp.where(inside, 1 / jnp.sqrt(jnp.where(inside, squares, 1)), 0)
    return _angular(0, cosine), slope * tangent
