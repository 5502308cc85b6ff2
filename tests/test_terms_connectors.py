"""The trained layers of feature Terms, against loops and definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.losses._spatial import resize_mean
from kdjax.terms import _connectors as connectors


def test_resize_mean_averages_cells_that_may_overlap():
    x = np.random.default_rng(0).standard_normal((2, 7, 5, 3)).astype(np.float32)
    found = resize_mean(jnp.asarray(x), (3, 2))
    for i in range(3):
        for j in range(2):
            rows = slice(i * 7 // 3, -(-(i + 1) * 7 // 3))
            columns = slice(j * 5 // 2, -(-(j + 1) * 5 // 2))
            wanted = x[:, rows, columns].mean(axis=(1, 2))
            np.testing.assert_allclose(found[:, i, j], wanted, atol=1e-6)
    np.testing.assert_array_equal(resize_mean(jnp.asarray(x), (7, 5)), x)


def test_a_convolution_of_one_place_is_a_linear_layer():
    params = connectors.conv_init(jax.random.key(0), 3, 4)
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 3))
    flat = {"kernel": params["kernel"][0, 0], "bias": params["bias"]}
    np.testing.assert_allclose(connectors.conv(params, x), connectors.linear(flat, x), atol=1e-6)
    assert connectors.conv(params, x, stride=2).shape == (2, 3, 3, 4)


def test_the_transposed_convolution_is_the_transpose():
    kernel = jax.random.normal(jax.random.key(0), (4, 4, 3, 2))
    down = {"kernel": jnp.swapaxes(kernel, 2, 3)}  # [4, 4, 2, 3]
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 2))
    y = jax.random.normal(jax.random.key(2), (2, 4, 4, 3))
    forward = connectors.conv(down, x, stride=2, padding=1)
    back = connectors.transposed_conv({"kernel": kernel}, y, stride=2, padding=1)
    assert forward.shape == y.shape
    assert back.shape == x.shape
    np.testing.assert_allclose((forward * y).sum(), (x * back).sum(), rtol=1e-4)


@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 3, 4)])
def test_batch_norm_of_the_rows_that_count(shape):
    params = {"scale": jnp.arange(1.0, 5.0), "bias": jnp.ones(4)}
    x = jax.random.normal(jax.random.key(0), shape) * 3 + 2
    where = jnp.array([True, True, False, True, True, False])
    found = connectors.batch_norm(params, x.at[2].set(1e6), where=where)
    kept = np.asarray(x)[np.asarray(where)]
    axes = tuple(range(len(shape) - 1))
    wanted = (kept - kept.mean(axes)) / np.sqrt(kept.var(axes) + 1e-5)
    wanted = wanted * np.arange(1.0, 5.0) + 1
    np.testing.assert_allclose(found[where], wanted, atol=2e-5)
    assert np.isfinite(found).all()


def test_batch_norm_over_devices():
    params = connectors.norm_init(4)
    x = jax.random.normal(jax.random.key(0), (8, 2, 2, 4))
    where = jnp.arange(8) < 5
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(
        lambda x, where: connectors.batch_norm(params, x, axis_name="data", where=where),
        mesh=mesh,
        in_specs=(rows, rows),
        out_specs=rows,
    )
    one = connectors.batch_norm(params, x, where=where)
    np.testing.assert_allclose(sharded(x, where), one, atol=1e-6)


def test_means_count_rows():
    values = jnp.array([1.0, 2.0, jnp.nan])
    where = jnp.array([True, True, False])
    assert connectors.mean_of_batch(values, where, None) == 1.5
    assert connectors.mean_of_batch(values, jnp.zeros(3, bool), None) == 0
    grads = jax.grad(lambda v: connectors.mean_of_batch(v, where, None))(values)
    np.testing.assert_array_equal(grads, [0.5, 0.5, 0.0])


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match=r"student's output 'feat' must be feature maps"):
        connectors.maps("student", {"feat": jnp.ones((2, 3))}, "feat")
    params = connectors.conv_init(jax.random.key(0), 3, 4)
    with pytest.raises(ValueError, match="3 channels"):
        connectors.conv(params, jnp.ones((1, 2, 2, 5)))
    with pytest.raises(ValueError, match=r"batch\['weight'\]"):
        connectors.counted({"weight": jnp.ones(3)}, jnp.ones((2, 4)))
