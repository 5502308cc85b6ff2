"""What the recipe benchmarks share: steps of an epoch, one training in its folder, the table."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _compare import machine

import kdjax as kd
from kdjax.experiments.measures import estimate

RESULT, RECIPE = "result.json", "recipe.json"
# Updates in one dispatch: enough to hide the host, few enough that their batches stay small.
MOST_PER_CALL = 100


class Steps(NamedTuple):
    """How an epoch is cut into updates.

    Attributes:
      per_epoch: updates.
      last: "keep" where the epoch ends with a smaller batch, as the published loaders do, "drop"
        where the devices can't split it.
      devices: how many share a batch.
      per_call: updates in one dispatch.
    """

    per_epoch: int
    last: str
    devices: int
    per_call: int


class Run(NamedTuple):
    """One training.

    Attributes:
      folder: of this run alone.
      learner: what is trained.
      model: its student, to be evaluated.
      data: training batches with ``from_step``.
      test: re-iterable batches of the test split.
      frozen: the teacher's variables, or None.
      epochs: passes over the training split.
      steps: of an epoch.
      seed: of parameters and augmentation; the order of the data is in ``data``.
      save_every: epochs between checkpoints.
      recipe: everything that decides the result; a folder with another one is refused.
    """

    folder: Path
    learner: kd.Learner
    model: kd.Model
    data: Any
    test: Any
    frozen: Any
    epochs: int
    steps: Steps
    seed: int
    save_every: int
    recipe: Mapping[str, Any]


class Outcome(NamedTuple):
    """What a training gave.

    Attributes:
      variables: the student's ``(params, extra)`` after the last epoch.
      accuracy: top-1 on the test split after each epoch.
      top5: the same, top-5.
      epoch_seconds: median time of an epoch without evaluation; NaN where none ran undisturbed.
    """

    variables: Any
    accuracy: list[float]
    top5: list[float]
    epoch_seconds: float


class Published(NamedTuple):
    """A published top-1 accuracy in per cent, and where it stands."""

    value: float
    source: str


def parser(description: str | None, *, out: Path) -> argparse.ArgumentParser:
    """A parser with the options of both recipes."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--data-dir", help="folder of prepared TFDS data (default: that of TFDS)")
    add("--teacher", type=Path, help="folder of the trained teacher, trained there if it is empty")
    add("--seeds", nargs="+", type=int, default=[0], help="one student for each (default: 0)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of forward passes")
    add("--devices", type=int, help="at most so many (default: all)")
    add("--feature-weight", type=float, default=2.0, help="of the feature loss (default: 2)")
    add("--save-every", type=int, help="epochs between checkpoints")
    add("--out", type=Path, default=out, help=f"folder to keep and resume in (default: {out})")
    add("--quick", action="store_true", help="tiny, only to see that it runs")
    return found


def cut(
    size: int, batch_size: int, *, devices: int | None = None, per_call: int | None = None
) -> Steps:
    """Cuts an epoch into updates for the devices there are.

    Args:
      size: rows of the training split.
      batch_size: rows of an update.
      devices: at most so many; all by default.
      per_call: updates in one dispatch; by default the most, up to 100, that divide the epoch,
        and one on CPU, where scanned convolutions are slow.
    """
    full, rest = divmod(size, batch_size)
    if full < 1:
        raise ValueError(f"batch_size must be at most {size}, the training rows, got {batch_size}.")
    there = len(jax.devices())
    most = there if devices is None else min(devices, there)
    count = max(n for n in range(1, most + 1) if batch_size % n == 0)
    keep = rest > 0 and rest % count == 0 and jax.process_count() == 1
    if per_call is None:
        divisors = [n for n in range(1, MOST_PER_CALL + 1) if full % n == 0]
        per_call = 1 if jax.default_backend() == "cpu" else max(divisors)
    if keep and full % per_call:
        raise ValueError(
            f"--steps-per-call must divide the {full} full batches of an epoch, which a smaller "
            f"one follows, got {per_call}."
        )
    return Steps(full + keep, "keep" if keep else "drop", count, per_call)


def trained(run: Run) -> Outcome:
    """Trains, or goes on, or reads what has been trained.

    The folder gets what `kdjax.train.fit` writes, ``recipe.json`` at the start and ``result.json``
    at the end.

    Raises:
      ValueError: the folder holds a run of another recipe.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    _check_recipe(run)
    if (run.folder / RESULT).is_file():
        return _outcome(run.folder, kd.train.load_student(run.folder))
    mesh = kd.parallel.data_mesh(run.steps.devices) if run.steps.devices > 1 else None
    batch = next(iter(run.data.from_step(0)))
    state = jax.jit(run.learner.init)(jax.random.key(run.seed), batch, run.frozen)
    evaluate = kd.train.evaluator(run.model, run.test, metrics=METRICS, mesh=mesh)
    state = kd.train.fit(
        run.learner,
        state,
        run.data,
        frozen=run.frozen,
        steps=run.epochs * run.steps.per_epoch,
        mesh=mesh,
        checkpoint=run.folder,
        save_every=run.save_every * run.steps.per_epoch,
        keep=1,
        evaluate=_timed(evaluate),
        eval_every=run.steps.per_epoch,
        log_every=max(1, run.steps.per_epoch // 10),
        steps_per_call=run.steps.per_call,
    )
    outcome = _outcome(
        run.folder, jax.device_get((state.params["student"], state.extra["student"]))
    )
    _write(
        run.folder / RESULT,
        {
            **run.recipe,
            "accuracy": outcome.accuracy,
            "top5": outcome.top5,
            "epoch_seconds": None if math.isnan(outcome.epoch_seconds) else outcome.epoch_seconds,
            "machine": machine(),
            "devices": run.steps.devices,
            "steps_per_call": run.steps.per_call,
        },
    )
    return outcome


def _check_recipe(run: Run) -> None:
    wanted = json.loads(json.dumps(run.recipe))
    file = run.folder / RECIPE
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if found is None:
        _write(file, wanted)
        return
    other = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
    if other:
        raise ValueError(
            f"{run.folder} holds a run with {other[0]} = {found.get(other[0])!r}, wanted is "
            f"{wanted.get(other[0])!r}: pass another folder, or the options it was made with."
        )


def _timed(
    evaluate: Callable[[kd.State], Mapping[str, float]],
) -> Callable[[kd.State], dict[str, float]]:
    """Adds the time since the last evaluation; the first one has none, as compilation is in it."""
    ended = math.nan

    def of(state: kd.State) -> dict[str, float]:
        nonlocal ended
        jax.block_until_ready(state.params)
        seconds = time.perf_counter() - ended
        found = evaluate(state)
        ended = time.perf_counter()
        return {**found, "epoch_seconds": seconds}

    return of


def _outcome(folder: Path, variables: Any) -> Outcome:
    """Reads the curves from the log, which holds those of earlier, interrupted calls too."""
    records = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line that a kill has cut
            records.append(json.loads(line))
    ends = [record for record in records if "eval/accuracy" in record]
    seconds = [r["eval/epoch_seconds"] for r in ends if r.get("eval/epoch_seconds") is not None]
    return Outcome(
        variables,
        [record["eval/accuracy"] for record in ends],
        [record["eval/top5"] for record in ends],
        statistics.median(seconds) if seconds else math.nan,
    )


def _write(file: Path, content: Mapping[str, Any]) -> None:
    if not kd.parallel.is_main():
        return
    partial = file.with_suffix(".tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def top_k(outputs: Mapping[str, Any], batch: Mapping[str, Any], k: int) -> Any:
    """Whether the label is among the k largest logits; a row with a NaN is wrong."""
    logits = jnp.asarray(outputs["logits"], jnp.float32)
    label = jnp.asarray(batch["label"])
    picked = jnp.take_along_axis(logits, jnp.maximum(label, 0)[:, None], axis=-1)
    # Of equal logits the first counts as the largest, as argmax has it.
    ahead = jnp.arange(logits.shape[-1])[None] < label[:, None]
    rank = ((logits > picked) | ((logits == picked) & ahead)).sum(-1)
    right = (rank < k) & ~jnp.isnan(logits).any(-1)
    return right.astype(jnp.float32), (label >= 0).astype(jnp.float32)


def _top_1(outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
    return top_k(outputs, batch, 1)


def _top_5(outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
    return top_k(outputs, batch, 5)


METRICS = {"accuracy": _top_1, "top5": _top_5}
COLUMNS = (
    "network", "method", "last epoch", "top-5", "best epoch", "published", "difference", "source",
    "seeds", "time per epoch",
)  # fmt: skip


def head() -> str:
    """The first two lines of the table."""
    return "| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS)


def rows(
    network: str, method: str, found: Sequence[Outcome], published: Sequence[Published]
) -> str:
    """Lines of the table: one for each published value, ours minus theirs from the last epoch."""
    last = [100 * one.accuracy[-1] for one in found]
    seconds = [one.epoch_seconds for one in found if not math.isnan(one.epoch_seconds)]
    ours = (
        network,
        method,
        _shown(last),
        _shown([100 * one.top5[-1] for one in found]),
        _shown([100 * max(one.accuracy) for one in found]),
    )
    rest = (str(len(found)), f"{np.median(seconds):.3g} s" if seconds else "-")
    lines = [
        (*ours, f"{one.value:.2f}", f"{np.mean(last) - one.value:+.2f}", one.source, *rest)
        for one in published
    ] or [(*ours, "-", "-", "-", *rest)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(values: Sequence[float]) -> str:
    """Mean and standard error."""
    found = estimate(values)
    return f"{found.mean:.2f}" + ("" if math.isnan(found.error) else f" ± {found.error:.2f}")
