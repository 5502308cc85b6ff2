"""The comparison of a student alone and distilled, at a tiny size."""

from __future__ import annotations

import inspect
import json
import math

import jax
import numpy as np
import pytest

import kdjax as kd
from kdjax.experiments import curves, measures, report, runs, soft_labels, training
from kdjax.experiments._progress import Progress

TINY = {
    "teacher_model": "mlp_small",
    "student_model": "mlp_small",
    "steps": 8,
    "teacher_steps": 8,
    "batch_size": 16,
    "augmentation": "none",
    "teacher_augmentation": "none",
    "seeds": 2,
    "progress": False,
}


def blobs():
    """Three classes of 6 x 6 images that a linear model tells apart, with some noise."""
    draw = np.random.default_rng(0)
    centres = draw.uniform(0, 1, (3, 6, 6, 1))

    def split(size):
        label = np.arange(size) % 3
        image = centres[label] + 0.3 * draw.normal(size=(size, 6, 6, 1))
        return {"image": image.astype(np.float32), "label": label.astype(np.int32)}

    made = {"train": split(90), "validation": split(30), "test": split(45)}
    return kd.data.arrays(made, num_classes=3, name="blobs")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """One finished experiment and its folder."""
    folder = tmp_path_factory.mktemp("first") / "out"
    return soft_labels.compare(blobs(), out=folder, about={"note": "here"}, **TINY), folder


def accuracies(found):
    return [(row.name, row.accuracy.values, row.ece.values) for row in found.models()]


def test_report_holds_what_it_says(first):
    found, _ = first
    assert [row.name for row in found.models()] == ["teacher", "alone", "distilled"]
    assert found.seeds == [0, 1]
    assert found.rows == found.alone.labels == found.teacher.labels == 90
    assert found.gain == measures.gain(found.alone.accuracy.values, found.distilled.accuracy.values)
    assert found.distilled.compression == 1.0
    assert found.distilled.parameters == 36 * 64 + 64 + 64 * 3 + 3
    assert found.alone.agreement is not None
    assert found.teacher.agreement is None
    for row in found.models():
        assert row.accuracy.mean > 0.4  # chance is a third
        assert [step for step, _ in row.curves[0]] == list(range(1, 9))


def test_run_folders_can_be_evaluated(first):
    found, folder = first
    names = ["teacher", "alone/seed-0", "alone/seed-1", "distilled/seed-0", "distilled/seed-1"]
    assert found.distilled.folders == [str(folder / name) for name in names[3:]]
    for name in names:
        trained = runs.load(folder / name, blobs())
        assert trained.manifest["note"] == "here"
        role, seed = trained.manifest["role"], trained.manifest["seeds"][0]
        row = getattr(found, role)
        score, _ = measures.score(trained.model, trained.variables[0], blobs())
        assert score.accuracy == row.accuracy.values[0 if role == "teacher" else seed]


def test_finished_run_is_read_and_not_trained(first, monkeypatch):
    found, folder = first

    def fit(*_, **__):
        raise AssertionError("a finished run must not be trained again")

    monkeypatch.setattr(training.train, "fit", fit)
    again = soft_labels.compare(blobs(), out=folder, resume=True, **TINY)
    assert again == found


def test_interrupted_run_ends_at_the_same_numbers(first, tmp_path, monkeypatch):
    found, _ = first
    out = tmp_path / "out"
    at, calls = Progress.at, []

    def stop(self, step, record):
        calls.append(step)
        if len(calls) == 20:  # in the middle of a student
            raise KeyboardInterrupt
        at(self, step, record)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "at", stop)
        with pytest.raises(KeyboardInterrupt):
            soft_labels.compare(blobs(), out=out, **TINY)
    assert not (out / "report.json").exists()
    assert (out / "teacher" / "run.json").exists()
    resumed = soft_labels.compare(blobs(), out=out, resume=True, **TINY)
    assert accuracies(resumed) == accuracies(found)
    assert [row.curves for row in resumed.models()] == [row.curves for row in found.models()]


def test_other_settings_are_refused(first, tmp_path):
    _, folder = first
    with pytest.raises(ValueError, match=r"^out must be a new folder"):
        soft_labels.compare(blobs(), out=folder, **TINY)
    with pytest.raises(ValueError, match=r"^temperature must be 4\.0 to continue .* got 2\.0"):
        soft_labels.compare(blobs(), out=folder, resume=True, temperature=2.0, **TINY)
    few = blobs().keep_labels(3)
    with pytest.raises(ValueError, match=r"^data must be .* to continue"):
        soft_labels.compare(few, out=folder, resume=True, **TINY)


def test_seeds_together_are_the_seeds_one_by_one(first, tmp_path):
    found, _ = first
    out = tmp_path / "out"
    together = soft_labels.compare(blobs(), out=out, together=True, **TINY)
    assert together.distilled.folders == [str(out / "distilled" / "seeds-0-1")] * 2
    for one, other in zip(found.models(), together.models(), strict=True):
        assert one.accuracy.values == pytest.approx(other.accuracy.values, abs=0.03)
        assert one.ece.values == pytest.approx(other.ece.values, abs=1e-3)
        assert len(other.curves) == len(one.curves)
    loaded = runs.load(out / "distilled" / "seeds-0-1", blobs())
    assert len(loaded.variables) == 2
    again = measures.score(loaded.model, loaded.variables[1], blobs())[0]
    assert again.accuracy == pytest.approx(together.distilled.accuracy.values[1])


def test_seeds_differ_and_both_students_start_alike():
    states = []

    def fit(learner, state, data, **_):
        states.append(state)
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.train, "fit", fit)
        soft_labels.compare(blobs(), **TINY)
    _, *students = [jax.device_get(state.params["student"]) for state in states]
    kernels = [student["classifier"]["kernel"] for student in students]
    assert np.array_equal(kernels[0], kernels[2])
    assert np.array_equal(kernels[1], kernels[3])
    assert not np.array_equal(kernels[0], kernels[1])


def jobs_of(**arguments):
    """The data that each role would be trained on."""
    found = {}

    def run(job, seeds, setting):
        found[job.role] = job
        params, extra = job.model.init(jax.random.key(0), np.zeros((1, 6, 6, 1), np.float32))
        return [training.Outcome(seed, (params, extra), [], 1.0, None) for seed in seeds]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "run", run)
        result = soft_labels.compare(blobs(), **{**TINY, **arguments})
    labels = {role: job.batches(0).dataset.labels("train") for role, job in found.items()}
    return labels, found, result


def test_few_labels_reach_whom_they_should():
    labels, jobs, found = jobs_of(labels_per_class=4, teacher_sees="few")
    assert len(labels["teacher"]) == len(labels["alone"]) == 12
    assert len(labels["distilled"]) == 90
    for role in ("teacher", "alone", "distilled"):
        assert np.bincount(labels[role][labels[role] >= 0]).tolist() == [4, 4, 4]
        assert jobs[role].batches(0).batch_size == min(16, len(labels[role]))
    assert found.alone.labels == found.teacher.labels == 12
    assert found.rows == 90


def test_teacher_may_see_all_labels():
    labels, _, found = jobs_of(labels_per_class=4, teacher_sees="all")
    assert len(labels["teacher"]) == 90
    assert len(labels["alone"]) == 12
    assert (found.teacher.labels, found.distilled.labels) == (90, 12)


def test_label_seed_chooses_the_labels():
    one, two = (jobs_of(labels_per_class=4, label_seed=seed)[0]["distilled"] for seed in (0, 1))
    assert not np.array_equal(one, two)


def test_trained_teacher_is_used_as_it_is(first):
    found, folder = first
    labels, jobs, result = jobs_of(teacher=folder / "teacher")
    assert set(labels) == {"alone", "distilled"}
    kept = kd.train.load_student(folder / "teacher")
    assert jax.tree.all(jax.tree.map(np.array_equal, jobs["distilled"].frozen, kept))
    assert result.teacher.accuracy.values == found.teacher.accuracy.values
    assert result.teacher.labels == 90


@pytest.mark.parametrize("top_k", [None, 2])
def test_stored_outputs_teach_without_the_teacher(first, tmp_path, top_k):
    found, folder = first
    trained = runs.load(folder / "teacher")
    stored = kd.train.predict_labels(
        trained.model,
        trained.variables[0],
        blobs(),
        tmp_path / "labels",
        top_k=top_k,
        temperature=1.0 if top_k is None else 4.0,
        progress=False,
    )
    result = soft_labels.compare(blobs(), teacher_outputs=stored, **TINY)
    assert result.teacher is None
    # Of three classes, the two largest and the rest are everything: the same as the teacher itself.
    assert result.distilled.accuracy.values == pytest.approx(found.distilled.accuracy.values)
    assert result.distilled.ece.values == pytest.approx(found.distilled.ece.values, abs=1e-3)
    assert result.alone.accuracy.values == found.alone.accuracy.values
    if top_k is not None:
        with pytest.raises(ValueError, match=r"^temperature must be 4, that of the stored"):
            soft_labels.compare(blobs(), teacher_outputs=stored, **{**TINY, "temperature": 2.0})


def test_batches_split_over_devices_train_the_same(first):
    found, _ = first
    mesh = kd.parallel.data_mesh(2)
    split = soft_labels.compare(blobs(), mesh=mesh, **TINY)
    assert split.device.startswith("2 x ")
    for one, other in zip(found.models(), split.models(), strict=True):
        assert one.ece.values == pytest.approx(other.ece.values, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, r"^temperature must be .* above 0"),
        ({"hard": -1.0}, "^hard must be"),
        ({"hard": 0.0, "soft": 0.0}, "^hard and soft"),
        ({"steps": 0}, "^steps must be"),
        ({"seeds": 0}, "^seeds must be"),
        ({"seeds": [1, 1]}, "^seeds must be different"),
        ({"student_model": "no"}, "^student_model must be one of convnet"),
        ({"teacher_model": "no"}, "^teacher_model must be one of convnet"),
        ({"augmentation": "no"}, "^augmentation must be one of affine"),
        ({"teacher_sees": "no"}, "^teacher_sees must be"),
        ({"labels_per_class": 31}, "^labels_per_class must be at most 30"),
        ({"batch_size": 91}, "^batch_size must be at most 90"),
        ({"learning_rate": -1.0}, "^learning_rate must be"),
        ({"teacher": "nowhere"}, "^teacher must be a run folder"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        soft_labels.compare(blobs(), out=tmp_path / "out", **{**TINY, **arguments})
    assert not (tmp_path / "out").exists()


def test_networks_that_cannot_read_the_data_are_refused_at_once():
    flat = {"image": np.zeros((30, 5), np.float32), "label": np.arange(30) % 3}
    dataset = kd.data.arrays({"train": flat, "test": flat})
    with pytest.raises(ValueError, match=r"^student_model must be a network for examples of shape"):
        soft_labels.compare(dataset, **{**TINY, "student_model": "convnet"})


def test_validation_split_is_made_where_there_is_none():
    data = blobs()
    splits = {name: data.read(name) for name in ("train", "test")}
    for columns in splits.values():
        columns.pop("index")
    without = kd.data.arrays(splits, num_classes=3)
    assert soft_labels.with_validation(without).size("validation") == 9
    with pytest.raises(ValueError, match="test"):
        soft_labels.with_validation(kd.data.arrays({"train": splits["train"]}))


def test_report_survives_json(first):
    found, folder = first
    text = (folder / "report.json").read_text()
    assert "NaN" not in text
    again = report.from_json(json.loads(text))
    assert again == report.from_json(report.to_json(found))
    assert again.gain.values == found.gain.values
    assert math.isnan(again.teacher.accuracy.error)


def test_curves_are_drawn(first, tmp_path):
    found, _ = first
    png = curves.draw(found, tmp_path / "curves.png")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_run_folders_that_are_none(first, tmp_path):
    _, folder = first
    with pytest.raises(ValueError, match=r"holds the runs alone/seed-0, .*teacher"):
        runs.load(folder)
    with pytest.raises(ValueError, match="not there"):
        runs.load(tmp_path / "nowhere")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="can't be read"):
        runs.load(tmp_path)
    with pytest.raises(ValueError, match="shape"):
        runs.load(folder / "teacher", kd.data.digits())


def test_every_argument_is_documented():
    text = inspect.getdoc(soft_labels.compare)
    for name in inspect.signature(soft_labels.compare).parameters:
        assert f"\n  {name}: " in text


@pytest.mark.slow
def test_digits_defaults_show_what_they_should():
    """The acceptance figures: five seeds, defaults, ten labels of each class."""
    data = kd.data.digits()
    both = soft_labels.compare(data, labels_per_class=10, teacher_sees="few")
    assert both.gain.mean > 2 * both.gain.error > 0
    full = soft_labels.compare(data, labels_per_class=10, teacher_sees="all")
    assert full.teacher.accuracy.mean - full.distilled.accuracy.mean <= 0.02
