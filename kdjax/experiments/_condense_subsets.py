"""What learned pairs are compared with: real images chosen by some rule, and noise."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from kdjax import _checks
from kdjax.experiments._threads import few_threads


def random_subset(size: int, m: int, *, key: jax.Array) -> np.ndarray:
    """Rows drawn evenly, without repeats.

    Args:
      size: rows there are.
      m: rows to draw, 1 to ``size``.
      key: decides the draw.

    Returns:
      Row numbers [m].

    Raises:
      ValueError: m out of its range.

    Example:
      >>> import jax
      >>> from kdjax.experiments import condense
      >>> len(set(condense.random_subset(100, 10, key=jax.random.key(0)).tolist()))
      10
    """
    size = _checks.count("size", size)
    _checks.count("m", m, high=size)
    return generator(key).choice(size, m, replace=False)


def k_means(features: Any, m: int, *, key: jax.Array, restarts: int = 4) -> np.ndarray:
    """The real rows nearest to the centres of k-means.

    A row that is nearest to two centres stands for the first; the other gets the nearest of those
    left.

    Args:
      features: [N, D] floating; for KRR-ST the target network's outputs.
      m: centres, 1 to N.
      key: decides the starts.
      restarts: starts (k-means++), of which the one with the smallest sum of squares counts.

    Returns:
      Row numbers [m], without repeats, in the order of the centres.

    Raises:
      TypeError: features are not floating point.
      ValueError: m out of its range, or features that aren't finite.

    Example:
      >>> import jax, numpy as np
      >>> from kdjax.experiments import condense
      >>> x = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
      >>> sorted(condense.k_means(x, 2, key=jax.random.key(0)).tolist())
      [1, 4]
    """
    from sklearn.cluster import KMeans  # a second to import

    x = _matrix("features", features)
    _checks.count("m", m, high=len(x))
    _checks.count("restarts", restarts)
    seed = int(generator(key).integers(2**31))
    with few_threads():
        centres = KMeans(m, n_init=restarts, random_state=seed).fit(x).cluster_centers_
    chosen, free = np.empty(m, np.int64), np.ones(len(x), bool)
    for i, centre in enumerate(centres):
        distance = np.where(free, ((x - centre) ** 2).sum(1), np.inf)
        chosen[i] = distance.argmin()
        free[chosen[i]] = False
    return chosen


def herding(features: Any, m: int) -> np.ndarray:
    """Rows whose mean stays nearest to that of all rows, chosen one after another.

    ``x_t = argmin_x || mean - (x + sum_{s<t} x_s) / t ||`` over the rows not chosen yet. The first
    k rows are the choice for k.

    Args:
      features: [N, D] floating.
      m: rows to choose, 1 to N.

    Returns:
      Row numbers [m] in the order of their choice.

    Raises:
      TypeError: features are not floating point.
      ValueError: m out of its range, or features that aren't finite.

    Example:
      >>> import numpy as np
      >>> from kdjax.experiments import condense
      >>> condense.herding(np.array([[0.0], [1.0], [2.0], [9.0]]), 2).tolist()
      [2, 1]

    Reference:
      M. Welling, "Herding Dynamical Weights to Learn", ICML 2009; without repeats, as for the
      exemplars of Rebuffi et al., "iCaRL", CVPR 2017, equation 4.
    """
    x = _matrix("features", features)
    _checks.count("m", m, high=len(x))
    mean, total, free = x.mean(0), np.zeros(x.shape[1]), np.ones(len(x), bool)
    chosen = np.empty(m, np.int64)
    for t in range(m):
        distance = ((mean - (total + x) / (t + 1)) ** 2).sum(1)
        chosen[t] = np.where(free, distance, np.inf).argmin()
        free[chosen[t]] = False
        total += x[chosen[t]]
    return chosen


def noise(images: Any, m: int, *, key: jax.Array) -> np.ndarray:
    """Gaussian noise with the mean and standard deviation of every channel.

    Args:
      images: [N, H, W, C] floating, from which mean and standard deviation are taken.
      m: images to draw, at least 1.
      key: decides the draw.

    Returns:
      Images [m, H, W, C] of the dtype of ``images``; the target network labels them.

    Raises:
      TypeError: images are not floating point.
      ValueError: m below 1, or no images.

    Example:
      >>> import jax, numpy as np
      >>> from kdjax.experiments import condense
      >>> condense.noise(np.ones((5, 8, 8, 1)), 3, key=jax.random.key(0)).shape
      (3, 8, 8, 1)
    """
    x = np.asarray(images)
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(f"images must be a floating-point array, got {_checks.describe(x)}.")
    if x.ndim < 2 or x.size == 0:
        raise ValueError(f"images must be a batch of images, got {_checks.describe(x)}.")
    _checks.count("m", m)
    axes = tuple(range(x.ndim - 1))
    mean, spread = x.mean(axes, dtype=np.float64), x.std(axes, dtype=np.float64)
    draw = generator(key).normal(size=(m, *x.shape[1:]))
    return (mean + spread * draw).astype(x.dtype)


def generator(key: jax.Array) -> np.random.Generator:
    """numpy's generator for a key of JAX."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def _matrix(name: str, x: Any) -> np.ndarray:
    found = np.asarray(x)
    if not np.issubdtype(found.dtype, np.floating):
        raise TypeError(f"{name} must be a floating-point array, got {_checks.describe(x)}.")
    if found.ndim != 2 or found.size == 0:
        raise ValueError(f"{name} must be [N, D] and not empty, got {_checks.describe(x)}.")
    if not np.isfinite(found).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite entries.")
    return found.astype(np.float64)
