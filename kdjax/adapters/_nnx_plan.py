"""NNX modules taken apart into static structure and plain dicts of arrays, and put together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from kdjax.adapters import _taps, _train_flag

Path = tuple[Any, ...]


class TapOutput(nnx.Variable):
    """The outputs of tapped methods while `nnx.capture` collects them."""


class Plan(NamedTuple):
    """A module without its arrays: all that a forward pass needs besides variables.

    Attributes:
      graphdef: the static structure, in training or evaluation mode.
      leaves: path to the abstract variable (or array) there.
      capturing: path of each tapped submodule to the class that hands over its outputs.
    """

    graphdef: Any
    leaves: dict[Path, Any]
    capturing: dict[Path, type]


def make_plan(module: nnx.Module, train: bool, dtype: Any, capturing: dict[Path, type]) -> Plan:
    """The plan of a module's forward pass in one of its two modes."""
    module = nnx.clone(module)
    modes = {name: _train_flag.flag_values(train)[name] for name in ("training", "is_training")}
    (module.train if train else module.eval)(**modes)
    if dtype is not None:
        for _, part in _parts(module):
            # A norm layer promotes to its float32 statistics unless it is told.
            if getattr(part, "dtype", dtype) is None:
                part.dtype = dtype
    return Plan(nnx.split(module)[0], leaves_of(module), capturing)


def capturing_classes(module: nnx.Module, taps: list[_taps.Tap]) -> dict[Path, type]:
    """Module path to a subclass whose wanted methods hand their output to `nnx.capture`."""
    classes = {}
    for path, part in _parts(module):
        text = _text(path)
        names = {
            method
            for owner, _, method in (tap.path.rpartition("/") for tap in taps)
            if owner == text and inspect.isfunction(getattr(type(part), method, None))
        }
        if path and callable(part) and any(tap.matches(text) for tap in taps):
            names.add("__call__")
        if names:
            classes[path] = _subclass(type(part), sorted(names))
    return classes


def _subclass(base: type, names: list[str]) -> type:
    """``base`` with methods that sow what they return.

    A subclass for our own copy of the module, because `nnx.capture(method_outputs=)` edits the
    user's class while it runs and misses inherited methods.
    """

    def capturing(name: str) -> Callable[..., Any]:
        method = getattr(base, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(self, *args, **kwargs)
            self.sow(TapOutput, name, result)
            return result

        return call

    body = {name: capturing(name) for name in names} | {"__module__": base.__module__}
    return type(base)(base.__name__, (base,), body)


def build(plan: Plan, params: Any, extra: Any, seed: Any) -> tuple[nnx.Module, list[Any]]:
    """The module with these variables and seeded streams; and its counters as they start."""
    given = {"params": by_path(params), "extra": by_path(extra)}
    values = {}
    for i, (path, leaf) in enumerate(plan.leaves.items()):
        home = home_of(leaf)
        if home is not None:
            values[path] = pick(given, home, path, leaf)
        elif isinstance(leaf, nnx.RngKey):
            key = jax.random.fold_in(seed, i)
            shape = leaf.get_value().shape
            values[path] = jax.random.split(key, shape) if shape else key
        else:
            values[path] = jnp.zeros(leaf.get_value().shape, leaf.get_value().dtype)
    module = nnx.merge(plan.graphdef, nest(values, text=False))
    for path, part in _parts(module):
        if path in plan.capturing:
            object.__setattr__(part, "__class__", plan.capturing[path])
    counts = [
        (leaf, leaf.get_value())
        for _, leaf in nnx.iter_graph(module)
        if isinstance(leaf, nnx.RngCount)
    ]
    return module, counts


def pick(given: dict[str, dict[str, Any]], home: str, path: Path, leaf: Any) -> Any:
    """The given value for a leaf of the module."""
    text, wanted = _text(path), getattr(value_of(leaf), "shape", None)
    if text not in given[home]:
        raise ValueError(f"{home} do not fit the module: they lack {text!r}.")
    value = given[home][text]
    if wanted is not None and jnp.shape(value) != wanted:
        raise ValueError(
            f"{home} do not fit the module: {text!r} must have shape {wanted}, "
            f"got {jnp.shape(value)}."
        )
    return value


def listing(plan: Plan, module: nnx.Module, found: _taps.Calls) -> tuple[list[str], list[str]]:
    """Paths that can be tapped, and those that were tapped and handed out nothing."""
    silent = [_text(path) for path in plan.capturing if _text(path) not in found]
    parts = [_text(path) for path, part in _parts(module) if path and callable(part)]
    return sorted({*parts, *found} - {*silent}), silent


def calls(state: Any) -> dict[str, tuple[Any, ...]]:
    """Captured values as path -> values of the calls; a submodule's own output at its path."""
    found = {}
    for path, value in nnx.to_flat_state(state):
        value = value_of(value)
        path = path[:-1] if path[-1] == "__call__" else path
        found[_text(path)] = value if isinstance(value, tuple) else (value,)
    return found


def _parts(module: nnx.Module) -> Iterator[tuple[Path, Any]]:
    """The submodules with their paths, the module itself among them."""
    yield from nnx.iter_modules(module)


def leaves_of(module: nnx.Module) -> dict[Path, Any]:
    """Every variable and bare array of the module, shared ones once."""
    return dict(nnx.to_flat_state(nnx.split(module)[1]))


def home_of(leaf: Any) -> str | None:
    """Whether a leaf of the module belongs to params, to extra, or to neither."""
    if isinstance(leaf, nnx.Param):
        return "params"
    if isinstance(leaf, (nnx.RngState, nnx.Intermediate, nnx.Perturbation)):
        return None
    return "extra"


def value_of(leaf: Any) -> Any:
    """The array in a variable, or the bare array itself."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _text(path: Path) -> str:
    return "/".join(map(str, path))


def nest(flat: Mapping[Path, Any], *, text: bool = True) -> dict[Any, Any]:
    """Nested dict from paths; string keys, so that checkpoints and tree maps see one kind."""
    tree: dict[Any, Any] = {}
    for path, value in flat.items():
        parts = [str(part) for part in path] if text else list(path)
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = value
    return tree


def by_path(tree: Any) -> dict[str, Any]:
    """Nested dicts as path -> value; integer keys (nnx.to_pure_dict) count as strings."""
    return dict(_walk(tree, ()))


def _walk(tree: Any, path: Path) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _walk(value, (*path, name))
    else:
        yield _text(path), tree
