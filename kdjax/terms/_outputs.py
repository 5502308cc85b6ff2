"""Terms that compare one output of the student with one of the teacher, or with the labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks, losses
from kdjax._pairs import Batch, Outputs, Schedule, Term, Tree

Number = float | jax.Array | Schedule


def no_params(key: jax.Array, student_out: Outputs, teacher_out: Outputs) -> Tree:
    """The ``init`` of a Term that trains nothing of its own."""
    return {}


def at(value: Any, step: jax.Array) -> Any:
    """A hyperparameter's value at a step: a schedule's, or the number itself."""
    return value(step) if callable(value) else value


def checked(name: str, value: Any, **bounds: Any) -> None:
    """Refuses a number out of range at once; arrays in a trace and schedules come later."""
    if not callable(value):
        _checks.number(name, value, **bounds)


def hard_labels(*, smoothing: Number = 0.0, label: str = "label", logits: str = "logits") -> Term:
    """Cross-entropy with the true labels; unlabelled rows (label -1) don't count.

    Args:
      smoothing: label smoothing in [0, 1].
      label: batch entry with integer labels ``[B, ...]`` or probabilities ``[B, ..., C]`` (after
        mixup). Rows of label -1, or of probabilities that sum to 0, are left out of the mean.
      logits: the student output to use.

    Returns:
      A `Term`. See `kdjax.losses.hard_label_cross_entropy`.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.hard_labels(smoothing=0.1)
    """
    checked("smoothing", smoothing, low=0, high=1)

    def loss(
        tparams: Tree,
        student_out: Outputs,
        teacher_out: Outputs,
        batch: Batch,
        *,
        step: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        labels = jnp.asarray(_checks.entry("batch", batch, label))
        values = losses.hard_label_cross_entropy(
            student_output(student_out, logits), labels, smoothing=at(smoothing, step)
        )
        return values, labelled(labels).astype(values.dtype)

    return Term(no_params, loss)


def soft_labels(
    *,
    temperature: Number = 1.0,
    standardize: bool = False,
    student: str = "logits",
    teacher: str = "logits",
) -> Term:
    """Hinton's soft labels: ``T^2 * KL(softmax(t/T) || softmax(s/T))`` for every row.

    Args:
      temperature: T > 0; also an array, or a schedule of the step.
      standardize: standardise both logits over the classes first (Sun et al., CVPR 2024).
      student: the student output to use.
      teacher: the teacher output to use.

    Returns:
      A `Term`. See `kdjax.losses.soft_label_kl`.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.soft_labels(temperature=4.0)
    """
    checked("temperature", temperature, above=0)

    def loss(s: jax.Array, t: jax.Array, *, temperature: Any) -> jax.Array:
        if standardize:
            s, t = losses.standardize_logits(s), losses.standardize_logits(t)
        return losses.soft_label_kl(s, t, temperature=temperature)

    return matching(loss, student=student, teacher=teacher, temperature=temperature)


def matching(
    loss: Callable[..., Any],
    *,
    student: str = "logits",
    teacher: str = "logits",
    labels: str | None = None,
    coupled: bool = False,
    **options: Any,
) -> Term:
    """Any loss of one student output and one teacher output as a Term.

    Args:
      loss: ``(student, teacher, **options)`` to per-example values ``[B, ...]`` (or ``(values,
        weights)``), or to a scalar if ``coupled``.
      student: the student output to use.
      teacher: the teacher output to use.
      labels: a batch entry to pass as the third argument; rows of label -1 don't count.
      coupled: the loss is of the whole batch and also takes ``axis_name=``.
      **options: hyperparameters; callables among them are schedules of the step.

    Returns:
      A `Term`.

    Example:
      >>> import kdjax as kd
      >>> hint = kd.terms.matching(
      ...     lambda s, t: ((s - t) ** 2).mean(axis=(1, 2, 3)), student="feat", teacher="feat"
      ... )
      >>> dkd = kd.terms.matching(kd.losses.dkd, labels="label", alpha=1.0, beta=8.0)
    """

    def term_loss(
        tparams: Tree,
        student_out: Outputs,
        teacher_out: Outputs,
        batch: Batch,
        *,
        step: jax.Array,
        key: jax.Array,
        **axis: Any,
    ) -> Any:
        given = [student_output(student_out, student), teacher_output(teacher_out, teacher)]
        keywords = {name: at(value, step) for name, value in options.items()}
        label = None
        if labels is not None:
            label = jnp.asarray(_checks.entry("batch", batch, labels))
            given.append(label)
        values = loss(*given, **keywords, **axis)
        if coupled:
            return values
        if jnp.ndim(values[0] if isinstance(values, tuple) else values) == 0:
            raise ValueError(
                "loss must return one value per example, got a scalar, which would count padding; "
                "reduce over the other axes only, or pass coupled=True for a loss of the batch."
            )
        if label is None or isinstance(values, tuple):
            return values
        return values, labelled(label).astype(values.dtype)

    return Term(no_params, term_loss, coupled)


def labelled(label: jax.Array) -> jax.Array:
    """Boolean ``[B, ...]``: integer labels that aren't -1, or probabilities with any mass.

    Labels that are no class count as labels, so that the NaN of their loss is seen.
    """
    if jnp.issubdtype(label.dtype, jnp.floating):
        return label.sum(-1) != 0
    return label != -1


_TAPS = "Name it in the adapter's taps=."
EXPOSE = (
    "Parameters are handed out by the adapter's expose=, such as expose={'head': 'classifier'} for "
    "the layer at the path classifier."
)


def student_output(outputs: Outputs, name: str, hint: str = _TAPS) -> jax.Array:
    _check_tap("student", name)
    return _checks.entry("the student's outputs", outputs, name, hint)


def teacher_output(outputs: Outputs, name: str, hint: str = _TAPS) -> jax.Array:
    _check_tap("teacher", name)
    if not outputs:
        raise ValueError(
            f"teacher must not be None: a term compares with the teacher's output {name!r}."
        )
    return _checks.entry("the teacher's outputs", outputs, name, hint)


def _check_tap(role: str, name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(
            f"the {role}'s tap must be the name of one output, got {_checks.describe(name)}."
        )
