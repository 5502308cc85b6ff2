"""Arguments of the theory: spectra on the last axis, scalars that may be traced or batched.

Inside the room everything has one rank: vectors are [..., p], scalars [..., 1], so that a batch of
scalars needs no vmap and a spectrum that isn't batched is never copied. Concrete values are
checked here and answered with a sentence; values inside a trace are unknown, and invalid ones turn
into NaN, never into a wrong finite number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import _checks

# Of the largest eigenvalue: what an eigenvalue solver in float32 leaves of an exact zero.
NEGATIVE = 1e-6


class Bounds(NamedTuple):
    """The values that a scalar may take."""

    low: float = -np.inf
    above: float = -np.inf
    high: float = np.inf
    infinite: bool = False  # whether +inf is one of them


ANY = Bounds()
COUNT = Bounds(above=0.0)
NONNEGATIVE = Bounds(low=0.0)
SECOND = Bounds(low=0.0, infinite=True)


def real(name: str, x: Any) -> jax.Array:
    """``x`` as a floating array of at least float32; integers become floats, nothing else does."""
    x = _checks.as_array(name, _without_int64(x))
    if jnp.issubdtype(x.dtype, jnp.integer):
        x = x.astype(jnp.result_type(float))
    return _checks.floating(name, x)


def _without_int64(x: Any) -> Any:
    """Known integers as floats: without x64, jax would wrap what doesn't fit into 32 bits."""
    if not isinstance(x, (list, tuple, int, np.generic, np.ndarray)) or isinstance(x, bool):
        return x
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        known = np.asarray(x)
        if known.dtype.kind in "iuO":
            return known.astype(np.float64)
    return x


def real_scalar(name: str, x: Any, bounds: Bounds = ANY) -> jax.Array:
    """A checked scalar or batch of scalars; Python numbers keep their weak type."""
    if isinstance(x, bool) or (getattr(x, "dtype", None) == np.bool_):
        raise TypeError(f"{name} must be a number, got {_checks.describe(x)}.")
    if isinstance(x, (int, float)):
        try:
            x = float(x)
        except OverflowError:
            x = np.inf
        array = jnp.asarray(x)
    else:
        array = real(name, x)
    _check_bounds(name, x, bounds)
    return _valid_or_nan(array, bounds)


def align(
    vectors: Mapping[str, Any], scalars: Mapping[str, tuple[Any, Bounds]]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Vectors as [..., p] and scalars as [..., 1], of one rank and one dtype.

    Args:
      vectors: name -> [..., p]. ``lam...`` are spectra (not negative, not all zero), ``mask...``
        are boolean, ``...second`` at least 0, perhaps infinite, the others are finite. The first
        one says how long they all are.
      scalars: name -> (value, bounds).

    Returns:
      The vectors and the scalars, in order.
    """
    arrays = {name: _vector(name, x) for name, x in vectors.items()}
    numbers = {name: real_scalar(name, x, bounds) for name, (x, bounds) in scalars.items()}
    first, lead = next(iter(arrays.items()))
    for name, x in arrays.items():
        if x.shape[-1] != lead.shape[-1]:
            raise ValueError(
                f"{name} must have {lead.shape[-1]} entries on its last axis like {first}, "
                f"got shape {tuple(x.shape)}."
            )
    # Arguments that stand in for others by default aren't named twice.
    given = {id(x): name for name, x in reversed(list(vectors.items()))}
    shapes = {name: arrays[name].shape[:-1] for name in reversed(given.values())}
    _check_batch({**shapes, **{name: x.shape for name, x in numbers.items()}})
    rank = max([x.ndim for x in arrays.values()] + [x.ndim + 1 for x in numbers.values()])
    reals = [x for x in arrays.values() if x.dtype != jnp.bool_]
    dtype = jnp.result_type(*reals, *numbers.values())

    def raised(x: jax.Array) -> jax.Array:
        x = x if x.dtype == jnp.bool_ else x.astype(dtype)
        return x.reshape((1,) * (rank - x.ndim) + x.shape)

    return (
        [raised(x) for x in arrays.values()],
        [raised(x[..., None]) for x in numbers.values()],
    )


def numbers(scalars: Mapping[str, tuple[Any, Bounds]]) -> list[jax.Array]:
    """Checked scalars or batches of scalars, broadcast against each other, of one dtype."""
    arrays = {name: real_scalar(name, x, bounds) for name, (x, bounds) in scalars.items()}
    shapes = {name: x.shape for name, x in arrays.items()}
    _check_batch(shapes)
    dtype, shape = jnp.result_type(float, *arrays.values()), jnp.broadcast_shapes(*shapes.values())
    return [jnp.broadcast_to(x.astype(dtype), shape) for x in arrays.values()]


def spectrum(name: str, lam: Any) -> jax.Array:
    """A spectrum [..., p]: finite, not negative (rounding of an eigensolver aside), not all 0."""
    lam = real(name, lam)
    if lam.ndim < 1 or lam.shape[-1] < 1:
        raise ValueError(f"{name} must have at least one eigenvalue on its last axis, got "
                         f"{_checks.describe(lam)}.")  # fmt: skip
    if not _checks.is_traced(lam):
        _check_spectrum(name, np.asarray(lam))
    largest = jnp.max(lam, axis=-1, keepdims=True)
    good = jnp.all(
        jnp.isfinite(lam) & (lam >= -NEGATIVE * largest), axis=-1, keepdims=True
    ) & (largest > 0)  # fmt: skip
    return jnp.where(good, jnp.where(lam < 0, 0.0, lam), jnp.nan)


def _vector(name: str, x: Any) -> jax.Array:
    if name.startswith("lam"):
        return spectrum(name, x)
    if name.startswith("mask"):
        x = _checks.as_array(name, x)
        if x.dtype != jnp.bool_:
            raise TypeError(f"{name} must be a boolean array, got {_checks.describe(x)}.")
    else:
        x = real(name, x)
        if name.endswith(("second", "variance")):
            _check_bounds(name, x, SECOND)
            x = _valid_or_nan(x, SECOND)
        elif not _checks.is_traced(x):
            _check_finite(name, np.asarray(x))
    if x.ndim < 1:
        raise ValueError(f"{name} must have at least 1 dimension, got {_checks.describe(x)}.")
    return x


def _check_spectrum(name: str, lam: np.ndarray) -> None:
    _check_finite(name, lam)
    largest = lam.max(axis=-1, keepdims=True)
    if np.any(negative := lam < -NEGATIVE * np.maximum(largest, 0)):
        index, value = _first(negative, lam)
        raise ValueError(f"{name} must not be negative, got {value:g} at index {index}.")
    if np.any(largest <= 0):
        raise ValueError(f"{name} must have an eigenvalue above 0, got only zeros.")


def _check_finite(name: str, x: np.ndarray) -> None:
    if not np.all(finite := np.isfinite(x)):
        index, value = _first(~finite, x)
        raise ValueError(f"{name} must be finite, got {value} at index {index}.")


def _first(bad: np.ndarray, x: np.ndarray) -> tuple[Any, Any]:
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    return (index[0] if len(index) == 1 else index), x[index]


def _check_bounds(name: str, x: Any, bounds: Bounds) -> None:
    if _checks.is_traced(x):
        return
    known = np.asarray(x, dtype=np.float64)
    bad = ~_inside(known, bounds, np)
    if np.any(bad):
        wanted = [
            f"{word} {bound:g}"
            for word, bound in (
                ("at least", bounds.low), ("above", bounds.above), ("at most", bounds.high),
            )
            if np.isfinite(bound)
        ]  # fmt: skip
        kind = "a number" if bounds.infinite else "a finite number"
        raise ValueError(
            f"{name} must be {' '.join([kind, ' and '.join(wanted)]).strip()}, "
            f"got {known[bad].flat[0]:g}."
        )


def _valid_or_nan(x: jax.Array, bounds: Bounds) -> jax.Array:
    return jnp.where(_inside(x, bounds, jnp), x, jnp.nan)


def _inside(x: Any, bounds: Bounds, xp: Any) -> Any:
    good = (x >= bounds.low) & (x > bounds.above) & (x <= bounds.high)
    if bounds.low == bounds.above == -np.inf:
        good = x <= bounds.high
    return good & (xp.isfinite(x) | (bounds.infinite & (x > 0)))


def _check_batch(shapes: Mapping[str, tuple[int, ...]]) -> None:
    try:
        np.broadcast_shapes(*shapes.values())
    except ValueError as error:
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items() if shape)
        raise ValueError(
            f"{next(iter(shapes))} must have leading axes that broadcast with those of the other "
            f"arguments, got {given}."
        ) from error
