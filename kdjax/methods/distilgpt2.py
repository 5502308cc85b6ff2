"""DistilBERT and DistilGPT-2: half of the teacher's layers, its soft labels, its directions.

The student is as wide as the teacher and starts from some of its layers (`kdjax.lm.take_layers`).
The loss joins soft labels at a temperature, the language model's own loss and the cosine of the
last hidden states (`kdjax.terms.distil_triple`).

Reference:
  V. Sanh, L. Debut, J. Chaumond, T. Wolf, "DistilBERT, a distilled version of BERT: smaller,
  faster, cheaper and lighter", NeurIPS EMC2 Workshop 2019 (arXiv 1910.01108), and its published
  code. No command for DistilGPT-2 is published: the weights are those of DistilBERT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdjax import _checks, terms
from kdjax._pairs import Batch, Method, Model, Term, Tree, ratio
from kdjax.core import distill
from kdjax.terms._layers import real_tokens
from kdjax.terms._outputs import Number, checked

__all__ = ["LAYERS", "distilbert", "distilgpt2", "optimizer"]

Augment = Callable[[jax.Array, Batch], Batch]
Fused = Callable[..., Term]
BALANCE = "soft_tokens_per_hard_token"
LAYERS = (0, 2, 4, 7, 9, 11)
"""The layers of 12 that the published students start from."""


def distilgpt2(
    student: Model,
    teacher: Model | None,
    *,
    alpha_ce: Number = 5.0,
    alpha_lm: Number = 2.0,
    alpha_cos: Number = 1.0,
    alpha_mse: Number = 0.0,
    temperature: Number = 2.0,
    labels: str = "input_ids",
    fused: Fused | None = None,
    augment: Augment | None = None,
) -> Method:
    """A decoder from a decoder.

    Args:
      student: with outputs ``logits`` and ``hidden``, such as ``kdjax.lm.model(config)``; for
        ``fused`` see there.
      teacher: the same, as wide if ``alpha_cos`` isn't 0.
      alpha_ce: weight of the divergence; 0 for some of the weights leaves their terms out. All may
        be arrays or schedules.
      alpha_lm: weight of the next token's cross-entropy; 0 trains without labels.
      alpha_cos: weight of the cosine of the last hidden states.
      alpha_mse: weight of the logits' squared differences.
      temperature: of the divergence, above 0.
      labels: batch entry of labels [B, L], shifted here.
      fused: `kdjax.lm.fused_distillation`, or a partial of it, for the same loss and gradients
        without logits of the whole batch; student and teacher then need no logits:
        ``kdjax.lm.model(config, outputs=("head_input", "head", "hidden"))``. Needs ``alpha_mse``
        0; divergence and cross-entropy are one metric, ``loss/fused``.
      augment: ``(key, batch) -> batch`` inside the update.

    Returns:
      A `Method`; metrics ``loss``, ``loss/ce``, ``loss/lm``, ``loss/cos``, ``loss/mse``, as far
      as they are there.

    Raises:
      ValueError: a weight below 0, or a temperature not above 0.

    Example:
      >>> import jax, jax.numpy as jnp, kdjax as kd
      >>> config = kd.lm.GPT2Config(vocab_size=50, hidden_size=8, num_layers=4, num_heads=2)
      >>> teacher = kd.lm.model(config)
      >>> frozen = teacher.init(jax.random.key(0))
      >>> small, start = kd.lm.take_layers(config, frozen[0], [0, 3])
      >>> recipe = kd.methods.distilgpt2
      >>> student = kd.started(kd.lm.model(small), (start, {}))
      >>> method = recipe.distilgpt2(student, teacher)
      >>> learner = kd.minimize(method, recipe.optimizer(steps=100))
      >>> batch = {"input_ids": jnp.ones((4, 6), jnp.int32)}
      >>> state = learner.init(jax.random.key(1), batch, frozen)
      >>> state, metrics = jax.jit(learner.update)(state, batch, frozen)
      >>> sorted(metrics)
      ['loss', 'loss/ce', 'loss/cos', 'loss/lm']

    Reference:
      Sanh et al., 2019, section 2; the published code (distiller.py).
    """
    if fused is not None:
        weights = {"ce": alpha_ce, "lm": alpha_lm, "cos": alpha_cos, "mse": alpha_mse}
        return _fused(
            student, teacher, fused, weights, True, temperature, "tokens", labels, augment
        )
    pairs = terms.distil_triple(
        causal=True,
        alpha_ce=alpha_ce,
        alpha_lm=alpha_lm,
        alpha_cos=alpha_cos,
        alpha_mse=alpha_mse,
        temperature=temperature,
        labels=labels,
    )
    return distill(student, teacher, pairs, augment=augment)


def distilbert(
    student: Model,
    teacher: Model | None,
    *,
    alpha_ce: Number = 5.0,
    alpha_lm: Number = 2.0,
    alpha_cos: Number = 1.0,
    alpha_mse: Number = 0.0,
    temperature: Number = 2.0,
    restrict_to_masked: bool = False,
    labels: str = "labels",
    fused: Fused | None = None,
    augment: Augment | None = None,
) -> Method:
    """A masked language model from another.

    Args:
      student: with outputs ``logits`` and ``hidden``: a "masked_lm" head.
      teacher: the same, as wide if ``alpha_cos`` isn't 0.
      alpha_ce: weight of the divergence, over all real tokens; as in `distilgpt2`.
      alpha_lm: weight of the masked tokens' cross-entropy.
      alpha_cos: weight of the cosine of the last hidden states.
      alpha_mse: weight of the logits' squared differences.
      temperature: of the divergence, above 0.
      restrict_to_masked: divergence and squares of masked tokens only.
      labels: batch entry of labels [B, L], -100 where nothing is masked.
      fused: as in `distilgpt2`; the models' outputs are ``head_bias``, too.
      augment: ``(key, batch) -> batch`` inside the update: `kdjax.lm.mask_tokens`.

    Returns:
      A `Method`; metrics as in `distilgpt2`.

    Raises:
      ValueError: a weight below 0, or a temperature not above 0.

    Example:
      >>> import functools, kdjax as kd
      >>> config = kd.lm.BertConfig(
      ...     vocab_size=50, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16,
      ...     head="masked_lm", pooler=False,
      ... )
      >>> net = kd.lm.model(config)
      >>> hide = functools.partial(kd.lm.mask_tokens, mask_token=4, vocab_size=50)
      >>> method = kd.methods.distilgpt2.distilbert(net, net, augment=hide)

    Reference:
      Sanh et al., 2019, section 2; the published code (distiller.py).
    """
    if fused is not None:
        weights = {"ce": alpha_ce, "lm": alpha_lm, "cos": alpha_cos, "mse": alpha_mse}
        count = "labels" if restrict_to_masked else "tokens"
        return _fused(student, teacher, fused, weights, False, temperature, count, labels, augment)
    pairs = terms.distil_triple(
        causal=False,
        alpha_ce=alpha_ce,
        alpha_lm=alpha_lm,
        alpha_cos=alpha_cos,
        alpha_mse=alpha_mse,
        temperature=temperature,
        restrict_to_masked=restrict_to_masked,
        labels=labels,
    )
    return distill(student, teacher, pairs, augment=augment)


def _fused(
    student: Model,
    teacher: Model | None,
    fused: Fused,
    weights: dict[str, Number],
    causal: bool,
    temperature: Number,
    count: str,
    labels: str,
    augment: Augment | None,
) -> Method:
    """The objective with divergence and cross-entropy in one Term that makes no logits."""
    if not callable(fused):
        raise TypeError(
            "fused must be None or a function that makes a Term, kdjax.lm.fused_distillation, got "
            f"{_checks.describe(fused)}."
        )
    for name, weight in weights.items():
        checked(f"alpha_{name}", weight, low=0)
    if not _is_zero(weights["mse"]):
        raise ValueError(
            "alpha_mse must be 0 with fused=, which has no logits to compare, got "
            f"{_checks.describe(weights['mse'])}."
        )
    pairs: dict[str, tuple[Number, Term]] = {}
    if not (_is_zero(weights["ce"]) and _is_zero(weights["lm"])):
        term = fused(
            causal=causal,
            soft_weight=weights["ce"],
            hard_weight=weights["lm"],
            temperature=temperature,
            count=count,
            balance=BALANCE,
            labels=labels,
        )
        pairs["fused"] = (1.0, term)
    if not _is_zero(weights["cos"]):
        pairs["cos"] = (weights["cos"], terms.hidden_cosine())
    method = distill(student, teacher, pairs, augment=augment)

    def prepare(
        params: Tree,
        extra: Tree,
        batch: Batch,
        frozen: Tree = None,
        *,
        axis_name: str | None = None,
        **keywords: Any,
    ) -> Batch:
        if method.prepare is not None:
            batch = method.prepare(params, extra, batch, frozen, axis_name=axis_name, **keywords)
        value = _balance(batch, causal, labels, axis_name)
        return {**batch, BALANCE: value}

    return method._replace(prepare=prepare)


def _balance(batch: Batch, causal: bool, name: str, axis_name: str | None) -> jax.Array:
    """[B], in every row: the real tokens of the whole batch divided by those with a target.

    Microbatches can't know it: they are cut from the batch that ``prepare`` returns.
    """
    ids = _checks.integer(f"batch[{name!r}]", _checks.entry("batch", batch, name), ndim=2)
    ids = ids.astype(jnp.promote_types(ids.dtype, jnp.int32))
    real = real_tokens(batch, "attention_mask", *ids.shape)
    known = real & (ids != -1) & (ids != -100)
    if causal:
        known = known[:, 1:] & real[:, :-1]
    counts = jnp.stack([real.sum(1), known.sum(1)], axis=1).astype(float)
    if "weight" in batch:
        counts = counts * jnp.asarray(batch["weight"], counts.dtype)[:, None]
    soft, hard = counts.sum(0)
    if axis_name is not None:
        soft, hard = jax.lax.psum((soft, hard), axis_name)
    return jnp.broadcast_to(ratio(soft, hard, empty=1.0), ids.shape[:1])


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def optimizer(
    *,
    steps: int,
    learning_rate: float | jax.Array = 5e-4,
    warm_up: float = 0.05,
    weight_decay: float = 0.0,
    clip: float = 5.0,
) -> optax.GradientTransformation:
    """AdamW as published: a linear rise and fall, the gradient's norm clipped.

    Args:
      steps: length of training; published: 3 epochs in batches of 250 per device.
      learning_rate: at its peak.
      warm_up: share of the steps in which it rises from 0.
      weight_decay: of every parameter; published: none.
      clip: most that the norm of the whole gradient may be.

    Returns:
      An optax transformation.

    Raises:
      ValueError: ``steps`` below 1, or a share out of range.

    Example:
      >>> import kdjax as kd
      >>> tx = kd.methods.distilgpt2.optimizer(steps=1000)

    Reference:
      The published code of Sanh et al. (distiller.py, train.py).
    """
    steps = _checks.count("steps", steps)
    _checks.number("warm_up", warm_up, low=0, below=1)
    rise = max(round(warm_up * steps), 1)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, rise),
            optax.linear_schedule(learning_rate, 0.0, max(steps - rise, 1)),
        ],
        [rise],
    )
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(rate, b1=0.9, b2=0.98, eps=1e-6, weight_decay=weight_decay),
    )
