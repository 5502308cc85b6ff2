"""Augmentations of pixel values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import _checks
from kdjax.augment import _draws


def to_float(images: jax.Array) -> jax.Array:
    """Scales uint8 images to [0, 1]; floating images pass, as at least float32.

    Args:
        images: [B, H, W, C], uint8 or floating.

    Returns:
        [B, H, W, C], float32 (float64 stays).

    Raises:
        TypeError: images are neither uint8 nor floating.
        ValueError: images are not of shape [B, H, W, C].

    Example:
        >>> import jax.numpy as jnp
        >>> float(to_float(jnp.full((1, 2, 2, 1), 255, jnp.uint8))[0, 0, 0, 0])
        1.0
    """
    images = _checks.as_array("images", images)
    if images.ndim != 4:
        raise ValueError(f"images must have shape [B, H, W, C], got {_checks.describe(images)}.")
    if images.dtype == jnp.uint8:
        # A product: under jit XLA makes one of a division by a constant, which has other last bits.
        return images.astype(jnp.float32) * np.float32(1 / 255)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images must be uint8 or floating, got {_checks.describe(images)}.")
    return images.astype(jnp.promote_types(images.dtype, jnp.float32))


def normalize(images: jax.Array, mean: Any, std: Any) -> jax.Array:
    """Standardises every channel: (images - mean) / std.

    Args:
        images: [B, H, W, C], uint8 (scaled to [0, 1] first) or floating.
        mean: number or [C] (array, tuple), on the scale of the floating images.
        std: number or [C] (array, tuple), above 0.

    Returns:
        [B, H, W, C], at least float32.

    Raises:
        ValueError: mean or std has the wrong shape, or std is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> float(normalize(jnp.ones((1, 2, 2, 1)), 0.5, 0.25)[0, 0, 0, 0])
        2.0
    """
    images = to_float(images)
    mean = _draws.per_channel("mean", mean, images)
    return (images - mean) / _draws.per_channel("std", std, images, above=0)


def gaussian_blur(
    key: jax.Array,
    images: jax.Array,
    *,
    sigma: Any = (0.1, 1.0),
    radius: int = 3,
    probability: Any = 1.0,
) -> jax.Array:
    """Convolves every image with a Gaussian of its own width; edges are repeated outwards.

    Args:
        key: typed key, or B of them.
        images: [B, H, W, C], uint8 or floating.
        sigma: standard deviation in pixels, at least 0: a number, or (low, high) to draw it
            uniformly for each image; 0 changes nothing.
        radius: the kernel has 2 * radius + 1 taps; take about 3 sigma.
        probability: of an image being blurred, in [0, 1].

    Returns:
        [B, H, W, C], at least float32.

    Raises:
        ValueError: an option is outside its range.

    Example:
        >>> import jax
        >>> images = jax.numpy.ones((2, 8, 8, 1))
        >>> bool(abs(gaussian_blur(jax.random.key(0), images, sigma=0.7) - 1).max() < 1e-6)
        True
    """
    images = to_float(images)
    radius = _checks.count("radius", radius)
    draw = _draws.uniform(_draws.keys(key, images), 2)
    # Below a hundredth of a pixel the kernel is exactly one tap; the floor avoids 0 / 0.
    width = jnp.maximum(_draws.strength("sigma", draw[:, 0], sigma, images.dtype), 1e-2)
    taps = jnp.arange(-radius, radius + 1, dtype=images.dtype)
    kernel = jnp.exp(-jnp.square(taps[None, :] / width[:, None]) / 2)
    kernel = kernel / kernel.sum(axis=1, keepdims=True)
    blurred = images
    for axis in (1, 2):
        pad = [(radius, radius) if i == axis else (0, 0) for i in range(4)]
        padded, length = jnp.pad(blurred, pad, mode="edge"), images.shape[axis]
        shifted = [
            jax.lax.slice_in_dim(padded, i, i + length, axis=axis) * kernel[:, i, None, None, None]
            for i in range(2 * radius + 1)
        ]
        blurred = sum(shifted[1:], shifted[0])
    return _draws.sometimes(draw[:, 1], probability, blurred, images)


def gaussian_noise(
    key: jax.Array, images: jax.Array, *, std: Any = 0.1, probability: Any = 1.0
) -> jax.Array:
    """Adds independent normal noise to every value; the result is not clipped.

    Args:
        key: typed key, or B of them.
        images: [B, H, W, C], uint8 or floating.
        std: standard deviation on the scale of the floating images, at least 0: a number, or
            (low, high) to draw it uniformly for each image; 0 changes nothing.
        probability: of an image being changed, in [0, 1].

    Returns:
        [B, H, W, C], at least float32.

    Raises:
        ValueError: an option is outside its range.

    Example:
        >>> import jax
        >>> images = jax.numpy.zeros((2, 32, 32, 3))
        >>> bool(abs(gaussian_noise(jax.random.key(0), images, std=0.1).std() - 0.1) < 0.01)
        True
    """
    images = to_float(images)
    keys = jax.vmap(jax.random.split)(_draws.keys(key, images))
    draw = _draws.uniform(keys[:, 1], 2)
    width = _draws.strength("std", draw[:, 0], std, images.dtype)[:, None, None, None]
    noise = jax.vmap(lambda k: jax.random.normal(k, images.shape[1:], images.dtype))(keys[:, 0])
    return _draws.sometimes(draw[:, 1], probability, images + width * noise, images)


def contrast(
    key: jax.Array, images: jax.Array, *, factor: Any = (0.5, 1.5), probability: Any = 1.0
) -> jax.Array:
    """Moves every image away from its mean, or towards it: factor x + (1 - factor) mean(x).

    Args:
        key: typed key, or B of them.
        images: [B, H, W, C], uint8 or floating; the mean is over H, W and C.
        factor: at least 0: a number, or (low, high) to draw it uniformly for each image; 1 changes
            nothing, 0 leaves the mean.
        probability: of an image being changed, in [0, 1].

    Returns:
        [B, H, W, C], at least float32, not clipped.

    Raises:
        ValueError: an option is outside its range.

    Example:
        >>> import jax
        >>> image = jax.numpy.asarray([0.0, 1.0]).reshape(1, 1, 2, 1)
        >>> contrast(jax.random.key(0), image, factor=0.5).ravel().tolist()
        [0.25, 0.75]
    """
    images = to_float(images)
    draw = _draws.uniform(_draws.keys(key, images), 2)
    amount = _draws.strength("factor", draw[:, 0], factor, images.dtype)[:, None, None, None]
    changed = amount * images + (1 - amount) * images.mean(axis=(1, 2, 3), keepdims=True)
    return _draws.sometimes(draw[:, 1], probability, changed, images)
