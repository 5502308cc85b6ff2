"""Feature maps of several stages as Terms: attention, selectivity, flow, variational information.

All are means over the examples, so they work in microbatches and on any number of devices.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax._pairs import Batch, Outputs, Term, Tree
from kdjax.losses import _connected as connected_losses
from kdjax.losses import _maps as map_losses
from kdjax.terms._connectors import conv, conv_init, counted, maps
from kdjax.terms._outputs import Number, at, checked, no_params
from kdjax.terms._stages import Taps, tap_pairs


def attention_transfer(
    student_taps: Taps, teacher_taps: Taps, *, power: Number = 2.0, squared: bool = True
) -> Term:
    """Attention transfer (AT): the student should be active where the teacher is.

        sum over stages of mean over places of (A(s) - A(t))^2,   A = `losses.attention_map`

    The published weight is 1000, with a map for every stage of a ResNet (RepDistiller, mdistiller;
    torchdistill's and the authors' code compute the same). The paper prints an unsquared norm
    (``squared=False``, torchdistill's mode "paper"), whose values are some 70 times larger.

    Args:
      student_taps: the student's output with maps [B, H, W, C], or one for each stage.
      teacher_taps: the teacher's, equally many. The larger maps of a stage are averaged down.
      power: of the attention maps, above 0; also a schedule of the step.
      squared: False for the norm.

    Returns:
      A `Term` of per-example values. See `kdjax.losses.attention_transfer`.

    Raises:
      TypeError: taps are no names.
      ValueError: unequally many taps, or a number out of range; in training, no maps.

    Example:
      >>> import kdjax as kd
      >>> stages = ("stage1", "stage2", "stage3")
      >>> terms = {
      ...     "hard": (1.0, kd.terms.hard_labels()),
      ...     "at": (1000.0, kd.terms.attention_transfer(stages, stages)),
      ... }

    Reference:
      S. Zagoruyko, N. Komodakis, "Paying More Attention to Attention: Improving the Performance of
      Convolutional Neural Networks via Attention Transfer", ICLR 2017, equation 2.
    """
    checked("power", power, above=0)

    def compare(s: jax.Array, t: jax.Array, *, where: Any, step: jax.Array) -> jax.Array:
        return map_losses.attention_transfer(
            s, t, power=at(power, step), squared=squared, where=where
        )

    return _of_stages(compare, tap_pairs(student_taps, teacher_taps))


def nst(student_taps: Taps, teacher_taps: Taps) -> Term:
    """Neuron selectivity transfer (NST): match the distribution of the channels' patterns.

        sum over stages of the squared MMD with kernel (a . b)^2 of normalised channel maps

    The published weight is 50 (RepDistiller, mdistiller, which agree), with a map for every stage.

    Args:
      student_taps: the student's output with maps [B, H, W, C], or one for each stage.
      teacher_taps: the teacher's, equally many. The larger maps of a stage are averaged down.

    Returns:
      A `Term` of per-example values. See `kdjax.losses.nst`.

    Raises:
      TypeError: taps are no names.
      ValueError: unequally many taps; in training, no maps.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.nst(["stage2", "stage3"], ["stage2", "stage3"])

    Reference:
      Z. Huang, N. Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
      arXiv 1707.01219, 2017.
    """

    def compare(s: jax.Array, t: jax.Array, *, where: Any, step: jax.Array) -> jax.Array:
        return map_losses.nst(s, t, where=where)

    return _of_stages(compare, tap_pairs(student_taps, teacher_taps))


def fsp(student_taps: Sequence[str], teacher_taps: Sequence[str]) -> Term:
    """The flow between consecutive stages (FSP): how the features of one go with those of the next.

        sum over stages i of mean over channels of (G_i(s) - G_i(t))^2,   G of `losses.fsp`

    RepDistiller's form; the weight in its script is 50, but it uses the loss only in a stage before
    the real training: 30 epochs of this loss alone with weight 1, from which the student goes on
    with labels. Two calls of `distill` do that (the optimizer's weight decay should then leave out
    the classifier, which gets no gradient in the first)::

        first = kd.distill(student, teacher, {"fsp": (1.0, kd.terms.fsp(stages, stages))})
        ...                                                    # train it: state
        begun = kd.started(student, (state.params["student"], state.extra["student"]))
        second = kd.distill(begun, teacher, {"hard": (1.0, kd.terms.hard_labels())})

    Args:
      student_taps: the student's outputs with maps [B, H, W, C], at least two, in their order.
      teacher_taps: the teacher's, equally many, with the same numbers of channels.

    Returns:
      A `Term` of per-example values.

    Raises:
      TypeError: taps are no names.
      ValueError: unequally many taps or fewer than two; in training, other channels.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.fsp(["stem", "stage1", "stage2"], ["stem", "stage1", "stage2"])

    Reference:
      J. Yim, D. Joo, J. Bae, J. Kim, "A Gift from Knowledge Distillation: Fast Optimization,
      Network Minimization and Transfer Learning", CVPR 2017, equations 1 and 2.
    """
    taps = tap_pairs(student_taps, teacher_taps)
    if len(taps) < 2:
        raise ValueError(f"student_taps must name at least two stages, got {student_taps!r}.")

    def loss(
        tparams: Tree,
        student_out: Outputs,
        teacher_out: Outputs,
        batch: Batch,
        *,
        step: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        found = [_stage(student_out, teacher_out, batch, s, t) for s, t in taps]
        return sum_of(
            map_losses.fsp(s1, s2, t1, t2, where=where)
            for (where, s1, t1), (_, s2, t2) in itertools.pairwise(found)
        )

    return Term(no_params, loss)


def vid(
    student_taps: Taps,
    teacher_taps: Taps,
    *,
    initial_variance: float = 5.0,
    eps: Number = 1e-5,
) -> Term:
    """Variational information distillation (VID): predict the teacher's features, and how well.

        sum over stages of mean of ((mu(s) - t)^2 / v + log v) / 2,   v = log(1 + e^a) + eps

    mu is trained: three 1x1 convolutions of the teacher's width without biases, with ReLUs between
    them. So is a, one number for each of the teacher's channels. The published weight is 1
    (RepDistiller, mdistiller), with a map for every stage. In mdistiller a is not among the trained
    parameters, so that the variance stays what it was at first; here it learns, as in the paper
    and in RepDistiller.

    Args:
      student_taps: the student's output with maps [B, H, W, C], or one for each stage.
      teacher_taps: the teacher's, equally many. The larger maps of a stage are averaged down, the
        student's before mu.
      initial_variance: v at the start, above the ``eps`` of step 0.
      eps: smallest variance, above 0; also a schedule of the step.

    Returns:
      A `Term` of per-example values, with parameters ``{"0": {"log_scale", "regressor"}, ...}``.
      See `kdjax.losses.vid`.

    Raises:
      TypeError: taps are no names.
      ValueError: unequally many taps, or a number out of range; in training, no maps.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.vid(["stage2", "stage3"], ["stage2", "stage3"])

    Reference:
      S. Ahn, S. X. Hu, A. Damianou, N. D. Lawrence, Z. Dai, "Variational Information Distillation
      for Knowledge Transfer", CVPR 2019, equations 5 and 6.
    """
    taps = tap_pairs(student_taps, teacher_taps)
    checked("eps", eps, above=0)
    floor = at(eps, jnp.zeros((), jnp.int32))
    lowest = 0 if _checks.is_traced(floor) else float(floor)
    _checks.number("initial_variance", initial_variance, above=lowest)

    def init(key: jax.Array, student_out: Outputs, teacher_out: Outputs) -> Tree:
        params = {}
        for i, (s, t) in enumerate(taps):
            inputs = maps("student", student_out, s).shape[-1]
            width = maps("teacher", teacher_out, t).shape[-1]
            keys = jax.random.split(jax.random.fold_in(key, i), 3)
            widths = (inputs, width, width)
            # The inverse of softplus, in a form that doesn't overflow.
            above = jnp.asarray(initial_variance - floor, jnp.float32)
            params[str(i)] = {
                "regressor": {
                    str(j): conv_init(keys[j], widths[j], width, bias=False) for j in range(3)
                },
                "log_scale": jnp.full(width, above + jnp.log(-jnp.expm1(-above))),
            }
        return params

    def loss(
        tparams: Tree,
        student_out: Outputs,
        teacher_out: Outputs,
        batch: Batch,
        *,
        step: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        values = []
        for i, (s_tap, t_tap) in enumerate(taps):
            where, s, t = _stage(student_out, teacher_out, batch, s_tap, t_tap)
            s, t = map_losses.same_size(s, t)
            own = tparams[str(i)]
            for j in range(3):
                s = conv(own["regressor"][str(j)], jax.nn.relu(s) if j else s)
            values.append(
                connected_losses.vid(s, t, own["log_scale"], eps=at(eps, step), where=where)
            )
        return sum_of(values)

    return Term(init, loss)


def sum_of(values: Any) -> jax.Array:
    """The sum over the stages of values [B]."""
    first, *others = values
    for value in others:
        first = first + value
    return first


def _stage(
    student_out: Outputs, teacher_out: Outputs, batch: Batch, s: str, t: str
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    return counted(batch, maps("student", student_out, s), maps("teacher", teacher_out, t))


def _of_stages(compare: Callable[..., jax.Array], taps: list[tuple[str, str]]) -> Term:
    """The Term that sums a loss of two maps, ``compare(s, t, *, where, step)``, over stages."""

    def loss(
        tparams: Tree,
        student_out: Outputs,
        teacher_out: Outputs,
        batch: Batch,
        *,
        step: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        values = []
        for s_tap, t_tap in taps:
            where, s, t = _stage(student_out, teacher_out, batch, s_tap, t_tap)
            values.append(compare(s, t, where=where, step=step))
        return sum_of(values)

    return Term(no_params, loss)
