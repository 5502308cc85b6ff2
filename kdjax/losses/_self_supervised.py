"""Losses of self-supervised pre-training: two embeddings of the same images, from two views.

Neither side is a teacher: gradients flow through both.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.losses._features import AxisName, l2_normalize, standardize
from kdjax.losses._inputs import blank, hyperparameter, select

# Half-precision passes, some accelerators' default, are no float32.
_PRECISION = jax.lax.Precision.HIGHEST


def barlow_twins(
    z1: ArrayLike,
    z2: ArrayLike,
    *,
    off_diagonal: ArrayLike = 0.0051,
    eps: ArrayLike = 1e-5,
    axis_name: AxisName | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Barlow Twins: the channels' cross-correlation between two views should be the identity.

        c = z1'^T z2' / N,   z' = (z - mean) / sqrt(var + eps) over the N examples (biased var)
        loss = sum_i (c_ii - 1)^2 + off_diagonal * sum_{i != j} c_ij^2

    A channel that is constant over the batch has ``c_ii = 0`` and adds 1. Batch-coupled.

    Args:
        z1: [B, D] floating point, embeddings of the first view.
        z2: [B, D] floating point, of the second view of the same examples.
        off_diagonal: weight of the off-diagonal entries, a finite scalar at least 0. The default is
            the paper's for D = 8192.
        eps: added to the variance, a finite scalar at least 0; that of torch's batch norm.
        axis_name: the named axis (or axes) of shard_map or pmap over which the batch is split; the
            statistics and the D x D matrix are then those of the whole batch.
        where: [B] bool, False for rows to leave out; 0 is returned if none is left.

    Returns:
        Scalar in at least float32, not negative. Gradients flow to both views.

    Raises:
        TypeError: embeddings are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ or are not [B, D], the whole batch has fewer than 2 rows (which
            have no variance), or an option is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> z = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> print(f"{losses.barlow_twins(z, z):.3f} {losses.barlow_twins(z, -z):.3f}")
        0.000 8.000

    Reference:
        J. Zbontar, L. Jing, I. Misra, Y. LeCun, S. Deny, "Barlow Twins: Self-Supervised Learning
        via Redundancy Reduction", ICML 2021, equations 1 and 2, and its published code.
    """
    on, off = diagonals(z1, z2, eps=eps, axis_name=axis_name, where=where)
    return on + hyperparameter("off_diagonal", off_diagonal, on.dtype, low=0) * off


def nt_xent(
    z1: ArrayLike,
    z2: ArrayLike,
    *,
    temperature: ArrayLike = 0.5,
    axis_name: AxisName | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """SimCLR's contrastive loss: find the other view among all views of the batch.

        l(i, j) = -log( exp(s_ij / T) / sum over k != i of exp(s_ik / T) ),   s the cosine

    where k runs over the 2 N embeddings and j is the other view of i's image. The value of an
    example is the mean of its two directions. Every row depends on the others of the batch.

    Args:
        z1: [B, D] floating point, embeddings of the first view; they are normalised here.
        z2: [B, D] floating point, of the second view of the same examples.
        temperature: T, a finite scalar above 0: 0.5 for CIFAR-10, 0.1 for ImageNet.
        axis_name: the named axis (or axes) of shard_map or pmap over which the batch is split; the
            other views are then those of the whole batch.
        where: [B] bool, False for rows to leave out, also as negatives; they count 0.

    Returns:
        [B] in at least float32, not negative. Gradients flow to both views. A zero embedding has
        the cosine 0 with all others.

    Raises:
        TypeError: embeddings are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ or are not [B, D], the whole batch has fewer than 2 rows (no
            negatives), or the temperature is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> z = jnp.eye(3)  # log(1 + 4 exp(-2)): four negatives at a right angle
        >>> [f"{value:.4f}" for value in losses.nt_xent(z, z)]
        ['0.4327', '0.4327', '0.4327']

    Reference:
        T. Chen, S. Kornblith, M. Norouzi, G. Hinton, "A Simple Framework for Contrastive Learning
        of Visual Representations", ICML 2020, equation 1 and algorithm 1.
    """
    first, second, mask = _pair(z1, z2, axis_name, where)
    temperature = hyperparameter("temperature", temperature, first.dtype, above=0)
    # Rows left out are zeros here, so that their values are finite until they are dropped.
    views = [l2_normalize(blank(z, mask)) for z in (first, second)]
    kept = jnp.ones(first.shape[0], bool) if mask is None else mask
    place = jnp.arange(first.shape[0])
    everything, every_kept = views, kept
    if axis_name is not None:
        *everything, every_kept = (
            jax.lax.all_gather(x, axis_name, tiled=True) for x in (*views, kept)
        )
        place = place + first.shape[0] * jax.lax.axis_index(axis_name)
    similarity = jnp.matmul(
        jnp.concatenate(views), jnp.concatenate(everything).T, precision=_PRECISION
    )
    similarity = similarity / temperature  # [2 B, 2 N]

    total = every_kept.shape[0]
    column = jnp.arange(2 * total)[None, :]
    itself = column == jnp.concatenate([place, place + total])[:, None]
    partner = column == jnp.concatenate([place + total, place])[:, None]
    # A row left out keeps its partner: a logarithm of nothing would have no gradient.
    seen = (jnp.tile(every_kept, 2)[None, :] | partner) & ~itself
    others = jax.nn.logsumexp(jnp.where(seen, similarity, -jnp.inf), axis=1)
    values = others - jnp.sum(jnp.where(partner, similarity, 0), axis=1)
    return select(values.reshape(2, -1).mean(axis=0), mask)


def diagonals(
    z1: ArrayLike,
    z2: ArrayLike,
    *,
    eps: ArrayLike = 1e-5,
    axis_name: AxisName | None = None,
    where: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``sum_i (c_ii - 1)^2`` and ``sum_{i != j} c_ij^2`` of `barlow_twins`."""
    first, second, mask = _pair(z1, z2, axis_name, where)
    first, second = (
        standardize(z, eps=eps, axis_name=axis_name, where=mask) for z in (first, second)
    )
    count = jnp.asarray(first.shape[0] if mask is None else jnp.sum(mask), first.dtype)
    # The diagonal comes from the rows, so that the D x D matrix has one use and needs one buffer.
    diagonal = jnp.sum(first * second, axis=0)
    product = jnp.matmul(first.T, second, precision=_PRECISION)
    if axis_name is not None:
        diagonal, product, count = jax.lax.psum((diagonal, product, count), axis_name)
    on = jnp.sum((diagonal / jnp.maximum(count, 1) - 1) ** 2)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, product.shape, i) for i in (0, 1))
    off = jnp.sum(jnp.where(row == column, 0, product / jnp.maximum(count, 1)) ** 2)
    return jnp.where(count > 0, on, 0), off


def _pair(
    z1: ArrayLike, z2: ArrayLike, axis_name: AxisName | None, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Both views in one dtype, and the mask."""
    first, second = _checks.floating("z1", z1, ndim=2), _checks.floating("z2", z2, ndim=2)
    _checks.same_shape("z1", first, "z2", second)
    shards = 1 if axis_name is None else jax.lax.psum(1, axis_name)
    if first.shape[0] * shards < 2 or first.shape[1] == 0:
        raise ValueError(
            "z1 must have at least 2 rows in the whole batch, to be compared with each other, and "
            f"at least 1 channel, got {_checks.describe(first)}."
        )
    mask = _checks.mask("where", where, first.shape[:1])
    dtype = jnp.promote_types(first.dtype, second.dtype)
    return first.astype(dtype), second.astype(dtype), mask
