"""What losses of feature maps share: rows that don't count, and sizes that differ."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def blank_rows(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """Zeros in the rows of ``x`` [B, ...] whose ``where`` [B] is False, whatever was there."""
    if where is None:
        return x
    return jnp.where(where.reshape(where.shape + (1,) * (x.ndim - 1)), x, 0)


def resize_mean(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Adaptive average pooling of maps [B, H, W, C] to a height and a width.

    Cell i covers the rows from floor(i H / h) up to ceil((i + 1) H / h), so cells may overlap.
    """
    for axis, wanted in zip((1, 2), size, strict=True):
        found = x.shape[axis]
        if found == wanted:
            continue
        start = jnp.arange(wanted) * found // wanted
        stop = -(-(jnp.arange(1, wanted + 1) * found) // wanted)
        place = jnp.arange(found)
        inside = (place[None] >= start[:, None]) & (place[None] < stop[:, None])
        weights = inside / inside.sum(axis=1, keepdims=True)
        # Accelerators multiply float32 in fewer digits unless they are told.
        exact = jax.lax.Precision.HIGHEST
        pooled = jnp.tensordot(weights.astype(x.dtype), x, (1, axis), precision=exact)
        x = jnp.moveaxis(pooled, 0, axis)
    return x
