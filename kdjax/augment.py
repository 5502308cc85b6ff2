"""Image augmentation as pure functions that run inside the compiled step.

An image function is ``(key, images, *, options) -> images`` (``normalize`` and ``to_float`` need no
key); a batch function is ``(key, batch, *, options) -> batch``. ``compose`` chains both kinds.
Images are [B, H, W, C]: floating, or uint8, which is scaled to [0, 1] first. Results are at least
float32. ``key`` is one typed key, split over the images, or B typed keys, one per image.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import _checks

__all__ = [
    "affine",
    "compose",
    "contrast",
    "cutout",
    "gaussian_blur",
    "gaussian_noise",
    "mixup",
    "normalize",
    "random_crop",
    "random_flip",
    "to_float",
]

Batch = dict[str, Any]


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
    mean = _per_channel("mean", mean, images)
    return (images - mean) / _per_channel("std", std, images, above=0)


def random_crop(key: jax.Array, images: jax.Array, *, padding: int = 4) -> jax.Array:
    """Pads with zeros on each side and crops back to the old size at a random place.

    Args:
        key: typed key, or B of them.
        images: [B, H, W, C], uint8 or floating.
        padding: pixels on each side, at least 0; 0 changes nothing.

    Returns:
        [B, H, W, C], at least float32.

    Raises:
        TypeError: key is not a typed key, or padding not an integer.

    Example:
        >>> import jax
        >>> images = jax.numpy.ones((8, 32, 32, 3))
        >>> random_crop(jax.random.key(0), images, padding=4).shape
        (8, 32, 32, 3)

    Reference:
        K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition", CVPR 2016,
        section 4.2.
    """
    images = to_float(images)
    padding = _checks.count("padding", padding, low=0)
    offset = _whole(_uniform(_keys(key, images), 2), 2 * padding + 1)
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def crop(offset: jax.Array, image: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    # The gather this becomes is the fastest of eight spellings on CPU: 0.1 ms for
    # [128, 32, 32, 3]; take_along_axis twice as slow, one-hot products and selects 10 to 70 times.
    return jax.vmap(crop)(offset, padded)


def random_flip(key: jax.Array, images: jax.Array, *, probability: Any = 0.5) -> jax.Array:
    """Mirrors left and right with the given probability.

    Args:
        key: typed key, or B of them.
        images: [B, H, W, C], uint8 or floating.
        probability: in [0, 1]; 0 changes nothing.

    Returns:
        [B, H, W, C], at least float32.

    Raises:
        ValueError: probability is outside [0, 1].

    Example:
        >>> import jax
        >>> image = jax.numpy.arange(3.0).reshape(1, 1, 3, 1)
        >>> random_flip(jax.random.key(0), image, probability=1.0).ravel().tolist()
        [2.0, 1.0, 0.0]
    """
    images = to_float(images)
    draw = _uniform(_keys(key, images), 1)
    return _sometimes(draw[:, 0], probability, images[:, :, ::-1], images)


def cutout(
    key: jax.Array, images: jax.Array, *, size: Any, fill: Any = 0.0, probability: Any = 1.0
) -> jax.Array:
    """Fills a square at a random place; its centre is anywhere, so part may lie outside.

    Args:
        key: typed key, or B of them.
        images: [B, H, W, C], uint8 or floating.
        size: side of the square in pixels, a whole number, at least 0; 0 changes nothing. The paper
            uses 16 for CIFAR-10 and 8 for CIFAR-100.
        fill: value of the square; 0 is the mean of normalised images.
        probability: of an image being cut, in [0, 1].

    Returns:
        [B, H, W, C], at least float32.

    Raises:
        ValueError: size is negative or probability outside [0, 1].

    Example:
        >>> import jax
        >>> images = jax.numpy.ones((1, 8, 8, 1))
        >>> bool(cutout(jax.random.key(0), images, size=4).sum() < 64)
        True

    Reference:
        T. DeVries, G. W. Taylor, "Improved regularization of convolutional neural networks with
        cutout", arXiv:1708.04552, 2017, section 3.
    """
    images = to_float(images)
    size = _checks.number("size", size, low=0)
    fill = _checks.number("fill", fill)
    draw = _uniform(_keys(key, images), 3)
    height, width = images.shape[1:3]
    row = jnp.arange(height)[None, :] - (_whole(draw[:, :1], height) - size // 2)
    column = jnp.arange(width)[None, :] - (_whole(draw[:, 1:2], width) - size // 2)
    inside_row, inside_column = (row >= 0) & (row < size), (column >= 0) & (column < size)
    covered = inside_row[:, :, None, None] & inside_column[:, None, :, None]
    cut = jnp.where(covered, jnp.asarray(fill, images.dtype), images)
    return _sometimes(draw[:, 2], probability, cut, images)


def affine(
    key: jax.Array,
    images: jax.Array,
    *,
    rotate: Any = 10.0,
    translate: Any = 0.1,
    scale: Any = 0.1,
    probability: Any = 1.0,
) -> jax.Array:
    """Rotates, shifts and scales a little, about the centre; bilinear, zeros outside.

    Args:
        key: typed key, or B of them.
        images: [B, H, W, C], uint8 or floating.
        rotate: largest rotation in degrees, at least 0; the angle is uniform in [-rotate, rotate].
        translate: largest shift as a fraction of height and width, at least 0.
        scale: largest relative change of size, in [0, 1): the factor is uniform in
            [1 - scale, 1 + scale].
        probability: of an image being moved, in [0, 1].

    Returns:
        [B, H, W, C], at least float32. With rotate = translate = scale = 0, exactly the images.

    Raises:
        ValueError: an option is outside its range.

    Example:
        >>> import jax
        >>> affine(jax.random.key(0), jax.numpy.ones((2, 8, 8, 1)), rotate=15.0).shape
        (2, 8, 8, 1)
    """
    images = to_float(images)
    rotate = _checks.number("rotate", rotate, low=0)
    translate = _checks.number("translate", translate, low=0)
    scale = _checks.number("scale", scale, low=0, below=1)
    draw = _uniform(_keys(key, images), 5)
    height, width = images.shape[1:3]
    extent = jnp.asarray([height, width], images.dtype)

    def move(draw: jax.Array, image: jax.Array) -> jax.Array:
        angle, factor, down, across = 2 * draw[:4].astype(images.dtype) - 1
        angle, factor = jnp.deg2rad(rotate * angle), 1 + scale * factor
        cos, sin = jnp.cos(angle) / factor, jnp.sin(angle) / factor
        shift = translate * extent * jnp.stack([down, across])
        centre = (extent - 1) / 2
        row = (jnp.arange(height, dtype=images.dtype) - centre[0] - shift[0])[:, None]
        column = (jnp.arange(width, dtype=images.dtype) - centre[1] - shift[1])[None, :]
        return _bilinear(
            image, cos * row - sin * column + centre[0], sin * row + cos * column + centre[1]
        )

    return _sometimes(draw[:, 4], probability, jax.vmap(move)(draw, images), images)


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
    draw = _uniform(_keys(key, images), 2)
    # Below a hundredth of a pixel the kernel is exactly one tap; the floor avoids 0 / 0.
    width = jnp.maximum(_strength("sigma", draw[:, 0], sigma, images.dtype), 1e-2)
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
    return _sometimes(draw[:, 1], probability, blurred, images)


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
    keys = jax.vmap(jax.random.split)(_keys(key, images))
    draw = _uniform(keys[:, 1], 2)
    width = _strength("std", draw[:, 0], std, images.dtype)[:, None, None, None]
    noise = jax.vmap(lambda k: jax.random.normal(k, images.shape[1:], images.dtype))(keys[:, 0])
    return _sometimes(draw[:, 1], probability, images + width * noise, images)


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
    draw = _uniform(_keys(key, images), 2)
    amount = _strength("factor", draw[:, 0], factor, images.dtype)[:, None, None, None]
    changed = amount * images + (1 - amount) * images.mean(axis=(1, 2, 3), keepdims=True)
    return _sometimes(draw[:, 1], probability, changed, images)


def mixup(key: jax.Array, batch: Mapping[str, Any], *, alpha: Any = 0.2, num_classes: int) -> Batch:
    """Mixes every example with another of the batch: l x_i + (1 - l) x_j, l ~ Beta(alpha, alpha).

    ``label`` becomes the same mixture of the one-hot labels. Where either label is -1 its row is
    all zeros: such rows count in soft terms only. ``weight`` becomes the product of both weights.
    Stored teacher outputs in the batch are those of the unmixed images: don't use them with it.

    Args:
        key: one typed key. Partners are drawn within the batch as the function sees it, so under
            shard_map and pmap within each device's part.
        batch: dict with ``image`` [B, H, W, C] and ``label`` [B], whole numbers from -1.
        alpha: at least 0; 0 changes no image. The paper uses 1 for CIFAR, 0.2 for ImageNet.
        num_classes: C, at least 1.

    Returns:
        The batch with ``image`` [B, H, W, C], ``label`` float [B, C], other entries as they were.

    Raises:
        ValueError: batch has no image or label, or alpha is negative.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> batch = {"image": jnp.ones((2, 4, 4, 1)), "label": jnp.array([0, 2])}
        >>> mixup(jax.random.key(0), batch, alpha=1.0, num_classes=3)["label"].sum(axis=1).tolist()
        [1.0, 1.0]

    Reference:
        H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz, "mixup: beyond empirical risk
        minimization", ICLR 2018, equation 2.
    """
    images = to_float(_checks.entry("batch", batch, "image"))
    label = _checks.integer("batch['label']", _checks.entry("batch", batch, "label"), ndim=1)
    alpha = jnp.asarray(_checks.number("alpha", alpha, low=0), images.dtype)
    classes = _checks.count("num_classes", num_classes)
    if jnp.shape(key) != ():
        raise ValueError(f"key must be one typed key, got {_checks.describe(key)}.")
    _keys(key, images)
    order_key, share_key = jax.random.split(key)
    partner = jax.random.permutation(order_key, images.shape[0])
    shape = jnp.where(alpha > 0, alpha, 1.0)
    drawn = jax.random.beta(share_key, shape, shape, label.shape, images.dtype)
    share = jnp.where(alpha > 0, drawn, 1.0)

    pixel_share = share[:, None, None, None]
    target = jax.nn.one_hot(label, classes, dtype=images.dtype)
    known = ((label >= 0) & (label[partner] >= 0))[:, None]
    target = share[:, None] * target + (1 - share[:, None]) * target[partner]
    mixed = dict(batch)
    mixed["image"] = pixel_share * images + (1 - pixel_share) * images[partner]
    mixed["label"] = jnp.where(known, target, 0.0)
    if "weight" in batch:
        weight = jnp.asarray(batch["weight"])
        mixed["weight"] = weight * weight[partner]
    return mixed


def compose(*functions: Callable[..., Any]) -> Callable[[jax.Array, Mapping[str, Any]], Batch]:
    """Chains augmentations into one function (key, batch) -> batch.

    Options are bound with ``functools.partial``. What is left of a function's signature says how it
    is called: ``(images)`` and ``(key, images)`` get ``batch["image"]``; a function whose second
    argument is named ``batch`` gets the whole batch and one key. The images' keys are
    ``fold_in(fold_in(key, position), batch["index"])``: what happens to an example depends on the
    key and its index only, never on how the batch is ordered, cut or sharded.

    Args:
        *functions: image and batch functions, in the order in which they are applied.

    Returns:
        A function (key, batch) -> batch; key is one typed key, batch has ``image`` and ``index``.

    Raises:
        TypeError: a function has another signature.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from functools import partial
        >>> augment = compose(random_crop, random_flip, partial(normalize, mean=0.5, std=0.25))
        >>> batch = {"image": jnp.ones((4, 32, 32, 3)), "index": jnp.arange(4)}
        >>> jax.jit(augment)(jax.random.key(0), batch)["image"].shape
        (4, 32, 32, 3)
    """
    calls = [
        (function, *_signature(position, function)) for position, function in enumerate(functions)
    ]

    def augmented(key: jax.Array, batch: Mapping[str, Any]) -> Batch:
        result = dict(batch)
        for position, (function, takes_key, takes_batch) in enumerate(calls):
            image = result if takes_batch else _checks.entry("batch", result, "image")
            if not takes_key:
                changed = function(image)
            else:
                own = jax.random.fold_in(key, position)
                if not takes_batch:
                    own = _example_keys(own, result)
                changed = function(own, image)
            result = dict(changed) if takes_batch else {**result, "image": changed}
        return result

    return augmented


def _signature(position: int, function: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether ``function`` takes a key, and whether it takes the batch rather than its images."""
    wanted = (
        "must be a function (images), (key, images), (key, batch) or (batch), its options bound "
        "with functools.partial"
    )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"functions[{position}] {wanted}, got {_checks.describe(function)}."
        ) from error
    required = [
        p
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    names = [p.name for p in required]
    if len(names) not in (1, 2) or any(p.kind is p.KEYWORD_ONLY for p in required):
        raise TypeError(
            f"functions[{position}] {wanted}; {getattr(function, '__name__', 'it')} still asks for "
            f"({', '.join(names)})."
        )
    return len(names) == 2, names[-1] == "batch"


def _example_keys(key: jax.Array, batch: Mapping[str, Any]) -> jax.Array:
    index = _checks.entry(
        "batch", batch, "index", "Augmentation draws each example's key from its index."
    )
    index = _checks.integer("batch['index']", index, ndim=1)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def _keys(key: jax.Array, images: jax.Array) -> jax.Array:
    """One typed key per image."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(f"key must be a typed key (jax.random.key), got {_checks.describe(key)}.")
    if key.ndim == 0:
        return jax.random.split(key, images.shape[0])
    _checks.shape("key", key, images.shape[:1], "(one per image) or ()")
    return key


def _uniform(keys: jax.Array, count: int) -> jax.Array:
    """[B, count] draws in [0, 1): one call for all that an image needs, as each takes time."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count,), jnp.float32))(keys)


def _whole(draw: jax.Array, count: int) -> jax.Array:
    """Draws in [0, 1) -> whole numbers from 0 to count - 1."""
    return jnp.floor(draw * count).astype(jnp.int32)


def _sometimes(
    draw: jax.Array, probability: Any, changed: jax.Array, images: jax.Array
) -> jax.Array:
    """``changed`` with the given probability, image by image, from draws in [0, 1)."""
    probability = _checks.number("probability", probability, low=0, high=1)
    return jnp.where((draw < probability)[:, None, None, None], changed, images)


def _strength(name: str, draw: jax.Array, value: Any, dtype: Any) -> jax.Array:
    """[B]: the number itself, or a draw between a pair of numbers for each image."""
    if not isinstance(value, (tuple, list)):
        return jnp.full(draw.shape, _checks.number(name, value, low=0), dtype)
    if len(value) != 2:
        raise ValueError(f"{name} must be a number or a pair (low, high), got {value!r}.")
    start, end = (_checks.number(name, bound, low=0) for bound in value)
    if not (_checks.is_traced(start) or _checks.is_traced(end)) and start > end:
        raise ValueError(f"{name} must be a pair (low, high) with low <= high, got {value!r}.")
    return start + (end - start) * draw.astype(dtype)


def _per_channel(name: str, value: Any, images: jax.Array, above: float | None = None) -> jax.Array:
    value = np.asarray(value) if isinstance(value, (tuple, list)) else value
    array = jnp.asarray(_checks.number(name, value, above=above, scalar=False), images.dtype)
    if array.ndim:
        _checks.shape(name, array, images.shape[-1:], "(one per channel) or ()")
        return array[None, None, None, :]
    return array


def _bilinear(image: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """``image`` [H, W, C] at real positions [H', W'], zero outside."""
    height, width = image.shape[:2]
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
    top, left = jnp.floor(row), jnp.floor(column)
    down, across = (row - top)[..., None], (column - left)[..., None]

    def pixel(r: jax.Array, c: jax.Array) -> jax.Array:
        at_row = jnp.clip(r, -1, height).astype(jnp.int32) + 1
        at_column = jnp.clip(c, -1, width).astype(jnp.int32) + 1
        return padded[at_row, at_column]

    upper = (1 - across) * pixel(top, left) + across * pixel(top, left + 1)
    lower = (1 - across) * pixel(top + 1, left) + across * pixel(top + 1, left + 1)
    return (1 - down) * upper + down * lower
