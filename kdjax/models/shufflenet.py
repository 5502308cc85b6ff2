"""ShuffleNet V1 and V2 for small images, as in the distillation literature."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax.models._layers import GlobalAveragePool, batch_norm, dense, images

# torch.nn.Conv2d's default: uniform in +-1/sqrt(fan_in).
_conv_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
_STEM = 24


def _conv(features: int, *, groups: int = 1, name: str) -> nn.Conv:
    """A 1x1 convolution without bias, of channel groups."""
    return nn.Conv(
        features,
        (1, 1),
        feature_group_count=groups,
        use_bias=False,
        kernel_init=_conv_init,
        name=name,
    )


def _depthwise(features: int, stride: int, *, name: str) -> nn.Conv:
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=((1, 1), (1, 1)),
        feature_group_count=features,
        use_bias=False,
        kernel_init=_conv_init,
        name=name,
    )


def shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Deals the channels of every group out in turn: channel (g, c) goes to (c, g)."""
    parts = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return parts.swapaxes(-1, -2).reshape(x.shape)


class _Stem(nn.Module):
    """1x1 convolution to 24 channels, batch normalisation, ReLU."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.relu(batch_norm(train, name="norm")(_conv(_STEM, name="conv")(x)))


class GroupBlock(nn.Module):
    """V1: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; added to the input.

    With stride 2 the input is averaged and put beside the result, which has the channels missing.
    What the last ReLU gets can be tapped as ``preact``.
    """

    features: int
    stride: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        features = self.features - (x.shape[-1] if self.stride == 2 else 0)
        middle = features // 4
        groups = 1 if x.shape[-1] == _STEM else self.groups
        y = _conv(middle, groups=groups, name="conv1")(x)
        y = shuffle(nn.relu(batch_norm(train, name="norm1")(y)), groups)
        y = _depthwise(middle, self.stride, name="conv2")(y)
        y = nn.relu(batch_norm(train, name="norm2")(y))
        y = _conv(features, groups=self.groups, name="conv3")(y)
        y = batch_norm(train, name="norm3")(y)
        if self.stride == 1:
            x = x + y
        else:
            x = nn.avg_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
            x = jnp.concatenate([y, x], axis=-1)
        self.sow("intermediates", "preact", x)
        return nn.relu(x)


class SplitBlock(nn.Module):
    """V2: half of the channels pass, the others go through 1x1, depthwise 3x3, 1x1; shuffle.

    With stride 2 both halves start from all channels, and the first one is convolved too. Both
    halves before the shuffle, the second without its ReLU, can be tapped as ``preact``.
    """

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        half = self.features // 2
        if self.stride == 1:
            kept, x = jnp.split(x, 2, axis=-1)
        else:
            kept = _depthwise(x.shape[-1], 2, name="skip1")(x)
            kept = _conv(half, name="skip2")(batch_norm(train, name="skip_norm1")(kept))
            kept = nn.relu(batch_norm(train, name="skip_norm2")(kept))
        y = nn.relu(batch_norm(train, name="norm1")(_conv(half, name="conv1")(x)))
        y = batch_norm(train, name="norm2")(_depthwise(half, self.stride, name="conv2")(y))
        y = batch_norm(train, name="norm3")(_conv(half, name="conv3")(y))
        self.sow("intermediates", "preact", jnp.concatenate([kept, y], axis=-1))
        return shuffle(jnp.concatenate([kept, nn.relu(y)], axis=-1), 2)


class _Stage(nn.Module):
    features: int
    blocks: int
    groups: int | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i in range(self.blocks):
            stride, name = 1 if i else 2, f"block{i}"
            if self.groups is None:
                x = SplitBlock(self.features, stride, name=name)(x, train)
            else:
                x = GroupBlock(self.features, stride, self.groups, name=name)(x, train)
        return x


class ShuffleNet(nn.Module):
    """ShuffleNet V1 (with ``groups``) or V2 (without), for images of 32 pixels.

    Submodules for taps: ``stem``, ``stage1`` ... ``stage3`` with ``stage1/block0`` ... (and what is
    before its last ReLU, ``stage1/block0/preact``), in V2 ``last`` (1x1 convolution), ``pool`` (the
    features [B, D]), ``classifier``. Every stage halves the image.

    Args:
        num_classes: Width of the logits, at least 1.
        widths: Channels of each stage.
        blocks: Blocks in each stage.
        groups: Groups of V1's 1x1 convolutions; None for V2.
        last: Channels of V2's last convolution; None for none.

    Returns:
        Called as ``module.apply(variables, x, train=False)`` with x [B, H, W, C]:
        logits [B, num_classes].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax.models.shufflenet import shufflenetv1
        >>> x = jnp.zeros((2, 32, 32, 3))
        >>> shapes = jax.eval_shape(shufflenetv1(100).init, jax.random.key(0), x)
        >>> sum(a.size for a in jax.tree.leaves(shapes["params"]))
        949258

    Reference:
        Zhang, Zhou, Lin, Sun, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for
        Mobile Devices", CVPR 2018; Ma, Zhang, Zheng, Sun, "ShuffleNet V2: Practical Guidelines for
        Efficient CNN Architecture Design", ECCV 2018. The variants are those of Tian, Krishnan,
        Isola, "Contrastive Representation Distillation", ICLR 2020 (RepDistiller).
    """

    num_classes: int
    widths: Sequence[int]
    blocks: Sequence[int]
    groups: int | None = None
    last: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.groups is not None:
            _checks.count("groups", self.groups)
        x = _Stem(name="stem")(images(x), train)
        for i, (features, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            x = _Stage(features, blocks, self.groups, name=f"stage{i + 1}")(x, train)
        if self.last is not None:
            x = _Last(self.last, name="last")(x, train)
        x = GlobalAveragePool(name="pool")(x)
        return dense(self.num_classes, name="classifier")(x)


class _Last(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.relu(batch_norm(train, name="norm")(_conv(self.features, name="conv")(x)))


def shufflenetv1(num_classes: int) -> ShuffleNet:
    """ShuffleNet V1 with 3 groups, CIFAR's student: 0.95 M parameters, 960 features."""
    return ShuffleNet(num_classes, (240, 480, 960), (4, 8, 4), groups=3)


def shufflenetv2(num_classes: int) -> ShuffleNet:
    """ShuffleNet V2 1x, CIFAR's student: 1.36 M parameters, 1024 features."""
    return ShuffleNet(num_classes, (116, 232, 464), (4, 8, 4), last=1024)
