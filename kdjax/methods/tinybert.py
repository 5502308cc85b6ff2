"""TinyBERT: a small BERT that imitates another's attention, hidden states and, at last, answers.

Two stages, each a Method of its own. `intermediate` matches attention scores, hidden states and
embeddings of paired layers; it needs no labels. `prediction` matches the answers of a fine-tuned
teacher; its student is that of the first stage,
``kdjax.started(student, (state.params["student"], {}))``. The published recipe runs `intermediate`
twice: on general text against an untuned teacher, then on the task's augmented text against the
tuned one. The teacher is in evaluation mode in both (the published code leaves its dropout on).

Reference:
  X. Jiao, Y. Yin, L. Shang, X. Jiang, X. Chen, L. Li, F. Wang, Q. Liu, "TinyBERT: Distilling BERT
  for Natural Language Understanding", Findings of EMNLP 2020 (arXiv 1909.10351), and its published
  code, whose optimizer is `optimizer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from kdjax import _checks, terms
from kdjax._pairs import Batch, Method, Model
from kdjax.core import distill
from kdjax.methods._bert_adam import clip_each_by_norm, decayed, scale_by_bert_adam
from kdjax.terms._outputs import Number

__all__ = ["intermediate", "optimizer", "prediction"]

Augment = Callable[[jax.Array, Batch], Batch]
Layers = Sequence[int] | Mapping[int, int] | None


def intermediate(
    student: Model,
    teacher: Model | None,
    *,
    layers: Layers = None,
    attention: Number = 1.0,
    hidden: Number = 1.0,
    shared: bool = True,
    bias: bool = True,
    reduction: str = "masked",
    augment: Augment | None = None,
) -> Method:
    """The first stage: attention scores, hidden states and embeddings of paired layers.

    Args:
      student: with outputs ``scores`` and ``hidden``, such as ``kdjax.lm.model(config)``; as many
        heads as the teacher, any width.
      teacher: the same; or `kdjax.from_batch`.
      layers: the teacher's layer (from 0) for each of the student's; by default every k-th of k
        times as many layers, the last one of each group.
      attention: weight of the scores' squared differences; a number, an array or a schedule.
      hidden: weight of those of hidden states and embeddings.
      shared: one projection to the teacher's width for all states, as in the published code; False
        for one each, as in the paper (which has one for embeddings, one for all hidden states).
      bias: whether projections have biases, as in the published code.
      reduction: "masked" (means over real tokens) or "reference" (the published code's, over
        padding too).
      augment: ``(key, batch) -> batch`` inside the update.

    Returns:
      A `Method`; metrics ``loss``, ``loss/attention``, ``loss/hidden``. The projections are
      trained beside the student, at ``params["terms"]``.

    Raises:
      ValueError: layers that don't fit, or another number of heads (`kdjax.methods.minilm` takes
        such students).

    Example:
      >>> import jax, jax.numpy as jnp, kdjax as kd
      >>> big = kd.lm.BertConfig(
      ...     vocab_size=50, hidden_size=16, num_layers=4, num_heads=2, intermediate_size=32
      ... )
      >>> small = kd.lm.BertConfig(
      ...     vocab_size=50, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16
      ... )
      >>> student, teacher = kd.lm.model(small), kd.lm.model(big)
      >>> tinybert = kd.methods.tinybert
      >>> method = tinybert.intermediate(student, teacher)
      >>> learner = kd.minimize(method, tinybert.optimizer(steps=100))
      >>> batch = {"input_ids": jnp.ones((4, 6), jnp.int32)}
      >>> frozen = teacher.init(jax.random.key(0))
      >>> state = learner.init(jax.random.key(1), batch, frozen)
      >>> state, metrics = jax.jit(learner.update)(state, batch, frozen)
      >>> sorted(metrics)
      ['loss', 'loss/attention', 'loss/hidden']

    Reference:
      Jiao et al., 2020, equations 7 to 9 and 11.
    """
    pairs = {
        "attention": (attention, terms.attention_scores(layers=layers, reduction=reduction)),
        "hidden": (
            hidden,
            terms.hidden_states(layers=layers, shared=shared, bias=bias, reduction=reduction),
        ),
    }
    return distill(student, teacher, pairs, augment=augment)


def prediction(
    student: Model,
    teacher: Model | None,
    *,
    temperature: Number = 1.0,
    hard: Number = 0.0,
    reduction: str = "masked",
    regression: bool = False,
    augment: Augment | None = None,
) -> Method:
    """The second stage: the answers of a fine-tuned teacher.

    Args:
      student: with output ``logits`` [B, C].
      teacher: the same; not read for regression.
      temperature: of the soft cross-entropy, above 0; a number, an array or a schedule.
      hard: weight of the cross-entropy with true labels (batch entry ``label``); the recipe has
        none.
      reduction: "masked" sums over the classes and multiplies by T^2; "reference" is the published
        code's mean over the classes.
      regression: squared error to the true value ``batch["label"]`` instead, as in the published
        code.
      augment: ``(key, batch) -> batch`` inside the update.

    Returns:
      A `Method`; metrics ``loss``, ``loss/prediction`` and, with labels of classes, ``accuracy``.

    Raises:
      ValueError: a number out of its range.

    Example:
      >>> import kdjax as kd
      >>> config = kd.lm.BertConfig(
      ...     vocab_size=50, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16,
      ...     head="sequence",
      ... )
      >>> classifier = kd.lm.model(config)
      >>> method = kd.methods.tinybert.prediction(classifier, classifier)

    Reference:
      Jiao et al., 2020, equation 10.
    """
    if regression:
        return distill(student, None, {"prediction": (1.0, terms.regression())}, augment=augment)
    pairs: dict[str, Any] = {
        "prediction": (1.0, terms.prediction(temperature=temperature, reduction=reduction))
    }
    if not (isinstance(hard, (int, float)) and hard == 0):
        pairs["hard"] = (hard, terms.hard_labels())
    return distill(student, teacher, pairs, augment=augment)


def optimizer(
    *,
    steps: int,
    learning_rate: float | jax.Array = 5e-5,
    warm_up: float = 0.1,
    schedule: str = "constant",
    weight_decay: float = 0.01,
    clip: float = 1.0,
) -> optax.GradientTransformation:
    """Adam as in BERT's code: no bias correction, decoupled weight decay, each gradient clipped.

    Args:
      steps: length of training.
      learning_rate: 5e-5 for `intermediate`, 3e-5 (or one of 1e-5, 2e-5, 3e-5) for `prediction`.
      warm_up: share of the steps in which it rises from 0; not used by "constant".
      schedule: "constant" (the task's first stage) or "linear" (to 0; general stage, prediction).
      weight_decay: of everything but biases and LayerNorms.
      clip: most that the norm of each parameter's gradient may be.

    Returns:
      An optax transformation.

    Raises:
      ValueError: ``steps`` below 1, an unknown schedule, or a number out of its range.

    Example:
      >>> import kdjax as kd
      >>> tx = kd.methods.tinybert.optimizer(steps=1000, learning_rate=3e-5, schedule="linear")

    Reference:
      The published code of Jiao et al. (optimization.py, BertAdam).
    """
    steps = _checks.count("steps", steps)
    _checks.choice("schedule", schedule, ("constant", "linear"))
    _checks.number("warm_up", warm_up, low=0, below=1)
    _checks.number("learning_rate", learning_rate, low=0)
    _checks.number("weight_decay", weight_decay, low=0)
    _checks.number("clip", clip, above=0)
    rate: Any = learning_rate
    if schedule == "linear":
        rise = round(warm_up * steps)
        rate = optax.join_schedules(
            [
                optax.linear_schedule(0.0, learning_rate, max(rise, 1)),
                optax.linear_schedule(learning_rate, 0.0, max(steps - rise, 1)),
            ],
            [rise],
        )
    return optax.chain(
        clip_each_by_norm(clip),
        scale_by_bert_adam(),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.scale_by_learning_rate(rate),
    )
