"""KRR-ST on images: condense some classes, and transfer to others.

    python benchmarks/krr_st_images.py --data mnist.npz
    python benchmarks/krr_st_images.py --data cifar10.npz --m 50 --seeds 0 1 2
    python benchmarks/krr_st_images.py --preset cifar100
    python benchmarks/krr_st_images.py --preset tiny --data tiny.npz --m 2000
    python benchmarks/krr_st_images.py --preset cifar100 --quick

--data is a PATH.npz in the Keras form (x_train, y_train, x_test, y_test), or tfds:NAME, prepared
on disk under --data-dir. Classes 0 to 4 are the source, without labels, 5 to 9 the target, unless
told otherwise. Barlow Twins trains the target network on the source; its features are the targets.
Every row pre-trains the same network with as many updates (SGD at 0.1, momentum 0.9, weight decay
1e-3) on m pairs of images and targets: real images drawn by chance, nearest to the centres of
k-means, chosen by herding; noise; KRR-ST from random images and from those of k-means; and all of
the source. No pre-training stands beside them. Then, on held-out images:

  R2 source   variance of the target network's features that is explained on source images
  R2 target   the same on images of the target classes
  1-, 5-shot  logistic regression on frozen, standardised features, 1 or 5 labels per class
  linear      a linear layer on frozen features of all target images
  fine-tune   the whole network with a new head, on --shots labels per class (0: all)

Nothing is judged: the table shows each row beside random and k-means pairs that pre-train alike.

--preset takes the published sizes: the networks, m, 160,000 updates at batches of 1024, T = 1000,
a pool of 10, live targets of augmented images, transfer to CIFAR-10 (--target-data for others,
which are resized). They need an accelerator; they were run with --quick only, on made-up images.
How the published target networks were trained isn't known; here it is Barlow Twins for small images
(Bandara et al. 2023, without mixup). Pixels are normalised inside all networks, for real and
learned images alike; the published code doesn't normalise learned ones. The source lies on the
device as uint8, row numbers travel, --steps-per-call updates make one dispatch, and all devices
share the real images. Tiny-ImageNet isn't in TensorFlow Datasets: pass --data PATH.npz (Keras form,
64x64) or --data tfds:NAME --data-dir FOLDER with a data set of your own that is prepared there.

Rows are kept one by one, and condensing is resumed inside a row: the same command goes on.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _compare import machine
from _krr_images import Pairs, Task, make_task, mesh_for, outputs, scaled
from _krr_rows import Figures, Row, cell, opened, run, table
from krr_st_digits import LEARNED, SUBSETS, kept

import kdjax as kd
from kdjax.experiments import condense

KINDS = ("none", *SUBSETS, *LEARNED, "all source")
COLUMNS = {
    "r2_source": ("R2 source", 3), "r2_target": ("R2 target", 3), "shot_1": ("1-shot", 1),
    "shot_5": ("5-shot", 1), "probe": ("linear", 1), "fine_tune": ("fine-tune", 1),
    "cpu": ("condensing, CPU s", 0),
}  # fmt: skip
COSTS = {
    "bytes": ("bytes", 0), "updates": ("updates", 0), "seconds": ("seconds", 1),
    "pretrain_cpu": ("CPU seconds", 1), "r2_source": ("R2 source", 3), "shot_5": ("5-shot", 1),
    "probe": ("linear", 1),
}  # fmt: skip
# For a CPU. Presets come over these, and --quick over both.
SMALL: Mapping[str, Any] = {
    "source_classes": [0, 1, 2, 3, 4], "target_classes": [5, 6, 7, 8, 9], "m": [50],
    "widths": [16, 32], "target_widths": [16, 32, 128], "projector": [256, 256],
    "off_diagonal": 0.0051, "target_steps": 300, "target_rate": 1e-3, "target_warm_up": 0,
    "target_batch": 256, "steps": 1000, "rate": 3e-3, "batch_size": 256, "pool": 5,
    "max_age": 300, "targets": "cached", "updates": 1000, "probe_steps": 500, "draws": 20,
    "shots": 5, "fine_tune_steps": 200, "fine_tune_draws": 3, "choose_from": 100_000,
    "all_source": 100_000, "steps_per_call": 1, "save_every": 500,
}  # fmt: skip
PUBLISHED = {
    "source_classes": None, "target_classes": None, "target_data": "tfds:cifar10",
    "target_widths": [], "projector": [512, 1024], "target_rate": 0.01, "steps": 160_000,
    "batch_size": 1024, "pool": 10, "max_age": 1000, "targets": "live", "updates": 4000,
    "probe_steps": 5000, "shots": 0, "fine_tune_steps": 10_000, "fine_tune_draws": 1,
    "seeds": [0, 1, 2], "steps_per_call": 50, "save_every": 2000,
}  # fmt: skip
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "cifar100": {
        **PUBLISHED, "data": "tfds:cifar100", "side": 32, "m": [1000], "widths": [128, 256, 512],
        "rate": 1e-4, "off_diagonal": 0.0078125, "target_steps": 2000 * 195,
        "target_warm_up": 10 * 195,
    },
    "tiny": {
        **PUBLISHED, "side": 64, "m": [2000], "widths": [64, 128, 256, 512], "rate": 1e-5,
        "off_diagonal": 0.0009765, "target_steps": 2000 * 390, "target_warm_up": 10 * 390,
        "updates": 8000,
    },
    "imagenet64": {
        **PUBLISHED, "data": "tfds:imagenet_resized/64x64", "side": 64, "m": [1000],
        "widths": [64, 128, 256, 512], "rate": 1e-5, "off_diagonal": 0.0009765,
        "target_steps": 100 * 5004, "target_warm_up": 10 * 5004,
    },
}  # fmt: skip
QUICK = {
    "data": "made-up", "target_data": None, "source_classes": [0, 1, 2, 3, 4],
    "target_classes": [5, 6, 7, 8, 9], "m": [6], "seeds": [0], "target_steps": 2,
    "target_rate": 1e-5, "target_warm_up": 1, "target_batch": 8, "steps": 4, "batch_size": 8,
    "pool": 2, "max_age": 3, "updates": 3, "probe_steps": 3, "draws": 2, "shots": 2,
    "fine_tune_steps": 2, "fine_tune_draws": 1, "steps_per_call": 1, "save_every": 2,
}  # fmt: skip
# What doesn't change a row.
FREE = {"m", "seeds", "kinds", "out", "data_dir", "devices", "steps_per_call", "save_every"}


# Pairs.


def subset(kind: str, task: Task, m: int, seed: int, most: int) -> Pairs:
    """Real images chosen by a rule, from at most so many of the source; or noise."""
    key = jax.random.fold_in(jax.random.key(seed), m)
    size = len(task.source.images)
    if kind == "noise":
        some = scaled(task.source.images[:: max(1, size // 10_000)])
        image = condense.noise(some, m, key=key)
        return {"image": image, "target": outputs(task.network, task.variables, image)}
    if kind == "random":
        return task.pairs(condense.random_subset(size, m, key=key))
    rows = np.arange(size)
    if size > most:
        rows = condense.random_subset(size, most, key=jax.random.fold_in(key, 1))
    if kind == "herding":
        return task.pairs(rows[condense.herding(task.features[rows], m)])
    return task.pairs(rows[condense.k_means(task.features[rows], m, key=key)])


def augmentation(task: Task) -> Callable[..., Any]:
    """A crop padded by an eighth of the side, and a flip unless the images are grey."""
    padding = task.source.images.shape[1] // 8
    crop = functools.partial(kd.augment.random_crop, padding=padding)
    flip = () if task.source.images.shape[-1] == 1 else (kd.augment.random_flip,)
    return kd.augment.compose(kd.augment.to_float, crop, *flip)


def learned(
    row: Row, task: Task, options: argparse.Namespace, show: Callable[..., None]
) -> tuple[Pairs, dict[str, float]]:
    """The pairs of one row, from their file if they are finished, with the times they took."""
    kind, m, seed = row
    file = kept(options.out, row)
    if not file.is_file():
        folder = file.with_suffix("")
        whole = not folder.exists()
        cpu, wall = time.process_time(), time.perf_counter()
        size = min(options.batch_size, len(task.source.images))
        live = options.targets == "live"
        pairs = condense.condense(
            task.student, task.source.images, None if live else task.features,
            subset(kind.removeprefix("KRR-ST from "), task, m, seed, options.choose_from),
            target=task.network if live else None, frozen=task.variables if live else None,
            augment=augmentation(task) if live else None,
            key=jax.random.fold_in(jax.random.key(seed), m), steps=options.steps,
            learning_rate=options.rate, batch_size=size, pool_size=options.pool,
            max_age=options.max_age, on_device=True, steps_per_call=options.steps_per_call,
            mesh=mesh_for(size, options.devices), checkpoint=folder,
            save_every=options.save_every, progress=False, report=show,
        )  # fmt: skip
        # Of a run that was stopped only the last part is known.
        times = [time.process_time() - cpu, time.perf_counter() - wall] if whole else [np.nan] * 2
        partial = file.with_suffix(".partial.npz")
        np.savez(partial, times=times, **pairs)
        partial.replace(file)
    with np.load(file) as stored:
        found = dict(stored)
    cpu, wall = found.pop("times").tolist()
    return found, {} if np.isnan(cpu) else {"cpu": cpu, "wall": wall}


# What pairs are worth.


@functools.lru_cache(maxsize=4)
def few(task_labels: bytes, shots: int, draws: int) -> list[np.ndarray]:
    """Row numbers of as many labels per class, the same for all rows of the table."""
    labels = np.frombuffer(task_labels, np.int32)
    rng = np.random.default_rng(shots)
    found = []
    for _ in range(draws):
        order = rng.permutation(len(labels))
        rows = [order[labels[order] == c][:shots] for c in range(labels.max() + 1)]
        found.append(np.concatenate(rows))
    return found


def measured(variables: Any, task: Task, options: argparse.Namespace) -> dict[str, float]:
    """All figures of one pre-trained network."""
    figures = {}
    tests = {"source": task.source_test, "target": task.target_test}
    for (name, part), wanted in zip(tests.items(), task.test_features, strict=True):
        figures[f"r2_{name}"] = condense.r2(outputs(task.student, variables, part.images), wanted)
    features = [
        outputs(task.student, variables, part.images, "features")
        for part in (task.target, task.target_test)
    ]
    figures |= transferred(features, task, options)
    labels, rows = task.target.labels, [np.arange(len(task.target.labels))]
    if options.shots:
        rows = few(labels.tobytes(), options.shots, max(options.draws, options.fine_tune_draws))
    hits = []
    network = task.networks.student(task.classes)
    for i, chosen in enumerate((rows * options.fine_tune_draws)[: options.fine_tune_draws]):
        tuned = condense.fine_tune(
            network, variables,
            {"image": scaled(task.target.images[chosen]), "label": labels[chosen]},
            steps=options.fine_tune_steps, key=jax.random.key(i),
            augment=None if options.shots else augmented(task),
        )  # fmt: skip
        logits = outputs(network, tuned, task.target_test.images)
        hits.append(np.mean(logits.argmax(-1) == task.target_test.labels))
    return {**figures, "fine_tune": 100 * float(np.mean(hits))}


def transferred(
    features: Sequence[np.ndarray], task: Task, options: argparse.Namespace
) -> dict[str, float]:
    """Accuracies of linear layers on features of the target's training and test images."""
    train, test = features
    labels, wanted = task.target.labels, task.target_test.labels
    found = {}
    for shots in (1, 5):
        draws = few(labels.tobytes(), shots, options.draws)
        found[f"shot_{shots}"] = 100 * condense.few_shot(train, labels, draws, test, wanted)
    found["probe"] = 100 * condense.linear_probe(
        train, labels, test, wanted, steps=options.probe_steps, key=jax.random.key(0)
    )
    return found


@functools.lru_cache(maxsize=1)
def _augmented(grey: bool, side: int) -> Callable[..., Any]:
    crop = functools.partial(kd.augment.random_crop, padding=side // 8)

    def augment(key: jax.Array, batch: Any) -> Any:
        crop_key, flip_key = jax.random.split(key)
        image = crop(crop_key, batch["image"])
        return {**batch, "image": image if grey else kd.augment.random_flip(flip_key, image)}

    return augment


def augmented(task: Task) -> Callable[..., Any]:
    """The same augmentation for batches without row numbers, such as those of fine-tuning."""
    return _augmented(task.source.images.shape[-1] == 1, task.source.images.shape[1])


def one(
    row: Row, show: Callable[..., None], task: Task, options: argparse.Namespace
) -> dict[str, float]:
    """The figures of one row, with what condensing and pre-training cost."""
    kind, m, seed = row
    key, times = jax.random.key(seed), {}
    if kind == "none":
        variables = task.student.init(key, scaled(task.source.images[:1]))
        found = measured(variables, task, options)
        return {name: value for name, value in found.items() if not name.startswith("r2")}
    if kind in LEARNED:
        pairs, times = learned(row, task, options, show)
    elif kind == "all source":
        pairs = task.pairs(np.sort(condense.random_subset(len(task.features), m, key=key)))
    else:
        pairs = subset(kind, task, m, seed, options.choose_from)
    variables, spent = pretrained(pairs, task, options, key)
    return {**measured(variables, task, options), **times, **spent}


def pretrained(
    pairs: Pairs, task: Task, options: argparse.Namespace, key: jax.Array
) -> tuple[Any, dict[str, float]]:
    """Variables after as many updates on any set as on a small one, and what they cost."""
    epochs = -(-options.updates // -(-len(pairs["image"]) // 256))
    condense.pretrain(task.student, pairs, key=key, epochs=1)  # compiles
    cpu, wall = time.process_time(), time.perf_counter()
    variables = jax.block_until_ready(
        condense.pretrain(task.student, pairs, key=key, epochs=epochs)
    )
    return variables, {
        "bytes": pairs["image"].nbytes + pairs["target"].nbytes,
        "updates": epochs * -(-len(pairs["image"]) // 256),
        "seconds": time.perf_counter() - wall,
        "pretrain_cpu": time.process_time() - cpu,
    }


# What is printed.


def planned(options: argparse.Namespace, task: Task) -> list[Row]:
    """Rows in the order of the table; seeds vary fastest."""
    wanted = [("none", 0)] * ("none" in options.kinds)
    middle = [kind for kind in KINDS[1:-1] if kind in options.kinds]
    wanted += [(kind, m) for m in sorted(options.m) for kind in middle]
    if "all source" in options.kinds:
        wanted.append(("all source", min(len(task.features), options.all_source)))
    return [(kind, m, seed) for kind, m in wanted for seed in options.seeds]


def gains(found: Mapping[Row, Figures]) -> list[str]:
    """What learned pairs gain in R2 source over real ones that pre-train alike."""
    lines = []
    for kind, m in dict.fromkeys(row[:2] for row in found if row[0] in LEARNED):
        for other in ("random", "k-means"):
            both = [
                found[kind, m, seed]["r2_source"] - found[other, m, seed]["r2_source"]
                for name, size, seed in found
                if (name, size) == (kind, m) and (other, m, seed) in found
            ]
            if both:
                lines.append(f"{kind}, m = {m}: R2 source {cell(both, 3)} above {other}")
    return lines


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, _count
    add("--preset", choices=PRESETS, help="the published sizes")
    add("--data", help="PATH.npz or tfds:NAME")
    add("--data-dir", help="folder of prepared TFDS data (default: that of TFDS)")
    add("--target-data", help="where the target classes are, if not in --data")
    add("--side", type=count, help="of images read by TFDS; others are resized")
    add("--source-classes", nargs="+", type=int, metavar="C")
    add("--target-classes", nargs="+", type=int, metavar="C")
    add("--examples", type=count, help="at most so many images of a split, drawn")
    add("--m", nargs="+", type=count, metavar="M", help="learned pairs")
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    add("--kinds", nargs="+", choices=KINDS, default=[*KINDS], metavar="KIND", help=str(KINDS))
    add("--targets", choices=("cached", "live"), help="stored, or of augmented images")
    for name, kind in (("off_diagonal", float), ("target_rate", float), ("rate", float)):
        add(f"--{name.replace('_', '-')}", type=kind)
    for name in ("widths", "target_widths", "projector"):
        add(f"--{name.replace('_', '-')}", nargs="*", type=count, metavar="W")
    for name in (
        "target_steps", "target_batch", "steps", "batch_size", "pool", "max_age", "updates",
        "probe_steps", "draws", "fine_tune_steps", "fine_tune_draws", "choose_from", "all_source",
        "steps_per_call", "save_every",
    ):  # fmt: skip
        add(f"--{name.replace('_', '-')}", type=count)
    add("--target-warm-up", type=int)
    add("--shots", type=int, help="labels per class to fine-tune on; 0 for all")
    add("--devices", type=count, help="at most so many (default: all)")
    add("--out", type=Path, help="default: runs/krr_st_images/NAME OF THE DATA")
    add("--quick", action="store_true", help="tiny, on made-up images: only to see that it runs")
    preset = parser.parse_known_args(argv)[0]
    over = dict(PRESETS[preset.preset]) if preset.preset else {}
    parser.set_defaults(**{**SMALL, **over, **(QUICK if preset.quick else {})})
    options = parser.parse_args(argv)
    if options.data is None:
        parser.error("--data must be given: PATH.npz (Keras form) or tfds:NAME")
    if options.out is None:
        name = "quick" if options.quick else Path(options.data).stem.replace(":", "-")
        options.out = Path("runs/krr_st_images") / f"{options.preset or 'small'}-{name}"
    return options


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and measures what is missing, and prints the tables."""
    given = sys.argv[1:] if argv is None else list(argv)
    options = arguments(given)
    settings = {k: v for k, v in vars(options).items() if k not in FREE}
    file = options.out / "results.json"
    opened(file, settings)
    began = time.perf_counter()
    task = make_task(options, options.out / "target")
    found = run(
        planned(options, task), lambda row, show: one(row, show, task, options), file, settings
    )
    features = [
        outputs(task.network, task.variables, part.images)
        for part in (task.target, task.target_test)
    ]
    upper = transferred(features, task, options)
    seconds = time.perf_counter() - began
    command = shlex.join(["python", "benchmarks/krr_st_images.py", *given])
    print(f"`{command}`, {machine()}, {seconds:.0f} s in this call\n")
    sizes = [len(getattr(task, name).images) for name in ("source", "target")]
    shown = ", ".join(f"{COLUMNS[name][0]} {value:.1f}" for name, value in upper.items())
    print(f"{sizes[0]} source images, {sizes[1]} of the target, {options.targets} targets;")
    print(f"the target network itself: {shown}\n")
    print("\n".join(table(found, COLUMNS)))
    print("\nWhat it is bought for (one pre-training, compilation apart):\n")
    priced = {row: figures for row, figures in found.items() if row[0] in (*LEARNED, KINDS[-1])}
    print("\n".join(table(priced, COSTS, "pre-training on")), end="\n\n")
    print("\n".join(gains(found)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
