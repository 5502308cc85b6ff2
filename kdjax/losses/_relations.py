"""Relations between the examples of a batch: similarities, distances, angles, kernels.

Every row is compared with all rows of the batch, those of other devices too: a device holds its own
rows of each matrix and never the others'. Features may be of any shape [B, ...] and are flattened;
the student's and the teacher's may differ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.losses._features import AxisName
from kdjax.losses._inputs import blank, hyperparameter, select

# Half-precision passes, some accelerators' default, are no float32.
_PRECISION = jax.lax.Precision.HIGHEST


class Together(NamedTuple):
    """Both sides' rows: this device's [b, D], and those of the whole batch [n, D].

    Rows that are left out are zeros. ``kept`` [b] and ``all_kept`` [n] say which aren't, ``mask``
    is the former or None, ``place`` [b] tells where the own rows stand among all, and ``rows`` is
    the number of rows kept, at least 1.
    """

    student: jax.Array
    teacher: jax.Array
    all_student: jax.Array
    all_teacher: jax.Array
    kept: jax.Array
    all_kept: jax.Array
    place: jax.Array
    rows: jax.Array
    mask: jax.Array | None
    axis_name: AxisName | None

    def total(self, x: jax.Array) -> jax.Array:
        """The sum over all devices."""
        return x if self.axis_name is None else jax.lax.psum(x, self.axis_name)

    def finish(self, values: jax.Array) -> jax.Array:
        """[b], 0 in the rows that are left out."""
        return select(values, self.mask)


def similarity_preserving(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    axis_name: AxisName | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Similarity-preserving loss: which examples excite the network alike.

        G = F F^T over the flattened features,   each row divided by its length
        l_i = (1/n) sum_j (Gt_ij - Gs_ij)^2

    The mean over the rows is the published ``|Gt - Gs|_F^2 / n^2``. Rows are divided by their L2
    norm, as in the paper and in RepDistiller; torchdistill divides by the L1 norm. Every row
    depends on the others of the batch.

    Args:
        student: [B, ...] floating point, flattened to rows.
        teacher: [B, ...] floating point, of any width; no gradient flows to it.
        axis_name: the named axis (or axes) of shard_map or pmap over which the batch is split; each
            row is then compared with all rows of the whole batch.
        where: [B] bool, False for rows to leave out, as if they were deleted; they count 0.

    Returns:
        [B] in at least float32, from 0 to 4 / n. A row of zeros has the similarity 0 with all.

    Raises:
        TypeError: features are not floating point, or ``where`` is not boolean.
        ValueError: the sides have other numbers of rows, or the whole batch fewer than 2.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> x = jnp.eye(2)
        >>> losses.similarity_preserving(x, 3 * x[:, ::-1]).tolist()  # rotated and scaled: alike
        [0.0, 0.0]

    Reference:
        F. Tung, G. Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, section 3.
    """
    both = together(student, teacher, axis_name, where)
    s = unit(_dot(both.student, both.all_student.T))
    t = unit(_dot(both.teacher, both.all_teacher.T))
    return both.finish(jnp.sum((s - t) ** 2, axis=1) / both.rows)


def rkd_distance(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    squared: bool = False,
    eps: ArrayLike = 1e-12,
    axis_name: AxisName | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Relational distillation by distances between examples.

        d_ij = |x_i - x_j| / (mean of |x_i - x_j| over all pairs of different rows)
        l_i = (1/n) sum_j h(ds_ij - dt_ij),   h(e) = e^2 / 2 below |e| = 1, else |e| - 1/2

    The mean over the rows is the published mean over all n^2 pairs, the n zeros of the diagonal
    included. Every row depends on the others of the batch.

    Args:
        student: [B, ...] floating point, flattened to rows.
        teacher: [B, ...] floating point, of any width; no gradient flows to it.
        squared: whether to compare squared distances.
        eps: smallest squared distance, a finite scalar above 0. Pairs below it, such as duplicates,
            get it without a gradient. So do, in effect, pairs below the rounding of ``|x|^2``.
        axis_name: the named axis (or axes) of shard_map or pmap over which the batch is split; each
            row is then compared with all rows of the whole batch.
        where: [B] bool, False for rows to leave out, as if they were deleted; they count 0.

    Returns:
        [B] in at least float32, not negative.

    Raises:
        TypeError: features are not floating point, or ``where`` is not boolean.
        ValueError: the sides have other numbers of rows, the whole batch fewer than 2, or ``eps``
            is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> x = jnp.array([[0.0], [1.0], [3.0]])
        >>> print(f"{losses.rkd_distance(x, 5 * x + 1).max():.3f}")  # moved and scaled: alike
        0.000

    Reference:
        W. Park, D. Kim, Y. Lu, M. Cho, "Relational Knowledge Distillation", CVPR 2019, section
        3.2.1.
    """
    both = together(student, teacher, axis_name, where)
    eps = hyperparameter("eps", eps, both.student.dtype, above=0)
    itself = both.place[:, None] == jnp.arange(both.all_kept.shape[0])[None]
    pairs = both.kept[:, None] & both.all_kept[None] & ~itself
    number = jnp.maximum(both.total(jnp.sum(pairs)), 1)

    def relative(own: jax.Array, every: jax.Array) -> jax.Array:
        # Distances don't change with the origin; near it fewer digits are lost.
        middle = jax.lax.stop_gradient(jnp.sum(every, axis=0, keepdims=True) / both.rows)
        own, every = own - middle, every - middle
        sizes = jnp.sum(own**2, axis=1)[:, None] + jnp.sum(every**2, axis=1)[None]
        squares = sizes - 2 * _dot(own, every.T)
        rounding = 16 * jnp.finfo(squares.dtype).eps * sizes
        # NaN is passed on.
        apart = pairs & ~(squares <= jnp.maximum(eps, jax.lax.stop_gradient(rounding)))
        squares = jnp.where(apart, squares, eps)
        distances = jnp.where(pairs, squares if squared else jnp.sqrt(squares), 0)
        mean = both.total(jnp.sum(distances)) / number
        return distances / jnp.where(mean > 0, mean, 1)

    s = relative(both.student, both.all_student)
    t = relative(both.teacher, both.all_teacher)
    return both.finish(jnp.sum(_huber(s - t), axis=1) / both.rows)


def rkd_angle(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    chunk: int | None = None,
    axis_name: AxisName | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Relational distillation by the angles of triplets of examples.

        c_ijk = cosine of the angle at x_i between x_j and x_k
        l_i = (1/n^2) sum_jk h(cs_ijk - ct_ijk),   h(e) = e^2 / 2 below |e| = 1, else |e| - 1/2

    The mean over the rows is the published mean over all n^3 triplets. A row is the vertex of its
    angles, so that a device holds [b, n, n + D] numbers and not [n, n, n]: 2 MB a side in float32
    for 64 examples of width 64, 130 MB for 128 own rows among 512. ``chunk`` bounds that.

    Where two rows are equal their direction is 0, without a gradient. The reference divides by
    1e-12 there, which gives the same value and gradients of 1e9 and more.

    Args:
        student: [B, ...] floating point, flattened to rows.
        teacher: [B, ...] floating point, of any width; no gradient flows to it.
        chunk: how many vertices are computed at once, in a loop whose backward pass computes them
            again: [chunk, n, n + D] numbers. None: all at once.
        axis_name: the named axis (or axes) of shard_map or pmap over which the batch is split; each
            row then sees all pairs of the whole batch.
        where: [B] bool, False for rows to leave out, as if they were deleted; they count 0.

    Returns:
        [B] in at least float32, from 0 to 1.5.

    Raises:
        TypeError: features are not floating point, or ``where`` is not boolean.
        ValueError: the sides have other numbers of rows, the whole batch fewer than 2, or ``chunk``
            is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> x = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> turned = jnp.array([[1.0, 1.0], [1.0, 4.0], [-5.0, 1.0]])
        >>> print(f"{losses.rkd_angle(x, turned).max():.3f}")
        0.000

    Reference:
        W. Park, D. Kim, Y. Lu, M. Cho, "Relational Knowledge Distillation", CVPR 2019, section
        3.2.2.
    """
    both = together(student, teacher, axis_name, where)

    def cosines(vertex: jax.Array, every: jax.Array) -> jax.Array:
        directions = blank(unit(every - vertex[None]), both.all_kept)
        return _dot(directions, directions.T)

    def at_vertex(vertices: tuple[jax.Array, jax.Array]) -> jax.Array:
        s = cosines(vertices[0], both.all_student)
        t = cosines(vertices[1], both.all_teacher)
        return jnp.sum(_huber(s - t)) / both.rows**2

    if chunk is None:
        values = jax.vmap(at_vertex)((both.student, both.teacher))
    else:
        size = min(_checks.count("chunk", chunk), both.student.shape[0])
        values = jax.lax.map(
            jax.checkpoint(at_vertex), (both.student, both.teacher), batch_size=size
        )
    return both.finish(values)


def pkt(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    eps: ArrayLike = 1e-7,
    axis_name: AxisName | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Probabilistic knowledge transfer: the divergence of how likely examples are neighbours.

        K_ij = (cos(x_i, x_j) + 1) / 2,   P_ij = K_ij / sum_j K_ij
        l_i = (1/n) sum_j Pt_ij log((Pt_ij + eps) / (Ps_ij + eps))

    The mean over the rows is the mean over all n^2 entries of the authors' code, whose published
    weight of 30000 belongs to it: the divergence is divided by n twice. Every row depends on the
    others of the batch.

    Args:
        student: [B, ...] floating point, flattened to rows.
        teacher: [B, ...] floating point, of any width; no gradient flows to it.
        eps: added to lengths and probabilities, a finite scalar above 0.
        axis_name: the named axis (or axes) of shard_map or pmap over which the batch is split; each
            row is then compared with all rows of the whole batch.
        where: [B] bool, False for rows to leave out, as if they were deleted; they count 0.

    Returns:
        [B] in at least float32. A row of zeros has the cosine 0 with all, without a gradient (the
        reference's gradient isn't finite there).

    Raises:
        TypeError: features are not floating point, or ``where`` is not boolean.
        ValueError: the sides have other numbers of rows, the whole batch fewer than 2, or ``eps``
            is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
        >>> print(f"{losses.pkt(x, 2 * x).max():.3f} {losses.pkt(x, jnp.eye(3)).max():.3f}")
        0.000 0.012

    Reference:
        N. Passalis, A. Tefas, "Learning Deep Representations with Probabilistic Knowledge
        Transfer", ECCV 2018, section 3, and its published code.
    """
    both = together(student, teacher, axis_name, where)
    eps = hyperparameter("eps", eps, both.student.dtype, above=0)

    def probabilities(own: jax.Array, every: jax.Array) -> jax.Array:
        kernel = (_dot(unit(own, add=eps), unit(every, add=eps).T) + 1) / 2
        kernel = jnp.where(both.all_kept[None], kernel, 0)
        total = jnp.sum(kernel, axis=1, keepdims=True)
        return kernel / jnp.where(total > 0, total, 1)

    s = probabilities(both.student, both.all_student)
    t = probabilities(both.teacher, both.all_teacher)
    ratio = jnp.log(t + eps) - jnp.log(s + eps)
    return both.finish(jnp.sum(t * ratio, axis=1) / both.rows)


def cka(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    debiased: bool = False,
    axis_name: AxisName | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """One minus the linear centred kernel alignment of student and teacher.

        1 - |Xc' Yc|_F^2 / (|Xc' Xc|_F |Yc' Yc|_F),   columns centred over the rows

    0 for features that are a rotation and a scaling of each other, whatever their widths. With few
    rows for many channels the alignment is near 1 for any features, and the loss says little: take
    the debiased form then. Batch-coupled; it is computed of the two Gram matrices [b, n].

    Args:
        student: [B, ...] floating point, flattened to rows.
        teacher: [B, ...] floating point, of any width; no gradient flows to it.
        debiased: whether each of the three products is replaced by its unbiased estimate; the loss
            may then be slightly above 1.
        axis_name: the named axis (or axes) of shard_map or pmap over which the batch is split; the
            loss is then that of the whole batch.
        where: [B] bool, False for rows to leave out, as if they were deleted; 0 is returned if none
            is left.

    Returns:
        Scalar in at least float32, from 0 to 1 unless debiased; 1, without a gradient, where a side
        is constant (or the estimate of its norm isn't positive, or fewer than 4 rows are left for
        it).

    Raises:
        TypeError: features are not floating point, or ``where`` is not boolean.
        ValueError: the sides have other numbers of rows, or the whole batch fewer than 2 (4 with
            ``debiased``).

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> x = jnp.array([[1.0, 0.0], [2.0, 1.0], [0.0, 5.0]])
        >>> print(f"{losses.cka(x, 3 * x[:, ::-1] + 1):.3f}")
        0.000

    Reference:
        S. Kornblith, M. Norouzi, H. Lee, G. Hinton, "Similarity of Neural Network Representations
        Revisited", ICML 2019, section 3; as a loss, our reading. The unbiased products: L. Song et
        al., "Feature Selection via Dependence Maximization", JMLR 2012, equation 5.
    """
    both = together(student, teacher, axis_name, where, least=4 if debiased else 2)
    s, t = _centred(both.student, both), _centred(both.teacher, both)
    every_s, every_t = gathered(s, axis_name), gathered(t, axis_name)
    gram_s, gram_t = _dot(s, every_s.T), _dot(t, every_t.T)
    lengths_s, lengths_t = jnp.sum(s**2, axis=1), jnp.sum(t**2, axis=1)

    def product(a: jax.Array, b: jax.Array, of_a: jax.Array, of_b: jax.Array) -> jax.Array:
        biased = both.total(jnp.sum(a * b))
        if not debiased:
            return biased
        # As rows sum to 0, this is all that is left of the general formula.
        n = jnp.maximum(both.rows, 4)
        sums = both.total(jnp.sum(of_a)) * both.total(jnp.sum(of_b))
        mixed = both.total(jnp.sum(of_a * of_b))
        estimate = biased - n / (n - 2) * mixed + sums / ((n - 1) * (n - 2))
        return jnp.where(both.rows >= 4, estimate, 0)

    cross = product(gram_s, gram_t, lengths_s, lengths_t)
    norms = [
        product(gram, gram, lengths, lengths)
        for gram, lengths in ((gram_s, lengths_s), (gram_t, lengths_t))
    ]
    some = (norms[0] > 0) & (norms[1] > 0)
    roots = [jax.lax.rsqrt(jnp.where(some, norm, 1)) for norm in norms]
    alignment = jnp.where(some, cross * roots[0] * roots[1], 0)
    # Not an error that stays unseen: what isn't a number is neither above 0 nor 0.
    alignment = jnp.where(jnp.isnan(norms[0] + norms[1]), jnp.nan, alignment)
    if both.mask is None:
        return 1 - alignment
    return jnp.where(both.total(jnp.sum(both.mask)) > 0, 1 - alignment, 0)


def together(
    student: Any,
    teacher: Any,
    axis_name: AxisName | None,
    where: ArrayLike | None,
    *,
    least: int = 2,
    same_width: bool = False,
    stop: bool = True,
) -> Together:
    """Checked, flattened features of both sides, with those of all devices.

    Args:
        student: [B, ...].
        teacher: [B, ...], of as many rows.
        axis_name: over which the batch is split.
        where: [B] bool.
        least: how many rows the whole batch must have.
        same_width: whether the sides must have one shape.
        stop: whether the teacher's side gets no gradient.
    """
    s = _checks.floating("student", student, min_ndim=2)
    t = _checks.floating("teacher", teacher, min_ndim=2)
    if same_width:
        _checks.same_shape("teacher", t, "student", s)
    _checks.shape("teacher", t, (s.shape[0], *t.shape[1:]), "with one row for each of student's")
    shards = 1 if axis_name is None else jax.lax.psum(1, axis_name)
    for name, x in (("student", s), ("teacher", t)):
        if x.shape[0] * shards < least or x.size == 0:
            raise ValueError(
                f"{name} must have at least {least} rows in the whole batch, to be compared with "
                f"each other, and at least 1 channel, got {_checks.describe(x)}."
            )
    mask = _checks.mask("where", where, s.shape[:1])
    dtype = jnp.promote_types(s.dtype, t.dtype)
    s, t = (blank(x.reshape(x.shape[0], -1).astype(dtype), mask) for x in (s, t))
    t = jax.lax.stop_gradient(t) if stop else t
    kept = jnp.ones(s.shape[0], bool) if mask is None else mask
    place = jnp.arange(s.shape[0])
    if axis_name is not None:
        place = place + s.shape[0] * jax.lax.axis_index(axis_name)
    all_s, all_t, all_kept = (gathered(x, axis_name) for x in (s, t, kept))
    # A sum over devices, as types know of no other way to be equal on all.
    found = jnp.sum(kept) if axis_name is None else jax.lax.psum(jnp.sum(kept), axis_name)
    count = jnp.maximum(found, 1).astype(dtype)
    return Together(s, t, all_s, all_t, kept, all_kept, place, count, mask, axis_name)


def gathered(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The rows of all devices."""
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def unit(x: jax.Array, *, add: Any = 0.0) -> jax.Array:
    """``x / (|x| + add)`` over the last axis; zeros, without a gradient, where x is 0."""
    squares = jnp.sum(x**2, axis=-1, keepdims=True)
    nothing = squares == 0
    length = jnp.sqrt(jnp.where(nothing, 1, squares)) + add
    return jnp.where(nothing, 0, x / jnp.maximum(length, 1e-12))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=_PRECISION)


def _huber(error: jax.Array) -> jax.Array:
    size = jnp.abs(error)
    return jnp.where(size < 1, error**2 / 2, size - 0.5)


def _centred(x: jax.Array, both: Together) -> jax.Array:
    """Less the mean over all rows, and scaled so that no fourth power overflows or underflows."""
    centred = blank(x - both.total(jnp.sum(x, axis=0, keepdims=True)) / both.rows, both.mask)
    largest = jax.lax.stop_gradient(jnp.stack([jnp.max(jnp.abs(y)) for y in (centred, x)]))
    if both.axis_name is not None:
        largest = jax.lax.pmax(largest, both.axis_name)
    spread, size = largest
    # What the rounding of the mean leaves of a constant is no variation.
    constant = spread <= 32 * jnp.finfo(x.dtype).eps * size
    return jnp.where(constant, 0, centred / jnp.where(constant, 1, spread))
