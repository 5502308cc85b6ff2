"""What is kept on disk, resumed from, and refused."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train import tiny_run as tiny

import kdjax as kd
from kdjax.train import _trees
from kdjax.train._checkpoint import Checkpoints


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def everything(folder):
    """Content of every file, to see that nothing was touched."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    state = tiny.run(folder, 9, keep=2)
    return folder, state


@pytest.fixture
def folder(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def test_stops_and_resumes_to_the_bit_with_the_same_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"evaluate": tiny.held_out, "eval_every": 4, "keep": 5}
    whole = tiny.run("whole", 14, **options)
    for steps in (2, 5, 14):
        parts = tiny.run("parts", steps, **options)
    assert tiny.same(whole, parts)
    logs = []
    for name in ("whole", "parts"):
        found = lines(tmp_path / name / "metrics.jsonl")
        logs.append({x["step"]: (x["loss"], x.get("eval/accuracy")) for x in found})
        assert [x["step"] for x in found] == sorted(logs[-1])
    loss, both = logs[0].pop(2), logs[1].pop(2)
    assert loss[0] == both[0]
    assert both[1] is not None  # step 2 was the last one for a while, and so was evaluated
    assert logs[0] == {step: logs[1][step] for step in logs[0]}


def test_a_finished_run_returns_at_once(folder, finished):
    before = everything(folder)
    state = tiny.run(folder, 9, data=tiny.Data(poison=0))
    assert tiny.same(state, finished[1])
    assert everything(folder) == before


def test_lines_after_the_restored_step_are_dropped(folder, finished):
    file = folder / "metrics.jsonl"
    text = file.read_text()
    file.write_text(text + '{"step": 10, "loss": 1.0}\n{"step": 11, "lo')
    state = tiny.run(folder, 12)
    steps = [line["step"] for line in lines(file)]
    assert steps == [2, 4, 6, 8, 9, 10, 12]
    assert file.read_text().startswith(text)
    assert int(state.step) == 12


def test_garbage_in_the_log_is_dropped(folder):
    file = folder / "metrics.jsonl"
    good = file.read_bytes()
    file.write_bytes(b"\x80\xff\x00\n" + good + b'{"step": 9, "lo\xffss": 1.0}\n\xfe\xed')
    tiny.run(folder, 12)
    assert [line["step"] for line in lines(file)] == [2, 4, 6, 8, 9, 10, 12]
    assert file.read_bytes().startswith(good)


def test_a_folder_has_one_run_at_a_time(folder, finished):
    def second(step):
        before = everything(folder)
        with pytest.raises(ValueError, match=r"checkpoint .*run is being written by another run"):
            tiny.run(folder, 30)
        assert int(kd.train.restore(folder, tiny.start()).step) == 9
        kd.train.load_student(folder)
        assert everything(folder) == before
        return tiny.Data().from_step(step)

    tiny.run(folder, 12, data=second)
    assert int(tiny.run(folder, 15).step) == 15


def test_a_refused_run_leaves_no_lock(folder):
    with pytest.raises(ValueError, match="another seed"):
        kd.train.fit(tiny.LEARNER, tiny.start(seed=1), tiny.Data(), steps=12, checkpoint=folder)
    (folder / "9" / "metrics").mkdir()
    (folder / "9" / "metrics" / "metrics").write_text("{")
    with pytest.raises(ValueError, match="metrics file of one of its steps is damaged"):
        tiny.run(folder, 12)
    shutil.rmtree(folder / "9" / "metrics")
    assert int(tiny.run(folder, 12).step) == 12


def test_the_lock_dies_with_its_owner_but_not_with_his_workers(tmp_path):
    program = """
import os, pathlib, sys, time
from kdjax.data._locks import locked
with locked(pathlib.Path(sys.argv[1]), "taken"):
    if os.fork() == 0:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, text=True)
    try:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another run"):
            Checkpoints(tmp_path)
        owner.kill()
        owner.wait()
        Checkpoints(tmp_path).close()
        os.killpg(owner.pid, 0)  # the worker lives
    finally:
        os.killpg(owner.pid, signal.SIGKILL)
        owner.stdout.close()


def test_a_checkpoint_without_its_record_of_sizes_is_read(folder, finished):
    """As where a kill came right after it was complete."""
    (folder / "9" / "sizes.json").unlink()
    (folder / "9" / ".sizes.json").write_text('{"half')
    assert tiny.same(kd.train.restore(folder, tiny.start()), finished[1])
    assert int(tiny.run(folder, 12).step) == 12
    (folder / "12" / "sizes.json").unlink()
    kd.train.load_student(folder)
    assert int(tiny.run(folder, 14).step) == 14


@pytest.mark.parametrize(("best", "mode"), [("accuracy", "max"), (("score", "min"), "min")])
def test_latest_and_best_are_kept(tmp_path, best, mode):
    scores = {4: 0.2, 8: 0.9, 12: 0.3, 16: float("nan"), 18: 0.1, 20: 0.4, 24: 0.5}
    sign = 1 if mode == "max" else -1
    name = best if isinstance(best, str) else best[0]

    def evaluate(state):
        return {name: sign * scores[int(state.step)], "other": 1.0}

    options = {"evaluate": evaluate, "eval_every": 4, "save_every": 6, "keep": 2, "best": best}
    tiny.run(tmp_path, 18, **options)
    tiny.run(tmp_path, 24, **options)
    assert steps_in(tmp_path) == [8, 18, 24]
    assert int(kd.train.restore(tmp_path, tiny.start(), step="best").step) == 8
    assert int(kd.train.restore(tmp_path, tiny.start(), step=18).step) == 18
    assert int(kd.train.restore(tmp_path, tiny.start()).step) == 24


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_first_of_equal_results_is_the_best(tmp_path, mode):
    def evaluate(state):
        return {"score": 0.5}

    options = {"evaluate": evaluate, "eval_every": 2, "save_every": 2, "keep": 1}
    tiny.run(tmp_path, 6, best=("score", mode), **options)
    assert int(kd.train.restore(tmp_path, tiny.start(), step="best").step) == 2
    assert int(kd.train.restore(tmp_path, tiny.start()).step) == 6


def test_best_that_says_nothing_about_its_direction(tmp_path):
    options = {"evaluate": lambda state: {"score": 1.0}}
    with pytest.raises(ValueError, match="best must say which way is better"):
        tiny.run(tmp_path, 3, best="score", **options)
    with pytest.raises(ValueError, match="best must be the name of a metric or"):
        tiny.run(tmp_path, 3, best=("score", "up"), **options)
    with pytest.raises(ValueError, match="evaluate has no entry 'acc'; it has score"):
        tiny.run(tmp_path, 3, best="acc", **options)


def test_restore_from_shapes_alone(folder, finished):
    like = jax.eval_shape(tiny.LEARNER.init, jax.random.key(0), tiny.Data().at(0))
    assert tiny.same(kd.train.restore(folder, like), finished[1])


@pytest.mark.parametrize(
    ("step", "text"),
    [(7, "one of 6, 9"), ("last", "one of 6, 9"), ("best", "written without best=")],
)
def test_restore_of_a_step_that_is_not_there(folder, step, text):
    with pytest.raises(ValueError, match=f"step must be .*{text}"):
        kd.train.restore(folder, tiny.start(), step=step)


def test_restore_from_an_empty_folder(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match="holds no complete checkpoint"):
            kd.train.restore(path, tiny.start())
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="checkpoint must be a folder, got the file"):
        kd.train.restore(tmp_path / "file", tiny.start())


def test_load_student_knows_no_model(folder, finished):
    params, extra = kd.train.load_student(folder)
    assert extra == {}
    for name, value in finished[1].params["student"].items():
        np.testing.assert_array_equal(params[name], value)
    score = kd.train.evaluate(tiny.MODEL, (params, extra), [tiny.Data().at(0)])
    assert score["accuracy"] > 0.3


def test_all_kinds_of_leaves_come_back(tmp_path):
    extra = {
        "student": {"key": jax.random.key(3), "none": None, "list": [jnp.ones(2), {}]},
        "half": jnp.array([1.5, -0.0], jnp.bfloat16),
        "flags": jnp.array([True, False]),
        "small": jnp.array([-3, 4], jnp.int8),
        "empty": jnp.zeros((0, 3)),
    }
    state = tiny.start()._replace(extra=extra)
    state = kd.train.fit(
        tiny.LEARNER, state, tiny.Data(), steps=2, checkpoint=tmp_path, progress=False, plot=False
    )
    back = kd.train.restore(tmp_path, state)
    assert back.extra["student"]["key"].dtype == state.extra["student"]["key"].dtype

    def as_words(x):
        return jax.random.key_data(x) if x.dtype == back.key.dtype else x

    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(as_words(a), as_words(b))
    _, student = kd.train.load_student(tmp_path)
    assert jnp.issubdtype(student["key"].dtype, jax.dtypes.prng_key)


def another(kind):
    if kind == "optimizer":
        learner = tiny.make(optax.sgd(0.1))
        return learner, tiny.start(learner), "opt/"
    state = tiny.start()
    params = {
        "width": {"student": tiny.init(state.key, tiny.X, 17)},
        "name": {"student": {"c": state.params["student"]["b"], **state.params["student"]}},
        "dtype": {
            "student": jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params["student"])
        },
    }[kind]
    words = {
        "width": r"params/student/a is float32\[8,16\] in the checkpoint and float32\[8,17\] here",
        "name": "the checkpoint has no params/student/c",
        "dtype": r"params/student/a is float32\[8,16\] in the checkpoint and bfloat16",
    }[kind]
    return tiny.LEARNER, state._replace(params=params), words


@pytest.mark.parametrize("kind", ["optimizer", "width", "name", "dtype"])
def test_a_checkpoint_of_another_model_is_refused(folder, kind):
    before = everything(folder)
    learner, state, words = another(kind)
    given = {"steps": 20, "checkpoint": folder, "progress": False}
    with pytest.raises(ValueError, match=f"is of another model or optimizer: .*{words}"):
        kd.train.fit(learner, state, tiny.Data(), **given)
    with pytest.raises(ValueError, match=words):
        kd.train.restore(folder, state)
    assert everything(folder) == before


@pytest.mark.parametrize(
    ("state", "data", "steps", "text"),
    [
        (tiny.start(seed=1), tiny.Data(), 20, "state.key must be the key that the run"),
        (tiny.start(), tiny.Data(seed=8), 20, "its seed was 7 and is 8; to go on with other data"),
        (tiny.start(), tiny.Data(), 5, "steps must be at least 9"),
        (tiny.start()._replace(step=jnp.int32(12)), tiny.Data(), 20, "state is at step 12, beyond"),
    ],
)
def test_another_run_is_refused(folder, state, data, steps, text):
    before = everything(folder)
    with pytest.raises(ValueError, match=text):
        kd.train.fit(tiny.LEARNER, state, data, steps=steps, checkpoint=folder, progress=False)
    assert everything(folder) == before


def test_data_that_does_not_describe_itself_is_taken(folder, finished):
    batches = [tiny.Data().at(step) for step in range(12)]
    unbroken = kd.train.fit(tiny.LEARNER, tiny.start(), batches, steps=12, progress=False)
    assert tiny.same(tiny.run(folder, 12, data=batches), unbroken)


def essential(folder):
    """The files without which the newest checkpoint can't be right."""
    files = [path for path in (folder / "9").rglob("*") if path.is_file()]
    return [p for p in files if p.name not in ("commit_success.txt", "sizes.json")]


def test_a_damaged_checkpoint_is_refused_and_left(folder):
    clean = everything(folder)
    assert len(essential(folder)) > 5
    for path in essential(folder):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        before = everything(folder)
        with pytest.raises(ValueError, match=r"9 is damaged and was left .*continue from step 6"):
            tiny.run(folder, 20)
        assert everything(folder) == before
        path.unlink()
        with pytest.raises(ValueError, match=r"9 is damaged .*missing"):
            kd.train.restore(folder, tiny.start())
        path.write_bytes(content)
    assert everything(folder) == clean
    shutil.rmtree(folder / "9")
    assert int(tiny.run(folder, 9).step) == 9


def test_flipped_bits_are_noticed(tmp_path):
    state = tiny.start()._replace(params=jax.random.normal(jax.random.key(0), (64, 64)))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {}, {})
    checkpoints.close()
    files = [path for path in (tmp_path / "1").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    assert largest.stat().st_size > 10_000
    assert tiny.same(kd.train.restore(tmp_path, state), state)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0x10
    largest.write_bytes(content)
    with pytest.raises(ValueError, match=r"1 is damaged .*start anew"):
        kd.train.restore(tmp_path, state)


def test_checksums_see_every_leaf_and_every_order():
    key = jax.random.key(0)
    leaves = [
        jax.random.normal(key, (5, 4)),
        jax.random.normal(key, (6,), jnp.bfloat16),
        jnp.arange(6, dtype=jnp.int8),
        jnp.array([True, False, True]),
        jnp.array([1 + 2j, 3 - 1j]),
        jax.random.split(key, 4),
    ]
    for x in leaves:
        swapped = x[jnp.array([1, 0, *range(2, len(x))])]
        a, b = (_trees.checksums({"x": y}) for y in (x, swapped))
        assert a != b
        assert a == _trees.checksums({"x": x})
    x = jax.random.normal(key, (16, 8))
    split = kd.parallel.shard_batch({"x": x}, kd.parallel.data_mesh(8))
    assert _trees.checksums({"x": x}) == _trees.checksums(split)
    with jax.enable_x64(True):
        y = jnp.arange(5, dtype=jnp.float64)
        assert _trees.checksums({"x": y}) != _trees.checksums({"x": jnp.nextafter(y, 9.0)})


def test_runs_without_matplotlib(tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    tiny.run(tmp_path, 3, plot=True)
    assert not (tmp_path / "curves.png").exists()


def test_a_plot_that_fails_stops_nothing(tmp_path, monkeypatch, caplog):
    from matplotlib.figure import Figure

    def fails(*args, **options):
        raise RuntimeError("no ink")

    monkeypatch.setattr(Figure, "savefig", fails)
    assert int(tiny.run(tmp_path, 3, plot=True).step) == 3
    assert "could not draw" in caplog.text
