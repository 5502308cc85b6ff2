"""What the predictions of ``kdjax theory plan`` look like: tables, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from kdjax.cli._options import TheoryPlan
from kdjax.cli._theory import Curve
from kdjax.cli._theory_data import Data
from kdjax.cli._theory_show import NOTHING, number, percent, say, with_error
from kdjax.theory import Answer, Answers, Plan

_TRUSTED, _ROUGH = 0.10, 0.30


def plan(
    data: Data, estimate: Any, found: Plan, curves: Sequence[Curve], options: TheoryPlan
) -> None:
    """Prints whether the theory holds on the data, and what it predicts.

    Args:
      data: the user's file.
      estimate: what was estimated from it.
      found: the predictions.
      curves: theory against fits, for the given ridge and the best one.
      options: what was asked for.
    """
    console = Console()
    rows, p = data.features.shape
    outputs = 1 if estimate.weights.ndim == 1 else estimate.weights.shape[-1]
    many = f", {outputs} outputs (squared errors are summed over them)" if outputs > 1 else ""
    say(f"{data.name}: {rows:,} rows, {p:,} features{many}.")
    say(
        "Squared error without any features, of the mean label for every row: "
        f"{number(found.null_risk + found.noise_var)}. Of that {number(found.noise_var)} is noise "
        f"({'as given' if options.noise is not None else 'estimated'}), which no linear fit "
        "removes."
    )
    say(
        "Is the theory right here? Held-out error of fits to n random rows; measured: mean of "
        f"{options.repeats} fits ± its standard error."
    )
    console.print(_curve_table(curves))
    for line in trust(curves):
        say(line)
    say(f"Predicted for n = {found.n:,}, m = {found.m:,}, ridge {found.given.standard.ridge:g}:")
    console.print(_answer_table(found.given, found, ridges=False))
    say(f"Predicted for n = {found.n:,}, m = {found.m:,}, the best ridges for each:")
    console.print(_answer_table(found.tuned, found, ridges=True))
    for line in _footnotes(found, p):
        say(line, "dim")
    for line in plan_sentences(found, p, doubt(curves[-1])):
        say(line)
    say(_caveats(found, rows), "dim")


def _curve_table(curves: Sequence[Curve]) -> Table:
    table = Table()
    table.add_column("n", justify="right")
    for curve in curves:
        for what in ("predicted", "measured"):
            heading = f"ridge {curve.ridge:.3g}\n{what}"
            table.add_column(heading, justify="right", no_wrap=True)
    for i, n in enumerate(curves[0].n):
        cells = [
            cell
            for curve in curves
            for cell in (
                number(curve.predicted[i]),
                with_error(curve.measured[i], curve.error[i]),
            )
        ]
        table.add_row(f"{n:,}", *cells)
    return table


def trust(curves: Sequence[Curve]) -> list[str]:
    """Whether the predictions agree with the measurements, in a line for each ridge."""
    return [f"Ridge {curve.ridge:.3g}: {_verdict(curve)}" for curve in curves]


def _verdict(curve: Curve) -> str:
    off, known = curve.off(), _compared(curve)
    if not known:
        return "it can't be told: the predicted error diverges at every n."
    clear = [n for n, (_, blur) in known.items() if blur <= _TRUSTED]
    blurred = [n for n in known if n not in clear]

    def raw(sizes: Iterable[int]) -> str:
        return f"off by up to {percent(max(known[n][0] for n in sizes))}"

    far = f"{percent(off)} beyond" if off >= NOTHING else "within"
    beyond = f"{raw(known)}, {far} two standard errors"
    if off > _ROUGH:
        return f"it can NOT be trusted: {beyond}."
    if off > _TRUSTED:
        return f"it holds roughly: {beyond}."
    if not clear:
        return (
            f"it can't be told: {raw(blurred)}, but two standard errors are at least "
            f"{percent(min(blur for _, blur in known.values()))} everywhere; more --repeats would "
            "help."
        )
    if not blurred:
        return f"it can be trusted: {beyond}."
    return (
        f"it can be trusted at n = {_listed(clear)}: {raw(clear)}, {far} "
        f"two standard errors. At n = {_listed(blurred)} it can't be told: {raw(blurred)}, but two "
        f"standard errors exceed {percent(_TRUSTED, 0)}."
    )


def _compared(curve: Curve) -> dict[int, tuple[float, float]]:
    """Deviation and two standard errors, by the sizes at which the prediction is finite."""
    found = zip(curve.n, curve.deviations(), curve.blurs(), strict=True)
    return {n: (off, blur) for n, off, blur in found if math.isfinite(off)}


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(f"{n:,}" for n in sizes)


def doubt(curve: Curve) -> float:
    """How far off the theory may be, as a part of the error, after the test by this curve."""
    least = min((blur for _, blur in _compared(curve).values()), default=math.inf)
    return max(curve.off(), 0.0 if least <= _TRUSTED else least)


def _answer_table(answers: Answers, found: Plan, *, ridges: bool) -> Table:
    table = Table()
    table.add_column("the student's labels")
    names = ("error", "excess", "gain", *(("student\nridge", "surrogate\nridge") if ridges else ()))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for name, text in _ways(answers):
        if name == "mask":
            table.add_section()
        answer: Answer = getattr(answers, name)
        cells = [number(answer.risk + found.noise_var), number(answer.risk)]
        cells.append("" if name == "standard" else percent(answer.gain))
        if ridges:
            own = answer.surrogate_ridge
            cells += [f"{answer.ridge:.2g}", "" if math.isnan(own) else f"{own:.2g}"]
        table.add_row(text, *cells, style="bold" if name == "standard" else "")
    return table


def _ways(answers: Answers) -> list[tuple[str, str]]:
    mixed = answers.mixed
    return [
        ("standard", "n true labels"),
        ("direct", "m true labels"),
        ("together", "n + m true labels"),
        ("two_stage", f"surrogate, top {answers.two_stage.size:,}"),
        ("mixed", f"mixed, {percent(mixed.weight, 0)} top {mixed.size:,}"),
        ("mask", f"bound: mask, top {answers.mask.size:,}"),
        ("optimal", "bound: optimal"),
    ]


def _footnotes(found: Plan, p: int) -> list[str]:
    lines = [
        "Gain: of excess risk (error less noise), over n true labels with the same kind of "
        f"ridge. Top k: only the first k of {p:,} principal directions. Surrogate: trained on m "
        "true labels. Mixed: that part of its labels, the rest is the n true ones. Bounds: it "
        "takes the truth to build such a surrogate.",
        "Labels of a surrogate carry no noise here, unlike true labels (theory risk puts the same "
        "noise on both), so part of its gain, and of the bounds', is that of clean labels.",
    ]
    if not all(math.isfinite(answer.risk) for answer in (*found.given, *found.tuned)):
        lines.append(
            "inf: as many labels as features, where noise makes the error of a fit without ridge "
            "diverge; gains to or over it are -."
        )
    return lines


def plan_sentences(found: Plan, p: int, off: float) -> list[str]:
    """For surrogate, mask and mixed labels: would it help, and by how much.

    Args:
      found: the predictions; those with the best ridge decide.
      p: number of features.
      off: how far the theory may be off on the data, as a part of the error.

    Returns:
      One line for each, and what the same true labels give without a surrogate.
    """
    best = found.tuned
    standard = best.standard.risk
    unsure = off * (standard + found.noise_var)

    def error(answer: Answer) -> str:
        return number(answer.risk + found.noise_var)

    def line(name: str, answer: Answer, what: str, same: Answer | None, labels: str) -> str:
        change = f"error {error(best.standard)} -> {error(answer)}, "
        change += f"{percent(answer.gain)} of excess risk"
        if answer.gain <= NOTHING or math.isnan(answer.gain):
            return f"{name}: would not help. {what}: {change}."
        if answer.gain <= 0.01 or standard - answer.risk <= unsure:
            small = answer.gain <= 0.01
            why = "next to nothing" if small else "less than the theory may be off here"
            return f"{name}: can't be told to help. {what}: {change}, {why}."
        if same is None or same.risk > answer.risk:
            return f"{name}: would help. {what}: {change}."
        return (
            f"{name}: would help over n true labels, but the {labels} true labels used directly "
            f"would give {error(same)}. {what}: {change}."
        )

    two, mixed = best.two_stage, best.mixed
    ending = "" if two.size < p else ", as it stands (dropping directions makes it worse)"
    both = found.n + found.m
    return [
        line("Surrogate", two, f"Trained on {found.m:,} labels, with {two.size:,} of {p:,} "
             f"directions{ending}", best.direct, "m"),
        line("Mask", best.mask, "A perfect surrogate (a bound) kept to the first "
             f"{best.mask.size:,} directions", None, ""),
        line("Mixing", mixed, f"{percent(mixed.weight, 0)} of the surrogate's labels, "
             f"{percent(1 - mixed.weight, 0)} true ones", best.together, "n + m"),
        f"Without any surrogate: error {error(best.standard)} from n = {found.n:,} true labels, "
        f"{error(best.direct)} from m = {found.m:,}, {error(best.together)} from all n + m = "
        f"{both:,}.",
    ]  # fmt: skip


def _caveats(found: Plan, rows: int) -> str:
    text = (
        "Caveats: for linear or ridge students on these fixed features and squared error, not "
        "accuracy; Gaussian features; the surrogate's m rows are others than the student's n; "
        f"spectrum, truth and noise are estimates from {rows:,} rows"
    )
    if max(found.n, found.m) > rows:
        return f"{text}, and n = {found.n:,} or m = {found.m:,} is beyond them."
    if found.n + found.m > rows:
        return f"{text}, fewer than n + m = {found.n + found.m:,}."
    return f"{text}."
