"""The fused loss as a Term: distillation and label loss from hidden states and heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax._pairs import Batch, Outputs, Term, Tree
from kdjax.lm._fused import fused_linear_kd
from kdjax.terms._layers import real_tokens
from kdjax.terms._outputs import (
    Number,
    at,
    checked,
    no_params,
    student_output,
    teacher_output,
)

COUNTED = ("labels", "targets", "tokens")
OPTIONS = (
    "chunk_tokens",
    "chunk_vocab",
    "compute_dtype",
    "pack_valid",
    "student_scale",
    "student_softcap",
    "teacher_scale",
    "teacher_softcap",
    "vocab_size",
)
IGNORED = -100


def fused_distillation(
    *,
    causal: bool,
    soft_weight: Number = 1.0,
    hard_weight: Number = 0.0,
    temperature: Number = 1.0,
    beta: Number = 0.0,
    count: str = "tokens",
    balance: str | None = None,
    labels: str = "labels",
    mask: str = "attention_mask",
    **options: Any,
) -> Term:
    """Divergence and cross-entropy of language models whose logits never exist all at once.

        soft_weight T^2 mean(D_beta(teacher, student)) + hard_weight mean(-log student[label])

    The same values and gradients as `kdjax.terms.token_divergence` and `kdjax.terms.causal_lm` (or
    `kdjax.terms.masked_lm`) on logits, in the memory of a chunk of tokens. The models return
    ``head_input`` and ``head``: ``kdjax.lm.model(config, outputs=("head_input", "head",
    "head_bias", "hidden"))``. Stored hidden states of a teacher and its head will do as well
    (`kdjax.from_batch`).

    Both parts are one sum with one gradient, so that they need a common count. Where they count
    the same tokens, or there is only one part, the Term is a mean over tokens like any other, exact
    over microbatches and devices. Where they don't (a soft part of all tokens beside labels of
    some), ``balance`` says how they stand to each other in the whole batch, as the methods of
    `kdjax.methods.distilgpt2` find out before the batch is cut; without it the Term couples the
    batch, which is exact over devices and refused for microbatches.

    Args:
      causal: True for decoders, whose labels are the tokens themselves and are shifted here; False
        for masked models.
      soft_weight: weight of the divergence, at least 0; a number, an array or a schedule of the
        step. With the number 0 there needs to be no teacher.
      hard_weight: weight of the cross-entropy, at least 0; the same.
      temperature: of the divergence, above 0; the same.
      beta: of the divergence, from 0, KL(teacher || student), to 1, KL(student || teacher), as in
        `kdjax.losses.generalized_jensen_shannon`; the same. A number makes the smaller program.
      count: the positions of the soft mean: ``"tokens"`` all real ones; ``"labels"`` those with a
        label; ``"targets"`` those whose next token has a label. The hard mean is over the latter
        where causal, over labelled ones otherwise.
      balance: batch entry [B] that holds, in every row, the number of tokens of the soft mean
        divided by that of the hard mean.
      labels: batch entry of labels [B, L], -100 for none; for decoders ``"input_ids"`` will do. Not
        read without need.
      mask: batch entry of real tokens, 1 or True.
      **options: of `fused_linear_kd`: vocab_size, chunk_tokens, chunk_vocab, pack_valid,
        compute_dtype, student_scale, student_softcap, teacher_scale, teacher_softcap.

    Returns:
      A `Term`.

    Raises:
      ValueError: a number out of its range, an unknown ``count`` or option, both weights 0.

    Example:
      >>> import kdjax as kd
      >>> from kdjax.lm import fused_distillation
      >>> config = kd.lm.GPT2Config(vocab_size=50, hidden_size=8, num_layers=2, num_heads=2)
      >>> net = kd.lm.model(config, outputs=("head_input", "head"))
      >>> term = fused_distillation(causal=True, temperature=2.0, beta=0.5, chunk_tokens=1024)
      >>> method = kd.distill(net, net, {"soft": (1.0, term)})
    """
    checked("soft_weight", soft_weight, low=0)
    checked("hard_weight", hard_weight, low=0)
    checked("temperature", temperature, above=0)
    checked("beta", beta, low=0, high=1)
    _checks.choice("count", count, COUNTED)
    for name in options:
        _checks.choice("options", name, OPTIONS)
    soft, hard = not _is_zero(soft_weight), not _is_zero(hard_weight)
    if not (soft or hard):
        raise ValueError("soft_weight and hard_weight must not both be the number 0.")
    own = "targets" if causal else "labels"
    unlike = soft and hard and count != own
    if not soft:
        count = own

    def loss(
        tparams: Tree,
        student_out: Outputs,
        teacher_out: Outputs,
        batch: Batch,
        *,
        step: jax.Array,
        key: jax.Array,
        axis_name: str | None = None,
    ) -> Any:
        student = _side("student", student_out)
        teacher = _side("teacher", teacher_out) if soft else student
        real = real_tokens(batch, mask, *student.hidden.shape[:2])
        targets = _targets(batch, labels, real, causal) if hard else None
        counted = real
        if count != "tokens":
            counted = _targets(batch, labels, real, count == "targets") != IGNORED
        weights = counted.astype(jnp.promote_types(student.hidden.dtype, jnp.float32))
        examples = weights.sum(1)
        if "weight" in batch:
            weights = weights * jnp.asarray(batch["weight"], weights.dtype)[:, None]
        factor = at(hard_weight, step)
        if unlike and balance is not None:
            factor = factor * jnp.max(_checks.entry("batch", batch, balance))
        coupled = unlike and balance is None
        total = fused_linear_kd(
            student.hidden,
            student.head,
            teacher.hidden,
            teacher.head,
            targets,
            student_bias=student.bias,
            teacher_bias=teacher.bias,
            student_vocab_dim=0,
            teacher_vocab_dim=0,
            mask=weights,
            beta=at(beta, step),
            temperature=at(temperature, step),
            soft_weight=at(soft_weight, step),
            hard_weight=factor if hard else 0,
            soft_t2=True,
            label_ignore=IGNORED,
            axis_name=axis_name,
            reduction="mean" if coupled else "sum",
            **options,
        )
        if coupled:
            return total
        tokens = weights.sum()
        mean = total / jnp.where(tokens > 0, tokens, 1)
        # The example weights, which are in the token weights, come in once more as the count's.
        return jnp.broadcast_to(mean, examples.shape), examples

    return Term(no_params, loss, coupled=unlike and balance is None)


class _Side(NamedTuple):
    hidden: jax.Array
    head: jax.Array
    bias: Any


def _side(name: str, outputs: Outputs) -> _Side:
    read = student_output if name == "student" else teacher_output
    hidden, head = (read(outputs, output) for output in ("head_input", "head"))
    if jnp.ndim(hidden) != 3:
        raise ValueError(
            f"the {name}'s output 'head_input' must be [B, L, d], got {_checks.describe(hidden)}."
        )
    return _Side(hidden, head, outputs.get("head_bias"))


def _targets(batch: Batch, name: str, real: jax.Array, causal: bool) -> jax.Array:
    """The label that is predicted at each position [B, L], IGNORED where there is none."""
    labels = _checks.integer(f"batch[{name!r}]", _checks.entry("batch", batch, name))
    _checks.shape(f"batch[{name!r}]", labels, real.shape, "like the student's tokens")
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    labels = jnp.where(real & (labels != -1), labels, IGNORED)
    if causal:
        labels = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    return jnp.where(real, labels, IGNORED)


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0
