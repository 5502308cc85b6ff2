"""``kdjax lm distill``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from kdjax import _checks
from kdjax.cli import _lm_options as options_of
from kdjax.cli import _runs
from kdjax.cli._errors import Interrupted
from kdjax.cli._lm_options import LMDistill

_NAME = "lm"


def out_folder(where: options_of.LMRun) -> Path:
    """The folder of the run: the one asked for, a new one, or the newest to resume."""
    return _runs.folder(_NAME, where.out, resume=where.resume)


def remembered(out: Path) -> LMDistill | None:
    """The options of the run in a folder, None where there is no run yet."""
    from kdjax.experiments import ledger

    about = ledger.about(out)
    if about is None:
        return None
    hint = "It wasn't made by kdjax lm distill."
    found = _checks.entry(f"the run in {out}", about, _NAME, hint)
    text, student = dict(found["text"]), dict(found["student"])
    text["text"] = None if text["text"] is None else tuple(text["text"])
    student["layers"] = None if student["layers"] is None else tuple(student["layers"])
    student["alpha"] = tuple(student["alpha"])
    return LMDistill(
        text=options_of.LMText(**text),
        teacher=options_of.LMTeacher(**found["teacher"]),
        student=options_of.LMStudent(**student),
        run=options_of.LMRun(out=str(out)),
    )


def distill(options: LMDistill, out: Path) -> int:
    """Distils, compares and shows.

    Args:
      options: what was asked for.
      out: the folder of the run.

    Returns:
      The exit code.
    """
    resume = options.run.resume
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"out must be a new folder, got {out}, which exists; --resume continues the run in it."
        )
    kinds = (options.text, options.teacher, options.student)
    given = {name: value for kind in kinds for name, value in dataclasses.asdict(kind).items()}
    files = given.pop("text")
    from kdjax.cli import _lm_show
    from kdjax.experiments import language

    try:
        report = language.compare(files, **given, out=out, resume=resume, about=_about(options))
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; continue with: kdjax lm distill --resume --out {out}"
        ) from None
    _lm_show.report(report, out)
    return 0


def _about(options: LMDistill) -> dict[str, Any]:
    """The options as JSON, with paths that hold from anywhere."""
    found = dataclasses.asdict(options)
    found.pop("run")
    if options.text.text is not None:
        found["text"]["text"] = [_absolute(one) for one in options.text.text]
    if options.teacher.teacher is not None:
        found["teacher"]["teacher"] = _absolute(options.teacher.teacher)
    return {_NAME: found}


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
