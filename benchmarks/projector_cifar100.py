"""Projector distillation on CIFAR-100: the published recipe, one command for each row.

    python benchmarks/projector_cifar100.py --pair resnet32x4-resnet8x4 --method projector
    python benchmarks/projector_cifar100.py --pair resnet50-mobilenetv2 --method kd --seeds 0 1 2
    python benchmarks/projector_cifar100.py --pair vgg13-vgg8 --method none --data cifar100.npz
    python benchmarks/projector_cifar100.py --list

--data is tfds:NAME, prepared on disk (needs the extra ``tfds``), or a PATH.npz in the Keras form.
The first command of a pair trains its teacher by the same recipe and keeps it (--teacher FOLDER to
choose where); later ones read it. A command that was stopped or killed goes on where it was.

Recipe: SGD with momentum 0.9 and coupled weight decay 5e-4 on everything that is trained, batch 64
(the last batch of an epoch has 16), 240 epochs, learning rate 0.05 (0.01 for MobileNet and
ShuffleNet students), a tenth of it after epochs 150, 180 and 210; random crops of 32 padded by 4
and flips, on the device; the teacher in evaluation mode. Published figures are of the last epoch;
the best epoch is printed beside it, and is chosen on the test split.

  none       hard labels
  kd         0.1 hard labels + 0.9 soft labels at temperature 4
  projector  hard labels + 2 LogSum(BN(projected student), BN(teacher)), alpha 4, BN eps 1e-4; the
             projector is linear(1024)-ReLU-linear. Its layers and the weight 2 are our assumption:
             neither was published.

Of the published figures, those of Table 6.4 are with other teachers (those of SSKD) and, for the
projector, with RandAugment and two views of each image; those marked plain are with the
augmentation above.

Sources: R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
Distillation", AAAI 2024: poster, Table 3, and the first author's thesis, chapter 6, Table 6.4.
Y. Tian, D. Krishnan, P. Isola, "Contrastive Representation Distillation", ICLR 2020: the table of
its code, RepDistiller. Nothing here has been run to the end yet.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _recipes import Outcome, Published, Run, Steps, cut, head, parser, rows, trained

import kdjax as kd
from kdjax.methods import projector_distillation

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
EPOCHS, DROPS, BATCH = 240, (150, 180, 210), 64
MOMENTUM, WEIGHT_DECAY, TEMPERATURE, ALPHA, HIDDEN = 0.9, 5e-4, 4.0, 4.0, (1024,)
METHODS = ("none", "kd", "projector")
NETWORKS = kd.models.BY_NAME
# Students that are trained from a learning rate of 0.01.
GENTLE = ("mobilenetv2", "shufflev1", "shufflev2")
# teacher, student, KD as RepDistiller has them; teacher, student, projector as Table 6.4.
TABLES = {
    "wrn_40_2-wrn_16_2": ((75.61, 73.26, 74.92), (76.46, 73.64, 76.14)),
    "wrn_40_2-wrn_40_1": ((75.61, 71.98, 73.54), (76.46, 72.24, 75.42)),
    "resnet56-resnet20": ((72.34, 69.06, 70.66), (73.44, 69.63, 71.75)),
    "resnet32x4-resnet8x4": ((79.42, 72.50, 73.33), (79.63, 72.51, 76.44)),
    "vgg13-mobilenetv2": ((74.64, 64.60, 67.37), (75.38, 65.79, 71.47)),
    "resnet50-mobilenetv2": ((79.34, 64.60, 67.35), (79.10, 65.79, 72.81)),
    "resnet50-vgg8": ((79.34, 70.36, 73.81), (79.10, 70.68, 76.20)),
    "resnet32x4-shufflev1": ((79.42, 70.50, 74.07), (79.63, 70.77, 77.32)),
    "resnet32x4-shufflev2": ((79.42, 71.82, 74.45), (79.63, 73.12, 79.06)),
    "wrn_40_2-shufflev1": ((75.61, 70.50, 74.83), (76.46, 70.77, 79.22)),
    "resnet110-resnet20": ((74.31, 69.06, 70.67), None),
    "resnet110-resnet32": ((74.31, 71.14, 73.08), None),
    "vgg13-vgg8": ((74.64, 70.36, 72.98), None),
}
POSTER = {"resnet32x4-resnet8x4": 76.55, "resnet50-mobilenetv2": 71.53}
PLAIN, THESIS = "RepDistiller, plain", "Table 6.4"
QUICK = {"epochs": 3, "rows": 320}


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
        return tuple(drop * self.epochs / EPOCHS for drop in DROPS)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing of a row and prints it."""
    options = _parser().parse_args(argv)
    if options.list:
        print("\n".join(TABLES))
        return
    if options.quick:
        vars(options).update(QUICK)
    teacher_name, student_name = _pair(options.pair)
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
    teacher, frozen, known = None, None, None
    found = published(options.pair)
    if options.method != "none":
        folder = options.teacher or options.out / "teachers" / teacher_name
        teacher = model_of(teacher_name, dataset.num_classes, options.dtype)
        outcome = fit_teacher(training, teacher_name, folder)
        frozen, known = outcome.variables, [teacher_name, outcome.accuracy[-1]]
        print(head())
        print(rows(teacher_name, "teacher", [outcome], found["teacher"]), flush=True)
    else:
        print(head(), flush=True)
    outcomes = [
        fit_student(training, student_name, teacher, frozen, known, seed, options)
        for seed in options.seeds
    ]
    network = student_name if teacher is None else options.pair
    print(rows(network, options.method, outcomes, found[options.method]), flush=True)


def _parser() -> Any:
    found = parser(__doc__, out=Path("runs/projector_cifar100"))
    add = found.add_argument
    add("--pair", default="resnet32x4-resnet8x4", help="TEACHER-STUDENT; --list names the rows")
    add("--list", action="store_true", help="the published pairs")
    add("--method", choices=METHODS, default="projector", help="default: projector")
    add("--data", default="tfds:cifar100", help="tfds:NAME or PATH.npz (default: tfds:cifar100)")
    add("--epochs", type=int, default=EPOCHS, help=f"default {EPOCHS}; the drops move with it")
    add("--batch-size", type=int, default=BATCH, help=f"default {BATCH}")
    add("--learning-rate", type=float, help="of the student (default: the recipe's)")
    add("--steps-per-call", type=int, help="updates in one dispatch (default: chosen)")
    add("--rows", type=int, help="only the first rows of each split, for a trial")
    return found


def _pair(name: str) -> tuple[str, str]:
    names = name.split("-")
    if len(names) != 2 or not all(one in NETWORKS for one in names):
        raise SystemExit(
            f"--pair must be TEACHER-STUDENT of {', '.join(sorted(NETWORKS))}, got {name!r}."
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


def _normalized(batch: Mapping[str, Any]) -> jax.Array:
    return kd.augment.normalize(batch["image"], MEAN, STD)


# Kept, so that the programs compiled for a Model are found again.
@functools.lru_cache(maxsize=8)
def model_of(name: str, num_classes: int, dtype: str) -> kd.Model:
    """A network that normalises images itself and taps what its classifier reads."""
    return kd.from_linen(
        NETWORKS[name](num_classes),
        taps={"feat": "pool"},
        dtype=None if dtype == "float32" else jnp.dtype(dtype),
        inputs=_normalized,
    )


def augmentation() -> Callable[..., Any]:
    """Random crops and flips, drawn from the step's key and each image's index."""
    crop = functools.partial(kd.augment.random_crop, padding=4)
    return kd.augment.compose(crop, kd.augment.random_flip)


def method_of(
    name: str, student: kd.Model, teacher: kd.Model | None, feature_weight: float
) -> kd.Method:
    """What is minimised."""
    hard, augment = kd.terms.hard_labels(), augmentation()
    if name == "none" or teacher is None:
        return kd.distill(student, None, {"hard": (1.0, hard)}, augment=augment)
    if name == "kd":
        soft = kd.terms.soft_labels(temperature=TEMPERATURE)
        return kd.distill(
            student, teacher, {"hard": (0.1, hard), "soft": (0.9, soft)}, augment=augment
        )
    return projector_distillation.cifar100(
        student,
        teacher,
        feature_weight=feature_weight,
        hidden=HIDDEN,
        alpha=ALPHA,
        augment=augment,
    )


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


def fit_teacher(training: Training, name: str, folder: Path) -> Outcome:
    """The teacher, trained by the plain recipe from seed 0, or read."""
    model = model_of(name, training.dataset.num_classes, training.dtype)
    method = method_of("none", model, None, 0.0)
    return _fit(training, model, method, None, 0, rate_of(name), folder, {"network": name})


def fit_student(
    training: Training,
    name: str,
    teacher: kd.Model | None,
    frozen: Any,
    known: list[Any] | None,
    seed: int,
    options: Any,
) -> Outcome:
    """One student."""
    model = model_of(name, training.dataset.num_classes, training.dtype)
    method = method_of(options.method, model, teacher, options.feature_weight)
    rate = rate_of(name) if options.learning_rate is None else options.learning_rate
    # A student alone is the same whatever its teacher would have been.
    row = Path("alone", name) if teacher is None else Path(options.pair, options.method)
    about: dict[str, Any] = {"network": name, "method": options.method, "teacher": known}
    if options.method == "projector":
        about |= {"feature_weight": options.feature_weight, "hidden": HIDDEN, "alpha": ALPHA}
    folder = options.out / row / f"seed-{seed}"
    return _fit(training, model, method, frozen, seed, rate, folder, about)


def _fit(
    training: Training,
    model: kd.Model,
    method: kd.Method,
    frozen: Any,
    seed: int,
    rate: float,
    folder: Path,
    about: Mapping[str, Any],
) -> Outcome:
    steps, size = training.steps, training.batch_size
    data = training.dataset.batches("train", size, seed=seed, last=steps.last, raw=True)
    recipe = {
        **about,
        "seed": seed,
        "epochs": training.epochs,
        "batch_size": size,
        "steps_per_epoch": steps.per_epoch,
        "learning_rate": rate,
        "drop_steps": [round(drop * steps.per_epoch) for drop in training.drops],
        "momentum": MOMENTUM,
        "weight_decay": WEIGHT_DECAY,
        "dtype": training.dtype,
        "data": data.describe()["fingerprint"],
    }
    return trained(
        Run(
            folder=folder,
            learner=kd.minimize(method, optimizer_of(training, rate)),
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
    )


def published(pair: str) -> dict[str, list[Published]]:
    """The published figures of a pair, by method; none for a pair that isn't in the tables."""
    found: dict[str, list[Published]] = {"teacher": [], **{name: [] for name in METHODS}}
    plain, thesis = TABLES.get(pair, (None, None))
    if plain is not None:
        for name, value in zip(("teacher", "none", "kd"), plain, strict=True):
            found[name].append(Published(value, PLAIN))
    if pair in POSTER:
        found["projector"].append(Published(POSTER[pair], "poster, plain"))
    if thesis is not None:
        for name, value in zip(("teacher", "none", "projector"), thesis, strict=True):
            note = ", RandAugment" if name == "projector" else ""
            found[name].append(Published(value, THESIS + note))
    return found


if __name__ == "__main__":
    main()
