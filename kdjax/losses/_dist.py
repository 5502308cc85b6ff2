"""DIST: match the correlations of the predictions, not the predictions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax.losses._inputs import hyperparameter, logits_pair

AxisName = str | tuple[str, ...]


def dist(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    beta: ArrayLike = 1.0,
    gamma: ArrayLike = 1.0,
    temperature: ArrayLike = 1.0,
    eps: ArrayLike = 1e-8,
    axis_name: AxisName | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """One minus the correlation of student and teacher, within rows and within columns, times T^2.

        T^2 * (beta * inter + gamma * intra),   p = softmax(t / T),   q = softmax(s / T)
        inter = mean over examples of 1 - r(q[i, :], p[i, :])
        intra = mean over classes of 1 - r(q[:, c], p[:, c])
        r(a, b) = sum a' b' / (|a'| |b'| + eps),   a' = a - mean(a)

    Batch-coupled: the value depends on which examples share the batch, so it is a scalar and can't
    be accumulated over microbatches. eps sits on the product of the norms, as in the authors' code;
    torchdistill clamps each norm instead (equal to about 1e-6 in value). The authors' segmentation
    code has no temperature (T = 1).

    Args:
        student_logits: [..., C] floating point, C at least 2. All leading dimensions (batch, or
            batch and pixels) are one list of examples.
        teacher_logits: [..., C] floating point; no gradient flows to it.
        beta: weight of the relation between classes (rows), a finite scalar.
        gamma: weight of the relation between examples (columns), a finite scalar.
        temperature: softens both sides; a finite scalar above 0. 1 leaves the logits as they are.
        eps: keeps constant rows and columns finite; they count as uncorrelated. A finite scalar
            above 0.
        axis_name: the named axis (or axes) of shard_map or pmap over which the batch is split;
            the loss is then that of the whole batch, the same on every device. None: one batch.
        where: [...] bool, False for examples to leave out, as if they were deleted. None keeps
            all. With no example left the loss is 0.

    Returns:
        Scalar in at least float32, between 0 and 2 T^2 (beta + gamma).

    Raises:
        TypeError: logits are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, fewer than 2 classes, or a temperature or eps not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> logits = jnp.array([[3.0, 0.0, 1.0], [0.0, 2.0, 1.0]])
        >>> bool(abs(losses.dist(logits, logits)) < 1e-6)
        True
        >>> losses.dist(jnp.zeros((2, 3)), logits).round(4)  # a constant student: no correlation
        Array(2., dtype=float32)

    Reference:
        T. Huang, S. You, F. Wang, C. Qian, C. Xu, "Knowledge Distillation from A Stronger Teacher",
        NeurIPS 2022, section 3.
    """
    student, teacher, mask = logits_pair(student_logits, teacher_logits, where, min_classes=2)
    dtype, num_classes = student.dtype, student.shape[-1]
    beta = hyperparameter("beta", beta, dtype)
    gamma = hyperparameter("gamma", gamma, dtype)
    temperature = hyperparameter("temperature", temperature, dtype, above=0)
    eps = hyperparameter("eps", eps, dtype, above=0)

    def total(x: jax.Array) -> jax.Array:
        x = jnp.sum(x, axis=0, keepdims=True)
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    q = jax.nn.softmax(student / temperature).reshape(-1, num_classes)
    p = jax.nn.softmax(teacher / temperature).reshape(-1, num_classes)
    keep = jnp.ones_like(q[:, :1]) if mask is None else mask.reshape(-1, 1).astype(dtype)
    seen = total(keep)
    count = jnp.maximum(seen, 1)

    # Every row of probabilities has the mean 1 / C.
    q_row, p_row = q - 1 / num_classes, p - 1 / num_classes
    row_correlation = _correlation(
        jnp.sum(q_row * p_row, axis=-1, keepdims=True),
        jnp.sum(q_row**2, axis=-1, keepdims=True),
        jnp.sum(p_row**2, axis=-1, keepdims=True),
        eps,
    )
    inter = total(keep * (1 - row_correlation)) / count

    q_column = keep * (q - total(keep * q) / count)
    p_column = keep * (p - total(keep * p) / count)
    column_correlation = _correlation(
        total(q_column * p_column), total(q_column**2), total(p_column**2), eps
    )
    intra = jnp.mean(1 - column_correlation)
    loss = temperature**2 * (beta * inter + gamma * intra)
    return jnp.where(seen > 0, loss, 0).reshape(())


def _correlation(
    product: jax.Array, left_squares: jax.Array, right_squares: jax.Array, eps: jax.Array
) -> jax.Array:
    return product / (_root(left_squares) * _root(right_squares) + eps)


def _root(squares: jax.Array) -> jax.Array:
    """The square root, with gradient 0 at 0."""
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
