"""Newton's iteration in relative steps, for the decreasing convex equations of this room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# root, step, upper bound, active, steps taken
_State = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
# Steps after which an iteration that still doubles is taken to be far away.
_PATIENCE = 12


def climb(
    relative_step: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    bound: jax.Array,
    *,
    done: jax.Array,
    max_steps: int,
) -> jax.Array:
    """The root of a decreasing convex function, climbed from its left.

    Newton's steps grow at most geometrically; from a start many powers of two below the root,
    geometric means of the iterate and an upper bound take over.

    Args:
      relative_step: ``x -> -F(x) / (x F'(x))``, [..., 1].
      start: where F isn't negative, above 0, [..., 1].
      bound: where F isn't positive, [..., 1].
      done: bool [..., 1]: entries to leave alone; what they return means nothing.
      max_steps: steps at most.

    Returns:
      The root, [..., 1]; NaN where it wasn't reached.
    """
    eps = float(jnp.finfo(start.dtype).eps)

    def body(state: _State) -> _State:
        x, step, high, active, steps = state
        leap = (steps >= _PATIENCE) & (step > 0.5)
        trial = x * (1 + step)
        trial = jnp.where(leap, jnp.maximum(trial, jnp.sqrt(x) * jnp.sqrt(high)), trial)
        found = relative_step(trial)
        beyond = leap & (found < 0)
        moves = active & ~beyond
        fresh = jnp.where(moves, found, step)
        # Below the root, steps shrink quadratically; one that doesn't shrink is rounding.
        stalled = (jnp.abs(step) < 1e-3) & (jnp.abs(fresh) >= 0.25 * jnp.abs(step))
        active &= (jnp.abs(fresh) > eps) & ~stalled
        high = jnp.where(beyond, trial, high)
        return jnp.where(moves, trial, x), fresh, high, active, steps + 1

    def unfinished(state: _State) -> Any:
        return jnp.any(state[3]) & (state[4] < max_steps)

    first = relative_step(start)
    active = ~done & (jnp.abs(first) > eps)
    bound = jnp.broadcast_to(bound, start.shape)
    state = (start, first, bound, active, jnp.zeros((), jnp.int32))
    x, step, *_ = jax.lax.while_loop(unfinished, body, state)
    # After the last step the error is the square of this one, or rounding.
    converged = jnp.abs(step) <= max(1e-3 * eps**0.5, 64 * eps)
    return jnp.where(converged, x * (1 + step), jnp.nan)


def nonzero(x: jax.Array) -> jax.Array:
    """Makes a denominator safe in the branch that `where` will not take."""
    return jnp.where(x == 0, 1.0, x)
