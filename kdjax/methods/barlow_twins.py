"""Barlow Twins: self-supervised features whose channels agree between views and with no other.

A backbone sees two augmented views of every image; a projector follows; the loss asks that the
cross-correlation of the embeddings over the batch be the identity. No labels, no negatives, no
momentum network. The features before the projector are what is used afterwards (`features`), as
targets of `kdjax.methods.krr_st` among other things.

Each view is a forward pass of its own, with its own batch statistics, as in the published code; the
running statistics move twice per update. The batch norms of the projector and of the loss are those
of the whole batch on any number of devices; those of the backbone are what the backbone makes them
(of the whole batch under ``jax.jit``, of each device under a named axis).

Reference:
  J. Zbontar, L. Jing, I. Misra, Y. LeCun, S. Deny, "Barlow Twins: Self-Supervised Learning via
  Redundancy Reduction", ICML 2021 (arXiv 2103.03230), and its published code; the recipe for small
  images is that of W. G. C. Bandara, C. M. De Melo, V. M. Patel, "Guarding Barlow Twins Against
  Overfitting with Mixed Samples", 2023 (arXiv 2312.02151), without its mixup.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax

from kdjax._pairs import Method, Model
from kdjax.losses import _self_supervised
from kdjax.methods import _two_views
from kdjax.methods._two_views import Augment, Number, embeddings, features
from kdjax.terms import at
from kdjax.terms._outputs import checked

__all__ = ["barlow_twins", "embeddings", "features", "imagenet_optimizer", "optimizer"]


def barlow_twins(
    backbone: Model,
    *,
    projector: Sequence[int] = (1024, 1024, 1024),
    tap: str = "pool",
    off_diagonal: Number = 0.0051,
    eps: Number = 1e-5,
    forward: str = "separate",
    augment: Augment | None = None,
) -> Method:
    """A Method that trains a backbone by Barlow Twins.

    ``sum_i (c_ii - 1)^2 + off_diagonal sum_{i != j} c_ij^2`` with c the cross-correlation of the
    embeddings of both views (`kdjax.losses.barlow_twins`).

    Args:
      backbone: the network that is trained. Its classifier, if it has one, gets no gradient.
      projector: widths of the layers after the backbone, linear without bias, with batch norm and
        ReLU between them; the last is that of the embeddings. Published: 8192 three times for
        ImageNet, two layers (512, 1024) for small images.
      tap: the backbone's output that the projector takes; maps and tokens are averaged over their
        positions.
      off_diagonal: weight of the off-diagonal entries, at least 0; 0.0078125 for CIFAR and
        0.0009765 for Tiny-ImageNet, with embeddings of 1024.
      eps: added to the variances by the loss, at least 0.
      forward: ``"separate"`` passes over the views, each with batch statistics of its own, or one
        ``"joint"`` pass.
      augment: makes the two views in every update: `kdjax.augment.two_views` of any augmentation,
        or `kdjax.augment.barlow_twins_views`, `simclr_views`, `digits_views`. None: batch entries
        ``view1`` and ``view2`` hold them.

    Returns:
      A `Method` without teacher. ``params["student"]`` is the backbone. Numbers may be arrays or
      schedules of the step. Metrics: ``loss``, ``loss/barlow_twins``, and the two sums
      ``on_diagonal`` and ``off_diagonal``, unweighted. Rows of weight 0 are left out of the loss
      and of the projector's statistics; all others count alike.

    Raises:
      TypeError: the backbone is no `Model`.
      ValueError: a number out of its range, no such tap, or a batch of one row.

    Example:
      >>> import jax, kdjax as kd
      >>> backbone = kd.from_linen(kd.models.MLP(10, features=(16,)), taps={"pool": "pool"})
      >>> twins = kd.methods.barlow_twins
      >>> method = twins.barlow_twins(
      ...     backbone, projector=(32, 32), augment=kd.augment.digits_views()
      ... )
      >>> learner = kd.minimize(method, twins.optimizer(steps=100, learning_rate=1e-3))
      >>> batch = next(iter(kd.data.digits().batches("train", 8, seed=0)))
      >>> state = learner.init(jax.random.key(0), batch)
      >>> state, metrics = jax.jit(learner.update)(state, batch)
      >>> sorted(metrics)
      ['loss', 'loss/barlow_twins', 'off_diagonal', 'on_diagonal']

    Reference:
      Zbontar et al., ICML 2021, equations 1 and 2, algorithm 1, by the published code.
    """
    checked("off_diagonal", off_diagonal, low=0)
    checked("eps", eps, low=0)

    def compare(
        z1: jax.Array, z2: jax.Array, *, step: jax.Array, **options: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        on, off = _self_supervised.diagonals(z1, z2, eps=at(eps, step), **options)
        return on + at(off_diagonal, step) * off, {"on_diagonal": on, "off_diagonal": off}

    return _two_views.build(
        backbone,
        name="barlow_twins",
        projector=projector,
        tap=tap,
        forward=forward,
        augment=augment,
        compare=compare,
    )


def optimizer(
    *,
    steps: int,
    learning_rate: float | jax.Array = 0.01,
    warm_up_steps: int = 0,
    end: float = 1e-3,
    weight_decay: float = 1e-6,
) -> optax.GradientTransformation:
    """Adam with a cosine, for small images.

    Args:
      steps: length of training: 2000 epochs for CIFAR, in batches of 256.
      learning_rate: at its peak. Published is 0.01 times the batch size over 256, after 10 epochs
        of warm-up; 1e-3 serves small networks without one.
      warm_up_steps: how long it rises from 0, along a line.
      end: the last learning rate relative to the peak.
      weight_decay: added to the gradient of every parameter, as torch's Adam does.

    Returns:
      An optax transformation.

    Raises:
      ValueError: ``steps`` below 1, or no more of them than those of the warm-up.

    Example:
      >>> import kdjax as kd
      >>> epoch = 50_000 // 256
      >>> tx = kd.methods.barlow_twins.optimizer(steps=2000 * epoch, warm_up_steps=10 * epoch)

    Reference:
      The published code of Bandara et al., 2023.
    """
    rate = _two_views.schedule(learning_rate, steps=steps, warm_up_steps=warm_up_steps, end=end)
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(rate))


def imagenet_optimizer(
    *,
    steps_per_epoch: int,
    epochs: int = 1000,
    batch_size: int = 2048,
    learning_rate: float = 0.2,
    bias_learning_rate: float = 0.0048,
    warm_up_epochs: int = 10,
    weight_decay: float = 1e-6,
) -> optax.GradientTransformation:
    """LARS as published for ImageNet, with a learning rate of its own for biases and norms.

    Biases and norms get neither weight decay nor LARS' adaptation. The learning rate multiplies the
    momentum, not what goes into it.

    Args:
      steps_per_epoch: updates per epoch.
      epochs: length of training.
      batch_size: both learning rates are multiplied by it over 256.
      learning_rate: of kernels, at its peak.
      bias_learning_rate: of everything with fewer than two dimensions.
      warm_up_epochs: how long both rise from 0; then they fall along half a cosine to a thousandth.
      weight_decay: of kernels.

    Returns:
      An optax transformation.

    Raises:
      ValueError: no more epochs than those of the warm-up.

    Example:
      >>> import kdjax as kd
      >>> tx = kd.methods.barlow_twins.imagenet_optimizer(steps_per_epoch=1_281_167 // 2048)

    Reference:
      The published code of Zbontar et al., ICML 2021.
    """

    def rate(peak: float) -> optax.GradientTransformation:
        scaled = _two_views.schedule(
            peak * batch_size / 256,
            steps=epochs * steps_per_epoch,
            warm_up_steps=warm_up_epochs * steps_per_epoch,
            end=1e-3,
        )
        return optax.scale_by_schedule(scaled)

    kernels = _two_views.of_weights
    lars = optax.lars(
        1.0, weight_decay=weight_decay, weight_decay_mask=kernels, trust_ratio_mask=kernels
    )
    rates = {True: rate(learning_rate), False: rate(bias_learning_rate)}
    return optax.chain(lars, optax.partition(rates, kernels))
