"""Tables for people at a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kdjax.experiments.measures import STRENGTHS, Cost, Estimate, Score, estimate
from kdjax.experiments.report import Report, Row

_TITLES = {"teacher": "teacher", "alone": "student alone", "distilled": "student distilled"}
_CORRUPTED = {"blur": "  blurred", "noise": "  noisy", "contrast": "  low contrast"}


def report(found: Report, figure: Path | None, out: Path) -> None:
    """Prints the table of an experiment and where its files are.

    Args:
      found: the report.
      figure: the curves, if they were drawn.
      out: the folder.
    """
    rows = found.models()
    table = _table(_heading(found), [_TITLES[row.name] for row in rows])

    def line(name: str, text: Callable[[Row], str], style: str = "") -> None:
        table.add_row(name, *(text(row) for row in rows), style=style)

    line("network", lambda row: row.model)
    line("labelled examples", lambda row: f"{row.labels:,}")
    line("test accuracy", lambda row: percent(row.accuracy), "bold")
    gained = f"{points(found.gain)} points"
    line("gain by distilling", lambda row: gained if row.name == "distilled" else "", "bold")
    for name in found.alone.corrupted:
        table.add_row(_CORRUPTED[name], *(percent(row.corrupted[name]) for row in rows))
    line("answers as the teacher", lambda row: percent(row.agreement))
    line("calibration error", lambda row: percent(row.ece))
    table.add_section()
    line("parameters", lambda row: f"{row.parameters:,}")
    line("compression", lambda row: "" if row.compression is None else f"{row.compression:.1f} x")
    line("latency of one image", lambda row: f"{row.latency_ms:.3f} ms")
    line("peak memory of that", lambda row: size(row.memory_bytes))
    line("time to train one", lambda row: seconds(row.seconds))
    console = Console()
    console.print(table)
    _footnotes(console, found)
    if figure is not None:
        console.print(f"curves      {figure}", soft_wrap=True, highlight=False)
    if found.distilled.folders:
        checkpoint = out / Path(found.distilled.folders[0]).relative_to(str(found.folder))
        console.print(f"checkpoint  {checkpoint}", soft_wrap=True, highlight=False)


def _heading(found: Report) -> str:
    count = len(found.seeds)
    seeds = "1 seed" if count == 1 else f"{count} seeds"
    return f"{found.dataset}: {found.rows:,} training examples, {seeds}, {found.device}"


def _footnotes(console: Console, found: Report) -> None:
    error = "± is the standard error over seeds, that of the gain paired by seed. "
    console.print(
        (error if len(found.seeds) > 1 else "")
        + f"{STRENGTHS}. Time to train includes compilation, evaluations and checkpoints. "
        f"All of it took {found.seconds:.0f} s.",
        style="dim",
        highlight=False,
    )
    if found.alone.labels == found.rows and not found.gain.mean > 2 * found.gain.error:
        console.print(
            "Every example was labelled. Where labels are few, a teacher can add more: "
            "--labels-per-class 10",
            highlight=False,
        )


def scores(title: str, found: Sequence[Score], cost: Cost, more: Mapping[str, Estimate]) -> None:
    """Prints the table of one model.

    Args:
      title: what it is.
      found: one score for each seed.
      cost: what it costs to run.
      more: other estimates, by name.
    """
    table = _table(title, [""])
    table.add_row("accuracy", percent(estimate(s.accuracy for s in found)), style="bold")
    for name in found[0].corrupted:
        table.add_row(_CORRUPTED[name], percent(estimate(s.corrupted[name] for s in found)))
    table.add_row("calibration error", percent(estimate(s.ece for s in found)))
    for name, value in more.items():
        table.add_row(name, f"{value.mean:.4f}{_error(value, 1, 4)}")
    table.add_section()
    table.add_row("parameters", f"{cost.parameters:,}")
    table.add_row("latency of one image", f"{cost.latency_ms:.3f} ms")
    table.add_row("peak memory of that", size(cost.memory_bytes))
    console = Console()
    console.print(table)
    if found[0].corrupted:
        console.print(f"{STRENGTHS}.", style="dim", highlight=False)


def percent(value: Estimate | None) -> str:
    """``97.25 ± 0.11 %``."""
    return "" if value is None else f"{100 * value.mean:.2f}{_error(value, 100, 2)} %"


def points(value: Estimate) -> str:
    """``+0.40 ± 0.12``."""
    return f"{100 * value.mean:+.2f}{_error(value, 100, 2)}"


def seconds(value: Estimate) -> str:
    """``3.2 s``."""
    return f"{value.mean:.1f} s"


def size(count: int | None) -> str:
    """Bytes in kB or MB."""
    if count is None:
        return ""
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.2f} MB"


def _error(value: Estimate, scale: float, digits: int) -> str:
    return "" if math.isnan(value.error) else f" ± {scale * value.error:.{digits}f}"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table
