"""What the fused loss is given: checked, flattened to tokens, and what steers it made static."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.lm._fused_rows import Hyper, Side, Spec, Tokens

REDUCTIONS = ("mean", "none", "sum")


class Given(NamedTuple):
    """One model's side with hidden [N, d].

    Attributes:
        side: its arrays; scale and softcap as given.
        shape: of its hidden states, without the width.
        vocab_dim: which dimension of its head is the vocabulary.
        vocab: its size on this device.
    """

    side: Side
    shape: tuple[int, ...]
    vocab_dim: int
    vocab: int


class Weights(NamedTuple):
    """Weights of the tokens [N] in both means; 0 where they don't count, None without labels."""

    soft: jax.Array
    hard: Any


class Factors(NamedTuple):
    """What both parts are multiplied by; None for a part that the loss doesn't have."""

    soft: Any
    hard: Any


def side(
    name: str,
    hidden: ArrayLike,
    head: ArrayLike,
    bias: ArrayLike | None,
    vocab_dim: int | None,
    scale: ArrayLike,
    softcap: ArrayLike | None,
) -> Given:
    """Checks what belongs to one model."""
    h, w = _float(f"{name}_hidden", hidden), _float(f"{name}_head", head)
    if h.ndim < 1 or h.shape[-1] == 0:
        raise ValueError(
            f"{name}_hidden must have a last dimension of at least 1, got {_checks.describe(h)}."
        )
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(
            f"{name}_head must have 2 dimensions of at least 1, got {_checks.describe(w)}."
        )
    dim = _vocab_dim(name, h.shape[-1], w.shape, vocab_dim)
    b = None if bias is None else _float(f"{name}_bias", bias)
    if b is not None:
        _checks.shape(f"{name}_bias", b, (w.shape[dim],), f"(the vocabulary of {name}_head)")
    _checks.number(f"{name}_scale", scale)
    if softcap is not None:
        _checks.number(f"{name}_softcap", softcap, above=0)
    plain = isinstance(scale, (int, float)) and scale == 1
    rows = h.reshape(math.prod(h.shape[:-1]), h.shape[-1])
    own = Side(rows, w, b, None if plain else scale, softcap)
    return Given(own, h.shape[:-1], dim, w.shape[dim])


def _float(name: str, x: ArrayLike) -> jax.Array:
    """In its own dtype: half precision goes into the matrix products as it is."""
    x = _checks.as_array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point array, got {_checks.describe(x)}.")
    return x


def _vocab_dim(name: str, width: int, shape: tuple[int, ...], given: int | None) -> int:
    if given is not None and (isinstance(given, bool) or given not in (0, 1)):
        raise ValueError(
            f"{name}_vocab_dim must be 0 for a head (vocabulary, width), 1 for a head (width, "
            f"vocabulary), or None, got {_checks.describe(given)}."
        )
    fits = [dim for dim in (0, 1) if shape[1 - dim] == width and given in (None, dim)]
    if not fits:
        wanted = {
            0: f"(vocabulary, {width})",
            1: f"({width}, vocabulary)",
            None: f"(vocabulary, {width}) or ({width}, vocabulary)",
        }[given]
        raise ValueError(
            f"{name}_head must have shape {wanted} for {name}_hidden of width {width}, got "
            f"{tuple(shape)}."
        )
    if len(fits) == 2:
        raise ValueError(
            f"{name}_vocab_dim must be 0 for a head (vocabulary, width) or 1 for a head (width, "
            f"vocabulary) where {name}_head is square, got None for shape {tuple(shape)}."
        )
    return fits[0]


def same_tokens(student: Given, teacher: Given) -> tuple[int, ...]:
    """The shape of the tokens."""
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher_hidden must have shape {student.shape} before its width, as student_hidden "
            f"has, got {teacher.shape}."
        )
    return student.shape


def spec_of(
    student: Given,
    teacher: Given,
    labels: Any,
    soft_weight: ArrayLike,
    hard_weight: ArrayLike,
    *,
    beta: ArrayLike,
    temperature: ArrayLike,
    vocab_size: int | None,
    vocab_axis: str | None,
    chunk_tokens: int | None,
    chunk_vocab: int | None,
    pack: bool,
    compute_dtype: Any,
    parts: bool,
) -> Spec:
    """Everything that steers the program; numbers of which only 0 or 1 matter to it included."""
    _checks.number("temperature", temperature, above=0)
    _checks.number("soft_weight", soft_weight, low=0)
    _checks.number("hard_weight", hard_weight, low=0)
    _checks.number("beta", beta, low=0, high=1)
    hard = not _is(hard_weight, 0)
    if labels is None and hard:
        raise ValueError(
            "labels must be given where hard_weight isn't the number 0, got None and hard_weight "
            f"{_checks.describe(hard_weight)}."
        )
    kind = "kl" if _is(beta, 0) else "rkl" if _is(beta, 1) else "jsd"
    if not isinstance(beta, (int, float)):
        kind = "any"
    vocab, columns = _vocabulary(student.vocab, teacher.vocab, vocab_size, vocab_axis)
    own, other = (_product_dtype(x.side, compute_dtype) for x in (student, teacher))
    given = [x.dtype for x in (*student.side[:3], *teacher.side[:3]) if x is not None]
    if chunk_tokens is None:
        chunk_tokens = chunk_size(columns)
    if chunk_vocab is not None:
        chunk_vocab = min(columns, _checks.count("chunk_vocab", chunk_vocab))
    return Spec(
        kind=kind if parts or not hard or not _is(soft_weight, 0) else None,
        hard=labels is not None and (parts or hard),
        entropy=parts,
        unit_temperature=_is(temperature, 1),
        vocab=vocab,
        columns=columns,
        student_dim=student.vocab_dim,
        teacher_dim=teacher.vocab_dim,
        chunk=_checks.count("chunk_tokens", chunk_tokens),
        tile=chunk_vocab,
        pack=bool(pack),
        axis=vocab_axis,
        student_dtype=own,
        teacher_dtype=other,
        acc=jnp.result_type(jnp.float32, own, *(d for d in given if d == jnp.float64)),
    )


def chunk_size(columns: int) -> int:
    """Tokens for which float32 logits take about 128 MiB: a power of 2 from 128 to 4096."""
    return int(2 ** min(12, max(7, round(math.log2(2**30 / (8 * columns))))))


def _is(value: Any, number: int) -> bool:
    """Whether a hyperparameter is this Python number, so that the program can be a smaller one."""
    return isinstance(value, (int, float)) and value == number


def _vocabulary(
    student: int, teacher: int, vocab_size: int | None, vocab_axis: str | None
) -> tuple[int, int]:
    """The true size of the vocabulary, and the columns of logits on this device."""
    shards = 1 if vocab_axis is None else jax.lax.axis_size(vocab_axis)
    if student != teacher and vocab_axis is not None:
        raise ValueError(
            f"teacher_head must have {student} vocabulary entries on each device of "
            f"{vocab_axis!r}, as student_head has, got {teacher}; pad both to one size and give "
            "vocab_size."
        )
    columns = min(student, teacher)
    if vocab_size is not None:
        return _checks.count("vocab_size", vocab_size, high=columns * shards), columns
    if student != teacher:
        raise ValueError(
            "vocab_size must be given, the true size of the vocabulary, where student_head has "
            f"{student} entries and teacher_head {teacher}, got None."
        )
    return columns * shards, columns


def _product_dtype(side: Side, compute_dtype: Any) -> Any:
    """The dtype of a side's operands in the matrix products."""
    if compute_dtype is None:
        return jnp.result_type(side.hidden, side.head)
    dtype = jnp.dtype(compute_dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"compute_dtype must be a floating-point dtype, got {dtype}.")
    return dtype


def tokens_of(
    spec: Spec,
    labels: ArrayLike | None,
    mask: ArrayLike | None,
    shape: tuple[int, ...],
    ignore: int,
) -> tuple[Tokens, Weights, Any]:
    """Labels, masks and weights of the tokens [N], and where a traced label is out of range."""
    weights = None if mask is None else _token_weights(mask, shape, spec.acc)
    if labels is None:
        soft = (jnp.ones(shape, spec.acc) if weights is None else weights).reshape(-1)
        return Tokens(None, soft > 0, None), Weights(soft, None), None
    labels = _checks.integer("labels", labels)
    _checks.shape("labels", labels, shape, "(student_hidden without its width)")
    if labels.dtype != jnp.int64:
        labels = labels.astype(jnp.int32)
    labelled = labels != ignore
    weights = labelled.astype(spec.acc) if weights is None else weights
    hard = jnp.where(labelled, weights, 0)
    invalid = ((labels < 0) | (labels >= spec.vocab)) & (hard > 0)
    if not _checks.is_traced(invalid) and np.any(invalid):
        wrong = np.asarray(labels)[np.asarray(invalid)].flat[0]
        raise ValueError(
            f"labels must be vocabulary indices from 0 to {spec.vocab - 1}, or {ignore} "
            f"(label_ignore) for tokens without a label, got {wrong}."
        )
    labels, soft, hard, invalid = (x.reshape(-1) for x in (labels, weights, hard, invalid))
    if not spec.hard:
        return Tokens(None, soft > 0, None), Weights(soft, None), None
    return Tokens(labels, soft > 0, hard > 0), Weights(soft, hard), invalid


def _token_weights(mask: ArrayLike, shape: tuple[int, ...], acc: Any) -> jax.Array:
    weights = _checks.as_array("mask", mask)
    if weights.dtype != jnp.bool_ and not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(
            "mask must be a boolean array, or a floating-point array of token weights, got "
            f"{_checks.describe(weights)}."
        )
    _checks.shape("mask", weights, shape, "(student_hidden without its width)")
    if weights.dtype != jnp.bool_:
        _checks.number("mask", weights, low=0, scalar=False)
    return weights.astype(acc)


def hyper_of(temperature: ArrayLike, beta: ArrayLike, acc: Any) -> Hyper:
    """The scalars that the arithmetic takes, without gradients."""
    return jax.lax.stop_gradient(Hyper(jnp.asarray(temperature, acc), jnp.asarray(beta, acc)))


def factors_of(
    spec: Spec, soft_weight: ArrayLike, hard_weight: ArrayLike, hyper: Hyper, soft_t2: bool
) -> Factors:
    """What multiplies both parts in the loss."""
    soft = hard = None
    if spec.kind is not None:
        soft = jnp.asarray(soft_weight, spec.acc)
        soft = soft * jnp.square(hyper.temperature) if soft_t2 else soft
    if spec.hard and not _is(hard_weight, 0):
        hard = jnp.asarray(hard_weight, spec.acc)
    return Factors(soft, hard)


def operands_of(spec: Spec, student: Given, teacher: Given) -> tuple[Side, Side]:
    """Both sides as the arithmetic takes them; nothing of a teacher that isn't read."""

    def one(side: Side) -> Side:
        scale, softcap = (
            None if x is None else jax.lax.stop_gradient(jnp.asarray(x, spec.acc)) for x in side[3:]
        )
        return side._replace(scale=scale, softcap=softcap)

    if spec.kind is None:
        return one(student.side), Side(None, None, None, None, None)
    return one(student.side), jax.lax.stop_gradient(one(teacher.side))
