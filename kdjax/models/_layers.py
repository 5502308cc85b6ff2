"""The layers that all reference models share, with the initialisation of the PyTorch originals."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from kdjax import _checks

# Kaiming normal with fan-out and gain sqrt(2), as in the ResNet and WRN references.
_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# torch.nn.Linear's default: uniform in +-1/sqrt(fan_in).
_dense_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def conv(features: int, size: int, *, stride: int = 1, name: str) -> nn.Conv:
    """A square convolution without bias, padded as in torch (``size // 2`` on every side).

    Flax's "SAME" pads strided convolutions on one side only, which shifts the features against
    the references and would make their weights unusable here.
    """
    pad = size // 2
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        kernel_init=_conv_init,
        name=name,
    )


def batch_norm(train: bool, *, name: str) -> nn.BatchNorm:
    """Batch normalisation with torch's constants (torch's momentum 0.1 is 0.9 here).

    The variance is computed in two passes: the one-pass form loses digits where a channel's mean
    is large against its spread.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        use_fast_variance=False,
        name=name,
    )


def dense(features: int, *, name: str) -> nn.Dense:
    """A linear layer, initialised as in torch except that its bias starts at zero."""
    return nn.Dense(features, kernel_init=_dense_init, name=name)


def images(x: Any) -> jax.Array:
    """Refuses anything but a batch of images with channels."""
    x = _checks.as_array("x", x)
    if x.ndim != 4:
        wanted = "images of shape [batch, height, width, channels]"
        raise ValueError(f"x must be {wanted}, got {_checks.describe(x)}.")
    return x


class GlobalAveragePool(nn.Module):
    """Mean over height and width: [B, H, W, C] -> [B, C].

    A module of its own so that the features the classifier reads can be tapped by name.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.mean(axis=(1, 2))


class ConvNormRelu(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    features: int
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = conv(self.features, self.size, stride=self.stride, name="conv")(x)
        return nn.relu(batch_norm(train, name="norm")(x))
