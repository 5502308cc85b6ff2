"""The settings of an experiment's folder, and the time spent on it over all interruptions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdjax.experiments import runs
from kdjax.experiments.report import Report, from_json, to_json

SETTINGS, REPORT = "settings.json", "report.json"


class Ledger:
    """What a folder says about its experiment; without a folder, a clock.

    Args:
      folder: the folder, or None.
      settings: the arguments of the experiment, as JSON gives them back.
      resume: whether the folder may be there already.
      about: facts to keep that aren't compared.

    Attributes:
      finished: the report, if the experiment has ended.

    Raises:
      ValueError: the folder is there and ``resume`` is False, or it holds another experiment.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.finished: Report | None = None
        self._about = dict(about or {})
        self._settings, self._spent, self._start = settings, 0.0, time.perf_counter()
        if folder is None:
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            if not resume:
                raise ValueError(
                    f"out must be a new folder, got {folder}, which exists (resume continues it)."
                )
            found = runs.read_json(folder / SETTINGS)
            _same(found["settings"], settings, folder)
            self._spent = float(found["seconds"])
            if (folder / REPORT).is_file():
                self.finished = from_json(runs.read_json(folder / REPORT))
                return
        self.note()

    def seconds(self) -> float:
        """Seconds so far."""
        return self._spent + time.perf_counter() - self._start

    def note(self) -> None:
        """Writes down the settings and the time so far."""
        if self.folder is not None:
            found = {
                "settings": dict(self._settings),
                "about": self._about,
                "seconds": round(self.seconds(), 3),
            }
            runs.write_json(self.folder / SETTINGS, found)

    def end(self, report: Report) -> None:
        """Writes the report: the experiment has ended."""
        if self.folder is not None:
            runs.write_json(self.folder / REPORT, to_json(report))


def about(folder: Path) -> dict[str, Any] | None:
    """The facts that an experiment's folder keeps; None where there is no experiment yet."""
    file = folder / SETTINGS
    return dict(runs.read_json(file)["about"]) if file.is_file() else None


def _same(there: Mapping[str, Any], here: Mapping[str, Any], folder: Path) -> None:
    for name, value in here.items():
        if there.get(name) != value:
            raise ValueError(
                f"{name} must be {_short(there.get(name))} to continue {folder}, "
                f"got {_short(value)}."
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
