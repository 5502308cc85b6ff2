"""The deeper residual networks of ImageNet: ResNet-34, and ResNet-50 with bottleneck blocks."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from kdjax.models._layers import ConvNormRelu, GlobalAveragePool, batch_norm, conv, dense, images
from kdjax.models.resnet import ResNet, _ImageNetStem

_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, ReLU after the sum.

    The stride is that of the 3x3 convolution, as in torchvision; the last has four times as many
    channels. The sum before its ReLU can be tapped as ``preact``.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = conv(self.features, 1, name="conv1")(x)
        y = nn.relu(batch_norm(train, name="norm1")(y))
        y = conv(self.features, 3, stride=self.stride, name="conv2")(y)
        y = nn.relu(batch_norm(train, name="norm2")(y))
        y = conv(_EXPANSION * self.features, 1, name="conv3")(y)
        y = batch_norm(train, name="norm3")(y)
        if x.shape != y.shape:
            x = conv(_EXPANSION * self.features, 1, stride=self.stride, name="shortcut")(x)
            x = batch_norm(train, name="shortcut_norm")(x)
        x = x + y
        self.sow("intermediates", "preact", x)
        return nn.relu(x)


class _Stage(nn.Module):
    features: int
    blocks: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i in range(self.blocks):
            x = Bottleneck(self.features, 1 if i else self.stride, name=f"block{i}")(x, train)
        return x


class BottleneckResNet(nn.Module):
    """Residual network of bottleneck blocks.

    Submodules for taps: ``stem``, ``stage1`` ... with ``stage1/block0`` ... (and the sum before its
    ReLU, ``stage1/block0/preact``), ``pool`` (features [B, 4 * widths[-1]]), ``classifier``. Every
    stage after the first halves the image.

    Args:
        num_classes: Width of the logits, at least 1.
        blocks: Blocks in each stage.
        widths: Channels inside the blocks of each stage, a quarter of those between them.
        stem_width: Channels of the stem.
        small_images: True for a 3x3 stem of stride 1 (CIFAR), False for the 7x7 stem of stride 2
            with max pooling (ImageNet).

    Returns:
        Called as ``module.apply(variables, x, train=False)`` with x [B, H, W, C]:
        logits [B, num_classes].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax.models.bottleneck_resnet import resnet50
        >>> shapes = jax.eval_shape(resnet50(100).init, jax.random.key(0), jnp.zeros((2, 8, 8, 3)))
        >>> sum(a.size for a in jax.tree.leaves(shapes["params"]))
        23705252

    Reference:
        He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, with the
        stride where torchvision has it.
    """

    num_classes: int
    blocks: Sequence[int]
    widths: Sequence[int]
    stem_width: int
    small_images: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = images(x)
        stem = ConvNormRelu if self.small_images else _ImageNetStem
        x = stem(self.stem_width, name="stem")(x, train)
        for i, (blocks, features) in enumerate(zip(self.blocks, self.widths, strict=True)):
            x = _Stage(features, blocks, 1 if i == 0 else 2, name=f"stage{i + 1}")(x, train)
        x = GlobalAveragePool(name="pool")(x)
        return dense(self.num_classes, name="classifier")(x)


def resnet34(num_classes: int, *, small_images: bool = True) -> ResNet:
    """ResNet-34: 21.3 M parameters; ``small_images=False`` gives the ImageNet stem."""
    return ResNet(
        num_classes,
        (3, 4, 6, 3),
        (64, 128, 256, 512),
        stem_width=64,
        small_images=small_images,
    )


def resnet50(num_classes: int, *, small_images: bool = True) -> BottleneckResNet:
    """ResNet-50: 23.7 M parameters; ``small_images=False`` gives the ImageNet stem."""
    return BottleneckResNet(
        num_classes,
        (3, 4, 6, 3),
        (64, 128, 256, 512),
        stem_width=64,
        small_images=small_images,
    )
