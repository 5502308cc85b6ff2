"""Vision transformers as students and teachers: attention distributions and patch tokens.

They read single outputs, arrays as an adapter taps them, with the special tokens in front (class,
distillation) left out where the two sides have other ones. The Terms of `kdjax.terms` for
language models (`attention_distributions`, `hidden_states`, `relations`) read tuples with one array
per layer and take masks of padding instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax._pairs import Batch, Outputs, Term, Tree
from kdjax.losses._divergences import kl_parts
from kdjax.losses._features import group_standardize
from kdjax.terms._connectors import counted, linear, linear_init
from kdjax.terms._outputs import no_params, student_output, teacher_output
from kdjax.terms._stages import Taps, tap_pairs

_layer_norm = functools.partial(group_standardize, groups=1, eps=1e-6)


def vit_attention(
    student_taps: Taps,
    teacher_taps: Taps,
    *,
    student_skip: int = 0,
    teacher_skip: int = 0,
    average_heads: bool = False,
) -> Term:
    """Attention transfer between vision transformers: where each token looks, block by block.

        mean over blocks, heads and queries of KL(A_t || A_s)

    where A are attention distributions over keys. MiniLM's transfer is this of the last block, for
    scores; here the outputs are distributions, as Flax's attention sows them.

    Args:
      student_taps: the student's outputs [B, heads, N, N], one for each block to match:
        ``taps={"look": "stage1/block5/attention/attention_weights"}`` of `kdjax.models.ViT`.
      teacher_taps: as many of the teacher's.
      student_skip: leading tokens of the student to leave out, as queries and as keys; what is
        left is scaled to sum to 1. Needed where the special tokens differ.
      teacher_skip: the same for the teacher.
      average_heads: compare the distributions' means over the heads, which may differ in number.
        Otherwise head h is compared with head h.

    Returns:
      A `Term` of values [B].

    Raises:
      ValueError: not as many outputs of both, or a number below 0; when it runs, shapes that
        differ.

    Example:
      >>> import kdjax as kd
      >>> net = kd.models.ViT(10, depth=2, heads=2, dim=8)
      >>> taps = {"look": "stage1/block1/attention/attention_weights"}
      >>> student = teacher = kd.from_linen(net, taps=taps)
      >>> term = kd.terms.vit_attention("look", "look")

    Reference:
      W. Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
      Pre-Trained Transformers", NeurIPS 2020, section 3.1; for images K. Wang, F. Yang, J. van de
      Weijer, "Attention Distillation: self-supervised vision transformer students need more
      guidance", BMVC 2022, which matches the class token's row only.
    """
    pairs = tap_pairs(student_taps, teacher_taps)
    skips = _skips(student_skip, teacher_skip)

    def loss(
        tparams: Tree, student_out: Outputs, teacher_out: Outputs, batch: Batch, **_: Any
    ) -> jax.Array:
        values = []
        for s_tap, t_tap in pairs:
            s = _tapped("student", student_out, s_tap, 4)
            t = _tapped("teacher", teacher_out, t_tap, 4)
            _where, *found = counted(batch, s, t)
            s, t = (_looks(x, skip) for x, skip in zip(found, skips, strict=True))
            if average_heads:
                s, t = (x.mean(axis=1, keepdims=True) for x in (s, t))
            if s.shape != t.shape:
                hint = " (average_heads=True takes other numbers of heads)"
                raise ValueError(
                    f"the student's output {s_tap!r} must have the heads and tokens of the "
                    f"teacher's {t_tap!r}, {t.shape[1:]}{hint}, got {s.shape[1:]}."
                )
            divergence = kl_parts(_log(t), _log(s), jnp.ones((), s.dtype))[0]
            values.append(divergence.mean(axis=(1, 2)))
        return jnp.stack(values).mean(axis=0)

    return Term(no_params, loss)


def vit_tokens(
    student_taps: Taps,
    teacher_taps: Taps,
    *,
    student_skip: int = 0,
    teacher_skip: int = 0,
    normalize: Callable[[jax.Array], jax.Array] = _layer_norm,
) -> Term:
    """Token distillation between vision transformers: each patch token through a linear projector.

        mean over stages, tokens and channels of (N(x_s W + b) - N(x_t))^2

    Args:
      student_taps: the student's outputs, tokens [B, N, C]; ``patches`` of `kdjax.models.ViT` are
        those without special tokens, ``stage1/block5`` all of a block.
      teacher_taps: as many of the teacher's.
      student_skip: leading tokens of the student to leave out: class and distillation token.
      teacher_skip: the same for the teacher.
      normalize: N, of projected and teacher's tokens as rows [rows, D]. The default is layer
        normalisation without scale and offset, for which the value is 2 - 2 times the correlation.
        `kdjax.losses.l2_normalize` makes it 2 / D times 1 minus the cosine.

    Returns:
      A `Term` of values [B]. Its parameters are the projectors, by number of the stage, trained
      with the student and no part of it.

    Raises:
      TypeError: ``normalize`` is no function.
      ValueError: not as many outputs of both, or a number below 0; when it is started, numbers of
        tokens that differ.

    Example:
      >>> import kdjax as kd
      >>> student = kd.from_linen(kd.models.deit_tiny(1000), taps={"tokens": "patches"})
      >>> teacher = kd.from_linen(kd.models.ViT(1000, patch_size=16), taps={"tokens": "norm"})
      >>> term = kd.terms.vit_tokens("tokens", "tokens", teacher_skip=1)

    Reference:
      Y. Wei et al., "Contrastive Learning Rivals Masked Image Modeling in Fine-tuning via Feature
      Distillation", 2022 (arXiv 2205.14141), which whitens the teacher's tokens by layer
      normalisation; there the student's are not normalised, and the distance is smooth.
    """
    pairs = tap_pairs(student_taps, teacher_taps)
    skips = _skips(student_skip, teacher_skip)
    if not callable(normalize):
        raise TypeError(f"normalize must be a function, got {_checks.describe(normalize)}.")

    def tokens(
        pair: tuple[str, str], student_out: Outputs, teacher_out: Outputs
    ) -> tuple[jax.Array, jax.Array]:
        s = _tapped("student", student_out, pair[0], 3)[:, skips[0] :]
        t = _tapped("teacher", teacher_out, pair[1], 3)[:, skips[1] :]
        if s.shape[1] != t.shape[1]:
            raise ValueError(
                f"the student's output {pair[0]!r} must have {t.shape[1]} tokens like the "
                f"teacher's {pair[1]!r}, got {s.shape[1]}; student_skip and teacher_skip leave "
                "out special ones."
            )
        return s, t

    def init(key: jax.Array, student_out: Outputs, teacher_out: Outputs) -> Tree:
        params = {}
        for i, pair in enumerate(pairs):
            s, t = tokens(pair, student_out, teacher_out)
            params[str(i)] = linear_init(jax.random.fold_in(key, i), s.shape[2], t.shape[2])
        return params

    def loss(
        tparams: Tree, student_out: Outputs, teacher_out: Outputs, batch: Batch, **_: Any
    ) -> jax.Array:
        values = []
        for i, pair in enumerate(pairs):
            _where, *found = counted(batch, *tokens(pair, student_out, teacher_out))
            s, t = linear(tparams[str(i)], found[0]), found[1]
            difference = _rows(normalize, s) - _rows(normalize, t)
            values.append(jnp.mean(difference**2, axis=(1, 2)))
        return jnp.stack(values).mean(axis=0)

    return Term(init, loss)


def _skips(student_skip: int, teacher_skip: int) -> tuple[int, int]:
    return (
        _checks.count("student_skip", student_skip, low=0),
        _checks.count("teacher_skip", teacher_skip, low=0),
    )


def _tapped(side: str, outputs: Outputs, tap: str, ndim: int) -> jax.Array:
    found = student_output(outputs, tap) if side == "student" else teacher_output(outputs, tap)
    found = _checks.floating(f"the {side}'s output {tap!r}", found, ndim=ndim)
    return found if side == "student" else jax.lax.stop_gradient(found)


def _looks(x: jax.Array, skip: int) -> jax.Array:
    """Distributions of the tokens after the first ``skip`` over each other."""
    x = x[:, :, skip:, skip:]
    total = jnp.sum(x, axis=3, keepdims=True)
    return x / jnp.where(total > 0, total, 1) if skip else x


def _log(x: jax.Array) -> jax.Array:
    """The logarithm, of what has underflowed that of the smallest number and without slope."""
    return jnp.log(jnp.maximum(x, jnp.finfo(x.dtype).tiny))


def _rows(normalize: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    return normalize(x.reshape(-1, x.shape[-1])).reshape(x.shape)
