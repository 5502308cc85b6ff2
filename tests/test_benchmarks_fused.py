"""The fused loss keeps its bars of memory and work, and the scripts that say so run."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
# Large enough that arithmetic between the products is little beside them.
VOCAB, STUDENT, TEACHER, CHUNK = 2048, 256, 512, 64


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("fused_kd_memory")


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("fused_kd_speed")


def program(memory, n, loss=None, dtype=jnp.float32):
    arguments = memory.shapes(n, VOCAB, STUDENT, TEACHER, dtype)
    return memory.program(loss or memory.fused(CHUNK), arguments)


def test_memory_work_and_arrays_stay_within_their_bars(memory):
    """At 1,024 and 8,192 tokens, from the compiled programs."""
    small, large = (program(memory, n) for n in (1024, 8192))
    for n, found in ((1024, small), (8192, large)):
        for name, (got, bar) in memory.bars(n, VOCAB, STUDENT, TEACHER, CHUNK, found).items():
            assert got <= bar, f"{name} at N = {n}"
    # More tokens cost their own hidden states, no logits: a float32 gradient at most, and labels.
    assert large["bytes"] - small["bytes"] <= 7168 * (STUDENT + 64) * 4
    assert abs(large["flops"] / small["flops"] - 8) < 0.05


def test_the_bars_catch_dense_logits(memory):
    found = program(memory, 1024, memory.dense)
    missed = [
        name
        for name, (got, bar) in memory.bars(1024, VOCAB, STUDENT, TEACHER, CHUNK, found).items()
        if got > bar
    ]
    assert missed == ["bytes", "largest"]


def test_checkpoints_do_more_work(memory):
    """Their forward products are computed twice: the FLOP bar is about that."""
    found = program(memory, 1024, memory.remat(CHUNK))
    assert (
        found["flops"] > 1.3 * memory.bars(1024, VOCAB, STUDENT, TEACHER, CHUNK, found)["flops"][1]
    )


def test_a_tile_at_a_time_needs_less(memory):
    tiled = program(memory, 1024, memory.fused(512, chunk_vocab=256))
    whole = program(memory, 1024, memory.fused(512))
    assert tiled["bytes"] < 0.6 * whole["bytes"]
    assert tiled["largest"] < 1024 * VOCAB


def test_without_a_gradient_only_logits_are_made(memory):
    arguments = memory.shapes(1024, VOCAB, STUDENT, TEACHER, jnp.float32)
    compiled = jax.jit(memory.fused(CHUNK)).lower(*arguments).compile()
    flops = memory.program_counts(compiled).flops
    assert flops < 1.1 * 2 * 1024 * VOCAB * (STUDENT + TEACHER)


def test_programs_compute_the_same(memory):
    rng = np.random.default_rng(0)
    shapes = [(64, 8), (50, 8), (64, 12), (50, 12)]
    arrays = [rng.normal(size=s).astype(np.float32) for s in shapes]
    arrays.append(rng.integers(50, size=64))
    wanted = memory.with_gradients(memory.dense)(*arrays)
    for loss in (memory.fused(16), memory.remat(16)):
        found = memory.with_gradients(loss)(*arrays)
        np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
        for a, b in zip(found[1], wanted[1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_largest_array_of_a_program(memory):
    text = "%a = f32[2,30]{1,0} add(f32[2,30] %b, f32[] %c)\n%d = (s32[7,9], pred[4]) tuple()"
    assert memory.largest(text) == 63


def test_exact_gradients_are_those_of_the_definition(memory):
    """The reference of the half-precision table, by finite differences."""
    rng = np.random.default_rng(1)
    hs, ws, ht, wt = (rng.normal(size=s) for s in ((3, 2), (5, 2), (3, 4), (5, 4)))
    with jax.enable_x64(True):

        def loss(hs, ws):
            from kdjax.lm._fused import fused_linear_kd

            return fused_linear_kd(hs, ws, ht, wt, beta=memory.BETA)

        found = jax.jit(jax.grad(loss, (0, 1)))(hs, ws)
    for a, b in zip(found, memory.exact_gradients(hs, ws, ht, wt), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13)


def test_speed_table_judges_time_and_memory(speed, capsys):
    def row(ratio, mib):
        return {"seconds": 1.0, "ratio": ratio, "cpu_ratio": ratio, "mib": mib}

    rows = {"naive": row(1, 100.0), "fused C=256": row(0.9, 14.0), "checkpoint C=256": row(1.2, 9)}
    found = {
        "size": speed.CPU, "dtype": "float32", "rows": rows, "again": (1.0, 1.0),
        "grown": {name: r["mib"] for name, r in rows.items()},
    }  # fmt: skip
    assert speed.table(found, "cpu") == []
    assert capsys.readouterr().out.count("NOT MET") == 0
    rows["fused C=256"] = row(1.3, 16.0)
    found["grown"]["fused C=1024"] = None
    assert speed.table(found, "cpu") == [
        "fused C=256: 0.16 of the memory",
        "fused C=1024 does not run",
    ]
    assert capsys.readouterr().out.count("NOT MET") == 2


def run_script(*arguments, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_memory_script(tmp_path):
    run = run_script(FOLDER / "fused_kd_memory.py", "--quick", "--json", "m.json", folder=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "All bars are met." in run.stdout
    assert json.loads((tmp_path / "m.json").read_text())["missed"] == []


@pytest.mark.slow
def test_speed_script(tmp_path):
    run = run_script(
        FOLDER / "fused_kd_speed.py", "--quick", "--rounds", "1", "--json", "s.json",
        folder=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads((tmp_path / "s.json").read_text())["main"]["rows"]
    assert list(rows) == ["naive", "fused C=64", "checkpoint C=64"]
    assert all(row["seconds"] > 0 for row in rows.values())


def test_memory_table_judges_what_it_counts(memory, monkeypatch, capsys):
    """Programs of chosen counts: the second misses its memory, then its arrays and its work."""
    options = argparse.Namespace(rows=[(128, 100), (256, 100)], chunks=(64,), student=8, teacher=16)
    small = {"bytes": 6e4, "flops": 2 * 128 * 100 * 40, "largest": 6400, "seconds": 1.0}
    tables = []
    for change in ({}, {"bytes": 2e5}, {"largest": 256 * 100, "flops": 2.2 * 256 * 100 * 40}):
        large = small | {"flops": 2 * 256 * 100 * 40} | change
        found = {128: small, 256: large}
        monkeypatch.setattr(memory, "program", lambda _, a, found=found: found[a[0].shape[0]])
        report = {}
        tables.append(memory.memory_table(options, report))
        assert report["fused 256 100 64"] is large
    assert tables[0] == []
    assert tables[1] == ["N=256 V=100 C=64: bytes 200000, bar 84384"]
    assert [text.split()[3] for text in tables[2]] == ["flops", "largest"]
    assert capsys.readouterr().out.count("NOT MET") == 3


def test_half_precision_table(memory, capsys):
    options = argparse.Namespace(precision=(128, 200, 16, 32))
    assert memory.error_table(options, {}) == []
    assert capsys.readouterr().out.count("% | MET |") == 3


def test_speed_measures_in_this_process(speed, monkeypatch):
    tiny = {"n": 32, "vocab": 40, "student": 8, "teacher": 8, "chunks": [16]}
    monkeypatch.setattr(speed, "growth_elsewhere", speed.growth)
    found = speed.measured(tiny, "float32", rounds=1, names=["fused C=16"])
    row = found["rows"]["fused C=16"]
    assert row["seconds"] > 0
    assert row["mib"] >= 0
