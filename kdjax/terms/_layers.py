"""What the Terms of transformers share: which layers, which tokens, which projection."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax._pairs import Batch, Outputs, Tree
from kdjax.terms._outputs import student_output, teacher_output

Layers = Sequence[int] | Mapping[int, int] | None
Initializer = Callable[..., jax.Array]


def uniform_layers(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """The teacher's layer for each layer of the student, evenly spaced and ending with the last.

        g(i) = i k + k - 1,   k = N / M,   i = 0 .. M - 1

    Args:
      teacher_layers: N.
      student_layers: M, a divisor of N.

    Returns:
      M layer numbers from 0 on. Hidden states, which have the embeddings in front, are matched as
      ``hidden[i + 1]`` with ``hidden[g(i) + 1]``, and embeddings with embeddings.

    Raises:
      ValueError: M doesn't divide N.

    Example:
      >>> import kdjax as kd
      >>> kd.terms.uniform_layers(12, 4)
      (2, 5, 8, 11)

    Reference:
      X. Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", Findings of
      EMNLP 2020, section 3.1.
    """
    n = _checks.count("teacher_layers", teacher_layers)
    m = _checks.count("student_layers", student_layers)
    if n % m:
        raise ValueError(
            f"student_layers must divide the teacher's {n} layers for a uniform map, got {m}: "
            "give the Term layers= explicitly."
        )
    step = n // m
    return tuple(range(step - 1, n, step))


def layer_pairs(layers: Layers, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Pairs of a student's and a teacher's layer, checked."""
    if layers is None:
        return list(enumerate(uniform_layers(teacher_layers, student_layers)))
    if isinstance(layers, Mapping):
        pairs = list(layers.items())
    else:
        pairs = list(enumerate(layers))
        if len(pairs) != student_layers:
            raise ValueError(
                f"layers must have one of the teacher's layers for each of the student's "
                f"{student_layers}, got {len(pairs)}: a dict matches only some."
            )
    if not pairs:
        raise ValueError("layers must match at least one layer, got none.")
    for i, j in pairs:
        _checks.count("layers, of the student,", i, low=0, high=student_layers - 1)
        _checks.count("layers, of the teacher,", j, low=0, high=teacher_layers - 1)
    return pairs


def stack(side: str, outputs: Outputs, name: str) -> Sequence[jax.Array]:
    """The arrays of all layers that a model returned as one output."""
    found = student_output(outputs, name) if side == "student" else teacher_output(outputs, name)
    if not isinstance(found, (tuple, list)) or not found:
        raise TypeError(
            f"the {side}'s output {name!r} must be a tuple of one array per layer, got "
            f"{_checks.describe(found)}."
        )
    return found


def layer(name: str, number: int, count: int) -> int:
    """A layer's number, checked; negative ones count from the last."""
    return _checks.count(name, number, low=-count, high=count - 1)


def real_tokens(batch: Batch, name: str, examples: int, length: int) -> jax.Array:
    """[B, L] bool, True for tokens that the attention mask and the example weights keep."""
    real = jnp.ones((examples, length), bool)
    if name in batch:
        given = _checks.as_array(f"batch[{name!r}]", batch[name])
        if not (given.dtype == jnp.bool_ or jnp.issubdtype(given.dtype, jnp.integer)):
            raise TypeError(
                f"batch[{name!r}] must hold 1 for real tokens and 0 for padding, got "
                f"{_checks.describe(given)}."
            )
        _checks.shape(f"batch[{name!r}]", given, real.shape, "like the student's tokens")
        real = given != 0
    if "weight" in batch:
        weight = jnp.asarray(batch["weight"])
        _checks.shape("batch['weight']", weight, (examples,), "for the examples")
        real = real & (weight > 0)[:, None]
    return real


def total(values: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, values)


def init_projection(
    key: jax.Array, s: jax.Array, t: jax.Array, bias: bool, kernel_init: Initializer | None
) -> Tree:
    make = jax.nn.initializers.normal(0.02) if kernel_init is None else kernel_init
    kernel = make(key, (s.shape[-1], t.shape[-1]), jnp.float32)
    return {"kernel": kernel, **({"bias": jnp.zeros(t.shape[-1])} if bias else {})}


def project(own: Tree, s: jax.Array, real: jax.Array | None) -> jax.Array:
    """States [B, L, d] to the teacher's width, those of tokens that aren't real from zeros."""
    s = _checks.floating("the student's hidden states", s, ndim=3)
    if s.shape[-1] != own["kernel"].shape[0]:
        raise ValueError(
            f"the student's hidden states must have {own['kernel'].shape[0]} channels like the "
            f"projection, got {_checks.describe(s)}."
        )
    if real is not None:  # a NaN there would reach the kernel's gradient
        s = jnp.where(real[..., None], s, 0)
    s = jnp.dot(s, own["kernel"].astype(s.dtype))
    return s + own["bias"].astype(s.dtype)[None, None] if "bias" in own else s


def same_width(s: Any, t: Any) -> None:
    if s.shape[-1] != t.shape[-1]:
        raise ValueError(
            "the student's hidden states must be as wide as the teacher's without a projection, "
            f"got {s.shape[-1]} and {t.shape[-1]}: project=True of kdjax.terms.hidden_states "
            "projects them, alpha_cos=0 of the methods leaves them out."
        )
