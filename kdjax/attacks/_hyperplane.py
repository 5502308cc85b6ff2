"""The shortest move from a point onto a hyperplane, inside the box of images.

Rows are independent: points x [B, d] in [0, 1]^d, normals w [B, d] and residuals [B],

    residual = <w, x> - b   for the hyperplane {v: <w, v> = b}.

The residual rather than b, because the caller knows it without the cancellation of <w, x> - b.
Where the box and the hyperplane don't meet, the move goes to the corner that comes nearest to it,
leaving alone what can't help (entries of w that are 0).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def linf_move(x: jax.Array, w: jax.Array, residual: jax.Array) -> jax.Array:
    """[B, d] the move of least largest entry: min(level, room) in each useful direction."""
    direction, weight, room, wanted = _towards(x, w, residual)
    return direction * jnp.minimum(_level(room, weight, weight * room, wanted), room)


def l2_move(x: jax.Array, w: jax.Array, residual: jax.Array) -> jax.Array:
    """[B, d] the move of least length: min(level * |w|, room) in each useful direction."""
    direction, weight, room, wanted = _towards(x, w, residual)
    stop = room / jnp.where(weight > 0, weight, 1)
    level = _level(stop, weight * weight, weight * room, wanted)
    return direction * jnp.minimum(level * weight, room)


def _towards(
    x: jax.Array, w: jax.Array, residual: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Direction of each entry, its weight and its room there, and the gain [B, 1] wanted.

    Dividing by the largest |w| changes no hyperplane, and keeps the squares of the gradients of a
    saturated model from underflowing.
    """
    largest = jnp.max(jnp.abs(w), axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1)
    direction = jnp.sign(w) * jnp.where(residual > 0, -1, 1)[:, None].astype(w.dtype)
    ahead = jnp.where(direction > 0, 1 - x, x)
    room = jnp.where(direction == 0, 0, jnp.maximum(ahead, 0))
    return direction, jnp.abs(w) / scale, room, jnp.abs(residual)[:, None] / scale


def _level(stop: jax.Array, rate: jax.Array, most: jax.Array, wanted: jax.Array) -> jax.Array:
    """[B, 1] the level L at which sum_i rate_i min(L, stop_i) reaches what is wanted.

    ``most`` is rate * stop. The sum is concave and piecewise linear in L, so that Newton's steps
    from 0 never pass the level, and end exactly on it after at most as many as there are pieces: a
    handful, for a small part of the cost of sorting the stops. Out of reach, the last step leads
    beyond the last stop: everything stops.
    """

    def closer(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        level, _ = state
        on = stop > level
        moving = jnp.sum(jnp.where(on, rate, 0), axis=-1, keepdims=True)
        stopped = jnp.sum(jnp.where(on, 0, most), axis=-1, keepdims=True)
        step = (wanted - stopped) / jnp.where(moving > 0, moving, 1)
        new = jnp.maximum(jnp.where(moving > 0, step, level), level)
        return new, jnp.any(new > level)

    start = jnp.zeros_like(wanted), jnp.any(wanted > 0)
    return jax.lax.while_loop(lambda state: state[1], closer, start)[0]
