"""Features and labels from the file that ``kdjax theory plan`` is given."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdjax import _checks

_KNOWN = ("features", "labels", "x_train", "y_train")
_WANTED = "an npz file with arrays features and labels, or x_train and y_train"


class Data(NamedTuple):
    """The user's file: name, features [N, p], labels."""

    name: str
    features: np.ndarray
    labels: np.ndarray


def read(file: str) -> Data:
    """Features and labels from an npz file.

    Args:
      file: with ``features`` and ``labels``, or ``x_train`` and ``y_train``.

    Returns:
      The Data; rows with a class of -1 (no label) are left out.

    Raises:
      ValueError: the file isn't there, isn't such a file, or its arrays don't fit.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"features must be a file that is there, got {file}.")
    arrays: dict[str, np.ndarray] = {}
    try:
        stored = np.load(path)
        if not isinstance(stored, np.ndarray):
            with stored:
                arrays = {name: stored[name] for name in stored.files if name in _KNOWN}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"features must be {_WANTED}, of numbers, got {file}.") from error
    if isinstance(stored, np.ndarray):
        what = _checks.describe(stored)
        raise ValueError(f"features must be {_WANTED}, got {file} with one unnamed {what}.")
    for x, y in (("features", "labels"), ("x_train", "y_train")):
        if x in arrays and y in arrays:
            return _matched(path.stem, x, arrays[x], y, arrays[y])
    there = ", ".join(stored.files) or "nothing"
    unnamed = "arr_0" in stored.files
    hint = "; np.savez(file, features=..., labels=...) names them" if unnamed else ""
    raise ValueError(f"features must be {_WANTED}, got {file}, which has {there}{hint}.")


def _matched(name: str, x_name: str, x: np.ndarray, y_name: str, y: np.ndarray) -> Data:
    if x.ndim < 2 or not (np.issubdtype(x.dtype, np.number) or x.dtype == np.bool_):
        raise ValueError(
            f"features must hold numbers [N, p] as {x_name}, got {_checks.describe(x)}."
        )
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind in "USb":
        raise ValueError(
            f"features must hold labels as numbers in {y_name}, got {_checks.describe(y)}: for "
            "classes, encode them as integers 0..K-1."
        )
    if y.ndim not in (1, 2) or len(y) != len(x) or not np.issubdtype(y.dtype, np.number):
        raise ValueError(
            f"features must hold {len(x)} labels [N] or [N, K] as {y_name}, one for each of "
            f"{x_name}, got {_checks.describe(y)}."
        )
    x = x.reshape(len(x), -1).astype(np.float64)
    if np.issubdtype(y.dtype, np.integer) and y.ndim == 1:
        known = y >= 0
        x, y = x[known], y[known]
    if len(x) < 10:
        raise ValueError(f"features must hold at least 10 labelled rows, got {len(x)}.")
    return Data(name, x, y)
