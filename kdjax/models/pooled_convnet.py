"""The convolutional network of the data set distillation literature: it pools, then flattens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from kdjax import _checks
from kdjax.models._layers import batch_norm, images

# torch's default for the weights of convolutions and linear layers: uniform in +-1/sqrt(fan_in).
_kernel_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def _bias_init(fan_in: int) -> Any:
    """torch's default for their biases: the bound of the weights."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = float) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class _Block(nn.Module):
    """3x3 convolution with bias, normalisation, ReLU, 2x2 average pooling."""

    features: int
    norm: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(
            self.features,
            (3, 3),
            padding=((1, 1), (1, 1)),
            kernel_init=_kernel_init,
            bias_init=_bias_init(9 * x.shape[-1]),
            name="conv",
        )(x)
        if self.norm == "batch":
            x = batch_norm(train, name="norm")(x)
        elif self.norm == "instance":
            x = nn.InstanceNorm(epsilon=1e-5, use_fast_variance=False, name="norm")(x)
        return _halved(nn.relu(x))


class _Stage(nn.Module):
    """One block, at the place that blocks have in every family."""

    features: int
    norm: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return _Block(self.features, self.norm, name="block0")(x, train)


class Flatten(nn.Module):
    """[B, H, W, C] -> [B, H * W * C].

    A module of its own so that the features the classifier reads can be tapped by name.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1)


class PooledConvNet(nn.Module):
    """Blocks of 3x3 convolution, normalisation, ReLU and 2x2 average pooling; then flattened.

    Every block halves the image and drops an odd last row or column. Initialised as PyTorch does by
    default, biases too. The networks of KRR-ST are 128-256-512 (32 pixels), 64-128-256-512 (64) and
    32-64-128-256-512 (224), with batch normalisation; those of DC, DSA, DM and MTT normalise
    instances.

    Submodules for taps: ``stem``, ``stage1/block0``, ``stage2/block0``, ..., ``pool`` (the
    flattened features [B, D]), ``classifier``.

    Args:
        num_outputs: width of the output, at least 1: classes, or the target's features.
        widths: channels of the blocks.
        norm: "batch", "instance" (both with scale and shift) or None.

    Returns:
        Called as ``module.apply(variables, x, train=False)`` with x [B, H, W, C]:
        outputs [B, num_outputs].

    Raises:
        ValueError: an unknown norm, no widths, or more blocks than the image can be halved.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax.models import PooledConvNet
        >>> x = jnp.zeros((2, 8, 8, 1))
        >>> outputs, variables = jax.eval_shape(
        ...     PooledConvNet(10, widths=(4, 8)).init_with_output, jax.random.key(0), x)
        >>> variables["params"]["classifier"]["kernel"].shape
        (32, 10)

    Reference:
        S. Gidaris, N. Komodakis, "Dynamic Few-Shot Visual Learning without Forgetting", CVPR 2018;
        as in the published code of Lee et al., "Self-Supervised Dataset Distillation for Transfer
        Learning", ICLR 2024.
    """

    num_outputs: int
    widths: Sequence[int] = (128, 256, 512)
    norm: str | None = "batch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = images(x)
        if self.norm is not None:
            _checks.choice("norm", self.norm, ("batch", "instance"))
        if not self.widths:
            raise ValueError("widths must name the channels of at least one block, got none.")
        if min(x.shape[1:3]) >> len(self.widths) == 0:
            raise ValueError(
                f"widths must name at most {min(x.shape[1:3]).bit_length() - 1} blocks, as each "
                f"halves an image of {x.shape[1]}x{x.shape[2]} pixels, got {len(self.widths)}."
            )
        x = _Block(self.widths[0], self.norm, name="stem")(x, train)
        for i, features in enumerate(self.widths[1:], start=1):
            x = _Stage(features, self.norm, name=f"stage{i}")(x, train)
        x = Flatten(name="pool")(x)
        return nn.Dense(
            self.num_outputs,
            kernel_init=_kernel_init,
            bias_init=_bias_init(x.shape[-1]),
            name="classifier",
        )(x)


def _halved(x: jax.Array) -> jax.Array:
    """The mean of every 2x2 square; on CPU its gradient is cheaper than that of a window."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
