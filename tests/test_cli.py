"""The command: exit codes, one line for every bad value, and a tiny run from end to end."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny_images import noisy_classes

import kdjax as kd
from kdjax import cli
from kdjax.cli import _distill, _options
from kdjax.experiments import soft_labels

TINY = [
    "--teacher-model", "mlp_small", "--teacher-steps", "8", "--steps", "8", "--seeds", "2",
    "--batch-size", "16", "--augmentation", "none", "--teacher-augmentation", "none",
]  # fmt: skip


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """A file of tiny images of three classes."""
    return noisy_classes(
        tmp_path_factory.mktemp("data"), classes=3, sizes=(120, 45), between=(40, 200), noise=40
    )


@pytest.fixture(scope="module")
def done(npz, tmp_path_factory):
    """A finished run: its folder."""
    out = tmp_path_factory.mktemp("runs") / "first"
    assert cli.main(["distill", "--data", str(npz), "--out", str(out), *TINY]) == 0
    return out


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Whatever a command leaves, it leaves there; and a table has room."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def answer(capsys, *arguments):
    """Exit code, stdout and stderr."""
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def numbers(table):
    """The lines of a table that don't depend on the clock."""
    rows = [line for line in table.splitlines() if "│" in line]
    assert rows
    return [row for row in rows if "latency" not in row and "time to train" not in row]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "0"], "--temperature must be a finite number above 0, got 0.0."),
        (["--hard", "-1"], "--hard must be a finite number at least 0, got -1.0."),
        (["--steps", "0"], "--steps must be an integer at least 1, got 0."),
        (["--seeds", "0"], "--seeds must be an integer at least 1, got 0."),
        (["--devices", "0"], "--devices must be an integer at least 1, got 0."),
        (["--devices", "99"], "--devices must be at most 8, the cpu devices there are, got 99."),
        (["--batch-size", "9999"], "--batch-size must be at most 1168"),
        (["--devices", "3"], "--batch-size must be a multiple of the 3 devices, got 64."),
        (["--labels-per-class", "999"], "--labels-per-class must be at most 112"),
        (["--student-model", "resnet9"], "--student-model must be one of convnet, "),
        (["--teacher-model", "resnet9"], "--teacher-model must be one of convnet, "),
        (["--data", "no.npz"], "--data must be a file that is there, got no.npz."),
        (["--data", "mnist"], "--data must be digits, a PATH.npz or tfds:NAME, got 'mnist'."),
        (["--data", "tfds:no_such_set"], "data 'tfds:no_such_set' can't be read: "),
        (["--data-dir", "here"], "--data-dir must be given with tfds:NAME only"),
        (["--teacher", "nowhere"], "--teacher must be a run folder, got nowhere"),
        (["--teacher-labels", "nowhere"], "must be a folder of stored outputs, got nowhere"),
        (["--teacher", "a", "--teacher-labels", "b"], "--teacher must not be given with"),
        (["--out", "."], "--out must be a new folder, got ., which exists; --resume continues"),
        (["--resume"], "--out must be given to resume"),
    ],
)
def test_bad_values_get_one_line(capsys, tmp_path, arguments, message):
    jax.devices()  # once jax has started, --devices can't make up more
    (tmp_path / "something").touch()
    code, out, err = answer(capsys, "distill", *arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("kdjax: ")
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_unknown_words(capsys):
    code, _, err = answer(capsys, "destill")
    assert (code, err.count("\n")) == (2, 1)
    assert "distill, evaluate, predict-labels" in err
    code, _, err = answer(capsys, "distill", "--temprature", "3")
    assert code == 2
    assert "--temprature" in err
    assert "Traceback" not in err


def test_help_is_worth_reading(capsys):
    code, out, _ = answer(capsys, "--help")
    assert code == 0
    assert "kdjax distill --out runs/first" in out
    assert answer(capsys)[1] == out
    code, out, _ = answer(capsys, "distill", "--help")
    assert code == 0
    for name in kd.models.BY_NAME:
        assert name in out
    for word in (
        "(default: 4.0)",
        "kdjax distill --labels-per-class 10",
        "Updates of each student",
    ):
        assert word in out
    assert answer(capsys, "--version")[1].strip() == kd.__version__


def test_defaults_are_those_of_the_experiment():
    parameters = inspect.signature(soft_labels.compare).parameters
    for options in (_options.Labels(), _options.Teacher(), _options.Student()):
        for name, value in dataclasses.asdict(options).items():
            if name != "teacher_labels":
                assert parameters[name].default == value, name


def test_tiny_run_leaves_what_it_says(capsys, npz, tmp_path):
    code, out, err = answer(capsys, "distill", "--data", str(npz), *TINY, "--labels-per-class", "5")
    assert code == 0
    for word in (
        "tiny: 108 training examples, 2 seeds", "gain by distilling", "labelled examples",
        "answers as the teacher", "calibration error", "low contrast", "sigma 0.6",
        "compression", "latency of one image", "peak memory of that", "time to train one",
    ):  # fmt: skip
        assert word in out
    assert "runs/distill-1/curves.png" in out
    assert "runs/distill-1/distilled/seed-0" in out
    for name in ("curves.png", "report.json", "distilled/seed-1/8", "alone/seed-0/metrics.jsonl"):
        assert (tmp_path / "runs" / "distill-1" / name).exists()
    assert err.startswith("teacher: 8 steps, ")
    assert len(err.splitlines()) == 5  # one for each training, as there is no terminal
    assert _distill.out_folder(_options.Run()).name == "distill-2"
    assert _distill.out_folder(_options.Run(resume=True)).name == "distill-1"


def test_resume_gives_the_same_table(capsys, npz, tmp_path, monkeypatch):
    out = tmp_path / "cut"
    whole = ["distill", "--data", str(npz), "--out", str(out), *TINY]
    fit, calls = kd.train.fit, []

    def stopped(*arguments, **options):
        calls.append(options["checkpoint"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fit(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kd.train, "fit", stopped)
        code, _, err = answer(capsys, *whole)
    assert code == 130
    assert err.splitlines()[-1] == (
        f"kdjax: stopped; continue with: kdjax distill --resume --out {out}"
    )
    first = answer(capsys, "distill", "--resume", "--out", str(out))
    again = answer(capsys, "distill", "--resume", "--out", str(out))
    unbroken = answer(capsys, "distill", *whole[1:4], str(tmp_path / "other"), *TINY)
    assert first[0] == again[0] == unbroken[0] == 0
    assert again[1] == first[1]
    assert numbers(unbroken[1]) == numbers(first[1])


def test_resume_refuses_other_options(capsys, done):
    code, _, err = answer(capsys, "distill", "--resume", "--out", str(done), "--temperature", "2")
    assert code == 2
    assert err == f"kdjax: --temperature must be 4.0 to continue {done}, got 2.0.\n"


def test_evaluate_agrees_with_the_table(capsys, done):
    accuracy = json.loads((done / "report.json").read_text())["distilled"]["accuracy"][2][1]
    code, out, _ = answer(capsys, "evaluate", str(done / "distilled" / "seed-1"))
    assert code == 0
    assert f"{100 * accuracy:.2f} %" in out
    for word in ("distilled mlp_small (seed 1) on tiny", "negative log-likelihood", "2,563"):
        assert word in out


def test_evaluate_refuses(capsys, done, npz):
    code, _, err = answer(capsys, "evaluate", str(done))
    assert code == 2
    assert "it holds the runs alone/seed-0" in err
    code, _, err = answer(capsys, "evaluate", str(done / "teacher"), "--split", "no")
    assert (code, err) == (2, "kdjax: --split must be one of test, train, validation; got 'no'.\n")
    code, _, err = answer(capsys, "evaluate", str(done / "teacher"), "--data", "digits")
    assert code == 2
    assert err.startswith("kdjax: --data must have 3 classes and examples of shape (6, 6, 1)")


def test_stored_labels_teach_as_the_teacher_does(capsys, done, npz, tmp_path):
    code, out, _ = answer(capsys, "predict-labels", str(done / "teacher"), "--out", "labels")
    assert code == 0
    assert "108 examples, all logits, float32: labels" in out
    run = ["distill", "--data", str(npz), "--teacher-labels", "labels", "--out", "from-labels"]
    code, out, _ = answer(capsys, *run, *TINY)
    assert code == 0
    assert "no teacher" not in out
    stored, direct = (
        json.loads((folder / "report.json").read_text())
        for folder in (tmp_path / "from-labels", done)
    )
    assert stored["teacher"] is None
    assert stored["distilled"]["accuracy"] == direct["distilled"]["accuracy"]
    assert stored["distilled"]["agreement"] is None


def test_stored_top_k(capsys, done, npz):
    arguments = [str(done / "teacher"), "--out", "few", "--top-k", "1", "--dtype", "float16"]
    code, out, _ = answer(capsys, "predict-labels", *arguments)
    assert code == 0
    assert "top 1, float16" in out
    run = ["distill", "--data", str(npz), "--teacher-labels", "few", *TINY]
    code, _, err = answer(capsys, *run)
    assert code == 2
    assert err.startswith("kdjax: --temperature must be 1, that of the stored top-1 outputs")
    code, _, err = answer(capsys, "predict-labels", *arguments[:3], "--top-k", "9")
    assert code == 2
    assert err.count("\n") == 1


def test_trained_teacher_is_taken(capsys, done, npz, tmp_path):
    teacher = str(done / "teacher")
    code, _, _ = answer(
        capsys, "distill", "--data", str(npz), "--teacher", teacher, "--out", "t", *TINY
    )
    assert code == 0
    found = json.loads((tmp_path / "t" / "report.json").read_text())
    direct = json.loads((done / "report.json").read_text())
    assert found["teacher"]["accuracy"] == direct["teacher"]["accuracy"]
    assert found["distilled"]["accuracy"] == direct["distilled"]["accuracy"]
    assert not (tmp_path / "t" / "teacher").exists()


def test_missing_extra_is_one_line(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rich" else find(name)
    )
    code, _, err = answer(capsys, "distill")
    assert (code, err) == (2, "kdjax: the command needs rich: pip install 'kdjax[cli]'\n")


def test_faults_of_others_are_not_hidden(monkeypatch):
    def broken(*_, **__):
        return np.zeros(3).reshape(2, 2)

    monkeypatch.setattr(soft_labels, "compare", broken)
    with pytest.raises(ValueError, match="reshape"):
        cli.main(["distill"])


def test_divergence_is_told_and_is_no_bad_argument(capsys, npz):
    code, _, err = answer(
        capsys, "distill", "--data", str(npz), *TINY, "--teacher-learning-rate", "1e30"
    )
    assert code == 1
    assert "not finite" in err
    assert "Traceback" not in err


def test_as_a_process_with_ctrl_c(npz, tmp_path):
    """Two real processes: a bad value, and Ctrl-C in the middle of a training."""
    command = [sys.executable, "-m", "kdjax", "distill"]
    bad = subprocess.run([*command, "--temperature", "-1"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr == "kdjax: --temperature must be a finite number above 0, got -1.0.\n"

    long = [*command, "--data", str(npz), "--out", "cut", *TINY, "--teacher-steps", "100000"]
    process = subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = tmp_path / "cut" / "teacher" / "metrics.jsonl"
    give_up = time.monotonic() + 60
    while not (lines.exists() and lines.stat().st_size) and time.monotonic() < give_up:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "kdjax: stopped; continue with: kdjax distill --resume --out cut\n"
    assert any(path.name.isdigit() for path in (tmp_path / "cut" / "teacher").iterdir())
