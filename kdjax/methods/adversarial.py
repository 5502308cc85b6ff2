"""Adversarial training: PGD-AT and TRADES, each with an averaged copy of the weights if wanted.

Images are floating point in [0, 1]; normalisation belongs inside the model, so that ``eps`` is in
units of pixels. Labels and attack are computed before the loss (``Method.prepare``) and stand in
the prepared batch as ``target`` and ``adversarial``; a batch entry ``noise`` [B, ...] replaces the
random start of the attack. Random starts belong to the image (``batch["index"]``), so that one
device and several draw the same.

Reference:
  A. Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018.
  H. Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks, attacks, losses
from kdjax._pairs import Method, Model, State
from kdjax.methods import _adversarial as parts
from kdjax.methods._adversarial import Augment, Number

__all__ = ["adversarial_training", "evaluator", "trades"]


def adversarial_training(
    student: Model,
    *,
    eps: Number = 8 / 255,
    step_size: Number = 2 / 255,
    steps: int = 10,
    norm: str = "linf",
    random_start: bool = True,
    attack_mode: str = "eval",
    ema_decay: Number | None = None,
    augment: Augment | None = None,
    unroll: bool | None = None,
) -> Method:
    """Training on the worst images that PGD finds: ``min mean max_{|d| <= eps} CE(f(x + d), y)``.

    Args:
      student: the model that is trained.
      eps: radius of the attack in units of pixels.
      step_size: of the attack.
      steps: of the attack; its last iterate is trained on.
      norm: "linf" or "l2".
      random_start: whether the attack starts at random in its ball, or at the image.
      attack_mode: how batch norm behaves under attack: ``"eval"``, with its running statistics;
        ``"batch_frozen"``, with those of the batch, the running ones left alone; or
        ``"batch_update"``, where every pass of the attack moves the running statistics as well (as
        much published code does; it can't be split into microbatches).
      ema_decay: decay of an average of the student's parameters and batch statistics, kept in
        ``extra["ema"]`` as ``{"params", "extra"}`` (weight averaging); 0.995 is usual. None keeps
        none. May be a schedule of the step.
      augment: as in `kdjax.distill`; it comes before the attack.
      unroll: whether the attack's loop is unrolled, as in `kdjax.attacks.pgd`.

    Returns:
      A `Method` without teacher. Numbers may be arrays or schedules of the step. Its metrics are
      ``loss``, ``loss/adversarial`` and ``adversarial_accuracy`` of the student in training mode.
      Rows of label -1 don't count; floating labels [B, C] are taken as probabilities.

    Raises:
      TypeError: the student is no `Model`.
      ValueError: a number out of its range, or an unknown norm or mode.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kdjax as kd
      >>> student = kd.from_linen(kd.models.MLP(10, features=(16,)))
      >>> method = kd.methods.adversarial.adversarial_training(student, eps=0.1, step_size=0.025)
      >>> learner = kd.minimize(method, optax.sgd(0.1))
      >>> batch = next(iter(kd.data.digits().batches("train", 8, seed=0)))
      >>> state = learner.init(jax.random.key(0), batch)
      >>> state, metrics = jax.jit(learner.update)(state, batch)
      >>> sorted(metrics)
      ['adversarial_accuracy', 'loss', 'loss/adversarial']

    Reference:
      Madry et al., ICLR 2018, equation 2.1.
    """
    inner = parts.inner(
        eps=eps, step_size=step_size, steps=steps, norm=norm, random_start=random_start,
        attack_mode=attack_mode, unroll=unroll,
    )  # fmt: skip
    return parts.build(
        student,
        inner=inner,
        targets=parts.one_hot(student),
        perturb=parts.pgd_on(student, inner, parts.target_loss),
        terms=parts.on_adversarial(student),
        augment=augment,
        ema_decay=ema_decay,
    )


def trades(
    student: Model,
    *,
    beta: Number = 6.0,
    eps: Number = 0.031,
    step_size: Number = 0.007,
    forward: str = "separate",
    ema_decay: Number | None = None,
    augment: Augment | None = None,
    **options: Any,
) -> Method:
    """TRADES: natural accuracy, and outputs that stay where they are under attack.

    ``mean CE(f(x), y) + beta * mean KL(softmax f(x) || softmax f(x_adv))``, where x_adv maximises
    the divergence. The gradient flows through both sides of it.

    Args:
      student: the model that is trained.
      beta: weight of the divergence.
      eps: radius of the attack in units of pixels.
      step_size: of the attack.
      forward: ``"separate"``, the model on natural and then on perturbed images, each with its own
        batch statistics (the paper's code, which runs the natural pass twice and so moves running
        statistics once more); ``"joint"``, one pass over both.
      ema_decay: as in `adversarial_training`.
      augment: as in `adversarial_training`.
      **options: ``steps``, ``norm``, ``attack_mode``, ``unroll`` of `adversarial_training`. With
        the norm "l2" the paper takes steps of ``2 * eps / steps``.

    Returns:
      A `Method` without teacher. Its metrics are ``loss``, ``loss/natural``, ``loss/robust``,
      ``accuracy`` and ``adversarial_accuracy``. Rows of label -1 count in the divergence only.

    Raises:
      TypeError: the student is no `Model`.
      ValueError: a number out of its range, or an unknown norm, mode or ``forward``.

    Example:
      >>> import kdjax as kd
      >>> student = kd.from_linen(kd.models.resnet18(10))
      >>> method = kd.methods.adversarial.trades(student, ema_decay=0.995)

    Reference:
      Zhang et al., ICML 2019, equation 5 and algorithm 1.
    """
    inner = parts.inner(eps=eps, step_size=step_size, **options)
    return parts.build(
        student,
        inner=inner,
        targets=parts.one_hot(student),
        perturb=parts.trades_on(student, inner),
        terms=parts.on_both(student, beta, forward),
        augment=augment,
        ema_decay=ema_decay,
    )


def evaluator(
    student: Model,
    images: ArrayLike,
    labels: ArrayLike,
    *,
    eps: float = 8 / 255,
    step_size: float | None = None,
    steps: int = 10,
    norm: str = "linf",
    average: bool = False,
    seed: int = 0,
) -> Callable[[State], dict[str, float]]:
    """Clean and robust accuracy on held-out images, for ``evaluate=`` of `kdjax.train.fit`.

    With ``best="robust_accuracy"`` the loop keeps the checkpoint that PGD hurts least. Hold the
    images out of the training set: selecting on the test set overstates robustness.

    Args:
      student: the model that is trained.
      images: [N, ...] floating point in [0, 1], all attacked at once.
      labels: [N] integer class indices.
      eps: radius of the attack in units of pixels.
      step_size: of the attack; a quarter of eps by default.
      steps: of the attack, from a random start which is the same every time.
      norm: "linf" or "l2".
      average: whether to evaluate the averaged student (``ema_decay``) in place of the student.
      seed: of the random start.

    Returns:
      ``State -> {"accuracy", "robust_accuracy"}``, compiled once. What isn't finite is wrong.

    Raises:
      ValueError: images outside [0, 1], shapes that do not fit, or a number out of its range.

    Example:
      >>> import kdjax as kd
      >>> student = kd.from_linen(kd.models.MLP(10, features=(16,)))
      >>> held_out = next(iter(kd.data.digits().once("validation", 32)))
      >>> evaluate = kd.methods.adversarial.evaluator(
      ...     student, held_out["image"], held_out["label"], eps=0.1
      ... )  # kd.train.fit(..., evaluate=evaluate, eval_every=100, best="robust_accuracy")

    Reference:
      L. Rice, E. Wong, Z. Kolter, "Overfitting in Adversarially Robust Deep Learning", ICML 2020,
      section 5 (early stopping on held-out robust accuracy).
    """
    parts.check_model("student", student)
    x = jnp.asarray(images)
    y = _checks.integer("labels", labels)
    _checks.shape("labels", y, x.shape[:1], "(one per image)")
    step = eps / 4 if step_size is None else step_size
    attacks.pgd(lambda z: jnp.zeros(len(z)), x, eps=eps, step_size=step, steps=0, norm=norm)

    @jax.jit
    def measure(variables: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        def logits(z: jax.Array) -> jax.Array:
            found: jax.Array = student.apply(*variables, z, train=False)[0]["logits"]
            return found

        def right(z: jax.Array) -> jax.Array:
            found = logits(z)
            return (found.argmax(-1) == y) & jnp.isfinite(found).all(-1)

        moved = attacks.pgd(
            lambda z: losses.hard_label_cross_entropy(logits(z), y),
            x,
            eps=eps,
            step_size=step,
            steps=steps,
            norm=norm,
            key=jax.random.key(seed),
        )
        clean = right(x)
        return clean.mean(), (clean & right(moved)).mean()

    def evaluate(state: State) -> dict[str, float]:
        if average and "ema" not in state.extra:
            raise ValueError("average must be False for a state without one (ema_decay=None).")
        of = state.extra["ema"] if average else None
        variables = (
            (state.params["student"], state.extra["student"])
            if of is None
            else (of["params"], of["extra"])
        )
        clean, robust = measure(variables, x, y)
        return {"accuracy": float(clean), "robust_accuracy": float(robust)}

    return evaluate
