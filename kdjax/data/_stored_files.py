"""The files of stored outputs: manifest, arrays, and how they get onto the disk safely."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

FORMAT = 1
MANIFEST = "manifest.json"


def layout(manifest: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, dtype) of the arrays; little-endian whatever the machine."""
    kind = np.dtype(manifest["dtype"]).newbyteorder("<")
    size, k = manifest["examples"], manifest["top_k"]
    if k is None:
        return {"logits": ((size, manifest["classes"]), kind)}
    return {
        "values": ((size, k), kind),
        "indices": ((size, k), np.dtype("<i4")),
        "rest": ((size,), kind),
    }


class Writer:
    """Appends rows to the arrays and records in the manifest how many are safely on disk."""

    def __init__(self, folder: pathlib.Path, manifest: dict[str, Any]) -> None:
        self._folder = folder
        self._manifest = manifest
        self._files: dict[str, IO[bytes]] = {}
        self._recorded = manifest["rows"]
        self._when = time.monotonic()
        self._cost = 0.0

    def __enter__(self) -> Writer:
        try:
            if self._manifest["rows"]:
                self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._record()
        finally:
            self._close()

    def append(self, arrays: Mapping[str, np.ndarray], rows: int) -> None:
        """Writes the next rows of every array."""
        if not self._files:
            self._open()
        for name, (_, kind) in layout(self._manifest).items():
            self._files[name].write(np.ascontiguousarray(arrays[name], kind).tobytes())
        self._manifest["rows"] += rows
        # What a kill can cost is bounded by ten times what recording costs.
        if time.monotonic() - self._when > 10 * self._cost:
            self._record()

    def _record(self) -> None:
        if self._recorded == self._manifest["rows"]:
            return
        start = time.monotonic()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        write_manifest(self._folder, self._manifest)
        self._recorded = self._manifest["rows"]
        self._when = time.monotonic()
        self._cost = self._when - start

    def _close(self) -> None:
        for file in self._files.values():
            file.close()

    def _open(self) -> None:
        rows = self._manifest["rows"]
        for name, (shape, kind) in layout(self._manifest).items():
            path = self._folder / f"{name}.npy"
            file = open(path, "r+b" if rows else "w+b")  # noqa: SIM115  (closed in __exit__)
            self._files[name] = file
            if not rows:
                header = {"descr": kind.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                continue
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            end = file.tell() + rows * int(np.prod(shape[1:], dtype=np.int64)) * kind.itemsize
            if os.fstat(file.fileno()).st_size < end:
                raise ValueError(
                    f"path can't be resumed: {path} is shorter than the {rows} rows its manifest "
                    f"counts; delete {self._folder} to start anew."
                )
            file.truncate(end)
            file.seek(end)


def same(wanted: Mapping[str, Any], manifest: Mapping[str, Any], path: pathlib.Path) -> None:
    for key, value in wanted.items():
        if manifest.get(key) != value:
            raise ValueError(
                f"path must be new or hold outputs of the same call, but {path} was made with "
                f"{key} {manifest.get(key)!r} and this call has {value!r}; nothing was changed."
            )


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        known = {"examples", "dtype", "top_k", "classes", "rows", "complete", "split"}
        if manifest["format"] != FORMAT or not known <= set(manifest):
            raise KeyError("format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"path must be a folder of stored outputs (format {FORMAT}), got {folder}, whose "
            f"{MANIFEST} is missing or of another kind."
        ) from error
    return manifest


def write_manifest(folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Replaces the manifest in one step: a reader sees the old one or the new one."""
    fresh = folder / f"{MANIFEST}.new"
    with open(fresh, "w") as file:
        json.dump(manifest, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, folder / MANIFEST)
    sync(folder)


def sync(folder: pathlib.Path) -> None:
    """Makes renames in the folder last through a power cut, where the system lets one."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def partial_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".partial")
