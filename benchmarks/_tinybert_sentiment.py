"""Stages of the sentiment run of `tinybert_cpu.py`: each leaves a file, and is read from it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

import kdjax as kd
import kdjax.data
from kdjax import lm
from kdjax.experiments.measures import estimate
from kdjax.methods import tinybert

ALONE, DISTILLED = "student alone", "TinyBERT"
ROWS = (ALONE, "TinyBERT, second stage only", DISTILLED)
CHANCE = 0.5


class Settings(NamedTuple):
    """Of a run; other settings need another folder."""

    length: int = 40
    batch: int = 32
    teacher_epochs: int = 2
    teacher_rate: float = 1e-4
    layers: int = 3
    width: int = 192
    intermediate: int = 768
    copies: int = 1
    first_epochs: int = 3
    first_rate: float = 2e-3
    second_epochs: int = 2
    second_rate: float = 5e-4
    alone_rate: float = 5e-4
    alone_dropout: float = 0.1  # those that imitate have none: they fit too little, not too much
    projected: bool = True
    rows: int | None = None  # of the training split


class Task(NamedTuple):
    """What every stage reads."""

    settings: Settings
    data: kdjax.data.Dataset
    tokenizer: Any
    folder: Path  # of the package's model
    out: Path


class Teacher(NamedTuple):
    """A fine-tuned teacher."""

    config: lm.BertConfig
    params: Any


def task(folder: Path, files: Sequence[Path], out: Path, settings: Settings) -> Task:
    """Labelled lines as rows of tokens: four fifths to train and tune on, one fifth to test."""
    tokenizer = lm.load_tokenizer(folder)
    first, last = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    data = kdjax.data.text(
        dict(enumerate(files)), tokenizer, length=settings.length, packed=False, start=[first],
        end=[last], validation=0.2, name="sentiment",
    )  # fmt: skip
    splits = dict(data.splits)
    splits["test"] = splits.pop("validation")
    data = dataclasses.replace(data, splits=splits).hold_out(
        min(500, data.size("train") // 4), name="dev"
    )
    if settings.rows is not None:
        data = data.hold_out(data.size("train") - settings.rows, name="unused")
    return Task(settings, data, tokenizer, folder, out)


def train(
    method: kd.Method,
    batches: Any,
    steps: int,
    rate: float,
    *,
    out: Path,
    seed: int,
    frozen: Any = None,
    first: Mapping[str, Any] | None = None,
    judge: Callable[[kd.State], Mapping[str, float]] | None = None,
    every: int | None = None,
    progress: bool = True,
) -> kd.State:
    """BERT's optimizer with a linear schedule; goes on where it was stopped."""
    learner = kd.minimize(
        method, tinybert.optimizer(steps=steps, learning_rate=rate, schedule="linear")
    )
    state = learner.init(jax.random.key(seed), first, frozen)
    return kd.train.fit(
        learner, state, batches, frozen=frozen, steps=steps, checkpoint=out, save_every=250, keep=1,
        evaluate=judge, eval_every=every, progress=progress, plot=False,
    )  # fmt: skip


def teacher(task: Task) -> Teacher:
    """MiniLM with a new head, all of it trained on the labels."""
    kept = task.out / "teacher"
    if not (kept / "config.json").is_file():
        config, params = lm.load_checkpoint(task.folder, head="sequence", key=jax.random.key(0))
        net = kd.started(lm.model(config, outputs=("logits",)), (params, {}))
        method = kd.distill(net, None, {"hard": (1.0, kd.terms.hard_labels())})
        settings = task.settings
        batches = task.data.batches("train", settings.batch, seed=0)
        state = train(
            method, batches, settings.teacher_epochs * batches.steps_per_epoch,
            settings.teacher_rate, out=task.out / "teacher-run", seed=1, first=batches.at(0),
        )  # fmt: skip
        whole = task.out / "teacher.partial"
        lm.save_checkpoint(whole, config, state.params["student"], tokenizer=task.folder)
        os.replace(whole, kept)
    config, params = lm.load_checkpoint(kept)
    assert isinstance(config, lm.BertConfig)
    return Teacher(config, params)


def student(task: Task, teacher: Teacher, dropout: float = 0.0) -> lm.BertConfig:
    """A config of at most a seventh of the teacher's transformer parameters."""
    settings = task.settings
    return dataclasses.replace(
        teacher.config, num_layers=settings.layers, hidden_size=settings.width,
        intermediate_size=settings.intermediate, hidden_dropout=dropout, attention_dropout=dropout,
    )  # fmt: skip


def projected_embeddings(teacher: Teacher, ids: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """The teacher's embeddings in the directions in which those of a text vary most.

    Args:
      teacher: the teacher.
      ids: of the text's real tokens, [n].
      width: of the student, at most the teacher's.
    """
    tables = {
        k: np.asarray(v["embedding"]) for k, v in teacher.params["embeddings"].items() if k != "ln"
    }
    # LayerNorm's scale says which channels the teacher's layers see.
    scale = np.asarray(teacher.params["embeddings"]["ln"]["scale"])
    seen, counts = np.unique(ids, return_counts=True)
    words = tables["word"][seen] * scale
    words = (words - np.average(words, axis=0, weights=counts)) * np.sqrt(counts)[:, None]
    _, directions = np.linalg.eigh(words.T @ words)
    onto = directions[:, ::-1][:, :width]
    return {name: ((table * scale) @ onto).astype(np.float32) for name, table in tables.items()}


def fresh_student(task: Task, teacher: Teacher, config: lm.BertConfig, seed: int) -> Any:
    """Random parameters but, where asked for, for the projected embeddings."""
    params, _ = jax.jit(lm.model(config).init)(jax.random.key(100 + seed))
    if task.settings.projected:
        batch = task.data.read("train")
        ids = batch["input_ids"][batch["attention_mask"] != 0]
        found = projected_embeddings(teacher, ids, config.hidden_size)
        embeddings = {name: {"embedding": jnp.asarray(table)} for name, table in found.items()}
        params = {**params, "embeddings": {**params["embeddings"], **embeddings}}
    return params


# What the teacher says, stored once for all seeds.


def states(task: Task, teacher: Teacher, config: lm.BertConfig) -> dict[str, np.ndarray]:
    """The matched hidden states and scores of every training row, in half precision."""
    folder = task.out / "states"
    files = {name: folder / f"{name}.npy" for name in ("hidden", "scores")}
    layers = kd.terms.uniform_layers(teacher.config.num_layers, config.num_layers)
    if not folder.is_dir():
        net = lm.model(teacher.config, outputs=("hidden", "scores"))

        def matched(params: Any, inputs: Any) -> tuple[jax.Array, jax.Array]:
            found, _ = net.apply(params, {}, inputs)
            hidden = [found["hidden"][i] for i in (0, *(j + 1 for j in layers))]
            scores = [found["scores"][j] for j in layers]
            return tuple(jnp.stack(x, 1).astype(jnp.float16) for x in (hidden, scores))

        program = jax.jit(matched)
        partial = folder.with_name("states.partial")
        partial.mkdir(parents=True, exist_ok=True)
        size, made = task.data.size("train"), None
        with tqdm(total=size, desc="storing the teacher's states", unit="row", disable=None) as bar:
            for batch in task.data.once("train", 64):
                count = int((batch["weight"] > 0).sum())
                rows = batch["index"][:count]
                found = program(teacher.params, net.read(batch))
                if made is None:
                    made = [
                        np.lib.format.open_memmap(
                            partial / f.name, "w+", np.float16, (size, *x.shape[1:])
                        )
                        for f, x in zip(files.values(), found, strict=True)
                    ]
                for array, x in zip(made, found, strict=True):
                    array[rows] = np.asarray(x)[:count]
                bar.update(count)
        for array in made or []:
            array.flush()
        os.replace(partial, folder)
    return {name: np.load(file, mmap_mode="r") for name, file in files.items()}


def answered(task: Task, teacher: Teacher) -> kdjax.data.Dataset:
    """Training rows and augmented copies of them, with the teacher's logits."""
    settings = task.settings
    batch = task.data.read("train")
    columns = {k: batch[k] for k in ("input_ids", "attention_mask", "label")}
    file = task.out / "copies.npz"
    if settings.copies and not file.is_file():
        texts = [
            task.tokenizer.decode(row[mask != 0].tolist())
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        vectors = lm.input_vectors(teacher.config, teacher.params, task.tokenizer, texts=texts)
        found = lm.replace_words(
            texts, task.tokenizer, vectors=vectors, copies=settings.copies, progress=True
        )
        made = [(text, row) for row, copies in enumerate(found) for text in copies]
        save_arrays(file, **_rows(task, [text for text, _ in made], [row for _, row in made]))
    if settings.copies:
        with np.load(file) as stored:
            label = columns["label"][stored["row"]]
            columns = {
                "input_ids": np.concatenate([columns["input_ids"], stored["input_ids"]]),
                "attention_mask": np.concatenate(
                    [columns["attention_mask"], stored["attention_mask"]]
                ),
                "label": np.concatenate([columns["label"], label]),
            }
    data = kdjax.data.arrays({"train": columns}, num_classes=2, name="sentiment and copies")
    stored_logits = kd.train.predict_labels(
        lm.model(teacher.config, outputs=("logits",)), (teacher.params, {}), data,
        task.out / "logits", batch_size=64,
    )  # fmt: skip
    return data.with_outputs(stored_logits)


def _rows(task: Task, texts: list[str], rows: list[int]) -> dict[str, np.ndarray]:
    """Tokens of new texts, as `kdjax.data.text` makes them."""
    tokenizer, length = task.tokenizer, task.settings.length
    first, last = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    ids, mask = (np.zeros((len(texts), length), np.int32) for _ in range(2))
    for i, found in enumerate(tokenizer.encode_batch(texts, add_special_tokens=False)):
        row = [first, *found.ids[: length - 2], last]
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "row": np.asarray(rows, np.int32)}


# Rows of the table.


def row(task: Task, teacher: Teacher, kind: str, seed: int) -> dict[str, Any]:
    """Trains one student; right answers on the test split of its best epoch on the dev split."""
    settings = task.settings
    config = student(task, teacher, settings.alone_dropout if kind == ALONE else 0.0)
    out = task.out / f"{kind.replace(' ', '-').replace(',', '').lower()}-{seed}"
    params = fresh_student(task, teacher, config, seed)
    began, cpu = time.perf_counter(), time.process_time()
    per_epoch = task.data.size("train") // settings.batch
    first_steps = settings.first_epochs * per_epoch
    if kind == DISTILLED:
        params = _first_stage(task, teacher, config, params, seed, out / "first", first_steps)
    net = lm.model(config, outputs=("logits",))
    begun = kd.started(net, (params, {}))
    steps = settings.second_epochs * per_epoch
    if kind == ALONE:
        method = kd.distill(begun, None, {"hard": (1.0, kd.terms.hard_labels())})
        batches = task.data.batches("train", settings.batch, seed=seed)
    else:
        method = tinybert.prediction(begun, kd.from_batch(logits="teacher_logits"))
        batches = answered(task, teacher).batches("train", settings.batch, seed=seed)
    # As many updates for all.
    steps = steps if kind == DISTILLED else steps + first_steps
    rate = settings.alone_rate if kind == ALONE else settings.second_rate
    judge = functools.partial(_judged, task.data, net, out / "answers")
    state = train(
        method, batches, steps, rate, out=out / "second", seed=seed, first=batches.at(0),
        judge=judge, every=max(1, min(per_epoch, steps)),
    )  # fmt: skip
    if kind == DISTILLED and seed == 0:
        lm.save_checkpoint(
            task.out / "student", config, state.params["student"], tokenizer=task.folder
        )
    return {
        **best(out / "answers"), "updates": steps + (first_steps if kind == DISTILLED else 0),
        "seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu,
    }  # fmt: skip


def _first_stage(
    task: Task, teacher: Teacher, config: lm.BertConfig, params: Any, seed: int, out: Path,
    steps: int,
) -> Any:  # fmt: skip
    """The student after having matched the teacher's attention and hidden states."""
    stored = states(task, teacher, config)
    net = kd.started(lm.model(config, outputs=("hidden", "scores")), (params, {}))
    like = kd.from_batch(
        hidden=lambda batch: tuple(jnp.moveaxis(batch["t_hidden"], 1, 0)),
        scores=lambda batch: tuple(jnp.moveaxis(batch["t_scores"], 1, 0)),
    )
    # The student's layers are the stored ones, one for one.
    method = tinybert.intermediate(net, like, layers=range(config.num_layers), shared=False)
    plain = task.data.batches("train", task.settings.batch, seed=seed)

    def batches(step: int) -> Any:
        for batch in plain.from_step(step):
            at = batch["index"]
            yield {**batch, "t_hidden": stored["hidden"][at], "t_scores": stored["scores"][at]}

    first = next(batches(0))
    rate = task.settings.first_rate
    state = train(method, batches, steps, rate, out=out, seed=seed, first=first)
    return state.params["student"]


def _judged(
    data: kdjax.data.Dataset, net: kd.Model, folder: Path, state: kd.State
) -> dict[str, float]:
    """Right answers on both splits, kept in a file for each epoch."""
    right = {}
    for split in ("dev", "test"):
        logits = kd.train.predict(
            net, (state.params["student"], state.extra["student"]), data.once(split, 128)
        )
        right[split] = logits.argmax(-1) == data.labels(split)
    save_arrays(folder / f"{int(state.step):06d}.npz", **right)
    return {f"{split}_accuracy": float(values.mean()) for split, values in right.items()}


def best(folder: Path) -> dict[str, Any]:
    """Of the epoch that is best on the dev split, the first of equals."""
    found = []
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as stored:
            found.append((int(file.stem), stored["dev"], stored["test"]))
    step, dev, test = max(found, key=lambda one: one[1].mean())
    return {
        "step": step, "dev": float(dev.mean()), "accuracy": float(test.mean()),
        "last": float(found[-1][2].mean()), "right": np.flatnonzero(test).tolist(),
        "of": len(test),
    }  # fmt: skip


def teacher_row(task: Task, teacher: Teacher) -> dict[str, Any]:
    net = lm.model(teacher.config, outputs=("logits",))
    state = kd.State(jnp.int32(0), None, {"student": teacher.params}, {"student": {}}, None)
    _judged(task.data, net, task.out / "teacher-answers", state)
    return best(task.out / "teacher-answers")


def run(task: Task, seeds: Sequence[int], kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """All rows, each trained once; those in the results file are only read."""
    file = task.out / "results.json"
    settings = json.loads(json.dumps(task.settings._asdict()))
    stored: dict[str, Any] = {"settings": settings, "rows": {}}
    if file.is_file():
        stored = json.loads(file.read_text())
        if stored["settings"] != settings:
            raise SystemExit(f"{file} holds results of other settings: pass another --out")
    save_json(file, stored)
    tuned = teacher(task)
    plan = [(kind, seed) for seed in seeds for kind in kinds]
    with tqdm(total=1 + len(plan), unit="row", disable=None) as bar:
        for kind, seed in [("teacher", 0), *plan]:
            name = f"{kind}, seed {seed}"
            bar.set_description(name)
            if name not in stored["rows"]:
                found = (
                    teacher_row(task, tuned) if kind == "teacher" else row(task, tuned, kind, seed)
                )
                stored["rows"][name] = found
                save_json(file, stored)
                if bar.disable:
                    print(f"{name}: accuracy {found['accuracy']:.4f}", flush=True)
            bar.update()
    return stored["rows"]


# Figures.


def transformer_size(params: Mapping[str, Any]) -> int:
    """Parameters of the layers, without embeddings, pooler and head."""
    layers = {name: part for name, part in params.items() if name.startswith("layer_")}
    return sum(x.size for x in jax.tree.leaves(layers))


def latency(net: Mapping[str, tuple[kd.Model, Any]], length: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of one text, the models taking turns."""
    inputs = {
        "input_ids": jnp.full((1, length), 1000, jnp.int32),
        "attention_mask": jnp.ones((1, length), jnp.int32),
    }
    times: dict[str, list[float]] = {name: [] for name in net}
    programs = {
        name: jax.jit(lambda params, x, model=model: model.apply(params, {}, x)[0]["logits"])
        for name, (model, _) in net.items()
    }
    for _ in range(repeats + 3):
        for name, program in programs.items():
            began = time.perf_counter()
            program(net[name][1], inputs).block_until_ready()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: float(np.median(values[3:])) for name, values in times.items()}


def table(
    task: Task, found: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], repeats: int
) -> list[str]:
    """A published-style table: size, speed, accuracy, and how much of the teacher's is kept."""
    tuned = teacher(task)
    config, params = lm.load_checkpoint(task.out / "student")
    models = {"teacher": tuned, "student": Teacher(config, params)}
    times = latency(
        {n: (lm.model(m.config, outputs=("logits",)), m.params) for n, m in models.items()},
        task.settings.length, repeats,
    )  # fmt: skip
    lines = [[
        "model", "layers / width", "parameters (transformer / all)", "file, MB", "latency, ms",
        "speed-up", "accuracy, %", "above chance, kept",
    ]]  # fmt: skip
    lines.append(["---"] * len(lines[0]))
    whole = found["teacher, seed 0"]["accuracy"]
    kinds = list(dict.fromkeys(name.rsplit(", seed", 1)[0] for name in found))
    for kind in kinds:
        side = "teacher" if kind == "teacher" else "student"
        one = models[side]
        values = [
            found[f"{kind}, seed {s}"]["accuracy"] for s in seeds if f"{kind}, seed {s}" in found
        ]
        mean, error, _ = estimate(values)
        spread = f" ± {100 * error:.1f}" if len(values) > 1 else ""
        size = sum(x.size for x in jax.tree.leaves(one.params))
        megabytes = (task.out / side / "model.safetensors").stat().st_size / 1e6
        lines.append([
            kind, f"{one.config.num_layers} / {one.config.hidden_size}",
            f"{transformer_size(one.params) / 1e6:.2f} M / {size / 1e6:.2f} M", f"{megabytes:.1f}",
            f"{times[side]:.2f}", f"{times['teacher'] / times[side]:.1f}",
            f"{100 * mean:.1f}{spread}", f"{100 * above_chance(mean, whole):.1f} %",
        ])  # fmt: skip
    return ["| " + " | ".join(line) + " |" for line in lines]


def difference(
    found: Mapping[str, Mapping[str, Any]], kind: str, other: str, seeds: Sequence[int]
) -> tuple[float, float]:
    """Mean gain in accuracy and its standard error: the larger one of over seeds and over rows."""
    gains, per_row = [], []
    for seed in seeds:
        ours, theirs = (found[f"{name}, seed {seed}"] for name in (kind, other))
        gains.append(ours["accuracy"] - theirs["accuracy"])
        right = np.zeros((2, ours["of"]))
        right[0, ours["right"]], right[1, theirs["right"]] = 1, 1
        per_row.append(right[0] - right[1])
    rows = np.mean(per_row, axis=0)
    errors = [float(rows.std(ddof=1) / np.sqrt(len(rows)))]
    if len(gains) > 1:
        errors.append(estimate(gains).error)
    return float(np.mean(gains)), max(errors)


def above_chance(accuracy: float, whole: float) -> float:
    """The share of the teacher's accuracy above chance that is kept; NaN where it has none."""
    return (accuracy - CHANCE) / (whole - CHANCE) if whole > CHANCE else float("nan")


def verdicts(
    task: Task, found: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]
) -> dict[str, bool]:
    """What must hold, with the figures, and whether it does."""
    tuned = teacher(task)
    _, params = lm.load_checkpoint(task.out / "student")
    share = transformer_size(tuned.params) / transformer_size(params)
    whole = found["teacher, seed 0"]["accuracy"]
    mean = float(np.mean([found[f"{DISTILLED}, seed {seed}"]["accuracy"] for seed in seeds]))
    kept = above_chance(mean, whole)
    gain, error = difference(found, DISTILLED, ALONE, seeds)
    return {
        f"transformer parameters: 1/{share:.2f} of the teacher's, at most 1/7": share >= 7,
        f"accuracy above chance: {100 * kept:.1f} % of the teacher's, at least 90 %": kept >= 0.9,
        f"over the same student alone: {100 * gain:+.1f} points, more than two standard errors "
        f"({2 * 100 * error:.1f})": gain > 2 * error,
    }  # fmt: skip


def save_arrays(file: Path, **arrays: np.ndarray) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}")
    with partial.open("wb") as stream:
        np.savez(stream, **arrays)
    os.replace(partial, file)


def save_json(file: Path, value: Any) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}")
    partial.write_text(json.dumps(value) + "\n")
    os.replace(partial, file)
