"""Terms of channels and masked maps: ICKD, KDSVD and masked generative distillation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax._pairs import Batch, Outputs, Term, Tree
from kdjax.losses import _channels
from kdjax.terms._connectors import conv, conv_init, counted, maps, mean_of_batch
from kdjax.terms._outputs import Number, at, checked, no_params
from kdjax.terms._stages import (
    Taps,
    checked_scope,
    conv_norm,
    conv_norm_init,
    map_stages,
    statistics_axis,
    tap_pairs,
)


def ickd(student_tap: str, teacher_tap: str, *, scope: str = "global") -> Term:
    """ICKD: the correlations between the channels of one stage.

        mean over examples of (1 / C) ||N(F_s F_s^T) - N(F_t F_t^T)||_F^2

    with the student's maps through a 1x1 convolution and batch normalisation to the teacher's
    channels; see `kdjax.losses.ickd`. Published weight 2.5 on the last maps, beside weight 1 of
    the hard labels, without soft labels or with weight 1 of them (the authors' CIFAR code, whose
    normalisation this is; torchdistill and the ImageNet code divide by the batch size once more).

    Args:
      student_tap: the student's output, maps [B, H, W, C].
      teacher_tap: the teacher's, maps of any height and width.
      scope: ``"global"``, batch normalisation by the whole batch, of all devices; ``"device"``, by
        each device's own rows.

    Returns:
      A batch-coupled `Term`, the mean over the rows of non-zero weight. Its parameters are the
      connector's, trained with the student and no part of it.

    Raises:
      ValueError: an unknown scope; when it is started, outputs that are no maps.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.ickd("stage3", "stage3")

    Reference:
      L. Liu et al., "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge
      Distillation", ICCV 2021, equations 2 to 4.
    """
    scope = checked_scope(scope)

    def init(key: jax.Array, student_out: Outputs, teacher_out: Outputs) -> Tree:
        s, t = maps("student", student_out, student_tap), maps("teacher", teacher_out, teacher_tap)
        return conv_norm_init(key, s.shape[3], t.shape[3])

    def loss(
        tparams: Tree,
        student_out: Outputs,
        teacher_out: Outputs,
        batch: Batch,
        *,
        step: jax.Array,
        key: jax.Array,
        axis_name: Any = None,
    ) -> jax.Array:
        s, t = maps("student", student_out, student_tap), maps("teacher", teacher_out, teacher_tap)
        where, *found = counted(batch, s, t)
        s, t = found
        s = conv_norm(tparams, s, axis_name=statistics_axis(scope, axis_name), where=where)
        return mean_of_batch(_channels.ickd(s, t, where=where), where, axis_name)

    return Term(init, loss, coupled=True)


def kdsvd(student_taps: Taps, teacher_taps: Taps, *, k: int = 1) -> Term:
    """KDSVD: how the main directions of neighbouring stages are related.

    The sum of `kdjax.losses.kdsvd`, which says how it deals with the signs and the order of
    singular vectors, over neighbouring stages. Published weight 1 with k = 1 (mdistiller, of
    another reading of the maps); RepDistiller, whose form this is, has no weight for it.

    Args:
      student_taps: the student's outputs, at least two, from the first stage to the last: maps
        [B, H, W, C].
      teacher_taps: as many of the teacher's, of the same channels.
      k: how many directions of each stage.

    Returns:
      A `Term`.

    Raises:
      ValueError: fewer than two stages, not as many of both, or ``k`` below 1; when it runs, other
        channels, or ``k`` above what the maps have.

    Example:
      >>> import kdjax as kd
      >>> stages = ("stage1", "stage2", "stage3")
      >>> term = kd.terms.kdsvd(stages, stages)

    Reference:
      S. H. Lee, D. H. Kim, B. C. Song, "Self-supervised Knowledge Distillation Using Singular
      Value Decomposition", ECCV 2018.
    """
    pairs = tap_pairs(student_taps, teacher_taps)
    if len(pairs) < 2:
        raise ValueError("student_taps must name at least two stages to relate, got one.")
    _checks.count("k", k)

    def loss(
        tparams: Tree, student_out: Outputs, teacher_out: Outputs, batch: Batch, **_: Any
    ) -> jax.Array:
        students, teachers = map_stages(pairs, student_out, teacher_out)
        for (s_tap, t_tap), s, t in zip(pairs, students, teachers, strict=True):
            if s.shape[3] != t.shape[3]:
                raise ValueError(
                    f"the student's output {s_tap!r} must have {t.shape[3]} channels like the "
                    f"teacher's {t_tap!r}, got {_checks.describe(s)}."
                )
        _where, *found = counted(batch, *students, *teachers)
        return _channels.kdsvd_of_stages(found[: len(pairs)], found[len(pairs) :], k)

    return Term(no_params, loss)


def mgd(
    student_tap: str, teacher_tap: str, *, share: Number = 0.65, channels: bool = False
) -> Term:
    """Masked generative distillation (MGD): the teacher's maps, from a part of the student's.

        ||conv3x3(relu(conv3x3(mask * conv1x1(s)))) - t||^2, the sum over an example's map

    The mask drops each position, or each channel, with a probability; it is drawn for each example
    from the step's key and ``batch["index"]``, so that sharding doesn't change it. The 1x1
    convolution is there if the channels differ.

    Published weights are those of sums: 2e-5 with positions and share 0.65 for detection, 7e-5 with
    ``channels=True, share=0.15`` for classification.

    Args:
      student_tap: the student's output, maps [B, H, W, C].
      teacher_tap: the teacher's, of the same height and width.
      share: the probability of being dropped, in [0, 1]; also an array or a schedule of the step.
      channels: whether whole channels are dropped, instead of positions.

    Returns:
      A `Term` of values [B]. Its parameters, of the convolutions, are trained with the student and
      are no part of it.

    Raises:
      ValueError: ``share`` is out of range; when it is started, outputs that are no maps of one
        height and width; when it runs, a batch without ``index``.

    Example:
      >>> import kdjax as kd
      >>> detection = (2e-5, kd.terms.mgd("stage3", "stage3"))
      >>> classification = (7e-5, kd.terms.mgd("stage3", "stage3", share=0.15, channels=True))

    Reference:
      Z. Yang et al., "Masked Generative Distillation", ECCV 2022, equations 2 to 6.
    """
    checked("share", share, low=0, high=1)

    def init(key: jax.Array, student_out: Outputs, teacher_out: Outputs) -> Tree:
        s, t = maps("student", student_out, student_tap), maps("teacher", teacher_out, teacher_tap)
        if s.shape[1:3] != t.shape[1:3]:
            raise ValueError(
                f"the student's output {student_tap!r} must have the height and width of the "
                f"teacher's {teacher_tap!r}, {t.shape[1:3]}, got {_checks.describe(s)}."
            )
        align, first, second = jax.random.split(key, 3)
        width = t.shape[3]
        params = {
            "first": conv_init(first, width, width, size=3),
            "second": conv_init(second, width, width, size=3),
        }
        return params | (
            {"align": conv_init(align, s.shape[3], width)} if s.shape[3] != width else {}
        )

    def loss(
        tparams: Tree,
        student_out: Outputs,
        teacher_out: Outputs,
        batch: Batch,
        *,
        step: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        s, t = maps("student", student_out, student_tap), maps("teacher", teacher_out, teacher_tap)
        _where, *found = counted(batch, s, t)
        s, t = found
        hint = "Masks are drawn by the examples' positions in the data set."
        index = jnp.asarray(_checks.entry("batch", batch, "index", hint))
        _checks.shape("batch['index']", index, s.shape[:1], "for the examples")
        shape = (1, 1, t.shape[3]) if channels else (*t.shape[1:3], 1)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
        draws = jax.vmap(lambda one: jax.random.uniform(one, shape))(keys)
        return generated_distance(tparams, s, t, draws >= at(share, step))

    return Term(init, loss)


def generated_distance(tparams: Tree, s: jax.Array, t: jax.Array, kept: jax.Array) -> jax.Array:
    """[B]: the squared distance of what is generated from the kept part of the student's maps.

    Args:
      tparams: of the Term.
      s: [B, H, W, C], the student's maps.
      t: [B, H, W, D], the teacher's.
      kept: [B, H, W, 1] or [B, 1, 1, D] bool.
    """
    x = conv(tparams["align"], s) if "align" in tparams else s
    x = jnp.where(kept, x, 0)
    x = conv(tparams["second"], jax.nn.relu(conv(tparams["first"], x)))
    return jnp.sum((x - t) ** 2, axis=(1, 2, 3))
