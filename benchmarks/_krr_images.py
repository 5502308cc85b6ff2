"""Images of some classes to condense, others to transfer to, and the networks for both."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _krr_step import padded

import kdjax as kd
from kdjax.experiments import condense
from kdjax.methods import barlow_twins

Pairs = Mapping[str, np.ndarray]
CHUNK = 20_000  # images on the device at once, beyond those it keeps


class Split(NamedTuple):
    """Images, uint8 or floating in [0, 1], and labels from 0."""

    images: np.ndarray
    labels: np.ndarray


class Networks(NamedTuple):
    """What is pre-trained, with any number of outputs, and the target network's backbone.

    Attributes:
      widths: channels of the pool's and the pre-trained network.
      target: those of the target network; none for the published ResNet-18.
      mean: of the source's pixels, by channel.
      std: the same. Models normalise images themselves.
    """

    widths: tuple[int, ...]
    target: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def student(self, outputs: int) -> kd.Model:
        return _student(self, outputs)

    def backbone(self) -> kd.Model:
        return _backbone(self)


class Task(NamedTuple):
    """A source to condense and a target to transfer to, with the target network's features.

    Attributes:
      source: training images of the source classes.
      source_test: its test images.
      target: training images of the target classes.
      target_test: its test images.
      networks: for both.
      network: the target network, with features as its ``logits``.
      variables: of the target network.
      features: of the source's training images [N, k].
      test_features: of its test images, and of those of the target classes.
    """

    source: Split
    source_test: Split
    target: Split
    target_test: Split
    networks: Networks
    network: kd.Model
    variables: Any
    features: np.ndarray
    test_features: tuple[np.ndarray, np.ndarray]

    @property
    def classes(self) -> int:
        """Of the target."""
        return int(self.target.labels.max()) + 1

    @property
    def student(self) -> kd.Model:
        """The network that is pre-trained."""
        return self.networks.student(self.features.shape[1])

    def pairs(self, rows: np.ndarray) -> Pairs:
        return {"image": scaled(self.source.images[rows]), "target": self.features[rows]}


def scaled(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1], as the step scales them."""
    if images.dtype == np.uint8:
        return images.astype(np.float32) * np.float32(1 / 255)
    return images.astype(np.float32)


def outputs(model: kd.Model, variables: Any, images: np.ndarray, name: str = "logits") -> Any:
    """One output for any number of images."""
    return np.concatenate([
        condense.outputs(model, variables, scaled(images[i : i + CHUNK]), output=name)
        for i in range(0, len(images), CHUNK)
    ])  # fmt: skip


# Networks. Kept, so that the programs compiled for a Model are found again.


@functools.cache
def _student(networks: Networks, outputs: int) -> kd.Model:
    module = kd.models.PooledConvNet(outputs, widths=networks.widths)
    inner = kd.from_linen(module, taps={"features": "pool"})
    return normalized(inner, networks.mean, networks.std)


@functools.cache
def _backbone(networks: Networks) -> kd.Model:
    """With a tap ``pool``: features that are means over positions."""
    if not networks.target:
        inner = padded(kd.from_linen(kd.models.resnet18(1), taps={"pool": "pool"}))
    else:
        module = kd.models.PooledConvNet(1, widths=networks.target)
        last = len(networks.target) - 1
        inner = kd.from_linen(module, taps={"pool": f"stage{last}/block0" if last else "stem"})
    return normalized(inner, networks.mean, networks.std)


def normalized(model: kd.Model, mean: Sequence[float], std: Sequence[float]) -> kd.Model:
    """The model on images in [0, 1]."""

    def init(key: jax.Array, images: jax.Array) -> Any:
        return model.init(key, kd.augment.normalize(jnp.asarray(images), mean, std))

    def apply(params: Any, extra: Any, images: jax.Array, **options: Any) -> Any:
        return model.apply(params, extra, kd.augment.normalize(images, mean, std), **options)

    return kd.Model(init, apply)


# Data.


def load(options: argparse.Namespace) -> tuple[dict[str, Split], dict[str, Split]]:
    """Training and test images of the source and of the target."""
    source = _splits(options.data, options)
    target = source if options.target_data is None else _splits(options.target_data, options)
    kept = tuple(
        {name: _of_classes(part, classes, options.examples) for name, part in found.items()}
        for found, classes in ((source, options.source_classes), (target, options.target_classes))
    )
    side = kept[0]["train"].images.shape[1:3]
    resized = {
        name: part._replace(images=_resized(part.images, side)) for name, part in kept[1].items()
    }
    return kept[0], resized


@functools.lru_cache(maxsize=2)
def _read(data: str, data_dir: str | None, side: int | None) -> dict[str, Split]:
    if data == "made-up":
        return _made_up(side or 32)
    if data.startswith("tfds:"):
        prepare = None if side is None else functools.partial(_square, side=side)
        found = kd.data.tfds(data.removeprefix("tfds:"), data_dir, validation=0, prepare=prepare)
    else:
        found = kd.data.npz(data, validation=0)
    names = {"train": "train", "test": "test" if "test" in found.splits else "validation"}
    if names["test"] not in found.splits:
        raise SystemExit(f"{data} must have a split test or validation, has {list(found.splits)}")
    parts = {name: found.read(split, raw=True) for name, split in names.items()}
    return {name: Split(part["image"], part["label"]) for name, part in parts.items()}


def _splits(data: str, options: argparse.Namespace) -> dict[str, Split]:
    return _read(data, options.data_dir, options.side)


def _of_classes(part: Split, classes: Sequence[int] | None, most: int | None) -> Split:
    """Rows of some classes, all by default, numbered in their order; at most so many, drawn."""
    classes = sorted(set(part.labels.tolist())) if classes is None else list(classes)
    rows = np.flatnonzero(np.isin(part.labels, classes))
    if not len(rows):
        raise SystemExit(f"no images are of the classes {classes}")
    if most is not None and len(rows) > most:
        rows = np.sort(np.random.default_rng(0).choice(rows, most, replace=False))
    numbers = {label: i for i, label in enumerate(classes)}
    labels = np.array([numbers[label] for label in part.labels[rows].tolist()], np.int32)
    return Split(part.images[rows], labels)


def _square(image: np.ndarray, side: int) -> np.ndarray:
    """An image of any size as side x side."""
    return image if image.shape[:2] == (side, side) else _resized(image[None], (side, side))[0]


def _resized(images: np.ndarray, side: tuple[int, int]) -> np.ndarray:
    """All targets are brought to the source's resolution, as published."""
    if images.shape[1:3] == tuple(side):
        return images
    from PIL import Image  # comes with the extras tfds and cli

    if images.dtype != np.uint8:
        raise SystemExit("images of another size must be uint8")
    grey, how = images.shape[-1] == 1, Image.Resampling.BILINEAR
    opened = (Image.fromarray(x[..., 0] if grey else x) for x in images)
    found = [np.asarray(image.resize((side[1], side[0]), how)) for image in opened]
    return np.stack(found).reshape(len(images), *side, images.shape[-1])


def _made_up(side: int) -> dict[str, Split]:
    """Noise with a bright column that tells the class: only to see that everything runs."""
    rng = np.random.default_rng(0)
    splits = {}
    for name, size in (("train", 160), ("test", 40)):
        labels = np.arange(size) % 10
        images = rng.integers(0, 120, (size, side, side, 3)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            left = label * side // 10
            image[:, left : left + max(1, side // 10)] += 100
        splits[name] = Split(images, labels.astype(np.int32))
    return splits


# The target network.


def views(channels: int) -> Any:
    """Two views of digits, which aren't flipped, or of photographs; normalised by the model."""
    if channels == 1:
        return kd.augment.digits_views()
    return kd.augment.simclr_views(mean=(0.0,) * channels, std=(1.0,) * channels)


def make_task(options: argparse.Namespace, folder: Path) -> Task:
    """Reads the data, and trains the target network on the source without its labels.

    Training resumes; a network that is trained already is only read.
    """
    source, target = load(options)
    images = source["train"].images
    some = scaled(images[:: max(1, len(images) // 10_000)])
    moments = (some.mean((0, 1, 2)), np.maximum(some.std((0, 1, 2)), 1e-3))
    mean, std = (tuple(x.astype(float).round(4).tolist()) for x in moments)
    networks = Networks(tuple(options.widths), tuple(options.target_widths), mean, std)
    method = barlow_twins.barlow_twins(
        networks.backbone(), projector=options.projector, off_diagonal=options.off_diagonal,
        augment=views(images.shape[-1]),
    )  # fmt: skip
    tx = barlow_twins.optimizer(
        steps=options.target_steps, learning_rate=options.target_rate,
        warm_up_steps=options.target_warm_up,
    )  # fmt: skip
    learner = kd.minimize(method, tx)
    size = min(options.target_batch, len(images))
    batches = kd.data.arrays(
        {"train": {"image": images}}, num_classes=1, name=Path(options.data).name
    ).batches("train", size, seed=0, raw=True)
    state = kd.train.fit(
        learner, jax.jit(learner.init)(jax.random.key(0), batches.at(0)), batches,
        steps=options.target_steps, mesh=mesh_for(size, options.devices), checkpoint=folder,
        save_every=max(1, min(options.save_every, options.target_steps // 10)), keep=1,
        steps_per_call=options.steps_per_call, plot=False,
        progress=not (folder / "features.npz").is_file(),
    )  # fmt: skip
    variables = jax.device_get((state.params["student"], state.extra["student"]))
    network = barlow_twins.features(networks.backbone())
    parts = {f"source_{name}": part for name, part in source.items()}
    parts["target_test"] = target["test"]
    features = stored_features(network, variables, parts, folder / "features.npz")
    return Task(
        source["train"], source["test"], target["train"], target["test"], networks, network,
        variables, features["source_train"], (features["source_test"], features["target_test"]),
    )  # fmt: skip


def stored_features(
    network: kd.Model, variables: Any, parts: Mapping[str, Split], file: Path
) -> dict[str, np.ndarray]:
    """The target network's features of several splits, computed once."""
    if file.is_file():
        with np.load(file) as stored:
            return {name: stored[name] for name in parts}
    found = {name: outputs(network, variables, part.images) for name, part in parts.items()}
    partial = file.with_name("features.partial.npz")
    np.savez(partial, **found)
    partial.replace(file)
    return found


def mesh_for(batch_size: int, devices: int | None) -> Any:
    """A mesh of as many devices as share a batch evenly; none for one."""
    most = min(len(jax.devices()), devices or len(jax.devices()))
    number = max(n for n in range(1, most + 1) if batch_size % n == 0)
    return kd.parallel.data_mesh(number) if number > 1 else None
