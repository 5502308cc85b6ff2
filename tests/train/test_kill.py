"""SIGKILL at any moment: the same command again ends at the bits of an unbroken run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train import tiny_run as tiny

import kdjax as kd

STEPS = 150
SECONDS = 0.004


def launch(folder):
    command = [sys.executable, tiny.__file__, str(folder), str(STEPS), str(SECONDS)]
    root = str(Path(kd.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def steps_in(folder):
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


def kill_after(folder, step, delay):
    """Kills a run a moment after it has saved a step; True if it was still running."""
    process = launch(folder)
    deadline = time.monotonic() + 120
    while process.poll() is None and (steps_in(folder) or [-1])[-1] < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    return process.returncode != 0


def kills(folder, times):
    moments = random.Random(1)
    killed = 0
    for i in range(times):
        killed += kill_after(folder, (i * STEPS) // (times + 1), moments.uniform(0.0, 0.2))
    assert killed >= min(times, 2)
    process = launch(folder)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    state = kd.train.restore(folder, tiny.start())
    unbroken = kd.train.fit(tiny.LEARNER, tiny.start(), tiny.Data(), steps=STEPS, progress=False)
    assert tiny.same(state, unbroken)
    lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if line]
    assert len(lines) == STEPS // 2
    assert [path.name for path in folder.iterdir() if "tmp" in path.name] == []


def test_killed_twice(tmp_path):
    kills(tmp_path / "run", 2)


@pytest.mark.slow
def test_killed_ten_times(tmp_path):
    kills(tmp_path / "run", 10)
