"""One trained model under `kdjax.attacks.evaluate` and `kdjax.attacks.gradient_masking`."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

from kdjax import _checks, attacks, train
from kdjax import data as kdata
from kdjax._pairs import Tree
from kdjax.experiments import _robust_attack as attack
from kdjax.experiments import _robust_plan as plans
from kdjax.experiments import runs
from kdjax.experiments._robust_measure import notes_of, spread
from kdjax.experiments._robust_plan import AVERAGED, WEIGHTS

VERSIONS = ("standard", "plus", "rand")
EPOCHS = ("best", "last")
_KEY = 2
_PICTURES = 8
# The checks compare attacks with each other: a few hundred images are enough.
_CHECKED = 200


class Found(NamedTuple):
    """What an evaluation found, as plain data.

    Attributes:
      model: what was evaluated, in words.
      images: of the test split.
      settings: eps, norm, version and what else decides the figures.
      accuracy: attack -> share of images that stay right; ``worst_case`` is the AND over all.
      calibration: ``clean``, ``pgd_20``, and ``..._scaled`` after the validation split's
        temperature -> name -> number.
      stability: corruption -> ``accuracy`` and ``unchanged`` answers.
      masking: name -> ``passed``, ``measured``, ``wanted``.
      notes: warnings.
      folder: where it was kept.
      examples: images, and what they became; not in the file.
    """

    model: str
    images: int
    settings: dict[str, Any]
    accuracy: dict[str, float]
    calibration: dict[str, dict[str, float]]
    stability: dict[str, dict[str, float]]
    masking: dict[str, dict[str, Any]]
    notes: list[str]
    folder: str
    examples: dict[str, np.ndarray]


def evaluate(
    run: str | os.PathLike[str],
    dataset: kdata.Dataset,
    *,
    weights: str = "student",
    epoch: str | None = None,
    seed: int | None = None,
    eps: float | None = None,
    norm: str | None = None,
    examples: int = 1000,
    version: str = "standard",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Found:
    """Attacks a trained model in every way there is, and looks for masked gradients.

    The same call again continues where a killed one stopped. It writes ``report.json`` into the
    folder of its checkpoints.

    Args:
      run: a run folder of `kdjax.experiments.robust.compare` or of
        `kdjax.experiments.soft_labels.compare`.
      dataset: with the split test, of which evenly spread images are taken, and validation, on
        which temperatures are fitted.
      weights: "student", or "ema", the average of its weights, where the run keeps one.
      epoch: "best" or "last"; None is the best where the run chose one.
      seed: of the models of a run with several seeds; None is the first.
      eps: radius in units of pixels; None is what the run was trained against, or
        `kdjax.experiments.robust.radius`.
      norm: "linf" or "l2"; None likewise.
      examples: test images, at most; the temperatures take as many validation images.
      version: of AutoAttack: "standard", "plus" or "rand".
      checkpoint: folder for what is found; None is one inside the run's, named by the settings.
      progress: whether to show bars on a terminal.

    Returns:
      What was found.

    Raises:
      ValueError: an argument is out of range, there is no such model, or it doesn't fit the data.
    """
    _checks.choice("weights", weights, WEIGHTS)
    _checks.choice("version", version, VERSIONS)
    _checks.count("examples", examples)
    manifest = runs.read(run, argument="folder")
    trained = manifest.get("attack", {})
    norm = trained.get("norm", "linf") if norm is None else norm
    _checks.choice("norm", norm, plans.NORMS)
    if eps is None:
        same = trained.get("norm") == norm
        eps = float(trained["eps"]) if same else plans.radius(dataset.shape, norm)
    _checks.number("eps", eps, above=0)
    plans.check_images(dataset, "test")
    epoch = _epoch(epoch, manifest, run)
    found, variables, which = _load(run, dataset, manifest, weights, epoch, seed)
    title = f"{found.manifest['role']} {found.name}, seed {which}, {weights}, {epoch} epoch"
    known = np.flatnonzero(dataset.labels("test") >= 0)
    rows = known[spread(len(known), examples)]
    folder = _folder(run, checkpoint, f"{weights}-{epoch}-{which}-{norm}-{eps:.6g}-{len(rows)}")
    settings = {
        "run": str(Path(run).absolute()),
        "data": dataset.name,
        "weights": weights,
        "epoch": epoch,
        "seed": which,
        "eps": eps,
        "norm": norm,
        "version": version,
    }
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        parts = _attacked(
            attack.logits_fn(found.model, variables),
            dataset,
            rows,
            eps=eps,
            norm=norm,
            version=version,
            folder=folder,
            progress=progress,
        )
    result = Found(
        model=title,
        images=len(rows),
        settings=settings,
        notes=notes_of(said),
        folder=str(folder),
        **parts,
    )
    plain = {name: value for name, value in result._asdict().items() if name != "examples"}
    runs.write_json(folder / "report.json", plain)
    return result


def _attacked(
    model: Partial,
    dataset: kdata.Dataset,
    rows: np.ndarray,
    *,
    eps: float,
    norm: str,
    version: str,
    folder: Path,
    progress: bool,
) -> dict[str, Any]:
    """Accuracy, calibration, stability, masking and examples."""
    batch = dataset.read("test", rows)
    images, labels = batch["image"], batch["label"]
    keys = jax.random.split(jax.random.key(_KEY), 3)
    found = attacks.evaluate(
        model,
        images,
        labels,
        eps=eps,
        norm=norm,
        key=keys[0],
        auto=version == "standard",
        validation=_validation(dataset, len(rows)),
        checkpoint=folder,
        progress=progress,
        keep=min(_PICTURES, len(rows)),
    )
    accuracy = dict(found.accuracy)
    if version != "standard":
        accuracy |= _other_version(model, images, labels, found, version, keys[1], folder, eps=eps,
                                   norm=norm, progress=progress)  # fmt: skip
    checked = spread(len(rows), _CHECKED)
    masking = {
        check.name: {
            "passed": bool(check.passed),
            "measured": float(check.measured),
            "wanted": check.wanted,
        }
        for check in attacks.gradient_masking(
            model,
            images[checked],
            labels[checked],
            eps=eps,
            norm=norm,
            key=keys[2],
            progress=progress,
        )
    }
    return {
        "accuracy": accuracy,
        "calibration": found.calibration,
        "stability": found.stability,
        "masking": masking,
        "examples": found.examples,
    }


def _other_version(
    model: Partial,
    images: np.ndarray,
    labels: np.ndarray,
    found: attacks.Evaluation,
    version: str,
    key: jax.Array,
    folder: Path,
    **options: Any,
) -> dict[str, float]:
    """AutoAttack in another version, and the worst case with it."""
    if version == "rand":
        # Our networks draw nothing in evaluation mode: the key changes nothing.
        model = Partial(_keyed, model)
    attacked = attacks.auto_attack(
        model,
        images,
        labels,
        version=version,
        key=key,
        checkpoint=folder / f"auto_attack-{version}.npz",
        **options,
    )
    masks = {f"auto_attack/{k}": m for k, m in attacked.per_attack.items() if k != "clean"}
    worst = found.robust["worst_case"] & attacked.robust
    masks = {"auto_attack": attacked.robust, "worst_case": worst, **masks}
    return {name: float(mask.mean()) for name, mask in masks.items()}


def _keyed(model: Partial, images: jax.Array, key: jax.Array) -> jax.Array:
    logits: jax.Array = model(images)
    return logits


def _validation(dataset: kdata.Dataset, most: int) -> tuple[np.ndarray, np.ndarray] | None:
    if "validation" not in dataset.splits:
        return None
    known = np.flatnonzero(dataset.labels("validation") >= 0)
    if not len(known):
        return None
    batch = dataset.read("validation", known[spread(len(known), most)])
    return batch["image"], batch["label"]


def _epoch(epoch: str | None, manifest: dict[str, Any], run: str | os.PathLike[str]) -> str:
    selects = manifest.get("experiment") == "robust"
    if epoch is None:
        return "best" if selects else "last"
    _checks.choice("epoch", epoch, EPOCHS)
    if epoch == "best" and not selects:
        raise ValueError(f"epoch must be last for {run}, which chose no best epoch; got 'best'.")
    return epoch


def _load(
    run: str | os.PathLike[str],
    dataset: kdata.Dataset,
    manifest: dict[str, Any],
    weights: str,
    epoch: str,
    seed: int | None,
) -> tuple[runs.Trained, tuple[Tree, Tree], int]:
    """The run, the variables asked for, and their seed."""
    folder = Path(run)
    if weights == AVERAGED:
        if not (folder / AVERAGED / runs.MANIFEST).is_file():
            raise ValueError(f"weights must be student for {run}, which keeps no average; got ema.")
        folder = folder / AVERAGED
    found = runs.load(folder, dataset, argument="folder")
    seeds = manifest["seeds"]
    which = seeds[0] if seed is None else seed
    if which not in seeds:
        there = ", ".join(map(str, seeds))
        raise ValueError(f"seed must be one of {there}, those of {run}; got {which}.")
    variables = found.variables[seeds.index(which)]
    if epoch == "best":
        variables = train.load_student(folder, step="best")
    return found, jax.device_put(variables), which


def _folder(
    run: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None, name: str
) -> Path:
    if checkpoint is None:
        return Path(run).absolute() / f"robustness-{name}"
    folder = Path(checkpoint).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"checkpoint must be a folder, got the file {folder}.")
    return folder
