"""An immutable data set: named splits of rows that can be read in any order."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kdjax import _checks
from kdjax.data import _order
from kdjax.data._batches import Batch, Batches, make_batches

if TYPE_CHECKING:
    from kdjax.data._stored import StoredOutputs

_FIRST = np.zeros(1, np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Rows of one split, read through functions, so that they may lie anywhere.

    Attributes:
        size: number of rows, N.
        read: row numbers [B] -> dict of arrays with B rows, ``label`` among them.
        labels: () -> int32 [N]; -1 where there is no label.
        fingerprint: () -> hash of the content.
        changes: what was done to the rows since they were loaded, JSON-able.
    """

    size: int
    read: Callable[[np.ndarray], Batch]
    labels: Callable[[], np.ndarray]
    fingerprint: Callable[[], str]
    changes: tuple[Mapping[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Named splits of one data set; ``digits``, ``npz``, ``tfds`` and ``arrays`` make one.

    Attributes:
        name: what it is called in logs and checkpoints.
        num_classes: C; labels are 0 to C - 1, or -1 for none.
        shape: shape of one example: (H, W, C) for images.
        splits: name -> Split; ``train``, ``validation`` and ``test`` where there are such.

    Example:
        >>> import kdjax.data
        >>> dataset = kdjax.data.digits()
        >>> dataset.shape, dataset.num_classes, list(dataset.splits)
        ((8, 8, 1), 10, ['train', 'validation', 'test'])
        >>> for batch in dataset.batches("train", 64, epochs=1):
        ...     pass
        >>> batch["image"].shape, batch["label"].dtype
        ((64, 8, 8, 1), dtype('int32'))
    """

    name: str
    num_classes: int
    shape: tuple[int, ...]
    splits: Mapping[str, Split]

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", types.MappingProxyType(dict(self.splits)))

    def __len__(self) -> int:
        """Rows over all splits."""
        return sum(split.size for split in self.splits.values())

    def size(self, split: str) -> int:
        """Number of rows of a split."""
        return self._split(split).size

    def fingerprint(self, split: str) -> str:
        """Hash of a split's content as it was loaded: the same data has the same on every machine.

        Dropping labels (``keep_labels``) and adding teacher outputs don't change it, so outputs
        stored once serve every such variant.
        """
        return self._split(split).fingerprint()

    def labels(self, split: str) -> np.ndarray:
        """All labels of a split, int32 [N], -1 where there is none."""
        return self._split(split).labels()

    def read(self, split: str, rows: Any = None, *, raw: bool = False) -> Batch:
        """Reads rows in the order asked for.

        Args:
            split: name of the split.
            rows: integers [B] from 0 to N - 1; default all rows.
            raw: leave uint8 images as they are, 0 to 255, instead of scaling them to float32 in
                [0, 1]; then the model, or ``kdjax.augment.to_float`` before it, must do so.

        Returns:
            A dict with ``label``, ``index`` and the split's other arrays, B rows each.

        Raises:
            ValueError: there is no such split or row.
        """
        part = self._split(split)
        rows = np.arange(part.size) if rows is None else np.asarray(rows)
        if rows.shape == (0,):
            rows = rows.astype(np.int64)  # NumPy takes [] for floats.
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise TypeError(f"rows must be integers of shape [B], got {_checks.describe(rows)}.")
        if len(rows) and not (rows.min() >= 0 and rows.max() < part.size):
            raise ValueError(
                f"rows must lie in 0 to {part.size - 1}, got {rows.min()} to {rows.max()}."
            )
        # A source need not know what no rows look like.
        batch = part.read(rows) if len(rows) else {k: x[:0] for k, x in part.read(_FIRST).items()}
        if not raw and "image" in batch:
            batch["image"] = _to_float(batch["image"])
        batch["index"] = rows.astype(np.int32)
        return batch

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        last: str = "drop",
        epochs: int | None = None,
        start_step: int = 0,
        shard: tuple[int, int] | None = None,
        raw: bool = False,
    ) -> Batches:
        """Batches of a split; the batch at a step is a pure function of (seed, step).

        Args:
            split: name of the split.
            batch_size: rows of the global batch; each host reads batch_size / hosts of them.
            seed: seed of the order, at least 0; epoch e has the order drawn from (seed, e).
            shuffle: False keeps index order in every epoch.
            last: rows left over at the end of an epoch: "drop" leaves them out; "pad" fills the
                batch with rows repeated from it (label -1, weight 0), and then every batch has
                ``weight``; "keep" gives a smaller batch.
            epochs: passes over the split; None (the default) never ends.
            start_step: the step at which iteration begins; ``from_step`` overrides it.
            shard: (index, count) of this host; default (process_index, process_count) of jax. The
                global batches don't depend on the number of hosts.
            raw: leave uint8 images as they are, 0 to 255: a quarter of the traffic to the device.
                Then the model, or ``kdjax.augment.to_float`` in the step, must scale them; training
                and evaluation must do the same.

        Returns:
            A re-iterable Batches.

        Raises:
            ValueError: no such split, or an argument outside its range.

        Example:
            >>> import kdjax.data
            >>> batches = kdjax.data.digits().batches("train", 100, seed=1, last="pad", epochs=2)
            >>> batches.steps_per_epoch, len(list(batches))
            (12, 24)
        """
        return make_batches(
            self,
            split,
            batch_size,
            seed=seed,
            shuffle=shuffle,
            last=last,
            epochs=epochs,
            start_step=start_step,
            shard=shard,
            raw=raw,
        )

    def once(self, split: str, batch_size: int, *, raw: bool = False) -> Batches:
        """One pass in index order, the last batch padded: what evaluation wants.

        Args:
            split: name of the split.
            batch_size: rows of the global batch.
            raw: leave uint8 images as they are, 0 to 255. `kdjax.train.evaluate` gives a model
                what the batch holds, so the model, or ``kdjax.augment.to_float`` over the batches,
                must then scale them as they were scaled in training.

        Returns:
            A re-iterable Batches; padding has label -1 and weight 0.

        Raises:
            ValueError: no such split, or an argument outside its range.
        """
        return self.batches(split, batch_size, shuffle=False, last="pad", epochs=1, raw=raw)

    def hold_out(
        self,
        size: int | float,
        *,
        name: str = "validation",
        split: str = "train",
        seed: int = 0,
        stratify: bool = True,
    ) -> Dataset:
        """Moves part of a split into a new one.

        Args:
            size: rows to move (an integer), or their share (a float between 0 and 1).
            name: name of the new split.
            split: the split they are taken from; its rows are numbered anew.
            seed: which rows, at least 0.
            stratify: keep the proportions of the labels; needs all labels to be read.

        Returns:
            A new Dataset; this one is unchanged.

        Raises:
            ValueError: there is such a split already, or size leaves nothing on either side.

        Example:
            >>> import kdjax.data
            >>> dataset = kdjax.data.digits().hold_out(100, name="calibration")
            >>> dataset.size("calibration")
            100
        """
        part = self._split(split)
        if name in self.splits:
            raise ValueError(f"name must be that of a new split, got {name!r}, which exists.")
        if isinstance(size, float):
            size = round(_checks.number("size", size, above=0, below=1) * part.size)
        size = _checks.count("size", size, low=1, high=part.size - 1)
        order = _order.permutation(part.size, _order.HOLD_OUT, _checks.count("seed", seed, low=0))
        if stratify:
            labels = part.labels()
            moved = _order.stratified(labels, _order.proportional(labels, size), order)
        else:
            moved = np.sort(order[:size])
        kept = np.setdiff1d(np.arange(part.size), moved, assume_unique=True)
        splits = {}
        for key, value in self.splits.items():
            splits[key] = value if key != split else _select(value, kept)
            if key == split:
                splits[name] = _select(value, moved)
        return dataclasses.replace(self, splits=splits)

    def keep_labels(self, per_class: int, *, seed: int = 0, split: str = "train") -> Dataset:
        """Semi-supervised: sets all labels of a split to -1, but for a few of each class.

        Args:
            per_class: labels kept in each class that occurs, at least 0.
            seed: which ones, at least 0.
            split: the split; others keep their labels.

        Returns:
            A new Dataset with the same rows; this one is unchanged.

        Raises:
            ValueError: a class has fewer than per_class labels.

        Example:
            >>> import kdjax.data
            >>> few = kdjax.data.digits().keep_labels(10, seed=3)
            >>> int((few.labels("train") >= 0).sum())
            100
        """
        part = self._split(split)
        per_class = _checks.count("per_class", per_class, low=0)
        seed = _checks.count("seed", seed, low=0)
        labels = part.labels()
        names, occurs = np.unique(labels[labels >= 0], return_counts=True)
        if len(names) and per_class > occurs.min():
            raise ValueError(
                f"per_class must be at most {occurs.min()}, the number of labels of class "
                f"{names[occurs.argmin()]} in split {split!r}; got {per_class}."
            )
        order = _order.permutation(part.size, _order.KEEP_LABELS, seed)
        chosen = _order.stratified(labels, {int(c): per_class for c in names}, order)
        kept = np.full_like(labels, -1)
        kept[chosen] = labels[chosen]
        kept.flags.writeable = False
        changed = dataclasses.replace(
            part,
            read=lambda rows: {**part.read(rows), "label": kept[rows]},
            labels=lambda: kept,
            changes=(*part.changes, {"keep_labels": per_class, "seed": seed}),
        )
        return dataclasses.replace(self, splits={**self.splits, split: changed})

    def with_outputs(self, stored: StoredOutputs, *, name: str = "teacher") -> Dataset:
        """Adds a teacher's stored outputs to every batch of the split they were made from.

        ``kdjax.from_batch(logits="teacher_logits")`` is the teacher that reads them; for a top-k
        store see ``kdjax.labels.from_top_k``.

        Args:
            stored: from ``stored_outputs`` or ``store_outputs``.
            name: entries are called ``{name}_logits`` [B, C], or for a top-k store
                ``{name}_values`` [B, k], ``{name}_indices`` [B, k] and ``{name}_rest`` [B].

        Returns:
            A new Dataset; this one is unchanged.

        Raises:
            ValueError: the outputs were made from other data.
        """
        arrays, manifest = getattr(stored, "arrays", None), getattr(stored, "manifest", None)
        if arrays is None or manifest is None:
            raise TypeError(
                f"stored must come from stored_outputs(path), got {_checks.describe(stored)}."
            )
        split = manifest["split"]
        part = self._split(split)
        if manifest["fingerprint"] != part.fingerprint() or manifest["examples"] != part.size:
            raise ValueError(
                f"stored must belong to split {split!r} of {self.name!r} (fingerprint "
                f"{part.fingerprint()}), got the outputs of {manifest['dataset']!r} with "
                f"{manifest['examples']} examples (fingerprint {manifest['fingerprint']})."
            )
        columns = {f"{name}_{key}": value for key, value in arrays.items()}

        def read(rows: np.ndarray) -> Batch:
            batch = part.read(rows)
            for key, column in columns.items():
                kind = np.int32 if np.issubdtype(column.dtype, np.integer) else np.float32
                batch[key] = np.asarray(column[rows], kind)
            return batch

        change = {"outputs": name, **{k: manifest[k] for k in ("teacher", "teacher_fingerprint")}}
        changed = dataclasses.replace(part, read=read, changes=(*part.changes, change))
        return dataclasses.replace(self, splits={**self.splits, split: changed})

    def describe(self, split: str) -> dict[str, Any]:
        """Name, size, content and changes of a split, JSON-able."""
        part = self._split(split)
        return {
            "dataset": self.name,
            "split": split,
            "size": part.size,
            "num_classes": self.num_classes,
            "fingerprint": part.fingerprint(),
            "changes": [dict(change) for change in part.changes],
        }

    def _split(self, split: str) -> Split:
        return _checks.entry(f"data set {self.name!r}", self.splits, split)


def array_split(columns: Mapping[str, np.ndarray]) -> Split:
    """A split whose arrays are in memory (or memory-mapped); ``label`` is one of them."""
    columns = {name: _frozen(column) for name, column in columns.items()}
    return Split(
        size=len(columns["label"]),
        read=lambda rows: {name: column[rows] for name, column in columns.items()},
        labels=lambda: columns["label"],
        fingerprint=functools.cache(lambda: _hash_arrays(columns)),
    )


def digest(*parts: bytes | str) -> str:
    """A short hash of the parts, which are told apart."""
    result = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        result.update(f"{len(data)}:".encode())
        result.update(data)
    return result.hexdigest()


def hash_array(array: np.ndarray) -> str:
    """Hash of dtype, shape and values; above 1 GiB, of 4096 rows evenly spaced."""
    if array.nbytes > 2**30 and array.ndim and len(array) > 4096:
        rows = np.linspace(0, len(array) - 1, 4096).astype(np.int64)
        values = np.ascontiguousarray(array[rows])
    else:
        values = np.ascontiguousarray(array)
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    result = hashlib.blake2b(f"{little.dtype.str} {array.shape} ".encode(), digest_size=16)
    result.update(little.reshape(-1).view(np.uint8).data)
    return result.hexdigest()


def _hash_arrays(columns: Mapping[str, np.ndarray]) -> str:
    return digest(*(f"{name} {hash_array(columns[name])}" for name in sorted(columns)))


def _select(part: Split, rows: np.ndarray) -> Split:
    """The part of a split that has these rows, numbered from 0."""
    return Split(
        size=len(rows),
        read=lambda chosen: part.read(rows[chosen]),
        labels=functools.cache(lambda: _frozen(part.labels()[rows])),
        fingerprint=functools.cache(
            lambda: digest(part.fingerprint(), hash_array(rows.astype(np.int64)))
        ),
        changes=part.changes,
    )


def _frozen(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def _to_float(images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        # The same product as in kdjax.augment.to_float, so that raw batches give the same bits.
        return np.multiply(images, np.float32(1 / 255), dtype=np.float32)
    return images.astype(np.float32, copy=False)
