"""A student alone against the same student distilled with soft labels.

The teacher is trained first (or read from a checkpoint, or from stored outputs), then, from each
seed, the student on the labels alone and the student on labels and teacher, with the same network,
initial parameters, number of updates, batch size, learning rate and augmentation.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from kdjax import core, terms
from kdjax import data as kdata
from kdjax._pairs import Learner, Model, Term, Tree
from kdjax.experiments import _plan, measures, runs, training
from kdjax.experiments._measured import row
from kdjax.experiments._plan import AUGMENTATIONS, with_validation
from kdjax.experiments._progress import Progress
from kdjax.experiments.ledger import Ledger
from kdjax.experiments.report import Report

__all__ = ["AUGMENTATIONS", "compare", "with_validation"]

_EVALUATIONS = 12
_BATCH = 256
_WEIGHT_DECAY = 1e-4
_TINY = 16


def compare(
    dataset: kdata.Dataset,
    *,
    teacher_model: str = "convnet",
    student_model: str = "mlp_small",
    teacher: str | os.PathLike[str] | None = None,
    teacher_outputs: kdata.StoredOutputs | None = None,
    temperature: float = 4.0,
    hard: float = 0.1,
    soft: float = 0.9,
    steps: int = 1500,
    teacher_steps: int = 500,
    batch_size: int = 64,
    learning_rate: float = 0.03,
    teacher_learning_rate: float = 0.003,
    augmentation: str | None = None,
    teacher_augmentation: str | None = None,
    labels_per_class: int | None = None,
    label_seed: int = 0,
    teacher_sees: str = "few",
    seeds: int | Sequence[int] = 5,
    mesh: Mesh | None = None,
    together: bool | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """Trains teacher, control and distilled student, and measures all three on the test split.

    The student minimises ``hard * cross-entropy(labels) + soft * T^2 KL(teacher || student)``; the
    control minimises the cross-entropy. With few labels the control and the teacher draw their
    batches from the labelled rows only, and the distilled student draws from all rows, whose labels
    count where there are any. No choice is made on the test split: it is read once, at the end.

    Args:
      dataset: with splits train and test. Where there is no validation split, a tenth of train
        becomes one; it serves the curves.
      teacher_model: a name in `kdjax.models.BY_NAME`.
      student_model: likewise.
      teacher: run folder of a trained teacher, instead of training one.
      teacher_outputs: a teacher's stored outputs on the training split, instead of a teacher. They
        are those of the images as they are, also where the student sees augmented ones.
      temperature: T, above 0.
      hard: weight of the labels, at least 0.
      soft: weight of the teacher, at least 0.
      steps: updates of each student.
      teacher_steps: updates of the teacher.
      batch_size: examples for each update; fewer where fewer are labelled.
      learning_rate: of the students; AdamW with weight decay 1e-4, cosine decay to 0.
      teacher_learning_rate: of the teacher.
      augmentation: of the students' images, which the teacher sees as well when it teaches; a name
        in `AUGMENTATIONS`: "affine" (rotation by up to 5 degrees, shift and zoom by up to 5 %),
        "affine_wide" (10 degrees, 10 %), "crop_flip" (shift by up to 4 pixels, mirror), "none".
        By default "affine" for images of up to 16 pixels and "none" for larger ones, whose detail
        the interpolation would blur, and with ``teacher_outputs``, which are of the images as they
        are.
      teacher_augmentation: while the teacher is trained; by default "affine_wide" or "none".
      labels_per_class: keep only so many labels of each class; None keeps all.
      label_seed: which ones.
      teacher_sees: "few": the teacher has the same few labels; "all": all of them.
      seeds: how many seeds (0, 1, ...), or which ones, for initial parameters, order of the data
        and augmentation. There is one teacher, from the first of them.
      mesh: devices to split each batch over; None for one device.
      together: train all seeds in one vmapped program; by default on accelerators only, as on CPU
        convolutions with one kernel for each seed are slow.
      out: folder for checkpoints and the report; None keeps nothing.
      resume: go on where the same call in ``out`` stopped; each training continues from its
        checkpoint, and the accuracies are those of an unbroken run.
      about: JSON-able facts to keep in the run folders, such as where the data came from.
      progress: whether to show a bar on a terminal.

    Returns:
      The `Report`.

    Raises:
      ValueError: an argument is out of range, ``out`` exists and ``resume`` is False, or ``out``
        belongs to other settings.
      KeyboardInterrupt: after Ctrl-C; with ``out``, the State is saved first.

    Reference:
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    tiny = max(dataset.shape[:2]) <= _TINY
    choices: dict[str, Any] = {
        "teacher_model": teacher_model if teacher is None and teacher_outputs is None else None,
        "student_model": student_model,
        "teacher": None if teacher is None else str(Path(teacher).expanduser().absolute()),
        "teacher_outputs": None if teacher_outputs is None else dict(teacher_outputs.manifest),
        "temperature": temperature,
        "hard": hard,
        "soft": soft,
        "steps": steps,
        "teacher_steps": teacher_steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "teacher_learning_rate": teacher_learning_rate,
        "augmentation": augmentation or ("affine" if tiny and teacher_outputs is None else "none"),
        "teacher_augmentation": teacher_augmentation or ("affine_wide" if tiny else "none"),
        "labels_per_class": labels_per_class,
        "label_seed": label_seed,
        "teacher_sees": teacher_sees,
        "seeds": list(range(seeds)) if isinstance(seeds, int) else list(seeds),
    }
    _plan.check(choices, seeds)
    together = jax.default_backend() != "cpu" if together is None else together
    dataset = with_validation(dataset)
    choices["data"] = dataset.describe("train")
    plan = _plan.make(dataset, choices, teacher, teacher_outputs, mesh, dict(about or {}))
    folder = None if out is None else Path(out).expanduser().absolute()
    ledger = Ledger(folder, choices, resume=resume, about=about)
    if ledger.finished is not None:
        return ledger.finished
    students = 2 * len(choices["seeds"]) * steps
    bar = Progress(students + (teacher_steps if plan.ready is None else 0), show=progress)
    setting = training.Setting(
        validation=dataset.once("validation", _even(_BATCH, mesh)),
        eval_every=-(-steps // _EVALUATIONS),
        mesh=mesh,
        together=together,
        out=folder,
        progress=bar,
    )
    try:
        found = _train(plan, setting)
        bar.note("measuring")
        report = _report(plan, found, ledger)
    finally:
        bar.close()
        ledger.note()
    ledger.end(report)
    return report


class _Found(NamedTuple):
    teacher: _plan.Teacher
    alone: list[training.Outcome]
    distilled: list[training.Outcome]


def _train(plan: _plan.Plan, setting: training.Setting) -> _Found:
    choices = plan.choices
    teacher = plan.ready
    if teacher is None:
        name = choices["teacher_model"]
        network = runs.network(name, plan.dataset.num_classes)
        every = -(-choices["teacher_steps"] // _EVALUATIONS)
        job = _job(plan, "teacher", network, name, plan.for_teacher)
        (outcome,) = training.run(job, choices["seeds"][:1], setting._replace(eval_every=every))
        teacher = _plan.Teacher(network, name, outcome, _plan.count_labels(plan.for_teacher))
    frozen = None if teacher.outcome is None else jax.device_put(teacher.outcome.variables)
    name = choices["student_model"]
    alone = _job(plan, "alone", plan.student, name, plan.labelled)
    distilled = _job(plan, "distilled", plan.student, name, plan.partly, teacher.model, frozen)
    distilled = distilled._replace(init=alone.init)
    return _Found(
        teacher,
        training.run(alone, choices["seeds"], setting),
        training.run(distilled, choices["seeds"], setting),
    )


def _job(
    plan: _plan.Plan,
    role: str,
    network: Model,
    name: str,
    dataset: kdata.Dataset,
    teacher: Model | None = None,
    frozen: Tree = None,
) -> training.Job:
    choices = plan.choices
    steps = choices["teacher_steps" if role == "teacher" else "steps"]
    size = _even(min(choices["batch_size"], dataset.size("train")), plan.mesh)
    if size == 0:
        raise ValueError(
            f"devices must be at most {dataset.size('train')}, the labelled examples there are, "
            f"got {plan.mesh.size if plan.mesh else 1}."
        )
    learner = _learner(plan, role, network, teacher, steps=steps)
    return training.Job(
        role=role,
        learner=learner,
        init=learner.init,
        model=network,
        batches=lambda seed: dataset.batches("train", size, seed=seed),
        steps=steps,
        frozen=frozen,
        manifest={
            "experiment": "soft_labels",
            "model": name,
            "num_classes": plan.dataset.num_classes,
            "shape": list(plan.dataset.shape),
            "data": plan.dataset.name,
            "labels": _plan.count_labels(dataset),
            **plan.about,
        },
    )


def _learner(
    plan: _plan.Plan, role: str, network: Model, teacher: Model | None, *, steps: int
) -> Learner:
    choices = plan.choices
    prefix = "teacher_" if role == "teacher" else ""
    wanted: dict[str, tuple[float, Term]] = {"hard": (1.0, terms.hard_labels())}
    if teacher is not None:
        wanted = {
            "hard": (choices["hard"], terms.hard_labels()),
            "soft": (
                choices["soft"],
                terms.soft_labels(temperature=choices["temperature"]),
            ),
        }
    change = AUGMENTATIONS[choices[f"{prefix}augmentation"]]
    method = core.distill(network, teacher, wanted, augment=change)
    schedule = optax.cosine_decay_schedule(choices[f"{prefix}learning_rate"], steps)
    return core.minimize(method, optax.adamw(schedule, weight_decay=_WEIGHT_DECAY))


def _even(size: int, mesh: Mesh | None) -> int:
    """The largest multiple of the devices that isn't above ``size``."""
    return size if mesh is None else size - size % mesh.size


def _report(plan: _plan.Plan, found: _Found, ledger: Ledger) -> Report:
    """Measures everything on the test split."""
    choices, dataset, source = plan.choices, plan.dataset, found.teacher
    teacher, logits = None, None
    if source.name is not None and source.outcome is not None:
        teacher, logits = row(
            "teacher", source.name, source.model, [source.outcome], dataset, labels=source.labels
        )
    rows = {
        role: row(
            role,
            choices["student_model"],
            plan.student,
            outcomes,
            dataset,
            labels=_plan.count_labels(plan.labelled),
            teacher_logits=logits,
            teacher_parameters=None if teacher is None else teacher.parameters,
        )[0]
        for role, outcomes in (("alone", found.alone), ("distilled", found.distilled))
    }
    # One network: what differs between two measurements of its latency is noise.
    rows["distilled"] = dataclasses.replace(rows["distilled"], latency_ms=rows["alone"].latency_ms)
    return Report(
        dataset=dataset.name,
        rows=dataset.size("train"),
        seeds=choices["seeds"],
        teacher=teacher,
        gain=measures.gain(rows["alone"].accuracy.values, rows["distilled"].accuracy.values),
        device=f"{plan.mesh.size if plan.mesh else 1} x {jax.devices()[0].device_kind}",
        seconds=ledger.seconds(),
        settings=dict(choices),
        folder=None if ledger.folder is None else str(ledger.folder),
        **rows,
    )
