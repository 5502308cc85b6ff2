"""How a module is told whether it trains: found in its signature, or said by the user."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from types import EllipsisType
from typing import Any

from kdjax import _checks

TrainArgument = str | Callable[[bool], Mapping[str, Any]] | None | EllipsisType

_SUSPECT = re.compile("train|infer|determin|eval")

# Name of the flag to whether it means the opposite of training.
_INVERTED = {
    "train": False,
    "training": False,
    "is_training": False,
    "is_train": False,
    "deterministic": True,
    "inference": True,
    "use_running_average": True,
}


def flag_values(train: bool) -> dict[str, bool]:
    """The value of every known flag."""
    return {name: train != inverted for name, inverted in _INVERTED.items()}


def call_flags(call: Callable[..., Any], train_argument: TrainArgument) -> Callable[[bool], Any]:
    """A function from ``train`` to the keyword arguments that tell the module.

    Args:
      call: the module's ``__call__``.
      train_argument: a keyword's name, a function from ``train`` to keyword arguments, None for
        a module that knows no such thing, ``...`` to look for the usual names.
    """
    parameters = inspect.signature(call).parameters
    if train_argument is None:
        return lambda train: {}
    if train_argument is ...:
        names = [name for name in _INVERTED if name in parameters]
        unknown = [
            p.name
            for p in parameters.values()
            if isinstance(p.default, bool) and _SUSPECT.search(p.name) and p.name not in names
        ]
        if unknown and not names:
            raise ValueError(
                f"train_argument must say what the argument {unknown[0]!r} of the module's "
                f"__call__ means: {unknown[0]!r} if it is True in training, "
                f"lambda train: {{{unknown[0]!r}: not train}} if False, None if neither."
            )
        return lambda train: {name: flag_values(train)[name] for name in names}
    if isinstance(train_argument, str):
        name = train_argument
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if name not in parameters and not takes_any:
            there = ", ".join(p for p in parameters if p != "self")
            raise ValueError(
                f"train_argument must be an argument of the module's __call__ ({there}), "
                f"got {name!r}."
            )
        return lambda train: {name: flag_values(train).get(name, train)}
    if callable(train_argument):
        return train_argument
    raise TypeError(
        "train_argument must be an argument's name, a function from train to keyword arguments, "
        f"or None, got {_checks.describe(train_argument)}."
    )
