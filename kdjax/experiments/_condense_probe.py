"""How good frozen features are: a linear layer on all labels, or on a few."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import optax

from kdjax import _checks, adapters
from kdjax._pairs import Model
from kdjax.experiments import _condense_train
from kdjax.experiments._threads import few_threads

_FEATURES = "image"  # what the training calls the inputs of any network


def linear_probe(
    features: Any,
    labels: Any,
    test_features: Any,
    test_labels: Any,
    *,
    key: jax.Array,
    steps: int = 5000,
    batch_size: int = 512,
    tx: optax.GradientTransformation | None = None,
    progress: bool = False,
) -> float:
    """Accuracy of a linear layer that is trained on frozen features.

    Args:
      features: [N, D] floating (`outputs` with a tap).
      labels: [N] integers from 0.
      test_features: [T, D] floating.
      test_labels: [T] integers.
      key: of the initial layer and the order.
      steps: updates, at least 1.
      batch_size: rows of a batch, at least 1.
      tx: an optax transformation; by default SGD with momentum 0.9 and a learning rate of 0.2 that
        falls along half a cosine, without weight decay.
      progress: whether to show a bar.

    Returns:
      The share of right answers on the test features.

    Raises:
      TypeError: an array of another kind.
      ValueError: shapes that don't fit each other.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from kdjax.experiments import condense
      >>> x, y = jnp.eye(3), jnp.arange(3)
      >>> condense.linear_probe(x, y, x, y, steps=20, key=jax.random.key(0))
      1.0

    Reference:
      Lee et al., ICLR 2024, by the published code (train.py).
    """
    x, y = _labelled("features", features, "labels", labels)
    test_x, test_y = _labelled("test_features", test_features, "test_labels", test_labels)
    _checks.shape("test_features", test_x, (len(test_x), x.shape[1]), "(the features' width)")
    steps = _checks.count("steps", steps)
    classes = int(max(y.max(), test_y.max())) + 1
    network = _linear(classes)
    variables = _condense_train.fine_tune(
        network,
        None,
        {_FEATURES: x, "label": y},
        key=key,
        steps=steps,
        batch_size=batch_size,
        tx=_tx(steps) if tx is None else tx,
        progress=progress,
    )
    return accuracy(_condense_train.outputs(network, variables, test_x), test_y)


def few_shot(
    features: Any,
    labels: Any,
    draws: Iterable[Any],
    test_features: Any,
    test_labels: Any,
    *,
    inverse_penalty: float = 1.0,
) -> float:
    """Mean accuracy of logistic regressions on a few labelled rows of frozen features.

    Features are standardised by mean and standard deviation of ``features``, which needs no labels.
    Each draw minimises ``||W||^2 / 2 + C sum cross-entropy`` with a bias that is not penalised.

    Args:
      features: [N, D] floating, of the training split.
      labels: [N] integers.
      draws: row numbers of the labelled rows, one array for each draw; at least two classes each.
      test_features: [T, D] floating.
      test_labels: [T] integers.
      inverse_penalty: C, above 0.

    Returns:
      The share of right answers on the test features, a mean over the draws.

    Raises:
      TypeError: an array of another kind.
      ValueError: shapes that don't fit each other, no draws, or rows that aren't there.

    Example:
      >>> import numpy as np
      >>> from kdjax.experiments import condense
      >>> x, y = np.array([[0.0], [1.0], [9.0], [10.0]]), np.array([0, 0, 1, 1])
      >>> condense.few_shot(x, y, [[0, 2], [1, 3]], x, y)
      1.0
    """
    from sklearn.linear_model import LogisticRegression  # a second to import

    x, y = _labelled("features", features, "labels", labels)
    test_x, test_y = _labelled("test_features", test_features, "test_labels", test_labels)
    _checks.shape("test_features", test_x, (len(test_x), x.shape[1]), "(the features' width)")
    _checks.number("inverse_penalty", inverse_penalty, above=0)
    mean, spread = x.mean(0), x.std(0)
    spread = np.where(spread > 0, spread, 1.0)  # a dead feature stays 0
    x, test_x = (x - mean) / spread, (test_x - mean) / spread
    found = []
    for rows in map(np.asarray, draws):
        if rows.ndim != 1 or not len(rows) or rows.min() < 0 or rows.max() >= len(x):
            raise ValueError(
                f"draws must hold row numbers from 0 to {len(x) - 1}, got {_checks.describe(rows)}."
            )
        with few_threads():
            model = LogisticRegression(C=inverse_penalty, max_iter=1000).fit(x[rows], y[rows])
        found.append(float((model.predict(test_x) == test_y).mean()))
    if not found:
        raise ValueError("draws must hold at least one array of row numbers, got none.")
    return float(np.mean(found))


def accuracy(logits: Any, labels: Any) -> float:
    """The share of rows whose largest logit is that of the label."""
    return float((np.asarray(logits).argmax(-1) == np.asarray(labels)).mean())


@functools.lru_cache(maxsize=8)
def _linear(classes: int) -> Model:
    def init(key: jax.Array, x: jax.Array) -> dict[str, jax.Array]:
        bound = x.shape[1] ** -0.5  # torch's default
        kernel, bias = jax.random.split(key)
        return {
            "kernel": jax.random.uniform(kernel, (x.shape[1], classes), x.dtype, -bound, bound),
            "bias": jax.random.uniform(bias, (classes,), x.dtype, -bound, bound),
        }

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return x @ params["kernel"] + params["bias"][None]

    return adapters.from_fn(init, apply, inputs=_FEATURES)


@functools.lru_cache(maxsize=8)
def _tx(steps: int) -> optax.GradientTransformation:
    return optax.sgd(optax.cosine_decay_schedule(0.2, steps), momentum=0.9)


def _labelled(name: str, x: Any, label_name: str, label: Any) -> tuple[np.ndarray, np.ndarray]:
    found = np.asarray(_checks.floating(name, x, ndim=2))
    wanted = np.asarray(_checks.integer(label_name, label, ndim=1))
    if found.size == 0:
        raise ValueError(f"{name} must not be empty, got {_checks.describe(found)}.")
    _checks.shape(label_name, wanted, (len(found),), f"(one for each row of {name})")
    return found, wanted
