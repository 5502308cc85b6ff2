"""PGD against a trained model over a split: one compiled program for all its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from kdjax import attacks, losses, parallel
from kdjax._pairs import Batch, Model, Tree

Variables = tuple[Tree, Tree]
# The starts of the attacks are those of the image, whatever is attacked: accuracies of two models,
# or of two epochs, differ by the models alone.
_START = 0


class Attack(NamedTuple):
    """PGD on the cross-entropy from a random start, whose last iterate counts."""

    eps: float
    step_size: float
    steps: int
    norm: str


class Answers(NamedTuple):
    """What a model says on a split, in its order, rows without a label left out.

    Attributes:
      labels: [N].
      clean: logits [N, C] on the images.
      attacked: logits [N, C] on what the attack made of them.
    """

    labels: np.ndarray
    clean: np.ndarray
    attacked: np.ndarray

    def right(self) -> np.ndarray:
        """[N] bool: right on the image, with finite logits."""
        return _right(self.clean, self.labels)

    def robust(self) -> np.ndarray:
        """[N] bool: right on the image and under attack."""
        return self.right() & _right(self.attacked, self.labels)


def answers(
    model: Model,
    variables: Variables,
    batches: Iterable[Batch],
    attack: Attack,
    *,
    mesh: Mesh | None = None,
    report: Callable[[int], None] = lambda images: None,
) -> Answers:
    """Runs the model and the attack over a split.

    Args:
      model: the network.
      variables: its ``(params, extra)``.
      batches: one pass over the split, padded.
      attack: what the attack is.
      mesh: devices to split each batch over.
      report: hears of the images of every batch.

    Returns:
      The answers.
    """
    program = _program(model, attack.steps, attack.norm)
    if mesh is not None:
        variables = parallel.replicate(variables, mesh)
    labels, clean, attacked = [], [], []
    for batch in batches:
        real = np.asarray(batch["label"]) >= 0
        given = {name: batch[name] for name in batch if name != "weight"}
        if mesh is not None:
            given = parallel.shard_batch(given, mesh)
        found = jax.device_get(program(*variables, given, attack.eps, attack.step_size))
        labels.append(np.asarray(batch["label"])[real])
        clean.append(found[0][real])
        attacked.append(found[1][real])
        report(int(real.sum()))
    return Answers(np.concatenate(labels), np.concatenate(clean), np.concatenate(attacked))


def perturbed(
    model: Model, variables: Variables, batch: Batch, attack: Attack
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A batch's attacked images, and the predictions on the images and on those."""
    program = _program(model, attack.steps, attack.norm)
    clean, attacked, x_adv = program(*variables, dict(batch), attack.eps, attack.step_size)
    return np.asarray(x_adv), np.asarray(clean).argmax(-1), np.asarray(attacked).argmax(-1)


def logits_fn(model: Model, variables: Variables) -> Partial:
    """The model as attacks take it: other variables compile nothing anew."""
    return Partial(_logits(model), variables)


def unroll(model: Model, shape: tuple[int, ...]) -> bool | None:
    """Whether an attack's loop is unrolled: not without convolutions, so that it compiles fast.

    With some, None: their gradients are slow inside loops on a CPU, and the attack decides.
    """
    image = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    params, extra = jax.eval_shape(model.init, jax.random.key(0), image)
    found = jax.make_jaxpr(lambda p, e, x: model.apply(p, e, x, train=False))(params, extra, image)
    return None if "conv_general_dilated" in str(found) else False


# Kept, so that programs compiled for a model are found again.
@functools.lru_cache(maxsize=32)
def _logits(model: Model) -> Callable[[Variables, jax.Array], jax.Array]:
    def logits(variables: Variables, images: jax.Array) -> jax.Array:
        return model.apply(*variables, images, train=False)[0]["logits"]

    return logits


@functools.lru_cache(maxsize=32)
def _program(model: Model, steps: int, norm: str) -> Callable[..., Any]:
    function = _logits(model)

    @jax.jit
    def run(params: Tree, extra: Tree, batch: Batch, eps: Any, step_size: Any) -> Any:
        images = jnp.asarray(model.read(batch))
        label = jnp.maximum(batch["label"], 0)

        def loss(x: jax.Array) -> jax.Array:
            return losses.hard_label_cross_entropy(function((params, extra), x), label)

        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(_START), batch["index"])
        x_adv = attacks.pgd(
            loss, images, eps=eps, step_size=step_size, steps=steps, norm=norm, key=keys,
            unroll=unroll(model, images.shape[1:]),
        )  # fmt: skip
        logits = [function((params, extra), x) for x in (images, x_adv)]
        return *(x.astype(jnp.float32) for x in logits), x_adv

    return run


def _right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    found: np.ndarray = (logits.argmax(-1) == labels) & np.isfinite(logits).all(-1)
    return found
