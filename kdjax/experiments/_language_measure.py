"""Held-out figures and costs of language models."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import data as kdata
from kdjax import lm, losses

_EXAMPLES = 512  # held-out rows, at most
_TIMES, _THROUGHPUT_BATCH = 15, 16


def documentation() -> str:
    """The text of Python's own documentation, in a fixed order, with single blanks."""
    from pydoc_data.topics import topics

    return " ".join(" ".join(topics[name].split()) for name in sorted(topics))


def masking(config: Any, tokenizer: Any) -> Any:
    """BERT's masking with the ids of a tokenizer; None where there is no mask token."""
    hidden = None if tokenizer is None else tokenizer.token_to_id("[MASK]")
    if hidden is None:
        return None
    special = [tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]", "[PAD]", "[MASK]")]
    return functools.partial(
        lm.mask_tokens,
        mask_token=hidden,
        vocab_size=config.vocab_size,
        special=tuple(one for one in special if one is not None),
    )


def held_out(
    kind: str,
    student: tuple[Any, Any],
    teacher: tuple[Any, Any],
    dataset: kdata.Dataset,
    *,
    batch_size: int,
    hide: Any = None,
) -> float:
    """Perplexity on the held-out text; of a body, the mean cosine with the teacher's states."""
    rows = np.arange(min(_EXAMPLES, dataset.size("validation")))
    one = _scores(kind, student[0], teacher[0], hide)
    total, count = 0.0, 0
    for i in range(0, len(rows), batch_size):
        chosen = rows[i : i + batch_size]
        padded = np.concatenate([chosen, np.zeros(batch_size - len(chosen), chosen.dtype)])
        batch = dataset.read("validation", padded)
        weight = (np.arange(batch_size) < len(chosen)).astype(np.float32)
        value, number = one(student[1], teacher[1], {**batch, "weight": weight})
        total, count = total + float(value), count + int(number)
    mean = total / max(count, 1)
    return mean if kind == "body" else math.exp(min(mean, 700))


@functools.lru_cache(maxsize=8)
def _scores(kind: str, config: Any, known: Any, hide: Any) -> Any:
    """The program for all students of a config: the sum of values and how many there are."""
    net, known_net = lm.model(config), lm.model(known)

    @jax.jit
    def one(params: Any, teacher_params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        batch = dict(batch)
        mask = batch.get("attention_mask", jnp.ones_like(batch["input_ids"])) != 0
        mask &= (batch["weight"] > 0)[:, None]
        if kind == "masked":
            batch = hide(jax.random.key(0), batch)
        out, _ = net.apply(params, {}, batch)
        if kind == "causal":
            values = losses.next_token_cross_entropy(out["logits"], batch["input_ids"], where=mask)
            counted = mask[:, 1:] & mask[:, :-1]
        elif kind == "masked":
            counted = mask & (batch["labels"] >= 0)
            values = losses.hard_label_cross_entropy(
                out["logits"], jnp.where(counted, batch["labels"], -1), where=counted
            )
        else:
            imitated, _ = known_net.apply(teacher_params, {}, batch)
            values = 1 - losses.cosine_distance(
                out["hidden"][-1], imitated["hidden"][-1], where=mask
            )
            counted = mask
        return jnp.where(counted, values, 0).sum(), counted.sum()

    return one


def costs(models: Mapping[str, tuple[Any, Any]], length: int) -> dict[str, dict[str, float]]:
    """Size and speed of a forward pass of each model.

    They take turns, so that what else the machine does meets them alike.
    """
    programs = {name: _forward(config) for name, (config, _) in models.items()}
    times: dict[tuple[str, int], list[float]] = {}
    for rows in (1, _THROUGHPUT_BATCH):
        ids = jnp.ones((rows, length), jnp.int32)
        for turn in range(_TIMES + 1):
            for name, (_, params) in models.items():
                began = time.perf_counter()
                jax.block_until_ready(programs[name](params, ids))
                if turn:  # the first one compiles
                    times.setdefault((name, rows), []).append(time.perf_counter() - began)
    found = {}
    for name, (_, params) in models.items():
        leaves = jax.tree.leaves(params)
        one, many = (statistics.median(times[name, rows]) for rows in (1, _THROUGHPUT_BATCH))
        found[name] = {
            "parameters": sum(x.size for x in leaves),
            "bytes": sum(x.size * x.dtype.itemsize for x in leaves),
            "latency_ms": 1e3 * one,
            "tokens_per_second": _THROUGHPUT_BATCH * length / many,
        }
    return found


def _forward(config: Any) -> Any:
    net = lm.model(config, outputs=("logits", "hidden"))

    @jax.jit
    def forward(params: Any, ids: jax.Array) -> jax.Array:
        out, _ = net.apply(params, {}, {"input_ids": ids})
        return out.get("logits", out["hidden"][-1])

    return forward
