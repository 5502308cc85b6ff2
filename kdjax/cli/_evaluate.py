"""``kdjax evaluate`` and ``kdjax predict-labels``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kdjax import _checks
from kdjax.cli._errors import Interrupted
from kdjax.cli._options import Evaluate, PredictLabels

if TYPE_CHECKING:
    from kdjax.data import Dataset
    from kdjax.experiments.runs import Trained


def evaluate(options: Evaluate) -> int:
    """Prints what a trained model does on a split.

    Args:
      options: what was asked for.

    Returns:
      The exit code.
    """
    from kdjax.cli import _show
    from kdjax.experiments import measures

    trained, dataset = _open(options, options.split)
    found = [
        measures.score(trained.model, variables, dataset, split=options.split)[0]
        for variables in trained.variables
    ]
    cost = measures.cost(trained.model, trained.variables[0], dataset.shape)
    more = {"negative log-likelihood": measures.estimate(score.nll for score in found)}
    seeds = ", ".join(map(str, trained.manifest["seeds"]))
    title = (
        f"{trained.manifest['role']} {trained.name} (seed {seeds}) on {dataset.name}, "
        f"{options.split} split, {dataset.size(options.split):,} examples"
    )
    _show.scores(title, found, cost, more)
    return 0


def predict_labels(options: PredictLabels) -> int:
    """Stores a teacher's outputs.

    Args:
      options: what was asked for.

    Returns:
      The exit code.
    """
    from kdjax import train

    trained, dataset = _open(options, options.split)
    try:
        stored = train.predict_labels(
            trained.model,
            trained.variables[0],
            dataset,
            options.out,
            teacher=f"{trained.name} of {trained.folder}",
            split=options.split,
            top_k=options.top_k,
            dtype=options.dtype,
            temperature=options.temperature,
        )
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command continues") from None
    kept = "all logits" if options.top_k is None else f"top {options.top_k}"
    rows = stored.manifest["examples"]
    print(f"{rows:,} examples, {kept}, {options.dtype}: {Path(options.out)}")
    print(f"use them: kdjax distill --teacher-labels {options.out}")
    return 0


def _open(options: Evaluate | PredictLabels, split: str) -> tuple[Trained, Dataset]:
    """The models of a checkpoint, and the data asked for or that they were trained on."""
    from kdjax.cli import _robust
    from kdjax.experiments import runs

    manifest = runs.read(options.checkpoint)
    data, data_dir = options.data, options.data_dir
    if data is None:
        known = manifest.get("options", {}).get("data")
        if known is None:
            raise ValueError(
                f"data must be given: {options.checkpoint} doesn't say what it was trained on."
            )
        data, data_dir = known["data"], known["data_dir"] if data_dir is None else data_dir
    held_out = manifest.get("robust", {}).get("data", {}).get("validation")
    dataset = _robust.split(data, data_dir, manifest, held_out)
    _checks.choice("split", split, dataset.splits)
    return runs.load(options.checkpoint, dataset), dataset
