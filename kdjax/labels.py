"""Label makers: what a student is given to match, as pure functions of a teacher's outputs.

Everything here is on the teacher's side: no gradient flows through any result. Probabilities go to
``losses.hard_label_cross_entropy`` in place of labels; dense log-probabilities serve as teacher
logits, because a softmax doesn't see a shift of its logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import _checks

__all__ = ["TopK", "from_top_k", "mix", "rectify", "smooth", "soften", "top_k"]


class TopK(NamedTuple):
    """The largest probabilities of each row and the mass of all others.

    Attributes:
        values: [..., k] log-probabilities, largest first.
        indices: [..., k] int32, their classes.
        rest: [...] log of the probability of all other classes together; -inf if there are none.
    """

    values: jax.Array
    indices: jax.Array
    rest: jax.Array


def soften(logits: ArrayLike, *, temperature: ArrayLike = 1.0) -> jax.Array:
    """Probabilities at a temperature.

        softmax(z / T)

    Args:
        logits: [..., C] floating point. A class at -inf gets probability 0.
        temperature: a finite scalar above 0; 1 leaves the logits as they are, more flattens.

    Returns:
        [..., C] in at least float32, rows that sum to 1.

    Raises:
        TypeError: ``logits`` are not floating point.
        ValueError: ``logits`` have no class dimension, or the temperature is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import labels
        >>> labels.soften(jnp.log(jnp.array([1.0, 9.0])), temperature=2.0).round(4)
        Array([0.25, 0.75], dtype=float32)

    Reference:
        G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", NIPS Deep
        Learning Workshop 2014 (arXiv 1503.02531), equation 1.
    """
    z = _checks.floating("logits", logits, min_ndim=1)
    return jax.lax.stop_gradient(
        jax.nn.softmax(z / _scalar("temperature", temperature, z, above=0))
    )


def smooth(labels: ArrayLike, num_classes: int, *, smoothing: ArrayLike) -> jax.Array:
    """Smoothed one-hot labels.

        (1 - smoothing) * onehot(label) + smoothing / C

    Args:
        labels: [...] integer class indices; -1 (unlabelled) gives a row of zeros, whose
            cross-entropy is 0.
        num_classes: C, at least 1.
        smoothing: the share spread evenly over all C classes, a scalar from 0 to 1.

    Returns:
        [..., C] float32 (float64 under x64 with a float64 ``smoothing`` array).

    Raises:
        TypeError: ``labels`` are not integers.
        ValueError: a label outside -1 .. C-1 (inside jit, where labels have no values yet, such a
            row is NaN), or ``smoothing`` outside [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import labels
        >>> labels.smooth(jnp.array([1]), 4, smoothing=0.5)
        Array([[0.125, 0.625, 0.125, 0.125]], dtype=float32)

    Reference:
        C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016,
        section 7.
    """
    labels = _checks.integer("labels", labels)
    num_classes = _checks.count("num_classes", num_classes)
    if not _checks.is_traced(labels):
        known = np.asarray(labels)
        wrong = known[(known < -1) | (known >= num_classes)]
        if wrong.size:
            raise ValueError(
                f"labels must be class indices from 0 to {num_classes - 1}, or -1 for unlabelled "
                f"rows, got {wrong.flat[0]}."
            )
    dtype = jnp.promote_types(getattr(smoothing, "dtype", jnp.float32), jnp.float32)
    share = jnp.asarray(_checks.number("smoothing", smoothing, low=0, high=1), dtype)
    labels = labels.astype(jnp.int32)
    rows = (1 - share) * jax.nn.one_hot(labels, num_classes, dtype=dtype) + share / num_classes
    labels = labels[..., None]
    rows = jnp.where((labels < -1) | (labels >= num_classes), jnp.nan, rows)
    return jax.lax.stop_gradient(jnp.where(labels == -1, 0, rows))


def mix(probs_a: ArrayLike, probs_b: ArrayLike, *, weight: ArrayLike) -> jax.Array:
    """A convex combination of two sets of probabilities.

        weight * a + (1 - weight) * b

    For example the ground truth and the teacher's labels, or the two partners of mixup.

    Args:
        probs_a: [..., C] floating point.
        probs_b: [..., C] floating point.
        weight: the share of ``probs_a``, from 0 to 1: a scalar, or [...] for one per example.

    Returns:
        [..., C] in at least float32.

    Raises:
        TypeError: probabilities are not floating point.
        ValueError: shapes do not fit, or ``weight`` is outside [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import labels
        >>> labels.mix(jnp.array([1.0, 0.0]), jnp.array([0.5, 0.5]), weight=0.5)
        Array([0.75, 0.25], dtype=float32)

    Reference:
        H. Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, section 2.
    """
    a = _checks.floating("probs_a", probs_a, min_ndim=1)
    b = _checks.floating("probs_b", probs_b, min_ndim=1)
    _checks.same_shape("probs_b", b, "probs_a", a)
    dtype = jnp.promote_types(a.dtype, b.dtype)
    share = jnp.asarray(_checks.number("weight", weight, low=0, high=1, scalar=False), dtype)
    if share.ndim:
        _checks.shape("weight", share, a.shape[:-1], "(one per example) or be a scalar")
        share = share[..., None]
    return jax.lax.stop_gradient(share * a + (1 - share) * b)


def rectify(
    teacher_logits: ArrayLike, labels: ArrayLike, *, temperature: ArrayLike, mix: ArrayLike
) -> jax.Array:
    """ADR's rectified labels: the teacher's, mixed in as far as they leave the given label on top.

        p = softmax(z / temperature),   d = max_k p_k - p_y
        r = lam * p + (1 - lam) * onehot(y),   lam = clip(mix - d, 0, 1)

    The given label always keeps the largest probability: a teacher that prefers another class is
    trusted less by as much, and from d = mix on not at all. A wrong label is so not repaired.

    Args:
        teacher_logits: [B, C] floating point.
        labels: [B] integer class indices; -1 (unlabelled) gives a row of zeros, whose
            cross-entropy is 0. Probabilities (of mixup) are refused: rectifying them is undefined.
        temperature: a finite scalar above 0; annealed downwards over training.
        mix: the most that the teacher may count (the paper's lambda), a scalar from 0 to 1;
            annealed upwards. 0 gives one-hot labels, bit for bit.

    Returns:
        [B, C] in at least float32, rows that sum to 1.

    Raises:
        TypeError: ``teacher_logits`` are not floating point or ``labels`` not integers.
        ValueError: shapes do not fit, a number out of its range, or a label outside -1 .. C-1
            (inside jit, where labels and ``mix`` have no values yet, such rows are NaN).

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import labels
        >>> z = jnp.log(jnp.array([[0.75, 0.25], [0.25, 0.75]]))
        >>> labels.rectify(z, jnp.array([0, 0]), temperature=1.0, mix=0.75).round(4)
        Array([[0.8125, 0.1875],
               [0.8125, 0.1875]], dtype=float32)

    Reference:
        Y.-Y. Wu, H.-J. Wang, S.-T. Chen, "Annealing Self-Distillation Rectification Improves
        Adversarial Training", ICLR 2024 (equations 3 to 5 by its published code).
    """
    z = _checks.floating("teacher_logits", teacher_logits, ndim=2)
    if jnp.issubdtype(getattr(labels, "dtype", jnp.int32), jnp.floating):
        raise TypeError(
            f"labels must be integer class indices, got {_checks.describe(labels)}: mixed labels "
            "(mixup, CutMix) can't be rectified."
        )
    labels = _checks.integer("labels", labels)
    _checks.shape("labels", labels, z.shape[:-1], "(one per row of teacher_logits)")
    scale = _scalar("temperature", temperature, z, above=0)
    scale = jnp.maximum(scale, jnp.finfo(z.dtype).tiny)  # which less is flushed to 0
    most = jnp.asarray(_checks.number("mix", mix, low=0, high=1), z.dtype)
    hot = smooth(labels, z.shape[-1], smoothing=jnp.zeros((), z.dtype))
    top = jax.lax.stop_gradient(z.max(axis=-1, keepdims=True))
    p = jax.nn.softmax((z - top) / scale)  # shifted first: a low temperature would overflow
    # The probability of the label by a gather: no argmax, so that ties need no care.
    at_label = jnp.take_along_axis(p, labels.astype(jnp.int32)[:, None], axis=-1, mode="clip")
    most = jnp.where((most >= 0) & (most <= 1), most, jnp.nan)  # of a schedule, inside jit
    share = jnp.clip(most - (jnp.max(p, axis=-1, keepdims=True) - at_label), 0, 1)
    rows = jnp.where(labels[:, None] == -1, 0, share * p + (1 - share) * hot)
    return jax.lax.stop_gradient(rows)


def top_k(logits: ArrayLike, k: int, *, temperature: ArrayLike = 1.0) -> TopK:
    """The k most probable classes, and the mass of the others: what a large teacher need store.

    ``values`` and ``indices`` are those of log softmax(z / T); ``rest`` is the log-sum-exp of the
    others, summed and not subtracted from 1, so that it is exact however small.

    The rest is exact only at the temperature it was stored with: how its mass is spread over the
    other classes is lost, so it can't be re-tempered. Store at the temperature of training. The
    values alone can: they are logits up to a constant.

    Args:
        logits: [..., C] floating point.
        k: how many classes to keep, from 1 to C.
        temperature: a finite scalar above 0.

    Returns:
        ``TopK(values [..., k], indices [..., k] int32, rest [...])``, at least float32.

    Raises:
        TypeError: ``logits`` are not floating point, or ``k`` is not an integer.
        ValueError: ``k`` is not from 1 to C, or the temperature is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import labels
        >>> kept = labels.top_k(jnp.log(jnp.array([0.125, 0.5, 0.375])), 1)
        >>> kept.indices, jnp.exp(kept.values).round(4), jnp.exp(kept.rest).round(4)
        (Array([1], dtype=int32), Array([0.5], dtype=float32), Array(0.5, dtype=float32))

    Reference:
        none
    """
    z = _checks.floating("logits", logits, min_ndim=1)
    k = _checks.count("k", k, high=z.shape[-1])
    scale = _scalar("temperature", temperature, z, above=0)
    log_probs = jax.lax.stop_gradient(jax.nn.log_softmax(z / scale))
    values, indices = jax.lax.top_k(log_probs, k)
    others = jnp.put_along_axis(log_probs, indices, -jnp.inf, axis=-1, inplace=False)
    return TopK(values, indices.astype(jnp.int32), jax.nn.logsumexp(others, axis=-1))


def from_top_k(
    values: ArrayLike, indices: ArrayLike, rest: ArrayLike, *, num_classes: int
) -> jax.Array:
    """Dense log-probabilities from ``top_k``, the rest spread evenly over the other classes.

        log p_c = the stored value, or rest - log(C - k) where c was not kept

    The storing temperature T is already in them: T times them are the teacher's logits, up to a
    shift, for a loss at that temperature. As a teacher for ``soft_labels(temperature=T)``:

        def logits(batch):
            kept = batch["teacher_values"], batch["teacher_indices"], batch["teacher_rest"]
            return T * kd.labels.from_top_k(*kept, num_classes=C)

        teacher = kd.from_batch(logits=logits)

    With k = C they are all of the teacher. Values rounded to float16 need no
    renormalising: the loss's softmax does it.

    Args:
        values: [..., k] floating point, log-probabilities.
        indices: [..., k] integer, the classes they belong to, distinct within a row.
        rest: [...] floating point, log of the remaining mass, -inf for none.
        num_classes: C, at least k.

    Returns:
        [..., C] in at least float32.

    Raises:
        TypeError: ``values`` or ``rest`` are not floating point, or ``indices`` not integers.
        ValueError: shapes do not fit, ``num_classes`` is below k, or an index is outside 0 .. C-1
            (inside jit, where indices have no values yet, it is dropped).

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import labels
        >>> kept = labels.top_k(jnp.log(jnp.array([0.125, 0.5, 0.375])), 1)
        >>> jnp.exp(labels.from_top_k(*kept, num_classes=3)).round(4)
        Array([0.25, 0.5 , 0.25], dtype=float32)

    Reference:
        none
    """
    values = _checks.floating("values", values, min_ndim=1)
    indices = _checks.integer("indices", indices)
    rest = _checks.floating("rest", rest)
    _checks.same_shape("indices", indices, "values", values)
    _checks.shape("rest", rest, values.shape[:-1], "(one per row of values)")
    kept = values.shape[-1]
    num_classes = _checks.count("num_classes", num_classes, low=max(kept, 1))
    if not _checks.is_traced(indices):
        known = np.asarray(indices)
        wrong = known[(known < 0) | (known >= num_classes)]
        if wrong.size:
            raise ValueError(
                f"indices must be class indices from 0 to {num_classes - 1}, got {wrong.flat[0]}."
            )
    dtype = jnp.promote_types(values.dtype, rest.dtype)
    each = rest.astype(dtype) - np.log(max(num_classes - kept, 1)).astype(dtype)
    dense = jnp.broadcast_to(each[..., None], (*each.shape, num_classes))
    if indices.dtype != jnp.int64:  # narrower ones can't be compared with the number of classes
        indices = indices.astype(jnp.int32)
    dense = jnp.put_along_axis(dense, indices, values.astype(dtype), axis=-1, inplace=False)
    return jax.lax.stop_gradient(dense)


def _scalar(name: str, value: Any, like: jax.Array, *, above: float) -> jax.Array:
    return jnp.asarray(_checks.number(name, value, above=above), like.dtype)
