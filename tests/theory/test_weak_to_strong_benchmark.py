"""The weak-to-strong benchmark: who sees which labels, what n does, and what is said of it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kdjax as kd

FOLDER = Path(__file__).parents[2] / "benchmarks"
ROWS, WEAK_ROWS = [20, 60], 40


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("weak_to_strong_digits")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def task(script):
    task = script.digits()
    return task._replace(test_images=task.test_images[:200], test_labels=task.test_labels[:200])


@pytest.fixture(scope="module")
def programs(script):
    """The tiny programs, compiled once for all tests."""
    return script.make_programs(10, script.parse(["--quick"]))


@pytest.fixture(scope="module")
def ask(script, programs):
    """Trains everything at tiny size for seed 0."""
    options = script.parse(["--quick"])
    assert (options.rows, options.weak_rows) == (ROWS, WEAK_ROWS)
    return lambda task: script.answers(task, programs, options, seed=0)


@pytest.fixture(scope="module")
def usual(ask, task):
    return ask(task)


def roles(task):
    """Rows of the weak models and of the students for seed 0."""
    order = np.random.default_rng(0).permutation(len(task.images))
    return order[:WEAK_ROWS], order[WEAK_ROWS : WEAK_ROWS + max(ROWS)]


def wrong(labels, rows):
    changed = labels.copy()
    changed[rows] = (changed[rows] + 1) % 10
    return changed


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def split_sources(student):
    standard = student["standard"]
    return standard, {key: value for key, value in student.items() if key != "standard"}


def test_split_of_the_digits(script):
    task = script.digits()
    assert task.images.shape == (1300, 8, 8, 1)
    assert task.test_images.shape == (497, 8, 8, 1)
    together = np.concatenate([task.images, task.test_images]).reshape(1797, -1)
    # As many different images as scikit-learn has: no image is on both sides.
    assert len(np.unique(together, axis=0)) == 1797


def test_training_learns(usual, task):
    right = {name: (found == task.test_labels).mean() for name, found in usual.weak.items()}
    assert right["big"] > 0.25
    assert (usual.student["standard"][60] == task.test_labels).mean() > 0.25


def test_no_label_of_the_test_split_is_used(ask, usual, task):
    hidden = ask(task._replace(test_labels=np.full_like(task.test_labels, -1)))
    assert same(hidden, usual)


@pytest.mark.slow
def test_no_test_image_is_trained_on(ask, usual, task):
    images = task.test_images.copy()
    images[:100] = 0.5
    found = ask(task._replace(test_images=images))
    assert same(*(jax.tree.map(lambda x: x[100:], part) for part in (found, usual)))
    assert not same(found, usual)


def test_true_labels_of_the_students_images_reach_the_standard_student_only(ask, usual, task):
    _, student_rows = roles(task)
    found = ask(task._replace(labels=wrong(task.labels, student_rows)))
    (standard, taught), (usual_standard, usual_taught) = map(
        split_sources, (found.student, usual.student)
    )
    # Neither the pretraining nor a weak model nor its student has seen these labels.
    assert same(found.weak, usual.weak)
    assert same(taught, usual_taught)
    assert not same(standard[60], usual_standard[60])


def test_labels_of_the_weak_models_images_reach_their_students(ask, usual, task):
    weak_rows, _ = roles(task)
    found = ask(task._replace(labels=wrong(task.labels, weak_rows)))
    (standard, taught), (usual_standard, usual_taught) = map(
        split_sources, (found.student, usual.student)
    )
    assert same(standard, usual_standard)
    assert not same(found.weak["big"], usual.weak["big"])
    for source in ("big, soft", "big, hard", "medium, soft"):
        assert not same(taught[source][60], usual_taught[source][60])


def test_labels_of_no_other_row_are_used(ask, usual, task):
    others = np.setdiff1d(np.arange(len(task.labels)), np.concatenate(roles(task)))
    assert len(others) == 1200
    assert same(ask(task._replace(labels=wrong(task.labels, others))), usual)


def test_another_n_draws_from_other_rows_and_compiles_nothing(script):
    traces = []
    model = script.perceptron(3, (8,))

    def apply(*args, **kwargs):
        traces.append(1)
        return model.apply(*args, **kwargs)

    train = script.training(kd.Model(model.init, apply, model.inputs), 20, 1e-2)
    inputs = jax.random.uniform(jax.random.key(1), (30, 5))
    targets = jax.nn.one_hot(jnp.arange(30) % 3, 3)

    def logits(n, targets):
        return np.asarray(train(jax.random.key(0), {}, inputs, targets, n, inputs))

    first = logits(10, targets)
    count = len(traces)
    assert count > 0
    beyond, within = targets.at[10:].set(1 / 3), targets.at[:10].set(1 / 3)
    np.testing.assert_array_equal(logits(10, beyond), first)
    assert np.abs(logits(10, within) - first).max() > 1e-3
    assert np.abs(logits(30, beyond) - logits(30, targets)).max() > 1e-3
    assert len(traces) == count


def test_the_student_starts_from_the_body_it_is_given(script):
    model = script.perceptron(3, (8,))
    train = script.training(model, 1, 0.0)
    inputs = jax.random.uniform(jax.random.key(1), (30, 5))
    params, _ = model.init(jax.random.key(2), inputs)
    given = (inputs, jax.nn.one_hot(jnp.arange(30) % 3, 3), 30, inputs)
    body = {"body": params["body"]}
    found = train(jax.random.key(0), body, *given)
    # At learning rate 0 the logits are linear in the given features, with a head of its own.
    features = model.apply(params, {}, inputs)[0]["feature"]
    fitted = features @ jnp.linalg.lstsq(features, found)[0]
    np.testing.assert_allclose(fitted, found, atol=1e-4)
    assert np.abs(found - model.apply(params, {}, inputs)[0]["logits"]).max() > 0.01
    fresh = train(jax.random.key(0), {}, *given)
    assert np.abs(found - fresh).max() > 0.01


@pytest.mark.slow
def test_a_frozen_body_leaves_a_linear_student(script, task):
    options = script.parse(["--quick", "--frozen"])
    programs = script.make_programs(10, options)
    images = jnp.asarray(task.images[:60])
    params = programs.pretrain(jax.random.key(0), jnp.asarray(task.images))
    features = programs.inputs(params, images)
    assert features.shape == (60, 1024)
    layers = script.perceptron(4, script.FROZEN_STRONG).apply(params, {}, images)[0]
    np.testing.assert_allclose(features, layers["feature"], atol=1e-5)
    targets = jax.nn.one_hot(task.labels[:60], 10)
    a, b = features[:30], features[30:]
    questions = jnp.concatenate([a, b, a + b, jnp.zeros((1, 1024))])
    found = programs.student(jax.random.key(1), {}, features, targets, 60, questions)
    np.testing.assert_allclose(found[:30] + found[30:60] - found[-1:], found[60:90], atol=1e-4)
    assert (found[:60].argmax(-1) == task.labels[:60]).mean() > 0.5


@pytest.mark.parametrize("scale", [1, 255])
def test_quarter_turns(script, scale):
    images = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 1)).astype(np.uint8)
    given = images if scale == 255 else (images / 255).astype(np.float32)
    found = script.quarter_turns(jax.random.key(0), {"image": jnp.asarray(given)})
    assert sorted(np.unique(found["label"])) == [0, 1, 2, 3]
    for image, turned, turns in zip(images / 255, found["image"], found["label"], strict=True):
        np.testing.assert_allclose(turned, np.rot90(image, int(turns)), atol=1e-6)


def test_gap_recovered(script):
    found = script.gap_recovered([0.5, 0.5], [0.6, 0.7], [0.9, 0.9])
    assert found.mean == pytest.approx(0.375)
    assert found.values == pytest.approx((0.5, 0.25))
    assert found.error == pytest.approx(0.125)
    assert np.isnan(script.gap_recovered([0.9], [0.8], [0.9]).mean)
    # One seed without a gap spoils a mean of ratios, not this.
    assert script.gap_recovered([0.5, 0.9], [0.7, 0.9], [0.9, 0.9]).mean == pytest.approx(0.5)


def made(script, students, *, seeds=5):
    """A result in which all is constant: weak 0.5, standard 0.9."""
    sources = [f"{width}, {kind}" for width in script.WIDTHS for kind in script.KINDS]
    values = {"standard": 0.9, **dict.fromkeys(sources, 0.7), **students}
    return script.Result(
        {width: [0.5] * seeds for width in script.WIDTHS},
        {source: {100: [value] * seeds} for source, value in values.items()},
    )


def test_verdict(script):
    def said(students, seeds=5):
        return script.verdict(script.gaps(made(script, students, seeds=seeds), 100), seeds)

    assert said({}).startswith("MET")
    assert said({"medium, hard": 0.49}) == "NOT MET: medium, hard."
    assert said({"big, soft": 0.95}) == "NOT MET: big, soft."
    assert said({"small, soft": 0.5}).startswith("NOT MET: small, soft. The small width alone")
    assert "small width" not in said({"small, soft": 0.5, "big, soft": 0.5})
    assert said({}, seeds=4).startswith("Not judged")
    exceptions = script.exceptions(made(script, {"big, soft": 0.95}))
    assert "n = 100, big, soft (+5.0 ± 0.0)" in exceptions
    assert script.exceptions(made(script, {})).endswith("no n.")


def test_it_runs_on_a_file(script, programs, task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "make_programs", lambda classes, options: programs)
    file, out = tmp_path / "some.npz", tmp_path / "out"
    train, test = ((255 * x[..., 0]).astype(np.uint8) for x in (task.images, task.test_images))
    np.savez(file, x_train=train, y_train=task.labels, x_test=test, y_test=task.test_labels)
    script.main(["--quick", "--data", str(file), "--out", str(out)])
    shown = capsys.readouterr().out
    assert "some, whole network, 1300 training and 200 test images, 2 seeds" in shown
    assert "in brackets" not in shown
    assert "Not judged" in shown
    numbers = json.loads((out / "weak_to_strong.json").read_text())
    accuracy = numbers["accuracy"]["student"]
    assert set(accuracy) == {"standard", *numbers["gaps"]}
    assert all(len(seeds) == 2 for one in accuracy.values() for seeds in one.values())
    mean = 100 * np.mean(accuracy["standard"]["60"])
    assert f"{mean:.1f} ±" in shown
    assert (out / "weak_to_strong.png").read_bytes()[:4] == b"\x89PNG"


def test_too_few_images(script):
    with pytest.raises(ValueError, match="rows and weak_rows must ask for at most the 1300"):
        script.main(["--rows", "1001"])


def test_images_that_cannot_be_turned(script):
    images = np.zeros((4, 8, 6, 1), np.float32)
    part = {"image": images, "label": np.arange(4)}
    with pytest.raises(ValueError, match="data must hold square images"):
        script.task_of(kd.data.arrays({"train": part, "test": part}))
