"""Terms on the logits of classifiers and language models, and DistilBERT's combination of them.

The batch holds ``input_ids`` and ``labels`` [B, L], with -100 for tokens that are no target, and
``attention_mask`` [B, L], 1 for real tokens; without it all are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks, losses
from kdjax._pairs import Batch, Outputs, Term, Tree
from kdjax.losses._sequence import IGNORED
from kdjax.losses._top_k import MISSING
from kdjax.terms._layers import real_tokens
from kdjax.terms._outputs import (
    Number,
    at,
    checked,
    labelled,
    matching,
    no_params,
    student_output,
    teacher_output,
)
from kdjax.terms._transformer import REDUCTIONS, hidden_cosine

COUNTED = ("labels", "targets", "tokens")


def prediction(
    *,
    temperature: Number = 1.0,
    reduction: str = "masked",
    student: str = "logits",
    teacher: str = "logits",
) -> Term:
    """TinyBERT's prediction loss: the cross-entropy with the teacher's softened labels.

    Args:
      temperature: T > 0; also an array, or a schedule of the step.
      reduction: ``"masked"`` is `kdjax.losses.soft_cross_entropy`, with the factor T^2 and the sum
        over classes; ``"reference"`` is the published code's, smaller by ``C T^2``: the mean over
        classes, too, and no T^2.
      student: the student output to use.
      teacher: the teacher output to use.

    Returns:
      A `Term` of logits [B, C]. For regression tasks see `regression`.

    Raises:
      ValueError: a temperature not above 0, or an unknown reduction.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.prediction(reduction="reference")

    Reference:
      X. Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", Findings of
      EMNLP 2020, equation 10.
    """
    checked("temperature", temperature, above=0)
    _checks.choice("reduction", reduction, REDUCTIONS)

    def loss(s: jax.Array, t: jax.Array, *, temperature: Any) -> jax.Array:
        values = losses.soft_cross_entropy(s, t, temperature=temperature)
        if reduction == "masked":
            return values
        scale = jnp.asarray(temperature, values.dtype) ** 2
        return values / (scale * jnp.shape(s)[-1])

    return matching(loss, student=student, teacher=teacher, temperature=temperature)


def regression(*, label: str = "label", logits: str = "logits") -> Term:
    """Squared error to the true value: the prediction loss of TinyBERT's regression tasks.

    The published code takes the true value here, not the teacher's.

    Args:
      label: batch entry of true values [B], floating point.
      logits: the student output to use, [B, 1] or [B].

    Returns:
      A `Term`.

    Raises:
      ValueError: when it runs, outputs of another shape.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.regression()
    """

    def loss(
        tparams: Tree, student_out: Outputs, teacher_out: Outputs, batch: Batch, **_: Any
    ) -> jax.Array:
        wanted = _checks.floating(f"batch[{label!r}]", _checks.entry("batch", batch, label), ndim=1)
        found = _checks.floating("the student's outputs", student_output(student_out, logits))
        if found.shape not in (wanted.shape, (*wanted.shape, 1)):
            raise ValueError(
                f"the student's outputs {logits!r} must be [B, 1] for regression, got "
                f"{_checks.describe(found)}."
            )
        return (found.reshape(wanted.shape) - wanted) ** 2

    return Term(no_params, loss)


def token_divergence(
    *,
    loss: Callable[..., jax.Array] = losses.soft_label_kl,
    count: str = "tokens",
    vocab_size: int | None = None,
    labels: str = "labels",
    student: str = "logits",
    teacher: str = "logits",
    mask: str = "attention_mask",
    **options: Any,
) -> Term:
    """A divergence between the logits of student and teacher at every token that counts.

    Args:
      loss: ``(student_logits, teacher_logits, *, where, **options)`` from [B, L, V] to [B, L]: of
        `kdjax.losses` for example `reverse_kl`, `skew_kl` or `generalized_jensen_shannon`.
      count: the positions of the mean: ``"tokens"`` all real ones; ``"labels"`` those with a label
        (masked language models that match only what was masked); ``"targets"`` those whose next
        token has a label (the completions of a decoder).
      vocab_size: compare only the first so many entries, for vocabularies padded differently. By
        default both must be equal.
      labels: batch entry of labels [B, L], not read for ``"tokens"``.
      student: the student output to use.
      teacher: the teacher output to use.
      mask: batch entry of real tokens.
      **options: hyperparameters of ``loss`` such as ``temperature=2.0``; callables among them are
        schedules of the step.

    Returns:
      A `Term`.

    Raises:
      ValueError: an unknown ``count``; when it runs, vocabularies of unequal sizes.

    Example:
      >>> import kdjax as kd
      >>> gkd = kd.terms.token_divergence(
      ...     loss=kd.losses.generalized_jensen_shannon, count="targets", beta=0.5
      ... )
    """
    _checks.choice("count", count, COUNTED)
    if vocab_size is not None:
        vocab_size = _checks.count("vocab_size", vocab_size)

    def term_loss(
        tparams: Tree,
        student_out: Outputs,
        teacher_out: Outputs,
        batch: Batch,
        *,
        step: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        s, t = _logits(student_output(student_out, student), teacher_output(teacher_out, teacher))
        s, t = _common_vocabulary(s, t, vocab_size)
        where = real_tokens(batch, mask, *s.shape[:2])
        if count != "tokens":
            known = labelled(_targets(batch, labels, where))
            if count == "targets":
                known = jnp.pad((known & where)[:, 1:], ((0, 0), (0, 1)))
            where = where & known
        keywords = {name: at(value, step) for name, value in options.items()}
        values = loss(s, t, where=where, **keywords)
        return values, where.astype(values.dtype)

    return Term(no_params, term_loss)


def causal_lm(
    *, labels: str = "labels", logits: str = "logits", mask: str = "attention_mask"
) -> Term:
    """Cross-entropy of the next token. On a teacher's texts it is sequence-level distillation.

    The shift is done here: labels are the tokens themselves.

    Args:
      labels: batch entry of labels [B, L]: ``"input_ids"``, or a copy with -100 for tokens that
        are no target (prompts).
      logits: the student output to use.
      mask: batch entry of real tokens; others are neither targets nor read from.

    Returns:
      A `Term`. See `kdjax.losses.next_token_cross_entropy`.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.causal_lm(labels="input_ids")
    """

    def loss(
        tparams: Tree, student_out: Outputs, teacher_out: Outputs, batch: Batch, **_: Any
    ) -> tuple[jax.Array, jax.Array]:
        s = _checks.floating("logits", student_output(student_out, logits), ndim=3)
        real = real_tokens(batch, mask, *s.shape[:2])
        targets = _targets(batch, labels, real)
        values = losses.next_token_cross_entropy(s, targets, where=real)
        counted = real[:, :-1] & real[:, 1:] & labelled(targets[:, 1:])
        return values, counted.astype(values.dtype)

    return Term(no_params, loss)


def masked_lm(
    *, labels: str = "labels", logits: str = "logits", mask: str = "attention_mask"
) -> Term:
    """Cross-entropy at the tokens that were masked: those with a label.

    Args:
      labels: batch entry of labels [B, L], -100 where nothing was masked.
      logits: the student output to use.
      mask: batch entry of real tokens.

    Returns:
      A `Term`. See `kdjax.losses.hard_label_cross_entropy`.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.masked_lm()
    """

    def loss(
        tparams: Tree, student_out: Outputs, teacher_out: Outputs, batch: Batch, **_: Any
    ) -> tuple[jax.Array, jax.Array]:
        s = _checks.floating("logits", student_output(student_out, logits), ndim=3)
        real = real_tokens(batch, mask, *s.shape[:2])
        targets = _targets(batch, labels, real)
        values = losses.hard_label_cross_entropy(s, targets, where=real)
        return values, (real & labelled(targets)).astype(values.dtype)

    return Term(no_params, loss)


def cached_top_k(
    *,
    missing: str = "rest_bucket",
    temperature: Number = 1.0,
    teacher_temperature: Number = 1.0,
    ids: str = "teacher_ids",
    log_probs: str = "teacher_log_probs",
    logits: str = "logits",
    mask: str = "attention_mask",
) -> Term:
    """Distillation from a teacher's stored top k of every token, which come with the batch.

    Args:
      missing: ``"rest_bucket"``, ``"zero"`` or ``"renorm_both"``; three different objectives, see
        `kdjax.losses.top_k_kl`.
      temperature: at which both sides are compared, above 0; also a schedule of the step.
      teacher_temperature: at which the log-probabilities were made, above 0.
      ids: batch entry [B, L, k], the ``indices`` of `kdjax.labels.top_k`.
      log_probs: batch entry [B, L, k], the ``values`` of the same.
      logits: the student output to use.
      mask: batch entry of real tokens.

    Returns:
      A `Term`.

    Raises:
      ValueError: a temperature not above 0; when it runs, an unknown ``missing`` and others.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.cached_top_k(missing="zero", temperature=2.0)
    """
    checked("temperature", temperature, above=0)
    checked("teacher_temperature", teacher_temperature, above=0)
    _checks.choice("missing", missing, MISSING)

    def loss(
        tparams: Tree,
        student_out: Outputs,
        teacher_out: Outputs,
        batch: Batch,
        *,
        step: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        s = _checks.floating("logits", student_output(student_out, logits), ndim=3)
        real = real_tokens(batch, mask, *s.shape[:2])
        values = losses.top_k_kl(
            s,
            _checks.entry("batch", batch, ids),
            _checks.entry("batch", batch, log_probs),
            missing=missing,
            temperature=at(temperature, step),
            teacher_temperature=at(teacher_temperature, step),
            where=real,
        )
        return values, real.astype(values.dtype)

    return Term(no_params, loss)


def distil_triple(
    *,
    causal: bool,
    alpha_ce: Number = 5.0,
    alpha_lm: Number = 2.0,
    alpha_cos: Number = 1.0,
    alpha_mse: Number = 0.0,
    temperature: Number = 2.0,
    restrict_to_masked: bool = False,
    labels: str = "labels",
    mask: str = "attention_mask",
) -> dict[str, tuple[Number, Term]]:
    """DistilBERT's and DistilGPT-2's objective, as the terms of `kdjax.distill`.

        alpha_ce T^2 KL(teacher || student) + alpha_lm CE(labels) + alpha_cos (1 - cos(h_s, h_t))
            + alpha_mse |z_s - z_t|^2

    The divergence, the squares and the cosine of the last hidden states are means over all real
    tokens, unshifted, a decoder's last one included.

    Args:
      causal: True for decoders, whose labels are shifted by one; False for masked models.
      alpha_ce: weight of the divergence; like all of them a number, an array or a schedule.
      alpha_lm: weight of the cross-entropy with the labels.
      alpha_cos: weight of the cosine of the last hidden states; the widths must be equal.
      alpha_mse: weight of the squared difference of the logits, summed over the vocabulary.
      temperature: of the divergence, above 0; also a schedule.
      restrict_to_masked: divergence and squares of labelled tokens only.
      labels: batch entry of labels [B, L]; for decoders ``"input_ids"`` will do.
      mask: batch entry of real tokens.

    Returns:
      ``{"ce", "lm", "cos", "mse"}`` to ``(weight, Term)``, without those whose weight is written
      as 0. By default the weights published for DistilBERT.

    Raises:
      ValueError: a weight below 0, or a temperature not above 0.

    Example:
      >>> import kdjax as kd
      >>> sorted(kd.terms.distil_triple(causal=True, labels="input_ids"))
      ['ce', 'cos', 'lm']

    Reference:
      V. Sanh, L. Debut, J. Chaumond, T. Wolf, "DistilBERT, a distilled version of BERT: smaller,
      faster, cheaper and lighter", NeurIPS EMC2 Workshop 2019 (arXiv 1910.01108), section 2, and
      the published code.
    """
    checked("temperature", temperature, above=0)
    count = "labels" if restrict_to_masked else "tokens"
    lm = causal_lm if causal else masked_lm
    terms: dict[str, tuple[Number, Term]] = {
        "ce": (
            alpha_ce,
            token_divergence(count=count, labels=labels, mask=mask, temperature=temperature),
        ),
        "lm": (alpha_lm, lm(labels=labels, mask=mask)),
        "cos": (alpha_cos, hidden_cosine(mask=mask)),
        "mse": (
            alpha_mse,
            token_divergence(loss=_summed_squares, count=count, labels=labels, mask=mask),
        ),
    }
    for name, (weight, _) in terms.items():
        checked(f"alpha_{name}", weight, low=0)
    return {
        name: pair
        for name, pair in terms.items()
        if not (isinstance(pair[0], (int, float)) and pair[0] == 0)
    }


def _summed_squares(s: jax.Array, t: jax.Array, *, where: jax.Array) -> jax.Array:
    return s.shape[-1] * losses.logit_mse(s, t, where=where)


def _logits(student: Any, teacher: Any) -> tuple[jax.Array, jax.Array]:
    s = _checks.floating("the student's logits", student, ndim=3)
    t = _checks.floating("the teacher's logits", teacher, ndim=3)
    _checks.shape("the teacher's logits", t, (*s.shape[:2], t.shape[2]), "like the student's")
    return s, t


def _common_vocabulary(
    s: jax.Array, t: jax.Array, vocab_size: int | None
) -> tuple[jax.Array, jax.Array]:
    if vocab_size is None:
        if s.shape[-1] != t.shape[-1]:
            raise ValueError(
                "the student's logits must have the teacher's vocabulary, got "
                f"{s.shape[-1]} and {t.shape[-1]} entries: vocab_size= of "
                "kdjax.terms.token_divergence and of the fused loss compares only the first ones."
            )
        return s, t
    most = min(s.shape[-1], t.shape[-1])
    _checks.count("vocab_size", vocab_size, high=most)
    return s[..., :vocab_size], t[..., :vocab_size]


def _targets(batch: Batch, name: str, real: jax.Array) -> jax.Array:
    """Labels [B, L] with -1 for tokens that are no target."""
    hint = "labels='input_ids' takes the tokens themselves."
    labels = _checks.integer(f"batch[{name!r}]", _checks.entry("batch", batch, name, hint))
    _checks.shape(f"batch[{name!r}]", labels, real.shape, "like the student's tokens")
    if jnp.issubdtype(labels.dtype, jnp.unsignedinteger):
        return labels
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    return jnp.where(labels == IGNORED, -1, labels)
