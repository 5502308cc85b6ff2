"""The theory benchmarks: they run, and what they judge with can say no."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import theory as T

FOLDER = Path(__file__).parents[2] / "benchmarks"
NAMES = ("theory_figure1", "theory_scaling", "theory_equal_budget", "theory_solver")


@pytest.fixture
def script(monkeypatch):
    """Imports a script by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def ran(module, capsys, tmp_path, *options):
    """Output, numbers and figure of a quick run."""
    assert module.main(["--quick", "--out", str(tmp_path), *options]) is None
    name = module.__name__
    numbers = json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert not jax.config.jax_enable_x64
    return capsys.readouterr().out, numbers


@pytest.mark.slow
def test_figure1_agrees_with_the_reference(script, capsys, tmp_path):
    out, numbers = ran(script("theory_figure1"), capsys, tmp_path)
    assert "\nMET: all printed digits" in out
    assert "| 100 | 2.029e-04 | 0.5458 | 0.24247 | 0.16123 | 0.17025 | 64 | 100 | 1.202 |" in out
    assert numbers["points"][1]["risks"]["standard"] == pytest.approx(0.24247065866700876, 1e-12)
    assert 0 < numbers["points"][1]["error"]["mask"] < 0.02


def test_figure1_tells_what_differs(script):
    figure1 = script("theory_figure1")
    risks = {"standard": 0.11937, "optimal": 0.08325, "mask": 0.08966}
    errors = dict.fromkeys(risks, 1e-4)
    good = figure1.Point(200, 3.973e-5, 0.613, risks, 126, 203, 1.584, risks, errors)
    assert figure1.misses([good]) == []
    assert good.allowed("mask") == pytest.approx(4e-4 + 2 * 0.08966 / (200 * 0.387))
    for change, word in (
        ({"tau": 3.974e-5}, "tau is 3.974e-05, the reference 3.973e-05"),
        ({"risks": {**risks, "optimal": 0.08326}}, "optimal is 0.08326"),
        ({"kept": 202}, "kept is 202"),
        ({"mean": {**risks, "mask": 0.093}}, "Monte Carlo uses 1."),
        ({"mean": {**risks, "mask": float("nan")}}, "Monte Carlo uses"),
    ):
        (said,) = figure1.misses([good._replace(**change)])
        assert word in said
    assert "(reference 203)" in figure1.cells(good._replace(kept=202))[7]


def test_figure1_has_the_whole_grid(script):
    figure1 = script("theory_figure1")
    assert list(figure1.REFERENCE) == list(range(25, 500, 25))
    with jax.enable_x64(True):
        lam, beta = T.power_law(figure1.P, figure1.ALPHA, figure1.B)
        n = jnp.arange(25.0, 500.0, 25.0)
        stats = T.spectral_stats(lam, n)
        rows = zip(
            stats.tau,
            stats.omega,
            T.excess_risk(lam, beta, n=n).total,
            T.optimal_surrogate_risk(lam, beta, n),
            T.masked_risk(lam, beta, n),
            figure1.REFERENCE.values(),
            strict=True,
        )
        for tau, omega, *risks, known in rows:
            ours = [f"{tau:.3e}", f"{omega:.4f}", *(f"{risk:.5f}" for risk in risks)]
            assert ours == known.split()[:5]


@pytest.mark.slow
def test_scaling_runs_and_judges(script, capsys, tmp_path):
    scaling = script("theory_scaling")
    out, numbers = ran(scaling, capsys, tmp_path)
    assert "Not judged" in out
    assert "| 3, 2 | -1 [-1] |" in out
    assert "0.4860 [0.4860]" in out
    laws = [scaling.Law(**law) for law in numbers["laws"]]
    # JSON has no integer keys.
    laws = [
        law._replace(curve={k: {int(n): v for n, v in c.items()} for k, c in law.curve.items()})
        for law in laws
    ]
    steep = laws[2]
    assert steep.slope("standard") == pytest.approx(-1, abs=0.06)  # p is small
    # The law itself, constant and power, against the risk: 1 << n << p holds well for alpha = 3.
    for name in scaling.RISKS:
        assert steep.predicted(name, 400) == pytest.approx(steep.curve[name][400], rel=0.04)
    chains = {"m = n": {400: 1.0, 1600: 0.5}, "m = 10 sqrt(n)": {400: 1.0, 1600: 0.707}}
    assert scaling.misses([], chains, []) == []
    assert scaling.misses([], {**chains, "m = n": {400: 1.0, 1600: 0.7}}, [])
    rows = [scaling.Noisy(400, 0.499, 0.3154, 0.270, 1.0)]
    assert scaling.misses([], chains, rows) == []
    assert scaling.misses([], chains, [rows[0]._replace(student=0.3166)])
    assert scaling.misses([], chains, [rows[0]._replace(student=0.3120)])
    assert scaling.misses([steep._replace(exponent=1.1)], chains, [])


@pytest.mark.slow
def test_equal_budget_of_one_row(script):
    budget = script("theory_equal_budget")
    with jax.enable_x64(True):
        row = budget.measure(*T.power_law(500, 2.0, 1.5), 800, 0.0)
    assert tuple(row.cells()) == budget.REFERENCE[800, 0.0]
    good = budget.Beaten(2.9584, 0.49561, (2.9, 0.1), (0.5, 0.01), (0.3, 0.05))
    assert budget.misses([row], good) == []
    assert budget.misses([row._replace(size=495)], good)
    assert budget.misses([row], good._replace(student_mc=(0.7, 0.01)))
    assert budget.misses([row], good._replace(teacher_mc=(float("nan"), 0.01)))
    assert budget.misses([row], good._replace(student=0.4957))


@pytest.mark.slow
def test_equal_budget_agrees_with_the_reference(script, capsys, tmp_path):
    budget = script("theory_equal_budget")
    out, numbers = ran(budget, capsys, tmp_path)
    assert "\nMET: all printed digits" in out
    assert "| 800 | 0 | 0.1194 [0.1194] | 0.1194 [0.1194] | 205 [205] | 0.1025 [0.1025] |" in out
    maps = {name: np.asarray(x) for name, x in numbers["maps"].items()}
    assert maps["clean"].shape == maps["noisy"].shape == (5, 5)
    # More labels of the surrogate are never worse, and with few the student has nothing to gain.
    assert np.all(np.diff(maps["clean"][:, 2]) > -1e-9)
    assert maps["clean"][0, 2] < 0 < maps["clean"][-1, 2]
    beaten = budget.Beaten(**numbers["beaten"])
    assert beaten.student < beaten.teacher


@pytest.mark.slow
def test_solver_runs(script, capsys, tmp_path):
    out, numbers = ran(script("theory_solver"), capsys, tmp_path, "--cores", "0")
    assert "Not judged" in out
    assert "Newton steps of effective_reg" in out
    found = {(t["dtype"], t["function"]): t for t in numbers["times"]}
    assert found["float64", "brentq"]["gradient"] is None
    assert all(t["value"] > 0 for t in found.values())
    # What is differentiated through a bisection isn't the root; through Newton's steps it is.
    assert found["float64", "bisection"]["gradient_error"] > 0.01
    assert found["float64", "Newton loop"]["gradient_error"] < 1e-9
    for error in numbers["errors"]:
        worst = max(error["tau"], error["gap"], error["risk"])
        assert worst < (3e-7 if error["dtype"] == "float32" else 1e-13)


@pytest.mark.slow
def test_solver_alternatives_find_the_same_root(script):
    solver = script("theory_solver")
    with jax.enable_x64(True):
        lam, beta = T.power_law(400, 2.0, 1.5)
        ours = float(T.effective_reg(lam, 100.0))
        steps = solver.newton_steps(lam, jnp.asarray([100.0]))
        assert np.isfinite(float(T.effective_reg(lam, 100.0, max_steps=steps)))
        assert not np.isfinite(float(T.effective_reg(lam, 100.0, max_steps=steps - 1)))
        assert solver.brentq_tau(np.asarray(lam), 100) == pytest.approx(ours, rel=1e-12)
        assert float(solver.bisection_tau(lam, 100.0)) == pytest.approx(ours, rel=1e-12)
        assert float(solver.newton_tau(lam, 100.0, steps=steps)) == pytest.approx(ours, rel=1e-6)
        known = solver.exact(np.asarray(lam), np.asarray(beta), 100)
        stats = T.spectral_stats(lam, 100.0)
        risk = T.excess_risk(lam, beta, n=100.0).total
        assert known == pytest.approx(tuple(map(float, (stats.tau, stats.one_minus_omega, risk))))
    # Isotropic: tau = p / n - 1, and the risk of unit weights is p (1 - n / p).
    flat = solver.exact(np.ones(300), np.ones(300), 120)
    assert flat == pytest.approx((1.5, 0.6, 180.0))


def test_solver_judges(script):
    solver = script("theory_solver")
    fast = solver.Timed(1_000_000, "float32", "effective_reg", 0.2)
    good = solver.Error(2.0, 1_000_000, 500_000, "float32", 1e-7, 2e-7, 2.9e-7)
    assert solver.misses([fast], [good]) == []
    assert "1.00 s" in solver.misses([fast._replace(value=1.0)], [good])[0]
    assert "the risk is off by 3.1e-07" in solver.misses([fast], [good._replace(risk=3.1e-7)])[0]
    assert solver.misses([fast], [good._replace(tau=float("nan"))])
    assert solver.misses([fast], [good._replace(dtype="float64")])


@pytest.mark.parametrize("name", NAMES)
def test_help_names_command_and_source(script, capsys, name):
    module = script(name)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for word in (f"python benchmarks/{name}.py", "2410.18837", "What is claimed", "--quick"):
        assert word in out


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("theory_figure1", ["--trials", "1"], "--trials must be at least 2"),
        ("theory_equal_budget", ["--points", "1"], "--trials and --points must be at least 2"),
        ("theory_scaling", ["--p", "2000"], "--p must be above"),
    ],
)
def test_bad_options(script, capsys, name, options, message):
    with pytest.raises(SystemExit) as stop:
        script(name).main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_nothing_is_drawn_without_matplotlib(script, capsys, tmp_path, monkeypatch):
    import sys

    shared = script("_theory")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shared.keep(tmp_path / "new", "some", {"a": 1}, lambda figure: 1 / 0)
    assert json.loads((tmp_path / "new" / "some.json").read_text())["a"] == 1
    assert not (tmp_path / "new" / "some.png").exists()
    assert "some.png" not in capsys.readouterr().out
