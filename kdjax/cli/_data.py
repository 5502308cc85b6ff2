"""Data sets by the names that options give them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdjax.data import Dataset

_TFDS = "tfds:"


def load(data: str, data_dir: str | None = None) -> Dataset:
    """The data set that an option names.

    Args:
      data: "digits", "PATH.npz" or "tfds:NAME".
      data_dir: folder of prepared tfds data.

    Returns:
      The data set.

    Raises:
      ValueError: it is none of these, or not there.
    """
    from kdjax import data as kdata

    if data.startswith(_TFDS):
        try:
            return kdata.tfds(data.removeprefix(_TFDS), data_dir)
        except ValueError as error:
            # Its arguments have other names than ours.
            raise ValueError(f"data {data!r} can't be read: {error}") from error
    if data_dir is not None:
        raise ValueError(f"data_dir must be given with tfds:NAME only, got data {data!r}.")
    if data == "digits":
        return kdata.digits()
    path = Path(data).expanduser()
    if path.suffix == ".npz":
        if not path.is_file():
            raise ValueError(f"data must be a file that is there, got {data}.")
        return kdata.npz(path)
    raise ValueError(f"data must be digits, a PATH.npz or tfds:NAME, got {data!r}.")


def absolute(data: str) -> str:
    """The same data set, named from anywhere."""
    return data if data == "digits" or data.startswith(_TFDS) else str(absolute_path(data))


def absolute_path(path: str | None) -> str | None:
    """An absolute path."""
    return None if path is None else str(Path(path).expanduser().absolute())
