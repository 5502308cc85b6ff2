"""Pre-activation residual networks: wide ResNets and PreAct-ResNet-18."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from kdjax import _checks
from kdjax.models._layers import GlobalAveragePool, batch_norm, conv, dense, images


class PreActBlock(nn.Module):
    """Batch norm and activation before each of two 3x3 convolutions; the sum is not activated.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input.
    """

    features: int
    stride: int = 1
    dropout: float = 0.0
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = self.activation(batch_norm(train, name="norm1")(x))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv(self.features, 1, stride=self.stride, name="shortcut")(y)
        y = conv(self.features, 3, stride=self.stride, name="conv1")(y)
        y = self.activation(batch_norm(train, name="norm2")(y))
        y = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(y)
        return x + conv(self.features, 3, name="conv2")(y)


class _Stage(nn.Module):
    features: int
    blocks: int
    stride: int
    dropout: float
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i in range(self.blocks):
            stride = self.stride if i == 0 else 1
            block = PreActBlock(
                self.features, stride, self.dropout, self.activation, name=f"block{i}"
            )
            x = block(x, train)
        return x


class _Stem(nn.Module):
    """A 3x3 convolution, not activated."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return conv(self.features, 3, name="conv")(x)


class PreActResNet(nn.Module):
    """Residual network of pre-activation blocks for small images.

    Submodules for taps: ``stem``, ``stage1`` ... with ``stage1/block0`` ..., ``norm`` (the last
    batch norm; the activation follows), ``pool`` (features [B, widths[-1]]), ``classifier``. Every
    stage after the first halves the image.

    Args:
        num_classes: Width of the logits, at least 1.
        blocks: Blocks in each stage.
        widths: Channels of each stage.
        stem_width: Channels of the stem.
        dropout: Rate between the two convolutions of a block, in [0, 1).
        activation: ReLU, or for adversarial training with generated images swish (`nn.swish`).

    Returns:
        Called as ``module.apply(variables, x, train=False)`` with x [B, H, W, C]:
        logits [B, num_classes].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax.models import wrn_16_1
        >>> x = jnp.zeros((2, 8, 8, 3))
        >>> shapes = jax.eval_shape(wrn_16_1(100).init, jax.random.key(0), x)
        >>> sum(a.size for a in jax.tree.leaves(shapes["params"]))
        180916

    Reference:
        He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016.
        Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016.
    """

    num_classes: int
    blocks: Sequence[int]
    widths: Sequence[int]
    stem_width: int
    dropout: float = 0.0
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = _Stem(self.stem_width, name="stem")(images(x))
        for i, (blocks, features) in enumerate(zip(self.blocks, self.widths, strict=True)):
            stride = 1 if i == 0 else 2
            stage = _Stage(
                features, blocks, stride, self.dropout, self.activation, name=f"stage{i + 1}"
            )
            x = stage(x, train)
        x = self.activation(batch_norm(train, name="norm")(x))
        x = GlobalAveragePool(name="pool")(x)
        return dense(self.num_classes, name="classifier")(x)


def wrn(num_classes: int, *, depth: int, width: int, dropout: float = 0.0) -> PreActResNet:
    """Wide ResNet WRN-depth-width.

    Args:
        num_classes: Width of the logits, at least 1.
        depth: 6n + 4: 10, 16, 22, 28, 34, 40, ...
        width: Widening factor k; the stages have 16k, 32k and 64k channels.
        dropout: Rate inside the blocks, in [0, 1).

    Returns:
        The module.

    Raises:
        ValueError: depth is not 6n + 4.

    Example:
        >>> from kdjax.models import wrn
        >>> wrn(10, depth=28, width=10).widths
        (160, 320, 640)

    Reference:
        Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016, table 1.
    """
    _checks.count("depth", depth, low=10)
    _checks.count("width", width)
    _checks.number("dropout", dropout, low=0.0, below=1.0)
    if (depth - 4) % 6:
        raise ValueError(f"depth must be 6n + 4 (10, 16, 22, ...), got {depth}.")
    n = (depth - 4) // 6
    widths = (16 * width, 32 * width, 64 * width)
    return PreActResNet(num_classes, (n, n, n), widths, stem_width=16, dropout=dropout)


def wrn_16_1(num_classes: int) -> PreActResNet:
    """WRN-16-1: 0.18 M parameters."""
    return wrn(num_classes, depth=16, width=1)


def wrn_16_2(num_classes: int) -> PreActResNet:
    """WRN-16-2: 0.70 M parameters."""
    return wrn(num_classes, depth=16, width=2)


def wrn_40_1(num_classes: int) -> PreActResNet:
    """WRN-40-1: 0.57 M parameters."""
    return wrn(num_classes, depth=40, width=1)


def wrn_40_2(num_classes: int) -> PreActResNet:
    """WRN-40-2: 2.26 M parameters."""
    return wrn(num_classes, depth=40, width=2)


def preact_resnet18(num_classes: int) -> PreActResNet:
    """PreAct-ResNet-18 for small images: 11.2 M parameters."""
    return PreActResNet(num_classes, (2, 2, 2, 2), (64, 128, 256, 512), stem_width=64)
