"""Contrastive and correlation losses of embeddings: who is whose partner, and how rows vary.

These compare embeddings that layers of their own make of the student's and of the teacher's
features. Both layers are trained, so that gradients flow to both sides.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.losses._features import AxisName
from kdjax.losses._inputs import blank, hyperparameter, select
from kdjax.losses._relations import gathered, together, unit

_PRECISION = jax.lax.Precision.HIGHEST


def contrast(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    temperature: ArrayLike = 0.07,
    axis_name: AxisName | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Contrastive distillation within the batch: find the teacher's embedding of the same example.

        l_i = -log( exp(s_i . t_i / T) / sum_j exp(s_i . t_j / T) ),   rows divided by their length

    InfoNCE, whose candidates are the teacher's embeddings of all examples of the batch. The form
    of CRD without memory banks (`nce` is its form with them); it wants large batches, as these are
    the negatives. Every row depends on the others of the batch.

    Args:
        student: [B, D] floating point, embeddings; they are normalised here.
        teacher: [B, D] floating point, the teacher's embeddings of the same examples. Gradients
            flow to it, too: a layer that makes embeddings of the teacher's features is trained.
        temperature: T, a finite scalar above 0; that of CRD.
        axis_name: the named axis (or axes) of shard_map or pmap over which the batch is split; the
            candidates are then those of the whole batch.
        where: [B] bool, False for rows to leave out, also as candidates; they count 0.

    Returns:
        [B] in at least float32, not negative. An embedding of zeros has the cosine 0 with all.

    Raises:
        TypeError: embeddings are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, the whole batch has fewer than 2 rows (no negatives), or the
            temperature is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> x = jnp.eye(3)  # log(1 + 2 exp(-1))
        >>> [f"{value:.4f}" for value in losses.contrast(x, x, temperature=1.0)]
        ['0.5514', '0.5514', '0.5514']

    Reference:
        A. van den Oord, Y. Li, O. Vinyals, "Representation Learning with Contrastive Predictive
        Coding", 2018, equation 4, between student and teacher as in Y. Tian, D. Krishnan, P. Isola,
        "Contrastive Representation Distillation", ICLR 2020.
    """
    both = together(student, teacher, axis_name, where, same_width=True, stop=False)
    temperature = hyperparameter("temperature", temperature, both.student.dtype, above=0)
    similarity = jnp.matmul(unit(both.student), unit(both.all_teacher).T, precision=_PRECISION)
    similarity = similarity / temperature
    itself = both.place[:, None] == jnp.arange(both.all_kept.shape[0])[None]
    # A row left out keeps its partner: a logarithm of nothing would have no gradient.
    seen = both.all_kept[None] | itself
    others = jax.nn.logsumexp(jnp.where(seen, similarity, -jnp.inf), axis=1)
    return both.finish(others - jnp.sum(jnp.where(itself, similarity, 0), axis=1))


def nce(
    scores: ArrayLike,
    *,
    examples: int,
    eps: ArrayLike = 1e-7,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Noise-contrastive estimation: tell the positive from K negatives drawn evenly from the data.

        l = -log( P_0 / (P_0 + c + eps) ) - sum_{k=1..K} log( c / (P_k + c + eps) )
        P = exp(scores),   c = K / examples

    CRD's value, for one side and each example: not divided by K. It takes logarithms, and large
    scores neither overflow nor lose their gradient.

    Args:
        scores: [B, 1 + K] floating point, logarithms of the model's probabilities: similarity over
            temperature, less the logarithm of the normaliser. The positive is first.
        examples: how many examples the negatives are drawn from.
        eps: a finite scalar at least 0, that of the published code.
        where: [B] bool, False for rows to leave out; they count 0.

    Returns:
        [B] in at least float32, not negative.

    Raises:
        TypeError: scores are not floating point, or ``where`` is not boolean.
        ValueError: scores are not [B, 1 + K], or a number is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> scores = jnp.log(jnp.array([[0.5, 0.1, 0.1]]))  # c = 2 / 4
        >>> print([f"{value:.4f}" for value in losses.nce(scores, examples=4)])
        ['1.0578']

    Reference:
        Y. Tian, D. Krishnan, P. Isola, "Contrastive Representation Distillation", ICLR 2020, in the
        form of its published code; M. Gutmann, A. Hyvarinen, "Noise-contrastive estimation",
        AISTATS 2010.
    """
    x = _checks.floating("scores", scores, ndim=2)
    negatives = x.shape[1] - 1
    if negatives < 1:
        raise ValueError(
            "scores must be [B, 1 + K], the positive and K >= 1 negatives, got "
            f"{_checks.describe(x)}."
        )
    share = negatives / _checks.count("examples", examples)
    eps = hyperparameter("eps", eps, x.dtype, low=0)
    mask = _checks.mask("where", where, x.shape[:1])
    x = blank(x, mask)
    floor = jnp.log(share + eps)
    positive = jax.nn.softplus(floor - x[:, 0])
    negative = jnp.sum(jax.nn.softplus(x[:, 1:] - floor), axis=1)
    return select(positive + negative + negatives * (floor - math.log(share)), mask)


def neighbour_congruence(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    axis_name: AxisName | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Correlation congruence in RepDistiller's form: the errors of neighbours, multiplied.

        D = |s - t|,   l_i = n / (n - 1) sum_d D_{i,d} D_{i+1,d},   0 for the last row

    The mean over the rows is the published mean over the n - 1 pairs of neighbours, and the
    published weight of 0.02 belongs to it. Its value depends on the order of the batch. It isn't
    the paper's formula, which is `correlation_congruence`; the figures published for CC in
    comparisons of CIFAR-100 are of this form.

    Args:
        student: [B, D] floating point, embeddings.
        teacher: [B, D] floating point, the teacher's embeddings of the same examples. Gradients
            flow to it, too: a layer that makes embeddings of the teacher's features is trained.
        axis_name: the named axis (or axes) of shard_map or pmap over which the batch is split; the
            rows of all devices are then in one order.
        where: [B] bool, False for rows to leave out, as if they were deleted: the rows on both
            sides of one are neighbours. They count 0.

    Returns:
        [B] in at least float32, not negative.

    Raises:
        TypeError: embeddings are not floating point, or ``where`` is not boolean.
        ValueError: shapes differ, or the whole batch has fewer than 2 rows.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> s = jnp.array([[1.0], [2.0], [-3.0]])
        >>> losses.neighbour_congruence(s, jnp.zeros((3, 1))).tolist()  # of mean (2 + 6) / 2
        [3.0, 9.0, 0.0]

    Reference:
        The code of RepDistiller, after B. Peng et al., "Correlation Congruence for Knowledge
        Distillation", ICCV 2019.
    """
    both = together(student, teacher, axis_name, where, same_width=True, stop=False)
    error = both.student - both.teacher
    # abs has the slope 1 at 0 in JAX, the sign has 0 there.
    size = error * jax.lax.stop_gradient(jnp.sign(error))
    every = gathered(size, axis_name)
    n = every.shape[0]
    kept = jnp.where(both.all_kept, jnp.arange(n), n)
    following = jnp.append(jax.lax.cummin(kept, reverse=True)[1:], n)[both.place]
    partner = jnp.where((following < n)[:, None], every[jnp.minimum(following, n - 1)], 0)
    values = jnp.sum(size * partner, axis=1) * (both.rows / jnp.maximum(both.rows - 1, 1))
    return both.finish(values)


def correlation_congruence(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    gamma: ArrayLike = 0.4,
    order: int = 2,
    axis_name: AxisName | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Correlation congruence in the paper's form: the same Gaussian kernel between examples.

        k(x, y) = exp(-2 gamma) sum_{p=0..order} (2 gamma)^p / p! (x . y)^p,   |x| = |y| = 1
        l_i = (1/n) sum_j (k(s_i, s_j) - k(t_i, t_j))^2

    k is the Taylor series of ``exp(-gamma |x - y|^2)``, which is right for rows of length 1, so
    that rows are normalised here. The mean over the rows is ``|Ks - Kt|_F^2 / n^2``; torchdistill
    takes the norm without the square and divides it by n^2 all the same. RepDistiller's form is
    another one: `neighbour_congruence`. Every row depends on the others of the batch.

    Args:
        student: [B, ...] floating point, features or embeddings.
        teacher: [B, ...] floating point, of any width. Gradients flow to it, too: a layer that
            makes embeddings of the teacher's features is trained.
        gamma: a finite scalar above 0.
        order: of the Taylor series, at least 1. The defaults of both are ours.
        axis_name: the named axis (or axes) of shard_map or pmap over which the batch is split; each
            row is then compared with all rows of the whole batch.
        where: [B] bool, False for rows to leave out, as if they were deleted; they count 0.

    Returns:
        [B] in at least float32, not negative.

    Raises:
        TypeError: embeddings are not floating point, or ``where`` is not boolean.
        ValueError: the sides have other numbers of rows, the whole batch fewer than 2, or an option
            is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import losses
        >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])  # every kernel of different rows is exp(-0.8)
        >>> values = losses.correlation_congruence(x, jnp.ones((2, 2)), gamma=0.4, order=1)
        >>> print([f"{value:.4f}" for value in values])  # (exp(-0.8) 0.8)^2 / 2
        ['0.0646', '0.0646']

    Reference:
        B. Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, section 3.
    """
    both = together(student, teacher, axis_name, where, stop=False)
    gamma = hyperparameter("gamma", gamma, both.student.dtype, above=0)
    order = _checks.count("order", order)

    def kernel(own: jax.Array, every: jax.Array) -> jax.Array:
        cosine = jnp.matmul(unit(own), unit(every).T, precision=_PRECISION)
        series = jnp.ones_like(cosine)
        for p in range(order, 0, -1):
            series = 1 + 2 * gamma * cosine / p * series
        return jnp.exp(-2 * gamma) * series

    difference = kernel(both.student, both.all_student) - kernel(both.teacher, both.all_teacher)
    difference = jnp.where(both.all_kept[None], difference, 0)
    return both.finish(jnp.sum(difference**2, axis=1) / both.rows)
