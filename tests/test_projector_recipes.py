"""The recipes of projector distillation: their numbers, their data, and runs at a tiny size."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_images import stripes

import kdjax as kd

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("_recipes", "projector_cifar100", "projector_imagenet")
        yield {name: importlib.import_module(name) for name in names}


@pytest.fixture(scope="module")
def recipes(scripts):
    return scripts["_recipes"]


@pytest.fixture(scope="module")
def cifar(scripts):
    return scripts["projector_cifar100"]


@pytest.fixture(scope="module")
def imagenet(scripts):
    return scripts["projector_imagenet"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """88 = 5 * 16 + 8 training rows: an epoch has a smaller batch at its end."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    (x_train, y_train), (x_test, y_test) = stripes(88), stripes(36)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


def test_epochs_are_cut_as_published(recipes):
    assert recipes.cut(50_000, 64, devices=1) == (782, "keep", 1, 1)
    assert recipes.cut(50_000, 64, devices=8, per_call=71) == (782, "keep", 8, 71)
    assert recipes.cut(50_000, 64, devices=3).devices == 2
    assert recipes.cut(1_281_167, 256, devices=1) == (5005, "keep", 1, 1)
    assert recipes.cut(1_281_167, 256, devices=8) == (5004, "drop", 8, 1)  # 143 are left
    assert recipes.cut(640, 64, devices=1, per_call=4) == (10, "drop", 1, 4)
    with pytest.raises(ValueError, match=r"must divide the 781 full batches.*got 10"):
        recipes.cut(50_000, 64, devices=1, per_call=10)
    with pytest.raises(ValueError, match=r"batch_size must be at most 60"):
        recipes.cut(60, 64)


def test_accelerators_get_many_updates_in_a_call(recipes, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert recipes.cut(50_000, 64, devices=1).per_call == 71
    assert recipes.cut(51_200, 64, devices=1).per_call == 100


def rates(optimizer, steps):
    """Learning rates at steps, from the updates of a parameter that nothing decays."""
    state = optimizer.init(jnp.zeros(()))
    found = []
    for step in steps:
        there = optax.tree_utils.tree_set(state, count=jnp.asarray(step))
        found.append(-float(optimizer.update(jnp.ones(()), there, jnp.zeros(()))[0]))
    return found


def training_of(cifar, recipes, epochs=240):
    return cifar.Training(None, epochs, 64, recipes.cut(50_000, 64, devices=1), "float32", 10)


def test_cifar_learning_rate_drops_after_150_180_and_210_epochs(cifar, recipes):
    optimizer = cifar.optimizer_of(training_of(cifar, recipes), cifar.rate_of("resnet8x4"))
    drops = [150 * 782, 180 * 782, 210 * 782]
    steps = [0, *itertools.chain.from_iterable((d - 1, d) for d in drops), 240 * 782 - 1]
    wanted = [5e-2, 5e-2, 5e-3, 5e-3, 5e-4, 5e-4, 5e-5, 5e-5]
    np.testing.assert_allclose(rates(optimizer, steps), wanted, rtol=1e-5)
    assert training_of(cifar, recipes, epochs=24).drops == (15, 18, 21)
    assert {name for name in cifar.NETWORKS if cifar.rate_of(name) == 0.01} == set(cifar.GENTLE)


def test_weight_decay_is_coupled_and_of_everything(cifar, recipes):
    optimizer = cifar.optimizer_of(training_of(cifar, recipes), 0.05)
    params = {"student": {"scale": jnp.full(2, 3.0)}, "terms": {"kernel": jnp.ones((2, 2))}}
    zero = jax.tree.map(jnp.zeros_like, params)
    state = optimizer.init(params)
    first, state = optimizer.update(zero, state, params)
    second, _ = optimizer.update(zero, state, params)
    for one, two, p in zip(*map(jax.tree.leaves, (first, second, params)), strict=True):
        np.testing.assert_allclose(one, -0.05 * 5e-4 * p, rtol=1e-6)
        np.testing.assert_allclose(two, 1.9 * one, rtol=1e-6)  # through the momentum


def loss_of(script, name, feature_weight=2.0):
    """Metrics of one loss of tiny perceptrons, and the teacher."""
    student, teacher = (script.model_of(net, 6, "float32") for net in ("mlp_small", "mlp"))
    x, y = stripes(12)
    batch = {"image": x, "label": y.astype(np.int32), "index": np.arange(12, dtype=np.int32)}
    method = script.method_of(name, student, teacher, feature_weight)

    @jax.jit
    def run(batch):
        frozen = teacher.init(jax.random.key(1), teacher.read(batch))
        params, extra = method.init(jax.random.key(0), batch, frozen)
        key, step = jax.random.key(2), jnp.zeros((), jnp.int32)
        ready = method.prepare(params, extra, batch, frozen, step=step, key=key, axis_name=None)
        loss, (_, metrics) = method.loss(
            params, extra, ready, frozen, step=step, key=key, axis_name=None
        )
        return loss, metrics

    return jax.tree.map(float, run(batch)[1])


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("none", {"hard": 1.0}),
        ("kd", {"hard": 0.1, "soft": 0.9}),
        ("projector", {"hard": 1.0, "feature": 2.0}),
    ],
)
def test_cifar_totals(cifar, name, weights):
    found = loss_of(cifar, name)
    assert {k.removeprefix("loss/") for k in found if k.startswith("loss/")} == set(weights)
    total = sum(weight * found[f"loss/{term}"] for term, weight in weights.items())
    assert found["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("kd", {"hard": 1.0, "soft": 1.0}),
        ("projector", {"hard": 1.0, "feature": 2.0, "soft": 1.0}),
        ("log-correlation", {"hard": 1.0, "feature": 2.0, "soft": 0.0}),
    ],
)
def test_imagenet_totals(imagenet, name, weights):
    found = loss_of(imagenet, name)
    total = sum(weight * found[f"loss/{term}"] for term, weight in weights.items())
    assert found["loss"] == pytest.approx(total, rel=1e-5)


def test_every_published_row_can_be_built(cifar, imagenet):
    for pair in cifar.TABLES:
        teacher, student = pair.split("-")
        found = cifar.published(pair)
        assert len(found["teacher"]) == len(found["none"]) >= 1
        assert {teacher, student} <= set(cifar.NETWORKS)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    pair = [kd.from_linen(imagenet.NETWORKS[name](10)) for name in ("resnet34", "resnet18")]
    stems = [jax.eval_shape(one.init, jax.random.key(0), x)[0]["stem"] for one in pair]
    assert all(stem["conv"]["conv"]["kernel"].shape == (7, 7, 3, 64) for stem in stems)
    assert set(imagenet.TABLES[imagenet.PAIR]) == {"teacher", *imagenet.METHODS}
    values = [one.value for one in imagenet.published(imagenet.PAIR)["projector"]]
    assert values == [71.87, 71.63, 71.93]
    assert [one.value for one in cifar.published("resnet32x4-resnet8x4")["projector"]] == [
        76.55,
        76.44,
    ]
    assert not any(cifar.published("resnet14-resnet8").values())


@pytest.mark.slow
def test_networks_of_different_families_fit(cifar):
    student, teacher = (cifar.model_of(name, 100, "bfloat16") for name in ("mobilenetv2", "vgg13"))
    learner = kd.minimize(cifar.method_of("projector", student, teacher, 2.0), optax.sgd(0.1))
    batch = {
        "image": jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((64,), jnp.int32),
        "index": jax.ShapeDtypeStruct((64,), jnp.int32),
    }
    key = jax.random.key(0)
    frozen = jax.eval_shape(lambda key, batch: teacher.init(key, teacher.read(batch)), key, batch)
    state = jax.eval_shape(learner.init, key, batch, frozen)
    layers = state.params["terms"]["feature"]
    assert [layers[i]["kernel"].shape for i in "01"] == [(1280, 1024), (1024, 512)]
    after, metrics = jax.eval_shape(learner.update, state, batch, frozen)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert metrics["loss"].dtype == jnp.float32


def test_the_table_says_ours_minus_theirs(recipes):
    outcomes = [recipes.Outcome(None, [0.5, last], [1.0, 1.0], 2.0) for last in (0.70, 0.72)]
    published = [recipes.Published(70.0, "A"), recipes.Published(72.5, "B")]
    lines = recipes.rows("net", "kd", outcomes, published).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [len(cell) for cell in cells] == [len(recipes.COLUMNS)] * 2
    assert cells[0][2] == "71.00 ± 1.00"
    assert [cell[6] for cell in cells] == ["+1.00", "-1.50"]
    assert "| 70.00 | - | - | - | 1 | 2 s |" in recipes.rows("net", "kd", outcomes[:1], [])


def test_top_k_counts_ranks(recipes):
    random = np.random.default_rng(0)
    logits, label = random.normal(size=(40, 7)).astype(np.float32), random.integers(0, 7, 40)
    ranks = (-logits).argsort(1).argsort(1)[np.arange(40), label]
    for k in (1, 5):
        found, weight = recipes.top_k({"logits": logits}, {"label": label}, k)
        np.testing.assert_array_equal(found, ranks < k)
        assert weight.all()
    logits[0], label[1] = np.nan, -1
    logits[2], label[2] = 0.0, 1  # of equal ones the first wins
    found, weight = recipes.top_k({"logits": logits}, {"label": label}, 1)
    assert found[0] == 0
    assert weight[1] == 0
    assert found[2] == 0


def test_models_normalise_raw_and_cropped_images_alike(cifar):
    x, _ = stripes(2)
    model = cifar.model_of("mlp_small", 6, "float32")
    raw = np.asarray(model.read({"image": jnp.asarray(x)}))
    wanted = (x / 255 - np.asarray(cifar.MEAN)) / np.asarray(cifar.STD)
    np.testing.assert_allclose(raw, wanted, atol=1e-5)
    scaled = model.read({"image": jnp.asarray(x, jnp.float32) / 255})
    np.testing.assert_allclose(raw, scaled, atol=1e-5)
    assert cifar.model_of("mlp_small", 6, "float32") is model


def options(npz, out, *more):
    """A command of the CIFAR recipe that takes seconds: two devices, five updates a call."""
    return [
        *("--quick", "--data", str(npz), "--pair", "mlp_small-convnet_small"),
        *("--batch-size", "16", "--devices", "2", "--steps-per-call", "5", "--save-every", "1"),
        *("--out", str(out), *more),
    ]


@pytest.fixture(scope="module")
def row(cifar, npz, tmp_path_factory):
    """A finished row, and where it lies."""
    out = tmp_path_factory.mktemp("row")
    with pytest.MonkeyPatch.context() as patch:
        printed = io.StringIO()
        patch.setattr(sys, "stdout", printed)
        cifar.main(options(npz, out))
    return out, printed.getvalue()


STUDENT = Path("mlp_small-convnet_small", "projector", "seed-0")
TEACHER = Path("teachers", "mlp_small")


@pytest.mark.slow
def test_a_row_runs_to_the_end(row):
    out, printed = row
    lines = printed.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| mlp_small | teacher |")
    result = json.loads((out / STUDENT / "result.json").read_text())
    assert result["steps_per_epoch"] == 6  # five of 16 and one of 8
    assert result["drop_steps"] == [round(6 * 3 * part / 240) for part in (150, 180, 210)]
    assert len(result["accuracy"]) == len(result["top5"]) == 3
    assert result["epoch_seconds"] > 0
    assert (result["devices"], result["steps_per_call"]) == (2, 5)
    assert result["teacher"][0] == "mlp_small"
    state, _ = kd.train.load_student(out / STUDENT)
    assert "classifier" in state


def test_a_finished_row_is_only_read(row, cifar, npz, capsys, recipes, monkeypatch):
    out, printed = row
    monkeypatch.setattr(recipes.kd.train, "fit", None)
    cifar.main(options(npz, out))
    assert capsys.readouterr().out == printed


def test_a_folder_with_another_recipe_is_refused(row, cifar, npz):
    out, _ = row
    with pytest.raises(ValueError, match=r"feature_weight = 2.0, wanted is 1.0"):
        cifar.main(options(npz, out, "--feature-weight", "1"))


def leaves(folder):
    return [np.asarray(x) for x in jax.tree.leaves(kd.train.load_student(folder))]


def test_a_row_that_broke_off_ends_at_the_same_bits(row, cifar, npz, tmp_path, recipes):
    out, _ = row
    arguments = options(npz, tmp_path, "--teacher", str(out / TEACHER))
    whole = recipes._timed

    def breaking(evaluate):
        timed, calls = whole(evaluate), itertools.count()

        def of(state):
            if next(calls) == 1:
                raise RuntimeError("gone")
            return timed(state)

        return of

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "_timed", breaking)
        with pytest.raises(RuntimeError, match="gone"):
            cifar.main(arguments)
    folder = tmp_path / STUDENT
    assert not (folder / "result.json").exists()
    assert (folder / "6").is_dir()  # the first epoch is saved
    cifar.main(arguments)
    wanted = leaves(out / STUDENT)
    assert all((a == b).all() for a, b in zip(leaves(folder), wanted, strict=True))
    curves = [json.loads((path / "result.json").read_text()) for path in (folder, out / STUDENT)]
    assert curves[0]["accuracy"] == curves[1]["accuracy"]


@pytest.mark.slow
def test_a_row_that_was_killed_ends_at_the_same_bits(row, npz, tmp_path):
    out, _ = row
    command = [sys.executable, str(BENCHMARKS / "projector_cifar100.py")]
    command += options(npz, tmp_path / "killed", "--teacher", str(out / TEACHER))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    folder = tmp_path / "killed" / STUDENT
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(folder.glob("[0-9]*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (0, -signal.SIGKILL)
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    wanted = leaves(out / STUDENT)
    assert all((a == b).all() for a, b in zip(leaves(folder), wanted, strict=True))


def test_lists(cifar, imagenet, capsys):
    cifar.main(["--list"])
    assert capsys.readouterr().out.splitlines() == list(cifar.TABLES)
    imagenet.main(["--list"])
    assert "--pair resnet34-resnet18 --method projector" in capsys.readouterr().out
    for script in (cifar, imagenet):
        with pytest.raises(SystemExit, match=r"--pair must be TEACHER-STUDENT"):
            script.main(["--pair", "resnet8"])


# ImageNet's images


def draws_of(count, seed=0):
    return np.random.default_rng(seed).random((count, 10, 4))


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (224, 224), (40, 33)])
def test_random_parts_lie_inside_and_have_the_recipes_shape(imagenet, width, height):
    boxes = np.asarray([imagenet.crop_box(draws, width, height) for draws in draws_of(2000)])
    left, top, w, h = boxes.T
    assert (boxes[:, :2] >= 0).all()
    assert (left + w <= width).all()
    assert (top + h <= height).all()
    area, sides = w * h / (width * height), w / h
    slack = 2 / min(width, height) ** 0.5  # sides are whole pixels
    assert 0.08 * (1 - slack) <= area.min() < 0.1
    assert 0.9 < area.max() <= 1
    assert 3 / 4 * (1 - slack) < sides.min() < 0.8
    assert 1.25 < sides.max() < 4 / 3 * (1 + slack)
    assert top.max() > 0.3 * height  # every place occurs
    assert left.min() == top.min() == 0


def test_draws_have_the_recipes_meaning(imagenet):
    middle = np.full((10, 4), 0.5)
    assert imagenet.crop_box(middle, 100, 100) == (14, 14, 73, 73)  # 54 % of the area
    # The first try is too wide, the second fits.
    tries = np.stack([[1.0, 1.0, 0, 0], [0.0, 0.5, 0.999, 0.0], *([[0.5] * 4] * 8)])
    assert imagenet.crop_box(tries, 100, 100) == (72, 0, 28, 28)


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(100, 10, (43, 0, 13, 10)), (10, 100, (0, 43, 10, 13))],
)
def test_no_fitting_part_leaves_the_centre(imagenet, width, height, box):
    assert imagenet.crop_box(np.ones((10, 4)), width, height) == box


def image_of(array):
    from PIL import Image

    return Image.fromarray(array)


def test_the_test_image_is_the_centre(imagenet):
    across = np.broadcast_to(np.arange(250, dtype=np.uint8)[None, :, None], (128, 250, 3))
    found = imagenet.centre_crop(image_of(across), 112)
    assert found.shape == (112, 112, 3)
    # Nothing is resized: the shorter side has 128 = 112 * 256 / 224 pixels already.
    np.testing.assert_array_equal(found[0, :, 0], np.arange(69, 181))
    tall = np.broadcast_to(np.arange(0, 200, dtype=np.uint8)[:, None, None], (200, 80, 3))
    assert imagenet.centre_crop(image_of(tall), 8).shape == (8, 8, 3)


def test_crops_depend_on_seed_epoch_and_row_only(imagenet):
    image = image_of(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    first = imagenet.random_resized_crop(image, 8, 0, 1, 2)
    np.testing.assert_array_equal(first, imagenet.random_resized_crop(image, 8, 0, 1, 2))
    for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert (first != imagenet.random_resized_crop(image, 8, *key)).any()


def encoded(image):
    stored = io.BytesIO()
    image_of(image).save(stored, "JPEG", quality=95)
    stored.seek(0)
    return stored


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """Images of several sizes as TFDS keeps ImageNet: JPEG, train and validation."""
    import tensorflow_datasets as tfds

    sizes = {"train": 40, "validation": 20}
    features = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=6),
    }

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            found = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=found)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in sizes}

        def _generate_examples(self, split):
            images, labels = stripes(sizes[split], 14, 10)
            for row in range(sizes[split]):
                image = images[row, : 14 - row % 3]
                yield row, {"image": encoded(image), "label": labels[row]}

    Builder.name = "tiny_jpegs"
    folder = tmp_path_factory.mktemp("tfds")
    Builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def imagenet_options(data, out, *more):
    return [
        *("--quick", "--data", str(data), "--pair", "convnet_small-mlp_small"),
        *("--batch-size", "16", "--devices", "1", "--size", "8", "--threads", "2"),
        *("--out", str(out), *more),
    ]


@pytest.mark.slow
def test_an_imagenet_row_runs_to_the_end(imagenet, jpegs, tmp_path, capsys):
    arguments = imagenet_options("tfds:tiny_jpegs", tmp_path, "--data-dir", str(jpegs))
    imagenet.main(arguments)
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 4
    student = tmp_path / "convnet_small-mlp_small" / "projector" / "seed-0"
    result = json.loads((student / "result.json").read_text())
    assert result["steps_per_epoch"] == 3  # 16, 16 and 8
    assert result["drop_steps"] == [round(9 * part / 100) for part in (30, 60, 90)]
    assert result["data"] == ["tiny_jpegs", 40, 20]
    assert len(result["accuracy"]) == 3
    imagenet.main(arguments)
    assert capsys.readouterr().out == printed


@pytest.fixture
def batches(imagenet, recipes, npz):
    import concurrent.futures

    source = imagenet.from_npz(str(npz))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        cut = recipes.cut(88, 16, devices=1)
        yield imagenet.Training(source, source.size, 6, 3, 16, cut, "float32", 1, pool)


def same(one, two):
    return set(one) == set(two) and all((one[k] == two[k]).all() for k in one)


def test_image_batches_resume_anywhere(batches):
    data = batches.train(0)
    unbroken = list(itertools.islice(data.from_step(0), 14))
    resumed = list(itertools.islice(data.from_step(5), 9))
    assert all(same(a, b) for a, b in zip(unbroken[5:], resumed, strict=True))
    assert [len(batch["label"]) for batch in unbroken[:7]] == [16] * 5 + [8] + [16]
    assert unbroken[0]["image"].dtype == np.uint8
    assert set(unbroken[0]) == {"image", "label", "index"}
    _, labels = stripes(88)
    for batch in unbroken:
        np.testing.assert_array_equal(batch["label"], labels[batch["index"]])
    first, second = (
        {int(i): x for b in part for i, x in zip(b["index"], b["image"], strict=True)}
        for part in (unbroken[:6], unbroken[6:12])
    )
    changed = [row for row in first if (first[row] != second[row]).any()]
    assert len(first) == len(second) == 88
    assert len(changed) > 80  # another epoch, other crops
    assert not same(unbroken[0], next(batches.train(1).from_step(0)))


def test_test_images_are_padded_with_weight_0(batches):
    data = batches.test()
    found = list(data)
    assert len(found) == 3
    assert found[-1]["weight"].sum() == 4  # 36 = 2 * 16 + 4
    assert (found[-1]["label"][4:] == -1).all()
    assert same(found[0], next(iter(data)))


def test_a_broken_image_ends_the_batches_and_abandons_the_rest(batches):
    def read(split, row):
        if row == 3:
            raise OSError("truncated")
        return source.read(split, row)

    source = batches.source
    broken = batches._replace(source=source._replace(read=read))
    with pytest.raises(OSError, match="truncated"):
        list(itertools.islice(broken.train(0).from_step(0), 6))
    data = batches.train(0).from_step(0)
    next(data)
    data.close()
