"""The virtual teacher, and distillation from a copy of oneself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import assert_close
from method_cases import CLASSES, batch, plain

import kdjax as kd
from kdjax.methods import teacher_free as free

LOGITS = np.random.default_rng(0).normal(size=(6, 5)) * 2
LABEL = np.array([0, 4, 2, -1, 3, 1])


def values(term, logits=LOGITS, label=LABEL):
    return term.loss(
        {},
        {"logits": jnp.asarray(logits)},
        {},
        {"label": jnp.asarray(label)},
        step=jnp.int32(3),
        key=jax.random.key(0),
    )


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_virtual_labels():
    found = free.virtual_labels(jnp.asarray(LABEL), 5, correct=0.9)
    np.testing.assert_allclose(found.sum(-1), LABEL >= 0, atol=1e-6)
    np.testing.assert_allclose(found[1], [0.025] * 4 + [0.9], rtol=1e-5)
    uniform = free.virtual_labels(jnp.asarray(LABEL[:3]), 5, correct=0.2)
    np.testing.assert_allclose(uniform, np.full((3, 5), 0.2), rtol=1e-5)
    one_hot = free.virtual_labels(jnp.asarray(LABEL[:3]), 5, correct=1.0)
    np.testing.assert_array_equal(one_hot, np.eye(5)[LABEL[:3]])


@pytest.mark.parametrize("reduction", ["paper", "reference"])
def test_value_and_gradient_are_the_formula(reduction):
    """Our reading in float64 NumPy of the paper's formula, and the published code's arithmetic."""
    correct, scale, known = 0.95, 3.0, LABEL >= 0
    p = np.full((6, 5), (1 - correct) / 4)
    p[np.arange(6)[known], LABEL[known]] = correct
    target = softmax((np.log(p) if reduction == "paper" else p) / scale)
    own = scale if reduction == "paper" else 1.0
    student = softmax(LOGITS / own)
    expected = own**2 * (target * (np.log(target) - np.log(student))).sum(-1)
    gradient = own * (student - target)
    with jax.enable_x64(True):
        term = free.virtual_teacher(
            correct=np.float64(correct), temperature=scale, reduction=reduction
        )
        found, weights = values(term)
        grads = jax.grad(lambda z: (values(term, z)[0] * weights).sum())(jnp.asarray(LOGITS))
    np.testing.assert_array_equal(weights, known)
    np.testing.assert_allclose(found[known], expected[known], rtol=1e-9)
    np.testing.assert_allclose(grads[known], gradient[known], rtol=1e-9, atol=1e-12)
    assert not np.any(grads[~known])


def test_temperature_one_is_label_smoothing():
    correct = 0.9
    smooth = kd.terms.hard_labels(smoothing=(1 - correct) * 5 / 4)
    term = free.virtual_teacher(correct=correct, temperature=1.0)

    def gradient(term):
        def mean(z):
            found, weights = values(term, z)
            return (found * weights).sum() / weights.sum()

        return jax.grad(mean)(jnp.asarray(LOGITS, jnp.float32))

    np.testing.assert_allclose(gradient(term), gradient(smooth), atol=2e-7)


def test_a_certain_teacher_is_the_hard_label():
    found, _ = values(free.virtual_teacher(correct=1.0, temperature=1.0), LOGITS[:3], LABEL[:3])
    expected = kd.losses.hard_label_cross_entropy(jnp.asarray(LOGITS[:3]), jnp.asarray(LABEL[:3]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["paper", "reference"])
def test_a_label_that_is_no_class_is_seen_unless_it_is_padding(reduction):
    data = batch()
    data["label"] = data["label"].at[5].set(77)
    method = free.tf_kd_reg(plain(), reduction=reduction)
    learner = kd.minimize(method, optax.sgd(0.1))
    state = learner.init(jax.random.key(0), data)
    update = jax.jit(learner.update)
    assert np.isnan(update(state, data)[1]["loss/virtual"])
    after, metrics = update(state, {**data, "weight": jnp.ones(16).at[5].set(0)})
    assert np.isfinite(metrics["loss"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))


def test_alpha_and_its_schedule():
    data = batch()

    def loss(alpha, step):
        method = free.tf_kd_reg(plain(), alpha=alpha)
        params, extra = method.init(jax.random.key(0), data)
        keys = {"step": jnp.int32(step), "key": jax.random.key(0), "axis_name": None}
        return method.loss(params, extra, data, None, **keys)

    total, (_, metrics) = loss(0.25, 0)
    expected = 0.75 * metrics["loss/hard"] + 0.25 * metrics["loss/virtual"]
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    ramp = optax.linear_schedule(0.0, 0.5, 2)
    np.testing.assert_allclose(loss(ramp, 1)[0], total, rtol=1e-6)


def test_distilling_from_oneself():
    """It is distillation from frozen variables of the same model, and pulls towards them."""
    data = batch()
    trained = plain().init(jax.random.key(8), data["image"])
    method = free.tf_kd_self(plain(), alpha=0.8, temperature=2.0)
    plainly = kd.distill(
        plain(),
        plain(),
        {
            "hard": (0.2, kd.terms.hard_labels()),
            "soft": (0.8, kd.terms.soft_labels(temperature=2.0)),
        },
    )
    states = []
    for m in (method, plainly):
        learner = kd.minimize(m, optax.sgd(0.1))
        state = learner.init(jax.random.key(0), data, trained)
        states.append(jax.jit(learner.update)(state, data, trained)[0])
    assert_close(states[0].params, states[1].params, 1e-6)
    # Started from the copy itself, the soft loss is 0.
    itself = free.tf_kd_self(kd.started(plain(), trained))
    params, extra = itself.init(jax.random.key(0), data, trained)
    keys = {"step": jnp.int32(0), "key": jax.random.key(0), "axis_name": None}
    _, (_, metrics) = itself.loss(params, extra, data, trained, **keys)
    np.testing.assert_allclose(metrics["loss/soft"], 0, atol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="correct must be"):
        free.virtual_teacher(correct=1.5)
    with pytest.raises(ValueError, match="correct must be"):
        free.virtual_labels(jnp.array([0]), CLASSES, correct=0.1)
    with pytest.raises(ValueError, match="num_classes must be"):
        free.virtual_labels(jnp.array([0]), 1)
    with pytest.raises(ValueError, match="reduction must be one of paper, reference"):
        free.virtual_teacher(reduction="mean")
    with pytest.raises(ValueError, match="temperature must be"):
        free.tf_kd_reg(plain(), temperature=0.0)
    with pytest.raises(ValueError, match="alpha must be"):
        free.tf_kd_self(plain(), alpha=2.0)
    with pytest.raises(TypeError, match=r"batch\['label'\] must be an integer array"):
        values(free.virtual_teacher(), label=np.full((6, 5), 0.2))
