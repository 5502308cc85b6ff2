"""One device = N devices, by every route, and each comparison catches what it is there for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parallel import parallel_problem as problem

from kdjax import parallel
from kdjax.core import Learner, Model, distill, minimize
from kdjax.terms import hard_labels

TOLERANCE = 1e-6
BY_NAME = ("shard_map", "shard_map_unchecked", "pmap")
ROUTES = ("jit", "fsdp", *BY_NAME)
# The other routes run the same code on the device as one of these.
MAIN = ("jit", "shard_map", "pmap")


def routes(*quick):
    """All routes, of which only some without the slow mark."""
    return [
        name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in ROUTES
    ]


def route(name, make, n, **options):
    """The update of ``make(axis_name=...)`` on n devices."""
    mesh = parallel.data_mesh(n)
    if name == "jit":
        return parallel.jit_update(make(), mesh, **options)
    if name == "fsdp":
        return parallel.jit_update(make(), mesh, fsdp=True, min_size=1, **options)
    named = make(axis_name="data")
    if name == "pmap":
        return parallel.pmap_update(named, devices=jax.devices()[:n], **options)
    return parallel.shard_map_update(named, mesh, check_vma=name == "shard_map", **options)


@functools.cache
def counted_route(name, n):
    """The route of the full problem, and a list that grows with every trace of it."""
    traces = []

    def make(**options):
        plain = problem.learner(**options)

        def update(*args):
            traces.append(args)
            return plain.update(*args)

        return Learner(plain.init, update)

    return route(name, make, n), traces


def compare(found, wanted):
    (state, metrics), (other, others) = found, wanted
    assert set(metrics) == set(others)
    return max(
        problem.distance(state.params, other.params),
        problem.distance(state.extra, other.extra),
        problem.distance(metrics, others),
    )


QUICK = {("jit", 1), ("jit", 8), ("shard_map", 1), ("shard_map", 8), ("pmap", 8)}


@pytest.mark.parametrize(
    ("name", "n"),
    [
        (name, n) if n == 4 or (name, n) in QUICK else pytest.param(name, n, marks=pytest.mark.slow)
        for name in ROUTES
        for n in (1, 4, 8)
    ],
)
def test_any_number_of_devices_is_one_device(name, n):
    update, traces = counted_route(name, n)
    found = problem.train(update, problem.start(), problem.teacher())
    one_device = problem.one_device()
    assert compare(found, one_device) < TOLERANCE
    assert len(traces) == 1, "one trace for any number of steps"
    assert int(found[0].step) == 3
    assert found[0].key.dtype == one_device[0].key.dtype
    assert jnp.array_equal(
        jax.random.key_data(found[0].key), jax.random.key_data(one_device[0].key)
    )
    for x in jax.tree.leaves(found):
        assert len(x.sharding.device_set) == n


@pytest.mark.parametrize("name", routes("jit", "shard_map", "shard_map_unchecked"))
def test_microbatches_inside_a_route(name):
    names = ("hard", "soft", "masked")

    def make(**options):
        return problem.learner(*names, microbatches=2, **options)

    found = problem.train(route(name, make, 4), problem.start(*names), problem.teacher())
    assert compare(found, problem.one_device(*names)) < TOLERANCE


def psum_on_top():
    """An optimizer that sums the gradients over the devices once more."""
    inner = optax.sgd(0.3)

    def update(grads, state, params=None):
        return inner.update(jax.lax.psum(grads, "data"), state, params)

    return optax.GradientTransformation(inner.init, update)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_collective_too_many_is_noticed(name):
    def make(**options):
        return problem.learner("hard", optimizer=psum_on_top(), **options)

    found = problem.train(route(name, make, 4), problem.start("hard"), problem.teacher())
    assert compare(found, problem.one_device("hard")) > 1e-3


@pytest.mark.parametrize("name", ["hard", "soft", "masked", "log_sum"])
def test_means_of_local_means_are_noticed(name):
    """What data-parallel code usually does, for each way in which it is wrong."""
    plain = problem.learner(name)

    def averaged(state, batch, frozen):
        found, metrics = plain.update(state, batch, frozen)
        params = jax.tree.map(lambda x: jax.lax.pmean(x, "data"), found.params)
        return found._replace(params=params), jax.lax.pmean(metrics, "data")

    started, frozen, wanted = problem.start(name), problem.teacher(), problem.one_device(name)
    wrong = parallel.pmap_update(Learner(plain.init, averaged), devices=jax.devices()[:4])
    right = route("pmap", lambda **o: problem.learner(name, **o), 4)
    assert compare(problem.train(right, started, frozen), wanted) < TOLERANCE
    found, _ = problem.train(wrong, started, frozen)
    assert problem.distance(found.params, wanted[0].params) > 1e-3


@pytest.mark.parametrize("name", routes("jit", "pmap"))
def test_padding_counts_for_nothing(name):
    rows = {key: value[:13] for key, value in problem.batch(weight=False).items()}
    names = ("hard", "masked")
    plain = problem.learner(*names)
    started, frozen = problem.start(*names), problem.teacher()
    wanted = jax.jit(plain.update)(started, rows, frozen)
    update = route(name, lambda **o: problem.learner(*names, **o), 4)
    assert compare(update(started, parallel.pad_batch(rows, 16), frozen), wanted) < TOLERANCE
    # Without the weights the three padded rows would count.
    counted = {**parallel.pad_batch(rows, 16), "weight": np.ones(16, np.float32)}
    assert compare(update(started, counted, frozen), wanted) > 1e-3


def conv_net(*, norm=False, dropout=0.0):
    """A Linen network as a Model, without the adapters."""
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            if norm:
                x = nn.BatchNorm(use_running_average=not train, use_fast_variance=False)(x)
            x = nn.relu(nn.Conv(4, (3, 3))(x)).mean((1, 2))
            x = nn.Dropout(dropout, deterministic=not train)(x)
            return nn.Dense(problem.CLASSES)(x)

    def init(key, x):
        made = Net().init(key, x, train=False)
        return made["params"], {k: v for k, v in made.items() if k != "params"}

    def apply(params, extra, x, *, train=False, key=None):
        logits, moved = Net().apply(
            {"params": params, **extra},
            x,
            train=train,
            rngs={} if key is None else {"dropout": key},
            mutable=list(extra) if train else [],
        )
        return {"logits": logits}, {**extra, **moved}

    return Model(init, apply, "image")


def images(seed=0):
    rng = np.random.default_rng(seed)
    scale = np.linspace(0.5, 3, problem.ROWS)[:, None, None, None]
    image = rng.normal(size=(problem.ROWS, 6, 6, 2)) * scale
    return {"image": image.astype(np.float32), "label": problem.batch(seed)["label"]}


def image_learner(**options):
    net = {key: options.pop(key) for key in ("norm", "dropout") if key in options}
    made = distill(conv_net(**net), None, {"hard": (1.0, hard_labels())})
    return minimize(made, optax.sgd(0.3), **options)


@pytest.mark.parametrize("name", routes("jit", "shard_map"))
def test_a_linen_convolution_net(name):
    plain = image_learner()
    started = jax.jit(plain.init)(jax.random.key(0), images())
    wanted = jax.jit(plain.update)(started, images())
    assert compare(route(name, image_learner, 8)(started, images()), wanted) < TOLERANCE


@pytest.mark.parametrize("name", routes(*MAIN))
def test_batch_norm(name):
    """Statistics of the whole batch under jit; elsewhere the average of each device's own."""

    def make(**options):
        return image_learner(norm=True, **options)

    plain = make()
    started = jax.jit(plain.init)(jax.random.key(0), images())
    wanted = jax.jit(plain.update)(started, images())
    found = route(name, make, 4)(started, images())

    blocks = images()["image"].reshape(4, -1, 2)
    local = 0.99 + 0.01 * blocks.var(1).mean(0)
    whole = 0.99 + 0.01 * blocks.reshape(-1, 2).var(0)
    assert np.abs(local - whole).max() > 1e-5
    stats = found[0].extra["student"]["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["var"], local if name in BY_NAME else whole, rtol=1e-6)
    np.testing.assert_allclose(stats["mean"], 0.01 * blocks.mean((0, 1)), rtol=1e-4, atol=1e-7)
    if name not in BY_NAME:
        assert compare(found, wanted) < TOLERANCE
    for x in jax.tree.leaves(found[0].extra):
        copies = [np.asarray(shard.data) for shard in x.addressable_shards]
        assert len(copies) == 4
        if x.is_fully_replicated:
            assert all(np.array_equal(copies[0], other) for other in copies)


@pytest.mark.parametrize("name", routes("jit", "shard_map"))
def test_dropout_runs_and_repeats(name):
    def make(**options):
        return image_learner(dropout=0.5, **options)

    started = jax.jit(make().init)(jax.random.key(0), images())
    update = route(name, make, 4)
    (first, metrics), (again, _) = update(started, images()), update(started, images())
    assert np.isfinite(metrics["loss"])
    assert problem.distance(first.params, again.params) == 0
    second, _ = update(started._replace(step=started.step + 1), images())
    assert problem.distance(first.params, second.params) > 1e-4


@pytest.mark.parametrize("name", ROUTES)
def test_donation_takes_the_state_only(name):
    update, _ = counted_route(name, 4)
    # The student starts as its teacher: the same arrays, before they go to the devices.
    frozen = problem.teacher()
    started = problem.start()
    started = started._replace(params={**started.params, "student": frozen[0]})
    rows = jax.tree.map(jnp.asarray, problem.batch())
    first, _ = update(started, rows, frozen)
    taken = first.params["student"]["in"]["w"]
    second, _ = update(first, rows, frozen)
    assert taken.is_deleted()
    given = (started.params, started.opt, rows, frozen, second.params)
    assert not any(x.is_deleted() for x in jax.tree.leaves(given))
    assert not started.key.is_deleted()


@pytest.mark.parametrize("name", routes(*MAIN))
def test_donation_can_be_turned_off(name):
    update = route(name, lambda **o: problem.learner("hard", **o), 4, donate=False)
    first, _ = update(problem.start("hard"), problem.batch(), problem.teacher())
    second, _ = update(first, problem.batch(), problem.teacher())
    assert not any(x.is_deleted() for x in jax.tree.leaves((first, second)))


@pytest.mark.parametrize("name", BY_NAME)
def test_a_learner_without_the_axis_is_refused(name):
    update = route(name, lambda **_: problem.learner(), 4)
    with pytest.raises(ValueError, match=r"learner must be made with .*axis_name='data'.*own rows"):
        update(problem.start(), problem.batch(), problem.teacher())


@pytest.mark.parametrize("name", BY_NAME)
def test_a_learner_with_another_axis_is_refused(name):
    update = route(name, lambda **_: problem.learner(axis_name="rows"), 4)
    with pytest.raises(ValueError, match=r"learner must be made with .*'data'.*got .*'rows'"):
        update(problem.start(), problem.batch(), problem.teacher())


def test_jit_refuses_a_learner_with_an_axis():
    update = parallel.jit_update(problem.learner(axis_name="data"), parallel.data_mesh(4))
    with pytest.raises(ValueError, match=r"learner must be made without axis_name.*'data'"):
        update(problem.start(), problem.batch(), problem.teacher())


def test_other_name_errors_pass_unchanged():
    def broken(state, batch, frozen):
        raise NameError("name 'x' is not defined")

    update = parallel.jit_update(Learner(lambda *_: None, broken), parallel.data_mesh(4))
    with pytest.raises(NameError, match="'x' is not defined"):
        update(problem.start(), problem.batch(), problem.teacher())


def test_updates_can_be_scanned():
    plain, mesh = problem.learner(), parallel.data_mesh(4)
    started, frozen, (wanted, _) = problem.start(), problem.teacher(), problem.one_device()
    update = parallel.jit_update(plain, mesh)
    stacked = jax.tree.map(lambda *x: np.stack(x), *(problem.batch(i) for i in range(3)))
    found, metrics = jax.jit(
        lambda state, batches: jax.lax.scan(lambda s, b: update(s, b, frozen), state, batches)
    )(parallel.replicate(started, mesh), stacked)
    assert problem.distance(found.params, wanted.params) < TOLERANCE
    assert metrics["loss"].shape == (3,)
