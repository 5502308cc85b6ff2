"""Divergences between softmax distributions, by the fewest passes over the logits.

They take logits [..., C] that are already floating point, and are differentiable in both. With
logits shifted to a maximum of 0 they stay exact for logits of any size. Classes that are -inf on
both sides add nothing, to the value or to the gradient; a row needs at least one other class.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def kl_parts(
    p_logits: jax.Array, q_logits: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """KL(p || q) of softmax(. / T) over the last axis, and the log-sum-exp of both sides.

    With p and q the shifted and tempered logits and S the sums of their exponentials,

        KL = sum(e^p (p - q)) / S_p + log S_q - log S_p

    takes one exponential per logit, and neither softmax nor log-softmax goes through memory.
    """
    p, p_max = _shift(p_logits, temperature)
    q, q_max = _shift(q_logits, temperature)
    weights = jnp.exp(p)
    p_sum, q_sum = jnp.sum(weights, axis=-1), jnp.sum(jnp.exp(q), axis=-1)
    gap = jnp.sum(weights * jnp.where(weights > 0, p - q, 0), axis=-1) / p_sum
    log_p_sum, log_q_sum = jnp.log(p_sum), jnp.log(q_sum)
    divergence = gap + log_q_sum - log_p_sum
    return divergence, log_p_sum + p_max / temperature, log_q_sum + q_max / temperature


def cross_entropy(p_logits: jax.Array, q_logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """-sum_c p_c log q_c of softmax(. / T) over the last axis, by the sums of ``kl_parts``."""
    p, _ = _shift(p_logits, temperature)
    q, _ = _shift(q_logits, temperature)
    weights = jnp.exp(p)
    expected = jnp.sum(weights * jnp.where(weights > 0, q, 0), axis=-1)
    return jnp.log(jnp.sum(jnp.exp(q), axis=-1)) - expected / jnp.sum(weights, axis=-1)


def jensen_shannon(
    p_logits: jax.Array, q_logits: jax.Array, temperature: jax.Array, beta: jax.Array
) -> jax.Array:
    """w KL(p || m) + (1 - w) KL(q || m), m = beta p + (1 - beta) q; w = beta but at the ends."""
    log_p = jax.nn.log_softmax(p_logits / temperature)
    log_q = jax.nn.log_softmax(q_logits / temperature)
    # The derivative of logaddexp is NaN where both of its arguments are -inf.
    excluded = jnp.maximum(log_p, log_q) == -jnp.inf
    log_m = jnp.logaddexp(
        jnp.where(excluded, 0, log_p) + jnp.log(beta),
        jnp.where(excluded, 0, log_q) + jnp.log1p(-beta),
    )
    # At an end one of the two terms is 0 for every student; the other one then counts in full.
    weight = jnp.where(beta == 0, 1, jnp.where(beta == 1, 0, beta))
    return weight * _expected_gap(log_p, log_m) + (1 - weight) * _expected_gap(log_q, log_m)


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


def _expected_gap(log_p: jax.Array, log_m: jax.Array) -> jax.Array:
    """sum_c p_c (log p_c - log m_c), where a class of probability 0 adds 0."""
    p = jnp.exp(log_p)
    return jnp.sum(p * jnp.where(p > 0, log_p - log_m, 0), axis=-1)
