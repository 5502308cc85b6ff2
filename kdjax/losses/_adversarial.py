"""Losses that attacks maximise, and the regulariser of TRADES. Larger is better for the attack."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.losses._divergences import kl_parts
from kdjax.losses._inputs import ClassLabels, blank, class_labels, hyperparameter, select

# A ratio of differences of logits; the published code guards its denominator with this.
_TINY = 1e-12


def margin(logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """By how much the best wrong class beats the label: the attack loss of Carlini and Wagner.

        max_{k != y} z_k - z_y,   positive where misclassified

    Args:
        logits: [..., C] floating point, C at least 2.
        labels: [...] integer class indices, -1 for an unlabelled example (value and gradient 0).
        where: [...] bool, False for examples to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32.

    Raises:
        TypeError: ``logits`` are not floating point or ``labels`` not integers.
        ValueError: shapes do not fit, fewer than 2 classes, or a label outside -1 .. C-1 (NaN
            inside jit, where labels have no values yet).

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> losses.margin(jnp.array([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]]), jnp.array([0, 1]))
        Array([-2.,  2.], dtype=float32)

    Reference:
        N. Carlini, D. Wagner, "Towards Evaluating the Robustness of Neural Networks", S&P 2017,
        section V.A (f_6 without its floor).
    """
    z, mask, known = _arguments(logits, labels, where, classes=2)
    return select(known.finish(_margin(z, known)), mask)


def dlr(logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Difference of logits ratio, which neither a shift nor a scale of the logits changes.

        (max_{k != y} z_k - z_y) / (z_(1) - z_(3) + 1e-12),   z_(i) the i-th largest logit

    If the label has the third largest logit the value is 1 and the gradient 0: that example can't
    be attacked with this loss (its targeted form can).

    Args:
        logits: [..., C] floating point, C at least 3.
        labels: [...] integer class indices, -1 for an unlabelled example (value and gradient 0).
        where: [...] bool, False for examples to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32, positive where misclassified.

    Raises:
        TypeError: ``logits`` are not floating point or ``labels`` not integers.
        ValueError: shapes do not fit, fewer than 3 classes, or a label outside -1 .. C-1 (NaN
            inside jit).

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> losses.dlr(jnp.array([[4.0, 2.0, 0.0]]), jnp.array([0]))
        Array([-0.5], dtype=float32)

    Reference:
        F. Croce, M. Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
        Diverse Parameter-free Attacks", ICML 2020, equation 6.
    """
    z, mask, known = _arguments(logits, labels, where, classes=3)
    top, _ = jax.lax.top_k(z, 3)
    ratio = _margin(z, known) / (top[..., 0] - top[..., 2] + _TINY)
    return select(known.finish(ratio), mask)


def targeted_dlr(
    logits: ArrayLike, labels: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Difference of logits ratio towards a target class.

        -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12),   z_(i) the i-th largest logit

    Args:
        logits: [..., C] floating point, C at least 4.
        labels: [...] integer class indices, -1 for an unlabelled example (value and gradient 0).
        targets: [...] integer class indices t.
        where: [...] bool, False for examples to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32, positive where the target beats the label.

    Raises:
        TypeError: ``logits`` are not floating point, or ``labels`` or ``targets`` not integers.
        ValueError: shapes do not fit, fewer than 4 classes, or a class index out of range (NaN
            inside jit).

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> z = jnp.array([[4.0, 3.0, 1.0, 1.0]])
        >>> losses.targeted_dlr(z, jnp.array([0]), jnp.array([1])).round(4)
        Array([-0.3333], dtype=float32)

    Reference:
        F. Croce, M. Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
        Diverse Parameter-free Attacks", ICML 2020, equation 7.
    """
    z, mask, known = _arguments(logits, labels, where, classes=4)
    targets = _checks.integer("targets", targets)
    _checks.shape("targets", targets, z.shape[:-1], "(the logits without their classes)")
    aims = class_labels(targets, z, mask)
    top, _ = jax.lax.top_k(z, 4)
    gap = _at(z, known) - _at(z, aims)
    ratio = -gap / (top[..., 0] - (top[..., 2] + top[..., 3]) / 2 + _TINY)
    return select(known.finish(aims.finish(ratio)), mask)


def trades_kl(
    logits: ArrayLike,
    natural_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Divergence of a model's outputs on perturbed inputs from those on natural ones.

        KL(softmax(n / T) || softmax(z / T))

    Unlike ``soft_label_kl`` both sides are the model that is trained: the gradient flows through
    both, and there is no factor T^2. With the natural side held fixed this regulariser is known to
    lose several points of robust accuracy.

    Args:
        logits: [..., C] floating point, on perturbed inputs.
        natural_logits: [..., C] floating point, on the natural ones.
        temperature: softens both sides; a finite scalar above 0.
        where: [...] bool, False for examples to leave out (value and gradient 0). None keeps all.

    Returns:
        [...] in at least float32; 0 with a zero gradient where both agree.

    Raises:
        TypeError: logits are not floating point.
        ValueError: shapes differ, or the temperature is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> natural = jnp.log(jnp.array([[0.25, 0.75]]))
        >>> losses.trades_kl(jnp.log(jnp.array([[0.5, 0.5]])), natural).round(4)
        Array([0.1308], dtype=float32)

    Reference:
        H. Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy",
        ICML 2019, equation 5.
    """
    z = _checks.floating("logits", logits, min_ndim=1)
    n = _checks.floating("natural_logits", natural_logits, min_ndim=1)
    _checks.same_shape("natural_logits", n, "logits", z)
    mask = _checks.mask("where", where, z.shape[:-1])
    dtype = jnp.promote_types(z.dtype, n.dtype)
    z, n = blank(z.astype(dtype), mask), blank(n.astype(dtype), mask)
    divergence, _, _ = kl_parts(n, z, hyperparameter("temperature", temperature, dtype, above=0))
    return select(divergence, mask)


def _arguments(
    logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None, *, classes: int
) -> tuple[jax.Array, jax.Array | None, ClassLabels]:
    z = _checks.floating("logits", logits, min_ndim=1)
    if z.shape[-1] < classes:
        raise ValueError(
            f"logits must have at least {classes} classes in the last dimension for this loss, got "
            f"{_checks.describe(z)}."
        )
    mask = _checks.mask("where", where, z.shape[:-1])
    z = blank(z, mask)
    return z, mask, class_labels(labels, z, mask)


def _at(z: jax.Array, known: ClassLabels) -> jax.Array:
    return jnp.take_along_axis(z, known.classes[..., None], axis=-1, mode="clip")[..., 0]


def _margin(z: jax.Array, known: ClassLabels) -> jax.Array:
    return jnp.max(jnp.where(known.hot(z), -jnp.inf, z), axis=-1) - _at(z, known)
