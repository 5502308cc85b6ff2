"""Newton's iteration in relative steps, for the decreasing convex equations of this room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # root, step, active, steps taken


def climb(
    relative_step: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    *,
    done: jax.Array,
    max_steps: int,
) -> jax.Array:
    """The root of a decreasing convex function, from a start at its left, without a bracket.

    Args:
      relative_step: ``x -> -F(x) / (x F'(x))``, [..., 1].
      start: where F isn't negative, above 0, [..., 1].
      done: bool [..., 1]: entries to leave alone; what they return means nothing.
      max_steps: steps at most.

    Returns:
      The root, [..., 1]; NaN where it wasn't reached.
    """
    eps = float(jnp.finfo(start.dtype).eps)

    def body(state: _State) -> _State:
        x, step, active, steps = state
        moved = jnp.where(active, x * (1 + step), x)
        fresh = jnp.where(active, relative_step(moved), step)
        # Below the root, steps shrink quadratically; one that doesn't shrink is rounding.
        stalled = (jnp.abs(step) < 1e-3) & (jnp.abs(fresh) >= 0.25 * jnp.abs(step))
        return moved, fresh, active & (jnp.abs(fresh) > eps) & ~stalled, steps + 1

    def unfinished(state: _State) -> Any:
        return jnp.any(state[2]) & (state[3] < max_steps)

    first = relative_step(start)
    state = (start, first, ~done & (jnp.abs(first) > eps), jnp.zeros((), jnp.int32))
    x, step, _, _ = jax.lax.while_loop(unfinished, body, state)
    # After the last step the error is the square of this one, or rounding.
    converged = jnp.abs(step) <= max(1e-3 * eps**0.5, 64 * eps)
    return jnp.where(converged, x * (1 + step), jnp.nan)


def nonzero(x: jax.Array) -> jax.Array:
    """Makes a denominator safe in the branch that `where` will not take."""
    return jnp.where(x == 0, 1.0, x)
