"""Where arrays lie: the mesh, and shardings of batches, states and teachers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import _checks
from kdjax._pairs import Batch, Tree

# Below a megabyte of float32 the collective costs more than the memory is worth.
MIN_SIZE = 2**18


def data_mesh(
    n: int | None = None, *, axis: str = "data", devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with one axis, over which the batch is split.

    Args:
      n: the number of devices, 1 or more; by default all, and all of all processes.
      axis: the name of the axis, which ``minimize(axis_name=...)`` repeats.
      devices: the devices to choose from; by default ``jax.devices()``.

    Returns:
      A `jax.sharding.Mesh` of shape ``(n,)``.

    Raises:
      ValueError: there are fewer than n devices, or n leaves out some of several processes'.

    Example:
      >>> import kdjax as kd
      >>> kd.parallel.data_mesh(1).axis_names
      ('data',)
    """
    found = list(jax.devices() if devices is None else devices)
    n = len(found) if n is None else _checks.count("n", n)
    if n > len(found):
        raise ValueError(
            f"n must be at most {len(found)}, the number of devices there are, got {n}. To try "
            f'it without more hardware, call jax.config.update("jax_num_cpu_devices", {n}) before '
            "anything else of JAX."
        )
    if jax.process_count() > 1 and n < len(found):
        raise ValueError(
            f"n must be None or {len(found)} with {jax.process_count()} processes, which all take "
            f"part, got {n}."
        )
    # Explicit axes, make_mesh's own default, break dropout in Flax Linen.
    return jax.make_mesh((n,), (axis,), axis_types=(AxisType.Auto,), devices=found[:n])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch lies on the mesh: split along axis 0.

    Args:
      mesh: a mesh from `data_mesh`.

    Returns:
      A sharding for every entry of a batch.

    Example:
      >>> import kdjax as kd
      >>> tuple(kd.parallel.batch_sharding(kd.parallel.data_mesh(1)).spec)
      ('data',)
    """
    return NamedSharding(mesh, P(axis_of(mesh)))


def shard_batch(batch: Batch, mesh: Mesh) -> dict[str, Any]:
    """Puts a batch on the mesh, row blocks in order.

    Args:
      batch: dict of arrays ``[B, ...]``, B a multiple of the number of devices. With several
        processes each one passes its own rows, as many as every other, and B is their sum.
      mesh: a mesh from `data_mesh`.

    Returns:
      The same entries as sharded arrays ``[B, ...]``; entries that are so already are kept.

    Raises:
      ValueError: the rows can't be split evenly. `pad_batch` makes any batch fit.

    Example:
      >>> import kdjax as kd, numpy as np
      >>> mesh = kd.parallel.data_mesh(1)
      >>> kd.parallel.shard_batch({"x": np.ones((4, 2))}, mesh)["x"].shape
      (4, 2)
    """
    sharding = batch_sharding(mesh)
    local = sum(d.process_index == jax.process_index() for d in mesh.devices.flat)

    def put(path: Any, x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        whole = sharding.is_fully_addressable or not _is_local(x)
        parts = mesh.size if whole else local
        if x.ndim == 0 or x.shape[0] % parts:
            rows = "no axis of examples" if x.ndim == 0 else f"{x.shape[0]} rows"
            name = "batch" + jax.tree_util.keystr(path)
            raise ValueError(
                f"{name} must have a multiple of {parts} rows for {parts} devices"
                f"{'' if whole else ' of this process'}, got {rows}; "
                "kdjax.parallel.pad_batch adds rows of weight 0."
            )
        if whole:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree_util.tree_map_with_path(put, dict(batch))


def pad_batch(batch: Batch, size: int) -> dict[str, np.ndarray]:
    """Extends a batch on the host to ``size`` rows that don't count.

    The last batch of a data set is often short, and on several hosts by different numbers; with
    equal shapes nothing recompiles and no process waits for another. The new rows repeat the last
    one (so that no value is out of range) and have ``weight`` 0, which takes them out of the mean
    of every per-example term and of the metrics. Terms that couple the examples of a batch, and
    batch statistics, do see them.

    Args:
      batch: dict of arrays ``[B, ...]``, B from 0 to ``size``; zeros are added to none.
      size: the number of rows to return.

    Returns:
      NumPy arrays ``[size, ...]`` and ``weight`` ``[size]``, float32, 1 for the rows given unless
      the batch brought its own.

    Raises:
      ValueError: there are more than ``size`` rows, or entries of different lengths.

    Example:
      >>> import kdjax as kd, numpy as np
      >>> kd.parallel.pad_batch({"label": np.array([3, 1])}, 4)
      {'label': array([3, 1, 1, 1]), 'weight': array([1., 1., 0., 0.], dtype=float32)}
    """
    _checks.count("size", size)
    rows = {name: np.asarray(x) for name, x in batch.items()}
    lengths = {name: len(x) if x.ndim else None for name, x in rows.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise ValueError(f"batch must hold arrays with equally many rows, got {lengths}.")
    (length,) = set(lengths.values())
    assert length is not None
    if length > size:
        raise ValueError(f"size must be at least {length}, the rows of the batch, got {size}.")
    missing = size - length

    def pad(x: np.ndarray) -> np.ndarray:
        if not length:
            return np.zeros((size, *x.shape[1:]), x.dtype)
        return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])

    weight = rows.pop("weight", np.ones(length, np.float32))
    tail = np.zeros((missing, *weight.shape[1:]), weight.dtype)
    return {**{name: pad(x) for name, x in rows.items()}, "weight": np.concatenate([weight, tail])}


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Puts a copy of every array on every device of the mesh.

    Args:
      tree: arrays, typed keys included; a teacher's variables or a State. With several processes
        all must pass the same values.
      mesh: a mesh from `data_mesh`.

    Returns:
      The tree as new, replicated arrays; leaves that are replicated already are kept.

    Raises:
      ValueError: the processes passed different values.

    Example:
      >>> import jax, kdjax as kd, jax.numpy as jnp
      >>> tree = kd.parallel.replicate({"w": jnp.ones(3)}, kd.parallel.data_mesh(1))
      >>> tree["w"].sharding.is_fully_replicated
      True
    """
    axis_of(mesh)
    return place(tree, NamedSharding(mesh, P()))


def state_sharding(
    state: Tree, mesh: Mesh, *, fsdp: bool = False, min_size: int = MIN_SIZE
) -> Tree:
    """How a State, or a teacher's variables, lie on the mesh.

    Args:
      state: a State or any tree of arrays, also abstract (``jax.eval_shape(learner.init, ...)``).
      mesh: a mesh from `data_mesh`.
      fsdp: False replicates everything. True splits each array with at least ``min_size``
        elements along its longest axis that the devices divide, so that parameters, optimizer
        state and EMA copies are stored once over all devices (as in ZeRO 3) and gathered by the
        compiler where they are used.
      min_size: elements below which an array is replicated, 1 or more. Keys and scalars always
        are, and so is an array none of whose axes the devices divide.

    Returns:
      A tree of `jax.sharding.NamedSharding` like ``state``: for ``jax.device_put``, to restore a
      checkpoint, or as ``out_shardings`` of a jitted ``init``, which then never needs a device to
      hold the whole State.

    Example:
      >>> import jax, kdjax as kd, jax.numpy as jnp
      >>> mesh = kd.parallel.data_mesh(1)
      >>> abstract = {"w": jax.ShapeDtypeStruct((8, 512), jnp.float32)}
      >>> tuple(kd.parallel.state_sharding(abstract, mesh, fsdp=True, min_size=1)["w"].spec)
      (None, 'data')

    Reference:
      Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
      SC 2020, section 5.
    """
    axis = axis_of(mesh)
    _checks.count("min_size", min_size)

    def one(x: Any) -> NamedSharding:
        shape = np.shape(x)
        fits = [i for i, length in enumerate(shape) if length and length % mesh.size == 0]
        if not fsdp or _is_key(x) or not fits or math.prod(shape) < min_size:
            return NamedSharding(mesh, P())
        longest = max(fits, key=lambda i: shape[i])
        return NamedSharding(mesh, P(*(None,) * longest, axis))

    return jax.tree.map(one, state)


def axis_of(mesh: Mesh) -> str:
    if not isinstance(mesh, Mesh):
        raise TypeError(
            "mesh must be a jax.sharding.Mesh such as kdjax.parallel.data_mesh(), "
            f"got {_checks.describe(mesh)}."
        )
    if len(mesh.axis_names) != 1 or mesh.axis_types != (AxisType.Auto,):
        raise ValueError(
            "mesh must have one axis of type Auto, as kdjax.parallel.data_mesh makes it, "
            f"got axes {mesh.axis_names} of types {mesh.axis_types}."
        )
    return mesh.axis_names[0]


def place(tree: Tree, shardings: Tree) -> Tree:
    """New arrays with these shardings, one for each or one for all; leaves that fit are kept."""
    leaves, form = jax.tree.flatten(tree)
    if isinstance(shardings, NamedSharding):
        wanted = [shardings] * len(leaves)
    else:
        wanted = jax.tree.leaves(shardings)
    kept = [
        isinstance(x, jax.Array) and x.sharding == sharding
        for x, sharding in zip(leaves, wanted, strict=True)
    ]
    if all(kept):
        return tree
    hosts = {}
    for i, x in enumerate(leaves):
        if not kept[i] and not wanted[i].is_fully_addressable and _is_local(x):
            hosts[i] = np.asarray(jax.random.key_data(x) if _is_key(x) else x)
    if hosts:
        _check_equal(hosts)
    placed = [
        x if kept[i] else _globalize(x, hosts[i], wanted[i]) if i in hosts else _put(x, wanted[i])
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(form, placed)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    # device_put shares the buffer that is in place already, also with may_alias=False, and
    # donating the result would then delete the caller's array.
    return jax.device_put(x.copy() if isinstance(x, jax.Array) else x, sharding)


def _globalize(x: Any, host: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array from the value that every process has."""
    if _is_key(x):
        sharding = NamedSharding(sharding.mesh, P())
    made = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    return jax.random.wrap_key_data(made, impl=jax.random.key_impl(x)) if _is_key(x) else made


def _check_equal(hosts: Mapping[int, np.ndarray]) -> None:
    """Refuses values that differ between processes: they would train apart without a sign."""
    checksum = 0
    for x in hosts.values():
        checksum = zlib.crc32(np.ascontiguousarray(x).view(np.uint8).data, checksum)
    found = multihost_utils.process_allgather(np.asarray([len(hosts), checksum], np.uint32))
    for process, theirs in enumerate(found):
        if not np.array_equal(theirs, found[0]):
            raise ValueError(
                "the arrays to replicate must be equal in all processes, but those of process "
                f"{process} differ from those of process 0: use the same key and checkpoint."
            )


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.prng_key)


def _is_local(x: Any) -> bool:
    return not isinstance(x, jax.Array) or x.is_fully_addressable
