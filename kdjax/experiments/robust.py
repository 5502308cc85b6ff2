"""Adversarial trainings of one network compared, and the robustness of a trained one.

`compare` trains the same student by several methods from the same initial parameters, chooses the
epoch of each on held-out training images, and measures student and averaged weights on the test
split. `evaluate` puts one trained model through `kdjax.attacks.evaluate` and
`kdjax.attacks.gradient_masking`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from kdjax import data as kdata
from kdjax import metrics
from kdjax.experiments import _robust_measure as measuring
from kdjax.experiments import _robust_plan as plans
from kdjax.experiments import _robust_train as training
from kdjax.experiments import measures, runs
from kdjax.experiments._robust_evaluate import Found, evaluate
from kdjax.experiments._robust_plan import METHODS, radius, with_validation
from kdjax.experiments._robust_progress import Progress
from kdjax.experiments._robust_report import Report, Row, from_json, over_seeds, to_json
from kdjax.experiments.ledger import Ledger

__all__ = ["METHODS", "Found", "Report", "Row", "compare", "evaluate", "radius", "with_validation"]

REPORT, EXAMPLES = "robust.json", "examples.npz"


def compare(
    dataset: kdata.Dataset,
    *,
    method: Sequence[str] = ("at", "adr"),
    awp: bool = False,
    model: str | None = None,
    eps: float | None = None,
    norm: str = "linf",
    step_size: float | None = None,
    attack_steps: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    ema_decay: float | None = None,
    temperature: Sequence[float] | None = None,
    mix: Sequence[float] | None = None,
    beta: float = 6.0,
    rho: float | None = None,
    augmentation: str | None = None,
    examples: int | None = None,
    label_noise: float | None = None,
    validation: int | None = None,
    auto_attack: int | None = None,
    auto_attack_weights: Sequence[str] = ("student",),
    eval_every: int = 1,
    seeds: int | Sequence[int] = 3,
    mesh: Mesh | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """Trains a network by several methods and measures what each is worth under attack.

    The best epoch is the first with the highest accuracy under PGD-10 on the validation split, for
    student and average each its own; the test split is read once, when all trainings have ended.
    PGD-10 and PGD-20 take steps of ``eps / 4`` from a random start, on the cross-entropy, and their
    last iterate counts. What is None suits the data: images of up to 16 pixels get a perceptron and
    80 epochs, larger ones the published recipe for as many classes (a ResNet-18, 200 epochs).

    Args:
      dataset: with splits train and test, images in [0, 1].
      method: which of "at" (PGD adversarial training), "trades", "adr" and "adr-trades" (labels
        rectified by the average of the student), each at most once.
      awp: adversarial weight perturbation, in the form of ADR's code, for all of them.
      model: a name in `kdjax.models.BY_NAME`; None is "mlp" or "resnet18".
      eps: radius of all attacks, in units of pixels; None is 0.1 (l2: 0.4) up to 16 pixels, else
        8/255 (0.5).
      norm: "linf" or "l2".
      step_size: of the training attack; None is ``eps / 4``.
      attack_steps: of the training attack; None is 7 or 10.
      epochs: passes over the images that are trained on; None is 80 or the recipe's. The learning
        rate falls to a tenth after a half and three quarters.
      batch_size: images of an update; None is 50 or 128.
      learning_rate: of SGD with momentum 0.9, of Nesterov's kind without ``awp``; None is 0.1.
      weight_decay: None is 0 or 5e-4.
      ema_decay: of the average of the weights, which is ADR's teacher; None is 0.99 or 0.995.
      temperature: of ADR's teacher, at the start and at the end; None is (1.5, 1) or the recipe's.
      mix: the most that it counts in a label, the same; None is (0.5, 0.9) or the recipe's.
      beta: weight of the divergence of TRADES.
      rho: size of AWP's perturbation; None is 0.005 or the recipe's.
      augmentation: a name in `kdjax.experiments.soft_labels.AUGMENTATIONS`; None is "crop_flip" for
        colour images of more than 16 pixels, else "none".
      examples: training images to use, each seed its own choice, stratified; None is 300 of the
        digits, of other data all.
      label_noise: share of the training labels that are replaced by another class, each seed its
        own; None is 0.2 for the digits, else 0. Validation and test labels stay.
      validation: images to hold out of train for the choice of the epoch and for temperatures; None
        is the data's own validation split, or 1,024 images or 2 %, whichever is more, but no more
        than a tenth.
      auto_attack: test images for AutoAttack, each seed its own, 0 for none; None is 32 of the
        digits, of other data none.
      auto_attack_weights: "student", "ema" (the average) or both: which of them it attacks.
      eval_every: epochs between evaluations on the validation split.
      seeds: how many seeds (0, 1, ...), or which ones.
      mesh: devices to split each batch over; None for one device.
      out: folder for checkpoints and the report; None keeps nothing.
      resume: go on where the same call in ``out`` stopped: trainings continue from their
        checkpoints, and what has ended is only read.
      about: JSON-able facts to keep in the run folders, such as where the data came from.
      progress: whether to show a bar on a terminal.

    Returns:
      The `Report`.

    Raises:
      ValueError: an argument is out of range, images outside [0, 1], ``out`` exists and ``resume``
        is False, or ``out`` belongs to other settings.
      FloatingPointError: a training diverged.
      KeyboardInterrupt: after Ctrl-C; with ``out``, the State is saved first.

    Reference:
      Wu, Wang, Chen, "Annealing Self-Distillation Rectification Improves Adversarial Training",
      ICLR 2024; Rice, Wong, Kolter, "Overfitting in Adversarially Robust Deep Learning", ICML 2020.
    """
    given = {
        "method": [method] if isinstance(method, str) else list(method),
        "awp": awp,
        "model": model,
        "eps": eps,
        "norm": norm,
        "step_size": step_size,
        "attack_steps": attack_steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "ema_decay": ema_decay,
        "temperature": temperature,
        "mix": mix,
        "beta": beta,
        "rho": rho,
        "augmentation": augmentation,
        "examples": examples,
        "label_noise": label_noise,
        "auto_attack": auto_attack,
        "auto_attack_weights": list(auto_attack_weights),
        "eval_every": eval_every,
        "seeds": list(range(seeds)) if isinstance(seeds, int) else list(seeds),
    }
    dataset = plans.with_validation(dataset, validation)
    choices = plans.filled(dataset, given)
    plans.check(choices, seeds, dataset)
    plan = plans.make(dataset, choices, mesh, dict(about or {}))
    choices["data"] = {name: dataset.describe(name) for name in ("train", "validation", "test")}
    with contextlib.ExitStack() as stack:
        folder = None if out is None else Path(out).expanduser().absolute()
        ledger = Ledger(folder, choices, resume=resume, about=about)
        if folder is not None and (folder / REPORT).is_file():
            return from_json(runs.read_json(folder / REPORT))
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            report = _run(plan, folder, ledger, progress)
        finally:
            ledger.note()
        runs.write_json(folder / REPORT, to_json(report))
    return report


def _run(plan: plans.Plan, folder: Path, ledger: Ledger, progress: bool) -> Report:
    names, seeds = plan.choices["method"], plan.choices["seeds"]
    each = training.cost(plan) + measuring.cost(plan)
    bar = Progress(len(names) * len(seeds) * each, show=progress)
    learners = {name: plans.learner(plan, name) for name in names}
    init = learners[names[0]].init
    try:
        outcomes = {
            name: [
                training.run(
                    plan,
                    training.Job(name, seed, learners[name], init, folder / name / f"seed-{seed}"),
                    bar,
                )
                for seed in seeds
            ]
            for name in names
        }
        scores = {
            name: [measuring.measure(plan, outcome, bar) for outcome in found]
            for name, found in outcomes.items()
        }
        shown = measuring.examples(plan, {name: found[0] for name, found in outcomes.items()})
    finally:
        bar.close()
    _save(folder / EXAMPLES, shown)
    keeps = ledger.folder is not None
    return Report(
        dataset=plan.dataset.name,
        images={
            "train": plan.choices["examples"],
            **{name: plan.dataset.size(name) for name in ("validation", "test")},
        },
        seeds=seeds,
        rows=[
            _row(name, weights, outcomes[name], scores[name], keeps)
            for name in names
            for weights in plans.WEIGHTS
        ],
        notes=[note for name in names for score in scores[name] for note in score["notes"]],
        device=plans.device(plan.mesh),
        seconds=ledger.seconds(),
        settings=dict(plan.choices),
        folder=None if ledger.folder is None else str(ledger.folder),
    )


def _row(
    name: str,
    weights: str,
    outcomes: Sequence[training.Outcome],
    scores: Sequence[Mapping[str, Any]],
    keeps: bool,
) -> Row:
    curves = [outcome.curves[weights] for outcome in outcomes]
    gaps = [metrics.robust_overfitting(np.array([p[2] for p in curve])) for curve in curves]
    return Row(
        method=name,
        weights=weights,
        best=over_seeds([score[weights]["best"] for score in scores]),
        last=over_seeds([score[weights]["last"] for score in scores]),
        best_epoch=measures.estimate(outcome.best_epoch(weights) for outcome in outcomes),
        overfitting=measures.estimate(float(gap.gap) for gap in gaps),
        curves=curves,
        folders=[str(outcome.folder(weights)) for outcome in outcomes] if keeps else [],
        seconds=measures.estimate(outcome.seconds for outcome in outcomes),
    )


def _save(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    partial = file.with_name(f".{file.name}")
    with open(partial, "wb") as opened:
        np.savez(opened, **dict(arrays))  # type: ignore[arg-type]
    os.replace(partial, file)
