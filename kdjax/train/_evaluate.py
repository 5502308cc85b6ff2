"""A model in evaluation mode over a split: exact metrics, and logits."""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdjax import _checks, parallel
from kdjax import data as kdata
from kdjax._pairs import Batch, Model, Outputs, State, Tree
from kdjax.train import _feed

Metric = Callable[[Outputs, Batch], Any]

_AHEAD = 8
_BINS = 15


def evaluate(
    model: Model,
    variables: Tree,
    batches: Iterable[Batch],
    *,
    metrics: Mapping[str, Metric] | None = None,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Means of metrics over a split, with the model in evaluation mode.

    ``mean = sum(weight * value) / sum(weight)`` over all examples, whatever the batches: rows of
    ``weight`` 0 (padding) and, in the default metrics, of label -1 don't count. A row with a NaN
    logit is wrong, and a label that is no class makes the default metrics NaN. The model is
    compiled once for each shape of batch, also over many calls with the same functions: a lambda
    written in the call is new, and compiled anew, each time.

    Args:
      model: the model.
      variables: ``(params, extra)``, a Flax variables dict, or a `State`, whose student is meant.
      batches: one pass over the split, as ``dataset.once(split, batch_size)`` makes it.
      metrics: name to ``(outputs, batch) -> values [B, ...]``, or to ``(values, weights)`` for
        means over what the weights select; these are of the shape of the values or of its first
        axes, such as ``[B]``. By default ``accuracy``, ``nll``, ``brier`` (the sum of
        squares over the classes) and ``ece`` (15 bins of equal width) from ``logits`` ``[B, C]``
        and ``label`` ``[B]``.
      mesh: splits each batch over devices; with several processes each passes its own rows.

    Returns:
      Name to number; NaN where no example counts.

    Raises:
      TypeError: model is no `Model`, or metrics no dict of functions.
      ValueError: there are no batches, or they lack an entry that is needed; variables without a
        student; a metric whose weights don't fit its values.

    Example:
      >>> import jax, jax.numpy as jnp, kdjax as kd
      >>> model = kd.from_fn(lambda key, x: {}, lambda params, x: x, inputs="x")
      >>> batch = {"x": 9.0 * jnp.eye(3), "label": jnp.array([0, 1, 1])}
      >>> round(kd.train.evaluate(model, ({}, {}), [batch])["accuracy"], 3)
      0.667
    """
    if metrics is not None and not (
        isinstance(metrics, Mapping) and all(map(callable, metrics.values()))
    ):
        raise TypeError(
            f"metrics must be a dict of name -> function, got {_checks.describe(metrics)}."
        )
    _check_model(model)
    program = _totals_program(model, None if metrics is None else tuple(metrics.items()))
    found = _over(program, variables, batches, mesh, lambda batch, totals: totals)
    results = {}
    for name, (total, count) in _added(found).items():
        if name == "ece" and metrics is None:
            total = np.abs(total)
        results[name] = float(total.sum() / count) if count > 0 else float("nan")
    return results


def evaluator(
    model: Model,
    batches: Iterable[Batch],
    *,
    metrics: Mapping[str, Metric] | None = None,
    mesh: Mesh | None = None,
) -> Callable[[State], dict[str, float]]:
    """`evaluate` of a State's student on a split, as ``fit(evaluate=...)`` takes it.

    Args:
      model: the student.
      batches: as in `evaluate`; must give the same batches each time it is iterated over.
      metrics: as in `evaluate`.
      mesh: as in `evaluate`.

    Returns:
      ``State -> dict`` of the metrics of ``params["student"]``, ``extra["student"]``.

    Raises:
      TypeError: batches can be read only once.

    Example:
      >>> import kdjax as kd
      >>> def held_out(student, dataset):
      ...     return kd.train.evaluator(student, dataset.once("validation", 256))
    """
    if isinstance(batches, Iterator):
        raise TypeError(
            "batches must be re-iterable, as every evaluation reads them anew, got "
            f"{_checks.describe(batches)}."
        )
    _check_model(model)

    def of(state: State) -> dict[str, float]:
        return evaluate(model, state, batches, metrics=metrics, mesh=mesh)

    return of


def predict(
    model: Model, variables: Tree, batches: Iterable[Batch], *, mesh: Mesh | None = None
) -> np.ndarray:
    """The logits of a split, in the order of ``index`` where the batches have it.

    Args:
      model: the model.
      variables: as in `evaluate`.
      batches: one pass over the split; rows of ``weight`` 0 are left out.
      mesh: splits each batch over devices, in one process.

    Returns:
      ``[N, ...]`` on the host, N the number of rows that aren't padding.

    Example:
      >>> import jax.numpy as jnp, kdjax as kd
      >>> model = kd.from_fn(lambda key, x: {}, lambda params, x: x, inputs="x")
      >>> batch = {"x": jnp.array([[1.0], [0.0]]), "index": jnp.array([1, 0])}
      >>> kd.train.predict(model, ({}, {}), [batch]).tolist()
      [[0.0], [1.0]]
    """
    if jax.process_count() > 1:
        raise ValueError(f"predict must run in one process, got {jax.process_count()}.")
    _check_model(model)

    def rows(batch: Batch, logits: jax.Array) -> Any:
        return logits, batch.get("index"), batch.get("weight")

    logits, order = [], list[np.ndarray]()
    for values, index, weight in _over(_logits_program(model), variables, batches, mesh, rows):
        real = slice(None) if weight is None else np.asarray(weight) > 0
        logits.append(values[real])
        if index is not None:
            order.append(np.asarray(index)[real])
    together = np.concatenate(logits)
    if len(order) < len(logits):
        return together
    return together[np.argsort(np.concatenate(order), kind="stable")]


def predict_labels(
    model: Model,
    variables: Tree,
    dataset: kdata.Dataset,
    path: str | os.PathLike[str],
    *,
    teacher: str = "teacher",
    split: str = "train",
    top_k: int | None = None,
    dtype: Any = np.float32,
    temperature: float = 1.0,
    batch_size: int = 256,
    progress: bool = True,
) -> kdata.StoredOutputs:
    """Runs a teacher once over a split and stores its outputs; interrupted, it goes on.

    Args:
      model: the teacher.
      variables: as in `evaluate`; their hash is stored, so that outputs of other variables are
        never taken for these.
      dataset: from `kdjax.data`.
      path: the folder to be made.
      teacher: what the teacher is, in words.
      split: the split.
      top_k: keep only the k largest probabilities; by default all logits.
      dtype: numpy.float32 or numpy.float16.
      temperature: of the log-probabilities of ``top_k``, above 0.
      batch_size: rows at a time, at least 1.
      progress: whether to show a bar.

    Returns:
      What `kdjax.data.store_outputs` returns; ``dataset.with_outputs`` takes it.

    Raises:
      ValueError: as `kdjax.data.store_outputs`.

    Example:
      >>> import kdjax as kd
      >>> def with_teacher(teacher, variables, dataset, path):
      ...     stored = kd.train.predict_labels(teacher, variables, dataset, path)
      ...     return dataset.with_outputs(stored)
    """
    _check_model(model)
    params, extra = _variables(variables)
    program = _logits_program(model)
    return kdata.store_outputs(
        lambda batch: program(params, extra, dict(batch)),
        dataset,
        path,
        teacher=teacher,
        variables=(params, extra),
        split=split,
        top_k=top_k,
        dtype=dtype,
        temperature=temperature,
        batch_size=batch_size,
        progress=progress,
    )


def _over(
    program: Callable[..., Any],
    variables: Tree,
    batches: Iterable[Batch],
    mesh: Mesh | None,
    keep: Callable[[Batch, Any], Any],
) -> list[Any]:
    """Runs a program over all batches and fetches what is kept of each, a few calls late."""
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping):
        raise TypeError(f"batches must be an iterable of dicts, got {_checks.describe(batches)}.")
    if isinstance(batches, kdata.Batches) and batches.epochs is None:
        raise ValueError(
            "batches must end: dataset.once(split, batch_size) is one pass over a split, got "
            "batches without epochs."
        )
    params, extra = _variables(variables)
    if mesh is not None:
        params, extra = parallel.replicate((params, extra), mesh)
    running: collections.deque[Any] = collections.deque()
    found = []
    with _feed.placed(batches, mesh) as ready:
        for batch in ready:
            running.append(keep(batch, program(params, extra, batch)))
            if len(running) > _AHEAD:
                found.append(jax.device_get(running.popleft()))
    found.extend(jax.device_get(list(running)))
    if not found:
        raise ValueError("batches must hold at least one batch, got none.")
    return found


def _check_model(model: Any) -> None:
    if not isinstance(model, Model):
        raise TypeError(
            "model must be a kdjax.Model; wrap it with kdjax.from_linen, from_nnx or from_fn, got "
            f"{_checks.describe(model)}."
        )


def _variables(variables: Tree) -> tuple[Tree, Tree]:
    if isinstance(variables, State):
        for name in ("params", "extra"):
            part = getattr(variables, name)
            if not isinstance(part, Mapping) or "student" not in part:
                raise ValueError(
                    f"variables must be a State with a student, got one whose {name} has no "
                    "'student'; pass (params, extra) instead."
                )
        return variables.params["student"], variables.extra["student"]
    if isinstance(variables, tuple) and len(variables) == 2:
        return variables
    if isinstance(variables, list):
        return variables, {}
    if isinstance(variables, Mapping) and "params" in variables:
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}
    raise ValueError(
        "variables must be (params, extra), a Flax variables dict with 'params', a list of these "
        f"for an ensemble, or a State, got {_checks.describe(variables)}."
    )


# Kept, so that every evaluation of a run shares one program.
@functools.lru_cache(maxsize=32)
def _logits_program(model: Model) -> Callable[[Tree, Tree, Batch], jax.Array]:
    @jax.jit
    def logits(params: Tree, extra: Tree, batch: Batch) -> jax.Array:
        return _forward(model, params, extra, batch)["logits"]

    return logits


@functools.lru_cache(maxsize=32)
def _totals_program(
    model: Model, metrics: tuple[tuple[str, Metric], ...] | None
) -> Callable[[Tree, Tree, Batch], dict[str, tuple[jax.Array, jax.Array]]]:
    """Batch to name to ``(sum of weighted values, sum of weights)``."""

    @jax.jit
    def totals(params: Tree, extra: Tree, batch: Batch) -> dict[str, Any]:
        outputs = _forward(model, params, extra, batch)
        found = _of_classes(outputs, batch) if metrics is None else {}
        for name, metric in metrics or ():
            value = metric(outputs, batch)
            values, weights = value if isinstance(value, tuple) else (value, None)
            found[name] = _total(name, values, weights, batch)
        return found

    return totals


def _forward(model: Model, params: Tree, extra: Tree, batch: Batch) -> Outputs:
    outputs, _ = model.apply(params, extra, model.read(batch), train=False, key=None)
    _checks.entry("the model's outputs", outputs, "logits")
    return outputs


def _of_classes(outputs: Outputs, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The default metrics, from one softmax."""
    logits = _checks.floating("logits", outputs["logits"], ndim=2)
    label = _checks.integer("batch['label']", _checks.entry("batch", batch, "label"), ndim=1)
    _checks.shape("batch['label']", label, logits.shape[:1], "like logits")
    # int8 has no room for the number of classes.
    label = label.astype(jnp.promote_types(label.dtype, jnp.int32))
    known = (label != -1).astype(logits.dtype)
    # A label that is no class is a fault in the data, and NaN where it counts.
    fault = jnp.where((label < -1) | (label >= logits.shape[-1]), jnp.nan, 0.0)
    fault = fault.astype(logits.dtype)
    truth = jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)
    logp = jax.nn.log_softmax(logits)
    probs = jnp.exp(logp)
    # The argmax of NaN is class 0.
    right = (logits.argmax(-1) == label) & ~jnp.isnan(logits).any(-1)
    right = right.astype(logits.dtype) + fault
    confidence = probs.max(-1)
    # The bins of kdjax.metrics: the gap between confidence and accuracy is summed within each.
    edges = jnp.asarray(np.arange(1, _BINS) / _BINS, probs.dtype)
    at = jnp.searchsorted(edges, confidence, side="left")
    gap = (confidence - right)[:, None] * jax.nn.one_hot(at, _BINS, dtype=logits.dtype)
    picked = jnp.take_along_axis(logp, jnp.maximum(label, 0)[:, None], axis=-1)[:, 0]
    values = {
        "accuracy": right,
        "nll": fault - picked,
        "brier": jnp.square(probs - truth).sum(-1) + fault,
    }
    found = {name: _total(name, value, known, batch) for name, value in values.items()}
    by_bin, _ = _total("ece", gap, known, batch, axis=0)
    return {**found, "ece": (by_bin, found["accuracy"][1])}


def _total(
    name: str, values: Any, weights: Any, batch: Batch, *, axis: int | None = None
) -> tuple[jax.Array, jax.Array]:
    values = _checks.as_array(f"the values of metrics[{name!r}]", values)
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if values.ndim == 0:
        raise ValueError(f"metrics[{name!r}] must return per-example values, got a scalar.")
    weights = _checks.as_array(
        f"the weights of metrics[{name!r}]", 1.0 if weights is None else weights
    ).astype(values.dtype)
    if weights.shape != values.shape[: weights.ndim]:
        raise ValueError(
            f"the weights of metrics[{name!r}] must have the shape of its values, {values.shape}, "
            f"or of their first axes, got {weights.shape}."
        )
    weights = jnp.expand_dims(weights, tuple(range(weights.ndim, values.ndim)))
    weights = jnp.broadcast_to(weights, values.shape)
    if "weight" in batch:
        example = jnp.asarray(batch["weight"], values.dtype)
        _checks.shape("batch['weight']", example, values.shape[:1], "for the examples")
        weights = weights * example.reshape(example.shape + (1,) * (values.ndim - 1))
    # A row of weight 0 may hold anything, also NaN.
    kept = jnp.where(weights > 0, values * weights, 0)
    return kept.sum(axis), weights.sum(axis)


def _added(found: list[dict[str, Any]]) -> dict[str, tuple[np.ndarray, float]]:
    """The totals of all batches, added as float64 on the host."""
    return {
        name: (
            np.sum([np.asarray(one[name][0], np.float64) for one in found], axis=0),
            float(np.sum([np.asarray(one[name][1], np.float64) for one in found])),
        )
        for name in found[0]
    }
