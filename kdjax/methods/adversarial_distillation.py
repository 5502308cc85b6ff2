"""Adversarial distillation: a small robust student from a large robust teacher.

Four methods that differ in what the attack maximises and in what the student is compared with on
the attacked images x':

    ard      attack: CE(S(x'), y)           loss: KL(T(x) || S(x')), and CE(S(x), y)
    rslad    attack: KL(T(x) || S(x'))      loss: KL(T(x) || S(x')), and KL(T(x) || S(x))
    iad      attack: CE(S(x'), y)           loss: KL(T(x) || S(x')), and KL(S(x) || S(x'))
    adaad    attack: KL(T(x') || S(x'))     loss: KL(T(x') || S(x')), and KL(T(x) || S(x))

The teacher T is trained adversarially itself (by `kdjax.methods.adr`, say), stays in evaluation
mode, and gets no gradient; its variables are ``frozen``. Images are in [0, 1]; the student's and
the teacher's normalisation belong inside them. Where an attack starts, what a batch entry ``noise``
does and how random starts are drawn is as in `kdjax.methods.adversarial`.

Divergences are sums over the classes, as in the papers. The published code of ARD and RSLAD, and of
AdaAD on CIFAR-10, averages over the classes as well, so that its gradients are 1 / classes of
these: ``optax.scale(1 / classes)`` before the weight decay gives its updates.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks, _teachers, losses
from kdjax._pairs import Batch, Method, Model
from kdjax.methods import _adversarial as parts
from kdjax.methods._adversarial import Augment, Call, Number

__all__ = ["adaad", "ard", "iad", "rslad"]


def ard(
    student: Model,
    teacher: Model,
    *,
    alpha: Number = 1.0,
    temperature: Number = 30.0,
    eps: Number = 8 / 255,
    step_size: Number = 2 / 255,
    forward: str = "separate",
    ema_decay: Number | None = None,
    augment: Augment | None = None,
    **options: Any,
) -> Method:
    """Adversarially robust distillation: under attack, the teacher's answer to the natural image.

    ``alpha * T^2 * KL(softmax(t(x) / T) || softmax(s(x') / T)) + (1 - alpha) * CE(s(x), y)``, where
    x' is PGD's on ``CE(s(x'), y)``.

    Args:
      student: the model that is trained.
      teacher: a robust model; it sees natural images only, so `kdjax.from_batch` serves as well.
      alpha: weight of the divergence, from 0 to 1. At the published 1 the natural images still run
        through the student, as in the published code, and move its batch statistics.
      temperature: T of both sides, above 0; 30 is that of the published code for CIFAR-10.
      eps: radius of the attack in units of pixels.
      step_size: of the attack.
      forward: ``"separate"`` passes over natural and attacked images, each with batch statistics of
        its own, or one ``"joint"`` pass.
      ema_decay: as in `kdjax.methods.adversarial.adversarial_training`.
      augment: as in `kdjax.distill`; teacher, attack and student see the same draw.
      **options: ``steps``, ``norm``, ``random_start``, ``attack_mode``, ``unroll`` of
        `kdjax.methods.adversarial.adversarial_training`.

    Returns:
      A `Method` whose ``frozen`` is the teacher's variables. Numbers may be arrays or schedules of
      the step. Metrics: ``loss``, ``loss/robust``, ``loss/natural``, ``accuracy`` and
      ``adversarial_accuracy``. Rows of label -1 count in the divergence, at their random start.

    Raises:
      TypeError: the student or the teacher is no `Model`.
      ValueError: a number out of its range, an unknown norm, mode or ``forward``, or variables that
        are not the teacher's.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kdjax as kd
      >>> student = kd.from_linen(kd.models.MLP(10, features=(8,)))
      >>> teacher = kd.from_linen(kd.models.MLP(10, features=(32,)))
      >>> batch = next(iter(kd.data.digits().batches("train", 8, seed=0)))
      >>> frozen = teacher.init(jax.random.key(1), batch["image"])
      >>> ard = kd.methods.adversarial_distillation.ard
      >>> method = ard(student, teacher, eps=0.1, step_size=0.025)
      >>> learner = kd.minimize(method, optax.sgd(0.1))
      >>> state = learner.init(jax.random.key(0), batch, frozen)
      >>> state, metrics = jax.jit(learner.update)(state, batch, frozen)
      >>> sorted(metrics)
      ['accuracy', 'adversarial_accuracy', 'loss', 'loss/natural', 'loss/robust']

    Reference:
      M. Goldblum, L. Fowl, S. Feizi, T. Goldstein, "Adversarially Robust Distillation", AAAI 2020
      (arXiv 1905.09747), its objective and its published code.
    """
    parts.checked("alpha", alpha, low=0, high=1)
    parts.checked("temperature", temperature, above=0)
    inner = parts.inner(eps=eps, step_size=step_size, **options)
    run = parts.both(student, forward)
    _check_models(student, teacher)

    def terms(call: Call) -> Any:
        natural, moved, state = run(call)
        weight = _at(alpha, call)
        robust = losses.soft_label_kl(
            moved, call.batch["teacher_logits"], temperature=_at(temperature, call)
        )
        found = {
            "robust": (weight, robust),
            "natural": (1 - weight, parts.on_target(natural, call.batch)),
        }
        return found, parts.seen_on_both(natural, moved), state

    return parts.build(
        student,
        teacher=teacher,
        inner=inner,
        targets=parts.one_hot(student),
        perturb=parts.pgd_on(student, inner, parts.target_loss),
        terms=terms,
        augment=augment,
        ema_decay=ema_decay,
    )


def rslad(
    student: Model,
    teacher: Model,
    *,
    alpha: Number = 5 / 6,
    eps: Number = 8 / 255,
    step_size: Number = 2 / 255,
    forward: str = "separate",
    ema_decay: Number | None = None,
    augment: Augment | None = None,
    **options: Any,
) -> Method:
    """Robust soft labels: the teacher's answer to the natural image, everywhere and without labels.

    ``alpha * KL(t(x) || s(x')) + (1 - alpha) * KL(t(x) || s(x))``, where x' maximises the first
    divergence, from ``x + 0.001 N(0, I)`` as in the published code.

    Args:
      student: the model that is trained.
      teacher: as in `ard`.
      alpha: weight of the attacked images, from 0 to 1.
      eps: as in `ard`.
      step_size: as in `ard`.
      forward: as in `ard`.
      ema_decay: as in `ard`.
      augment: as in `ard`.
      **options: ``steps``, ``norm``, ``attack_mode``, ``unroll`` of
        `kdjax.methods.adversarial.adversarial_training`.

    Returns:
      A `Method` as that of `ard`; all rows count alike, with or without labels.

    Raises:
      TypeError: as `ard`.
      ValueError: as `ard`.

    Example:
      >>> import kdjax as kd
      >>> student = kd.from_linen(kd.models.resnet18(10))
      >>> teacher = kd.from_linen(kd.models.resnet34(10))
      >>> method = kd.methods.adversarial_distillation.rslad(student, teacher)

    Reference:
      B. Zi, S. Zhao, X. Ma, Y.-G. Jiang, "Revisiting Adversarial Robustness Distillation: Robust
      Soft Labels Make Student Better", ICCV 2021 (arXiv 2108.07969), its objective and its
      published code.
    """
    parts.checked("alpha", alpha, low=0, high=1)
    inner = parts.inner(eps=eps, step_size=step_size, **options)
    run = parts.both(student, forward)
    _check_models(student, teacher)

    def terms(call: Call) -> Any:
        natural, moved, state = run(call)
        found = _two_divergences(call, alpha, natural, moved, call.batch["teacher_logits"])
        return found, parts.seen_on_both(natural, moved), state

    return parts.build(
        student,
        teacher=teacher,
        inner=inner,
        targets=_none,
        perturb=parts.trades_on(student, inner, against="teacher_logits"),
        terms=terms,
        augment=augment,
        ema_decay=ema_decay,
    )


def iad(
    student: Model,
    teacher: Model,
    *,
    beta: Number = 0.1,
    temperature: Number = 1.0,
    full_teacher: bool = False,
    eps: Number = 8 / 255,
    step_size: Number = 2 / 255,
    forward: str = "separate",
    ema_decay: Number | None = None,
    augment: Augment | None = None,
    **options: Any,
) -> Method:
    """Introspective distillation: the teacher counts as far as it withstands the student's attack.

    ``a * T^2 * KL(softmax(t(x) / T) || softmax(s(x') / T)) + (1 - a) * KL(s(x) || s(x'))`` with
    ``a = softmax(t(x'))_y ^ beta`` for every image, where x' is PGD's on ``CE(s(x'), y)``. What the
    teacher is not trusted with, the student takes from its own answer to the natural image.

    This is the form IAD-I of the paper. As in its code, the second divergence has no temperature,
    and the gradient flows through both of its sides.

    Args:
      student: the model that is trained; it reads one batch entry, such as ``image``.
      teacher: a robust model; it runs on natural and on attacked images.
      beta: at least 0; at 0 the teacher is always trusted. The published warm-up of 60 epochs is a
        schedule: ``optax.join_schedules([lambda t: 0.0, lambda t: 0.1], [60 * steps_per_epoch])``.
      temperature: T of the teacher's divergence, above 0.
      full_teacher: whether the teacher's divergence keeps the weight 1, as in the published code.
      eps: as in `ard`.
      step_size: as in `ard`.
      forward: as in `ard`.
      ema_decay: as in `ard`.
      augment: as in `ard`.
      **options: as in `ard`.

    Returns:
      A `Method` as that of `ard`, with the metrics ``loss/teacher`` and ``loss/student`` for the
      two weighted divergences. In rows of label -1 the teacher is trusted.

    Raises:
      TypeError: as `ard`.
      ValueError: as `ard`; a teacher that comes from the batch, or a student whose inputs are a
        function of the batch.

    Example:
      >>> import kdjax as kd
      >>> student = kd.from_linen(kd.models.resnet18(10))
      >>> teacher = kd.from_linen(kd.models.resnet34(10))
      >>> method = kd.methods.adversarial_distillation.iad(student, teacher)

    Reference:
      J. Zhu et al., "Reliable Adversarial Distillation with Unreliable Teachers", ICLR 2022 (arXiv
      2106.04928), its objective and its published code.
    """
    parts.checked("beta", beta, low=0)
    parts.checked("temperature", temperature, above=0)
    inner = parts.inner(eps=eps, step_size=step_size, **options)
    run = parts.both(student, forward)
    _check_reads_images(student, teacher)

    def trust(call: Call, images: jax.Array) -> Batch:
        logits = jax.lax.stop_gradient(_asked(student, teacher, call, images))
        target = call.batch["target"]
        p = jax.nn.softmax(_checks.floating("the teacher's logits", logits, ndim=2))
        at_label = (p * target).sum(-1)
        share = jnp.power(at_label, jnp.asarray(_at(beta, call), at_label.dtype))
        return {"trust": jnp.where(target.sum(-1) > 0, share, 1)}

    def terms(call: Call) -> Any:
        natural, moved, state = run(call)
        share = call.batch["trust"]
        taught = losses.soft_label_kl(
            moved, call.batch["teacher_logits"], temperature=_at(temperature, call)
        )
        found = {
            "teacher": (1.0, taught if full_teacher else share * taught),
            "student": (1.0, (1 - share) * losses.trades_kl(moved, natural)),
        }
        return found, parts.seen_on_both(natural, moved), state

    return parts.build(
        student,
        teacher=teacher,
        inner=inner,
        targets=parts.one_hot(student),
        perturb=parts.pgd_on(student, inner, parts.target_loss),
        answers=trust,
        terms=terms,
        augment=augment,
        ema_decay=ema_decay,
    )


def adaad(
    student: Model,
    teacher: Model,
    *,
    alpha: Number = 1.0,
    eps: Number = 8 / 255,
    step_size: Number = 2 / 255,
    forward: str = "separate",
    ema_decay: Number | None = None,
    augment: Augment | None = None,
    **options: Any,
) -> Method:
    """Adaptive distillation: where student and teacher differ most, and without labels.

    ``alpha * KL(t(x') || s(x')) + (1 - alpha) * KL(t(x) || s(x))``, where x' maximises the first
    divergence: the attack's gradient flows through the images of both models, so that every step
    of it also costs a pass back and forth through the teacher.

    Args:
      student: as in `iad`.
      teacher: a robust model, not an ensemble; it runs on natural and on attacked images.
      alpha: weight of the attacked images, from 0 to 1. At the published 1 the natural images
        still run through the student, as in the published code, and move its batch statistics.
      eps: as in `ard`.
      step_size: as in `ard`.
      forward: as in `ard`.
      ema_decay: as in `ard`.
      augment: as in `ard`.
      **options: as in `ard`. The random start is uniform in the ball; in the published code it is
        ``x + 0.001 N(0, I)``.

    Returns:
      A `Method` as that of `ard`; all rows count alike, with or without labels.

    Raises:
      TypeError: as `ard`.
      ValueError: as `iad`; a teacher that is an ensemble.

    Example:
      >>> import kdjax as kd
      >>> student = kd.from_linen(kd.models.resnet18(10))
      >>> teacher = kd.from_linen(kd.models.resnet34(10))
      >>> method = kd.methods.adversarial_distillation.adaad(student, teacher)

    Reference:
      B. Huang et al., "Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial
      Distillation", CVPR 2023, its objective and its published code.
    """
    parts.checked("alpha", alpha, low=0, high=1)
    inner = parts.inner(eps=eps, step_size=step_size, **options)
    run = parts.both(student, forward)
    _check_reads_images(student, teacher, alone=True)

    def divergence(logits: jax.Array, images: jax.Array, call: Call) -> jax.Array:
        return losses.trades_kl(logits, _asked(student, teacher, call, images))

    def answers(call: Call, images: jax.Array) -> Batch:
        logits = _asked(student, teacher, call, images)
        return {"teacher_adversarial_logits": jax.lax.stop_gradient(logits)}

    def terms(call: Call) -> Any:
        natural, moved, state = run(call)
        aim = call.batch["teacher_adversarial_logits"]
        found = _two_divergences(call, alpha, natural, moved, aim)
        return found, parts.seen_on_both(natural, moved), state

    return parts.build(
        student,
        teacher=teacher,
        inner=inner,
        targets=_none,
        perturb=parts.pgd_on(student, inner, divergence),
        answers=answers,
        terms=terms,
        augment=augment,
        ema_decay=ema_decay,
    )


def _at(value: Number, call: Call) -> Any:
    return parts.at(value, call.step)


def _two_divergences(
    call: Call, alpha: Number, natural: jax.Array, moved: jax.Array, aim: jax.Array
) -> dict[str, Any]:
    """The terms of `rslad` and `adaad`."""
    weight = _at(alpha, call)
    return {
        "robust": (weight, losses.soft_label_kl(moved, aim)),
        "natural": (1 - weight, losses.soft_label_kl(natural, call.batch["teacher_logits"])),
    }


def _none(call: Call, images: jax.Array) -> Batch:
    """``targets`` of a method that needs no labels."""
    return {}


def _asked(student: Model, teacher: Model, call: Call, images: jax.Array) -> jax.Array:
    """The teacher's logits of other images, with a gradient to the images alone."""
    params, extra = jax.lax.stop_gradient(_teachers.variables(call.frozen))
    inputs = teacher.read({**call.batch, str(student.inputs): images})
    outputs, _ = teacher.apply(params, extra, inputs, train=False, key=None)
    return outputs["logits"]


def _check_models(student: Model, teacher: Model) -> None:
    parts.check_model("student", student)
    parts.check_model("teacher", teacher)


def _check_reads_images(student: Model, teacher: Model, *, alone: bool = False) -> None:
    """Refuses models that can't both be run on attacked images in the place of natural ones."""
    _check_models(student, teacher)
    if not isinstance(student.inputs, str):
        raise ValueError(
            "student must read one entry of the batch (inputs='image'), as the teacher is given "
            f"the attacked images there, got {_checks.describe(student.inputs)}."
        )
    if isinstance(teacher.inputs, str) and teacher.inputs != student.inputs:
        raise ValueError(
            f"teacher must read the batch entry {student.inputs!r} as the student does, as it is "
            f"given the attacked images there, got a teacher that reads {teacher.inputs!r}."
        )
    if teacher.inputs is _teachers.whole_batch:
        raise ValueError(
            "teacher must be a network, as it is run on attacked images; stored outputs "
            "(kdjax.from_batch) don't change with them."
        )
    if alone and teacher.inputs is _teachers._batch_for_ensemble:
        raise ValueError(
            "teacher must be a single network, as the attack's gradient flows through it, which "
            "an ensemble stops."
        )
