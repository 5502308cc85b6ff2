"""Two real processes on this machine: they train as one, and survive the death of one."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from parallel import parallel_problem as problem

import kdjax
from kdjax import parallel

WORKER = Path(__file__).with_name("parallel_worker.py")
# For a start, on a machine that is busy with other tests.
PATIENCE = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def workers(job, folder):
    """Starts both processes; whatever is left of them at the end is killed."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(kdjax.__file__).parents[1])}
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(2):
            log = stack.enter_context((folder / f"{job}-{rank}.log").open("w"))
            process = subprocess.Popen(
                [sys.executable, str(WORKER), job, str(rank), str(port), str(folder)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            stack.callback(end, process)
            processes.append(process)
        yield processes


def end(process):
    process.kill()
    process.wait(30)


def finish(processes, job, folder):
    for rank, process in enumerate(processes):
        code = process.wait(PATIENCE)
        assert code == 0, (folder / f"{job}-{rank}.log").read_text()[-4000:]


def load(path):
    with np.load(path) as found:
        return [found[name] for name in found.files]


def leaves(tree):
    return [
        np.asarray(
            jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )
        for x in jax.tree.leaves(tree)
    ]


def largest_difference(found, wanted):
    return max(
        float(np.abs(x.astype(np.float64) - y.astype(np.float64)).max(initial=0))
        for x, y in zip(found, wanted, strict=True)
    )


def same_bits(found, wanted):
    return all(np.array_equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What two processes that nobody disturbs have written."""
    folder = tmp_path_factory.mktemp("unbroken")
    with workers("all", folder) as processes:
        finish(processes, "all", folder)
    return folder


def test_two_processes_are_one(unbroken):
    mesh, frozen = parallel.data_mesh(4), problem.teacher()
    # The same four devices, in one process.
    alone = {
        "jit": parallel.jit_update(problem.learner(), mesh),
        "fsdp": parallel.jit_update(problem.learner(), mesh, fsdp=True, min_size=1),
        "shard_map": parallel.shard_map_update(problem.learner(axis_name="data"), mesh),
    }
    one_device = leaves(problem.one_device())
    for name, update in alone.items():
        first, second = (load(unbroken / f"{name}-{rank}.npz") for rank in range(2))
        assert same_bits(first, second), f"the processes parted under {name}"
        assert largest_difference(first, one_device) < 1e-6
        found = leaves(problem.train(update, problem.start(), frozen))
        assert largest_difference(first, found) < 1e-6

    rows = problem.batch()
    kept = {name: np.delete(x, np.s_[13:16], axis=0) for name, x in rows.items()}
    names = [name for name in problem.TERMS if name != "log_sum"]
    _, metrics = jax.jit(problem.learner().update)(problem.start(), kept, frozen)
    first, second = (load(unbroken / f"padded-{rank}.npz") for rank in range(2))
    assert same_bits(first, second)
    padded = dict(zip(sorted(metrics), first, strict=True))
    for name in [f"loss/{name}" for name in names] + ["accuracy"]:
        assert abs(padded[name] - metrics[name]) < 1e-6


def saved_step(folder):
    """The newest complete checkpoint."""
    steps = [int(p.name) for p in (folder / "run").glob("*") if p.name.isdigit()]
    return max(steps, default=0)


@pytest.mark.parametrize(
    ("victim", "patient"),
    [
        (1, False),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(0, True, marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_resumes_to_the_same_bits(victim, patient, unbroken, tmp_path):
    with workers("wait", tmp_path) as processes:
        deadline = time.monotonic() + PATIENCE
        while saved_step(tmp_path) < 4:
            assert time.monotonic() < deadline, "no checkpoint came"
            assert all(p.poll() is None for p in processes), "a process ended before its kill"
            time.sleep(0.02)
        processes[victim].send_signal(signal.SIGKILL)
        processes[victim].wait(30)
        if patient:
            # The other one notices: its connection breaks, or ten seconds pass without heartbeat.
            assert processes[1 - victim].wait(90) != 0
    began = saved_step(tmp_path)
    assert 4 <= began < 16

    with workers("fit", tmp_path) as processes:
        finish(processes, "fit", tmp_path)
    wanted = load(unbroken / "fit-0.npz")
    assert not same_bits(wanted, [np.zeros_like(x) for x in wanted])
    for rank in range(2):
        assert same_bits(load(unbroken / f"fit-{rank}.npz"), wanted)
        assert same_bits(load(tmp_path / f"fit-{rank}.npz"), wanted)
