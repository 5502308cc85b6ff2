"""The CIFAR-100 table: its figures, where each method looks, and cells at a tiny size."""

from __future__ import annotations

import contextlib
import importlib
import io
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
from kdjax import models
from kdjax.terms._connected import code

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
NETWORKS = {
    "tiny": lambda n: models.ResNet(n, (1, 1), (8, 12), stem_width=8),
    "large": lambda n: models.ResNet(n, (1, 1), (8, 16), stem_width=8),
    "narrow": lambda n: models.ResNet(n, (1, 1), (6, 12), stem_width=8),
    "bottleneck": lambda n: models.BottleneckResNet(n, (1, 1), (2, 3), stem_width=8),
    "wide": lambda n: models.PreActResNet(n, (1, 1), (8, 12), stem_width=8),
    "vgg": lambda n: models.VGG(n, ((8,), (8,), (8, 12))),
    "shuffle1": lambda n: models.ShuffleNet(n, (36, 48), (2, 2), groups=3),
    "shuffle2": lambda n: models.ShuffleNet(n, (8, 12), (2, 2), last=16),
}


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("_recipes", "_cifar100", "cifar100_table", "projector_cifar100")
        found = {name: importlib.import_module(name) for name in names}
        for name in ("_cifar100", "cifar100_table"):
            patch.setattr(found[name], "NETWORKS", {**kd.models.BY_NAME, **NETWORKS})
        patch.setattr("kdjax.train._plot.draw", lambda *_, **__: None)  # seconds for each run
        yield found


@pytest.fixture(scope="module")
def table(scripts):
    return scripts["cifar100_table"]


@pytest.fixture(scope="module")
def recipes(scripts):
    return scripts["_recipes"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """48 = 3 * 16 training rows."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    (x_train, y_train), (x_test, y_test) = stripes(48), stripes(12)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


# --- the table ------------------------------------------------------------------------------------


def test_the_published_figures(table, scripts):
    counts = dict.fromkeys(("teacher", "none", "kd", "crd"), 13) | {"fsp": 6, "dkd": 11}
    found = {pair: table.published(pair) for pair in table.PAIRS}
    assert len(set(table.PAIRS)) == 13
    assert all(len(row.split()) == 14 for row in table.TABLE.split("\n")[1:-1])
    for method, count in counts.items():
        assert sum(method in figures for figures in found.values()) == count
    assert set().union(*found.values()) <= {"teacher", *table.METHODS}
    # Some of every block of the tables of RepDistiller and mdistiller.
    for pair, method, value in (
        ("resnet32x4-resnet8x4", "crd", 75.51),
        ("resnet32x4-resnet8x4", "dkd", 76.32),
        ("wrn_40_2-wrn_40_1", "vid", 73.30),
        ("vgg13-vgg8", "nst", 71.53),
        ("vgg13-mobilenetv2", "at", 59.40),
        ("resnet50-vgg8", "crd", 74.30),
        ("resnet50-mobilenetv2", "dkd", 70.35),
        ("wrn_40_2-shufflev1", "dkd", 76.70),
        ("resnet110-resnet32", "fsp", 71.89),
    ):
        assert found[pair][method] == value
    assert "fsp" not in found["wrn_40_2-wrn_40_1"]
    # The other script has its own copy of three rows.
    for pair, (plain, _) in scripts["projector_cifar100"].TABLES.items():
        assert tuple(found[pair][name] for name in ("teacher", "none", "kd")) == plain
    assert table.published("resnet14-resnet8") == {}


def test_list(table, capsys):
    table.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == list(table.PAIRS)
    assert "crd 75.51" in next(line for line in lines if line.startswith("resnet32x4-resnet8x4"))
    assert "simkd" in lines[-1]
    assert "fitnet" not in lines[-1]


@pytest.mark.parametrize(
    ("best", "figure", "shown", "within"),
    [(0.7481, 75.51, "-0.70", "yes"), (0.7480, 75.51, "-0.71", "no"), (0.8, 75.51, "+4.49", "yes")],
)
def test_lines_compare_the_best_epoch(table, recipes, best, figure, shown, within):
    outcome = recipes.Outcome(None, [0.2, best, 0.5], [1.0] * 3, 2.0)
    cells = [x.strip() for x in table.line("a-b", "crd", [outcome], figure).strip("|").split("|")]
    found = dict(zip(table.COLUMNS, cells, strict=True))
    assert found["ours (best epoch)"] == f"{100 * best:.2f}"
    assert found["last epoch"] == "50.00"
    assert (found["difference"], found["within 0.7"]) == (shown, within)
    assert found["source"] == "RepDistiller"
    assert "| - | 80.00 | - | - |" in table.line("a", "b", [outcome._replace(accuracy=[0.8])], None)


def cell_of(table, recipes, pair, method, *, rows=48, batch=16, classes=6, seed=0):
    labels = np.arange(rows) % classes
    columns = {"label": labels, "row": np.zeros((rows, 1), np.uint8)}
    dataset = kd.data.arrays({"train": columns}, num_classes=classes)
    cut = recipes.cut(rows, batch, devices=1)
    training = table.Training(dataset, 240, batch, cut, "float32", 10)
    teacher, student = (table.layered(name, classes, "float32") for name in pair.split("-"))
    rate = table.rate_of(pair.split("-")[1])
    return table.Cell(pair, method, teacher, student, training, rate, 2.0)


def test_weights_grow_by_epochs(table, recipes):
    cell = cell_of(table, recipes, "large-tiny", "dkd")
    grow = cell.growing(5.0)
    found = [float(grow(jnp.asarray(step))) for step in (0, 2, 3, 19 * 3 - 1, 19 * 3, 500)]
    np.testing.assert_allclose(found, [0.25, 0.25, 0.5, 4.75, 5.0, 5.0], rtol=1e-6)


# --- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "bottleneck", "wide", "vgg", "shuffle1", "shuffle2"])
def test_layers_are_before_and_behind_the_last_activation(table, name):
    layers, model = table.layers_of(name), table.layered(name, 6, "float32")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    random = np.random.default_rng(1)
    params, extra = jax.tree.map(lambda a: random.normal(size=a.shape).astype(a.dtype), shapes)
    out, _ = jax.jit(lambda p, e: model.apply(p, e, x, train=True))(params, extra)
    assert len(layers.maps) == 2
    for i, path in enumerate(layers.maps, 1):
        behind, before = out[f"map{i}"], out[f"before{i}"]
        assert behind.shape == before.shape
        assert path.startswith("stage")
        assert (before < 0).any()
        if name == "shuffle2":  # its two halves are dealt out
            half = before.shape[-1] // 2
            before = jnp.stack([before[..., :half], before[..., half:]], -1).reshape(before.shape)
        if name == "wide":
            assert (behind < 0).any()
        else:
            np.testing.assert_allclose(jax.nn.relu(before), behind, atol=1e-6)
    for i, path in enumerate(layers.norms, 1):
        wanted = params
        for part in path.split("/"):
            wanted = wanted[part]
        np.testing.assert_array_equal(out[f"norm{i}"]["scale"], wanted["scale"])
        assert wanted["scale"].shape == out[f"before{i}"].shape[-1:]
    if name != "shuffle2":
        np.testing.assert_allclose(out["last"].mean((1, 2)), out["pool"], atol=1e-5)
    assert set(layers.untouched) - {"last"} < set(params)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["vgg13-mobilenetv2", "resnet50-vgg8", "wrn_40_2-shufflev1"])
def test_both_networks_have_as_many_stages(table, pair):
    for name in pair.split("-"):
        model = table.layered(name, 100, "float32")

        def run(key, x, model=model):
            return model.apply(*model.init(key, x), x)[0]

        x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        out = jax.eval_shape(run, jax.random.key(0), x)
        for i in range(1, len(table.layers_of(name).maps) + 1):
            assert out[f"map{i}"].shape == out[f"before{i}"].shape
    teacher, student = (table.layers_of(name) for name in pair.split("-"))
    assert len(teacher.maps) == len(student.maps) == len(teacher.norms)


# --- objectives -----------------------------------------------------------------------------------

TERMS = {
    "none": {"hard"},
    "kd": {"hard", "soft"},
    "crd": {"hard", "crd"},
    "ab": {"hard"},
    "ft": {"hard", "ft"},
    "review_kd": {"hard", "review_kd"},
    "ofd": {"hard", "ofd"},
    "srrl": {"hard", "soft", "srrl"},
    "simkd": {"feature"},
}


@pytest.mark.parametrize("method", TERMS)
def test_methods_resolve(table, recipes, method):
    _, metrics = table.check(cell_of(table, recipes, "large-tiny", method), (8, 8, 3))
    found = {name.removeprefix("loss/") for name in metrics if name.startswith("loss/")}
    assert found == TERMS[method]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["teacher", "new"])
def test_every_cell_resolves(table, recipes, method):
    """All published cells, and the other methods where the networks fit."""
    unfit = {"kdsvd": "channels", "mgd": "height and width", "fsp": "channels"}
    for pair in table.PAIRS:
        figures = table.published(pair)
        published = [name for name in table.METHODS if name in figures]
        for name in published if method == "teacher" else set(table.METHODS) - set(published):
            cell = cell_of(table, recipes, pair, name, rows=50_000, batch=64, classes=100)
            try:
                state, metrics = table.check(cell, (32, 32, 3))
            except ValueError as error:
                assert unfit[name] in str(error)  # noqa: PT017
                assert name not in figures
                continue
            assert metrics["loss"].shape == ()
            assert "student" in state.params


def test_what_a_first_stage_does_not_reach_stays(table):
    optimizer = table.maps_alone(table.layers_of("wide"), table._constant(0.1))
    names = ("stem", "stage1", "stage2", "norm", "classifier")
    params = {"student": {name: {"x": jnp.ones(2)} for name in names}, "terms": {"x": jnp.ones(2)}}
    zero = jax.tree.map(jnp.zeros_like, params)
    moves, _ = optimizer.update(zero, optimizer.init(params), params)
    for name in names:
        decay = 0.0 if name in ("norm", "classifier") else -0.1 * 5e-4
        np.testing.assert_allclose(moves["student"][name]["x"], decay, rtol=1e-6)
    np.testing.assert_allclose(moves["terms"]["x"], -0.1 * 5e-4, rtol=1e-6)


def test_factor_transfer_is_that_of_the_table(table):
    random = np.random.default_rng(0)
    s, factor = random.normal(size=(4, 4, 4, 6)), random.normal(size=(4, 2, 2, 5))
    student = {"maps": jnp.asarray(s, jnp.float32)}
    teacher = {"factor": jnp.asarray(factor, jnp.float32)}
    term = table.channel_mean_factors("maps")
    weight = jnp.asarray([1.0, 1.0, 1.0, 0.0])

    def value(params, weight, rows):
        batch = {"weight": weight[:rows]}
        outputs = {"maps": student["maps"][:rows]}, {"factor": teacher["factor"][:rows]}
        key, step = jax.random.key(0), jnp.zeros((), jnp.int32)
        return term.loss(params, *outputs, batch, step=step, key=key)

    @jax.jit
    def run(params, weight):
        return value(params, weight, 4), value(params, weight, 3), code(params, student["maps"][:3])

    params = jax.jit(lambda key: term.init(key, student, teacher))(jax.random.key(0))
    found, fewer, translated = run(params, weight)
    assert float(found) == pytest.approx(float(fewer), rel=1e-5)
    translated = np.asarray(translated, np.float64)
    translated = translated.reshape(3, 2, 2, 2, 2, 5).mean((2, 4))  # as large as the factor
    flat = [(x.reshape(3, 4, 5) ** 2).mean(2) for x in (translated, factor[:3])]
    one, two = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in flat)
    assert float(found) == pytest.approx(np.abs(one - two).mean(), rel=1e-4)


def test_rows_from_the_device_are_the_batch(scripts):
    common = scripts["_cifar100"]
    x, label = stripes(12)
    model = common.model_of("mlp_small", 6, "float32")
    learner = kd.minimize(common.alone(model), optax.sgd(0.05))
    data = {"image": jnp.asarray(x), "label": jnp.asarray(label, jnp.int32)}
    index = jnp.asarray([7, 3, 11, 3])
    whole = {**{name: column[index] for name, column in data.items()}, "index": index}
    other = common.gathering(learner)
    frozen = {"teacher": None, "data": data}

    @jax.jit
    def run(key):
        one, two = learner.init(key, whole), other.init(key, {"index": index}, frozen)
        return learner.update(one, whole), other.update(two, {"index": index}, frozen)

    for a, b in zip(*map(jax.tree.leaves, run(jax.random.key(0))), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            continue
        np.testing.assert_array_equal(a, b)


# --- cells ----------------------------------------------------------------------------------------


def arguments(npz, out, method, *more, pair="large-tiny"):
    return [
        *("--quick", "--data", str(npz), "--pair", pair, "--method", method),
        *("--batch-size", "16", "--devices", "1", "--save-every", "1", "--out", str(out), *more),
    ]


@pytest.fixture(scope="module")
def teachers(table, npz, tmp_path_factory):
    """A folder with a trained teacher and a cell of two stages, and what was printed."""
    out = tmp_path_factory.mktemp("cells")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.setattr(table, "FIRST_EPOCHS", 240)  # as many as of the second stage: 2
        table.main(arguments(npz, out, "ab"))
    return out, shown.getvalue()


def leaves(folder):
    return [np.asarray(x) for x in jax.tree.leaves(kd.train.load_student(folder))]


def test_a_cell_runs_and_is_then_only_read(table, recipes, npz, teachers, capsys, monkeypatch):
    out, printed = teachers
    lines = printed.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| large | teacher | - |")  # no figures of other data
    result = json.loads((out / "large-tiny" / "ab" / "seed-0" / "result.json").read_text())
    assert result["steps_per_epoch"] == 3
    assert result["teacher"][0] == "large"
    assert len(result["accuracy"]) == 2
    monkeypatch.setattr(recipes.kd.train, "fit", None)
    table.main(arguments(npz, out, "ab"))
    assert capsys.readouterr().out == printed


def test_crd_runs(table, npz, teachers, capsys):
    out, _ = teachers
    table.main(arguments(npz, out, "crd"))
    assert "| large-tiny | crd |" in capsys.readouterr().out
    metrics = (out / "large-tiny" / "crd" / "seed-0" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(one)["loss/crd"] > 0 for one in metrics if "loss/hard" in one)


@pytest.mark.slow
def test_simkd_is_evaluated_with_the_teachers_classifier(table, npz, teachers, capsys):
    out, _ = teachers
    table.main(arguments(npz, out, "simkd"))
    assert "| simkd |" in capsys.readouterr().out
    params, extra = kd.train.load_student(out / "large-tiny" / "simkd" / "seed-0")
    assert set(params) == {"student", "projector"}
    teacher, _ = kd.train.load_student(out / "teachers" / "large")
    for name, value in extra["head"].items():
        np.testing.assert_array_equal(value, teacher["classifier"][name])


def noting(stages, name, run):
    def of(*given):
        stages.append(name)
        return run(*given)

    return of


def test_a_cell_of_two_stages_goes_on_after_breaking_off_in_both(
    table, scripts, recipes, npz, teachers, tmp_path, capsys, monkeypatch
):
    out, wanted = teachers
    monkeypatch.setattr(table, "FIRST_EPOCHS", 240)
    monkeypatch.setattr(table, "check", lambda *_: None)  # it passed with the whole run
    stages: list[str] = []
    for name in ("first_stage", "fit"):
        monkeypatch.setattr(table, name, noting(stages, name, getattr(table, name)))
    positions = scripts["_cifar100"].Positions
    whole = positions.from_step
    command = arguments(npz, tmp_path, "ab", "--teacher", str(out / "teachers" / "large"))
    folder = tmp_path / "large-tiny" / "ab" / "seed-0"

    for broken, saved in (("first_stage", folder.with_name("seed-0-first")), ("fit", folder)):

        def breaking(self, step, broken=broken):
            for i, batch in enumerate(whole(self, step), step):
                if i == 4 and stages[-1] == broken:
                    raise RuntimeError("gone")
                yield batch

        with monkeypatch.context() as patch:
            patch.setattr(positions, "from_step", breaking)
            with pytest.raises(RuntimeError, match="gone"):
                table.main(command)
        assert (saved / "3").is_dir()  # the first epoch is saved
        assert not (folder / "result.json").exists()
    assert stages == ["first_stage", "first_stage", "fit"]
    capsys.readouterr()
    table.main(command)
    found = capsys.readouterr().out.splitlines()[-1]
    assert found.split("|")[:8] == wanted.splitlines()[-1].split("|")[:8]
    other = out / "large-tiny" / "ab" / "seed-0"
    assert all((a == b).all() for a, b in zip(leaves(folder), leaves(other), strict=True))


def test_networks_that_do_not_fit_are_refused_before_training(table, npz, tmp_path):
    command = arguments(npz, tmp_path / "new", "fsp", pair="large-narrow")
    with pytest.raises(SystemExit, match=r"--method fsp doesn't fit large-narrow: .*channels"):
        table.main(command)
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit, match=r"--pair must be TEACHER-STUDENT of .*got 'mlp-tiny'"):
        table.main(arguments(npz, tmp_path / "new", "kd", pair="mlp-tiny"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "ft", "fsp", "crd+kd", "dkd", "rkd", "projector"])
def test_more_methods_run(table, npz, teachers, capsys, method):
    out, _ = teachers
    pair = "tiny-tiny" if method == "fsp" else "large-tiny"
    table.main(arguments(npz, out, method, "--seeds", "0", "1", pair=pair))
    assert "| 2 |" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.slow
def test_a_cell_runs_on_two_devices_many_updates_in_a_call(table, npz, tmp_path):
    command = arguments(npz, tmp_path, "crd", "--steps-per-call", "2", "--dtype", "bfloat16")
    table.main([*command, "--devices", "2"])
    folder = tmp_path / "large-tiny" / "crd" / "seed-0"
    result = json.loads((folder / "result.json").read_text())
    assert (result["devices"], result["steps_per_call"], result["dtype"]) == (2, 2, "bfloat16")


@pytest.mark.slow
def test_a_killed_cell_ends_at_the_same_bits(npz, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(BENCHMARKS / "cifar100_table.py")]
    pair, ended = "resnet8-resnet8", {}
    for name in ("whole", "killed"):
        given = command + arguments(npz, tmp_path / name, "ab", pair=pair)
        given += ["--teacher", str(tmp_path / "teacher")]
        folder = tmp_path / name / pair / "ab" / "seed-0"
        if name == "killed":
            for part in (folder.with_name("seed-0-first"), folder):
                process = subprocess.Popen(given, env=environment, stdout=subprocess.DEVNULL)
                deadline = time.monotonic() + 300
                while not list(part.glob("[0-9]*")) and process.poll() is None:
                    assert time.monotonic() < deadline
                    time.sleep(0.005)
                process.send_signal(signal.SIGKILL)
                assert process.wait() in (0, -signal.SIGKILL)
        subprocess.run(given, env=environment, stdout=subprocess.DEVNULL, check=True)
        ended[name] = leaves(folder)
    assert all((a == b).all() for a, b in zip(ended["whole"], ended["killed"], strict=True))
