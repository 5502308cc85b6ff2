"""What a killed evaluation leaves on the disk, so that the same call continues."""

from __future__ import annotations

import json
import os
import pathlib
import time
import zipfile
from typing import Any

import jax
import numpy as np

from kdjax.attacks._auto_attack_progress import about, weights
from kdjax.attacks._batches import Ball, Split

_SAVE_SECONDS = 10


class Store:
    """The file with the rows that a killed evaluation has got."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        rows: Split,
        held: Split | None,
        clean: np.ndarray,
        key: jax.Array,
        around: Ball,
        model: Any,
    ) -> None:
        settings = {"eps": float(around.eps), "norm": around.norm, "step": float(around.step_size)}
        settings["weights"] = weights(model)
        self._about = about(rows.x, rows.labels, key, settings)
        if held is not None:
            other = about(held.x, held.labels, key, {})
            self._about["validation"] = f"{other['images']} {other['labels']}"
        self._rows = {"clean": clean}
        self._path = pathlib.Path(folder, "evaluation.npz")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._written = time.monotonic()
        if self._path.exists():
            self._load()

    def _load(self) -> None:
        try:
            with np.load(self._path) as file:
                found = dict(file)
            known = json.loads(str(found.pop("about")))
            clean = found["clean"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"checkpoint must be a folder that evaluate has written, got {self._path.parent}."
            ) from error
        differs = sorted(
            name for name in known.keys() | self._about if known.get(name) != self._about.get(name)
        )
        mine = self._rows["clean"]
        # Another machine or batch rounds otherwise.
        same = clean.shape == mine.shape and np.allclose(
            clean, mine, rtol=0, atol=5e-3 * np.abs(mine).max()
        )
        if differs or not same:
            raise ValueError(
                f"checkpoint must be of this evaluation, but in {self._path.parent} another was "
                f"begun ({', '.join(differs) or 'the model'}): remove it or name another folder."
            )
        self._rows = found

    def rows(self, name: str) -> np.ndarray | None:
        """What there is of a part."""
        return self._rows.get(name)

    def save(self, name: str, found: np.ndarray, *, last: bool) -> None:
        """Keeps the rows, and writes all now and then, so that a whole file is always there."""
        self._rows[name] = found
        if not last and time.monotonic() - self._written < _SAVE_SECONDS:
            return
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            with open(partial, "wb") as file:
                rows: dict[str, Any] = dict(self._rows)
                np.savez(file, about=np.array(json.dumps(self._about)), **rows)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self._path)
        finally:
            partial.unlink(missing_ok=True)
        self._written = time.monotonic()
