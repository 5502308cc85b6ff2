"""Condensing a data set into learned pairs, what the pairs are worth, and against what.

The learned pairs come from `kdjax.methods.krr_st`; what they are compared with are real images
chosen by chance, by k-means, by herding, and noise, each with the targets of the same target
network, and all are judged by networks that are pre-trained on them identically.

Reference:
  D. B. Lee, S. Lee, J. Ko, K. Kawaguchi, J. Lee, S. J. Hwang, "Self-Supervised Dataset Distillation
  for Transfer Learning", ICLR 2024, and its published code, whose settings are the defaults.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax import _checks, core, train
from kdjax import data as kdata
from kdjax._pairs import Model, State, Tree
from kdjax.experiments._condense_probe import few_shot, linear_probe
from kdjax.experiments._condense_subsets import herding, k_means, noise, random_subset
from kdjax.experiments._condense_train import fine_tune, outputs, pretrain, pretrain_labelled, r2
from kdjax.methods import krr_st

__all__ = [
    "Cost",
    "condense",
    "costs",
    "few_shot",
    "fine_tune",
    "herding",
    "k_means",
    "linear_probe",
    "noise",
    "outputs",
    "pretrain",
    "pretrain_labelled",
    "r2",
    "random_subset",
]


def condense(
    network: Model,
    images: Any,
    targets: Any,
    pairs: Mapping[str, Any],
    *,
    key: jax.Array,
    steps: int = 160_000,
    learning_rate: float = 1e-4,
    batch_size: int = 1024,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 1000,
    evaluate: Callable[[dict[str, np.ndarray]], Mapping[str, float]] | None = None,
    eval_every: int | None = None,
    progress: bool = True,
    report: Callable[[int, dict[str, Any]], None] | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Learns pairs that stand for a data set, from images and stored targets.

    Args:
      network: the pool's network, with a tap ``features`` (`kdjax.methods.krr_st.krr_st`).
      images: [N, ...] floating.
      targets: [N, k] floating: the target network's outputs for the images.
      pairs: the start, ``{"image": [m, ...], "target": [m, k]}``. Real images nearest to the
        centres of k-means are a better one than images drawn by chance.
      key: of the pool, its draws and the order of the images.
      steps: updates of the pairs, at least 1.
      learning_rate: of images and targets at the start; falls along a line to a thousandth. 1e-5
        for Tiny-ImageNet and ImageNet; small tasks need more (digits: 3e-3, 1500 steps).
      batch_size: real images of an update, at least 1; at most all of them are taken. The last
        batch of an epoch is filled up with rows that don't count.
      checkpoint: a folder for this run alone; the same call again then resumes.
      save_every: steps between checkpoints.
      evaluate: pairs so far to figures, such as those of a network pre-trained on them.
      eval_every: steps between evaluations, by default ``save_every``; always at the last step.
      progress: whether to show a bar.
      report: called with ``(step, metrics)`` now and then, as in `kdjax.train.fit`.
      **options: those of `kdjax.methods.krr_st.krr_st`: ``pool_size``, ``max_age``, ``solver``, ...

    Returns:
      The learned pairs on the host, ``{"image": [m, ...], "target": [m, k]}``.

    Raises:
      TypeError: an array is not floating point.
      ValueError: arrays that don't fit each other, or an option out of its range.
      FloatingPointError: the regression lost its positive definiteness to rounding; the same call
        with ``solver="svd"`` goes on.

    Example:
      >>> import jax, jax.numpy as jnp, kdjax as kd
      >>> from kdjax.experiments import condense
      >>> net = kd.from_linen(kd.models.MLP(4, features=(8,)), taps={"features": "pool"})
      >>> x, y = jnp.ones((6, 8, 8, 1)), jnp.ones((6, 4))
      >>> pairs = {"image": x[:2], "target": y[:2]}
      >>> found = condense.condense(
      ...     net, x, y, pairs, steps=2, pool_size=2, max_age=3, key=jax.random.key(0)
      ... )
      >>> found["image"].shape
      (2, 8, 8, 1)

    Reference:
      Lee et al., ICLR 2024, algorithm 1, with targets that are computed once.
    """
    images = np.asarray(_checks.floating("images", images, min_ndim=2))
    targets = np.asarray(_checks.floating("targets", targets, ndim=2))
    _checks.shape("targets", targets, (len(images), targets.shape[1]), "(one row per image)")
    method = krr_st.krr_st(network, pairs, **options)

    def pairs_of(state: State) -> dict[str, np.ndarray]:
        return jax.device_get(dict(state.params["student"]))

    learner = core.minimize(method, krr_st.optimizer(learning_rate, steps=steps))
    start_key, order_key = jax.random.split(key)
    size = min(_checks.count("batch_size", batch_size), len(images))
    batches = kdata.arrays(
        {"train": {"image": images, "target": targets}}, num_classes=1, name="pairs"
    ).batches("train", size, seed=int(jax.random.randint(order_key, (), 0, 2**31 - 1)), last="pad")
    state = train.fit(
        learner,
        learner.init(start_key, batches.at(0)),
        batches,
        steps=steps,
        checkpoint=checkpoint,
        save_every=save_every,
        keep=1,
        evaluate=None if evaluate is None else lambda state: evaluate(pairs_of(state)),
        eval_every=eval_every,
        progress=progress,
        plot=False,
        report=report,
    )
    return pairs_of(state)


class Cost(NamedTuple):
    """What pre-training on one set costs, and what it gives.

    Attributes:
      name: of the set.
      pairs: how many.
      bytes: of images and targets, as given.
      steps: updates.
      seconds: of pre-training, compilation apart.
      figures: what ``measure`` found.
    """

    name: str
    pairs: int
    bytes: int
    steps: int
    seconds: float
    figures: dict[str, float]


def costs(
    network: Model,
    sets: Mapping[str, Mapping[str, Any]],
    measure: Callable[[tuple[Tree, Tree]], Mapping[str, float]],
    *,
    key: jax.Array,
    epochs: int | Mapping[str, int] = 1000,
    batch_size: int = 256,
    **options: Any,
) -> list[Cost]:
    """Pre-trains on several sets (learned pairs, all real pairs) and says what each costs.

    Args:
      network: what is pre-trained, from the same initial parameters on every set.
      sets: name to pairs, as `pretrain` takes them.
      measure: trained variables to figures.
      key: as in `pretrain`.
      epochs: as in `pretrain`, for all sets or for each by name.
      batch_size: as in `pretrain`.
      **options: others of `pretrain`.

    Returns:
      One row for each set, in their order.

    Raises:
      ValueError: no epochs for a set, or what `pretrain` refuses.

    Example:
      >>> import jax, jax.numpy as jnp, kdjax as kd
      >>> from kdjax.experiments import condense
      >>> net = kd.from_linen(kd.models.MLP(4, features=(8,)))
      >>> few = {"image": jnp.ones((2, 8, 8, 1)), "target": jnp.ones((2, 4))}
      >>> (row,) = condense.costs(
      ...     net, {"few": few}, lambda variables: {}, epochs=2, key=jax.random.key(0)
      ... )
      >>> row.pairs, row.bytes, row.steps
      (2, 544, 2)
    """
    found = []
    for name, pairs in sets.items():
        own = epochs if isinstance(epochs, int) else _checks.entry("epochs", epochs, name)
        arguments = {"key": key, "batch_size": batch_size, **options}
        pretrain(network, pairs, epochs=1, **arguments)  # compiles
        began = time.perf_counter()
        variables = jax.block_until_ready(pretrain(network, pairs, epochs=own, **arguments))
        seconds = time.perf_counter() - began
        size = len(pairs["image"])
        found.append(
            Cost(
                name=name,
                pairs=size,
                bytes=int(pairs["image"].nbytes + pairs["target"].nbytes),
                steps=own * -(-size // batch_size),
                seconds=seconds,
                figures=dict(measure(variables)),
            )
        )
    return found
