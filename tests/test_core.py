"""distill, minimize, teachers: what they compute, and how they answer mistakes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import assert_close, assert_same_bits
from method_cases import LinenMLP, batch, linen, plain

import kdjax as kd
from kdjax.core import Term

SOFT = {"soft": (1.0, kd.terms.soft_labels(temperature=2.0))}


def no_params(key, student_out, teacher_out):
    return {}


def teacher_variables(seed=1):
    return plain().init(jax.random.key(seed), batch()["image"])


def one_update(method, frozen=None, data=None, optimizer=None, **options):
    learner = kd.minimize(method, optimizer or optax.sgd(0.1), **options)
    data = batch() if data is None else data
    state = learner.init(jax.random.key(0), data, frozen=frozen)
    return state, jax.jit(learner.update)(state, data, frozen)


def test_loss_is_the_weighted_sum_of_means():
    method = kd.distill(
        plain(),
        plain(),
        {
            "hard": (0.3, kd.terms.hard_labels()),
            "soft": (0.7, kd.terms.soft_labels(temperature=2.0)),
        },
    )
    frozen, data = teacher_variables(), batch()
    state, (after, metrics) = one_update(method, frozen)
    s = np.asarray(plain().apply(state.params["student"], {}, data["image"])[0]["logits"])
    t = np.asarray(plain().apply(*frozen, data["image"])[0]["logits"])

    def log_softmax(z):
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    label = np.asarray(data["label"])
    rows = label >= 0
    hard = -log_softmax(s)[rows, label[rows]].mean()
    p = np.exp(log_softmax(t / 2))
    soft = (4 * p * (log_softmax(t / 2) - log_softmax(s / 2))).sum(-1).mean()
    np.testing.assert_allclose(metrics["loss/hard"], hard, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/soft"], soft, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], 0.3 * hard + 0.7 * soft, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (s.argmax(-1) == label)[rows].mean())
    assert int(after.step) == 1


def test_update_is_one_sgd_step_of_the_loss():
    method = kd.distill(plain(), plain(), SOFT)
    frozen, data = teacher_variables(), batch()
    state, (after, _) = one_update(method, frozen)

    def loss(student):
        s = plain().apply(student, {}, data["image"])[0]["logits"]
        t = plain().apply(*frozen, data["image"])[0]["logits"]
        return kd.losses.soft_label_kl(s, t, temperature=2.0).mean()

    grads = jax.grad(loss)(state.params["student"])
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params["student"], grads)
    assert_close(after.params["student"], expected)


def test_a_weight_may_be_a_schedule_of_the_step():
    weight = optax.piecewise_constant_schedule(1.0, {1: 0.0})
    method = kd.distill(plain(), plain(), {"soft": (weight, kd.terms.soft_labels())})
    learner = kd.minimize(method, optax.sgd(0.1))
    frozen, data = teacher_variables(), batch()
    state = learner.init(jax.random.key(0), data, frozen=frozen)
    first, metrics = learner.update(state, data, frozen)
    assert float(metrics["loss"]) > 0
    second, metrics = learner.update(first, data, frozen)
    third, metrics = learner.update(second, data, frozen)
    assert float(metrics["loss"]) == 0
    assert float(metrics["loss/soft"]) > 0
    assert_same_bits(third.params, second.params)


def test_weights_and_values_give_a_weighted_mean():
    weights = jnp.arange(16.0)

    def loss(tparams, student_out, teacher_out, batch, *, step, key):
        return student_out["logits"][:, 0], weights

    method = kd.distill(plain(), None, {"first": (1.0, Term(no_params, loss))})
    state, (_, metrics) = one_update(method)
    logits = plain().apply(state.params["student"], {}, batch()["image"])[0]["logits"]
    np.testing.assert_allclose(
        metrics["loss"], (logits[:, 0] * weights).sum() / weights.sum(), rtol=1e-5
    )


@pytest.mark.parametrize("entry", ["image", "teacher_logits"])
def test_rows_of_weight_zero_may_hold_nan(entry):
    data = {**batch(), "teacher_logits": jnp.ones((16, 5)).at[:, 0].set(2.0)}
    data["weight"] = jnp.ones(16).at[3].set(0.0)
    spoilt = {**data, entry: data[entry].at[3].set(jnp.nan)}
    terms = {"hard": (1.0, kd.terms.hard_labels()), **SOFT}
    method = kd.distill(plain(), kd.from_batch(logits="teacher_logits"), terms)
    _, expected = one_update(method, None, data)
    _, found = one_update(method, None, spoilt)
    assert_close(found, expected)


def test_a_batch_without_labelled_rows():
    data = {**batch(), "label": jnp.full(16, -1)}
    terms = {"hard": (1.0, kd.terms.hard_labels()), **SOFT}
    _, (state, metrics) = one_update(kd.distill(plain(), plain(), terms), teacher_variables(), data)
    assert float(metrics["loss/hard"]) == 0
    assert np.isnan(metrics["accuracy"])
    assert float(metrics["loss"]) == float(metrics["loss/soft"]) > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_teacher_runs_in_evaluation_mode_and_student_in_training_mode():
    seen = []

    def model(name):
        def apply(params, extra, inputs, *, train=False, key=None):
            seen.append((name, train, key is not None))
            return plain().apply(params, extra, inputs)

        return plain()._replace(apply=apply)

    method = kd.distill(model("student"), model("teacher"), SOFT)
    state, _ = one_update(method, teacher_variables())
    assert set(seen) == {("student", True, True), ("teacher", False, False)}
    assert "teacher" not in state.params


def test_batch_norm_moves_once_per_update():
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            return nn.Dense(5)(x)

    method = kd.distill(kd.from_linen(Net()), plain(), SOFT)
    frozen, data = teacher_variables(), batch()
    _, (after, _) = one_update(method, frozen)
    mean = after.extra["student"]["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.1 * data["image"].mean(0), rtol=1e-4, atol=1e-7)


def test_teacher_variables_come_in_three_forms():
    flax_form = LinenMLP().init(jax.random.key(1), batch()["image"])
    _, (first, _) = one_update(kd.distill(plain(), linen(), SOFT), flax_form)
    _, (second, _) = one_update(kd.distill(plain(), linen(), SOFT), (flax_form["params"], {}))
    assert_same_bits(first, second)
    both = kd.ensemble([linen(), linen()])
    _, (third, _) = one_update(kd.distill(plain(), both, SOFT), [flax_form, flax_form])
    assert_close(first.params, third.params)


def test_ensemble_averages_probabilities():
    frozen, data = [teacher_variables(1), teacher_variables(2)], batch()
    each = [plain().apply(*v, data["image"])[0]["logits"] for v in frozen]
    out, _ = kd.ensemble([plain(), plain()], weights=[3.0, 1.0]).apply(frozen, {}, data)
    expected = 0.75 * jax.nn.softmax(each[0]) + 0.25 * jax.nn.softmax(each[1])
    np.testing.assert_allclose(jax.nn.softmax(out["logits"]), expected, rtol=1e-5)
    geometric, _ = kd.ensemble([plain(), plain()], geometric=True).apply(frozen, {}, data)
    np.testing.assert_allclose(geometric["logits"], (each[0] + each[1]) / 2, rtol=1e-5)
    assert out["1/hidden"].shape == (16, 8)


def test_ensemble_of_one_is_that_teacher():
    single = kd.distill(plain(), plain(), SOFT)
    several = kd.distill(plain(), kd.ensemble([plain()]), SOFT)
    _, (a, _) = one_update(single, teacher_variables())
    _, (b, _) = one_update(several, [teacher_variables()])
    assert_close(a.params, b.params)


def test_from_batch_takes_functions():
    data = {**batch(), "stored": jnp.ones((16, 5))}
    teacher = kd.from_batch(logits=lambda batch: 2 * batch["stored"])
    assert teacher.apply({}, {}, data)[0]["logits"][0, 0] == 2
    _, (_, metrics) = one_update(kd.distill(plain(), teacher, SOFT), None, data)
    assert np.isfinite(metrics["loss"])


def test_models_may_read_different_entries():
    data = {**batch(), "other": jnp.ones((16, 6))}
    teacher = plain()._replace(inputs="other")
    student = plain()._replace(inputs=lambda batch: batch["image"] * 0)
    method = kd.distill(student, teacher, SOFT)
    _, (_, metrics) = one_update(method, teacher_variables(), data)
    assert float(metrics["loss"]) > 0


def test_sweep_by_vmap_equals_single_runs():
    frozen, data = teacher_variables(), batch()

    def make(rate):
        method = kd.distill(plain(), plain(), SOFT)
        return kd.minimize(method, optax.inject_hyperparams(optax.sgd)(learning_rate=rate))

    def run(rate):
        learner = make(rate)
        state = learner.init(jax.random.key(0), data, frozen)
        return learner.update(state, data, frozen)[0].params

    rates = jnp.array([0.1, 1.0])
    together = jax.vmap(run)(rates)
    for i, rate in enumerate(rates):
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), run(rate), 1e-5)


def test_microbatches_in_a_loop_equal_unrolled_ones():
    method = kd.distill(plain(), plain(), SOFT)
    _, (a, _) = one_update(method, teacher_variables(), microbatches=4, unroll=False)
    _, (b, _) = one_update(method, teacher_variables(), microbatches=4, unroll=True)
    assert_close(a.params, b.params)


def test_counting_pass_costs_no_forward_pass():
    """Counts that depend on labels alone compile to no second forward pass of the models."""
    terms = {"hard": (1.0, kd.terms.hard_labels()), **SOFT}
    learner = kd.minimize(kd.distill(plain(), plain(), terms), optax.sgd(0.1), microbatches=2)
    frozen, data = teacher_variables(), batch()
    state = learner.init(jax.random.key(0), data, frozen)
    sliced = jax.jit(learner.update).lower(state, data, frozen).compile()
    # 2 slices x (2 forward products each for student and teacher, 3 products backward).
    assert sliced.as_text().count(" dot(") <= 2 * (2 + 2 + 3)


def test_microbatches_save_memory():
    """Also unrolled, where the compiler would gladly compute all slices side by side."""

    def init(key, x):
        return {"w": jax.random.normal(key, (x.shape[-1], 5))}

    def wide(params, x):
        for _ in range(4):
            x = jnp.tanh(jnp.sin(x) @ jnp.ones((x.shape[-1], x.shape[-1])))
        return x @ params["w"]

    student = kd.from_fn(init, lambda params, x: wide(params, x * params["w"].sum()))
    method = kd.distill(student, None, {"hard": (1.0, kd.terms.hard_labels())})
    data = {"image": jnp.ones((512, 128)), "label": jnp.arange(512) % 5}

    def temporaries(microbatches):
        learner = kd.minimize(method, optax.sgd(0.1), microbatches=microbatches, unroll=True)
        state = learner.init(jax.random.key(0), data)
        compiled = jax.jit(learner.update).lower(state, data).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4) < 0.6 * temporaries(1)


def test_augmentation_of_a_batch_is_the_same_in_slices():
    """Also where its draws belong to the batch: nothing repeats from slice to slice."""

    def augment(key, batch):
        noise = jax.random.normal(key, batch["image"].shape)
        return {**batch, "image": batch["image"] + noise}

    method = kd.distill(plain(), plain(), SOFT, augment=augment)
    _, (whole, _) = one_update(method, teacher_variables())
    _, (sliced, _) = one_update(method, teacher_variables(), microbatches=4)
    assert_close(whole.params, sliced.params)


def test_augmentation_may_change_shapes_and_entries():
    def augment(key, batch):
        return {"view": batch["image"][:, :4], **batch}

    student = plain()._replace(inputs="view")
    method = kd.distill(student, None, {"hard": (1.0, kd.terms.hard_labels())}, augment=augment)
    state, (_, metrics) = one_update(method)
    assert state.params["student"]["w0"].shape == (4, 8)
    assert np.isfinite(metrics["loss"])


def test_weights_belong_to_leading_axes():
    """Of values [B, T] with B = T, weights [B] are those of the examples."""
    weights = jnp.zeros(16).at[2].set(1.0)

    def loss(tparams, student_out, teacher_out, batch, *, step, key):
        return jnp.arange(256.0).reshape(16, 16), weights

    method = kd.distill(plain(), None, {"each": (1.0, Term(no_params, loss))})
    _, (_, metrics) = one_update(method)
    np.testing.assert_allclose(metrics["loss"], np.arange(32, 48).mean())


def test_logits_of_nan_are_no_answer():
    data = batch()
    student = kd.from_fn(lambda key, x: {"w": jnp.full((6, 5), jnp.nan)}, lambda p, x: x @ p["w"])
    method = kd.distill(student, None, {"hard": (1.0, kd.terms.hard_labels())})
    _, (_, metrics) = one_update(method, None, data)
    assert float(metrics["accuracy"]) == 0.0


def test_labels_that_are_no_class_show_as_nan():
    data = {**batch(), "label": batch()["label"].at[0].set(-100)}
    method = kd.distill(plain(), None, {"hard": (1.0, kd.terms.hard_labels())})
    _, (_, metrics) = one_update(method, None, data)
    assert np.isnan(metrics["loss"])


def test_optimizers_that_keep_the_first_parameters_can_be_donated():
    method = kd.distill(plain(), None, {"hard": (1.0, kd.terms.hard_labels())})
    learner = kd.minimize(method, optax.contrib.prodigy())
    state = learner.init(jax.random.key(0), batch())
    step = jax.jit(learner.update, donate_argnums=0)
    for _ in range(2):
        state, _ = step(state, batch())
    assert int(state.step) == 2


class TestMistakes:
    @pytest.mark.parametrize("model", [LinenMLP(), 3, None])
    def test_a_bare_module(self, model):
        with pytest.raises(TypeError, match=r"student must be a kdjax.Model; wrap it"):
            kd.distill(model, None, SOFT)
        if model is not None:
            with pytest.raises(TypeError, match=r"teacher must be a kdjax.Model"):
                kd.distill(plain(), model, SOFT)
            with pytest.raises(TypeError, match=r"models\[1\] must be a kdjax.Model"):
                kd.ensemble([plain(), model])

    def test_wrong_kinds_for_minimize(self):
        method = kd.distill(plain(), plain(), SOFT)
        with pytest.raises(TypeError, match="optimizer must be an optax transformation"):
            kd.minimize(method, 0.1)
        with pytest.raises(TypeError, match=r"method must be a kdjax.Method"):
            kd.minimize(plain(), optax.sgd(0.1))
        with pytest.raises(TypeError, match="augment must be a function"):
            kd.distill(plain(), None, SOFT, augment=3)

    def test_a_batch_that_is_an_array(self):
        learner = kd.minimize(kd.distill(plain(), plain(), SOFT), optax.sgd(0.1))
        with pytest.raises(TypeError, match="batch must be a dict of arrays"):
            learner.init(jax.random.key(0), jnp.ones((4, 6)), teacher_variables())

    def test_unscaled_images(self):
        data = {**batch(), "image": jnp.ones((16, 6), jnp.uint8)}
        with pytest.raises(TypeError, match=r"batch\['image'\] must be floating, got uint8"):
            one_update(kd.distill(plain(), plain(), SOFT), teacher_variables(), data)

    def test_an_empty_batch(self):
        empty = jax.tree.map(lambda x: x[:0], batch())
        with pytest.raises(ValueError, match="batch must have examples, got none"):
            one_update(kd.distill(plain(), plain(), SOFT), teacher_variables(), empty)

    def test_weights_of_another_shape(self):
        def loss(tparams, student_out, teacher_out, batch, *, step, key):
            return jnp.ones((16, 3)), jnp.ones(8)

        method = kd.distill(plain(), None, {"each": (1.0, Term(no_params, loss))})
        with pytest.raises(ValueError, match=r"weights of the term 'each' .* got \(8,\)"):
            one_update(method)

    def test_a_schedule_that_is_no_number(self):
        soft = (lambda step: jnp.ones(1), kd.terms.soft_labels())
        with pytest.raises(ValueError, match=r"weight of terms\['soft'\] must be a number"):
            one_update(kd.distill(plain(), plain(), {"soft": soft}), teacher_variables())

    @pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
    def test_a_temperature_out_of_range(self, temperature):
        with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
            kd.terms.soft_labels(temperature=temperature)

    def test_ensemble_variables_in_a_tuple(self):
        method = kd.distill(plain(), kd.ensemble([plain(), plain()]), SOFT)
        with pytest.raises(ValueError, match="list of the variables of 2 teachers"):
            one_update(method, (teacher_variables(), teacher_variables()))

    def test_ensemble_weights_of_zero(self):
        with pytest.raises(ValueError, match="weights must not all be 0"):
            kd.ensemble([plain(), plain()], weights=[0.0, 0.0])

    def test_frozen_missing(self):
        method = kd.distill(plain(), plain(), SOFT)
        with pytest.raises(ValueError, match="frozen is missing"):
            one_update(method)
        learner = kd.minimize(method, optax.sgd(0.1))
        state = learner.init(jax.random.key(0), batch(), teacher_variables())
        with pytest.raises(ValueError, match="frozen is missing"):
            jax.jit(learner.update)(state, batch())

    def test_frozen_of_another_model(self):
        method = kd.distill(plain(), linen(), SOFT)
        with pytest.raises(ValueError, match="frozen does not fit the teacher: its params lack"):
            one_update(method, teacher_variables())

    def test_frozen_of_another_width(self):
        method = kd.distill(plain(), plain(), SOFT)
        wide = plain().init(jax.random.key(0), jnp.ones((2, 9)))
        with pytest.raises(
            ValueError, match=r"frozen .* w0 must have shape \(6, 8\), got \(9, 8\)"
        ):
            one_update(method, wide)

    def test_frozen_replaced_later(self):
        method = kd.distill(plain(), plain(), SOFT)
        learner = kd.minimize(method, optax.sgd(0.1))
        state = learner.init(jax.random.key(0), batch(), teacher_variables())
        wide = plain().init(jax.random.key(0), jnp.ones((2, 9)))
        with pytest.raises(ValueError, match="frozen does not fit"):
            learner.update(state, batch(), wide)

    def test_frozen_of_no_known_form(self):
        method = kd.distill(plain(), plain(), SOFT)
        with pytest.raises(ValueError, match="frozen must be the teacher's variables"):
            one_update(method, {"w": jnp.ones(3)})

    def test_ensemble_with_too_few_variables(self):
        method = kd.distill(plain(), kd.ensemble([plain(), plain()]), SOFT)
        with pytest.raises(ValueError, match="list of the variables of 2 teachers, got 1"):
            one_update(method, [teacher_variables()])

    def test_logits_of_different_width(self):
        data = {**batch(), "teacher_logits": jnp.ones((16, 7))}
        method = kd.distill(plain(), kd.from_batch(logits="teacher_logits"), SOFT)
        with pytest.raises(ValueError, match=r"student_logits must have shape \(16, 7\)"):
            one_update(method, None, data)

    def test_batch_without_the_inputs(self):
        data = {k: v for k, v in batch().items() if k != "image"}
        method = kd.distill(plain(), plain(), SOFT)
        with pytest.raises(ValueError, match="batch has no entry 'image'; it has index, label"):
            kd.minimize(method, optax.sgd(0.1)).init(jax.random.key(0), data, teacher_variables())

    def test_stored_outputs_missing_from_the_batch(self):
        method = kd.distill(plain(), kd.from_batch(logits="teacher_logits"), SOFT)
        with pytest.raises(ValueError, match="no entry 'teacher_logits'"):
            one_update(method)

    def test_no_teacher(self):
        with pytest.raises(ValueError, match="teacher must not be None"):
            one_update(kd.distill(plain(), None, SOFT))

    def test_unknown_tap(self):
        term = kd.terms.soft_labels(student="nothing")
        with pytest.raises(ValueError, match=r"student's outputs has no entry 'nothing'.*taps="):
            one_update(kd.distill(plain(), plain(), {"soft": (1.0, term)}), teacher_variables())

    @pytest.mark.parametrize(
        ("terms", "error", "message"),
        [
            ({}, ValueError, "at least one"),
            ([("soft", 1)], TypeError, "terms must be a dict"),
            ({"soft": kd.terms.soft_labels()}, TypeError, r"terms\['soft'\] must be a \(weight"),
            ({"soft": (kd.terms.soft_labels(), 1.0)}, TypeError, r"terms\['soft'\]"),
            ({"soft": (float("nan"), kd.terms.soft_labels())}, ValueError, "weight of terms"),
            ({"soft": ("1", kd.terms.soft_labels())}, TypeError, "weight of terms"),
            ({"accuracy": (1.0, kd.terms.soft_labels())}, ValueError, "names other than"),
        ],
    )
    def test_terms(self, terms, error, message):
        with pytest.raises(error, match=message):
            kd.distill(plain(), plain(), terms)

    def test_legacy_key(self):
        learner = kd.minimize(kd.distill(plain(), plain(), SOFT), optax.sgd(0.1))
        with pytest.raises(TypeError, match="key must be a typed key"):
            learner.init(jax.random.PRNGKey(0), batch(), teacher_variables())

    @pytest.mark.parametrize("microbatches", [0, 1.5, True])
    def test_microbatches_of_a_wrong_kind(self, microbatches):
        with pytest.raises((ValueError, TypeError), match="microbatches must be an integer"):
            kd.minimize(kd.distill(plain(), None, SOFT), optax.sgd(1), microbatches=microbatches)

    def test_microbatches_that_do_not_divide(self):
        method = kd.distill(plain(), plain(), SOFT)
        with pytest.raises(ValueError, match="microbatches must divide the batch size, got 3"):
            one_update(method, teacher_variables(), microbatches=3)

    def test_microbatches_of_a_reduced_loss(self):
        method = kd.distill(plain(), plain(), SOFT)._replace(parts=None)
        with pytest.raises(ValueError, match="from_parts"):
            kd.minimize(method, optax.sgd(0.1), microbatches=2)

    def test_example_weights_of_another_length(self):
        data = {**batch(), "weight": jnp.ones(8)}
        with pytest.raises(ValueError, match=r"batch\['weight'\] must have shape \(16,\)"):
            one_update(kd.distill(plain(), plain(), SOFT), teacher_variables(), data)

    @pytest.mark.parametrize(
        ("weights", "error"),
        [([1.0], ValueError), ([1.0, -1.0], ValueError), ([1.0, float("nan")], ValueError)],
    )
    def test_ensemble_weights(self, weights, error):
        with pytest.raises(error, match="weights must"):
            kd.ensemble([plain(), plain()], weights=weights)

    def test_ensemble_of_none(self):
        with pytest.raises(ValueError, match="models must hold at least one"):
            kd.ensemble([])

    def test_from_batch_of_nothing(self):
        with pytest.raises(ValueError, match="at least one output"):
            kd.from_batch()
