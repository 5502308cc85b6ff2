"""``kdjax theory risk`` and ``kdjax theory plan``: the numbers; `_theory_show` prints them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from kdjax import _checks, theory
from kdjax.cli import _theory_data
from kdjax.cli._options import TheoryPlan, TheoryRisk

RISKS = ("standard", "optimal", "mask")
_TEST_FRACTION = 0.2
_SIMULATED_AT_ONCE = 25


class Chain(NamedTuple):
    """A surrogate that is trained on m true labels first, and its student.

    Attributes:
      m: labels of the surrogate.
      standard: excess risk of n true labels with the noise of the surrogate's, for comparison.
      surrogate: excess risk of the one that sees all features.
      student: excess risk of its student.
      size: how many of the first features the surrogate best sees.
      best_surrogate: excess risk of that surrogate.
      best_student: excess risk of its student.
    """

    m: int
    standard: float
    surrogate: float
    student: float
    size: int
    best_surrogate: float
    best_student: float

    def gain(self, risk: float) -> float:
        """Relative to n true labels with that noise."""
        return relative(self.standard, risk)


class Column(NamedTuple):
    """What is known at one n.

    Attributes:
      n: samples of the student.
      tau: effective regularisation.
      omega: variance factor Omega.
      noise_multiplier: excess risk per unit of noise variance on the labels.
      noise: the part of every risk that is due to noise on the labels.
      risks: excess risk by the name of what labels the samples.
      amplified: weights that the optimal surrogate makes larger.
      kept: features that the optimal mask keeps.
      simulated: name -> (mean, standard error); empty without a simulation.
      chain: the surrogate that is trained first, if there is one.
    """

    n: int
    tau: float
    omega: float
    noise_multiplier: float
    noise: float
    risks: dict[str, float]
    amplified: int
    kept: int
    simulated: dict[str, tuple[float, float]]
    chain: Chain | None

    def gain(self, risk: float) -> float:
        """Relative to true labels."""
        return relative(self.risks["standard"], risk)


class Curve(NamedTuple):
    """The theory against fits on the user's data, with one ridge.

    Attributes:
      ridge: of all fits.
      n: sizes of the random subsets.
      predicted: held-out error by the theory.
      measured: mean held-out error of the fits.
      error: its standard error.
      line: the prediction between these sizes, (n, error).
    """

    ridge: float
    n: tuple[int, ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    error: tuple[float, ...]
    line: tuple[tuple[float, float], ...] = ()

    def deviations(self) -> list[float]:
        """Relative deviation at each size."""
        return [abs(p - m) / m for p, m in zip(self.predicted, self.measured, strict=True)]

    def blurs(self) -> list[float]:
        """Two standard errors of the measurement at each size, relative to it."""
        return [2 * e / m for e, m in zip(self.error, self.measured, strict=True)]

    def off(self) -> float:
        """The largest relative deviation beyond two standard errors, where an error is predicted.

        Where the prediction diverges (as many rows as features) nothing can be compared.
        """
        pairs = zip(self.deviations(), self.blurs(), strict=True)
        return max((max(0.0, a - b) for a, b in pairs if math.isfinite(a)), default=0.0)


def risk(options: TheoryRisk) -> int:
    """Predicts risks for a power law.

    Args:
      options: what was asked for.

    Returns:
      The exit code.
    """
    _check_risk(options)
    if options.noise_s is None:
        options = dataclasses.replace(options, noise_s=options.noise)
    figure = _figure_path(options.out)
    from kdjax.cli import _theory_plot, _theory_show

    with jax.enable_x64(True):
        lam, beta = theory.power_law(options.p, options.alpha, options.b)
        sizes = sorted(set(options.n))
        keys = jax.random.split(jax.random.key(options.seed), len(sizes))
        total = len(sizes) * len(_parts(options.trials))
        with tqdm(
            total=total, unit="batch", desc="simulating", disable=None if total else True
        ) as bar:
            columns = [
                _column(lam, beta, n, options, key, bar.update)
                for n, key in zip(sizes, keys, strict=True)
            ]
        _theory_show.risk(columns, options, _laws(options))
        if figure is not None:
            first = columns[0].n
            ridge, noise = options.ridge, options.noise
            weights = {
                "standard": beta,
                "optimal": theory.optimal_surrogate(lam, beta, first, ridge=ridge),
                "mask": jnp.where(theory.optimal_mask(lam, first, ridge), beta, 0.0),
            }
            lines = {n: _risks(lam, beta, n, noise, ridge) for n in _grid(options.p, sizes)}
            _theory_plot.risk(weights, lines, columns, options, figure)
            _theory_show.say(f"figure  {figure}")
    return 0


def plan(options: TheoryPlan) -> int:
    """Predicts what a surrogate, a mask or mixed labels would do on the user's features.

    Args:
      options: what was asked for.

    Returns:
      The exit code.
    """
    if options.features is None:
        raise ValueError(
            "features must be given: an npz file with arrays features [N, p] and labels [N]."
        )
    for name in ("n", "m"):
        if getattr(options, name) is not None:
            _checks.count(name, getattr(options, name))
    _checks.number("ridge", options.ridge, low=0)
    if options.noise is not None:
        _checks.number("noise", options.noise, low=0)
    _checks.count("repeats", options.repeats, low=2)
    figure = _figure_path(options.out)
    data = _theory_data.read(options.features)
    from kdjax.cli import _theory_plot, _theory_show, _theory_show_plan

    with jax.enable_x64(True):
        rows = len(data.features)
        n = rows if options.n is None else options.n
        m = options.m or (rows - n if n < rows else rows)
        sizes = _check_sizes(rows, n)
        with tqdm(total=2 + 2 * len(sizes), unit="step", disable=None) as bar:
            bar.set_description("estimating")
            estimate = theory.estimate(jnp.asarray(data.features), jnp.asarray(data.labels))
            if options.noise is not None:
                estimate = estimate._replace(noise_var=jnp.asarray(options.noise))
            bar.update()
            bar.set_description("predicting")
            found = theory.plan(estimate, n=n, m=m, ridge=options.ridge)
            bar.update()
            bar.set_description("testing the theory")
            ridges = dict.fromkeys((options.ridge, found.tuned.standard.ridge))
            curves = [_curve(data, estimate, ridge, sizes, options, bar.update) for ridge in ridges]
        _theory_show_plan.plan(data, estimate, found, curves, options)
        if figure is not None:
            _theory_plot.plan(data.name, found, curves, options.repeats, figure)
            _theory_show.say(f"figure  {figure}")
    return 0


def relative(standard: float, risk: float) -> float:
    """Gain ``1 - risk / standard``; 0 if neither leaves anything, NaN if both are infinite."""
    if risk == standard:
        return 0.0 if math.isfinite(risk) else math.nan
    return 1 - risk / standard if 0 < standard < math.inf else math.copysign(1.0, standard - risk)


def surrogate_sizes(p: int, most: int = 500) -> np.ndarray:
    """Numbers of features that a surrogate might see: all up to ``most``, then ever sparser."""
    if p <= most:
        return np.arange(1, p + 1)
    return np.unique(np.rint(np.geomspace(1, p, most)).astype(int))


def _check_risk(options: TheoryRisk) -> None:
    if not options.n:
        raise ValueError("n must be given at least one number, got none.")
    for n in options.n:
        _checks.count("n", n)
    _checks.count("p", options.p)
    for name in ("alpha", "b"):
        _checks.number(name, getattr(options, name))
    for name in ("noise", "ridge", "noise_s", "ridge_s"):
        if getattr(options, name) is not None:
            _checks.number(name, getattr(options, name), low=0)
    if options.m is not None:
        _checks.count("m", options.m)
    elif options.noise_s is not None or options.ridge_s:
        name = "ridge_s" if options.noise_s is None else "noise_s"
        raise ValueError(f"{name} must be given with --m only, got it without.")
    _checks.count("trials", options.trials, low=0)
    if options.trials == 1:
        raise ValueError("trials must be 0 or at least 2, got 1.")
    _checks.count("seed", options.seed, low=0)


def _figure_path(out: str | None) -> Path | None:
    if out is None:
        return None
    path = Path(out).expanduser()
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"out must be a file that ends in .png, .pdf or .svg, got {out}.")
    if not path.parent.is_dir():
        raise ValueError(f"out must be in a folder that is there, got {out}.")
    return path


def _laws(options: TheoryRisk) -> Any:
    """Constants of the scaling law, where there is one."""
    if options.alpha <= 1 or options.b <= 1:
        return None
    return theory.scaling_constants(options.alpha, options.b)


def _column(
    lam: jax.Array,
    beta: jax.Array,
    n: int,
    options: TheoryRisk,
    key: jax.Array,
    done: Callable[[], object],
) -> Column:
    ridge = options.ridge
    kept = theory.optimal_mask(lam, n, ridge)
    best = theory.optimal_surrogate(lam, beta, n, ridge=ridge)
    surrogates = jnp.stack([beta, best, jnp.where(kept, beta, 0.0)])
    terms = theory.excess_risk(lam, beta, surrogates, n=n, noise_var=options.noise, ridge=ridge)
    stats = theory.spectral_stats(lam, n, ridge)
    multiplier = theory.excess_risk(lam, beta, n=n, noise_var=1.0, ridge=ridge).var_noise
    return Column(
        n,
        float(stats.tau),
        float(stats.omega),
        float(multiplier),
        float(terms.var_noise[0]),
        dict(zip(RISKS, _clipped(terms.total), strict=True)),
        int((theory.optimal_gain(lam, n, ridge) > 1).sum()),
        int(kept.sum()),
        _simulated(lam, beta, surrogates, n, options, key, done),
        None if options.m is None else _chain(lam, beta, n, options.m, options),
    )


def _grid(p: int, sizes: list[int]) -> list[int]:
    """Sample sizes that show where the requested ones lie."""
    low, high = max(2, min([p // 20, *sizes])), max([int(0.96 * p), *sizes])
    return sorted({*np.rint(np.linspace(low, high, 60)).astype(int).tolist(), *sizes})


def _risks(lam: jax.Array, beta: jax.Array, n: int, noise: float, ridge: float) -> dict[str, float]:
    options: dict[str, Any] = {"noise_var": noise, "ridge": ridge}
    found = (
        theory.excess_risk(lam, beta, n=n, **options).total,
        theory.optimal_surrogate_risk(lam, beta, n, **options),
        theory.masked_risk(lam, beta, n, **options),
    )
    return dict(zip(RISKS, _clipped(jnp.stack(found)), strict=True))


def _clipped(risks: jax.Array) -> list[float]:
    """Rounding can leave a risk of 0 a little below it."""
    return np.maximum(np.asarray(risks, float), 0.0).tolist()


def _parts(trials: int) -> list[int]:
    """The trials in equal batches, so that a bar can move and one program serves all of them."""
    if trials == 0:
        return []
    count = math.ceil(trials / _SIMULATED_AT_ONCE)
    return [math.ceil(trials / count)] * count


def _simulated(
    lam: jax.Array,
    beta: jax.Array,
    surrogates: jax.Array,
    n: int,
    options: TheoryRisk,
    key: jax.Array,
    done: Callable[[], object],
) -> dict[str, tuple[float, float]]:
    parts = _parts(options.trials)
    if not parts:
        return {}
    found = []
    for part, part_key in zip(parts, jax.random.split(key, len(parts)), strict=True):
        simulation = theory.simulate_one_stage(
            part_key, lam, beta, surrogates, n=n, trials=part,
            noise_var=options.noise, ridge=options.ridge,
        )  # fmt: skip
        found.append(np.asarray(simulation.risks))
        done()
    risks = np.concatenate(found)[: options.trials]
    means = risks.mean(0)
    errors = risks.std(0, ddof=1) / math.sqrt(len(risks))
    return {
        name: (float(mean), float(error))
        for name, mean, error in zip(RISKS, means, errors, strict=True)
    }


def _chain(lam: jax.Array, beta: jax.Array, n: int, m: int, options: TheoryRisk) -> Chain:
    found = theory.equal_budget(
        lam, beta, m=m, n=n, noise_s=options.noise_s, noise_t=options.noise,
        ridge_s=options.ridge_s, ridge_t=options.ridge, sizes=surrogate_sizes(len(lam)),
    )  # fmt: skip
    risks = (found.standard_n, found.standard_m, found.two_stage, found.best_surrogate, found.best)
    standard, surrogate, student, best_surrogate, best = _clipped(jnp.stack(risks))
    size = int(found.best_size)
    return Chain(m, standard, surrogate, student, size, best_surrogate, best)


def _check_sizes(rows: int, n: int) -> tuple[int, ...]:
    """Sizes of the subsets on which the theory is tested: some, and n where the data suffice."""
    most = int(rows * (1 - _TEST_FRACTION))
    found = set(np.rint(np.geomspace(max(4, most // 16), most, 4)).astype(int).tolist())
    if 4 <= n < most:
        found = {size for size in found if not 0.7 < size / n < 1.4} | {n}
    return tuple(sorted(found))


def _curve(
    data: _theory_data.Data,
    estimate: Any,
    ridge: float,
    sizes: Iterable[int],
    options: TheoryPlan,
    done: Callable[[], object],
) -> Curve:
    sizes = tuple(sizes)
    key = jax.random.key(options.seed)
    measured = []
    for n in sizes:
        found = theory.learning_curve(
            data.features, data.labels, ns=[n], key=key, ridge=ridge, repeats=options.repeats,
            test_fraction=_TEST_FRACTION,
        )  # fmt: skip
        measured.append((float(found.mean[0]), float(found.stderr[0])))
        done()
    noise = float(estimate.noise_var)

    def predicted(n: Any) -> list[float]:
        # The fits have an intercept, which costs a sample.
        terms = theory.excess_risk(
            estimate.lam, estimate.beta, n=jnp.asarray(n, float) - 1, noise_var=noise, ridge=ridge
        )
        return (np.maximum(np.asarray(terms.total), 0.0) + noise).tolist()

    grid = np.geomspace(sizes[0], sizes[-1], 60)
    return Curve(
        ridge,
        sizes,
        tuple(predicted(sizes)),
        tuple(mean for mean, _ in measured),
        tuple(error for _, error in measured),
        tuple(zip(grid.tolist(), predicted(grid), strict=True)),
    )
