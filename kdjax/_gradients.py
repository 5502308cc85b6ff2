"""The gradient of a Method over the whole batch, at once or in exact slices."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import _mesh_axis
from kdjax._pairs import Batch, Method, Part, State, Tree, ratio


class Gradient(NamedTuple):
    """What one update needs to know: all global, except ``extra`` under a named axis.

    ``params`` are those that the optimizer is shown (for weight decay), where they are not the
    State's.
    """

    grads: Tree
    loss: jax.Array
    extra: Tree
    metrics: dict[str, jax.Array]
    batch: Batch
    params: Tree | None = None


def reduce(
    parts: dict[str, Part], tracked: dict[str, Part], axis_name: str | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss and the metrics from their parts."""
    values = {name: part.mean(axis_name) for name, part in parts.items()}
    loss = weighted_sum({name: part.weight for name, part in parts.items()}, values)
    metrics = {f"loss/{name}": value for name, value in values.items()}
    # A metric of no rows is unknown, not 0.
    metrics |= {name: part.mean(axis_name, empty=jnp.nan) for name, part in tracked.items()}
    return loss, {"loss": loss, **metrics}


def weighted_sum(weights: dict[str, Any], values: dict[str, Any]) -> jax.Array:
    """``sum_k weights[k] * values[k]`` as at least float32."""
    total = sum(weights[name] * values[name] for name in values)
    return jnp.asarray(total, jnp.promote_types(jnp.result_type(total), jnp.float32))


def whole(
    method: Method, state: State, batch: Batch, frozen: Tree, key: jax.Array, axis_name: str | None
) -> Gradient:
    """The gradient of the loss of the whole batch in one pass."""
    keywords = {"step": state.step, "axis_name": axis_name}
    prepare_key, loss_key = jax.random.split(key)
    batch = _prepare(method, state.params, state.extra, batch, frozen, prepare_key, keywords)
    return at(method, state.params, state.extra, batch, frozen, loss_key, keywords)


def at(
    method: Method,
    params: Tree,
    extra: Tree,
    batch: Batch,
    frozen: Tree,
    key: jax.Array,
    keywords: dict[str, Any],
) -> Gradient:
    """The gradient of the loss of a prepared batch at any parameters."""
    axis_name = keywords["axis_name"]
    (loss, (extra, metrics)), grads = jax.value_and_grad(method.loss, has_aux=True)(
        params, extra, batch, frozen, key=key, **keywords
    )
    if axis_name is not None and not _mesh_axis.tracks(axis_name):
        # Here psum transposes to psum, and each device holds N times its own share.
        grads = jax.lax.pmean(grads, axis_name)
    return Gradient(grads, loss, extra, {"loss": loss, **metrics}, batch)


def sliced(
    method: Method,
    state: State,
    batch: Batch,
    frozen: Tree,
    key: jax.Array,
    axis_name: str | None,
    *,
    slices: int,
    unroll: bool,
) -> Gradient:
    """The same gradient from slices of the batch: first all counts, then sums over them.

    Each slice is divided by the count of the whole batch, so that masks and unlabelled rows that
    fall unevenly over the slices change nothing. ``prepare`` runs on the whole batch, as its draws
    may belong to the batch.
    """
    prepare_key, loss_key = jax.random.split(key)
    keywords = {"step": state.step, "axis_name": axis_name}
    batch = _prepare(method, state.params, state.extra, batch, frozen, prepare_key, keywords)
    params, extra = state.params, state.extra
    if axis_name is not None and _mesh_axis.tracks(axis_name):
        # Gradients stay per device until the one psum at the end, instead of one for each slice.
        params, extra = _mesh_axis.vary((params, extra), axis_name)
    xs = (jnp.arange(slices), jax.tree.map(lambda x: _slice(x, slices), batch))
    steps = slices if unroll else 1

    def parts(params: Tree, extra: Tree, x: Any) -> Any:
        number, part = x
        slice_key = jax.random.fold_in(loss_key, number)
        return _parts_of_slice(method, params, extra, part, frozen, slice_key, keywords)

    def count(carry: None, x: Any) -> tuple[None, Any]:
        found, _, tracked = parts(params, extra, x)
        return carry, jax.tree.map(
            lambda part: part.count, (found, tracked), is_leaf=lambda x: isinstance(x, Part)
        )

    # The compiler keeps only what the counts depend on: labels and masks, seldom a forward pass.
    counts, tracked_counts = _sum(jax.lax.scan(count, None, xs, unroll=steps)[1], axis_name)

    def gradient(carry: tuple[Tree, Tree], x: Any) -> tuple[tuple[Tree, Tree], Any]:
        extra, grads = carry
        if unroll:
            x = (x[0], _after(x[1], grads))

        def share(params: Tree) -> tuple[jax.Array, Any]:
            found, extra_out, tracked = parts(params, extra, x)
            values = {name: ratio(part.sum, counts[name]) for name, part in found.items()}
            watched = {
                name: ratio(part.sum, tracked_counts[name], empty=jnp.nan)
                for name, part in tracked.items()
            }
            loss = weighted_sum({name: part.weight for name, part in found.items()}, values)
            metrics = {"loss": loss, **{f"loss/{k}": v for k, v in values.items()}, **watched}
            return loss, (extra_out, metrics)

        more, (extra, metrics) = jax.grad(share, has_aux=True)(params)
        if axis_name is not None and _mesh_axis.tracks(axis_name):
            extra, metrics = _mesh_axis.vary((extra, metrics), axis_name)
        return (extra, jax.tree.map(jnp.add, grads, more)), metrics

    start = (extra, jax.tree.map(jnp.zeros_like, params))
    (extra, grads), metrics = jax.lax.scan(gradient, start, xs, unroll=steps)
    if axis_name is not None:
        grads = jax.lax.psum(grads, axis_name)
    metrics = _sum(metrics, axis_name)
    return Gradient(grads, metrics["loss"], extra, metrics, batch)


def _parts_of_slice(
    method: Method,
    params: Tree,
    extra: Tree,
    batch: Batch,
    frozen: Tree,
    key: jax.Array,
    keywords: dict[str, Any],
) -> tuple[dict[str, Part], Tree, dict[str, Part]]:
    assert method.parts is not None
    found, (extra, tracked) = method.parts(params, extra, batch, frozen, key=key, **keywords)
    for name, part in found.items():
        if part.count is None:
            raise ValueError(
                f"microbatches must be 1 with the term {name!r}, which couples the examples of a "
                "batch: its value on slices is not its value on the batch."
            )
    # Counts as arrays, whether they were known or not, so that they add up in a loop.
    as_arrays = {
        name: part._replace(count=jax.lax.stop_gradient(jnp.asarray(part.count, jnp.float32)))
        for name, part in (found | tracked).items()
    }
    return (
        {name: as_arrays[name] for name in found},
        extra,
        {name: as_arrays[name] for name in tracked},
    )


def _prepare(
    method: Method,
    params: Tree,
    extra: Tree,
    batch: Batch,
    frozen: Tree,
    key: jax.Array,
    keywords: dict[str, Any],
) -> Batch:
    if method.prepare is None:
        return batch
    return jax.lax.stop_gradient(method.prepare(params, extra, batch, frozen, key=key, **keywords))


def _after(tree: Tree, earlier: Tree) -> Tree:
    """``tree``, unchanged, but not before ``earlier`` is there.

    Unrolled slices are otherwise computed side by side, in the memory of the whole batch: the
    compiler drops `jax.lax.optimization_barrier` before it schedules.
    """
    leaves = [jnp.ravel(x) for x in jax.tree.leaves(earlier) if x.size]
    never = jnp.asarray(sum(x[0].astype(jnp.float32) for x in leaves)) < -jnp.inf

    def wait(x: jax.Array) -> jax.Array:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return x if is_key else jnp.where(never, jnp.zeros_like(x), x)

    return jax.tree.map(wait, tree)


def _sum(tree: Tree, axis_name: str | None) -> Tree:
    """Sums over the slices and the devices."""
    tree = jax.tree.map(lambda x: x.sum(0), tree)
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _slice(x: Any, slices: int) -> jax.Array:
    x = jnp.asarray(x)
    if x.ndim == 0 or x.shape[0] % slices:
        raise ValueError(
            f"microbatches must divide the batch size, got {slices} for a batch entry of shape "
            f"{x.shape}."
        )
    # Slice m takes rows m::slices, so that a batch sharded over devices stays where it is.
    return x.reshape(x.shape[0] // slices, slices, *x.shape[1:]).swapaxes(0, 1)
