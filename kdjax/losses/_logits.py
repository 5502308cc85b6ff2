"""Losses between a student's logits and a teacher's logits, or labels.

All of them take logits [..., C] in any floating dtype, compute in at least float32 and return one
value per example [...]. Losses with a temperature T carry the factor T^2, which keeps the size of
their gradients about constant as T changes: a weight tuned at one temperature holds at another.
A class whose logit is -inf on both sides (a class masked out) contributes nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.losses._divergences import (
    cross_entropy,
    jensen_shannon,
    kl_parts,
    label_log_loss,
    log_loss,
)
from kdjax.losses._inputs import (
    blank,
    class_labels,
    hyperparameter,
    logits_pair,
    select,
    student_logits_and_mask,
)


def soft_label_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Kullback-Leibler divergence from the teacher's softened labels, times T^2.

        T^2 * sum_c p_c (log p_c - log q_c),   p = softmax(t / T),   q = softmax(s / T)

    Published implementations disagree on this loss. This one is the sum over classes with the
    factor T^2, one value per example; its batch mean is what RepDistiller, mdistiller and tunix
    compute. With an explicit ``alpha=0`` torchdistill drops T^2, ModelOpt's default also divides
    by the number of classes, TextBrewer returns the cross-entropy without T^2, KD_Lib the squared
    error of the probabilities, and Keras' default string compares raw logits without a softmax.

    Args:
        student_logits: [..., C] floating point.
        teacher_logits: [..., C] floating point; no gradient flows to it.
        temperature: softens both sides; a finite scalar above 0. 1 leaves the logits as they are.
        where: [...] bool, False for examples to leave out: their value and gradient are 0, even
            if their logits are NaN. None keeps all.

    Returns:
        [...] in at least float32, 0 where both distributions agree. It is inf where the student
        excludes a class (-inf) that the teacher allows.

    Raises:
        TypeError: logits are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, or the temperature is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> student = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
        >>> teacher = jnp.log(jnp.array([[0.25, 0.75], [0.25, 0.75]]))
        >>> [round(float(x), 4) for x in losses.soft_label_kl(student, teacher)]
        [0.1308, 0.0]

    Reference:
        G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", NIPS Deep
        Learning Workshop 2014 (arXiv 1503.02531), equation 1 and the remark on 1/T^2 in section 2.
    """
    student, teacher, mask = logits_pair(student_logits, teacher_logits, where)
    temperature = hyperparameter("temperature", temperature, student.dtype, above=0)
    divergence, _, _ = kl_parts(teacher, student, temperature)
    return select(temperature**2 * divergence, mask)


def soft_cross_entropy(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross-entropy of the student under the teacher's softened labels, times T^2.

        -T^2 * sum_c p_c log q_c,   p = softmax(t / T),   q = softmax(s / T)

    Its gradient is that of ``soft_label_kl``; its value is larger by T^2 times the teacher's
    entropy, so it is not 0 for a perfect student. TextBrewer's ``kd_ce_loss`` is this without T^2.

    Args:
        student_logits: [..., C] floating point.
        teacher_logits: [..., C] floating point; no gradient flows to it.
        temperature: softens both sides; a finite scalar above 0. 1 leaves the logits as they are.
        where: [...] bool, False for examples to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32.

    Raises:
        TypeError: logits are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, or the temperature is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> losses.soft_cross_entropy(jnp.zeros((1, 4)), jnp.ones((1, 4))).round(4)  # log 4
        Array([1.3863], dtype=float32)

    Reference:
        G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", NIPS Deep
        Learning Workshop 2014 (arXiv 1503.02531), section 2.
    """
    student, teacher, mask = logits_pair(student_logits, teacher_logits, where)
    temperature = hyperparameter("temperature", temperature, student.dtype, above=0)
    entropy = cross_entropy(teacher, student, temperature)
    return select(temperature**2 * entropy, mask)


def hard_label_cross_entropy(
    student_logits: ArrayLike,
    labels: ArrayLike,
    *,
    smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross-entropy with the given labels, optionally smoothed.

        -sum_c w_c log softmax(s)_c,   w = (1 - smoothing) * onehot(label) + smoothing / C

    No temperature: it belongs to the soft term only. ``labels`` may also hold probabilities, as
    mixup produces them, in place of onehot(label).

    Args:
        student_logits: [..., C] floating point.
        labels: [...] integer class indices, -1 for an unlabelled example (loss and gradient 0);
            or [..., C] floating-point probabilities (not checked; no gradient flows to them),
            where a row of zeros is an unlabelled example.
        smoothing: the share of the target spread evenly over all C classes, from 0 to 1. 0 means
            none.
        where: [...] bool, False for examples to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32. A mean over labelled examples only must divide by their number,
        not by the number of rows.

    Raises:
        TypeError: logits are not floating point, or ``labels`` are neither integer nor floating.
        ValueError: shapes do not fit, ``smoothing`` is outside [0, 1], or a label is outside
            -1 .. C-1. Inside jit labels have no values yet: such a label gives NaN there.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> losses.hard_label_cross_entropy(jnp.zeros((2, 4)), jnp.array([3, -1])).round(4)
        Array([1.3863, 0.    ], dtype=float32)

    Reference:
        Smoothing: C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision",
        CVPR 2016, section 7.
    """
    student, mask = student_logits_and_mask(student_logits, where)
    share = hyperparameter("smoothing", smoothing, student.dtype, low=0, high=1)
    target = _checks.as_array("labels", labels)
    if jnp.issubdtype(target.dtype, jnp.floating):
        _checks.same_shape("labels", target, "student_logits", student)
        target = blank(jax.lax.stop_gradient(target), mask).astype(student.dtype)
        mass = jnp.sum(target, axis=-1)
        weights = (1 - share) * target + share / student.shape[-1] * mass[..., None]
        return select(log_loss(student, weights, mass), mask)
    known = class_labels(target, student, mask)
    if isinstance(smoothing, (int, float)) and smoothing == 0:
        # The written 0 of the default asks for no smoothing at any time, so none is compiled.
        # Arrays and tracers, which may be annealed to 0, never come here.
        loss = label_log_loss(student, known.classes)
    else:
        rest = share / student.shape[-1]
        loss = log_loss(student, jnp.where(known.hot(student), 1 - share + rest, rest), 1)
    return select(known.finish(loss), mask)


def reverse_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Kullback-Leibler divergence of the teacher from the student (mode seeking), times T^2.

        T^2 * sum_c q_c (log q_c - log p_c),   p = softmax(t / T),   q = softmax(s / T)

    Language-model toolkits (TRL, DistiLLM, MiniLLM) leave out T^2; divide by it to compare.

    Args:
        student_logits: [..., C] floating point.
        teacher_logits: [..., C] floating point; no gradient flows to it.
        temperature: softens both sides; a finite scalar above 0. 1 leaves the logits as they are.
        where: [...] bool, False for examples to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32. It is inf where the teacher excludes a class (-inf) that the
        student allows: mask such classes on both sides.

    Raises:
        TypeError: logits are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, or the temperature is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> student = jnp.log(jnp.array([0.25, 0.75]))
        >>> losses.reverse_kl(student, jnp.zeros(2)).round(4)
        Array(0.1308, dtype=float32)

    Reference:
        Y. Gu, L. Dong, F. Wei, M. Huang, "MiniLLM: Knowledge Distillation of Large Language
        Models", ICLR 2024, section 2.
    """
    student, teacher, mask = logits_pair(student_logits, teacher_logits, where)
    temperature = hyperparameter("temperature", temperature, student.dtype, above=0)
    divergence, _, _ = kl_parts(student, teacher, temperature)
    return select(temperature**2 * divergence, mask)


def generalized_jensen_shannon(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    beta: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Generalised Jensen-Shannon divergence between teacher P and student Q, times T^2.

        T^2 * (beta * KL(P || M) + (1 - beta) * KL(Q || M)),   M = beta * P + (1 - beta) * Q
        P = softmax(t / T),   Q = softmax(s / T),   0 < beta < 1

    ``beta`` is the TEACHER's share of M, as in the GKD paper. The formula itself vanishes at both
    ends (divided by beta it tends to KL(P || Q) as beta -> 0, divided by 1 - beta to KL(Q || P) as
    beta -> 1), so the ends are defined, as in TRL and Liger, by

        beta = 0: T^2 * KL(P || Q), which is ``soft_label_kl``
        beta = 1: T^2 * KL(Q || P), which is ``reverse_kl``

    and the loss JUMPS there: do not anneal beta into an end. With P = (1/4, 3/4), Q = (1/2, 1/2)
    and T = 1: beta 0 gives 0.130812, 0.1 gives 0.011831, 0.9 gives 0.012752, 1 gives 0.143841.
    TRL and Liger leave out T^2. EasyDeL documents its two ends the other way round; in DistiLLM's
    ``js_distance`` the number is the student's share, 1 - beta.

    Args:
        student_logits: [..., C] floating point.
        teacher_logits: [..., C] floating point; no gradient flows to it.
        beta: the teacher's share of the mixture, a scalar from 0 to 1. 0.5 is symmetric.
        temperature: softens both sides; a finite scalar above 0. 1 leaves the logits as they are.
        where: [...] bool, False for examples to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32; for 0 < beta < 1 at most T^2 log 2.

    Raises:
        TypeError: logits are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, ``beta`` is outside [0, 1], or the temperature is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> teacher, student = jnp.log(jnp.array([0.25, 0.75])), jnp.zeros(2)
        >>> losses.generalized_jensen_shannon(student, teacher, beta=0.1).round(6)
        Array(0.011831, dtype=float32)

    Reference:
        R. Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
        Mistakes", ICLR 2024, section 2 (the definition of D_JSD(beta)).
    """
    student, teacher, mask = logits_pair(student_logits, teacher_logits, where)
    temperature = hyperparameter("temperature", temperature, student.dtype, above=0)
    beta = hyperparameter("beta", beta, student.dtype, low=0, high=1)
    divergence = jensen_shannon(teacher, student, temperature, beta)
    return select(temperature**2 * divergence, mask)


def logit_mse(
    student_logits: ArrayLike, teacher_logits: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Mean over classes of the squared difference of the logits.

        (1 / C) * sum_c (s_c - t_c)^2

    Half of it, with both logits centred per row, is the limit of ``soft_label_kl`` as the
    temperature grows. Published versions differ by constants: the sum over classes (C times this),
    or half of it. Unlike the divergences it is not invariant to a shift of the logits.

    Args:
        student_logits: [..., C] floating point.
        teacher_logits: [..., C] floating point; no gradient flows to it.
        where: [...] bool, False for examples to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32. A class that the teacher excludes (-inf) adds 0, but counts in C.

    Raises:
        TypeError: logits are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> losses.logit_mse(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
        Array(2., dtype=float32)

    Reference:
        J. Ba, R. Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, section 2; the
        limit: Hinton et al. 2014, section 2.1.
    """
    student, teacher, mask = logits_pair(student_logits, teacher_logits, where)
    gap = jnp.where(teacher == -jnp.inf, 0, student - teacher)
    return select(jnp.mean(gap**2, axis=-1), mask)


def standardize_logits(logits: ArrayLike, *, eps: ArrayLike = 1e-7) -> jax.Array:
    """Logits with mean 0 and standard deviation 1 in every row.

        (z - mean(z)) / (eps + std(z)),   std with C - 1 in the denominator

    Apply it to both sides before a softened loss, so that the student need not match the teacher's
    logit range: ``soft_label_kl(standardize_logits(s), standardize_logits(t), temperature=2.0)``.
    The gradient flows through mean and standard deviation, as in the authors' code, where the term
    carries T^2; torchdistill's soft-only form drops T^2. A constant row gives zeros and, instead
    of the authors' NaN, gradient 0.

    Args:
        logits: [..., C] floating point, C at least 2, finite (-inf classes give NaN).
        eps: added to the standard deviation; a finite scalar of at least 0.

    Returns:
        [..., C] in at least float32.

    Raises:
        TypeError: logits are not floating point.
        ValueError: fewer than 2 classes, or a negative ``eps``.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> losses.standardize_logits(jnp.array([1.0, 1.5, 2.0])).round(4)
        Array([-1.,  0.,  1.], dtype=float32)

    Reference:
        S. Sun, W. Ren, J. Li, R. Wang, X. Cao, "Logit Standardization in Knowledge Distillation",
        CVPR 2024, section 4.
    """
    z = _checks.floating("logits", logits, min_ndim=1)
    if z.shape[-1] < 2:
        raise ValueError(f"logits must have at least 2 classes, got {_checks.describe(z)}.")
    eps = hyperparameter("eps", eps, z.dtype, low=0)
    # Shifted by one of its entries first, a constant row has a variance of exactly 0.
    z = z - jax.lax.stop_gradient(z[..., :1])
    deviation = z - jnp.mean(z, axis=-1, keepdims=True)
    variance = jnp.sum(deviation**2, axis=-1, keepdims=True) / (z.shape[-1] - 1)
    constant = variance == 0
    scale = eps + jnp.sqrt(jnp.where(constant, 1, variance))
    return jnp.where(constant, 0, deviation / scale)
