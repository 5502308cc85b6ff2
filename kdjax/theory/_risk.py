"""The risk of a student that was trained on the labels of a given surrogate."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax.theory import _inputs
from kdjax.theory._spectrum import Resolved, amplified, resolve, total


class RiskTerms(NamedTuple):
    """Excess risk and its parts, each [...].

    Attributes:
      total: ``bias + var_signal + var_noise``. Add the noise variance of the truth for the test
        error on noisy labels.
      bias: of the mean estimator against the truth.
      var_signal: variance caused by the part of the surrogate that isn't learned.
      var_noise: variance caused by the noise of the training labels.
      gamma2: test error of the student against its own labels, noise included.
    """

    total: jax.Array
    bias: jax.Array
    var_signal: jax.Array
    var_noise: jax.Array
    gamma2: jax.Array


def excess_risk(
    lam: Any,
    beta_star: Any,
    beta_s: Any = None,
    *,
    n: Any,
    noise_var: Any = 0.0,
    ridge: Any = 0.0,
    lam_test: Any = None,
    exact_ols: bool = False,
) -> RiskTerms:
    """Excess risk of linear regression on n samples labelled by a surrogate.

    Features are Gaussian with covariance diag(lam); the truth is ``x . beta_star``, the student's
    labels are ``x . beta_s`` plus noise. With L = lam / (lam + tau), zeta = 1 - L,
    V = sum(lam_test lam / (lam + tau)^2) / n::

        total = sum(lam_test (beta_star - L beta_s)^2)
                + V / (1 - omega) (sum(lam zeta^2 beta_s^2) + noise_var)

    a deterministic equivalent: exact as n and p grow together, with relative deviations of order
    1 / (n (1 - omega)) below.

    Args:
      lam: eigenvalues of the training covariance, [..., p].
      beta_star: the truth in the eigenbasis, [..., p].
      beta_s: the surrogate in the eigenbasis, [..., p]; by default the truth (strong labels).
      n: number of training samples, above 0, [...].
      noise_var: variance of the noise on the training labels, at least 0, [...].
      ridge: delta of ``||y - X b||^2 + delta ||b||^2``, at least 0, [...]; 0 is the minimum-norm
        interpolator, or least squares when n is at least the rank.
      lam_test: eigenvalues of the test covariance (covariate shift), [..., p]; by default ``lam``.
      exact_ols: use the exact finite-sample variance ``r / (n - r - 1)`` of Gaussian least squares
        where it applies (n above the rank r, no ridge).

    Returns:
      RiskTerms, each [...]. Infinite at n = rank with noise (with ``exact_ols``, up to rank + 1).

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.
      TypeError: if an argument is not real.

    Example:
      >>> from kdjax import theory
      >>> lam, beta = theory.power_law(500, 2.0, 1.5)
      >>> print(f"{theory.excess_risk(lam, beta, n=200).total:.4f}")
      0.1194

    Reference:
      Ildiz, Gozeten, Taga, Mondelli, Oymak, "High-dimensional Analysis of Knowledge Distillation:
      Weak-to-Strong Generalization and Scaling Laws", ICLR 2025.
    """
    (lam, lam_test, beta_star, beta_s), (n, noise_var, ridge) = _inputs.align(
        {
            "lam": lam,
            "lam_test": lam if lam_test is None else lam_test,
            "beta_star": beta_star,
            "beta_s": beta_star if beta_s is None else beta_s,
        },
        sizes(n, noise_var, ridge),
    )
    terms = _excess_risk(lam, lam_test, beta_star, beta_s, n, noise_var, ridge, exact_ols)
    return RiskTerms(*jnp.broadcast_arrays(*(x[..., 0] for x in terms)))


def train_mse(
    lam: Any, beta_s: Any, *, n: Any, noise_var: Any = 0.0, ridge: Any = 0.0
) -> jax.Array:
    """Mean squared error on the student's own n training labels.

    ``(1 - df1 / n)^2 gamma2``; without a ridge 0 below the rank, and ``noise_var (1 - r / n)``
    above it.

    Args:
      lam: eigenvalues of the training covariance, [..., p].
      beta_s: what labels the samples, in the eigenbasis, [..., p].
      n: number of samples, above 0, [...].
      noise_var: variance of the noise on the labels, at least 0, [...].
      ridge: delta of ``||y - X b||^2 + delta ||b||^2``, at least 0, [...].

    Returns:
      The expected training error, [...].

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> from kdjax import theory
      >>> print(theory.train_mse(jnp.ones(50), jnp.ones(50), n=100, noise_var=1.0))
      0.5
    """
    (lam, beta_s), (n, noise_var, ridge) = _inputs.align(
        {"lam": lam, "beta_s": beta_s}, sizes(n, noise_var, ridge)
    )
    return _train_mse(lam, beta_s, n, noise_var, ridge)[..., 0]


def gcv(train_mse: Any, *, n: Any, df1: Any) -> jax.Array:
    """Generalised cross-validation: the test error that a training error stands for.

    ``train_mse / (1 - df1 / n)^2``, which equals ``gamma2`` of `excess_risk` in the limit.

    Args:
      train_mse: mean squared error on the training labels, at least 0, [...].
      n: number of training samples, above 0, [...].
      df1: degrees of freedom of the fit, trace of the hat matrix, below n, [...].

    Returns:
      The estimated test error on labels of the same kind, [...]. NaN where ``df1`` reaches n:
      an interpolator's training error says nothing.

    Raises:
      ValueError: if a known value is out of its range.

    Example:
      >>> from kdjax import theory
      >>> print(theory.gcv(0.25, n=100, df1=50.0))
      1.0
    """
    error, n, df1 = _inputs.numbers(
        {
            "train_mse": (train_mse, _inputs.NONNEGATIVE),
            "n": (n, _inputs.COUNT),
            "df1": (df1, _inputs.NONNEGATIVE),
        }
    )
    left = 1 - df1 / n
    return jnp.where(left > 0, error / jnp.where(left > 0, left, 1.0) ** 2, jnp.nan)


def sizes(n: Any, noise_var: Any, ridge: Any) -> dict[str, tuple[Any, _inputs.Bounds]]:
    """The scalars that nearly every function takes, with their bounds."""
    return {
        "n": (n, _inputs.COUNT),
        "noise_var": (noise_var, _inputs.NONNEGATIVE),
        "ridge": (ridge, _inputs.NONNEGATIVE),
    }


def variance_factor(s: Resolved, lam_test: jax.Array, n: jax.Array) -> jax.Array:
    """V: how much of one unit of label error reaches the test law, before 1 / (1 - omega)."""
    return total(lam_test * s.density) / n


@functools.partial(jax.jit, static_argnums=7)
def _excess_risk(
    lam: jax.Array,
    lam_test: jax.Array,
    beta_star: jax.Array,
    beta_s: jax.Array,
    n: jax.Array,
    noise_var: jax.Array,
    ridge: jax.Array,
    exact_ols: bool,
) -> RiskTerms:
    s = resolve(lam, n, ridge, exact_ols=exact_ols)
    unlearned = total(lam * s.zeta**2 * beta_s**2)
    factor = variance_factor(s, lam_test, n)
    # beta_star - L beta_s, without its cancellation where nearly all is learned.
    error = s.zeta * beta_star + s.learned * (beta_star - beta_s)
    bias = total(lam_test * error**2)
    var_signal = amplified(factor * unlearned, s.inverse_gap)
    var_noise = amplified(factor * noise_var, s.inverse_gap)
    gamma2 = amplified(noise_var + unlearned, s.inverse_gap)
    return RiskTerms(bias + var_signal + var_noise, bias, var_signal, var_noise, gamma2)


@jax.jit
def _train_mse(
    lam: jax.Array, beta_s: jax.Array, n: jax.Array, noise_var: jax.Array, ridge: jax.Array
) -> jax.Array:
    s = resolve(lam, n, ridge)
    labels = noise_var + total(lam * s.zeta**2 * beta_s**2)
    return amplified(s.unfitted**2 * labels, s.inverse_gap)
