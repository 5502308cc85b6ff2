"""Two views: crops, colours, independent draws; oracles, exact identities, bad input."""

import colorsys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import augment
from kdjax.augment import _resized_crop

B, H, W = 6, 12, 10

quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def run(function, key, value, **options):
    return quick(partial(function, **options))(key, value)


@pytest.fixture
def images():
    return jax.random.uniform(jax.random.key(7), (B, H, W, 3), minval=0.05)


@pytest.fixture
def batch(images):
    return {"image": images, "label": jnp.arange(B) % 4, "index": jnp.arange(B) * 3 + 5}


RANDOM = {
    "random_resized_crop": augment.random_resized_crop,
    "color_jitter": augment.color_jitter,
    "random_grayscale": partial(augment.random_grayscale, probability=0.5),
    "solarize": partial(augment.solarize, probability=0.5),
}
IDENTITIES = {
    "crop": partial(augment.random_resized_crop, scale=1.0, ratio=W / H),
    "cubic crop": partial(augment.random_resized_crop, scale=1.0, ratio=W / H, method="cubic"),
    "jitter": partial(augment.color_jitter, probability=0.0),
    "jitter strength": partial(
        augment.color_jitter, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0
    ),
    "grey": partial(augment.random_grayscale, probability=0.0),
    "solarize": partial(augment.solarize, probability=0.0),
    "solarize threshold": partial(augment.solarize, threshold=1.1),
}


@pytest.mark.parametrize("name", RANDOM)
def test_one_key_per_image_decides_the_image(name, images):
    function = quick(RANDOM[name])
    keys = jax.random.split(jax.random.key(0), B)
    result = function(keys, images)
    assert result.shape == images.shape
    assert result.dtype == jnp.float32
    order = jnp.array([3, 1, 0, 2, 5, 4])
    np.testing.assert_array_equal(function(keys[order], images[order]), result[order])
    np.testing.assert_array_equal(function(jax.random.key(0), images), result)
    assert np.abs(function(jax.random.key(1), images) - result).max() > 1e-3
    assert (np.abs(result - images).max(axis=(1, 2, 3)) > 1e-3).sum() >= 2
    raw = np.asarray(255 * images).astype(np.uint8)
    scaled = function(keys, augment.to_float(raw))
    np.testing.assert_allclose(function(keys, raw), scaled, atol=1e-6)
    half = jax.eval_shape(function, keys, images.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32


@pytest.mark.parametrize("name", IDENTITIES)
def test_nothing_to_do_is_exact(name, images):
    np.testing.assert_array_equal(jax.jit(IDENTITIES[name])(jax.random.key(0), images), images)


@pytest.mark.parametrize(("method", "size"), [("linear", (12, 10)), ("cubic", 3), ("linear", 4)])
def test_crop_is_a_resized_rectangle(method, size):
    """Half the side, enlarged or made smaller, is what JAX's resize makes of the same rectangle."""
    image = np.random.default_rng(0).random((1, H, W, 3), np.float32)
    many = np.broadcast_to(image, (40, H, W, 3))
    result = run(
        augment.random_resized_crop, jax.random.key(1), many,
        scale=0.25, ratio=W / H, size=size, method=method,
    )  # fmt: skip
    pair = size if isinstance(size, tuple) else (size, size)
    assert result.shape == (40, *pair, 3)
    places = [(r, c) for r in range(H // 2 + 1) for c in range(W // 2 + 1)]
    cut = np.stack([image[0, r : r + H // 2, c : c + W // 2] for r, c in places])
    resize = quick(partial(jax.image.resize, shape=(len(places), *pair, 3), method=method))
    wanted = np.asarray(resize(cut))
    apart = np.abs(np.asarray(result)[:, None] - wanted[None]).max(axis=(2, 3, 4))
    assert apart.min(axis=1).max() < 1e-5
    assert len(set(apart.argmin(axis=1))) > 15


def test_crops_have_the_areas_and_shapes_asked_for():
    draw = jax.random.uniform(jax.random.key(0), (4000, 22))
    sides = quick(partial(_resized_crop._sides, height=100, width=100))
    tall, wide, centred = map(np.asarray, sides(draw, (0.1, 0.5), (0.5, 2.0)))
    area, ratio = tall * wide / 1e4, wide / tall
    assert not centred.any()
    assert 0.09 < area.min() < 0.12
    assert 0.48 < area.max() < 0.51
    assert abs(area.mean() - 0.3) < 0.01
    assert 0.47 < ratio.min() < 0.55
    assert 1.9 < ratio.max() < 2.1
    assert abs(np.log(ratio).mean()) < 0.02
    assert (tall == np.round(tall)).all()
    assert max(tall.max(), wide.max()) <= 100


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_crop_that_never_fits_is_the_largest_about_the_centre(ratio):
    image = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1))
    result = run(augment.random_resized_crop, jax.random.key(0), image, scale=1.0, ratio=ratio)
    cut = image[:, 2:6] if ratio > 1 else image[:, :, 2:6]
    np.testing.assert_allclose(result, jax.image.resize(cut, image.shape, "linear"), atol=1e-5)


def grey(rgb):
    return rgb @ np.array([0.299, 0.587, 0.114])


def jittered(image, factors, turn, order):
    """The four changes on one image, pixel by pixel."""
    for which in order:
        if which == 3:
            for place in np.ndindex(image.shape[:2]):
                hue, saturation, value = colorsys.rgb_to_hsv(*image[place])
                image[place] = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
            continue
        luminance = grey(image)[..., None]
        towards = (0.0, luminance.mean(), luminance)[which]
        image = np.clip(factors[which] * image + (1 - factors[which]) * towards, 0, 1)
    return image


def test_jitter_is_four_changes_in_a_random_order(images):
    strengths = {"brightness": 0.6, "contrast": 1.4, "saturation": 0.8}
    keys = jax.random.split(jax.random.key(2), B)
    result = run(augment.color_jitter, keys, images, hue=0.3, **strengths)
    draw = np.asarray(jax.vmap(lambda k: jax.random.uniform(k, (9,)))(keys), np.float64)
    orders = np.argsort(draw[:, 4:8], axis=1)
    for i in range(B):
        low = np.maximum(1 - np.array(list(strengths.values())), 0)
        factors = low + (1 + np.array(list(strengths.values())) - low) * draw[i, :3]
        turn = 0.3 * (2 * draw[i, 3] - 1)
        wanted = jittered(np.array(images[i], np.float64), factors, turn, orders[i])
        np.testing.assert_allclose(result[i], wanted, atol=2e-5)
    assert len({tuple(order) for order in orders}) > 2
    assert float(result.min()) >= 0
    assert float(result.max()) <= 1


def test_hue_turns_the_colours():
    """A third of the circle takes red to green or blue; grey has no hue."""
    red = jnp.zeros((32, 1, 2, 3)).at[:, 0, 0, 0].set(0.8).at[:, 0, 1].set(0.5)
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
    result = np.asarray(run(augment.color_jitter, jax.random.key(0), red, hue=0.5, **off))
    np.testing.assert_allclose(result[:, 0, 1], 0.5, atol=1e-6)
    np.testing.assert_allclose(result[:, 0, 0].max(axis=-1), 0.8, atol=1e-6)
    np.testing.assert_allclose(result[:, 0, 0].min(axis=-1), 0.0, atol=1e-6)
    assert set(result[:, 0, 0].argmax(axis=-1)) == {0, 1, 2}


def test_grey_images_have_no_colour():
    image = jax.random.uniform(jax.random.key(0), (4, 5, 5, 1))
    off = {"brightness": 0.0, "contrast": 0.0}
    same = jax.jit(partial(augment.color_jitter, saturation=0.9, hue=0.5, **off))
    np.testing.assert_array_equal(same(jax.random.key(0), image), image)
    paled = run(augment.random_grayscale, jax.random.key(0), image, probability=1.0)
    np.testing.assert_array_equal(paled, image)


def test_grayscale_and_solarize_values(images):
    many = jnp.tile(images, (100, 1, 1, 1))
    result = np.asarray(run(augment.random_grayscale, jax.random.key(0), many))
    changed = (result == result[..., :1]).all(axis=(1, 2, 3))
    assert 0.15 < changed.mean() < 0.25
    np.testing.assert_allclose(result[changed][..., 0], grey(many[changed]), atol=1e-6)
    np.testing.assert_array_equal(result[~changed], many[~changed])
    inverted = run(augment.solarize, jax.random.key(0), images, threshold=0.6)
    np.testing.assert_array_equal(inverted, np.where(images >= 0.6, 1 - images, images))


def test_strengths_may_be_traced(images):
    traces = 0

    @quick
    def anneal(key, images, strength):
        nonlocal traces
        traces += 1
        images = augment.color_jitter(
            key, images, brightness=strength, contrast=strength, saturation=strength, hue=strength
        )
        images = augment.random_resized_crop(key, images, scale=(1 - strength, 1.0), ratio=W / H)
        images = augment.random_grayscale(key, images, probability=strength)
        return augment.solarize(key, images, threshold=2 - strength, probability=strength)

    np.testing.assert_array_equal(anneal(jax.random.key(0), images, 0.0), images)
    assert np.abs(anneal(jax.random.key(0), images, 0.5) - images).max() > 0.01
    assert traces == 1


# --- two views -------------------------------------------------------------------------------


def test_views_are_two_independent_draws(batch):
    flip = partial(augment.gaussian_noise, std=1.0)
    views = quick(augment.two_views(flip))(jax.random.key(0), batch)
    assert set(views) == {*batch, "view1", "view2"}
    for name, entry in batch.items():
        np.testing.assert_array_equal(views[name], entry)
    first, second = (np.ravel(views[name] - batch["image"]) for name in ("view1", "view2"))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
    assert abs(first.std() - 1) < 0.05


def test_views_depend_on_key_and_index_only(batch):
    pipeline = quick(augment.simclr_views(blur=0.5))
    key = jax.random.key(0)
    whole = pipeline(key, batch)
    order = jnp.array([5, 2, 0, 1, 3, 4])
    moved = pipeline(key, jax.tree.map(lambda x: x[order], batch))
    for name in ("view1", "view2"):
        np.testing.assert_array_equal(moved[name], whole[name][order])
    other = pipeline(jax.random.key(1), batch)
    assert np.abs(other["view1"] - whole["view1"]).max() > 0.01
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_allclose(pipeline(key, spread)["view1"], whole["view1"], atol=1e-5)


def test_views_may_differ_in_kind(batch):
    def doubled(images):
        return 2 * images

    def renamed(key, batch):
        return {**batch, "image": batch["image"][:, ::2], "label": 0}

    views = augment.two_views(doubled, renamed)(jax.random.key(0), batch)
    np.testing.assert_array_equal(views["view1"], 2 * batch["image"])
    np.testing.assert_array_equal(views["view2"], batch["image"][:, ::2])
    np.testing.assert_array_equal(views["label"], batch["label"])


def test_barlow_twins_views_are_asymmetric(batch):
    """Each view has its own probabilities of blur and, after it, of solarisation."""
    key = jax.random.key(3)
    many = {"image": jnp.tile(batch["image"][:2], (8, 1, 1, 1)), "index": jnp.arange(16)}
    make = partial(augment.barlow_twins_views, mean=0.25, std=0.5)
    plain, changed = (
        {name: 0.5 * views[name] + 0.25 for name in ("view1", "view2")}
        for views in (
            quick(make(blur=(1.0, 0.0), solarization=None))(key, many),
            quick(make(blur=(0.0, 0.0), solarization=(0.0, 1.0)))(key, many),
        )
    )
    wanted = np.where(plain["view2"] >= 0.5, 1 - plain["view2"], plain["view2"])
    # At the threshold rounding decides.
    apart = np.abs(plain["view2"] - 0.5) > 1e-5
    np.testing.assert_allclose(np.where(apart, changed["view2"] - wanted, 0), 0, atol=1e-5)
    assert (plain["view2"] >= 0.5).any()
    blurred = np.abs(changed["view1"] - plain["view1"]).max(axis=(1, 2, 3)) > 1e-3
    assert blurred.mean() > 0.5  # a width of 0.1 pixels changes nothing


def test_barlow_twins_views_as_published():
    """The shapes at 224 pixels, from uint8 of any size."""
    batch = {"image": jnp.zeros((2, 256, 200, 3), jnp.uint8), "index": jnp.arange(2)}
    shapes = jax.eval_shape(augment.barlow_twins_views(size=224), jax.random.key(0), batch)
    for name in ("view1", "view2"):
        assert shapes[name].shape == (2, 224, 224, 3)
        assert shapes[name].dtype == jnp.float32
    assert shapes["image"].dtype == jnp.uint8


def test_digits_views_turn_and_shift_a_little():
    """A dot moves by at most a pixel and its share of rotation and scale."""
    image = jnp.zeros((64, 9, 9, 1)).at[:, 4, 4].set(1.0)
    batch = {"image": image, "index": jnp.arange(64)}
    still = augment.digits_views(shift=1 / 9, contrast=1.0, noise=0.0)
    moved = quick(still)(jax.random.key(0), batch)["view1"]
    mass = moved.sum(axis=(1, 2, 3))
    row = jnp.einsum("bhwc,h->b", moved, jnp.arange(9.0) - 4) / mass
    assert float(abs(row).max()) < 1 + 1e-4
    assert float(abs(row).max()) > 0.8
    noisy = quick(augment.digits_views())(jax.random.key(0), batch)
    assert 0.05 < float(noisy["view1"][:, 0, 0].std()) < 0.2
    assert np.abs(noisy["view1"] - noisy["view2"]).max() > 0.1


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda k, x: augment.random_resized_crop(k, x, scale=0.0), ValueError, "scale must"),
        (lambda k, x: augment.random_resized_crop(k, x, scale=(0.5, 2)), ValueError, "scale must"),
        (lambda k, x: augment.random_resized_crop(k, x, scale=(1, 0.5)), ValueError, "scale must"),
        (lambda k, x: augment.random_resized_crop(k, x, ratio=(1, 2, 3)), ValueError, "ratio must"),
        (lambda k, x: augment.random_resized_crop(k, x, ratio=-1.0), ValueError, "ratio must"),
        (lambda k, x: augment.random_resized_crop(k, x, size=0), ValueError, "size must"),
        (lambda k, x: augment.random_resized_crop(k, x, size=(1, 2, 3)), ValueError, "size must"),
        (lambda k, x: augment.random_resized_crop(k, x, size=8.0), TypeError, "size must"),
        (lambda k, x: augment.random_resized_crop(k, x, method="box"), ValueError, "method must"),
        (lambda k, x: augment.color_jitter(k, x, brightness=-1.0), ValueError, "brightness must"),
        (lambda k, x: augment.color_jitter(k, x, contrast="much"), TypeError, "contrast must"),
        (lambda k, x: augment.color_jitter(k, x, hue=0.6), ValueError, "hue must"),
        (lambda k, x: augment.color_jitter(k, x[..., :2]), ValueError, "images must"),
        (lambda k, x: augment.random_grayscale(k, x, probability=2), ValueError, "probability"),
        (lambda k, x: augment.random_grayscale(0, x), TypeError, "key must"),
        (lambda k, x: augment.solarize(k, x, threshold=float("nan")), ValueError, "threshold must"),
        (lambda k, x: augment.two_views(3), TypeError, "first must"),
        (lambda k, x: augment.two_views(augment.solarize, augment.cutout), TypeError, "second"),
        (
            lambda k, x: augment.digits_views()(k, {"image": x}),
            ValueError,
            "batch has no entry 'index'",
        ),
    ],
)
def test_bad_input_is_one_sentence(call, error, words, images):
    with pytest.raises(error, match=words) as caught:
        call(jax.random.key(0), images)
    assert "\n" not in str(caught.value)
