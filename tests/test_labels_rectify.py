"""ADR's rectified labels: the published code's, their limits, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import labels

GOLDEN = dict(np.load(Path(__file__).parent / "golden_rectify.npz"))
RNG = np.random.default_rng(0)
Z = jnp.asarray(3 * RNG.normal(size=(64, 7)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 7, 64))
rectify = jax.jit(lambda z, y, t, m: labels.rectify(z, y, temperature=t, mix=m))


CASES = [("c10", case) for case in range(6)] + [("c100", 0), ("c100", 1)]


@pytest.mark.parametrize(("tag", "case"), CASES)
def test_equals_the_published_code(tag, case):
    with jax.enable_x64(True):
        found = labels.rectify(
            jnp.asarray(GOLDEN[f"{tag}_logits"]), jnp.asarray(GOLDEN[f"{tag}_labels"]),
            temperature=GOLDEN["temperature"][case], mix=GOLDEN["mix"][case],
        )  # fmt: skip
        np.testing.assert_allclose(found, GOLDEN[f"{tag}_{case}"], atol=1e-10)


@pytest.mark.parametrize("case", range(6))
def test_ties_and_extreme_logits_equal_the_published_code(case):
    logits, y = jnp.asarray(GOLDEN["edge_logits"]), jnp.asarray(GOLDEN["edge_labels"])
    options = {"temperature": GOLDEN["edge_temperature"][case], "mix": GOLDEN["edge_mix"][case]}
    with jax.enable_x64(True):
        found = labels.rectify(jnp.asarray(GOLDEN["edge_logits"]), y, **options)
        np.testing.assert_allclose(found, GOLDEN[f"edge_{case}"], atol=1e-10)
    single = labels.rectify(logits.astype(jnp.float32), y, **options)
    np.testing.assert_allclose(single, GOLDEN[f"edge_{case}"], atol=2e-5)


@pytest.mark.parametrize(("temperature", "mix"), [(1.0, 0.7), (2.5, 0.95), (0.5, 0.3), (1.0, 1.0)])
def test_the_label_is_on_top_by_the_margin_identity(temperature, mix):
    found = np.asarray(rectify(Z, Y, temperature, mix), np.float64)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
    assert found.min() >= 0
    p = np.asarray(jax.nn.softmax(Z / temperature), np.float64)
    rows, y = np.arange(len(Y)), np.asarray(Y)
    top = p.argmax(-1)
    d = p.max(-1) - p[rows, y]
    others = found.copy()
    others[rows, y] = -1
    assert (found[rows, y] > others.max(-1)).all()
    preferred = (top != y) & (d <= mix)
    assert preferred.any()
    gap = (found[rows, y] - found[rows, top])[preferred]
    np.testing.assert_allclose(gap, ((1 - mix) * (1 + d) + d**2)[preferred], atol=1e-5)
    given_up = d > mix
    hot = np.eye(7)[y]
    np.testing.assert_array_equal(found[given_up], hot[given_up])


def test_limits():
    hot = np.eye(7, dtype=np.float32)[np.asarray(Y)]
    np.testing.assert_array_equal(rectify(Z, Y, 1.0, 0.0), hot)  # bit for bit
    smooth = labels.smooth(Y, 7, smoothing=0.4)
    np.testing.assert_allclose(rectify(Z, Y, 1e8, 0.4), smooth, atol=1e-6)
    np.testing.assert_allclose(rectify(Z, Y, 1e-4, 0.9), hot, atol=1e-6)
    # A teacher that is right is followed in full at mix = 1.
    right = jnp.argmax(Z, axis=-1)
    np.testing.assert_allclose(rectify(Z, right, 1.0, 1.0), jax.nn.softmax(Z), atol=1e-6)
    tie = jnp.array([[2.0, 2.0, 0.0]])
    p = jax.nn.softmax(tie)
    np.testing.assert_allclose(rectify(tie, jnp.array([1]), 1.0, 1.0), p, atol=1e-6)


def test_permuting_samples_or_classes_permutes_the_result():
    whole = np.asarray(rectify(Z, Y, 1.5, 0.8))
    order, classes = RNG.permutation(64), RNG.permutation(7)
    np.testing.assert_allclose(rectify(Z[order], Y[order], 1.5, 0.8), whole[order], atol=1e-6)
    found = rectify(Z[:, classes], jnp.argsort(jnp.asarray(classes))[Y], 1.5, 0.8)
    np.testing.assert_allclose(found, whole[:, classes], atol=1e-6)
    np.testing.assert_allclose(rectify(Z[:1], Y[:1], 1.5, 0.8), whole[:1], atol=1e-6)


def test_no_gradient_and_one_program_for_a_schedule():
    traces = []

    @jax.jit
    def step(z, temperature, mix):
        traces.append(1)

        def largest(z, temperature, mix):
            return labels.rectify(z, Y, temperature=temperature, mix=mix).max()

        return jax.grad(largest, (0, 1, 2))(z, temperature, mix)

    for temperature, mix in ((2.0, 0.5), (1.0, 0.9)):
        for gradient in step(Z, temperature, mix):
            np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))
    assert len(traces) == 1


def test_bfloat16_is_computed_in_float32():
    half = Z.astype(jnp.bfloat16)
    found = labels.rectify(half, Y, temperature=1.7, mix=0.8)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, rectify(half.astype(jnp.float32), Y, 1.7, 0.8), atol=1e-6)


def test_unlabelled_rows_are_zero_and_bad_ones_nan_in_a_trace():
    found = np.asarray(rectify(Z[:3], jnp.array([-1, 0, 9]), 1.0, 0.5))
    np.testing.assert_array_equal(found[0], 0)
    assert np.isfinite(found[1]).all()
    assert np.isnan(found[2]).all()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number above 0, got 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be a finite number above 0, got -1"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a finite number above 0"),
        ({"mix": 1.1}, ValueError, "mix must be a finite number at least 0 and at most 1, got 1.1"),
        ({"mix": -0.1}, ValueError, "mix must be a finite number at least 0 and at most 1"),
        ({"mix": jnp.zeros(3)}, ValueError, "mix must be a finite number"),
        ({"teacher_logits": Z[0]}, ValueError, "teacher_logits must have 2 dimensions"),
        ({"teacher_logits": Y[:, None]}, TypeError, "teacher_logits must be a floating-point"),
        ({"labels": Y[:5]}, ValueError, r"labels must have shape \(64,\)"),
        ({"labels": Y.at[0].set(7)}, ValueError, "labels must be class indices.* 6.* got 7"),
        ({"labels": jax.nn.one_hot(Y, 7)}, TypeError, "labels must be integer.*mixup"),
    ],
)  # fmt: skip
def test_refuses(change, error, text):
    good = {"teacher_logits": Z, "labels": Y, "temperature": 1.0, "mix": 0.5}
    with pytest.raises(error, match=text):
        labels.rectify(**{**good, **change})
