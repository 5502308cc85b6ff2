"""``kdjax robust``: one line for every bad value, help, and tiny runs from end to end."""

from __future__ import annotations

import dataclasses
import inspect
import json

import jax
import optax
import pytest
from tiny_images import noisy_classes

import kdjax as kd
from kdjax import cli
from kdjax.cli import _options, _robust
from kdjax.experiments import robust, robust_figures, runs
from kdjax.experiments._robust_progress import Progress

TINY = [
    "--model", "mlp_small", "--epochs", "3", "--batch-size", "32", "--attack-steps", "2",
    "--eps", "1/20", "--seeds", "1", "--validation", "20",
]  # fmt: skip


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """A file of tiny images of four classes."""
    return noisy_classes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def done(npz, tmp_path_factory):
    """A finished run: its folder."""
    out = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robust_figures, "curves", lambda *_: None)
        patch.setattr(robust_figures, "perturbed", lambda *_: None)
        assert cli.main(["robust", "train", "--data", str(npz), "--out", str(out), *TINY]) == 0
    return out


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Whatever a command leaves, it leaves there; and a table has room."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def answer(capsys, *arguments):
    """Exit code, stdout and stderr."""
    code = cli.main(["robust", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes longer than a tiny training."""
    monkeypatch.setattr(robust_figures, "curves", lambda *_: None)
    monkeypatch.setattr(robust_figures, "perturbed", lambda *_: None)


def table(text):
    """The lines of a table."""
    rows = [line for line in text.splitlines() if "│" in line]
    assert rows
    return rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eps", "8/0"], "--eps must be a number or a fraction such as 8/255, got '8/0'."),
        (["--eps", "a"], "--eps must be a number or a fraction such as 8/255, got 'a'."),
        (["--eps", "-1"], "--eps must be a finite number above 0, got -1.0."),
        (["--step-size", "1/x"], "--step-size must be a number or a fraction"),
        (["--norm", "l1"], "--norm"),
        (["--method", "pgd"], "--method"),
        (["--method", "all", "at"], "--method must be all alone or a list, got all at."),
        (["--method", "at", "at"], "--method must name each method once"),
        (["--epochs", "0"], "--epochs must be an integer at least 1, got 0."),
        (["--seeds", "0"], "--seeds must be an integer at least 1, got 0."),
        (["--devices", "3"], "--batch-size must be a multiple of the 3 devices, got 50."),
        (["--devices", "99"], "--devices must be at most 8, the cpu devices there are, got 99."),
        (["--examples", "9999"], "--examples must be an integer at least 1 and at most 1168"),
        (["--batch-size", "301"], "--batch-size must be at most 300"),
        (["--validation", "9"], "--validation must be left out for data set 'digits'"),
        (["--label-noise", "1"], "--label-noise must be a finite number at least 0 and below 1"),
        (["--temperature", "1", "2"], "--temperature must fall over training"),
        (["--mix", "0.9", "0.1"], "--mix must rise over training"),
        (["--ema-decay", "2"], "--ema-decay must be a finite number at least 0 and at most 1"),
        (["--auto-attack", "9999"], "--auto-attack must be an integer at least 0 and at most 449"),
        (["--model", "resnet9"], "--model must be one of convnet, "),
        (["--data", "no.npz"], "--data must be a file that is there, got no.npz."),
        (["--data", "mnist"], "--data must be digits, a PATH.npz or tfds:NAME, got 'mnist'."),
        (["--data", "tfds:no_such_set"], "data 'tfds:no_such_set' can't be read: "),
        (["--data-dir", "here"], "--data-dir must be given with tfds:NAME only"),
        (["--out", "."], "--out must be a new folder, got ., which exists; --resume continues"),
        (["--resume"], "--out must be given to resume"),
        (["--resume", "--out", "nowhere"], "--out must be the folder of a run to resume"),
    ],
)
def test_bad_values_get_one_line(capsys, tmp_path, arguments, message):
    (tmp_path / "something").touch()
    code, out, err = answer(capsys, "train", *arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("kdjax: ")
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_unknown_words(capsys):
    code, _, err = answer(capsys, "attack")
    assert (code, err) == (
        2, "kdjax: robust must be followed by train or evaluate, got 'attack'.\n",
    )  # fmt: skip
    code, _, err = answer(capsys, "train", "--radius", "1")
    assert code == 2
    assert "--radius" in err
    assert "Traceback" not in err
    code, _, err = answer(capsys, "evaluate")
    assert (code, err.count("\n")) == (2, 1)


def test_help_is_worth_reading(capsys):
    code, out, _ = answer(capsys)
    assert code == 0
    assert answer(capsys, "--help")[1] == out
    assert "kdjax robust evaluate runs/robust/adr/seed-0" in out
    cli.main(["--help"])
    assert "kdjax robust" in capsys.readouterr().out
    code, out, _ = answer(capsys, "train", "--help")
    assert code == 0
    words = (
        "--eps NUMBER", "fraction such as 8/255", "never on the test split",
        "kdjax robust train --method all --awp", "default 32 of the digits", "(default: 3)",
        "--auto-attack-weights", "PGD adversarial training",
    )  # fmt: skip
    flat = " ".join(out.replace("│", " ").split())
    for word in words:
        assert word in flat
    code, out, _ = answer(capsys, "evaluate", "--help")
    assert code == 0
    for word in ("--weights", "student,ema", "(default: 1000)", "standard,plus,rand", "FOLDER"):
        assert word in out


def test_defaults_are_those_of_the_experiment():
    parameters = inspect.signature(robust.compare).parameters
    kinds = (_options.RobustData(), _options.RobustMethod(), _options.RobustAttack())
    for options in kinds:
        for name, value in dataclasses.asdict(options).items():
            if name not in ("data", "data_dir"):
                assert parameters[name].default == value, name
    parameters = inspect.signature(robust.evaluate).parameters
    for field in dataclasses.fields(_options.RobustEvaluate):
        if field.name not in ("run_folder", "data", "data_dir"):
            assert parameters[field.name].default == field.default, field.name


def test_run_leaves_what_it_says(capsys, npz, tmp_path):
    two = ["--method", "adr", "at", "--seeds", "2", "--epochs", "1"]
    code, out, err = answer(capsys, "train", "--data", str(npz), *TINY, *two)
    assert code == 0
    for word in (
        "tiny: 100 training images, 20 held out, 40 for testing; mlp_small, linf eps 0.05",
        "1 epochs, 2 seeds", "Test accuracy, in %", "Overfitting, and calibration", "PGD-20",
        "AT over ADR, student, in points:", "under PGD-20 at the last epoch; paired by seed.",
        "the test images chose nothing", "kdjax robust evaluate runs/robust-1/at/seed-0",
    ):  # fmt: skip
        assert word in " ".join(out.split())
    assert "AutoAttack" not in out
    for name in ("curves.png", "perturbed.png", "robust.json"):
        assert f"runs/robust-1/{name}" in out
        assert (tmp_path / "runs" / "robust-1" / name).exists()
    lines = err.splitlines()
    assert len(lines) == 8  # trained and measured, as there is no terminal
    assert lines[0].startswith("ADR, seed 0: ")
    assert "validation: clean " in lines[0]
    assert lines[7].startswith("AT, seed 1, measuring: ")
    assert _robust.out_folder(_options.RobustRun()).name == "robust-2"
    assert _robust.out_folder(_options.RobustRun(resume=True)).name == "robust-1"


def test_table_fits_a_narrow_terminal(capsys, done, monkeypatch, no_figures):
    for columns in (50, 60):
        monkeypatch.setenv("COLUMNS", str(columns))
        code, out, _ = answer(capsys, "train", "--resume", "--out", str(done))
        assert code == 0
        accuracies = out[: out.index("Overfitting")]
        assert "…" not in accuracies
        assert max(map(len, table(accuracies))) <= columns
        assert ("at the best" in accuracies) == (columns == 50)


def test_resume_gives_the_same_table(capsys, npz, done, tmp_path, monkeypatch, no_figures):
    out = tmp_path / "cut"
    at, calls = Progress.at, []

    def stopped(self, passes, note=""):
        calls.append(passes)
        if len(calls) == 6:
            raise KeyboardInterrupt
        at(self, passes, note)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "at", stopped)
        code, _, err = answer(capsys, "train", "--data", str(npz), "--out", str(out), *TINY)
    assert code == 130
    assert err.splitlines()[-1] == (
        f"kdjax: stopped; continue with: kdjax robust train --resume --out {out}"
    )
    first = answer(capsys, "train", "--resume", "--out", str(out))
    with monkeypatch.context() as patch:
        patch.setattr(kd.train, "fit", None)
        again = answer(capsys, "train", "--resume", "--out", str(out))
    unbroken = answer(capsys, "train", "--resume", "--out", str(done))
    assert first[0] == again[0] == unbroken[0] == 0
    assert again[1] == first[1]
    assert table(unbroken[1]) == table(first[1])


def test_resume_refuses(capsys, done, tmp_path):
    code, _, err = answer(capsys, "train", "--resume", "--out", str(done), "--eps", "0.2")
    assert (code, err) == (2, f"kdjax: --eps must be 0.05 to continue {done}, got 0.2.\n")
    (tmp_path / "other").mkdir()
    settings = {"settings": {}, "about": {"options": {}}, "seconds": 0}
    (tmp_path / "other" / "settings.json").write_text(json.dumps(settings))
    code, _, err = answer(capsys, "train", "--resume", "--out", "other")
    assert code == 2
    assert "It wasn't made by kdjax robust train." in err


def test_other_commands_read_its_folders(capsys, done):
    found = json.loads((done / "robust.json").read_text())
    for row in found["rows"]:
        folder = done / row["method"] / "seed-0" / ("ema" if row["weights"] == "ema" else "")
        assert cli.main(["evaluate", str(folder)]) == 0
        out = capsys.readouterr().out
        assert f"{100 * row['last']['clean'][0]:.2f} %" in out
        assert f"{row['method']} mlp_small (seed 0) on tiny" in out


@pytest.fixture
def quick(monkeypatch):
    """The attacks for real, but short: their tests are elsewhere."""
    evaluate, masking = kd.attacks.evaluate, kd.attacks.gradient_masking
    from kdjax.experiments import _robust_evaluate as module

    def short(*arguments, **options):
        return evaluate(*arguments, **{**options, "auto": False, "corruptions": False})

    def few(model, x, labels, **options):
        return masking(model, x, labels, **{**options, "queries": 5, "draws": 1})

    monkeypatch.setattr(module.attacks, "evaluate", short)
    monkeypatch.setattr(module.attacks, "gradient_masking", few)


def test_evaluate_shows_and_keeps(capsys, done, quick, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run = done / "at" / "seed-0"
    code, out, _ = answer(capsys, "evaluate", str(run))
    assert code == 0
    best = json.loads((done / "robust.json").read_text())["rows"][0]["best"]
    # All 40 test images, as the table has them; its PGD starts elsewhere.
    assert f"{100 * best['clean'][0]:.1f} %" in out
    for word in (
        "at mlp_small, seed 0, student, best epoch: 40 test images of tiny, linf eps 0.05",
        "worst case of all", "CW-100", "ECE", "scaled", "random noise", "wanted",
        "Signs of masked gradients",
    ):  # fmt: skip
        assert word in " ".join(out.split())
    assert "…" not in out
    assert max(map(len, table(out))) <= 80
    kept = run / "robustness-student-best-0-linf-0.05-40"
    for name in ("report.json", "report.png", "evaluation.npz"):
        assert (kept / name).exists()
    again = answer(capsys, "evaluate", str(run))
    assert again[1] == out


def test_evaluate_takes_runs_of_distill(capsys, npz, quick, tmp_path):
    """A run folder as kdjax distill leaves it: no average, no best epoch, no attack."""
    student = runs.network("mlp_small", 4)
    method = kd.distill(student, None, {"hard": (1.0, kd.terms.hard_labels())})
    learner, batches = kd.minimize(method, optax.sgd(0.1)), kd.data.npz(npz).batches("train", 32)
    state = learner.init(jax.random.key(0), batches.at(0))
    folder = tmp_path / "d" / "alone" / "seed-0"
    kd.train.fit(learner, state, batches, steps=2, checkpoint=folder, progress=False, plot=False)
    manifest = {"role": "alone", "model": "mlp_small", "num_classes": 4, "shape": [6, 6, 1],
                "seeds": [0], "stacked": False,
                "options": {"data": {"data": str(npz), "data_dir": None}}}  # fmt: skip
    runs.write(folder, manifest)
    code, out, _ = answer(capsys, "evaluate", "d/alone/seed-0")
    assert code == 0
    assert "alone mlp_small, seed 0, student, last epoch: 40 test images of tiny" in out
    assert "linf eps 0.1" in " ".join(out.split())
    code, _, err = answer(capsys, "evaluate", "d/alone/seed-0", "--weights", "ema")
    assert code == 2
    assert err.startswith("kdjax: --weights must be student for d/alone/seed-0, which keeps no")
    code, _, err = answer(capsys, "evaluate", "d/alone/seed-0", "--epoch", "best")
    assert code == 2
    assert err.startswith("kdjax: --epoch must be last for d/alone/seed-0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eps", "0"], "--eps must be a finite number above 0, got 0.0."),
        (["--eps", "x"], "--eps must be a number or a fraction such as 8/255, got 'x'."),
        (["--examples", "0"], "--examples must be an integer at least 1, got 0."),
        (["--version", "fast"], "--version"),
        (["--seed", "7"], "--seed must be one of 0, those of"),
        (["--data", "digits"], "--data must have 4 classes and examples of shape (6, 6, 1)"),
    ],
)
def test_evaluate_refuses(capsys, done, arguments, message):
    code, out, err = answer(capsys, "evaluate", str(done / "adr" / "seed-0"), *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err


def test_evaluate_says_what_a_folder_holds(capsys, done):
    code, _, err = answer(capsys, "evaluate", str(done))
    assert code == 2
    assert "it holds the runs adr/seed-0, adr/seed-0/ema, at/seed-0" in err
    code, _, err = answer(capsys, "evaluate", "nowhere")
    assert (code, err) == (
        2, "kdjax: folder must be a run folder, got nowhere, which is not there.\n",
    )  # fmt: skip


def test_divergence_is_told_and_is_no_bad_argument(capsys, npz):
    code, _, err = answer(capsys, "train", "--data", str(npz), *TINY, "--learning-rate", "1e30")
    assert code == 1
    assert "not finite" in err
    assert "Traceback" not in err
