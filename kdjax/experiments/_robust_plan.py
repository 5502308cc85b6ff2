"""What a comparison of adversarial trainings trains on what; its arguments, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from kdjax import _checks, core, models
from kdjax import data as kdata
from kdjax._pairs import Learner, Method, Model
from kdjax.data import _order
from kdjax.experiments import runs
from kdjax.experiments._plan import AUGMENTATIONS
from kdjax.experiments._robust_attack import unroll
from kdjax.methods import adr, adversarial, awp

METHODS: Mapping[str, str] = MappingProxyType(
    {"at": "AT", "trades": "TRADES", "adr": "ADR", "adr-trades": "ADR-TRADES"}
)
RECTIFIED = ("adr", "adr-trades")
NORMS = ("linf", "l2")
AVERAGED = "ema"
WEIGHTS = ("student", AVERAGED)
_TINY = 16
# One word per purpose keeps the draws of the same seed apart; those of kdjax.data are below.
_NOISE, ATTACKED = 100, 102
_HELD_OUT = 1024


class Plan(NamedTuple):
    """What is trained on what.

    Attributes:
      choices: every argument, with what was left out filled in.
      dataset: with splits train, validation and test.
      student: the network.
      mesh: devices to split batches over, or None.
      about: facts for the run folders.
    """

    choices: Mapping[str, Any]
    dataset: kdata.Dataset
    student: Model
    mesh: Mesh | None
    about: Mapping[str, Any]


def with_validation(dataset: kdata.Dataset, validation: int | None) -> kdata.Dataset:
    """The data with a held-out split, on which epochs are chosen and temperatures fitted.

    Args:
      dataset: with splits train and test.
      validation: images to hold out of train; None leaves a validation split that is there, and
        else takes 1,024 images or 2 % of train, whichever is more, but no more than a tenth.

    Returns:
      The data set.

    Raises:
      ValueError: a split is missing, or there is a validation split already.
    """
    for split in ("train", "test"):
        _checks.entry(f"data set {dataset.name!r}", dataset.splits, split)
    size = dataset.size("train")
    if "validation" in dataset.splits:
        if validation is not None:
            raise ValueError(
                f"validation must be left out for data set {dataset.name!r}, which has a "
                f"validation split of its own, got {validation}."
            )
        return dataset
    if validation is None:
        validation = max(1, min(max(_HELD_OUT, size // 50), size // 10))
    return dataset.hold_out(_checks.count("validation", validation, high=size - 1))


def radius(shape: Sequence[int], norm: str) -> float:
    """The usual eps for images of a shape: 8/255 or 0.5, larger where pixels are few."""
    _checks.choice("norm", norm, NORMS)
    tiny = max(shape[:2]) <= _TINY
    if norm == "linf":
        return 0.1 if tiny else 8 / 255
    return 0.4 if tiny else 0.5


def filled(dataset: kdata.Dataset, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with those that are None replaced by what suits the data.

    Small images get a small network and a short schedule, others the published recipe for as many
    classes; few images and noisy labels are for the digits, which are too easy otherwise.
    """
    shape, size = dataset.shape, dataset.size("train")
    tiny, few = max(shape[:2]) <= _TINY, dataset.name == "digits"
    name = "cifar10" if dataset.num_classes <= 10 else "cifar100"
    if dataset.num_classes > 100:
        name = "tiny_imagenet"
    published = adr.RECIPES[f"{name}+awp" if given["awp"] else name]
    colour = len(shape) == 3 and shape[-1] == 3
    defaults: dict[str, Any] = {
        "model": "mlp" if tiny else "resnet18",
        "eps": radius(shape, given["norm"]),
        "attack_steps": 7 if tiny else 10,
        "epochs": 80 if tiny else published.epochs,
        "batch_size": min(50 if tiny else 128, size),
        "learning_rate": 0.1,
        "weight_decay": 0.0 if tiny else 5e-4,
        "ema_decay": 0.99 if tiny else 0.995,
        "temperature": (1.5, 1.0) if tiny else published.temperature,
        "mix": (0.5, 0.9) if tiny else published.mix,
        "rho": 0.005 if published.rho is None else published.rho,
        "augmentation": "crop_flip" if colour and not tiny else "none",
        "examples": min(300, size) if few else size,
        "label_noise": 0.2 if few else 0.0,
        "auto_attack": min(32, dataset.size("test")) if few else 0,
    }
    known = {k: v for k, v in given.items() if v is not None}
    eps = known.get("eps", defaults["eps"])
    step = {"step_size": eps / 4 if isinstance(eps, (int, float)) else None}
    found = {**given, **defaults, **step, **known}
    for pair in ("temperature", "mix"):
        found[pair] = list(found[pair])
    return found


def check(choices: Mapping[str, Any], seeds: Any, dataset: kdata.Dataset) -> None:
    """Refuses arguments of `kdjax.experiments.robust.compare` that are out of range."""
    methods = choices["method"]
    for name in methods:
        _checks.choice("method", name, METHODS)
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"method must name each method once, and at least one, got {methods}.")
    _checks.choice("model", choices["model"], models.BY_NAME)
    _checks.choice("norm", choices["norm"], NORMS)
    _checks.choice("augmentation", choices["augmentation"], AUGMENTATIONS)
    for name in ("eps", "learning_rate"):
        _checks.number(name, choices[name], above=0)
    for name in ("step_size", "weight_decay", "beta", "rho"):
        _checks.number(name, choices[name], low=0)
    _checks.number("ema_decay", choices["ema_decay"], low=0, high=1)
    _checks.number("label_noise", choices["label_noise"], low=0, below=1)
    for name in ("attack_steps", "epochs", "batch_size", "eval_every"):
        _checks.count(name, choices[name])
    adr.annealed(choices["temperature"], choices["mix"], total_steps=1)
    _checks.count("examples", choices["examples"], high=dataset.size("train"))
    for name in choices["auto_attack_weights"]:
        _checks.choice("auto_attack_weights", name, WEIGHTS)
    _checks.count("auto_attack", choices["auto_attack"], low=0, high=dataset.size("test"))
    if isinstance(seeds, int):
        _checks.count("seeds", seeds)
    found = [_checks.count("seeds", seed, low=0) for seed in choices["seeds"]]
    if not found or len(set(found)) < len(found):
        raise ValueError(f"seeds must be different from each other and at least one, got {found}.")


def make(
    dataset: kdata.Dataset,
    choices: Mapping[str, Any],
    mesh: Mesh | None,
    about: Mapping[str, Any],
) -> Plan:
    """The plan, once data, network and devices are known to fit."""
    devices, batch_size = 1 if mesh is None else mesh.size, choices["batch_size"]
    if batch_size % devices:
        raise ValueError(
            f"batch_size must be a multiple of the {devices} devices, got {batch_size}."
        )
    if batch_size > choices["examples"]:
        raise ValueError(
            f"batch_size must be at most {choices['examples']}, the images that are trained on, "
            f"got {batch_size}."
        )
    check_images(dataset, "train", "validation")
    name = choices["model"]
    student = runs.network(name, dataset.num_classes)
    runs.check_input(student, name, dataset.shape, "model")
    return Plan(choices, dataset, student, mesh, about)


def check_images(dataset: kdata.Dataset, *splits: str) -> None:
    """Refuses what an attack in units of pixels has no meaning for."""
    if len(dataset.shape) != 3:
        raise ValueError(
            f"data must be images [H, W, C], got examples of shape {tuple(dataset.shape)}."
        )
    for split in splits:
        rows = np.arange(min(256, dataset.size(split)))
        image = dataset.read(split, rows)["image"]
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"data must be images in [0, 1], got values from {low:.4g} to {high:.4g} in split "
                f"{split!r}: eps is in units of pixels."
            )


def steps_per_epoch(plan: Plan) -> int:
    """Updates in an epoch; images that don't fill a batch wait for another epoch."""
    return int(plan.choices["examples"] // plan.choices["batch_size"])


def even(size: int, mesh: Mesh | None) -> int:
    """The smallest multiple of the devices that isn't below ``size``."""
    return size if mesh is None else -(-size // mesh.size) * mesh.size


def training_batches(plan: Plan, seed: int) -> kdata.Batches:
    """The batches that a seed trains on: its choice of the images, its noise, its order."""
    choices, dataset = plan.choices, plan.dataset
    part = dataset.splits["train"]
    if choices["examples"] < part.size:
        few = dataset.hold_out(choices["examples"], name="few", seed=seed)
        part = few.splits["few"]
    if choices["label_noise"] > 0:
        part = _noisy(part, choices["label_noise"], dataset.num_classes, seed)
    trained = dataclasses.replace(dataset, splits={"train": part})
    return trained.batches("train", choices["batch_size"], seed=seed)


def _noisy(part: kdata.Split, share: float, classes: int, seed: int) -> kdata.Split:
    """Gives a share of the labelled rows another class, each of the others as likely."""
    labels = np.array(part.labels())
    known = np.flatnonzero(labels >= 0)
    order = known[_order.permutation(len(known), _NOISE, seed)]
    chosen = order[: round(share * len(known))]
    # The order of other draws, cut to the classes: for any number of rows the same bits.
    offset = _order.permutation(len(labels), _NOISE + 1, seed)[chosen] % (classes - 1) + 1
    labels[chosen] = (labels[chosen] + offset) % classes
    labels.flags.writeable = False
    return dataclasses.replace(
        part,
        read=lambda rows: {**part.read(rows), "label": labels[rows]},
        labels=lambda: labels,
        changes=(*part.changes, {"label_noise": share, "seed": seed}),
    )


def learner(plan: Plan, name: str) -> Learner:
    """One of `METHODS` as a Learner."""
    choices = plan.choices
    every, epochs = steps_per_epoch(plan), choices["epochs"]
    milestones = sorted({max(1, epochs // 2), max(1, 3 * epochs // 4)})
    recipe = adr.Recipe(
        temperature=tuple(choices["temperature"]),
        mix=tuple(choices["mix"]),
        learning_rate=choices["learning_rate"],
        nesterov=not choices["awp"],
        epochs=epochs,
        milestones=tuple(milestones),
        rho=choices["rho"],
    )
    optimizer = adr.optimizer(recipe, steps_per_epoch=every, weight_decay=choices["weight_decay"])
    method = _method(plan, name, epochs * every)
    if choices["awp"]:
        return awp.minimize_all(method, optimizer, rho=choices["rho"])
    return core.minimize(method, optimizer)


def _method(plan: Plan, name: str, total_steps: int) -> Method:
    choices = plan.choices
    options: dict[str, Any] = {
        "eps": choices["eps"],
        "step_size": choices["step_size"],
        "steps": choices["attack_steps"],
        "norm": choices["norm"],
        "ema_decay": choices["ema_decay"],
        "augment": AUGMENTATIONS[choices["augmentation"]],
        "unroll": unroll(plan.student, plan.dataset.shape),
    }
    if name in RECTIFIED:
        pairs = tuple(choices["temperature"]), tuple(choices["mix"])
        options |= adr.annealed(*pairs, total_steps=total_steps)
    if name in ("trades", "adr-trades"):
        options["beta"] = choices["beta"]
    factories: Mapping[str, Callable[..., Method]] = {
        "at": adversarial.adversarial_training,
        "trades": adversarial.trades,
        "adr": adr.adr,
        "adr-trades": adr.adr_trades,
    }
    return factories[name](plan.student, **options)


def device(mesh: Mesh | None) -> str:
    """What it runs on, in words."""
    return f"{mesh.size if mesh else 1} x {jax.devices()[0].device_kind}"
