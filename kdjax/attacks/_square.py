"""Square Attack: random search over square windows, by the model's outputs alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks, losses
from kdjax.attacks import _inputs, _square_windows
from kdjax.attacks._geometry import clip01, rows


class Square(NamedTuple):
    """What Square Attack found.

    Attributes:
        x_adv: [B, H, W, C] the adversarial example where one was found, else the image.
        robust: [B] bool, False where the image, the start or a query was misclassified or had
            logits that are not finite.
        queries: [B] int32, how often the model was asked until the image was broken: the start and
            every window count, the look at the image itself only where that is the only one.
        x_best: [B, H, W, C] the iterate of least margin, found by the search (the image itself
            where that is misclassified).
    """

    x_adv: jax.Array
    robust: jax.Array
    queries: jax.Array
    x_best: jax.Array


class SquareDraws(NamedTuple):
    """The random numbers of one run, all U[0, 1). Those for signs mean +1 from 0.5 on.

    Attributes:
        start: [B, W, C] signs of the stripes; for l2 [B, down, across, 1 + C] for each tile of the
            grid whether it is transposed (from 0.5 on), and signs.
        windows: [queries, B, 2 + C] row, column and signs of each window; for l2
            [queries, B, 5 + C] row and column of the window that gains, of the one that is
            emptied, whether the pattern is transposed, and its signs.
    """

    start: jax.Array
    windows: jax.Array


class _Search(NamedTuple):
    query: jax.Array
    best: jax.Array
    margin: jax.Array
    broken: jax.Array
    used: jax.Array


# Iterates before the first window, which is 0.
_IMAGE, _START = -2, -1


def square(
    logits_fn: Callable[[jax.Array], jax.Array],
    x: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str = "linf",
    queries: int = 5000,
    p_init: ArrayLike = 0.8,
    rescale: bool = False,
    key: jax.Array | None = None,
    draws: SquareDraws | None = None,
) -> Square:
    """Square Attack: changes a random square window, and keeps what lowers the margin.

        m(x) = z_y - max_{k != y} z_k;   x <- x' if m(x') < m(x) or m(x') <= 0

    For linf the start is x with each column of each channel moved by +eps or -eps, and a window
    moves each channel by +2 eps or -2 eps within the ball. For l2 the start is a grid of patterns
    with two halves of opposite sign; a query empties one window and adds what it held, and what of
    eps is unused, to another along such a pattern. Windows cover a share ``p_init`` of the image at
    first, halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 queries.

    It needs no gradient, so that masked gradients don't hide anything from it. One forward pass
    per query; broken images stay as they are, and the loop ends when all are broken.

    Args:
        logits_fn: images [B, H, W, C] -> logits [B, classes], of at least 2 classes. It must not
            couple images.
        x: [B, H, W, C] floating-point images in [0, 1]; for l2 of at least 3 by 3 pixels.
        labels: [B] integer class indices.
        eps: radius in units of pixels (of 8/255, say), a finite scalar of at least 0.
        norm: "linf" or "l2".
        queries: windows to try after the start, at least 0. 5000 as in AutoAttack.
        p_init: share of the image that the first windows cover, above 0 and at most 1.
        rescale: halve the share after the same fractions of ``queries`` instead, of which 10,000
            are a full run. AutoAttack does not.
        key: a typed key, or one for each image [B].
        draws: the random numbers in place of a key.

    Returns:
        `Square` with the adversarial images, the mask of robust images, and the queries used.

    Raises:
        TypeError: ``x`` is not floating point, ``labels`` not integers, ``key`` no typed key, or
            ``draws`` no `SquareDraws`.
        ValueError: images outside [0, 1], not [B, H, W, C] or too small for l2, labels that are no
            class, fewer than 2 classes, an unknown norm, a number out of its range, or not exactly
            one of key and draws.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax import attacks
        >>> x, labels = jnp.full((2, 4, 4, 1), 0.5), jnp.array([0, 0])
        >>> def logits_fn(images):  # class 1 where the mean is above a threshold of each image
        ...     above = images.mean((1, 2, 3)) - jnp.array([0.55, 0.7])
        ...     return jnp.stack([-above, above], axis=1)
        >>> key = jax.random.key(0)
        >>> found = attacks.square(logits_fn, x, labels, eps=0.1, queries=50, key=key)
        >>> found.robust
        Array([False,  True], dtype=bool)

    Reference:
        M. Andriushchenko, F. Croce, N. Flammarion, M. Hein, "Square Attack: a Query-Efficient
        Black-Box Adversarial Attack via Random Search", ECCV 2020, algorithms 1 to 3, with the
        details of AutoAttack's code for linf. Windows are drawn for each image, not for the batch.
    """
    x = _checks.floating("x", _inputs.images(x), ndim=4)
    labels = _inputs.class_labels(labels, len(x))
    norm = _inputs.norm(norm)
    if norm == _inputs.L2 and min(x.shape[1:3]) < 3:
        raise ValueError(
            f"x must have at least 3 rows and columns for norm='l2', got {_checks.describe(x)}."
        )
    queries = _checks.count("queries", queries, low=0)
    if not isinstance(rescale, bool):
        raise TypeError(f"rescale must be True or False, got {_checks.describe(rescale)}.")
    eps = _inputs.size("eps", eps, x)
    _inputs.check_radius(eps, norm)
    p_init = jnp.asarray(_checks.number("p_init", p_init, above=0, high=1), x.dtype)
    first_draws, window_draws = _randomness(x, norm, queries, key, draws)

    halvings = _square_windows.halvings(queries, rescale)
    lower, upper = clip01(x - eps), clip01(x + eps)
    if norm == _inputs.LINF:
        start = _square_windows.linf_start(lower, upper, first_draws)
    else:
        start = _square_windows.l2_start(x, eps, first_draws)

    def propose(search: _Search) -> jax.Array:
        drawn = window_draws(search.query)
        p = _square_windows.share(search.query, halvings, p_init)
        size = _square_windows.side(p, *x.shape[1:3], odd=norm == _inputs.L2)
        if norm == _inputs.LINF:
            return _square_windows.linf_window(search.best, lower, upper, drawn, size)
        return _square_windows.l2_window(search.best, x, eps, drawn, size)

    found = _search(logits_fn, x, labels, start, propose, queries)
    return Square(
        x_adv=jnp.where(rows(found.broken, x), found.best, x),
        robust=~found.broken,
        queries=jnp.maximum(found.used, 1),
        x_best=found.best,
    )


def _search(
    logits_fn: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    labels: jax.Array,
    start: jax.Array,
    propose: Callable[[_Search], jax.Array],
    queries: int,
) -> _Search:
    """The image itself, the start and the windows go through one loop: one copy of the model."""

    def step(search: _Search) -> _Search:
        images = propose(search)
        images = jnp.where(search.query == _START, start, images)
        images = jnp.where(search.query == _IMAGE, x, images)
        logits = _inputs.logits(logits_fn, images)
        if logits.shape[-1] < 2:
            raise ValueError(
                "logits_fn must return logits of at least 2 classes, got "
                f"{_checks.describe(logits)}."
            )
        _inputs.in_range(labels, logits.shape[-1])
        margin = -losses.margin(logits, labels).astype(x.dtype)
        correct = _inputs.correct(logits, labels)
        # The start follows the image whatever its margin.
        better = (margin < search.margin) | (margin <= 0) | ~correct | (search.query <= _START)
        taken = better & ~search.broken
        return _Search(
            query=search.query + 1,
            best=jnp.where(rows(taken, x), images, search.best),
            margin=jnp.where(taken, margin, search.margin),
            broken=search.broken | ~correct,
            used=search.used + (~search.broken & (search.query > _IMAGE)).astype(jnp.int32),
        )

    # Derived from x, so that under shard_map all of the state varies as x does.
    zeros = 0 * x[:, 0, 0, 0]
    search = _Search(
        query=jnp.int32(_IMAGE),
        best=x,
        margin=zeros + jnp.inf,
        broken=zeros != 0,
        used=zeros.astype(jnp.int32),
    )
    return jax.lax.while_loop(lambda s: (s.query < queries) & ~s.broken.all(), step, search)


def _randomness(
    x: jax.Array, norm: str, queries: int, key: jax.Array | None, draws: SquareDraws | None
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """The draws of the start, and those of each window: made in the loop, or looked up."""
    images, height, width, channels = x.shape
    start: tuple[int, ...] = (width, channels)
    window = 2 + channels
    if norm == _inputs.L2:
        start, window = (*_square_windows.l2_grid(height, width), 1 + channels), 5 + channels
    if (key is None) == (draws is None):
        raise ValueError("exactly one of key and draws must be given.")
    if key is not None:
        keys = _inputs.keys(key, images)

        def drawn(query: jax.Array) -> jax.Array:
            return _inputs.uniform(_inputs.fold(keys, query - _IMAGE), (window,), x.dtype)

        return _inputs.uniform(_inputs.fold(keys, _START - _IMAGE), start, x.dtype), drawn
    if not isinstance(draws, SquareDraws):
        raise TypeError(f"draws must be SquareDraws, got {_checks.describe(draws)}.")
    first = _checks.floating("draws.start", draws.start).astype(x.dtype)
    others = _checks.floating("draws.windows", draws.windows).astype(x.dtype)
    _checks.shape("draws.start", first, (images, *start))
    _checks.shape("draws.windows", others, (queries, images, window))

    if queries == 0:
        others = jnp.zeros((1, images, window), x.dtype)

    def given(query: jax.Array) -> jax.Array:
        # Before the first window this is some row, which is not used.
        return jnp.take(others, query, axis=0, mode="clip")

    return first, given
