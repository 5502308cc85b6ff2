"""The crop of ImageNet training: a random rectangle, resized."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax.augment import _draws
from kdjax.augment._pixels import to_float

_TRIES = 10


def _triangle(x: jax.Array) -> jax.Array:
    return jnp.maximum(1 - x, 0)


def _keys_cubic(x: jax.Array) -> jax.Array:
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


# Of the distance in pixels, at least 0; the cubic is Keys' with a = -0.5, as in Pillow.
_KERNELS = MappingProxyType({"linear": _triangle, "cubic": _keys_cubic})


def random_resized_crop(
    key: jax.Array,
    images: jax.Array,
    *,
    scale: Any = (0.08, 1.0),
    ratio: Any = (3 / 4, 4 / 3),
    size: int | tuple[int, int] | None = None,
    method: str = "linear",
) -> jax.Array:
    """Cuts out a rectangle of random size, shape and place and resizes it.

    Its area is uniform in ``scale``, its logarithm of width / height uniform in that of ``ratio``.
    Ten are drawn for each image and the first that fits is taken; if none does, the largest about
    the centre with the nearest allowed shape. Resizing sees nothing outside the rectangle, and
    averages where it makes it smaller.

    Args:
        key: typed key, or B of them.
        images: [B, H, W, C], uint8 or floating.
        scale: share of the image's area, in (0, 1]: a number, or (low, high). SimCLR and Barlow
            Twins use (0.08, 1).
        ratio: width / height, above 0: a number, or (low, high).
        size: of the result, (H', W') or one number for both; by default that of the images.
        method: ``"linear"``, or ``"cubic"``, which can overshoot (nothing is clipped).

    Returns:
        [B, H', W', C], at least float32. With scale = 1 and the ratio W / H, exactly the images.

    Raises:
        ValueError: an option is outside its range.

    Example:
        >>> import jax
        >>> images = jax.numpy.ones((2, 32, 32, 3))
        >>> random_resized_crop(jax.random.key(0), images, size=24).shape
        (2, 24, 24, 3)

    Reference:
        C. Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6; the draws are
        those of torchvision's RandomResizedCrop.
    """
    images = to_float(images)
    height, width = images.shape[1:3]
    size = _size(size, height, width)
    kernel = _KERNELS[_checks.choice("method", method, _KERNELS)]
    area, shape = _bounds("scale", scale, high=1), _bounds("ratio", ratio)
    draw = _draws.uniform(_draws.keys(key, images), 2 * _TRIES + 2).astype(images.dtype)
    tall, wide, centred = _sides(draw, area, shape, height, width)

    def start(draw: jax.Array, room: jax.Array) -> jax.Array:
        return jnp.where(centred, jnp.floor(room / 2), jnp.floor(draw * (room + 1)))

    rows = _weights(start(draw[:, -2], height - tall), tall, height, size[0], kernel)
    columns = _weights(start(draw[:, -1], width - wide), wide, width, size[1], kernel)
    # In half-precision passes, some accelerators' default, images would lose digits.
    exact = jax.lax.Precision.HIGHEST
    images = jnp.einsum("bph,bhwc->bpwc", rows, images, precision=exact)
    return jnp.einsum("bqw,bpwc->bpqc", columns, images, precision=exact)


def _sides(
    draw: jax.Array, area: tuple[Any, Any], shape: tuple[Any, Any], height: int, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whole heights and widths [B] of the rectangles, and which must be centred [B]."""
    pixels = height * width * (area[0] + (area[1] - area[0]) * draw[:, :_TRIES])
    low, high = jnp.log(shape[0]), jnp.log(shape[1])
    ratio = jnp.exp(low + (high - low) * draw[:, _TRIES : 2 * _TRIES])
    tall, wide = jnp.round(jnp.sqrt(pixels / ratio)), jnp.round(jnp.sqrt(pixels * ratio))
    fits = (tall >= 1) & (wide >= 1) & (tall <= height) & (wide <= width)
    first, some = jnp.argmax(fits, axis=1)[:, None], fits.any(axis=1)
    whole = width / height

    def chosen(drawn: jax.Array, otherwise: jax.Array) -> jax.Array:
        found = jnp.where(some, jnp.take_along_axis(drawn, first, axis=1)[:, 0], otherwise)
        return jnp.maximum(found, 1)

    tall = chosen(tall, jnp.where(whole < shape[0], jnp.round(width / shape[0]), height))
    wide = chosen(wide, jnp.where(whole > shape[1], jnp.round(height * shape[1]), width))
    return tall, wide, ~some


def _weights(
    start: jax.Array,
    length: jax.Array,
    old: int,
    new: int,
    kernel: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """[B, new, old]: how much each old pixel counts in each new one."""
    step = (length / new)[:, None, None]
    place = jnp.arange(old, dtype=start.dtype)[None, None, :]
    centre = (jnp.arange(new, dtype=start.dtype)[None, :, None] + 0.5) * step - 0.5
    centre = centre + start[:, None, None]
    weights = kernel(jnp.abs(place - centre) / jnp.maximum(step, 1))
    begin = start[:, None, None]
    inside = (place >= begin) & (place < begin + length[:, None, None])
    weights = jnp.where(inside, weights, 0)
    return weights / weights.sum(axis=2, keepdims=True)


def _size(size: Any, height: int, width: int) -> tuple[int, int]:
    if size is None:
        return height, width
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"size must be a number or a pair (height, width), got {size!r}.")
    return _checks.count("size", sides[0]), _checks.count("size", sides[1])


def _bounds(name: str, value: Any, *, high: float | None = None) -> tuple[Any, Any]:
    """The ends of a range above 0 that is given as a number or a pair."""
    if not isinstance(value, (tuple, list)):
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"{name} must be a number or a pair (low, high), got {value!r}.")
    start, end = (_checks.number(name, bound, above=0, high=high) for bound in value)
    if not (_checks.is_traced(start) or _checks.is_traced(end)) and start > end:
        raise ValueError(f"{name} must be a pair (low, high) with low <= high, got {value!r}.")
    return start, end
