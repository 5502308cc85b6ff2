"""Trains one learner from several seeds, each run in its own folder, so that any can resume."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdjax import train
from kdjax._pairs import Batch, Learner, Model, Outputs, State, Tree
from kdjax.data import Batches
from kdjax.experiments import runs
from kdjax.experiments._progress import Progress

_ACCURACY = "accuracy"


class Job(NamedTuple):
    """One learner, to be trained from several seeds.

    Attributes:
      role: "teacher", "alone" or "distilled"; names the folder.
      learner: one object for all seeds, so that they share a compiled program.
      init: the learner's, or that of another with the same State; jobs that share it start from
        the same parameters, and it is compiled once.
      model: what it trains.
      batches: seed -> its batches.
      steps: updates for each seed.
      frozen: the teacher's variables.
      manifest: what the run folder says beside seeds and time.
    """

    role: str
    learner: Learner
    init: Callable[..., State]
    model: Model
    batches: Callable[[int], Batches]
    steps: int
    frozen: Tree
    manifest: Mapping[str, Any]


class Setting(NamedTuple):
    """How jobs are run, whatever they train.

    Attributes:
      validation: re-iterable batches for the curves.
      eval_every: steps between evaluations.
      mesh: devices to split batches over, or None.
      together: one vmapped program for all seeds, rather than one seed after another.
      out: folder of the experiment, or None to keep nothing.
      progress: the bar.
    """

    validation: Any
    eval_every: int
    mesh: Mesh | None
    together: bool
    out: Path | None
    progress: Progress


class Outcome(NamedTuple):
    """What one seed gave.

    Attributes:
      seed: the seed.
      variables: the trained ``(params, extra)``, on the host.
      curve: steps and validation accuracies.
      seconds: of training; for seeds trained together, their equal shares.
      folder: of the run, or None.
    """

    seed: int
    variables: tuple[Tree, Tree]
    curve: list[tuple[int, float]]
    seconds: float
    folder: Path | None


def run(job: Job, seeds: Sequence[int], setting: Setting) -> list[Outcome]:
    """Trains a job from every seed; runs that have ended are only read.

    Args:
      job: what to train.
      seeds: at least one.
      setting: how.

    Returns:
      One outcome for each seed.
    """
    if len(seeds) > 1 and setting.together:
        return _together(job, seeds, setting)
    return [_one(job, seed, setting) for seed in seeds]


def _one(job: Job, seed: int, setting: Setting) -> Outcome:
    single = job.role == "teacher"
    folder = None
    if setting.out is not None:
        folder = setting.out / job.role if single else setting.out / job.role / f"seed-{seed}"
    data = job.batches(seed)
    state = _initial(job.init)(jax.random.key(seed), data.at(0), None)
    title = job.role if single else f"{job.role}, seed {seed}"
    state, curves, seconds = _fit(
        job,
        job.learner,
        state,
        data,
        train.evaluator(job.model, setting.validation, metrics=_METRICS, mesh=setting.mesh),
        folder=folder,
        title=title,
        setting=setting,
        about={"seeds": [seed], "stacked": False},
    )
    variables = jax.device_get((state.params["student"], state.extra["student"]))
    return Outcome(seed, variables, curves.get(_ACCURACY, []), seconds, folder)


# Kept, so that the seeds and jobs that share it compile it once.
@functools.lru_cache(maxsize=16)
def _initial(init: Callable[..., State]) -> Callable[..., State]:
    return jax.jit(init)


def _right(outputs: Outputs, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """For each example whether the answer is right, and whether it has a label."""
    label = jnp.asarray(batch["label"])
    right = outputs["logits"].argmax(-1) == label
    return right.astype(jnp.float32), (label >= 0).astype(jnp.float32)


_METRICS = {_ACCURACY: _right}


def _together(job: Job, seeds: Sequence[int], setting: Setting) -> list[Outcome]:
    """All seeds in one vmapped program and one checkpoint."""
    data = Stacked([job.batches(seed) for seed in seeds])
    keys = jax.vmap(jax.random.key)(np.asarray(seeds))
    init = jax.vmap(job.init, in_axes=(0, None, None))
    state = jax.jit(init)(keys, job.batches(seeds[0]).at(0), None)
    # Axis 0 of a batch stays that of the examples, which is split over devices.
    learner = Learner(init, jax.vmap(job.learner.update, in_axes=(0, 1, None)))

    def member(tree: Tree, i: int) -> Tree:
        return jax.tree.map(lambda x: x[i], tree)

    def evaluate(state: State) -> dict[str, float]:
        student = state.params["student"], state.extra["student"]
        return {
            f"{_ACCURACY}/seed-{seed}": train.evaluate(
                job.model,
                member(student, i),
                setting.validation,
                metrics=_METRICS,
                mesh=setting.mesh,
            )[_ACCURACY]
            for i, seed in enumerate(seeds)
        }

    folder = None
    if setting.out is not None:
        folder = setting.out / job.role / f"seeds-{'-'.join(map(str, seeds))}"
    state, curves, seconds = _fit(
        job,
        learner,
        state,
        data,
        evaluate,
        folder=folder,
        title=f"{job.role}, {len(seeds)} seeds together",
        setting=setting,
        about={"seeds": list(seeds), "stacked": True},
    )
    students = jax.device_get((state.params["student"], state.extra["student"]))
    return [
        Outcome(
            seed,
            member(students, i),
            curves.get(f"{_ACCURACY}/seed-{seed}", []),
            seconds / len(seeds),
            folder,
        )
        for i, seed in enumerate(seeds)
    ]


def _fit(
    job: Job,
    learner: Learner,
    state: State,
    data: Any,
    evaluate: Callable[[State], Mapping[str, float]],
    *,
    folder: Path | None,
    title: str,
    setting: Setting,
    about: Mapping[str, Any],
) -> tuple[State, dict[str, list[tuple[int, float]]], float]:
    """One call of `kdjax.train.fit`, its curves, and its time over all interruptions."""
    spent, manifest = 0.0, {**job.manifest, **about, "role": job.role, "steps": job.steps}
    if folder is not None:
        if (folder / runs.MANIFEST).is_file():
            spent = float(runs.read(folder).get("seconds", 0.0))
        runs.write(folder, {**manifest, "seconds": spent})
    records: list[dict[str, Any]] = []
    start, began = time.perf_counter(), False

    def report(step: int, record: dict[str, Any]) -> None:
        nonlocal began
        began = True
        records.append({"step": step, **record})
        setting.progress.at(step, record)

    setting.progress.begin(title, job.steps)
    try:
        state = train.fit(
            learner,
            state,
            data,
            frozen=job.frozen,
            steps=job.steps,
            mesh=setting.mesh,
            checkpoint=folder,
            save_every=500,
            keep=1,
            evaluate=evaluate,
            eval_every=setting.eval_every,
            progress=False,
            plot=False,
            report=report,
        )
        jax.block_until_ready(state)
    finally:
        if began:  # reading a run that has ended is no training
            spent += time.perf_counter() - start
        if folder is not None:
            runs.write(folder, {**manifest, "seconds": round(spent, 3)})
    if folder is not None:
        records = _read_lines(folder / "metrics.jsonl")
    setting.progress.end(job.steps)
    return state, _curves(records), spent


def _curves(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith("eval/") and value is not None:
                point = (record["step"], value)
                curves.setdefault(name.removeprefix("eval/"), []).append(point)
    return curves


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that a kill has cut is left out."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


class Stacked:
    """The batches of several seeds as one batch ``[B, seeds, ...]``.

    Args:
      members: infinite batches of equal shapes.
    """

    def __init__(self, members: Sequence[Batches]) -> None:
        self._members = members

    def from_step(self, step: int) -> Iterator[Batch]:
        """Batches from a step on."""
        for batches in zip(*(member.from_step(step) for member in self._members), strict=True):
            yield {name: np.stack([b[name] for b in batches], axis=1) for name in batches[0]}

    def describe(self) -> dict[str, Any]:
        """What decides the batches."""
        found = [member.describe() for member in self._members]
        return {**found[0], "seed": [one["seed"] for one in found]}
