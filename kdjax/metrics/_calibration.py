"""How good, how faithful to the teacher and how well calibrated predictions are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import _checks


def accuracy(logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Share of rows whose largest logit is the label's.

        mean of [argmax_c z_c == label]

    Ties go to the lower class index. A row with NaN counts as wrong.

    Args:
        logits: [..., C] floating point (probabilities serve as well).
        labels: [...] integer class indices, -1 for rows to leave out.
        where: [...] bool, False for rows to leave out. None keeps all.

    Returns:
        Scalar float32 from 0 to 1, NaN without rows.

    Raises:
        TypeError: ``logits`` are not floating point or ``labels`` not integers.
        ValueError: shapes do not fit, or a label outside -1 .. C-1.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import metrics
        >>> logits = jnp.array([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
        >>> metrics.accuracy(logits, jnp.array([0, 0, -1]))
        Array(0.5, dtype=float32)

    Reference:
        none
    """
    return top_k_accuracy(logits, labels, k=1, where=where)


def top_k_accuracy(
    logits: ArrayLike, labels: ArrayLike, *, k: int = 5, where: ArrayLike | None = None
) -> jax.Array:
    """Share of rows whose label is among the k largest logits.

        mean of [rank of z_label < k],   rank = how many classes come before the label

    Ties go to the lower class index. A row with NaN counts as wrong.

    Args:
        logits: [..., C] floating point.
        labels: [...] integer class indices, -1 for rows to leave out.
        k: from 1 to C.
        where: [...] bool, False for rows to leave out. None keeps all.

    Returns:
        Scalar float32 from 0 to 1, NaN without rows.

    Raises:
        TypeError: ``logits`` are not floating point or ``labels`` not integers.
        ValueError: shapes do not fit, ``k`` is not from 1 to C, or a label outside -1 .. C-1.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import metrics
        >>> metrics.top_k_accuracy(jnp.array([[3.0, 2.0, 1.0]]), jnp.array([1]), k=2)
        Array(1., dtype=float32)

    Reference:
        none
    """
    z = _checks.floating("logits", logits, min_ndim=1)
    k = _checks.count("k", k, high=z.shape[-1])
    labels, counted = _counted(labels, z, where)
    at_label = _at_label(z, labels)[..., None]
    classes = jax.lax.broadcasted_iota(labels.dtype, z.shape, z.ndim - 1)
    before = classes < labels[..., None]
    rank = jnp.sum((z > at_label) | ((z == at_label) & before), axis=-1)
    hit = (rank < k) & ~jnp.any(jnp.isnan(z), axis=-1)
    return _mean(hit, counted, labels, z.shape[-1])


def agreement(
    student_logits: ArrayLike, teacher_logits: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Share of rows in which student and teacher predict the same class.

        mean of [argmax_c s_c == argmax_c t_c]

    A row with NaN on either side counts as disagreement.

    Args:
        student_logits: [..., C] floating point.
        teacher_logits: [..., C] floating point.
        where: [...] bool, False for rows to leave out. None keeps all.

    Returns:
        Scalar float32 from 0 to 1, NaN without rows.

    Raises:
        TypeError: logits are not floating point.
        ValueError: shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import metrics
        >>> metrics.agreement(jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 0.0]]))
        Array(0.5, dtype=float32)

    Reference:
        S. Stanton et al., "Does Knowledge Distillation Really Work?", NeurIPS 2021, section 3
        (top-1 agreement).
    """
    s = _checks.floating("student_logits", student_logits, min_ndim=1)
    t = _checks.floating("teacher_logits", teacher_logits, min_ndim=1)
    _checks.same_shape("student_logits", s, "teacher_logits", t)
    mask = _checks.mask("where", where, s.shape[:-1])
    counted = jnp.ones(s.shape[:-1], bool) if mask is None else mask
    same = jnp.argmax(s, axis=-1) == jnp.argmax(t, axis=-1)
    same &= ~jnp.any(jnp.isnan(s) | jnp.isnan(t), axis=-1)
    return _mean(same, counted)


def negative_log_likelihood(
    logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Mean negative log-probability of the labels, in nats.

        mean of -log softmax(z)_label

    Args:
        logits: [..., C] floating point; logits, not probabilities, so that it stays exact.
        labels: [...] integer class indices, -1 for rows to leave out.
        where: [...] bool, False for rows to leave out. None keeps all.

    Returns:
        Scalar in at least float32, NaN without rows.

    Raises:
        TypeError: ``logits`` are not floating point or ``labels`` not integers.
        ValueError: shapes do not fit, or a label outside -1 .. C-1.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import metrics
        >>> metrics.negative_log_likelihood(jnp.zeros((1, 4)), jnp.array([2])).round(4)  # log 4
        Array(1.3863, dtype=float32)

    Reference:
        none
    """
    z = _checks.floating("logits", logits, min_ndim=1)
    labels, counted = _counted(labels, z, where)
    log_probs = jax.nn.log_softmax(z)
    return _mean(-_at_label(log_probs, labels), counted, labels, z.shape[-1])


def brier_score(
    probs: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Mean squared distance of the probabilities from the one-hot labels, summed over classes.

        mean of sum_c (p_c - [c == label])^2

    The multi-class form, from 0 to 2; the two-class form elsewhere is half of it.

    Args:
        probs: [..., C] floating point, probabilities.
        labels: [...] integer class indices, -1 for rows to leave out.
        where: [...] bool, False for rows to leave out. None keeps all.

    Returns:
        Scalar in at least float32, NaN without rows.

    Raises:
        TypeError: ``probs`` are not floating point or ``labels`` not integers.
        ValueError: shapes do not fit, ``probs`` are outside [0, 1], or a label outside -1 .. C-1.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import metrics
        >>> metrics.brier_score(jnp.array([[0.5, 0.5]]), jnp.array([0]))
        Array(0.5, dtype=float32)

    Reference:
        G. W. Brier, "Verification of Forecasts Expressed in Terms of Probability", Monthly Weather
        Review 1950, equation 2.
    """
    p, labels, counted = _probabilities(probs, labels, where)
    hot = jax.lax.broadcasted_iota(labels.dtype, p.shape, p.ndim - 1) == labels[..., None]
    return _mean(jnp.sum((p - hot) ** 2, axis=-1), counted, labels, p.shape[-1])


def expected_calibration_error(
    probs: ArrayLike, labels: ArrayLike, *, bins: int = 15, where: ArrayLike | None = None
) -> jax.Array:
    """Average gap between confidence and accuracy over bins of equal width.

        sum_b n_b / n * |accuracy_b - confidence_b|,   bin b = (b / B, (b + 1) / B]

    The confidence of a row is its largest probability; empty bins count nothing.

    Args:
        probs: [..., C] floating point, probabilities (not logits).
        labels: [...] integer class indices, -1 for rows to leave out.
        bins: B, at least 1.
        where: [...] bool, False for rows to leave out. None keeps all.

    Returns:
        Scalar in at least float32 from 0 to 1, NaN without rows.

    Raises:
        TypeError: ``probs`` are not floating point or ``labels`` not integers.
        ValueError: shapes do not fit, ``probs`` are outside [0, 1], or a label outside -1 .. C-1.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import metrics
        >>> probs = jnp.array([[0.75, 0.25], [0.25, 0.75]])
        >>> metrics.expected_calibration_error(probs, jnp.array([0, 0]))  # 0.75 sure, 0.5 right
        Array(0.25, dtype=float32)

    Reference:
        C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern Neural Networks",
        ICML 2017, equation 3.
    """
    share, gap = _calibration(probs, labels, bins, where)
    return jnp.sum(share * gap)


def maximum_calibration_error(
    probs: ArrayLike, labels: ArrayLike, *, bins: int = 15, where: ArrayLike | None = None
) -> jax.Array:
    """Largest gap between confidence and accuracy over the bins that are not empty.

        max_b |accuracy_b - confidence_b|,   bins as in ``expected_calibration_error``

    Args:
        probs: [..., C] floating point, probabilities (not logits).
        labels: [...] integer class indices, -1 for rows to leave out.
        bins: B, at least 1.
        where: [...] bool, False for rows to leave out. None keeps all.

    Returns:
        Scalar in at least float32 from 0 to 1, NaN without rows.

    Raises:
        TypeError: ``probs`` are not floating point or ``labels`` not integers.
        ValueError: shapes do not fit, ``probs`` are outside [0, 1], or a label outside -1 .. C-1.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import metrics
        >>> probs = jnp.array([[0.5, 0.5], [0.25, 0.75]])
        >>> metrics.maximum_calibration_error(probs, jnp.array([0, 0]))  # 0.75 sure, wrong
        Array(0.75, dtype=float32)

    Reference:
        C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern Neural Networks",
        ICML 2017, equation 5.
    """
    _, gap = _calibration(probs, labels, bins, where)
    return jnp.max(gap)


def _calibration(
    probs: ArrayLike, labels: ArrayLike, bins: int, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    """Each bin's share of the rows and its |accuracy - confidence| (0 where empty), [bins] both."""
    bins = _checks.count("bins", bins)
    p, labels, counted = _probabilities(probs, labels, where)
    rows = counted.reshape(-1).astype(p.dtype)
    confidence = jnp.where(counted, jnp.max(p, axis=-1), 1).reshape(-1)
    hit = (jnp.argmax(p, axis=-1) == labels).reshape(-1)
    # Right-closed bins: comparing with the edges themselves, not confidence * bins, keeps a
    # confidence that equals an edge in the lower bin in every precision.
    edges = jnp.asarray(np.arange(1, bins) / bins, p.dtype)
    bin_of = jnp.searchsorted(edges, confidence, side="left")
    gap = jax.ops.segment_sum(rows * (hit - confidence), bin_of, num_segments=bins)
    size = jax.ops.segment_sum(rows, bin_of, num_segments=bins)
    invalid = jnp.any(_invalid(labels, p.shape[-1]) & counted)
    total = jnp.where(invalid, jnp.nan, jnp.sum(size))
    # 0 rows: 0 / 0 makes both results NaN, as an invalid label does.
    return size / total, jnp.abs(gap) / jnp.maximum(size, 1) + 0 * (total / total)


def _probabilities(
    probs: ArrayLike, labels: ArrayLike, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Probabilities (1 / C where not counted), labels, and which rows count."""
    p = _checks.floating("probs", probs, min_ndim=1)
    labels, counted = _counted(labels, p, where)
    p = jnp.where(counted[..., None], p, 1 / p.shape[-1])
    if not _checks.is_traced(p):
        known = np.asarray(p)
        # Half-precision softmaxes may exceed 1 by their rounding. NaN passes, into the result.
        if (wrong := known[(known < 0) | (known > 1.01)]).size:
            raise ValueError(
                f"probs must be probabilities from 0 to 1, got {wrong.flat[0]}; apply a softmax "
                "to logits first."
            )
    return p, labels, counted


def _counted(
    labels: ArrayLike, logits: jax.Array, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    """Checked labels, and which rows have one and are not masked out."""
    labels = _checks.integer("labels", labels)
    _checks.shape("labels", labels, logits.shape[:-1], "(one label per row)")
    mask = _checks.mask("where", where, labels.shape)
    num_classes = logits.shape[-1]
    if not (_checks.is_traced(labels) or _checks.is_traced(mask)):
        known = np.asarray(labels) if mask is None else np.asarray(labels)[np.asarray(mask)]
        wrong = known[(known < -1) | (known >= num_classes)]
        if wrong.size:
            raise ValueError(
                f"labels must be class indices from 0 to {num_classes - 1}, or -1 for unlabelled "
                f"rows, got {wrong.flat[0]}."
            )
    labels = labels.astype(jnp.int32)
    counted = labels != -1
    return labels, counted if mask is None else counted & mask


def _invalid(labels: jax.Array, num_classes: int) -> jax.Array:
    return (labels < -1) | (labels >= num_classes)


def _at_label(x: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, labels[..., None], axis=-1, mode="clip")[..., 0]


def _mean(
    values: jax.Array,
    counted: jax.Array,
    labels: jax.Array | None = None,
    num_classes: int = 0,
) -> jax.Array:
    """Mean of the counted values; NaN if there are none or a counted label is no class."""
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if labels is not None:
        values = jnp.where(_invalid(labels, num_classes), jnp.nan, values)
    return jnp.sum(jnp.where(counted, values, 0)) / jnp.sum(counted)
