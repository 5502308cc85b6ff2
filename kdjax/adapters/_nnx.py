"""Flax NNX module -> Model, and trained arrays back into a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as linen
import flax.nnx as nnx
import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax.adapters import _nnx_plan, _taps, _train_flag, _variables
from kdjax.core import Model


def from_nnx(
    module: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
    *,
    taps: Mapping[str, _taps.TapPath] | None = None,
    expose: Mapping[str, str] | None = None,
    dtype: Any = None,
    inputs: str | Callable[[Any], Any] = "image",
    outputs: Callable[[Any], Mapping[str, Any]] | None = None,
    train_argument: _train_flag.TrainArgument = ...,
) -> Model:
    """A Flax NNX module as a `Model`; the module is not edited.

    ``params`` are its ``nnx.Param``; ``extra`` holds everything else (batch statistics) but
    random state: streams are seeded from ``key`` at every training call, so that the same key
    gives the same numbers. Both are nested dicts of arrays with string keys. Training and
    evaluation are ``module.train()`` and ``module.eval()``; in evaluation ``extra`` comes back as
    it is.

    Taps are as for `from_linen`: submodule outputs by path ("blocks/0/conv", "blocks/*"), other
    methods' ("encoder/encode"), and what the module sows as ``nnx.Intermediate``. Layers under
    ``nnx.scan`` or ``nnx.vmap`` give their outputs stacked. Sums before an activation and
    pre-softmax scores are no submodule's output: sow them.

    Args:
      module: a function from ``nnx.Rngs`` to the module, or a module, whose arrays are then the
        initial values: ``init`` copies them, so that donated training buffers never are hers.
      taps: output name to submodule path or paths.
      expose: output name to the path of a subtree of the parameters ("classifier"), for losses
        that need weights. They are the stored ones, not cast to ``dtype``.
      dtype: precision of the forward pass, such as ``jnp.bfloat16``: floating parameters and
        inputs are cast to it, and layers with ``dtype=None`` compute in it. Stored parameters and
        ``extra`` keep their own dtypes. None (default) casts nothing.
      inputs: the batch entry that the module reads, or a function from the batch to its inputs.
      outputs: maps what the module returns to a dict, for modules that return neither logits nor
        a dict with "logits".
      train_argument: for modules that are told by an argument of ``__call__``; see `from_linen`.
        An argument ``rngs`` is passed as well.

    Returns:
      The `Model`. Its ``apply`` needs ``key`` in training if the module draws random numbers.

    Raises:
      TypeError: module is neither an NNX module nor a function that returns one.
      ValueError: at the first call: a tap or exposed path that does not exist (the message lists
        those that do), a missing key, variables that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, kdjax as kd
      >>> from flax import nnx
      >>> model = kd.from_nnx(lambda rngs: nnx.Sequential(
      ...     nnx.Linear(4, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs)),
      ...     taps={"feat": "layers/0"})
      >>> params, extra = model.init(jax.random.key(0), jnp.ones((2, 4)))
      >>> outputs, extra = model.apply(params, extra, jnp.ones((2, 4)))
      >>> outputs["logits"].shape, outputs["feat"].shape
      ((2, 3), (2, 8))
    """
    wanted = _taps.parse(taps)
    subtrees = _taps.parse_expose(expose, wanted)
    dtype = _variables.check_dtype(dtype)
    _variables.check_inputs(inputs)
    abstract, start = _abstract(module)
    flags = _train_flag.call_flags(type(abstract).__call__, train_argument)
    takes_rngs = "rngs" in inspect.signature(type(abstract).__call__).parameters
    every_tap = [tap for group in wanted.values() for tap in group]
    capturing = _nnx_plan.capturing_classes(abstract, every_tap)
    plans = {mode: _nnx_plan.make_plan(abstract, mode, dtype, capturing) for mode in (True, False)}

    def init(key: Any, model_inputs: Any) -> tuple[Any, Any]:
        if start is not None:
            return jax.tree.map(jnp.copy, start)
        return nnx_variables(module(nnx.Rngs(key)))

    def apply(
        params: Any, extra: Any, model_inputs: Any, *, train: bool = False, key: Any = None
    ) -> tuple[dict[str, Any], Any]:
        plan = plans[train]
        seed = jax.random.key(0) if key is None else key
        built, counts = _nnx_plan.build(plan, _variables.cast_floats(params, dtype), extra, seed)
        keywords = dict(flags(train))
        if takes_rngs:
            # One more than the number of streams inside, so that no stream repeats another.
            rngs = keywords["rngs"] = nnx.Rngs(jax.random.fold_in(seed, len(plan.leaves)))
            counts = [*counts, (rngs.default.count, rngs.default.count.get_value())]
        model_inputs = _variables.cast_floats(model_inputs, dtype)

        def forward(called: Any) -> Any:
            return called(model_inputs, **keywords)

        captured: Any = nnx.capture(forward, _nnx_plan.TapOutput, nnx.Intermediate)(built)
        raw, tapped, sown = captured
        if train and key is None and any(c.get_value() is not before for c, before in counts):
            raise ValueError("key must be given in training: the module draws random numbers.")
        found = {**_nnx_plan.calls(sown), **_nnx_plan.calls(tapped)}
        tapped = _taps.select(wanted, found, lambda: _nnx_plan.listing(plan, built, found))
        more = {**tapped, **_taps.exposed(subtrees, params)}
        named = _variables.join(_variables.as_outputs(raw, outputs), more)
        return named, _variables.restore(extra, nnx_variables(built)[1]) if train else extra

    return Model(init, apply, inputs)


def nnx_variables(module: nnx.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The variables of an NNX module as `from_nnx` orders them: a trained teacher's ``frozen``.

    The arrays are the module's own, not copies: don't donate them.

    Args:
      module: the module.

    Returns:
      ``(params, extra)``: nested dicts with string keys of the ``nnx.Param`` values, and of all
      others but random state and captured intermediates.

    Raises:
      TypeError: module is no NNX module.

    Example:
      >>> import kdjax as kd
      >>> from flax import nnx
      >>> params, extra = kd.nnx_variables(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
      >>> sorted(params), sorted(extra)
      (['bias', 'scale'], ['mean', 'var'])
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module must be a Flax NNX module, got {_checks.describe(module)}.")
    parts: dict[str, dict[_nnx_plan.Path, Any]] = {"params": {}, "extra": {}}
    for path, leaf in _nnx_plan.leaves_of(module).items():
        if (home := _nnx_plan.home_of(leaf)) is not None:
            parts[home][path] = _nnx_plan.value_of(leaf)
    return _nnx_plan.nest(parts["params"]), _nnx_plan.nest(parts["extra"])


def load_nnx(module: nnx.Module, params: Any, extra: Any) -> nnx.Module:
    """A copy of an NNX module that holds the given arrays, such as a trained student's.

    Args:
      module: the module that gives the structure and the random state; it is not changed.
      params: as in ``state.params["student"]``.
      extra: as in ``state.extra["student"]``.

    Returns:
      The new module; it shares its arrays with ``params`` and ``extra``.

    Raises:
      TypeError: module is no NNX module.
      ValueError: params or extra do not fit the module.

    Example:
      >>> import jax, kdjax as kd
      >>> from flax import nnx
      >>> layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> params, extra = kd.nnx_variables(layer)
      >>> doubled = kd.load_nnx(layer, jax.tree.map(lambda w: 2 * w, params), extra)
      >>> bool((doubled.kernel[...] == 2 * layer.kernel[...]).all())
      True
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module must be a Flax NNX module, got {_checks.describe(module)}.")
    fresh = nnx.clone(module)
    given = {"params": _nnx_plan.by_path(params), "extra": _nnx_plan.by_path(extra)}
    leaves = _nnx_plan.leaves_of(fresh)
    values = {}
    for path, leaf in leaves.items():
        home = _nnx_plan.home_of(leaf)
        values[path] = (
            _nnx_plan.value_of(leaf) if home is None else _nnx_plan.pick(given, home, path, leaf)
        )
    return nnx.merge(nnx.split(fresh)[0], _nnx_plan.nest(values, text=False))


def _abstract(module: Any) -> tuple[nnx.Module, tuple[Any, Any] | None]:
    """The module without arrays, and the initial values if it came with some."""
    if isinstance(module, linen.Module):
        raise TypeError("module must be a Flax NNX module, got a Linen one: use kdjax.from_linen.")
    if isinstance(module, nnx.Module):
        start = nnx_variables(module)
        shapes = nnx.eval_shape(lambda: nnx.clone(module))
    elif callable(module):
        start, shapes = None, nnx.eval_shape(lambda: _made(module(nnx.Rngs(0))))
    else:
        _made(module)
    nnx.pop(shapes, (nnx.Intermediate, nnx.Perturbation))
    return shapes, start


def _made(module: Any) -> nnx.Module:
    if not isinstance(module, nnx.Module):
        raise TypeError(
            "module must be a Flax NNX module or a function from nnx.Rngs to one, "
            f"got {_checks.describe(module)}."
        )
    return module
