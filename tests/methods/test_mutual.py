"""Deep mutual learning: who teaches whom, and how to get one student out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import assert_close, assert_same_bits
from method_cases import batch, linen, plain

import kdjax as kd
from kdjax.methods import mutual as mutuals
from kdjax.methods.mutual import mutual, student_of, together


def gradient(method, params, extra, data, step=0):
    def loss(params):
        return method.loss(
            params, extra, data, None, step=jnp.int32(step), key=jax.random.key(0), axis_name=None
        )

    (value, (_, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, metrics, grads


def start(method, data):
    return method.init(jax.random.key(0), data)


def test_value_and_gradient_are_the_formula():
    """Our reading of the paper's loss in float64 NumPy, for three students."""
    data = batch()
    method = mutual([plain()] * 3)
    params, extra = start(method, data)
    value, metrics, grads = gradient(method, params, extra, data)
    x, label = np.asarray(data["image"], np.float64), np.asarray(data["label"])

    def predictions(k, w1=None):
        p = params["student"][k]
        hidden = np.maximum(x @ np.asarray(p["w0"], np.float64), 0)
        logits = hidden @ (np.asarray(p["w1"], np.float64) if w1 is None else w1)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return logits

    logs = {k: predictions(k) for k in "012"}

    def own_loss(k, log_p):
        known = label >= 0
        hard = -log_p[known, label[known]].mean()
        soft = [(np.exp(logs[j]) * (logs[j] - log_p)).sum(-1).mean() for j in logs if j != k]
        return hard + np.mean(soft)

    np.testing.assert_allclose(value, sum(own_loss(k, logs[k]) for k in logs), rtol=1e-5)
    kl = (np.exp(logs["2"]) * (logs["2"] - logs["0"])).sum(-1).mean()
    np.testing.assert_allclose(metrics["loss/0/soft/2"], kl, rtol=1e-5)
    # The gradient for student 1 is that of its own loss alone: nothing reaches it as a peer.
    w1, eps = np.asarray(params["student"]["1"]["w1"], np.float64), 1e-5
    for index in ((0, 0), (3, 2), (7, 4)):
        moved = [w1.copy(), w1.copy()]
        moved[0][index] += eps
        moved[1][index] -= eps
        up, down = (own_loss("1", predictions("1", w)) for w in moved)
        found = grads["student"]["1"]["w1"][index]
        np.testing.assert_allclose(found, (up - down) / (2 * eps), rtol=2e-4, atol=1e-6)


def test_identical_students_teach_each_other_nothing():
    data = batch()
    variables = plain().init(jax.random.key(3), data["image"])
    same = kd.started(plain(), variables)
    none = {"hard": (0.0, kd.terms.hard_labels())}
    params, extra = start(mutual([same, same], none), data)
    value, _, grads = gradient(mutual([same, same], none), params, extra, data)
    assert value == 0
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_without_peers_every_student_learns_alone():
    data = batch()
    off = {"soft": (0.0, kd.terms.soft_labels())}
    learner = kd.minimize(mutual([plain(), linen()], peers=off), optax.adam(1e-2))
    state = learner.init(jax.random.key(0), data)
    model, variables = student_of([plain(), linen()], state, 1)
    alone = kd.minimize(
        kd.distill(kd.started(model, variables), None, {"hard": (1.0, kd.terms.hard_labels())}),
        optax.adam(1e-2),
    )
    single = alone.init(jax.random.key(0), data)
    for _ in range(2):
        state, _ = jax.jit(learner.update)(state, data)
        single, _ = jax.jit(alone.update)(single, data)
    assert_close(state.params["student"]["1"], single.params["student"], 1e-6)


def test_students_agree_more_than_without_peers():
    data = batch()

    def disagreement(weight):
        peers = {"soft": (weight, kd.terms.soft_labels())}
        students = [plain(), linen()]
        learner = kd.minimize(mutual(students, peers=peers), optax.sgd(0.1))
        state = learner.init(jax.random.key(0), data)
        update = jax.jit(learner.update)
        for _ in range(30):
            state, metrics = update(state, data)
        return metrics["loss/0/soft/1"] + metrics["loss/1/soft/0"]

    assert disagreement(1.0) < 0.5 * disagreement(0.0)


def test_terms_with_parameters_of_their_own():
    """A projector for each pair, in its place, and trained."""

    def loss(tparams, student_out, teacher_out, batch, *, step, key):
        return ((student_out["hidden"] @ tparams["w"] - teacher_out["hidden"]) ** 2).mean(-1)

    def init(key, student_out, teacher_out):
        return {"w": jax.random.normal(key, (8, 8))}

    data = batch()
    peers = {"hint": (0.5, kd.Term(init, loss))}
    learner = kd.minimize(mutual([plain(), linen()], peers=peers), optax.sgd(0.1))
    state = learner.init(jax.random.key(0), data)
    assert sorted(state.params["terms"]["hint"]) == ["0/1", "1/0"]
    after, _ = jax.jit(learner.update)(state, data)
    for pair in ("0/1", "1/0"):
        before, now = (s.params["terms"]["hint"][pair]["w"] for s in (state, after))
        assert not np.allclose(before, now)


def test_checkpoint_evaluation_and_export(tmp_path):
    data, students = batch(), [plain(), linen()]
    learner = kd.minimize(mutual(students), optax.sgd(0.1))
    state = learner.init(jax.random.key(0), data)

    def accuracy(outputs, batch):
        right = outputs["1/logits"].argmax(-1) == batch["label"]
        return right.astype(jnp.float32), (batch["label"] >= 0).astype(jnp.float32)

    state = kd.train.fit(
        learner, state, [data] * 2, steps=2, checkpoint=tmp_path / "run", progress=False, plot=False
    )
    found = kd.train.evaluate(together(students), state, [data], metrics={"accuracy/1": accuracy})
    for source in (state, kd.train.load_student(tmp_path / "run")):
        model, variables = student_of(students, source, 1)
        assert_same_bits(variables[0], state.params["student"]["1"])
        one = kd.train.evaluate(model, variables, [data])
        np.testing.assert_allclose(one["accuracy"], found["accuracy/1"])
        outputs, _ = together(students).apply(state.params["student"], state.extra["student"], data)
        logits = model.apply(*variables, data["image"])[0]["logits"]
        np.testing.assert_array_equal(outputs["1/logits"], logits)
    # A student can be somebody's teacher.
    taught = kd.distill(plain(), model, {"soft": (1.0, kd.terms.soft_labels())})
    kd.minimize(taught, optax.sgd(0.1)).init(jax.random.key(0), data, variables)


def test_augmentation_is_shared():
    """Two equal students under random noise stay equal, so they saw the same images."""

    def augment(key, batch):
        return {**batch, "image": batch["image"] + jax.random.normal(key, batch["image"].shape)}

    data = batch()
    same = kd.started(plain(), plain().init(jax.random.key(3), data["image"]))
    learner = kd.minimize(mutual([same, same], augment=augment), optax.sgd(0.1))
    state, metrics = jax.jit(learner.update)(learner.init(jax.random.key(0), data), data)
    assert_same_bits(state.params["student"]["0"], state.params["student"]["1"])
    assert metrics["loss/0/soft/1"] == 0


def test_bad_input():
    with pytest.raises(ValueError, match="students must hold at least two"):
        mutual([plain()])
    with pytest.raises(TypeError, match="students must be a sequence"):
        mutual(plain())
    with pytest.raises(TypeError, match=r"students\[1\] must be a kdjax.Model"):
        mutual([plain(), "resnet18"])
    hard = {"soft": (1.0, kd.terms.hard_labels())}
    with pytest.raises(ValueError, match="peers must have other names than own, got 'soft'"):
        mutual([plain(), plain()], hard)
    with pytest.raises(TypeError, match="augment must be a function"):
        mutual([plain(), plain()], augment=3)
    data = batch()
    single = plain().init(jax.random.key(0), data["image"])
    with pytest.raises(ValueError, match="variables must be those of 2 students"):
        student_of([plain(), plain()], single, 0)
    state = kd.minimize(mutual([plain(), plain()]), optax.sgd(0.1)).init(jax.random.key(0), data)
    with pytest.raises(ValueError, match="index must be an integer"):
        student_of([plain(), plain()], state, 2)
    with pytest.raises(ValueError, match="train must be False"):
        mutuals.together([plain(), plain()]).apply({}, {}, data, train=True)
