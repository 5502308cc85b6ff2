"""Chains of trainings: limits in which they are known, masks, and moments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import theory

P = 20
RNG = np.random.default_rng(2)
LAM = RNG.permutation(np.arange(1, P + 1.0) ** -1.2)
LAM_S = RNG.uniform(0.1, 1, P)
TRUTH = RNG.normal(size=P)
MASK = np.sort(LAM)[P // 2] < LAM


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def fixed(beta):
    return theory.Moments(jnp.asarray(beta), jnp.asarray(beta) ** 2)


@pytest.mark.parametrize(("n", "ridge"), [(7.0, 0.0), (7.0, 0.3), (50.0, 0.3), (50.0, 0.0)])
@pytest.mark.parametrize("exact", [False, True])
def test_one_stage_is_the_excess_risk(n, ridge, exact):
    surrogate = TRUTH + 0.4
    moments = theory.estimator_moments(
        LAM, fixed(surrogate), n=n, noise_var=0.2, ridge=ridge, exact_ols=exact
    )
    wanted = theory.excess_risk(
        LAM, TRUTH, surrogate, n=n, noise_var=0.2, ridge=ridge, lam_test=LAM_S, exact_ols=exact
    )
    np.testing.assert_allclose(
        theory.moments_excess_risk(LAM_S, TRUTH, moments), wanted.total, rtol=1e-10
    )
    chain = theory.multi_stage_risk([theory.Stage(LAM, n, 0.2, ridge)], TRUTH)
    alone = theory.excess_risk(LAM, TRUTH, n=n, noise_var=0.2, ridge=ridge)
    np.testing.assert_allclose(chain.total, alone.total, rtol=1e-10)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_a_surrogate_of_very_many_samples_is_the_truth(ridge):
    got = theory.two_stage_risk(
        LAM_S, LAM, TRUTH, m=1e12, n=7, noise_s=0.1, noise_t=0.2, ridge_t=ridge
    )
    wanted = theory.excess_risk(LAM, TRUTH, n=7, noise_var=0.2, ridge=ridge).total
    np.testing.assert_allclose(got.total, wanted, rtol=1e-8)
    np.testing.assert_allclose(got.surrogate, 0, atol=1e-10)
    masked = theory.two_stage_risk(
        LAM_S, LAM, TRUTH, m=1e12, n=7, noise_s=0.1, noise_t=0.2, ridge_t=ridge, mask=MASK
    )
    wanted = theory.masked_risk(LAM, TRUTH, 7, mask=MASK, noise_var=0.2, ridge=ridge)
    np.testing.assert_allclose(masked.total, wanted, rtol=1e-8)


def test_a_student_of_very_many_samples_is_its_surrogate():
    got = theory.two_stage_risk(LAM_S, LAM, TRUTH, m=9, n=1e12, noise_s=0.1)
    np.testing.assert_allclose(got.total, got.surrogate, rtol=1e-8)
    for a, b in zip(got.moments, got.student, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8)


def test_a_mask_is_a_smaller_problem_with_more_noise():
    inner = theory.estimator_moments(LAM, fixed(TRUTH), n=6, noise_var=0.1, mask=MASK)
    hidden = np.sum(LAM * TRUTH**2, where=~MASK)
    smaller = theory.estimator_moments(LAM[MASK], fixed(TRUTH[MASK]), n=6, noise_var=0.1 + hidden)
    for whole, part in zip(inner, smaller, strict=True):
        np.testing.assert_allclose(whole[MASK], part, rtol=1e-12)
        assert jnp.all(whole[~MASK] == 0)
    nothing = theory.estimator_moments(LAM, fixed(TRUTH), n=6, mask=np.zeros(P, bool))
    assert jnp.all(jnp.stack(nothing) == 0)
    everything = theory.estimator_moments(LAM, fixed(TRUTH), n=6, mask=np.ones(P, bool))
    plain = theory.estimator_moments(LAM, fixed(TRUTH), n=6)
    np.testing.assert_array_equal(jnp.stack(everything), jnp.stack(plain))


def test_masks_as_a_batch():
    masks = np.tri(P, dtype=bool)
    whole = theory.two_stage_risk(LAM_S, LAM, TRUTH, m=9, n=7, noise_s=0.1, mask=masks)
    one = [
        theory.two_stage_risk(LAM_S, LAM, TRUTH, m=9, n=7, noise_s=0.1, mask=mask).total
        for mask in masks
    ]
    np.testing.assert_allclose(whole.total, jnp.stack(one), rtol=1e-10)
    mapped = jax.jit(
        jax.vmap(
            lambda mask: theory.two_stage_risk(LAM_S, LAM, TRUTH, m=9, n=7, noise_s=0.1, mask=mask)
        )
    )(masks)
    np.testing.assert_allclose(mapped.total, whole.total, rtol=1e-10)


def test_labels_of_infinite_variance():
    """A surrogate at its peak: no weight on its labels is the only answer, known or traced."""
    peak = theory.estimator_moments(LAM, fixed(TRUTH), n=P, noise_var=0.1)
    strong = theory.excess_risk(LAM, TRUTH, n=7, noise_var=0.1).total

    def answers(peak):
        mixed = theory.mixed_label_risk(LAM, TRUTH, peak, jnp.array([0.0, 0.5]), n=7, noise_var=0.1)
        return mixed, theory.optimal_mix(LAM, TRUTH, peak, n=7, noise_var=0.1)

    for mixed, best in (answers(peak), jax.jit(answers)(peak)):
        np.testing.assert_allclose(mixed[0], strong)
        assert mixed[1] == jnp.inf
        assert best == 0
    assert theory.tuned_ridge(LAM, TRUTH, peak, n=7).total == jnp.inf


def test_longer_chains():
    stages = [theory.Stage(LAM, 12.0, 0.1), theory.Stage(LAM_S, 9.0, 0.0, 0.2),
              theory.Stage(LAM, 7.0)]  # fmt: skip
    chain = theory.multi_stage_risk(stages, TRUTH)
    two = theory.two_stage_risk(LAM, LAM_S, TRUTH, m=12.0, n=9.0, noise_s=0.1, ridge_t=0.2)
    np.testing.assert_allclose(jnp.stack(chain.moments[1]), jnp.stack(two.student), rtol=1e-12)
    assert len(chain.risks) == 3
    assert chain.total == chain.risks[-1]
    # Each stage without noise only forgets: the last estimator is the smallest on average.
    norms = [moments.second.sum() for moments in chain.moments]
    assert norms[2] < norms[1]
    elsewhere = theory.multi_stage_risk(stages, TRUTH, lam_test=LAM_S)
    assert elsewhere.total != chain.total


def test_moments_are_those_of_a_distribution():
    moments = theory.two_stage_risk(LAM_S, LAM, TRUTH, m=9, n=7, noise_s=0.1).student
    assert jnp.all(moments.second >= moments.mean**2)


def test_edge_of_interpolation():
    noisy = theory.estimator_moments(LAM, fixed(TRUTH), n=P, noise_var=0.1)
    assert jnp.all(noisy.second == jnp.inf)
    assert theory.moments_excess_risk(LAM, TRUTH, noisy) == jnp.inf
    student = theory.two_stage_risk(LAM, LAM, TRUTH, m=P, n=7, noise_s=0.1)
    assert student.surrogate == student.total == jnp.inf
    half = np.where(MASK, LAM, 0)  # a surrogate that is hopeless where nobody looks
    one = theory.Moments(jnp.where(MASK, TRUTH, 0), jnp.where(MASK, TRUTH**2, jnp.inf))
    np.testing.assert_allclose(theory.moments_excess_risk(half, TRUTH, one), 0, atol=1e-15)
    clean = theory.estimator_moments(LAM, fixed(TRUTH), n=P)
    np.testing.assert_allclose(clean.second, TRUTH**2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: theory.multi_stage_risk([], TRUTH), ValueError, "stages must hold at least one"),
        (lambda: theory.multi_stage_risk([LAM], TRUTH), TypeError, "stages must hold Stage"),
        (
            lambda: theory.two_stage_risk(LAM_S, LAM, TRUTH, m=0, n=3),
            ValueError,
            "m must be a finite number above 0",
        ),
        (
            lambda: theory.two_stage_risk(LAM_S, LAM, TRUTH, m=3, n=3, noise_s=-1),
            ValueError,
            "noise_s must",
        ),
        (
            lambda: theory.two_stage_risk(LAM_S, LAM, TRUTH, m=3, n=3, ridge_t=-1),
            ValueError,
            "ridge_t must",
        ),
        (
            lambda: theory.two_stage_risk(LAM_S, LAM[:3], TRUTH, m=3, n=3),
            ValueError,
            "lam_t must have 20 entries",
        ),
        (
            lambda: theory.two_stage_risk(LAM_S, LAM, TRUTH, m=3, n=3, mask=TRUTH),
            TypeError,
            "mask must be a boolean",
        ),
        (lambda: theory.multi_stage_risk(None, TRUTH), TypeError, "stages must be a list of Stage"),
        (lambda: theory.estimator_moments(LAM, None, n=3), TypeError, "moments must be a Moments"),
        (
            lambda: theory.moments_excess_risk(LAM, TRUTH, theory.Moments(TRUTH, 0 * TRUTH)),
            ValueError,
            "second must be at least mean",
        ),
        (
            lambda: theory.tuned_ridge(LAM, TRUTH, theory.Moments(TRUTH, -TRUTH), n=3),
            ValueError,
            "second must be a number at least 0",
        ),
        (
            lambda: theory.estimator_moments(LAM, fixed(TRUTH[:2]), n=3),
            ValueError,
            "mean must have 20",
        ),
        (
            lambda: theory.moments_excess_risk(LAM, TRUTH[:2], fixed(TRUTH)),
            ValueError,
            "beta_star must have 20",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
