"""MobileNetV2 for small images, as in the distillation literature."""

from __future__ import annotations

import flax.linen as nn
import jax

from kdjax import _checks
from kdjax.models._layers import ConvNormRelu, GlobalAveragePool, batch_norm, conv, images

# Channels at width 1, blocks, stride of the first; blocks of the first stage don't expand.
_STAGES = (
    (16, 1, 1),
    (24, 2, 1),
    (32, 3, 2),
    (64, 4, 2),
    (96, 3, 1),
    (160, 3, 2),
    (320, 1, 1),
)
_STEM, _LAST = 32, 1280
_depthwise_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class InvertedResidual(nn.Module):
    """1x1 convolution to more channels, 3x3 depthwise, 1x1 back without activation.

    The input is added where the shape stays.
    """

    features: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        wide = x.shape[-1] * self.expansion
        y = conv(wide, 1, name="expand")(x)
        y = nn.relu(batch_norm(train, name="expand_norm")(y))
        y = nn.Conv(
            wide,
            (3, 3),
            strides=self.stride,
            padding=((1, 1), (1, 1)),
            feature_group_count=wide,
            use_bias=False,
            kernel_init=_depthwise_init,
            name="depthwise",
        )(y)
        y = nn.relu(batch_norm(train, name="depthwise_norm")(y))
        y = conv(self.features, 1, name="project")(y)
        y = batch_norm(train, name="project_norm")(y)
        return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class _Stage(nn.Module):
    features: int
    blocks: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i in range(self.blocks):
            stride = self.stride if i == 0 else 1
            block = InvertedResidual(self.features, stride, self.expansion, name=f"block{i}")
            x = block(x, train)
        return x


class MobileNetV2(nn.Module):
    """MobileNetV2 with ReLU, for images of 32 pixels.

    Submodules for taps: ``stem``, ``stage1`` ... ``stage7`` with ``stage1/block0`` ..., ``last``
    (1x1 convolution to 1280 channels), ``pool`` (features [B, 1280]), ``classifier``. The stem and
    stages 3, 4 and 6 halve the image.

    Args:
        num_classes: Width of the logits, at least 1.
        width: Factor of all channels but the last 1280, which grow only above 1.
        expansion: Channels inside a block in multiples of its input's; 1 in the first stage.

    Returns:
        Called as ``module.apply(variables, x, train=False)`` with x [B, H, W, C]:
        logits [B, num_classes].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax.models.mobilenetv2 import mobilenetv2_half
        >>> x = jnp.zeros((2, 32, 32, 3))
        >>> shapes = jax.eval_shape(mobilenetv2_half(100).init, jax.random.key(0), x)
        >>> sum(a.size for a in jax.tree.leaves(shapes["params"]))
        812836

    Reference:
        Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018. The
        variant is that of Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR
        2020 (RepDistiller): no dropout, strides for 32 pixels.
    """

    num_classes: int
    width: float = 1.0
    expansion: int = 6

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        _checks.number("width", self.width, above=0)
        x = ConvNormRelu(int(_STEM * self.width), stride=2, name="stem")(images(x), train)
        for i, (features, blocks, stride) in enumerate(_STAGES, start=1):
            expansion = 1 if i == 1 else self.expansion
            stage = _Stage(int(features * self.width), blocks, stride, expansion, name=f"stage{i}")
            x = stage(x, train)
        last = int(_LAST * max(self.width, 1.0))
        x = ConvNormRelu(last, size=1, name="last")(x, train)
        x = GlobalAveragePool(name="pool")(x)
        init = nn.initializers.normal(0.01)
        return nn.Dense(self.num_classes, kernel_init=init, name="classifier")(x)


def mobilenetv2_half(num_classes: int) -> MobileNetV2:
    """MobileNetV2 of half the width, CIFAR's student: 0.81 M parameters."""
    return MobileNetV2(num_classes, width=0.5)
