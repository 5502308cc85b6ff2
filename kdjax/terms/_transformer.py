"""The insides of transformers as Terms: attention, hidden states, relations, by layer maps.

They read the outputs of `kdjax.lm` models or of any others with ``hidden``, a tuple of L + 1
arrays [B, L, d] from the embeddings on, ``scores``, a tuple of L arrays [B, H, L, L] before mask
and softmax, and ``queries``, ``keys`` and ``values``, tuples of L arrays [B, L, d]. The batch's
``attention_mask`` [B, L] says by 1 which tokens are real; without it all are. What isn't real, or
belongs to examples of weight 0, enters neither values nor gradients, and means are taken over all
real tokens (or pairs of tokens) of all devices and microbatches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks, losses
from kdjax._pairs import Batch, Outputs, Term, Tree
from kdjax.terms._layers import (
    Layers,
    init_projection,
    layer,
    layer_pairs,
    real_tokens,
    same_width,
    stack,
    total,
)
from kdjax.terms._layers import (
    project as projected,
)
from kdjax.terms._outputs import no_params

REDUCTIONS = ("masked", "reference")


def attention_scores(
    *,
    layers: Layers = None,
    causal: bool = False,
    reduction: str = "masked",
    student: str = "scores",
    teacher: str = "scores",
    mask: str = "attention_mask",
) -> Term:
    """TinyBERT's attention loss: the sum over layers of the scores' mean squared differences.

    Args:
      layers: the teacher's layer (from 0) for each of the student's, or a dict from layers of the
        student to layers of the teacher. None: `uniform_layers`.
      causal: leave out keys after their query (GPT-2).
      reduction: ``"masked"``, the mean over pairs of real tokens, or ``"reference"``, that of the
        published code over all pairs; see `kdjax.losses.attention_mse`.
      student: the student's output of scores.
      teacher: the teacher's.
      mask: batch entry of real tokens.

    Returns:
      A `Term`. It refuses models with other numbers of heads, which `relations` takes.

    Raises:
      ValueError: an unknown reduction; when it runs, layers that don't fit, or another number of
        heads.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.attention_scores(layers=(1, 3, 5, 7, 9, 11))

    Reference:
      X. Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", Findings of
      EMNLP 2020, equation 7.
    """
    _checks.choice("reduction", reduction, REDUCTIONS)

    def loss(
        tparams: Tree, student_out: Outputs, teacher_out: Outputs, batch: Batch, **_: Any
    ) -> Any:
        s, t = stack("student", student_out, student), stack("teacher", teacher_out, teacher)
        pairs = layer_pairs(layers, len(s), len(t))
        real = real_tokens(batch, mask, s[0].shape[0], s[0].shape[-1])
        compare = functools.partial(
            losses.attention_mse, where=real, causal=causal, reduction=reduction
        )
        values = total(compare(s[i], t[j]) for i, j in pairs)
        if reduction == "reference":
            return values
        n = jnp.sum(real, axis=1, dtype=values.dtype)
        return values, n * (n + 1) / 2 if causal else n * n

    return Term(no_params, loss)


def hidden_states(
    *,
    layers: Layers = None,
    embeddings: bool = True,
    project: bool = True,
    shared: bool = True,
    bias: bool = True,
    kernel_init: Callable[..., jax.Array] | None = None,
    reduction: str = "masked",
    student: str = "hidden",
    teacher: str = "hidden",
    mask: str = "attention_mask",
) -> Term:
    """TinyBERT's hidden and embedding losses, through learned projections to the teacher's width.

        sum over matched states of mean((H^s W + b - H^t)^2)

    Args:
      layers: the teacher's layer (from 0) for each of the student's, or a dict from layers of the
        student to layers of the teacher. None: `uniform_layers`. Embeddings come on top.
      embeddings: whether the embeddings are matched, too.
      project: whether there are projections. Without, the widths must be equal.
      shared: one projection for all states, as in the published code; False for one each (the
        paper has one for embeddings and one for hidden states).
      bias: whether projections have biases: the published code's do, the paper's don't.
      kernel_init: initialiser of ``(key, shape, dtype)``; by default normal with deviation 0.02.
      reduction: ``"masked"``, the mean over real tokens, or ``"reference"``, that of the published
        code over all tokens, padding too.
      student: the student's output of hidden states.
      teacher: the teacher's.
      mask: batch entry of real tokens.

    Returns:
      A `Term`. Its parameters, ``{"kernel", "bias"}`` or these by number of the student's state,
      are trained with the student and no part of it.

    Raises:
      ValueError: an unknown reduction; when it is started, layers that don't fit, or unequal
        widths without a projection.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.hidden_states(shared=False, bias=False)

    Reference:
      X. Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", Findings of
      EMNLP 2020, equations 8 and 9.
    """
    _checks.choice("reduction", reduction, REDUCTIONS)

    def matched(student_out: Outputs, teacher_out: Outputs) -> list[tuple[str, Any, Any]]:
        s, t = stack("student", student_out, student), stack("teacher", teacher_out, teacher)
        pairs = [(i + 1, j + 1) for i, j in layer_pairs(layers, len(s) - 1, len(t) - 1)]
        pairs = [(0, 0), *pairs] if embeddings else pairs
        return [(str(i), s[i], t[j]) for i, j in pairs]

    def init(key: jax.Array, student_out: Outputs, teacher_out: Outputs) -> Tree:
        states = matched(student_out, teacher_out)
        if not project:
            for _, s, t in states:
                same_width(s, t)
            return {}
        own = {
            name: init_projection(jax.random.fold_in(key, i), s, t, bias, kernel_init)
            for i, (name, s, t) in enumerate(states)
        }
        return next(iter(own.values())) if shared else own

    def loss(
        tparams: Tree, student_out: Outputs, teacher_out: Outputs, batch: Batch, **_: Any
    ) -> Any:
        states = matched(student_out, teacher_out)
        real = real_tokens(batch, mask, *states[0][1].shape[:2])
        where = real if reduction == "masked" else None

        def compare(name: str, s: jax.Array, t: jax.Array) -> jax.Array:
            if project:
                s = projected(tparams if shared else tparams[name], s, where)
            else:
                same_width(s, t)
            return losses.hidden_mse(s, t, where=where)

        values = total(compare(*state) for state in states)
        return (values, real.astype(values.dtype)) if reduction == "masked" else values

    return Term(init, loss)


def hidden_cosine(
    *,
    student_layer: int = -1,
    teacher_layer: int = -1,
    project: bool = False,
    kernel_init: Callable[..., jax.Array] | None = None,
    student: str = "hidden",
    teacher: str = "hidden",
    mask: str = "attention_mask",
) -> Term:
    """DistilBERT's cosine loss between the directions of hidden states, by default the last ones.

    Args:
      student_layer: which of the student's states (0 are the embeddings, -1 is the last).
      teacher_layer: which of the teacher's.
      project: whether a learned projection without bias takes the student's to the teacher's
        width. Without, the widths must be equal.
      kernel_init: initialiser of ``(key, shape, dtype)``; by default normal with deviation 0.02.
      student: the student's output of hidden states.
      teacher: the teacher's.
      mask: batch entry of real tokens.

    Returns:
      A `Term`. See `kdjax.losses.cosine_distance`.

    Raises:
      ValueError: when it is started, a layer out of range, or unequal widths without a projection.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.hidden_cosine()

    Reference:
      V. Sanh, L. Debut, J. Chaumond, T. Wolf, "DistilBERT, a distilled version of BERT: smaller,
      faster, cheaper and lighter", NeurIPS EMC2 Workshop 2019 (arXiv 1910.01108), section 2.
    """

    def pair(student_out: Outputs, teacher_out: Outputs) -> tuple[jax.Array, jax.Array]:
        s, t = stack("student", student_out, student), stack("teacher", teacher_out, teacher)
        i, j = (
            layer("student_layer", student_layer, len(s)),
            layer("teacher_layer", teacher_layer, len(t)),
        )
        return s[i], t[j]

    def init(key: jax.Array, student_out: Outputs, teacher_out: Outputs) -> Tree:
        s, t = pair(student_out, teacher_out)
        if project:
            return init_projection(key, s, t, False, kernel_init)
        same_width(s, t)
        return {}

    def loss(
        tparams: Tree, student_out: Outputs, teacher_out: Outputs, batch: Batch, **_: Any
    ) -> Any:
        s, t = pair(student_out, teacher_out)
        real = real_tokens(batch, mask, *s.shape[:2])
        if project:
            s = projected(tparams, s, real)
        else:
            same_width(s, t)
        values = losses.cosine_distance(s, t, where=real)
        return values, real.astype(values.dtype)

    return Term(init, loss)


def attention_distributions(
    *,
    student_layer: int = -1,
    teacher_layer: int = -1,
    causal: bool = False,
    student: str = "scores",
    teacher: str = "scores",
    mask: str = "attention_mask",
) -> Term:
    """MiniLM's attention transfer: the divergence of one layer's attention distributions.

    With the value relation, ``relations(outputs=("values",), relation_heads=H)``, it is MiniLM.

    Args:
      student_layer: which of the student's layers (-1 is the last).
      teacher_layer: which of the teacher's.
      causal: leave out keys after their query (GPT-2).
      student: the student's output of scores.
      teacher: the teacher's.
      mask: batch entry of real tokens.

    Returns:
      A `Term`. See `kdjax.losses.attention_kl`.

    Raises:
      ValueError: when it runs, a layer out of range, or another number of heads.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.attention_distributions()

    Reference:
      W. Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
      Pre-Trained Transformers", NeurIPS 2020, section 3.1.
    """

    def loss(
        tparams: Tree, student_out: Outputs, teacher_out: Outputs, batch: Batch, **_: Any
    ) -> Any:
        s, t = stack("student", student_out, student), stack("teacher", teacher_out, teacher)
        s_layer = s[layer("student_layer", student_layer, len(s))]
        t_layer = t[layer("teacher_layer", teacher_layer, len(t))]
        real = real_tokens(batch, mask, s_layer.shape[0], s_layer.shape[-1])
        values = losses.attention_kl(s_layer, t_layer, where=real, causal=causal)
        return values, real.astype(values.dtype)

    return Term(no_params, loss)


def relations(
    *,
    relation_heads: int,
    outputs: Sequence[str] = ("queries", "keys", "values"),
    student_layer: int = -1,
    teacher_layer: int = -1,
    causal: bool = False,
    mask: str = "attention_mask",
) -> Term:
    """MiniLMv2: the sum of the divergences of the query, key and value relations of one layer.

    Neither heads nor widths need be equal. Of a large teacher a layer before the last is better
    (21 of BERT-large's 24, counted from 1).

    Args:
      relation_heads: heads that each output is split into; divides both widths.
      outputs: the relations to sum, names of outputs of both models.
      student_layer: which of the student's layers (from 0; -1 is the last).
      teacher_layer: which of the teacher's.
      causal: leave out keys after their query (GPT-2).
      mask: batch entry of real tokens.

    Returns:
      A `Term`. See `kdjax.losses.relation_kl`.

    Raises:
      ValueError: no outputs; when it runs, a layer out of range, or widths that don't divide.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.relations(relation_heads=48, teacher_layer=20)

    Reference:
      W. Wang, H. Bao, S. Huang, L. Dong, F. Wei, "MiniLMv2: Multi-Head Self-Attention Relation
      Distillation for Compressing Pretrained Transformers", Findings of ACL 2021, section 3.
    """
    relation_heads = _checks.count("relation_heads", relation_heads)
    if isinstance(outputs, str) or not outputs:
        raise ValueError(
            f"outputs must be names such as ('values',), got {_checks.describe(outputs)}."
        )

    def loss(
        tparams: Tree, student_out: Outputs, teacher_out: Outputs, batch: Batch, **_: Any
    ) -> Any:
        values, real = [], None
        for name in outputs:
            s, t = stack("student", student_out, name), stack("teacher", teacher_out, name)
            s_layer = s[layer("student_layer", student_layer, len(s))]
            t_layer = t[layer("teacher_layer", teacher_layer, len(t))]
            real = real_tokens(batch, mask, *s_layer.shape[:2])
            values.append(
                losses.relation_kl(
                    s_layer, t_layer, relation_heads=relation_heads, where=real, causal=causal
                )
            )
        assert real is not None
        return total(values), real.astype(values[0].dtype)

    return Term(no_params, loss)
