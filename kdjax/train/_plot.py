"""The curves of a run as a PNG, where matplotlib is installed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.train import _log

_NOT_CURVES = ("step", "examples_per_second")


def draw(metrics: Path, png: Path) -> None:
    """Draws the curves of a metrics file; whatever goes wrong never stops a training."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    try:
        records = _log.read(metrics)
        panels = _panels(name for record in records for name in record)
        if not panels:
            return
        figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
        for axes, (title, names) in zip(
            np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True
        ):
            _panel(axes, title, names, records)
        partial = png.with_name(f".{png.name}")
        figure.savefig(partial, format="png", dpi=120)
        os.replace(partial, png)
    except Exception:
        logging.getLogger(__name__).warning("could not draw %s", png, exc_info=True)


def _panels(names: Iterable[str]) -> dict[str, list[str]]:
    """Loss and its terms together; any other metric with its evaluated counterpart."""
    panels: dict[str, list[str]] = {}
    for name in sorted(set(names) - set(_NOT_CURVES)):
        title = name.removeprefix("eval/").partition("/")[0]
        panels.setdefault(title, []).append(name)
    return dict(sorted(panels.items(), key=lambda item: (item[0] != "loss", item[0])))


def _panel(axes: Any, title: str, names: list[str], records: list[dict[str, Any]]) -> None:
    lowest = np.inf
    for name in names:
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if not points:
            continue
        steps = [step for step, _ in points]
        values = np.asarray(
            [np.mean([np.nan if v is None else v for v in np.ravel(value)]) for _, value in points]
        )
        lowest = min(lowest, np.nanmin(values))
        marker = "o" if name.startswith("eval/") else None
        axes.plot(steps, values, label=name, marker=marker, markersize=3, linewidth=1)
    if title == "loss" and 0 < lowest < np.inf:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
