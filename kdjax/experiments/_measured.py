"""From trained models to the rows of a report."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from kdjax._pairs import Model
from kdjax.data import Dataset
from kdjax.experiments import measures, training
from kdjax.experiments.report import Row


def row(
    role: str,
    name: str,
    network: Model,
    outcomes: Sequence[training.Outcome],
    dataset: Dataset,
    *,
    labels: int,
    teacher_logits: np.ndarray | None = None,
    teacher_parameters: int | None = None,
) -> tuple[Row, np.ndarray]:
    """Measures the models of one role on the test split.

    Args:
      role: "teacher", "alone" or "distilled".
      name: of the network.
      network: the network.
      outcomes: its trained variables, one for each seed.
      dataset: the data.
      labels: labelled examples it was trained on.
      teacher_logits: the teacher's on the test split; None for the teacher itself.
      teacher_parameters: the size of the teacher; None for the teacher itself.

    Returns:
      The row, and the logits of the last model on the test split.
    """
    scores = []
    for outcome in outcomes:
        variables = jax.device_put(outcome.variables)
        score, logits = measures.score(network, variables, dataset, teacher_logits=teacher_logits)
        scores.append(score)
    cost = measures.cost(network, outcomes[0].variables, dataset.shape)
    agreements = [score.agreement for score in scores if score.agreement is not None]
    size = cost.parameters if role == "teacher" else teacher_parameters
    return Row(
        name=role,
        model=name,
        accuracy=measures.estimate(score.accuracy for score in scores),
        ece=measures.estimate(score.ece for score in scores),
        agreement=measures.estimate(agreements) if agreements else None,
        corrupted={
            kind: measures.estimate(score.corrupted[kind] for score in scores)
            for kind in scores[0].corrupted
        },
        parameters=cost.parameters,
        compression=None if size is None else size / cost.parameters,
        latency_ms=cost.latency_ms,
        memory_bytes=cost.memory_bytes,
        seconds=measures.estimate(outcome.seconds for outcome in outcomes),
        labels=labels,
        curves=[outcome.curve for outcome in outcomes],
        folders=[str(outcome.folder) for outcome in outcomes if outcome.folder is not None],
    ), logits
