"""Residual networks: the CIFAR ones of the distillation literature, and ResNet-18."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from kdjax import _checks
from kdjax.models._layers import ConvNormRelu, GlobalAveragePool, batch_norm, conv, dense, images


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, ReLU after the sum.

    The shortcut is a 1x1 convolution with batch norm where the shape changes (option B). The sum
    before its ReLU can be tapped as ``preact``.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = conv(self.features, 3, stride=self.stride, name="conv1")(x)
        y = nn.relu(batch_norm(train, name="norm1")(y))
        y = conv(self.features, 3, name="conv2")(y)
        y = batch_norm(train, name="norm2")(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv(self.features, 1, stride=self.stride, name="shortcut")(x)
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
            block = BasicBlock(self.features, self.stride if i == 0 else 1, name=f"block{i}")
            x = block(x, train)
        return x


class _ImageNetStem(nn.Module):
    """7x7 convolution of stride 2, then 3x3 max pooling of stride 2."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = ConvNormRelu(self.features, size=7, stride=2, name="conv")(x, train)
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


class ResNet(nn.Module):
    """Residual network of basic blocks.

    Submodules for taps: ``stem``, ``stage1`` ... with ``stage1/block0`` ... (and the sum before its
    ReLU, ``stage1/block0/preact``), ``pool`` (features [B, widths[-1]]), ``classifier``. Every
    stage after the first halves the image.

    Args:
        num_classes: Width of the logits, at least 1.
        blocks: Blocks in each stage.
        widths: Channels of each stage.
        stem_width: Channels of the stem.
        small_images: True for a 3x3 stem of stride 1 (CIFAR), False for the 7x7 stem of stride 2
            with max pooling (ImageNet).

    Returns:
        Called as ``module.apply(variables, x, train=False)`` with x [B, H, W, C]:
        logits [B, num_classes].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax.models import resnet8
        >>> x = jnp.zeros((2, 8, 8, 3))
        >>> shapes = jax.eval_shape(resnet8(10).init, jax.random.key(0), x)
        >>> sum(a.size for a in jax.tree.leaves(shapes["params"]))
        78042

    Reference:
        He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.
        The CIFAR variants are those of Tian, Krishnan, Isola, "Contrastive Representation
        Distillation", ICLR 2020 (RepDistiller), to which the literature's parameter counts refer.
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


def cifar_resnet(num_classes: int, *, depth: int, multiplier: int = 1) -> ResNet:
    """CIFAR ResNet of depth 6n + 2 with channels 16, 32, 64; ``x4`` variants are four times wider.

    Args:
        num_classes: Width of the logits, at least 1.
        depth: 8, 14, 20, ...
        multiplier: Widening of the stages; above 1 the stem has 32 channels, as in RepDistiller.

    Returns:
        The module.

    Raises:
        ValueError: depth is not 6n + 2.

    Example:
        >>> from kdjax.models import cifar_resnet
        >>> cifar_resnet(100, depth=26).blocks
        (4, 4, 4)
    """
    _checks.count("depth", depth, low=8)
    _checks.count("multiplier", multiplier)
    if (depth - 2) % 6:
        raise ValueError(f"depth must be 6n + 2 (8, 14, 20, ...), got {depth}.")
    n = (depth - 2) // 6
    widths = (16 * multiplier, 32 * multiplier, 64 * multiplier)
    return ResNet(num_classes, (n, n, n), widths, stem_width=16 if multiplier == 1 else 32)


def resnet8(num_classes: int) -> ResNet:
    """CIFAR ResNet-8: 0.08 M parameters."""
    return cifar_resnet(num_classes, depth=8)


def resnet14(num_classes: int) -> ResNet:
    """CIFAR ResNet-14: 0.18 M parameters."""
    return cifar_resnet(num_classes, depth=14)


def resnet20(num_classes: int) -> ResNet:
    """CIFAR ResNet-20: 0.28 M parameters."""
    return cifar_resnet(num_classes, depth=20)


def resnet32(num_classes: int) -> ResNet:
    """CIFAR ResNet-32: 0.47 M parameters."""
    return cifar_resnet(num_classes, depth=32)


def resnet56(num_classes: int) -> ResNet:
    """CIFAR ResNet-56: 0.86 M parameters."""
    return cifar_resnet(num_classes, depth=56)


def resnet110(num_classes: int) -> ResNet:
    """CIFAR ResNet-110: 1.74 M parameters."""
    return cifar_resnet(num_classes, depth=110)


def resnet8x4(num_classes: int) -> ResNet:
    """CIFAR ResNet-8, four times wider: 1.23 M parameters."""
    return cifar_resnet(num_classes, depth=8, multiplier=4)


def resnet32x4(num_classes: int) -> ResNet:
    """CIFAR ResNet-32, four times wider: 7.43 M parameters."""
    return cifar_resnet(num_classes, depth=32, multiplier=4)


def resnet18(num_classes: int, *, small_images: bool = True) -> ResNet:
    """ResNet-18: 11.2 M parameters; ``small_images=False`` gives the ImageNet stem."""
    return ResNet(
        num_classes,
        (2, 2, 2, 2),
        (64, 128, 256, 512),
        stem_width=64,
        small_images=small_images,
    )
