"""What every attack does with its arguments first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import _checks

LINF, L2 = "linf", "l2"


def images(x: ArrayLike) -> jax.Array:
    """[B, ...] in at least float32; refuses what an attack in pixel units can't mean."""
    x = _checks.as_array("x", x)
    if jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(
            f"x must be floating-point images in [0, 1], got {_checks.describe(x)}: scale them "
            "first."
        )
    x = _checks.floating("x", x, min_ndim=2)
    if x.size == 0:
        raise ValueError(f"x must have at least one image, got {_checks.describe(x)}.")
    if not _checks.is_traced(x):
        known = np.asarray(x)  # not a jnp operation, which a surrounding jit would trace
        low, high = float(known.min()), float(known.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"x must be images in [0, 1], got values from {low:.4g} to {high:.4g}: mean and "
                "standard deviation belong inside the model, so that eps is in pixel units."
            )
    return x


def class_labels(labels: ArrayLike, size: int) -> jax.Array:
    """[B] int32 labels."""
    labels = _checks.integer("labels", labels)
    _checks.shape("labels", labels, (size,), "(one per image)")
    return labels.astype(jnp.int32)


def in_range(labels: jax.Array, classes: int) -> None:
    """Refuses known labels that are no class: a one-hot of them is silently all zero."""
    if _checks.is_traced(labels):
        return
    known = np.asarray(labels)
    wrong = known[(known < 0) | (known >= classes)]
    if wrong.size:
        raise ValueError(
            f"labels must be class indices from 0 to {classes - 1}, got {wrong.flat[0]}."
        )


def norm(value: str) -> str:
    """Refuses norms other than the two that there are."""
    return str(_checks.choice("norm", value, (LINF, L2)))


def size(name: str, value: Any, like: jax.Array) -> jax.Array:
    """A radius or a step size: a finite scalar of at least 0, in the images' dtype."""
    return jnp.asarray(_checks.number(name, value, low=0), like.dtype)


def check_radius(eps: Any, norm: str) -> None:
    """Refuses a radius that is larger than the range of images: 8, say, for 8/255."""
    if norm == LINF and not _checks.is_traced(eps) and float(eps) > 1:
        raise ValueError(
            f"eps must be at most 1 for images in [0, 1] and the norm linf, got {float(eps):g}; "
            "did you mean that many 255ths?"
        )


def keys(key: jax.Array, count: int) -> jax.Array:
    """[B] typed keys, one per image: of one key, by the image's place, or as given.

    An image's draws then depend on its own key only, whatever else is in the batch.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"key must be a typed key such as jax.random.key(0), got {_checks.describe(key)}."
        )
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    _checks.shape("key", key, (count,), "(one per image) or be a single key")
    return key


def fold(keys: jax.Array, number: ArrayLike) -> jax.Array:
    """A new key of each."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def uniform(
    keys: jax.Array, shape: tuple[int, ...], dtype: Any, low: float = 0.0, high: float = 1.0
) -> jax.Array:
    """[B, *shape] draws of U[low, high), each row by its own key."""
    return jax.vmap(lambda k: jax.random.uniform(k, shape, dtype, low, high))(keys)


def normal(keys: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """[B, *shape] standard normal draws, each row by its own key."""
    return jax.vmap(lambda k: jax.random.normal(k, shape, dtype))(keys)


def values(found: Any, x: jax.Array) -> jax.Array:
    """What a loss function returned, refused unless it is one number per image."""
    found = jnp.asarray(found)
    if found.shape != x.shape[:1]:
        raise ValueError(
            f"loss_fn must return one value per image, shape {x.shape[:1]}, got shape "
            f"{found.shape}."
        )
    return found


def logits(logits_fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Checked logits [B, C] in at least float32."""
    if not callable(logits_fn):
        raise TypeError(
            "logits_fn must be a function from images [B, ...] to logits [B, C], got "
            f"{_checks.describe(logits_fn)}."
        )
    found = logits_fn(x)
    if getattr(found, "ndim", None) != 2 or found.shape[0] != x.shape[0]:
        raise ValueError(
            f"logits_fn must return logits of shape ({x.shape[0]}, classes), got "
            f"{_checks.describe(found)}."
        )
    return _checks.floating("the result of logits_fn", found)


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """[B] bool: the label has the largest logit. Anything not finite is never correct."""
    return (jnp.argmax(logits, axis=-1) == labels) & jnp.isfinite(logits).all(axis=-1)
