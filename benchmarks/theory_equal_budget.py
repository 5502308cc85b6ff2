"""Equal budgets: n strong labels, or a surrogate trained on m of them that labels n samples.

    python benchmarks/theory_equal_budget.py       # 2 minutes on two cores

Setting: p = 500, lam_i = i^-2, lam_i beta_i^2 = i^-1.5. The surrogate is trained on m strong labels
(noise of variance s) of its first p_s features, without a ridge; the student then on n samples
that it labels, without further noise. Against it stands the same student on n strong labels.

What is claimed:

- all printed digits agree with the "reference implementation in float64" (an independent one in
  NumPy, printed in brackets): the risks, and the best p_s of 5, 10, ..., 500, which it tried;
- a masked surrogate needs m well above p_s: at m = n = 200 without noise nothing beats strong
  labels, at m = 800 the student of the best masked one does;
- a student may beat its teacher: a noisy ridgeless surrogate (m = 450, s = 0.3) has risk 2.958, its
  student with n = 450 and a ridge of 1 has 0.4956. Simulation (ours) obeys
  |MC - theory| <= 4 SE + 2 theory (1 / (m (1 - Omega_s)) + 1 / (n (1 - Omega_t))).

The figure: gain over n strong labels, with the best p_s, over (m, n); and over (p_s, n) at
m = 3,200, with the mask that is optimal for unlimited m.

Source: M. E. Ildiz, H. A. Gozeten, E. O. Taga, M. Mondelli, S. Oymak, "High-dimensional Analysis of
Knowledge Distillation: Weak-to-Strong Generalization and Scaling Laws", ICLR 2025, arXiv
2410.18837 (the two-stage setting; the finite-m formulas are derived from its risk).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _theory import command, keep, machine, parser, rows
from _theory import verdict as judge
from tqdm.auto import tqdm

from kdjax import theory

P, ALPHA, B, N = 500, 2.0, 1.5, 200
NOISE, SEEN_AT = 0.05, 3200

# Of the reference implementation in float64, as printed, by (m, noise): risk of n strong labels as
# noisy; of the student of the unmasked surrogate; best p_s, its student, that surrogate.
REFERENCE: Mapping[tuple[int, float], tuple[str, ...]] = {
    (200, 0.0): ("0.1194", "0.1534", "500", "0.1534", "0.1194"),
    (800, 0.0): ("0.1194", "0.1194", "205", "0.1025", "0.0674"),
    (3200, 0.0): ("0.1194", "0.1194", "205", "0.0922", "0.0535"),
    (400, 0.05): ("0.1986", "0.3312", "145", "0.1511", "0.1483"),
    (3200, 0.05): ("0.1986", "0.1282", "200", "0.0947", "0.0586"),
}
# A student that beats its teacher: m, n, noise, ridge; teacher and student as printed.
BEATEN, BEATEN_REFERENCE = (450, 450, 0.3, 1.0), ("2.958", "0.4956")


class Row(NamedTuple):
    """One budget; risks are excess risks."""

    m: int
    noise: float
    standard: float
    two_stage: float
    size: int
    best: float
    surrogate: float
    exact_size: int  # the best of all sizes

    def cells(self) -> list[str]:
        """As the reference is printed."""
        first = [f"{self.standard:.4f}", f"{self.two_stage:.4f}", str(self.size)]
        return [*first, f"{self.best:.4f}", f"{self.surrogate:.4f}"]


class Beaten(NamedTuple):
    """The teacher that is beaten, in theory and simulated."""

    teacher: float
    student: float
    teacher_mc: tuple[float, float]
    student_mc: tuple[float, float]
    allowed: tuple[float, float]


class Maps(NamedTuple):
    """Relative gains on grids, and what the axes are."""

    n: np.ndarray
    m: np.ndarray
    clean: np.ndarray  # [m, n]
    noisy: np.ndarray  # [m, n]
    sizes: np.ndarray
    masked: np.ndarray  # [sizes, n]
    optimal: np.ndarray  # [n]


def measure(lam: jax.Array, beta: jax.Array, m: int, noise: float) -> Row:
    """One row of the table."""
    found = theory.equal_budget(lam, beta, m=m, n=N, noise_s=noise, sizes=np.arange(5, P + 1, 5))
    every = theory.equal_budget(lam, beta, m=m, n=N, noise_s=noise)
    return Row(
        m,
        noise,
        float(found.standard_n),
        float(found.two_stage),
        int(found.best_size),
        float(found.best),
        float(found.best_surrogate),
        int(every.best_size),
    )


def measure_beaten(lam: jax.Array, beta: jax.Array, trials: int, key: jax.Array) -> Beaten:
    """The noisy ridgeless teacher and its student with a ridge."""
    m, n, noise, ridge = BEATEN
    options: dict[str, Any] = {"m": m, "n": n, "noise_s": noise, "ridge_t": ridge}
    found = theory.two_stage_risk(lam, lam, beta, **options)
    teacher, student = simulate(key, lam, beta, trials, options)
    first, second = theory.spectral_stats(lam, m), theory.spectral_stats(lam, n, ridge)
    gaps = (1 / (m * first.one_minus_omega), 1 / (n * second.one_minus_omega))
    theirs, ours = float(found.surrogate), float(found.total)
    return Beaten(
        theirs,
        ours,
        teacher,
        student,
        (
            4 * teacher[1] + 2 * theirs * float(gaps[0]),
            4 * student[1] + 2 * ours * float(sum(gaps)),
        ),
    )


def simulate(
    key: jax.Array, lam: jax.Array, beta: jax.Array, trials: int, options: Mapping[str, Any]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Mean and standard error of the surrogate's and of the student's excess risk."""
    found = theory.simulate_two_stage(key, lam, lam, beta, trials=trials, **options)
    return (
        (float(found.surrogate.mean), float(found.surrogate.stderr)),
        (float(found.student.mean), float(found.student.stderr)),
    )


def measure_maps(lam: jax.Array, beta: jax.Array, points: int, done: Any) -> Maps:
    """Gains over (m, n) with and without noise, and over (p_s, n)."""
    n = np.unique(np.rint(np.geomspace(25, 475, points)))
    m = np.unique(np.rint(np.geomspace(50, 6400, points)))
    sizes = np.unique(np.rint(np.geomspace(10, P, 3 * points)).astype(int))

    def gain(m: float, noise: float) -> np.ndarray:
        found = theory.equal_budget(
            lam, beta, m=m, n=jnp.asarray(n), noise_s=noise, sizes=jnp.asarray(sizes)
        )
        done()
        return np.asarray(1 - found.best / found.standard_n)

    clean, noisy = (np.stack([gain(one, noise) for one in m]) for noise in (0.0, NOISE))
    found = theory.equal_budget(lam, beta, m=SEEN_AT, n=jnp.asarray(n), sizes=jnp.asarray(sizes))
    masked = np.asarray(1 - found.masked / found.standard_n[:, None]).T
    done()
    kept = np.asarray([theory.optimal_mask(lam, one).sum() for one in n])
    return Maps(n, m, clean, noisy, sizes, masked, kept)


# What is printed and kept.


def table(found: Sequence[Row]) -> str:
    """Ours, and the reference in brackets."""
    columns = [
        "m", "noise", "n strong labels", "student, unmasked", "best p_s", "its student",
        "that surrogate", "best of all p_s", "beats strong labels", "beats its teacher",
    ]  # fmt: skip
    lines = []
    for row in found:
        known = REFERENCE[row.m, row.noise]
        cells = [f"{o} [{r}]" for o, r in zip(row.cells(), known, strict=True)]
        beats = [said(row.best < row.standard), said(row.best < row.surrogate)]
        lines.append([f"{row.m:,}", f"{row.noise:g}", *cells, str(row.exact_size), *beats])
    return rows(columns, lines)


def said(true: bool) -> str:
    return "yes" if true else "no"


def beaten_table(found: Beaten) -> str:
    """Theory, the reference in brackets, and the simulation."""
    lines = [
        ["teacher, no ridge", f"{found.teacher:.3f} [{BEATEN_REFERENCE[0]}]",
         f"{found.teacher_mc[0]:.3f} ± {found.teacher_mc[1]:.3f}", f"{found.allowed[0]:.3f}"],
        ["its student, ridge 1", f"{found.student:.4f} [{BEATEN_REFERENCE[1]}]",
         f"{found.student_mc[0]:.4f} ± {found.student_mc[1]:.4f}", f"{found.allowed[1]:.4f}"],
    ]  # fmt: skip
    return rows(["m = n = 450, noise 0.3", "theory", "simulated", "may differ by"], lines)


def misses(found: Sequence[Row], beaten: Beaten) -> list[str]:
    """What isn't as claimed."""
    wrong = [
        f"m = {row.m}, noise {row.noise:g}: {ours}, the reference {known}"
        for row in found
        for ours, known in zip(row.cells(), REFERENCE[row.m, row.noise], strict=True)
        if ours != known
    ]
    ours = (f"{beaten.teacher:.3f}", f"{beaten.student:.4f}")
    if ours != BEATEN_REFERENCE:
        wrong.append(f"beaten teacher: {ours}, the reference {BEATEN_REFERENCE}")
    for name, mc, value, allowed in (
        ("teacher", beaten.teacher_mc, beaten.teacher, beaten.allowed[0]),
        ("student", beaten.student_mc, beaten.student, beaten.allowed[1]),
    ):
        if not abs(mc[0] - value) <= allowed:
            wrong.append(f"simulated {name}: {mc[0]:.4f}, more than {allowed:.4f} from {value:.4f}")
    return wrong


def draw(figure: Any, maps: Maps) -> None:
    """Three heat maps with one scale of colours; the black line is a gain of 1 %."""
    from matplotlib.colors import Normalize

    figure.set_size_inches(13, 4.6)
    panels = figure.subplots(1, 3)
    norm = Normalize(-60, 60)
    # Where the risk is infinite, as bad as the scale goes.
    grids = [
        100 * np.nan_to_num(x, nan=-1, neginf=-1) for x in (maps.clean, maps.noisy, maps.masked)
    ]
    titles = ("best mask, no noise", f"best mask, noise {NOISE:g}", f"m = {SEEN_AT:,}, no noise")
    for axes, grid, title in zip(panels, grids, titles, strict=True):
        y = maps.sizes if axes is panels[2] else maps.m
        image = axes.pcolormesh(maps.n, y, grid, cmap="RdBu", norm=norm, shading="gouraud")
        axes.contour(maps.n, y, grid, [1], colors="black", linewidths=1.2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([25, 50, 100, 200, 400], ["25", "50", "100", "200", "400"])
        axes.minorticks_off()
        axes.set_xlabel("n, samples of the student")
        axes.set_title(title, fontsize=10.5)
    for axes in panels[:2]:
        axes.plot(maps.n, maps.n, color="#555555", linestyle=":", lw=1)
        axes.text(110, 95, "m = n", va="top", fontsize=9)
        axes.set_yticks([50, 200, 800, 3200], ["50", "200", "800", "3,200"])
        axes.set_ylim(maps.m[0], maps.m[-1])
    panels[0].set_ylabel("m, strong labels of the surrogate")
    panels[2].plot(maps.n, maps.optimal, color="#555555", linestyle="--", lw=1.2,
                   label="optimal mask for m without limit")  # fmt: skip
    best = maps.sizes[np.argmax(grids[2], axis=0)]
    panels[2].plot(maps.n, best, "o", color="black", ms=3, label="best p_s")
    panels[2].legend(fontsize=8.5, loc="lower right")
    panels[2].set_yticks([10, 30, 100, 300], ["10", "30", "100", "300"])
    panels[2].set_ylabel("p_s, features that the surrogate sees")
    bar = figure.colorbar(image, ax=panels, shrink=0.9, extend="both")
    bar.set_label("gain over n strong labels (%); black line: 1 %")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    found = parser(__doc__)
    found.add_argument("--trials", type=int, default=100, help="of the simulation (default 100)")
    found.add_argument("--points", type=int, default=40, help="of the maps, each way (default 40)")
    found.add_argument("--seed", type=int, default=0)
    options = found.parse_args(arguments)
    trials, points = (5, 5) if options.quick else (options.trials, options.points)
    if trials < 2 or points < 2:
        found.error("--trials and --points must be at least 2")
    line = command("theory_equal_budget", arguments)
    print(f"`{line}`, {machine()}, float64; p = {P}, n = {N}; {trials} trials")
    started = time.perf_counter()
    steps = len(REFERENCE) + 1 + 2 * points + 1
    with jax.enable_x64(True), tqdm(total=steps, unit="budget", disable=None) as bar:
        lam, beta = theory.power_law(P, ALPHA, B)
        budgets = []
        for m, noise in REFERENCE:
            budgets.append(measure(lam, beta, m, noise))
            bar.update()
        beaten = measure_beaten(lam, beta, trials, jax.random.key(options.seed))
        bar.update()
        maps = measure_maps(lam, beta, points, bar.update)
    seconds = time.perf_counter() - started
    print("\n[in brackets: reference implementation in float64]")
    print("", table(budgets), "", beaten_table(beaten), sep="\n")
    claim = "all printed digits are those of the reference, and the simulation is within its rule"
    said = judge(misses(budgets, beaten), claim)
    print(f"\n{said} ({seconds:.0f} s)", flush=True)
    numbers = {
        "command": line, "seconds": seconds, "trials": trials, "verdict": said,
        "budgets": [row._asdict() for row in budgets], "beaten": beaten._asdict(),
        "maps": {name: np.asarray(x).tolist() for name, x in maps._asdict().items()},
    }  # fmt: skip
    keep(options.out, "theory_equal_budget", numbers, lambda figure: draw(figure, maps))


if __name__ == "__main__":
    main()
