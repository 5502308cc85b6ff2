"""A model that starts from given parameters: fine-tuning, later stages, pruned copies."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kdjax._pairs import Model, Tree
from kdjax._teachers import variables as pair_of


def started(model: Model, variables: Any) -> Model:
    """The same model, whose ``init`` returns given variables instead of random ones.

    Whatever starts from the student's initial parameters (its optimizer state, its average)
    starts from these.

    Args:
      model: any `Model`.
      variables: ``(params, extra)``, or a Flax variables dict with "params": a checkpoint, the
        student of an earlier stage, a model made of some of the teacher's layers.

    Returns:
      A `Model`. Every ``init`` copies the variables, so that a State of them may be donated.

    Raises:
      ValueError: other variables; at ``init``, trees or shapes that aren't the model's.

    Example:
      >>> import jax, jax.numpy as jnp, kdjax as kd
      >>> model = kd.from_linen(kd.models.MLP(3, features=(8,)))
      >>> x = jnp.ones((2, 4))
      >>> first = model.init(jax.random.key(0), x)
      >>> again = kd.started(model, first).init(jax.random.key(1), x)
      >>> bool((again[0]["classifier"]["bias"] == first[0]["classifier"]["bias"]).all())
      True
    """
    given = pair_of(variables)

    def init(key: jax.Array, *inputs: Any) -> tuple[Tree, Tree]:
        wanted = jax.eval_shape(model.init, key, *inputs)
        for name, want, got in zip(("params", "extra"), wanted, given, strict=True):
            _check(name, want, got)
        return jax.tree.map(lambda x: jnp.array(x, copy=True), given)

    return model._replace(init=init)


def _check(name: str, want: Tree, got: Tree) -> None:
    shapes = [
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(leaf)
            for path, leaf in jax.tree.leaves_with_path(tree)
        }
        for tree in (want, got)
    ]
    for path in sorted({*shapes[0], *shapes[1]}):
        here, there = (found.get(path, "nothing") for found in shapes)
        if here != there:
            raise ValueError(
                f"variables must be those of the model: {name}/{path} must be {here}, got {there}."
            )
