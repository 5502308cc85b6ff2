"""Several teachers, weighted by a schedule, by training, or example by example.

The Terms here read the logits that `kdjax.ensemble` has of each of its teachers, and go with any
others in `kdjax.distill`:

- `mixture`: the mixture of the teachers' softened predictions, with given weights, also scheduled;
- `learned`: the same with one trained weight for each teacher;
- `confident`: each example trusts the teachers that are right about it (CA-MKD).

Weights must not be trained by the student's own loss. Its minimum over them is the teacher whom
the student already agrees with, so that they collapse onto the one that is easiest to imitate, not
the one that is right. `learned` therefore trains them on the labels, and no gradient of the
student's loss reaches them.

Reference:
  H. Zhang, D. Chen, C. Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation", ICASSP 2022
  (arXiv 2201.00007), and its published code, for `confident`; G. Hinton, O. Vinyals, J. Dean,
  "Distilling the Knowledge in a Neural Network", 2015, section 2, for the mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks, losses, terms
from kdjax._pairs import Batch, Method, Model, Outputs, Schedule, State, Term, Tree
from kdjax.core import distill, ensemble
from kdjax.terms import at
from kdjax.terms._outputs import Number, checked, labelled, no_params, student_output

__all__ = ["confident", "learned", "mixture", "multi_teacher", "shares"]

Weights = Sequence[Number] | jax.Array | Schedule | None


def multi_teacher(
    student: Model,
    teachers: Sequence[Model],
    *,
    soft: Term | None = None,
    hard_weight: Number = 0.1,
    soft_weight: Number = 0.9,
    augment: Callable[[jax.Array, Batch], Batch] | None = None,
) -> Method:
    """A Method that distils several teachers into one student.

        hard_weight * CE(y, p) + soft_weight * L_soft

    Args:
      student: the model that is trained.
      teachers: at least one.
      soft: `mixture`, `learned` or `confident`; by default ``mixture(temperature=4.0)``, of equal
        weights.
      hard_weight: of the labels; a number, an array or a schedule.
      soft_weight: of ``soft``.
      augment: ``(key, batch) -> batch`` inside the update.

    Returns:
      A `Method` whose ``frozen`` is the list of the teachers' variables. Metrics: ``loss``,
      ``loss/hard``, ``loss/soft`` and ``accuracy``.

    Raises:
      TypeError: not models, or ``soft`` is no `Term`.
      ValueError: there are no teachers.

    Example:
      >>> import jax, optax, kdjax as kd
      >>> student = kd.from_linen(kd.models.MLP(10, features=(16,)))
      >>> teachers = [kd.from_linen(kd.models.MLP(10, features=(n,))) for n in (32, 64)]
      >>> multi = kd.methods.multi_teacher
      >>> method = multi.multi_teacher(student, teachers, soft=multi.learned(temperature=4.0))
      >>> learner = kd.minimize(method, optax.sgd(0.1))
      >>> batch = next(iter(kd.data.digits().batches("train", 8, seed=0)))
      >>> frozen = [t.init(jax.random.key(i), batch["image"]) for i, t in enumerate(teachers)]
      >>> state = learner.init(jax.random.key(2), batch, frozen)
      >>> multi.shares(state)
      Array([0.5, 0.5], dtype=float32)
      >>> state, metrics = jax.jit(learner.update)(state, batch, frozen)
    """
    if isinstance(teachers, Model) or not isinstance(teachers, Sequence):
        raise TypeError(
            f"teachers must be a sequence of kdjax.Model, got {_checks.describe(teachers)}."
        )
    soft = mixture(temperature=4.0) if soft is None else soft
    pairs = {"hard": (hard_weight, terms.hard_labels()), "soft": (soft_weight, soft)}
    return distill(student, ensemble(teachers), pairs, augment=augment)


def mixture(*, weights: Weights = None, temperature: Number = 1.0) -> Term:
    """Soft labels of the mixture of several teachers, softened before they are mixed.

        T^2 * KL(sum_i w_i softmax(t_i / T) || softmax(s / T))

    Its gradient is that of the weighted sum of the teachers' own losses. (Soft labels of
    `kdjax.ensemble` mix first and soften then.)

    Args:
      weights: one for each teacher, non-negative, normalised here: numbers or schedules of the
        step, an array [K], or one schedule with values [K]. Equal by default.
      temperature: T > 0; a number, an array or a schedule.

    Returns:
      A `Term` for a teacher made by `kdjax.ensemble`.

    Raises:
      ValueError: a number out of its range; at its first use, another number of weights, or no
        ensemble.

    Example:
      >>> import optax, kdjax as kd
      >>> first = optax.linear_schedule(1.0, 0.0, 1000)  # later on, only the second teacher
      >>> term = kd.methods.multi_teacher.mixture(weights=[first, 1.0], temperature=4.0)
    """
    checked("temperature", temperature, above=0)
    if weights is not None and not callable(weights):
        if isinstance(weights, (str, dict)) or not hasattr(weights, "__len__"):
            raise TypeError(
                f"weights must be one for each teacher, got {_checks.describe(weights)}."
            )
        each = [weights] if hasattr(weights, "dtype") else weights
        for i, weight in enumerate(each):
            name = "weights" if hasattr(weights, "dtype") else f"weights[{i}]"
            checked(name, weight, low=0, scalar=not hasattr(weights, "dtype"))
        known = [weight for weight in each if not callable(weight)]
        if (
            len(known) == len(each)
            and not any(map(_checks.is_traced, known))
            and not any(jnp.any(jnp.asarray(weight) > 0) for weight in known)
        ):
            raise ValueError("weights must not all be 0.")

    def loss(
        tparams: Tree,
        student_out: Outputs,
        teacher_out: Outputs,
        batch: Batch,
        *,
        step: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        logits = _teachers(teacher_out)
        share = _shares_at(weights, step, len(logits))
        return _soft(student_output(student_out, "logits"), logits, share, at(temperature, step))

    return Term(no_params, loss)


def learned(*, temperature: Number = 1.0, entropy: Number = 0.1, label: str = "label") -> Term:
    """`mixture` with one trained weight for each teacher, the softmax of its logits.

        T^2 * KL(stop(sum_i w_i softmax(t_i / T)) || softmax(s / T))
          + labelled * (-log sum_i w_i softmax(t_i)_y - entropy * H(w))

    The student learns from the first term only, the weights from the second only: they maximise
    the likelihood of the labels under the mixture, a concave problem, and go to the teachers
    that are right. On data that the teachers have themselves been trained on, that is the one that
    has learned it by heart, and without the entropy all weight ends there: keep it, or train the
    weights on labels that no teacher has seen.

    Args:
      temperature: T > 0; a number, an array or a schedule. The likelihood is at temperature 1.
      entropy: how much equal weights are preferred, at least 0.
      label: batch entry with labels (or probabilities); rows without a label don't train weights.

    Returns:
      A `Term` for a teacher made by `kdjax.ensemble`; its parameters are ``{"weights": [K]}``,
      zeros at first, and `shares` reads them. Its value is the sum of both terms.

    Raises:
      ValueError: a number out of its range; at its first use, no ensemble.

    Example:
      >>> import kdjax as kd
      >>> term = kd.methods.multi_teacher.learned(temperature=4.0, entropy=0.1)

    Reference:
      Our construction; the weights are those of a linear opinion pool fitted by likelihood.
    """
    checked("temperature", temperature, above=0)
    checked("entropy", entropy, low=0)

    def init(key: jax.Array, student_out: Outputs, teacher_out: Outputs) -> Tree:
        return {"weights": jnp.zeros(len(_teachers(teacher_out)), jnp.float32)}

    def loss(
        tparams: Tree,
        student_out: Outputs,
        teacher_out: Outputs,
        batch: Batch,
        *,
        step: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        logits = _teachers(teacher_out)
        log_share = jax.nn.log_softmax(tparams["weights"])
        share = jnp.exp(log_share)
        student = student_output(student_out, "logits")
        values = _soft(student, logits, share, at(temperature, step))
        target = jnp.asarray(_checks.entry("batch", batch, label))
        likelihood = losses.hard_label_cross_entropy(_mixed(logits, share), target)
        spread = -jnp.sum(share * log_share)
        return values + likelihood - jnp.where(labelled(target), at(entropy, step) * spread, 0)

    return Term(init, loss)


def confident(*, temperature: Number = 4.0, label: str = "label") -> Term:
    """Each example's own weights, larger for teachers that are right about it (CA-MKD).

        sum_i w_i T^2 KL(softmax(t_i / T) || softmax(s / T)),
        w_i = (1 - softmax_i(CE_i)) / (K - 1),   CE_i = -log softmax(t_i)_y

    The published code divides by the number of teachers once more: its weight 1 is 1 / K here. Its
    loss on features isn't part of this Term.

    Args:
      temperature: T > 0; a number, an array or a schedule. 4 in the published code.
      label: batch entry with labels (or probabilities). Rows without a label have equal weights.

    Returns:
      A `Term` for a teacher made by `kdjax.ensemble` of at least two.

    Raises:
      ValueError: a number out of its range; at its first use, no ensemble, or one of a single
        teacher.

    Example:
      >>> import kdjax as kd
      >>> term = kd.methods.multi_teacher.confident(temperature=4.0)

    Reference:
      Zhang et al., ICASSP 2022, the weights and the loss of the predictions, by the published code.
    """
    checked("temperature", temperature, above=0)

    def loss(
        tparams: Tree,
        student_out: Outputs,
        teacher_out: Outputs,
        batch: Batch,
        *,
        step: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        logits = _teachers(teacher_out)
        if len(logits) < 2:
            raise ValueError("teacher must be an ensemble of at least two models, got one.")
        target = jnp.asarray(_checks.entry("batch", batch, label))
        wrong = jnp.stack([losses.hard_label_cross_entropy(t, target) for t in logits])
        invalid = jnp.isnan(wrong).any(0)  # a label that is no class, which may be padding
        share = 1 - jax.nn.softmax(jnp.where(invalid, 0, wrong), axis=0)
        share = jax.lax.stop_gradient(share / (len(logits) - 1))
        student, scale = student_output(student_out, "logits"), at(temperature, step)
        each = [losses.soft_label_kl(student, t, temperature=scale) for t in logits]
        return jnp.where(invalid, jnp.nan, (share * jnp.stack(each)).sum(0))

    return Term(no_params, loss)


def shares(state: State, *, name: str = "soft") -> jax.Array:
    """The trained weights of the teachers.

    Args:
      state: of a Method with a `learned` Term.
      name: the Term's name there.

    Returns:
      [K], non-negative, with sum 1.

    Raises:
      ValueError: the State has no such Term.

    Example: see `multi_teacher`.
    """
    found = _checks.entry("the terms of state", state.params.get("terms", {}), name)
    return jax.nn.softmax(_checks.entry(f"the term {name!r}", found, "weights"))


def _teachers(outputs: Outputs) -> jax.Array:
    """Logits [K, ..., C] of every teacher of an ensemble."""
    found: list[jax.Array] = []
    while f"{len(found)}/logits" in outputs:
        found.append(_checks.floating("teacher_logits", outputs[f"{len(found)}/logits"]))
    if not found:
        raise ValueError(
            "teacher must be made by kdjax.ensemble, which has the logits of each of its models "
            f"as '0/logits', ...; its outputs are {', '.join(sorted(outputs)) or 'none'}."
        )
    for i, one in enumerate(found[1:], 1):
        _checks.same_shape(f"logits of teacher {i}", one, "teacher 0", found[0])
    return jnp.stack(found)


def _shares_at(weights: Weights, step: jax.Array, count: int) -> jax.Array:
    """Normalised weights [K] at a step."""
    if weights is None:
        return jnp.full(count, 1 / count)
    if callable(weights) or hasattr(weights, "dtype"):
        found = jnp.asarray(at(weights, step), jnp.float32)
    else:
        found = jnp.stack([jnp.asarray(at(weight, step), jnp.float32) for weight in weights])
    _checks.shape("weights", found, (count,), "for as many teachers")
    return found / found.sum()


def _mixed(logits: jax.Array, share: jax.Array) -> jax.Array:
    """The log of the weighted mean of softmax(logits) [K, ..., C] over the teachers."""
    share = share.reshape((-1,) + (1,) * (logits.ndim - 1)).astype(logits.dtype)
    return jax.scipy.special.logsumexp(jax.nn.log_softmax(logits), axis=0, b=share)


def _soft(student: jax.Array, logits: jax.Array, share: jax.Array, temperature: Any) -> jax.Array:
    """Soft labels of the mixture of the softened teachers; no gradient to the shares."""
    scale = jnp.asarray(temperature, logits.dtype)
    target = scale * _mixed(logits / scale, share)
    return losses.soft_label_kl(student, target, temperature=temperature)
