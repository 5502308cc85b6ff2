"""What models, samplers and masks do beyond the stored figures."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import lm

BERT = lm.BertConfig(
    vocab_size=40, hidden_size=8, num_layers=3, num_heads=2, intermediate_size=16, max_positions=12
)
GPT2 = lm.GPT2Config(vocab_size=40, hidden_size=8, num_layers=3, num_heads=2, max_positions=24)
IDS = jax.random.randint(jax.random.key(9), (3, 7), 1, 40)


def noisy(config, key=0):
    """Parameters large enough that every part matters."""
    params, _ = jax.jit(lm.model(config).init)(jax.random.key(key))
    keys = iter(jax.random.split(jax.random.key(key + 1), 200))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), params)


@pytest.mark.parametrize("config", [BERT, GPT2], ids=["bert", "gpt2"])
def test_padding_changes_nothing(config):
    params, net = noisy(config), lm.model(config)
    out, _ = net.apply(params, {}, {"input_ids": IDS})
    padded = jnp.concatenate([IDS, jnp.full((3, 4), 5)], axis=1)
    mask = jnp.arange(11)[None] < jnp.full((3, 1), 7)
    longer, _ = net.apply(params, {}, {"input_ids": padded, "attention_mask": mask})
    np.testing.assert_allclose(longer["hidden"][-1][:, :7], out["hidden"][-1], atol=2e-6)
    np.testing.assert_allclose(longer["scores"][1][..., :7, :7], out["scores"][1], atol=2e-6)


def test_gpt2_sees_the_past_only():
    params, net = noisy(GPT2), lm.model(GPT2)
    out, _ = net.apply(params, {}, {"input_ids": IDS})
    other, _ = net.apply(params, {}, {"input_ids": IDS.at[:, 4:].set(3)})
    np.testing.assert_array_equal(out["logits"][:, :4], other["logits"][:, :4])
    assert np.abs(out["logits"][:, 4:] - other["logits"][:, 4:]).max() > 0.01


@pytest.mark.parametrize("config", [BERT, GPT2], ids=["bert", "gpt2"])
def test_remat_and_dropout(config):
    params = noisy(config)

    def loss(params, net, key):
        out, _ = net.apply(params, {}, {"input_ids": IDS}, train=True, key=key)
        return sum(h.var() for h in out["hidden"])

    nets = lm.model(config), lm.model(config, remat=True)
    key = jax.random.key(1)
    plain, saved = (jax.jit(jax.grad(loss), static_argnums=1)(params, net, key) for net in nets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), plain, saved)
    values = [float(loss(params, nets[0], jax.random.key(i))) for i in (1, 1, 2)]
    assert values[0] == values[1] != values[2]
    with pytest.raises(ValueError, match="key"):
        nets[0].apply(params, {}, {"input_ids": IDS}, train=True)


def test_half_precision_keeps_scores_and_parameters():
    params = noisy(BERT)
    half, _ = lm.model(BERT, dtype=jnp.bfloat16).apply(params, {}, {"input_ids": IDS})
    full, _ = lm.model(BERT).apply(params, {}, {"input_ids": IDS})
    assert half["hidden"][-1].dtype == jnp.bfloat16
    assert half["scores"][0].dtype == jnp.float32
    np.testing.assert_allclose(half["hidden"][-1], full["hidden"][-1], atol=0.15)


def test_outputs_are_those_asked_for():
    params = noisy(BERT)
    wanted = ("hidden", "queries", "keys", "values")
    out, _ = lm.model(BERT, outputs=wanted).apply(params, {}, {"input_ids": IDS})
    assert sorted(out) == sorted(wanted)
    q, k = (out[name][1].reshape(3, 7, 2, 4) for name in ("queries", "keys"))
    full, _ = lm.model(BERT).apply(params, {}, {"input_ids": IDS})
    np.testing.assert_allclose(
        full["scores"][1], jnp.einsum("bqhw,bkhw->bhqk", q, k) / 2, atol=1e-5
    )
    assert "queries" not in full
    with pytest.raises(ValueError, match="outputs"):
        lm.model(BERT, outputs=("attentions",))


def test_bad_inputs():
    params, net = noisy(BERT), lm.model(BERT)

    def refused(words, error=ValueError, **inputs):
        with pytest.raises(error, match=words):
            net.apply(params, {}, {"input_ids": IDS, **inputs})

    refused("input_ids must be from 0 to 39", input_ids=IDS.at[0, 0].set(40))
    refused("input_ids", TypeError, input_ids=IDS * 1.0)
    refused("at most 12 positions", input_ids=jnp.ones((1, 13), int))
    refused("token_type_ids must be from 0 to 1", token_type_ids=jnp.full_like(IDS, 2))
    refused("attention_mask must have shape", attention_mask=jnp.ones((3, 6)))
    refused("position_ids must be from 0 to 11", position_ids=jnp.full_like(IDS, 12))
    with pytest.raises(ValueError, match="input_ids"):
        net.apply(params, {}, {"tokens": IDS})
    with pytest.raises(TypeError, match="config"):
        lm.model({"vocab_size": 3})
    for field, value in {"hidden_size": 9, "num_layers": 0, "activation": "gelux"}.items():
        with pytest.raises(ValueError, match=field):
            dataclasses.replace(BERT, **{field: value})
    sequence = dataclasses.replace(GPT2, head="sequence")
    with pytest.raises(ValueError, match="pad_token"):
        lm.model(sequence).init(jax.random.key(0), {"input_ids": IDS})


def test_taken_layers_are_the_teachers():
    params = noisy(GPT2)
    small, start = lm.take_layers(GPT2, params, [0, 2])
    out, _ = lm.model(small).apply(start, {}, {"input_ids": IDS})
    # The same network by hand: the middle layer adds nothing.
    dead = jax.tree.map(jnp.zeros_like, params["layer_1"])
    whole, _ = lm.model(GPT2).apply({**params, "layer_1": dead}, {}, {"input_ids": IDS})
    np.testing.assert_allclose(out["logits"], whole["logits"], atol=1e-5)
    np.testing.assert_array_equal(start["layer_1"]["ln1"]["bias"], params["layer_2"]["ln1"]["bias"])
    with pytest.raises(ValueError, match="indices"):
        lm.take_layers(GPT2, params, [3])
    with pytest.raises(ValueError, match="indices"):
        lm.take_layers(GPT2, params, [])


def greedy(params, prompt, length):
    net, ids = lm.model(GPT2), prompt
    for _ in range(length):
        out, _ = net.apply(params, {}, {"input_ids": ids})
        ids = jnp.concatenate([ids, out["logits"][:, -1].argmax(-1)[:, None]], axis=1)
    return ids[:, prompt.shape[1] :]


def test_generating_equals_running_the_whole_text_again():
    params, prompt = noisy(GPT2), IDS[:, :5]
    run = jax.jit(lambda p, x, m: lm.generate(GPT2, p, x, length=6, attention_mask=m)[0])
    np.testing.assert_array_equal(run(params, prompt, jnp.ones((3, 5))), greedy(params, prompt, 6))
    # Padded on the left, not at all, and on the right.
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = run(params, prompt, mask)
    for row, part in enumerate((prompt[:1, 2:], prompt[1:2], prompt[2:, :3])):
        np.testing.assert_array_equal(found[row], greedy(params, part, 6)[0])


def test_sampling_follows_the_model():
    params = noisy(GPT2)
    prompt = jnp.tile(IDS[:1, :4], (4000, 1))
    out, _ = lm.model(GPT2).apply(params, {}, {"input_ids": prompt[:1]})
    wanted = jax.nn.softmax(out["logits"][0, -1] / 0.7)
    draw = jax.jit(lambda key, **more: lm.generate(
        GPT2, params, prompt, length=1, key=key, temperature=0.7, **more)[0][:, 0])  # fmt: skip
    shares = np.bincount(draw(jax.random.key(0)), minlength=40) / 4000
    assert np.abs(shares - wanted).sum() < 0.12
    order = np.argsort(-np.asarray(wanted))
    top = jax.jit(lambda key: lm.generate(GPT2, params, prompt, length=1, key=key, top_k=3)[0])
    assert set(np.unique(top(jax.random.key(1)))) <= set(order[:3].tolist())
    nucleus = lambda p: lm.generate(GPT2, params, prompt, length=1, key=jax.random.key(2), top_p=p)  # noqa: E731
    few = set(np.unique(jax.jit(nucleus)(1e-6)[0]))
    assert few == {int(np.argmax(out["logits"][0, -1]))}


def test_sequences_end():
    params, prompt = noisy(GPT2), IDS[:, :5]
    tokens = lm.generate(GPT2, params, prompt, length=6)[0]
    end = int(tokens[0, 2])
    cut, real = lm.generate(GPT2, params, prompt, length=6, end_token=end, pad_token=39)
    stop = int(np.argmax(np.asarray(tokens[0]) == end))
    np.testing.assert_array_equal(cut[0, : stop + 1], tokens[0, : stop + 1])
    assert (cut[0, stop + 1 :] == 39).all()
    np.testing.assert_array_equal(real[0], np.arange(6) <= stop)


def test_generating_refuses():
    params = noisy(GPT2)

    def refused(words, error=ValueError, config=GPT2, prompt=IDS, **options):
        with pytest.raises(error, match=words):
            lm.generate(config, params, prompt, **{"length": 3, **options})

    refused("config", config=BERT)
    refused("positions", length=18)
    refused("prompt", TypeError, prompt=IDS * 1.0)
    refused("temperature", temperature=0.0)
    refused("top_k", top_k=41)
    refused("top_p", top_p=1.5)
    refused("attention_mask", attention_mask=jnp.ones((3, 2)))


def test_masked_tokens():
    ids = jnp.tile(jnp.arange(5, 37), (200, 4))
    batch = {"input_ids": ids, "index": jnp.arange(200), "other": jnp.ones(200)}
    options = {"mask_token": 4, "vocab_size": 40, "special": (5, 6)}
    out = jax.jit(lambda key, batch, rate: lm.mask_tokens(key, batch, rate=rate, **options))(
        jax.random.key(0), batch, 0.2
    )
    chosen = np.asarray(out["labels"] != -100)
    np.testing.assert_array_equal(out["labels"][chosen], ids[chosen])
    np.testing.assert_array_equal(out["input_ids"][~chosen], ids[~chosen])
    assert not chosen[np.isin(ids, (5, 6))].any()
    assert abs(chosen[~np.isin(ids, (5, 6))].mean() - 0.2) < 0.01
    new = np.asarray(out["input_ids"])[chosen]
    assert abs((new == 4).mean() - 0.8) < 0.02
    assert abs((new == np.asarray(ids)[chosen]).mean() - 0.1) < 0.02
    # A row's draws are its own, whatever the batch.
    part = {name: value[50:60] for name, value in batch.items()}
    alone = lm.mask_tokens(jax.random.key(0), part, rate=0.2, **options)
    np.testing.assert_array_equal(alone["labels"], out["labels"][50:60])


def test_masking_weights_and_padding():
    ids = jnp.tile(jnp.arange(8), (500, 1))
    mask = jnp.arange(8)[None] < jnp.full((500, 1), 6)
    weights = jnp.where(jnp.arange(8) < 3, 3.0, 1.0)
    out = lm.mask_tokens(
        jax.random.key(0),
        {"input_ids": ids, "attention_mask": mask},
        mask_token=7,
        vocab_size=8,
        rate=0.3,
        token_weights=weights,
    )
    share = np.asarray(out["labels"] != -100).mean(0)
    assert (share[6:] == 0).all()
    np.testing.assert_allclose(share[:6], [0.45] * 3 + [0.15] * 3, atol=0.06)
    with pytest.raises(ValueError, match="rate"):
        lm.mask_tokens(jax.random.key(0), {"input_ids": ids}, mask_token=0, vocab_size=8, rate=2.0)
    with pytest.raises(ValueError, match="token_weights"):
        lm.mask_tokens(
            jax.random.key(0),
            {"input_ids": ids},
            mask_token=0,
            vocab_size=8,
            token_weights=jnp.ones(3),
        )
