"""Data sets and batches: sources, orders, resuming, hosts, last batches, missing labels."""

import dataclasses
import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from kdjax import augment, data


def toy(size=50, classes=5, test=20, **extra):
    rng = np.random.default_rng(0)
    return data.arrays(
        {
            "train": {
                "image": rng.integers(0, 256, (size, 4, 4, 1), dtype=np.uint8),
                "label": rng.permutation(np.arange(size) % classes),
                **extra,
            },
            "test": {"image": rng.integers(0, 256, (test, 4, 4, 1), dtype=np.uint8)},
        },
        num_classes=classes,
    )


def same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype
        np.testing.assert_array_equal(first[key], second[key])


def take(iterator, count):
    return list(itertools.islice(iterator, count))


# --- sources ------------------------------------------------------------------------------------


def test_digits_are_real_stratified_and_scaled():
    dataset = data.digits()
    assert dataset.shape == (8, 8, 1)
    assert dataset.num_classes == 10
    assert {s: dataset.size(s) for s in dataset.splits} == {
        "train": 1168, "validation": 180, "test": 449,
    }  # fmt: skip
    assert len(dataset) == 1797
    for split in dataset.splits:
        batch = dataset.read(split)
        assert batch["image"].dtype == np.float32
        assert batch["image"].min() == 0
        assert batch["image"].max() == 1
        share = np.bincount(batch["label"], minlength=10) / len(batch["label"])
        assert abs(share - 0.1).max() < 0.02
    everything = np.concatenate([dataset.read(s)["image"] for s in dataset.splits])
    rows = {x.tobytes() for x in (load_digits().images / 16).astype(np.float32)}
    assert {x.tobytes() for x in everything[..., 0]} == rows


def test_digits_never_change():
    """Stored outputs and checkpoints name this fingerprint: it must be the same everywhere."""
    assert data.digits().fingerprint("train") == "198736cf1f1560542a9f41d02f1016a5"


def test_npz_keras_form(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (40, 6, 5), dtype=np.uint8)
    y = (np.arange(40) % 4).astype(np.uint8)[:, None]
    path = tmp_path / "grey.npz"
    np.savez(path, x_train=x[:30], y_train=y[:30], x_test=x[30:], y_test=y[30:])
    dataset = data.npz(path, validation=6)
    assert dataset.name == "grey"
    assert dataset.shape == (6, 5, 1)
    assert {s: dataset.size(s) for s in dataset.splits} == {
        "train": 24, "validation": 6, "test": 10,
    }  # fmt: skip
    test = dataset.read("test", raw=True)
    assert test["image"].dtype == np.uint8
    np.testing.assert_array_equal(test["image"][..., 0], x[30:])
    np.testing.assert_array_equal(test["label"], y[30:, 0])
    assert test["label"].dtype == np.int32
    scaled = dataset.read("test")["image"]
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, test["image"] / 255.0, atol=1e-7)
    assert scaled.max() <= 1
    parts = [dataset.read(s, raw=True)["image"] for s in ("train", "validation")]
    assert {i.tobytes() for p in parts for i in p} == {i.tobytes() for i in x[:30]}
    assert list(data.npz(path, validation=0).splits) == ["train", "test"]
    same(dataset.read("train"), data.npz(path, validation=6).read("train"))


def test_raw_batches_scale_to_the_same_bits_in_the_step():
    dataset = toy()
    raw = dataset.read("train", raw=True)["image"]
    assert raw.dtype == np.uint8
    scaled = jax.jit(augment.to_float)(raw)
    np.testing.assert_array_equal(scaled, dataset.read("train")["image"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "not there"),
        (b"no zip at all", "path must be an .npz file"),
        (b"PK\x03\x04 broken", "path must be an .npz file"),
        ({"y_train": None}, "no entry 'y_train'; it has x_test, x_train, y_test"),
        ({"y_train": np.arange(3)}, "one length"),
        ({"y_test": np.arange(4.0)}, "integer array"),
        ({"x_train": np.zeros((4, 2), object)}, "plain arrays"),
        ({"x_train": np.zeros((4, 2, 2, 2, 2), np.uint8)}, "must have shape"),
        ({"x_train": np.zeros((4, 2, 2), np.int64)}, "uint8 or floating"),
        ({"x_test": np.zeros((4, 3, 3), np.uint8)}, "one shape"),
        ({"y_test": np.array([0, 1, 0, -2])}, "must lie in -1 to 1, got -2"),
        ({"y_train": np.zeros((4, 2), int)}, r"\[N\] or \[N, 1\]"),
        ({"x_train": np.zeros((0, 2, 2), np.uint8), "y_train": np.zeros(0, int)}, "length above 0"),
    ],
)
def test_npz_faults_are_one_sentence(tmp_path, content, words):
    path = tmp_path / "faulty.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        good = {f"x_{s}": np.zeros((4, 2, 2), np.uint8) for s in ("train", "test")}
        good |= {f"y_{s}": np.array([0, 1, 0, 1]) for s in ("train", "test")}
        np.savez(path, **{k: v for k, v in {**good, **content}.items() if v is not None})
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        data.npz(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("splits", "error", "words"),
    [
        ({}, TypeError, "splits must"),
        ([1], TypeError, "splits must"),
        ({"train": 3}, TypeError, r"splits\['train'\] must"),
        ({"train": {"label": np.arange(3)}}, ValueError, "beside label"),
        ({"train": {"image": np.zeros((3, 2)), "index": np.arange(3)}}, ValueError, "index"),
        ({"train": {"image": np.zeros((3, 2)), "label": np.zeros(2, int)}}, ValueError, "length"),
        ({"train": {"image": np.zeros((3, 2))}}, ValueError, "num_classes must be given"),
        ({"train": {"image": np.float32(1)}}, TypeError, "one row per example"),
        ({"train": {"x": [[1], [2, 3]]}}, TypeError, r"\['x'\] must be .* one row per example"),
        (
            {"train": {"x": np.zeros(2), "label": np.array([0, 2**32 + 1])}},
            ValueError,
            r"\['label'\] must lie in -1 to 2147483646, got 4294967297",
        ),
        (
            {"train": {"x": np.zeros(2), "label": np.array([0, 2**63], np.uint64)}},
            ValueError,
            r"\['label'\] must lie in -1 to 2147483646, got 9223372036854775808",
        ),
        (
            {"train": {"x": np.zeros(2), "label": np.array([0, -(2**32) + 1])}},
            ValueError,
            r"\['label'\] must lie in -1 to 2147483646, got -4294967295",
        ),
        *(
            (
                {"train": {"x": np.zeros(2), "name": np.array(["a", "b"], kind)}},
                TypeError,
                r"splits\['train'\]\['name'\] must hold numbers or booleans, got",
            )
            for kind in ("U1", "S1", object)
        ),
        ({"train": {"when": np.zeros(2, "datetime64[s]")}}, TypeError, r"\['when'\] must hold"),
        ({"train": {"x": np.zeros(2, np.longdouble)}}, TypeError, r"\['x'\] must hold numbers"),
    ],
)
def test_arrays_faults_are_one_sentence(splits, error, words):
    with pytest.raises(error, match=words) as caught:
        data.arrays(splits)
    assert "\n" not in str(caught.value)


def test_arrays_take_all_kinds_of_numbers():
    kinds = (np.bool_, np.int8, np.uint64, np.float16, jnp.bfloat16, np.float64, np.complex64)
    for kind in kinds:
        dataset = data.arrays({"train": {"x": np.ones(3, kind)}}, num_classes=2)
        assert jnp.asarray(dataset.read("train")["x"]).shape == (3,)


@pytest.mark.parametrize("bad", [-0.1, -3, True, "a", 1.0, 4, float("nan"), 0.01, None])
def test_npz_names_validation(tmp_path, bad):
    arrays = {f"x_{s}": np.zeros((4, 2, 2), np.uint8) for s in ("train", "test")}
    arrays |= {f"y_{s}": np.array([0, 1, 0, 1]) for s in ("train", "test")}
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises((ValueError, TypeError), match=r"^validation must be") as caught:
        data.npz(tmp_path / "file.npz", validation=bad)
    assert "\n" not in str(caught.value)
    for good in (0.5, 2, np.int64(2), np.float32(0.5)):
        assert data.npz(tmp_path / "file.npz", validation=good).size("validation") == 2
    assert "validation" not in data.npz(tmp_path / "file.npz", validation=0.0).splits


def test_no_rows_are_an_empty_batch():
    dataset = toy(extra=np.arange(50.0))
    for rows in ([], np.zeros(0, np.int32)):
        batch = dataset.read("train", rows)
        full = dataset.read("train", [3])
        assert {k: (x.dtype, x.shape[1:]) for k, x in batch.items()} == {
            k: (x.dtype, x.shape[1:]) for k, x in full.items()
        }
        assert {len(x) for x in batch.values()} == {0}


def test_arrays_keep_other_entries_and_need_no_image():
    tokens = np.arange(30).reshape(10, 3)
    dataset = data.arrays({"train": {"tokens": tokens, "mask": tokens > 3}}, num_classes=1)
    assert dataset.shape == (3,)
    batch = next(iter(dataset.batches("train", 4)))
    np.testing.assert_array_equal(batch["tokens"], tokens[batch["index"]])
    np.testing.assert_array_equal(batch["mask"], (tokens > 3)[batch["index"]])
    assert (batch["label"] == -1).all()


def test_a_dataset_is_immutable():
    dataset = toy()
    with pytest.raises(AttributeError):
        dataset.name = "other"
    with pytest.raises(TypeError):
        dataset.splits["more"] = dataset.splits["train"]
    with pytest.raises(ValueError, match="read-only"):
        dataset.labels("train")[0] = 3
    batch = dataset.read("train")
    batch["image"][:] = 0
    batch["label"][:] = 0
    assert dataset.read("train")["image"].max() > 0
    assert dataset.labels("train").max() > 0


def test_fingerprints_follow_the_content():
    first = toy()
    assert first.fingerprint("train") == toy().fingerprint("train")
    assert first.fingerprint("train") != first.fingerprint("test")
    part = first.read("train", raw=True)
    columns = {"image": part["image"], "label": part["label"]}

    def print_of(**changed):
        return data.arrays({"train": {**columns, **changed}}, num_classes=5).fingerprint("train")

    assert print_of() == first.fingerprint("train")
    assert print_of(label=columns["label"].astype(np.int64)[:, None]) == print_of()
    image = columns["image"].copy()
    image[-1, -1, -1] ^= 1
    assert print_of(image=image) != print_of()
    assert print_of(image=image[::-1]) != print_of(image=image)
    assert print_of(label=columns["label"][::-1]) != print_of()
    assert print_of(more=columns["label"]) != print_of()


def test_hold_out_partitions_in_proportion():
    dataset = toy(100, 5).hold_out(0.2, seed=1)
    assert (dataset.size("train"), dataset.size("validation")) == (80, 20)
    assert np.bincount(dataset.labels("validation")).tolist() == [4] * 5
    whole = {i.tobytes() for i in toy(100, 5).read("train")["image"]}
    parts = [dataset.read(s)["image"] for s in ("train", "validation")]
    assert {i.tobytes() for p in parts for i in p} == whole
    assert sum(map(len, parts)) == 100
    other = toy(100, 5).hold_out(0.2, seed=2)
    assert other.fingerprint("train") != dataset.fingerprint("train")
    assert list(dataset.splits) == ["train", "validation", "test"]
    uneven = toy(47, 5).hold_out(11)
    assert uneven.size("validation") == 11
    for bad, words in ((0, "at least 1"), (100, "at most 99"), (1.5, "below 1"), ("x", "integer")):
        with pytest.raises((ValueError, TypeError), match=f"size must.*{words}"):
            toy(100).hold_out(bad)
    with pytest.raises(ValueError, match="name must be that of a new split"):
        dataset.hold_out(3, name="test")
    with pytest.raises(ValueError, match="no entry 'nowhere'"):
        dataset.hold_out(3, split="nowhere", name="x")


# --- batches ------------------------------------------------------------------------------------


def test_batches_are_a_pure_function_of_seed_and_step():
    dataset = toy()
    batches = dataset.batches("train", 8, seed=3)
    for step, batch in enumerate(take(batches, 20)):
        same(batch, batches.at(step))
        same(batch, toy().batches("train", 8, seed=3).at(step))
        source = dataset.read("train", batch["index"])
        same(batch, source)
    orders = [
        [b["index"].tolist() for b in take(dataset.batches("train", 8, seed=s), 6)] for s in (3, 4)
    ]
    assert orders[0] != orders[1]


def test_the_order_never_changes():
    """A run resumed under another NumPy must see the same batches."""
    batches = toy().batches("train", 6, seed=1)
    assert batches.at(0)["index"].tolist() == [49, 45, 13, 22, 23, 34]
    assert batches.at(9)["index"].tolist() == [1, 22, 38, 46, 25, 41]


def test_epochs_visit_every_row_once_in_new_orders():
    batches = toy(48).batches("train", 8, epochs=3)
    assert batches.steps_per_epoch == 6
    rows = np.concatenate([b["index"] for b in batches]).reshape(3, 48)
    for epoch in rows:
        assert sorted(epoch) == list(range(48))
    assert (rows[0] != rows[1]).any()
    assert (rows[1] != rows[2]).any()
    same(next(iter(batches)), next(iter(batches)))
    ordered = toy(48).batches("train", 8, epochs=2, shuffle=False)
    assert np.concatenate([b["index"] for b in ordered]).tolist() == list(range(48)) * 2


@pytest.mark.parametrize("step", [0, 1, 5, 6, 7, 23])
@pytest.mark.parametrize("last", ["drop", "pad", "keep"])
def test_resume_at_any_step_equals_unbroken(step, last):
    batches = toy().batches("train", 8, seed=2, last=last, epochs=4)
    unbroken = list(batches)
    resumed = list(batches.from_step(step))
    assert len(resumed) == len(unbroken) - step
    for first, second in zip(unbroken[step:], resumed, strict=True):
        same(first, second)
    started = toy().batches("train", 8, seed=2, last=last, epochs=4, start_step=step)
    assert len(list(started)) == len(resumed)


def test_resuming_far_away_reads_nothing_before():
    reads = []
    dataset = toy()
    train = dataset.splits["train"]
    watched = dataclasses.replace(
        train, read=lambda rows: (reads.append(rows), train.read(rows))[1]
    )
    dataset = dataclasses.replace(dataset, splits={"train": watched})
    next(dataset.batches("train", 8).from_step(10**6))
    assert len(reads) == 1


@pytest.mark.parametrize("last", ["drop", "pad"])
@pytest.mark.parametrize("count", [2, 4])
def test_hosts_partition_every_global_batch(last, count):
    dataset = toy()
    whole = dataset.batches("train", 8, seed=5, last=last, epochs=2, shard=(0, 1))
    parts = [
        dataset.batches("train", 8, seed=5, last=last, epochs=2, shard=(i, count))
        for i in range(count)
    ]
    for pieces in zip(whole, *parts, strict=True):
        same(pieces[0], {k: np.concatenate([p[k] for p in pieces[1:]]) for k in pieces[0]})
        assert {len(p["label"]) for p in pieces[1:]} == {8 // count}
    assert {json.dumps(p.describe()) for p in (whole, *parts)} == {json.dumps(whole.describe())}


def test_last_batch_policies():
    dataset = toy()
    sizes = {
        last: [len(b["label"]) for b in dataset.batches("train", 8, last=last, epochs=1)]
        for last in ("drop", "pad", "keep")
    }
    assert sizes == {"drop": [8] * 6, "pad": [8] * 7, "keep": [8] * 6 + [2]}
    padded = list(dataset.batches("train", 8, last="pad", epochs=1))
    assert all(b["weight"].dtype == np.float32 for b in padded)
    assert padded[-1]["weight"].tolist() == [1, 1] + [0] * 6
    assert (padded[-1]["label"][2:] == -1).all()
    assert set(padded[-1]["index"]) == set(padded[-1]["index"][:2])
    real = np.concatenate([b["index"][b["weight"] > 0] for b in padded])
    assert sorted(real) == list(range(50))
    small = list(dataset.batches("train", 64, last="pad", epochs=1))
    assert len(small) == 1
    assert small[0]["weight"].sum() == 50
    assert small[0]["image"].shape == (64, 4, 4, 1)


def test_once_is_one_pass_in_order():
    passed = list(toy().once("test", 8))
    real = np.concatenate([b["index"][b["weight"] > 0] for b in passed])
    assert real.tolist() == list(range(20))


def test_describe_names_what_decides_the_batches():
    dataset = toy()
    described = dataset.batches("train", 8, seed=4).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["fingerprint"] == dataset.fingerprint("train")
    assert (described["batch_size"], described["seed"], described["size"]) == (8, 4, 50)
    few = dataset.keep_labels(2)
    for other in (
        dataset.batches("train", 10, seed=4),
        dataset.batches("train", 8, seed=5),
        dataset.batches("train", 8, seed=4, shuffle=False),
        few.batches("train", 8, seed=4),
        few.batches("test", 8, seed=4),
    ):
        assert other.describe() != described


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "valid"}, "no entry 'valid'; it has test, train"),
        ({"batch_size": 0}, "batch_size must be an integer at least 1, got 0"),
        ({"batch_size": 51}, "batch_size must be at most 50"),
        ({"batch_size": 2.5}, "batch_size must be an integer"),
        ({"last": "throw"}, "last must be one of drop, keep, pad"),
        ({"epochs": 0}, "epochs must"),
        ({"seed": -1}, "seed must"),
        ({"start_step": -1}, "start_step must"),
        ({"shard": (2, 2)}, r"shard\[0\] must be an integer at least 0 and at most 1, got 2"),
        ({"shard": (0, 3)}, "batch_size must be a multiple of the 3 hosts"),
        ({"shard": (0, 2), "last": "keep"}, "last must be 'drop' or 'pad'"),
        ({"shard": 3}, "shard must be"),
    ],
)
def test_bad_batches_are_one_sentence(options, words):
    options = {"split": "train", "batch_size": 8, **options}
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        toy().batches(options.pop("split"), options.pop("batch_size"), **options)
    assert "\n" not in str(caught.value)


def test_bad_rows_and_steps_are_one_sentence():
    with pytest.raises(ValueError, match="rows must lie in 0 to 49"):
        toy().read("train", [0, 50])
    with pytest.raises(TypeError, match="rows must be integers"):
        toy().read("train", [0.5])
    with pytest.raises(ValueError, match="step must"):
        toy().batches("train", 8).from_step(-1)


# --- semi-supervised ----------------------------------------------------------------------------


def test_keep_labels_keeps_so_many_of_each_class():
    dataset = toy(100, 5)
    few = dataset.keep_labels(3, seed=1)
    labels = few.labels("train")
    assert np.bincount(labels[labels >= 0]).tolist() == [3] * 5
    known = labels >= 0
    np.testing.assert_array_equal(labels[known], dataset.labels("train")[known])
    batches = list(few.batches("train", 10, epochs=1))
    for batch in batches:
        np.testing.assert_array_equal(batch["label"], labels[batch["index"]])
        same({"image": batch["image"]}, {"image": dataset.read("train", batch["index"])["image"]})
    assert few.fingerprint("train") == dataset.fingerprint("train")
    np.testing.assert_array_equal(few.labels("test"), dataset.labels("test"))
    np.testing.assert_array_equal(dataset.keep_labels(3, seed=1).labels("train"), labels)
    assert (dataset.keep_labels(3, seed=2).labels("train") != labels).any()
    assert (dataset.keep_labels(0).labels("train") == -1).all()
    more = dataset.keep_labels(6, seed=1).labels("train")
    assert (more[known] == labels[known]).all()
    with pytest.raises(ValueError, match="per_class must be at most 20"):
        dataset.keep_labels(21)
    held = few.hold_out(10)
    assert sorted(np.concatenate([held.labels("train"), held.labels("validation")])) == sorted(
        labels
    )


def test_import_loads_no_data_package():
    code = (
        "import sys, kdjax.data, kdjax.augment; "
        "print([m for m in ('tensorflow_datasets', 'grain', 'sklearn', 'tensorflow', 'flax', "
        "'orbax', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
