"""AutoAttack: an ensemble of attacks without parameters to tune, each on what the last has left."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax.attacks import _auto_attack_plan as plans
from kdjax.attacks import _batches, _inputs
from kdjax.attacks._auto_attack_progress import Bar, Checkpoint, Progress, about, weights
from kdjax.attacks._square import square

_MOST_AT_ONCE = 256
# Batches of these many sizes, the largest and the powers of two below it, are compiled for.
_SIZES = 4
# Above this share of images that only the black-box attack breaks, gradients look masked.
_MASKED = 0.002


class AutoAttack(NamedTuple):
    """What an evaluation found, as NumPy arrays.

    Attributes:
        x_adv: [N, ...] the adversarial example where one was found, else the image.
        robust: [N] bool, True where every attack failed; its mean is the robust accuracy.
        per_attack: name -> [N] bool, False where that attack broke the image, or where the clean
            prediction is wrong already (all of ``"clean"``'s). An image that is broken is not
            attacked any more, so that the mean of an attack's mask is its accuracy alone only for
            the first; ``robust`` is the conjunction of them all.
    """

    x_adv: np.ndarray
    robust: np.ndarray
    per_attack: dict[str, np.ndarray]


def auto_attack(
    logits_fn: Callable[..., jax.Array],
    x: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str = "linf",
    version: str = "standard",
    key: jax.Array,
    batch_size: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    targets: int = 9,
    steps: int = 100,
    queries: int = 5000,
    attacks: Sequence[str] | None = None,
) -> AutoAttack:
    """AutoAttack: the worst case of several attacks, each run on the images still robust.

        standard  apgd_ce, apgd_t, fab_t, square
        plus      apgd_ce (5 runs), apgd_dlr (5), fab (5), square, apgd_t, fab_t
        rand      apgd_ce, apgd_dlr, gradients averaged over 20 draws, for randomised defences

    ``apgd_t`` and ``fab_t`` take the classes of largest clean logit after the label as targets,
    one after the other. An image counts as broken if the model misclassifies what the attack
    found in a look of its own; logits that are not finite are never robust.

    This runs on the host, picks what is left to attack and calls compiled programs: it can't be
    jitted. Each image draws from ``fold_in(key, its place in x)``, so the result depends neither on
    ``batch_size`` nor on which other images are left, but for rounding, which differs between
    programs of different sizes.

    What the leaderboards assume of a defence holds here too: the forward pass is deterministic
    (else use "rand"), has gradients that are not zero, and optimises nothing at test time. Warnings
    say where it looks otherwise.

    Args:
        logits_fn: images [b, ...] -> logits [b, C] of at least 2 classes, a pure function that
            treats images one by one (batch norm in evaluation mode) and normalises them itself.
            Give ``jax.tree_util.Partial(apply, params)``, called as ``apply(params, images)``:
            weights are then arguments of the compiled programs, and other weights compile nothing
            anew. The weights of a plain function's closure are constants, of programs that live as
            long as the process. With ``version="rand"`` it is ``logits_fn(images, key)``, and each
            image has calls and keys of its own (by `jax.vmap`).
        x: [N, ...] floating-point images in [0, 1]; [N, H, W, channels] for square. Only a batch at
            a time is on the device if this is a NumPy array.
        labels: [N] integer class indices.
        eps: radius in units of pixels (of 8/255, say), a finite scalar of at least 0.
        norm: "linf" or "l2".
        version: "standard", "plus" or "rand".
        key: a typed key.
        batch_size: images in one call, at least 1. Default None: up to 256. What is left over at
            the end goes in smaller batches, so there are up to four programs of each attack.
        checkpoint: a file (.npz) for the state of the evaluation, written after every batch (a
            large one after some seconds' worth of them). The same call continues from it, with any
            ``batch_size``; another evaluation's is refused. Default None: nothing is kept.
        progress: show a bar, where there is a terminal or a notebook.
        targets: classes that apgd_t and fab_t try, at least 1; one less than there are at most.
        steps: of each run of APGD and FAB, at least 0.
        queries: of square, at least 0.
        attacks: names to run instead of the version's, in this order, with its runs and draws.
            With fewer than 4 classes apgd_t can't be, nor apgd_dlr with fewer than 3: a version
            leaves them out with a warning, here they are refused.

    Returns:
        `AutoAttack` with the adversarial images, the mask of robust images, and one for each
        attack.

    Raises:
        TypeError: arguments of another kind, or traced ones.
        ValueError: images outside [0, 1], no images, labels that are no class, a number out of its
            range, an unknown name, clean logits that are not finite, attacks that the model's
            classes or the images' shape do not allow, or a checkpoint of something else.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax import attacks
        >>> def apply(weights, images):  # one class for each of four pixels
        ...     return jnp.dot(images.reshape(-1, 4), weights)
        >>> x = jnp.array([[0.9, 0.1, 0.2, 0.0], [0.5, 0.4, 0.1, 0.1]]).reshape(2, 2, 2, 1)
        >>> model = jax.tree_util.Partial(apply, jnp.eye(4))
        >>> found = attacks.auto_attack(
        ...     model, x, jnp.array([0, 0]), eps=0.1, key=jax.random.key(0), targets=3, steps=10,
        ...     queries=20,
        ... )
        >>> found.robust
        array([ True, False])
        >>> {name: float(mask.mean()) for name, mask in found.per_attack.items()}
        {'clean': 1.0, 'apgd_ce': 0.5, 'apgd_t': 1.0, 'fab_t': 1.0, 'square': 1.0}

    Reference:
        F. Croce, M. Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
        Diverse Parameter-free Attacks", ICML 2020. The published code draws anew from one seed for
        every batch, so that its results depend on the batches; here they don't.
    """
    for name, value in {"x": x, "labels": labels, "eps": eps, "key": key}.items():
        if _checks.is_traced(value):
            raise TypeError(
                f"{name} must be known, got a traced {_checks.describe(value)}: auto_attack runs "
                "on the host and can't be jitted."
            )
    norm, names = _inputs.norm(norm), plans.names_of(version, attacks)
    targets = _checks.count("targets", targets)
    steps, queries = _checks.count("steps", steps, low=0), _checks.count("queries", queries, low=0)
    if batch_size is not None:
        _checks.count("batch_size", batch_size)
    model, key = _batches.model(logits_fn), _batches.single_key(key)
    given = _images(x, batch_size or _MOST_AT_ONCE)
    classes = np.asarray(_inputs.class_labels(labels, len(given)))
    radius = _inputs.size("eps", eps, jnp.asarray(given[:0]))
    _inputs.check_radius(radius, norm)
    if "square" in names:
        check_square(given, norm, radius)

    run = _Run(model, given, classes, radius, key, version == plans.RAND, _sizes(batch_size, given))
    logits, correct, changes = run.clean()
    if logits.shape[1] < 2:
        raise ValueError(
            f"logits_fn must return logits of at least 2 classes, got {_checks.describe(logits)}."
        )
    _batches.check_logits(logits, _batches.Split(given, classes, run.sizes[0]))
    plan = plans.stages(
        names, version, norm=norm, classes=logits.shape[1], targets=targets, steps=steps,
        queries=queries, chosen=attacks is not None,
    )  # fmt: skip
    _warn_about_model(changes, run.vanishing(plan, logits.shape[1], correct))

    state = Progress(given, correct)
    settings = {
        "eps": float(radius), "norm": norm, "version": version, "attacks": ",".join(names),
        "targets": targets, "steps": steps, "queries": queries,
    }  # fmt: skip
    identity = {}
    if checkpoint is not None:
        identity = about(given, classes, key, {**settings, "weights": weights(model)})
    file = Checkpoint(checkpoint, identity, logits)
    file.load(state)
    run.attack(plan, logits, state, file, Bar(plan, state, show=progress))
    file.save(state, last=True)
    masks = state.masks(plan)
    _warn_about_square(plan, masks)
    return AutoAttack(state.x_adv, state.robust, masks)


class _Run(NamedTuple):
    """One model, one data set."""

    model: Partial
    x: np.ndarray
    labels: np.ndarray
    eps: jax.Array
    key: jax.Array
    randomised: bool
    sizes: tuple[int, ...]

    def clean(self) -> tuple[np.ndarray, np.ndarray, bool]:
        """Logits [N, C], [N] whether they are right, and whether they change between calls."""
        logits, correct, changes = [], [], False
        for index in _cut(np.arange(len(self.x)), self.sizes):
            seen = self._look(self._batch(index, None), plans.CLEAN, 0)
            logits.append(np.asarray(seen.logits)[: len(index)])
            correct.append(np.asarray(seen.correct)[: len(index)])
            changes |= bool(seen.changes)
        return np.concatenate(logits), np.concatenate(correct), changes

    def vanishing(self, plan: Sequence[plans.Stage], classes: int, correct: np.ndarray) -> float:
        """The share of images, of a batch, at which the DLR loss has no gradient."""
        index = np.flatnonzero(correct)[: self.sizes[0]]
        if classes < 3 or not len(index) or not plans.differentiates(plan):
            return 0.0
        batch = self._batch(index, None)
        found = plans.dlr_vanishes(self.randomised, self.model, batch, self.key)
        return float(np.asarray(found)[: len(index)].mean())

    def attack(
        self,
        plan: Sequence[plans.Stage],
        logits: np.ndarray,
        state: Progress,
        file: Checkpoint,
        bar: Bar,
    ) -> None:
        """Every stage on the images that it finds left."""
        ranked = np.argsort(-logits, axis=1, kind="stable").astype(np.int32)
        with bar.closing():
            for number, stage in enumerate(plan):
                bar.at(stage)
                for index in _cut(state.left(number), self.sizes):
                    broken, x_adv = self._attack(stage, index, ranked[:, stage.rank])
                    state.record(index, number, broken, x_adv)
                    file.save(state)
                    bar.at(stage)

    def _attack(
        self, stage: plans.Stage, index: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What a stage breaks of a batch, and by what."""
        batch = self._batch(index, targets)
        x_adv, robust = plans.attack(
            stage.attack, stage.settings, self.model, batch, self.eps, self.key,
            np.int32(stage.number), np.int32(stage.rank),
        )  # fmt: skip
        broken = ~np.asarray(robust)
        found = np.asarray(x_adv)
        if broken.any():
            seen = self._look(batch._replace(x=x_adv), plans.checking(stage), stage.rank)
            wrong = ~np.asarray(seen.correct)
            if not self.randomised:
                # A gradient that was not finite has no example to show, and is not robust either.
                wrong |= (found == batch.x).reshape(len(found), -1).all(axis=1)
            broken &= wrong
        return broken[: len(index)], found[: len(index)]

    def _look(self, batch: plans.Batch, number: int, rank: int) -> plans.Look:
        seen: plans.Look = plans.look(
            self.randomised, self.model, batch, self.key, np.int32(number), np.int32(rank)
        )
        return seen

    def _batch(self, index: np.ndarray, targets: np.ndarray | None) -> plans.Batch:
        """These images, and the first again and again up to a size that there are programs for."""
        size = min(size for size in self.sizes if size >= len(index))
        index = np.concatenate([index, np.full(size - len(index), index[0])]).astype(np.int32)
        aims = self.labels[index] if targets is None else targets[index]
        return plans.Batch(index, self.x[index], self.labels[index], aims)


def _sizes(batch_size: int | None, x: np.ndarray) -> tuple[int, ...]:
    """The largest batch, and the powers of two below it, largest first."""
    largest = min(batch_size or _MOST_AT_ONCE, len(x))
    power = 1 << (largest - 1).bit_length()
    return (largest, *(power >> shift for shift in range(1, _SIZES) if power >> shift))


def _cut(index: np.ndarray, sizes: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Whole batches and the rest."""
    for start in range(0, len(index), sizes[0]):
        yield index[start : start + sizes[0]]


def _images(x: ArrayLike, size: int) -> np.ndarray:
    """[N, ...] on the host, in the dtype that attacks compute in."""
    on_host = np.asarray(x) if hasattr(x, "dtype") else np.asarray(_inputs.images(x))
    dtype = _inputs.images(on_host[:1]).dtype
    for start in range(0, len(on_host), size):
        _inputs.images(on_host[start : start + size])
    return on_host.astype(dtype)


@functools.partial(jax.jit, static_argnames="norm")
def _try_square(x: jax.Array, eps: jax.Array, norm: str) -> Any:
    def none(images: jax.Array) -> jax.Array:
        return jnp.zeros((len(images), 2))

    key, labels = jax.random.key(0), jnp.zeros(len(x), int)
    return square(none, x, labels, eps=eps, norm=norm, queries=0, key=key)


def check_square(x: np.ndarray, norm: str, eps: jax.Array) -> None:
    """Its own checks of the images' shape, before hours of the other attacks."""
    if x.ndim != 4:
        raise ValueError(
            "x must be images [N, H, W, C] for the attack square, got "
            f"{_checks.describe(x)}: reshape them, or leave it out (attacks=('apgd_ce', ...))."
        )
    jax.eval_shape(functools.partial(_try_square, norm=norm), x[:1], eps)


def _warn_about_model(changes: bool, vanishing: float) -> None:
    if changes:
        warnings.warn(
            "logits_fn gives other logits when it is called again, so its robustness is "
            'overestimated: pass its random numbers by a key and use version="rand".',
            stacklevel=3,
        )
    if vanishing:
        warnings.warn(
            "the gradient of the DLR loss by the image is zero or not finite for "
            f"{100 * vanishing:.3g} % of the images that were looked at: gradients are masked, "
            "and attacks that need them fail.",
            stacklevel=3,
        )


def _warn_about_square(plan: Sequence[plans.Stage], masks: dict[str, np.ndarray]) -> None:
    """Where it runs last; before other attacks, what it breaks they might have broken too."""
    if not plan or plan[-1].name != "square" or plan[0].name == "square":
        return
    share = float((~masks["square"] & masks["clean"]).mean())
    if share > _MASKED:
        warnings.warn(
            f"square, which uses no gradients, broke {100 * share:.3g} % of the images after all "
            "other attacks had failed: gradients may be masked, and the model less robust than "
            "this says.",
            stacklevel=3,
        )
