"""Losses lifted to Terms: which outputs of the student and the teacher they compare.

Weights are given to `kdjax.distill` beside each Term. Hyperparameters may be numbers, arrays or
schedules of the step; none of them recompiles the update.
"""

from kdjax.terms._outputs import at, hard_labels, labelled, matching, no_params, soft_labels
from kdjax.terms._projector import projector

__all__ = [
    "at",
    "hard_labels",
    "labelled",
    "matching",
    "no_params",
    "projector",
    "soft_labels",
]
