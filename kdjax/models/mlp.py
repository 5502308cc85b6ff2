"""Multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from kdjax import _checks
from kdjax.models._layers import dense


class _Hidden(nn.Module):
    """Linear layer and ReLU."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.relu(dense(self.features, name="dense")(x))


class _Stem(nn.Module):
    """Flattens each example, then the first hidden layer."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _Hidden(self.features, name="hidden")(x.reshape(x.shape[0], -1))


class _Stage(nn.Module):
    features: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, features in enumerate(self.features):
            x = _Hidden(features, name=f"block{i}")(x)
        return x


class _Identity(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class MLP(nn.Module):
    """A perceptron with ReLU hidden layers; inputs of any shape are flattened.

    Submodules for taps: ``stem`` (first hidden layer), ``stage1/block0`` ... (the others),
    ``pool`` (what the classifier reads, [B, features[-1]]), ``classifier``.

    Args:
        num_classes: Width of the logits, at least 1.
        features: Widths of the hidden layers; at least one.

    Returns:
        Called as ``module.apply(variables, x, train=False)``: logits [B, num_classes].
        ``train`` changes nothing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax.models import MLP
        >>> x = jnp.zeros((2, 8, 8, 1))
        >>> variables = MLP(10, features=(16,)).init(jax.random.key(0), x)
        >>> MLP(10, features=(16,)).apply(variables, x).shape
        (2, 10)
    """

    num_classes: int
    features: Sequence[int] = (256, 256)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = _checks.as_array("x", x)
        if x.ndim < 2:
            raise ValueError(f"x must have a batch dimension, got {_checks.describe(x)}.")
        if not self.features:
            raise ValueError("features must name at least one hidden layer, got none.")
        x = _Stem(self.features[0], name="stem")(x)
        x = _Stage(tuple(self.features[1:]), name="stage1")(x)
        x = _Identity(name="pool")(x)
        return dense(self.num_classes, name="classifier")(x)
