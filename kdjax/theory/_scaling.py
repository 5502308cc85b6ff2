"""Power-law spectra: how risks fall with the number of samples, and with which constants.

With ``lam_i = i^-alpha``, ``lam_i beta_i^2 = i^-b`` and 1 << n << p, sums over the spectrum become
integrals over ``u = tau / lam``, and what is left of a noise-free risk is ``C tau^min(q, 2)`` with
``q = (b - 1) / alpha``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln

from kdjax import _checks
from kdjax.theory import _inputs

ABOVE_ONE = _inputs.Bounds(above=1.0)


class ScalingConstants(NamedTuple):
    """What a power law says of risks for many samples, and many more features, each [...].

    Attributes:
      q: ``(b - 1) / alpha``.
      exponent: noise-free risks fall as ``n^-exponent``, ``min(b - 1, 2 alpha)``.
      tau_prefactor: c of ``tau = (n / c)^-alpha``.
      omega: its limit, ``1 - 1 / alpha``.
      noise_multiplier: excess risk per noise variance, ``alpha - 1``; it doesn't fall with n.
      mask_cut: the optimal mask keeps the eigenvalues above ``tau / mask_cut``.
      standard: C of ``C tau^min(q, 2)`` with strong labels.
      optimal: C with the optimal surrogate.
      mask: C with the optimal mask.
      ratio_optimal: risk of the optimal surrogate over that with strong labels.
      ratio_mask: risk of the optimal mask over that with strong labels.
    """

    q: jax.Array
    exponent: jax.Array
    tau_prefactor: jax.Array
    omega: jax.Array
    noise_multiplier: jax.Array
    mask_cut: jax.Array
    standard: jax.Array
    optimal: jax.Array
    mask: jax.Array
    ratio_optimal: jax.Array
    ratio_mask: jax.Array


class ScalingLaw(NamedTuple):
    """Predicted excess risks on a power law, each [...].

    Attributes:
      tau: effective regularisation.
      standard: with strong labels.
      optimal: with the optimal surrogate.
      mask: with the optimal mask.
    """

    tau: jax.Array
    standard: jax.Array
    optimal: jax.Array
    mask: jax.Array


def power_law(p: int, alpha: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    """A power-law spectrum and the truth with a power-law energy on it.

    ``lam_i = i^-alpha`` and ``lam_i beta_i^2 = i^-b`` for i = 1 .. p.

    Args:
      p: number of features, at least 1.
      alpha: decay of the spectrum, [...].
      b: decay of the energy, [...].

    Returns:
      ``(lam, beta)``, each [..., p] in the default float.

    Raises:
      ValueError: if ``p`` is below 1, or ``alpha`` or ``b`` isn't finite.

    Example:
      >>> from kdjax import theory
      >>> lam, beta = theory.power_law(3, 2.0, 2.0)
      >>> print(lam[1], beta)
      0.25 [1. 1. 1.]

    Reference:
      Ildiz et al., "High-dimensional Analysis of Knowledge Distillation", ICLR 2025 (Figure 1 has
      alpha = 2, b = 1.5).
    """
    p = _checks.count("p", p)
    alpha, b = _inputs.numbers({"alpha": (alpha, _inputs.ANY), "b": (b, _inputs.ANY)})
    alpha, b = alpha[..., None], b[..., None]
    i = jnp.arange(1, p + 1, dtype=jnp.result_type(float, alpha, b))
    i = i.reshape((1,) * (max(alpha.ndim, b.ndim) - 1) + (p,))
    return i**-alpha, i ** ((alpha - b) / 2)


def scaling_exponent(alpha: Any, b: Any) -> jax.Array:
    """Exponent of the noise-free excess risk in the number of samples on a power law.

    ``min(b - 1, 2 alpha)``: the risk falls as ``n^-exponent`` (with a factor log n where both are
    equal). Strong labels, the optimal surrogate and the optimal mask share it: a surrogate changes
    the constant, never the exponent.

    Args:
      alpha: decay of the spectrum, above 1, [...].
      b: decay of the energy, above 1, [...].

    Returns:
      The exponent, positive, [...].

    Raises:
      ValueError: if ``alpha`` or ``b`` is not above 1, or shapes disagree.

    Example:
      >>> from kdjax import theory
      >>> print(theory.scaling_exponent(2.0, 1.5))
      0.5

    Reference:
      Ildiz et al., "High-dimensional Analysis of Knowledge Distillation", ICLR 2025 (the scaling
      law of surrogate-to-target models).
    """
    alpha, b = _inputs.numbers({"alpha": (alpha, ABOVE_ONE), "b": (b, ABOVE_ONE)})
    return jnp.minimum(b - 1, 2 * alpha)


def scaling_constants(alpha: Any, b: Any) -> ScalingConstants:
    """Exponents and constants of the risk on a power law, for ridgeless regression.

    With ``q = (b - 1) / alpha``, ``c = (pi / alpha) / sin(pi / alpha)`` and
    ``u = 1 / (sqrt(alpha) - 1)``, for q < 2::

        standard = (1 - q) pi / sin(pi q)
        optimal  = (alpha - 1)^(q / 2) pi / (2 alpha sin(pi q / 2))
        mask     = integral of x^(1 - q) / (1 + x)^2 from 0 to u  +  u^-q / (q alpha)

    and for q > 2, where the largest eigenvalues decide, ``standard = mask = alpha zeta(b - 2
    alpha)``, ``optimal = (alpha - 1) zeta(b - 2 alpha)``. At q = 2 the risk is ``tau^2 log(1 /
    tau)`` to leading order: the three constants are inf there (with zero derivatives), their ratios
    are finite.

    Args:
      alpha: decay of the spectrum, above 1, [...].
      b: decay of the energy, above 1, [...].

    Returns:
      ScalingConstants, each [...].

    Raises:
      ValueError: if ``alpha`` or ``b`` is not above 1, or shapes disagree.

    Example:
      >>> from kdjax import theory
      >>> law = theory.scaling_constants(2.0, 1.5)
      >>> print(f"{law.ratio_optimal:.4f} {law.ratio_mask:.4f}")
      0.6159 0.6381

    Reference:
      Ildiz et al., "High-dimensional Analysis of Knowledge Distillation", ICLR 2025, has the
      exponent; the constants are our derivation.
    """
    alpha, b = _inputs.numbers({"alpha": (alpha, ABOVE_ONE), "b": (b, ABOVE_ONE)})
    return _constants(alpha, b)


def scaling_law(alpha: Any, b: Any, n: Any, *, noise_var: Any = 0.0) -> ScalingLaw:
    """Predicted excess risks on a power law, for 1 << n << p and no ridge.

    ``C tau^min(q, 2) + noise_var (alpha - 1)`` with the constants C of `scaling_constants`.

    Args:
      alpha: decay of the spectrum, above 1, [...].
      b: decay of the energy, above 1, [...].
      n: number of samples, above 0, [...].
      noise_var: variance of the noise on the student's labels, at least 0, [...].

    Returns:
      A ScalingLaw, each [...]; inf at ``b = 1 + 2 alpha``, where a log n comes in.

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.

    Example:
      >>> from kdjax import theory
      >>> law = theory.scaling_law(3.0, 2.0, 400)  # excess_risk at p = 200000: 0.007278, 0.003543
      >>> print(f"{law.standard:.6f} {law.optimal:.6f}")
      0.007311 0.003553
    """
    alpha, b, n, noise_var = _inputs.numbers(
        {
            "alpha": (alpha, ABOVE_ONE),
            "b": (b, ABOVE_ONE),
            "n": (n, _inputs.COUNT),
            "noise_var": (noise_var, _inputs.NONNEGATIVE),
        }
    )
    return _law(alpha, b, n, noise_var)


@jax.jit
def _law(alpha: jax.Array, b: jax.Array, n: jax.Array, noise_var: jax.Array) -> ScalingLaw:
    law = _constants(alpha, b)
    log_tau = -alpha * jnp.log(n / law.tau_prefactor)
    falling = jnp.exp(jnp.minimum(law.q, 2) * log_tau)
    floor = noise_var * law.noise_multiplier
    return ScalingLaw(
        jnp.exp(log_tau), *(c * falling + floor for c in (law.standard, law.optimal, law.mask))
    )


@jax.jit
def _constants(alpha: jax.Array, b: jax.Array) -> ScalingConstants:
    q = (b - 1) / alpha
    omega = (alpha - 1) / alpha
    # All constants through pi s / sin(pi s) = gamma(1 + s) gamma(1 - s): no 0 / 0 at q = 1, and
    # poles only where the constants have theirs.
    tau_prefactor = _gammas(1 + 1 / alpha, 1 + omega) / omega
    small = q < 2
    q_ = jnp.where(small, q, 1.0)
    bulk = _gammas(1 + q_, 3 - q_) / (q_ * (2 - q_))
    ratio_bulk = 2 * (alpha - 1) ** (q_ / 2) / alpha
    ratio_bulk *= _gammas(1 + q_ / 2, 2 - q_ / 2) / _gammas(1 + q_, 3 - q_)
    mask_bulk = _mask_integral(alpha, q_, bulk)
    # For q > 2 the head of the spectrum decides, and the mask keeps it as it is.
    large = q > 2
    head = alpha * _zeta(jnp.where(large, b - 2 * alpha, 2.0))
    standard = jnp.where(small, bulk, jnp.where(large, head, jnp.inf))
    ratio_optimal = jnp.where(small, ratio_bulk, omega)
    ratio_mask = jnp.where(small, mask_bulk / bulk, 1.0)
    known = jnp.where(jnp.isnan(q), q, 0.0)  # a comparison with NaN is False, not NaN
    return ScalingConstants(
        q=q,
        exponent=jnp.minimum(b - 1, 2 * alpha),
        tau_prefactor=tau_prefactor,
        omega=omega,
        noise_multiplier=alpha - 1,
        mask_cut=(jnp.sqrt(alpha) + 1) / (alpha - 1),
        standard=standard + known,
        optimal=jnp.where(q == 2, jnp.inf, ratio_optimal * jnp.where(q == 2, 1.0, standard))
        + known,
        mask=jnp.where(small, mask_bulk, standard) + known,
        ratio_optimal=ratio_optimal + known,
        ratio_mask=ratio_mask + known,
    )


def _gammas(x: jax.Array, y: jax.Array) -> jax.Array:
    """``gamma(x) gamma(y)`` for arguments between 1 and 3."""
    return jnp.exp(gammaln(x) + gammaln(y))


def _mask_integral(alpha: jax.Array, q: jax.Array, bulk: jax.Array) -> jax.Array:
    """C of the optimal mask for 0 < q < 2.

    With ``t = x / (1 + x)`` the integral is the incomplete beta function of (2 - q, q) at
    ``1 / sqrt(alpha)``. Its derivatives in q exist for the hypergeometric series, which is summed
    on the side where it falls at least as 2^-j; ``bulk`` is the whole integral.
    """
    root = jnp.sqrt(alpha)
    left = alpha >= 4
    x = jnp.where(left, 1 / root, (alpha - 1) / (root * (root + 1)))
    a = jnp.where(left, 2 - q, q)

    def horner(i: jax.Array, series: jax.Array) -> jax.Array:
        return 1 + (65 - i) / (64 - i + a) * x * series

    series = jax.lax.fori_loop(0, 64, horner, jnp.ones_like(x))
    part = x**a * (1 - x) ** (2 - a) / a * series
    kept = (root - 1) ** q / (q * alpha)
    return jnp.where(left, part, bulk - part) + kept


def _zeta(s: jax.Array) -> jax.Array:
    """Riemann's zeta for s > 1 by Euler and Maclaurin: jax's has no derivative in s."""
    cut = 10
    # B_2j / (2j)! for j = 1 .. 7.
    weights = (
        1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160, -691 / 1307674368000,
        1 / 74724249600,
    )  # fmt: skip
    total = sum((float(i) ** -s for i in range(2, cut)), jnp.ones_like(s))
    total += cut ** (1 - s) / (s - 1) + 0.5 * cut**-s
    rising = s * cut ** (-s - 1)
    for j, weight in enumerate(weights):
        total += weight * rising
        rising = rising * (s + 2 * j + 1) * (s + 2 * j + 2) / cut**2
    return total
