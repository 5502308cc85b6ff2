"""The benchmark scripts run, and what they measure with measures it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("_compare")


@pytest.fixture
def overhead(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("step_overhead")


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def nested_loops(*, unroll):
    """Three times a convolution and five matrix products."""

    def inner(x, weights):
        def one(x, _):
            return jnp.tanh(x @ weights), None

        return jax.lax.scan(one, x, None, length=5, unroll=5 if unroll else 1)[0]

    def function(x, kernel, weights):
        def one(x, _):
            return inner(convolve(x, kernel), weights), None

        return jax.lax.scan(one, x, None, length=3, unroll=3 if unroll else 1)[0]

    return function


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


ARRAYS = (jnp.ones((2, 8, 8, 8)), jnp.ones((3, 3, 8, 8)), jnp.ones((8, 8)))


def test_loop_bodies_count_as_often_as_they_run(compare):
    looped = compiled(nested_loops(unroll=False), *ARRAYS)
    unrolled = compiled(nested_loops(unroll=True), *ARRAYS)
    found, wanted = compare.program_counts(looped), compare.program_counts(unrolled)
    assert (found.convolutions, found.dots, found.loops) == (3, 15, 4)
    assert (wanted.convolutions, wanted.dots, wanted.loops) == (3, 15, 0)
    # The loops' own counters are all that is added.
    assert found.flops == pytest.approx(wanted.flops, rel=1e-3)
    assert found.transcendentals == wanted.transcendentals == 15 * 2 * 8 * 8 * 8
    assert wanted.bytes < found.bytes < 1.5 * wanted.bytes
    # The reason for all this: what XLA says of the loop.
    assert looped.cost_analysis()["flops"] < 0.5 * found.flops


def test_counts_of_a_program_without_loops_are_those_of_xla(compare):
    program = compiled(lambda x, y: jnp.sin(x) @ y, jnp.ones((16, 16)), jnp.ones((16, 16)))
    found, xla = compare.program_counts(program), program.cost_analysis()
    assert (found.flops, found.bytes) == (xla["flops"], xla["bytes accessed"])
    assert (found.dots, found.convolutions, found.transcendentals) == (1, 0, 256)


def test_a_conditional_counts_its_dearest_branch(compare):
    def function(which, x, kernel):
        def twice(x):
            return convolve(convolve(x, kernel), kernel)

        return jax.lax.cond(which, lambda x: convolve(x, kernel), twice, x)

    assert compare.program_counts(compiled(function, True, *ARRAYS[:2])).convolutions == 2


def test_a_loop_of_unknown_length_is_refused(compare):
    def function(x):
        return jax.lax.while_loop(lambda x: x.sum() < 10, lambda x: 2 * x, x)

    program = compiled(function, jnp.ones(4))
    with pytest.raises(ValueError, match="loops of known length"):
        compare.program_counts(program)


def test_donation_is_seen(compare):
    program = jax.jit(lambda x: x + 1, donate_argnums=0).lower(jnp.ones(256)).compile()
    assert compare.program_counts(program).donated == 1024


def test_bars(compare):
    base = compare.Counts(2, 0, 100.0, 0.0, 0.0, 0, 0, 0)
    within = base._replace(flops=101.0)
    beyond = base._replace(flops=101.1, convolutions=1, temporaries=8)
    assert compare.counts_row("a", base, within, compare.STEP_BARS)[1] == []
    row, missed = compare.counts_row("a", base, beyond, compare.STEP_BARS)
    assert row.count("FAIL") == len(missed) == 3
    assert row.count("pass") == 1
    assert "x inf" in row


@pytest.mark.slow
def test_interleaved_times(compare):
    times = compare.interleave(
        lambda: time.sleep(0.002),
        lambda: time.sleep(0.008),
        lambda: time.sleep(0.002),
        rounds=4,
        repeat=2,
    )
    assert times.wall.shape == times.cpu.shape == (4, 3)
    assert times.wall.min() >= 0.002  # of one call, not of `repeat`
    assert times.ratio("wall", 1) > 1.3
    assert times.difference("wall", 1) > 0.002
    # Sleeping is no work.
    assert times.cpu.sum() < 0.5 * times.wall.sum()
    assert "(self" in times.ratio_cell("wall")


def test_interleaved_order_alternates(compare):
    seen = []
    compare.interleave(lambda: seen.append("a"), lambda: seen.append("b"), rounds=3)
    assert "".join(seen) == "abbaab"


def test_first_calls_compile_every_time(compare):
    step, traces = compare.counting(lambda state, x: (state + x, {}))
    state = jnp.ones(3)
    times = compare.first_calls([(step, (state, jnp.ones(3)))], rounds=3)
    assert times.wall.shape == (3, 1)
    assert len(traces) == 3
    assert float(state.sum()) == 3.0  # the caller's state is not the one that is donated


def test_a_step_that_does_more_is_found(overhead):
    batches = overhead.make_batches(4, 4)
    case = overhead.make_case("plain", "live", batches)
    rows, missed = overhead.counted(case, {})
    assert missed == []
    assert "FAIL" not in "".join(rows)

    def twice(state, batch, frozen):
        """Trains on both halves of the batch as well, and says so in no metric."""
        half = {name: value[:2] for name, value in batch.items()}
        return case.ours(case.ours(state, half, frozen)[0], batch, frozen)

    report: dict = {}
    rows, missed = overhead.counted(case._replace(ours=twice), report)
    assert any("flops" in line for line in missed)
    assert any("metrics of three steps differ" in line for line in missed)
    assert report["ours"]["flops"] > 1.2 * report["bare"]["flops"]


@pytest.mark.slow
def test_the_projector_step(overhead):
    """Its counts are those of the bare step, and another distance would be found."""
    case = overhead.make_case("mlp", "projector", overhead.make_batches(16, 16))
    rows, missed = overhead.counted(case, {})
    assert missed == []
    assert "FAIL" not in "".join(rows)
    assert overhead.annealed_projector_traces(case) == {"schedules": 1, "arguments": 1}
    networks = case.networks
    other = overhead._projector_step.method(networks.student, networks.teacher, alpha=3.0)
    learner = overhead.kd.minimize(other, overhead.optimizer())
    program = overhead.compiled(case.bare, case.bare_state, case.batches[0], case.bare_frozen)
    gap, _ = overhead.compare_metrics(case._replace(ours=learner.update), program)
    assert gap > 1e-2


@pytest.mark.slow
def test_step_overhead_runs(tmp_path):
    file = tmp_path / "numbers.json"
    script = [sys.executable, str(FOLDER / "step_overhead.py")]
    options = ["--quick", "--pairs", "mlp", "--settings", "live", "--json", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*script, *options], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    assert "All bars are met." in done.stdout
    numbers = json.loads(file.read_text())
    assert numbers["missed"] == []
    assert set(numbers["annealed"].values()) == {1}
    for case in numbers["cases"].values():
        assert case["traces"] == 1
        assert case["gap"] <= 1e-5
        # The whole state is written over the old one, as in the bare step.
        assert case["ours"]["donated"] >= case["bare"]["donated"] > 0
        assert len(case["step_s"]["cpu"]) == 3  # bare, ours, and bare again: the self-test
        assert min(case["step_s"]["wall"]) > 0
    assert len(numbers["host"]["fit_s"]["wall"]) == 3
