"""Teacher-free distillation: a virtual teacher made of the labels, or a copy of the student.

Tf-KD_reg distils from a teacher that is right by construction: it gives the labelled class the
probability a and the others equal shares of the rest. At temperature 1 that is label smoothing.
Tf-KD_self distils from a trained network of the student's own kind.

Reference:
  L. Yuan, F. E. H. Tay, G. Li, T. Wang, J. Feng, "Revisiting Knowledge Distillation via Label
  Smoothing Regularization", CVPR 2020 (arXiv 1909.11723), and its published code.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks, labels, losses, terms
from kdjax._pairs import Batch, Method, Model, Outputs, Term, Tree
from kdjax.core import distill
from kdjax.methods._chain import Augment, rest
from kdjax.terms import at
from kdjax.terms._outputs import Number, checked, labelled, no_params, student_output

__all__ = ["tf_kd_reg", "tf_kd_self", "virtual_labels", "virtual_teacher"]


def virtual_labels(label: ArrayLike, num_classes: int, *, correct: ArrayLike = 0.99) -> jax.Array:
    """The probabilities of the virtual teacher.

        p_y = correct,   p_c = (1 - correct) / (C - 1) for the other classes

    which is `kdjax.labels.smooth` with ``smoothing = (1 - correct) * C / (C - 1)``.

    Args:
      label: [...] integer class indices; -1 (unlabelled) gives a row of zeros.
      num_classes: C, at least 2.
      correct: the probability of the labelled class, from 1 / C to 1; 0.99 in the published code,
        "at least 0.9" in the paper.

    Returns:
      [..., C] float32, without gradient.

    Raises:
      TypeError: ``label`` is not integer.
      ValueError: a label outside -1 .. C-1 (inside jit such a row is NaN), or ``correct`` out of
        its range.

    Example:
      >>> import jax.numpy as jnp, kdjax as kd
      >>> kd.methods.teacher_free.virtual_labels(jnp.array([1]), 4, correct=0.625)
      Array([[0.125, 0.625, 0.125, 0.125]], dtype=float32)

    Reference:
      Yuan et al., CVPR 2020, section 4 (the virtual teacher p^d of Tf-KD_reg).
    """
    _checks.count("num_classes", num_classes, low=2)
    share = jnp.asarray(_checks.number("correct", correct, low=1 / num_classes, high=1))
    if not jnp.issubdtype(share.dtype, jnp.floating):
        share = share.astype(jnp.float32)
    smoothing = (1 - share) * (num_classes / (num_classes - 1))
    return labels.smooth(label, num_classes, smoothing=jnp.clip(smoothing, 0, 1))


def virtual_teacher(
    *,
    correct: Number = 0.99,
    temperature: Number = 20.0,
    reduction: str = "paper",
    label: str = "label",
) -> Term:
    """Distillation from the virtual teacher, as a Term of labelled rows.

    With p^d of `virtual_labels`, "paper" is the formula of the paper, with the factor T^2 that
    soft labels carry everywhere here:

        T^2 * KL(softmax(log p^d / T) || softmax(s / T))

    "reference" is what the published code computes, which takes the probabilities for logits and
    leaves the student as it is:

        KL(softmax(p^d / T) || softmax(s))

    At its T = 20 that target is uniform but for 5% more on the labelled class. The code's mean over
    the classes, times its multiplier of 100, is this sum at 100 classes.

    Args:
      correct: the probability of the labelled class; see `virtual_labels`.
      temperature: T > 0; 20 in the published configurations.
      reduction: "paper" or "reference".
      label: batch entry with integer labels; rows of -1 don't count.

    Returns:
      A `Term`. ``correct`` and ``temperature`` may be arrays or schedules of the step.

    Raises:
      ValueError: a number out of its range, or an unknown reduction.

    Example:
      >>> import kdjax as kd
      >>> term = kd.methods.teacher_free.virtual_teacher(correct=0.95, temperature=4.0)

    Reference:
      Yuan et al., CVPR 2020, section 4, and loss_kd_regularization of the published code.
    """
    checked("correct", correct, above=0, high=1)
    checked("temperature", temperature, above=0)
    _checks.choice("reduction", reduction, ("paper", "reference"))

    def loss(
        tparams: Tree,
        student_out: Outputs,
        teacher_out: Outputs,
        batch: Batch,
        *,
        step: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        given = _checks.integer(f"batch[{label!r}]", _checks.entry("batch", batch, label))
        given = given if given.dtype == jnp.int64 else given.astype(jnp.int32)
        logits = student_output(student_out, "logits")
        scale, classes = at(temperature, step), logits.shape[-1]
        # What is no class gets a value of NaN, but a finite gradient, as it may be padding.
        wrong = (given < -1) | (given >= classes)
        target = virtual_labels(jnp.where(wrong, -1, given), classes, correct=at(correct, step))
        known = labelled(given) & ~wrong
        if reduction == "reference":
            values = losses.soft_label_kl(logits, target / scale)
        else:
            # Rows without a label have no logarithm; their loss is finite, and doesn't count.
            teacher = jnp.log(jnp.where(known[..., None], target, 1))
            values = losses.soft_label_kl(logits, teacher, temperature=scale)
        return jnp.where(wrong, jnp.nan, values), labelled(given).astype(values.dtype)

    return Term(no_params, loss)


def tf_kd_reg(
    student: Model,
    *,
    alpha: Number = 0.1,
    correct: Number = 0.99,
    temperature: Number = 20.0,
    reduction: str = "paper",
    augment: Augment | None = None,
) -> Method:
    """Tf-KD_reg: the labels, and a virtual teacher made of them.

        (1 - alpha) * CE(y, p) + alpha * L_virtual

    Args:
      student: the model that is trained.
      alpha: the share of the virtual teacher, from 0 to 1; 0.1 in the published configuration of
        ResNet-18 on CIFAR-100, with ``reduction="reference"``.
      correct: see `virtual_teacher`.
      temperature: see `virtual_teacher`.
      reduction: see `virtual_teacher`.
      augment: ``(key, batch) -> batch`` inside the update.

    Returns:
      A `Method` without teacher; metrics ``loss``, ``loss/hard``, ``loss/virtual``, ``accuracy``.

    Raises:
      ValueError: a number out of its range, or an unknown reduction.

    Example:
      >>> import jax, optax, kdjax as kd
      >>> student = kd.from_linen(kd.models.MLP(10, features=(16,)))
      >>> learner = kd.minimize(kd.methods.teacher_free.tf_kd_reg(student), optax.sgd(0.1))
      >>> batch = next(iter(kd.data.digits().batches("train", 8, seed=0)))
      >>> state = learner.init(jax.random.key(0), batch)
      >>> state, metrics = jax.jit(learner.update)(state, batch)
      >>> sorted(metrics)
      ['accuracy', 'loss', 'loss/hard', 'loss/virtual']

    Reference:
      Yuan et al., CVPR 2020, section 4 (Tf-KD_reg).
    """
    checked("alpha", alpha, low=0, high=1)
    term = virtual_teacher(correct=correct, temperature=temperature, reduction=reduction)
    pairs = {"hard": (rest(alpha), terms.hard_labels()), "virtual": (alpha, term)}
    return distill(student, None, pairs, augment=augment)


def tf_kd_self(
    student: Model,
    *,
    alpha: Number = 0.95,
    temperature: Number = 6.0,
    augment: Augment | None = None,
) -> Method:
    """Tf-KD_self: distillation from a trained network of the student's own kind.

        (1 - alpha) * CE(y, p) + alpha * T^2 * KL(softmax(t / T) || softmax(s / T))

    It is `kdjax.distill` with the student as its own teacher: the student starts anew, and
    ``frozen`` are the variables of its trained copy, such as `kdjax.train.load_student` reads.
    Repeated, it is `kdjax.methods.born_again`.

    Args:
      student: the model that is trained, and that of the teacher.
      alpha: the share of the teacher, from 0 to 1; 0.95 in the published configuration of ResNet-18
        on CIFAR-100. Its code averages the KL over the classes and multiplies it by 50, so that the
        teacher's weight is half of alpha there: about ``alpha=0.9`` gives that ratio.
      temperature: T > 0; 6 in the same configuration.
      augment: ``(key, batch) -> batch`` inside the update.

    Returns:
      A `Method`; metrics ``loss``, ``loss/hard``, ``loss/soft`` and ``accuracy``.

    Raises:
      ValueError: a number out of its range.

    Example:
      >>> import jax, optax, kdjax as kd
      >>> student = kd.from_linen(kd.models.MLP(10, features=(16,)))
      >>> batch = next(iter(kd.data.digits().batches("train", 8, seed=0)))
      >>> trained = student.init(jax.random.key(1), batch["image"])  # or a checkpoint's
      >>> learner = kd.minimize(kd.methods.teacher_free.tf_kd_self(student), optax.sgd(0.1))
      >>> state = learner.init(jax.random.key(0), batch, trained)
      >>> state, metrics = jax.jit(learner.update)(state, batch, trained)

    Reference:
      Yuan et al., CVPR 2020, section 4 (Tf-KD_self), and loss_kd_self of the published code.
    """
    checked("alpha", alpha, low=0, high=1)
    pairs: dict[str, Any] = {
        "hard": (rest(alpha), terms.hard_labels()),
        "soft": (alpha, terms.soft_labels(temperature=temperature)),
    }
    return distill(student, student, pairs, augment=augment)
