"""How long `kdjax.lm.fused_linear_kd` takes, and how much memory it really uses.

Value and gradients of the loss of `fused_kd_memory.py`, against dense logits and against chunks
under `jax.checkpoint`. Times are interleaved, and dense logits are timed twice in the same rounds:
their ratio is the noise. Memory is the growth of a process that runs one program: of its resident
set on a CPU, of the device's peak on a GPU.

On a CPU, in float32, with one thread; bars: at most 1.1 times the time of dense logits and 0.15
times their memory, with 256 tokens at a time, and faster than checkpoints. On a GPU, in bfloat16:
at most 1.1 times the time of dense logits at N = 8192, V = 128256, and N = 65536, V = 256000 runs,
whose dense logits take 440 GiB. A miss of memory, or a program that fails, ends the script
with exit status 1; times depend on the machine's load and don't.

    PYTHONPATH=. python benchmarks/fused_kd_speed.py
    PYTHONPATH=. python benchmarks/fused_kd_speed.py --quick
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

TIME_LIMIT, MEMORY_LIMIT = 1.1, 0.15
CPU = {"n": 2048, "vocab": 32000, "student": 256, "teacher": 512, "chunks": [256, 1024]}
QUICK = {"n": 512, "vocab": 4000, "student": 64, "teacher": 128, "chunks": [64]}
GPU = {"n": 8192, "vocab": 128256, "student": 2048, "teacher": 4096, "chunks": [1024, 2048]}
GPU_LARGE = {"n": 65536, "vocab": 256000, "student": 2048, "teacher": 4096, "chunks": [512]}


def one_thread() -> None:
    """Keeps this process, and those it starts, on one core; ahead of JAX's own threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def functions(size: dict[str, Any]) -> dict[str, Any]:
    """The losses by name."""
    from fused_kd_memory import dense, fused, remat

    found = {"naive": dense}
    found |= {f"fused C={c}": fused(c) for c in size["chunks"]}
    found[f"checkpoint C={size['chunks'][0]}"] = remat(size["chunks"][0])
    return found


def inputs(size: dict[str, Any], dtype: str) -> list[Any]:
    """Random arguments, made on the device."""
    import jax
    import jax.numpy as jnp

    n, vocab, student, teacher = (size[k] for k in ("n", "vocab", "student", "teacher"))
    kinds = [(n, student), (vocab, student), (n, teacher), (vocab, teacher)]

    @jax.jit
    def make() -> list[Any]:
        made = []
        for i, (rows, columns) in enumerate(kinds):
            # Random enough, and without the temporaries of a generator, which would be the peak.
            r = jnp.arange(rows, dtype=jnp.float32)[:, None]
            c = jnp.arange(columns, dtype=jnp.float32)[None]
            x = jnp.sin((i + 1.7) * r * c + r + 3 * c)
            made.append((x * (1.4 if i % 2 == 0 else 3 * columns**-0.5)).astype(dtype))
        return [*made, jnp.arange(n, dtype=jnp.int32) * 7919 % vocab]

    return jax.block_until_ready(make())


def growth(name: str, size: dict[str, Any], dtype: str) -> float:
    """MiB by which this process grows when it runs one program for the first time."""
    import jax
    from fused_kd_memory import with_gradients

    arguments = inputs(size, dtype)
    compiled = with_gradients(functions(size)[name]).lower(*arguments).compile()
    device = jax.devices()[0]
    if device.platform != "cpu":
        before = device.memory_stats()["bytes_in_use"]
        jax.block_until_ready(compiled(*arguments))
        return (device.memory_stats()["peak_bytes_in_use"] - before) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    jax.block_until_ready(compiled(*arguments))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) / (2**20 if sys.platform == "darwin" else 2**10)


def growth_elsewhere(name: str, size: dict[str, Any], dtype: str) -> float | None:
    """``growth`` in a process of its own; None where it fails, as for want of memory."""
    task = json.dumps({"name": name, "size": size, "dtype": dtype})
    run = subprocess.run(
        [sys.executable, __file__, "--growth", task], capture_output=True, text=True, check=False
    )
    if run.returncode:
        print((run.stderr.strip().splitlines() or ["no message"])[-1][:200], file=sys.stderr)
        return None
    return float(run.stdout.strip().splitlines()[-1])


def measured(
    size: dict[str, Any], dtype: str, rounds: int, names: list[str] | None = None
) -> dict[str, Any]:
    """Growth of all programs, then their times in turns; the first is timed twice."""
    found = functions(size)
    names = names or list(found)
    grown = {name: growth_elsewhere(name, size, dtype) for name in names}
    running = [name for name in names if grown[name] is not None]

    from _compare import interleave
    from fused_kd_memory import with_gradients

    arguments = inputs(size, dtype)
    calls = [with_gradients(found[name]).lower(*arguments).compile() for name in running]
    timed = [lambda call=call: call(*arguments) for call in [*calls, *calls[:1]]]
    for call in timed[:-1]:
        call()
    times = interleave(*timed, rounds=rounds)
    rows = {
        name: {
            "seconds": times.medians()["wall"][i],
            "cpu_seconds": times.medians()["cpu"][i],
            "ratio": times.ratio("wall", i),
            "cpu_ratio": times.ratio("cpu", i),
            "mib": grown[name],
        }
        for i, name in enumerate(running)
    }
    again = times.ratio("wall", len(running)), times.ratio("cpu", len(running))
    return {"size": size, "dtype": dtype, "rows": rows, "again": again, "grown": grown}


def verdict(met: bool) -> str:
    return "MET" if met else "NOT MET"


def table(found: dict[str, Any], kind: str) -> list[str]:
    """Prints times and growth against dense logits, and returns the bars that count."""
    size, rows = found["size"], found["rows"]
    ratio = "cpu_ratio" if kind == "cpu" else "ratio"
    sizes = ", ".join(f"{k}={size[k]}" for k in ("n", "vocab", "student", "teacher"))
    print(f"{sizes}, {found['dtype']}; dense logits against themselves: ", end="")
    print(f"{found['again'][kind == 'cpu']:.2f}\n")
    print(
        "| program | seconds | time / naive | growth, MiB | growth / naive |\n" + "|---" * 5 + "|"
    )
    naive, missed = rows["naive"], []
    slowest = max(r[ratio] for name, r in rows.items() if name.startswith("checkpoint"))
    for i, (name, row) in enumerate(rows.items()):
        share = row["mib"] / naive["mib"]
        cells = [f"{row['seconds']:.2f}", f"{row[ratio]:.2f}", f"{row['mib']:.0f}", f"{share:.2f}"]
        if name.startswith("fused"):
            met = row[ratio] <= TIME_LIMIT and row[ratio] < slowest
            cells[1] += f" (bar {TIME_LIMIT}, below checkpoint: {verdict(met)})"
            if size == CPU and i == 1:
                cells[3] += f" (bar {MEMORY_LIMIT}: {verdict(share <= MEMORY_LIMIT)})"
                missed += [f"{name}: {share:.2f} of the memory"] * (share > MEMORY_LIMIT)
        print(f"| {name} | {' | '.join(cells)} |")
    lost = [name for name, mib in found["grown"].items() if mib is None]
    return missed + [f"{name} does not run" for name in lost]


def large(options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The size whose dense logits fit on no single device."""
    size = GPU_LARGE
    names = [f"fused C={size['chunks'][0]}"]
    found = measured(size, "bfloat16", options.rounds, names)
    name = names[0]
    runs = name in found["rows"]
    row = found["rows"].get(name, {"seconds": float("nan"), "mib": float("nan")})
    print(f"\nN={size['n']}, V={size['vocab']}, bf16: {row['seconds']:.2f} s, ", end="")
    print(f"{row['mib'] / 1024:.1f} GiB; runs: {verdict(runs)}")
    return [] if runs else [f"{name} does not run at N={size['n']}"], found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="sizes of seconds")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of times")
    parser.add_argument("--threads", action="store_true", help="all cores of a CPU, not one")
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    parser.add_argument("--growth", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def main() -> int:
    options = arguments()
    if options.growth:
        task = json.loads(options.growth)
        print(growth(task["name"], task["size"], task["dtype"]))
        return 0
    if not options.threads:
        one_thread()
    # A process that only measures must not hold what the others need.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    import jax
    from _compare import machine

    kind = jax.devices()[0].platform
    command = shlex.join(["python", "benchmarks/fused_kd_speed.py", *sys.argv[1:]])
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"`{command}`, {machine()}{load}\n")
    size, dtype = (CPU, "float32") if kind == "cpu" else (GPU, "bfloat16")
    found = measured(QUICK if options.quick else size, dtype, options.rounds)
    missed, report = table(found, kind), {"main": found}
    if kind != "cpu" and not options.quick:
        more, report["large"] = large(options)
        missed += more
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print("\nAll bars of memory are met." if not missed else "\nMissed:\n" + "\n".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
