"""The surrogate that is best to learn from: the optimal weights, and the optimal 0-1 mask."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.theory import _inputs
from kdjax.theory._risk import excess_risk, sizes, variance_factor
from kdjax.theory._spectrum import Resolved, amplified, resolve, total


def optimal_gain(lam: Any, n: Any, ridge: Any = 0.0, lam_test: Any = None) -> jax.Array:
    """Factor by which the best surrogate scales each coordinate of the truth.

    ``g = lam_test L (1 - omega) / (lam_test L^2 (1 - omega) + V lam zeta^2)``; with the training
    law as the test law it exceeds 1 (amplifies) exactly where ``zeta < 1 - omega``. It depends
    neither on the truth nor on the noise; a flat spectrum, or n at least the rank without a ridge,
    gives 1 everywhere.

    Args:
      lam: eigenvalues of the training covariance, [..., p].
      n: number of samples of the student, above 0, [...].
      ridge: delta of the student's ``||y - X b||^2 + delta ||b||^2``, at least 0, [...].
      lam_test: eigenvalues of the test covariance, [..., p]; by default ``lam``.

    Returns:
      The gains, [..., p]; 0 where an eigenvalue is 0 and tau isn't.

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> from kdjax import theory
      >>> gain = theory.optimal_gain(jnp.arange(1.0, 501.0) ** -2, 200)
      >>> print(int((gain > 1).sum()))  # 126 amplified, 374 shrunk
      126

    Reference:
      Ildiz et al., "High-dimensional Analysis of Knowledge Distillation", ICLR 2025 (the closed
      form of the optimal surrogate); covariate shift and ridge are our derivation.
    """
    (lam, test), (n, ridge) = _aligned(lam, lam_test, n, ridge)
    return _gain(lam, test, n, ridge, lam_test is None)


def optimal_surrogate(
    lam: Any, beta_star: Any, n: Any, *, ridge: Any = 0.0, lam_test: Any = None
) -> jax.Array:
    """Weights of the surrogate whose labels give the smallest risk: `optimal_gain` times the truth.

    Args:
      lam: eigenvalues of the training covariance, [..., p].
      beta_star: the truth in the eigenbasis, [..., p].
      n: number of samples of the student, above 0, [...].
      ridge: delta of the student, at least 0, [...].
      lam_test: eigenvalues of the test covariance, [..., p]; by default ``lam``.

    Returns:
      The surrogate, [..., p].

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.

    Example:
      >>> from kdjax import theory
      >>> lam, beta = theory.power_law(500, 2.0, 1.5)
      >>> surrogate = theory.optimal_surrogate(lam, beta, 200)
      >>> print(f"{theory.excess_risk(lam, beta, surrogate, n=200).total:.5f}")
      0.08325
    """
    (lam, test, beta_star), (n, ridge) = _aligned(lam, lam_test, n, ridge, beta_star)
    return _gain(lam, test, n, ridge, lam_test is None) * beta_star


def optimal_surrogate_risk(
    lam: Any,
    beta_star: Any,
    n: Any,
    *,
    noise_var: Any = 0.0,
    ridge: Any = 0.0,
    lam_test: Any = None,
) -> jax.Array:
    """Excess risk of the student of the optimal surrogate: no other surrogate gives less.

    ``sum(lam beta^2 omega zeta^2 / ((1 - omega) L^2 + omega zeta^2)) + noise_var omega /
    (1 - omega)`` for the training law.

    Args:
      lam: eigenvalues of the training covariance, [..., p].
      beta_star: the truth in the eigenbasis, [..., p].
      n: number of samples of the student, above 0, [...].
      noise_var: variance of the noise on the student's labels, at least 0, [...].
      ridge: delta of the student, at least 0, [...].
      lam_test: eigenvalues of the test covariance, [..., p]; by default ``lam``.

    Returns:
      The excess risk, [...]. For its parts, call `excess_risk` with `optimal_surrogate`.

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.

    Example:
      >>> from kdjax import theory
      >>> lam, beta = theory.power_law(500, 2.0, 1.5)
      >>> print(f"{theory.optimal_surrogate_risk(lam, beta, 200):.5f}")
      0.08325
    """
    (lam, test, beta_star), (n, noise_var, ridge) = _inputs.align(
        {"lam": lam, "lam_test": lam if lam_test is None else lam_test, "beta_star": beta_star},
        sizes(n, noise_var, ridge),
    )
    return _optimal_risk(lam, test, beta_star, n, noise_var, ridge, lam_test is None)[..., 0]


def optimal_mask(lam: Any, n: Any, ridge: Any = 0.0, *, lam_test: Any = None) -> jax.Array:
    """Which coordinates of the truth the best 0-1 masked surrogate keeps.

    The student still trains on all features; only its labels come from fewer. A coordinate is kept
    iff ``zeta^2 < 1 - omega``, which cuts at an eigenvalue (`mask_threshold`); with another test
    law iff ``lam_test (2 L - L^2) (1 - omega) > V lam zeta^2``. It depends neither on the truth
    nor on the noise.

    Args:
      lam: eigenvalues of the training covariance, [..., p].
      n: number of samples of the student, above 0, [...].
      ridge: delta of the student, at least 0, [...].
      lam_test: eigenvalues of the test covariance, [..., p]; by default ``lam``.

    Returns:
      bool [..., p]; False for eigenvalues of 0, and everywhere where a traced argument is invalid
      (a boolean can't be NaN; `masked_risk` is). It carries no gradient, and once it keeps
      everything the gain is flat: to find where it stops helping, follow `mask_threshold` down to
      the smallest eigenvalue.

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> from kdjax import theory
      >>> print(int(theory.optimal_mask(jnp.arange(1.0, 501.0) ** -2, 200).sum()))
      203

    Reference:
      Ildiz et al., "High-dimensional Analysis of Knowledge Distillation", ICLR 2025 (the optimal
      mask); covariate shift and ridge are our derivation.
    """
    (aligned, test), (n, ridge) = _aligned(lam, lam_test, n, ridge)
    return _mask(aligned, None if lam_test is None else test, n, ridge)


def mask_threshold(lam: Any, n: Any, ridge: Any = 0.0) -> jax.Array:
    """The eigenvalue above which `optimal_mask` keeps a coordinate.

    ``tau (1 - sqrt(1 - omega)) / sqrt(1 - omega)``.

    Args:
      lam: eigenvalues of the training covariance, [..., p].
      n: number of samples of the student, above 0, [...].
      ridge: delta of the student, at least 0, [...].

    Returns:
      The cut, [...], in the units of ``lam``; 0 where tau is 0 (everything is kept).

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> from kdjax import theory
      >>> lam = jnp.arange(1.0, 501.0) ** -2
      >>> print(int((lam > theory.mask_threshold(lam, 200)).sum()))
      203
    """
    (lam,), (n, ridge) = _inputs.align(
        {"lam": lam}, {"n": (n, _inputs.COUNT), "ridge": (ridge, _inputs.NONNEGATIVE)}
    )
    return _threshold(lam, n, ridge)[..., 0]


def masked_risk(
    lam: Any,
    beta_star: Any,
    n: Any,
    *,
    mask: Any = None,
    noise_var: Any = 0.0,
    ridge: Any = 0.0,
    lam_test: Any = None,
) -> jax.Array:
    """Excess risk of a student of the masked truth, by default with the optimal mask.

    Args:
      lam: eigenvalues of the training covariance, [..., p].
      beta_star: the truth in the eigenbasis, [..., p].
      n: number of samples of the student, above 0, [...].
      mask: bool [..., p], the coordinates that the surrogate keeps; by default `optimal_mask`.
      noise_var: variance of the noise on the student's labels, at least 0, [...].
      ridge: delta of the student, at least 0, [...].
      lam_test: eigenvalues of the test covariance, [..., p]; by default ``lam``.

    Returns:
      The excess risk, [...]. For its parts, call `excess_risk` with ``beta_star * mask``.

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.
      TypeError: if ``mask`` is not boolean.

    Example:
      >>> from kdjax import theory
      >>> lam, beta = theory.power_law(500, 2.0, 1.5)
      >>> print(f"{theory.masked_risk(lam, beta, 200):.5f}")
      0.08966
    """
    if mask is None:
        mask = optimal_mask(lam, n, ridge, lam_test=lam_test)
    (_, beta, mask), _ = _inputs.align({"lam": lam, "beta_star": beta_star, "mask": mask}, {})
    terms = excess_risk(
        lam,
        beta_star,
        jnp.where(mask, beta, 0.0),
        n=n,
        noise_var=noise_var,
        ridge=ridge,
        lam_test=lam_test,
    )
    return terms.total


def _aligned(
    lam: Any, lam_test: Any, n: Any, ridge: Any, beta_star: Any = None
) -> tuple[list[jax.Array], list[jax.Array]]:
    vectors = {"lam": lam, "lam_test": lam if lam_test is None else lam_test}
    if beta_star is not None:
        vectors["beta_star"] = beta_star
    return _inputs.align(vectors, {"n": (n, _inputs.COUNT), "ridge": (ridge, _inputs.NONNEGATIVE)})


def _weights(
    s: Resolved, lam: jax.Array, lam_test: jax.Array, n: jax.Array, same: bool
) -> tuple[jax.Array, jax.Array]:
    """Curvature of the risk in each coordinate of the surrogate: of its bias, of its variance.

    In units of the eigenvalue where both laws are the ``same``: then they are smooth at 0.
    """
    factor = variance_factor(s, lam_test, n)
    if same:
        return s.gap + 0 * s.learned, factor * s.zeta**2
    return lam_test * s.gap, factor * lam * s.zeta**2


@functools.partial(jax.jit, static_argnums=4)
def _gain(
    lam: jax.Array, lam_test: jax.Array, n: jax.Array, ridge: jax.Array, same: bool
) -> jax.Array:
    s = resolve(lam, n, ridge)
    bias, variance = _weights(s, lam, lam_test, n, same)
    curvature = bias * s.learned**2 + variance
    flat = curvature == 0
    gain = jnp.where(flat, 0.0, bias * s.learned / jnp.where(flat, 1.0, curvature))
    return jnp.where((s.tau == 0) & (flat | (lam == 0)), 1.0, gain)


@functools.partial(jax.jit, static_argnums=6)
def _optimal_risk(
    lam: jax.Array,
    lam_test: jax.Array,
    beta_star: jax.Array,
    n: jax.Array,
    noise_var: jax.Array,
    ridge: jax.Array,
    same: bool,
) -> jax.Array:
    s = resolve(lam, n, ridge)
    bias, variance = _weights(s, lam, lam_test, n, same)
    curvature = bias * s.learned**2 + variance
    flat = curvature == 0
    # Of an eigenvalue of 0 nothing is learned; with as many samples as eigenvalues everything is.
    missed = jnp.where(flat, 1 - s.learned, variance / jnp.where(flat, 1.0, curvature))
    noise = amplified(variance_factor(s, lam_test, n) * noise_var, s.inverse_gap)
    return total(lam_test * beta_star**2 * missed) + noise


@jax.jit
def _mask(lam: jax.Array, lam_test: jax.Array | None, n: jax.Array, ridge: jax.Array) -> jax.Array:
    s = resolve(lam, n, ridge)
    if lam_test is None:
        kept = s.zeta**2 < s.gap
    else:
        bias, variance = _weights(s, lam, lam_test, n, False)
        kept = bias * (2 * s.learned - s.learned**2) > variance
    return (kept | (s.tau == 0)) & (lam > 0)


@jax.jit
def _threshold(lam: jax.Array, n: jax.Array, ridge: jax.Array) -> jax.Array:
    s = resolve(lam, n, ridge)
    root = jnp.sqrt(jnp.where(s.gap == 0, 1.0, s.gap))
    # 1 - sqrt(1 - omega) = omega / (1 + sqrt(1 - omega)) keeps its digits for a small omega.
    cut = s.tau * s.omega / ((1 + root) * root)
    return jnp.where(s.tau == 0, 0.0, cut)
