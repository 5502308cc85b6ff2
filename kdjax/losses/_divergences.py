"""Divergences between softmax distributions, by the fewest passes over the logits.

They take logits [..., C] that are already floating point, and are differentiable in both. With
logits shifted to a maximum of 0 they stay exact for logits of any size. Classes that are -inf on
both sides add nothing, to the value or to the gradient; a row needs at least one other class.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


def kl_parts(
    p_logits: jax.Array, q_logits: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """KL(p || q) of softmax(. / T) over the last axis, and the log-sum-exp of both sides."""
    p, p_max = _shift(p_logits, temperature)
    q, q_max = _shift(q_logits, temperature)
    log_p_sum = jnp.log(jnp.sum(jnp.exp(p), axis=-1))
    log_q_sum = jnp.log(jnp.sum(jnp.exp(q), axis=-1))
    return _kl(p, q), log_p_sum + p_max / temperature, log_q_sum + q_max / temperature


@jax.custom_jvp
def _kl(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL(softmax(p) || softmax(q)) over the last axis for logits with maximum 0, never negative.

    With d_c the difference of the log-probabilities of q and p, and S_p the sum of e^p,

        KL = -sum_c p_c d_c = sum_c e^p_c (e^d_c - 1 - d_c) / S_p

    because both sides' probabilities sum to 1. Terms of the second sum are of the size of the
    result, where those of the first cancel: at a high temperature, or for a student close to its
    teacher, that leaves none of its digits in float32.
    """
    weights, q_weights = jnp.exp(p), jnp.exp(q)
    p_sum = jnp.sum(weights, axis=-1)
    ratio = p_sum / jnp.sum(q_weights, axis=-1)
    gap = q - p + jnp.log(ratio)[..., None]
    # A class whose e^p vanishes still adds its e^(p + d), and d can't overflow e^d in the others.
    terms = jnp.where(
        _counts(weights),
        weights * (jnp.expm1(gap) - gap),
        q_weights * ratio[..., None],
    )
    return jnp.maximum(jnp.sum(terms, axis=-1) / p_sum, 0)


def _counts(weights: jax.Array) -> jax.Array:
    """Where e^p is large enough that e^p times any finite d matters; the others are next to 0."""
    limits = jnp.finfo(weights.dtype)
    return weights > float(limits.tiny) / float(limits.eps)


def _kl_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    """softmax(q) - softmax(p) for q: finite and without another exponential."""
    p, q = primals
    weights = jnp.exp(p)
    p_sum = jnp.sum(weights, axis=-1)
    tangent = jnp.zeros_like(p_sum)
    if not isinstance(tangents[0], SymbolicZero):
        gap = jnp.where(_counts(weights), q - p, 0)
        mean = jnp.sum(weights * gap, axis=-1) / p_sum
        deviation = weights * (mean[..., None] - gap)
        tangent += jnp.sum(deviation * tangents[0], axis=-1) / p_sum
    if not isinstance(tangents[1], SymbolicZero):
        q_weights = jnp.exp(q)
        q_mean = jnp.sum(q_weights * tangents[1], axis=-1) / jnp.sum(q_weights, axis=-1)
        tangent += q_mean + jnp.sum(weights * tangents[1], axis=-1) * (-1 / p_sum)
    return _kl(p, q), tangent


_kl.defjvp(_kl_jvp, symbolic_zeros=True)


def cross_entropy(p_logits: jax.Array, q_logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """-sum_c p_c log q_c of softmax(. / T) over the last axis, by the sums of ``kl_parts``."""
    p, _ = _shift(p_logits, temperature)
    q, _ = _shift(q_logits, temperature)
    weights = jnp.exp(p)
    expected = jnp.sum(weights * jnp.where(weights > 0, q, 0), axis=-1)
    return jnp.log(jnp.sum(jnp.exp(q), axis=-1)) - expected / jnp.sum(weights, axis=-1)


def skewed(
    p_logits: jax.Array, q_logits: jax.Array, temperature: jax.Array, share: jax.Array
) -> jax.Array:
    """KL(P || M) over the last axis for M = (1 - share) P + share Q, never negative.

    With e^d = m / p = 1 + share (q / p - 1), and as P and M both sum to 1,

        KL = -sum_c p_c d_c = sum_c p_c (e^d_c - 1 - d_c)

    whose terms are of the size of the result; those of the first sum cancel, and for a student
    close to its teacher leave none of its digits in float32.
    """
    log_p = jax.nn.log_softmax(p_logits / temperature)
    log_q = jax.nn.log_softmax(q_logits / temperature)
    p = jnp.exp(log_p)
    limits = jnp.finfo(p.dtype)
    # Where p vanishes its term is share * q; elsewhere q / p can't overflow.
    counts = p > float(limits.tiny) / float(limits.eps)
    gap = jnp.where(counts, log_q - log_p, 0)
    growth = share * jnp.expm1(gap)
    near = gap > -1
    log_growth = jnp.where(
        near,
        jnp.log1p(jnp.where(near, growth, 0)),
        jnp.logaddexp(jnp.log1p(-share), jnp.log(share) + jnp.where(near, 0, gap)),
    )
    terms = jnp.where(counts, p * (growth - log_growth), share * jnp.exp(log_q))
    return jnp.sum(terms, axis=-1)


def jensen_shannon(
    p_logits: jax.Array, q_logits: jax.Array, temperature: jax.Array, beta: jax.Array
) -> jax.Array:
    """w KL(p || m) + (1 - w) KL(q || m), m = beta p + (1 - beta) q; w = beta but at the ends."""
    # At an end one of the two terms is 0 for every student; the other one then counts in full.
    weight = jnp.where(beta == 0, 1, jnp.where(beta == 1, 0, beta))
    from_p = skewed(p_logits, q_logits, temperature, 1 - beta)
    from_q = skewed(q_logits, p_logits, temperature, beta)
    return weight * from_p + (1 - weight) * from_q


def log_loss(logits: jax.Array, weights: jax.Array, mass: jax.Array | float) -> jax.Array:
    """-sum_c w_c log softmax(z)_c for weights that sum to ``mass``; a class of weight 0 adds 0."""
    z, _ = _shift(logits)
    expected = jnp.sum(jnp.where(weights > 0, weights * z, 0), axis=-1)
    return mass * jnp.log(jnp.sum(jnp.exp(z), axis=-1)) - expected


def label_log_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(z)_label; any value for labels that are no class index."""
    z, maximum = _shift(logits)
    at_label = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="clip")[..., 0]
    return jnp.log(jnp.sum(jnp.exp(z), axis=-1)) - (at_label - maximum)


def _shift(logits: jax.Array, temperature: jax.Array | float = 1) -> tuple[jax.Array, jax.Array]:
    """Tempered logits with maximum 0 over the classes, and the maximum before tempering."""
    maximum = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    return (logits - maximum[..., None]) / temperature, maximum
