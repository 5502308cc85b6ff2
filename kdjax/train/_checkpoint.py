"""Checkpoints on disk: asynchronous and atomic, the latest ones and the best one.

Orbax's v0 CheckpointManager does the writing. Each checkpoint holds the whole State and a JSON
record of what it belongs to, so that a checkpoint of another model is refused before it is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from kdjax import _checks, parallel
from kdjax._pairs import State, Tree
from kdjax.data._locks import locked
from kdjax.train import _trees

# Written when a checkpoint is complete; a file of another size means that it was cut or mixed up.
_SIZES = "sizes.json"
_RECORD = "record"
_SAVED_AT = "saved at step"


class Checkpoints:
    """The checkpoints of one folder.

    Args:
      folder: a local or mounted folder, relative or absolute.
      keep: how many of the latest are kept.
      best: ``(metric, "max" or "min")``: the best by this metric is kept as well.
      write: opens the folder for this run alone; False for reading only.
      parts: opens it to read parts of states.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 1,
        best: tuple[str, str] | None = None,
        write: bool = True,
        parts: bool = False,
    ) -> None:
        self.folder = absolute(folder)
        self._write = write
        self._lock = _taken(self.folder) if write else contextlib.ExitStack()
        try:
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=_options(keep, best, write),
                item_handlers={
                    "state": ocp.PyTreeCheckpointHandler()
                    if parts
                    else ocp.StandardCheckpointHandler(),
                    _RECORD: ocp.JsonCheckpointHandler(),
                },
            )
            self._metrics = {step: self._manager.metrics(step) or {} for step in self.steps()}
        except BaseException as error:
            self._lock.close()
            if not isinstance(error, json.JSONDecodeError):
                raise
            raise ValueError(
                f"checkpoint {self.folder} can't be read: the metrics file of one of its steps is "
                f"damaged ({error}); nothing was changed."
            ) from error
        self._best = best

    def steps(self) -> list[int]:
        """The steps there are, in order."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def best(self) -> tuple[int, float] | None:
        """The step that is best by the metric and its value, or None where no step has one."""
        if self._best is None:
            return None
        step = self._manager.best_step()
        value = self._metrics.get(step, {}).get(self._best[0])
        return None if value is None else (step, value)

    def record(self, step: int) -> dict[str, Any]:
        """What `save` was told about the state of a step."""
        self._check_sizes(step)
        try:
            args = ocp.args.Composite(**{_RECORD: ocp.args.JsonRestore()})
            found = self._manager.restore(step, args=args)[_RECORD]
        except Exception as error:
            raise self._unreadable(step, error) from error
        if not isinstance(found, dict) or "tree" not in found or "checksums" not in found:
            raise self._unreadable(step, "its record is not kdjax's")
        return found

    def restore(self, step: int, like: State) -> State:
        """The state of a step.

        Args:
          step: one of `steps`.
          like: a State of arrays or of ``jax.ShapeDtypeStruct``, with the shardings to restore to.

        Raises:
          ValueError: the checkpoint is of another model, or damaged.
        """
        record = self.record(step)
        difference = _trees.first_difference(record["tree"], _trees.summary(like))
        if difference is not None:
            raise ValueError(
                f"checkpoint {self.folder} is of another model or optimizer: {difference}; "
                "nothing was changed."
            )
        like = _trees.abstract(like)
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(_trees.filled(like)))
            state = _trees.emptied(self._manager.restore(step, args=args)["state"], like)
        except Exception as error:
            raise self._unreadable(step, error) from error
        self._compare(step, record, state)
        return state

    def student(self, step: int) -> tuple[Tree, Tree]:
        """``(params, extra)`` of the student as plain containers; needs ``parts=True``."""
        record = self.record(step)
        if not any(path.startswith("params/student") for path in record["tree"]):
            raise ValueError(f"checkpoint {self.folder} holds no student: params has no 'student'.")
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        try:
            tree = self._manager.item_metadata(step)["state"].tree
            # Optimizer state is as large as the student twice over; it stays on disk.
            item = {name: {"student": tree[name]["student"]} for name in ("params", "extra")}
            args = ocp.args.PyTreeRestore(
                item,
                jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=default), item),
                partial_restore=True,
            )
            state = self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]
        except Exception as error:
            raise self._unreadable(step, error) from error
        self._compare(step, record, state)
        return state["params"]["student"], state["extra"]["student"]

    def save(
        self, step: int, state: State, record: Mapping[str, Any], metrics: dict[str, float]
    ) -> None:
        """Copies the state to the host and writes it in the background.

        Args:
          step: above every step there is.
          state: the state; its buffers may be donated once this returns.
          record: JSON-able facts to keep with it.
          metrics: finite results by which the best is chosen; empty if there are none.
        """
        # Also waits for the save before this one, which is then complete.
        self._manager.wait_until_finished()
        self._note_sizes()
        record = {
            **record,
            **_trees.versions(),
            "step": step,
            "tree": _trees.summary(state),
            "checksums": _trees.checksums(state),
            "best": self._best,
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_trees.filled(state)),
            **{_RECORD: ocp.args.JsonSave(record)},
        )
        # Orbax answers False, and writes nothing, for a step that isn't above all others.
        ranked = None if self._best is None else {**metrics, _SAVED_AT: step}
        if not self._manager.save(step, args=args, metrics=ranked):
            raise ValueError(
                f"checkpoint {self.folder} already holds step {self.latest()}, so step {step} was "
                "not saved; another run may be writing to the same folder."
            )
        self._metrics[step] = metrics

    def close(self) -> None:
        """Waits for the last save."""
        try:
            self._manager.wait_until_finished()
            self._note_sizes()
        finally:
            try:
                self._manager.close()
            finally:
                self._lock.close()

    def resolve(self, step: int | str | None) -> int:
        """The step meant by None (the newest), ``"best"`` or a number."""
        steps = self.steps()
        if not steps:
            raise ValueError(f"checkpoint {self.folder} holds no complete checkpoint.")
        if step is None:
            return steps[-1]
        if step == "best":
            best = self.best()
            if best is None:
                raise ValueError(
                    f"step must be a number or None for checkpoint {self.folder}, which was "
                    "written without best=; got 'best'."
                )
            return best[0]
        if isinstance(step, str) or _checks.count("step", step, low=0) not in steps:
            there = ", ".join(map(str, steps))
            raise ValueError(
                f"step must be 'best', None or one of {there} in checkpoint {self.folder}, "
                f"got {step!r}."
            )
        return step

    def _check_sizes(self, step: int) -> None:
        folder = self.folder / str(step)
        try:
            sizes = json.loads((folder / _SIZES).read_text())
        except FileNotFoundError:
            return  # The process that wrote it was killed before it could note them.
        except (OSError, ValueError) as error:
            raise self._unreadable(step, error) from error
        there = _sizes(folder)
        for name, size in sizes.items():
            if there.get(name) != size:
                got = f"{there[name]} bytes" if name in there else "missing"
                raise self._unreadable(step, f"{name} should have {size} bytes and is {got}")

    def _note_sizes(self) -> None:
        if not self._write or jax.process_index() != 0:
            return
        for step in self.steps():
            folder = self.folder / str(step)
            if folder.is_dir() and not (folder / _SIZES).exists():
                text = json.dumps(_sizes(folder))
                partial = folder / f".{_SIZES}"
                partial.write_text(text)
                os.replace(partial, folder / _SIZES)

    def _compare(self, step: int, record: Mapping[str, Any], tree: Tree) -> None:
        for path, value in _trees.checksums(tree).items():
            if record["checksums"].get(path) != value:
                raise self._unreadable(step, f"the values of {path} are not those that were saved")

    def _unreadable(self, step: int, error: object) -> ValueError:
        text = str(error).strip().split("\n")[0][:200] or type(error).__name__
        before = [s for s in self.steps() if s < step]
        then = (
            f"remove that folder to continue from step {before[-1]}"
            if before
            else "there is no earlier one, so remove that folder to start anew"
        )
        return ValueError(
            f"checkpoint {self.folder / str(step)} is damaged and was left as it is ({text}); "
            f"{then}."
        )


def _options(keep: int, best: tuple[str, str] | None, write: bool) -> ocp.CheckpointManagerOptions:
    latest = checkpoint_managers.LatestN(keep)
    if best is None:
        policy, choice = latest, {}
    else:
        name, mode = best

        def value(metrics: Mapping[str, float]) -> tuple[float, float]:
            # Of equal values the first one counts, which orbax, left alone, would not keep.
            at = metrics.get(_SAVED_AT, 0)
            if mode == "max":
                return metrics.get(name, float("-inf")), -at
            return metrics.get(name, float("inf")), at

        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                latest,
                checkpoint_managers.BestN(
                    get_metric_fn=value,
                    reverse=mode == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        choice = {"best_fn": value, "best_mode": mode}
    if not write:
        return ocp.CheckpointManagerOptions(create=False, **choice)
    return ocp.CheckpointManagerOptions(
        preservation_policy=policy, cleanup_tmp_directories=True, **choice
    )


def _taken(folder: Path) -> contextlib.ExitStack:
    """Makes the folder and locks it, before orbax tidies up what another run may be saving."""
    stack, fault = contextlib.ExitStack(), None
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            stack.enter_context(
                locked(folder, f"checkpoint {folder} is being written by another run.")
            )
        except OSError as error:
            fault = f"checkpoint must be a folder that can be written, got {folder} ({error})."
        except ValueError as error:
            fault = str(error)
    if parallel.agree(fault is not None):
        raise ValueError(fault or f"checkpoint {folder} could not be opened by process 0.")
    return stack


def absolute(folder: str | os.PathLike[str]) -> Path:
    """The folder as an absolute path: orbax fails late, in its thread, on a relative one."""
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"checkpoint must be the path of a folder, got {_checks.describe(folder)}.")
    if "://" in str(folder):
        raise ValueError(f"checkpoint must be a local or mounted folder, got {str(folder)!r}.")
    path = Path(folder).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"checkpoint must be a folder, got the file {path}.")
    return path


def _sizes(folder: Path) -> dict[str, int]:
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in (_SIZES, f".{_SIZES}")
    }
