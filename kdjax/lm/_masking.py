"""Masked language modelling: which tokens are hidden, drawn anew in every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import _checks


def mask_tokens(
    key: jax.Array,
    batch: Mapping[str, Any],
    *,
    mask_token: int,
    vocab_size: int,
    rate: ArrayLike = 0.15,
    special: Sequence[int] = (),
    token_weights: ArrayLike | None = None,
    ignore: int = -100,
) -> dict[str, Any]:
    """BERT's masking as a batch function, for ``kdjax.distill(augment=...)``.

    Of the real tokens that aren't special, each is chosen with probability ``rate``; of the chosen,
    80 % become ``mask_token``, 10 % a random token, and 10 % stay. ``labels`` holds the original
    ids of the chosen ones. Draws are per example (by ``batch["index"]``, if it is there), so that
    sharding doesn't change them.

    Args:
      key: one typed key.
      batch: dict with ``input_ids`` [B, L] and, if rows are padded, ``attention_mask`` [B, L].
      mask_token: the id of ``[MASK]``.
      vocab_size: random tokens are below it.
      rate: in [0, 1]; traced.
      special: ids that are never chosen (``[CLS]``, ``[SEP]``, ``[PAD]``).
      token_weights: [vocab_size] from 0 on, how much likelier than others each id is to be chosen;
        their mean over the batch's tokens is scaled to 1, so that about ``rate`` is chosen.
        DistilBERT's code takes counts ** -0.7.
      ignore: the label of tokens that aren't chosen.

    Returns:
      The batch with new ``input_ids`` and with ``labels`` int32 [B, L].

    Raises:
      TypeError: ``input_ids`` isn't integer.
      ValueError: an option is out of range.

    Example:
      >>> import functools, jax, jax.numpy as jnp, kdjax as kd
      >>> hide = functools.partial(kd.lm.mask_tokens, mask_token=4, vocab_size=50)
      >>> batch = hide(jax.random.key(0), {"input_ids": jnp.full((2, 100), 7)})
      >>> 10 < int((batch["labels"] != -100).sum()) < 50
      True

    Reference:
      J. Devlin, M.-W. Chang, K. Lee, K. Toutanova, "BERT", NAACL 2019, section 3.1.
    """
    ids = _checks.integer(
        "batch['input_ids']", _checks.entry("batch", batch, "input_ids"), ndim=2
    ).astype(jnp.int32)
    vocab_size = _checks.count("vocab_size", vocab_size)
    _checks.count("mask_token", mask_token, low=0, high=vocab_size - 1)
    rate = jnp.asarray(_checks.number("rate", rate, low=0, high=1), jnp.float32)
    allowed = jnp.ones(ids.shape, bool)
    if "attention_mask" in batch:
        allowed = jnp.asarray(batch["attention_mask"]) != 0
        _checks.shape("batch['attention_mask']", allowed, ids.shape, "(as input_ids)")
    if np.size(special):
        allowed &= ~jnp.isin(ids, _checks.integer("special", np.asarray(special), ndim=1))
    chance = rate
    if token_weights is not None:
        table = _checks.floating("token_weights", token_weights, ndim=1)
        _checks.shape("token_weights", table, (vocab_size,), "(one for each id)")
        _checks.number("token_weights", table, low=0, scalar=False)
        own = jnp.where(allowed, table[ids].astype(jnp.float32), 0)
        # Per example, so that a row's draws don't depend on the rows beside it.
        count = jnp.maximum(allowed.sum(1, keepdims=True), 1)
        mean = own.sum(1, keepdims=True) / count
        chance = rate * own / jnp.where(mean > 0, mean, 1)

    index = jnp.asarray(batch.get("index", jnp.arange(len(ids))))
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        choose, replace, random = jax.random.split(key, 3)
        return (
            jax.random.uniform(choose, ids.shape[1:]),
            jax.random.uniform(replace, ids.shape[1:]),
            jax.random.randint(random, ids.shape[1:], 0, vocab_size, ids.dtype),
        )

    choose, replace, random = jax.vmap(draw)(keys)
    chosen = allowed & (choose < chance)
    new = jnp.where(replace < 0.8, mask_token, jnp.where(replace < 0.9, random, ids))
    return {
        **batch,
        "input_ids": jnp.where(chosen, new, ids),
        "labels": jnp.where(chosen, ids, ignore),
    }
