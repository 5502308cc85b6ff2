"""The second level of the fused loss: a chunk of tokens against the vocabulary, a tile at a time.

No array has a whole row of logits. KL and reverse KL take one pass for their value, with a running
maximum; others take a second one, which knows the log-sum-exps. The derivative recomputes logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax.lm._fused_rows import (
    Columns,
    Hyper,
    Side,
    Spec,
    Tokens,
    Values,
    columns_of,
    gaps,
    logits,
    marked,
    products,
    shown,
    soft_gradient,
    through_logits,
    value_terms,
)


class Running(NamedTuple):
    """Sums over the tiles so far of e^((z - highest) / T) and what it weighs, each [C].

    Attributes:
        highest: the largest logit.
        mass: the sum of the weights.
        raw: the sum at temperature 1.
        expected: the weighted sum of z / T.
        gap: the weighted sum of (z - z_other) / T.
    """

    highest: jax.Array
    mass: jax.Array
    raw: jax.Array
    expected: jax.Array
    gap: jax.Array

    def add(self, z: jax.Array, other: jax.Array | None, temperature: jax.Array) -> Running:
        """With a tile of logits [C, v] more."""
        highest = jnp.maximum(self.highest, jnp.max(z, axis=1))
        kept = self.moved(highest, temperature)
        z_shifted = z - highest[:, None]
        weights = jnp.exp(z_shifted / temperature)
        there = weights > 0

        def weighted(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(there, weights * x, 0), axis=1) / temperature

        return Running(
            highest,
            kept.mass + jnp.sum(weights, axis=1),
            kept.raw + jnp.sum(jnp.exp(z_shifted), axis=1),
            kept.expected + weighted(z),
            kept.gap if other is None else kept.gap + weighted(z - other),
        )

    def moved(self, highest: jax.Array, temperature: jax.Array) -> Running:
        """The same sums relative to a maximum at least as large."""
        fall = self.highest - highest
        factor = jnp.exp(fall / temperature)
        return Running(
            highest,
            self.mass * factor,
            self.raw * jnp.exp(fall),
            self.expected * factor,
            self.gap * factor,
        )

    def over(self, axis: str | None, temperature: jax.Array) -> Running:
        """Of the whole vocabulary, where it is sharded."""
        if axis is None:
            return self
        moved = self.moved(jax.lax.pmax(self.highest, axis), temperature)
        return Running(moved.highest, *(jax.lax.psum(x, axis) for x in moved[1:]))

    def log_mass(self, temperature: jax.Array) -> jax.Array:
        """log of the sum of e^(z / T)."""
        return self.highest / temperature + jnp.log(self.mass)

    def log_softmax(self, z: jax.Array, temperature: jax.Array) -> jax.Array:
        """log softmax(z / T) of a tile."""
        return (z - self.highest[:, None]) / temperature - jnp.log(self.mass)[:, None]

    def log_softmax_raw(self, z: jax.Array) -> jax.Array:
        """log softmax(z) of a tile."""
        return (z - self.highest[:, None]) - jnp.log(self.raw)[:, None]


class Tile(NamedTuple):
    """One tile: where it starts, its columns, both heads cut to it, both logits."""

    start: jax.Array
    columns: Columns
    student: Side
    z: jax.Array
    z_t: Any


def tile_of(spec: Spec, student: Side, teacher: Side, columns: Columns, index: jax.Array) -> Tile:
    """Tile number ``index``; the last one reaches back, over columns that are then not its own."""
    tile = spec.tile or spec.columns
    start = jnp.minimum(index * tile, spec.columns - tile)

    def cut(x: jax.Array, dim: int = 0) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, tile, dim)

    def side(whole: Side, dim: int) -> Side:
        bias = None if whole.bias is None else cut(whole.bias)
        return whole._replace(head=cut(whole.head, dim), bias=bias)

    live = start + jnp.arange(tile) >= index * tile
    if columns.live is not None:
        live &= cut(columns.live)
    own = Columns(cut(columns.ids), live)
    short = side(student, spec.student_dim)
    z_t = None
    if spec.kind is not None:
        z_t = shown(own, logits(spec, side(teacher, spec.teacher_dim), spec.teacher_dim))
    return Tile(start, own, short, shown(own, logits(spec, short, spec.student_dim)), z_t)


class Passed(NamedTuple):
    """What the passes over the tiles found [C] each: the statistics of both sides, and sums."""

    student: Running
    teacher: Running | None
    label: Any
    value: Any
    mean: Any


def passes(
    spec: Spec, student: Side, teacher: Side, hyper: Hyper, tokens: Tokens, axes: tuple[str, ...]
) -> Passed:
    """The passes that the values need."""
    assert spec.tile is not None
    columns, steps = columns_of(spec), jnp.arange(-(-spec.columns // spec.tile))
    n = student.hidden.shape[0]
    zeros = marked(jnp.zeros((n,), spec.acc), axes)
    # Finite, so that a tile of padding alone doesn't subtract infinities.
    low = marked(jnp.full((n,), jnp.finfo(spec.acc).min, spec.acc), axes)
    empty = Running(low, zeros, zeros, zeros, zeros)

    def first(carry: Any, index: jax.Array) -> Any:
        own, other, label = carry
        tile = tile_of(spec, student, teacher, columns, index)
        if tile.z_t is not None:
            crossed = tile.z if spec.kind == "kl" else None
            other = other.add(tile.z_t, crossed, hyper.temperature)
        crossed = tile.z_t if spec.kind == "rkl" else None
        own = own.add(tile.z, crossed, hyper.temperature)
        if label is not None:
            hot = tile.columns.ids[None] == tokens.labels[:, None]
            hot &= jnp.ones_like(hot) if tile.columns.live is None else tile.columns.live[None]
            label = label + jnp.sum(jnp.where(hot, tile.z, 0), axis=1)
        return (own, other, label), None

    start = empty, None if spec.kind is None else empty, zeros if spec.hard else None
    (own, other, label), _ = jax.lax.scan(first, start, steps)
    own = own.over(spec.axis, hyper.temperature)
    other = None if other is None else other.over(spec.axis, hyper.temperature)
    if label is not None and spec.axis is not None:
        label = jax.lax.psum(label, spec.axis)
    if other is None:
        return Passed(own, other, label, None, None)
    apart = other.log_mass(hyper.temperature) - own.log_mass(hyper.temperature)
    if spec.kind == "kl":
        return Passed(own, other, label, other.gap / other.mass - apart, None)
    if spec.kind == "rkl":
        value = own.gap / own.mass + apart
        return Passed(own, other, label, value, value)

    def second(sums: Any, index: jax.Array) -> Any:
        tile = tile_of(spec, student, teacher, columns, index)
        log_q = own.log_softmax(tile.z, hyper.temperature)
        log_p = other.log_softmax(tile.z_t, hyper.temperature)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        p_gap, q_gap = gaps(str(spec.kind), hyper.beta, log_p, log_q)
        terms = value_terms(str(spec.kind), hyper.beta, p, q, p_gap, q_gap), q * q_gap
        return tuple(s + jnp.sum(t, axis=1) for s, t in zip(sums, terms, strict=True)), None

    sums, _ = jax.lax.scan(second, (zeros, zeros), steps)
    value, mean = sums if spec.axis is None else jax.lax.psum(sums, spec.axis)
    return Passed(own, other, label, value, mean)


def tiled_chunk_of(
    spec: Spec,
    student: Side,
    teacher: Side,
    hyper: Hyper,
    tokens: Tokens,
    coefficients: tuple[Any, Any] | None,
    carry: tuple[jax.Array, Any] | None,
    axes: tuple[str, ...],
) -> tuple[Values, tuple[Any, Any]]:
    """As ``chunk_of``, with the cotangents of head and bias added to ``carry``."""
    assert spec.tile is not None
    found = passes(spec, student, teacher, hyper, tokens, axes)
    own, other = found.student, found.teacher
    soft = None if found.value is None else jnp.maximum(found.value, 0)
    hard = own.highest + jnp.log(own.raw) - found.label if spec.hard else None
    entropy = None
    if spec.entropy and other is not None:
        entropy = other.log_mass(hyper.temperature) - other.expected / other.mass
    values = Values(soft, hard, entropy)
    if coefficients is None or carry is None:
        return values, (None, None)
    columns = columns_of(spec)

    def added(whole: jax.Array, part: jax.Array, start: jax.Array, dim: int) -> jax.Array:
        part = part + jax.lax.dynamic_slice_in_dim(whole, start, part.shape[dim], dim)
        return jax.lax.dynamic_update_slice_in_dim(whole, part, start, dim)

    def one(state: Any, index: jax.Array) -> Any:
        hidden, head, bias = state
        tile = tile_of(spec, student, teacher, columns, index)
        gradient = tile_gradient(spec, hyper, tokens, coefficients, found, tile)
        gradient = through_logits(student, gradient, tile.z, tile.columns)
        bias = None if bias is None else added(bias, jnp.sum(gradient, axis=0), tile.start, 0)
        more = products(spec, tile.student, gradient)

        head = added(head, more[1], tile.start, spec.student_dim)
        return (hidden + more[0], head, bias), None

    hidden = marked(jnp.zeros(student.hidden.shape, spec.acc), axes)
    steps = jnp.arange(-(-spec.columns // spec.tile))
    (hidden, head, bias), _ = jax.lax.scan(one, (hidden, *carry), steps)
    return values, (hidden, (head, bias))


def tile_gradient(
    spec: Spec, hyper: Hyper, tokens: Tokens, coefficients: tuple[Any, Any], found: Passed,
    tile: Tile,
) -> jax.Array:  # fmt: skip
    """The derivative by the student's logits [C, v]; 0 in columns that aren't the tile's own."""
    gradient = jnp.zeros_like(tile.z)
    if spec.kind is not None:
        assert found.teacher is not None
        log_q = found.student.log_softmax(tile.z, hyper.temperature)
        log_p = found.teacher.log_softmax(tile.z_t, hyper.temperature)
        _, q_gap = gaps(spec.kind, hyper.beta, log_p, log_q)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        gradient = soft_gradient(spec.kind, hyper.beta, p, q, q_gap, found.mean)
        gradient = gradient * (coefficients[0] / hyper.temperature)[:, None]
    if coefficients[1] is not None:
        r = jnp.exp(found.student.log_softmax_raw(tile.z))
        hot = tile.columns.ids[None] == tokens.labels[:, None]
        gradient += coefficients[1][:, None] * jnp.where(hot, r - 1, r)
    live = tile.columns.live
    return gradient if live is None else jnp.where(live[None], gradient, 0)
