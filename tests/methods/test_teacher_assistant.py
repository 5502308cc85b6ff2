"""Chains of models of decreasing size, each taught by the one before or by all."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import assert_same_bits
from method_cases import CLASSES, batch, plain

import kdjax as kd
from kdjax.methods.teacher_assistant import teacher_assistant


def wide(width):
    def init(key, x):
        keys = jax.random.split(key)
        return {
            "w0": jax.random.normal(keys[0], (x.shape[-1], width)) / jnp.sqrt(x.shape[-1]),
            "w1": jax.random.normal(keys[1], (width, CLASSES)) / jnp.sqrt(width),
        }, {}

    return plain()._replace(init=init)


MODELS = [wide(16), wide(8), wide(4)]


def trained(links):
    def train(link):
        links.append(link)
        learner = kd.minimize(link.method, optax.sgd(0.1))
        state = learner.init(link.key, batch(), link.frozen)
        return jax.jit(learner.update)(state, batch(), link.frozen)[0]

    return train


def test_a_chain_of_one_is_plain_distillation():
    data, key = batch(), jax.random.key(4)
    given = MODELS[0].init(jax.random.key(1), data["image"])
    options = {"hard": 0.4, "soft": 0.6, "temperature": 3.0}
    found = teacher_assistant(MODELS[::2], trained([]), key=key, given=given, **options)
    method = kd.distill(
        MODELS[2],
        MODELS[0],
        {
            "hard": (0.4, kd.terms.hard_labels()),
            "soft": (0.6, kd.terms.soft_labels(temperature=3.0)),
        },
    )
    learner = kd.minimize(method, optax.sgd(0.1))
    state = learner.init(jax.random.fold_in(key, 1), data, given)
    state, _ = jax.jit(learner.update)(state, data, given)
    assert_same_bits(found, [given, (state.params["student"], {})])


def test_sizes_and_teachers_of_a_chain():
    links = []
    found = teacher_assistant(MODELS, trained(links), key=jax.random.key(4))
    assert [v[0]["w1"].shape for v in found] == [(16, CLASSES), (8, CLASSES), (4, CLASSES)]
    assert [link.teachers for link in links] == [(), (MODELS[0],), (MODELS[1],)]
    assert_same_bits(links[2].frozen, found[1])


def test_dense_guidance_adds_the_losses_of_all_models_before():
    links, data = [], batch()
    teacher_assistant(
        MODELS, trained(links), key=jax.random.key(4), dense=True, hard=0.2, soft=0.5,
        temperature=2.0,
    )  # fmt: skip
    assert [len(link.teachers) for link in links] == [0, 1, 2]
    last = links[2]
    params, extra = last.method.init(last.key, data, last.frozen)
    total, (_, metrics) = last.method.loss(
        params, extra, data, last.frozen, step=jnp.int32(0), key=last.key, axis_name=None
    )
    student = MODELS[2].apply(params["student"], {}, data["image"])[0]["logits"]
    losses = [
        kd.losses.soft_label_kl(
            student, model.apply(*v, data["image"])[0]["logits"], temperature=2.0
        ).mean()
        for model, v in zip(MODELS[:2], last.frozen, strict=True)
    ]
    np.testing.assert_allclose(metrics["loss/soft/0"], losses[0], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/soft/1"], losses[1], rtol=1e-5)
    expected = 0.2 * metrics["loss/hard"] + 0.5 * sum(losses)
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="models must hold a teacher and a student"):
        teacher_assistant(MODELS[:1], trained([]), key=jax.random.key(0))
    with pytest.raises(TypeError, match="models must be a sequence"):
        teacher_assistant(MODELS[0], trained([]), key=jax.random.key(0))
    with pytest.raises(ValueError, match="soft must be"):
        teacher_assistant(MODELS, trained([]), key=jax.random.key(0), soft=-1.0)
