"""Augmentation: invariants, exact identities, draws that don't depend on the batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import augment

B, H, W, C = 8, 12, 10, 3

# These tests compile much and compute little; exact identities are tested as users compile.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def run(function, key, value, **options):
    """Compiled, as in a step; op by op every test would compile a hundred small programs."""
    return quick(partial(function, **options))(key, value)


@pytest.fixture
def images():
    return jax.random.uniform(jax.random.key(7), (B, H, W, C), minval=0.05)


@pytest.fixture
def batch(images):
    return {"image": images, "label": jnp.arange(B) % 4, "index": jnp.arange(B) * 3 + 5}


RANDOM = {
    "random_crop": partial(augment.random_crop, padding=2),
    "random_flip": augment.random_flip,
    "cutout": partial(augment.cutout, size=4),
    "affine": augment.affine,
    "gaussian_blur": augment.gaussian_blur,
    "gaussian_noise": partial(augment.gaussian_noise, std=(0.05, 0.2)),
    "contrast": augment.contrast,
}

IDENTITIES = {
    "crop": partial(augment.random_crop, padding=0),
    "flip": partial(augment.random_flip, probability=0.0),
    "cutout size": partial(augment.cutout, size=0),
    "cutout": partial(augment.cutout, size=4, probability=0.0),
    "affine strength": partial(augment.affine, rotate=0.0, translate=0.0, scale=0.0),
    "affine": partial(augment.affine, probability=0.0),
    "blur strength": partial(augment.gaussian_blur, sigma=0.0),
    "blur": partial(augment.gaussian_blur, probability=0.0),
    "noise strength": partial(augment.gaussian_noise, std=0.0),
    "noise": partial(augment.gaussian_noise, probability=0.0),
    "contrast strength": partial(augment.contrast, factor=1.0),
    "contrast": partial(augment.contrast, probability=0.0),
}


@pytest.mark.parametrize("name", RANDOM)
def test_one_key_per_image_decides_the_image(name, images):
    """Permuted keys and images give the permuted result; keys decide it; it differs from before."""
    function = quick(RANDOM[name])
    keys = jax.random.split(jax.random.key(0), B)
    result = function(keys, images)
    assert result.shape == images.shape
    assert result.dtype == jnp.float32
    order = jnp.array([3, 1, 0, 2, 7, 6, 5, 4])
    np.testing.assert_array_equal(function(keys[order], images[order]), result[order])
    np.testing.assert_array_equal(function(keys, images), result)
    np.testing.assert_array_equal(function(jax.random.key(0), images), result)
    assert np.abs(function(jax.random.key(1), images) - result).max() > 1e-3
    changed = np.abs(result - images).max(axis=(1, 2, 3)) > 1e-3
    assert changed.sum() >= 2


@pytest.mark.parametrize("name", IDENTITIES)
def test_strength_or_probability_zero_is_exact(name, images):
    np.testing.assert_array_equal(jax.jit(IDENTITIES[name])(jax.random.key(0), images), images)


def test_crop_is_a_window_of_the_padded_image(images):
    padding = 2
    result = np.asarray(run(augment.random_crop, jax.random.key(3), images, padding=padding))
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    places = []
    for i in range(B):
        found = [
            (r, c)
            for r in range(2 * padding + 1)
            for c in range(2 * padding + 1)
            if np.array_equal(padded[i, r : r + H, c : c + W], result[i])
        ]
        assert len(found) == 1
        places.append(found[0])
    assert len(set(places)) > 3


def test_crop_reaches_every_offset():
    many = np.broadcast_to(
        np.arange(1.0, 10.0, dtype=np.float32).reshape(1, 3, 3, 1), (400, 3, 3, 1)
    )
    result = run(augment.random_crop, jax.random.key(0), many, padding=1)
    assert len({x.tobytes() for x in np.asarray(result)}) == 9


def test_flip_mirrors_about_half(images):
    many = jnp.concatenate([images] * 50)
    result = run(augment.random_flip, jax.random.key(0), many)
    flipped = (result == many[:, :, ::-1]).all(axis=(1, 2, 3))
    same = (result == many).all(axis=(1, 2, 3))
    assert bool((flipped ^ same).all())
    assert 0.4 < float(flipped.mean()) < 0.6


def test_cutout_fills_one_square(images):
    result = np.asarray(run(augment.cutout, jax.random.key(0), images, size=4, fill=-1.0))
    cut = (result == -1).all(axis=-1)
    assert (cut.sum(axis=(1, 2)) <= 16).all()
    assert (cut.sum(axis=(1, 2)) >= 4).all()
    for mask in cut:
        rows, columns = mask.any(axis=1), mask.any(axis=0)
        np.testing.assert_array_equal(mask, rows[:, None] & columns[None, :])
    np.testing.assert_array_equal(result[~cut], np.asarray(images)[~cut])


def test_affine_full_turns_and_shifts():
    """A shift by whole pixels moves them; the extreme draws come from the documented ranges."""
    image = jnp.zeros((64, 9, 9, 1)).at[:, 4, 4].set(1.0)
    moved = run(augment.affine, jax.random.key(0), image, rotate=0.0, translate=2 / 9, scale=0.0)
    grid = jnp.arange(9.0)
    mass = moved.sum(axis=(1, 2, 3))
    np.testing.assert_allclose(mass, 1.0, atol=1e-5)
    centre = jnp.einsum("bhwc,h->b", moved, grid) / mass - 4
    assert float(abs(centre).max()) <= 2 + 1e-4
    assert float(centre.max()) > 1.5
    assert float(centre.min()) < -1.5
    turned = run(augment.affine, jax.random.key(0), image, rotate=90.0, translate=0.0, scale=0.0)
    np.testing.assert_allclose(turned[:, 4, 4, 0], 1.0, atol=1e-5)


def test_affine_rotates_by_the_angle():
    """A point off the centre stays on its circle, within the largest angle."""
    size, radius = 33, 10
    image = jnp.zeros((32, size, size, 1)).at[:, 15:18, 16 + radius - 1 : 16 + radius + 2].set(1.0)
    moved = run(augment.affine, jax.random.key(1), image, rotate=30.0, translate=0.0, scale=0.0)
    grid = jnp.arange(size) - 16.0
    mass = moved.sum(axis=(1, 2, 3))
    row = jnp.einsum("bhwc,h->b", moved, grid) / mass
    column = jnp.einsum("bhwc,w->b", moved, grid) / mass
    np.testing.assert_allclose(jnp.hypot(row, column), radius, atol=0.1)
    angle = jnp.rad2deg(jnp.arctan2(row, column))
    assert 20 < float(abs(angle).max()) < 30.5


def test_blur_matches_scipy(images):
    from scipy.ndimage import gaussian_filter

    result = run(augment.gaussian_blur, jax.random.key(0), images, sigma=0.8, radius=4)
    expected = gaussian_filter(
        np.asarray(images, np.float64), (0, 0.8, 0.8, 0), mode="nearest", radius=(0, 4, 4, 0)
    )
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_noise_and_contrast_moments():
    images = jnp.full((64, 16, 16, 3), 0.5)
    noise = run(augment.gaussian_noise, jax.random.key(0), images, std=0.2) - images
    assert abs(float(noise.std()) - 0.2) < 0.005
    assert abs(float(noise.mean())) < 0.005
    ramp = jnp.broadcast_to(jnp.linspace(0.0, 1.0, 16)[None, :, None, None], (64, 16, 16, 3))
    result = run(augment.contrast, jax.random.key(0), ramp, factor=(0.5, 1.5))
    np.testing.assert_allclose(result.mean(axis=(1, 2, 3)), ramp.mean(axis=(1, 2, 3)), atol=1e-5)
    ratio = result.std(axis=(1, 2, 3)) / ramp.std(axis=(1, 2, 3))
    assert 0.5 <= float(ratio.min()) < 0.6
    assert 1.4 < float(ratio.max()) <= 1.5


def test_normalize(images):
    mean, std = (0.1, 0.2, 0.3), np.array([0.5, 1.0, 2.0])
    expected = (np.asarray(images) - np.array(mean)) / std
    np.testing.assert_allclose(augment.normalize(images, mean, std), expected, atol=1e-6)
    np.testing.assert_array_equal(augment.normalize(images, 0.0, 1.0), images)


@pytest.mark.parametrize("name", RANDOM)
def test_uint8_is_scaled_first(name):
    raw = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    key = jax.random.key(0)
    scaled = augment.to_float(raw)
    assert scaled.dtype == jnp.float32
    assert float(scaled.max()) <= 1
    function = quick(RANDOM[name])
    np.testing.assert_allclose(function(key, raw), function(key, scaled), atol=1e-6)
    np.testing.assert_array_equal(quick(augment.to_float)(raw), scaled)


def test_strengths_may_be_traced(images):
    """Annealed options compile once."""
    traces = 0

    @quick
    def anneal(key, images, strength):
        nonlocal traces
        traces += 1
        images = augment.gaussian_noise(key, images, std=strength)
        images = augment.gaussian_blur(key, images, sigma=(0.0, strength))
        images = augment.affine(key, images, rotate=strength, translate=strength, scale=strength)
        images = augment.contrast(key, images, factor=(1 - strength, 1 + strength))
        images = augment.cutout(key, images, size=jnp.int32(10 * strength), probability=strength)
        batch = {"image": images, "label": jnp.arange(B) % 3}
        return augment.mixup(key, batch, alpha=strength, num_classes=3)["image"]

    zero = anneal(jax.random.key(0), images, 0.0)
    np.testing.assert_array_equal(zero, images)
    assert np.abs(anneal(jax.random.key(0), images, 0.5) - images).max() > 0.01
    assert traces == 1


def test_compose_depends_on_key_and_index_only(batch):
    pipeline = quick(
        augment.compose(*RANDOM.values(), partial(augment.normalize, mean=0.4, std=(0.2, 0.3, 0.4)))
    )
    key = jax.random.key(0)
    whole = pipeline(key, batch)
    assert set(whole) == set(batch)
    order = jnp.array([5, 2, 7, 0, 1, 6, 3, 4])
    permuted = pipeline(key, jax.tree.map(lambda x: x[order], batch))
    np.testing.assert_array_equal(permuted["image"], whole["image"][order])
    halves = [pipeline(key, jax.tree.map(lambda x, s=s: x[s : s + 4], batch)) for s in (0, 4)]
    joined = jnp.concatenate([half["image"] for half in halves])
    np.testing.assert_allclose(joined, whole["image"], atol=1e-6)
    other = pipeline(key, {**batch, "index": batch["index"] + 1})
    assert np.abs(other["image"] - whole["image"]).max() > 0.01
    equal = pipeline(
        key, {**batch, "index": jnp.zeros(B, int), "image": batch["image"][:1].repeat(B, 0)}
    )
    np.testing.assert_allclose(equal["image"], equal["image"][:1].repeat(B, 0), atol=1e-6)


def test_compose_is_the_same_on_eight_devices(batch):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    pipeline = quick(augment.compose(augment.random_crop, augment.affine))
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    key = jax.random.key(0)
    np.testing.assert_allclose(
        pipeline(key, spread)["image"], pipeline(key, batch)["image"], atol=1e-6
    )


def test_compose_positions_draw_apart(batch):
    """The same function twice draws twice."""
    flip = augment.random_flip
    twice = quick(augment.compose(flip, flip))(jax.random.key(0), batch)["image"]
    flipped = (twice == batch["image"][:, :, ::-1]).all(axis=(1, 2, 3))
    assert 0 < int(flipped.sum()) < B


def test_compose_takes_both_kinds(batch):
    def doubled(images):
        return 2 * images

    def relabel(key, batch):
        return {**batch, "label": jax.random.permutation(key, batch["label"])}

    inner = augment.compose(doubled, relabel)
    outer = augment.compose(inner, partial(augment.mixup, alpha=0, num_classes=4))
    unnumbered = {k: v for k, v in batch.items() if k != "index"}
    result = quick(outer)(jax.random.key(0), unnumbered)
    assert result["label"].shape == (B, 4)
    np.testing.assert_allclose(result["image"], 2 * batch["image"])


def test_mixup_mixes_images_and_labels_alike():
    classes = 5
    label = jnp.array([0, 1, 2, 3, 4, -1, 0, 1])
    images = jax.nn.one_hot(jnp.where(label < 0, 0, label), classes)[:, None, None, :]
    images = jnp.broadcast_to(images, (8, 2, 2, classes))
    batch = {"image": images, "label": label, "weight": jnp.ones(8).at[7].set(0.0), "index": label}
    mixed = quick(partial(augment.mixup, alpha=1.0, num_classes=classes))(jax.random.key(1), batch)
    known = mixed["label"].sum(axis=1) > 0
    np.testing.assert_allclose(mixed["label"][known], mixed["image"][known][:, 0, 0], atol=1e-6)
    np.testing.assert_allclose(mixed["label"][known].sum(axis=1), 1.0, atol=1e-6)
    assert (np.asarray(mixed["label"][~known]) == 0).all()
    assert 1 <= int((~known).sum()) <= 2
    assert 1 <= int((mixed["weight"] == 0).sum()) <= 2
    np.testing.assert_array_equal(mixed["index"], label)
    none = run(augment.mixup, jax.random.key(1), batch, alpha=0, num_classes=classes)
    np.testing.assert_array_equal(none["image"], images)


@pytest.mark.slow
def test_mixup_labels_of_any_integer_type():
    label = np.array([0, 100, 127, 3])
    batch = {"image": jnp.zeros((4, 2, 2, 1))}
    mix = quick(partial(augment.mixup, alpha=1.0, num_classes=300))
    wanted = mix(jax.random.key(1), {**batch, "label": label.astype(np.int32)})["label"]
    assert wanted[:, [0, 3, 100, 127]].sum() == pytest.approx(4)
    for dtype in (np.int8, np.uint8):
        mixed = mix(jax.random.key(1), {**batch, "label": label.astype(dtype)})
        np.testing.assert_array_equal(mixed["label"], wanted)


def test_mixup_labels_that_are_no_class():
    """An error where labels have values, NaN in every row mixed from them where they are traced."""
    batch = {"image": jnp.zeros((6, 2, 2, 1))}
    for dtype, wrong in ((np.int8, 127), (np.int32, -2), (np.int32, 5)):
        label = np.array([0, 1, wrong, 4, -1, 2], dtype)
        mix = partial(augment.mixup, jax.random.key(1), num_classes=5)
        with pytest.raises(ValueError, match=rf"^batch\['label'\] must hold class.*got {wrong}\.$"):
            mix({**batch, "label": label})
        rows = np.asarray(quick(mix)({**batch, "label": label})["label"])
        partner = np.asarray(jax.random.permutation(jax.random.split(jax.random.key(1))[0], 6))
        np.testing.assert_array_equal(
            np.isnan(rows).all(axis=1), (label == wrong) | (label[partner] == wrong)
        )
        assert not np.isnan(rows[(label != wrong) & (label[partner] != wrong)]).any()


def test_mixup_shares_follow_the_beta_law():
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)), read off images that are all zero but one."""
    label = jnp.zeros(4000, int)
    images = jnp.arange(4000.0).reshape(-1, 1, 1, 1)
    mix = quick(partial(augment.mixup, num_classes=1))
    key = jax.random.key(2)
    partner = np.asarray(jax.random.permutation(jax.random.split(key)[0], 4000))
    own = np.arange(4000.0)
    apart = np.abs(own - own[partner]) > 100
    for alpha in (0.5, 4.0):
        mixed = np.asarray(mix(key, {"image": images, "label": label}, alpha=alpha)["image"])
        share = ((mixed[:, 0, 0, 0] - own[partner]) / np.where(apart, own - own[partner], 1))[apart]
        assert abs(share.mean() - 0.5) < 0.02
        assert abs(share.var() - 1 / (4 * (2 * alpha + 1))) < 0.01


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda k, x: augment.random_crop(jax.random.PRNGKey(0), x), TypeError, "key must"),
        (lambda k, x: augment.random_crop(jax.random.split(k, 3), x), ValueError, "key must"),
        (lambda k, x: augment.random_crop(k, x, padding=-1), ValueError, "padding must"),
        (lambda k, x: augment.random_crop(k, x, padding=1.5), TypeError, "padding must"),
        (lambda k, x: augment.random_flip(k, x[0]), ValueError, "images must"),
        (lambda k, x: augment.random_flip(k, x.astype(int)), TypeError, "images must"),
        (lambda k, x: augment.random_flip(k, x, probability=1.1), ValueError, "probability must"),
        (lambda k, x: augment.cutout(k, x, size=-2), ValueError, "size must"),
        (lambda k, x: augment.affine(k, x, scale=1.0), ValueError, "scale must"),
        (lambda k, x: augment.affine(k, x, rotate=-1.0), ValueError, "rotate must"),
        (lambda k, x: augment.gaussian_blur(k, x, radius=0), ValueError, "radius must"),
        (lambda k, x: augment.gaussian_blur(k, x, sigma=(1, 0)), ValueError, "sigma must"),
        (lambda k, x: augment.gaussian_blur(k, x, sigma=(1, 2, 3)), ValueError, "sigma must"),
        (lambda k, x: augment.gaussian_noise(k, x, std=float("nan")), ValueError, "std must"),
        (lambda k, x: augment.contrast(k, x, factor="much"), TypeError, "factor must"),
        (lambda k, x: augment.normalize(x, 0.0, 0.0), ValueError, "std must"),
        (lambda k, x: augment.normalize(x, (0.0, 1.0), 1.0), ValueError, "mean must"),
        (lambda k, x: augment.mixup(k, {"image": x}, num_classes=2), ValueError, "'label'"),
        (
            lambda k, x: augment.mixup(k, {"image": x, "label": jnp.zeros(B)}, num_classes=2),
            TypeError,
            "label",
        ),
        (
            lambda k, x: augment.compose(augment.random_flip)(k, {"image": x}),
            ValueError,
            "batch has no entry 'index'",
        ),
        (lambda k, x: augment.compose(augment.normalize), TypeError, "mean, std"),
        (lambda k, x: augment.compose(augment.cutout), TypeError, "size"),
        (lambda k, x: augment.compose(3), TypeError, r"functions\[0\]"),
    ],
)
def test_bad_input_is_one_sentence(call, error, words, images):
    with pytest.raises(error, match=words) as caught:
        call(jax.random.key(0), images)
    assert "\n" not in str(caught.value)
