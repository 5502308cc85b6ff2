"""Plain functions -> Model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from kdjax import _checks
from kdjax.adapters import _variables
from kdjax.core import Model


def from_fn(
    init: Callable[..., Any],
    apply: Callable[..., Any],
    *,
    inputs: str | Callable[[Any], Any] = "image",
    dtype: Any = None,
    stateful: bool = False,
) -> Model:
    """Two plain functions as a `Model`.

    With ``stateful=False``: ``init(key, inputs) -> params`` and ``apply(params, inputs) ->
    outputs``, the same in training and evaluation. With ``stateful=True``, for models with batch
    statistics, dropout or a training mode: ``init(key, inputs) -> (params, extra)`` and
    ``apply(params, extra, inputs, *, train, key) -> (outputs, extra)``. ``outputs`` is an array of
    logits, or a dict with ``"logits"`` and whatever else the losses read.

    Args:
      init: makes the parameters (a pytree of arrays) from a typed key and example inputs.
      apply: the forward pass; pure, so that it can be jitted, differentiated and vmapped.
      inputs: the batch entry that ``apply`` reads, or a function from the batch to its inputs.
      dtype: precision of the forward pass: floating parameters and inputs are cast to it; stored
        parameters and ``extra`` keep their own. None (default) casts nothing.
      stateful: which of the two forms the functions have.

    Returns:
      The `Model`. In evaluation its ``apply`` returns ``extra`` as it got it.

    Raises:
      TypeError: a function does not take the arguments of its form, or returns something else.
      ValueError: ``extra`` changes its structure or shapes in training.

    Example:
      >>> import jax, jax.numpy as jnp, kdjax as kd
      >>> linear = kd.from_fn(
      ...     lambda key, x: {"w": jax.random.normal(key, (x.shape[-1], 10))},
      ...     lambda params, x: x @ params["w"],
      ... )
      >>> params, extra = linear.init(jax.random.key(0), jnp.ones((4, 3)))
      >>> outputs, extra = linear.apply(params, extra, jnp.ones((4, 3)))
      >>> outputs["logits"].shape, extra
      ((4, 10), {})
    """
    dtype = _variables.check_dtype(dtype)
    _variables.check_inputs(inputs)
    _check_form("init", init, "key, inputs", 2, {})
    if stateful:
        form, count, keywords = "params, extra, inputs, *, train, key", 3, {"train", "key"}
        _check_form("apply", apply, form, count, dict.fromkeys(keywords))
    else:
        _check_form("apply", apply, "params, inputs", 2, {})

    def model_init(key: Any, model_inputs: Any) -> tuple[Any, Any]:
        made = init(key, model_inputs)
        if not stateful:
            return made, {}
        return _pair("init", "(params, extra)", made)

    def model_apply(
        params: Any, extra: Any, model_inputs: Any, *, train: bool = False, key: Any = None
    ) -> tuple[dict[str, Any], Any]:
        cast = _variables.cast_floats(params, dtype)
        model_inputs = _variables.cast_floats(model_inputs, dtype)
        if not stateful:
            return _variables.as_outputs(apply(cast, model_inputs), None, "apply"), extra
        made = apply(cast, extra, model_inputs, train=train, key=key)
        raw, new_extra = _pair("apply", "(outputs, extra)", made)
        outputs = _variables.as_outputs(raw, None, "apply")
        return outputs, _variables.restore(extra, new_extra) if train else extra

    return Model(model_init, model_apply, inputs)


def _pair(name: str, wanted: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(
            f"{name} must return {wanted} with stateful=True, got {_checks.describe(value)}."
        )
    return value


def _check_form(
    name: str, function: Any, wanted: str, positional: int, keywords: dict[str, Any]
) -> None:
    if not callable(function):
        raise TypeError(f"{name} must be a function of ({wanted}), got {function!r}.")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind(*[None] * positional, **keywords)
    except TypeError as error:
        other = "stateful=False" if keywords else "stateful=True"
        hint = f"; {other} is for the other form" if name == "apply" else ""
        raise TypeError(
            f"{name} must be a function of ({wanted}), got one of {signature}{hint}."
        ) from error
