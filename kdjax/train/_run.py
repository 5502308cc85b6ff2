"""One run of the loop: steps, pauses for evaluation and checkpoints, and the ways to end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from kdjax import _checks, parallel
from kdjax import data as kdata
from kdjax._pairs import State, Tree
from kdjax.train import _log, _plot, _resume, _signals, _trees
from kdjax.train._checkpoint import Checkpoints

# Calls that may be under way at once: enough to hide the host's work, few enough that the batches
# they hold don't fill the device.
_AHEAD = 8
# Drawing takes a good part of a second, so between the end and the start it is done seldom.
_SECONDS_BETWEEN_PLOTS = 30.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """At which steps something is due."""

    steps: int
    save: int | None
    eval: int | None
    log: int
    per_call: int

    def due(self, every: int | None, step: int) -> bool:
        return every is not None and (step % every == 0 or step == self.steps)

    def logged(self, step: int) -> bool:
        return self.due(self.log, step) or self.due(self.eval, step)

    def calls(self, step: int) -> Iterator[int]:
        """How many updates each call makes: no call runs past a step where something is due."""
        while step < self.steps:
            ends = [(step // every + 1) * every for every in (self.save, self.eval) if every]
            room = min([self.steps, *ends]) - step
            size = self.per_call if self.per_call <= room else 1
            yield size
            step += size


class Run:
    """One run, from its start to its end or its interruption."""

    def __init__(
        self,
        plan: Plan,
        begun: _resume.Start,
        checkpoints: Checkpoints | None,
        evaluate: Callable[[State], Mapping[str, float]] | None,
        best: tuple[str, str] | None,
        stop: _signals.StopRequest,
        progress: bool,
        plot: bool,
        report: Callable[[int, dict[str, Any]], None] | None,
    ) -> None:
        self.plan, self.state, self.step, self.record = plan, *begun
        self.checkpoints, self.evaluate, self.best, self.stop = checkpoints, evaluate, best, stop
        self._plot, self._drawn = plot, time.monotonic()
        main = parallel.is_main()
        writes = checkpoints is not None and main
        self.metrics = checkpoints.folder / "metrics.jsonl" if checkpoints and writes else None
        self.history = _log.History(
            self.metrics,
            start=self.step,
            logged=plan.logged,
            report=report if main else None,
            # None: tqdm decides, by whether there is a terminal.
            bar=tqdm(
                total=plan.steps,
                initial=self.step,
                unit="step",
                disable=None if progress and main else True,
            ),
        )

    def train(
        self,
        update: Callable[..., tuple[State, Tree]],
        batches: kdata.Prefetch,
        *,
        frozen: Tree,
    ) -> State:
        plan, history, several = self.plan, self.history, self.plan.per_call > 1
        alone, first = jax.process_count() == 1, True
        kind = _trees.summary(self.state)
        # Several processes leave a wait together or not at all.
        for batch in batches.until(lambda: alone and self.stop.signal is not None):
            shape = np.shape(next(iter(batch.values()), ()))
            size = shape[1] if several else 1
            self.state, metrics = update(self.state, batch, frozen)
            before, self.step = self.step, self.step + size
            examples = size * (shape[0] if shape else 1)
            history.add(self.step, size if several else None, examples, metrics)
            if first:
                first = False
                _check_law(kind, self.state)
                history.restart_clock()
            history.throttle(_AHEAD)
            log_point = self.step // plan.log > before // plan.log
            stopping = (
                self.stop.signal is not None
                if alone
                else log_point and parallel.agree(self.stop.signal is not None)
            )
            if log_point:
                self._fetch(newest=_AHEAD)
                history.write()
            if stopping or plan.due(plan.save, self.step) or plan.due(plan.eval, self.step):
                self._pause(stopping)
        if self.step < plan.steps:
            if alone and self.stop.signal is not None:
                self._pause(True)
            self._ended_early()
        self._fetch()
        self._check_params()
        history.write()
        self._draw()
        return self.state

    def _pause(self, stopping: bool) -> None:
        """What happens between two steps: evaluation, a checkpoint, the end."""
        plan, history = self.plan, self.history
        self._fetch()
        history.write(before=self.step)
        results = None
        if self.evaluate is not None and plan.due(plan.eval, self.step) and not stopping:
            results = results_of(self.evaluate(self.state))
            history.note(self.step, results)
        history.write()
        improved = results is not None and self._improves(results)
        if stopping or improved or plan.due(plan.save, self.step):
            self._save(results)
        if stopping:
            self._draw()
            where = "" if self.checkpoints is None else f", saved in {self.checkpoints.folder}"
            name = self.stop.signal or "another process's signal"
            raise KeyboardInterrupt(f"stopped by {name} at step {self.step}{where}")
        if results is not None:
            self._draw(seldom=True)
        history.restart_clock()

    def _fetch(self, *, newest: int = 0) -> None:
        try:
            self.history.fetch(newest=newest)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; {self._last_good()}.") from None

    def _check_params(self) -> None:
        path = _trees.non_finite(self.state.params)
        if path is not None:
            raise FloatingPointError(
                f"the parameters params/{path} are not finite after step {self.step}, although its "
                f"loss was; {self._last_good()}."
            )

    def _last_good(self) -> str:
        if self.checkpoints is None:
            return "training stopped"
        latest = self.checkpoints.latest()
        if latest is None:
            return f"training stopped, and nothing is saved in {self.checkpoints.folder} yet"
        return f"training stopped, and {self.checkpoints.folder} keeps step {latest}, a good one"

    def _improves(self, results: Mapping[str, float]) -> bool:
        if self.best is None or self.checkpoints is None:
            return False
        name, mode = self.best
        value = _checks.entry("the results of evaluate", results, name, "best= names one of them.")
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            value = float(multihost_utils.broadcast_one_to_all(np.float64(value)))
        held = self.checkpoints.best()
        if not math.isfinite(value):
            return False
        return held is None or (value > held[1] if mode == "max" else value < held[1])

    def _save(self, results: Mapping[str, float] | None) -> None:
        if self.checkpoints is None or self.checkpoints.latest() == self.step:
            return
        self._check_params()
        metrics = {name: v for name, v in (results or {}).items() if math.isfinite(v)}
        self.checkpoints.save(self.step, self.state, self.record, metrics)

    def _ended_early(self) -> None:
        self._fetch()
        self.history.write()
        self._save(None)
        raise ValueError(
            f"data must last until step {self.plan.steps}, but it ended at step {self.step}; pass "
            "itertools.cycle(batches), or kdjax.data batches without epochs=."
        )

    def _draw(self, *, seldom: bool = False) -> None:
        if self.metrics is None or not self._plot:
            return
        if not seldom or time.monotonic() - self._drawn > _SECONDS_BETWEEN_PLOTS:
            _plot.draw(self.metrics, self.metrics.with_name("curves.png"))
            self._drawn = time.monotonic()


def _check_law(kind: dict[str, str], state: State) -> None:
    difference = _trees.first_difference(kind, _trees.summary(state))
    if difference is not None:
        raise ValueError(
            "learner.update must return a State of the same tree, shapes and dtypes as it got: "
            + difference.replace("the checkpoint", "the State before").replace("here", "after")
        )


def results_of(found: Any) -> dict[str, float]:
    if not isinstance(found, Mapping):
        raise TypeError(f"evaluate must return a dict of numbers, got {_checks.describe(found)}.")
    results = {}
    for name, value in found.items():
        if np.ndim(value) != 0:
            raise TypeError(
                f"evaluate must return numbers, got {_checks.describe(value)} for {name!r}."
            )
        results[name] = float(value)
    return results
