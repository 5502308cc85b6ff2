"""Two real processes: they train, checkpoint, stop and resume together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train import tiny_run as tiny

import kdjax as kd

PROGRAM = Path(tiny.__file__).with_name("two_processes.py")


def launch(folder, steps, pause):
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(kd.__file__).parents[1])}
    return [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(port), str(rank), str(folder), str(steps), str(pause)],
            env={**environment, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def finish(processes):
    try:
        outputs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "\n".join(outputs)


def wait_for(folder, step, processes):
    deadline = time.monotonic() + 120
    while not (folder / str(step)).exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_restarted_together(tmp_path, number):
    codes, text = finish(launch(tmp_path / "whole", 60, 0))
    assert codes == [0, 0], text
    folder = tmp_path / "parts"
    processes = launch(folder, 60, 0.05)
    wait_for(folder, 10, processes)
    processes[1].send_signal(number)
    codes, text = finish(processes)
    assert all(codes), text
    if number == signal.SIGTERM:
        assert text.count("KeyboardInterrupt: stopped by") == 2, text
    codes, text = finish(launch(folder, 60, 0))
    assert codes == [0, 0], text
    like = tiny.start()
    whole, parts = (kd.train.restore(tmp_path / name, like) for name in ("whole", "parts"))
    assert int(parts.step) == 60
    assert tiny.same(whole, parts)
    steps = [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
