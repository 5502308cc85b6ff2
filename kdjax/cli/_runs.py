"""Where a run goes, and on which devices: the same for every command that trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from kdjax import _checks

if TYPE_CHECKING:
    from jax.sharding import Mesh

_RUNS = Path("runs")


def folder(name: str, out: str | None, *, resume: bool) -> Path:
    """The folder asked for, or ``runs/NAME-N``: a new one, or the newest to resume."""
    if out is not None:
        return Path(out).expanduser()
    numbers = [
        int(found[1])
        for there in _RUNS.glob(f"{name}-*")
        if (found := re.fullmatch(rf"{name}-(\d+)", there.name))
    ]
    if resume:
        if not numbers:
            raise ValueError(f"out must be given to resume: there is no {_RUNS}/{name}-N here.")
        return _RUNS / f"{name}-{max(numbers)}"
    return _RUNS / f"{name}-{max(numbers, default=0) + 1}"


def mesh(devices: int) -> Mesh | None:
    """A mesh of so many devices; on a CPU they are made up where there aren't enough."""
    _checks.count("devices", devices)
    if devices == 1:
        return None
    import contextlib

    import jax

    from kdjax import parallel

    with contextlib.suppress(RuntimeError):  # jax has started: there are as many as there are
        jax.config.update("jax_num_cpu_devices", devices)
    there = jax.devices()
    if devices > len(there):
        raise ValueError(
            f"devices must be at most {len(there)}, the {there[0].platform} devices there are, "
            f"got {devices}."
        )
    return parallel.data_mesh(devices)
