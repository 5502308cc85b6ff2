"""Auto-PGD against numbers of the published code, and what must hold whatever the model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kdjax import attacks, losses
from kdjax.attacks import _inputs
from kdjax.attacks._apgd import checkpoints

GOLDEN = np.load(Path(__file__).parent / "golden_apgd.npz")
NORMS, STEPS = ("linf", "l2"), (1, 5, 20, 100)
SHAPE = (4, 3, 3, 1)
KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 8)


def published_model(x):
    hidden = x.reshape(len(x), -1)
    for i in range(3):
        weight, bias = (jnp.asarray(GOLDEN[f"{kind}{i}"], x.dtype) for kind in "Wb")
        hidden = hidden @ weight + bias[None]
        hidden = jax.nn.relu(hidden) if i < 2 else hidden
    return hidden


def published_case(norm, eps):
    x = jnp.asarray(GOLDEN["x16"] / 16)
    radius = GOLDEN["eps"][eps] * (1.0 if norm == "linf" else GOLDEN["l2_factor"])
    return x, jnp.asarray(GOLDEN["y"], jnp.int32), radius, jnp.asarray(GOLDEN[f"{norm}_noise"])


@partial(jax.jit, static_argnums=1)
def bumpy(x, classes=5):
    """Smooth logits whose every row is computed alone, with many hills for starts to matter."""
    flat = x.reshape(len(x), -1, 1)
    weights = jnp.sin(jnp.arange(1.0, flat.shape[1] * classes + 1) ** 2)
    weights = weights.reshape(1, flat.shape[1], classes).astype(x.dtype)
    return (weights * jnp.sin(8 * flat + 3 * weights)).sum(1)


@partial(jax.jit, static_argnames=("seed", "count", "dtype"))
def small(seed=0, count=SHAPE[0], dtype=jnp.float32):
    x = jax.random.uniform(jax.random.key(seed), (count, *SHAPE[1:]), dtype)
    x = x.at[0, 0, 0, 0].set(0.0).at[0, 1, 0, 0].set(1.0)
    return x, bumpy(x).argmax(-1)


@partial(jax.jit, static_argnames=("norm", "steps", "restarts", "loss"))
def attack(x, labels, eps, key, *, norm="linf", steps=7, restarts=1, loss=losses.dlr):
    return attacks.apgd(
        bumpy, x, labels, eps=eps, norm=norm, steps=steps, restarts=restarts, loss=loss, key=key
    )


def distances(x_adv, x, norm):
    offset = np.asarray(x_adv, np.float64) - np.asarray(x, np.float64)
    offset = offset.reshape(len(x), -1)
    return np.abs(offset).max(1) if norm == "linf" else np.linalg.norm(offset, axis=1)


# The published code


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("steps", STEPS)
def test_matches_the_published_runs(norm, steps):
    at = NORMS.index(norm), slice(None), slice(None), STEPS.index(steps)
    with jax.enable_x64(True):
        x, labels, _, noise = published_case(norm, 0)

        @jax.jit  # one program for both losses: where keeps the other's gradient out exactly
        def run(x, eps, ratio):
            def loss(logits, labels):
                cross_entropy = losses.hard_label_cross_entropy(logits, labels)
                return jnp.where(ratio, losses.dlr(logits, labels), cross_entropy)

            return attacks.apgd(
                published_model, x, labels, eps=eps, norm=norm, loss=loss, steps=steps, noise=noise
            )

        for kind in (0, 1):
            for eps in (0, 1):
                found = run(x, published_case(norm, eps)[2], kind == 1)
                robust = GOLDEN["robust"][at][kind, eps]
                best = GOLDEN["loss_best"][at][kind, eps]
                assert (np.asarray(found.robust) == robust).sum() >= 31
                assert np.isclose(found.loss_best, best, rtol=1e-6, atol=0).sum() >= 28
                if steps == 5 and eps == 0:
                    wanted = GOLDEN["x_best_n5"][NORMS.index(norm), kind]
                    off = np.abs(np.asarray(found.x_best)[:8] - wanted).max((1, 2, 3))
                    assert (off < 1e-8).sum() >= 6
                if steps == 20 and norm == "linf" and (kind, eps) == (0, 0):
                    off = np.abs(np.asarray(found.x_adv)[~robust] - GOLDEN["x_adv_n20"])
                    assert (off.max((1, 2, 3)) < 1e-8).mean() >= 0.75


@pytest.mark.parametrize("norm", NORMS)
def test_targeted_matches_the_published_runs(norm):
    with jax.enable_x64(True):
        x, labels, _, noise = published_case(norm, 0)

        @jax.jit
        def run(x, eps, targets):
            return attacks.apgd_targeted(
                published_model, x, labels, targets=targets, eps=eps, norm=norm, steps=20,
                noise=noise,
            )  # fmt: skip

        for eps in (0, 1):
            for k in (0, 1):
                targets = jnp.asarray(GOLDEN["targets"][k], jnp.int32)
                found = run(x, published_case(norm, eps)[2], targets)
                at = NORMS.index(norm), eps, k
                assert (np.asarray(found.robust) == GOLDEN["targeted_robust"][at]).sum() >= 31
                best = GOLDEN["targeted_loss_best"][at]
                assert np.isclose(found.loss_best, best, rtol=1e-6, atol=1e-12).sum() >= 28


@pytest.mark.parametrize("steps", [10, 20, 50, 100])
def test_checks_are_at_the_published_iterations(steps):
    found = checkpoints(steps)
    np.testing.assert_array_equal(np.nonzero(found)[0] - 1, GOLDEN[f"checkpoints_{steps}"])
    # Each window reaches back to the check before.
    np.testing.assert_array_equal(np.diff(np.nonzero(found)[0], prepend=0), found[found > 0])


def test_a_run_without_steps_has_no_check():
    np.testing.assert_array_equal(checkpoints(0), [0])


# Invariants


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_stays_in_the_ball_and_the_range(norm, steps):
    x, labels = small()
    for eps in (0.03, 0.4):
        found = attack(x, labels, eps, KEY, norm=norm, steps=steps)
        for images in (found.x_adv, found.x_best):
            assert images.dtype == jnp.float32
            assert float(images.min()) >= 0
            assert float(images.max()) <= 1
            assert distances(images, x, norm).max() <= eps + 1e-6
        assert distances(found.x_best, x, norm).max() > 0.2 * eps


@pytest.mark.parametrize("norm", NORMS)
def test_float64_stays_and_keeps_the_ball_to_rounding(norm):
    with jax.enable_x64(True):
        x, labels = small(dtype=jnp.float64)
        found = attack(x, labels, 0.3, KEY, norm=norm)
        assert found.x_best.dtype == found.loss_best.dtype == jnp.float64
        for images in (found.x_adv, found.x_best):
            assert distances(images, x, norm).max() <= 0.3 + 1e-12


@pytest.mark.parametrize("norm", NORMS)
def test_no_radius_leaves_the_images(norm):
    x, labels = small()
    found = attack(x, labels.at[1].set((labels[1] + 1) % 5), 0.0, KEY, norm=norm)
    np.testing.assert_array_equal(found.x_adv, x)
    np.testing.assert_array_equal(found.x_best, x)
    np.testing.assert_array_equal(found.robust, [True, False, True, True])


def test_adversarial_images_are_misclassified_and_others_untouched():
    x, labels = small(count=8)
    found = attack(x, labels, 0.03, KEYS)
    robust = np.asarray(found.robust)
    assert 0 < robust.sum() < 8
    wrong = np.asarray(bumpy(found.x_adv).argmax(-1) != labels)
    np.testing.assert_array_equal(wrong, ~robust)
    np.testing.assert_array_equal(found.x_adv[robust], x[robust])


@pytest.mark.parametrize("norm", NORMS)
def test_best_loss_is_that_of_the_best_image_and_does_not_fall(norm):
    """Runs of 0, 1 and more steps share their first iterates, so that more is never less."""
    x, labels = small()
    previous = np.full(4, -np.inf)
    for steps in (0, 1, 7):
        found = attack(x, labels, 0.1, KEY, norm=norm, steps=steps)
        again = losses.dlr(bumpy(found.x_best), labels)
        np.testing.assert_allclose(found.loss_best, again, rtol=1e-4, atol=1e-5)
        assert (np.asarray(found.loss_best) >= previous - 1e-6).all()
        assert steps == 0 or (np.asarray(found.loss_best) > previous + 1e-4).mean() > 0.5
        previous = np.asarray(found.loss_best)


def test_one_misclassified_iterate_is_enough():
    """The start alone is misclassified; every later iterate is correct."""
    x = jnp.full(SHAPE, 0.5)
    noise = jax.random.uniform(KEY, SHAPE, minval=-1.0)
    start = x + 0.1 * noise / jnp.abs(noise).max((1, 2, 3), keepdims=True)

    def logits_fn(images):
        here = jnp.abs(images - start).max((1, 2, 3)) < 1e-6
        here = here & (jnp.arange(4) < 3)
        score = jnp.where(here, -1.0, 1.0) - 0.01 * images.sum((1, 2, 3))
        return jnp.stack([score, 0 * score], axis=1)

    labels = jnp.zeros(4, jnp.int32)
    run = jax.jit(lambda x: attacks.apgd(logits_fn, x, labels, eps=0.1, steps=5, noise=noise))
    found = run(x)
    np.testing.assert_array_equal(found.robust, [False, False, False, True])
    np.testing.assert_allclose(found.x_adv[:3], start[:3], atol=1e-6)
    np.testing.assert_array_equal(found.x_adv[3], x[3])


def test_logits_that_are_no_numbers_are_never_robust():
    x, labels = small()

    def logits_fn(images):
        spoilt = jnp.arange(4) < 2
        factor = jnp.where(spoilt, jnp.array([jnp.nan, jnp.inf, 0, 0]), 1.0)
        return bumpy(images) * factor[:, None]

    found = attacks.apgd(
        logits_fn, x, labels, eps=1e-3, norm="l2", loss=losses.dlr, steps=3, key=KEY
    )
    assert not found.robust[:2].any()
    assert found.robust[2:].all()
    assert jnp.isfinite(found.x_adv).all()
    assert distances(found.x_adv, x, "l2").max() <= 1e-3 + 1e-6
    assert jnp.isnan(found.loss_best[0])


def test_a_loss_without_a_value_at_the_start_is_no_obstacle():
    x, labels = small()
    noise = jnp.ones_like(x)
    start = jnp.clip(x + 0.2, 0, 1)

    def loss(logits, labels):
        return losses.margin(logits[:, :5], labels) + jnp.where(logits[:, 5] < 1e-6, jnp.nan, 0)

    def logits_fn(images):
        off = jnp.abs(images - start).max((1, 2, 3))
        return jnp.concatenate([bumpy(images), off[:, None]], axis=1)

    found = attacks.apgd(logits_fn, x, labels, eps=0.2, loss=loss, steps=3, noise=noise)
    assert jnp.isfinite(found.loss_best).all()


# One image does not see the others


@pytest.mark.parametrize("norm", NORMS)
def test_results_do_not_depend_on_the_rest_of_the_batch(norm):
    x, labels = small(count=8)
    eps = 0.03 if norm == "linf" else 0.1
    whole = attack(x, labels, eps, KEYS, norm=norm, restarts=2)
    assert 0 < int(whole.robust.sum()) < 8
    # The same four images in other places, among strangers.
    order = jnp.array([6, 1, 4, 2])
    strangers, others = small(seed=1, count=4)
    part = attack(
        jnp.concatenate([strangers, x[order]]),
        jnp.concatenate([others, labels[order]]),
        eps,
        jnp.concatenate([KEYS[:4], KEYS[order]]),
        norm=norm,
        restarts=2,
    )
    for one, other in zip(part, whole, strict=True):
        np.testing.assert_array_equal(one[4:], other[order])


def test_one_key_means_a_key_by_place():
    x, labels = small()
    one = attack(x, labels, 0.1, KEY)
    each = attack(x, labels, 0.1, _inputs.keys(KEY, 4))
    other = attack(x, labels, 0.1, jax.random.key(1))
    np.testing.assert_array_equal(one.x_best, each.x_best)
    assert not np.array_equal(one.x_best, other.x_best)


def test_on_several_devices_as_on_one():
    x, labels = small(count=8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = PartitionSpec("data")

    def run(x, labels, key):
        return attacks.apgd(bumpy, x, labels, eps=0.1, loss=losses.dlr, steps=7, key=key)

    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(split,) * 3, out_specs=split))
    for one, other in zip(sharded(x, labels, KEYS), attack(x, labels, 0.1, KEYS), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


# Programs


def test_radius_and_rho_are_arguments_of_one_program():
    x, labels = small()
    traces = []

    @jax.jit
    def run(eps, rho, x):
        def logits_fn(images):
            traces.append(1)
            return bumpy(images)

        return attacks.apgd(logits_fn, x, labels, eps=eps, rho=rho, steps=12, key=KEY)

    first = run(0.01, 0.75, x)
    count = len(traces)
    second = run(0.3, 0.75, x)
    third = run(0.3, 0.0, x)
    assert len(traces) == count
    assert (second.loss_best > first.loss_best).all()
    assert not np.array_equal(second.x_best, third.x_best)


def test_a_vector_of_radii():
    x, labels = small(count=8)
    radii = jnp.array([0.0, 0.05, 0.2])
    every = jax.vmap(lambda eps: attack(x, labels, eps, KEYS, restarts=2))(radii)
    for at, eps in enumerate(radii):
        alone = attack(x, labels, float(eps), KEYS, restarts=2)
        np.testing.assert_array_equal(every.robust[at], alone.robust)
        np.testing.assert_allclose(every.loss_best[at], alone.loss_best, rtol=1e-4, atol=1e-5)


def test_jit_is_eager():
    x, labels = small()
    eager = attacks.apgd(bumpy, x, labels, eps=0.1, loss=losses.dlr, steps=7, key=KEY)
    for one, other in zip(eager, attack(x, labels, 0.1, KEY), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def convolutional(x, kernels=(3, 5)):
    for width in kernels:
        kernel = jnp.sin(jnp.arange(9.0 * x.shape[-1] * width)).reshape(3, 3, x.shape[-1], width)
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
    return x.mean((1, 2))


@pytest.mark.parametrize("options", [{}, {"restarts": 4}, {"samples": 8}, {"steps": 3}])
def test_the_program_has_the_model_once(options):
    """Forward and input gradient of each of two layers, however many steps, starts or samples."""
    x, labels = small()
    model = (lambda x, key: convolutional(x)) if "samples" in options else convolutional
    program = jax.make_jaxpr(lambda x: attacks.apgd(model, x, labels, eps=0.1, key=KEY, **options))(
        x
    )
    assert str(program).count("conv_general_dilated[") == 2 * 2


def test_the_model_runs_once_for_each_iterate():
    x, labels = small()
    calls = []

    def logits_fn(images):
        jax.debug.callback(lambda: calls.append(1))
        return bumpy(images)

    @jax.jit
    def run(x, labels):
        return attacks.apgd(
            logits_fn, x, labels, eps=1e-4, loss=losses.dlr, steps=6, restarts=3, key=KEY
        )

    def count(labels):
        calls.clear()
        jax.block_until_ready(run(x, labels))
        jax.effects_barrier()
        return len(calls)

    assert count(labels) == 3 * 7
    # Nobody is left after the first start.
    assert count((labels + 1) % 5) == 7


def test_half_precision_logits():
    x, labels = small()
    found = attacks.apgd(
        lambda x: bumpy(x.astype(jnp.bfloat16)), x, labels, eps=0.1, steps=5, key=KEY
    )
    assert found.x_best.dtype == found.loss_best.dtype == jnp.float32
    assert distances(found.x_best, x, "linf").max() <= 0.1 + 1e-6
    assert (found.loss_best > losses.hard_label_cross_entropy(bumpy(x), labels)).all()


# Restarts and samples


def test_restarts_attack_only_what_is_robust():
    x, labels = small(count=8)
    one = attack(x, labels, 0.03, KEYS)
    two = attack(x, labels, 0.03, KEYS, restarts=2)
    once, twice = np.asarray(one.robust), np.asarray(two.robust)
    assert not (twice & ~once).any()
    fooled = ~once
    assert fooled.any()
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a[fooled], b[fooled], atol=1e-6)
    assert (two.loss_best >= one.loss_best - 1e-6).all()
    assert (two.loss_best[once] > one.loss_best[once] + 1e-6).any()


def test_restarts_find_what_one_start_misses():
    """Only starts in one eighth of the directions are misclassified, and nothing has a gradient."""
    x, labels = jnp.full((32, 3), 0.5), jnp.zeros(32, jnp.int32)

    def logits_fn(images):
        corner = (images > 0.5).all(-1)
        score = jnp.where(corner, -1.0, 1.0)
        return jnp.stack([score, 0 * score], axis=1)

    @jax.jit
    def run(x):
        return attacks.apgd(
            logits_fn, x, labels, eps=0.1, loss=losses.margin, steps=1, restarts=8, key=KEY
        )

    found = run(x)
    assert (found.x_adv[~found.robust] > 0.5).all()
    # 32 * (7/8)^8 = 11 are expected; a single start would leave 28.
    assert 3 <= int(found.robust.sum()) <= 19


def test_samples_of_one_deterministic_model_change_nothing():
    x, labels = small()
    one = attack(x, labels, 0.1, KEY)
    four = attacks.apgd(
        lambda x, key: bumpy(x), x, labels, eps=0.1, loss=losses.dlr, steps=7, samples=4, key=KEY
    )
    for a, b in zip(one, four, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_every_sample_has_its_own_key():
    x, labels = small()
    seen = []

    def logits_fn(images, key):
        assert key.shape == ()
        jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(key))
        return bumpy(images)

    found = attacks.apgd(
        logits_fn, x, labels, eps=1e-4, loss=losses.dlr, steps=3, samples=5, restarts=2, key=KEY
    )
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 2 * 4 * 5


def test_samples_average_the_gradient_of_a_random_defence():
    """Noise three times as large as the gradient hides its sign; its mean over samples does not."""
    x, labels = jnp.full((2, 40), 0.5), jnp.zeros(2, jnp.int32)
    weights = jnp.where(jnp.arange(40) % 3 == 0, -1.0, 1.0)

    def logits_fn(images, key):
        score = 100 + images @ (weights + 3 * jax.random.normal(key, (40,)))
        return jnp.stack([0 * score, score], axis=1)

    @jax.jit
    def run(x):
        return attacks.apgd(
            logits_fn, x, labels, eps=0.1, loss=losses.margin, steps=1, samples=128, key=KEY
        )

    found = run(x)
    np.testing.assert_allclose(found.x_best, x + 0.1 * jnp.sign(weights)[None], atol=1e-6)


# Bad input


def call(**changes):
    x, labels = small()
    arguments = {"x": x, "labels": labels, "eps": 0.1, "steps": 2, "key": KEY} | changes
    model = arguments.pop("logits_fn", bumpy)
    return attacks.apgd(model, arguments.pop("x"), arguments.pop("labels"), **arguments)


NOISE = jnp.ones(SHAPE)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": jnp.full(SHAPE, 2.0)}, ValueError, r"x must be images in \[0, 1\]"),
        ({"x": jnp.ones(SHAPE, jnp.uint8)}, TypeError, "x must be floating-point images"),
        ({"labels": jnp.array([0, 1, 2, 5])}, ValueError, "labels must be .* got 5"),
        ({"labels": jnp.array([0, 1, 2, -1])}, ValueError, "labels must be .* got -1"),
        ({"labels": jnp.zeros(4)}, TypeError, "labels must be an integer array"),
        ({"labels": jnp.zeros(3, jnp.int32)}, ValueError, "labels must have shape"),
        ({"eps": -0.1}, ValueError, "eps must be .* got -0.1"),
        ({"eps": float("nan")}, ValueError, "eps must be"),
        ({"norm": "l1"}, ValueError, "norm must be one of l2, linf"),
        ({"steps": -1}, ValueError, "steps must be .* got -1"),
        ({"rho": -0.5}, ValueError, "rho must be .* got -0.5"),
        ({"restarts": 0}, ValueError, "restarts must be .* got 0"),
        ({"samples": 0}, ValueError, "samples must be .* got 0"),
        ({"key": None}, ValueError, "exactly one of key and noise"),
        ({"noise": NOISE}, ValueError, "exactly one of key and noise"),
        ({"key": jax.random.PRNGKey(0)}, TypeError, "key must be a typed key"),
        ({"key": None, "noise": NOISE[:2]}, ValueError, "noise must have shape"),
        ({"key": None, "noise": NOISE, "restarts": 2}, ValueError, "restarts must be 1 with noise"),
        ({"key": None, "noise": NOISE, "samples": 2}, ValueError, "samples must be 1 with noise"),
        ({"loss": "dlr"}, TypeError, "loss must be a function"),
        ({"loss": lambda z, y: z}, ValueError, "loss must return one value per image"),
        ({"logits_fn": 3}, TypeError, "logits_fn must be a function"),
        ({"logits_fn": 3, "samples": 2}, TypeError, "logits_fn must be a function"),
        ({"logits_fn": lambda x: x}, ValueError, "logits_fn must return logits of shape"),
        ({"logits_fn": lambda x: bumpy(x, 2), "labels": jnp.zeros(4, jnp.int32),
          "loss": losses.dlr}, ValueError, "at least 3 classes"),
    ],
)  # fmt: skip
def test_bad_input(changes, error, words):
    with pytest.raises(error, match=words):
        call(**changes)


@pytest.mark.parametrize(
    ("targets", "classes", "error", "words"),
    [
        (jnp.array([0, 1, 2, 5]), 5, ValueError, "targets must be .* got 5"),
        (jnp.array([0, 1, 2, -1]), 5, ValueError, "targets must be .* got -1"),
        (jnp.zeros(3, jnp.int32), 5, ValueError, "targets must have shape"),
        (jnp.zeros(4), 5, TypeError, "targets must be an integer array"),
        (jnp.zeros(4, jnp.int32), 3, ValueError, "at least 4 classes"),
    ],
)
def test_bad_targets(targets, classes, error, words):
    x, _ = small()
    labels = jnp.array([0, 1, 2, 2])
    with pytest.raises(error, match=words):
        attacks.apgd_targeted(
            lambda x: bumpy(x, classes), x, labels, targets=targets, eps=0.1, steps=2, key=KEY
        )
