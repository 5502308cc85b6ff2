"""Auto-PGD: projected gradient ascent that halves its step where progress stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import _checks, losses
from kdjax.attacks import _inputs
from kdjax.attacks._geometry import clip01, into_box, l2_norm, linf_norm, rows

Loss = Callable[[jax.Array, jax.Array], jax.Array]
Evaluate = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
# What is added to norms of gradients and offsets before dividing by them.
_TINY = 1e-12


class Apgd(NamedTuple):
    """What Auto-PGD found.

    Attributes:
        x_adv: [B, ...] the last misclassified iterate of the first run that had one; x itself
            where there was none.
        robust: [B] bool, False where any iterate, the start included, was misclassified or had
            logits that are not finite.
        x_best: [B, ...] the iterate of largest loss.
        loss_best: [B] that loss, NaN where no iterate had a number for a loss.
    """

    x_adv: jax.Array
    robust: jax.Array
    x_best: jax.Array
    loss_best: jax.Array


def apgd(
    logits_fn: Callable[..., jax.Array],
    x: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str = "linf",
    loss: Loss = losses.hard_label_cross_entropy,
    steps: int = 100,
    rho: ArrayLike = 0.75,
    restarts: int = 1,
    samples: int = 1,
    key: jax.Array | None = None,
    noise: ArrayLike | None = None,
) -> Apgd:
    """Auto-PGD: gradient ascent with momentum that chooses its own step size.

        z = proj(x_k + step * sign(g_k));   x_{k+1} = proj(x_k + a (z - x_k) + (1-a)(x_k - x_{k-1}))

    with a = 0.75 (1 in the first step), ``step = 2 * eps`` at first, and g / ||g||_2 in place of
    the sign for l2. At fixed iterations the step of an image is halved, and the image goes back to
    its best iterate, if the loss rose in at most a share ``rho`` of the iterations since the check
    before, or if neither the step nor the best loss has changed since then.

    One forward and one backward pass for each step and for the start. Whole images are compared:
    the result for an image depends on its own row and key only.

    Args:
        logits_fn: images [B, ...] -> logits [B, C]. With ``samples`` above 1 it is called as
            ``logits_fn(images, key)`` with one typed key for the whole batch, derived from the
            first image's key, the restart, the iteration and the number of the sample.
        x: [B, ...] floating-point images in [0, 1].
        labels: [B] integer class indices.
        eps: radius in units of pixels (of 8/255, say), a finite scalar of at least 0.
        norm: "linf" or "l2".
        loss: (logits [B, C], labels [B]) -> [B], which the attack maximises: the cross-entropy,
            ``losses.dlr``, ``losses.margin`` or any other.
        steps: gradient steps of a run, at least 0.
        rho: the share of rising iterations that a step size must exceed to be kept, from 0 to 1.
        restarts: runs in all, each from a fresh start, at least 1. Images that are no longer
            robust keep their result, and runs stop when no image is left.
        samples: evaluations over which loss and gradient are averaged at every iterate, for
            defences that draw random numbers, at least 1. An iterate counts as misclassified by
            the last of these evaluations.
        key: a typed key, or one for each image [B], for the starts.
        noise: [B, ...] in place of a key, the draws of a single run: in [-1, 1] for linf, which
            starts at ``x + eps * noise / max|noise|``; standard normal for l2, which starts at
            ``x + eps * noise / ||noise||_2``.

    Returns:
        `Apgd` with the adversarial images, the mask of robust images, and the best iterates.

    Raises:
        TypeError: ``x`` is not floating point, ``labels`` not integers, ``key`` no typed key, or
            ``loss`` no function.
        ValueError: images outside [0, 1], labels that are no class, an unknown norm, a number out
            of its range, not exactly one of key and noise, noise with several restarts or samples,
            or a loss that is not one value per image.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax import attacks
        >>> x, labels = jnp.array([[[[0.3]]], [[[0.45]]]]), jnp.array([0, 0])
        >>> def logits_fn(images):  # class 1 where the pixel is above a half
        ...     pixel = images.reshape(-1, 1)
        ...     return jnp.concatenate([0.5 - pixel, pixel - 0.5], axis=1)
        >>> found = attacks.apgd(logits_fn, x, labels, eps=0.1, steps=5, key=jax.random.key(0))
        >>> found.robust
        Array([ True, False], dtype=bool)

    Reference:
        F. Croce, M. Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
        Diverse Parameter-free Attacks", ICML 2020, algorithm 1, with the details of the published
        code: the first check compares the first loss with 0, and going back to the best iterate
        leaves x_{k-1} as it was.
    """
    x = _inputs.images(x)
    labels = _inputs.class_labels(labels, len(x))
    norm = _inputs.norm(norm)
    steps = _checks.count("steps", steps, low=0)
    restarts, samples = _checks.count("restarts", restarts), _checks.count("samples", samples)
    eps = _inputs.size("eps", eps, x)
    _inputs.check_radius(eps, norm)
    rho = jnp.asarray(_checks.number("rho", rho, low=0, high=1), x.dtype)
    if not callable(loss):
        raise TypeError(
            "loss must be a function of logits [B, C] and labels [B], got "
            f"{_checks.describe(loss)}."
        )
    draws, keys = _randomness(x, key, noise, restarts, samples)

    def run(number: ArrayLike) -> Apgd:
        here = None if keys is None else _inputs.fold(keys, number)
        start = _start(x, eps, norm, draws if here is None else _draw(here, x, norm))
        stream = None if here is None else jax.random.fold_in(here[0], 1)
        evaluate = _evaluation(logits_fn, loss, labels, samples, stream)
        return _run(evaluate, x, start, eps, rho, norm, steps)

    return run(0) if restarts == 1 else _restarted(run, x, restarts)


def apgd_targeted(
    logits_fn: Callable[..., jax.Array],
    x: ArrayLike,
    labels: ArrayLike,
    *,
    targets: ArrayLike,
    eps: ArrayLike,
    norm: str = "linf",
    steps: int = 100,
    rho: ArrayLike = 0.75,
    restarts: int = 1,
    samples: int = 1,
    key: jax.Array | None = None,
    noise: ArrayLike | None = None,
) -> Apgd:
    """Auto-PGD towards a target class of each image, by the targeted difference of logits ratio.

    An image is fooled by any misclassification, not only as the target. The published attack runs
    this for the classes of largest clean logit after the label, one after the other.

    Args:
        logits_fn: as in `apgd`, with at least 4 classes.
        x: as in `apgd`.
        labels: as in `apgd`.
        targets: [B] integer class indices. Where the target is the label there is no gradient.
        eps: as in `apgd`.
        norm: as in `apgd`.
        steps: as in `apgd`.
        rho: as in `apgd`.
        restarts: as in `apgd`.
        samples: as in `apgd`.
        key: as in `apgd`.
        noise: as in `apgd`.

    Returns:
        `Apgd`, as `apgd`.

    Raises:
        TypeError: as `apgd`, or ``targets`` are not integers.
        ValueError: as `apgd`, fewer than 4 classes, or targets that are no class.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax import attacks
        >>> x, labels = jnp.array([[0.9, 0.1, 0.2, 0.0], [0.5, 0.4, 0.1, 0.1]]), jnp.array([0, 0])
        >>> logits_fn = lambda images: images  # four pixels, four classes
        >>> found = attacks.apgd_targeted(
        ...     logits_fn, x, labels, targets=jnp.array([1, 1]), eps=0.1, steps=5,
        ...     key=jax.random.key(0),
        ... )
        >>> found.robust
        Array([ True, False], dtype=bool)

    Reference:
        F. Croce, M. Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
        Diverse Parameter-free Attacks", ICML 2020, section 4.1, equation 7.
    """
    x = _inputs.images(x)
    aims = _checks.integer("targets", targets)
    _checks.shape("targets", aims, x.shape[:1], "(one per image)")

    def towards(logits: jax.Array, labels: jax.Array) -> jax.Array:
        _targets_in_range(aims, logits.shape[-1])
        return losses.targeted_dlr(logits, labels, aims)

    return apgd(
        logits_fn, x, labels, eps=eps, norm=norm, loss=towards, steps=steps, rho=rho,
        restarts=restarts, samples=samples, key=key, noise=noise,
    )  # fmt: skip


def checkpoints(steps: int) -> np.ndarray:
    """[steps + 1] int: the length of the window that ends after a step, 0 where none ends.

    Entry 0 is the start. The iterations of the checks do not depend on the images.
    """
    window, shortest, shorter = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found = np.zeros(steps + 1, np.int32)
    at = window
    while at <= steps:
        found[at] = window
        window = max(window - shorter, shortest)
        at += window
    return found


class _State(NamedTuple):
    """One iteration's inputs; all but the images are one value per image."""

    x: jax.Array
    previous: jax.Array
    step: jax.Array
    robust: jax.Array
    x_adv: jax.Array
    x_best: jax.Array
    gradient_best: jax.Array
    loss_best: jax.Array
    loss: jax.Array
    rises: jax.Array
    loss_checked: jax.Array
    reduced: jax.Array


def _run(
    evaluate: Evaluate,
    x: jax.Array,
    start: jax.Array,
    eps: jax.Array,
    rho: jax.Array,
    norm: str,
    steps: int,
) -> Apgd:
    """One run. The start is an iteration like the others, so the program has the model once."""

    def iterate(s: _State, at: tuple[jax.Array, jax.Array]) -> tuple[_State, None]:
        number, window = at
        loss, correct, gradient = evaluate(s.x, number)
        s = _recorded(s, loss, correct, gradient)
        # The published code reads the loss before the first step as 0.
        rises = s.rises + (loss > s.loss)
        s = s._replace(rises=rises, loss=jnp.where(number == 0, 0, loss))
        s, gradient = _checked(s, gradient, window, rho)
        share = jnp.where(number == 0, 1, 0.75).astype(x.dtype)
        return s._replace(x=_moved(s, gradient, share, x, eps, norm), previous=s.x), None

    zero = _zero(x)
    state = _State(
        x=start,
        previous=start,
        step=2 * eps + zero,
        robust=zero == 0,
        x_adv=x,
        x_best=start,
        gradient_best=0 * start,
        loss_best=zero + jnp.nan,
        loss=zero + jnp.inf,
        rises=zero.astype(jnp.int32),
        loss_checked=zero,
        reduced=zero == 0,
    )
    numbers = (jnp.arange(steps + 1), jnp.asarray(checkpoints(steps)))
    state, _ = jax.lax.scan(iterate, state, numbers)
    return Apgd(state.x_adv, state.robust, state.x_best, state.loss_best)


def _recorded(s: _State, loss: jax.Array, correct: jax.Array, gradient: jax.Array) -> _State:
    """The records with the iterate that has just been evaluated."""
    better = _better(loss, s.loss_best)
    return s._replace(
        robust=s.robust & correct,
        x_adv=jnp.where(rows(correct, s.x), s.x_adv, s.x),
        x_best=jnp.where(rows(better, s.x), s.x, s.x_best),
        gradient_best=jnp.where(rows(better, s.x), gradient, s.gradient_best),
        loss_best=jnp.where(better, loss, s.loss_best),
    )


def _checked(
    s: _State, gradient: jax.Array, window: jax.Array, rho: jax.Array
) -> tuple[_State, jax.Array]:
    """Half the step from the best iterate where progress has stopped, if a window ends here."""
    check = window > 0
    oscillates = s.rises <= rho * window.astype(rho.dtype)
    stalls = ~s.reduced & (s.loss_best == s.loss_checked)
    reduce = check & (oscillates | stalls)
    back = rows(reduce, s.x)
    state = s._replace(
        x=jnp.where(back, s.x_best, s.x),
        step=jnp.where(reduce, s.step / 2, s.step),
        rises=jnp.where(check, 0, s.rises),
        loss_checked=jnp.where(check, s.loss_best, s.loss_checked),
        reduced=jnp.where(check, reduce, s.reduced),
    )
    return state, jnp.where(back, s.gradient_best, gradient)


def _moved(
    s: _State, gradient: jax.Array, share: jax.Array, x: jax.Array, eps: jax.Array, norm: str
) -> jax.Array:
    """The next iterate: a step along the gradient, mixed with the step before."""
    if norm == _inputs.LINF:
        direction = jnp.sign(gradient)
    else:
        direction = gradient / (l2_norm(gradient) + _TINY)
    aim = _projected(s.x + rows(s.step, x) * direction, x, eps, norm)
    momentum = (1 - share) * (s.x - s.previous)
    return _projected(s.x + share * (aim - s.x) + momentum, x, eps, norm)


def _projected(x_adv: jax.Array, x: jax.Array, eps: jax.Array, norm: str) -> jax.Array:
    if norm == _inputs.LINF:
        return into_box(x_adv, x, eps)
    offset = x_adv - x
    length = l2_norm(offset)
    return clip01(x + offset / (length + _TINY) * jnp.minimum(eps, length))


def _evaluation(
    logits_fn: Callable[..., jax.Array],
    loss: Loss,
    labels: jax.Array,
    samples: int,
    key: jax.Array | None,
) -> Evaluate:
    """(images, iteration) -> loss [B], correct [B], gradient [B, ...], from one pass each."""

    def once(images: jax.Array, logits_of: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        def summed(images: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            z = _inputs.logits(logits_of, images)
            _inputs.in_range(labels, z.shape[-1])
            found = _values(loss(z, labels), images)
            return found.sum(), (found, _inputs.correct(z, labels))

        gradient, (found, correct) = jax.grad(summed, has_aux=True)(images)
        # An image must stay an image whatever the model does with it.
        return found, correct, jnp.where(jnp.isfinite(gradient), gradient, 0)

    if samples == 1 or key is None:
        return lambda images, number: once(images, logits_fn)

    def averaged(images: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        here = jax.random.fold_in(key, number)

        def add(carry: Any, sample: jax.Array) -> tuple[Any, None]:
            sample_key = jax.random.fold_in(here, sample)
            drawn = (lambda z: logits_fn(z, sample_key)) if callable(logits_fn) else logits_fn
            found, correct, gradient = once(images, drawn)
            return (carry[0] + found, correct, carry[2] + gradient), None

        zero = _zero(images)
        carry = (zero, zero == 0, 0 * images)
        (found, correct, gradient), _ = jax.lax.scan(add, carry, jnp.arange(samples))
        return found / samples, correct, gradient / samples

    return averaged


def _restarted(run: Callable[[ArrayLike], Apgd], x: jax.Array, restarts: int) -> Apgd:
    """Runs until no image is robust, one program for all of them."""

    def unfinished(carry: tuple[jax.Array, Apgd]) -> jax.Array:
        number, found = carry
        return (number < restarts) & found.robust.any()

    def again(carry: tuple[jax.Array, Apgd]) -> tuple[jax.Array, Apgd]:
        number, found = carry
        new = run(number)
        better = found.robust & _better(new.loss_best, found.loss_best)
        merged = Apgd(
            x_adv=jnp.where(rows(found.robust, x), new.x_adv, found.x_adv),
            robust=found.robust & new.robust,
            x_best=jnp.where(rows(better, x), new.x_best, found.x_best),
            loss_best=jnp.where(better, new.loss_best, found.loss_best),
        )
        return number + 1, merged

    zero = _zero(x)
    none = Apgd(x_adv=x, robust=zero == 0, x_best=x, loss_best=zero + jnp.nan)
    return jax.lax.while_loop(unfinished, again, (jnp.int32(0), none))[1]


def _randomness(
    x: jax.Array, key: jax.Array | None, noise: ArrayLike | None, restarts: int, samples: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """The draws of the only start, or a key for each image."""
    if (key is None) == (noise is None):
        raise ValueError("exactly one of key and noise must be given.")
    if key is not None:
        return None, _inputs.keys(key, len(x))
    for name, number in (("restarts", restarts), ("samples", samples)):
        if number > 1:
            raise ValueError(f"{name} must be 1 with noise, got {number}: give a key instead.")
    draws = _checks.floating("noise", noise)
    _checks.same_shape("noise", draws, "x", x)
    return draws.astype(x.dtype), None


def _draw(keys: jax.Array, x: jax.Array, norm: str) -> jax.Array:
    keys = _inputs.fold(keys, 0)
    if norm == _inputs.LINF:
        return _inputs.uniform(keys, x.shape[1:], x.dtype, -1.0, 1.0)
    return _inputs.normal(keys, x.shape[1:], x.dtype)


def _start(x: jax.Array, eps: jax.Array, norm: str, draws: Any) -> jax.Array:
    """On the surface of the ball, then into the range of images."""
    length = linf_norm(draws) if norm == _inputs.LINF else l2_norm(draws)
    return clip01(x + eps * (draws / jnp.where(length > 0, length, 1)))


def _better(loss: jax.Array, best: jax.Array) -> jax.Array:
    """Strictly larger, or the first number after none."""
    return (loss > best) | jnp.isnan(best)


def _zero(x: jax.Array) -> jax.Array:
    """[B] zeros that vary over devices as the images do, which loops under shard_map ask for."""
    return 0 * x.reshape(len(x), -1)[:, 0]


def _values(found: Any, images: jax.Array) -> jax.Array:
    """What a loss returned, in the images' dtype, refused unless it is one number per image."""
    found = _checks.floating("the result of loss", found)
    if found.shape != images.shape[:1]:
        raise ValueError(
            f"loss must return one value per image, shape {images.shape[:1]}, got shape "
            f"{found.shape}."
        )
    return found.astype(images.dtype)


def _targets_in_range(targets: jax.Array, classes: int) -> None:
    if _checks.is_traced(targets):
        return
    known = np.asarray(targets)
    wrong = known[(known < 0) | (known >= classes)]
    if wrong.size:
        raise ValueError(
            f"targets must be class indices from 0 to {classes - 1}, got {wrong.flat[0]}."
        )
