"""A small convolutional network for images of 8x8 to 32x32 pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax

from kdjax.models._layers import ConvNormRelu, GlobalAveragePool, dense, images


class _Stage(nn.Module):
    """One convolution of stride 2. No pooling: its gradient is slow on CPU."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return ConvNormRelu(self.features, stride=2, name="block0")(x, train)


class ConvNet(nn.Module):
    """Convolution, batch norm and ReLU, repeated; every one after the first halves the image.

    Submodules for taps: ``stem``, ``stage1/block0``, ``stage2/block0``, ..., ``pool`` (features
    [B, widths[-1]]), ``classifier``.

    Args:
        num_classes: Width of the logits, at least 1.
        widths: Channels of the stem and of each stage. By default 32, 64, then 128 for as many
            stages as halve the image to two pixels, so that the last one sees all of it.

    Returns:
        Called as ``module.apply(variables, x, train=False)`` with x [B, H, W, C]:
        logits [B, num_classes].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax.models import ConvNet
        >>> x = jnp.zeros((2, 8, 8, 1))
        >>> logits, variables = jax.eval_shape(
        ...     ConvNet(10, widths=(4, 8)).init_with_output, jax.random.key(0), x)
        >>> logits.shape
        (2, 10)
    """

    num_classes: int
    widths: Sequence[int] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = images(x)
        widths = _widths(max(x.shape[1:3])) if self.widths is None else self.widths
        if not widths:
            raise ValueError("widths must name at least the stem's channels, got none.")
        x = ConvNormRelu(widths[0], name="stem")(x, train)
        for i, features in enumerate(widths[1:], start=1):
            x = _Stage(features, name=f"stage{i}")(x, train)
        x = GlobalAveragePool(name="pool")(x)
        return dense(self.num_classes, name="classifier")(x)


def _widths(size: int) -> tuple[int, ...]:
    stages = max(2, math.ceil(math.log2(size)) - 1)
    return (32, 64, *(128,) * (stages - 1))
