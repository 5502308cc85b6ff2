"""DIST over a named axis: the whole batch's loss and gradient on every route."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kdjax import losses

RANDOM = np.random.default_rng(4)
WEIGHTS = RANDOM.standard_normal((6, 5)).astype(np.float32)
INPUTS = RANDOM.standard_normal((16, 6)).astype(np.float32)
TEACHER = RANDOM.standard_normal((16, 5)).astype(np.float32)
MASKS = {
    "all": np.ones(16, bool),
    "uneven": np.arange(16) < 6,  # whole devices without a row
}


def loss(weights, inputs, teacher, mask, axis_name=None):
    return losses.dist(
        inputs @ weights, teacher, gamma=2.0, temperature=2.0, where=mask, axis_name=axis_name
    )


def shards(x):
    return x.reshape(4, 4, *x.shape[1:])


def by_shard_map(mask, check):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    split, whole = PartitionSpec("data"), PartitionSpec()

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(whole, split, split, split),
        out_specs=(whole, whole),
        check_vma=check,
    )
    def update(*arguments):
        value, gradient = jax.value_and_grad(functools.partial(loss, axis_name="data"))(*arguments)
        return value, gradient if check else jax.lax.pmean(gradient, "data")

    return update(WEIGHTS, INPUTS, TEACHER, mask)


def by_pmap(mask):
    def update(*arguments):
        value, gradient = jax.value_and_grad(functools.partial(loss, axis_name="data"))(*arguments)
        return value, jax.lax.pmean(gradient, "data")

    mapped = jax.pmap(update, "data", in_axes=(None, 0, 0, 0), devices=jax.devices()[:4])
    values, gradients = mapped(WEIGHTS, shards(INPUTS), shards(TEACHER), shards(mask))
    np.testing.assert_array_equal(values, values[0])
    return values[0], gradients[0]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("route", ["shard_map", "shard_map_unchecked", "pmap"])
def test_equals_one_device(route, name):
    mask = MASKS[name]
    wanted = jax.value_and_grad(loss)(WEIGHTS, INPUTS, TEACHER, mask)
    routes = {
        "shard_map": lambda: by_shard_map(mask, True),
        "shard_map_unchecked": lambda: by_shard_map(mask, False),
        "pmap": lambda: by_pmap(mask),
    }
    value, gradient = routes[route]()
    np.testing.assert_allclose(value, wanted[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, wanted[1], rtol=1e-4, atol=1e-6)
    # The devices' own losses are not the batch's: without axis_name the test would see it.
    local = np.mean(
        [
            loss(WEIGHTS, *parts)
            for parts in zip(shards(INPUTS), shards(TEACHER), shards(mask), strict=True)
        ]
    )
    assert abs(local - wanted[0]) > 1e-2


def test_one_row_has_no_relation_between_rows():
    """Columns of one entry are constant: correlation 0, and no gradient from them."""
    row = jnp.float32(TEACHER[:1])
    value, gradient = jax.value_and_grad(lambda s: losses.dist(s, row, beta=0.0))(row)
    np.testing.assert_allclose(value, 1.0)
    assert not np.any(gradient)
