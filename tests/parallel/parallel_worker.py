"""One of two processes: ``python parallel_worker.py JOB RANK PORT FOLDER``. Not a test itself."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
import numpy as np
import parallel_problem as problem
import pytest

from kdjax import parallel

PROCESSES, DEVICES = 2, 2
ROWS = problem.ROWS // PROCESSES
# The run with checkpoints, and the step at which one that is to be killed waits for it.
STEPS, SAVE_EVERY, WAIT_AT = 16, 2, 11


def own_rows(step: int) -> dict[str, np.ndarray]:
    first = jax.process_index() * ROWS
    return {name: x[first : first + ROWS] for name, x in problem.batch(step).items()}


def on_host(tree):
    """Every leaf as it is on this process's first device, as NumPy."""
    leaves = jax.tree.leaves(tree)
    keys = [jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    arrays = [
        jax.random.key_data(x) if is_key else x for x, is_key in zip(leaves, keys, strict=True)
    ]
    assert all(x.is_fully_replicated for x in arrays)
    return [np.asarray(x.addressable_shards[0].data) for x in arrays]


def save(path: Path, tree) -> None:
    np.savez(path, *on_host(tree))


def refused(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def routes(folder: Path) -> None:
    """Three updates by each route that works with several processes, and the small helpers."""
    rank, mesh = jax.process_index(), parallel.data_mesh()
    assert mesh.size == PROCESSES * DEVICES
    assert parallel.is_main() == (rank == 0)
    assert parallel.agree(rank == 1)
    assert not parallel.agree(False)

    frozen = problem.teacher()
    updates = {
        "jit": parallel.jit_update(problem.learner(), mesh),
        "fsdp": parallel.jit_update(problem.learner(), mesh, fsdp=True, min_size=1),
        "shard_map": parallel.shard_map_update(problem.learner(axis_name="data"), mesh),
    }
    for name, update in updates.items():
        state = problem.start()
        for step in range(3):
            state, metrics = update(state, own_rows(step), frozen)
        if name == "fsdp":
            kernel = state.params["student"]["in"]["w"]
            assert kernel.addressable_shards[0].data.size == kernel.size // mesh.size
        save(folder / f"{name}-{rank}.npz", parallel.replicate((state, metrics), mesh))

    # A short last batch on one host only: padded, all hosts have equal shapes.
    short = {name: x[: ROWS - 3 * rank] for name, x in own_rows(0).items()}
    state, metrics = updates["jit"](problem.start(), parallel.pad_batch(short, ROWS), frozen)
    save(folder / f"padded-{rank}.npz", metrics)

    refused(lambda: parallel.replicate(np.float32(rank), mesh), "equal in all processes")
    refused(
        lambda: parallel.shard_batch({"x": np.ones((3, 2))}, mesh),
        "2 devices of this process, got 3",
    )
    refused(lambda: parallel.data_mesh(2), "n must be None or 4 with 2 processes")
    refused(lambda: parallel.pmap_update(problem.learner()), "pmap_update must run in one process")


def fit(folder: Path, *, wait_at: int | None = None) -> None:
    """A run with checkpoints."""
    from kdjax import train

    def batches(step: int):
        while True:
            time.sleep(3600 if step == wait_at else 0.02)
            yield own_rows(step)
            step += 1

    state = train.fit(
        *problem.resumable(),
        batches,
        frozen=problem.teacher(),
        steps=STEPS,
        mesh=parallel.data_mesh(),
        checkpoint=folder / "run",
        save_every=SAVE_EVERY,
        log_every=5,
        progress=False,
    )
    save(folder / f"fit-{jax.process_index()}.npz", state)


JOBS = {
    "all": lambda folder: (routes(folder), fit(folder)),
    "fit": fit,
    "wait": lambda folder: fit(folder, wait_at=WAIT_AT),
}


def main() -> None:
    job, rank, port, folder = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", DEVICES)
    parallel.initialize(
        f"127.0.0.1:{port}", processes=PROCESSES, process_id=int(rank), heartbeat_timeout=10
    )
    JOBS[job](Path(folder))


if __name__ == "__main__":
    main()
