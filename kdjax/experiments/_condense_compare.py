"""Pairs condensed from a source, and what pre-training on them is worth for another task."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax import data as kdata
from kdjax.experiments import _condense_report as reports
from kdjax.experiments import _condense_task as tasks
from kdjax.experiments import measures, runs
from kdjax.experiments._condense_probe import few_shot
from kdjax.experiments._condense_report import (
    EVERYTHING,
    LEARNED,
    MANIFEST,
    NOTHING,
    PAIRS,
    REPORT,
    SETS,
    START,
    Report,
)
from kdjax.experiments._condense_subsets import herding, k_means, noise, random_subset
from kdjax.experiments._condense_train import fine_tune, outputs, r2
from kdjax.experiments._robust_progress import Progress
from kdjax.experiments.ledger import Ledger
from kdjax.train import _log

_BATCH, _FINE_TUNED, _EVALUATIONS = 256, 3, 4


class _Plan(NamedTuple):
    choices: Mapping[str, Any]
    task: tasks.Task
    target: tasks.Target
    targets: Mapping[str, np.ndarray]
    folder: Path

    def network(self) -> Any:
        width = self.targets["source"].shape[1]
        return tasks.student(width, tuple(self.choices["widths"]))

    def pairs(self, rows: Any) -> dict[str, np.ndarray]:
        return {"image": self.task.source.image[rows], "target": self.targets["source"][rows]}


def compare(
    dataset: kdata.Dataset,
    *,
    out: str | os.PathLike[str],
    source_classes: Sequence[int] | None = None,
    target_classes: Sequence[int] | None = None,
    target: str | os.PathLike[str] | None = None,
    target_model: str | None = None,
    target_epochs: int | None = None,
    pairs: int | None = None,
    start: str = "kmeans",
    widths: Sequence[int] | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    pool_size: int | None = None,
    max_age: int = 1000,
    solver: str = "auto",
    pretrain_epochs: int = 1000,
    fine_tune_steps: int = 200,
    draws: int = 20,
    seeds: int | Sequence[int] = 1,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """Condenses a source into learned pairs and compares what pre-training on them is worth.

    A target network is trained on the source images without labels (Barlow Twins) and its features
    are the targets. KRR-ST learns pairs for them; the same network is then pre-trained identically
    on the learned pairs, on as many real images chosen by k-means, herding and chance, on noise and
    on all of the source, and judged on held-out images and on classes with a few labels. What is
    None suits the data: up to 16 pixels or in grey the settings of the digits, else the published
    ones (in brackets). All images lie in memory.

    Args:
      dataset: with splits train and test, images in [0, 1]. A validation split is trained on.
      out: folder for checkpoints, pairs and figures.
      source_classes: whose training images are condensed; None is the first half of the classes.
        Their labels are not used.
      target_classes: of the task afterwards; None is all others, or the source's where those are
        all.
      target: folder of a target network that is there already: of this function (its ``out``), or
        of a network that was trained on labels; None trains one.
      target_model: network to train for that, a name in `kdjax.models.BY_NAME`; None is a small
        ConvNet ["resnet18"].
      target_epochs: of its training; None is 60 [2000].
      pairs: m, how many to learn; None is 30 [1000].
      start: what they start from: "kmeans", "random" or "herding".
      widths: of the ConvNet that is pre-trained and that the pool consists of; None is 32-64 for 8
        pixels [128-256-512 for 32 pixels, 64-128-256-512 for 64].
      steps: updates of the pairs; None is 1500 [160,000].
      learning_rate: of the pairs; None is 3e-3 [1e-4].
      batch_size: real images of an update; None is 256 [1024].
      pool_size: networks in the pool; None is 5 [10].
      max_age: updates after which one of them starts anew.
      solver: of the regression, as in `kdjax.methods.krr_st.krr_st`; resuming may change it.
      pretrain_epochs: passes over the pairs; sets of other sizes get as many updates.
      fine_tune_steps: updates of fine-tuning on 5 labels per class.
      draws: of the labelled images for the few-shot probes; fine-tuning takes up to three of them.
      seeds: how many seeds (0, 1, ...), or which: of the start, the condensing and the
        pre-training. The target network is the same for all.
      resume: go on where the same call in ``out`` stopped.
      about: JSON-able facts to keep, such as where the data came from.
      progress: whether to show bars on a terminal.

    Returns:
      The `Report`. In ``out`` are pairs.npz (first seed; each seed's in seed-N), manifest.json,
      which says how to load it, and condense.json, the report.

    Raises:
      ValueError: an argument is out of range, ``out`` exists and ``resume`` is False, or it belongs
        to other settings.
      FloatingPointError: a training diverged, or the regression lost its positive definiteness.
      KeyboardInterrupt: after Ctrl-C; the same call with ``resume`` continues.

    Reference:
      Lee et al., "Self-Supervised Dataset Distillation for Transfer Learning", ICLR 2024.
    """
    given = {
        "source_classes": source_classes,
        "target_classes": target_classes,
        "target": None if target is None else str(Path(target).expanduser().absolute()),
        "target_model": target_model,
        "target_epochs": target_epochs,
        "pairs": pairs,
        "start": start,
        "widths": widths,
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "pool_size": pool_size,
        "max_age": max_age,
        "pretrain_epochs": pretrain_epochs,
        "fine_tune_steps": fine_tune_steps,
        "draws": draws,
        "seeds": list(range(seeds)) if isinstance(seeds, int) else list(seeds),
    }
    choices = tasks.filled(dataset, given)
    tasks.check({**choices, "solver": solver}, dataset, seeds)
    tasks.check_student(choices, dataset.shape)
    task = tasks.load(dataset, choices)
    known = None if target is None else tasks.given_target(target, dataset)
    if known is None:
        tasks.check_target(choices, dataset.shape)
    choices["data"] = {name: dataset.describe(name) for name in dataset.splits}
    folder = Path(out).expanduser().absolute()
    ledger = Ledger(folder, choices, resume=resume, about=about)
    if (folder / REPORT).is_file():
        return reports.from_json(runs.read_json(folder / REPORT), folder)
    choices = {**choices, "solver": solver}
    cost = _costs(choices, task)
    of_seed = sum(cost.values()) - cost["target"]
    bar = Progress(cost["target"] + len(choices["seeds"]) * of_seed, show=progress)
    try:
        report = _run(dataset, choices, task, known, ledger, bar, cost)
    finally:
        bar.close()
        ledger.note()
    runs.write_json(folder / MANIFEST, reports.manifest(report, task))
    runs.write_json(folder / REPORT, reports.to_json(report))
    return report


def _run(
    dataset: kdata.Dataset,
    choices: Mapping[str, Any],
    task: tasks.Task,
    known: tasks.Target | None,
    ledger: Ledger,
    bar: Progress,
    cost: Mapping[str, float],
) -> Report:
    assert ledger.folder is not None
    target = known
    if target is None:
        bar.begin("target network", cost["target"])
        whole = choices["target_epochs"] * (len(task.source.image) // tasks.target_batch(task))

        def at(step: int, record: dict[str, Any]) -> None:
            bar.at(cost["target"] * step / whole, _loss(record))

        target = tasks.trained_target(task, choices, ledger.folder / "target", at)
        bar.end()
    targets = {
        name: target.features(task.pixels(getattr(task, name).image))
        for name in ("source", "source_test", "target_test")
    }
    plan = _Plan(choices, task, target, targets, ledger.folder)
    scores: dict[str, list[dict[str, Any]]] = {name: [] for name in SETS}
    for seed in choices["seeds"]:
        for name, score in _seed(plan, seed, bar, cost).items():
            scores[name].append(score)
    first = ledger.folder / f"seed-{choices['seeds'][0]}"
    curve = _curve(first, "eval/r2_source")
    begun = scores[tasks.STARTS[choices["start"]]][0]["figures"]["r2_source"]
    spread = float(((targets["source"] - targets["source"].mean(0)) ** 2).mean())
    return Report(
        dataset=dataset.name,
        images={name: len(getattr(task, name).image) for name in tasks.Task._fields[:4]},
        target=target.words,
        features=targets["source"].shape[1],
        seeds=choices["seeds"],
        rows=[reports.over_seeds(name, found) for name, found in scores.items()],
        losses=[
            [
                (step, 1 - loss / spread)
                for step, loss in _curve(ledger.folder / f"seed-{seed}", "loss")
            ]
            for seed in choices["seeds"]
        ],
        curve=[(0, begun), *curve],
        condensing=measures.estimate(
            runs.read_json(ledger.folder / f"seed-{seed}" / "condensing.json")["seconds"]
            for seed in choices["seeds"]
        ),
        device=jax.devices()[0].device_kind,
        seconds=ledger.seconds(),
        settings=choices,
        folder=str(ledger.folder),
    )


def _seed(
    plan: _Plan, seed: int, bar: Progress, cost: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Start, condensing and all rows of one seed; what has ended is only read."""
    folder = plan.folder / f"seed-{seed}"
    key = jax.random.key(seed)
    pairs = _learned(plan, seed, folder, bar, cost["condensing"])
    if seed == plan.choices["seeds"][0]:
        _save(plan.folder / PAIRS, pairs | {"mean": plan.task.mean, "std": plan.task.std})
    found = {}
    for name in SETS:
        file = folder / "rows" / f"{name.replace(' ', '-').lower()}.json"
        what = "no pre-training" if name == NOTHING else f"pre-training on {name}"
        bar.begin(f"seed {seed}: {what}", cost[name])
        if not file.is_file():
            given = pairs if name == LEARNED else _chosen(plan, name, key)
            runs.write_json(file, _scored(plan, name, given, key))
        found[name] = runs.read_json(file)
        value = found[name]["figures"].get("r2_source")
        bar.end("" if value is None else f"R2 {value:.3f}")
    return found


def _learned(
    plan: _Plan, seed: int, folder: Path, bar: Progress, cost: float
) -> dict[str, np.ndarray]:
    """The learned pairs of a seed, condensed from where the last call stopped."""
    from kdjax.experiments import condense  # which has the names of this module

    bar.begin(f"seed {seed}: condensing", cost)
    if not (folder / PAIRS).is_file():
        choices, key = plan.choices, jax.random.key(seed)
        start = _chosen(plan, tasks.STARTS[choices["start"]], key)
        _save(folder / START, start)
        network, steps = plan.network(), choices["steps"]

        def worth(pairs: dict[str, np.ndarray]) -> dict[str, float]:
            found = condense.pretrain(network, pairs, **_pretraining(plan, pairs, key))
            value = outputs(network, found, plan.task.source_test.image)
            return {"r2_source": r2(value, plan.targets["source_test"])}

        def at(step: int, record: dict[str, Any]) -> None:
            bar.at(cost * step / steps, _loss(record))

        clock, spent = folder / "condensing.json", 0.0
        if clock.is_file():
            spent = float(runs.read_json(clock)["seconds"])
        began = time.perf_counter()
        try:
            pairs = condense.condense(
                network, plan.task.source.image, plan.targets["source"], start,
                key=jax.random.fold_in(key, 1), steps=steps,
                learning_rate=choices["learning_rate"], batch_size=choices["batch_size"],
                pool_size=choices["pool_size"], max_age=choices["max_age"],
                solver=choices["solver"], checkpoint=folder / "condensing",
                save_every=max(1, min(1000, steps // 10)),
                evaluate=worth if seed == choices["seeds"][0] else None,
                eval_every=-(-steps // _EVALUATIONS), progress=False, report=at,
            )  # fmt: skip
        finally:
            runs.write_json(clock, {"seconds": round(spent + time.perf_counter() - began, 3)})
        _save(folder / PAIRS, pairs | {"mean": plan.task.mean, "std": plan.task.std})
    bar.end()
    with np.load(folder / PAIRS) as file:
        return {name: file[name] for name in ("image", "target")}


def _chosen(plan: _Plan, name: str, key: jax.Array) -> dict[str, np.ndarray]:
    """What learned pairs are compared with: real images by a rule, noise, all or nothing."""
    m, size = plan.choices["pairs"], len(plan.task.source.image)
    if name == "noise":
        image = noise(plan.task.source.image, m, key=jax.random.fold_in(key, 2))
        return {"image": image, "target": plan.target.features(plan.task.pixels(image))}
    if name == "random":
        return plan.pairs(random_subset(size, m, key=jax.random.fold_in(key, 3)))
    if name == "k-means":
        return plan.pairs(k_means(plan.targets["source"], m, key=jax.random.fold_in(key, 4)))
    if name == "herding":
        return plan.pairs(herding(plan.targets["source"], m))
    return plan.pairs(slice(None) if name == EVERYTHING else slice(0))


def _pretraining(plan: _Plan, pairs: Mapping[str, np.ndarray], key: jax.Array) -> dict[str, Any]:
    """Arguments of the pre-training: as many updates on every set."""
    updates = plan.choices["pretrain_epochs"] * -(-plan.choices["pairs"] // _BATCH)
    epochs = max(1, -(-updates // -(-len(pairs["image"]) // _BATCH)))
    return {"epochs": epochs, "batch_size": _BATCH, "key": key}


def _scored(
    plan: _Plan, name: str, pairs: Mapping[str, np.ndarray], key: jax.Array
) -> dict[str, Any]:
    """Cost and figures of one set."""
    from kdjax.experiments import condense  # which has the names of this module

    network = plan.network()
    if name == NOTHING:
        variables = network.init(key, plan.task.source.image[:1])
        empty = {"pairs": 0, "bytes": 0, "updates": 0, "seconds": 0.0}
        return {**empty, "figures": _measured(plan, variables, False)}
    options = _pretraining(plan, pairs, key)
    (found,) = condense.costs(
        network, {name: pairs}, lambda variables: _measured(plan, variables, True),
        progress=True, **options,
    )  # fmt: skip
    if not math.isfinite(found.figures["r2_source"]):
        raise FloatingPointError(
            f"pre-training on {name} diverged: the outputs are not finite. Its learning rate is "
            "0.1, which needs targets that are not much larger than 1."
        )
    return {
        "pairs": found.pairs,
        "bytes": found.bytes,
        "updates": found.steps,
        "seconds": round(found.seconds, 3),
        "figures": found.figures,
    }


def _measured(plan: _Plan, variables: Any, trained: bool) -> dict[str, float]:
    task, network, choices = plan.task, plan.network(), plan.choices
    figures = {}
    for side in ("source", "target") if trained else ():
        found = outputs(network, variables, getattr(task, f"{side}_test").image)
        if not np.isfinite(found).all():
            return {"r2_source": math.nan}
        figures[f"r2_{side}"] = r2(found, plan.targets[f"{side}_test"])
    rows, draws = tasks.draws(task, choices["draws"])
    image, label = task.target_train.image[rows], task.target_train.label[rows]
    test, known = task.target_test
    features = outputs(network, variables, image, output="features")
    test_features = outputs(network, variables, test, output="features")
    for shots, chosen in draws.items():
        figures[f"shot_{shots}"] = few_shot(features, label, chosen, test_features, known)
    classes = np.unique(task.target_train.label)
    classifier = tasks.student(len(classes), tuple(choices["widths"]))
    answers = []
    for i, few in enumerate(draws[max(draws)][:_FINE_TUNED]):
        data = {"image": image[few], "label": np.searchsorted(classes, label[few])}
        tuned = fine_tune(
            classifier, variables, data, steps=choices["fine_tune_steps"], key=jax.random.key(i)
        )
        answers.append(classes[outputs(classifier, tuned, test).argmax(-1)] == known)
    return {**figures, "fine_tune": float(np.mean(answers))}


def _costs(choices: Mapping[str, Any], task: tasks.Task) -> dict[str, float]:
    """What each stage of one seed costs, very roughly; a tenth of a millisecond on digits."""
    m, n = choices["pairs"], len(task.source.image)
    updates = choices["pretrain_epochs"] * -(-m // _BATCH)
    rows = {name: updates * (10 + 0.4 * min(m, _BATCH)) for name in SETS}
    rows[EVERYTHING] = updates * (10 + 0.4 * min(n, _BATCH))
    rows[NOTHING] = 0.0
    measuring = 30.0 * choices["fine_tune_steps"] + 100 * choices["draws"]
    each = choices["steps"] * (20 + min(choices["batch_size"], n) / 3 + 2 * m)
    each += choices["pool_size"] * choices["max_age"] / 2 * (15 + m / 4)
    condensing = each + rows[LEARNED] * _EVALUATIONS / len(choices["seeds"])
    whole = {"condensing": condensing} | {k: v + measuring for k, v in rows.items()}
    target = 0.0
    if choices["target_epochs"] is not None:
        target = 8.0 * choices["target_epochs"] * n
    return {"target": target} | whole


def _loss(record: Mapping[str, Any]) -> str:
    return "" if record.get("loss") is None else f"loss {float(record['loss']):.4g}"


def _save(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}")
    with open(partial, "wb") as opened:
        np.savez(opened, **dict(arrays))  # type: ignore[arg-type]
    os.replace(partial, file)


def _curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """A logged figure of the condensing over its updates."""
    found = _log.read(folder / "condensing" / "metrics.jsonl")
    return [(record["step"], record[name]) for record in found if record.get(name) is not None]
