"""A teacher's outputs on disk: computed once, resumed when interrupted, read by memory-mapping.

A finished store is a folder with ``manifest.json`` and one plain ``.npy`` file per array. While it
is being written the folder is called ``PATH.partial``; its manifest says how many rows are safely
on disk. The last act is to rename the folder, so that a folder called PATH is always complete.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from kdjax import _checks
from kdjax.data._batches import Batch
from kdjax.data._dataset import Dataset, digest, hash_array
from kdjax.data._locks import locked
from kdjax.data._stored_files import (
    FORMAT,
    MANIFEST,
    Writer,
    layout,
    partial_path,
    read_manifest,
    same,
    sync,
    write_manifest,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredOutputs:
    """Outputs of one teacher on one split, memory-mapped; ``Dataset.with_outputs`` takes it.

    Attributes:
        path: the folder.
        arrays: ``logits`` [N, C]; or ``values`` [N, k], ``indices`` [N, k] and ``rest`` [N].
        manifest: teacher, data set, split, fingerprints, dtype and the rest of the settings.
    """

    path: pathlib.Path
    arrays: Mapping[str, np.ndarray]
    manifest: Mapping[str, Any]


def store_outputs(
    predict: Callable[[Batch], Any],
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    teacher: str,
    variables: Any = None,
    split: str = "train",
    top_k: int | None = None,
    dtype: Any = np.float32,
    temperature: float = 1.0,
    batch_size: int = 256,
    progress: bool = True,
) -> StoredOutputs:
    """Runs a teacher once over a split, in index order, and stores its outputs.

    The same call after an interruption goes on where it stopped; rows on disk are not computed
    again, and with the same batch_size the result is that of an unbroken run. The same call after
    the end computes nothing. Run it in one process.

    With float16, each row's largest logit is subtracted first: softmax does not change, a logit
    regression loss does. Rows that float16 can't hold even so are refused.

    Args:
        predict: batch (dict of NumPy arrays, always batch_size rows) -> logits [batch_size, C].
        dataset: where the rows come from.
        path: folder to be made.
        teacher: what the teacher is, for the manifest.
        variables: the teacher's variables, if they are to be told apart by content: a pytree of
            arrays, whose hash goes into the manifest.
        split: the split to run over.
        top_k: store only the k largest, 1 to C - 1: ``values`` (log-probabilities at temperature,
            largest first), ``indices`` (int32) and ``rest`` (log of the remaining probability).
            Default: all logits.
        dtype: numpy.float32 or numpy.float16.
        temperature: of the log-probabilities of top_k, above 0; logits are stored without one.
        batch_size: rows per call of predict.
        progress: whether to show a bar.

    Returns:
        The StoredOutputs.

    Raises:
        ValueError: path holds outputs of another teacher, split or dtype; predict gives another
            shape or values that are not finite; or float16 overflows.

    Example:
        >>> import os, tempfile, numpy as np, kdjax.data
        >>> def predict(batch):  # a trained model in earnest
        ...     return batch["image"].reshape(len(batch["image"]), -1)[:, :10]
        >>> dataset = kdjax.data.digits()
        >>> path = os.path.join(tempfile.mkdtemp(), "teacher")
        >>> stored = store_outputs(predict, dataset, path, teacher="first pixels", progress=False)
        >>> next(iter(dataset.with_outputs(stored).batches("train", 32)))["teacher_logits"].shape
        (32, 10)
    """
    path = pathlib.Path(path)
    wanted = _settings(dataset, split, teacher, variables, top_k, dtype, temperature)
    if path.exists():
        stored = stored_outputs(path)
        same(wanted, stored.manifest, path)
        return stored
    _checks.count("batch_size", batch_size)
    partial = partial_path(path)
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial, f"path is being written by another process: {partial}."):
        if (partial / MANIFEST).exists():
            manifest = read_manifest(partial)
            same(wanted, manifest, partial)
        else:
            manifest = {**wanted, "classes": None, "rows": 0, "complete": False}
            write_manifest(partial, manifest)
        with Writer(partial, manifest) as writer:
            bar = tqdm(
                total=manifest["examples"],
                initial=manifest["rows"],
                desc="teacher",
                unit="example",
                delay=2,
                disable=not progress,
            )
            with bar:
                while manifest["rows"] < manifest["examples"]:
                    before = manifest["rows"]
                    batch, real = _next_batch(dataset, split, before, batch_size)
                    logits = _logits(predict(batch), batch_size, manifest)
                    writer.append(_encode(logits[:real], manifest), real)
                    bar.update(manifest["rows"] - before)
        write_manifest(partial, {**manifest, "complete": True})
        os.rename(partial, path)
        sync(path.parent)
    return stored_outputs(path)


def stored_outputs(path: str | os.PathLike[str]) -> StoredOutputs:
    """Opens stored outputs; arrays are memory-mapped, nothing is read yet.

    Args:
        path: the folder that ``store_outputs`` made.

    Returns:
        The StoredOutputs.

    Raises:
        ValueError: there is none, it is unfinished, or it is damaged.

    Example:
        >>> import tempfile
        >>> stored_outputs(tempfile.mkdtemp())  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        ValueError: path must be a folder of stored outputs ...
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        partial = partial_path(path)
        hint = ""
        if (partial / MANIFEST).exists():
            manifest = read_manifest(partial)
            hint = (
                f": only {manifest['rows']} of {manifest['examples']} rows are done; call "
                "store_outputs again with the same arguments to go on"
            )
        raise ValueError(
            f"path must be a folder of stored outputs, got {path}, which is not there{hint}."
        )
    manifest = read_manifest(path)
    if manifest["complete"] is not True:
        raise ValueError(f"path must hold complete outputs, got {path}, whose manifest says not.")
    arrays = {}
    for name, (shape, kind) in layout(manifest).items():
        file = path / f"{name}.npy"
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"path must hold whole files, but {file} is damaged.") from error
        if array.shape != shape or array.dtype != kind:
            raise ValueError(
                f"{file} must be a {kind} array of shape {shape} as its manifest says, got "
                f"{_checks.describe(array)}."
            )
        arrays[name] = array
    return StoredOutputs(path=path, arrays=arrays, manifest=manifest)


def _settings(
    dataset: Dataset,
    split: str,
    teacher: str,
    variables: Any,
    top_k: int | None,
    dtype: Any,
    temperature: float,
) -> dict[str, Any]:
    """What makes two stores the same: the first part of the manifest."""
    if not isinstance(teacher, str) or not teacher:
        raise TypeError(f"teacher must be a description in words, got {_checks.describe(teacher)}.")
    try:
        kind = np.dtype(dtype)
    except TypeError:
        kind = np.dtype(object)
    if kind not in (np.dtype(np.float16), np.dtype(np.float32)):
        raise ValueError(f"dtype must be numpy.float32 or numpy.float16, got {dtype!r}.")
    temperature = float(_checks.number("temperature", temperature, above=0))
    if top_k is None and temperature != 1.0:
        raise ValueError(
            f"temperature must be 1 without top_k, as logits are stored without one; got "
            f"{temperature:g}."
        )
    return {
        "format": FORMAT,
        "teacher": teacher,
        "teacher_fingerprint": None if variables is None else _hash_tree(variables),
        "dataset": dataset.name,
        "split": split,
        "fingerprint": dataset.fingerprint(split),
        "examples": dataset.size(split),
        "dtype": kind.name,
        "top_k": None if top_k is None else _checks.count("top_k", top_k),
        "temperature": temperature,
        "shifted": top_k is None and kind == np.float16,
    }


def _encode(logits: np.ndarray, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """[B, C] -> the arrays to store."""
    start, kind = manifest["rows"], np.dtype(manifest["dtype"])
    finite = np.isfinite(logits)
    if not finite.all():
        raise ValueError(
            f"predict must return finite logits, got {logits[~finite][0]} for example "
            f"{start + int(np.argwhere(~finite)[0, 0])}."
        )
    k = manifest["top_k"]
    if k is None:
        shift = logits.max(axis=1, keepdims=True) if manifest["shifted"] else 0
        return {"logits": _cast("logits", logits - shift, kind, start)}
    scaled = logits.astype(np.float64) / manifest["temperature"]
    logp = scaled - _log_sum_exp(scaled)[:, None]
    best = np.sort(np.argpartition(-logp, k - 1, axis=1)[:, :k], axis=1)
    order = np.argsort(-np.take_along_axis(logp, best, axis=1), axis=1, kind="stable")
    indices = np.take_along_axis(best, order, axis=1)
    values = np.take_along_axis(logp, indices, axis=1)
    np.put_along_axis(logp, indices, -np.inf, axis=1)
    return {
        "values": _cast("values", values, kind, start),
        "indices": indices.astype(np.int32),
        "rest": _cast("rest", _log_sum_exp(logp), kind, start),
    }


def _log_sum_exp(x: np.ndarray) -> np.ndarray:
    largest = x.max(axis=1)
    return largest + np.log(np.exp(x - largest[:, None]).sum(axis=1))


def _cast(name: str, x: np.ndarray, dtype: np.dtype, start: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = x.astype(dtype)
    if not np.isfinite(cast).all():
        row = int(np.argwhere(~np.isfinite(cast))[0, 0])
        raise ValueError(
            f"dtype {dtype.name} can't hold the {name} of example {start + row}, which reach "
            f"{x[row].min():.6g} (its limit is {np.finfo(dtype).max:.6g}); use a wider dtype."
        )
    return cast


def _logits(output: Any, rows: int, manifest: dict[str, Any]) -> np.ndarray:
    """Checks what predict returned; the first call settles the number of classes."""
    if isinstance(output, Mapping) or not hasattr(output, "shape") or len(output.shape) != 2:
        raise ValueError(
            f"predict must return logits of shape ({rows}, C), got {_checks.describe(output)}."
        )
    if output.shape[0] != rows:
        raise ValueError(
            f"predict must return one row of logits for each of the {rows} examples, got "
            f"{_checks.describe(output)}."
        )
    classes, k = output.shape[1], manifest["top_k"]
    if manifest["classes"] is None:
        if k is not None and k >= classes:
            raise ValueError(
                f"top_k must be at most {classes - 1} for {classes} classes (without it all logits "
                f"are stored), got {k}."
            )
        manifest["classes"] = classes
    if classes != manifest["classes"]:
        raise ValueError(
            f"predict must return logits for {manifest['classes']} classes as before, got "
            f"{classes}."
        )
    array = np.asarray(output)
    if array.dtype != np.float64:
        array = array.astype(np.float32)
    return array


def _next_batch(dataset: Dataset, split: str, start: int, batch_size: int) -> tuple[Batch, int]:
    """Rows from ``start`` on, padded to batch_size so that predict compiles once."""
    rows = np.arange(start, min(start + batch_size, dataset.size(split)))
    batch = dataset.read(split, np.resize(rows, batch_size))
    batch["weight"] = (np.arange(batch_size) < len(rows)).astype(np.float32)
    return batch, len(rows)


def _hash_tree(tree: Any) -> str:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    parts = []
    for where, leaf in leaves:
        if jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        if array.dtype.kind not in "biufc":  # bfloat16 and the like hash by their bytes
            array = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        parts.append(f"{jax.tree_util.keystr(where)} {hash_array(array)}")
    return digest(*parts)
