"""The comparison of all methods: what is trained, what is kept, and runs at a tiny size."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import kdjax as kd

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FEW = ("CRD", "FSP")


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("feature_methods", "_feature_methods", "_feature_training")
        yield {name: importlib.import_module(name) for name in names}


@pytest.fixture(scope="module")
def script(scripts):
    return scripts["feature_methods"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("feature_methods")


@pytest.fixture(scope="module")
def bench(scripts, script, folder):
    options = script.parse(["--quick", "--out", str(folder / "bench")])
    return scripts["_feature_training"].Bench(
        options, *scripts["_feature_training"].prepare(options)
    )


def test_every_published_method_is_there(script, scripts):
    """Names of the terms and methods that the table leaves to other benchmarks are listed here."""
    assert list(script.ENTRIES)[:2] == [script.NONE, script.KD]
    assert len(script.ENTRIES) == 34
    used = (BENCHMARKS / "_feature_methods.py").read_text()
    used += (BENCHMARKS / "_feature_training.py").read_text()
    tokens = {
        "attention_distributions", "attention_scores", "cached_top_k", "causal_lm", "distil_triple",
        "hidden_cosine", "hidden_states", "masked_lm", "prediction", "regression", "relations",
        "token_divergence", "uniform_layers", "vit_attention", "vit_tokens",
    }  # fmt: skip
    helpers = {"at", "labelled", "no_params"}
    for name in set(kd.terms.__all__) - tokens - helpers:
        assert name in used, name


def test_taps_are_before_and_behind_the_activation(bench):
    """In a VGG the map of a stage is the ReLU of what is tapped before it."""
    images = bench.task.heldout["test"][0][:3]
    outputs, _ = bench.student.apply(*bench.begin(0), images)
    for i in range(bench.pair(1).stages):
        np.testing.assert_array_equal(jax.nn.relu(outputs[f"pre{i}"]), outputs[f"map{i}"])
        assert set(outputs[f"norm{i}"]) == {"scale", "bias"}
    np.testing.assert_allclose(outputs["map2"].mean((1, 2)), outputs["pool"], rtol=1e-5)


def test_stored_outputs_are_the_teachers(bench, scripts):
    training, train = scripts["_feature_training"], bench.task.train
    model = training.network(bench.options.teacher, bench.classes)
    data = {name: np.asarray(train[name]) for name in ("image", "label", "index")}
    variables = training.teacher_variables(bench.options, model, data, 0)
    wanted, _ = model.apply(*variables, train["image"][5:9])
    batch = {name: x[5:9] for name, x in train.items()}
    found, _ = bench.task.teacher.apply({}, {}, batch)
    assert found.keys() == wanted.keys()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_batches_hold_labelled_rows_and_no_row_twice(bench):
    label = np.asarray(bench.task.train["label"])
    order = np.asarray(bench.order(1))
    assert order.shape == (bench.options.steps, bench.options.batch_size)
    assert all(len(set(rows)) == len(rows) for rows in order.tolist())
    assert ((label[order] >= 0).sum(1) == bench.options.labelled).all()
    assert (order != np.asarray(bench.order(0))).any()
    target = np.asarray(bench.task.train["target"])
    np.testing.assert_array_equal(target[label >= 0], label[label >= 0])
    assert target.min() >= 0


def test_validation_chooses_the_weight(script):
    options = script.parse(["--methods", "AT", "--seeds", "2"])
    values = {"x0.1": ([0.9, 0.8], [0.5, 0.7]), "x1": ([0.7, 0.9], [0.9, 0.9])}
    found = {
        f"AT, {at}, seed {seed}": {"validation": v[seed], "test": t[seed]}
        for at, (v, t) in values.items()
        for seed in (0, 1)
    }
    one = script.outcome("AT", options, found)
    assert one.multiplier == 0.1
    assert one.test.mean == pytest.approx(0.6)
    assert one.others == {1.0: pytest.approx(0.9)}
    for seed in (0, 1):
        found[f"AT, x0.1, seed {seed}"]["validation"] = 0.8
    assert script.outcome("AT", options, found).multiplier == 1.0  # a tie


def test_who_is_worse_than_the_labels(script):
    options = script.parse(["--methods", "AT", "NST", "--seeds", "3", "--multipliers", "1"])
    tests = {
        "labels alone": (0.9, 0.92, 0.94), "KD": (0.95, 0.96, 0.97),
        "AT": (0.8, 0.83, 0.85), "NST": (0.89, 0.93, 0.93),
    }  # fmt: skip
    found = {
        f"{name}, x1, seed {seed}": {"validation": 1.0, "test": value}
        for name, values in tests.items()
        for seed, value in enumerate(values)
    }
    lines = script.worse(options, {"rows": found})
    assert len(lines) == 1
    assert lines[0].startswith("AT (-9.33 ± 0.33)")


def test_a_run_goes_on_and_has_all_rows(script, folder, capsys, monkeypatch):
    out = folder / "run"
    given = ["--quick", "--seeds", "1", "--out", str(out), "--methods", *FEW, "--no-times"]
    monkeypatch.setitem(script.QUICK, "seeds", 1)
    script.main(given)
    printed = capsys.readouterr().out
    for name in ("labels alone", "KD", *FEW):
        assert f"\n| {name} |" in printed
    assert "| 1 + 8 |" in printed  # the first stage of FSP
    file = out / "results.json"
    kept = json.loads(file.read_text())
    assert set(kept["rows"]) == {f"{n}, x1, seed 0" for n in ("labels alone", "KD", *FEW)}
    assert [len(kept["costs"][name]) for name in FEW] == [1, 2]
    del kept["rows"]["KD, x1, seed 0"]
    kept["rows"]["CRD, x1, seed 0"]["test"] = 0.125
    file.write_text(json.dumps(kept))
    script.main(given)
    again = json.loads(file.read_text())["rows"]
    assert again["KD, x1, seed 0"]["test"] >= 0
    assert again["CRD, x1, seed 0"]["test"] == 0.125  # read, not made anew
    assert "| 12.50 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="pass another --out"):
        script.main([*given, "--rate", "0.1"])


@pytest.mark.slow
def test_all_methods_run(script, folder, capsys):
    out = folder / "all"
    script.main(["--quick", "--out", str(out)])
    printed = capsys.readouterr().out
    kept = json.loads((out / "results.json").read_text())
    for name in script.ENTRIES:
        assert f"\n| {name} |" in printed
        assert kept["times"][name] > 0
        assert all(np.isfinite(kept["rows"][f"{name}, x1, seed {i}"]["test"]) for i in (0, 1))
