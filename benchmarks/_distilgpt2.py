"""What `distilgpt2_cpu` trains and how: the text, the objectives, the loop, perplexity."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kdjax as kd
import kdjax.data
from kdjax.lm._fused_term import fused_distillation

KINDS = ("labels alone", "triple", "KD alone")
PER_DISPATCH = 10


class Settings(NamedTuple):
    """Sizes and lengths; --quick makes them smaller."""

    width: int = 96
    heads: int = 4
    layers: int = 6
    length: int = 64
    batch: int = 16
    teacher_steps: int = 800
    full_steps: int = 250
    scarce_steps: int = 400
    scarce: int = 20_000
    fused_steps: int = 50
    held_out: int = 1_000_000
    teacher_rate: float = 2e-3
    rate: float = 1e-3
    seed: int = 0
    windows: bool = False
    fused: bool = False
    bf16: bool = False

    @property
    def dtype(self) -> Any:
        return jnp.bfloat16 if self.bf16 else None


QUICK = {
    "width": 16, "heads": 2, "layers": 2, "length": 16, "batch": 4, "teacher_steps": 3,
    "full_steps": 2, "scarce_steps": 2, "scarce": 200, "fused_steps": 2, "held_out": 320,
}  # fmt: skip


class Text(NamedTuple):
    """Token ids of both parts, int32, and how many ids there are."""

    train: np.ndarray
    held_out: np.ndarray
    vocab: int


def text_of(settings: Settings, data: Sequence[str] | None, folder: Path | None) -> Text:
    """Files or what Python carries, in the tokens of the teacher's folder or in bytes."""
    encode, vocab = None, 256 if data else 128
    if folder is not None:
        vocab = kd.lm.read_config(folder).vocab_size
        if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            encode = kd.lm.load_tokenizer(folder)
    if data:
        dataset = kdjax.data.text(data, encode, length=settings.length)
        parts = [dataset.read(side)["input_ids"].ravel() for side in ("train", "validation")]
        return Text(parts[0], parts[1][: settings.held_out], vocab)
    joined = " ".join(" ".join(topics[name] for name in sorted(topics)).split())
    ids = np.frombuffer(joined.encode("ascii", "ignore"), np.uint8)
    ids = ids if encode is None else np.asarray(encode.encode(joined).ids)
    cut = round(0.9 * len(ids))
    train, held_out = ids[:cut].astype(np.int32), ids[cut:].astype(np.int32)
    return Text(train, held_out[: settings.held_out], vocab)


def teacher_config(settings: Settings, vocab: int) -> kd.lm.GPT2Config:
    return kd.lm.GPT2Config(
        vocab_size=vocab, hidden_size=settings.width, num_layers=settings.layers,
        num_heads=settings.heads, max_positions=settings.length, embedding_dropout=0.0,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


def network(config: kd.lm.GPT2Config, settings: Settings, fused: bool) -> kd.Model:
    outputs = ("head_input", "head", "hidden") if fused else ("logits", "hidden")
    return kd.lm.model(config, outputs=outputs, dtype=settings.dtype)


def method(kind: str, student: kd.Model, teacher: kd.Model | None, fused: bool) -> kd.Method:
    """What a row minimises."""
    term = fused_distillation if fused else None
    if kind == "labels alone":
        lm = kd.terms.causal_lm(labels="input_ids")
        if fused:
            lm = fused_distillation(causal=True, soft_weight=0, hard_weight=1.0, labels="input_ids")
        return kd.distill(student, None, {"lm": (1.0, lm)})
    without_labels = {"alpha_lm": 0.0, "alpha_cos": 0.0} if kind == "KD alone" else {}
    return kd.methods.distilgpt2.distilgpt2(student, teacher, fused=term, **without_labels)


class Trained(NamedTuple):
    """A student's parameters, the loss of every update, and seconds without compilation."""

    params: Any
    losses: np.ndarray
    seconds: float


def train(
    objective: kd.Method,
    frozen: Any,
    ids: np.ndarray,
    steps: int,
    rate: float,
    settings: Settings,
    *,
    horizon: int | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Updates on rows in the seed's order, several in one call of the device.

    ``horizon`` is the length of the schedule where it isn't that of the run.
    """
    horizon = steps if horizon is None else horizon
    tx = optax.adamw(optax.cosine_decay_schedule(rate, horizon))
    learner = kd.minimize(objective, tx)
    columns = jnp.arange(settings.length)

    def some(state: Any, ids: jax.Array, starts: jax.Array, frozen: Any) -> Any:
        def one(state: Any, start: jax.Array) -> Any:
            batch = {"input_ids": ids[start[:, None] + columns[None]]}
            state, metrics = learner.update(state, batch, frozen)
            return state, metrics["loss"]

        return jax.lax.scan(one, state, starts)

    starts = places(len(ids), horizon, settings)[:steps]
    parts = starts.reshape(-1, math.gcd(steps, PER_DISPATCH), settings.batch)
    tokens = jnp.asarray(ids)
    first = {"input_ids": tokens[starts[0][:, None] + columns[None]]}
    state = learner.init(jax.random.key(settings.seed), first, frozen)
    run = jax.jit(some, donate_argnums=0)
    run = run.lower(state, tokens, jnp.asarray(parts[0]), frozen).compile()
    began, losses = time.perf_counter(), []
    for i, part in enumerate(parts):
        state, found = run(state, tokens, jnp.asarray(part), frozen)
        losses.append(np.asarray(found))
        report(f"update {(i + 1) * part.shape[0]} of {steps}, loss {losses[-1][-1]:.3f}")
    seconds = time.perf_counter() - began
    return Trained(state.params["student"], np.concatenate(losses), seconds)


def places(tokens: int, steps: int, settings: Settings) -> np.ndarray:
    """Where the rows of every batch begin, [steps, batch]: all rows in any order, then anew."""
    rng = np.random.default_rng(settings.seed)
    if settings.windows:
        return rng.integers(0, tokens - settings.length + 1, (steps, settings.batch))
    rows, wanted = tokens // settings.length, steps * settings.batch
    order = [rng.permutation(rows) for _ in range(-(-wanted // rows))]
    return settings.length * np.concatenate(order)[:wanted].reshape(steps, settings.batch)


def perplexity(
    config: kd.lm.GPT2Config, params: Any, held_out: np.ndarray, settings: Settings
) -> float:
    """exp of the mean negative log-likelihood of a held-out row's tokens but its first."""
    rows = held_out[: len(held_out) // settings.length * settings.length]
    rows = rows.reshape(-1, settings.length)
    size = min(16, len(rows))
    padded = np.concatenate([rows, np.full((-len(rows) % size, settings.length), -1)])
    total = negative_log_likelihood(config, settings.bf16)
    parts = np.split(padded.astype(np.int32), len(padded) // size)
    nats = sum(float(total(params, part)) for part in parts)
    return math.exp(nats / (len(rows) * (settings.length - 1)))


@functools.cache
def negative_log_likelihood(config: kd.lm.GPT2Config, bf16: bool) -> Callable[..., jax.Array]:
    """Of all rows [B, L]; those that begin with -1 don't count."""
    net = kd.lm.model(config, outputs=("logits",), dtype=jnp.bfloat16 if bf16 else None)

    @jax.jit
    def total(params: Any, ids: jax.Array) -> jax.Array:
        logits = net.apply(params, {}, {"input_ids": ids})[0]["logits"]
        real = jnp.broadcast_to(ids[:, :1] >= 0, ids.shape)
        return kd.losses.next_token_cross_entropy(logits, ids, where=real).sum()

    return total


def half(layers: int) -> list[int]:
    """The layers of a student: 0, 2, 5 of 6 and, as published, 0, 2, 4, 7, 9, 11 of 12."""
    return [int(i) for i in np.linspace(0, layers - 1, (layers + 1) // 2).round()]


def count(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
