"""The benchmark of DistilGPT-2: its text, its bars, and a run at a tiny size that goes on."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import kdjax as kd

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in ("_distilgpt2", "distilgpt2_cpu")}


@pytest.fixture(scope="module")
def script(scripts):
    return scripts["distilgpt2_cpu"]


@pytest.fixture(scope="module")
def parts(scripts):
    return scripts["_distilgpt2"]


def test_the_layers_of_a_student_are_the_published_ones(parts):
    assert parts.half(12) == list(kd.methods.distilgpt2.LAYERS)
    assert parts.half(6) == [0, 2, 5]


def test_the_text_is_there_and_split(parts):
    text = parts.text_of(parts.Settings(), None, None)
    assert len(text.train) + len(text.held_out) > 250_000
    assert abs(len(text.held_out) / len(text.train) - 1 / 9) < 1e-3
    assert text.train.max() < text.vocab == 128
    assert "\n" not in bytes(text.train.astype(np.uint8)).decode("ascii")


def test_every_row_comes_once_before_any_comes_again(parts):
    settings = parts.Settings(length=8, batch=5)
    starts = parts.places(8 * 10 + 3, 4, settings)
    assert starts.shape == (4, 5)
    for half in np.split(starts, 2):
        np.testing.assert_array_equal(np.sort(half.ravel()), 8 * np.arange(10))
    loose = parts.places(83, 400, settings._replace(windows=True))
    assert loose.min() == 0
    assert loose.max() == 75
    assert np.any(loose % 8)


def figures(script, **changed):
    """Figures that meet every bar, but for those changed."""
    found = {
        script.TEACHER: 6.5, script.BEFORE: 8.5, ("full", "labels alone"): 6.4,
        ("full", "triple"): 6.5, ("full", "KD alone"): 6.7, ("scarce", "labels alone"): 9.2,
        ("scarce", "triple"): 6.5, ("scarce", "KD alone"): 6.7, script.FUSED: 6.6,
    }  # fmt: skip
    rows = {row: {"perplexity": value, "losses": [2.0, 1.0]} for row, value in found.items()}
    rows[script.FUSED]["losses"] = [2.0, 1.00005]
    for name, value in changed.items():
        rows[{"before": script.BEFORE}.get(name, tuple(name.split("_")))]["perplexity"] = value
    return rows


def test_every_bar_can_be_missed(script):
    def judged(**changed):
        return list(script.verdicts(figures(script, **changed)).values())

    assert judged() == [True] * 7
    assert judged(before=9.1) == [False] + [True] * 6
    assert judged(full_triple=7.0) == [True, False] + [True] * 5
    assert judged(scarce_triple=7.1) == [True, True, False] + [True] * 4
    missed = {"scarce_KD alone": 7.4}
    assert judged(**missed) == [True] * 3 + [False] + [True] * 3
    rows = figures(script)
    rows["scarce", "labels alone"]["perplexity"] = 8.1
    assert list(script.verdicts(rows).values()) == [True] * 5 + [False, True]
    rows[script.FUSED]["losses"] = [2.0, 1.0002]
    assert list(script.verdicts(rows).values())[-1] is False


def test_an_untrained_model_is_as_good_as_chance(parts):
    settings = parts.Settings(**parts.QUICK)
    config = parts.teacher_config(settings, 128)
    params = jax.jit(kd.lm.model(config).init)(jax.random.key(0))[0]
    params = jax.tree.map(np.zeros_like, params)
    held_out = np.arange(100) % 128
    value = parts.perplexity(config, params, held_out, settings)
    assert math.isclose(value, 128, rel_tol=1e-4)


def test_a_tiny_run_goes_on_where_it_was_stopped(script, parts, tmp_path, monkeypatch, capsys):
    """The whole text only; the rest of the rows are alike."""
    monkeypatch.setattr(script, "SIDES", ("full",))
    monkeypatch.setattr(script, "KINDS", ("triple",))
    monkeypatch.setattr(script, "verdicts", lambda found: {})
    argv = ["--quick", "--out", str(tmp_path)]
    trained = []

    def train(*args, **options):
        trained.append(1)
        return parts.train(*args, **options)

    monkeypatch.setattr(script, "train", train)

    def stopped(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script.Bench, "costs", stopped)
        with pytest.raises(KeyboardInterrupt):
            script.main(argv)
    assert len(trained) == 3  # the teacher, the triple, the triple without logits
    monkeypatch.setattr(script.Bench, "costs", lambda self: {
        name: {"latency": 1e-3, "speed": 100.0} for name in ("teacher", "student")
    })  # fmt: skip
    assert script.main(argv) == 0
    assert len(trained) == 3
    printed = capsys.readouterr().out
    assert "| full | triple | 2 |" in printed
    assert "| DistilGPT-2 (published) | 6 | 82 M |" in printed
    assert "Not judged" in printed
    found = script.Bench(script.arguments(argv)).run()
    assert script.deviation(found) < 1e-5
    config, params = kd.lm.load_checkpoint(tmp_path / "student")
    assert config.num_layers == 1
    assert parts.count(params) == found[script.BEFORE]["parameters"]


@pytest.mark.slow
def test_other_text_and_a_teacher_of_ones_own(script, tmp_path, capsys):
    """The whole command on the teacher of another run, in half precision and without logits."""
    assert script.main(["--quick", "--out", str(tmp_path / "first")]) == 0
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 40)
    argv = ["--quick", "--data", str(tmp_path / "text.txt"), "--bf16", "--fused"]
    argv += ["--teacher", str(tmp_path / "first" / "teacher"), "--out", str(tmp_path / "second")]
    capsys.readouterr()
    assert script.main(argv) == 0
    assert "1,536 tokens to train on, 160 held out" in capsys.readouterr().out
