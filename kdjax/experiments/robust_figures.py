"""The figures of a robustness experiment: curves, perturbed images, one model under attack."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.experiments._robust_evaluate import Found
from kdjax.experiments._robust_plan import METHODS
from kdjax.experiments._robust_report import Report, Row

# Colours that also differ in grey and for the colour-blind (Okabe and Ito).
_COLOURS = {"at": "#D55E00", "trades": "#E69F00", "adr": "#0072B2", "adr-trades": "#009E73"}
_RIGHT, _WRONG = "#222222", "#D55E00"
_BARS = {
    "clean": "clean",
    "random_noise": "random noise",
    "pgd_20": "PGD-20",
    "pgd_100": "PGD-100",
    "cw_100": "CW-100",
    "auto_attack": "AutoAttack",
    "worst_case": "worst case",
}


def curves(report: Report, png: Path) -> Path | None:
    """Draws clean and robust validation accuracy over the epochs.

    Args:
      report: the result.
      png: the file to write.

    Returns:
      The file, or None where matplotlib is not installed.
    """
    figure = _figure((10, 4.4))
    if figure is None:
        return None
    left, right = figure.subplots(1, 2)
    for axes, column, title in ((left, 1, "clean"), (right, 2, "under PGD-10")):
        lowest = min(_curve(axes, row, column) for row in report.rows)
        _accuracy_axis(axes, lowest)
        axes.set_xlabel("epoch")
        axes.set_title(title, fontsize=10.5)
    left.set_ylabel("accuracy on the validation split")
    count = len(report.seeds)
    band = "" if count == 1 else f", mean and range of {count} seeds"
    noise = report.settings["label_noise"]
    wrong = f", {100 * noise:g} % of the labels wrong" if noise else ""
    figure.suptitle(
        f"{report.dataset}: {report.images['train']:,} training images{wrong}{band}", fontsize=10.5
    )
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, ncols=4, loc="outside lower center")
    return _save(figure, png)


def perturbed(report: Report, examples: Path, png: Path) -> Path | None:
    """Draws test images, what PGD-20 adds to them, and what the networks then see.

    Args:
      report: the result.
      examples: the arrays that the experiment left.
      png: the file to write.

    Returns:
      The file, or None where matplotlib is not installed.
    """
    with np.load(examples) as file:
        found = dict(file)
    names = report.settings["method"]
    count = len(found["image"])
    figure = _figure((1.15 * count + 1.1, 1.42 * (1 + 2 * len(names)) + 0.5))
    if figure is None:
        return None
    grid = figure.subplots(1 + 2 * len(names), count, squeeze=False)
    _row(grid[0], found["image"], "clean", [f"{label}" for label in found["label"]])
    for i, name in enumerate(names):
        _pair(
            grid[1 + 2 * i : 3 + 2 * i],
            found["image"],
            found[f"{name}/x_adv"],
            found["label"],
            found[f"{name}/prediction"],
            found[f"{name}/prediction_adv"],
            METHODS[name] + (" + AWP" if report.settings["awp"] else ""),
        )
    eps, norm = report.settings["eps"], report.settings["norm"]
    figure.suptitle(
        f"{report.dataset}, PGD-20 with {norm} radius {eps:.3g}, student of the best epoch, seed "
        f"{report.seeds[0]}\nabove an image: its label; above a perturbed one: clean answer → "
        "answer under attack",
        fontsize=9.5,
    )
    return _save(figure, png)


def evaluation(found: Found, png: Path) -> Path | None:
    """Draws accuracy under each attack, stability, and some images.

    Args:
      found: the evaluation.
      png: the file to write.

    Returns:
      The file, or None where matplotlib is not installed.
    """
    count = len(found.examples["image"])
    figure = _figure((11.5, 8.2))
    if figure is None:
        return None
    above, below = figure.subfigures(2, 1, height_ratios=(1.05, 1.25))
    left, right = above.subplots(1, 2)
    noise = found.stability.get("random_noise", {})
    accuracy = {**found.accuracy, **({"random_noise": noise["accuracy"]} if noise else {})}
    _bars(left, {label: accuracy[name] for name, label in _BARS.items() if name in accuracy})
    left.set_title("accuracy", fontsize=10.5)
    kinds = {k.replace("_", " "): v for k, v in found.stability.items() if k != "random_noise"}
    _bars(right, {name: value["unchanged"] for name, value in kinds.items()}, "#009E73")
    right.set_title("answers that stay as on the clean image", fontsize=10.5)
    grid = below.subplots(3, count, squeeze=False)
    shown = found.examples
    _row(grid[0], shown["image"], "clean", [f"{label}" for label in shown["label"]])
    _pair(
        grid[1:],
        shown["image"],
        shown["x_adv"],
        shown["label"],
        shown["prediction"],
        shown["prediction_adv"],
        "PGD-20",
    )
    eps, norm = found.settings["eps"], found.settings["norm"]
    figure.suptitle(
        f"{found.model}\n{found.images:,} test images of {found.settings['data']}, {norm} radius "
        f"{eps:.3g}",
        fontsize=10.5,
    )
    return _save(figure, png)


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=size, layout="constrained")


def _save(figure: Any, png: Path) -> Path:
    partial = png.with_name(f".{png.name}")
    figure.savefig(partial, format="png", dpi=150)
    os.replace(partial, png)
    return png


def _curve(axes: Any, row: Row, column: int) -> float:
    """Draws one row; returns the lowest value that must be seen."""
    common = set.intersection(*({point[0] for point in curve} for curve in row.curves))
    epochs = sorted(common)
    values = np.asarray(
        [[point[column] for point in curve if point[0] in common] for curve in row.curves]
    )
    mean, average = values.mean(0), row.weights != "student"
    label = f"{METHODS[row.method]}, {'average' if average else 'student'}"
    colour = _COLOURS[row.method]
    axes.plot(epochs, mean, color=colour, ls="--" if average else "-", lw=1.5, label=label)
    if len(values) > 1 and not average:
        axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.12, lw=0)
    # The first evaluations may be near chance and would flatten the rest.
    return float(np.min(mean[len(epochs) // 5 :]))


def _accuracy_axis(axes: Any, lowest: float) -> None:
    bottom = max(0.0, math.floor(20 * lowest - 1) / 20)
    top = max(y for line in axes.get_lines() for y in line.get_ydata())
    axes.set_ylim(bottom, min(1.0, top + 0.15 * (top - bottom)) + 0.005)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def _bars(axes: Any, values: dict[str, float], colour: str = "#0072B2") -> None:
    places = np.arange(len(values))[::-1]
    axes.barh(places, [100 * value for value in values.values()], 0.7, color=colour)
    for place, value in zip(places, values.values(), strict=True):
        axes.text(100 * value + 1, place, f"{100 * value:.1f}", va="center", fontsize=8.5)
    axes.set_yticks(places, list(values), fontsize=9)
    axes.set_xlim(0, 109)
    axes.set_xlabel("%")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _pair(
    grid: Any,
    images: np.ndarray,
    x_adv: np.ndarray,
    labels: np.ndarray,
    clean: np.ndarray,
    attacked: np.ndarray,
    name: str,
) -> None:
    """Two rows: what is added, magnified, and the sum with the answers."""
    change = x_adv - images
    scale = 0.5 / max(float(np.abs(change).max()), 1e-12)
    times = f"{scale:.0f}" if scale >= 2 else f"{scale:.1f}"
    _row(grid[0], np.clip(0.5 + scale * change, 0, 1), f"{name}\nadds, × {times}")
    answers = [f"{a} → {b}" for a, b in zip(clean, attacked, strict=True)]
    colours = [_RIGHT if b == y else _WRONG for b, y in zip(attacked, labels, strict=True)]
    _row(grid[1], x_adv, f"{name}\nperturbed", answers, colours)


def _row(
    axes: Any,
    images: np.ndarray,
    name: str,
    titles: Sequence[str] = (),
    colours: Sequence[str] = (),
) -> None:
    for i, (panel, image) in enumerate(zip(axes, images, strict=True)):
        grey = image.shape[-1] == 1
        shown = image[..., 0] if grey else image[..., :3]
        panel.imshow(shown, cmap="gray" if grey else None, vmin=0, vmax=1)
        panel.set_xticks([])
        panel.set_yticks([])
        if titles:
            colour = colours[i] if colours else _RIGHT
            bold = "bold" if colour == _WRONG else "normal"
            panel.set_title(titles[i], fontsize=9, color=colour, pad=2, weight=bold)
    axes[0].set_ylabel(name, fontsize=8.5)
