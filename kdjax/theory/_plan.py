"""What distillation can do for a given problem, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import _checks
from kdjax.theory import _inputs
from kdjax.theory._estimate import Estimate
from kdjax.theory._mixing import mixed_label_risk, optimal_mix
from kdjax.theory._risk import excess_risk
from kdjax.theory._stages import Moments, estimator_moments, moments_excess_risk
from kdjax.theory._surrogates import (
    optimal_gain,
    optimal_mask,
)


class Answer(NamedTuple):
    """One way to label the student's n samples, and what comes of it.

    Attributes:
      risk: excess risk of the student.
      gain: ``1 - risk / standard.risk`` of the same Answers; negative where it does harm, NaN
        where both are infinite.
      ridge: the student's ridge.
      surrogate_ridge: ridge of the surrogate that was trained; NaN where there is none.
      surrogate_risk: excess risk of what labels the samples, alone; NaN where there is none.
      size: number of features that the surrogate uses, by falling eigenvalue.
      weight: weight of the surrogate's labels, the rest being true labels.
    """

    risk: float
    gain: float
    ridge: float
    surrogate_ridge: float
    surrogate_risk: float
    size: int
    weight: float


class Answers(NamedTuple):
    """Every way to label the student's samples.

    Attributes:
      standard: n true labels (with their noise); what the others are compared with.
      direct: m true labels instead, what the surrogate needs, and no surrogate.
      together: n + m true labels, what mixing needs, all given to the student and no surrogate.
      optimal: the best surrogate there is. A bound: it takes the truth to build it.
      mask: the best 0-1 mask of the truth. Also a bound: a surrogate with unlimited data.
      two_stage: a surrogate trained on m true labels of its top ``size`` features.
      mixed: that surrogate's labels mixed with the n true labels, at the best ``weight``.
    """

    standard: Answer
    direct: Answer
    together: Answer
    optimal: Answer
    mask: Answer
    two_stage: Answer
    mixed: Answer


class Plan(NamedTuple):
    """The answers for one problem size.

    Attributes:
      n: samples of the student.
      m: samples of the surrogate.
      noise_var: noise of the true labels; add it to a risk for the test error on such labels.
      null_risk: excess risk of predicting nothing, ``sum(lam beta^2)``.
      given: with the given ridge.
      tuned: every way with its own best ridge (student and surrogate).
    """

    n: int
    m: int
    noise_var: float
    null_risk: float
    given: Answers
    tuned: Answers


def plan(
    problem: Estimate | tuple[Any, Any, Any],
    *,
    n: int,
    m: int | None = None,
    ridge: float = 0.0,
) -> Plan:
    """Predicts, for n samples, whether a surrogate, a mask or mixed labels would help.

    Bounds (``optimal``, ``mask``) say what there is to be gained at most; ``two_stage`` and
    ``mixed`` are surrogates that can be trained. Their gains are over n true labels, but they cost
    more: compare ``two_stage`` with ``direct``, which spends the surrogate's m true labels on the
    student itself, and ``mixed`` with ``together``, which spends all n + m. And ``tuned`` gives
    every way its best ridge: part of a gain without a ridge is what a ridge would have given, and
    ``tuned`` says what remains. Without noise on a power law nearly all of it does, with noise
    much less.

    The student sees the surrogate's outputs as they are, without noise: part of the gain of the
    bounds is that of clean labels. `optimal_surrogate_risk` and `masked_risk` with a ``noise_var``
    put the noise on the surrogate's labels too, and find less to be gained.

    Args:
      problem: an Estimate, or ``(lam, beta, noise_var)``: eigenvalues [p], truth [p], noise of
        the true labels.
      n: samples that the student trains on, at least 1.
      m: true labels that the surrogate trains on (other samples), at least 1; n by default.
      ridge: delta of student and surrogate in ``given``, at least 0.

    Returns:
      A Plan of plain numbers. Surrogates within one feature of interpolating m labels, where the
      risk diverges, aren't considered unless they have a ridge.

    Raises:
      ValueError: if a value is out of its range, or lengths disagree.
      TypeError: if ``problem`` is something else, or a size isn't an int.

    Example:
      >>> from kdjax import theory
      >>> lam, beta = theory.power_law(500, 2.0, 1.5)
      >>> found = theory.plan((lam, beta, 0.05), n=200)
      >>> print(f"{found.given.optimal.gain:.2f} {found.tuned.optimal.gain:.2f}")
      0.58 0.48
    """
    lam, beta, noise = _problem(problem)
    n = _checks.count("n", n)
    m = n if m is None else _checks.count("m", m)
    ridge = float(_checks.number("ridge", ridge, low=0.0))
    unit = float(jnp.max(lam))
    # The given ridge comes first, so that one search answers for it and for the best.
    grid, few = np.r_[0.0, np.geomspace(1e-8, 1e2, 50)], np.r_[0.0, np.geomspace(1e-7, 1e1, 9)]
    for_n, for_m, for_both, for_s = (
        np.r_[ridge, unit * count * x]
        for count, x in ((n, grid), (m, grid), (n + m, grid), (m, few))
    )
    sizes = _sizes(lam.shape[0])
    found = _search(
        lam, beta, noise,
        *(jnp.asarray(x, lam.dtype) for x in (n, m, for_n, for_m, for_both, for_s)),
        jnp.asarray(sizes),
    )  # fmt: skip
    found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
    only = _Found(
        {name: x[(slice(1),) * min(x.ndim, 2)] for name, x in found.risks.items()},
        found.bounds,
        found.weight[:1, :1],
        found.surrogate[:1],
    )
    students = {"direct": for_m, "together": for_both}
    given, tuned = (_answers(for_n, students, for_s, sizes, x) for x in (only, found))
    return Plan(n, m, float(noise), float(jnp.sum(lam * beta**2)), given, tuned)


def _problem(problem: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    if isinstance(problem, Estimate):
        problem = (problem.lam, problem.beta, problem.noise_var)
    if not isinstance(problem, tuple) or len(problem) != 3:
        raise TypeError(
            "problem must be an Estimate or a tuple (lam, beta, noise_var), got "
            f"{_checks.describe(problem)}."
        )
    lam, beta, noise = problem
    for name, x, ndim in (("lam", lam, 1), ("beta", beta, 1), ("noise_var", noise, 0)):
        if _checks.is_traced(x):
            raise TypeError(f"{name} must be known, not traced.")
        if jnp.ndim(x) != ndim:
            raise ValueError(f"{name} must have {ndim} dimensions, got {_checks.describe(x)}.")
    (lam, beta), (noise,) = _inputs.align(
        {"lam": lam, "beta": beta}, {"noise_var": (noise, _inputs.NONNEGATIVE)}
    )
    return lam, beta, noise[0]


def _sizes(p: int) -> np.ndarray:
    """Mask sizes to try: all, or a geometric choice; fewer where p is large."""
    most = int(np.clip(2**22 // p, 16, 96))
    return (
        np.unique(np.rint(np.geomspace(1, p, most)).astype(int)) if p > most else 1 + np.arange(p)
    )


def _answers(
    for_n: np.ndarray,
    others: Mapping[str, np.ndarray],
    for_s: np.ndarray,
    sizes: np.ndarray,
    found: _Found,
) -> Answers:
    """The best of all ridges and mask sizes in ``found``, for each way.

    ``for_n`` are the ridges of n samples, ``others`` those of the ways with another number.
    """
    best = {name: np.unravel_index(np.argmin(x), x.shape) for name, x in found.risks.items()}
    least = {name: float(x[best[name]]) for name, x in found.risks.items()}

    def answer(name: str, own_ridge: float, own: float, size: int, weight: float) -> Answer:
        ridge = float(others.get(name, for_n)[best[name][0]])
        gain = _gain(least[name], least["standard"])
        return Answer(least[name], gain, ridge, own_ridge, own, size, weight)

    def truth(name: str) -> Answer:
        return answer(name, np.nan, np.nan, 0, 0.0)

    def trained(name: str, weight: float) -> Answer:
        _, of_surrogate, size = best[name]
        risk = float(found.surrogate[of_surrogate, size])
        return answer(name, float(for_s[of_surrogate]), risk, int(sizes[size]), weight)

    def bound(name: str) -> Answer:
        own, size = (float(x[best[name][0]]) for x in found.bounds[name])
        return answer(name, np.nan, own, int(size), 1.0)

    return Answers(
        standard=truth("standard"),
        direct=truth("direct"),
        together=truth("together"),
        optimal=bound("optimal"),
        mask=bound("mask"),
        two_stage=trained("two_stage", 1.0),
        mixed=trained("mixed", float(found.weight[best["mixed"]])),
    )


def _gain(risk: float, standard: float) -> float:
    if risk == standard:
        return 0.0 if np.isfinite(risk) else np.nan
    return 1.0 - risk / standard if np.isfinite(standard) else 1.0


class _Found(NamedTuple):
    """Risks for every ridge [R] or, with a trained surrogate, [R, ridge of the surrogate, size]."""

    risks: dict[str, jax.Array]
    bounds: dict[str, tuple[jax.Array, jax.Array]]  # own risk and number of features, each [R]
    weight: jax.Array  # of the surrogate's labels in the best mix, like risks["mixed"]
    surrogate: jax.Array  # its own risk, [ridge of the surrogate, size]


@jax.jit
def _search(
    lam: jax.Array,
    beta: jax.Array,
    noise: jax.Array,
    n: jax.Array,
    m: jax.Array,
    for_n: jax.Array,
    for_m: jax.Array,
    for_both: jax.Array,
    for_s: jax.Array,
    sizes: jax.Array,
) -> _Found:
    place = jnp.argsort(jnp.argsort(-lam))
    seen = place[None, None, :] < sizes[None, :, None]
    surrogates = estimator_moments(
        lam, Moments(beta, beta**2), n=m, noise_var=noise, ridge=for_s[:, None], mask=seen
    )
    # At its peak a surrogate isn't one; sums over infinite moments would be 0 * inf.
    used = jnp.minimum(sizes, jnp.sum(lam > 0))
    peak = (for_s[:, None] == 0) & (jnp.abs(used - m) <= 1)[None, :]
    surrogates = Moments(*(jnp.where(peak[..., None], 0.0, x) for x in surrogates))

    def student(ridge: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        common = {"n": n, "noise_var": noise, "ridge": ridge}
        weight = optimal_mix(lam, beta, surrogates, clip=True, **common)
        both = jnp.stack([jnp.ones_like(weight), weight])
        two_stage, mixed = mixed_label_risk(lam, beta, surrogates, both, **common)
        return two_stage, mixed, weight

    two_stage, mixed, weight = jax.lax.map(student, for_n)
    gain = optimal_gain(lam, n, for_n)
    kept = optimal_mask(lam, n, for_n)
    # standard, direct, together, optimal, mask: five rows of one call, [5, R].
    target = jnp.broadcast_to(beta, gain.shape)
    masked = jnp.where(kept, target, 0.0)
    rows = excess_risk(
        lam,
        beta,
        jnp.stack([target, target, target, gain * target, masked]),
        n=jnp.stack([n, m, n + m, n, n])[:, None],
        noise_var=noise * jnp.array([1, 1, 1, 0, 0], lam.dtype)[:, None],
        ridge=jnp.stack([for_n, for_m, for_both, for_n, for_n]),
    ).total
    names = ("standard", "direct", "together", "optimal", "mask")
    risks = dict(zip(names, rows, strict=True))
    risks["two_stage"], risks["mixed"] = (
        jnp.where(peak[None], jnp.inf, x) for x in (two_stage, mixed)
    )
    risks = {
        name: jnp.where(jnp.isnan(x), jnp.inf, jnp.maximum(x, 0.0)) for name, x in risks.items()
    }
    bounds = {
        "optimal": (jnp.sum(lam[None] * ((gain - 1) * target) ** 2, -1), jnp.sum(gain > 0, -1)),
        "mask": (jnp.sum(lam[None] * (target - masked) ** 2, -1), jnp.sum(kept, -1)),
    }
    return _Found(risks, bounds, weight, moments_excess_risk(lam, beta, surrogates))
