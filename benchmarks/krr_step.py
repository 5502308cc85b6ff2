"""What KRR-ST's update costs: the kernel ridge regression alone, and the whole outer step.

    python benchmarks/krr_step.py
    python benchmarks/krr_step.py --no-times
    python benchmarks/krr_step.py --settings digits --times

The regression alone (loss and gradient with respect to synthetic features and targets) stands
beside plain autodiff: through ``jnp.linalg.solve`` in the order of the published code, and through
``cho_solve``. Bars: FLOPs and temporary memory within 1.1 of a prototype of the same closed form,
measured for the project's reference (CPU, jax 0.10.2). XLA doesn't count LAPACK's own work.

The outer step stands beside a bare hand-written one of the same mathematics: the regression's
gradient in closed form, the pool in arrays, networks by Flax. Bars: as many convolutions,
FLOPs <= 1.01, bytes <= 1.05, temporaries <= 1.10, one program for two lives of a network and for
all learning rates and penalties, and the same pairs after three steps (float64).

Targets are stored (cached), or computed from the augmented images in every step, as published
(live). Bar in the CIFAR-100 setting: cached takes at most 0.6 of live's FLOPs. The published
target network is a ResNet-18 whose first convolution is padded by 2; here images are padded by 1
and the convolution by 1, which gives the same maps of 34 x 34.

Counts are those of compiled programs; none of the CIFAR-100 ones is run, unless by --times.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _compare import (
    STEP_BARS,
    Counts,
    compiled,
    counting,
    counts_row,
    interleave,
    machine,
    program_counts,
    stepper,
)
from _krr_step import REG, SETTINGS, STEPS, make_case, matmul
from jax.scipy.linalg import cho_solve

import kdjax as kd
from kdjax.methods import krr_st

# m, d, B, dy: GFLOP and temporary MiB of the prototype (custom VJP, and primal where d < m).
KRR = {
    (1000, 8192, 1024, 512): (75.5, 87),
    (1000, 8192, 1024, 10): (17.6, 67),
    (2000, 512, 1024, 512): (8.2, 17),
}
KRR_BAR, CACHED_BAR, AGREEMENT = 1.1, 0.6, 1e-7


# The regression alone.


def published(f_s: jax.Array, y_s: jax.Array, f_t: jax.Array, y_t: jax.Array) -> jax.Array:
    """In the published order: both Gram matrices, then ``K_ts solve(K_ss + lam I, y_s)``."""
    gram, cross = matmul(f_s, f_s.T) + 1, matmul(f_t, f_s.T) + 1
    lam = REG * jax.lax.stop_gradient(jnp.trace(gram))
    found = jnp.linalg.solve(gram + lam * jnp.eye(len(f_s), dtype=f_s.dtype), y_s)
    return jnp.mean((matmul(cross, found) - y_t) ** 2)


def by_cholesky(f_s: jax.Array, y_s: jax.Array, f_t: jax.Array, y_t: jax.Array) -> jax.Array:
    """The same through a Cholesky factor, which JAX differentiates."""
    gram, cross = matmul(f_s, f_s.T) + 1, matmul(f_t, f_s.T) + 1
    lam = REG * jax.lax.stop_gradient(jnp.trace(gram))
    factor = jnp.linalg.cholesky(gram + lam * jnp.eye(len(f_s), dtype=f_s.dtype))
    return jnp.mean((matmul(cross, cho_solve((factor, True), y_s)) - y_t) ** 2)


LOSSES: dict[str, Callable[..., jax.Array]] = {
    "LU, published order": published,
    "cho_solve": by_cholesky,
    "ours": kd.kernels.krr_loss,
}


def regression(size: tuple[int, int, int, int]) -> dict[str, Counts]:
    """Counts of loss and gradient, of which nothing is run."""
    m, d, b, k = size
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((m, d), (m, k), (b, d), (b, k))]
    return {
        name: program_counts(jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile())
        for name, loss in LOSSES.items()
    }


def regression_row(
    size: tuple[int, int, int, int], found: dict[str, Counts], wanted: tuple[float, float]
) -> tuple[str, dict[str, bool]]:
    """A row of the table, and whether each bar is met."""
    cells, judged = [], {}
    for i, (name, unit, bar) in enumerate(
        (("flops", 1e9, wanted[0]), ("temporaries", 2**20, wanted[1]))
    ):
        values = [getattr(counts, name) / unit for counts in found.values()]
        cells += [" / ".join(f"{value:.3g}" for value in values), f"{bar:g}"]
        text = f"KRR {size}: {values[-1]:.4g} {('GFLOP', 'MiB temporaries')[i]}"
        judged[f"{text}, at most {KRR_BAR:g} x {bar:g}"] = values[-1] <= KRR_BAR * bar
    return f"| {', '.join(map(str, size))} | {' | '.join(cells)} |", judged


def regression_times(size: tuple[int, int, int, int], rounds: int) -> list[float]:
    """Median CPU seconds of every way."""
    m, d, b, k = size
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((m, d), (m, k), (b, d), (b, k))
    ]
    calls = [
        functools.partial(jax.jit(jax.value_and_grad(loss, (0, 1))), *arrays)
        for loss in LOSSES.values()
    ]
    interleave(*calls, rounds=1)  # compiles
    return interleave(*calls, rounds=rounds).medians()["cpu"]


# What is measured.


def counted(name: str, live: bool) -> tuple[Counts, Counts]:
    """Counts of the bare step and of ours; no step is run."""
    case = make_case(name, live)
    bare = program_counts(compiled(case.bare, case.bare_state, case.batch))
    return bare, program_counts(compiled(case.ours, case.state, case.batch))


def disagreement(live: bool) -> float:
    """The largest relative difference of pairs and losses over three steps in float64."""
    with jax.enable_x64(True):
        case = make_case("tiny", live, abstract=False, dtype=jnp.float64)
        ours, bare = (jax.jit(step) for step in (case.ours, case.bare))
        state, bare_state, worst = case.state, case.bare_state, 0.0
        for i in range(3):
            batch = ({**case.batch[0], "pool_member": jnp.asarray(i % 2)}, *case.batch[1:])
            state, found = ours(state, batch)
            bare_state, wanted = bare(bare_state, batch)
            pairs = state.params["student"], found["loss"]
            for a, b in zip(
                jax.tree.leaves(pairs),
                jax.tree.leaves((bare_state[0], wanted["loss"])),
                strict=True,
            ):
                gap = float(jnp.abs(a - b).max() / jnp.abs(b).max())
                worst = max(worst, gap if math.isfinite(gap) else math.inf)
    return worst


def traces() -> dict[str, int]:
    """How often the step is traced over two lives of a network, and for several settings."""
    case = make_case("tiny", False, abstract=False, max_age=2)
    update, seen = counting(case.ours)
    step, state, ages = jax.jit(update), case.state, set()
    for _ in range(16):
        state, metrics = step(state, case.batch)
        ages.add(int(metrics["pool_age"]))
    assert ages == {0, 1, 2}, ages
    pairs = {"image": jnp.ones((6, 8, 8, 1)), "target": jnp.ones((6, 7))}
    module = kd.models.PooledConvNet(7, widths=(4,))
    network = kd.from_linen(module, taps={"features": "pool"})

    def swept(numbers: Any, state: Any, batch: Any) -> Any:
        rate, reg = numbers
        method = krr_st.krr_st(network, pairs, pool_size=2, warm_up=False, reg=reg)
        tx = krr_st.optimizer(rate, steps=STEPS)
        return kd.minimize(method, tx).update(state, batch)

    swept, swept_seen = counting(swept)
    step = jax.jit(swept)
    for numbers in ((1e-3, 1e-6), (2e-3, 1e-5)):
        step(tuple(map(jnp.asarray, numbers)), case.state, case.batch[0])
    return {"two lives of a network": len(seen), "learning rates, penalties": len(swept_seen)}


def step_times(name: str, live: bool, rounds: int) -> Any:
    """Ours against the bare step, and the bare step against itself."""
    case = make_case(name, live, abstract=False)
    bare, ours = (jax.jit(step, donate_argnums=0) for step in (case.bare, case.ours))
    calls = [
        stepper(step, state, case.batch)
        for step, state in ((bare, case.bare_state), (ours, case.state), (bare, case.bare_state))
    ]
    interleave(*calls, rounds=1)  # compiles
    return interleave(*calls, rounds=rounds, repeat=1 if not SETTINGS[name].small else 3)


# What is printed.


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--settings", nargs="+", choices=SETTINGS, default=["digits", "cifar100"])
    add("--no-krr", action="store_true", help="the outer step only")
    add("--rounds", type=int, default=5, help="interleaved rounds of times")
    times = parser.add_mutually_exclusive_group()
    times.add_argument("--times", action="store_true", help="time the large settings, too")
    times.add_argument("--no-times", action="store_true", help="counts only")
    add("--json", type=Path, help="a file for all numbers")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def print_regression(options: argparse.Namespace, report: dict[str, Any]) -> dict[str, bool]:
    judged: dict[str, bool] = {}
    print(f"| m, d, B, dy | GFLOP: {' / '.join(LOSSES)} | prototype | temporary MiB | prototype |")
    print("|---|---|---|---|---|")
    for size, wanted in KRR.items():
        found = regression(size)
        row, more = regression_row(size, found, wanted)
        print(row, flush=True)
        judged |= more
        report[f"KRR {size}"] = {name: counts._asdict() for name, counts in found.items()}
        if options.times:
            seconds = regression_times(size, options.rounds)
            report[f"KRR {size}"]["cpu"] = seconds
            print(f"| CPU seconds | {' / '.join(f'{s:.2f}' for s in seconds)} | | | |", flush=True)
    print()
    return judged


def print_steps(options: argparse.Namespace, report: dict[str, Any]) -> dict[str, bool]:
    judged: dict[str, bool] = {}
    print("| outer step | convolutions, bare / ours | FLOPs <= 1.01 | bytes <= 1.05 ", end="")
    print("| temporaries <= 1.10 |\n|---|---|---|---|---|")
    for name in options.settings:
        flops = {}
        for kind in ("cached", "live"):
            bare, ours = counted(name, kind == "live")
            row, missed = counts_row(f"{name}, {kind}", bare, ours, STEP_BARS)
            print(row, flush=True)
            judged[f"{name}, {kind}: the counts of the bare step"] = not missed
            judged |= dict.fromkeys(missed, False)
            flops[kind] = ours.flops
            report[f"{name}, {kind}"] = {"bare": bare._asdict(), "ours": ours._asdict()}
        share = flops["cached"] / flops["live"]
        text = f"{name}: cached targets take {share:.4f} of the FLOPs of live ones"
        if name == "cifar100":
            judged[f"{text}, at most {CACHED_BAR}"] = share <= CACHED_BAR
        else:
            print(f"\n{text}\n")
    print()
    return judged


def main(argv: Sequence[str] | None = None) -> int:
    """Prints tables and verdicts, and returns 1 if a bar is missed."""
    given = sys.argv[1:] if argv is None else list(argv)
    options = arguments(given)
    command = shlex.join(["python", "benchmarks/krr_step.py", *given])
    print(f"`{command}`, {machine()}\n")
    report: dict[str, Any] = {"command": command, "machine": machine()}
    judged = {} if options.no_krr else print_regression(options, report)
    judged |= print_steps(options, report)
    for kind in ("cached", "live"):
        report[f"gap, {kind}"] = gap = disagreement(kind == "live")
        text = f"three steps, {kind}: pairs and losses differ by {gap:.1e}"
        judged[f"{text}, at most {AGREEMENT:g}"] = gap <= AGREEMENT
    report["traces"] = traces()
    for what, count in report["traces"].items():
        judged[f"traces for {what}: {count}"] = count == 1
    timed = [n for n in options.settings if options.times or SETTINGS[n].small]
    if timed and not options.no_times:
        print("| outer step, ours / bare | CPU time | wall time | ms |\n|---|---|---|---|")
        for name in timed:
            times = step_times(name, False, options.rounds)
            cells = [times.ratio_cell(kind) for kind in ("cpu", "wall")]
            report[f"{name}, times"] = times.medians()
            ms = 1e3 * times.medians()["cpu"][1]
            print(f"| {name}, cached | {' | '.join(cells)} | {ms:.3g} |", flush=True)
        print()
    for text, met in judged.items():
        print(f"{'MET' if met else 'NOT MET'}: {text}")
    if options.json:
        options.json.write_text(json.dumps({**report, "verdicts": judged}, indent=1) + "\n")
    return 0 if all(judged.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
