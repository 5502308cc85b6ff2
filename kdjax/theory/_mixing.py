"""Label mixing: a student of a surrogate's labels and true labels in one weighted sum.

The risk is a quadratic in the weight, so that its best value is a closed form.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kdjax.theory import _inputs
from kdjax.theory._risk import sizes, variance_factor
from kdjax.theory._spectrum import amplified, resolve, total
from kdjax.theory._stages import Moments, spread


def mixed_label_risk(
    lam: Any,
    beta_star: Any,
    beta_s: Any,
    xi: Any,
    *,
    n: Any,
    noise_var: Any = 0.0,
    ridge: Any = 0.0,
    lam_test: Any = None,
) -> jax.Array:
    """Excess risk of a student whose labels are ``xi x.beta_s + (1 - xi) y``.

    y is the true label with its noise, so the noise of the mixed label has the variance
    ``(1 - xi)^2 noise_var``. With L, zeta, V and omega of `excess_risk`, and with
    ``m1 = beta_star + xi (E beta_s - beta_star)``, ``var = xi^2 Var beta_s``::

        sum(lam_test ((beta_star - L m1)^2 + L^2 var))
            + V / (1 - omega) (sum(lam zeta^2 (m1^2 + var)) + (1 - xi)^2 noise_var)

    Args:
      lam: eigenvalues of the training covariance, [..., p].
      beta_star: the truth in the eigenbasis, [..., p].
      beta_s: the surrogate, [..., p], or the `Moments` of one that was trained on other samples.
      xi: weight of the surrogate's labels, any real number, [...]; 0 is strong labels.
      n: number of samples of the student, above 0, [...].
      noise_var: variance of the noise on the true labels, at least 0, [...].
      ridge: delta of the student's ``||y - X b||^2 + delta ||b||^2``, at least 0, [...].
      lam_test: eigenvalues of the test covariance, [..., p]; by default ``lam``.

    Returns:
      The excess risk, [...]; a quadratic in ``xi``.

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.
      TypeError: if an argument is not real.

    Example:
      >>> import jax.numpy as jnp
      >>> from kdjax import theory
      >>> lam, beta = theory.power_law(500, 2.0, 1.5)
      >>> xi = jnp.array([0.0, 0.5, 1.0])
      >>> risk = theory.mixed_label_risk(lam, beta, 0.9 * beta, xi, n=200, noise_var=0.1)
      >>> print([f"{r:.3f}" for r in risk])
      ['0.278', '0.162', '0.138']

    Reference:
      Our derivation, in the setting of Ildiz et al., "High-dimensional Analysis of Knowledge
      Distillation", ICLR 2025; the labels are those of Hinton, Vinyals, Dean, "Distilling the
      Knowledge in a Neural Network", 2015.
    """
    vectors, (n, noise_var, ridge, xi) = _aligned(
        lam, lam_test, beta_star, beta_s, {**sizes(n, noise_var, ridge), "xi": (xi, _inputs.ANY)}
    )
    return _risk(*vectors, xi, n, noise_var, ridge)[..., 0]


def optimal_mix(
    lam: Any,
    beta_star: Any,
    beta_s: Any,
    *,
    n: Any,
    noise_var: Any = 0.0,
    ridge: Any = 0.0,
    lam_test: Any = None,
    clip: bool = False,
) -> jax.Array:
    """The weight xi of the surrogate's labels at which `mixed_label_risk` is smallest.

    Args:
      lam: eigenvalues of the training covariance, [..., p].
      beta_star: the truth in the eigenbasis, [..., p].
      beta_s: the surrogate, [..., p], or the `Moments` of one that was trained on other samples.
      n: number of samples of the student, above 0, [...].
      noise_var: variance of the noise on the true labels, at least 0, [...].
      ridge: delta of the student, at least 0, [...].
      lam_test: eigenvalues of the test covariance, [..., p]; by default ``lam``.
      clip: keep the weight within 0 and 1, for the best convex mix. By default it may lie outside:
        a good surrogate direction can be worth extrapolating.

    Returns:
      xi, [...]; 0 where every weight has the same risk.

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.
      TypeError: if an argument is not real.

    Example:
      >>> from kdjax import theory
      >>> lam, beta = theory.power_law(500, 2.0, 1.5)
      >>> xi = theory.optimal_mix(lam, beta, 0.7 * beta, n=200, noise_var=0.1)
      >>> print(f"{xi:.3f}")
      0.441

    Reference:
      Our derivation, in the setting of Ildiz et al., "High-dimensional Analysis of Knowledge
      Distillation", ICLR 2025.
    """
    vectors, numbers = _aligned(lam, lam_test, beta_star, beta_s, sizes(n, noise_var, ridge))
    xi = _best(*vectors, *numbers)[..., 0]
    return jnp.clip(xi, 0.0, 1.0) if clip else xi


def _aligned(
    lam: Any,
    lam_test: Any,
    beta_star: Any,
    beta_s: Any,
    scalars: dict[str, tuple[Any, _inputs.Bounds]],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The vectors lam, lam_test, beta_star, mean and variance of the surrogate; the scalars."""
    labels = {"beta_s": beta_s}
    if isinstance(beta_s, Moments):
        labels = {"beta_s.mean": beta_s.mean, "beta_s.second": beta_s.second}
    (lam, test, star, mean, *second), numbers = _inputs.align(
        {
            "lam": lam,
            "lam_test": lam if lam_test is None else lam_test,
            "beta_star": beta_star,
            **labels,
        },
        scalars,
    )
    variance = spread(mean, second[0]) if second else jnp.zeros_like(mean)
    return [lam, test, star, mean, variance], numbers


@jax.jit
def _risk(
    lam: jax.Array,
    lam_test: jax.Array,
    beta_star: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    xi: jax.Array,
    n: jax.Array,
    noise_var: jax.Array,
    ridge: jax.Array,
) -> jax.Array:
    s = resolve(lam, n, ridge)
    mixed = (1 - xi) * beta_star + xi * mean
    # Labels of infinite variance teach nothing, unless their weight is 0.
    hopeless = jnp.any(jnp.isinf(variance), axis=-1, keepdims=True) & (xi != 0)
    variance = xi**2 * jnp.where(jnp.isinf(variance), 0.0, variance)
    error = s.zeta * beta_star + s.learned * xi * (beta_star - mean)  # of the mean estimator
    fitted = lam_test * (error**2 + s.learned**2 * variance)
    unlearned = total(lam * s.zeta**2 * (mixed**2 + variance)) + (1 - xi) ** 2 * noise_var
    risk = total(fitted) + amplified(variance_factor(s, lam_test, n) * unlearned, s.inverse_gap)
    return jnp.where(hopeless, jnp.inf, risk)


@jax.jit
def _best(
    lam: jax.Array,
    lam_test: jax.Array,
    beta_star: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    n: jax.Array,
    noise_var: jax.Array,
    ridge: jax.Array,
) -> jax.Array:
    s = resolve(lam, n, ridge)
    hopeless = jnp.any(jnp.isinf(variance), axis=-1, keepdims=True)
    variance = jnp.where(jnp.isinf(variance), 0.0, variance)
    shift = mean - beta_star
    square = shift**2 + variance
    # Both sides of "curvature times xi = pull", times 1 - omega, which may be 0.
    factor = variance_factor(s, lam_test, n)
    unlearned = lam * s.zeta**2
    curvature = s.gap * total(lam_test * s.learned**2 * square)
    curvature += factor * (noise_var + total(unlearned * square))
    pull = s.gap * total(lam_test * s.learned * s.zeta * shift * beta_star)
    pull += factor * (noise_var - total(unlearned * beta_star * shift))
    flat = (curvature == 0) | hopeless
    return jnp.where(flat, 0.0, pull / jnp.where(flat, 1.0, curvature))
