"""Stored teacher outputs: equality, interruption, refusal, top-k mass, batches by index."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import data

N, C = 50, 7
WEIGHTS = np.random.default_rng(1).normal(size=(16, C)).astype(np.float32) * 3


def dataset(seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (N, 4, 4, 1), dtype=np.uint8)
    return data.arrays({"train": {"image": image, "label": np.arange(N) % C}}, name="toy")


@jax.jit
def forward(image):
    return jnp.tanh(image.reshape(len(image), -1) @ WEIGHTS) * 4


def predict(batch):
    return forward(batch["image"])


def store(path, function=predict, source=None, **options):
    options = {"teacher": "a line", "batch_size": 8, "progress": False, **options}
    return data.store_outputs(function, source or dataset(), path, **options)


def counting(limit=None, record=None):
    """predict that raises at the call numbered ``limit``."""
    record = [] if record is None else record

    def function(batch):
        if limit is not None and len(record) == limit:
            raise RuntimeError("power cut")
        record.append(batch["index"].tolist())
        return predict(batch)

    return function, record


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix == ".npy"}


def test_stored_logits_are_the_teachers(tmp_path):
    stored = store(tmp_path / "out")
    expected = np.asarray(predict(dataset().read("train")))
    assert isinstance(stored.arrays["logits"], np.memmap)
    np.testing.assert_allclose(stored.arrays["logits"], expected, atol=1e-6)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "logits.npy"), stored.arrays["logits"])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == dict(stored.manifest)
    assert manifest["complete"] is True
    assert (manifest["rows"], manifest["classes"], manifest["examples"]) == (N, C, N)
    assert manifest["fingerprint"] == dataset().fingerprint("train")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["logits.npy", "manifest.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_predict_sees_one_shape_and_every_row_once(tmp_path):
    function, record = counting()
    store(tmp_path / "out", function)
    assert {len(rows) for rows in record} == {8}
    assert len(record) == 7
    assert list(itertools.chain(*record))[:N] == list(range(N))
    store(tmp_path / "out", function)
    assert len(record) == 7


def test_batches_carry_their_rows_outputs_under_shuffling(tmp_path):
    source = dataset().keep_labels(1)
    stored = store(tmp_path / "out")
    with_teacher = source.with_outputs(stored)
    batches = with_teacher.batches("train", 8, seed=3, last="pad", epochs=2)
    for batch in batches:
        assert batch["teacher_logits"].dtype == np.float32
        expected = predict({"image": batch["image"]})
        np.testing.assert_allclose(batch["teacher_logits"], expected, atol=1e-5)
    plain = source.batches("train", 8, seed=3, last="pad").at(2)
    np.testing.assert_array_equal(plain["index"], batches.at(2)["index"])
    twice = with_teacher.with_outputs(stored, name="second").batches("train", 8).at(0)
    np.testing.assert_array_equal(twice["second_logits"], twice["teacher_logits"])
    assert batches.describe()["changes"][-1]["teacher"] == "a line"
    json.dumps(batches.describe())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_top_k_keeps_the_whole_mass(tmp_path, dtype, temperature):
    k = 3
    stored = store(tmp_path / "out", top_k=k, dtype=dtype, temperature=temperature)
    logits = np.asarray(predict(dataset().read("train")), np.float64) / temperature
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    values, indices, rest = (stored.arrays[n] for n in ("values", "indices", "rest"))
    assert (values.dtype, indices.dtype, rest.dtype) == (dtype, np.int32, dtype)
    assert values.shape == indices.shape == (N, k)
    tolerance = 1e-5 if dtype == np.float32 else 1e-2
    total = np.exp(np.float64(values)).sum(axis=1) + np.exp(np.float64(rest))
    np.testing.assert_allclose(total, 1.0, atol=tolerance)
    np.testing.assert_allclose(
        values, np.take_along_axis(logp, indices, axis=1), rtol=tolerance, atol=tolerance
    )
    np.testing.assert_array_equal(indices, np.argsort(-logp, axis=1)[:, :k])
    batch = dataset().with_outputs(stored).batches("train", 8).at(1)
    assert batch["teacher_values"].shape == (8, k)
    assert batch["teacher_indices"].dtype == np.int32
    np.testing.assert_array_equal(batch["teacher_rest"], np.float32(rest[batch["index"]]))


def test_tiny_rest_is_not_rounded_away(tmp_path):
    """log(1 - p) would give -inf or noise where the rest is below the precision of p."""

    def sure(batch):
        return np.tile(np.array([60.0, 0, 0, 0, 0, 0, 0], np.float32), (len(batch["index"]), 1))

    stored = store(tmp_path / "out", sure, top_k=1)
    np.testing.assert_allclose(stored.arrays["rest"], np.log(6) - 60, rtol=1e-6)


def test_float16_is_shifted_and_never_infinite(tmp_path):
    def large(batch):
        return predict(batch) + 1e5

    stored = store(tmp_path / "a", large, dtype=np.float16)
    assert stored.manifest["shifted"] is True
    assert stored.arrays["logits"].dtype == np.float16
    assert float(stored.arrays["logits"].max()) == 0
    exact = np.asarray(predict(dataset().read("train")))
    exact = exact - exact.max(axis=1, keepdims=True)
    np.testing.assert_allclose(stored.arrays["logits"], exact, atol=0.02)

    def wide(batch):
        return predict(batch).at[3, 2].set(-1e5)

    with pytest.raises(ValueError, match=r"float16 can't hold the logits of example 3.*65504"):
        store(tmp_path / "b", wide, dtype=np.float16)
    assert not (tmp_path / "b").exists()
    store(tmp_path / "c", wide)
    with pytest.raises(ValueError, match="float16 can't hold the rest of example 3"):
        store(tmp_path / "d", wide, dtype=np.float16, top_k=C - 1)


@pytest.mark.parametrize("options", [{}, {"top_k": 2, "temperature": 3.0, "dtype": np.float16}])
@pytest.mark.parametrize("stop", [0, 1, 4, 6])
def test_interrupted_store_resumes_to_the_same_bytes(tmp_path, options, stop):
    store(tmp_path / "unbroken", **options)
    function, record = counting(stop)
    with pytest.raises(RuntimeError, match="power cut"):
        store(tmp_path / "out", function, **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=f"only {8 * stop} of {N} rows are done"):
        data.stored_outputs(tmp_path / "out")
    function, _ = counting(record=record)
    store(tmp_path / "out", function, **options)
    assert list(itertools.chain(*record))[:N] == list(range(N))
    assert len(record) == 7
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_bytes_after_the_recorded_rows_are_dropped(tmp_path):
    """A kill between writing rows and recording them leaves rows that don't count."""
    store(tmp_path / "unbroken")
    with pytest.raises(RuntimeError):
        store(tmp_path / "out", counting(3)[0])
    with open(tmp_path / "out.partial" / "logits.npy", "ab") as file:
        file.write(b"\xff" * 1000)
    (tmp_path / "out.partial" / "manifest.json.new").write_text("{ half")
    store(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


CHILD = """
import sys, time
sys.path.insert(0, {here!r})
import test_stored
def slow(batch):
    time.sleep(0.05 if batch['index'][0] < 20 else 60)  # it can't end before it is killed
    return test_stored.predict(batch)
test_stored.store({path!r}, slow, batch_size=2)
"""


def test_a_killed_process_is_resumed(tmp_path):
    store(tmp_path / "unbroken", batch_size=2)
    path = tmp_path / "out"
    code = CHILD.format(here=os.path.dirname(__file__), path=str(path))
    child = subprocess.Popen([sys.executable, "-c", code])
    manifest = tmp_path / "out.partial" / "manifest.json"
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and child.poll() is None:
            if manifest.exists() and json.loads(manifest.read_text())["rows"] >= 6:
                break
            time.sleep(0.01)
        with pytest.raises(ValueError, match="written by another process"):
            store(path, batch_size=2)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    rows = json.loads(manifest.read_text())["rows"]
    assert 6 <= rows < N
    function, record = counting()
    store(path, function, batch_size=2)
    assert record[0][0] == rows
    assert contents(path) == contents(tmp_path / "unbroken")


def test_another_call_never_overwrites(tmp_path):
    variables = {"w": jnp.ones(3), "key": jax.random.key(0), "h": jnp.ones(2, jnp.bfloat16)}
    with pytest.raises(RuntimeError):
        store(tmp_path / "half", counting(3)[0], variables=variables)
    store(tmp_path / "whole", variables=variables)
    for folder, files in (("half", "half.partial"), ("whole", "whole")):
        before = {p.name: p.read_bytes() for p in (tmp_path / files).iterdir()}
        for options, words in (
            ({"teacher": "another"}, "teacher 'a line' and this call has 'another'"),
            ({"variables": {**variables, "w": jnp.zeros(3)}}, "teacher_fingerprint"),
            ({"variables": {**variables, "key": jax.random.key(1)}}, "teacher_fingerprint"),
            ({"source": dataset(seed=1)}, "fingerprint"),
            ({"dtype": np.float16}, "dtype 'float32' and this call has 'float16'"),
            ({"top_k": 2}, "top_k None and this call has 2"),
        ):
            with pytest.raises(ValueError, match=words) as caught:
                store(tmp_path / folder, **{"variables": variables, **options})
            assert "\n" not in str(caught.value)
        assert {p.name: p.read_bytes() for p in (tmp_path / files).iterdir()} == before
    store(tmp_path / "half", variables=variables)
    assert contents(tmp_path / "half") == contents(tmp_path / "whole")


def test_other_data_are_refused(tmp_path):
    stored = store(tmp_path / "out")
    with pytest.raises(ValueError, match="stored must belong to split 'train' of 'toy'"):
        dataset(seed=1).with_outputs(stored)
    with pytest.raises(ValueError, match="stored must belong"):
        dataset().hold_out(5).with_outputs(stored)
    with pytest.raises(TypeError, match="stored must come from"):
        dataset().with_outputs(tmp_path / "out")
    held = dataset().hold_out(5)
    part = store(tmp_path / "part", source=held)
    again = dataset().hold_out(5).keep_labels(1).with_outputs(part)
    batch = again.batches("train", 8).at(0)
    np.testing.assert_allclose(batch["teacher_logits"], predict(batch), atol=1e-5)


def test_damaged_stores_are_refused(tmp_path):
    def broken(change):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        store(path)
        change(path)
        with pytest.raises(ValueError, match=r"must (be|hold)") as caught:
            data.stored_outputs(path)
        assert "\n" not in str(caught.value)

    def rewrite(**changes):
        def change(path):
            manifest = json.loads((path / "manifest.json").read_text())
            (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))

        return change

    broken(lambda path: (path / "manifest.json").unlink())
    broken(lambda path: (path / "manifest.json").write_text("{"))
    broken(lambda path: (path / "manifest.json").write_text("[1]"))
    broken(rewrite(format=2))
    broken(rewrite(complete=False))
    broken(rewrite(classes=C + 1))
    broken(lambda path: (path / "logits.npy").unlink())
    broken(lambda path: os.truncate(path / "logits.npy", 500))
    broken(lambda path: os.truncate(path / "logits.npy", 20))
    broken(lambda path: np.save(path / "logits.npy", np.zeros((N, C), np.float16)))
    with pytest.raises(ValueError, match="which is not there"):
        data.stored_outputs(tmp_path / "nowhere")
    with pytest.raises(RuntimeError):
        store(tmp_path / "short", counting(3)[0])
    os.truncate(tmp_path / "short.partial" / "logits.npy", 500)
    with pytest.raises(ValueError, match=r"can't be resumed.*delete"):
        store(tmp_path / "short")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"teacher": ""}, TypeError, "teacher must"),
        ({"dtype": np.int32}, ValueError, "dtype must"),
        ({"dtype": "half a float"}, ValueError, "dtype must"),
        ({"top_k": 0}, ValueError, "top_k must"),
        ({"top_k": C}, ValueError, f"top_k must be at most {C - 1}"),
        ({"temperature": 2.0}, ValueError, "temperature must be 1"),
        ({"temperature": 0.0, "top_k": 1}, ValueError, "temperature must be"),
        ({"batch_size": 0}, ValueError, "batch_size must"),
        ({"split": "test"}, ValueError, "no entry 'test'"),
        ({"function": lambda b: predict(b)[:-1]}, ValueError, "predict must return one row"),
        ({"function": lambda b: predict(b)[0]}, ValueError, "predict must return logits"),
        ({"function": lambda b: {"logits": predict(b)}}, ValueError, "predict must return logits"),
        (
            {"function": lambda b: predict(b).at[5, 1].set(jnp.nan)},
            ValueError,
            "predict must return finite logits, got nan for example 5",
        ),
        (
            {"function": lambda b: predict(b)[:, : 7 - int(b["index"][0] > 20)]},
            ValueError,
            "predict must return logits for 7 classes as before, got 6",
        ),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        store(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
