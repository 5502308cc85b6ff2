"""Weak-to-strong on real images: a strong student trained on the labels of a weak model.

    python benchmarks/weak_to_strong_digits.py                      # digits, half a minute
    python benchmarks/weak_to_strong_digits.py --frozen             # only the head is trained
    python benchmarks/weak_to_strong_digits.py --frozen --data mnist.npz --out runs/mnist

What is claimed, for each of three weak models and mean accuracies over at least five seeds:

- the student beats its teacher: trained on a weak model's labels it is better than that model;
- it does not beat strong labels: the same student trained on as many true labels is better;
- so the performance gap recovered, PGR = (err_weak - err_student) / (err_weak - err_standard),
  lies in (0, 1). It is of the means; its standard error is a jackknife over seeds.

These are three statements, of which "weak-to-strong" often stands for the second alone.

Source: M. E. Ildiz, H. A. Gozeten, E. O. Taga, M. Mondelli, S. Oymak, "High-dimensional Analysis of
Knowledge Distillation: Weak-to-Strong Generalization and Scaling Laws", ICLR 2025, Fig. 2a. There
the student is a pretrained ResNet-50, the weak models are three 3-layer CNNs, the data CIFAR-10,
and no code was released. This is a stand-in that has the same roles and runs in seconds, not a
reproduction: it can agree with the figure in what beats what, not in any number.

- Strong: a perceptron 64-128-128-10 whose hidden layers, the body, are pretrained without labels
  for 1,000 Adam steps: by how many quarter turns was a training image rotated? With a new head it
  is then trained for 400 steps (batch 32, learning rate 1e-3, cosine) on n images.
- Weak: perceptrons of widths 16, 6 and 3 (big, medium, small), trained for 1,000 steps (learning
  rate 5e-3, cosine) on the true labels of 300 images. The n images are never among these.
- Standard: the true labels of the n images. Otherwise the weak model's: its probabilities (soft,
  temperature 1) or its most likely class (hard). For one seed and n, all students have the same
  head at the start and the same batches.

With --frozen the body stays as pretrained and only a linear head on its hidden layers is trained,
from zero and at learning rate 1e-2: the linear model of the theory, on learned features. The body
is 512-512 there, so that there are more features (1,024) than images.

The test split is the same for all seeds, so the errors are those of training. What the sources
above leave open (He's initial weights; the frozen body's width, layers and learning rate) was
chosen by the accuracy of the standard student on images held out of the training split. It matters:
with the smaller initial weights of kdjax.models.MLP the strong student learns too little in 400
steps, and with labels from big it stays below its teacher.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _compare import machine
from _theory import command, keep, parser, rows, tidy
from _theory import verdict as judge
from tqdm.auto import tqdm

import kdjax as kd
from kdjax.experiments.measures import Estimate, estimate, gain

WIDTHS = {"big": 16, "medium": 6, "small": 3}
KINDS = ("soft", "hard")
STRONG = (128, 128)
FROZEN_STRONG = (512, 512)
BATCH = 32
HEAD_RATE = 1e-2
COLOURS = {"standard": "black", "big": "#0072B2", "medium": "#E69F00", "small": "#CC79A7"}
QUICK = {
    "seeds": 2, "rows": [20, 60], "weak_rows": 40, "pretrain_steps": 20, "weak_steps": 60,
    "steps": 30,
}  # fmt: skip

# Test accuracy on digits, at the default settings and over six seeds, of another implementation of
# this stand-in (its own split, initialisation and random numbers). The paper gives no such numbers.
REFERENCE: Mapping[str, Mapping[Any, float]] = {
    "standard": {50: 0.804, 100: 0.900, 300: 0.945, 900: 0.955},
    "big, soft": {50: 0.808, 100: 0.898, 300: 0.930, 900: 0.936, "weak": 0.926},
    "big, hard": {50: 0.780, 100: 0.887, 300: 0.922, 900: 0.933, "weak": 0.926},
    "medium, soft": {50: 0.752, 100: 0.829, 300: 0.853, 900: 0.864, "weak": 0.821},
    "medium, hard": {50: 0.714, 100: 0.818, 300: 0.853, 900: 0.872, "weak": 0.821},
    "small, soft": {50: 0.451, 100: 0.505, 300: 0.518, 900: 0.506, "weak": 0.484},
    "small, hard": {50: 0.458, 100: 0.510, 300: 0.526, 900: 0.532, "weak": 0.484},
}


class Task(NamedTuple):
    """The data: images [N, H, W, C], uint8 or floating in [0, 1], and integer labels [N]."""

    name: str
    classes: int
    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Programs(NamedTuple):
    """The compiled trainings. None of them takes a label of the test split.

    Attributes:
      pretrain: ``(key, images) -> params`` of the body and the rotation head; takes no labels.
      inputs: ``(params, images) -> what the student reads``: the images, or the body's features.
      weak: width name -> a training as ``student``.
      student: ``(key, start, inputs, targets, n, questions) -> logits`` of the questions, after
        training on the first n rows of inputs and targets.
    """

    pretrain: Callable[..., Any]
    inputs: Callable[..., jax.Array]
    weak: Mapping[str, Callable[..., jax.Array]]
    student: Callable[..., jax.Array]


class Result(NamedTuple):
    """Test accuracies by seed: ``weak[width]`` and ``student[source][n]``."""

    weak: dict[str, list[float]]
    student: dict[str, dict[int, list[float]]]


class Gap(NamedTuple):
    """What one source of labels gives at one n; differences are paired by seed."""

    source: str
    over_weak: Estimate
    over_standard: Estimate
    recovered: Estimate

    def beats_teacher(self) -> bool:
        return self.over_weak.mean > 0

    def beats_labels(self) -> bool:
        return self.over_standard.mean >= 0

    def met(self) -> bool:
        return self.beats_teacher() and not self.beats_labels() and 0 < self.recovered.mean < 1


# Data.


def digits() -> Task:
    """The digits of scikit-learn, 1,300 for training and 497 for the test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    train = {"image": (bunch.images / 16).astype(np.float32), "label": bunch.target}
    dataset = kd.data.arrays({"train": train}, name="digits")
    return task_of(dataset.hold_out(497, name="test"))


def from_file(path: str) -> Task:
    """The training and test split of an npz file in the Keras form."""
    return task_of(kd.data.npz(path, validation=0))


def task_of(dataset: kd.data.Dataset) -> Task:
    """The training and test split of a data set with square images."""
    train, test = (dataset.read(split, raw=True) for split in ("train", "test"))
    for part in (train, test):
        if "image" not in part or dataset.shape[0] != dataset.shape[1]:
            raise ValueError(f"data must hold square images to turn, got shape {dataset.shape}.")
        if (part["label"] < 0).any():
            raise ValueError("data must have a label for every image, got images without.")
    pairs = (train["image"], train["label"], test["image"], test["label"])
    return Task(dataset.name, dataset.num_classes, *pairs)


# Training.


def quarter_turns(key: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Turns each image by 0 to 3 quarters, which is the label from now on."""
    images = kd.augment.to_float(batch["image"])
    turns = jax.random.randint(key, (len(images),), 0, 4)
    turned = jnp.stack([jnp.rot90(images, k, axes=(1, 2)) for k in range(4)])
    return {"image": turned[turns, jnp.arange(len(images))], "label": turns}


def perceptron(classes: int, widths: tuple[int, ...]) -> kd.Model:
    """ReLU hidden layers, the ``body``, and a linear ``head``.

    The output ``feature`` is all hidden layers side by side. The weights are He's: those of
    `kdjax.models.MLP`, as small as torch's, learn too little in so few updates.
    """
    he, lecun = jax.nn.initializers.he_normal(), jax.nn.initializers.lecun_normal()

    def init(key: jax.Array, x: jax.Array) -> dict[str, Any]:
        sizes = (math.prod(x.shape[1:]), *widths)
        *keys, head_key = jax.random.split(key, len(sizes))
        body = [
            {"kernel": he(k, shape), "bias": jnp.zeros((1, shape[1]))}
            for k, shape in zip(keys, itertools.pairwise(sizes), strict=True)
        ]
        head = {"kernel": lecun(head_key, (sizes[-1], classes)), "bias": jnp.zeros((1, classes))}
        return {"body": body, "head": head}

    def apply(params: Mapping[str, Any], x: jax.Array) -> dict[str, jax.Array]:
        hidden = [x.reshape(len(x), -1)]
        for layer in params["body"]:
            hidden.append(jax.nn.relu(hidden[-1] @ layer["kernel"] + layer["bias"]))
        logits = hidden[-1] @ params["head"]["kernel"] + params["head"]["bias"]
        return {"feature": jnp.concatenate(hidden[1:], -1), "logits": logits}

    return kd.from_fn(init, apply)


def linear_head(classes: int) -> kd.Model:
    """Logits that are linear in the entry ``feature``."""

    def init(key: jax.Array, x: jax.Array) -> dict[str, jax.Array]:
        # The loss is convex, so that zeros are as good as any start.
        return {"kernel": jnp.zeros((x.shape[-1], classes)), "bias": jnp.zeros((1, classes))}

    def apply(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
        return x @ params["kernel"] + params["bias"]

    return kd.from_fn(init, apply, inputs="feature")


def trained(learner: kd.Learner, state: kd.State, batches: Callable[..., Any], rows: Any) -> Any:
    """The parameters after one update for each row of ``rows``, in one loop on the device."""

    def one(state: kd.State, chosen: jax.Array) -> tuple[kd.State, None]:
        return learner.update(state, batches(chosen))[0], None

    return jax.lax.scan(one, state, rows)[0].params["student"]


def pretraining(body: kd.Model, steps: int) -> Callable[..., Any]:
    """The program that pretrains the body; see `Programs`."""
    method = kd.distill(
        body,
        None,
        {"turns": (1.0, kd.terms.hard_labels())},
        augment=quarter_turns,
    )
    learner = kd.minimize(method, optax.adam(optax.cosine_decay_schedule(1e-3, steps)))

    @jax.jit
    def pretrain(key: jax.Array, images: jax.Array) -> Any:
        def batches(rows: jax.Array) -> dict[str, jax.Array]:
            return {"image": images[rows]}

        init_key, rows_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (steps, BATCH), 0, len(images))
        state = learner.init(init_key, batches(rows[0]))
        return trained(learner, state, batches, rows)

    return pretrain


def training(model: kd.Model, steps: int, rate: float) -> Callable[..., jax.Array]:
    """The program that trains a classifier and asks it; see `Programs`.

    Targets are probabilities, so that true, soft and hard labels share one program; the gradient is
    that of the divergence from them.
    """
    method = kd.distill(model, None, {"labels": (1.0, kd.terms.hard_labels())})
    learner = kd.minimize(method, optax.adam(optax.cosine_decay_schedule(rate, steps)))

    @jax.jit
    def train(
        key: jax.Array,
        start: Mapping[str, Any],
        inputs: jax.Array,
        targets: jax.Array,
        n: jax.Array,
        questions: jax.Array,
    ) -> jax.Array:
        def batches(rows: jax.Array) -> dict[Any, jax.Array]:
            return {model.inputs: inputs[rows], "label": targets[rows]}

        init_key, rows_key = jax.random.split(key)
        # n is an argument like any other: what is drawn changes with it, not the program.
        rows = jax.random.randint(rows_key, (steps, BATCH), 0, n)
        state = learner.init(init_key, batches(rows[0]))
        state = state._replace(params={"student": {**state.params["student"], **start}})
        params = trained(learner, state, batches, rows)
        return model.apply(params, state.extra["student"], questions)[0]["logits"]

    return train


def make_programs(classes: int, options: argparse.Namespace) -> Programs:
    """The programs for these options; each is compiled once, at its first call."""
    strong = FROZEN_STRONG if options.frozen else STRONG
    body = perceptron(4, strong)

    def features(params: Any, images: jax.Array) -> jax.Array:
        return body.apply(params, {}, images)[0]["feature"]

    network = linear_head(classes) if options.frozen else perceptron(classes, strong)
    return Programs(
        pretrain=pretraining(body, options.pretrain_steps),
        inputs=jax.jit(features if options.frozen else lambda params, images: images),
        weak={
            name: training(perceptron(classes, (width, width)), options.weak_steps, 5e-3)
            for name, width in WIDTHS.items()
        },
        student=training(network, options.steps, HEAD_RATE if options.frozen else 1e-3),
    )


class Answers(NamedTuple):
    """Predicted classes of the test images: ``weak[width]`` and ``student[source][n]``."""

    weak: dict[str, np.ndarray]
    student: dict[str, dict[int, np.ndarray]]


def answers(
    task: Task,
    programs: Programs,
    options: argparse.Namespace,
    seed: int,
    done: Callable[[], object] = lambda: None,
) -> Answers:
    """Trains everything for one seed and asks it for the classes of the test images."""
    m, most = options.weak_rows, max(options.rows)
    order = np.random.default_rng(seed).permutation(len(task.images))[: m + most]
    images = kd.augment.to_float(jnp.asarray(task.images[order]))
    true = jax.nn.one_hot(task.labels[order], task.classes)
    test = kd.augment.to_float(jnp.asarray(task.test_images))
    body_key, student_key, *weak_keys = jax.random.split(jax.random.key(seed), 2 + len(WIDTHS))

    params = programs.pretrain(body_key, jnp.asarray(task.images))
    done()
    start = {} if options.frozen else {"body": params["body"]}
    inputs = programs.inputs(params, images[m:])
    questions = programs.inputs(params, test)

    targets, weak = {"standard": true[m:]}, {}
    for key, (name, train) in zip(weak_keys, programs.weak.items(), strict=True):
        asked = jnp.concatenate([images[m:], test])
        logits = train(key, {}, images[:m], true[:m], m, asked)
        targets[f"{name}, soft"] = jax.nn.softmax(logits[:most])
        targets[f"{name}, hard"] = jax.nn.one_hot(logits[:most].argmax(-1), task.classes)
        weak[name] = np.asarray(logits[most:].argmax(-1))
        done()

    student: dict[str, dict[int, np.ndarray]] = {source: {} for source in targets}
    for source, target in targets.items():
        for n in options.rows:
            logits = programs.student(student_key, start, inputs, target, n, questions)
            student[source][n] = np.asarray(logits.argmax(-1))
            done()
    return Answers(weak, student)


def measure(task: Task, options: argparse.Namespace) -> Result:
    """Test accuracies over the seeds."""

    def accuracy(predicted: np.ndarray) -> float:
        return float((predicted == task.test_labels).mean())

    programs = make_programs(task.classes, options)
    each = 1 + len(WIDTHS) + (1 + len(KINDS) * len(WIDTHS)) * len(options.rows)
    with tqdm(total=options.seeds * each, unit="training", disable=None) as bar:
        found = [answers(task, programs, options, s, bar.update) for s in range(options.seeds)]
    return Result(
        {name: [accuracy(one.weak[name]) for one in found] for name in WIDTHS},
        {
            source: {n: [accuracy(one.student[source][n]) for one in found] for n in options.rows}
            for source in found[0].student
        },
    )


# What follows from the accuracies.


def gaps(result: Result, n: int) -> list[Gap]:
    """The three statements at one n, for each width and kind of labels."""
    standard = result.student["standard"][n]
    found = []
    for width in WIDTHS:
        for kind in KINDS:
            source, weak = f"{width}, {kind}", result.weak[width]
            student = result.student[source][n]
            recovered = gap_recovered(weak, student, standard)
            found.append(Gap(source, gain(weak, student), gain(standard, student), recovered))
    return found


def gap_recovered(
    weak: Sequence[float], student: Sequence[float], standard: Sequence[float]
) -> Estimate:
    """PGR of the mean accuracies, and its jackknife error over seeds; NaN where nothing is left.

    A mean of the ratios of the seeds would be ruined by one seed with a small gap.
    """
    values = np.asarray([weak, student, standard], np.float64)

    def ratio(mean: np.ndarray) -> float:
        gap = mean[2] - mean[0]
        return float((mean[1] - mean[0]) / gap) if gap > 0 else math.nan

    seeds = values.shape[1]
    if seeds == 1:
        return Estimate(ratio(values[:, 0]), math.nan, ())
    left = np.array([ratio(np.delete(values, i, axis=1).mean(1)) for i in range(seeds)])
    error = math.sqrt((seeds - 1) * left.var())
    return Estimate(ratio(values.mean(1)), error, tuple(left.tolist()))


# What is printed and kept.


def accuracy_table(result: Result, reference: Mapping[str, Mapping[Any, float]]) -> str:
    """Accuracies in per cent, the reference in brackets."""
    sizes = list(result.student["standard"])

    def cell(source: str, where: Any, values: Sequence[float]) -> str:
        known = reference.get(source, {}).get(where)
        return shown(estimate(values)) + ("" if known is None else f" [{100 * known:.1f}]")

    cells = []
    for source, by_size in result.student.items():
        weak = result.weak.get(source.split(",")[0])
        last = "" if weak is None else cell(source, "weak", weak)
        cells.append([source, *(cell(source, n, by_size[n]) for n in sizes), last])
    return rows(["labels from", *(f"n = {n}" for n in sizes), "the weak model"], cells)


def gap_table(found: Sequence[Gap], n: int) -> str:
    """The three statements, differences in points."""
    columns = (
        f"n = {n}, labels from", "student - its teacher", "beats its teacher",
        "student - standard", "beats strong labels", "PGR", "in (0, 1)",
    )  # fmt: skip
    cells = []
    for gap in found:
        error = "" if math.isnan(gap.recovered.error) else f" ± {gap.recovered.error:.2f}"
        over_weak, over_standard = shown(gap.over_weak, "+"), shown(gap.over_standard, "+")
        cells.append(
            [gap.source, over_weak, said(gap.beats_teacher()), over_standard]
            + [said(gap.beats_labels()), f"{gap.recovered.mean:.2f}{error}"]
            + [said(0 < gap.recovered.mean < 1)]
        )
    return rows(columns, cells)


def exceptions(result: Result) -> str:
    """Where the student beats strong labels, over all n."""
    sizes = result.student["standard"]
    found = [(n, gap) for n in sizes for gap in gaps(result, n) if gap.beats_labels()]
    listed = [f"n = {n}, {gap.source} ({shown(gap.over_standard, '+')})" for n, gap in found]
    return "Weak labels beat true ones at: " + ("; ".join(listed) or "no n") + "."


def verdict(found: Sequence[Gap], seeds: int) -> str:
    """Whether what is claimed holds, in one line."""
    if seeds < 5:
        return f"Not judged: at least 5 seeds are asked for, got {seeds}."
    claim = "the student beats its teacher, standard beats the student, PGR lies in (0, 1)"
    missed = [gap.source for gap in found if not gap.met()]
    line = judge(missed, claim)
    if missed and all(source.startswith("small") for source in missed):
        line += " The small width alone decides little: its accuracy varies most between seeds."
    close = [g.source for g in found if abs(g.over_weak.mean) < 2 * g.over_weak.error]
    if close:
        line += f" Within two standard errors of its teacher: {'; '.join(close)}."
    return line


def shown(value: Estimate, sign: str = "") -> str:
    """Mean and standard error in per cent."""
    error = "" if math.isnan(value.error) else f" ± {100 * value.error:.1f}"
    return f"{100 * value.mean:{sign}.1f}{error}"


def said(true: bool) -> str:
    return "yes" if true else "no"


def draw(figure: Any, result: Result, found: Sequence[Gap], title: str) -> None:
    """Accuracy against n for each source of labels, and PGR at the largest n."""
    figure.set_size_inches(11, 5)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    draw_accuracies(left, result)
    left.set_title(title, fontsize=10.5)
    draw_recovered(right, found)
    most = max(result.student["standard"])
    right.set_title(f"n = {most:,}; 0: as its teacher, 1: as standard", fontsize=10.5)

    def line(label: str, **looks: Any) -> Any:
        return left.plot([], [], label=label, **looks)[0]

    names = {"standard": "true labels", **{width: f"labels of {width}" for width in WIDTHS}}
    handles = [line(name, color=COLOURS[key], lw=2) for key, name in names.items()]
    handles += [line(kind, color="#555555", **looks(kind)) for kind in KINDS]
    handles.append(line("the weak model itself", color="#555555", linestyle=":"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    for axes in (left, right):
        tidy(axes, grid="y")


def looks(kind: str) -> dict[str, Any]:
    if kind == "hard":
        return {"linestyle": "--", "marker": "s", "markersize": 4.5, "markerfacecolor": "white"}
    return {"linestyle": "-", "marker": "o", "markersize": 4.5}


def draw_accuracies(axes: Any, result: Result) -> None:
    sizes = list(result.student["standard"])
    for source, by_size in result.student.items():
        width, _, kind = source.partition(", ")
        points = [estimate(by_size[n]) for n in sizes]
        # Soft and hard a little apart, so that their error bars don't cover each other.
        shift = {"soft": 0.98, "hard": 1.02}.get(kind, 1.0)
        axes.errorbar(
            [n * shift for n in sizes],
            [100 * point.mean for point in points],
            [100 * bar(point) for point in points],
            color=COLOURS[width],
            capsize=2.5,
            **looks(kind),
        )
    for width, values in result.weak.items():
        axes.axhline(100 * estimate(values).mean, color=COLOURS[width], linestyle=":", lw=1.3)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.minorticks_off()
    axes.set_xlabel("n, images that the student is trained on")
    axes.set_ylabel("test accuracy (%)")


def draw_recovered(axes: Any, found: Sequence[Gap]) -> None:
    colours = [COLOURS[width] for width in WIDTHS]
    for kind, shift in zip(KINDS, (-0.18, 0.18), strict=True):
        chosen = [gap.recovered for gap in found if gap.source.endswith(kind)]
        axes.bar(
            [x + shift for x in range(len(WIDTHS))],
            [value.mean for value in chosen],
            0.33,
            yerr=[bar(value) for value in chosen],
            capsize=3,
            color=colours if kind == "soft" else "white",
            edgecolor=colours,
            linestyle=looks(kind)["linestyle"],
            linewidth=1.3,
        )
    axes.set_xticks(range(len(WIDTHS)), [f"{name} ({width})" for name, width in WIDTHS.items()])
    axes.axhline(0, color="black", lw=0.8)
    axes.axhline(1, color="black", linestyle=":", lw=1)
    axes.set_xlabel("weak model (width)")
    axes.set_ylabel("performance gap recovered")


def bar(value: Estimate) -> float:
    """The length of an error bar; none for a single seed."""
    return 0.0 if math.isnan(value.error) else value.error


def parse(argv: Sequence[str]) -> argparse.Namespace:
    found = parser(__doc__)
    add = found.add_argument
    add("--data", default="digits", help="digits, or a PATH.npz with x_train, y_train, ...")
    add("--frozen", action="store_true", help="train the student's head only")
    add("--seeds", type=int, default=6, help="default 6; fewer than 5 are not judged")
    add("--rows", type=int, nargs="+", default=[50, 100, 300, 900], metavar="n",
        help="images that the student is trained on")  # fmt: skip
    add("--weak-rows", type=int, default=300, help="true labels that weak models are trained on")
    add("--pretrain-steps", type=int, default=1000)
    add("--weak-steps", type=int, default=1000)
    add("--steps", type=int, default=400, help="of the student")
    options = found.parse_args(argv)
    if options.quick:
        vars(options).update(QUICK)
    for name in ("seeds", "weak_rows", "pretrain_steps", "weak_steps", "steps"):
        if getattr(options, name) < 1:
            found.error(f"--{name.replace('_', '-')} must be at least 1")
    options.rows = sorted(set(options.rows))
    if options.rows[0] < 1:
        found.error("--rows must be at least 1")
    return options


def is_stand_in(options: argparse.Namespace) -> bool:
    """Whether the reference is of the same setting, but for n and seeds."""
    usual = vars(parse([]))
    return all(
        getattr(options, name) == usual[name]
        for name in ("data", "frozen", "weak_rows", "pretrain_steps", "weak_steps", "steps")
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints the tables and the verdict, keeps figure and numbers."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    task = digits() if options.data == "digits" else from_file(options.data)
    most, wanted = max(options.rows), options.weak_rows + max(options.rows)
    if wanted > len(task.images):
        raise ValueError(
            f"rows and weak_rows must ask for at most the {len(task.images)} training images of "
            f"{task.name} together, got {wanted}."
        )
    line = command("weak_to_strong_digits", arguments)
    part = "frozen body, linear head" if options.frozen else "whole network"
    print(
        f"`{line}`, {machine()}; {task.name}, {part}, {len(task.images)} training and "
        f"{len(task.test_images)} test images, {options.seeds} seeds; test accuracy in per cent"
    )
    started = time.perf_counter()
    result = measure(task, options)
    seconds = time.perf_counter() - started
    reference = REFERENCE if is_stand_in(options) else {}
    if reference:
        print("[in brackets: another implementation of this stand-in, not the paper's figures]")
    found = gaps(result, most)
    said_last = verdict(found, options.seeds)
    print("", accuracy_table(result, reference), sep="\n")
    print("", gap_table(found, most), sep="\n")
    print(f"\n{exceptions(result)}\n{said_last} ({seconds:.0f} s)", flush=True)
    numbers = {
        "command": line, "seconds": seconds, "verdict": said_last, "accuracy": result._asdict(),
        "gaps": {gap.source: {**gap._asdict(), "met": gap.met()} for gap in found},
    }  # fmt: skip
    title = f"{task.name}, {part}; mean ± standard error, {options.seeds} seeds"
    keep(options.out, "weak_to_strong", numbers, lambda fig: draw(fig, result, found, title))


if __name__ == "__main__":
    main()
