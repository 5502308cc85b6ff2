"""Batches made of the rows of two sources side by side."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from kdjax import _checks
from kdjax.data._batches import Batch, Batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined:
    """A re-iterable stream of batches of two sources; made by ``joined``.

    Attributes:
        first: the source whose passes are the epochs, at its part of the batch size.
        second: the other one, at the rest of it.
    """

    first: Batches
    second: Batches

    @property
    def batch_size(self) -> int:
        """Rows of the global batch, over all hosts."""
        return self.first.batch_size + self.second.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the first source."""
        return self.first.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the first source's ``start_step`` on."""
        return self.from_step(self.first.start_step)

    def from_step(self, step: int) -> Iterator[Batch]:
        """Batches from ``step`` on (counted over epochs from 0), without reading earlier ones.

        Args:
            step: at least 0.

        Returns:
            An iterator of batches; it never ends where the first source's ``epochs`` is None.
        """
        step = _checks.count("step", step, low=0)
        if self.first.epochs is None:
            return (self.at(s) for s in itertools.count(step))
        return (self.at(s) for s in range(step, self.first.epochs * self.steps_per_epoch))

    def at(self, step: int) -> Batch:
        """The batch of one step: this host's rows of the first source, then those of the second.

        Args:
            step: at least 0, counted over epochs.

        Returns:
            A dict of arrays of batch_size / hosts rows.

        Raises:
            ValueError: the sources have different entries, or the same of other shapes or dtypes.
        """
        one, two = self.first.at(step), self.second.at(step)
        # The places of the first source end where those of the second begin.
        offset = self.first.dataset.size(self.first.split)
        two["index"] = two["index"] + np.int32(offset)
        if one.keys() != two.keys():
            raise ValueError(
                "second must have the entries of first, "
                f"{', '.join(sorted(one))}, got {', '.join(sorted(two))}."
            )
        for name, rows in one.items():
            other = two[name]
            if rows.dtype != other.dtype or rows.shape[1:] != other.shape[1:]:
                raise ValueError(
                    f"second must have {name!r} as first has it, {rows.dtype} rows of shape "
                    f"{rows.shape[1:]}, got {other.dtype} rows of shape {other.shape[1:]}."
                )
        return {name: np.concatenate([rows, two[name]]) for name, rows in one.items()}

    def describe(self) -> dict[str, Any]:
        """What decides the batches, JSON-able: a checkpoint records it and compares it."""
        return {"first": self.first.describe(), "second": self.second.describe()}


def joined(first: Batches, second: Batches, *, share: float) -> Joined:
    """Batches of which one part comes from each of two sources: original and generated images, say.

    Both sources are asked for the same ``batch_size`` B, that of the joined batches. Each of these
    has ``round(share * B)`` rows of the second source and the others from the first, each in its
    own order; the batch at a step is a pure function of the two seeds and the step. An epoch is one
    pass over the first source; the second begins anew whenever it is through. ``index`` tells the
    sources apart: that of the second starts where the first's split ends.

    The rows of the first source come first. Batch norm that takes statistics per device therefore
    sees unlike devices; under `kdjax.parallel.jit_update` they are those of the whole batch.

    Args:
        first: from ``Dataset.batches``, with ``last="drop"``.
        second: the same, of the same batch size, start step, hosts and ``raw``, and endless
            (``epochs=None``). It must have the entries of the first, of the same shapes and dtypes;
            its labels mean the same classes.
        share: of the second source in every batch, above 0 and below 1, so that each source has at
            least one row (for each host).

    Returns:
        A re-iterable Joined, with ``from_step`` and ``describe`` as `kdjax.train.fit` reads them.

    Raises:
        TypeError: a source is not from ``Dataset.batches``.
        ValueError: a share that leaves no row of a source or can't be split over the hosts, or
            sources that do not fit each other.

    Example:
        >>> import kdjax.data
        >>> digits = kdjax.data.digits()
        >>> original = digits.batches("train", 10, seed=1)
        >>> generated = digits.batches("validation", 10, seed=2)
        >>> batches = kdjax.data.joined(original, generated, share=0.7)
        >>> [bool(index >= digits.size("train")) for index in batches.at(0)["index"]].count(True)
        7

    Reference:
        S.-A. Rebuffi et al., "Data Augmentation Can Improve Robustness", NeurIPS 2021, section 4:
        30 % original and 70 % generated images.
    """
    for name, source in (("first", first), ("second", second)):
        if not isinstance(source, Batches):
            raise TypeError(
                f"{name} must be batches from Dataset.batches, got {_checks.describe(source)}."
            )
        if source.last != "drop":
            raise ValueError(
                f"{name} must have last='drop', so that its part of every batch is full, got "
                f"last={source.last!r}."
            )
    if second.epochs is not None:
        raise ValueError(
            "second must be endless (epochs=None), as the first source says when batches end, got "
            f"epochs={second.epochs}."
        )
    _check_fit(first, second)
    share = float(_checks.number("share", share, above=0, below=1))
    size, hosts = first.batch_size, first.shard[1]
    rows = round(share * size)
    if not 0 < rows < size:
        raise ValueError(
            f"share must leave at least one of the {size} rows to each source, got {share:.4g}."
        )
    if rows % hosts or (size - rows) % hosts:
        raise ValueError(
            f"share must split the batch into multiples of the {hosts} hosts, got {share:.4g}, "
            f"which is {size - rows} and {rows} rows."
        )
    return Joined(
        first=dataclasses.replace(first, batch_size=size - rows),
        second=dataclasses.replace(second, batch_size=rows),
    )


def _check_fit(first: Batches, second: Batches) -> None:
    """Refuses sources that differ where a batch has one value."""
    for name in ("batch_size", "start_step", "shard", "raw"):
        wanted, found = getattr(first, name), getattr(second, name)
        if wanted != found:
            raise ValueError(f"second must have {name}={wanted} as first has, got {found}.")
    shape, other = first.dataset.shape, second.dataset.shape
    if shape != other:
        raise ValueError(f"second must have images of shape {shape} as first has, got {other}.")
    if second.dataset.num_classes > first.dataset.num_classes:
        raise ValueError(
            f"second must have at most the {first.dataset.num_classes} classes of first, got "
            f"{second.dataset.num_classes}."
        )
    size = first.dataset.size(first.split) + second.dataset.size(second.split)
    if size > np.iinfo(np.int32).max:
        raise ValueError(f"first and second must have at most 2**31 - 1 rows, got {size}.")
