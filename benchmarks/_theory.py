"""What the theory benchmarks share: the options, the tables, the looks of figures, what is kept."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _compare import machine

OUT = Path("runs/theory")
# Colours that also differ for the colour-blind (Okabe and Ito).
STANDARD, OPTIMAL, MASK, OTHER = "#0072B2", "#009E73", "#E69F00", "#CC79A7"
RISKS = ("standard", "optimal", "mask")
COLOURS = dict(zip(RISKS, (STANDARD, OPTIMAL, MASK), strict=True))
NAMES = {
    "standard": "standard (true labels)",
    "optimal": "optimal surrogate",
    "mask": "optimal 0-1 mask",
}


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of all of them."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--out", type=Path, default=OUT, help=f"folder for figure and numbers (default: {OUT})"
    )
    found.add_argument("--quick", action="store_true", help="tiny, only to see that it runs")
    return found


def command(script: str, arguments: Sequence[str]) -> str:
    """The line that was typed."""
    return shlex.join(["python", f"benchmarks/{script}.py", *arguments])


def rows(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict(missed: Sequence[str], claim: str, *, judged: bool = True) -> str:
    """One line on whether what is claimed holds."""
    if not judged:
        return "Not judged: --quick is only to see that it runs."
    return f"MET: {claim}." if not missed else f"NOT MET: {'; '.join(missed)}."


def keep(
    out: Path, name: str, numbers: Mapping[str, Any], draw: Callable[[Any], None] | None = None
) -> None:
    """Writes NAME.json, and NAME.png where matplotlib is installed, and says where.

    Args:
      out: the folder, made if need be.
      name: of both files.
      numbers: what is kept; the machine is added.
      draw: draws into an empty matplotlib figure.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{name}.json"
    file.write_text(json.dumps({"machine": machine(), **numbers}, indent=2) + "\n")
    written = [str(file)]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        draw = None
    if draw is not None:
        figure = Figure(layout="constrained")
        draw(figure)
        figure.savefig(out / f"{name}.png", dpi=150)
        written.append(str(out / f"{name}.png"))
    print(f"kept: {', '.join(written)}", flush=True)


def tidy(axes: Any, *, grid: str = "both") -> None:
    """No box around the data, and a faint grid."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid, alpha=0.25)
