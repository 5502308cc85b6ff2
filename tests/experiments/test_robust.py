"""The comparison of adversarial trainings, at a tiny size."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math

import jax
import numpy as np
import pytest

import kdjax as kd
from kdjax.experiments import _robust_attack as attack
from kdjax.experiments import _robust_evaluate as evaluating
from kdjax.experiments import _robust_measure as measuring
from kdjax.experiments import _robust_plan as plans
from kdjax.experiments import _robust_report as report
from kdjax.experiments import _robust_train as training
from kdjax.experiments import measures, robust, robust_figures, runs
from kdjax.experiments._robust_progress import Progress

TINY = {
    "model": "mlp_small",
    "epochs": 3,
    "batch_size": 24,
    "attack_steps": 2,
    "eps": 0.05,
    "seeds": 2,
    "label_noise": 0.1,
    "progress": False,
}


def blobs():
    """Three classes of 6 x 6 images that a linear model tells apart, with some noise."""
    draw = np.random.default_rng(0)
    centres = draw.uniform(0.2, 0.8, (3, 6, 6, 1))

    def split(size):
        label = np.arange(size) % 3
        image = np.clip(centres[label] + 0.2 * draw.normal(size=(size, 6, 6, 1)), 0, 1)
        return {"image": image.astype(np.float32), "label": label.astype(np.int32)}

    made = {"train": split(120), "test": split(45)}
    return kd.data.arrays(made, num_classes=3, name="blobs")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """One finished experiment and its folder."""
    folder = tmp_path_factory.mktemp("first") / "out"
    return robust.compare(blobs(), out=folder, about={"note": "here"}, **TINY), folder


def figures(found):
    """What doesn't depend on the clock and the place."""
    plain = [dataclasses.replace(row, seconds=None, folders=[]) for row in found.rows]
    return report.to_json(dataclasses.replace(found, rows=plain, seconds=0.0, folder=None))


def plan_of(**arguments):
    """The plan of a call, whose trainings are not run."""
    found = {}

    def stop(plan, *_):
        found["plan"] = plan
        raise RuntimeError("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robust, "_run", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            robust.compare(**{"dataset": blobs(), **TINY, **arguments})
    return found["plan"]


def test_report_holds_what_it_says(first):
    found, _ = first
    assert [(row.method, row.weights) for row in found.rows] == [
        ("at", "student"), ("at", "ema"), ("adr", "student"), ("adr", "ema"),
    ]  # fmt: skip
    assert found.images == {"train": 108, "validation": 12, "test": 45}
    assert found.seeds == [0, 1]
    for row in found.rows:
        for seed, curve in enumerate(row.curves):
            assert [point[0] for point in curve] == [1, 2, 3]
            values = [point[2] for point in curve]
            assert row.best_epoch.values[seed] == 1 + values.index(max(values))
            assert row.overfitting.values[seed] == pytest.approx(max(values) - values[-1])
        for part in (row.best, row.last):
            assert part["clean"].mean >= part["pgd_20"].mean
            assert "auto_attack" not in part
        assert row.best["clean"].mean > 0.4  # chance is a third
    assert found.row("at").curves != found.row("adr").curves


def test_run_folders_hold_what_was_measured(first):
    """Best and last, student and average: each loaded again gives the figures of the report."""
    found, folder = first
    data = plans.with_validation(blobs(), None)
    pgd = {split: attack.Attack(0.05, 0.0125, steps, "linf") for split, steps in
           (("validation", 10), ("test", 20))}  # fmt: skip
    for row in (found.row("at", "ema"), found.row("adr")):
        path = folder / row.method / "seed-1" / ("ema" if row.weights == "ema" else "")
        assert row.folders[1] == str(path)
        trained = runs.load(path, data)
        assert trained.manifest["note"] == "here"
        for when, point in (("best", max(row.curves[1], key=lambda p: p[2])),
                            ("last", row.curves[1][-1])):  # fmt: skip
            variables = kd.train.load_student(path, step="best" if when == "best" else None)
            seen = {
                split: attack.answers(trained.model, variables, data.once(split, 16), each)
                for split, each in pgd.items()
            }
            assert seen["validation"].robust().mean() == pytest.approx(point[2])
            assert seen["test"].robust().mean() == getattr(row, when)["pgd_20"].values[1]
            assert seen["test"].right().mean() == getattr(row, when)["clean"].values[1]


def test_averaged_weights_are_those_of_the_method(first):
    """The average that is kept at the last epoch is the one in the State."""
    _, folder = first
    plan = plan_of()
    learner = plans.learner(plan, "adr")
    batch = plans.training_batches(plan, 0).at(0)
    like = jax.eval_shape(learner.init, jax.random.key(0), batch)
    state = kd.train.restore(folder / "adr" / "seed-0", like)
    kept = kd.train.load_student(folder / "adr" / "seed-0" / "ema")
    assert jax.tree.all(jax.tree.map(np.array_equal, kd.methods.adr.averaged(state), kept))
    assert int(state.step) == 12


def test_methods_start_from_the_same_parameters(monkeypatch):
    states = []

    def fit(learner, state, data, **_):
        states.append(jax.device_get(state.params["student"]["classifier"]["kernel"]))
        raise RuntimeError("stopped")

    monkeypatch.setattr(training.train, "fit", fit)
    for method in ("at", "adr"):
        with pytest.raises(RuntimeError, match="stopped"):
            robust.compare(blobs(), method=[method], **TINY)
    assert np.array_equal(*states)


def test_selection_never_sees_the_test_split(first, tmp_path):
    """With a test split that can't be read, all trainings end, and choose the same epochs."""
    found, _ = first
    data = blobs()

    def unreadable(rows):
        raise RuntimeError("the test split was read")

    hidden = dataclasses.replace(data.splits["test"], read=unreadable)
    data = dataclasses.replace(data, splits={**data.splits, "test": hidden})
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="the test split was read"):
        robust.compare(data, out=out, **{**TINY, "method": "adr", "seeds": [1]})
    for weights in ("student", "ema"):
        there = found.row("adr", weights).folders[1]
        here = str(out) + there.removeprefix(found.folder)
        one, other = (kd.train.load_student(each, step="best") for each in (here, there))
        assert jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_finished_run_is_read_and_not_trained(first, monkeypatch):
    found, folder = first

    def fit(*_, **__):
        raise AssertionError("a finished run must not be trained again")

    monkeypatch.setattr(training.train, "fit", fit)
    again = robust.compare(blobs(), out=folder, resume=True, **TINY)
    assert figures(again) == figures(found)


def test_interrupted_run_ends_at_the_same_report(first, tmp_path, monkeypatch):
    """Stopped within the second training, then while the models are measured."""
    found, _ = first
    out = tmp_path / "out"
    at, calls = Progress.at, []

    def stop(self, passes, note=""):
        calls.append(passes)
        if len(calls) == 7:
            raise KeyboardInterrupt
        at(self, passes, note)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "at", stop)
        with pytest.raises(KeyboardInterrupt):
            robust.compare(blobs(), out=out, **TINY)
    assert (out / "at" / "seed-1").exists()
    assert not (out / "adr" / "seed-0").exists()

    plain, measured = measuring._plain, []

    def fail(*arguments):
        measured.append(arguments)
        if len(measured) == 6:
            raise RuntimeError("power cut")
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "_plain", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            robust.compare(blobs(), out=out, resume=True, **TINY)
    assert not (out / robust.REPORT).exists()
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "_plain", lambda *a: measured.append(a) or plain(*a))
        resumed = robust.compare(blobs(), out=out, resume=True, **TINY)
    assert len(measured) == 6 + 16 - 5  # what had been measured was only read
    assert figures(resumed) == figures(found)


def test_other_settings_are_refused(first):
    _, folder = first
    with pytest.raises(ValueError, match=r"^out must be a new folder"):
        robust.compare(blobs(), out=folder, **TINY)
    with pytest.raises(ValueError, match=r"^eps must be 0\.05 to continue .* got 0\.1"):
        robust.compare(blobs(), out=folder, resume=True, **{**TINY, "eps": 0.1})
    with pytest.raises(ValueError, match=r"^data must be .* to continue"):
        robust.compare(blobs().keep_labels(20), out=folder, resume=True, **TINY)


def test_labels_are_as_wrong_as_they_should_be():
    clean = plans.training_batches(plan_of(label_noise=0.0, examples=60), 3).dataset
    noisy = plans.training_batches(plan_of(label_noise=0.25, examples=60), 3).dataset
    other = plans.training_batches(plan_of(label_noise=0.25, examples=60), 4).dataset
    labels, wrong = clean.labels("train"), noisy.labels("train")
    assert np.bincount(labels).tolist() == [20, 20, 20]
    assert (labels != wrong).sum() == 15
    assert set(wrong) == {0, 1, 2}
    # The images stay, and batches show what labels() says.
    read = noisy.read("train")
    assert np.array_equal(read["image"], clean.read("train")["image"])
    assert np.array_equal(read["label"], wrong)
    assert not np.array_equal(other.read("train")["image"], read["image"])
    assert not np.array_equal(other.labels("train"), wrong)
    assert noisy.describe("train")["changes"] == [{"label_noise": 0.25, "seed": 3}]
    # Nothing else has changed.
    plan = plan_of(label_noise=0.25)
    held_out = plans.with_validation(blobs(), None).labels("validation")
    assert np.array_equal(plan.dataset.labels("validation"), held_out)


@pytest.mark.parametrize(
    ("size", "wanted"), [(30, 3), (5_000, 500), (50_000, 1_024), (1_281_167, 25_623)]
)
def test_size_of_the_held_out_split(size, wanted, monkeypatch):
    data = blobs()
    monkeypatch.setattr(type(data), "size", lambda self, split: size)
    monkeypatch.setattr(type(data), "hold_out", lambda self, rows: rows)
    assert plans.with_validation(data, None) == wanted
    assert plans.with_validation(data, 7) == 7


def test_defaults_suit_the_data():
    digits = plan_of(
        dataset=kd.data.digits(), seeds=1, **dict.fromkeys(TINY.keys() - {"seeds", "progress"})
    ).choices
    # Section 11 of the reference benchmark.
    assert (digits["examples"], digits["label_noise"], digits["model"]) == (300, 0.2, "mlp")
    assert (digits["eps"], digits["step_size"], digits["attack_steps"]) == (0.1, 0.025, 7)
    assert (digits["epochs"], digits["batch_size"], digits["ema_decay"]) == (80, 50, 0.99)
    assert (digits["temperature"], digits["mix"]) == ([1.5, 1.0], [0.5, 0.9])
    assert digits["weight_decay"] == 0
    draw = np.random.default_rng(0)
    big = {"image": draw.random((40, 32, 32, 3), np.float32), "label": np.arange(40) % 20}
    given = {"norm": "linf", "awp": False}
    found = plans.filled(kd.data.arrays({"train": big, "test": big}, num_classes=20), given)
    assert (found["model"], found["epochs"], found["augmentation"]) == (
        "resnet18",
        200,
        "crop_flip",
    )
    assert (found["temperature"], found["mix"]) == ([1.5, 1.0], [0.7, 0.95])
    assert (found["eps"], found["step_size"]) == (8 / 255, 2 / 255)
    assert (found["examples"], found["label_noise"], found["auto_attack"]) == (40, 0.0, 0)
    found = plans.filled(kd.data.arrays({"train": big, "test": big}), {"norm": "l2", "awp": True})
    assert (found["temperature"], found["mix"], found["eps"]) == ([2.0, 1.0], [0.7, 0.85], 0.5)


def test_trades_with_weight_perturbation_on_two_devices():
    """Batches split over devices train the same."""
    given = {**TINY, "seeds": 1, "epochs": 1, "norm": "l2", "awp": True}
    one = robust.compare(blobs(), method=["trades", "adr-trades"], **given)
    assert [row.method for row in one.rows[::2]] == ["trades", "adr-trades"]
    assert len({row.last["nll"].mean for row in one.rows}) == 4
    assert one.folder is None
    assert one.rows[0].folders == []
    assert math.isnan(one.rows[0].overfitting.error)
    mesh = kd.parallel.data_mesh(2)
    split = robust.compare(blobs(), method="trades", mesh=mesh, **given)
    assert split.device.startswith("2 x ")
    for weights in ("student", "ema"):
        same = one.row("trades", weights).last["nll"].mean
        assert split.row("trades", weights).last["nll"].mean == pytest.approx(same, abs=1e-4)


def test_auto_attack_is_kept_with_what_it_saw(tmp_path, monkeypatch):
    seen = []

    def auto_attack(model, x, labels, **options):
        seen.append((x, labels, options))
        robust_mask = np.arange(len(x)) % 2 == 0
        return kd.attacks.AutoAttack(x, robust_mask, {})

    monkeypatch.setattr(measuring.attacks, "auto_attack", auto_attack)
    few = {**TINY, "epochs": 1, "method": ["at"]}
    found = robust.compare(
        blobs(), auto_attack=10, auto_attack_weights=("student", "ema"), out=tmp_path / "o", **few
    )
    assert len(seen) == 8
    names = [options["checkpoint"].name for _, _, options in seen]
    assert names[:2] == ["auto_attack-student-best.npz", "auto_attack-student-last.npz"]
    images = [x for x, _, _ in seen]
    assert all(np.array_equal(images[0], each) for each in images[1:4])
    assert not np.array_equal(images[0], images[4])  # another seed
    for row in found.rows:
        for part in (row.best, row.last):
            for i in range(2):
                left, pgd = part["auto_attack_seen"].values[i], part["pgd_20_seen"].values[i]
                share = part["auto_attack"].values[i] / part["pgd_20"].values[i]
                assert left <= pgd
                assert share == pytest.approx(left / pgd)
    student = robust.compare(blobs(), auto_attack=10, **{**few, "seeds": 1})
    assert student.row("at").best["auto_attack"] is not None
    assert "auto_attack" not in student.row("at", "ema").best


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": ["pgd"]}, "^method must be one of adr, adr-trades, at, trades"),
        ({"method": ["at", "at"]}, "^method must name each method once"),
        ({"method": []}, "^method must name each method once"),
        ({"eps": 0.0}, r"^eps must be .* above 0"),
        ({"eps": "a"}, "^eps must be a finite number"),
        ({"norm": "l1"}, "^norm must be one of l2, linf"),
        ({"step_size": -1.0}, "^step_size must be"),
        ({"attack_steps": 0}, "^attack_steps must be"),
        ({"epochs": 0}, "^epochs must be"),
        ({"batch_size": 109}, "^batch_size must be at most 108"),
        ({"examples": 20}, "^batch_size must be at most 20"),
        ({"examples": 109}, r"^examples must be .* at most 108"),
        ({"learning_rate": 0.0}, "^learning_rate must be"),
        ({"weight_decay": -1.0}, "^weight_decay must be"),
        ({"ema_decay": 1.5}, "^ema_decay must be"),
        ({"temperature": (1.0, 2.0)}, "^temperature must fall"),
        ({"temperature": (0.0, 0.0)}, r"^temperature must be .* above 0"),
        ({"mix": (0.9, 0.5)}, "^mix must rise"),
        ({"beta": -1.0}, "^beta must be"),
        ({"rho": -1.0}, "^rho must be"),
        ({"label_noise": 1.0}, r"^label_noise must be .* below 1"),
        ({"validation": 0}, "^validation must be"),
        ({"auto_attack": 46}, r"^auto_attack must be .* at most 45"),
        ({"auto_attack_weights": ["teacher"]}, "^auto_attack_weights must be one of ema, student"),
        ({"eval_every": 0}, "^eval_every must be"),
        ({"augmentation": "no"}, "^augmentation must be one of affine"),
        ({"model": "no"}, "^model must be one of convnet"),
        ({"seeds": 0}, "^seeds must be"),
        ({"seeds": [1, 1]}, "^seeds must be different"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        robust.compare(blobs(), out=tmp_path / "out", **{**TINY, **arguments})
    assert not (tmp_path / "out").exists()


def test_data_that_have_no_radius_are_refused():
    part = {"image": np.full((40, 6, 6, 1), 2.0, np.float32), "label": np.arange(40) % 3}
    with pytest.raises(ValueError, match=r"^data must be images in \[0, 1\], got values from 2 to"):
        robust.compare(kd.data.arrays({"train": part, "test": part}), **TINY)
    part = {"image": np.zeros((40, 36), np.float32), "label": np.arange(40) % 3}
    with pytest.raises(ValueError, match=r"^data must be images \[H, W, C\]"):
        robust.compare(kd.data.arrays({"train": part, "test": part}), **TINY)
    with pytest.raises(ValueError, match="validation split of its own"):
        robust.compare(kd.data.digits(), validation=20, **TINY)


def test_divergence_is_no_result(tmp_path):
    with pytest.raises(FloatingPointError, match="not finite"):
        robust.compare(blobs(), out=tmp_path / "out", **{**TINY, "learning_rate": 1e30})
    assert not (tmp_path / "out" / robust.REPORT).exists()


def test_report_survives_json(first):
    found, folder = first
    text = (folder / robust.REPORT).read_text()
    assert "NaN" not in text
    again = report.from_json(json.loads(text))
    assert again == report.from_json(report.to_json(found))
    one = report.over_seeds([{"a": 0.5, "b": None}, {"a": 1.0, "b": 1.0}])
    assert one == {"a": measures.estimate([0.5, 1.0]), "b": None}


def test_figures_are_drawn(first, tmp_path):
    found, folder = first
    shown = np.load(folder / robust.EXAMPLES)
    assert shown["image"].shape == (3, 6, 6, 1)
    assert shown["label"].tolist() == [0, 1, 2]
    for method in ("at", "adr"):
        change = np.abs(shown[f"{method}/x_adv"] - shown["image"])
        assert 0 < change.max() <= 0.05 + 1e-6
    for png in (
        robust_figures.curves(found, tmp_path / "curves.png"),
        robust_figures.perturbed(found, folder / robust.EXAMPLES, tmp_path / "perturbed.png"),
    ):
        assert png.read_bytes().startswith(b"\x89PNG")


def test_nan_is_never_right():
    labels = np.array([0, 0])
    logits = np.array([[np.nan, 0.0], [1.0, 0.0]])
    assert attack.Answers(labels, logits, logits).robust().tolist() == [False, True]
    fine = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert attack.Answers(labels, fine, logits).robust().tolist() == [False, True]


def test_evaluation_takes_what_it_is_told(first, monkeypatch, tmp_path):
    """Which weights, which images, which radius: the attacks themselves have tests of their own."""
    _, folder = first
    calls = []

    def evaluate(model, x, labels, **options):
        calls.append((model, x, options))
        part = {"accuracy": 1.0, "unchanged": 1.0}
        masks = {"clean": np.ones(len(x), bool), "worst_case": np.arange(len(x)) > 2}
        return kd.attacks.Evaluation(
            {name: float(mask.mean()) for name, mask in masks.items()}, masks, {}, {"fog": part}, {}
        )

    def auto_attack(model, x, labels, *, version, **options):
        if version == "rand":
            model(x[:1], jax.random.key(0))
        return kd.attacks.AutoAttack(x, np.arange(len(x)) > 4, {"clean": np.ones(len(x), bool)})

    check = kd.attacks.MaskingCheck("rising_loss", True, 0.0, "at most 0.05")
    monkeypatch.setattr(evaluating.attacks, "evaluate", evaluate)
    monkeypatch.setattr(evaluating.attacks, "auto_attack", auto_attack)
    monkeypatch.setattr(evaluating.attacks, "gradient_masking", lambda *_, **__: [check])
    data, run = plans.with_validation(blobs(), None), folder / "adr" / "seed-1"
    for weights, epoch in (("student", None), ("ema", "last")):
        found = robust.evaluate(run, data, weights=weights, epoch=epoch, examples=10)
        model, x, options = calls[-1]
        place, step = (run, "best") if weights == "student" else (run / "ema", None)
        kept = kd.train.load_student(place, step=step)
        logits = runs.network("mlp_small", 3).apply(*kept, x, train=False)[0]["logits"]
        assert np.allclose(model(x), logits)
        assert x.shape == (10, 6, 6, 1)
        assert (options["eps"], options["norm"], options["auto"]) == (0.05, "linf", True)
        assert len(options["validation"][0]) == 10
        name = f"robustness-{weights}-{epoch or 'best'}-1-linf-0.05-10"
        assert found.folder == str(run / name)
        assert options["checkpoint"] == run / name
        written = json.loads((run / name / "report.json").read_text())
        assert written["accuracy"] == found.accuracy
        assert written["masking"]["rising_loss"]["passed"] is True
    found = robust.evaluate(run, data, norm="l2", version="rand", checkpoint=tmp_path / "here")
    assert calls[-1][2]["eps"] == 0.4
    assert calls[-1][2]["auto"] is False
    assert found.accuracy["auto_attack"] == found.accuracy["worst_case"] == 40 / 45
    assert found.folder == str(tmp_path / "here")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "teacher"}, "^weights must be one of ema, student"),
        ({"epoch": "first"}, "^epoch must be one of best, last"),
        ({"seed": 3}, "^seed must be one of 0, those of .*; got 3"),
        ({"eps": 0.0}, r"^eps must be .* above 0"),
        ({"norm": "l1"}, "^norm must be one of"),
        ({"examples": 0}, "^examples must be"),
        ({"version": "fast"}, "^version must be one of plus, rand, standard"),
        ({"run": "nowhere"}, "^folder must be a run folder, got nowhere"),
        ({"dataset": kd.data.digits()}, "^data must have 3 classes"),
    ],
)
def test_bad_arguments_of_an_evaluation(first, arguments, message):
    _, folder = first
    given = {"run": folder / "at" / "seed-0", "dataset": blobs(), **arguments}
    with pytest.raises((ValueError, TypeError), match=message):
        robust.evaluate(**given)


def test_every_argument_is_documented():
    for function in (robust.compare, robust.evaluate):
        text = inspect.getdoc(function)
        for name in inspect.signature(function).parameters:
            assert f"\n  {name}: " in text, name
