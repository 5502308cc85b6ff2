"""Terms that run the student's features through the teacher's classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax._pairs import Batch, Outputs, Term, Tree
from kdjax.losses._features import pool
from kdjax.terms._connectors import (
    batch_norm,
    counted,
    linear,
    linear_init,
    mean_of_batch,
    norm_init,
)
from kdjax.terms._outputs import EXPOSE, student_output, teacher_output
from kdjax.terms._stages import checked_scope, statistics_axis


def srrl(
    student_tap: str,
    teacher_tap: str,
    *,
    head: str = "head",
    logits: str = "logits",
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    scope: str = "global",
) -> Term:
    """Softmax regression representation learning (SRRL): features that the teacher can classify.

        z = pool(relu(bn(s W)))
        mean over examples of  mean((z - pool(t))^2) + mean((head(z) - logits_t)^2)

    with the teacher's own classifier as head. W is a 1x1 convolution without bias, on maps before
    they are averaged over positions (the authors' code), on features [B, C] as they are
    (SimKD's code of the method). Published weight 1, of both summands together, beside weight 1 of
    the hard labels (the authors' ImageNet code), and of soft labels at temperature 4 (SimKD's
    CIFAR-100 script).

    Args:
      student_tap: the student's output, maps [B, H, W, C] or features [B, C].
      teacher_tap: the teacher's features that its classifier reads, [B, D] or maps before their
        average.
      head: the teacher's output with the classifier's parameters, ``{"kernel": [D, classes],
        "bias": [classes]}``: the adapter's ``expose={"head": "classifier"}``.
      logits: the teacher's output of logits.
      activation: after the connector. The default fits features after a ReLU, as published; pass
        ``lambda z: z`` for those of any sign.
      scope: ``"global"``, batch normalisation by the whole batch, of all devices; ``"device"``, by
        each device's own rows.

    Returns:
      A batch-coupled `Term`, the mean over the rows of non-zero weight. Its parameters are the
      connector's, trained with the student and no part of it.

    Raises:
      ValueError: an unknown scope; when it is started, a head that doesn't fit the teacher's
        features.

    Example:
      >>> import kdjax as kd
      >>> teacher = kd.from_linen(
      ...     kd.models.resnet20(10), taps={"feat": "pool"}, expose={"head": "classifier"}
      ... )
      >>> term = kd.terms.srrl("stage3", "feat")

    Reference:
      J. Yang, B. Martinez, A. Bulat, G. Tzimiropoulos, "Knowledge Distillation via Softmax
      Regression Representation Learning", ICLR 2021, equations 2 and 4.
    """
    scope = checked_scope(scope)
    if not callable(activation):
        raise TypeError(f"activation must be a function, got {_checks.describe(activation)}.")

    def features(student_out: Outputs, teacher_out: Outputs) -> tuple[jax.Array, jax.Array]:
        s, t = student_output(student_out, student_tap), teacher_output(teacher_out, teacher_tap)
        s = _checks.floating(f"the student's output {student_tap!r}", s, min_ndim=2)
        return s, jax.lax.stop_gradient(pool(t))

    def init(key: jax.Array, student_out: Outputs, teacher_out: Outputs) -> Tree:
        s, t = features(student_out, teacher_out)
        classify(classifier(teacher_out, head), t)
        width = t.shape[1]
        made = linear_init(key, s.shape[-1], width, bias=False)
        return {"linear": made, "norm": norm_init(width)}

    def loss(
        tparams: Tree,
        student_out: Outputs,
        teacher_out: Outputs,
        batch: Batch,
        *,
        step: jax.Array,
        key: jax.Array,
        axis_name: Any = None,
    ) -> jax.Array:
        s, t = features(student_out, teacher_out)
        target = _checks.floating("the teacher's logits", teacher_output(teacher_out, logits))
        where, *found = counted(batch, s, t, jax.lax.stop_gradient(target))
        s, t, target = found
        z = linear(tparams["linear"], s)
        axis = statistics_axis(scope, axis_name)
        z = pool(activation(batch_norm(tparams["norm"], z, axis_name=axis, where=where)))
        answer = classify(classifier(teacher_out, head), z)
        _checks.same_shape("the teacher's logits", target, "what its head returns", answer)
        values = jnp.mean((z - t) ** 2, axis=1) + jnp.mean((answer - target) ** 2, axis=1)
        return mean_of_batch(values, where, axis_name)

    return Term(init, loss, coupled=True)


def classifier(teacher_out: Outputs, head: str) -> dict[str, jax.Array]:
    """The parameters of the teacher's classifier, in at least float32 and without gradient."""
    given = teacher_output(teacher_out, head, EXPOSE)
    if not isinstance(given, Mapping) or "kernel" not in given:
        raise ValueError(
            f"the teacher's output {head!r} must be a linear layer's parameters, kernel and bias, "
            "such as the adapter's expose={'head': 'classifier'} hands out, got "
            f"{_checks.describe(given)}."
        )
    found = {"kernel": _checks.floating(f"the kernel of {head!r}", given["kernel"], ndim=2)}
    if "bias" in given:
        found["bias"] = _checks.floating(f"the bias of {head!r}", given["bias"], ndim=1)
    return jax.lax.stop_gradient(found)


def classify(params: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    """Logits [B, classes] of features [B, D]."""
    if features.shape[1] != params["kernel"].shape[0]:
        raise ValueError(
            f"the teacher's head must read {features.shape[1]} features like those tapped, got a "
            f"kernel of shape {tuple(params['kernel'].shape)}."
        )
    return linear(params, features)
