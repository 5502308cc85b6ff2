"""Metrics and logits over a split, and stored labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train import tiny_run as tiny

import kdjax as kd

CLASSES = 10
STUDENT = kd.from_fn(
    lambda key, x: 3.0 * jax.random.normal(key, (64, CLASSES)),
    lambda params, x: x.reshape(len(x), -1) @ params,
)


@pytest.fixture(scope="module")
def digits():
    return kd.data.digits()


@pytest.fixture(scope="module")
def variables():
    return STUDENT.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


def whole(dataset, variables, split="test"):
    rows = dataset.read(split)
    return STUDENT.apply(*variables, rows["image"])[0]["logits"], rows["label"]


@pytest.mark.parametrize("size", [50, 64, 1000])
@pytest.mark.parametrize("devices", [None, 2])
def test_equals_the_metrics_of_the_whole_split(digits, variables, size, devices):
    mesh = None if devices is None else kd.parallel.data_mesh(devices)
    found = kd.train.evaluate(STUDENT, variables, digits.once("test", size), mesh=mesh)
    logits, labels = whole(digits, variables)
    probs = jax.nn.softmax(logits)
    expected = {
        "accuracy": kd.metrics.accuracy(logits, labels),
        "nll": kd.metrics.negative_log_likelihood(logits, labels),
        "brier": kd.metrics.brier_score(probs, labels),
        "ece": kd.metrics.expected_calibration_error(probs, labels),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert type(found[name]) is float
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_unlabelled_rows_and_padding_do_not_count(digits, variables):
    rows = digits.read("test", np.arange(30))
    kept = {k: v[:20] for k, v in rows.items()}
    spoilt = {k: v.copy() for k, v in rows.items()}
    spoilt["label"][20:25] = -1
    spoilt["image"][25:] = np.nan
    spoilt["weight"] = (np.arange(30) < 25).astype(np.float32)
    for name, value in kd.train.evaluate(STUDENT, variables, [spoilt]).items():
        expected = kd.train.evaluate(STUDENT, variables, [kept])[name]
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)
    nothing = kd.train.evaluate(STUDENT, variables, [{**kept, "label": np.full(20, -1)}])
    assert all(np.isnan(value) for value in nothing.values())


def test_own_metrics_with_and_without_weights(digits, variables):
    def margin(outputs, batch):
        top = jax.lax.top_k(outputs["logits"], 2)[0]
        return top[:, 0] - top[:, 1]

    def accuracy_on_sevens(outputs, batch):
        return outputs["logits"].argmax(-1) == batch["label"], batch["label"] == 7

    found = kd.train.evaluate(
        STUDENT,
        variables,
        digits.once("test", 50),
        metrics={"margin": margin, "sevens": accuracy_on_sevens},
    )
    logits, labels = whole(digits, variables)
    top = np.sort(logits, axis=-1)
    np.testing.assert_allclose(found["margin"], (top[:, -1] - top[:, -2]).mean(), rtol=1e-5)
    right = (logits.argmax(-1) == labels)[labels == 7]
    np.testing.assert_allclose(found["sevens"], right.mean(), rtol=1e-6)


@pytest.mark.parametrize("length", [3, 4])
def test_weights_of_examples_go_to_all_values_of_their_row(length):
    values = jnp.arange(4.0 * length).reshape(4, length) ** 2

    def by_example(outputs, batch):
        return outputs["logits"], batch["mask"]

    def by_position(outputs, batch):
        return outputs["logits"], jnp.broadcast_to(batch["mask"][:, None], (4, length))

    model = kd.from_fn(lambda key, x: {}, lambda params, x: x, inputs="x")
    batch = {"x": values, "mask": jnp.array([1.0, 0.0, 0.0, 3.0])}
    metrics = {"example": by_example, "position": by_position}
    found = kd.train.evaluate(model, ({}, {}), [batch], metrics=metrics)
    expected = np.average(values.mean(1), weights=batch["mask"])
    np.testing.assert_allclose([*found.values()], expected, rtol=1e-6)


LOGITS = kd.from_fn(lambda key, x: {}, lambda params, x: x, inputs="x")


def of_logits(logits, label):
    return kd.train.evaluate(LOGITS, ({}, {}), [{"x": logits, "label": label}])


def test_a_row_with_a_nan_logit_is_wrong():
    logits = 9.0 * jnp.eye(4)
    assert of_logits(logits, jnp.arange(4))["accuracy"] == 1.0
    assert of_logits(jnp.full((4, 4), jnp.nan), jnp.zeros(4, int))["accuracy"] == 0.0
    found = of_logits(logits.at[0, 1].set(jnp.nan), jnp.array([1, 1, 2, 3]))
    assert found.pop("accuracy") == 0.75
    assert all(np.isnan(value) for value in found.values())


@pytest.mark.parametrize("bad", [-2, 4, 2**31 - 1])
def test_a_label_that_is_no_class_shows(bad):
    found = of_logits(9.0 * jnp.eye(4), jnp.array([0, 1, bad, 3]))
    assert all(np.isnan(value) for value in found.values())
    padded = {"x": 9.0 * jnp.eye(4), "label": jnp.array([0, 1, bad, 3])}
    padded["weight"] = jnp.array([1.0, 1.0, 0.0, 1.0])
    assert kd.train.evaluate(LOGITS, ({}, {}), [padded])["accuracy"] == 1.0


def test_small_integers_hold_labels_of_many_classes():
    logits = jnp.zeros((2, 300)).at[:, 40].set(9.0)  # int8(296) is 40
    label = np.array([40, -1], np.int8)
    assert of_logits(logits, label) == of_logits(logits, label.astype(np.int32))
    assert of_logits(logits, label)["accuracy"] == 1.0


def test_model_is_in_evaluation_mode_and_traced_once(digits, variables):
    traces = []

    def apply(params, extra, inputs, *, train=False, key=None):
        traces.append((train, key))
        return STUDENT.apply(params, extra, inputs, train=train, key=key)

    model = STUDENT._replace(apply=apply)
    for scale in (1.0, 2.0, 3.0):
        scaled = jax.tree.map(lambda x, s=scale: s * x, variables)
        kd.train.evaluate(model, scaled, digits.once("test", 64))
    assert traces == [(False, None)]
    for _ in range(2):
        kd.train.predict(model, variables, digits.once("test", 64))
    assert traces == [(False, None)] * 2


def test_predict_is_in_index_order_without_padding(digits, variables):
    logits, _ = whole(digits, variables)
    shuffled = digits.batches("test", 50, seed=3, last="pad", epochs=1)
    found = kd.train.predict(STUDENT, variables, shuffled)
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)
    rows = digits.read("test", np.array([5, 2, 9]))
    del rows["index"]
    bare = kd.train.predict(STUDENT, variables, [rows])
    np.testing.assert_allclose(bare, logits[np.array([5, 2, 9])], rtol=1e-5, atol=1e-5)


def test_forms_of_variables(digits, variables):
    rows = [digits.read("test", np.arange(30))]
    state = kd.State(jnp.int32(0), jax.random.key(0), *({"student": v} for v in variables), {})
    expected = kd.train.evaluate(STUDENT, variables, rows)
    assert kd.train.evaluate(STUDENT, state, rows) == expected
    assert kd.train.evaluate(STUDENT, {"params": variables[0]}, rows) == expected
    assert kd.train.evaluator(STUDENT, rows)(state) == expected


def test_evaluator_in_fit(tmp_path):
    batches = [{"x": tiny.X, "label": tiny.Y}]
    options = {"evaluate": kd.train.evaluator(tiny.MODEL, batches), "eval_every": 20}
    state = tiny.run(tmp_path, 60, best="nll", save_every=20, keep=1, **options)
    best = kd.train.restore(tmp_path, state, step="best")
    scores = kd.train.evaluate(tiny.MODEL, best, batches)
    assert scores["nll"] <= kd.train.evaluate(tiny.MODEL, tiny.start(), batches)["nll"]
    assert scores["accuracy"] == pytest.approx(tiny.held_out(best)["accuracy"])


def test_predict_labels_stores_what_predict_gives(digits, variables, tmp_path):
    options = {"split": "test", "batch_size": 50, "progress": False, "teacher": "linear"}
    path = tmp_path / "labels"
    stored = kd.train.predict_labels(STUDENT, variables, digits, path, **options)
    found = kd.train.predict(STUDENT, variables, digits.once("test", 50))
    np.testing.assert_array_equal(stored.arrays["logits"], found)
    again = kd.train.predict_labels(STUDENT, variables, digits, path, **options)
    assert again.manifest == stored.manifest
    other = jax.tree.map(lambda x: x + 1, variables)
    with pytest.raises(ValueError, match="teacher"):
        kd.train.predict_labels(STUDENT, other, digits, path, **options)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda v, b: kd.train.evaluate(STUDENT, v, []), ValueError, "at least one batch"),
        (lambda v, b: kd.train.evaluate(STUDENT, v, b), TypeError, "batches must be an iterable"),
        (lambda v, b: kd.train.evaluate(STUDENT, 3, [b]), ValueError, "variables must be"),
        (lambda v, b: kd.train.evaluate(3, v, [b]), TypeError, "model must be a kdjax.Model"),
        (lambda v, b: kd.train.evaluator(3, [b]), TypeError, "model must be a kdjax.Model"),
        (lambda v, b: kd.train.predict(3, v, [b]), TypeError, "model must be a kdjax.Model"),
        (
            lambda v, b: kd.train.evaluate(STUDENT, kd.State(0, 0, {"a": 1}, {}, {}), [b]),
            ValueError,
            "variables must be a State with a student, got one whose params has no",
        ),
        (
            lambda v, b: kd.train.evaluate(STUDENT, v, [b], metrics=["accuracy"]),
            TypeError,
            "metrics must be a dict of name -> function, got list",
        ),
        (
            lambda v, b: kd.train.evaluate(STUDENT, v, [b], metrics={"m": "accuracy"}),
            TypeError,
            "metrics must be a dict of name -> function, got dict",
        ),
        (
            lambda v, b: kd.train.evaluate(
                STUDENT, v, [b], metrics={"m": lambda o, b: (o["logits"], jnp.ones(CLASSES))}
            ),
            ValueError,
            r"weights of metrics\['m'\] must have the shape of its values, \(4, 10\)",
        ),
        (
            lambda v, b: kd.train.evaluate(STUDENT, v, [b], metrics={"m": lambda o, b: "a"}),
            TypeError,
            r"the values of metrics\['m'\] must be an array",
        ),
        (
            lambda v, b: kd.train.evaluate(STUDENT, v, [{"image": b["image"]}]),
            ValueError,
            "batch has no entry 'label'",
        ),
        (
            lambda v, b: kd.train.evaluate(STUDENT, v, [b], metrics={"m": lambda o, b: 1.0}),
            ValueError,
            r"metrics\['m'\] must return per-example values",
        ),
        (
            lambda v, b: kd.train.evaluate(STUDENT, v, [{**b, "label": b["label"] * 1.0}]),
            TypeError,
            r"batch\['label'\] must be an integer array",
        ),
        (lambda v, b: kd.train.evaluator(STUDENT, iter([b])), TypeError, "must be re-iterable"),
        (lambda v, b: kd.train.predict(STUDENT, v, [b]), ValueError, None),
    ],
)
def test_bad_arguments(digits, variables, call, error, text):
    batch = digits.read("test", np.arange(4))
    if text is None:  # a model without logits
        model = STUDENT._replace(apply=lambda p, e, x, train, key: ({"out": x}, e))
        with pytest.raises(ValueError, match="the model's outputs has no entry 'logits'"):
            kd.train.predict(model, variables, [batch])
        return
    with pytest.raises(error, match=text):
        call(variables, batch)
