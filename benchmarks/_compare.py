"""Compares two compiled programs that do the same work: what they cost, and how long they take.

`program_counts` reads numbers from the compiled program that no noise touches. `interleave` times
functions in turns, so that whatever else the machine does falls on all of them alike; give it one
function twice and the ratio of the two is the noise of the measurement.
"""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Counts(NamedTuple):
    """What one call of a compiled program costs.

    Attributes:
      convolutions: convolutions executed, forward and backward.
      dots: matrix products executed.
      flops: floating-point operations, as XLA counts them.
      transcendentals: exponentials, logarithms and their like, which XLA counts apart.
      bytes: bytes read and written by all operations, as XLA counts them.
      temporaries: bytes of temporary memory.
      donated: bytes of results written over their arguments.
      loops: loops executed; their bodies are counted as often as they run.
    """

    convolutions: int
    dots: int
    flops: float
    transcendentals: float
    bytes: float
    temporaries: int
    donated: int
    loops: int


class Bar(NamedTuple):
    """An upper bound for the ratio of one of the `Counts`; ``exact`` asks for equality."""

    name: str
    limit: float = 1.0
    exact: bool = False

    def met(self, base: Counts, other: Counts) -> bool:
        """Whether ``other`` stays within this bar of ``base``."""
        a, b = getattr(base, self.name), getattr(other, self.name)
        return a == b if self.exact else b <= self.limit * a

    def ratio(self, base: Counts, other: Counts) -> float:
        """``other / base``; 1 where both are 0."""
        a, b = getattr(base, self.name), getattr(other, self.name)
        return b / a if a else (1.0 if a == b else float("inf"))


STEP_BARS = (
    Bar("convolutions", exact=True),
    Bar("flops", 1.01),
    Bar("bytes", 1.05),
    Bar("temporaries", 1.10),
)


def program_counts(compiled: Any) -> Counts:
    """The counts of ``jax.jit(f).lower(...).compile()``.

    XLA's own analysis counts the body of a loop once. Here each body is analysed as a program of
    its own and counted as often as it runs, which takes a trip count known at compile time.

    Args:
      compiled: a `jax.stages.Compiled`.

    Raises:
      ValueError: a loop without a known trip count.
    """
    text = compiled.as_text()
    program = _Program(text)
    cost = program.cost(compiled.cost_analysis())
    memory = compiled.memory_analysis()
    return Counts(
        convolutions=program.executed(program.entry, _is_convolution),
        dots=program.executed(program.entry, _is_dot),
        flops=cost["flops"],
        transcendentals=cost["transcendentals"],
        bytes=cost["bytes accessed"],
        temporaries=memory.temp_size_in_bytes,
        donated=memory.alias_size_in_bytes,
        loops=program.executed(program.entry, lambda i: i.opcode == "while"),
    )


def counts_row(
    name: str, base: Counts, other: Counts, bars: Sequence[Bar]
) -> tuple[str, list[str]]:
    """A row of a Markdown table, one cell for each bar, and the bars that are missed."""
    cells, missed = [], []
    for bar in bars:
        a, b = getattr(base, bar.name), getattr(other, bar.name)
        text = f"{a} / {b}" if bar.exact else f"{a:.4g} x {bar.ratio(base, other):.4f}"
        met = bar.met(base, other)
        cells.append(f"{text} {'pass' if met else 'FAIL'}")
        if not met:
            missed.append(f"{name}: {bar.name} {a:.8g} (bare), {b:.8g} (ours)")
    return f"| {name} | {' | '.join(cells)} |", missed


class Times(NamedTuple):
    """Seconds [rounds, functions] by the clock and of the processor (all threads)."""

    wall: np.ndarray
    cpu: np.ndarray

    def ratio(self, kind: str, which: int, base: int = 0) -> float:
        """Median over the rounds of ``which / base``; ``kind`` is "wall" or "cpu"."""
        seconds = getattr(self, kind)
        return float(np.median(seconds[:, which] / seconds[:, base]))

    def difference(self, kind: str, which: int, base: int = 0) -> float:
        """Median over the rounds of ``which - base`` in seconds."""
        seconds = getattr(self, kind)
        return float(np.median(seconds[:, which] - seconds[:, base]))

    def ratio_cell(self, kind: str) -> str:
        """``1.020 (self 0.990)``: 1 over 0, and 2 over 0, which is the same function again."""
        return f"{self.ratio(kind, 1):.3f} (self {self.ratio(kind, 2):.3f})"

    def difference_cell(self, kind: str) -> str:
        """The same for differences, in milliseconds."""
        ours, same = self.difference(kind, 1), self.difference(kind, 2)
        return f"{1e3 * ours:+.3f} (self {1e3 * same:+.3f})"

    def medians(self) -> dict[str, list[float]]:
        """Median seconds of each function."""
        return {"wall": np.median(self.wall, 0).tolist(), "cpu": np.median(self.cpu, 0).tolist()}


def interleave(
    *calls: Callable[[], Any],
    rounds: int = 7,
    repeat: int = 1,
    before: Callable[[], Any] | None = None,
) -> Times:
    """Times functions in turns: a, b, c, then c, b, a, and so on.

    Args:
      calls: functions without arguments; what they return is waited for.
      rounds: how often each is timed.
      repeat: calls for each time; results are waited for after the last one, and times are those
        of one call.
      before: called ahead of each time, and not timed.
    """
    times = np.zeros((2, rounds, len(calls)))
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            order = range(len(calls)) if i % 2 == 0 else reversed(range(len(calls)))
            for j in order:
                if before is not None:
                    before()
                gc.collect()
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(repeat):
                    made = calls[j]()
                jax.block_until_ready(made)
                times[:, i, j] = time.perf_counter() - wall, time.process_time() - cpu
    finally:
        if collecting:
            gc.enable()
    return Times(*(times / repeat))


def stepper(step: Callable[..., Any], state: Any, *rest: Any) -> Callable[[], Any]:
    """A function that takes one training step further at every call, from a copy of ``state``."""
    state = copied(state)

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, *rest)
        return state, metrics

    return call


def first_calls(steps: list[tuple[Callable[..., Any], tuple[Any, ...]]], *, rounds: int) -> Times:
    """Times the first call of each jitted step, with tracing and compilation, in turns.

    Args:
      steps: functions not yet jitted, each with its arguments; the first argument is donated.
      rounds: how often; all of JAX's caches are cleared before each call. A cache on disk must be
        off (``jax_enable_compilation_cache``).
    """
    arguments = [[copied(given) for _ in range(rounds)] for _, given in steps]
    jax.block_until_ready(arguments)

    def first(step: Callable[..., Any], given: list[Any]) -> Callable[[], Any]:
        # A new function each time, because jit remembers functions it has seen.
        return lambda: jax.jit(lambda *args: step(*args), donate_argnums=0)(*given.pop())

    calls = [first(step, given) for (step, _), given in zip(steps, arguments, strict=True)]
    return interleave(*calls, rounds=rounds, before=jax.clear_caches)


def compiled(step: Callable[..., Any], *arguments: Any) -> Any:
    """The program of a step that donates its first argument."""
    return jax.jit(step, donate_argnums=0).lower(*arguments).compile()


def counting(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """The function, and a list that grows by one entry each time it is traced."""
    traces: list[int] = []

    def traced(*args: Any) -> Any:
        traces.append(len(traces) + 1)
        return function(*args)

    return traced, traces


def copied(tree: Any) -> Any:
    """New arrays, so that donation leaves the old ones alive."""
    return _copied(tree)


@jax.jit
def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def machine() -> str:
    """The device and the versions that a number belongs to."""
    device = jax.devices()[0]
    where = f"CPU, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    return f"{where}; jax {jax.__version__}"


class _Instruction(NamedTuple):
    opcode: str
    line: str

    def called(self, attribute: str) -> list[str]:
        """Names of the computations under ``attribute=%name`` or ``attribute={%a, %b}``."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.line)
        return re.findall(r"[\w.\-]+", found[1]) if found else []


class _Program:
    """The computations of an optimised HLO module, from its text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.computations: dict[str, list[_Instruction]] = {}
        self.entry = ""
        current: list[_Instruction] = []
        for line in text.splitlines():
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
            if header:
                current = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
                continue
            found = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][\w\-]*)\(", line)
            if found:
                current.append(_Instruction(found[1], line))

    def uses(self, name: str) -> Iterator[tuple[_Instruction, list[tuple[str, int]]]]:
        """Each instruction with the computations that it runs, and how often."""
        for instruction in self.computations[name]:
            if instruction.opcode == "while":
                n = _trip_count(instruction)
                body, condition = instruction.called("body")[0], instruction.called("condition")[0]
                yield instruction, [(body, n), (condition, n + 1)]
                continue
            names: list[str] = []
            if instruction.opcode.endswith(("-update", "-done")):  # what their -start began
                yield instruction, []
                continue
            for attribute in ("calls", "to_apply", "called_computations"):
                names += instruction.called(attribute)
            yield instruction, [(other, 1) for other in names if other in self.computations]

    def branches(self, instruction: _Instruction) -> list[str]:
        """The branches of a conditional, of which one runs."""
        return [
            name
            for attribute in ("branch_computations", "true_computation", "false_computation")
            for name in instruction.called(attribute)
        ]

    def executed(self, name: str, wanted: Callable[[_Instruction], bool]) -> int:
        """How many instructions of a kind one run of a computation executes."""
        total = 0
        for instruction, runs in self.uses(name):
            total += wanted(instruction)
            total += sum(times * self.executed(other, wanted) for other, times in runs)
            total += max((self.executed(b, wanted) for b in self.branches(instruction)), default=0)
        return total

    def cost(self, once: dict[str, float]) -> dict[str, float]:
        """XLA's costs of the program from those that count every loop body once."""
        return self._cost(self.entry, once)

    def _cost(self, name: str, once: dict[str, float]) -> dict[str, float]:
        total = {key: float(once.get(key, 0.0)) for key in _COSTS}
        for loop in self._loops(name):
            for part, times in loop:
                part_once = self._analysed(part)
                part_total = self._cost(part, part_once)
                for key in _COSTS:
                    total[key] += times * part_total[key] - float(part_once.get(key, 0.0))
        return total

    def _loops(self, name: str) -> Iterator[list[tuple[str, int]]]:
        """The loops that a computation runs, without those inside other loops."""
        for instruction, runs in self.uses(name):
            if instruction.opcode == "while":
                yield runs
                continue
            for other in [other for other, _ in runs] + self.branches(instruction):
                yield from self._loops(other)

    def _analysed(self, name: str) -> dict[str, float]:
        """XLA's analysis of one computation, as the entry of a module of its own."""
        # JAX offers its analysis only for whole programs.
        from jaxlib import _hlo, _jax  # type: ignore[attr-defined, unused-ignore]

        lines = []
        for line in self.text.splitlines():
            if line.startswith("HloModule"):
                line = line.split(",")[0]
            elif line.startswith("ENTRY "):
                line = line.removeprefix("ENTRY ")
            elif re.match(rf"%?{re.escape(name)} \(", line):
                line = "ENTRY " + line
            lines.append(line)
        module = _hlo.hlo_module_from_text("\n".join(lines))
        return dict(_jax.hlo_module_cost_analysis(jax.devices()[0].client, module))


_COSTS = ("flops", "transcendentals", "bytes accessed")


def _trip_count(loop: _Instruction) -> int:
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.line)
    if not found:
        raise ValueError(
            "the program must have loops of known length to be counted, got "
            f"{loop.line.strip()[:120]}."
        )
    return int(found[1])


def _target(instruction: _Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]+)"', instruction.line)
    return found[1].lower() if found and instruction.opcode == "custom-call" else ""


def _is_convolution(instruction: _Instruction) -> bool:
    target = _target(instruction).replace("convert", "")
    return instruction.opcode == "convolution" or "conv" in target


def _is_dot(instruction: _Instruction) -> bool:
    target = _target(instruction)
    return instruction.opcode == "dot" or "gemm" in target or "matmul" in target
