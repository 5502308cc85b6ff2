"""One progress bar over the trainings and the attacks of a robustness experiment."""

from __future__ import annotations

import sys
import time

from tqdm.auto import tqdm


class Progress:
    """A bar over passes through the network on a terminal; elsewhere a line for each part.

    Args:
      total: passes in all, roughly.
      show: whether to show it.
    """

    def __init__(self, total: float, *, show: bool) -> None:
        self.show = show
        # None: tqdm decides, by whether there is a terminal.
        self._bar = tqdm(
            total=total,
            bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            disable=None if show else True,
        )
        self._lines = show and self._bar.disable
        self._title, self._note = "", ""
        self._base = self._size = 0.0
        self._since = time.perf_counter()

    def begin(self, title: str, size: float) -> None:
        """A part starts, of so many passes."""
        self._base, self._size = self._base + self._size, size
        self._title, self._note, self._since = title, "", time.perf_counter()
        self._bar.set_description(title, refresh=False)
        self._bar.set_postfix_str("starting")

    def at(self, passes: float, note: str = "") -> None:
        """The part has come so far."""
        self._note = note or self._note
        self._bar.set_postfix_str(self._note, refresh=False)
        self._bar.update(self._base + min(passes, self._size) - self._bar.n)

    def end(self, note: str = "") -> None:
        """The part has ended."""
        self.at(self._size, note)
        if self._lines:
            took = f"{time.perf_counter() - self._since:.1f} s"
            said = f", {self._note}" if self._note else ""
            print(f"{self._title}: {took}{said}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Gives the terminal back."""
        self._bar.close()
