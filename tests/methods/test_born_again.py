"""Generations: who teaches whom, from which key, and a chain that is killed."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from contracts import assert_same_bits
from method_cases import batch, linen, plain

import kdjax as kd
from kdjax.methods.born_again import born_again
from kdjax.methods.teacher_free import tf_kd_self

STUDENT = plain()
LABELS = {"hard": (1.0, kd.terms.hard_labels())}


def fitted(links=None, folder=None, stop=None, steps=4):
    """A ``train`` of a few steps; ``stop=(number, step)`` kills it when that batch is asked for."""

    def train(link):
        if links is not None:
            links.append(link)
        data = batch()

        def batches(step):
            while True:
                if stop is not None and (link.number, step) == stop:
                    raise RuntimeError("killed")
                yield {**data, "image": data["image"] * (1 + 0.1 * step)}
                step += 1

        learner = kd.minimize(link.method, optax.adam(1e-2))
        return kd.train.fit(
            learner,
            learner.init(link.key, data, link.frozen),
            batches,
            frozen=link.frozen,
            steps=steps,
            checkpoint=None if folder is None else folder / str(link.number),
            save_every=1,
            progress=False,
            plot=False,
        )

    return train


def test_each_generation_learns_from_the_one_before():
    links = []
    found = born_again(STUDENT, fitted(links), key=jax.random.key(5), generations=2)
    assert [link.number for link in links] == [0, 1, 2]
    assert [len(link.teachers) for link in links] == [0, 1, 1]
    assert links[0].frozen is None
    assert_same_bits(links[1].frozen, found[0])
    assert_same_bits(links[2].frozen, found[1])
    for link in links:
        assert link.key == jax.random.fold_in(jax.random.key(5), link.number)
    starts = [np.asarray(STUDENT.init(link.key, batch()["image"])[0]["w0"]) for link in links]
    assert not np.allclose(starts[0], starts[1])
    # As an ensemble, without more ado.
    logits = kd.ensemble([STUDENT] * 3).apply(found, {}, batch())[0]["logits"]
    single = STUDENT.apply(*found[2], batch()["image"])[0]["logits"]
    assert logits.shape == single.shape


def test_generations_are_plain_distillation_each():
    key = jax.random.key(5)
    found = born_again(
        STUDENT, fitted(), key=key, generations=1, hard=0.3, soft=0.7, temperature=2.0
    )

    class Link:  # what the driver would have made, by hand
        def __init__(self, number, method, frozen):
            self.number, self.method, self.frozen = number, method, frozen
            self.key = jax.random.fold_in(key, number)

    first = fitted()(Link(0, kd.distill(STUDENT, None, LABELS), None))
    assert_same_bits(found[0], (first.params["student"], first.extra["student"]))
    pairs = {
        "soft": (0.7, kd.terms.soft_labels(temperature=2.0)),
        "hard": (0.3, kd.terms.hard_labels()),
    }
    second = fitted()(Link(1, kd.distill(STUDENT, STUDENT, pairs), found[0]))
    np.testing.assert_allclose(found[1][0]["w0"], second.params["student"]["w0"], rtol=1e-6)


@pytest.mark.parametrize("stop", [(0, 2), (1, 3)])
def test_a_killed_chain_goes_on_where_it_was(tmp_path, stop):
    key = jax.random.key(5)
    unbroken = born_again(STUDENT, fitted(), key=key, generations=2)
    with pytest.raises(RuntimeError, match="killed"):
        born_again(STUDENT, fitted(folder=tmp_path, stop=stop), key=key, generations=2)
    assert not (tmp_path / "2").exists()
    links = []
    found = born_again(STUDENT, fitted(links, folder=tmp_path), key=key, generations=2)
    assert_same_bits(found, unbroken)
    # Called once more, everything is read, and more generations are added to it.
    asked = fitted(folder=tmp_path, stop=(1, 0))  # kills whoever would train generation 1
    longer = born_again(STUDENT, asked, key=key, generations=3)
    assert_same_bits(longer[:3], unbroken)
    assert len(longer) == 4


def test_a_trained_first_generation_is_not_trained_again():
    links, given = [], STUDENT.init(jax.random.key(9), batch()["image"])
    found = born_again(STUDENT, fitted(links), key=jax.random.key(5), generations=1, given=given)
    assert [link.number for link in links] == [1]
    assert_same_bits(found[0], given)
    assert_same_bits(links[0].frozen, given)


def test_any_method_and_flax_variables():
    """A ``make`` of one's own, and a ``train`` that returns a Flax variables dict."""
    student, seen = linen(), []

    def make(model, teachers):
        return tf_kd_self(model) if teachers else kd.distill(model, None, LABELS)

    def train(link):
        seen.append(link)
        params, extra = link.student.init(link.key, batch()["image"])
        return {"params": params, **extra}

    found = born_again(student, train, key=jax.random.key(0), generations=1, make=make)
    assert len(found) == 2
    state = kd.minimize(seen[1].method, optax.sgd(0.1)).init(seen[1].key, batch(), seen[1].frozen)
    assert jax.tree.structure(state.params["student"]) == jax.tree.structure(found[0][0])


def test_bad_input():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="generations must be an integer"):
        born_again(STUDENT, fitted(), key=key, generations=0)
    with pytest.raises(TypeError, match="train must be a function"):
        born_again(STUDENT, None, key=key)
    with pytest.raises(TypeError, match="train must return a State or the variables"):
        born_again(STUDENT, lambda link: 3, key=key)
    with pytest.raises(TypeError, match="key must be a typed key"):
        born_again(STUDENT, fitted(), key=np.zeros(2, np.uint32))
    with pytest.raises(TypeError, match=r"models\[0\] must be a kdjax.Model"):
        born_again("net", fitted(), key=key)
    with pytest.raises(ValueError, match="temperature must be"):
        born_again(STUDENT, fitted(), key=key, temperature=0.0)
