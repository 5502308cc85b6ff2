"""Norms, projections and steps over the whole of each image; the first dimension is the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rows(values: jax.Array, like: jax.Array) -> jax.Array:
    """[B] values with the dimensions of ``like`` [B, ...], to broadcast against it."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


def l2_norm(d: jax.Array) -> jax.Array:
    """[B, 1, ...] Euclidean norms of images, scaled first so that no square under- or overflows."""
    axes = tuple(range(1, d.ndim))
    scale = jnp.max(jnp.abs(d), axis=axes, keepdims=True)
    unit = d / jnp.where(scale > 0, scale, 1)
    return scale * jnp.sqrt(jnp.sum(unit * unit, axis=axes, keepdims=True))


def linf_norm(d: jax.Array) -> jax.Array:
    """[B, 1, ...] largest absolute entries of images."""
    return jnp.max(jnp.abs(d), axis=tuple(range(1, d.ndim)), keepdims=True)


def clip01(x: jax.Array) -> jax.Array:
    """Into the range of images."""
    return jnp.clip(x, 0, 1)


def into_box(x_adv: jax.Array, x: jax.Array, eps: jax.Array) -> jax.Array:
    """The nearest image within ``eps`` of every pixel of ``x``: first the ball, then the range."""
    return clip01(x + jnp.clip(x_adv - x, -eps, eps))
