"""Averages of a student's variables over training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kdjax._pairs import State, Tree


def begun(params: Tree, extra: Tree) -> Tree:
    """The start of an average: copies, as one buffer can't be donated twice.

    They are of at least float32, since in less an average would stand still.
    """

    def one(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.copy(x)
        return jnp.array(x, jnp.promote_types(x.dtype, jnp.float32), copy=True)

    return jax.tree.map(one, {"params": params, "extra": extra})


def moved(average: Tree, now: Tree, decay: Any) -> Tree:
    """``decay * average + (1 - decay) * now``, also of batch statistics; counters are copied."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return b
        share = jnp.asarray(decay, a.dtype)
        return share * a + (1 - share) * b.astype(a.dtype)

    return jax.tree.map(one, average, now)


def of_state(state: Any, methods: str) -> tuple[Tree, Tree]:
    """``(params, extra)`` of the average in ``extra["ema"]``, or a sentence on who has one."""
    if not isinstance(state, State) or "ema" not in state.extra:
        raise ValueError(f"state must be a State of {methods}; it has no average.")
    return state.extra["ema"]["params"], state.extra["ema"]["extra"]
