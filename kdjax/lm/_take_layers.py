"""A student made of some of its teacher's layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax.lm import _config
from kdjax.lm._config import Config


def take_layers(
    config: Config, params: Mapping[str, Any], indices: Sequence[int]
) -> tuple[Config, dict[str, Any]]:
    """A shallower model: embeddings, head and the chosen layers of another.

    DistilBERT and DistilGPT-2 start from layers 0, 2, 4, 7, 9, 11 of 12.

    Args:
      config: of the model with all layers.
      params: its parameters; the new ones are copies, so that both may be donated.
      indices: layers to take, from 0, in the order of the new model; repeats are allowed.

    Returns:
      ``(config, params)`` of the new model.

    Raises:
      TypeError: config is none, or an index is no integer.
      ValueError: no indices, or one that is no layer.

    Example:
      >>> import jax, kdjax as kd
      >>> config = kd.lm.GPT2Config(vocab_size=50, hidden_size=8, num_layers=6, num_heads=2)
      >>> params, _ = kd.lm.model(config).init(jax.random.key(0))
      >>> small, start = kd.lm.take_layers(config, params, [0, 2, 5])
      >>> small.num_layers, sorted(start)
      (3, ['layer_0', 'layer_1', 'layer_2', 'ln_f', 'wpe', 'wte'])

    Reference:
      V. Sanh, L. Debut, J. Chaumond, T. Wolf, "DistilBERT, a distilled version of BERT: smaller,
      faster, cheaper and lighter", 2019, and its published code (scripts/extract.py).
    """
    config = _config.check(config)
    chosen = [
        _checks.count("indices", index, low=0, high=config.num_layers - 1) for index in indices
    ]
    if not chosen:
        raise ValueError("indices must name at least one layer, got none.")
    kept = {name: value for name, value in params.items() if not name.startswith("layer_")}
    kept |= {
        f"layer_{i}": _checks.entry("params", params, f"layer_{index}")
        for i, index in enumerate(chosen)
    }
    return (
        dataclasses.replace(config, num_layers=len(chosen)),
        jax.tree.map(lambda x: jnp.array(x, copy=True), kept),
    )
