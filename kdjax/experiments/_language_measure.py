"""Held-out figures and costs of language models."""

from __future__ import annotations

import functools
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import data as kdata
from kdjax import lm, losses

_EXAMPLES = 512  # held-out rows, at most
_TIMES, _THROUGHPUT_BATCH = 7, 16


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
    net, known_net = lm.model(student[0]), lm.model(teacher[0])

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
            known, _ = known_net.apply(teacher_params, {}, batch)
            values = 1 - losses.cosine_distance(out["hidden"][-1], known["hidden"][-1], where=mask)
            counted = mask
        return jnp.where(counted, values, 0).sum(), counted.sum()

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


def cost(config: Any, params: Any, length: int) -> dict[str, float]:
    """Size and speed of a forward pass."""
    leaves = jax.tree.leaves(params)
    net = lm.model(config, outputs=("logits", "hidden"))

    @jax.jit
    def forward(params: Any, ids: jax.Array) -> jax.Array:
        out, _ = net.apply(params, {}, {"input_ids": ids})
        return out.get("logits", out["hidden"][-1])

    def median(batch: int) -> float:
        ids = jnp.ones((batch, length), jnp.int32)
        jax.block_until_ready(forward(params, ids))
        times = []
        for _ in range(_TIMES):
            began = time.perf_counter()
            jax.block_until_ready(forward(params, ids))
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    return {
        "parameters": sum(x.size for x in leaves),
        "bytes": sum(x.size * x.dtype.itemsize for x in leaves),
        "latency_ms": 1e3 * median(1),
        "tokens_per_second": _THROUGHPUT_BATCH * length / median(_THROUGHPUT_BATCH),
    }
