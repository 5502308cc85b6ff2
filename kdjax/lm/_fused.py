"""Distillation over large vocabularies, from hidden states and without arrays of all logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.lm import _fused_inputs as inputs
from kdjax.lm._fused_rows import Spec, Values
from kdjax.lm._fused_scan import per_token, weighted_sum


class FusedKDParts(NamedTuple):
    """What `fused_linear_kd` is made of; none of it carries a gradient.

    ``soft``, ``hard`` and ``teacher_entropy`` are means, sums or per-token values [...] as
    ``reduction`` says, without weights and T^2; None without labels, or without a soft part.

    Attributes:
        soft: the divergence.
        hard: the cross-entropy with the labels.
        count: scalar, the sum of the token weights, of which ``soft`` is the mean.
        hard_count: scalar, that of the tokens with a label, of which ``hard`` is the mean.
        teacher_entropy: of the teacher's distribution at the temperature.
    """

    soft: Any
    hard: Any
    count: Any
    hard_count: Any
    teacher_entropy: Any


def fused_linear_kd(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_head: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    student_bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    student_vocab_dim: int | None = None,
    teacher_vocab_dim: int | None = None,
    mask: ArrayLike | None = None,
    beta: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    soft_weight: ArrayLike = 1.0,
    hard_weight: ArrayLike = 0.0,
    soft_t2: bool = False,
    label_ignore: int = -100,
    vocab_size: int | None = None,
    student_softcap: ArrayLike | None = None,
    teacher_softcap: ArrayLike | None = None,
    student_scale: ArrayLike = 1.0,
    teacher_scale: ArrayLike = 1.0,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
    pack_valid: bool = False,
    compute_dtype: Any = None,
    vocab_axis: str | None = None,
    axis_name: str | Sequence[str] | None = None,
    reduction: str = "mean",
    return_parts: bool = False,
) -> Any:
    """Distillation and cross-entropy of logits hidden head^T that never exist all at once.

        z = softcap * tanh(scale * (hidden head^T + bias) / softcap)   (no tanh without a softcap)
        p = softmax(z_teacher / T),   q = softmax(z_student / T),   m = beta p + (1 - beta) q
        soft = beta KL(p || m) + (1 - beta) KL(q || m),   hard = -log softmax(z_student)[label]
        loss = soft_weight * mean(soft) + hard_weight * mean(hard)

    beta = 0 is KL(p || q) and beta = 1 is KL(q || p): by this convention the divergence jumps at
    both ends, as its limits there are 0.

    A chunk of tokens at a time meets the whole vocabulary; gradients of hidden states and head are
    made on the way forward from the same logits. Time is that of dense logits, and memory is that
    of the head's gradient and of one chunk's logits. Logits, log-softmax and the head's gradient
    are accumulated in float32 at least, whatever the inputs are. A tied head is an embedding
    passed here as well: its gradients add up. Cached hidden states of a teacher are an ordinary
    ``teacher_hidden``: with its head they hold the whole distribution, at d numbers per token.

    Gradients flow to the student's hidden states, head and bias, the weights and the mask; not to
    the teacher, temperature, beta, scales and softcaps. Don't wrap this in `jax.checkpoint`: the
    work would be done twice. Labels are taken as they are; shift them for causal models.

    Args:
        student_hidden: [..., d_s] floating point, what the student's head is applied to.
        student_head: [V, d_s] as an embedding, or [d_s, V] as a dense layer.
        teacher_hidden: [..., d_t] floating point.
        teacher_head: [V, d_t] or [d_t, V].
        labels: [...] integers 0 .. V-1, or ``label_ignore``. A label out of range that only shows
            at run time makes loss and gradient NaN.
        student_bias: [V].
        teacher_bias: [V].
        student_vocab_dim: 0 for a head [V, d], 1 for [d, V]; needed for square heads only.
        teacher_vocab_dim: the same of the teacher's.
        mask: [...] boolean, or floating-point token weights of at least 0. Hidden states of tokens
            of weight 0 may hold anything. The default is the tokens with a label, without labels
            all. Given, ``soft`` is of all its tokens, ``hard`` of those with a label.
        beta: 0 to 1. A number chooses the program; an array or tracer may take any value.
        temperature: above 0; of the soft part only.
        soft_weight: at least 0; with the number 0 the teacher isn't read.
        hard_weight: at least 0; above 0 labels are needed.
        soft_t2: whether the soft part is multiplied by T^2.
        label_ignore: the label of tokens without one.
        vocab_size: the true size of the vocabulary; entries beyond it, on either side, are padding
            that takes no probability and no gradient. The default is that of the heads.
        student_softcap: above 0, for models that cap their logits.
        teacher_softcap: the same of the teacher's.
        student_scale: what the student's logits are multiplied by.
        teacher_scale: the same of the teacher's.
        chunk_tokens: tokens at a time, at most; the default is the power of 2 from 128 to 4096 for
            which float32 logits of a chunk take about 128 MiB.
        chunk_vocab: vocabulary entries at a time, for vocabularies of which even a chunk's logits
            are too large. Costs a second pass of products (a third for 0 < beta < 1).
        pack_valid: whether tokens that count go first, and chunks of others are skipped. Saves work
            where masks are sparse, and costs a gather of the hidden states.
        compute_dtype: dtype of the operands of the products, such as bfloat16 for float32 heads;
            the default is what hidden states and head promote to.
        vocab_axis: named axis over which heads and biases are sharded, in equal parts; hidden
            states and labels are those of all devices. Inside `jax.shard_map` or `jax.pmap`.
        axis_name: named axis or axes over which the tokens are sharded: sums and counts are those
            of all devices. Under jit alone it isn't needed, but inside `jax.shard_map` the head's
            gradient crosses devices once instead of once per chunk.
        reduction: "mean", "sum", or "none", which computes the logits once more in the backward
            pass, as the tokens' cotangents aren't known before.
        return_parts: whether to return `FusedKDParts` too. Losses of reduction "sum" and their
            counts add up over microbatches and hosts; divided, they are exact means.

    Returns:
        Scalar, or [...] for reduction "none", in at least float32; 0 where no token counts. With
        ``return_parts`` a pair of it and `FusedKDParts`.

    Raises:
        TypeError: an array is of the wrong kind.
        ValueError: shapes do not fit, a hyperparameter is out of range, labels are missing or out
            of range, the vocabularies differ and there is no ``vocab_size``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax.lm import fused_linear_kd
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> hidden = jax.random.normal(keys[0], (2, 5, 8))       # [batch, length, width]
        >>> embedding = jax.random.normal(keys[1], (50, 8))      # tied: [vocabulary, width]
        >>> batch = {                                            # the teacher's, stored before
        ...     "teacher_hidden": jax.random.normal(keys[2], (2, 5, 16)),
        ...     "label": jnp.array([[3, 1, 4, 1, -100], [5, 9, 2, -100, -100]]),
        ... }
        >>> teacher_head = jnp.ones((16, 50)).at[0].set(jnp.arange(50) / 25)
        >>> def loss(hidden, embedding):
        ...     return fused_linear_kd(
        ...         hidden, embedding, batch["teacher_hidden"], teacher_head, batch["label"],
        ...         beta=0.5, temperature=2.0, hard_weight=0.5, soft_t2=True, return_parts=True,
        ...     )
        >>> value_and_grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        >>> (_, parts), gradients = value_and_grad(hidden, embedding)
        >>> int(parts.count), [g.shape for g in gradients]
        (7, [(2, 5, 8), (50, 8)])

    Reference:
        The divergence is that of Agarwal et al., "On-Policy Distillation of Language Models", ICLR
        2024, eq. 1, with beta as in its published implementations; gradients in the forward pass
        follow Hsu et al., "Liger Kernel", 2024.
    """
    student = inputs.side(
        "student", student_hidden, student_head, student_bias, student_vocab_dim, student_scale,
        student_softcap,
    )  # fmt: skip
    teacher = inputs.side(
        "teacher", teacher_hidden, teacher_head, teacher_bias, teacher_vocab_dim, teacher_scale,
        teacher_softcap,
    )  # fmt: skip
    shape = inputs.same_tokens(student, teacher)
    _checks.choice("reduction", reduction, inputs.REDUCTIONS)
    if reduction == "none" and axis_name is not None:
        raise ValueError(f"axis_name must be None for reduction 'none', got {axis_name!r}.")
    spec = inputs.spec_of(
        student, teacher, labels, soft_weight, hard_weight,
        beta=beta, temperature=temperature, vocab_size=vocab_size, vocab_axis=vocab_axis,
        chunk_tokens=chunk_tokens, chunk_vocab=chunk_vocab, pack=pack_valid,
        compute_dtype=compute_dtype, parts=return_parts,
    )  # fmt: skip
    tokens, weights, invalid = inputs.tokens_of(spec, labels, mask, shape, label_ignore)
    hyper = inputs.hyper_of(temperature, beta, spec.acc)
    factors = inputs.factors_of(spec, soft_weight, hard_weight, hyper, soft_t2)
    operands = (*inputs.operands_of(spec, student, teacher), hyper, tokens)
    if reduction == "none":
        loss, parts = _every_token(spec, operands, weights, factors, invalid, shape)
    else:
        mean = reduction == "mean"
        loss, parts = _reduced(spec, operands, weights, factors, invalid, mean, axis_name)
    return (loss, parts) if return_parts else loss


def _reduced(
    spec: Spec,
    operands: Any,
    weights: inputs.Weights,
    factors: inputs.Factors,
    invalid: Any,
    mean: bool,
    axis_name: Any,
) -> tuple[jax.Array, FusedKDParts]:
    """The sum or mean over all tokens, whose gradient is made with the values."""

    def everywhere(x: jax.Array) -> jax.Array:
        return jnp.sum(x) if axis_name is None else jax.lax.psum(jnp.sum(x), axis_name)

    def divisor(n: jax.Array) -> jax.Array:
        return jnp.where(n > 0, n, 1)

    count = everywhere(weights.soft)
    hard_count = None if weights.hard is None else everywhere(weights.hard)
    soft = None if factors.soft is None else factors.soft * weights.soft
    hard = None
    if factors.hard is not None and hard_count is not None:
        # Means of two kinds of tokens as one sum, to be divided by the count of the first.
        ratio = divisor(count) / divisor(hard_count) if mean else 1
        hard = jnp.where(invalid, jnp.nan, factors.hard * ratio * weights.hard)
    total, values = weighted_sum(spec, *operands, (soft, hard))
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)

    def part(values: Any, own: Any, n: Any) -> Any:
        if values is None:
            return None
        summed = everywhere(jnp.where(own > 0, own * values, 0))
        return summed / divisor(n) if mean else summed

    parts = FusedKDParts(
        soft=part(values.soft, weights.soft, count),
        hard=part(_marked_invalid(values.hard, invalid), weights.hard, hard_count),
        count=count,
        hard_count=hard_count,
        teacher_entropy=part(values.entropy, weights.soft, count),
    )
    return total / divisor(count) if mean else total, jax.lax.stop_gradient(parts)


def _every_token(
    spec: Spec,
    operands: Any,
    weights: inputs.Weights,
    factors: inputs.Factors,
    invalid: Any,
    shape: tuple[int, ...],
) -> tuple[jax.Array, FusedKDParts]:
    """The loss of each token, [...], whose gradient is computed when its cotangent is known."""
    values: Values = per_token(spec, *operands)
    hard = _marked_invalid(values.hard, invalid)
    loss = jnp.zeros_like(weights.soft)
    if factors.soft is not None:
        loss += factors.soft * weights.soft * values.soft
    if factors.hard is not None:
        loss += factors.hard * weights.hard * hard
    soft, hard, entropy = (
        None if x is None else x.reshape(shape) for x in (values.soft, hard, values.entropy)
    )
    hard_count = None if weights.hard is None else jnp.sum(weights.hard)
    parts = FusedKDParts(soft, hard, jnp.sum(weights.soft), hard_count, entropy)
    return loss.reshape(shape), jax.lax.stop_gradient(parts)


def _marked_invalid(hard: Any, invalid: Any) -> Any:
    """NaN, in value and gradient, where a label is out of range."""
    return None if hard is None else hard * jnp.where(invalid, jnp.nan, 1)
