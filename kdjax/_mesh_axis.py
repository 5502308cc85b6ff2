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


def axes(*trees: Tree) -> tuple[str, ...]:
    """The named axes over whose devices any leaf differs, where types record it."""
    found: set[str] = set()
    for leaf in jax.tree.leaves(trees):
        kind = jax.typeof(leaf)
        own = getattr(kind, "vma", None)
        found |= set(kind.manual_axis_type.varying if own is None else own)  # jax 0.10's spelling
    return tuple(sorted(found))


def varies(x: Any, axis_name: str) -> bool:
    """Whether the type of ``x`` says that it differs between devices of the axis."""
    return axis_name in axes(x)


def vary(tree: Tree, *axis_names: str) -> Tree:
    """Marks every leaf as varying over all of these axes; values stay."""

    def one(x: jax.Array) -> jax.Array:
        lacking = tuple(name for name in axis_names if not varies(x, name))
        return jax.lax.pcast(x, lacking, to="varying") if lacking else x

    return jax.tree.map(one, tree)


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
