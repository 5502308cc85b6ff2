"""Plans against the functions that they are made of, and against the orders that must hold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import theory as T

WAYS = ("standard", "direct", "together", "optimal", "mask", "two_stage", "mixed")
LAM, BETA = T.power_law(120, 2.0, 1.5)


@pytest.fixture(scope="module")
def noisy():
    return T.plan((LAM, BETA, 0.05), n=50, m=80)


@pytest.fixture(scope="module")
def clean():
    return T.plan((LAM, BETA, 0.0), n=50, m=800)


def test_given_answers_are_those_of_the_closed_forms(noisy):
    given = noisy.given
    assert (noisy.n, noisy.m) == (50, 80)
    np.testing.assert_allclose(noisy.noise_var, 0.05, rtol=1e-6)
    np.testing.assert_allclose(noisy.null_risk, jnp.sum(LAM * BETA**2), rtol=1e-6)
    wanted = {
        "standard": T.excess_risk(LAM, BETA, n=50, noise_var=0.05).total,
        "direct": T.excess_risk(LAM, BETA, n=80, noise_var=0.05).total,
        "together": T.excess_risk(LAM, BETA, n=130, noise_var=0.05).total,
        "optimal": T.optimal_surrogate_risk(LAM, BETA, 50),
        "mask": T.masked_risk(LAM, BETA, 50),
    }
    for name, risk in wanted.items():
        np.testing.assert_allclose(getattr(given, name).risk, risk, rtol=1e-4)
    assert given.mask.size == int(T.optimal_mask(LAM, 50).sum())
    surrogate = T.optimal_surrogate(LAM, BETA, 50)
    own = jnp.sum(LAM * (surrogate - BETA) ** 2)
    np.testing.assert_allclose(given.optimal.surrogate_risk, own, rtol=1e-4)


def test_the_trained_surrogate_is_the_best_of_equal_budget(noisy):
    sizes = np.arange(1, 121)
    sizes = sizes[np.abs(sizes - 80) > 1]
    budget = T.equal_budget(LAM, BETA, m=80, n=50, noise_s=0.05, sizes=sizes)
    found = noisy.given.two_stage
    np.testing.assert_allclose(found.risk, budget.best, rtol=1e-3)  # not every size is tried
    index = int(np.argmax(sizes == found.size))
    np.testing.assert_allclose(found.risk, budget.masked[index], rtol=1e-4)
    np.testing.assert_allclose(found.surrogate_risk, budget.masked_surrogate[index], rtol=1e-4)


@pytest.mark.parametrize("column", ["given", "tuned"])
def test_what_is_reported_can_be_had(noisy, column):
    answers = getattr(noisy, column)
    mixed = answers.mixed
    for answer in (mixed, answers.two_stage):
        moments = T.estimator_moments(
            LAM, T.Moments(BETA, BETA**2), n=80, noise_var=0.05, ridge=answer.surrogate_ridge,
            mask=jnp.arange(120) < answer.size,
        )  # fmt: skip
        risk = T.mixed_label_risk(
            LAM, BETA, moments, answer.weight, n=50, noise_var=0.05, ridge=answer.ridge
        )
        np.testing.assert_allclose(answer.risk, risk, rtol=1e-4)
    for name in ("standard", "direct", "together", "optimal", "mask"):
        assert np.isnan(getattr(answers, name).surrogate_ridge)
    for name, n, noise_var in (
        ("standard", 50, 0.05), ("direct", 80, 0.05), ("together", 130, 0.05)
    ):  # fmt: skip
        answer = getattr(answers, name)
        risk = T.excess_risk(LAM, BETA, n=n, noise_var=noise_var, ridge=answer.ridge).total
        np.testing.assert_allclose(answer.risk, risk, rtol=1e-4)
    for name in WAYS:
        answer = getattr(answers, name)
        np.testing.assert_allclose(answer.gain, 1 - answer.risk / answers.standard.risk, atol=1e-9)
        assert all(isinstance(x, float | int) for x in answer)
    assert 0 <= mixed.weight <= 1
    assert np.isnan(answers.standard.surrogate_risk)


@pytest.mark.parametrize("problem", ["noisy", "clean"])
def test_orders(problem, request):
    found = request.getfixturevalue(problem)
    for answers in (found.given, found.tuned):
        slack = 1 + 1e-5
        assert answers.optimal.risk <= answers.mask.risk * slack
        assert answers.optimal.risk <= answers.two_stage.risk * slack
        assert answers.mixed.risk <= min(answers.standard.risk, answers.two_stage.risk) * slack
    for name in WAYS:
        assert getattr(found.tuned, name).risk <= getattr(found.given, name).risk
    # More of the same labels can't hurt with a ridge that suits them.
    assert found.tuned.together.risk <= found.tuned.direct.risk <= found.tuned.standard.risk


def test_tuned_is_the_best_ridge(noisy):
    best = T.tuned_ridge(LAM, BETA, n=50, noise_var=0.05)
    np.testing.assert_allclose(noisy.tuned.standard.risk, best.total, rtol=2e-3)
    best = T.tuned_ridge(LAM, BETA, n=80, noise_var=0.05)
    np.testing.assert_allclose(noisy.tuned.direct.risk, best.total, rtol=2e-3)


def test_a_tuned_ridge_takes_part_of_the_gain(noisy, clean):
    # With noise, much of what the bound gains is what a ridge gains; without, hardly any.
    assert noisy.tuned.optimal.gain < 0.9 * noisy.given.optimal.gain
    assert noisy.tuned.optimal.gain > 0.1
    np.testing.assert_allclose(clean.tuned.optimal.gain, clean.given.optimal.gain, atol=0.03)


def test_enough_clean_samples_need_nothing():
    found = T.plan((LAM, BETA, 0.0), n=150)
    for name in ("standard", "optimal", "mask"):
        assert getattr(found.given, name).risk == pytest.approx(0, abs=1e-9)
    assert np.isfinite(found.given.mixed.risk)


def test_noise_at_the_peak_gives_infinite_risk_and_a_finite_plan():
    found = T.plan((jnp.ones(120), jnp.full(120, 0.1), 0.1), n=120, m=120)
    assert found.given.standard.risk == np.inf
    assert found.given.optimal.gain == 1.0
    assert np.isnan(found.given.direct.gain)
    assert found.given.together.gain == 1.0
    assert np.isfinite(found.tuned.standard.risk)
    assert np.isfinite(found.tuned.two_stage.risk)


def test_order_and_units_of_the_spectrum_do_not_matter(noisy):
    order = np.random.default_rng(0).permutation(120)
    found = T.plan((9 * LAM[order], BETA[order] / 3, 0.05), n=50, m=80)
    for name in WAYS:
        a, b = getattr(found.tuned, name), getattr(noisy.tuned, name)
        np.testing.assert_allclose(a.risk, b.risk, rtol=1e-3)
    assert found.given.mask.size == noisy.given.mask.size
    assert found.given.two_stage.risk == pytest.approx(noisy.given.two_stage.risk, rel=1e-3)


def test_from_an_estimate():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1500, 120)) * np.arange(1, 121) ** -1.0
    found = T.estimate(x, x @ np.ones(120) + 0.3 * rng.standard_normal(1500))
    direct = T.plan((found.lam, found.beta, found.noise_var), n=25)
    through = T.plan(found, n=25)
    assert through.m == 25
    for name in WAYS:
        assert getattr(through.given, name).risk == getattr(direct.given, name).risk
    truth = T.plan((np.arange(1, 121) ** -2.0, np.ones(120), 0.09), n=25)
    for name in ("standard", "optimal", "mixed"):
        a, b = getattr(through.given, name), getattr(truth.given, name)
        np.testing.assert_allclose(a.risk, b.risk, rtol=0.25)


def test_another_size_does_not_recompile(noisy):
    from kdjax.theory import _plan

    before = _plan._search._cache_size()
    T.plan((LAM, BETA, 0.3), n=31, m=200, ridge=0.1)
    assert _plan._search._cache_size() == before


@pytest.mark.parametrize(
    ("problem", "changes", "error", "words"),
    [
        ((LAM, BETA), {}, TypeError, "problem must be"),
        (LAM, {}, TypeError, "problem must be"),
        ((LAM, BETA[1:], 0.1), {}, ValueError, "beta must have 120"),
        ((LAM[None], BETA, 0.1), {}, ValueError, "lam must have 1 dim"),
        ((-LAM, BETA, 0.1), {}, ValueError, "lam must not be negative"),
        ((LAM, BETA, -0.1), {}, ValueError, "noise_var must be"),
        ((LAM, BETA, jnp.ones(2)), {}, ValueError, "noise_var must have 0 dim"),
        ((LAM, BETA, 0.1), {"n": 0}, ValueError, "n must be"),
        ((LAM, BETA, 0.1), {"n": 2.0}, TypeError, "n must be"),
        ((LAM, BETA, 0.1), {"m": 0}, ValueError, "m must be"),
        ((LAM, BETA, 0.1), {"ridge": -1.0}, ValueError, "ridge must be"),
    ],
)
def test_bad_input(problem, changes, error, words):
    with pytest.raises(error, match=words):
        T.plan(problem, **{"n": 10, **changes})


def test_a_plan_is_not_for_tracing():
    with pytest.raises(TypeError, match="lam must be known"):
        jax.jit(lambda lam: T.plan((lam, BETA, 0.1), n=10).null_risk)(LAM)
