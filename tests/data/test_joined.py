"""Batches of two sources side by side."""

import itertools
import json

import jax
import numpy as np
import optax
import pytest

import kdjax as kd
from kdjax import data


def source(size, *, classes=5, dtype=np.uint8, side=4, seed=0, **extra):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, side, side, 1)).astype(dtype)
    if dtype != np.uint8:
        image = image / dtype(256)
    label = rng.integers(classes, size=size)
    return data.arrays({"train": {"image": image, "label": label, **extra}}, num_classes=classes)


FIRST, SECOND = source(50), source(31, seed=1)


def batches(dataset, size=10, **options):
    return dataset.batches("train", size, **{"seed": 3, **options})


def both(share=0.7, **options):
    return data.joined(batches(FIRST, **options), batches(SECOND, seed=4, **options), share=share)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype
        np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.parametrize(("share", "rows"), [(0.7, 7), (0.26, 3), (0.9, 9)])
def test_rows_come_from_both_sources_and_are_theirs(share, rows):
    found = both(share)
    assert found.batch_size == 10
    assert found.steps_per_epoch == 50 // (10 - rows)
    for batch in take(iter(found), 12):
        index = batch["index"]
        assert index.dtype == np.int32
        assert (index >= 50).sum() == rows
        assert (index[: 10 - rows] < 50).all()
        for dataset, offset, part in (
            (FIRST, 0, slice(None, 10 - rows)),
            (SECOND, 50, slice(10 - rows, None)),
        ):
            wanted = dataset.read("train", index[part] - offset)
            np.testing.assert_array_equal(batch["image"][part], wanted["image"])
            np.testing.assert_array_equal(batch["label"][part], wanted["label"])


def test_each_source_is_passed_over_evenly():
    # 3 of 50 and 7 of 31 rows in each batch: 16 batches pass once over the first and four times
    # over the second, but for the rows that fill no batch.
    index = np.concatenate([batch["index"] for batch in take(iter(both()), 16)])
    first, second = np.bincount(index, minlength=81)[:50], np.bincount(index, minlength=81)[50:]
    assert sorted(set(first)) == [0, 1]
    assert first.sum() == 48
    assert second.max() <= 4
    assert second.sum() == 7 * 16


def test_an_epoch_is_one_of_the_first_source():
    found = data.joined(batches(FIRST, epochs=2), batches(SECOND), share=0.5)
    assert len(list(found)) == 2 * found.steps_per_epoch == 20


def test_resuming_at_any_step_gives_the_same_batches():
    found, wanted = both(), take(iter(both()), 40)
    for step in (0, 1, 15, 16, 17, 39):
        same(next(found.from_step(step)), wanted[step])
        same(found.at(step), wanted[step])
    late = both(start_step=5)
    same(next(iter(late)), wanted[5])
    with pytest.raises(ValueError, match="step must be"):
        found.from_step(-1)


def test_seeds_change_their_own_source_only():
    one = data.joined(batches(FIRST), batches(SECOND, seed=4), share=0.5).at(0)["index"]
    two = data.joined(batches(FIRST), batches(SECOND, seed=5), share=0.5).at(0)["index"]
    np.testing.assert_array_equal(one[:5], two[:5])
    assert (one[5:] != two[5:]).any()


def test_hosts_share_the_rows_of_a_batch():
    alone = both(0.6).at(3)
    parts = [both(0.6, shard=(i, 2)).at(3) for i in range(2)]
    for name, value in alone.items():
        found = np.concatenate([p[name][:2] for p in parts] + [p[name][2:] for p in parts])
        np.testing.assert_array_equal(found, value)
    with pytest.raises(ValueError, match="share must split the batch into multiples of the 2 host"):
        both(0.7, shard=(0, 2))


def test_raw_images_stay_bytes():
    batch = both(raw=True).at(0)
    assert batch["image"].dtype == np.uint8
    np.testing.assert_allclose(both().at(0)["image"], batch["image"] / np.float32(255), rtol=1e-6)


def test_description_is_json_and_tells_other_data_from_this():
    texts = {
        json.dumps(found.describe(), sort_keys=True)
        for found in (
            both(), both(0.5), both(raw=True),
            data.joined(batches(FIRST), batches(source(31, seed=2), seed=4), share=0.7),
        )
    }  # fmt: skip
    assert len(texts) == 4


def test_a_killed_run_goes_on_to_the_bit_and_another_share_is_refused(tmp_path):
    student = kd.from_linen(kd.models.MLP(5, features=(4,)))
    learner = kd.minimize(
        kd.distill(student, None, {"hard": (1.0, kd.terms.hard_labels())}), optax.sgd(0.1)
    )
    start = learner.init(jax.random.key(0), both().at(0))

    def fit(steps, share=0.7, folder="a"):
        options = {"progress": False, "plot": False, "checkpoint": tmp_path / folder}
        return kd.train.fit(learner, start, both(share), steps=steps, **options)

    fit(3)
    resumed, unbroken = fit(6), fit(6, folder="b")
    for one, two in zip(
        jax.tree.leaves(resumed.params), jax.tree.leaves(unbroken.params), strict=True
    ):
        np.testing.assert_array_equal(one, two)
    with pytest.raises(ValueError, match="data must be what the run"):
        fit(7, share=0.5)


@pytest.mark.parametrize(
    ("first", "second", "share", "error", "message"),
    [
        (FIRST, batches(SECOND), 0.5, TypeError, "first must be batches from Dataset.batches"),
        (batches(FIRST), [1], 0.5, TypeError, "second must be batches from Dataset.batches"),
        (batches(FIRST), batches(SECOND), 0.0, ValueError, "share must be a finite number"),
        (batches(FIRST), batches(SECOND), 1.0, ValueError, "share must be a finite number"),
        (batches(FIRST), batches(SECOND), np.nan, ValueError, "share must be a finite number"),
        (batches(FIRST), batches(SECOND), 0.04, ValueError, "share must leave at least one of the"),
        (batches(FIRST), batches(SECOND), "half", TypeError, "share must be a finite number"),
        (batches(FIRST), batches(SECOND, 8), 0.5, ValueError, "second must have batch_size=10"),
        (batches(FIRST), batches(SECOND, raw=True), 0.5, ValueError, "second must have raw=False"),
        (
            batches(FIRST), batches(SECOND, start_step=1), 0.5, ValueError,
            "second must have start_step=0",
        ),
        (batches(FIRST), batches(SECOND, shard=(1, 2)), 0.5, ValueError, "second must have shard"),
        (batches(FIRST), batches(SECOND, epochs=1), 0.5, ValueError, "second must be endless"),
        (batches(FIRST, last="pad"), batches(SECOND), 0.5, ValueError, "first must have last='dr"),
        (batches(FIRST), batches(SECOND, last="keep"), 0.5, ValueError, "second must have last="),
        (
            batches(FIRST), batches(source(20, side=5)), 0.5, ValueError,
            r"second must have images of shape \(4, 4, 1\)",
        ),
        (
            batches(FIRST), batches(source(20, classes=6)), 0.5, ValueError,
            "second must have at most the 5 classes",
        ),
    ],
)  # fmt: skip
def test_bad_inputs(first, second, share, error, message):
    with pytest.raises(error, match=message):
        data.joined(first, second, share=share)


def test_entries_that_do_not_fit_are_refused_when_they_are_read():
    more = source(30, extra=np.arange(30))
    with pytest.raises(ValueError, match="second must have the entries of first, extra, image"):
        data.joined(batches(more), batches(SECOND), share=0.5).at(0)
    floats = source(30, dtype=np.float32)
    with pytest.raises(ValueError, match="second must have 'image' as first has it, uint8 rows"):
        data.joined(batches(FIRST, raw=True), batches(floats, raw=True), share=0.5).at(0)
    # Scaled, they are alike.
    assert data.joined(batches(FIRST), batches(floats), share=0.5).at(0)["image"].max() <= 1
