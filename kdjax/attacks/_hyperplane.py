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

    ``most`` is rate * stop. For every set S of stopped entries the sum is at most

        sum_{S} most + L sum_{not S} rate,

    with equality for the entries that have stopped by L, which are the first ones in the order of
    their stops. So each k gives a lower bound of L, and the largest bound is L itself. Out of
    reach, the bound with all but the last stopped lies beyond the last stop: everything stops.
    """
    _, rate, most = jax.lax.sort((stop, rate, most), dimension=-1, num_keys=1)
    stopped = jnp.cumsum(most, axis=-1)
    stopped = jnp.concatenate([jnp.zeros_like(stopped[:, :1]), stopped[:, :-1]], axis=-1)
    # From the end, not as a difference of sums from the start: that would leave only rounding.
    moving = jax.lax.cumsum(rate, axis=1, reverse=True)
    bounds = (wanted - stopped) / jnp.where(moving > 0, moving, 1)
    return jnp.max(jnp.where(moving > 0, bounds, 0), axis=-1, keepdims=True)
