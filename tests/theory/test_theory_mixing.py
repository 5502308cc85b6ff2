"""Label mixing: golden values, end points, the minimum, derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import theory as T

P = 500
INDEX = np.arange(1.0, P + 1)
LAM, BETA = INDEX**-2.0, INDEX**0.25
SURROGATE = np.where(INDEX <= 120, 0.8 * BETA, 0.0)
XI = (0.0, 0.25, 0.5, 0.75, 1.0, 0.6059314964207937)
RISK = (0.2777548048010875, 0.1975706521684904, 0.1590681908107145, 0.16224742072775966,
        0.20710834191962607, 0.15532634804577988)  # fmt: skip


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def problems():
    """lam, beta_star, beta_s and options: below and above the rank, ridge, shift, zeros, random."""
    rng = np.random.default_rng(3)
    lam = np.append(np.exp(rng.normal(size=60)), np.zeros(4))
    beta, other = rng.normal(size=(2, 64))
    trained = T.estimator_moments(lam, T.Moments(beta, beta**2), n=80, noise_var=0.5)
    return [
        (lam, beta, other, {"n": 30, "noise_var": 0.3}),
        (lam, beta, other, {"n": 90, "noise_var": 5.0}),
        (lam, beta, 0.9 * beta, {"n": 40, "noise_var": 0.2, "ridge": 0.7}),
        (lam, beta, other, {"n": 30, "noise_var": 0.1, "lam_test": rng.permutation(lam)}),
        (lam, beta, trained, {"n": 50, "noise_var": 2.0}),
        (lam, beta, trained, {"n": 50, "noise_var": 0.4, "ridge": 3.0, "lam_test": lam + 0.1}),
    ]


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-9), (np.float32, 5e-5)])
def test_golden(dtype, rtol):
    vectors = [x.astype(dtype) for x in (LAM, BETA, SURROGATE)]
    risk = T.mixed_label_risk(*vectors, np.array(XI, dtype), n=200, noise_var=0.1)
    best = T.optimal_mix(*vectors, n=200, noise_var=0.1)
    assert risk.dtype == best.dtype == dtype
    np.testing.assert_allclose(risk, RISK, rtol=rtol)
    np.testing.assert_allclose(best, XI[-1], rtol=rtol)


@pytest.mark.parametrize("problem", problems())
def test_end_points(problem):
    lam, beta, surrogate, options = problem
    strong = T.excess_risk(lam, beta, **options).total
    np.testing.assert_allclose(
        T.mixed_label_risk(lam, beta, surrogate, 0.0, **options), strong, rtol=1e-12
    )
    if isinstance(surrogate, T.Moments):
        quiet = {k: v for k, v in options.items() if k not in ("noise_var", "lam_test")}
        student = T.estimator_moments(lam, surrogate, **quiet)
        distilled = T.moments_excess_risk(options.get("lam_test", lam), beta, student)
    else:
        distilled = T.excess_risk(lam, beta, surrogate, **{**options, "noise_var": 0.0}).total
    np.testing.assert_allclose(
        T.mixed_label_risk(lam, beta, surrogate, 1.0, **options), distilled, rtol=1e-12
    )


@pytest.mark.parametrize("problem", problems())
def test_optimal_mix_is_the_minimum(problem):
    lam, beta, surrogate, options = problem
    best = T.optimal_mix(lam, beta, surrogate, **options)

    def risk(xi):
        return T.mixed_label_risk(lam, beta, surrogate, xi, **options)

    around = risk(best + np.array([-1.0, -0.1, -1e-3, 0.0, 1e-3, 0.1, 1.0]))
    assert np.argmin(around) == 3
    # a quadratic: three values give all others
    a, b, c = np.polyfit([-1.0, 0.0, 1.0], risk(np.array([-1.0, 0.0, 1.0])), 2)
    np.testing.assert_allclose(risk(2.5), a * 6.25 + b * 2.5 + c, rtol=1e-9)
    np.testing.assert_allclose(best, -b / (2 * a), rtol=1e-9)


def test_a_fixed_surrogate_is_a_random_one_without_variance():
    moments = T.Moments(SURROGATE, SURROGATE**2)
    for call in (T.optimal_mix, lambda *a, **k: T.mixed_label_risk(*a, 0.3, **k)):
        fixed = call(LAM, BETA, SURROGATE, n=200, noise_var=0.1)
        np.testing.assert_allclose(call(LAM, BETA, moments, n=200, noise_var=0.1), fixed)


def test_variance_of_the_surrogate_lowers_its_weight():
    noisy = T.Moments(SURROGATE, SURROGATE**2 + 0.1 * BETA**2)
    weights = [T.optimal_mix(LAM, BETA, s, n=200, noise_var=0.1) for s in (SURROGATE, noisy)]
    assert weights[1] < weights[0] - 0.01


def test_clip_and_degenerate_problems():
    lam, beta = np.ones(20), np.ones(20)
    # Strong labels are already too long for this student: it wants less than none of a longer one.
    assert T.optimal_mix(LAM, BETA, 3 * BETA, n=200) < 0
    assert T.optimal_mix(LAM, BETA, 3 * BETA, n=200, clip=True) == 0
    # Labels without noise of a surrogate that is the truth: the more, the better.
    assert T.optimal_mix(lam, beta, beta, n=10, noise_var=1.0) == 1
    assert T.optimal_mix(lam, beta, beta, n=10) == 0
    # at n = rank: noise is amplified without bound, but for xi = 1
    assert T.optimal_mix(lam, beta, 0.5 * beta, n=20, noise_var=1.0) == 1
    ends = T.mixed_label_risk(lam, beta, 0.5 * beta, np.array([0.9, 1.0]), n=20, noise_var=1.0)
    np.testing.assert_array_equal(ends, [np.inf, 5.0])
    gradient = jax.jit(jax.grad(lambda x: T.optimal_mix(lam, x * beta, beta, n=10)))(1.0)
    assert not np.isnan(gradient)


def test_no_slope_at_the_optimal_mix():
    lam, beta, surrogate, options = problems()[4]
    best = T.optimal_mix(lam, beta, surrogate, **options)
    slope = jax.jit(jax.grad(lambda xi: T.mixed_label_risk(lam, beta, surrogate, xi, **options)))
    assert abs(slope(best)) < 1e-13
    assert slope(best - 0.1) < -1e-3
    assert slope(best + 0.1) > 1e-3


def test_derivatives():
    def central(f, x, h):
        return (8 * (f(x + h) - f(x - h)) - (f(x + 2 * h) - f(x - 2 * h))) / (12 * h)

    trained = T.estimator_moments(LAM, T.Moments(BETA, BETA**2), n=120, noise_var=0.1)

    @jax.jit
    def both(xi, n, noise, ridge, scale):
        lam = LAM * (1 + scale * jnp.cos(INDEX))
        options = {"n": n, "noise_var": noise, "ridge": ridge}
        return T.mixed_label_risk(lam, BETA, trained, xi, **options) + T.optimal_mix(
            lam, BETA, trained, **options
        )

    at = (0.4, 200.0, 0.1, 0.01, 0.2)
    gradients = jax.jit(jax.grad(both, argnums=tuple(range(5))))(*at)
    for i, x in enumerate(at):
        difference = central(lambda y, i=i: both(*at[:i], y, *at[i + 1 :]), x, 1e-3 * x)
        np.testing.assert_allclose(gradients[i], difference, rtol=1e-7)


def test_batches_vmap_jit_and_low_precision():
    n = np.array([50.0, 200.0, 600.0])

    def risk(n, xi):
        return T.mixed_label_risk(LAM, BETA, SURROGATE, xi, n=n, noise_var=0.1)

    loop = [[risk(a, x) for x in XI] for a in n]
    np.testing.assert_allclose(risk(n[:, None], np.array(XI)), loop, rtol=1e-13)
    vmapped = jax.jit(jax.vmap(jax.vmap(risk, (None, 0)), (0, None)))(n, np.array(XI))
    np.testing.assert_allclose(vmapped, loop, rtol=1e-13)
    half = T.optimal_mix(
        jnp.asarray(LAM, jnp.bfloat16), jnp.asarray(BETA, jnp.bfloat16),
        jnp.asarray(SURROGATE, jnp.bfloat16), n=200, noise_var=jnp.bfloat16(0.1),
    )  # fmt: skip
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, XI[-1], rtol=0.02)


def test_bad_input():
    with pytest.raises(ValueError, match=r"^xi must be a finite number, got nan"):
        T.mixed_label_risk(LAM, BETA, SURROGATE, np.nan, n=10)
    with pytest.raises(ValueError, match=r"^beta_s must have 500 entries"):
        T.mixed_label_risk(LAM, BETA, SURROGATE[:5], 0.5, n=10)
    with pytest.raises(ValueError, match=r"^beta_s.second must have 500 entries"):
        T.optimal_mix(LAM, BETA, T.Moments(SURROGATE, SURROGATE[:5]), n=10)
    with pytest.raises(ValueError, match=r"^noise_var must"):
        T.optimal_mix(LAM, BETA, SURROGATE, n=10, noise_var=-1.0)
    with pytest.raises(ValueError, match=r"^n must"):
        T.optimal_mix(LAM, BETA, SURROGATE, n=0)
    with pytest.raises(TypeError, match=r"^beta_s must"):
        T.optimal_mix(LAM, BETA, None, n=10)


def test_invalid_under_trace_is_nan():
    risk = jax.jit(lambda xi, n, s: T.mixed_label_risk(LAM, BETA, SURROGATE, xi, n=n, noise_var=s))
    best = jax.jit(lambda n, s: T.optimal_mix(LAM, BETA, SURROGATE, n=n, noise_var=s, clip=True))
    assert np.isfinite(risk(0.5, 10.0, 0.1))
    for bad in [(np.nan, 10.0, 0.1), (0.5, -1.0, 0.1), (0.5, 10.0, -0.1)]:
        assert np.isnan(risk(*bad))
    assert np.isnan(best(0.0, 0.1))
    assert np.isnan(best(10.0, -0.1))
