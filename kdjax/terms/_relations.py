"""Terms that compare the relations between examples, or embeddings of them, over the batch.

Values of all are those of the whole batch, over all devices; ``scope="device"`` relates the rows of
each device only, as data-parallel PyTorch code does. Rows of weight 0 (padding) are left out as if
they were deleted; all others count alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks, losses
from kdjax._pairs import Batch, Outputs, Term, Tree
from kdjax.losses import _contrastive, _relations
from kdjax.terms._connectors import counted, linear, linear_init, mean_of_batch, one_output
from kdjax.terms._outputs import Number, at, checked, no_params
from kdjax.terms._stages import checked_scope

Pool = Callable[[jax.Array], jax.Array]


def flatten(features: jax.Array) -> jax.Array:
    """[B, ...] as [B, D]."""
    return features.reshape(features.shape[0], -1)


def similarity_preserving(student_tap: str, teacher_tap: str, *, scope: str = "global") -> Term:
    """Similarity-preserving distillation (SP).

    ``|Gt - Gs|_F^2 / n^2`` of the Gram matrices of flattened features, each row divided by its L2
    norm: `kdjax.losses.similarity_preserving`. Published weight 3000 (RepDistiller, mdistiller), on
    the last maps before the pooling. torchdistill divides rows by their L1 norm instead; ours is
    the paper's.

    Args:
      student_tap: the student's output to use, of any shape [B, ...].
      teacher_tap: the teacher's.
      scope: ``"global"`` relates all rows of the batch, ``"device"`` those of each device.

    Returns:
      A batch-coupled `Term` without parameters.

    Raises:
      ValueError: another scope; when used, no such output, or fewer than 2 rows.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.similarity_preserving("feat", "feat")

    Reference:
      F. Tung, G. Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, section 3.
    """
    return _related(
        _relations.similarity_preserving, student_tap, teacher_tap, scope, flatten, flatten
    )


def rkd(
    student_tap: str,
    teacher_tap: str,
    *,
    distance: Number = 25.0,
    angle: Number = 50.0,
    squared: bool = False,
    chunk: int | None = None,
    scope: str = "global",
    student_pool: Pool = losses.pool,
    teacher_pool: Pool = losses.pool,
) -> Term:
    """Relational knowledge distillation (RKD) by distances and angles.

    ``distance * mean rkd_distance + angle * mean rkd_angle`` of `kdjax.losses`. The published
    weight is 1 (RepDistiller, mdistiller) with the factors 25 and 50 inside, on the features before
    the classifier.

    Args:
      student_tap: the student's output to use.
      teacher_tap: the teacher's; its width may be another.
      distance: factor of the distances; a number, an array or a schedule of the step.
      angle: factor of the angles.
      squared: whether to compare squared distances (an option of mdistiller).
      chunk: how many vertices of angles are computed at once; see `kdjax.losses.rkd_angle` for the
        memory.
      scope: ``"global"`` relates all rows of the batch, ``"device"`` those of each device.
      student_pool: from the output to [B, D]; by default the mean over positions.
      teacher_pool: the same for the teacher.

    Returns:
      A batch-coupled `Term` without parameters.

    Raises:
      TypeError: a factor is no number.
      ValueError: another scope, or a factor that isn't finite; when used, no such output, or fewer
        than 2 rows.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.rkd("pool", "pool")

    Reference:
      W. Park, D. Kim, Y. Lu, M. Cho, "Relational Knowledge Distillation", CVPR 2019, section 3.2.
    """
    checked("distance", distance)
    checked("angle", angle)
    if chunk is not None:
        chunk = _checks.count("chunk", chunk)

    def loss(s: jax.Array, t: jax.Array, *, distance: Any, angle: Any, **rows: Any) -> jax.Array:
        far = _relations.rkd_distance(s, t, squared=squared, **rows)
        return distance * far + angle * _relations.rkd_angle(s, t, chunk=chunk, **rows)

    pools = (student_pool, teacher_pool)
    return _related(loss, student_tap, teacher_tap, scope, *pools, distance=distance, angle=angle)


def pkt(
    student_tap: str,
    teacher_tap: str,
    *,
    scope: str = "global",
    student_pool: Pool = losses.pool,
    teacher_pool: Pool = losses.pool,
) -> Term:
    """Probabilistic knowledge transfer (PKT).

    The mean over all n^2 pairs of `kdjax.losses.pkt`. Published weight 30000 (RepDistiller,
    mdistiller), on the features before the classifier.

    Args:
      student_tap: the student's output to use.
      teacher_tap: the teacher's; its width may be another.
      scope: ``"global"`` relates all rows of the batch, ``"device"`` those of each device.
      student_pool: from the output to [B, D]; by default the mean over positions.
      teacher_pool: the same for the teacher.

    Returns:
      A batch-coupled `Term` without parameters.

    Raises:
      ValueError: another scope; when used, no such output, or fewer than 2 rows.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.pkt("pool", "pool")

    Reference:
      N. Passalis, A. Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer",
      ECCV 2018, section 3.
    """
    return _related(_relations.pkt, student_tap, teacher_tap, scope, student_pool, teacher_pool)


def cka(
    student_tap: str,
    teacher_tap: str,
    *,
    debiased: bool = False,
    scope: str = "global",
    student_pool: Pool = losses.pool,
    teacher_pool: Pool = losses.pool,
) -> Term:
    """Centred kernel alignment: ``1 - CKA`` of the batch, with the linear kernel.

    `kdjax.losses.cka`; between 0 and 1. There is no published weight for this form, which is our
    reading of a loss that several papers use.

    Args:
      student_tap: the student's output to use.
      teacher_tap: the teacher's; its width may be another.
      debiased: whether products are replaced by unbiased estimates: for batches that aren't much
        larger than the features are wide.
      scope: ``"global"`` aligns all rows of the batch, ``"device"`` those of each device (averaged
        by their numbers of rows).
      student_pool: from the output to [B, D]; by default the mean over positions.
      teacher_pool: the same for the teacher.

    Returns:
      A batch-coupled `Term` without parameters.

    Raises:
      ValueError: another scope; when used, no such output, or fewer than 2 rows (4 if debiased).

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.cka("feat", "feat")

    Reference:
      S. Kornblith, M. Norouzi, H. Lee, G. Hinton, "Similarity of Neural Network Representations
      Revisited", ICML 2019, section 3.
    """

    def loss(s: jax.Array, t: jax.Array, **rows: Any) -> jax.Array:
        return _relations.cka(s, t, debiased=debiased, **rows)

    return _related(loss, student_tap, teacher_tap, scope, student_pool, teacher_pool)


def correlation_congruence(
    student_tap: str,
    teacher_tap: str,
    *,
    features: int = 128,
    gamma: Number | None = None,
    order: int = 2,
    scope: str = "global",
    student_pool: Pool = losses.pool,
    teacher_pool: Pool = losses.pool,
) -> Term:
    """Correlation congruence (CC) of linear embeddings of both sides.

    By default RepDistiller's form, `kdjax.losses.neighbour_congruence`, whose published weight is
    0.02: products of the errors of neighbours in the
    batch. With ``gamma`` the paper's, `kdjax.losses.correlation_congruence`: the squared difference
    of Gaussian kernels between all examples, for which that weight doesn't hold. As in RepDistiller
    both embeddings are trained, the teacher's too.

    Args:
      student_tap: the student's output to use.
      teacher_tap: the teacher's.
      features: width of the embeddings.
      gamma: of the Gaussian kernel, above 0: a number, an array or a schedule. None: RepDistiller's
        form.
      order: of the kernel's Taylor series.
      scope: ``"global"`` relates all rows of the batch, ``"device"`` those of each device.
      student_pool: from the output to [B, D]; by default the mean over positions.
      teacher_pool: the same for the teacher.

    Returns:
      A batch-coupled `Term` with the parameters ``{"student": {"kernel", "bias"}, "teacher":
      {...}}``.

    Raises:
      TypeError: ``gamma`` is no number.
      ValueError: another scope, or a number out of its range; when used, no such output, or fewer
        than 2 rows.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.correlation_congruence("pool", "pool")
      >>> paper = kd.terms.correlation_congruence("pool", "pool", gamma=0.4)

    Reference:
      B. Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, section 3; the
      code of RepDistiller.
    """
    order = _checks.count("order", order)
    pools = (student_pool, teacher_pool)
    if gamma is None:
        loss: Callable[..., jax.Array] = _contrastive.neighbour_congruence
        return _related(loss, student_tap, teacher_tap, scope, *pools, features=features)
    checked("gamma", gamma, above=0)

    def kernels(s: jax.Array, t: jax.Array, *, gamma: Any, **rows: Any) -> jax.Array:
        return _contrastive.correlation_congruence(s, t, gamma=gamma, order=order, **rows)

    return _related(
        kernels, student_tap, teacher_tap, scope, *pools, features=features, gamma=gamma
    )


def contrast(
    student_tap: str,
    teacher_tap: str,
    *,
    features: int = 128,
    temperature: Number = 0.07,
    scope: str = "global",
    student_pool: Pool = losses.pool,
    teacher_pool: Pool = losses.pool,
) -> Term:
    """Contrastive distillation within the batch, of linear embeddings of both sides.

    `kdjax.losses.contrast`: the teacher's embedding of the same example is to be found among those
    of the batch. CRD without its memory banks (`kdjax.methods.crd` has them), for which 0.8 is
    published; this form's values are smaller, and no weight is published. Both embeddings are
    trained.

    Args:
      student_tap: the student's output to use.
      teacher_tap: the teacher's.
      features: width of the embeddings.
      temperature: above 0: a number, an array or a schedule of the step.
      scope: ``"global"`` contrasts all rows of the batch, ``"device"`` those of each device.
      student_pool: from the output to [B, D]; by default the mean over positions.
      teacher_pool: the same for the teacher.

    Returns:
      A batch-coupled `Term` with the parameters ``{"student": {"kernel", "bias"}, "teacher":
      {...}}``.

    Raises:
      TypeError: the temperature is no number.
      ValueError: another scope, or a number out of its range; when used, no such output, or fewer
        than 2 rows.

    Example:
      >>> import kdjax as kd
      >>> term = kd.terms.contrast("pool", "pool", features=64)

    Reference:
      Y. Tian, D. Krishnan, P. Isola, "Contrastive Representation Distillation", ICLR 2020, with the
      objective of A. van den Oord, Y. Li, O. Vinyals, "Representation Learning with Contrastive
      Predictive Coding", 2018, equation 4.
    """
    checked("temperature", temperature, above=0)
    return _related(
        _contrastive.contrast,
        student_tap,
        teacher_tap,
        scope,
        student_pool,
        teacher_pool,
        features=features,
        temperature=temperature,
    )


def vectors(name: str, pool: Pool, outputs: Outputs, tap: str) -> jax.Array:
    """The pooled features [B, D] of "student" or "teacher", the latter without gradient."""
    found = one_output(name, outputs, tap)
    found = _checks.floating(f"the pooled {name} features", pool(found))
    if found.ndim != 2:
        raise ValueError(f"{name}_pool must return [B, D], got {_checks.describe(found)}.")
    return found if name == "student" else jax.lax.stop_gradient(found)


def checked_pools(student_pool: Pool, teacher_pool: Pool) -> None:
    for name, pool in (("student_pool", student_pool), ("teacher_pool", teacher_pool)):
        if not callable(pool):
            raise TypeError(
                f"{name} must be a function from an output to [B, D], got {_checks.describe(pool)}."
            )


def embedding_init(key: jax.Array, s: jax.Array, t: jax.Array, features: int) -> Tree:
    """Parameters of a linear layer for each side."""
    keys = jax.random.split(key)
    return {
        name: linear_init(k, x.shape[1], features)
        for name, k, x in zip(("student", "teacher"), keys, (s, t), strict=True)
    }


def _related(
    loss: Callable[..., jax.Array],
    student_tap: str,
    teacher_tap: str,
    scope: str,
    student_pool: Pool,
    teacher_pool: Pool,
    *,
    features: int | None = None,
    **options: Any,
) -> Term:
    """A coupled Term of a loss of rows, with embeddings of a width if ``features`` is given."""
    checked_scope(scope)
    checked_pools(student_pool, teacher_pool)
    if features is not None:
        features = _checks.count("features", features)

    def pooled(student_out: Outputs, teacher_out: Outputs) -> tuple[jax.Array, jax.Array]:
        return (
            vectors("student", student_pool, student_out, student_tap),
            vectors("teacher", teacher_pool, teacher_out, teacher_tap),
        )

    def init(key: jax.Array, student_out: Outputs, teacher_out: Outputs) -> Tree:
        s, t = pooled(student_out, teacher_out)
        return embedding_init(key, s, t, features) if features is not None else {}

    def term_loss(
        tparams: Tree,
        student_out: Outputs,
        teacher_out: Outputs,
        batch: Batch,
        *,
        step: jax.Array,
        key: jax.Array,
        axis_name: Any = None,
    ) -> jax.Array:
        where, *both = counted(batch, *pooled(student_out, teacher_out))
        s, t = both
        if features is not None:
            s, t = linear(tparams["student"], s), linear(tparams["teacher"], t)
        values = loss(
            s,
            t,
            where=where,
            axis_name=axis_name if scope == "global" else None,
            **{name: at(value, step) for name, value in options.items()},
        )
        if values.ndim:
            return mean_of_batch(values, where, axis_name)
        if scope == "global" or axis_name is None:
            return values
        rows = jnp.asarray(s.shape[0] if where is None else jnp.sum(where), values.dtype)
        total, count = jax.lax.psum((rows * values, rows), axis_name)
        return total / jnp.maximum(count, 1)

    return Term(init if features is not None else no_params, term_loss, coupled=True)
