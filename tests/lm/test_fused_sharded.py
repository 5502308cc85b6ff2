"""The fused loss on several devices: vocabulary, tokens, or both sharded, on every route."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.lm._fused import fused_linear_kd

GOLDEN = dict(np.load(Path(__file__).parent / "golden_fused.npz"))
LABELS = GOLDEN["labels"]
# 29 entries on four devices: padded to 32 with what must not be seen.
PADDED = {
    name: np.concatenate([GOLDEN[name], np.full((3, *GOLDEN[name].shape[1:]), 9.0)])
    for name in ("Ws", "bs", "Wt", "bt")
}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def mesh_of(**axes):
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices)


def by_vocabulary(check, **options):
    """Loss, parts and gradients with heads and biases sharded over four devices."""
    shard, whole = P("vocab"), P()

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh_of(vocab=4),
        in_specs=(whole, shard, shard, whole, shard, shard, whole, whole),
        out_specs=(whole, (whole, shard, shard)),
        check_vma=check,
    )
    def run(hs, ws, bs, ht, wt, bt, labels, hyper):
        def loss(hs, ws, bs):
            value, parts = fused_linear_kd(
                hs, ws, ht, wt, labels, student_bias=bs, teacher_bias=bt, vocab_axis="vocab",
                vocab_size=29, student_vocab_dim=0, return_parts=True, **(options | hyper),
            )  # fmt: skip
            if value.ndim:
                value = jnp.sum(value) / parts.count
            return value, parts

        found, gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(hs, ws, bs)
        return (found[0], found[1].count), gradients

    return run


def hyper_of(case):
    beta, temperature, hard, soft, _ = GOLDEN[f"c{case}/cfg"]
    return {"beta": beta, "temperature": temperature, "hard_weight": hard, "soft_weight": soft}


def close_to_golden(case, found):
    (loss, count), (hs, ws, bs) = found
    assert count == 33
    np.testing.assert_allclose(loss, GOLDEN[f"c{case}/loss"], rtol=1e-12)
    for gradient, name in ((hs, "g_hs"), (ws[:29], "g_Ws"), (bs[:29], "g_bs")):
        np.testing.assert_allclose(gradient, GOLDEN[f"c{case}/{name}"], rtol=1e-9, atol=1e-13)
    assert not np.any(ws[29:])
    assert not np.any(bs[29:])


def golden_arguments():
    return [
        PADDED.get(name, GOLDEN[name]) for name in ("hs", "Ws", "bs", "ht", "Wt", "bt", "labels")
    ]


@pytest.mark.parametrize(
    ("check", "options"),
    [
        (True, {}),
        (True, {"reduction": "none", "chunk_vocab": 3}),
        (False, {"chunk_vocab": 5, "pack_valid": True}),
    ],
    ids=str,
)
def test_sharded_vocabulary_equals_one_device(check, options):
    run = by_vocabulary(check, chunk_tokens=8, **options)
    for case in range(7):
        close_to_golden(case, run(*golden_arguments(), hyper_of(case)))


@pytest.mark.parametrize("beta", [0, 1])
def test_sharded_vocabulary_in_one_pass_over_tiles(beta):
    """KL and reverse KL chosen by a number, whose sums run along with the maximum."""
    case = {0: 1, 1: 6}[beta]
    hyper = hyper_of(case)
    del hyper["beta"]
    run = by_vocabulary(True, beta=beta, chunk_tokens=16, chunk_vocab=3)
    close_to_golden(case, run(*golden_arguments(), hyper))


# Tokens sharded: 36 of them, and devices with unequal counts.

HIDDEN, TEACHER, MARKS = GOLDEN["hs"][:36], GOLDEN["ht"][:36], LABELS[:36].copy()
MARKS[:9] = -100  # a whole device without a token that counts


def of_tokens(head, hidden, teacher, labels, **options):
    return fused_linear_kd(
        hidden @ np.eye(8), head, teacher, GOLDEN["Wt"], labels, beta=0.5, hard_weight=0.5,
        chunk_tokens=4, **options,
    )  # fmt: skip


def by_shard_map(check, pack):
    split, whole = P("data"), P()

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh_of(data=4),
        in_specs=(whole, split, split, split),
        out_specs=(whole, (whole, split)),
        check_vma=check,
    )
    def run(*arguments):
        loss = functools.partial(of_tokens, axis_name="data", pack_valid=pack)
        value, (head, hidden) = jax.value_and_grad(loss, (0, 1))(*arguments)
        if not check:  # the sum over devices has an equal share of each
            head, hidden = jax.lax.pmean(head, "data"), hidden / 4
        return value, (head, hidden)

    return run(GOLDEN["Ws"], HIDDEN, TEACHER, MARKS)


def by_pmap():
    def run(*arguments):
        loss = functools.partial(of_tokens, axis_name="data")
        value, (head, hidden) = jax.value_and_grad(loss, (0, 1))(*arguments)
        return value, (jax.lax.pmean(head, "data"), hidden / 4)

    mapped = jax.pmap(run, "data", in_axes=(None, 0, 0, 0), devices=jax.devices()[:4])
    parts = [x.reshape(4, 9, *x.shape[1:]) for x in (HIDDEN, TEACHER, MARKS)]
    values, (heads, hidden) = mapped(GOLDEN["Ws"], *parts)
    return values[0], (heads[0], hidden.reshape(36, 8))


def by_jit():
    mesh = mesh_of(data=4)
    split = NamedSharding(mesh, P("data"))
    placed = [jax.device_put(x, split) for x in (HIDDEN, TEACHER, MARKS)]
    return jax.jit(jax.value_and_grad(of_tokens, (0, 1)))(GOLDEN["Ws"], *placed)


@pytest.fixture(scope="module")
def one_device():
    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(of_tokens, (0, 1)))
        return run(GOLDEN["Ws"], HIDDEN, TEACHER, MARKS)


@pytest.mark.parametrize("route", ["shard_map", "shard_map, packed", "unchecked", "pmap", "jit"])
def test_sharded_tokens_equal_one_device(route, one_device):
    routes = {
        "shard_map": lambda: by_shard_map(True, False),
        "shard_map, packed": lambda: by_shard_map(True, True),
        "unchecked": lambda: by_shard_map(False, False),
        "pmap": by_pmap,
        "jit": by_jit,
    }
    loss, gradients = routes[route]()
    np.testing.assert_allclose(loss, one_device[0], rtol=1e-12)
    for found, wanted in zip(gradients, one_device[1], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-13)


def test_under_jit_devices_share_every_chunk():
    """No device does the work of another, nor sees its hidden states."""
    mesh = mesh_of(data=4)
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    arguments = [
        jax.ShapeDtypeStruct((64, 8, 16), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct((96, 16), jnp.float32, sharding=whole),
    ]

    def loss(hidden, head):
        return fused_linear_kd(hidden, head, hidden, head, beta=0.5, chunk_tokens=128)

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()
    text = compiled.as_text()
    assert "f32[32,96]" in text  # a quarter of a chunk's logits
    assert "f32[128,96]" not in text
    assert "all-gather" not in text


def test_sharded_tokens_and_vocabulary():
    """Two by two devices: sums over one axis never mix with those over the other."""

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh_of(data=2, vocab=2),
        in_specs=(P("vocab"), P("vocab"), P("data"), P("data"), P("data")),
        out_specs=(P(), P("vocab"), P("data")),
    )
    def run(ws, wt, hs, ht, labels):
        def loss(ws, hs):
            return fused_linear_kd(
                hs, ws, ht, wt, labels, beta=0.5, hard_weight=0.5, vocab_axis="vocab",
                axis_name="data", vocab_size=29, chunk_tokens=4, pack_valid=True,
            )  # fmt: skip

        value, gradients = jax.value_and_grad(loss, (0, 1))(ws, hs)
        return value, *gradients

    def whole(ws, hs):
        return fused_linear_kd(
            hs, ws, TEACHER, GOLDEN["Wt"], MARKS, beta=0.5, hard_weight=0.5, chunk_tokens=4
        )

    found = run(PADDED["Ws"], PADDED["Wt"], HIDDEN, TEACHER, MARKS)
    loss, (head, hidden) = jax.jit(jax.value_and_grad(whole, (0, 1)))(GOLDEN["Ws"], HIDDEN)
    np.testing.assert_allclose(found[0], loss, rtol=1e-12)
    np.testing.assert_allclose(found[1][:29], head, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(found[2], hidden, rtol=1e-9, atol=1e-13)


def test_shards_of_unequal_size_are_refused():
    def run(ws, wt):
        return fused_linear_kd(
            HIDDEN, ws, TEACHER, wt, vocab_axis="vocab", vocab_size=29,
            student_vocab_dim=0,
        )  # fmt: skip

    mapped = jax.shard_map(
        run, mesh=mesh_of(vocab=4), in_specs=(P("vocab"), P("vocab")), out_specs=P()
    )
    with pytest.raises(ValueError, match=r"teacher_head must have 8 .* got 9"):
        mapped(PADDED["Ws"], np.ones((36, 12)))
