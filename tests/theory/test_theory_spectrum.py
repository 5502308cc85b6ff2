"""The effective regularisation: identities, accuracy in both precisions, slopes of every order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import test_util

from kdjax import theory

P = 64


def spectra():
    """Named spectra, none of them sorted."""
    rng = np.random.default_rng(0)
    i = np.arange(1, P + 1.0)
    made = {
        "power": i**-1.5,
        "steep": i**-4.0,
        "exponential": 0.8**i,
        "lognormal": np.exp(3 * rng.normal(size=P)),
        "spiked": np.where(i <= 9, 1e6, 1e-6) * rng.uniform(0.5, 2, P),
        "zeros": np.where(i % 3 == 0, 0.0, i**-1.0),
        "flat": np.full(P, 2.5),
    }
    return {name: rng.permutation(lam) for name, lam in made.items()}


SPECTRA = spectra()
SIZES = (0.5, 5, 9, 21.5, 40, 42, 63, 64, 100)


def exact(lam, n, ridge):
    """tau and 1 - omega by bisection in extended precision."""
    lam, n, ridge = (np.asarray(x, np.longdouble) for x in (lam, n, ridge))
    rank = (lam > 0).sum()
    if ridge == 0 and n >= rank:
        return 0.0, float((n - rank) / n)
    low, high = np.longdouble(-200), np.longdouble(100)
    for _ in range(130):
        middle = (low + high) / 2
        tau = np.exp(middle)
        large = lam > tau
        parts = np.where(large, -tau, lam) / (lam + tau)
        low, high = (
            (middle, high) if (large.sum() - n) + parts.sum() + ridge / tau > 0 else (low, middle)
        )
    gap = (lam / (lam + tau) * tau / (lam + tau)).sum() + ridge / tau
    return float(tau), float(gap / n)


@pytest.mark.parametrize("x64", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", SPECTRA)
def test_root_is_exact(name, x64):
    with jax.enable_x64(x64):
        lam = jnp.asarray(SPECTRA[name])
        sizes, ridges = np.meshgrid(SIZES, (0.0, 1e-9, 0.3, 1e4))
        stats = theory.spectral_stats(lam, jnp.asarray(sizes), jnp.asarray(ridges))
        known = np.asarray(lam), np.asarray(jnp.asarray(sizes)), np.asarray(jnp.asarray(ridges))
    for at in np.ndindex(sizes.shape):
        tau, gap = exact(known[0], known[1][at], known[2][at])
        rtol = 1e-13 if x64 else 3e-6
        np.testing.assert_allclose(stats.tau[at], tau, rtol=rtol)
        np.testing.assert_allclose(stats.one_minus_omega[at], gap, rtol=rtol)


@pytest.mark.parametrize("name", SPECTRA)
def test_identities(name):
    with jax.enable_x64(True):
        lam = jnp.asarray(SPECTRA[name])
        rank = int((lam > 0).sum())
        n = rank / 3
        stats = theory.spectral_stats(lam, n)
        learned = 1 - stats.zeta
        np.testing.assert_allclose(learned.sum(), n, rtol=1e-12)
        np.testing.assert_allclose(stats.df1, n, rtol=1e-12)
        np.testing.assert_allclose(stats.omega + stats.one_minus_omega, 1, rtol=1e-12)
        if name == "flat":
            np.testing.assert_allclose(stats.omega, learned[0])
        else:
            assert learned.min() < stats.omega < learned.max()
        ridge = theory.spectral_stats(lam, n, 0.7)
        np.testing.assert_allclose((1 - ridge.zeta).sum() + 0.7 / ridge.tau, n, rtol=1e-12)
        # Another unit of the features is another unit of tau.
        scaled = theory.effective_reg(8 * lam, n, 8 * 0.7)
        np.testing.assert_allclose(scaled, 8 * ridge.tau, rtol=1e-12)
        turned = theory.spectral_stats(lam[::-1], n, 0.7)
        np.testing.assert_allclose(turned.zeta[::-1], ridge.zeta, rtol=1e-12)


def test_known_solutions():
    # Isotropic: n = p / (1 + tau) + ridge / tau.
    np.testing.assert_allclose(theory.effective_reg(np.ones(30), 10), 2.0, rtol=1e-6)
    assert theory.effective_reg(np.ones(30), 30) == 0
    assert theory.effective_reg(np.ones(30), 31) == 0
    tau = float(theory.effective_reg(np.ones(30), 31.0, 2.0))
    np.testing.assert_allclose(30 / (1 + tau) + 2 / tau, 31, rtol=1e-5)


def test_monotone():
    lam = SPECTRA["power"]
    by_n = theory.effective_reg(lam, jnp.linspace(1, 70, 50))
    assert jnp.all(jnp.diff(by_n)[:-7] < 0)
    assert jnp.all(by_n[-5:] == 0)
    by_ridge = theory.effective_reg(lam, 20.0, jnp.geomspace(1e-4, 1e2, 30))
    assert jnp.all(jnp.diff(by_ridge) > 0)


def test_ridgeless_is_the_limit_on_both_sides():
    with jax.enable_x64(True):
        lam = SPECTRA["power"]
        for n in (20.0, 100.0):
            limit, near = (theory.spectral_stats(lam, n, ridge) for ridge in (0.0, 1e-13))
            np.testing.assert_allclose(near.tau, limit.tau, rtol=1e-6, atol=1e-14)
            np.testing.assert_allclose(near.one_minus_omega, limit.one_minus_omega, rtol=1e-9)


def test_float32_keeps_its_digits_in_large_problems():
    """Where `1 - sum(L^2) / n` and `sum(L) - n` have lost theirs."""
    p = 100_000
    lam = np.arange(1, p + 1.0) ** -3.0
    sizes = np.array([p / 100, p / 2, p - 2.0])
    single = theory.spectral_stats(lam, sizes)
    single32 = np.asarray(jnp.asarray(lam))
    for k, n in enumerate(sizes):
        tau, gap = exact(single32, n, 0.0)
        np.testing.assert_allclose(single.tau[k], tau, rtol=3e-7)
        np.testing.assert_allclose(single.one_minus_omega[k], gap, rtol=3e-7)


@pytest.mark.parametrize(
    "name", ["zeros", *(pytest.param(x, marks=pytest.mark.slow) for x in ("power", "spiked"))]
)
@pytest.mark.parametrize(("n", "ridge"), [(20.3, 0.0), (20.3, 0.4), (90.0, 0.4)])
def test_slopes(name, n, ridge):
    with jax.enable_x64(True):
        lam = jnp.asarray(SPECTRA[name] / SPECTRA[name].max())

        def tau(log_scale, n, ridge):
            return theory.effective_reg(lam * jnp.exp(log_scale), n, ridge)

        point = jnp.zeros(P), jnp.asarray(n), jnp.asarray(ridge)
        argnums = (0, 1, 2) if ridge else (0, 1)
        for order in ("rev", "fwd"):
            free = lambda *moved: tau(*moved, *point[len(argnums) :])  # noqa: E731
            test_util.check_grads(
                free, point[: len(argnums)], 2, modes=[order], rtol=1e-4, atol=1e-9, eps=1e-5
            )


def test_slope_in_the_ridge_at_zero():
    """One-sided: tau leaves 0 as ridge / (n - rank)."""
    with jax.enable_x64(True):
        lam, n = SPECTRA["zeros"], 60.0
        rank = (lam > 0).sum()

        def stats(ridge):
            return (
                theory.spectral_stats(lam, n, ridge)[:1] + theory.spectral_stats(lam, n, ridge)[3:]
            )

        slopes = jax.jacobian(stats)(0.0)
        h = 1e-7
        for at_zero, later, slope in zip(stats(0.0), stats(h), slopes, strict=True):
            np.testing.assert_allclose(slope, (later - at_zero) / h, rtol=1e-4)
        np.testing.assert_allclose(slopes[0], 1 / (n - rank), rtol=1e-12)


def test_no_slope_is_nan():
    """At tau = 0, at n = rank, and for eigenvalues of 0."""
    lam = jnp.asarray(SPECTRA["zeros"])
    for n in (20.0, 43.0, 60.0):

        def everything(lam, n, ridge):
            stats = theory.spectral_stats(lam, n, ridge)
            return sum(jnp.sum(x) for x in stats)

        for slope in jax.grad(everything, (0, 1, 2))(lam, n, 0.0):
            assert jnp.all(jnp.isfinite(slope)), n


def test_batches_vmap_and_jit_agree():
    lam = jnp.stack([jnp.asarray(SPECTRA["power"]), jnp.asarray(SPECTRA["lognormal"])])
    n = jnp.array([[5.0], [20.0], [80.0]])
    whole = theory.spectral_stats(lam, n, 0.1)
    assert whole.tau.shape == (3, 2)
    assert whole.zeta.shape == (3, 2, P)
    one = jax.jit(lambda lam, n: theory.spectral_stats(lam, n, 0.1))
    mapped = jax.vmap(lambda n: jax.vmap(lambda lam: one(lam, n))(lam))(n[:, 0])
    for a, b in zip(whole, mapped, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    single = one(lam[1], n[2, 0])
    np.testing.assert_allclose(single.tau, whole.tau[2, 1], rtol=1e-6)


def test_dtypes():
    lam = SPECTRA["power"]
    assert theory.effective_reg(jnp.asarray(lam, jnp.bfloat16), 10).dtype == jnp.float32
    assert theory.effective_reg(np.arange(1, 10), 4).dtype == jnp.float32
    with jax.enable_x64(True):
        assert theory.effective_reg(lam, 10).dtype == jnp.float64
        assert theory.effective_reg(lam.astype(np.float32), 10).dtype == jnp.float32


def test_rank_tolerance():
    lam = np.concatenate([np.ones(20), np.full(30, 1e-12)])
    np.testing.assert_allclose(theory.spectral_stats(lam, 40, rank_tol=1e-9).one_minus_omega, 0.5)
    assert theory.effective_reg(lam, 40, rank_tol=1e-9) == 0
    assert theory.effective_reg(lam, 40) > 0


@pytest.mark.parametrize(
    ("lam", "n", "ridge", "wanted"),
    [
        ([1.0, 1e-36], 1, 0.0, 1e-18),
        (np.ones(100), 100, 1e-30, 1e-16),
        (np.concatenate([np.ones(20), np.full(30, 1e-30)]), 20, 0.0, None),
        ([1.0, 1e-100, 1e-200], 1, 0.0, 1e-50),
        ([1e200, 1e100, 1e-100], 1, 1e-250, 1e150),
    ],
)
def test_far_starts(lam, n, ridge, wanted):
    """Where Newton's doubling would take more than its steps."""
    with jax.enable_x64(True):
        tau = theory.effective_reg(lam, n, ridge)
        assert jnp.isfinite(tau)
        if wanted is not None:
            np.testing.assert_allclose(tau, wanted, rtol=1e-6)


@pytest.mark.slow
def test_slopes_in_zero_eigenvalues():
    """One-sided: what an eigenvalue does that rises from 0, which tau feels at once."""
    with jax.enable_x64(True):
        lam, beta = jnp.array([1.0, 0.4, 0.2, 0.1, 0.0, 0.0]), jnp.ones(6)
        test = jnp.linspace(0.5, 1.5, 6)
        first = theory.Moments(beta, beta**2)
        cases = {
            "tau": lambda lam: theory.effective_reg(lam, 3.0),
            "tau, ridge": lambda lam: theory.effective_reg(lam, 8.0, 0.5),
            "zeta": lambda lam: theory.spectral_stats(lam, 3.0).zeta[4],
            "gap": lambda lam: theory.spectral_stats(lam, 8.0, 0.5).one_minus_omega,
            "risk": lambda lam: theory.excess_risk(lam, beta, n=3.0, noise_var=0.1).total,
            "shifted": lambda lam: (
                theory.excess_risk(lam, beta, n=8.0, noise_var=0.1, ridge=0.5, lam_test=test).total
            ),
            "gain": lambda lam: theory.optimal_gain(lam, 3.0)[4],
            "train": lambda lam: theory.train_mse(lam, beta, n=8.0, noise_var=0.1, ridge=0.5),
            "two": lambda lam: theory.two_stage_risk(lam, test, beta, m=3.0, n=2.0).total,
            "rf": lambda lam: theory.rf_excess_risk(
                beta, theory.rf_moments(lam, first, n=3.0, k=3.5, noise_var=0.1, ridge=0.2)
            ),
        }
        h = 1e-7
        for name, of in cases.items():
            slope = jax.grad(of)(lam)[4]
            rises = [of(lam.at[4].set(k * h)) for k in range(3)]
            wanted = (-3 * rises[0] + 4 * rises[1] - rises[2]) / (2 * h)
            np.testing.assert_allclose(slope, wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_integers_do_not_wrap():
    wanted = theory.effective_reg([5e9, 1.0], 1)
    for lam in ([5_000_000_000, 1], np.array([5_000_000_000, 1])):
        np.testing.assert_allclose(theory.effective_reg(lam, 1), wanted)
    few, many = (
        theory.excess_risk(np.ones(5), np.ones(5), n=np.array([n]), noise_var=1.0).total
        for n in (3, 2**32 + 3)
    )
    assert many < 1e-6 * few
    with pytest.raises(ValueError, match="n must be a finite number"):
        theory.effective_reg([1.0], 10**400)


def test_too_few_steps_are_not_an_answer():
    assert jnp.isnan(theory.effective_reg(SPECTRA["power"], 5, max_steps=1))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([1.0, -0.5], 1), ValueError, "lam must not be negative, got -0.5 at index 1"),
        (([1.0, np.nan], 1), ValueError, "lam must be finite, got nan at index 1"),
        (([1.0, np.inf], 1), ValueError, "lam must be finite, got inf at index 1"),
        (([0.0, 0.0], 1), ValueError, "lam must have an eigenvalue above 0"),
        (([], 1), ValueError, "lam must have at least one eigenvalue"),
        (([1.0], 0), ValueError, "n must be a finite number above 0, got 0"),
        (([1.0], -3), ValueError, "n must be a finite number above 0, got -3"),
        (([1.0], np.inf), ValueError, "n must be a finite number above 0, got inf"),
        (([1.0], 1, -1.0), ValueError, "ridge must be a finite number at least 0, got -1"),
        (([1j, 1], 1), TypeError, "lam must be a floating-point array"),
        (("spectrum", 1), TypeError, "lam must be an array"),
        (([1.0], True), TypeError, "n must be a number"),
        ((np.ones((3, 4)), np.ones(2)), ValueError, "leading axes that broadcast"),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        theory.effective_reg(*arguments)


def test_rounding_of_an_eigensolver_is_no_error():
    tau = theory.effective_reg([1.0, 0.5, -1e-8], 1)
    np.testing.assert_allclose(tau, theory.effective_reg([1.0, 0.5, 0.0], 1))


@pytest.mark.parametrize(
    ("lam", "n", "ridge"),
    [
        ([1.0, -0.5], 1.0, 0.0),
        ([1.0, np.nan], 1.0, 0.0),
        ([1.0, np.inf], 1.0, 0.0),
        ([0.0, 0.0], 1.0, 0.0),
        ([1.0, 0.5], 0.0, 0.0),
        ([1.0, 0.5], -1.0, 0.5),
        ([1.0, 0.5], np.nan, 0.5),
        ([1.0, 0.5], 1.0, -0.1),
        ([1.0, 0.5], 3.0, np.nan),
    ],
)
def test_invalid_values_in_a_trace_are_nan(lam, n, ridge):
    stats = jax.jit(theory.spectral_stats)(np.array(lam), n, ridge)
    for value in (stats.tau, stats.omega, stats.one_minus_omega, stats.df1, *stats.zeta):
        assert jnp.isnan(value)
