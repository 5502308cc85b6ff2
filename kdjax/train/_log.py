"""Metrics: fetched late and in batches, checked for every step, written as JSON lines."""

from __future__ import annotations

import collections
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from kdjax._pairs import Tree

Record = dict[str, Any]


class History:
    """The metrics of a run, from device arrays to lines on disk.

    Args:
      file: the JSON lines file, or None.
      start: the step the run starts from; later lines in the file are dropped.
      logged: whether a step is logged.
      report: called with ``(step, record)`` for each line.
      bar: the progress bar.
    """

    def __init__(
        self,
        file: Path | None,
        *,
        start: int,
        logged: Callable[[int], bool],
        report: Callable[[int, Record], None] | None,
        bar: tqdm,
    ) -> None:
        self._logged, self._report, self._bar = logged, report, bar
        self._pending: collections.deque[tuple[int, int | None, int, Tree]] = collections.deque()
        self._staged: dict[int, Record] = {}
        self._examples, self._since = 0, time.perf_counter()
        self._lines = None
        if file is not None:
            drop_after(file, start)
            self._lines = file.open("a", encoding="utf-8")

    def add(self, step: int, calls: int | None, examples: int, metrics: Tree) -> None:
        """Takes the metrics of the call that ended at ``step``, without waiting for them.

        Args:
          step: the step after the call.
          calls: how many updates it made, stacked along axis 0 of the metrics; None for one.
          examples: rows it consumed.
          metrics: arrays on the device.
        """
        self._pending.append((step, calls, examples, metrics))

    def throttle(self, ahead: int) -> None:
        """Waits until at most ``ahead`` calls are unfinished: each one holds its batch."""
        if len(self._pending) > ahead:
            leaves = jax.tree.leaves(self._pending[-ahead - 1][-1])
            if leaves:
                leaves[0].block_until_ready()

    def fetch(self, *, newest: int = 0) -> None:
        """Fetches and checks what is there, but for the newest calls, which may still run.

        Raises:
          FloatingPointError: the loss of a step is not finite.
        """
        ready = [self._pending.popleft() for _ in range(len(self._pending) - newest)]
        values = jax.device_get([metrics for *_, metrics in ready])
        for (end, calls, examples, _), metrics in zip(ready, values, strict=True):
            self._examples += examples
            for i in range(calls or 1):
                step = end - (calls or 1) + 1 + i
                record = {
                    name: (value if calls is None else value[i]) for name, value in metrics.items()
                }
                check_finite(step, record)
                if self._logged(step):
                    self._staged[step] = {name: number(v) for name, v in record.items()}

    def note(self, step: int, results: Mapping[str, float]) -> None:
        """Adds evaluation results to the line of a step."""
        self._staged.setdefault(step, {}).update({f"eval/{k}": v for k, v in results.items()})

    def write(self, *, before: int | None = None) -> None:
        """Writes the staged lines, and moves the progress bar.

        Args:
          before: leave the lines from this step on for later.
        """
        steps = sorted(step for step in self._staged if before is None or step < before)
        if not steps:
            return
        rate = self._rate()
        for step in steps:
            record = self._staged.pop(step)
            if rate is not None and any(not name.startswith("eval/") for name in record):
                record["examples_per_second"] = rate
            if self._lines is not None:
                self._lines.write(json.dumps({"step": step, **nulls(record)}) + "\n")
            if self._report is not None:
                self._report(step, record)
            self._show(record)
        if self._lines is not None:
            self._lines.flush()
        self._bar.update(steps[-1] - self._bar.n)

    def restart_clock(self) -> None:
        """Leaves what came before, such as compilation or an evaluation, out of the rate."""
        self._examples, self._since = 0, time.perf_counter()

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
        self._bar.close()

    def _rate(self) -> float | None:
        now = time.perf_counter()
        if not self._examples or now <= self._since:
            return None
        rate = self._examples / (now - self._since)
        self._examples, self._since = 0, now
        return float(f"{rate:.4g}")

    def _show(self, record: Record) -> None:
        shown = {
            name: f"{np.mean(record[name]):.4g}"
            for name in ("loss", "accuracy", "eval/accuracy")
            if record.get(name) is not None
        }
        if "examples_per_second" in record:
            shown["examples/s"] = f"{record['examples_per_second']:.4g}"
        self._bar.set_postfix(shown, refresh=False)


def check_finite(step: int, record: Mapping[str, Any]) -> None:
    """Raises FloatingPointError where the loss, or a term of it, is NaN or infinite."""
    losses = {k: v for k, v in record.items() if k == "loss" or k.startswith("loss/")}
    bad = {k: v for k, v in losses.items() if not np.all(np.isfinite(v))}
    if bad:
        terms = [k for k in bad if k != "loss"]
        values = ", ".join(f"{k} = {number(bad[k])}" for k in terms or bad)
        raise FloatingPointError(f"the loss of step {step} is not finite: {values}")


def number(value: Any) -> Any:
    """A Python number, or nested lists of them."""
    return np.asarray(value).tolist()


def nulls(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON has no word for."""
    if isinstance(value, dict):
        return {k: nulls(v) for k, v in value.items()}
    if isinstance(value, list):
        return [nulls(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(file: Path) -> list[Record]:
    """The lines of a metrics file; one that was cut by a kill or is damaged is left out."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        # JSON lines are written in ASCII, so this stands for bytes that couldn't be decoded.
        if "\ufffd" in line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found


def drop_after(file: Path, step: int) -> None:
    """Drops the lines of steps after ``step``, which the run takes again."""
    if not file.exists():
        return
    kept = [record for record in read(file) if record["step"] <= step]
    partial = file.with_name(f".{file.name}")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(partial, file)
