"""The fused loss over all tokens: chunks in turn, gradients made on the way forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import _mesh_axis
from kdjax.lm._fused_chunks import Chunks, chunks_of
from kdjax.lm._fused_rows import Coefficients, Hyper, Side, Spec, Tokens, Values, chunk_of, marked
from kdjax.lm._fused_tiles import tiled_chunk_of


class Cotangents(NamedTuple):
    """Of the student's hidden states, in their dtype, and of its head and bias, accumulated."""

    hidden: jax.Array
    head: jax.Array
    bias: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_sum(
    spec: Spec,
    student: Side,
    teacher: Side,
    hyper: Hyper,
    tokens: Tokens,
    coefficients: Coefficients,
) -> tuple[jax.Array, Values]:
    """The sum over tokens of both parts times their coefficients [N], and the parts per token.

    Only the sum has a gradient. But for one factor it is known as soon as the values are: the
    forward pass computes it, from the same logits.
    """
    values = _values(spec, student, teacher, hyper, tokens)
    return _weighted(values, coefficients), values


def _weighted_sum_fwd(
    spec: Spec,
    student: Side,
    teacher: Side,
    hyper: Hyper,
    tokens: Tokens,
    coefficients: Coefficients,
) -> Any:
    values, found = _gradients(spec, student, teacher, hyper, tokens, coefficients)
    # Of student and coefficients only the types are read.
    return (_weighted(values, coefficients), values), (found, student, values, coefficients)


def _weighted_sum_bwd(spec: Spec, saved: Any, given: Any) -> Any:
    found, student, values, coefficients = saved
    factor = given[0]
    back = [
        None if c is None else _like(factor * v, c)
        for v, c in zip(values[:2], coefficients, strict=True)
    ]
    cotangents = jax.tree.map(lambda x: x.astype(factor.dtype) * factor, found)
    return _of_student(cotangents, student), None, None, None, tuple(back)


weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def per_token(spec: Spec, student: Side, teacher: Side, hyper: Hyper, tokens: Tokens) -> Values:
    """Both parts per token [N], whose gradients the backward pass computes from the inputs."""
    return _values(spec, student, teacher, hyper, tokens)


def _per_token_fwd(
    spec: Spec, student: Side, teacher: Side, hyper: Hyper, tokens: Tokens
) -> Any:  # fmt: skip
    return _values(spec, student, teacher, hyper, tokens), (student, teacher, hyper, tokens)


def _per_token_bwd(spec: Spec, saved: Any, given: Values) -> Any:
    student, *rest = saved
    _, found = _gradients(spec, student, *rest, (given.soft, given.hard))
    return _of_student(found, student), None, None, None


per_token.defvjp(_per_token_fwd, _per_token_bwd)


def _weighted(values: Values, coefficients: Coefficients) -> jax.Array:
    terms = [
        jnp.sum(jnp.where(c == 0, 0, c * v))  # also where the value is infinite
        for v, c in zip(values[:2], coefficients, strict=True)
        if c is not None
    ]
    return sum(terms[1:], terms[0])


def _of_student(found: Cotangents, student: Side) -> Side:
    """The cotangents as those of what the student gave; its scale and softcap have none."""
    bias = None if student.bias is None else _like(found.bias, student.bias)
    hidden, head = _like(found.hidden, student.hidden), _like(found.head, student.head)
    return Side(hidden, head, bias, None, None)


def _like(cotangent: jax.Array, primal: jax.Array) -> jax.Array:
    """Summed over the axes that only the cotangent varies over, in the dtype of the primal."""
    for axis in _mesh_axis.axes(cotangent):
        if not _mesh_axis.varies(primal, axis):
            cotangent = jax.lax.psum(cotangent, axis)
    return marked(cotangent.astype(primal.dtype), _mesh_axis.axes(primal))


@functools.partial(jax.jit, static_argnums=0)
def _values(spec: Spec, student: Side, teacher: Side, hyper: Hyper, tokens: Tokens) -> Values:
    return _scan(spec, student, teacher, hyper, tokens, None)[0]


@functools.partial(jax.jit, static_argnums=0)
def _gradients(
    spec: Spec,
    student: Side,
    teacher: Side,
    hyper: Hyper,
    tokens: Tokens,
    coefficients: Coefficients,
) -> tuple[Values, Cotangents]:
    values, found = _scan(spec, student, teacher, hyper, tokens, coefficients)
    assert found is not None
    return values, found


def _scan(
    spec: Spec,
    student: Side,
    teacher: Side,
    hyper: Hyper,
    tokens: Tokens,
    coefficients: Coefficients | None,
) -> tuple[Values, Cotangents | None]:
    """Values [N] and, given coefficients, the cotangents of their weighted sum."""
    axes = _mesh_axis.axes(student, teacher, hyper, tokens, coefficients)
    outside = tuple(axis for axis in axes if axis != spec.axis)
    # Hidden states that are one for all shards of the vocabulary get the cotangents of all.
    shared = spec.axis is not None and not _mesh_axis.varies(student.hidden, spec.axis)
    counts = tokens.soft | tokens.hard if spec.hard else tokens.soft
    chunks = chunks_of(spec.chunk, counts, spec.pack)
    student = student._replace(head=student.head.astype(spec.student_dtype))
    if spec.kind is not None:
        teacher = teacher._replace(head=teacher.head.astype(spec.teacher_dtype))
    rows_of = _reader(spec, chunks, student, teacher, tokens, coefficients)

    def one(carry: Any, index: jax.Array) -> tuple[Any, Values]:
        s, t, own, c = rows_of(index)
        rows: Any
        if spec.tile is not None:
            sums = None if carry is None else carry[1:]
            values, (rows, sums) = tiled_chunk_of(spec, s, t, hyper, own, c, sums, axes)
        else:
            values, found = chunk_of(spec, s, t, hyper, own, c, axes)
            if found is not None:
                rows, *more = found
                sums = jax.tree.map(jnp.add, carry[1:], tuple(more))
        soft, hard, entropy = values
        soft = None if soft is None else jnp.where(own.soft, soft, 0)
        hard = None if hard is None else jnp.where(own.hard, hard, 0)
        entropy = None if entropy is None else jnp.where(own.soft, entropy, 0)
        values = jax.tree.map(lambda x: marked(x, outside), Values(soft, hard, entropy))
        if carry is None:
            return None, values
        if shared:
            rows = jax.lax.psum(rows, spec.axis)
        rows = marked(rows.astype(carry[0].dtype), outside if shared else axes)
        sums = jax.tree.map(lambda x: marked(x, axes), sums)
        return (chunks.write(carry[0], rows, index), *sums), values

    carry: Any = None
    if coefficients is not None:
        laid = jax.eval_shape(chunks.laid_out, student.hidden)
        hidden = marked(jnp.zeros(laid.shape, laid.dtype), outside if shared else axes)
        sums = student.head, student.bias
        carry = hidden, *jax.tree.map(
            lambda x: marked(jnp.zeros(x.shape, spec.acc), axes), sums
        )  # fmt: skip
    body: Callable[[Any, jax.Array], tuple[Any, Values]] = one
    if chunks.order is not None:
        body = _skipping(one, spec, chunks, counts, outside)
    carry, values = jax.lax.scan(body, carry, jnp.arange(chunks.number))
    values = jax.tree.map(chunks.joined, values)
    if coefficients is None:
        return values, None
    return values, Cotangents(chunks.restored(carry[0]), *carry[1:])


def _reader(
    spec: Spec,
    chunks: Chunks,
    student: Side,
    teacher: Side,
    tokens: Tokens,
    coefficients: Coefficients | None,
) -> Callable[[jax.Array], Any]:
    """Student, teacher, tokens and coefficients of the chunk of a number, masked rows blank."""
    arrays = student.hidden, teacher.hidden, tokens, coefficients
    laid = jax.tree.map(chunks.laid_out, arrays)

    def rows_of(index: jax.Array) -> Any:
        own: Tokens
        s, t, own, c = jax.tree.map(lambda x: chunks.read(x, index), laid)
        counted = own.soft | own.hard if spec.hard else own.soft

        def blank(x: jax.Array, dtype: Any) -> jax.Array:
            # Ahead of every matrix product: 0 times NaN would enter the head's gradient.
            return jnp.where(counted[:, None], x, 0).astype(dtype)

        if c is not None:
            masks = own.soft, own.hard
            c = tuple(
                None if x is None else jnp.where(m, x, 0) for x, m in zip(c, masks, strict=True)
            )
        s = student._replace(hidden=blank(s, spec.student_dtype))
        if t is not None:
            t = blank(t, spec.teacher_dtype)
        return s, teacher._replace(hidden=t), own, c

    return rows_of


def _skipping(
    one: Callable[[Any, jax.Array], tuple[Any, Values]],
    spec: Spec,
    chunks: Chunks,
    counts: jax.Array,
    axes: tuple[str, ...],
) -> Callable[[Any, jax.Array], tuple[Any, Values]]:
    """``one``, but nothing for chunks without a token that counts."""

    def zeros(wanted: bool) -> Any:
        return marked(jnp.zeros((chunks.size,), spec.acc), axes) if wanted else None

    def skip(carry: Any, index: jax.Array) -> tuple[Any, Values]:
        return carry, Values(zeros(spec.kind is not None), zeros(spec.hard), zeros(spec.entropy))

    def body(carry: Any, index: jax.Array) -> tuple[Any, Values]:
        return jax.lax.cond(jnp.any(chunks.read(counts, index)), one, skip, carry, index)

    return body
