"""Prefetch: order, errors, closing, placement."""

import gc
import itertools
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import data
from kdjax.data import _prefetch


def counted(n, seen=None):
    for i in range(n):
        if seen is not None:
            seen.append(i)
        yield {"image": np.full((8, 2), i, np.float32)}


def threads():
    return [t for t in threading.enumerate() if t.name == "prefetch"]


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_order_is_kept_and_the_thread_ends():
    batches = data.prefetch(counted(20), size=3)
    values = [int(b["image"][0, 0]) for b in batches]
    assert values == list(range(20))
    assert isinstance(next(data.prefetch(counted(1)))["image"], jax.Array)
    with pytest.raises(StopIteration):
        next(batches)
    wait_until(lambda: not threads())


def test_reads_ahead_but_not_further_than_asked():
    seen = []
    with data.prefetch(counted(100, seen), size=4) as batches:
        wait_until(lambda: len(seen) == 5)
        time.sleep(0.05)
        assert len(seen) == 5
        next(batches)
        wait_until(lambda: len(seen) == 6)


def test_errors_surface_where_their_batch_would_have_come():
    def broken():
        yield from counted(3)
        raise RuntimeError("disk on fire")

    batches = data.prefetch(broken(), size=2)
    assert [int(b["image"][0, 0]) for b in itertools.islice(batches, 3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="disk on fire"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    wait_until(lambda: not threads())


def test_close_ends_the_thread_and_its_source():
    closed = []

    def endless():
        try:
            yield from ({"image": np.zeros(2)} for _ in itertools.count())
        finally:
            closed.append(True)

    batches = data.prefetch(endless())
    next(batches)
    batches.close()
    assert not threads()
    assert closed == [True]
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()


def test_close_waits_for_no_read_and_nothing_is_placed_after_it(monkeypatch):
    released, placed = threading.Event(), []
    monkeypatch.setattr(_prefetch, "_place", lambda batch, sharding: placed.append(1))

    def blocked():
        yield 0
        released.wait(60)
        yield 1

    batches = data.prefetch(blocked())
    next(batches)
    begun = time.monotonic()
    batches.close()
    assert time.monotonic() - begun < 10
    assert threads()
    with pytest.raises(StopIteration):
        next(batches)
    released.set()
    wait_until(lambda: not threads())
    assert placed == [1]


def test_until_gives_what_is_there_and_ends_a_wait_only():
    released = threading.Event()

    def blocked():
        yield from counted(2)
        released.wait(60)

    with data.prefetch(blocked()) as batches:
        wait_until(lambda: len(batches._buffer._items) == 2)
        assert [int(b["image"][0, 0]) for b in batches.until(lambda: True)] == [0, 1]
        released.set()
        assert list(batches.until(lambda: False)) == []


def test_dropping_it_ends_the_thread():
    batches = data.prefetch({"image": np.zeros(2)} for _ in itertools.count())
    next(batches)
    assert threads()
    del batches
    gc.collect()
    wait_until(lambda: not threads())


def test_places_batches_over_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    batches = data.digits().batches("train", 16, seed=1)
    with data.prefetch(batches, sharding=sharding) as ready:
        for expected, batch in zip(itertools.islice(batches, 3), ready, strict=False):
            assert batch.keys() == expected.keys()
            for key, value in batch.items():
                assert value.sharding.is_equivalent_to(sharding, value.ndim)
                np.testing.assert_array_equal(value, expected[key])


def test_bad_input_is_one_sentence():
    with pytest.raises(ValueError, match="size must be an integer at least 1"):
        data.prefetch(counted(1), size=0)
    with pytest.raises(TypeError, match="batches must be iterable"):
        data.prefetch(3)
    with pytest.raises(TypeError, match="sharding must be"):
        data.prefetch(counted(1), sharding="data")
