"""FAB against the published code's distances, and its projections against what they must be."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import attacks
from kdjax.attacks import _hyperplane

GOLDEN = dict(np.load(Path(__file__).parent / "golden_fab.npz"))
MOVES = {"linf": jax.jit(_hyperplane.linf_move), "l2": jax.jit(_hyperplane.l2_move)}
NORMS = ("linf", "l2")


def lengths(d, norm):
    flat = np.asarray(d).reshape(len(d), -1)
    return np.abs(flat).max(1) if norm == "linf" else np.sqrt((flat * flat).sum(1))


# Projections


def planes(rng, rows=40, d=12):
    """Points, normals and offsets such that the box has points on both sides."""
    x, w = rng.uniform(size=(rows, d)), rng.normal(size=(rows, d))
    w[rng.uniform(size=w.shape) < 0.2] = 0
    x[rng.uniform(size=x.shape) < 0.2] = 0
    x[rng.uniform(size=x.shape) < 0.2] = 1
    w[:, 0] = 1.0
    low, high = np.minimum(w, 0).sum(1), np.maximum(w, 0).sum(1)
    b = low + rng.uniform(0.02, 0.98, size=rows) * (high - low)
    return x, w, b


def move(norm, x, w, b):
    with jax.enable_x64(True):
        found = MOVES[norm](jnp.asarray(x), jnp.asarray(w), jnp.asarray((w * x).sum(1) - b))
        return np.asarray(found)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_the_published_codes(norm):
    x, w, b = GOLDEN["proj_points"], GOLDEN["proj_w"], GOLDEN["proj_b"]
    np.testing.assert_allclose(move(norm, x, w, b), GOLDEN[f"proj_{norm}"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_lies_on_the_hyperplane_inside_the_box_and_nothing_there_is_nearer(norm):
    rng = np.random.default_rng(0)
    x, w, b = planes(rng)
    p = x + move(norm, x, w, b)
    np.testing.assert_allclose((w * p).sum(1), b, rtol=0, atol=1e-12)
    assert p.min() >= 0
    assert p.max() <= 1 + 1e-15
    compared = 0
    for _ in range(300):
        # Where a segment between two sides crosses; a part of the way there from p is allowed too.
        u, v = rng.uniform(size=x.shape), rng.uniform(size=x.shape).round()
        fu, fv = (w * u).sum(1) - b, (w * v).sum(1) - b
        across = fu * fv < 0
        s = np.where(across, fu / np.where(across, fu - fv, 1), 0)[:, None]
        for share in (1e-3, 0.1, 1.0):
            other = p + share * (u + s * (v - u) - p)
            assert (lengths(other - x, norm) >= lengths(p - x, norm) - 1e-12)[across].all()
        compared += across.sum()
    assert compared > 2000


@pytest.mark.parametrize("norm", NORMS)
def test_out_of_reach_the_projection_is_the_corner_that_comes_nearest(norm):
    rng = np.random.default_rng(1)
    x, w, _ = planes(rng)
    beyond = np.where(np.arange(len(x)) % 2, 1.0, -1.0)
    b = np.where(beyond > 0, np.maximum(w, 0).sum(1) + 0.5, np.minimum(w, 0).sum(1) - 0.5)
    corner = np.where(w * beyond[:, None] > 0, 1.0, 0.0)
    expected = np.where(w == 0, 0, corner - x)
    np.testing.assert_allclose(move(norm, x, w, b), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_of_degenerate_rows(norm):
    x = np.array([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.0, 1.0, 0.5], [0.0, 1.0, 0.0]])
    w = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0], [-1.0, 1.0, 1.0]])
    # No normal; on the plane already; no room at all; room in one entry.
    residual = np.array([0.3, 0.0, -0.7, -0.25])
    expected = np.zeros((4, 3))
    expected[3, 2] = 0.25
    got = move(norm, x, w, (w * x).sum(1) - residual)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_depends_on_the_hyperplane_and_not_on_how_it_is_written(norm):
    x, w, b = planes(np.random.default_rng(2))
    once = move(norm, x, w, b)
    for scale in (-1.0, 1e-30, -1e30):
        np.testing.assert_allclose(move(norm, x, scale * w, scale * b), once, rtol=0, atol=1e-12)
    order = np.random.default_rng(3).permutation(x.shape[1])
    again = move(norm, x[:, order], w[:, order], b)
    np.testing.assert_allclose(again, once[:, order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-25])
@pytest.mark.parametrize("norm", NORMS)
def test_projection_in_float32(norm, scale):
    rng = np.random.default_rng(4)
    x, w, b = planes(rng, rows=12, d=784)
    # Weights over eight orders of magnitude, as gradients of images have them.
    w *= 10.0 ** rng.uniform(-8, 0, size=w.shape)
    low, high = np.minimum(w, 0).sum(1), np.maximum(w, 0).sum(1)
    b = low + rng.uniform(0.1, 0.9, size=len(x)) * (high - low)
    x, w = x.astype(np.float32), w.astype(np.float32)
    residual = (w.astype(np.float64) * x).sum(1) - b
    exact = move(norm, x.astype(np.float64), w.astype(np.float64), b)
    given = (w * np.float32(scale), np.float32(residual * scale))
    single = MOVES[norm](jnp.asarray(x), *map(jnp.asarray, given))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, exact, rtol=0, atol=3e-6)
    hit = (w.astype(np.float64) * (x + np.asarray(single, np.float64))).sum(1)
    np.testing.assert_allclose(hit, b, rtol=0, atol=2e-6 * np.abs(w).sum(1).max())
    assert (x + np.asarray(single)).min() >= 0
    assert (x + np.asarray(single)).max() <= 1


# The attack

TRACES = []


def mlp(x, params=GOLDEN):
    v = x.reshape(len(x), -1)
    for i in range(3):
        w, b = params[f"params_W{i}"], params[f"params_b{i}"]
        v = v @ jnp.asarray(w, x.dtype) + jnp.asarray(b, x.dtype)[None]
        v = jax.nn.relu(v) if i < 2 else v
    return v


@partial(jax.jit, static_argnames=("norm", "steps", "restarts"))
def attack(x, y, eps, targets=None, key=None, *, norm="linf", steps=20, restarts=1):
    TRACES.append(eps)
    return attacks.fab(
        mlp, x, y, eps=eps, norm=norm, targets=targets, steps=steps, restarts=restarts, key=key
    )


def runner_up(x):
    return jnp.argsort(mlp(x), axis=1)[:, -2]


def batch(dtype=np.float32, rows=None):
    """Images that are all classified correctly, labels, and targets."""
    x, y = jnp.asarray(GOLDEN["x"][:rows].astype(dtype)), jnp.asarray(GOLDEN["y"][:rows])
    return x, y, runner_up(x)


@pytest.mark.parametrize("steps", [5, 20, 100])
@pytest.mark.parametrize("norm", NORMS)
def test_targeted_distances_are_the_published_codes(norm, steps):
    name = f"fabt_{'Linf' if norm == 'linf' else 'L2'}_k2_n{steps}"
    with jax.enable_x64(True):
        x, y, targets = batch(np.float64)
        found = attack(x, y, 0.1, targets, norm=norm, steps=steps)
        assert found.distance.dtype == jnp.float64
        np.testing.assert_allclose(found.distance, GOLDEN[name + "_dist"], rtol=1e-6)
        if steps == 20:
            np.testing.assert_allclose(found.x_closest, GOLDEN[name + "_x_adv"], rtol=0, atol=1e-8)


@pytest.mark.parametrize("norm", NORMS)
def test_untargeted_distances_are_the_published_codes(norm):
    name = f"fab_{'Linf' if norm == 'linf' else 'L2'}_untargeted_n20_dist"
    with jax.enable_x64(True):
        x, y, _ = batch(np.float64)
        found = attack(x, y, 0.1, norm=norm)
        np.testing.assert_allclose(found.distance, GOLDEN[name], rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_what_comes_back_in_float32(norm):
    x, y, targets = batch()
    wrong = y.at[:2].set((y[:2] + 1) % 10)
    eps = 0.2 if norm == "linf" else 0.7
    found = attack(x, wrong, eps, targets, norm=norm)
    distance = np.asarray(found.distance)
    golden = GOLDEN[f"fabt_{'Linf' if norm == 'linf' else 'L2'}_k2_n20_dist"]
    np.testing.assert_allclose(distance[2:], golden[2:], rtol=1e-4)
    # Misclassified already: nothing to find, and never robust.
    assert (distance[:2] == 0).all()
    np.testing.assert_array_equal(found.x_adv[:2], x[:2])
    np.testing.assert_array_equal(found.x_closest[:2], x[:2])

    np.testing.assert_array_equal(found.robust, distance > eps)
    assert 5 < found.robust.sum() < 25
    np.testing.assert_allclose(lengths(found.x_closest - x, norm), distance, rtol=1e-5)
    for images in (found.x_adv, found.x_closest):
        assert images.min() >= 0
        assert images.max() <= 1
    assert lengths(found.x_adv - x, norm).max() <= eps + 1e-6
    assert (jnp.argmax(mlp(found.x_closest), 1) != wrong).all()
    np.testing.assert_array_equal(jnp.argmax(mlp(found.x_adv), 1) == wrong, found.robust)
    np.testing.assert_array_equal(found.x_adv[found.robust], x[found.robust])


def test_more_steps_never_find_less():
    with jax.enable_x64(True):
        x, y, targets = batch(np.float64)
        before = np.full(len(x), np.inf)
        for steps in (0, 5, 20):
            found = attack(x, y, 0.1, targets, steps=steps)
            assert (np.asarray(found.distance) <= before).all()
            if steps == 0:
                assert np.isinf(found.distance).all()
                assert found.robust.all()
                np.testing.assert_array_equal(found.x_adv, x)
            before = np.asarray(found.distance)
        assert np.isfinite(before).all()


def test_with_eps_0_nothing_changes_and_eps_does_not_recompile():
    with jax.enable_x64(True):
        x, y, targets = batch(np.float64)
        none = attack(x, y, 0.0, targets, steps=5)
        traces = len(TRACES)
        some = attack(x, y, 0.2, targets, steps=5)
        assert len(TRACES) == traces
        np.testing.assert_array_equal(none.x_adv, x)
        assert none.robust.all()
        np.testing.assert_array_equal(none.distance, some.distance)
        assert not some.robust.all()


@pytest.mark.parametrize(("norm", "targeted"), [("linf", True), ("l2", False)])
def test_the_distance_of_an_affine_model(norm, targeted):
    rng = np.random.default_rng(5)
    w = rng.normal(size=(1, 64)) / 8
    with jax.enable_x64(True):
        x = jnp.asarray(rng.uniform(size=(16, 64)))
        b = (w * np.asarray(x)).sum(1) + np.where(np.arange(16) % 2, 0.3, -0.3)

        def logits_fn(v):
            f = (v @ w.T)[:, 0] - b
            return jnp.stack([f, jnp.zeros_like(f)], axis=1)

        y = jnp.argmax(logits_fn(x), 1)
        residual = (w * x).sum(1) - b
        exact = lengths(MOVES[norm](x, jnp.tile(w, (16, 1)), residual), norm)
        targets = 1 - y if targeted else None
        found = attacks.fab(logits_fn, x, y, eps=1.0, norm=norm, targets=targets, steps=30)
        assert (found.distance >= exact * (1 - 1e-9)).all()
        np.testing.assert_allclose(found.distance, exact, rtol=0.01)


@pytest.mark.parametrize("norm", NORMS)
def test_an_image_depends_on_itself_alone_and_restarts_only_add(norm):
    with jax.enable_x64(True):
        x, y, _ = batch(np.float64, rows=8)
        keys = jax.random.split(jax.random.key(0), 8)
        run = partial(attack, norm=norm, steps=5, restarts=2)
        whole = run(x, y, 0.2, None, keys)
        order = jnp.array([6, 1, 4, 0, 3, 7, 5, 2])
        moved = run(x[order], y[order], 0.2, None, keys[order])
        np.testing.assert_allclose(moved.distance, whole.distance[order], rtol=1e-9)
        np.testing.assert_allclose(moved.x_closest, whole.x_closest[order], rtol=0, atol=1e-9)
        beside = run(x.at[4:].set(0.5), y.at[4:].set(0), 0.2, None, keys)
        np.testing.assert_allclose(beside.distance[:4], whole.distance[:4], rtol=1e-9)
        once = attack(x, y, 0.2, norm=norm, steps=5)
        assert (whole.distance <= once.distance * (1 + 1e-12)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_are_half_of_eps_away_and_are_checked(norm):
    x = jnp.full((4, 3, 2), 0.5)

    def logits_fn(v):  # wrong only as far away as starts are, with gradients that are 0
        far = lengths_of(v - 0.5) > 0.095
        return jax.lax.stop_gradient(jax.nn.one_hot(far.astype(int), 2))

    def lengths_of(d):
        return jnp.linalg.norm(d.reshape(4, -1), jnp.inf if norm == "linf" else 2, axis=1)

    y = jnp.zeros(4, int)
    again = attacks.fab(
        logits_fn, x, y, eps=0.2, norm=norm, steps=1, restarts=2, key=jax.random.key(0)
    )
    assert not again.robust.any()
    np.testing.assert_allclose(again.distance, 0.1, rtol=1e-5)
    np.testing.assert_allclose(lengths(again.x_adv - x, norm), 0.1, rtol=1e-5)
    assert len(np.unique(again.x_adv.sum((1, 2)))) == 4


@pytest.mark.parametrize("targeted", [True, False])
def test_logits_that_are_not_finite_are_never_robust(targeted):
    """Rows: sound, NaN at once, NaN farther away than 0.15, only a gradient that is NaN."""
    x = jnp.full((4, 2), 0.5)
    row = jnp.arange(4)
    slopes = jnp.arange(3.0)[None]

    def logits_fn(v):
        # The first class wins until the sum has grown by 0.4.
        away = v.sum(1) - 1.0
        z = jnp.stack([0.4 - away, jnp.zeros_like(away), jnp.full_like(away, -1.0)], axis=1)
        nan = (row == 1) | ((row == 2) & (away > 0.3))
        z = jnp.where(nan[:, None], jnp.nan, z)
        steep = jnp.sqrt(jnp.where(row == 3, v[:, 0] - 0.5, 1.0)) - (row != 3)
        return z + steep[:, None] * slopes

    y = jnp.zeros(4, int)
    targets = jnp.ones(4, int) if targeted else None
    run = jax.jit(lambda x, eps: attacks.fab(logits_fn, x, y, eps=eps, targets=targets, steps=5))
    found = run(x, 0.25)
    np.testing.assert_array_equal(found.robust, [False, False, False, True])
    np.testing.assert_allclose(found.distance[0], 0.2, rtol=0.01)
    assert found.distance[1] == 0
    assert jnp.isfinite(found.x_adv).all()
    # One farther away than eps says nothing about eps.
    near = run(x, 0.1)
    np.testing.assert_array_equal(near.robust, [True, False, True, True])


def test_targets_that_are_no_targets_inside_jit():
    with jax.enable_x64(True):
        x, y, targets = batch(np.float64)
        targets = targets.at[:3].set(jnp.array([y[0], 10, -1]))
        found = attack(x, y, 0.0, targets, steps=5)
        assert not found.robust[:3].any()
        assert found.robust[3:].all()
        np.testing.assert_array_equal(found.x_adv, x)


def test_low_precision_logits_and_no_jit():
    x, y, targets = batch(rows=8)
    exact = GOLDEN["fabt_Linf_k2_n5_dist"][:8]
    for dtype, rtol in ((jnp.float32, 1e-4), (jnp.bfloat16, 0.3)):

        def logits_fn(v, dtype=dtype):
            return mlp(v).astype(dtype)

        found = attacks.fab(logits_fn, x, y, eps=0.2, targets=targets, steps=5)
        assert found.distance.dtype == found.x_adv.dtype == jnp.float32
        np.testing.assert_allclose(found.distance, exact, rtol=rtol)


@pytest.mark.parametrize("targeted", [True, False])
def test_passes_through_the_model(targeted):
    """A step: forward and backward at the iterate (a loop of backwards over classes), forward."""
    x, y, targets = batch(rows=8)
    calls = []

    def logits_fn(v):
        calls.append(v)
        return mlp(v)

    aims = targets if targeted else None
    program = jax.make_jaxpr(partial(attacks.fab, logits_fn, eps=0.2, targets=aims))(x, y)
    assert len(calls) == 3  # the first is outside of the loop
    assert str(program).count("dot_general[") == 3 * (1 + 3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": np.full((2, 4), 1.5, np.float32)}, ValueError, "x must be images"),
        ({"x": np.ones((2, 4), int)}, TypeError, "x must be floating-point"),
        ({"labels": np.array([0, 3])}, ValueError, "labels must be class indices from 0 to 2"),
        ({"labels": np.array([0])}, ValueError, "labels must have shape"),
        ({"targets": np.array([1, 3])}, ValueError, "targets must be class indices from 0 to 2"),
        ({"targets": np.array([1.0, 2.0])}, TypeError, "targets must be an integer"),
        ({"targets": np.array([1])}, ValueError, "targets must have shape"),
        ({"targets": np.array([1, 0])}, ValueError, "targets must be classes other than"),
        ({"eps": -0.1}, ValueError, "eps must be"),
        ({"norm": "l1"}, ValueError, "norm must be one of"),
        ({"steps": -1}, ValueError, "steps must be"),
        ({"steps": 2.0}, TypeError, "steps must be"),
        ({"restarts": 0}, ValueError, "restarts must be"),
        ({"restarts": 2}, TypeError, "key must be given"),
        ({"restarts": 2, "key": np.zeros(2, np.uint32)}, TypeError, "key must be a typed key"),
        ({"alpha_max": 1.5}, ValueError, "alpha_max must be"),
        ({"eta": 0.0}, ValueError, "eta must be"),
        ({"beta": float("nan")}, ValueError, "beta must be"),
        ({"logits_fn": lambda v: v[:, 0]}, ValueError, "logits_fn must return"),
        ({"logits_fn": lambda v: v[:, :1]}, ValueError, "at least 2 classes"),
        ({"logits_fn": None}, TypeError, "logits_fn must be a function"),
    ],
)
def test_bad_input(change, error, words):
    good = {
        "logits_fn": lambda v: v[:, :3],
        "x": np.tile(np.array([0.9, 0.1, 0.2, 0.3], np.float32), (2, 1)),
        "labels": np.array([0, 0]),
        "eps": 0.1,
        "steps": 1,
    }
    with pytest.raises(error, match=words):
        attacks.fab(**(good | change))
