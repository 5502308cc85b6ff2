"""DistilGPT-2 in small: half of a GPT-2's layers, on much text, on little, and without labels.

    python benchmarks/distilgpt2_cpu.py
    python benchmarks/distilgpt2_cpu.py --quick
    python benchmarks/distilgpt2_cpu.py --data books/ --teacher gpt2/ --length 512 --fused --bf16

The text is that of ``pydoc_data.topics``, which every Python carries (its length differs by
version): the ASCII bytes of all topics in the order of their names, blanks collapsed, the last
tenth held out, and cut into rows of 64. Teacher: GPT-2 of 6 layers, width 96, 4 heads, 128 ids,
without dropout; 800 updates of AdamW, 2e-3 falling as a cosine, batches of 16 rows. Students: its
layers 0, 2 and 5, at 1e-3.

  labels alone  cross-entropy of the next byte
  triple        5 T^2 KL + 2 cross-entropy + 1 cosine of the last hidden states, T = 2
  KD alone      5 T^2 KL: no labels

250 updates on the whole text, 400 on its first 20,000 bytes. Perplexities are of bytes (of tokens,
with a tokenizer) in rows of the held-out text. Bars: 9 before training and 6.9 after the triple
on the whole text; on scarce text 7.0 for the triple, 7.3 for KD alone and both 1.5 below labels
alone; the fused loss gives the losses of the first 50 updates of the triple to 1e-4. The teacher is
so near on the whole text that distillation doesn't beat labels there.

Without a teacher folder one is trained, and kept. Results are kept after every row; the same
command goes on where it was stopped. A folder of transformers (GPT-2, DistilGPT-2) gives the
teacher and its tokenizer; bars are for the text and the teacher above.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
from _compare import interleave, machine
from _distilgpt2 import (
    KINDS,
    QUICK,
    Settings,
    count,
    half,
    method,
    network,
    perplexity,
    teacher_config,
    text_of,
    train,
)
from tqdm.auto import tqdm

import kdjax as kd

SIDES = ("full", "scarce")
Row = tuple[str, str]  # side, kind
BEFORE, TEACHER, FUSED = ("-", "before training"), ("-", "teacher"), ("full", "triple, fused")
FLAGS = {
    "windows": "train on windows from any place of the text",
    "fused": "train without logits of the whole batch",
    "bf16": "forward passes in bfloat16",
}
# WikiText-103, both tuned on its training part; figures of the published code's README.
PUBLISHED = (
    ("GPT-2 (published)", "12", "124 M", "16.3"),
    ("DistilGPT-2 (published)", "6", "82 M", "21.1"),
)


# What is kept and printed.


class Bench:
    """Rows that are computed once and kept in ``out``."""

    def __init__(self, options: argparse.Namespace):
        self.settings, self.out = options.settings, options.out
        self.file = self.out / "results.json"
        self.folder = options.teacher or self.out / "teacher"
        given = {"data": options.data, "teacher": str(options.teacher), **self.settings._asdict()}
        self.stored: dict[str, Any] = {"given": given, "rows": {}}
        if self.file.is_file():
            before = json.loads(self.file.read_text())
            if before["given"] == given:
                self.stored = before
            elif not options.quick:
                raise SystemExit(f"{self.file} holds results of other settings: pass another --out")
        self.text = text_of(self.settings, options.data, options.teacher)
        self.bar = tqdm(total=4 + len(KINDS) * len(SIDES), unit="row", disable=None)

    def row(self, row: Row, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        name = ", ".join(row)
        self.bar.set_description(name)
        if name not in self.stored["rows"]:
            self.stored["rows"][name] = compute()
            save(self.file, self.stored)
            if self.bar.disable:
                value = self.stored["rows"][name].get("perplexity", math.nan)
                print(f"{name}: perplexity {value:.2f}", file=sys.stderr, flush=True)
        self.bar.update()
        return self.stored["rows"][name]

    def teacher(self) -> dict[str, Any]:
        """Trains the teacher, unless its folder is there."""
        seconds = math.nan
        if not (self.folder / "config.json").is_file():
            config = teacher_config(self.settings, self.text.vocab)
            net = network(config, self.settings, self.settings.fused)
            made = train(
                method("labels alone", net, None, self.settings.fused), None, self.text.train,
                self.settings.teacher_steps, self.settings.teacher_rate, self.settings,
                report=self.bar.set_postfix_str,
            )  # fmt: skip
            kd.lm.save_checkpoint(self.folder, config, made.params)
            seconds = made.seconds
        config, params = kd.lm.load_checkpoint(self.folder)
        value = perplexity(config, params, self.text.held_out, self.settings)
        return {"perplexity": value, "seconds": seconds, "parameters": count(params)}

    @functools.cached_property
    def pair(self) -> tuple[Any, Any, Any, Any]:
        """Configs and parameters of the teacher and of the student at its start."""
        config, params = kd.lm.load_checkpoint(self.folder)
        # A folder's dropout is that of its own training.
        config = dataclasses.replace(
            config, embedding_dropout=0.0, hidden_dropout=0.0, attention_dropout=0.0
        )
        return config, params, *kd.lm.take_layers(config, params, half(config.num_layers))

    def before(self) -> dict[str, Any]:
        _, _, small, start = self.pair
        value = perplexity(small, start, self.text.held_out, self.settings)
        return {"perplexity": value, "parameters": count(start)}

    def student(self, side: str, kind: str, fused: bool, stop: int | None = None) -> dict[str, Any]:
        """One student; the one of the table of costs is kept as a folder."""
        settings = self.settings
        config, params, small, start = self.pair
        net = kd.started(network(small, settings, fused), (start, {}))
        teacher = network(config, settings, fused)
        steps = settings.full_steps if side == "full" else settings.scarce_steps
        ids = self.text.train if side == "full" else self.text.train[: settings.scarce]
        made = train(
            method(kind, net, teacher, fused), None if kind == "labels alone" else (params, {}),
            ids, steps if stop is None else stop, settings.rate, settings, horizon=steps,
            report=self.bar.set_postfix_str,
        )  # fmt: skip
        value = perplexity(small, made.params, self.text.held_out, settings)
        losses = made.losses[: settings.fused_steps].astype(float).tolist()
        if (side, kind, stop) == ("full", "triple", None):
            kd.lm.save_checkpoint(self.out / "student", small, made.params)
        return {"perplexity": value, "seconds": made.seconds, "losses": losses}

    def costs(self) -> dict[str, Any]:
        """What a forward pass takes and how fast both write, in turns."""
        config, params, *_ = self.pair
        models = {"teacher": (config, params)}
        models["student"] = kd.lm.load_checkpoint(self.out / "student")
        length, width = self.settings.length, self.settings.length // 8
        tokens = jnp.asarray(self.text.held_out[: 16 * length].reshape(-1, length))
        forwards, writers = [], []
        for config, params in models.values():
            net = kd.lm.model(config, outputs=("logits",), dtype=self.settings.dtype)
            forward = jax.jit(lambda p, ids, net=net: net.apply(p, {}, {"input_ids": ids})[0])
            write = jax.jit(
                lambda p, ids, config=config: kd.lm.generate(
                    config, p, ids, length=length - width, key=jax.random.key(0),
                    dtype=self.settings.dtype,
                )
            )  # fmt: skip
            forwards.append(functools.partial(forward, params, tokens[:1]))
            writers.append(functools.partial(write, params, tokens[:, :width]))
        for call in (*forwards, *writers):
            jax.block_until_ready(call())
        latency = interleave(*forwards, repeat=5).medians()["wall"]
        writing = interleave(*writers).medians()["wall"]
        written = len(tokens) * (length - width)
        return {
            name: {"latency": latency[i], "speed": written / writing[i]}
            for i, name in enumerate(models)
        }

    def run(self) -> dict[Row, dict[str, Any]]:
        """All rows in the order of the table."""
        found = {TEACHER: self.row(TEACHER, self.teacher)}
        found[BEFORE] = self.row(BEFORE, self.before)
        for side in SIDES:
            for kind in KINDS:
                one = functools.partial(self.student, side, kind, self.settings.fused)
                found[side, kind] = self.row((side, kind), one)
        stop, other = self.settings.fused_steps, not self.settings.fused
        found[FUSED] = self.row(FUSED, lambda: self.student("full", "triple", other, stop))
        found["-", "costs"] = self.row(("-", "costs"), self.costs)
        self.bar.close()
        return found


def save(file: Path, value: Any) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, file)


def deviation(found: Mapping[Row, Mapping[str, Any]]) -> float:
    """The largest relative difference of the losses with and without logits."""
    dense, fused = (np.asarray(found[row]["losses"]) for row in (("full", "triple"), FUSED))
    return float(np.max(np.abs(fused - dense[: len(fused)]) / np.abs(dense[: len(fused)])))


def training_table(found: Mapping[Row, Mapping[str, Any]], settings: Settings) -> list[str]:
    lines = ["| text | student | updates | perplexity | seconds |", "|---|---|---|---|---|"]
    steps = {"full": settings.full_steps, "scarce": settings.scarce_steps}
    for row, figures in found.items():
        if row in (FUSED, ("-", "costs")):
            continue
        side, kind = row
        updates = steps.get(side, settings.teacher_steps if row == TEACHER else 0)
        seconds = figures.get("seconds", math.nan)
        cells = [side, kind, str(updates or "-"), f"{figures['perplexity']:.2f}"]
        cells.append("-" if math.isnan(seconds) else f"{seconds:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cost_table(found: Mapping[Row, Mapping[str, Any]], layers: int) -> list[str]:
    names = ["model", "layers", "parameters", "bytes", "perplexity", "latency, ms", "tokens/s"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    costs = found["-", "costs"]
    base = costs["teacher"]
    for name, depth, size, row in (
        ("teacher", layers, found[TEACHER]["parameters"], TEACHER),
        ("student", len(half(layers)), found[BEFORE]["parameters"], ("full", "triple")),
    ):
        own = costs[name]
        faster = base["latency"] / own["latency"], own["speed"] / base["speed"]
        lines.append(
            f"| {name} | {depth} | {size:,} | {4 * size:,} | {found[row]['perplexity']:.2f} | "
            f"{1e3 * own['latency']:.2f} ({faster[0]:.2f}x) | "
            f"{own['speed']:,.0f} ({faster[1]:.2f}x) |"
        )
    lines += [f"| {n} | {depth} | {size} | - | {p} | - | - |" for n, depth, size, p in PUBLISHED]
    return lines


def verdicts(found: Mapping[Row, Mapping[str, Any]]) -> dict[str, bool]:
    """What must hold, with the figures, and whether it does."""
    value = {row: figures.get("perplexity", math.nan) for row, figures in found.items()}
    judged = {}
    for text, row, most in (
        ("copied layers before training", BEFORE, 9.0),
        ("whole text, triple", ("full", "triple"), 6.9),
        ("scarce text, triple", ("scarce", "triple"), 7.0),
        ("scarce text, KD alone", ("scarce", "KD alone"), 7.3),
    ):
        judged[f"{text}: perplexity {value[row]:.2f}, at most {most}"] = value[row] <= most
    for kind in KINDS[1:]:
        gain = value["scarce", "labels alone"] - value["scarce", kind]
        judged[f"scarce text, {kind}: {gain:.2f} below labels alone, at least 1.5"] = gain >= 1.5
    off, n = deviation(found), len(found[FUSED]["losses"])
    judged[f"fused loss: losses of {n} updates differ by {off:.1e}, at most 1e-4"] = off <= 1e-4
    return judged


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", nargs="+", metavar="FILE", help="text files or folders of *.txt")
    add("--teacher", type=Path, metavar="FOLDER", help="a GPT-2 checkpoint of transformers")
    numbers = ("length", "batch", "teacher_steps", "full_steps", "scarce_steps", "scarce", "seed")
    for name in numbers:
        add(f"--{name.replace('_', '-')}", type=int, default=None, metavar="N")
    add("--rate", type=float, default=None, help="learning rate of students (default: 1e-3)")
    for name, text in FLAGS.items():
        add(f"--{name}", action="store_true", help=text)
    add("--out", type=Path, help="folder for results and models (default: runs/distilgpt2_cpu)")
    add("--quick", action="store_true", help="tiny, only to see that it runs")
    options = parser.parse_args(argv)
    given = {name: getattr(options, name) for name in (*numbers, "rate", *FLAGS)}
    given = {name: value for name, value in given.items() if value is not None}
    options.settings = Settings()._replace(**((QUICK if options.quick else {}) | given))
    folder = "runs/distilgpt2_quick" if options.quick else "runs/distilgpt2_cpu"
    options.out = Path(folder) if options.out is None else options.out
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables, and returns 1 if a bar is missed."""
    given = sys.argv[1:] if argv is None else list(argv)
    options = arguments(given)
    bench = Bench(options)
    began = time.perf_counter()
    found = bench.run()
    seconds = time.perf_counter() - began
    command = shlex.join(["python", "benchmarks/distilgpt2_cpu.py", *given])
    print(f"`{command}`, {machine()}, {seconds:.0f} s in this call\n")
    train_size, held = len(bench.text.train), len(bench.text.held_out)
    print(f"{train_size:,} tokens to train on, {held:,} held out, {bench.text.vocab} ids\n")
    print("\n".join(training_table(found, options.settings)), end="\n\n")
    print("\n".join(cost_table(found, bench.pair[0].num_layers)), end="\n\n")
    if options.settings != Settings() or options.data or options.teacher:
        off = deviation(found)
        print(f"Not judged: bars are for the defaults. Fused and dense losses differ by {off:.1e}.")
        return 0
    judged = verdicts(found)
    for text, met in judged.items():
        print(f"{'MET' if met else 'NOT MET'}: {text}")
    return 0 if all(judged.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
