"""One evaluation of a classifier: accuracy, robustness, calibration, stability."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike
from tqdm.auto import tqdm

from kdjax import _checks, augment, metrics
from kdjax.attacks import _batches
from kdjax.attacks._auto_attack import auto_attack, check_square
from kdjax.attacks._batches import ATTACKS, Batch, Split
from kdjax.attacks._geometry import clip01
from kdjax.attacks._report_store import Store

# The attack under which calibration is measured: strong enough, and of known cost.
_CALIBRATED = "pgd_20"
_SEVERITY = 3
# What takes long. Corruptions are functions that a file can't tell from others.
_STORED = {*ATTACKS, f"validation {_CALIBRATED}"}


class Evaluation(NamedTuple):
    """What an evaluation found; plain dicts of numbers and NumPy arrays.

    Attributes:
        accuracy: name -> share of images whose mask is True.
        robust: name -> [N] bool for ``clean``, ``pgd_20``, ``pgd_100``, ``cw_100``,
            ``auto_attack`` and ``worst_case``: right on the clean image and on what the attack
            made of it, with finite logits. ``worst_case`` is the AND over all the others, image by
            image. ``auto_attack/<name>`` are the masks of its attacks, of which each sees only
            what those before it have left.
        calibration: ``clean`` and ``pgd_20`` -> dict with ``ece``, ``mce`` (15 bins), ``nll``
            (nats), ``brier`` (0 to 2) and ``confidence`` (mean largest probability); with
            validation data also ``clean_scaled`` and ``pgd_20_scaled``, after division of the
            logits by their ``temperature``.
        stability: ``random_noise`` and the corruptions -> dict with ``accuracy`` and
            ``unchanged``, the share of images whose prediction is that on the clean image.
        examples: with ``keep``, the first images: ``image``, ``x_adv`` (of pgd_20), ``label``,
            ``prediction`` and ``prediction_adv``.
    """

    accuracy: dict[str, float]
    robust: dict[str, np.ndarray]
    calibration: dict[str, dict[str, float]]
    stability: dict[str, dict[str, float]]
    examples: dict[str, np.ndarray]


def evaluate(
    logits_fn: Callable[[jax.Array], jax.Array],
    x: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str = "linf",
    key: jax.Array,
    batch_size: int | None = None,
    step_size: ArrayLike | None = None,
    auto: bool = True,
    validation: tuple[ArrayLike, ArrayLike] | None = None,
    corruptions: bool | Mapping[str, Callable[..., Any]] = True,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    keep: int = 0,
) -> Evaluation:
    """Clean and robust accuracy, calibration and stability of a classifier on a test set.

        worst_case_i = clean_i and pgd_20_i and pgd_100_i and cw_100_i and auto_attack_i

    The per-image worst case, whose mean is below the accuracy under each attack, is the robust
    accuracy to report; a mean over attacks is not. The attacks of fixed step size are the usual
    ones: last iterate, a random start, the cross-entropy (pgd) or the margin (cw). The model must
    be deterministic, in evaluation mode and, for the figures to mean anything, not made to hide
    its gradients: see `gradient_masking`.

    It runs on the host over batches of one shape. An image's results depend on its place in the
    data set, not on the batches (but for what the model's own rounding makes of them).

    Args:
        logits_fn: images [B, ...] -> logits [B, C]. As a ``jax.tree_util.Partial(f, params)`` it
            is compiled once for all ``params``; a plain function once for each function.
        x: [N, ...] floating-point images in [0, 1], not normalised.
        labels: [N] integer class indices.
        eps: radius in units of pixels (of 8/255, say), a finite scalar of at least 0.
        norm: "linf" or "l2".
        key: one typed key.
        batch_size: images in a batch; None takes 256.
        step_size: of the attacks of fixed step size; None takes ``eps / 4``, which is 2/255 for
            the usual 8/255.
        auto: whether AutoAttack (standard) runs as well, which takes most of the time.
        validation: held-out (images, labels), on whose clean and attacked logits the temperatures
            are fitted. None leaves scaling out.
        corruptions: True for the corruptions of ``augment.corruptions(3)``, False for none, or
            name -> ``(keys [B], images [B, H, W, C]) -> images``, one key per image.
        checkpoint: folder in which a killed evaluation leaves what it has; the same call again
            continues. None keeps nothing.
        progress: whether to show a bar (on a terminal).
        keep: of how many images, from the first on, to return clean and perturbed pictures.

    Returns:
        `Evaluation`.

    Raises:
        TypeError: ``x`` is not floating point, ``labels`` not integers, ``key`` no typed key, or
            values are traced.
        ValueError: images outside [0, 1], no images, labels that are no class, a number out of
            range, images that have no corruptions, or a checkpoint of another evaluation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax import attacks
        >>> x = jnp.linspace(0, 1, 16).reshape(16, 1, 1, 1)
        >>> labels = (x.ravel() > 0.5).astype(int)
        >>> logits_fn = lambda images: (images.reshape(-1, 1) - 0.5) * jnp.array([[-9.0, 9.0]])
        >>> found = attacks.evaluate(
        ...     logits_fn, x, labels, eps=0.1, key=jax.random.key(0), auto=False, corruptions=False
        ... )
        >>> found.accuracy["clean"], found.accuracy["worst_case"]
        (1.0, 0.75)

    Reference:
        The protocol of F. Croce et al., "RobustBench: a Standardized Adversarial Robustness
        Benchmark", NeurIPS 2021 (section 3), with the attacks of fixed step size of A. Madry et
        al., ICLR 2018, and calibration as in C. Guo et al., ICML 2017.
    """
    model = _batches.model(logits_fn)
    rows = _batches.split(x, labels, batch_size)
    around = _batches.ball(eps, step_size, norm)
    keys = _Keys(*jax.random.split(_batches.single_key(key), len(_Keys._fields)))
    keep = _checks.count("keep", keep, low=0, high=len(rows.x))
    held = None if validation is None else _held_out(validation, rows.size)
    functions = _functions(corruptions, rows)
    if auto:  # which comes last, and must not fail then
        check_square(rows.x, around.norm, around.eps)
    with _Bar(rows, held, len(functions), show=progress).closing() as bar:
        clean = bar.collect("clean", rows, lambda batch: _batches.logits_of(model, batch.x))
        _batches.check_logits(clean, rows)
        if checkpoint is not None:
            bar.store = Store(checkpoint, rows, held, clean, key, around, model)
        logits = {"clean": clean}
        for name in ATTACKS:
            work = _batches.under_attack(model, keys.attack, around, name)
            logits[name] = bar.collect(name, rows, work)
        scaling = {} if held is None else _fitted(model, held, keys.held, around, bar)
        moved = _moved(model, rows, functions, keys.noise, around, bar)
    robust = {name: _batches.correct(found, rows.labels) for name, found in logits.items()}
    robust = {name: mask & robust["clean"] for name, mask in robust.items()}
    parts: dict[str, np.ndarray] = {}
    if auto:
        found = auto_attack(
            model, rows.x, rows.labels, eps=around.eps, norm=around.norm, key=keys.auto,
            batch_size=rows.size, progress=progress,
            checkpoint=None if checkpoint is None else pathlib.Path(checkpoint, "auto_attack.npz"),
        )  # fmt: skip
        robust["auto_attack"] = found.robust
        parts = {f"auto_attack/{name}": mask for name, mask in found.per_attack.items()}
        parts.pop("auto_attack/clean", None)
    robust["worst_case"] = np.logical_and.reduce(list(robust.values()))
    robust.update(parts)
    return Evaluation(
        accuracy={name: float(mask.mean()) for name, mask in robust.items()},
        robust=robust,
        calibration=_calibration(logits, rows, scaling),
        stability={name: _stability(found, clean, rows) for name, found in moved.items()},
        examples=_examples(model, rows, keys.attack, around, keep) if keep else {},
    )


class _Keys(NamedTuple):
    """What each purpose draws its images' keys from."""

    attack: jax.Array
    noise: jax.Array
    auto: jax.Array
    held: jax.Array


class _Bar:
    """A bar over the images of all parts but AutoAttack's, which has its own."""

    def __init__(self, rows: Split, held: Split | None, corruptions: int, *, show: bool) -> None:
        total = len(rows.x) * (2 + len(ATTACKS) + corruptions)
        total += 0 if held is None else 2 * len(held.x)
        # None: tqdm decides, by whether there is a terminal.
        self._bar = tqdm(total=total, unit="image", disable=None if show else True)
        self.store: Store | None = None

    def collect(self, name: str, rows: Split, work: Callable[[Batch], jax.Array]) -> np.ndarray:
        """All rows' results; those that the store has are not computed again."""
        self._bar.set_description(name)
        store = self.store if name in _STORED else None
        before = None if store is None else store.rows(name)
        base = self._bar.n

        def report(found: np.ndarray) -> None:
            self._bar.update(base + len(found) - self._bar.n)
            if store is not None:
                store.save(name, found, last=len(found) == len(rows.x))

        found = _batches.collect(rows, work, before=before, report=report)
        self._bar.update(base + len(found) - self._bar.n)
        return found

    @contextlib.contextmanager
    def closing(self) -> Iterator[_Bar]:
        """Gives the terminal back however it ends."""
        try:
            yield self
        finally:
            self._bar.close()


def _held_out(validation: Any, size: int) -> Split:
    if not isinstance(validation, (tuple, list)) or len(validation) != 2:
        raise TypeError(
            f"validation must be a pair (images, labels), got {_checks.describe(validation)}."
        )
    images, labels = validation
    held = _batches.split(images, labels, size, name="validation")._replace(size=size)
    try:
        for _ in _batches.batches(held):
            pass
    except (TypeError, ValueError) as error:
        raise type(error)(f"validation must hold images like x: {error}") from None
    return held


def _functions(corruptions: Any, rows: Split) -> dict[str, Partial]:
    """The corruptions asked for, as pytrees: their strengths do not compile anew."""
    if corruptions is False:
        return {}
    if rows.x.ndim != 4:
        raise ValueError(
            f"corruptions must be False for images that are not [N, H, W, C], got "
            f"{_checks.describe(rows.x)}."
        )
    chosen = augment.corruptions(_SEVERITY) if corruptions is True else corruptions
    if not isinstance(chosen, Mapping) or not all(map(callable, chosen.values())):
        raise TypeError(
            "corruptions must be True, False or a dict of name -> function of (keys, images), got "
            f"{_checks.describe(corruptions)}."
        )
    found = {
        name: value if isinstance(value, Partial) else Partial(value)
        for name, value in chosen.items()
    }
    one = jax.random.split(jax.random.key(0), 1), jnp.asarray(rows.x[:1])
    for name, value in found.items():  # before hours of attacks
        try:
            jax.eval_shape(value, *one)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"corruptions[{name!r}] must take (keys, images), one key per image, but failed: "
                f"{error}"
            ) from error
    return found


def _fitted(
    model: Partial, held: Split, key: jax.Array, around: _batches.Ball, bar: _Bar
) -> dict[str, jax.Array]:
    """The temperatures of the clean and of the attacked logits, on the held-out images."""
    work = {
        "clean": lambda batch: _batches.logits_of(model, batch.x),
        _CALIBRATED: _batches.under_attack(model, key, around, _CALIBRATED),
    }
    found = {name: bar.collect(f"validation {name}", held, each) for name, each in work.items()}
    _batches.check_logits(found["clean"], held)
    return {name: metrics.fit_temperature(each, held.labels) for name, each in found.items()}


@jax.jit
def _corrupted(corruption: Partial, batch: Batch, key: jax.Array) -> jax.Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.places)
    return clip01(corruption(keys, batch.x)).astype(batch.x.dtype)


def _moved(
    model: Partial,
    rows: Split,
    functions: Mapping[str, Partial],
    key: jax.Array,
    around: _batches.Ball,
    bar: _Bar,
) -> dict[str, np.ndarray]:
    """Logits at a random place of the ball, and under each corruption."""
    names = ["random_noise", *functions]
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    work = {"random_noise": _batches.under_noise(model, keys["random_noise"], around)}

    def corrupting(name: str) -> Callable[[Batch], jax.Array]:
        return lambda batch: _batches.logits_of(
            model, _corrupted(functions[name], batch, keys[name])
        )

    work.update({name: corrupting(name) for name in functions})
    return {name: bar.collect(name, rows, each) for name, each in work.items()}


def _calibration(
    logits: Mapping[str, np.ndarray], rows: Split, scaling: Mapping[str, jax.Array]
) -> dict[str, dict[str, float]]:
    found = {}
    for name in ("clean", _CALIBRATED):
        found[name] = _calibrated(jnp.asarray(logits[name]), rows.labels)
        if name in scaling:
            scaled = _calibrated(jnp.asarray(logits[name]) / scaling[name], rows.labels)
            found[f"{name}_scaled"] = {**scaled, "temperature": float(scaling[name])}
    return found


def _calibrated(logits: jax.Array, labels: np.ndarray) -> dict[str, float]:
    probs = jax.nn.softmax(logits)
    found = {
        "ece": metrics.expected_calibration_error(probs, labels),
        "mce": metrics.maximum_calibration_error(probs, labels),
        "nll": metrics.negative_log_likelihood(logits, labels),
        "brier": metrics.brier_score(probs, labels),
        "confidence": probs.max(axis=-1).mean(),
    }
    return {name: float(value) for name, value in found.items()}


def _stability(moved: np.ndarray, clean: np.ndarray, rows: Split) -> dict[str, float]:
    unchanged = _batches.correct(moved, clean.argmax(axis=-1))
    return {
        "accuracy": float(_batches.correct(moved, rows.labels).mean()),
        "unchanged": float(unchanged.mean()),
    }


def _examples(
    model: Partial, rows: Split, key: jax.Array, around: _batches.Ball, keep: int
) -> dict[str, np.ndarray]:
    """The first images with what the attack makes of them, computed once more."""
    first = Split(rows.x[:keep], rows.labels[:keep], rows.size)
    images = _batches.collect(first, lambda batch: batch.x)
    x_adv = _batches.collect(first, _batches.attack(model, key, around, _CALIBRATED))
    seen = {"prediction": images, "prediction_adv": x_adv}
    found = {"image": images, "x_adv": x_adv, "label": first.labels}
    for name, each in seen.items():
        shown = Split(each, first.labels, rows.size)
        logits = _batches.collect(shown, lambda batch: _batches.logits_of(model, batch.x))
        found[name] = logits.argmax(axis=-1)
    return found
