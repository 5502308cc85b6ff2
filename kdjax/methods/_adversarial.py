"""What every adversarial training is made of: labels, an attack, a loss, an average of the weights.

`build` joins them to a Method. Labels and attack are computed in ``prepare`` and go into the batch
as ``target`` and ``adversarial``; the loss reads them there, so that no gradient can reach either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import _checks, labels, losses
from kdjax._pairs import Batch, Method, Model, Outputs, Part, Tree
from kdjax._parts import accuracy_of, finite_padding, part_of
from kdjax._teachers import check_variables, teach
from kdjax.attacks import _inputs as attack_inputs
from kdjax.core import from_parts
from kdjax.methods import _average
from kdjax.methods._inner_attack import Call, Inner, Number, at, checked, inner, pgd_on, trades_on

__all__ = [
    "Augment", "Call", "Number", "at", "both", "build", "check_model", "checked",
    "forward", "inner", "on_adversarial", "on_both", "on_target", "one_hot", "pgd_on", "rectified",
    "seen_on_both", "target_loss", "trades_on",
]  # fmt: skip

Augment = Callable[[jax.Array, Batch], Batch]


def check_model(name: str, model: Any) -> None:
    """Refuses what is no `Model`."""
    if not isinstance(model, Model):
        raise TypeError(
            f"{name} must be a kdjax.Model; wrap it with kdjax.from_linen, from_nnx or from_fn, "
            f"got {_checks.describe(model)}."
        )


def build(
    student: Model,
    *,
    inner: Inner,
    targets: Callable[[Call, jax.Array], Batch],
    perturb: Callable[[Call, jax.Array], tuple[jax.Array, Tree]],
    terms: Callable[[Call], tuple[dict[str, Any], dict[str, Outputs], Tree]],
    augment: Augment | None,
    ema_decay: Number | None,
    teacher: Model | None = None,
    answers: Callable[[Call, jax.Array], Batch] | None = None,
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
      teacher: of a distillation, whose logits of the natural images come into the batch first, as
        ``teacher_logits``; its variables are ``frozen``.
      answers: ``(call, adversarial images) -> entries for the batch``, after the attack.
    """
    check_model("student", student)
    if teacher is not None:
        check_model("teacher", teacher)
    if augment is not None and not callable(augment):
        raise TypeError(
            f"augment must be a function (key, batch) -> batch, got {_checks.describe(augment)}."
        )
    if ema_decay is not None:
        checked("ema_decay", ema_decay, low=0, high=1)

    def init(key: jax.Array, batch: Batch, frozen: Tree = None) -> tuple[Tree, Tree]:
        if augment is not None:  # which may change shapes and entries
            batch = augment(key, batch)
        batch = finite_padding(batch)
        params, extra = student.init(key, student.read(batch))
        _check_values(student, (params, extra), batch)
        if teacher is not None:
            check_variables(teacher, frozen, batch)
            jax.eval_shape(lambda v, b: teach(teacher, v, b), frozen, batch)
        kept = {"student": extra}
        if ema_decay is not None:
            kept["ema"] = _average.begun(params, extra)
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
        batch = _without_padding_labels(finite_padding(batch))
        if teacher is not None:
            batch = {**batch, "teacher_logits": teach(teacher, frozen, batch)["logits"]}
        images = student.read(batch)
        call = Call(params, extra, batch, frozen, step, attack_key, axis_name)
        batch = {**batch, **targets(call, images)}
        adversarial, state = perturb(call._replace(batch=batch), images)
        batch["adversarial"] = adversarial
        if answers is not None:
            batch = {**batch, **answers(call._replace(batch=batch), adversarial)}
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
        return {**extra, "ema": _average.moved(extra["ema"], now, at(ema_decay, step))}

    method = from_parts(
        init, parts, prepare=prepare, after=after if ema_decay is not None else None
    )
    # The state that the attack has moved is one for the whole batch: it has no slices.
    return method._replace(parts=None) if inner.mode == "batch_update" else method


def _without_padding_labels(batch: Batch) -> Batch:
    """The batch with no label in rows of weight 0, as a label that is no class makes NaN."""
    label = jnp.asarray(batch.get("label", 0.0))
    if "weight" not in batch or not jnp.issubdtype(label.dtype, jnp.integer):
        return batch
    counts = jnp.asarray(batch["weight"]) > 0
    _checks.shape("batch['label']", label, counts.shape, "as batch['weight']")
    if label.dtype != jnp.int64:  # -1 is not in every type
        label = label.astype(jnp.int32)
    return {**batch, "label": jnp.where(counts, label, -1)}


def _check_values(student: Model, variables: tuple[Tree, Tree], batch: Batch) -> None:
    """Refuses images and labels that an update, which is traced, couldn't see to be wrong."""
    given = jnp.asarray(student.read(batch)), jnp.asarray(batch.get("label", 0))
    seen = *given, jnp.asarray(batch.get("weight", 1.0))
    if any(_checks.is_traced(x) or not x.is_fully_addressable for x in seen):
        return
    images, label = (np.asarray(x) for x in given)  # known, also inside a jitted init
    attack_inputs.images(images)
    if "index" in batch:
        _checks.shape("batch['index']", batch["index"], images.shape[:1], "(one per image)")
    if jnp.issubdtype(label.dtype, jnp.floating):
        mass = label.sum(-1)
        if not bool(((label >= 0).all(-1) & ((np.abs(mass - 1) <= 1e-4) | (mass == 0))).all()):
            raise ValueError(
                "batch['label'] must hold probabilities that sum to 1 in each row, or to 0 in rows "
                f"without a label, got sums from {mass.min():.4g} to {mass.max():.4g} and values "
                f"from {label.min():.4g}."
            )
        return
    logits = jax.eval_shape(lambda v, x: student.apply(*v, x, train=False)[0], variables, images)
    if "label" in batch and "logits" in logits:
        most = logits["logits"].shape[-1]
        known = label if "weight" not in batch else label[np.asarray(batch["weight"]) > 0]
        wrong = known[(known.astype(np.int64) < -1) | (known.astype(np.int64) >= most)]
        if wrong.size:
            raise ValueError(
                f"batch['label'] must hold class indices from 0 to {most - 1}, or -1 for "
                f"unlabelled rows, got {wrong[0]}."
            )


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


def target_loss(logits: jax.Array, images: jax.Array, call: Call) -> jax.Array:
    """Cross-entropy with the batch's targets: what PGD maximises, and training minimises."""
    return losses.hard_label_cross_entropy(logits, call.batch["target"])


def on_target(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The values of `target_loss`, and which rows have a target."""
    known = batch["target"].sum(-1) != 0  # also where a label is no class: NaN must be seen
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
    run = both(student, how)

    def terms(call: Call) -> Any:
        natural, moved, state = run(call)
        found = {
            "natural": (1.0, on_target(natural, call.batch)),
            "robust": (at(beta, call.step), losses.trades_kl(moved, natural)),
        }
        return found, seen_on_both(natural, moved), state

    return terms


def both(student: Model, how: str) -> Callable[[Call], tuple[jax.Array, jax.Array, Tree]]:
    """``(call) -> (natural logits, adversarial logits, student's state)`` in training mode."""
    _checks.choice("forward", how, ("joint", "separate"))

    def run(call: Call) -> tuple[jax.Array, jax.Array, Tree]:
        moved = call.batch["adversarial"]
        images = jnp.asarray(student.read(call.batch)).astype(moved.dtype)
        if how == "joint":
            outputs, state = forward(student, call, jnp.concatenate([images, moved]))
            natural, adversarial = jnp.split(outputs["logits"], 2)
            return natural, adversarial, state
        outputs, state = forward(student, call, images)
        later = call._replace(
            extra={**call.extra, "student": state}, key=jax.random.fold_in(call.key, 1)
        )
        found, state = forward(student, later, moved)
        return outputs["logits"], found["logits"], state

    return run


def seen_on_both(natural: jax.Array, moved: jax.Array) -> dict[str, Outputs]:
    """The outputs whose accuracy is tracked."""
    return {"accuracy": {"logits": natural}, "adversarial_accuracy": {"logits": moved}}


def forward(student: Model, call: Call, images: jax.Array) -> tuple[Outputs, Tree]:
    """The student in training mode."""
    return student.apply(
        call.params["student"], call.extra["student"], images, train=True, key=call.key
    )


def _mass(batch: Mapping[str, Any], axis_name: str | None) -> dict[str, Part]:
    """The mean probability that rectified labels leave to the given class."""
    if "true_class_mass" not in batch:
        return {}
    known = (jnp.asarray(batch["label"]) != -1).astype(jnp.float32)
    values = (batch["true_class_mass"], known)
    name = "rectified_true_class_mass"
    return {name: part_of(name, 1.0, values, False, batch, axis_name)}
