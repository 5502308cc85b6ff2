"""Stored teacher outputs as a teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax import core
from kdjax._pairs import Batch, Model
from kdjax.data import StoredOutputs


def stored_teacher(stored: StoredOutputs, temperature: float) -> Model:
    """The teacher whose outputs `kdjax.data.Dataset.with_outputs` put into the batch.

    Of top-k outputs the probability that is left over is spread evenly over the other classes.

    Args:
      stored: the outputs.
      temperature: that of the soft labels. Top-k outputs are log-probabilities at a temperature of
        their own and serve no other.

    Returns:
      A Model for `kdjax.distill`, without variables.

    Raises:
      ValueError: top-k outputs of another temperature.
    """
    manifest = stored.manifest
    if manifest["top_k"] is None:
        return core.from_batch(logits="teacher_logits")
    if float(manifest["temperature"]) != float(temperature):
        raise ValueError(
            f"temperature must be {manifest['temperature']:g}, that of the stored top-"
            f"{manifest['top_k']} outputs in {stored.path}, got {temperature:g}."
        )
    classes = int(manifest["classes"])

    def logits(batch: Batch) -> jax.Array:
        values, indices = jnp.asarray(batch["teacher_values"]), batch["teacher_indices"]
        others = jnp.asarray(batch["teacher_rest"]) - jnp.log(float(classes - values.shape[-1]))
        rows = jnp.arange(values.shape[0])[:, None]
        spread = jnp.broadcast_to(others[:, None], (values.shape[0], classes))
        return temperature * spread.at[rows, indices].set(values)

    return core.from_batch(logits=logits)
