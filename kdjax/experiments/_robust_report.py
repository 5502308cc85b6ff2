"""The result of a comparison of adversarial trainings as plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdjax.experiments import measures
from kdjax.experiments.measures import Estimate

# (epoch, clean accuracy, robust accuracy) on the validation split.
Curve = list[tuple[float, float, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One method and one set of its weights, over the seeds.

    Attributes:
      method: "at", "trades", "adr" or "adr-trades".
      weights: "student", or "ema", the average of its weights.
      best: figures on the test split at the epoch that was chosen on the validation split: name ->
        estimate, None where a figure does not exist. ``clean``; ``pgd_20``, right on the image and
        under PGD-20; ``auto_attack``, that times the share that AutoAttack leaves of what PGD-20
        leaves of the images that it saw (all of them, or some); ``auto_attack_seen`` and
        ``pgd_20_seen``, the accuracies on those alone; ``ece``, ``nll``, ``temperature``,
        ``ece_scaled`` on the images, and with ``pgd_20_`` before it under PGD-20.
      last: the same at the last epoch.
      best_epoch: the epoch chosen.
      overfitting: PGD-10 accuracy on the validation split, best minus last epoch.
      curves: for each seed.
      folders: run folders, one for each seed.
      seconds: to train one.
    """

    method: str
    weights: str
    best: Mapping[str, Estimate | None]
    last: Mapping[str, Estimate | None]
    best_epoch: Estimate
    overfitting: Estimate
    curves: list[Curve]
    folders: list[str]
    seconds: Estimate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Adversarial trainings of one network with one budget.

    Attributes:
      dataset: name of the data.
      images: how many were trained on, held out and tested on, by split.
      seeds: the seeds.
      rows: one for each method and set of weights.
      notes: warnings of AutoAttack.
      device: what it ran on.
      seconds: wall time of all of it, over all interruptions.
      settings: the arguments.
      folder: of the experiment, or None.
    """

    dataset: str
    images: Mapping[str, int]
    seeds: list[int]
    rows: list[Row]
    notes: list[str]
    device: str
    seconds: float
    settings: Mapping[str, Any]
    folder: str | None

    def row(self, method: str, weights: str = "student") -> Row:
        """One of the rows."""
        return next(row for row in self.rows if (row.method, row.weights) == (method, weights))


def over_seeds(scores: Sequence[Mapping[str, float | None]]) -> dict[str, Estimate | None]:
    """Estimates of every figure; None where a seed has none."""
    return {name: _known(score.get(name) for score in scores) for name in scores[0]}


def to_json(report: Report) -> dict[str, Any]:
    """The report as an object that JSON can hold; NaN, for which it has no word, is None."""
    found: dict[str, Any] = _without_nan(dataclasses.asdict(report))
    return found


def from_json(found: Mapping[str, Any]) -> Report:
    """The report that `to_json` was given."""
    return Report(**{**found, "rows": [_row(row) for row in found["rows"]]})


def _row(found: Mapping[str, Any]) -> Row:
    figures = {
        when: {name: _estimate(value) for name, value in found[when].items()}
        for when in ("best", "last")
    }
    known = {name: _estimate(found[name]) for name in ("best_epoch", "overfitting", "seconds")}
    curves = [[tuple(point) for point in curve] for curve in found["curves"]]
    return Row(**{**found, **figures, **known, "curves": curves})


def _estimate(found: Any) -> Estimate | None:
    if found is None:
        return None
    mean, error, values = found
    return Estimate(mean, math.nan if error is None else error, tuple(values))


def _known(values: Iterable[float | None]) -> Estimate | None:
    found = list(values)
    if any(value is None for value in found):
        return None
    return measures.estimate(value for value in found if value is not None)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
