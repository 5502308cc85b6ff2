"""Ridge and kernel ridge regression with exact cheap gradients, and Gram matrices."""

from kdjax.kernels._ridge import Ridge, krr_loss, ridge, ridge_predict

__all__ = ["Ridge", "krr_loss", "ridge", "ridge_predict"]
