"""Features of one stage behind a trained layer as Terms: hints, boundaries, factors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax._pairs import Batch, Outputs, Term, Tree
from kdjax.losses import _connected as connected_losses
from kdjax.losses import _maps as map_losses
from kdjax.losses._inputs import select
from kdjax.terms._connectors import (
    batch_norm,
    conv,
    conv_init,
    counted,
    linear,
    linear_init,
    maps,
    mean_of_batch,
    norm_init,
    one_output,
    transposed_conv,
)
from kdjax.terms._maps import sum_of
from kdjax.terms._outputs import Number, at, checked
from kdjax.terms._stages import Taps, checked_scope, statistics_axis, tap_pairs

LEAK = 0.1  # of the leaky ReLUs of translator and paraphraser


def fitnet(
    student_tap: str,
    teacher_tap: str,
    *,
    relu: bool = True,
    norm: bool = True,
    scope: str = "global",
) -> Term:
    """FitNet's hint: a trained layer should predict the teacher's features from the student's.

        mean over all entries of (relu(norm(conv(s))) - t)^2

    The convolution follows from the sizes: 1x1 where they are equal, 3x3 of stride 2 where the
    student's are twice the teacher's, transposed 4x4 of stride 2 where they are half of them,
    and otherwise, for larger ones, without padding and as large as it takes. Features [B, D] get a
    linear layer. The published weight is 100, on the maps of a middle stage behind their ReLU
    (RepDistiller, mdistiller). RKD's code has neither ReLU nor norm (nor a bias); in the paper the
    hint is a stage of training of its own, which RepDistiller skips.

    Args:
      student_tap: the student's output with maps [B, H, W, C] or features [B, D].
      teacher_tap: the teacher's, of the same kind.
      relu: False for teacher's features that may be negative.
      norm: batch normalisation after the convolution, by the statistics of the batch.
      scope: ``"global"`` takes these of the whole batch on all devices, ``"device"`` of each
        device's rows.

    Returns:
      A `Term` with parameters ``{"conv", "norm"}``; batch-coupled with ``norm``, and else of
      per-example values. Rows of weight 0 are left out of the statistics; of the coupled one all
      others count alike.

    Raises:
      ValueError: another ``scope``; in training, outputs of other kinds or sizes.

    Example:
      >>> import kdjax as kd
      >>> terms = {
      ...     "hard": (1.0, kd.terms.hard_labels()),
      ...     "hint": (100.0, kd.terms.fitnet("stage2", "stage2")),
      ... }

    Reference:
      A. Romero, N. Ballas, S. E. Kahou, A. Chassang, C. Gatta, Y. Bengio, "FitNets: Hints for Thin
      Deep Nets", ICLR 2015, equation 3; the layer is that of RepDistiller and mdistiller.
    """
    checked_scope(scope)

    def both(student_out: Outputs, teacher_out: Outputs) -> tuple[jax.Array, jax.Array]:
        s = one_output("student", student_out, student_tap)
        if s.ndim != 2:
            return maps("student", student_out, student_tap), maps(
                "teacher", teacher_out, teacher_tap
            )
        t = _checks.floating(
            f"the teacher's output {teacher_tap!r}",
            one_output("teacher", teacher_out, teacher_tap),
            ndim=2,
        )
        return _checks.floating(f"the student's output {student_tap!r}", s), jax.lax.stop_gradient(
            t
        )

    def init(key: jax.Array, student_out: Outputs, teacher_out: Outputs) -> Tree:
        return connector_init(key, *both(student_out, teacher_out), norm=norm)

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
        where, s, t = counted(batch, *both(student_out, teacher_out))
        s = connect(tparams, s, t, statistics_axis(scope, axis_name), where)
        s = jax.nn.relu(s) if relu else s
        values = select(jnp.mean((s - t) ** 2, axis=tuple(range(1, s.ndim))), where)
        return mean_of_batch(values, where, axis_name) if norm else values

    return Term(init, loss, norm)


def activation_boundary(
    student_taps: Taps,
    teacher_taps: Taps,
    *,
    margin: Number = 1.0,
    connect_all: bool = False,
    scope: str = "global",
) -> Term:
    """Activation boundaries (AB): the student's neurons should be on where the teacher's are.

        sum over stages i of 3/1000 2^(i - L) mean over examples of AB(norm(conv(s_i)), t_i)

    i from 1 to L, AB of `losses.activation_boundary`, a sum over the map. The factors are those
    inside RepDistiller's loss, so that its weight of 1 carries over; torchdistill has neither of
    them, and some 500 times the value. The layer is chosen as in `fitnet`, with batch
    normalisation. A stage whose maps have the teacher's shape already has none, as there.

    The taps must be features *before* their ReLU: the loss looks at the teacher's signs. The paper
    and RepDistiller use the loss only in a stage before the real training: 30 epochs of this alone,
    from which the student goes on with labels. Two calls of `distill` do that (the optimizer's
    weight decay should then leave out the classifier, which gets no gradient in the first)::

        first = kd.distill(student, teacher, {"ab": (1.0, kd.terms.activation_boundary(s, t))})
        ...                                                    # train it: state
        begun = kd.started(student, (state.params["student"], state.extra["student"]))
        second = kd.distill(begun, teacher, {"hard": (1.0, kd.terms.hard_labels())})

    Args:
      student_taps: the student's output with maps [B, H, W, C], or one for each stage.
      teacher_taps: the teacher's, equally many.
      margin: how far a neuron should be on its side, at least 0; also a schedule of the step.
      connect_all: True for a layer also where the shapes are equal (the authors' form).
      scope: ``"global"`` takes statistics of the whole batch on all devices, ``"device"`` of each
        device's rows.

    Returns:
      A batch-coupled `Term`, with parameters ``{"0": {"conv", "norm"}, ...}``. Rows of weight 0 are
      left out; all others count alike.

    Raises:
      TypeError: taps are no names.
      ValueError: unequally many taps, a number out of range or another ``scope``; in training,
        maps of sizes that don't go together.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.activation_boundary(["pre1", "pre2"], ["pre1", "pre2"])

    Reference:
      B. Heo, M. Lee, S. Yun, J. Y. Choi, "Knowledge Transfer via Distillation of Activation
      Boundaries Formed by Hidden Neurons", AAAI 2019, equations 5 and 6.
    """
    taps = tap_pairs(student_taps, teacher_taps)
    checked("margin", margin, low=0)
    checked_scope(scope)

    def both(student_out: Outputs, teacher_out: Outputs) -> list[tuple[jax.Array, jax.Array]]:
        return [(maps("student", student_out, s), maps("teacher", teacher_out, t)) for s, t in taps]

    def init(key: jax.Array, student_out: Outputs, teacher_out: Outputs) -> Tree:
        return {
            str(i): connector_init(jax.random.fold_in(key, i), s, t, norm=True)
            for i, (s, t) in enumerate(both(student_out, teacher_out))
            if connect_all or s.shape != t.shape
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
        values, where = [], None
        for i, (s, t) in enumerate(both(student_out, teacher_out)):
            where, s, t = counted(batch, s, t)
            if str(i) in tparams:
                s = connect(tparams[str(i)], s, t, statistics_axis(scope, axis_name), where)
            found = connected_losses.activation_boundary(s, t, margin=at(margin, step), where=where)
            values.append(3 / 1000 * 2.0 ** (i + 1 - len(taps)) * found)
        return mean_of_batch(sum_of(values), where, axis_name)

    return Term(init, loss, coupled=True)


def factor_transfer(
    student_tap: str,
    *,
    factor: str = "factor",
    p: float = 1.0,
    norm: bool = False,
    scope: str = "global",
) -> Term:
    """Factor transfer (FT): a trained translation of the student's features should be the factor.

        d = translator(s) / |.| - f / |.|,   mean of |d| over all entries (p = 1), or |d|_2 (p = 2)

    The factor f comes from a paraphraser, an autoencoder that was trained on the teacher's features
    (`kdjax.methods.factor_transfer` trains it, and puts it behind the teacher). The translator is
    three 3x3 convolutions, each with a leaky ReLU. Published weights are 500 (the authors' code,
    CIFAR) and 1000 (torchdistill, ImageNet). RepDistiller's 200 belongs to another loss, of
    channel means (see `kdjax.losses.factor_transfer`), and to a translator with ``norm``.

    Args:
      student_tap: the student's output with maps [B, H, W, C], those of the last stage.
      factor: the teacher's output with the factor [B, H', W', K]. The larger of this and the
        translation is averaged down.
      p: 1 or 2.
      norm: batch normalisation in the translator (RepDistiller), by the statistics of the batch.
      scope: ``"global"`` takes these of the whole batch on all devices, ``"device"`` of each
        device's rows.

    Returns:
      A `Term` with the translator's parameters ``{"0": {"conv"}, ...}``; of per-example values, or
      batch-coupled with ``norm``. Of the coupled one, rows of weight 0 are left out and all others
      count alike.

    Raises:
      ValueError: another ``p`` or ``scope``; in training, outputs that are no maps.

    Example:
      >>> import kdjax as kd
      >>> terms = {
      ...     "hard": (1.0, kd.terms.hard_labels()),
      ...     "ft": (500.0, kd.terms.factor_transfer("stage3")),
      ... }

    Reference:
      J. Kim, S. Park, N. Kwak, "Paraphrasing Complex Network: Network Compression via Factor
      Transfer", NeurIPS 2018, equations 3 and 4.
    """
    connected_losses.check_p(p)
    checked_scope(scope)

    def init(key: jax.Array, student_out: Outputs, teacher_out: Outputs) -> Tree:
        inputs = maps("student", student_out, student_tap).shape[-1]
        width = maps("teacher", teacher_out, factor).shape[-1]
        return coder_init(key, inputs, width, norm=norm)

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
        s, f = maps("student", student_out, student_tap), maps("teacher", teacher_out, factor)
        where, s, f = counted(batch, s, f)
        s = code(tparams, s, axis_name=statistics_axis(scope, axis_name), where=where)
        s, f = map_losses.same_size(s, f)
        values = connected_losses.factor_transfer(s, f, p=p, where=where)
        return mean_of_batch(values, where, axis_name) if norm else values

    return Term(init, loss, norm)


def connector_init(key: jax.Array, s: jax.Array, t: jax.Array, *, norm: bool) -> Tree:
    """Parameters of the layer from features s to the shape of t."""
    inputs, width = s.shape[-1], t.shape[-1]
    kind, size = _layer(s, t)
    if kind == "linear":
        layer = linear_init(key, inputs, width)
    elif kind == "transposed":
        layer = transposed_init(key, inputs, width, size=size)
    else:
        layer = conv_init(key, inputs, width, size=size)
    return {"conv": layer} | ({"norm": norm_init(width)} if norm else {})


def connect(params: Tree, s: jax.Array, t: jax.Array, axis_name: Any, where: Any) -> jax.Array:
    """Features s in the shape of t, normalised if there are parameters for it."""
    kind, layer = _layer(s, t)[0], params["conv"]
    if kind == "linear":
        s = linear(layer, s)
    elif kind == "transposed":
        s = transposed_conv(layer, s, stride=2, padding=1)
    elif kind == "half":
        s = conv(layer, s, stride=2, padding=1)
    else:
        s = conv(layer, s, padding=0)
    if "norm" in params:
        s = batch_norm(params["norm"], s, axis_name=axis_name, where=where)
    return s


def transposed_init(key: jax.Array, inputs: int, outputs: int, *, size: int) -> Tree:
    """Parameters of a transposed convolution; torch takes its outputs for the fan-in there."""
    kernel_key, bias_key = jax.random.split(key)
    bound = (outputs * size * size) ** -0.5
    shape = (size, size, inputs, outputs)
    return {
        "kernel": jax.random.uniform(kernel_key, shape, minval=-bound, maxval=bound),
        "bias": jax.random.uniform(bias_key, (outputs,), minval=-bound, maxval=bound),
    }


def coder_init(key: jax.Array, inputs: int, width: int, *, norm: bool = False) -> Tree:
    """Parameters of the three 3x3 convolutions of a translator, or of a paraphraser's encoder."""
    widths = (inputs, inputs, width, width)
    return {
        str(i): {"conv": conv_init(jax.random.fold_in(key, i), widths[i], widths[i + 1], size=3)}
        | ({"norm": norm_init(widths[i + 1])} if norm else {})
        for i in range(3)
    }


def code(
    params: Tree, x: jax.Array, *, leak: Any = LEAK, axis_name: Any = None, where: Any = None
) -> jax.Array:
    """A translator, or a paraphraser's encoder: from maps to their factor."""
    for i in range(3):
        layer = params[str(i)]
        x = conv(layer["conv"], x)
        if "norm" in layer:
            x = batch_norm(layer["norm"], x, axis_name=axis_name, where=where)
        x = jax.nn.leaky_relu(x, leak)
    return x


def _layer(s: jax.Array, t: jax.Array) -> tuple[str, int]:
    """What leads from the size of s to that of t, and the size of its kernel."""
    if s.ndim == 2:
        return "linear", 1
    (h, w), (height, width) = s.shape[1:3], t.shape[1:3]
    if (h, w) == (2 * height, 2 * width):
        return "half", 3
    if (2 * h, 2 * w) == (height, width):
        return "transposed", 4
    if h - height == w - width >= 0:
        return "unpadded", 1 + h - height
    raise ValueError(
        "the student's maps must be as large as the teacher's, twice or half as large, or larger "
        f"by as much in both directions, got {h} x {w} and {height} x {width}."
    )
