"""Divergences to a mixture of student and teacher, and the total variation distance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax.losses._divergences import skewed
from kdjax.losses._inputs import hyperparameter, logits_pair, select


def skew_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alpha: ArrayLike = 0.1,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Skew Kullback-Leibler divergence, times T^2.

        T^2 * KL(P || alpha P + (1 - alpha) Q),   P = softmax(t / T),   Q = softmax(s / T)

    It is at most -log alpha, and its gradient is bounded where the student gives no mass to what
    the teacher expects. DistiLLM's code returns the cross-entropy, larger by the teacher's entropy
    and with the same gradient; like other language-model toolkits it leaves out T^2.

    Args:
        student_logits: [..., C] floating point.
        teacher_logits: [..., C] floating point; no gradient flows to it.
        alpha: the teacher's share of the mixture, a scalar from 0 (``soft_label_kl``) to 1 (where
            the loss is 0).
        temperature: softens both sides; a finite scalar above 0. 1 leaves the logits as they are.
        where: [...] bool, False for examples to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32, not negative, 0 where both distributions agree.

    Raises:
        TypeError: logits are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, ``alpha`` is outside [0, 1], or the temperature is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> teacher, student = jnp.log(jnp.array([0.25, 0.75])), jnp.zeros(2)
        >>> print(f"{losses.skew_kl(student, teacher, alpha=0.5):.4f}")
        0.0354

    Reference:
        J. Ko, S. Kim, T. Chen, S.-Y. Yun, "DistiLLM: Towards Streamlined Distillation for Large
        Language Models", ICML 2024, section 3.1.
    """
    student, teacher, mask = logits_pair(student_logits, teacher_logits, where)
    temperature = hyperparameter("temperature", temperature, student.dtype, above=0)
    alpha = hyperparameter("alpha", alpha, student.dtype, low=0, high=1)
    return select(temperature**2 * skewed(teacher, student, temperature, 1 - alpha), mask)


def skew_reverse_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alpha: ArrayLike = 0.1,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Skew reverse Kullback-Leibler divergence, times T^2.

        T^2 * KL(Q || (1 - alpha) P + alpha Q),   P = softmax(t / T),   Q = softmax(s / T)

    Args:
        student_logits: [..., C] floating point.
        teacher_logits: [..., C] floating point; no gradient flows to it.
        alpha: the student's share of the mixture, a scalar from 0 (``reverse_kl``) to 1 (where the
            loss is 0).
        temperature: softens both sides; a finite scalar above 0. 1 leaves the logits as they are.
        where: [...] bool, False for examples to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32, not negative, 0 where both distributions agree.

    Raises:
        TypeError: logits are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, ``alpha`` is outside [0, 1], or the temperature is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> student, teacher = jnp.log(jnp.array([0.25, 0.75])), jnp.zeros(2)
        >>> print(f"{losses.skew_reverse_kl(student, teacher, alpha=0.5):.4f}")
        0.0354

    Reference:
        J. Ko, S. Kim, T. Chen, S.-Y. Yun, "DistiLLM: Towards Streamlined Distillation for Large
        Language Models", ICML 2024, section 3.1.
    """
    student, teacher, mask = logits_pair(student_logits, teacher_logits, where)
    temperature = hyperparameter("temperature", temperature, student.dtype, above=0)
    alpha = hyperparameter("alpha", alpha, student.dtype, low=0, high=1)
    return select(temperature**2 * skewed(student, teacher, temperature, 1 - alpha), mask)


def total_variation(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Total variation distance of the distributions.

        (1 / 2) * sum_c |p_c - q_c|,   p = softmax(t / T),   q = softmax(s / T)

    The temperature's usual factor is left out: the distance stays between 0 and 1.

    Args:
        student_logits: [..., C] floating point.
        teacher_logits: [..., C] floating point; no gradient flows to it.
        temperature: softens both sides; a finite scalar above 0. 1 leaves the logits as they are.
        where: [...] bool, False for examples to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32, with gradient 0 where both distributions agree.

    Raises:
        TypeError: logits are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, or the temperature is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> losses.total_variation(jnp.zeros(2), jnp.log(jnp.array([0.25, 0.75]))).round(4)
        Array(0.25, dtype=float32)

    Reference:
        Y. Wen, Z. Li, W. Du, L. Mou, "f-Divergence Minimization for Sequence-Level Knowledge
        Distillation", ACL 2023, section 2.2.
    """
    student, teacher, mask = logits_pair(student_logits, teacher_logits, where)
    temperature = hyperparameter("temperature", temperature, student.dtype, above=0)
    gap = jax.nn.softmax(student / temperature) - jax.nn.softmax(teacher / temperature)
    # abs has the slope 1 at 0 in JAX, the sign has 0 there.
    return select(0.5 * jnp.sum(gap * jax.lax.stop_gradient(jnp.sign(gap)), axis=-1), mask)
