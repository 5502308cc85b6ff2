"""What every logit loss does with its arguments before and after its arithmetic."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import _checks

UNLABELLED = -1


class ClassLabels(NamedTuple):
    """Checked integer labels.

    Attributes:
        classes: [...] int32 (int64 stays), -1 for unlabelled rows.
        unlabelled: [...] bool, True where the label is -1.
        invalid: [...] bool, True where a traced label is not a class index.
    """

    classes: jax.Array
    unlabelled: jax.Array
    invalid: jax.Array

    def hot(self, logits: jax.Array) -> jax.Array:
        """[..., C] bool, True at the labelled class (nowhere for unlabelled rows)."""
        every = jax.lax.broadcasted_iota(self.classes.dtype, logits.shape, logits.ndim - 1)
        return every == self.classes[..., None]

    def finish(self, values: jax.Array) -> jax.Array:
        """0 for unlabelled rows, NaN for labels that are not a class index."""
        return jnp.where(self.unlabelled, 0, jnp.where(self.invalid, jnp.nan, values))


def student_logits_and_mask(
    student_logits: ArrayLike, where: ArrayLike | None, *, min_classes: int = 1
) -> tuple[jax.Array, jax.Array | None]:
    """The student's logits in at least float32, masked rows replaced by zeros, and the mask."""
    student = _checks.floating("student_logits", student_logits, min_ndim=1)
    if student.shape[-1] < min_classes:
        raise ValueError(
            f"student_logits must have at least {min_classes} classes in its last dimension, "
            f"got {_checks.describe(student)}."
        )
    mask = _checks.mask("where", where, student.shape[:-1])
    return blank(student, mask), mask


def logits_pair(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    where: ArrayLike | None,
    *,
    min_classes: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Student and teacher in one dtype, the teacher without gradient, masked rows zeroed."""
    student, mask = student_logits_and_mask(student_logits, where, min_classes=min_classes)
    teacher = _checks.floating("teacher_logits", teacher_logits, min_ndim=1)
    _checks.same_shape("student_logits", student, "teacher_logits", teacher)
    dtype = jnp.promote_types(student.dtype, teacher.dtype)
    teacher = blank(jax.lax.stop_gradient(teacher), mask)
    return student.astype(dtype), teacher.astype(dtype), mask


def hyperparameter(
    name: str,
    value: Any,
    dtype: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> jax.Array:
    """A checked scalar in the logits' dtype, so that a float64 schedule can't widen the loss."""
    return jnp.asarray(_checks.number(name, value, low=low, high=high, above=above), dtype)


def class_labels(labels: ArrayLike, logits: jax.Array, mask: jax.Array | None) -> ClassLabels:
    """Checks integer labels against the logits they belong to.

    Values are checked where they are known; where they are traced, rows with a label outside
    -1 .. C-1 are marked ``invalid``. Masked rows may hold anything.
    """
    labels = _checks.integer("labels", labels)
    _checks.shape("labels", labels, logits.shape[:-1], "(the logits without their classes)")
    num_classes = logits.shape[-1]
    if not (_checks.is_traced(labels) or _checks.is_traced(mask)):
        known = np.asarray(labels) if mask is None else np.asarray(labels)[np.asarray(mask)]
        wrong = known[(known < UNLABELLED) | (known >= num_classes)]
        if wrong.size:
            raise ValueError(
                f"labels must be class indices from 0 to {num_classes - 1}, or {UNLABELLED} for "
                f"unlabelled rows, got {wrong.flat[0]}."
            )
    if labels.dtype != jnp.int64:
        # Compared in a narrower type, class indices beyond its range would wrap around.
        labels = labels.astype(jnp.int32)
    return ClassLabels(
        classes=labels,
        unlabelled=labels == UNLABELLED,
        invalid=(labels < UNLABELLED) | (labels >= num_classes),
    )


def blank(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Zeros in the masked rows of ``x`` [..., C], so that not even a NaN there is seen."""
    return x if mask is None else jnp.where(mask[..., None], x, 0)


def select(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Zeros for the masked entries of ``values`` [...]."""
    return values if mask is None else jnp.where(mask, values, 0)
