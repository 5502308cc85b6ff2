"""Trainings that follow one another: whoever was trained becomes a teacher of the next.

The driver decides who learns from whom and with which key; how a link is trained, on which data
and with which checkpoints, is the business of a function that it is given. It reads and writes
nothing itself. As the key of a link depends on the chain's key and the link's number only, a chain
whose ``train`` resumes (`kdjax.train.fit` with a folder for each number) can be killed at any time
and called again: links that have ended are read, the one under way goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import _checks, core, terms
from kdjax._pairs import Batch, Method, Model, Schedule, State, Tree
from kdjax._teachers import variables as pair_of
from kdjax.terms import at
from kdjax.terms._outputs import Number, checked

Augment = Callable[[jax.Array, Batch], Batch]
Make = Callable[[Model, tuple[Model, ...]], Method]
Train = Callable[["Link"], Any]


class Link(NamedTuple):
    """One training of a chain.

    Attributes:
      number: its place in the chain, from 0; name its checkpoint folder after it.
      student: the model that is trained.
      teachers: those that it learns from: none, the one before, or all before.
      method: what is minimised.
      frozen: the teachers' variables: None, those of the one, or a list for an ensemble.
      key: for ``learner.init``; it depends on the chain's key and the number only.
    """

    number: int
    student: Model
    teachers: tuple[Model, ...]
    method: Method
    frozen: Tree
    key: jax.Array


def chain(
    models: Sequence[Model],
    train: Train,
    *,
    key: jax.Array,
    make: Make,
    dense: bool = False,
    given: Any = None,
) -> list[tuple[Tree, Tree]]:
    """Trains models one after another, each taught by those before it.

    Args:
      models: in the order of their training.
      train: ``(Link) -> State`` or ``(params, extra)``.
      key: of the chain.
      make: ``(student, teachers) -> Method``.
      dense: whether all models before teach, rather than only the last.
      given: variables of the first model, which then isn't trained.
    """
    for i, model in enumerate(models):
        core.check_model(f"models[{i}]", model)
    for name, function in (("train", train), ("make", make)):
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {_checks.describe(function)}.")
    if not jnp.issubdtype(getattr(key, "dtype", jnp.float32), jax.dtypes.prng_key):
        raise TypeError(
            f"key must be a typed key such as jax.random.key(0), got {_checks.describe(key)}."
        )
    done: list[tuple[Tree, Tree]] = [] if given is None else [_student("given must be", given)]
    for number in range(len(done), len(models)):
        first = 0 if dense else max(number - 1, 0)
        teachers, known = tuple(models[first:number]), done[first:number]
        frozen = known if len(known) > 1 else (known[0] if known else None)
        link = Link(
            number,
            models[number],
            teachers,
            make(models[number], teachers),
            frozen,
            jax.random.fold_in(key, number),
        )
        done.append(_student("train must return", train(link)))
    return done


def distilled(*, hard: Number, soft: Number, temperature: Number, augment: Augment | None) -> Make:
    """``make`` by hard and soft labels; without teachers by hard ones of weight 1."""
    checked("hard", hard, low=0)
    checked("soft", soft, low=0)
    checked("temperature", temperature, above=0)

    def make(student: Model, teachers: tuple[Model, ...]) -> Method:
        labels = terms.hard_labels()
        if not teachers:
            return core.distill(student, None, {"hard": (1.0, labels)}, augment=augment)
        if len(teachers) == 1:
            pairs = {"soft": (soft, terms.soft_labels(temperature=temperature))}
            teacher = teachers[0]
        else:
            pairs = {
                f"soft/{i}": (
                    soft,
                    terms.soft_labels(temperature=temperature, teacher=f"{i}/logits"),
                )
                for i in range(len(teachers))
            }
            teacher = core.ensemble(teachers)
        return core.distill(student, teacher, {"hard": (hard, labels), **pairs}, augment=augment)

    return make


def rest(share: Number) -> Number | Schedule:
    """``1 - share``, also of a schedule."""
    return (lambda step: 1 - at(share, step)) if callable(share) else 1 - share


def _student(wanted: str, trained: Any) -> tuple[Tree, Tree]:
    if isinstance(trained, State):
        return trained.params["student"], trained.extra["student"]
    try:
        return pair_of(trained)
    except ValueError:
        raise TypeError(
            f"{wanted} a State or the variables (params, extra) of its student, got "
            f"{_checks.describe(trained)}."
        ) from None
