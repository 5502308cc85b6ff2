"""What a comparison of a student alone and distilled trains on what; its arguments, checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from kdjax import _checks, augment, models
from kdjax import data as kdata
from kdjax._pairs import Batch, Model
from kdjax.experiments import runs, training
from kdjax.experiments._stored import stored_teacher

AUGMENTATIONS: Mapping[str, Callable[..., Batch] | None] = MappingProxyType(
    {
        "none": None,
        "affine": augment.compose(partial(augment.affine, rotate=5.0, translate=0.05, scale=0.05)),
        "affine_wide": augment.compose(augment.affine),
        "crop_flip": augment.compose(augment.random_crop, augment.random_flip),
    }
)


def with_validation(dataset: kdata.Dataset) -> kdata.Dataset:
    """The data with a validation split, a tenth of train where it has none.

    Args:
      dataset: with splits train and test.

    Returns:
      The data set.

    Raises:
      ValueError: there is no such split.
    """
    for split in ("train", "test"):
        _checks.entry(f"data set {dataset.name!r}", dataset.splits, split)
    return dataset if "validation" in dataset.splits else dataset.hold_out(0.1)


class Teacher(NamedTuple):
    """A teacher and how it came to be; stored outputs have no name and no outcome."""

    model: Model
    name: str | None
    outcome: training.Outcome | None
    labels: int


class Plan(NamedTuple):
    """What is trained on what."""

    choices: Mapping[str, Any]
    dataset: kdata.Dataset
    labelled: kdata.Dataset
    partly: kdata.Dataset
    for_teacher: kdata.Dataset
    student: Model
    ready: Teacher | None
    mesh: Mesh | None
    about: Mapping[str, Any]


def check(choices: Mapping[str, Any], seeds: Any) -> None:
    """Refuses arguments of `kdjax.experiments.soft_labels.compare` that are out of range."""
    _checks.number("temperature", choices["temperature"], above=0)
    for name in ("hard", "soft"):
        _checks.number(name, choices[name], low=0)
    if choices["hard"] == choices["soft"] == 0:
        raise ValueError("hard and soft must not both be 0, as nothing would be learnt.")
    for name in ("learning_rate", "teacher_learning_rate"):
        _checks.number(name, choices[name], above=0)
    for name in ("steps", "teacher_steps", "batch_size"):
        _checks.count(name, choices[name])
    if choices["labels_per_class"] is not None:
        _checks.count("labels_per_class", choices["labels_per_class"])
    _checks.count("label_seed", choices["label_seed"], low=0)
    if isinstance(seeds, int):
        _checks.count("seeds", seeds)
    found = [_checks.count("seeds", seed, low=0) for seed in choices["seeds"]]
    if not found or len(set(found)) < len(found):
        raise ValueError(f"seeds must be different from each other and at least one, got {found}.")
    for name in ("augmentation", "teacher_augmentation"):
        _checks.choice(name, choices[name], AUGMENTATIONS)
    _checks.choice("teacher_sees", choices["teacher_sees"], ("few", "all"))
    for name in ("teacher_model", "student_model"):
        if choices[name] is not None:
            _checks.choice(name, choices[name], models.BY_NAME)
    if choices["teacher"] is not None and choices["teacher_outputs"] is not None:
        raise ValueError("teacher must be None with teacher_outputs, got both.")


def make(
    dataset: kdata.Dataset,
    choices: Mapping[str, Any],
    teacher: str | os.PathLike[str] | None,
    outputs: kdata.StoredOutputs | None,
    mesh: Mesh | None,
    about: Mapping[str, Any],
) -> Plan:
    """Data for each of the three, and the networks."""
    batch_size, size = choices["batch_size"], dataset.size("train")
    devices = 1 if mesh is None else mesh.size
    if batch_size % devices:
        raise ValueError(
            f"batch_size must be a multiple of the {devices} devices, got {batch_size}."
        )
    if batch_size > size:
        raise ValueError(
            f"batch_size must be at most {size}, the size of split 'train', got {batch_size}."
        )
    partly = dataset
    if choices["labels_per_class"] is not None:
        partly = _few(dataset, choices["labels_per_class"], choices["label_seed"])
    labelled = _labelled(partly)
    for_teacher = labelled if choices["teacher_sees"] == "few" else _labelled(dataset)
    name, ready = choices["student_model"], None
    student = runs.network(name, dataset.num_classes, argument="student_model")
    runs.check_input(student, name, dataset.shape, "student_model")
    if teacher is not None:
        ready = _load_teacher(teacher, dataset)
    elif outputs is not None:
        partly = partly.with_outputs(outputs)
        ready = Teacher(stored_teacher(outputs, choices["temperature"]), None, None, 0)
    else:
        name = choices["teacher_model"]
        network = runs.network(name, dataset.num_classes)
        runs.check_input(network, name, dataset.shape, "teacher_model")
    return Plan(choices, dataset, labelled, partly, for_teacher, student, ready, mesh, about)


def _few(dataset: kdata.Dataset, per_class: int, seed: int) -> kdata.Dataset:
    labels = dataset.labels("train")
    counts = np.unique(labels[labels >= 0], return_counts=True)[1]
    rarest = int(counts.min()) if len(counts) else 0
    if per_class > rarest:
        raise ValueError(
            f"labels_per_class must be at most {rarest}, the labels of the rarest class in split "
            f"'train' of {dataset.name!r}, got {per_class}."
        )
    return dataset.keep_labels(per_class, seed=seed)


def _load_teacher(folder: str | os.PathLike[str], dataset: kdata.Dataset) -> Teacher:
    found = runs.load(folder, dataset, argument="teacher")
    seconds, labels = found.manifest["seconds"], found.manifest["labels"]
    seed, variables = found.manifest["seeds"][0], found.variables[0]
    outcome = training.Outcome(seed, variables, [], seconds, found.folder)
    return Teacher(found.model, found.name, outcome, labels)


def _labelled(dataset: kdata.Dataset) -> kdata.Dataset:
    """The labelled rows of the training split, in memory where that isn't all of them."""
    labels = dataset.labels("train")
    rows = np.flatnonzero(labels >= 0)
    if len(rows) == len(labels):
        return dataset
    if not len(rows):
        raise ValueError(f"split 'train' of {dataset.name!r} must have labels, got none.")
    columns = dataset.read("train", rows, raw=True)
    columns.pop("index")
    return kdata.arrays(
        {"train": columns}, num_classes=dataset.num_classes, name=f"{dataset.name}, labelled rows"
    )


def count_labels(dataset: kdata.Dataset) -> int:
    """Labelled examples of the training split."""
    return int((dataset.labels("train") >= 0).sum())
