"""The tensors of a folder: one safetensors file, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Tensors:
    """Names, shapes and lazily read values of a folder's tensors.

    Raises:
      ValueError: there are none, a file is damaged (truncated, overlapping or oversize), the index
        names a file that is absent or outside the folder, or a tensor that its file lacks.
    """

    def __init__(self, folder: Path) -> None:
        if (folder / INDEX).is_file():
            files = _indexed(folder)
        elif (folder / ONE).is_file():
            files = dict.fromkeys(_open(folder / ONE).keys(), folder / ONE)
        else:
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            hint = (
                f" {pickled[0]} would have to be unpickled, which can run code: convert it with "
                "save_pretrained(..., safe_serialization=True)."
                if pickled
                else ""
            )
            raise ValueError(f"folder must hold {ONE} or {INDEX}, which {folder} does not.{hint}")
        self._files = files
        self._open: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Any:
        return iter(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle(name).get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        return self._handle(name).get_tensor(name)

    def _handle(self, name: str) -> Any:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = _open(file)
        return self._open[file]


def write(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Whole or not at all."""
    from safetensors.numpy import save_file

    partial = file.with_name(f".{file.name}")
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(arrays, str(partial), metadata={"format": "pt"})
    # The library writes files that only their owner can read.
    beside = file.with_name(f".{file.name}.mode")
    beside.touch()
    partial.chmod(beside.stat().st_mode)
    beside.unlink()
    partial.replace(file)


def _open(file: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Reading a model folder needs safetensors: pip install 'kdjax[lm]'"
        ) from error
    try:
        return safe_open(str(file), framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file: {error}.") from None


def _indexed(folder: Path) -> dict[str, Path]:
    """Tensor to shard, after a look into every shard."""
    where = folder / INDEX
    try:
        found = json.loads(where.read_text())["weight_map"]
        shards = {str(name): str(shard) for name, shard in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{where} must be a JSON object with weight_map, from tensors to files."
        ) from None
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            raise ValueError(f"weight_map in {where} must name files of its folder, got {shard!r}.")
        if not (folder / shard).is_file():
            raise ValueError(f"weight_map in {where} names {shard}, which is not there.")
        held = set(_open(folder / shard).keys())
        absent = sorted(name for name, file in shards.items() if file == shard and name not in held)
        if absent:
            raise ValueError(
                f"weight_map in {where} expects {', '.join(absent)} in {shard}, "
                "which does not hold them."
            )
    return {name: folder / shard for name, shard in shards.items()}
