"""Figure 1 of the paper: the optimal surrogate, the optimal mask, and the risk against n.

    python benchmarks/theory_figure1.py            # 2 minutes on two cores
    python benchmarks/theory_figure1.py --trials 300   # as many as the reference

Setting: p = 500, lam_i = i^-2, lam_i beta_i^2 = i^-1.5, minimum-norm regression on n Gaussian
samples, no noise on the labels (the level in the paper could not be read; for a variance s on the
student's labels add s times the column "noise" to all three risks).

What is claimed:

- every printed digit of the closed forms agrees with the reference, which is printed beside where
  it differs: "reference implementation in float64", an independent one in NumPy;
- every Monte Carlo mean (our own simulator and random numbers) obeys
  |MC - theory| <= 4 SE + 2 theory / (n (1 - Omega)). Its second term allows for the finite size, as
  the closed forms are limits; the reference's own Monte Carlo is printed in brackets.

(a) is at n = 200: the weights of the truth, of the surrogate whose labels give the student the
smallest risk, and of the best one that keeps or drops each weight. (b) is the student's excess
risk.

Source: M. E. Ildiz, H. A. Gozeten, E. O. Taga, M. Mondelli, S. Oymak, "High-dimensional Analysis of
Knowledge Distillation: Weak-to-Strong Generalization and Scaling Laws", ICLR 2025, arXiv
2410.18837, Fig. 1. The paper prints no table; the numbers are those of its setting.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from _theory import COLOURS, NAMES, RISKS, command, keep, machine, parser, rows, tidy, verdict
from tqdm.auto import tqdm

from kdjax import theory

P, ALPHA, B, SHOWN = 500, 2.0, 1.5, 200
COLUMNS = ("n", "tau", "Omega", *RISKS, "amplified", "kept", "noise")

# The printed digits of the reference implementation in float64: tau, Omega, the three risks,
# number of weights amplified and kept, noise multiplier; then its Monte Carlo (300 trials up to
# n = 275, 150 above): mean and standard error of the three risks.
REFERENCE: Mapping[int, str] = {
    25: "3.636e-03 0.5010 0.64079 0.41483 0.43296 16 25 1.004 "
    "0.6633±0.0090 0.4228±0.0026 0.4400±0.0028",
    50: "8.867e-04 0.5174 0.41086 0.26786 0.28068 32 50 1.072 "
    "0.4111±0.0035 0.2696±0.0013 0.2831±0.0014",
    75: "3.783e-04 0.5315 0.30594 0.20138 0.21181 48 75 1.135 "
    "0.3048±0.0021 0.2017±0.0008 0.2125±0.0009",
    100: "2.029e-04 0.5458 0.24247 0.16123 0.17025 64 100 1.202 "
    "0.2411±0.0016 0.1611±0.0007 0.1702±0.0007",
    125: "1.231e-04 0.5609 0.19866 0.13352 0.14158 79 126 1.277 "
    "0.2004±0.0012 0.1340±0.0005 0.1421±0.0005",
    150: "8.069e-05 0.5770 0.16597 0.11283 0.12019 95 151 1.364 "
    "0.1654±0.0009 0.1128±0.0004 0.1203±0.0004",
    175: "5.564e-05 0.5943 0.14029 0.09655 0.10338 110 177 1.465 "
    "0.1403±0.0008 0.0968±0.0003 0.1037±0.0004",
    200: "3.973e-05 0.6130 0.11937 0.08325 0.08966 126 203 1.584 "
    "0.1181±0.0006 0.0831±0.0003 0.0897±0.0003",
    225: "2.908e-05 0.6332 0.10183 0.07206 0.07813 141 229 1.726 "
    "0.1019±0.0005 0.0721±0.0003 0.0782±0.0003",
    250: "2.163e-05 0.6550 0.08682 0.06242 0.06820 156 256 1.898 "
    "0.0866±0.0004 0.0623±0.0002 0.0681±0.0002",
    275: "1.625e-05 0.6785 0.07374 0.05395 0.05948 170 283 2.111 "
    "0.0731±0.0004 0.0538±0.0002 0.0594±0.0002",
    300: "1.226e-05 0.7040 0.06218 0.04638 0.05167 185 311 2.379 "
    "0.0622±0.0005 0.0465±0.0003 0.0517±0.0003",
    325: "9.236e-06 0.7316 0.05184 0.03951 0.04454 199 341 2.726 "
    "0.0516±0.0004 0.0393±0.0003 0.0443±0.0003",
    350: "6.895e-06 0.7615 0.04249 0.03318 0.03790 213 372 3.192 "
    "0.0425±0.0004 0.0332±0.0002 0.0381±0.0003",
    375: "5.056e-06 0.7938 0.03398 0.02726 0.03156 226 405 3.849 "
    "0.0345±0.0003 0.0276±0.0002 0.0318±0.0002",
    400: "3.591e-06 0.8287 0.02616 0.02165 0.02533 239 443 4.839 "
    "0.0264±0.0002 0.0217±0.0002 0.0255±0.0002",
    425: "2.410e-06 0.8666 0.01893 0.01623 0.01889 252 488 6.495 "
    "0.0191±0.0003 0.0164±0.0002 0.0191±0.0002",
    450: "1.448e-06 0.9076 0.01220 0.01091 0.01220 265 500 9.819 "
    "0.0122±0.0002 0.0110±0.0001 0.0122±0.0002",
    475: "6.562e-07 0.9519 0.00591 0.00556 0.00591 277 500 19.81 "
    "0.0062±0.0001 0.0058±0.0001 0.0062±0.0001",
}


class Point(NamedTuple):
    """One n: closed forms and, per surrogate, Monte Carlo mean and standard error."""

    n: int
    tau: float
    omega: float
    risks: dict[str, float]
    amplified: int
    kept: int
    noise: float
    mean: dict[str, float]
    error: dict[str, float]

    def digits(self) -> list[str]:
        """The closed forms as printed."""
        risks = [f"{self.risks[name]:.5f}" for name in RISKS]
        counts = [str(self.amplified), str(self.kept)]
        return [f"{self.tau:.3e}", f"{self.omega:.4f}", *risks, *counts, f"{self.noise:#.4g}"]

    def allowed(self, name: str) -> float:
        """How far Monte Carlo may be from the closed form."""
        return 4 * self.error[name] + 2 * self.risks[name] / (self.n * (1 - self.omega))

    def used(self) -> float:
        """The largest part of the allowance that is used."""
        # Not the builtin max, which passes over NaN.
        return float(np.max([abs(self.mean[k] - self.risks[k]) / self.allowed(k) for k in RISKS]))


def measure(n: int, lam: jax.Array, beta: jax.Array, trials: int, key: jax.Array) -> Point:
    """Closed forms and simulation for one n."""
    best, kept = theory.optimal_surrogate(lam, beta, n), theory.optimal_mask(lam, n)
    surrogates = jax.numpy.stack([beta, best, beta * kept])
    stats = theory.spectral_stats(lam, n)
    found = theory.simulate_one_stage(key, lam, beta, surrogates, n=n, trials=trials)
    risks = theory.excess_risk(lam, beta, surrogates, n=n).total
    return Point(
        n,
        float(stats.tau),
        float(stats.omega),
        by_name(risks),
        int((theory.optimal_gain(lam, n) > 1).sum()),
        int(kept.sum()),
        float(stats.omega / stats.one_minus_omega),
        by_name(found.mean),
        by_name(found.stderr),
    )


def by_name(values: Any) -> dict[str, float]:
    return dict(zip(RISKS, np.asarray(values).tolist(), strict=True))


def cells(point: Point) -> list[str]:
    """One row of the table."""
    known = REFERENCE[point.n].split()
    ours = point.digits()
    shown = [o if o == r else f"{o} (reference {r})" for o, r in zip(ours, known, strict=False)]
    simulated = [
        f"{point.mean[name]:.5f} ± {point.error[name]:.5f} [{known[8 + i]}]"
        for i, name in enumerate(RISKS)
    ]
    return [str(point.n), *shown, *simulated, f"{point.used():.2f}"]


def misses(points: Sequence[Point]) -> list[str]:
    """What isn't as claimed."""
    found = []
    for point in points:
        for name, ours, known in zip(
            COLUMNS[1:], point.digits(), REFERENCE[point.n].split(), strict=False
        ):
            if ours != known:
                found.append(f"n = {point.n}: {name} is {ours}, the reference {known}")
        if not point.used() <= 1:
            found.append(f"n = {point.n}: Monte Carlo uses {point.used():.2f} of its allowance")
    return found


def draw(figure: Any, points: Sequence[Point], trials: int) -> None:
    """Weights at n = 200 on the left, risks against n on the right."""
    figure.set_size_inches(11, 4.6)
    left, right = figure.subplots(1, 2)
    lam, beta = theory.power_law(P, ALPHA, B)
    index = np.arange(1, P + 1)
    kept = np.asarray(theory.optimal_mask(lam, SHOWN))
    amplified = int((theory.optimal_gain(lam, SHOWN) > 1).sum())
    best = theory.optimal_surrogate(lam, beta, SHOWN)
    left.plot(index, beta * kept, color=COLOURS["mask"], lw=4, alpha=0.75, label=NAMES["mask"])
    left.plot(index, beta, color=COLOURS["standard"], lw=1.8, label="truth")
    left.plot(index, best, color=COLOURS["optimal"], lw=1.8, label=NAMES["optimal"])
    left.axvline(amplified, ymax=0.68, color="#777777", linestyle=":", lw=1)
    left.text(amplified - 6, 0.15, f"amplified\nup to {amplified}", ha="right", fontsize=9)
    left.text(kept.sum() + 8, 0.15, f"mask keeps\n{kept.sum()}", fontsize=9)
    left.set_ylim(0, 5.2)
    left.set_xlabel("index i, from the largest eigenvalue")
    left.set_ylabel("weight")
    left.set_title(f"(a) what to learn from, n = {SHOWN}", fontsize=10.5)
    left.legend(frameon=False, loc="upper left", fontsize=9)
    sizes = [point.n for point in points]
    for name in RISKS:
        right.plot(sizes, [p.risks[name] for p in points], color=COLOURS[name], label=NAMES[name])
        right.errorbar(
            sizes,
            [p.mean[name] for p in points],
            [p.error[name] for p in points],
            color=COLOURS[name],
            linestyle="none",
            marker="o",
            markersize=4,
            markerfacecolor="white",
            capsize=2,
        )
    right.errorbar([], [], [], color="#555555", linestyle="none", marker="o", markersize=4,
                   markerfacecolor="white", capsize=2,
                   label=f"simulated, {trials} trials ± SE")  # fmt: skip
    right.set_yscale("log")
    right.set_yticks([0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5], minor=False)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.minorticks_off()
    right.set_xlabel("n, samples of the student")
    right.set_ylabel("excess risk of the student")
    right.set_title("(b) lines: theory; p = 500, lam = i$^{-2}$, lam beta² = i$^{-1.5}$",
                    fontsize=10.5)  # fmt: skip
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        tidy(axes)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    found = parser(__doc__)
    found.add_argument("--trials", type=int, default=100, help="designs for each n (default 100)")
    found.add_argument("--seed", type=int, default=0)
    options = found.parse_args(arguments)
    sizes = [50, 100] if options.quick else sorted(REFERENCE)
    trials = 8 if options.quick else options.trials
    if trials < 2:
        found.error("--trials must be at least 2")
    line = command("theory_figure1", arguments)
    print(f"`{line}`, {machine()}, float64; {trials} trials for each n")
    started = time.perf_counter()
    with jax.enable_x64(True):
        lam, beta = theory.power_law(P, ALPHA, B)
        keys = jax.random.split(jax.random.key(options.seed), len(sizes))
        points = [
            measure(n, lam, beta, trials, key)
            for n, key in zip(tqdm(sizes, unit="n", disable=None), keys, strict=True)
        ]
        seconds = time.perf_counter() - started
        simulated = [f"MC {name} [reference]" for name in RISKS]
        print(
            "", rows([*COLUMNS, *simulated, "of allowance"], [cells(p) for p in points]), sep="\n"
        )
        missed = misses(points)
        claim = (
            "all printed digits are those of the reference implementation in float64, and every "
            f"Monte Carlo mean is within its allowance (at most {max(p.used() for p in points):.2f}"
            " of it used)"
        )
        said = verdict(missed, claim)
        print(f"\n{said} ({seconds:.0f} s)", flush=True)
        numbers = {
            "command": line, "seconds": seconds, "trials": trials, "verdict": said,
            "points": [point._asdict() for point in points],
        }  # fmt: skip
        keep(options.out, "theory_figure1", numbers, lambda f: draw(f, points, trials))


if __name__ == "__main__":
    main()
