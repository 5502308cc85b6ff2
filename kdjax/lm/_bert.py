"""BERT and DistilBERT in Flax Linen, with everything that is distilled among the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.lm._config import ACTIVATIONS, BertConfig
from kdjax.lm._layers import FeedForward, attend, dense, embedding, layer_norm, root_scale


class Embeddings(nn.Module):
    """LayerNorm of the sum of word, position and segment embeddings."""

    config: BertConfig

    @nn.compact
    def __call__(self, inputs: Mapping[str, jax.Array], *, train: bool) -> Any:
        config, ids = self.config, inputs["input_ids"]
        word = embedding(config.vocab_size, config.hidden_size, "word")
        positions = embedding(config.max_positions, config.hidden_size, "position")
        at = inputs.get("position_ids", jnp.arange(ids.shape[1])[None])
        x = word(ids)
        if config.token_types:
            types = inputs.get("token_type_ids", jnp.zeros_like(ids))
            x = x + embedding(config.token_types, config.hidden_size, "token_type")(types)
        x = layer_norm(config.layer_norm_eps, "ln")(x + positions(at))
        return nn.Dropout(config.hidden_dropout, deterministic=not train)(x), word.embedding


class SelfAttention(nn.Module):
    """Projections ``q``, ``k``, ``v`` and ``o`` around scaled dot-product attention."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, allowed: jax.Array | None, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        config = self.config
        queries, keys, values = (dense(config.hidden_size, name)(x) for name in "qkv")
        context, scores = attend(
            queries,
            keys,
            values,
            allowed,
            heads=config.num_heads,
            scale=root_scale(config.hidden_size // config.num_heads),
            dropout=nn.Dropout(config.attention_dropout, deterministic=not train),
        )
        seen = {"scores": scores, "queries": queries, "keys": keys, "values": values}
        return dense(config.hidden_size, "o")(context), seen


class Layer(nn.Module):
    """Attention and feed-forward, each followed by LayerNorm of the sum."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, allowed: jax.Array | None, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        config = self.config
        drop = nn.Dropout(config.hidden_dropout, deterministic=not train)
        change, seen = SelfAttention(config, name="attn")(x, allowed, train=train)
        x = layer_norm(config.layer_norm_eps, "ln1")(x + drop(change))
        change = FeedForward(
            config.intermediate_size,
            config.hidden_size,
            ACTIVATIONS[config.activation],
            name="ffn",
        )(x)
        return layer_norm(config.layer_norm_eps, "ln2")(x + drop(change)), seen


class MaskedLMHead(nn.Module):
    """Dense, activation, LayerNorm, then the word embedding (or an own matrix) and a bias."""

    config: BertConfig
    logits: bool

    @nn.compact
    def __call__(self, x: jax.Array, words: jax.Array) -> dict[str, jax.Array]:
        config = self.config
        x = ACTIVATIONS[config.activation](dense(config.hidden_size, "transform")(x))
        x = layer_norm(config.layer_norm_eps, "ln")(x)
        shape = (config.vocab_size, config.hidden_size)
        if not config.tied:
            words = self.param("decoder", nn.initializers.normal(0.02), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape[:1])
        found = {"head_input": x, "head": words, "head_bias": bias}
        if self.logits:
            found["logits"] = x @ words.T.astype(x.dtype) + bias.astype(x.dtype)[None, None]
        return found


class Bert(nn.Module):
    """BERT or DistilBERT with the head of its config.

    Called as ``module(inputs, train=False)`` with a dict of ``input_ids`` [B, L] and optional
    ``attention_mask`` (1 = real), ``token_type_ids``, ``position_ids``. Returns a dict: ``hidden``
    (L + 1 arrays [B, L, d], the embeddings first), ``scores`` (before mask and softmax, [B, H, L,
    L]), ``queries``, ``keys``, ``values`` (each [B, L, d]), ``pooled`` [B, d] if there is a pooler,
    ``logits`` if there is a head, ``next_sentence`` [B, 2] of a "pretraining" head; of a masked-LM
    head also ``head_input`` [B, L, d], ``head`` [V, d] and ``head_bias`` [V], whose product and sum
    the logits are.
    """

    config: BertConfig
    remat: bool = False
    logits: bool = True  # False: those of a masked language model aren't computed

    @nn.compact
    def __call__(self, inputs: Mapping[str, jax.Array], train: bool = False) -> dict[str, Any]:
        config, mask = self.config, inputs.get("attention_mask")
        allowed = None if mask is None else (mask != 0)[:, None, None, :]
        x, words = Embeddings(config, name="embeddings")(inputs, train=train)
        layer = nn.remat(Layer, static_argnums=(3,)) if self.remat else Layer
        hidden, seen = [x], []
        for i in range(config.num_layers):
            x, found = layer(config, name=f"layer_{i}")(x, allowed, train)
            hidden.append(x)
            seen.append(found)
        outputs: dict[str, Any] = {"hidden": tuple(hidden)}
        outputs |= {name: tuple(one[name] for one in seen) for name in seen[0]}
        if config.pooler:
            outputs["pooled"] = jnp.tanh(dense(config.hidden_size, "pooler")(x[:, 0]))
        return outputs | self._head(x, outputs.get("pooled"), words, train)

    def _head(
        self, x: jax.Array, pooled: jax.Array | None, words: jax.Array, train: bool
    ) -> dict[str, jax.Array]:
        config = self.config
        if config.head is None:
            return {}
        if config.head in ("masked_lm", "pretraining"):
            found = MaskedLMHead(config, self.logits, name="mlm")(x, words)
            if config.head == "pretraining":
                found["next_sentence"] = dense(2, "nsp")(pooled)
            return found
        if config.head == "span":
            return {"logits": dense(2, "head")(x)}
        rate = config.hidden_dropout if config.head_dropout is None else config.head_dropout
        drop = nn.Dropout(rate, deterministic=not train)
        if config.head == "sequence":
            x = pooled if pooled is not None else nn.relu(self._first(x[:, 0]))
        return {"logits": dense(config.num_labels, "head")(drop(x))}

    def _first(self, x: jax.Array) -> jax.Array:
        return dense(self.config.hidden_size, "pre_head")(x)
