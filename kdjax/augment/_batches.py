"""Augmentations of whole batches, and chains of augmentations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import _checks
from kdjax.augment import _draws
from kdjax.augment._pixels import to_float

Batch = dict[str, Any]


def mixup(key: jax.Array, batch: Mapping[str, Any], *, alpha: Any = 0.2, num_classes: int) -> Batch:
    """Mixes every example with another of the batch: l x_i + (1 - l) x_j, l ~ Beta(alpha, alpha).

    ``label`` becomes the same mixture of the one-hot labels. Where either label is -1 its row is
    all zeros: such rows count in soft terms only. ``weight`` becomes the product of both weights.
    Stored teacher outputs in the batch are those of the unmixed images: don't use them with it.

    Args:
        key: one typed key. Partners are drawn within the batch as the function sees it, so under
            shard_map and pmap within each device's part.
        batch: dict with ``image`` [B, H, W, C] and ``label`` [B], integers from -1 to C-1.
        alpha: at least 0; 0 changes no image. The paper uses 1 for CIFAR, 0.2 for ImageNet.
        num_classes: C, at least 1.

    Returns:
        The batch with ``image`` [B, H, W, C], ``label`` float [B, C], other entries as they were.

    Raises:
        ValueError: batch has no image or label, alpha is negative, or a label is outside -1 .. C-1
            (inside jit, where labels have no values yet, the rows mixed from it are NaN).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kdjax.augment import mixup
        >>> batch = {"image": jnp.ones((2, 4, 4, 1)), "label": jnp.array([0, 2])}
        >>> mixup(jax.random.key(0), batch, alpha=1.0, num_classes=3)["label"].sum(axis=1).tolist()
        [1.0, 1.0]

    Reference:
        H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz, "mixup: beyond empirical risk
        minimization", ICLR 2018, equation 2.
    """
    images = to_float(_checks.entry("batch", batch, "image"))
    label = _checks.integer("batch['label']", _checks.entry("batch", batch, "label"), ndim=1)
    classes = _checks.count("num_classes", num_classes)
    label, invalid = _class_indices(label, classes)
    alpha = jnp.asarray(_checks.number("alpha", alpha, low=0), images.dtype)
    if jnp.shape(key) != ():
        raise ValueError(f"key must be one typed key, got {_checks.describe(key)}.")
    _draws.keys(key, images)
    order_key, share_key = jax.random.split(key)
    partner = jax.random.permutation(order_key, images.shape[0])
    shape = jnp.where(alpha > 0, alpha, 1.0)
    drawn = jax.random.beta(share_key, shape, shape, label.shape, images.dtype)
    share = jnp.where(alpha > 0, drawn, 1.0)

    pixel_share = share[:, None, None, None]
    target = jax.nn.one_hot(label, classes, dtype=images.dtype)
    known = ((label >= 0) & (label[partner] >= 0))[:, None]
    target = share[:, None] * target + (1 - share[:, None]) * target[partner]
    mixed = dict(batch)
    mixed["image"] = pixel_share * images + (1 - pixel_share) * images[partner]
    invalid = (invalid | invalid[partner])[:, None]
    mixed["label"] = jnp.where(invalid, jnp.nan, jnp.where(known, target, 0.0))
    if "weight" in batch:
        weight = jnp.asarray(batch["weight"])
        mixed["weight"] = weight * weight[partner]
    return mixed


def _class_indices(label: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """Labels wide enough for every class, and where a traced one is no class and not -1."""
    if not _checks.is_traced(label):
        known = np.asarray(label)
        wrong = known[(known < -1) | (known >= num_classes)]
        if wrong.size:
            raise ValueError(
                f"batch['label'] must hold class indices from 0 to {num_classes - 1}, or -1 for "
                f"unlabelled rows, got {wrong.flat[0]}."
            )
    if label.dtype != jnp.int64:
        label = label.astype(jnp.int32)
    return label, (label < -1) | (label >= num_classes)


def compose(*functions: Callable[..., Any]) -> Callable[[jax.Array, Mapping[str, Any]], Batch]:
    """Chains augmentations into one function (key, batch) -> batch.

    Options are bound with ``functools.partial``. What is left of a function's signature says how it
    is called: ``(images)`` and ``(key, images)`` get ``batch["image"]``; a function whose second
    argument is named ``batch`` gets the whole batch and one key. The images' keys are
    ``fold_in(fold_in(key, position), batch["index"])``: what happens to an example depends on the
    key and its index only, never on how the batch is ordered, cut or sharded.

    Args:
        *functions: image and batch functions, in the order in which they are applied.

    Returns:
        A function (key, batch) -> batch; key is one typed key, batch has ``image`` and ``index``.

    Raises:
        TypeError: a function has another signature.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from functools import partial
        >>> from kdjax.augment import compose, normalize, random_crop, random_flip
        >>> augment = compose(random_crop, random_flip, partial(normalize, mean=0.5, std=0.25))
        >>> batch = {"image": jnp.ones((4, 32, 32, 3)), "index": jnp.arange(4)}
        >>> jax.jit(augment)(jax.random.key(0), batch)["image"].shape
        (4, 32, 32, 3)
    """
    calls = [
        (function, *_signature(position, function)) for position, function in enumerate(functions)
    ]

    def augmented(key: jax.Array, batch: Mapping[str, Any]) -> Batch:
        result = dict(batch)
        for position, (function, takes_key, takes_batch) in enumerate(calls):
            image = result if takes_batch else _checks.entry("batch", result, "image")
            if not takes_key:
                changed = function(image)
            else:
                own = jax.random.fold_in(key, position)
                if not takes_batch:
                    own = _example_keys(own, result)
                changed = function(own, image)
            result = dict(changed) if takes_batch else {**result, "image": changed}
        return result

    return augmented


def _signature(position: int, function: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether ``function`` takes a key, and whether it takes the batch rather than its images."""
    wanted = (
        "must be a function (images), (key, images), (key, batch) or (batch), its options bound "
        "with functools.partial"
    )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"functions[{position}] {wanted}, got {_checks.describe(function)}."
        ) from error
    required = [
        p
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    names = [p.name for p in required]
    if len(names) not in (1, 2) or any(p.kind is p.KEYWORD_ONLY for p in required):
        raise TypeError(
            f"functions[{position}] {wanted}; {getattr(function, '__name__', 'it')} still asks for "
            f"({', '.join(names)})."
        )
    return len(names) == 2, names[-1] == "batch"


def _example_keys(key: jax.Array, batch: Mapping[str, Any]) -> jax.Array:
    index = _checks.entry(
        "batch", batch, "index", "Augmentation draws each example's key from its index."
    )
    index = _checks.integer("batch['index']", index, ndim=1)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)
