"""The attack inside TRADES, which needs no labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks, losses
from kdjax.attacks import _gradient, _inputs
from kdjax.attacks._geometry import clip01, into_box, l2_norm

Tree = Any


def trades_attack(
    logits_fn: Callable[[jax.Array], jax.Array],
    x: ArrayLike,
    *,
    eps: ArrayLike,
    step_size: ArrayLike | None = None,
    steps: int = 10,
    norm: str = "linf",
    natural_logits: ArrayLike | None = None,
    key: jax.Array | None = None,
    noise: ArrayLike | None = None,
    unroll: bool | None = None,
) -> jax.Array:
    """The attack inside TRADES: as far as possible from the model's own natural outputs.

        maximise KL(softmax f(x) || softmax f(x_adv)) from x + 0.001 N(0, I), f(x) held fixed

    It needs no labels. Steps are ``step_size * sign(g)``, and for l2 ``step_size * g / ||g||_2``.

    Args:
        logits_fn: images [B, ...] -> logits [B, C].
        x: [B, ...] floating-point images in [0, 1].
        eps: radius in units of pixels, a finite scalar of at least 0. The paper takes 0.031.
        step_size: a finite scalar of at least 0; None takes ``2 * eps / steps``, the paper's for
            l2 (for linf it takes 0.007).
        steps: gradient steps, at least 0.
        norm: "linf" or "l2".
        natural_logits: [B, C] f(x) where it is at hand; None computes it.
        key: a typed key, or one for each image [B], for the start, which has no gradient at x.
        noise: [B, ...] the start minus x, in place of a key. It is not clipped before the first
            gradient.
        unroll: as in `pgd`.

    Returns:
        [B, ...] images within eps of x, in at least float32.

    Raises:
        TypeError: ``x`` is not floating point, or ``key`` no typed key.
        ValueError: images outside [0, 1], an unknown norm, a negative number, or not exactly one
            of key and noise.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax import attacks, losses
        >>> x, weights = jnp.full((4, 2, 2, 1), 0.5), jnp.arange(8.0).reshape(4, 2)
        >>> logits_fn = lambda images: jnp.sin(images.reshape(4, 4) @ weights)
        >>> x_adv = attacks.trades_attack(logits_fn, x, eps=0.1, key=jax.random.key(0))
        >>> bool((losses.trades_kl(logits_fn(x_adv), logits_fn(x)) > 0.01).all())
        True

    Reference:
        H. Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy",
        ICML 2019, algorithm 1, and its code for l2.
    """

    def stateless(images: jax.Array, state: Tree) -> tuple[jax.Array, Tree]:
        return _inputs.logits(logits_fn, images), state

    x_adv, _ = stateful_trades_attack(
        stateless, x, (), eps=eps, step_size=step_size, steps=steps, norm=norm,
        natural_logits=natural_logits, key=key, noise=noise, unroll=unroll,
    )  # fmt: skip
    return x_adv


def stateful_trades_attack(
    logits_fn: Callable[[jax.Array, Tree], tuple[jax.Array, Tree]],
    x: ArrayLike,
    state: Tree,
    *,
    eps: ArrayLike,
    step_size: ArrayLike | None = None,
    steps: int = 10,
    norm: str = "linf",
    natural_logits: ArrayLike | None = None,
    key: jax.Array | None = None,
    noise: ArrayLike | None = None,
    unroll: bool | None = None,
) -> tuple[jax.Array, Tree]:
    """`trades_attack` for a model whose state moves with every forward pass.

    Args:
        logits_fn: ``(images [B, ...], state) -> (logits [B, C], state)``.
        x: as in `trades_attack`.
        state: any pytree; the first forward pass gets it, which is the natural one unless its
            logits are given.
        eps: as in `trades_attack`.
        step_size: as in `trades_attack`.
        steps: as in `trades_attack`.
        norm: as in `trades_attack`.
        natural_logits: as in `trades_attack`.
        key: as in `trades_attack`.
        noise: as in `trades_attack`.
        unroll: as in `trades_attack`.

    Returns:
        [B, ...] images, and the state after the last forward pass.

    Raises:
        TypeError: as in `trades_attack`.
        ValueError: as in `trades_attack`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax import attacks
        >>> logits_fn = lambda images, calls: (images.reshape(1, 4), calls + 1)
        >>> x = jnp.full((1, 2, 2, 1), 0.5)
        >>> x_adv, calls = attacks.stateful_trades_attack(
        ...     logits_fn, x, 0, eps=0.1, steps=3, key=jax.random.key(0)
        ... )
        >>> int(calls)
        4

    Reference:
        See `trades_attack`.
    """
    x = _inputs.images(x)
    norm = _inputs.norm(norm)
    steps = _checks.count("steps", steps, low=0)
    eps = _inputs.size("eps", eps, x)
    _inputs.check_radius(eps, norm)
    step_size = 2 * eps / max(steps, 1) if step_size is None else step_size
    step_size = _inputs.size("step_size", step_size, x)
    if (key is None) == (noise is None):
        raise ValueError("one of key and noise must be given: at x itself the gradient is zero.")
    if key is not None:
        offset = 0.001 * _inputs.normal(_inputs.keys(key, len(x)), x.shape[1:], x.dtype)
    else:
        offset = _gradient.offset_of(noise, x)
    state = jax.tree.map(jnp.asarray, state)
    if natural_logits is None:
        natural_logits, state = logits_fn(x, state)
    natural = jax.lax.stop_gradient(_checks.floating("natural_logits", natural_logits, ndim=2))

    def divergence(images: jax.Array, state: Tree) -> tuple[jax.Array, Tree]:
        logits, state = logits_fn(images, state)
        return losses.trades_kl(logits, natural).sum(), state

    def step(carry: tuple[jax.Array, Tree], _: None) -> tuple[tuple[jax.Array, Tree], None]:
        images, state = carry
        gradient, state = jax.grad(divergence, has_aux=True)(images, state)
        gradient = _gradient.known(gradient, x)
        if norm == _inputs.LINF:
            return (into_box(images + step_size * jnp.sign(gradient), x, eps), state), None
        # Where there is no gradient, any direction is as good: that of the start.
        direction = jnp.where(l2_norm(gradient) > 0, gradient, offset)
        moved = clip01(images + step_size * direction / _gradient.positive(l2_norm(direction)))
        return (x + _gradient.within(moved - x, eps), state), None

    (images, state), _ = jax.lax.scan(
        step, (x + offset, state), None, length=steps, unroll=_gradient.unrolled(steps, unroll)
    )
    if norm == _inputs.LINF:
        return into_box(images, x, eps), state
    return clip01(x + _gradient.within(images - x, eps) if steps == 0 else images), state
