"""What a transformer is made of, as Hugging Face folders say it in ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


# "gelu" is the exact form here and the tanh form in jax.nn and flax.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {
        **dict.fromkeys(("gelu", "gelu_python"), _gelu),
        **dict.fromkeys(
            (
                "gelu_new",
                "gelu_fast",
                "gelu_pytorch_tanh",
                "gelu_python_tanh",
                "gelu_accurate",
            ),
            _gelu_tanh,
        ),
        "quick_gelu": _quick_gelu,
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
        "tanh": jnp.tanh,
    }
)
BERT_HEADS = (None, "masked_lm", "pretraining", "sequence", "token", "span")
GPT2_HEADS = (None, "lm", "sequence")


def _other() -> Any:
    return dataclasses.field(default_factory=dict, compare=False, repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """BERT or DistilBERT; ``dataclasses.replace`` makes that of a student.

    Attributes:
      vocab_size: rows of the word embedding.
      hidden_size: width of the residual stream, a multiple of ``num_heads``.
      num_layers: transformer layers, at least 1.
      num_heads: attention heads.
      intermediate_size: width inside the feed-forward layers.
      max_positions: longest sequence.
      token_types: rows of the segment embedding; DistilBERT has 0.
      activation: of the feed-forward layers and the masked-LM head, a name of transformers:
        "gelu" is the exact form, "gelu_new" the tanh form.
      layer_norm_eps: of every LayerNorm.
      hidden_dropout: rate after embeddings and sublayers, in training.
      attention_dropout: rate on attention probabilities, in training.
      head_dropout: rate before a classifier; None takes ``hidden_dropout``.
      pad_token: the id of padding.
      pooler: whether the first token goes through a dense tanh layer (output ``pooled``); the heads
        "sequence" and "pretraining" need it, "masked_lm", "token", "span" and DistilBERT can't
        have it.
      head: None, "masked_lm", "pretraining" (masked LM and next sentence), "sequence" (one label
        per sequence), "token" (one per token) or "span" (start and end of an answer).
      num_labels: outputs of a "sequence" or "token" head.
      tied: whether the masked-LM head shares the word embedding.
      distil: DistilBERT's names and its sequence head (a ReLU layer on the first token).
      labels: names of the ``num_labels`` classes, if they have any.
      other: keys of ``config.json`` that the model doesn't need, kept for saving.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 512
    token_types: int = 2
    activation: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    head_dropout: float | None = None
    pad_token: int | None = 0
    pooler: bool = True
    head: str | None = None
    num_labels: int = 2
    tied: bool = True
    distil: bool = False
    labels: tuple[str, ...] | None = None
    other: Mapping[str, Any] = _other()

    def __post_init__(self) -> None:
        _check_sizes(self)
        _checks.count("token_types", self.token_types, low=0)
        if self.head not in BERT_HEADS:
            raise ValueError(f"head must be one of {BERT_HEADS} for BERT, got {self.head!r}.")
        if self.distil and (self.token_types or self.pooler or self.head == "pretraining"):
            raise ValueError(
                "distil must be False for a model with token types, a pooler or a next-sentence "
                "head: DistilBERT has none of them."
            )
        if self.distil and self.layer_norm_eps != 1e-12:
            raise ValueError(
                f"layer_norm_eps must be 1e-12 for DistilBERT, got {self.layer_norm_eps}."
            )
        needs_pooler = self.head in ("sequence", "pretraining") and not self.distil
        if needs_pooler and not self.pooler:
            raise ValueError(f"pooler must be True for the head {self.head!r}, got False.")
        if self.pooler and self.head in ("masked_lm", "token", "span"):
            raise ValueError(
                f"pooler must be False for the head {self.head!r}, which doesn't read it and which "
                "transformers stores without it, got True."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """GPT-2; ``dataclasses.replace`` makes that of a student.

    Attributes:
      vocab_size: rows of the token embedding.
      hidden_size: width of the residual stream, a multiple of ``num_heads``.
      num_layers: transformer layers, at least 1.
      num_heads: attention heads.
      intermediate_size: width inside the feed-forward layers; None is ``4 * hidden_size``.
      max_positions: longest sequence.
      activation: of the feed-forward layers; "gelu_new" is the tanh form.
      layer_norm_eps: of every LayerNorm.
      embedding_dropout: rate on the embeddings, in training.
      hidden_dropout: rate after each sublayer, in training.
      attention_dropout: rate on attention probabilities, in training.
      pad_token: the id of padding, None if there is none; a "sequence" head reads the right-most
        other token.
      scale_attention: whether scores are divided by the root of a head's width.
      scale_by_layer: whether those of layer i are also divided by i + 1.
      head: None, "lm" or "sequence" (one label per sequence).
      num_labels: outputs of a "sequence" head.
      tied: whether the language-model head shares the token embedding.
      labels: names of the ``num_labels`` classes, if they have any.
      other: keys of ``config.json`` that the model doesn't need, kept for saving.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int | None = None
    max_positions: int = 1024
    activation: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    embedding_dropout: float = 0.1
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    pad_token: int | None = None
    scale_attention: bool = True
    scale_by_layer: bool = False
    head: str | None = "lm"
    num_labels: int = 2
    tied: bool = True
    labels: tuple[str, ...] | None = None
    other: Mapping[str, Any] = _other()

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.head not in GPT2_HEADS:
            raise ValueError(f"head must be one of {GPT2_HEADS} for GPT-2, got {self.head!r}.")

    @property
    def feed_forward(self) -> int:
        """Width inside the feed-forward layers."""
        return self.intermediate_size or 4 * self.hidden_size


Config = BertConfig | GPT2Config


def check(config: Any) -> Config:
    """The argument ``config`` of a public function."""
    if not isinstance(config, (BertConfig, GPT2Config)):
        raise TypeError(
            "config must be a BertConfig or GPT2Config (load_checkpoint returns one), got "
            f"{_checks.describe(config)}."
        )
    return config


def _check_sizes(config: Any) -> None:
    names = ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_positions", "num_labels")
    for name in names:
        _checks.count(name, getattr(config, name))
    if config.intermediate_size is not None:
        _checks.count("intermediate_size", config.intermediate_size)
    if config.labels is not None and len(config.labels) != config.num_labels:
        raise ValueError(
            f"labels must name {config.num_labels} classes, as many as num_labels, "
            f"got {len(config.labels)}."
        )
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"hidden_size must be a multiple of num_heads {config.num_heads}, "
            f"got {config.hidden_size}."
        )
    _checks.choice("activation", config.activation, sorted(ACTIVATIONS))
    _checks.number("layer_norm_eps", config.layer_norm_eps, above=0)
    for name in ("hidden_dropout", "attention_dropout"):
        _checks.number(name, getattr(config, name), low=0, high=1)
