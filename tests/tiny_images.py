"""Files of tiny images that tests are trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def noisy_classes(
    folder: Path,
    *,
    classes: int = 4,
    sizes: tuple[int, int] = (120, 40),
    between: tuple[int, int] = (60, 190),
    noise: int = 50,
) -> Path:
    """An npz of 6 x 6 grey images: a random image for each class, in noise."""
    draw = np.random.default_rng(0)
    centres = draw.uniform(*between, (classes, 6, 6))
    columns = {}
    for name, size in zip(("train", "test"), sizes, strict=True):
        labels = np.arange(size) % classes
        noisy = centres[labels] + noise * draw.normal(size=(size, 6, 6))
        columns[f"x_{name}"] = np.clip(noisy, 0, 255).astype(np.uint8)
        columns[f"y_{name}"] = labels
    file = folder / "tiny.npz"
    np.savez(file, **columns)
    return file


def stripes(count: int, height: int = 8, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Coloured images: stripes whose place and colour tell the class of six, in noise."""
    random = np.random.default_rng(count)
    labels = np.arange(count) % 6
    x = random.integers(0, 100, (count, height, width, 3))
    for i, label in enumerate(labels):
        x[i, :, 2 * (label % 3) : 2 * (label % 3) + 2, label // 3] += 150
    return x.astype(np.uint8), labels
