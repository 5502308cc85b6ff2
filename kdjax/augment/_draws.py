"""Random draws and strengths, one for each image."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import _checks


def keys(key: jax.Array, images: jax.Array) -> jax.Array:
    """One typed key per image."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(f"key must be a typed key (jax.random.key), got {_checks.describe(key)}.")
    if key.ndim == 0:
        return jax.random.split(key, images.shape[0])
    _checks.shape("key", key, images.shape[:1], "(one per image) or ()")
    return key


def uniform(keys: jax.Array, count: int) -> jax.Array:
    """[B, count] draws in [0, 1): one call for all that an image needs, as each takes time."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count,), jnp.float32))(keys)


def whole(draw: jax.Array, count: int) -> jax.Array:
    """Draws in [0, 1) -> whole numbers from 0 to count - 1."""
    return jnp.floor(draw * count).astype(jnp.int32)


def sometimes(
    draw: jax.Array, probability: Any, changed: jax.Array, images: jax.Array
) -> jax.Array:
    """``changed`` with the given probability, image by image, from draws in [0, 1)."""
    probability = _checks.number("probability", probability, low=0, high=1)
    return jnp.where((draw < probability)[:, None, None, None], changed, images)


def strength(name: str, draw: jax.Array, value: Any, dtype: Any) -> jax.Array:
    """[B]: the number itself, or a draw between a pair of numbers for each image."""
    if not isinstance(value, (tuple, list)):
        return jnp.full(draw.shape, _checks.number(name, value, low=0), dtype)
    if len(value) != 2:
        raise ValueError(f"{name} must be a number or a pair (low, high), got {value!r}.")
    start, end = (_checks.number(name, bound, low=0) for bound in value)
    if not (_checks.is_traced(start) or _checks.is_traced(end)) and start > end:
        raise ValueError(f"{name} must be a pair (low, high) with low <= high, got {value!r}.")
    return start + (end - start) * draw.astype(dtype)


def per_channel(name: str, value: Any, images: jax.Array, above: float | None = None) -> jax.Array:
    value = np.asarray(value) if isinstance(value, (tuple, list)) else value
    array = jnp.asarray(_checks.number(name, value, above=above, scalar=False), images.dtype)
    if array.ndim:
        _checks.shape(name, array, images.shape[-1:], "(one per channel) or ()")
        return array[None, None, None, :]
    return array
