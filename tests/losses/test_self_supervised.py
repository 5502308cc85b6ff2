"""Barlow Twins and NT-Xent: fixtures, oracles, invariants, and the whole batch on every route."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads

from kdjax import losses

GOLDEN = np.load(Path(__file__).parent / "golden_barlow_twins.npz")
LOSSES = {"barlow_twins": losses.barlow_twins, "nt_xent": losses.nt_xent}


def views(rows=8, width=5, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((rows, width))
    return z + 0.3 * rng.standard_normal(z.shape), z + 0.3 * rng.standard_normal(z.shape)


def norm_error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def exactly(function, *arguments):
    """The function compiled in float64, as NumPy arrays."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


@pytest.mark.parametrize("case", list(GOLDEN["cases"]))
def test_barlow_twins_is_the_published_code(case):
    given = {k.split("/")[1]: GOLDEN[k] for k in GOLDEN.files if k.startswith(f"{case}/")}
    options = {"off_diagonal": float(given["lambd"]), "eps": float(given["bn_eps"])}
    loss = functools.partial(losses.barlow_twins, **options)
    views = [given[k].astype(np.float64) for k in ("z1", "z2")]
    value, gradients = exactly(jax.value_and_grad(loss, (0, 1)), *views)
    np.testing.assert_allclose(value, given["loss_f64"], rtol=1e-12)
    for found, name in zip(gradients, ("grad_z1_f64", "grad_z2_f64"), strict=True):
        assert norm_error(found, given[name]) < 1e-10
    single = jax.jit(loss)(given["z1"], given["z2"])
    np.testing.assert_allclose(single, given["loss_f64"], rtol=3e-6)


def test_two_rows_saturate_the_batch_norm():
    """Every entry is +-1 up to eps, and the gradients are tiny, not NaN."""
    z1, z2 = (30 * z for z in views(2, 3, seed=3))
    value, gradients = exactly(jax.value_and_grad(losses.barlow_twins, (0, 1)), z1, z2)
    signs = np.outer(*(np.sign(z[0] - z[1]) for z in (z1, z2)))
    wanted = np.sum((np.diag(signs) - 1) ** 2) + 0.0051 * 6
    np.testing.assert_allclose(value, wanted, atol=1e-3)
    assert all(0 < np.abs(g).max() < 1e-3 for g in gradients)


def nt_xent_oracle(z1, z2, temperature):
    z = np.concatenate([z1, z2])
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    rows, values = len(z1), np.zeros(len(z))
    for i in range(2 * rows):
        j = (i + rows) % (2 * rows)
        exponentials = [np.exp(z[i] @ z[k] / temperature) for k in range(2 * rows) if k != i]
        values[i] = -np.log(np.exp(z[i] @ z[j] / temperature) / np.sum(exponentials))
    return (values[:rows] + values[rows:]) / 2


def test_nt_xent_is_equation_1():
    z1, z2 = views()
    mask = np.arange(8) % 3 > 0
    for temperature in (0.1, 0.5, 2.0):
        options = {"temperature": temperature}
        found, masked = exactly(
            lambda t: (
                losses.nt_xent(z1, z2, temperature=t),
                losses.nt_xent(z1, z2, temperature=t, where=mask),
            ),
            temperature,
        )
        np.testing.assert_allclose(found, nt_xent_oracle(z1, z2, **options), rtol=1e-12)
        wanted = nt_xent_oracle(z1[mask], z2[mask], **options)
        np.testing.assert_allclose(masked[mask], wanted, rtol=1e-12)
        assert not np.any(masked[~mask])


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_flow_to_both_views(name):
    with jax.enable_x64(True):
        z1, z2 = (jnp.asarray(z) for z in views(6, 4))
        loss = jax.jit(lambda a, b: jnp.sum(LOSSES[name](a, b) * jnp.arange(1.0, 7.0)))
        check_grads(loss, (z1, z2), order=1, modes=["fwd", "rev"], eps=1e-6, rtol=1e-6)
        for gradient in jax.jit(jax.grad(loss, (0, 1)))(z1, z2):
            assert np.abs(np.asarray(gradient)).max() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_views_and_samples_may_be_exchanged(name):
    loss, (z1, z2) = LOSSES[name], views()
    order = np.random.default_rng(1).permutation(8)
    value, swapped, moved, mixed = exactly(
        lambda a, b: (loss(a, b), loss(b, a), loss(a[order], b[order]), loss(a, b[order])), z1, z2
    )
    np.testing.assert_allclose(swapped, value, rtol=1e-12)
    np.testing.assert_allclose(moved, value[order] if value.ndim else value, rtol=1e-12)
    assert np.mean(mixed) > 1.2 * np.mean(value)  # views of other images aren't partners


def test_identical_views_have_a_perfect_diagonal():
    z, _ = views(64, 5)
    white = 8 * np.linalg.qr(z - z.mean(0))[0]
    perfect, best = exactly(
        lambda z, w: (losses.barlow_twins(z, z, off_diagonal=0.0), losses.barlow_twins(w, w)),
        z,
        white,
    )
    assert 0 < perfect < 1e-8  # eps alone
    assert 0 < best < 1e-8


def test_barlow_twins_sees_neither_scale_nor_offset():
    z1, z2 = views()
    loss = functools.partial(losses.barlow_twins, eps=0.0)
    value, moved = exactly(
        lambda a, b: (loss(z1, z2), loss(a, b)), z1 * np.arange(1, 6), 3 * z2 - 7
    )
    np.testing.assert_allclose(moved, value, rtol=1e-12)


def test_a_dead_channel_adds_one():
    z1, z2 = views()
    dead = np.concatenate([z1, np.full((8, 1), 0.3)], 1), np.concatenate([z2, z2[:, :1]], 1)
    loss = functools.partial(losses.barlow_twins, off_diagonal=0.0)
    both = jax.value_and_grad(loss, (0, 1))
    (without, _), (value, gradients) = exactly(lambda a, b: (both(z1, z2), both(a, b)), *dead)
    np.testing.assert_allclose(value, without + 1, rtol=1e-12)
    assert all(np.isfinite(g).all() for g in gradients)


def test_nt_xent_sees_no_lengths_and_bears_zeros():
    z1, z2 = views()
    lengths = np.arange(1.0, 9.0)[:, None]

    def summed(z):
        return losses.nt_xent(z, z2).sum()

    zero = np.where(np.arange(8)[:, None] == 2, 0, z1)
    value, scaled, equal, (held, gradient) = exactly(
        lambda a, b, ones: (
            losses.nt_xent(a, b),
            losses.nt_xent(a * lengths, b / lengths),
            losses.nt_xent(ones, ones),
            jax.value_and_grad(summed)(zero),
        ),
        z1,
        z2,
        np.ones((4, 3)),
    )
    np.testing.assert_allclose(scaled, value, rtol=1e-10)
    np.testing.assert_allclose(equal, np.log(7), rtol=1e-12)
    assert np.isfinite(held)
    assert np.isfinite(gradient).all()


def test_the_matrix_of_correlations_is_formed_once():
    """Three products in all, one of them with a D x D result."""
    z1, z2 = views(8, 16)
    program = jax.make_jaxpr(jax.value_and_grad(losses.barlow_twins, (0, 1)))(z1, z2)
    assert str(program).count("dot_general") == 3
    found = [e for e in program.eqns if e.primitive.name == "dot_general"]
    assert [e.outvars[0].aval.shape for e in found].count((16, 16)) == 1


def test_the_matrix_of_correlations_has_one_buffer():
    """Compiled, gradients included, beside it there is room for arrays of the views' size only."""
    z = jax.ShapeDtypeStruct((32, 512), jnp.float32)
    program = jax.jit(jax.value_and_grad(losses.barlow_twins, (0, 1))).lower(z, z)
    # As users compile: the tests' settings keep the compiler from fusing.
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    found = program.compile(options).memory_analysis().temp_size_in_bytes
    assert found < 4 * (512 * 512 + 8 * 32 * 512)


def test_bad_input_is_one_sentence():
    z = np.ones((4, 3), np.float32)
    for loss in LOSSES.values():
        for bad in (z[:1], np.ones((4, 0), np.float32)):
            with pytest.raises(ValueError, match=r"^z1 must have at least 2 rows"):
                loss(bad, bad)
        with pytest.raises(ValueError, match=r"^z1 must have 2 dimensions"):
            loss(z[0], z[0])
        with pytest.raises(ValueError, match=r"^z1 must have shape .* like z2"):
            loss(z, z[:, :2])
        with pytest.raises(TypeError, match=r"^z2 must be a floating"):
            loss(z, z.astype(int))
    for options in ({"off_diagonal": -1.0}, {"eps": -1.0}):
        with pytest.raises(ValueError, match=rf"^{next(iter(options))} must"):
            losses.barlow_twins(z, z, **options)
    with pytest.raises(ValueError, match=r"^temperature must"):
        losses.nt_xent(z, z, temperature=0.0)


# --- the whole batch on four devices ---------------------------------------------------------

RANDOM = np.random.default_rng(4)
WEIGHTS = RANDOM.standard_normal((6, 5)).astype(np.float32)
INPUTS = [RANDOM.standard_normal((16, 6)).astype(np.float32) for _ in range(2)]
MASKS = {"all": np.ones(16, bool), "uneven": np.arange(16) < 6}  # whole devices without a row


def global_loss(name, weights, first, second, mask, axis_name=None):
    value = LOSSES[name](first @ weights, second @ weights, where=mask, axis_name=axis_name)
    if value.ndim == 0:
        return value
    total, count = value.sum(), mask.sum()
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / count


def update(name, check, *arguments):
    loss = functools.partial(global_loss, name, axis_name="data")
    value, gradient = jax.value_and_grad(loss)(*arguments)
    return value, gradient if check else jax.lax.pmean(gradient, "data")


def by_shard_map(name, mask, check):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    split, whole = PartitionSpec("data"), PartitionSpec()
    run = jax.shard_map(
        functools.partial(update, name, check),
        mesh=mesh,
        in_specs=(whole, split, split, split),
        out_specs=(whole, whole),
        check_vma=check,
    )
    return jax.jit(run)(WEIGHTS, *INPUTS, mask)


def by_pmap(name, mask):
    run = jax.pmap(
        functools.partial(update, name, False),
        "data",
        in_axes=(None, 0, 0, 0),
        devices=jax.devices()[:4],
    )
    found = run(WEIGHTS, *(x.reshape(4, 4, *x.shape[1:]) for x in (*INPUTS, mask)))
    for x in found:
        np.testing.assert_allclose(x, np.broadcast_to(x[0], x.shape), rtol=1e-6)
    return jax.tree.map(lambda x: x[0], found)


ROUTES = {
    "shard_map": lambda name, mask: by_shard_map(name, mask, True),
    "shard_map_unchecked": lambda name, mask: by_shard_map(name, mask, False),
    "pmap": by_pmap,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", LOSSES)
def test_four_devices_equal_one(name, route, mask):
    mask = MASKS[mask]
    wanted = jax.jit(jax.value_and_grad(functools.partial(global_loss, name)))(
        WEIGHTS, *INPUTS, mask
    )
    value, gradient = ROUTES[route](name, mask)
    np.testing.assert_allclose(value, wanted[0], rtol=2e-6)
    np.testing.assert_allclose(gradient, wanted[1], rtol=1e-4, atol=2e-6)


def test_devices_own_losses_are_not_the_batchs():
    """Without axis_name the test above would fail."""
    for name in LOSSES:
        loss = jax.jit(functools.partial(global_loss, name))
        whole = loss(WEIGHTS, *INPUTS, MASKS["all"])
        parts = [slice(4 * i, 4 * i + 4) for i in range(4)]
        local = [loss(WEIGHTS, *(x[p] for x in (*INPUTS, MASKS["all"]))) for p in parts]
        assert abs(np.mean(local) - whole) > 0.01


def test_one_row_per_device_is_a_batch():
    z1, z2 = (z[:4].astype(np.float32) for z in views())
    for loss in LOSSES.values():
        mapped = jax.pmap(
            functools.partial(loss, axis_name="data"), "data", devices=jax.devices()[:4]
        )
        found = mapped(z1[:, None], z2[:, None])
        wanted = jax.jit(loss)(z1, z2)
        np.testing.assert_allclose(found.reshape(-1), np.broadcast_to(wanted, 4), rtol=1e-5)


def test_two_named_axes():
    """A batch split over two mesh axes at once."""
    mesh = jax.make_mesh(
        (2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    split = PartitionSpec(("a", "b"))
    z1, z2 = (z.astype(np.float32) for z in views())
    for loss in LOSSES.values():
        wanted = jax.jit(loss)(z1, z2)
        run = jax.shard_map(
            functools.partial(loss, axis_name=("a", "b")),
            mesh=mesh,
            in_specs=(split, split),
            out_specs=split if wanted.ndim else PartitionSpec(),
        )
        np.testing.assert_allclose(jax.jit(run)(z1, z2), wanted, rtol=1e-5)
