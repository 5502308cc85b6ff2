"""Chains of estimators: each is trained on labels of the one before.

A trained estimator enters what comes later only through the mean and the second moment of each of
its coordinates, and one stage of training is a map between those.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax.theory import _inputs
from kdjax.theory._risk import sizes
from kdjax.theory._spectrum import amplified, resolve, total


class Moments(NamedTuple):
    """Coordinates of a random estimator: mean and second moment, each [..., p].

    A fixed vector b is ``Moments(b, b**2)``. The expected squared norm of the estimator is
    ``second.sum(-1)``.
    """

    mean: jax.Array
    second: jax.Array


class Stage(NamedTuple):
    """One training in a chain.

    Attributes:
      lam: eigenvalues of the covariance of its samples, [..., p].
      n: number of samples, above 0, [...].
      noise_var: variance of the noise on its labels, at least 0, [...].
      ridge: delta of ``||y - X b||^2 + delta ||b||^2``, at least 0, [...].
      mask: bool [..., p], the features that it sees; all by default.
      exact_ols: finite-sample variance of Gaussian least squares, where it applies.
    """

    lam: Any
    n: Any
    noise_var: Any = 0.0
    ridge: Any = 0.0
    mask: Any = None
    exact_ols: bool = False


class TwoStage(NamedTuple):
    """A surrogate trained on m samples and the student trained on its labels.

    Attributes:
      total: excess risk of the student, [...].
      surrogate: excess risk of the surrogate on the student's test law, [...].
      moments: of the surrogate.
      student: moments of the student.
    """

    total: jax.Array
    surrogate: jax.Array
    moments: Moments
    student: Moments


class MultiStage(NamedTuple):
    """A chain of trainings.

    Attributes:
      total: excess risk of the last one, [...].
      risks: excess risk after each, one [...] array per stage.
      moments: of each, in order.
    """

    total: jax.Array
    risks: tuple[jax.Array, ...]
    moments: tuple[Moments, ...]


def estimator_moments(
    lam: Any,
    moments: Moments,
    *,
    n: Any,
    noise_var: Any = 0.0,
    ridge: Any = 0.0,
    mask: Any = None,
    exact_ols: bool = False,
) -> Moments:
    """Moments of the estimator that is trained on n samples labelled by another one.

    ``mean' = L mean`` and ``second' = L^2 second + gamma2 / n lam / (lam + tau)^2`` with
    ``gamma2 = (noise_var + sum(lam zeta^2 second)) / (1 - omega)``. Features outside the mask
    aren't seen: they drop out of tau, and what they carry of the labels acts as noise.

    Args:
      lam: eigenvalues of the covariance of the samples, [..., p].
      moments: of what labels them, each [..., p].
      n: number of samples, above 0, [...].
      noise_var: variance of the noise added to the labels, at least 0, [...].
      ridge: delta of ``||y - X b||^2 + delta ||b||^2``, at least 0, [...].
      mask: bool [..., p], the features that the estimator sees; all by default.
      exact_ols: use the exact variance ``1 / (n - r - 1)`` of Gaussian least squares where it
        applies (n above the rank r, no ridge).

    Returns:
      Moments of the trained estimator, each [..., p]; 0 off the mask.

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.
      TypeError: if ``mask`` is not boolean.

    Example:
      >>> from kdjax import theory
      >>> lam, beta = theory.power_law(500, 2.0, 1.5)
      >>> trained = theory.estimator_moments(lam, theory.Moments(beta, beta**2), n=200)
      >>> print(f"{theory.moments_excess_risk(lam, beta, trained):.4f}")
      0.1194
    """
    mean, second = _both(moments)
    masked = {} if mask is None else {"mask": mask}
    (lam, mean, second, *seen), (n, noise_var, ridge) = _inputs.align(
        {"lam": lam, "mean": mean, "second": second, **masked}, sizes(n, noise_var, ridge)
    )
    given = Estimator(mean, spread(mean, second), jnp.zeros_like(mean))
    return train(lam, given, n, noise_var, ridge, *seen, exact_ols=exact_ols).moments()


def moments_excess_risk(lam_test: Any, beta_star: Any, moments: Moments) -> jax.Array:
    """Expected excess risk of a random estimator.

    ``sum(lam_test ((beta_star - mean)^2 + second - mean^2))``.

    Args:
      lam_test: eigenvalues of the test covariance, [..., p].
      beta_star: the truth, [..., p].
      moments: of the estimator, each [..., p].

    Returns:
      The excess risk, [...]. Relative to what the truth alone would cost, risks below the
      precision of the moments (1e-7 in float32) are rounding; `multi_stage_risk` keeps them.

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> from kdjax import theory
      >>> zero = theory.Moments(jnp.zeros(3), jnp.zeros(3))
      >>> print(theory.moments_excess_risk(jnp.ones(3), jnp.ones(3), zero))
      3.0
    """
    mean, second = _both(moments)
    (lam_test, beta_star, mean, second), _ = _inputs.align(
        {"lam_test": lam_test, "beta_star": beta_star, "mean": mean, "second": second}, {}
    )
    return risk_of(lam_test, Estimator(mean, spread(mean, second), beta_star - mean))[..., 0]


def two_stage_risk(
    lam_s: Any,
    lam_t: Any,
    beta_star: Any,
    *,
    m: Any,
    n: Any,
    noise_s: Any = 0.0,
    noise_t: Any = 0.0,
    ridge_s: Any = 0.0,
    ridge_t: Any = 0.0,
    mask: Any = None,
    exact_ols: bool = False,
) -> TwoStage:
    """Risk of a student of a surrogate that is itself trained on true labels.

    Args:
      lam_s: eigenvalues of the covariance of the surrogate's samples, [..., p].
      lam_t: eigenvalues of the covariance of the student's samples and of the test law, [..., p];
        both covariances have the same eigenvectors.
      beta_star: the truth in the eigenbasis, [..., p].
      m: number of samples of the surrogate, above 0, [...].
      n: number of (fresh) samples of the student, above 0, [...].
      noise_s: variance of the noise on the surrogate's labels, at least 0, [...].
      noise_t: variance of the noise on the student's labels, at least 0, [...]; 0 if it sees the
        surrogate's outputs as they are.
      ridge_s: delta of the surrogate, at least 0, [...].
      ridge_t: delta of the student, at least 0, [...].
      mask: bool [..., p], the features that the surrogate sees; all by default.
      exact_ols: finite-sample variance of Gaussian least squares, where it applies.

    Returns:
      A TwoStage.

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.
      TypeError: if ``mask`` is not boolean.

    Example:
      >>> from kdjax import theory
      >>> lam, beta = theory.power_law(500, 2.0, 1.5)
      >>> risk = theory.two_stage_risk(lam, lam, beta, m=300, n=200, noise_s=0.05)
      >>> print(f"{risk.surrogate:.4f} {risk.total:.4f}")
      0.1811 0.2237
    """
    # The names of this function, for messages.
    _inputs.align(
        {"lam_s": lam_s, "lam_t": lam_t, "beta_star": beta_star},
        {
            "m": (m, _inputs.COUNT),
            "noise_s": (noise_s, _inputs.NONNEGATIVE),
            "noise_t": (noise_t, _inputs.NONNEGATIVE),
            "ridge_s": (ridge_s, _inputs.NONNEGATIVE),
            "ridge_t": (ridge_t, _inputs.NONNEGATIVE),
        },
    )
    chain = multi_stage_risk(
        [
            Stage(lam_s, m, noise_s, ridge_s, mask, exact_ols),
            Stage(lam_t, n, noise_t, ridge_t, None, exact_ols),
        ],
        beta_star,
    )
    return TwoStage(chain.total, chain.risks[0], *chain.moments)


def multi_stage_risk(
    stages: Sequence[Stage], beta_star: Any, *, lam_test: Any = None
) -> MultiStage:
    """Risk along a chain of students, the first of which is trained on true labels.

    Args:
      stages: in order of training; all their covariances have the same eigenvectors.
      beta_star: the truth in the eigenbasis, [..., p].
      lam_test: eigenvalues of the test covariance, [..., p]; by default those of the last stage.

    Returns:
      A MultiStage.

    Raises:
      ValueError: if there is no stage, a known value is out of its range, or shapes disagree.
      TypeError: if a mask is not boolean.

    Example:
      >>> from kdjax import theory
      >>> lam, beta = theory.power_law(500, 2.0, 1.5)
      >>> chain = theory.multi_stage_risk([theory.Stage(lam, n) for n in (400, 300, 200)], beta)
      >>> print([f"{risk:.3f}" for risk in chain.risks])
      ['0.026', '0.070', '0.124']
    """
    if not isinstance(stages, Sequence) or isinstance(stages, Stage):
        raise TypeError(f"stages must be a list of Stage tuples, got {_checks.describe(stages)}.")
    if not stages:
        raise ValueError("stages must hold at least one Stage, got none.")
    for stage in stages:
        if not isinstance(stage, Stage):
            raise TypeError(f"stages must hold Stage tuples, got {_checks.describe(stage)}.")
    lam_test = stages[-1].lam if lam_test is None else lam_test
    (_, truth), _ = _inputs.align({"lam_test": lam_test, "beta_star": beta_star}, {})
    current = Estimator(truth, jnp.zeros_like(truth), jnp.zeros_like(truth))
    trained, risks = [], []
    for stage in stages:
        masked = {} if stage.mask is None else {"mask": stage.mask}
        (lam, *rest), numbers = _inputs.align(
            {"lam": stage.lam, "beta_star": beta_star, **current._asdict(), **masked},
            sizes(stage.n, stage.noise_var, stage.ridge),
        )
        _, mean, variance, error, *seen = rest
        given = Estimator(mean, variance, error)
        current = train(lam, given, *numbers, *seen, exact_ols=stage.exact_ols)
        (test, *aligned), _ = _inputs.align({"lam_test": lam_test, **current._asdict()}, {})
        risks.append(risk_of(test, Estimator(*aligned))[..., 0])
        trained.append(current.moments())
    return MultiStage(risks[-1], tuple(risks), tuple(trained))


class Estimator(NamedTuple):
    """A random estimator, in the form that keeps the digits of a small risk."""

    mean: jax.Array
    variance: jax.Array
    error: jax.Array  # the truth less the mean

    def moments(self) -> Moments:
        """What is told of it."""
        return Moments(*jnp.broadcast_arrays(self.mean, self.mean**2 + self.variance))


def _both(moments: Any) -> tuple[Any, Any]:
    if not isinstance(moments, Moments):
        raise TypeError(f"moments must be a Moments, got {_checks.describe(moments)}.")
    return moments.mean, moments.second


def spread(mean: jax.Array, second: jax.Array) -> jax.Array:
    """The variance; 0 where rounding made it negative, NaN where it is no rounding.

    Raises:
      ValueError: a known second moment is below the square of the mean.
    """
    variance = second - mean**2
    impossible = variance < -1e-4 * mean**2
    if not _checks.is_traced(impossible) and bool(jnp.any(impossible)):
        raise ValueError("second must be at least mean**2 in every coordinate, got less.")
    return jnp.where(impossible, jnp.nan, jnp.where(variance < 0, 0.0, variance))


@functools.partial(jax.jit, static_argnames="exact_ols")
def train(
    lam: jax.Array,
    given: Estimator,
    n: jax.Array,
    noise_var: jax.Array,
    ridge: jax.Array,
    mask: jax.Array | None = None,
    *,
    exact_ols: bool,
) -> Estimator:
    """What is trained on the labels of ``given``, for aligned arguments."""
    mean, variance, error = given
    # Labels of infinite variance (a surrogate trained at n = rank with noise) teach nothing.
    infinite = jnp.isinf(variance)
    variance = jnp.where(infinite, 0.0, variance)
    hopeless = jnp.any(infinite, axis=-1, keepdims=True)
    second = mean**2 + variance
    if mask is not None:
        noise_var = noise_var + total(jnp.where(mask, 0.0, lam * second))
        lam = jnp.where(mask, lam, 0.0)
    s = resolve(lam, n, ridge, exact_ols=exact_ols)
    gamma2 = noise_var + total(lam * s.zeta**2 * second)  # before 1 / (1 - omega)
    added = amplified(gamma2 * s.density / n, s.inverse_gap)
    variance = jnp.where(hopeless & (lam > 0), jnp.inf, s.learned**2 * variance + added)
    # zeta truth + L error: the truth less L mean, without its cancellation.
    return Estimator(s.learned * mean, variance, s.zeta * (mean + error) + s.learned * error)


@jax.jit
def risk_of(lam_test: jax.Array, estimator: Estimator) -> jax.Array:
    """Its expected excess risk, for aligned arguments."""
    square = estimator.error**2 + estimator.variance
    unseen = jnp.isinf(square) & (lam_test == 0)
    return total(lam_test * jnp.where(unseen, 0.0, square))
