"""Mean teacher: the average of the student's weights teaches it, on labelled and unlabelled rows.

Student and teacher see two views of every image, and the student is to predict what the teacher
predicts. The teacher is the exponential moving average of the student, also of its batch
statistics, in evaluation mode: it is `averaged`, and what the paper evaluates. (In the published
code for PyTorch the teacher runs in training mode, with its own dropout and batch statistics; the
noise here is that of the views and of the student's dropout.)

Batches hold labelled rows and, with label -1, unlabelled ones; how many of each is the data's
choice, and matters: published are 31 labelled rows of 128.

Reference:
  A. Tarvainen, H. Valpola, "Mean Teachers are Better Role Models: Weight-averaged consistency
  targets improve semi-supervised deep learning results", NeurIPS 2017 (arXiv 1703.01780), and its
  published code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks, core, terms
from kdjax._pairs import Batch, Method, Model, Outputs, Part, State, Term, Tree
from kdjax._parts import accuracy_of, finite_padding, part_of
from kdjax.methods import _average
from kdjax.terms import at
from kdjax.terms._outputs import Number, checked

__all__ = ["averaged", "mean_teacher", "probability_mse"]


def mean_teacher(
    student: Model,
    *,
    consistency: Number,
    decay: Number = 0.999,
    hard: Number = 1.0,
    distance: Term | None = None,
    augment: Callable[[jax.Array, Batch], Batch] | None = None,
) -> Method:
    """A Method that trains a student against the average of itself.

        loss = hard * CE(y, p) + consistency(t) * mean over all rows of d(p, p')
        theta'_t = a_t theta'_(t-1) + (1 - a_t) theta_t,   a_t = min(1 - 1 / (t + 1), decay)

    with p' the prediction of the average theta', on the other view. t counts the updates made, so
    that up to 1 / (1 - decay) of them the average is the plain mean of all parameters so far, the
    first ones included.

    Args:
      student: the model that is trained.
      consistency: weight of the distance; a number, an array, or a schedule of the step. A teacher
        that has learned nothing yet must not count much, so let it rise:
        ``kd.schedules.sigmoid_ramp_up(100.0, steps)`` is the published weight for CIFAR-10, over
        the first 5 epochs, with `probability_mse`.
      decay: of the average, from 0 to 1; 0.97 in the published configuration for CIFAR-10, 0.99 in
        the ramp and 0.999 after it in the paper (as we remember it). Also a schedule.
      hard: weight of the cross-entropy with the labels there are.
      distance: a Term of the student's and the teacher's outputs; by default the squared
        difference of probabilities. ``kd.terms.soft_labels()`` is the other published one.
      augment: ``(key, batch) -> batch`` inside the update. If it makes the entries ``view1`` and
        ``view2``, as `kdjax.augment.two_views` does, these are the images of student and teacher;
        otherwise both see the same ones. Without it the batch may hold the views itself.

    Returns:
      A `Method` without other teacher, with the average at ``extra["ema"]``. Metrics: ``loss``,
      ``loss/hard``, ``loss/consistency``, ``accuracy`` and ``teacher_accuracy``.

    Raises:
      TypeError: the student is no `Model`, or the distance no `Term`.
      ValueError: a number out of its range.

    Example:
      >>> import jax, optax, kdjax as kd
      >>> student = kd.from_linen(kd.models.MLP(10, features=(16,)))
      >>> method = kd.methods.mean_teacher.mean_teacher(
      ...     student,
      ...     consistency=kd.schedules.sigmoid_ramp_up(10.0, 100),
      ...     decay=0.95,
      ...     augment=kd.augment.digits_views(),
      ... )
      >>> learner = kd.minimize(method, optax.sgd(0.1))
      >>> batch = next(iter(kd.data.digits().batches("train", 8, seed=0)))
      >>> batch["label"][4:] = -1  # unlabelled
      >>> state = learner.init(jax.random.key(0), batch)
      >>> state, metrics = jax.jit(learner.update)(state, batch)
      >>> sorted(metrics)
      ['accuracy', 'loss', 'loss/consistency', 'loss/hard', 'teacher_accuracy']
      >>> params, extra = kd.methods.mean_teacher.averaged(state)

    Reference:
      Tarvainen, Valpola, NeurIPS 2017, equations 1 and 2, by the published code.
    """
    core.check_model("student", student)
    checked("consistency", consistency, low=0)
    checked("decay", decay, low=0, high=1)
    checked("hard", hard, low=0)
    distance = terms.matching(probability_mse) if distance is None else distance
    if augment is not None and not callable(augment):
        raise TypeError(
            f"augment must be a function (key, batch) -> batch, got {_checks.describe(augment)}."
        )
    weighted = core.checked_terms(
        {"hard": (hard, terms.hard_labels()), "consistency": (consistency, distance)}
    )

    def forward(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array
    ) -> tuple[Outputs, Outputs, Tree]:
        ours, theirs = (student.read(_seen(student, batch, view)) for view in ("view1", "view2"))
        average = extra["ema"]
        taught, _ = student.apply(average["params"], average["extra"], theirs, train=False)
        found, state = student.apply(params["student"], extra["student"], ours, train=True, key=key)
        return found, jax.lax.stop_gradient(taught), state

    def init(key: jax.Array, batch: Batch, frozen: Tree = None) -> tuple[Tree, Tree]:
        student_key, terms_key = jax.random.split(key)
        if augment is not None:  # which makes the views
            batch = core.zeros(jax.eval_shape(augment, key, batch))
        params, state = student.init(student_key, student.read(_seen(student, batch, "view1")))
        extra = {"student": state, "ema": _average.begun(params, state)}
        outputs = jax.eval_shape(forward, {"student": params}, extra, batch, student_key)[:2]
        own = {
            name: term.init(jax.random.fold_in(terms_key, i), *core.zeros(outputs))
            for i, (name, (_, term)) in enumerate(weighted.items())
        }
        own = {name: tree for name, tree in own.items() if jax.tree.leaves(tree)}
        return {"student": params} | ({"terms": own} if own else {}), extra

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
        student_key, terms_key = jax.random.split(key)
        if axis_name is not None:  # otherwise all devices would drop the same units
            student_key = jax.random.fold_in(student_key, jax.lax.axis_index(axis_name))
        student_out, teacher_out, state = forward(params, extra, batch, student_key)
        found = {}
        for i, (name, (weight, term)) in enumerate(weighted.items()):
            value = term.loss(
                params.get("terms", {}).get(name, {}),
                student_out,
                teacher_out,
                batch,
                step=step,
                key=jax.random.fold_in(terms_key, i),
                **({"axis_name": axis_name} if term.coupled else {}),
            )
            found[name] = part_of(name, at(weight, step), value, term.coupled, batch, axis_name)
        tracked = accuracy_of(student_out, batch)
        for part in accuracy_of(teacher_out, batch).values():
            tracked["teacher_accuracy"] = part
        return found, ({**extra, "student": state}, tracked)

    def prepare(
        params: Tree, extra: Tree, batch: Batch, frozen: Tree = None, *, key: jax.Array, **_: Any
    ) -> Batch:
        assert augment is not None
        return augment(key, batch)

    def after(
        params: Tree, extra: Tree, batch: Batch, frozen: Tree = None, *, step: jax.Array, **_: Any
    ) -> Tree:
        made = jnp.asarray(step, jnp.float32) + 1
        share = jnp.minimum(1 - 1 / (made + 1), jnp.asarray(at(decay, step), jnp.float32))
        now = {"params": params["student"], "extra": extra["student"]}
        return {**extra, "ema": _average.moved(extra["ema"], now, share)}

    return core.from_parts(init, parts, prepare=None if augment is None else prepare, after=after)


def probability_mse(student_logits: Any, teacher_logits: Any) -> jax.Array:
    """Mean over classes of the squared difference of probabilities.

        (1 / C) * sum_c (softmax(s)_c - softmax(t)_c)^2

    Args:
      student_logits: [..., C] floating point.
      teacher_logits: [..., C] floating point; no gradient flows to it.

    Returns:
      [...] in at least float32, at most 2 / C: its weight is therefore large.

    Raises:
      TypeError: logits are not floating point.
      ValueError: shapes differ.

    Example:
      >>> import jax.numpy as jnp, kdjax as kd
      >>> a, b = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
      >>> kd.methods.mean_teacher.probability_mse(a, b).round(4)
      Array(0.0625, dtype=float32)

    Reference:
      The published code of Tarvainen, Valpola, NeurIPS 2017 (softmax_mse_loss).
    """
    student = _checks.floating("student_logits", student_logits, min_ndim=1)
    teacher = _checks.floating("teacher_logits", teacher_logits, min_ndim=1)
    _checks.same_shape("student_logits", student, "teacher_logits", teacher)
    target = jax.nn.softmax(jax.lax.stop_gradient(teacher))
    return jnp.mean((jax.nn.softmax(student) - target) ** 2, axis=-1)


def averaged(state: State) -> tuple[Tree, Tree]:
    """The teacher of a State, as variables ``(params, extra)``.

    Args:
      state: a `kdjax.State` of `mean_teacher`.

    Returns:
      ``(params, extra)`` of the average, what `kdjax.train.evaluate` and a `Model` take.

    Raises:
      ValueError: there is no average in it.

    Example: see `mean_teacher`.
    """
    return _average.of_state(state, "mean_teacher")


def _seen(student: Model, batch: Batch, view: str) -> Batch:
    """The batch with one view in the place of the student's inputs, where there are views."""
    entry = student.inputs if isinstance(student.inputs, str) else "image"
    return {**batch, entry: batch[view]} if view in batch else batch
