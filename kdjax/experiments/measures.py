"""What a report says about trained models: estimates over seeds, cost, robustness."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax import _checks, augment, metrics, train
from kdjax._pairs import Batch, Model, Tree
from kdjax.data import Dataset

# Small, natural and fixed, so that figures of different runs compare.
BLUR_SIGMA, NOISE_STD, CONTRAST_FACTOR = 0.6, 0.1, 0.7
CORRUPTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "blur": partial(augment.gaussian_blur, sigma=BLUR_SIGMA),
        "noise": partial(augment.gaussian_noise, std=NOISE_STD),
        "contrast": partial(augment.contrast, factor=CONTRAST_FACTOR),
    }
)
STRENGTHS = (
    f"blur: Gaussian, sigma {BLUR_SIGMA:g} pixels; noise: Gaussian, standard deviation "
    f"{NOISE_STD:g} of the range from black to white; contrast: "
    f"{CONTRAST_FACTOR:g} times the original"
)
_CORRUPTION_SEED = 0
_BATCH = 256


class Estimate(NamedTuple):
    """A mean over seeds, its standard error (NaN for one seed), and the values."""

    mean: float
    error: float
    values: tuple[float, ...]


class Cost(NamedTuple):
    """What one model costs to run.

    Attributes:
      parameters: number of trained numbers.
      latency_ms: median time of a compiled forward pass of one example, in milliseconds.
      memory_bytes: arguments, outputs and temporaries of that program; None where the compiler
        doesn't say.
    """

    parameters: int
    latency_ms: float
    memory_bytes: int | None


class Score(NamedTuple):
    """How good one model is on one split.

    Attributes:
      accuracy: share of right answers.
      ece: expected calibration error, 15 bins.
      nll: mean negative log-likelihood.
      agreement: share of examples on which it answers as the teacher; None without a teacher.
      corrupted: accuracy under each of `CORRUPTIONS`; empty where inputs aren't images.
    """

    accuracy: float
    ece: float
    nll: float
    agreement: float | None
    corrupted: dict[str, float]


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and standard error: ``s / sqrt(n)`` with ``s^2 = sum (x - mean)^2 / (n - 1)``.

    Args:
      values: one for each seed, at least one.

    Returns:
      The estimate.

    Example:
      >>> from kdjax.experiments.measures import estimate
      >>> estimate([0.8, 1.0]).error
      0.1
    """
    values = tuple(float(value) for value in values)
    if not values:
        raise ValueError("values must hold at least one number, got none.")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean, math.nan, values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return Estimate(mean, round(spread / math.sqrt(len(values)), 12), values)


def gain(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """The estimate of ``after - before``, paired by seed.

    Args:
      before: one value for each seed.
      after: the same seeds in the same order.

    Returns:
      The estimate.
    """
    if len(before) != len(after):
        raise ValueError(
            f"after must have one value for each of the {len(before)} in before, got {len(after)}."
        )
    return estimate(b - a for a, b in zip(before, after, strict=True))


def score(
    model: Model,
    variables: tuple[Tree, Tree],
    dataset: Dataset,
    *,
    split: str = "test",
    teacher_logits: np.ndarray | None = None,
) -> tuple[Score, np.ndarray]:
    """Evaluates one model on a split, clean and corrupted.

    Args:
      model: the model.
      variables: its ``(params, extra)``.
      dataset: the data.
      split: the split; rows without a label don't count.
      teacher_logits: the teacher's logits on the split, for the agreement.

    Returns:
      The score, and the logits on the clean split [N, C].
    """
    labels = dataset.labels(split)
    known = labels >= 0
    if not known.any():
        raise ValueError(f"split {split!r} must have labels to be evaluated, got none.")
    clean = dataset.once(split, _BATCH)
    logits = train.predict(model, variables, clean)
    ece, nll = jax.device_get(_calibration(logits, labels))
    agreement = None
    if teacher_logits is not None:
        agreement = float((logits.argmax(-1) == teacher_logits.argmax(-1)).mean())
    corrupted = {}
    if len(dataset.shape) == 3:
        for name in CORRUPTIONS:
            answers = train.predict(model, variables, Corrupted(clean, name)).argmax(-1)
            corrupted[name] = float((answers == labels)[known].mean())
    accuracy = float((logits.argmax(-1) == labels)[known].mean())
    return Score(accuracy, float(ece), float(nll), agreement, corrupted), logits


@jax.jit
def _calibration(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (
        metrics.expected_calibration_error(jax.nn.softmax(logits), labels),
        metrics.negative_log_likelihood(logits, labels),
    )


class Corrupted:
    """Batches with one of `CORRUPTIONS` applied; what happens to an example is always the same.

    Args:
      batches: re-iterable batches with ``image`` and ``index``.
      name: which corruption.
    """

    def __init__(self, batches: Iterable[Batch], name: str) -> None:
        self._batches = batches
        self._apply = _program(_checks.choice("name", name, CORRUPTIONS))

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            image, index = batch["image"], batch["index"]
            yield {**batch, "image": self._apply({"image": image, "index": index})["image"]}


_programs: dict[str, Callable[[Batch], Any]] = {}


def _program(name: str) -> Callable[[Batch], Any]:
    if name not in _programs:
        key = jax.random.key(_CORRUPTION_SEED)
        _programs[name] = jax.jit(partial(augment.compose(CORRUPTIONS[name]), key))
    return _programs[name]


def cost(
    model: Model,
    variables: tuple[Tree, Tree],
    shape: tuple[int, ...],
    *,
    repeats: int = 100,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """Size, latency and memory of a compiled forward pass of one example.

    Args:
      model: the model.
      variables: its ``(params, extra)``.
      shape: of one example.
      repeats: timed runs, at least 1; the median is taken.
      clock: seconds.

    Returns:
      The cost.
    """
    params, extra = jax.device_put(variables)

    def forward(params: Tree, extra: Tree, inputs: jax.Array) -> jax.Array:
        return model.apply(params, extra, inputs, train=False)[0]["logits"]

    example = jax.device_put(np.zeros((1, *shape), np.float32))
    program = jax.jit(forward).lower(params, extra, example).compile()
    times = []
    for _ in range(_checks.count("repeats", repeats) + 3):
        start = clock()
        program(params, extra, example).block_until_ready()
        times.append(clock() - start)
    parameters = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    return Cost(parameters, 1000 * statistics.median(times[3:]), _memory(program))


def _memory(program: Any) -> int | None:
    found = program.memory_analysis()
    if found is None:
        return None
    return int(found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes)
