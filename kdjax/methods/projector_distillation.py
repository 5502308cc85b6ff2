"""Projector distillation: learned projector, batch normalisation, LogSum distance.

The three totals that were trained, as factories with the published weights, and the optimizers they
were trained with. Everything is made of `kdjax.distill` and `kdjax.terms`; for other distances,
normalisations or projectors, put `kdjax.terms.projector` into `kdjax.distill` yourself.

Reference:
  R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge Distillation",
  AAAI 2024; where the paper leaves a number out, its published code (Simple-Recipe-Distillation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdjax import _checks, terms
from kdjax._pairs import Batch, Method, Model, Schedule, Term, Tree
from kdjax.core import distill

__all__ = [
    "cifar100",
    "cifar100_optimizer",
    "deit",
    "deit_optimizer",
    "imagenet",
    "imagenet_optimizer",
]

Number = float | jax.Array | Schedule
Augment = Callable[[jax.Array, Batch], Batch]
Terms = Mapping[str, tuple[Number, Term]]

_UNDECAYED = frozenset({"bias", "scale", "positions", "class_token"})


def imagenet(
    student: Model,
    teacher: Model,
    *,
    student_tap: str = "feat",
    teacher_tap: str = "feat",
    feature_weight: Number = 2.0,
    soft_weight: Number = 1.0,
    temperature: Number = 1.0,
    alpha: Number = 4.0,
    augment: Augment | None = None,
    more_terms: Terms | None = None,
    **options: Any,
) -> Method:
    """The ImageNet total, ResNet-34 to ResNet-18.

    ``CE(labels) + 2 LogSum(BN(projected student), BN(teacher)) + KL(teacher || student)``,
    temperature 1, linear projector. This is the form whose code followed the publication; the
    first code had the correlations of `deit` and no KL, for which pass
    ``loss="correlation_log_sum", soft_weight=0.0``.

    Args:
      student: taps its last features before the classifier, as maps [B, H, W, C] or pooled.
      teacher: taps the same.
      student_tap: the student's output with the features.
      teacher_tap: the teacher's.
      feature_weight: weight of the LogSum.
      soft_weight: weight of the soft labels.
      temperature: of the soft labels, whose loss is multiplied by its square.
      alpha: exponent of the LogSum.
      augment: as in `kdjax.distill`.
      more_terms: further ``{name: (weight, Term)}``.
      **options: further options of `kdjax.terms.projector`.

    Returns:
      A `Method` with the terms ``hard``, ``feature`` and ``soft``. All numbers may be arrays or
      schedules of the step.

    Raises:
      TypeError: as `kdjax.distill`.
      ValueError: as `kdjax.terms.projector`.

    Example:
      >>> import kdjax as kd
      >>> student = kd.from_linen(
      ...     kd.models.resnet18(1000, small_images=False), taps={"feat": "pool"}
      ... )
      >>> teacher = kd.from_linen(
      ...     kd.models.ResNet(1000, (3, 4, 6, 3), (64, 128, 256, 512), 64, small_images=False),
      ...     taps={"feat": "pool"},
      ... )
      >>> method = kd.methods.projector_distillation.imagenet(student, teacher)
      >>> optimizer = kd.methods.projector_distillation.imagenet_optimizer(steps_per_epoch=5005)

    Reference:
      Miles, Mikolajczyk, AAAI 2024, the LogSum distance and the ImageNet table; the weights are
      those of its code.
    """
    feature = terms.projector(student_tap, teacher_tap, alpha=alpha, **options)
    return _joined(
        student,
        teacher,
        {
            "hard": (1.0, terms.hard_labels()),
            "feature": (feature_weight, feature),
            "soft": (soft_weight, terms.soft_labels(temperature=temperature)),
        },
        more_terms,
        augment,
    )


def cifar100(
    student: Model,
    teacher: Model,
    *,
    student_tap: str = "feat",
    teacher_tap: str = "feat",
    feature_weight: Number = 2.0,
    hidden: int | Sequence[int] = (1024,),
    alpha: Number = 4.0,
    augment: Augment | None = None,
    more_terms: Terms | None = None,
    **options: Any,
) -> Method:
    """The CIFAR-100 total: ``CE(labels) + feature_weight LogSum``, with an MLP as projector.

    Published is the projector's hidden width of 1024. **The weight of the LogSum and the layers of
    the projector were not published**: the weight 2 is that of ImageNet, and linear-ReLU-linear is
    what the first code held unused; both are our assumption.

    Args:
      student: taps its last features before the classifier.
      teacher: taps the same.
      student_tap: the student's output with the features.
      teacher_tap: the teacher's.
      feature_weight: weight of the LogSum (our assumption).
      hidden: widths of the projector's hidden ReLU layers; none with another ``projector=``.
      alpha: exponent of the LogSum.
      augment: as in `kdjax.distill`.
      more_terms: further ``{name: (weight, Term)}``, such as DKD, with which it was combined.
      **options: further options of `kdjax.terms.projector`.

    Returns:
      A `Method` with the terms ``hard`` and ``feature``. All numbers may be arrays or schedules of
      the step.

    Raises:
      TypeError: as `kdjax.distill`.
      ValueError: as `kdjax.terms.projector`.

    Example:
      >>> import kdjax as kd
      >>> student, teacher = (
      ...     kd.from_linen(make(100), taps={"feat": "pool"})
      ...     for make in (kd.models.resnet8x4, kd.models.resnet32x4)
      ... )
      >>> dkd = kd.terms.matching(kd.losses.dkd, labels="label", alpha=1.0, beta=8.0)
      >>> method = kd.methods.projector_distillation.cifar100(
      ...     student, teacher, more_terms={"dkd": (1.0, dkd)}
      ... )

    Reference:
      Miles, Mikolajczyk, AAAI 2024, the CIFAR-100 experiments.
    """
    if options.get("projector", "linear") != "linear":
        hidden = ()
    feature = terms.projector(student_tap, teacher_tap, alpha=alpha, hidden=hidden, **options)
    chosen = {"hard": (1.0, terms.hard_labels()), "feature": (feature_weight, feature)}
    return _joined(student, teacher, chosen, more_terms, augment)


def deit(
    student: Model,
    teacher: Model,
    *,
    student_tap: str = "patches",
    teacher_tap: str = "feat",
    class_logits: str = "class_logits",
    distillation_logits: str = "distillation_logits",
    feature_weight: Number = 1.0,
    soft_weight: Number = 1.0,
    smoothing: Number = 0.1,
    temperature: Number = 1.0,
    alpha: Number = 4.0,
    eps: Number = 0.0,
    log_eps: Number = 1e-5,
    augment: Augment | None = None,
    more_terms: Terms | None = None,
    **options: Any,
) -> Method:
    """The DeiT total, a convolutional teacher to a transformer with a distillation token.

    ``CE(head of the class token, mixed labels) + log(sum |rho - 1|^4 + 1e-5) +
    KL(teacher || head of the distillation token)``, with rho the correlations of the channels
    (`kdjax.losses.correlation_log_sum`), as the published code has it.

    Args:
      student: a vision transformer such as `kdjax.models.deit_tiny` with the three outputs below.
        What it is used with, ``logits``, is the mean of both heads.
      teacher: taps its last features before the classifier.
      student_tap: the student's patch tokens [B, N, D] after the last normalisation, without class
        and distillation token; their mean is projected.
      teacher_tap: the teacher's output with the features.
      class_logits: the student's output of the head that learns from the labels.
      distillation_logits: the student's output of the head that learns from the teacher.
      feature_weight: weight of the correlations.
      soft_weight: weight of the soft labels.
      smoothing: of the labels; 0.1 belongs to the published augmentation. 0 if they are smooth
        already.
      temperature: of the soft labels, whose loss is multiplied by its square.
      alpha: the power of ``|rho - 1|``.
      eps: added to the variances; none in the published code.
      log_eps: floor inside the logarithm.
      augment: as in `kdjax.distill`, with mixup or CutMix for labels as probabilities [B, C].
      more_terms: further ``{name: (weight, Term)}``.
      **options: further options of `kdjax.terms.projector`.

    Returns:
      A `Method` with the terms ``hard``, ``feature`` and ``soft``. All numbers may be arrays or
      schedules of the step.

    Raises:
      TypeError: as `kdjax.distill`.
      ValueError: as `kdjax.terms.projector`.

    Example:
      >>> import kdjax as kd
      >>> student = kd.from_linen(
      ...     kd.models.deit_tiny(1000),
      ...     taps={
      ...         "patches": "patches",
      ...         "class_logits": "classifier",
      ...         "distillation_logits": "distillation_classifier",
      ...     },
      ... )
      >>> teacher = kd.from_linen(
      ...     kd.models.resnet18(1000, small_images=False), taps={"feat": "pool"}
      ... )
      >>> method = kd.methods.projector_distillation.deit(student, teacher)

    Reference:
      Miles, Mikolajczyk, AAAI 2024, the DeiT experiments and their code, whose script can't run as
      it was published; H. Touvron et al., "Training data-efficient image transformers and
      distillation through attention", ICML 2021.
    """
    options = {"loss": "correlation_log_sum", **options}
    feature = terms.projector(
        student_tap, teacher_tap, alpha=alpha, eps=eps, log_eps=log_eps, **options
    )
    soft = terms.soft_labels(temperature=temperature, student=distillation_logits)
    return _joined(
        student,
        teacher,
        {
            "hard": (1.0, terms.hard_labels(smoothing=smoothing, logits=class_logits)),
            "feature": (feature_weight, feature),
            "soft": (soft_weight, soft),
        },
        more_terms,
        augment,
    )


def imagenet_optimizer(
    *,
    steps_per_epoch: int,
    learning_rate: float = 0.1,
    drops: Sequence[float] = (30, 60, 90),
    weight_decay: float = 1e-4,
    momentum: float = 0.9,
) -> optax.GradientTransformation:
    """SGD as published for ImageNet: batches of 256, 100 epochs.

    Weight decay is added to the gradient before the momentum, for all parameters, the projector's
    too.

    Args:
      steps_per_epoch: updates in an epoch.
      learning_rate: of the first epochs; a tenth after every drop.
      drops: epochs after which it drops.
      weight_decay: coefficient of the decay.
      momentum: of SGD.

    Returns:
      An optax transformation.

    Raises:
      ValueError: ``steps_per_epoch`` isn't a positive integer.

    Example:
      >>> from kdjax.methods import projector_distillation
      >>> optimizer = projector_distillation.imagenet_optimizer(steps_per_epoch=5005)

    Reference:
      Miles, Mikolajczyk, AAAI 2024, the configuration of its ImageNet code.
    """
    per_epoch = _checks.count("steps_per_epoch", steps_per_epoch)
    schedule = optax.piecewise_constant_schedule(
        learning_rate, {round(epoch * per_epoch): 0.1 for epoch in drops}
    )
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum=momentum)
    )


def cifar100_optimizer(
    *,
    steps_per_epoch: int,
    learning_rate: float = 0.05,
    drops: Sequence[float] = (150, 180, 210),
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
) -> optax.GradientTransformation:
    """SGD as published for CIFAR-100: batches of 64, 240 epochs.

    Args:
      steps_per_epoch: updates in an epoch.
      learning_rate: of the first epochs; a tenth after every drop. 0.01 was used for the students
        MobileNetV2, ShuffleNetV1 and ShuffleNetV2.
      drops: epochs after which it drops.
      weight_decay: coefficient of the decay, which is added to the gradient before the momentum.
      momentum: of SGD.

    Returns:
      An optax transformation.

    Raises:
      ValueError: ``steps_per_epoch`` isn't a positive integer.

    Example:
      >>> from kdjax.methods import projector_distillation
      >>> optimizer = projector_distillation.cifar100_optimizer(steps_per_epoch=782)

    Reference:
      Miles, Mikolajczyk, AAAI 2024, the details of the CIFAR-100 experiments.
    """
    return imagenet_optimizer(
        steps_per_epoch=steps_per_epoch,
        learning_rate=learning_rate,
        drops=drops,
        weight_decay=weight_decay,
        momentum=momentum,
    )


def deit_optimizer(
    *,
    steps_per_epoch: int,
    batch_size: int = 512,
    epochs: int = 300,
    warm_up: int = 20,
    weight_decay: float = 0.05,
    max_norm: float = 15.0,
) -> optax.GradientTransformation:
    """AdamW as published for DeiT: clipping, linear warm-up, cosine decay.

    The learning rate rises from 5e-7 towards 5e-4 in the warm-up and then follows a cosine over all
    epochs, the warm-up counted, down to 5e-6, all of them times ``batch_size / 512``. It changes
    once an epoch, as in timm, which the published code uses. Weights are decayed; biases, scales,
    positions and tokens aren't. The published code clips gradients that are still scaled for
    float16; here they are the gradients.

    Args:
      steps_per_epoch: updates in an epoch.
      batch_size: examples of an update, over all devices.
      epochs: length of training, with the warm-up.
      warm_up: epochs of warm-up, below ``epochs``.
      weight_decay: coefficient of the decoupled decay.
      max_norm: largest global norm of the gradients.

    Returns:
      An optax transformation.

    Raises:
      ValueError: a count isn't a positive integer, or the warm-up takes all epochs.

    Example:
      >>> from kdjax.methods import projector_distillation
      >>> optimizer = projector_distillation.deit_optimizer(steps_per_epoch=2502)

    Reference:
      Miles, Mikolajczyk, AAAI 2024, the configuration of its DeiT code.
    """
    per_epoch = _checks.count("steps_per_epoch", steps_per_epoch)
    scale = _checks.count("batch_size", batch_size) / 512
    total = _checks.count("epochs", epochs)
    ramp = _checks.count("warm_up", warm_up, low=0, high=total - 1)
    first, peak, last = (rate * scale for rate in (5e-7, 5e-4, 5e-6))

    def schedule(step: jax.Array) -> jax.Array:
        epoch = step // per_epoch
        rising = first + (peak - first) * epoch / max(ramp, 1)
        falling = last + (peak - last) * (1 + jnp.cos(jnp.pi * epoch / total)) / 2
        return jnp.where(epoch < ramp, rising, falling)

    return optax.chain(
        optax.clip_by_global_norm(max_norm),
        optax.adamw(schedule, weight_decay=weight_decay, mask=_decayed),
    )


def _joined(
    student: Model,
    teacher: Model,
    chosen: Terms,
    more_terms: Terms | None,
    augment: Augment | None,
) -> Method:
    more = dict(more_terms or {})
    for name in chosen:
        if name in more:
            raise ValueError(f"more_terms must not use the name {name!r}: the method has it.")
    return distill(student, teacher, {**chosen, **more}, augment=augment)


def _decayed(params: Tree) -> Tree:
    """True for weights; by name as well, since biases of attention have two dimensions in Flax."""

    def one(path: Any, x: jax.Array) -> bool:
        names = {str(getattr(key, "key", getattr(key, "name", key))) for key in path}
        return jnp.ndim(x) > 1 and not names & _UNDECAYED

    return jax.tree.map_with_path(one, params)
