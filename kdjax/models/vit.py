"""A small vision transformer, and DeiT's with its distillation token."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax.models._layers import ConvNormRelu, images

_init = nn.initializers.truncated_normal(0.02)
_LAYER_NORM_EPS = 1e-6


class _ConvStem(nn.Module):
    """Three convolutions of 64 channels, the first of stride 2: [B, H, W, C] -> [B, H/2, W/2, 64].

    The 3x3 convolutions after the first keep the size.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = ConvNormRelu(64, size=7, stride=2, name="conv1")(x, train)
        x = ConvNormRelu(64, name="conv2")(x, train)
        return ConvNormRelu(64, name="conv3")(x, train)


class _Stem(nn.Module):
    """Patches to tokens, special tokens in front, learned positions added: [B, N, dim]."""

    patch_size: int
    dim: int
    dropout: float
    distillation: bool
    conv_stem: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        size = self.patch_size
        if x.shape[1] % size or x.shape[2] % size:
            raise ValueError(
                f"x must have height and width divisible by patch_size={size}, "
                f"got {x.shape[1]} x {x.shape[2]}."
            )
        if self.conv_stem:
            if size % 2:
                raise ValueError(f"patch_size must be even for conv_stem=True, got {size}.")
            x, size = _ConvStem(name="convolutions")(x, train), size // 2
        x = nn.Conv(self.dim, (size, size), strides=size, padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.dim)
        token = self.param("class_token", _init, (1, 1, self.dim))
        tokens = [jnp.broadcast_to(token, (x.shape[0], 1, self.dim)), x]
        if self.distillation:
            tokens.insert(1, x.mean(axis=1, keepdims=True))
        x = jnp.concatenate(tokens, axis=1)
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
        )(y, sow_weights=True)  # what isn't tapped is no part of the program
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


class _Tokens(nn.Module):
    """Tokens from a position on, or the one there; a module so that they can be tapped by name."""

    first: int
    rest: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x[:, self.first :] if self.rest else x[:, self.first]


class ViT(nn.Module):
    """Vision transformer with a class token and learned positions; optionally DeiT's student.

    Submodules for taps: ``stem`` (tokens), ``stage1`` with ``stage1/block0`` ... (tokens
    [B, N, dim]; below each ``attention`` and ``mlp``, and ``attention/attention_weights``, the
    distributions [B, heads, N, N] before dropout), ``norm`` (all tokens, normalised), and of these
    ``pool`` (the class token [B, dim]) and ``patches`` (the patch tokens [B, patches, dim]),
    ``classifier``. The positions fix the image size at initialisation.

    With ``distillation`` there are two more: ``distillation_token`` ([B, dim]) and
    ``distillation_classifier``, which learns from the teacher while ``classifier`` learns from the
    labels. The logits returned are the mean of both, in training too: tap the heads for losses.
    `kdjax.methods.projector_distillation.deit` trains it.

    Args:
        num_classes: Width of the logits, at least 1.
        patch_size: Side of a patch in pixels; must divide height and width.
        dim: Width of a token; a multiple of heads.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Width of the perceptron in multiples of dim.
        dropout: Rate after attention, inside and after the perceptron, in [0, 1).
        distillation: True for a distillation token, the mean of the patch tokens at the start, and
            a classifier that reads it.
        conv_stem: True for three convolutions with batch norm ahead of the patches, which are then
            cut from maps of half the size; patch_size is even.

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
        Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021. Distillation token: Touvron
        et al., "Training data-efficient image transformers and distillation through attention",
        ICML 2021, where it is a learned token; as the mean of the patches, and with the stem of
        convolutions, in the DeiT experiments of Miles, Mikolajczyk, "Understanding the Role of the
        Projector in Knowledge Distillation", AAAI 2024.
    """

    num_classes: int
    patch_size: int = 4
    dim: int = 192
    depth: int = 6
    heads: int = 3
    mlp_ratio: int = 4
    dropout: float = 0.0
    distillation: bool = False
    conv_stem: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        stem = _Stem(
            self.patch_size,
            self.dim,
            self.dropout,
            self.distillation,
            self.conv_stem,
            name="stem",
        )
        x = stem(images(x), train)
        stage = _Stage(self.depth, self.heads, self.mlp_ratio, self.dropout, name="stage1")
        x = nn.LayerNorm(epsilon=_LAYER_NORM_EPS, name="norm")(stage(x, train))
        _Tokens(1 + self.distillation, rest=True, name="patches")(x)
        logits = self._head("classifier")(_Tokens(0, name="pool")(x))
        if not self.distillation:
            return logits
        token = _Tokens(1, name="distillation_token")(x)
        return (logits + self._head("distillation_classifier")(token)) / 2

    def _head(self, name: str) -> nn.Dense:
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, name=name)


def deit_tiny(num_classes: int) -> ViT:
    """The DeiT-Ti student of projector distillation: 16x16 patches, width 192, 12 blocks."""
    return _deit(num_classes, dim=192, heads=3)


def deit_small(num_classes: int) -> ViT:
    """The DeiT-S student of projector distillation: 16x16 patches, width 384, 12 blocks."""
    return _deit(num_classes, dim=384, heads=6)


def _deit(num_classes: int, *, dim: int, heads: int) -> ViT:
    return ViT(
        _checks.count("num_classes", num_classes),
        patch_size=16,
        dim=dim,
        depth=12,
        heads=heads,
        distillation=True,
        conv_stem=True,
    )
