"""Random orders and choices of rows, the same on every machine and NumPy version."""

from __future__ import annotations

import functools

import numpy as np

# One word per purpose keeps the draws of the same seed apart.
SHUFFLE, HOLD_OUT, KEEP_LABELS = 0, 1, 2


@functools.lru_cache(maxsize=4)
def permutation(size: int, purpose: int, *seed: int) -> np.ndarray:
    """A random order of ``range(size)``, read-only.

    It is the order of Philox's raw draws: NumPy promises that bit generators keep their streams,
    but not that ``Generator.permutation`` does, and a resumed run must see the same batches.
    """
    draws = np.random.Philox(np.random.SeedSequence([purpose, *seed])).random_raw(size)
    order = np.argsort(draws, kind="stable")
    order.flags.writeable = False
    return order


def stratified(labels: np.ndarray, counts: dict[int, int], order: np.ndarray) -> np.ndarray:
    """The first ``counts[c]`` rows of each label c in ``order``, as sorted row numbers."""
    shuffled = labels[order]
    chosen = [order[shuffled == label][:count] for label, count in counts.items()]
    return np.sort(np.concatenate([*chosen, np.zeros(0, order.dtype)]))


def proportional(labels: np.ndarray, size: int) -> dict[int, int]:
    """Splits ``size`` over the labels in proportion to how often they occur, summing exactly."""
    names, occurs = np.unique(labels, return_counts=True)
    exact = occurs * (size / len(labels))
    counts = np.floor(exact).astype(np.int64)
    left = size - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    return {int(name): int(count) for name, count in zip(names, counts, strict=True)}
