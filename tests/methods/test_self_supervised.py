"""Barlow Twins and SimCLR: the laws, the losses they make, optimizers, a few steps on digits."""

from __future__ import annotations

import contracts
import flax.linen as nn
import jax
import jax.numpy as jnp
import method_cases
import numpy as np
import optax
import pytest

import kdjax as kd
from kdjax import losses
from kdjax.methods import barlow_twins as twins
from kdjax.methods import krr_st, simclr

KEY = jax.random.key(0)
ROWS, WIDTH = method_cases.ROWS, method_cases.WIDTH


def noise(key, images):
    return images + 0.3 * jax.vmap(lambda k: jax.random.normal(k, images.shape[1:]))(key)


def numpy(tree):
    return jax.tree.map(np.asarray, tree)


def method_of(name, backbone, hyper=None, **options):
    options = {"tap": "hidden", "projector": (7, 5)} | options
    if name == "barlow_twins":
        return twins.barlow_twins(backbone, off_diagonal=0.1 if hyper is None else hyper, **options)
    return simclr.simclr(backbone, temperature=0.5 if hyper is None else hyper, **options)


def case(name, **options) -> contracts.Case:
    backbone, calls = method_cases.counted(method_cases.plain())
    augment = kd.augment.two_views(noise)

    def make(hyper):
        return method_of(name, backbone, hyper, augment=augment, **options)

    return contracts.Case(
        make,
        method_cases.batch(),
        hyper=(0.5, 1.0),
        coupled=True,
        counters={"student": calls},
    )


CASES = {
    "barlow_twins": lambda: case("barlow_twins"),
    "simclr": lambda: case("simclr"),
}
LAWS = [law for law in contracts.LAWS if law is not contracts.law_6_one_forward_pass]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", CASES)
def test_law(name, law):
    law(CASES[name]())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("forward", "passes"), [("separate", 2), ("joint", 1)])
def test_forward_passes(name, forward, passes):
    given = case(name, forward=forward)
    learner, state = given.learner(), given.start()
    given.counters["student"].calls = 0
    jax.make_jaxpr(learner.update)(state, given.batch, None)
    assert given.counters["student"].calls == passes


FAST_ROUTES = {
    ("barlow_twins", "shard_map"),
    ("barlow_twins", "pmap"),
    ("simclr", "shard_map"),
}
DEVICES = [
    pytest.param(name, route, marks=[] if (name, route) in FAST_ROUTES else [pytest.mark.slow])
    for name in CASES
    for route in ("jit", "shard_map", "shard_map_unchecked", "pmap")
]


@pytest.mark.parametrize(("name", "route"), DEVICES)
def test_four_devices_equal_one(name, route):
    contracts.law_8_devices(CASES[name](), route, 4)


# --- what is minimised ------------------------------------------------------------------------


class Network(nn.Module):
    """Batch norm and maps, for what the plain network of the laws lacks."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, name="classifier")(x.mean((1, 2)))


def network(**options):
    return kd.from_linen(Network(), taps={"maps": "norm"}, **options)


def two(rows=8, seed=0, **more):
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((rows, 4, 4, 1)).astype(np.float32)
    views = {
        f"view{i}": image + 0.5 * rng.standard_normal(image.shape).astype(np.float32)
        for i in (1, 2)
    }
    return {"image": image, "index": np.arange(rows), **views, **more}


def loss_of(method, state, batch):
    @jax.jit
    def loss(params, extra, batch):
        return method.loss(params, extra, batch, None, step=jnp.int32(0), key=KEY, axis_name=None)

    value, (extra, metrics) = loss(*state, batch)
    return value, extra, metrics


def projected(params, statistics, x):
    """The projector of two layers, and its new statistics, in NumPy."""
    first, last = (numpy(params[str(i)]) for i in range(2))
    x = np.asarray(x, np.float64) @ first["kernel"]
    mean, var = x.mean(0), x.var(0)
    new = {
        "mean": 0.9 * statistics["mean"] + 0.1 * mean,
        "var": 0.9 * statistics["var"] + 0.1 * var,
    }
    x = np.maximum((x - mean) / np.sqrt(var + 1e-5) * first["scale"] + first["bias"], 0)
    return (x @ last["kernel"]).astype(np.float32), new


@pytest.mark.parametrize("forward", ["separate", "joint"])
@pytest.mark.parametrize("name", CASES)
def test_loss_is_that_of_the_projected_features(name, forward):
    backbone, batch = network(), two()
    method = method_of(name, backbone, tap="maps", forward=forward)
    params, extra = method.init(KEY, batch)
    assert list(params["projector"]) == ["0", "1"]
    assert sorted(params["projector"]["0"]) == ["bias", "kernel", "scale"]
    assert list(params["projector"]["1"]) == ["kernel"]
    params["projector"]["0"]["bias"] += 0.3
    value, after, metrics = loss_of(method, (params, extra), batch)

    state, statistics, z = extra["student"], extra["projector"]["0"], []
    views = [batch["view1"], batch["view2"]]
    for inputs in [np.concatenate(views)] if forward == "joint" else views:
        found, state = backbone.apply(params["student"], state, inputs, train=True)
        one, statistics = projected(params["projector"], statistics, found["maps"].mean((1, 2)))
        z.append(one)
    z1, z2 = np.split(np.concatenate(z), 2)
    if name == "barlow_twins":
        wanted = losses.barlow_twins(z1, z2, off_diagonal=0.1)
        parts = metrics["on_diagonal"] + 0.1 * metrics["off_diagonal"]
        np.testing.assert_allclose(parts, value, rtol=1e-6)
    else:
        wanted = losses.nt_xent(z1, z2).mean()
    np.testing.assert_allclose(value, wanted, rtol=2e-5)
    np.testing.assert_allclose(
        metrics[{"simclr": "loss/nt_xent"}.get(name, "loss/barlow_twins")], value, rtol=1e-6
    )
    for found, expected in zip(
        jax.tree.leaves(after),
        jax.tree.leaves({"student": state, "projector": {"0": statistics}}),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("forward", ["separate", "joint"])
@pytest.mark.parametrize("name", CASES)
def test_padding_changes_nothing(name, forward):
    """Rows of weight 0 may hold anything; neither loss, gradient nor statistics see them."""
    junk = jnp.tile(jnp.array([jnp.nan, 4.0, -7.0])[:, None], (1, WIDTH))
    plain, data = method_cases.plain(), method_cases.batch()
    method = method_of(name, plain, forward=forward)
    batch = {"view1": data["image"], "view2": data["image"][::-1]}
    batch = {**batch, "image": data["image"]}
    params, extra = method.init(KEY, batch)
    padded = {k: jnp.concatenate([x, junk]) for k, x in batch.items()}
    padded["weight"] = jnp.r_[jnp.ones(ROWS), jnp.zeros(3)]

    @jax.jit
    def gradient(params, batch):
        def loss(params):
            return method.loss(params, extra, batch, None, step=0, key=KEY, axis_name=None)

        return jax.value_and_grad(loss, has_aux=True)(params)

    ((value, (state, _)), grads) = gradient(params, batch)
    ((found, (found_state, _)), found_grads) = gradient(params, padded)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    contracts.assert_close(found_grads, grads, 2e-5)
    contracts.assert_close(found_state, state, 1e-5)


def test_classifier_gets_no_gradient():
    method = method_of("barlow_twins", network(), tap="maps")
    batch = two()
    params, extra = method.init(KEY, batch)
    grads = jax.jit(jax.grad(lambda p: loss_of(method, (p, extra), batch)[0]))(params)
    assert not any(np.any(g) for g in jax.tree.leaves(grads["student"]["classifier"]))
    for tree in (grads["student"]["conv"], grads["projector"]):
        assert all(np.any(g) for g in jax.tree.leaves(tree.get("kernel", tree)))


def test_hyperparameters_may_be_schedules():
    method = method_of("barlow_twins", method_cases.plain(), optax.linear_schedule(0.0, 1.0, 10))
    data = method_cases.batch()
    batch = {"view1": data["image"], "view2": -data["image"], "image": data["image"]}
    params, extra = method.init(KEY, batch)
    values = []
    for step in (0, 10):
        value, (_, metrics) = method.loss(
            params, extra, batch, None, step=jnp.int32(step), key=KEY, axis_name=None
        )
        values.append(value)
    np.testing.assert_allclose(values[0], metrics["on_diagonal"], rtol=1e-6)
    np.testing.assert_allclose(values[1] - values[0], metrics["off_diagonal"], rtol=1e-5)


def test_mixed_precision_keeps_float32():
    method = method_of("simclr", network(dtype=jnp.bfloat16), tap="maps")
    given = contracts.Case(lambda hyper: method, jax.tree.map(jnp.asarray, two()))
    contracts.law_9_float32_kept(given)


# --- afterwards ------------------------------------------------------------------------------


def test_features_and_embeddings_are_predicted():
    backbone, batch = network(), jax.tree.map(jnp.asarray, two())
    options = {"tap": "maps", "projector": (7, 5)}
    method = method_of("barlow_twins", backbone, **options)
    learner = kd.minimize(method, optax.sgd(0.1))
    state, _ = jax.jit(learner.update)(learner.init(KEY, batch), batch)
    found = kd.train.predict(twins.features(backbone, tap="maps"), state, [batch])
    outputs, _ = backbone.apply(
        state.params["student"], state.extra["student"], batch["image"], train=False
    )
    np.testing.assert_allclose(found, outputs["maps"].mean((1, 2)), atol=1e-5)
    model = twins.embeddings(backbone, **options)
    again = kd.train.predict(model, (state.params, state.extra), [batch])
    layer, statistics = numpy(state.params["projector"]), numpy(state.extra["projector"]["0"])
    x = found @ layer["0"]["kernel"]
    x = (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5)
    x = np.maximum(x * layer["0"]["scale"] + layer["0"]["bias"], 0)
    np.testing.assert_allclose(again, x @ layer["1"]["kernel"], atol=1e-5)
    params, extra = model.init(KEY, batch["image"])
    assert jax.tree.structure((params, extra)) == jax.tree.structure((state.params, state.extra))


def test_features_are_targets_of_krr_st():
    backbone = kd.from_linen(kd.models.MLP(3, features=(4,)), taps={"pool": "pool"})
    x = jnp.asarray(two()["image"])
    frozen = backbone.init(KEY, x)
    pairs = {"image": x[:2], "target": jnp.ones((2, 4))}
    net = kd.from_linen(kd.models.MLP(4, features=(4,)), taps={"features": "pool"})
    method = krr_st.krr_st(
        net,
        pairs,
        target=twins.features(backbone),
        pool_size=1,
        max_age=2,
        warm_up=False,
        add_bias=False,
    )
    learner = kd.minimize(method, krr_st.optimizer(1e-3, steps=2))
    state = learner.init(KEY, {"image": x}, frozen=frozen)
    _, metrics = jax.jit(learner.update)(state, {"image": x}, frozen)
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize("name", CASES)
def test_a_few_steps_on_digits(name):
    """The loss falls."""
    backbone = kd.from_linen(kd.models.MLP(10, features=(32,)), taps={"pool": "pool"})
    method = method_of(
        name, backbone, tap="pool", projector=(32, 16), augment=kd.augment.digits_views()
    )
    learner = kd.minimize(method, twins.optimizer(steps=20, learning_rate=1e-2, end=1.0))
    batches = iter(kd.data.digits().batches("train", 128, seed=0))
    batch = next(batches)
    state = learner.init(KEY, batch)
    update, values = jax.jit(learner.update), []
    for _ in range(20):
        state, metrics = update(state, batch)
        values.append(float(metrics["loss"]))
        batch = next(batches)
    # NT-Xent starts near log(255), that of 255 others who all look alike, and falls slowly.
    share = {"barlow_twins": 0.7, "simclr": 0.92}[name]
    assert np.mean(values[-3:]) < share * np.mean(values[:3])


# --- optimizers ------------------------------------------------------------------------------


def lars_oracle(kernel, bias, gradients, rates, bias_rates, classic):
    """Three steps in NumPy; ``classic`` applies the learning rate before the momentum."""
    moments = [np.zeros_like(kernel), np.zeros_like(bias)]
    for t, (of_kernel, of_bias) in enumerate(gradients):
        d = of_kernel + 1e-6 * kernel
        d = d * 0.001 * np.linalg.norm(kernel) / np.linalg.norm(d)
        pushes = [d, of_bias]
        if classic:
            pushes = [rates[t] * p for p in pushes]
        moments = [0.9 * m + p for m, p in zip(moments, pushes, strict=True)]
        scale = (1, 1) if classic else (rates[t], bias_rates[t])
        kernel, bias = kernel - scale[0] * moments[0], bias - scale[1] * moments[1]
    return kernel, bias


@pytest.mark.parametrize("which", ["barlow_twins", "simclr"])
def test_lars_is_the_published_one(which):
    rng = np.random.default_rng(0)
    kernel, bias = rng.standard_normal((3, 2)), rng.standard_normal(2)
    gradients = [(rng.standard_normal((3, 2)), rng.standard_normal(2)) for _ in range(6)]
    steps = np.arange(6)
    falling = 0.5 * (1 + np.cos(np.pi * (steps - 2) / 8))
    share = np.where(steps < 2, steps / 2, falling)
    if which == "barlow_twins":
        tx = twins.imagenet_optimizer(steps_per_epoch=1, epochs=10, warm_up_epochs=2)
        share = np.where(steps < 2, share, share + 1e-3 * (1 - share))
        rates, bias_rates = 0.2 * 8 * share, 0.0048 * 8 * share
    else:
        tx = simclr.optimizer(steps=10, warm_up_steps=2, learning_rate=0.3, batch_size=4096)
        rates = bias_rates = 0.3 * 16 * share
    params = {"layer": {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}}
    opt = tx.init(params)
    step = jax.jit(tx.update)
    for of_kernel, of_bias in gradients:
        grads = {"layer": {"kernel": jnp.float32(of_kernel), "bias": jnp.float32(of_bias)}}
        moves, opt = step(grads, opt, params)
        params = optax.apply_updates(params, moves)
    wanted = lars_oracle(kernel, bias, gradients, rates, bias_rates, which == "simclr")
    np.testing.assert_allclose(params["layer"]["kernel"], wanted[0], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(params["layer"]["bias"], wanted[1], rtol=2e-5, atol=1e-5)


def test_small_image_recipe():
    """Adam with the decay in the gradient, whose first step is the learning rate."""
    tx = twins.optimizer(steps=10, learning_rate=0.1, weight_decay=1.0)
    params = {"w": jnp.array([2.0, -3.0])}
    moves, _ = tx.update({"w": jnp.zeros(2)}, tx.init(params), params)
    np.testing.assert_allclose(moves["w"], [-0.1, 0.1], rtol=1e-4)
    warm = twins.optimizer(steps=10, warm_up_steps=5)
    moves, _ = warm.update({"w": jnp.ones(2)}, warm.init(params), params)
    assert not np.any(moves["w"])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: twins.barlow_twins(None), TypeError, "backbone must be a kdjax.Model"),
        (lambda: twins.features(3), TypeError, "backbone must"),
        (lambda: twins.embeddings(3), TypeError, "backbone must"),
        (lambda: simclr.simclr(network(), temperature=0.0), ValueError, "temperature must"),
        (lambda: twins.barlow_twins(network(), off_diagonal=-1), ValueError, "off_diagonal must"),
        (lambda: twins.barlow_twins(network(), eps=-1.0), ValueError, "eps must"),
        (lambda: twins.barlow_twins(network(), projector=()), ValueError, "projector must"),
        (lambda: twins.barlow_twins(network(), projector=(8, 0)), ValueError, "projector must"),
        (lambda: twins.barlow_twins(network(), projector=8), TypeError, "projector must"),
        (lambda: twins.barlow_twins(network(), forward="both"), ValueError, "forward must"),
        (lambda: simclr.simclr(network(), augment=3), TypeError, "augment must"),
        (lambda: twins.barlow_twins(network()).init(KEY, two()), ValueError, "no entry 'pool'"),
        (lambda: method_of("simclr", network()).init(KEY, {"image": 0}), ValueError, "'view1'"),
        (lambda: twins.optimizer(steps=0), ValueError, "steps must"),
        (lambda: simclr.optimizer(steps=5, warm_up_steps=5), ValueError, "warm_up_steps must"),
        (
            lambda: start_and_run("barlow_twins", rows=1),
            ValueError,
            "z1 must have at least 2 rows",
        ),
    ],
)
def test_bad_input_is_one_sentence(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def start_and_run(name, rows):
    method, batch = method_of(name, network(), tap="maps"), two(rows)
    return loss_of(method, method.init(KEY, batch), batch)
