"""Losses of attention, relations and hidden states: reference numbers, masks, limits, bad input."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdjax import losses

GOLDEN = dict(np.load(Path(__file__).parent / "golden_lm_losses.npz"))
RANDOM = np.random.default_rng(4)
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]], bool)
SCORES = 2 * RANDOM.standard_normal((2, 3, 2, 5, 5))
STATES = RANDOM.standard_normal((3, 5, 6)), RANDOM.standard_normal((3, 5, 10))
BOTH = [
    functools.partial(losses.attention_mse, causal=causal, reduction=reduction)
    for causal in (False, True)
    for reduction in ("masked", "reference")
]


def golden(group):
    return {
        name.removeprefix(group + "/"): value
        for name, value in GOLDEN.items()
        if name.startswith(group + "/")
    }


# --- reference numbers ----------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["reference", "masked"])
def test_tinybert_reference_numbers(reduction):
    """Values and gradients of the published code, and of its masked form."""
    g = golden("tinybert")
    real = g["mask"] > 0
    teacher_scores = g["teacher_scores_masked"][g["att_map"]]
    teacher_hidden = g["teacher_hidden"][g["hid_map"]]
    masked = reduction == "masked"

    def mean(values, weights):
        return (values * weights).sum() / weights.sum() if masked else values.mean()

    def total(weight, bias, hidden, scores):
        n = jnp.asarray(real.sum(1), jnp.float64)
        attention = [
            mean(losses.attention_mse(s, t, where=real, reduction=reduction), n * n)
            for s, t in zip(scores, teacher_scores, strict=True)
        ]
        where = real if masked else None
        states = [
            mean(losses.hidden_mse(s @ weight.T + bias[None, None], t, where=where), real * 1.0)
            for s, t in zip(hidden, teacher_hidden, strict=True)
        ]
        return sum(attention) + sum(states), (jnp.stack(attention), jnp.stack(states))

    with jax.enable_x64(True):
        given = [g[k] for k in ("fit_W", "fit_b", "student_hidden", "student_scores_masked")]
        run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True))
        (value, (attention, states)), grads = run(*map(jnp.asarray, given))
    name = "masked" if masked else "ref"
    np.testing.assert_allclose(value, g[f"{name}_total"], rtol=1e-9)
    np.testing.assert_allclose(attention, g[f"{name}_att"], rtol=1e-9)
    np.testing.assert_allclose(states, g[f"{name}_rep"], rtol=1e-9)
    for key, found in zip("WbHA", grads, strict=True):
        if f"{name}_g{key}" in g:
            np.testing.assert_allclose(found, g[f"{name}_g{key}"], rtol=1e-9, atol=1e-12)


def test_minilm_reference_numbers():
    """Both versions: values of every part, gradients of their sums."""
    g = golden("minilm")
    real, heads = g["mask"], int(g["heads"])
    weights = real / real.sum()

    def scores(q, k):
        split = [x.reshape(*x.shape[:2], heads, -1) for x in (q, k)]
        return jnp.einsum("bqhd,bkhd->bhqk", *split) / split[0].shape[-1] ** 0.5

    def first(q, k, v):
        at = losses.attention_kl(scores(q, k), scores(g["q_t"], g["k_t"]), where=real)
        vr = losses.relation_kl(v, g["v_t"], relation_heads=heads, where=real)
        parts = [(x * weights).sum() for x in (at, vr)]
        return sum(parts), parts

    def second(*student):
        parts = []
        for s, name in zip(student, "qkv", strict=True):
            loss = losses.relation_kl(
                s, g[name + "_t"], relation_heads=int(g["relation_heads"]), where=real
            )
            parts.append((loss * weights).sum())
        return sum(parts), parts

    with jax.enable_x64(True):
        student = [jnp.asarray(g[k]) for k in ("q_s", "k_s", "v_s")]
        for version, loss, names in (("v1", first, "at vr"), ("v2", second, "qq kk vv")):
            run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
            (_, parts), grads = run(*student)
            for name, part in zip(names.split(), parts, strict=True):
                np.testing.assert_allclose(part, g[name], rtol=1e-9)
            for name, found in zip("qkv", grads, strict=True):
                np.testing.assert_allclose(found, g[f"{version}_g_{name}"], rtol=1e-9, atol=1e-12)


def test_relations_of_attention_heads_are_the_value_relation():
    """With A = H and equal widths, MiniLMv2's V-V is MiniLM's value relation."""
    values = RANDOM.standard_normal((2, 3, 5, 8)).astype(np.float32)
    split = values.reshape(2, 3, 5, 4, 2).transpose(0, 1, 3, 2, 4)
    scores = split @ split.swapaxes(-1, -2) / np.sqrt(np.float32(2))
    v1, v2 = jax.jit(
        lambda: (
            losses.attention_kl(*scores, where=MASK),
            losses.relation_kl(*values, relation_heads=4, where=MASK),
        )
    )()
    np.testing.assert_allclose(v2, v1, rtol=1e-4, atol=1e-7)


def test_cosine_distance_is_one_less_the_cosine():
    s, t = RANDOM.standard_normal((2, 3, 5, 6))
    cosine = (s * t).sum(-1) / np.sqrt((s**2).sum(-1) * (t**2).sum(-1))
    with jax.enable_x64(True):
        np.testing.assert_allclose(losses.cosine_distance(s, t), 1 - cosine, rtol=1e-10)
    ends = losses.cosine_distance(jnp.stack([s, -s, 0 * s]), jnp.stack([s, s, s]))
    wanted = np.broadcast_to(np.reshape([0, 2, 1], (3, 1, 1)), ends.shape)
    np.testing.assert_allclose(ends, wanted, atol=3e-7)


def test_zero_vectors_have_finite_gradients():
    grad = jax.grad(lambda s: losses.cosine_distance(s, jnp.ones((1, 4))).sum())
    assert np.all(np.isfinite(grad(jnp.zeros((1, 4)))))


# --- masks ----------------------------------------------------------------------------------


def crop(x, example, axes):
    """The part of one example that its real tokens have, which MASK keeps side by side."""
    keep = np.flatnonzero(MASK[example])
    x = np.asarray(x)[example : example + 1]
    for axis in axes:
        x = np.take(x, keep, axis)
    return x


LOSSES_OF_SCORES = {
    "mse": losses.attention_mse,
    "causal mse": functools.partial(losses.attention_mse, causal=True),
    "kl": losses.attention_kl,
    "causal kl": functools.partial(losses.attention_kl, causal=True),
}


@pytest.mark.parametrize("name", LOSSES_OF_SCORES)
def test_masked_tokens_are_as_if_deleted(name):
    """NaN there changes neither values nor gradients, which are those of shorter sequences."""
    loss = LOSSES_OF_SCORES[name]
    pairs = (MASK[:, :, None] & MASK[:, None, :])[:, None]
    student, teacher = np.where(pairs, SCORES, np.nan).astype(np.float32)

    def summed(s, t, where=None):
        value = loss(s, t, where=where)
        return value.sum(), value

    run = jax.jit(jax.grad(summed, has_aux=True))
    gradient, value = run(student, teacher, MASK)
    assert np.all(np.isfinite(value))
    assert not np.any(gradient[~np.broadcast_to(pairs, gradient.shape)])
    for b in range(3):
        short = [crop(x, b, (2, 3)) for x in (student, teacher)]
        wanted_gradient, wanted = run(*short)
        found = value[b] if value.ndim == 1 else value[b][MASK[b]]
        np.testing.assert_allclose(found, wanted[0], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(crop(gradient, b, (2, 3)), wanted_gradient, rtol=1e-4, atol=1e-6)
    if value.ndim == 2:
        assert not np.any(value[~MASK])


@pytest.mark.parametrize("causal", [False, True])
def test_masked_tokens_of_relations_are_as_if_deleted(causal):
    student, teacher = (np.where(MASK[..., None], x, np.nan).astype(np.float32) for x in STATES)

    def summed(s, t, where=None):
        value = losses.relation_kl(s, t, relation_heads=2, where=where, causal=causal)
        return value.sum(), value

    run = jax.jit(jax.grad(summed, has_aux=True))
    gradient, value = run(student, teacher, MASK)
    assert not np.any(value[~MASK])
    assert not np.any(gradient[~MASK])
    for b in range(3):
        wanted_gradient, wanted = run(*(crop(x, b, (1,)) for x in (student, teacher)))
        np.testing.assert_allclose(value[b][MASK[b]], wanted[0], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(crop(gradient, b, (1,)), wanted_gradient, rtol=1e-4, atol=1e-6)


def test_a_mask_of_examples_is_one_of_all_their_tokens():
    rows = np.array([True, False, True])
    tokens = np.repeat(rows[:, None], 5, 1)

    @jax.jit
    def all_of_them(where):
        return [loss(*SCORES, where=where) for loss in (*BOTH, losses.attention_kl)] + [
            losses.relation_kl(*STATES, relation_heads=2, where=where)
        ]

    for found, wanted in zip(all_of_them(rows), all_of_them(tokens), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        assert not np.any(found[1])


@pytest.mark.parametrize("causal", [False, True])
def test_without_padding_both_reductions_are_one(causal):
    masked, reference = (
        losses.attention_mse(*SCORES, causal=causal, reduction=r) for r in ("masked", "reference")
    )
    scale = 15 / 25 if causal else 1  # the published mean counts keys that can't be seen
    np.testing.assert_allclose(reference, masked * scale, rtol=1e-6)
    where = np.ones((3, 5), bool)
    for reduction, wanted in (("masked", masked), ("reference", reference)):
        found = losses.attention_mse(*SCORES, where=where, causal=causal, reduction=reduction)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_reference_reduction_takes_scores_with_the_mask_added_or_not():
    added = SCORES + np.where(MASK, 0, -10000.0)[:, None, None, :]
    unmasked, given = (
        losses.attention_mse(*x, where=w, reduction="reference")
        for x, w in ((SCORES, MASK), (added, None))
    )
    np.testing.assert_allclose(unmasked, given, rtol=1e-6)


def test_a_perfect_student():
    def forms(scores, states):
        teacher, other = jax.lax.stop_gradient(scores), jax.lax.stop_gradient(states)
        values = [
            loss(scores, teacher, where=where).sum()
            for loss in LOSSES_OF_SCORES.values()
            for where in (None, MASK)
        ]
        values.append(losses.relation_kl(states, other, relation_heads=2, where=MASK).sum())
        values.append(losses.cosine_distance(states, other).sum())
        return jnp.stack(values).sum(), jnp.stack(values)

    given = jnp.asarray(SCORES[0], jnp.float32), jnp.asarray(STATES[0], jnp.float32)
    gradients, values = jax.jit(jax.grad(forms, argnums=(0, 1), has_aux=True))(*given)
    np.testing.assert_allclose(values, 0, atol=1e-6)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_rows_of_scores_may_be_shifted():
    """A constant added to all keys of a query is no difference of attention."""
    shift = RANDOM.standard_normal((2, 3, 2, 5, 1)) * 10
    for causal in (False, True):
        found, wanted = (
            losses.attention_kl(*x, where=MASK, causal=causal) for x in (SCORES + shift, SCORES)
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", [None, MASK], ids=["all", "masked"])
def test_gradients_of_every_form(where):
    def forms(scores, states):
        return jnp.stack(
            [
                *(jnp.sum(loss(scores, SCORES[1], where=where)) for loss in BOTH),
                jnp.sum(losses.attention_kl(scores, SCORES[1], where=where, causal=True) ** 2),
                jnp.sum(losses.hidden_mse(states, STATES[0] + 1, where=where) ** 2),
                jnp.sum(losses.cosine_distance(states, STATES[0] + 1, where=where) ** 2),
                jnp.sum(
                    losses.relation_kl(
                        states, STATES[1], relation_heads=2, where=where, causal=True
                    )
                    ** 2
                ),
            ]
        )

    with jax.enable_x64(True):
        given = jnp.asarray(SCORES[0]), jnp.asarray(STATES[0])
        check_grads(jax.jit(forms), given, order=1, eps=1e-6, rtol=1e-6, atol=1e-6)


def test_half_precision_scores_are_compared_in_single():
    """Also under a mask: no -inf or large number of a mask is formed in half precision."""
    rounded = SCORES.astype(jnp.bfloat16)
    for loss in LOSSES_OF_SCORES.values():
        found, wanted = (loss(*x, where=MASK) for x in (rounded, rounded.astype(np.float32)))
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, wanted)


# --- bad input ------------------------------------------------------------------------------


def test_unequal_heads_name_the_way_out():
    for loss in (losses.attention_mse, losses.attention_kl):
        with pytest.raises(ValueError, match=r"^student_scores .* got 12 and 16: .*relation_kl"):
            loss(np.zeros((1, 12, 3, 3), np.float32), np.zeros((1, 16, 3, 3), np.float32))


def test_bad_input():
    scores, states = SCORES[0], STATES[0]
    with pytest.raises(ValueError, match=r"^student_scores must be \[B, H, L, L\]"):
        losses.attention_mse(scores[..., :3], scores[..., :3])
    with pytest.raises(ValueError, match=r"^student_scores must have 4 dimensions"):
        losses.attention_kl(scores[0], scores[0])
    with pytest.raises(ValueError, match=r"^reduction must be one of masked, reference"):
        losses.attention_mse(scores, scores, reduction="mean")
    with pytest.raises(ValueError, match=r"^where must have shape \(3, 5\), got \(3, 4\)"):
        losses.attention_mse(scores, scores, where=np.ones((3, 4), bool))
    with pytest.raises(TypeError, match=r"^where must be a boolean array, got int"):
        losses.relation_kl(states, states, relation_heads=2, where=np.ones((3, 5), np.int32))
    with pytest.raises(ValueError, match=r"^relation_heads must divide the width 10 of teacher"):
        losses.relation_kl(*STATES, relation_heads=3)
    with pytest.raises(ValueError, match=r"^relation_heads must be an integer at least 1"):
        losses.relation_kl(*STATES, relation_heads=0)
    with pytest.raises(ValueError, match=r"^teacher must have shape"):
        losses.relation_kl(states, STATES[1][:, :4], relation_heads=2)
    with pytest.raises(ValueError, match=r"^student must have shape .* like teacher"):
        losses.hidden_mse(*STATES)
    with pytest.raises(ValueError, match=r"^eps must be a finite number above 0"):
        losses.cosine_distance(states, states, eps=0.0)
