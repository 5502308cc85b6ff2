"""A small vision transformer."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.models._layers import images

_init = nn.initializers.truncated_normal(0.02)
_LAYER_NORM_EPS = 1e-6


class _Stem(nn.Module):
    """Patches to tokens, class token in front, learned positions added: [B, 1 + patches, dim]."""

    patch_size: int
    dim: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        size = self.patch_size
        if x.shape[1] % size or x.shape[2] % size:
            raise ValueError(
                f"x must have height and width divisible by patch_size={size}, "
                f"got {x.shape[1]} x {x.shape[2]}."
            )
        x = nn.Conv(self.dim, (size, size), strides=size, padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.dim)
        token = self.param("class_token", _init, (1, 1, self.dim))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.dim)), x], axis=1)
        x = x + self.param("positions", _init, (1, x.shape[1], self.dim))
        return nn.Dropout(self.dropout, deterministic=not train)(x)


class _MLP(nn.Module):
    features: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        dim = x.shape[-1]
        x = nn.Dense(self.features, kernel_init=_init, name="dense1")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.gelu(x, approximate=False))
        return nn.Dense(dim, kernel_init=_init, name="dense2")(x)


class Block(nn.Module):
    """Pre-norm transformer block: attention and a two-layer perceptron, each with a shortcut."""

    heads: int
    mlp_ratio: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = nn.LayerNorm(epsilon=_LAYER_NORM_EPS, name="norm1")(x)
        y = nn.MultiHeadDotProductAttention(
            num_heads=self.heads,
            dropout_rate=self.dropout,
            deterministic=not train,
            kernel_init=_init,
            name="attention",
        )(y)
        x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
        y = nn.LayerNorm(epsilon=_LAYER_NORM_EPS, name="norm2")(x)
        y = _MLP(self.mlp_ratio * x.shape[-1], self.dropout, name="mlp")(y, train)
        return x + nn.Dropout(self.dropout, deterministic=not train)(y)


class _Stage(nn.Module):
    depth: int
    heads: int
    mlp_ratio: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i in range(self.depth):
            x = Block(self.heads, self.mlp_ratio, self.dropout, name=f"block{i}")(x, train)
        return x


class _ClassToken(nn.Module):
    """The normalised class token: [B, 1 + patches, dim] -> [B, dim]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.LayerNorm(epsilon=_LAYER_NORM_EPS, name="norm")(x)[:, 0]


class ViT(nn.Module):
    """Vision transformer with a class token and learned positions.

    Submodules for taps: ``stem`` (tokens), ``stage1`` with ``stage1/block0`` ... (tokens
    [B, 1 + patches, dim]; below each ``attention`` and ``mlp``), ``pool`` (the normalised class
    token [B, dim]), ``classifier``. The positions fix the image size at initialisation.

    Args:
        num_classes: Width of the logits, at least 1.
        patch_size: Side of a patch in pixels; must divide height and width.
        dim: Width of a token; a multiple of heads.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Width of the perceptron in multiples of dim.
        dropout: Rate after attention, inside and after the perceptron, in [0, 1).

    Returns:
        Called as ``module.apply(variables, x, train=False)`` with x [B, H, W, C]:
        logits [B, num_classes].

    Raises:
        ValueError: The image can't be cut into patches.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax.models import ViT
        >>> vit = ViT(10, patch_size=4, dim=8, depth=1, heads=2)
        >>> x = jnp.zeros((2, 8, 8, 1))
        >>> logits, variables = jax.eval_shape(vit.init_with_output, jax.random.key(0), x)
        >>> logits.shape
        (2, 10)

    Reference:
        Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.
    """

    num_classes: int
    patch_size: int = 4
    dim: int = 192
    depth: int = 6
    heads: int = 3
    mlp_ratio: int = 4
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = _Stem(self.patch_size, self.dim, self.dropout, name="stem")(images(x), train)
        stage = _Stage(self.depth, self.heads, self.mlp_ratio, self.dropout, name="stage1")
        x = _ClassToken(name="pool")(stage(x, train))
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, name="classifier")(x)
