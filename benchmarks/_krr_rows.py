"""Rows of a table of pre-training, kept after each, and what their figures say together."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from krr_st_digits import save
from tqdm.auto import tqdm

Row = tuple[str, int, int]  # kind, m, seed
Figures = Mapping[str, float]


def opened(file: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the file holds; one of other settings is refused, a new one is written."""
    settings = json.loads(json.dumps(settings))
    if not file.is_file():
        save(file, {"settings": settings, "rows": {}})
    stored: dict[str, Any] = json.loads(file.read_text())
    before = stored["settings"]
    other = [k for k in {**before, **settings} if before.get(k) != settings.get(k)]
    if other:
        raise SystemExit(
            f"{file} holds results with {other[0]} = {before.get(other[0])!r}, wanted is "
            f"{settings.get(other[0])!r}: pass another --out"
        )
    return stored


def run(
    plan: Sequence[Row],
    one: Callable[[Row, Callable[..., None]], Figures],
    file: Path,
    settings: Mapping[str, Any],
    watched: str = "r2_source",
) -> dict[Row, Figures]:
    """Figures of every row; those in the file are only read.

    Args:
      plan: the rows.
      one: a row, and a function for ``(step, record)`` to show, to figures.
      file: JSON with the settings and all rows so far.
      settings: see `opened`.
      watched: the figure to print where there is no bar.
    """
    stored = opened(file, settings)
    found = {}
    with tqdm(total=len(plan), unit="row", disable=None) as bar:
        for row in plan:
            name = f"{row[0]}, m {row[1]}, seed {row[2]}"
            bar.set_description(name)
            bar.set_postfix_str("")

            def show(step: int, record: Mapping[str, Any]) -> None:
                if record.get("loss") is not None:
                    bar.set_postfix_str(f"update {step}, loss {float(record['loss']):.4f}")

            if name not in stored["rows"]:
                stored["rows"][name] = dict(one(row, show))
                save(file, stored)
                if bar.disable:
                    value = stored["rows"][name].get(watched, np.nan)
                    print(f"{name}: {watched} {value:.3f}", file=sys.stderr, flush=True)
            found[row] = stored["rows"][name]
            bar.update()
    return found


def cell(values: Sequence[float], digits: int) -> str:
    """Mean and, of several, population standard deviation."""
    if not values:
        return "-"
    spread = f" ± {np.std(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):,.{digits}f}{spread}"


def table(
    found: Mapping[Row, Figures], columns: Mapping[str, tuple[str, int]], title: str = "pairs"
) -> list[str]:
    """A Markdown table over seeds; columns: figure to its title and digits."""
    lines = [["m", title, *(title for title, _ in columns.values())]]
    lines.append(["---"] * len(lines[0]))
    for kind, m in dict.fromkeys(row[:2] for row in found):
        rows = [figures for row, figures in found.items() if row[:2] == (kind, m)]
        cells = [
            cell([figures[name] for figures in rows if name in figures], digits)
            for name, (_, digits) in columns.items()
        ]
        lines.append([str(m or "-"), kind, *cells])
    return ["| " + " | ".join(line) + " |" for line in lines]
