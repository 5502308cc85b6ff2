"""TensorFlow Datasets without TensorFlow, by random access to prepared array_record files."""

from __future__ import annotations

import concurrent.futures
import functools
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from kdjax import _checks
from kdjax.data._batches import Batch
from kdjax.data._dataset import Dataset, Split, digest, hash_array
from kdjax.data._sources import with_validation


def tfds(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    splits: Mapping[str, str] | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    prepare: Callable[[np.ndarray], np.ndarray] | None = None,
    validation: int | float = 0.1,
    seed: int = 0,
    num_classes: int | None = None,
    threads: int | None = None,
) -> Dataset:
    """A data set of TensorFlow Datasets that is prepared on disk; TensorFlow is not needed.

    Images are read and decoded as batches ask for them, by several threads. What is not prepared
    yet, ``tfds.builder(name, data_dir=..., file_format="array_record").download_and_prepare()``
    prepares, which for most data sets needs TensorFlow, once (extra ``tfds-prepare``).

    Args:
        name: as in TensorFlow Datasets: "cifar10", "mnist:3.0.1", ...
        data_dir: folder of the prepared data; default that of TensorFlow Datasets.
        splits: our split name -> theirs, slices allowed: {"train": "train[:80%]", ...}; default
            the splits it has (train and test where it doesn't say).
        image_key: feature that is the image; default the data set's supervised input, or "image".
        label_key: feature that is the label; default its supervised target, or "label"; labels are
            -1 where there is no such feature.
        prepare: uint8 image [h, w, C] -> image [H, W, C], to bring images to one size.
        validation: rows, or share of rows, of train that become ``validation`` where there is no
            such split (drawn without regard to labels); 0 for none.
        seed: which rows those are.
        num_classes: C; default that of the label feature.
        threads: that decode; default one per processor, 16 at most.

    Returns:
        A Dataset.

    Raises:
        ImportError: tensorflow-datasets is not installed.
        ValueError: the data set is unknown or not prepared, or lacks a split or feature.

    Example:
        >>> import kdjax.data, tensorflow_datasets
        >>> with tensorflow_datasets.testing.mock_data(num_examples=20):  # in earnest: without
        ...     dataset = kdjax.data.tfds("cifar10", validation=4)
        ...     next(iter(dataset.batches("train", 8)))["image"].shape
        (8, 32, 32, 3)
    """
    package = _package()
    where = None if data_dir is None else os.path.expanduser(os.fspath(data_dir))
    threads = _checks.count("threads", threads or min(16, os.cpu_count() or 1))
    info = _info(package, name, where)
    image_key, label_key = _keys(info, name, image_key, label_key)
    if splits is None:
        splits = {key: key for key in info.splits} or {"train": "train", "test": "test"}
    feature = info.features[label_key] if label_key else None
    if num_classes is None:
        num_classes = getattr(feature, "num_classes", None)
    if num_classes is None:
        raise ValueError(
            f"num_classes must be given for {name!r}, which doesn't say how many it has; got None."
        )
    pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="decode")
    made = {
        key: _split(
            functools.partial(_source, package, name, where, spec),
            name=f"{info.full_name} {spec} {_size_on_disk(info, spec)}",
            image_key=image_key,
            label_key=label_key,
            prepare=prepare,
            pool=pool,
            threads=threads,
            skip=package.decode.SkipDecoding,
            lossy=getattr(info.features[image_key], "encoding_format", None) == "jpeg",
        )
        for key, spec in splits.items()
    }
    first = next(iter(made.values())).read(np.arange(1))["image"]
    dataset = Dataset(
        name=name,
        num_classes=_checks.count("num_classes", num_classes),
        shape=first.shape[1:],
        splits=made,
    )
    if "validation" in made or "train" not in made:
        return dataset
    return with_validation(dataset, validation, seed=seed, stratify=False)


def _split(
    source: Callable[..., Any],
    *,
    name: str,
    image_key: str,
    label_key: str | None,
    prepare: Callable[[np.ndarray], np.ndarray] | None,
    pool: concurrent.futures.ThreadPoolExecutor,
    threads: int,
    skip: Callable[[], Any],
    lossy: bool,
) -> Split:
    """One split, its rows decoded by the pool in ``threads`` pieces."""
    examples = source()

    def piece(rows: np.ndarray) -> list[tuple[np.ndarray, int]]:
        # One by one: tfds' mock_data has no working __getitems__.
        found = (examples[row] for row in rows.tolist())
        return [
            (
                prepare(example[image_key]) if prepare else example[image_key],
                example[label_key] if label_key else -1,
            )
            for example in found
        ]

    def read(rows: np.ndarray) -> Batch:
        pieces = [part for part in np.array_split(rows, threads) if len(part)]
        pairs = [pair for part in pool.map(piece, pieces) for pair in part]
        shapes = {np.shape(image) for image, _ in pairs}
        if len(shapes) > 1:
            raise ValueError(
                "prepare must bring all images to one size where they differ, got shapes "
                f"{sorted(shapes)[:3]}."
            )
        return {
            "image": np.stack([image for image, _ in pairs]),
            "label": np.asarray([label for _, label in pairs]).astype(np.int32),
        }

    @functools.cache
    def labels() -> np.ndarray:
        if label_key is None:
            return np.full(len(examples), -1, np.int32)
        undecoded = source(decoders={image_key: skip()})
        found = np.empty(len(undecoded), np.int32)
        with tqdm(total=len(found), desc="labels", unit="example", delay=2) as bar:
            for start in range(0, len(found), 1024):
                rows = range(start, min(start + 1024, len(found)))
                found[rows] = [e[label_key] for e in undecoded.__getitems__(list(rows))]
                bar.update(len(rows))
        return found

    @functools.cache
    def fingerprint() -> str:
        # Reading everything could take hours: sizes on disk, and 64 rows spread over the split.
        # Decoders of lossy formats differ in last bits, so there only the labels count.
        sample = read(np.unique(np.linspace(0, len(examples) - 1, 64).astype(np.int64)))
        image = "" if lossy else hash_array(sample["image"])
        return digest(name, str(sample["image"].shape), image, hash_array(sample["label"]))

    return Split(size=len(examples), read=read, labels=labels, fingerprint=fingerprint)


def _package() -> ModuleType:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(
            "kdjax.data.tfds needs tensorflow-datasets: pip install 'kdjax[tfds]' (no TensorFlow)."
        ) from error
    return tensorflow_datasets


def _info(package: ModuleType, name: str, data_dir: str | None) -> Any:
    try:
        return package.builder(name, data_dir=data_dir).info
    except package.core.DatasetNotFoundError as error:
        raise ValueError(
            f"name must be a data set of TensorFlow Datasets or one prepared under "
            f"{data_dir or 'its default folder'}, got {name!r}."
        ) from error


def _source(
    package: ModuleType, name: str, data_dir: str | None, spec: str, decoders: Any = None
) -> Any:
    """Random access to one split."""
    try:
        source = package.data_source(
            name, split=spec, data_dir=data_dir, download=False, decoders=decoders
        )
    except (KeyError, ValueError, NotImplementedError, OSError, AssertionError) as error:
        if "Unknown split" in str(error):
            raise ValueError(
                f"splits must name splits of {name!r}, got {spec!r}: {error}"
            ) from error
        raise ValueError(
            f"name must be a data set that is prepared as array_record, which {name!r} is not in "
            f"{data_dir or 'the default folder'}: install 'kdjax[tfds-prepare]' and run "
            f"tensorflow_datasets.builder({name!r}, data_dir={data_dir!r}, "
            "file_format='array_record').download_and_prepare() once."
        ) from error
    if "[" in spec and source.dataset_info.file_format.value == "parquet":
        raise ValueError(
            f"splits must be whole for parquet files, where slices are ignored, got {spec!r}; "
            "prepare the data as array_record."
        )
    return source


def _keys(
    info: Any, name: str, image_key: str | None, label_key: str | None
) -> tuple[str, str | None]:
    """Names of the image and label features."""
    supervised = info.supervised_keys
    if not (isinstance(supervised, tuple) and all(isinstance(k, str) for k in supervised)):
        supervised = ("image", "label" if "label" in info.features else None)
    features = dict(info.features.items())
    image_key = supervised[0] if image_key is None else image_key
    _checks.entry(f"data set {name!r}", features, image_key, "Name it with image_key.")
    label_key = supervised[1] if label_key is None else label_key
    if label_key is not None:
        _checks.entry(f"data set {name!r}", features, label_key, "Name it with label_key.")
    return image_key, label_key


def _size_on_disk(info: Any, spec: str) -> str:
    split = info.splits.get(spec.split("[")[0])
    return "" if split is None else f"{split.num_examples} {split.num_bytes} {split.shard_lengths}"
