"""The CIFAR-100 recipe of the distillation literature: data, networks, one training.

SGD with momentum 0.9 and coupled weight decay 5e-4 on everything that is trained, batch 64 (the
last batch of an epoch has 16), 240 epochs, learning rate 0.05 (0.01 for MobileNet and ShuffleNet
students), a tenth of it after epochs 150, 180 and 210; random crops of 32 padded by 4 and flips.

Images and labels lie on the device; a step gets the positions of its rows, and gathers, crops and
flips them itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _recipes import RESULT, Outcome, Run, Steps, cut, trained

import kdjax as kd
from kdjax.methods import projector_distillation

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
EPOCHS, DROPS, BATCH = 240, (150, 180, 210), 64
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
NETWORKS = kd.models.BY_NAME
# Students that are trained from a learning rate of 0.01.
GENTLE = ("mobilenetv2", "shufflev1", "shufflev2")


class Training(NamedTuple):
    """What is the same for the teacher and every student.

    Attributes:
      dataset: with the splits train and test, in memory.
      epochs: passes; the drops move with them.
      batch_size: rows of an update.
      steps: of an epoch.
      dtype: of forward passes.
      save_every: epochs between checkpoints.
    """

    dataset: kd.data.Dataset
    epochs: int
    batch_size: int
    steps: Steps
    dtype: str
    save_every: int

    @property
    def drops(self) -> tuple[float, ...]:
        """Epochs after which the learning rate drops."""
        return tuple(self.scaled(drop) for drop in DROPS)

    def scaled(self, epochs: float) -> float:
        """Epochs of the recipe's 240 in those of this one."""
        return epochs * self.epochs / EPOCHS


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the recipe."""
    add = parser.add_argument
    add("--pair", default="resnet32x4-resnet8x4", help="TEACHER-STUDENT; --list names the rows")
    add("--data", default="tfds:cifar100", help="tfds:NAME or PATH.npz (default: tfds:cifar100)")
    add("--epochs", type=int, default=EPOCHS, help=f"default {EPOCHS}; the drops move with it")
    add("--batch-size", type=int, default=BATCH, help=f"default {BATCH}")
    add("--learning-rate", type=float, help="of the student (default: the recipe's)")
    add("--steps-per-call", type=int, help="updates in one dispatch (default: chosen)")
    add("--rows", type=int, help="only the first rows of each split, for a trial")


def training_of(options: argparse.Namespace) -> Training:
    """The data, and how an epoch of it is cut."""
    dataset = load(options.data, options.data_dir, options.rows)
    training = Training(
        dataset,
        options.epochs,
        options.batch_size,
        cut(
            dataset.size("train"),
            options.batch_size,
            devices=options.devices,
            per_call=options.steps_per_call,
        ),
        options.dtype,
        options.save_every or 10,
    )
    print(f"{dataset.name}: {training.steps}", file=sys.stderr)
    return training


def pair_of(name: str, networks: Sequence[str] = tuple(NETWORKS)) -> tuple[str, str]:
    """The names of teacher and student."""
    names = name.split("-")
    if len(names) != 2 or not all(one in networks for one in names):
        raise SystemExit(
            f"--pair must be TEACHER-STUDENT of {', '.join(sorted(networks))}, got {name!r}."
        )
    return names[0], names[1]


def load(data: str, data_dir: str | None, rows: int | None) -> kd.data.Dataset:
    """The splits train and test in memory: decoding them anew in each epoch would take longest."""
    if data.startswith("tfds:"):
        source = kd.data.tfds(data.removeprefix("tfds:"), data_dir, validation=0)
    else:
        source = kd.data.npz(data, validation=0)
    splits = {}
    for name in ("train", "test"):
        size = source.size(name)
        part = source.read(name, np.arange(min(rows or size, size)), raw=True)
        splits[name] = {key: part[key] for key in ("image", "label")}
    return kd.data.arrays(splits, num_classes=source.num_classes, name=source.name)


def normalized(batch: Mapping[str, Any]) -> jax.Array:
    """The images of a batch, less their mean and over their spread."""
    return kd.augment.normalize(batch["image"], MEAN, STD)


# Kept, so that the programs compiled for a Model are found again.
@functools.lru_cache(maxsize=8)
def model_of(name: str, num_classes: int, dtype: str) -> kd.Model:
    """A network that normalises images itself and taps what its classifier reads."""
    return kd.from_linen(
        NETWORKS[name](num_classes),
        taps={"feat": "pool"},
        dtype=None if dtype == "float32" else jnp.dtype(dtype),
        inputs=normalized,
    )


def augmentation() -> Callable[..., Any]:
    """Random crops and flips, drawn from the step's key and each image's index."""
    crop = functools.partial(kd.augment.random_crop, padding=4)
    return kd.augment.compose(crop, kd.augment.random_flip)


def optimizer_of(training: Training, learning_rate: float) -> optax.GradientTransformation:
    """SGD with the recipe's drops."""
    return projector_distillation.cifar100_optimizer(
        steps_per_epoch=training.steps.per_epoch,
        learning_rate=learning_rate,
        drops=training.drops,
        weight_decay=WEIGHT_DECAY,
        momentum=MOMENTUM,
    )


def rate_of(student: str) -> float:
    """The recipe's learning rate of a network."""
    return 0.01 if student in GENTLE else 0.05


def alone(student: kd.Model) -> kd.Method:
    """Hard labels."""
    terms = {"hard": (1.0, kd.terms.hard_labels())}
    return kd.distill(student, None, terms, augment=augmentation())


def fit_teacher(training: Training, name: str, folder: Path) -> Outcome:
    """The teacher, trained by the plain recipe from seed 0, or read."""
    model = model_of(name, training.dataset.num_classes, training.dtype)
    return fit(training, model, alone(model), None, 0, rate_of(name), folder, {"network": name})


def fit(
    training: Training,
    model: kd.Model,
    method: kd.Method,
    frozen: Any,
    seed: int,
    rate: float,
    folder: Path,
    about: Mapping[str, Any],
) -> Outcome:
    """One training by the recipe, or what is there of it.

    Args:
      training: the recipe.
      model: what is evaluated, with the student's variables.
      method: what is minimised.
      frozen: the teacher's variables, or None.
      seed: of parameters, augmentation and the order of the data.
      rate: the learning rate at first.
      folder: of this training alone.
      about: what else decides the result.
    """
    optimizer = optimizer_of(training, rate)
    drops = [round(drop * training.steps.per_epoch) for drop in training.drops]
    about = {**about, "drop_steps": drops}
    run = run_of(training, model, method, optimizer, frozen, seed, rate, folder, about)
    return trained(run if (folder / RESULT).is_file() else on_device(run, training))


def run_of(
    training: Training,
    model: kd.Model,
    method: kd.Method,
    optimizer: optax.GradientTransformation,
    frozen: Any,
    seed: int,
    rate: float,
    folder: Path,
    about: Mapping[str, Any],
) -> Run:
    """A training with what is written down about it; its data are on the host."""
    steps, size = training.steps, training.batch_size
    data = training.dataset.batches("train", size, seed=seed, last=steps.last, raw=True)
    recipe = {
        **about,
        "seed": seed,
        "epochs": training.epochs,
        "batch_size": size,
        "steps_per_epoch": steps.per_epoch,
        "learning_rate": rate,
        "momentum": MOMENTUM,
        "weight_decay": WEIGHT_DECAY,
        "dtype": training.dtype,
        "data": data.describe()["fingerprint"],
    }
    return Run(
        folder=folder,
        learner=kd.minimize(method, optimizer),
        model=model,
        data=data,
        test=training.dataset.once("test", 8 * size, raw=True),
        frozen=frozen,
        epochs=training.epochs,
        steps=steps,
        seed=seed,
        save_every=training.save_every,
        recipe=recipe,
    )


@dataclasses.dataclass(frozen=True)
class Positions:
    """Batches with nothing but ``index``."""

    batches: kd.data.Batches

    def from_step(self, step: int) -> Iterator[dict[str, Any]]:
        """The positions of the rows of each batch from a step on."""
        return ({"index": batch["index"]} for batch in self.batches.from_step(step))

    def describe(self) -> dict[str, Any]:
        """What decides the batches."""
        return self.batches.describe()


def on_device(run: Run, training: Training) -> Run:
    """The same training, to the bit, with images and labels on the device."""
    columns = training.dataset.read("train", raw=True)
    mesh = kd.parallel.data_mesh(run.steps.devices) if run.steps.devices > 1 else None
    data = {name: columns[name] for name in ("image", "label")}
    frozen = {"teacher": run.frozen, "data": data}
    test = run.test
    if jax.process_count() == 1:
        test = [
            jax.device_put(dict(batch)) if mesh is None else kd.parallel.shard_batch(batch, mesh)
            for batch in test
        ]
    frozen = jax.device_put(frozen) if mesh is None else kd.parallel.replicate(frozen, mesh)
    return run._replace(
        learner=gathering(run.learner), data=Positions(run.data), test=test, frozen=frozen
    )


def gathering(learner: kd.Learner) -> kd.Learner:
    """A Learner that takes the rows of its batches from the data beside the teacher."""

    def rows(batch: Mapping[str, Any], frozen: Any) -> dict[str, Any]:
        index = jnp.asarray(batch["index"])
        return {**batch, **{name: column[index] for name, column in frozen["data"].items()}}

    def init(key: jax.Array, batch: Mapping[str, Any], frozen: Any = None) -> kd.State:
        return learner.init(key, rows(batch, frozen), frozen["teacher"])

    def update(state: kd.State, batch: Mapping[str, Any], frozen: Any = None) -> Any:
        return learner.update(state, rows(batch, frozen), frozen["teacher"])

    return kd.Learner(init, update)
