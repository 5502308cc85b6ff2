"""From what a Term returns to the sum and the count of its mean."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax._pairs import Batch, Outputs, Part


def finite_padding(batch: Batch) -> Batch:
    """The batch with zeros for what isn't finite in rows of weight 0.

    A NaN there would pass into the gradients, as 0 times NaN is NaN.
    """
    if "weight" not in batch:
        return batch
    counts = jnp.asarray(batch["weight"]) > 0

    def one(x: Any) -> Any:
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.shape[:1] != counts.shape:
            return x
        keep = counts.reshape(counts.shape + (1,) * (x.ndim - 1))
        return jnp.where(keep | jnp.isfinite(x), x, 0)

    return {name: jax.tree.map(one, entry) for name, entry in batch.items()}


def part_of(
    name: str, weight: Any, value: Any, coupled: bool, batch: Batch, axis_name: str | None
) -> Part:
    """The sum and the count of what a Term returned, with the batch's example weights."""
    if coupled:
        return Part(weight, value, None)
    values, weights = value if isinstance(value, tuple) else (value, None)
    if jnp.ndim(weight):
        raise ValueError(
            f"the weight of terms[{name!r}] must be a number, got {_checks.describe(weight)}."
        )
    values = jnp.asarray(values)
    if values.size == 0:
        raise ValueError(f"batch must have examples, got none: the term {name!r} is empty.")
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    rows = _rows(batch)
    if values.ndim and rows is not None and values.shape[0] != rows:
        raise ValueError(
            f"the term {name!r} must return a value for each of the {rows} examples, got "
            f"{_checks.describe(values)}; a loss of the whole batch is a Term with coupled=True."
        )
    if values.ndim == 0:
        if axis_name is not None:
            raise ValueError(
                f"the term {name!r} must return per-example values under axis_name, got a scalar; "
                "a loss of the whole batch is a Term with coupled=True."
            )
        return Part(weight, values, None)
    if "weight" in batch:
        example = jnp.asarray(batch["weight"], values.dtype)
        _checks.shape("batch['weight']", example, values.shape[:1], "for the examples")
        example = _spread(name, example, values)
        weights = example if weights is None else example * _spread(name, weights, values)
    if weights is None:
        return Part(weight, values.sum(), values.size)
    weights = _spread(name, weights, values)
    # The value of a row that doesn't count may be anything, also NaN.
    return Part(weight, jnp.where(weights > 0, values * weights, 0).sum(), weights.sum())


def _rows(batch: Batch) -> int | None:
    """How many examples a batch has, where its entries agree on it."""
    found = {x.shape[0] for x in jax.tree.leaves(dict(batch)) if getattr(x, "ndim", 0)}
    return found.pop() if len(found) == 1 else None


def _spread(name: str, weights: Any, values: jax.Array) -> jax.Array:
    """Weights of the examples ``[B]``, or of more, for all the values ``[B, ...]`` of each."""
    weights = jnp.asarray(weights, values.dtype)
    if weights.shape != values.shape[: weights.ndim]:
        raise ValueError(
            f"the weights of the term {name!r} must have the leading shape of its values "
            f"{values.shape}, got {weights.shape}."
        )
    shape = weights.shape + (1,) * (values.ndim - weights.ndim)
    return jnp.broadcast_to(weights.reshape(shape), values.shape)


def accuracy_of(student_out: Outputs, batch: Batch) -> dict[str, Part]:
    """The student's accuracy over labelled rows, where there are labels and logits to compare."""
    if "label" not in batch or "logits" not in student_out:
        return {}
    logits, label = jax.lax.stop_gradient(student_out["logits"]), jnp.asarray(batch["label"])
    if label.shape == logits.shape:
        label = jnp.where(label.sum(-1) > 0, label.argmax(-1), -1)
    if label.shape != logits.shape[:-1] or not jnp.issubdtype(label.dtype, jnp.integer):
        return {}
    known = (label != -1).astype(jnp.float32)
    # NaN has an argmax, too, but is no answer.
    right = (logits.argmax(-1) == label) & ~jnp.isnan(logits).any(-1)
    hits = right.astype(jnp.float32)
    return {"accuracy": part_of("accuracy", 1.0, (hits, known), False, batch, None)}
