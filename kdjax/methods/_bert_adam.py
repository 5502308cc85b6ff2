"""The optimizer of BERT's published code, which TinyBERT's takes over."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ScaleByBertAdamState(NamedTuple):
    """Averages of gradients and of their squares."""

    mu: Any
    nu: Any


def scale_by_bert_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6
) -> optax.GradientTransformation:
    """Adam without the correction of its averages for their start at 0."""

    def init(params: Any) -> ScaleByBertAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return ScaleByBertAdamState(zeros, jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: Any, state: ScaleByBertAdamState, params: Any = None
    ) -> tuple[Any, ScaleByBertAdamState]:
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        step = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return step, ScaleByBertAdamState(mu, nu)

    return optax.GradientTransformation(init, update)


def clip_each_by_norm(most: float) -> optax.GradientTransformation:
    """Every parameter's gradient on its own gets at most this norm."""

    def one(g: jax.Array) -> jax.Array:
        norm = jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.promote_types(g.dtype, jnp.float32)))))
        # As torch's clip_grad_norm_, of one tensor at a time.
        return g * jnp.minimum(1.0, most / (norm + 1e-6)).astype(g.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(one, updates))


def decayed(params: Any) -> Any:
    """True for matrices: biases and LayerNorms get no weight decay."""

    def one(path: Any, _: Any) -> bool:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        return names[-1] not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(one, params)
