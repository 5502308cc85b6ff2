"""The benchmarks of KRR-ST: what they compare, what they keep, and runs at a tiny size."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kdjax as kd
from kdjax.experiments import condense

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("_krr_rows", "_krr_step", "_krr_images", "krr_step", "krr_st_images")
        yield {name: importlib.import_module(name) for name in names}


@pytest.fixture(scope="module")
def steps(scripts):
    return scripts["krr_step"]


@pytest.fixture(scope="module")
def rows(scripts):
    return scripts["_krr_rows"]


@pytest.fixture(scope="module")
def images(scripts):
    return scripts["_krr_images"]


@pytest.fixture(scope="module")
def script(scripts):
    return scripts["krr_st_images"]


# --- the step -------------------------------------------------------------------------------------


def test_the_three_ways_are_one_loss(steps):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        shapes = ((5, 9), (5, 2), (7, 9), (7, 2))
        arrays = [jnp.asarray(rng.normal(size=s)) for s in shapes]
        found = [jax.value_and_grad(loss, (0, 1))(*arrays) for loss in steps.LOSSES.values()]
        for other in found[1:]:
            for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(other), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_the_bars_of_the_regression_can_be_missed(steps):
    zeros = dict.fromkeys(steps.Counts._fields, 0)

    def judged(flops, temporaries):
        found = {"ours": steps.Counts(**{**zeros, "flops": flops, "temporaries": temporaries})}
        return list(steps.regression_row((3, 2, 1, 1), found, (10.0, 1.0))[1].values())

    assert judged(11e9, 1.1 * 2**20) == [True, True]
    assert judged(11.1e9, 2**20) == [False, True]
    assert judged(10e9, 1.2 * 2**20) == [True, False]


def test_the_regression_costs_less_than_by_autodiff(steps):
    """The sizes of the bars would take seconds to compile; the shares are the same."""
    dual, primal = (steps.regression(size) for size in ((40, 300, 40, 4), (80, 20, 40, 20)))
    for found in (dual, primal):
        others = [counts.flops for name, counts in found.items() if name != "ours"]
        assert found["ours"].flops < 0.5 * min(others)


@pytest.mark.parametrize("live", [False, True])
def test_the_step_has_the_counts_of_the_bare_one(steps, live):
    bare, ours = steps.counted("tiny", live)
    assert steps.counts_row("tiny", bare, ours, steps.STEP_BARS)[1] == []
    # Twice features, the pool's pass, a convolution backward in each: no gradient of pixels there.
    assert ours.convolutions == 5 + live


def test_the_bare_step_does_the_same(steps):
    assert steps.disagreement(True) <= steps.AGREEMENT


def test_another_step_disagrees(steps, monkeypatch):
    other = functools.partial(steps.make_case, reg=1e-3)
    monkeypatch.setattr(steps, "make_case", other)
    assert steps.disagreement(False) > 1e-4


def test_one_program_for_all_ages_and_numbers(steps):
    assert steps.traces() == {"two lives of a network": 1, "learning rates, penalties": 1}


def test_the_published_target_has_maps_of_34_pixels(scripts):
    taps = {"first": "stem", "last": "pool"}
    model = scripts["_krr_step"].padded(kd.from_linen(kd.models.resnet18(1), taps=taps))
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    params, extra = jax.eval_shape(model.init, jax.random.key(0), x)
    found, _ = jax.eval_shape(model.apply, params, extra, x)
    assert found["first"].shape == (2, 34, 34, 64)
    assert found["last"].shape == (2, 512)
    image = jnp.arange(8.0).reshape(1, 2, 4, 1)
    wider = scripts["_krr_step"].wider(image)
    np.testing.assert_array_equal(wider[:, 1:-1, 1:-1], image)
    assert float(wider.sum()) == float(image.sum())


@pytest.mark.slow
def test_krr_step_runs(tmp_path):
    file = tmp_path / "numbers.json"
    line = [sys.executable, str(BENCHMARKS / "krr_step.py"), "--settings", "tiny", "--rounds", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [*line, "--json", str(file)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOT MET" not in done.stdout
    assert done.stdout.count("MET: KRR") == 6
    assert all(json.loads(file.read_text())["verdicts"].values())


# --- rows -----------------------------------------------------------------------------------------


def test_rows_are_kept_and_other_settings_are_refused(rows, tmp_path):
    file, made = tmp_path / "results.json", []

    def one(row, show):
        if row == ("b", 1, 0) and "b" not in made:
            made.append("b")
            raise KeyboardInterrupt
        made.append(row)
        show(1, {"loss": 0.5})
        return {"r2_source": float(len(made))}

    plan = [("a", 1, 0), ("b", 1, 0)]
    with pytest.raises(KeyboardInterrupt):
        rows.run(plan, one, file, {"steps": (1, 2)})
    found = rows.run(plan, one, file, {"steps": [1, 2]})
    assert made == [("a", 1, 0), "b", ("b", 1, 0)]
    assert rows.run(plan, one, file, {"steps": [1, 2]}) == found
    assert len(made) == 3
    with pytest.raises(SystemExit, match=r"steps = \[1, 2\], wanted is \[1, 3\]"):
        rows.run(plan, one, file, {"steps": [1, 3]})


def test_tables_show_mean_and_spread(rows):
    found = {("a", 3, 0): {"x": 1.0}, ("a", 3, 1): {"x": 3.0}, ("b", 0, 0): {"y": 1234.0}}
    lines = rows.table(found, {"x": ("X", 1), "y": ("Y", 0)})
    assert lines[2:] == ["| 3 | a | 2.0 ± 1.0 | - |", "| - | b | - | 1,234 |"]


# --- images ---------------------------------------------------------------------------------------


def options_of(script, folder, *more):
    line = ["--quick", "--side", "8", "--widths", "4", "--target-widths", "5", "--projector", "6"]
    return script.arguments([*line, "--out", str(folder), *more])


@pytest.fixture(scope="module")
def task(script, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    return images.make_task(options_of(script, folder), folder / "target")


def test_classes_are_split_and_numbered(images, script, task):
    assert sorted(set(task.source.labels.tolist())) == list(range(5))
    assert len(task.source.images) == len(task.target.images) == 80
    assert task.classes == 5
    # The bright column of class c is c / 10 of the width from the left.
    left = [part.images[:, :, :4].mean((1, 2, 3)) for part in (task.source, task.target)]
    means = [[x[task.source.labels == c].mean() for c in range(5)] for x in left]
    assert min(means[0]) > max(means[1]) + 5
    few = images._of_classes(task.target, [3, 1], 6)
    assert len(few.labels) == 6
    assert set(few.labels.tolist()) <= {0, 1}
    with pytest.raises(SystemExit, match="no images are of the classes"):
        images._of_classes(task.target, [11], None)


def test_target_images_are_resized(images):
    grey = np.full((2, 4, 6, 1), 7, np.uint8)
    found = images._resized(grey, (8, 8))
    assert found.shape == (2, 8, 8, 1)
    assert (found == 7).all()
    assert images._square(np.zeros((5, 9, 3), np.uint8), 4).shape == (4, 4, 3)


def test_data_sets_of_tfds_are_read_at_one_size(images):
    testing = importlib.import_module("tensorflow_datasets").testing
    with testing.mock_data(num_examples=12):
        found = images._read("tfds:cifar100", None, 16)
        resized = images._read("tfds:imagenet_resized/64x64", None, 64)
    assert found["train"].images.shape == found["test"].images.shape == (12, 16, 16, 3)
    assert found["train"].images.dtype == np.uint8
    assert resized["test"].images.shape == (12, 64, 64, 3)  # its validation split
    with pytest.raises(ValueError, match="name must be"):
        images._read("tfds:tiny_imagenet", None, 64)


def test_features_are_of_the_trained_network_and_kept(images, script, task, tmp_path):
    assert task.features.shape == (80, 5)
    again = images.outputs(task.network, task.variables, task.source.images)
    np.testing.assert_allclose(again, task.features, atol=1e-6)
    fresh = task.network.init(jax.random.key(0), images.scaled(task.source.images[:1]))
    assert not np.allclose(images.outputs(task.network, fresh, task.source.images), again, 1e-3)
    file = tmp_path / "features.npz"
    parts = {"a": task.source_test}
    first = images.stored_features(task.network, task.variables, parts, file)
    np.savez(file, a=2 * first["a"])
    second = images.stored_features(task.network, task.variables, parts, file)
    np.testing.assert_array_equal(second["a"], 2 * first["a"])


def test_models_normalise_pixels_themselves(images, task):
    pixels = images.scaled(task.source.images)
    assert task.networks.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-3)
    seen = []
    inner = kd.from_fn(lambda key, x: jnp.zeros(()), lambda params, x: seen.append(x) or x)
    model = images.normalized(inner, task.networks.mean, task.networks.std)
    model.apply(*model.init(jax.random.key(0), pixels), jnp.asarray(pixels))
    assert float(jnp.abs(seen[-1].mean((0, 1, 2))).max()) < 1e-2
    np.testing.assert_allclose(seen[-1].std((0, 1, 2)), 1, atol=1e-2)


def test_subsets_are_real_pairs_and_noise_is_labelled(script, task):
    table = {tuple(x.ravel().tolist()): y for x, y in zip(
        (task.source.images * np.float32(1 / 255)).astype(np.float32), task.features, strict=True
    )}  # fmt: skip
    for kind in ("random", "k-means", "herding"):
        pairs = script.subset(kind, task, 6, 0, 40)
        assert len({x.tobytes() for x in pairs["image"]}) == 6
        for x, y in zip(pairs["image"], pairs["target"], strict=True):
            np.testing.assert_array_equal(table[tuple(x.ravel().tolist())], y)
    noise = script.subset("noise", task, 3, 0, 40)
    wanted = condense.outputs(task.network, task.variables, noise["image"])
    np.testing.assert_allclose(noise["target"], wanted, atol=1e-6)


def test_few_labels_are_drawn_evenly_and_once_for_all_rows(script, task):
    labels = task.target.labels
    draws = script.few(labels.tobytes(), 2, 3)
    assert [np.bincount(labels[rows]).tolist() for rows in draws] == [[2] * 5] * 3
    assert len({tuple(rows.tolist()) for rows in draws}) == 3
    assert script.few(labels.tobytes(), 2, 3) is draws


def test_condensing_goes_on_inside_a_row(script, task, tmp_path):
    row = (script.LEARNED[1], 6, 0)

    def quiet(step, record):
        pass

    def stop(step, record):
        raise KeyboardInterrupt

    whole, times = script.learned(row, task, options_of(script, tmp_path / "a"), quiet)
    assert sorted(times) == ["cpu", "wall"]
    start = script.subset("k-means", task, 6, 0, 100)
    assert 1e-3 < np.abs(whole["image"] - start["image"]).max() < 0.1
    options = options_of(script, tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        script.learned(row, task, options, stop)
    assert not script.kept(options.out, row).exists()
    found, times = script.learned(row, task, options, quiet)
    assert times == {}  # those of a part would say too little
    for name in whole:
        np.testing.assert_array_equal(found[name], whole[name])


def test_live_targets_learn_other_pairs(script, task, tmp_path):
    row = (script.LEARNED[0], 6, 0)
    found = [
        script.learned(row, task, options_of(script, tmp_path / how, "--targets", how), print)[0]
        for how in ("cached", "live")
    ]
    assert np.abs(found[0]["image"] - found[1]["image"]).max() > 1e-3


def test_presets_have_the_published_sizes(script, capsys):
    sizes = {
        "cifar100": (1000, [128, 256, 512], 1e-4), "tiny": (2000, [64, 128, 256, 512], 1e-5),
        "imagenet64": (1000, [64, 128, 256, 512], 1e-5),
    }  # fmt: skip
    for name, (m, widths, rate) in sizes.items():
        found = script.arguments(["--preset", name, "--data", "x.npz"])
        assert (found.m, found.widths, found.rate) == ([m], widths, rate)
        assert (found.steps, found.batch_size) == (160_000, 1024)
        assert (found.pool, found.max_age) == (10, 1000)
        assert (found.targets, found.target_widths, found.shots) == ("live", [], 0)
        assert found.updates == 1000 * -(-m // 256)  # 1000 epochs of pre-training
        assert script.arguments(["--preset", name, "--quick"]).data == "made-up"
    assert script.arguments(["--preset", "cifar100"]).data == "tfds:cifar100"
    with pytest.raises(SystemExit):
        script.arguments(["--preset", "tiny"])
    assert "--data must be given" in capsys.readouterr().err
    small = script.arguments(["--data", "a/b.npz", "--m", "3", "4"])
    assert (small.m, small.targets, small.out.name) == ([3, 4], "cached", "small-b")
    assert script.arguments(["--preset", "tiny", "--data", "x.npz", "--steps", "7"]).steps == 7


def test_a_run_its_tables_and_going_on(script, tmp_path, capsys, monkeypatch):
    line = [
        "--quick", "--side", "8", "--widths", "4", "--target-widths", "5", "--projector", "6",
        "--kinds", "k-means", script.LEARNED[1], "--out", str(tmp_path),
    ]  # fmt: skip
    assert script.main(line) == 0
    first = capsys.readouterr().out
    assert "80 source images, 80 of the target, cached targets" in first
    assert first.count("| 6 | KRR-ST from k-means |") == 2  # figures, and what it costs
    assert f"{6 * (8 * 8 * 3 + 5) * 4:,} | 3 |" in first
    assert "KRR-ST from k-means, m = 6: R2 source" in first

    def never(*_, **__):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(script.condense, "condense", never)
    monkeypatch.setattr(script.condense, "pretrain", never)
    assert script.main(line) == 0
    rows = [text for text in capsys.readouterr().out.splitlines() if text.startswith("|")]
    assert rows == [text for text in first.splitlines() if text.startswith("|")]
    with pytest.raises(SystemExit, match="holds results with updates"):
        script.main([*line, "--updates", "5"])


@pytest.mark.parametrize("preset", ["cifar100", "tiny", "imagenet64"])
def test_networks_of_the_presets(script, images, preset):
    options = script.arguments(["--preset", preset, "--data", "x.npz"])
    networks = images.Networks(tuple(options.widths), (), (0.5,) * 3, (0.2,) * 3)
    x = jax.ShapeDtypeStruct((2, options.side, options.side, 3), jnp.float32)
    sizes = {"student": (networks.student(512), "features", 8192)}
    sizes["target"] = (kd.methods.barlow_twins.features(networks.backbone()), "logits", 512)
    for model, output, width in sizes.values():
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        assert jax.eval_shape(model.apply, *variables, x)[0][output].shape == (2, width)


@pytest.mark.slow
def test_a_preset_runs_on_made_up_images(tmp_path):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "krr_st_images.py"), "--preset", "cifar100", "--quick",
         "--kinds", "none", "KRR-ST from random", "--out", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "live targets" in done.stdout
