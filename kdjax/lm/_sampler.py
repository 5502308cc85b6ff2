"""A GPT-2 that writes completions inside a training step, one stream of draws per example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks
from kdjax._pairs import Tree
from kdjax.lm._config import Config, GPT2Config
from kdjax.lm._generate import generate

Sampler = Callable[[Tree, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def sampler(
    config: Config,
    *,
    length: int,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
    end_token: int | None = None,
    pad_token: int = 0,
    dtype: Any = None,
) -> Sampler:
    """A function that continues prompts, for methods that train on what the student writes.

    It is `generate` with one key for each example, so that what is written for an example depends
    neither on the rows beside it nor on how the batch is spread over devices.

    Args:
      config: of a GPT-2 with a language-model head.
      length: tokens to add, at least 1.
      temperature: of sampling, above 0; traced, where 0 takes the likeliest token.
      top_k: sample among so many of the likeliest tokens; all by default.
      top_p: sample among the likeliest tokens that together have this probability; traced.
      end_token: a completion ends after it.
      pad_token: what follows an end.
      dtype: precision of the forward pass, as in `kdjax.lm.model`.

    Returns:
      ``(params, prompt_ids [B, P], prompt_mask [B, P], keys [B]) -> (tokens [B, length], real [B,
      length])``; ``real`` is False after an end.

    Raises:
      ValueError: the model has no language-model head, or ``length`` is below 1. When it runs,
        options out of their range, as in `generate`.

    Example:
      >>> import jax, jax.numpy as jnp, kdjax as kd
      >>> from kdjax.lm import sampler
      >>> config = kd.lm.GPT2Config(vocab_size=50, hidden_size=8, num_layers=2, num_heads=2)
      >>> params, _ = kd.lm.model(config).init(jax.random.key(0))
      >>> sample = sampler(config, length=5, temperature=0.9)
      >>> prompts, keys = jnp.ones((3, 4), jnp.int32), jax.random.split(jax.random.key(1), 3)
      >>> tokens, real = sample(params, prompts, jnp.ones((3, 4), bool), keys)
      >>> tokens.shape, bool(real.all())
      ((3, 5), True)
    """
    if not isinstance(config, GPT2Config) or config.head != "lm":
        raise ValueError("config must be a GPT2Config with the head 'lm' to write completions.")
    length = _checks.count("length", length)

    def sample(
        params: Tree, prompt_ids: jax.Array, prompt_mask: jax.Array, keys: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def one(ids: jax.Array, mask: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            tokens, _ = generate(
                config,
                params,
                ids[None],
                length=length,
                key=key,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                attention_mask=mask[None],
                dtype=dtype,
            )
            if end_token is None:
                return tokens[0], jnp.ones_like(tokens[0], bool)
            # What the loop wrote after an end changed nothing before it.
            ends = tokens[0] == end_token
            real = jnp.cumsum(ends) - ends == 0
            return jnp.where(real, tokens[0], pad_token), real

        return jax.vmap(one)(prompt_ids, prompt_mask, keys)

    return sample
