"""One progress bar over all the trainings of an experiment."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm


class Progress:
    """A bar over updates on a terminal or in a notebook; elsewhere a line for each training.

    Args:
      total: updates in all.
      show: whether to show it.
    """

    def __init__(self, total: int, *, show: bool) -> None:
        # None: tqdm decides, by whether there is a terminal.
        self._bar = tqdm(total=total, unit="step", disable=None if show else True)
        self._lines = show and self._bar.disable
        self._done = 0
        self._title = ""
        self._last: float | None = None
        self._since = time.perf_counter()

    def begin(self, title: str, steps: int) -> None:
        """A training starts."""
        self._title, self._last, self._since = title, None, time.perf_counter()
        self._bar.set_description(title, refresh=False)
        self._bar.set_postfix_str("compiling")

    def at(self, step: int, record: Mapping[str, Any]) -> None:
        """A training has come to a step."""
        found = [v for k, v in record.items() if k.startswith("eval/accuracy") and v is not None]
        if found:
            self._last = sum(found) / len(found)
        shown = [f"loss {_mean(record['loss']):.3g}"] if record.get("loss") is not None else []
        if self._last is not None:
            shown.append(f"validation {100 * self._last:.1f} %")
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update(self._done + step - self._bar.n)

    def end(self, steps: int) -> None:
        """A training has ended."""
        self._done += steps
        self._bar.update(self._done - self._bar.n)
        if self._lines:
            found = "" if self._last is None else f", validation {100 * self._last:.1f} %"
            took = f"{time.perf_counter() - self._since:.1f} s"
            print(f"{self._title}: {steps} steps, {took}{found}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """What goes on after the last training."""
        self._bar.set_description(text, refresh=False)
        self._bar.set_postfix_str("")

    def close(self) -> None:
        """Removes the bar's claim on the terminal."""
        self._bar.close()


def _mean(value: Any) -> float:
    values = value if isinstance(value, list) else [value]
    return sum(values) / len(values)
