"""Batches from any step on, grouped for calls of several updates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kdjax import _checks, parallel
from kdjax import data as kdata


def check(data: Any) -> None:
    """Refuses what `from_step` can't read."""
    if isinstance(data, Mapping) or not (
        hasattr(data, "from_step") or callable(data) or isinstance(data, Iterable)
    ):
        raise TypeError(
            "data must be batches: an object with from_step (kdjax.data), a function from the step "
            f"to an iterator, or an iterable of dicts of arrays, got {_checks.describe(data)}."
        )


def from_step(data: Any, step: int) -> Iterator[Any]:
    """The batches from ``step`` on; those of a plain iterable are read up to there and dropped."""
    if hasattr(data, "from_step"):
        return iter(data.from_step(step))
    if callable(data):
        return iter(data(step))
    return itertools.islice(data, step, None)


def grouped(
    batches: Callable[[], Iterator[Any]], sizes: Iterable[int], *, stacked: bool
) -> Iterator[dict[str, Any]]:
    """One batch for each call.

    Args:
      batches: makes the iterator; called in the thread that prefetches.
      sizes: how many updates each call makes.
      stacked: stack the batches of a call along axis 1, ``[B, n, ...]``: rows stay on axis 0,
        which is split over devices. Otherwise every size must be 1.
    """
    iterator = batches()
    for size in sizes:
        group = [_checked(batch) for batch in itertools.islice(iterator, size)]
        if not stacked:
            yield from map(dict, group)
        elif len(group) == size:
            yield _stack(group)
        else:
            # The data ended; what is left runs one by one.
            yield from (_stack([batch]) for batch in group)
        if len(group) < size:
            return


def placed(batches: Iterable[Any], mesh: Mesh | None, size: int = 2) -> kdata.Prefetch:
    """Batches on the device or the mesh, ahead of their use."""
    if mesh is None or jax.process_count() > 1:
        sharding = None if mesh is None else parallel.batch_sharding(mesh)
        return kdata.prefetch(batches, size=size, sharding=sharding)
    # Arrays that lie on the mesh already stay there.
    return kdata.prefetch((parallel.shard_batch(batch, mesh) for batch in batches), size=size)


def _checked(batch: Any) -> Mapping[str, Any]:
    if not isinstance(batch, Mapping):
        raise TypeError(f"data must yield dicts of arrays, got {_checks.describe(batch)}.")
    return batch


def _stack(group: list[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    found = {}
    for name in group[0]:
        rows = [np.asarray(_checks.entry("a batch of data", batch, name)) for batch in group]
        if rows[0].ndim == 0 or any(x.shape != rows[0].shape for x in rows):
            shapes = ", ".join(sorted({str(x.shape) for x in rows}))
            raise ValueError(
                f"steps_per_call must be 1 for data whose batches differ in shape, got {name!r} of "
                f"shapes {shapes}."
            )
        found[name] = np.stack(rows, axis=1)
    return found
