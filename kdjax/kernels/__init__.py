"""Ridge and kernel ridge regression with exact cheap gradients, and Gram matrices."""

from kdjax.kernels._grams import arc_cosine, kernel_ridge_loss, linear, of_features, rbf
from kdjax.kernels._ridge import Ridge, krr_loss, ridge, ridge_predict

__all__ = [
    "Ridge",
    "arc_cosine",
    "kernel_ridge_loss",
    "krr_loss",
    "linear",
    "of_features",
    "rbf",
    "ridge",
    "ridge_predict",
]
