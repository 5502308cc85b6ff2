"""KRR-ST: the published code's loop step by step, its pool, its traps and bad input."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kdjax as kd
from kdjax.methods import krr_st

# Runs of the published code in float64 (db-Lee/selfsup_dd, distill.py and model_pool.py).
GOLDEN = np.load(Path(__file__).parent / "golden_krr_st.npz")
KEY = jax.random.key(0)
SIDE, WIDTHS = 8, (4, 6)


def golden(prefix):
    found = {k.removeprefix(prefix): GOLDEN[k] for k in GOLDEN.files if k.startswith(prefix)}
    return {k: x.astype(np.float64) if x.dtype.kind == "f" else x for k, x in found.items()}


def nhwc(x):
    return np.moveaxis(x, -3, -1)


def torch_network(start=None):
    """The published network with torch's batch norm; parameters keep torch's names and layouts.

    ``start`` makes parameters and running statistics from a key.
    """

    def apply(params, extra, x, *, train=False, key=None):
        after = {}
        for i in range(len(WIDTHS)):
            kernel = params[f"conv{i}/weight_oihw"].transpose(2, 3, 1, 0)
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = x + params[f"conv{i}/bias"][None, None, None]
            mean, var = extra[f"norm{i}/mean"], extra[f"norm{i}/var"]
            if train:
                own, spread = x.mean((0, 1, 2)), x.var((0, 1, 2))
                count = x.size // x.shape[-1]
                after[f"norm{i}/mean"] = 0.9 * mean + 0.1 * own
                after[f"norm{i}/var"] = 0.9 * var + 0.1 * spread * count / (count - 1)
                mean, var = own, spread
            scale = params[f"norm{i}/scale"] / jnp.sqrt(var + 1e-5)
            x = (x - mean[None, None, None]) * scale[None, None, None]
            x = jax.nn.relu(x + params[f"norm{i}/bias"][None, None, None])
            n, h, w, c = x.shape
            x = x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
        flat = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        logits = flat @ params["fc/weight_out_in_chw"].T + params["fc/bias"][None]
        return {"logits": logits, "features": flat}, after if train else extra

    def init(key, x):
        return start(key)

    return kd.Model(init, apply)


def split(arrays):
    """Parameters and running statistics."""
    moving = {k: x for k, x in arrays.items() if k.endswith(("mean", "var"))}
    return {k: x for k, x in arrays.items() if k not in moving and "momentum" not in k}, moving


def prefixed(arrays, prefix):
    return {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}


def assert_close(found, wanted, rtol=1e-9):
    assert set(found) == set(wanted)
    for name, x in wanted.items():
        error = np.linalg.norm(np.asarray(found[name]) - x)
        assert error <= rtol * np.linalg.norm(x) + 1e-12, (name, error)


@pytest.mark.parametrize("released", [False, True])
def test_is_the_published_loop(released):
    """Pairs, losses, ages and networks of eight steps, with fresh networks on the way."""
    shared = golden("loop/")
    own = prefixed(shared, f"age_{'never_zeroed_as_official' if released else 'zeroed_on_reset'}/")
    steps, size, max_age = (int(shared[k]) for k in ("steps", "num_models", "T"))
    with jax.enable_x64(True):
        # What the method hands to the network's init at each step, to know the step by it.
        key = jax.random.split(KEY)[1]
        keys = [jax.random.split(jax.random.fold_in(key, t))[1] for t in range(steps)]
        known = jnp.stack([jax.random.key_data(k) for k in keys])
        first = prefixed(shared, "pool0/0/")
        fresh = {
            name: jnp.stack([own.get(f"fresh/{t}/{name}", np.zeros_like(x)) for t in range(steps)])
            for name, x in first.items()
            if "momentum" not in name
        }

        def start(key):
            t = jnp.argmax((known == jax.random.key_data(key)[None]).all(1))
            return split({name: x[t] for name, x in fresh.items()})

        pairs = {"image": nhwc(shared["x_syn0_nchw"]), "target": shared["y_syn0"]}
        method = krr_st.krr_st(
            torch_network(start), pairs,
            pool_size=size, max_age=max_age, reset_age=not released, warm_up=False,
        )  # fmt: skip
        tx = krr_st.optimizer(float(shared["outer_lr"]), steps=steps)
        learner = kd.minimize(method, tx)

        def batch(t):
            return {
                "image": nhwc(shared["x_real_nchw"][t]),
                "target": shared["y_real"][t],
                "pool_member": jnp.asarray(shared["idx"][t], jnp.int32),
            }

        state = learner.init(KEY, batch(0))
        nets = []
        for i in range(size):
            given = prefixed(shared, f"pool0/{i}/")
            params, moving = split(given)
            opt = optax.tree_utils.tree_set(
                krr_st.pool_optimizer().init(params), trace=prefixed(given, "momentum/")
            )
            age = jnp.asarray(shared["age0"][i], jnp.int32)
            nets.append({"params": params, "extra": moving, "opt": opt, "age": age})
        pool = jax.tree.map(lambda *x: jnp.stack(x), *nets)
        state = state._replace(extra={**state.extra, "pool": pool})
        update = jax.jit(learner.update)
        for t in range(steps):
            state, metrics = update(state, batch(t))
            np.testing.assert_allclose(metrics["loss"], own["loss"][t], rtol=1e-10)
            np.testing.assert_array_equal(state.extra["pool"]["age"], own["age"][t])
        wanted = {
            "image": nhwc(own["x_syn_steps_nchw"][-1]),
            "target": own["y_syn_steps"][-1],
        }
        assert_close(state.params["student"], wanted)
        for i in range(size):
            net = jax.tree.map(lambda x, i=i: x[i], state.extra["pool"])
            assert_close({**net["params"], **net["extra"]}, prefixed(own, f"pool_end/{i}/"))


@pytest.mark.parametrize("name", ["sgd_bn_m6", "adamw_bn_m6"])
def test_is_the_published_inner_step(name):
    given = golden(f"inner/{name}/")
    rate, decay = float(given["lr"]), float(given["weight_decay"])
    tx = (
        krr_st.pool_optimizer(learning_rate=rate, weight_decay=decay)
        if name.startswith("sgd")
        else optax.adamw(rate, weight_decay=decay)
    )
    pairs = {"image": nhwc(given["x_syn_nchw"]), "target": given["y_syn"]}
    batch = {"image": pairs["image"][:3], "target": pairs["target"][:3]}
    with jax.enable_x64(True):
        start = jax.tree.map(jnp.asarray, split(prefixed(given, "init/")))
        network = torch_network(lambda key: start)
        method = krr_st.krr_st(network, pairs, pool_size=1, warm_up=False, pool_tx=tx)
        learner = kd.minimize(method, optax.sgd(0.0))
        state = learner.init(KEY, batch)
        update = jax.jit(learner.update)
        for _ in range(int(given["steps"])):
            state, _ = update(state, batch)
        net = jax.tree.map(lambda x: x[0], state.extra["pool"])
        assert_close({**net["params"], **net["extra"]}, prefixed(given, "step3_f64/"))
        assert int(net["age"]) == 3


def mlp(width=6, outputs=4):
    """A small network without batch statistics."""

    def init(key, x):
        keys = jax.random.split(key)
        size = x[0].size
        return {
            "in": 0.3 * jax.random.normal(keys[0], (size, width), jnp.float32),
            "out": 0.3 * jax.random.normal(keys[1], (width, outputs), jnp.float32),
        }, {}

    def apply(params, extra, x, *, train=False, key=None):
        hidden = jnp.tanh(x.reshape(len(x), -1) @ params["in"])
        return {"logits": hidden @ params["out"], "features": hidden}, extra

    return kd.Model(init, apply)


RNG = np.random.default_rng(0)
PAIRS = {
    "image": RNG.standard_normal((5, 3, 3, 1)).astype(np.float32),
    "target": RNG.standard_normal((5, 4)).astype(np.float32),
}
BATCH = {
    "image": RNG.standard_normal((16, 3, 3, 1)).astype(np.float32),
    "target": RNG.standard_normal((16, 4)).astype(np.float32),
    "index": np.arange(16, dtype=np.int32),
}


def learner_of(optimizer=None, network=None, pairs=PAIRS, axis_name=None, **options):
    options = {"pool_size": 2, "max_age": 2, "warm_up": False, **options}
    method = krr_st.krr_st(mlp() if network is None else network, pairs, **options)
    return kd.minimize(method, optimizer or optax.sgd(0.1), axis_name=axis_name)


@pytest.mark.parametrize("released", [False, True])
def test_ages_and_one_program_over_two_resets(released):
    learner = learner_of(pool_size=1, max_age=3, reset_age=not released)
    state, traces = learner.init(KEY, BATCH), []

    @jax.jit
    def update(state, batch):
        traces.append(1)
        return learner.update(state, batch)

    ages, seen, weights = [], [], []
    for _ in range(10):
        state, metrics = update(state, BATCH)
        ages.append(int(state.extra["pool"]["age"][0]))
        seen.append(int(metrics["pool_age"]))
        weights.append(np.asarray(state.extra["pool"]["params"]["in"][0]))
    assert len(traces) == 1
    assert ages == ([1, 2, 3, 3, 3, 3, 3, 3, 3, 3] if released else [1, 2, 3, 0, 1, 2, 3, 0, 1, 2])
    assert seen == [0, *ages[:-1]]
    # Fresh ones are new draws, and have no momentum.
    assert np.abs(weights[7] - weights[3]).max() > 0.1
    state = learner.init(KEY, BATCH)
    for _ in range(4):
        state, _ = update(state, BATCH)
    momentum = optax.tree_utils.tree_get(state.extra["pool"]["opt"], "trace")
    assert not np.any(momentum["in"])


def test_no_convolution_is_in_a_branch():
    """There its gradients take 30 times as long on CPU."""
    arrays = golden("inner/sgd_bn_m6/")
    start = jax.tree.map(jnp.float32, split(prefixed(arrays, "init/")))
    pairs = {"image": nhwc(arrays["x_syn_nchw"]), "target": arrays["y_syn"]}
    pairs = jax.tree.map(np.float32, pairs)
    learner = learner_of(network=torch_network(lambda key: start), pairs=pairs)
    state = jax.eval_shape(learner.init, KEY, pairs)
    program = jax.make_jaxpr(learner.update)(state, pairs).jaxpr
    total, hidden = convolutions(program, False)
    # Real, synthetic and pool forward, 2 each; back to the images 2, to the weights 3.
    assert total == 11
    assert hidden == 0


def convolutions(jaxpr, inside):
    """How many there are, and how many of them in a branch or a loop."""
    total, hidden = 0, 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            total, hidden = total + 1, hidden + inside
        below = inside or eqn.primitive.name in ("cond", "while", "scan")
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                more = convolutions(inner, below)
                total, hidden = total + more[0], hidden + more[1]
    return total, hidden


def test_pool_starts_at_ages_of_its_own():
    learner = learner_of(pool_size=12, max_age=5, warm_up=True)
    pool = learner.init(KEY, BATCH).extra["pool"]
    assert set(pool["age"].tolist()) == {1, 2, 3, 4}
    cold = learner_of(pool_size=12, max_age=5).init(KEY, BATCH).extra["pool"]
    assert not np.any(cold["age"])

    def error(i, params):
        net = jax.tree.map(lambda x: x[i], params)
        out = mlp().apply(net, {}, PAIRS["image"])[0]["logits"]
        return float(((out - PAIRS["target"]) ** 2).mean())

    assert np.mean([error(i, pool["params"]) for i in range(12)]) < 0.9 * np.mean(
        [error(i, cold["params"]) for i in range(12)]
    )
    # One call for each step, or a loop inside a transformation: the same networks.
    inside = jax.jit(learner.init)(KEY, BATCH).extra["pool"]
    for a, b in zip(*map(jax.tree.leaves, (pool, inside)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_networks_are_drawn_evenly():
    learner = learner_of(pool_size=3, max_age=1000)
    state = learner.init(KEY, BATCH)
    state = jax.jit(
        lambda s: jax.lax.scan(lambda s, _: (learner.update(s, BATCH)[0], None), s, length=300)[0]
    )(state)
    ages = np.asarray(state.extra["pool"]["age"])
    assert ages.sum() == 300
    assert ages.min() > 70


def test_gradients_reach_the_pairs_alone():
    method = krr_st.krr_st(mlp(), PAIRS, pool_size=2, warm_up=False)
    params, extra = method.init(KEY, BATCH)
    call = {"step": jnp.int32(0), "key": KEY, "axis_name": None}

    def loss(params, extra, batch):
        prepared = method.prepare(params, extra, batch, None, **call)
        return method.loss(params, extra, prepared, None, **call)[0]

    given = {k: BATCH[k] for k in ("image", "target")}
    floats = jax.tree.map(jnp.asarray, (params, given))
    grads = jax.jit(jax.grad(lambda f: loss(f[0], extra, f[1])))(floats)
    assert all(np.any(g) for g in jax.tree.leaves(grads[0]))
    assert not any(np.any(g) for g in jax.tree.leaves(grads[1]))


def test_loss_is_that_of_the_kernel_and_the_pool_sees_the_new_pairs():
    learner = learner_of(pool_size=1, max_age=9)
    before = learner.init(KEY, BATCH)
    after, metrics = jax.jit(learner.update)(before, BATCH)
    net = jax.tree.map(lambda x: x[0], before.extra["pool"])

    def features(x):
        return mlp().apply(net["params"], {}, x)[0]["features"]

    wanted = kd.kernels.krr_loss(
        features(PAIRS["image"]), PAIRS["target"], features(BATCH["image"]), BATCH["target"]
    )
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-5)
    assert metrics["finite"] == 1

    def stepped(pairs):
        def inner(params):
            out = mlp().apply(params, {}, pairs["image"])[0]["logits"]
            return jnp.mean((out - pairs["target"]) ** 2)

        grads = jax.grad(inner)(net["params"])
        return jax.tree.map(lambda p, g: p - 0.1 * (g + 1e-3 * p), net["params"], grads)

    found = jax.tree.map(lambda x: x[0], after.extra["pool"]["params"])
    new, old = stepped(after.params["student"]), stepped(before.params["student"])
    for name in found:
        np.testing.assert_allclose(found[name], new[name], rtol=1e-5, atol=1e-6)
    assert max(np.abs(found[k] - old[k]).max() for k in found) > 1e-4


def test_stored_targets_are_those_of_a_live_network():
    """Which labels what the augmentation made of the images."""
    teacher = mlp(width=7)
    frozen = teacher.init(jax.random.key(5), BATCH["image"])

    def negative(key, batch):
        return {**batch, "image": -batch["image"]}

    live = learner_of(target=teacher, augment=negative)
    images = {k: BATCH[k] for k in ("image", "index")}
    stored = {
        **images,
        "image": -BATCH["image"],
        "target": teacher.apply(*frozen, -BATCH["image"])[0]["logits"],
    }
    states = []
    for learner, batch, variables in ((live, images, frozen), (learner_of(), stored, None)):
        state = learner.init(KEY, batch, variables)
        for _ in range(2):
            state, metrics = jax.jit(learner.update)(state, batch, variables)
        states.append((state.params, metrics["loss"]))
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_update_that_is_not_finite_leaves_the_pairs():
    learner = learner_of(krr_st.optimizer(1e-2, steps=20), pool_size=1, max_age=50)
    update = jax.jit(learner.update)
    start = learner.init(KEY, BATCH)
    state, _ = update(start, BATCH)
    bad = {**BATCH, "target": BATCH["target"].copy()}
    bad["target"][0, 0] = np.nan
    after, metrics = update(state, bad)
    assert np.isnan(metrics["loss"])
    assert metrics["finite"] == 1  # the regression is not to blame
    for a, b in zip(*map(jax.tree.leaves, (after.params, state.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(after.opt.total_notfinite) == 1
    on, metrics = update(after, BATCH)
    assert np.isfinite(metrics["loss"])
    assert np.any(on.params["student"]["image"] != after.params["student"]["image"])
    assert int(on.opt.total_notfinite) == 1
    lost = jax.tree.map(lambda x: x * jnp.nan, state.extra["pool"]["params"])
    lost = state._replace(extra={**state.extra, "pool": {**state.extra["pool"], "params": lost}})
    assert update(lost, BATCH)[1]["finite"] == 0


def test_optimizer():
    tx = krr_st.optimizer(0.5, steps=10)
    pairs = {"image": jnp.ones((2, 3)), "target": jnp.ones((2, 1))}
    state = tx.init(pairs)
    sizes = []
    for _ in range(12):
        moves, state = tx.update(jax.tree.map(jnp.ones_like, pairs), state, pairs)
        sizes.append(-float(moves["image"][0, 0]))
        assert float(moves["target"][0, 0]) == -sizes[-1]
    wanted = [0.5 * (1 - 0.999 * min(t, 10) / 10) for t in range(12)]
    np.testing.assert_allclose(sizes, wanted, rtol=1e-4)  # Adam of a constant gradient
    # The moments of the pairs go on through a fresh start of a network.
    learner = learner_of(krr_st.optimizer(1e-2, steps=20), pool_size=1, max_age=1)
    state = learner.init(KEY, BATCH)
    update = jax.jit(learner.update)
    for _ in range(5):
        state, _ = update(state, BATCH)
    assert state.extra["pool"]["age"].tolist() == [1]
    assert optax.tree_utils.tree_get(state.opt.inner_state[0], "count") == 5
    for bad in ({"learning_rate": 0.0, "steps": 3}, {"learning_rate": 0.1, "steps": 0}):
        with pytest.raises(ValueError, match="must be"):
            krr_st.optimizer(**bad)


def test_the_callers_pairs_outlive_a_donated_state():
    pairs = jax.tree.map(jnp.asarray, PAIRS)
    learner = learner_of(pairs=pairs)
    update = jax.jit(learner.update, donate_argnums=0)
    update(learner.init(KEY, BATCH), BATCH)
    update(learner.init(KEY, BATCH), BATCH)
    assert not any(x.is_deleted() for x in pairs.values())


def test_devices_agree():
    """Four devices and one, with SGD, batch norm in the pool and a weight of 0."""
    network = kd.from_linen(kd.models.PooledConvNet(4, widths=(3,)), taps={"features": "pool"})
    pairs = {"image": RNG.standard_normal((5, 4, 4, 1)), "target": PAIRS["target"]}
    batch = {
        "image": RNG.standard_normal((16, 4, 4, 1)).astype(np.float32),
        "target": BATCH["target"],
        "weight": np.r_[np.zeros(3), np.linspace(0.5, 2, 13)].astype(np.float32),
    }

    def make(axis_name=None):
        return learner_of(network=network, pairs=pairs, axis_name=axis_name)

    start = make().init(KEY, batch)
    mesh = kd.parallel.data_mesh(4)
    routes = {
        "one": jax.jit(make().update),
        "jit": kd.parallel.jit_update(make(), mesh, donate=False),
        "shard_map": kd.parallel.shard_map_update(make("data"), mesh, donate=False),
        "pmap": kd.parallel.pmap_update(make("data"), devices=jax.devices()[:4], donate=False),
    }
    found = {}
    for name, update in routes.items():
        state = start
        for _ in range(3):
            state, metrics = update(state, batch)
        found[name] = jax.tree.map(np.asarray, (state.params, state.extra, metrics))
    for name in ("jit", "shard_map", "pmap"):
        for a, b in zip(*map(jax.tree.leaves, (found[name], found["one"])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=name)


def test_fit_resumes_to_the_bit(tmp_path):
    learner = learner_of(krr_st.optimizer(1e-2, steps=7), max_age=2, warm_up=True)
    start = learner.init(KEY, BATCH)

    def data(step):
        while True:
            rows = np.random.default_rng([3, step]).integers(0, 16, 8)
            yield {k: x[rows] for k, x in BATCH.items()}
            step += 1

    def run(folder, steps):
        return kd.train.fit(
            learner, start, data, steps=steps, checkpoint=tmp_path / folder,
            progress=False, plot=False,
        )  # fmt: skip

    unbroken = run("a", 7)
    run("b", 4)
    resumed = run("b", 7)
    assert np.any(unbroken.params["student"]["image"] != PAIRS["image"])
    for a, b in zip(
        *map(jax.tree.leaves, (unbroken._replace(key=0), resumed._replace(key=0))), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_microbatches_are_refused():
    method = krr_st.krr_st(mlp(), PAIRS)
    with pytest.raises(ValueError, match="microbatches must be 1"):
        kd.minimize(method, optax.sgd(0.1), microbatches=2)


def test_low_precision_keeps_float32():
    network = kd.from_linen(
        kd.models.PooledConvNet(4, widths=(3,)), taps={"features": "pool"}, dtype=jnp.bfloat16
    )
    pairs = {"image": np.ones((5, 4, 4, 1), np.float32), "target": PAIRS["target"]}
    learner = learner_of(network=network, pairs=pairs, solver="svd")
    batch = {"image": np.ones((16, 4, 4, 1), np.float32), "target": BATCH["target"]}
    state, metrics = jax.eval_shape(learner.update, learner.init(KEY, batch), batch)
    kinds = {str(x.dtype) for x in jax.tree.leaves((state.params, state.extra, metrics))}
    assert kinds == {"float32", "int32"}


def made(pairs=PAIRS, network=None, **options):
    return krr_st.krr_st(mlp() if network is None else network, pairs, **options)


def stepped(batch=BATCH, **options):
    learner = learner_of(**options)
    return learner.update(learner.init(KEY, BATCH), batch)


BAD = {
    "no dict": (lambda: made(3), TypeError, "pairs must be a dict with 'image' and 'target'"),
    "no target": (lambda: made({"image": PAIRS["image"]}), ValueError, "pairs has no entry"),
    "integers": (
        lambda: made({**PAIRS, "image": PAIRS["image"].astype(np.uint8)}),
        TypeError,
        r"pairs\['image'\] must be a floating-point array",
    ),
    "empty": (
        lambda: made({k: x[:0] for k, x in PAIRS.items()}),
        ValueError,
        "pairs must not be empty",
    ),
    "rows": (
        lambda: made({**PAIRS, "target": PAIRS["target"][:3]}),
        ValueError,
        r"pairs\['target'\] must have shape \(5, 4\) \(one row per image\)",
    ),
    "network": (lambda: made(network=mlp), TypeError, "network must be a kdjax.Model"),
    "target": (lambda: made(target=3), TypeError, "target must be a kdjax.Model"),
    "augment": (lambda: made(augment=lambda k, b: b), ValueError, "augment must be None without"),
    "pool": (lambda: made(pool_size=0), ValueError, "pool_size must be an integer at least 1"),
    "age": (lambda: made(max_age=0), ValueError, "max_age must be an integer at least 1"),
    "solver": (lambda: made(solver="lu"), ValueError, "solver must be one of auto, dual"),
    "reg": (lambda: made(reg=0.0), ValueError, "reg must be a finite number above 0"),
    "reg_scale": (lambda: made(reg_scale="max"), ValueError, "reg_scale must be one of"),
    "width": (
        lambda: made(network=mlp(outputs=3), max_age=3).init(KEY, BATCH),
        ValueError,
        r"the network's logits must have shape \(5, 4\) as pairs\['target'\], got \(5, 3\)",
    ),
    "features": (lambda: stepped(features="map"), ValueError, "outputs has no entry 'map'"),
    "no stored": (
        lambda: stepped({"image": BATCH["image"]}),
        ValueError,
        "batch has no entry 'target'",
    ),
    "stored": (
        lambda: stepped({**BATCH, "target": BATCH["target"][:, :2]}),
        ValueError,
        r"batch\['target'\] must have shape \(16, 4\)",
    ),
    "frozen": (
        lambda: stepped(target=mlp()),
        ValueError,
        "frozen",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()
