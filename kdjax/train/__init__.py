"""The training loop, its checkpoints, and evaluation.

`fit` is a loop over ``learner.update`` and nothing more: whatever it trains, your own loop trains
as well. `restore` and `load_student` read what it saved; `evaluate`, `predict` and
`predict_labels` run a model over a split.
"""

from kdjax.train._evaluate import evaluate, evaluator, predict, predict_labels
from kdjax.train._loop import fit
from kdjax.train._restore import load_student, restore

__all__ = [
    "evaluate",
    "evaluator",
    "fit",
    "load_student",
    "predict",
    "predict_labels",
    "restore",
]
