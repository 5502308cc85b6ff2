"""Text from a GPT-2, one compiled loop with a cache of keys and values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import _checks, _mesh_axis
from kdjax._pairs import Model, Tree
from kdjax.lm import _gpt2, _model
from kdjax.lm._config import Config, GPT2Config


def generate(
    config: Config,
    params: Tree,
    prompt: ArrayLike,
    *,
    length: int,
    key: jax.Array | None = None,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
    attention_mask: ArrayLike | None = None,
    end_token: int | None = None,
    pad_token: int = 0,
    dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Continues prompts with sampled tokens; works inside jit, and compiles once there.

    Args:
      config: of a GPT-2 with a language-model head.
      params: its parameters.
      prompt: [B, P] integer. Shorter prompts are padded on the left, or on the right: what counts
        is ``attention_mask``.
      length: tokens to add, at least 1.
      key: for sampling. Without it the likeliest token is taken every time.
      temperature: of sampling, above 0; traced, where 0 takes the likeliest token.
      top_k: sample among so many of the likeliest tokens; all by default.
      top_p: sample among the likeliest tokens that together have this probability; traced.
      attention_mask: [B, P], 1 or True for real tokens; all by default. Every prompt needs one.
      end_token: a sequence ends after it.
      pad_token: what follows an end.
      dtype: precision of the forward pass, as in `model`.

    Returns:
      ``(tokens [B, length] int32, real [B, length] bool)``; ``real`` is False after an end token.

    Raises:
      TypeError: prompt is not integer.
      ValueError: the model has no language-model head or not enough positions, or an option is out
        of range.

    Example:
      >>> import jax, jax.numpy as jnp, kdjax as kd
      >>> config = kd.lm.GPT2Config(vocab_size=50, hidden_size=8, num_layers=2, num_heads=2)
      >>> params, _ = kd.lm.model(config).init(jax.random.key(0))
      >>> tokens, real = kd.lm.generate(
      ...     config, params, jnp.ones((3, 4), jnp.int32), length=5, key=jax.random.key(1)
      ... )
      >>> tokens.shape, bool(real.all())
      ((3, 5), True)
    """
    if not isinstance(config, GPT2Config) or config.head != "lm":
        raise ValueError("config must be a GPT2Config with the head 'lm' to generate text.")
    prompt = _checks.integer("prompt", prompt, ndim=2)
    length = _checks.count("length", length)
    room = prompt.shape[1] + length
    if room > config.max_positions or not prompt.shape[1]:
        raise ValueError(
            f"prompt and length must make 1 + 1 to {config.max_positions} positions, got "
            f"{prompt.shape[1]} + {length}."
        )
    _checks.number("temperature", temperature, above=0)
    if top_k is not None:
        _checks.count("top_k", top_k, high=config.vocab_size)
    if top_p is not None:
        _checks.number("top_p", top_p, above=0, high=1)
    mask = jnp.ones(prompt.shape, bool)
    if attention_mask is not None:
        mask = _checks.as_array("attention_mask", attention_mask) != 0
        _checks.shape("attention_mask", mask, prompt.shape, "(as prompt)")
    net = _model.model(config, outputs=("logits", "cache"), dtype=dtype)

    def draw(logits: jax.Array, step: jax.Array) -> jax.Array:
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if key is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # With the likeliest at 0 a temperature that falls to 0 in a trace leaves it alone.
        logits = logits - jnp.max(logits, axis=-1, keepdims=True)
        lowest = float(jnp.finfo(logits.dtype).tiny)
        kept = _likeliest(logits / jnp.maximum(temperature, lowest), top_k, top_p)
        found = jax.random.categorical(jax.random.fold_in(key, step), kept, axis=-1)
        return found.astype(jnp.int32)

    return _loop(config, net, params, prompt, mask, length, draw, end_token, pad_token, dtype)


def _loop(
    config: GPT2Config,
    net: Model,
    params: Tree,
    prompt: jax.Array,
    mask: jax.Array,
    length: int,
    draw: Any,
    end_token: int | None,
    pad_token: int,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """The prompt at once, then token by token."""
    batch, width = prompt.shape
    stored = jax.tree.leaves(params)[0].dtype if dtype is None else dtype
    # Keys of padding and of tokens to come are masked by ``seen``.
    seen = jnp.concatenate([mask, jnp.zeros((batch, length), bool)], axis=1)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    out, _ = net.apply(
        params,
        {},
        {
            "input_ids": jnp.where(mask, prompt, 0),
            "position_ids": positions,
            "attention_mask": seen,
            "cache": _gpt2.empty_cache(config, batch, width + length, stored),
        },
    )
    last = width - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    first = draw(out["logits"][jnp.arange(batch), last], jnp.int32(0))
    at = mask.sum(axis=1)

    def step(carry: Any, i: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        cache, seen, token, live = carry
        seen = seen.at[:, width + i].set(live)
        out, _ = net.apply(
            params,
            {},
            {
                "input_ids": token[:, None],
                "position_ids": (at + i)[:, None],
                "attention_mask": seen,
                "cache": cache,
            },
        )
        following = draw(out["logits"][:, 0], i + 1)
        next_live = live if end_token is None else live & (token != end_token)
        following = jnp.where(next_live, following, pad_token)
        return (out["cache"], seen, following, next_live), (token, live)

    state = out["cache"], seen, first, jnp.ones((batch,), bool)
    # Under shard_map everything comes to differ between devices as soon as one token does.
    state = _mesh_axis.vary(state, *_mesh_axis.axes(first))
    carry, (tokens, real) = jax.lax.scan(step, state, jnp.arange(length - 1))
    tokens = jnp.concatenate([tokens, carry[2][None]]).T
    return tokens, jnp.concatenate([real, carry[3][None]]).T


def _likeliest(logits: jax.Array, top_k: int | None, top_p: ArrayLike | None) -> jax.Array:
    """Logits with -inf outside the likeliest tokens; the likeliest one always stays."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1)[..., ::-1]
        mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
        before = jnp.concatenate([jnp.zeros_like(mass[..., :1]), mass[..., :-1]], axis=-1)
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
