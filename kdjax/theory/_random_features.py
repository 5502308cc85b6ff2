"""Random-feature ridge regression, as a teacher, as a student, or one after the other.

The room's other files speak of weights b in the eigenbasis. Here everything is in function
coordinates ``u = sqrt(lam) b``: the target is ``sum(u_i phi_i)`` with phi orthonormal under the
data, so that a risk is a plain sum of squares, whatever features represent the function.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax.theory import _inputs
from kdjax.theory._newton import climb, nonzero
from kdjax.theory._spectrum import amplified, total
from kdjax.theory._stages import Moments

SIZE = _inputs.Bounds(above=0.0, infinite=True)


class FixedPoint(NamedTuple):
    """What n samples and k random features do to a spectrum.

    Attributes:
      gamma: effective regularisation of the kernel: ``lam / (lam + gamma)`` is learned, [...].
      kappa: effective regularisation of the random features' own spectrum, [...].
    """

    gamma: jax.Array
    kappa: jax.Array


def rf_fixed_point(
    lam: Any, n: Any, k: Any, ridge: Any = 0.0, *, max_steps: int = 60
) -> FixedPoint:
    """Effective regularisations of ridge regression on k random features and n samples.

    With ``z = sum(lam / (lam + gamma))``, the solution of ``n = z + ridge / kappa`` and
    ``k = z + k kappa / gamma``. Without a ridge gamma is `effective_reg` at ``min(n, k)``, and
    kappa is ``gamma (1 - n / k)``, or 0 if ``k <= n``. Differentiable to every order in all
    arguments by the implicit function theorem.

    Args:
      lam: eigenvalues of the kernel, [..., p].
      n: number of samples, above 0, inf allowed (the population), [...].
      k: number of random features, above 0, inf allowed (the kernel itself), [...].
      ridge: delta of ``||y - F a||^2 + delta ||a||^2`` for features F of entries of order
        1 / sqrt(k), at least 0, [...].
      max_steps: Newton steps at most; 6 to 20 are usual.

    Returns:
      A FixedPoint, in the units of lam. NaN where a traced argument is invalid, or where
      ``max_steps`` were not enough. At n = k without a ridge gamma has a kink in the sizes and
      an infinite slope in ``ridge``: derivatives in n and k are a mean, that in ``ridge`` is 0.

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.
      TypeError: if an argument is not real.

    Example:
      >>> import jax.numpy as jnp
      >>> from kdjax import theory
      >>> point = theory.rf_fixed_point(jnp.ones(300), 120, 240)
      >>> print(f"{point.gamma:.4f} {point.kappa:.4f}")
      1.5000 0.7500

    Reference:
      Simon, Karkada, Ghosh, Belkin, "More Is Better in Modern Machine Learning: when Infinite
      Overparameterization is Optimal and Overfitting is Obligatory", ICLR 2024.
    """
    _checks.count("max_steps", max_steps)
    (lam,), (n, k, ridge) = _inputs.align({"lam": lam}, _sizes(n, k, ridge))
    return FixedPoint(*(x[..., 0] for x in _fixed_point(lam, n, k, ridge, max_steps)))


def rf_moments(
    lam: Any, moments: Moments, *, n: Any, k: Any, noise_var: Any = 0.0, ridge: Any = 0.0
) -> Moments:
    """Moments of random-feature ridge regression trained on n labels of another estimator.

    k Gaussian features of the kernel's spectrum; with L, zeta, z as in `rf_fixed_point`,
    ``W = lam zeta^2``, ``c_i = lam_i / (lam_i + gamma)^2 / (k - sum(L^2))``, ``C = sum(c)`` and
    ``A = L^2 + C W``::

        mean'   = L mean
        second' = L^2 second + c sum(W second) + A / n gamma2
        gamma2  = (noise_var + sum(second (zeta^2 + C W))) / (1 - sum(A) / n)

    Unlike `estimator_moments`, this is in function coordinates ``u = sqrt(lam) b``, and averages
    over the random features too. Compose calls for a teacher and its student; a truth v is
    ``Moments(v, v**2)``.

    Args:
      lam: eigenvalues of the kernel, [..., p].
      moments: of what labels the samples, in function coordinates, each [..., p].
      n: number of samples, above 0, inf allowed (the population), [...].
      k: number of random features, above 0, inf allowed (the kernel itself), [...].
      noise_var: variance of the noise added to the labels, at least 0, [...].
      ridge: delta of ``||y - F a||^2 + delta ||a||^2``, at least 0, [...].

    Returns:
      Moments of the trained estimator in function coordinates, each [..., p]. ``second`` is
      infinite at the interpolation peak (n = k without a ridge).

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.
      TypeError: if an argument is not real.

    Example:
      >>> import jax.numpy as jnp
      >>> from kdjax import theory
      >>> lam, beta = theory.power_law(500, 2.0, 1.5)
      >>> v = jnp.sqrt(lam) * beta
      >>> trained = theory.rf_moments(lam, theory.Moments(v, v**2), n=200, k=jnp.inf)
      >>> print(f"{theory.rf_excess_risk(v, trained):.4f}")  # as linear regression
      0.1194

    Reference:
      Our derivation; its risk agrees with Simon et al., "More Is Better in Modern Machine
      Learning", ICLR 2024.
    """
    (lam, mean, second), (n, k, ridge, noise_var) = _inputs.align(
        {"lam": lam, "mean": moments.mean, "second": moments.second},
        {**_sizes(n, k, ridge), "noise_var": (noise_var, _inputs.NONNEGATIVE)},
    )
    return Moments(*_rf_moments(lam, mean, second, n, k, noise_var, ridge))


def rf_excess_risk(v: Any, moments: Moments) -> jax.Array:
    """Expected excess risk of an estimator in function coordinates.

    ``sum((v - mean)^2 + second - mean^2)``.

    Args:
      v: the truth in function coordinates, ``sqrt(lam) beta``, [..., p].
      moments: of the estimator, in function coordinates, each [..., p].

    Returns:
      The excess risk, [...].

    Raises:
      ValueError: if a known value is not finite, or shapes disagree.
      TypeError: if an argument is not real.

    Example:
      >>> import jax.numpy as jnp
      >>> from kdjax import theory
      >>> zero = theory.Moments(jnp.zeros(3), jnp.zeros(3))
      >>> print(theory.rf_excess_risk(jnp.ones(3), zero))
      3.0
    """
    (v, mean, second), _ = _inputs.align(
        {"v": v, "mean": moments.mean, "second": moments.second}, {}
    )
    return _risk(v, mean, second)[..., 0]


def gradient_flow_moments(lam: Any, moments: Moments, t: Any) -> Moments:
    """Moments of a student after gradient flow for time t on the population, started at 0.

    Each coordinate is ``1 - exp(-lam t)`` of what labels it. The same factor holds in function
    coordinates and for weights in the eigenbasis.

    Args:
      lam: eigenvalues of the student's kernel or covariance, [..., p].
      moments: of what labels the population, each [..., p].
      t: time, at least 0, [...]; inf is the converged student, which repeats its labels.

    Returns:
      Moments of the student, each [..., p].

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.
      TypeError: if an argument is not real.

    Example:
      >>> import jax.numpy as jnp
      >>> from kdjax import theory
      >>> labels = theory.Moments(jnp.ones(2), jnp.ones(2))
      >>> print(theory.gradient_flow_moments(jnp.array([1.0, 0.0]), labels, jnp.inf).mean)
      [1. 0.]

    Reference:
      Medvedev, Lyu, Yu, Arora, Li, Srebro, "Weak-to-Strong Generalization Even in Random Feature
      Networks, Provably", ICML 2025 (the early-stopped student).
    """
    (lam, mean, second), (t,) = _inputs.align(
        {"lam": lam, "mean": moments.mean, "second": moments.second},
        {"t": (t, _inputs.Bounds(low=0.0, infinite=True))},
    )
    return Moments(*_flow(lam, mean, second, t))


def _sizes(n: Any, k: Any, ridge: Any) -> dict[str, tuple[Any, _inputs.Bounds]]:
    return {"n": (n, SIZE), "k": (k, SIZE), "ridge": (ridge, _inputs.NONNEGATIVE)}


class _Learned(NamedTuple):
    """A problem after gamma is known; vectors [..., p], scalars [..., 1].

    Of the sizes n and k, the smaller one limits what is learned; z = sum(L).
    """

    learned: jax.Array  # L
    zeta: jax.Array  # 1 - L
    density: jax.Array  # lam / (lam + gamma)^2
    spread: jax.Array  # sum(L zeta)
    samples_left: jax.Array  # n - z
    features_left: jax.Array  # 1 - z / k
    small_left: jax.Array  # min(n, k) - z
    large_left: jax.Array  # 1 - z / max(n, k)


def _learned(
    lam: jax.Array, gamma: jax.Array, n: jax.Array, k: jax.Array, ridge: jax.Array
) -> _Learned:
    positive = lam > 0
    scale = nonzero(lam + gamma)
    learned = lam / scale
    zeta = jnp.where(lam + gamma == 0, 1.0, gamma / scale)
    missed = jnp.where(positive, zeta, -learned)  # an eigenvalue of 0 counts as 0, with its slope
    rank = total(jnp.where(positive, 1.0, 0 * lam))
    # With both sizes infinite everything is learned; finite stand-ins keep derivatives finite.
    ideal = jnp.isinf(n) & jnp.isinf(k)
    n_, k_ = (jnp.where(ideal, rank + 1, x) for x in (n, k))
    small, large = _ordered(n_, k_)
    # As in `resolve`: from the rank where that is below, else from the equation; the first also
    # holds at gamma = 0, with the right slope in the ridge.
    left = jnp.where(small >= rank, small - rank + total(missed), _small_left(gamma, n_, k_, ridge))
    large_left = (1 - small / large) + left / large
    samples = jnp.where(k_ >= n_, left, n_ - k_ + left)
    features = jnp.where(k_ >= n_, large_left, left / k_)
    return _Learned(
        learned=learned,
        zeta=zeta,
        density=learned / scale,
        spread=total(learned * zeta),
        samples_left=jnp.where(ideal, jnp.inf, samples),
        features_left=jnp.where(ideal, 1.0, features),
        small_left=left,
        large_left=large_left,
    )


def _small_left(gamma: jax.Array, n: jax.Array, k: jax.Array, ridge: jax.Array) -> jax.Array:
    """``d = min(n, k) - z``, the root of ``d (d + |n - k|) = k ridge / gamma``.

    In units of the larger size, which may be infinite, and in the form that doesn't cancel.
    """
    small, large = _ordered(n, k)
    gap = 1 - small / large
    slack = _of_large(n, k) * ridge / nonzero(gamma)
    square = gap**2 + 4 * slack / large
    root = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), square)
    return 2 * slack / nonzero(gap + root)


def _ordered(n: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smaller and the larger size; at n = k with the derivatives of one side, not a mean."""
    return jnp.where(k >= n, n, k), jnp.where(k >= n, k, n)


def _of_large(n: jax.Array, k: jax.Array) -> jax.Array:
    """``k / max(n, k)``, also where that is infinite."""
    return jnp.where(k >= n, 1.0, jnp.where(k >= n, 1.0, k) / n)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
@functools.partial(jax.jit, static_argnums=4)
def _gamma(
    lam: jax.Array, n: jax.Array, k: jax.Array, ridge: jax.Array, max_steps: int
) -> jax.Array:
    """The root of ``F(gamma) = z - min(n, k) + d``, with d of `_small_left`.

    z and d are decreasing and convex in gamma, so Newton climbs to the root from the left, as for
    tau, and needs no bracket.
    """
    positive = lam > 0
    rank = total(positive.astype(lam.dtype))
    small, large = _ordered(n, k)
    vanishes = ((ridge == 0) | jnp.isinf(n)) & (small >= rank)
    smallest = jnp.min(jnp.where(positive, lam, jnp.inf), axis=-1, keepdims=True)
    # z >= min(n, k) at the one, d = min(n, k) at the other.
    start = jnp.maximum(smallest * (rank - small) / small, ridge / n)
    start = jnp.where(vanishes, 1.0, start)
    start = jnp.broadcast_to(start, jnp.broadcast_shapes(start.shape, k.shape))
    gap = 1 - small / large

    def relative_step(gamma: jax.Array) -> jax.Array:
        scale = lam + gamma
        zeta, learned = gamma / scale, lam / scale
        above = lam > gamma  # each coordinate counts from the integer it is nearer to
        left = _small_left(gamma, n, k, ridge)
        known = total(above.astype(lam.dtype)) - small
        excess = known + (total(jnp.where(above, -zeta, learned)) + left)
        bend = left * (gap + left / large) / nonzero(gap + 2 * left / large)
        return excess / (total(learned * zeta) + bend)

    # z <= sum(lam) / gamma and d (d + |n - k|) = k ridge / gamma: each at most min(n, k) / 2 here.
    bound = 2 * jnp.maximum(total(lam), 2 * _of_large(n, k) * ridge) / small
    root = climb(relative_step, start, bound, done=vanishes, max_steps=max_steps)
    return jnp.where(vanishes, 0.0, root)


@_gamma.defjvp
def _gamma_jvp(
    max_steps: int, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """Implicit rule for ``(n - z) (1 - z / k) gamma = ridge``, over d + |n - k| + d in units of
    the larger size: then nothing is 0 / 0 but the peak n = k without a ridge."""
    lam, n, k, ridge = primals
    dlam, dn, dk, dridge = tangents
    gamma = _gamma(lam, n, k, ridge, max_steps)
    s = _learned(lam, gamma, n, k, ridge)
    other = s.small_left / _ordered(n, k)[1]
    both = s.large_left + other
    peak = both == 0
    by_small = jnp.where(peak, 0.5, s.large_left / nonzero(both))
    by_large = jnp.where(peak, 0.5, other / nonzero(both))
    by_n = jnp.where(k >= n, by_small, by_large)
    by_k = jnp.where(k >= n, by_large, by_small) * total(s.learned) / k
    by_ridge = jnp.where(peak, 0.0, _of_large(n, k) / nonzero(both))
    by_lam = jnp.where(gamma == 0, 0.0, s.zeta**2)
    slope = s.spread + s.small_left * by_small
    moved = total(by_lam * dlam) + by_ridge * dridge - gamma * (by_n * dn + by_k * dk)
    flat = (slope == 0) | (jnp.isinf(n) & jnp.isinf(k))
    return gamma, jnp.where(flat, 0.0, moved / nonzero(slope))


@functools.partial(jax.jit, static_argnums=4)
def _fixed_point(
    lam: jax.Array, n: jax.Array, k: jax.Array, ridge: jax.Array, max_steps: int
) -> tuple[jax.Array, jax.Array]:
    gamma = _gamma(lam, n, k, ridge, max_steps)
    return gamma, gamma * _learned(lam, gamma, n, k, ridge).features_left


@jax.jit
def _rf_moments(
    lam: jax.Array,
    mean: jax.Array,
    second: jax.Array,
    n: jax.Array,
    k: jax.Array,
    noise_var: jax.Array,
    ridge: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    gamma = _gamma(lam, n, k, ridge, 60)
    s = _learned(lam, gamma, n, k, ridge)
    w = gamma * s.zeta * s.learned
    # 1 - sum(L^2) / k and n - sum(A), both as sums of positive terms.
    features = nonzero(s.features_left + s.spread / k)
    samples = s.samples_left + s.spread * s.features_left / features
    c = s.density / k / features
    wc = w * total(c)
    inverse = jnp.where(samples == 0, jnp.inf, jnp.nan)
    inverse = jnp.where(samples > 0, 1 / jnp.where(samples > 0, samples, 1.0), inverse)
    error = noise_var + total(second * (s.zeta**2 + wc))
    sampled = amplified(error * (s.learned**2 + wc), inverse)
    return s.learned * mean, s.learned**2 * second + c * total(w * second) + sampled


@jax.jit
def _risk(v: jax.Array, mean: jax.Array, second: jax.Array) -> jax.Array:
    # Squares of differences, not the difference of squares: a small risk keeps its digits.
    return total((v - mean) ** 2 + (second - mean**2))


@jax.jit
def _flow(
    lam: jax.Array, mean: jax.Array, second: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    forever = jnp.isinf(t)
    followed = -jnp.expm1(-lam * jnp.where(forever, 0.0, t))
    followed = jnp.where(forever & (lam > 0), 1.0, followed)
    return followed * mean, followed**2 * second
