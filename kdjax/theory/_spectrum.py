"""The effective regularisation tau of ridge and minimum-norm regression, and what follows from it.

Every risk of the room is a closed form in tau, the root of

    F(tau) = sum_i lam_i / (lam_i + tau) + ridge / tau - n = 0.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax.theory import _inputs
from kdjax.theory._newton import climb, nonzero


class SpectralStats(NamedTuple):
    """What a spectrum, a sample size and a ridge decide about any risk.

    Attributes:
      tau: effective regularisation, [...]; 0 when there are at least as many samples as nonzero
        eigenvalues and no ridge.
      zeta: ``tau / (lam + tau)``, the part of each coordinate that isn't learned, [..., p].
      omega: ``sum((1 - zeta)^2) / n``, [...].
      one_minus_omega: ``1 - omega`` without cancellation, [...].
      df1: degrees of freedom, ``sum(1 - zeta)``, [...]; n without a ridge and below the rank.
    """

    tau: jax.Array
    zeta: jax.Array
    omega: jax.Array
    one_minus_omega: jax.Array
    df1: jax.Array


def effective_reg(
    lam: Any, n: Any, ridge: Any = 0.0, *, max_steps: int = 60, rank_tol: Any = 0.0
) -> jax.Array:
    """Effective regularisation tau of ridge regression on n Gaussian samples.

    The root of ``sum(lam / (lam + tau)) + ridge / tau = n``; 0 if ``ridge`` is 0 and n is at least
    the rank (the number of positive eigenvalues). O(p), and differentiable to every order in all
    arguments by the implicit function theorem: nothing is differentiated through the iteration.

    Args:
      lam: eigenvalues of the feature covariance in any order, [..., p], not negative.
      n: number of samples, above 0, any real number, [...].
      ridge: delta of ``||y - X b||^2 + delta ||b||^2`` (not divided by n), at least 0, [...].
      max_steps: Newton steps at most; 6 to 20 are usual.
      rank_tol: eigenvalues up to ``rank_tol * max(lam)`` count as zero. By default only exact
        zeros do, and an eigenvalue of 1e-17 left by an eigensolver counts towards the rank.

    Returns:
      tau, [...], in the units of lam. NaN where a traced argument is invalid, or where
      ``max_steps`` were not enough. At n = rank without a ridge the slope in the ridge is
      infinite, and 0 is returned for it.

    Raises:
      ValueError: if a known eigenvalue is negative or not finite, all are zero, n is not above 0,
        ``ridge`` is negative, or shapes disagree.
      TypeError: if an argument is not real.

    Example:
      >>> import jax.numpy as jnp
      >>> from kdjax import theory
      >>> print(f"{theory.effective_reg(jnp.ones(300), 120):.4f}")  # isotropic: p / n - 1
      1.5000

    Reference:
      Ildiz, Gozeten, Taga, Mondelli, Oymak, "High-dimensional Analysis of Knowledge Distillation:
      Weak-to-Strong Generalization and Scaling Laws", ICLR 2025.
    """
    _checks.count("max_steps", max_steps)
    (lam,), (n, ridge, rank_tol) = _inputs.align(
        {"lam": lam}, {**_size(n, ridge), "rank_tol": (rank_tol, _inputs.NONNEGATIVE)}
    )
    return _tau(truncated(lam, rank_tol), n, ridge, max_steps)[..., 0]


def spectral_stats(lam: Any, n: Any, ridge: Any = 0.0, *, rank_tol: Any = 0.0) -> SpectralStats:
    """Effective regularisation, what stays unlearned, and the variance factor Omega.

    Args:
      lam: eigenvalues, [..., p].
      n: number of samples, above 0, [...].
      ridge: delta of ``||y - X b||^2 + delta ||b||^2``, at least 0, [...].
      rank_tol: eigenvalues up to ``rank_tol * max(lam)`` count as zero.

    Returns:
      A SpectralStats. An eigenvalue of zero has ``zeta`` 1.

    Raises:
      ValueError: for a bad spectrum, n or ridge, or shapes that disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> from kdjax import theory
      >>> stats = theory.spectral_stats(jnp.arange(1.0, 501.0) ** -2, 200)
      >>> print(f"{stats.tau:.5e} {stats.omega:.6f}")
      3.97337e-05 0.612985
    """
    (lam,), (n, ridge, rank_tol) = _inputs.align(
        {"lam": lam}, {**_size(n, ridge), "rank_tol": (rank_tol, _inputs.NONNEGATIVE)}
    )
    s = resolve(truncated(lam, rank_tol), n, ridge)
    tau, omega, gap, df1 = (x[..., 0] for x in (s.tau, s.omega, s.gap, total(s.learned)))
    return SpectralStats(tau, s.zeta, omega, gap, df1)


class Resolved(NamedTuple):
    """A regression problem after tau is known; vectors [..., p], scalars [..., 1]."""

    tau: jax.Array
    learned: jax.Array  # L = lam / (lam + tau): 1 where lam > 0 = tau, 0 where lam = 0
    zeta: jax.Array  # 1 - L without cancellation
    density: jax.Array  # lam / (lam + tau)^2: 0 where lam = 0
    omega: jax.Array
    gap: jax.Array  # 1 - omega
    inverse_gap: jax.Array  # inf where gap is 0
    unfitted: jax.Array  # 1 - df1 / n


@functools.partial(jax.jit, static_argnames="exact_ols")
def resolve(lam: jax.Array, n: jax.Array, ridge: jax.Array, *, exact_ols: bool = False) -> Resolved:
    """Solves for tau and gives everything the risks are made of, for aligned arguments."""
    tau = _tau(lam, n, ridge, 60)
    positive = lam > 0
    scale = nonzero(lam + tau)
    learned = lam / scale
    zeta = jnp.where(lam + tau == 0, 1.0, tau / scale)
    density = learned / scale
    rank = _rank(lam)
    # 1 - sum(L) / n and 1 - sum(L^2) / n lose all their digits near n = rank; these forms don't.
    # Those for n >= rank also hold at tau = 0, with the right slope in the ridge.
    slack = ridge / nonzero(tau)
    missed = jnp.where(positive, zeta, -learned)  # an eigenvalue of 0 counts as 0, with its slope
    unfitted = jnp.where(n >= rank, n - rank + total(missed), slack) / n
    gap = _gap(learned, zeta, positive, n, slack) / n
    positive_gap = jnp.where(gap > 0, gap, 1.0)
    inverse = jnp.where(gap > 0, 1 / positive_gap, jnp.where(gap == 0, jnp.inf, jnp.nan))
    if exact_ols:
        left = n - rank - 1
        exact = jnp.where(left > 0, n / jnp.where(left > 0, left, 1.0), jnp.inf)
        inverse = jnp.where(tau == 0, exact, inverse)
    omega = total(learned**2) / n
    return Resolved(tau, learned, zeta, density, omega, gap, inverse, unfitted)


def _gap(
    learned: jax.Array, zeta: jax.Array, positive: jax.Array, n: jax.Array, slack: jax.Array
) -> jax.Array:
    """``n (1 - omega) = n - sum(L^2)``: the slope of F in log tau, as a sum of positive terms."""
    rank = total(jnp.where(positive, 1.0, 0 * learned))
    above = n - rank + total(jnp.where(positive, zeta * (2 - zeta), -(learned**2)))
    return jnp.where(n >= rank, above, total(learned * zeta) + slack)


def _rank(lam: jax.Array) -> jax.Array:
    """The number of positive eigenvalues, as a float; NaN for an invalid spectrum."""
    return total(jnp.where(lam > 0, 1.0, 0 * lam))


def total(x: jax.Array) -> jax.Array:
    """The sum over the last axis, kept as an axis of 1."""
    return jnp.sum(x, axis=-1, keepdims=True)


def amplified(x: jax.Array, inverse_gap: jax.Array) -> jax.Array:
    """``x * inverse_gap`` for x >= 0, with ``0 * inf = 0``: no noise is amplified to no noise."""
    infinite = jnp.isinf(inverse_gap)
    product = x * jnp.where(infinite, 1.0, inverse_gap)
    return jnp.where(infinite & (x > 0), jnp.inf, jnp.where(infinite & (x == 0), 0.0, product))


def truncated(lam: jax.Array, rank_tol: jax.Array) -> jax.Array:
    """The spectrum with everything up to ``rank_tol * max(lam)`` set to zero."""
    small = lam <= rank_tol * jnp.max(lam, axis=-1, keepdims=True)
    return jnp.where(small & (lam > 0), 0.0, lam)


def _size(n: Any, ridge: Any) -> dict[str, tuple[Any, _inputs.Bounds]]:
    return {"n": (n, _inputs.COUNT), "ridge": (ridge, _inputs.NONNEGATIVE)}


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
@functools.partial(jax.jit, static_argnums=3)
def _tau(lam: jax.Array, n: jax.Array, ridge: jax.Array, max_steps: int) -> jax.Array:
    positive = lam > 0
    rank = _rank(lam)
    interpolates = (ridge == 0) & (n >= rank)
    smallest = jnp.min(jnp.where(positive, lam, jnp.inf), axis=-1, keepdims=True)
    # F > 0 at both of these, and F is decreasing and convex: Newton climbs to the root from there.
    start = jnp.maximum(ridge, smallest * (rank - n)) / n
    start = jnp.where(interpolates, 1.0, start + 0 * (rank + ridge + lam[..., :1]))

    def relative_step(tau: jax.Array) -> jax.Array:
        scale = lam + tau
        zeta, learned = tau / scale, lam / scale
        # Each coordinate counts from the integer it is nearer to, so that nothing cancels: with
        # many eigenvalues far above and below tau, sum(lam / (lam + tau)) - n has no digits left.
        large = lam > tau
        known = total(large.astype(lam.dtype)) - n
        excess = known + (total(jnp.where(large, -zeta, learned)) + ridge / tau)
        return excess / (total(learned * zeta) + ridge / tau)

    bound = (total(lam) + ridge) / n  # L <= lam / tau
    root = climb(relative_step, start, bound, done=interpolates, max_steps=max_steps)
    return jnp.where(interpolates, 0.0, root)


@_tau.defjvp
def _tau_jvp(
    max_steps: int, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    lam, n, ridge = primals
    dlam, dn, dridge = tangents
    tau = _tau(lam, n, ridge, max_steps)
    scale = nonzero(lam + tau)
    zeta = tau / scale
    slope = _gap(lam / scale, zeta, lam > 0, n, ridge / nonzero(tau))
    moved = (total(zeta**2 * dlam) + dridge - tau * dn) / nonzero(slope)
    return tau, jnp.where(slope == 0, 0.0, moved)
