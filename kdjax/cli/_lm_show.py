"""What ``kdjax lm distill`` says at the end."""

from __future__ import annotations

import math
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdjax.experiments import language, measures
from kdjax.experiments.measures import Estimate

_LABELS = {
    "teacher": "teacher",
    "copied layers": "its layers, untrained",
    "student alone": "student, text alone",
    "distilled": "student, text and teacher",
    "label-free": "student, teacher alone",
}


def report(found: language.Report, out: Path) -> None:
    """Prints the table of a comparison, what it says, and where its files are.

    Args:
      found: the report.
      out: the folder.
    """
    console = Console()
    text, seeds = found.text, len(found.settings["seeds"])
    where = found.settings["teacher"] or "a GPT-2 on bytes, trained here"
    tokens = ", ".join(f"{name} {count:,}" for name, count in text.items())
    if found.settings["teacher"]:
        tokens = f"students {text['students']:,}, held out {text['held out']:,}"
    console.print(
        f"teacher: {where}; tokens: {tokens}; {seeds} seed{'s' if seeds > 1 else ''}, "
        f"{found.device}, {found.seconds:.0f} s",
        highlight=False,
        markup=False,
    )
    console.print(_table(found))
    console.print(_costs(found))
    console.print(verdict(found), style="bold", highlight=False)
    for name in ("teacher", "distilled"):
        if found.sample:
            shown = escape(found.sample["prompt"][-80:].replace("\n", " "))
            rest = escape(found.sample[name].replace("\n", " "))
            console.print(f"\n[dim]{name} goes on:[/] [dim]{shown}[/]{rest}", highlight=False)
    console.print(f"\n{out / language.REPORT}  this report as data", highlight=False, markup=False)
    console.print(
        f"{found.row('distilled').folders[0]}  the distilled model, as transformers loads it",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print(
        "\nTo use it:\n\n    config, params = kdjax.lm.load_checkpoint("
        f'"{found.row("distilled").folders[0]}")',
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _table(found: language.Report) -> Table:
    better = "lower is better" if found.figure == "perplexity" else "1 is the teacher's"
    if not found.settings["teacher"]:
        better = f"per byte, {better}"
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model")
    table.add_column(f"held-out {found.figure}\n({better})", justify="right")
    table.add_column("training\ns", justify="right")
    for row in found.rows:
        seconds = f"{row.seconds.mean:.1f}" if row.seconds.mean >= 0.05 else "-"
        bold = "bold" if row.name == "distilled" else ""
        table.add_row(_LABELS[row.name], _shown(row.figure, found.figure), seconds, style=bold)
    return table


def _costs(found: language.Report) -> Table:
    teacher, student = found.costs["teacher"], found.costs["student"]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in ("teacher", "student", "ratio"):
        table.add_column(name, justify="right")
    for key, label, form in (
        ("parameters", "parameters", "{:,.0f}"),
        ("bytes", "MB of parameters", "{:.2f}"),
        ("latency_ms", "ms for one row", "{:.2f}"),
        ("tokens_per_second", "tokens per second, 16 rows", "{:,.0f}"),
    ):
        scale = 1e-6 if key == "bytes" else 1
        ratio = student[key] / teacher[key]
        table.add_row(
            label,
            form.format(scale * teacher[key]),
            form.format(scale * student[key]),
            f"{ratio:.2f}",
        )
    return table


def verdict(found: language.Report) -> str:
    """What the table says, in one sentence."""
    distilled = found.row("distilled").figure
    if found.figure == "cosine":
        copied = found.row("copied layers").figure
        return (
            f"Distilled, the last hidden states point as the teacher's do to a cosine of "
            f"{distilled.mean:.3f}; the layers it started from, to {copied.mean:.3f}."
        )
    alone, free = found.row("student alone").figure, found.row("label-free").figure
    # A difference of logarithms is one of nats per token, whatever the level.
    gain = measures.gain(
        [-math.log(v) for v in alone.values], [-math.log(v) for v in distilled.values]
    )
    way = "lowers" if gain.mean > 0 else "raises"
    share = 100 * abs(math.expm1(-gain.mean))
    if share < 0.05:
        return (
            f"Beside the same text the teacher makes no difference to the student's perplexity "
            f"({distilled.mean:.3g}); without a single label the student comes to {free.mean:.3g}, "
            f"the teacher is at {found.row('teacher').figure.mean:.3g}{_guessing(found)}."
        )
    return (
        f"Beside the same text the teacher {way} the student's perplexity by {share:.1f} % "
        f"({alone.mean:.3g} to {distilled.mean:.3g}{_doubt(gain)}); without a single label the "
        f"student comes to {free.mean:.3g}, the teacher is at "
        f"{found.row('teacher').figure.mean:.3g}{_guessing(found)}."
    )


def _guessing(found: language.Report) -> str:
    """A teacher that knows less than nothing of this text."""
    if found.row("teacher").figure.mean < found.vocabulary:
        return ""
    return f", which is worse than guessing among all {found.vocabulary:,} tokens"


def _doubt(gain: Estimate) -> str:
    if math.isnan(gain.error):
        return "; one seed: no telling what of this is noise"
    # Student's t for two seeds at 97.5 %, the usual two standard errors for more.
    width = {2: 12.7, 3: 4.3}.get(len(gain.values), 2.8)
    return "; within noise" if abs(gain.mean) <= width * gain.error else ""


def _shown(value: Estimate, figure: str) -> str:
    digits = 3 if figure == "cosine" else 2
    error = "" if math.isnan(value.error) else f" ± {value.error:.{digits}f}"
    return f"{value.mean:.{digits}f}{error}"
