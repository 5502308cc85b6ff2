"""``kdjax robust train`` and ``kdjax robust evaluate``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdjax import _checks
from kdjax.cli import _data, _runs
from kdjax.cli._errors import Interrupted
from kdjax.cli._options import (
    RobustAttack,
    RobustData,
    RobustEvaluate,
    RobustMethod,
    RobustRun,
    RobustTrain,
)

if TYPE_CHECKING:
    from kdjax.data import Dataset

_NAME = "robust"
_ALL = "all"


def out_folder(where: RobustRun) -> Path:
    """The folder of the run: the one asked for, a new one, or the newest to resume."""
    return _runs.folder(_NAME, where.out, resume=where.resume)


def remembered(out: Path) -> RobustTrain | None:
    """The options of the run in a folder, None where there is no run yet."""
    from kdjax.experiments import ledger

    about = ledger.about(out)
    if about is None:
        return None
    hint = "It wasn't made by kdjax robust train."
    found = _checks.entry(f"the run in {out}", about, "robust", hint)
    method, weights = dict(found["method"]), found["attack"]["auto_attack_weights"]
    for name in ("method", "temperature", "mix"):
        method[name] = None if method[name] is None else tuple(method[name])
    attack = {**found["attack"], "auto_attack_weights": tuple(weights)}
    return RobustTrain(
        data=RobustData(**found["data"]),
        method=RobustMethod(**method),
        attack=RobustAttack(**attack),
        run=RobustRun(devices=found["devices"], out=str(out)),
    )


def train(options: RobustTrain, out: Path) -> int:
    """Trains, compares and shows.

    Args:
      options: what was asked for.
      out: the folder of the run.

    Returns:
      The exit code.
    """
    mesh = _runs.mesh(options.run.devices)
    if not options.run.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"out must be a new folder, got {out}, which exists; --resume continues the run in it."
        )
    given = _given(options)
    from kdjax.cli import _robust_show
    from kdjax.experiments import robust, robust_figures

    dataset = _load(options.data.data, options.data.data_dir)
    try:
        report = robust.compare(
            dataset,
            **given,
            mesh=mesh,
            out=out,
            resume=options.run.resume,
            about=_about(options),
        )
        curves = robust_figures.curves(report, out / "curves.png")
        pictures = robust_figures.perturbed(report, out / robust.EXAMPLES, out / "perturbed.png")
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; continue with: kdjax robust train --resume --out {out}"
        ) from None
    _robust_show.report(report, out, [curves, pictures])
    return 0


def evaluate(options: RobustEvaluate) -> int:
    """Attacks a trained network and shows what it is worth.

    Args:
      options: what was asked for.

    Returns:
      The exit code.
    """
    from kdjax.cli import _robust_show
    from kdjax.experiments import robust, robust_figures, runs

    eps = _number("eps", options.eps)
    manifest = runs.read(options.run_folder, argument="folder")
    data, data_dir = options.data, options.data_dir
    held_out = None
    if data is None:
        known = manifest.get("options", {}).get("data")
        if known is None:
            raise ValueError(
                f"data must be given: {options.run_folder} doesn't say what it was trained on."
            )
        data, data_dir = known["data"], known["data_dir"] if data_dir is None else data_dir
        held_out = manifest.get("robust", {}).get("data", {}).get("validation")
    dataset = split(data, data_dir, manifest, held_out)
    try:
        found = robust.evaluate(
            options.run_folder,
            dataset,
            weights=options.weights,
            epoch=options.epoch,
            seed=options.seed,
            eps=eps,
            norm=options.norm,
            examples=options.examples,
            version=options.version,
            checkpoint=options.checkpoint,
        )
        figure = robust_figures.evaluation(found, Path(found.folder) / "report.png")
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command continues") from None
    _robust_show.evaluation(found, figure)
    return 0


def _given(options: RobustTrain) -> dict[str, Any]:
    """The options as arguments of the experiment."""
    data, method = dataclasses.asdict(options.data), dataclasses.asdict(options.method)
    attack = dataclasses.asdict(options.attack)
    for name in ("data", "data_dir"):
        data.pop(name)
    for name in ("eps", "step_size"):
        attack[name] = _number(name, attack[name])
    if _ALL in method["method"]:
        if len(method["method"]) > 1:
            raise ValueError(
                f"method must be all alone or a list, got {' '.join(method['method'])}."
            )
        method["method"] = ("at", "trades", "adr", "adr-trades")
    return {**data, **method, **attack}


def _about(options: RobustTrain) -> dict[str, Any]:
    """The options as JSON, with paths that hold from anywhere.

    ``options`` is what `kdjax evaluate` looks into, ``robust`` what a resumed run does.
    """
    found = dataclasses.asdict(options)
    where = {
        "data": _data.absolute(options.data.data),
        "data_dir": _data.absolute_path(options.data.data_dir),
    }
    found["data"] |= where
    found["devices"] = found.pop("run")["devices"]
    return {"options": {"data": where}, "robust": found}


def _number(name: str, text: str | None) -> float | None:
    """A number or a fraction, as radii are usually written."""
    if text is None:
        return None
    top, _, bottom = text.partition("/")
    try:
        return float(top) / float(bottom) if bottom else float(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"{name} must be a number or a fraction such as 8/255, got {text!r}."
        ) from None


def _load(data: str, data_dir: str | None) -> Dataset:
    """The data set without a validation split that its loader would make: ours is smaller."""
    from kdjax import data as kdata

    path = Path(data).expanduser()
    if data_dir is None and path.suffix == ".npz" and path.is_file():
        return kdata.npz(path, validation=0)
    if data.startswith("tfds:"):
        try:
            return kdata.tfds(data.removeprefix("tfds:"), data_dir, validation=0)
        except ValueError as error:
            # Its arguments have other names than ours.
            raise ValueError(f"data {data!r} can't be read: {error}") from error
    return _data.load(data, data_dir)


def split(
    data: str, data_dir: str | None, manifest: dict[str, Any], held_out: int | None
) -> Dataset:
    """The data with the validation split that the run was trained without."""
    from kdjax.experiments import robust, soft_labels

    if manifest.get("experiment") == "robust":
        return robust.with_validation(_load(data, data_dir), held_out)
    return soft_labels.with_validation(_data.load(data, data_dir))
