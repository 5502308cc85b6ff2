"""Label makers: values by hand and by NumPy, inverses, gradients stopped, bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp, softmax

from kdjax import labels, losses

LOGITS = (3 * np.random.default_rng(1).standard_normal((2, 4, 9))).astype(np.float32)
CLASSES = np.random.default_rng(2).integers(0, 9, (2, 4)).astype(np.int32)


def test_soften():
    for temperature in (0.5, 1.0, 4.0):
        value = labels.soften(LOGITS, temperature=temperature)
        np.testing.assert_allclose(value, softmax(LOGITS / temperature, -1), rtol=2e-6)
    flat = labels.soften(LOGITS, temperature=1e6)
    np.testing.assert_allclose(flat, 1 / 9, rtol=1e-4)
    sharp = labels.soften(LOGITS, temperature=1e-3)
    np.testing.assert_allclose(sharp, np.eye(9)[LOGITS.argmax(-1)], atol=1e-6)


def test_softened_labels_give_the_soft_cross_entropy():
    probs = labels.soften(LOGITS)
    value = losses.hard_label_cross_entropy(LOGITS[::-1], probs)
    wanted = losses.soft_cross_entropy(LOGITS[::-1], LOGITS)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)


def test_smooth():
    value = labels.smooth(CLASSES, 9, smoothing=0.3)
    np.testing.assert_allclose(value, 0.7 * np.eye(9)[CLASSES] + 0.3 / 9, rtol=1e-6)
    np.testing.assert_array_equal(labels.smooth(CLASSES, 9, smoothing=0), np.eye(9)[CLASSES])
    np.testing.assert_allclose(labels.smooth(CLASSES, 9, smoothing=1.0), 1 / 9, rtol=1e-6)
    with_gap = CLASSES.copy()
    with_gap[0, 1] = -1
    assert not np.any(labels.smooth(with_gap, 9, smoothing=0.3)[0, 1])
    np.testing.assert_allclose(
        losses.hard_label_cross_entropy(LOGITS, labels.smooth(with_gap, 9, smoothing=0.3)),
        losses.hard_label_cross_entropy(LOGITS, with_gap, smoothing=0.3),
        rtol=1e-5,
    )


def test_mix():
    a, b = labels.soften(LOGITS), labels.soften(LOGITS[::-1])
    np.testing.assert_allclose(labels.mix(a, b, weight=1.0), a)
    np.testing.assert_allclose(labels.mix(a, b, weight=0), b)
    each = np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 4)
    value = labels.mix(a, b, weight=each)
    np.testing.assert_allclose(value.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(value[1, 2], labels.mix(a, b, weight=each[1, 2])[1, 2], rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_top_k(k):
    for temperature in (1.0, 4.0):
        values, indices, rest = labels.top_k(LOGITS, k, temperature=temperature)
        log_probs = log_softmax(LOGITS.astype(np.float64) / temperature, -1)
        order = np.argsort(-log_probs, axis=-1)
        np.testing.assert_array_equal(indices, order[..., :k])
        assert indices.dtype == jnp.int32
        assert values.dtype == rest.dtype == jnp.float32
        wanted = np.take_along_axis(log_probs, order, -1)
        np.testing.assert_allclose(values, wanted[..., :k], rtol=1e-5, atol=1e-6)
        if k == 9:
            assert np.all(rest == -jnp.inf)
        else:
            np.testing.assert_allclose(rest, logsumexp(wanted[..., k:], axis=-1), rtol=1e-5)


def test_a_tiny_rest_is_not_rounded_away():
    """1 - p would be 0 in float32."""
    rest = labels.top_k(jnp.array([0.0, -60.0, -61.0]), 1).rest
    np.testing.assert_allclose(rest, np.logaddexp(-60.0, -61.0), rtol=1e-6)


def test_from_top_k_is_a_distribution():
    for k in (1, 4, 8):
        kept = labels.top_k(LOGITS, k)
        dense = labels.from_top_k(*kept, num_classes=9)
        np.testing.assert_allclose(np.exp(dense).sum(-1), 1, rtol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(dense, kept.indices, -1), kept.values)
        others = np.sort(dense, axis=-1)[..., : 9 - k]
        np.testing.assert_allclose(others, others[..., :1].repeat(9 - k, -1))
        again = labels.top_k(dense, k)
        np.testing.assert_allclose(again.rest, kept.rest, rtol=1e-4, atol=1e-6)


def test_all_of_the_top_k_is_the_teacher():
    dense = labels.from_top_k(*labels.top_k(LOGITS, 9, temperature=2.0), num_classes=9)
    np.testing.assert_allclose(dense, log_softmax(LOGITS / 2, -1), rtol=1e-5, atol=1e-6)
    student = LOGITS[::-1]
    np.testing.assert_allclose(
        4 * losses.soft_label_kl(student / 2, dense),
        losses.soft_label_kl(student, LOGITS, temperature=2.0),
        rtol=1e-4,
    )


def test_half_precision_storage():
    kept = labels.top_k(LOGITS, 3)
    stored = [kept.values.astype(jnp.float16), kept.indices, kept.rest.astype(jnp.float16)]
    dense = labels.from_top_k(*stored, num_classes=9)
    assert dense.dtype == jnp.float32
    exact = labels.from_top_k(*kept, num_classes=9)
    np.testing.assert_allclose(dense, exact, rtol=1e-3, atol=1e-3)


def test_no_gradient_leaves_a_label_maker():
    def everything(z, t):
        probs = labels.soften(z, temperature=t)
        kept = labels.top_k(z, 2, temperature=t)
        dense = labels.from_top_k(*kept, num_classes=9)
        smoothed = labels.smooth(CLASSES, 9, smoothing=t / 10)
        mixed = labels.mix(probs, smoothed, weight=t / 10)
        return probs.sum() + kept.values.sum() + dense.sum() + (mixed * mixed).sum()

    for gradient in jax.jit(jax.grad(everything, argnums=(0, 1)))(LOGITS, 2.0):
        assert not np.any(gradient)


def test_one_trace_for_all_temperatures_and_weights():
    traces = 0

    @jax.jit
    def make(z, value):
        nonlocal traces
        traces += 1
        probs = labels.soften(z, temperature=value)
        return labels.mix(probs, labels.smooth(CLASSES, 9, smoothing=value), weight=value)

    results = [make(LOGITS, value) for value in (0.2, 0.5, 1.0)]
    assert traces == 1
    assert np.any(results[0] != results[1])
    wanted = labels.mix(
        labels.soften(LOGITS, temperature=0.5),
        labels.smooth(CLASSES, 9, smoothing=0.5),
        weight=0.5,
    )
    np.testing.assert_allclose(results[1], wanted, rtol=1e-5)


def test_half_in_single_out():
    half = LOGITS.astype(jnp.bfloat16)
    wide = half.astype(np.float32)
    assert labels.soften(half).dtype == jnp.float32
    np.testing.assert_allclose(labels.soften(half), labels.soften(wide), rtol=1e-6)
    assert labels.top_k(half, 2).values.dtype == jnp.float32
    assert labels.mix(half, half, weight=0.5).dtype == jnp.float32


def test_traced_labels_that_are_no_class_give_nan():
    make = jax.jit(lambda y: labels.smooth(y, 4, smoothing=0.1))
    rows = np.asarray(make(np.int32([0, 4, -2, -1])))
    assert np.all(np.isnan(rows[1:3]))
    assert not np.any(np.isnan(rows[[0, 3]]))


def test_bad_input():
    with pytest.raises(ValueError, match=r"^temperature must be a finite number above 0, got 0"):
        labels.soften(LOGITS, temperature=0)
    with pytest.raises(TypeError, match=r"^logits must be a floating-point array"):
        labels.soften(CLASSES)
    with pytest.raises(ValueError, match=r"^labels must be class indices from 0 to 3.* got 8"):
        labels.smooth(np.int32([8]), 4, smoothing=0.1)
    with pytest.raises(TypeError, match=r"^labels must be an integer array"):
        labels.smooth(LOGITS, 4, smoothing=0.1)
    with pytest.raises(TypeError, match=r"^num_classes must be an integer at least 1"):
        labels.smooth(CLASSES, 9.0, smoothing=0.1)
    with pytest.raises(ValueError, match=r"^smoothing must be .* at most 1, got -0.1"):
        labels.smooth(CLASSES, 9, smoothing=-0.1)
    with pytest.raises(ValueError, match=r"^weight must be .* at most 1, got 2"):
        labels.mix(LOGITS, LOGITS, weight=2)
    with pytest.raises(ValueError, match=r"^weight must have shape \(2, 4\)"):
        labels.mix(LOGITS, LOGITS, weight=np.ones(4))
    with pytest.raises(ValueError, match=r"^probs_b must have shape"):
        labels.mix(LOGITS, LOGITS[..., :3], weight=0.5)
    with pytest.raises(ValueError, match=r"^k must be an integer at least 1 and at most 9, got 10"):
        labels.top_k(LOGITS, 10)
    values, indices, rest = labels.top_k(LOGITS, 3)
    with pytest.raises(ValueError, match=r"^num_classes must be an integer at least 3, got 2"):
        labels.from_top_k(values, indices, rest, num_classes=2)
    with pytest.raises(ValueError, match=r"^indices must be class indices from 0 to 3, got [4-8]"):
        labels.from_top_k(values, indices, rest, num_classes=4)
    with pytest.raises(ValueError, match=r"^indices must have shape"):
        labels.from_top_k(values, indices[..., :2], rest, num_classes=9)
    with pytest.raises(ValueError, match=r"^rest must have shape \(2, 4\)"):
        labels.from_top_k(values, indices, rest[..., None], num_classes=9)
