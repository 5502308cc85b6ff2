"""What an adversarial training step of kdjax costs above one written by hand, and what ADR adds.

For each model the compiled programs of these steps are compared, with PGD-10 unless --steps says
otherwise:

- adversarial training (AT), TRADES and ADR, each against a bare jitted step of the same
  mathematics: the same convolutions, FLOPs at most 1.01 times, bytes at most 1.05 times those of
  the bare step, and no loop around a convolution on a CPU, where such a loop is several times
  slower;
- ADR against AT with an average of the weights: one forward pass more, the teacher's, and nothing
  else; the average itself against AT without: no pass at all; AT with perturbed weights (AWP):
  one forward and backward pass of the training loss more;
- a whole schedule of temperature, mix and eps: one trace, whether they come as schedules of the
  step or as arguments;
- losses of three steps must agree with the bare step, in float64 and with the same start of the
  attack (in float32 the signs of gradients near zero differ), for a small network.

Any miss ends the script with exit status 1. Then come times at a small size: ours against the bare
step, and the attack unrolled against looped. They never change the exit status.

    PYTHONPATH=. python benchmarks/adversarial_step.py --no-times
    PYTHONPATH=. python benchmarks/adversarial_step.py --models resnet18 --batch 32
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _compare import (
    Bar,
    Counts,
    Times,
    compiled,
    copied,
    counting,
    counts_row,
    interleave,
    machine,
    program_counts,
    stepper,
)

import kdjax as kd
from kdjax.methods import adr, adversarial, awp

CLASSES, EPS, STEP_SIZE, BETA, DECAY, RHO = 10, 8 / 255, 2 / 255, 6.0, 0.995, 0.005
TEMPERATURE, MIX, TOTAL = (2.5, 2.0), (0.7, 0.95), 1000
BARS = (Bar("convolutions", exact=True), Bar("flops", 1.01), Bar("bytes", 1.05))
AGREEMENT = 1e-6
# What one pass more may cost beyond the pass (rectified labels), and what moving weights costs.
PASS, PER_PARAMETER = 0.01, 10
METHODS = ("at", "trades", "adr")
SMALL = kd.models.ConvNet(CLASSES, widths=(4,))


class Case(NamedTuple):
    """One step of kdjax and the bare one; ``step(state, batch) -> (state, metrics)``."""

    ours: Callable[..., Any]
    bare: Callable[..., Any]
    state: Any
    bare_state: Any


def optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9, nesterov=True))


# The bare steps.


def bare_step(module: nn.Module, method: str, steps: int) -> Callable[..., Any]:
    """The step that one writes by hand, with the attack unrolled."""
    tx = optimizer()

    def evaluated(params: Any, stats: Any, images: jax.Array) -> jax.Array:
        return module.apply({"params": params, **stats}, images, train=False)

    def trained(params: Any, stats: Any, images: jax.Array) -> Any:
        return module.apply({"params": params, **stats}, images, train=True, mutable=list(stats))

    def project(images: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.clip(jnp.clip(images, x - EPS, x + EPS), 0, 1)

    def pgd(value: Callable[[jax.Array], jax.Array], start: jax.Array, x: jax.Array) -> jax.Array:
        images = start
        for _ in range(steps):
            images = project(images + STEP_SIZE * jnp.sign(jax.grad(value)(images)), x)
        return images

    def step(state: Any, batch: dict[str, jax.Array]) -> Any:
        params, stats, average, opt, key, count = state
        x, labels = batch["image"], batch["label"]
        # Constant, as weights are while the images move.
        target = jax.nn.one_hot(labels, CLASSES)
        metrics = {}
        if method == "adr":
            temperature, mix = _annealed(TEMPERATURE, count), _annealed(MIX, count)
            p = jax.nn.softmax(evaluated(*average, x) / temperature)
            of_label = jnp.sum(p * target, -1)
            share = jnp.clip(mix - (p.max(-1) - of_label), 0, 1)[:, None]
            target = share * p + (1 - share) * target
            mass = jnp.take_along_axis(target, labels[:, None], -1)
            metrics["rectified_true_class_mass"] = mass.mean()
        own = jax.random.fold_in(key, count)
        if method == "trades":
            noise = batch.get("noise")
            noise = 1e-3 * jax.random.normal(own, x.shape) if noise is None else noise
            natural = evaluated(params, stats, x)

            def value(images: jax.Array) -> jax.Array:
                return _divergence(natural, evaluated(params, stats, images)).sum()

            moved = pgd(value, x + noise, x)
        else:
            noise = batch.get("noise")
            noise = jax.random.uniform(own, x.shape, x.dtype, -EPS, EPS) if noise is None else noise

            def value(images: jax.Array) -> jax.Array:
                logits = evaluated(params, stats, images)
                return optax.softmax_cross_entropy(logits, target).sum()

            moved = pgd(value, project(x + noise, x), x)
        moved = jax.lax.stop_gradient(moved)

        def loss_fn(params: Any) -> Any:
            if method != "trades":
                logits, new = trained(params, stats, moved)
                loss = optax.softmax_cross_entropy(logits, target).mean()
                return loss, (new, {"loss/adversarial": loss, **_right(moved=(logits, labels))})
            before, new = trained(params, stats, x)
            after, new = trained(params, new, moved)
            hard = optax.softmax_cross_entropy(before, target).mean()
            robust = _divergence(before, after).mean()
            found = {"loss/natural": hard, "loss/robust": robust}
            seen = _right(moved=(after, labels), natural=(before, labels))
            return hard + BETA * robust, (new, {**found, **seen})

        (loss, (stats, more)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        if average is not None:
            average = jax.tree.map(
                lambda a, b: DECAY * a + (1 - DECAY) * b, average, (params, stats)
            )
        state = params, stats, average, opt, key, count + 1
        return state, {"loss": loss, **metrics, **more}

    return step


def _annealed(ends: tuple[float, float], step: jax.Array) -> jax.Array:
    return ends[1] + (ends[0] - ends[1]) / 2 * (1 + jnp.cos(jnp.pi * step / TOTAL))


def _divergence(natural: jax.Array, moved: jax.Array) -> jax.Array:
    one, two = jax.nn.log_softmax(natural), jax.nn.log_softmax(moved)
    return jnp.sum(jnp.exp(one) * (one - two), -1)


def _right(
    moved: tuple[jax.Array, jax.Array], natural: tuple[jax.Array, jax.Array] | None = None
) -> dict[str, jax.Array]:
    found = {"adversarial_accuracy": (moved[0].argmax(-1) == moved[1]).mean()}
    if natural is not None:
        found["accuracy"] = (natural[0].argmax(-1) == natural[1]).mean()
    return found


# The steps of kdjax.


def method_of(
    name: str,
    student: kd.Model,
    steps: int,
    *,
    schedule: Mapping[str, Any] | None = None,
    **options: Any,
) -> kd.Method:
    """A Method by its name here; ``at+average`` is AT that keeps an average of the weights."""
    options = {"eps": EPS, "step_size": STEP_SIZE, "steps": steps, **options}
    if name == "adr":
        schedule = schedule or adr.annealed(TEMPERATURE, MIX, total_steps=TOTAL)
        return adr.adr(student, **schedule, ema_decay=DECAY, **options)
    if name == "trades":
        return adversarial.trades(student, beta=BETA, **options)
    decay = DECAY if name == "at+average" else None
    return adversarial.adversarial_training(student, ema_decay=decay, **options)


def learner_of(name: str, student: kd.Model, steps: int, **options: Any) -> kd.Learner:
    if name == "at+awp":
        return awp.minimize_all(method_of("at", student, steps, **options), optimizer(), rho=RHO)
    return kd.minimize(method_of(name, student, steps, **options), optimizer())


def make_case(module: nn.Module, name: str, steps: int, batch: dict[str, jax.Array]) -> Case:
    """One method, with both steps at the same weights."""
    learner = learner_of(name, kd.from_linen(module), steps)
    state = jax.jit(learner.init)(jax.random.key(0), batch)
    params, stats = copied((state.params["student"], state.extra["student"]))
    average = copied((params, stats)) if name == "adr" else None
    bare_state = params, stats, average, optimizer().init(params), jax.random.key(0), jnp.int32(0)
    return Case(learner.update, bare_step(module, name, steps), state, bare_state)


def make_batches(
    size: int, side: int, *, noise: float | None = None, dtype: Any = jnp.float32
) -> list[dict[str, jax.Array]]:
    """Three batches of noise images in [0, 1], with the start of the attack if it is asked for."""
    rng = np.random.default_rng(7)
    found = []
    for _ in range(3):
        image = jnp.asarray(rng.uniform(size=(size, side, side, 3)), dtype)
        label = jnp.asarray(rng.integers(CLASSES, size=size), jnp.int32)
        batch = {"image": image, "label": label, "index": jnp.arange(size, dtype=jnp.int32)}
        if noise is not None:
            batch["noise"] = jnp.asarray(rng.uniform(-noise, noise, image.shape), dtype)
        found.append(batch)
    return found


# What is measured.


def repeated(program: Any, counts: Counts) -> int:
    """Convolutions that run again in a loop: those executed beyond those in the program's text."""
    written = re.findall(
        r"^ +(?:ROOT )?%?[\w.\-]+ = .*? (?:convolution\(|custom-call\(.*_target=\"[^\"]*conv)",
        program.as_text(),
        re.MULTILINE | re.IGNORECASE,
    )
    return counts.convolutions - len(written)


class Passes(NamedTuple):
    """What one forward pass in evaluation costs, and one gradient of the training loss."""

    forward: Counts
    gradient: Counts
    parameters: int


def passes_of(module: nn.Module, batch: dict[str, jax.Array]) -> Passes:
    variables = jax.jit(functools.partial(module.init, train=False))(
        jax.random.key(0), batch["image"][:1]
    )
    params, stats = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def forward(variables: Any, images: jax.Array) -> jax.Array:
        return module.apply(variables, images, train=False)

    def loss(params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> Any:
        variables = {"params": params, **stats}
        logits, new = module.apply(variables, images, train=True, mutable=list(stats))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

    gradient = jax.value_and_grad(loss, has_aux=True)
    images, labels = batch["image"], batch["label"]
    return Passes(
        program_counts(jax.jit(forward).lower(variables, images).compile()),
        program_counts(jax.jit(gradient).lower(params, stats, images, labels).compile()),
        sum(x.size for x in jax.tree.leaves(params)),
    )


def added_rows(
    name: str, programs: Mapping[str, Counts], passes: Passes
) -> tuple[list[str], list[str]]:
    """What one method adds to another, in passes, and what is more than it should be."""
    wanted = (
        ("average of the weights", "at+average", "at", passes.forward, 0),
        ("ADR, with the average", "adr", "at+average", passes.forward, 1),
        ("AWP", "at+awp", "at", passes.gradient, 1),
    )
    rows, missed = [], []
    for title, more, less, one, times in wanted:
        if more not in programs:
            continue
        convolutions = programs[more].convolutions - programs[less].convolutions
        flops = programs[more].flops - programs[less].flops
        allowed = PASS * one.flops + PER_PARAMETER * passes.parameters
        met = convolutions == times * one.convolutions
        met &= abs(flops - times * one.flops) <= allowed
        share = programs[more].flops / programs[less].flops - 1
        cells = [
            f"{name}: {title}",
            "forward" if one is passes.forward else "forward and backward",
            f"{times * one.convolutions} / {convolutions}",
            f"{times} / {flops / one.flops:.4f}",
            f"{100 * share:+.2f} %",
            verdict(met, ""),
        ]
        rows.append("| " + " | ".join(cells) + " |")
        if not met:
            found = f"{convolutions} convolutions and {flops / one.flops:.4f} passes"
            missed.append(f"{name}: {title} adds {found}")
    return rows, missed


def disagreement(name: str) -> float:
    """The largest relative difference of a metric over three steps, from the same starts."""
    with jax.enable_x64(True):
        return _disagreement(name)


def _disagreement(name: str) -> float:
    batches = make_batches(8, 8, noise=EPS if name != "trades" else 1e-3, dtype=jnp.float64)
    case = make_case(SMALL, name, 2, batches[0])
    ours, bare = (jax.jit(step, donate_argnums=0) for step in (case.ours, case.bare))
    state, bare_state, worst = copied(case.state), copied(case.bare_state), 0.0
    for batch in batches:
        state, found = ours(state, batch)
        bare_state, wanted = bare(bare_state, batch)
        if sorted(found) != sorted(wanted):
            raise ValueError(f"{name}: metrics differ: {sorted(found)}, {sorted(wanted)}")
        for key, value in wanted.items():
            gap = abs(float(found[key]) - float(value)) / max(1.0, abs(float(value)))
            worst = max(worst, gap if np.isfinite(gap) else np.inf)
    return worst


def annealed_traces() -> dict[str, int]:
    """Traces of ADR's step while temperature, mix and eps change."""
    batch = make_batches(4, 8)[0]
    student = kd.from_linen(SMALL)

    def learner(temperature: Any, mix: Any, eps: Any) -> kd.Learner:
        schedule = {"temperature": temperature, "mix": mix}
        return learner_of("adr", student, 2, schedule=schedule, eps=eps)

    schedule = adr.annealed(TEMPERATURE, MIX, total_steps=6)
    given = learner(**schedule, eps=optax.linear_schedule(0.0, EPS, 6))
    update, traces = counting(given.update)
    step, state = jax.jit(update), jax.jit(given.init)(jax.random.key(0), batch)
    for _ in range(6):
        state, _ = step(state, batch)
    swept, swept_traces = counting(lambda hp, *args: learner(*hp).update(*args))
    step = jax.jit(swept)
    for values in ((2.5, 0.7, 0.01), (2.2, 0.8, 0.02), (2.0, 0.95, 0.03)):
        step(values, state, batch)
    return {"schedules": len(traces), "arguments": len(swept_traces)}


def times_of(module: nn.Module, steps: int, options: argparse.Namespace) -> dict[str, Times]:
    """Ours against the bare step, and looped against unrolled, at a small size."""
    batch = make_batches(options.time_batch, options.side)[0]
    case = make_case(module, "at", steps, batch)
    looped = learner_of("at", kd.from_linen(module), steps, unroll=False).update
    bare, ours, loop = (jax.jit(f, donate_argnums=0) for f in (case.bare, case.ours, looped))
    found = {}
    for name, (one, two), (state, other) in (
        ("ours / bare", (bare, ours), (case.bare_state, case.state)),
        ("looped / unrolled", (ours, loop), (case.state, case.state)),
    ):
        calls = [stepper(one, state, batch), stepper(two, other, batch), stepper(one, state, batch)]
        interleave(*calls, rounds=1)  # compiles
        found[name] = interleave(*calls, rounds=options.rounds)
    return found


# What is printed.


def verdict(met: bool, value: Any) -> str:
    return f"{value} {'pass' if met else 'FAIL'}".strip()


def counted(
    model: str, module: nn.Module, options: argparse.Namespace, report: dict[str, Any]
) -> list[str]:
    """Prints the rows of one model, and returns what it misses."""
    batch = make_batches(options.batch, options.side)[0]
    programs, missed = {}, []
    for name in options.methods:
        case = make_case(module, name, options.steps, batch)
        bare_program = compiled(case.bare, case.bare_state, batch)
        program = compiled(case.ours, case.state, batch)
        bare, ours = program_counts(bare_program), program_counts(program)
        looped = repeated(program, ours)
        row, more = counts_row(f"{model}, {name}", bare, ours, BARS)
        allowed = looped == 0 or jax.default_backend() != "cpu"
        temporaries = Bar("temporaries").ratio(bare, ours)
        print(f"{row} {verdict(allowed, looped)} | {temporaries:.4f} |", flush=True)
        missed += more
        missed += [f"{model}, {name}: {looped} convolutions in loops"] * (not allowed)
        programs[name] = ours
        counts = {"bare": bare._asdict(), "ours": ours._asdict(), "in_loops": looped}
        report[f"{model}, {name}"] = counts
    for name in ("at+average", "at+awp") if "at" in programs else ():
        learner = learner_of(name, kd.from_linen(module), options.steps)
        state = jax.jit(learner.init)(jax.random.key(0), batch)
        programs[name] = program_counts(compiled(learner.update, state, batch))
        report[f"{model}, {name}"] = {"ours": programs[name]._asdict()}
    if "at" in programs:
        rows, more = added_rows(model, programs, passes_of(module, batch))
        report[f"{model}, added"] = rows
        missed += more
    return missed


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = ", ".join(kd.models.BY_NAME)
    add("--models", nargs="+", choices=kd.models.BY_NAME, default=["resnet8", "resnet20"],
        metavar="MODEL", help=names)  # fmt: skip
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    add("--steps", type=int, default=10, help="of the attack")
    add("--batch", type=int, default=128, help="examples in a batch")
    add("--side", type=int, default=32, help="height and width of the images")
    add("--time-batch", type=int, default=16, help="examples in a batch whose time is taken")
    add("--rounds", type=int, default=5, help="interleaved rounds of times")
    add("--no-times", action="store_true", help="counts only")
    add("--quick", action="store_true", help="8x8 images, batches of 4, attacks of 2 steps")
    add("--json", type=Path, help="a file for all numbers")
    options = parser.parse_args(argv)
    if options.quick:
        options.batch, options.side, options.steps = 4, 8, 2
        options.time_batch, options.rounds = 4, 2
    for name in ("steps", "batch", "side", "time_batch", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables, and returns 1 if a bar is missed."""
    given = sys.argv[1:] if argv is None else list(argv)
    options = arguments(given)
    command = shlex.join(["python", "benchmarks/adversarial_step.py", *given])
    size = f"batch {options.batch} of {options.side}x{options.side}, PGD-{options.steps}"
    print(f"`{command}`, {machine()}, {size}\n")
    report: dict[str, Any] = {"command": command, "machine": machine(), "cases": {}}
    print("| step | convolutions, bare / ours | FLOPs <= 1.01 | bytes <= 1.05 ", end="")
    print("| convolutions in loops | temporaries |\n|---|---|---|---|---|---|")
    missed = []
    modules = {name: kd.models.BY_NAME[name](CLASSES) for name in options.models}
    for name, module in modules.items():
        missed += counted(name, module, options, report["cases"])
    print("\n| what is added | unit | convolutions, wanted / found ", end="")
    print("| FLOPs in such passes, wanted / found | of the step | |\n|---|---|---|---|---|---|")
    for name in modules:
        print(*report["cases"].get(f"{name}, added", []), sep="\n")
    print(f"\n| step of a small network | metrics of 3 steps <= {AGREEMENT:g} |\n|---|---|")
    for name in options.methods:
        report[f"{name}, gap"] = gap = disagreement(name)
        print(f"| {name} | {verdict(gap <= AGREEMENT, f'{gap:.1e}')} |", flush=True)
        missed += [f"{name}: metrics differ by {gap:.2g}"] * (not gap <= AGREEMENT)
    print("\n| temperature, mix and eps annealed by | traces |\n|---|---|")
    report["annealed"] = annealed_traces()
    for how, traces in report["annealed"].items():
        print(f"| {how} | {verdict(traces == 1, traces)} |")
        missed += [f"annealed by {how}: {traces} traces instead of 1"] * (traces != 1)
    if not options.no_times:
        print(f"\n| AT, batch {options.time_batch} | CPU time | wall time |\n|---|---|---|")
        for name, module in modules.items():
            for what, times in times_of(module, options.steps, options).items():
                cells = [times.ratio_cell(kind) for kind in ("cpu", "wall")]
                print(f"| {name}, {what} | {' | '.join(cells)} |", flush=True)
                report["cases"][f"{name}, {what}"] = times.medians()
    report["missed"] = missed
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print("\nAll bars are met." if not missed else "\nMissed:\n" + "\n".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
