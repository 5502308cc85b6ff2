"""What the predictions of ``kdjax theory`` look like: tables, and sentences of what they mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from kdjax.cli._options import TheoryRisk
from kdjax.cli._theory import RISKS, Chain, Column, Curve
from kdjax.cli._theory_data import Data
from kdjax.theory import Answer, Answers, Plan, ScalingConstants

_LABELS = {
    "standard": "true labels (standard)",
    "optimal": "optimal surrogate",
    "mask": "optimal 0-1 mask",
}
_NOTHING = 5e-4  # gains below this print as 0.0 %
_TRUSTED, _ROUGH = 0.10, 0.30


def say(text: str, style: str = "") -> None:
    """Prints prose, wrapped at the width of the terminal."""
    Console().print(text, style=style, highlight=False, markup=False)


# risk


def risk(columns: Sequence[Column], options: TheoryRisk, laws: ScalingConstants | None) -> None:
    """Prints the table of a power law and what it means.

    Args:
      columns: one for each n.
      options: what was asked for.
      laws: the scaling law, if the power law has one.
    """
    console = Console()
    width = 19 if options.trials else 12
    fitting = max(1, (console.width - 32) // width)
    say(
        f"lam_i = i^-{options.alpha:g}, lam_i beta_i^2 = i^-{options.b:g}, p = {options.p:,}; "
        f"noise {options.noise:g}, ridge {options.ridge:g}; excess risk of the student"
    )
    for start in range(0, len(columns), fitting):
        console.print(_risk_table(columns[start : start + fitting], options))
    if laws is not None:
        say(_law_line(laws), "dim")
    for line in risk_sentences(columns, options, laws):
        say(line)


def _risk_table(columns: Sequence[Column], options: TheoryRisk) -> Table:
    table = Table()
    table.add_column("n", no_wrap=True)
    for column in columns:
        table.add_column(f"{column.n:,}", justify="right", no_wrap=True)

    def line(name: str, cells: Iterator[str], style: str = "") -> None:
        table.add_row(name, *cells, style=style)

    for name in RISKS:
        line(_LABELS[name], (number(c.risks[name]) for c in columns), "bold")
        if columns[0].simulated:
            line("  simulated", (_simulated(*c.simulated[name]) for c in columns))
        if name != "standard":
            line("  gain", (percent(c.gain(c.risks[name])) for c in columns))
        if name == "optimal":
            line("  weights made larger", (f"{c.amplified:,}" for c in columns))
        if name == "mask":
            line("  features kept", (f"{c.kept:,}" for c in columns))
    chains = [c.chain for c in columns if c.chain is not None]
    if chains:
        table.add_section()
        if options.noise_s != options.noise:
            line(f"true labels, noise {options.noise_s:g}", (number(c.standard) for c in chains))
        line(f"surrogate of m = {chains[0].m:,} labels", (number(c.surrogate) for c in chains))
        line("  its student", (number(c.student) for c in chains), "bold")
        line("  gain", (percent(c.gain(c.student)) for c in chains))
        line("  best with first features", (f"{c.size:,}" for c in chains))
        line("  that surrogate itself", (number(c.best_surrogate) for c in chains))
        line("  its student", (number(c.best_student) for c in chains), "bold")
        line("  gain", (percent(c.gain(c.best_student)) for c in chains))
    table.add_section()
    line("tau", (f"{c.tau:.3e}" for c in columns))
    line("Omega", (f"{c.omega:.4f}" for c in columns))
    line("risk per unit of noise", (number(c.noise_multiplier) for c in columns))
    if options.noise:
        line("  so noise adds", (number(c.noise) for c in columns))
    return table


def _law_line(law: ScalingConstants) -> str:
    return (
        f"Scaling law (1 << n << p, no noise, no ridge): risk = C (n / {law.tau_prefactor:.3f})"
        f"^-{law.exponent:g}, C = {law.standard:.3f} for true labels, {law.optimal:.3f} for the "
        f"optimal surrogate ({law.ratio_optimal:.3f} of it), {law.mask:.3f} for the optimal mask "
        f"({law.ratio_mask:.3f})."
    )


def risk_sentences(
    columns: Sequence[Column], options: TheoryRisk, laws: ScalingConstants | None
) -> list[str]:
    """What the table means, in plain words.

    Args:
      columns: one for each n; the one with the largest gain is told.
      options: what was asked for.
      laws: the scaling law, if there is one.

    Returns:
      Sentences.
    """
    best = max(columns, key=lambda c: c.gain(c.risks["optimal"]))
    gain, masked = (best.gain(best.risks[name]) for name in ("optimal", "mask"))
    if gain < _NOTHING:
        why = (
            "with at least as many samples as features and no ridge, a student learns its labels "
            "as they are"
            if best.tau == 0
            else "all features are learned equally well"
        )
        found = [f"Meaning: no surrogate beats true labels here: {why}."]
    else:
        dropped = options.p - best.kept
        mask = (
            "a 0-1 mask has nothing to drop"
            if masked < _NOTHING
            else f"only dropping the last {dropped:,} of {options.p:,} features from the labels "
            f"takes away {percent(masked)}"
        )
        found = [
            f"Meaning: at n = {best.n:,}, labels of the best surrogate there is take away "
            f"{percent(gain)} of the risk that true labels leave; {mask}."
        ]
    if laws is not None and gain >= _NOTHING:
        found.append("A better teacher changes the constant of the scaling law, not its exponent.")
    if options.noise and best.noise > 0.5 * best.risks["standard"]:
        part = best.noise / best.risks["standard"]
        found.append(
            f"{percent(part, 0)} of that risk is noise on the student's labels, which stays the "
            "same under any surrogate; a ridge would reduce it."
        )
    if columns[0].chain is not None:
        found.append(_chain_sentence(columns[0], columns[0].chain, options))
    return [" ".join(found)]


def _chain_sentence(column: Column, chain: Chain, options: TheoryRisk) -> str:
    gain = chain.gain(chain.best_student)
    labels = "n true labels" + (" with the same noise" if options.noise_s != options.noise else "")
    seen = "all features" if chain.size == options.p else f"the first {chain.size:,} features"
    if gain > _NOTHING:
        end = f"leaves its student {percent(gain)} less risk than {labels} would"
    elif gain < -_NOTHING:
        end = f"leaves its student {percent(-gain)} more risk than {labels} would"
    else:
        end = f"is worth as much as {labels}"
    beats = chain.best_student < chain.best_surrogate
    return (
        f"At n = {column.n:,} a surrogate trained on {chain.m:,} true labels of {seen} {end}; the "
        f"student is {'better' if beats else 'not better'} than that surrogate."
    )


# plan


def plan(data: Data, estimate: Any, found: Plan, curves: Sequence[Curve]) -> None:
    """Prints whether the theory holds on the data, and what it predicts.

    Args:
      data: the user's file.
      estimate: what was estimated from it.
      found: the predictions.
      curves: theory against fits, for the given ridge and the best one.
    """
    console = Console()
    rows, p = data.features.shape
    outputs = 1 if estimate.weights.ndim == 1 else estimate.weights.shape[-1]
    many = f", {outputs} outputs" if outputs > 1 else ""
    null = found.null_risk + found.noise_var
    console.print(
        f"{data.name}: {rows:,} rows, {p:,} features{many}; squared errors"
        f"{' summed over outputs' if outputs > 1 else ''}: predicting the mean {number(null)}, of "
        f"which noise {number(found.noise_var)}",
        highlight=False,
        markup=False,
    )
    say("Is the theory right here? Held-out error of fits on random rows:")
    console.print(_curve_table(curves))
    say(trust(curves))
    ridge = f"ridge {found.given.standard.ridge:g}"
    for kind, answers, which in (
        ("given", found.given, ridge),
        ("tuned", found.tuned, "the best ridge for each"),
    ):
        say(f"Predicted for n = {found.n:,}, m = {found.m:,}, {which}:")
        console.print(_answer_table(kind, answers, found, p))
    say(
        "Gain: of excess risk (error less noise), against n true labels with the same kind of "
        "ridge. Bounds: the truth is needed to build such a surrogate.",
        "dim",
    )
    for line in plan_sentences(found, p, curves[-1].off()):
        say(line)
    say(
        "Caveats: for linear or ridge students on these fixed features and squared error, not "
        "accuracy; Gaussian features; the surrogate's m rows are others than the student's n; "
        f"spectrum, truth and noise are estimates from {rows:,} rows"
        + (f", and n = {found.n:,} or m = {found.m:,} is beyond them."
           if max(found.n, found.m) > rows else "."),
        "dim",
    )  # fmt: skip


def _curve_table(curves: Sequence[Curve]) -> Table:
    table = Table()
    table.add_column("n", justify="right")
    for curve in curves:
        table.add_column(f"ridge {curve.ridge:.3g}: predicted", justify="right")
        table.add_column("measured", justify="right", no_wrap=True)
    for i, n in enumerate(curves[0].n):
        cells = [
            cell
            for curve in curves
            for cell in (
                number(curve.predicted[i]),
                _simulated(curve.measured[i], curve.error[i]),
            )
        ]
        table.add_row(f"{n:,}", *cells)
    return table


def trust(curves: Sequence[Curve]) -> str:
    """Whether the predictions agree with the measurements, in a sentence for each ridge."""
    found = []
    for curve in curves:
        off = curve.off()
        name = f"With ridge {curve.ridge:.3g}"
        if off <= _TRUSTED:
            found.append(
                f"{name} it can be trusted: off by at most {percent(off)} beyond the error of the "
                "measurement."
            )
        elif off <= _ROUGH:
            found.append(f"{name} it holds roughly: off by up to {percent(off)}.")
        else:
            found.append(f"{name} it can NOT be trusted: off by up to {percent(off, 0)}.")
    return " ".join(found)


def _answer_table(kind: str, answers: Answers, found: Plan, p: int) -> Table:
    table = Table()
    table.add_column("the student's labels")
    for name in ("error", "excess", "gain", *(("ridge",) if kind == "tuned" else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for name, text in _ways(answers, found, p):
        if name == "mask":
            table.add_section()
        answer: Answer = getattr(answers, name)
        cells = [number(answer.risk + found.noise_var), number(answer.risk)]
        cells.append("" if name == "standard" else percent(answer.gain))
        if kind == "tuned":
            cells.append(f"{answer.ridge:.3g}")
        table.add_row(text, *cells, style="bold" if name == "standard" else "")
    return table


def _ways(answers: Answers, found: Plan, p: int) -> list[tuple[str, str]]:
    mixed = answers.mixed
    return [
        ("standard", "n true labels"),
        ("direct", "m true labels instead"),
        ("two_stage", f"surrogate of m labels, {answers.two_stage.size:,} of {p:,} directions"),
        ("mixed", f"{percent(mixed.weight, 0)} such labels, {percent(1 - mixed.weight, 0)} true"),
        ("mask", f"bound: truth on {answers.mask.size:,} of {p:,} directions"),
        ("optimal", "bound: optimal surrogate"),
    ]


def plan_sentences(found: Plan, p: int, off: float) -> list[str]:
    """For surrogate, mask and mixed labels: would it help, and by how much.

    Args:
      found: the predictions; those with the best ridge decide.
      p: number of features.
      off: how far the theory was off on the data, as a part of the error.

    Returns:
      One line for each.
    """
    best = found.tuned
    standard = best.standard.risk
    unsure = off * (standard + found.noise_var)

    def line(name: str, answer: Answer, what: str) -> str:
        change = f"error {number(standard + found.noise_var)} -> "
        change += f"{number(answer.risk + found.noise_var)}, {percent(answer.gain)} of excess risk"
        if answer.gain > 0.01 and standard - answer.risk > unsure:
            return f"{name}: would help. {what}: {change}."
        if answer.gain > _NOTHING:
            small = answer.gain <= 0.01
            why = "next to nothing" if small else "less than the theory is off here"
            return f"{name}: can't be told to help. {what}: {change}, {why}."
        return f"{name}: would not help. {what}: {change}."

    two, mixed = best.two_stage, best.mixed
    ending = "" if two.size < p else ", as it stands (dropping directions makes it worse)"
    answers = [
        line("Surrogate", two, f"Trained on {found.m:,} labels, with {two.size:,} of {p:,} "
             f"directions{ending}"),
        line("Mask", best.mask, "A perfect surrogate (a bound) kept to the first "
             f"{best.mask.size:,} directions"),
        line("Mixing", mixed, f"{percent(mixed.weight, 0)} of the surrogate's labels"),
    ]  # fmt: skip
    if best.two_stage.gain > _NOTHING:
        more = "better than" if best.direct.risk < two.risk else "no better than"
        answers.append(
            f"Without any surrogate, the student trained on those {found.m:,} true labels itself "
            f"would be {more} that: error {number(best.direct.risk + found.noise_var)}."
        )
    return answers


# text


def number(value: float) -> str:
    """Four digits, without an exponent where that is readable."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.3e}"


def percent(value: float, digits: int = 1) -> str:
    """``30.3 %``."""
    rounded = round(100 * value, digits) + 0.0
    return f"{rounded:.{digits}f} %" if math.isfinite(rounded) else f"{value:g}"


def _simulated(mean: float, error: float) -> str:
    return f"{number(mean)} ± {error:.2g}"
