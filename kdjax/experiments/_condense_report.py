"""The result of a comparison of condensed sets as plain data, and how its pairs are loaded."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import kdjax
from kdjax.experiments import _condense_task as tasks
from kdjax.experiments import measures
from kdjax.experiments.measures import Estimate

REPORT, PAIRS, START, MANIFEST = "condense.json", "pairs.npz", "start.npz", "manifest.json"
LEARNED, EVERYTHING, NOTHING = "KRR-ST", "all source", "none"
SUBSETS = ("noise", "random", "herding", "k-means")
SETS = (NOTHING, *SUBSETS, LEARNED, EVERYTHING)
FIGURES = ("r2_source", "r2_target", "shot_1", "shot_5", "fine_tune")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One set that a network was pre-trained on, over the seeds.

    Attributes:
      name: one of "KRR-ST", "k-means", "random", "herding", "noise", "all source", "none".
      pairs: how many.
      bytes: of images and targets in float32.
      updates: of pre-training.
      seconds: of pre-training, compilation apart.
      figures: ``r2_source`` and ``r2_target``, shares of the variance of the target network's
        features that are explained on held-out images of the source and of the target classes
        (absent for a network without pre-training); ``shot_1``, ``shot_5`` and ``fine_tune``,
        accuracies on the target classes.
    """

    name: str
    pairs: int
    bytes: int
    updates: int
    seconds: Estimate
    figures: Mapping[str, Estimate]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Learned pairs beside what they are compared with.

    Attributes:
      dataset: name of the data.
      images: how many there are of each kind: source, source_test, target_train, target_test.
      target: the target network in words.
      features: width of its features.
      seeds: the seeds.
      rows: one for each set.
      losses: for each seed ``[(update, R2 of the regression on the real batch), ...]``.
      curve: ``[(update, R2 on held-out source images after pre-training), ...]``, first seed.
      condensing: seconds to learn the pairs of one seed.
      device: what it ran on.
      seconds: wall time of all of it, over all interruptions.
      settings: the arguments, with what was left out filled in.
      folder: where the pairs are.
    """

    dataset: str
    images: Mapping[str, int]
    target: str
    features: int
    seeds: list[int]
    rows: list[Row]
    losses: list[list[tuple[int, float]]]
    curve: list[tuple[int, float]]
    condensing: Estimate
    device: str
    seconds: float
    settings: Mapping[str, Any]
    folder: str

    def row(self, name: str) -> Row:
        """One of the rows."""
        return next(row for row in self.rows if row.name == name)


def over_seeds(name: str, scores: Sequence[Mapping[str, Any]]) -> Row:
    """One row from the figures of every seed."""
    first = scores[0]
    return Row(
        name=name,
        pairs=first["pairs"],
        bytes=first["bytes"],
        updates=first["updates"],
        seconds=measures.estimate(score["seconds"] for score in scores),
        figures={
            figure: measures.estimate(score["figures"][figure] for score in scores)
            for figure in FIGURES
            if figure in first["figures"]
        },
    )


def snippet(report: Report, folder: Path | None = None) -> str:
    """A few lines of Python that load the pairs, pre-train on them and use the network.

    Args:
      report: the result.
      folder: where they say the pairs are; by default the report's own.
    """
    widths = tuple(report.settings["widths"])
    file = (Path(report.folder) if folder is None else folder) / PAIRS
    return f"""\
import jax, numpy as np, kdjax as kd
from kdjax.experiments import condense
pairs = dict(np.load({str(file)!r}))  # image, target; mean and std of the pixels
net = kd.from_linen(kd.models.PooledConvNet({report.features}, widths={widths}))
variables = condense.pretrain(net, pairs, epochs={report.settings["pretrain_epochs"]}, \
key=jax.random.key(0))
features = condense.outputs(net, variables, pairs["image"])  # yours: (images - mean) / std
"""


def manifest(report: Report, task: tasks.Task) -> dict[str, Any]:
    """What pairs.npz holds and where it comes from, as an object that JSON can hold."""
    learned = report.row(LEARNED)
    shape = [learned.pairs, *task.source.image.shape[1:]]
    packages = {found.__name__: found.__version__ for found in (kdjax, jax, optax, np)}
    return {
        "what": f"{learned.pairs} pairs of image and target learned by KRR-ST from "
        f"{report.images['source']} images of {report.dataset}",
        "arrays": {
            "image": {"shape": shape, "dtype": "float32", "is": "(pixels - mean) / std"},
            "target": {
                "shape": [learned.pairs, report.features],
                "dtype": "float32",
                "is": f"learned features of {report.target}",
            },
            "mean": task.mean.tolist(),
            "std": task.std.tolist(),
        },
        "load": snippet(report, Path()).splitlines(),
        "figures": {name: value.values[0] for name, value in learned.figures.items()},
        "seed": report.seeds[0],
        "others": [f"seed-{seed}/{PAIRS}" for seed in report.seeds],
        "settings": dict(report.settings),
        "versions": {"python": platform.python_version(), **packages},
        "device": report.device,
    }


def to_json(report: Report) -> dict[str, Any]:
    """The report as an object that JSON can hold; NaN, for which it has no word, is None."""
    found: dict[str, Any] = _without_nan(dataclasses.asdict(report))
    return found


def from_json(found: Mapping[str, Any], folder: Path) -> Report:
    """The report that `to_json` was given, wherever its folder is now."""
    rows = [
        Row(
            **{
                **row,
                "seconds": _estimate(row["seconds"]),
                "figures": {name: _estimate(value) for name, value in row["figures"].items()},
            }
        )
        for row in found["rows"]
    ]
    pairs = {
        "losses": [[tuple(point) for point in curve] for curve in found["losses"]],
        "curve": [tuple(point) for point in found["curve"]],
        "condensing": _estimate(found["condensing"]),
    }
    return Report(**{**found, **pairs, "rows": rows, "folder": str(folder)})


def _estimate(found: Any) -> Estimate:
    mean, error, values = found
    return Estimate(mean, math.nan if error is None else error, tuple(values))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
