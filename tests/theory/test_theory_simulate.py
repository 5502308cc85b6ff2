"""Simulated trainings against the theory, against dense solves, and against themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg  # noqa: F401  (its BLAS is JAX's on a CPU, and must be there to be limited)
import threadpoolctl

from kdjax import theory as T
from kdjax.theory import _simulate


@pytest.fixture(autouse=True, scope="module")
def _one_blas_thread():
    # The small factorisations of this file wait for each other's threads on a busy machine.
    with threadpoolctl.threadpool_limits(1):
        yield


def power(p, alpha=2.0, b=1.5):
    return tuple(np.asarray(x) for x in T.power_law(p, alpha, b))


def drawn(lam, seed):
    lam = np.asarray(lam, np.float32)
    beta = np.random.default_rng(seed).standard_normal(len(lam)) / np.sqrt(lam.sum())
    return lam, beta.astype(np.float32)


SPIKED = np.r_[np.full(5, 50.0), np.full(395, 1.0)]
EXPONENTIAL = 0.96 ** np.arange(150)
WITH_ZEROS = np.where(np.arange(120) % 3, 1.0 / (1.0 + np.arange(120)), 0.0)

# lam and beta, n, noise_var, ridge, lam_test, trials
ONE_STAGE = {
    "figure1": (power(500), 200, 0.0, 0.0, None, 60),
    "figure1, few": (power(500), 50, 0.05, 0.0, None, 150),
    "figure1, many": (power(500), 400, 0.05, 0.0, None, 40),
    "isotropic": (drawn(np.ones(300), 0), 120, 0.25, 0.0, None, 100),
    "spiked": (drawn(SPIKED, 1), 200, 0.1, 0.0, None, 60),
    "exponential": (drawn(EXPONENTIAL, 2), 60, 0.02, 0.0, None, 200),
    "under-parametrised": (drawn(np.linspace(0.5, 2, 80), 3), 240, 0.5, 0.0, None, 150),
    "ridge, n < p": (power(300), 150, 0.1, 0.5, None, 100),
    "ridge, n > p": (power(60), 200, 0.5, 5.0, None, 150),
    "other test law": (power(500), 150, 0.02, 0.0, 1.0 / np.arange(1.0, 501.0), 60),
    "unsorted, with zeros": (drawn(WITH_ZEROS[::-1], 4), 50, 0.1, 0.0, None, 200),
    "n above a low rank": (drawn(WITH_ZEROS, 5), 110, 0.1, 0.0, np.ones(120), 100),
}


def close(name, simulated, predicted, slack):
    """The rule of agreement: 4 standard errors and the finite-size deviation."""
    mean, stderr, predicted = (
        np.asarray(x, np.float64) for x in (simulated.mean, simulated.stderr, predicted)
    )
    allowed = 4 * stderr + 2 * predicted * slack
    assert np.all(np.abs(mean - predicted) <= allowed), (name, mean, predicted, allowed)


def slack(lam, n, ridge=0.0):
    return 1 / (n * float(T.spectral_stats(lam, n, ridge).one_minus_omega))


def one_stage(name, times=1):
    (lam, beta), n, noise_var, ridge, lam_test, trials = ONE_STAGE[name]
    common = {"noise_var": noise_var, "ridge": ridge, "lam_test": lam_test}
    surrogates = jnp.stack(
        [
            jnp.asarray(beta),
            T.optimal_surrogate(lam, beta, n, ridge=ridge, lam_test=lam_test),
            T.optimal_mask(lam, n, ridge, lam_test=lam_test) * beta,
            0.5 * beta,
        ]
    )
    simulated = _simulate.simulate_one_stage(
        jax.random.key(7), lam, beta, surrogates, n=n, trials=trials * times, **common
    )
    predicted = T.excess_risk(lam, beta, surrogates, n=n, **common).total
    close(name, simulated, predicted, slack(lam, n, ridge))


# One of each kind; the others are slow, at many trials.
@pytest.mark.parametrize(
    "name", ["isotropic", "under-parametrised", "ridge, n < p", "unsorted, with zeros"]
)
def test_one_stage_agrees_with_theory(name):
    one_stage(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_STAGE)
def test_one_stage_agrees_with_theory_over_many_trials(name):
    one_stage(name, times=8)


# lam_s, lam_t, m, n, noise_s, noise_t, ridge_t, size of the mask, trials
LAM, BETA = power(500)
TWO_STAGE = {
    "same law": (LAM, LAM, 300, 200, 0.05, 0.0, 0.0, None, 60),
    "other law": (LAM**0.75, LAM, 300, 200, 0.05, 0.02, 0.0, None, 60),
    "masked least squares": (LAM, LAM, 400, 200, 0.05, 0.0, 0.0, 145, 60),
    "masked interpolator": (LAM, LAM, 150, 100, 0.0, 0.0, 0.0, 250, 100),
    "ridge student": (LAM, LAM, 300, 400, 0.3, 0.0, 0.1, None, 40),
}


def two_stage(name, times=1):
    lam_s, lam_t, m, n, noise_s, noise_t, ridge_t, size, trials = TWO_STAGE[name]
    problem = {
        "m": m, "n": n, "noise_s": noise_s, "noise_t": noise_t, "ridge_t": ridge_t,
        "mask": None if size is None else jnp.arange(500) < size,
    }  # fmt: skip
    simulated = _simulate.simulate_two_stage(
        jax.random.key(3), lam_s, lam_t, BETA, trials=trials * times, **problem
    )
    predicted = T.two_stage_risk(lam_s, lam_t, BETA, **problem)
    seen = lam_s if size is None else np.where(np.arange(500) < size, lam_s, 0)
    close(name, simulated.surrogate, predicted.surrogate, slack(seen, m))
    close(name, simulated.student, predicted.total, slack(seen, m) + slack(lam_t, n, ridge_t))


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_STAGE)
def test_two_stages_agree_with_theory(name):
    two_stage(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_STAGE)
def test_two_stages_agree_with_theory_over_many_trials(name):
    two_stage(name, times=8)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize(("n", "p"), [(20, 40), (40, 20), (20, 20)])
def test_fit_is_a_dense_solve(n, p, ridge):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((n, p)) / np.arange(1, p + 1), rng.standard_normal((n, 3))
    if ridge:
        wanted = np.linalg.solve(x.T @ x + ridge * np.eye(p), x.T @ y)
    else:
        wanted = np.linalg.pinv(x, rcond=1e-15) @ y
    with jax.enable_x64(True):
        got = _simulate._fit(jnp.asarray(x), jnp.asarray(y), jnp.sqrt(ridge), ridge > 0)
    np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-9 * np.abs(wanted).max())


@pytest.mark.parametrize("ridge", [0.0, 0.02])
def test_a_trial_is_the_risk_of_a_dense_solve(ridge):
    # Zeros and order of the spectrum, the noise and the penalty: everything on the same design.
    lam = np.array([0.0, 0.1, 1.0, 0.0, 0.5, 0.3, 0.2, 0.05])
    beta, surrogate = np.arange(8.0), np.arange(8.0)[::-1].copy()
    key, order = jax.random.key(5), [2, 4, 5, 6, 1, 7]
    with jax.enable_x64(True):
        run = _simulate.simulate_one_stage(
            key, lam, beta, surrogate, n=4, trials=2, noise_var=0.09, ridge=ridge, lam_test=lam + 1
        )
        keys = jax.random.split(key, 2)
        designs = [_simulate._sample(k, jnp.asarray(lam[order]), 4) for k in keys]
    for (x, z), risk in zip(designs, run.risks, strict=True):
        x, y = np.asarray(x), np.asarray(x) @ surrogate[order] + 0.3 * np.asarray(z)
        fitted = np.zeros(8)
        fitted[order] = x.T @ np.linalg.solve(x @ x.T + ridge * np.eye(4), y)
        np.testing.assert_allclose(risk, np.sum((lam + 1) * (fitted - beta) ** 2), rtol=1e-10)


def test_float32_is_good_enough_for_figure_1():
    x, _ = _simulate._sample(jax.random.key(0), jnp.asarray(LAM), 200)
    y = x @ jnp.asarray(BETA)
    fitted = _simulate._fit(x, y[:, None], jnp.zeros(()), False)[:, 0]
    x, y = np.asarray(x, np.float64), np.asarray(x, np.float64) @ BETA
    wanted = np.linalg.pinv(x, rcond=1e-15) @ y
    risk, exact = (np.sum(LAM * (np.asarray(b, np.float64) - BETA) ** 2) for b in (fitted, wanted))
    assert fitted.dtype == jnp.float32
    np.testing.assert_allclose(risk, exact, rtol=1e-5)  # Gram + Cholesky: 1e-5 to 2e-3


SMALL, SMALL_BETA = power(30)


def test_same_key_same_bits_and_other_key_other_bits():
    def run(seed):
        return _simulate.simulate_one_stage(
            jax.random.key(seed), SMALL, SMALL_BETA, n=10, trials=6
        ).risks

    np.testing.assert_array_equal(run(0), run(0))
    assert not np.any(np.isclose(run(0), run(1), rtol=1e-6))
    assert len(np.unique(run(0))) == 6


@pytest.mark.parametrize("chunk", [3, 50])
@pytest.mark.slow
def test_chunks_do_not_change_results(chunk):
    options = {"n": 10, "trials": 7}
    one = _simulate.simulate_one_stage(jax.random.key(0), SMALL, SMALL_BETA, chunk=chunk, **options)
    reference = _simulate.simulate_one_stage(jax.random.key(0), SMALL, SMALL_BETA, **options)
    np.testing.assert_allclose(one.risks, reference.risks, rtol=2e-5)
    problem = (jax.random.key(1), SMALL, SMALL, SMALL_BETA)
    two = _simulate.simulate_two_stage(*problem, m=15, chunk=chunk, **options)
    reference = _simulate.simulate_two_stage(*problem, m=15, **options)
    np.testing.assert_allclose(two.student.risks, reference.student.risks, rtol=2e-5)
    np.testing.assert_allclose(two.surrogate.risks, reference.surrogate.risks, rtol=2e-5)


def test_surrogates_share_designs():
    several = jnp.stack([jnp.asarray(SMALL_BETA), 0.5 * SMALL_BETA])
    options = {"n": 10, "trials": 5, "noise_var": 0.1}
    both = _simulate.simulate_one_stage(jax.random.key(0), SMALL, SMALL_BETA, several, **options)
    assert both.risks.shape == (5, 2)
    assert both.mean.shape == both.stderr.shape == (2,)
    for index in range(2):
        alone = _simulate.simulate_one_stage(
            jax.random.key(0), SMALL, SMALL_BETA, several[index], **options
        )
        assert alone.mean.shape == ()
        np.testing.assert_allclose(alone.risks, both.risks[:, index], rtol=1e-4)
    np.testing.assert_allclose(both.mean, np.mean(both.risks, axis=0), rtol=1e-6)
    wanted = np.std(both.risks, axis=0, ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(both.stderr, wanted, rtol=1e-5)


def test_one_trial_has_no_standard_error():
    run = _simulate.simulate_one_stage(jax.random.key(0), SMALL, SMALL_BETA, n=10, trials=1)
    assert np.isnan(run.stderr)
    np.testing.assert_allclose(run.mean, run.risks[0])


def test_a_student_of_an_exact_surrogate_is_a_standard_one():
    # A noise-free surrogate with more samples than features is the truth.
    runs = _simulate.simulate_two_stage(
        jax.random.key(0), SMALL, SMALL, SMALL_BETA, m=90, n=10, trials=100
    )
    np.testing.assert_allclose(runs.surrogate.risks, 0, atol=1e-8)
    close("exact", runs.student, T.excess_risk(SMALL, SMALL_BETA, n=10).total, slack(SMALL, 10))


def test_noise_and_ridge_do_not_recompile():
    before = _simulate._one_stage._cache_size()
    for noise_var, ridge in ((0.0, 0.1), (0.5, 0.2), (0.1, 3.0)):
        _simulate.simulate_one_stage(
            jax.random.key(0), SMALL, SMALL_BETA, n=11, trials=2, noise_var=noise_var, ridge=ridge
        )
    assert _simulate._one_stage._cache_size() == before + 1


def call_one(**changes):
    arguments = {"lam": SMALL, "beta_star": SMALL_BETA, "n": 10, "trials": 2, **changes}
    return _simulate.simulate_one_stage(jax.random.key(0), **arguments)


def call_two(**changes):
    arguments = {"lam_s": SMALL, "lam_t": SMALL, "beta_star": SMALL_BETA, "m": 9, "n": 10}
    return _simulate.simulate_two_stage(jax.random.key(0), **{**arguments, "trials": 2, **changes})


@pytest.mark.parametrize(
    ("call", "changes", "error", "words"),
    [
        (call_one, {"lam": -SMALL}, ValueError, "lam must not be negative"),
        (call_one, {"lam": SMALL[None]}, ValueError, "lam must have 1 dimension"),
        (call_one, {"beta_star": SMALL_BETA[1:]}, ValueError, "beta_star must have 30"),
        (call_one, {"beta_s": np.ones((2, 3, 30))}, ValueError, "beta_s must have 1 or 2"),
        (call_one, {"lam_test": np.ones(4)}, ValueError, "lam_test must have 30"),
        (call_one, {"n": 0}, ValueError, "n must be"),
        (call_one, {"n": 2.5}, TypeError, "n must be"),
        (call_one, {"trials": 0}, ValueError, "trials must be"),
        (call_one, {"chunk": 0}, ValueError, "chunk must be"),
        (call_one, {"noise_var": -1.0}, ValueError, "noise_var must be"),
        (call_one, {"ridge": -1.0}, ValueError, "ridge must be"),
        (call_one, {"ridge": np.ones(3)}, ValueError, "ridge must be"),
        (call_two, {"lam_t": np.ones(4)}, ValueError, "lam_t must have 30"),
        (call_two, {"m": 0}, ValueError, "m must be"),
        (call_two, {"noise_s": -1.0}, ValueError, "noise_s must be"),
        (call_two, {"noise_t": np.nan}, ValueError, "noise_t must be"),
        (call_two, {"ridge_s": -1.0}, ValueError, "ridge_s must be"),
        (call_two, {"mask": np.ones(30)}, TypeError, "mask must be a boolean"),
        (call_two, {"mask": np.zeros(30, bool)}, ValueError, "mask must keep at least one"),
    ],
)
def test_bad_input(call, changes, error, words):
    with pytest.raises(error, match=words):
        call(**changes)


def test_what_decides_shapes_must_be_known():
    with pytest.raises(TypeError, match="lam must be known"):
        jax.jit(lambda lam: call_one(lam=lam))(SMALL)
    with pytest.raises(TypeError, match="ridge must be known"):
        jax.jit(lambda ridge: call_one(ridge=ridge))(0.1)


def test_the_rest_may_be_traced():
    def mean(beta, noise_var):
        return call_one(beta_star=beta, noise_var=noise_var).mean

    args = (jnp.asarray(SMALL_BETA), 0.1)
    np.testing.assert_allclose(jax.jit(mean)(*args), mean(*args), rtol=1e-5)
