"""Losses of what channels say about each other: their correlations and singular vectors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.losses._inputs import select
from kdjax.losses._overhaul import map_pair

# Half-precision passes, some accelerators' default, are no float32.
_EXACT = jax.lax.Precision.HIGHEST
# How many more of the student's vectors than of the teacher's are looked through for a match.
_MORE = 3


def ickd(student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Inter-channel correlation (ICKD): how alike the channels' correlations within an image are.

        (1 / C) ||N(F_s F_s^T) - N(F_t F_t^T)||_F^2

    where F [C, positions] are an example's maps and N divides rows by their length. The mean over
    the batch is the published value of the CIFAR code, ours; the ImageNet code, and torchdistill's
    `ChSimLoss`, divide by the batch size once more.

    Args:
        student: [B, H, W, C] floating point, through a connector to the teacher's channels.
        teacher: [B, H', W', C] floating point; no gradient flows to it.
        where: [B] bool, False for rows to leave out; they count 0.

    Returns:
        [B] in at least float32.

    Raises:
        TypeError: features are not floating point, or ``where`` is not boolean.
        ValueError: shapes don't fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> alike = jnp.ones((1, 2, 1, 2))  # two channels that see the same
        >>> apart = jnp.eye(2).reshape(1, 2, 1, 2)
        >>> print(f"{losses.ickd(alike, apart)[0]:.4f}")  # 2 - 2 cos(45 degrees)
        0.5858

    Reference:
        L. Liu et al., "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge
        Distillation", ICCV 2021, equations 2 to 4.
    """
    student, teacher, mask = map_pair(student, teacher, where)
    difference = _correlations(student) - _correlations(teacher)
    return select(jnp.mean(jnp.sum(difference**2, axis=2), axis=1), mask)


def kdsvd(
    student_low: ArrayLike,
    student_high: ArrayLike,
    teacher_low: ArrayLike,
    teacher_high: ArrayLike,
    *,
    k: int = 1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """KD by singular value decomposition: how the main directions of two stages are related.

        sum over channels i of the higher stage, j of the lower one, and the k directions of
          (r^s_ij - r^t_ij)^2,   r_ij = exp(-(v_high,i - v_low,j)^2 / 8)

    v are the k first right singular vectors of each example's maps, read as [positions, channels].
    Of the student's k + 3 first ones, each of the teacher's is compared with that of the largest
    absolute cosine, in its sign; both are multiplied by the teacher's singular values, scaled to a
    unit vector. The mean over the batch is the published value of one pair of stages, and the
    published loss is the sum over all neighbouring ones.

    A singular vector has no sign, and the loss depends on the teacher's: the published code takes
    whatever its solver returns. Ours takes the sign in which positive entries hold more of the
    vector's energy (``sum v |v| >= 0``), the natural one for maps after a ReLU. Vectors of equal
    singular values are no function of the maps; their gradient along each other is left out here
    and infinite in the published code. mdistiller decomposes [channels and rows, columns] instead,
    another loss.

    Args:
        student_low: [B, H, W, C] floating point, the student's maps of the earlier stage.
        student_high: [B, H', W', C'] floating point, of the later one.
        teacher_low: [B, H, W, C] floating point, the teacher's, of as many channels (height and
            width may differ); no gradient flows to it.
        teacher_high: [B, H', W', C'] floating point; the same.
        k: how many directions; at most the positions and the channels of each map.
        where: [B] bool, False for rows to leave out; they count 0.

    Returns:
        [B] in at least float32. It needs memory for B * C * C' * k numbers.

    Raises:
        TypeError: features are not floating point, or ``where`` is not boolean.
        ValueError: shapes don't fit, or ``k`` is out of range.

    Example:
        >>> import jax
        >>> from kdjax import losses
        >>> shapes = ((2, 4, 4, 5), (2, 2, 2, 8))
        >>> keys = jax.random.split(jax.random.key(0))
        >>> low, high = (jax.random.uniform(k, s) for k, s in zip(keys, shapes, strict=True))
        >>> losses.kdsvd(2 * low, -high, low, high).round(4).tolist()  # the same directions
        [0.0, 0.0]

    Reference:
        S. H. Lee, D. H. Kim, B. C. Song, "Self-supervised Knowledge Distillation Using Singular
        Value Decomposition", ECCV 2018, in the form of RepDistiller's code.
    """
    pairs = [
        (f"{name}_low", low, f"{name}_high", high)
        for name, low, high in (
            ("student", student_low, student_high),
            ("teacher", teacher_low, teacher_high),
        )
    ]
    for low_name, low, high_name, high in pairs:
        low = _checks.floating(low_name, low, ndim=4)
        high = _checks.floating(high_name, high, ndim=4)
        _checks.shape(high_name, high, (low.shape[0], *high.shape[1:]), f"to fit {low_name}")
    found = []
    for stage, s, t in (("low", student_low, teacher_low), ("high", student_high, teacher_high)):
        s, t = jnp.asarray(s), jnp.asarray(t)
        wanted = (s.shape[0], *t.shape[1:3], s.shape[3])
        _checks.shape(f"teacher_{stage}", t, wanted, f"to fit student_{stage}")
        found.append(map_pair(s, t, where))
    mask = found[0][2]
    return select(kdsvd_of_stages([s for s, _, _ in found], [t for _, t, _ in found], k), mask)


def kdsvd_of_stages(
    student: Sequence[jax.Array], teacher: Sequence[jax.Array], k: int
) -> jax.Array:
    """[B]: `kdsvd` summed over all neighbouring stages, each stage decomposed once."""
    k = _checks.count("k", k)
    students, teachers = [], []
    for s, t in zip(student, teacher, strict=True):
        room = min(s.shape[1] * s.shape[2], t.shape[1] * t.shape[2], s.shape[3])
        if k > room:
            raise ValueError(
                f"k must be at most {room}, the fewer of the positions and channels of maps "
                f"{tuple(s.shape)} and {tuple(t.shape)}, got {k}."
            )
        vectors, values = singular_vectors(matrices(t), k)
        found, _ = singular_vectors(matrices(s), k + _MORE)
        s_scaled, t_scaled = aligned(found, signed(vectors), values)
        students.append(s_scaled)
        teachers.append(t_scaled)
    return relations_of_stages(students, teachers)


def relations_of_stages(student: Sequence[jax.Array], teacher: Sequence[jax.Array]) -> jax.Array:
    """[B]: squared differences of the relations of neighbouring stages' vectors [B, C, k]."""
    total = jnp.zeros(student[0].shape[0], student[0].dtype)
    for i, j in itertools.pairwise(range(len(student))):
        difference = _related(student[j], student[i]) - _related(teacher[j], teacher[i])
        total = total + jnp.sum(difference**2, axis=(1, 2, 3))
    return total


def matrices(maps: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, positions, C]."""
    return maps.reshape(maps.shape[0], -1, maps.shape[3])


def singular_vectors(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The first right singular vectors [B, C, count] and singular values [B, count] of x [B, N, C].

    The values have unit length and no gradient. Vectors are 0 where x has no such direction, of
    any sign, and fewer than ``count`` if N or C is. Their first derivatives are exact except
    between equal singular values, where they are left out.
    """
    x0 = jax.lax.stop_gradient(x)
    rows, columns = x.shape[1:]
    count = min(count, rows, columns)
    wide = rows < columns
    # The smaller of the two Gram matrices has the same eigenvalues.
    gram = jnp.einsum("bnc,bmc->bnm" if wide else "bnc,bnd->bcd", x0, x0, precision=_EXACT)
    squares, vectors = _eigh(gram)
    squares, vectors = squares[:, ::-1], vectors[:, :, ::-1]
    largest = jnp.maximum(squares[:, :1], 0)
    # What rounding leaves of an eigenvalue of 0, and of the difference of equal ones.
    rounding = 32 * jnp.finfo(x.dtype).eps * largest
    there = ~(squares <= rounding)  # NaN is passed on
    safe = jnp.where(there, squares, 1)
    if wide:
        vectors = jnp.einsum("bnc,bnr->bcr", x0, vectors, precision=_EXACT)
        vectors = vectors * jax.lax.rsqrt(safe)[:, None]
    vectors = jnp.where(there[:, None], vectors, 0)
    first = vectors[:, :, :count]
    gaps = squares[:, None, :count] - squares[:, :, None]  # [B, r, count], of j and i
    apart = (jnp.abs(gaps) > rounding[..., None]) & there[:, None, :count]
    inverse = jnp.where(apart, 1 / jnp.where(apart, gaps, 1), 0)
    # dv_i = sum_j v_j (v_j^T dK v_i) / (l_i - l_j), K = x^T x, with l_j = 0 outside the rows' span.
    seen = jnp.einsum("bnc,bcr->bnr", x, vectors, precision=_EXACT)
    products = jnp.einsum("bnr,bnk->brk", seen, seen[:, :, :count], precision=_EXACT)
    moved = jnp.einsum("bcr,brk->bck", vectors, inverse * products, precision=_EXACT)
    if wide:
        response = jnp.einsum("bnc,bnk->bck", x, seen[:, :, :count], precision=_EXACT)
        inside = jnp.einsum("bcr,brk->bck", vectors, products, precision=_EXACT)
        outside = jnp.where(there[:, None, :count], (response - inside) / safe[:, None, :count], 0)
        moved = moved + outside
    values = jnp.sqrt(jnp.where(there, squares, 0)[:, :count])
    length = jnp.sqrt(jnp.sum(values**2, axis=1, keepdims=True))
    # Adds 0 to the value, and the derivative.
    first = first + (moved - jax.lax.stop_gradient(moved))
    return first, values / jnp.where(length == 0, 1, length)


def _eigh(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors of a batch of matrices.

    jaxlib's batched decomposition on CPU waits for other threads of the pool that it runs in. Where
    several run at once in a small pool, as of these stages, all would wait for ever; one matrix at
    a time needs no other thread.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda one: tuple(jnp.linalg.eigh(one)), gram)
    return tuple(jnp.linalg.eigh(gram))


def signed(vectors: jax.Array) -> jax.Array:
    """Vectors [B, C, k] in the sign in which positive entries hold more of their energy."""
    energy = jnp.sum(vectors * jnp.abs(vectors), axis=1, keepdims=True)
    return jnp.where(energy < 0, -vectors, vectors)


def aligned(
    student: jax.Array, teacher: jax.Array, values: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The student's vectors that match the teacher's [B, C, k], and these, both times the values.

    Args:
      student: [B, C, any number], of any signs.
      teacher: [B, C, k].
      values: [B, k], the teacher's singular values.
    """
    cosine = jax.lax.stop_gradient(jnp.einsum("bcm,bck->bmk", student, teacher, precision=_EXACT))
    best = jnp.argmax(jnp.abs(cosine), axis=1)[:, None]
    sign = jnp.sign(jnp.take_along_axis(cosine, best, axis=1))
    chosen = jnp.take_along_axis(student, best, axis=2) * sign
    return chosen * values[:, None], teacher * values[:, None]


def _related(high: jax.Array, low: jax.Array) -> jax.Array:
    """[B, C', C, k] radial basis functions of the entries' differences."""
    return jnp.exp(-((high[:, :, None] - low[:, None]) ** 2) / 8)


def _correlations(maps: jax.Array) -> jax.Array:
    """[B, C, C]: products of the channels over positions, rows of unit length."""
    x = matrices(maps)
    gram = jnp.einsum("bnc,bnd->bcd", x, x, precision=_EXACT)
    squares = jnp.sum(gram**2, axis=2, keepdims=True)
    length = jnp.sqrt(jnp.where(squares == 0, 1, squares))
    return gram / jnp.where(squares == 0, 1, jnp.maximum(length, 1e-12))
