"""Variables and outputs as they pass through a forward: precision, structure, form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks


def check_dtype(dtype: Any) -> Any:
    """The dtype of the forward pass; None leaves everything as it is."""
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(
            "dtype must be None or a floating-point dtype such as jnp.bfloat16, "
            f"got {_checks.describe(dtype)}."
        )
    return found


def check_inputs(inputs: Any) -> None:
    """What the model reads of a batch."""
    if not isinstance(inputs, str) and not callable(inputs):
        raise TypeError(
            "inputs must be the name of a batch entry or a function of the batch, "
            f"got {_checks.describe(inputs)}."
        )


def cast_floats(tree: Any, dtype: Any) -> Any:
    """Floating leaves in ``dtype``; integers, keys and, with None, everything unchanged."""
    if dtype is None:
        return tree

    def cast(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x

    return jax.tree.map(cast, tree)


def restore(old: Any, new: Any) -> Any:
    """``new`` in the tree, shapes and dtypes of ``old``: a State must keep its form."""
    old_leaves, structure = jax.tree.flatten(old)
    new_leaves, paths, new_paths = jax.tree.leaves(new), _paths(old), _paths(new)
    # Paths rather than structures: FrozenDict and dict hold the same leaves in the same order.
    if paths != new_paths:
        changed = min(set(paths) ^ set(new_paths), default="the root")
        raise ValueError(
            "extra must keep its structure in training, but the forward pass "
            f"{'adds' if changed in new_paths else 'drops'} {changed!r}; values that are only "
            "collected belong in a tap (Linen: sow them into 'intermediates')."
        )
    for path, a, b in zip(paths, old_leaves, new_leaves, strict=True):
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(
                f"extra must keep its shapes in training, but {path!r} goes from "
                f"{jnp.shape(a)} to {jnp.shape(b)}."
            )
    kept = [
        b if jnp.result_type(a) == jnp.result_type(b) else b.astype(jnp.result_type(a))
        for a, b in zip(old_leaves, new_leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, kept)


def as_outputs(
    raw: Any, outputs: Callable[[Any], Any] | None, argument: str = "outputs="
) -> dict[str, Any]:
    """What the forward returned, as a dict with ``"logits"``."""
    if outputs is not None:
        found = outputs(raw)
        if not isinstance(found, Mapping):
            raise TypeError(f"outputs must return a dict, got {_checks.describe(found)}.")
        return dict(found)
    if isinstance(raw, Mapping):
        if "logits" in raw:
            return dict(raw)
        got = f"a dict with {', '.join(sorted(map(str, raw))) or 'nothing'}"
    elif hasattr(raw, "shape") and hasattr(raw, "dtype"):
        return {"logits": raw}
    elif isinstance(raw, (tuple, list)):
        got = f"a {type(raw).__name__} of {len(raw)}"
    else:
        got = _checks.describe(raw)
    raise TypeError(
        f"The model must return logits or a dict with 'logits', got {got}; use {argument} to say "
        "where the logits are."
    )


def join(outputs: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Adds taps and exposed parameters to what the model returned."""
    for name in more:
        if name in outputs:
            raise ValueError(
                f"taps and expose must not use {name!r}: the model returns an output of that name."
            )
    return {**outputs, **more}


def _paths(tree: Any) -> list[str]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
