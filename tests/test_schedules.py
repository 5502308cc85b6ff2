"""Schedules: values, what optax gives in the cases it has, tracing, bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import schedules

STEPS = np.arange(0, 130, 10)


def test_cosine_is_optax_where_optax_has_it():
    ours = schedules.cosine(2.0, 0.5, 100)
    theirs = optax.cosine_decay_schedule(2.0, 100, alpha=0.25)
    np.testing.assert_allclose([ours(t) for t in STEPS], [theirs(t) for t in STEPS], rtol=1e-5)


def test_cosine_up_down_and_late():
    up = schedules.cosine(0.0, 3.0, 100, begin=20)
    np.testing.assert_allclose([up(t) for t in (0, 20, 70, 120, 500)], [0, 0, 1.5, 3, 3], atol=1e-6)
    down = schedules.cosine(3.0, 0.0, 100, begin=20)
    np.testing.assert_allclose(up(STEPS) + down(STEPS), 3, rtol=1e-6)
    assert np.all(np.diff(up(STEPS)) >= 0)


def test_cosine_is_annealed_rectification():
    """s(t; a, b) = b + (a - b) / 2 (1 + cos(pi t / N)), and never quite b within the run."""
    total = 130
    wanted = 2.0 + 0.25 * (1 + np.cos(np.pi * STEPS / total))
    schedule = schedules.cosine(2.5, 2.0, total)
    np.testing.assert_allclose(schedule(STEPS), wanted, rtol=1e-6)
    assert schedule(total - 1) > 2.0


def test_sigmoid_ramp_up():
    ramp = schedules.sigmoid_ramp_up(10.0, 80)
    phase = 1 - np.minimum(STEPS / 80, 1)
    np.testing.assert_allclose(ramp(STEPS), 10 * np.exp(-5 * phase**2), rtol=1e-5)
    assert schedules.sigmoid_ramp_up(10.0, 80, sharpness=0.0)(0) == 10


def test_warm_up_keeps_the_inner_clock():
    inner = optax.linear_schedule(1.0, 0.0, 100)
    outer = schedules.warm_up(inner, 50)
    for t in STEPS:
        np.testing.assert_allclose(outer(t), min(t / 50, 1) * inner(t), rtol=1e-5, atol=1e-7)
    constant = schedules.warm_up(3.0, 50)
    linear = optax.linear_schedule(0.0, 3.0, 50)
    np.testing.assert_allclose([constant(t) for t in STEPS], [linear(t) for t in STEPS], rtol=1e-6)


MAKERS = {
    "cosine": lambda value, steps: schedules.cosine(value, 2 * value, steps),
    "sigmoid_ramp_up": lambda value, steps: schedules.sigmoid_ramp_up(value, steps),
    "warm_up": lambda value, steps: schedules.warm_up(value, steps),
}


@pytest.mark.parametrize("name", MAKERS)
def test_everything_may_be_traced(name):
    traces = 0

    @jax.jit
    def value(level, steps, step):
        nonlocal traces
        traces += 1
        return MAKERS[name](level, steps)(step)

    for level, steps, step in ((1.0, 50.0, 10), (2.0, 80.0, 79), (2.0, 80.0, 200)):
        traced = value(level, steps, step)
        assert traced.shape == ()
        assert traced.dtype == jnp.float32
        np.testing.assert_allclose(traced, MAKERS[name](level, steps)(step), rtol=1e-5)
    assert traces == 1
    swept = jax.vmap(lambda level: MAKERS[name](level, 50)(25))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(swept[1], 2 * swept[0], rtol=1e-6)


def test_late_steps_keep_their_place():
    """Large integer steps don't overflow or lose the transition."""
    schedule = schedules.cosine(0.0, 1.0, 2**30, begin=2**30)
    np.testing.assert_allclose(schedule(jnp.int32(2**30 + 2**29)), 0.5, atol=1e-5)


def test_schedules_go_into_optax():
    weight = schedules.warm_up(schedules.cosine(0.1, 0.01, 100), 10)
    optimizer = optax.sgd(weight)
    state = optimizer.init(jnp.ones(2))
    updates, _ = optimizer.update(jnp.ones(2), state)
    np.testing.assert_allclose(updates, -weight(0), atol=1e-9)


def test_bad_input():
    for make in (lambda n: schedules.cosine(1, 0, n), lambda n: schedules.warm_up(1.0, n)):
        with pytest.raises(ValueError, match=r"^steps must be a finite number above 0, got 0"):
            make(0)
    with pytest.raises(ValueError, match=r"^begin must be a finite number at least 0, got -1"):
        schedules.cosine(1, 0, 10, begin=-1)
    with pytest.raises(ValueError, match=r"^end must be a finite number, got nan"):
        schedules.sigmoid_ramp_up(float("nan"), 10)
    with pytest.raises(ValueError, match=r"^sharpness must be a finite number at least 0"):
        schedules.sigmoid_ramp_up(1.0, 10, sharpness=-5)
    with pytest.raises(TypeError, match=r"^value must be a finite number, got str"):
        schedules.warm_up("linear", 10)
