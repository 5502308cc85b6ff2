"""Batches of one split: the batch at a step is a pure function of (seed, step)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from kdjax import _checks
from kdjax.data import _order

if TYPE_CHECKING:
    from kdjax.data._dataset import Dataset

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """A re-iterable stream of batches; made by ``Dataset.batches``.

    Attributes:
        dataset: where the rows come from.
        split: name of the split.
        batch_size: rows of the global batch, over all hosts.
        seed: seed of the order.
        shuffle: whether every epoch has its own random order; otherwise index order.
        last: what happens to the rows that don't fill a batch: "drop", "pad" or "keep".
        epochs: number of passes; None never ends.
        start_step: the step at which iteration begins.
        shard: (index, count): which slice of every global batch is read here.
        raw: whether uint8 images stay uint8.
    """

    dataset: Dataset
    split: str
    batch_size: int
    seed: int
    shuffle: bool
    last: str
    epochs: int | None
    start_step: int
    shard: tuple[int, int]
    raw: bool

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the split."""
        size = self.dataset.size(self.split)
        return size // self.batch_size if self.last == "drop" else -(-size // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from ``start_step`` on."""
        return self.from_step(self.start_step)

    def from_step(self, step: int) -> Iterator[Batch]:
        """Batches from ``step`` on (counted over epochs from 0), without reading earlier ones.

        Args:
            step: at least 0.

        Returns:
            An iterator of batches; it never ends where epochs is None.

        Example:
            >>> import kdjax.data
            >>> batches = kdjax.data.digits().batches("train", 32)
            >>> unbroken, resumed = iter(batches), batches.from_step(2)
            >>> _ = next(unbroken), next(unbroken)
            >>> bool((next(unbroken)["index"] == next(resumed)["index"]).all())
            True
        """
        step = _checks.count("step", step, low=0)
        if self.epochs is None:
            return (self.at(s) for s in itertools.count(step))
        return (self.at(s) for s in range(step, self.epochs * self.steps_per_epoch))

    def at(self, step: int) -> Batch:
        """The batch of one step: this host's slice of the global batch.

        Args:
            step: at least 0, counted over epochs.

        Returns:
            A dict of arrays of batch_size / hosts rows (fewer in the last batch of last="keep").
        """
        step = _checks.count("step", step, low=0)
        epoch, position = divmod(step, self.steps_per_epoch)
        size = self.dataset.size(self.split)
        start = position * self.batch_size
        rows = np.arange(start, min(start + self.batch_size, size))
        if self.shuffle:
            rows = _order.permutation(size, _order.SHUFFLE, self.seed, epoch)[rows]
        if self.last != "pad":
            return self._read(self._slice(rows))
        batch = self._read(self._slice(np.resize(rows, self.batch_size)))
        real = self._slice(np.arange(self.batch_size) < len(rows))
        batch["label"] = np.where(real, batch["label"], np.int32(-1))
        batch["weight"] = real.astype(np.float32)
        return batch

    def describe(self) -> dict[str, Any]:
        """What decides the batches, JSON-able: a checkpoint records it and compares it.

        The number of hosts and of epochs is not in it: neither changes the global batch of a step.
        """
        return {
            **self.dataset.describe(self.split),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "last": self.last,
            "raw": self.raw,
        }

    def _slice(self, rows: np.ndarray) -> np.ndarray:
        index, count = self.shard
        each = self.batch_size // count
        return rows[index * each : (index + 1) * each]

    def _read(self, rows: np.ndarray) -> Batch:
        return self.dataset.read(self.split, rows, raw=self.raw)


def make_batches(
    dataset: Dataset,
    split: str,
    batch_size: int,
    *,
    seed: int,
    shuffle: bool,
    last: str,
    epochs: int | None,
    start_step: int,
    shard: tuple[int, int] | None,
    raw: bool,
) -> Batches:
    """Checks the arguments of ``Dataset.batches``."""
    size = dataset.size(split)
    batch_size = _checks.count("batch_size", batch_size)
    _checks.choice("last", last, ("drop", "pad", "keep"))
    if last == "drop" and batch_size > size:
        raise ValueError(
            f"batch_size must be at most {size}, the size of split {split!r}, where last='drop'; "
            f"got {batch_size}."
        )
    if shard is None:
        shard = jax.process_index(), jax.process_count()
    if not isinstance(shard, tuple) or len(shard) != 2:
        raise TypeError(f"shard must be a pair (index, count), got {_checks.describe(shard)}.")
    count = _checks.count("shard[1]", shard[1])
    index = _checks.count("shard[0]", shard[0], low=0, high=count - 1)
    if batch_size % count:
        raise ValueError(
            f"batch_size must be a multiple of the {count} hosts that share it, got {batch_size}."
        )
    if last == "keep" and count > 1:
        raise ValueError(
            "last must be 'drop' or 'pad' on several hosts, which would wait for each other after "
            "unequal batches; got 'keep'."
        )
    return Batches(
        dataset=dataset,
        split=split,
        batch_size=batch_size,
        seed=_checks.count("seed", seed, low=0),
        shuffle=bool(shuffle),
        last=last,
        epochs=None if epochs is None else _checks.count("epochs", epochs),
        start_step=_checks.count("start_step", start_step, low=0),
        shard=(index, count),
        raw=bool(raw),
    )
