"""What ``kdjax condense`` says at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from kdjax.experiments import condense, measures
from kdjax.experiments._condense_report import EVERYTHING, LEARNED, MANIFEST, NOTHING, PAIRS, REPORT
from kdjax.experiments._condense_task import STARTS
from kdjax.experiments.measures import Estimate

_FIGURES = {
    "r2_source": "R2\nsource",
    "r2_target": "R2\ntarget",
    "shot_1": "1-shot\n%",
    "shot_5": "5-shot\n%",
    "fine_tune": "fine-tune\n5-shot %",
}
_REAL = ("random", "herding", "k-means")
# Student's t at 97.5 % by degrees of freedom; from there on a little too wide.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def report(
    found: condense.Report, out: Path, figures: Sequence[Path | None], given: Sequence[str] = ()
) -> None:
    """Prints the table of a comparison, what it says, and where its files are.

    Args:
      found: the report.
      out: the folder.
      figures: those that were drawn.
      given: options that the next run should have, too.
    """
    console = Console()
    settings, images = found.settings, found.images
    source, target = (_classes(settings[f"{name}_classes"]) for name in ("source", "target"))
    count = len(found.seeds)
    _say(
        console,
        f"{found.dataset}: {images['source']:,} images of classes {source} without labels, "
        f"condensed into {settings['pairs']} pairs for the features ({found.features}) of "
        f"{found.target}; task: classes {target}; {count} seed{'s' if count > 1 else ''}, "
        f"{found.device}",
    )
    worth = [name for name in _FIGURES if not (name == "r2_target" and _same(found))]
    whole = _table(found, worth, True)
    free = console.options.update_width(10 * console.width)
    if console.measure(whole, options=free).maximum <= console.width:
        console.print(whole)
    else:
        console.print(_table(found, worth, False))
        console.print(_table(found, [], True))
    _say(console, verdict(found), "bold")
    for sentence in _footnotes(found):
        _say(console, sentence, "dim")
    console.print()
    files = [PAIRS, MANIFEST, *(figure.name for figure in figures if figure is not None), REPORT]
    wide = max(len(str(out / name)) for name in files)
    for name in files:
        line = f"{out / name!s:<{wide}}  {_KINDS[name]}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print("\nTo pre-train on the pairs:\n", highlight=False)
    for line in condense.snippet(found, out).splitlines():
        console.print(f"    {line}", soft_wrap=True, highlight=False, markup=False)
    console.print()
    for i, (line, why) in enumerate(_next(found, given, out)):
        text = f"{'      ' if i else 'next: '}kdjax condense {line}"
        console.print(f"{text}  # {why}", soft_wrap=True, highlight=False, markup=False)


def _next(found: condense.Report, given: Sequence[str], out: Path) -> list[tuple[str, str]]:
    """What to type next, with the same settings and target network, and why."""
    settings = found.settings
    same = " ".join(
        [*given, "--target", str(out if settings["target"] is None else settings["target"])]
    )
    more = min(found.images["source"], 3 * settings["pairs"])
    lines = [(f"{same} --pairs {more}", "more pairs")]
    if len(found.seeds) == 1:
        lines.insert(0, (f"{same} --pairs {settings['pairs']} --seeds 3", "standard errors"))
    return lines


_KINDS = {
    PAIRS: "the learned pairs",
    MANIFEST: "what they are, and how to load them",
    "pairs.png": "start and learned images side by side",
    "curve.png": "R2 while they were learned",
    REPORT: "this report as data",
}


def verdict(found: condense.Report) -> str:
    """What the table says about the learned pairs, in one sentence."""
    best = max(_REAL, key=lambda name: found.row(name).figures["r2_source"].mean)
    learned, whole = found.row(LEARNED), found.row(EVERYTHING)
    gain, loss = (_gain(found, name, "r2_source") for name in (best, EVERYTHING))
    several = len(found.seeds) > 1
    worth = (
        f"Pre-training on {learned.pairs} learned pairs gives R2 "
        f"{learned.figures['r2_source'].mean:.3f}: {_against(gain, 3, f'{best} images')}, and "
        f"{_against(loss, 3, f'all {whole.pairs:,} images')}"
    )
    real, none = (_percent(_gain(found, name, "shot_5")) for name in (best, NOTHING))
    task = (
        f"5-shot accuracy on the target task is {100 * learned.figures['shot_5'].mean:.1f} %: "
        f"{_against(real, 1, best, ' points')}, and "
        f"{_against(none, 1, 'no pre-training', ' points')}"
    )
    text = f"{worth}; {task}"
    return text + ("." if several else " (one seed: no telling what of this is noise).")


def _against(value: Estimate, digits: int, what: str, unit: str = "") -> str:
    error = "" if math.isnan(value.error) else f" ± {value.error:.{digits}f}"
    size = f"{abs(value.mean):.{digits}f}{error}{unit}"
    way = "above" if value.mean >= 0 else "below"
    return f"{size} {way} {what}{' (within noise)' if _noise(value) else ''}"


def _noise(value: Estimate) -> bool:
    """Whether 0 lies in the 95 % interval; False for one seed, which has none."""
    count = len(value.values)
    if count < 2:
        return False
    return abs(value.mean) <= _T[min(count - 2, len(_T) - 1)] * value.error


def _gain(found: condense.Report, name: str, figure: str) -> Estimate:
    """Learned pairs minus another set, paired by seed."""
    return measures.gain(
        found.row(name).figures[figure].values, found.row(LEARNED).figures[figure].values
    )


def _percent(value: Estimate) -> Estimate:
    return Estimate(100 * value.mean, 100 * value.error, tuple(100 * x for x in value.values))


def _table(found: condense.Report, worth: Sequence[str], cost: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("pre-trained on", no_wrap=True)
    if cost:
        for name in ("pairs", "bytes", "updates", "seconds"):
            table.add_column(name, justify="right", no_wrap=True)
    for name in worth:
        table.add_column(_FIGURES[name], justify="right", no_wrap=True)
    for row in found.rows:
        cells = [f"{row.pairs:,}", _bytes(row.bytes), f"{row.updates:,}", f"{row.seconds.mean:.1f}"]
        if row.name == NOTHING:
            cells = [""] * 4
        figures = [_figure(name, row.figures.get(name)) for name in worth]
        label = "nothing" if row.name == NOTHING else row.name
        style = "bold" if row.name == LEARNED else ""
        table.add_row(label, *(cells if cost else []), *figures, style=style)
    return table


def _figure(name: str, value: Estimate | None) -> str:
    if value is None:
        return ""
    scale, digits = (1, 3) if name.startswith("r2") else (100, 1)
    error = "" if math.isnan(value.error) else f" ±{scale * value.error:.{digits}f}"
    return f"{scale * value.mean:.{digits}f}{error}"


def _footnotes(found: condense.Report) -> list[str]:
    settings = found.settings
    start = STARTS[settings["start"]]
    sentences = [
        f"R2: share of the variance of the target network's features that is explained on held-out "
        f"images ({found.images['source_test']:,} of the source"
        + ("" if _same(found) else f", {found.images['target_test']:,} of the target classes")
        + f"). Accuracies: on target classes, {settings['draws']} draws of labelled images "
        f"({min(3, settings['draws'])} for fine-tuning), the same for every set."
    ]
    if len(found.seeds) > 1:
        sentences.append(
            "± is the standard error over seeds of start, condensing and pre-training; there is "
            'one target network for all. "Within noise": 0 lies in the 95 % interval of the '
            "differences, paired by seed."
        )
    sentences.append(
        f"{LEARNED} started from the {start} images and learned for {settings['steps']:,} updates, "
        f"{found.condensing.mean:.0f} s for each seed, which the seconds of the table don't count. "
        f"All of it took {found.seconds:.0f} s."
    )
    return sentences


def _same(found: condense.Report) -> bool:
    """Whether the task afterwards is of the source's own classes."""
    classes = (sorted(found.settings[f"{name}_classes"]) for name in ("source", "target"))
    return len({tuple(names) for names in classes}) == 1


def _classes(classes: Sequence[int]) -> str:
    """Class numbers, runs of them as ranges: ``0-4, 7``."""
    words: list[str] = []
    run: list[int] = []
    for name in [*sorted(classes), None]:
        if run and name != run[-1] + 1:
            words.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
            run = []
        if name is not None:
            run.append(name)
    return ", ".join(words)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _say(console: Console, text: str, style: str = "") -> None:
    """Prints prose, wrapped at the width of the terminal."""
    console.print(text, style=style, highlight=False, markup=False)
