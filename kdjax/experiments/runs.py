"""One training and its folder: what was trained, on what, by which seeds."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

import kdjax
from kdjax import _checks, adapters, models, train
from kdjax._pairs import Model, Tree
from kdjax.data import Dataset

MANIFEST = "run.json"


class Trained(NamedTuple):
    """Models that a run folder holds.

    Attributes:
      name: of the network, in `kdjax.models.BY_NAME`.
      model: the network as a Model.
      variables: ``(params, extra)`` for each seed.
      manifest: what is known about the run.
      folder: where it was read from.
    """

    name: str
    model: Model
    variables: list[tuple[Tree, Tree]]
    manifest: dict[str, Any]
    folder: Path


# Kept, so that programs compiled for a Model are found again.
@functools.lru_cache(maxsize=32)
def network(name: str, num_classes: int, *, argument: str = "model") -> Model:
    """One of the reference networks as a Model.

    Args:
      name: in `kdjax.models.BY_NAME`.
      num_classes: width of the logits.
      argument: what messages call the name.

    Returns:
      The Model.

    Raises:
      ValueError: there is no such network; the message lists those there are.
    """
    _checks.choice(argument, name, models.BY_NAME)
    return adapters.from_linen(models.BY_NAME[name](num_classes))


def check_input(model: Model, name: str, shape: tuple[int, ...], argument: str) -> None:
    """Refuses a network that can't read examples of this shape, before anything is trained."""
    example = jax.ShapeDtypeStruct((2, *shape), "float32")
    try:
        jax.eval_shape(model.init, jax.random.key(0), example)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise ValueError(
            f"{argument} must be a network for examples of shape {shape}, got {name!r}: {reason}."
        ) from error


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest of a run, whole or not at all."""
    write_json(folder / MANIFEST, {"kdjax": kdjax.__version__, **manifest})


def read(folder: str | os.PathLike[str], *, argument: str = "checkpoint") -> dict[str, Any]:
    """The manifest of a run.

    Args:
      folder: the run folder.
      argument: what messages call it.

    Returns:
      The manifest.

    Raises:
      ValueError: the folder is not there or is no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{argument} must be a run folder, got {folder}, which is not there.")
    file = folder / MANIFEST
    if not file.is_file():
        inner = sorted(
            str(found.parent.relative_to(folder)) for found in folder.glob(f"**/{MANIFEST}")
        )
        hint = f"; it holds the runs {', '.join(inner)}" if inner else ""
        raise ValueError(
            f"{argument} must be a folder with {MANIFEST}, which the command line writes, got "
            f"{folder}{hint}."
        )
    return read_json(file)


def load(
    folder: str | os.PathLike[str], dataset: Dataset | None = None, *, argument: str = "checkpoint"
) -> Trained:
    """The models of a run, ready to evaluate or to teach.

    Args:
      folder: a run folder, with a manifest and checkpoints.
      dataset: what the models will be run on, to refuse data that don't fit them.
      argument: what messages call the folder.

    Returns:
      The trained models, one for each seed.

    Raises:
      ValueError: there is no such run, it has no checkpoint yet, or it doesn't fit the data.
    """
    folder = Path(folder)
    manifest = read(folder, argument=argument)
    name = _checks.entry(str(folder / MANIFEST), manifest, "model")
    classes, shape = int(manifest["num_classes"]), tuple(manifest["shape"])
    if dataset is not None and (classes, shape) != (dataset.num_classes, tuple(dataset.shape)):
        raise ValueError(
            f"data must have {classes} classes and examples of shape {shape} for {argument} "
            f"{folder}, got {dataset.name!r} with {dataset.num_classes} classes and shape "
            f"{tuple(dataset.shape)}."
        )
    found = train.load_student(folder)
    seeds = manifest["seeds"]
    stacked = [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(seeds))]
    variables = stacked if manifest["stacked"] else [found]
    return Trained(name, network(name, classes), variables, manifest, folder)


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, file)


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
      ValueError: it can't be read.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} must be a JSON file of kdjax, and can't be read: {error}."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a JSON object, got {_checks.describe(found)}.")
    return found
