"""The figure of an experiment: validation accuracy of all three models over the updates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.experiments.report import Report, Row

# Colours that also differ in grey and for the colour-blind (Okabe and Ito).
_LOOKS = {
    "teacher": ("teacher", "#555555", "--", "^"),
    "alone": ("student alone", "#D55E00", "-", "s"),
    "distilled": ("student distilled", "#0072B2", "-", "o"),
}


def draw(report: Report, png: Path) -> Path | None:
    """Draws the curves: means over the seeds, bands from the lowest to the highest seed.

    Args:
      report: the result.
      png: the file to write.

    Returns:
      The file, or None where matplotlib is not installed or there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = [row for row in report.models() if any(row.curves)]
    if not rows:
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lowest = min(_curve(axes, row) for row in rows)
    end = max(step for row in rows for curve in row.curves for step, _ in curve)
    if report.teacher is not None and not any(report.teacher.curves):
        label, colour, style, _ = _LOOKS["teacher"]
        mean = report.teacher.accuracy.mean
        axes.axhline(mean, color=colour, linestyle=style, label=f"{label}, on the test split")
        lowest = min(lowest, mean)
    elif report.teacher is not None:
        _, colour, _, _ = _LOOKS["teacher"]
        step, last = report.teacher.curves[0][-1]
        axes.hlines(last, step, end, color=colour, linestyle=":", linewidth=1)
    bottom = max(0.0, lowest - 0.02)
    axes.set_ylim(bottom, 1.0 + 0.02 * (1 - bottom))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.set_xlabel("updates")
    axes.set_ylabel("accuracy on the validation split")
    count = len(report.seeds)
    band = "" if count == 1 else f" (mean and range of {count} seeds)"
    labels = report.distilled.labels
    axes.set_title(f"{report.dataset}, {labels:,} of {report.rows:,} labels{band}", fontsize=10.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    partial = png.with_name(f".{png.name}")
    figure.savefig(partial, format="png", dpi=150)
    os.replace(partial, png)
    return png


def _curve(axes: Any, row: Row) -> float:
    """Draws one model; returns the lowest value that must be seen."""
    label, colour, style, marker = _LOOKS[row.name]
    common = set.intersection(*({step for step, _ in curve} for curve in row.curves))
    steps = sorted(common)
    values = np.asarray([[dict(curve)[step] for step in steps] for curve in row.curves])
    mean = values.mean(0)
    axes.plot(steps, mean, color=colour, linestyle=style, marker=marker, markersize=4, label=label)
    if len(values) > 1:
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
    # The first evaluations may be near chance and would flatten the rest.
    return float(np.min(values[:, len(steps) // 4 :]))
