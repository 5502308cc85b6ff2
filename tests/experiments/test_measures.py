"""Estimates, scores and costs, against numbers worked out by hand."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

import kdjax as kd
from kdjax.experiments import measures


def picture_data(labels):
    """Images whose first pixels hold the logits of `reader`, right for every second row."""
    labels = np.asarray(labels)
    images = np.full((len(labels), 4, 4, 1), 0.5, np.float32)
    answers = np.where(np.arange(len(labels)) % 2 == 0, labels, (labels + 1) % 3)
    images[:, 0, :3, 0] = np.eye(3)[answers]
    column = {"image": images, "label": labels.astype(np.int32)}
    return kd.data.arrays({"train": column, "test": column}, num_classes=3)


def reader():
    """A network that reads its logits from the image: 5 x the first three pixels."""
    return kd.from_fn(
        lambda key, x: {"scale": jnp.asarray(5.0), "unused": jnp.zeros((2, 3))},
        lambda params, x: params["scale"] * x[:, 0, :3, 0],
    )


VARIABLES = ({"scale": jnp.asarray(5.0), "unused": jnp.zeros((2, 3))}, {})


def test_estimate_is_mean_and_standard_error():
    found = measures.estimate([0.90, 0.92, 0.97, 0.93])
    assert found.mean == pytest.approx(0.93)
    # deviations -.03 -.01 .04 0: s^2 = .0026 / 3, over sqrt(4)
    assert found.error == pytest.approx(math.sqrt(0.0026 / 3) / 2)
    assert found.values == (0.90, 0.92, 0.97, 0.93)


def test_one_seed_has_no_standard_error():
    assert math.isnan(measures.estimate([0.5]).error)
    with pytest.raises(ValueError, match="values"):
        measures.estimate([])


def test_gain_is_paired_by_seed():
    before, after = [0.50, 0.70, 0.90], [0.52, 0.73, 0.91]
    found = measures.gain(before, after)
    assert found.values == pytest.approx((0.02, 0.03, 0.01))
    assert found.mean == pytest.approx(0.02)
    # The spread between seeds cancels: unpaired, the error would be above 0.1.
    assert found.error == pytest.approx(0.01 / math.sqrt(3))
    with pytest.raises(ValueError, match="after"):
        measures.gain([1.0], [1.0, 2.0])


def test_score_of_known_answers():
    labels = np.array([0, 1, 2, 0, 1, -1])  # right, wrong, right, wrong, right, unlabelled
    dataset = picture_data(labels)
    teacher = np.eye(3)[[0, 1, 2, 0, 1, 1]]  # the truth, and class 1
    score, logits = measures.score(reader(), VARIABLES, dataset, teacher_logits=teacher)
    assert score.accuracy == pytest.approx(3 / 5)
    confidence = math.exp(5) / (math.exp(5) + 2)
    assert score.ece == pytest.approx(abs(confidence - 3 / 5), abs=1e-5)
    right, wrong = -math.log(confidence), 5 - math.log(confidence)
    assert score.nll == pytest.approx((3 * right + 2 * wrong) / 5, rel=1e-5)
    # Of the six rows it answers the teacher's class in the three even ones but the last pair.
    assert score.agreement == pytest.approx((logits.argmax(-1) == teacher.argmax(-1)).mean())
    assert set(score.corrupted) == {"blur", "noise", "contrast"}
    assert score.corrupted["contrast"] == pytest.approx(3 / 5)  # moves no largest pixel
    assert logits.shape == (6, 3)


def test_score_needs_labels():
    with pytest.raises(ValueError, match="labels"):
        measures.score(reader(), VARIABLES, picture_data([-1, -1]))


def test_corruptions_are_the_same_whatever_the_batches():
    dataset = picture_data(np.arange(12) % 3)
    for name in measures.CORRUPTIONS:
        large = measures.Corrupted(dataset.once("test", 12), name)
        small = measures.Corrupted(dataset.once("test", 5), name)
        (whole,) = (np.asarray(batch["image"]) for batch in large)
        parts = np.concatenate([np.asarray(batch["image"]) for batch in small])[:12]
        assert np.allclose(whole, parts, atol=1e-6)
        assert not np.allclose(whole, dataset.read("test")["image"], atol=1e-3)


def test_cost_counts_parameters_and_takes_the_median():
    ticks = iter([0.0, 9.0] * 3 + [0.0, 0.001, 0.0, 0.002, 0.0, 0.050])
    found = measures.cost(reader(), VARIABLES, (4, 4, 1), repeats=3, clock=lambda: next(ticks))
    assert found.parameters == 7
    assert found.latency_ms == pytest.approx(2.0)  # the slow warm-up and the outlier don't count
    # At least the image and the logits, far less than a kilobyte.
    assert found.memory_bytes is None or 4 * 16 <= found.memory_bytes < 1000
