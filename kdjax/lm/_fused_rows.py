"""What the fused loss does with a chunk of tokens against the whole vocabulary, or a shard of it.

Logits, the divergence's value and its derivative are in the accumulation dtype (float32, or
float64); only what enters a matrix product is narrower. Derivatives are written out, so nothing
here is ever differentiated.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import _mesh_axis
from kdjax.lm._fused_chunks import Chunks

Coefficients = tuple[Any, Any]


class Spec(NamedTuple):
    """What steers the program.

    Attributes:
        kind: "kl", "rkl", "jsd", "any" for a beta known only at run time, or None without teacher.
        hard: whether there is a hard part.
        entropy: whether the teacher's entropy is wanted.
        unit_temperature: whether the temperature is 1 for certain.
        vocab: the true size of the vocabulary.
        columns: columns of the logits on this device that student and teacher share.
        student_dim: which dimension of the student's head is the vocabulary.
        teacher_dim: the same of the teacher's.
        chunk: tokens at a time.
        tile: columns at a time, or None for all of them.
        pack: whether tokens that count go first, so that chunks without any are skipped.
        axis: the named axis that the vocabulary is sharded over, or None.
        student_dtype: of the operands of the student's matrix products.
        teacher_dtype: of those of the teacher's.
        acc: of everything else.
    """

    kind: str | None
    hard: bool
    entropy: bool
    unit_temperature: bool
    vocab: int
    columns: int
    student_dim: int
    teacher_dim: int
    chunk: int
    tile: int | None
    pack: bool
    axis: str | None
    student_dtype: Any
    teacher_dtype: Any
    acc: Any


class Side(NamedTuple):
    """The student or the teacher; without ``hidden`` its head alone."""

    hidden: Any
    head: Any
    bias: Any
    scale: Any
    softcap: Any


class Hyper(NamedTuple):
    """Scalars that may be known only at run time."""

    temperature: jax.Array
    beta: jax.Array


class Tokens(NamedTuple):
    """Per token: the label, and whether it counts for the soft and the hard part."""

    labels: Any
    soft: Any
    hard: Any


class Values(NamedTuple):
    """Per token: both parts without weights, and the teacher's entropy; None what isn't wanted."""

    soft: Any
    hard: Any
    entropy: Any


class Columns(NamedTuple):
    """Vocabulary indices of the columns at hand [V], and which are real; None if all are."""

    ids: jax.Array
    live: jax.Array | None


def columns_of(spec: Spec) -> Columns:
    """The columns of this device's logits."""
    index = jnp.arange(spec.columns, dtype=jnp.int32)
    if spec.axis is not None:
        index = index + jax.lax.axis_index(spec.axis) * spec.columns
    padded = spec.axis is not None or spec.vocab < spec.columns
    return Columns(index, index < spec.vocab if padded else None)


def logits(spec: Spec, side: Side, dim: int) -> jax.Array:
    """softcap(scale * (hidden head^T + bias)) [C, V] for all that the head has."""
    z = _product(spec, side.hidden, side.head, 1, 1 - dim)
    if side.bias is not None:
        z = z + side.bias[None].astype(spec.acc)
    if side.scale is not None:
        z = z * side.scale
    return z if side.softcap is None else side.softcap * jnp.tanh(z / side.softcap)


def shown(columns: Columns, z: jax.Array) -> jax.Array:
    """The logits of these columns, -inf where one is padding."""
    z = z[:, : columns.ids.shape[0]]
    return z if columns.live is None else jnp.where(columns.live[None], z, -jnp.inf)


def through_logits(side: Side, gradient: jax.Array, z: jax.Array, columns: Columns) -> jax.Array:
    """The derivative by ``hidden head^T + bias`` from that by the logits ``z``."""
    if side.softcap is not None:
        gradient = gradient * (1 - jnp.square(z / side.softcap))
        if columns.live is not None:  # z is -inf there
            gradient = jnp.where(columns.live[None], gradient, 0)
    return gradient if side.scale is None else gradient * side.scale


def products(spec: Spec, side: Side, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cotangents of hidden [C, d] and head for those of the logits [C, V]."""
    gradient = gradient.astype(spec.student_dtype)
    hidden = _product(spec, gradient, side.head, 1, spec.student_dim)
    both = (gradient, side.hidden) if spec.student_dim == 0 else (side.hidden, gradient)
    return hidden, _product(spec, both[0], both[1], 0, 0)


def _product(spec: Spec, a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    """The matrix product over one dimension of each, accumulated in ``spec.acc``."""
    over = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimension_numbers=over, preferred_element_type=spec.acc)


def gaps(kind: str, beta: jax.Array, log_p: jax.Array, log_q: jax.Array) -> tuple[Any, Any]:
    """log p - log m and log q - log m for the teacher's p and the student's q [C, V].

    Terms of a class of probability 0 are 0, and so is what the divergence doesn't need. With
    d = log q - log p, log m is log of the larger one plus log1p(w expm1(-|d|)): students close to
    their teachers keep their digits, where a sum of two logarithms has lost them.
    """
    p_there, q_there = log_p > -jnp.inf, log_q > -jnp.inf
    d = log_q - log_p
    if kind == "kl":
        return jnp.where(p_there, -d, 0), None
    if kind == "rkl":
        return None, jnp.where(q_there, d, 0)
    near = -jnp.abs(d)
    weight = jnp.where(d > 0, beta, 1 - beta)
    shrink = jnp.log1p(weight * jnp.expm1(near))
    if kind == "any":
        shrink = jnp.where(weight == 1, near, shrink)
    p_gap = jnp.where(d > 0, near - shrink, -shrink)
    q_gap = jnp.where(d > 0, -shrink, near - shrink)
    return jnp.where(p_there, p_gap, 0), jnp.where(q_there, q_gap, 0)


def value_terms(
    kind: str, beta: jax.Array, p: jax.Array, q: jax.Array, p_gap: Any, q_gap: Any
) -> jax.Array:
    """What sums to the divergence over the vocabulary [C, V]."""
    if kind == "kl":
        return _kl_terms(p, q, p_gap)
    if kind == "rkl":
        return _kl_terms(q, p, q_gap)
    mixed = beta * p * p_gap + (1 - beta) * q * q_gap
    if kind == "jsd":
        return mixed
    # At an end one of the two terms is 0 for every student; the other one then counts in full.
    mixed = jnp.where(beta == 0, _kl_terms(p, q, p_gap), mixed)
    return jnp.where(beta == 1, _kl_terms(q, p, q_gap), mixed)


def _kl_terms(p: jax.Array, q: jax.Array, gap: jax.Array) -> jax.Array:
    """p (e^d - 1 - d) with d = log q - log p = -gap, whose sum is that of p gap.

    None is negative, where those of p gap cancel: close distributions keep their digits.
    """
    d = -gap
    small = p * (jnp.expm1(jnp.minimum(d, 1)) - d)
    return jnp.where((d > 1) | (p == 0), q - p * (1 + d), small)


def soft_gradient(
    kind: str, beta: jax.Array, p: jax.Array, q: jax.Array, q_gap: Any, mean: Any
) -> jax.Array:
    """T times the divergence's derivative by the student's logits; ``mean`` [C] of ``q_gap``."""
    if kind == "kl":
        return q - p
    curve = q * (q_gap - mean[:, None])
    if kind == "rkl":
        return curve
    if kind == "jsd":
        return (1 - beta) * curve
    weight = jnp.where(beta == 0, 0, jnp.where(beta == 1, 1, 1 - beta))
    return weight * curve + jnp.where(beta == 0, q - p, 0)


def total(spec: Spec, terms: Any) -> Any:
    """Sums over the whole vocabulary [C] of each array [C, V]."""
    sums = jax.tree.map(lambda x: jnp.sum(x, axis=1), terms)
    return sums if spec.axis is None else jax.lax.psum(sums, spec.axis)


def log_softmax(spec: Spec, z: jax.Array, temperature: Any) -> tuple[jax.Array, jax.Array]:
    """log softmax(z / T) and softmax(z / T); no division where the temperature is None."""
    highest = jnp.max(z, axis=1)
    if spec.axis is not None:
        highest = jax.lax.pmax(highest, spec.axis)
    z = z - highest[:, None]
    if temperature is not None:
        z = z / temperature
    weights = jnp.exp(z)
    mass = total(spec, weights)
    return z - jnp.log(mass)[:, None], weights * (1 / mass)[:, None]


def rows_of(
    spec: Spec,
    hyper: Hyper,
    columns: Columns,
    z: jax.Array,
    z_t: Any,
    labels: Any,
    coefficients: Coefficients | None,
) -> tuple[Values, Any]:
    """Values of some rows of logits and, given coefficients, the derivative by the student's."""
    temperature = None if spec.unit_temperature else hyper.temperature
    soft = entropy = hard = None
    gradient: Any = None
    soft_factor, hard_factor = (None, None) if coefficients is None else coefficients
    log_q, q = log_softmax(spec, z, temperature)
    if spec.kind is not None:
        log_p, p = log_softmax(spec, z_t, temperature)
        p_gap, q_gap = gaps(spec.kind, hyper.beta, log_p, log_q)
        terms = {"value": value_terms(spec.kind, hyper.beta, p, q, p_gap, q_gap)}
        if q_gap is not None:
            terms["mean"] = q * q_gap
        if spec.entropy:
            terms["entropy"] = jnp.where(log_p > -jnp.inf, -p * log_p, 0)
        sums = total(spec, terms)
        soft, entropy = jnp.maximum(sums["value"], 0), sums.get("entropy")
        if soft_factor is not None:
            gradient = soft_gradient(spec.kind, hyper.beta, p, q, q_gap, sums.get("mean"))
            gradient = gradient * (soft_factor / hyper.temperature)[:, None]
    if spec.hard:
        log_r, r = (log_q, q) if spec.unit_temperature else log_softmax(spec, z, None)
        hot = columns.ids[None] == labels[:, None]
        hard = -total(spec, jnp.where(hot, log_r, 0))
        if hard_factor is not None:
            own = hard_factor[:, None] * jnp.where(hot, r - 1, r)
            gradient = own if gradient is None else gradient + own
    return Values(soft, hard, entropy), gradient


def chunk_of(
    spec: Spec,
    student: Side,
    teacher: Side,
    hyper: Hyper,
    tokens: Tokens,
    coefficients: Coefficients | None,
    axes: tuple[str, ...],
) -> tuple[Values, tuple[jax.Array, jax.Array, Any] | None]:
    """Values of a chunk and, given coefficients [C] of both parts, the student's cotangents.

    Two arrays of logits are made. Arithmetic between the matrix products takes an eighth of their
    rows at a time, and writes the derivative over the student's logits.
    """
    columns = columns_of(spec)
    z = logits(spec, student, spec.student_dim)
    z_t = None if spec.kind is None else logits(spec, teacher, spec.teacher_dim)
    size, padding = z.shape[0], z.shape[1] - spec.columns
    # Sums over a sharded vocabulary wait for other devices, and then not eight times.
    number = math.gcd(size, 8) if spec.axis is None else 1
    blocks = Chunks(size, size // number, number, None)
    z = blocks.laid_out(z)
    laid = jax.tree.map(blocks.laid_out, (z_t, tokens.labels, coefficients))
    in_place = spec.student_dtype == spec.acc

    def one(carry: Any, index: jax.Array) -> Any:
        out, bias = carry
        own = blocks.read(out if in_place and out is not None else z, index)
        other, labels, factors = jax.tree.map(lambda x: blocks.read(x, index), laid)
        own = shown(columns, own)
        other = None if other is None else shown(columns, other)
        values, gradient = rows_of(spec, hyper, columns, own, other, labels, factors)
        if gradient is None:
            return carry, values
        gradient = through_logits(student, gradient, own, columns)
        gradient = jnp.pad(gradient, ((0, 0), (0, padding))) if padding else gradient
        bias = None if bias is None else bias + jnp.sum(gradient, axis=0)
        gradient = marked(gradient.astype(out.dtype), axes)
        return (blocks.write(out, gradient, index), bias), values

    out = bias = None
    if coefficients is not None:
        out = marked(z if in_place else jnp.zeros(z.shape, spec.student_dtype), axes)
        if student.bias is not None:
            bias = marked(jnp.zeros(student.bias.shape, spec.acc), axes)
    (out, bias), values = jax.lax.scan(one, (out, bias), jnp.arange(number))
    values = jax.tree.map(blocks.joined, values)
    if out is None:
        return values, None
    return values, (*products(spec, student, blocks.restored(out)), bias)


def marked(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The array, its type saying that it varies over all of ``axes``."""
    for axis in axes:
        x = _mesh_axis.vary(x, axis)
    return x
