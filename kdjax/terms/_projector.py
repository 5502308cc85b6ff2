"""Projector distillation as a Term: project, normalise, compare."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks, losses
from kdjax._pairs import Batch, Model, Outputs, Term, Tree
from kdjax.terms._outputs import Number, at, checked, student_output, teacher_output

Initializer = Callable[..., jax.Array]
# How both sides are normalised, and how they are compared: (student, teacher, *, alpha, log_eps,
# axis_name, where).
NORMS = ("batch", "group", "l2", "none")
LOSSES: Mapping[str, Callable[..., jax.Array]] = MappingProxyType(
    {
        "log_sum": losses.log_sum,
        "correlation_log_sum": lambda s, t, *, alpha, **options: losses.correlation_log_sum(
            s, t, power=alpha, **options
        ),
        "correlation": lambda s, t, *, alpha, log_eps, **options: losses.correlation_distance(
            s, t, power=alpha, **options
        ),
        "mse": lambda s, t, *, alpha, log_eps, axis_name, where: losses.feature_mse(s, t),
    }
)


def projector(
    student_tap: str,
    teacher_tap: str,
    *,
    projector: str | Model | None = "linear",
    hidden: int | Sequence[int] = (),
    bias: bool = True,
    kernel_init: Initializer | None = None,
    norm: str = "batch",
    loss: str = "log_sum",
    alpha: Number = 4.0,
    log_eps: Number = 1e-12,
    eps: Number = 1e-4,
    groups: int = 4,
    student_pool: Callable[[jax.Array], jax.Array] = losses.pool,
    teacher_pool: Callable[[jax.Array], jax.Array] = losses.pool,
) -> Term:
    """Feature distillation through a learned projector.

    The student's feature is pooled, projected to the teacher's width, normalised and compared with
    the teacher's, pooled and normalised in the same way. The defaults are the published recipe: a
    linear projector on the last features before the classifier, batch normalisation without scale
    and offset, LogSum with alpha = 4. Weights of 1 and 2 have been published, beside weight 1 of
    the hard labels, for long schedules on large data. The gradient of LogSum doesn't fade as the
    features get closer: on small problems try weights of 0.05 to 0.2.

    Args:
      student_tap: the student's output to use: features [B, D], tokens [B, N, D] or maps
        [B, H, W, D].
      teacher_tap: the teacher's output to use, of the same kinds.
      projector: ``"linear"``; a `Model` whose only output, or ``"logits"``, is [B, teacher's width]
        and which has no ``extra``; or None to compare the features as they are.
      hidden: width or widths of hidden ReLU layers of a linear projector (1024 for CIFAR-100);
        none by default.
      bias: whether the layers have biases. Batch normalisation takes the last one away again.
      kernel_init: initialiser of ``(key, shape, dtype)`` for the kernels, with biases of 0. By
        default torch's: kernels and biases uniform in +-1/sqrt(fan_in).
      norm: ``"batch"`` (`losses.standardize`), ``"group"``, ``"l2"`` or ``"none"``.
      loss: ``"log_sum"``, ``"correlation_log_sum"``, ``"correlation"`` (its norm) or ``"mse"``.
      alpha: exponent of the distance, above 0 (not of ``"mse"``); also a schedule of the step.
      log_eps: floor inside the logarithm, at least 0; the published ImageNet form has none, the
        DeiT form 1e-5. The default stops a perfect match from giving -inf.
      eps: added to the variance by ``norm`` batch and group, at least 0.
      groups: number of groups of ``norm="group"``.
      student_pool: from the tapped output to [B, D]. By default the mean over positions; for tokens
        after a class token, ``functools.partial(losses.pool, skip_tokens=1)``.
      teacher_pool: the same for the teacher.

    Returns:
      A `Term`, batch-coupled unless ``loss`` is ``"mse"`` and ``norm`` isn't ``"batch"``. Its
      parameters are the projector's, ``{"0": {"kernel", "bias"}, ...}`` for layers of our own or
      those of the Model; they are trained with the student by one optimizer. Rows of weight 0
      (padding) are left out of statistics and distance; of a coupled one all others count alike.
      A Model is run without a key, so it can have no dropout.

    Raises:
      TypeError: ``projector`` is something else, or ``kernel_init`` no function.
      ValueError: an unknown name, or a number out of range; when the term is started, widths that
        differ without a projector, or a projector of another width.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.projector("pool", "pool")
      >>> deit = kd.terms.projector(
      ...     "pool", "pool", loss="correlation_log_sum", log_eps=1e-5, eps=0.0
      ... )

    Reference:
      R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
      Distillation", AAAI 2024.
    """
    if not (projector is None or isinstance(projector, Model) or projector == "linear"):
        kind = ValueError if isinstance(projector, str) else TypeError
        raise kind(
            'projector must be "linear" (with hidden= an MLP), a Model such as kdjax.from_linen '
            f"makes of a module, or None, got {_checks.describe(projector)}."
        )
    widths = hidden if isinstance(hidden, Sequence) else (hidden,)
    hidden = [_checks.count("hidden", width) for width in widths]
    groups = _checks.count("groups", groups)
    if not (kernel_init is None or callable(kernel_init)):
        raise TypeError(
            f"kernel_init must be a function of a jax initializer, got "
            f"{_checks.describe(kernel_init)}."
        )
    if projector != "linear" and not (bias and kernel_init is None):
        raise ValueError("bias and kernel_init must be left out without a linear projector.")
    if hidden and projector != "linear":
        raise ValueError(f"hidden must be empty without a linear projector, got {hidden}.")
    _checks.choice("norm", norm, NORMS)
    compare = LOSSES[_checks.choice("loss", loss, LOSSES)]
    checked("alpha", alpha, above=0)
    checked("log_eps", log_eps, low=0)
    checked("eps", eps, low=0)
    coupled = norm == "batch" or loss != "mse"

    def init(key: jax.Array, student_out: Outputs, teacher_out: Outputs) -> Tree:
        s = _pooled("student", student_pool, student_output(student_out, student_tap))
        t = _pooled("teacher", teacher_pool, teacher_output(teacher_out, teacher_tap))
        if projector is None:
            if s.shape != t.shape:
                raise ValueError(
                    "student_tap must give as many channels as teacher_tap without a projector, "
                    f"got {tuple(s.shape)} and {tuple(t.shape)}."
                )
            return {}
        if isinstance(projector, Model):
            params, extra = projector.init(key, s)
            if jax.tree.leaves(extra):
                raise ValueError("projector must have no variables besides parameters, got extra.")
            projected = _only(projector.apply(params, extra, s)[0])
            if projected.shape != t.shape:
                raise ValueError(
                    f"projector must return {tuple(t.shape)} like the teacher's features, got "
                    f"{tuple(projected.shape)}."
                )
            return params
        return _init_layers(key, [s.shape[1], *hidden, t.shape[1]], bias, kernel_init)

    def project(tparams: Tree, s: jax.Array, axis_name: Any, where: Any) -> jax.Array:
        if projector is None:
            return s
        if isinstance(projector, Model):
            return _only(projector.apply(tparams, {}, s, train=True)[0])
        if norm == "batch" and not hidden:
            # Batch normalisation takes out any offset, so the product may as well be of centred
            # features, which keep their digits, and the bias isn't needed.
            return _dot(losses.center(s, axis_name=axis_name, where=where), tparams["0"]["kernel"])
        for i in range(len(tparams)):
            layer = tparams[str(i)]
            s = _dot(jax.nn.relu(s) if i else s, layer["kernel"])
            s = s + layer["bias"][None] if bias else s
        return s

    def normalised(x: jax.Array, step: jax.Array, axis_name: Any, where: Any) -> jax.Array:
        if norm == "batch":
            return losses.standardize(x, eps=at(eps, step), axis_name=axis_name, where=where)
        if norm == "group":
            return losses.group_standardize(x, groups=groups, eps=at(eps, step))
        return losses.l2_normalize(x) if norm == "l2" else x

    def term_loss(
        tparams: Tree,
        student_out: Outputs,
        teacher_out: Outputs,
        batch: Batch,
        *,
        step: jax.Array,
        key: jax.Array,
        axis_name: Any = None,
    ) -> jax.Array:
        s = _pooled("student", student_pool, student_output(student_out, student_tap))
        t = _pooled("teacher", teacher_pool, teacher_output(teacher_out, teacher_tap))
        where = None
        if "weight" in batch:
            weight = jnp.asarray(batch["weight"])
            _checks.shape("batch['weight']", weight, s.shape[:1], "for the examples")
            where = weight > 0
            # A NaN of a row that doesn't count would reach the kernels.
            s, t = (jnp.where(where[:, None], x, 0) for x in (s, t))
        s = normalised(project(tparams, s, axis_name, where), step, axis_name, where)
        t = normalised(jax.lax.stop_gradient(t), step, axis_name, where)
        value = compare(
            s, t, alpha=at(alpha, step), log_eps=at(log_eps, step), axis_name=axis_name, where=where
        )
        return _global_mean(value, axis_name, where) if coupled and value.ndim else value

    return Term(init, term_loss, coupled)


def _pooled(name: str, pool: Callable[[jax.Array], jax.Array], features: Any) -> jax.Array:
    pooled = pool(features)
    if pooled.ndim != 2:
        raise ValueError(f"{name}_pool must return [B, D], got {_checks.describe(pooled)}.")
    return _checks.floating(f"the pooled {name} features", pooled)


def _only(outputs: Any) -> jax.Array:
    """The projected features among a Model's outputs."""
    if "logits" in outputs or len(outputs) != 1:
        return _checks.entry("the projector's outputs", outputs, "logits")
    return next(iter(outputs.values()))


def _init_layers(
    key: jax.Array, widths: Sequence[int], bias: bool, kernel_init: Initializer | None
) -> Tree:
    layers = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        kernel_key, bias_key = jax.random.split(jax.random.fold_in(key, i))
        bound = fan_in**-0.5
        if kernel_init is None:
            kernel = jax.random.uniform(kernel_key, (fan_in, fan_out), minval=-bound, maxval=bound)
            offset = jax.random.uniform(bias_key, (fan_out,), minval=-bound, maxval=bound)
        else:
            kernel = kernel_init(kernel_key, (fan_in, fan_out), jnp.float32)
            offset = jnp.zeros(fan_out)
        layers[str(i)] = {"kernel": kernel, **({"bias": offset} if bias else {})}
    return layers


def _dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    if x.shape[1] != kernel.shape[0]:
        raise ValueError(
            f"student_tap must give features that fit the projector's kernel {kernel.shape}, "
            f"got {tuple(x.shape)}."
        )
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=dtype)


def _global_mean(values: jax.Array, axis_name: Any, where: Any) -> jax.Array:
    kept = jnp.ones(len(values), bool) if where is None else where
    total, count = jnp.sum(jnp.where(kept, values, 0)), jnp.sum(kept)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1)
