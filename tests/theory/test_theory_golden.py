"""The closed forms against values of an independent float64 implementation.

`golden_theory.*` holds spectra, surrogates and results for one and two trainings, and the curves of
Figure 1 of Ildiz et al. (ICLR 2025).
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax import theory

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden_theory.json").read_text())
ARRAYS = np.load(HERE / "golden_theory.npz")
ONE = [case for case in GOLDEN["cases"] if case["kind"] == "one_stage"]
TWO = [case for case in GOLDEN["cases"] if case["kind"] == "two_stage"]
SIZE = 512
TERMS = {"total": "risk", "bias": "bias", "var_signal": "var_signal", "var_noise": "var_noise",
         "gamma2": "gamma2"}  # fmt: skip


def named(cases):
    return {"argvalues": cases, "ids": [case["name"] for case in cases]}


def arrays(case):
    """The arrays of a case, padded with eigenvalues of 0, which must not change anything.

    With one length for all cases, each function is compiled once.
    """
    prefix = case["name"] + "/"
    names = [key for key in ARRAYS.files if key.startswith(prefix)]
    return {
        key.removeprefix(prefix): np.pad(ARRAYS[key], (0, SIZE - ARRAYS[key].size)) for key in names
    }


@pytest.fixture(params=[True, False], ids=["float64", "float32"])
def rtol(request):
    with jax.enable_x64(request.param):
        yield 1e-9 if request.param else 5e-5


def close(got, wanted, rtol):
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=rtol)


@pytest.mark.parametrize("case", **named(ONE))
def test_statistics(case, rtol):
    a = arrays(case)
    stats = theory.spectral_stats(a["lam"], case["n"], case["ridge"])
    close(stats.tau, case["tau"], rtol)
    close(stats.omega, case["Omega"], rtol)
    close(stats.one_minus_omega, case["one_minus_Omega"], rtol)
    close(stats.df1, case["df1"], rtol)


@pytest.mark.parametrize("case", **named(ONE))
def test_one_training(case, rtol):
    a = arrays(case)
    lam, truth = a["lam"], a["beta_star"]
    n, noise, ridge = case["n"], case["sigma2"], case["ridge"]
    test = {"lam_test": a.get("lam_test")}
    gain = theory.optimal_gain(lam, n, ridge, **test)
    close(gain[: case["p"]], a["gain_opt"][: case["p"]], rtol)
    surrogates = {
        "standard": None,
        "optimal": theory.optimal_surrogate(lam, truth, n, ridge=ridge, **test),
        "mask": np.where(a["keep_mask"], truth, 0),
        "half": truth / 2,
        "perturbed": a["beta_perturbed"],
    }
    for name, surrogate in surrogates.items():
        wanted = case["surrogates"][name]
        got = theory.excess_risk(lam, truth, surrogate, n=n, noise_var=noise, ridge=ridge, **test)
        for ours, theirs in TERMS.items():
            # A bias of 0 is a sum of squares of roundings.
            np.testing.assert_allclose(
                getattr(got, ours), wanted[theirs], rtol=rtol, atol=1e-12, err_msg=f"{name} {ours}"
            )
    wanted = case["surrogates"]
    options = {"noise_var": noise, "ridge": ridge, **test}
    close(theory.optimal_surrogate_risk(lam, truth, n, **options), wanted["optimal"]["risk"], rtol)
    close(
        theory.masked_risk(lam, truth, n, mask=a["keep_mask"], **options),
        wanted["mask"]["risk"],
        rtol,
    )
    np.testing.assert_array_equal(theory.optimal_mask(lam, n, ridge), a["keep_mask"])


@pytest.mark.slow
@pytest.mark.parametrize("case", **named(ONE))
def test_slopes_of_tau(case, rtol):
    lam = jax.numpy.asarray(arrays(case)["lam"])
    grads = jax.grad(theory.effective_reg, (0, 1, 2))(lam, float(case["n"]), float(case["ridge"]))
    close(grads[1], case["dtau_dn"], rtol)
    close(grads[0][0], case["dtau_dlam0"], rtol)
    if case["dtau_dridge"] is None:  # at tau = 0, where the slope is one-sided: 1 / (n - rank)
        close(grads[2], 1 / (case["n"] - case["p"]), rtol)
    else:
        close(grads[2], case["dtau_dridge"], rtol)


@pytest.mark.parametrize("case", **named(TWO))
def test_two_trainings(case, rtol):
    a = arrays(case)
    sizes = {
        "m": case["m"], "n": case["n"], "noise_s": case["sigma2_s"], "noise_t": case["sigma2_t"],
        "ridge_s": case["ridge_s"], "ridge_t": case["ridge_t"], "mask": a["surrogate_mask"],
    }  # fmt: skip
    got = theory.two_stage_risk(a["lam_s"], a["lam_t"], a["beta_star"], **sizes)
    close(got.total, case["risk"], rtol)
    close(got.surrogate, case["surrogate_risk"], rtol)
    close(got.moments.mean, a["surrogate_mean"], rtol)
    close(got.moments.second, a["surrogate_second"], rtol)
    exact = theory.two_stage_risk(a["lam_s"], a["lam_t"], a["beta_star"], **sizes, exact_ols=True)
    close(exact.total, case["risk_exact_ols"], rtol)
    close(exact.surrogate, case["surrogate_risk_exact_ols"], rtol)


def test_figure_1(rtol):
    lam, truth = theory.power_law(500, 2.0, 1.5)
    curve = GOLDEN["figure1"]
    n = np.array([point["n"] for point in curve], float)
    stats = theory.spectral_stats(lam, n)
    got = {
        "tau": stats.tau,
        "Omega": stats.omega,
        "standard": theory.excess_risk(lam, truth, n=n).total,
        "optimal": theory.optimal_surrogate_risk(lam, truth, n),
        "mask": theory.masked_risk(lam, truth, n),
        "noise_multiplier": theory.excess_risk(lam, truth, n=n, noise_var=1.0).var_noise,
    }
    for name, values in got.items():
        close(values, [point[name] for point in curve], rtol)
    kept = theory.optimal_mask(lam, n).sum(-1)
    amplified = (theory.optimal_gain(lam, n) > 1).sum(-1)
    np.testing.assert_array_equal(kept, [point["n_kept"] for point in curve])
    np.testing.assert_array_equal(amplified, [point["n_amplified"] for point in curve])


def test_figure_1_gains():
    """Printed values of part (a), n = 200."""
    with jax.enable_x64(True):
        lam, _ = theory.power_law(500, 2.0, 1.5)
        gain = np.asarray(theory.optimal_gain(lam, 200))
        stats = theory.spectral_stats(lam, 200)
    assert f"{stats.tau:.5e} {stats.omega:.6f}" == "3.97337e-05 0.612985"
    shown = [f"{gain[i - 1]:.5f}" for i in (1, 10, 50, 100, 126, 127, 150, 200, 300, 500)]
    assert shown == ["1.00004", "1.00395", "1.08242", "1.11782", "1.00034", "0.99416", "0.83587",
                     "0.51777", "0.21530", "0.06951"]  # fmt: skip
    assert f"{gain.max():.3f}" == "1.139"
