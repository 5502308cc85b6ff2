"""Two random views of every image, and published ways to make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from kdjax.augment._batches import Batch, compose
from kdjax.augment._color import color_jitter, random_grayscale, solarize
from kdjax.augment._geometry import affine, random_flip
from kdjax.augment._pixels import contrast as contrast_of
from kdjax.augment._pixels import gaussian_blur, gaussian_noise, normalize
from kdjax.augment._resized_crop import random_resized_crop

Views = Callable[[jax.Array, Mapping[str, Any]], Batch]


def two_views(first: Callable[..., Any], second: Callable[..., Any] | None = None) -> Views:
    """Augments every image twice, with independent draws.

    The draws of an example depend on the key, the view and its ``index`` only, never on how the
    batch is ordered, cut or sharded.

    Args:
        first: what makes the first view: an image or batch function as `compose` takes it, such as
            `compose` returns.
        second: what makes the second; by default the same.

    Returns:
        A function (key, batch) -> batch; key is one typed key, batch has ``image`` and ``index``.
        The result has the images of both views as ``view1`` and ``view2``, and all entries of the
        batch as they were.

    Raises:
        TypeError: a function has another signature.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax import augment
        >>> views = augment.two_views(augment.compose(augment.random_crop, augment.random_flip))
        >>> batch = {"image": jnp.ones((4, 32, 32, 3)), "index": jnp.arange(4)}
        >>> sorted(jax.jit(views)(jax.random.key(0), batch))
        ['image', 'index', 'view1', 'view2']

    Reference:
        T. Chen, S. Kornblith, M. Norouzi, G. Hinton, "A Simple Framework for Contrastive Learning
        of Visual Representations", ICML 2020, algorithm 1.
    """
    named = {"first": first, "second": first if second is None else second}
    pipelines = []
    for name, function in named.items():
        try:
            pipelines.append(compose(function))
        except TypeError as error:
            raise TypeError(str(error).replace("functions[0]", name)) from None

    def views(key: jax.Array, batch: Mapping[str, Any]) -> Batch:
        result = dict(batch)
        for number, pipeline in enumerate(pipelines, 1):
            seen = pipeline(jax.random.fold_in(key, number), batch)
            result[f"view{number}"] = seen["image"]
        return result

    return views


def barlow_twins_views(
    *,
    size: int | tuple[int, int] | None = None,
    blur: tuple[Any, Any] | None = (1.0, 0.1),
    solarization: tuple[Any, Any] | None = (0.0, 0.2),
    mean: Any = (0.485, 0.456, 0.406),
    std: Any = (0.229, 0.224, 0.225),
) -> Views:
    """The two views of Barlow Twins: one blurred always, the other seldom, but solarised at times.

    Resized crop, flip, colour jitter (0.4, 0.4, 0.2, 0.1; probability 0.8), grey (0.2), blur,
    solarisation, normalisation.

    Args:
        size: of the views; by default that of the images. Published is 224.
        blur: probabilities of either view, or None for no blur (small images). Its width is 0.1 to
            2 pixels, which suits 224 of them.
        solarization: probabilities of either view, or None for none.
        mean: as in `normalize`; of ImageNet by default.
        std: the same.

    Returns:
        A function (key, batch) -> batch with ``view1`` and ``view2``, as of `two_views`. Images are
        uint8, or floating in [0, 1].

    Raises:
        ValueError: at its first use, an option outside its range.

    Example:
        >>> from kdjax import augment
        >>> views = augment.barlow_twins_views(size=224)

    Reference:
        J. Zbontar, L. Jing, I. Misra, Y. LeCun, S. Deny, "Barlow Twins: Self-Supervised Learning
        via Redundancy Reduction", ICML 2021, section 2.2, and its published code.
    """

    def view(number: int) -> Views:
        stages = _crop_flip_jitter(size, (0.4, 0.4, 0.2, 0.1))
        if blur is not None:
            stages.append(_blur(blur[number]))
        if solarization is not None:
            stages.append(partial(solarize, probability=solarization[number]))
        return compose(*stages, partial(normalize, mean=mean, std=std))

    return two_views(view(0), view(1))


def simclr_views(
    *,
    size: int | tuple[int, int] | None = None,
    strength: Any = 0.5,
    blur: Any = None,
    mean: Any = (0.485, 0.456, 0.406),
    std: Any = (0.229, 0.224, 0.225),
) -> Views:
    """The two views of SimCLR, both made alike; by default those for small images.

    Resized crop, flip, colour jitter (0.8, 0.8, 0.8, 0.2 times ``strength``; probability 0.8), grey
    (0.2), blur, normalisation. With the defaults also much like what Barlow Twins has been trained
    with on CIFAR (which resized linearly, not cubically).

    Args:
        size: of the views; by default that of the images.
        strength: of the colour jitter: 0.5 for CIFAR, 1 for ImageNet.
        blur: probability, or None for no blur (CIFAR); 0.5 for ImageNet. Its width is 0.1 to 2
            pixels, which suits 224 of them.
        mean: as in `normalize`; of ImageNet by default. SimCLR itself doesn't normalise: 0 and 1.
        std: the same.

    Returns:
        A function (key, batch) -> batch with ``view1`` and ``view2``, as of `two_views`. Images are
        uint8, or floating in [0, 1].

    Raises:
        ValueError: at its first use, an option outside its range.

    Example:
        >>> from kdjax import augment
        >>> views = augment.simclr_views(mean=(0.491, 0.482, 0.447), std=(0.202, 0.199, 0.201))

    Reference:
        T. Chen, S. Kornblith, M. Norouzi, G. Hinton, "A Simple Framework for Contrastive Learning
        of Visual Representations", ICML 2020, appendices A and B.9, and its published code.
    """
    jitter = tuple(share * strength for share in (0.8, 0.8, 0.8, 0.2))
    stages = _crop_flip_jitter(size, jitter)
    if blur is not None:
        stages.append(_blur(blur))
    return two_views(compose(*stages, partial(normalize, mean=mean, std=std)))


def digits_views(
    *,
    rotate: Any = 15.0,
    shift: Any = 1 / 8,
    scale: Any = 0.15,
    contrast: Any = (0.6, 1.4),
    noise: Any = 0.1,
) -> Views:
    """Two views of digits, which must not be flipped: small affine moves, contrast, noise.

    Rotations, shifts and scales are those with which the KRR-ST reference network on digits was
    trained; its contrast and noise aren't recorded, and are ours.

    Args:
        rotate: as in `affine`, in degrees.
        shift: as ``translate`` of `affine`, a fraction of the side: one pixel of eight.
        scale: as in `affine`.
        contrast: as ``factor`` of `contrast`.
        noise: as ``std`` of `gaussian_noise`.

    Returns:
        A function (key, batch) -> batch with ``view1`` and ``view2``, as of `two_views`.

    Raises:
        ValueError: at its first use, an option outside its range.

    Example:
        >>> import jax, kdjax as kd
        >>> batch = next(iter(kd.data.digits().batches("train", 4, seed=0)))
        >>> jax.jit(kd.augment.digits_views())(jax.random.key(0), batch)["view2"].shape
        (4, 8, 8, 1)
    """
    return two_views(
        compose(
            partial(affine, rotate=rotate, translate=shift, scale=scale),
            partial(contrast_of, factor=contrast),
            partial(gaussian_noise, std=noise),
        )
    )


def _crop_flip_jitter(size: Any, jitter: tuple[Any, ...]) -> list[Callable[..., Any]]:
    """What all views of photographs begin with."""
    brightness, contrast, saturation, hue = jitter
    return [
        partial(random_resized_crop, size=size, method="cubic"),
        random_flip,
        partial(
            color_jitter,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
            probability=0.8,
        ),
        random_grayscale,
    ]


def _blur(probability: Any) -> Callable[..., Any]:
    return partial(gaussian_blur, sigma=(0.1, 2.0), radius=6, probability=probability)
