"""Several stages at once: knowledge review (ReviewKD) and the overhaul of feature distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax._pairs import Batch, Outputs, Term, Tree
from kdjax.losses import _overhaul
from kdjax.terms._connectors import conv, conv_init, counted, maps, mean_of_batch, one_output
from kdjax.terms._outputs import EXPOSE, teacher_output
from kdjax.terms._stages import (
    Taps,
    checked_scope,
    conv_norm,
    conv_norm_init,
    map_stages,
    statistics_axis,
    tap_pairs,
)

# He's uniform initialisation with a slope of 1, as the published code has it: sqrt(3 / fan_in).
_GAIN = 3**0.5
_MOST_FEATURES = 512


def review_kd(
    student_taps: Taps,
    teacher_taps: Taps,
    *,
    features: int | None = None,
    levels: Sequence[int] = (4, 2, 1),
    scope: str = "global",
) -> Term:
    """ReviewKD: each stage of the teacher is learned from that stage of the student and all later.

    From the last stage to the first, attention based fusion (ABF) makes the student's answer:

        x_i = bn(conv1x1(s_i)),   y = the residual of stage i + 1, brought to the size of x_i
        a, b = sigmoid(conv1x1([x_i, y])),   residual_i = a x_i + b y, brought to the teacher's size
        answer_i = bn(conv3x3(residual_i))

    and the value is the sum over stages of `kdjax.losses.hierarchical_context` of answer and
    teacher. The last stage is not fused. Sizes change to the nearest neighbour.

    Published weight 1 by default, 5 for resnet32x4 to resnet8x4 (mdistiller), beside weight 1 of
    the hard labels, and a warm-up of 20 epochs, for which the weight is a schedule:
    ``optax.linear_schedule(0.0, 5.0, 20 * steps_per_epoch)`` (mdistiller moves it once an epoch).
    Published outputs are three stages and the pooled features; the teacher's maps are those before
    the last activation of a stage.

    Args:
      student_taps: the student's outputs, from the first stage to the last: maps [B, H, W, C], or
        pooled features [B, C] as maps of one position.
      teacher_taps: as many of the teacher's.
      features: channels between the stages; by default those of the student's last stage, at most
        512.
      levels: sides of the pooled maps of the hierarchical context.
      scope: ``"global"``, batch normalisation by the whole batch, of all devices; ``"device"``, by
        each device's own rows.

    Returns:
      A batch-coupled `Term`, the mean over the rows of non-zero weight. Its parameters, by number
      of the stage, are trained with the student and are no part of it.

    Raises:
      ValueError: not as many outputs of both, an unknown scope, or a number out of range; when it
        is started, outputs that are neither maps nor features.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.review_kd(
      ...     ("stage1", "stage2", "stage3", "pool"), ("stage1", "stage2", "stage3", "pool")
      ... )

    Reference:
      P. Chen, S. Liu, H. Zhao, J. Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021,
      equations 5 to 8 and figure 3.
    """
    pairs = tap_pairs(student_taps, teacher_taps)
    scope = checked_scope(scope)
    if features is not None:
        _checks.count("features", features)
    levels = _overhaul.checked_levels(levels)

    def init(key: jax.Array, student_out: Outputs, teacher_out: Outputs) -> Tree:
        students, teachers = _reviewed(pairs, student_out, teacher_out)
        width = min(_MOST_FEATURES, students[-1].shape[3]) if features is None else features
        return {
            str(i): abf_init(
                jax.random.fold_in(key, i), s.shape[3], width, t.shape[3], fuse=i < len(pairs) - 1
            )
            for i, (s, t) in enumerate(zip(students, teachers, strict=True))
        }

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
        students, teachers = _reviewed(pairs, student_out, teacher_out)
        where, *found = counted(batch, *students, *teachers)
        students, teachers = found[: len(pairs)], found[len(pairs) :]
        options = {"axis_name": statistics_axis(scope, axis_name), "where": where}
        residual, total = None, jnp.zeros(len(students[0]))
        for i in reversed(range(len(pairs))):
            target = teachers[i]
            size = target.shape[1], target.shape[2]
            answer, residual = abf(tparams[str(i)], students[i], residual, size, **options)
            total = total + _overhaul.hierarchical_context(
                answer, target, levels=levels, where=where
            )
        return mean_of_batch(total, where, axis_name)

    return Term(init, loss, coupled=True)


def ofd(
    student_taps: Taps,
    teacher_taps: Taps,
    *,
    norms: Taps,
    scope: str = "global",
) -> Term:
    """OFD, the overhaul of feature distillation: partial L2 distance of maps before activations.

        sum over stages i of 2^-(L - 1 - i) ofd(bn(conv1x1(s_i)), t_i, margin_i)

    with `kdjax.losses.ofd`, and margins by `kdjax.losses.ofd_margin` from the batch normalisations
    that come before the teacher's activations. The mean over the batch, sum over the map.

    Published weight 0.001 (mdistiller), beside weight 1 of the hard labels. There the teacher's
    maps are of the last sum before the activation of each stage, and the batch normalisation is
    the last one in the residual branch. What is no output of a submodule must be sown by the model
    to be tapped.

    Args:
      student_taps: the student's outputs, from the first stage to the last, maps [B, H, W, C].
      teacher_taps: as many of the teacher's.
      norms: as many of the teacher's outputs, each the parameters ``{"scale", "bias"}`` of a batch
        normalisation: the adapter's ``expose={"norm1": "stage1/block4/norm2", ...}``.
      scope: ``"global"``, the connectors' batch normalisation by the whole batch, of all devices;
        ``"device"``, by each device's own rows.

    Returns:
      A batch-coupled `Term`, the mean over the rows of non-zero weight. Its parameters, by number
      of the stage, are trained with the student and are no part of it.

    Raises:
      ValueError: not as many outputs of all three, or an unknown scope; when it is started, outputs
        that are no maps, or parameters that don't fit them.

    Example:
      >>> import kdjax as kd
      >>> teacher = kd.from_linen(
      ...     kd.models.resnet32x4(100),
      ...     taps={"map": "stage3/block4/norm2"},
      ...     expose={"norm": "stage3/block4/norm2"},
      ... )
      >>> term = kd.terms.ofd("map", "map", norms="norm")

    Reference:
      B. Heo, J. Kim, S. Yun, H. Park, N. Kwak, J. Y. Choi, "A Comprehensive Overhaul of Feature
      Distillation", ICCV 2019, equations 1 to 4; stage weights and connectors of its code.
    """
    pairs = tap_pairs(student_taps, teacher_taps)
    norms = [norms] if isinstance(norms, str) else norms
    if not (isinstance(norms, Sequence) and all(isinstance(name, str) for name in norms)):
        raise TypeError(
            "norms must be the name of an output, or one for each stage, got "
            f"{_checks.describe(norms)}."
        )
    if len(norms) != len(pairs):
        raise ValueError(
            f"norms must name as many outputs as teacher_taps, {len(pairs)}, got {len(norms)}."
        )
    scope = checked_scope(scope)

    def init(key: jax.Array, student_out: Outputs, teacher_out: Outputs) -> Tree:
        students, teachers = map_stages(pairs, student_out, teacher_out)
        for name, t in zip(norms, teachers, strict=True):
            _checks.shape(f"the scale of {name!r}", _norm(teacher_out, name)[0], t.shape[3:])
        return {
            str(i): conv_norm_init(jax.random.fold_in(key, i), s.shape[3], t.shape[3])
            for i, (s, t) in enumerate(zip(students, teachers, strict=True))
        }

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
        students, teachers = map_stages(pairs, student_out, teacher_out)
        where, *found = counted(batch, *students, *teachers)
        options = {"axis_name": statistics_axis(scope, axis_name), "where": where}
        total = jnp.zeros(len(students[0]))
        for i, name in enumerate(norms):
            answer = conv_norm(tparams[str(i)], found[i], **options)
            margin = _overhaul.ofd_margin(*_norm(teacher_out, name))
            value = _overhaul.ofd(answer, found[len(pairs) + i], margin=margin, where=where)
            total = total + value / 2 ** (len(pairs) - 1 - i)
        return mean_of_batch(total, where, axis_name)

    return Term(init, loss, coupled=True)


def abf_init(key: jax.Array, inputs: int, features: int, outputs: int, *, fuse: bool) -> Tree:
    """Parameters of attention based fusion."""
    first, last, gates = jax.random.split(key, 3)
    params = {
        "inputs": conv_norm_init(first, inputs, features, gain=_GAIN),
        "outputs": conv_norm_init(last, features, outputs, size=3, gain=_GAIN),
    }
    return params | ({"gates": conv_init(gates, 2 * features, 2)} if fuse else {})


def abf(
    params: Tree, x: jax.Array, residual: jax.Array | None, size: tuple[int, int], **options: Any
) -> tuple[jax.Array, jax.Array]:
    """Attention based fusion of a stage's maps with the residual of the next one.

    Args:
      params: of `abf_init`.
      x: [B, H, W, C], the student's maps.
      residual: [B, H', W', features] of the next stage, or None.
      size: height and width of the teacher's maps.
      **options: of `conv_norm`.

    Returns:
      The answer [B, *size, teacher's channels] and the residual [B, *size, features].
    """
    x = conv_norm(params["inputs"], x, **options)
    if residual is not None:
        residual = nearest(residual, (x.shape[1], x.shape[2]))
        gates = jax.nn.sigmoid(conv(params["gates"], jnp.concatenate([x, residual], axis=3)))
        x = x * gates[..., :1] + residual * gates[..., 1:]
    x = nearest(x, size)
    return conv_norm(params["outputs"], x, **options), x


def nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Maps of another height and width: entry i is that of floor(i * found / wanted)."""
    for axis, wanted in zip((1, 2), size, strict=True):
        if x.shape[axis] != wanted:
            x = jnp.take(x, jnp.arange(wanted) * x.shape[axis] // wanted, axis=axis)
    return x


def _reviewed(
    pairs: Sequence[tuple[str, str]], student_out: Outputs, teacher_out: Outputs
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The maps of all stages; pooled features are maps of one position."""

    def of(side: str, outputs: Outputs, tap: str) -> jax.Array:
        found = one_output(side, outputs, tap)
        if found.ndim == 2:
            outputs = {**outputs, tap: found[:, None, None]}
        return maps(side, outputs, tap)

    return (
        [of("student", student_out, tap) for tap, _ in pairs],
        [of("teacher", teacher_out, tap) for _, tap in pairs],
    )


def _norm(teacher_out: Outputs, name: str) -> tuple[jax.Array, jax.Array]:
    """Scale and bias of an exposed batch normalisation."""
    params = teacher_output(teacher_out, name, EXPOSE)
    if not isinstance(params, Mapping) or not {"scale", "bias"} <= set(params):
        raise ValueError(
            f"the teacher's output {name!r} must be a batch normalisation's parameters, scale and "
            f"bias, such as the adapter's expose= hands out, got {_checks.describe(params)}."
        )
    return jax.lax.stop_gradient((params["scale"], params["bias"]))
