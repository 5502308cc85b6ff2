"""Relations, correlations and contrast: published numbers, invariances, odd rows, devices."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kdjax import metrics
from kdjax.losses._contrastive import (
    contrast,
    correlation_congruence,
    nce,
    neighbour_congruence,
)
from kdjax.losses._relations import (
    cka,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)

FOLDER = Path(__file__).parent / "golden_families"
LOSSES = {
    "similarity_preserving": similarity_preserving,
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
    "rkd_angle_chunks": partial(rkd_angle, chunk=2),
    "pkt": pkt,
    "cka": cka,
    "cka_debiased": partial(cka, debiased=True),
    "contrast": contrast,
    "neighbour_congruence": neighbour_congruence,
    "correlation_congruence": correlation_congruence,
}


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(found, wanted, tolerance):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


# --- published values -----------------------------------------------------------------------


def rkd_total(s, t):
    return 25 * rkd_distance(s, t) + 50 * rkd_angle(s, t)


AUTHORS = {
    ("sp", "repdistiller"): similarity_preserving,
    ("rkd", "repdistiller__total"): rkd_total,
    ("rkd", "repdistiller__distance"): rkd_distance,
    ("rkd", "repdistiller__angle"): rkd_angle,
    ("rkd", "mdistiller__squared_distance"): partial(rkd_distance, squared=True),
    ("rkd_duplicate_rows", "repdistiller__distance"): rkd_distance,
    ("pkt", "repdistiller"): pkt,
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("family", "variant"), AUTHORS)
def test_authors_numbers(family, variant, dtype):
    golden = np.load(FOLDER / f"{family}.npz")
    loss = AUTHORS[family, variant]
    with jax.enable_x64(dtype is np.float64):
        s, t = (jnp.asarray(golden[f"in__{name}"], dtype) for name in ("f_s", "f_t"))
        found = jax.jit(jax.value_and_grad(lambda s, t: loss(s, t).mean()))(s, t)
    tolerance = 1e-9 if dtype is np.float64 else 1e-5
    np.testing.assert_allclose(found[0], golden[f"loss__{variant}"], rtol=tolerance)
    close(found[1], golden[f"grad__f_s__{variant}"], tolerance)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_angles_of_duplicates(dtype):
    """The authors' value; their gradient of 1e9 in the two equal rows is its division by 1e-12."""
    golden = np.load(FOLDER / "rkd_duplicate_rows.npz")
    with jax.enable_x64(dtype is np.float64):
        s, t = (jnp.asarray(golden[f"in__{name}"], dtype) for name in ("f_s", "f_t"))
        value, gradient = jax.jit(jax.value_and_grad(lambda s: rkd_angle(s, t).mean()))(s)
    tolerance = 1e-9 if dtype is np.float64 else 1e-5
    np.testing.assert_allclose(value, golden["loss__repdistiller__angle"], rtol=tolerance)
    wanted = golden["grad__f_s__repdistiller__angle"]
    assert np.abs(wanted[:2]).max() > 1e9
    close(gradient[2:], wanted[2:], tolerance)
    assert np.abs(gradient[:2]).max() < 10 * np.abs(wanted[2:]).max()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("variant", ["repdistiller", "torchdistill_gaussian_batchmean"])
def test_authors_correlation_congruence(variant, dtype):
    """Of flattened maps through linear layers, both of which are trained."""
    golden = np.load(FOLDER / "cc.npz")
    layers = {
        name: [golden[f"w__embed_{name}__linear.{part}"] for part in ("weight", "bias")]
        for name in "st"
    }

    def loss(layers, s, t):
        rows = [
            x.reshape(len(x), -1) @ layers[name][0].T + layers[name][1][None]
            for name, x in (("s", s), ("t", t))
        ]
        if variant == "repdistiller":
            return neighbour_congruence(*rows).mean()
        mean = correlation_congruence(*rows, gamma=0.2, order=3).mean()
        return jnp.sqrt(mean) / len(s)  # the norm without the square, over n^2

    with jax.enable_x64(dtype is np.float64):
        layers = jax.tree.map(lambda x: jnp.asarray(x, dtype), layers)
        s, t = (jnp.asarray(golden[f"in__{name}"], dtype) for name in ("f_s", "f_t"))
        value, (of_layers, of_s) = jax.jit(jax.value_and_grad(loss, (0, 1)))(layers, s, t)
    tolerance = 1e-9 if dtype is np.float64 else 1e-5
    np.testing.assert_allclose(value, golden[f"loss__{variant}"], rtol=tolerance)
    close(of_s, golden[f"grad__f_s__{variant}"], tolerance)
    for name in "st":
        for found, part in zip(of_layers[name], ("weight", "bias"), strict=True):
            close(found, golden[f"wgrad__embed_{name}__linear.{part}__{variant}"], tolerance)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_authors_contrastive_estimation(dtype):
    """Both sides of the first step of CRD, scored here in NumPy."""
    golden = np.load(FOLDER / "crd.npz")
    temperature = float(np.float32(0.07))  # theirs sits in a float32 buffer
    values = []
    with jax.enable_x64(dtype is np.float64):
        for side, bank in (("s", "memory_v2"), ("t", "memory_v1")):
            weight, bias = (
                golden[f"w__crd__embed_{side}.linear.{p}"].astype(float) for p in ("weight", "bias")
            )
            v = golden[f"in__f_{side}_step1"].astype(float) @ weight.T + bias
            v /= np.linalg.norm(v, axis=1, keepdims=True)
            rows = golden[f"w__crd__contrast.{bank}"][golden["in__contrast_idx_step1"]]
            scores = np.einsum("bf,bkf->bk", v, rows.astype(float)) / temperature
            scores -= np.log(np.exp(scores).mean() * 50)
            values.append(float(nce(jnp.asarray(scores, dtype), examples=50).mean()))
    tolerance = 1e-9 if dtype is np.float64 else 1e-5
    np.testing.assert_allclose(sum(values), golden["loss__repdistiller__step1"], rtol=tolerance)


# --- our readings in NumPy ------------------------------------------------------------------


def test_in_batch_contrast_by_its_formula():
    s, t = draw(6, 5, dtype=float), draw(6, 5, seed=1, dtype=float)
    unit_s, unit_t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))
    scores = np.exp(unit_s @ unit_t.T / 0.2)
    wanted = -np.log(np.diag(scores) / scores.sum(1))
    with jax.enable_x64(True):
        np.testing.assert_allclose(contrast(s, t, temperature=0.2), wanted, rtol=1e-12)
        far = contrast(100 * s, t, temperature=1e-4)
    assert np.all(np.isfinite(far))


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("rows", [12, 5])  # wider than there are rows, and not
def test_cka_is_one_minus_the_metric(rows, debiased):
    s, t = draw(rows, 3, 2), draw(rows, 7, seed=1)
    where = np.arange(rows) != 1
    for mask in (None, where):
        wanted = metrics.linear_cka(s.reshape(rows, 6), t, debiased=debiased, where=mask)
        found = cka(s, t, debiased=debiased, where=mask)
        np.testing.assert_allclose(found, 1 - wanted, rtol=1e-5, atol=1e-6)


def test_gaussian_kernel_is_the_limit_of_its_series():
    s, t = (draw(5, 4, seed=i, dtype=float) for i in (0, 1))
    s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))
    kernels = [np.exp(-0.4 * ((x[:, None] - x[None]) ** 2).sum(-1)) for x in (s, t)]
    wanted = ((kernels[0] - kernels[1]) ** 2).mean(1)
    with jax.enable_x64(True):
        found = correlation_congruence(7 * s, t, gamma=0.4, order=20)
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_contrastive_estimation_of_large_scores():
    """P / (P + c) in logarithms: nothing overflows and no gradient is lost."""
    scores = jnp.array([[-200.0, 200.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: nce(x, examples=8).sum())(scores)
    np.testing.assert_allclose(value, 400 + math.log(5), rtol=1e-6)  # c = 1/4
    np.testing.assert_allclose(gradient, [[-1.0, 1.0, 0.8]], rtol=1e-5)


# --- properties -----------------------------------------------------------------------------


def rotation(width, seed):
    return np.linalg.qr(draw(width, width, seed=seed, dtype=float))[0].astype(np.float32)


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("similarity_preserving", False),
        ("rkd_distance", True),
        ("rkd_angle", True),
        ("pkt", False),
        ("cka", True),
        ("cka_debiased", True),
        ("correlation_congruence", False),
    ],
)
def test_only_relations_count(name, moved):
    """Rotated, scaled, and (where the formula allows) moved features have the same relations."""
    loss = LOSSES[name]
    s, t = draw(8, 6), draw(8, 5, seed=1)
    wanted = loss(s, t)
    offset = 3.0 if moved else 0.0
    np.testing.assert_allclose(loss(2.5 * s @ rotation(6, 2) + offset, t), wanted, rtol=2e-4)
    np.testing.assert_allclose(loss(s, 0.3 * t @ rotation(5, 3) - offset), wanted, rtol=2e-4)
    assert np.abs(np.asarray(wanted)).min() > 1e-5
    np.testing.assert_allclose(loss(s, 4 * s @ rotation(6, 2) + offset), 0, atol=2e-6)
    if not moved:
        assert np.abs(np.asarray(loss(s + 3, t) - wanted)).max() > 1e-4


def test_neighbours_are_those_of_the_batch_that_is_left():
    s, t = draw(6, 3), draw(6, 3, seed=1)
    where = np.array([True, False, True, True, False, True])
    found = neighbour_congruence(s, t, where=where)
    error = np.abs(s - t)[where]
    np.testing.assert_allclose(found.sum() / 4, (error[:-1] * error[1:]).sum() / 3 / 1, rtol=1e-5)
    assert not np.any(found[~where])
    assert found[5] == 0


def degenerate(kind):
    s, t, where = draw(6, 4), draw(6, 4, seed=1), np.ones(6, bool)
    if kind == "equal":
        s = t
    elif kind == "zeros":
        s = np.zeros_like(s)
    elif kind == "zero_rows":
        s[:2] = 0
    elif kind == "duplicates":
        s[1] = s[0]
        t[3] = t[2]
    elif kind == "constant":
        s[:] = 1.7
    else:
        where = np.arange(6) == 2
    return s, t, where


@pytest.mark.parametrize("name", LOSSES)
def test_degenerate_rows_have_finite_gradients(name):
    loss = jax.jit(
        jax.value_and_grad(lambda s, t, where: LOSSES[name](s, t, where=where).sum(), (0, 1))
    )
    for kind in ("equal", "zeros", "zero_rows", "duplicates", "constant", "alone"):
        value, gradients = loss(*degenerate(kind))
        assert np.isfinite(value), kind
        for gradient in gradients:
            assert np.all(np.isfinite(gradient)), kind
            assert np.abs(gradient).max() < 1e3, kind


def test_similarity_is_of_flattened_maps():
    s, t = draw(5, 2, 2, 3), draw(5, 4, 4, 2, seed=1)
    flat = similarity_preserving(s.reshape(5, -1), t.reshape(5, -1))
    np.testing.assert_array_equal(similarity_preserving(s, t), flat)


def test_chunks_of_angles_change_nothing():
    s, t = draw(7, 4), draw(7, 3, seed=1)

    def grad(chunk):
        return jax.jit(jax.value_and_grad(lambda s: (rkd_angle(s, t, chunk=chunk) ** 2).sum()))(s)

    wanted = grad(None)
    for chunk in (1, 3):
        for x, y in zip(grad(chunk), wanted, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_angles_never_hold_all_triplets_of_a_device():
    """In chunks of one vertex, forwards and backwards."""
    n = 48
    s, t = draw(n, 4), draw(n, 4, seed=1)

    def bytes_of(chunk):
        grad = jax.jit(jax.grad(lambda s: rkd_angle(s, t, chunk=chunk).sum()))
        return grad.lower(s).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(1) < n**3 * 4 / 4 < n**3 * 4 < bytes_of(None)


# --- several devices ------------------------------------------------------------------------


PMAP = {"rkd_distance", "cka_debiased", "neighbour_congruence"}


@pytest.mark.parametrize(
    ("name", "route"),
    [(name, "shard_map") for name in LOSSES] + [(name, "pmap") for name in sorted(PMAP)],
)
def test_devices_agree(name, route):
    """Rows, gradients and masks of four devices are those of one."""
    devices = 4
    s, t = draw(12, 5), draw(12, 5, seed=1)
    where = np.arange(12) % 5 != 1  # two, three, two and three rows are left
    share = np.linspace(0.5, 2.0, 12).astype(np.float32)

    def total(s, t, where, share, axis_name=None):
        value = LOSSES[name](s, t, where=where, axis_name=axis_name)
        if value.ndim == 0:
            return value
        value = jnp.sum(value * share)
        return value if axis_name is None else jax.lax.psum(value, axis_name)

    grad = jax.value_and_grad(total, (0, 1))
    wanted = jax.jit(grad)(s, t, where, share)
    sharded = partial(grad, axis_name="data")
    if route == "shard_map":
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
        rows = PartitionSpec("data")
        found = jax.jit(
            jax.shard_map(
                sharded, mesh=mesh, in_specs=rows, out_specs=(PartitionSpec(), (rows, rows))
            )
        )(s, t, where, share)
    else:
        split = [x.reshape(devices, -1, *x.shape[1:]) for x in (s, t, where, share)]
        run = jax.pmap(sharded, axis_name="data", devices=jax.devices()[:devices])
        value, gradients = run(*split)
        # Without types a device's gradient is that of the sum of all devices' losses.
        found = value[0], [g.reshape(12, -1) / devices for g in gradients]
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-6, atol=1e-6)
    for x, y in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6)


# --- mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_mistakes(name):
    loss = LOSSES[name]
    s, t = draw(6, 4), draw(6, 4, seed=1)
    with pytest.raises(TypeError, match=r"^teacher must be a floating-point array, got int32"):
        loss(s, t.astype(np.int32))
    with pytest.raises(ValueError, match=r"^teacher must have shape \(6, 4\)"):
        loss(s, t[:5])
    with pytest.raises(ValueError, match=r"^student must have at least . rows in the whole batch"):
        loss(s[:1], t[:1])
    with pytest.raises(TypeError, match=r"^where must be a boolean array"):
        loss(s, t, where=np.ones(6))


def test_mistaken_options():
    s, t = draw(6, 4), draw(6, 4, seed=1)
    with pytest.raises(ValueError, match=r"^teacher must have shape \(6, 4\) like student"):
        contrast(s, draw(6, 5))
    with pytest.raises(ValueError, match=r"^temperature must be a finite number above 0"):
        contrast(s, t, temperature=0.0)
    with pytest.raises(ValueError, match=r"^chunk must be an integer at least 1"):
        rkd_angle(s, t, chunk=0)
    with pytest.raises(ValueError, match=r"^order must be an integer at least 1"):
        correlation_congruence(s, t, order=0)
    with pytest.raises(ValueError, match=r"^gamma must be a finite number above 0"):
        correlation_congruence(s, t, gamma=-1.0)
    with pytest.raises(ValueError, match=r"^scores must be \[B, 1 \+ K\]"):
        nce(s[:, :1], examples=5)
    with pytest.raises(ValueError, match=r"^examples must be an integer at least 1"):
        nce(s, examples=0)
