"""The projector ablation: what is trained, what is chosen by what, and what is said of it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import kdjax as kd

FOLDER = Path(__file__).parent.parent / "benchmarks"
PAIRS = (("batch", "log_sum"), ("none", "mse"))


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("projector_ablation")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def options(script):
    sizes = ["--steps", "4", "--batch-size", "16", "--student", "mlp-6", "--teacher", "mlp-12"]
    return script.parse([*sizes, "--teacher-steps", "200"])


@pytest.fixture(scope="module")
def task(script, options):
    return script.prepare(options)


@pytest.fixture(scope="module")
def train(script, options, task):
    """``(which, weights) -> measures`` of three trainings, with two branches only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "PAIRS", PAIRS)
        keys = jnp.stack([jax.random.key(0), jax.random.key(0), jax.random.key(1)])
        runs = (jnp.zeros(3, int), jnp.full(3, 4.0), jnp.ones(3), keys)
        program = script.sweep(task, options, "linear").lower(task, *runs).compile()

    def run(which, weights, task=task):
        which, weights = jnp.asarray(which), jnp.asarray(weights, jnp.float32)
        return jax.device_get(program(task, which, jnp.full(3, 4.0), weights, keys))

    return run


def test_the_product_has_all_that_means_something(script):
    found = script.settings(["linear", "mlp-8"], list(script.ALPHAS))
    assert len(set(found)) == len(found)
    assert {s.norm for s in found if s.distance.startswith("correlation")} == {"batch"}
    for projector in ("linear", "mlp-8"):
        for norm in script.NORMS:
            here = [s for s in found if (s.projector, s.norm) == (projector, norm)]
            alphas = {s.alpha for s in here if s.distance == "log_sum"}
            every = projector == "linear" and norm == "batch"
            assert alphas == set(script.ALPHAS if every else script.SOME_ALPHAS)
            assert sum(s.distance == "mse" for s in here) == 1
    assert all((s.norm, s.distance) in script.PAIRS for s in found)


def test_students_see_few_labels_and_the_teacher_all(task):
    assert int((task.train["label"] >= 0).sum()) == 100
    assert int((task.validation["label"] >= 0).sum()) == len(task.validation["label"])
    assert task.teacher_accuracy > 0.5
    assert task.train["teacher_feature"].shape == (1168, 12)


def test_every_branch_is_its_own_term(script):
    """Value and gradient, for all pairs of normalisation and distance."""
    random = np.random.default_rng(0)
    s, t = (random.standard_normal((8, n)).astype(np.float32) for n in (3, 4))
    terms = [kd.terms.projector("f", "f", norm=n, loss=d, alpha=3.0) for n, d in script.PAIRS]
    params = terms[0].init(jax.random.key(0), {"f": s}, {"f": t})

    def value(term, params):
        given = {"axis_name": None} if term.coupled else {}
        options = {"step": jnp.zeros((), int), "key": jax.random.key(0), **given}
        return jnp.mean(term.loss(params, {"f": s}, {"f": t}, {"image": s}, **options))

    scales = list(range(1, len(terms) + 1))

    @jax.jit
    def both(which):
        of_switch = jax.value_and_grad(lambda p: value(script.either(terms, which, scales), p))(
            params
        )
        return of_switch, [jax.value_and_grad(lambda p, t=t: value(t, p))(params) for t in terms]

    seen = set()
    for i in range(len(terms)):
        (loss, gradient), wanted = both(i)
        np.testing.assert_allclose(loss, scales[i] * wanted[i][0], rtol=1e-5)
        kernel, wanted_kernel = gradient["0"]["kernel"], wanted[i][1]["0"]["kernel"]
        np.testing.assert_allclose(kernel, scales[i] * wanted_kernel, rtol=1e-4, atol=1e-6)
        seen.add(round(float(loss), 5))
    assert len(seen) == len(terms)


@pytest.mark.slow
def test_a_sweep_is_the_same_as_single_updates(script, options, task, train):
    """A loop over updates, with one term and no switch, gives what the sweep gives."""
    student = script.network("mlp-6", 10)
    teacher = kd.from_batch(feature="teacher_feature")
    terms = {
        "hard": (1.0, kd.terms.hard_labels()),
        "distance": (0.7, kd.terms.projector("feature", "feature")),
    }
    learner = kd.minimize(kd.distill(student, teacher, terms), script.optimizer(options))
    init_key, rows_key = jax.random.split(jax.random.key(0))
    start = state = learner.init(init_key, jax.tree.map(lambda x: x[:16], task.train))
    update = jax.jit(learner.update)
    for key in jax.random.split(rows_key, 4):
        rows = jax.random.randint(key, (16,), 0, len(task.train["label"]))
        state, _ = update(state, jax.tree.map(lambda x, rows=rows: x[rows], task.train))
    found = train([0, 0, 0], [0.7, 0.7, 0.7])
    for name, of in (("start", start), ("end", state)):
        kernel = of.params["terms"]["distance"]["0"]["kernel"]
        wanted = kd.metrics.log_singular_values(kernel)
        np.testing.assert_allclose(found[f"log_singular_{name}"][0], wanted, atol=1e-4)
        np.testing.assert_array_equal(found["test"][0], found["test"][1])
    assert not np.allclose(found["log_singular_end"][0], found["log_singular_start"][0], atol=1e-3)
    assert not np.allclose(found["log_singular_end"][0], found["log_singular_end"][2], atol=1e-2)


def test_weight_and_distance_matter_and_weight_0_is_the_student_alone(train):
    found = train([0, 1, 0], [0.0, 0.0, 0.0])
    for name in ("test", "validation", "cka", "dead"):
        np.testing.assert_array_equal(found[name][0], found[name][1])
    one, other, more = (
        train(which, [w] * 3) for which, w in (([0] * 3, 1), ([1] * 3, 1), ([0] * 3, 5))
    )
    assert not np.allclose(one["log_singular_end"][0], other["log_singular_end"][0], atol=1e-3)
    assert not np.allclose(one["log_singular_end"][0], more["log_singular_end"][0], atol=1e-3)


def test_no_test_label_is_used_for_training(train, task):
    hidden = {**task.test, "label": jnp.full_like(task.test["label"], -1)}
    found, usual = train([0] * 3, [1] * 3, task._replace(test=hidden)), train([0] * 3, [1] * 3)
    np.testing.assert_array_equal(found["log_singular_end"], usual["log_singular_end"])
    assert np.isnan(found["test"]).all()


def test_the_weight_is_chosen_by_validation(script):
    found = {
        "validation": np.array([[0.5, 0.5], [0.9, 0.7], [0.7, 0.8]]),
        "test": np.array([[0.99, 0.99], [0.6, 0.8], [0.9, 0.9]]),
        "dead": np.arange(6).reshape(3, 2),
        "cka": np.ones((3, 2)),
        "log_singular_start": np.zeros((3, 2, 4)),
        "log_singular_end": np.ones((3, 2, 4)) * np.array([1, 1, -1, -2]),
        "correlation_start": np.full((3, 2), 0.4),
        "correlation_end": np.full((3, 2), 0.3),
    }
    one = script.outcome(found, [0.1, 0.5, 2.0])
    assert one.weight == 0.5
    assert one.test.values == (0.6, 0.8)
    assert one.dead.values == (2.0, 3.0)
    assert (one.grown.mean, one.log_smallest.mean) == (2.0, -2.0)
    alone = {name: found[name] for name in ("validation", "test", "dead", "cka")}
    assert script.outcome(alone, [0.1, 0.5, 2.0]).grown is None


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ([0.1, 0.12, 0.11], "seen"),
        ([-0.1, -0.12, -0.11], "reversed"),
        ([0.1, -0.1, 0.05], "within noise"),
        ([0.0, 0.0, 0.0], "within noise"),
        ([0.1, 0.1], "not judged"),
    ],
)
def test_what_is_said_of_a_trend(script, values, answer):
    estimate = script.estimate(values)
    assert script.Trend("alpha", "accuracy", estimate).answer() == answer


def made_up(script, projectors):
    """Outcomes in which accuracy rises with alpha, and all else is the same."""

    def one(test):
        values = {name: script.estimate([test, test + 0.01, test - 0.01]) for name in "ab"}
        same = script.estimate([3.0, 3.0, 3.0])
        curves = {"start": [0.5, 0.0], "end": [1.0, -1.0]}
        return script.Outcome(1.0, values["a"], same, same, same, same, same, same, curves)

    found = {s: one(0.8 + 0.01 * s.alpha) for s in script.settings(projectors, script.ALPHAS)}
    bare = dict.fromkeys(("grown", "log_smallest", "before", "after"), None) | {"curves": {}}
    return found | {name: one(0.7)._replace(**bare) for name in ("student alone", "soft labels")}


def test_trends_tables_and_figure(script):
    projectors = ["linear", "mlp-8"]
    found = made_up(script, projectors)
    listed = script.trends(found, projectors)
    said = {trend.claim: trend.answer() for trend in listed}
    assert said["accuracy: alpha 4 above alpha 1"] == "seen"
    assert said["accuracy: batch above group (log_sum)"] == "within noise"
    assert {trend.factor for trend in listed} == {"alpha", "normalisation", "projector", "distance"}
    text = script.table(found)
    lines = text.splitlines()
    assert len(lines) == 2 + len(found)
    assert len({line.count("|") for line in lines}) == 1
    assert len({line.count("|") for line in script.trend_table(listed).splitlines()}) == 1
    assert "84.00 ± 0.58" in text
    assert "alpha: of 3 published trends 3 seen" in script.summary(listed)
    figure = Figure()
    script.draw(figure, found, projectors, "title")
    assert len(figure.axes) == 6
    assert all(axes.lines or axes.containers for axes in figure.axes)


def test_bad_options(script, capsys):
    for given in (
        ["--seeds", "0"],
        ["--projectors", "cnn"],
        ["--projectors", "mlp-"],
        ["--alphas", "-1"],
        ["--weights", "0"],
    ):
        with pytest.raises(SystemExit):
            script.parse(given)
        assert given[0] in capsys.readouterr().err
    with pytest.raises(ValueError, match="resnet7"):
        script.network("resnet7", 10)


def test_networks_have_features(script):
    for name, width in (("mlp-6-5", 5), ("resnet8", 64)):
        model = script.network(name, 10)
        image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), image)
        outputs, _ = jax.eval_shape(model.apply, *variables, image)
        assert outputs["feature"].shape == (2, width)


def test_augmented_networks_with_batch_norm_trace(script, task):
    """The CIFAR-10 form, with a live teacher; only traced, as convolutions take long here."""
    options = script.parse(["--augmentation", "crop_flip", "--student", "resnet8", "--steps", "2"])
    options.teacher = "mlp-12"
    runs = (jnp.zeros(1, int), jnp.ones(1), jnp.ones(1), jax.random.split(jax.random.key(0), 1))
    found = jax.eval_shape(script.sweep(task, options, "linear"), task, *runs)
    assert found["log_singular_end"].shape == (1, 12)
    assert found["test"].shape == (1,)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--augmentation", "crop_flip"]])
def test_it_runs(script, tmp_path, capsys, more):
    script.main(["--quick", "--out", str(tmp_path), *more])
    printed = capsys.readouterr().out
    assert "published trends" in printed
    assert "not judged" in printed
    numbers = json.loads((tmp_path / "projector_ablation.json").read_text())
    assert len(numbers["settings"]) == len(script.settings(["linear"], script.ALPHAS)) + 2
    assert (tmp_path / "projector_ablation.png").stat().st_size > 10_000
