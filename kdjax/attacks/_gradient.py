"""Attacks that follow the gradient of a loss by steps of fixed size: FGSM and PGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.attacks import _inputs
from kdjax.attacks._geometry import clip01, into_box, l2_norm, rows

Tree = Any
LossFn = Callable[[jax.Array], jax.Array]
# On a CPU gradients of convolutions are several times slower inside loops than outside, but
# programs of hundreds of copies take minutes to compile.
_MOST_UNROLLED = 20


def fgsm(loss_fn: LossFn, x: ArrayLike, *, eps: ArrayLike, norm: str = "linf") -> jax.Array:
    """One step of the whole radius along the gradient.

        x_adv = clip(x + eps * sign(g)),   or  x + eps * g / ||g||_2  for norm="l2"

    Args:
        loss_fn: images [B, ...] -> [B], the loss of each image, which the attack maximises.
        x: [B, ...] floating-point images in [0, 1].
        eps: radius in units of pixels, a finite scalar of at least 0.
        norm: "linf" or "l2".

    Returns:
        [B, ...] images within eps of x, in at least float32.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: images outside [0, 1], no images, an unknown norm, or a negative eps.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import attacks
        >>> brighter = lambda images: images.sum((1, 2, 3))
        >>> attacks.fgsm(brighter, jnp.full((1, 1, 1, 2), 0.5), eps=0.25)[0, 0, 0]
        Array([0.75, 0.75], dtype=float32)

    Reference:
        I. Goodfellow, J. Shlens, C. Szegedy, "Explaining and Harnessing Adversarial Examples",
        ICLR 2015, section 4.
    """
    return pgd(loss_fn, x, eps=eps, step_size=eps, steps=1, norm=norm)


def pgd(
    loss_fn: LossFn,
    x: ArrayLike,
    *,
    eps: ArrayLike,
    step_size: ArrayLike,
    steps: int,
    norm: str = "linf",
    key: jax.Array | None = None,
    noise: ArrayLike | None = None,
    best: bool = False,
    unroll: bool | None = None,
) -> jax.Array:
    """Projected gradient ascent on a loss.

        x_0 = clip(x + noise);   x_{k+1} = clip(proj(x_k + step_size * sign(g_k)))

    and with ``norm="l2"`` steps of ``step_size * g / ||g||_2``. Projection onto the ball comes
    first, then clipping to [0, 1]. The gradient is that of the sum over the images, so that it
    does not depend on the batch.

    Inside jit, values are not checked: images that were normalised go through unnoticed there.

    The last iterate is what training uses; for evaluation ``best`` is never weaker, and
    `auto_attack` stronger than both.

    Args:
        loss_fn: images [B, ...] -> [B], the loss of each image, which the attack maximises (for
            example ``lambda x: losses.hard_label_cross_entropy(logits_fn(x), labels)``, or
            ``losses.margin`` for the attack of Carlini and Wagner). Labels may be soft. It must
            not couple images: run batch norm in evaluation mode, or know that you don't.
        x: [B, ...] floating-point images in [0, 1].
        eps: radius in units of pixels (of 8/255, say), a finite scalar of at least 0.
        step_size: length of a step, a finite scalar of at least 0.
        steps: gradient steps, at least 0.
        norm: "linf" or "l2".
        key: a typed key, or one for each image [B], for a random start: uniform in the cube, or
            for l2 a random direction with a uniform radius. None starts at x.
        noise: [B, ...] the start minus x, in place of a key.
        best: return each image's iterate of largest loss, the start included, rather than the last
            one. Costs one more forward pass.
        unroll: whether the loop is unrolled. None: on a CPU, where gradients of convolutions are
            slow in loops, up to 20 steps.

    Returns:
        [B, ...] images within eps of x, in at least float32.

    Raises:
        TypeError: ``x`` is not floating point, or ``key`` no typed key.
        ValueError: images outside [0, 1], no images, an unknown norm, a negative number, both key
            and noise, or a loss that is not one value per image.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax import attacks, losses
        >>> x, labels = jnp.full((4, 2, 2, 1), 0.5), jnp.array([0, 1, 0, 1])
        >>> weights = jnp.arange(8.0).reshape(4, 2)
        >>> def loss_fn(images):
        ...     logits = images.reshape(4, 4) @ weights
        ...     return losses.hard_label_cross_entropy(logits, labels)
        >>> attack = dict(eps=0.1, step_size=0.025, steps=10, key=jax.random.key(0))
        >>> x_adv = attacks.pgd(loss_fn, x, **attack)
        >>> bool((loss_fn(x_adv) > loss_fn(x)).all())
        True

    Reference:
        A. Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR
        2018, section 2.1; the l2 form as in L. Rice, E. Wong, Z. Kolter, "Overfitting in
        Adversarially Robust Deep Learning", ICML 2020 (code).
    """

    _check_callable(loss_fn)

    def stateless(images: jax.Array, state: Tree) -> tuple[jax.Array, Tree]:
        return loss_fn(images), state

    x_adv, _ = stateful_pgd(
        stateless, x, (), eps=eps, step_size=step_size, steps=steps, norm=norm, key=key,
        noise=noise, best=best, unroll=unroll,
    )  # fmt: skip
    return x_adv


def stateful_pgd(
    loss_fn: Callable[[jax.Array, Tree], tuple[jax.Array, Tree]],
    x: ArrayLike,
    state: Tree,
    *,
    eps: ArrayLike,
    step_size: ArrayLike,
    steps: int,
    norm: str = "linf",
    key: jax.Array | None = None,
    noise: ArrayLike | None = None,
    best: bool = False,
    unroll: bool | None = None,
) -> tuple[jax.Array, Tree]:
    """`pgd` for a model whose state moves with every forward pass (batch norm in training mode).

    Args:
        loss_fn: ``(images [B, ...], state) -> ([B], state)``.
        x: as in `pgd`.
        state: any pytree; the first forward pass gets it.
        eps: as in `pgd`.
        step_size: as in `pgd`.
        steps: as in `pgd`.
        norm: as in `pgd`.
        key: as in `pgd`.
        noise: as in `pgd`.
        best: as in `pgd`.
        unroll: as in `pgd`.

    Returns:
        [B, ...] images, and the state after the last forward pass.

    Raises:
        TypeError: as in `pgd`.
        ValueError: as in `pgd`.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import attacks
        >>> count = lambda images, calls: (images.sum((1, 2, 3)), calls + 1)
        >>> x = jnp.full((1, 1, 1, 2), 0.5)
        >>> x_adv, calls = attacks.stateful_pgd(count, x, 0, eps=0.1, step_size=0.1, steps=3)
        >>> int(calls)
        3

    Reference:
        See `pgd`.
    """
    _check_callable(loss_fn)
    x = _inputs.images(x)
    norm = _inputs.norm(norm)
    steps = _checks.count("steps", steps, low=0)
    eps, step_size = _inputs.size("eps", eps, x), _inputs.size("step_size", step_size, x)
    _inputs.check_radius(eps, norm)
    start = _start(x, eps, norm, key, noise)

    def summed(images: jax.Array, state: Tree) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
        found, state = loss_fn(images, state)
        found = _inputs.values(found, x)
        return found.sum(), (found, state)

    def step(carry: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], None]:
        images, state, record = carry
        gradient, (found, state) = jax.grad(summed, has_aux=True)(images, state)
        record = _larger(record, found.astype(x.dtype), images) if best else record
        images = _step(images, known(gradient, x), x, eps, step_size, norm)
        return (images, state, record), None

    record: Any = (
        (jnp.full_like(x, -jnp.inf, shape=x.shape[:1]) + 0 * _each(x), start) if best else ()
    )
    state = jax.tree.map(jnp.asarray, state)
    carry = (start, state, record)
    (images, state, record), _ = jax.lax.scan(
        step, carry, None, length=steps, unroll=unrolled(steps, unroll)
    )
    if not best:
        return images, state
    found, state = loss_fn(images, state)
    return _larger(record, _inputs.values(found, x).astype(x.dtype), images)[1], state


def _check_callable(loss_fn: Any) -> None:
    if not callable(loss_fn):
        raise TypeError(
            "loss_fn must be a function from images [B, ...] to losses [B], got "
            f"{_checks.describe(loss_fn)}."
        )


def _start(
    x: jax.Array, eps: jax.Array, norm: str, key: jax.Array | None, noise: ArrayLike | None
) -> jax.Array:
    """The first iterate, inside the ball and the range."""
    if noise is not None:
        if key is not None:
            raise ValueError("only one of key and noise may be given.")
        offset = offset_of(noise, x)
    elif key is None:
        return x
    elif norm == _inputs.LINF:
        offset = eps * _inputs.uniform(_inputs.keys(key, len(x)), x.shape[1:], x.dtype, -1.0, 1.0)
    else:
        keys = _inputs.keys(key, len(x))
        direction = _inputs.normal(_inputs.fold(keys, 0), x.shape[1:], x.dtype)
        radius = rows(_inputs.uniform(_inputs.fold(keys, 1), (), x.dtype), x)
        offset = eps * radius * direction / positive(l2_norm(direction))
    if norm == _inputs.LINF:
        return into_box(x + offset, x, eps)
    return clip01(x + within(offset, eps))


def offset_of(noise: ArrayLike | None, x: jax.Array) -> jax.Array:
    offset = _checks.floating("noise", noise).astype(x.dtype)
    _checks.same_shape("noise", offset, "x", x)
    return offset


def _step(
    images: jax.Array,
    gradient: jax.Array,
    x: jax.Array,
    eps: jax.Array,
    step_size: jax.Array,
    norm: str,
) -> jax.Array:
    if norm == _inputs.LINF:
        return into_box(images + step_size * jnp.sign(gradient), x, eps)
    moved = images - x + step_size * gradient / (l2_norm(gradient) + 1e-10)
    return clip01(x + within(moved, eps))


def known(gradient: jax.Array, x: jax.Array) -> jax.Array:
    """The gradient in the images' dtype, 0 where it isn't finite: there is no way to go."""
    return jnp.where(jnp.isfinite(gradient), gradient, 0).astype(x.dtype)


def within(d: jax.Array, eps: jax.Array) -> jax.Array:
    """``d``, shortened to a length of ``eps`` where it is longer."""
    length = l2_norm(d)
    return jnp.where(length > eps, d * (eps / (length + 1e-7)), d)


def positive(length: jax.Array) -> jax.Array:
    return jnp.where(length > 0, length, 1)


def _larger(
    record: tuple[jax.Array, jax.Array], found: jax.Array, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each image's largest loss so far and where it was."""
    most, where = record
    better = found > most
    return jnp.where(better, found, most), jnp.where(rows(better, images), images, where)


def _each(x: jax.Array) -> jax.Array:
    """[B] numbers that vary over a mesh axis as ``x`` does."""
    return x.reshape(x.shape[0], -1)[:, 0]


def unrolled(steps: int, unroll: bool | None) -> int:
    """The ``unroll`` of a scan; 1 is a loop."""
    if unroll is None:
        unroll = jax.default_backend() == "cpu" and steps <= _MOST_UNROLLED
    return max(steps, 1) if unroll else 1
