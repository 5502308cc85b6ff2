"""Spectra, truths and noise from covariances and data with a known answer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg  # noqa: F401  (its BLAS is JAX's on a CPU, and must be there to be limited)
import threadpoolctl

from kdjax import theory as T
from kdjax.theory import _estimate

P = 120
INDEX = np.arange(1.0, P + 1)
SPECTRA = {
    "power": INDEX**-1.5,
    "flat": np.ones(P),
    "spiked": np.r_[np.full(6, 30.0), np.ones(P - 6)],
    "exponential": 0.93**INDEX,
}
NOISE = 0.1


@pytest.fixture(autouse=True, scope="module")
def _one_blas_thread():
    with threadpoolctl.threadpool_limits(1):
        yield


def sample(name, rows, seed, outputs=None):
    """Features, labels, and the spectrum and truth behind them (in a random basis)."""
    rng = np.random.default_rng([seed, rows])
    lam = SPECTRA[name]
    beta = rng.standard_normal((P, outputs or 1)) / np.sqrt(lam.sum())
    scores = rng.standard_normal((rows, P)) * np.sqrt(lam)
    y = scores @ beta + np.sqrt(NOISE) * rng.standard_normal((rows, outputs or 1))
    basis = np.linalg.qr(rng.standard_normal((P, P)))[0]
    x = scores @ basis.T + 3.0
    return x, (y if outputs else y[:, 0]) - 5.0, lam, beta if outputs else beta[:, 0], basis


def total(lam, beta, noise, ns, ridge):
    risk = T.excess_risk(lam, beta, n=jnp.asarray(ns, float), noise_var=noise, ridge=ridge).total
    return np.asarray(risk) + noise


def plug_in(x, y):
    """What one would do without a theory: sample covariance, fitted coefficients, residuals."""
    x, y = x - x.mean(0), y - y.mean()
    lam, basis = np.linalg.eigh(x.T @ x / len(x))
    fitted = np.linalg.pinv(x, rcond=1e-10) @ y
    left = max(1, len(x) - 1 - P)
    return np.where(lam < 1e-10 * lam[-1], 0, lam), basis.T @ fitted, np.sum(
        (y - x @ fitted) ** 2
    ) / left  # fmt: skip


# Mean and worst relative error of the total risk over four data sets. With N rows the label
# energy alone is known to sqrt(2 / N): 18 % of a single data set at N = 60, 6 % at N = 600.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "mean", "worst"),
    [(60, 0.25, 0.6), (110, 0.2, 0.45), (240, 0.12, 0.3), (1200, 0.06, 0.15)],
)
@pytest.mark.parametrize("name", SPECTRA)
def test_predicts_risks_of_gaussian_data(name, rows, mean, worst):
    ns = np.array([15, 30, 45])
    errors = []
    for seed in range(4):
        x, y, lam, beta, _ = sample(name, rows, seed)
        found = T.estimate(x, y)
        for ridge in (0.0, 0.3 * lam.sum()):
            truth = total(lam, beta, NOISE, ns, ridge)
            predicted = total(found.lam, found.beta, float(found.noise_var), ns, ridge)
            errors.append(predicted / truth - 1)
    errors = np.array(errors)
    assert np.all(np.abs(errors.mean(0)) < mean), errors.mean(0)
    assert np.all(np.abs(errors) < worst), errors


def test_the_plug_in_estimate_fails_where_this_one_does_not():
    # The reason for all the work: with fewer rows than features the plain estimate sees no noise.
    ns = np.array([30, 45])
    plain, ours = [], []
    for seed in range(4):
        x, y, lam, beta, _ = sample("power", 60, seed)
        truth = total(lam, beta, NOISE, ns, 0.0)
        found = T.estimate(x, y)
        plain.append(total(*plug_in(x, y), ns, 0.0) / truth - 1)
        ours.append(total(found.lam, found.beta, float(found.noise_var), ns, 0.0) / truth - 1)
    assert np.all(np.mean(plain, 0) < -0.35)
    assert np.all(np.abs(np.mean(ours, 0)) < 0.25)


@pytest.mark.parametrize("name", SPECTRA)
def test_gain_of_the_optimal_surrogate(name):
    # What a plan is made of: not only the risk itself but how it splits over the spectrum.
    x, y, lam, beta, _ = sample(name, 1500, 0)
    found = T.estimate(x, y)
    ratio = [
        float(T.optimal_surrogate_risk(a, b, 40) / T.excess_risk(a, b, n=40).total)
        for a, b in ((lam, beta), (found.lam, found.beta))
    ]
    np.testing.assert_allclose(ratio[1], ratio[0], atol=0.05)


def test_many_rows_give_the_truth():
    x, y, lam, beta, basis = sample("exponential", 60_000, 0)
    found = T.estimate(x, y)
    np.testing.assert_allclose(found.lam[:20], lam[:20], rtol=0.05)
    np.testing.assert_allclose(found.noise_var, NOISE, rtol=0.03)
    np.testing.assert_allclose((found.lam * found.beta**2).sum(), (lam * beta**2).sum(), rtol=0.05)
    overlap = np.abs(np.sum(np.asarray(found.basis)[:, :3] * basis[:, :3], axis=0))
    assert np.all(overlap > 0.97)
    sign = np.sign(np.sum(np.asarray(found.basis)[:, :3] * basis[:, :3], axis=0))
    big = np.abs(beta[:3]) > 0.1
    np.testing.assert_allclose((found.weights[:3, 0] * sign)[big], beta[:3][big], atol=0.06)
    np.testing.assert_allclose(found.mean, 3.0, atol=0.05)
    np.testing.assert_allclose(found.label_mean, -5.0, atol=0.05)


def test_shapes_and_invariants():
    for rows in (40, 500):
        x, y, *_ = sample("power", rows, 0, outputs=3)
        found = T.estimate(x, y)
        rank = min(P, rows - 1)
        assert found.lam.shape == found.beta.shape == found.mean.shape == (P,)
        assert found.weights.shape == (P, 3)
        assert found.basis.shape == (P, rank)
        assert found.label_mean.shape == (3,)
        assert found.samples == rows
        assert np.all(np.diff(found.lam) <= 0)
        assert np.all(np.asarray(found.lam) > 0)
        np.testing.assert_allclose(jnp.linalg.norm(found.weights, axis=1), found.beta, rtol=1e-4)
        np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(rank), atol=1e-4)
        trace = ((x - x.mean(0)) ** 2).sum() / (rows - 1)
        np.testing.assert_allclose(found.lam.sum(), trace, rtol=0.05)


def test_units_rotations_and_order_do_not_matter():
    x, y, _, _, basis = sample("spiked", 300, 1)
    reference = T.estimate(x, y)
    changed = T.estimate((10.0 * x @ basis)[::-1] + 7.0, 3.0 * y[::-1])
    np.testing.assert_allclose(changed.lam, 100 * reference.lam, rtol=1e-3)
    np.testing.assert_allclose(changed.beta, 0.3 * reference.beta, rtol=1e-2)
    np.testing.assert_allclose(changed.noise_var, 9 * reference.noise_var, rtol=1e-3)


def test_outputs_add_up():
    x, y, *_ = sample("power", 400, 0, outputs=2)
    twice = T.estimate(x, np.concatenate([y, y], axis=1))
    once = T.estimate(x, y)
    np.testing.assert_allclose(twice.noise_var, 2 * once.noise_var, rtol=1e-4)
    np.testing.assert_allclose(twice.beta**2, 2 * once.beta**2, rtol=1e-3)


def test_classes_are_one_hot():
    x, y, *_ = sample("power", 300, 0)
    classes = np.digitize(y, np.quantile(y, [0.3, 0.6]))
    by_class = T.estimate(x, classes)
    one_hot = T.estimate(x, np.eye(3)[classes])
    assert by_class.weights.shape == (P, 3)
    np.testing.assert_array_equal(by_class.beta, one_hot.beta)
    np.testing.assert_allclose(by_class.label_mean, np.bincount(classes) / 300, rtol=1e-5)


def test_features_of_low_rank_keep_it():
    x, y, *_ = sample("power", 400, 0)
    low = np.concatenate([x[:, :20], x[:, :20], np.ones((400, 3))], axis=1)
    found = T.estimate(low, y)
    assert int((found.lam > 0).sum()) == 20
    assert np.all(np.asarray(found.beta[20:]) == 0)
    assert np.all(np.isfinite(found.weights))


def test_without_centring():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 10))
    y = x @ np.ones(10) + 0.1 * rng.standard_normal(500)
    found = T.estimate(x, y, center=False)
    np.testing.assert_array_equal(found.mean, np.zeros(10))
    np.testing.assert_allclose(found.noise_var, 0.01, rtol=0.25)


@pytest.mark.parametrize("ridge", [0.0, 5.0])
def test_predicts_learning_curves_of_features_that_are_not_gaussian(ridge):
    # ReLU features of Gaussian inputs and a nonlinear truth, from half as many rows as needed.
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((1500, 15))
    features = np.maximum(inputs @ rng.standard_normal((15, 150)) / 4, 0)
    labels = np.tanh(inputs[:, :3]) + 0.2 * rng.standard_normal((1500, 3))
    ns = np.array([30, 80, 300])
    found = T.estimate(features[:700], labels[:700])
    curve = T.learning_curve(features, labels, ns=ns, key=jax.random.key(0), ridge=ridge)
    predicted = total(found.lam, found.beta, float(found.noise_var), ns, ridge)
    np.testing.assert_allclose(predicted, curve.mean, rtol=0.15)


@pytest.mark.parametrize("ridge", [0.0, 2.0])
def test_learning_curve_agrees_with_the_theory_of_the_truth(ridge):
    ns, ratios = [40, 60, 400], []
    for seed in range(3):
        x, y, lam, beta, _ = sample("power", 3000, seed)
        curve = T.learning_curve(
            x, y, ns=ns, key=jax.random.key(1), ridge=ridge, repeats=12, test_fraction=0.5
        )
        ratios.append(curve.mean / total(lam, beta, NOISE, ns, ridge))
        assert curve.errors.shape == (12, 3)
        np.testing.assert_allclose(curve.mean, np.mean(curve.errors, 0), rtol=1e-5)
        stderr = np.std(curve.errors, 0, ddof=1) / np.sqrt(12)
        np.testing.assert_allclose(curve.stderr, stderr, rtol=1e-4)
    # 12 fits on 40 rows know their mean to 3 %, and the intercept costs about 5 %.
    np.testing.assert_allclose(np.mean(ratios, 0), 1, atol=0.1)


@pytest.mark.parametrize("ridge", [0.0, 0.7])
@pytest.mark.parametrize("n", [4, 12])
def test_learning_curve_fits_are_dense_solves(n, ridge):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((n, 7)), rng.standard_normal((n, 2))
    weights, bias = _estimate._regress(x, y, ridge, True)
    xc, yc = x - x.mean(0), y - y.mean(0)
    wanted = np.linalg.pinv(xc.T @ xc + ridge * np.eye(7), rcond=1e-10) @ xc.T @ yc
    np.testing.assert_allclose(weights, wanted, atol=1e-8)
    np.testing.assert_allclose(bias, y.mean(0) - x.mean(0) @ wanted, atol=1e-8)
    weights, bias = _estimate._regress(x, y, ridge, False)
    wanted = np.linalg.pinv(x.T @ x + ridge * np.eye(7), rcond=1e-10) @ x.T @ y
    np.testing.assert_allclose(weights, wanted, atol=1e-8)
    np.testing.assert_array_equal(bias, np.zeros(2))


def test_learning_curve_depends_on_the_key_only():
    x, y, *_ = sample("power", 60, 0)
    runs = [T.learning_curve(x, y, ns=[10], key=jax.random.key(k), repeats=3) for k in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0].errors, runs[1].errors)
    assert not np.any(runs[0].errors == runs[2].errors)


def test_diagonalize():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((6, 6))
    sigma, beta = root @ root.T, rng.standard_normal(6)
    with jax.enable_x64(True):
        lam, rotated, basis = T.diagonalize(sigma, beta)
        several = T.diagonalize(sigma, np.stack([beta, -beta], 1))
        assert np.all(np.diff(lam) <= 0)
        np.testing.assert_allclose(basis * lam[None] @ basis.T, sigma, atol=1e-10)
        np.testing.assert_allclose(basis @ rotated, beta, atol=1e-12)
        np.testing.assert_allclose(several.beta, np.stack([rotated, -rotated], 1), atol=1e-12)
        risk = np.asarray(T.excess_risk(lam, rotated, n=3).total)
        turned = np.linalg.qr(rng.standard_normal((6, 6)))[0]
        same = T.diagonalize(turned @ sigma @ turned.T, turned @ beta)
        np.testing.assert_allclose(T.excess_risk(same.lam, same.beta, n=3).total, risk, rtol=1e-10)


def test_diagonalize_a_singular_covariance():
    root = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    plain = T.diagonalize(root @ root.T, np.ones(8))
    cut = T.diagonalize(root @ root.T, np.ones(8), rank_tol=1e-5)
    assert np.all(np.asarray(plain.lam) >= 0)
    assert int((cut.lam > 0).sum()) == 3
    np.testing.assert_array_equal(cut.lam[:3], plain.lam[:3])
    inside = jax.jit(lambda s: T.diagonalize(s, jnp.ones(8), rank_tol=1e-5).lam)(root @ root.T)
    np.testing.assert_allclose(inside, cut.lam, rtol=1e-4, atol=1e-5)


X, Y = np.random.default_rng(0).standard_normal((2, 20, 4))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: T.diagonalize(np.ones((2, 3)), np.ones(2)), ValueError, "Sigma must be a square"),
        (lambda: T.diagonalize(np.eye(2), np.ones(3)), ValueError, "beta must have shape"),
        (lambda: T.diagonalize([[1.0, 0.5], [0.0, 1.0]], np.ones(2)), ValueError, "symmetric"),
        (lambda: T.diagonalize(np.diag([1.0, -1.0]), np.ones(2)), ValueError, "Sigma's eigen"),
        (lambda: T.diagonalize(np.diag([1.0, np.nan]), np.ones(2)), ValueError, "Sigma must be f"),
        (lambda: T.diagonalize(np.eye(2), np.ones(2), rank_tol=-1.0), ValueError, "rank_tol"),
        (lambda: T.estimate(X[0], Y[:, 0]), ValueError, "features must have shape"),
        (lambda: T.estimate(X, Y[:5]), ValueError, "labels must have shape"),
        (lambda: T.estimate(X * np.nan, Y), ValueError, "features must be finite"),
        (lambda: T.estimate(X, Y * np.inf), ValueError, "labels must be finite"),
        (lambda: T.estimate(np.ones((9, 2)), Y[:9]), ValueError, "features must vary"),
        (lambda: T.estimate(X, np.ones(20)), ValueError, "labels must vary"),
        (lambda: T.estimate(X, np.arange(20) - 3), ValueError, "labels must be classes"),
        (lambda: T.estimate(X.astype(complex), Y), TypeError, "features must be a real"),
        (lambda: T.estimate(X, [["a"]] * 20), TypeError, "labels must be a real"),
        (lambda: jax.jit(lambda x: T.estimate(x, Y).lam)(X), TypeError, "features must be known"),
        (lambda: curve(ns=[30]), ValueError, "ns must be"),
        (lambda: curve(ns=[]), ValueError, "ns must hold"),
        (lambda: curve(ns=[2.5]), TypeError, "ns must be"),
        (lambda: curve(ridge=-1.0), ValueError, "ridge must be"),
        (lambda: curve(repeats=1), ValueError, "repeats must be"),
        (lambda: curve(test_fraction=1.0), ValueError, "test_fraction must be"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def curve(**changes):
    return T.learning_curve(X, Y, **{"ns": [5], "key": jax.random.key(0), **changes})


@pytest.mark.parametrize(
    ("features", "labels", "words"),
    [
        (None, np.arange(40) * 10**5, "pass floats for regression"),
        (1e160, None, "features must have a scale"),
        (1e-30, None, "features must have a scale"),
    ],
)
def test_unusual_data_is_refused(features, labels, words):
    x = np.random.default_rng(0).standard_normal((40, 5))
    y = x.sum(1) if labels is None else labels
    with pytest.raises(ValueError, match=words):
        T.estimate(x if features is None else x * features, y)


def test_narrow_integer_labels_do_not_overflow():
    x = np.random.default_rng(0).standard_normal((300, 5))
    y = np.arange(300) % 256
    wide, narrow = T.estimate(x, y), T.estimate(x, y.astype(np.uint8))
    np.testing.assert_array_equal(wide.beta, narrow.beta)
    assert wide.weights.shape == (5, 256)


@pytest.mark.slow
def test_large_singular_covariance():
    """An eigensolver's rounding grows with the size."""
    found = T.diagonalize(np.ones((400, 400), np.float32), np.ones(400), rank_tol=1e-4)
    assert (found.lam > 0).sum() == 1
