"""``kdjax condense``: one line for every bad value, help, and a tiny run from end to end."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_images import noisy_classes

from kdjax import cli
from kdjax.cli import _condense, _condense_options, _condense_show
from kdjax.experiments import _condense_task, condense
from kdjax.experiments._robust_progress import Progress
from kdjax.experiments.measures import estimate

TINY = [
    "--pairs", "6", "--widths", "4", "--steps", "6", "--batch-size", "16", "--pool-size", "2",
    "--max-age", "3", "--target-epochs", "1", "--pretrain-epochs", "2", "--fine-tune-steps", "2",
    "--draws", "2", "--target-model", "mlp_small",
]  # fmt: skip


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """A file of tiny images of four classes."""
    return noisy_classes(tmp_path_factory.mktemp("data"), sizes=(80, 40))


@pytest.fixture(scope="module")
def said(npz, tmp_path_factory):
    """A finished run: its folder, and what it said on stdout and stderr."""
    folder, out, err = tmp_path_factory.mktemp("somewhere"), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "120")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert cli.main(["condense", "--data", str(npz), *TINY]) == 0
    return folder / "runs" / "condense-1", out.getvalue(), err.getvalue()


@pytest.fixture
def done(said):
    """The folder of a finished run."""
    return said[0]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Whatever a command leaves, it leaves there; and a table has room."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def answer(capsys, *arguments):
    """Exit code, stdout and stderr."""
    code = cli.main(["condense", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def table(text):
    """The rows of the table, without the seconds."""
    rows = text[text.index("nothing") : text.index("all source")].splitlines()
    return [re.split(r"\s{2,}", line.strip()) for line in rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "0"], "--pairs must be an integer at least 1, got 0."),
        (["--pairs", "677"], "--pairs must be at most 676, the source images there are, got 677."),
        (["--pairs", "few"], "--pairs"),
        (["--start", "best"], "--start"),
        (["--solver", "lu"], "--solver"),
        (["--widths", "8", "8", "8", "8"], "--widths must name at most 3 blocks"),
        (["--steps", "0"], "--steps must be an integer at least 1, got 0."),
        (["--learning-rate", "-1"], "--learning-rate must be a finite number above 0, got -1.0."),
        (["--pool-size", "0"], "--pool-size must be an integer at least 1, got 0."),
        (["--max-age", "0"], "--max-age must be an integer at least 1, got 0."),
        (["--source-classes", "0-x"], "--source-classes must be class numbers and ranges such as"),
        (["--source-classes", "all", "1"], "--source-classes must be class numbers and ranges"),
        (
            ["--source-classes", "10"],
            "--source-classes must be classes from 0 to 9",
        ),
        (["--source-classes", "4-0"], "--source-classes must be classes from 0 to 9, ranges"),
        (["--target-classes", "3"], "--target-classes must be at least two, to be told apart"),
        (["--target", "nowhere"], "--target must be a run folder, got nowhere, which is not there"),
        (["--target", ".", "--target-epochs", "3"], "--target-epochs must be left out with a"),
        (["--target-model", "resnet9"], "--target-model must be one of convnet, "),
        (["--pretrain-epochs", "0"], "--pretrain-epochs must be an integer at least 1, got 0."),
        (["--fine-tune-steps", "0"], "--fine-tune-steps must be an integer at least 1, got 0."),
        (["--draws", "0"], "--draws must be an integer at least 1, got 0."),
        (["--seeds", "0"], "--seeds must be an integer at least 1, got 0."),
        (["--data", "no.npz"], "--data must be a file that is there, got no.npz."),
        (["--data", "mnist"], "--data must be digits, a PATH.npz or tfds:NAME, got 'mnist'."),
        (["--data-dir", "here"], "--data-dir must be given with tfds:NAME only"),
        (["--out", "."], "--out must be a new folder, got ., which exists; --resume continues"),
        (["--resume"], "--out must be given to resume"),
        (["--resume", "--out", "nowhere"], "--out must be the folder of a run to resume"),
        (["--kernel", "rbf"], "--kernel"),
    ],
)
def test_bad_values_get_one_line(capsys, tmp_path, arguments, message):
    (tmp_path / "something").touch()
    code, out, err = answer(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("kdjax: ")
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_help_is_worth_reading(capsys):
    cli.main(["--help"])
    assert "kdjax condense" in capsys.readouterr().out
    code, out, _ = answer(capsys, "--help")
    assert code == 0
    flat = " ".join(out.replace("│", " ").split())
    for word in (
        "--source-classes CLASS [CLASS ...]", "such as 0-4 or 0 2 7, or all",
        "default 30 [1000]", "kmeans,random,herding", "kdjax condense --source-classes all",
        "without labels", "(default: 1000)", "--target FOLDER", "also after a kill",
    ):  # fmt: skip
        assert word in flat


def test_defaults_are_those_of_the_experiment():
    parameters = inspect.signature(condense.compare).parameters
    options, seen = _condense_options.Condense(), set()
    for kind in (options.data, options.target, options.method, options.evaluation):
        for name, value in dataclasses.asdict(kind).items():
            if name not in ("data", "data_dir"):
                assert parameters[name].default == value, name
                seen.add(name)
    assert seen == set(parameters) - {"dataset", "out", "resume", "about", "progress"}


def test_classes_are_numbers_and_ranges():
    assert _condense._classes("source_classes", ("0-2", "7"), 10) == [0, 1, 2, 7]
    assert _condense._classes("source_classes", ("all",), 3) == [0, 1, 2]
    assert _condense._classes("source_classes", None, 3) is None
    assert _condense_show._classes([7, 0, 2, 1, 9]) == "0-2, 7, 9"


def test_run_leaves_what_it_says(npz, said, monkeypatch):
    folder, out, err = said
    flat = " ".join(out.split())
    for word in (
        "tiny: 40 images of classes 0-1 without labels, condensed into 6 pairs for the features "
        "(64) of mlp_small by Barlow Twins, 1 epochs; task: classes 2-3; 1 seed",
        "Pre-training on 6 learned pairs gives R2", "no pre-training (one seed: no telling what",
        "learned for 6 updates", "To pre-train on the pairs:", "# standard errors",
        f"next: kdjax condense --data {npz} ", "--steps 6 ",
        "--target runs/condense-1 --pairs 6 --seeds 3 #",
    ):  # fmt: skip
        assert word in flat
    for name in ("pairs.npz", "manifest.json", "pairs.png", "curve.png", "condense.json"):
        assert f"runs/condense-1/{name}" in out
        assert (folder / name).stat().st_size > 500
    monkeypatch.chdir(folder.parent.parent)
    code = out[out.index("import jax, numpy") : out.index("next:")]
    names = {}
    exec("\n".join(line.strip() for line in code.splitlines()), names)
    assert names["pairs"]["image"].shape == (6, 6, 6, 1)
    lines = err.splitlines()
    assert len(lines) == 9  # the target network, condensing and seven rows
    assert lines[1].startswith("seed 0: condensing: ")
    assert re.match(r"seed 0: pre-training on KRR-ST: .*, R2 -?\d", lines[7])
    assert _condense.out_folder(_condense_options.CondenseRun()).name == "condense-2"
    assert _condense.out_folder(_condense_options.CondenseRun(resume=True)).name == "condense-1"


def test_table_fits_a_terminal(capsys, done, monkeypatch):
    for columns in (80, 100, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        code, out, _ = answer(capsys, "--resume", "--out", str(done))
        assert code == 0
        rows = out[out.index("pre-trained on") : out.index("Pre-training on")]
        assert "…" not in rows
        assert max(map(len, rows.splitlines())) <= columns
        assert rows.count("all source") == (2 if columns == 80 else 1)


def test_interrupted_run_goes_on_to_the_same_table(capsys, npz, done, tmp_path, monkeypatch):
    out = tmp_path / "cut"
    begin, calls = Progress.begin, []

    def stopped(self, *arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        begin(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "begin", stopped)
        code, _, err = answer(capsys, "--data", str(npz), "--out", str(out), *TINY)
    assert code == 130
    assert err.splitlines()[-1] == (
        f"kdjax: stopped; continue with: kdjax condense --resume --out {out}"
    )
    code, first, _ = answer(capsys, "--resume", "--out", str(out))
    assert code == 0
    _, again, err = answer(capsys, "--resume", "--out", str(out))
    assert (again, err) == (first, "")
    _, unbroken, _ = answer(capsys, "--resume", "--out", str(done))
    for one, other in zip(table(first), table(unbroken), strict=True):
        assert (one[:4], one[5:]) == (other[:4], other[5:])
    with np.load(out / "pairs.npz") as a, np.load(done / "pairs.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in ("image", "target"))


def test_resume_refuses(capsys, done, tmp_path):
    code, _, err = answer(capsys, "--resume", "--out", str(done), "--pairs", "7")
    assert (code, err) == (2, f"kdjax: --pairs must be 6 to continue {done}, got 7.\n")
    (tmp_path / "other").mkdir()
    settings = {"settings": {}, "about": {"options": {}}, "seconds": 0}
    (tmp_path / "other" / "settings.json").write_text(json.dumps(settings))
    code, _, err = answer(capsys, "--resume", "--out", "other")
    assert code == 2
    assert "It wasn't made by kdjax condense." in err


def test_divergence_is_told_and_is_no_bad_argument(capsys, npz, monkeypatch):
    def diverged(*_):
        raise FloatingPointError("the loss of step 3 is not finite")

    monkeypatch.setattr(_condense_task, "trained_target", diverged)
    code, _, err = answer(capsys, "--data", str(npz), *TINY)
    assert (code, err) == (1, "kdjax: the loss of step 3 is not finite\n")


def report(learned, best, nothing=(0.85, 0.86, 0.87)):
    """A report of three seeds: R2 and 5-shot accuracies of the learned pairs and of k-means."""
    figures = {
        "KRR-ST": learned, "k-means": best, "random": ((0.1,) * 3, (0.5,) * 3),
        "herding": ((0.1,) * 3, (0.5,) * 3), "all source": ((0.9, 0.91, 0.92), (0.9,) * 3),
    }  # fmt: skip
    rows = [
        condense.Row(
            name=name, pairs=30, bytes=10, updates=5, seconds=estimate([1.0]),
            figures={"r2_source": estimate(r2), "shot_5": estimate(accuracy)},
        )
        for name, (r2, accuracy) in figures.items()
    ]  # fmt: skip
    rows.append(
        condense.Row(name="none", pairs=0, bytes=0, updates=0, seconds=estimate([0.0]),
                     figures={"shot_5": estimate(nothing)})
    )  # fmt: skip
    return condense.Report(
        dataset="x", images={}, target="t", features=2, seeds=[0, 1, 2], rows=rows, losses=[],
        curve=[], condensing=estimate([1.0]), device="cpu", seconds=1.0, folder="f",
        settings={"source_classes": [0, 1], "target_classes": [2, 3]},
    )  # fmt: skip


def test_verdict_tells_differences_from_noise():
    clear = report(
        ((0.89, 0.90, 0.91), (0.88, 0.90, 0.89)), ((0.84, 0.849, 0.861), (0.90, 0.88, 0.885))
    )
    assert _condense_show.verdict(clear) == (
        "Pre-training on 30 learned pairs gives R2 0.900: 0.050 ± 0.001 above k-means images, and "
        "0.010 ± 0.000 below all 30 images; 5-shot accuracy on the target task is 89.0 %: "
        "0.2 ± 1.2 points above k-means (within noise), and 3.0 ± 0.6 points above no "
        "pre-training."
    )
    close = report(((0.86, 0.83, 0.85), (0.9,) * 3), ((0.85, 0.84, 0.84), (0.9,) * 3))
    assert "above k-means images (within noise), and" in _condense_show.verdict(close)


def test_one_task_has_one_r2(said):
    """Where the classes are the same, the second R2 would say the same."""
    found = report(((0.9,) * 3, (0.9,) * 3), ((0.8,) * 3, (0.9,) * 3))
    assert not _condense_show._same(found)
    assert _condense_show._same(
        dataclasses.replace(found, settings={"source_classes": [1, 0], "target_classes": [0, 1]})
    )
    header = said[1][said[1].index("cpu") : said[1].index("nothing")]
    assert header.count("R2") == 2


@pytest.mark.slow
def test_killed_process_goes_on(done, npz, tmp_path):
    """SIGKILL at several moments, in a process of its own."""
    out = tmp_path / "killed"
    start = [sys.executable, "-m", "kdjax", "condense", "--data", str(npz), "--out", str(out)]
    resume = [*start[:4], "--resume", "--out", str(out)]
    marks = ["target/metrics.jsonl", "seed-0/condensing/metrics.jsonl", "seed-0/rows/random.json"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    for i, mark in enumerate(marks):
        command = resume if i else [*start, *TINY]
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            for _ in range(3000):
                if (out / mark).exists() or process.poll() is not None:
                    break
                time.sleep(0.1)
            process.send_signal(signal.SIGKILL)
    assert not (out / "condense.json").exists()
    found = subprocess.run(resume, env=environment, capture_output=True, text=True, check=True)
    unbroken = subprocess.run(
        [*start[:4], "--resume", "--out", str(done)], env=environment, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    for one, other in zip(table(found.stdout), table(unbroken.stdout), strict=True):
        assert (one[:4], one[5:]) == (other[:4], other[5:])
