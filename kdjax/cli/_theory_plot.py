"""The figures of ``kdjax theory``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from kdjax.cli._options import TheoryRisk
from kdjax.cli._theory import RISKS, Column, Curve
from kdjax.theory import Plan

# Colours that also differ for the colour-blind (Okabe and Ito).
_COLOURS = {"standard": "#0072B2", "optimal": "#009E73", "mask": "#E69F00"}
_NAMES = {"standard": "true labels", "optimal": "optimal surrogate", "mask": "optimal 0-1 mask"}
_WAYS = {
    "direct": "m true labels",
    "together": "n + m true labels",
    "two_stage": "surrogate of m labels",
    "mixed": "mixed with true labels",
    "mask": "bound: mask",
    "optimal": "bound: optimal",
}


def risk(
    weights: Mapping[str, Any],
    lines: Mapping[int, Mapping[str, float]],
    columns: Sequence[Column],
    options: TheoryRisk,
    file: Path,
) -> None:
    """Weights of the surrogates at the first n, and risks against n.

    Args:
      weights: the truth and the surrogates at the first n, by name.
      lines: risks on a grid, n -> name -> excess risk.
      columns: the table.
      options: what was asked for.
      file: to be written.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = columns[0]
    index = np.arange(1, options.p + 1)
    for name, width in (("mask", 4.0), ("standard", 1.8), ("optimal", 1.8)):
        label = "truth" if name == "standard" else _NAMES[name]
        left.plot(index, weights[name], color=_COLOURS[name], lw=width, label=label,
                  alpha=0.75 if name == "mask" else 1)  # fmt: skip
    left.set_ylim(0, 1.12 * float(max(np.max(w) for w in weights.values())))
    left.set_xlabel("index i, from the largest eigenvalue")
    left.set_ylabel("weight")
    left.set_title(f"what labels the samples, n = {first.n:,}", fontsize=10.5)
    left.legend(frameon=False, fontsize=9)
    sizes = list(lines)
    for name in RISKS:
        values = np.array([lines[n][name] for n in sizes])
        drawn = np.where(np.isfinite(values) & (values > 0), values, np.nan)
        right.plot(sizes, drawn, color=_COLOURS[name], label=_NAMES[name])
        if first.simulated:
            means, errors = zip(*(column.simulated[name] for column in columns), strict=True)
            right.errorbar(
                [column.n for column in columns], means, errors, color=_COLOURS[name],
                linestyle="none", marker="o", markersize=4.5, markerfacecolor="white", capsize=2.5,
            )  # fmt: skip
    for column in columns:
        right.axvline(column.n, color="#777777", linestyle=":", lw=0.8)
    if first.simulated:
        right.plot([], [], "o", color="#555555", mfc="white", ms=4.5,
                   label=f"simulated, {options.trials} trials")  # fmt: skip
    for column in columns if options.m is not None else ():
        assert column.chain is not None
        noisy = " noisy" if options.noise_s else ""
        label = f"surrogate of m = {column.chain.m:,}{noisy} labels, best size"
        right.plot(column.n, column.chain.best_student, "D", color="#CC79A7", ms=6,
                   label=label if column is first else None)  # fmt: skip
    right.set_yscale("log")
    right.set_xlabel("n, samples of the student")
    right.set_ylabel("excess risk of the student")
    right.set_title(
        f"p = {options.p:,}, alpha = {options.alpha:g}, b = {options.b:g}, "
        f"noise {options.noise:g}, ridge {options.ridge:g}",
        fontsize=10.5,
    )
    # Below: inside it would lie on the peak where n = p, or on the points.
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, ncols=3, loc="outside lower right")
    _finish(figure, (left, right), file)


def plan(name: str, found: Plan, curves: Sequence[Curve], repeats: int, file: Path) -> None:
    """Predicted and measured error against n, and the predicted gain of each way.

    Args:
      name: of the data.
      found: the predictions.
      curves: theory against fits.
      repeats: fits for each point.
      file: to be written.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for curve, colour, marker in zip(curves, ("#0072B2", "#009E73"), ("o", "s"), strict=False):
        left.plot(*zip(*curve.line, strict=True), color=colour, lw=1.5)
        left.errorbar(
            curve.n, curve.measured, curve.error, color=colour, linestyle="none", marker=marker,
            markersize=5, markerfacecolor="white", capsize=2.5,
            label=f"ridge {curve.ridge:.3g}: line predicted, points measured",
        )  # fmt: skip
    left.axvline(found.n, color="#777777", linestyle=":", lw=1.2, label=f"n = {found.n:,} asked")
    left.set_xscale("log")
    left.set_yscale("log")
    # Just below as many rows as features the line may be far above what is of interest.
    seen = [value for curve in curves for value in (*curve.measured, *curve.predicted)]
    left.set_ylim(0.8 * min(seen), 1.6 * max(v for v in seen if np.isfinite(v)))
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.yaxis.set_minor_formatter(
        lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else ""
    )
    left.set_xticks(curves[0].n, [f"{n:,}" for n in curves[0].n], fontsize=8.5)
    left.xaxis.set_minor_locator(NullLocator())
    left.set_xlabel(f"n, random rows (points: mean of {repeats} fits ± standard error)")
    left.set_ylabel("held-out squared error")
    left.set_title(f"{name}: is the theory right here?", fontsize=10.5)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, ncols=2, loc="outside lower left")
    kinds = [("best ridge", found.tuned, "#009E73")]
    kinds.append((f"ridge {found.given.standard.ridge:g}", found.given, "#0072B2"))
    places, cut = np.arange(len(_WAYS))[::-1], False
    for i, (label, answers, colour) in enumerate(kinds):
        gains = np.array([100 * getattr(answers, way).gain for way in _WAYS])
        cut |= bool((gains < -100).any())
        right.barh(places + (0.5 - i) * 0.36, np.maximum(np.nan_to_num(gains), -100), 0.34,
                   color=colour, label=label)  # fmt: skip
    right.axvline(0, color="black", lw=0.8)
    right.set_yticks(places, list(_WAYS.values()))
    right.set_xlabel(
        "predicted gain over n true labels, % of excess risk" + (" (cut at -100)" if cut else "")
    )
    right.set_title(f"n = {found.n:,}, m = {found.m:,}", fontsize=10.5)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, ncols=2, loc="outside lower right")
    _finish(figure, (left, right), file)


def _finish(figure: Figure, panels: Sequence[Any], file: Path) -> None:
    for axes in panels:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(file, dpi=150)
