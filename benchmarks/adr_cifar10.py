"""ADR on CIFAR-10 by the published recipe, against plain adversarial training at the same budget.

    python benchmarks/adr_cifar10.py --data cifar10.npz --method at adr
    python benchmarks/adr_cifar10.py --data cifar10.npz --method adr+awp --dtype bfloat16
    python benchmarks/adr_cifar10.py --data cifar10.npz --method adr+awp --batch-size 1024 \\
        --generated generated.npz --generated-share 0.7
    python benchmarks/adr_cifar10.py --data cifar10.npz --method at adr --quick

--data is tfds:NAME, prepared on disk (needs the extra ``tfds``), or a PATH.npz in the Keras form. A
command that was stopped or killed goes on where it was, in training and in AutoAttack.

Recipe: ResNet-18, SGD with momentum 0.9 (Nesterov without AWP) and coupled weight decay 5e-4 on
every parameter, batches of 128, learning rate 0.1, a tenth of it after epochs 100 and 150 of 200
(--epochs moves both); PGD with 10 steps of 2/255 in a ball of 8/255, the running statistics in
batch norm; random crops padded by 4 and flips, in the step; mean and standard deviation inside the
model; temperature 2.5 to 2.0 and mix 0.70 to 0.95 (with AWP 1.5 and 0.85), decay of the average
0.995. --generated FILE.npz (image, label) adds generated images to every batch and takes the recipe
with these: PreAct-ResNet-18 with swish, cosine from 0.4. Batch norm then is as without them; the
published runs start it otherwise.

The best epoch is that of largest PGD-10 accuracy on 1,024 held-out training images, for the student
and for its average on their own (the published code selects on the test set; this doesn't). The
best and the last of both are then evaluated on the first --examples test images: clean, PGD-20,
AutoAttack.

Published figures: those marked paper and its code's README are of one split and one selection on
test images; "replication" is an independent one with 10 % held out, over 3 seeds. Gains compare
better than levels do.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from _compare import machine

import kdjax as kd
from kdjax.methods import adr, adversarial, awp

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
EPS, STEP_SIZE, STEPS, DECAY, BETA = 8 / 255, 2 / 255, 10, 0.995, 6.0
SELECT_STEPS, TEST_STEPS = 10, 20
PLAIN = ("at", "trades", "adr", "adr-trades")
METHODS = (*PLAIN, *(f"{name}+awp" for name in PLAIN))
WEIGHTS = ("best student", "last student", "best average", "last average")
# A trial on a CPU. Its attack is no AutoAttack: three targets, few steps and queries.
QUICK = {
    "model": "convnet_small", "epochs": 6, "batch_size": 64, "rows": 960, "held_out": 192,
    "examples": 64, "attack_batch": 64, "targets": 3, "attack_steps": 5, "queries": 50,
}  # fmt: skip
COLUMNS = (
    "method", "weights", "epoch", "held out, PGD-10", "clean", "PGD-20", "AutoAttack",
    "published: clean, AutoAttack", "difference", "source",
)  # fmt: skip


class Published(NamedTuple):
    """Accuracies in per cent of a best checkpoint, and where they stand."""

    clean: float | None
    auto_attack: float
    source: str


PUBLISHED: Mapping[tuple[str, str], tuple[Published, ...]] = {
    ("at", "best student"): (
        Published(82.52, 48.81, "paper, second hand"),
        Published(None, 47.32, "replication"),
    ),
    ("at", "best average"): (Published(None, 49.93, "paper, from its gains"),),
    ("adr", "best student"): (
        Published(82.41, 50.38, "paper"),
        Published(None, 48.54, "replication"),
    ),
    ("adr", "best average"): (Published(82.59, 50.86, "README"),),
    ("adr+awp", "best average"): (Published(83.26, 51.18, "paper"),),
    ("trades", "best student"): (Published(None, 47.55, "replication"),),
    ("adr-trades", "best student"): (Published(None, 48.73, "replication"),),
}


class Task(NamedTuple):
    """What is the same for every method of a command.

    Attributes:
      dataset: with train, validation and test, in memory.
      data: training batches with ``from_step``.
      model: the student; images in, normalisation inside.
      recipe: epochs and milestones are already those of the command.
      options: the command's.
      devices: how many share a batch.
    """

    dataset: kd.data.Dataset
    data: Any
    model: kd.Model
    recipe: adr.Recipe
    options: argparse.Namespace
    devices: int


class Weights(NamedTuple):
    """Variables to be evaluated, the epoch they are of, and their held-out accuracy there."""

    variables: Any
    epoch: int
    held_out: float


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and evaluates what is missing, and prints the table."""
    given = sys.argv[1:] if argv is None else list(argv)
    options = arguments(given)
    command = shlex.join(["python", "benchmarks/adr_cifar10.py", *given])
    print(f"`{command}`, {machine()}\n")
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS), flush=True)
    notes = []
    for method in options.method:
        task = make_task(options, method)
        folder = options.out / method / f"seed-{options.seed}"
        found, note = run(task, method, folder)
        known = PUBLISHED if options.generated is None else {}
        print(*rows(method, found, known), sep="\n", flush=True)
        notes.append(note)
    standard = (options.targets, options.attack_steps, options.queries) == (9, 100, 5000)
    print("\n" + "\n".join(notes))
    if not standard:
        print(
            f"\nNot the standard AutoAttack: {options.targets} targets, {options.attack_steps} "
            f"steps, {options.queries} queries. Compare the rows with each other only."
        )


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, _count
    add("--data", default="tfds:cifar10", help="tfds:NAME or PATH.npz (default: tfds:cifar10)")
    add("--data-dir", help="folder of prepared TFDS data (default: that of TFDS)")
    add("--method", nargs="+", choices=METHODS, default=["adr"], help="default: adr")
    add("--model", choices=kd.models.BY_NAME, metavar="MODEL", help="default: the recipe's")
    add("--epochs", type=count, help="default: the recipe's; the milestones move with them")
    add("--batch-size", type=count, default=128, help="default 128")
    add("--seed", type=int, default=0)
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of forward passes; images, logits, losses and parameters stay float32")  # fmt: skip
    add("--generated", type=Path, help="FILE.npz with image and label, in every batch")
    add("--generated-share", type=float, default=0.7, help="of a batch (default: 0.7)")
    add("--held-out", type=count, default=1024, help="training images to select by")
    add("--rows", type=count, help="only the first rows of each split, for a trial")
    add("--examples", type=count, default=1000, help="test images to evaluate on (default: 1000)")
    add("--weights", nargs="+", choices=WEIGHTS, default=[*WEIGHTS], help="what to evaluate")
    add("--attack-batch", type=count, default=256, help="images attacked at once")
    add("--targets", type=count, default=9, help="of AutoAttack (default: 9)")
    add("--attack-steps", type=count, default=100, help="of AutoAttack (default: 100)")
    add("--queries", type=count, default=5000, help="of AutoAttack (default: 5000)")
    add("--devices", type=count, help="at most so many (default: all)")
    add("--steps-per-call", type=count, default=1, help="updates in one dispatch")
    add("--save-every", type=count, default=5, help="epochs between checkpoints")
    add("--out", type=Path, default=Path("runs/adr_cifar10"), help="folder to keep and resume in")
    add("--quick", action="store_true", help=f"small, for a CPU; defaults become {QUICK}")
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    return parser.parse_args(argv)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


# Data and model.


def make_task(options: argparse.Namespace, method: str) -> Task:
    """Data, model and schedule of one method."""
    dataset = load(options.data, options.data_dir, options.rows, options.held_out)
    data = source = dataset.batches("train", options.batch_size, seed=options.seed, raw=True)
    name = "cifar10+awp" if method.endswith("+awp") else "cifar10"
    if options.generated is not None:
        name = "cifar10+ddpm"
        data = kd.data.joined(
            source, load_generated(options, dataset.num_classes), share=options.generated_share
        )
    recipe = adr.RECIPES[name]
    epochs = options.epochs or recipe.epochs
    milestones = tuple(m * epochs / recipe.epochs for m in recipe.milestones)
    most = min(len(jax.devices()), options.devices or len(jax.devices()))
    return Task(
        dataset,
        data,
        model_of(options.model, dataset.num_classes, options.dtype, options.generated is not None),
        recipe._replace(epochs=epochs, milestones=milestones),
        options,
        max(n for n in range(1, most + 1) if options.batch_size % n == 0),
    )


@functools.lru_cache(maxsize=1)
def load(data: str, data_dir: str | None, rows: int | None, held_out: int) -> kd.data.Dataset:
    """The splits in memory: decoding them anew in each epoch would take longest."""
    if data.startswith("tfds:"):
        source = kd.data.tfds(data.removeprefix("tfds:"), data_dir, validation=0)
    else:
        source = kd.data.npz(data, validation=0)
    splits = {}
    for name in ("train", "test"):
        size = source.size(name)
        part = source.read(name, np.arange(min(rows or size, size)), raw=True)
        splits[name] = {key: part[key] for key in ("image", "label")}
    found = kd.data.arrays(splits, num_classes=source.num_classes, name=source.name)
    return found.hold_out(held_out)


def load_generated(options: argparse.Namespace, num_classes: int) -> kd.data.Batches:
    """Endless batches of the generated images."""
    with np.load(options.generated) as stored:
        split = {key: stored[key] for key in ("image", "label")}
    name = options.generated.stem
    dataset = kd.data.arrays({"train": split}, num_classes=num_classes, name=name)
    return dataset.batches("train", options.batch_size, seed=options.seed + 1, raw=True)


# Kept, so that the programs compiled for a Model are found again.
@functools.cache
def model_of(name: str | None, num_classes: int, dtype: str, generated: bool) -> kd.Model:
    """A network that normalises images itself, so that eps is in units of pixels."""
    if name is None and generated:
        eighteen = kd.models.preact_resnet18(num_classes)
        module: nn.Module = eighteen.clone(activation=nn.swish)
    else:
        module = kd.models.BY_NAME[name or "resnet18"](num_classes)
    precision = None if dtype == "float32" else jnp.dtype(dtype)
    return normalized(kd.from_linen(module, dtype=precision))


def normalized(model: kd.Model) -> kd.Model:
    """The model on images in [0, 1], with logits in at least float32."""

    def init(key: jax.Array, images: jax.Array) -> Any:
        return model.init(key, kd.augment.normalize(images, MEAN, STD))

    def apply(params: Any, extra: Any, images: jax.Array, **keywords: Any) -> Any:
        scaled = kd.augment.normalize(images, MEAN, STD)
        outputs, extra = model.apply(params, extra, scaled, **keywords)
        logits = outputs["logits"]
        wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return {**outputs, "logits": wide}, extra

    return kd.Model(init, apply, model.inputs)


def learner_of(task: Task, method: str) -> kd.Learner:
    """A method by its name on the command line."""
    base, _, perturbed = method.partition("+")
    crop = functools.partial(kd.augment.random_crop, padding=4)
    options: dict[str, Any] = {
        "eps": EPS, "step_size": STEP_SIZE, "steps": STEPS, "ema_decay": DECAY,
        "augment": kd.augment.compose(kd.augment.to_float, crop, kd.augment.random_flip),
    }  # fmt: skip
    if base.startswith("adr"):
        total = task.recipe.epochs * task.data.steps_per_epoch
        options |= adr.annealed(task.recipe.temperature, task.recipe.mix, total_steps=total)
    if base == "at":
        found = adversarial.adversarial_training(task.model, **options)
    elif base == "trades":
        found = adversarial.trades(task.model, beta=BETA, **options)
    elif base == "adr":
        found = adr.adr(task.model, **options)
    else:
        found = adr.adr_trades(task.model, beta=BETA, **options)
    optimizer = adr.optimizer(task.recipe, steps_per_epoch=task.data.steps_per_epoch)
    if perturbed:
        return awp.minimize_all(found, optimizer, rho=task.recipe.rho)
    return kd.minimize(found, optimizer)


# Training.


def run(task: Task, method: str, folder: Path) -> tuple[dict[str, dict[str, float]], str]:
    """The figures of each of `WEIGHTS`, and a sentence about the training."""
    folder.mkdir(parents=True, exist_ok=True)
    check_recipe(folder, recipe_of(task, method))
    learner, per_epoch = learner_of(task, method), task.data.steps_per_epoch
    batch = next(iter(task.data.from_step(0)))
    start = jax.jit(learner.init)(jax.random.key(task.options.seed), batch)
    held_out, best_average = selection(task), BestAverage(folder / "best_average.npz")
    started = time.perf_counter()
    last = kd.train.fit(
        learner,
        start,
        task.data,
        steps=task.recipe.epochs * per_epoch,
        mesh=kd.parallel.data_mesh(task.devices) if task.devices > 1 else None,
        checkpoint=folder,
        save_every=task.options.save_every * per_epoch,
        keep=1,
        best="robust",
        evaluate=lambda state: best_average.kept(state, held_out(state)),
        eval_every=per_epoch,
        log_every=max(1, per_epoch // 4),
        steps_per_call=task.options.steps_per_call,
    )
    jax.block_until_ready(last)
    log = curves(folder)
    best = kd.train.restore(folder, start, step="best")
    trained = {
        "best student": _student(best, log, per_epoch),
        "last student": _student(last, log, per_epoch),
        "best average": best_average.read(adr.averaged(last), per_epoch),
        "last average": Weights(
            _alike(adr.averaged(last)), task.recipe.epochs, log["average_robust"][-1]
        ),
    }
    evaluated = {
        name: evaluate(task, name, weights, folder)
        for name, weights in trained.items()
        if name in task.options.weights
    }
    gaps = [f"{100 * gap(log[name]):.2f}" for name in ("robust", "average_robust")]
    seconds = time.perf_counter() - started
    note = (
        f"{method}: held-out PGD-10, best minus last: student {gaps[0]} points, average {gaps[1]}; "
        f"an epoch takes {statistics.median(log['seconds']):.3g} s; this call {seconds:.0f} s."
    )
    return evaluated, note


def recipe_of(task: Task, method: str) -> dict[str, Any]:
    """Everything that decides what is trained."""
    names = ("seed", "batch_size", "dtype", "model", "generated_share")
    return {
        "method": method,
        **{name: getattr(task.options, name) for name in names},
        "recipe": task.recipe._asdict(),
        "data": task.data.describe(),
    }


def check_recipe(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Writes what is run here, or refuses a folder with another run."""
    wanted = json.loads(json.dumps(wanted))
    file = folder / "recipe.json"
    if not file.is_file():
        _write(file, wanted)
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    other = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
    if other:
        raise SystemExit(
            f"{folder} holds a run with {other[0]} = {found.get(other[0])!r}, wanted is "
            f"{wanted.get(other[0])!r}: pass another --out, or the options it was made with."
        )


def _write(file: Path, content: Mapping[str, Any]) -> None:
    partial = file.with_suffix(".tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def selection(task: Task) -> Callable[[kd.State], dict[str, float]]:
    """Clean and PGD-10 accuracy of student and average on the held-out images."""
    part = task.dataset.read("validation")
    images, labels = part["image"], part["label"]
    ended: float | None = None

    def of(state: kd.State) -> dict[str, float]:
        nonlocal ended
        jax.block_until_ready(state.params)
        found = {} if ended is None else {"seconds": time.perf_counter() - ended}
        student = state.params["student"], state.extra["student"]
        for prefix, variables in (("", student), ("average_", adr.averaged(state))):
            clean, robust = accuracies(task, variables, images, labels, SELECT_STEPS)
            found |= {f"{prefix}clean": clean, f"{prefix}robust": robust}
        ended = time.perf_counter()
        return found

    return of


class BestAverage:
    """The average of the epoch where it was best itself, in a file.

    `kdjax.train.fit` keeps the best checkpoint by one metric, which is the student's. Evaluations
    that a resumed run repeats give the same numbers, and change nothing.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def kept(self, state: kd.State, found: dict[str, float]) -> dict[str, float]:
        """``found``, after the average is written if it is the best so far."""
        value = found["average_robust"]
        if not self.file.is_file() or value > self._held():
            leaves = [np.asarray(x) for x in jax.tree.leaves(adr.averaged(state))]
            partial = self.file.with_name("best_average.partial.npz")
            step = np.asarray(state.step)
            np.savez(partial, *leaves, value=np.float64(value), step=step)
            partial.replace(self.file)
        return found

    def read(self, like: Any, per_epoch: int) -> Weights:
        """The variables in the file, as a tree such as ``like``."""
        leaves, tree = jax.tree.flatten(like)
        with np.load(self.file) as stored:
            found = [jnp.asarray(stored[f"arr_{i}"]) for i in range(len(leaves))]
            epoch, value = int(stored["step"]) // per_epoch, float(stored["value"])
        return Weights(jax.tree.unflatten(tree, found), epoch, value)

    def _held(self) -> float:
        with np.load(self.file) as stored:
            return float(stored["value"])


def curves(folder: Path) -> dict[str, list[float]]:
    """Held-out figures of every epoch, also of earlier calls."""
    records = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line that a kill has cut
            records.append(json.loads(line))
    ends = [record for record in records if "eval/robust" in record]
    names = ("clean", "robust", "average_clean", "average_robust")
    found = {name: [record[f"eval/{name}"] for record in ends] for name in names}
    seconds = [r["eval/seconds"] for r in ends if r.get("eval/seconds") is not None]
    return {**found, "seconds": seconds or [float("nan")]}


def gap(curve: Sequence[float]) -> float:
    return float(kd.metrics.robust_overfitting(jnp.asarray(curve, jnp.float32)).gap)


def _student(state: kd.State, log: Mapping[str, list[float]], per_epoch: int) -> Weights:
    epoch = int(state.step) // per_epoch
    variables = state.params["student"], state.extra["student"]
    return Weights(_alike(variables), epoch, log["robust"][epoch - 1])


def _alike(variables: Any) -> Any:
    """On the default device, so that restored and trained weights share compiled programs."""
    return jax.tree.map(jnp.asarray, jax.device_get(variables))


# Evaluation.


@functools.partial(jax.jit, static_argnames=("model", "steps"))
def attacked(
    model: kd.Model, variables: Any, images: jax.Array, labels: jax.Array, keys: Any, steps: int
) -> tuple[jax.Array, jax.Array]:
    """Which images are right, clean and under PGD."""

    def loss(x: jax.Array) -> jax.Array:
        return kd.losses.hard_label_cross_entropy(logits_of(model, variables, x), labels)

    x_adv = kd.attacks.pgd(loss, images, eps=EPS, step_size=STEP_SIZE, steps=steps, key=keys)
    clean, moved = (logits_of(model, variables, x) for x in (images, x_adv))
    return right(clean, labels), right(clean, labels) & right(moved, labels)


def logits_of(model: kd.Model, variables: Any, images: jax.Array) -> jax.Array:
    return model.apply(*variables, images, train=False)[0]["logits"]


def right(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (logits.argmax(-1) == labels) & jnp.isfinite(logits).all(-1)


@functools.cache
def logits_function(model: kd.Model) -> Callable[..., jax.Array]:
    """One function for each model, so that other weights compile nothing anew."""
    return functools.partial(logits_of, model)


def accuracies(
    task: Task, variables: Any, images: np.ndarray, labels: np.ndarray, steps: int
) -> tuple[float, float]:
    """Clean and PGD accuracy, in batches of one size."""
    size = min(task.options.attack_batch, len(images))
    found = []
    for first in range(0, len(images), size):
        rows = np.arange(first, first + size) % len(images)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), rows)
        masks = attacked(task.model, variables, images[rows], labels[rows], keys, steps)
        found.append(np.stack(masks)[:, : len(images) - first])
    clean, robust = np.concatenate(found, axis=1).mean(axis=1)
    return float(clean), float(robust)


def evaluate(task: Task, name: str, weights: Weights, folder: Path) -> dict[str, float]:
    """Clean, PGD-20 and AutoAttack accuracy on the first test images; read if it is there."""
    options = task.options
    settings = options.examples, options.targets, options.attack_steps, options.queries
    file = folder / ("_".join([*name.split(), *map(str, settings)]) + ".json")
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    part = task.dataset.read("test", np.arange(min(options.examples, task.dataset.size("test"))))
    clean, pgd = accuracies(task, weights.variables, part["image"], part["label"], TEST_STEPS)
    found = kd.attacks.auto_attack(
        jax.tree_util.Partial(logits_function(task.model), weights.variables),
        part["image"],
        part["label"],
        eps=EPS,
        key=jax.random.key(0),
        batch_size=options.attack_batch,
        checkpoint=file.with_suffix(".npz"),
        targets=options.targets,
        steps=options.attack_steps,
        queries=options.queries,
    )
    figures = {
        "epoch": weights.epoch,
        "held_out": weights.held_out,
        "clean": clean,
        "pgd": pgd,
        "auto_attack": float(found.robust.mean()),
        **{f"auto_attack/{k}": float(v.mean()) for k, v in found.per_attack.items()},
    }
    _write(file, figures)
    return figures


def rows(
    method: str,
    found: Mapping[str, Mapping[str, float]],
    published: Mapping[tuple[str, str], Sequence[Published]],
) -> list[str]:
    """Lines of the table: one for each published value, or one."""
    lines = []
    for name, one in found.items():
        ours = [
            method, name, f"{one['epoch']:.0f}",
            *(f"{100 * one[key]:.2f}" for key in ("held_out", "clean", "pgd", "auto_attack")),
        ]  # fmt: skip
        for known in published.get((method, name), ()):
            clean = "-" if known.clean is None else f"{known.clean:.2f}"
            difference = 100 * one["auto_attack"] - known.auto_attack
            cells = f"{clean}, {known.auto_attack:.2f}", f"{difference:+.2f}", known.source
            lines.append("| " + " | ".join([*ours, *cells]) + " |")
        if (method, name) not in published:
            lines.append("| " + " | ".join([*ours, "-", "-", "-"]) + " |")
    return lines


if __name__ == "__main__":
    main()
