"""The types of kdjax: NamedTuples of pure functions, and the State that flows through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import _checks

Tree = Any
Batch = Mapping[str, Any]
Outputs = Mapping[str, Any]
Schedule = Callable[[Any], Any]


class Model(NamedTuple):
    """A network as two pure functions.

    Attributes:
      init: ``(key, inputs) -> (params, extra)``. ``extra`` holds every variable that is not
        trained (batch statistics), and is empty if there is none.
      apply: ``(params, extra, inputs, *, train=False, key=None) -> (outputs, extra)``. ``outputs``
        is a dict with ``"logits"`` and the tapped intermediates.
      inputs: the batch entry that the model reads, or a function from the batch to its inputs.
    """

    init: Callable[..., tuple[Tree, Tree]]
    apply: Callable[..., tuple[dict[str, Any], Tree]]
    inputs: str | Callable[[Batch], Any] = "image"

    def read(self, batch: Batch) -> Any:
        """The model's inputs, taken from a batch.

        Raises:
          TypeError: the batch is no dict, or its ``image`` is uint8: models take scaled images.
          ValueError: there is no such entry.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(f"batch must be a dict of arrays, got {_checks.describe(batch)}.")
        if callable(self.inputs):
            return self.inputs(batch)
        hint = "Pass inputs= to the adapter to read another entry."
        found = _checks.entry("batch", batch, self.inputs, hint)
        if self.inputs == "image" and getattr(found, "dtype", None) == jnp.uint8:
            raise TypeError(
                "batch['image'] must be floating, got uint8: scale it in the step with "
                "augment=kdjax.augment.compose(kdjax.augment.to_float), or, if the model does so "
                "itself, pass inputs=lambda batch: batch['image'] to the adapter."
            )
        return found


class Term(NamedTuple):
    """One summand of a distillation objective.

    Attributes:
      init: ``(key, student_out, teacher_out) -> tparams``: the term's own trained parameters (a
        projector), or an empty dict. It gets zeros of the outputs' shapes and dtypes.
      loss: ``(tparams, student_out, teacher_out, batch, *, step, key)`` to per-example values
        ``[B, ...]``, or to ``(values, weights)`` for a weighted mean over the examples.
      coupled: True for a loss of the whole batch at once. It returns a scalar that is already
        global, and gets ``axis_name`` as one more keyword to reduce over.
    """

    init: Callable[..., Tree]
    loss: Callable[..., Any]
    coupled: bool = False


class Part(NamedTuple):
    """A mean before its division: ``weight * sum / count``.

    Sums and counts add up over devices and microbatches, means don't. ``count=None`` marks a
    batch-coupled value, which is global as it comes.
    """

    weight: Any
    sum: Any
    count: Any

    def mean(self, axis_name: str | None = None, *, empty: float = 0.0) -> jax.Array:
        """``sum / count`` over all devices of ``axis_name``; ``empty`` where nothing counts."""
        if self.count is None:
            return self.sum
        total, count = self.sum, jax.lax.stop_gradient(self.count)
        if axis_name is not None:
            total, count = jax.lax.psum((total, count), axis_name)
        return ratio(total, count, empty=empty)


def ratio(total: Any, count: Any, *, empty: float = 0.0) -> jax.Array:
    """``total / count``, and ``empty`` with a zero gradient where ``count`` is 0."""
    if isinstance(count, int) and count > 0:  # a size, known without looking at values
        return total / count
    some = count > 0
    return jnp.where(some, total / jnp.where(some, count, 1), empty)


class Method(NamedTuple):
    """What is minimised. A new method is one function that returns one of these.

    Attributes:
      init: ``(key, batch, frozen) -> (params, extra)``. The student's variables sit at
        ``params["student"]`` and ``extra["student"]``.
      loss: ``(params, extra, batch, frozen, *, step, key, axis_name) -> (scalar, (extra,
        metrics))``; the scalar is the loss of the global batch.
      prepare: ``(params, extra, batch, frozen, *, step, key, axis_name) -> batch``, not
        differentiated: augmentation, attacks, sampling, labels.
      after: ``(params, extra, batch, frozen, *, step, key, axis_name) -> extra``, once the
        optimizer has moved the parameters: EMA, pools, banks.
      parts: ``loss`` before its reduction, ``-> ({name: Part}, (extra, {name: Part}))``; see
        `from_parts`. Only ``minimize(microbatches=k)`` needs it.
    """

    init: Callable[..., tuple[Tree, Tree]]
    loss: Callable[..., tuple[jax.Array, tuple[Tree, dict[str, jax.Array]]]]
    prepare: Callable[..., Batch] | None = None
    after: Callable[..., Tree] | None = None
    parts: Callable[..., tuple[dict[str, Part], tuple[Tree, dict[str, Part]]]] | None = None


class State(NamedTuple):
    """Everything that changes in training, and so the whole checkpoint. Teachers are not in it."""

    step: jax.Array
    key: jax.Array
    params: Tree
    extra: Tree
    opt: Tree


class Learner(NamedTuple):
    """A training algorithm.

    Attributes:
      init: ``(key, batch, frozen=None) -> State``.
      update: ``(State, batch, frozen=None) -> (State, metrics)``, ready for ``jax.jit``.
    """

    init: Callable[..., State]
    update: Callable[..., tuple[State, dict[str, jax.Array]]]
