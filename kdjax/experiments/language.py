"""A language model distilled into one of fewer layers, and what the teacher was worth.

The teacher is a Hugging Face folder, or a small byte-level GPT-2 trained here. Students have some
of its layers (`kdjax.lm.take_layers`) and train by `kdjax.methods.distilgpt2`: with labels alone,
with labels and teacher, and with the teacher alone. Teachers without a language-model head are
distilled into their hidden states and attention (`kdjax.methods.tinybert`).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax import _checks, core, lm, terms, train
from kdjax import data as kdata
from kdjax._pairs import Learner, Method, Model
from kdjax.experiments import _language_measure as measuring
from kdjax.experiments import measures, runs
from kdjax.experiments._robust_progress import Progress
from kdjax.experiments.ledger import Ledger
from kdjax.experiments.measures import Estimate
from kdjax.methods import distilgpt2, tinybert

__all__ = ["REPORT", "Report", "Row", "compare"]

REPORT = "language.json"
TEACHER, COPIED, ALONE, DISTILLED, LABEL_FREE = (
    "teacher", "copied layers", "student alone", "distilled", "label-free",
)  # fmt: skip
_BYTES = 256  # the vocabulary without a tokenizer: UTF-8 bytes


class Row(NamedTuple):
    """One model of the table.

    Attributes:
      name: of the row.
      figure: perplexity (or cosine) on held-out text, over seeds.
      seconds: of training, over seeds.
      folders: Hugging Face folders of the models, by seed.
    """

    name: str
    figure: Estimate
    seconds: Estimate
    folders: list[str]


class Report(NamedTuple):
    """What a comparison found.

    Attributes:
      kind: "causal", "masked" or "body" (a teacher without a language-model head).
      figure: what ``Row.figure`` is: "perplexity" (lower is better) or "cosine".
      rows: models, the teacher first.
      costs: of "teacher" and "student": parameters, bytes, latency_ms, tokens_per_second.
      vocabulary: of the models.
      text: tokens to train the teacher on, the students, and held out.
      sample: a prompt, and how teacher and distilled student go on; empty if not "causal".
      settings: the arguments, filled in.
      device: what it ran on.
      seconds: in all.
      folder: where everything is.
    """

    kind: str
    figure: str
    rows: list[Row]
    costs: dict[str, dict[str, float]]
    vocabulary: int
    text: dict[str, int]
    sample: dict[str, str]
    settings: dict[str, Any]
    device: str
    seconds: float
    folder: str

    def row(self, name: str) -> Row:
        """The row of a name."""
        return next(row for row in self.rows if row.name == name)


class _Job(NamedTuple):
    choices: Mapping[str, Any]
    kind: str
    config: Any
    params: Any
    tokenizer: Any
    splits: Mapping[str, kdata.Dataset]
    folder: Path
    source: Path | None  # of tokenizer files
    hide: Any  # BERT's masking


def compare(
    files: Any = None,
    *,
    out: str | os.PathLike[str],
    teacher: str | os.PathLike[str] | None = None,
    lines: bool = False,
    length: int | None = None,
    layers: Sequence[int] | None = None,
    share: float | None = None,
    steps: int = 200,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    temperature: float = 2.0,
    alpha: Sequence[float] = (5.0, 2.0, 1.0),
    teacher_layers: int = 4,
    teacher_width: int = 64,
    teacher_heads: int = 4,
    teacher_steps: int = 600,
    teacher_learning_rate: float = 4e-3,
    seeds: int | Sequence[int] = 2,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """Distils a language model and compares the student with others that have no teacher.

    Args:
      files: text files or folders, as `kdjax.data.text` takes them; None is the text of Python's
        own documentation, which every Python carries.
      out: folder for models and the report.
      teacher: a Hugging Face folder of a BERT, DistilBERT or GPT-2; None trains a GPT-2 on bytes.
      lines: whether each line is a text of its own.
      length: tokens of a row; None is 64, or as many as the teacher has positions for.
      layers: of the teacher that the student starts from, counted from 0; None takes half of them,
        the first and the last among them.
      share: of the training text that students see; None is all, of the text of Python's
        documentation a twentieth.
      steps: updates of every student.
      batch_size: rows of an update.
      learning_rate: of students, at its peak.
      temperature: of the soft labels.
      alpha: weights of soft labels, labels, and the cosine of hidden states.
      teacher_layers: layers of a teacher that is trained here.
      teacher_width: its hidden size.
      teacher_heads: its attention heads.
      teacher_steps: updates of its training.
      teacher_learning_rate: at its peak.
      seeds: how many seeds (0, 1, ...), or which: the order of the text and dropout of students.
      resume: go on where the same call in ``out`` stopped.
      about: JSON-able facts to keep.
      progress: whether to show bars on a terminal.

    Returns:
      The `Report`.

    Raises:
      ValueError: an argument out of range, too little text, ``out`` exists and ``resume`` is False,
        or it belongs to other settings.
      FloatingPointError: a training diverged.
      KeyboardInterrupt: after Ctrl-C; the same call with ``resume`` continues.

    Reference:
      Sanh et al., "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter",
      2019.
    """
    choices: dict[str, Any] = {
        "files": None if files is None else _named(files),
        "teacher": None if teacher is None else str(Path(teacher).expanduser().absolute()),
        "lines": lines,
        "length": 64 if length is None else _checks.count("length", length, low=4),
        "layers": None if layers is None else [int(i) for i in layers],
        "share": share,
        "steps": _checks.count("steps", steps),
        "batch_size": _checks.count("batch_size", batch_size),
        "learning_rate": _checks.number("learning_rate", learning_rate, above=0),
        "temperature": _checks.number("temperature", temperature, above=0),
        "alpha": [float(_checks.number("alpha", a, low=0)) for a in alpha],
        "teacher_layers": _checks.count("teacher_layers", teacher_layers),
        "teacher_width": _checks.count("teacher_width", teacher_width),
        "teacher_heads": _checks.count("teacher_heads", teacher_heads),
        "teacher_steps": _checks.count("teacher_steps", teacher_steps),
        "teacher_learning_rate": _checks.number(
            "teacher_learning_rate", teacher_learning_rate, above=0
        ),
        "seeds": list(range(_checks.count("seeds", seeds)))
        if isinstance(seeds, int)
        else list(seeds),
    }
    if len(choices["alpha"]) != 3:
        raise ValueError(f"alpha must be three weights, got {len(choices['alpha'])}.")
    if share is None:
        choices["share"] = 0.05 if files is None else 1.0
    _checks.number("share", choices["share"], above=0, high=1)
    folder = Path(out).expanduser().absolute()
    known = None if teacher is None else lm.load_checkpoint(choices["teacher"])
    start = _config(choices) if known is None else known[0]
    kind = _kind(start)
    if length is None:
        choices["length"] = min(choices["length"], start.max_positions)
    choices["layers"] = _layers(choices["layers"], start.num_layers)
    if choices["length"] > start.max_positions:
        raise ValueError(
            f"length must be at most {start.max_positions}, the teacher's positions, got {length}."
        )
    ledger = Ledger(folder, choices, resume=resume, about=about)
    if (folder / REPORT).is_file():
        return _from_json(runs.read_json(folder / REPORT), folder)
    tokenizer = None if known is None else lm.load_tokenizer(choices["teacher"], start)
    splits = _texts(files, choices, tokenizer, folder, kind)
    job = _Job(
        choices, kind, start, None if known is None else known[1], tokenizer, splits, folder,
        None if known is None else Path(choices["teacher"]), measuring.masking(start, tokenizer),
    )  # fmt: skip
    try:
        report = _run(job, ledger, progress)
    finally:
        ledger.note()
    runs.write_json(folder / REPORT, _to_json(report))
    return report


def _run(job: _Job, ledger: Ledger, progress: bool) -> Report:
    choices = job.choices
    names = [COPIED, DISTILLED] if job.kind == "body" else [COPIED, ALONE, DISTILLED, LABEL_FREE]
    small = len(choices["layers"])
    size = choices["steps"] * small
    first = 0 if job.params is not None else choices["teacher_steps"] * job.config.num_layers
    total = first + len(choices["seeds"]) * size * (len(names) - 1)
    bar = Progress(total, show=progress)
    try:
        job = _with_teacher(job, bar, first)
        known = _figure(job, job.config, job.params)
        bar.begin("teacher on held-out text", 0)
        bar.end(f"{_figure_name(job)} {known:.4g}")
        found = {name: _students(job, name, bar, size) for name in names}
    finally:
        bar.close()
    seconds = runs.read_json(job.folder / "teacher" / "about.json")["seconds"] if first else 0.0
    rows = [
        Row(
            TEACHER,
            measures.estimate([known]),
            measures.estimate([seconds]),
            [str(job.folder / "teacher" if first else job.source)],
        )
    ]
    for name, each in found.items():
        rows.append(
            Row(
                name,
                measures.estimate(one["figure"] for one in each),
                measures.estimate(one["seconds"] for one in each),
                [one["folder"] for one in each],
            )
        )
    chosen = lm.load_checkpoint(found[DISTILLED][0]["folder"])
    return Report(
        kind=job.kind,
        figure=_figure_name(job),
        rows=rows,
        costs=measuring.costs(
            {"teacher": (job.config, job.params), "student": chosen}, choices["length"]
        ),
        vocabulary=job.config.vocab_size,
        text={
            "teacher": _tokens(job.splits["teacher"], "train"),
            "students": _tokens(job.splits["student"], "train"),
            "held out": _tokens(job.splits["teacher"], "validation"),
        },
        sample=_sample(job, chosen) if job.kind == "causal" else {},
        settings=dict(choices),
        device=jax.devices()[0].device_kind,
        seconds=ledger.seconds(),
        folder=str(job.folder),
    )


def _with_teacher(job: _Job, bar: Progress, size: float) -> _Job:
    """The job with a teacher's parameters, trained where there are none."""
    if job.params is not None:
        return job
    folder, choices = job.folder / "teacher", job.choices
    bar.begin("teacher", size)
    if not (folder / "about.json").is_file():
        began = time.perf_counter()
        method = core.distill(
            lm.model(job.config), None, {"lm": (1.0, terms.causal_lm(labels="input_ids"))}
        )
        learner = _learner(method, choices["teacher_steps"], choices["teacher_learning_rate"])
        params = _trained(
            job, learner, choices["teacher_steps"], 0, job.splits["teacher"], None,
            job.folder / "training" / "teacher",
            lambda step, note: bar.at(size * step / choices["teacher_steps"], note),
        )  # fmt: skip
        lm.save_checkpoint(folder, job.config, params)
        runs.write_json(folder / "about.json", {"seconds": time.perf_counter() - began})
    bar.end()
    config, params = lm.load_checkpoint(folder)
    return job._replace(config=config, params=params)


def _students(job: _Job, name: str, bar: Progress, size: float) -> list[dict[str, Any]]:
    """The students of a row and their figures; what has ended is only read."""
    choices, found = job.choices, []
    config, start = lm.take_layers(job.config, job.params, choices["layers"])
    # One program for all seeds.
    learner = None
    if name != COPIED:
        student = core.started(lm.model(config), (start, {}))
        learner = _learner(_method(job, name, student), choices["steps"], choices["learning_rate"])
    for seed in choices["seeds"]:
        folder = job.folder / name.replace(" ", "-") / f"seed-{seed}"
        file = folder / "about.json"
        if learner is not None:
            bar.begin(f"seed {seed}: {name}", size)
        if not file.is_file():
            params, began = start, time.perf_counter()
            if learner is not None:
                params = _trained(
                    job, learner, choices["steps"], seed, job.splits["student"],
                    None if name == ALONE else (job.params, {}),
                    job.folder / "training" / folder.parent.name / folder.name,
                    lambda step, note: bar.at(size * step / choices["steps"], note),
                )  # fmt: skip
            seconds = time.perf_counter() - began
            figure = _figure(job, config, params)
            lm.save_checkpoint(folder, config, params, tokenizer=job.source)
            about = {"figure": figure, "seconds": seconds, "folder": str(folder)}
            runs.write_json(file, about)
        found.append(runs.read_json(file))
        if learner is not None:
            bar.end(f"{_figure_name(job)} {found[-1]['figure']:.4g}")
    return found


def _figure_name(job: _Job) -> str:
    return "cosine" if job.kind == "body" else "perplexity"


def _figure(job: _Job, config: Any, params: Any) -> float:
    """Perplexity or cosine of a model on the held-out text."""
    return measuring.held_out(
        job.kind,
        (config, params),
        (job.config, job.params),
        job.splits["teacher"],
        batch_size=job.choices["batch_size"],
        hide=job.hide,
    )


def _method(job: _Job, name: str, student: Model) -> Method:
    """What a row minimises."""
    soft, hard, cosine = job.choices["alpha"]
    teacher = lm.model(job.config)
    if job.kind == "body":
        return tinybert.intermediate(student, teacher, layers=job.choices["layers"], shared=False)
    if name == ALONE:
        soft, hard, cosine = 0.0, 1.0, 0.0
    if name == LABEL_FREE:
        hard = 0.0
    weights = {"alpha_ce": soft, "alpha_lm": hard, "alpha_cos": cosine}
    options = {**weights, "temperature": job.choices["temperature"]}
    known = None if name == ALONE else teacher
    if job.kind == "causal":
        return distilgpt2.distilgpt2(student, known, **options)
    return distilgpt2.distilbert(student, known, augment=job.hide, **options)


def _learner(method: Method, steps: int, rate: float) -> Learner:
    warm = max(1, steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warm, max(steps, warm + 1))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    return core.minimize(method, tx)


def _trained(
    job: _Job,
    learner: Learner,
    steps: int,
    seed: int,
    dataset: kdata.Dataset,
    frozen: Any,
    folder: Path,
    at: Any,
) -> Any:
    """Parameters after so many updates, from where the last call stopped."""
    size = min(job.choices["batch_size"], dataset.size("train"))
    batches = dataset.batches("train", size, seed=seed)
    state = train.fit(
        learner,
        learner.init(jax.random.key(seed), batches.at(0), frozen),
        batches,
        frozen=frozen,
        steps=steps,
        checkpoint=folder,
        save_every=max(1, steps // 4),
        keep=1,
        progress=False,
        plot=False,
        report=lambda step, record: at(
            step, "" if record.get("loss") is None else f"loss {float(record['loss']):.3g}"
        ),
    )
    return jax.device_get(state.params["student"])


def _texts(
    files: Any, choices: Mapping[str, Any], tokenizer: Any, folder: Path, kind: str
) -> dict[str, kdata.Dataset]:
    """What the teacher and the students are trained on; both are tested on the same."""
    if files is None:
        files = folder / "text.txt"
        if not files.is_file():
            files.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(measuring.documentation(), encoding="utf-8")
    options: dict[str, Any] = {"packed": kind == "causal", "lines": choices["lines"]}
    if kind != "causal":
        special = {name: tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]", "[PAD]")}
        if None in special.values():
            raise ValueError("teacher must have a tokenizer with [CLS], [SEP] and [PAD].")
        options |= {
            "start": [special["[CLS]"]], "end": [special["[SEP]"]], "pad": special["[PAD]"]
        }  # fmt: skip
    whole = kdata.text(files, tokenizer, length=choices["length"], **options)
    rows = whole.read("train")
    count = max(1, math.ceil(choices["share"] * whole.size("train")))
    kept = {k: v[:count] for k, v in rows.items() if k not in ("index", "weight")}
    small = kdata.arrays({"train": kept}, num_classes=1, name="text")
    return {"teacher": whole, "student": small}


def _config(choices: Mapping[str, Any]) -> Any:
    if choices["teacher_width"] % choices["teacher_heads"]:
        raise ValueError(
            f"teacher_width must be a multiple of teacher_heads {choices['teacher_heads']}, got "
            f"{choices['teacher_width']}."
        )
    return lm.GPT2Config(
        vocab_size=_BYTES,
        hidden_size=choices["teacher_width"],
        num_layers=choices["teacher_layers"],
        num_heads=choices["teacher_heads"],
        # Room for text to be continued.
        max_positions=2 * choices["length"],
        embedding_dropout=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def _kind(config: Any) -> str:
    if isinstance(config, lm.GPT2Config):
        if config.head != "lm":
            raise ValueError(
                f"teacher must be a GPT-2 with a language-model head, got head {config.head!r}."
            )
        return "causal"
    return "masked" if config.head in ("masked_lm", "pretraining") else "body"


def _layers(given: Sequence[int] | None, there: int) -> list[int]:
    if given is None:
        if there < 2:
            raise ValueError(
                f"teacher must have at least 2 layers to take half of them, got {there}."
            )
        count = there // 2
        if count == 1:
            return [0]
        return [round(i * (there - 1) / (count - 1)) for i in range(count)]
    for index in given:
        _checks.count("layers", index, low=0, high=there - 1)
    if not given:
        raise ValueError("layers must name at least one layer, got none.")
    return list(given)


def _sample(job: _Job, chosen: tuple[Any, Any]) -> dict[str, str]:
    """A held-out beginning, and how both models go on from it."""
    ids = job.splits["teacher"].read("validation", [0])["input_ids"]
    start = ids[:, : job.choices["length"] // 2]
    room = min(job.choices["length"], job.config.max_positions - start.shape[1])

    def words(tokens: Any) -> str:
        if job.tokenizer is not None:
            return str(job.tokenizer.decode(np.asarray(tokens).tolist()))
        return bytes(np.asarray(tokens, np.uint8).tolist()).decode("utf-8", errors="replace")

    found = {"prompt": words(start[0])}
    for name, (config, params) in (
        ("teacher", (job.config, job.params)),
        ("distilled", chosen),
    ):
        tokens, _ = jax.jit(
            lambda p, x, config=config: lm.generate(
                config, p, x, length=room, key=jax.random.key(0), temperature=0.8
            )
        )(params, jnp.asarray(start))
        found[name] = words(tokens[0])
    return found


def _tokens(dataset: kdata.Dataset, split: str) -> int:
    batch = dataset.read(split)
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].size if mask is None else mask.sum())


def _named(files: Any) -> list[str]:
    each = [files] if isinstance(files, (str, os.PathLike)) else list(files)
    return [str(Path(file).expanduser().absolute()) for file in each]


def _to_json(report: Report) -> dict[str, Any]:
    rows = [
        {
            "name": row.name,
            "figure": list(row.figure.values),
            "seconds": list(row.seconds.values),
            "folders": row.folders,
        }
        for row in report.rows
    ]
    return {**report._asdict(), "rows": rows}


def _from_json(found: Mapping[str, Any], folder: Path) -> Report:
    rows = [
        Row(
            row["name"],
            measures.estimate(row["figure"]),
            measures.estimate(row["seconds"]),
            row["folders"],
        )
        for row in found["rows"]
    ]
    return Report(**{**found, "rows": rows, "folder": str(folder)})
