"""Tables of ``kdjax robust`` for people at a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kdjax.experiments import measures, robust
from kdjax.experiments.measures import Estimate

_WEIGHTS = {"student": "student", "ema": "average"}
_ATTACKS = {
    "clean": "clean",
    "pgd_20": "PGD-20",
    "pgd_100": "PGD-100",
    "cw_100": "CW-100",
    "auto_attack": "AutoAttack",
    "worst_case": "worst case of all",
}
_CHECKS = {
    "black_box": "white box above black box (Square)",
    "more_steps": "PGD-20 above PGD-100",
    "unbounded": "accuracy with no bound on the change",
    "zero_gradients": "images without a gradient",
    "rising_loss": "margin that doesn't grow with eps",
    "random_noise": "random noise above PGD-100",
}


# Images, of all seeds, from which on a difference under AutoAttack says something.
_FEW = 200


def report(found: robust.Report, out: Path, figures: Sequence[Path | None]) -> None:
    """Prints the tables of a comparison and where its files are.

    Args:
      found: the report.
      out: the folder.
      figures: those that were drawn.
    """
    console = Console()
    settings = found.settings
    count = len(found.seeds)
    noise = settings["label_noise"]
    _say(
        console,
        f"{found.dataset}: {found.images['train']:,} training images"
        + (f", {100 * noise:g} % of their labels wrong" if noise else "")
        + f", {found.images['validation']:,} held out, {found.images['test']:,} for testing; "
        f"{settings['model']}, {settings['norm']} eps {settings['eps']:.4g}, "
        f"{settings['epochs']} epochs, {count} seed{'s' if count > 1 else ''}, {found.device}",
    )
    both = _accuracies(found, ("best", "last"))
    free = console.options.update_width(10 * console.width)
    if console.measure(both, options=free).maximum <= console.width:
        console.print(both)
    else:
        for when in ("best", "last"):
            console.print(_accuracies(found, (when,)))
    console.print(_calibrations(found))
    for sentence in gains(found):
        _say(console, sentence)
    for sentence in _footnotes(found):
        _say(console, sentence, "dim")
    for figure in figures:
        if figure is not None:
            console.print(f"{figure.stem:<11} {figure}", soft_wrap=True, highlight=False)
    if found.folder is not None:
        file = out / robust.REPORT
        console.print(f"{'report':<11} {file}", soft_wrap=True, highlight=False)
        shown = out / Path(found.rows[-1].folders[0]).parent.relative_to(found.folder)
        console.print(f"\nnext: kdjax robust evaluate {shown}", soft_wrap=True, highlight=False)


def gains(found: robust.Report) -> list[str]:
    """What each other method adds to the first, paired by seed."""
    first, *others = found.settings["method"]
    sentences = []
    for name in others:
        parts = []
        for figure, attack in (("pgd_20", "PGD-20"), ("auto_attack", "AutoAttack")):
            for when in ("best", "last"):
                before, after = (
                    getattr(found.row(method), when).get(figure) for method in (first, name)
                )
                if before is not None and after is not None:
                    gain = measures.gain(before.values, after.values)
                    images = found.settings["auto_attack"] * len(found.seeds)
                    few = attack == "AutoAttack" and images < _FEW
                    doubt = f" (on {images} images: mostly noise)" if few else ""
                    parts.append(f"{_points(gain)} under {attack} at the {when} epoch{doubt}")
        sentences.append(
            f"{robust.METHODS[name]} over {robust.METHODS[first]}, student, in points: "
            + ", ".join(parts)
            + ("; paired by seed." if len(found.seeds) > 1 else "; one seed can't tell.")
        )
    return sentences


def _accuracies(found: robust.Report, when: Sequence[str]) -> Table:
    figures = {"clean": "clean", "pgd_20": "PGD-20"}
    if found.settings["auto_attack"]:
        figures["auto_attack"] = "AA"
    only = "" if len(when) > 1 else f" at the {when[0]} epoch"
    table = _table(f"Test accuracy{only}, in %")
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    for epoch in when:
        for name in figures.values():
            heading = name if only else f"{epoch}\n{name}"
            table.add_column(heading, justify="right", no_wrap=True)

    def line(row: robust.Row) -> list[str]:
        return [_percent(getattr(row, epoch).get(name)) for epoch in when for name in figures]

    _fill(table, found, line)
    return table


def _calibrations(found: robust.Report) -> Table:
    table = _table("Overfitting, and calibration at the best epoch, in %")
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in ("best\nepoch", "PGD-10\nbest - last", "ECE\nas it is", "ECE\nscaled", "T"):
        table.add_column(name, justify="right", no_wrap=True)

    def line(row: robust.Row) -> list[str]:
        temperature = row.best["temperature"]
        return [
            f"{row.best_epoch.mean:.0f}",
            _percent(row.overfitting),
            _percent(row.best["ece"]),
            _percent(row.best["ece_scaled"]),
            "" if temperature is None else f"{temperature.mean:.2f}",
        ]

    _fill(table, found, line)
    return table


def _fill(table: Table, found: robust.Report, line: Callable[[robust.Row], list[str]]) -> None:
    awp = "+AWP" if found.settings["awp"] else ""
    for i, row in enumerate(found.rows):
        new = i == 0 or found.rows[i - 1].method != row.method
        if new and i:
            table.add_section()
        name = robust.METHODS[row.method] + awp if new else ""
        table.add_row(name, _WEIGHTS[row.weights], *line(row))


def _footnotes(found: robust.Report) -> list[str]:
    sentences = []
    if len(found.seeds) > 1:
        sentences.append(
            "± is the standard error over seeds, of which each has its own training images."
        )
    sentences.append(
        "best: the epoch with the highest PGD-10 accuracy on the held-out images; the test images "
        "chose nothing. average: of the weights over training. T: temperature fitted on the "
        "held-out images, below 1 where the network is too unsure. best - last: by PGD-10 on the "
        "held-out images. PGD is the last of 20 (10) steps of eps / 4, which flatters a network "
        "that is unsure."
    )
    images, several = found.settings["auto_attack"], len(found.seeds) > 1
    if images == found.images["test"]:
        sentences.append("AA: AutoAttack.")
    elif images:
        some = f"{images:,} test images" + (" for each seed, its own" if several else "")
        sentences.append(
            f"AA: estimated by AutoAttack on {some}: PGD-20's accuracy on all, times the share "
            "that AutoAttack leaves of what PGD-20 leaves of those."
        )
    sentences += found.notes
    sentences.append(f"All of it took {found.seconds:.0f} s.")
    return sentences


def evaluation(found: robust.Found, figure: Path | None) -> None:
    """Prints the tables of one evaluated model.

    Args:
      found: the evaluation.
      figure: the picture, if it was drawn.
    """
    console = Console()
    settings = found.settings
    _say(
        console,
        f"{found.model}: {found.images:,} test images of {settings['data']}, {settings['norm']} "
        f"eps {settings['eps']:.4g}",
    )
    console.print(_attacks(found))
    console.print(_calibration(found))
    console.print(_stability(found))
    console.print(_masking(found))
    for note in found.notes:
        _say(console, note)
    if figure is not None:
        console.print(f"picture     {figure}", soft_wrap=True, highlight=False)
    file = Path(found.folder) / "report.json"
    console.print(f"report      {file}", soft_wrap=True, highlight=False)


def _attacks(found: robust.Found) -> Table:
    table = _table("Accuracy")
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.show_header = False
    for name, label in _ATTACKS.items():
        if name not in found.accuracy:
            continue
        style = "bold" if name in ("clean", "worst_case") else ""
        if name == "auto_attack":
            label = f"AutoAttack ({found.settings['version']})"
        if name == "worst_case":
            table.add_section()
        table.add_row(label, f"{100 * found.accuracy[name]:.1f} %", style=style)
        if name == "auto_attack":
            for part, value in found.accuracy.items():
                if part.startswith("auto_attack/"):
                    broke = found.accuracy["clean"] - value
                    table.add_row(f"  {part.partition('/')[2]} breaks", f"{100 * broke:.1f} %")
    return table


def _calibration(found: robust.Found) -> Table:
    table = _table("Calibration")
    table.add_column("", no_wrap=True)
    for name in ("ECE", "MCE", "NLL", "Brier", "confidence", "T"):
        table.add_column(name, justify="right", no_wrap=True)
    labels = {"clean": "clean", "pgd_20": "PGD-20"}
    for name, label in labels.items():
        for key, text in ((name, label), (f"{name}_scaled", "  scaled")):
            value = found.calibration.get(key)
            if value is None:
                continue
            temperature = value.get("temperature")
            table.add_row(
                text,
                f"{100 * value['ece']:.1f} %",
                f"{100 * value['mce']:.1f} %",
                f"{value['nll']:.3f}",
                f"{value['brier']:.3f}",
                f"{100 * value['confidence']:.1f} %",
                "" if temperature is None else f"{temperature:.3f}",
            )
    return table


def _stability(found: robust.Found) -> Table:
    table = _table("Small natural changes")
    table.add_column("", no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True)
    table.add_column("same answer", justify="right", no_wrap=True)
    for name, value in found.stability.items():
        table.add_row(
            name.replace("_", " "),
            f"{100 * value['accuracy']:.1f} %",
            f"{100 * value['unchanged']:.1f} %",
        )
    return table


def _masking(found: robust.Found) -> Table:
    table = _table("Signs of masked gradients")
    table.add_column("", no_wrap=True)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("wanted", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, check in found.masking.items():
        verdict = "ok" if check["passed"] else "suspicious"
        table.add_row(
            _CHECKS.get(name, name.replace("_", " ")),
            f"{check['measured']:.3f}",
            check["wanted"],
            verdict,
            style="" if check["passed"] else "bold",
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="")


def _percent(value: Estimate | None) -> str:
    """``74.3 ± 0.5``."""
    if value is None:
        return ""
    error = "" if value.error != value.error else f" ± {100 * value.error:.1f}"
    return f"{100 * value.mean:.1f}{error}"


def _points(value: Estimate) -> str:
    error = "" if value.error != value.error else f" ± {100 * value.error:.1f}"
    return f"{100 * value.mean:+.1f}{error}"


def _say(console: Console, text: str, style: str = "") -> None:
    """Prints prose, wrapped at the width of the terminal."""
    console.print(text, style=style, highlight=False, markup=False)
