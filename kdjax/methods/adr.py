"""ADR: adversarial training on labels rectified by the average of the student itself.

The teacher is the exponential moving average of the student, in evaluation mode, on the same
augmented images that the student sees. `kdjax.labels.rectify` mixes its tempered probabilities into
the labels as far as they leave the given label on top; over training the temperature falls and the
share of the teacher rises. PGD attacks the rectified labels as well; TRADES' attack sees none.

Students of ADR are strongly under-confident (CIFAR-10's recipe settles near 0.18 on the true class
of a sample that it fits perfectly): watch the metric ``rectified_true_class_mass``, which near
1 / classes says that the labels have collapsed, and set a temperature on held-out data
(`kdjax.metrics.fit_temperature`) before reading probabilities.

The published code selects the best epoch on the test set. Don't: hold out a part of the training
set.

Reference:
  Y.-Y. Wu, H.-J. Wang, S.-T. Chen, "Annealing Self-Distillation Rectification Improves Adversarial
  Training", ICLR 2024 (arXiv 2305.12118), and its published code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import optax

from kdjax import _checks, schedules
from kdjax._pairs import Method, Model, Tree
from kdjax.methods import _adversarial as parts
from kdjax.methods import _average
from kdjax.methods._adversarial import Augment, Number

__all__ = ["RECIPES", "Recipe", "adr", "adr_trades", "annealed", "averaged", "optimizer"]


class Recipe(NamedTuple):
    """Published hyperparameters of one data set; those not here are the functions' defaults.

    Attributes:
      temperature: at the start and at the end of training.
      mix: the same.
      learning_rate: of SGD with momentum 0.9, weight decay 5e-4, batches of 128.
      nesterov: whether its momentum is Nesterov's.
      epochs: length of training.
      milestones: epochs after which the learning rate falls to a tenth; none for a cosine.
      rho: of `kdjax.methods.awp.minimize_all`, or None without it.
    """

    temperature: tuple[float, float]
    mix: tuple[float, float]
    learning_rate: float
    nesterov: bool
    epochs: int
    milestones: tuple[int, ...]
    rho: float | None


def _steps(temperature: tuple[float, float], mix: tuple[float, float], rho: float | None) -> Recipe:
    return Recipe(temperature, mix, 0.1, rho is None, 200, (100, 150), rho)


def _generated(temperature: tuple[float, float], mix: tuple[float, float]) -> Recipe:
    return Recipe(temperature, mix, 0.4, False, 100, (), 0.005)


def _tiny(mix: tuple[float, float], rho: float | None) -> Recipe:
    return Recipe((2.0, 1.5), mix, 0.1, rho is None, 80, (40, 60), rho)


# With "+ddpm" every batch also holds generated images, and the network is a PreAct-ResNet-18 with
# swish; the published runs don't record how many. The Tiny-ImageNet file for ResNet-18 misspells
# its lower temperature; 1.5 is what its siblings have.
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "cifar10": _steps((2.5, 2.0), (0.70, 0.95), None),
        "cifar10+awp": _steps((2.5, 1.5), (0.70, 0.85), 0.005),
        "cifar10+ddpm": _generated((2.5, 1.5), (0.70, 0.85)),
        "cifar100": _steps((1.5, 1.0), (0.70, 0.95), None),
        "cifar100+awp": _steps((2.0, 1.0), (0.70, 0.85), 0.005),
        "cifar100+trades+awp": _steps((1.5, 1.0), (0.70, 0.95), 0.005),
        "cifar100+ddpm": _generated((3.0, 1.5), (0.50, 0.80)),
        "tiny_imagenet": _tiny((0.50, 0.90), None),
        "tiny_imagenet+awp": _tiny((0.50, 0.90), 0.001),
        "tiny_imagenet+resnet18+awp": _tiny((0.30, 0.90), 0.001),
    }
)


def adr(
    student: Model,
    *,
    temperature: Number,
    mix: Number,
    ema_decay: Number = 0.995,
    eps: Number = 8 / 255,
    step_size: Number = 2 / 255,
    augment: Augment | None = None,
    **options: Any,
) -> Method:
    """Adversarial training with rectified labels: PGD and the loss both on those.

    Args:
      student: the model that is trained.
      temperature: of the teacher's probabilities, above 0; a schedule of the step to anneal it
        (see `annealed`).
      mix: the most that the teacher counts in a label, from 0 to 1; the same. At 0 this is plain
        adversarial training.
      ema_decay: of the teacher, which is ``extra["ema"]``; also what the rows "+ WA" of the paper
        evaluate (`averaged`). It looks back over about 1 / (1 - decay) updates: 0.995 is for
        78,000 of them, and a training of a few hundred wants 0.95 or less.
      eps: radius of the attack in units of pixels.
      step_size: of the attack.
      augment: as in `kdjax.distill`; teacher and student see the same draw.
      **options: ``steps``, ``norm``, ``random_start``, ``attack_mode``, ``unroll`` of
        `kdjax.methods.adversarial.adversarial_training`.

    Returns:
      A `Method` without other teacher. Metrics: ``loss``, ``loss/adversarial``,
      ``adversarial_accuracy`` (on the given labels) and ``rectified_true_class_mass``.

    Raises:
      TypeError: the student is no `Model`; labels are mixed ones (of mixup).
      ValueError: a number out of its range, or an unknown norm or mode.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kdjax as kd
      >>> student = kd.from_linen(kd.models.MLP(10, features=(16,)))
      >>> schedule = kd.methods.adr.annealed((1.5, 1.0), (0.5, 0.9), total_steps=100)
      >>> method = kd.methods.adr.adr(student, **schedule, eps=0.1, step_size=0.025)
      >>> learner = kd.minimize(method, optax.sgd(0.1))
      >>> batch = next(iter(kd.data.digits().batches("train", 8, seed=0)))
      >>> state = learner.init(jax.random.key(0), batch)
      >>> state, metrics = jax.jit(learner.update)(state, batch)
      >>> sorted(metrics)[-1]
      'rectified_true_class_mass'

    Reference:
      Wu, Wang, Chen, ICLR 2024, equations 3 to 5 and algorithm 1, by the published code.
    """
    _check(temperature, mix, ema_decay)
    inner = parts.inner(eps=eps, step_size=step_size, **options)
    return parts.build(
        student,
        inner=inner,
        targets=parts.rectified(student, temperature, mix),
        perturb=parts.pgd_on(student, inner, parts.target_loss),
        terms=parts.on_adversarial(student),
        augment=augment,
        ema_decay=ema_decay,
    )


def adr_trades(
    student: Model,
    *,
    temperature: Number,
    mix: Number,
    beta: Number = 6.0,
    ema_decay: Number = 0.995,
    eps: Number = 8 / 255,
    step_size: Number = 2 / 255,
    forward: str = "separate",
    augment: Augment | None = None,
    **options: Any,
) -> Method:
    """TRADES whose natural term has rectified labels; its attack sees no labels at all.

    Args:
      student: as in `adr`.
      temperature: as in `adr`.
      mix: as in `adr`.
      beta: weight of the divergence.
      ema_decay: as in `adr`.
      eps: as in `adr`.
      step_size: as in `adr`.
      forward: as in `kdjax.methods.adversarial.trades`; the published code has ``"joint"``.
      augment: as in `adr`.
      **options: ``steps``, ``norm``, ``attack_mode``, ``unroll`` of
        `kdjax.methods.adversarial.adversarial_training`.

    Returns:
      A `Method` with the metrics of `kdjax.methods.adversarial.trades` and
      ``rectified_true_class_mass``.

    Raises:
      TypeError: as `adr`.
      ValueError: as `adr`.

    Example:
      >>> import kdjax as kd
      >>> student = kd.from_linen(kd.models.resnet18(100))
      >>> recipe = kd.methods.adr.RECIPES["cifar100"]
      >>> schedule = kd.methods.adr.annealed(recipe.temperature, recipe.mix, total_steps=78_000)
      >>> method = kd.methods.adr.adr_trades(student, **schedule)

    Reference:
      Wu, Wang, Chen, ICLR 2024, the published code for TRADES.
    """
    _check(temperature, mix, ema_decay)
    inner = parts.inner(eps=eps, step_size=step_size, **options)
    return parts.build(
        student,
        inner=inner,
        targets=parts.rectified(student, temperature, mix),
        perturb=parts.trades_on(student, inner),
        terms=parts.on_both(student, beta, forward),
        augment=augment,
        ema_decay=ema_decay,
    )


def annealed(
    temperature: Sequence[float],
    mix: Sequence[float],
    *,
    total_steps: int,
    any_direction: bool = False,
) -> dict[str, Any]:
    """The two schedules of ADR over a whole training, as keyword arguments of `adr`.

    ``v(t) = end + (start - end) / 2 * (1 + cos(pi * t / N))``, for every step t from 0 to N - 1,
    so that the end is approached and not quite reached; it stays there after.

    Args:
      temperature: at the start and at the end; it falls.
      mix: at the start and at the end; it rises.
      total_steps: N, the updates of the whole training.
      any_direction: allows a rising temperature or a falling mix.

    Returns:
      ``{"temperature": schedule, "mix": schedule}``.

    Raises:
      ValueError: numbers out of their range or in the wrong direction, or ``total_steps`` below 1.

    Example:
      >>> import kdjax as kd
      >>> schedule = kd.methods.adr.annealed((2.5, 2.0), (0.7, 0.95), total_steps=100)
      >>> float(schedule["temperature"](50)), round(float(schedule["mix"](50)), 4)
      (2.25, 0.825)

    Reference:
      Wu, Wang, Chen, ICLR 2024, the cosine schedules of section 4.
    """
    _checks.count("total_steps", total_steps)
    _check_pair("temperature", temperature, "fall", any_direction, above=0)
    _check_pair("mix", mix, "rise", any_direction, low=0, high=1)
    return {
        "temperature": schedules.cosine(temperature[0], temperature[1], total_steps),
        "mix": schedules.cosine(mix[0], mix[1], total_steps),
    }


def averaged(state: Any) -> tuple[Tree, Tree]:
    """The averaged student of a State, as variables ``(params, extra)``.

    Args:
      state: a `kdjax.State` of a method with ``ema_decay``.

    Returns:
      ``(params, extra)``, what `kdjax.train.evaluate` and a `Model` take.

    Raises:
      ValueError: there is no average in it.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kdjax as kd
      >>> student = kd.from_linen(kd.models.MLP(10, features=(16,)))
      >>> method = kd.methods.adr.adr(student, temperature=1.0, mix=0.5)
      >>> batch = {"image": jnp.zeros((2, 8, 8, 1)), "label": jnp.zeros(2, int)}
      >>> state = kd.minimize(method, optax.sgd(0.1)).init(jax.random.key(0), batch)
      >>> params, extra = kd.methods.adr.averaged(state)
    """
    return _average.of_state(state, "a method with ema_decay")


def optimizer(
    recipe: Recipe,
    *,
    steps_per_epoch: int,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
) -> optax.GradientTransformation:
    """The optimizer of a published recipe.

    SGD whose weight decay is added to the gradient before the momentum. The learning rate falls to
    a tenth after each milestone; with generated images it warms up linearly from 1e-6 over 2.5
    epochs and is ``lr / 2 * (1 + cos(pi t / N))`` from there, t counting from the start of
    training, and normalisation isn't decayed.

    Args:
      recipe: one of `RECIPES`, or your own.
      steps_per_epoch: updates in an epoch.
      weight_decay: on every parameter, batch norm's too unless images are generated.
      momentum: of SGD.

    Returns:
      An optax transformation.

    Raises:
      ValueError: ``steps_per_epoch`` below 1, or a negative number.

    Example:
      >>> from kdjax.methods import adr
      >>> optimizer = adr.optimizer(adr.RECIPES["cifar10"], steps_per_epoch=390)

    Reference:
      Configurations of the published code of Wu, Wang, Chen, ICLR 2024.
    """
    _checks.count("steps_per_epoch", steps_per_epoch)
    _checks.number("weight_decay", weight_decay, low=0)
    _checks.number("momentum", momentum, low=0, high=1)
    generated = not recipe.milestones
    if generated:
        rate = _warm_cosine(
            recipe.learning_rate, 2.5 * steps_per_epoch, recipe.epochs * steps_per_epoch
        )
    else:
        rate = optax.piecewise_constant_schedule(
            recipe.learning_rate, {m * steps_per_epoch: 0.1 for m in recipe.milestones}
        )
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=_not_normalised if generated else None),
        optax.sgd(rate, momentum=momentum, nesterov=recipe.nesterov),
    )


def _warm_cosine(peak: float, warm: float, total: int) -> optax.Schedule:
    """The value that the published code uses at step s: that of its schedule at s - 1."""

    def schedule(step: Any) -> jax.Array:
        t = jax.numpy.maximum(jax.numpy.asarray(step, jax.numpy.float32) - 1, 0)
        cosine = peak / 2 * (1 + jax.numpy.cos(jax.numpy.pi * t / total))
        return jax.numpy.where(t < warm, 1e-6 + (peak - 1e-6) * t / warm, cosine)

    return schedule


def _not_normalised(params: Tree) -> Tree:
    """True for arrays that aren't scales or biases of a normalisation: those have a "scale"."""

    def one(tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return True
        if "scale" in tree:
            return dict.fromkeys(tree, False)
        return {name: one(value) for name, value in tree.items()}

    return one(params)


def _check_pair(name: str, pair: Any, direction: str, any_direction: bool, **bounds: Any) -> None:
    if not hasattr(pair, "__len__") or len(pair) != 2:
        raise ValueError(f"{name} must be a pair (start, end), got {_checks.describe(pair)}.")
    start, end = (_checks.number(name, value, **bounds) for value in pair)
    if not any_direction and (start > end if direction == "rise" else start < end):
        raise ValueError(
            f"{name} must {direction} over training (any_direction=True lets it be), got {pair!r}."
        )


def _check(temperature: Number, mix: Number, ema_decay: Number) -> None:
    parts.checked("temperature", temperature, above=0)
    parts.checked("mix", mix, low=0, high=1)
    if ema_decay is None:
        raise ValueError("ema_decay must be a number from 0 to 1 or a schedule, got None.")
