"""Weak-to-strong generalisation: what a student gains on its teacher and on strong labels."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import _checks
from kdjax.theory import _inputs
from kdjax.theory._risk import _excess_risk
from kdjax.theory._risk import sizes as _sizes
from kdjax.theory._stages import Estimator, Moments, risk_of, spread, train

ERROR = _inputs.Bounds(infinite=True)
# Array elements that one chunk of mask sizes may hold.
CHUNK = 2**20


class Gains(NamedTuple):
    """What a student gains, each [...]. The last three are different statements.

    Attributes:
      absolute: error with strong labels minus that of the student.
      relative: ``1 - student / standard``.
      beats_strong_labels: whether the student errs less than if trained on strong labels.
      beats_teacher: whether it errs less than its teacher.
      pgr: performance gap recovered, see `pgr`.
    """

    absolute: jax.Array
    relative: jax.Array
    beats_strong_labels: jax.Array
    beats_teacher: jax.Array
    pgr: jax.Array


class EqualBudget(NamedTuple):
    """Ways to spend m strong labels and n unlabelled samples; excess risks, [...].

    Attributes:
      standard_n: student trained on n strong labels, with the noise of strong labels.
      standard_m: the surrogate itself: trained on the m strong labels, unmasked.
      two_stage: student of that surrogate.
      best_size: number of top eigenvalues that the best masked surrogate sees.
      best: risk of the student of the best masked surrogate.
      best_surrogate: risk of that surrogate.
      sizes: mask sizes that were tried, [S].
      masked: risk of the student for each mask size, [..., S].
      masked_surrogate: risk of the surrogate for each mask size, [..., S].
    """

    standard_n: jax.Array
    standard_m: jax.Array
    two_stage: jax.Array
    best_size: jax.Array
    best: jax.Array
    best_surrogate: jax.Array
    sizes: jax.Array
    masked: jax.Array
    masked_surrogate: jax.Array


class TunedRidge(NamedTuple):
    """The best ridge and the excess risk with it, each [...]."""

    ridge: jax.Array
    total: jax.Array


def pgr(weak: Any, student: Any, ceiling: Any) -> jax.Array:
    """Performance gap recovered: the part of the way from the teacher to the ceiling.

    ``(weak - student) / (weak - ceiling)``; 0 is as good as the teacher, 1 as the ceiling.

    Args:
      weak: error of the weak teacher, [...].
      student: error of the strong student trained on its labels, [...].
      ceiling: error of the strong student trained on true labels, [...].

    Returns:
      The ratio, [...], negative where the student is worse than its teacher; NaN where the teacher
      is at least as good as the ceiling, and there is no gap to recover.

    Raises:
      ValueError: if a known value is NaN, or shapes disagree.
      TypeError: if an argument is not real.

    Example:
      >>> from kdjax import theory
      >>> print(theory.pgr(0.5, 0.25, 0.0))
      0.5

    Reference:
      Burns et al., "Weak-to-Strong Generalization: Eliciting Strong Capabilities With Weak
      Supervision", ICML 2024.
    """
    weak, student, ceiling = _inputs.numbers(
        {"weak": (weak, ERROR), "student": (student, ERROR), "ceiling": (ceiling, ERROR)}
    )
    return _part(weak - student, weak - ceiling)


def gains(standard: Any, student: Any, teacher: Any, ceiling: Any = None) -> Gains:
    """What a student of a teacher gains on strong labels, on its teacher, and towards a ceiling.

    Args:
      standard: error of the student's model trained on strong labels, [...].
      student: error of the student, [...].
      teacher: error of its teacher, [...].
      ceiling: error that `pgr` counts as everything, [...]; by default ``standard``.

    Returns:
      Gains, each [...]. ``relative`` is NaN where ``standard`` is 0, ``pgr`` where there is no
      gap; comparisons with a NaN are False.

    Raises:
      ValueError: if a known value is NaN, or shapes disagree.
      TypeError: if an argument is not real.

    Example:
      >>> from kdjax import theory
      >>> lam, beta = theory.power_law(500, 2.0, 1.5)
      >>> surrogate = theory.optimal_surrogate(lam, beta, 200)
      >>> gain = theory.gains(
      ...     theory.excess_risk(lam, beta, n=200).total,
      ...     theory.excess_risk(lam, beta, surrogate, n=200).total,
      ...     (lam * (surrogate - beta) ** 2).sum(),
      ... )
      >>> print(f"{gain.absolute:.4f}", gain.beats_strong_labels, gain.beats_teacher)
      0.0361 True False

    Reference:
      Burns et al., "Weak-to-Strong Generalization", ICML 2024 (pgr); Ildiz et al.,
      "High-dimensional Analysis of Knowledge Distillation", ICLR 2025 (beating strong labels).
    """
    ceiling = standard if ceiling is None else ceiling
    standard, student, teacher, ceiling = _inputs.numbers(
        {
            "standard": (standard, ERROR),
            "student": (student, ERROR),
            "teacher": (teacher, ERROR),
            "ceiling": (ceiling, ERROR),
        }
    )
    nothing = standard == 0
    ratio = jnp.where(nothing, jnp.nan, student / jnp.where(nothing, 1.0, standard))
    return Gains(
        absolute=standard - student,
        relative=1 - ratio,
        beats_strong_labels=student < standard,
        beats_teacher=student < teacher,
        pgr=_part(teacher - student, teacher - ceiling),
    )


def misfit_gain(weak_outputs: Any, student_outputs: Any, *, where: Any = None) -> jax.Array:
    """How far a student ended up from its teacher: the gain that its misfit guarantees.

    The mean of ``(student - weak)^2``. For a student that is the projection of its teacher onto a
    convex class that holds the truth (squared error, the same law of inputs),
    ``err(weak) - err(student)`` is at least this, and equal to it for a linear class.

    Args:
      weak_outputs: outputs of the weak teacher on N examples, [N, ...].
      student_outputs: outputs of the student on the same examples, [N, ...].
      where: bool [N], the examples to count; all by default.

    Returns:
      The mean over examples and outputs, a scalar (multiply by the number of outputs for errors
      that are summed over outputs); NaN if no example counts.

    Raises:
      ValueError: if shapes disagree.
      TypeError: if outputs are not floating-point, or ``where`` is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from kdjax import theory
      >>> print(theory.misfit_gain(jnp.zeros((4, 2)), jnp.full((4, 2), 0.5)))
      0.25

    Reference:
      Charikar, Pabbaraju, Shiragur, "Quantifying the Gain in Weak-to-Strong Generalization",
      NeurIPS 2024 (Theorem 1).
    """
    weak = _checks.floating("weak_outputs", weak_outputs, min_ndim=1)
    student = _checks.floating("student_outputs", student_outputs, min_ndim=1)
    _checks.same_shape("student_outputs", student, "weak_outputs", weak)
    counted = _checks.mask("where", where, weak.shape[:1])
    if counted is None:
        return jnp.mean((student - weak) ** 2)
    shaped = counted.reshape((-1,) + (1,) * (weak.ndim - 1))
    square = jnp.where(shaped, student - weak, 0.0) ** 2
    entries = counted.sum() * math.prod(weak.shape[1:])
    mean = square.sum() / jnp.where(entries == 0, 1, entries)
    return jnp.where(entries == 0, jnp.nan, mean)


def equal_budget(
    lam: Any,
    beta_star: Any,
    *,
    m: Any,
    n: Any,
    noise_s: Any = 0.0,
    noise_t: Any = 0.0,
    ridge_s: Any = 0.0,
    ridge_t: Any = 0.0,
    sizes: Any = None,
) -> EqualBudget:
    """Compares strong labels with surrogates that see the top eigenvalues only.

    A surrogate is trained on m strong labels (noise ``noise_s``) and labels n fresh samples for
    the student. Against it stand the same student on n strong labels (noise ``noise_s`` too), and
    the surrogate itself. All mask sizes run in one program, O(S p) in chunks of bounded memory.

    Args:
      lam: eigenvalues of the feature covariance, [..., p].
      beta_star: the truth in the eigenbasis, [..., p].
      m: number of strong labels of the surrogate, above 0, [...].
      n: number of samples of the student, above 0, [...].
      noise_s: variance of the noise on strong labels, at least 0, [...].
      noise_t: variance of noise added to the surrogate's labels, at least 0, [...]; 0 if the
        student sees the surrogate's outputs as they are.
      ridge_s: delta of what is trained on m samples, at least 0, [...].
      ridge_t: delta of what is trained on n samples, at least 0, [...].
      sizes: mask sizes to try, integers from 1 to p, [S]; by default all.

    Returns:
      An EqualBudget. A ridgeless surrogate on as many noisy labels as features has infinite risk;
      sizes within a few of m are only as good as the deterministic equivalent there.

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.
      TypeError: if ``sizes`` are not integers.

    Example:
      >>> from kdjax import theory
      >>> lam, beta = theory.power_law(500, 2.0, 1.5)
      >>> budget = theory.equal_budget(lam, beta, m=3200, n=200, noise_s=0.05)
      >>> print(f"{budget.standard_n:.4f} {budget.two_stage:.4f} {budget.best:.4f}")
      0.1986 0.1282 0.0947
    """
    nonnegative = _inputs.NONNEGATIVE
    (lam, beta_star), scalars = _inputs.align(
        {"lam": lam, "beta_star": beta_star},
        {
            "m": (m, _inputs.COUNT),
            "n": (n, _inputs.COUNT),
            "noise_s": (noise_s, nonnegative),
            "noise_t": (noise_t, nonnegative),
            "ridge_s": (ridge_s, nonnegative),
            "ridge_t": (ridge_t, nonnegative),
        },
    )
    p = lam.shape[-1]
    tried = _mask_sizes(jnp.arange(1, p + 1) if sizes is None else sizes, p)
    batch = jnp.broadcast_shapes(*(x.shape[:-1] for x in (lam, beta_star, *scalars)))
    chunk = max(1, CHUNK // (p * max(1, math.prod(batch))))
    return _equal_budget(lam, beta_star, *scalars, tried, min(chunk, tried.shape[0]))


def tuned_ridge(
    lam: Any,
    beta_star: Any,
    labels: Any = None,
    *,
    n: Any,
    noise_var: Any = 0.0,
    lam_test: Any = None,
) -> TunedRidge:
    """The ridge with the smallest excess risk for a student of given labels.

    Searched on a logarithmic grid of ``ridge / (n max(lam))`` from 1e-12 to 1e4, then by golden
    section; no ridge at all is tried too.

    Args:
      lam: eigenvalues of the training covariance, [..., p].
      beta_star: the truth in the eigenbasis, [..., p].
      labels: what labels the samples: a surrogate [..., p], or the `Moments` of one that was
        trained on other samples; by default the truth.
      n: number of samples of the student, above 0, [...].
      noise_var: variance of the noise on the labels, at least 0, [...].
      lam_test: eigenvalues of the test covariance, [..., p]; by default ``lam``.

    Returns:
      A TunedRidge. ``ridge`` is known to about 1e-6 relative in float64 (1e-3 in float32) and has
      no derivatives; those of ``total`` are right, for the ridge is at its optimum.

    Raises:
      ValueError: if a known value is out of its range, or shapes disagree.
      TypeError: if an argument is not real.

    Example:
      >>> import jax.numpy as jnp
      >>> from kdjax import theory
      >>> best = theory.tuned_ridge(jnp.ones(100), jnp.full(100, 0.1), n=50, noise_var=0.25)
      >>> print(f"{best.ridge:.0f}")  # isotropic: noise_var p / |beta|^2
      25
    """
    if not isinstance(labels, Moments):
        mean = beta_star if labels is None else labels
        named = {"labels": mean}
    else:
        named = {"labels.mean": labels.mean, "labels.second": labels.second}
    (lam, test, star, mean, *second), (n, noise_var, _) = _inputs.align(
        {
            "lam": lam,
            "lam_test": lam if lam_test is None else lam_test,
            "beta_star": beta_star,
            **named,
        },
        _sizes(n, noise_var, 0.0),
    )
    variance = spread(mean, second[0]) if second else jnp.zeros_like(mean)
    found = _tuned(lam, test, star, mean, variance, n, noise_var)
    return TunedRidge(*(x[..., 0] for x in found))


def _part(done: jax.Array, gap: jax.Array) -> jax.Array:
    nothing = gap <= 0
    return jnp.where(nothing, jnp.nan, done / jnp.where(nothing, 1.0, gap))


def _mask_sizes(tried: Any, p: int) -> jax.Array:
    tried = _checks.integer("sizes", tried, ndim=1)
    if tried.shape[0] < 1:
        raise ValueError("sizes must hold at least one mask size, got none.")
    if not _checks.is_traced(tried):
        known = np.asarray(tried)
        if np.any(bad := (known < 1) | (known > p)):
            raise ValueError(f"sizes must be from 1 to {p}, got {known[bad][0]}.")
    return tried


@functools.partial(jax.jit, static_argnums=9)
def _equal_budget(
    lam: jax.Array,
    beta_star: jax.Array,
    m: jax.Array,
    n: jax.Array,
    noise_s: jax.Array,
    noise_t: jax.Array,
    ridge_s: jax.Array,
    ridge_t: jax.Array,
    tried: jax.Array,
    chunk: int,
) -> EqualBudget:
    p = lam.shape[-1]
    place = jnp.argsort(jnp.argsort(-lam, axis=-1), axis=-1)  # 0 for the largest eigenvalue

    def masked(size: jax.Array) -> tuple[jax.Array, jax.Array]:
        known = Estimator(beta_star, jnp.zeros_like(beta_star), jnp.zeros_like(beta_star))
        surrogate = train(lam, known, m, noise_s, ridge_s, place < size, exact_ols=False)
        # The peak of the surrogate is the student's; slopes of infinity would be NaN.
        peak = jnp.any(jnp.isinf(surrogate.variance), axis=-1, keepdims=True)
        surrogate = surrogate._replace(variance=jnp.where(peak, 0.0, surrogate.variance))
        student = train(lam, surrogate, n, noise_t, ridge_t, exact_ols=False)
        invalid = jnp.where((size >= 1) & (size <= p), 0.0, jnp.nan).astype(lam.dtype)
        both = (risk_of(lam, one) for one in (student, surrogate))
        risks = (jnp.where(peak, jnp.inf, risk)[..., 0] for risk in both)
        student_risk, surrogate_risk = jnp.broadcast_arrays(*risks)
        return student_risk + invalid, surrogate_risk + invalid

    risks, surrogates = (
        jnp.moveaxis(x, 0, -1) for x in jax.lax.map(masked, tried, batch_size=chunk)
    )
    two_stage, standard_m = masked(jnp.asarray(p))
    strong = _excess_risk(lam, lam, beta_star, beta_star, n, noise_s, ridge_t, False)
    best = jnp.argmin(risks, axis=-1, keepdims=True)
    return EqualBudget(
        standard_n=strong.total[..., 0],
        standard_m=standard_m,
        two_stage=two_stage,
        best_size=tried[best[..., 0]],
        best=jnp.take_along_axis(risks, best, axis=-1)[..., 0],
        best_surrogate=jnp.take_along_axis(surrogates, best, axis=-1)[..., 0],
        sizes=tried,
        masked=risks,
        masked_surrogate=surrogates,
    )


@jax.jit
def _tuned(*problem: jax.Array) -> tuple[jax.Array, jax.Array]:
    # At the optimum the risk doesn't depend on the ridge to first order.
    ridge = _search(*jax.lax.stop_gradient(problem))
    best = _ridge_risk(ridge, *problem)
    return jnp.where(jnp.isnan(best), jnp.nan, ridge), best


def _ridge_risk(
    ridge: jax.Array,
    lam: jax.Array,
    lam_test: jax.Array,
    beta_star: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    n: jax.Array,
    noise_var: jax.Array,
) -> jax.Array:
    labels = Estimator(mean, variance, beta_star - mean)
    return risk_of(lam_test, train(lam, labels, n, noise_var, ridge, exact_ols=False))


def _search(lam: jax.Array, *rest: jax.Array) -> jax.Array:
    unit = rest[4] * jnp.max(lam, axis=-1, keepdims=True)

    def at(log: jax.Array) -> jax.Array:
        return _ridge_risk(unit * jnp.exp(log), lam, *rest)

    grid = jnp.linspace(math.log(1e-12), math.log(1e4), 65, dtype=lam.dtype)
    step = grid[1] - grid[0]
    center = grid[jnp.argmin(jax.lax.map(at, grid), axis=0)]
    golden = (math.sqrt(5) - 1) / 2

    def shrink(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        inner, outer = high - golden * (high - low), low + golden * (high - low)
        left = at(inner) < at(outer)
        return jnp.where(left, low, inner), jnp.where(left, outer, high)

    low, high = jax.lax.fori_loop(0, 30, shrink, (center - step, center + step))
    ridge = unit * jnp.exp((low + high) / 2)
    ridgeless = _ridge_risk(0 * ridge, lam, *rest) <= _ridge_risk(ridge, lam, *rest)
    return jnp.where(ridgeless, 0.0, ridge)
