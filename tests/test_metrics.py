"""Metrics against NumPy loops and reference numbers; masks, NaN, bad input."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from kdjax import metrics

RANDOM = np.random.default_rng(8)
LOGITS = (2 * RANDOM.standard_normal((30, 6))).astype(np.float32)
PROBS = softmax(LOGITS, -1)
LABELS = RANDOM.integers(0, 6, 30).astype(np.int32)
LABELLED = {
    "accuracy": (metrics.accuracy, LOGITS),
    "top_k_accuracy": (functools.partial(metrics.top_k_accuracy, k=3), LOGITS),
    "negative_log_likelihood": (metrics.negative_log_likelihood, LOGITS),
    "brier_score": (metrics.brier_score, PROBS),
    "expected_calibration_error": (metrics.expected_calibration_error, PROBS),
    "maximum_calibration_error": (metrics.maximum_calibration_error, PROBS),
}


def calibration(probs, labels, bins):
    """Counts, accuracies and confidences of the bins (lo, hi], by loops."""
    found = [[] for _ in range(bins)]
    for row, label in zip(probs, labels, strict=True):
        confidence = row.max()
        place = next(b for b in range(bins) if confidence <= (b + 1) / bins or b == bins - 1)
        found[place].append((row.argmax() == label, confidence))
    gaps = [abs(np.mean([h - c for h, c in rows])) for rows in found if rows]
    sizes = [len(rows) for rows in found if rows]
    return np.dot(sizes, gaps) / len(labels), max(gaps)


def test_values():
    np.testing.assert_allclose(
        metrics.accuracy(LOGITS, LABELS), (LOGITS.argmax(-1) == LABELS).mean()
    )
    order = np.argsort(-LOGITS, -1)
    for k in (1, 3, 6):
        wanted = np.mean([y in row[:k] for y, row in zip(LABELS, order, strict=True)])
        np.testing.assert_allclose(metrics.top_k_accuracy(LOGITS, LABELS, k=k), wanted, rtol=1e-6)
    rows = np.arange(30)
    np.testing.assert_allclose(
        metrics.negative_log_likelihood(LOGITS, LABELS),
        -log_softmax(LOGITS, -1)[rows, LABELS].mean(),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        metrics.brier_score(PROBS, LABELS),
        ((PROBS - np.eye(6)[LABELS]) ** 2).sum(-1).mean(),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        metrics.agreement(LOGITS, LOGITS[::-1]),
        (LOGITS.argmax(-1) == LOGITS[::-1].argmax(-1)).mean(),
        rtol=1e-6,
    )
    assert metrics.agreement(LOGITS, 3 * LOGITS + 1) == 1


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration(bins):
    expected, maximum = calibration(PROBS, LABELS, bins)
    value = metrics.expected_calibration_error(PROBS, LABELS, bins=bins)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    value = metrics.maximum_calibration_error(PROBS, LABELS, bins=bins)
    np.testing.assert_allclose(value, maximum, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_confidence_on_an_edge_belongs_to_the_lower_bin(dtype):
    """Reference numbers of torchmetrics' convention, in either precision."""
    high = [0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0, 0.95, 0.55, 0.51]
    probs = np.array([[p, 1 - p] for p in high], dtype)
    labels = np.int32([0, 0, 1, 0, 0, 0, 0, 1, 1, 0])
    with jax.enable_x64(dtype is np.float64):
        value = metrics.expected_calibration_error(probs, labels, bins=10)
    np.testing.assert_allclose(value, 0.304, rtol=1e-6)


def test_a_calibrated_model_has_no_error():
    probs = np.float32([[0.75, 0.25]] * 4)
    assert metrics.expected_calibration_error(probs, np.int32([0, 0, 0, 1])) < 1e-7
    assert metrics.maximum_calibration_error(probs, np.int32([0, 0, 0, 1])) < 1e-7


def test_ties_go_to_the_lower_class():
    tied = np.zeros((1, 4), np.float32)
    assert metrics.accuracy(tied, np.int32([0])) == 1
    assert metrics.accuracy(tied, np.int32([1])) == 0
    assert metrics.top_k_accuracy(tied, np.int32([1]), k=2) == 1
    assert metrics.top_k_accuracy(tied, np.int32([2]), k=2) == 0


@pytest.mark.parametrize("name", LABELLED)
def test_rows_left_out(name):
    """-1 and where= delete rows, whatever these hold; without rows the result is NaN."""
    metric, inputs = LABELLED[name]
    keep = np.arange(30) % 3 != 0
    wanted = metric(inputs[keep], LABELS[keep])
    hidden = np.where(keep[:, None], inputs, np.nan)
    by_label = metric(hidden, np.where(keep, LABELS, -1))
    by_mask = metric(hidden, np.where(keep, LABELS, 999), where=keep)
    compiled = jax.jit(lambda x, y, m: metric(x, y, where=m))
    np.testing.assert_allclose(by_label, wanted, rtol=1e-5)
    np.testing.assert_allclose(by_mask, wanted, rtol=1e-5)
    np.testing.assert_allclose(compiled(hidden, LABELS, keep), wanted, rtol=1e-5)
    assert np.isnan(compiled(inputs, LABELS, np.zeros(30, bool)))
    assert np.isnan(metric(inputs, np.full(30, -1, np.int32)))
    assert wanted.shape == ()
    assert wanted.dtype == jnp.float32
    folded = metric(inputs.reshape(5, 6, 6), LABELS.reshape(5, 6))
    np.testing.assert_allclose(folded, metric(inputs, LABELS), rtol=1e-5)


@pytest.mark.parametrize("name", LABELLED)
def test_labels_that_are_no_class(name):
    metric, inputs = LABELLED[name]
    for wrong in (6, -2):
        labels = LABELS.copy()
        labels[3] = wrong
        with pytest.raises(ValueError, match=rf"^labels must be class indices.*got {wrong}\.$"):
            metric(inputs, labels)
        assert np.isnan(jax.jit(metric)(inputs, labels))


def test_a_diverged_model_scores_nothing():
    """argmax and comparisons would call a row of NaN right now and then."""
    nan = np.full((6, 6), np.nan, np.float32)
    classes = np.arange(6, dtype=np.int32)
    assert metrics.accuracy(nan, classes) == 0
    assert metrics.top_k_accuracy(nan, classes, k=5) == 0
    assert metrics.agreement(nan, nan) == 0
    assert np.isnan(metrics.negative_log_likelihood(nan, classes))
    assert np.isnan(metrics.expected_calibration_error(nan, classes))
    assert np.isnan(metrics.brier_score(nan, classes))


def test_agreement_mask():
    keep = np.arange(30) < 10
    value = metrics.agreement(LOGITS, LOGITS[::-1], where=keep)
    np.testing.assert_allclose(value, metrics.agreement(LOGITS[:10], LOGITS[::-1][:10]))
    assert np.isnan(metrics.agreement(LOGITS, LOGITS, where=np.zeros(30, bool)))


def test_extreme_logits():
    logits = np.float32([[1e4, -1e4], [-1e4, 1e4]])
    value = metrics.negative_log_likelihood(logits, np.int32([0, 0]))
    np.testing.assert_allclose(value, 1e4)


def test_bad_input():
    with pytest.raises(
        ValueError, match=r"^probs must be probabilities from 0 to 1, got .*softmax"
    ):
        metrics.expected_calibration_error(LOGITS, LABELS)
    with pytest.raises(ValueError, match=r"^probs must be probabilities"):
        metrics.brier_score(LOGITS, LABELS)
    with pytest.raises(TypeError, match=r"^logits must be a floating-point array"):
        metrics.accuracy(LABELS[:, None], LABELS)
    with pytest.raises(TypeError, match=r"^labels must be an integer array"):
        metrics.accuracy(LOGITS, PROBS)
    with pytest.raises(ValueError, match=r"^labels must have shape \(30,\)"):
        metrics.accuracy(LOGITS, LABELS[:-1])
    with pytest.raises(TypeError, match=r"^where must be a boolean array"):
        metrics.accuracy(LOGITS, LABELS, where=LABELS)
    with pytest.raises(ValueError, match=r"^where must have shape \(30,\)"):
        metrics.agreement(LOGITS, LOGITS, where=np.ones(3, bool))
    with pytest.raises(ValueError, match=r"^k must be an integer at least 1 and at most 6, got 7"):
        metrics.top_k_accuracy(LOGITS, LABELS, k=7)
    with pytest.raises(ValueError, match=r"^bins must be an integer at least 1, got 0"):
        metrics.expected_calibration_error(PROBS, LABELS, bins=0)
    with pytest.raises(ValueError, match=r"^student_logits must have shape"):
        metrics.agreement(LOGITS, LOGITS[:, :3])
