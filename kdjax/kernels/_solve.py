"""The linear algebra of ridge regression: one factor, used forward and backward.

`weights` maps features f [m, d] and targets y [m, k] to W [d, k] and a bias b [k] of

    minimise ||f W + 1 b^T - y||^2 + lam (||W||^2 + ||b||^2)

(without a bias: b = 0). Its derivative is written out, so that the gradient reuses the factor and
never differentiates a decomposition. With F = [f, 1] and the cotangent H of [W; b]:

    dual    A = F F^T + lam I,  alpha = A^-1 y,  W = F^T alpha
            beta = A^-1 F H,    dy = beta,  dF = alpha (H - F^T beta)^T - beta W^T,  dlam = -<beta, alpha>
    primal  S = F^T F + lam I,  W = S^-1 F^T y,  R = y - F W
            M = S^-1 H,         dy = F M,   dF = R M^T - dy W^T,                     dlam = -<M, W>
    svd     F = U diag(s) V^T by a QR of the tall side and an SVD of the small factor, put into the
            formulas of the smaller side; no Gram matrix, so no squared condition number

The column of ones is never stored but in the last.
"""  # noqa: E501

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

Pair = tuple[jax.Array, jax.Array]
Three = tuple[jax.Array, jax.Array, jax.Array]
# Gram matrices lose half of their digits: not even one may go in the products, which by default
# are bfloat16 passes on a TPU and TF32 on a GPU.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def weights(
    f: jax.Array, y: jax.Array, lam: jax.Array, bias: bool, method: str, solve_dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """``(W [d, k], b [k])`` of ridge regression from f [m, d] to y [m, k]."""
    return _forward(f, y, lam, bias, method, solve_dtype)[0]


def _forward(
    f: jax.Array, y: jax.Array, lam: jax.Array, bias: bool, method: str, solve_dtype: Any
) -> tuple[Pair, Any]:
    solved = {"dual": _dual, "primal": _primal, "svd": _svd}[method]
    return solved(f, y, lam, bias, solve_dtype)


def _backward(
    bias: bool, method: str, solve_dtype: Any, kept: Any, cotangents: Pair
) -> tuple[jax.Array, jax.Array, jax.Array]:
    h, h_bias = cotangents
    if method == "dual":
        return _dual_vjp(bias, kept, h, h_bias)
    if method == "primal":
        return _primal_vjp(bias, kept, h, h_bias)
    return _svd_vjp(bias, kept, h, h_bias)


weights.defvjp(_forward, _backward)


@jax.custom_vjp
def positive(matrix: jax.Array, right: jax.Array, lam: jax.Array) -> jax.Array:
    """``(matrix + lam I)^-1 right`` for a positive semidefinite matrix."""
    return _positive(matrix, right, lam)[0]


def _positive(matrix: jax.Array, right: jax.Array, lam: jax.Array) -> tuple[jax.Array, Any]:
    factor = jnp.linalg.cholesky(_plus_diagonal(matrix, lam))
    alpha = cho_solve((factor, True), right)
    return alpha, (factor, alpha)


def _positive_vjp(kept: Any, cotangent: jax.Array) -> Three:
    factor, alpha = kept
    beta = cho_solve((factor, True), cotangent)
    return -matmul(beta, alpha.T), beta, -jnp.sum(beta * alpha)


positive.defvjp(_positive, _positive_vjp)


def _dual(
    f: jax.Array, y: jax.Array, lam: jax.Array, bias: bool, solve_dtype: Any
) -> tuple[Pair, Any]:
    wide = f.astype(solve_dtype)
    gram = matmul(wide, wide.T) + (1 if bias else 0)
    factor = jnp.linalg.cholesky(_plus_diagonal(gram, lam))
    alpha = cho_solve((factor, True), y.astype(solve_dtype))
    # In the wider dtype to the end: where rows are nearly alike alpha is large and cancels here.
    found = matmul(wide.T, alpha)
    return _rounded((found, _column(alpha, bias)), f), (f, y, factor, alpha, found)


def _dual_vjp(bias: bool, kept: Any, h: jax.Array, h_bias: jax.Array) -> Three:
    f, y, factor, alpha, found = kept
    wide, h = f.astype(factor.dtype), h.astype(factor.dtype)
    right = matmul(wide, h) + (h_bias.astype(h.dtype)[None] if bias else 0)
    beta = cho_solve((factor, True), right)
    rest = h - matmul(wide.T, beta)
    df = matmul(alpha, rest.T) - matmul(beta, found.T)
    return df.astype(f.dtype), beta.astype(y.dtype), -jnp.sum(beta * alpha)


def _primal(
    f: jax.Array, y: jax.Array, lam: jax.Array, bias: bool, solve_dtype: Any
) -> tuple[Pair, Any]:
    wide, target = f.astype(solve_dtype), y.astype(solve_dtype)
    gram, right = matmul(wide.T, wide), matmul(wide.T, target)
    if bias:
        ones = wide.sum(0)
        gram = jnp.block(
            [[gram, ones[:, None]], [ones[None], jnp.full((1, 1), len(f), solve_dtype)]]
        )
        right = jnp.concatenate([right, target.sum(0)[None]])
    factor = jnp.linalg.cholesky(_plus_diagonal(gram, lam))
    split = _split(cho_solve((factor, True), right), bias)
    return _rounded(split, f), (f, y, factor, split)


def _primal_vjp(bias: bool, kept: Any, h: jax.Array, h_bias: jax.Array) -> Three:
    f, y, factor, (found, offset) = kept
    wide = f.astype(factor.dtype)
    right = (jnp.concatenate([h, h_bias[None]]) if bias else h).astype(factor.dtype)
    middle, middle_bias = _split(cho_solve((factor, True), right), bias)
    rest = y.astype(factor.dtype) - matmul(wide, found) - offset[None]
    dy = matmul(wide, middle) + middle_bias[None]
    df = matmul(rest, middle.T) - matmul(dy, found.T)
    dlam = -jnp.sum(middle * found) - jnp.sum(middle_bias * offset)
    return df.astype(f.dtype), dy.astype(y.dtype), dlam


def _svd(
    f: jax.Array, y: jax.Array, lam: jax.Array, bias: bool, solve_dtype: Any
) -> tuple[Pair, Any]:
    full = f.astype(solve_dtype)
    if bias:
        full = jnp.concatenate([full, jnp.ones_like(full, shape=(len(f), 1))], axis=1)
    u, s, v = _thin_svd(full)
    target = y.astype(solve_dtype)
    found = matmul(v, (s / (s**2 + lam))[:, None] * matmul(u.T, target))
    return _rounded(_split(found, bias), f), (f, y, u, s, v, lam, found)


def _svd_vjp(bias: bool, kept: Any, h: jax.Array, h_bias: jax.Array) -> Three:
    f, y, u, s, v, lam, found = kept
    full = (jnp.concatenate([h, h_bias[None]]) if bias else h).astype(u.dtype)
    target = y.astype(u.dtype)
    inverse, share = 1 / (s**2 + lam), s**2 / (s**2 + lam)
    seen, known = matmul(v.T, full), matmul(u.T, target)
    dy = matmul(u, (s * inverse)[:, None] * seen)
    if u.shape[0] == u.shape[1]:  # m <= D, the dual's formulas
        alpha = matmul(u, inverse[:, None] * known)
        left = full - matmul(v, share[:, None] * seen)
        df = matmul(alpha, left.T) - matmul(dy, found.T)
        dlam = -jnp.sum(dy * alpha)
    else:
        rest = target - matmul(u, share[:, None] * known)
        middle = matmul(v, inverse[:, None] * seen)
        df = matmul(rest, middle.T) - matmul(dy, found.T)
        dlam = -jnp.sum(middle * found)
    df = df[:, :-1] if bias else df
    return df.astype(f.dtype), dy.astype(y.dtype), dlam.astype(lam.dtype)


def _thin_svd(full: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``full [m, D] = u diag(s) v^T`` with min(m, D) columns in u and v.

    Singular values of the size of the rounding are 0: times 1 / lam they would be seen.
    """
    if full.shape[0] <= full.shape[1]:
        q, r = jnp.linalg.qr(full.T)
        u, s, vt = jnp.linalg.svd(r.T)
        v = matmul(q, vt.T)
    else:
        q, r = jnp.linalg.qr(full)
        u, s, vt = jnp.linalg.svd(r)
        u, v = matmul(q, u), vt.T
    noise = 8 * float(jnp.finfo(full.dtype).eps) * s[0]
    return u, jnp.where(s > noise, s, 0), v


def _plus_diagonal(gram: jax.Array, lam: jax.Array) -> jax.Array:
    return gram + lam.astype(gram.dtype) * jnp.eye(len(gram), dtype=gram.dtype)


def _split(found: jax.Array, bias: bool) -> tuple[jax.Array, jax.Array]:
    """Weights and bias, which is 0 where there is none."""
    if bias:
        return found[:-1], found[-1]
    return found, jnp.zeros_like(found[0])


def _rounded(arrays: Pair, like: jax.Array) -> Pair:
    first, second = arrays
    return first.astype(like.dtype), second.astype(like.dtype)


def _column(alpha: jax.Array, bias: bool) -> jax.Array:
    return alpha.sum(0) if bias else jnp.zeros_like(alpha[0])
