"""One adversarial training: the best epoch of the student, and of its average, is kept."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import data as kdata
from kdjax import train
from kdjax._pairs import Learner, State, Tree
from kdjax.experiments import _robust_attack as attack
from kdjax.experiments import _robust_plan as plans
from kdjax.experiments import runs
from kdjax.experiments._robust_plan import AVERAGED, WEIGHTS
from kdjax.experiments._robust_progress import Progress
from kdjax.methods import adr
from kdjax.train._checkpoint import Checkpoints

SELECTED = "robust_accuracy"
_STEPS = 10
_BATCH = 256
_SAVE_EVERY = 500
_METRICS = "metrics.jsonl"


class Job(NamedTuple):
    """One method from one seed.

    Attributes:
      method: a name in `kdjax.experiments._robust_plan.METHODS`.
      seed: the seed.
      learner: one object for all seeds, so that they share a compiled program.
      init: the same for all methods, which start from the same parameters.
      folder: of the run.
    """

    method: str
    seed: int
    learner: Learner
    init: Callable[..., State]
    folder: Path


class Outcome(NamedTuple):
    """What a training left.

    Attributes:
      job: the training.
      curves: weights -> (epoch, clean accuracy, robust accuracy) on the validation split.
      seconds: of training, over all interruptions.
    """

    job: Job
    curves: dict[str, list[tuple[float, float, float]]]
    seconds: float

    def folder(self, weights: str) -> Path:
        """The run folder that `kdjax.train.load_student` finds the weights in."""
        return self.job.folder if weights == "student" else self.job.folder / weights

    def load(self, weights: str, when: str) -> tuple[Tree, Tree]:
        """The weights of the best or the last epoch."""
        step = "best" if when == "best" else None
        return train.load_student(self.folder(weights), step=step)

    def best_epoch(self, weights: str) -> float:
        """The first epoch with the highest robust accuracy on the validation split."""
        return max(self.curves[weights], key=lambda point: (point[2], -point[0]))[0]


def cost(plan: plans.Plan) -> float:
    """Passes through the network of one training, evaluations included."""
    choices = plan.choices
    steps = choices["epochs"] * plans.steps_per_epoch(plan)
    update = choices["batch_size"] * (choices["attack_steps"] + 2)
    rounds = -(-choices["epochs"] // choices["eval_every"])
    return steps * update + rounds * 2 * plan.dataset.size("validation") * (_STEPS + 1.5)


def run(plan: plans.Plan, job: Job, progress: Progress) -> Outcome:
    """Trains, or reads what has ended.

    Args:
      plan: the experiment.
      job: what to train.
      progress: the bar.

    Returns:
      The outcome.
    """
    per_epoch = plans.steps_per_epoch(plan)
    steps = plan.choices["epochs"] * per_epoch
    batches = plans.training_batches(plan, job.seed)
    manifest = _manifest(plan, job, steps, batches)
    spent = 0.0
    if (job.folder / runs.MANIFEST).is_file():
        spent = float(runs.read(job.folder).get("seconds", 0.0))
    for folder in (job.folder, job.folder / AVERAGED):
        runs.write(folder, {**manifest, "seconds": spent})
    state = _initial(job.init)(jax.random.key(job.seed), batches.at(0), None)
    title = f"{plans.METHODS[job.method]}, seed {job.seed}"
    whole, start, began = cost(plan), time.perf_counter(), False

    def report(step: int, record: dict[str, Any]) -> None:
        nonlocal began
        began = True
        progress.at(whole * step / steps, _noted(record))

    progress.begin(title, whole)
    selection = _Selection(plan, job.folder / AVERAGED, steps)
    try:
        train.fit(
            job.learner,
            state,
            batches,
            steps=steps,
            mesh=plan.mesh,
            checkpoint=job.folder,
            save_every=max(_SAVE_EVERY, per_epoch),
            keep=1,
            best=(SELECTED, "max"),
            evaluate=selection,
            eval_every=plan.choices["eval_every"] * per_epoch,
            progress=False,
            plot=False,
            report=report,
        )
    finally:
        selection.close()
        if began:  # reading a run that has ended is no training
            spent += time.perf_counter() - start
        for folder in (job.folder, job.folder / AVERAGED):
            runs.write(folder, {**manifest, "seconds": round(spent, 3)})
    curves = _curves(job.folder / _METRICS, per_epoch)
    last = curves["student"][-1]
    progress.end(f"validation: clean {100 * last[1]:.1f} %, PGD-{_STEPS} {100 * last[2]:.1f} %")
    return Outcome(job, curves, spent)


class _Selection:
    """Measures student and average on the validation split; keeps the average's best and last.

    The student's are `kdjax.train.fit`'s own checkpoints. The average needs a folder of its own, as
    its best epoch is another.
    """

    def __init__(self, plan: plans.Plan, folder: Path, steps: int) -> None:
        size = min(_BATCH, plan.dataset.size("validation"))
        self._plan, self._steps = plan, steps
        self._batches = plan.dataset.once("validation", plans.even(size, plan.mesh))
        self._kept = Checkpoints(folder, keep=1, best=(SELECTED, "max"))
        choices = plan.choices
        self._attack = attack.Attack(choices["eps"], choices["eps"] / 4, _STEPS, choices["norm"])

    def __call__(self, state: State) -> dict[str, float]:
        """The accuracies of a State, as `kdjax.train.fit` takes them."""
        student = state.params["student"], state.extra["student"]
        average = adr.averaged(state)
        own, other = self._measure(student), self._measure(average)
        self._keep(int(state.step), average, other)
        return {**own, **{f"{AVERAGED}_{name}": value for name, value in other.items()}}

    def close(self) -> None:
        """Waits for the last save."""
        self._kept.close()

    def _measure(self, variables: tuple[Tree, Tree]) -> dict[str, float]:
        plan = self._plan
        found = attack.answers(plan.student, variables, self._batches, self._attack, mesh=plan.mesh)
        right, robust = found.right(), found.robust()
        return {"accuracy": float(right.mean()), SELECTED: float(robust.mean())}

    def _keep(self, step: int, average: tuple[Tree, Tree], found: dict[str, float]) -> None:
        latest, best = self._kept.latest(), self._kept.best()
        if latest is not None and step <= latest:
            return  # a run that was killed after this step comes by again
        if step == self._steps or best is None or found[SELECTED] > best[1]:
            params, extra = ({"student": tree} for tree in average)
            state = State(jnp.int32(step), jax.random.key(0), params, extra, ())
            self._kept.save(step, state, {}, found)


# Kept, so that the seeds that share it compile it once.
@functools.lru_cache(maxsize=16)
def _initial(init: Callable[..., State]) -> Callable[..., State]:
    return jax.jit(init)


def _manifest(plan: plans.Plan, job: Job, steps: int, batches: kdata.Batches) -> dict[str, Any]:
    choices = plan.choices
    return {
        "experiment": "robust",
        "role": job.method,
        "model": choices["model"],
        "num_classes": plan.dataset.num_classes,
        "shape": list(plan.dataset.shape),
        "data": plan.dataset.name,
        "labels": int((batches.dataset.labels("train") >= 0).sum()),
        "seeds": [job.seed],
        "stacked": False,
        "steps": steps,
        "steps_per_epoch": plans.steps_per_epoch(plan),
        "attack": {name: choices[name] for name in ("eps", "norm")},
        **plan.about,
    }


def _noted(record: dict[str, Any]) -> str:
    robust = record.get(f"eval/{SELECTED}")
    return "" if robust is None else f"validation PGD-{_STEPS} {100 * robust:.1f} %"


def _curves(file: Path, per_epoch: int) -> dict[str, list[tuple[float, float, float]]]:
    """The curves of both weights from a metrics file; lines that a kill has cut are left out."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in WEIGHTS}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        for name, prefix in (("student", "eval/"), (AVERAGED, f"eval/{AVERAGED}_")):
            clean, robust = (record.get(prefix + key) for key in ("accuracy", SELECTED))
            if clean is not None and robust is not None:
                found[name].append((record["step"] / per_epoch, clean, robust))
    return found
