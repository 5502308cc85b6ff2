"""ARD, RSLAD, IAD and AdaAD: their losses and attacks by hand, their teachers, and bad input."""

from __future__ import annotations

from functools import partial

import contracts
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from method_cases import CLASSES, plain

import kdjax as kd
from kdjax.methods import adversarial_distillation as distillation

ATTACK = {"eps": 0.1, "step_size": 0.04, "steps": 2, "unroll": False}
STUDENT = plain()
FORMS = (distillation.ard, distillation.rslad, distillation.iad, distillation.adaad)


def watched() -> kd.Model:
    """A teacher that may only be run in evaluation mode."""

    def apply(params, extra, x, *, train=False, key=None):
        assert not train
        assert key is None
        return plain().apply(params, extra, x)

    return kd.Model(plain().init, apply)


TEACHER = watched()


def data(rows=16):
    rng = np.random.default_rng(1)
    return {
        "image": jnp.asarray(rng.uniform(size=(rows, 6)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, CLASSES, rows), jnp.int32),
        "noise": jnp.asarray(rng.uniform(-0.02, 0.02, size=(rows, 6)), jnp.float32),
    }


# Confident enough to differ from a student that has not learnt.
FROZEN = jax.tree.map(lambda w: 3 * w, plain().init(jax.random.key(5), data()["image"]))


def begin(method, batch=None, frozen=FROZEN):
    learner = kd.minimize(method, optax.sgd(0.1))
    return learner, learner.init(jax.random.key(7), data() if batch is None else batch, frozen)


def student_on(state, x):
    return STUDENT.apply(state.params["student"], {}, x)[0]["logits"]


def teacher_on(x):
    return plain().apply(*FROZEN, x)[0]["logits"]


def kl(aim, logits, temperature=1.0):
    """KL(aim || logits) by its definition, [B]."""
    p, log_p = (f(aim / temperature) for f in (jax.nn.softmax, jax.nn.log_softmax))
    return (p * (log_p - jax.nn.log_softmax(logits / temperature))).sum(-1)


def cross_entropy(logits, label):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1)[:, 0]


def attacked(loss, batch, *, clipped=True):
    """PGD written out; the attack of TRADES doesn't clip its start."""
    x = batch["image"]

    def into(moved):
        return jnp.clip(x + jnp.clip(moved - x, -ATTACK["eps"], ATTACK["eps"]), 0, 1)

    moved = x + batch["noise"]
    moved = into(moved) if clipped else moved
    for _ in range(ATTACK["steps"]):
        gradient = jax.grad(lambda v: loss(v).sum())(moved)
        moved = into(moved + ATTACK["step_size"] * jnp.sign(gradient))
    return moved


def by_hand(make, state, batch):
    """The attacked images, and the loss on them."""
    x, y = batch["image"], batch["label"]
    s, t = partial(student_on, state), teacher_on
    if make is distillation.ard:
        moved = attacked(lambda v: cross_entropy(s(v), y), batch)
        loss = 0.6 * 4.0**2 * kl(t(x), s(moved), 4.0) + 0.4 * cross_entropy(s(x), y)
    elif make is distillation.rslad:
        moved = attacked(lambda v: kl(t(x), s(v)), batch, clipped=False)
        loss = 5 / 6 * kl(t(x), s(moved)) + 1 / 6 * kl(t(x), s(x))
    elif make is distillation.iad:
        moved = attacked(lambda v: cross_entropy(s(v), y), batch)
        share = jnp.take_along_axis(jax.nn.softmax(t(moved)), y[:, None], 1)[:, 0] ** 0.5
        loss = share * 2.0**2 * kl(t(x), s(moved), 2.0) + (1 - share) * kl(s(x), s(moved))
    else:
        moved = attacked(lambda v: kl(t(v), s(v)), batch)
        loss = 0.7 * kl(t(moved), s(moved)) + 0.3 * kl(t(x), s(x))
    return moved, loss.mean()


OPTIONS = {
    distillation.ard: {"alpha": 0.6, "temperature": 4.0},
    distillation.rslad: {},
    distillation.iad: {"beta": 0.5, "temperature": 2.0},
    distillation.adaad: {"alpha": 0.7},
}


@pytest.mark.parametrize("make", FORMS, ids=lambda f: f.__name__)
def test_attack_and_loss_are_those_of_the_paper(make):
    method = make(STUDENT, TEACHER, **OPTIONS[make], **ATTACK)
    learner, state = begin(method)

    @jax.jit
    def run(state, batch, frozen):
        options = {"step": state.step, "key": state.key, "axis_name": None}

        def loss(params, frozen):
            seen = method.prepare(params, state.extra, batch, frozen, **options)
            return method.loss(params, state.extra, seen, frozen, **options)[0], seen

        (value, seen), (own, taught) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            state.params, frozen
        )

        def expected(params):
            # The attack is no part of the gradient, and neither is the share of the teacher.
            return by_hand(make, state._replace(params=params), batch)

        moved, wanted = expected(state.params)
        return seen["adversarial"], value, own, taught, moved, wanted

    found, value, own, taught, moved, wanted = run(state, data(), FROZEN)
    np.testing.assert_allclose(found, moved, atol=1e-6)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert all(np.any(g) for g in jax.tree.leaves(own))
    for gradient in jax.tree.leaves(taught):  # not to the teacher, not even through the attack
        np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))
    _, metrics = jax.jit(learner.update)(state, data(), FROZEN)
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-5)
    names = {"teacher", "student"} if make is distillation.iad else {"robust", "natural"}
    assert {name for name in metrics if "/" in name} == {f"loss/{name}" for name in names}
    right = (student_on(state, moved).argmax(-1) == data()["label"]).mean()
    np.testing.assert_allclose(metrics["adversarial_accuracy"], right, rtol=1e-6)


def test_the_gradient_of_adaads_attack_goes_through_the_teacher():
    """With the teacher's answers held fixed along the way, other images come out."""
    _, state = begin(distillation.adaad(STUDENT, TEACHER, **ATTACK))

    @jax.jit
    def run(batch):
        s = partial(student_on, state)
        hold = jax.lax.stop_gradient
        full = attacked(lambda v: kl(teacher_on(v), s(v)), batch)
        held = attacked(lambda v: kl(hold(teacher_on(v)), s(v)), batch)
        return full, held

    full, held = run(data())
    assert np.abs(full - held).max() > 0.03


def test_what_the_teacher_fails_at_the_student_takes_from_itself():
    batch = {**data(), "label": data()["label"].at[3:].set(-1)}

    def method(beta, **options):
        return distillation.iad(STUDENT, TEACHER, beta=beta, **options, **ATTACK)

    _, state = begin(method(0.1), batch)

    @partial(jax.jit, static_argnums=1)
    def run(beta, full=False):
        learner = kd.minimize(method(beta, full_teacher=full), optax.sgd(0.1))
        options = {"step": state.step, "key": state.key, "axis_name": None}
        seen = method(beta).prepare(state.params, state.extra, batch, FROZEN, **options)
        return learner.update(state, batch, FROZEN)[1], seen

    trusted, seen = run(0.0)
    np.testing.assert_array_equal(seen["trust"], 1)
    np.testing.assert_allclose(trusted["loss/student"], 0, atol=1e-7)
    wanted = kl(teacher_on(batch["image"]), student_on(state, seen["adversarial"])).mean()
    np.testing.assert_allclose(trusted["loss"], wanted, rtol=1e-5)
    partly, seen = run(2.0)
    np.testing.assert_array_equal(seen["trust"][3:], 1)  # no label says that it is wrong
    assert (seen["trust"][:3] < 1).all()
    assert partly["loss/teacher"] < trusted["loss/teacher"]
    assert partly["loss/student"] > 0
    published, _ = run(2.0, True)
    np.testing.assert_allclose(published["loss/teacher"], trusted["loss/teacher"], rtol=1e-5)
    np.testing.assert_allclose(published["loss/student"], partly["loss/student"], rtol=1e-5)


def test_a_warm_up_is_a_schedule():
    beta = optax.join_schedules([lambda t: 0.0, lambda t: 1.0], [1])
    learner, state = begin(distillation.iad(STUDENT, TEACHER, beta=beta, **ATTACK))
    counted = contracts.Counter(learner.update)
    update = jax.jit(counted)
    state, first = update(state, data(), FROZEN)
    _, second = update(state, data(), FROZEN)
    np.testing.assert_allclose(first["loss/student"], 0, atol=1e-7)
    assert second["loss/student"] > 0
    assert counted.calls == 1


@pytest.mark.parametrize("make", [distillation.rslad, distillation.adaad])
def test_robust_soft_labels_need_no_labels(make):
    learner, state = begin(make(STUDENT, TEACHER, ema_decay=0.9, **ATTACK))
    bare = {k: v for k, v in data().items() if k != "label"}
    update = jax.jit(learner.update)
    found, metrics = update(state, bare, FROZEN)
    expected, _ = update(state, {**data(), "label": jnp.full(16, -1)}, FROZEN)
    contracts.assert_close(found, expected)
    assert "adversarial_accuracy" not in metrics
    assert not np.array_equal(found.extra["ema"]["params"]["w0"], found.params["student"]["w0"])


@pytest.mark.parametrize("make", [distillation.iad, distillation.adaad])
def test_padding_changes_nothing(make):
    learner, state = begin(make(STUDENT, TEACHER, **OPTIONS[make], **ATTACK))
    update = jax.jit(learner.update)
    padded = jax.tree.map(lambda x: jnp.concatenate([x, x[:4]]), data())
    padded["image"] = padded["image"].at[16:].set(jnp.nan)
    padded["weight"] = jnp.r_[jnp.ones(16), jnp.zeros(4)]
    expected = update(state, data(), FROZEN)
    contracts.assert_close(update(state, padded, FROZEN), expected, 2e-6)


def test_teachers_may_be_ensembles_or_stored():
    two, stored = kd.ensemble([TEACHER, TEACHER]), kd.from_batch(logits="stored")
    batch = {**data(), "stored": jax.nn.log_softmax(teacher_on(data()["image"]))}
    for make, teacher, frozen in (
        (distillation.iad, two, [FROZEN, FROZEN]),
        (distillation.rslad, stored, None),
    ):
        updated = []
        for one, variables in ((teacher, frozen), (TEACHER, FROZEN)):
            learner, state = begin(make(STUDENT, one, **ATTACK), batch, variables)
            updated.append(jax.jit(learner.update)(state, batch, variables))
        contracts.assert_close(*updated, 1e-5)


@pytest.mark.parametrize(
    ("makes", "change", "error", "text"),
    [
        (FORMS, {"student": 1}, TypeError, "student must be a kdjax.Model"),
        (FORMS, {"teacher": None}, TypeError, "teacher must be a kdjax.Model"),
        (FORMS, {"eps": -1.0}, ValueError, "eps must be a finite number at least 0, got -1"),
        (FORMS, {"forward": "one"}, ValueError, "forward must be one of joint, separate"),
        (FORMS, {"norm": "linf2"}, ValueError, "norm must be one of l2, linf"),
        (FORMS[:2] + FORMS[3:], {"alpha": 1.5}, ValueError, "alpha must be .* at most 1, got 1.5"),
        (FORMS[:1] + FORMS[2:3], {"temperature": 0.0}, ValueError, "temperature must be .* above"),
        (FORMS[2:3], {"beta": -0.1}, ValueError, "beta must be .* at least 0, got -0.1"),
        (FORMS[1:2], {"random_start": False}, ValueError, "random_start must be True"),
        (
            FORMS[2:],
            {"teacher": kd.from_batch(logits="stored")},
            ValueError,
            "teacher must be a network",
        ),
        (
            FORMS[3:],
            {"teacher": kd.ensemble([TEACHER])},
            ValueError,
            "teacher must be a single network",
        ),
        (
            FORMS[2:],
            {"student": STUDENT._replace(inputs=lambda batch: batch["image"])},
            ValueError,
            "student must read one entry",
        ),
    ],
)
def test_factories_refuse(makes, change, error, text):
    for make in makes:
        with pytest.raises(error, match=text):
            make(**{"student": STUDENT, "teacher": TEACHER, **change})


def test_wrong_variables_are_named():
    method = distillation.ard(STUDENT, TEACHER, **ATTACK)
    with pytest.raises(ValueError, match="frozen is missing"):
        begin(method, frozen=None)
    with pytest.raises(ValueError, match=r"frozen does not fit the teacher.*w0"):
        begin(method, frozen=({**FROZEN[0], "w0": jnp.zeros((2, 2))}, {}))
    learner, state = begin(method)
    with pytest.raises(ValueError, match="frozen is missing"):
        jax.eval_shape(learner.update, state, data())


def test_teachers_of_other_classes_are_refused():
    def wide(params, extra, x, *, train=False, key=None):
        return {"logits": jnp.zeros((len(x), CLASSES + 1))}, extra

    teacher = kd.Model(plain().init, wide)
    learner, state = begin(distillation.ard(STUDENT, teacher, **ATTACK))
    with pytest.raises(ValueError, match=r"student_logits must have shape .* teacher_logits"):
        jax.eval_shape(learner.update, state, data(), FROZEN)
