"""The attack inside an adversarial update: a Method's ``perturb``, by PGD or TRADES' attack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import _checks, _mesh_axis, attacks
from kdjax._pairs import Batch, Model, Schedule, Tree
from kdjax.attacks import _inputs as attack_inputs

Number = float | jax.Array | Schedule
# Folded into the attack's key; images fold their index, which is never so large.
_DROPOUT = 2**32 - 1
MODES = ("eval", "batch_frozen", "batch_update")


class Inner(NamedTuple):
    """The inner maximisation: an attack on the student in training."""

    eps: Number
    step_size: Number
    steps: int
    norm: str
    random_start: bool
    mode: str
    unroll: bool | None


class Call(NamedTuple):
    """What a hook of a Method gets, for the functions that it is made of."""

    params: Tree
    extra: Tree
    batch: Batch
    frozen: Tree
    step: jax.Array
    key: jax.Array
    axis_name: str | None


# (logits [B, C], images, call) -> [B], what the attack maximises.
AttackLoss = Callable[[jax.Array, jax.Array, Call], jax.Array]


def inner(
    *,
    eps: Number = 8 / 255,
    step_size: Number = 2 / 255,
    steps: int = 10,
    norm: str = "linf",
    random_start: bool = True,
    attack_mode: str = "eval",
    unroll: bool | None = None,
    **unknown: Any,
) -> Inner:
    """Checked options of the attack."""
    if unknown:
        raise TypeError(
            f"{next(iter(unknown))} is no option of this method; those of its attack are eps, "
            "step_size, steps, norm, random_start, attack_mode and unroll."
        )
    checked("eps", eps, low=0)
    if not callable(eps):
        attack_inputs.check_radius(eps, norm)
    checked("step_size", step_size, low=0)
    _checks.count("steps", steps, low=0)
    _checks.choice("norm", norm, ("linf", "l2"))
    _checks.choice("attack_mode", attack_mode, MODES)
    for name, value in (("random_start", random_start), ("unroll", unroll)):
        if not isinstance(value, bool) and not (name == "unroll" and value is None):
            raise TypeError(f"{name} must be True or False, got {_checks.describe(value)}.")
    return Inner(eps, step_size, steps, norm, random_start, attack_mode, unroll)


def checked(name: str, value: Any, **bounds: Any) -> None:
    """Refuses a number out of range at once; arrays in a trace and schedules come later."""
    if not callable(value):
        _checks.number(name, value, **bounds)


def at(value: Any, step: jax.Array) -> Any:
    """A hyperparameter's value at a step: a schedule's, or the number itself."""
    return value(step) if callable(value) else value


def pgd_on(student: Model, inner: Inner, loss: AttackLoss) -> Callable[..., Any]:
    """``perturb`` by PGD on any loss of the student's logits."""

    def perturb(call: Call, images: jax.Array) -> tuple[jax.Array, Tree]:
        apply, state = _attacked(student, inner, call)

        def values(x: jax.Array, state: Tree) -> tuple[jax.Array, Tree]:
            logits, state = apply(x, state)
            return loss(logits, x, call), state

        return attacks.stateful_pgd(
            values,
            images,
            state,
            step_size=at(inner.step_size, call.step),
            **_options(inner, call, images, start=inner.random_start),
        )

    return perturb


def trades_on(student: Model, inner: Inner, *, against: str | None = None) -> Callable[..., Any]:
    """``perturb`` by the attack of TRADES, which sees no labels.

    It moves away from the student's natural outputs, or from the logits in the batch entry
    ``against``.
    """
    if not inner.random_start:
        raise ValueError("random_start must be True with this attack, which starts beside x.")

    def perturb(call: Call, images: jax.Array) -> tuple[jax.Array, Tree]:
        apply, state = _attacked(student, inner, call)
        return attacks.stateful_trades_attack(
            apply,
            images,
            state,
            step_size=at(inner.step_size, call.step),
            natural_logits=None if against is None else call.batch[against],
            **_options(inner, call, images, start=True),
        )

    return perturb


def _attacked(student: Model, inner: Inner, call: Call) -> tuple[Callable[..., Any], Tree]:
    """``(images, state) -> (logits, state)`` of the student under attack, and its first state."""
    params, extra = call.params["student"], call.extra["student"]
    moves = inner.mode == "batch_update"
    if moves and call.axis_name is not None and _mesh_axis.tracks(call.axis_name):
        extra = _mesh_axis.vary(extra, call.axis_name)  # a loop's state varies from the start
    # One draw of dropout for all steps of the attack; of its own, and another on every device.
    key = jax.random.fold_in(call.key, _DROPOUT)
    if call.axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(call.axis_name))

    def apply(x: jax.Array, state: Tree) -> tuple[jax.Array, Tree]:
        if moves:
            outputs, state = student.apply(params, state, x, train=True, key=key)
        else:
            train = inner.mode == "batch_frozen"
            outputs, _ = student.apply(params, extra, x, train=train, key=key if train else None)
        return outputs["logits"], state

    return apply, extra if moves else ()


def _options(inner: Inner, call: Call, images: jax.Array, *, start: bool) -> dict[str, Any]:
    noise = call.batch.get("noise")
    key = _keys(call, images.shape[0]) if start and noise is None else None
    return {
        "eps": at(inner.eps, call.step),
        "steps": inner.steps,
        "norm": inner.norm,
        "noise": noise,
        "key": key,
        "unroll": inner.unroll,
    }


def _keys(call: Call, count: int) -> jax.Array:
    """One key per image, by its place in the data set, or in the batch of all devices."""
    index = call.batch.get("index")
    if index is None:
        index = jnp.arange(count)
        if call.axis_name is not None:
            index += count * jax.lax.axis_index(call.axis_name)
    return jax.vmap(jax.random.fold_in, (None, 0))(call.key, index)
