"""What every adversarial training is made of: labels, an attack, a loss, an average of the weights.

`build` joins them to a Method. Labels and attack are computed in ``prepare`` and go into the batch
as ``target`` and ``adversarial``; the loss reads them there, so that no gradient can reach either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import _checks, _mesh_axis, attacks, labels, losses
from kdjax._pairs import Batch, Method, Model, Outputs, Part, Schedule, Tree
from kdjax._parts import accuracy_of, finite_padding, part_of
from kdjax.core import from_parts

Number = float | jax.Array | Schedule
Augment = Callable[[jax.Array, Batch], Batch]
# (logits [B, C], images, batch) -> [B], what the attack maximises.
AttackLoss = Callable[[jax.Array, jax.Array, Batch], jax.Array]
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


def inner(
    *,
    eps: Number = 8 / 255,
    step_size: Number = 2 / 255,
    steps: int = 10,
    norm: str = "linf",
    random_start: bool = True,
    attack_mode: str = "eval",
    unroll: bool | None = None,
) -> Inner:
    """Checked options of the attack."""
    checked("eps", eps, low=0)
    checked("step_size", step_size, low=0)
    _checks.count("steps", steps, low=0)
    _checks.choice("norm", norm, ("linf", "l2"))
    _checks.choice("attack_mode", attack_mode, MODES)
    return Inner(eps, step_size, steps, norm, random_start, attack_mode, unroll)


def checked(name: str, value: Any, **bounds: Any) -> None:
    """Refuses a number out of range at once; arrays in a trace and schedules come later."""
    if not callable(value):
        _checks.number(name, value, **bounds)


def at(value: Any, step: jax.Array) -> Any:
    """A hyperparameter's value at a step: a schedule's, or the number itself."""
    return value(step) if callable(value) else value


def build(
    student: Model,
    *,
    inner: Inner,
    targets: Callable[[Call, jax.Array], Batch],
    perturb: Callable[[Call, jax.Array], tuple[jax.Array, Tree]],
    terms: Callable[[Call], tuple[dict[str, Any], dict[str, Outputs], Tree]],
    augment: Augment | None,
    ema_decay: Number | None,
) -> Method:
    """A Method that trains a student on adversarial examples.

    Args:
      student: the model that is trained.
      inner: options of the attack.
      targets: ``(call, natural images) -> entries for the batch``, before the attack.
      perturb: ``(call, natural images) -> (adversarial images, student's state)``.
      terms: ``(call) -> ({name: (weight, values or (values, weights))}, {accuracy's name: student
        outputs}, student's state)``.
      augment: as in `kdjax.distill`.
      ema_decay: of the averaged student in ``extra["ema"]``, or None for no average.
    """
    if not isinstance(student, Model):
        raise TypeError(
            "student must be a kdjax.Model; wrap it with kdjax.from_linen, from_nnx or from_fn, "
            f"got {_checks.describe(student)}."
        )
    if augment is not None and not callable(augment):
        raise TypeError(
            f"augment must be a function (key, batch) -> batch, got {_checks.describe(augment)}."
        )
    if ema_decay is not None:
        checked("ema_decay", ema_decay, low=0, high=1)

    def init(key: jax.Array, batch: Batch, frozen: Tree = None) -> tuple[Tree, Tree]:
        if augment is not None:  # which may change shapes and entries
            shapes = jax.eval_shape(augment, key, batch)
            batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        params, extra = student.init(key, student.read(batch))
        kept = {"student": extra}
        if ema_decay is not None:
            kept["ema"] = jax.tree.map(jnp.copy, {"params": params, "extra": extra})
        return {"student": params}, kept

    def prepare(
        params: Tree,
        extra: Tree,
        batch: Batch,
        frozen: Tree = None,
        *,
        step: jax.Array,
        key: jax.Array,
        axis_name: str | None = None,
    ) -> Batch:
        augment_key, attack_key = jax.random.split(key)
        if augment is not None:
            batch = augment(augment_key, batch)
        batch = finite_padding(batch)
        images = student.read(batch)
        call = Call(params, extra, batch, frozen, step, attack_key, axis_name)
        batch = {**batch, **targets(call, images)}
        adversarial, state = perturb(call._replace(batch=batch), images)
        batch["adversarial"] = adversarial
        return {**batch, "attack_extra": state} if inner.mode == "batch_update" else batch

    def parts(
        params: Tree,
        extra: Tree,
        batch: Batch,
        frozen: Tree = None,
        *,
        step: jax.Array,
        key: jax.Array,
        axis_name: str | None = None,
    ) -> tuple[dict[str, Part], tuple[Tree, dict[str, Part]]]:
        if axis_name is not None:  # otherwise all devices would drop the same units
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        start = batch["attack_extra"] if inner.mode == "batch_update" else extra["student"]
        call = Call(params, {**extra, "student": start}, batch, frozen, step, key, axis_name)
        found, outputs, state = terms(call)
        summed = {
            name: part_of(name, weight, values, False, batch, axis_name)
            for name, (weight, values) in found.items()
        }
        tracked = _mass(batch, axis_name)
        for name, out in outputs.items():
            seen = accuracy_of(out, batch)
            tracked |= {name: seen["accuracy"]} if seen else {}
        return summed, ({**extra, "student": state}, tracked)

    def after(
        params: Tree,
        extra: Tree,
        batch: Batch,
        frozen: Tree = None,
        *,
        step: jax.Array,
        key: jax.Array,
        axis_name: str | None = None,
    ) -> Tree:
        now = {"params": params["student"], "extra": extra["student"]}
        return {**extra, "ema": averaged(extra["ema"], now, at(ema_decay, step))}

    method = from_parts(
        init, parts, prepare=prepare, after=after if ema_decay is not None else None
    )
    # The state that the attack has moved is one for the whole batch: it has no slices.
    return method._replace(parts=None) if inner.mode == "batch_update" else method


def averaged(average: Tree, now: Tree, decay: Any) -> Tree:
    """``decay * average + (1 - decay) * now``, also of batch statistics; counters are copied."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return b
        share = jnp.asarray(decay, a.dtype)
        return share * a + (1 - share) * b

    return jax.tree.map(one, average, now)


def hot(batch: Batch, classes: int, dtype: Any) -> jax.Array:
    """The batch's labels as probabilities [B, C]; a row of zeros where there is none."""
    label = jnp.asarray(_checks.entry("batch", batch, "label"))
    if jnp.issubdtype(label.dtype, jnp.floating):  # mixed labels
        return label.astype(dtype)
    return labels.smooth(label, classes, smoothing=jnp.zeros((), dtype))


def classes_of(student: Model, call: Call, images: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape and dtype of the student's logits, without running it."""
    variables = call.params["student"], call.extra["student"]
    found = jax.eval_shape(lambda p, e: student.apply(p, e, images, train=False)[0], *variables)
    return found["logits"]


def one_hot(student: Model) -> Callable[[Call, jax.Array], Batch]:
    """``targets`` of plain adversarial training."""

    def targets(call: Call, images: jax.Array) -> Batch:
        logits = classes_of(student, call, images)
        dtype = jnp.promote_types(logits.dtype, jnp.float32)
        return {"target": hot(call.batch, logits.shape[-1], dtype)}

    return targets


def rectified(student: Model, temperature: Number, mix: Number) -> Callable[..., Batch]:
    """``targets`` of ADR: labels rectified by the average of the student, on the same images."""

    def targets(call: Call, images: jax.Array) -> Batch:
        label = jnp.asarray(_checks.entry("batch", call.batch, "label"))
        teacher = call.extra["ema"]
        outputs, _ = student.apply(teacher["params"], teacher["extra"], images, train=False)
        target = labels.rectify(
            outputs["logits"], label, temperature=at(temperature, call.step), mix=at(mix, call.step)
        )
        classes = jnp.clip(label, 0)[:, None].astype(jnp.int32)
        mass = jnp.take_along_axis(target, classes, axis=-1, mode="clip")[:, 0]
        return {"target": target, "true_class_mass": mass}

    return targets


def pgd_on(student: Model, inner: Inner, loss: AttackLoss) -> Callable[..., Any]:
    """``perturb`` by PGD on any loss of the student's logits."""

    def perturb(call: Call, images: jax.Array) -> tuple[jax.Array, Tree]:
        apply, state = _attacked(student, inner, call)

        def values(x: jax.Array, state: Tree) -> tuple[jax.Array, Tree]:
            logits, state = apply(x, state)
            return loss(logits, x, call.batch), state

        return attacks.stateful_pgd(
            values,
            images,
            state,
            step_size=at(inner.step_size, call.step),
            **_options(inner, call, images, start=inner.random_start),
        )

    return perturb


def trades_on(student: Model, inner: Inner) -> Callable[..., Any]:
    """``perturb`` by the attack of TRADES, which sees no labels."""

    def perturb(call: Call, images: jax.Array) -> tuple[jax.Array, Tree]:
        apply, state = _attacked(student, inner, call)
        return attacks.stateful_trades_attack(
            apply,
            images,
            state,
            step_size=at(inner.step_size, call.step),
            **_options(inner, call, images, start=True),
        )

    return perturb


def target_loss(logits: jax.Array, images: jax.Array, batch: Batch) -> jax.Array:
    """Cross-entropy with the batch's targets: what PGD maximises, and training minimises."""
    return losses.hard_label_cross_entropy(logits, batch["target"])


def on_target(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The values of `target_loss`, and which rows have a target."""
    known = batch["target"].sum(-1) > 0
    return losses.hard_label_cross_entropy(logits, batch["target"]), known.astype(jnp.float32)


def on_adversarial(student: Model) -> Callable[[Call], Any]:
    """``terms`` of adversarial training."""

    def terms(call: Call) -> Any:
        outputs, state = forward(student, call, call.batch["adversarial"])
        values = on_target(outputs["logits"], call.batch)
        return {"adversarial": (1.0, values)}, {"adversarial_accuracy": outputs}, state

    return terms


def on_both(student: Model, beta: Number, how: str) -> Callable[[Call], Any]:
    """``terms`` of TRADES."""
    checked("beta", beta, low=0)
    _checks.choice("forward", how, ("joint", "separate"))

    def terms(call: Call) -> Any:
        batch = call.batch
        images = jnp.asarray(student.read(batch)).astype(batch["adversarial"].dtype)
        if how == "joint":
            both = jnp.concatenate([images, batch["adversarial"]])
            outputs, state = forward(student, call, both)
            natural, moved = jnp.split(outputs["logits"], 2)
        else:
            outputs, state = forward(student, call, images)
            natural = outputs["logits"]
            later = call._replace(
                extra={**call.extra, "student": state}, key=jax.random.fold_in(call.key, 1)
            )
            outputs, state = forward(student, later, batch["adversarial"])
            moved = outputs["logits"]
        found = {
            "natural": (1.0, on_target(natural, batch)),
            "robust": (at(beta, call.step), losses.trades_kl(moved, natural)),
        }
        seen = {"accuracy": {"logits": natural}, "adversarial_accuracy": {"logits": moved}}
        return found, seen, state

    return terms


def forward(student: Model, call: Call, images: jax.Array) -> tuple[Outputs, Tree]:
    """The student in training mode."""
    return student.apply(
        call.params["student"], call.extra["student"], images, train=True, key=call.key
    )


def _attacked(student: Model, inner: Inner, call: Call) -> tuple[Callable[..., Any], Tree]:
    """``(images, state) -> (logits, state)`` of the student under attack, and its first state."""
    params, extra = call.params["student"], call.extra["student"]
    moves = inner.mode == "batch_update"
    if moves and call.axis_name is not None and _mesh_axis.tracks(call.axis_name):
        extra = _mesh_axis.vary(extra, call.axis_name)  # a loop's state varies from the start

    def apply(x: jax.Array, state: Tree) -> tuple[jax.Array, Tree]:
        if moves:
            outputs, state = student.apply(params, state, x, train=True, key=call.key)
        else:
            train = inner.mode == "batch_frozen"
            key = call.key if train else None
            outputs, _ = student.apply(params, extra, x, train=train, key=key)
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


def _mass(batch: Mapping[str, Any], axis_name: str | None) -> dict[str, Part]:
    """The mean probability that rectified labels leave to the given class."""
    if "true_class_mass" not in batch:
        return {}
    known = (jnp.asarray(batch["label"]) != -1).astype(jnp.float32)
    values = (batch["true_class_mass"], known)
    name = "rectified_true_class_mass"
    return {name: part_of(name, 1.0, values, False, batch, axis_name)}
