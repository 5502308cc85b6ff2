"""``kdjax distill``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from kdjax import _checks
from kdjax.cli import _data, _runs
from kdjax.cli._errors import Interrupted
from kdjax.cli._options import Data, Distill, Labels, Run, Student, Teacher

_NAME = "distill"


def out_folder(where: Run) -> Path:
    """The folder of the run: the one asked for, a new one, or the newest to resume."""
    return _runs.folder(_NAME, where.out, resume=where.resume)


def remembered(out: Path) -> Distill | None:
    """The options of the run in a folder, None where there is no run yet."""
    from kdjax.experiments import ledger

    about = ledger.about(out)
    if about is None:
        return None
    found = _checks.entry(f"the run in {out}", about, "options", "It wasn't made by kdjax distill.")
    return Distill(
        data=Data(**found["data"]),
        labels=Labels(**found["labels"]),
        teacher=Teacher(**found["teacher"]),
        student=Student(**found["student"]),
        run=Run(devices=found["devices"], out=str(out)),
    )


def run(options: Distill, out: Path) -> int:
    """Trains, compares and shows.

    Args:
      options: what was asked for.
      out: the folder of the run.

    Returns:
      The exit code.
    """
    mesh = _runs.mesh(options.run.devices)
    teacher, labels, student = options.teacher, options.labels, options.student
    if not options.run.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"out must be a new folder, got {out}, which exists; --resume continues the run in it."
        )
    if teacher.teacher is not None and teacher.teacher_labels is not None:
        raise ValueError("teacher must not be given with --teacher-labels, got both.")
    from kdjax import data as kdata
    from kdjax.cli import _show
    from kdjax.experiments import curves, soft_labels

    dataset = soft_labels.with_validation(_data.load(options.data.data, options.data.data_dir))
    folder = teacher.teacher_labels
    outputs = None if folder is None else kdata.stored_outputs(folder)
    arguments: dict[str, Any] = {**dataclasses.asdict(student), **dataclasses.asdict(labels)}
    try:
        report = soft_labels.compare(
            dataset,
            **arguments,
            teacher=teacher.teacher,
            teacher_outputs=outputs,
            teacher_model=teacher.teacher_model,
            teacher_steps=teacher.teacher_steps,
            teacher_learning_rate=teacher.teacher_learning_rate,
            teacher_augmentation=teacher.teacher_augmentation,
            mesh=mesh,
            out=out,
            resume=options.run.resume,
            about={"options": _for_later(options)},
        )
        figure = curves.draw(report, out / "curves.png")
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; continue with: kdjax distill --resume --out {out}") from None
    _show.report(report, figure, out)
    return 0


def _for_later(options: Distill) -> dict[str, Any]:
    """The options as JSON, with paths that hold from anywhere."""
    found = dataclasses.asdict(options)
    found["data"] = {
        "data": _data.absolute(options.data.data),
        "data_dir": _data.absolute_path(options.data.data_dir),
    }
    for name in ("teacher", "teacher_labels"):
        found["teacher"][name] = _data.absolute_path(found["teacher"][name])
    found["devices"] = found.pop("run")["devices"]
    return found
