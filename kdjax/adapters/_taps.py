"""Tap paths: which intermediate values a user asks for, and finding them among those captured."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kdjax import _checks

TapPath = str | Sequence[str]
Calls = Mapping[str, tuple[Any, ...]]  # path to the values of its calls, in order

_SHOWN = 120


class Tap(NamedTuple):
    """One path: ``block3``, ``block*``, ``block[1]``.

    Attributes:
      name: the output's name.
      text: the path as the user wrote it.
      path: the path without its call index.
      call: which call of a module that is called more than once.
      many: whether the output is a tuple: the path is a glob, or one of several.
    """

    name: str
    text: str
    path: str
    call: int | None
    many: bool

    def matches(self, path: str) -> bool:
        """Whether ``path`` is meant; ``*`` and ``?`` stay within one level of the hierarchy."""
        return _pattern(self.path).fullmatch(path) is not None


def parse(taps: Mapping[str, TapPath] | None) -> dict[str, tuple[Tap, ...]]:
    """Output name to its paths; one path that is no glob gives one value, the rest tuples."""
    if taps is None:
        return {}
    if not isinstance(taps, Mapping):
        raise TypeError(
            f"taps must be a dict of output names to submodule paths, got {_checks.describe(taps)}."
        )
    return {_output_name("taps", name): _parse_paths(name, spec) for name, spec in taps.items()}


def parse_expose(
    expose: Mapping[str, str] | None, taps: Mapping[str, tuple[Tap, ...]]
) -> dict[str, str]:
    """Output name to the path of a subtree of the parameters."""
    if expose is None:
        return {}
    if not isinstance(expose, Mapping):
        raise TypeError(
            "expose must be a dict of output names to parameter paths, "
            f"got {_checks.describe(expose)}."
        )
    for name, path in expose.items():
        _output_name("expose", name)
        if name in taps:
            raise ValueError(f"expose and taps both name {name!r}; names must differ.")
        if not isinstance(path, str) or not path.strip("/"):
            raise TypeError(
                f"expose[{name!r}] must be a path such as 'classifier', "
                f"got {_checks.describe(path)}."
            )
    return {name: path.strip("/") for name, path in expose.items()}


def select(
    taps: Mapping[str, tuple[Tap, ...]],
    found: Calls,
    there: Callable[[], tuple[Sequence[str], Sequence[str]]],
) -> dict[str, Any]:
    """The tapped values.

    Args:
      taps: what is asked for.
      found: what was captured.
      there: paths with an output, and paths of modules without one; called on failure only.
    """
    outputs: dict[str, Any] = {}
    for name, queries in taps.items():
        values = []
        for tap in queries:
            hits = sorted(filter(tap.matches, found), key=_natural)
            if not hits:
                raise ValueError(_not_found(tap, *there()))
            values += [_pick_call(tap, path, found[path]) for path in hits]
        outputs[name] = tuple(values) if queries[0].many else values[0]
    return outputs


def exposed(expose: Mapping[str, str], params: Any) -> dict[str, Any]:
    """The named subtrees of the parameters."""
    return {name: _subtree(name, path, params) for name, path in expose.items()}


def _subtree(name: str, path: str, params: Any) -> Any:
    tree = params
    for part in path.split("/"):
        if not isinstance(tree, Mapping) or part not in tree:
            raise ValueError(
                f"expose[{name!r}] asks for the parameters {path!r}, which are not there; "
                f"there are: {_listing(_subtree_paths(params))}."
            )
        tree = tree[part]
    return tree


def _subtree_paths(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, Mapping):
        return []
    paths = []
    for key, value in tree.items():
        paths += [f"{prefix}{key}", *_subtree_paths(value, f"{prefix}{key}/")]
    return paths


def _output_name(argument: str, name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise TypeError(f"{argument} must have names as keys, got {_checks.describe(name)}.")
    if name == "logits":
        raise ValueError(f"{argument} must not use the name 'logits': that is the module's output.")
    return name


def _parse_paths(name: str, spec: Any) -> tuple[Tap, ...]:
    paths = (spec,) if isinstance(spec, str) else spec
    if (
        not isinstance(paths, Sequence)
        or not paths
        or not all(isinstance(path, str) and path.strip("/") for path in paths)
    ):
        raise TypeError(
            f"taps[{name!r}] must be a submodule path such as 'block3', or several, "
            f"got {_checks.describe(spec)}."
        )
    taps = []
    for text in paths:
        path, call = text.strip("/"), None
        if indexed := re.fullmatch(r"(.+)\[(\d+)\]", path):
            path, call = indexed[1], int(indexed[2])
        many = not isinstance(spec, str) or "*" in path or "?" in path
        taps.append(Tap(name, text, path, call, many))
    return tuple(taps)


def _pick_call(tap: Tap, path: str, calls: tuple[Any, ...]) -> Any:
    if tap.call is None and len(calls) > 1:
        choices = ", ".join(f"'{path}[{i}]'" for i in range(min(len(calls), 8)))
        raise ValueError(
            f"taps[{tap.name!r}] asks for {tap.text!r}, but {path!r} is called {len(calls)} times; "
            f"say which call is meant: {choices}{', ...' if len(calls) > 8 else ''}."
        )
    index = tap.call or 0
    if index >= len(calls):
        raise ValueError(
            f"taps[{tap.name!r}] asks for call {index} of {path!r}, which is called "
            f"{len(calls)} time{'s' if len(calls) > 1 else ''} (counted from 0)."
        )
    return calls[index]


def _not_found(tap: Tap, outputs: Sequence[str], silent: Sequence[str]) -> str:
    head = f"taps[{tap.name!r}] asks for {tap.text!r}"
    if any(map(tap.matches, silent)):
        reason = (
            "which is a part of the model that hands out no output: it is not called, or only "
            "through another method, or it runs under nn.scan or another lifted transformation; "
            "sow the value inside the model and tap its path"
        )
    else:
        reason = "which is not in the model"
    close = difflib.get_close_matches(tap.path, outputs, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{head}, {reason}{hint}; there are: {_listing(outputs)}."


def _listing(paths: Sequence[str]) -> str:
    paths = sorted(paths, key=_natural)
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return (", ".join(paths[:_SHOWN]) or "nothing") + more


def _natural(path: str) -> list[tuple[int, str]]:
    """Sort key with block2 before block10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def _pattern(path: str) -> re.Pattern[str]:
    wild = {"*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(wild.get(char) or re.escape(char) for char in path))
