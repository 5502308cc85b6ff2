"""Every method that transfers features, relations or logits: one pair, one budget, one table.

    python benchmarks/feature_methods.py                      # digits, about 17 CPU minutes
    python benchmarks/feature_methods.py --methods FitNet RKD CRD --seeds 5
    python benchmarks/feature_methods.py --data mnist.npz
    python benchmarks/feature_methods.py --data cifar10.npz --teacher resnet20 --student resnet8 \\
        --assistant resnet14 --augmentation crop_flip --labels-per-class 0 --batch-size 128 \\
        --steps 12000 --teacher-steps 24000 --out runs/feature_methods_cifar10   # an accelerator

The teacher (seed 0) is trained on all labels. The students see `--labels-per-class` of each class
(default 5; 0 for all). Every batch holds `--labelled` labelled rows and otherwise rows without a
label, which count in the terms that need none, and in the batch statistics of all. Where DKD, NKD
and CRD need a class, the teacher's answer stands in for a missing label.

- All students of one seed start from the same parameters and see the same batches, so differences
  are paired by seed; standard errors are over seeds, so not over teachers. Without augmentation
  the teacher's outputs are stored once, which is exact, and no method pays for its forward pass.
- `--steps` updates for everybody: SGD at 0.05, momentum 0.9, weight decay 5e-4, batches of 64, as
  published, with a cosine schedule and gradients clipped at norm 5. Stages before the real training
  (AB, FSP, the paraphraser of FT) have an eighth of it (published: 30 of 240 epochs) on top, and
  chains train each of their networks for as many updates: see the column of updates.
- Weights are those published, most of them for CIFAR-100. As they may be too strong for a small
  problem, every method is trained with each of `--multipliers` times its weight (default 0.1 and
  1). The one with the best mean accuracy on the validation split is reported, with its accuracy on
  the test split. No other choice is made, and nothing else is tuned.
- Costs are those of the compiled update against that of KD, of a first stage and of the main one:
  floating-point operations, bytes and temporary memory as the compiler counts them (it doesn't see
  inside the decompositions of KDSVD), and the CPU time of the main stage, measured in turns.

Rows are kept as they are made; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _compare import interleave, machine, program_counts, stepper
from _feature_methods import ENTRIES, KD, NONE
from _feature_training import Bench, first_steps, prepare, train
from _krr_rows import opened
from _theory import command, rows
from krr_st_digits import save
from tqdm.auto import tqdm

from kdjax.experiments.measures import Estimate, estimate, gain

COUNTS = ("flops", "bytes", "temporaries")
REASONS: Mapping[str, str] = {
    "mean teacher": "its teacher is the average of the student, which lags (seed 0 without it: "
    "16 % after 100 updates, the student 90 %), and without augmentation both see the same image, "
    "so that consistency on rows without labels only holds the student back; the smaller its "
    "weight, the better",
}
QUICK = {
    "seeds": 2, "steps": 8, "teacher_steps": 16, "multipliers": [1.0], "teacher": "vgg-4x2-8x2-8x2",
    "assistant": "vgg-4-8x2-8", "student": "vgg-4-8-8", "rounds": 2,
}  # fmt: skip
# Settings that decide what a row holds, and so whether rows of an earlier call can be taken.
DECISIVE = (
    "data", "teacher", "student", "assistant", "augmentation", "labels_per_class", "labelled",
    "batch_size", "steps", "teacher_steps", "rate",
)  # fmt: skip


def updates(name: str, options: argparse.Namespace) -> str:
    """Before the last network's, and its own."""
    if name in ("born-again", "teacher assistant"):
        before = [options.steps] * (2 if name == "born-again" else 1)
    else:
        before = [first_steps(options)] if ENTRIES[name].first is not None else []
    return " + ".join(str(count) for count in (*before, options.steps))


# What is measured.


class Row(NamedTuple):
    """A method at one weight from one seed."""

    name: str
    multiplier: float
    seed: int

    def __str__(self) -> str:
        return f"{self.name}, x{self.multiplier:g}, seed {self.seed}"


def planned(options: argparse.Namespace) -> list[Row]:
    """All multiples of a method's weight, or its weight alone; seeds vary fastest."""
    return [
        Row(name, multiplier, seed)
        for name in options.methods
        for multiplier in (options.multipliers if ENTRIES[name].scaled else [1.0])
        for seed in range(options.seeds)
    ]


def measure(bench: Bench, options: argparse.Namespace, stored: dict[str, Any], file: Path) -> None:
    """Trains the rows that are missing, and counts what each method's update costs."""
    with tqdm(planned(options), unit="row", disable=None) as bar:
        for row in bar:
            bar.set_description(str(row))
            if str(row) in stored["rows"]:
                continue
            cpu = time.process_time()
            weight = ENTRIES[row.name].weight * row.multiplier
            found = train(bench, row.name, weight, row.seed)
            stored["rows"][str(row)] = found | {"cpu": time.process_time() - cpu}
            if row.name not in stored["costs"]:
                stored["costs"][row.name] = costs(bench, row.name)
            save(file, stored)
            if bar.disable:
                print(f"{row}: {found}", file=sys.stderr, flush=True)


def costs(bench: Bench, name: str) -> list[dict[str, float]]:
    """Counts of the update of the main stage, and of the one before it if there is one."""
    keys = [main_stage(name), f"{name}, first"]
    programs = {key[0]: program for key, program in bench.programs.items()}
    found = [program_counts(programs[key].update) for key in keys if key in programs]
    return [{count: getattr(one, count) for count in COUNTS} for one in found]


def main_stage(name: str) -> str:
    return NONE if ENTRIES[name].make is ENTRIES[NONE].make else name


def clock(bench: Bench, options: argparse.Namespace, stored: dict[str, Any], file: Path) -> None:
    """Times the updates of the main stages in turns; those that are known already are left."""
    missing = [name for name in options.methods if name not in stored["times"]]
    if not missing:
        return
    keys = list(dict.fromkeys([KD, *map(main_stage, missing)]))
    for key in keys:
        if key not in bench.states:  # of an earlier call
            train(bench, key, ENTRIES[key].weight, 0)
    calls = []
    for key in keys:
        state, *rest = bench.states[key]
        calls.append(stepper(bench.programs[key, options.steps].update, state, *rest))
    times = interleave(*calls, rounds=options.rounds, repeat=10)
    for name in missing:
        stored["times"][name] = times.ratio("cpu", keys.index(main_stage(name)))
    save(file, stored)


class Outcome(NamedTuple):
    """A method at the multiple of its weight that validation chose; estimates over seeds."""

    multiplier: float
    test: Estimate
    others: dict[float, float]


def outcome(name: str, options: argparse.Namespace, found: Mapping[str, Any]) -> Outcome:
    """Ties go to the published weight."""
    values: dict[float, list[dict[str, float]]] = {}
    for row in planned(options):
        if row.name == name:
            values.setdefault(row.multiplier, []).append(found[str(row)])
    means = {m: float(np.mean([one["validation"] for one in each])) for m, each in values.items()}
    best = max(means, key=lambda m: (means[m], -abs(math.log(m))))
    tests = {m: estimate([one["test"] for one in each]) for m, each in values.items()}
    return Outcome(best, tests[best], {m: t.mean for m, t in tests.items() if m != best})


# What is said of it.


def table(options: argparse.Namespace, stored: Mapping[str, Any]) -> str:
    found = {name: outcome(name, options, stored["rows"]) for name in options.methods}
    columns = (
        "method", "weight (published x chosen)", "updates", "test accuracy (%)",
        "- labels alone", "- KD", "FLOPs / KD", "bytes / KD", "temporaries / KD", "time / KD",
    )  # fmt: skip
    cells = []
    for name, one in found.items():
        entry = ENTRIES[name]
        weight = f"{entry.weight:g} x {one.multiplier:g}" if entry.scaled else f"{entry.weight:g}"
        differences = [
            shown(gain(found[base].test.values, one.test.values), "+") if base != name else "-"
            for base in (NONE, KD)
        ]
        base = stored["costs"][KD][0]
        ratios = [
            ", ".join(f"{cost[count] / base[count]:.2f}" for cost in stored["costs"][name][::-1])
            for count in COUNTS
        ]
        ratio = stored["times"].get(name)
        seconds = "-" if ratio is None else f"{ratio:.2f}"
        cells.append(
            [name, weight, updates(name, options), shown(one.test), *differences, *ratios, seconds]
        )
    return rows(columns, cells)


def shown(value: Estimate, sign: str = "") -> str:
    """Mean and standard error in per cent."""
    error = "" if math.isnan(value.error) else f" ± {100 * value.error:.2f}"
    return f"{100 * value.mean:{sign}.2f}{error}"


def worse(options: argparse.Namespace, stored: Mapping[str, Any]) -> list[str]:
    """Methods that end below the labels alone by more than two standard errors, with a reason."""
    alone = outcome(NONE, options, stored["rows"]).test.values
    lines = []
    for name in options.methods:
        lost = gain(alone, outcome(name, options, stored["rows"]).test.values)
        if name != NONE and lost.mean < 0 and -lost.mean > 2 * lost.error:
            lines.append(f"{name} ({shown(lost, '+')}): {REASONS.get(name, 'no reason is known')}")
    return lines


def parse(argv: Sequence[str]) -> argparse.Namespace:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--data", default="digits", help="digits, or a PATH.npz with x_train, y_train, ...")
    add("--teacher", default="vgg-16x2-32x2-64x2", help="vgg-WIDTH[xCOUNT]-..., resnet20, ...")
    add("--student", default="vgg-16-32-64", help="the same")
    add("--assistant", default="vgg-16-32x2-64", help="the same")
    add("--augmentation", choices=("none", "crop_flip"), default="none")
    add("--labels-per-class", type=int, default=5, help="the students'; 0 for all (default 5)")
    add("--labelled", type=int, default=16, help="rows of a batch with labels (default 16)")
    add("--batch-size", type=int, default=64)
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=400, help="updates of each student (default 400)")
    add("--teacher-steps", type=int, default=600)
    add("--rate", type=float, default=0.05, help="the students' learning rate")
    add("--multipliers", type=float, nargs="+", default=[0.1, 1.0], help="of the weights")
    add("--methods", nargs="+", choices=ENTRIES, default=list(ENTRIES), metavar="METHOD",
        help=f"of {', '.join(ENTRIES)}; {NONE} and {KD} are always there")  # fmt: skip
    add("--rounds", type=int, default=5, help="in which times are taken")
    add("--no-times", action="store_true", help="take none")
    add("--out", type=Path, help="folder to keep and resume in (default: runs/feature_methods)")
    add("--quick", action="store_true", help=f"only to see that it runs: {QUICK}")
    options = found.parse_args(argv)
    if options.quick:
        vars(options).update(QUICK)
    for name in ("seeds", "steps", "teacher_steps", "batch_size", "labelled", "rounds"):
        if getattr(options, name) < 1:
            found.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.labels_per_class and options.labelled >= options.batch_size:
        found.error("--labelled must be below --batch-size")
    if min(options.multipliers) <= 0:
        found.error("--multipliers must be above 0")
    if options.out is None:
        options.out = Path(
            "runs/feature_methods_quick" if options.quick else "runs/feature_methods"
        )
    asked = {NONE, KD, *options.methods}
    options.methods = [name for name in ENTRIES if name in asked]
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing, prints the table, and says who is worse than the labels alone."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    wall, cpu = time.perf_counter(), time.process_time()
    file = options.out / "results.json"
    stored = opened(file, {name: getattr(options, name) for name in DECISIVE})
    stored = {"costs": {}, "times": {}, "calls": [], **stored}
    task, classes = prepare(options)
    bench = Bench(options, task, classes)
    measure(bench, options, stored, file)
    if not options.no_times:
        clock(bench, options, stored, file)
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    stored["calls"].append({"command": command("feature_methods", arguments), **spent})
    save(file, stored)
    labelled = int((np.asarray(task.train["label"]) >= 0).sum())
    name = "digits" if options.data == "digits" else Path(options.data).stem
    right = ", ".join(f"{100 * one:.2f} %" for one in task.accuracies)
    print(
        f"`{command('feature_methods', arguments)}`, {machine()}\n"
        f"{name}: {options.teacher} ({right}) to {options.student}, "
        f"{len(task.train['label']):,} images, {labelled:,} labels; {options.seeds} seeds, mean ± "
        f"standard error; {spent['cpu']:.0f} s of CPU, {spent['wall']:.0f} s in this call\n"
    )
    print(table(options, stored), "", sep="\n")
    print(
        "\n".join(
            f"{name}: {ENTRIES[name].weight:g} ({ENTRIES[name].source})" for name in options.methods
        )
    )
    found = worse(options, stored)
    print("", "Worse than the labels alone by more than two standard errors:", sep="\n")
    print("\n".join(found) if found else "none")


if __name__ == "__main__":
    main()
