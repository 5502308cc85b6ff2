"""Several processes: joining them, and taking decisions together."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

from kdjax import _checks


def initialize(
    coordinator: str | None = None,
    *,
    processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout: int = 100,
) -> None:
    """Joins this process to the others, before anything else of JAX; CPUs talk over gloo.

    When a process dies, the others wait for it in their next collective until its loss is
    noticed: when a connection breaks (gloo), or after ``heartbeat_timeout`` at the latest. JAX then
    ends them with an error. Start all of them again; `kdjax.train.fit` goes on from its last
    checkpoint. A shorter timeout loses less time, and takes a long pause for a death.

    Args:
      coordinator: ``"host:port"`` of process 0, reachable from all; like the next two, found by
        JAX itself on TPU, Slurm and Open MPI.
      processes: how many there are.
      process_id: which one this is, from 0.
      heartbeat_timeout: seconds without a sign of life after which a process counts as dead.

    Raises:
      TypeError, ValueError: only some of the first three are given, or one is out of range.
      RuntimeError: from JAX, when it has been used already.

    Example:
      >>> import kdjax as kd
      >>> def start(rank):
      ...     kd.parallel.initialize("10.0.0.1:1234", processes=2, process_id=rank)
    """
    given = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            "coordinator, processes and process_id must be given together or not at all, got no "
            f"{' and no '.join(missing)}."
        )
    if coordinator is not None:
        if not isinstance(coordinator, str) or not coordinator.rpartition(":")[2].isdigit():
            raise ValueError(
                f'coordinator must be "host:port", got {_checks.describe(coordinator)}.'
            )
        _checks.count("processes", processes)
        assert processes is not None
        _checks.count("process_id", process_id, low=0, high=processes - 1)
    _checks.count("heartbeat_timeout", heartbeat_timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator, processes, process_id, heartbeat_timeout_seconds=heartbeat_timeout
    )


def is_main() -> bool:
    """Whether this process is the one that logs and prints: process 0, or the only one.

    Example:
      >>> import kdjax as kd
      >>> kd.parallel.is_main()
      True
    """
    return jax.process_index() == 0


def agree(flag: bool) -> bool:
    """Whether any process says yes; all must ask, at the same point of the program.

    A decision to stop that only one process takes leaves the others waiting for it. With one
    process this is ``bool(flag)`` and costs nothing.

    Args:
      flag: this process's answer.

    Returns:
      The same bool in every process.

    Example:
      >>> import kdjax as kd
      >>> kd.parallel.agree(False)
      False
    """
    if jax.process_count() == 1:
        return bool(flag)
    return bool(np.any(multihost_utils.process_allgather(np.asarray(bool(flag)))))
