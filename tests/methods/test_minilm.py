"""MiniLM and MiniLMv2: the losses on the outputs of real models, of equal and unequal sizes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kdjax as kd
from kdjax import lm, losses
from kdjax.methods import minilm

KEY = jax.random.key(0)
OUTPUTS = ("scores", "queries", "keys", "values")
BIG = lm.BertConfig(
    vocab_size=40, hidden_size=24, num_layers=2, num_heads=3, intermediate_size=16,
    max_positions=8, hidden_dropout=0.0, attention_dropout=0.0, pooler=False,
)  # fmt: skip
SMALL = dataclasses.replace(BIG, hidden_size=12, num_layers=2)
DECODER = lm.GPT2Config(
    vocab_size=40, hidden_size=12, num_layers=2, num_heads=3, max_positions=8, head=None,
    embedding_dropout=0.0, hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


def net(config):
    return lm.model(config, outputs=OUTPUTS)


def noisy(config, seed):
    params, extra = jax.jit(net(config).init)(jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), params), extra


@pytest.fixture(scope="module")
def batch():
    ids = jax.random.randint(jax.random.key(3), (3, 7), 1, 40)
    mask = (jnp.arange(7)[None] < jnp.array([7, 4, 2])[:, None]).astype(jnp.int32)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def frozen():
    return noisy(BIG, 10)


def measured(method, student, batch, frozen):
    """The loss, its metrics and its gradient."""
    params = {"student": student[0]}

    def loss(params):
        total, (_, metrics) = method.loss(
            params, {"student": {}}, batch, frozen, step=jnp.int32(0), key=KEY
        )
        return total, metrics

    (total, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return float(total), {k: float(v) for k, v in metrics.items()}, grads["student"]


def outputs(config, variables, batch):
    found, _ = jax.jit(net(config).apply)(*variables, net(config).read(batch))
    return found


def mean(values, batch):
    """Over real tokens."""
    real = np.asarray(batch["attention_mask"]) != 0
    return float(np.asarray(values)[real].mean())


def test_first_form_is_attention_and_value_relations(batch, frozen):
    student = noisy(SMALL, 20)
    s, t = outputs(SMALL, student, batch), outputs(BIG, frozen, batch)
    real = batch["attention_mask"] != 0
    attention = losses.attention_kl(s["scores"][-1], t["scores"][0], where=real)
    values = losses.relation_kl(s["values"][-1], t["values"][0], relation_heads=3, where=real)
    method = minilm.minilm(
        net(SMALL), net(BIG), heads=3, teacher_layer=0, attention=0.5, values=2.0
    )
    total, metrics, _ = measured(method, student, batch, frozen)
    assert sorted(metrics) == ["loss", "loss/attention", "loss/values"]
    assert metrics["loss/attention"] == pytest.approx(mean(attention, batch), rel=1e-4)
    assert metrics["loss/values"] == pytest.approx(mean(values, batch), rel=1e-4)
    wanted = 0.5 * metrics["loss/attention"] + 2 * metrics["loss/values"]
    assert total == pytest.approx(wanted, rel=1e-5)


def test_second_form_is_three_relations_of_any_sizes(batch, frozen):
    config = dataclasses.replace(SMALL, num_heads=2)  # of which neither need be the teacher's
    student = noisy(config, 20)
    s, t = outputs(config, student, batch), outputs(BIG, frozen, batch)
    real = batch["attention_mask"] != 0
    method = minilm.minilmv2(net(config), net(BIG), relation_heads=6, keys=0.5, values=0.0)
    total, metrics, grads = measured(method, student, batch, frozen)
    for name in ("queries", "keys", "values"):
        wanted = losses.relation_kl(s[name][-1], t[name][-1], relation_heads=6, where=real)
        assert metrics[f"loss/{name}"] == pytest.approx(mean(wanted, batch), rel=1e-4)
    wanted = metrics["loss/queries"] + 0.5 * metrics["loss/keys"]
    assert total == pytest.approx(wanted, rel=1e-5)
    # Of the last layer, only what makes queries and keys is trained.
    last = {k: float(jnp.abs(v["kernel"]).max()) for k, v in grads["layer_1"]["attn"].items()}
    assert last["q"] > 0
    assert last["k"] > 0
    assert last["v"] == last["o"] == 0
    assert float(jnp.abs(grads["layer_0"]["attn"]["v"]["kernel"]).max()) > 0


def test_first_forms_values_are_the_seconds_with_as_many_heads(batch, frozen):
    """Invariant 13: relation heads that are the attention heads."""
    student = noisy(SMALL, 20)
    first = measured(minilm.minilm(net(SMALL), net(BIG), heads=3), student, batch, frozen)
    second = measured(
        minilm.minilmv2(net(SMALL), net(BIG), relation_heads=3), student, batch, frozen
    )
    assert first[1]["loss/values"] == pytest.approx(second[1]["loss/values"], rel=1e-6)


@pytest.mark.parametrize("form", ["minilm", "minilmv2"])
def test_a_copy_of_the_teacher_has_no_loss(form, batch, frozen):
    heads = {"heads": 3} if form == "minilm" else {"relation_heads": 8}
    method = getattr(minilm, form)(net(BIG), net(BIG), **heads)
    total, _, grads = measured(method, frozen, batch, frozen)
    assert abs(total) < 1e-6
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-5


def test_padding_has_no_part(batch, frozen):
    student = noisy(SMALL, 20)
    method = minilm.minilmv2(net(SMALL), net(BIG), relation_heads=4)
    mask = batch["attention_mask"]
    found = measured(method, student, batch, frozen)
    other = {**batch, "input_ids": jnp.where(mask == 0, 33, batch["input_ids"])}
    again = measured(method, student, other, frozen)
    assert again[0] == pytest.approx(found[0], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found[2], again[2])
    whole = measured(method, student, {**batch, "attention_mask": jnp.ones_like(mask)}, frozen)
    assert abs(whole[0] / found[0] - 1) > 1e-3


def test_a_decoder_sees_no_later_keys(batch):
    student, teacher = noisy(DECODER, 20), noisy(DECODER, 30)
    s, t = (outputs(DECODER, x, batch) for x in (student, teacher))
    real = batch["attention_mask"] != 0
    found = {}
    for causal in (False, True):
        method = minilm.minilm(net(DECODER), net(DECODER), heads=3, causal=causal)
        found[causal] = measured(method, student, batch, teacher)[1]["loss/attention"]
        wanted = losses.attention_kl(s["scores"][-1], t["scores"][-1], where=real, causal=causal)
        assert found[causal] == pytest.approx(mean(wanted, batch), rel=1e-4)
    assert abs(found[True] / found[False] - 1) > 0.01


def test_training_brings_a_student_of_another_width_nearer(batch, frozen):
    method = minilm.minilmv2(net(SMALL), net(BIG), relation_heads=4)
    learner = kd.minimize(method, kd.methods.tinybert.optimizer(steps=15, learning_rate=1e-2))
    state = learner.init(KEY, batch, frozen)
    assert "terms" not in state.params  # no projections
    update, seen = jax.jit(learner.update), []
    for _ in range(15):
        state, metrics = update(state, batch, frozen)
        seen.append(float(metrics["loss"]))
    assert seen[-1] < 0.9 * seen[0]


def test_bad_input(batch, frozen):
    def refused(words, form, config=SMALL, **options):
        method = getattr(minilm, form)(net(config), net(BIG), **options)
        student = jax.eval_shape(net(config).init, KEY)
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(
                lambda p: method.loss(
                    {"student": p}, {"student": {}}, batch, frozen, step=jnp.int32(0), key=KEY
                ),
                student[0],
            )

    two = dataclasses.replace(SMALL, num_heads=2)
    refused("as many heads.*relation_kl", "minilm", two, heads=2)
    refused("relation_heads must divide the width 12 of student", "minilmv2", relation_heads=8)
    refused("teacher_layer", "minilmv2", relation_heads=4, teacher_layer=2)
    with pytest.raises(ValueError, match="relation_heads"):
        minilm.minilmv2(net(SMALL), net(BIG), relation_heads=0)
    with pytest.raises(ValueError, match="heads"):
        minilm.minilm(net(SMALL), net(BIG), heads=0)
    plain = minilm.minilmv2(lm.model(SMALL), lm.model(BIG), relation_heads=4)
    with pytest.raises(ValueError, match="queries"):
        plain.loss({"student": noisy(SMALL, 1)[0]}, {"student": {}}, batch, frozen, step=0, key=KEY)
