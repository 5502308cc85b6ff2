"""Calibration against reference numbers, temperature scaling, robust overfitting."""

from __future__ import annotations

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import metrics

GOLDEN = np.load(Path(__file__).parent / "attacks" / "golden_report.npz")
LOGITS, LABELS = GOLDEN["calibration_logits"], GOLDEN["calibration_labels"]
RIGHT = LOGITS.argmax(-1).astype(np.int32)
SPREAD = float(np.mean(LOGITS.max(-1) - LOGITS.min(-1)))


def golden(name):
    return float(GOLDEN[f"calibration_{name}"])


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("x64")
class TestParity:
    def test_calibration(self):
        probs = jax.nn.softmax(jnp.asarray(LOGITS))
        for bins in (10, 15, 20):
            ece = metrics.expected_calibration_error(probs, LABELS, bins=bins)
            mce = metrics.maximum_calibration_error(probs, LABELS, bins=bins)
            np.testing.assert_allclose(ece, golden(f"ece_{bins}"), rtol=1e-12)
            np.testing.assert_allclose(mce, golden(f"mce_{bins}"), rtol=1e-12)
        nll = metrics.negative_log_likelihood(jnp.asarray(LOGITS), LABELS)
        np.testing.assert_allclose(nll, golden("nll"), rtol=1e-12)
        np.testing.assert_allclose(metrics.brier_score(probs, LABELS), golden("brier"), rtol=1e-12)

    def test_bin_edges(self):
        probs, labels = GOLDEN["calibration_edge_probs"], GOLDEN["calibration_edge_labels"]
        found = metrics.expected_calibration_error(jnp.asarray(probs), labels, bins=10)
        np.testing.assert_allclose(found, golden("edge_ece_10"), rtol=1e-12)

    def test_temperature_and_what_it_gives(self):
        temperature = metrics.fit_temperature(jnp.asarray(LOGITS), LABELS)
        np.testing.assert_allclose(temperature, golden("temperature"), atol=1e-6)
        scaled = jnp.asarray(LOGITS) / temperature
        probs = jax.nn.softmax(scaled)
        nll = metrics.negative_log_likelihood(scaled, LABELS)
        np.testing.assert_allclose(nll, golden("nll_after"), rtol=1e-12)
        np.testing.assert_allclose(
            metrics.brier_score(probs, LABELS), golden("brier_after"), rtol=1e-6
        )
        ece = metrics.expected_calibration_error(probs, LABELS)
        np.testing.assert_allclose(ece, golden("ece_15_after"), rtol=1e-6)

    def test_slope_at_the_temperature_is_zero(self):
        temperature = metrics.fit_temperature(jnp.asarray(LOGITS), LABELS)
        slope = jax.grad(lambda t: metrics.negative_log_likelihood(LOGITS / t, LABELS))
        assert abs(slope(temperature)) < 1e-12


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e20])
def test_temperature_scales_with_the_logits(scale):
    found = metrics.fit_temperature(np.float32(LOGITS * scale), LABELS)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found / scale, golden("temperature"), rtol=1e-5)


def test_temperature_of_a_shifted_row_is_the_same():
    found = metrics.fit_temperature(np.float32(LOGITS + np.arange(600)[:, None] % 7), LABELS)
    np.testing.assert_allclose(found, golden("temperature"), rtol=1e-4)


def test_temperature_of_a_calibrated_model_is_one():
    """Labels drawn as the model says: T is 1 but for their sampling."""
    key = jax.random.key(0)
    logits = 2 * jax.random.normal(key, (20_000, 5))
    labels = jax.random.categorical(jax.random.fold_in(key, 1), logits)
    assert abs(float(metrics.fit_temperature(logits, labels)) - 1) < 0.03


def test_temperature_where_no_row_is_wrong():
    with pytest.warns(UserWarning, match="no row is wrong"):
        found = metrics.fit_temperature(np.float32(LOGITS), RIGHT)
    np.testing.assert_allclose(found, SPREAD / 1e3, rtol=1e-5)
    almost = RIGHT.copy()
    almost[0] = (almost[0] + 1) % 10
    assert SPREAD / 1e3 < metrics.fit_temperature(np.float32(LOGITS), almost) < 1
    jax.jit(metrics.fit_temperature)(np.float32(LOGITS), RIGHT)  # values unknown: no warning


def test_temperature_where_logits_tell_nothing():
    with pytest.warns(UserWarning, match="do not speak for the labels"):
        found = metrics.fit_temperature(np.float32(-LOGITS), RIGHT)
    np.testing.assert_allclose(found, SPREAD * 1e3, rtol=1e-5)
    assert metrics.fit_temperature(np.zeros((4, 3), np.float32), np.int32([0, 1, 2, 0])) == 1


def test_temperature_masks_nan_and_dtypes():
    keep = np.arange(600) % 3 != 0
    logits = np.float32(LOGITS)
    wanted = metrics.fit_temperature(logits[keep], LABELS[keep])
    hidden = np.where(keep[:, None], logits, np.nan)
    np.testing.assert_allclose(metrics.fit_temperature(hidden, LABELS, where=keep), wanted, 1e-5)
    np.testing.assert_allclose(
        metrics.fit_temperature(hidden, np.where(keep, LABELS, -1)), wanted, rtol=1e-5
    )
    assert np.isnan(metrics.fit_temperature(hidden, LABELS))
    assert np.isnan(metrics.fit_temperature(logits, np.full(600, -1)))
    low = metrics.fit_temperature(jnp.asarray(LOGITS, jnp.bfloat16), LABELS)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, golden("temperature"), rtol=1e-2)


@pytest.mark.slow
def test_temperature_under_transformations():
    logits = np.float32(LOGITS).reshape(3, 200, 10)
    labels = LABELS.reshape(3, 200)
    found = jax.jit(jax.vmap(metrics.fit_temperature))(logits, labels)
    wanted = [metrics.fit_temperature(z, y) for z, y in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert len({round(float(t), 3) for t in wanted}) == 3
    slope = jax.grad(lambda z: metrics.fit_temperature(z, labels[0]))(logits[0])
    assert not slope.any()
    with pytest.raises(ValueError, match=r"^labels must be class indices.*got 10\.$"):
        metrics.fit_temperature(logits[0], np.full(200, 10))
    with pytest.raises(TypeError, match=r"^logits must be"):
        metrics.fit_temperature(LABELS, LABELS)


def test_robust_overfitting_parity():
    curve, clean = GOLDEN["overfitting_val_robust"], GOLDEN["overfitting_val_clean"]
    with jax.enable_x64(True):
        found = metrics.robust_overfitting(curve, clean=clean)
        for name, wanted in {
            "best": "best", "best_epoch": "best_epoch", "last": "final", "gap": "gap",
            "clean_at_best": "clean_at_best",
        }.items():  # fmt: skip
            np.testing.assert_allclose(
                getattr(found, name), GOLDEN[f"overfitting_{wanted}"], rtol=1e-14
            )
        several = metrics.robust_overfitting(curve, last=5)
        np.testing.assert_allclose(several.last, GOLDEN["overfitting_final_k5_mean"], rtol=1e-14)
        np.testing.assert_allclose(several.gap, several.best - several.last)
        assert several.clean_at_best is None


def test_robust_overfitting_edges():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = metrics.robust_overfitting([float("nan"), 0.5, 0.25])
    assert found.best_epoch == 1
    assert found.gap == 0.25
    rising = metrics.robust_overfitting(jnp.linspace(0.0, 1.0, 5))
    assert rising.gap == 0
    assert rising.best_epoch == 4
    assert np.isnan(metrics.robust_overfitting([float("nan")] * 2).best)
    compiled = jax.jit(lambda c: metrics.robust_overfitting(c, clean=1 - c))
    assert compiled(jnp.array([0.0, 0.75, 0.5])).clean_at_best == 0.25
    for arguments, message in (
        ({"curve": jnp.zeros(0)}, "curve must have at least one epoch"),
        ({"curve": jnp.zeros((2, 2))}, "curve must have 1 dimensions"),
        ({"curve": jnp.zeros(3), "clean": jnp.zeros(2)}, r"clean must have shape \(3,\)"),
        ({"curve": jnp.zeros(3), "last": 4}, "last must be an integer at least 1 and at most 3"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            metrics.robust_overfitting(**arguments)
