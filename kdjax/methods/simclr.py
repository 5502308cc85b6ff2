"""SimCLR: self-supervised features from telling the views of one image from those of all others.

A backbone sees two augmented views of every image; a projector follows; the loss is that of
classifying each view's partner among all views of the batch, on all devices. It wants large
batches, as these are the negatives. The features before the projector are what is used afterwards
(`features`).

Both views go through the networks in one pass, with batch statistics of both together, as in the
published code.

Reference:
  T. Chen, S. Kornblith, M. Norouzi, G. Hinton, "A Simple Framework for Contrastive Learning of
  Visual Representations", ICML 2020 (arXiv 2002.05709), and its published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdjax import losses
from kdjax._pairs import Method, Model
from kdjax.methods import _two_views
from kdjax.methods._two_views import Augment, Number, embeddings, features
from kdjax.terms import at
from kdjax.terms._outputs import checked

__all__ = ["embeddings", "features", "optimizer", "simclr"]


def simclr(
    backbone: Model,
    *,
    projector: Sequence[int] = (512, 128),
    tap: str = "pool",
    temperature: Number = 0.5,
    forward: str = "joint",
    augment: Augment | None = None,
) -> Method:
    """A Method that trains a backbone by SimCLR.

    The mean over the batch of `kdjax.losses.nt_xent` of the embeddings of both views.

    Args:
      backbone: the network that is trained. Its classifier, if it has one, gets no gradient.
      projector: widths of the layers after the backbone, linear without bias, with batch norm and
        ReLU between them; the last is that of the embeddings. Published: the features' own width,
        then 128 (where the code has one more batch norm).
      tap: the backbone's output that the projector takes; maps and tokens are averaged over their
        positions.
      temperature: above 0; 0.5 for CIFAR-10, 0.1 for ImageNet.
      forward: one ``"joint"`` pass over both views, or ``"separate"`` passes, each with batch
        statistics of its own.
      augment: makes the two views in every update: `kdjax.augment.simclr_views`, or
        `kdjax.augment.two_views` of any augmentation. None: batch entries ``view1`` and ``view2``
        hold them.

    Returns:
      A `Method` without teacher. ``params["student"]`` is the backbone. The temperature may be an
      array or a schedule of the step. Metrics: ``loss`` and ``loss/nt_xent``. Rows of weight 0 are
      left out of the loss, also as negatives, and of the projector's statistics; all others count
      alike.

    Raises:
      TypeError: the backbone is no `Model`.
      ValueError: a number out of its range, no such tap, or a batch of one row.

    Example:
      >>> import jax, optax, kdjax as kd
      >>> backbone = kd.from_linen(kd.models.MLP(10, features=(16,)), taps={"pool": "pool"})
      >>> method = kd.methods.simclr.simclr(
      ...     backbone, projector=(32, 16), augment=kd.augment.digits_views()
      ... )
      >>> learner = kd.minimize(method, optax.adam(1e-3))
      >>> batch = next(iter(kd.data.digits().batches("train", 8, seed=0)))
      >>> state = learner.init(jax.random.key(0), batch)
      >>> state, metrics = jax.jit(learner.update)(state, batch)
      >>> sorted(metrics)
      ['loss', 'loss/nt_xent']

    Reference:
      Chen et al., ICML 2020, equation 1 and algorithm 1, by the published code.
    """
    checked("temperature", temperature, above=0)

    def compare(
        z1: jax.Array, z2: jax.Array, *, step: jax.Array, axis_name: Any, where: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        values = losses.nt_xent(
            z1, z2, temperature=at(temperature, step), axis_name=axis_name, where=where
        )
        count = jnp.asarray(len(values) if where is None else jnp.sum(where), values.dtype)
        total = jnp.sum(values)
        if axis_name is not None:
            total, count = jax.lax.psum((total, count), axis_name)
        return total / jnp.maximum(count, 1), {}

    return _two_views.build(
        backbone,
        name="nt_xent",
        projector=projector,
        tap=tap,
        forward=forward,
        augment=augment,
        compare=compare,
    )


def optimizer(
    *,
    steps: int,
    learning_rate: float = 1.0,
    batch_size: int = 512,
    warm_up_steps: int = 0,
    weight_decay: float = 1e-6,
) -> optax.GradientTransformation:
    """LARS with a cosine, as published; the defaults are those for CIFAR-10.

    Biases and norms get neither weight decay nor LARS' adaptation.

    Args:
      steps: length of training: 1000 epochs for CIFAR-10, 100 and more for ImageNet.
      learning_rate: at its peak, multiplied by the batch size over 256; 0.3 for ImageNet.
      batch_size: 512 for CIFAR-10, 4096 for ImageNet.
      warm_up_steps: how long it rises from 0, along a line; published are 10 epochs.
      weight_decay: of kernels.

    Returns:
      An optax transformation.

    Raises:
      ValueError: ``steps`` below 1, or no more of them than those of the warm-up.

    Example:
      >>> import kdjax as kd
      >>> epoch = 50_000 // 512
      >>> tx = kd.methods.simclr.optimizer(steps=1000 * epoch, warm_up_steps=10 * epoch)

    Reference:
      Chen et al., ICML 2020, section 2.2 and appendix B.9, by the published code.
    """
    rate = _two_views.schedule(
        learning_rate * batch_size / 256, steps=steps, warm_up_steps=warm_up_steps, end=0.0
    )
    kernels = _two_views.of_weights
    return optax.lars(
        rate, weight_decay=weight_decay, weight_decay_mask=kernels, trust_ratio_mask=kernels
    )
