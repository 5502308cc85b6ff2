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
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdjax import _checks, core, parallel, train
from kdjax import augment as kaugment
from kdjax import data as kdata
from kdjax._pairs import Batch, Method, Model, State, Tree
from kdjax.experiments._condense_compare import compare
from kdjax.experiments._condense_figures import curves, image_grids, pictures
from kdjax.experiments._condense_probe import few_shot, linear_probe
from kdjax.experiments._condense_report import Report, Row, snippet
from kdjax.experiments._condense_subsets import herding, k_means, noise, random_subset
from kdjax.experiments._condense_train import fine_tune, outputs, pretrain, pretrain_labelled, r2
from kdjax.experiments._threads import few_threads
from kdjax.methods import krr_st

__all__ = [
    "Cost",
    "Report",
    "Row",
    "compare",
    "condense",
    "costs",
    "curves",
    "few_shot",
    "fine_tune",
    "herding",
    "image_grids",
    "k_means",
    "linear_probe",
    "noise",
    "outputs",
    "pictures",
    "pretrain",
    "pretrain_labelled",
    "r2",
    "random_subset",
    "snippet",
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
    target: Model | None = None,
    frozen: Tree = None,
    augment: Callable[[jax.Array, Batch], Batch] | None = None,
    on_device: bool = False,
    steps_per_call: int = 1,
    mesh: Mesh | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 1000,
    evaluate: Callable[[dict[str, np.ndarray]], Mapping[str, float]] | None = None,
    eval_every: int | None = None,
    progress: bool = True,
    report: Callable[[int, dict[str, Any]], None] | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Learns pairs that stand for a data set, from images and what a target network says of them.

    The targets are computed once, beforehand (`outputs`), or in every update for augmented images,
    as published, which costs a forward pass of the target network.

    Args:
      network: the pool's network, with a tap ``features`` (`kdjax.methods.krr_st.krr_st`).
      images: [N, ...] floating, or [N, H, W, C] uint8, which every update scales to [0, 1].
      targets: [N, k] floating: the target network's outputs for the images. None with ``target``.
      pairs: the start, ``{"image": [m, ...], "target": [m, k]}``. Real images nearest to the
        centres of k-means are a better one than images drawn by chance.
      key: of the pool, its draws and the order of the images.
      steps: updates of the pairs, at least 1.
      learning_rate: of images and targets at the start; falls along a line to a thousandth. 1e-5
        for Tiny-ImageNet and ImageNet; small tasks need more (digits: 3e-3, 1500 steps).
      batch_size: real images of an update, at least 1; at most all of them are taken. The last
        batch of an epoch is filled up with rows that don't count.
      target: the target network, its targets as ``logits`` (`kdjax.methods.barlow_twins.features`),
        if every update shall compute them. None: they are ``targets``.
      frozen: its variables.
      augment: ``(key, batch) -> batch`` as `kdjax.augment.compose` makes, for the real images of
        every update, before ``network`` and ``target`` see them; only with a target network.
      on_device: whether images and targets lie on the device (with a mesh: on each), so that only
        row numbers travel.
      steps_per_call: updates in one dispatch, as in `kdjax.train.fit`.
      mesh: from `kdjax.parallel.data_mesh`, to split the real images of an update over devices.
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
      TypeError: an array of another kind.
      ValueError: arrays that don't fit each other, targets as well as a target network or neither,
        or an option out of its range.
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
      Lee et al., ICLR 2024, algorithm 1; targets that are computed once are ours.
    """
    columns = _columns(images, targets, target)
    method = krr_st.krr_st(network, pairs, target=target, augment=augment, **options)

    def pairs_of(state: State) -> dict[str, np.ndarray]:
        return jax.device_get(dict(state.params["student"]))

    data = kdata.arrays({"train": columns}, num_classes=1, name="pairs")
    if on_device:
        frozen = jax.tree.map(jnp.asarray, (columns, frozen))
        frozen = frozen if mesh is None else parallel.replicate(frozen, mesh)
        rows = np.arange(len(columns["image"]))
        data = kdata.arrays(
            {"train": {"row": rows}}, num_classes=1, name=f"rows of {data.fingerprint('train')}"
        )
    learner = core.minimize(
        _scaled(method, on_device), krr_st.optimizer(learning_rate, steps=steps)
    )
    start_key, order_key = jax.random.split(key)
    batches = data.batches(
        "train",
        min(_checks.count("batch_size", batch_size), data.size("train")),
        seed=int(jax.random.randint(order_key, (), 0, 2**31 - 1)),
        last="pad",
        raw=columns["image"].dtype == np.uint8,
    )
    with few_threads(len(pairs["image"])):
        state = train.fit(
            learner,
            learner.init(start_key, batches.at(0), frozen),
            batches,
            frozen=frozen,
            steps=steps,
            mesh=mesh,
            steps_per_call=steps_per_call,
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


def _columns(images: Any, targets: Any, target: Model | None) -> dict[str, np.ndarray]:
    """What batches are made of."""
    if (targets is None) == (target is None):
        raise ValueError(
            "targets must be None with a target network, which computes them, and given without "
            f"one, got {_checks.describe(targets)} and target {_checks.describe(target)}."
        )
    if getattr(images, "dtype", None) == np.uint8 and np.ndim(images) == 4:
        found = np.asarray(images)
    else:
        found = np.asarray(_checks.floating("images", images, min_ndim=2))
    if targets is None:
        return {"image": found}
    wanted = np.asarray(_checks.floating("targets", targets, ndim=2))
    _checks.shape("targets", wanted, (len(found), wanted.shape[1]), "(one row per image)")
    return {"image": found, "target": wanted}


def _scaled(method: Method, on_device: bool) -> Method:
    """The Method on raw batches, or on row numbers with ``frozen`` the arrays and its own."""

    def read(batch: Batch, frozen: Tree) -> tuple[Batch, Tree]:
        if on_device:
            columns, frozen = frozen
            batch = {**batch, **{name: x[batch["row"]] for name, x in columns.items()}}
        if batch["image"].dtype == np.uint8:
            batch = {**batch, "image": kaugment.to_float(batch["image"])}
        return batch, frozen

    def init(key: jax.Array, batch: Batch, frozen: Tree = None) -> tuple[Tree, Tree]:
        return method.init(key, *read(batch, frozen))

    def prepare(
        params: Tree, extra: Tree, batch: Batch, frozen: Tree = None, **keywords: Any
    ) -> Batch:
        assert method.prepare is not None
        return method.prepare(params, extra, *read(batch, frozen), **keywords)

    return method._replace(init=init, prepare=prepare)


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
