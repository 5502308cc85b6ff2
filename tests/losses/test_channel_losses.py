"""HCL, OFD, ICKD and KDSVD: fixtures of the authors' code, invariances, odd cases, bad input."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import stats

from kdjax.losses import _channels, _overhaul

FOLDER = Path(__file__).parent / "golden_families"
DTYPES = {"float64": (np.float64, 1e-9), "float32": (np.float32, 1e-5)}


def golden(name):
    return dict(np.load(FOLDER / f"{name}.npz"))


def nhwc(x, dtype=np.float64):
    return np.moveaxis(x, 1, 3).astype(dtype)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def close(found, wanted, tolerance):
    """Relative to the largest entry, as gradients are compared."""
    assert np.abs(np.asarray(found) - wanted).max() <= tolerance * np.abs(wanted).max()


def both(loss, *students):
    """Mean over the batch, and its gradients, compiled."""
    places = tuple(range(len(students)))
    return jax.tree.map(
        np.asarray, jax.jit(jax.value_and_grad(lambda *s: loss(*s).mean(), places))(*students)
    )


# --- fixtures -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_hierarchical_context_fixture(dtype):
    """Three stages, of which one is a pooled feature of one position."""
    kind, tolerance = DTYPES[dtype]
    g = golden("reviewkd_hcl")
    students = [nhwc(g[f"in__f_s{i}"], kind) for i in range(3)]
    teachers = [nhwc(g[f"in__f_t{i}"], kind) for i in range(3)]

    def stages(*students):
        return jnp.stack(
            [_overhaul.hierarchical_context(s, t) for s, t in zip(students, teachers, strict=True)],
            axis=1,
        ).sum(1)

    with jax.enable_x64(dtype == "float64"):
        value, grads = both(stages, *students)
        first, _ = both(lambda s: _overhaul.hierarchical_context(s, teachers[0]), students[0])
    np.testing.assert_allclose(value, g["loss__mdistiller__sum"], rtol=tolerance)
    np.testing.assert_allclose(first, g["loss__mdistiller__stage0"], rtol=tolerance)
    for i, grad in enumerate(grads):
        close(grad, nhwc(g[f"grad__f_s{i}__mdistiller__sum"]), tolerance)


def test_ofd_margin_fixture():
    """Negative scales and channels that are hardly ever negative are among them."""
    g = golden("ofd")
    odd = 0
    for i in range(2):
        scale, bias = g[f"in__teacher_bn{i}_weight"], g[f"in__teacher_bn{i}_bias"]
        wanted = g[f"aux__mdistiller__margin{i}"].reshape(-1)
        np.testing.assert_allclose(_overhaul.ofd_margin(scale, bias), wanted, rtol=2e-5)
        with jax.enable_x64(True):
            exact = _overhaul.ofd_margin(scale.astype(np.float64), bias.astype(np.float64))
            np.testing.assert_allclose(exact, wanted, rtol=1e-6)
        odd += int((scale < 0).any()) + int(np.isclose(wanted, -3 * np.abs(scale)).any())
    assert odd == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_kdsvd_fixture(dtype):
    """Signs as the published run had them; float32 of that run itself is 6e-5 off in gradients."""
    kind, tolerance = DTYPES[dtype]
    g = golden("kdsvd")
    students = [nhwc(g[f"in__f_s{i}"], kind) for i in range(2)]
    teachers = [nhwc(g[f"in__f_t{i}"], kind) for i in range(2)]
    with jax.enable_x64(dtype == "float64"):
        value, grads = both(aligned_loss(g, "repdistiller", teachers), *students)
    np.testing.assert_allclose(value, g["loss__repdistiller__sum"], rtol=tolerance)
    for i, grad in enumerate(grads):
        wanted = nhwc(g[f"grad__f_s{i}__repdistiller__sum"])
        close(grad, wanted, 1e-9 if dtype == "float64" else 1e-4)


def test_kdsvd_other_axes_fixture():
    """mdistiller's other matrices, [C H, W]; its numbers are of float32 precision."""
    g = golden("kdsvd_mdistiller_axes")
    # As a map of one row, [B, C H, 1, W], whose channels are the columns.
    students, teachers = (
        [nchw.reshape(len(nchw), -1, 1, nchw.shape[3]).astype(np.float64) for nchw in side]
        for side in ([g[f"in__f_{x}{i}"] for i in range(2)] for x in "st")
    )
    with jax.enable_x64(True):
        value, grads = both(aligned_loss(g, "mdistiller", teachers), *students)
    np.testing.assert_allclose(value, g["loss__mdistiller__sum"], rtol=1e-5)
    for i, grad in enumerate(grads):
        wanted = g[f"grad__f_s{i}__mdistiller__sum"]
        close(grad, wanted.reshape(grad.shape), 1e-3)


def aligned_loss(g, code, teachers):
    """KDSVD with the teacher's vectors in the signs of the published run."""
    published = []
    for i, t in enumerate(teachers):
        vectors, values = decompose(jnp.asarray(t), 1)
        given = g[f"aux__{code}__teacher_v{i}"].astype(vectors.dtype)
        vectors = vectors * np.sign(np.sum(vectors * given, axis=1, keepdims=True))
        np.testing.assert_allclose(vectors, given, atol=1e-5)
        published.append((vectors, values))

    def loss(*students):
        found = [
            _channels.aligned(decompose(s, 4)[0], *t)
            for s, t in zip(students, published, strict=True)
        ]
        return _channels.relations_of_stages(*zip(*found, strict=True))

    return loss


@functools.partial(jax.jit, static_argnums=1)
def decompose(maps, count):
    return _channels.singular_vectors(_channels.matrices(maps), count)


# --- by hand --------------------------------------------------------------------------------


def test_hierarchical_context_levels():
    """Each level sees only what survives its average, with half the weight of the one before."""
    board = np.indices((8, 8)).sum(0) % 2 * 2.0 - 1  # +1 and -1, of mean 0 in every window
    student = np.broadcast_to(board[None, :, :, None], (1, 8, 8, 3)).astype(np.float32)
    zeros = np.zeros_like(student)
    np.testing.assert_allclose(_overhaul.hierarchical_context(student, zeros), 1 / 1.875)
    one = _overhaul.hierarchical_context(student + 1, zeros, levels=(4,))
    np.testing.assert_allclose(one, (2 + 0.5) / 1.5, rtol=1e-6)
    none = _overhaul.hierarchical_context(student, zeros, levels=(8, 16))
    np.testing.assert_allclose(none, 1.0)
    # A level must be below height and width.
    flat = np.ones((1, 8, 2, 3), np.float32)
    np.testing.assert_allclose(_overhaul.hierarchical_context(flat, 0 * flat), 1.0, rtol=1e-6)


def test_ofd_margin_is_a_mean():
    rng = np.random.default_rng(0)
    for scale, bias in ((0.7, 0.4), (-1.3, -2.0), (0.2, 0.5)):
        draws = rng.normal(bias, abs(scale), 400_000)
        margin = _overhaul.ofd_margin(np.float32([scale]), np.float32([bias]))
        np.testing.assert_allclose(margin[0], draws[draws < 0].mean(), rtol=0.02)
        exact = stats.truncnorm.mean(-np.inf, -bias / abs(scale), bias, abs(scale))
        np.testing.assert_allclose(margin[0], exact, rtol=1e-5)


def test_ofd_margin_without_spread():
    """Where the published code divides by 0; and far out, where probabilities underflow."""
    scale, bias = jnp.array([0.0, 0.0, 0.0, 1e-6, 2.0]), jnp.array([-2.0, 3.0, 0.0, 5.0, 1e6])
    margin = _overhaul.ofd_margin(scale, bias)
    np.testing.assert_allclose(margin, [-2.0, 0.0, 0.0, -3e-6, -6.0])
    for grad in jax.grad(lambda *a: _overhaul.ofd_margin(*a).sum(), (0, 1))(scale, bias):
        assert np.isfinite(grad).all()


def test_ofd_is_the_published_formula():
    """As coded, of which ours is a shorter form, with pooling of a larger teacher."""
    s, t = random(3, 4, 4, 5), random(3, 8, 8, 5, seed=1)
    m = -np.abs(random(5, seed=2))
    pooled = t.reshape(3, 4, 2, 4, 2, 5).mean((2, 4))
    wanted = (
        (s - m) ** 2 * ((s > m) & (pooled <= m))
        + (s - pooled) ** 2 * ((s > pooled) & (pooled > m) & (pooled <= 0))
        + (s - pooled) ** 2 * (pooled > 0)
    ).sum((1, 2, 3))
    with jax.enable_x64(True):
        np.testing.assert_allclose(_overhaul.ofd(s, t, margin=m), wanted, rtol=1e-12)


# --- invariances ----------------------------------------------------------------------------


def test_ofd_ignores_what_the_activation_drops():
    t = -np.abs(random(2, 3, 3, 4)).astype(np.float32)
    margin = np.full(4, -0.3, np.float32)
    target = np.maximum(t, margin)
    loss = lambda s: _overhaul.ofd(s, t, margin=margin)  # noqa: E731
    assert not np.any(loss(target - 5))
    assert not np.any(jax.grad(lambda s: loss(s).sum())(jnp.asarray(target - 5)))
    assert np.all(loss(target + 0.1) > 0)


def test_ickd_invariances():
    """Of the scale of either side, the places' order and number, and one order of the channels."""
    s, t = random(3, 4, 4, 6), random(3, 2, 5, 6, seed=1)
    with jax.enable_x64(True):
        value = _channels.ickd(s, t)
        np.testing.assert_allclose(_channels.ickd(1e3 * s, 1e-3 * t), value, rtol=1e-9)
        places = s.reshape(3, 16, 6)[:, np.random.default_rng(3).permutation(16)]
        np.testing.assert_allclose(_channels.ickd(places.reshape(s.shape), t), value, rtol=1e-9)
        order = [3, 1, 0, 2, 5, 4]
        np.testing.assert_allclose(_channels.ickd(s[..., order], t[..., order]), value, rtol=1e-9)
        twice = np.concatenate([s, s], axis=1)
        np.testing.assert_allclose(_channels.ickd(s, twice), 0, atol=1e-24)
        assert np.all(np.abs(_channels.ickd(s[..., order], t) - value) > 1e-3)


def kdsvd_inputs(k=1, kind=np.float64):
    shapes = ((4, 5, 5, 6), (4, 2, 3, 9))  # more positions than channels, and fewer
    return [np.abs(random(*shape, seed=k + i)).astype(kind) for k in (0, 2) for i, shape in
            enumerate(shapes)]  # fmt: skip


def test_kdsvd_is_that_of_numpy():
    """With NumPy's decomposition, our signs and the published matching."""

    def vectors(x, n):
        _, s, v = np.linalg.svd(x.reshape(len(x), -1, x.shape[3]), full_matrices=False)
        return np.swapaxes(v, 1, 2)[:, :, :n], s[:, :n] / np.linalg.norm(s[:, :n], axis=1)[:, None]

    s_low, s_high, t_low, t_high = kdsvd_inputs()
    stages = []
    for s, t in ((s_low, t_low), (s_high, t_high)):
        (v_s, _), (v_t, sizes) = vectors(s, 5), vectors(t, 2)
        v_t = v_t * np.where((v_t * np.abs(v_t)).sum(1, keepdims=True) < 0, -1, 1)
        cosine = np.einsum("bcm,bck->bmk", v_s, v_t)
        best = np.abs(cosine).argmax(1)[:, None]
        matched = np.take_along_axis(v_s, best, 2) * np.sign(np.take_along_axis(cosine, best, 1))
        stages.append((matched * sizes[:, None], v_t * sizes[:, None]))
    related = [
        np.exp(-((high[:, :, None] - low[:, None]) ** 2) / 8)
        for low, high in zip(*stages, strict=True)
    ]
    with jax.enable_x64(True):
        found = _channels.kdsvd(s_low, s_high, t_low, t_high, k=2)
    np.testing.assert_allclose(found, ((related[0] - related[1]) ** 2).sum((1, 2, 3)), rtol=1e-9)


def test_kdsvd_invariances():
    """Of signs and scales of whole maps, of rotations of the places, and of the solver's signs."""
    inputs = kdsvd_inputs()
    with jax.enable_x64(True):
        value = _channels.kdsvd(*inputs, k=2)
        assert np.all(value > 1e-4)
        for i in range(4):
            changed = [-3.0 * x if i == j else x for j, x in enumerate(inputs)]
            np.testing.assert_allclose(_channels.kdsvd(*changed, k=2), value, rtol=1e-8)
        rotation = np.linalg.qr(random(25, 25))[0]
        turned = np.einsum("mn,bnc->bmc", rotation, inputs[0].reshape(4, 25, 6))
        turned = turned.reshape(inputs[0].shape)
        np.testing.assert_allclose(_channels.kdsvd(turned, *inputs[1:], k=2), value, rtol=1e-8)


@pytest.mark.parametrize("place", [0, 1])
def test_kdsvd_gradient(place):
    """Of both stages: more positions than channels, and fewer."""
    inputs = kdsvd_inputs()
    with jax.enable_x64(True):
        rest = [jnp.asarray(x) for x in inputs]

        def loss(s):
            return _channels.kdsvd(*rest[:place], s, *rest[place + 1 :], k=2).sum()

        check_grads(jax.jit(loss), (rest[place],), order=1, eps=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["ickd", "kdsvd", "ofd", "hierarchical_context"])
@pytest.mark.parametrize("kind", ["zero", "equal", "repeated", "constant"])
def test_gradients_are_finite(name, kind):
    """At zero features, at the teacher's own, at repeated singular values, at rank one."""
    eye = np.eye(4, dtype=np.float32).reshape(1, 2, 2, 4)
    x = {
        "zero": np.zeros_like(eye),
        "equal": random(1, 2, 2, 4, seed=3).astype(np.float32),
        "repeated": eye,  # all singular values are 1
        "constant": np.ones_like(eye),
    }[kind]
    t = x if kind == "equal" else random(1, 2, 2, 4, seed=5).astype(np.float32)
    loss = {
        "ickd": lambda s: _channels.ickd(s, t),
        "kdsvd": lambda s: _channels.kdsvd(s, s, t, t, k=1),
        "ofd": lambda s: _overhaul.ofd(s, t, margin=jnp.full(4, -0.5)),
        "hierarchical_context": lambda s: _overhaul.hierarchical_context(s, t, levels=(1,)),
    }[name]
    value, (grad,) = both(loss, x)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    if kind == "equal":
        np.testing.assert_allclose(value, 0, atol=1e-9)
        np.testing.assert_allclose(grad, 0, atol=1e-5)


def test_a_failure_is_seen():
    """NaN of a row that counts is passed on, and of one that doesn't isn't."""
    t = random(2, 2, 2, 3, seed=1).astype(np.float32)
    s = t.copy()
    s[1] = np.nan
    where = np.array([True, False])
    margin = jnp.full(3, -0.5)
    for loss in (
        lambda **k: _channels.ickd(s, t, **k),
        lambda **k: _channels.kdsvd(s, s, t, t, **k),
        lambda **k: _overhaul.hierarchical_context(s, t, **k),
        lambda **k: _overhaul.ofd(s, -np.abs(t), margin=margin, **k),
    ):
        assert np.isnan(loss()[1])
        assert np.isfinite(loss(where=where)).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: _channels.ickd(x[0], x), ValueError, "student must have 4 dimensions"),
        (lambda x: _channels.ickd(x, x[..., :2]), ValueError, r"teacher must have shape \(2, 4, 4"),
        (lambda x: _channels.ickd(x, x.astype(int)), TypeError, "teacher must be a floating"),
        (lambda x: _channels.kdsvd(x, x, x, x, k=0), ValueError, "k must be an integer at least 1"),
        (lambda x: _channels.kdsvd(x, x, x, x, k=4), ValueError, "k must be at most 3"),
        (lambda x: _channels.kdsvd(x, x[:1], x, x), ValueError, "student_high must have shape"),
        (
            lambda x: _channels.kdsvd(x, x, x, x[..., :2]),
            ValueError,
            "teacher_high must have shape",
        ),
        (lambda x: _overhaul.ofd(x, x, margin=x), ValueError, "margin must have 1 dim"),
        (
            lambda x: _overhaul.ofd(x, x, margin=x[0, 0, 0, :2]),
            ValueError,
            "margin must have shape",
        ),
        (lambda x: _overhaul.ofd_margin(x[0, 0, 0], x[0, 0, 0, :2]), ValueError, "bias must have"),
        (lambda x: _overhaul.hierarchical_context(x, x[:, :2]), ValueError, "teacher must have sh"),
        (
            lambda x: _overhaul.hierarchical_context(x, x, levels=(0,)),
            ValueError,
            "levels must be an integer at least 1",
        ),
        (
            lambda x: _overhaul.hierarchical_context(x, x, where=np.ones(2)),
            TypeError,
            "where must be a boolean",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(random(2, 4, 4, 3).astype(np.float32))
