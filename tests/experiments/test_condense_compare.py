"""Condensed pairs compared with other sets: what is left, and going on after a kill."""

from __future__ import annotations

import json
import math
import shutil

import jax
import numpy as np
import optax
import pytest

import kdjax as kd
from kdjax.experiments import _condense_compare, condense, runs
from kdjax.experiments import _condense_task as tasks
from kdjax.experiments._robust_progress import Progress

TINY = {
    "pairs": 6, "widths": (4,), "steps": 6, "batch_size": 16, "pool_size": 2, "max_age": 3,
    "target_epochs": 2, "pretrain_epochs": 4, "fine_tune_steps": 2, "draws": 2, "seeds": 2,
    "progress": False,
}  # fmt: skip


def columns(seed=0, size=80, classes=4):
    """Images of 6 x 6 in [0, 1], a centre for every class and noise."""
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(9).uniform(0.3, 0.7, (classes, 6, 6, 1))
    label = np.arange(size) % classes
    image = np.clip(centres[label] + 0.2 * draw.normal(size=(size, 6, 6, 1)), 0, 1)
    return {"image": image.astype(np.float32), "label": label}


@pytest.fixture(scope="module")
def dataset():
    return kd.data.arrays({"train": columns(), "test": columns(1, 40)}, name="tiny")


@pytest.fixture(scope="module")
def done(dataset, tmp_path_factory):
    return condense.compare(dataset, out=tmp_path_factory.mktemp("runs") / "done", **TINY)


def figures(report):
    """All that doesn't depend on the clock."""
    return [(row.name, row.pairs, row.updates, row.figures) for row in report.rows], (
        report.losses, report.curve,
    )  # fmt: skip


def arrays(file):
    with np.load(file) as opened:
        return dict(opened)


def same(a, b):
    return sorted(a) == sorted(b) and all(np.array_equal(a[name], b[name]) for name in a)


def test_report_says_what_every_set_is(done):
    assert [row.name for row in done.rows] == [
        "none", "noise", "random", "herding", "k-means", "KRR-ST", "all source",
    ]  # fmt: skip
    assert done.images == {
        "source": 40, "source_test": 20, "target_train": 40, "target_test": 20,
    }  # fmt: skip
    pair = 4 * (36 + done.features)
    for row in done.rows:
        count = {"none": 0, "all source": 40}.get(row.name, 6)
        assert (row.pairs, row.bytes) == (count, count * pair)
        assert row.updates == (0 if row.name == "none" else 4)
        assert ("r2_source" in row.figures) == (row.name != "none")
        for name in ("shot_1", "shot_5", "fine_tune"):
            assert all(0 <= value <= 1 for value in row.figures[name].values)
            assert len(row.figures[name].values) == 2
    assert [len(curve) for curve in done.losses] == [3, 1]
    assert [step for step, _ in done.curve] == [0, 2, 4, 6]
    assert done.curve[0][1] == done.row("k-means").figures["r2_source"].values[0]
    assert done.curve[-1][1] == done.row("KRR-ST").figures["r2_source"].values[0]


def test_pairs_start_from_real_images_and_move(done, dataset):
    folder = runs.Path(done.folder)
    found, start = arrays(folder / "pairs.npz"), arrays(folder / "seed-0" / "start.npz")
    assert sorted(found) == ["image", "mean", "std", "target"]
    assert same(found, arrays(folder / "seed-0" / "pairs.npz"))
    assert not same(found, arrays(folder / "seed-1" / "pairs.npz"))
    real = columns()
    source = real["image"][real["label"] < 2]
    np.testing.assert_allclose(found["mean"], source.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found["std"], source.std((0, 1, 2)), rtol=1e-5)
    pixels = start["image"] * found["std"] + found["mean"]
    nearest = [np.abs(source - image).max((1, 2, 3)).min() for image in pixels]
    assert max(nearest) < 1e-5
    moved = np.abs(found["image"] - start["image"]).max()
    assert 1e-3 < moved < 0.1  # 6 updates of 3e-3, falling
    target = tasks.given_target(folder, dataset)
    np.testing.assert_allclose(start["target"], target.features(pixels), rtol=1e-3, atol=1e-4)


def test_manifest_loads_the_pairs_that_were_judged(done, monkeypatch):
    monkeypatch.chdir(done.folder)
    with open("manifest.json") as file:
        found = json.load(file)
    assert found["versions"]["kdjax"] == kd.__version__
    assert found["settings"]["pairs"] == 6
    assert found["arrays"]["image"]["shape"] == [6, 6, 6, 1]
    assert len(found["load"]) == 6
    names = {}
    exec("\n".join(found["load"]), names)
    real = columns(1, 40)
    scaled = (real["image"][real["label"] < 2] - names["pairs"]["mean"]) / names["pairs"]["std"]
    target = tasks.given_target(done.folder, kd.data.arrays({"train": columns()}))
    wanted = target.features(real["image"][real["label"] < 2])
    value = condense.r2(condense.outputs(names["net"], names["variables"], scaled), wanted)
    assert value == pytest.approx(found["figures"]["r2_source"], abs=1e-4)


class Killed(BaseException):
    """Nothing catches it, so nothing is saved: as a SIGKILL."""


def test_goes_on_after_kills_and_interruptions_in_any_stage(done, dataset, tmp_path, monkeypatch):
    """The same figures, to the bit."""
    out, ended = tmp_path / "cut", []
    at, begin = Progress.at, Progress.begin

    def stopping(where, count, kind):
        def stop(self, *arguments):
            seen = self._title + (f" {arguments[0]:.3g}" if where == "at" else arguments[0])
            ended.append(seen)
            if where == "at":
                at(self, *arguments)
            else:
                begin(self, *arguments)
            if len(ended) == count:
                raise kind

        return stop

    places = [
        ("at", 1, Killed),  # the target network
        ("at", 2, KeyboardInterrupt),  # condensing, or its first logged update
        ("begin", 1, Killed),
        ("begin", 5, KeyboardInterrupt),  # a row
        ("begin", 12, Killed),  # the second seed
    ]
    for where, count, kind in places:
        ended.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Progress, where, stopping(where, count, kind))
            with pytest.raises(kind):
                condense.compare(dataset, out=out, resume=True, **TINY)
    found = condense.compare(dataset, out=out, resume=True, **TINY)
    assert figures(found) == figures(done)
    assert same(arrays(out / "pairs.npz"), arrays(runs.Path(done.folder) / "pairs.npz"))
    with monkeypatch.context() as patch:
        patch.setattr(kd.train, "fit", None)
        again = condense.compare(dataset, out=out, resume=True, **TINY)
    assert again == found
    moved = tmp_path / "elsewhere"
    shutil.move(out, moved)
    assert condense.compare(dataset, out=moved, resume=True, **TINY).folder == str(moved)


def test_source_labels_are_not_used_and_a_target_serves_again(done, tmp_path):
    """Other labels within the source and the target network of another run: the same pairs."""
    train = columns()
    train["label"] = np.where(train["label"] < 2, 1 - train["label"], train["label"])
    other = kd.data.arrays({"train": train, "test": columns(1, 40)}, name="tiny")
    options = {**TINY, "target_epochs": None, "seeds": [0]}
    found = condense.compare(other, out=tmp_path / "b", target=done.folder, **options)
    assert found.seeds == [0]
    assert math.isnan(found.row("KRR-ST").figures["shot_1"].error)
    assert found.target.startswith("ConvNet 32-64 by Barlow Twins, 2 epochs, of ")
    a, b = (arrays(runs.Path(x.folder) / "pairs.npz") for x in (done, found))
    for name, array in a.items():
        np.testing.assert_allclose(b[name], array, rtol=1e-4, atol=1e-5)


def test_a_network_trained_on_labels_can_be_the_target(dataset, tmp_path):
    net = runs.network("mlp_small", 4)
    method = kd.distill(net, None, {"hard": (1.0, kd.terms.hard_labels())})
    learner, batches = kd.minimize(method, optax.sgd(0.1)), dataset.batches("train", 32)
    state = learner.init(jax.random.key(0), batches.at(0))
    kd.train.fit(
        learner, state, batches, steps=2, checkpoint=tmp_path / "a", progress=False, plot=False
    )
    manifest = {"role": "teacher", "model": "mlp_small", "num_classes": 4, "shape": [6, 6, 1],
                "seeds": [0], "stacked": False}  # fmt: skip
    runs.write(tmp_path / "a", manifest)
    target = tasks.given_target(tmp_path / "a", dataset)
    assert "trained as teacher" in target.words
    image = columns()["image"]
    params = kd.train.load_student(tmp_path / "a")[0]
    kernel, bias = (params["stem"]["hidden"]["dense"][x] for x in ("kernel", "bias"))
    assert target.features(image).shape == (80, 64)
    wanted = np.maximum(image.reshape(80, -1) @ np.asarray(kernel) + np.asarray(bias), 0)
    np.testing.assert_allclose(target.features(image), wanted, rtol=1e-4, atol=1e-5)
    wide = kd.data.arrays({"train": {"image": np.zeros((9, 8, 8, 1)), "label": np.arange(9) % 4}})
    with pytest.raises(ValueError, match=r"data must have .* shape \(6, 6, 1\) for target"):
        tasks.given_target(tmp_path / "a", wide)
    with pytest.raises(ValueError, match="target must be a run folder"):
        tasks.given_target(tmp_path / "nowhere", wide)


def test_another_experiment_is_refused(done, dataset):
    with pytest.raises(ValueError, match=r"pairs must be 6 to continue .*, got 7\."):
        condense.compare(dataset, out=done.folder, resume=True, **{**TINY, "pairs": 7})
    with pytest.raises(ValueError, match="out must be a new folder"):
        condense.compare(dataset, out=done.folder, **TINY)
    wide = kd.data.arrays({"train": {"image": np.zeros((9, 8, 8, 1)), "label": np.arange(9) % 4}})
    with pytest.raises(ValueError, match=r"target must read images of shape \(8, 8, 1\)"):
        tasks.given_target(done.folder, wide)


def test_solver_may_change_on_resuming(done, dataset):
    found = condense.compare(dataset, out=done.folder, resume=True, solver="svd", **TINY)
    assert figures(found) == figures(done)


def test_pretraining_that_diverged_is_told(done, dataset, tmp_path, monkeypatch):
    """Outputs that aren't finite have no R2, and a NaN would pass for a result."""
    out = tmp_path / "copy"
    shutil.copytree(done.folder, out)
    for name in ("condense.json", "seed-1/rows/herding.json"):
        (out / name).unlink()

    def broken(*arguments, **options):
        return np.full_like(condense.outputs(*arguments, **options), np.nan)

    monkeypatch.setattr(_condense_compare, "outputs", broken)
    with pytest.raises(FloatingPointError, match="pre-training on herding diverged"):
        condense.compare(dataset, out=out, resume=True, **TINY)
    assert not (out / "condense.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 41}, "pairs must be at most 40, the source images there are, got 41."),
        ({"pairs": 0}, "pairs must be an integer at least 1, got 0."),
        ({"start": "best"}, "start must be one of herding, kmeans, random; got 'best'."),
        ({"solver": "lu"}, "solver must be one of auto, dual, primal, svd; got 'lu'."),
        ({"widths": (4, 4, 4)}, "widths must name at most 2 blocks"),
        ({"widths": (0,)}, "widths must be an integer at least 1, got 0."),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0, got 0.0."),
        ({"source_classes": [4]}, "source_classes must be an integer at least 0 and at most 3"),
        ({"source_classes": [1, 1]}, "source_classes must name each class once"),
        ({"source_classes": []}, "source_classes must name each class once, and at least one"),
        ({"target_classes": [1]}, "target_classes must be at least two, to be told apart"),
        ({"target_model": "resnet9"}, "target_model must be one of convnet, "),
        ({"target": "x", "target_epochs": 2}, "target_epochs must be left out with a target"),
        ({"draws": 0}, "draws must be an integer at least 1, got 0."),
        ({"seeds": 0}, "seeds must be an integer at least 1, got 0."),
        ({"seeds": [1, 1]}, "seeds must be different from each other"),
    ],
)
def test_bad_input(dataset, tmp_path, options, message):
    given = {**TINY, **options}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        condense.compare(dataset, out=tmp_path / "x", **given)
    assert str(error.value).startswith(message)
    assert not (tmp_path / "x").exists()


def test_bad_data(dataset, tmp_path):
    def refused(train, test, message, **options):
        data = kd.data.arrays({"train": train, "test": test}, num_classes=4, name="bad")
        with pytest.raises(ValueError, match=message):
            condense.compare(data, out=tmp_path / "x", **{**TINY, **options})

    bright = {**columns(), "image": columns()["image"] * 9}
    refused(bright, columns(1), r"data must be images in \[0, 1\], got values from 0 to 9")
    flat = {"image": np.zeros((8, 5), np.float32), "label": np.arange(8) % 4}
    refused(flat, flat, r"data must be images \[H, W, C\]")
    few = columns(0, 16)
    refused(few, columns(1), "target_classes must have at least 5 training images each, got 4")
    with pytest.raises(ValueError, match="'test'"):
        condense.compare(kd.data.arrays({"train": columns()}), out=tmp_path / "x", **TINY)


def test_settings_suit_the_data():
    given = dict.fromkeys(
        ("source_classes", "target_classes", "target", "target_model", "target_epochs", "pairs",
         "widths", "steps", "learning_rate", "batch_size", "pool_size")
    )  # fmt: skip

    def filled(shape, classes, **options):
        columns = {"image": np.zeros((40, *shape), np.uint8), "label": np.arange(40) % classes}
        data = kd.data.arrays({"train": columns, "test": columns})
        return tasks.filled(data, {**given, **options})

    digits = filled((8, 8, 1), 10)
    assert digits["source_classes"] == [0, 1, 2, 3, 4]
    assert digits["target_classes"] == [5, 6, 7, 8, 9]
    assert (digits["pairs"], digits["widths"], digits["target_widths"]) == (
        20, [32, 64], [32, 64, 128],
    )  # fmt: skip
    assert (digits["steps"], digits["learning_rate"], digits["batch_size"]) == (1500, 3e-3, 256)
    assert filled((28, 28, 1), 10)["widths"] == [32, 64, 128]
    photos = filled((32, 32, 3), 10)
    assert (photos["widths"], photos["steps"], photos["pool_size"]) == (
        [128, 256, 512], 160_000, 10,
    )  # fmt: skip
    assert (photos["target_model"], photos["target_widths"]) == ("resnet18", None)
    assert filled((64, 64, 3), 10)["widths"] == [64, 128, 256, 512]
    assert filled((224, 224, 3), 10)["widths"] == [32, 64, 128, 256, 512]
    everything = filled((8, 8, 1), 4, source_classes=[0, 1, 2, 3])
    assert everything["target_classes"] == [0, 1, 2, 3]


@pytest.mark.slow
def test_colour_images_get_the_published_views(tmp_path):
    """Only the shapes: one update of a small network on images of 20 pixels."""
    image = np.random.default_rng(0).uniform(size=(12, 20, 20, 3)).astype(np.float32)
    data = kd.data.arrays({s: {"image": image, "label": np.arange(12) % 2} for s in
                           ("train", "test")})  # fmt: skip
    given = {"source_classes": None, "target_classes": None, "target": None, "pairs": 2,
             "target_model": "mlp_small", "target_epochs": 1, "widths": (4,)}  # fmt: skip
    choices = tasks.filled(data, {**dict.fromkeys(TINY), **given, "source_classes": [0, 1]})
    task = tasks.load(data, choices)
    found = tasks.trained_target(task, choices, tmp_path)
    features = found.features(image)
    assert features.shape == (12, 64)
    assert np.isfinite(features).all()
    again = tasks.given_target(tmp_path, data).features(image)
    np.testing.assert_array_equal(again, features)


def test_figures_show_every_pixel_as_a_square(done, tmp_path):
    import matplotlib.image

    found = condense.pictures(done, tmp_path / "pairs.png")
    assert found is not None
    drawn = matplotlib.image.imread(found)[..., :3]
    start = arrays(runs.Path(done.folder) / "seed-0" / "start.npz")["image"]
    stored = arrays(runs.Path(done.folder) / "pairs.npz")
    pixels = np.clip(start * stored["std"] + stored["mean"], 0, 1)[..., 0]
    # 3 x 2 images of 6 pixels with lines between them: 22 pixels for 4.6 inches of 150 dots.
    side = 690 // 22
    line = np.isclose(drawn, 0.45, atol=0.01).all(-1)
    top = np.flatnonzero(line.sum(1) > 20 * side)[0]
    left = np.flatnonzero(line[top])[0]
    one = drawn[top + side : top + 7 * side, left + side : left + 7 * side, 0]
    blocks = one.reshape(6, side, 6, side)
    assert np.ptp(blocks, axis=(1, 3)).max() < 0.02
    np.testing.assert_allclose(blocks.mean((1, 3)), pixels[0], atol=0.02)
    assert condense.curves(done, tmp_path / "curve.png") == tmp_path / "curve.png"
    assert matplotlib.image.imread(tmp_path / "curve.png").std() > 0.01


def test_images_of_other_shapes_can_be_drawn(tmp_path):
    import matplotlib.image

    images = {"a": np.zeros((130, 12, 7, 3)), "b": np.ones((130, 12, 7, 3))}
    drawn = matplotlib.image.imread(condense.image_grids(images, tmp_path / "x.png", title="many"))
    assert drawn.shape[1] > drawn.shape[0] > 300
    with pytest.raises(ValueError, match=r"images\['b'\] must have shape"):
        condense.image_grids({**images, "b": images["b"][:2]}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="images must hold at least one set"):
        condense.image_grids({}, tmp_path / "x.png")
