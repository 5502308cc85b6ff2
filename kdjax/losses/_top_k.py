"""Distillation from a teacher of whom only the k most probable classes are stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.losses._divergences import kl_parts
from kdjax.losses._inputs import blank, hyperparameter, select, student_logits_and_mask

MISSING = ("renorm_both", "rest_bucket", "zero")
# Half-precision storage rounds probabilities; more than this over 1 is another quantity.
EXCESS = 1e-3


def top_k_kl(
    student_logits: ArrayLike,
    teacher_ids: ArrayLike,
    teacher_log_probs: ArrayLike,
    *,
    missing: str = "rest_bucket",
    temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Kullback-Leibler divergence from the stored top k of a teacher, times T^2.

    Published code means three different things by it, and they have different minima:

        "rest_bucket": KL over k + 1 outcomes, the last one "any other class". Never more than the
            full divergence; the student's mass outside the k classes is matched in total.
        "zero": the teacher's k probabilities are scaled up to sum to 1, and the student, with its
            softmax over all classes, is driven to give the others none.
        "renorm_both": both sides are scaled to sum to 1 on the k classes. Nothing then constrains
            how much mass the student puts outside: its gradient there is exactly 0. Add a loss
            that sees all classes.

    With k = C they are all ``soft_label_kl``. Probabilities stored at temperature T0 are made those
    of temperature T by p^(T0 / T), the rest's mass in the same way, and normalised; that is exact
    for the ratios of the k classes, but only a guess for the rest, so store at T if you can.

    Args:
        student_logits: [..., C] floating point.
        teacher_ids: [..., k] integer class indices, distinct in each row, as ``labels.top_k``
            makes them (``indices``).
        teacher_log_probs: [..., k] floating point, the log-probabilities of these among all C
            classes (``values``); no gradient flows to it.
        missing: what is made of the classes that are not stored, as above.
        temperature: T, at which both sides are compared; a finite scalar above 0.
        teacher_temperature: T0, at which the log-probabilities were made; a finite scalar above 0.
        where: [...] bool, False for examples to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32, not negative.

    Raises:
        TypeError: logits or log-probabilities are not floating point, or ids not integers.
        ValueError: shapes do not fit, k is above C, an id is no class or stands twice in a row, or
            a row's probabilities sum to more than 1.001. Values inside jit are unknown: there an
            id that is no class gives NaN, and the other two go unseen.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import labels, losses
        >>> kept = labels.top_k(jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125])), 2)
        >>> loss = losses.top_k_kl(jnp.zeros(4), kept.indices, kept.values)
        >>> loss.round(4)  # KL of (1/2, 1/4, 1/4) from (1/4, 1/4, 1/2)
        Array(0.1733, dtype=float32)

    Reference:
        none; "zero" and "rest_bucket" are the two of DistillKit, "renorm_both" is that of tunix
        and MaxText.
    """
    student, mask = student_logits_and_mask(student_logits, where)
    _checks.choice("missing", missing, MISSING)
    ids, values, invalid = _stored(teacher_ids, teacher_log_probs, student, mask)
    dtype = jnp.promote_types(student.dtype, values.dtype)
    temperature = hyperparameter("temperature", temperature, dtype, above=0)
    stored_at = hyperparameter("teacher_temperature", teacher_temperature, dtype, above=0)
    student, values = student.astype(dtype) / temperature, values.astype(dtype)
    power = stored_at / temperature
    p, q = power * values, jnp.take_along_axis(student, ids, axis=-1)
    if missing != "renorm_both" and ids.shape[-1] < student.shape[-1]:
        rest = jnp.full(p.shape[:-1], -jnp.inf, dtype)
        if missing == "rest_bucket":
            rest = _log_rest(values)
            rest = jnp.where(rest == -jnp.inf, rest, power * rest)
        p = jnp.concatenate([p, rest[..., None]], axis=-1)
        q = jnp.concatenate([q, _log_sum_others(student, ids)[..., None]], axis=-1)
    divergence, _, _ = kl_parts(p, q, jnp.ones((), dtype))
    return select(jnp.where(invalid, jnp.nan, temperature**2 * divergence), mask)


def _stored(
    teacher_ids: ArrayLike,
    teacher_log_probs: ArrayLike,
    student: jax.Array,
    mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ids in range, log-probabilities, and [...] True where a traced id is no class."""
    ids = _checks.integer("teacher_ids", teacher_ids)
    values = _checks.floating("teacher_log_probs", teacher_log_probs, min_ndim=1)
    size = ids.shape[-1] if ids.ndim else 0
    if not 1 <= size <= student.shape[-1]:
        raise ValueError(
            f"teacher_ids must hold from 1 to {student.shape[-1]} classes in each row, got {size}."
        )
    wanted = (*student.shape[:-1], size)
    _checks.shape("teacher_ids", ids, wanted, "(k classes for each row of student_logits)")
    _checks.shape("teacher_log_probs", values, wanted, "(one for each of teacher_ids)")
    if ids.dtype != jnp.int64:  # narrower ones can't be compared with the number of classes
        ids = ids.astype(jnp.int32)
    num_classes = student.shape[-1]
    known = not _checks.is_traced(mask)
    rows = np.asarray(mask) if known and mask is not None else ...
    if known and not _checks.is_traced(ids):
        _check_ids(np.asarray(ids)[rows].reshape(-1, size), num_classes)
    if known and not _checks.is_traced(values):
        _check_mass(np.asarray(values, np.float64)[rows].reshape(-1, size))
    invalid = jnp.any((ids < 0) | (ids >= num_classes), axis=-1)
    values = blank(jax.lax.stop_gradient(values), mask)
    return jnp.clip(ids, 0, num_classes - 1), values, invalid


def _check_ids(ids: np.ndarray, num_classes: int) -> None:
    wrong = ids[(ids < 0) | (ids >= num_classes)]
    if wrong.size:
        raise ValueError(
            f"teacher_ids must be class indices from 0 to {num_classes - 1}, got {wrong.flat[0]}."
        )
    ordered = np.sort(ids, axis=-1)
    twice = ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]]
    if twice.size:
        raise ValueError(f"teacher_ids must be distinct in each row, got {twice.flat[0]} twice.")


def _check_mass(log_probs: np.ndarray) -> None:
    mass = np.exp(log_probs).sum(axis=-1)
    if np.any(mass > 1 + EXCESS):
        raise ValueError(
            "teacher_log_probs must be log-probabilities, whose exponentials sum to at most 1 in "
            f"each row, got a sum of {mass.max():.6g}."
        )


def _log_rest(values: jax.Array) -> jax.Array:
    """The log of 1 less the stored probabilities; -inf for what can't be told from 0."""
    rest = 1 - jnp.sum(jnp.exp(values), axis=-1)
    some = rest > values.shape[-1] * float(jnp.finfo(values.dtype).eps)
    return jnp.where(some, jnp.log(jnp.where(some, rest, 1)), -jnp.inf)


def _log_sum_others(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """The log-sum-exp of all logits but those of ``ids``."""
    others = jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False)
    some = jnp.max(others, axis=-1) > -jnp.inf
    # The derivative of an empty sum's logarithm is NaN.
    total = jax.nn.logsumexp(jnp.where(some[..., None], others, 0), axis=-1)
    return jnp.where(some, total, -jnp.inf)
