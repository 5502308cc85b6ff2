"""Data sets from arrays: the user's own, npz files, and the embedded digits."""

from __future__ import annotations

import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from kdjax import _checks
from kdjax.data._dataset import Dataset, Split, array_split

RESERVED = ("index", "weight")


def arrays(
    splits: Mapping[str, Mapping[str, Any]],
    *,
    num_classes: int | None = None,
    name: str = "arrays",
) -> Dataset:
    """A data set from the user's own arrays.

    Args:
        splits: split name -> dict of arrays with one row per example. ``image`` is uint8 or
            floating, [N, H, W, C], [N, H, W] (gets a channel axis) or [N, D]; ``label`` is integers
            [N] or [N, 1], -1 or absent where there is none; other arrays (``tokens``, ...) go into
            the batches as they are. The arrays are not copied where their dtypes already fit.
        num_classes: C; default one more than the largest label.
        name: what logs and checkpoints call the data set.

    Returns:
        A Dataset.

    Raises:
        TypeError: an array has a dtype that does not fit.
        ValueError: lengths or shapes differ, or a label is out of range.

    Example:
        >>> import numpy as np, kdjax.data
        >>> x, y = np.zeros((100, 8, 8, 1), np.uint8), np.arange(100) % 4
        >>> dataset = kdjax.data.arrays({"train": {"image": x, "label": y}}).hold_out(0.2)
        >>> dataset.size("train"), dataset.size("validation"), dataset.num_classes
        (80, 20, 4)
    """
    if not isinstance(splits, Mapping) or not splits:
        raise TypeError(
            "splits must be a dict of split name -> dict of arrays, got "
            f"{_checks.describe(splits)}."
        )
    columns = {key: _columns(key, value) for key, value in splits.items()}
    largest = max(int(part["label"].max()) for part in columns.values())
    if num_classes is None:
        if largest < 0:
            raise ValueError("num_classes must be given where no example has a label; got None.")
        num_classes = largest + 1
    num_classes = _checks.count("num_classes", num_classes)
    shapes = {}
    for key, part in columns.items():
        label = part["label"]
        if largest >= num_classes or label.min() < -1:
            bad = label[(label < -1) | (label >= num_classes)]
            if len(bad):
                raise ValueError(
                    f"splits[{key!r}]['label'] must lie in -1 to {num_classes - 1}, got {bad[0]}."
                )
        main = "image" if "image" in part else next(n for n in part if n != "label")
        shapes[key] = part[main].shape[1:]
    if len(set(shapes.values())) > 1:
        raise ValueError(f"splits must have examples of one shape, got {shapes}.")
    made: dict[str, Split] = {key: array_split(part) for key, part in columns.items()}
    return Dataset(
        name=name, num_classes=num_classes, shape=next(iter(shapes.values())), splits=made
    )


def npz(
    path: str | os.PathLike[str],
    *,
    validation: int | float = 0.1,
    seed: int = 0,
    num_classes: int | None = None,
) -> Dataset:
    """A data set from an .npz file in the Keras form: x_train, y_train, x_test, y_test.

    Args:
        path: the file. Images are [N, H, W, C] or grey [N, H, W] (they get a channel axis), uint8
            (kept so in memory, 0 to 255) or floating (taken as they are); labels are integers [N]
            or [N, 1].
        validation: rows, or share of rows, of the training split that become ``validation``,
            stratified; 0 for none.
        seed: which rows those are.
        num_classes: C; default one more than the largest label.

    Returns:
        A Dataset named after the file with splits train, validation and test.

    Raises:
        ValueError: the file is not there, is no npz file, or lacks an array.
        TypeError: an array has a dtype that does not fit.

    Example:
        >>> import os, tempfile, numpy as np, kdjax.data
        >>> path = os.path.join(tempfile.mkdtemp(), "tiny.npz")
        >>> x, y = np.zeros((20, 4, 4), np.uint8), np.arange(20) % 2
        >>> np.savez(path, x_train=x, y_train=y, x_test=x[:6], y_test=y[:6])
        >>> dataset = kdjax.data.npz(path)
        >>> dataset.name, dataset.shape, [dataset.size(s) for s in dataset.splits]
        ('tiny', (4, 4, 1), [18, 2, 6])
    """
    file = pathlib.Path(path)
    loaded = _load_npz(file)
    dataset = arrays(
        {
            split: {"image": loaded[f"x_{split}"], "label": loaded[f"y_{split}"]}
            for split in ("train", "test")
        },
        num_classes=num_classes,
        name=file.stem,
    )
    return with_validation(dataset, validation, seed=seed)


def with_validation(
    dataset: Dataset, validation: int | float, *, seed: int, stratify: bool = True
) -> Dataset:
    """Holds ``validation`` rows of ``train`` out, or that share of them; 0 for none."""
    size = dataset.size("train")
    if isinstance(validation, (int, np.integer)):
        rows = _checks.count("validation", validation, low=0, high=size - 1)
    else:
        share = float(_checks.number("validation", validation, low=0, below=1))
        rows = round(share * size)
        if share > 0 and not 0 < rows < size:
            raise ValueError(
                f"validation must be a share that leaves rows on both sides of the {size} training "
                f"rows, got {validation}."
            )
    return dataset.hold_out(rows, seed=seed, stratify=stratify) if rows else dataset


def digits() -> Dataset:
    """The 1,797 real handwritten digits that scikit-learn ships, 8 x 8 grey, scaled to [0, 1].

    Returns:
        A Dataset with 1,168 training, 180 validation and 449 test examples, stratified, always the
        same; ten classes.

    Example:
        >>> import kdjax.data
        >>> dataset = kdjax.data.digits()
        >>> [dataset.size(split) for split in dataset.splits]
        [1168, 180, 449]

    Reference:
        E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI Machine Learning
        Repository, 1998 (its test part).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images / 16).astype(np.float32)[..., None]
    everything = arrays({"train": {"image": images, "label": bunch.target}}, name="digits")
    return everything.hold_out(449, name="test").hold_out(180, name="validation")


def _columns(split: str, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Checks the arrays of one split and brings image and label to their standard forms."""
    here = f"splits[{split!r}]"
    if not isinstance(given, Mapping):
        raise TypeError(f"{here} must be a dict of arrays, got {_checks.describe(given)}.")
    if set(given) & set(RESERVED):
        raise ValueError(f"{here} must not hold index or weight, which batches add themselves.")
    columns = {key: _column(f"{here}[{key!r}]", value) for key, value in given.items()}
    if not set(columns) - {"label"}:
        raise ValueError(f"{here} must have at least one array beside label, got none.")
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"{here} must hold arrays of one length above 0, got {lengths}.")
    if "image" in columns:
        columns["image"] = _image(f"{here}['image']", columns["image"])
    size = next(iter(lengths.values()))
    label = columns.get("label", np.full(size, -1, np.int32))
    columns["label"] = _label(f"{here}['label']", label)
    return columns


def _column(name: str, value: Any) -> np.ndarray:
    try:
        column = np.asarray(value)
    except ValueError as error:  # rows of unequal lengths
        raise TypeError(
            f"{name} must be an array with one row per example, got {_checks.describe(value)}."
        ) from error
    if column.ndim == 0:
        raise TypeError(
            f"{name} must be an array with one row per example, got {_checks.describe(column)}."
        )
    numeric = jnp.issubdtype(column.dtype, np.number) or column.dtype == np.bool_
    # What JAX has no array for would fail at the first batch.
    if not numeric or column.dtype in (np.longdouble, np.clongdouble):
        raise TypeError(f"{name} must hold numbers or booleans, got {_checks.describe(column)}.")
    return column


def _image(name: str, image: np.ndarray) -> np.ndarray:
    if image.ndim not in (2, 3, 4):
        raise ValueError(
            f"{name} must have shape [N, H, W, C], [N, H, W] or [N, D], got "
            f"{_checks.describe(image)}."
        )
    if image.dtype == np.float64:
        image = image.astype(np.float32)
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"{name} must be uint8 or floating, got {_checks.describe(image)}.")
    return image[..., None] if image.ndim == 3 else image


def _label(name: str, label: np.ndarray) -> np.ndarray:
    if not np.issubdtype(label.dtype, np.integer):
        raise TypeError(f"{name} must be an integer array, got {_checks.describe(label)}.")
    if label.ndim == 2 and label.shape[1] == 1:
        label = label[:, 0]
    if label.ndim != 1:
        raise ValueError(f"{name} must have shape [N] or [N, 1], got {_checks.describe(label)}.")
    low, high = int(label.min()), int(label.max())
    if low < -(2**31) or high >= 2**31 - 1:
        bad = low if low < -(2**31) else high
        raise ValueError(f"{name} must lie in -1 to {2**31 - 2}, got {bad}.")
    return label.astype(np.int32)


def _load_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    wanted = ("x_train", "y_train", "x_test", "y_test")
    if not path.is_file():
        raise ValueError(f"path must be an .npz file, got {path}, which is not there.")
    try:
        # Opened here because numpy leaves a broken file open.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            for key in wanted:
                _checks.entry(str(path), dict.fromkeys(file.files), key)
            return {key: file[key] for key in wanted}
    except (zipfile.BadZipFile, OSError, EOFError, AttributeError, TypeError) as error:
        raise ValueError(f"path must be an .npz file, got {path}: {error}.") from error
    except ValueError as error:
        if "has no entry" in str(error):
            raise
        raise ValueError(f"path must be an .npz file of plain arrays, got {path}.") from error
