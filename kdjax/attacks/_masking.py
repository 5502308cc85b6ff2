"""Signs that a model hides its gradients, so that attacks fail without it being robust."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike
from tqdm.auto import tqdm

from kdjax import _checks, losses
from kdjax.attacks import _batches, _inputs
from kdjax.attacks._batches import Ball, Batch, Split
from kdjax.attacks._square import square

_STRONGER = 0.05
_UNBROKEN = 0.05
_ZERO = 0.01
_FALLING = 0.05
# Of the published AutoAttack; on few images a single one may be luck.
_BLACK_BOX = 0.002
_RADII = (0.0, 0.5, 1.0, 2.0)


class MaskingCheck(NamedTuple):
    """One sign of gradient masking.

    Attributes:
        name: of the check.
        passed: whether the model shows no such sign.
        measured: the number that was compared.
        wanted: what it was compared with, in words.
    """

    name: str
    passed: bool
    measured: float
    wanted: str


def gradient_masking(
    logits_fn: Callable[[jax.Array], jax.Array],
    x: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str = "linf",
    key: jax.Array,
    batch_size: int | None = None,
    queries: int = 1000,
    draws: int = 10,
    progress: bool = True,
) -> list[MaskingCheck]:
    """Checks whether a model is robust or only hides its gradients.

    =====================  ========================================================================
    ``black_box``          accuracy under the best of PGD-20, PGD-100 and CW-100 (the AND of their
                           masks) minus that under Square, which uses no gradients: at most 0.002,
                           or one image
    ``more_steps``         accuracy under PGD-20 minus that under PGD-100: at most 0.05
    ``unbounded``          accuracy under PGD-100 with eps 1 (l2: the longest diagonal of the
                           images), where every image is within reach: at most 0.05
    ``zero_gradients``     share of images whose cross-entropy has no gradient, all zeros or not
                           finite: at most 0.01
    ``rising_loss``        share of cases in which the margin does not grow from one radius to the
                           next of 0, eps/2, eps, 2 eps (PGD-20 from the image itself, its best
                           iterate): at most 0.05
    ``random_noise``       accuracy under the worst of several random draws from the ball minus
                           that under PGD-100: at least 0, but for 0.002 or one image
    =====================  ========================================================================

    The thresholds are ours: on the adversarially trained networks of the tests each measure is
    well inside. A model that passes may still be weaker than it looks; one that fails needs
    attacks made for it. A few hundred images are enough.

    Args:
        logits_fn: as in `evaluate`.
        x: [N, H, W, C] floating-point images in [0, 1], best such that are classified right.
        labels: [N] integer class indices.
        eps: radius in units of pixels, a finite scalar above 0.
        norm: "linf" or "l2".
        key: one typed key.
        batch_size: images in a batch; None takes 256.
        queries: of Square, at least 1.
        draws: random perturbations of each image, at least 1.
        progress: whether to show a bar (on a terminal).

    Returns:
        A `MaskingCheck` for each line of the table.

    Raises:
        TypeError: ``x`` is not floating point, ``labels`` not integers, ``key`` no typed key, or
            values are traced.
        ValueError: images outside [0, 1] or not [N, H, W, C], labels that are no class, or a
            number out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax import attacks
        >>> x = jnp.linspace(0, 1, 16).reshape(16, 1, 1, 1)
        >>> labels = (x.ravel() > 0.5).astype(int)
        >>> steep = lambda images: (images.reshape(-1, 1) - 0.5) * jnp.array([[-9e5, 9e5]])
        >>> found = attacks.gradient_masking(
        ...     steep, x, labels, eps=0.1, key=jax.random.key(0), queries=20
        ... )
        >>> [check.name for check in found if not check.passed]
        ['unbounded', 'zero_gradients', 'rising_loss']

    Reference:
        A. Athalye, N. Carlini, D. Wagner, "Obfuscated Gradients Give a False Sense of Security",
        ICML 2018, section 3.1; N. Carlini et al., "On Evaluating Adversarial Robustness", 2019.
    """
    model = _batches.model(logits_fn)
    rows = _batches.split(x, labels, batch_size)
    if rows.x.ndim != 4:
        raise ValueError(f"x must be images [N, H, W, C], got {_checks.describe(rows.x)}.")
    _checks.number("eps", eps, above=0)
    around = _batches.ball(eps, None, norm)
    attack_key, noise_key, square_key = jax.random.split(_batches.single_key(key), 3)
    queries, draws = _checks.count("queries", queries), _checks.count("draws", draws)
    clean = _batches.collect(rows, lambda batch: _batches.logits_of(model, batch.x))
    _batches.check_logits(clean, rows)
    right = _batches.correct(clean, rows.labels)
    with tqdm(total=8, unit="part", disable=None if progress else True) as bar:
        found = {}
        for name in _batches.ATTACKS:
            work = _batches.under_attack(model, attack_key, around, name)
            found[name] = _mask(work, rows) & right
            bar.update()
        found["square"] = _batches.collect(
            rows,
            lambda batch: _survives(
                model, batch, square_key, around.eps, norm=around.norm, queries=queries
            ),
        )
        bar.update()
        reach = _everything(rows, around)
        work = _batches.under_attack(model, attack_key, reach, "pgd_100")
        found["unbounded"] = _mask(work, rows) & right
        bar.update()
        zero = _batches.collect(rows, lambda batch: _vanishes(model, batch))
        bar.update()
        falling = _falling(model, rows, around)
        bar.update()
        found["noise"] = right
        for number in range(draws):
            noise = _batches.under_noise(model, jax.random.fold_in(noise_key, number), around)
            found["noise"] = found["noise"] & _mask(noise, rows)
        bar.update()
    return list(_verdicts(found, float(zero.mean()), falling))


def _verdicts(found: dict[str, np.ndarray], zero: float, falling: float) -> Iterator[MaskingCheck]:
    share = {name: float(mask.mean()) for name, mask in found.items()}
    white = float((found["pgd_20"] & found["pgd_100"] & found["cw_100"]).mean())
    slack = max(_BLACK_BOX, 1 / len(found["square"]))
    for name, measured, most in (
        ("black_box", white - share["square"], slack),
        ("more_steps", share["pgd_20"] - share["pgd_100"], _STRONGER),
        ("unbounded", share["unbounded"], _UNBROKEN),
        ("zero_gradients", zero, _ZERO),
        ("rising_loss", falling, _FALLING),
    ):
        yield MaskingCheck(name, measured <= most + 1e-9, measured, f"at most {most:.3g}")
    above = share["noise"] - share["pgd_100"]
    yield MaskingCheck("random_noise", above >= -slack - 1e-9, above, f"at least {-slack:.3g}")


def _mask(work: Callable[[Batch], jax.Array], rows: Split) -> np.ndarray:
    return _batches.correct(_batches.collect(rows, work), rows.labels)


def _everything(rows: Split, around: Ball) -> Ball:
    """The ball that holds every image."""
    pixels = float(np.prod(rows.x.shape[1:]))
    eps = jnp.asarray(1.0 if around.norm == _inputs.LINF else pixels**0.5, around.eps.dtype)
    return around._replace(eps=eps, step_size=eps / 4)


@functools.partial(jax.jit, static_argnames=("norm", "queries"))
def _survives(
    model: Partial, batch: Batch, key: jax.Array, eps: jax.Array, *, norm: str, queries: int
) -> jax.Array:
    """[b] bool: Square finds nothing."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.places)
    return square(
        model, batch.x, batch.labels, eps=eps, norm=norm, queries=queries, key=keys
    ).robust


@jax.jit
def _vanishes(model: Partial, batch: Batch) -> jax.Array:
    """[b] bool: the cross-entropy has no gradient at the image."""

    def summed(x: jax.Array) -> jax.Array:
        return losses.hard_label_cross_entropy(_inputs.logits(model, x), batch.labels).sum()

    gradient = jax.grad(summed)(batch.x).reshape(len(batch.x), -1)
    return (gradient == 0).all(axis=-1) | ~jnp.isfinite(gradient).all(axis=-1)


@jax.jit
def _margins(model: Partial, batch: Batch) -> jax.Array:
    return losses.margin(_inputs.logits(model, batch.x), batch.labels)


def _falling(model: Partial, rows: Split, around: Ball) -> float:
    """The share of (image, radius) at which the margin is no larger than at the radius before."""

    def at(radius: float) -> Callable[[Batch], jax.Array]:
        eps = radius * around.eps

        def work(batch: Batch) -> jax.Array:
            x_adv = _batches.attacked(
                model, batch, jax.random.key(0), eps, eps / 4,
                loss=losses.hard_label_cross_entropy, steps=20, norm=around.norm, best=True,
                random=False,
            )  # fmt: skip
            return _margins(model, batch._replace(x=x_adv))

        return work

    margins = np.stack([_batches.collect(rows, at(radius)) for radius in _RADII])
    return float((~(margins[1:] > margins[:-1])).mean())
