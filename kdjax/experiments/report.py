"""The result of an experiment as plain data: what tables and files are made from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from kdjax.experiments.measures import Estimate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of model: the teacher, the student alone, the student distilled.

    Attributes:
      name: "teacher", "alone" or "distilled".
      model: name of the network.
      accuracy: on the test split.
      ece: expected calibration error there.
      agreement: share of test examples answered as the teacher does; None without a teacher to ask.
      corrupted: accuracy under small blur, noise and loss of contrast.
      parameters: trained numbers.
      compression: parameters of the teacher per parameter of this model; None if unknown.
      latency_ms: median time of a compiled forward pass of one example.
      memory_bytes: arguments, outputs and temporaries of that program; None if unknown.
      seconds: to train one model, compilation, evaluation and checkpoints included; NaN if it was
        trained elsewhere.
      labels: labelled training examples it saw.
      curves: for each seed, steps and accuracies on the validation split.
      folders: run folders, one for each seed; empty if nothing was kept.
    """

    name: str
    model: str
    accuracy: Estimate
    ece: Estimate
    agreement: Estimate | None
    corrupted: Mapping[str, Estimate]
    parameters: int
    compression: float | None
    latency_ms: float
    memory_bytes: int | None
    seconds: Estimate
    labels: int
    curves: list[list[tuple[int, float]]]
    folders: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A student alone against the same student distilled.

    Attributes:
      dataset: name of the data.
      rows: training examples, labelled or not.
      seeds: the seeds of the students.
      teacher: None where its outputs came from a store.
      alone: the control, with the same budget.
      distilled: the student that imitates the teacher.
      gain: distilled minus alone, paired by seed.
      device: what it ran on.
      seconds: wall time of all of it, over all interruptions.
      settings: the arguments.
      folder: of the experiment, or None.
    """

    dataset: str
    rows: int
    seeds: list[int]
    teacher: Row | None
    alone: Row
    distilled: Row
    gain: Estimate
    device: str
    seconds: float
    settings: Mapping[str, Any]
    folder: str | None

    def models(self) -> list[Row]:
        """The rows there are: teacher, alone, distilled."""
        return [row for row in (self.teacher, self.alone, self.distilled) if row is not None]


def to_json(report: Report) -> dict[str, Any]:
    """The report as an object that JSON can hold; NaN, for which it has no word, is None."""
    return _without_nan(dataclasses.asdict(report))


def from_json(found: Mapping[str, Any]) -> Report:
    """The report that `to_json` was given."""
    teacher = found["teacher"]
    return Report(
        **{
            **found,
            "teacher": None if teacher is None else _row(teacher),
            "alone": _row(found["alone"]),
            "distilled": _row(found["distilled"]),
            "gain": _estimate(found["gain"]),
        }
    )


def _row(found: Mapping[str, Any]) -> Row:
    named = ("accuracy", "ece", "agreement", "seconds")
    return Row(
        **{
            **found,
            **{name: _estimate(found[name]) for name in named},
            "corrupted": {name: _estimate(value) for name, value in found["corrupted"].items()},
            "curves": [[(int(step), float(y)) for step, y in curve] for curve in found["curves"]],
        }
    )


def _estimate(found: Any) -> Any:
    if found is None:
        return None
    mean, error, values = found
    return Estimate(mean, math.nan if error is None else error, tuple(values))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
