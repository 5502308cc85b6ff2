"""Mean teacher: its average, its two views, and what counts in its loss."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import assert_close
from method_cases import CLASSES, batch, plain

import kdjax as kd
from kdjax.methods.mean_teacher import averaged, mean_teacher, probability_mse


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return nn.Dense(CLASSES)(x)


def run(student, steps, data, **options):
    """The States after every step, the first one included."""
    learner = kd.minimize(mean_teacher(student, **options), optax.sgd(0.3))
    update, states = jax.jit(learner.update), [learner.init(jax.random.key(0), data)]
    for _ in range(steps):
        state, metrics = update(states[-1], data)
        states.append(state)
    return states, metrics


def closed_form(trees, decay):
    """The published recursion in float64, with the warm-up of its decay."""
    trees = [jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in trees]
    mean = trees[0]
    for t, tree in enumerate(trees[1:], 1):
        share = min(1 - 1 / (t + 1), decay)
        mean = jax.tree.map(lambda a, b, s=share: s * a + (1 - s) * b, mean, tree)
    return mean


def test_average_is_the_closed_form_also_of_batch_statistics():
    student, data = kd.from_linen(Normed()), batch()
    states, _ = run(student, 8, data, consistency=1.0, decay=0.75)
    params, extra = averaged(states[-1])
    assert_close(params, closed_form([s.params["student"] for s in states], 0.75), 1e-5)
    assert_close(extra, closed_form([s.extra["student"] for s in states], 0.75), 1e-5)
    assert jax.tree.leaves(extra)


def test_warm_up_is_the_plain_mean():
    states, _ = run(plain(), 4, batch(), consistency=1.0, decay=0.999)
    trees = [s.params["student"] for s in states]
    mean = jax.tree.map(lambda *x: np.mean(np.stack(x), 0), *trees)
    assert_close(averaged(states[-1])[0], mean, 1e-5)


def test_decay_of_zero_is_the_student_itself():
    states, metrics = run(plain(), 3, batch(), consistency=1.0, decay=0.0)
    assert_close(averaged(states[-1])[0], states[-1].params["student"], 0)
    assert metrics["loss/consistency"] == 0  # without views both see the same


def test_consistency_of_zero_is_plain_training():
    data = batch()
    states, _ = run(plain(), 3, data, consistency=0.0)
    alone = kd.minimize(
        kd.distill(
            kd.started(plain(), (states[0].params["student"], {})),
            None,
            {"hard": (1.0, kd.terms.hard_labels())},
        ),
        optax.sgd(0.3),
    )
    state = alone.init(jax.random.key(0), data)
    for _ in range(3):
        state, _ = jax.jit(alone.update)(state, data)
    assert_close(states[-1].params["student"], state.params["student"], 1e-6)


def test_loss_is_the_formula_on_both_views():
    """Unlabelled rows count for consistency, and only labelled ones for the labels."""
    data = batch()
    data["view1"], data["view2"] = data["image"] + 0.5, data["image"] - 0.5
    method = mean_teacher(plain(), consistency=3.0, hard=0.5)
    params, extra = method.init(jax.random.key(0), data)
    extra = {**extra, "ema": jax.tree.map(lambda x: 1.5 * x, extra["ema"])}
    keys = {"step": jnp.int32(0), "key": jax.random.key(0), "axis_name": None}
    value, (_, metrics) = method.loss(params, extra, data, None, **keys)

    def logits(tree, x):
        hidden = np.maximum(np.asarray(x, np.float64) @ tree["w0"], 0)
        return hidden @ tree["w1"]

    def softmax(z):
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p = softmax(logits(params["student"], data["view1"]))
    q = softmax(logits(extra["ema"]["params"], data["view2"]))
    label = np.asarray(data["label"])
    known = label >= 0
    hard = -np.log(p[known, label[known]]).mean()
    consistency = ((p - q) ** 2).mean()
    np.testing.assert_allclose(metrics["loss/hard"], hard, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/consistency"], consistency, rtol=1e-5)
    np.testing.assert_allclose(value, 0.5 * hard + 3 * consistency, rtol=1e-5)
    right = (q.argmax(-1) == label)[known].mean()
    np.testing.assert_allclose(metrics["teacher_accuracy"], right, rtol=1e-6)


def test_no_gradient_to_the_average():
    data = batch()
    method = mean_teacher(plain(), consistency=1.0)
    params, extra = method.init(jax.random.key(0), data)
    extra = {**extra, "ema": jax.tree.map(lambda x: 1.5 * x, extra["ema"])}
    keys = {"step": jnp.int32(0), "key": jax.random.key(0), "axis_name": None}
    grads = jax.grad(lambda ema: method.loss(params, {**extra, "ema": ema}, data, None, **keys)[0])(
        extra["ema"]
    )
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_other_distances_and_the_ramp():
    data = batch()
    ramp = optax.linear_schedule(0.0, 1.0, 2)
    kl = kd.terms.soft_labels()
    method = mean_teacher(plain(), consistency=ramp, distance=kl)
    params, extra = method.init(jax.random.key(0), data)
    extra = {**extra, "ema": jax.tree.map(lambda x: 1.5 * x, extra["ema"])}
    keys = {"key": jax.random.key(0), "axis_name": None}
    totals = []
    for step in range(3):
        total, (_, metrics) = method.loss(params, extra, data, None, step=jnp.int32(step), **keys)
        totals.append(float(total))
    weight = float(metrics["loss/consistency"])
    np.testing.assert_allclose(np.diff(totals), [weight / 2] * 2, rtol=1e-4)


def test_half_precision_parameters_have_a_float32_average():
    half = plain()
    student = half._replace(
        init=lambda key, x: jax.tree.map(lambda p: p.astype(jnp.bfloat16), half.init(key, x))
    )
    states, _ = run(student, 2, batch(), consistency=1.0)
    assert {x.dtype for x in jax.tree.leaves(averaged(states[-1]))} == {jnp.dtype("float32")}


def test_probability_mse():
    s, t = jnp.array([[0.0, 1.0, 2.0]]), jnp.array([[2.0, 1.0, 0.0]])
    p = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    np.testing.assert_allclose(probability_mse(s, t), [((p - p[::-1]) ** 2).mean()], rtol=1e-6)
    np.testing.assert_allclose(probability_mse(s + 5, t - 3), probability_mse(s, t), rtol=1e-5)
    grad = jax.grad(lambda s: probability_mse(s, s).sum())(s)
    assert not np.any(grad)
    with pytest.raises(ValueError, match="student_logits must have shape"):
        probability_mse(s, t[:, :2])


def test_bad_input():
    with pytest.raises(TypeError, match=r"student must be a kdjax\.Model"):
        mean_teacher("net", consistency=1.0)
    with pytest.raises(ValueError, match="decay must be"):
        mean_teacher(plain(), consistency=1.0, decay=1.5)
    with pytest.raises(ValueError, match="consistency must be"):
        mean_teacher(plain(), consistency=-1.0)
    with pytest.raises(TypeError, match=r"terms\['consistency'\]"):
        mean_teacher(plain(), consistency=1.0, distance=kd.losses.soft_label_kl)
    with pytest.raises(TypeError, match="augment must be a function"):
        mean_teacher(plain(), consistency=1.0, augment="views")
    with pytest.raises(ValueError, match="state must be a State of mean_teacher"):
        averaged({"params": {}})
