"""Common corruptions of images in [0, 1].

After Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019. This is our reading of their corruptions, not their code: results are not
rounded to 8 bits, fog comes from smooth noise rather than from a diamond-square fractal, and
contrast is that of the whole image. So accuracies here are not those of CIFAR-10-C's files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import _checks
from kdjax.augment import _draws
from kdjax.augment._pixels import contrast, gaussian_blur, gaussian_noise, to_float

Corruption = Callable[[jax.Array, jax.Array], jax.Array]

# Severities 1 to 5 of CIFAR-10-C. Fog there is (strength, decay of the octaves).
_SEVERITIES: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500.0, 250.0, 100.0, 75.0, 50.0),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    "fog": ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
}


def corruptions(severity: int) -> dict[str, Corruption]:
    """Common corruptions by name, with the strengths that CIFAR-10-C has at a severity.

    ======================  =====================================
    gaussian_noise          std 0.04, 0.06, 0.08, 0.09, 0.10
    shot_noise              photons 500, 250, 100, 75, 50
    impulse_noise           amount 0.01, 0.02, 0.03, 0.05, 0.07
    gaussian_blur           sigma 0.4, 0.6, 0.7, 0.8, 1.0
    fog                     strength 0.2, 0.5, 0.75, 1.0, 1.5 with decay 3, 3, 2.5, 2, 1.75
    brightness              shift 0.05, 0.1, 0.15, 0.2, 0.3
    contrast                factor 0.75, 0.5, 0.4, 0.3, 0.15
    pixelate                factor 0.95, 0.9, 0.85, 0.75, 0.65
    ======================  =====================================

    The names and strengths are those of the paper's code for 32x32 images, the functions our own
    reading: accuracies are not comparable to figures on CIFAR-10-C's files.

    Args:
        severity: 1 to 5.

    Returns:
        Name to a function ``(key, images [B, H, W, C]) -> images`` with results in [0, 1]. They are
        `jax.tree_util.Partial`, so that a jitted function that takes one as an argument compiles
        once for all severities.

    Raises:
        ValueError: ``severity`` is not 1 to 5.

    Example:
        >>> import jax
        >>> from kdjax import augment
        >>> images = jax.numpy.full((2, 8, 8, 1), 0.5)
        >>> fog = augment.corruptions(3)["fog"]
        >>> fog(jax.random.key(0), images).shape
        (2, 8, 8, 1)

    Reference:
        D. Hendrycks, T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions
        and Perturbations", ICLR 2019, section 3, and its code for CIFAR-10-C (constants).
    """
    severity = _checks.count("severity", severity, high=5)
    chosen = {name: strengths[severity - 1] for name, strengths in _SEVERITIES.items()}
    strength, decay = chosen["fog"]
    part = jax.tree_util.Partial
    return {
        "gaussian_noise": part(_clipped_noise, std=chosen["gaussian_noise"]),
        "shot_noise": part(shot_noise, photons=chosen["shot_noise"]),
        "impulse_noise": part(impulse_noise, amount=chosen["impulse_noise"]),
        "gaussian_blur": part(_blur, sigma=chosen["gaussian_blur"]),
        "fog": part(fog, strength=strength, decay=decay),
        "brightness": part(brightness, shift=chosen["brightness"]),
        "contrast": part(_clipped_contrast, factor=chosen["contrast"]),
        "pixelate": part(pixelate, factor=chosen["pixelate"]),
    }


def shot_noise(
    key: jax.Array, images: jax.Array, *, photons: Any = 100.0, probability: Any = 1.0
) -> jax.Array:
    """Counts light: every value becomes Poisson(photons * x) / photons, clipped to [0, 1].

    Args:
        key: typed key of JAX's default kind (threefry), or B of them.
        images: [B, H, W, C], uint8 or floating in [0, 1]; a negative value counts as 0.
        photons: expected count of a value of 1, above 0: a number, or (low, high) to draw it
            uniformly for each image. The noise of a value x has standard deviation
            sqrt(x / photons).
        probability: of an image being changed, in [0, 1].

    Returns:
        [B, H, W, C], at least float32.

    Raises:
        ValueError: an option is outside its range.

    Example:
        >>> import jax
        >>> images = jax.numpy.full((2, 32, 32, 3), 0.25)
        >>> bool(abs(shot_noise(jax.random.key(0), images, photons=100.0).std() - 0.05) < 0.005)
        True

    Reference:
        D. Hendrycks, T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions
        and Perturbations", ICLR 2019, section 3.
    """
    images = to_float(images)
    for bound in photons if isinstance(photons, (tuple, list)) else (photons,):
        _checks.number("photons", bound, above=0)
    keys, draw = _noise_keys(key, images)
    rate = _draws.strength("photons", draw[:, 0], photons, images.dtype)[:, None, None, None]
    expected = rate * jnp.maximum(images, 0)
    counts = jax.vmap(lambda k, mean: jax.random.poisson(k, mean))(keys, expected)
    noisy = jnp.clip(counts.astype(images.dtype) / rate, 0, 1)
    return _draws.sometimes(draw[:, 1], probability, noisy, images)


def impulse_noise(
    key: jax.Array, images: jax.Array, *, amount: Any = 0.03, probability: Any = 1.0
) -> jax.Array:
    """Salt and pepper: a share of the values becomes 0 or 1, as often the one as the other.

    Args:
        key: typed key, or B of them.
        images: [B, H, W, C], uint8 or floating. Each channel of a pixel is hit by itself.
        amount: share of values hit, from 0 to 1: a number, or (low, high) to draw it uniformly for
            each image; 0 changes nothing but values outside [0, 1].
        probability: of an image being changed, in [0, 1].

    Returns:
        [B, H, W, C], at least float32, clipped to [0, 1].

    Raises:
        ValueError: an option is outside its range.

    Example:
        >>> import jax
        >>> images = jax.numpy.full((2, 32, 32, 3), 0.5)
        >>> hit = impulse_noise(jax.random.key(0), images, amount=0.1) != images
        >>> bool(abs(hit.mean() - 0.1) < 0.02)
        True

    Reference:
        D. Hendrycks, T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions
        and Perturbations", ICLR 2019, section 3.
    """
    images = to_float(images)
    for bound in amount if isinstance(amount, (tuple, list)) else (amount,):
        _checks.number("amount", bound, low=0, high=1)
    keys, draw = _noise_keys(key, images)
    share = _draws.strength("amount", draw[:, 0], amount, images.dtype)[:, None, None, None]
    place = jax.vmap(lambda k: jax.random.uniform(k, images.shape[1:], images.dtype))(keys)
    salt = (place < share / 2).astype(images.dtype)
    noisy = jnp.where(place < share, salt, jnp.clip(images, 0, 1))
    return _draws.sometimes(draw[:, 1], probability, noisy, images)


def brightness(
    key: jax.Array, images: jax.Array, *, shift: Any = 0.15, probability: Any = 1.0
) -> jax.Array:
    """Adds to the value of the HSV colours, the largest channel; hue and saturation stay.

        v = max_c x_c;   x_c -> x_c * min(v + shift, 1) / v

    Args:
        key: typed key, or B of them.
        images: [B, H, W, C], uint8 or floating in [0, 1].
        shift: at least 0: a number, or (low, high) to draw it uniformly for each image; 0 changes
            nothing.
        probability: of an image being changed, in [0, 1].

    Returns:
        [B, H, W, C], at least float32, clipped to [0, 1].

    Raises:
        ValueError: an option is outside its range.

    Example:
        >>> import jax
        >>> pixel = jax.numpy.asarray([0.5, 0.25, 0.0]).reshape(1, 1, 1, 3)
        >>> brightness(jax.random.key(0), pixel, shift=0.25).ravel().tolist()
        [0.75, 0.375, 0.0]

    Reference:
        D. Hendrycks, T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions
        and Perturbations", ICLR 2019, section 3.
    """
    images = to_float(images)
    draw = _draws.uniform(_draws.keys(key, images), 2)
    amount = _draws.strength("shift", draw[:, 0], shift, images.dtype)[:, None, None, None]
    value = images.max(axis=-1, keepdims=True)
    lit = jnp.clip(value + amount, 0, 1)
    # Black has no hue: it becomes grey.
    changed = jnp.where(value > 0, images * (lit / jnp.where(value > 0, value, 1)), lit)
    return _draws.sometimes(draw[:, 1], probability, jnp.clip(changed, 0, 1), images)


def pixelate(
    key: jax.Array, images: jax.Array, *, factor: Any = 0.85, probability: Any = 1.0
) -> jax.Array:
    """Shrinks every image by averaging, and enlarges it again by repeating pixels.

    A side of n pixels becomes ``floor(n * factor)`` blocks, at least one; a block is the mean of
    the source over its area.

    Args:
        key: typed key, or B of them.
        images: [B, H, W, C], uint8 or floating in [0, 1].
        factor: share of each side that is kept, from 0 to 1: a number, or (low, high) to draw it
            uniformly for each image; 1 changes nothing, 0 leaves the mean.
        probability: of an image being changed, in [0, 1].

    Returns:
        [B, H, W, C], at least float32, clipped to [0, 1].

    Raises:
        ValueError: an option is outside its range.

    Example:
        >>> import jax
        >>> image = jax.numpy.asarray([0.0, 0.5, 0.5, 1.0]).reshape(1, 1, 4, 1)
        >>> pixelate(jax.random.key(0), image, factor=0.5).ravel().tolist()
        [0.25, 0.25, 0.75, 0.75]

    Reference:
        D. Hendrycks, T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions
        and Perturbations", ICLR 2019, section 3.
    """
    images = to_float(images)
    for bound in factor if isinstance(factor, (tuple, list)) else (factor,):
        _checks.number("factor", bound, low=0, high=1)
    draw = _draws.uniform(_draws.keys(key, images), 2)
    kept = _draws.strength("factor", draw[:, 0], factor, images.dtype)
    shrunk = jnp.einsum(
        "bij,bjwc->biwc", _blocks(kept, images.shape[1]), images, precision="highest"
    )
    shrunk = jnp.einsum(
        "bij,bhjc->bhic", _blocks(kept, images.shape[2]), shrunk, precision="highest"
    )
    return _draws.sometimes(draw[:, 1], probability, jnp.clip(shrunk, 0, 1), images)


def fog(
    key: jax.Array,
    images: jax.Array,
    *,
    strength: Any = 0.75,
    decay: Any = 2.5,
    probability: Any = 1.0,
) -> jax.Array:
    """Lays bright smooth noise over every image and scales back to its largest value.

        x -> (x + strength * f) * m / (m + strength),   m = max x,   f in [0, 1] the same in all
        channels

    f is uniform noise on grids of 2, 3, 5, 9, ... points to a side, interpolated linearly, each
    grid ``decay`` times weaker than the coarser one before, stretched to [0, 1].

    Args:
        key: typed key, or B of them.
        images: [B, H, W, C], uint8 or floating in [0, 1].
        strength: at least 0: a number, or (low, high) to draw it uniformly for each image; 0
            changes nothing.
        decay: above 0; large is smooth.
        probability: of an image being changed, in [0, 1].

    Returns:
        [B, H, W, C], at least float32, clipped to [0, 1].

    Raises:
        ValueError: an option is outside its range.

    Example:
        >>> import jax
        >>> images = jax.numpy.zeros((2, 8, 8, 1)).at[:, 0].set(1.0)
        >>> foggy = fog(jax.random.key(0), images, strength=1.0)
        >>> bool(foggy[:, 1:].mean() > 0.1 and foggy.max() <= 1)
        True

    Reference:
        D. Hendrycks, T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions
        and Perturbations", ICLR 2019, section 3. The noise is ours.
    """
    images = to_float(images)
    decay = jnp.asarray(_checks.number("decay", decay, above=0), images.dtype)
    keys, draw = _noise_keys(key, images)
    amount = _draws.strength("strength", draw[:, 0], strength, images.dtype)[:, None, None, None]
    cover = jax.vmap(lambda k: _smooth_noise(k, images.shape[1:3], decay))(keys)[..., None]
    most = images.max(axis=(1, 2, 3), keepdims=True)
    # A black image without fog stays what it is.
    scale = most / jnp.where(most + amount > 0, most + amount, 1)
    foggy = jnp.where(amount > 0, (images + amount * cover) * scale, images)
    return _draws.sometimes(draw[:, 1], probability, jnp.clip(foggy, 0, 1), images)


def _clipped_noise(key: jax.Array, images: jax.Array, *, std: Any) -> jax.Array:
    return jnp.clip(gaussian_noise(key, images, std=std), 0, 1)


def _blur(key: jax.Array, images: jax.Array, *, sigma: Any) -> jax.Array:
    return jnp.clip(gaussian_blur(key, images, sigma=sigma), 0, 1)


def _clipped_contrast(key: jax.Array, images: jax.Array, *, factor: Any) -> jax.Array:
    return jnp.clip(contrast(key, images, factor=factor), 0, 1)


def _noise_keys(key: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each image's key for noise of its own shape, and two draws in [0, 1)."""
    keys = jax.vmap(jax.random.split)(_draws.keys(key, images))
    return keys[:, 0], _draws.uniform(keys[:, 1], 2)


def _blocks(kept: jax.Array, length: int) -> jax.Array:
    """[B, length, length] rows of weights: the mean over the block in which a pixel lies."""
    # Products such as 10 * 0.7 may end just below the whole number that they mean.
    count = jnp.maximum(jnp.floor(length * kept + 1e-3), 1)[:, None, None]
    place = jnp.arange(length, dtype=kept.dtype)
    number = jnp.floor((place[None, :, None] + 0.5) * count / length)
    start, end = number * length / count, (number + 1) * length / count
    from_, to = place[None, None, :], place[None, None, :] + 1
    overlap = jnp.clip(jnp.minimum(to, end) - jnp.maximum(from_, start), 0, None)
    return overlap / overlap.sum(axis=-1, keepdims=True)


def _smooth_noise(key: jax.Array, shape: tuple[int, ...], decay: jax.Array) -> jax.Array:
    """[H, W] noise from 0 to 1."""
    sizes = [1]
    while sizes[-1] < max(shape):
        sizes.append(2 * sizes[-1])
    ends = np.cumsum([(cells + 1) ** 2 for cells in sizes])
    draws = jax.random.uniform(key, (int(ends[-1]),), decay.dtype)
    total, weight = jnp.zeros(shape, decay.dtype), jnp.ones((), decay.dtype)
    for cells, points in zip(sizes, jnp.split(draws, ends[:-1]), strict=True):
        grid = points.reshape(cells + 1, cells + 1)
        total += weight * _stretch(shape[0], grid) @ grid @ _stretch(shape[1], grid).T
        weight = weight / decay
    low, high = total.min(), total.max()
    return (total - low) / jnp.where(high > low, high - low, 1)


def _stretch(length: int, points: jax.Array) -> jax.Array:
    """[length, points] weights of linear interpolation from a grid over the whole side."""
    at = jnp.linspace(0, len(points) - 1, length, dtype=points.dtype)[:, None]
    distance = jnp.abs(at - jnp.arange(len(points), dtype=points.dtype)[None, :])
    return jnp.maximum(1 - distance, 0)
