"""Evaluation metrics: how good, how faithful to the teacher and how well calibrated a model is.

Predictions: scalars from whole arrays, usable inside jit. Rows whose label is -1 (unlabelled) or
whose ``where`` is False are left out; with no row left the result is NaN. Each is a mean over rows,
so batches of different size combine by their number of rows (the calibration errors don't: compute
them on all rows at once). Labels outside -1 .. C-1 are an error; inside jit, where they have no
values yet, they make the result NaN.

Robustness: the temperature that calibrates logits, and what a training loses after its best epoch.

Features: how alike two sets of features are, the singular values of a kernel, and the closed-form
dynamics of the projector between student and teacher. These take all rows at once.
"""

from kdjax.metrics._calibration import (
    accuracy,
    agreement,
    brier_score,
    expected_calibration_error,
    maximum_calibration_error,
    negative_log_likelihood,
    top_k_accuracy,
)
from kdjax.metrics._dynamics import (
    batch_norm_orthogonality,
    projector_after_steps,
    projector_fixed_point,
    projector_rate_limit,
    projector_velocity,
)
from kdjax.metrics._overfitting import RobustOverfitting, robust_overfitting
from kdjax.metrics._similarity import input_output_correlation, linear_cka, log_singular_values
from kdjax.metrics._temperature import fit_temperature

__all__ = [
    "RobustOverfitting",
    "accuracy",
    "agreement",
    "batch_norm_orthogonality",
    "brier_score",
    "expected_calibration_error",
    "fit_temperature",
    "input_output_correlation",
    "linear_cka",
    "log_singular_values",
    "maximum_calibration_error",
    "negative_log_likelihood",
    "projector_after_steps",
    "projector_fixed_point",
    "projector_rate_limit",
    "projector_velocity",
    "robust_overfitting",
    "top_k_accuracy",
]
