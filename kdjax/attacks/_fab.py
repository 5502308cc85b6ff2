"""FAB: the nearest misclassified image, found by steps onto the linearised decision boundary."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.attacks import _geometry, _hyperplane, _inputs

# The published code's guards: of a gradient's norm, and of the lengths of two moves.
_TINY = 1e-12
_SHORT = 1e-8


class Fab(NamedTuple):
    """What FAB found for each image.

    Attributes:
        x_adv: [B, ...] the nearest adversarial example if it lies within eps, else the image.
        robust: [B] bool, classified correctly and no adversarial example found within eps.
        distance: [B] from the image to ``x_closest`` in the norm; inf where nothing was found, 0
            where the image itself is misclassified.
        x_closest: [B, ...] the nearest adversarial example found at any distance, else the image.
    """

    x_adv: jax.Array
    robust: jax.Array
    distance: jax.Array
    x_closest: jax.Array


class _Weights(NamedTuple):
    alpha_max: jax.Array
    eta: jax.Array
    beta: jax.Array


class _Search(NamedTuple):
    """Images are flat [B, d] here."""

    x: jax.Array  # the iterate
    distance: jax.Array  # [B] the best so far
    closest: jax.Array
    broken: jax.Array  # [B] distance of the nearest point whose boundary was not finite


def fab(
    logits_fn: Callable[[jax.Array], jax.Array],
    x: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str = "linf",
    targets: ArrayLike | None = None,
    steps: int = 100,
    restarts: int = 1,
    key: jax.Array | None = None,
    alpha_max: ArrayLike = 0.1,
    eta: ArrayLike = 1.05,
    beta: ArrayLike = 0.9,
) -> Fab:
    """Fast adaptive boundary attack: looks for the nearest misclassified image, at any distance.

    Each step linearises f = z_t - z_y at the iterate v, with d1 and d0 the shortest moves of v and
    of the image x onto the hyperplane {f = 0} inside [0, 1]^d:

        a = min(||d1|| / (||d1|| + ||d0||), alpha_max)
        v <- clip((1 - a) (v + eta d1) + a (x + eta d0), 0, 1)
        if v is misclassified:  keep it if it is the nearest so far,  v <- x + beta (v - x)

    The class t is given (FAB-T), or in each step the one whose linearised boundary is nearest,
    |z_t - z_y| / ||grad(z_t - z_y)|| with the dual norm. A step costs two forward passes and one
    backward pass, or one backward pass per wrong class without ``targets``: the point that was
    checked is not the one from which a successful image goes on, so no pass can be shared.

    ``eps`` decides what counts as found and how far off random starts are, and nothing else. A
    model whose gradients are 0 looks robust to this attack.

    Args:
        logits_fn: images [B, ...] -> logits [B, C], C at least 2.
        x: [B, ...] floating-point images in [0, 1].
        labels: [B] integer class indices.
        eps: radius, a finite scalar of at least 0, in units of pixels.
        norm: "linf" or "l2".
        targets: [B] integer classes to move towards, other than the labels. Default None: the
            class of the nearest linearised boundary.
        steps: iterations of each restart, at least 0.
        restarts: at least 1. The first starts at the images and draws nothing; the others start
            at x + eps/2 u, clipped to [0, 1], u random of norm 1.
        key: typed key, or one per image [B]; needed for more than one restart.
        alpha_max: the largest weight of the move from the image, from 0 to 1.
        eta: overshoot of the moves, above 0.
        beta: how much of the way to a misclassified point is kept, from 0 to 1.

    Returns:
        A ``Fab`` of ``x_adv``, ``robust``, ``distance`` and ``x_closest``. An image at which, or
        within eps of which, the attack met logits that are not finite is not robust. A gradient
        that isn't finite gives no direction: the search stays where it is.

    Raises:
        TypeError: ``x`` is not floating point, ``labels`` or ``targets`` are not integers,
            ``logits_fn`` is not callable, or ``key`` is missing or not a typed key.
        ValueError: images outside [0, 1], a class index out of range, a target that is the label
            of a correctly classified image, a number out of its range, or another norm.

    Example:
        >>> import jax.numpy as jnp
        >>> from kdjax import attacks
        >>> def logits_fn(x):  # class 0 where x1 + x2 > 0.8
        ...     return jnp.stack([x.sum(1) - 0.8, jnp.zeros(len(x))], axis=1)
        >>> found = attacks.fab(logits_fn, jnp.array([[0.5, 0.5]]), jnp.array([0]), eps=0.05)
        >>> round(float(found.distance[0]), 2), bool(found.robust[0])
        (0.1, True)

    Reference:
        F. Croce, M. Hein, "Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary
        Attack", ICML 2020, algorithm 1; its targeted form in "Reliable Evaluation of Adversarial
        Robustness with an Ensemble of Diverse Parameter-free Attacks", ICML 2020.
    """
    images = _inputs.images(x)
    natural = images.reshape(len(images), -1)
    y = _inputs.class_labels(labels, len(images))
    norm, radius = _inputs.norm(norm), _inputs.size("eps", eps, images)
    steps = _checks.count("steps", steps, low=0)
    restarts = _checks.count("restarts", restarts)
    weights = _Weights(
        jnp.asarray(_checks.number("alpha_max", alpha_max, low=0, high=1), images.dtype),
        jnp.asarray(_checks.number("eta", eta, above=0), images.dtype),
        jnp.asarray(_checks.number("beta", beta, low=0, high=1), images.dtype),
    )

    def model(flat: jax.Array) -> jax.Array:
        return _inputs.logits(logits_fn, flat.reshape(images.shape))

    clean = model(natural)
    if clean.shape[1] < 2:
        raise ValueError(
            f"logits_fn must return logits of at least 2 classes, got {_checks.describe(clean)}."
        )
    _inputs.in_range(y, clean.shape[1])
    correct = _inputs.correct(clean, y)
    aims = None if targets is None else _targets(targets, y, correct, clean.shape[1])

    def step(i: jax.Array, at: _Search) -> _Search:
        return _step(model, natural, y, aims, at, i == 0, norm, weights)

    def run(start: jax.Array, found: _Search) -> _Search:
        return jax.lax.fori_loop(0, steps, step, found._replace(x=start))

    distance = jnp.where(correct, jnp.inf, 0).astype(natural.dtype)
    found = _Search(natural, distance, natural, distance)
    if restarts == 1:
        found = run(natural, found)
    elif key is None:
        raise TypeError(f"key must be given for restarts={restarts}: all but one are random.")
    else:
        keys = _inputs.keys(key, len(images))

        def restart(r: jax.Array, found: _Search) -> _Search:
            start = _start(_inputs.fold(keys, r), natural, radius, norm)
            return run(jnp.where(r == 0, natural, start), found)

        found = jax.lax.fori_loop(0, restarts, restart, found)
    closest = found.closest.reshape(images.shape)
    within = found.distance <= radius
    return Fab(
        x_adv=jnp.where(_geometry.rows(within, images), closest, images),
        robust=correct & ~within & (found.broken > radius),
        distance=found.distance,
        x_closest=closest,
    )


def _targets(targets: ArrayLike, y: jax.Array, correct: jax.Array, classes: int) -> jax.Array:
    """[B] int32; with its label as target an image would stay where it is and seem robust."""
    targets = _checks.integer("targets", targets)
    _checks.shape("targets", targets, y.shape, "(one per image)")
    if not _checks.is_traced(targets):
        known = np.asarray(targets)
        wrong = known[(known < 0) | (known >= classes)]
        if wrong.size:
            raise ValueError(
                f"targets must be class indices from 0 to {classes - 1}, got {wrong.flat[0]}."
            )
        if not (_checks.is_traced(y) or _checks.is_traced(correct)):
            same = np.flatnonzero((known == np.asarray(y)) & np.asarray(correct))
            if same.size:
                raise ValueError(
                    f"targets must be classes other than the labels, got the label "
                    f"{known[same[0]]} for image {same[0]}."
                )
    # Inside jit, where values can't be refused, these give no boundary: such images aren't robust.
    useless = (targets < 0) | (targets >= classes) | (targets == y)
    return jnp.where(useless, classes, targets).astype(jnp.int32)


def _start(keys: jax.Array, x: jax.Array, eps: jax.Array, norm: str) -> jax.Array:
    """Half of eps away from the images, before clipping."""
    if norm == _inputs.LINF:
        noise = _inputs.uniform(keys, x.shape[1:], x.dtype, -1.0, 1.0)
    else:
        noise = _inputs.normal(keys, x.shape[1:], x.dtype)
    length = _length(noise, norm)
    return _geometry.clip01(x + eps / 2 * noise / jnp.where(length > 0, length, 1))


def _length(d: jax.Array, norm: str) -> jax.Array:
    """[B, 1]"""
    return _geometry.linf_norm(d) if norm == _inputs.LINF else _geometry.l2_norm(d)


def _step(
    model: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    y: jax.Array,
    targets: jax.Array | None,
    at: _Search,
    first: jax.Array,
    norm: str,
    weights: _Weights,
) -> _Search:
    z, gap, w = _boundary(model, at.x, y, targets, norm)
    known = jnp.isfinite(z).all(axis=-1) & jnp.isfinite(gap)
    finite = known & jnp.isfinite(w).all(axis=-1)
    # Only starts are checked with these logits. Points that were moved back are not, though it
    # would cost nothing: the published attack doesn't, and distances should be its distances.
    at = _keep(at, at.x, x, first & ~_inputs.correct(z, y), norm)
    here = _length(at.x - x, norm)[:, 0]
    at = at._replace(broken=jnp.where(known, at.broken, jnp.minimum(at.broken, here)))

    # Where there is no boundary to be had, the zero hyperplane leaves the point where it is.
    w, gap = jnp.where(finite[:, None], w, 0), jnp.where(finite, gap, 0)
    move = _hyperplane.linf_move if norm == _inputs.LINF else _hyperplane.l2_move
    from_iterate = move(at.x, w, gap)
    from_image = move(x, w, gap + jnp.sum(w * (x - at.x), axis=-1))
    near = jnp.maximum(_length(from_iterate, norm), _SHORT)
    far = jnp.maximum(_length(from_image, norm), _SHORT)
    a = jnp.minimum(near / (near + far), weights.alpha_max)
    ahead = (1 - a) * (at.x + weights.eta * from_iterate) + a * (x + weights.eta * from_image)
    ahead = _geometry.clip01(ahead)

    wrong = ~_inputs.correct(model(ahead), y)
    at = _keep(at, ahead, x, wrong, norm)
    return at._replace(x=jnp.where(wrong[:, None], x + weights.beta * (ahead - x), ahead))


def _keep(at: _Search, v: jax.Array, x: jax.Array, wrong: jax.Array, norm: str) -> _Search:
    """The search with v as its closest where it is misclassified and nearer than any before."""
    distance = _length(v - x, norm)[:, 0]
    nearer = wrong & (distance < at.distance)
    return at._replace(
        distance=jnp.where(nearer, distance, at.distance),
        closest=jnp.where(nearer[:, None], v, at.closest),
    )


def _boundary(
    model: Callable[[jax.Array], jax.Array],
    v: jax.Array,
    y: jax.Array,
    targets: jax.Array | None,
    norm: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits [B, C], and of the class to move to, z_t - z_y [B] and its gradient [B, d]."""
    z, pull = jax.vjp(model, v)
    classes = z.shape[1]

    def towards(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        hot = jax.nn.one_hot(jnp.stack([t, y]), classes, dtype=z.dtype)
        # NaN for a class that there isn't.
        gap = jnp.take_along_axis(z, jnp.stack([t, y], axis=1), axis=1, mode="fill")
        return (gap[:, 0] - gap[:, 1]).astype(v.dtype), pull(hot[0] - hot[1])[0]

    if targets is not None:
        return z, *towards(targets)

    # One class after the other, so that memory does not grow with their number.
    def nearer(
        best: tuple[jax.Array, jax.Array, jax.Array], k: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        gap, w = towards(k + (k >= y).astype(y.dtype))
        dual = _geometry.l2_norm(w)[:, 0] if norm == _inputs.L2 else jnp.sum(jnp.abs(w), axis=-1)
        ratio = jnp.abs(gap) / (dual + _TINY)
        # What is not a number stays, so that the caller sees it.
        take = (ratio < best[0]) | jnp.isnan(ratio)
        chosen = jnp.where(take[:, None], w, best[2])
        return (jnp.where(take, ratio, best[0]), jnp.where(take, gap, best[1]), chosen), None

    none = jnp.zeros_like(v[:, 0])
    start = (none + jnp.inf, none, jnp.zeros_like(v))
    (_, gap, w), _ = jax.lax.scan(nearer, start, jnp.arange(classes - 1, dtype=y.dtype))
    return z, gap, w
