"""Projector distillation on ImageNet, ResNet-34 to ResNet-18: the published recipe.

    python benchmarks/projector_imagenet.py --method projector --dtype bfloat16
    python benchmarks/projector_imagenet.py --method none
    python benchmarks/projector_imagenet.py --pair resnet50-resnet18 --teacher runs/resnet50
    python benchmarks/projector_imagenet.py --list

--data is tfds:NAME, prepared on disk (tfds:imagenet2012 by default; its images must be fetched by
hand, see its page), or a PATH.npz in the Keras form with uint8 images. Needs Pillow and, for TFDS,
the extra ``tfds``. Images are decoded, cut and resized by threads on the host, flipped on the
device. The first command trains the teacher by the same recipe, without distillation, and keeps it;
the published teacher is torchvision's, 73.31 %. A command that was stopped or killed goes on where
it was.

Recipe: SGD with momentum 0.9 and coupled weight decay 1e-4 on everything that is trained, the
projector too, batch 256, 100 epochs, learning rate 0.1 and a tenth of it after epochs 30, 60 and
90; random resized crops of 224 and flips; tested on the centre 224 of images resized to 256. The
teacher is in evaluation mode. On one device the last batch of an epoch has 143 images, as
published; devices that can't split it leave it out.

  none            hard labels
  kd              hard labels + KL(teacher || student), temperature 1 (our assumption)
  projector       the same + 2 LogSum(BN(projected student), BN(teacher)), alpha 4, BN eps 1e-4
  log-correlation hard labels + 2 log(sum |rho - 1|^4): the first code, before LogSum

and the other rows of Table 6.9, hard labels + 2 * distance, whose weights and scales (mean or sum)
were not published, so that ours are an assumption:

  l2-same-width   mean squared difference of the features as they are
  l2              the same after the projector
  batch-norm-l2   the same after projector and batch normalisation
  correlation     ||rho - 1||_2
  correlation-4   ||rho - 1||_4

Sources: R. Miles, K. Mikolajczyk, "Understanding the Role of the Projector in Knowledge
Distillation", AAAI 2024, its code (Simple-Recipe-Distillation) and the first author's thesis,
chapter 6; torchdistill's repetition, whose teacher was in training mode. Nothing here has been run
to the end yet.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from _recipes import Outcome, Published, Run, Steps, cut, head, parser, rows, trained

import kdjax as kd
from kdjax.methods import projector_distillation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPOCHS, DROPS, BATCH, SIZE = 100, (30, 60, 90), 256, 224
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, ALPHA = 0.1, 0.9, 1e-4, 4.0
AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
# Batches that are being decoded while one is used.
AHEAD = 3
NETWORKS: Mapping[str, Callable[[int], nn.Module]] = MappingProxyType(
    {
        **kd.models.BY_NAME,
        "resnet18": functools.partial(kd.models.resnet18, small_images=False),
        "resnet34": functools.partial(kd.models.resnet34, small_images=False),
        "resnet50": functools.partial(kd.models.resnet50, small_images=False),
    }
)
# Table 6.9's distances, as options of kdjax.methods.projector_distillation.imagenet.
DISTANCES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "l2-same-width": {"projector": None, "norm": "none", "loss": "mse"},
        "l2": {"norm": "none", "loss": "mse"},
        "batch-norm-l2": {"loss": "mse"},
        "correlation": {"loss": "correlation", "alpha": 2.0},
        "correlation-4": {"loss": "correlation", "alpha": 4.0},
        "log-correlation": {"loss": "correlation_log_sum"},
    }
)
METHODS = ("none", "kd", "projector", *DISTANCES)
PAIR = "resnet34-resnet18"
# Top-1 accuracies; Table 6.6 prints errors.
TABLES = {
    PAIR: {
        "teacher": [(73.31, "Table 6.6")],
        "none": [(69.75, "Table 6.6")],
        "kd": [(70.66, "Table 6.6"), (71.37, "Table 6.9")],
        "projector": [
            (71.87, "Table 6.6"),
            (71.63, "Table 6.9, correlations"),
            (71.93, "torchdistill"),
        ],
        "l2-same-width": [(71.08, "Table 6.9")],
        "l2": [(71.53, "Table 6.9")],
        "batch-norm-l2": [(71.34, "Table 6.9")],
        "correlation": [(71.35, "Table 6.9")],
        "correlation-4": [(71.31, "Table 6.9")],
        "log-correlation": [(71.63, "Table 6.9")],
    },
    "resnet50-resnet18": {"projector": [(71.29, "Table 6.3")]},
}
QUICK = {"epochs": 3, "rows": 64}


class Source(NamedTuple):
    """Images of any size, one at a time.

    Attributes:
      name: what is said of them in logs and checkpoints.
      num_classes: C.
      size: split -> rows.
      read: ``(split, row) -> (PIL image, label)``, from any thread.
    """

    name: str
    num_classes: int
    size: Mapping[str, int]
    read: Callable[[str, int], tuple[Any, int]]


def from_npz(path: str) -> Source:
    """uint8 images in memory."""
    from PIL import Image

    with np.load(path) as file:
        found = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    if found["x_train"].dtype != np.uint8:
        raise SystemExit(f"{path} must hold uint8 images, got {found['x_train'].dtype}.")

    def read(split: str, row: int) -> tuple[Any, int]:
        image = Image.fromarray(found[f"x_{split}"][row]).convert("RGB")
        return image, int(found[f"y_{split}"].reshape(-1)[row])

    classes = int(max(found["y_train"].max(), found["y_test"].max())) + 1
    sizes = {split: len(found[f"x_{split}"]) for split in ("train", "test")}
    return Source(Path(path).stem, classes, sizes, read)


def from_tfds(name: str, data_dir: str | None) -> Source:
    """Files as they were stored: what is decoded is decided by the thread that needs it."""
    from PIL import Image

    # For its checks and its messages; one image is decoded.
    known = kd.data.tfds(name, data_dir, validation=0, prepare=lambda image: image[:1, :1])
    import tensorflow_datasets

    splits = {"train": "train", "test": "validation" if "validation" in known.splits else "test"}
    decoders = {"image": tensorflow_datasets.decode.SkipDecoding()}
    where = None if data_dir is None else os.path.expanduser(data_dir)
    stored = {
        split: tensorflow_datasets.data_source(
            name, split=theirs, data_dir=where, download=False, decoders=decoders
        )
        for split, theirs in splits.items()
    }

    def read(split: str, row: int) -> tuple[Any, int]:
        example = stored[split][row]
        return Image.open(io.BytesIO(example["image"])).convert("RGB"), int(example["label"])

    sizes = {split: len(found) for split, found in stored.items()}
    return Source(name, known.num_classes, sizes, read)


def crop_box(draws: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """A random part of an image: 8 % to all of its area, sides 3:4 to 4:3.

    Args:
      draws: [10, 4], uniform in [0, 1): area, ratio of the sides, left and top, for every try.
      width: of the image.
      height: of the image.

    Returns:
      (left, top, width, height); the largest centred part of a fitting ratio where no try fits.
    """
    low, high = map(math.log, RATIO)
    for area, ratio, across, down in draws.tolist():
        target = width * height * (AREA[0] + (AREA[1] - AREA[0]) * area)
        sides = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(target * sides)), round(math.sqrt(target / sides))
        if 0 < w <= width and 0 < h <= height:
            return int(across * (width - w + 1)), int(down * (height - h + 1)), w, h
    sides = min(max(width / height, RATIO[0]), RATIO[1])
    w = width if width / height <= sides else round(height * sides)
    h = height if width / height >= sides else round(width / sides)
    return (width - w) // 2, (height - h) // 2, w, h


def random_resized_crop(image: Any, size: int, *key: int) -> np.ndarray:
    """The part that the key draws, resized to [size, size, 3]: the same on every machine."""
    from PIL import Image

    # Raw words: NumPy keeps the streams of bit generators, not those of its distributions.
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(4 * TRIES)
    draws = (words >> np.uint64(11)).astype(np.float64) / 2.0**53
    left, top, width, height = crop_box(draws.reshape(TRIES, 4), *image.size)
    part = image.crop((left, top, left + width, top + height))
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))


def centre_crop(image: Any, size: int) -> np.ndarray:
    """The shorter side resized to size * 256 / 224, and the centre of that."""
    from PIL import Image

    shorter = round(size * 256 / 224)
    width, height = image.size
    wide = shorter if width <= height else int(shorter * width / height)
    high = shorter if height <= width else int(shorter * height / width)
    image = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


class Pictures:
    """Batches of decoded images; the batch at a step is a pure function of (seed, step).

    Args:
      source: where images come from.
      split: "train" for random resized crops, "test" for the centre.
      order: batches of row numbers.
      size: pixels of a side.
      pool: threads that decode.
    """

    def __init__(
        self,
        source: Source,
        split: str,
        order: kd.data.Batches,
        size: int,
        pool: concurrent.futures.ThreadPoolExecutor,
    ) -> None:
        self._source, self._split, self._order = source, split, order
        self._size, self._pool = size, pool

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self.from_step(0)

    def from_step(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        """Batches from a step on, some of them under way while one is used."""
        waiting: collections.deque[Any] = collections.deque()
        try:
            for at, batch in enumerate(self._order.from_step(step), start=step):
                epoch = at // self._order.steps_per_epoch
                read = functools.partial(self._read, epoch)
                waiting.append((batch, [self._pool.submit(read, row) for row in batch["index"]]))
                if len(waiting) > AHEAD:
                    yield self._filled(*waiting.popleft())
            while waiting:
                yield self._filled(*waiting.popleft())
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()

    def describe(self) -> dict[str, Any]:
        """What decides the batches."""
        return {**self._order.describe(), "split": self._split, "size_of_images": self._size}

    def _read(self, epoch: int, row: int) -> tuple[np.ndarray, int]:
        image, label = self._source.read(self._split, int(row))
        if self._split == "train":
            return random_resized_crop(image, self._size, self._order.seed, epoch, int(row)), label
        return centre_crop(image, self._size), label

    @staticmethod
    def _filled(batch: Mapping[str, np.ndarray], futures: Sequence[Any]) -> dict[str, np.ndarray]:
        found = [future.result() for future in futures]
        label = np.asarray([label for _, label in found], np.int32)
        if "weight" in batch:
            label = np.where(batch["weight"] > 0, label, np.int32(-1))
        kept = {name: value for name, value in batch.items() if name != "row"}
        return {**kept, "image": np.stack([image for image, _ in found]), "label": label}


class Training(NamedTuple):
    """What is the same for the teacher and every student.

    Attributes:
      source: of the images.
      sizes: rows that are used of each split.
      size: pixels of a side.
      epochs: passes; the drops move with them.
      batch_size: rows of an update.
      steps: of an epoch.
      dtype: of forward passes.
      save_every: epochs between checkpoints.
      pool: threads that decode.
    """

    source: Source
    sizes: Mapping[str, int]
    size: int
    epochs: int
    batch_size: int
    steps: Steps
    dtype: str
    save_every: int
    pool: concurrent.futures.ThreadPoolExecutor

    @property
    def drops(self) -> tuple[float, ...]:
        """Epochs after which the learning rate drops."""
        return tuple(drop * self.epochs / EPOCHS for drop in DROPS)

    def order(self, split: str) -> kd.data.Dataset:
        """Row numbers as a data set, which knows about orders, hosts and the last batch."""
        numbers = {"train": {"row": np.arange(self.sizes[split], dtype=np.int32)}}
        classes = self.source.num_classes
        return kd.data.arrays(numbers, num_classes=classes, name=f"{self.source.name} {split}")

    def train(self, seed: int) -> Pictures:
        """Training batches, without end."""
        order = self.order("train").batches(
            "train", self.batch_size, seed=seed, last=self.steps.last
        )
        return Pictures(self.source, "train", order, self.size, self.pool)

    def test(self) -> Pictures:
        """One pass over the test split."""
        order = self.order("test").once("train", self.batch_size)
        return Pictures(self.source, "test", order, self.size, self.pool)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing of a row and prints it."""
    options = _parser().parse_args(argv)
    if options.list:
        print("\n".join(f"--pair {pair} --method {m}" for pair in TABLES for m in TABLES[pair]))
        return
    if options.quick:
        vars(options).update(QUICK)
    teacher_name, student_name = _pair(options.pair)
    if options.data.startswith("tfds:"):
        source = from_tfds(options.data.removeprefix("tfds:"), options.data_dir)
    else:
        source = from_npz(options.data)
    sizes = {split: min(options.rows or size, size) for split, size in source.size.items()}
    threads = options.threads or min(32, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        training = Training(
            source,
            sizes,
            options.size,
            options.epochs,
            options.batch_size,
            # Steps are long here: several in one dispatch gain nothing and hold more batches.
            cut(sizes["train"], options.batch_size, devices=options.devices, per_call=1),
            options.dtype,
            options.save_every or 1,
            pool,
        )
        print(f"{source.name}: {training.steps}", file=sys.stderr)
        _row(training, teacher_name, student_name, options)


def _row(training: Training, teacher_name: str, student_name: str, options: Any) -> None:
    classes, found = training.source.num_classes, published(options.pair)
    student = model_of(student_name, classes, options.dtype)
    teacher, frozen, known = None, None, None
    print(head(), flush=True)
    if options.method != "none":
        teacher = model_of(teacher_name, classes, options.dtype)
        folder = options.teacher or options.out / "teachers" / teacher_name
        method = method_of("none", teacher, None, 0.0)
        outcome = _fit(training, teacher, method, None, 0, folder, {"network": teacher_name})
        frozen, known = outcome.variables, [teacher_name, outcome.accuracy[-1]]
        print(rows(teacher_name, "teacher", [outcome], found["teacher"]), flush=True)
    method = method_of(options.method, student, teacher, options.feature_weight)
    row = Path("alone", student_name) if teacher is None else Path(options.pair, options.method)
    about: dict[str, Any] = {"network": student_name, "method": options.method, "teacher": known}
    if options.method not in ("none", "kd"):
        about["feature_weight"] = options.feature_weight
    outcomes = [
        _fit(training, student, method, frozen, seed, options.out / row / f"seed-{seed}", about)
        for seed in options.seeds
    ]
    network = student_name if teacher is None else options.pair
    print(rows(network, options.method, outcomes, found[options.method]), flush=True)


def _parser() -> Any:
    found = parser(__doc__, out=Path("runs/projector_imagenet"))
    add = found.add_argument
    add("--pair", default=PAIR, help=f"TEACHER-STUDENT (default: {PAIR})")
    add("--list", action="store_true", help="the published rows")
    add("--method", choices=METHODS, default="projector", help="default: projector")
    add("--data", default="tfds:imagenet2012", help="tfds:NAME or PATH.npz")
    add("--epochs", type=int, default=EPOCHS, help=f"default {EPOCHS}; the drops move with it")
    add("--batch-size", type=int, default=BATCH, help=f"default {BATCH}")
    add("--size", type=int, default=SIZE, help=f"pixels of a side (default: {SIZE})")
    add("--threads", type=int, help="that decode (default: one per processor, 32 at most)")
    add("--rows", type=int, help="only the first rows of each split, for a trial")
    return found


def _pair(name: str) -> tuple[str, str]:
    names = name.split("-")
    if len(names) != 2 or not all(one in NETWORKS for one in names):
        raise SystemExit(
            f"--pair must be TEACHER-STUDENT of {', '.join(sorted(NETWORKS))}, got {name!r}."
        )
    return names[0], names[1]


def _normalized(batch: Mapping[str, Any]) -> jax.Array:
    return kd.augment.normalize(batch["image"], MEAN, STD)


# Kept, so that the programs compiled for a Model are found again.
@functools.lru_cache(maxsize=8)
def model_of(name: str, num_classes: int, dtype: str) -> kd.Model:
    """A network that normalises images itself and taps what its classifier reads."""
    return kd.from_linen(
        NETWORKS[name](num_classes),
        taps={"feat": "pool"},
        dtype=None if dtype == "float32" else jnp.dtype(dtype),
        inputs=_normalized,
    )


def method_of(
    name: str, student: kd.Model, teacher: kd.Model | None, feature_weight: float
) -> kd.Method:
    """What is minimised."""
    hard = kd.terms.hard_labels()
    augment = kd.augment.compose(kd.augment.random_flip)
    if name == "none" or teacher is None:
        return kd.distill(student, None, {"hard": (1.0, hard)}, augment=augment)
    if name == "kd":
        soft = kd.terms.soft_labels()
        chosen = {"hard": (1.0, hard), "soft": (1.0, soft)}
        return kd.distill(student, teacher, chosen, augment=augment)
    alone = {"soft_weight": 0.0, **DISTANCES[name]} if name in DISTANCES else {}
    return projector_distillation.imagenet(
        student,
        teacher,
        feature_weight=feature_weight,
        augment=augment,
        **{"alpha": ALPHA, **alone},
    )


def _fit(
    training: Training,
    model: kd.Model,
    method: kd.Method,
    frozen: Any,
    seed: int,
    folder: Path,
    about: Mapping[str, Any],
) -> Outcome:
    per_epoch, data = training.steps.per_epoch, training.train(seed)
    optimizer = projector_distillation.imagenet_optimizer(
        steps_per_epoch=per_epoch,
        learning_rate=LEARNING_RATE,
        drops=training.drops,
        weight_decay=WEIGHT_DECAY,
        momentum=MOMENTUM,
    )
    recipe = {
        **about,
        "seed": seed,
        "epochs": training.epochs,
        "batch_size": training.batch_size,
        "image_size": training.size,
        "steps_per_epoch": per_epoch,
        "learning_rate": LEARNING_RATE,
        "drop_steps": [round(drop * per_epoch) for drop in training.drops],
        "momentum": MOMENTUM,
        "weight_decay": WEIGHT_DECAY,
        "dtype": training.dtype,
        "data": [training.source.name, *training.sizes.values()],
    }
    return trained(
        Run(
            folder=folder,
            learner=kd.minimize(method, optimizer),
            model=model,
            data=data,
            test=training.test(),
            frozen=frozen,
            epochs=training.epochs,
            steps=training.steps,
            seed=seed,
            save_every=training.save_every,
            recipe=recipe,
        )
    )


def published(pair: str) -> dict[str, list[Published]]:
    """The published figures of a pair, by method."""
    known = TABLES.get(pair, {})
    return {
        name: [Published(*one) for one in known.get(name, [])] for name in ("teacher", *METHODS)
    }


if __name__ == "__main__":
    main()
