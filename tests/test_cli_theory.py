"""``kdjax theory``: exit codes, one line for bad values, the numbers, and what is said of them."""

from __future__ import annotations

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import cli, theory
from kdjax.cli import _options, _theory, _theory_data, _theory_show, _theory_show_plan


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def problem(tmp_path):
    """A file of Gaussian features with a falling spectrum and noisy labels."""
    draw = np.random.default_rng(0)
    scale = np.arange(1, 41) ** -0.75
    features = draw.normal(size=(600, 40)) * scale
    labels = features @ (draw.normal(size=40) * scale**-0.5) + 0.5 * draw.normal(size=600)
    file = tmp_path / "problem.npz"
    np.savez(file, features=features, labels=labels)
    return file


def answer(capsys, *arguments):
    """Exit code, stdout and stderr."""
    code = cli.main(["theory", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def cells(out, name, which=0):
    """The cells of a row of a table."""
    rows = [line for line in out.splitlines() if line.startswith("│") and name in line]
    return [cell.strip() for cell in rows[which].strip("│").split("│")][1:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["risk", "--n", "0"], "--n must be an integer at least 1, got 0."),
        (["risk", "--p", "0"], "--p must be an integer at least 1, got 0."),
        (["risk", "--noise", "-1"], "--noise must be a finite number at least 0, got -1.0."),
        (["risk", "--ridge", "nan"], "--ridge must be a finite number at least 0, got nan."),
        (["risk", "--alpha", "inf"], "--alpha must be a finite number, got inf."),
        (["risk", "--m", "0"], "--m must be an integer at least 1, got 0."),
        (["risk", "--noise-s", "1"], "--noise-s must be given with --m only"),
        (["risk", "--m", "9", "--noise-s", "-1"], "--noise-s must be a finite number at least 0"),
        (["risk", "--ridge-s", "1"], "--ridge-s must be given with --m only"),
        (["risk", "--trials", "1"], "--trials must be 0 or at least 2, got 1."),
        (["risk", "--seed", "-1"], "--seed must be an integer at least 0, got -1."),
        (["risk", "--out", "figure"], "--out must be a file that ends in .png, .pdf or .svg"),
        (["risk", "--out", "no/f.png"], "--out must be in a folder that is there, got no/f.png."),
        (["risk", "--n", "many"], "many"),
        (["plan"], "--features must be given: an npz file with arrays features [N, p] and labels"),
        (["plan", "--features", "no.npz"], "--features must be a file that is there, got no.npz."),
        (["plan", "--features", "x.npz", "--n", "0"], "--n must be an integer at least 1, got 0."),
        (["plan", "--features", "x.npz", "--noise", "-1"], "--noise must be a finite number"),
        (["plan", "--features", "x.npz", "--repeats", "1"], "--repeats must be an integer at"),
        (["plot"], "theory must be followed by risk or plan, got 'plot'."),
    ],
)
def test_bad_values_get_one_line(capsys, arguments, message):
    code, out, err = answer(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("kdjax: ")
    assert message in err


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((20, 3))}, "an npz file with arrays features and labels, or x_train"),
        ({"arr_0": np.zeros((20, 3))}, "has arr_0; np.savez(file, features=..., labels=...) names"),
        ({"features": np.zeros((20, 3))}, "which has features."),
        (
            {"features": np.zeros(20), "labels": np.zeros(20)},
            "must hold numbers [N, p] as features",
        ),
        ({"features": np.zeros((20, 3)), "labels": np.zeros(9)}, "must hold 20 labels"),
        (
            {"features": np.zeros((20, 3)), "labels": np.array(["a"] * 20)},
            "for classes, encode them as integers 0..K-1.",
        ),
        ({"features": np.zeros((3, 3)), "labels": np.zeros(3)}, "at least 10 labelled rows, got 3"),
        ({"x_train": np.array([[None]] * 20), "y_train": np.zeros(20)}, ", of numbers, got"),
    ],
)
def test_bad_files_get_one_line(capsys, tmp_path, arrays, message):
    np.savez(tmp_path / "f.npz", **arrays)
    code, out, err = answer(capsys, "plan", "--features", "f.npz")
    assert (code, out) == (2, "")
    assert err.startswith("kdjax: --features must ")
    assert message in err
    assert err.count("\n") == 1


def test_a_file_that_is_no_npz(capsys, tmp_path):
    (tmp_path / "f.npz").write_text("hello")
    code, _, err = answer(capsys, "plan", "--features", "f.npz")
    assert code == 2
    wanted = "an npz file with arrays features and labels, or x_train and y_train"
    assert err == f"kdjax: --features must be {wanted}, of numbers, got f.npz.\n"
    np.save(tmp_path / "f.npy", np.zeros((20, 3)))
    code, _, err = answer(capsys, "plan", "--features", "f.npy")
    assert code == 2
    assert err == (
        f"kdjax: --features must be {wanted}, got f.npy with one unnamed float64 array of shape "
        "(20, 3).\n"
    )


def test_images_and_classes_are_read(tmp_path):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 255, (30, 4, 5), dtype=np.uint8)
    classes = np.arange(30)[:, None] % 3
    classes[:5] = -1
    np.savez(tmp_path / "f.npz", x_train=images, y_train=classes, x_test=images[:3])
    data = _theory_data.read("f.npz")
    assert data.name == "f"
    assert data.features.shape == (25, 20)
    assert data.features.dtype == np.float64
    np.testing.assert_array_equal(data.features[0], images[5].ravel())
    np.testing.assert_array_equal(data.labels, classes[5:, 0])


def test_help_is_quick_and_lists_both(capsys, monkeypatch):
    code, out, _ = answer(capsys)
    assert code == 0
    assert "kdjax theory risk" in out
    assert "kdjax theory plan" in out
    assert answer(capsys, "--help")[1] == out
    monkeypatch.setenv("COLUMNS", "80")
    for command, words in (
        ("risk", ("(default: 500)", "(default: 1.5)", "kdjax theory risk --m 800", "default 200")),
        ("plan", ("(required)", "features [N, p]", "default estimated from the data")),
    ):
        code, out, _ = answer(capsys, command, "--help")
        assert code == 0
        assert all(word in " ".join(out.split()) for word in words if word != "default 200")
        assert max(map(len, out.splitlines())) <= 80
    code = (
        "import sys\nfrom kdjax import cli\n"
        "for words in (['--help'], ['theory'], ['theory', 'risk', '--help'],\n"
        "              ['theory', 'plan', '--help'], ['distill', '--help']):\n"
        "    assert cli.main(words) == 0\n"
        "print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "kdjax theory " in done.stdout


def test_figure_1_is_the_default(capsys):
    code, out, err = answer(capsys, "risk")
    assert (code, err) == (0, "")
    assert cells(out, "true labels (standard)") == ["0.1194"]
    assert cells(out, "optimal surrogate") == ["0.08325"]
    assert cells(out, "optimal 0-1 mask") == ["0.08966"]
    assert (cells(out, "gain", 0), cells(out, "gain", 1)) == (["30.3 %"], ["24.9 %"])
    assert cells(out, "weights made larger") == ["126"]
    assert cells(out, "features kept") == ["203"]
    assert cells(out, "tau") == ["3.973e-05"]
    assert cells(out, "Omega") == ["0.6130"]
    assert cells(out, "risk per unit of noise") == ["1.584"]
    text = " ".join(out.split())
    assert "C (n / 1.571)^-0.5, C = 3.332 for true labels, 2.052" in text
    assert "take away 30.3 % of the risk that true labels leave" in text
    assert "dropping the last 297 of 500 features from the labels takes away 24.9 %" in text
    assert "not its exponent" in text
    assert not jax.config.jax_enable_x64


def test_several_n_and_noise(capsys):
    code, out, _ = answer(capsys, "risk", "--n", "400", "50", "--noise", "0.05")
    assert code == 0
    assert cells(out, "true labels (standard)") == ["0.4645", "0.2681"]
    assert cells(out, "optimal surrogate") == ["0.3215", "0.2636"]
    assert cells(out, "so noise adds") == ["0.05361", "0.2419"]


def test_tables_are_split_to_fit(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = answer(capsys, "risk", "--n", *map(str, range(50, 500, 50)))
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("true labels (standard)") == 3
    assert "…" not in out


def test_where_nothing_is_gained(capsys):
    _, out, _ = answer(capsys, "risk", "--p", "50", "--n", "80", "--noise", "1")
    text = " ".join(out.split())
    assert "no surrogate beats true labels here: with at least as many samples as features" in text
    assert cells(out, "gain") == ["0.0 %"]
    _, out, _ = answer(capsys, "risk", "--alpha", "0", "--b", "0", "--n", "100")
    assert "all features are learned equally well" in " ".join(out.split())
    assert "Scaling law" not in out


def test_mostly_noise_is_said(capsys):
    _, out, _ = answer(capsys, "risk", "--n", "450", "--noise", "1")
    assert "is noise on the student's labels" in " ".join(out.split())


def test_two_stages(capsys):
    assert "noise" not in answer(capsys, "risk", "--m", "3200")[1].split("surrogate of m")[1][:400]
    _, out, _ = answer(capsys, "risk", "--m", "3200", "--noise-s", "0.05")
    assert cells(out, "true labels, noise 0.05") == ["0.1986"]
    assert cells(out, "its student", 0) == ["0.1282"]
    assert cells(out, "its student", 1) == ["0.09472"]
    assert cells(out, "best with first features") == ["199"]
    text = " ".join(out.split())
    assert "trained on 3,200 true labels of the first 199 features leaves its student 52." in text
    assert "less risk than n true labels with noise 0.05 too would" in text
    assert "the student is not better than that surrogate" in text
    _, out, _ = answer(capsys, "risk", "--m", "200")
    assert "of all features leaves its student 28.5 % more risk" in " ".join(out.split())


def test_the_noise_of_the_surrogate_is_that_of_the_student_by_default(capsys):
    _, out, _ = answer(capsys, "risk", "--m", "800", "--noise", "0.05")
    _, same, _ = answer(capsys, "risk", "--m", "800", "--noise", "0.05", "--noise-s", "0.05")
    assert out == same
    assert "true labels, noise" not in out
    # All gains are over the same row.
    standard, student = (float(cells(out, name)[0]) for name in ("(standard)", "its student"))
    assert float(cells(out, "gain", 2)[0][:-2]) == pytest.approx(
        100 * (1 - student / standard), abs=0.1
    )
    text = " ".join(out.split())
    assert "of the risk that true labels of the same noise leave" in text
    assert "than n true labels would" in text
    _, clean, _ = answer(capsys, "risk", "--m", "800", "--noise", "0.05", "--noise-s", "0")
    assert cells(clean, "true labels, noise 0") == ["0.1194"]


def test_the_peak_has_no_gains(capsys):
    _, out, _ = answer(capsys, "risk", "--p", "50", "--n", "50", "--noise", "0.1", "--m", "70")
    assert cells(out, "true labels (standard)") == ["inf"]
    for which in range(4):
        assert cells(out, "gain", which) == ["-"]
    assert cells(out, "best with first features") == ["-"]
    text = " ".join(out.split())
    assert "Meaning: no finite risk to be compared." in text
    assert "gains to or over it are shown as -" in text
    _, out, _ = answer(capsys, "risk", "--p", "50", "--n", "25", "50", "--noise", "0.1")
    assert "Meaning: at n = 25, labels of the best surrogate" in " ".join(out.split())
    assert "-e" not in "".join("".join(cells(out, name)) for name in ("(standard)", "optimal sur"))


def test_nothing_is_below_zero(capsys):
    _, out, _ = answer(capsys, "risk", "--p", "50", "--n", "80", "60", "--m", "300")
    assert not re.search(r"│ +-", out)
    assert _theory_show.number(-0.0) == "0"


@pytest.mark.slow
def test_simulation_stands_beside_the_theory(capsys):
    arguments = ["risk", "--p", "40", "--n", "16", "--trials", "60"]
    code, out, _ = answer(capsys, *arguments)
    assert code == 0
    assert answer(capsys, *arguments)[1] == out
    assert answer(capsys, *arguments, "--seed", "1")[1] != out
    lam, _ = theory.power_law(40, 2.0, 1.5)
    spread = 2 / (16 * float(theory.spectral_stats(lam, 16).one_minus_omega))
    for i, name in enumerate(("true labels (standard)", "optimal surrogate", "optimal 0-1 mask")):
        value = float(cells(out, name)[0])
        mean, error = map(float, cells(out, "simulated", i)[0].split("±"))
        assert abs(mean - value) <= 4 * error + spread * value
        assert error > 0


def test_the_parts_of_a_simulation():
    for trials in (0, 2, 25, 26, 100, 101):
        parts = _theory._parts(trials)
        assert sum(parts) >= trials
        assert sum(parts) - trials < max(1, len(parts))
        assert len(set(parts)) <= 1


@pytest.mark.slow
def test_figures(capsys, tmp_path):
    code, out, _ = answer(
        capsys,
        "risk",
        "--p",
        "30",
        "--n",
        "10",
        "20",
        "--m",
        "60",
        "--trials",
        "4",
        "--out",
        "f.png",
    )
    assert code == 0
    assert "figure f.png" in " ".join(out.split())
    assert (tmp_path / "f.png").stat().st_size > 20_000


def test_relative_gains():
    assert _theory.relative(2.0, 1.0) == 0.5
    assert _theory.relative(2.0, 3.0) == -0.5
    assert _theory.relative(0.0, 0.0) == 0.0
    assert np.isnan(_theory.relative(np.inf, np.inf))
    assert _theory.relative(np.inf, 1.0) == 1.0
    assert _theory.relative(0.0, 1.0) == -1.0


def test_numbers():
    shown = [_theory_show.number(x) for x in (0.1193670, 1.0, 12345.6, 0.0, 1e-7, np.inf, -0.02)]
    assert shown == ["0.1194", "1.000", "12346", "0", "1.000e-07", "inf", "-0.02000"]
    assert _theory_show.percent(-0.00001) == "0.0 %"
    assert _theory_show.percent(0.3034) == "30.3 %"
    assert [_theory_show.percent(x) for x in (np.nan, -np.inf)] == ["-", "-"]


def test_trust():
    good = _theory.Curve(0.0, (10, 20), (1.0, 0.5), (1.05, 0.52), (0.01, 0.01))
    assert good.off() == pytest.approx(0.03 / 1.05)
    trust = _theory_show_plan.trust
    assert trust([good]) == [
        "Ridge 0: it can be trusted: off by up to 4.8 %, 2.9 % beyond two standard errors."
    ]
    assert "holds roughly: off by up to 23.8 %" in trust([good._replace(predicted=(1.3, 0.5))])[0]
    bad = good._replace(ridge=2.0, predicted=(3.0, 0.5))
    assert "Ridge 2: it can NOT be trusted" in trust([bad])[0]
    # Where the prediction diverges there is nothing to compare.
    assert "be trusted at" not in trust([good._replace(predicted=(np.inf, 0.5))])[0]
    assert "diverges at every n" in trust([good._replace(predicted=(np.inf, np.inf))])[0]


def test_a_measurement_without_power_tells_nothing():
    curve = _theory.Curve(0.0, (10, 20), (1.0, 0.5), (1.05, 0.52), (0.01, 0.04))
    assert curve.off() == pytest.approx(0.03 / 1.05)
    told = _theory_show_plan.trust([curve])[0]
    assert "it can be trusted at n = 10: off by up to 4.8 %, 2.9 % beyond" in told
    assert "At n = 20 it can't be told: off by up to 3.8 %" in told
    assert _theory_show_plan.doubt(curve) == curve.off()
    none = curve._replace(error=(0.2, 0.04))
    assert none.off() == 0.0
    told = _theory_show_plan.trust([none])[0]
    assert "it can't be told: off by up to 4.8 %, but two standard errors are at least 15." in told
    assert _theory_show_plan.doubt(none) == pytest.approx(0.08 / 0.52)
    # What would be off beyond that is seen all the same.
    assert "NOT" in _theory_show_plan.trust([none._replace(predicted=(1.0, 1.5))])[0]


def test_sizes_at_which_the_theory_is_tested():
    assert _theory._check_sizes(1000, 1000) == (50, 126, 317, 800)
    assert _theory._check_sizes(1000, 200) == (50, 126, 200, 317, 800)
    assert _theory._check_sizes(1000, 300) == (50, 126, 300, 800)
    assert all(4 <= n <= 8 for n in _theory._check_sizes(10, 5))


def test_sizes_of_a_surrogate():
    np.testing.assert_array_equal(_theory.surrogate_sizes(30), np.arange(1, 31))
    sizes = _theory.surrogate_sizes(10_000)
    assert sizes[0] == 1
    assert sizes[-1] == 10_000
    assert len(sizes) <= 500
    assert np.all(np.diff(sizes) > 0)


@pytest.mark.slow
def test_plan_predicts_what_it_measures(capsys, monkeypatch, problem, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = answer(
        capsys, "plan", "--features", str(problem), "--n", "30", "--repeats", "8", "--out", "p.png"
    )
    assert code == 0
    text = " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    assert "problem: 600 rows, 40 features" in text
    assert re.search(r"Ridge [\d.]+: it (can be trusted|holds roughly)", text)
    assert "mean of 8 fits ± its standard error" in text
    assert "Predicted for n = 30, m = 570, ridge 0" in text
    for line in ("Surrogate: would", "Mask: ", "Mixing: ", "Caveats: ", "carry no noise here",
                 "Without any surrogate: error "):  # fmt: skip
        assert line in text
    assert (tmp_path / "p.png").stat().st_size > 20_000
    with jax.enable_x64(True):
        data = _theory_data.read(str(problem))
        found = theory.plan(
            theory.estimate(jnp.asarray(data.features), jnp.asarray(data.labels)), n=30, m=570
        )
    shown = _theory_show.number(found.tuned.standard.risk + found.noise_var)
    assert cells(out, "│ n true labels", 1)[0] == shown
    shown = _theory_show.number(found.tuned.together.risk + found.noise_var)
    assert cells(out, "n + m true labels", 1)[0] == shown
    ridges = (found.tuned.two_stage.ridge, found.tuned.two_stage.surrogate_ridge)
    assert cells(out, "surrogate, top", 1)[-2:] == [f"{ridge:.2g}" for ridge in ridges]


def test_plan_takes_the_noise_it_is_told(capsys, problem):
    _, out, _ = answer(
        capsys, "plan", "--features", str(problem), "--noise", "0.125", "--repeats", "2"
    )
    text = " ".join(out.split())
    assert "Of that 0.1250 is noise (as given)" in text
    assert "Predicted for n = 600, m = 600, ridge 0" in text
    assert "fewer than n + m = 1,200" in text


def answers(**risks):
    """Answers with these risks, against 1 for true labels."""
    found = {
        name: theory.Answer(risk, 1 - risk, 0.5, 0.1, 0.9, 5, 0.25)
        for name, risk in {
            "standard": 1.0, "direct": 0.8, "together": 0.95, "optimal": 0.5, "mask": 0.6,
            "two_stage": 1.2, "mixed": 0.9, **risks,
        }.items()
    }  # fmt: skip
    return theory.Answers(**found)


@pytest.mark.parametrize(
    ("risks", "off", "words"),
    [
        ({}, 0.0, ("Surrogate: would not help", "Mask: would help.", "Mixing: would help.")),
        ({"two_stage": 0.7}, 0.05, ("Surrogate: would help. Trained on 400",)),
        (
            {"two_stage": 0.9},
            0.05,
            (
                "Surrogate: would help over n true labels, but the m true labels used directly "
                "would give 1.050.",
            ),
        ),
        (
            {"together": 0.7},
            0.0,
            (
                "Mixing: would help over n true labels, but the n + m true labels used directly "
                "would give 0.9500.",
                "Mask: would help.",
            ),
        ),
        (
            {"mixed": 0.95},
            0.05,
            ("Mixing: can't be told to help", "less than the theory may be off"),
        ),
        ({"mixed": 0.995}, 0.0, ("Mixing: can't be told to help", "next to nothing")),
        ({"mixed": 1.0}, 0.0, ("Mixing: would not help",)),
    ],
)
def test_what_is_said_of_a_plan(risks, off, words):
    found = theory.Plan(100, 400, 0.25, 2.0, answers(), answers(**risks))
    said = " ".join(_theory_show_plan.plan_sentences(found, 10, off))
    assert "Without any surrogate: error 1.250 from n = 100 true labels, 1.050 from m = 400" in said
    for word in words:
        assert word in said
    assert "with 5 of 10 directions" in said


def test_defaults_are_those_of_figure_1():
    options = _options.TheoryRisk()
    assert (options.p, options.alpha, options.b, options.n) == (500, 2.0, 1.5, (200,))
