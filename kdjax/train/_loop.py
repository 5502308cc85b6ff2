"""The training loop."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdjax import _checks, parallel
from kdjax._pairs import Learner, State, Tree
from kdjax.train import _feed, _resume, _signals
from kdjax.train._checkpoint import Checkpoints
from kdjax.train._run import Plan, Run

_HIGHER = ("acc", "agreement", "auc", "f1", "precision", "recall", "top", "robust")
_LOWER = ("loss", "error", "nll", "likelihood", "brier", "ece", "calibration", "perplexity", "mse")


def fit(
    learner: Learner,
    state: State,
    data: Any,
    *,
    frozen: Tree = None,
    steps: int,
    mesh: Mesh | None = None,
    fsdp: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 1000,
    keep: int = 3,
    best: str | tuple[str, str] | None = None,
    evaluate: Callable[[State], Mapping[str, float]] | None = None,
    eval_every: int | None = None,
    log_every: int = 20,
    steps_per_call: int = 1,
    prefetch: int = 2,
    progress: bool = True,
    plot: bool = True,
    report: Callable[[int, dict[str, Any]], None] | None = None,
) -> State:
    """Trains to a step; the same call again resumes, to the bit, where the last one stopped.

    A run is known by its model, optimizer, starting key and data, not by its hyperparameters and
    teachers: give every experiment a folder of its own.

    With ``checkpoint``, the folder gets checkpoints (the State, by orbax, in the background),
    ``metrics.jsonl`` (one object for each logged step; NaN is null) and ``curves.png`` (where
    matplotlib is installed). A run that was killed at any moment continues from its newest
    checkpoint; one that has ended returns its State at once. On GPU, the same bits need
    ``XLA_FLAGS=--xla_gpu_deterministic_ops=true``.

    A folder has one run at a time. Ctrl-C and SIGTERM finish the step, save, and raise
    KeyboardInterrupt; in one process also while the data keeps the loop waiting. A second Ctrl-C
    stops at once. A loss or parameters that aren't finite are never saved. With several processes
    all must make the same call; they decide together to stop, and process 0 writes the logs.

    Args:
      learner: from `kdjax.minimize`, or any `Learner`.
      state: from ``learner.init``; it stays yours, the loop trains a copy.
      data: batches as dicts of arrays: `kdjax.data` batches (anything with ``from_step(step)``), a
        function from the step to an iterator, or an iterable, whose first ``step`` batches are
        read and dropped on resuming (pass an iterator from its start). The batch of a step must
        depend on the step only.
      frozen: the teachers' variables; never donated, never in a checkpoint.
      steps: the step to reach, at least 1, counted from the run's first.
      mesh: from `kdjax.parallel.data_mesh`, to split each batch over devices.
      fsdp: with a mesh, also split parameters and optimizer state.
      checkpoint: a folder for this run alone; relative paths work. None writes nothing.
      save_every: steps between checkpoints; the last step is always saved.
      keep: how many of the latest checkpoints stay, at least 1.
      best: a metric of ``evaluate``, or ``(metric, "max" or "min")``: its best checkpoint stays as
        well, and an evaluation that beats it is saved at once.
      evaluate: ``State -> dict of numbers``, such as `evaluator` makes; logged as ``eval/<name>``.
        It must not keep the State, whose buffers are reused.
      eval_every: steps between evaluations, by default ``save_every``; always at the last step.
      log_every: steps between logged ones. The loss of every step is checked.
      steps_per_call: updates that run in one dispatch (``jax.lax.scan``): for accelerators with
        short steps. Between evaluations and checkpoints a remainder runs in single steps.
      prefetch: batches held ready on the device, at least 1.
      progress: whether process 0 shows a bar (on a terminal or in a notebook).
      plot: whether to draw ``curves.png``, now and then at evaluations and at the end.
      report: called on process 0 with ``(step, record)`` for every logged line.

    Returns:
      The State at ``steps``.

    Raises:
      ValueError: an argument out of range; data that ended early (its State is saved first); a
        checkpoint of another model, key or data, or a damaged one (nothing is overwritten); a
        folder that can't be written or that another run is writing to.
      FloatingPointError: a loss or a parameter became NaN or infinite; it names step and term.
      KeyboardInterrupt: after Ctrl-C or SIGTERM.

    Example:
      >>> import jax, jax.numpy as jnp, optax, kdjax as kd
      >>> linear = kd.from_fn(
      ...     lambda key, x: jax.random.normal(key, (x.shape[-1], 3)),
      ...     lambda params, x: x @ params,
      ...     inputs="x",
      ... )
      >>> method = kd.distill(linear, None, {"hard": (1.0, kd.terms.hard_labels())})
      >>> learner = kd.minimize(method, optax.sgd(0.1))
      >>> batch = {"x": jnp.ones((4, 2)), "label": jnp.arange(4) % 3}
      >>> state = learner.init(jax.random.key(0), batch)
      >>> state = kd.train.fit(learner, state, [batch] * 5, steps=5, progress=False)
      >>> int(state.step)
      5
    """
    _feed.check(data)
    if not callable(getattr(learner, "update", None)):
        raise TypeError(
            "learner must be a Learner, as kdjax.minimize(method, optimizer) makes, got "
            f"{_checks.describe(learner)}."
        )
    if not isinstance(state, State):
        raise TypeError(f"state must be a kdjax.State from init, got {_checks.describe(state)}.")
    if best is not None and (evaluate is None or checkpoint is None):
        raise ValueError(f"best needs evaluate= and checkpoint=, got best={best!r} without.")
    if jax.process_count() > 1 and mesh is None:
        raise ValueError("mesh must be given with several processes, got None.")
    if fsdp and mesh is None:
        raise ValueError("fsdp needs a mesh=, got None.")
    plan = Plan(
        steps=_checks.count("steps", steps),
        save=_checks.count("save_every", save_every) if checkpoint is not None else None,
        eval=None
        if evaluate is None
        else _checks.count("eval_every", save_every if eval_every is None else eval_every),
        log=_checks.count("log_every", log_every),
        per_call=_checks.count("steps_per_call", steps_per_call),
    )
    _checks.count("keep", keep)
    _checks.count("prefetch", prefetch)
    mode = None if best is None else _mode(best)
    with _signals.watch() as stop, contextlib.ExitStack() as stack:
        checkpoints = None
        if checkpoint is not None:
            checkpoints = Checkpoints(checkpoint, keep=keep, best=mode)
            stack.callback(checkpoints.close)
        begun = _resume.start(
            state, data, steps=plan.steps, checkpoints=checkpoints, mesh=mesh, fsdp=fsdp
        )
        result = begun.state
        if begun.step >= plan.steps and progress and parallel.is_main():
            print(f"{checkpoint or 'state'} is at step {begun.step} already: nothing to train.")
        if begun.step < plan.steps:
            groups = _feed.grouped(
                functools.partial(_feed.from_step, data, begun.step),
                plan.calls(begun.step),
                stacked=plan.per_call > 1,
            )
            run = Run(plan, begun, checkpoints, evaluate, mode, stop, progress, plot, report)
            stack.callback(run.history.close)
            # From here on the run holds the only reference to the State, which it donates.
            del begun, result
            batches = stack.enter_context(_feed.placed(groups, mesh, prefetch))
            update = _compiled(learner, plan.per_call > 1, mesh, fsdp)
            result = run.train(update, batches, frozen=_placed(frozen, mesh))
    if stop.signal is not None:
        raise KeyboardInterrupt(f"{stop.signal} came as the run ended at step {plan.steps}")
    return result


def _compiled(
    learner: Learner, several: bool, mesh: Mesh | None, fsdp: bool
) -> Callable[..., tuple[State, Tree]]:
    """The update, or several in one, as one program."""
    if mesh is None:
        return _on_one_device(learner.update, several)
    if several:
        learner = Learner(learner.init, functools.partial(_scanned, learner.update))
    return parallel.jit_update(learner, mesh, fsdp=fsdp)


@functools.lru_cache(maxsize=16)
def _on_one_device(update: Callable[..., Any], several: bool) -> Callable[..., Any]:
    # Kept, so that runs from several seeds share one program.
    return jax.jit(functools.partial(_scanned, update) if several else update, donate_argnums=0)


def _scanned(
    update: Callable[..., tuple[State, Tree]], state: State, batches: Tree, frozen: Tree = None
) -> tuple[State, Tree]:
    """As many updates as axis 1 of the batches is long."""
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), batches)
    return jax.lax.scan(lambda carry, batch: update(carry, batch, frozen), state, xs)


def _placed(frozen: Tree, mesh: Mesh | None) -> Tree:
    # From the host, a teacher would be transferred again at every step.
    return jax.device_put(frozen) if mesh is None else frozen


def _mode(best: str | tuple[str, str]) -> tuple[str, str]:
    """``(metric, "max" or "min")``, from the metric's name where that is all there is."""
    if not isinstance(best, str):
        if not isinstance(best, tuple) or len(best) != 2 or best[1] not in ("max", "min"):
            raise ValueError(
                'best must be the name of a metric or (name, "max" or "min"), '
                f"got {_checks.describe(best)}."
            )
        return best[0].removeprefix("eval/"), best[1]
    name = best.removeprefix("eval/")
    lower = any(part in name.lower() for part in _LOWER)
    if lower == any(part in name.lower() for part in _HIGHER):
        raise ValueError(
            f'best must say which way is better, as in ("{name}", "max"), got {best!r}.'
        )
    return name, "min" if lower else "max"
