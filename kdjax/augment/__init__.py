"""Image augmentation as pure functions that run inside the compiled step.

An image function is ``(key, images, *, options) -> images`` (``normalize`` and ``to_float`` need no
key); a batch function is ``(key, batch, *, options) -> batch``. ``compose`` chains both kinds.
Images are [B, H, W, C]: floating, or uint8, which is scaled to [0, 1] first. Results are at least
float32. ``key`` is one typed key, split over the images, or B typed keys, one per image.
"""

from kdjax.augment._batches import compose, mixup
from kdjax.augment._geometry import affine, cutout, random_crop, random_flip
from kdjax.augment._pixels import contrast, gaussian_blur, gaussian_noise, normalize, to_float

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
