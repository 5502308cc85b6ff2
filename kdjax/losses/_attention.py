"""Losses between the insides of two transformers: attention, relations and hidden states.

Attention is taken as scores before the softmax and before any mask, as no -inf or -10000 of a mask
may enter a difference: ``where`` says which tokens are real, and is applied here. Losses of scores
and relations see a whole sequence, so ``where`` takes its tokens out as queries and as keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.losses._divergences import kl_parts
from kdjax.losses._inputs import blank, hyperparameter, select

# What the published code of TinyBERT takes for the trace of its additive mask of -10000.
MASKED_SCORE = -1e2


def attention_mse(
    student_scores: ArrayLike,
    teacher_scores: ArrayLike,
    *,
    where: ArrayLike | None = None,
    causal: bool = False,
    reduction: str = "masked",
) -> jax.Array:
    """Mean squared difference of attention scores.

        (1 / (H |P|)) * sum over heads h and pairs (i, j) in P of (A^s_hij - A^t_hij)^2

    with A = q k^T / sqrt(d_head) before softmax and mask, and P the pairs of real tokens, n^2 for
    an example with n of them. Weighted by |P|, the mean over examples is that over all pairs.

    Args:
        student_scores: [B, H, L, L] floating point, queries by keys; unmasked, or masked by adding
            a large negative number to the columns that ``where`` leaves out.
        teacher_scores: [B, H, L, L] floating point; no gradient flows to it.
        where: [B, L] bool, False for tokens (padding) to leave out as queries and as keys, or [B],
            False for whole examples: their scores may be NaN. None keeps all.
        causal: leave out keys that come after their query, as decoders do.
        reduction: ``"masked"`` as above. ``"reference"`` is TinyBERT's published code: scores of
            left out keys, and any up to -100, are 0 on their side, and the mean is over all L^2
            pairs, padded queries too. Without padding both are the same.

    Returns:
        [B] in at least float32, 0 for an example without real tokens.

    Raises:
        TypeError: scores are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, or the numbers of heads do: use ``relation_kl`` for these.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> student = jnp.array([[[[1.0, 2.0], [3.0, 5.0]]]])
        >>> losses.attention_mse(student, jnp.zeros((1, 1, 2, 2)))
        Array([9.75], dtype=float32)
        >>> losses.attention_mse(student, 0 * student, where=jnp.array([[True, False]]))
        Array([1.], dtype=float32)

    Reference:
        X. Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", Findings of
        EMNLP 2020, equation 7.
    """
    student, teacher = _scores(student_scores, teacher_scores)
    real = token_mask(where, student.shape[0], student.shape[-1])
    _checks.choice("reduction", reduction, ("masked", "reference"))
    if reduction == "reference":
        seen = None if real is None else real[:, None, :]
        kept = _causal(seen, student.shape[-1], causal)
        student, teacher = (
            jnp.where(x > MASKED_SCORE, x, 0) for x in (_kept(student, kept), _kept(teacher, kept))
        )
        return jnp.mean((student - teacher) ** 2, axis=(1, 2, 3))
    pairs = _pairs(real, student.shape[-1], causal)
    squares = (_kept(student, pairs) - _kept(teacher, pairs)) ** 2
    if pairs is None:
        return jnp.mean(squares, axis=(1, 2, 3))
    count = jnp.sum(pairs, axis=(1, 2), dtype=squares.dtype)
    return jnp.sum(squares, axis=(1, 2, 3)) / (squares.shape[1] * jnp.maximum(count, 1))


def attention_kl(
    student_scores: ArrayLike,
    teacher_scores: ArrayLike,
    *,
    where: ArrayLike | None = None,
    causal: bool = False,
) -> jax.Array:
    """Kullback-Leibler divergence of attention distributions, for each query.

        (1 / H) * sum_h KL(softmax_j(A^t_hij) || softmax_j(A^s_hij))

    the attention transfer of MiniLM. The softmax is over the real keys only.

    Args:
        student_scores: [B, H, L, L] floating point, queries by keys, before the softmax.
        teacher_scores: [B, H, L, L] floating point; no gradient flows to it.
        where: [B, L] bool, False for tokens to leave out as keys, and as queries (whose value is
            then 0); or [B], False for whole examples. None keeps all.
        causal: leave out keys that come after their query, as decoders do.

    Returns:
        [B, L] in at least float32. A mean must divide by the number of real tokens.

    Raises:
        TypeError: scores are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, or the numbers of heads do: use ``relation_kl`` for these.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> student = jnp.log(jnp.array([[[[0.5, 0.5], [0.25, 0.75]]]]))
        >>> teacher = jnp.log(jnp.array([[[[0.25, 0.75], [0.25, 0.75]]]]))
        >>> [round(float(x), 4) for x in losses.attention_kl(student, teacher)[0]]
        [0.1308, 0.0]

    Reference:
        W. Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
        Pre-Trained Transformers", NeurIPS 2020, section 3.1.
    """
    student, teacher = _scores(student_scores, teacher_scores)
    real = token_mask(where, student.shape[0], student.shape[-1])
    return _attention_kl(student, teacher, real, causal)


def relation_kl(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    relation_heads: int,
    where: ArrayLike | None = None,
    causal: bool = False,
) -> jax.Array:
    """Kullback-Leibler divergence of self-attention relations, for each query.

        (1 / A) * sum_a KL(R^t_a || R^s_a),   R_a = softmax_j(x_a x_a^T / sqrt(d / A))

    where x are the queries, the keys or the values of a layer with all of their heads side by
    side, split anew into A relation heads: so neither the heads nor the widths of student and
    teacher need be equal. MiniLMv2 sums the three relations (Q-Q, K-K, V-V) of one layer; with A
    the number of attention heads, V-V is the value relation of the first MiniLM.

    Args:
        student: [B, L, d] floating point.
        teacher: [B, L, d'] floating point; no gradient flows to it.
        relation_heads: A, which divides both widths. Published are 48 (base) and 64 (large).
        where: [B, L] bool, False for tokens to leave out as keys, and as queries (whose value is
            then 0); or [B], False for whole examples. None keeps all.
        causal: leave out keys that come after their query, as decoders do.

    Returns:
        [B, L] in at least float32. A mean must divide by the number of real tokens.

    Raises:
        TypeError: inputs are not floating point, or ``where`` is not boolean.
        ValueError: shapes don't fit, or ``relation_heads`` doesn't divide a width.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax import losses
        >>> values = jax.random.normal(jax.random.key(0), (2, 5, 12))
        >>> wide = jnp.concatenate([values, values], -1)
        >>> losses.relation_kl(values, wide, relation_heads=4).shape
        (2, 5)

    Reference:
        W. Wang, H. Bao, S. Huang, L. Dong, F. Wei, "MiniLMv2: Multi-Head Self-Attention Relation
        Distillation for Compressing Pretrained Transformers", Findings of ACL 2021, section 3.1.
    """
    s = _checks.floating("student", student, ndim=3)
    t = jax.lax.stop_gradient(_checks.floating("teacher", teacher, ndim=3))
    _checks.shape("teacher", t, (*s.shape[:2], t.shape[2]), "(B and L of student, any width)")
    heads = _checks.count("relation_heads", relation_heads)
    for name, x in (("student", s), ("teacher", t)):
        if x.shape[2] % heads:
            raise ValueError(
                f"relation_heads must divide the width {x.shape[2]} of {name}, got {heads}."
            )
    dtype = jnp.promote_types(s.dtype, t.dtype)
    real = token_mask(where, *s.shape[:2])
    s, t = (_relations(blank(x.astype(dtype), real), heads) for x in (s, t))
    return _attention_kl(s, t, real, causal)


def hidden_mse(
    student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Mean squared difference of the hidden states of each token.

        (1 / d) * sum_c (h^s_c - h^t_c)^2

    Args:
        student: [..., d] floating point, already projected to the teacher's width.
        teacher: [..., d] floating point; no gradient flows to it.
        where: [...] bool, False for tokens to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32. A mean must divide by the number of real tokens.

    Raises:
        TypeError: states are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> losses.hidden_mse(jnp.array([[[1.0, 3.0]]]), jnp.zeros((1, 1, 2)))
        Array([[5.]], dtype=float32)

    Reference:
        X. Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", Findings of
        EMNLP 2020, equations 8 and 9.
    """
    s, t, mask = _states(student, teacher, where)
    return select(jnp.mean((s - t) ** 2, axis=-1), mask)


def cosine_distance(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    eps: ArrayLike = 1e-12,
    where: ArrayLike | None = None,
) -> jax.Array:
    """One minus the cosine of the angle between the hidden states of each token.

        1 - <s, t> / sqrt((|s|^2 + eps) (|t|^2 + eps))

    Args:
        student: [..., d] floating point.
        teacher: [..., d] floating point; no gradient flows to it.
        eps: added to the squared lengths, a finite scalar above 0: a zero vector has cosine 0 with
            anything.
        where: [...] bool, False for tokens to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32, from 0 for the same direction to 2 for the opposite one.

    Raises:
        TypeError: states are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, or ``eps`` is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> print(f"{losses.cosine_distance(jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0])):.3f}")
        0.200

    Reference:
        V. Sanh, L. Debut, J. Chaumond, T. Wolf, "DistilBERT, a distilled version of BERT: smaller,
        faster, cheaper and lighter", NeurIPS EMC2 Workshop 2019 (arXiv 1910.01108), section 2.
    """
    s, t, mask = _states(student, teacher, where)
    eps = hyperparameter("eps", eps, s.dtype, above=0)
    lengths = jnp.sqrt(jnp.sum(s**2, axis=-1) + eps) * jnp.sqrt(jnp.sum(t**2, axis=-1) + eps)
    return select(1 - jnp.sum(s * t, axis=-1) / lengths, mask)


def token_mask(where: ArrayLike | None, batch: int, length: int) -> jax.Array | None:
    """The mask [B, L] of tokens, from one of tokens or one [B] of examples."""
    if where is None:
        return None
    given = _checks.as_array("where", where)
    mask = _checks.mask("where", given, (batch,) if given.ndim == 1 else (batch, length))
    assert mask is not None
    return mask if mask.ndim == 2 else jnp.broadcast_to(mask[:, None], (batch, length))


def _scores(student_scores: ArrayLike, teacher_scores: ArrayLike) -> tuple[jax.Array, jax.Array]:
    student = _checks.floating("student_scores", student_scores, ndim=4)
    teacher = _checks.floating("teacher_scores", teacher_scores, ndim=4)
    if student.shape[2] != student.shape[3]:
        raise ValueError(
            f"student_scores must be [B, H, L, L], got {_checks.describe(student_scores)}."
        )
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            "student_scores must have as many heads as teacher_scores, got "
            f"{student.shape[1]} and {teacher.shape[1]}: MiniLMv2's kdjax.losses.relation_kl "
            "compares models with other numbers of heads."
        )
    _checks.same_shape("student_scores", student, "teacher_scores", teacher)
    dtype = jnp.promote_types(student.dtype, teacher.dtype)
    return student.astype(dtype), jax.lax.stop_gradient(teacher).astype(dtype)


def _states(
    student: ArrayLike, teacher: ArrayLike, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    s = _checks.floating("student", student, min_ndim=1)
    t = jax.lax.stop_gradient(_checks.floating("teacher", teacher, min_ndim=1))
    _checks.same_shape("student", s, "teacher", t)
    mask = _checks.mask("where", where, s.shape[:-1])
    dtype = jnp.promote_types(s.dtype, t.dtype)
    return blank(s.astype(dtype), mask), blank(t.astype(dtype), mask), mask


def _pairs(real: jax.Array | None, length: int, causal: bool) -> jax.Array | None:
    """[B or 1, L, L] bool, True for pairs of a query and a key that both count."""
    both = None if real is None else real[:, :, None] & real[:, None, :]
    return _causal(both, length, causal)


def _causal(kept: jax.Array | None, length: int, causal: bool) -> jax.Array | None:
    if not causal:
        return kept
    past = jnp.tril(jnp.ones((1, length, length), bool))
    return past if kept is None else kept & past


def _kept(scores: jax.Array, pairs: jax.Array | None) -> jax.Array:
    return scores if pairs is None else jnp.where(pairs[:, None], scores, 0)


def _attention_kl(
    student: jax.Array, teacher: jax.Array, real: jax.Array | None, causal: bool
) -> jax.Array:
    """[B, L] from scores [B, H, L, L]: the mean over heads of the divergence over real keys."""
    pairs = _pairs(real, student.shape[-1], causal)
    if pairs is not None:
        # A query that doesn't count sees no key at all; zeros are a softmax without NaN.
        hidden = -jnp.inf if real is None else jnp.where(real, -jnp.inf, 0)[:, None, :, None]
        student, teacher = (jnp.where(pairs[:, None], x, hidden) for x in (student, teacher))
    divergence, _, _ = kl_parts(teacher, student, jnp.ones((), student.dtype))
    return select(jnp.mean(divergence, axis=1), real)


def _relations(x: jax.Array, heads: int) -> jax.Array:
    """Scaled products [B, A, L, L] of the vectors of all pairs of tokens."""
    split = x.reshape(*x.shape[:2], heads, -1)
    # Some accelerators multiply in half precision by default, where divergences drown.
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bqac,bkac->baqk", split, split, precision=exact)
    return scores * split.shape[-1] ** -0.5
