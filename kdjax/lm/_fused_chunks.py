"""Which rows each chunk of the fused loss has, and how they are read and written."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Chunks(NamedTuple):
    """All tokens, divided.

    Without ``order`` chunk i takes tokens i, i + number, i + 2 number, ...: where jit shards the
    tokens, each device then has its share of every chunk. With it chunk i takes the tokens
    ``order[i * size : (i + 1) * size]``, which has positions out of bounds past the last one.
    """

    tokens: int
    size: int
    number: int
    order: Any

    def laid_out(self, x: jax.Array) -> jax.Array:
        """A per-token array [N, ...] as ``read`` takes it."""
        if self.order is not None:
            return x
        missing = self.size * self.number - self.tokens
        if missing:
            x = jnp.pad(x, ((0, missing), *(((0, 0),) * (x.ndim - 1))))
        return x.reshape(self.size, self.number, *x.shape[1:])

    def read(self, x: jax.Array, index: jax.Array) -> jax.Array:
        """Rows [C, ...] of chunk ``index``; zeros past the last token."""
        if self.order is None:
            return jax.lax.dynamic_index_in_dim(x, index, 1, keepdims=False)
        return x.at[self._rows(index)].get(mode="fill", fill_value=0)

    def write(self, x: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
        """``x``, laid out, with the rows of chunk ``index``."""
        if self.order is None:
            return jax.lax.dynamic_update_index_in_dim(x, rows, index, 1)
        return x.at[self._rows(index)].set(rows, mode="drop", unique_indices=True)

    def restored(self, x: jax.Array) -> jax.Array:
        """A per-token array [N, ...] from one laid out."""
        return x if self.order is not None else x.reshape(-1, *x.shape[2:])[: self.tokens]

    def joined(self, x: jax.Array) -> jax.Array:
        """A per-token array [N] from those of all chunks [number, C]."""
        if self.order is None:
            return x.T.reshape(-1)[: self.tokens]
        empty = jnp.zeros_like(x, shape=(self.tokens,))
        return empty.at[self.order].set(x.reshape(-1), mode="drop", unique_indices=True)

    def _rows(self, index: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(self.order, index * self.size, self.size)


def chunks_of(limit: int, counts: jax.Array, pack: bool) -> Chunks:
    """Chunks of at most ``limit`` tokens; packed, those that count go first."""
    n = counts.shape[0]
    least = -(-n // limit)
    # Multiples of 8 suit matrix units; as many chunks, and little padding. Never none at all.
    size = min(limit, 8 * -(-n // (8 * max(least, 1))), max(n, 1))
    size = max(size, 1)
    number = max(1, -(-n // size))
    if not pack or n == 0:
        return Chunks(n, size, number, None)
    order = jnp.argsort(~counts, stable=True)
    beyond = jnp.arange(n, size * number, dtype=order.dtype)
    return Chunks(n, size, number, jnp.concatenate([order, beyond]))
