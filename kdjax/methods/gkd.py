"""Generalised knowledge distillation: a student that learns from the texts it writes itself.

A student trained on given texts meets other ones when it writes. Here, in a share of the updates,
the batch's completions are written by the student as it is, and the teacher's distribution at each
of their tokens is what it learns from. No gradient flows through the writing.

Reference:
  R. Agarwal, N. Vieillard, Y. Zhou, P. Stanczyk, S. Ramos, M. Geist, O. Bachem, "On-Policy
  Distillation of Language Models: Learning from Self-Generated Mistakes", ICLR 2024
  (arXiv 2306.13649).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks, losses, terms
from kdjax._pairs import Batch, Method, Model, Term, Tree
from kdjax.core import distill
from kdjax.terms._layers import real_tokens
from kdjax.terms._outputs import Number, at, checked

__all__ = ["gkd"]

Sample = Callable[[Tree, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
Fused = Callable[..., Term]
LABELS = "labels"


def gkd(
    student: Model,
    teacher: Model | None,
    sample: Sample,
    *,
    prompt_length: int,
    on_policy: Number = 0.5,
    beta: Number = 0.5,
    temperature: Number = 1.0,
    fused: Fused | None = None,
) -> Method:
    """A decoder from a decoder, on completions of the data set or of its own.

        T^2 mean(beta KL(teacher || m) + (1 - beta) KL(student || m)),
        m = beta teacher + (1 - beta) student

    over the tokens of the completions. The batch holds ``input_ids`` and ``attention_mask`` [B, L]:
    prompts in the first ``prompt_length`` columns, padded on the left, at least one token each;
    completions after them, padded on the right. Completions of the teacher's writing make it the
    paper's supervised KD on them. Padding may hold any id.

    Args:
      student: with output ``logits``, such as ``kdjax.lm.model(config)``; without dropout its
        texts and its training are of the same distribution.
      teacher: the same, of the same vocabulary.
      sample: ``(params, prompt_ids [B, P], prompt_mask [B, P], keys [B]) -> (tokens [B, L - P],
        real [B, L - P])``: ``kdjax.lm.sampler(config, length=L - P)``. It gets the student's
        parameters.
      prompt_length: P, the columns of prompts.
      on_policy: probability, in [0, 1], that an update takes the student's completions: the paper's
        lambda. A number, an array or a schedule; 0 leaves all to the data.
      beta: from 0, KL(teacher || student), to 1, KL(student || teacher); the loss jumps there, see
        `kdjax.losses.generalized_jensen_shannon`. A number, an array or a schedule.
      temperature: of the divergence, above 0; the same. That of the writing is ``sample``'s.
      fused: `kdjax.lm.fused_distillation`, or a partial of it, for the same loss without logits of
        the whole batch; outputs are then ``head_input`` and ``head``.

    Returns:
      A `Method`; metrics ``loss`` and ``loss/gkd``. Each row's text comes from the update's key and
      its batch entry ``index`` (its position without one).

    Raises:
      TypeError: ``sample`` is no function.
      ValueError: a number out of its range; at the first update, rows without room for
        completions, or samples of another length.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kdjax as kd
      >>> from kdjax.lm import sampler
      >>> config = kd.lm.GPT2Config(
      ...     vocab_size=50, hidden_size=8, num_layers=2, num_heads=2, hidden_dropout=0.0,
      ...     embedding_dropout=0.0, attention_dropout=0.0,
      ... )
      >>> net = kd.lm.model(config)
      >>> sample = sampler(config, length=3, temperature=0.9)
      >>> method = kd.methods.gkd.gkd(net, net, sample, prompt_length=4)
      >>> learner = kd.minimize(method, optax.adam(1e-3))
      >>> batch = {"input_ids": jnp.ones((2, 7), jnp.int32)}
      >>> frozen = net.init(jax.random.key(0))
      >>> state = learner.init(jax.random.key(1), batch, frozen)
      >>> state, metrics = jax.jit(learner.update)(state, batch, frozen)
      >>> sorted(metrics)
      ['loss', 'loss/gkd']

    Reference:
      Agarwal et al., ICLR 2024, equations 1 and 5, algorithm 1.
    """
    if not callable(sample):
        raise TypeError(
            "sample must be a function that writes completions, such as kdjax.lm.sampler makes, "
            f"got {_checks.describe(sample)}."
        )
    width = _checks.count("prompt_length", prompt_length)
    checked("on_policy", on_policy, low=0, high=1)
    checked("beta", beta, low=0, high=1)
    checked("temperature", temperature, above=0)
    options: dict[str, Any] = {"count": "targets", "labels": LABELS}
    options |= {"beta": beta, "temperature": temperature}
    if fused is None:
        term = terms.token_divergence(loss=losses.generalized_jensen_shannon, **options)
    else:
        term = fused(causal=True, **options)
    method = distill(student, teacher, {"gkd": (1.0, term)})

    def init(key: jax.Array, batch: Batch, frozen: Tree = None) -> tuple[Tree, Tree]:
        return method.init(key, _with_completions(batch, width, *_given(batch, width)), frozen)

    def prepare(
        params: Tree,
        extra: Tree,
        batch: Batch,
        frozen: Tree = None,
        *,
        step: jax.Array,
        key: jax.Array,
        axis_name: str | None = None,
    ) -> Batch:
        draw_key, text_key = jax.random.split(key)
        # Of the key alone, so that all devices do the same.
        own = jax.random.uniform(draw_key) < at(on_policy, step)
        tokens, real = _given(batch, width)
        ids, kept = _tokens(batch)
        keys = _keys(text_key, batch, len(ids), axis_name)

        def written() -> tuple[jax.Array, jax.Array]:
            found = sample(params["student"], ids[:, :width], kept[:, :width], keys)
            for name, x in zip(("tokens", "real"), found, strict=True):
                _checks.shape(f"what sample returns, {name},", x, tokens.shape, "(rows, L - P)")
            # Rows that don't count have no prompt to go on from.
            return found[0].astype(tokens.dtype), found[1] & kept[:, width - 1 : width]

        found = jax.lax.cond(own, written, lambda: (tokens, real))
        return _with_completions(batch, width, *found)

    return method._replace(init=init, prepare=prepare)


def _tokens(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Ids, 0 for padding (an id that the model doesn't know would be NaN), and what is real."""
    ids = _checks.integer(
        "batch['input_ids']", _checks.entry("batch", batch, "input_ids"), ndim=2
    ).astype(jnp.int32)
    real = real_tokens(batch, "attention_mask", *ids.shape)
    return jnp.where(real, ids, 0), real


def _given(batch: Batch, width: int) -> tuple[jax.Array, jax.Array]:
    """The batch's own completions."""
    ids, real = _tokens(batch)
    if ids.shape[1] <= width:
        raise ValueError(
            f"batch['input_ids'] must have columns for completions after the {width} of prompts "
            f"(prompt_length), got {_checks.describe(ids)}."
        )
    return ids[:, width:], real[:, width:]


def _with_completions(batch: Batch, width: int, tokens: jax.Array, real: jax.Array) -> Batch:
    """The batch with these completions; labels are theirs alone, positions skip the padding."""
    ids, kept = _tokens(batch)
    mask = jnp.concatenate([kept[:, :width], real], axis=1)
    ids = jnp.where(mask, jnp.concatenate([ids[:, :width], tokens], axis=1), 0)
    completion = mask & (jnp.arange(ids.shape[1]) >= width)[None]
    return {
        **batch,
        "input_ids": ids,
        "attention_mask": mask.astype(jnp.int32),
        "position_ids": jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0),
        LABELS: jnp.where(completion, ids, -100),
    }


def _keys(key: jax.Array, batch: Batch, rows: int, axis_name: str | None) -> jax.Array:
    """One key for each example."""
    index = jnp.arange(rows)
    if "index" in batch:
        index = jnp.asarray(batch["index"])
    elif axis_name is not None:
        index = index + rows * jax.lax.axis_index(axis_name)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
