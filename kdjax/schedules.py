"""Schedules of temperatures and weights that optax lacks: functions from the step to a value.

Any optax schedule serves as well, and the other way round. optax has: constant
(``constant_schedule``), straight line (``linear_schedule``, which is also a warm-up of a constant
weight), steps (``piecewise_constant_schedule``), exponential (``exponential_decay``), cosine decay
of one value towards a fraction of it (``cosine_decay_schedule``), and one schedule after another
(``join_schedules``, which restarts the clock of each). Here are a cosine between any two values
and the ramps of consistency and decoupled distillation. Steps count from 0; a paper's epochs are
steps divided by the steps per epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks

__all__ = ["cosine", "sigmoid_ramp_up", "warm_up"]

Schedule = Callable[[ArrayLike], jax.Array]


def cosine(start: ArrayLike, end: ArrayLike, steps: ArrayLike, *, begin: ArrayLike = 0) -> Schedule:
    """Half a cosine wave from one value to another, up or down.

        v(t) = end + (start - end) / 2 * (1 + cos(pi * u)),   u = clip((t - begin) / steps, 0, 1)

    With ``begin=0`` and ``steps`` the whole run, this is how ADR anneals its temperature (2.5 to
    2.0, say) and its interpolation factor (0.7 to 0.95); ``end`` is reached one step after the run.

    Args:
        start: value up to step ``begin``, a finite scalar.
        end: value from step ``begin + steps`` on, a finite scalar.
        steps: how long the transition takes, a finite scalar above 0.
        begin: the step at which it starts, a finite scalar of at least 0.

    Returns:
        A schedule: step (scalar or array) -> value of the step's shape, float32.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of its range.

    Example:
        >>> from kdjax import schedules
        >>> temperature = schedules.cosine(4.0, 1.0, 1000)
        >>> [round(float(temperature(t)), 4) for t in (0, 500, 1000, 2000)]
        [4.0, 2.5, 1.0, 1.0]

    Reference:
        Y.-Y. Wu, H.-J. Wang, S.-T. Chen, "Annealing Self-Distillation Rectification Improves
        Adversarial Training", ICLR 2024, section 4.
    """
    start, end = _number("start", start), _number("end", end)
    steps, begin = _number("steps", steps, above=0), _number("begin", begin, low=0)

    def schedule(step: ArrayLike) -> jax.Array:
        remaining = 0.5 * (1 + jnp.cos(jnp.pi * _share(step, steps, begin)))
        return end + (start - end) * remaining

    return schedule


def sigmoid_ramp_up(end: ArrayLike, steps: ArrayLike, *, sharpness: ArrayLike = 5.0) -> Schedule:
    """The ramp of consistency weights: slow at first, then to its end value.

        w(t) = end * exp(-sharpness * (1 - u)^2),   u = clip(t / steps, 0, 1)

    For terms that trust a teacher which is itself still learning (temporal ensembling, mean
    teacher). It starts at end * exp(-sharpness), 0.0067 * end by default, not at 0.

    Args:
        end: value from ``steps`` on, a finite scalar.
        steps: length of the ramp, a finite scalar above 0. The papers take 80 epochs.
        sharpness: a finite scalar of at least 0; 5 in the papers.

    Returns:
        A schedule: step (scalar or array) -> value of the step's shape, float32.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of its range.

    Example:
        >>> from kdjax import schedules
        >>> weight = schedules.sigmoid_ramp_up(1.0, 100)
        >>> [round(float(weight(t)), 4) for t in (0, 50, 100, 200)]
        [0.0067, 0.2865, 1.0, 1.0]

    Reference:
        S. Laine, T. Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017,
        section 2.1; A. Tarvainen, H. Valpola, "Mean Teachers are Better Role Models",
        NeurIPS 2017.
    """
    end, steps = _number("end", end), _number("steps", steps, above=0)
    sharpness = _number("sharpness", sharpness, low=0)

    def schedule(step: ArrayLike) -> jax.Array:
        return end * jnp.exp(-sharpness * (1 - _share(step, steps)) ** 2)

    return schedule


def warm_up(value: ArrayLike | Callable[[Any], Any], steps: ArrayLike) -> Schedule:
    """A straight ramp multiplied into another schedule, which keeps its own clock.

        w(t) = min(t / steps, 1) * value(t)

    DKD's 20-epoch warm-up of its whole loss (mdistiller: min(epoch / 20, 1), constant within an
    epoch), for a weight that may itself be annealed. ``optax.join_schedules`` would restart the
    second schedule when the warm-up ends.

    Args:
        value: a finite scalar, or a schedule (any function of the step).
        steps: length of the ramp, a finite scalar above 0.

    Returns:
        A schedule: step (scalar or array) -> value of the step's shape, float32.

    Raises:
        TypeError: ``value`` is neither a number nor callable.
        ValueError: ``steps`` is not above 0.

    Example:
        >>> from kdjax import schedules
        >>> weight = schedules.warm_up(2.0, 20)
        >>> [float(weight(t)) for t in (0, 10, 20, 100)]
        [0.0, 1.0, 2.0, 2.0]

    Reference:
        B. Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022 (its code's DKD.WARMUP).
    """
    steps = _number("steps", steps, above=0)
    constant = jnp.zeros(()) if callable(value) else _number("value", value)

    def schedule(step: ArrayLike) -> jax.Array:
        level = value(step) if callable(value) else constant
        return _share(step, steps) * level

    return schedule


def _share(step: ArrayLike, steps: jax.Array, begin: jax.Array | float = 0) -> jax.Array:
    """How much of the transition is over, from 0 to 1."""
    step = jnp.asarray(step)
    elapsed = step.astype(jnp.promote_types(step.dtype, jnp.float32)) - begin
    return jnp.clip(elapsed / steps, 0, 1)


def _number(
    name: str, value: Any, *, low: float | None = None, above: float | None = None
) -> jax.Array:
    return jnp.asarray(_checks.number(name, value, low=low, above=above), jnp.float32)
