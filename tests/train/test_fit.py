"""The loop: what it returns, logs, evaluates and refuses."""

import json
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train import tiny_run as tiny

import kdjax as kd
from kdjax.train import _run

fit = kd.train.fit
OFF = {"progress": False, "plot": False}


def bare(steps, learner=tiny.LEARNER, frozen=None):
    """The loop that fit stands for."""
    update, state = jax.jit(learner.update), tiny.start(learner)
    losses = []
    for step in range(steps):
        state, metrics = update(state, tiny.Data().at(step), frozen)
        losses.append(float(metrics["loss"]))
    return state, losses


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_equals_a_bare_loop_and_leaves_the_callers_arrays_alive():
    state = tiny.start()
    before = tiny.leaves(state)
    result = fit(tiny.LEARNER, state, tiny.Data(), steps=23, **OFF)
    assert tiny.same(result, bare(23)[0])
    for now, then in zip(tiny.leaves(state), before, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("kind", ["callable", "list", "generator"])
def test_kinds_of_data(kind):
    data = {
        "callable": tiny.Data().from_step,
        "list": [tiny.Data().at(step) for step in range(9)],
        "generator": tiny.Data().from_step(0),
    }[kind]
    assert tiny.same(fit(tiny.LEARNER, tiny.start(), data, steps=9, **OFF), bare(9)[0])


def test_one_buffer_twice_in_the_state():
    state = tiny.start()
    state = state._replace(extra={**state.extra, "ema": state.params["student"]})
    assert int(fit(tiny.LEARNER, state, tiny.Data(), steps=3, **OFF).step) == 3


def test_one_trace_for_a_run_and_for_the_next_seed():
    traces = []

    def counted(state, batch, frozen=None):
        traces.append(1)
        return tiny.LEARNER.update(state, batch, frozen)

    learner = kd.Learner(tiny.LEARNER.init, counted)
    for seed in range(2):
        fit(
            learner,
            tiny.start(seed=seed),
            tiny.Data(),
            steps=30,
            eval_every=7,
            evaluate=tiny.held_out,
            **OFF,
        )
    assert len(traces) == 1


@pytest.mark.parametrize("steps", [40, 43])
def test_many_steps_per_call_have_the_same_bits_and_metrics(tmp_path, steps):
    options = {"log_every": 1, "save_every": 20, "evaluate": tiny.held_out}
    one = tiny.run(tmp_path / "1", steps, **options)
    many = tiny.run(tmp_path / "2", steps, steps_per_call=5, **options)
    assert tiny.same(one, many)
    rows = [
        [{k: v for k, v in line.items() if k != "examples_per_second"} for line in lines(folder)]
        for folder in (tmp_path / "1", tmp_path / "2")
    ]
    assert rows[0] == rows[1]
    assert [line["step"] for line in rows[1]] == list(range(1, steps + 1))


def test_frozen_is_given_to_every_update_and_stays():
    teacher = tiny.MODEL.init(jax.random.key(5), tiny.X)
    method = kd.distill(tiny.MODEL, tiny.MODEL, {"soft": (1.0, kd.terms.soft_labels())})
    learner = kd.minimize(method, optax.sgd(0.1))
    batch = tiny.Data().at(0)
    state = learner.init(jax.random.key(0), batch, frozen=teacher)
    host = jax.tree.map(np.asarray, teacher)
    a = fit(learner, state, tiny.Data(), frozen=teacher, steps=5, **OFF)
    b = fit(learner, state, tiny.Data(), frozen=host, steps=5, **OFF)
    assert tiny.same(a, b)
    np.testing.assert_array_equal(teacher[0]["a"], host[0]["a"])


def test_metrics_file_holds_the_losses_of_the_logged_steps(tmp_path):
    tiny.run(tmp_path, 11, log_every=4, evaluate=tiny.held_out, eval_every=5, plot=True)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [4, 5, 8, 10, 11]
    losses = bare(11)[1]
    for line in found:
        assert line["loss"] == losses[line["step"] - 1] == line["loss/hard"]
    assert [line["step"] for line in found if "eval/accuracy" in line] == [5, 10, 11]
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_unknown_metrics_are_null(tmp_path):
    unlabelled = [{**tiny.Data().at(i), "label": np.full(tiny.BATCH, -1)} for i in range(4)]
    seen = {}
    tiny.run(tmp_path, 4, data=unlabelled, report=seen.__setitem__)
    assert [line["accuracy"] for line in lines(tmp_path)] == [None, None]
    assert np.isnan(seen[2]["accuracy"])


def test_seeds_in_one_vmapped_program(tmp_path):
    learner = kd.Learner(
        jax.vmap(tiny.LEARNER.init, in_axes=(0, None)),
        jax.vmap(tiny.LEARNER.update, in_axes=(0, None, None)),
    )
    state = learner.init(jax.random.split(jax.random.key(0), 3), tiny.Data().at(0))
    for steps in (4, 8):
        result = fit(learner, state, tiny.Data(), steps=steps, checkpoint=tmp_path, **OFF)
    assert result.step.tolist() == [8, 8, 8]
    assert [len(line["loss"]) for line in lines(tmp_path)] == [3, 3]


@pytest.mark.parametrize("per_call", [1, 3])
def test_on_a_mesh_as_on_one_device_and_resumed(tmp_path, per_call):
    learner = tiny.make(optax.sgd(0.1))
    options = {"mesh": kd.parallel.data_mesh(8), "steps_per_call": per_call, **OFF}
    whole = fit(learner, tiny.start(learner), tiny.Data(), steps=10, **options)
    options |= {"checkpoint": tmp_path, "save_every": 4}
    fit(learner, tiny.start(learner), tiny.Data(), steps=5, **options)
    resumed = fit(learner, tiny.start(learner), tiny.Data(), steps=10, **options)
    assert tiny.same(whole, resumed)
    for a, b in zip(tiny.leaves(whole), tiny.leaves(bare(10, learner)[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_sharded_parameters_are_resumed_sharded_and_read_on_one_device(tmp_path):
    learner, wide = tiny.make(optax.sgd(0.1)), 2**15

    def begin():
        state = tiny.start(learner)
        return state._replace(params={"student": tiny.init(state.key, tiny.X, wide)})

    options = {"mesh": kd.parallel.data_mesh(4), "fsdp": True, **OFF}
    whole = fit(learner, begin(), tiny.Data(), steps=4, **options)
    for steps in (2, 4):
        state = fit(
            learner, begin(), tiny.Data(), steps=steps, checkpoint=tmp_path, keep=2, **options
        )
    assert tiny.same(whole, state)
    assert state.params["student"]["a"].sharding.shard_shape((8, wide)) == (8, wide // 4)
    alone = kd.train.restore(tmp_path, begin())
    assert tiny.same(whole, alone)
    assert len(alone.params["student"]["a"].devices()) == 1
    again = fit(learner, begin(), tiny.Data(), steps=4, checkpoint=tmp_path, **options)
    assert again.params["student"]["a"].sharding == state.params["student"]["a"].sharding


def test_a_batch_that_the_mesh_cannot_split():
    learner, mesh = tiny.make(optax.sgd(0.1)), kd.parallel.data_mesh(3)
    with pytest.raises(ValueError, match="must have a multiple of 3 rows"):
        fit(learner, tiny.start(learner), tiny.Data(), steps=2, mesh=mesh, **OFF)


@pytest.mark.parametrize("per_call", [1, 4])
def test_non_finite_loss_names_step_and_term_and_keeps_the_last_good(tmp_path, per_call):
    for _ in range(2):  # also when it is tried again from the checkpoint
        with pytest.raises(FloatingPointError, match=r"step 11 .*loss/hard = nan.*keeps step 9"):
            tiny.run(tmp_path, 30, data=tiny.Data(poison=10), steps_per_call=per_call)
        assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit())[-1] == 9
    assert max(line["step"] for line in lines(tmp_path)) <= 10
    assert tiny.same(tiny.run(tmp_path, 15), bare(15)[0])


def test_broken_parameters_are_not_saved(tmp_path):
    def broken(state, batch, frozen=None):
        state, metrics = tiny.LEARNER.update(state, batch, frozen)
        bad = jnp.where(state.step == 6, jnp.inf, state.params["student"]["b"])
        params = {"student": {**state.params["student"], "b": bad}}
        return state._replace(params=params), metrics

    learner = kd.Learner(tiny.LEARNER.init, broken)
    options = {"checkpoint": tmp_path, "save_every": 3, **OFF}
    with pytest.raises(FloatingPointError, match=r"params/student/b .*step 6.*keeps step 3"):
        fit(learner, tiny.start(), tiny.Data(), steps=9, **options)
    assert not (tmp_path / "6").exists()
    with pytest.raises(FloatingPointError, match=r"params/student/b .*training stopped"):
        fit(learner, tiny.start(), tiny.Data(), steps=6, **OFF)


def test_data_that_ends_early_is_said_and_its_state_saved(tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="data must last until step 30, but it ended at st"):
            tiny.run(tmp_path, 30, data=tiny.Data(end=10), steps_per_call=4)
    assert (tmp_path / "10").is_dir()


def test_an_error_in_the_data_comes_through(tmp_path):
    def broken(step):
        yield tiny.Data().at(step)
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        fit(tiny.LEARNER, tiny.start(), broken, steps=5, **OFF)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_save_and_stop(tmp_path, number):
    before = signal.getsignal(number)

    def data(step):
        for batch in tiny.Data().from_step(step):
            if step == 8 and not (tmp_path / "8").exists():
                signal.raise_signal(number)
            yield batch
            step += 1

    with pytest.raises(KeyboardInterrupt, match=f"{number.name} at step .* saved in"):
        tiny.run(tmp_path, 1000, data=data, save_every=500, prefetch=1)
    assert signal.getsignal(number) is before
    assert len([p for p in tmp_path.iterdir() if p.name.isdigit()]) == 1
    assert tiny.same(tiny.run(tmp_path, 40), bare(40)[0])


def interrupt_after(seconds):
    main = threading.main_thread().ident
    threading.Timer(seconds, signal.pthread_kill, [main, signal.SIGINT]).start()


def blocking(at, released):
    """Data that never has the batch of a step, and asks for a stop once it is waited for."""

    def data(step):
        for batch in tiny.Data().from_step(step):
            if step == at:
                interrupt_after(0.3)
                released.wait(60)
            yield batch
            step += 1

    return data


@pytest.mark.parametrize("at", [0, 7])
def test_ctrl_c_while_the_data_blocks(tmp_path, at):
    released, begun = threading.Event(), time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt, match=f"SIGINT at step {at}, saved in"):
            tiny.run(tmp_path, 100, data=blocking(at, released), save_every=50)
        assert time.monotonic() - begun < 20
        assert tiny.same(tiny.run(tmp_path, 12), bare(12)[0])
    finally:
        released.set()


def test_a_second_ctrl_c_stops_at_once_while_the_data_blocks(monkeypatch):
    monkeypatch.setattr(_run.Run, "_pause", lambda self, stopping: released.wait(60))
    released, begun = threading.Event(), time.monotonic()
    interrupt_after(1.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(tiny.LEARNER, tiny.start(), blocking(2, released), steps=9, **OFF)
        assert time.monotonic() - begun < 20
    finally:
        released.set()


def test_data_that_is_slow_is_waited_for():
    data = tiny.Data(pause=0.5)
    assert tiny.same(fit(tiny.LEARNER, tiny.start(), data, steps=2, **OFF), bare(2)[0])


def test_runs_outside_the_main_thread():
    found = []
    thread = threading.Thread(
        target=lambda: found.append(fit(tiny.LEARNER, tiny.start(), tiny.Data(), steps=4, **OFF))
    )
    thread.start()
    thread.join()
    assert tiny.same(found[0], bare(4)[0])


def test_progress_bar_shows_loss_accuracy_and_rate(monkeypatch, capsys):
    bar = _run.tqdm
    monkeypatch.setattr(
        _run, "tqdm", lambda **kw: bar(**{**kw, "disable": False, "mininterval": 0})
    )
    fit(tiny.LEARNER, tiny.start(), tiny.Data(), steps=40, log_every=10)
    shown = capsys.readouterr().err
    assert "40/40" in shown
    for word in ("loss=", "accuracy=", "examples/s="):
        assert word in shown


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"steps": 0}, ValueError, "steps must be an integer at least 1"),
        ({"steps": 2.5}, TypeError, "steps must be an integer"),
        ({"log_every": 0}, ValueError, "log_every must"),
        ({"save_every": 0, "checkpoint": "c"}, ValueError, "save_every must"),
        ({"steps_per_call": 0}, ValueError, "steps_per_call must"),
        ({"keep": 0}, ValueError, "keep must"),
        ({"prefetch": 0}, ValueError, "prefetch must"),
        ({"fsdp": True}, ValueError, "fsdp needs a mesh"),
        ({"best": "accuracy"}, ValueError, "best needs evaluate= and checkpoint="),
        (
            {"learner": kd.distill(tiny.MODEL, None, {"hard": (1.0, kd.terms.hard_labels())})},
            TypeError,
            r"learner must be a Learner, as kdjax.minimize\(method, optimizer\) makes",
        ),
        (
            {"checkpoint": "/proc/nowhere/run"},
            ValueError,
            "a folder that can be written, got /proc",
        ),
        ({"data": 3}, TypeError, "data must be batches"),
        ({"data": {"x": tiny.X}}, TypeError, "data must be batches"),
        ({"data": [tiny.X] * 9}, TypeError, "data must yield dicts"),
        ({"state": (1, 2)}, TypeError, "state must be a kdjax.State"),
        ({"checkpoint": 3}, TypeError, "checkpoint must be the path"),
        ({"checkpoint": "gs://bucket/run"}, ValueError, "local or mounted folder"),
        ({"evaluate": lambda s: 3.0}, TypeError, "evaluate must return a dict"),
        ({"evaluate": lambda s: {"a": np.ones(2)}}, TypeError, "evaluate must return numbers"),
    ],
)
def test_bad_arguments(change, error, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"learner": tiny.LEARNER, "state": tiny.start(), "data": tiny.Data(), "steps": 3}
    given |= {**OFF, **change}
    with pytest.raises(error, match=text):
        fit(given.pop("learner"), given.pop("state"), given.pop("data"), **given)


def test_ragged_batches_in_one_call():
    batches = [tiny.Data().at(0), {k: v[:4] for k, v in tiny.Data().at(1).items()}]
    with pytest.raises(ValueError, match="steps_per_call must be 1 for data whose batches differ"):
        fit(tiny.LEARNER, tiny.start(), batches, steps=2, steps_per_call=2, **OFF)


def test_a_learner_that_changes_its_state():
    def grows(state, batch, frozen=None):
        state, metrics = tiny.LEARNER.update(state, batch, frozen)
        return state._replace(extra={"student": {}, "new": state.step}), metrics

    with pytest.raises(ValueError, match=r"learner.update must return a State of the same tree"):
        fit(kd.Learner(tiny.LEARNER.init, grows), tiny.start(), tiny.Data(), steps=3, **OFF)
