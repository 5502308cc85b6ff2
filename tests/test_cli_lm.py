"""``kdjax lm distill``: one line for every bad value, help, and a tiny run from end to end."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path

import pytest

from kdjax import cli
from kdjax.cli import _lm, _lm_options
from kdjax.experiments import language

TINY = [
    "--length", "16", "--steps", "3", "--batch-size", "4", "--teacher-layers", "2",
    "--teacher-width", "8", "--teacher-heads", "2", "--teacher-steps", "4", "--seeds", "1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Whatever a command leaves, it leaves there; and a table has room."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"the number {i} is followed by {i + 1}." for i in range(60)))
    return str(file)


def answer(capsys, *arguments):
    """Exit code, stdout and stderr."""
    code = cli.main(["lm", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help(capsys):
    for arguments in ([], ["--help"]):
        code, out, _ = answer(capsys, *arguments)
        assert code == 0
        assert "kdjax lm distill" in out
    code, out, _ = answer(capsys, "distill", "--help")
    assert code == 0
    assert "--teacher" in out


def test_every_option_is_an_argument_of_the_experiment():
    wanted = set(inspect.signature(language.compare).parameters)
    kinds = (_lm_options.LMText, _lm_options.LMTeacher, _lm_options.LMStudent)
    options = {field.name: field.default for kind in kinds for field in dataclasses.fields(kind)}
    options["files"] = options.pop("text")
    assert set(options) <= wanted
    for name, default in options.items():
        assert inspect.signature(language.compare).parameters[name].default == default, name


def test_a_run_and_its_resumption(capsys, text):
    code, out, err = answer(capsys, "distill", "--text", text, "--out", "runs/a", *TINY)
    assert code == 0, err
    for words in ("held-out perplexity", "student, text and teacher", "tokens per second"):
        assert words in out
    assert "goes on" in out
    assert "load_checkpoint" in out
    report = json.loads(Path("runs/a/language.json").read_text())
    assert f"{report['rows'][3]['figure'][0]:.2f}" in out
    code, again, _ = answer(capsys, "distill", "--resume", "--out", "runs/a")
    assert code == 0
    table = [line for line in out.splitlines() if "student" in line]
    assert table == [line for line in again.splitlines() if "student" in line]
    assert _lm.remembered(_lm.out_folder(_lm_options.LMRun(out="runs/a"))).student.steps == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distil"], "distill"),
        (["distill", "--steps", "0"], "steps"),
        (["distill", "--steps", "x"], "steps"),
        (["distill", "--teacher", "nowhere"], "config.json"),
        (["distill", "--text", "nowhere.txt"], "nowhere.txt"),
        (["distill", "--alpha", "1", "-2", "1"], "alpha"),
        (["distill", "--resume"], "out"),
        (["distill", "--resume", "--out", "nowhere"], "nowhere"),
    ],
)
def test_bad_values_get_one_line(arguments, words, capsys, text):
    code, _, err = answer(capsys, *arguments)
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
