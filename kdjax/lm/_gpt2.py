"""GPT-2 in Flax Linen, with everything that is distilled among the outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.lm._config import ACTIVATIONS, GPT2Config
from kdjax.lm._layers import FeedForward, attend, dense, embedding, layer_norm, root_scale

Cache = Mapping[str, Any]


def empty_cache(config: GPT2Config, batch: int, length: int, dtype: Any) -> dict[str, Any]:
    """Keys and values of no tokens yet, with room for ``length``."""
    shape = (batch, length, config.hidden_size)
    layers = range(config.num_layers)
    return {
        "keys": tuple(jnp.zeros(shape, dtype) for _ in layers),
        "values": tuple(jnp.zeros(shape, dtype) for _ in layers),
        "length": jnp.zeros((), jnp.int32),
    }


class SelfAttention(nn.Module):
    """One projection ``qkv`` into queries, keys and values, and ``o`` out."""

    config: GPT2Config
    index: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        allowed: jax.Array,
        past: tuple[Any, Any, Any] | None,
        *,
        train: bool,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        config = self.config
        queries, keys, values = jnp.split(dense(3 * config.hidden_size, "qkv")(x), 3, axis=-1)
        if past is not None:
            old_keys, old_values, start = past
            keys = jax.lax.dynamic_update_slice_in_dim(
                old_keys, keys.astype(old_keys.dtype), start, axis=1
            )
            values = jax.lax.dynamic_update_slice_in_dim(
                old_values, values.astype(old_values.dtype), start, axis=1
            )
        scale = root_scale(config.hidden_size // config.num_heads) if config.scale_attention else 1
        context, scores = attend(
            queries,
            keys,
            values,
            allowed,
            heads=config.num_heads,
            scale=scale / (self.index + 1 if config.scale_by_layer else 1),
            dropout=nn.Dropout(config.attention_dropout, deterministic=not train),
        )
        seen = {"scores": scores, "queries": queries, "keys": keys, "values": values}
        return dense(config.hidden_size, "o", _residual_std(config))(context), seen


class Layer(nn.Module):
    """LayerNorm before attention and before feed-forward, each added to its input."""

    config: GPT2Config
    index: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        allowed: jax.Array,
        past: tuple[Any, Any, Any] | None,
        train: bool,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        config = self.config
        drop = nn.Dropout(config.hidden_dropout, deterministic=not train)
        normed = layer_norm(config.layer_norm_eps, "ln1")(x)
        change, seen = SelfAttention(config, self.index, name="attn")(
            normed, allowed, past, train=train
        )
        x = x + drop(change)
        normed = layer_norm(config.layer_norm_eps, "ln2")(x)
        change = FeedForward(
            config.feed_forward,
            config.hidden_size,
            ACTIVATIONS[config.activation],
            _residual_std(config),
            name="ffn",
        )(normed)
        return x + drop(change), seen


class GPT2(nn.Module):
    """GPT-2 with the head of its config.

    Called as ``module(inputs, train=False)`` with a dict of ``input_ids`` [B, L] and optional
    ``attention_mask`` (1 = real), ``position_ids``, and ``cache`` (keys and values of earlier
    tokens; ``attention_mask`` then is [B, room of the cache]). Returns a dict: ``hidden`` (L + 1
    arrays [B, L, d]: the embeddings first, the last after the final LayerNorm), ``scores`` (before
    mask and softmax, [B, H, L, L]), ``queries``, ``keys``, ``values`` (each [B, L, d]), ``logits``
    if there is a head, ``head_input`` [B, L, d] and ``head`` [V, d] if they are their product,
    ``cache`` if there was one.
    """

    config: GPT2Config
    remat: bool = False
    logits: bool = True  # False: those of a language model aren't computed

    @nn.compact
    def __call__(self, inputs: Mapping[str, Any], train: bool = False) -> dict[str, Any]:
        config, ids = self.config, inputs["input_ids"]
        cache: Cache | None = inputs.get("cache")
        start = 0 if cache is None else cache["length"]
        rows = start + jnp.arange(ids.shape[1])
        tokens = embedding(config.vocab_size, config.hidden_size, "wte")
        positions = embedding(config.max_positions, config.hidden_size, "wpe")
        x = tokens(ids) + positions(inputs.get("position_ids", rows[None]))
        x = nn.Dropout(config.embedding_dropout, deterministic=not train)(x)
        columns = ids.shape[1] if cache is None else cache["keys"][0].shape[1]
        allowed = (jnp.arange(columns)[None, :] <= rows[:, None])[None, None]
        if (mask := inputs.get("attention_mask")) is not None:
            allowed = allowed & (mask != 0)[:, None, None, :]
        layer = nn.remat(Layer, static_argnums=(4,)) if self.remat else Layer
        hidden, seen = [x], []
        for i in range(config.num_layers):
            past = None if cache is None else (cache["keys"][i], cache["values"][i], start)
            x, found = layer(config, i, name=f"layer_{i}")(x, allowed, past, train)
            hidden.append(x)
            seen.append(found)
        x = layer_norm(config.layer_norm_eps, "ln_f")(x)
        outputs: dict[str, Any] = {"hidden": (*hidden[:-1], x)}
        outputs |= {name: tuple(one[name] for one in seen) for name in seen[0]}
        if cache is not None:
            outputs["cache"] = {
                "keys": outputs["keys"],
                "values": outputs["values"],
                "length": cache["length"] + ids.shape[1],
            }
        return outputs | self._head(x, ids, tokens.embedding)

    def _head(self, x: jax.Array, ids: jax.Array, words: jax.Array) -> dict[str, jax.Array]:
        config = self.config
        if config.head is None:
            return {}
        if config.head == "lm":
            if not config.tied:
                shape = (config.vocab_size, config.hidden_size)
                words = self.param("lm_head", nn.initializers.normal(0.02), shape)
            found = {"head_input": x, "head": words}
            return found | ({"logits": x @ words.T.astype(x.dtype)} if self.logits else {})
        logits = nn.Dense(config.num_labels, use_bias=False, name="head")(x)
        return {"logits": logits[jnp.arange(len(ids)), self._last(ids)]}

    def _last(self, ids: jax.Array) -> jax.Array:
        """Position of the right-most token that is not padding."""
        if self.config.pad_token is None:
            if len(ids) > 1:
                raise ValueError(
                    "pad_token must be set in the config for a 'sequence' head and more than one "
                    "sequence: without it nobody knows where they end."
                )
            return jnp.full(len(ids), ids.shape[1] - 1)
        real = ids != self.config.pad_token
        return jnp.max(jnp.where(real, jnp.arange(ids.shape[1]), 0), axis=1)


def _residual_std(config: GPT2Config) -> float:
    return 0.02 / math.sqrt(2 * config.num_layers)
