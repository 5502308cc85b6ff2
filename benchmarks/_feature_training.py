"""Trains what `feature_methods.py` compares: teachers, students, stages and chains."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _feature_methods import ENTRIES, NONE, Entry, Make, Pair, deployed_logits, outputs_of

import kdjax as kd

FIRST = 8  # a first stage has one in so many updates on top
CHUNK = 500  # images that are evaluated at once
STORED = 2**29  # bytes of teacher's outputs that are stored at most; above, it runs in the step


class Task(NamedTuple):
    """Data on the device, and the trained teachers.

    Attributes:
      train: images, labels (-1 where hidden), the ``target`` of methods that need a class, and the
        teacher's outputs where they are stored.
      heldout: "validation" and "test" images with labels.
      teacher: the model of the step: stored outputs, or the network.
      others: the same of further teachers.
      frozen: variables of all of them, one by one.
      accuracies: of the teachers on the test split.
    """

    train: dict[str, jax.Array]
    heldout: dict[str, tuple[jax.Array, np.ndarray]]
    teacher: kd.Model
    others: tuple[kd.Model, ...]
    frozen: list[Any]
    accuracies: list[float]


# Networks.


def module_of(name: str, classes: int) -> Any:
    """``vgg-16-32x2``: a VGG of one convolution of 16 channels and two of 32; or one by name."""
    kind, *stages = name.split("-")
    if kind == "vgg" and stages:
        widths = []
        for stage in stages:
            width, _, count = stage.partition("x")
            widths.append((int(width),) * int(count or 1))
        return kd.models.VGG(classes, tuple(widths))
    if name not in kd.models.BY_NAME:
        raise ValueError(f"networks must be vgg-WIDTH[xCOUNT]-... or of kdjax.models, got {name!r}")
    return kd.models.BY_NAME[name](classes)


def network(name: str, classes: int) -> kd.Model:
    module = module_of(name, classes)
    taps, expose = outputs_of(module)
    return kd.from_linen(module, taps=taps, expose=expose, inputs=scaled)


def scaled(batch: Mapping[str, jax.Array]) -> jax.Array:
    return kd.augment.to_float(batch["image"])


def augmentation(name: str) -> Callable[..., Any] | None:
    if name == "none":
        return None
    return kd.augment.compose(kd.augment.to_float, kd.augment.random_crop, kd.augment.random_flip)


def in_chunks(function: Callable[[jax.Array], Any], images: jax.Array) -> Any:
    parts = [jax.device_get(function(images[i : i + CHUNK])) for i in range(0, len(images), CHUNK)]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


# Training.


class Program(NamedTuple):
    """A training: ``init(key, begin, peer, frozen, weight, data)``, and the compiled update."""

    init: Callable[..., kd.State]
    update: Any


class Bench:
    """Trains students; programs are compiled once and used for all seeds and weights."""

    def __init__(self, options: argparse.Namespace, task: Task, classes: int) -> None:
        self.options, self.task, self.classes = options, task, classes
        self.student = network(options.student, classes)
        self.programs: dict[tuple[Any, ...], Program] = {}
        self.states: dict[str, tuple[Any, ...]] = {}  # arguments of the last update, for times
        self._made: dict[tuple[Any, ...], Any] = {}  # what several rows need
        self._begin = jax.jit(self.student.init)

        def logits(params: Any, extra: Any, images: jax.Array) -> jax.Array:
            x = kd.augment.to_float(images)
            return self.student.apply(params, extra, x)[0]["logits"]

        self._logits = jax.jit(logits)
        self._deployed = jax.jit(
            lambda state, batch, frozen, images: deployed_logits(
                self.pair(1), state, batch, frozen, kd.augment.to_float(images)
            )
        )

    def pair(self, steps: int, **changes: Any) -> Pair:
        """What methods are made of; ``changes`` are other fields."""
        stages = len(outputs_of(module_of(self.options.student, self.classes))[1]) - 1
        found = Pair(
            self.student, self.student, self.task.teacher, self.task.others, stages,
            np.asarray(self.task.train["target"]), steps, augmentation(self.options.augmentation),
        )  # fmt: skip
        return found._replace(**changes)

    def begin(self, seed: int) -> Any:
        """Initial variables of the student of a seed."""
        return self._begin(jax.random.key(seed), self.task.heldout["test"][0][:1] / 1.0)

    def order(self, seed: int) -> jax.Array:
        """Rows [steps, batch] of the training split, labelled ones first, none twice in a batch."""
        options, random = self.options, np.random.default_rng(seed)
        known = np.asarray(self.task.train["label"]) >= 0
        number = options.batch_size if known.all() else options.labelled
        parts = []
        for pool, size in ((known, number), (~known, options.batch_size - number)):
            if size:
                there = np.flatnonzero(pool)
                per_pass = len(there) // size
                passes = -(-options.steps // per_pass)
                drawn = [random.permutation(there)[: per_pass * size] for _ in range(passes)]
                parts.append(np.concatenate(drawn).reshape(-1, size)[: options.steps])
        return jnp.asarray(np.concatenate(parts, axis=1))

    def learner(self, make: Make, pair: Pair, weight: Any) -> kd.Learner:
        optimizer = optax.chain(
            optax.clip_by_global_norm(5.0),
            optax.add_decayed_weights(5e-4),
            optax.sgd(optax.cosine_decay_schedule(self.options.rate, pair.steps), momentum=0.9),
        )
        return kd.minimize(make(pair, weight), optimizer)

    def program(self, key: tuple[Any, ...], make: Make, pair: Pair, given: Any) -> Program:
        """Compiles for arguments of the shapes of ``given``."""
        if key in self.programs:
            return self.programs[key]
        rng, begin, peer, frozen, weight, order = given
        data = self.task.train

        def batch_of(data: Any, rows: jax.Array) -> Any:
            return jax.tree.map(lambda x: x[rows], data)

        def init(rng: Any, begin: Any, peer: Any, frozen: Any, weight: Any, data: Any) -> Any:
            started = pair._replace(
                student=kd.started(pair.student, begin), peer=kd.started(pair.peer, peer)
            )
            learner = self.learner(make, started, weight)
            return learner.init(rng, batch_of(data, jnp.arange(self.options.batch_size)), frozen)

        def update(state: Any, data: Any, order: Any, frozen: Any, weight: Any) -> Any:
            batch = batch_of(data, order[state.step])
            return self.learner(make, pair, weight).update(state, batch, frozen)

        state = jax.eval_shape(init, rng, begin, peer, frozen, weight, data)
        updated = jax.jit(update, donate_argnums=0).lower(state, data, order, frozen, weight)
        # `init` is run as it is: its small programs serve every method, and one of all isn't cheap.
        self.programs[key] = Program(init, updated.compile())
        return self.programs[key]

    def fit(
        self,
        key: str,
        make: Make,
        weight: float,
        seed: int,
        *,
        frozen: Any,
        pair: Pair | None = None,
        begin: Any = None,
    ) -> kd.State:
        """One training from the parameters of a seed, or from ``begin``."""
        pair = self.pair(self.options.steps) if pair is None else pair
        begin = self.begin(seed) if begin is None else begin
        rest = frozen, jnp.asarray(weight, jnp.float32)
        order = self.order(seed)
        given = (jax.random.key(seed), begin, self.begin(seed + 1000), *rest)
        program = self.program((key, pair.steps), make, pair, (*given, order))
        state = program.init(*given, self.task.train)
        for _ in range(pair.steps):
            state, metrics = program.update(state, self.task.train, order, *rest)
        if not math.isfinite(float(metrics["loss"])):
            print(f"{key}: the loss isn't finite at the end", file=sys.stderr)
        self.states[key] = (state._replace(step=0 * state.step), self.task.train, order, *rest)
        return state

    def once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def accuracies(self, variables: Any) -> dict[str, float]:
        return self._accuracies(lambda images: self._logits(*variables, images))

    def deployed(self, state: kd.State) -> dict[str, float]:
        """Of SimKD, whose student is used with the teacher's classifier."""
        batch = jax.tree.map(lambda x: x[:1], self.task.train)
        frozen = self.task.frozen[0]
        return self._accuracies(lambda images: self._deployed(state, batch, frozen, images))

    def _accuracies(self, logits: Callable[[jax.Array], Any]) -> dict[str, float]:
        return {
            name: float(np.mean(in_chunks(logits, images).argmax(-1) == labels))
            for name, (images, labels) in self.task.heldout.items()
        }


def student_of(state: kd.State) -> Any:
    return state.params["student"], state.extra["student"]


def train(bench: Bench, name: str, weight: float, seed: int) -> dict[str, float]:
    """Accuracies of one method from one seed."""
    entry, frozen = ENTRIES[name], bench.task.frozen[0]
    if name == NONE:
        state = bench.once((NONE, seed), lambda: bench.fit(NONE, entry.make, 1, seed, frozen=None))
    elif name == "born-again":
        return bench.accuracies(born_again(bench, weight, seed))
    elif name == "teacher assistant":
        return bench.accuracies(teacher_assistant(bench, weight, seed))
    elif name == "FT":
        state = transferred(bench, entry, weight, seed)
    elif entry.first is not None:
        state = two_stages(bench, name, entry, weight, seed)
    elif name == "multi-teacher":
        state = bench.fit(name, entry.make, weight, seed, frozen=bench.task.frozen)
    else:
        state = bench.fit(name, entry.make, weight, seed, frozen=frozen)
    if name == "SimKD":
        return bench.deployed(state)
    if name == "mean teacher":
        return bench.accuracies(kd.methods.mean_teacher.averaged(state))
    if name == "mutual learning":
        pair = [bench.student] * 2
        return bench.accuracies(kd.methods.mutual.student_of(pair, state, 0)[1])
    return bench.accuracies(student_of(state))


def first_steps(options: argparse.Namespace) -> int:
    return max(1, options.steps // FIRST)


def two_stages(bench: Bench, name: str, entry: Entry, weight: float, seed: int) -> kd.State:
    """The distance alone, then the labels alone from the student that it made."""
    assert entry.first is not None
    pair, frozen = bench.pair(first_steps(bench.options)), bench.task.frozen[0]
    state = bench.fit(f"{name}, first", entry.first, weight, seed, pair=pair, frozen=frozen)
    params, extra = student_of(state)
    # The classifier had no gradient, and weight decay should not have moved it.
    params = {**params, "classifier": bench.begin(seed)[0]["classifier"]}
    return bench.fit(NONE, entry.make, 1, seed, begin=(params, extra), frozen=None)


def transferred(bench: Bench, entry: Entry, weight: float, seed: int) -> kd.State:
    """The teacher's paraphraser, then the student."""
    frozen, first = bench.task.frozen[0], entry.first
    assert first is not None

    def paraphraser() -> Any:
        pair = bench.pair(first_steps(bench.options))
        return bench.fit("FT, first", first, 1, seed, pair=pair, frozen=frozen).params["student"]

    made = bench.once(("FT", seed), paraphraser)
    factored = kd.methods.factor_transfer.factored_variables(frozen, made)
    return bench.fit("FT", entry.make, weight, seed, frozen=factored)


def born_again(bench: Bench, weight: float, seed: int) -> Any:
    """The student alone, from which generation 1 learns, from which generation 2 learns."""
    make = ENTRIES["born-again"].make

    def run(link: Any) -> kd.State:
        # The last one starts where all students of this seed start.
        begin = bench.begin(seed if link.number == 2 else seed + 2000)
        pair = bench.pair(bench.options.steps, teacher=link.teachers[0])
        given = {"pair": pair, "begin": begin, "frozen": link.frozen}
        return bench.fit("born-again", make, weight, seed, **given)

    labels = ENTRIES[NONE].make
    alone = bench.once((NONE, seed), lambda: bench.fit(NONE, labels, 1, seed, frozen=None))
    return kd.methods.born_again.born_again(
        bench.student, run, key=jax.random.key(seed), generations=2, given=student_of(alone),
        soft=weight, temperature=1.0,
    )[-1]  # fmt: skip


def teacher_assistant(bench: Bench, weight: float, seed: int) -> Any:
    """Teacher, a network of a size between, student."""
    make = ENTRIES["teacher assistant"].make
    assistant = network(bench.options.assistant, bench.classes)

    def run(link: Any) -> kd.State:
        name = "teacher assistant" if link.number == 2 else "teacher assistant, first"
        image = bench.task.heldout["test"][0][:1] / 1.0
        begin = bench.begin(seed) if link.number == 2 else jax.jit(assistant.init)(link.key, image)
        pair = bench.pair(bench.options.steps, student=link.student, teacher=link.teachers[0])
        given = {"pair": pair, "begin": begin, "frozen": link.frozen}
        return bench.fit(name, make, weight, seed, **given)

    found = kd.methods.teacher_assistant.teacher_assistant(
        [bench.task.teacher, assistant, bench.student], run, key=jax.random.key(seed),
        soft=weight, given=({}, {}) if bench.task.frozen[0] is None else bench.task.frozen[0],
    )  # fmt: skip
    return found[-1]


# Data and teachers.


def prepare(options: argparse.Namespace) -> tuple[Task, int]:
    """Reads the data, trains the teachers (or reads them), and stores what they say."""
    dataset = kd.data.digits() if options.data == "digits" else kd.data.npz(options.data)
    full, classes = dataset.read("train", raw=True), dataset.num_classes
    if options.labels_per_class:
        dataset = dataset.keep_labels(options.labels_per_class, seed=0)
    parts = {name: dataset.read(name, raw=True) for name in ("train", "validation", "test")}
    train = {name: jnp.asarray(parts["train"][name]) for name in ("image", "label", "index")}
    heldout = {
        name: (jnp.asarray(parts[name]["image"]), parts[name]["label"])
        for name in ("validation", "test")
    }
    model = network(options.teacher, classes)
    count = 2 if "multi-teacher" in options.methods else 1
    frozen = [teacher_variables(options, model, full, seed) for seed in range(count)]

    @jax.jit
    def outputs(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        found = model.apply(*variables, kd.augment.to_float(images))[0]
        return {name: x for name, x in found.items() if hasattr(x, "shape")}

    def logits(variables: Any, images: jax.Array) -> np.ndarray:
        return in_chunks(lambda x: outputs(variables, x)["logits"], images)

    answers = [logits(variables, train["image"]) for variables in frozen]
    label = parts["train"]["label"]
    train["target"] = jnp.asarray(np.where(label >= 0, label, answers[0].argmax(-1)))
    right = [
        float(np.mean(logits(variables, heldout["test"][0]).argmax(-1) == heldout["test"][1]))
        for variables in frozen
    ]
    shapes = jax.eval_shape(outputs, frozen[0], train["image"])
    size = sum(x.size * x.dtype.itemsize for x in shapes.values())
    if options.augmentation != "none" or size > STORED:
        return Task(train, heldout, model, (model,) * (count - 1), frozen, right), classes
    stored = in_chunks(lambda images: outputs(frozen[0], images), train["image"])
    train |= {f"teacher_{name}": jnp.asarray(x) for name, x in stored.items()}
    train |= {f"logits_{i}": jnp.asarray(x) for i, x in enumerate(answers) if i}
    first = from_batch(stored, model.apply(*frozen[0], scaled(full)[:1])[0])
    others = tuple(kd.from_batch(logits=f"logits_{i}") for i in range(1, count))
    return Task(train, heldout, first, others, [({}, {})] * count, right), classes


def from_batch(stored: Mapping[str, Any], outputs: Mapping[str, Any]) -> kd.Model:
    """A teacher of stored outputs; its exposed parameters are constants of the program."""
    named: dict[str, Any] = {name: f"teacher_{name}" for name in stored}
    for name in outputs.keys() - stored.keys():
        named[name] = lambda batch, value=outputs[name]: value
    return kd.from_batch(**named)


def teacher_variables(options: argparse.Namespace, model: kd.Model, data: Any, seed: int) -> Any:
    """Of a teacher trained on all labels; kept beside the results."""
    file = Path(options.out) / f"teacher_{seed}.npz"
    key, x = jax.random.key(seed), jnp.asarray(scaled(data)[:1], jnp.float32)
    shapes = jax.eval_shape(model.init, key, x)
    if file.is_file():
        with np.load(file) as kept:
            leaves = [jnp.asarray(kept[str(i)]) for i in range(len(kept.files))]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    size, steps = options.batch_size, options.teacher_steps
    terms = {"hard": (1.0, kd.terms.hard_labels())}
    method = kd.distill(model, None, terms, augment=augmentation(options.augmentation))
    rate = optax.cosine_decay_schedule(2e-3, steps)
    learner = kd.minimize(method, optax.adamw(rate, weight_decay=1e-3))
    data = {name: jnp.asarray(data[name]) for name in ("image", "label", "index")}
    state = jax.jit(learner.init)(key, {name: x[:size] for name, x in data.items()})

    def update(state: Any, data: Any, rows: jax.Array) -> Any:
        return learner.update(state, {name: x[rows] for name, x in data.items()})[0]

    update = jax.jit(update, donate_argnums=0)
    random = np.random.default_rng(seed)
    for _ in range(steps):
        state = update(state, data, random.choice(len(data["label"]), size, replace=False))
    variables = student_of(state)
    leaves = jax.device_get(jax.tree.leaves(variables))
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **{str(i): x for i, x in enumerate(leaves)})
    return variables
