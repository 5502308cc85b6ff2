"""What soft labels are worth: a student alone against the same student distilled.

Three settings, one row of a markdown table for each:

  all       teacher and student have all labels
  few       the teacher has all labels, the student ten of each class and the rest unlabelled
  few-few   teacher and student have the same ten labels of each class

    python benchmarks/soft_labels.py              # digits, about 2 minutes on two cores
    python benchmarks/soft_labels.py --data mnist.npz --settings few-few --out /tmp/mnist
    python benchmarks/soft_labels.py --data cifar10.npz --teacher-model resnet20 \\
        --student-model resnet8 --augmentation crop_flip --teacher-augmentation crop_flip

With --out, a call that was stopped or killed continues where it was. Needs nothing beyond kdjax's
core dependencies.
"""

from __future__ import annotations

import argparse
import inspect
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kdjax as kd
from kdjax.experiments import curves, soft_labels
from kdjax.experiments.measures import Estimate
from kdjax.experiments.report import Report

SETTINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "few": {"labels_per_class": 10, "teacher_sees": "all"},
    "few-few": {"labels_per_class": 10, "teacher_sees": "few"},
}
COLUMNS = (
    "data", "setting", "labels: teacher, student", "networks: teacher, student", "teacher",
    "student alone", "distilled", "gain (points)", "below teacher (points)", "seeds", "device",
    "time", "command",
)  # fmt: skip
QUICK = {"seeds": 2, "steps": 60, "teacher_steps": 40}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the settings asked for and prints their rows."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(arguments)
    values = vars(options)
    if options.quick:
        values.update(QUICK)
    data, out, settings = values.pop("data"), values.pop("out"), values.pop("settings")
    label_count = values.pop("labels_per_class")
    del values["quick"]
    dataset = kd.data.digits() if data == "digits" else kd.data.npz(data)
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + " --- |" * len(COLUMNS), flush=True)
    for name in settings:
        setting = dict(SETTINGS[name])
        if "labels_per_class" in setting:
            setting["labels_per_class"] = label_count
        folder = None if out is None else Path(out) / name
        report = soft_labels.compare(dataset, **values, **setting, out=folder, resume=True)
        if folder is not None:
            curves.draw(report, folder / "curves.png")
        print(row(name, report, command(arguments, name)), flush=True)


def parser() -> argparse.ArgumentParser:
    """The options; those that aren't ours are the arguments of ``soft_labels.compare``."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--data", default="digits", help="digits or a PATH.npz (default: digits)")
    found.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    found.add_argument("--out", help="folder to keep and resume in (default: keep nothing)")
    found.add_argument("--quick", action="store_true", help=f"only to see that it runs: {QUICK}")
    arguments = inspect.signature(soft_labels.compare).parameters
    defaults = {name: argument.default for name, argument in arguments.items()}
    for name in (
        "teacher_model", "student_model", "temperature", "hard", "soft", "steps", "teacher_steps",
        "batch_size", "learning_rate", "teacher_learning_rate", "label_seed", "seeds",
    ):  # fmt: skip
        value = defaults[name]
        found.add_argument(
            "--" + name.replace("_", "-"),
            type=type(value),
            default=value,
            help=f"default {value}",
        )
    for name in ("augmentation", "teacher_augmentation"):
        found.add_argument(
            "--" + name.replace("_", "-"),
            choices=soft_labels.AUGMENTATIONS,
            help="default affine, affine_wide for the teacher; none above 16 pixels",
        )
    found.add_argument("--labels-per-class", type=int, default=10, help="in the few settings")
    return found


def command(arguments: Sequence[str], setting: str) -> str:
    """The command that gives this row alone."""
    kept = list(arguments)
    if "--settings" in kept:
        start = kept.index("--settings")
        end = start + 1
        while end < len(kept) and kept[end] in SETTINGS:
            end += 1
        del kept[start:end]
    return shlex.join(["python", "benchmarks/soft_labels.py", *kept, "--settings", setting])


def row(name: str, report: Report, how: str) -> str:
    """One row of the table."""
    teacher = report.teacher
    assert teacher is not None
    behind = [teacher.accuracy.mean - value for value in report.distilled.accuracy.values]
    cells = (
        report.dataset,
        name,
        f"{teacher.labels:,}, {report.distilled.labels:,}",
        f"{teacher.model} ({teacher.parameters:,}), "
        f"{report.distilled.model} ({report.distilled.parameters:,})",
        f"{100 * teacher.accuracy.mean:.2f} %",
        f"{shown(report.alone.accuracy)} %",
        f"{shown(report.distilled.accuracy)} %",
        f"{shown(report.gain, '+')}",
        f"{100 * sum(behind) / len(behind):.2f}",
        str(len(report.seeds)),
        report.device,
        f"{report.seconds:.0f} s",
        f"`{how}`",
    )
    return "| " + " | ".join(cells) + " |"


def shown(value: Estimate, sign: str = "") -> str:
    """Mean and standard error in per cent."""
    error = "" if math.isnan(value.error) else f" ± {100 * value.error:.2f}"
    return f"{100 * value.mean:{sign}.2f}{error}"


if __name__ == "__main__":
    main()
