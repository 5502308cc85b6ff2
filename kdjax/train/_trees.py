"""What a checkpoint records about a state: its tree, whether it is finite, and a checksum."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax._pairs import State, Tree


def by_path(tree: Tree) -> dict[str, Any]:
    """Every leaf under its path, such as ``params/student/dense/kernel``."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def summary(tree: Tree) -> dict[str, str]:
    """Path to ``dtype[shape]`` for every leaf."""
    return {path: f"{x.dtype}[{','.join(map(str, x.shape))}]" for path, x in by_path(tree).items()}


def first_difference(recorded: Mapping[str, str], given: Mapping[str, str]) -> str | None:
    """A clause about the first leaf in which two summaries differ, or None."""
    for path, kind in given.items():
        if path not in recorded:
            return f"the checkpoint has no {path}, which is {kind} here"
        if recorded[path] != kind:
            return f"{path} is {recorded[path]} in the checkpoint and {kind} here"
    for path, kind in recorded.items():
        if path not in given:
            return f"the checkpoint has {path} ({kind}), which is missing here"
    return None


def abstract(state: Tree, shardings: Tree | None = None) -> Tree:
    """Shapes, dtypes and shardings; leaves without a sharding go to the default device."""

    def one(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    if shardings is None:
        shardings = jax.tree.map(
            lambda x: getattr(x, "sharding", None) or _default_sharding(), state
        )
    return jax.tree.map(one, state, shardings)


def _default_sharding() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def copy(state: State) -> State:
    """Fresh buffers, so that donating them leaves the caller's arrays alive."""
    return jax.tree.map(lambda x: jnp.copy(jnp.asarray(x)), state)


def filled(tree: Tree) -> Tree:
    """The tree with a scalar for each array without elements, which orbax can't write."""

    def one(x: Any) -> Any:
        if x.size:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((), jnp.float32, sharding=_default_sharding())
        return jnp.zeros((), jnp.float32)

    return jax.tree.map(one, tree)


def emptied(tree: Tree, like: Tree) -> Tree:
    """Undoes `filled`."""
    return jax.tree.map(lambda x, y: x if y.size else jnp.zeros(y.shape, y.dtype), tree, like)


def non_finite(params: Tree) -> str | None:
    """The path of the first leaf that holds NaN or infinity, or None."""
    leaves = {
        path: x for path, x in by_path(params).items() if jnp.issubdtype(x.dtype, jnp.inexact)
    }
    found = jax.device_get([_examined(x) for x in leaves.values()])
    return next((path for path, (_, bad) in zip(leaves, found, strict=True) if bad), None)


def checksums(state: State) -> dict[str, int]:
    """A checksum for every leaf, computed where the leaf is.

    Integer sums modulo 2^32 have one value under every order and sharding. Orbax checks what
    describes the arrays but not their bytes: a flipped bit would come back as another number.
    """
    leaves = by_path(state)
    found = jax.device_get([_examined(x) for x in leaves.values()])
    return {path: int(value) for path, (value, _) in zip(leaves, found, strict=True)}


# One small program for each shape, rather than one that grows with the model.
@jax.jit
def _examined(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The checksum, and whether anything isn't finite."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    bad = jnp.asarray(False)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        bad = ~jnp.isfinite(x).all()
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    words = _words(x)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position * jnp.uint32(size & 0xFFFFFFFF) + along
    mixed = position * jnp.uint32(2654435761)
    odd = (mixed ^ (mixed >> jnp.uint32(15))) | jnp.uint32(1)
    return jnp.sum(words * odd, dtype=jnp.uint32), bad


def _words(x: jax.Array) -> jax.Array:
    """The bits of ``x`` as uint32."""
    if x.dtype == jnp.bool_ or jnp.dtype(x.dtype).name in ("int4", "uint4", "int2", "uint2"):
        return x.astype(jnp.int32).astype(jnp.uint32)
    width = np.dtype(x.dtype).itemsize
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(width, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)


@functools.cache
def versions() -> dict[str, str]:
    """The versions that wrote a checkpoint."""
    import kdjax

    return {"kdjax": kdjax.__version__, "jax": jax.__version__}
