"""CRD: contrastive representation distillation, with a memory of every example's embedding.

Linear layers make embeddings of the student's and of the teacher's features. The student's
embedding of an example has to be told apart, by noise-contrastive estimation, as that of the
teacher's embedding of the same example among many of other examples, and the other way round. The
others come from two banks, which hold a running mean of each example's embedding; so a data set has
a fixed number of examples, and a batch its ``index`` in it.

``extra["crd"]`` holds the banks ``student`` and ``teacher`` [examples, features], ``log_z``, the
logarithms of the two normalisers, which the first update sets and none changes, and whether they
are ``started``. ``params["terms"]["crd"]`` holds the two layers, which are trained. What is
deployed is ``params["student"]`` alone.

Reference:
  Y. Tian, D. Krishnan, P. Isola, "Contrastive Representation Distillation", ICLR 2020 (arXiv
  1910.10699), and its published code (RepDistiller).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import _checks, losses
from kdjax._pairs import Batch, Method, Model, Outputs, Part, Term, Tree
from kdjax._parts import finite_padding, part_of
from kdjax._teachers import teach, whole_batch
from kdjax.core import distill, from_parts
from kdjax.losses._contrastive import nce
from kdjax.losses._relations import gathered, unit
from kdjax.terms._connectors import counted, linear
from kdjax.terms._outputs import Number, at, checked
from kdjax.terms._relations import Pool, checked_pools, embedding_init, vectors

__all__ = ["crd"]

Augment = Callable[[jax.Array, Batch], Batch]
Terms = Mapping[str, tuple[Number, Term]]
_NAME, _TAUGHT = "crd", "_teacher_outputs"
_PRECISION = jax.lax.Precision.HIGHEST


def crd(
    student: Model,
    teacher: Model,
    terms: Terms,
    *,
    student_tap: str,
    teacher_tap: str,
    examples: int,
    weight: Number = 0.8,
    features: int = 128,
    negatives: int = 16384,
    temperature: Number = 0.07,
    momentum: Number = 0.5,
    labels: ArrayLike | None = None,
    augment: Augment | None = None,
    student_pool: Pool = losses.pool,
    teacher_pool: Pool = losses.pool,
) -> Method:
    """`kdjax.distill` with the terms given, and CRD.

    For an example i with the embeddings v of length 1, its negatives j_1 ... j_K and the banks m::

        P_k = exp(v_student . m_teacher[j_k] / T) / Z_student,   j_0 = i,   c = K / examples
        l_i = -log(P_0 / (P_0 + c)) - sum_{k>0} log(c / (P_k + c))
              + the same of v_teacher and m_student

    (`kdjax.losses.nce`), not divided by K. Z is ``examples * mean of exp`` over the first batch, a
    constant. After the scores, ``m[i] = l2(momentum m[i] + (1 - momentum) v)`` in both banks.

    Negatives are drawn with replacement, for each example by a key of its own ``index``, so that it
    doesn't matter how a batch is split over devices. They are never the example itself; those of
    the published code can be, where it draws them itself. Its CIFAR-100 figures are of negatives
    from other classes (drawn without replacement), for which pass ``labels``. A batch entry
    ``negatives`` [B, K] replaces the draw. Where a batch has an index twice, the last of the rows
    is written into the banks. Rows of weight 0 neither count nor are written.

    Memory: two banks of 4 * examples * features bytes (26 MB each for CIFAR-100), and the scores.
    Those are of all examples, [B, examples], or of the chosen rows, [B, 1 + K, features], whichever
    is smaller. On CIFAR-100 a side takes 47 MB for scores and gradient of a batch of 64, where the
    chosen rows alone are 537 MB. Under a named axis (shard_map, pmap) the banks are also averaged
    over the devices in each update.

    Args:
      student: the model that is trained.
      teacher: the model that is imitated, an `kdjax.ensemble`, or `kdjax.from_batch`.
      terms: name to ``(weight, Term)``, at least one, none named "crd". Published: the hard labels
        with weight 1.
      student_tap: the student's output to embed; the features before the classifier.
      teacher_tap: the teacher's.
      examples: how many examples the data set has; ``batch["index"]`` is from 0 to one less.
      weight: of CRD: a number, an array or a schedule of the step, like the next numbers marked so.
      features: width of the embeddings.
      negatives: K, how many negatives an example has.
      temperature: T, above 0; also an array or a schedule. Z stays that of the first update.
      momentum: how much of a bank's row stays, from 0 to 1; also an array or a schedule.
      labels: [examples] integers from 0, the classes: negatives are then of other classes.
      augment: as in `kdjax.distill`.
      student_pool: from the output to [B, D]; by default the mean over positions.
      teacher_pool: the same for the teacher.

    Returns:
      A `Method`, whose metrics are those of `kdjax.distill` and ``loss/crd``. It can't be split
      into microbatches, as every update reads the banks as they are before it.

    Raises:
      TypeError: a model is no `Model`, labels are not integers, or a number is no number.
      ValueError: a term is named "crd", a number is out of its range, or a class has all examples;
        in ``init`` and outside of jit, a batch without ``index`` or with one out of range. In a
        compiled update an index out of range gives a loss of NaN and isn't written.

    Example:
      >>> import jax, optax, kdjax as kd
      >>> digits = kd.data.digits()
      >>> student = kd.from_linen(kd.models.MLP(10, features=(16,)), taps={"pool": "pool"})
      >>> teacher = kd.from_linen(kd.models.MLP(10, features=(32,)), taps={"pool": "pool"})
      >>> method = kd.methods.crd.crd(
      ...     student, teacher, {"hard": (1.0, kd.terms.hard_labels())},
      ...     student_tap="pool", teacher_tap="pool",
      ...     examples=digits.size("train"), features=8, negatives=64,
      ...     augment=kd.augment.compose(kd.augment.to_float),
      ... )
      >>> learner = kd.minimize(method, optax.sgd(0.05))
      >>> batch = next(iter(digits.batches("train", 8, seed=0)))
      >>> frozen = teacher.init(jax.random.key(1), batch["image"])
      >>> state = learner.init(jax.random.key(0), batch, frozen)
      >>> state, metrics = jax.jit(learner.update)(state, batch, frozen)
      >>> sorted(metrics)
      ['accuracy', 'loss', 'loss/crd', 'loss/hard']

    Reference:
      Tian et al., ICLR 2020, section 3, by the published code.
    """
    start = distill(student, teacher, terms, augment=augment).init
    if teacher is None:
        raise TypeError("teacher must be a kdjax.Model: CRD compares with its features, got None.")
    if _NAME in terms:
        raise ValueError(f"terms must have names other than {_NAME!r}, which is the method's own.")
    examples = _checks.count("examples", examples, low=2)
    features = _checks.count("features", features)
    negatives = _checks.count("negatives", negatives)
    checked("weight", weight)
    checked("temperature", temperature, above=0)
    checked("momentum", momentum, low=0, high=1)
    checked_pools(student_pool, teacher_pool)
    classes = None if labels is None else _classes(labels, examples)
    # The base sees the outputs that the teacher gave already, and hands on the student's.
    base = distill(_recorded(student), Model(teacher.init, _handed, whole_batch), terms)
    assert base.parts is not None
    base_parts = base.parts

    def embedded(student_out: Outputs, teacher_out: Outputs) -> tuple[jax.Array, jax.Array]:
        s = vectors("student", student_pool, student_out, student_tap)
        return s, vectors("teacher", teacher_pool, teacher_out, teacher_tap)

    def init(key: jax.Array, batch: Batch, frozen: Tree = None) -> tuple[Tree, Tree]:
        _rows(batch, examples)
        base_key, layer_key, bank_key = jax.random.split(key, 3)
        params, extra = start(base_key, batch, frozen)

        def taps(params: Tree, extra: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
            batch = batch if augment is None else augment(key, batch)
            inputs = student.read(batch)
            outputs, _ = student.apply(
                params["student"], extra["student"], inputs, train=True, key=key
            )
            return embedded(outputs, teach(teacher, frozen, batch))

        s, t = jax.eval_shape(taps, params, extra, batch)
        own = {_NAME: embedding_init(layer_key, s, t, features)}
        banks = _new_banks(bank_key, examples, features, classes)
        return {**params, "terms": {**params.get("terms", {}), **own}}, {**extra, _NAME: banks}

    def prepare(
        params: Tree, extra: Tree, batch: Batch, frozen: Tree = None, *, key: jax.Array, **_: Any
    ) -> Batch:
        augment_key, draw_key = jax.random.split(key)
        index = _rows(batch, examples)[0]
        if "negatives" in batch:
            chosen = _checks.integer("batch['negatives']", batch["negatives"])
            _checks.shape("batch['negatives']", chosen, (len(index), negatives))
        else:
            groups = extra[_NAME].get("classes")
            chosen = _drawn(draw_key, index, negatives, examples, groups)
        batch = batch if augment is None else augment(augment_key, batch)
        return {**batch, "negatives": chosen}

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
        taught = teach(teacher, frozen, batch)
        found, (new, tracked) = base_parts(
            params, extra, {**batch, _TAUGHT: taught}, step=step, key=key, axis_name=axis_name
        )
        own, outputs = new["student"]
        where, *tapped = counted(batch, *embedded(outputs, taught))
        layers = params["terms"][_NAME]
        vs, vt = (
            unit(linear(layers[side], x))
            for side, x in zip(("student", "teacher"), tapped, strict=True)
        )
        index, known = _rows(batch, examples)
        kept = known if where is None else known & where
        memory = extra[_NAME]
        chosen = jnp.concatenate([index[:, None], jnp.asarray(batch["negatives"])], axis=1)
        scores = {
            side: _scores(v, memory[other], chosen) / at(temperature, step)
            for side, v, other in (("student", vs, "teacher"), ("teacher", vt, "student"))
        }
        log_z = {
            side: jnp.where(
                memory["started"], memory["log_z"][side], _log_z(x, kept, examples, axis_name)
            )
            for side, x in scores.items()
        }
        values = sum(nce(x - log_z[side], examples=examples) for side, x in scores.items())
        values = jnp.where(known & _in_range(chosen, examples), values, jnp.nan)
        mean = part_of(_NAME, 1.0, values, False, batch, axis_name).mean(axis_name)
        # Given as coupled: slices of a batch would each move the banks that the next one reads.
        found[_NAME] = Part(at(weight, step), mean, None)
        some = jnp.any(gathered(kept, axis_name))
        memory = {
            **memory,
            "log_z": {k: jnp.where(some, z, memory["log_z"][k]) for k, z in log_z.items()},
            "started": memory["started"] | some,
            **_written(memory, (vs, vt), index, kept, at(momentum, step), axis_name),
        }
        return found, (
            {**new, "student": own, _NAME: jax.lax.stop_gradient(memory)},
            tracked,
        )

    return from_parts(init, parts, prepare=prepare)


def _recorded(student: Model) -> Model:
    """The student, whose ``extra`` becomes ``(extra, outputs)``."""

    def apply(params: Tree, extra: Tree, inputs: Any, **keywords: Any) -> tuple[Any, Tree]:
        outputs, extra = student.apply(params, extra, inputs, **keywords)
        return outputs, (extra, outputs)

    return student._replace(apply=apply)


def _handed(params: Tree, extra: Tree, batch: Batch, **_: Any) -> tuple[Any, Tree]:
    return batch[_TAUGHT], extra


def _new_banks(key: jax.Array, examples: int, features: int, classes: Tree | None) -> Tree:
    """Rows about as long as embeddings, uniform as in the published code; no normalisers yet."""
    bound = (features / 3) ** -0.5
    student, teacher = (
        jax.random.uniform(k, (examples, features), jnp.float32, -bound, bound)
        for k in jax.random.split(key)
    )
    banks = {
        "student": student,
        "teacher": teacher,
        "log_z": {"student": jnp.zeros(()), "teacher": jnp.zeros(())},
        "started": jnp.zeros((), bool),
    }
    return banks | ({} if classes is None else {"classes": jax.tree.map(jnp.array, classes)})


def _classes(labels: ArrayLike, examples: int) -> dict[str, np.ndarray]:
    """Examples in the order of their classes, and where each class starts."""
    _checks.integer("labels", labels, ndim=1)
    found = np.asarray(labels)  # as given: in a trace a check hands back a tracer
    _checks.shape("labels", found, (examples,), "(one per example)")
    if found.min() < 0:
        raise ValueError(f"labels must be classes from 0, got {found.min()}.")
    sizes = np.bincount(found)
    if sizes.max() == examples:
        raise ValueError("labels must have at least 2 classes, so that there are negatives, got 1.")
    return {
        "label": found.astype(np.int32),
        "order": np.argsort(found, kind="stable").astype(np.int32),
        "start": (np.cumsum(sizes) - sizes).astype(np.int32),
        "size": sizes.astype(np.int32),
    }


def _rows(batch: Batch, examples: int) -> tuple[jax.Array, jax.Array]:
    """Each row's place in the banks [B], and whether there is one (unknown before the run)."""
    hint = "CRD keeps a memory of each example, at its position in the data set."
    index = _checks.integer("batch['index']", _checks.entry("batch", batch, "index", hint), ndim=1)
    counts = batch.get("weight")
    if not (_checks.is_traced(index) or _checks.is_traced(counts)):
        seen = np.asarray(index) if counts is None else np.asarray(index)[np.asarray(counts) > 0]
        wrong = seen[(seen < 0) | (seen >= examples)]
        if wrong.size:
            raise ValueError(
                f"batch['index'] must be from 0 to {examples - 1}, as examples={examples}, got "
                f"{wrong[0]}."
            )
    known = (index >= 0) & (index < examples)
    return jnp.clip(index, 0, examples - 1).astype(jnp.int32), known


def _in_range(chosen: jax.Array, examples: int) -> jax.Array:
    return jnp.all((chosen >= 0) & (chosen < examples), axis=1)


def _drawn(
    key: jax.Array, index: jax.Array, number: int, examples: int, classes: Tree | None
) -> jax.Array:
    """[B, number] other examples, evenly from all of them or from those of other classes."""

    def draw(i: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, i)
        if classes is None:
            drawn = jax.random.randint(own, (number,), 0, examples - 1)
            return drawn + (drawn >= i)
        label = classes["label"][i]
        start, size = classes["start"][label], classes["size"][label]
        drawn = jax.random.randint(own, (number,), 0, examples - size)
        return classes["order"][jnp.where(drawn >= start, drawn + size, drawn)]

    return jax.vmap(draw)(index)


def _scores(v: jax.Array, bank: jax.Array, chosen: jax.Array) -> jax.Array:
    """[B, 1 + K]: embeddings [B, F] times the chosen rows of a bank [examples, F]."""
    bank = jax.lax.stop_gradient(bank).astype(jnp.promote_types(bank.dtype, v.dtype))
    chosen = jnp.clip(chosen, 0, bank.shape[0] - 1)
    if bank.shape[0] <= chosen.shape[1] * bank.shape[1]:
        every = jnp.matmul(v, bank.T, precision=_PRECISION)
        return jnp.take_along_axis(every, chosen, axis=1)
    return jnp.einsum("bf,bkf->bk", v, bank[chosen], precision=_PRECISION)


def _log_z(scores: jax.Array, kept: jax.Array, examples: int, axis_name: str | None) -> jax.Array:
    """The logarithm of ``examples * mean of exp(scores)`` over the rows kept, of all devices."""
    scores = jnp.where(kept[:, None], jax.lax.stop_gradient(scores), -jnp.inf)
    largest, count = jnp.max(scores), jnp.sum(kept)
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    total = jnp.sum(jnp.exp(scores - largest))
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    mean = jnp.where(count > 0, total / (jnp.maximum(count, 1) * scores.shape[1]), 1)
    return largest + jnp.log(mean) + jnp.log(jnp.asarray(examples, scores.dtype))


def _written(
    memory: Tree,
    embeddings: tuple[jax.Array, jax.Array],
    index: jax.Array,
    kept: jax.Array,
    momentum: Any,
    axis_name: str | None,
) -> dict[str, jax.Array]:
    """Both banks after the rows of all devices; of rows with the same index the last counts."""
    index, kept = gathered(index, axis_name), gathered(kept, axis_name)
    place = jnp.arange(index.shape[0])
    outside = memory["student"].shape[0]
    last = jnp.full(outside, -1).at[jnp.where(kept, index, outside)].max(place, mode="drop")
    target = jnp.where(kept & (last[index] == place), index, outside)
    written = {}
    for side, v in zip(("student", "teacher"), embeddings, strict=True):
        bank = memory[side]
        new = gathered(jax.lax.stop_gradient(v), axis_name)
        new = unit(momentum * bank[index] + (1 - momentum) * new)
        written[side] = bank.at[target].set(new.astype(bank.dtype), mode="drop")
    return written
