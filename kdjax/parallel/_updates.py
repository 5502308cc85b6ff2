"""One update in three parallel forms."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import _checks, _mesh_axis
from kdjax._pairs import Batch, State, Tree
from kdjax.core import Learner
from kdjax.parallel._placement import (
    MIN_SIZE,
    axis_of,
    batch_sharding,
    data_mesh,
    place,
    replicate,
    shard_batch,
    state_sharding,
)

Update = Callable[..., tuple[State, dict[str, jax.Array]]]


def jit_update(
    learner: Learner,
    mesh: Mesh,
    *,
    fsdp: bool = False,
    min_size: int = MIN_SIZE,
    donate: bool = True,
) -> Update:
    """The update compiled over a mesh by ``jax.jit``: the same numbers as on one device.

    Args:
      learner: made without ``axis_name``.
      mesh: a mesh from `data_mesh`.
      fsdp: whether large arrays of the State are split over the devices; see `state_sharding`.
      min_size: as in `state_sharding`.
      donate: whether the State passed in is used up, so that only one is in memory. A State that
        isn't on the mesh yet is copied there first, and stays yours.

    Returns:
      ``update(state, batch, frozen=None) -> (state, metrics)``. The State keeps its sharding and
      metrics are replicated. The batch may come from the host (see `shard_batch`). ``frozen`` is
      replicated once, as long as the same arrays are passed; arrays that lie on the mesh already,
      such as a large teacher placed by `state_sharding`, stay as they are.

    Raises:
      ValueError: the learner has an ``axis_name``, or the batch can't be split evenly.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kdjax as kd
      >>> linear = kd.from_fn(
      ...     lambda key, x: jax.random.normal(key, (x.shape[-1], 3)),
      ...     lambda params, x: x @ params,
      ...     inputs="x",
      ... )
      >>> method = kd.distill(linear, None, {"hard": (1.0, kd.terms.hard_labels())})
      >>> learner = kd.minimize(method, optax.sgd(0.1))
      >>> batch = {"x": jnp.ones((4, 2)), "label": jnp.arange(4) % 3}
      >>> update = kd.parallel.jit_update(learner, kd.parallel.data_mesh(1))
      >>> state, metrics = update(learner.init(jax.random.key(0), batch), batch)
      >>> int(state.step)
      1
    """
    rows, copies = batch_sharding(mesh), NamedSharding(mesh, P())

    def update(state: State, batch: Batch, frozen: Tree) -> Any:
        try:
            return learner.update(state, batch, frozen)
        except NameError as error:
            _unbound(error, "made without axis_name for jit_update")
            raise

    def compiled(shardings: Any) -> Callable[..., Any]:
        return jax.jit(
            update,
            in_shardings=(shardings, rows, None),
            out_shardings=(shardings, copies),
            donate_argnums=(0,) if donate else (),
        )

    if not fsdp:
        program = compiled(copies)
        return _on_mesh(mesh, lambda state: (program, copies))
    programs: dict[Any, Any] = {}

    def program_for(state: State) -> Any:
        leaves, tree = jax.tree.flatten(state)
        kind = (tree, tuple(np.shape(x) for x in leaves))
        if kind not in programs:
            shardings = state_sharding(state, mesh, fsdp=True, min_size=min_size)
            programs[kind] = compiled(shardings), shardings
        return programs[kind]

    return _on_mesh(mesh, program_for)


def shard_map_update(
    learner: Learner, mesh: Mesh, *, check_vma: bool = True, donate: bool = True
) -> Update:
    """The update under ``jax.shard_map``: each device runs it on its own rows.

    Batch normalisation and dropout differ from one device's: statistics are those of each device's
    rows, and each device draws its own masks. Everything else is the same.

    Args:
      learner: made with ``kdjax.minimize(..., axis_name="data")``, the axis of the mesh.
      mesh: a mesh from `data_mesh`.
      check_vma: whether types record what varies between devices, as in `jax.shard_map`.
      donate: as in `jit_update`.

    Returns:
      ``update(state, batch, frozen=None) -> (state, metrics)`` as from `jit_update`, with the
      State replicated.

    Raises:
      ValueError: the learner has no ``axis_name``, so that each device would train on its own rows
        alone; it has another; or the batch can't be split evenly.

    Example:
      >>> import kdjax as kd
      >>> def make_update(method, optimizer):
      ...     learner = kd.minimize(method, optimizer, axis_name="data")
      ...     return kd.parallel.shard_map_update(learner, kd.parallel.data_mesh())
    """
    axis, copies = axis_of(mesh), NamedSharding(mesh, P())
    mapped = jax.shard_map(
        _on_shard(learner, axis),
        mesh=mesh,
        in_specs=(P(), P(axis), P()),
        out_specs=(P(), P()),
        check_vma=check_vma,
    )
    program = jax.jit(
        mapped,
        in_shardings=(copies, batch_sharding(mesh), None),
        out_shardings=(copies, copies),
        donate_argnums=(0,) if donate else (),
    )
    return _on_mesh(mesh, lambda state: (program, copies))


def pmap_update(
    learner: Learner,
    *,
    axis: str = "data",
    devices: Sequence[Any] | None = None,
    donate: bool = True,
) -> Update:
    """The update under ``jax.pmap``, for code that still uses it: as `shard_map_update` does.

    JAX keeps pmap in maintenance only, and it fails inside ``jax.set_mesh``.

    Args:
      learner: made with ``kdjax.minimize(..., axis_name="data")``.
      axis: the name of the axis.
      devices: the devices; by default all.
      donate: as in `jit_update`.

    Returns:
      ``update(state, batch, frozen=None) -> (state, metrics)`` as from `shard_map_update`: the
      batch is ``[B, ...]`` and the State has no axis of devices.

    Raises:
      ValueError: as `shard_map_update`, and with several processes.

    Example: see `shard_map_update`.
    """
    if jax.process_count() > 1:
        raise ValueError(
            "pmap_update must run in one process, got "
            f"{jax.process_count()}; use jit_update or shard_map_update."
        )
    mesh = data_mesh(axis=axis, devices=devices)
    copies = NamedSharding(mesh, P())
    on_shard = _on_shard(learner, axis)
    # JAX 0.10 to 0.12 read the number of devices from the first argument, mapped or not.
    mapped = jax.pmap(
        lambda batch, state, frozen: on_shard(state, batch, frozen),
        axis_name=axis,
        in_axes=(0, None, None),
        out_axes=None,
        devices=list(mesh.devices.flat),
        donate_argnums=(1,) if donate else (),
    )

    def program(state: State, batch: Batch, frozen: Tree) -> Any:
        split = jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch)
        return mapped(split, state, frozen)

    return _on_mesh(mesh, lambda state: (program, copies))


def _on_mesh(mesh: Mesh, program_for: Callable[[State], tuple[Callable[..., Any], Tree]]) -> Update:
    """An update that puts what it gets where its program wants it, and then runs that."""
    put_frozen = _once(mesh)

    def update(
        state: State, batch: Batch, frozen: Tree = None
    ) -> tuple[State, dict[str, jax.Array]]:
        if not isinstance(state, State):
            raise TypeError(
                "state must be the kdjax.State that learner.init or update returned, "
                f"got {_checks.describe(state)}."
            )
        program, shardings = program_for(state)
        if not any(map(_checks.is_traced, jax.tree.leaves((state, batch)))):
            state, batch = place(state, shardings), shard_batch(batch, mesh)
            frozen = put_frozen(frozen)
        return program(state, batch, frozen)

    return update


def _once(mesh: Mesh) -> Callable[[Tree], Tree]:
    """Replicates a tree, and returns the same arrays again as long as it gets the same ones."""
    seen: list[Any] = []
    kept: list[Any] = []
    devices = set(mesh.devices.flat)

    def put(tree: Tree) -> Tree:
        leaves, form = jax.tree.flatten(tree)
        if len(leaves) != len(seen) or any(map(operator.is_not, leaves, seen)):
            there = [isinstance(x, jax.Array) and x.sharding.device_set == devices for x in leaves]
            away = replicate([x for x, ok in zip(leaves, there, strict=True) if not ok], mesh)
            moved = iter(away)
            kept[:] = [x if ok else next(moved) for x, ok in zip(leaves, there, strict=True)]
            seen[:] = leaves
        return jax.tree.unflatten(form, kept)

    return put


def _on_shard(learner: Learner, axis: str) -> Callable[..., Any]:
    """The update on one device's rows, refused where it doesn't exchange anything by name."""
    needed = f"made with kdjax.minimize(..., axis_name={axis!r})"

    def update(state: State, batch: Batch, frozen: Tree) -> Any:
        # Traced once, and looked at, before it is called.
        run = jax.jit(learner.update)
        try:
            jaxpr = run.trace(state, batch, frozen).jaxpr
        except NameError as error:
            _unbound(error, needed)
            raise
        out = run(state, batch, frozen)
        if _mesh_axis.tracks(axis):
            differs = any(_mesh_axis.varies(x, axis) for x in jax.tree.leaves(out))
        else:
            differs = not _reduces_over(jaxpr, axis)
        if differs:
            raise ValueError(
                f"learner must be {needed}, got one that doesn't reduce over {axis!r}: each device "
                "would train on its own rows."
            )
        return out

    return update


def _unbound(error: NameError, needed: str) -> None:
    if "unbound axis name" in str(error):
        name = str(error).partition(":")[2].strip().partition(".")[0]
        raise ValueError(f"learner must be {needed}, got axis_name={name!r}.") from error


def _reduces_over(jaxpr: Any, axis: str) -> bool:
    """Whether any collective of a program is over the axis."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        names = eqn.params.get("axes", eqn.params.get("axis_name", ()))
        if axis in (names if isinstance(names, (tuple, list)) else (names,)):
            return True
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns") and _reduces_over(inner, axis):
                    return True
    return False
