"""Which tensor of a Hugging Face folder is which parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from kdjax.lm._config import BERT_HEADS, GPT2_HEADS, BertConfig, Config, GPT2Config

Path = tuple[str, ...]


class Entry(NamedTuple):
    """One parameter.

    Attributes:
      path: in the tree of parameters.
      names: of its tensor in a checkpoint without the prefix; the first one there counts.
      shape: of the parameter.
      transposed: whether the tensor is stored as [out, in].
      own: whether the tensor belongs to a head, which never has the prefix.
      written: the names that saving writes; by default the first.
    """

    path: Path
    names: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False
    own: bool = False
    written: tuple[str, ...] = ()


# Buffers, not parameters: masks and position numbers that old folders store.
IGNORED = (".position_ids", ".attn.bias", ".attn.masked_bias")


def entries(config: Config) -> list[Entry]:
    """Every parameter of the model of a config."""
    if isinstance(config, GPT2Config):
        return [*_gpt2(config)]
    return [*_bert(config), *_bert_head(config)]


def words(config: Config) -> str:
    """The tensor of the word embedding, which a tied head shares."""
    return entries(config)[0].names[0]


def matrix(config: Config) -> str | None:
    """The tensor that an untied head of a language model has instead."""
    own = {("mlm", "decoder"), ("lm_head",)}
    untied = entries(dataclasses.replace(config, tied=False))
    return next((entry.names[0] for entry in untied if entry.path in own), None)


def of_any_head(config: Config) -> set[str]:
    """Tensors of the pooler and heads that a model of this kind may have."""
    found: set[str] = set()
    if isinstance(config, GPT2Config):
        kinds: list[Config] = [
            dataclasses.replace(config, head=head, tied=False) for head in GPT2_HEADS
        ]
    else:
        pooled = () if config.distil else ("sequence", "pretraining")
        kinds = [
            dataclasses.replace(config, head=head, tied=False, pooler=head in pooled)
            for head in BERT_HEADS
            if not (config.distil and head == "pretraining")
        ]
    for kind in kinds:
        parts = (entry for entry in entries(kind) if entry.own or entry.path[0] == "pooler")
        found |= {name for entry in parts for name in entry.names}
    return found


def prefix(config: Config) -> str:
    """What transformers writes before the names of the body: nothing for a body alone."""
    if isinstance(config, GPT2Config):
        return "transformer." if config.head else ""
    return ("distilbert." if config.distil else "bert.") if config.head else ""


def prefixes(config: Config) -> str:
    """The prefix that names of the body may have."""
    if isinstance(config, GPT2Config):
        return "transformer."
    return "distilbert." if config.distil else "bert."


def _linear(
    path: Path, name: str, sizes: tuple[int, int], *, transposed: bool = True, own: bool = False
) -> Iterator[Entry]:
    yield Entry((*path, "kernel"), (f"{name}.weight",), sizes, transposed, own)
    yield Entry((*path, "bias"), (f"{name}.bias",), sizes[1:], own=own)


def _norm(path: Path, name: str, width: int, *, own: bool = False) -> Iterator[Entry]:
    # Folders that were converted from TensorFlow say gamma and beta.
    yield Entry((*path, "scale"), (f"{name}.weight", f"{name}.gamma"), (width,), own=own)
    yield Entry((*path, "bias"), (f"{name}.bias", f"{name}.beta"), (width,), own=own)


def _table(path: Path, name: str, rows: int, width: int) -> Entry:
    return Entry((*path, "embedding"), (f"{name}.weight",), (rows, width))


def _bert(config: BertConfig) -> Iterator[Entry]:
    width, inner = config.hidden_size, config.intermediate_size
    words = "embeddings.word_embeddings", config.vocab_size
    yield _table(("embeddings", "word"), *words, width)
    positions = "embeddings.position_embeddings", config.max_positions
    yield _table(("embeddings", "position"), *positions, width)
    if config.token_types:
        types = "embeddings.token_type_embeddings", config.token_types
        yield _table(("embeddings", "token_type"), *types, width)
    yield from _norm(("embeddings", "ln"), "embeddings.LayerNorm", width)
    names = _DISTILBERT if config.distil else _BERT
    for i in range(config.num_layers):
        layer, stem = f"layer_{i}", names["layer"].format(i=i)
        for part in "qkvo":
            yield from _linear((layer, "attn", part), stem + names[part], (width, width))
        yield from _norm((layer, "ln1"), stem + names["ln1"], width)
        yield from _linear((layer, "ffn", "up"), stem + names["up"], (width, inner))
        yield from _linear((layer, "ffn", "down"), stem + names["down"], (inner, width))
        yield from _norm((layer, "ln2"), stem + names["ln2"], width)
    if config.pooler:
        yield from _linear(("pooler",), "pooler.dense", (width, width))


_BERT = {
    "layer": "encoder.layer.{i}.",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "ln1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "ln2": "output.LayerNorm",
}
_DISTILBERT = {
    "layer": "transformer.layer.{i}.",
    "q": "attention.q_lin",
    "k": "attention.k_lin",
    "v": "attention.v_lin",
    "o": "attention.out_lin",
    "ln1": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "ln2": "output_layer_norm",
}


def _bert_head(config: BertConfig) -> Iterator[Entry]:
    width = config.hidden_size
    if config.head in ("masked_lm", "pretraining"):
        yield from _masked_lm(config)
    if config.head == "pretraining":
        yield from _linear(("nsp",), "cls.seq_relationship", (width, 2), own=True)
    if config.head == "sequence" and config.distil:
        yield from _linear(("pre_head",), "pre_classifier", (width, width), own=True)
    if config.head in ("sequence", "token"):
        yield from _linear(("head",), "classifier", (width, config.num_labels), own=True)
    if config.head == "span":
        yield from _linear(("head",), "qa_outputs", (width, 2), own=True)


def _masked_lm(config: BertConfig) -> Iterator[Entry]:
    width, rows = config.hidden_size, config.vocab_size
    if config.distil:
        transform, norm, decoder = "vocab_transform", "vocab_layer_norm", "vocab_projector"
        biases: tuple[str, ...] = (f"{decoder}.bias",)
    else:
        stem = "cls.predictions."
        transform, norm, decoder = (
            stem + name for name in ("transform.dense", "transform.LayerNorm", "decoder")
        )
        # Untied folders hold both, which may differ; the forward pass uses the first.
        biases = (f"{decoder}.bias", f"{stem}bias")
    yield from _linear(("mlm", "transform"), transform, (width, width), own=True)
    yield from _norm(("mlm", "ln"), norm, width, own=True)
    if not config.tied:
        yield Entry(("mlm", "decoder"), (f"{decoder}.weight",), (rows, width), own=True)
    written = biases[-1:] if config.tied else biases
    yield Entry(("mlm", "bias"), biases, (rows,), own=True, written=written)


def _gpt2(config: GPT2Config) -> Iterator[Entry]:
    width, inner = config.hidden_size, config.feed_forward
    yield _table(("wte",), "wte", config.vocab_size, width)
    yield _table(("wpe",), "wpe", config.max_positions, width)
    for i in range(config.num_layers):
        layer, stem = f"layer_{i}", f"h.{i}."
        # Its linear layers are stored as [in, out].
        for path, name, sizes in (
            (("attn", "qkv"), "attn.c_attn", (width, 3 * width)),
            (("attn", "o"), "attn.c_proj", (width, width)),
            (("ffn", "up"), "mlp.c_fc", (width, inner)),
            (("ffn", "down"), "mlp.c_proj", (inner, width)),
        ):
            yield from _linear((layer, *path), stem + name, sizes, transposed=False)
        yield from _norm((layer, "ln1"), f"{stem}ln_1", width)
        yield from _norm((layer, "ln2"), f"{stem}ln_2", width)
    yield from _norm(("ln_f",), "ln_f", width)
    if config.head == "lm" and not config.tied:
        names = ("lm_head.weight",)
        yield Entry(("lm_head",), names, (config.vocab_size, width), own=True)
    if config.head == "sequence":
        sizes = (width, config.num_labels)
        yield Entry(("head", "kernel"), ("score.weight",), sizes, transposed=True, own=True)
