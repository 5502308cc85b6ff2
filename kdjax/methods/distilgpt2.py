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

import jax
import optax

from kdjax import _checks, terms
from kdjax._pairs import Batch, Method, Model
from kdjax.core import distill
from kdjax.terms._outputs import Number

__all__ = ["LAYERS", "distilbert", "distilgpt2", "optimizer"]

Augment = Callable[[jax.Array, Batch], Batch]
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
    augment: Augment | None = None,
) -> Method:
    """A decoder from a decoder.

    Args:
      student: with outputs ``logits`` and ``hidden``, such as ``kdjax.lm.model(config)``.
      teacher: the same, as wide if ``alpha_cos`` isn't 0.
      alpha_ce: weight of the divergence; 0 for some of the weights leaves their terms out. All may
        be arrays or schedules.
      alpha_lm: weight of the next token's cross-entropy; 0 trains without labels.
      alpha_cos: weight of the cosine of the last hidden states.
      alpha_mse: weight of the logits' squared differences.
      temperature: of the divergence, above 0.
      labels: batch entry of labels [B, L], shifted here.
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
