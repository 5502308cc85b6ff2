"""Fused distillation as a Term: outputs of the models, equality with dense terms, no logits."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kdjax as kd
from kdjax._parts import part_of
from kdjax.lm import fused_distillation

B, L, V, D = 4, 6, 11, 5
COMMON = {"vocab_size": V, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
CONFIGS = {
    "gpt2": kd.lm.GPT2Config(**COMMON),
    "gpt2 untied": kd.lm.GPT2Config(tied=False, **COMMON),
    "bert": kd.lm.BertConfig(intermediate_size=8, head="masked_lm", pooler=False, **COMMON),
    "bert untied": kd.lm.BertConfig(intermediate_size=8, head="pretraining", tied=False, **COMMON),
    "distilbert": kd.lm.BertConfig(
        intermediate_size=8, head="masked_lm", pooler=False, token_types=0, distil=True, **COMMON
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_logits_are_the_product_of_input_and_head(name):
    config = CONFIGS[name]
    net = kd.lm.model(config, outputs=("logits", "head_input", "head", "head_bias"))

    @jax.jit
    def run(key, ids):
        params = jax.tree.map(lambda x: x + 0.1, net.init(key)[0])  # a bias other than 0
        return net.apply(params, {}, {"input_ids": ids})[0]

    out = run(jax.random.key(0), jnp.arange(B * L).reshape(B, L) % V)
    assert out["head"].shape == (V, 8)
    assert ("head_bias" in out) == ("bert" in name)
    wanted = out["head_input"] @ out["head"].T
    if "bert" in name:
        assert np.any(out["head_bias"])
        wanted = wanted + out["head_bias"][None, None]
    np.testing.assert_allclose(out["logits"], wanted, rtol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "bert untied"])
def test_logits_that_are_not_asked_for_are_not_computed(name):
    config, ids = CONFIGS[name], jnp.zeros((B, L), jnp.int32)

    def program(*outputs):
        net = kd.lm.model(config, outputs=outputs)
        params, _ = jax.eval_shape(net.init, jax.random.key(0))
        found = jax.make_jaxpr(lambda p: net.apply(p, {}, {"input_ids": ids})[0])(params)
        return str(found)

    assert f"f32[{B},{L},{V}]" in program("logits")
    assert f"f32[{B},{L},{V}]" not in program("head_input", "head", "head_bias")


# --- the Term against the dense ones --------------------------------------------------------------


def arrays(dtype, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"head_input": (B, L, D), "head": (V, D), "head_bias": (V,)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def batch_of(weights=None):
    rng = np.random.default_rng(5)
    lengths = np.array([6, 4, 5, 1])
    real = np.arange(L)[None] < lengths[:, None]
    ids = rng.integers(0, V, (B, L))
    labels = np.where(rng.random((B, L)) < 0.6, ids, -100)
    batch = {
        "input_ids": jnp.asarray(ids),
        "labels": jnp.asarray(labels),
        "attention_mask": jnp.asarray(real.astype(np.int32)),
    }
    return batch if weights is None else {**batch, "weight": jnp.asarray(weights, jnp.float32)}


def with_logits(side):
    return {"logits": side["head_input"] @ side["head"].T + side["head_bias"][None, None]}


def mean_of(term, student_out, teacher_out, batch):
    key, step = jax.random.key(0), jnp.int32(0)
    extra = {"axis_name": None} if term.coupled else {}
    value = term.loss({}, student_out, teacher_out, batch, step=step, key=key, **extra)
    return part_of("term", 1.0, value, term.coupled, batch, None).mean()


def balance(batch, causal):
    real = batch["attention_mask"] != 0
    known = real & (batch["labels"] != -100)
    known = known[:, 1:] & real[:, :-1] if causal else known
    weight = jnp.asarray(batch.get("weight", jnp.ones(B)), float)[:, None]
    return jnp.full(B, (real * weight).sum() / (known * weight).sum())


CASES = {
    "causal": (True, {"soft_weight": 5.0, "hard_weight": 2.0, "temperature": 2.0}),
    "causal, targets": (
        True,
        {"soft_weight": 0.7, "hard_weight": 0.4, "beta": 0.5, "count": "targets"},
    ),
    "causal, soft": (True, {"beta": 1.0, "temperature": 3.0}),
    "causal, hard": (True, {"soft_weight": 0, "hard_weight": 2.0}),
    "masked": (False, {"soft_weight": 0.7, "hard_weight": 2.0, "temperature": 2.0}),
    "masked, labels": (False, {"soft_weight": 0.7, "hard_weight": 2.0, "count": "labels"}),
}


def dense(causal, options):
    """The same from terms on logits."""
    count = options.get("count", "tokens")
    soft = kd.terms.token_divergence(
        loss=kd.losses.generalized_jensen_shannon, count=count, beta=options.get("beta", 0.0),
        temperature=options.get("temperature", 1.0),
    )  # fmt: skip
    hard = kd.terms.causal_lm() if causal else kd.terms.masked_lm()

    def loss(student, teacher, batch):
        total, s = 0.0, with_logits(student)
        if options.get("soft_weight", 1.0):
            mean = mean_of(soft, s, with_logits(teacher), batch)
            total = total + options.get("soft_weight", 1.0) * mean
        if options.get("hard_weight", 0):
            total = total + options["hard_weight"] * mean_of(hard, s, {}, batch)
        return total

    return loss


@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_terms(name):
    causal, options = CASES[name]
    precisions = {jnp.float64: 1e-10} | ({jnp.float32: 1e-6} if name == "causal" else {})
    for dtype, tolerance in precisions.items():
        weights = None if name == "masked" else (1.0, 0.5, 0.0, 2.0)
        with jax.enable_x64(dtype == jnp.float64):
            student, teacher, batch = arrays(dtype), arrays(dtype, 1), batch_of(weights)
            terms = [fused_distillation(causal=causal, chunk_tokens=8, **options)]
            if terms[0].coupled:
                assert name in ("causal", "masked")
                balanced = fused_distillation(causal=causal, balance="balance", **options)
                assert not balanced.coupled
                terms.append(balanced)
                batch["balance"] = balance(batch, causal)
            no_teacher = options.get("soft_weight") == 0
            wanted = jax.jit(jax.value_and_grad(dense(causal, options)))(student, teacher, batch)
            for term in terms:
                loss = functools.partial(mean_of, term)
                given = student, {} if no_teacher else teacher, batch
                found = jax.jit(jax.value_and_grad(loss))(*given)
                for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                    assert a.dtype == dtype
                    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_padding_and_rows_without_weight_may_hold_anything():
    batch = batch_of((1.0, 0.0, 1.0, 1.0))
    term = fused_distillation(causal=True, hard_weight=1.0, count="targets")
    loss = jax.jit(jax.value_and_grad(functools.partial(mean_of, term)))
    student, teacher = arrays(jnp.float32), arrays(jnp.float32, 1)
    wanted = loss(student, teacher, batch)
    real = (batch["attention_mask"] != 0) & (batch["weight"] > 0)[:, None]

    def spoiled(side):
        return {**side, "head_input": jnp.where(real[..., None], side["head_input"], jnp.nan)}

    batch |= {name: jnp.where(real, batch[name], 10**6) for name in ("input_ids", "labels")}
    found = loss(spoiled(student), spoiled(teacher), batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_token_at_all_is_zero():
    batch = batch_of() | {"attention_mask": jnp.zeros((B, L), jnp.int32)}
    for options in ({"count": "targets"}, {"balance": "balance"}, {}):
        term = fused_distillation(causal=True, hard_weight=1.0, **options)
        given = batch | {"balance": jnp.ones(B)}
        loss = functools.partial(mean_of, term)
        given = arrays(jnp.float32), arrays(jnp.float32, 1), given
        found = jax.jit(jax.value_and_grad(loss))(*given)
        assert not any(np.any(x) for x in jax.tree.leaves(found))


def test_only_unlike_counts_couple_the_batch():
    make = functools.partial(fused_distillation, causal=True)
    assert make(hard_weight=1.0).coupled
    assert not make(hard_weight=1.0, balance="balance").coupled
    assert not make(hard_weight=1.0, count="targets").coupled
    assert not make().coupled
    assert not make(hard_weight=1.0, soft_weight=0).coupled
    assert fused_distillation(causal=False, hard_weight=1.0, count="targets").coupled


def test_hyperparameters_may_be_schedules():
    slope = optax.linear_schedule(0.2, 1.0, 10)
    student, teacher, batch = arrays(jnp.float32), arrays(jnp.float32, 1), batch_of()

    def value(step, **options):
        term = fused_distillation(causal=True, count="targets", **options)
        found, counts = term.loss(
            {}, student, teacher, batch, step=jnp.int32(step), key=jax.random.key(0)
        )
        return found[counts > 0]

    annealed = {"beta": slope, "temperature": slope, "soft_weight": slope, "hard_weight": slope}
    numbers = dict.fromkeys(annealed, float(slope(5)))
    np.testing.assert_allclose(value(5, **annealed), value(0, **numbers), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"beta": 1.5}, "beta"),
        ({"soft_weight": -1.0}, "soft_weight"),
        ({"hard_weight": -1.0}, "hard_weight"),
        ({"soft_weight": 0}, "soft_weight and hard_weight"),
        ({"count": "all"}, "count"),
        ({"chunks": 3}, "options"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        fused_distillation(causal=True, **options)


def test_bad_outputs_and_batches():
    term = fused_distillation(causal=True, hard_weight=1.0, balance="balance")
    student, batch = arrays(jnp.float32), batch_of() | {"balance": jnp.ones(B)}
    flat = {**student, "head_input": student["head_input"][0]}
    lacking = {name: x for name, x in batch.items() if name != "labels"}
    for given, data, error, message in (
        ((student, {}), batch, ValueError, "teacher must not be None"),
        (({}, student), batch, ValueError, "head_input"),
        ((flat, student), batch, ValueError, "head_input"),
        ((student, student), lacking, ValueError, "labels"),
        ((student, student), {**batch, "labels": batch["labels"] * 1.0}, TypeError, "labels"),
        ((student, student), batch_of(), ValueError, "balance"),
    ):
        with pytest.raises(error, match=message):
            mean_of(term, *given, data)


def test_an_update_holds_no_logits_of_the_batch():
    """With the triple's cosine, gradients and the optimizer; the dense method does hold them."""
    rows, length, vocab = 4, 32, 4096
    config = kd.lm.GPT2Config(vocab_size=vocab, hidden_size=8, num_layers=1, num_heads=2)
    batch = {"input_ids": jax.ShapeDtypeStruct((rows, length), jnp.int32)}

    def largest(fused):
        kept = ("head_input", "head", "hidden") if fused else ("logits", "hidden")
        net = kd.lm.model(config, outputs=kept)
        frozen = jax.eval_shape(net.init, jax.random.key(0))
        method = kd.methods.distilgpt2.distilgpt2(net, net, fused=fused)
        learner = kd.minimize(method, optax.adam(1e-3))
        state = jax.eval_shape(learner.init, jax.random.key(0), batch, frozen)
        text = jax.jit(learner.update).lower(state, batch, frozen).compile().as_text()
        shapes = re.findall(r"\b(?:f32|f16|bf16|s32|u32|pred)\[([\d,]+)\]", text)
        return max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)

    assert largest(None) >= rows * length * vocab
    assert (
        largest(functools.partial(fused_distillation, chunk_tokens=16)) < rows * length * vocab / 4
    )
