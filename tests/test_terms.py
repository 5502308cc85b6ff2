"""Terms: which outputs they compare, and how they answer mistakes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from method_cases import batch, plain

import kdjax as kd


def loss_of(term, data=None):
    """The term's mean in one update, with a teacher that has other weights than the student."""
    data = batch() if data is None else data
    learner = kd.minimize(kd.distill(plain(), plain(), {"it": (1.0, term)}), optax.sgd(0.1))
    frozen = plain().init(jax.random.key(1), data["image"])
    state = learner.init(jax.random.key(0), data, frozen)
    student = plain().apply(state.params["student"], {}, data["image"])[0]
    teacher = plain().apply(*frozen, data["image"])[0]
    return float(learner.update(state, data, frozen)[1]["loss"]), student, teacher


def test_matching_compares_the_outputs_named():
    term = kd.terms.matching(
        lambda s, t: ((s - t) ** 2).mean(-1), student="hidden", teacher="hidden"
    )
    found, student, teacher = loss_of(term)
    expected = ((student["hidden"] - teacher["hidden"]) ** 2).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_options_may_be_schedules():
    term = kd.terms.matching(kd.losses.soft_label_kl, temperature=lambda step: 3.0 - step)
    found, student, teacher = loss_of(term)
    expected = kd.losses.soft_label_kl(student["logits"], teacher["logits"], temperature=3.0)
    np.testing.assert_allclose(found, expected.mean(), rtol=1e-5)


def test_losses_with_labels_count_labelled_rows_only():
    term = kd.terms.matching(kd.losses.nkd, labels="label", gamma=1.5)
    found, student, teacher = loss_of(term)
    rows = np.asarray(batch()["label"]) >= 0
    values = kd.losses.nkd(
        student["logits"][rows], teacher["logits"][rows], batch()["label"][rows], gamma=1.5
    )
    np.testing.assert_allclose(found, values.mean(), rtol=1e-5)


def test_hard_labels_take_probabilities():
    hot = jax.nn.one_hot(batch()["label"], 5)  # rows of -1 are all zeros
    mixed, *_ = loss_of(kd.terms.hard_labels(), {**batch(), "label": hot})
    plain_labels, *_ = loss_of(kd.terms.hard_labels())
    np.testing.assert_allclose(mixed, plain_labels, rtol=1e-6)


def test_standardized_soft_labels():
    found, student, teacher = loss_of(kd.terms.soft_labels(temperature=2.0, standardize=True))
    values = kd.losses.soft_label_kl(
        kd.losses.standardize_logits(student["logits"]),
        kd.losses.standardize_logits(teacher["logits"]),
        temperature=2.0,
    )
    np.testing.assert_allclose(found, values.mean(), rtol=1e-5)


def test_a_coupled_loss():
    term = kd.terms.matching(kd.losses.dist, coupled=True, beta=1.0, gamma=2.0)
    found, student, teacher = loss_of(term)
    expected = kd.losses.dist(student["logits"], teacher["logits"], beta=1.0, gamma=2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_scalar_is_refused_where_padding_would_count():
    term = kd.terms.matching(lambda s, t: ((s - t) ** 2).mean())
    with pytest.raises(ValueError, match="loss must return one value per example, got a scalar"):
        loss_of(term)


def test_stored_top_k_teachers_as_the_docs_say():
    """At the storing temperature, values and rest give back the soft labels of the k classes."""
    data = batch()
    frozen = plain().init(jax.random.key(1), data["image"])
    logits = plain().apply(*frozen, data["image"])[0]["logits"]
    stored = kd.labels.top_k(logits, 5, temperature=4.0)
    data |= {"values": stored.values, "indices": stored.indices, "rest": stored.rest}

    def teacher_logits(batch):
        found = kd.labels.from_top_k(
            batch["values"], batch["indices"], batch["rest"], num_classes=5
        )
        return 4.0 * found

    term = {"soft": (1.0, kd.terms.soft_labels(temperature=4.0))}
    results = []
    for teacher, variables in ((plain(), frozen), (kd.from_batch(logits=teacher_logits), None)):
        learner = kd.minimize(kd.distill(plain(), teacher, term), optax.sgd(0.1))
        state = learner.init(jax.random.key(0), data, variables)
        results.append(float(learner.update(state, data, variables)[1]["loss"]))
    np.testing.assert_allclose(*results, rtol=1e-5)
    assert jnp.isfinite(stored.values).all()


@pytest.mark.parametrize("smoothing", [-0.1, 1.5])
def test_smoothing_out_of_range(smoothing):
    with pytest.raises(ValueError, match="smoothing must be a finite number"):
        kd.terms.hard_labels(smoothing=smoothing)


def test_missing_labels():
    data = {k: v for k, v in batch().items() if k != "label"}
    with pytest.raises(ValueError, match="batch has no entry 'label'"):
        loss_of(kd.terms.hard_labels(), data)
