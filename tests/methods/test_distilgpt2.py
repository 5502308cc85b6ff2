"""DistilGPT-2 and DistilBERT: the objective, with and without logits, and the optimizer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kdjax as kd
from kdjax.lm import fused_distillation

recipe = kd.methods.distilgpt2
V, B, L = 11, 4, 6
SIZES = {
    "vocab_size": V, "hidden_size": 8, "num_heads": 2, "max_positions": 8,
    "hidden_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
GPT2 = kd.lm.GPT2Config(num_layers=1, embedding_dropout=0.0, **SIZES)
BERT = kd.lm.BertConfig(num_layers=1, intermediate_size=8, head="masked_lm", pooler=False, **SIZES)
FUSED_OUTPUTS = ("head_input", "head", "head_bias", "hidden")


def batch():
    rows, columns = jnp.arange(B)[:, None], jnp.arange(L)[None]
    real = columns < 3 + rows
    ids = (rows * 5 + columns * 3) % V
    return {
        "input_ids": ids,
        "labels": jnp.where((rows + columns) % 3 == 0, ids, -100),
        "attention_mask": real.astype(jnp.int32),
        "weight": jnp.array([1.0, 0.5, 2.0, 0.0]),
    }


def value_and_gradient(make, config, data, **options):
    fused = options.get("fused")
    outputs = FUSED_OUTPUTS if fused else ("logits", "hidden")
    net = kd.lm.model(config, outputs=outputs)
    variables = [jax.jit(net.init)(jax.random.key(seed)) for seed in (0, 1)]
    (params, _), frozen = jax.tree.map(lambda x: 3 * x.astype(jnp.float64), variables)
    method = make(net, net, **options)
    extra = {"student": {}}
    keys = {"step": jnp.int32(0), "key": jax.random.key(0), "axis_name": None}

    @jax.jit
    def run(params, data):
        if method.prepare is not None:
            data = method.prepare({"student": params}, extra, data, frozen, **keys)
        return jax.value_and_grad(
            lambda p: method.loss({"student": p}, extra, data, frozen, **keys)[0]
        )(params)

    return run(params, data)


CASES = {
    "gpt2": (recipe.distilgpt2, GPT2, {"labels": "labels"}),
    "bert": (recipe.distilbert, BERT, {}),
    "bert, masked only": (recipe.distilbert, BERT, {"restrict_to_masked": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_without_logits_it_is_the_same(name):
    make, config, options = CASES[name]
    with jax.enable_x64(True):
        run = functools.partial(value_and_gradient, make, config, batch(), **options)
        dense, fused = run(), run(fused=fused_distillation)
        scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(dense))
        for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(dense), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * scale)


def test_microbatches_change_nothing_without_logits():
    """Tokens and labels fall unevenly over the slices."""
    net = kd.lm.model(GPT2, outputs=FUSED_OUTPUTS)
    method = recipe.distilgpt2(net, net, labels="labels", fused=fused_distillation)
    data, frozen = batch(), jax.jit(net.init)(jax.random.key(1))
    found = []
    for slices in (1, 2):
        learner = kd.minimize(method, optax.sgd(1.0), microbatches=slices)
        state = jax.jit(learner.init)(jax.random.key(0), data, frozen)
        state, metrics = jax.jit(learner.update)(state, data, frozen)
        found.append((state.params, metrics))
    assert sorted(metrics) == ["loss", "loss/cos", "loss/fused"]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_copy_of_the_teacher_has_only_the_label_loss():
    net = kd.lm.model(GPT2)
    frozen = jax.jit(net.init)(jax.random.key(0))
    config, start = kd.lm.take_layers(GPT2, frozen[0], range(GPT2.num_layers))
    student = kd.started(kd.lm.model(config), (start, {}))
    method = recipe.distilgpt2(student, net)
    params, extra = jax.jit(method.init)(jax.random.key(1), batch(), frozen)
    loss = functools.partial(method.loss, step=jnp.int32(0), key=jax.random.key(0))
    _, (_, metrics) = jax.jit(loss)(params, extra, batch(), frozen)
    assert abs(float(metrics["loss/ce"])) < 1e-6
    assert abs(float(metrics["loss/cos"])) < 1e-6
    np.testing.assert_allclose(metrics["loss"], 2 * metrics["loss/lm"], rtol=1e-5)
    assert metrics["loss/lm"] > 1


def test_the_learning_rate_rises_and_falls():
    tx = recipe.optimizer(steps=100, learning_rate=1.0, warm_up=0.05, clip=1e9)
    params = {"w": jnp.zeros(())}

    def one(state, _):
        moves, state = tx.update({"w": jnp.ones(())}, state, params)
        return state, -moves["w"]

    rates = np.asarray(jax.lax.scan(one, tx.init(params), None, length=100)[1])
    np.testing.assert_allclose(rates[0], 0, atol=1e-6)
    assert np.argmax(rates) == 5
    np.testing.assert_allclose(rates[5], 1, rtol=1e-4)
    np.testing.assert_allclose(rates[52], 0.5, atol=0.02)
    assert rates[-1] < 0.02


def test_bad_options():
    net = kd.lm.model(GPT2, outputs=FUSED_OUTPUTS)
    for options, error, message in (
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"alpha_ce": -1.0}, ValueError, "alpha_ce"),
        ({"alpha_cos": -1.0, "fused": fused_distillation}, ValueError, "alpha_cos"),
        ({"alpha_mse": 1.0, "fused": fused_distillation}, ValueError, "alpha_mse"),
        ({"fused": True}, TypeError, "fused"),
    ):
        for make in (recipe.distilgpt2, recipe.distilbert):
            with pytest.raises(error, match=message):
                make(net, net, **options)
    none = dict.fromkeys(("alpha_ce", "alpha_lm", "alpha_cos"), 0)
    with pytest.raises(ValueError, match="terms must hold"):
        recipe.distilgpt2(net, net, fused=fused_distillation, **none)
    with pytest.raises(ValueError, match="steps"):
        recipe.optimizer(steps=0)
    with pytest.raises(ValueError, match="warm_up"):
        recipe.optimizer(steps=5, warm_up=1.0)
