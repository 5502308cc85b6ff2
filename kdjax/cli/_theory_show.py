"""What the predictions of ``kdjax theory risk`` look like, and how numbers are printed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from kdjax.cli._options import TheoryRisk
from kdjax.cli._theory import RISKS, Chain, Column
from kdjax.theory import ScalingConstants

_LABELS = {
    "standard": "true labels (standard)",
    "optimal": "optimal surrogate",
    "mask": "optimal 0-1 mask",
}
NOTHING = 5e-4  # gains below this print as 0.0 %


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
            line("  simulated", (with_error(*c.simulated[name]) for c in columns))
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
        sizes = (f"{c.size:,}" if math.isfinite(c.best_student) else "-" for c in chains)
        line("  best with first features", sizes)
        own = (number(c.best_surrogate) if math.isfinite(c.best_student) else "-" for c in chains)
        line("  that surrogate itself", own)
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
    finite = [c for c in columns if math.isfinite(c.risks["standard"])]
    best = max(finite or columns, key=lambda c: c.gain(c.risks["optimal"]))
    gain, masked = (best.gain(best.risks[name]) for name in ("optimal", "mask"))
    if not finite:
        found = ["Meaning: no finite risk to be compared."]
    elif gain < NOTHING:
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
            if masked < NOTHING
            else f"only dropping the last {dropped:,} of {options.p:,} features from the labels "
            f"takes away {percent(masked)}"
        )
        noise = " of the same noise" if options.noise else ""
        found = [
            f"Meaning: at n = {best.n:,}, labels of the best surrogate there is take away "
            f"{percent(gain)} of the risk that true labels{noise} leave; {mask}."
        ]
    if laws is not None and gain >= NOTHING:
        found.append("A better teacher changes the constant of the scaling law, not its exponent.")
    if finite and options.noise and best.noise > 0.5 * best.risks["standard"]:
        part = best.noise / best.risks["standard"]
        found.append(
            f"{percent(part, 0)} of that risk is noise on the student's labels, which stays the "
            "same under any surrogate; a ridge would reduce it."
        )
    told = next(
        (
            c
            for c in columns
            if c.chain
            and math.isfinite(c.chain.gain(c.chain.best_student))
            and math.isfinite(c.chain.standard)
        ),
        None,
    )
    if told is not None and told.chain is not None:
        found.append(_chain_sentence(told, told.chain, options))
    lines = [" ".join(found)]
    if not all(map(math.isfinite, _shown(columns))):
        lines.append(
            "inf: n (or m) equals the number of features that are fitted, where noise makes the "
            "risk of a fit without ridge diverge; gains to or over it are shown as -."
        )
    return lines


def _shown(columns: Sequence[Column]) -> Iterator[float]:
    """All risks of the table."""
    for column in columns:
        yield from column.risks.values()
        if column.chain is not None:
            yield from (column.chain.surrogate, column.chain.student, column.chain.best_student)


def _chain_sentence(column: Column, chain: Chain, options: TheoryRisk) -> str:
    gain = chain.gain(chain.best_student)
    noise = f" with noise {options.noise_s:g} too" if options.noise_s != options.noise else ""
    labels = f"n true labels{noise}"
    seen = "all features" if chain.size == options.p else f"the first {chain.size:,} features"
    if gain > NOTHING:
        end = f"leaves its student {percent(gain)} less risk than {labels} would"
    elif gain < -NOTHING:
        end = f"leaves its student {percent(-gain)} more risk than {labels} would"
    else:
        end = f"is worth as much as {labels}"
    beats = chain.best_student < chain.best_surrogate
    return (
        f"At n = {column.n:,} a surrogate trained on {chain.m:,} true labels of {seen} {end}; the "
        f"student is {'better' if beats else 'not better'} than that surrogate."
    )


# text


def number(value: float) -> str:
    """Four digits, without an exponent where that is readable."""
    if value == 0 or not math.isfinite(value):
        return f"{value + 0.0:g}"  # no -0
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.3e}"


def percent(value: float, digits: int = 1) -> str:
    """``30.3 %``, or ``-`` where something infinite was compared."""
    return f"{round(100 * value, digits) + 0.0:.{digits}f} %" if math.isfinite(value) else "-"


def with_error(mean: float, error: float) -> str:
    """``2.680 ± 0.15``."""
    return f"{number(mean)} ± {error:.2g}"
