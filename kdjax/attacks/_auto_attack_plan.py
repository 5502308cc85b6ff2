"""Which attacks AutoAttack runs, on which classes, and the compiled programs that do it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from kdjax import _checks, losses
from kdjax.attacks import _inputs
from kdjax.attacks._apgd import apgd, apgd_targeted
from kdjax.attacks._fab import fab
from kdjax.attacks._square import square

RAND = "rand"
VERSIONS = {
    "standard": ("apgd_ce", "apgd_t", "fab_t", "square"),
    "plus": ("apgd_ce", "apgd_dlr", "fab", "square", "apgd_t", "fab_t"),
    RAND: ("apgd_ce", "apgd_dlr"),
}
_RESTARTS = {"plus": {"apgd_ce": 5, "apgd_dlr": 5, "fab": 5}}
_SAMPLES = 20
# Of the difference of logits ratios, which divide by differences of this many logits.
_CLASSES = {"apgd_dlr": 3, "apgd_t": 4}
# What a key is folded with, so that an attack draws the same in every version. The numbers above
# are those of looks at the model, which draws too with version="rand".
_NUMBERS = {"apgd_ce": 0, "apgd_dlr": 1, "apgd_t": 2, "fab": 3, "fab_t": 4, "square": 5}
CLEAN = 15
_CHECK = 16


class Batch(NamedTuple):
    """Images of one call; ``place`` [b] is where in the data set."""

    place: Any
    x: Any
    labels: Any
    targets: Any


class Settings(NamedTuple):
    """What an attack's program is compiled for."""

    norm: str
    steps: int
    restarts: int
    samples: int


Attack = Callable[[Partial, Batch, jax.Array, jax.Array, Settings], tuple[jax.Array, jax.Array]]


class Stage(NamedTuple):
    """One attack on every image that is left, with the target of one rank if it has targets.

    Attributes:
        name: of the attack.
        number: what its keys are folded with.
        rank: of the target among the clean logits, from 1, the second largest; 0 for none.
        attack: the function.
        settings: what it is compiled for.
        cost: forward passes per image, roughly, for the progress bar.
    """

    name: str
    number: int
    rank: int
    attack: Attack
    settings: Settings
    cost: int


class Look(NamedTuple):
    """The model's answers: logits, whether they are right, and whether they change."""

    logits: jax.Array
    correct: jax.Array
    changes: jax.Array


def names_of(version: str, attacks: Sequence[str] | None) -> tuple[str, ...]:
    """The attacks asked for, refused unless there are such."""
    _checks.choice("version", version, VERSIONS)
    if attacks is None:
        return VERSIONS[version]
    if isinstance(attacks, str) or not isinstance(attacks, Sequence) or not attacks:
        raise TypeError(
            f"attacks must be a sequence of names such as ('apgd_ce', 'square'), got "
            f"{_checks.describe(attacks)}."
        )
    known = VERSIONS[RAND] if version == RAND else tuple(_NUMBERS)
    for name in attacks:
        _checks.choice("attacks", name, known)
    if len(set(attacks)) < len(attacks):
        raise ValueError(f"attacks must name each attack once, got {tuple(attacks)}.")
    return tuple(attacks)


def stages(
    names: Sequence[str],
    version: str,
    *,
    norm: str,
    classes: int,
    targets: int,
    steps: int,
    queries: int,
    chosen: bool,
) -> list[Stage]:
    """The plan for a model of so many classes; says where that is not what was asked for."""
    possible = [name for name in names if classes >= _CLASSES.get(name, 2)]
    for name in names:
        if name in possible:
            continue
        reason = f"{name} needs at least {_CLASSES[name]} classes, logits_fn has {classes}"
        if chosen:
            raise ValueError(f"attacks must be possible with the model's classes: {reason}.")
        warnings.warn(
            f"{reason}: it is left out, so this is less than AutoAttack's version {version!r}.",
            stacklevel=3,
        )
    ranks = min(targets, classes - 1)
    if ranks < targets and {"apgd_t", "fab_t"} & set(possible):
        warnings.warn(
            f"targets is reduced from {targets} to {ranks}: logits_fn has {classes} classes.",
            stacklevel=3,
        )
    found = []
    for name in possible:
        attack, cost = _ATTACKS[name]
        settings = Settings(
            norm,
            queries if name == "square" else steps,
            _RESTARTS.get(version, {}).get(name, 1),
            _SAMPLES if version == RAND else 1,
        )
        passes = max(cost * settings.steps * settings.restarts * settings.samples, 1)
        for rank in range(1, ranks + 1) if name.endswith("_t") else (0,):
            found.append(Stage(name, _NUMBERS[name], rank, attack, settings, passes))
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def attack(
    method: Attack,
    settings: Settings,
    logits_fn: Partial,
    batch: Batch,
    eps: jax.Array,
    key: jax.Array,
    number: jax.Array,
    rank: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(x_adv, robust) of one batch. Every number is traced, so that none has its own program."""
    return method(logits_fn, batch, eps, _keys(key, batch.place, number, rank), settings)


@functools.partial(jax.jit, static_argnums=0)
def look(
    randomised: bool,
    logits_fn: Partial,
    batch: Batch,
    key: jax.Array,
    number: jax.Array,
    rank: jax.Array,
) -> Look:
    """The model's answers on a batch.

    The model is called twice. Where it is the pure function that it should be, the compiler makes
    one call of two; where it draws numbers of its own, the answers differ.
    """
    keys = _keys(key, batch.place, number, rank)
    model = _drawing(logits_fn, keys) if randomised else logits_fn
    logits = _inputs.logits(model, batch.x)
    again = logits if randomised else _inputs.logits(model, batch.x)
    changes = jnp.max(jnp.abs(logits - again)) > 1e-4 * jnp.max(jnp.abs(logits))
    return Look(logits, _inputs.correct(logits, batch.labels), changes)


@functools.partial(jax.jit, static_argnums=0)
def dlr_vanishes(randomised: bool, logits_fn: Partial, batch: Batch, key: jax.Array) -> jax.Array:
    """[b] bool: the difference of logits ratio has no gradient at the image to follow."""
    keys = _keys(key, batch.place, jnp.int32(CLEAN), jnp.int32(0))
    model = _drawing(logits_fn, keys) if randomised else logits_fn

    def summed(x: jax.Array) -> jax.Array:
        return losses.dlr(_inputs.logits(model, x), batch.labels).sum()

    gradient = jax.grad(summed)(batch.x)
    useless = (gradient == 0) | ~jnp.isfinite(gradient)
    return useless.reshape(len(gradient), -1).all(axis=-1)


def checking(stage: Stage) -> int:
    """The number that the keys are folded with for the look at what a stage found."""
    return _CHECK + stage.number


def differentiates(plan: Sequence[Stage]) -> bool:
    """Whether any attack needs gradients."""
    return any(stage.name != "square" for stage in plan)


def _keys(key: jax.Array, place: jax.Array, number: jax.Array, rank: jax.Array) -> jax.Array:
    """[b] keys by the images' places in the data set, the attack and the target's rank."""
    draw = jax.vmap(jax.random.fold_in, (0, None))
    return draw(draw(jax.vmap(jax.random.fold_in, (None, 0))(key, place), number), rank)


def _drawing(logits_fn: Partial, keys: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """A randomised model as a function of images alone, each of which has its own key."""

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        return _inputs.logits(lambda x: logits_fn(x, key), image[None])[0]

    return lambda x: jax.vmap(one)(x, keys)


def _untargeted(loss: Callable[[jax.Array, jax.Array], jax.Array]) -> Attack:
    def run(
        logits_fn: Partial, batch: Batch, eps: jax.Array, keys: jax.Array, settings: Settings
    ) -> tuple[jax.Array, jax.Array]:
        def ascend(x: jax.Array, labels: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = apgd(
                logits_fn, x, labels, eps=eps, norm=settings.norm, loss=loss,
                steps=settings.steps, restarts=settings.restarts, samples=settings.samples,
                key=keys,
            )  # fmt: skip
            return found.x_adv, found.robust

        if settings.samples == 1:
            return ascend(batch.x, batch.labels, keys)
        # The model draws from one key for all the images of a call, so that each gets a call of
        # its own: its result is then the same in any batch.
        each = jax.vmap(lambda *row: ascend(*(value[None] for value in row)))
        x_adv, robust = each(batch.x, batch.labels, keys)
        return x_adv[:, 0], robust[:, 0]

    return run


def _targeted(
    logits_fn: Partial, batch: Batch, eps: jax.Array, keys: jax.Array, settings: Settings
) -> tuple[jax.Array, jax.Array]:
    found = apgd_targeted(
        logits_fn, batch.x, batch.labels, targets=batch.targets, eps=eps, norm=settings.norm,
        steps=settings.steps, restarts=settings.restarts, key=keys,
    )  # fmt: skip
    return found.x_adv, found.robust


def _fab(*, targeted: bool) -> Attack:
    def run(
        logits_fn: Partial, batch: Batch, eps: jax.Array, keys: jax.Array, settings: Settings
    ) -> tuple[jax.Array, jax.Array]:
        found = fab(
            logits_fn, batch.x, batch.labels, targets=batch.targets if targeted else None, eps=eps,
            norm=settings.norm, steps=settings.steps, restarts=settings.restarts, key=keys,
        )  # fmt: skip
        return found.x_adv, found.robust

    return run


def _square(
    logits_fn: Partial, batch: Batch, eps: jax.Array, keys: jax.Array, settings: Settings
) -> tuple[jax.Array, jax.Array]:
    found = square(
        logits_fn, batch.x, batch.labels, eps=eps, norm=settings.norm, queries=settings.steps,
        key=keys,
    )  # fmt: skip
    return found.x_adv, found.robust


# With the forward passes that a step costs, a gradient by the images being worth one.
_ATTACKS: dict[str, tuple[Attack, int]] = {
    "apgd_ce": (_untargeted(losses.hard_label_cross_entropy), 2),
    "apgd_dlr": (_untargeted(losses.dlr), 2),
    "apgd_t": (_targeted, 2),
    "fab": (_fab(targeted=False), 11),
    "fab_t": (_fab(targeted=True), 3),
    "square": (_square, 1),
}
