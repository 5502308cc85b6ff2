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
from kdjax._parts import accuracy_of, finite_padding, part_of
from kdjax._started import started
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
    "started",
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
      ``[B]``, non-negative, weights the examples of every per-example term; 0 marks padding, whose
      entries may even be NaN. Batch statistics see it all the same, and so do batch-coupled terms
      that don't say otherwise.

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
    check_model("student", student)
    if teacher is not None:
        check_model("teacher", teacher)
    if augment is not None and not callable(augment):
        raise TypeError(
            f"augment must be a function (key, batch) -> batch, got {_checks.describe(augment)}."
        )
    terms = checked_terms(terms)

    def forward(
        params: Tree, extra: Tree, batch: Batch, frozen: Tree, key: jax.Array
    ) -> tuple[Outputs, Outputs, Tree]:
        teacher_out = {} if teacher is None else teach(teacher, frozen, batch)
        student_out, extra = student.apply(params, extra, student.read(batch), train=True, key=key)
        return student_out, teacher_out, extra

    def init(key: jax.Array, batch: Batch, frozen: Tree = None) -> tuple[Tree, Tree]:
        student_key, terms_key = jax.random.split(key)
        if augment is not None:  # which may change shapes and entries
            batch = zeros(jax.eval_shape(augment, key, batch))
        params, extra = student.init(student_key, student.read(batch))
        if teacher is not None:
            check_variables(teacher, frozen, batch)
        student_out, teacher_out = zeros(
            jax.eval_shape(forward, params, extra, batch, frozen, student_key)[:2]
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
        batch = finite_padding(batch)
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
            found[name] = part_of(name, weight, value, term.coupled, batch, axis_name)
        return found, ({**extra, "student": student_extra}, accuracy_of(student_out, batch))

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
      optimizer: an optax transformation that needs gradients, parameters, and at most ``value``
        and ``grad`` besides (no line search); clipping, schedules and freezing are optax's.
      axis_name: the mesh or pmap axis over which the batch is split, when ``update`` runs inside
        `jax.shard_map` or `jax.pmap`. None under plain ``jax.jit``, also with a sharded batch.
      microbatches: computes the gradient of the whole batch in this many slices, for less memory.
        Means are taken over the whole batch; ``prepare``, the optimizer, schedules and ``after``
        run once (`optax.MultiSteps` averages its slices unweighted and runs ``after`` each time).
        Batch statistics are those of each slice. The batch size must be a multiple of it.
      unroll: whether the slices are unrolled rather than looped over; by default on CPU only,
        where gradients of convolutions are slow in loops.

    Returns:
      A `Learner`. Randomness of step t depends on ``(state.key, t)`` only. Hyperparameters that
      are arrays or schedules never recompile ``update``; a factory called again with another
      Python number makes another program.

    Raises:
      TypeError: not a Method, or not an optax transformation.
      ValueError: ``microbatches`` with a Method that can't be split exactly.

    Example: see `distill`.
    """
    _check_pair(method, optimizer)
    _checks.count("microbatches", microbatches)
    if microbatches > 1 and method.parts is None:
        raise ValueError(
            "microbatches must be 1 for a Method whose loss comes already reduced (build it with "
            f"kdjax.from_parts to split it exactly), got {microbatches}."
        )

    def gradient(state: State, batch: Batch, frozen: Tree, key: jax.Array) -> _gradients.Gradient:
        given = (method, state, batch, frozen, key, axis_name)
        if microbatches == 1:
            return _gradients.whole(*given)
        unrolled = jax.default_backend() == "cpu" if unroll is None else unroll
        return _gradients.sliced(*given, slices=microbatches, unroll=unrolled)

    return learner(method, optimizer, gradient, axis_name)


def learner(
    method: Method,
    optimizer: optax.GradientTransformation,
    gradient: Callable[[State, Batch, Tree, jax.Array], _gradients.Gradient],
    axis_name: str | None,
) -> Learner:
    """A Learner around any way of computing a Method's gradient, as `minimize` documents it.

    Args:
      method: what is minimised.
      optimizer: an optax transformation.
      gradient: ``(state, batch, frozen, key) -> Gradient``.
      axis_name: as in `minimize`.
    """
    _check_pair(method, optimizer)
    optimizer = optax.with_extra_args_support(optimizer)

    def init(key: jax.Array, batch: Batch, frozen: Tree = None) -> State:
        if not jnp.issubdtype(getattr(key, "dtype", jnp.float32), jax.dtypes.prng_key):
            raise TypeError(
                f"key must be a typed key such as jax.random.key(0), got {_checks.describe(key)}."
            )
        init_key, key = jax.random.split(key)
        params, extra = method.init(init_key, batch, frozen)
        state = State(jnp.zeros((), jnp.int32), key, params, extra, optimizer.init(params))
        return _distinct(state)

    def update(
        state: State, batch: Batch, frozen: Tree = None
    ) -> tuple[State, dict[str, jax.Array]]:
        gradient_key, after_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        found = gradient(state, batch, frozen, gradient_key)
        shown = state.params if found.params is None else found.params
        moves, opt = optimizer.update(
            found.grads, state.opt, shown, value=found.loss, grad=found.grads
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


def _check_pair(method: Any, optimizer: Any) -> None:
    if not isinstance(method, Method):
        raise TypeError(
            "method must be a kdjax.Method such as kdjax.distill makes, "
            f"got {_checks.describe(method)}."
        )
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            "optimizer must be an optax transformation such as optax.adamw(1e-3), "
            f"got {_checks.describe(optimizer)}."
        )


def check_model(name: str, model: Any) -> None:
    if not isinstance(model, Model):
        raise TypeError(
            f"{name} must be a kdjax.Model; wrap it with kdjax.from_linen, from_nnx or from_fn, "
            f"got {_checks.describe(model)}."
        )


def zeros(tree: Tree) -> Tree:
    """Zeros of abstract shapes and dtypes; keys, which can't be zero, are those of seed 0."""

    def one(x: Any) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), x.shape)
        return jnp.zeros(x.shape, x.dtype)

    return jax.tree.map(one, tree)


def _distinct(state: State) -> State:
    """Copies arrays that stand in the State twice, as one buffer can't be donated twice."""
    seen: set[int] = set()

    def one(x: Any) -> Any:
        if id(x) in seen:
            return jnp.copy(x)
        seen.add(id(x))
        return x

    return jax.tree.map(one, state)


def checked_terms(terms: Mapping[str, Any]) -> dict[str, tuple[Any, Term]]:
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
