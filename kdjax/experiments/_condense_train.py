"""Training on pairs, on labels, and of a network that was trained before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from kdjax import _checks, core, terms
from kdjax._pairs import Batch, Learner, Model, State, Tree
from kdjax._teachers import from_batch
from kdjax.experiments._condense_subsets import generator
from kdjax.methods import krr_st

Augment = Callable[[jax.Array, Batch], Batch]
Data = Mapping[str, Any]


def pretrain(
    network: Model,
    pairs: Data,
    *,
    key: jax.Array,
    epochs: int = 1000,
    batch_size: int = 256,
    tx: optax.GradientTransformation | None = None,
    progress: bool = False,
) -> tuple[Tree, Tree]:
    """Pre-trains a network on pairs of images and targets: ``mean (network(x) - y)^2``.

    Every epoch goes through all pairs in an order of its own; its last batch may be smaller. No
    augmentation, as in the paper.

    Args:
      network: its ``logits`` have the targets' width.
      pairs: ``{"image": [m, ...], "target": [m, k]}``, floating point.
      key: of the initial parameters, the order and dropout.
      epochs: passes over the pairs, at least 1. A large set needs fewer: 1000 epochs of a hundred
        pairs are 1000 updates.
      batch_size: rows of a batch, at least 1; of fewer pairs each is a batch of all.
      tx: an optax transformation; by default `kdjax.methods.krr_st.pool_optimizer`, SGD with a
        constant learning rate of 0.1, momentum 0.9, weight decay 1e-3.
      progress: whether to show a bar.

    Returns:
      The trained ``(params, extra)``.

    Raises:
      TypeError: the network is no `Model`, or pairs are not floating point.
      ValueError: pairs are empty or do not fit the network or each other.

    Example:
      >>> import jax, jax.numpy as jnp, kdjax as kd
      >>> from kdjax.experiments import condense
      >>> net = kd.from_linen(kd.models.MLP(4, features=(8,)))
      >>> pairs = {"image": jnp.ones((6, 8, 8, 1)), "target": jnp.ones((6, 4))}
      >>> params, extra = condense.pretrain(net, pairs, epochs=2, key=jax.random.key(0))

    Reference:
      Lee et al., "Self-Supervised Dataset Distillation for Transfer Learning", ICLR 2024, by the
      published code (test.py).
    """
    data = _columns("pairs", pairs, "target", network)
    tx = _pool_tx() if tx is None else tx
    learner = _regression(network, tx)
    state = learner.init(key, {name: x[:1] for name, x in data.items()})
    steps = _steps(len(data["image"]), epochs, batch_size)
    return train(learner, state, data, key, steps, batch_size, "pre-training", progress)


def pretrain_labelled(
    network: Model,
    data: Data,
    *,
    key: jax.Array,
    epochs: int = 1000,
    batch_size: int = 256,
    tx: optax.GradientTransformation | None = None,
    augment: Augment | None = None,
    progress: bool = False,
) -> tuple[Tree, Tree]:
    """Pre-trains a network on labelled images by cross-entropy, as published for labelled subsets.

    Args:
      network: its ``logits`` are those of the classes.
      data: ``{"image": [N, ...], "label": [N]}``, floating point and integer.
      key: of the initial parameters, the order, augmentation and dropout.
      epochs: passes over the images, at least 1.
      batch_size: rows of a batch, at least 1.
      tx: an optax transformation; by default SGD with momentum 0.9, weight decay 5e-4 and a
        learning rate of 0.01, a tenth of it from half of the updates on.
      augment: ``(key, batch) -> batch``. Published: a random one of DSA's for each batch.
      progress: whether to show a bar.

    Returns:
      The trained ``(params, extra)``.

    Raises:
      TypeError: the network is no `Model`, or an array of another kind.
      ValueError: data are empty or do not fit the network or each other.

    Example:
      >>> import jax, jax.numpy as jnp, kdjax as kd
      >>> from kdjax.experiments import condense
      >>> net = kd.from_linen(kd.models.MLP(4, features=(8,)))
      >>> data = {"image": jnp.ones((6, 8, 8, 1)), "label": jnp.arange(6) % 4}
      >>> found = condense.pretrain_labelled(net, data, epochs=2, key=jax.random.key(0))

    Reference:
      Lee et al., ICLR 2024, by the published code (test.py).
    """
    columns = _columns("data", data, "label", network)
    steps = _steps(len(columns["image"]), epochs, batch_size)
    tx = _step_tx(steps) if tx is None else tx
    learner = _classification(network, tx, augment)
    state = learner.init(key, {name: x[:1] for name, x in columns.items()})
    return train(learner, state, columns, key, steps, batch_size, "pre-training", progress)


def fine_tune(
    classifier: Model,
    variables: tuple[Tree, Tree] | None,
    data: Data,
    *,
    key: jax.Array,
    steps: int = 10_000,
    batch_size: int = 256,
    tx: optax.GradientTransformation | None = None,
    augment: Augment | None = None,
    head: str = "classifier",
    progress: bool = False,
) -> tuple[Tree, Tree]:
    """Fine-tunes a whole pre-trained network with a new head by cross-entropy.

    Args:
      classifier: the pre-trained network with as many outputs as there are classes.
      variables: ``(params, extra)`` of the pre-trained network; None: from scratch.
      data: ``{"image": [N, ...], "label": [N]}``, floating point and integer.
      key: of the new head, the order, augmentation and dropout.
      steps: updates, at least 1: 10,000 for CIFAR and Tiny-ImageNet, 5,000 for the fine-grained
        sets; 200 serve a few shots of digits.
      batch_size: rows of a batch, at least 1.
      tx: an optax transformation; by default SGD with momentum 0.9, weight decay 5e-4 and a
        learning rate of 0.01 that falls along half a cosine.
      augment: ``(key, batch) -> batch``; published: a random crop and flip.
      head: the entry of ``params`` that starts anew.
      progress: whether to show a bar.

    Returns:
      The trained ``(params, extra)``.

    Raises:
      TypeError: the classifier is no `Model`, or an array of another kind.
      ValueError: there is no such head, or the parameters, head apart, don't fit the classifier.

    Example:
      >>> import jax, jax.numpy as jnp, kdjax as kd
      >>> from kdjax.experiments import condense
      >>> net, wide = (kd.from_linen(kd.models.MLP(n, features=(8,))) for n in (4, 16))
      >>> data = {"image": jnp.ones((6, 8, 8, 1)), "label": jnp.arange(6) % 4}
      >>> before = wide.init(jax.random.key(0), data["image"])
      >>> found = condense.fine_tune(net, before, data, steps=2, key=jax.random.key(1))

    Reference:
      Lee et al., ICLR 2024, by the published code (test.py).
    """
    columns = _columns("data", data, "label", classifier)
    steps = _checks.count("steps", steps)
    _checks.count("batch_size", batch_size)
    tx = _cosine_tx(steps) if tx is None else tx
    learner = _classification(classifier, tx, augment)
    state = learner.init(key, {name: x[:1] for name, x in columns.items()})
    if variables is not None:
        params, extra = _with_new_head(state, variables, head)
        # The optimizer may keep a copy of the parameters, so that it starts from the new ones.
        params = {**state.params, "student": params}
        state = state._replace(
            params=params, extra={**state.extra, "student": extra}, opt=tx.init(params)
        )
    return train(learner, state, columns, key, steps, batch_size, "fine-tuning", progress)


def outputs(
    network: Model,
    variables: tuple[Tree, Tree],
    images: Any,
    *,
    output: str = "logits",
    batch_size: int = 1000,
) -> np.ndarray:
    """One output of a network in evaluation mode, flattened to [N, D].

    Args:
      network: the network.
      variables: its ``(params, extra)``.
      images: [N, ...] floating.
      output: ``logits`` or a tap.
      batch_size: rows at once.

    Returns:
      [N, D] on the host.

    Raises:
      ValueError: there is no such output, or no images.

    Example:
      >>> import jax, jax.numpy as jnp, kdjax as kd
      >>> from kdjax.experiments import condense
      >>> net = kd.from_linen(kd.models.MLP(4, features=(8,)))
      >>> x = jnp.ones((6, 8, 8, 1))
      >>> condense.outputs(net, net.init(jax.random.key(0), x), x).shape
      (6, 4)
    """
    x = _checks.floating("images", images, min_ndim=2)
    if len(x) == 0:
        raise ValueError(f"images must not be empty, got {_checks.describe(x)}.")
    size, forward = min(_checks.count("batch_size", batch_size), len(x)), _forward(network, output)
    found = []
    for start in range(0, len(x), size):
        rows = x[start : start + size]
        filled = jnp.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (x.ndim - 1))
        found.append(np.asarray(forward(variables, filled))[: len(rows)])
    return np.concatenate(found)


def r2(predictions: Any, targets: Any) -> float:
    """The share of the targets' variance that predictions explain.

    ``1 - sum (p - y)^2 / sum (y - mean(y))^2``, sums over all entries, the mean of each column.

    Args:
      predictions: [N, k] floating.
      targets: [N, k] floating, rows not all equal.

    Returns:
      1 for perfect predictions, 0 for the columns' means; it has no lower bound.

    Raises:
      TypeError: an array is not floating point.
      ValueError: shapes differ, or there is no variance.

    Example:
      >>> import numpy as np
      >>> from kdjax.experiments import condense
      >>> y = np.array([[0.0, 1.0], [2.0, 3.0]])
      >>> condense.r2(y, y), condense.r2(np.array([[1.0, 2.0], [1.0, 2.0]]), y)
      (1.0, 0.0)
    """
    p, y = np.asarray(predictions, np.float64), np.asarray(targets, np.float64)
    _checks.same_shape("predictions", p, "targets", y)
    spread = ((y - y.mean(axis=0)) ** 2).sum() if y.size else 0.0
    if spread == 0:
        raise ValueError("targets must have rows that differ from each other, got no variance.")
    return float(1 - ((p - y) ** 2).sum() / spread)


def train(
    learner: Learner,
    state: State,
    data: dict[str, jax.Array],
    key: jax.Array,
    steps: int,
    batch_size: int,
    title: str,
    progress: bool,
) -> tuple[Tree, Tree]:
    """Updates on data that lie on the device; only row numbers travel."""
    update = _update(learner)
    rows = _orders(key, len(data["image"]), batch_size)
    shown = None if progress else True
    with tqdm(total=steps, desc=title, unit="step", leave=False, delay=1, disable=shown) as bar:
        for step in range(1, steps + 1):
            state = update(state, data, next(rows))
            if step % 50 == 0 or step == steps:  # else any number of updates would queue up
                jax.block_until_ready(state.step)
                bar.update(step - bar.n)
    return state.params["student"], state.extra["student"]


def _steps(size: int, epochs: int, batch_size: int) -> int:
    return _checks.count("epochs", epochs) * -(-size // _checks.count("batch_size", batch_size))


def _orders(key: jax.Array, size: int, batch_size: int) -> Iterator[np.ndarray]:
    draw = generator(key)
    while True:
        order = draw.permutation(size).astype(np.int32)
        for start in range(0, size, batch_size):
            yield order[start : start + batch_size]


# Kept, so that networks trained from many keys and on many sets compile once.
@functools.lru_cache(maxsize=32)
def _regression(network: Model, tx: optax.GradientTransformation) -> Learner:
    def loss(own: jax.Array, wanted: jax.Array) -> jax.Array:
        _checks.same_shape("the network's logits", own, "the pairs' targets", wanted)
        return jnp.mean((own - wanted) ** 2, axis=-1)

    wanted = {"targets": (1.0, terms.matching(loss))}
    return _compiled(core.distill(network, from_batch(logits="target"), wanted), tx)


@functools.lru_cache(maxsize=32)
def _classification(
    network: Model, tx: optax.GradientTransformation, augment: Augment | None
) -> Learner:
    method = core.distill(network, None, {"labels": (1.0, terms.hard_labels())}, augment=augment)
    return _compiled(method, tx)


def _compiled(method: Any, tx: optax.GradientTransformation) -> Learner:
    learner = core.minimize(method, tx)
    return learner._replace(init=jax.jit(learner.init))


@functools.lru_cache(maxsize=32)
def _update(learner: Learner) -> Callable[..., State]:
    def update(state: State, data: dict[str, jax.Array], rows: jax.Array) -> State:
        return learner.update(state, {name: x[rows] for name, x in data.items()})[0]

    return jax.jit(update, donate_argnums=0)


@functools.lru_cache(maxsize=32)
def _forward(network: Model, output: str) -> Callable[..., jax.Array]:
    def forward(variables: tuple[Tree, Tree], images: jax.Array) -> jax.Array:
        found, _ = network.apply(*variables, images, train=False)
        hint = "Pass taps= to the adapter."
        wanted = _checks.entry("the network's outputs", found, output, hint)
        return wanted.reshape(len(images), -1)

    return jax.jit(forward)


@functools.lru_cache(maxsize=1)
def _pool_tx() -> optax.GradientTransformation:
    return krr_st.pool_optimizer()


@functools.lru_cache(maxsize=8)
def _step_tx(steps: int) -> optax.GradientTransformation:
    rate = optax.piecewise_constant_schedule(0.01, {steps // 2: 0.1})
    return krr_st.pool_optimizer(learning_rate=rate, weight_decay=5e-4)


@functools.lru_cache(maxsize=8)
def _cosine_tx(steps: int) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(0.01, steps)
    return krr_st.pool_optimizer(learning_rate=rate, weight_decay=5e-4)


def _with_new_head(state: State, variables: tuple[Tree, Tree], head: str) -> tuple[Tree, Tree]:
    """Copies of the given variables (the update donates its State) with the State's own head."""
    fresh, (params, extra) = state.params["student"], variables
    own = _checks.entry("the classifier's parameters", fresh, head, "Pass head=.")
    params, extra = jax.tree.map(jnp.array, ({**params, head: own}, extra))
    shapes = [
        jax.tree.map(jnp.shape, tree) for tree in ((params, extra), (fresh, state.extra["student"]))
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"variables must be those of the classifier but for its {head!r}, got other names or "
            "shapes."
        )
    return params, extra


def _columns(name: str, data: Data, target: str, network: Model) -> dict[str, jax.Array]:
    if not isinstance(network, Model):
        raise TypeError(
            "the network must be a kdjax.Model; wrap it with kdjax.from_linen, from_nnx or "
            f"from_fn, got {_checks.describe(network)}."
        )
    if not isinstance(data, Mapping):
        raise TypeError(
            f"{name} must be a dict with 'image' and {target!r}, got {_checks.describe(data)}."
        )
    here = f"{name}['image']"
    image = _checks.floating(here, _checks.entry(name, data, "image"), min_ndim=2)
    there, found = f"{name}[{target!r}]", _checks.entry(name, data, target)
    if target == "label":
        wanted = _checks.integer(there, found, ndim=1)
    else:
        wanted = _checks.floating(there, found, ndim=2)
    if image.size == 0 or wanted.size == 0:
        raise ValueError(f"{name} must not be empty, got images {_checks.describe(image)}.")
    _checks.shape(there, wanted, (len(image), *wanted.shape[1:]), "(one row per image)")
    return {"image": image, target: wanted}
