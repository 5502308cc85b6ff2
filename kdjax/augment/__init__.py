"""Image augmentation as pure functions that run inside the compiled step.

An image function is ``(key, images, *, options) -> images`` (``normalize`` and ``to_float`` need no
key); a batch function is ``(key, batch, *, options) -> batch``. ``compose`` chains both kinds.
Images are [B, H, W, C]: floating, or uint8, which is scaled to [0, 1] first. Results are at least
float32. ``key`` is one typed key, split over the images, or B typed keys, one per image.
"""

from kdjax.augment._batches import compose, mixup
from kdjax.augment._color import color_jitter, random_grayscale, solarize
from kdjax.augment._corruptions import (
    brightness,
    corruptions,
    fog,
    impulse_noise,
    pixelate,
    shot_noise,
)
from kdjax.augment._geometry import affine, cutout, random_crop, random_flip
from kdjax.augment._pixels import contrast, gaussian_blur, gaussian_noise, normalize, to_float
from kdjax.augment._resized_crop import random_resized_crop
from kdjax.augment._views import barlow_twins_views, digits_views, simclr_views, two_views

__all__ = [
    "affine",
    "barlow_twins_views",
    "brightness",
    "color_jitter",
    "compose",
    "contrast",
    "corruptions",
    "cutout",
    "digits_views",
    "fog",
    "gaussian_blur",
    "gaussian_noise",
    "impulse_noise",
    "mixup",
    "normalize",
    "pixelate",
    "random_crop",
    "random_flip",
    "random_grayscale",
    "random_resized_crop",
    "shot_noise",
    "simclr_views",
    "solarize",
    "to_float",
    "two_views",
]
