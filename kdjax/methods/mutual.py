"""Deep mutual learning: students that are trained together and teach each other.

There is no teacher. Every student learns from the labels and from the predictions of the others,
which may have any architecture. ``params["student"]`` holds all of them in their order, as
``{"0": ..., "1": ...}``, and so does ``extra["student"]``: `together` evaluates them as one, and
`student_of` picks one for evaluation, export, or as somebody's teacher.

The paper's algorithm 1 updates the students one after another and predicts anew before each. Here
all move at once, each from one forward pass. The optimizer sees one tree: what works on single
arrays (SGD, Adam, weight decay) treats the students apart, clipping by the global norm does not
(``optax.partition`` over "0", "1", ... does).

Reference:
  Y. Zhang, T. Xiang, T. M. Hospedales, H. Lu, "Deep Mutual Learning", CVPR 2018
  (arXiv 1706.00384).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from kdjax import _checks, core, terms
from kdjax._pairs import Batch, Method, Model, Outputs, Part, Schedule, State, Term, Tree
from kdjax._parts import accuracy_of, finite_padding, part_of
from kdjax._teachers import ensemble
from kdjax._teachers import variables as pair_of
from kdjax.terms import at

__all__ = ["mutual", "student_of", "together"]

Weighted = Mapping[str, tuple[float | jax.Array | Schedule, Term]]


def mutual(
    students: Sequence[Model],
    own: Weighted | None = None,
    peers: Weighted | None = None,
    *,
    augment: Callable[[jax.Array, Batch], Batch] | None = None,
) -> Method:
    """A Method that trains several students, each on the labels and on the others' predictions.

    For K students, with p_k the predictions of student k and no gradient through those of others:

        L_k = CE(y, p_k) + 1 / (K - 1) * sum over j != k of KL(p_j || p_k),   loss = sum_k L_k

    Args:
      students: at least two models, of the same or different architectures. They start from
        different random parameters; `kdjax.started` gives them given ones (the same in all would
        teach nothing).
      own: name to ``(weight, Term)``, applied to each student alone; by default
        ``{"hard": (1.0, kd.terms.hard_labels())}``.
      peers: name to ``(weight, Term)``, applied to each student and each other one in the
        teacher's place, averaged over these; by default
        ``{"soft": (1.0, kd.terms.soft_labels())}``, at temperature 1 as published.
      augment: ``(key, batch) -> batch`` inside the update; all students see the same images.

    Returns:
      A `Method` without teacher. Metrics: ``loss``, ``loss/<k>/<name>`` for a student's own terms,
      ``loss/<k>/<name>/<j>`` for what student k learns from j, and ``accuracy/<k>``. What a Term
      trains is at ``params["terms"][name]["<k>"]`` or ``["<k>/<j>"]``.

    Raises:
      TypeError: students are no sequence of `Model`, or a term no ``(weight, Term)`` pair.
      ValueError: fewer than two students, no terms, or a name in both ``own`` and ``peers``.

    Example:
      >>> import jax, optax, kdjax as kd
      >>> wide, deep = (kd.from_linen(kd.models.MLP(10, features=f)) for f in ((32,), (16, 16)))
      >>> learner = kd.minimize(kd.methods.mutual.mutual([wide, deep]), optax.sgd(0.1))
      >>> batch = next(iter(kd.data.digits().batches("train", 8, seed=0)))
      >>> state = learner.init(jax.random.key(0), batch)
      >>> state, metrics = jax.jit(learner.update)(state, batch)
      >>> [name for name in sorted(metrics) if "/0" in name]
      ['accuracy/0', 'loss/0/hard', 'loss/0/soft/1', 'loss/1/soft/0']

    Reference:
      Zhang et al., CVPR 2018, section 3, also for more than two students.
    """
    models = _checked(students)
    own = {"hard": (1.0, terms.hard_labels())} if own is None else own
    peers = {"soft": (1.0, terms.soft_labels())} if peers is None else peers
    own, peers = core.checked_terms(own), core.checked_terms(peers)
    for name in own.keys() & peers.keys():
        raise ValueError(f"peers must have other names than own, got {name!r} in both.")
    if augment is not None and not callable(augment):
        raise TypeError(
            f"augment must be a function (key, batch) -> batch, got {_checks.describe(augment)}."
        )
    # Who teaches whom by which term; nobody is the teacher of a student's own terms.
    lessons = [(k, None, name, *own[name]) for k in models for name in own] + [
        (k, j, name, *peers[name]) for k in models for name in peers for j in models if j != k
    ]

    def forward(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array
    ) -> tuple[dict[str, Outputs], Tree]:
        outputs: dict[str, Outputs] = {}
        states: dict[str, Tree] = {}
        for i, (k, model) in enumerate(models.items()):
            inputs, own_key = model.read(batch), jax.random.fold_in(key, i)
            outputs[k], states[k] = model.apply(
                params[k], extra[k], inputs, train=True, key=own_key
            )
        return outputs, states

    def init(key: jax.Array, batch: Batch, frozen: Tree = None) -> tuple[Tree, Tree]:
        student_key, terms_key = jax.random.split(key)
        if augment is not None:  # which may change shapes and entries
            batch = core.zeros(jax.eval_shape(augment, key, batch))
        params, extra = {}, {}
        for i, (k, model) in enumerate(models.items()):
            params[k], extra[k] = model.init(jax.random.fold_in(student_key, i), model.read(batch))
        outputs = core.zeros(jax.eval_shape(forward, params, extra, batch, student_key)[0])
        trained: dict[str, dict[str, Tree]] = {}
        for i, (k, j, name, _, term) in enumerate(lessons):
            teacher = {} if j is None else outputs[j]
            tree = term.init(jax.random.fold_in(terms_key, i), outputs[k], teacher)
            if jax.tree.leaves(tree):
                trained.setdefault(name, {})[_pair(k, j)] = tree
        return {"student": params} | ({"terms": trained} if trained else {}), {"student": extra}

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
        outputs, states = forward(params["student"], extra["student"], batch, student_key)
        taught = {k: jax.lax.stop_gradient(out) for k, out in outputs.items()}
        found: dict[str, Part] = {}
        for i, (k, j, name, weight, term) in enumerate(lessons):
            value = term.loss(
                params.get("terms", {}).get(name, {}).get(_pair(k, j), {}),
                outputs[k],
                {} if j is None else taught[j],
                batch,
                step=step,
                key=jax.random.fold_in(terms_key, i),
                **({"axis_name": axis_name} if term.coupled else {}),
            )
            label = f"{k}/{name}" if j is None else f"{k}/{name}/{j}"
            share = at(weight, step) / (1 if j is None else len(models) - 1)
            found[label] = part_of(label, share, value, term.coupled, batch, axis_name)
        tracked = {
            f"accuracy/{k}": part
            for k, out in outputs.items()
            for part in accuracy_of(out, batch).values()
        }
        return found, ({**extra, "student": states}, tracked)

    def prepare(
        params: Tree, extra: Tree, batch: Batch, frozen: Tree = None, *, key: jax.Array, **_: Any
    ) -> Batch:
        assert augment is not None
        return augment(key, batch)

    return core.from_parts(init, parts, prepare=None if augment is None else prepare)


def student_of(
    students: Sequence[Model], variables: Any, index: int
) -> tuple[Model, tuple[Tree, Tree]]:
    """One of the students, as any other trained model.

    Args:
      students: as `mutual` was given them.
      variables: the `State` of the training, or the ``(params, extra)`` of all students that
        `kdjax.train.load_student` reads from its checkpoint.
      index: which one, from 0.

    Returns:
      ``(model, (params, extra))``: what `kdjax.train.evaluate` takes, and `kdjax.distill` as
      teacher and ``frozen``.

    Raises:
      ValueError: no such student, or variables of something else.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kdjax as kd
      >>> students = [kd.from_linen(kd.models.MLP(10, features=(n,))) for n in (16, 32)]
      >>> learner = kd.minimize(kd.methods.mutual.mutual(students), optax.sgd(0.1))
      >>> batch = {"image": jnp.zeros((2, 8, 8, 1)), "label": jnp.array([3, -1])}
      >>> state = learner.init(jax.random.key(0), batch)
      >>> model, (params, extra) = kd.methods.mutual.student_of(students, state, 1)
      >>> model.apply(params, extra, batch["image"])[0]["logits"].shape
      (2, 10)
    """
    models = _checked(students)
    k = str(_checks.count("index", index, low=0, high=len(models) - 1))
    params, extra = _all(models, variables)
    return models[k], (params[k], extra[k])


def together(students: Sequence[Model]) -> Model:
    """All students as one model, of the variables that a State of `mutual` has.

    Args:
      students: as `mutual` was given them.

    Returns:
      A `Model` whose ``logits`` are the log of the mean of their predictions, with the outputs of
      student k as ``"<k>/<name>"``. It reads the batch, and takes ``params["student"]`` and
      ``extra["student"]``: ``kd.train.evaluator(together(students), batches)`` serves as
      ``fit(evaluate=...)``. It is for evaluation only.

    Raises:
      TypeError: students are no sequence of `Model`.
      ValueError: fewer than two students.

    Example:
      >>> import kdjax as kd
      >>> def first_right(outputs, batch):
      ...     return (outputs["0/logits"].argmax(-1) == batch["label"]).astype(float)
      >>> def held_out(students, batches):
      ...     model = kd.methods.mutual.together(students)
      ...     return kd.train.evaluator(model, batches, metrics={"accuracy/0": first_right})
    """
    models = _checked(students)
    joint = ensemble(tuple(models.values()))

    def init(key: jax.Array, inputs: Batch) -> tuple[Tree, Tree]:
        found, _ = joint.init(key, inputs)
        pairs = dict(zip(models, found, strict=True))
        return {k: pair[0] for k, pair in pairs.items()}, {k: pair[1] for k, pair in pairs.items()}

    def apply(
        params: Tree, extra: Tree, inputs: Batch, *, train: bool = False, key: Any = None
    ) -> tuple[dict[str, Any], Tree]:
        if train:
            raise ValueError("train must be False: students that learn together do so by mutual.")
        outputs, _ = joint.apply([(params[k], extra[k]) for k in models], {}, inputs)
        return outputs, extra

    return Model(init, apply, joint.inputs)


def _checked(students: Any) -> dict[str, Model]:
    """The students by their names in the State."""
    if isinstance(students, Model) or not isinstance(students, Sequence):
        raise TypeError(
            f"students must be a sequence of kdjax.Model, got {_checks.describe(students)}."
        )
    for i, model in enumerate(students):
        core.check_model(f"students[{i}]", model)
    if len(students) < 2:
        raise ValueError(f"students must hold at least two models, got {len(students)}.")
    return {str(i): model for i, model in enumerate(students)}


def _all(models: Mapping[str, Model], variables: Any) -> tuple[Tree, Tree]:
    if isinstance(variables, State):
        params, extra = variables.params.get("student"), variables.extra.get("student")
    else:
        try:
            params, extra = pair_of(variables)
        except ValueError:
            params = extra = None
    for found in (params, extra):
        if not isinstance(found, Mapping) or set(found) != set(models):
            raise ValueError(
                f"variables must be those of {len(models)} students that were trained together, "
                "a State or (params, extra) with an entry for each, got "
                f"{_checks.describe(variables)}."
            )
    return params, extra


def _pair(k: str, j: str | None) -> str:
    return k if j is None else f"{k}/{j}"
