"""Collectives over a named axis, right under shard_map with or without its type check, and pmap.

With ``check_vma=True`` types record which values vary over the axis, and gradients of replicated
parameters arrive summed. With ``check_vma=False`` and under pmap nothing is recorded, and the
gradient of a summed loss is the device's own share times the number of devices.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def tracks(axis_name: str) -> bool:
    """Whether types record what varies over the axis."""
    return varies(jax.lax.axis_index(axis_name), axis_name)


def varies(x: Any, axis_name: str) -> bool:
    """Whether the type of ``x`` says that it differs between devices of the axis."""
    kind = jax.typeof(x)
    axes = getattr(kind, "vma", None)
    if axes is None:  # jax 0.10 spells it so
        axes = kind.manual_axis_type.varying
    return axis_name in axes


def vary(tree: Tree, axis_name: str) -> Tree:
    """Marks every leaf as varying; values stay."""
    return jax.tree.map(
        lambda x: x if varies(x, axis_name) else jax.lax.pcast(x, axis_name, to="varying"),
        tree,
    )


def agree(tree: Tree, axis_name: str) -> Tree:
    """One value for all devices: floats are averaged, everything else is equal already."""

    def one(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jax.lax.pmean(x, axis_name)
        if not varies(x, axis_name):
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jax.lax.pmax(jax.random.key_data(x), axis_name)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        if x.dtype == jnp.bool_:
            return jax.lax.pmax(x.astype(jnp.int32), axis_name).astype(jnp.bool_)
        return jax.lax.pmax(x, axis_name)

    return jax.tree.map(one, tree)
