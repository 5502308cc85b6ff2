"""The optimal surrogate and mask: nothing does better, by calculus and by trying everything."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import theory

P = 10
N, NOISE = 4.3, 0.2


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def problem(seed, zeros=False):
    rng = np.random.default_rng(seed)
    lam = np.exp(2 * rng.normal(size=P))
    if zeros:
        lam[rng.permutation(P)[:3]] = 0
    return lam, rng.normal(size=P), rng.uniform(0.1, 2, P)


def risk(lam, truth, surrogate=None, ridge=0.0, lam_test=None, n=N):
    return theory.excess_risk(
        lam, truth, surrogate, n=n, noise_var=NOISE, ridge=ridge, lam_test=lam_test
    ).total


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ridge", [0.0, 0.7])
@pytest.mark.parametrize("shifted", [False, True])
def test_no_surrogate_does_better(seed, ridge, shifted):
    lam, truth, test = problem(seed)
    test = test if shifted else None
    of = lambda surrogate: risk(lam, truth, surrogate, ridge, test)  # noqa: E731
    best = theory.optimal_surrogate(lam, truth, N, ridge=ridge, lam_test=test)
    least = theory.optimal_surrogate_risk(
        lam, truth, N, noise_var=NOISE, ridge=ridge, lam_test=test
    )
    np.testing.assert_allclose(of(best), least, rtol=1e-12)
    np.testing.assert_allclose(jax.grad(of)(best), 0, atol=1e-12)
    curvature = jax.hessian(of)(best)
    assert jnp.all(jnp.diagonal(curvature) > 0)
    np.testing.assert_allclose(curvature - jnp.diag(jnp.diagonal(curvature)), 0, atol=1e-12)
    masked = theory.masked_risk(lam, truth, N, noise_var=NOISE, ridge=ridge, lam_test=test)
    assert least < masked <= of(None) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ridge", [0.0, 0.7])
@pytest.mark.parametrize("shifted", [False, True])
def test_best_of_all_masks(seed, ridge, shifted):
    lam, truth, test = problem(seed, zeros=True)
    test = test if shifted else None
    masks = np.array(list(itertools.product([False, True], repeat=P)))
    risks = theory.masked_risk(
        lam, truth, N, mask=masks, noise_var=NOISE, ridge=ridge, lam_test=test
    )
    least = theory.masked_risk(lam, truth, N, noise_var=NOISE, ridge=ridge, lam_test=test)
    np.testing.assert_allclose(least, risks.min(), rtol=1e-12)
    best = masks[np.argmin(risks)] & (lam > 0)  # a feature that never varies changes nothing
    np.testing.assert_array_equal(
        theory.optimal_mask(lam, N, ridge, lam_test=test) & (lam > 0), best
    )
    if not shifted:
        cut = theory.mask_threshold(lam, N, ridge)
        np.testing.assert_array_equal((lam > cut) & (lam > 0), best)


def test_amplified_above_the_transition():
    lam, *_ = problem(0)
    stats = theory.spectral_stats(lam, N)
    gain = theory.optimal_gain(lam, N)
    np.testing.assert_array_equal(gain > 1, stats.zeta < stats.one_minus_omega)
    assert gain.max() > 1 > gain.min() > 0


@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_gain_of_a_flat_spectrum(ridge):
    """Without a ridge there is nothing to gain; a ridge shrinks, and the surrogate undoes it."""
    lam = np.full(P, 3.0)
    gain = theory.optimal_gain(lam, N, ridge)
    np.testing.assert_allclose(gain, gain[0])
    if ridge:
        assert gain[0] > 1
    else:
        np.testing.assert_allclose(gain, 1)
        assert theory.optimal_mask(lam, N).all()


def test_no_gain_with_enough_samples():
    lam, truth, _ = problem(0, zeros=True)
    for n in (P - 3, P, 3 * P):
        np.testing.assert_array_equal(theory.optimal_gain(lam, n), 1.0)
        np.testing.assert_array_equal(theory.optimal_mask(lam, n), lam > 0)
        assert theory.mask_threshold(lam, n) == 0
        if n > P - 3:
            least = theory.optimal_surrogate_risk(lam, truth, n, noise_var=NOISE)
            np.testing.assert_allclose(least, risk(lam, truth, n=n))
    assert theory.optimal_surrogate_risk(lam, truth, P - 3) == 0
    assert theory.optimal_surrogate_risk(lam, truth, P - 3, noise_var=NOISE) == jnp.inf
    # With a ridge there is one at any n.
    assert not np.allclose(theory.optimal_gain(lam, 3 * P, 0.7)[lam > 0], 1)


def test_conventions_at_zero_eigenvalues():
    lam, truth, test = problem(0, zeros=True)
    gain = theory.optimal_gain(lam, N)
    assert jnp.all(gain[lam == 0] == 0)
    assert not theory.optimal_mask(lam, N)[lam == 0].any()
    # What a test law has where the training law has nothing is lost to every surrogate.
    lost = np.sum(test * truth**2, where=lam == 0)
    for n in (N, 3.0 * P):
        least = theory.optimal_surrogate_risk(lam, truth, n, lam_test=test)
        assert least >= lost * (1 - 1e-12)
    np.testing.assert_allclose(least, lost)
    slopes = jax.grad(
        lambda lam: (
            jnp.sum(theory.optimal_gain(lam, N))
            + theory.optimal_surrogate_risk(lam, truth, N, lam_test=test)
        )
    )(jnp.asarray(lam))
    assert jnp.all(jnp.isfinite(slopes))


def test_reading_that_is_not_the_minimiser():
    """beta_s = L beta, which some notes on the paper print, does worse than the closed form."""
    lam, truth = theory.power_law(500, 2.0, 1.5)
    learned = 1 - theory.spectral_stats(lam, 200).zeta
    risks = [
        theory.excess_risk(lam, truth, surrogate, n=200).total
        for surrogate in (theory.optimal_surrogate(lam, truth, 200), learned * truth, truth)
    ]
    assert [f"{r:.5f}" for r in risks] == ["0.08325", "0.09380", "0.11937"]


def test_batched_sizes():
    lam, truth, _ = problem(0)
    n = jnp.array([2.0, 5.0, 30.0])
    for function in (theory.optimal_gain, theory.optimal_mask, theory.mask_threshold):
        whole = function(lam, n)
        np.testing.assert_allclose(whole, jnp.stack([function(lam, k) for k in n]))
        np.testing.assert_allclose(jax.jit(jax.vmap(lambda k: function(lam, k)))(n), whole)  # noqa: B023
    whole = theory.masked_risk(lam, truth, n)
    np.testing.assert_allclose(whole, jnp.stack([theory.masked_risk(lam, truth, k) for k in n]))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda lam, b: theory.optimal_gain(lam, 0), ValueError, "n must"),
        (lambda lam, b: theory.optimal_gain(lam, 3, -1), ValueError, "ridge must"),
        (lambda lam, b: theory.optimal_gain(lam, 3, 0, lam[:2]), ValueError, "lam_test must have"),
        (lambda lam, b: theory.optimal_mask(-lam, 3), ValueError, "lam must"),
        (lambda lam, b: theory.mask_threshold(lam * 0, 3), ValueError, "lam must"),
        (lambda lam, b: theory.optimal_surrogate(lam, b[:3], 3), ValueError, "beta_star must have"),
        (
            lambda lam, b: theory.optimal_surrogate_risk(lam, b, 3, noise_var=-1),
            ValueError,
            "noise_var must",
        ),
        (lambda lam, b: theory.masked_risk(lam, b, 3, mask=b), TypeError, "mask must be a boolean"),
        (
            lambda lam, b: theory.masked_risk(lam, b, 3, mask=b[:2] > 0),
            ValueError,
            "mask must have 10 entries",
        ),
    ],
)
def test_bad_input(call, error, words):
    lam, truth, _ = problem(0)
    with pytest.raises(error, match=words):
        call(lam, truth)
