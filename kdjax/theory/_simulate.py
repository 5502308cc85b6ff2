"""Monte Carlo of the trainings that the theory predicts: Gaussian designs, solved exactly.

Regressions are solved by Householder QR of the design itself. Forming the Gram matrix would square
its condition number, and steep spectra then lose all digits in float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl

from kdjax import _checks
from kdjax.theory import _inputs


class Simulation(NamedTuple):
    """Excess risks of independent trainings.

    Attributes:
      mean: over trials, [] or [S].
      stderr: standard error of the mean, [] or [S]; NaN for a single trial.
      risks: of every trial, [trials] or [trials, S]. Surrogates share designs and noise, so that
        differences along S are paired and far more precise than ``stderr`` says.
    """

    mean: jax.Array
    stderr: jax.Array
    risks: jax.Array


class TwoStageSimulation(NamedTuple):
    """Excess risks of a student and of the surrogate that labelled its samples, trial by trial."""

    student: Simulation
    surrogate: Simulation


def simulate_one_stage(
    key: jax.Array,
    lam: Any,
    beta_star: Any,
    beta_s: Any = None,
    *,
    n: int,
    trials: int,
    noise_var: Any = 0.0,
    ridge: Any = 0.0,
    lam_test: Any = None,
    chunk: int | None = None,
) -> Simulation:
    """Trains on fresh Gaussian samples, many times, and measures the exact excess risk.

    Each trial draws n rows of N(0, diag(lam)), labels them ``x . beta_s`` plus noise, fits the
    minimum-norm interpolator (n below the rank), least squares (n at least the rank) or ridge, and
    evaluates ``sum(lam_test (beta_hat - beta_star)^2)``. It should agree with `excess_risk` within
    ``4 stderr + 2 risk / (n (1 - omega))``.

    Args:
      key: random key; the same key gives the same bits.
      lam: eigenvalues of the training covariance, [p], known (not traced).
      beta_star: the truth in the eigenbasis, [p].
      beta_s: the surrogate, [p], or several at once, [S, p], fitted on the same designs with one
        factorisation; by default the truth (strong labels).
      n: number of training samples, at least 1.
      trials: number of designs, at least 1.
      noise_var: variance of the noise on the labels, at least 0.
      ridge: delta of ``||y - X b||^2 + delta ||b||^2``, at least 0, known (not traced).
      lam_test: eigenvalues of the test covariance, [p]; by default ``lam``.
      chunk: trials in flight together. By default one on a CPU, where more are no faster, and as
        many as fit 2^26 numbers elsewhere. Results agree to rounding whatever it is.

    Returns:
      A Simulation, with a trailing axis S if ``beta_s`` has one.

    Raises:
      ValueError: if a value is out of its range, or shapes disagree.
      TypeError: if ``lam`` or ``ridge`` is traced, or ``n``, ``trials`` or ``chunk`` not an int.

    Example:
      >>> import jax
      >>> from kdjax import theory
      >>> lam, beta = theory.power_law(50, 2.0, 1.5)
      >>> run = theory.simulate_one_stage(jax.random.key(0), lam, beta, n=20, trials=200)
      >>> risk = theory.excess_risk(lam, beta, n=20).total
      >>> print(bool(abs(run.mean - risk) < 4 * run.stderr + 0.2 * risk))
      True
    """
    n, trials = _checks.count("n", n), _checks.count("trials", trials)
    ridged, given = _ridged("ridge", ridge), lam
    single = beta_s is None or jnp.ndim(beta_s) == 1
    beta_s = beta_star if beta_s is None else beta_s
    (lam, lam_test, star, surrogates), (noise_var, ridge) = _problem(
        {
            "lam": lam,
            "lam_test": lam if lam_test is None else lam_test,
            "beta_star": beta_star,
            "beta_s": beta_s,
        },
        {"noise_var": noise_var, "ridge": ridge},
    )
    order = _kept(_known("lam", given).astype(lam.dtype))
    chunk = _chunk(chunk, trials, n * len(order))
    with _one_blas_thread():
        risks = _one_stage(
            key, lam[order], star[order], jnp.atleast_2d(surrogates)[:, order], lam_test[order],
            jnp.sqrt(noise_var), jnp.sqrt(ridge),
            n=n, trials=trials, chunk=chunk, ridged=ridged,
        )  # fmt: skip
        jax.block_until_ready(risks)
    # What has no variance in training isn't learned.
    risks = risks + _risk_of_zero(lam_test, star, order)
    return _summary(risks[:, 0] if single else risks)


def simulate_two_stage(
    key: jax.Array,
    lam_s: Any,
    lam_t: Any,
    beta_star: Any,
    *,
    m: int,
    n: int,
    trials: int,
    noise_s: Any = 0.0,
    noise_t: Any = 0.0,
    ridge_s: Any = 0.0,
    ridge_t: Any = 0.0,
    mask: Any = None,
    chunk: int | None = None,
) -> TwoStageSimulation:
    """Trains a surrogate on true labels, then a student on the surrogate's labels, many times.

    Features outside the mask are drawn and enter the labels of the surrogate, which doesn't see
    them. The student sees all features, on fresh samples.

    Args:
      key: random key; the same key gives the same bits.
      lam_s: eigenvalues of the covariance of the surrogate's samples, [p], known (not traced).
      lam_t: eigenvalues for the student's samples and the test law, [p], known (not traced).
      beta_star: the truth in the eigenbasis, [p].
      m: number of samples of the surrogate, at least 1.
      n: number of samples of the student, at least 1.
      trials: number of pairs of trainings, at least 1.
      noise_s: variance of the noise on the surrogate's labels, at least 0.
      noise_t: variance of the noise on the student's labels, at least 0.
      ridge_s: delta of the surrogate, at least 0, known (not traced).
      ridge_t: delta of the student, at least 0, known (not traced).
      mask: bool [p], the features that the surrogate sees, known; all by default.
      chunk: trials in flight together, as for `simulate_one_stage`.

    Returns:
      A TwoStageSimulation: ``student`` and ``surrogate``, both on the test law of ``lam_t``.

    Raises:
      ValueError: if a value is out of its range, shapes disagree, or the mask leaves the surrogate
        no feature.
      TypeError: if what must be known is traced, or a size isn't an int.

    Example:
      >>> import jax
      >>> from kdjax import theory
      >>> lam, beta = theory.power_law(60, 2.0, 1.5)
      >>> runs = theory.simulate_two_stage(
      ...     jax.random.key(0), lam, lam, beta, m=40, n=20, trials=10, mask=lam > 1e-3
      ... )
      >>> print(runs.student.risks.shape)
      (10,)
    """
    m, n = _checks.count("m", m), _checks.count("n", n)
    trials = _checks.count("trials", trials)
    ridged_s, ridged_t = _ridged("ridge_s", ridge_s), _ridged("ridge_t", ridge_t)
    masked = {} if mask is None else {"mask": mask}
    given_s, given_t = lam_s, lam_t
    (lam_s, lam_t, star, *_), numbers = _problem(
        {"lam_s": lam_s, "lam_t": lam_t, "beta_star": beta_star, **masked},
        {"noise_s": noise_s, "noise_t": noise_t, "ridge_s": ridge_s, "ridge_t": ridge_t},
    )
    noise_s, noise_t, ridge_s, ridge_t = numbers
    order_t = _kept(_known("lam_t", given_t).astype(lam_t.dtype))
    order_s = _kept(
        _known("lam_s", given_s).astype(lam_s.dtype), *(_known("mask", x) for x in masked.values())
    )
    if not len(order_s):
        raise ValueError("mask must keep at least one feature of lam_s above 0, got none.")
    chunk = _chunk(chunk, trials, max(m, n) * lam_s.shape[0])
    with _one_blas_thread():
        student, surrogate = _two_stage(
            key, lam_s, lam_t, star,
            jnp.asarray(_first(order_s, star.shape[0])), jnp.asarray(order_t),
            jnp.sqrt(noise_s), jnp.sqrt(noise_t), jnp.sqrt(ridge_s), jnp.sqrt(ridge_t),
            m=m, n=n, visible=len(order_s), trials=trials, chunk=chunk,
            ridged_s=ridged_s, ridged_t=ridged_t,
        )  # fmt: skip
        jax.block_until_ready((student, surrogate))
    return TwoStageSimulation(_summary(student), _summary(surrogate))


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Keeps LAPACK on the thread that calls it.

    Its threads spin while they wait for each other: matrices of this size gain nothing by them,
    and on a machine that does other work too a QR became a hundred times slower.
    """
    if jax.default_backend() == "cpu":
        with threadpoolctl.threadpool_limits(1, "blas"):
            yield
    else:
        yield


@functools.partial(jax.jit, static_argnames=("n", "trials", "chunk", "ridged"))
def _one_stage(
    key: jax.Array,
    lam: jax.Array,
    beta_star: jax.Array,
    surrogates: jax.Array,
    lam_test: jax.Array,
    noise: jax.Array,
    root_ridge: jax.Array,
    *,
    n: int,
    trials: int,
    chunk: int,
    ridged: bool,
) -> jax.Array:
    def trial(key: jax.Array) -> jax.Array:
        x, z = _sample(key, lam, n)
        labels = _matmul(x, surrogates.T) + noise * z[:, None]
        fitted = _fit(x, labels, root_ridge, ridged)
        return jnp.sum(lam_test[:, None] * (fitted - beta_star[:, None]) ** 2, axis=0)

    return jax.lax.map(trial, jax.random.split(key, trials), batch_size=chunk)


@functools.partial(
    jax.jit,
    static_argnames=("m", "n", "visible", "trials", "chunk", "ridged_s", "ridged_t"),
)
def _two_stage(
    key: jax.Array,
    lam_s: jax.Array,
    lam_t: jax.Array,
    beta_star: jax.Array,
    place: jax.Array,
    kept: jax.Array,
    noise_s: jax.Array,
    noise_t: jax.Array,
    root_ridge_s: jax.Array,
    root_ridge_t: jax.Array,
    *,
    m: int,
    n: int,
    visible: int,
    trials: int,
    chunk: int,
    ridged_s: bool,
    ridged_t: bool,
) -> tuple[jax.Array, jax.Array]:
    def trial(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_s, key_t = jax.random.split(key)
        # What the surrogate sees comes first, so that the rest is cut off by a static slice.
        x, z = _sample(key_s, lam_s[place], m)
        labels = (_matmul(x, beta_star[place]) + noise_s * z)[:, None]
        fitted = _fit(x[:, :visible], labels, root_ridge_s, ridged_s)[:, 0]
        surrogate = jnp.zeros_like(beta_star).at[place[:visible]].set(fitted)
        x, z = _sample(key_t, lam_t[kept], n)
        labels = (_matmul(x, surrogate[kept]) + noise_t * z)[:, None]
        fitted = _fit(x, labels, root_ridge_t, ridged_t)[:, 0]
        student = jnp.zeros_like(beta_star).at[kept].set(fitted)
        return tuple(jnp.sum(lam_t * (b - beta_star) ** 2) for b in (student, surrogate))  # type: ignore[return-value]

    return jax.lax.map(trial, jax.random.split(key, trials), batch_size=chunk)


def _sample(key: jax.Array, lam: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """n rows of N(0, diag(lam)), [n, p], and n standard normals for the noise."""
    key_x, key_z = jax.random.split(key)
    x = jax.random.normal(key_x, (n, lam.shape[0]), lam.dtype) * jnp.sqrt(lam)[None, :]
    return x, jax.random.normal(key_z, (n,), lam.dtype)


def _fit(x: jax.Array, labels: jax.Array, root_ridge: jax.Array, ridged: bool) -> jax.Array:
    """Coefficients [p, S] of minimum-norm, least-squares or ridge regression on [n, p], [n, S]."""
    n, p = x.shape
    if n < p:
        tall = jnp.concatenate([x.T, root_ridge * jnp.eye(n, dtype=x.dtype)]) if ridged else x.T
        q, r = _qr(tall)
        # [X, sqrt(delta) I] [X, sqrt(delta) I]' = R'R, so X' (R'R)^-1 y = Q_top R'^-1 y.
        weights = jax.scipy.linalg.solve_triangular(r, labels, trans=1)
        return _matmul(q[:p], weights)
    tall = jnp.concatenate([x, root_ridge * jnp.eye(p, dtype=x.dtype)]) if ridged else x
    q, r = _qr(tall)
    return jax.scipy.linalg.solve_triangular(r, _matmul(q[:n].T, labels))


@jax.custom_batching.sequential_vmap
def _qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Never batched: on XLA:CPU a batched QR of matrices this large inside a loop can wait for
    # itself for ever (seen with jax 0.10.2 on two cores), and accelerators gain little by it.
    q, r = jnp.linalg.qr(x)
    return q, r


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _problem(
    vectors: dict[str, Any], scalars: dict[str, Any]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Checked vectors [p] (several surrogates: [S, p]) and scalars [] of one dtype."""
    for name, x in vectors.items():
        ndim, most = jnp.ndim(x), 2 if name == "beta_s" else 1
        if ndim > most:
            wanted = "1 or 2 dimensions" if most == 2 else "1 dimension"
            raise ValueError(f"{name} must have {wanted}, got {_checks.describe(x)}.")
    for name, x in scalars.items():
        _checks.number(name, x, low=0.0)
    arrays, numbers = _inputs.align(
        vectors, {name: (x, _inputs.NONNEGATIVE) for name, x in scalars.items()}
    )
    flat = [
        x if name == "beta_s" else x.reshape(x.shape[-1])
        for name, x in zip(vectors, arrays, strict=True)
    ]
    return flat, [x.reshape(()) for x in numbers]


def _known(name: str, x: Any) -> np.ndarray:
    if _checks.is_traced(x):
        raise TypeError(f"{name} must be known, not traced: its zeros decide shapes.")
    return np.asarray(x)


def _kept(lam: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Features that are trained on, by falling eigenvalue: QR is stablest in that order."""
    lam = lam.reshape(lam.shape[-1])
    order = np.argsort(-lam, kind="stable")
    seen = lam > 0 if mask is None else (lam > 0) & mask
    return order[seen[order]]


def _first(kept: np.ndarray, p: int) -> np.ndarray:
    """An order of all p features that starts with the kept ones."""
    return np.concatenate([kept, np.setdiff1d(np.arange(p), kept)])


def _ridged(name: str, ridge: Any) -> bool:
    if _checks.is_traced(ridge):
        raise TypeError(f"{name} must be known, not traced: whether it is 0 decides the solver.")
    return bool(_checks.number(name, ridge, low=0.0) > 0)


def _chunk(chunk: int | None, trials: int, size: int) -> int:
    if chunk is not None:
        return min(_checks.count("chunk", chunk), trials)
    if jax.default_backend() == "cpu":
        return 1
    return max(1, min(trials, 2**26 // size))


def _risk_of_zero(lam_test: jax.Array, beta_star: jax.Array, kept: np.ndarray) -> jax.Array:
    missed = jnp.ones(lam_test.shape, bool).at[kept].set(False)
    return jnp.sum(jnp.where(missed, lam_test * beta_star**2, 0.0))


def _summary(risks: jax.Array) -> Simulation:
    trials = risks.shape[0]
    mean = jnp.mean(risks, axis=0, keepdims=True)
    spread = jnp.sum((risks - mean) ** 2, axis=0) / max(trials - 1, 1)
    stderr = jnp.sqrt(spread / trials) if trials > 1 else jnp.full_like(spread, jnp.nan)
    return Simulation(mean[0], stderr, risks)
