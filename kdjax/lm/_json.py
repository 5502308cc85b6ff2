"""``config.json`` of a Hugging Face folder, in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdjax.lm._config import ACTIVATIONS, BertConfig, Config, GPT2Config

_BERT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "activation": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "head_dropout": "classifier_dropout",
    "pad_token": "pad_token_id",
    "tied": "tie_word_embeddings",
}
_DISTILBERT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "max_positions": "max_position_embeddings",
    "activation": "activation",
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "head_dropout": "seq_classif_dropout",
    "pad_token": "pad_token_id",
    "tied": "tie_word_embeddings",
}
_GPT2_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_positions": "n_positions",
    "activation": "activation_function",
    "layer_norm_eps": "layer_norm_epsilon",
    "embedding_dropout": "embd_pdrop",
    "hidden_dropout": "resid_pdrop",
    "attention_dropout": "attn_pdrop",
    "pad_token": "pad_token_id",
    "scale_attention": "scale_attn_weights",
    "scale_by_layer": "scale_attn_by_inverse_layer_idx",
    "tied": "tie_word_embeddings",
}
# What transformers assumes where a key is absent; other absent keys are an error.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "bert": {
        "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": None, "pad_token_id": 0, "tie_word_embeddings": True,
        "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072,
    },
    "distilbert": {
        "max_position_embeddings": 512, "activation": "gelu", "dropout": 0.1,
        "attention_dropout": 0.1, "seq_classif_dropout": 0.2, "pad_token_id": 0,
        "tie_word_embeddings": True, "vocab_size": 30522, "dim": 768, "n_layers": 6,
        "n_heads": 12, "hidden_dim": 3072,
    },
    "gpt2": {
        "n_inner": None, "n_positions": 1024, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1,
        "pad_token_id": None, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
        "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12,
    },
}  # fmt: skip
_END_OF_TEXT = 50256  # what transformers takes for GPT-2's first and last token if nothing is said
_KEYS = {"bert": _BERT_KEYS, "distilbert": _DISTILBERT_KEYS, "gpt2": _GPT2_KEYS}
_CLASS = {"bert": "Bert", "distilbert": "DistilBert", "gpt2": "GPT2"}
_HEADS = {
    "Model": None,
    "ForMaskedLM": "masked_lm",
    "ForPreTraining": "pretraining",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "ForQuestionAnswering": "span",
    "LMHeadModel": "lm",
}


def parse(raw: Any, where: str) -> Config:
    """The config that a decoded ``config.json`` describes, without looking at tensors."""
    if not isinstance(raw, Mapping) or "model_type" not in raw:
        raise ValueError(f"{where} must be a JSON object with model_type, which it has not.")
    kind = raw["model_type"]
    if kind not in _KEYS:
        raise ValueError(f"model_type in {where} must be one of {', '.join(_KEYS)}; got {kind!r}.")
    _refuse(raw, where)
    keys, defaults = _KEYS[kind], _DEFAULTS[kind]
    given = {field: raw.get(key, defaults.get(key)) for field, key in keys.items()}
    activation = given["activation"]
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{keys['activation']} in {where} must be one of {', '.join(sorted(ACTIVATIONS))}; "
            f"got {activation!r}."
        )
    names = raw.get("id2label")
    labels = None if not names else tuple(names[key] for key in sorted(names, key=int))
    used = {*keys.values(), "id2label", "label2id", "model_type", "architectures", "num_labels"}
    given |= {
        "head": _head(raw, kind, where),
        "labels": labels,
        "num_labels": len(labels) if labels else int(raw.get("num_labels", 2)),
        "other": {key: value for key, value in raw.items() if key not in used},
    }
    try:
        if kind == "gpt2":
            return GPT2Config(**given)
        if kind == "distilbert":
            return BertConfig(**given, token_types=0, pooler=False, distil=True)
        return BertConfig(**given, pooler=given["head"] in (None, "sequence", "pretraining"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} describes no model: {error}") from error


def to_json(config: Config) -> dict[str, Any]:
    """What `parse` reads and transformers loads."""
    kind = kind_of(config)
    found = {**config.other, "model_type": kind}
    found |= {key: getattr(config, field) for field, key in _KEYS[kind].items()}
    if kind == "distilbert" and found["seq_classif_dropout"] is None:
        found["seq_classif_dropout"] = config.hidden_dropout
    if kind == "gpt2" and config.vocab_size <= _END_OF_TEXT:
        found = {"bos_token_id": None, "eos_token_id": None} | found
    ending = next(name for name, head in _HEADS.items() if head == config.head)
    found["architectures"] = [_CLASS[kind] + ending]
    if config.head in ("sequence", "token"):
        names = config.labels or tuple(f"LABEL_{i}" for i in range(config.num_labels))
        found["id2label"] = {str(i): name for i, name in enumerate(names)}
        found["label2id"] = {name: i for i, name in enumerate(names)}
    return dict(sorted(found.items()))


def kind_of(config: Config) -> str:
    """The ``model_type`` of a config."""
    if isinstance(config, GPT2Config):
        return "gpt2"
    return "distilbert" if config.distil else "bert"


def _head(raw: Mapping[str, Any], kind: str, where: str) -> str | None:
    """The head that ``architectures`` names; a body alone where it names nothing."""
    names = raw.get("architectures") or [f"{_CLASS[kind]}Model"]
    ending = str(names[0]).removeprefix(_CLASS[kind])
    if ending == names[0] or ending not in _HEADS:
        known = ", ".join(_CLASS[kind] + name for name in _HEADS)
        raise ValueError(
            f"architectures in {where} must be one of {known}, as far as they exist; "
            f"got {names[0]!r}."
        )
    return _HEADS[ending]


def _refuse(raw: Mapping[str, Any], where: str) -> None:
    """Variants whose mathematics is another."""
    for key in ("is_decoder", "add_cross_attention"):
        if raw.get(key):
            raise ValueError(f"{key} in {where} must be false: only plain models are supported.")
    position = raw.get("position_embedding_type", "absolute")
    if position != "absolute":
        raise ValueError(
            f"position_embedding_type in {where} must be 'absolute', got {position!r}."
        )
