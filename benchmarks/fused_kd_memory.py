"""What `kdjax.lm.fused_linear_kd` needs, against dense logits and chunks under `jax.checkpoint`.

Programs are compiled and not run, so that sizes may exceed the machine: value and gradients by the
student's hidden states and head, of 0.5 * Jensen-Shannon (beta = 0.5) + 0.5 * cross-entropy, from
hidden states of width 2048 (student) and 4096 (teacher). Each has bars; a miss ends the script with
exit status 1:

- temporary memory at most 1.25 (V d_s 4 + 2 C V 4) + 2 N d_s 4 bytes;
- from N = 8192 to 65536, at C = 256, at most 1 GiB more;
- at most 1.05 times the 2 N V (d_t + 3 d_s) FLOPs of dense logits;
- no array of N V elements or more in the compiled program.

Then gradients with bfloat16 inputs are compared with exact ones, for a student far from its
teacher, within 10 %, and within 2 % of it: at most 0.5 % relative error.

    PYTHONPATH=. python benchmarks/fused_kd_memory.py
    PYTHONPATH=. python benchmarks/fused_kd_memory.py --quick
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _compare import machine, program_counts

from kdjax.lm._fused import fused_linear_kd

BETA, HARD, SOFT = 0.5, 0.5, 0.5
STUDENT, TEACHER = 2048, 4096
GIB = 2**30
ROWS = [(8192, 32000), (8192, 128256), (16384, 128256), (65536, 128256), (65536, 256000)]
FLOP_LIMIT, GROWTH_LIMIT, ERROR_LIMIT = 1.05, 1.0, 0.005


# The three programs.


def dense(hs: Any, ws: Any, ht: Any, wt: Any, labels: Any) -> jax.Array:
    """The loss from all logits at once, as one writes it down, in float32 or float64."""
    acc = jnp.promote_types(jnp.float32, hs.dtype)
    z_s = jnp.matmul(hs, ws.T, preferred_element_type=acc)
    z_t = jnp.matmul(ht, wt.T, preferred_element_type=acc)
    log_q, log_p = jax.nn.log_softmax(z_s), jax.lax.stop_gradient(jax.nn.log_softmax(z_t))
    log_m = jnp.logaddexp(log_p + np.log(BETA), log_q + np.log1p(-BETA))
    soft = BETA * jnp.sum(jnp.exp(log_p) * (log_p - log_m), axis=-1)
    soft += (1 - BETA) * jnp.sum(jnp.exp(log_q) * (log_q - log_m), axis=-1)
    hard = -jnp.take_along_axis(log_q, labels[:, None], axis=-1)[:, 0]
    return jnp.mean(SOFT * soft + HARD * hard)


def remat(chunk: int) -> Callable[..., jax.Array]:
    """The dense loss of a chunk at a time, its logits computed again for the gradient."""

    def loss(hs: Any, ws: Any, ht: Any, wt: Any, labels: Any) -> jax.Array:
        @jax.checkpoint
        def one(total: Any, rows: Any) -> Any:
            return total + dense(rows[0], ws, rows[1], wt, rows[2]), None

        chunks = hs.shape[0] // chunk
        split = [x.reshape(chunks, chunk, *x.shape[1:]) for x in (hs, ht, labels)]
        acc = jnp.promote_types(jnp.float32, hs.dtype)
        return jax.lax.scan(one, jnp.zeros((), acc), split)[0] / chunks

    return loss


def fused(chunk: int | None, **options: Any) -> Callable[..., jax.Array]:
    """Ours, with so many tokens at a time."""

    def loss(hs: Any, ws: Any, ht: Any, wt: Any, labels: Any) -> jax.Array:
        return fused_linear_kd(
            hs, ws, ht, wt, labels, beta=BETA, soft_weight=SOFT, hard_weight=HARD,
            student_vocab_dim=0, teacher_vocab_dim=0, chunk_tokens=chunk, **options,
        )  # fmt: skip

    return loss


def with_gradients(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Jitted value and gradients by the student's hidden states and head."""
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


# What is measured.


def shapes(n: int, vocab: int, student: int, teacher: int, dtype: Any) -> list[Any]:
    """The arguments of a loss, without values."""
    sizes = [(n, student), (vocab, student), (n, teacher), (vocab, teacher)]
    floats = [jax.ShapeDtypeStruct(size, dtype) for size in sizes]
    return [*floats, jax.ShapeDtypeStruct((n,), jnp.int32)]


def largest(text: str) -> int:
    """Elements of the largest array in a compiled program."""
    found = re.findall(r"\b(?:f64|f32|f16|bf16|s32|s64|u32|pred|s8|u8)\[([\d,]+)\]", text)
    return max(math.prod(map(int, dims.split(","))) for dims in set(found))


def program(loss: Callable[..., jax.Array], arguments: list[Any]) -> dict[str, float]:
    """Bytes, FLOPs and the largest array of a program, and seconds to compile it."""
    start = time.perf_counter()
    compiled = with_gradients(loss).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    return {
        "bytes": compiled.memory_analysis().temp_size_in_bytes,
        "flops": program_counts(compiled).flops,
        "largest": largest(compiled.as_text()),
        "seconds": seconds,
    }


def memory_bar(n: int, vocab: int, student: int, chunk: int) -> float:
    """Bytes that a fused program may take."""
    return 1.25 * (vocab * student * 4 + 2 * chunk * vocab * 4) + 2 * n * student * 4


def verdict(met: bool) -> str:
    return "MET" if met else "NOT MET"


def bars(
    n: int, vocab: int, student: int, teacher: int, chunk: int, found: dict[str, float]
) -> dict[str, tuple[float, float]]:
    """What was found and what is allowed, by name."""
    return {
        "bytes": (found["bytes"], memory_bar(n, vocab, student, chunk)),
        "flops": (found["flops"], FLOP_LIMIT * 2 * n * vocab * (teacher + 3 * student)),
        "largest": (found["largest"], n * vocab - 1),
    }


def gradient_errors(n: int, vocab: int, student: int, teacher: int, chunk: int) -> list[Any]:
    """Relative errors of both gradients with bfloat16 inputs, for three distances."""
    rng = np.random.default_rng(0)
    ht = rng.normal(size=(n, teacher))
    wt = 3 * rng.normal(size=(vocab, teacher)) / np.sqrt(teacher)
    # A student whose logits can be the teacher's: its first directions carry them all.
    ht[:, student:] = 0
    found = []
    for name, share in (("far", 1.0), ("within 10 %", 0.1), ("within 2 %", 0.02)):
        hs = ht[:, :student] + share * rng.normal(size=(n, student))
        ws = wt[:, :student] + share * wt.std() * rng.normal(size=(vocab, student))
        rounded = [jnp.asarray(x, jnp.bfloat16) for x in (hs, ws, ht, wt)]

        def loss(*arguments: Any) -> jax.Array:
            return fused_linear_kd(*arguments, beta=BETA, chunk_tokens=chunk)

        ours = with_gradients(loss)(*rounded)[1]
        exact = exact_gradients(*(np.asarray(x, np.float64) for x in rounded))
        errors = [
            float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
            for a, b in zip(ours, exact, strict=True)
        ]
        found.append((name, *errors))
    return found


def exact_gradients(hs: Any, ws: Any, ht: Any, wt: Any) -> tuple[Any, Any]:
    """The Jensen-Shannon gradients by hidden states and head, in float64."""

    def log_softmax(z: Any) -> Any:
        z = z - z.max(1, keepdims=True)
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    log_q, log_p = log_softmax(hs @ ws.T), log_softmax(ht @ wt.T)
    log_m = np.logaddexp(log_p + np.log(BETA), log_q + np.log1p(-BETA))
    q, gap = np.exp(log_q), log_q - log_m
    dz = (1 - BETA) * q * (gap - (q * gap).sum(1, keepdims=True)) / len(hs)
    return dz @ ws, dz.T @ hs


# Tables.


def memory_table(options: argparse.Namespace, report: dict[str, Any]) -> list[str]:
    """Prints the table of programs, and returns what is missed."""
    missed, used = [], {}
    chunks = options.chunks
    head = " | ".join(f"fused C={c}" for c in chunks)
    print(f"GiB of temporaries, f32, d_s={options.student}, d_t={options.teacher}\n")
    print(f"| N | V | naive | {head} | checkpoint C={chunks[0]} | FLOPs / dense | largest / N V |")
    print("|" + "---|" * (6 + len(chunks)))
    for n, vocab in options.rows:
        arguments = shapes(n, vocab, options.student, options.teacher, jnp.float32)
        naive = program(dense, arguments)
        cells, ratios = [f"{naive['bytes'] / GIB:.2f}"], []
        for chunk in chunks:
            found = program(fused(chunk), arguments)
            used[n, vocab, chunk] = found["bytes"]
            checked = bars(n, vocab, options.student, options.teacher, chunk, found)
            report[f"fused {n} {vocab} {chunk}"] = found
            missed += [
                f"N={n} V={vocab} C={chunk}: {name} {got:.6g}, bar {bar:.6g}"
                for name, (got, bar) in checked.items()
                if got > bar
            ]
            got, bar = checked["bytes"]
            cells.append(f"{got / GIB:.2f} (bar {bar / GIB:.2f}: {verdict(got <= bar)})")
            ratios.append((FLOP_LIMIT * found["flops"] / checked["flops"][1], found["largest"]))
        again = program(remat(chunks[0]), arguments)
        report |= {f"naive {n} {vocab}": naive, f"checkpoint {n} {vocab}": again}
        cells.append(f"{again['bytes'] / GIB:.2f}")
        flops, most = (max(column) for column in zip(*ratios, strict=True))
        cells += [f"{flops:.3f} {verdict(flops <= FLOP_LIMIT)}"]
        cells += [f"{most / (n * vocab):.3f} {verdict(most < n * vocab)}"]
        print(f"| {n} | {vocab} | {' | '.join(cells)} |", flush=True)
    vocab, chunk = options.rows[1][1], chunks[-1]
    sizes = [n for n, v in options.rows if v == vocab]
    more = (used[sizes[-1], vocab, chunk] - used[sizes[0], vocab, chunk]) / GIB
    print(f"\nN {sizes[0]} to {sizes[-1]}, V={vocab}, C={chunk}: {more:+.2f} GiB, bar +1: ", end="")
    print(verdict(more <= GROWTH_LIMIT))
    return missed + [f"growth with N: {more:.2f} GiB"] * (more > GROWTH_LIMIT)


def half_row(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Prints bfloat16 inputs, without a bar: XLA's CPU backend holds float32 copies of them."""
    n, vocab = options.rows[1]
    arguments = shapes(n, vocab, options.student, options.teacher, jnp.bfloat16)
    chunk = options.chunks[0]
    losses = {"naive": dense, "fused": fused(chunk), "checkpoint": remat(chunk)}
    found = {name: program(loss, arguments) for name, loss in losses.items()}
    report |= {f"bfloat16 {name}": counts for name, counts in found.items()}
    cells = ", ".join(f"{name} {counts['bytes'] / GIB:.2f}" for name, counts in found.items())
    print(f"bf16 inputs, N={n}, V={vocab}, C={chunk}: {cells} GiB\n")


def error_table(options: argparse.Namespace, report: dict[str, Any]) -> list[str]:
    """Prints the gradient errors of half precision, and returns what is missed."""
    n, vocab, student, teacher = options.precision
    print("| bf16 inputs, student | error of dh | error of dW | bar 0.5 % |\n|---|---|---|---|")
    missed = []
    for name, *errors in gradient_errors(n, vocab, student, teacher, n // 32):
        report[f"error {name}"] = errors
        met = max(errors) <= ERROR_LIMIT
        print(f"| {name} | {errors[0]:.2%} | {errors[1]:.2%} | {verdict(met)} |", flush=True)
        missed += [] if met else [f"gradient errors, {name}: {errors}"]
    return missed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="sizes of seconds")
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    options = parser.parse_args()
    options.rows, options.chunks = ROWS, (1024, 256)
    options.student, options.teacher = STUDENT, TEACHER
    options.precision = 2048, 8192, 128, 256
    if options.quick:
        options.rows, options.chunks = [(1024, 2000), (8192, 2000)], (128, 64)
        options.student, options.teacher = 128, 256
        options.precision = 256, 512, 64, 128
    return options


def main() -> int:
    options = arguments()
    command = shlex.join(["python", "benchmarks/fused_kd_memory.py", *sys.argv[1:]])
    print(f"`{command}`, {machine()}\n")
    report: dict[str, Any] = {}
    missed = memory_table(options, report)
    half_row(options, report)
    missed += error_table(options, report)
    report |= {"command": command, "machine": machine(), "missed": missed}
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print("\nAll bars are met." if not missed else "\nMissed:\n" + "\n".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
