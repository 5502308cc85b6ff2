"""Several teachers: their mixture, trained weights, and each example's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from method_cases import batch, plain

import kdjax as kd
from kdjax.methods import multi_teacher as multi

RNG = np.random.default_rng(1)
STUDENT, TEACHERS = RNG.normal(size=(6, 5)) * 2, RNG.normal(size=(3, 6, 5)) * 2
LABEL = np.array([0, 4, 2, -1, 3, 1])


def softmax(z, axis=-1):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def values(term, student=STUDENT, teachers=TEACHERS, *, tparams=None, label=LABEL, step=0):
    taught = {f"{i}/logits": jnp.asarray(t) for i, t in enumerate(teachers)}
    return term.loss(
        {} if tparams is None else tparams,
        {"logits": jnp.asarray(student)},
        taught,
        {"label": jnp.asarray(label)},
        step=jnp.int32(step),
        key=jax.random.key(0),
    )


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def test_mixture_is_the_formula():
    weights, scale = np.array([3.0, 1.0, 0.0]), 2.0
    p = np.einsum("k,kbc->bc", weights / 4, softmax(TEACHERS / scale))
    q = softmax(STUDENT / scale)
    term = multi.mixture(weights=[3.0, 1, 0], temperature=scale)
    with jax.enable_x64(True):
        found = values(term)
        grads = jax.grad(lambda z: values(term, z).sum())(jnp.asarray(STUDENT))
    np.testing.assert_allclose(found, scale**2 * kl(p, q), rtol=1e-6)
    np.testing.assert_allclose(grads, scale * (q - p), rtol=1e-5, atol=1e-7)


def test_mixture_has_the_gradient_of_the_weighted_losses():
    term = multi.mixture(weights=jnp.array([0.5, 0.3, 0.2]), temperature=4.0)

    def apart(z):
        each = [kd.losses.soft_label_kl(z, jnp.asarray(t), temperature=4.0) for t in TEACHERS]
        return sum(w * x.sum() for w, x in zip((0.5, 0.3, 0.2), each, strict=True))

    z = jnp.asarray(STUDENT, jnp.float32)
    mixed = jax.grad(lambda z: values(term, z).sum())(z)
    np.testing.assert_allclose(mixed, jax.grad(apart)(z), atol=1e-5)


def test_mixture_at_temperature_one_is_that_of_an_ensemble():
    data, teachers = batch(), [plain(), plain()]
    frozen = [t.init(jax.random.key(i), data["image"]) for i, t in enumerate(teachers)]
    outputs, _ = kd.ensemble(teachers, weights=[0.7, 0.3]).apply(frozen, {}, data)
    student = jnp.asarray(RNG.normal(size=outputs["logits"].shape), jnp.float32)
    taught = {k: v for k, v in outputs.items() if k.endswith("/logits")}
    found = multi.mixture(weights=[0.7, 0.3]).loss(
        {}, {"logits": student}, taught, data, step=jnp.int32(0), key=jax.random.key(0)
    )
    expected = kd.losses.soft_label_kl(student, outputs["logits"])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "weights",
    [
        [optax.linear_schedule(1.0, 0.0, 10), optax.linear_schedule(0.0, 1.0, 10), 0.0],
        lambda step: jnp.stack([1 - step / 10, step / 10, 0 * step]),
    ],
)
def test_scheduled_weights_go_from_one_teacher_to_another(weights):
    term = multi.mixture(weights=weights, temperature=2.0)
    for step, teacher in ((0, 0), (10, 1)):
        expected = kd.losses.soft_label_kl(
            jnp.asarray(STUDENT), jnp.asarray(TEACHERS[teacher]), temperature=2.0
        )
        np.testing.assert_allclose(values(term, step=step), expected, rtol=1e-4, atol=1e-5)


def test_learned_is_the_formula_and_its_gradients_are_apart():
    """The student's from the soft loss only, the weights' from the labels only."""
    w, entropy, scale = np.array([0.3, -0.2, 0.5]), 0.2, 2.0
    share, known = softmax(w), LABEL >= 0
    p = np.einsum("k,kbc->bc", share, softmax(TEACHERS / scale))
    mixed = np.einsum("k,kbc->bc", share, softmax(TEACHERS))
    at_label = mixed[np.arange(6), np.clip(LABEL, 0, None)]
    spread = -(share * np.log(share)).sum()
    expected = scale**2 * kl(p, softmax(STUDENT / scale)) + np.where(
        known, -np.log(at_label) - entropy * spread, 0
    )
    term = multi.learned(temperature=scale, entropy=entropy)
    with jax.enable_x64(True):
        tparams = {"weights": jnp.asarray(w)}
        found = values(term, tparams=tparams)
        to_student = jax.grad(lambda z: values(term, z, tparams=tparams).sum())(
            jnp.asarray(STUDENT)
        )
        to_weights = jax.grad(lambda t: values(term, tparams=t).sum())(tparams)["weights"]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(to_student, scale * (softmax(STUDENT / scale) - p), rtol=1e-9)

    def weights_loss(w):
        share = softmax(w)
        at = np.einsum("k,kbc->bc", share, softmax(TEACHERS))[np.arange(6)[known], LABEL[known]]
        return (-np.log(at) + entropy * (share * np.log(share)).sum()).sum()

    eps = 1e-6
    numeric = [
        (weights_loss(w + eps * e) - weights_loss(w - eps * e)) / (2 * eps) for e in np.eye(3)
    ]
    np.testing.assert_allclose(to_weights, numeric, rtol=1e-6, atol=1e-8)


def trained_shares(teachers, entropy, steps=150):
    """The weights after training on data whose labels only some teachers know."""
    data = batch()
    data["label"] = jnp.arange(16) % 5
    data["wise"] = 4.0 * jax.nn.one_hot(data["label"], 5)
    data["fool"] = 4.0 * jax.nn.one_hot((data["label"] + 1) % 5, 5)
    models = [kd.from_batch(logits=name) for name in teachers]
    method = multi.multi_teacher(
        plain(), models, soft=multi.learned(temperature=2.0, entropy=entropy)
    )
    learner = kd.minimize(method, optax.adam(0.05))
    frozen = [({}, {})] * len(models)
    state = learner.init(jax.random.key(0), data, frozen)
    update = jax.jit(learner.update)
    for _ in range(steps):
        state, _ = update(state, data, frozen)
    return np.asarray(multi.shares(state))


def test_learned_weights_go_to_the_better_teacher():
    first, second = trained_shares(["wise", "fool"], 0.0)
    assert first > 0.98
    assert second < 0.02
    assert trained_shares(["fool", "wise"], 0.0)[1] > 0.98


def test_entropy_keeps_weights_from_collapsing():
    loose = trained_shares(["wise", "fool"], 0.0)
    kept = trained_shares(["wise", "fool"], 1.0)
    assert loose[1] < kept[1] < 0.5
    assert kept[1] > 0.05
    np.testing.assert_allclose(trained_shares(["wise", "wise"], 0.1, 20), [0.5, 0.5], atol=1e-4)


def test_confident_is_the_formula():
    scale, known = 4.0, LABEL >= 0
    log_p = np.log(softmax(TEACHERS))
    wrong = np.where(known, -log_p[:, np.arange(6), np.clip(LABEL, 0, None)], 0)
    share = (1 - softmax(wrong, 0)) / 2
    each = np.stack([kl(softmax(t / scale), softmax(STUDENT / scale)) for t in TEACHERS])
    with jax.enable_x64(True):
        found = values(multi.confident(temperature=scale))
    np.testing.assert_allclose(found, scale**2 * (share * each).sum(0), rtol=1e-9)
    np.testing.assert_allclose(share.sum(0), 1)
    np.testing.assert_allclose(share[:, 3], 1 / 3)  # without a label


def test_confident_follows_the_teacher_who_is_right():
    """With two opposed teachers, the loss is that of the one who knows each example."""
    hot = 30.0 * np.eye(5)
    first, second = hot[[0, 1, 2]], hot[[0, 3, 4]]
    label = np.array([0, 1, 4])
    found = values(multi.confident(), STUDENT[:3], np.stack([first, second]), label=label)
    right = np.stack([first[0], first[1], second[2]])
    expected = kd.losses.soft_label_kl(jnp.asarray(STUDENT[:3]), right, temperature=4.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_stored_outputs_of_several_teachers():
    """They need no ensemble, and no variables."""
    data = batch()
    for i in range(2):
        data[f"t{i}"] = jnp.asarray(RNG.normal(size=(16, 5)), jnp.float32)
    teacher = kd.from_batch(**{"0/logits": "t0", "1/logits": "t1"})
    method = kd.distill(plain(), teacher, {"soft": (1.0, multi.confident())})
    learner = kd.minimize(method, optax.sgd(0.1))
    _, metrics = jax.jit(learner.update)(learner.init(jax.random.key(0), data), data)
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize("term", [multi.learned(), multi.confident()])
def test_a_label_that_is_no_class_is_seen_unless_it_is_padding(term):
    data, teachers = batch(), [plain(), plain()]
    data["label"] = data["label"].at[5].set(77)
    frozen = [t.init(jax.random.key(i), data["image"]) for i, t in enumerate(teachers)]
    learner = kd.minimize(multi.multi_teacher(plain(), teachers, soft=term), optax.sgd(0.1))
    state = learner.init(jax.random.key(0), data, frozen)
    update = jax.jit(learner.update)
    assert np.isnan(update(state, data, frozen)[1]["loss/soft"])
    padded = {**data, "weight": jnp.ones(16).at[5].set(0)}
    after, metrics = update(state, padded, frozen)
    assert np.isfinite(metrics["loss"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))


def test_bad_input():
    with pytest.raises(ValueError, match="weights must have shape"):
        values(multi.mixture(weights=[1.0, 2.0]))
    with pytest.raises(ValueError, match=r"weights\[1\] must be"):
        multi.mixture(weights=[1.0, -2.0])
    with pytest.raises(ValueError, match="weights must not all be 0"):
        multi.mixture(weights=[0.0, 0.0])
    with pytest.raises(TypeError, match="weights must be one for each teacher"):
        multi.mixture(weights=1.0)
    with pytest.raises(ValueError, match=r"teacher must be made by kdjax\.ensemble"):
        values(multi.mixture(), teachers=[])
    with pytest.raises(ValueError, match="ensemble of at least two"):
        values(multi.confident(), teachers=TEACHERS[:1])
    with pytest.raises(ValueError, match="entropy must be"):
        multi.learned(entropy=-1.0)
    with pytest.raises(ValueError, match="temperature must be"):
        multi.confident(temperature=0.0)
    data = batch()
    state = kd.minimize(
        kd.distill(plain(), None, {"hard": (1.0, kd.terms.hard_labels())}), optax.sgd(0.1)
    ).init(jax.random.key(0), data)
    with pytest.raises(ValueError, match="the terms of state has no entry 'soft'"):
        multi.shares(state)
