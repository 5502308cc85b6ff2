"""What Square Attack proposes: windows whose side is traced, as masks over the whole image.

The side of the windows shrinks from query to query. Slices would compile once per side; coordinate
masks, and patterns computed from coordinates, compile once. Draws are U[0, 1) throughout.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax.attacks._geometry import clip01, l2_norm

# The share of the image that a window covers is halved after each of these queries ...
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# ... in a run of this many. Rescaled schedules stretch or shrink to their own number.
_FULL_RUN = 10_000
# What the published code adds to norms that it divides by.
_TINY = 1e-12


def halvings(queries: int, rescale: bool) -> np.ndarray:
    """[9] the first query of each smaller share, counted from 0."""

    def scaled(query: int) -> int:
        return int(query / max(queries, 1) * _FULL_RUN) if rescale else query

    firsts = []
    for last in _HALVED_AFTER:
        # In the published code's floating-point arithmetic, so not simply by rounding.
        first = max(last * queries // _FULL_RUN - 1, 0) if rescale else last
        while scaled(first) <= last:
            first += 1
        firsts.append(first)
    return np.asarray(firsts, np.int32)


def share(query: ArrayLike, halvings: np.ndarray, p_init: jax.Array) -> jax.Array:
    """The share of the image's area that a window covers at a query."""
    return p_init * jnp.prod(jnp.where(query >= halvings, 0.5, 1.0)).astype(p_init.dtype)


def side(p: jax.Array, height: int, width: int, *, odd: bool) -> jax.Array:
    """int32 side of a square that covers the share ``p``; for l2 odd and at least 3."""
    most = min(height, width)
    found = jnp.round(jnp.sqrt(p * (height * width))).astype(jnp.int32)
    if not odd:
        return jnp.clip(found, 1, most)
    found = jnp.maximum(found, 3)
    return jnp.minimum(found + 1 - found % 2, most - 1 + most % 2)


def linf_start(lower: jax.Array, upper: jax.Array, draws: jax.Array) -> jax.Array:
    """Vertical stripes: every column and channel at one end of its range, by [B, W, C] draws."""
    return jnp.where(draws[:, None] >= 0.5, upper, lower)


def linf_window(
    best: jax.Array, lower: jax.Array, upper: jax.Array, draws: jax.Array, side: jax.Array
) -> jax.Array:
    """One window to an end of the range, by [B, 2 + C] draws: row, column, sign of each channel.

    A step of 2 eps from anywhere in the ball, projected: so the window goes to the end itself.
    """
    inside = _window(draws[:, :2], side, best)
    up = draws[:, None, None, 2:] >= 0.5
    return jnp.where(inside, jnp.where(up, upper, lower), best)


def l2_grid(height: int, width: int) -> tuple[int, int]:
    """How many tiles the start has down and across: of a fifth of the image, centred."""
    tile = max(min(height, width) // 5, 1)
    return height // tile, width // tile


def l2_start(x: jax.Array, eps: jax.Array, draws: jax.Array) -> jax.Array:
    """Tiles of `eta`, scaled to eps, by [B, down, across, 1 + C] draws: transposition, signs."""
    images, height, width, channels = x.shape
    down, across = draws.shape[1:3]
    tile = max(min(height, width) // 5, 1)
    corner = jnp.zeros(2, jnp.int32)
    flipped = jnp.array([False, True])
    patterns = eta(corner, corner, jnp.int32(tile), flipped, (tile, tile), x.dtype)
    chosen = jnp.where(draws[..., :1, None] >= 0.5, patterns[1], patterns[0])
    # [B, down, rows, across, columns, C]
    tiles = chosen.transpose(0, 1, 3, 2, 4)[..., None] * _sign(
        draws[:, :, None, :, None, 1:], x.dtype
    )
    above, left = (height - down * tile) // 2, (width - across * tile) // 2
    delta = jnp.pad(
        tiles.reshape(images, down * tile, across * tile, channels),
        (
            (0, 0),
            (above, height - down * tile - above),
            (left, width - across * tile - left),
            (0, 0),
        ),
    )
    return clip01(x + eps * delta / l2_norm(delta))


def l2_window(
    best: jax.Array, x: jax.Array, eps: jax.Array, draws: jax.Array, side: jax.Array
) -> jax.Array:
    """Moves the norm of one window, and what is unused, into another, where it follows `eta`.

    [B, 5 + C] draws: row and column of the window that gains, of the one that is emptied, whether
    `eta` is transposed, and its sign in each channel.
    """
    height, width, channels = x.shape[1:]
    delta = best - x
    gains, loses = _window(draws[:, :2], side, x), _window(draws[:, 2:4], side, x)
    corner = _corner(draws[:, :2], side, (height, width))
    pattern = eta(*corner, side, draws[:, 4] >= 0.5, (height, width), x.dtype)
    signs = _sign(draws[:, None, None, 5:], x.dtype)
    inside = jnp.where(gains, delta, 0)
    fresh = signs * pattern[..., None] + inside / (_norm(inside) + _TINY)
    unused = jnp.maximum(eps**2 - jnp.sum(delta**2, (1, 2, 3), keepdims=True), 0)
    either = jnp.sum(jnp.where(gains | loses, delta, 0) ** 2, (1, 2), keepdims=True)
    fresh = fresh * (jnp.sqrt(either + unused / channels) / (_norm(fresh) + _TINY))
    moved = jnp.where(gains, fresh, jnp.where(loses, 0, delta))
    length = l2_norm(moved)
    return clip01(x + eps * (moved / jnp.where(length > 0, length, 1)))


def eta(
    rows: jax.Array,
    columns: jax.Array,
    side: jax.Array,
    transposed: jax.Array,
    shape: tuple[int, int],
    dtype: jnp.dtype,
) -> jax.Array:
    """[B, H, W] the pattern of l2 windows at corners (rows, columns) [B], of norm 1, 0 outside.

    An upper half of +, a lower one of -, of the same norm. Each is a stack of centred rectangles
    of weights 1, 1/4, 1/9, ...: on ring r around its centre, in the distance max(|i|, |j|), lie
    all of weight 1/(c+1)^2 with c >= r. Since that sum falls with r, the value at (i, j) is the
    lesser of those at |i| and |j|, and no table over pixels is needed.
    """
    height, width = shape
    tails = jnp.asarray(_infinite_tails(min(shape) // 2 + 2), dtype)
    scales = _scales(side, min(shape), tails)

    def profiles(offset: jax.Array) -> tuple[tuple[jax.Array, jax.Array], ...]:
        within = ((offset >= 0) & (offset < side)).astype(dtype)
        sign = jnp.where(offset < side // 2, scales[0], -scales[1])
        halved, whole = _profiles(offset, side, tails)
        return (halved, within * sign), (whole, within)

    def chosen(yes: tuple[jax.Array, ...], no: tuple[jax.Array, ...]) -> list[jax.Array]:
        return [jnp.where(transposed[:, None], a, b) for a, b in zip(yes, no, strict=True)]

    down_halved, down_whole = profiles(_places(height)[None] - rows[:, None])
    across_halved, across_whole = profiles(_places(width)[None] - columns[:, None])
    down, down_weight = chosen(down_whole, down_halved)
    across, across_weight = chosen(across_halved, across_whole)
    least = jnp.minimum(down[:, :, None], across[:, None, :])
    return least * (down_weight[:, :, None] * across_weight[:, None, :])


def _scales(side: jax.Array, most: int, tails: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What both halves of `eta` are multiplied by; sides are at most ``most``."""
    place = _places(most)
    within = place < side
    halved, whole = _profiles(place, side, tails)
    values = jnp.minimum(halved[:, None], whole[None])
    squares = jnp.sum(jnp.where(within[None], values, 0) ** 2, axis=1)
    upper = jnp.sum(jnp.where(place < side // 2, squares, 0))
    lower = jnp.sum(jnp.where(within & (place >= side // 2), squares, 0))
    # A window of one pixel has no upper half.
    halves = jnp.where(side > 1, 2, 1).astype(tails.dtype)
    return 1 / jnp.sqrt(halves * jnp.where(upper > 0, upper, 1)), 1 / jnp.sqrt(halves * lower)


def _profiles(offset: jax.Array, side: jax.Array, tails: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sum_{c=r}^{side // 2} 1/(c+1)^2 at distance r of each offset into a window from the centre.

    Of the half that it is in, and of the whole window.
    """
    cut = side // 2
    centre = jnp.where(offset < cut, cut // 2, cut + (side - cut) // 2)
    halved, whole = (
        jnp.take(tails, jnp.abs(offset - c), mode="clip") - tails[cut + 1] for c in (centre, cut)
    )
    return halved, whole


def _infinite_tails(count: int) -> np.ndarray:
    """sum_{c >= r} 1/(c+1)^2 for r = 0 .. count - 1: small where its differences are small."""
    return math.pi**2 / 6 - np.concatenate([[0], np.cumsum(1 / np.arange(1.0, count) ** 2)])


def _corner(
    draws: jax.Array, side: jax.Array, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """[B] rows and columns of windows, by [B, 2] draws.

    As in the published code, whose windows never reach the last row and column.
    """
    room = (jnp.asarray(shape, jnp.int32) - side).astype(draws.dtype)
    found = jnp.floor(draws * room[None]).astype(jnp.int32)
    return found[:, 0], found[:, 1]


def _window(draws: jax.Array, side: jax.Array, like: jax.Array) -> jax.Array:
    """[B, H, W, 1] bool, True inside the window."""
    height, width = like.shape[1:3]
    row, column = _corner(draws, side, (height, width))
    down = _between(row, side, height)
    across = _between(column, side, width)
    return (down[:, :, None] & across[:, None, :])[..., None]


def _between(first: jax.Array, side: jax.Array, length: int) -> jax.Array:
    place = _places(length)[None]
    return (place >= first[:, None]) & (place < first[:, None] + side)


def _places(length: int) -> jax.Array:
    return jnp.arange(length, dtype=jnp.int32)


def _sign(draws: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.where(draws >= 0.5, 1, -1).astype(dtype)


def _norm(delta: jax.Array) -> jax.Array:
    """[B, 1, 1, C] of each channel."""
    return jnp.sqrt(jnp.sum(delta**2, (1, 2), keepdims=True))
