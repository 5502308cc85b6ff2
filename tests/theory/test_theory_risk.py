"""Risks for a given surrogate: exact formulas, invariants, slopes and bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import test_util

from kdjax import theory

P = 24
RNG = np.random.default_rng(1)
LAM = RNG.permutation(np.arange(1, P + 1.0) ** -1.5)
TRUTH = RNG.normal(size=P)
SURROGATE = TRUTH + 0.5 * RNG.normal(size=P)
LAM_TEST = RNG.uniform(0.1, 1, P)
# n, noise_var, ridge: below the rank, with a ridge on both sides, above the rank
SETTINGS = [(9.0, 0.3, 0.0), (9.0, 0.3, 0.2), (40.0, 0.3, 0.2), (40.0, 0.3, 0.0)]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def risk(*args, **options):
    return theory.excess_risk(*args, **options).total


@pytest.mark.parametrize(("n", "exact"), [(10, False), (50, False), (50, True), (32, True)])
def test_isotropic(n, exact):
    """Hastie, Montanari, Rosset, Tibshirani, Annals of Statistics 2022, section 3; the exact
    variance of least squares is that of an inverse Wishart matrix."""
    p, norm, noise = 30, 2.0, 0.7
    beta = RNG.normal(size=p)
    beta *= norm / np.linalg.norm(beta)
    got = theory.excess_risk(np.ones(p), beta, n=n, noise_var=noise, exact_ols=exact)
    below = norm**2 * (1 - n / p) + noise * n / (p - n)
    np.testing.assert_allclose(got.total, below if n < p else noise * p / (n - p - exact))


@pytest.mark.parametrize(("n", "noise", "ridge"), SETTINGS)
def test_invariants(n, noise, ridge):
    plain = {"n": n, "noise_var": noise, "ridge": ridge}
    terms = theory.excess_risk(LAM, TRUTH, SURROGATE, **plain)
    np.testing.assert_allclose(terms.total, terms.bias + terms.var_signal + terms.var_noise)
    # The unit of the features, and that of the labels.
    scaled = theory.excess_risk(
        4 * LAM, TRUTH / 2, SURROGATE / 2, n=n, noise_var=noise, ridge=4 * ridge
    )
    np.testing.assert_allclose(jnp.stack(scaled), jnp.stack(terms), rtol=1e-10)
    louder = theory.excess_risk(
        LAM, 3 * TRUTH, 3 * SURROGATE, n=n, noise_var=9 * noise, ridge=ridge
    )
    np.testing.assert_allclose(jnp.stack(louder), 9 * jnp.stack(terms), rtol=1e-10)
    order = RNG.permutation(P)
    turned = theory.excess_risk(LAM[order], TRUTH[order], SURROGATE[order], **plain)
    np.testing.assert_allclose(jnp.stack(turned), jnp.stack(terms), rtol=1e-10)
    # The same law of test by name and by default; no surrogate means the truth.
    same = risk(LAM, TRUTH, SURROGATE, lam_test=LAM, **plain)
    np.testing.assert_allclose(same, terms.total)
    np.testing.assert_allclose(risk(LAM, TRUTH, **plain), risk(LAM, TRUTH, TRUTH, **plain))
    # The risk is quadratic in the signs of neither: only products with the truth count.
    np.testing.assert_allclose(risk(LAM, -TRUTH, -SURROGATE, **plain), terms.total)
    # An error of the labels is measured in the same way as one of the truth.
    student = theory.excess_risk(LAM, SURROGATE, **plain)
    np.testing.assert_allclose(student.gamma2, noise + student.total, rtol=1e-10)


def test_own_labels():
    """gamma2 is the test error against the labels it was trained on: excess risk plus noise."""
    for n, noise, ridge in SETTINGS:
        terms = theory.excess_risk(LAM, TRUTH, n=n, noise_var=noise, ridge=ridge)
        np.testing.assert_allclose(terms.gamma2, terms.total + noise, rtol=1e-10)


def test_edge_of_interpolation():
    """Without noise nothing special happens at n = rank, with noise everything does."""
    for n in (P, P + 0.5, P + 1):
        exact = risk(LAM, TRUTH, SURROGATE, n=n, noise_var=0.1, exact_ols=True)
        assert exact == jnp.inf
    noisy = theory.excess_risk(LAM, TRUTH, SURROGATE, n=P, noise_var=0.1)
    assert noisy.total == noisy.var_noise == jnp.inf
    clean = theory.excess_risk(LAM, TRUTH, SURROGATE, n=P)
    own = np.sum(LAM * (TRUTH - SURROGATE) ** 2)
    np.testing.assert_allclose(clean.total, own)
    np.testing.assert_allclose(risk(LAM, TRUTH, SURROGATE, n=P - 1e-9), own, rtol=1e-6)
    assert theory.train_mse(LAM, TRUTH, n=P, noise_var=0.1) == 0


def test_train_error():
    for n, noise, ridge in SETTINGS:
        terms = theory.excess_risk(LAM, TRUTH, n=n, noise_var=noise, ridge=ridge)
        stats = theory.spectral_stats(LAM, n, ridge)
        train = theory.train_mse(LAM, TRUTH, n=n, noise_var=noise, ridge=ridge)
        wanted = (1 - stats.df1 / n) ** 2 * terms.gamma2
        np.testing.assert_allclose(train, wanted, rtol=1e-9, atol=1e-12)
        if ridge or n > P:
            np.testing.assert_allclose(theory.gcv(train, n=n, df1=stats.df1), terms.gamma2)
    # Reference implementation and Monte Carlo: 0.062708 and 0.062665 +- 0.00028.
    assert jnp.isnan(theory.gcv(0.0, n=10, df1=10))


def test_covariate_shift():
    """An eigenvalue of the test law weighs its own coordinate's error, and the label error."""
    n, noise = 9.0, 0.3
    slope = jax.grad(lambda test: risk(LAM, TRUTH, SURROGATE, n=n, noise_var=noise, lam_test=test))(
        jnp.asarray(LAM_TEST)
    )
    stats = theory.spectral_stats(LAM, n)
    gamma2 = theory.excess_risk(LAM, TRUTH, SURROGATE, n=n, noise_var=noise).gamma2
    learned = 1 - stats.zeta
    wanted = (TRUTH - learned * SURROGATE) ** 2 + gamma2 / n * learned / (LAM + stats.tau)
    np.testing.assert_allclose(slope, wanted, rtol=1e-9)
    whole = risk(LAM, TRUTH, SURROGATE, n=n, noise_var=noise, lam_test=LAM_TEST)
    np.testing.assert_allclose(whole, jnp.sum(slope * LAM_TEST), rtol=1e-9)


RISKS = {
    "excess": lambda lam, beta, n, noise, ridge: risk(
        lam, beta, SURROGATE, n=n, noise_var=noise, ridge=ridge
    ),
    "shifted": lambda lam, beta, n, noise, ridge: risk(
        lam, beta, SURROGATE, n=n, noise_var=noise, ridge=ridge, lam_test=LAM_TEST
    ),
    "optimal": lambda lam, beta, n, noise, ridge: theory.optimal_surrogate_risk(
        lam, beta, n, noise_var=noise, ridge=ridge
    ),
    "masked": lambda lam, beta, n, noise, ridge: theory.masked_risk(
        lam, beta, n, noise_var=noise, ridge=ridge
    ),
    "two stages": lambda lam, beta, n, noise, ridge: (
        theory.two_stage_risk(
            lam, LAM_TEST, beta, m=n + 3, n=n, noise_s=noise, ridge_s=ridge, ridge_t=ridge
        ).total
    ),
    "train": lambda lam, beta, n, noise, ridge: theory.train_mse(
        lam, beta, n=n, noise_var=noise, ridge=ridge
    ),
}
# Where every one of them would take long, those that share the least code.
FEW_RISKS = [
    name if name in ("excess", "optimal") else pytest.param(name, marks=pytest.mark.slow)
    for name in RISKS
]


@pytest.mark.parametrize("name", FEW_RISKS)
@pytest.mark.parametrize(("n", "noise", "ridge"), SETTINGS)
def test_slopes(name, n, noise, ridge):
    """In n, the noise, the ridge, each eigenvalue and the truth, against central differences."""

    def of_logs(log_lam, beta, n, noise, log_ridge):
        return RISKS[name](jnp.exp(log_lam), beta, n, noise, ridge and jnp.exp(log_ridge))

    point = (
        jnp.log(jnp.asarray(LAM)), jnp.asarray(TRUTH), jnp.asarray(n), jnp.asarray(noise),
        jnp.log(ridge or 1.0),
    )  # fmt: skip
    test_util.check_grads(of_logs, point, 1, modes=["rev", "fwd"], rtol=1e-5, atol=1e-7, eps=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW_RISKS)
def test_slope_in_the_exponent(name):
    def of_alpha(alpha):
        lam, beta = theory.power_law(P, alpha, 1.5)
        return RISKS[name](lam, beta, 9.0, 0.3, 0.1)

    test_util.check_grads(of_alpha, (2.0,), 2, modes=["rev"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", RISKS)
def test_slope_in_the_ridge_at_zero(name):
    """Above the rank a first bit of ridge is answered with its true, one-sided slope."""

    def of_ridge(ridge):
        return RISKS[name](LAM, TRUTH, 40.0, 0.3, ridge)

    h = 1e-6
    wanted = (-3 * of_ridge(0.0) + 4 * of_ridge(h) - of_ridge(2 * h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(of_ridge)(0.0), wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", RISKS)
def test_transformations_and_dtypes(name):
    function = RISKS[name]
    n, noise, ridge = (jnp.asarray(x) for x in zip(*SETTINGS, strict=True))
    eager = [function(LAM, TRUTH, *setting) for setting in SETTINGS]
    batch = function(LAM, TRUTH, n, noise, ridge)
    mapped = jax.jit(jax.vmap(lambda *setting: function(LAM, TRUTH, *setting)))(n, noise, ridge)
    np.testing.assert_allclose(batch, jnp.stack(eager), rtol=1e-10)
    np.testing.assert_allclose(mapped, batch, rtol=1e-10)
    stacked = function(
        jnp.stack([LAM, LAM_TEST]), jnp.stack([TRUTH, TRUTH]), jnp.array([9.0, 12.0]), 0.3, 0.2
    )
    np.testing.assert_allclose(stacked[0], eager[1], rtol=1e-10)
    np.testing.assert_allclose(stacked[1], function(LAM_TEST, TRUTH, 12.0, 0.3, 0.2), rtol=1e-10)


def test_precision():
    with jax.enable_x64(False):
        rough = jnp.asarray(LAM, jnp.bfloat16), jnp.asarray(TRUTH, jnp.bfloat16)
        got = theory.excess_risk(*rough, n=9, noise_var=0.3)
        assert all(x.dtype == jnp.float32 for x in got)
        same = theory.excess_risk(*(x.astype(jnp.float32) for x in rough), n=9, noise_var=0.3)
        np.testing.assert_array_equal(jnp.stack(got), jnp.stack(same))
        single = theory.excess_risk(LAM, TRUTH, SURROGATE, n=9, noise_var=0.3)
    double = theory.excess_risk(LAM, TRUTH, SURROGATE, n=9, noise_var=0.3)
    np.testing.assert_allclose(jnp.stack(single), jnp.stack(double), rtol=2e-5)


@pytest.mark.parametrize(
    ("alpha", "b", "n"), [(1.5, 5.5, 1600), pytest.param(2.0, 6.0, 1000, marks=pytest.mark.slow)]
)
def test_small_risks_keep_their_digits(alpha, b, n):
    """Risks of 1e-9 of the energy, of which a difference of large numbers leaves nothing."""

    def all_of_them():
        lam, beta = theory.power_law(20_000, alpha, b)
        return jnp.stack(
            [
                theory.excess_risk(lam, beta, n=n).total,
                theory.optimal_surrogate_risk(lam, beta, n),
                theory.masked_risk(lam, beta, n),
                theory.mixed_label_risk(lam, beta, beta, 0.3, n=n),
                theory.multi_stage_risk([theory.Stage(lam, n)], beta).total,
                theory.two_stage_risk(lam, lam, beta, m=3 * n, n=n).total,
                theory.tuned_ridge(lam, beta, n=n).total,
                theory.equal_budget(lam, beta, m=3 * n, n=n, sizes=[n]).two_stage,
            ]
        )

    double = all_of_them()
    with jax.enable_x64(False):
        single = all_of_them()
    assert double[0] < 1e-7
    np.testing.assert_allclose(single, double, rtol=5e-5)


def test_fields_have_one_shape():
    terms = theory.excess_risk(LAM, TRUTH, n=3, noise_var=np.arange(4.0))
    assert {x.shape for x in terms} == {(4,)}
    two = theory.two_stage_risk(LAM, LAM, TRUTH, m=9, n=7, noise_t=np.arange(4.0))
    assert two.student.mean.shape == two.student.second.shape == (4, P)
    lam, beta = theory.power_law(5, 2.0, np.array([2.0, 3.0]))
    assert lam.shape == beta.shape == (2, 5) or jnp.broadcast_shapes(lam.shape, beta.shape) == (
        2,
        5,
    )


def test_one_compilation_for_a_sweep():
    traces = []

    @jax.jit
    def swept(n, noise, ridge):
        traces.append(1)
        return risk(LAM, TRUTH, n=n, noise_var=noise, ridge=ridge)

    for setting in SETTINGS:
        swept(*(jnp.asarray(x) for x in setting))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"lam": -LAM}, ValueError, "lam must"),
        ({"lam_test": -LAM}, ValueError, "lam_test must"),
        ({"beta_star": TRUTH[:-1]}, ValueError, "beta_star must have 24 entries"),
        ({"beta_s": TRUTH[:-1]}, ValueError, "beta_s must have 24 entries"),
        ({"beta_s": TRUTH * np.nan}, ValueError, "beta_s must be finite, got nan at index 0"),
        ({"beta_star": TRUTH.astype(complex)}, TypeError, "beta_star must be a floating"),
        ({"n": 0}, ValueError, "n must be a finite number above 0"),
        ({"noise_var": -0.1}, ValueError, "noise_var must be a finite number at least 0, got -0.1"),
        ({"noise_var": None}, TypeError, "noise_var must be"),
        ({"ridge": "1"}, TypeError, "ridge must be"),
        ({"n": np.ones((2, 3)), "noise_var": np.ones(4)}, ValueError, "leading axes"),
    ],
)
def test_bad_input(change, error, words):
    given = {"lam": LAM, "beta_star": TRUTH, "n": 9, **change}
    with pytest.raises(error, match=words):
        theory.excess_risk(**given)


def test_invalid_values_in_a_trace_are_nan():
    @jax.jit
    def traced(lam, beta, n, noise, ridge):
        options = {"noise_var": noise, "ridge": ridge}
        return [
            *theory.excess_risk(lam, beta, n=n, **options)[:1],
            theory.optimal_surrogate_risk(lam, beta, n, **options),
            theory.masked_risk(lam, beta, n, **options),
            theory.train_mse(lam, beta, n=n, **options),
            theory.two_stage_risk(lam, lam, beta, m=9.0, n=n, noise_t=noise, ridge_t=ridge).total,
        ]

    good = (LAM, TRUTH, 9.0, 0.1, 0.2)
    assert all(jnp.isfinite(x) for x in traced(*good))
    for at, bad in ((0, -LAM), (1, TRUTH * np.nan), (2, 0.0), (2, -1.0), (3, -0.1), (4, -0.1)):
        values = traced(*good[:at], bad, *good[at + 1 :])
        assert all(jnp.isnan(x) for x in values), (at, values)
    for n in (P, 40.0):  # where nothing else depends on the noise
        assert all(jnp.isnan(x) for x in traced(LAM, TRUTH, n, -0.1, 0.0))
