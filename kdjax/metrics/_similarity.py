"""How alike features are: linear CKA, correlations, and what a kernel does to them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks


def linear_cka(
    x: ArrayLike, y: ArrayLike, *, debiased: bool = False, where: ArrayLike | None = None
) -> jax.Array:
    """Centred kernel alignment of two sets of features, with the linear kernel.

        |Xc' Yc|^2 / (|Xc' Xc| |Yc' Yc|),   Frobenius norms, columns centred over the rows

    1 for features that are a rotation and a scaling of each other, whatever their widths. With few
    rows for many channels it is too large (unrelated noise gets about 1 where channels outnumber
    rows by far): ask for the debiased form then.

    Args:
        x: [B, D] floating point, one row per example.
        y: [B, E] floating point, the same examples.
        debiased: whether each of the three products is replaced by its unbiased estimate. The
            result may then be slightly below 0, and NaN where a norm's estimate isn't positive.
        where: [B] bool, False for rows to leave out. None keeps all.

    Returns:
        Scalar in at least float32, from 0 to 1 unless debiased; NaN where either side is constant
        or too few rows are left.

    Raises:
        TypeError: ``x`` or ``y`` is not floating point, or ``where`` is not boolean.
        ValueError: other shapes, or fewer than 2 rows (4 with ``debiased``).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax import metrics
        >>> x = jax.random.normal(jax.random.key(0), (20, 3))
        >>> print(f"{metrics.linear_cka(x, 5 * x[:, ::-1] + 1):.4f}")
        1.0000

    Reference:
        S. Kornblith, M. Norouzi, H. Lee, G. Hinton, "Similarity of Neural Network Representations
        Revisited", ICML 2019, section 3. The unbiased products: L. Song et al., "Feature Selection
        via Dependence Maximization", JMLR 2012, equation 5.
    """
    x, y, mask = _two_features("x", x, "y", y, where, rows=4 if debiased else 2)
    return _linear_cka(x, y, mask, debiased)


@partial(jax.jit, static_argnums=3)
def _linear_cka(x: jax.Array, y: jax.Array, mask: jax.Array | None, debiased: bool) -> jax.Array:
    x, y = _unit(x, mask), _unit(y, mask)
    count = jnp.asarray(x.shape[0], x.dtype) if mask is None else jnp.sum(mask).astype(x.dtype)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        if a.shape[0] < min(a.shape[1], b.shape[1]):
            biased = jnp.sum((a @ a.T) * (b @ b.T))
        else:
            biased = jnp.sum((a.T @ b) ** 2)
        if not debiased:
            return biased
        # The diagonals of the two Gram matrices, which carry the bias. As rows sum to 0, this is
        # all that is left of the general formula.
        lengths_a, lengths_b = jnp.sum(a**2, axis=-1), jnp.sum(b**2, axis=-1)
        n = jnp.where(count >= 4, count, jnp.nan)
        return (
            biased
            - n / (n - 2) * jnp.sum(lengths_a * lengths_b)
            + jnp.sum(lengths_a) * jnp.sum(lengths_b) / ((n - 1) * (n - 2))
        )

    return product(x, y) * jax.lax.rsqrt(product(x, x)) * jax.lax.rsqrt(product(y, y))


def input_output_correlation(
    inputs: ArrayLike, outputs: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """How much a projector passes its inputs on: the mean absolute correlation of its channels.

        mean over i, j of |Pearson(inputs_i, outputs_j)|,   over the rows

    Channels that don't vary (dead units) are left out. The paper plots an "input-output
    correlation" that it doesn't define; this is our reading of it.

    Args:
        inputs: [B, D] floating point: the student's features.
        outputs: [B, E] floating point: the projector's outputs, before the normalisation.
        where: [B] bool, False for rows to leave out. None keeps all.

    Returns:
        Scalar in at least float32 from 0 to 1; NaN where no channel of one side varies.

    Raises:
        TypeError: features are not floating point, or ``where`` is not boolean.
        ValueError: other shapes, or fewer than 2 rows.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import metrics
        >>> x = jnp.array([[1.0], [2.0], [4.0]])
        >>> print(f"{metrics.input_output_correlation(x, -3 * x):.4f}")
        1.0000

    Reference:
        R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
        Distillation", AAAI 2024 (the figure on projector architectures).
    """
    x, y, mask = _two_features("inputs", inputs, "outputs", outputs, where, rows=2)
    return _correlation(x, y, mask)


@jax.jit
def _correlation(x: jax.Array, y: jax.Array, mask: jax.Array | None) -> jax.Array:
    (x, live_x), (y, live_y) = _unit_channels(x, mask), _unit_channels(y, mask)
    # Dead channels are 0 and add nothing to the sum.
    return jnp.sum(jnp.abs(x.T @ y)) / (jnp.sum(live_x) * jnp.sum(live_y))


def log_singular_values(kernel: ArrayLike) -> jax.Array:
    """Natural logarithms of the singular values of a kernel, in descending order.

    Compared with those at the start, index by index, they show a projector's collapse: how many
    values have grown, and how small the others have become. For a trajectory, stack the kernels.

    Args:
        kernel: [..., Cs, Ct] floating point.

    Returns:
        [..., min(Cs, Ct)] in at least float32; -inf for a singular value of 0.

    Raises:
        TypeError: ``kernel`` is not floating point.
        ValueError: it has fewer than 2 dimensions.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import metrics
        >>> metrics.log_singular_values(jnp.diag(jnp.exp(jnp.array([-1.0, 2.0])))).round(4).tolist()
        [2.0, -1.0]

    Reference:
        R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
        Distillation", AAAI 2024 (the figure on singular values by normalisation).
    """
    kernel = _checks.floating("kernel", kernel, min_ndim=2)
    return jnp.log(jnp.linalg.svd(kernel, compute_uv=False))


def _two_features(
    name: str, x: ArrayLike, other_name: str, y: ArrayLike, where: ArrayLike | None, *, rows: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Checked features of the same examples, in one dtype, masked rows zeroed."""
    x, y = (_checks.floating(n, a, ndim=2) for n, a in ((name, x), (other_name, y)))
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{other_name} must have {x.shape[0]} rows like {name}, got {_checks.describe(y)}."
        )
    if x.shape[0] < rows:
        raise ValueError(f"{name} must have at least {rows} rows, got {_checks.describe(x)}.")
    mask = _checks.mask("where", where, x.shape[:1])
    if mask is not None:
        x, y = jnp.where(mask[:, None], x, 0), jnp.where(mask[:, None], y, 0)
    dtype = jnp.promote_types(x.dtype, y.dtype)
    return x.astype(dtype), y.astype(dtype), mask


def _centred(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    if mask is None:
        return x - jnp.mean(x, axis=0, keepdims=True)
    count = jnp.maximum(jnp.sum(mask), 1).astype(x.dtype)
    return jnp.where(mask[:, None], x - jnp.sum(x, axis=0, keepdims=True) / count, 0)


def _unit(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Centred and scaled so that no fourth power overflows or underflows; NaN if x is constant."""
    centred = _centred(x, mask)
    spread = jax.lax.stop_gradient(jnp.max(jnp.abs(centred)))
    # What the rounding of the mean leaves of a constant is no variation.
    constant = spread <= 32 * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(x))
    return centred / jnp.where(constant, jnp.nan, spread)


def _unit_channels(x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Centred channels of length 1, those that don't vary zeroed, and which do vary."""
    centred = _centred(x, mask)
    spread = jax.lax.stop_gradient(jnp.max(jnp.abs(centred), axis=0, keepdims=True))
    size = jnp.max(jnp.abs(x), axis=0, keepdims=True)
    # What the rounding of the mean leaves of a constant is no variation. A NaN is, to be seen.
    dead = spread <= 32 * jnp.finfo(x.dtype).eps * size
    scaled = centred / jnp.where(dead, 1, spread)
    length = jnp.sqrt(jnp.where(dead, 1, jnp.sum(scaled**2, axis=0, keepdims=True)))
    return jnp.where(dead, 0, scaled / length), ~dead[0]
