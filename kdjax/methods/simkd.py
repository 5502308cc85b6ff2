"""SimKD: the student learns the teacher's last features and then uses the teacher's classifier.

Only a distance of features is trained; the student's own classifier never learns and is thrown
away. What is used is student, projector and teacher's classifier: `deploy` joins them.

Reference:
  D. Chen, J.-P. Mei, H. Zhang, C. Wang, Y. Feng, C. Chen, "Knowledge Distillation with the Reused
  Teacher Classifier", CVPR 2022, and its code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax._pairs import Batch, Method, Model, Outputs, Part, Schedule, State, Tree
from kdjax._parts import accuracy_of, finite_padding
from kdjax._teachers import check_variables, teach
from kdjax.core import check_model, from_parts
from kdjax.losses._spatial import blank_rows, resize_mean
from kdjax.terms import at
from kdjax.terms._connectors import conv, conv_init, counted, maps, mean_of_batch, norm_init
from kdjax.terms._heads import classifier, classify

__all__ = ["deploy", "simkd"]

Augment = Callable[[jax.Array, Batch], Batch]

_EPS = 1e-5
_MOMENTUM = 0.9  # torch's 0.1
# Kernel sizes of the projector's three layers, each followed by batch normalisation and ReLU.
_SIZES = (1, 3, 1)


def simkd(
    student: Model,
    teacher: Model,
    *,
    student_tap: str = "feat",
    teacher_tap: str = "feat",
    head: str = "head",
    factor: int = 2,
    feature_weight: float | jax.Array | Schedule = 1.0,
    augment: Augment | None = None,
) -> Method:
    """``mean((projector(s) - t)^2)`` of the last maps, and nothing else.

    The projector is a bottleneck of 1x1, 3x3 and 1x1 convolutions without biases, each with batch
    normalisation and ReLU, of the teacher's channels divided by ``factor``. The larger of the two
    maps is first averaged down to the size of the smaller.

    Args:
      student: taps its last maps before the average over positions, [B, H, W, C].
      teacher: taps the same, after a ReLU, and exposes its classifier, a linear layer on the
        average over positions: ``taps={"feat": "stage3"}, expose={"head": "classifier"}``.
      student_tap: the student's output of maps.
      teacher_tap: the teacher's.
      head: the teacher's output with the classifier's parameters.
      factor: by how much the projector is narrower; published 2 (best), 4 and 8.
      feature_weight: weight of the distance, 1 as published: a number, array or schedule.
      augment: as in `kdjax.distill`.

    Returns:
      A `Method`. Beside the student there are ``params["projector"]`` and ``extra["projector"]``,
      the running averages of its batch normalisations (momentum 0.9, biased variance). Batch
      statistics are those of all devices and of the rows of non-zero weight. Metrics: ``loss``,
      ``loss/feature`` and, with labels, ``accuracy`` of what `deploy` returns, in training mode.
      ``params["student"]`` alone classifies at random: its classifier is not trained (weight decay
      still moves it). The published code also trains it with weight 0.

    Raises:
      TypeError: a model is no `Model`, or ``augment`` no function.
      ValueError: ``factor`` doesn't divide the teacher's channels; outputs that are no maps, or a
        head that doesn't fit them.

    Example:
      >>> import kdjax as kd
      >>> student = kd.from_linen(kd.models.resnet8x4(100), taps={"feat": "stage3"})
      >>> teacher = kd.from_linen(
      ...     kd.models.resnet32x4(100), taps={"feat": "stage3"}, expose={"head": "classifier"}
      ... )
      >>> method = kd.methods.simkd.simkd(student, teacher)

    Reference:
      Chen et al., CVPR 2022, equation 2 and figure 2.
    """
    check_model("student", student)
    check_model("teacher", teacher)
    factor = _checks.count("factor", factor)
    if not callable(feature_weight):
        _checks.number("feature_weight", feature_weight)
    if augment is not None and not callable(augment):
        raise TypeError(
            f"augment must be a function (key, batch) -> batch, got {_checks.describe(augment)}."
        )

    def init(key: jax.Array, batch: Batch, frozen: Tree = None) -> tuple[Tree, Tree]:
        student_key, projector_key = jax.random.split(key)
        if augment is not None:
            batch = jax.tree.map(jnp.zeros_like, _abstract(augment, key, batch))
        params, extra = student.init(student_key, student.read(batch))
        check_variables(teacher, frozen, batch)
        s, t, found = _shapes(student, teacher, (params, extra), frozen, batch, taps, head)
        classify(jax.tree.map(_zeros, found), jnp.zeros((1, t.shape[3])))
        if t.shape[3] % factor:
            raise ValueError(
                f"factor must divide the teacher's {t.shape[3]} channels, got {factor}."
            )
        own = _projector_init(projector_key, s.shape[3], t.shape[3] // factor, t.shape[3])
        return {"student": params, "projector": own[0]}, {"student": extra, "projector": own[1]}

    def parts(
        params: Tree,
        extra: Tree,
        batch: Batch,
        frozen: Tree = None,
        *,
        step: jax.Array,
        key: jax.Array,
        axis_name: str | None = None,
    ) -> tuple[dict[str, Part], tuple[Tree, dict[str, Part]]]:
        batch = finite_padding(batch)
        if axis_name is not None:  # otherwise all devices would drop the same units
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        teacher_out = teach(teacher, frozen, batch)
        student_out, student_extra = student.apply(
            params["student"], extra["student"], student.read(batch), train=True, key=key
        )
        t = maps("teacher", teacher_out, teacher_tap)
        where, *found = counted(batch, maps("student", student_out, student_tap), t)
        size = t.shape[1], t.shape[2]
        projected, statistics = _project(
            params["projector"], extra["projector"], found[0], size,
            train=True, axis_name=axis_name, where=where,
        )  # fmt: skip
        target = _smaller(found[1], (projected.shape[1], projected.shape[2]))
        values = jnp.mean((projected - target) ** 2, axis=(1, 2, 3))
        logits = classify(classifier(teacher_out, head), projected.mean(axis=(1, 2)))
        value = Part(at(feature_weight, step), mean_of_batch(values, where, axis_name), None)
        extra = {**extra, "student": student_extra, "projector": statistics}
        return {"feature": value}, (extra, accuracy_of({"logits": logits}, batch))

    def prepare(
        params: Tree, extra: Tree, batch: Batch, frozen: Tree = None, *, key: jax.Array, **_: Any
    ) -> Batch:
        assert augment is not None
        return augment(key, batch)

    taps = (student_tap, teacher_tap)
    return from_parts(init, parts, prepare=None if augment is None else prepare)


def deploy(
    student: Model,
    teacher: Model,
    state: State,
    batch: Batch,
    frozen: Tree,
    *,
    student_tap: str = "feat",
    teacher_tap: str = "feat",
    head: str = "head",
) -> tuple[Model, tuple[Tree, Tree]]:
    """What SimKD has trained, as a `Model` of its own: student, projector, teacher's classifier.

    Args:
      student: as in `simkd`.
      teacher: as in `simkd`. It is run once, on one example, to hand out its classifier.
      state: of the training; what the projector and the student have become.
      batch: any batch with images of the size that the model will see; labels aren't needed.
      frozen: the teacher's variables.
      student_tap: as in `simkd`.
      teacher_tap: as in `simkd`.
      head: as in `simkd`.

    Returns:
      The Model and its variables ``(params, extra)``, with ``params`` of ``student``, ``projector``
      and ``head``. They are evaluated and taken for a teacher like those of any other. From a run's
      folder: ``state = kdjax.train.restore(folder, learner.init(key, batch, frozen))``, then deploy
      (`kdjax.train.load_student` reads the student alone, whose own classifier isn't trained). Its
      outputs are ``logits``, of the teacher's classifier, ``features`` [B, D] that this reads, and
      the student's taps.

    Raises:
      ValueError: the state is not one of `simkd`.

    Example:
      >>> import kdjax as kd
      >>> def test_accuracy(student, teacher, state, batch, frozen, test_batches):
      ...     model, variables = kd.methods.simkd.deploy(student, teacher, state, batch, frozen)
      ...     return kd.train.evaluate(model, variables, test_batches)["accuracy"]

    Reference:
      Chen et al., CVPR 2022, section 3.2.
    """
    if not isinstance(state, State):
        raise ValueError(
            "state must be the whole State of simkd (kdjax.train.restore reads it from a "
            "checkpoint, kdjax.train.load_student only the student in it), got "
            f"{_checks.describe(state)}."
        )
    for name, part in (("params", state.params), ("extra", state.extra)):
        if not isinstance(part, Mapping) or not {"student", "projector"} <= set(part):
            raise ValueError(
                f"state must be one of simkd, with a student and a projector in its {name}, got "
                f"{_checks.describe(part)}."
            )
    trained = state.params["student"], state.extra["student"]
    _, t, _ = _shapes(student, teacher, trained, frozen, batch, (student_tap, teacher_tap), head)
    size, width = (t.shape[1], t.shape[2]), t.shape[3]
    one = jax.tree.map(lambda x: jnp.asarray(x)[:1], dict(batch))
    kept = classifier(teach(teacher, frozen, one), head)
    middle, classes = (
        state.params["projector"]["0"]["conv"]["kernel"].shape[3],
        kept["kernel"].shape[1],
    )

    def init(key: jax.Array, inputs: Any) -> tuple[Tree, Tree]:
        keys = jax.random.split(key, 3)
        params, extra = student.init(keys[0], inputs)
        outputs = jax.eval_shape(student.apply, params, extra, inputs)[0]
        own = _projector_init(keys[1], outputs[student_tap].shape[-1], middle, width)
        made = conv_init(keys[2], width, classes)
        fresh = {name: made[name].reshape(kept[name].shape) for name in kept}
        params = {"student": params, "projector": own[0], "head": fresh}
        return params, {"student": extra, "projector": own[1]}

    def apply(
        params: Tree, extra: Tree, inputs: Any, *, train: bool = False, key: Any = None
    ) -> tuple[dict[str, Any], Tree]:
        outputs, student_extra = student.apply(
            params["student"], extra["student"], inputs, train=train, key=key
        )
        projected, statistics = _project(
            params["projector"], extra["projector"], maps("student", outputs, student_tap), size,
            train=train,
        )  # fmt: skip
        features = projected.mean(axis=(1, 2))
        found = {**outputs, "features": features, "logits": classify(params["head"], features)}
        return found, {**extra, "student": student_extra, "projector": statistics}

    params = {
        "student": trained[0],
        "projector": state.params["projector"],
        "head": jax.tree.map(jnp.copy, kept),
    }
    extra = {"student": trained[1], "projector": state.extra["projector"]}
    return Model(init, apply, student.inputs), (params, extra)


def _projector_init(key: jax.Array, inputs: int, middle: int, outputs: int) -> tuple[Tree, Tree]:
    """Parameters and running averages of the three layers, by their numbers."""
    widths = (inputs, middle, middle, outputs)
    params, extra = {}, {}
    for i, size in enumerate(_SIZES):
        layer = jax.random.fold_in(key, i)
        made = conv_init(layer, widths[i], widths[i + 1], size=size, bias=False)
        params[str(i)] = {"conv": made, "norm": norm_init(widths[i + 1])}
        extra[str(i)] = {"mean": jnp.zeros(widths[i + 1]), "var": jnp.ones(widths[i + 1])}
    return params, extra


def _project(
    params: Tree,
    extra: Tree,
    x: jax.Array,
    size: tuple[int, int],
    *,
    train: bool,
    axis_name: str | None = None,
    where: jax.Array | None = None,
) -> tuple[jax.Array, Tree]:
    """The student's maps [B, H, W, C] as the teacher's, and the new running averages."""
    x = _smaller(x, size)
    moved = {}
    for name in sorted(params):
        x = conv(params[name]["conv"], x)
        if train:
            mean, var, some = _statistics(x, axis_name, where)
            moved[name] = {  # by a batch with rows that count
                kind: jnp.where(some, _MOMENTUM * old + (1 - _MOMENTUM) * new, old)
                for kind, old, new in (
                    ("mean", extra[name]["mean"], mean),
                    ("var", extra[name]["var"], var),
                )
            }
        else:
            mean, var = extra[name]["mean"], extra[name]["var"]
        scale = jax.lax.rsqrt(var + _EPS) * params[name]["norm"]["scale"]
        x = (x - _wide(mean)) * _wide(scale) + _wide(params[name]["norm"]["bias"])
        x = jax.nn.relu(x)
    return x, jax.lax.stop_gradient(moved) if train else extra


def _statistics(
    x: jax.Array, axis_name: str | None, where: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and biased variance [C] over the rows that count, of all devices; if there are any."""
    rows = jnp.asarray(x.shape[0] if where is None else jnp.sum(where), x.dtype)
    places = x.shape[1] * x.shape[2]
    rows = rows if axis_name is None else jax.lax.psum(rows, axis_name)

    def mean(values: jax.Array) -> jax.Array:
        total = jnp.sum(blank_rows(values, where), axis=(0, 1, 2))
        total = total if axis_name is None else jax.lax.psum(total, axis_name)
        return total / (jnp.maximum(rows, 1) * places)

    centre = mean(x)
    return centre, mean((x - _wide(centre)) ** 2), rows > 0


def _wide(x: jax.Array) -> jax.Array:
    return x[None, None, None]


def _smaller(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Maps averaged down to a size; smaller ones stay as they are."""
    return resize_mean(x, (min(x.shape[1], size[0]), min(x.shape[2], size[1])))


def _abstract(augment: Augment, key: jax.Array, batch: Batch) -> Batch:
    return jax.eval_shape(augment, key, batch)


def _zeros(x: Any) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype)


def _shapes(
    student: Model,
    teacher: Model,
    trained: tuple[Tree, Tree],
    frozen: Tree,
    batch: Batch,
    taps: tuple[str, str],
    head: str,
) -> tuple[Any, Any, Any]:
    """Shapes of the student's and the teacher's maps, and of the teacher's classifier."""

    def look(variables: tuple[Tree, Tree], frozen: Tree, batch: Batch) -> tuple[Any, Any, Outputs]:
        student_out, _ = student.apply(*variables, student.read(batch), train=False, key=None)
        teacher_out = teach(teacher, frozen, batch)
        found = maps("student", student_out, taps[0]), maps("teacher", teacher_out, taps[1])
        return *found, classifier(teacher_out, head)

    return jax.eval_shape(look, trained, frozen, dict(batch))
