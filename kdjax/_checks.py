"""The one way bad input is answered: a ValueError or TypeError of one sentence.

Every sentence names the argument, what was wanted and what was given. Values inside a trace are
unknown, so ranges are checked for concrete values only; shapes and dtypes are always checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_traced(value: Any) -> bool:
    """True where the value is unknown because a transformation is tracing through it."""
    return isinstance(value, jax.core.Tracer)


def describe(value: Any) -> str:
    """A short description for messages: ``float32 array of shape (8, 10)``, or the value."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        return f"{dtype} array of shape {tuple(shape)}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def floating(name: str, x: Any, *, ndim: int | None = None, min_ndim: int = 0) -> jax.Array:
    """Returns ``x`` as an array of at least float32 (float64 stays); refuses other kinds."""
    x = as_array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point array, got {describe(x)}.")
    _check_ndim(name, x, ndim, min_ndim)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def integer(name: str, x: Any, *, ndim: int | None = None) -> jax.Array:
    """Returns ``x`` as an array; refuses anything but integers."""
    x = as_array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be an integer array, got {describe(x)}.")
    _check_ndim(name, x, ndim, 0)
    return x


def as_array(name: str, x: Any) -> jax.Array:
    """Returns ``x`` as a jax array, or says that it can't be one."""
    if x is None or isinstance(x, (str, bytes, Mapping)):
        raise TypeError(f"{name} must be an array, got {describe(x)}.")
    if isinstance(x, (tuple, list)) and any(getattr(one, "ndim", 0) for one in x):
        raise TypeError(
            f"{name} must be one array, got a {type(x).__name__} of {len(x)} (a tap with * gives "
            "several: name one)."
        )
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array, got {describe(x)}.") from error


def same_shape(name: str, x: Any, other_name: str, other: Any) -> None:
    """Refuses two arrays of different shapes: nothing broadcasts silently."""
    if x.shape != other.shape:
        raise ValueError(
            f"{name} must have shape {tuple(other.shape)} like {other_name}, got {tuple(x.shape)}."
        )


def shape(name: str, x: Any, wanted: tuple[int, ...], why: str = "") -> None:
    """Refuses an array whose shape is not ``wanted``."""
    if tuple(x.shape) != tuple(wanted):
        reason = f" {why}" if why else ""
        raise ValueError(f"{name} must have shape {tuple(wanted)}{reason}, got {tuple(x.shape)}.")


def number(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    scalar: bool = True,
) -> Any:
    """Checks a real hyperparameter and returns it unchanged; tracers pass, NaN never does.

    ``low``/``high`` are inclusive bounds, ``above``/``below`` exclusive ones.
    """
    wanted = f"a {'finite number' if scalar else 'finite number or array'}" + _bounds(
        low, high, above, below
    )
    dtype = getattr(value, "dtype", None)
    numeric = (
        isinstance(value, (int, float))
        or (dtype is not None and (jnp.issubdtype(dtype, jnp.floating)))
        or (dtype is not None and jnp.issubdtype(dtype, jnp.integer))
    )
    if not numeric or isinstance(value, bool):
        raise TypeError(f"{name} must be {wanted}, got {describe(value)}.")
    if scalar and getattr(value, "ndim", 0) != 0:
        raise ValueError(f"{name} must be {wanted}, got {describe(value)}.")
    if is_traced(value):
        return value
    known = np.asarray(value, dtype=np.float64)
    good = np.isfinite(known)
    for bound, compare in (
        (low, np.greater_equal),
        (high, np.less_equal),
        (above, np.greater),
        (below, np.less),
    ):
        if bound is not None:
            good &= compare(known, bound)
    if not np.all(good):
        shown = known.item() if known.ndim == 0 else known[~good].flat[0]
        raise ValueError(f"{name} must be {wanted}, got {shown}.")
    return value


def count(name: str, value: Any, *, low: int = 1, high: int | None = None) -> int:
    """Checks a Python integer that steers the program (a size, a number of steps)."""
    wanted = f"an integer{_bounds(low, high, None, None)}"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be {wanted}, got {describe(value)}.")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {wanted}, got {value}.")
    return int(value)


def mask(name: str, where: Any, wanted: tuple[int, ...]) -> jax.Array | None:
    """Checks a ``where=`` mask: boolean, of exactly the shape of the values it selects."""
    if where is None:
        return None
    where = as_array(name, where)
    if where.dtype != jnp.bool_:
        raise TypeError(f"{name} must be a boolean array, got {describe(where)}.")
    shape(name, where, wanted)
    return where


def choice(name: str, value: Any, options: Iterable[str]) -> Any:
    """Refuses a name that is not one of ``options`` and lists them."""
    options = sorted(options)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}; got {value!r}.")
    return value


def entry(name: str, mapping: Mapping[str, Any], key: str, hint: str = "") -> Any:
    """``mapping[key]``, or a sentence that lists what there is."""
    if key not in mapping:
        there = ", ".join(sorted(map(str, mapping))) or "nothing"
        raise ValueError(
            f"{name} has no entry {key!r}; it has {there}.{' ' + hint if hint else ''}"
        )
    return mapping[key]


def _check_ndim(name: str, x: jax.Array, ndim: int | None, min_ndim: int) -> None:
    if ndim is not None and x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got {describe(x)}.")
    if x.ndim < min_ndim:
        raise ValueError(f"{name} must have at least {min_ndim} dimensions, got {describe(x)}.")


def _bounds(low: float | None, high: float | None, above: float | None, below: float | None) -> str:
    parts = [
        f"{word} {bound:g}"
        for word, bound in (
            ("at least", low),
            ("above", above),
            ("at most", high),
            ("below", below),
        )
        if bound is not None and math.isfinite(bound)
    ]
    return " " + " and ".join(parts) if parts else ""
