"""Generalised knowledge distillation: whose completions, which tokens, and what they teach."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kdjax as kd
from kdjax.lm import fused_distillation, sampler

gkd = kd.methods.gkd.gkd
V, B, P, L = 11, 4, 3, 7
CONFIG = kd.lm.GPT2Config(
    vocab_size=V, hidden_size=8, num_layers=1, num_heads=2, max_positions=12,
    embedding_dropout=0.0, hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
NET = kd.lm.model(CONFIG, outputs=("logits",))


@functools.cache
def variables(seed):
    """Larger than at initialisation, so that predictions differ."""
    with jax.ensure_compile_time_eval():
        return jax.tree.map(lambda x: 5 * x, jax.jit(NET.init)(jax.random.key(seed)))


def batch(padding=0):
    """Prompts padded on the left by 0 to 2 tokens, completions on the right by 0 to 3."""
    rows, columns = np.arange(B)[:, None], np.arange(L)[None]
    real = (columns >= rows % P) & (columns < L - rows)
    ids = np.where(real, (rows * 5 + columns * 3) % V, padding)
    return {
        "input_ids": jnp.asarray(ids, jnp.int32),
        "attention_mask": jnp.asarray(real, jnp.int32),
        "index": jnp.arange(B) + 10,
    }


def written(params, ids, mask, keys):
    """What a student might write: other tokens than the data's, of lengths 1 to 4."""
    columns, rows = jnp.arange(L - P)[None], jnp.arange(B)[:, None]
    return jnp.broadcast_to(7 - columns, (B, L - P)), columns <= rows


def keywords(step=0, key=0):
    return {"step": jnp.int32(step), "key": jax.random.key(key), "axis_name": None}


def prepared(data, method=None, **options):
    method = gkd(NET, NET, written, prompt_length=P, **options) if method is None else method
    student = {"student": variables(0)[0]}
    return method.prepare(student, {"student": {}}, data, variables(1), **keywords())


@functools.partial(jax.jit, static_argnames="fused")
def value_and_gradient(data, *, on_policy, fused=None):
    net = kd.lm.model(CONFIG, outputs=("head_input", "head")) if fused else NET
    method = gkd(
        net, net, written, prompt_length=P, on_policy=on_policy, temperature=2.0, fused=fused
    )
    params, extra, frozen = variables(0)[0], {"student": {}}, variables(1)
    data = method.prepare({"student": params}, extra, data, frozen, **keywords())
    return jax.value_and_grad(
        lambda p: method.loss({"student": p}, extra, data, frozen, **keywords())[0]
    )(params)


def assert_same(found, wanted, tolerance=0.0):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_off_policy_is_plain_distillation_of_the_completions():
    data = batch()
    mask = np.asarray(data["attention_mask"]) != 0
    inputs = data | {"position_ids": jnp.maximum(jnp.cumsum(data["attention_mask"], 1) - 1, 0)}

    @jax.jit
    def mean(params):
        (s, _), (t, _) = NET.apply(params, {}, inputs), NET.apply(*variables(1), inputs)
        values = kd.losses.generalized_jensen_shannon(
            s["logits"], t["logits"], beta=0.5, temperature=2.0
        )
        # The token at t is predicted at t - 1.
        return sum(values[i, j - 1] for i in range(B) for j in range(P, L) if mask[i, j]) / (
            mask[:, P:].sum()
        )

    wanted = jax.value_and_grad(mean)(variables(0)[0])
    found = value_and_gradient(data, on_policy=0.0)
    assert found[0] > 0.01
    assert_same(found, wanted, 1e-5)


def test_on_policy_the_completions_of_the_batch_do_not_matter():
    data = batch()
    other = dict(data)
    other["input_ids"] = data["input_ids"].at[:, P:].set(4)
    other["attention_mask"] = data["attention_mask"].at[:, P:].set(1)
    found = value_and_gradient(data, on_policy=1.0)
    assert_same(value_and_gradient(other, on_policy=1.0), found)
    tokens, real = written(None, None, None, None)
    given = dict(data)
    given["input_ids"] = data["input_ids"].at[:, P:].set(jnp.where(real, tokens, 9))
    given["attention_mask"] = data["attention_mask"].at[:, P:].set(real)
    assert_same(value_and_gradient(given, on_policy=0.0), found)
    assert abs(found[0] - value_and_gradient(data, on_policy=0.0)[0]) > 1e-3


def test_padding_may_hold_any_id():
    for on_policy in (0.0, 1.0):
        wanted = value_and_gradient(batch(), on_policy=on_policy)
        assert_same(value_and_gradient(batch(999), on_policy=on_policy), wanted)


def test_the_width_of_the_padding_changes_nothing():
    wide = {name: jnp.pad(x, ((0, 0), (2, 1))) for name, x in batch().items() if x.ndim == 2}
    narrow, broad = prepared(batch(), on_policy=0.0), gkd(
        NET, NET, lambda p, ids, mask, keys: (jnp.zeros((B, 5), int), jnp.ones((B, 5), bool)),
        prompt_length=P + 2, on_policy=0.0,
    )  # fmt: skip
    broad = prepared(wide, broad)
    run = jax.jit(lambda data: NET.apply(*variables(0), data)[0]["logits"])
    one, two = run(narrow), run(broad)
    real = np.asarray(narrow["attention_mask"]) != 0
    np.testing.assert_allclose(two[:, 2:-1][real], one[real], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(broad["labels"][:, 2:-1], narrow["labels"])


def test_only_completions_are_labelled():
    found = prepared(batch(), on_policy=1.0)
    tokens, real = written(None, None, None, None)
    np.testing.assert_array_equal(found["labels"][:, :P], -100)
    np.testing.assert_array_equal(found["labels"][:, P:], np.where(real, tokens, -100))
    np.testing.assert_array_equal(found["position_ids"][2], [0, 0, 0, 1, 2, 3, 3])


def test_the_share_of_own_texts_is_the_probability():
    method = gkd(NET, NET, written, prompt_length=P, on_policy=optax.linear_schedule(0.0, 1.0, 100))
    student = {"student": variables(0)[0]}

    def own(step, key):
        data = method.prepare(
            student, {}, batch(), None, step=step, key=jax.random.key(key), axis_name=None
        )
        return data["input_ids"][0, P] == 7

    share = jax.jit(jax.vmap(jax.vmap(own, (None, 0)), (0, None)))
    found = share(jnp.array([0, 30, 100]), jnp.arange(400)).mean(1)
    assert found[0] == 0
    assert abs(found[1] - 0.3) < 5 * np.sqrt(0.21 / 400)
    assert found[2] == 1


def test_without_logits_it_is_the_same():
    found = value_and_gradient(batch(), on_policy=1.0, fused=fused_distillation)
    assert_same(found, value_and_gradient(batch(), on_policy=1.0), 2e-6)


# --- the student's own writing --------------------------------------------------------------------


def test_each_example_has_its_own_draws():
    sample = jax.jit(sampler(CONFIG, length=4, temperature=0.9, end_token=2, pad_token=9))
    data, keys = batch(), jax.random.split(jax.random.key(0), B)
    ids, mask = data["input_ids"][:, :P], data["attention_mask"][:, :P] != 0
    params = variables(0)[0]
    tokens, real = sample(params, ids, mask, keys)
    order = jnp.array([2, 0, 3, 1])
    mixed, _ = sample(params, ids[order], mask[order], keys[order])
    np.testing.assert_array_equal(mixed, tokens[order])
    alone, _ = kd.lm.generate(
        CONFIG, params, ids[1:2], length=4, key=keys[1], temperature=0.9,
        attention_mask=mask[1:2], end_token=2, pad_token=9,
    )  # fmt: skip
    np.testing.assert_array_equal(alone[0], tokens[1])
    many = jax.vmap(lambda key: sample(params, ids, mask, jax.random.split(key, B)))
    tokens, real = many(jax.random.split(jax.random.key(1), 50))
    ended = np.cumsum(tokens == 2, axis=-1) - (tokens == 2) > 0
    assert ended.any()
    np.testing.assert_array_equal(~real, ended)
    assert (np.asarray(tokens)[ended] == 9).all()


def test_a_student_comes_nearer_to_its_teacher_where_it_writes():
    sample = sampler(CONFIG, length=L - P)
    method = gkd(NET, NET, sample, prompt_length=P, on_policy=1.0, beta=1.0)
    learner = kd.minimize(method, optax.adam(1e-2))
    data, frozen = batch(), variables(1)
    traces = []

    @jax.jit
    def run(state):
        traces.append(1)

        def one(state, _):
            state, metrics = learner.update(state, data, frozen)
            return state, metrics["loss/gkd"]

        return jax.lax.scan(one, state, length=40)

    state = jax.jit(learner.init)(jax.random.key(0), data, frozen)
    state, first = run(state)
    state, second = run(state)
    assert len(traces) == 1
    assert np.mean(second[-10:]) < 0.5 * np.mean(first[:10])


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"on_policy": 1.5}, ValueError, "on_policy"),
        ({"beta": -0.1}, ValueError, "beta"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"prompt_length": 0}, ValueError, "prompt_length"),
        ({"sample": None}, TypeError, "sample"),
    ],
)
def test_bad_options(options, error, message):
    given = {"sample": written, "prompt_length": P} | options
    with pytest.raises(error, match=message):
        gkd(NET, NET, **given)


def test_bad_batches_and_samples():
    with pytest.raises(ValueError, match="prompt_length"):
        prepared(batch(), gkd(NET, NET, written, prompt_length=L))
    with pytest.raises(ValueError, match="input_ids"):
        prepared({"index": jnp.arange(3)})

    def short(params, ids, mask, keys):
        return jnp.zeros((B, 2), int), jnp.ones((B, 2), bool)

    with pytest.raises(ValueError, match="what sample returns"):
        prepared(batch(), gkd(NET, NET, short, prompt_length=P))
    headless = dataclasses.replace(CONFIG, head=None)
    with pytest.raises(ValueError, match="config"):
        sampler(headless, length=3)
    with pytest.raises(ValueError, match="length"):
        sampler(CONFIG, length=0)
