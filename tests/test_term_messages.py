"""What mistakes with Terms and taps are answered with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kdjax as kd

NET = kd.from_linen(
    kd.models.ConvNet(3, widths=(2, 4, 4)),
    taps={"maps": "stage1", "several": "stage*", "feat": "pool"},
)
BATCH = {"image": jnp.ones((5, 8, 8, 1)), "label": jnp.arange(5) % 3}


def started(term):
    learner = kd.minimize(kd.distill(NET, NET, {"mine": (1.0, term)}), optax.sgd(0.1))
    frozen = NET.init(jax.random.key(1), BATCH["image"])
    state = learner.init(jax.random.key(0), BATCH, frozen)
    return learner.update(state, BATCH, frozen)


def test_a_term_returns_a_value_for_each_example():
    wrong = kd.Term(
        kd.terms.no_params, lambda own, s, t, batch, *, step, key: s["logits"].mean(axis=0)
    )
    with pytest.raises(ValueError, match="'mine' must return a value for each of the 5 examples"):
        started(wrong)
    right = kd.Term(kd.terms.no_params, lambda own, s, t, batch, **_: s["logits"].mean(axis=1))
    assert np.isfinite(started(right)[1]["loss/mine"])


@pytest.mark.parametrize(
    ("term", "error", "words"),
    [
        (kd.terms.rkd(["feat"], ["feat"]), TypeError, "tap must be the name of one output"),
        (kd.terms.fitnet("several", "maps"), TypeError, "'several' must be one array, got a tuple"),
        (kd.terms.rkd("several", "feat"), TypeError, "'several' must be one array, got a tuple"),
        (kd.terms.srrl("maps", "maps"), ValueError, "expose="),
        (kd.terms.ofd("maps", "maps", norms="norm"), ValueError, "expose="),
    ],
    ids=["list", "glob map", "glob features", "no head", "no norm"],
)
def test_taps_that_do_not_fit(term, error, words):
    with pytest.raises(error, match=words):
        started(term)


def test_labels_of_the_tokens_themselves_are_pointed_out():
    net = kd.lm.model(kd.lm.GPT2Config(vocab_size=5, hidden_size=4, num_layers=1, num_heads=1))
    method = kd.distill(net, None, {"lm": (1.0, kd.terms.causal_lm())})
    learner, batch = kd.minimize(method, optax.sgd(0.1)), {"input_ids": jnp.ones((2, 3), int)}
    state = learner.init(jax.random.key(0), batch)
    with pytest.raises(ValueError, match="labels='input_ids'"):
        learner.update(state, batch)


def test_simkd_wants_its_whole_state():
    variables = NET.init(jax.random.key(1), BATCH["image"])
    with pytest.raises(ValueError, match=r"state must be the whole State .*kdjax.train.restore"):
        kd.methods.simkd.deploy(NET, NET, variables, BATCH, variables)
