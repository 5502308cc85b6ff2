"""A config as a `Model`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import _checks
from kdjax.adapters import from_linen
from kdjax.core import Model
from kdjax.lm import _config
from kdjax.lm._bert import Bert
from kdjax.lm._config import BertConfig, Config
from kdjax.lm._gpt2 import GPT2

DEFAULT = ("logits", "hidden", "scores", "pooled", "next_sentence", "cache")
EVERY = (*DEFAULT, "queries", "keys", "values", "head_input", "head", "head_bias")
READ = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "cache")


def model(
    config: Config,
    *,
    outputs: Sequence[str] = DEFAULT,
    dtype: Any = None,
    remat: bool = False,
    inputs: Callable[[Any], Mapping[str, Any]] | None = None,
) -> Model:
    """The network of a config.

    ``apply(params, {}, inputs, train=False, key=None)`` takes a dict: ``input_ids`` [B, L] integer,
    and optional ``attention_mask`` [B, L] (1 or True = real), ``token_type_ids`` (default 0) and
    ``position_ids`` (default 0, 1, ...; left-padded GPT-2 inputs need their own). It returns a
    dict, as far as the model has them:

    - ``logits``: of the head;
    - ``hidden``: tuple of num_layers + 1 arrays [B, L, d]: BERT's first is the embeddings after
      LayerNorm, GPT-2's last is after the final LayerNorm;
    - ``scores``: tuple of num_layers arrays [B, H, L, L], scaled products of queries and keys
      before mask and softmax, in at least float32;
    - ``queries``, ``keys``, ``values``: tuples of num_layers arrays [B, L, d], if asked for;
    - ``pooled`` [B, d]: of BERT's first token, if there is a pooler;
    - ``next_sentence`` [B, 2]: of a "pretraining" head;
    - ``head_input`` [B, L, d], ``head`` [V, d] and, of BERT, ``head_bias`` [V], if asked for: the
      logits of a language model are ``head_input head^T + head_bias``, which `fused_distillation`
      never makes as a whole.

    Under jit what isn't used isn't computed. With ``train=True`` the model's dropout is on and
    needs ``key``.

    Args:
      config: of `load_checkpoint`, or made by hand.
      outputs: which of them to return. Outside jit, ``outputs=("logits",)`` saves memory.
      dtype: precision of the forward pass; parameters stay as they are.
      remat: whether layers are computed again in the backward pass, for memory.
      inputs: what of a batch the model reads; by default the entries named above. Labels, soft
        labels and everything else in the batch is left to the losses.

    Returns:
      A `Model`; its ``init(key, inputs=None)`` makes random parameters as the papers' code does.

    Raises:
      TypeError: config is none.
      ValueError: an unknown output; at a call, ids or shapes that don't fit the config.

    Example:
      >>> import jax, jax.numpy as jnp, kdjax as kd
      >>> config = kd.lm.GPT2Config(vocab_size=50, hidden_size=8, num_layers=2, num_heads=2)
      >>> gpt2 = kd.lm.model(config)
      >>> params, _ = gpt2.init(jax.random.key(0))
      >>> out, _ = gpt2.apply(params, {}, {"input_ids": jnp.ones((3, 7), jnp.int32)})
      >>> out["logits"].shape, len(out["hidden"]), out["scores"][0].shape
      ((3, 7, 50), 3, (3, 2, 7, 7))
    """
    config = _config.check(config)
    wanted = {_checks.choice("outputs", name, EVERY) for name in outputs}
    if inputs is not None and not callable(inputs):
        raise TypeError(f"inputs must be a function of the batch, got {_checks.describe(inputs)}.")
    logits = "logits" in wanted
    network = (
        Bert(config, remat=remat, logits=logits)
        if isinstance(config, BertConfig)
        else GPT2(config, remat=remat, logits=logits)
    )
    inner = from_linen(network, dtype=dtype, inputs=inputs or entries, outputs=lambda found: found)

    def init(key: jax.Array, inputs: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
        if inputs is None:
            inputs = {"input_ids": jnp.zeros((1, 1), jnp.int32)}
        return inner.init(key, _checked(config, inputs))

    def apply(
        params: Any, extra: Any, inputs: Any, *, train: bool = False, key: Any = None
    ) -> tuple[dict[str, Any], Any]:
        found, extra = inner.apply(params, extra, _checked(config, inputs), train=train, key=key)
        return {name: value for name, value in found.items() if name in wanted}, extra

    return Model(init, apply, inner.inputs)


def entries(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that a transformer reads."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a dict of arrays, got {_checks.describe(batch)}.")
    _checks.entry("batch", batch, "input_ids")
    return {name: batch[name] for name in READ if name in batch}


def _checked(config: Config, inputs: Any) -> dict[str, Any]:
    """Inputs of the right shapes; values are looked at where they are known."""
    inputs = entries(inputs)
    ids = _checks.integer("input_ids", inputs["input_ids"], ndim=2)
    _in_range("input_ids", ids, config.vocab_size, "the vocabulary")
    cache = inputs.get("cache")
    length = ids.shape[1]
    if "position_ids" not in inputs and length > config.max_positions:
        raise ValueError(
            f"input_ids must have at most {config.max_positions} positions, the model's, "
            f"got {length}."
        )
    room = length if cache is None else cache["keys"][0].shape[1]
    for name, columns, high in (
        ("attention_mask", room, None),
        ("token_type_ids", length, getattr(config, "token_types", None)),
        ("position_ids", length, config.max_positions),
    ):
        if name in inputs:
            value = _checks.as_array(name, inputs[name])
            _checks.shape(name, value, (ids.shape[0], columns), "(as input_ids)")
            if high is not None:
                _in_range(name, _checks.integer(name, value), max(high, 1), "the model's table")
            inputs[name] = value
    return {**inputs, "input_ids": ids}


def _in_range(name: str, values: Any, high: int, what: str) -> None:
    if _checks.is_traced(values):
        return
    known = np.asarray(values)
    if known.size and (known.min() < 0 or known.max() >= high):
        worst = known.min() if known.min() < 0 else known.max()
        raise ValueError(f"{name} must be from 0 to {high - 1}, the size of {what}, got {worst}.")
