"""One checker for each law that every Method must keep, used by the contract tests.

Each takes a `Case` and raises AssertionError if its law is broken. `test_contract_checkers.py`
runs every checker on a Method that breaks its law.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import kdjax as kd
from kdjax.core import Learner, Method, State

AXIS = "data"


class Case(NamedTuple):
    """A Method on a batch.

    Attributes:
      make: hyperparameter -> Method; the hyperparameter is any scalar that the method can anneal.
      batch: a batch of 16 rows with an ``index``.
      frozen: the teacher's variables, or None.
      hyper: two values of the hyperparameter that give different updates.
      partition_free: False if rows are coupled or dropout draws depend on the partition, so that
        microbatches and devices are not expected to agree.
      coupled: a batch-coupled Term is in it: devices agree, microbatches are refused.
      counters: counters of the models' ``apply``, by model name.
      passes: how often an update traces each of them; once where it isn't said. The body of an
        attack is traced once for all its steps.
      minimize: makes the Learner; those other than `kdjax.minimize` know no microbatches.
    """

    make: Callable[[Any], Method]
    batch: dict[str, jax.Array]
    frozen: Any = None
    hyper: tuple[float, float] = (1.0, 3.0)
    partition_free: bool = True
    coupled: bool = False
    counters: dict[str, Counter] | None = None
    passes: dict[str, int] | None = None
    minimize: Callable[..., Learner] = kd.minimize

    def learner(self, **options: Any) -> Learner:
        return self.minimize(self.make(self.hyper[0]), optax.sgd(0.1, momentum=0.9), **options)

    def start(self, learner: Learner | None = None) -> State:
        learner = self.learner() if learner is None else learner
        return learner.init(jax.random.key(7), self.batch, frozen=self.frozen)


class Counter:
    """Counts calls of a function, which under jit is the number of traces of it."""

    def __init__(self, function: Callable[..., Any]):
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


def signature(tree: Any) -> Any:
    """Tree structure, shapes, dtypes and weak types."""
    abstract = jax.tree.map(lambda x: (x.shape, str(x.dtype), x.aval.weak_type), tree)
    return jax.tree.structure(tree), jax.tree.leaves(
        abstract, is_leaf=lambda x: isinstance(x, tuple)
    )


def as_bits(tree: Any) -> list[np.ndarray]:
    """The leaves as NumPy arrays, keys as their data."""

    def one(x: jax.Array) -> np.ndarray:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x)

    return [one(x) for x in jax.tree.leaves(tree)]


def assert_same_bits(a: Any, b: Any) -> None:
    for x, y in zip(as_bits(a), as_bits(b), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_close(a: Any, b: Any, tolerance: float = 1e-6) -> None:
    for x, y in zip(as_bits(a), as_bits(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def law_1_state_to_state(case: Case) -> None:
    """`update` maps a State to one of the same tree, shapes and dtypes, in one trace."""
    learner = case.learner()
    counted = Counter(learner.update)
    update = jax.jit(counted)
    state = case.start(learner)
    before = signature(state)
    for _ in range(4):
        state, _ = update(state, case.batch, case.frozen)
        assert signature(state) == before, "update changed the State's signature"
    assert counted.calls == 1, f"{counted.calls} traces for 4 steps"
    assert int(state.step) == 4


def law_2_same_bits(case: Case) -> None:
    """The same (state, batch, frozen) gives the same bits, eagerly traced twice over."""
    results = []
    for _ in range(2):
        learner = case.learner()
        update = jax.jit(learner.update)
        state = case.start(learner)
        for _ in range(2):
            state, metrics = update(state, case.batch, case.frozen)
        results.append((state, metrics))
    assert_same_bits(*results)
    assert jnp.issubdtype(results[0][0].key.dtype, jax.dtypes.prng_key)
    # The randomness of a step comes from the key and the step alone.
    assert_same_bits(results[0][0].key, case.start().key)


def law_3_hyperparameters_are_traced(case: Case) -> None:
    """One program for all values of a hyperparameter; vmap over it equals one at a time."""

    def update(hyper: jax.Array, state: State) -> Any:
        learner = case.minimize(case.make(hyper), optax.sgd(0.1, momentum=0.9))
        return learner.update(state, case.batch, case.frozen)[0].params

    counted = Counter(update)
    compiled = jax.jit(counted)
    state = case.start()
    values = [jnp.float32(h) for h in case.hyper]
    single = [compiled(h, state) for h in values]
    assert counted.calls == 1, "another value of the hyperparameter was another trace"
    together = jax.vmap(update, (0, None))(jnp.stack(values), state)
    for i, one in enumerate(single):
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), one, 1e-5)
    differs = any(np.any(x != y) for x, y in zip(*map(as_bits, single), strict=True))
    assert differs, "the hyperparameter changes nothing"


def law_4_exact_means(case: Case) -> None:
    """The teacher gets no gradient, and rows of weight 0 and microbatches change nothing."""
    method = case.make(case.hyper[0])
    state = case.start()

    def loss(frozen: Any, batch: Any) -> jax.Array:
        keys = jax.random.split(jax.random.key(0))
        if method.prepare is not None:
            batch = method.prepare(
                state.params, state.extra, batch, frozen,
                step=state.step, key=keys[0], axis_name=None,
            )  # fmt: skip
        return method.loss(
            state.params, state.extra, batch, frozen,
            step=state.step, key=keys[1], axis_name=None,
        )[0]  # fmt: skip

    if case.frozen is not None:
        grads = jax.grad(loss)(case.frozen, case.batch)
        assert all(not np.any(g) for g in as_bits(grads)), "the teacher gets a gradient"
    if case.coupled:
        refuses_microbatches(case)
        return
    if not case.partition_free:
        return
    padded = jax.tree.map(lambda x: jnp.concatenate([x, x[:8]]), case.batch)
    padded["weight"] = jnp.r_[jnp.ones(16), jnp.zeros(8)].astype(jnp.float32)
    np.testing.assert_allclose(loss(case.frozen, padded), loss(case.frozen, case.batch), rtol=1e-5)
    if case.minimize is not kd.minimize:
        return
    whole, sliced = case.learner(), case.learner(microbatches=4)
    start = case.start(whole)
    expected = jax.jit(whole.update)(start, case.batch, case.frozen)
    found = jax.jit(sliced.update)(start, case.batch, case.frozen)
    assert_close(found, expected, 2e-6)


def refuses_microbatches(case: Case) -> None:
    state = case.start()
    with pytest.raises(ValueError, match="microbatches"):
        case.learner(microbatches=4).update(state, case.batch, case.frozen)


def law_5_student_has_its_place(case: Case) -> None:
    """A trained student sits at params["student"] and extra["student"]; the teacher in neither."""
    state = case.start()
    assert "student" in state.params
    assert "student" in state.extra
    if case.frozen is not None:
        kept = {x.tobytes() for x in as_bits((state.params, state.extra)) if x.size > 8}
        taught = {x.tobytes() for x in as_bits(case.frozen) if x.size > 8}
        assert not kept & taught, "the teacher's variables are part of the State"


def law_6_one_forward_pass(case: Case) -> None:
    """Student and teacher run forward as often as the method's mathematics asks, usually once."""
    assert case.counters, "the case counts no model"
    learner, state = case.learner(), case.start()
    for counter in case.counters.values():
        counter.calls = 0
    jax.make_jaxpr(learner.update)(state, case.batch, case.frozen)
    calls = {name: counter.calls for name, counter in case.counters.items()}
    wanted = dict.fromkeys(calls, 1) | (case.passes or {})
    assert calls == wanted, f"forward passes in one update: {calls}, not {wanted}"


def law_7_metrics_are_scalars(case: Case) -> None:
    """Metrics are a flat dict from stable names to scalars, with the loss among them."""
    learner = case.learner()
    state = case.start(learner)
    update = jax.jit(learner.update)
    state, first = update(state, case.batch, case.frozen)
    state, second = update(state, case.batch, case.frozen)
    assert sorted(first) == sorted(second)
    assert "loss" in first
    for name, value in first.items():
        assert isinstance(name, str)
        assert value.shape == (), f"metric {name} has shape {value.shape}"
        assert value.dtype == jnp.float32, f"metric {name} has dtype {value.dtype}"


def law_8_resume(case: Case) -> None:
    """A State taken to the host and back continues to the same bits."""
    learner = case.learner()
    update = jax.jit(learner.update)
    state = case.start(learner)
    unbroken = state
    for _ in range(4):
        unbroken, _ = update(unbroken, case.batch, case.frozen)
    for _ in range(2):
        state, _ = update(state, case.batch, case.frozen)
    leaves, structure = jax.tree.flatten(state)
    moved = [
        jax.random.wrap_key_data(np.asarray(jax.random.key_data(x)))
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        else jnp.asarray(np.asarray(x))
        for x in leaves
    ]
    state = jax.tree.unflatten(structure, moved)
    for _ in range(2):
        state, _ = update(state, case.batch, case.frozen)
    assert_same_bits(state, unbroken)


def law_8_devices(case: Case, route: str, devices: int) -> None:
    """One device equals several, by the given route."""
    single = case.learner()
    state = case.start(single)
    expected = state
    update = jax.jit(single.update)
    for _ in range(2):
        expected, metrics = update(expected, case.batch, case.frozen)
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    if route == "jit":
        run = jit_route(single, mesh)
    else:
        learner = case.learner(axis_name=AXIS)
        run = (
            shard_map_route(learner, mesh, route)
            if route != "pmap"
            else pmap_route(learner, devices)
        )
    found = state
    for _ in range(2):
        found, found_metrics = run(found, case.batch, case.frozen)
    assert_close((found, found_metrics), (expected, metrics), 2e-6)


def jit_route(learner: Learner, mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(AXIS), PartitionSpec()))
    update = jax.jit(learner.update)
    return lambda state, batch, frozen: update(
        jax.device_put(state, whole), jax.device_put(batch, rows), jax.device_put(frozen, whole)
    )


def shard_map_route(learner: Learner, mesh: jax.sharding.Mesh, route: str) -> Callable[..., Any]:
    specs = (PartitionSpec(), PartitionSpec(AXIS), PartitionSpec())
    return jax.jit(
        jax.shard_map(
            learner.update,
            mesh=mesh,
            in_specs=specs,
            out_specs=PartitionSpec(),
            check_vma=route == "shard_map",
        )
    )


def pmap_route(learner: Learner, devices: int) -> Callable[..., Any]:
    update = jax.pmap(
        learner.update,
        axis_name=AXIS,
        in_axes=(None, 0, None),
        out_axes=None,
        devices=jax.devices()[:devices],
    )
    return lambda state, batch, frozen: update(
        state,
        jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch),
        frozen,
    )


def law_9_float32_kept(case: Case) -> None:
    """Parameters, optimizer state and loss stay float32 (the case's models run in bfloat16)."""
    learner = case.learner()
    state, metrics = jax.jit(learner.update)(case.start(learner), case.batch, case.frozen)
    for name, x in zip(
        map(str, jax.tree.leaves_with_path(state)), jax.tree.leaves(state), strict=True
    ):
        if jnp.issubdtype(x.dtype, jnp.floating):
            assert x.dtype == jnp.float32, f"{name} is {x.dtype}"
    assert metrics["loss"].dtype == jnp.float32


def donation(case: Case) -> None:
    """A donated State leaves the batch and the teacher alive."""
    learner = case.learner()
    state = case.start(learner)
    update = jax.jit(learner.update, donate_argnums=0)
    for _ in range(2):
        state, _ = update(state, case.batch, case.frozen)
    for x in jax.tree.leaves((case.batch, case.frozen)):
        assert not x.is_deleted(), "donating the State deleted the caller's arrays"
    assert all(np.isfinite(x).all() for x in as_bits(state.params))


LAWS = (
    law_1_state_to_state,
    law_2_same_bits,
    law_3_hyperparameters_are_traced,
    law_4_exact_means,
    law_5_student_has_its_place,
    law_6_one_forward_pass,
    law_7_metrics_are_scalars,
    law_8_resume,
    donation,
)
