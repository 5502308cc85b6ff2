"""From a covariance, or from data, to the quantities that the theory is about.

The spectrum of a sample covariance is wider than the true one unless there are many more samples
than features, and a fit to the labels finds noise where there is signal. Both are undone by the
identities that the theory itself rests on. With N samples and any ridge nu per sample,

    tau(nu) = nu N / (N - df(nu)),    df(nu) = sum_i l_i / (l_i + nu)

where l are sample eigenvalues, ridge regression on the sample acts like a known filter on the
truth: df(nu) is sum(lam / (lam + tau)), and tau y'(XX' + N nu)^-1 y is the energy of the labels
that the filter misses, sum(lam beta^2 tau / (lam + tau)) plus the noise. So the data give two
curves of tau, averages over all samples and features and therefore precise, and the estimate is a
spectrum, an energy per coordinate and a noise that reproduce them. Risks are smooth functions of
the same kind. Work is done once, on the host, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import _checks
from kdjax.theory import _inputs

GRID = 96  # values of the ridge at which data and estimate are compared
RANK_TOL = 1e-12  # of the largest: sample eigenvalues below are rounding


class Diagonalized(NamedTuple):
    """A dense problem in its eigenbasis.

    Attributes:
      lam: eigenvalues, falling, [p].
      beta: the truth in the eigenbasis, [p] or [p, k].
      basis: eigenvectors as columns, [p, p]: ``beta = basis.T @ (the dense truth)``.
    """

    lam: jax.Array
    beta: jax.Array
    basis: jax.Array


class Estimate(NamedTuple):
    """What data say about the spectrum, the truth and the noise.

    Attributes:
      lam: estimated eigenvalues of the feature covariance, falling, [p].
      beta: root of the energy over outputs in each coordinate, ``sqrt(sum_k weights[:, k]^2)``,
        not negative, [p]: what risks need.
      noise_var: noise variance, summed over outputs.
      weights: the truth per output, in the eigenbasis, [p, K]; how it is divided among outputs
        is arbitrary beyond the rank of the data.
      basis: principal directions of the data as columns, [p, r], r = min(p, rank of the data).
      mean: mean of the features, [p]; zeros without centring.
      label_mean: mean of the labels per output, [K]; zeros without centring.
      samples: number N of samples it was estimated from.
    """

    lam: jax.Array
    beta: jax.Array
    noise_var: jax.Array
    weights: jax.Array
    basis: jax.Array
    mean: jax.Array
    label_mean: jax.Array
    samples: int


class LearningCurve(NamedTuple):
    """Held-out error of ridge or minimum-norm fits on random subsets.

    Attributes:
      n: sizes of the subsets, [S].
      mean: mean held-out squared error, summed over outputs, [S].
      stderr: its standard error over repeats (they share rows, so it is a little optimistic), [S].
      errors: of each fit, [repeats, S].
    """

    n: jax.Array
    mean: jax.Array
    stderr: jax.Array
    errors: jax.Array


def diagonalize(Sigma: Any, beta: Any, *, rank_tol: float = 0.0) -> Diagonalized:
    """Eigenvalues of a dense covariance, and the truth in its eigenbasis.

    ``Sigma = basis diag(lam) basis'`` and ``beta_eig = basis' beta``.

    Args:
      Sigma: covariance of the features, symmetric, [p, p].
      beta: the dense truth, [p], or several, [p, k], whose result's transpose is a batch of truths
        for the risks.
      rank_tol: eigenvalues up to ``rank_tol * max(lam)`` become zeros, at least 0. An eigensolver
        leaves about 1e-16 (float32: 1e-7) of the largest where there should be a zero, and the
        theory counts that towards the rank: pass 1e-12 (float32: 1e-6) for a singular covariance.
        By default only negative ones, which are rounding, become zeros.

    Returns:
      Diagonalized, the tuple ``(lam, beta_eig, basis)``.

    Raises:
      ValueError: if ``Sigma`` is not square, not symmetric or has a clearly negative eigenvalue,
        or ``beta`` has another length.

    Example:
      >>> import jax.numpy as jnp
      >>> from kdjax import theory
      >>> lam, beta, basis = theory.diagonalize(jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.ones(2))
      >>> print(lam.round(4), abs(beta).round(4))
      [3. 1.] [1.4142 0.    ]
    """
    Sigma, beta = _inputs.real("Sigma", Sigma), _inputs.real("beta", beta)
    _checks.number("rank_tol", rank_tol, low=0.0)
    if Sigma.ndim != 2 or Sigma.shape[0] != Sigma.shape[1] or Sigma.shape[0] < 1:
        raise ValueError(f"Sigma must be a square matrix, got {_checks.describe(Sigma)}.")
    if beta.ndim not in (1, 2) or beta.shape[0] != Sigma.shape[0]:
        raise ValueError(
            f"beta must have shape ({Sigma.shape[0]},) or ({Sigma.shape[0]}, k) like Sigma, "
            f"got {tuple(beta.shape)}."
        )
    if not _checks.is_traced(Sigma):
        known = np.asarray(Sigma, np.float64)
        if not np.all(np.isfinite(known)):
            raise ValueError("Sigma must be finite, got NaN or infinity.")
        if (gap := np.abs(known - known.T).max()) > 1e-5 * np.abs(known).max():
            raise ValueError(f"Sigma must be symmetric, got entries that differ by {gap:g}.")
    dtype = jnp.result_type(Sigma, beta)
    lam, basis = jnp.linalg.eigh(Sigma.astype(dtype), symmetrize_input=True)
    lam, basis = lam[::-1], basis[:, ::-1]
    # Rounding of the eigensolver grows with the size; what is clearly negative is refused.
    rounding = max(_inputs.NEGATIVE, 8 * lam.size * float(jnp.finfo(dtype).eps)) * lam[0]
    lam = jnp.where((lam < 0) & (lam >= -rounding), 0.0, lam)
    lam = _inputs.spectrum("Sigma's eigenvalues", lam)
    lam = jnp.where(lam <= rank_tol * lam[0], 0.0, lam)
    rotated = jnp.matmul(basis.T, beta.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    return Diagonalized(lam, rotated, basis)


def estimate(features: Any, labels: Any, *, center: bool = True) -> Estimate:
    """Estimates the spectrum, the truth and the noise from features and labels.

    Linear regression of the labels on the features is what the theory predicts then: a linear
    head on a frozen embedding, or random features. Several outputs share everything but the
    truth, and risks add up over them, so that ``beta`` (their root energy) serves for every risk
    of standard training, ridge, masks and gains; for classes, risks are squared errors against
    one-hot labels, summed over classes, and not error rates.

    Caveats. (1) Features are treated as Gaussian with the same covariance: usually accurate for
    squared errors, not guaranteed. Compare with `learning_curve`. (2) Energy in directions far
    below tau(0) can't be told from noise when N is below p: then ``noise_var`` and excess risks
    are only known up to a shift between them (0.3 to 5 times the true noise at N = p / 2 below),
    while their sum is well known. (3) Predictions hold for sizes n up to about N; beyond, they
    extrapolate. (4) What the labels have of nonlinear functions of the features counts as noise.
    (5) Single eigenvalues and directions beyond the leading ones are a plausible choice, not
    measurements.

    On Gaussian data with p = 300 (power laws, flat, spiked, exponential), the predicted total risk
    of a minimum-norm fit of n <= N / 2 rows was within 5 % of the truth on average, with a standard
    deviation over data sets of 3 % at N = 5 p and of 10 to 30 % at N <= p; the same formulas with
    the sample covariance and the fitted truth instead were 35 % and more too low at N < p.

    Args:
      features: [N, p], N at least 3.
      labels: [N] or [N, K] real, or [N] integer classes 0 .. K - 1 (made one-hot).
      center: subtract the means of features and labels, as a fit with an intercept does.

    Returns:
      An Estimate.

    Raises:
      ValueError: if shapes disagree, a value isn't finite, or features or labels are constant.
      TypeError: if an argument is traced or not real.

    Example:
      >>> import numpy as np
      >>> from kdjax import theory
      >>> rng = np.random.default_rng(0)
      >>> x = rng.standard_normal((2000, 50))
      >>> est = theory.estimate(x, x @ np.full(50, 0.1) + 0.5 * rng.standard_normal(2000))
      >>> print(f"{est.noise_var:.2f} {(est.lam * est.beta**2).sum():.2f}")
      0.25 0.52

    Reference:
      The filter identities: Jacot et al., "Kernel Alignment Risk Estimator", NeurIPS 2020; Wei,
      Hu, Steinhardt, "More Than a Toy", ICML 2022. Fitting a spectrum to them: El Karoui,
      "Spectrum estimation for large dimensional covariance matrices", Ann. Stat. 2008. Their
      combination is ours.
    """
    x, y = _data(features, labels)
    rows, p = x.shape
    mean, label_mean = (z.mean(0) if center else np.zeros(z.shape[1]) for z in (x, y))
    x, y = x - mean, y - label_mean
    samples = rows - 1 if center else rows  # degrees of freedom
    if not np.any(np.abs(x) > 1e-12 * (1 + np.abs(mean))):
        raise ValueError("features must vary from row to row, got constant ones.")
    if not np.any(np.abs(y) > 1e-12 * (1 + np.abs(label_mean))):
        raise ValueError("labels must vary from row to row, got constant ones.")
    sample, basis, projected = _principal(x, y, samples)
    energy = (projected**2).sum(1)
    rest = max(0.0, float((y**2).sum() - energy.sum()))
    tau, df, missed = _filtered(sample, energy, rest, samples)
    # A rank below both sides is the rank of the features themselves.
    count = p if len(sample) >= min(samples, p) else len(sample)
    lam = _fit_spectrum(sample, count, samples, tau, df)
    signal, noise = _fit_energy(lam, sample, energy, samples, tau, missed)
    beta = np.sqrt(signal / lam)
    norm = np.sqrt(energy)[:, None]
    outputs = y.shape[1]
    shares = np.full((count, outputs), outputs**-0.5)
    known = min(count, len(sample))
    shares[:known] = np.where(norm > 0, projected / np.where(norm > 0, norm, 1.0), outputs**-0.5)[
        :known
    ]
    weights = beta[:, None] * shares
    lam, beta, weights = (
        np.concatenate([z, np.zeros((p - count, *z.shape[1:]))]) for z in (lam, beta, weights)
    )
    return Estimate(
        lam=jnp.asarray(lam, float),
        beta=jnp.asarray(beta, float),
        noise_var=jnp.asarray(noise, float),
        weights=jnp.asarray(weights, float),
        basis=jnp.asarray(basis, float),
        mean=jnp.asarray(mean, float),
        label_mean=jnp.asarray(label_mean, float),
        samples=rows,
    )


def learning_curve(
    features: Any,
    labels: Any,
    *,
    ns: Any,
    key: jax.Array,
    ridge: float = 0.0,
    repeats: int = 8,
    test_fraction: float = 0.2,
    center: bool = True,
) -> LearningCurve:
    """Measures ridge or minimum-norm fits of n random rows on held-out rows of the data.

    Each repeat draws a fresh split. The ``mean`` is to be compared with the total risk
    ``excess_risk(est.lam, est.beta, n=n, noise_var=est.noise_var, ridge=ridge).total +
    est.noise_var`` of an `estimate`; an intercept costs one of the n samples and adds an n-th.

    Args:
      features: [N, p], N at least 3.
      labels: [N] or [N, K] real, or [N] integer classes (made one-hot).
      ns: sizes of the subsets, integers from 2 up to the rows that aren't held out, [S].
      key: random key of the splits.
      ridge: delta of ``||y - X b||^2 + delta ||b||^2``, at least 0; 0 is the minimum-norm fit.
      repeats: number of splits, at least 2.
      test_fraction: part of the rows that is held out, above 0 and below 1.
      center: fit an intercept, by subtracting the means of the subset.

    Returns:
      A LearningCurve.

    Raises:
      ValueError: if a value is out of its range, or shapes disagree.
      TypeError: if an argument is traced or of the wrong kind.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from kdjax import theory
      >>> x = np.random.default_rng(0).standard_normal((100, 5))
      >>> curve = theory.learning_curve(x, x.sum(1), ns=[10, 20], key=jax.random.key(0))
      >>> print(bool((curve.mean < 1e-6).all()), curve.errors.shape)
      True (8, 2)
    """
    x, y = _data(features, labels)
    _checks.number("ridge", ridge, low=0.0)
    _checks.number("test_fraction", test_fraction, above=0.0, below=1.0)
    _checks.count("repeats", repeats, low=2)
    held_out = max(1, round(test_fraction * len(x)))
    sizes = [_checks.count("ns", n, low=2, high=len(x) - held_out) for n in np.asarray(ns).ravel()]
    if not sizes:
        raise ValueError("ns must hold at least one size, got none.")
    errors = np.empty((repeats, len(sizes)))
    for repeat, split in enumerate(jax.random.split(key, repeats)):
        order = np.asarray(jax.random.permutation(split, len(x)))
        test, rest = order[:held_out], order[held_out:]
        for column, n in enumerate(sizes):
            train = rest[:n]
            weights, bias = _regress(x[train], y[train], float(ridge), center)
            missed = y[test] - x[test] @ weights - bias
            errors[repeat, column] = (missed**2).sum(1).mean()
    stderr = errors.std(0, ddof=1) / np.sqrt(repeats)
    return LearningCurve(
        jnp.asarray(sizes), *(jnp.asarray(z, float) for z in (errors.mean(0), stderr, errors))
    )


def _data(features: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, p] and labels [N, K] as float64."""
    for name, z in (("features", features), ("labels", labels)):
        if _checks.is_traced(z):
            raise TypeError(f"{name} must be known, not traced.")
    x, y = _host("features", features), _host("labels", labels)
    if x.ndim != 2 or x.shape[0] < 3 or x.shape[1] < 1:
        raise ValueError(
            f"features must have shape (N, p) with at least 3 rows, got {_checks.describe(x)}."
        )
    if y.ndim not in (1, 2) or y.shape[0] != x.shape[0] or y.size < 1:
        raise ValueError(
            f"labels must have shape ({x.shape[0]},) or ({x.shape[0]}, K) like features, "
            f"got {tuple(y.shape)}."
        )
    if y.ndim == 1 and np.issubdtype(y.dtype, np.integer):
        if y.min() < 0:
            raise ValueError(
                f"labels must be classes 0 .. K - 1 where they are integers, got {y.min()}."
            )
        classes = int(y.max()) + 1
        if classes > max(len(y), 2):
            raise ValueError(
                f"labels must be classes 0 .. K - 1 where they are integers, got {y.max()} among "
                f"{len(y)} rows; pass floats for regression."
            )
        y = y[:, None] == np.arange(classes)
    x, y = x.astype(np.float64), y.reshape(len(y), -1).astype(np.float64)
    for name, z in (("features", x), ("labels", y)):
        if not np.all(np.isfinite(z)):
            raise ValueError(f"{name} must be finite, got NaN or infinity.")
        largest = np.abs(z).max()
        if largest > 0 and not 1e-15 < largest < 1e15:
            raise ValueError(
                f"{name} must have a scale between 1e-15 and 1e15, got entries up to {largest:g}; "
                "rescale them."
            )
    return x, y


def _host(name: str, z: Any) -> np.ndarray:
    try:
        z = np.asarray(z)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array, got {_checks.describe(z)}.") from error
    if not (jnp.issubdtype(z.dtype, jnp.floating) or jnp.issubdtype(z.dtype, jnp.integer)):
        hint = "; encode classes as integers 0 .. K - 1" if name == "labels" else ""
        raise TypeError(f"{name} must be a real array, got {_checks.describe(z)}{hint}.")
    return z


def _principal(
    x: np.ndarray, y: np.ndarray, samples: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sample eigenvalues [r], directions [p, r], and labels along each principal score [r, K]."""
    rows, p = x.shape
    left, right = rows < p, rows >= p
    values, vectors = np.linalg.eigh((x.T @ x if right else x @ x.T) / samples)
    values, vectors = values[::-1], vectors[:, ::-1]
    kept = values > RANK_TOL * values[0]
    values, vectors = values[kept], vectors[:, kept]
    scale = np.sqrt(samples * values)
    if left:
        return values, x.T @ vectors / scale, vectors.T @ y
    return values, vectors, vectors.T @ (x.T @ y) / scale[:, None]


def _filtered(
    sample: np.ndarray, energy: np.ndarray, rest: float, samples: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tau, degrees of freedom and missed label energy at GRID ridges, each [GRID]."""
    nu = np.exp(np.linspace(np.log(sample[-1]) - 6, np.log(sample[0]) + 3, GRID))
    filtered = nu[:, None] / (sample + nu[:, None])
    slack = samples - len(sample) + filtered.sum(1)
    missed = (filtered @ energy + rest) / slack
    return nu * samples / slack, (1 - filtered).sum(1), missed


def _fit_spectrum(
    sample: np.ndarray, count: int, samples: int, tau: np.ndarray, df: np.ndarray
) -> np.ndarray:
    """``count`` falling eigenvalues with the degrees of freedom that the sample shows."""
    rank = len(sample)
    half = min(rank, max(2, rank // 2))
    index = np.arange(1, count + 1)
    start = np.log(np.r_[sample, np.full(count - rank, sample[-1])])
    if samples < 3 * count and half >= 2:
        # Small sample eigenvalues are far too small; the upper half says where a power law goes.
        first = max(1, half // 4)
        slope = (start[half - 1] - start[first - 1]) / np.log(half / first)
        start = np.where(
            index <= half, start, start[half - 1] + min(slope, 0.0) * np.log(index / half)
        )
    variance = sample**2 * 2 / samples
    learned = sample / (sample + tau[:, None])
    spread = np.sqrt(2 / samples * ((learned * (1 - learned)) ** 2).sum(1)) + 1e-4 * df

    def curves(log_lam: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lam = np.exp(log_lam)
        part = lam / (lam + tau[:, None])
        return np.r_[part.sum(1), lam.sum()], np.r_[part * (1 - part), lam[None]]

    width = np.where(index < rank // 2, 1.0, 1.5)
    wanted, error = np.r_[df, sample.sum()], np.r_[spread, np.sqrt(variance.sum())]
    return np.sort(np.exp(_match(start, width, curves, wanted, error)))[::-1]


def _fit_energy(
    lam: np.ndarray,
    sample: np.ndarray,
    energy: np.ndarray,
    samples: int,
    tau: np.ndarray,
    missed: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Energies [p] and a noise variance that leave out what the filters miss."""
    rank = min(len(sample), len(lam))
    # With more samples than features, all that the weakest filter misses is noise.
    floor = missed[0] * (1.0 if samples > len(lam) else 0.5)
    tiny = 1e-9 * missed[-1]
    found = np.maximum(energy[:rank] - floor, 0) / samples
    # A single projection counts by itself as far as its direction is known: the others mix in by
    # the inverse squares of the gaps between eigenvalues. The rest is the mean of neighbours.
    place, near = np.arange(rank), np.maximum(2, np.arange(rank) // 8)
    summed = np.r_[0.0, np.cumsum(found)]
    low, high = np.maximum(0, place - near), np.minimum(rank, place + near + 1)
    gaps = (sample[:rank, None] - sample) ** 2
    mixed = sample[:rank, None] * sample / (samples * np.where(gaps == 0, np.inf, gaps))
    own = 1 / (1 + mixed.sum(1))
    start = own * found + (1 - own) * (summed[high] - summed[low]) / (high - low)
    tail = np.full(len(lam) - rank, start[-max(1, rank // 4) :].mean())
    start = np.log(np.r_[start, tail, floor] + tiny / len(lam))
    filters = np.c_[1 / (1 + lam / tau[:, None]), np.ones(len(tau))]

    def curves(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = filters * np.exp(logs)
        return parts.sum(1), parts

    error = 0.1 * np.sqrt(2 / samples) * (missed + tiny)
    if samples > len(lam):
        error[0] *= 0.3
    found = np.exp(_match(start, np.full(len(start), 1.5), curves, missed, error))
    return found[:-1], float(found[-1])


def _match(
    start: np.ndarray,
    width: np.ndarray,
    curves: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    wanted: np.ndarray,
    error: np.ndarray,
) -> np.ndarray:
    """The point nearest to ``start`` (in units of ``width``) that gives the ``wanted`` curves.

    Gauss-Newton for the sum of both squared distances, through the smaller of both linear systems,
    with steps that are halved until the sum falls.
    """
    x, prior = start, width**2

    def distance(x: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        value, slope = curves(x)
        gap = (wanted - value) / error
        return float(gap @ gap + ((x - start) ** 2 / prior).sum()), gap, slope / error[:, None]

    best, gap, slope = distance(x)
    for _ in range(100):
        system = (slope * prior) @ slope.T + np.eye(len(wanted))
        pull = np.linalg.solve(system, gap + slope @ (x - start))
        step = start + prior * (slope.T @ pull) - x
        step /= max(1.0, np.abs(step).max() / 2)
        for _ in range(12):
            moved = distance(x + step)
            if moved[0] < best:
                break
            step = step / 2
        else:
            break
        done = best - moved[0] < 1e-6 * best
        x, (best, gap, slope) = x + step, moved
        if done:
            break
    return x


def _regress(
    x: np.ndarray, y: np.ndarray, ridge: float, center: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Weights [p, K] and intercept [K] of ridge or minimum-norm regression."""
    n, p = x.shape
    mean, label_mean = (z.mean(0) if center else np.zeros(z.shape[1]) for z in (x, y))
    x, y = x - mean, y - label_mean
    if ridge == 0:
        weights = np.linalg.lstsq(x, y, rcond=None)[0]
    elif n < p:
        weights = x.T @ np.linalg.solve(x @ x.T + ridge * np.eye(n), y)
    else:
        weights = np.linalg.solve(x.T @ x + ridge * np.eye(p), x.T @ y)
    return weights, label_mean - mean @ weights
