"""What `learner.update` costs above a training step written by hand.

For each pair of networks, the update of `kd.distill` + `kd.minimize` is compared with a bare
jitted step of the same work, from the same weights, on the same batches:

- live: the teacher runs in the step; stored: its logits come with the batch; projector: the teacher
  runs, and the features of both are compared by a trained projector and LogSum;
- first, losses of three steps must agree;
- then counts of the two compiled programs: the same convolutions, FLOPs at most 1.01 times,
  bytes 1.05 times, temporary memory 1.10 times those of the bare step, one trace. Any miss ends
  the script with exit status 1;
- then times, in turns: CPU and wall time of a step, time of the first call, host time of a call
  with a tiny network, and the same for `kd.train.fit`. The bare step against itself, timed in the
  same rounds, shows the noise. These have aims and never change the exit status.

    PYTHONPATH=. python benchmarks/step_overhead.py
    PYTHONPATH=. python benchmarks/step_overhead.py --pairs resnet32x4-resnet8x4 --batch 128
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import _projector_step
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _compare import (
    STEP_BARS,
    Times,
    compiled,
    copied,
    counting,
    counts_row,
    first_calls,
    interleave,
    machine,
    program_counts,
    stepper,
)
from flax import nnx

import kdjax as kd
from kdjax import models

TEMPERATURE, HARD, SOFT = 4.0, 0.1, 0.9
CLASSES = 100
AGREEMENT = 1e-5
AIM_CPU, AIM_FIRST, AIM_UPDATE_MS, AIM_FIT_MS = 1.05, 1.25, 0.5, 1.0


class Networks(NamedTuple):
    """A student and a teacher, for kdjax and for the bare step.

    Attributes:
      student: the kdjax Model.
      teacher: the kdjax Model.
      frozen: the teacher's variables for kdjax.
      forward: ``(params, extra, images) -> (logits, extra)``: the bare student in training.
      teach: ``(bare_frozen, batch) -> logits``: the bare teacher in evaluation.
      bare_frozen: its variables.
      bare_start: the student's initial ``(params, extra)`` from those of kdjax.
    """

    student: kd.Model
    teacher: kd.Model
    frozen: Any
    forward: Callable[..., tuple[jax.Array, Any]]
    teach: Callable[..., jax.Array]
    bare_frozen: Any
    bare_start: Callable[[Any, Any], tuple[Any, Any]]


class Case(NamedTuple):
    """The steps, ready to run; ``step(state, batch, frozen) -> (state, metrics)``.

    ``supervised`` is the bare step without any teacher, whose cost stored outputs must not exceed
    either, where the networks are large enough that the soft loss is next to nothing.
    """

    name: str
    networks: Networks
    ours: Callable[..., Any]
    bare: Callable[..., Any]
    supervised: Callable[..., Any] | None
    state: Any
    bare_state: Any
    frozen: Any
    bare_frozen: Any
    batches: list[dict[str, jax.Array]]


def optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.05, momentum=0.9))


# The bare step.


def bare_step(forward: Callable[..., Any], teach: Callable[..., Any] | None) -> Callable[..., Any]:
    """The step that one writes by hand; without ``teach``, plain supervised training."""
    tx = optimizer()

    def step(state: Any, batch: dict[str, jax.Array], frozen: Any) -> Any:
        params, extra, opt, count = state
        if teach is not None:
            teacher = jax.nn.log_softmax(teach(frozen, batch) / TEMPERATURE)

        def loss_fn(params: Any) -> Any:
            logits, new_extra = forward(params, extra, batch["image"])
            hard = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
            accuracy = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
            if teach is None:
                return hard, (new_extra, {"loss": hard, "accuracy": accuracy})
            log_probs = jax.nn.log_softmax(logits / TEMPERATURE)
            kl = jnp.sum(jnp.exp(teacher) * (teacher - log_probs), axis=-1)
            soft = TEMPERATURE**2 * kl.mean()
            loss = HARD * hard + SOFT * soft
            metrics = {"loss": loss, "loss/hard": hard, "loss/soft": soft, "accuracy": accuracy}
            return loss, (new_extra, metrics)

        (_, (extra, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), extra, opt, count + 1), metrics

    return step


def stored_logits(frozen: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """The bare teacher whose outputs come with the batch."""
    return batch["teacher_logits"]


# The pairs.


def linen_pair(
    student: Any, teacher: Any, images: jax.Array, taps: dict[str, str] | None = None
) -> Networks:
    """Two Linen modules; the bare step calls them as Flax's guides do."""
    frozen = jax.jit(teacher.init)(jax.random.key(1), images[:1])

    def forward(params: Any, extra: Any, images: jax.Array) -> Any:
        return student.apply({"params": params, **extra}, images, train=True, mutable=list(extra))

    return Networks(
        kd.from_linen(student, taps=taps),
        kd.from_linen(teacher, taps=taps),
        frozen,
        forward,
        lambda variables, batch: teacher.apply(variables, batch["image"], train=False),
        frozen,
        lambda params, extra: (params, extra),
    )


class NnxConvNet(nnx.Module):
    """Two convolutions with batch norm, and a linear layer."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(3, width, (3, 3), strides=2, rngs=rngs)
        self.norm1 = nnx.BatchNorm(width, rngs=rngs)
        self.conv2 = nnx.Conv(width, 2 * width, (3, 3), strides=2, rngs=rngs)
        self.norm2 = nnx.BatchNorm(2 * width, rngs=rngs)
        self.classifier = nnx.Linear(2 * width, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.classifier(x.mean(axis=(1, 2)))


def nnx_pair(images: jax.Array) -> Networks:
    """Two NNX modules; the bare step splits and merges them, which is NNX's fast form."""
    student, teacher = NnxConvNet(8, rngs=nnx.Rngs(0)), NnxConvNet(16, rngs=nnx.Rngs(1))
    student.train()
    student_def, *start = nnx.split(student, nnx.Param, nnx.BatchStat)
    evaluated = nnx.clone(teacher)
    evaluated.eval()
    teacher_def, bare_frozen = nnx.split(evaluated)

    def forward(params: Any, extra: Any, images: jax.Array) -> Any:
        model = nnx.merge(student_def, params, extra, copy=True)  # ours to mutate
        logits = model(images)
        return logits, nnx.state(model, nnx.BatchStat)

    return Networks(
        kd.from_nnx(student),
        kd.from_nnx(teacher),
        kd.nnx_variables(teacher),
        forward,
        lambda variables, batch: nnx.merge(teacher_def, variables)(batch["image"]),
        bare_frozen,
        lambda *_: (start[0], start[1]),
    )


def plain_pair(images: jax.Array) -> Networks:
    """Two perceptrons as plain functions of dicts of arrays."""

    def init(width: int) -> Callable[..., Any]:
        def made(key: jax.Array, images: jax.Array) -> Any:
            inputs = images[0].size
            one, two = jax.random.split(key)
            return {
                "hidden": jax.random.normal(one, (inputs, width)) / jnp.sqrt(inputs),
                "head": jax.random.normal(two, (width, CLASSES)) / jnp.sqrt(width),
            }

        return made

    def apply(params: Any, images: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(images.reshape(images.shape[0], -1) @ params["hidden"])
        return hidden @ params["head"]

    student, teacher = kd.from_fn(init(64), apply), kd.from_fn(init(128), apply)
    frozen = jax.jit(teacher.init)(jax.random.key(1), images)
    return Networks(
        student,
        teacher,
        frozen,
        lambda params, extra, images: (apply(params, images), extra),
        lambda variables, batch: apply(variables, batch["image"]),
        frozen[0],
        lambda params, extra: (params, extra),
    )


PAIRS: dict[str, Callable[[jax.Array], Networks]] = {
    "mlp": lambda x: linen_pair(models.MLP(CLASSES, (32,)), models.MLP(CLASSES, (64,)), x),
    "plain": plain_pair,
    "nnx": nnx_pair,
    "resnet20-resnet8": lambda x: linen_pair(models.resnet8(CLASSES), models.resnet20(CLASSES), x),
    "resnet32x4-resnet8x4": lambda x: linen_pair(
        models.resnet8x4(CLASSES), models.resnet32x4(CLASSES), x
    ),
}
TINY = ("mlp", "plain", "nnx")
SETTINGS = ("live", "stored", "projector")


def make_batches(size: int, side: int) -> list[dict[str, jax.Array]]:
    """Three batches of noise images with labels and teacher logits."""
    rng = np.random.default_rng(7)
    return [
        {
            "image": jnp.asarray(rng.normal(size=(size, side, side, 3)), jnp.float32),
            "label": jnp.asarray(rng.integers(CLASSES, size=size), jnp.int32),
            "teacher_logits": jnp.asarray(3 * rng.normal(size=(size, CLASSES)), jnp.float32),
        }
        for _ in range(3)
    ]


def make_case(pair: str, setting: str, batches: list[dict[str, jax.Array]]) -> Case:
    """One pair in one of the `SETTINGS`."""
    if setting == "projector":
        return make_projector_case(pair, batches)
    stored = setting == "stored"
    networks = PAIRS[pair](batches[0]["image"])
    if not stored:
        batches = [{k: v for k, v in b.items() if k != "teacher_logits"} for b in batches]
    method = kd.distill(
        networks.student,
        kd.from_batch(logits="teacher_logits") if stored else networks.teacher,
        {
            "hard": (HARD, kd.terms.hard_labels()),
            "soft": (SOFT, kd.terms.soft_labels(temperature=TEMPERATURE)),
        },
    )
    learner = kd.minimize(method, optimizer())
    frozen = None if stored else networks.frozen
    state = jax.jit(learner.init)(jax.random.key(0), batches[0], frozen)
    params, extra = networks.bare_start(state.params["student"], state.extra["student"])
    return Case(
        f"{pair}, {setting}",
        networks,
        learner.update,
        bare_step(networks.forward, stored_logits if stored else networks.teach),
        bare_step(networks.forward, None) if stored and pair not in TINY else None,
        state,
        (params, extra, optimizer().init(params), jnp.zeros((), jnp.int32)),
        frozen,
        None if stored else networks.bare_frozen,
        batches,
    )


def make_projector_case(pair: str, batches: list[dict[str, jax.Array]]) -> Case:
    """Hard labels and the projector's LogSum, with the teacher in the step."""
    student, teacher = _projector_step.MODULES[pair](CLASSES)
    batches = [{k: v for k, v in b.items() if k != "teacher_logits"} for b in batches]
    networks = linen_pair(student, teacher, batches[0]["image"], taps=_projector_step.TAPS)
    method = _projector_step.method(networks.student, networks.teacher)
    learner = kd.minimize(method, optimizer())
    state = jax.jit(learner.init)(jax.random.key(0), batches[0], networks.frozen)
    params = {
        "student": state.params["student"],
        "projector": state.params["terms"]["feature"]["0"],
    }
    bare = _projector_step.bare_step(student, teacher, optimizer())
    start = params, state.extra["student"], optimizer().init(params), jnp.zeros((), jnp.int32)
    frozen = networks.frozen
    name = f"{pair}, projector"
    return Case(name, networks, learner.update, bare, None, state, start, frozen, frozen, batches)


# What is measured.


def compare_metrics(case: Case, bare: Callable[..., Any]) -> tuple[float, int]:
    """The largest relative difference of any metric over three steps, and our traces in them."""
    update, traces = counting(case.ours)
    ours = jax.jit(update, donate_argnums=0)
    state, bare_state, worst = copied(case.state), copied(case.bare_state), 0.0
    for batch in case.batches:
        state, metrics = ours(state, batch, case.frozen)
        bare_state, wanted = bare(bare_state, batch, case.bare_frozen)
        if sorted(metrics) != sorted(wanted):
            raise ValueError(f"{case.name}: metrics differ: {sorted(metrics)}, {sorted(wanted)}")
        for name, value in wanted.items():
            gap = abs(float(metrics[name]) - float(value)) / max(1.0, abs(float(value)))
            worst = max(worst, gap if np.isfinite(gap) else np.inf)
    return worst, len(traces)


def annealed_traces(case: Case) -> dict[str, int]:
    """Traces while temperature and weights change: by schedules, and as arguments."""

    def learner(temperature: Any, hard: Any, soft: Any) -> kd.Learner:
        terms = {
            "hard": (hard, kd.terms.hard_labels()),
            "soft": (soft, kd.terms.soft_labels(temperature=temperature)),
        }
        method = kd.distill(case.networks.student, case.networks.teacher, terms)
        return kd.minimize(method, optimizer())

    return traces_of(
        case,
        learner,
        (
            optax.linear_schedule(8.0, 1.0, 4),
            optax.linear_schedule(0.0, 0.5, 4),
            optax.cosine_decay_schedule(1.0, 4),
        ),
        [(value, 0.1 * value, 1 / value) for value in (1.0, 2.0, 4.0)],
    )


def annealed_projector_traces(case: Case) -> dict[str, int]:
    """The same for the exponent and the weight of the projector term."""

    def learner(alpha: Any, weight: Any) -> kd.Learner:
        networks = case.networks
        method = _projector_step.method(networks.student, networks.teacher, weight, alpha)
        return kd.minimize(method, optimizer())

    schedules = optax.linear_schedule(1.0, 4.0, 4), optax.linear_schedule(0.0, 0.5, 4)
    return traces_of(case, learner, schedules, [(2.0, 0.1), (3.0, 0.2), (4.0, 0.5)])


def traces_of(
    case: Case, learner: Callable[..., kd.Learner], schedules: Any, values: list[Any]
) -> dict[str, int]:
    batch, frozen = case.batches[0], case.frozen
    update, traces = counting(learner(*schedules).update)
    step, state = jax.jit(update), case.state
    for _ in range(5):
        state, _ = step(state, batch, frozen)
    swept, swept_traces = counting(lambda hp, *args: learner(*hp).update(*args))
    step = jax.jit(swept)
    for value in values:
        step(value, case.state, batch, frozen)
    return {"schedules": len(traces), "arguments": len(swept_traces)}


def step_times(case: Case, *, rounds: int, seconds: float) -> Times:
    """Bare, ours, and the bare step again, each on its own copy of the state."""
    ours, bare = (jax.jit(f, donate_argnums=0) for f in (case.ours, case.bare))
    calls = [
        stepper(bare, case.bare_state, case.batches[0], case.bare_frozen),
        stepper(ours, case.state, case.batches[0], case.frozen),
        stepper(bare, case.bare_state, case.batches[0], case.bare_frozen),
    ]
    once = interleave(*calls, rounds=2)  # the first round compiles
    repeat = max(1, round(seconds / max(1e-6, once.wall[1, 0])))
    return interleave(*calls, rounds=rounds, repeat=repeat)


def first_call_times(case: Case, *, rounds: int) -> Times:
    bare = (case.bare, (case.bare_state, case.batches[0], case.bare_frozen))
    ours = (case.ours, (case.state, case.batches[0], case.frozen))
    return first_calls([bare, ours, bare], rounds=rounds)


def fit_times(case: Case, *, rounds: int, steps: int) -> Times:
    """A loop over bare steps, `kd.train.fit` with its log on disk, and the bare loop again.

    Batches are on the host in all three. Times are those of one step, from batch to batch, so that
    start, compilation and the last checkpoint are left out.
    """
    batch = {name: np.asarray(value) for name, value in case.batches[0].items()}
    learner = kd.Learner(lambda *_: case.state, case.ours)
    bare = jax.jit(case.bare, donate_argnums=0)
    skipped = steps // 5
    stamps: list[tuple[float, float]] = []

    def stamped() -> Iterator[dict[str, Any]]:
        for _ in range(steps):
            stamps.append((time.perf_counter(), time.process_time()))
            yield batch

    def bare_loop() -> None:
        state = copied(case.bare_state)
        for one in stamped():
            state, metrics = bare(state, one, case.bare_frozen)
        jax.block_until_ready(metrics)

    def fit_loop() -> None:
        with tempfile.TemporaryDirectory() as folder:
            kd.train.fit(
                learner,
                case.state,
                stamped(),
                frozen=case.frozen,
                steps=steps,
                checkpoint=folder,
                save_every=10 * steps,
                progress=False,
            )

    found = np.zeros((2, rounds, 3))
    for i in range(rounds):
        for j, loop in enumerate((bare_loop, fit_loop, bare_loop)):
            stamps.clear()
            loop()
            found[:, i, j] = (np.array(stamps[-1]) - np.array(stamps[skipped])) / (
                len(stamps) - 1 - skipped
            )
    return Times(*found)


# What is printed.


def counted(case: Case, report: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Rows of the table of counts for one case, and what it misses."""
    program = compiled(case.bare, case.bare_state, case.batches[0], case.bare_frozen)
    bare = program_counts(program)
    ours = program_counts(compiled(case.ours, case.state, case.batches[0], case.frozen))
    gap, traces = compare_metrics(case, program)
    row, missed = counts_row(case.name, bare, ours, STEP_BARS)
    rows = [f"{row} {verdict(traces == 1, traces)} | {verdict(gap <= AGREEMENT, f'{gap:.1e}')} |"]
    missed += [f"{case.name}: {traces} traces instead of 1"] * (traces != 1)
    if not gap <= AGREEMENT:
        missed.append(f"{case.name}: metrics of three steps differ by {gap:.2g}")
    report |= {"bare": bare._asdict(), "ours": ours._asdict(), "gap": gap, "traces": traces}
    if case.supervised is not None:
        plain = program_counts(compiled(case.supervised, case.bare_state, case.batches[0], None))
        row, more = counts_row(f"{case.name}, against supervised", plain, ours, STEP_BARS)
        rows, missed = [*rows, f"{row} | |"], missed + more
        report["supervised"] = plain._asdict()
    return rows, missed


def verdict(met: bool, value: Any) -> str:
    return f"{value} {'pass' if met else 'FAIL'}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = ", ".join(PAIRS)
    add("--pairs", nargs="+", choices=PAIRS, default=[*PAIRS], metavar="PAIR", help=names)
    add("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    add("--batch", type=int, default=64, help="examples in a batch")
    add("--side", type=int, default=32, help="height and width of the images")
    add("--rounds", type=int, default=7, help="interleaved rounds of step times")
    add("--first-calls", type=int, default=3, help="interleaved rounds of first calls")
    add("--seconds", type=float, default=0.3, help="least time to measure at once")
    add("--fit-steps", type=int, default=500, help="steps of each loop of train.fit")
    add("--no-times", action="store_true", help="counts only")
    add("--quick", action="store_true", help="8x8 images, batches of 8, few rounds")
    add("--json", type=Path, help="a file for all numbers")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.side, options.rounds = 8, 8, 2
        options.first_calls, options.seconds, options.fit_steps = 1, 0.02, 60
    for name in ("batch", "side", "rounds", "first_calls", "fit_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def main() -> int:
    options = arguments()
    # A cache on disk would answer for the compiler when first calls are timed.
    jax.config.update("jax_enable_compilation_cache", False)
    batches = make_batches(options.batch, options.side)
    cases = [
        (pair, setting, make_case(pair, setting, batches))
        for pair in options.pairs
        for setting in options.settings
        if setting != "projector" or pair in _projector_step.MODULES
    ]
    if not cases:
        raise SystemExit("None of these pairs has this setting.")
    command = shlex.join(["python", "benchmarks/step_overhead.py", *sys.argv[1:]])
    print(f"`{command}`, {machine()}, batch {options.batch} of {options.side}x{options.side}\n")
    report: dict[str, Any] = {"command": command, "machine": machine(), "cases": {}}
    missed: list[str] = []

    print("| step | convolutions, bare / ours | FLOPs <= 1.01 | bytes <= 1.05 ", end="")
    print("| temporaries <= 1.10 | traces | metrics <= 1e-5 |\n|---|---|---|---|---|---|---|")
    for _, _, case in cases:
        rows, more = counted(case, report["cases"].setdefault(case.name, {}))
        print(*rows, sep="\n", flush=True)
        missed += more
    tiny = tiny_case("live", cases, batches)
    annealed = {f"annealed by {how}": n for how, n in annealed_traces(tiny).items()}
    if "projector" in options.settings:
        found = annealed_projector_traces(tiny_case("projector", cases, batches))
        annealed |= {f"projector, annealed by {how}": n for how, n in found.items()}
    report["annealed"] = annealed
    for name, traces in annealed.items():
        print(f"| {name} | | | | | {verdict(traces == 1, traces)} | |")
        missed += [f"{name}: {traces} traces instead of 1"] * (traces != 1)

    if not options.no_times:
        timed([case for *_, case in cases], tiny, options, report)
    report["missed"] = missed
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print("\nAll bars are met." if not missed else "\nMissed:\n" + "\n".join(missed))
    return 1 if missed else 0


def tiny_case(
    setting: str, cases: list[tuple[str, str, Case]], batches: list[dict[str, jax.Array]]
) -> Case:
    """The smallest case of a setting, made if it isn't among those of the command line."""
    for pair, other, case in cases:
        if (pair, other) == ("mlp", setting):
            return case
    return make_case("mlp", setting, batches)


def timed(
    cases: list[Case], tiny: Case, options: argparse.Namespace, report: dict[str, Any]
) -> None:
    """Prints the tables of times, and adds them to the report."""
    print(f"\n| step, ours / bare | CPU time, aim {AIM_CPU} | wall time ", end="")
    print(f"| first call, CPU, aim {AIM_FIRST} | first call, wall |\n|---|---|---|---|---|")
    for case in cases:
        first = first_call_times(case, rounds=options.first_calls)
        steps = step_times(case, rounds=options.rounds, seconds=options.seconds)
        report["cases"][case.name] |= {"step_s": steps.medians(), "first_s": first.medians()}
        cells = [times.ratio_cell(kind) for times in (steps, first) for kind in ("cpu", "wall")]
        print(f"| {case.name} | {' | '.join(cells)} |", flush=True)

    update = step_times(tiny, rounds=4 * options.rounds, seconds=options.seconds)
    fit = fit_times(tiny, rounds=options.rounds, steps=options.fit_steps)
    report["host"] = {"update_s": update.medians(), "fit_s": fit.medians()}
    print("\n| host overhead per step, mlp, ms | wall | CPU |\n|---|---|---|")
    for name, aim, times in (("learner.update", AIM_UPDATE_MS, update), ("fit", AIM_FIT_MS, fit)):
        row = " | ".join(times.difference_cell(kind) for kind in ("wall", "cpu"))
        print(f"| {name}, aim {aim} | {row} |", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
