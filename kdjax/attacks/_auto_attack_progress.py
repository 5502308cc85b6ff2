"""How far an evaluation by AutoAttack has come: in memory, on the disk and on the screen."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from kdjax.attacks._auto_attack_plan import Stage

_FORMAT = 1
# What is larger than this is not written after every batch, but so that a second of work is
# written at most as fast as this: a kill costs seconds, and writing doesn't take over.
_BYTES = 1 << 20
# Images whose clean logits stand for the model.
_SHOWN = 256


class Progress:
    """Which image has been through how many stages, and which stage broke it.

    Attributes:
        passed: [N] int32, stages that the image is through with.
        broken: [N] int32, 0 where the clean prediction is wrong, 1 + the stage that broke the
            image, -1 while it is robust.
        x_adv: [N, ...], the images, or what broke them.
    """

    def __init__(self, x: np.ndarray, correct: np.ndarray) -> None:
        self.passed = np.zeros(len(x), np.int32)
        self.broken = np.where(correct, -1, 0).astype(np.int32)
        self.x_adv = x.copy()

    @property
    def robust(self) -> np.ndarray:
        """[N] bool"""
        return self.broken < 0

    def left(self, stage: int) -> np.ndarray:
        """The images that the stage has yet to attack."""
        return np.flatnonzero(self.robust & (self.passed <= stage))

    def record(self, index: np.ndarray, stage: int, broken: np.ndarray, x_adv: np.ndarray) -> None:
        """What a stage has done to a batch."""
        self.passed[index] = stage + 1
        self.broken[index[broken]] = stage + 1
        self.x_adv[index[broken]] = x_adv[broken]

    def masks(self, plan: Sequence[Stage]) -> dict[str, np.ndarray]:
        """Name -> [N] bool, False where the attack, or the clean prediction, broke the image."""
        stages: dict[str, list[int]] = {}
        for number, stage in enumerate(plan):
            stages.setdefault(stage.name, []).append(number + 1)
        found = {"clean": self.broken != 0}
        found.update({name: ~np.isin(self.broken, [0, *own]) for name, own in stages.items()})
        return found


class Checkpoint:
    """The file that an evaluation continues from; without a path it does nothing."""

    def __init__(
        self, path: str | os.PathLike[str] | None, about: Mapping[str, str], logits: np.ndarray
    ) -> None:
        self._path = None if path is None else pathlib.Path(path)
        self._about = dict(about)
        self._logits = logits[:: -(-len(logits) // _SHOWN)].astype(np.float32)
        self._written = -float("inf")

    def load(self, progress: Progress) -> None:
        """Continues where the file stopped, if there is one; refuses another evaluation's."""
        if self._path is None:
            return
        if not self._path.parent.is_dir():
            raise ValueError(f"checkpoint must be in a folder that exists, got {self._path}.")
        if not self._path.exists():
            return
        try:
            with np.load(self._path) as file:
                arrays = dict(file)
            about = json.loads(str(arrays["about"]))
            if about.pop("format") != _FORMAT:
                raise ValueError("of another format")
        except (EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"checkpoint must be a file that auto_attack has written, got {self._path}."
            ) from error
        differs = [name for name, value in self._about.items() if about.get(name) != value]
        if not differs and not _alike(arrays["logits"], self._logits):
            differs = ["the model"]
        if differs:
            raise ValueError(
                f"checkpoint must be of this evaluation, but in {self._path} another was begun "
                f"({', '.join(differs)}): remove it or name another file."
            )
        progress.passed, progress.broken = arrays["passed"], arrays["broken"]
        progress.x_adv[progress.broken > 0] = arrays["rows"]

    def save(self, progress: Progress, *, last: bool = False) -> None:
        """Writes the file anew, so that there is a whole one at any time."""
        if self._path is None:
            return
        rows = np.flatnonzero(progress.broken > 0)
        size = len(rows) * progress.x_adv[:1].nbytes
        if not last and time.monotonic() - self._written < (size - _BYTES) / _BYTES:
            return
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        about = json.dumps({"format": _FORMAT, **self._about})
        try:
            with open(partial, "wb") as file:
                np.savez(
                    file, about=np.array(about), logits=self._logits, passed=progress.passed,
                    broken=progress.broken, rows=progress.x_adv[rows],
                )  # fmt: skip
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self._path)
        finally:
            partial.unlink(missing_ok=True)
        self._written = time.monotonic()


class Bar:
    """A bar over every stage on every image, where a broken image is done with."""

    def __init__(self, plan: Sequence[Stage], progress: Progress, *, show: bool) -> None:
        self._progress = progress
        self._done = np.cumsum([0, *(stage.cost for stage in plan)])
        # None: tqdm decides, by whether there is a terminal.
        self._bar = tqdm(
            total=len(progress.passed),
            bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            disable=None if show else True,
        )

    def at(self, stage: Stage) -> None:
        """The evaluation has come to this stage, or on within it."""
        if self._bar.disable:
            return
        progress, total = self._progress, max(self._done[-1], 1)
        done = np.where(progress.robust, self._done[progress.passed], total).sum() / total
        target = f", target {stage.rank}" if stage.rank else ""
        self._bar.set_description(stage.name + target, refresh=False)
        self._bar.set_postfix_str(f"robust {100 * progress.robust.mean():.1f} %", refresh=False)
        self._bar.update(done - self._bar.n)
        self._bar.refresh()

    @contextlib.contextmanager
    def closing(self) -> Iterator[Bar]:
        """Gives the terminal back however it ends."""
        try:
            yield self
        finally:
            self._bar.close()


def about(
    x: np.ndarray, labels: np.ndarray, key: jax.Array, settings: Mapping[str, Any]
) -> dict[str, str]:
    """Name -> what must be the same for an evaluation to be continued."""
    data = np.asarray(jax.random.key_data(key))
    drawn = f"{jax.random.key_impl(key)} {data.tolist()}"
    given = {"images": _digest(x), "labels": _digest(labels), "key": drawn}
    return {**given, **{name: str(value) for name, value in settings.items()}}


def weights(model: Any) -> str:
    """A digest of the arrays that a Partial holds; none for a function that closes over its own."""
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(model)
        if hasattr(x, "dtype")
    ]
    found = hashlib.blake2b(digest_size=16)
    for x in leaves:
        found.update(_digest(np.asarray(x)).encode())
    return found.hexdigest() if leaves else "in the function"


def _digest(values: np.ndarray) -> str:
    found = hashlib.blake2b(f"{values.dtype} {values.shape}".encode(), digest_size=16)
    found.update(np.ascontiguousarray(values).data)
    return found.hexdigest()


def _alike(logits: np.ndarray, others: np.ndarray) -> bool:
    """Equal but for what other batches or another machine make of the same model."""
    if logits.shape != others.shape:
        return False
    scale = max(np.abs(logits).max(), np.abs(others).max())
    return bool(np.abs(logits - others).max() <= 5e-3 * scale)
