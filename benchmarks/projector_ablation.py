"""Projector distillation, ablated: exponent x normalisation x projector x distance, small.

    python benchmarks/projector_ablation.py                    # digits, minutes on two cores
    python benchmarks/projector_ablation.py --data mnist.npz --seeds 3 --steps 1000
    python benchmarks/projector_ablation.py --data cifar10.npz --teacher resnet20 \\
        --student resnet8 --augmentation crop_flip --labels-per-class 0 --batch-size 128 \\
        --steps 12000 --teacher-steps 24000 --rate 0.1 --weights 1 \\
        --projectors linear --out runs/cifar10    # on an accelerator

The student is trained on ``cross-entropy + weight * distance``: its last features before the
classifier are projected to the teacher's width, both sides are normalised, and compared. What is
asked is which of the trends that were published for ImageNet show here. None of them is required:
the answers are printed, with standard errors, and kept.

- One teacher (seed 0) sees all labels. The students see `--labels-per-class` of each class (default
  10; 0 for all); the other training images count in the distance alone. SGD with momentum 0.9,
  weight decay 5e-4 (projector included), cosine learning rate, gradients clipped at norm 5.
- All students of one seed start from the same parameters and see the same batches, so that
  differences are paired by seed. Standard errors are over seeds, so not over teachers.
- Every setting, the reference with the teacher's logits too, is run with each of `--weights`. The
  one with the best mean accuracy on the validation split is reported, with its accuracy on the test
  split.
- Published orders of normalisations are for a plain distance (mse here); LogSum is asked as well.
  For l2 the weight multiplies the squared distance rather than its mean over channels.
- A whole training is one `jax.lax.scan`, and a sweep is a `jax.lax.map` over trainings. Exponent,
  weight and seed are traced, normalisation and distance are picked by `jax.lax.switch`: one program
  for each projector.

Collapse is measured at the end of training, on the training images: how many singular values of
the projector's (first) kernel have grown, index by index; the logarithm of the smallest; student
units that no image activates; the input-output correlation of the projector before and after; and,
on the test images, debiased linear CKA of the student's and the teacher's features.

Source: R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
Distillation", AAAI 2024, tables 1 (normalisation), 2 (exponent), 9 (distance; numbered as in
chapter 6 of the first author's thesis), figures 2 (singular values) and 3 (projectors). Their
networks, data and schedules are others: nothing here can agree or disagree with a number of theirs.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _compare import machine
from _theory import command, keep, parser, rows, tidy
from tqdm.auto import tqdm

import kdjax as kd
from kdjax.experiments.measures import Estimate, estimate, gain

ALPHAS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
SOME_ALPHAS = (1.0, 2.0, 4.0)
NORMS = ("none", "l2", "group", "batch")
PROJECTORS = ("linear", "mlp-64", "mlp-256")
TEMPERATURE = 4.0
QUICK = {
    "seeds": 2, "steps": 12, "teacher_steps": 20, "weights": [1.0], "projectors": ["linear"],
}  # fmt: skip
COLOURS = {"none": "#888888", "l2": "#0072B2", "group": "#009E73", "batch": "#E69F00"}
MEASURED = 2000  # images that correlation, CKA and dead units are measured on, at most


class Setting(NamedTuple):
    """One cell of the ablation; ``alpha`` is the exponent of the distance, 2 for mse."""

    projector: str
    norm: str
    distance: str
    alpha: float

    def __str__(self) -> str:
        return f"{self.projector}, {self.norm}, {self.distance}, alpha {self.alpha:g}"


class Task(NamedTuple):
    """Arrays on the device: images, labels (-1 where hidden), and the teacher's outputs."""

    train: dict[str, jax.Array]
    validation: dict[str, jax.Array]
    test: dict[str, jax.Array]
    teacher: Any
    teacher_accuracy: float


# What is compared: (norm, distance) pairs are the branches of one program.
PAIRS = (
    *((norm, distance) for distance in ("log_sum", "mse") for norm in NORMS),
    ("batch", "correlation"),
    ("batch", "correlation_log_sum"),
)


def settings(projectors: Sequence[str], alphas: Sequence[float]) -> list[Setting]:
    """The whole product, less what means nothing: correlations of features without batch norm."""
    found = []
    for projector in projectors:
        for norm, distance in PAIRS:
            if distance == "log_sum":
                every = norm == "batch" and projector == projectors[0]
                chosen = alphas if every else [a for a in alphas if a in SOME_ALPHAS]
            else:
                chosen = {"mse": (2.0,), "correlation": (2.0, 4.0)}.get(distance, (4.0,))
            found += [Setting(projector, norm, distance, alpha) for alpha in chosen]
    return found


# Models and data.


def network(name: str, classes: int) -> kd.Model:
    """``mlp-64-32`` or a constructor of `kdjax.models`, with its last features tapped."""
    kind, *widths = name.split("-")
    if kind == "mlp" and widths:
        module = kd.models.MLP(classes, features=tuple(int(width) for width in widths))
    else:
        constructors = {"convnet": kd.models.ConvNet}
        make = constructors.get(name) or getattr(kd.models, name, None)
        if make is None:
            raise ValueError(f"networks must be mlp-WIDTH-... or of kdjax.models, got {name!r}.")
        module = make(classes)
    return kd.from_linen(module, taps={"feature": "pool"}, inputs=scaled)


def scaled(batch: Mapping[str, jax.Array]) -> jax.Array:
    return kd.augment.to_float(batch["image"])


def augmentation(name: str) -> Callable[..., Any] | None:
    if name == "none":
        return None
    return kd.augment.compose(kd.augment.to_float, kd.augment.random_crop, kd.augment.random_flip)


def answers(model: kd.Model, params: Any, extra: Any, images: jax.Array) -> dict[str, jax.Array]:
    """Logits and features in evaluation mode, in pieces where there are many images."""

    def forward(images: jax.Array) -> dict[str, jax.Array]:
        return model.apply(params, extra, kd.augment.to_float(images))[0]

    if len(images) <= MEASURED:
        return forward(images)
    one = lambda image: jax.tree.map(lambda x: x[0], forward(image[None]))  # noqa: E731
    return jax.lax.map(one, images, batch_size=1000)


def optimizer(options: argparse.Namespace) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(5.0),
        optax.add_decayed_weights(options.decay),
        optax.sgd(optax.cosine_decay_schedule(options.rate, options.steps), momentum=0.9),
    )


def scan(learner: kd.Learner, key: jax.Array, data: Any, steps: int, size: int, frozen: Any) -> Any:
    """The State before and after ``steps`` updates on random batches of ``data``."""
    init_key, rows_key = jax.random.split(key)

    def batch(rows: jax.Array) -> Any:
        return jax.tree.map(lambda x: x[rows], data)

    def one(state: kd.State, key: jax.Array) -> tuple[kd.State, None]:
        rows = jax.random.randint(key, (size,), 0, len(data["label"]))
        return learner.update(state, batch(rows), frozen)[0], None

    start = learner.init(init_key, batch(jnp.arange(size)), frozen)
    return start, jax.lax.scan(one, start, jax.random.split(rows_key, steps))[0]


def prepare(options: argparse.Namespace) -> Task:
    """Reads the data and trains the teacher on all labels."""
    dataset = kd.data.digits() if options.data == "digits" else kd.data.npz(options.data)
    full = dataset
    if options.labels_per_class:
        dataset = dataset.keep_labels(options.labels_per_class, seed=0)

    def read(source: kd.data.Dataset, split: str) -> dict[str, jax.Array]:
        part = source.read(split, raw=True)
        found = {name: jnp.asarray(part[name]) for name in ("image", "label")}
        return found | {"index": jnp.arange(len(part["label"]))}  # what augmentation draws from

    model = network(options.teacher, dataset.num_classes)
    method = kd.distill(
        model, None, {"hard": (1.0, kd.terms.hard_labels())},
        augment=augmentation(options.augmentation),
    )  # fmt: skip
    schedule = optax.cosine_decay_schedule(2e-3, options.teacher_steps)
    learner = kd.minimize(method, optax.adamw(schedule, weight_decay=1e-3))
    splits = {name: read(dataset, name) for name in ("train", "validation", "test")}

    @jax.jit
    def train(data: Any, images: Any) -> Any:
        steps, size = options.teacher_steps, options.batch_size
        _, state = scan(learner, jax.random.key(0), data, steps, size, None)
        variables = state.params["student"], state.extra["student"]
        return variables, [answers(model, *variables, x) for x in images]

    images = [part["image"] for part in splits.values()]
    variables, outputs = train(read(full, "train"), images)
    for part, found in zip(splits.values(), outputs, strict=True):
        part.update({f"teacher_{name}": value for name, value in found.items()})
    test = splits["test"]
    right = float(kd.metrics.accuracy(test["teacher_logits"], test["label"]))
    return Task(**splits, teacher=variables, teacher_accuracy=right)


# Training.


def either(terms: Sequence[kd.Term], which: jax.Array, scales: Sequence[float]) -> kd.Term:
    """The term of that (traced) index, scaled. All must have parameters of the same shapes."""

    def loss(*arguments: Any, axis_name: Any = None, **options: Any) -> jax.Array:
        def value(term: kd.Term, scale: float) -> jax.Array:
            given = {"axis_name": axis_name} if term.coupled else {}
            return scale * jnp.mean(term.loss(*arguments, **options, **given))

        pairs = zip(terms, scales, strict=True)
        return jax.lax.switch(which, [partial(value, *pair) for pair in pairs])

    return kd.Term(terms[0].init, loss, coupled=True)


def hidden(projector: str) -> tuple[int, ...]:
    return () if projector == "linear" else tuple(int(w) for w in projector.split("-")[1:])


def projected(tparams: Mapping[str, Any], features: jax.Array) -> jax.Array:
    """What the projector makes of features, before the normalisation."""
    for i in range(len(tparams)):
        layer = tparams[str(i)]
        features = jax.nn.relu(features) if i else features
        features = features @ layer["kernel"] + layer["bias"][None]
    return features


def sweep(task: Task, options: argparse.Namespace, projector: str | None) -> Callable[..., Any]:
    """``(task, which, alpha, weight, keys) -> measures`` of trainings, in one program.

    Args:
      task: the data, for its shapes.
      options: the command line's.
      projector: None for the reference that distils logits; ``which`` does nothing then, and
        weight 0 is the student alone.
    """
    classes = task.train["teacher_logits"].shape[-1]
    student = network(options.student, classes)
    augment = augmentation(options.augmentation)
    live = augment is not None  # the teacher must see what the student sees
    stored = kd.from_batch(logits="teacher_logits", feature="teacher_feature")
    teacher = network(options.teacher, classes) if live else stored

    def distance(which: jax.Array, alpha: jax.Array) -> kd.Term:
        if projector is None:
            return kd.terms.soft_labels(temperature=TEMPERATURE)
        options = {"hidden": hidden(projector), "alpha": alpha}
        # Of vectors of length 1 the squared distance, as its mean over channels vanishes with them.
        width = task.train["teacher_feature"].shape[-1]
        scales = [width if pair == ("l2", "mse") else 1 for pair in PAIRS]
        terms = [
            kd.terms.projector("feature", "feature", norm=norm, loss=loss, **options)
            for norm, loss in PAIRS
        ]
        return either(terms, which, scales)

    def train(task: Task, run: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        which, alpha, weight, key = run
        terms = {
            "hard": (1.0, kd.terms.hard_labels()),
            "distance": (weight, distance(which, alpha)),
        }
        learner = kd.minimize(
            kd.distill(student, teacher, terms, augment=augment), optimizer(options)
        )
        frozen = task.teacher if live else None
        ends = scan(learner, key, task.train, options.steps, options.batch_size, frozen)
        return measures(student, task, *ends)

    return jax.jit(lambda task, *runs: jax.lax.map(partial(train, task), runs))


def measures(student: kd.Model, task: Task, start: kd.State, end: kd.State) -> dict[str, jax.Array]:
    """What one training gave."""

    def ask(state: kd.State, images: jax.Array) -> dict[str, jax.Array]:
        return answers(student, state.params["student"], state.extra["student"], images)

    test = ask(end, task.test["image"])
    validation = ask(end, task.validation["image"])["logits"]
    features = [ask(state, task.train["image"][:MEASURED])["feature"] for state in (start, end)]
    found = {
        "test": kd.metrics.accuracy(test["logits"], task.test["label"]),
        "validation": kd.metrics.accuracy(validation, task.validation["label"]),
        "dead": jnp.sum(jnp.max(features[1], axis=0) <= 0),
        "cka": kd.metrics.linear_cka(
            test["feature"][:MEASURED], task.test["teacher_feature"][:MEASURED], debiased=True
        ),
    }
    if "terms" not in end.params:
        return found
    for name, state, z in zip(("start", "end"), (start, end), features, strict=True):
        tparams = state.params["terms"]["distance"]
        outputs = projected(tparams, z)
        found[f"correlation_{name}"] = kd.metrics.input_output_correlation(z, outputs)
        found[f"log_singular_{name}"] = kd.metrics.log_singular_values(tparams["0"]["kernel"])
    return found


class Outcome(NamedTuple):
    """What a setting gave at the weight that validation chose; estimates over seeds."""

    weight: float
    test: Estimate
    grown: Estimate | None
    log_smallest: Estimate | None
    dead: Estimate
    before: Estimate | None
    after: Estimate | None
    cka: Estimate
    curves: dict[str, list[float]]


def outcome(found: Mapping[str, np.ndarray], weights: Sequence[float]) -> Outcome:
    """Chooses the weight by validation accuracy. ``found`` holds arrays [weights, seeds, ...]."""
    best = int(np.argmax(found["validation"].mean(1)))
    at = {name: np.asarray(value[best], np.float64) for name, value in found.items()}
    grown = smallest = before = after = None
    curves = {}
    if "log_singular_end" in at:
        start, end = at["log_singular_start"], at["log_singular_end"]
        grown, smallest = estimate((end > start).sum(-1)), estimate(end[:, -1])
        before, after = estimate(at["correlation_start"]), estimate(at["correlation_end"])
        curves = {"start": start.mean(0).tolist(), "end": end.mean(0).tolist()}
    return Outcome(
        weights[best], estimate(at["test"]), grown, smallest, estimate(at["dead"]), before, after,
        estimate(at["cka"]), curves,
    )  # fmt: skip


def measure(task: Task, options: argparse.Namespace) -> dict[Any, Outcome]:
    """All settings, and the references "student alone" and "soft labels"."""
    keys = jax.random.split(jax.random.key(1), options.seeds)
    wanted: list[Any] = settings(options.projectors, options.alphas)
    wanted += ["student alone", "soft labels"]
    each = len(options.weights) * options.seeds

    def runs(setting: Any) -> tuple[jax.Array, ...]:
        weights = np.repeat(np.asarray(options.weights, np.float32), options.seeds)
        which, alpha = 0, 4.0
        if isinstance(setting, Setting):
            which, alpha = PAIRS.index((setting.norm, setting.distance)), setting.alpha
        elif setting == "student alone":
            weights = 0 * weights
        full = jnp.full(each, which), jnp.full(each, alpha, jnp.float32)
        return *full, jnp.asarray(weights), jnp.tile(keys, len(options.weights))

    def compiled(projector: str | None) -> Any:
        return sweep(task, options, projector).lower(task, *runs("soft labels")).compile()

    # Programs of this size keep one core busy at most; two of them keep two.
    with ThreadPoolExecutor(options.workers) as pool:
        names = [*options.projectors, None]
        bar = partial(tqdm, disable=None)
        programs = dict(
            zip(names, bar(pool.map(compiled, names), "compile", len(names)), strict=True)
        )

        def train(setting: Any) -> Outcome:
            projector = setting.projector if isinstance(setting, Setting) else None
            found = jax.device_get(programs[projector](task, *runs(setting)))
            shape = len(options.weights), options.seeds
            found = {name: x.reshape(*shape, *x.shape[1:]) for name, x in found.items()}
            return outcome(found, options.weights)

        return dict(zip(wanted, bar(pool.map(train, wanted), "train", len(wanted)), strict=True))


# What is said of it.


class Trend(NamedTuple):
    """A published trend as a difference that it says is positive, paired by seed."""

    factor: str
    claim: str
    difference: Estimate
    points: bool = True

    def answer(self) -> str:
        mean, error = self.difference.mean, self.difference.error
        if len(self.difference.values) < 3:
            return "not judged"
        if math.isnan(error) or abs(mean) <= 2 * error or mean == 0:
            return "within noise"
        return "seen" if mean > 0 else "reversed"


def trends(found: Mapping[Any, Outcome], projectors: Sequence[str]) -> list[Trend]:
    """The published trends, asked of these numbers; those whose settings were not run are left."""
    first = projectors[0]
    srd = Setting(first, "batch", "log_sum", 4.0)
    base = found.get(srd)
    if base is None:
        return []
    listed: list[Trend] = []

    def add(factor: str, claim: str, low: Any, high: Any, name: str = "test") -> None:
        if low in found and high in found:
            values = [getattr(found[key], name).values for key in (low, high)]
            listed.append(Trend(factor, claim, gain(*values), name in ("test",)))

    for alpha in (1.0, 2.0):
        claim = f"accuracy: alpha 4 above alpha {alpha:g}"
        add("alpha", claim, srd._replace(alpha=alpha), srd)
    add("alpha", "accuracy: alpha 5 above alpha 4", srd, srd._replace(alpha=5.0))
    for distance, alpha in (("mse", 2.0), ("log_sum", 4.0)):
        with_norm = {n: Setting(first, n, distance, alpha) for n in NORMS}
        for low, high in (("l2", "group"), ("group", "batch")):
            pair = with_norm[low], with_norm[high]
            add("normalisation", f"accuracy: {high} above {low} ({distance})", *pair)
        for low, high in (("none", "l2"), ("l2", "batch")):
            claim = f"more singular values grow: {high} than {low} ({distance})"
            add("normalisation", claim, with_norm[low], with_norm[high], "grown")
    for projector in projectors:
        here = found[srd._replace(projector=projector)]
        assert here.before is not None
        assert here.after is not None
        fall = gain(here.after.values, here.before.values)
        listed.append(
            Trend("projector", f"correlation falls in training ({projector})", fall, False)
        )
    for projector in projectors[1:]:
        other = srd._replace(projector=projector)
        add("projector", f"correlation: {projector} below {first}", other, srd, "after")
    for claim, low in (
        ("log of correlations above their norm (power 4)", ("correlation", 4.0)),
        ("log of correlations above their norm (power 2)", ("correlation", 2.0)),
        ("log of correlations above mse", ("mse", 2.0)),
    ):
        logged = Setting(first, "batch", "correlation_log_sum", 4.0)
        add("distance", f"accuracy: {claim}", Setting(first, "batch", *low), logged)
    mse = {norm: Setting(first, norm, "mse", 2.0) for norm in NORMS}
    add("distance", "accuracy: LogSum above mse (both batch norm)", mse["batch"], srd)
    add("distance", "accuracy: mse without norm above mse with batch", mse["batch"], mse["none"])
    add("distance", "accuracy: LogSum above soft labels", "soft labels", srd)
    return listed


def shown(value: Estimate | None, scale: float = 1.0, digits: int = 2, sign: str = "") -> str:
    """Mean and standard error."""
    if value is None:
        return ""
    error = "" if math.isnan(value.error) else f" ± {scale * value.error:.{digits}f}"
    return f"{scale * value.mean:{sign}.{digits}f}{error}"


def table(found: Mapping[Any, Outcome]) -> str:
    """One row for each setting."""
    columns = (
        "projector", "norm", "distance", "alpha", "weight", "test accuracy (%)",
        "singular values grown", "log of the smallest", "dead units", "correlation before",
        "after", "CKA with the teacher",
    )  # fmt: skip
    cells = []
    for setting, one in found.items():
        if isinstance(setting, Setting):
            alpha = "" if setting.distance == "mse" else f"{setting.alpha:g}"
            names = [setting.projector, setting.norm, setting.distance, alpha]
        else:
            names = [setting, "", "", ""]
        cells.append(
            names
            + ["" if setting == "student alone" else f"{one.weight:g}", shown(one.test, 100)]
            + [shown(one.grown, digits=1), shown(one.log_smallest), shown(one.dead, digits=1)]
            + [shown(one.before, digits=3), shown(one.after, digits=3), shown(one.cka)]
        )
    return rows(columns, cells)


def trend_table(listed: Sequence[Trend]) -> str:
    cells = []
    for trend in listed:
        scale, digits, unit = (100, 2, " points") if trend.points else (1, 3, "")
        difference = shown(trend.difference, scale, digits, "+") + unit
        cells.append([trend.factor, trend.claim, difference, trend.answer()])
    return rows(("factor", "published trend", "difference here", "here"), cells)


def summary(listed: Sequence[Trend]) -> str:
    """One line for each factor."""
    lines = []
    for factor in dict.fromkeys(trend.factor for trend in listed):
        answers = [trend.answer() for trend in listed if trend.factor == factor]
        counted = [
            f"{answers.count(a)} {a}"
            for a in ("seen", "within noise", "reversed", "not judged")
            if a in answers
        ]
        lines.append(f"{factor}: of {len(answers)} published trends {', '.join(counted)}")
    return "\n".join(lines)


def draw(figure: Any, found: Mapping[Any, Outcome], projectors: Sequence[str], title: str) -> None:
    """Accuracy by each of the four factors, singular values, correlations."""
    figure.set_size_inches(13, 7.5)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(2, 3).ravel()
    srd = Setting(projectors[0], "batch", "log_sum", 4.0)
    alphas = sorted(
        s.alpha for s in found if isinstance(s, Setting) and s._replace(alpha=4.0) == srd
    )
    points = [found[srd._replace(alpha=alpha)].test for alpha in alphas]
    spots(axes[0], alphas, points, marker="o")
    axes[0].set(xlabel="alpha", title="exponent of LogSum (batch norm)")
    for i, (distance, alpha) in enumerate((("log_sum", 4.0), ("mse", 2.0))):
        chosen = [found[Setting(srd.projector, norm, distance, alpha)].test for norm in NORMS]
        places = [x + 0.16 * (2 * i - 1) for x in range(len(NORMS))]
        spots(axes[1], places, chosen, linestyle="none", marker="os"[i], label=distance)
    axes[1].set_xticks(range(len(NORMS)), NORMS)
    axes[1].set(title="normalisation")
    chosen = [found[srd._replace(projector=projector)].test for projector in projectors]
    spots(axes[2], range(len(projectors)), chosen, linestyle="none", marker="o")
    axes[2].set_xticks(range(len(projectors)), projectors)
    axes[2].set(title="projector (LogSum, batch norm)", xlim=(-0.5, len(projectors) - 0.5))
    distances = {
        "mse,\nno norm": srd._replace(norm="none", distance="mse", alpha=2.0),
        "mse": srd._replace(distance="mse", alpha=2.0),
        "corr.\n(2)": srd._replace(distance="correlation", alpha=2.0),
        "corr.\n(4)": srd._replace(distance="correlation"),
        "log corr.\n(4)": srd._replace(distance="correlation_log_sum"),
        "LogSum\n(4)": srd,
        "soft\nlabels": "soft labels",
    }
    chosen = [found[key].test for key in distances.values()]
    spots(axes[3], range(len(distances)), chosen, linestyle="none", marker="o")
    axes[3].set_xticks(range(len(distances)), list(distances), fontsize=8)
    axes[3].set(title="distance (batch norm, exponent in brackets)")
    for axis in axes[:4]:
        alone = 100 * found["student alone"].test.mean
        axis.axhline(alone, color="black", ls=":", lw=1, label="student alone")
        axis.set_ylabel("test accuracy (%)")
        tidy(axis, grid="y")
    axes[1].legend(frameon=False, fontsize=8)
    draw_collapse(axes[4], axes[5], found, srd, projectors)


def draw_collapse(
    left: Any, right: Any, found: Mapping[Any, Outcome], srd: Setting, projectors: Sequence[str]
) -> None:
    for norm in NORMS:
        one = found[srd._replace(norm=norm)]
        left.plot(one.curves["end"], color=COLOURS[norm], label=f"end, {norm} (w {one.weight:g})")
    left.plot(found[srd].curves["start"], color="black", ls="--", lw=1, label="start")
    left.set(xlabel="index", ylabel="log singular value", title="projector's kernel, LogSum")
    left.legend(frameon=False, fontsize=8)
    for projector in projectors:
        one = found[srd._replace(projector=projector)]
        assert one.before is not None
        assert one.after is not None
        errors = [0 if math.isnan(x.error) else x.error for x in (one.before, one.after)]
        values = [one.before.mean, one.after.mean]
        right.errorbar((0, 1), values, errors, marker="o", capsize=3, label=projector)
    right.set_xticks((0, 1), ("before training", "after"))
    right.set(xlim=(-0.3, 1.3), ylabel="mean |correlation|", title="projector's input and output")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        tidy(axis)


def spots(axes: Any, places: Sequence[float], values: Sequence[Estimate], **looks: Any) -> None:
    errors = [0.0 if math.isnan(v.error) else 100 * v.error for v in values]
    axes.errorbar(places, [100 * v.mean for v in values], errors, capsize=3, **looks)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    found = parser(__doc__)
    found.set_defaults(out=Path("runs/projector"))
    add = found.add_argument
    add("--data", default="digits", help="digits, or a PATH.npz with x_train, y_train, ...")
    add("--teacher", default="mlp-256-256", help="mlp-WIDTH-..., convnet, resnet20, ...")
    add("--student", default="mlp-32", help="the same; see kdjax.models")
    add("--augmentation", choices=("none", "crop_flip"), default="none")
    add("--labels-per-class", type=int, default=10, help="the students'; 0 for all (default 10)")
    add("--projectors", nargs="+", default=list(PROJECTORS), help="linear, mlp-WIDTH; the first is "
        "the one that the other factors are read at")  # fmt: skip
    add("--alphas", type=float, nargs="+", default=list(ALPHAS))
    add("--weights", type=float, nargs="+", default=[0.2, 1.0, 5.0, 25.0], help="of the distance")
    add("--seeds", type=int, default=4)
    add("--steps", type=int, default=400)
    add("--teacher-steps", type=int, default=600)
    add("--batch-size", type=int, default=64)
    add("--rate", type=float, default=0.05, help="the students' learning rate")
    add("--decay", type=float, default=5e-4, help="the students' weight decay")
    add("--workers", type=int, default=2, help="programs at a time; 1 on an accelerator")
    options = found.parse_args(argv)
    if options.quick:
        vars(options).update(QUICK)
    for name in ("seeds", "steps", "teacher_steps", "batch_size", "workers"):
        if getattr(options, name) < 1:
            found.error(f"--{name.replace('_', '-')} must be at least 1")
    for projector in options.projectors:
        kind, *widths = projector.split("-")
        if not (
            projector == "linear" or (kind == "mlp" and all(w.isdigit() for w in widths) and widths)
        ):
            found.error(f"--projectors must be linear or mlp-WIDTH, got {projector}")
    if min(options.alphas) <= 0 or min(options.weights) <= 0:
        found.error("--alphas and --weights must be above 0")
    options.alphas = sorted({*options.alphas, *SOME_ALPHAS})
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints the tables and the trends, keeps figure and numbers."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    started = time.perf_counter()
    task = prepare(options)
    line = command("projector_ablation", arguments)
    labelled = int((task.train["label"] >= 0).sum())
    name = "digits" if options.data == "digits" else Path(options.data).stem
    title = (
        f"{name}: {options.teacher} ({100 * task.teacher_accuracy:.1f} %) to {options.student}, "
        f"{len(task.train['label']):,} images, {labelled:,} labels; {options.seeds} seeds, mean ± "
        "standard error"
    )
    print(f"`{line}`, {machine()}\n{title}", flush=True)
    found = measure(task, options)
    listed = trends(found, options.projectors)
    seconds = time.perf_counter() - started
    print("", table(found), "", trend_table(listed), "", summary(listed), sep="\n")
    print(f"Seen or reversed: by over two standard errors. Nothing is required. ({seconds:.0f} s)")
    numbers = {
        "command": line, "seconds": seconds, "teacher": task.teacher_accuracy, "title": title,
        "settings": [
            {"setting": s._asdict() if isinstance(s, Setting) else s, **one._asdict()}
            for s, one in found.items()
        ],
        "trends": [{**trend._asdict(), "answer": trend.answer()} for trend in listed],
    }  # fmt: skip
    draws = partial(draw, found=found, projectors=options.projectors, title=title)
    keep(options.out, "projector_ablation", numbers, draws)


if __name__ == "__main__":
    main()
