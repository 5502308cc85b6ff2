"""The benchmark script at a tiny size."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soft_labels.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_soft_labels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tmp_path):
    draw = np.random.default_rng(0)
    columns = {}
    for name, size in (("train", 120), ("test", 30)):
        labels = np.arange(size) % 3
        images = 80 * labels[:, None, None] + draw.integers(0, 60, (size, 5, 5))
        columns |= {f"x_{name}": images.astype(np.uint8), f"y_{name}": labels}
    np.savez(tmp_path / "tiny.npz", **columns)
    return [
        "--data", str(tmp_path / "tiny.npz"), "--out", str(tmp_path / "out"), "--seeds", "2",
        "--steps", "4", "--teacher-steps", "4", "--batch-size", "10", "--labels-per-class", "5",
        "--teacher-model", "mlp_small", "--augmentation", "none",
        "--teacher-augmentation", "none",
    ]  # fmt: skip


@pytest.mark.slow
def test_rows_say_what_was_done(script, arguments, capsys):
    script.main([*arguments, "--settings", "few", "few-few"])
    printed = capsys.readouterr().out
    header, rule, few, both = printed.splitlines()
    cells = [cell.strip() for cell in few.strip("|").split("|")]
    assert len(cells) == header.count("|") - 1 == rule.count("---") == len(script.COLUMNS)
    assert cells[:3] == ["tiny", "few", "108, 15"]
    assert both.split("|")[3].strip() == "15, 15"
    assert cells[-1] == f"`python benchmarks/soft_labels.py {' '.join(arguments)} --settings few`"
    assert "±" in cells[7]
    # The same call again reads what is there: even the times are the same.
    script.main([*arguments, "--settings", "few", "few-few"])
    assert capsys.readouterr().out == printed


def test_command_of_one_row(script):
    typed = ["--settings", "all", "few", "--seeds", "3", "--quick"]
    assert script.command(typed, "few") == (
        "python benchmarks/soft_labels.py --seeds 3 --quick --settings few"
    )


def test_help_names_the_settings(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    out = capsys.readouterr().out
    assert "few-few" in out
    assert "--teacher-learning-rate" in out
