"""Augmentations of colours. They take images in [0, 1], so they come before `normalize`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax.augment import _draws
from kdjax.augment._pixels import to_float

# How bright red, green and blue look (ITU-R 601), as in Pillow.
_LUMA = (0.299, 0.587, 0.114)


def color_jitter(
    key: jax.Array,
    images: jax.Array,
    *,
    brightness: Any = 0.4,
    contrast: Any = 0.4,
    saturation: Any = 0.4,
    hue: Any = 0.1,
    probability: Any = 1.0,
) -> jax.Array:
    """Changes brightness, contrast, saturation and hue, in an order drawn for each image.

        brightness: f x              contrast: f x + (1 - f) mean(grey(x))
        saturation: f x + (1 - f) grey(x)     hue: turned by h of the colour circle

    Each f is uniform in [max(1 - strength, 0), 1 + strength], h in [-hue, hue]. Values are clipped
    to [0, 1] after each change.

    Args:
        key: typed key, or B of them.
        images: [B, H, W, C], uint8 or floating in [0, 1]; 1 or 3 channels. Grey images have no
            saturation and no hue to change.
        brightness: strength, at least 0; 0 changes nothing.
        contrast: strength, at least 0; 0 changes nothing.
        saturation: strength, at least 0; 0 changes nothing.
        hue: largest turn, in [0, 0.5] (half of the circle); 0 changes nothing.
        probability: of an image being changed, in [0, 1].

    Returns:
        [B, H, W, C], at least float32, in [0, 1].

    Raises:
        ValueError: an option is outside its range, or there are other than 1 or 3 channels.

    Example:
        >>> import jax
        >>> images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
        >>> changed = color_jitter(jax.random.key(0), images, brightness=0.8)
        >>> changed.shape, bool(changed.min() >= 0), bool(changed.max() <= 1)
        ((2, 8, 8, 3), True, True)

    Reference:
        T. Chen, S. Kornblith, M. Norouzi, G. Hinton, "A Simple Framework for Contrastive Learning
        of Visual Representations", ICML 2020, appendix A; the arithmetic is that of torchvision.
    """
    images = _colors(images)
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    for name, strength in strengths.items():
        _checks.number(name, strength, low=0)
    hue = _checks.number("hue", hue, low=0, high=0.5)
    draw = _draws.uniform(_draws.keys(key, images), 9)
    known = draw[:, :4].astype(images.dtype)
    factors = []
    for i, strength in enumerate(strengths.values()):
        low = jnp.maximum(1 - jnp.asarray(strength, images.dtype), 0)
        factors.append(low + (1 + strength - low) * known[:, i])
    turn = _pixelwise(hue * (2 * known[:, 3] - 1))
    # The ranks of four draws are a random order of the four changes.
    order = jnp.argsort(draw[:, 4:8], axis=1)

    def change(images: jax.Array, which: jax.Array) -> tuple[jax.Array, None]:
        grey = _grey(images)
        pale = [jnp.zeros_like(grey), grey.mean(axis=(1, 2), keepdims=True), grey]
        result = _turned(images, turn)
        for i, (factor, towards) in enumerate(zip(factors, pale, strict=True)):
            share = _pixelwise(factor)
            # Towards itself is nowhere, which rounding wouldn't give.
            mixed = images if towards is images else share * images + (1 - share) * towards
            result = jnp.where(_pixelwise(which) == i, mixed, result)
        return jnp.clip(result, 0, 1), None

    changed, _ = jax.lax.scan(change, images, order.T)
    return _draws.sometimes(draw[:, 8], probability, changed, images)


def random_grayscale(key: jax.Array, images: jax.Array, *, probability: Any = 0.2) -> jax.Array:
    """Takes the colours away with the given probability: every channel becomes the luminance.

    Args:
        key: typed key, or B of them.
        images: [B, H, W, C], uint8 or floating; 1 channel (nothing to do) or 3.
        probability: in [0, 1]; 0 changes nothing.

    Returns:
        [B, H, W, C], at least float32.

    Raises:
        ValueError: probability is outside [0, 1], or there are other than 1 or 3 channels.

    Example:
        >>> import jax
        >>> red = jax.numpy.array([1.0, 0.0, 0.0]).reshape(1, 1, 1, 3)
        >>> grey = random_grayscale(jax.random.key(0), red, probability=1.0)
        >>> [f"{value:.3f}" for value in grey.ravel()]
        ['0.299', '0.299', '0.299']
    """
    images = _colors(images)
    draw = _draws.uniform(_draws.keys(key, images), 1)
    grey = jnp.broadcast_to(_grey(images), images.shape)
    return _draws.sometimes(draw[:, 0], probability, grey, images)


def solarize(
    key: jax.Array, images: jax.Array, *, threshold: Any = 0.5, probability: Any = 1.0
) -> jax.Array:
    """Inverts the bright values: 1 - x wherever x is at least the threshold.

    Args:
        key: typed key, or B of them.
        images: [B, H, W, C], uint8 or floating in [0, 1].
        threshold: values below it stay; above 1 changes nothing.
        probability: of an image being changed, in [0, 1].

    Returns:
        [B, H, W, C], at least float32.

    Raises:
        ValueError: probability is outside [0, 1].

    Example:
        >>> import jax
        >>> images = jax.numpy.array([0.25, 0.75, 1.0]).reshape(1, 1, 3, 1)
        >>> solarize(jax.random.key(0), images).ravel().tolist()
        [0.25, 0.25, 0.0]

    Reference:
        J. Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML
        2021, section 2.2, after J.-B. Grill et al., "Bootstrap your own latent", NeurIPS 2020.
    """
    images = to_float(images)
    threshold = _checks.number("threshold", threshold)
    draw = _draws.uniform(_draws.keys(key, images), 1)
    inverted = jnp.where(images >= threshold, 1 - images, images)
    return _draws.sometimes(draw[:, 0], probability, inverted, images)


def _colors(images: Any) -> jax.Array:
    images = to_float(images)
    if images.shape[-1] not in (1, 3):
        raise ValueError(
            f"images must have 1 channel or 3 (red, green, blue), got {_checks.describe(images)}."
        )
    return images


def _pixelwise(values: jax.Array) -> jax.Array:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]


def _grey(images: jax.Array) -> jax.Array:
    """[B, H, W, 1]; one-channel images as they are."""
    if images.shape[-1] == 1:
        return images
    red, green, blue = (weight * images[..., i : i + 1] for i, weight in enumerate(_LUMA))
    return red + green + blue


def _turned(images: jax.Array, turn: jax.Array) -> jax.Array:
    """Every pixel's hue moved by ``turn`` of the colour circle; value and chroma stay."""
    if images.shape[-1] == 1:
        return images
    red, green, blue = (images[..., i : i + 1] for i in range(3))
    value = images.max(axis=-1, keepdims=True)
    chroma = value - images.min(axis=-1, keepdims=True)
    unit = jnp.where(chroma > 0, chroma, 1)
    sector = jnp.where(
        value == red,
        (green - blue) / unit,
        jnp.where(value == green, 2 + (blue - red) / unit, 4 + (red - green) / unit),
    )
    # The colour circle in six sectors: red lies at 0, green at 2, blue at 4.
    away = jnp.mod(jnp.array([5, 3, 1], images.dtype)[None, None, None] + sector + 6 * turn, 6)
    shade = jnp.clip(jnp.minimum(away, 4 - away), 0, 1)
    return jnp.where(turn == 0, images, value - chroma * shade)
