"""The four pairs of pure functions and what joins them: `distill` and `minimize`.

Everything that trains is a `Learner`: ``init`` makes a `State`, ``update`` maps a State to the
next one. A `Method` says what is minimised, a `Term` is one summand of it, a `Model` is a network
as two functions. None of them holds arrays; all state is an argument and a result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdjax import _checks, _gradients, _mesh_axis
from kdjax._pairs import (
    Batch,
    Learner,
    Method,
    Model,
    Outputs,
    Part,
    Schedule,
    State,
    Term,
    Tree,
)
from kdjax._teachers import check_variables, ensemble, from_batch, teach

__all__ = [
    "Learner",
    "Method",
    "Model",
    "Part",
    "State",
    "Term",
    "distill",
    "ensemble",
    "from_batch",
    "from_parts",
    "minimize",
]

_RESERVED = frozenset({"", "accuracy"})


def distill(
    student: Model,
    teacher: Model | None,
    terms: Mapping[str, tuple[float | jax.Array | Schedule, Term]],
    *,
    augment: Callable[[jax.Array, Batch], Batch] | None = None,
) -> Method:
    """A Method that trains ``student`` on a weighted sum of terms.

    ``loss = sum over terms of weight(step) * mean over examples of the term``. Student and teacher
    run forward once per update; the teacher runs in evaluation mode and without gradients.

    Args:
      student: the model that is trained.
      teacher: the model that is imitated, an `ensemble`, `from_batch`, or None.
      terms: name to ``(weight, Term)``. A weight is a number, an array, or an optax schedule of
        the step.
      augment: ``(key, batch) -> batch``, applied inside the update, so that student and teacher
        see the same augmented examples (`kdjax.augment.compose` makes one).

    Returns:
      A `Method`. Its ``frozen`` argument is the teacher's variables: ``(params, extra)``, a Flax
      variables dict, or a list of either for an `ensemble`. Its metrics are ``loss``,
      ``loss/<name>`` for each term and, when the batch has labels, ``accuracy`` of the student in
      training mode over the labelled rows (NaN when there are none). A batch entry ``weight``
      ``[B]`` weights the examples of every per-example term; 0 marks padding.

    Raises:
      TypeError: a term is not a ``(weight, Term)`` pair.
      ValueError: there are no terms, or a weight is not finite.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kdjax as kd
      >>> linear = kd.from_fn(
      ...     lambda key, x: 0.1 * jax.random.normal(key, (x.shape[-1], 3)),
      ...     lambda params, x: x @ params,
      ...     inputs="x",
      ... )
      >>> method = kd.distill(linear, linear, {"soft": (1.0, kd.terms.soft_labels())})
      >>> learner = kd.minimize(method, optax.sgd(0.1))
      >>> batch = {"x": jnp.ones((4, 2))}
      >>> teacher = linear.init(jax.random.key(1), batch["x"])
      >>> state = learner.init(jax.random.key(0), batch, frozen=teacher)
      >>> state, metrics = jax.jit(learner.update)(state, batch, teacher)
      >>> sorted(metrics)
      ['loss', 'loss/soft']
    """
    terms = _checked_terms(terms)

    def forward(
        params: Tree, extra: Tree, batch: Batch, frozen: Tree, key: jax.Array
    ) -> tuple[Outputs, Outputs, Tree]:
        teacher_out = {} if teacher is None else teach(teacher, frozen, batch)
        student_out, extra = student.apply(params, extra, student.read(batch), train=True, key=key)
        return student_out, teacher_out, extra

    def init(key: jax.Array, batch: Batch, frozen: Tree = None) -> tuple[Tree, Tree]:
        student_key, terms_key = jax.random.split(key)
        params, extra = student.init(student_key, student.read(batch))
        if teacher is not None:
            check_variables(teacher, frozen, batch)
        student_out, teacher_out = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(forward, params, extra, batch, frozen, student_key)[:2],
        )
        own = {
            name: term.init(jax.random.fold_in(terms_key, i), student_out, teacher_out)
            for i, (name, (_, term)) in enumerate(terms.items())
        }
        own = {name: tree for name, tree in own.items() if jax.tree.leaves(tree)}
        return {"student": params} | ({"terms": own} if own else {}), {"student": extra}

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
        student_key, terms_key = jax.random.split(key)
        if axis_name is not None:  # otherwise all devices would drop the same units
            student_key = jax.random.fold_in(student_key, jax.lax.axis_index(axis_name))
        student_out, teacher_out, student_extra = forward(
            params["student"], extra["student"], batch, frozen, student_key
        )
        found = {}
        for i, (name, (weight, term)) in enumerate(terms.items()):
            value = term.loss(
                params.get("terms", {}).get(name, {}),
                student_out,
                teacher_out,
                batch,
                step=step,
                key=jax.random.fold_in(terms_key, i),
                **({"axis_name": axis_name} if term.coupled else {}),
            )
            weight = weight(step) if callable(weight) else weight
            found[name] = _part(name, weight, value, term.coupled, batch, axis_name)
        return found, ({**extra, "student": student_extra}, _accuracy(student_out, batch))

    def prepare(
        params: Tree, extra: Tree, batch: Batch, frozen: Tree = None, *, key: jax.Array, **_: Any
    ) -> Batch:
        assert augment is not None
        return augment(key, batch)

    return from_parts(init, parts, prepare=None if augment is None else prepare)


def from_parts(
    init: Callable[..., tuple[Tree, Tree]],
    parts: Callable[..., Any],
    *,
    prepare: Callable[..., Batch] | None = None,
    after: Callable[..., Tree] | None = None,
) -> Method:
    """A Method from its unreduced loss, which sharding and microbatches then keep exact.

    Args:
      init: as in `Method`.
      parts: ``(params, extra, batch, frozen, *, step, key, axis_name) -> ({name: Part}, (extra,
        {metric: Part}))``. The loss is the sum of ``weight * mean`` over the first dict.
      prepare: as in `Method`.
      after: as in `Method`.

    Returns:
      A `Method` whose metrics are ``loss``, ``loss/<name>`` and the tracked means.
    """

    def loss(
        params: Tree,
        extra: Tree,
        batch: Batch,
        frozen: Tree = None,
        *,
        step: jax.Array,
        key: jax.Array,
        axis_name: str | None = None,
    ) -> tuple[jax.Array, tuple[Tree, dict[str, jax.Array]]]:
        found, (extra, tracked) = parts(
            params, extra, batch, frozen, step=step, key=key, axis_name=axis_name
        )
        total, metrics = _gradients.reduce(found, tracked, axis_name)
        return total, (extra, metrics)

    return Method(init, loss, prepare, after, parts)


def minimize(
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
    microbatches: int = 1,
    unroll: bool | None = None,
) -> Learner:
    """A Learner that minimises a Method with an optax optimizer.

    Args:
      method: what is minimised.
      optimizer: any optax transformation; clipping, schedules and freezing are optax's.
      axis_name: the mesh or pmap axis over which the batch is split, when ``update`` runs inside
        `jax.shard_map` or `jax.pmap`. None under plain ``jax.jit``, also with a sharded batch.
      microbatches: computes the gradient of the whole batch in this many slices, for less memory.
        Means are taken over the whole batch, and the optimizer, schedules and ``after`` move once
        (`optax.MultiSteps` averages its slices unweighted and moves ``after`` each time). Batch
        statistics are those of each slice. The batch size must be a multiple of it.
      unroll: whether the slices are unrolled rather than looped over; by default on CPU only,
        where gradients of convolutions are slow in loops.

    Returns:
      A `Learner`. Randomness of step t depends on ``(state.key, t)`` only. Hyperparameters that
      are arrays or schedules never recompile ``update``; a factory called again with another
      Python number makes another program.

    Raises:
      ValueError: ``microbatches`` with a Method that can't be split exactly.

    Example: see `distill`.
    """
    _checks.count("microbatches", microbatches)
    if microbatches > 1 and method.parts is None:
        raise ValueError(
            "microbatches must be 1 for a Method whose loss comes already reduced (build it with "
            f"kdjax.from_parts to split it exactly), got {microbatches}."
        )
    optimizer = optax.with_extra_args_support(optimizer)

    def init(key: jax.Array, batch: Batch, frozen: Tree = None) -> State:
        if not jnp.issubdtype(getattr(key, "dtype", jnp.float32), jax.dtypes.prng_key):
            raise TypeError(
                f"key must be a typed key such as jax.random.key(0), got {_checks.describe(key)}."
            )
        init_key, key = jax.random.split(key)
        params, extra = method.init(init_key, batch, frozen)
        return State(jnp.zeros((), jnp.int32), key, params, extra, optimizer.init(params))

    def update(
        state: State, batch: Batch, frozen: Tree = None
    ) -> tuple[State, dict[str, jax.Array]]:
        gradient_key, after_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        given = (method, state, batch, frozen, gradient_key, axis_name)
        if microbatches == 1:
            found = _gradients.whole(*given)
        else:
            unrolled = jax.default_backend() == "cpu" if unroll is None else unroll
            found = _gradients.sliced(*given, slices=microbatches, unroll=unrolled)
        moves, opt = optimizer.update(
            found.grads, state.opt, state.params, value=found.loss, grad=found.grads
        )
        params, extra, metrics = (
            optax.apply_updates(state.params, moves),
            found.extra,
            found.metrics,
        )
        if method.after is not None:
            extra = method.after(
                params,
                extra,
                found.batch,
                frozen,
                step=state.step,
                key=after_key,
                axis_name=axis_name,
            )
        if axis_name is not None:
            extra, metrics = _mesh_axis.agree((extra, metrics), axis_name)
        return State(state.step + 1, state.key, params, extra, opt), metrics

    return Learner(init, update)


def _checked_terms(terms: Mapping[str, Any]) -> dict[str, tuple[Any, Term]]:
    if not isinstance(terms, Mapping):
        raise TypeError(
            "terms must be a dict from a name to a (weight, Term) pair, "
            f"got {_checks.describe(terms)}."
        )
    if not terms:
        raise ValueError("terms must hold at least one (weight, Term) pair, got none.")
    for name, pair in terms.items():
        if not isinstance(name, str) or name in _RESERVED:
            raise ValueError(f"terms must have names other than {name!r}.")
        if isinstance(pair, Term) or not (
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Term)
        ):
            raise TypeError(
                f"terms[{name!r}] must be a (weight, Term) pair, got {_checks.describe(pair)}."
            )
        if not callable(pair[0]):
            _checks.number(f"the weight of terms[{name!r}]", pair[0])
    return dict(terms)


def _part(
    name: str, weight: Any, value: Any, coupled: bool, batch: Batch, axis_name: str | None
) -> Part:
    """The sum and the count of what a Term returned, with the batch's example weights."""
    if coupled:
        return Part(weight, value, None)
    values, weights = value if isinstance(value, tuple) else (value, None)
    values = jnp.asarray(values)
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
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
        example = example.reshape(example.shape + (1,) * (values.ndim - 1))
        weights = example if weights is None else example * weights
    if weights is None:
        return Part(weight, values.sum(), values.size)
    weights = jnp.broadcast_to(jnp.asarray(weights, values.dtype), values.shape)
    # A row of weight 0 may hold anything, also NaN.
    return Part(weight, jnp.where(weights > 0, values * weights, 0).sum(), weights.sum())


def _accuracy(student_out: Outputs, batch: Batch) -> dict[str, Part]:
    if "label" not in batch or "logits" not in student_out:
        return {}
    logits, label = jax.lax.stop_gradient(student_out["logits"]), jnp.asarray(batch["label"])
    if label.shape == logits.shape:
        label = jnp.where(label.sum(-1) > 0, label.argmax(-1), -1)
    if label.shape != logits.shape[:-1] or not jnp.issubdtype(label.dtype, jnp.integer):
        return {}
    known = (label >= 0).astype(jnp.float32)
    hits = (logits.argmax(-1) == label).astype(jnp.float32)
    return {"accuracy": _part("accuracy", 1.0, (hits, known), False, batch, None)}
