"""Common corruptions: what each does exactly, its strength, draws by image, bad input."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import augment

B, H, W, C = 8, 12, 10, 3
KEY = jax.random.key(0)
ALL = augment.corruptions(3)
NEW = {
    "shot_noise": (augment.shot_noise, "photons", (50.0, 200.0)),
    "impulse_noise": (augment.impulse_noise, "amount", (0.1, 0.3)),
    "brightness": (augment.brightness, "shift", (0.05, 0.3)),
    "pixelate": (augment.pixelate, "factor", (0.3, 0.8)),
    "fog": (augment.fog, "strength", (0.2, 1.0)),
}


@jax.jit
def apply(function, key, images):
    return function(key, images)


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(7), (B, H, W, C), minval=0.05, maxval=0.95)


@pytest.mark.parametrize("name", ALL)
def test_range_and_one_key_per_image(name, images):
    keys = jax.random.split(KEY, B)
    found = apply(ALL[name], keys, images)
    assert found.shape == images.shape
    assert found.dtype == jnp.float32
    assert 0 <= found.min() <= found.max() <= 1
    order = jnp.array([3, 1, 0, 2, 7, 6, 5, 4])
    np.testing.assert_array_equal(apply(ALL[name], keys[order], images[order]), found[order])
    np.testing.assert_array_equal(apply(ALL[name], KEY, images), found)
    assert (np.abs(found - images).max(axis=(1, 2, 3)) > 1e-3).all()
    extreme = apply(ALL[name], keys, jnp.round(images))
    assert 0 <= extreme.min() <= extreme.max() <= 1


@pytest.mark.parametrize("name", ALL)
def test_severity_grows_and_does_not_recompile(name):
    """Five severities of one program, each further from the image."""
    grid = jnp.linspace(0, 4, 32)
    smooth = 0.5 + 0.3 * jnp.sin(grid[:, None] * 3) * jnp.cos(grid[None, :] * 5)
    images = jnp.broadcast_to(smooth[None, :, :, None], (B, 32, 32, 1))
    before = apply._cache_size()
    away = [
        float(jnp.sqrt(jnp.mean((apply(augment.corruptions(s)[name], KEY, images) - images) ** 2)))
        for s in (1, 2, 3, 4, 5)
    ]
    assert apply._cache_size() == before + 1
    # How 32 pixels fall into nearly as many blocks matters more than how many there are.
    assert away == sorted(away) or name == "pixelate"
    assert away[4] == max(away)
    assert away[4] > 1.3 * away[0]


@pytest.mark.parametrize("name", NEW)
def test_strengths_by_image_and_probability(name, images):
    function, option, bounds = NEW[name]
    some = jax.jit(partial(function, probability=0.5, **{option: bounds}))(KEY, images)
    same = (some == images).all(axis=(1, 2, 3))
    assert 0 < int(same.sum()) < B
    ranged = jax.jit(partial(function, **{option: bounds}))(KEY, images)
    away = np.asarray(jnp.abs(ranged - images).mean(axis=(1, 2, 3)))
    assert away.max() > 1.2 * away.min()
    np.testing.assert_array_equal(jax.jit(partial(function, probability=0.0))(KEY, images), images)


@pytest.mark.parametrize(
    "function",
    [
        partial(augment.impulse_noise, amount=0.0),
        partial(augment.brightness, shift=0.0),
        partial(augment.pixelate, factor=1.0),
        partial(augment.fog, strength=0.0),
    ],
    ids=["impulse_noise", "brightness", "pixelate", "fog"],
)
def test_no_strength_changes_nothing(function, images):
    np.testing.assert_array_equal(jax.jit(function)(KEY, images), images)


def test_shot_noise_is_poisson():
    images = jnp.full((4, 64, 64, 3), 0.3)
    found = np.asarray(jax.jit(augment.shot_noise)(KEY, images, photons=20.0))
    np.testing.assert_allclose(found * 20, np.round(found * 20), atol=1e-4)
    assert abs(found.mean() - 0.3) < 3e-3
    assert abs(found.var() - 0.3 / 20) < 1e-3
    assert not jax.jit(augment.shot_noise)(KEY, jnp.zeros((1, 4, 4, 1)), photons=20.0).any()


def test_impulse_noise_is_salt_and_pepper():
    images = jnp.full((4, 64, 64, 3), 0.3)
    found = np.asarray(jax.jit(augment.impulse_noise)(KEY, images, amount=0.2))
    assert set(np.unique(found)) == {0.0, np.float32(0.3), 1.0}
    assert abs((found == 0).mean() - 0.1) < 0.01
    assert abs((found == 1).mean() - 0.1) < 0.01


def test_brightness_keeps_the_colour(images):
    found = np.asarray(augment.brightness(KEY, images, shift=0.02))
    value = np.asarray(images.max(-1))
    np.testing.assert_allclose(found.max(-1), value + 0.02, rtol=1e-5)
    np.testing.assert_allclose(
        found / found.max(-1, keepdims=True), images / value[..., None], rtol=1e-5
    )
    assert (augment.brightness(KEY, jnp.zeros((1, 2, 2, 3)), shift=0.25) == 0.25).all()


@pytest.mark.parametrize(("factor", "blocks"), [(0.5, 8), (0.75, 12), (0.7, 11), (0.0, 1)])
def test_pixelate_against_loops(factor, blocks):
    """Means over the area of each block, by supersampling, and repeated back."""
    image = np.random.default_rng(0).random((1, 16, 16, 2), np.float32)
    fine = np.repeat(image[0], blocks, 0)  # 16 * blocks rows: every block is 16 of them
    fine = fine.reshape(blocks, 16, 16, 2).mean(1)
    fine = np.repeat(fine, blocks, 1).reshape(blocks, blocks, 16, 2).mean(2)
    place = ((np.arange(16) + 0.5) * blocks / 16).astype(int)
    found = augment.pixelate(KEY, image, factor=factor)
    np.testing.assert_allclose(found[0], fine[place][:, place], atol=1e-5)


def test_fog_is_smooth_and_covers_all_channels():
    images = jnp.full((4, 32, 32, 3), 0.5)
    found = np.asarray(augment.fog(KEY, images, strength=1.0, decay=3.0))
    np.testing.assert_array_equal(found[..., 0], found[..., 1])
    cover = found[..., 0] / 0.5 * 1.5 - 0.5
    np.testing.assert_allclose(cover.min(axis=(1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(cover.max(axis=(1, 2)), 1, atol=1e-5)
    steps = np.abs(np.diff(cover, axis=1))
    rough = np.asarray(augment.fog(KEY, images, strength=1.0, decay=0.5))[..., 0] / 0.5 * 1.5
    assert steps.mean() < 0.1
    assert steps.mean() < 0.3 * np.abs(np.diff(rough, axis=1)).mean()


def test_integers_and_half_precision():
    bright = augment.brightness(KEY, jnp.full((1, 2, 2, 1), 51, jnp.uint8), shift=0.1)
    np.testing.assert_allclose(bright, 0.3, rtol=1e-5)
    fine = augment.pixelate(KEY, jnp.ones((1, 2, 2, 1), jnp.bfloat16), factor=0.5)
    assert fine.dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (partial(augment.shot_noise, photons=0.0), ValueError, "photons must be .* above 0"),
        (partial(augment.impulse_noise, amount=1.5), ValueError, "amount must be .* at most 1"),
        (partial(augment.brightness, shift=-0.1), ValueError, "shift must be .* at least 0"),
        (partial(augment.pixelate, factor=(0.5, 2.0)), ValueError, "factor must be .* at most 1"),
        (partial(augment.fog, decay=0.0), ValueError, "decay must be .* above 0"),
        (partial(augment.fog, strength=(1.0, 0.5)), ValueError, "strength must be a pair"),
        (partial(augment.fog, probability=2.0), ValueError, "probability must be"),
    ],
)
def test_bad_options(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(KEY, jnp.zeros((1, 4, 4, 1)))


def test_bad_severity():
    for wrong in (0, 6):
        with pytest.raises(ValueError, match=rf"^severity must be .* got {wrong}\.$"):
            augment.corruptions(wrong)
