"""What a comparison of condensed sets is about: the images, the target network, the settings."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax import _checks, adapters, augment, core, models, train
from kdjax import data as kdata
from kdjax._pairs import Batch, Model, Tree
from kdjax.experiments import runs
from kdjax.experiments._condense_train import outputs
from kdjax.methods import barlow_twins

STARTS: Mapping[str, str] = MappingProxyType(
    {"kmeans": "k-means", "random": "random", "herding": "herding"}
)
SOLVERS = ("auto", "dual", "primal", "svd")
SHOTS = (1, 5)
_TARGET = "target.json"
_TAP = "pool"
_TINY = 16
# Of the pool's network as published, by how often an image can be halved.
_WIDTHS: Mapping[int, tuple[int, ...]] = MappingProxyType(
    {4: (128, 256, 512), 5: (128, 256, 512), 6: (64, 128, 256, 512), 7: (32, 64, 128, 256, 512)}
)
_PROBED = 2000  # rows of the target classes whose features are standardised by
Report = Callable[[int, dict[str, Any]], None]


class Side(NamedTuple):
    """Images [N, H, W, C], standardised by the source's mean and deviation, and labels [N]."""

    image: np.ndarray
    label: np.ndarray


class Task(NamedTuple):
    """Images of the source and of the target classes.

    Attributes:
      source: what is condensed; its labels are not used.
      source_test: held-out images of the same classes.
      target_train: of the target classes, for a few labelled rows.
      target_test: of the target classes.
      mean: [C], of the source's pixels.
      std: [C], the same.
    """

    source: Side
    source_test: Side
    target_train: Side
    target_test: Side
    mean: np.ndarray
    std: np.ndarray

    def pixels(self, image: np.ndarray) -> np.ndarray:
        """Standardised images as they were, usually in [0, 1]."""
        found: np.ndarray = image * self.std + self.mean
        return found


class Target(NamedTuple):
    """The network whose features are regressed on.

    Attributes:
      network: its ``logits`` are the features.
      variables: ``(params, extra)``.
      mean: [C], with which it wants its images standardised.
      std: [C], the same.
      words: what it is.
    """

    network: Model
    variables: tuple[Tree, Tree]
    mean: np.ndarray
    std: np.ndarray
    words: str

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """Features [N, k] of images as they are."""
        return outputs(self.network, self.variables, (pixels - self.mean) / self.std)


def published(shape: Sequence[int]) -> bool:
    """Whether images are of the kind that the published settings are for: in colour, not tiny."""
    return shape[-1] == 3 and min(shape[:2]) > _TINY


def filled(dataset: kdata.Dataset, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with those that are None replaced by what suits the data."""
    if len(dataset.shape) != 3:
        raise ValueError(
            f"data must be images [H, W, C], got examples of shape {tuple(dataset.shape)}."
        )
    for split in ("train", "test"):
        _checks.entry(f"data set {dataset.name!r}", dataset.splits, split)
    large, classes = published(dataset.shape), dataset.num_classes
    halves = max(1, min(dataset.shape[:2]).bit_length() - 1)
    tiny = tuple(min(32 << i, 256) for i in range(halves))
    source = given["source_classes"]
    source = list(range(max(1, classes // 2))) if source is None else list(source)
    rest = [name for name in range(classes) if name not in source]
    size = sum(int(np.isin(labels, source).sum()) for _, labels in _splits(dataset, "train"))
    own = given["target"] is None
    defaults: dict[str, Any] = {
        "source_classes": source,
        "target_classes": rest or source,
        "target_model": "resnet18" if large and own else None,
        "target_epochs": (2000 if large else 60) if own else None,
        "pairs": min(1000 if large else 30, max(1, size)),
        "widths": _WIDTHS.get(halves, _WIDTHS[7]) if large else tiny[: max(1, halves - 1)],
        "steps": 160_000 if large else 1500,
        "learning_rate": 1e-4 if large else 3e-3,
        "batch_size": 1024 if large else 256,
        "pool_size": 10 if large else 5,
    }
    known = {name: value for name, value in given.items() if value is not None}
    found = {**given, **defaults, **known}
    found["target_widths"] = list(tiny) if own and found["target_model"] is None else None
    for name in ("source_classes", "target_classes", "widths"):
        found[name] = list(found[name])
    return found


def check(choices: Mapping[str, Any], dataset: kdata.Dataset, seeds: Any) -> None:
    """Refuses arguments of `kdjax.experiments.condense.compare` that are out of range."""
    for name in ("source_classes", "target_classes"):
        found = [
            _checks.count(name, number, low=0, high=dataset.num_classes - 1)
            for number in choices[name]
        ]
        if not found or len(set(found)) < len(found):
            raise ValueError(f"{name} must name each class once, and at least one, got {found}.")
    if len(choices["target_classes"]) < 2:
        raise ValueError(
            f"target_classes must be at least two, to be told apart, got "
            f"{choices['target_classes']}."
        )
    if choices["target"] is not None:
        for name in ("target_model", "target_epochs"):
            if choices[name] is not None:
                raise ValueError(
                    f"{name} must be left out with a target network that is there already, got "
                    f"{choices[name]!r}."
                )
    else:
        _checks.count("target_epochs", choices["target_epochs"])
    if choices["target_model"] is not None:
        _checks.choice("target_model", choices["target_model"], models.BY_NAME)
    _checks.choice("start", choices["start"], STARTS)
    _checks.choice("solver", choices["solver"], SOLVERS)
    _checks.number("learning_rate", choices["learning_rate"], above=0)
    for name in ("pairs", "steps", "batch_size", "pool_size", "max_age", "pretrain_epochs"):
        _checks.count(name, choices[name])
    for name in ("fine_tune_steps", "draws"):
        _checks.count(name, choices[name])
    for width in choices["widths"]:
        _checks.count("widths", width)
    if isinstance(seeds, int):
        _checks.count("seeds", seeds)
    numbers = [_checks.count("seeds", seed, low=0) for seed in choices["seeds"]]
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"seeds must be different from each other, at least one, got {numbers}.")


def load(dataset: kdata.Dataset, choices: Mapping[str, Any]) -> Task:
    """Reads the images of both tasks; a validation split is trained on, as nothing is chosen by it.

    Raises:
      ValueError: a class has too few images, or there are fewer source images than pairs.
    """
    source, target = choices["source_classes"], choices["target_classes"]
    image, label = _read(dataset, "train", source)
    if choices["pairs"] > len(image):
        raise ValueError(
            f"pairs must be at most {len(image)}, the source images there are, got "
            f"{choices['pairs']}."
        )
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"data must be images in [0, 1], got values from {low:.4g} to {high:.4g}.")
    mean = image.mean((0, 1, 2), dtype=np.float64).astype(np.float32)
    std = np.maximum(image.std((0, 1, 2), dtype=np.float64), 1e-6).astype(np.float32)
    target_train = _read(dataset, "train", target)
    for name in target:
        count = int((target_train.label == name).sum())
        if count < max(SHOTS):
            raise ValueError(
                f"target_classes must have at least {max(SHOTS)} training images each, got "
                f"{count} of class {name}."
            )
    sides = (_read(dataset, "test", source), target_train, _read(dataset, "test", target))
    for name, side in (("source_classes", sides[0]), ("target_classes", sides[2])):
        if len(side.label) < 2:
            raise ValueError(f"{name} must have test images, got {len(side.label)} of them.")
    scaled = [Side((x - mean) / std, y) for x, y in (Side(image, label), *sides)]
    return Task(scaled[0], scaled[1], scaled[2], scaled[3], mean, std)


def draws(task: Task, count: int) -> tuple[np.ndarray, dict[int, list[np.ndarray]]]:
    """Rows of target_train that the probes know, and for 1 and 5 shots which of those are labelled.

    They are the same for every seed and every set, so that differences are of the sets.
    """
    label = task.target_train.label
    chosen = {
        shots: [
            np.concatenate(
                [
                    draw.choice(np.flatnonzero(label == name), shots, replace=False)
                    for name in np.unique(label)
                ]
            )
            for draw in [np.random.default_rng((shots, i)) for i in range(count)]
        ]
        for shots in SHOTS
    }
    some = np.random.default_rng(0).permutation(len(label))[:_PROBED]
    rows = np.unique(np.concatenate([some, *(x for found in chosen.values() for x in found)]))
    return rows, {k: [np.searchsorted(rows, x) for x in found] for k, found in chosen.items()}


# Kept, so that the programs compiled for a network are found again.
@functools.lru_cache(maxsize=16)
def student(outputs: int, widths: tuple[int, ...]) -> Model:
    """The network of the pool, which is also what is pre-trained."""
    module = models.PooledConvNet(outputs, widths=widths)
    return adapters.from_linen(module, taps={"features": "pool"})


def check_student(choices: Mapping[str, Any], shape: Sequence[int]) -> None:
    """Refuses widths that the images are too small for."""
    example = jax.ShapeDtypeStruct((2, *shape), "float32")
    jax.eval_shape(student(1, tuple(choices["widths"])).init, jax.random.key(0), example)


def check_target(choices: Mapping[str, Any], shape: Sequence[int]) -> None:
    """Refuses a target network that can't read the images."""
    name = choices["target_model"]
    backbone = _backbone(name, tuple(choices["target_widths"] or ()))
    runs.check_input(backbone, name or "convnet", tuple(shape), "target_model")


def target_batch(task: Task) -> int:
    """Images of an update of the target network."""
    image = task.source.image
    return min(256 if published(image.shape[1:]) else 157, len(image))


def trained_target(
    task: Task, choices: Mapping[str, Any], folder: Path, report: Report | None = None
) -> Target:
    """Trains the target network on the source images by Barlow Twins, or reads what has ended."""
    image, large = task.pixels(task.source.image), published(task.source.image.shape[1:])
    size = target_batch(task)
    batches = kdata.arrays({"train": {"image": image}}, num_classes=1, name="source").batches(
        "train", size, seed=0
    )
    per_epoch = len(image) // size
    steps = choices["target_epochs"] * per_epoch
    about = {name: choices[name] for name in ("target_model", "target_widths", "target_epochs")}
    about["steps"] = steps
    about |= {"mean": task.mean.tolist(), "std": task.std.tolist(), "shape": list(image.shape[1:])}
    runs.write_json(folder / _TARGET, about)
    backbone = _backbone(about["target_model"], tuple(about["target_widths"] or ()))
    method = barlow_twins.barlow_twins(
        backbone,
        projector=(512, 1024) if large else (256, 256),
        tap=_TAP,
        off_diagonal=0.0078125 if large else 0.0051,
        augment=_views(task, large),
    )
    warm_up = min(10 * per_epoch, steps - 1) if large else 0
    rate = 0.01 * size / 256 if large else 1e-3
    tx = barlow_twins.optimizer(steps=steps, learning_rate=rate, warm_up_steps=warm_up)
    learner = core.minimize(method, tx)
    state = train.fit(
        learner,
        learner.init(jax.random.key(0), batches.at(0)),
        batches,
        steps=steps,
        checkpoint=folder,
        save_every=max(100, steps // 10),
        keep=1,
        progress=False,
        plot=False,
        report=report,
    )
    variables = state.params["student"], state.extra["student"]
    return Target(_features(backbone), variables, task.mean, task.std, words(choices))


def given_target(folder: str | os.PathLike[str], dataset: kdata.Dataset) -> Target:
    """A target network that was trained before: by this experiment, or on labels.

    Raises:
      ValueError: there is none, or it doesn't fit the data.
    """
    path = Path(folder)
    inside = [there for there in (path, path / "target") if (there / _TARGET).is_file()]
    if not inside:
        found = runs.load(path, dataset, argument="target")
        network = adapters.from_linen(
            models.BY_NAME[found.name](dataset.num_classes), taps={_TAP: _TAP}
        )
        channels = dataset.shape[-1]
        same = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        text = f"{found.name} of {folder}, trained as {found.manifest.get('role', 'a model')}"
        return Target(_features(network), found.variables[0], *same, words=text)
    about = runs.read_json(inside[0] / _TARGET)
    if tuple(about["shape"]) != tuple(dataset.shape):
        raise ValueError(
            f"target must read images of shape {tuple(dataset.shape)}, got {folder}, whose network "
            f"reads {tuple(about['shape'])}."
        )
    backbone = _backbone(about["target_model"], tuple(about["target_widths"] or ()))
    mean, std = (np.asarray(about[name], np.float32) for name in ("mean", "std"))
    try:
        variables = train.load_student(inside[0], step=about["steps"])
    except ValueError:
        raise ValueError(
            f"target must be a trained network, got {folder}, whose training did not come to its "
            f"last update {about['steps']}; resume that run first."
        ) from None
    return Target(_features(backbone), variables, mean, std, f"{words(about)}, of {folder}")


def words(choices: Mapping[str, Any]) -> str:
    """The trained target network in words."""
    widths = "-".join(map(str, choices["target_widths"] or ()))
    name = choices["target_model"] or f"ConvNet {widths}"
    return f"{name} by Barlow Twins, {choices['target_epochs']} epochs"


def _features(backbone: Model) -> Model:
    return barlow_twins.features(backbone, tap=_TAP)


def _backbone(name: str | None, widths: tuple[int, ...]) -> Model:
    # Its classifier is not trained.
    module = models.PooledConvNet(1, widths=widths) if name is None else models.BY_NAME[name](2)
    return adapters.from_linen(module, taps={_TAP: _TAP})


def _views(task: Task, large: bool) -> Callable[[jax.Array, Batch], Batch]:
    """Two standardised views of images in [0, 1]."""
    if large:
        mean, std = task.mean.tolist(), task.std.tolist()
        return augment.simclr_views(mean=mean, std=std)
    views = augment.digits_views()

    def standardised(key: jax.Array, batch: Batch) -> Batch:
        found = views(key, batch)
        return found | {
            name: (found[name] - task.mean[None, None, None]) / task.std[None, None, None]
            for name in ("view1", "view2")
        }

    return standardised


def _splits(dataset: kdata.Dataset, split: str) -> list[tuple[str, np.ndarray]]:
    names = [split, *(["validation"] if split == "train" else [])]
    return [(name, dataset.labels(name)) for name in names if name in dataset.splits]


def _read(dataset: kdata.Dataset, split: str, classes: Sequence[int]) -> Side:
    found = [
        dataset.read(name, np.flatnonzero(np.isin(labels, classes)))
        for name, labels in _splits(dataset, split)
    ]
    image, label = (np.concatenate([part[name] for part in found]) for name in ("image", "label"))
    return Side(image, label)
