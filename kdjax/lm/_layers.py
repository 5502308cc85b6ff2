"""What BERT and GPT-2 have in common."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

INIT = nn.initializers.normal(0.02)  # of both papers' code


def layer_norm(eps: float, name: str) -> nn.LayerNorm:
    """LayerNorm as PyTorch computes it: the variance in a pass of its own."""
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, name=name)


def dense(features: int, name: str, std: float = 0.02) -> nn.Dense:
    return nn.Dense(features, kernel_init=nn.initializers.normal(std), name=name)


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    allowed: jax.Array | None,
    *,
    heads: int,
    scale: float,
    dropout: nn.Dropout,
) -> tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention, [B, Q, d] and [B, K, d] to [B, Q, d], and its scores.

    ``allowed`` is boolean and broadcasts against the scores [B, H, Q, K], which come back unmasked,
    before the softmax, in at least float32.
    """
    batch, width = queries.shape[0], queries.shape[-1] // heads

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(batch, x.shape[1], heads, width)

    accumulate = jnp.promote_types(queries.dtype, jnp.float32)
    scores = scale * jnp.einsum(
        "bqhw,bkhw->bhqk", split(queries), split(keys), preferred_element_type=accumulate
    )
    masked = scores
    if allowed is not None:
        # Finite, so that a row in which nothing is allowed has finite values and gradients.
        masked = jnp.where(allowed, scores, float(jnp.finfo(scores.dtype).min))
    weights = dropout(jax.nn.softmax(masked, axis=-1)).astype(values.dtype)
    context = jnp.einsum("bhqk,bkhw->bqhw", weights, split(values))
    return context.reshape(queries.shape), scores


class FeedForward(nn.Module):
    """Two dense layers, ``up`` and ``down``."""

    inner: int
    outer: int
    activation: Any
    down_std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.activation(dense(self.inner, "up")(x))
        return dense(self.outer, "down", self.down_std)(x)


def embedding(rows: int, width: int, name: str) -> nn.Embed:
    return nn.Embed(rows, width, embedding_init=INIT, name=name)


def root_scale(width: int) -> float:
    return 1 / math.sqrt(width)
