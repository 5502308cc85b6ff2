"""What the trained models of a robustness experiment do on the test split."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax import attacks, metrics
from kdjax._pairs import Tree
from kdjax.data import _order
from kdjax.experiments import _robust_attack as attack
from kdjax.experiments import _robust_plan as plans
from kdjax.experiments import runs
from kdjax.experiments._robust_plan import WEIGHTS
from kdjax.experiments._robust_progress import Progress
from kdjax.experiments._robust_train import Outcome

WHEN = ("best", "last")
_STEPS = 20
_BATCH = 256
_KEY = 1
_SHOWN = 8
# Passes through the network that AutoAttack costs for an image that stays robust, roughly.
_AUTO_ATTACK = 4000
# Of its bar, which few images are too quick for.
_LONG = 256
_FILE = "measured.json"

Score = dict[str, float | None]


def cost(plan: plans.Plan) -> float:
    """Passes through the network to measure one training."""
    dataset = plan.dataset
    images = dataset.size("test") + dataset.size("validation")
    attacked = plan.choices["auto_attack"] * len(plan.choices["auto_attack_weights"])
    each = len(WEIGHTS) * images * (_STEPS + 1.5) + attacked * _AUTO_ATTACK
    return len(WHEN) * each


def measure(plan: plans.Plan, outcome: Outcome, progress: Progress) -> dict[str, Any]:
    """Measures the four models of one training; what has been measured is only read.

    Args:
      plan: the experiment.
      outcome: the training.
      progress: the bar.

    Returns:
      weights -> "best" and "last" -> name -> number or None; and ``notes``, warnings in words.
    """
    file = outcome.job.folder / _FILE
    found: dict[str, Any] = runs.read_json(file) if file.is_file() else {"notes": []}
    title = f"{plans.METHODS[outcome.job.method]}, seed {outcome.job.seed}"
    progress.begin(f"{title}, measuring", cost(plan))
    parts = [(weights, when) for weights in WEIGHTS for when in WHEN]
    for number, (weights, when) in enumerate(parts):
        if when in found.get(weights, {}):
            continue
        variables = jax.device_put(outcome.load(weights, when))
        score, answers = _plain(plan, variables)
        if plan.choices["auto_attack"] and weights in plan.choices["auto_attack_weights"]:
            keep = outcome.job.folder / f"auto_attack-{weights}-{when}.npz"
            rows = attacked_rows(plan, outcome.job.seed)
            robust, notes = _auto_attack(plan, variables, rows, keep, progress.show)
            same = answers.robust()[rows]
            score["auto_attack_seen"] = float((robust & same).mean())
            score["pgd_20_seen"] = float(same.mean())
            # Nearly all that AutoAttack breaks, PGD breaks: what it breaks beyond is known better
            # than what both break of a few images.
            left = float((robust & same).sum() / max(same.sum(), 1))
            score["auto_attack"] = left * float(answers.robust().mean())
            found["notes"] += [f"{title}, {weights}, {when} epoch: {note}" for note in notes]
        found.setdefault(weights, {})[when] = score
        runs.write_json(file, found)
        progress.at(cost(plan) * (number + 1) / len(parts))
    clean, robust = (100 * found["student"]["best"][name] for name in ("clean", "pgd_20"))
    progress.end(f"test: clean {clean:.1f} %, PGD-{_STEPS} {robust:.1f} %")
    return found


def examples(plan: plans.Plan, outcomes: Mapping[str, Outcome]) -> dict[str, np.ndarray]:
    """The first test image of some classes under PGD-20 of each method's best student.

    Args:
      plan: the experiment.
      outcomes: of each method, one training.

    Returns:
      ``image``, ``label``, and ``<method>/x_adv``, ``<method>/prediction`` and
      ``<method>/prediction_adv``.
    """
    labels = plan.dataset.labels("test")
    classes = [c for c in range(plan.dataset.num_classes) if (labels == c).any()]
    rows = np.array([int(np.argmax(labels == c)) for c in classes[:_SHOWN]])
    # Filled up to the size of a batch, for which there is a program.
    batch = plan.dataset.read("test", np.resize(rows, max(len(rows), _size(plan))))
    given = {name: batch[name] for name in ("image", "label", "index")}
    found = {name: batch[name][: len(rows)] for name in ("image", "label")}
    for name, outcome in outcomes.items():
        variables = jax.device_put(outcome.load("student", "best"))
        parts = attack.perturbed(plan.student, variables, given, _pgd(plan))
        for key, part in zip(("x_adv", "prediction", "prediction_adv"), parts, strict=True):
            found[f"{name}/{key}"] = part[: len(rows)]
    return found


def spread(size: int, count: int) -> np.ndarray:
    """Row numbers spread evenly over a split, as its order may be that of the classes."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).round().astype(np.int64))


def _size(plan: plans.Plan) -> int:
    """Of batches of both splits: another would take longer to compile than padding to compute."""
    sizes = [plan.dataset.size(split) for split in ("test", "validation")]
    return plans.even(min(_BATCH, *sizes), plan.mesh)


def _pgd(plan: plans.Plan) -> attack.Attack:
    eps = plan.choices["eps"]
    return attack.Attack(eps, eps / 4, _STEPS, plan.choices["norm"])


def _plain(plan: plans.Plan, variables: tuple[Tree, Tree]) -> tuple[Score, attack.Answers]:
    """Accuracies and calibration; the temperatures are those of the validation split."""

    def of(split: str) -> attack.Answers:
        batches = plan.dataset.once(split, _size(plan))
        return attack.answers(plan.student, variables, batches, _pgd(plan), mesh=plan.mesh)

    test, held_out = of("test"), of("validation")
    score: Score = {
        "clean": float(test.right().mean()),
        "pgd_20": float(test.robust().mean()),
    }
    for prefix, logits, reference in (
        ("", test.clean, held_out.clean),
        ("pgd_20_", test.attacked, held_out.attacked),
    ):
        temperature = _temperature(reference, held_out.labels)
        score[f"{prefix}ece"] = _ece(logits, test.labels)
        score[f"{prefix}nll"] = float(metrics.negative_log_likelihood(logits, test.labels))
        score[f"{prefix}temperature"] = temperature
        score[f"{prefix}ece_scaled"] = (
            None if temperature is None else _ece(logits / temperature, test.labels)
        )
    return score, test


def _temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """The best temperature; None where the data have none (no error to learn from)."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = float(metrics.fit_temperature(logits, labels))
    return None if said or not math.isfinite(found) else found


def _ece(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(metrics.expected_calibration_error(jax.nn.softmax(logits), labels))


def attacked_rows(plan: plans.Plan, seed: int) -> np.ndarray:
    """Places, among the labelled test images, of those that AutoAttack sees: each seed has its own.

    So its standard error over the seeds is also that of the choice of the images.
    """
    known = int((plan.dataset.labels("test") >= 0).sum())
    order = _order.permutation(known, plans.ATTACKED, seed)
    return np.sort(order[: plan.choices["auto_attack"]])


def _auto_attack(
    plan: plans.Plan, variables: tuple[Tree, Tree], rows: np.ndarray, keep: Path, show: bool
) -> tuple[np.ndarray, list[str]]:
    """[n] bool, what AutoAttack leaves of these test images, and what there was to warn of."""
    choices, dataset = plan.choices, plan.dataset
    known = np.flatnonzero(dataset.labels("test") >= 0)
    batch = dataset.read("test", known[rows])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = attacks.auto_attack(
            attack.logits_fn(plan.student, variables),
            batch["image"],
            batch["label"],
            eps=choices["eps"],
            norm=choices["norm"],
            key=jax.random.key(_KEY),
            checkpoint=keep,
            progress=show and len(rows) > _LONG,
        )
    return found.robust, notes_of(said)


def notes_of(said: list[warnings.WarningMessage]) -> list[str]:
    """What our own warnings say, each once."""
    return sorted({str(one.message) for one in said if one.category is UserWarning})
