"""The projector Term: published values, its layers, masks, devices, and how it answers mistakes."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kdjax as kd
from kdjax import losses, terms

GOLDEN = np.load(Path(__file__).parent / "losses" / "golden_projector.npz")
KEY = jax.random.key(0)
STEP = jnp.zeros((), jnp.int32)


def case(name):
    return {k.split("/")[1]: GOLDEN[k] for k in GOLDEN.files if k.startswith(f"{name}/")}


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def numpy(tree):
    return jax.tree.map(np.asarray, tree)


def value_of(term, tparams, s, t, *, batch=None, step=STEP, **axis):
    """The Term's value; what is compared are the outputs "s" and "t"."""
    return term.loss(tparams, {"s": s}, {"t": t}, batch or {}, step=step, key=KEY, **axis)


def make(**options):
    return terms.projector("s", "t", **{"log_eps": 0.0, **options})


def start(term, s, t):
    return term.init(KEY, {"s": jnp.zeros_like(s)}, {"t": jnp.zeros_like(t)})


def linear(c, dtype=np.float64):
    return {"0": {"kernel": c["kernel"].astype(dtype), "bias": c["bias"].astype(dtype)}}


def assert_gradient(found, wanted, share):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=share * np.abs(wanted).max())


# --- published values -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", ["gauss", "offset", "alpha_1"])
def test_published_values(name, dtype):
    """Centred features keep their digits in the product: float32 is at its best here."""
    c = case(name)
    term = make(alpha=float(c["alpha"]))
    loss = jax.jit(jax.value_and_grad(functools.partial(value_of, term), (0, 1, 2)))
    with jax.enable_x64(dtype is np.float64):
        s, t = (c[k].astype(dtype) for k in ("z_s", "z_t"))
        value, (of_params, of_s, of_t) = numpy(loss(linear(c, dtype), s, t))
    exact = dtype is np.float64
    np.testing.assert_allclose(value, c["loss"], rtol=1e-12 if exact else 2e-6)
    share = 1e-11 if exact else 3e-5
    assert_gradient(of_params["0"]["kernel"], c["grad_kernel"], share)
    if "grad_z_s" in c:
        assert_gradient(of_s, c["grad_z_s"], share)
    assert not of_params["0"]["bias"].any()
    assert not of_t.any()


def test_published_correlations_of_tokens_and_maps():
    """With class and distillation tokens in front, which the pool leaves out."""
    c = case("deit")
    special = np.full((8, 2, 12), 1e3)
    term = make(
        loss="correlation_log_sum",
        log_eps=1e-5,
        eps=0.0,
        student_pool=functools.partial(losses.pool, skip_tokens=2),
    )
    loss = jax.jit(jax.value_and_grad(functools.partial(value_of, term), (0, 1)))
    with jax.enable_x64(True):
        tokens = np.concatenate([special, c["tokens_s"]], axis=1)
        value, (of_params, of_s) = numpy(loss(linear(c), tokens, c["map_t_nhwc"].astype(float)))
    np.testing.assert_allclose(value, c["loss"], rtol=1e-12)
    assert_gradient(of_params["0"]["kernel"], c["grad_kernel"], 1e-11)
    assert not of_s[:, :2].any()
    assert_gradient(of_s[:, 2:].sum(1), c["grad_z_s"], 1e-11)


@pytest.mark.parametrize("loss", ["log_sum", "mse"])
@pytest.mark.parametrize("norm", ["none", "l2", "group", "batch"])
def test_normalisations(norm, loss):
    c = case("norms")
    term = make(norm=norm, loss=loss, eps=1e-4 if norm == "batch" else 0.0)
    assert term.coupled == (norm == "batch" or loss == "log_sum")

    @jax.jit
    @jax.value_and_grad
    def mean(tparams, s, t):
        value = value_of(term, tparams, s, t)
        assert value.shape == (() if term.coupled else (16,))
        return value.mean()

    with jax.enable_x64(True):
        s, t = (c[k].astype(float) for k in ("z_s", "z_t"))
        value, gradient = numpy(mean(linear(c), s, t))
    name = f"{norm}_{loss.replace('_', '')}"
    np.testing.assert_allclose(value, c[f"{name}_loss"], rtol=1e-12)
    assert_gradient(gradient["0"]["kernel"], c[f"{name}_grad_kernel"], 1e-11)


# --- the projector --------------------------------------------------------------------------


def test_default_layers_start_as_in_torch():
    """Kernels and biases uniform in +-1/sqrt(fan_in); singular values as in the paper's figure."""
    s, t = np.zeros((2, 512)), np.zeros((2, 2048))
    layer = numpy(start(make(), s, t))["0"]
    bound = 512**-0.5
    for x in layer.values():
        assert np.abs(x).max() <= bound
        np.testing.assert_allclose(x.std(), bound / math.sqrt(3), rtol=0.03)
        assert x.dtype == np.float32
    assert layer["kernel"].shape == (512, 2048)
    kernel = layer["kernel"].astype(float)
    logs = np.log(np.linalg.eigvalsh(kernel @ kernel.T)) / 2
    assert 0.5 < np.abs(logs).max() < 0.56


def test_layers():
    s, t = draw(6, 5), draw(6, 7, seed=1)
    assert start(make(projector=None), s, draw(6, 5)) == {}
    assert set(start(make(bias=False), s, t)["0"]) == {"kernel"}
    zeros = start(make(kernel_init=jax.nn.initializers.ones), s, t)["0"]
    assert np.all(zeros["kernel"] == 1)
    assert not np.any(zeros["bias"])
    shapes = jax.tree.map(jnp.shape, start(make(hidden=(11, 3)), s, t))
    assert [shapes[i]["kernel"] for i in "012"] == [(5, 11), (11, 3), (3, 7)]
    hidden = start(make(hidden=(5,)), s, draw(6, 5))
    assert np.any(hidden["0"]["kernel"] != hidden["1"]["kernel"]), "layers have keys of their own"


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_hidden_layers(norm, bias):
    s, t = draw(6, 5), draw(6, 7, seed=1)
    term = make(hidden=(9,), norm=norm, bias=bias)
    tparams = start(term, s, t)
    one, two = numpy([tparams["0"], tparams["1"]])
    inner = np.maximum(s @ one["kernel"] + one.get("bias", 0), 0)
    sides = [inner @ two["kernel"] + two.get("bias", 0), t]
    if norm == "batch":
        sides = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-4) for x in sides]
    wanted = np.log(((sides[0] - sides[1]) ** 4).sum())
    np.testing.assert_allclose(value_of(term, tparams, s, t), wanted, rtol=1e-5)


def test_a_model_as_projector():
    """Any Model of one output; its parameters are the Term's."""
    s, t = draw(6, 5), draw(6, 7, seed=1)
    model = kd.from_fn(
        lambda key, x: {"w": jax.random.normal(key, (x.shape[-1], 7))},
        lambda params, x: jnp.tanh(x @ params["w"]),
    )
    term = make(projector=model)
    tparams = start(term, s, t)
    wanted = losses.log_sum(losses.standardize(jnp.tanh(s @ tparams["w"])), losses.standardize(t))
    found, gradient = jax.value_and_grad(functools.partial(value_of, term))(tparams, s, t)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert np.any(gradient["w"])


def test_without_a_projector():
    s, t = draw(6, 5), draw(6, 5, seed=1)
    found = value_of(make(projector=None, norm="l2", loss="mse"), {}, s, t)
    s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))
    np.testing.assert_allclose(found, ((s - t) ** 2).mean(1), rtol=1e-5)


@pytest.mark.parametrize("power", [2.0, 4.0])
def test_distances_of_the_ablation(power):
    s, t = draw(6, 5), draw(6, 5, seed=1)
    found = value_of(make(projector=None, loss="correlation", alpha=power, eps=0.0), {}, s, t)
    rho = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)])
    np.testing.assert_allclose(found, (np.abs(rho - 1) ** power).sum() ** (1 / power), rtol=1e-5)


def test_channels_and_rows_of_the_projector_may_be_reordered():
    c = case("gauss")
    term = make()
    loss = jax.jit(functools.partial(value_of, term))
    order = np.random.default_rng(0).permutation(32)
    moved = {"0": {"kernel": c["kernel"][:, order], "bias": c["bias"][order]}}
    wanted = loss(linear(c, np.float32), c["z_s"], c["z_t"])
    np.testing.assert_allclose(loss(moved, c["z_s"], c["z_t"][:, order]), wanted, rtol=1e-6)


def test_half_precision_features():
    """bfloat16 features, float32 projector and loss."""
    c = case("gauss")
    loss = jax.jit(functools.partial(value_of, make()))
    wanted = loss(linear(c, np.float32), c["z_s"], c["z_t"])
    half = [jnp.asarray(c[k], jnp.bfloat16) for k in ("z_s", "z_t")]
    found = loss(linear(c, np.float32), *half)
    assert found.dtype == jnp.float32
    assert abs(found - wanted) < 0.01


def test_the_default_floor_keeps_a_perfect_match_finite():
    x = draw(6, 5)
    assert value_of(make(projector=None, norm="none"), {}, x, x) == -np.inf
    found = value_of(terms.projector("s", "t", projector=None, norm="none"), {}, x, x)
    np.testing.assert_allclose(found, np.log(1e-12), rtol=1e-5)


def test_hyperparameters_may_be_schedules():
    s, t = draw(6, 5), draw(6, 5, seed=1)

    def schedule(first):
        return lambda step: first + step

    term = make(projector=None, alpha=schedule(1.0), eps=schedule(0.1), log_eps=schedule(5.0))
    traces = []

    @jax.jit
    def loss(step):
        traces.append(1)
        return value_of(term, {}, s, t, step=step)

    for step in (0, 2):
        wanted = losses.log_sum(
            *(losses.standardize(x, eps=0.1 + step) for x in (s, t)),
            alpha=1.0 + step,
            log_eps=5.0 + step,
        )
        np.testing.assert_allclose(loss(jnp.int32(step)), wanted, rtol=1e-5)
    assert len(traces) == 1


# --- masks ----------------------------------------------------------------------------------

VARIANTS = {
    "linear": {},
    "mlp": {"hidden": (6,)},
    "correlation_log_sum": {"loss": "correlation_log_sum", "eps": 0.0, "log_eps": 1e-5},
    "mse": {"loss": "mse"},
    "group": {"norm": "group", "groups": 2},
    "none": {"norm": "none", "loss": "correlation", "alpha": 2.0},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_of_weight_0_are_deleted_rows(name):
    """In value and gradients, whatever they hold."""
    term = make(**VARIANTS[name])
    s, t = draw(12, 5), draw(12, 8, seed=1)
    tparams = start(term, s, t)
    weight = np.where(np.arange(12) % 3 == 1, 0, 0.5).astype(np.float32)
    kept = weight > 0
    assert term.coupled
    loss = jax.jit(jax.value_and_grad(functools.partial(value_of, term), (0, 1)))
    wanted, (of_params, of_s) = loss(tparams, s[kept], t[kept])
    hidden = [np.where(kept[:, None], x, np.nan) for x in (s, t)]
    value, (found, of_hidden) = loss(tparams, *hidden, batch={"weight": weight})
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(of_params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(of_hidden[kept], of_s, rtol=1e-3, atol=1e-5)
    assert not np.any(of_hidden[~kept])
    counted, _ = loss(tparams, s, t, batch={"weight": np.ones(12, np.float32)})
    assert abs(counted - wanted) > 1e-3


def test_a_batch_of_padding_has_no_loss():
    term = terms.projector("s", "t")
    s, t = draw(4, 5), draw(4, 5, seed=1)
    loss = jax.jit(jax.value_and_grad(functools.partial(value_of, term)))
    value, gradient = loss(start(term, s, t), s, t, batch={"weight": np.zeros(4, np.float32)})
    assert value == 0
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


# --- devices --------------------------------------------------------------------------------

DP = case("dp")
# Whole devices without a row, and others with some.
UNEVEN = (np.arange(32) < 18).astype(np.float32)
ROUTES = ("jit", "shard_map", "shard_map_unchecked", "pmap")
QUICK = {("shard_map", 1), ("pmap", 2), ("jit", 8), ("shard_map", 8)}
DATA, WHOLE = PartitionSpec("data"), PartitionSpec()


def over_devices(route, n, loss):
    """``(value, gradient of the projector, gradient of the inputs)`` of ``loss`` on n devices.

    ``loss(tparams, s, t, weight, axis_name=...)``. Under pmap and without check_vma, every device
    differentiates the sum of all devices' losses, which are one and the same: n times too much.
    """
    mesh = jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    both = jax.value_and_grad(loss, (0, 1))
    if route == "jit":
        rows, whole = (NamedSharding(mesh, spec) for spec in (DATA, WHOLE))

        def run(tparams, *arrays):
            return jax.jit(both)(jax.device_put(tparams, whole), *jax.device_put(arrays, rows))

        return lambda *args: flat(run(*args))

    def update(*args):
        value, (of_params, of_s) = jax.value_and_grad(
            functools.partial(loss, axis_name="data"), (0, 1)
        )(*args)
        if route != "shard_map":
            of_params, of_s = jax.lax.pmean(of_params, "data"), of_s / n
        return value, (of_params, of_s)

    if route == "pmap":

        def run(tparams, *arrays):
            shards = [x.reshape(n, -1, *x.shape[1:]) for x in arrays]
            mapped = jax.pmap(update, "data", in_axes=(None, 0, 0, 0), devices=jax.devices()[:n])
            value, (of_params, of_s) = numpy(mapped(tparams, *shards))
            assert np.ptp(value) == 0
            return value[0], (jax.tree.map(lambda x: x[0], of_params), of_s.reshape(32, -1))

        return lambda *args: flat(run(*args))
    mapped = jax.shard_map(
        update,
        mesh=mesh,
        in_specs=(WHOLE, DATA, DATA, DATA),
        out_specs=(WHOLE, (WHOLE, DATA)),
        check_vma=route == "shard_map",
    )
    return lambda *args: flat(jax.jit(mapped)(*args))


def flat(found):
    value, (of_params, of_s) = numpy(found)
    return value, of_params, of_s


def weighted(term):
    def loss(tparams, s, t, weight, **axis):
        return value_of(term, tparams, s, t, batch={"weight": weight}, **axis)

    return loss


@pytest.mark.parametrize(
    ("route", "n"),
    [
        (r, n) if n == 4 or (r, n) in QUICK else pytest.param(r, n, marks=pytest.mark.slow)
        for r in ROUTES
        for n in (1, 2, 4, 8)
    ],
)
def test_any_number_of_devices_is_one_device(route, n):
    """Statistics and the sum inside the logarithm are those of the whole batch."""
    with jax.enable_x64(True):
        s, t = (DP[k].astype(float) for k in ("z_s", "z_t"))
        found = over_devices(route, n, weighted(make()))(linear(DP), s, t, np.ones(32))
    value, of_params, of_s = found
    np.testing.assert_allclose(value, DP["global_loss"], rtol=1e-12)
    assert_gradient(of_params["0"]["kernel"], DP["global_grad_kernel"], 1e-11)
    assert_gradient(of_s, DP["global_grad_z_s"], 1e-11)
    assert not of_params["0"]["bias"].any()


def test_unsynchronised_shards_would_be_seen():
    """What data-parallel code without these sums computes is off by half of the gradient."""
    loss = jax.jit(jax.value_and_grad(functools.partial(value_of, make())))
    with jax.enable_x64(True):
        shards = [DP[k].astype(float).reshape(4, 8, -1) for k in ("z_s", "z_t")]
        found = [numpy(loss(linear(DP), s, t)) for s, t in zip(*shards, strict=True)]
    values = [value for value, _ in found]
    kernel = np.mean([gradient["0"]["kernel"] for _, gradient in found], 0)
    np.testing.assert_allclose(values, DP["local_losses"], rtol=1e-12)
    assert_gradient(kernel, DP["local_grad_kernel"], 1e-11)
    wanted = DP["global_grad_kernel"]
    assert np.abs(kernel - wanted).max() > 0.5 * np.abs(wanted).max()
    assert abs(np.mean(values) - DP["global_loss"]) > 1


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "name",
    [
        name if name == "mlp" else pytest.param(name, marks=pytest.mark.slow)
        for name in ("linear", "mlp", "correlation_log_sum", "mse", "none")
    ],
)
def test_uneven_rows_on_devices(name, route):
    term = make(**VARIANTS[name])
    s, t = draw(32, 5), draw(32, 8, seed=1)
    tparams = start(term, s, t)
    wanted = flat(jax.jit(jax.value_and_grad(weighted(term), (0, 1)))(tparams, s, t, UNEVEN))
    found = over_devices(route, 4, weighted(term))(tparams, s, t, UNEVEN)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * max(1, np.abs(b).max()))


# --- in training ----------------------------------------------------------------------------


def features(width):
    """A student of one layer, whose output of that width is the feature."""

    def apply(params, extra, x, *, train=False, key=None):
        return {"logits": x, "feat": jnp.tanh(x @ params["w"])}, extra

    def init(key, x):
        return {"w": jax.random.normal(key, (x.shape[-1], width))}, {}

    return kd.Model(init, apply, "x")


def test_the_projector_is_trained():
    """By the student's optimizer; a frozen projector was a published mistake."""
    method = kd.distill(features(4), features(6), {"it": (2.0, terms.projector("feat", "feat"))})
    learner = kd.minimize(method, optax.sgd(0.01))
    batch = {"x": draw(16, 5)}
    frozen = features(6).init(jax.random.key(1), batch["x"])
    state = learner.init(KEY, batch, frozen)
    update = jax.jit(learner.update)
    first, metrics = update(state, batch, frozen)
    before, after = (x.params["terms"]["it"]["0"]["kernel"] for x in (state, first))
    assert np.all(np.linalg.norm(after - before, axis=0) > 1e-4)
    assert np.any(first.params["student"]["w"] != state.params["student"]["w"])
    for _ in range(30):
        first, later = update(first, batch, frozen)
    assert later["loss/it"] < metrics["loss/it"] - 1


def test_losses_per_example_can_be_split():
    term = terms.projector("feat", "feat", norm="l2", loss="mse")
    method = kd.distill(features(4), features(6), {"it": (1.0, term)})
    batch = {"x": draw(16, 5)}
    frozen = features(6).init(jax.random.key(1), batch["x"])
    found = []
    for slices in (1, 4):
        learner = kd.minimize(method, optax.sgd(0.1), microbatches=slices)
        state = learner.init(KEY, batch, frozen)
        found.append(numpy(jax.jit(learner.update)(state, batch, frozen)[0].params))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"norm": "layer"}, ValueError, "^norm must be one of batch, group, l2, none; got 'layer'"),
        ({"loss": "kl"}, ValueError, "^loss must be one of correlation, correlation_log_sum, log"),
        ({"projector": "mlp"}, ValueError, '^projector must be "linear" .* got str .mlp'),
        ({"projector": "none"}, ValueError, '^projector must be "linear"'),
        ({"projector": len}, TypeError, "a Model such as kdjax.from_linen"),
        ({"hidden": "wide"}, TypeError, "^hidden must be an integer"),
        ({"groups": -5}, ValueError, "^groups must be an integer at least 1"),
        ({"kernel_init": "zeros"}, TypeError, "^kernel_init must be a function"),
        ({"projector": None, "bias": False}, ValueError, "^bias and kernel_init must be left out"),
        ({"projector": None, "hidden": (3,)}, ValueError, "^hidden must be empty without"),
        ({"hidden": (0,)}, ValueError, "^hidden must be an integer at least 1"),
        ({"alpha": 0.0}, ValueError, "^alpha must be a finite number above 0"),
        ({"alpha": math.inf}, ValueError, "^alpha must be"),
        ({"alpha": "4"}, TypeError, "^alpha must be"),
        ({"eps": -1.0}, ValueError, "^eps must be a finite number at least 0"),
        ({"log_eps": -1.0}, ValueError, "^log_eps must be a finite number at least 0"),
    ],
)
def test_bad_options(options, error, sentence):
    with pytest.raises(error, match=sentence):
        make(**options)


S, T = np.ones((4, 3), np.float32), np.ones((4, 5), np.float32)


@pytest.mark.parametrize(
    ("options", "s", "t", "error", "sentence"),
    [
        ({"projector": None}, S, T, ValueError, r"^student_tap must .* \(4, 3\) and \(4, 5\)"),
        ({}, S[0], T, ValueError, "^features must have at least 2 dimensions"),
        ({}, S[None, None, None], T, ValueError, r"^features must be \[B, D\], tokens"),
        ({"student_pool": lambda x: x.mean()}, S, T, ValueError, r"^student_pool must return \[B"),
        ({"teacher_pool": lambda x: x[None]}, S, T, ValueError, r"^teacher_pool must return \[B"),
        ({}, S.astype(int), T, TypeError, "must be a floating-point array"),
        (
            {"projector": kd.from_fn(lambda key, x: {}, lambda params, x: x)},
            S, T, ValueError, r"^projector must return \(.*\) like the teacher",
        ),
    ],
)  # fmt: skip
def test_features_that_do_not_fit(options, s, t, error, sentence):
    with pytest.raises(error, match=sentence):
        start(make(**options), s, t)


@pytest.mark.parametrize(
    ("options", "s", "t", "sentence"),
    [
        ({}, S, T[:3], r"\(3, 5\).*\(4, 5\)|\(4, 5\).*\(3, 5\)"),
        ({}, S[:1], T[:1], "at least 2 samples"),
        ({"norm": "none", "loss": "correlation"}, S[:1], T[:1], "at least 2 samples"),
        ({"norm": "group", "groups": 2}, S, T, "^groups must divide the 5 channels"),
    ],
)
def test_batches_that_do_not_fit(options, s, t, sentence):
    term = make(**options)
    tparams = {"0": {"kernel": np.ones((3, 5), np.float32), "bias": np.zeros(5, np.float32)}}
    with pytest.raises(ValueError, match=sentence):
        jax.jit(functools.partial(value_of, term))(tparams, s, t)


def test_a_kernel_of_another_width():
    tparams = {"0": {"kernel": np.ones((4, 5), np.float32), "bias": np.zeros(5, np.float32)}}
    with pytest.raises(ValueError, match=r"^student_tap must .* \(4, 5\), got \(4, 3\)"):
        value_of(make(), tparams, S, T)
