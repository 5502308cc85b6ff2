"""MiniLM: a small transformer that imitates one layer of self-attention, of any width and depth.

Only the student's last layer is matched with one layer of the teacher, so that neither layer maps
nor projections are needed. `minilm` is the first form, for equal numbers of heads; `minilmv2`
re-splits queries, keys and values into relation heads, so that heads and widths may differ.

Reference:
  W. Wang, F. Wei, L. Dong, H. Bao, N. Yang, M. Zhou, "MiniLM: Deep Self-Attention Distillation for
  Task-Agnostic Compression of Pre-Trained Transformers", NeurIPS 2020 (arXiv 2002.10957);
  W. Wang, H. Bao, S. Huang, L. Dong, F. Wei, "MiniLMv2: Multi-Head Self-Attention Relation
  Distillation for Compressing Pretrained Transformers", Findings of ACL 2021 (arXiv 2012.15828).
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from kdjax import terms
from kdjax._pairs import Batch, Method, Model
from kdjax.core import distill
from kdjax.terms._outputs import Number

__all__ = ["minilm", "minilmv2"]

Augment = Callable[[jax.Array, Batch], Batch]


def minilm(
    student: Model,
    teacher: Model | None,
    *,
    heads: int,
    teacher_layer: int = -1,
    causal: bool = False,
    attention: Number = 1.0,
    values: Number = 1.0,
    augment: Augment | None = None,
) -> Method:
    """Attention distributions and value relations of the last layer.

    Args:
      student: with outputs ``scores`` and ``values``:
        ``kdjax.lm.model(config, outputs=("scores", "values"))``.
      teacher: the same, with as many heads.
      heads: how many both have.
      teacher_layer: which of the teacher's layers (from 0; -1 is the last).
      causal: leave out keys after their query (GPT-2).
      attention: weight of the divergence of attention distributions; a number, an array or a
        schedule.
      values: weight of that of value relations.
      augment: ``(key, batch) -> batch`` inside the update.

    Returns:
      A `Method`; metrics ``loss``, ``loss/attention``, ``loss/values``.

    Raises:
      ValueError: at the first update: another number of heads, or no such layer.

    Example:
      >>> import kdjax as kd
      >>> config = kd.lm.BertConfig(
      ...     vocab_size=50, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16
      ... )
      >>> net = kd.lm.model(config, outputs=("scores", "values"))
      >>> method = kd.methods.minilm.minilm(net, net, heads=2)

    Reference:
      Wang et al., NeurIPS 2020, equations 7 to 9.
    """
    pairs = {
        "attention": (
            attention,
            terms.attention_distributions(teacher_layer=teacher_layer, causal=causal),
        ),
        "values": (
            values,
            terms.relations(
                relation_heads=heads,
                outputs=("values",),
                teacher_layer=teacher_layer,
                causal=causal,
            ),
        ),
    }
    return distill(student, teacher, pairs, augment=augment)


def minilmv2(
    student: Model,
    teacher: Model | None,
    *,
    relation_heads: int = 48,
    teacher_layer: int = -1,
    causal: bool = False,
    queries: Number = 1.0,
    keys: Number = 1.0,
    values: Number = 1.0,
    augment: Augment | None = None,
) -> Method:
    """Query, key and value relations of the last layer, re-split into relation heads.

    Args:
      student: with outputs ``queries``, ``keys`` and ``values``:
        ``kdjax.lm.model(config, outputs=("queries", "keys", "values"))``.
      teacher: the same; heads and width may be others.
      relation_heads: divides both widths; published: 48 for base-size teachers, 64 for large ones.
      teacher_layer: which of the teacher's layers (from 0; -1 is the last). Published: the last of
        base-size teachers, 20 of BERT-large, 18 of RoBERTa-large.
      causal: leave out keys after their query (GPT-2).
      queries: weight of the divergence of query relations; a number, an array or a schedule.
      keys: weight of that of key relations.
      values: weight of that of value relations.
      augment: ``(key, batch) -> batch`` inside the update.

    Returns:
      A `Method`; metrics ``loss``, ``loss/queries``, ``loss/keys``, ``loss/values``.

    Raises:
      ValueError: at the first update: widths that don't divide, or no such layer.

    Example:
      >>> import kdjax as kd
      >>> config = kd.lm.BertConfig(
      ...     vocab_size=50, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16
      ... )
      >>> net = kd.lm.model(config, outputs=("queries", "keys", "values"))
      >>> method = kd.methods.minilm.minilmv2(net, net, relation_heads=4)

    Reference:
      Wang et al., Findings of ACL 2021, equations 4 to 6.
    """
    pairs = {
        name: (
            weight,
            terms.relations(
                relation_heads=relation_heads,
                outputs=(name,),
                teacher_layer=teacher_layer,
                causal=causal,
            ),
        )
        for name, weight in {"queries": queries, "keys": keys, "values": values}.items()
    }
    return distill(student, teacher, pairs, augment=augment)
