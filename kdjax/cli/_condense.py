"""``kdjax condense``."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

from kdjax import _checks
from kdjax.cli import _condense_options as options_of
from kdjax.cli import _data, _runs
from kdjax.cli._condense_options import Condense
from kdjax.cli._errors import Interrupted

_NAME = "condense"
_ALL = "all"


def out_folder(where: options_of.CondenseRun) -> Path:
    """The folder of the run: the one asked for, a new one, or the newest to resume."""
    return _runs.folder(_NAME, where.out, resume=where.resume)


def remembered(out: Path) -> Condense | None:
    """The options of the run in a folder, None where there is no run yet."""
    from kdjax.experiments import ledger

    about = ledger.about(out)
    if about is None:
        return None
    hint = "It wasn't made by kdjax condense."
    found = _checks.entry(f"the run in {out}", about, _NAME, hint)
    data, method = dict(found["data"]), dict(found["method"])
    for known, name in (
        (data, "source_classes"), (data, "target_classes"), (method, "widths"),
    ):  # fmt: skip
        known[name] = None if known[name] is None else tuple(known[name])
    return Condense(
        data=options_of.CondenseData(**data),
        target=options_of.CondenseTarget(**found["target"]),
        method=options_of.CondenseMethod(**method),
        evaluation=options_of.CondenseEvaluation(**found["evaluation"]),
        run=options_of.CondenseRun(out=str(out)),
    )


def run(options: Condense, out: Path) -> int:
    """Condenses, compares and shows.

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
    dataset = _data.load(options.data.data, options.data.data_dir)
    given = _given(options, dataset.num_classes)
    from kdjax.cli import _condense_show
    from kdjax.experiments import condense

    try:
        report = condense.compare(dataset, **given, out=out, resume=resume, about=_about(options))
        figures = [
            condense.pictures(report, out / "pairs.png"),
            condense.curves(report, out / "curve.png"),
        ]
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; continue with: kdjax condense --resume --out {out}") from None
    _condense_show.report(report, out, figures, _same_settings(options))
    return 0


def _same_settings(options: Condense) -> list[str]:
    """The options that the next run should have, too: all that were typed but for its size."""
    found = []
    for kind in (options.data, options.method, options.evaluation):
        for field in dataclasses.fields(kind):
            value = getattr(kind, field.name)
            if value == field.default or field.name in ("pairs", "seeds"):
                continue
            words = value if isinstance(value, tuple) else (value,)
            found += ["--" + field.name.replace("_", "-"), *(shlex.quote(str(w)) for w in words)]
    return found


def _given(options: Condense, num_classes: int) -> dict[str, Any]:
    """The options as arguments of the experiment."""
    kinds = (options.data, options.target, options.method, options.evaluation)
    found = {name: value for kind in kinds for name, value in dataclasses.asdict(kind).items()}
    for name in ("data", "data_dir"):
        found.pop(name)
    for name in ("source_classes", "target_classes"):
        found[name] = _classes(name, found[name], num_classes)
    return found


def _classes(name: str, given: tuple[str, ...] | None, num_classes: int) -> list[int] | None:
    """Numbers and ranges as a list: ``0-2 7`` is 0, 1, 2, 7."""
    if given is None:
        return None
    if given == (_ALL,):
        return list(range(num_classes))
    found: list[int] = []
    for word in given:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if match is None:
            raise ValueError(
                f"--{name.replace('_', '-')} must be class numbers and ranges such as 0-4, or all "
                f"alone; got {word!r}."
            )
        first = int(match[1])
        last = int(match[2] or first)
        if not first <= last < num_classes:
            raise ValueError(
                f"--{name.replace('_', '-')} must be classes from 0 to {num_classes - 1}, ranges "
                f"from the lower to the higher; got {word!r}."
            )
        found += range(first, last + 1)
    return found


def _about(options: Condense) -> dict[str, Any]:
    """The options as JSON, with paths that hold from anywhere."""
    found = dataclasses.asdict(options)
    found.pop("run")
    found["data"] |= {
        "data": _data.absolute(options.data.data),
        "data_dir": _data.absolute_path(options.data.data_dir),
    }
    found["target"]["target"] = _data.absolute_path(options.target.target)
    return {_NAME: found}
