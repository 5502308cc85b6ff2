"""Teachers: running them, checking their variables, several at once, or stored outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax._pairs import Batch, Model, Outputs, Tree


def from_batch(**outputs: str | Callable[[Batch], Any]) -> Model:
    """A teacher whose outputs were stored and come with the batch.

    Args:
      **outputs: output name to the batch entry that holds it, or to a function of the batch.

    Returns:
      A `Model` to pass as the teacher of `distill`; it needs no ``frozen`` variables.

    Example:
      >>> import kdjax as kd, jax.numpy as jnp
      >>> teacher = kd.from_batch(logits="teacher_logits")
      >>> outputs, _ = teacher.apply({}, {}, {"teacher_logits": jnp.zeros((2, 10))})
      >>> outputs["logits"].shape
      (2, 10)
    """
    if not outputs:
        raise ValueError('from_batch needs at least one output, such as logits="teacher_logits".')

    def init(key: jax.Array, inputs: Any) -> tuple[Tree, Tree]:
        return {}, {}

    def apply(
        params: Tree, extra: Tree, inputs: Batch, *, train: bool = False, key: Any = None
    ) -> tuple[dict[str, Any], Tree]:
        hint = "Its rows come from stored teacher outputs (kdjax.data)."
        return {
            name: source(inputs)
            if callable(source)
            else _checks.entry("batch", inputs, source, hint)
            for name, source in outputs.items()
        }, extra

    return Model(init, apply, whole_batch)


def whole_batch(batch: Batch) -> Batch:
    """The ``inputs`` of a Model that needs no variables and reads the batch itself."""
    return batch


def ensemble(
    models: Sequence[Model],
    *,
    weights: jax.Array | Sequence[float] | None = None,
    geometric: bool = False,
) -> Model:
    """Several teachers as one.

    ``logits = log(sum_i w_i softmax(z_i))``, the arithmetic mean of the predictive distributions,
    or ``sum_i w_i z_i``, their geometric mean up to normalisation.

    Args:
      models: the teachers; their ``logits`` must have the same shape.
      weights: ``[len(models)]``, non-negative, normalised here; equal by default. May be traced.
      geometric: average logits instead of probabilities.

    Returns:
      A `Model`. Its ``frozen`` variables are a list with one entry for each teacher, in order.
      Besides ``logits``, every output of teacher i is there as ``"i/<name>"``.

    Raises:
      ValueError: no models, a wrong number of weights or of variables.

    Reference:
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    models = tuple(models)
    if not models:
        raise ValueError("models must hold at least one teacher, got none.")
    for i, model in enumerate(models):
        if not isinstance(model, Model):
            raise TypeError(
                f"models[{i}] must be a kdjax.Model; wrap it with kdjax.from_linen, from_nnx or "
                f"from_fn, got {_checks.describe(model)}."
            )
    if weights is not None:
        weights = _checks.as_array("weights", weights).astype(jnp.float32)
        _checks.shape("weights", weights, (len(models),), "for as many models")
        _checks.number("weights", weights, low=0, scalar=False)
        if not _checks.is_traced(weights) and not weights.any():
            raise ValueError("weights must not all be 0.")

    def init(key: jax.Array, inputs: Any) -> tuple[Tree, Tree]:
        keys = jax.random.split(key, len(models))
        return [m.init(k, m.read(inputs)) for m, k in zip(models, keys, strict=True)], {}

    def apply(
        params: Tree, extra: Tree, inputs: Batch, *, train: bool = False, key: Any = None
    ) -> tuple[dict[str, Any], Tree]:
        _check_number(params, len(models))
        found = [teach(m, v, inputs) for m, v in zip(models, params, strict=True)]
        logits = [_checks.floating("teacher_logits", out["logits"]) for out in found]
        for i, one in enumerate(logits[1:], 1):
            _checks.same_shape(f"logits of teacher {i}", one, "teacher 0", logits[0])
        share = jnp.full(len(models), 1 / len(models)) if weights is None else weights
        share = share / share.sum()
        stacked = jnp.stack(logits)
        share = share.reshape((-1,) + (1,) * (stacked.ndim - 1)).astype(stacked.dtype)
        if geometric:
            mixed = (share * stacked).sum(0)
        else:
            mixed = jax.scipy.special.logsumexp(jax.nn.log_softmax(stacked), axis=0, b=share)
        each = {f"{i}/{name}": value for i, out in enumerate(found) for name, value in out.items()}
        return {"logits": mixed, **each}, extra

    return Model(init, apply, _batch_for_ensemble)


def _batch_for_ensemble(batch: Batch) -> Batch:
    return batch


def variables(frozen: Tree) -> tuple[Tree, Tree]:
    """``(params, extra)`` from the forms a teacher's variables come in.

    Args:
      frozen: ``(params, extra)``, a Flax variables dict, or a list for an `ensemble`.
    """
    if isinstance(frozen, tuple) and len(frozen) == 2:
        return frozen
    if isinstance(frozen, list):
        return frozen, {}
    if isinstance(frozen, Mapping) and "params" in frozen:
        return frozen["params"], {k: v for k, v in frozen.items() if k != "params"}
    raise ValueError(
        "frozen must be the teacher's variables: (params, extra), a Flax variables dict with "
        "'params', kdjax.nnx_variables(module), or a list of these for an ensemble, got "
        f"{_checks.describe(frozen)}."
    )


def teach(teacher: Model, frozen: Tree, batch: Batch) -> Outputs:
    """The teacher's outputs in evaluation mode, without gradients."""
    if teacher.inputs is whole_batch:
        frozen = ({}, {})
    if frozen is None:
        raise ValueError(
            "frozen is missing: the method has a teacher, so pass its variables as frozen=."
        )
    params, extra = variables(frozen)
    try:
        outputs, _ = teacher.apply(params, extra, teacher.read(batch), train=False, key=None)
    except Exception:
        # A sentence about the tree beats an error from deep inside the model.
        check_variables(teacher, frozen, batch)
        raise
    return jax.lax.stop_gradient(outputs)


def check_variables(teacher: Model, frozen: Tree, batch: Batch) -> None:
    """Refuses variables that are not of this teacher, naming the first difference."""
    if teacher.inputs is whole_batch or frozen is None:
        return
    params, extra = variables(frozen)
    wanted = jax.eval_shape(teacher.init, jax.random.key(0), teacher.read(batch))
    if isinstance(wanted[0], list):
        _check_number(frozen if isinstance(frozen, list) else params, len(wanted[0]))
        params = _canonical(frozen)[0]
    for name, want, got in (("params", wanted[0], params), ("extra", wanted[1], extra)):
        want_leaves, got_leaves = _by_path(want), _by_path(got)
        for path, leaf in want_leaves.items():
            if path not in got_leaves:
                raise ValueError(
                    f"frozen does not fit the teacher: its {name} lack {path or 'the root'}."
                )
            if jnp.shape(got_leaves[path]) != leaf.shape:
                raise ValueError(
                    f"frozen does not fit the teacher: {name} {path} must have shape "
                    f"{leaf.shape}, got {jnp.shape(got_leaves[path])}."
                )
        surplus = sorted(set(got_leaves) - set(want_leaves))
        if surplus and name == "params":
            raise ValueError(f"frozen does not fit the teacher: it knows no {name} {surplus[0]}.")


def _canonical(frozen: Tree) -> tuple[Tree, Tree]:
    """`variables`, also within ensembles of ensembles."""
    params, extra = variables(frozen)
    return ([_canonical(one) for one in params] if isinstance(params, list) else params), extra


def _check_number(params: Tree, wanted: int) -> None:
    if not isinstance(params, list) or len(params) != wanted:
        got = len(params) if isinstance(params, list) else _checks.describe(params)
        raise ValueError(f"frozen must be a list of the variables of {wanted} teachers, got {got}.")


def _by_path(tree: Tree) -> dict[str, Any]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
