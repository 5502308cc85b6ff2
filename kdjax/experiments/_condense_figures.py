"""The figures of condensed pairs: what they look like, and how they got better."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdjax import _checks
from kdjax.experiments._condense_report import EVERYTHING, LEARNED, PAIRS, START, Report
from kdjax.experiments._condense_task import STARTS

_SHOWN = 100
_BEYOND = 0.05
_DPI = 150
# Colours that also differ in grey and for the colour-blind (Okabe and Ito).
_BLUE, _SKY, _ORANGE, _GREEN, _GREY = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#666666"


def pictures(report: Report, png: Path) -> Path | None:
    """Draws the start images and what became of them, in the same places and shades.

    Args:
      report: the result of `kdjax.experiments.condense.compare`.
      png: the file to write.

    Returns:
      The file, or None where matplotlib is not installed.
    """
    folder = Path(report.folder)
    with np.load(folder / PAIRS) as file:
        scale = file["std"], file["mean"]
        learned = file["image"] * scale[0] + scale[1]
    with np.load(folder / f"seed-{report.seeds[0]}" / START) as file:
        start = file["image"] * scale[0] + scale[1]
    name = STARTS[report.settings["start"]]
    beyond = float(np.mean((learned < -_BEYOND) | (learned > 1 + _BEYOND)))
    note = ""
    if beyond > 0.005:
        note = (
            f"; {100 * beyond:.0f} % of the learned pixels are beyond black or white and cut here"
        )
    r2 = {set_: report.row(set_).figures["r2_source"].values[0] for set_ in (name, LEARNED)}
    seed = f", seed {report.seeds[0]}" if len(report.seeds) > 1 else ""
    return image_grids(
        {
            f"start: real images ({name})\npre-training on them: R2 {r2[name]:.3f}": start,
            f"learned by KRR-ST\npre-training on them: R2 {r2[LEARNED]:.3f}": learned,
        },
        png,
        title=f"{report.dataset}: {len(start)} pairs for {report.images['source']:,} images{seed}"
        + note,
    )


def image_grids(images: Mapping[str, Any], png: Path, *, title: str = "") -> Path | None:
    """Draws sets of images as grids side by side, every pixel a square of equal size.

    Args:
      images: title of a grid to images [N, H, W, C] in [0, 1] (what is beyond is cut), all of one
        shape. Of more than 100, 100 are shown, evenly spaced.
      png: the file to write.
      title: above all of them.

    Returns:
      The file, or None where matplotlib is not installed.

    Raises:
      ValueError: no images, or of several shapes.
    """
    if not images:
        raise ValueError("images must hold at least one set, got none.")
    first = next(iter(images.values()))
    for name, found in images.items():
        _checks.shape(f"images[{name!r}]", found, first.shape, "as all of them")
    count, height, width, _ = first.shape
    rows = np.linspace(0, count - 1, min(count, _SHOWN)).round().astype(int)
    columns = math.ceil(math.sqrt(len(rows) * height / width))
    grids = {name: _grid(np.asarray(found)[rows], columns) for name, found in images.items()}
    tall, wide = next(iter(grids.values())).shape[:2]
    side = 4.6  # inches of the longer side
    scale = side * _DPI / max(tall, wide)
    scale = max(1, math.floor(scale)) if scale >= 1 else scale  # whole dots for every pixel
    inches = wide * scale / _DPI, tall * scale / _DPI
    figure = _figure((len(grids) * (inches[0] + 0.3) + 0.3, inches[1] + 1.0))
    if figure is None:
        return None
    size = figure.get_size_inches()
    for i, (name, grid) in enumerate(grids.items()):
        left = 0.3 + i * (inches[0] + 0.3)
        place = left / size[0], 0.2 / size[1], inches[0] / size[0], inches[1] / size[1]
        axes = figure.add_axes(place)
        grey = grid.shape[-1] == 1
        axes.imshow(
            grid[..., 0] if grey else grid[..., :3],
            cmap="gray" if grey else None, vmin=0, vmax=1, interpolation="nearest", aspect="auto",
        )  # fmt: skip
        axes.set_axis_off()
        axes.set_title(name, fontsize=9.5, pad=5)
    few = f" ({len(rows)} shown)" if len(rows) < count else ""
    figure.text(0.5, 1 - 0.16 / size[1], title + few, ha="center", va="top", fontsize=10)
    return _save(figure, png)


def curves(report: Report, png: Path) -> Path | None:
    """Draws R2 over the updates of the pairs, beside what the other sets give.

    Args:
      report: the result of `kdjax.experiments.condense.compare`.
      png: the file to write.

    Returns:
      The file, or None where matplotlib is not installed.
    """
    figure = _figure((8.6, 4.6))
    if figure is None:
        return None
    axes = figure.add_axes((0.085, 0.12, 0.63, 0.76))
    for i, points in enumerate(report.losses):
        steps, values = (np.asarray(x) for x in zip(*points, strict=True))
        label = "the pool's ridge regression\non the batch (training)" if i == 0 else None
        axes.plot(steps, _smooth(values), color=_SKY, lw=1, alpha=0.9, label=label)
    steps, values = (np.asarray(x) for x in zip(*report.curve, strict=True))
    label = "a network pre-trained\non the pairs so far"
    axes.plot(steps, values, color=_BLUE, lw=1.8, marker="o", ms=5, label=label)
    start = STARTS[report.settings["start"]]
    last = report.settings["steps"]
    colours = {"random": _GREY, start: _ORANGE, EVERYTHING: _GREEN}
    seen = [float(value) for value in values]
    for name, colour in colours.items():
        row = report.row(name)
        value = row.figures["r2_source"].values[0]
        seen.append(value)
        axes.axhline(value, color=colour, ls="--", lw=1.2, label=f"{name}, {row.pairs:,} pairs")
    seen += [float(x) for x in _smooth(np.asarray([v for _, v in report.losses[0]]))[1:]]
    low, high = min(seen), min(1.0, max(seen))
    axes.set_ylim(low - 0.06 * (high - low) - 1e-3, high + 0.06 * (high - low) + 1e-3)
    axes.set_xlim(-0.01 * last, 1.01 * last)
    axes.set_xlabel("updates of the pairs")
    axes.set_ylabel("R2 of the target network's features")
    held = "held-out source images, but for the thin line"
    axes.set_title(f"{report.dataset}: condensing {report.settings['pairs']} pairs\n({held})",
                   fontsize=10)  # fmt: skip
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _save(figure, png)


def _grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Images as one, row by row, with grey lines of one pixel between them and around."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    grid = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 0.45)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        grid[top : top + height, left : left + width] = np.clip(image, 0, 1)
    return grid


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over a twentieth of the points: each is of another network of the pool."""
    size = max(1, len(values) // 20)
    padded = np.pad(values, (size // 2, size - 1 - size // 2), mode="edge")
    return np.convolve(padded, np.ones(size) / size, mode="valid")


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=size)


def _save(figure: Any, png: Path) -> Path:
    partial = png.with_name(f".{png.name}")
    figure.savefig(partial, format="png", dpi=_DPI)
    os.replace(partial, png)
    return png
