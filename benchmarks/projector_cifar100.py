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

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _cifar100 import (
    GENTLE,
    MEAN,
    NETWORKS,
    STD,
    Training,
    add_options,
    alone,
    augmentation,
    fit,
    fit_teacher,
    model_of,
    optimizer_of,
    pair_of,
    rate_of,
    training_of,
)
from _recipes import Outcome, Published, head, parser, rows

import kdjax as kd
from kdjax.methods import projector_distillation

__all__ = [
    "GENTLE",
    "MEAN",
    "NETWORKS",
    "STD",
    "TABLES",
    "Training",
    "main",
    "method_of",
    "model_of",
    "optimizer_of",
    "published",
    "rate_of",
]

TEMPERATURE, ALPHA, HIDDEN = 4.0, 4.0, (1024,)
METHODS = ("none", "kd", "projector")
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


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing of a row and prints it."""
    options = _parser().parse_args(argv)
    if options.list:
        print("\n".join(TABLES))
        return
    if options.quick:
        vars(options).update(QUICK)
    teacher_name, student_name = pair_of(options.pair)
    training = training_of(options)
    teacher, frozen, known = None, None, None
    found = published(options.pair)
    if options.method != "none":
        folder = options.teacher or options.out / "teachers" / teacher_name
        teacher = model_of(teacher_name, training.dataset.num_classes, options.dtype)
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
    add_options(found)
    add = found.add_argument
    add("--list", action="store_true", help="the published pairs")
    add("--method", choices=METHODS, default="projector", help="default: projector")
    return found


def method_of(
    name: str, student: kd.Model, teacher: kd.Model | None, feature_weight: float
) -> kd.Method:
    """What is minimised."""
    if name == "none" or teacher is None:
        return alone(student)
    augment = augmentation()
    if name == "kd":
        hard = kd.terms.hard_labels()
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
    return fit(training, model, method, frozen, seed, rate, folder, about)


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
