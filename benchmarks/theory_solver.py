"""What the solver costs: tau and the risk for up to a million eigenvalues, on one core.

    python benchmarks/theory_solver.py             # 2 to 4 minutes, 4 GB
    python benchmarks/theory_solver.py --cores 2   # as many as you like, 0 for all

What is claimed, for lam_i = i^-2 and n = p / 4 without a ridge:

- `effective_reg` solves for a million eigenvalues in under one second on one core after
  compilation, in float32 and in float64;
- at p = 1e6 the relative errors of tau, 1 - Omega and the risk in float32 are at most 3e-7,
  against a bisection in long double on the same eigenvalues (also at n = p - 2, where forms that
  cancel lose all their digits).

Alternatives, on the same arrays and printed with the ratio to ours:

- brentq: `scipy.optimize.brentq` on a NumPy sum in float64, as one would write it;
- bisection: a jitted JAX loop of 100 halvings of log tau, differentiated through the loop. What
  that gives isn't the derivative of the root but of the starting bracket: its error is printed;
- Newton loop: as many Newton steps as ours needs at most for these n, a jitted scan that is
  differentiated through, which keeps every step in memory; it sums lam / (lam + tau) - n as
  written, which in float32 loses digits that ours keeps.

The process is bound to one core before JAX starts (the effect of `taskset -c 0`). Times are wall
time, the best of some repeats, as others may be using the machine; "gradient" is value and
gradient with respect to every eigenvalue and n; "64 n" is one batch of 64 sample sizes.

Source: the fixed point is that of M. E. Ildiz, H. A. Gozeten, E. O. Taga, M. Mondelli, S. Oymak,
"High-dimensional Analysis of Knowledge Distillation: Weak-to-Strong Generalization and Scaling
Laws", ICLR 2025, arXiv 2410.18837. It says nothing of how to solve it.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _theory import MASK, OPTIMAL, OTHER, STANDARD, command, keep, machine, parser, rows, tidy
from _theory import verdict as judge
from scipy.optimize import brentq
from tqdm.auto import tqdm

from kdjax import theory

SIZES = (1_000, 100_000, 1_000_000)
ALPHA, B = 2.0, 1.5
BATCH = 64
SECONDS, ERROR = 1.0, 3e-7
DTYPES = ("float32", "float64")


class Timed(NamedTuple):
    """Best wall time in seconds of one function at one p; None where it can't do that."""

    p: int
    dtype: str
    function: str
    value: float
    gradient: float | None = None
    batch: float | None = None
    gradient_error: float | None = None  # relative, of d tau / d n


class Error(NamedTuple):
    """Relative errors against long double."""

    alpha: float
    p: int
    n: int
    dtype: str
    tau: float
    gap: float
    risk: float


# The alternatives.


def brentq_tau(lam: np.ndarray, n: float) -> float:
    """scipy's root finder on a NumPy sum."""
    low, high = lam.min() * (len(lam) - n) / n, lam.sum() / n
    return float(brentq(lambda tau: np.sum(lam / (lam + tau)) - n, low, high, xtol=1e-300))


def bisection_tau(lam: jax.Array, n: jax.Array) -> jax.Array:
    """100 halvings of the bracket in log tau."""
    low = jnp.log(jnp.min(lam) * (len(lam) - n) / n)
    high = jnp.log(jnp.sum(lam) / n)

    def halve(bracket: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        low, high = bracket
        middle = (low + high) / 2
        above = jnp.sum(lam / (lam + jnp.exp(middle))) > n
        return (jnp.where(above, middle, low), jnp.where(above, high, middle)), None

    (low, high), _ = jax.lax.scan(halve, (low, high), None, length=100)
    return jnp.exp((low + high) / 2)


def newton_tau(lam: jax.Array, n: jax.Array, *, steps: int) -> jax.Array:
    """A fixed number of Newton steps from below."""

    def step(tau: jax.Array, _: None) -> tuple[jax.Array, None]:
        learned = lam / (lam + tau)
        slope = jnp.sum(learned / (lam + tau))
        return tau + (jnp.sum(learned) - n) / slope, None

    start = jnp.min(lam) * (len(lam) - n) / n
    return jax.lax.scan(step, start, None, length=steps)[0]


# Times.


def best(function: Callable[[], Any], repeats: int) -> float:
    """Best wall time of a call, after a first one that compiles."""
    jax.block_until_ready(function())
    found = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        found = min(found, time.perf_counter() - start)
    return found


def newton_steps(lam: jax.Array, n: jax.Array) -> int:
    """The fewest steps with which `effective_reg` gives up at none of these n."""
    low, high = 0, 60
    while high - low > 1:
        middle = (low + high) // 2
        tau = theory.effective_reg(lam, n, max_steps=middle)
        low, high = (low, middle) if bool(jnp.isfinite(tau).all()) else (middle, high)
    return high


def batch(p: int, dtype: Any) -> jax.Array:
    """The sample sizes of one batch."""
    return jnp.asarray(np.linspace(p / 100, 0.9 * p, BATCH), dtype)


def measure(
    p: int, dtype: str, steps: int, repeats: int, done: Callable[[], object]
) -> list[Timed]:
    """Times of ours and of the alternatives at one p."""
    lam, beta = (x.astype(dtype) for x in theory.power_law(p, ALPHA, B))
    n = jnp.asarray(p / 4, dtype)
    ns = batch(p, dtype)
    host = np.asarray(lam, np.float64)

    def risk(lam: jax.Array, n: jax.Array) -> jax.Array:
        return theory.excess_risk(lam, beta, n=n).total

    functions: dict[str, Callable[..., jax.Array]] = {
        "effective_reg": theory.effective_reg,
        "excess_risk": risk,
        "bisection": bisection_tau,
        "Newton loop": functools.partial(newton_tau, steps=steps),
    }
    true_slope = float(jax.grad(theory.effective_reg, argnums=1)(lam, n))
    found = []
    for name, function in functions.items():
        value = jax.jit(function)
        gradient = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
        batched = jax.jit(jax.vmap(function, in_axes=(None, 0)))
        times = [best(lambda f=value: f(lam, n), repeats)]  # type: ignore[misc]
        # What a loop keeps for the way back: two vectors and more for each of its steps.
        too_much = name in ("bisection", "Newton loop") and 3 * 100 * p * lam.itemsize > 1.5e9
        error = None
        if too_much:
            times.append(math.nan)
        else:
            times.append(best(lambda f=gradient: f(lam, n), repeats))  # type: ignore[misc]
            if name != "excess_risk":
                error = abs(float(gradient(lam, n)[1][1]) / true_slope - 1)
        times.append(best(lambda f=batched: f(lam, ns), max(1, repeats // 3)))  # type: ignore[misc]
        found.append(Timed(p, dtype, name, *(t if t == t else None for t in times), error))
        done()
    if dtype == "float64":
        found.append(Timed(p, dtype, "brentq", best(lambda: brentq_tau(host, p / 4), repeats)))
    done()
    return found


# Accuracy.


def exact(lam: np.ndarray, beta: np.ndarray, n: int) -> tuple[float, float, float]:
    """tau, 1 - Omega and the risk of true labels in long double, by bisection."""
    lam, beta = lam.astype(np.longdouble), beta.astype(np.longdouble)
    low, high = np.log(lam.min() * (len(lam) - n) / n), np.log(lam.sum() / n)
    for _ in range(75):
        middle = (low + high) / 2
        # Count what is missed of p - n, which is small when n is near p.
        tau = np.exp(middle)
        below = (tau / (lam + tau)).sum() < len(lam) - n
        low, high = (middle, high) if below else (low, middle)
    tau = np.exp((low + high) / 2)
    zeta = tau / (lam + tau)
    gap = ((1 - zeta) * zeta).sum() / n
    return float(tau), float(gap), float((lam * beta**2 * zeta**2).sum() / gap)


def errors(alpha: float, p: int, n: int) -> list[Error]:
    """Of both precisions, each against long double on its own eigenvalues."""
    found = []
    for dtype in DTYPES:
        lam, beta = (x.astype(dtype) for x in theory.power_law(p, alpha, B))
        size = jnp.asarray(n, dtype)
        stats = theory.spectral_stats(lam, size)
        ours = (stats.tau, stats.one_minus_omega, theory.excess_risk(lam, beta, n=size).total)
        known = exact(np.asarray(lam), np.asarray(beta), n)
        relative = (abs(float(a) / b - 1) for a, b in zip(ours, known, strict=True))
        found.append(Error(alpha, p, n, dtype, *relative))
    return found


# What is printed and kept.


def time_table(found: Sequence[Timed]) -> str:
    """Times, and the ratio to ours in brackets."""
    ours = {(t.p, t.dtype): t for t in found if t.function == "effective_reg"}
    lines = []
    for t in found:
        base = ours[t.p, t.dtype]
        rival = t.function not in ("effective_reg", "excess_risk")
        cells = [
            milliseconds(mine, reference if rival else None)
            for mine, reference in zip(t[3:6], base[3:6], strict=True)
        ]
        error = "" if t.gradient_error is None else f"{t.gradient_error:.0e}"
        lines.append([f"{t.p:,}", t.dtype, t.function, *cells, error if rival else ""])
    return rows(
        ["p", "dtype", "function", "value", "gradient", f"{BATCH} n", "error of d tau / dn"], lines
    )


def milliseconds(value: float | None, base: float | None) -> str:
    if value is None:
        return ""
    ratio = "" if base is None else f" ({value / base:.1f} x)"
    return f"{1e3 * value:.3g} ms{ratio}"


def error_table(found: Sequence[Error]) -> str:
    columns = ["alpha", "p", "n", "dtype", "tau", "1 - Omega", "risk"]
    return rows(
        columns,
        [
            [f"{e.alpha:g}", f"{e.p:,}", f"{e.n:,}", e.dtype, *(f"{x:.1e}" for x in e[4:])]
            for e in found
        ],
    )


def misses(times: Sequence[Timed], found: Sequence[Error]) -> list[str]:
    """What isn't as claimed."""
    slow = [
        f"effective_reg takes {t.value:.2f} s for {t.p:,} eigenvalues in {t.dtype}"
        for t in times
        if t.function == "effective_reg" and t.value >= SECONDS
    ]
    wrong = [
        f"{name} is off by {value:.1e} in {e.dtype} at p = {e.p:,}, n = {e.n:,}, alpha {e.alpha:g}"
        for e in found
        for name, value in zip(("tau", "1 - Omega", "the risk"), e[4:], strict=True)
        if not value <= (ERROR if e.dtype == "float32" else 1e-12)
    ]
    return slow + wrong


def draw(figure: Any, times: Sequence[Timed]) -> None:
    """Times against p: of a value, and of a value with its gradient."""
    figure.set_size_inches(10, 4.4)
    looks = {
        "effective_reg": (OPTIMAL, "o"), "excess_risk": (STANDARD, "s"), "brentq": ("#555555", "^"),
        "bisection": (MASK, "v"), "Newton loop": (OTHER, "D"),
    }  # fmt: skip
    panels = figure.subplots(1, 3, sharey=True)
    titles = ("value", "value and gradient", f"values at {BATCH} n")
    for axes, kind, title in zip(panels, ("value", "gradient", "batch"), titles, strict=True):
        for name, (colour, marker) in looks.items():
            points = [
                (t.p, getattr(t, kind))
                for t in times
                if t.function == name and t.dtype == "float64" and getattr(t, kind) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=5, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("p, eigenvalues")
        axes.set_title(title, fontsize=10.5)
        tidy(axes)
    panels[0].axhline(SECONDS, color="#777777", linestyle=":", lw=1)
    panels[0].text(min(t.p for t in times), SECONDS * 1.1, "bar", fontsize=9, color="#555555")
    panels[0].set_ylabel("seconds, float64, one core")
    panels[0].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, 0.92))


def bind(cores: int) -> None:
    """Keeps this thread, and all those it will start, on so many cores (Linux)."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    found = parser(__doc__)
    found.add_argument("--cores", type=int, default=1, help="bind to so many (default 1, 0: all)")
    found.add_argument("--repeats", type=int, default=6, help="of which the best (default 6)")
    options = found.parse_args(arguments)
    bind(options.cores)
    line = command("theory_solver", arguments)
    cores = "all" if not options.cores else str(options.cores)
    print(f"`{line}`, {machine()}, bound to {cores} of them")
    started = time.perf_counter()
    sizes, repeats = ((1_000,), 1) if options.quick else (SIZES, options.repeats)
    last = sizes[-1]
    cases = [(a, last, n) for a in (1.5, 2.0) for n in (last // 100, last // 2, last - 2)]
    cases += [(3.0, last // 10, last // 10 - 2)]
    times: list[Timed] = []
    accuracy: list[Error] = []
    with jax.enable_x64(True), tqdm(
        total=len(DTYPES) * len(sizes) * 5 + len(cases), unit="measurement", disable=None
    ) as bar:  # fmt: skip
        # Enough for every n of the batch: few of them need so many.
        few = {p: jnp.asarray([p / 100, p / 4, 0.9 * p]) for p in sizes}
        steps = {p: newton_steps(theory.power_law(p, ALPHA, B)[0], few[p]) for p in sizes}
        for dtype in DTYPES:
            for p in sizes:
                times += measure(p, dtype, steps[p], repeats, bar.update)
        for case in cases:
            accuracy += errors(*case)
            bar.update()
    seconds = time.perf_counter() - started
    print("", time_table(times), "", error_table(accuracy), sep="\n")
    counted = ", ".join(f"{count} at p = {p:,}" for p, count in steps.items())
    print(f"\nNewton steps of effective_reg in float64, at most: {counted}.")
    slowest = max(t.value for t in times if t.function == "effective_reg")
    worst = max(max(e[4:]) for e in accuracy if e.dtype == "float32")
    claim = (
        f"{last:,} eigenvalues take {slowest:.2f} s of {SECONDS:g} s on one core, and float32 is "
        f"right to {worst:.1e} of {ERROR:.0e}"
    )
    said = judge(misses(times, accuracy), claim, judged=not options.quick)
    print(f"{said} ({seconds:.0f} s)", flush=True)
    numbers = {
        "command": line, "seconds": seconds, "verdict": said, "newton_steps": steps,
        "times": [t._asdict() for t in times], "errors": [e._asdict() for e in accuracy],
    }  # fmt: skip
    keep(options.out, "theory_solver", numbers, lambda figure: draw(figure, times))


if __name__ == "__main__":
    main()
