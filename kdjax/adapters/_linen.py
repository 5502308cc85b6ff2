"""Flax Linen module -> Model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import flax.errors
import flax.linen as nn
import jax

from kdjax import _checks
from kdjax.adapters import _taps, _train_flag, _variables
from kdjax.core import Model

_INTERMEDIATES = "intermediates"


def from_linen(
    module: nn.Module,
    *,
    taps: Mapping[str, _taps.TapPath] | None = None,
    expose: Mapping[str, str] | None = None,
    dtype: Any = None,
    inputs: str | Callable[[Any], Any] = "image",
    outputs: Callable[[Any], Mapping[str, Any]] | None = None,
    train_argument: _train_flag.TrainArgument = ...,
    rng_streams: Sequence[str] = ("dropout",),
) -> Model:
    """A Flax Linen module as a `Model`; the module is not edited.

    ``params`` is the collection "params"; ``extra`` holds the other collections (batch
    statistics), and is {} if there are none. In training all of ``extra`` is mutable, in
    evaluation nothing is and ``extra`` comes back as it is. The forward runs once per call and
    costs what ``module.apply`` costs.

    Taps are submodule outputs by path: "block3", "encoder/layer_2/mlp". "*" and "?" match within
    one level and give a tuple in natural order (block2 before block10); a sequence of paths gives
    a tuple too. "block[1]" is the second call of a module that is called more than once. Another
    method's output is "encoder/encode". What the module sows into "intermediates" is there under
    the path of the module and the name. Sums before an activation and pre-softmax scores are no
    submodule's output, and Linen returns nothing for layers under ``nn.scan``: sow those (under
    ``nn.scan`` with ``variable_axes={"intermediates": 0}``).

    Args:
      module: an unbound module; called as ``module(inputs)`` plus its train flag.
      taps: output name to submodule path or paths.
      expose: output name to the path of a subtree of the parameters ("classifier"), for losses
        that need weights. They are the stored ones, not cast to ``dtype``.
      dtype: precision of the forward pass, such as ``jnp.bfloat16``: floating parameters and
        inputs are cast to it. Stored parameters and ``extra`` keep their own dtypes; outputs have
        whatever the module returns. None (default) casts nothing.
      inputs: the batch entry that the module reads, or a function from the batch to its inputs.
      outputs: maps what the module returns to a dict, for modules that return neither logits nor
        a dict with "logits".
      train_argument: what tells the module that it trains. By default the arguments (or else the
        fields) train, training, is_training and, meaning the opposite, deterministic and
        use_running_average are looked for. Otherwise the argument's name, a function from train
        to keyword arguments, or None.
      rng_streams: the random streams the module draws from in training. The first gets the key
        itself, so that results equal ``module.apply(..., rngs={"dropout": key})``.

    Returns:
      The `Model`. Its ``apply`` needs ``key`` in training if the module draws random numbers.

    Raises:
      TypeError: module is no Linen module, or an argument has the wrong form.
      ValueError: at the first call: a tap or exposed path that does not exist (the message lists
        those that do), a missing key, variables that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, kdjax as kd
      >>> from kdjax.models import MLP
      >>> model = kd.from_linen(MLP(10, features=(16, 8)), taps={"feat": "stage1/block0"})
      >>> images = jnp.zeros((2, 8, 8, 1))
      >>> params, extra = model.init(jax.random.key(0), images)
      >>> outputs, extra = model.apply(params, extra, images, train=True, key=jax.random.key(1))
      >>> outputs["logits"].shape, outputs["feat"].shape
      ((2, 10), (2, 8))
    """
    if not isinstance(module, nn.Module):
        hint = "; pass an instance" if isinstance(module, type) else "; see from_nnx, from_fn"
        raise TypeError(
            f"module must be a Flax Linen module, got {_checks.describe(module)}{hint}."
        )
    wanted = _taps.parse(taps)
    subtrees = _taps.parse_expose(expose, wanted)
    dtype = _variables.check_dtype(dtype)
    _variables.check_inputs(inputs)
    streams = tuple(rng_streams)
    switch = _train_switch(module, train_argument)
    every_tap = [tap for group in wanted.values() for tap in group]

    def is_wanted(submodule: nn.Module, method: str) -> bool:
        path = "/".join(submodule.path)
        if method == "__call__":
            return any(tap.matches(path) for tap in every_tap)
        return any(tap.path == f"{path}/{method}".lstrip("/") for tap in every_tap)

    def init(key: Any, model_inputs: Any) -> tuple[Any, Any]:
        bound, flags = switch(False)
        params_key, *others = jax.random.split(key, 1 + len(streams))
        rngs = {"params": params_key, **dict(zip(streams, others, strict=True))}
        variables = dict(bound.init(rngs, model_inputs, **flags))
        variables.pop(_INTERMEDIATES, None)
        return variables.pop("params", {}), variables

    def apply(
        params: Any, extra: Any, model_inputs: Any, *, train: bool = False, key: Any = None
    ) -> tuple[dict[str, Any], Any]:
        bound, flags = switch(train)
        variables = {"params": _variables.cast_floats(params, dtype), **extra}
        model_inputs = _variables.cast_floats(model_inputs, dtype)
        rngs = _rngs(streams, key) if train and key is not None else None
        mutable = [*extra] if train else []

        def forward(capture: Any) -> tuple[Any, Any]:
            with _clear_errors(train, key, streams):
                return bound.apply(
                    variables,
                    model_inputs,
                    rngs=rngs,
                    mutable=[*mutable, _INTERMEDIATES] if capture else mutable,
                    capture_intermediates=capture,
                    **flags,
                )

        def there() -> tuple[list[str], list[str]]:
            captured: dict[str, tuple[Any, ...]] = {}

            def look() -> None:
                _, state = forward(lambda _, method: method == "__call__")
                captured.update(_calls(state.get(_INTERMEDIATES, {})))

            jax.eval_shape(look)
            return list(captured), sorted(_submodules(params) - set(captured))

        raw, state = forward(is_wanted if wanted else False)
        found = _calls(state.get(_INTERMEDIATES, {}))
        more = {**_taps.select(wanted, found, there), **_taps.exposed(subtrees, params)}
        named = _variables.join(_variables.as_outputs(raw, outputs), more)
        if not train:
            return named, extra
        return named, _variables.restore(extra, {name: state[name] for name in extra})

    return Model(init, apply, inputs)


def _train_switch(
    module: nn.Module, train_argument: _train_flag.TrainArgument
) -> Callable[[bool], tuple[nn.Module, dict[str, Any]]]:
    """From ``train`` to the module to call and its keyword arguments."""
    flags = _train_flag.call_flags(type(module).__call__, train_argument)
    if train_argument is not ... or flags(True):
        return lambda train: (module, dict(flags(train)))
    fields = {field.name for field in dataclasses.fields(module)} & set(
        _train_flag.flag_values(True)
    )

    def switch(train: bool) -> tuple[nn.Module, dict[str, Any]]:
        values: dict[str, Any] = {**_train_flag.flag_values(train)}
        return module.clone(**{name: values[name] for name in fields}), {}

    return switch if fields else lambda train: (module, {})


def _rngs(streams: Sequence[str], key: Any) -> dict[str, Any]:
    return {name: jax.random.fold_in(key, i) if i else key for i, name in enumerate(streams)}


def _calls(intermediates: Any, prefix: str = "") -> dict[str, tuple[Any, ...]]:
    """Nested intermediates as path -> values of the calls; a submodule's own output at its path."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, value in intermediates.items():
        path = prefix if name == "__call__" else f"{prefix}/{name}".lstrip("/")
        if isinstance(value, Mapping):
            found.update(_calls(value, path))
        elif path:  # the root's own output is the raw return value
            found[path] = value if isinstance(value, tuple) else (value,)
    return found


def _submodules(params: Any, prefix: str = "") -> set[str]:
    """Paths of the submodules that have parameters."""
    paths = set()
    for name, value in params.items():
        if isinstance(value, Mapping):
            path = f"{prefix}/{name}".lstrip("/")
            paths |= {path} | _submodules(value, path)
    return paths


@contextmanager
def _clear_errors(train: bool, key: Any, streams: Sequence[str]) -> Iterator[None]:
    """Turns Flax's errors about rngs, mutability and variables into a sentence on our arguments."""
    try:
        yield
    except flax.errors.InvalidRngError as error:
        if not train:
            reason = (
                "the module draws random numbers in evaluation; say with train_argument= how it "
                "is told that it does not train"
            )
        elif key is None:
            reason = "key must be given in training: the module draws random numbers"
        else:
            reason = (
                f"rng_streams must name every random stream of the module, got {tuple(streams)}"
            )
        raise ValueError(f"{reason} ({_first_sentence(error)}).") from error
    except flax.errors.ModifyScopeVariableError as error:
        mode = "training" if train else "evaluation"
        raise ValueError(
            f"the module changes variables in {mode} that extra does not hold as mutable; say "
            f"with train_argument= how it is told that it trains ({_first_sentence(error)})."
        ) from error
    except (
        flax.errors.ScopeCollectionNotFound,
        flax.errors.ScopeVariableNotFoundError,
        flax.errors.ScopeParamNotFoundError,
        flax.errors.ScopeParamShapeError,
    ) as error:
        raise ValueError(
            f"params and extra do not fit the module: {_first_sentence(error)}."
        ) from error


def _first_sentence(error: Exception) -> str:
    """Flax's message without the link to its documentation."""
    return inspect.cleandoc(str(error)).split(" (https://")[0].split("\n")[0].rstrip(". ")
