"""VGG with batch normalisation for small images, as in the distillation literature."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from kdjax.models._layers import GlobalAveragePool, batch_norm, images

# Kaiming normal with fan-out for convolutions; a narrow normal for the classifier.
_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_classifier_init = nn.initializers.normal(0.01)
# What RepDistiller trains is cut for 32x32; larger images are halved once more.
_LARGE = 64


class _Block(nn.Module):
    """3x3 convolution with bias, batch normalisation, ReLU.

    The bias has no effect ahead of batch normalisation; the literature's parameter counts have it.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(
            self.features, (3, 3), padding=((1, 1), (1, 1)), kernel_init=_conv_init, name="conv"
        )(x)
        return nn.relu(batch_norm(train, name="norm")(x))


class _Stage(nn.Module):
    """2x2 max pooling, where asked for, and convolutions."""

    widths: Sequence[int]
    halve: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.halve:
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        for i, features in enumerate(self.widths):
            x = _Block(features, name=f"block{i}")(x, train)
        return x


class VGG(nn.Module):
    """VGG with batch normalisation and a single linear layer.

    Submodules for taps: ``stem`` (the first convolutions, at full size), ``stage1`` ... ``stage4``
    with ``stage1/block0`` ..., ``pool`` (features [B, widths[-1][-1]]), ``classifier``. Every stage
    halves the image but the last, which does so from 64 pixels on.

    Args:
        num_classes: Width of the logits, at least 1.
        widths: Channels of the convolutions of the stem and of each stage.

    Returns:
        Called as ``module.apply(variables, x, train=False)`` with x [B, H, W, C]:
        logits [B, num_classes].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax.models.vgg import vgg8
        >>> shapes = jax.eval_shape(vgg8(100).init, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
        >>> sum(a.size for a in jax.tree.leaves(shapes["params"]))
        3965028

    Reference:
        Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
        ICLR 2015. The variants are those of Tian, Krishnan, Isola, "Contrastive Representation
        Distillation", ICLR 2020 (RepDistiller).
    """

    num_classes: int
    widths: Sequence[Sequence[int]]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = images(x)
        if not self.widths or not all(self.widths):
            raise ValueError(
                "widths must name at least one convolution for the stem and for every stage, got "
                f"{self.widths}."
            )
        large, last = x.shape[1] >= _LARGE, len(self.widths) - 1
        x = _Stage(self.widths[0], halve=False, name="stem")(x, train)
        for i, widths in enumerate(self.widths[1:], start=1):
            x = _Stage(widths, halve=i < last or large, name=f"stage{i}")(x, train)
        x = GlobalAveragePool(name="pool")(x)
        return nn.Dense(self.num_classes, kernel_init=_classifier_init, name="classifier")(x)


def vgg8(num_classes: int) -> VGG:
    """VGG-8 with batch norm: 3.97 M parameters."""
    return VGG(num_classes, ((64,), (128,), (256,), (512,), (512,)))


def vgg13(num_classes: int) -> VGG:
    """VGG-13 with batch norm: 9.46 M parameters."""
    return VGG(num_classes, ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)))
