"""Losses that treat the labelled class and the other classes apart: DKD and NKD."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax.losses._divergences import cross_entropy, kl_parts
from kdjax.losses._inputs import class_labels, hyperparameter, logits_pair, select


def dkd(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike = 1.0,
    beta: ArrayLike = 8.0,
    temperature: ArrayLike = 4.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Decoupled knowledge distillation: target and non-target classes weighted apart, times T^2.

        T^2 * (alpha * TCKD + beta * NCKD)
        TCKD = KL((p_y, 1 - p_y) || (q_y, 1 - q_y)),   p = softmax(t / T),   q = softmax(s / T)
        NCKD = KL(p' || q'),   p', q' = softmax over the classes other than y

    With alpha = 1 and beta = 1 - p_y per example it is ``soft_label_kl``. Same numbers as the
    authors' code (mdistiller, cls_KD), which subtracts 1000 from the labelled logit instead of
    leaving it out and takes log(1 - q_y) without a guard: there a wrong class's logit of 500 gives
    inf, here it stays finite. mdistiller multiplies the loss by min(epoch / 20, 1): see
    ``kdjax.schedules.warm_up``.

    Args:
        student_logits: [..., C] floating point, C at least 2.
        teacher_logits: [..., C] floating point; no gradient flows to it.
        labels: [...] integer class indices; -1 for an unlabelled example (loss and gradient 0).
        alpha: weight of the target-class term, a finite scalar.
        beta: weight of the non-target term, a finite scalar; the authors use 1 to 8, larger for
            more confident teachers.
        temperature: softens both sides; a finite scalar above 0. 4 is the authors' for CIFAR-100.
        where: [...] bool, False for examples to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32, 0 where both distributions agree.

    Raises:
        TypeError: logits are not floating point, or labels are not integers.
        ValueError: shapes do not fit, fewer than 2 classes, a temperature not above 0, or a label
            outside -1 .. C-1 (inside jit, where labels have no values yet: NaN).

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> teacher = jnp.array([[4.0, 0.0, 0.0]])
        >>> losses.dkd(jnp.zeros((1, 3)), teacher, jnp.array([0])).round(4)  # NCKD is 0
        Array([1.9726], dtype=float32)

    Reference:
        B. Zhao, Q. Cui, R. Song, Y. Qiu, J. Liang, "Decoupled Knowledge Distillation", CVPR 2022,
        section 3 (the definition of DKD).
    """
    student, teacher, mask = logits_pair(student_logits, teacher_logits, where, min_classes=2)
    known = class_labels(labels, student, mask)
    hot = known.hot(student)
    alpha = hyperparameter("alpha", alpha, student.dtype)
    beta = hyperparameter("beta", beta, student.dtype)
    temperature = hyperparameter("temperature", temperature, student.dtype, above=0)
    student_others, student_alone = _others(student, hot)
    teacher_others, teacher_alone = _others(teacher, hot)
    non_target, teacher_rest, student_rest = kl_parts(teacher_others, student_others, temperature)
    non_target = jnp.where(teacher_alone, 0, jnp.where(student_alone, jnp.inf, non_target))
    log_p, log_not_p = _label_and_rest(
        _label_logit(teacher, hot) / temperature,
        jnp.where(teacher_alone, -jnp.inf, teacher_rest),
    )
    log_q, log_not_q = _label_and_rest(
        _label_logit(student, hot) / temperature,
        jnp.where(student_alone, -jnp.inf, student_rest),
    )
    target = _term(log_p, log_p - log_q) + _term(log_not_p, log_not_p - log_not_q)
    loss = temperature**2 * (alpha * target + beta * non_target)
    return select(known.finish(loss), mask)


def nkd(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 1.5,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Normalised knowledge distillation: soft target loss plus normalised non-target loss.

        -p_y log q_y - gamma * T^2 * sum_{c != y} p'_c log q'_c
        p, q = softmax(t), softmax(s);   p', q' = softmax of t / T, s / T over the classes but y

    As in the authors' code (cls_KD) the first term always has temperature 1, and both terms are
    cross-entropies: the loss is not 0 for a perfect student. The cross-entropy with the hard label
    is a separate term, not included here.

    Args:
        student_logits: [..., C] floating point, C at least 2.
        teacher_logits: [..., C] floating point; no gradient flows to it.
        labels: [...] integer class indices; -1 for an unlabelled example (loss and gradient 0).
        gamma: weight of the non-target term, a finite scalar.
        temperature: of the non-target term; a finite scalar above 0.
        where: [...] bool, False for examples to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32.

    Raises:
        TypeError: logits are not floating point, or labels are not integers.
        ValueError: shapes do not fit, fewer than 2 classes, a temperature not above 0, or a label
            outside -1 .. C-1 (inside jit, where labels have no values yet: NaN).

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> zeros = jnp.zeros((1, 3))
        >>> losses.nkd(zeros, zeros, jnp.array([0])).round(4)  # log(3) / 3 + 1.5 * log(2)
        Array([1.4059], dtype=float32)

    Reference:
        Z. Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified
        Approach with Normalized Loss and Customized Soft Labels", ICCV 2023, section 3 (L_NKD).
    """
    student, teacher, mask = logits_pair(student_logits, teacher_logits, where, min_classes=2)
    known = class_labels(labels, student, mask)
    hot = known.hot(student)
    gamma = hyperparameter("gamma", gamma, student.dtype)
    temperature = hyperparameter("temperature", temperature, student.dtype, above=0)
    p = jnp.exp(_label_logit(teacher, hot) - jax.nn.logsumexp(teacher, axis=-1))
    log_q = _label_logit(student, hot) - jax.nn.logsumexp(student, axis=-1)
    target = -jnp.where(p > 0, p * log_q, 0)
    student_others, _ = _others(student, hot)
    teacher_others, teacher_alone = _others(teacher, hot)
    non_target = cross_entropy(teacher_others, student_others, temperature)
    non_target = jnp.where(teacher_alone, 0, non_target)
    loss = target + gamma * temperature**2 * non_target
    return select(known.finish(loss), mask)


def _others(logits: jax.Array, hot: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits with the labelled class excluded, and where that leaves no class at all.

    Such rows become zeros, so that nothing divides 0 by 0 before they are replaced.
    """
    others = jnp.where(hot, -jnp.inf, logits)
    alone = jnp.max(others, axis=-1) == -jnp.inf
    return jnp.where(alone[..., None], 0, others), alone


def _label_logit(logits: jax.Array, hot: jax.Array) -> jax.Array:
    """The labelled class's logit; 0 for unlabelled rows.

    A masked sum, not a gather: XLA fuses it with its neighbours, and its gradient isn't a scatter.
    """
    return jnp.sum(jnp.where(hot, logits, 0), axis=-1)


def _label_and_rest(logit: jax.Array, rest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p_y and log(1 - p_y) from y's logit and the log-sum-exp of the others; both exact."""
    normaliser = jnp.logaddexp(logit, rest)
    return logit - normaliser, rest - normaliser


def _term(log_weight: jax.Array, gap: jax.Array) -> jax.Array:
    """exp(log_weight) * gap, 0 where the weight is 0."""
    weight = jnp.exp(log_weight)
    return weight * jnp.where(weight > 0, gap, 0)
