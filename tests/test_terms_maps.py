"""Terms of feature maps: reference numbers, layers, devices, padding, stages of training."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import kdjax as kd
from kdjax._parts import part_of
from kdjax.losses import _connected as connected_losses
from kdjax.losses import _maps as map_losses
from kdjax.methods import factor_transfer as ft
from kdjax.terms._connected import activation_boundary, factor_transfer, fitnet
from kdjax.terms._maps import attention_transfer, fsp, nst, vid

GOLDEN = Path(__file__).parent / "losses" / "golden_families"
STEP, KEY = jnp.zeros((), jnp.int32), jax.random.key(0)


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as stored:
        found = {k: stored[k].astype(np.float64) for k in stored.files}
    return {
        k: np.moveaxis(x, 1, -1) if k.startswith(("in__", "grad__")) and x.ndim == 4 else x
        for k, x in found.items()
    }


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mean(term, own, student, teacher, batch=None):
    """The term as Method reduces it."""
    batch = {} if batch is None else batch
    axis = {"axis_name": None} if term.coupled else {}
    values = term.loss(own, student, teacher, batch, step=STEP, key=KEY, **axis)
    return part_of("it", 1.0, values, term.coupled, batch, None).mean()


def compare(loss, given, teacher, value, gradients):
    """1e-9 in float64 and 1e-5 in float32; the gradients are a tree like ``given``."""
    both = jax.jit(jax.value_and_grad(loss))
    with jax.enable_x64(True):
        exact = both(given, teacher)
        assert exact[0].dtype == jnp.float64
    single = both(*jax.tree.map(np.float32, (given, teacher)))
    scale = max(np.abs(x).max() for x in jax.tree.leaves(gradients))
    for (found, gradient), tolerance in ((exact, 1e-9), (single, 1e-5)):
        np.testing.assert_allclose(found, value, rtol=tolerance)
        for g, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradients), strict=True):
            # A bias before batch normalisation has no gradient but rounding.
            size = max(np.abs(wanted).max(), 0.1 * scale)
            np.testing.assert_allclose(g, wanted, rtol=0, atol=tolerance * size)


def hwio(kernel):
    return kernel.transpose(2, 3, 1, 0)


# --- reference numbers ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fitnet", "fitnet_stride2"])
def test_fitnet_is_the_reference_code(name):
    g = golden(name)

    def tree(kind, end=""):
        return {
            "conv": {
                "kernel": hwio(g[f"{kind}__reg__conv.weight{end}"]),
                "bias": g[f"{kind}__reg__conv.bias{end}"],
            },
            "norm": {
                "scale": g[f"{kind}__reg__bn.weight{end}"],
                "bias": g[f"{kind}__reg__bn.bias{end}"],
            },
        }

    def loss(given, t):
        own, s = given
        return mean(fitnet("f", "f"), own, {"f": s}, {"f": t})

    gradients = tree("wgrad", "__repdistiller"), g["grad__f_s__repdistiller"]
    compare(loss, (tree("w"), g["in__f_s"]), g["in__f_t"], g["loss__repdistiller"], gradients)


def test_fitnet_without_relu_and_norm():
    g = golden("fitnet")

    def loss(given, t):
        kernel, s = given
        own = {"conv": {"kernel": kernel, "bias": np.zeros(16)}}
        term = fitnet("f", "f", relu=False, norm=False)
        assert not term.coupled
        return mean(term, own, {"f": s}, {"f": t})

    gradients = (
        hwio(g["wgrad__lin__transform.weight__lenscloth_rkd"]),
        g["grad__f_s__lenscloth_rkd"],
    )
    given = hwio(g["w__lin__transform.weight"]), g["in__f_s"]
    compare(loss, given, g["in__f_t"], g["loss__lenscloth_rkd"], gradients)


def test_fitnet_of_half_the_size():
    """Our reading of the transposed convolution in NumPy (no fixture is at hand)."""
    s, t = drawn(3, 2, 3, 4), drawn(3, 4, 6, 5, seed=1)
    term = fitnet("f", "f")
    own = term.init(jax.random.key(0), {"f": s}, {"f": t})
    kernel, bias = (np.asarray(own["conv"][k], np.float64) for k in ("kernel", "bias"))
    assert kernel.shape == (4, 4, 4, 5)
    full = np.zeros((3, 2 + 2 * 2, 2 + 2 * 3, 5))
    for i in range(2):
        for j in range(3):
            spread = np.einsum("bc,xycd->bxyd", s[:, i, j], kernel)
            full[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += spread
    out = full[:, 1:-1, 1:-1] + bias
    out = (out - out.mean((0, 1, 2))) / np.sqrt(out.var((0, 1, 2)) + 1e-5)
    wanted = np.mean((np.maximum(out, 0) - t) ** 2)
    np.testing.assert_allclose(mean(term, own, {"f": s}, {"f": t}), wanted, rtol=1e-5)


def test_attention_transfer_sums_stages():
    g = golden("at")

    def loss(s, t):
        term = attention_transfer(["f", "f"], ["f", "f"])
        return mean(term, {}, {"f": s}, {"f": t})

    value, gradient = g["loss__repdistiller"], g["grad__f_s__repdistiller"]
    compare(loss, g["in__f_s"], g["in__f_t"], 2 * value, 2 * gradient)
    one = attention_transfer("f", "f", squared=False)
    found = mean(one, {}, {"f": g["in__f_s"]}, {"f": g["in__f_t"]})
    np.testing.assert_allclose(found, g["loss__torchdistill_paper"], rtol=1e-5)


def test_nst_is_the_reference_code():
    g = golden("nst")

    def loss(s, t):
        return mean(nst("f", "f"), {}, {"f": s}, {"f": t})

    compare(loss, g["in__f_s"], g["in__f_t"], g["loss__repdistiller"], g["grad__f_s__repdistiller"])


def test_fsp_is_the_reference_code():
    g = golden("fsp")
    s, t = ({str(i): g[f"in__f_{side}{i}"] for i in range(3)} for side in "st")
    gradients = {str(i): g[f"grad__f_s{i}__repdistiller__sum"] for i in range(3)}
    stages = ["0", "1", "2"]
    compare(
        lambda s, t: mean(fsp(stages, stages), {}, s, t),
        s,
        t,
        g["loss__repdistiller__sum"],
        gradients,
    )


def test_vid_is_the_reference_code():
    """The trained scale of the variance gets its gradient, which mdistiller forgets."""
    g = golden("vid")

    def tree(kind, end=""):
        return {
            "0": {
                "log_scale": g[f"{kind}__vid__log_scale{end}"],
                "regressor": {
                    str(i): {"kernel": hwio(g[f"{kind}__vid__regressor.{2 * i}.weight{end}"])}
                    for i in range(3)
                },
            }
        }

    def loss(given, t):
        own, s = given
        return mean(vid("f", "f"), own, {"f": s}, {"f": t})

    gradients = tree("wgrad", "__repdistiller"), g["grad__f_s__repdistiller"]
    compare(loss, (tree("w"), g["in__f_s"]), g["in__f_t"], g["loss__repdistiller"], gradients)


def test_activation_boundary_is_the_reference_code():
    """Stage weights and 3/1000 are RepDistiller's; maps of the teacher's shape get no layer."""
    g = golden("ab")
    s, t = ({str(i): g[f"in__f_{side}{i}"] for i in range(2)} for side in "st")
    term = activation_boundary(["0", "1"], ["0", "1"])
    assert term.init(jax.random.key(0), s, t) == {}
    gradients = {str(i): g[f"grad__f_s{i}__repdistiller__sum"] for i in range(2)}
    compare(lambda s, t: mean(term, {}, s, t), s, t, g["loss__repdistiller__sum"], gradients)
    second = activation_boundary("1", "1")
    found = mean(second, {}, s, t)
    np.testing.assert_allclose(found, g["loss__repdistiller__stage1"], rtol=1e-5)


# --- layers ---------------------------------------------------------------------------------


def started(term, s, t):
    return jax.jit(term.init)(jax.random.key(3), {"f": s}, {"f": t})


@pytest.mark.parametrize(
    ("size", "kernel"),
    [((4, 4), 1), ((8, 8), 3), ((2, 2), 4), ((6, 6), 3), ((7, 7), 4)],
)
@pytest.mark.parametrize("make", [fitnet, functools.partial(activation_boundary, connect_all=True)])
def test_the_layer_follows_from_the_sizes(make, size, kernel):
    s, t = drawn(3, *size, 5), drawn(3, 4, 4, 6, seed=1)
    own = started(make("f", "f"), s, t)
    layer = own if make is fitnet else own["0"]
    assert layer["conv"]["kernel"].shape == (kernel, kernel, 5, 6)
    assert np.isfinite(mean(make("f", "f"), own, {"f": s}, {"f": t}))
    bound = ((6 if size == (2, 2) else 5) * kernel**2) ** -0.5
    assert 0.8 * bound < np.abs(layer["conv"]["kernel"]).max() <= bound


def test_features_get_a_linear_layer():
    s, t = drawn(4, 5), drawn(4, 6, seed=1)
    term = fitnet("f", "f", relu=False, norm=False)
    own = started(term, s, t)
    predicted = s @ own["conv"]["kernel"] + own["conv"]["bias"][None]
    found = mean(term, own, {"f": s}, {"f": t})
    np.testing.assert_allclose(found, np.mean((predicted - t) ** 2), rtol=1e-5)
    assert np.isfinite(mean(fitnet("f", "f"), started(fitnet("f", "f"), s, t), {"f": s}, {"f": t}))


@pytest.mark.parametrize("variance", [0.5, 5.0, 500.0])
def test_vid_starts_from_its_variance(variance):
    s, t = drawn(3, 4, 4, 5), drawn(3, 4, 4, 6, seed=1)
    term = vid("f", "f", initial_variance=variance, eps=0.1)
    own = started(term, s, t)
    scale = own["0"]["log_scale"]
    np.testing.assert_allclose(jax.nn.softplus(scale) + 0.1, variance, rtol=1e-5)
    assert scale.shape == (6,)
    kernels = [own["0"]["regressor"][str(i)]["kernel"].shape[2:] for i in range(3)]
    assert kernels == [(5, 6), (6, 6), (6, 6)]


def test_vid_learns_its_variance():
    """With a student of no use, the variance becomes that of the teacher's features."""
    t = np.array([0.5, 2.0], np.float32) * drawn(64, 2, 2, 2)
    s = np.zeros((64, 2, 2, 3), np.float32)
    term = vid("f", "f", initial_variance=1.0)
    own = started(term, s, t)
    tx = optax.adam(0.1)

    def step(carry, _):
        own, opt = carry
        grads = jax.grad(lambda own: mean(term, own, {"f": s}, {"f": t}))(own)
        moves, opt = tx.update(grads, opt)
        return (optax.apply_updates(own, moves), opt), None

    (own, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, 300))((own, tx.init(own)))
    found = jax.nn.softplus(own["0"]["log_scale"])
    np.testing.assert_allclose(found, np.mean(t**2, axis=(0, 1, 2)), rtol=1e-2)


def test_sizes_that_differ_are_averaged_down():
    s, t = drawn(3, 8, 8, 5), drawn(3, 4, 4, 5, seed=1)
    small = s.reshape(3, 4, 2, 4, 2, 5).mean((2, 4))
    for term in (vid("f", "f"), factor_transfer("f", factor="f")):
        own = started(term, s, t)
        found = mean(term, own, {"f": t}, {"f": s})
        np.testing.assert_allclose(found, mean(term, own, {"f": t}, {"f": small}), rtol=1e-5)
    own = started(vid("f", "f"), s, t)  # the student's before the regressor
    found = [mean(vid("f", "f"), own, {"f": x}, {"f": t}) for x in (s, small)]
    np.testing.assert_allclose(*found, rtol=1e-5)


# --- devices and padding --------------------------------------------------------------------


def network(*widths):
    """Two stages of maps (before and after their ReLU), features, and logits."""

    def init(key, x):
        sizes = [x.shape[-1], *widths, 5]
        return {
            str(i): jax.random.normal(jax.random.fold_in(key, i), (a, b)) / jnp.sqrt(a)
            for i, (a, b) in enumerate(itertools.pairwise(sizes))
        }

    def apply(params, x):
        one = x @ params["0"]
        half = jax.nn.relu(one)
        half = half.reshape(len(x), 2, 2, 2, 2, -1).mean((2, 4))
        two = half @ params["1"]
        pooled = jax.nn.relu(two).mean((1, 2))
        return {"one": one, "two": two, "pooled": pooled, "logits": pooled @ params["2"]}

    return kd.from_fn(init, apply)


STAGES = ["one", "two"]
STUDENT, TEACHER, ALIKE = network(4, 6), network(5, 7), network(4, 6)
TERMS = {
    "fitnet": (lambda: fitnet("two", "two"), TEACHER),
    "fitnet_half": (lambda: fitnet("one", "two"), TEACHER),
    "fitnet_transposed": (lambda: fitnet("two", "one"), TEACHER),
    "fitnet_features": (lambda: fitnet("pooled", "pooled"), TEACHER),
    "fitnet_plain": (lambda: fitnet("two", "two", norm=False), TEACHER),
    "attention_transfer": (lambda: attention_transfer(STAGES, STAGES), TEACHER),
    "nst": (lambda: nst(STAGES, STAGES), TEACHER),
    "vid": (lambda: vid(STAGES, STAGES, initial_variance=0.5), TEACHER),
    "activation_boundary": (lambda: activation_boundary(STAGES, STAGES), TEACHER),
    "factor_transfer": (lambda: factor_transfer("two"), ft.factored_teacher(TEACHER, "two")),
    "factor_transfer_norm": (
        lambda: factor_transfer("two", norm=True, p=2),
        ft.factored_teacher(TEACHER, "two"),
    ),
    "fsp": (lambda: fsp(STAGES, STAGES), ALIKE),
}
# Whole devices without a row, and others with some.
COUNTS = np.array([1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 1, 1], np.float32)


def data(rows=16):
    return {"image": drawn(rows, 4, 4, 3), "label": np.arange(rows) % 5}


def over_devices(learner):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    specs = (PartitionSpec(), PartitionSpec("data"), PartitionSpec())
    return jax.jit(
        jax.shard_map(learner.update, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    )


# Like another case in all that devices look at.
SLOW = {"fitnet_half", "fitnet_transposed", "fitnet_features", "fitnet_plain", "nst", "fsp"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in TERMS]
)
def test_a_step_on_four_devices_with_padding(name):
    """Is that of one device on the rows that count, whatever the others hold."""
    make, teacher = TERMS[name]
    batch = data()
    frozen = teacher.init(jax.random.key(5), batch["image"])
    method = kd.distill(STUDENT, teacher, {"it": (1.0, make())})
    tx = optax.sgd(0.5)
    state = kd.minimize(method, tx).init(jax.random.key(0), batch, frozen)
    kept = {k: x[COUNTS > 0] for k, x in batch.items()}
    wanted, metrics = jax.jit(kd.minimize(method, tx).update)(state, kept, frozen)
    padded = {**batch, "weight": COUNTS}
    padded["image"] = np.where(COUNTS[:, None, None, None] > 0, batch["image"], np.nan)
    learner = kd.minimize(method, tx, axis_name="data")
    found, found_metrics = over_devices(learner)(state, padded, frozen)
    np.testing.assert_allclose(found_metrics["loss"], metrics["loss"], rtol=2e-5)
    moved = False
    for a, b, start in zip(
        *map(jax.tree.leaves, (found.params, wanted.params, state.params)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
        moved |= bool(np.abs(b - start).max() > 1e-3)
    assert moved
    if "terms" in state.params:
        own = zip(*(jax.tree.leaves(x.params["terms"]) for x in (wanted, state)), strict=True)
        assert any(np.abs(a - b).max() > 1e-4 for a, b in own)


@pytest.mark.parametrize(
    "name",
    [
        "fitnet",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("activation_boundary", "factor_transfer_norm")
        ),
    ],
)
def test_the_scope_of_statistics(name):
    """By name each device's own: the mean, by rows, of the values of the devices."""
    make = {
        "fitnet": lambda **o: fitnet("two", "two", **o),
        "activation_boundary": lambda **o: activation_boundary("two", "two", **o),
        "factor_transfer_norm": lambda **o: factor_transfer("two", factor="two", norm=True, **o),
    }[name]
    batch = {**data(), "weight": COUNTS}
    frozen = TEACHER.init(jax.random.key(5), batch["image"])
    values = {}
    for scope in ("global", "device"):
        method = kd.distill(STUDENT, TEACHER, {"it": (1.0, make(scope=scope))})
        state = kd.minimize(method, optax.sgd(0.1)).init(jax.random.key(0), batch, frozen)
        learner = kd.minimize(method, optax.sgd(0.1), axis_name="data")
        values[scope] = float(over_devices(learner)(state, batch, frozen)[1]["loss"])
        single = jax.jit(kd.minimize(method, optax.sgd(0.1)).update)
        values[scope, "one"] = float(single(state, batch, frozen)[1]["loss"])
        each = [
            single(state, {k: x[4 * i : 4 * i + 4] for k, x in batch.items()}, frozen)[1]["loss"]
            for i in range(4)
        ]
    counts = COUNTS.reshape(4, 4).sum(1)
    np.testing.assert_allclose(values["device"], np.average(each, weights=counts), rtol=2e-5)
    for one in (values["global", "one"], values["device", "one"]):
        np.testing.assert_allclose(values["global"], one, rtol=2e-5)
    assert abs(values["device"] / values["global"] - 1) > 1e-3


def test_weights_of_the_examples():
    """Per-example Terms are weighted means; coupled ones count rows, as they say."""
    batch = data(4)
    weight = np.array([2.0, 0.5, 0.0, 1.0], np.float32)
    s, t = (network(4, 6).apply(*network(4, 6).init(jax.random.key(i), batch["image"]),
            batch["image"])[0] for i in range(2))  # fmt: skip
    values = map_losses.attention_transfer(s["two"], t["two"])
    found = mean(attention_transfer("two", "two"), {}, s, t, {"weight": weight})
    np.testing.assert_allclose(found, np.average(values, weights=weight), rtol=1e-5)
    values = 3 / 1000 * connected_losses.activation_boundary(s["two"], t["two"])
    found = mean(activation_boundary("two", "two"), {}, s, t, {"weight": weight})
    np.testing.assert_allclose(found, values[weight > 0].mean(), rtol=1e-5)


def test_schedules_and_tracers():
    x, y = drawn(3, 4, 4, 2), drawn(3, 4, 4, 2, seed=1)

    def found(term, step):
        axis = {"axis_name": None} if term.coupled else {}
        own = term.init(jax.random.key(0), {"f": x}, {"f": y})
        value = term.loss(own, {"f": x}, {"f": y}, {}, step=step, key=KEY, **axis)
        return np.mean(value)

    def line(step):
        return 2.0 + step

    for make, name in (
        (attention_transfer, "power"),
        (activation_boundary, "margin"),
        (vid, "eps"),
    ):
        scheduled = found(make("f", "f", **{name: line}), jnp.int32(1))
        if make is vid:  # starts from eps at step 0
            own = vid("f", "f", eps=2.0).init(jax.random.key(0), {"f": x}, {"f": y})
            constant = mean(vid("f", "f", eps=3.0), own, {"f": x}, {"f": y})
        else:
            constant = found(make("f", "f", **{name: 3.0}), STEP)
        np.testing.assert_allclose(scheduled, constant, rtol=1e-6)
        traced = jax.jit(
            lambda value, make=make, name=name: mean(
                make("f", "f", **{name: value}),
                make("f", "f").init(jax.random.key(0), {"f": x}, {"f": y}),
                {"f": x}, {"f": y},
            )
        )  # fmt: skip
        assert traced(2.0) != traced(3.0)
        assert traced._cache_size() == 1


# --- stages of training ---------------------------------------------------------------------


def trained(method, steps, rate, frozen, batch):
    learner = kd.minimize(method, optax.adam(rate))
    update = jax.jit(learner.update)
    state = learner.init(jax.random.key(0), batch, frozen)
    history = []
    for _ in range(steps):
        state, metrics = update(state, batch, frozen)
        history.append(float(metrics["loss"]))
    return state, history


def test_factor_transfer_from_paraphraser_to_student():
    batch = data(16)
    frozen = TEACHER.init(jax.random.key(5), batch["image"])
    state, history = trained(ft.paraphraser(TEACHER, "two"), 60, 1e-2, frozen, batch)
    assert history[-1] < 0.5 * history[0]
    factored = ft.factored_teacher(TEACHER, "two")
    variables = ft.factored_variables(frozen, state.params["student"])
    outputs, _ = factored.apply(*variables, batch["image"])
    plain, _ = TEACHER.apply(*frozen, batch["image"])
    assert outputs["factor"].shape == (16, 2, 2, 3)
    np.testing.assert_array_equal(outputs["logits"], plain["logits"])
    # A decoder behind this factor gives the teacher's features: the loss that was trained.
    decoder = state.params["student"]["decoder"]
    rebuilt = np.asarray(ft._decode(decoder, outputs["factor"], 0.1))
    loss = np.mean((rebuilt - plain["two"]) ** 2)
    assert loss < history[-1]
    assert loss > 0.5 * history[-1]
    term = {"ft": (200.0, factor_transfer("two"))}
    _, student = trained(kd.distill(STUDENT, factored, term), 60, 1e-2, variables, batch)
    assert student[-1] < 0.5 * student[0]


@pytest.mark.parametrize(
    ("term", "teacher"),
    [(lambda: activation_boundary(STAGES, STAGES), TEACHER), (lambda: fsp(STAGES, STAGES), ALIKE)],
    ids=["activation_boundary", "fsp"],
)
def test_a_stage_before_training(term, teacher):
    """The docstrings' two calls: the second goes on from the first's student."""
    batch = data(16)
    frozen = teacher.init(jax.random.key(5), batch["image"])
    method = kd.distill(STUDENT, teacher, {"it": (1.0, term())})
    state, history = trained(method, 40, 1e-2, frozen, batch)
    assert history[-1] < 0.9 * history[0]
    begun = kd.started(STUDENT, (state.params["student"], state.extra["student"]))
    second = kd.distill(begun, teacher, {"hard": (1.0, kd.terms.hard_labels())})
    fresh = kd.minimize(second, optax.sgd(0.1)).init(jax.random.key(1), batch, frozen)
    for a, b in zip(
        *map(jax.tree.leaves, (fresh.params["student"], state.params["student"])), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_paraphraser_of_rows_that_count():
    batch = data(16)
    frozen = TEACHER.init(jax.random.key(5), batch["image"])
    method = ft.paraphraser(TEACHER, "two", rate=0.3)
    tx = optax.sgd(0.5)
    state = kd.minimize(method, tx).init(jax.random.key(0), batch, frozen)
    assert state.params["student"]["encoder"]["2"]["conv"]["kernel"].shape == (3, 3, 2, 2)
    kept = {k: x[COUNTS > 0] for k, x in batch.items()}
    wanted, metrics = jax.jit(kd.minimize(method, tx).update)(state, kept, frozen)
    assert sorted(metrics) == ["loss", "loss/reconstruction"]
    padded = {**batch, "weight": COUNTS}
    padded["image"] = np.where(COUNTS[:, None, None, None] > 0, batch["image"], np.nan)
    found, _ = over_devices(kd.minimize(method, tx, axis_name="data"))(state, padded, frozen)
    for a, b in zip(*map(jax.tree.leaves, (found.params, wanted.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_teachers_of_other_kinds():
    """Stored features, an ensemble, and augmentation that changes sizes."""
    batch = {**data(4), "stored": drawn(4, 2, 2, 6)}
    stored = kd.from_batch(two="stored")
    state, _ = trained(ft.paraphraser(stored, "two"), 1, 1e-2, None, batch)
    factored = ft.factored_teacher(stored, "two")
    variables = ft.factored_variables(None, state.params["student"])
    method = kd.distill(STUDENT, factored, {"ft": (1.0, factor_transfer("two"))})
    assert np.isfinite(trained(method, 1, 1e-2, variables, batch)[1][0])

    both = kd.ensemble([TEACHER, TEACHER])
    each = [TEACHER.init(jax.random.key(i), batch["image"]) for i in range(2)]
    frozen = [each[0], {"params": each[1][0]}]
    state, _ = trained(ft.paraphraser(both, "1/two"), 1, 1e-2, frozen, batch)
    factored = ft.factored_teacher(both, "1/two")
    variables = ft.factored_variables(frozen, state.params["student"])
    method = kd.distill(STUDENT, factored, {"ft": (1.0, factor_transfer("two"))})
    assert np.isfinite(trained(method, 1, 1e-2, variables, batch)[1][0])

    def crop(key, batch):
        return {**batch, "image": batch["image"][:, 2:6, 2:6]}

    large = {"image": drawn(4, 8, 8, 3)}
    method = ft.paraphraser(TEACHER, "two", augment=crop)
    assert np.isfinite(trained(method, 1, 1e-2, each[0], large)[1][0])


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attention_transfer("a", "a", power=0.0), r"^power must be a finite number above"),
        (
            lambda: attention_transfer(["a"], ["a", "b"]),
            r"^teacher_taps must name as many .* got 2",
        ),
        (lambda: nst([], []), r"^student_taps must name at least one output, got none"),
        (lambda: fsp(["a"], ["a"]), r"^student_taps must name at least two stages"),
        (lambda: vid("a", "a", eps=0.0), r"^eps must be a finite number above 0"),
        (lambda: vid("a", "a", initial_variance=1e-6), r"^initial_variance must be .* above 1e-05"),
        (lambda: activation_boundary("a", "a", margin=-1.0), r"^margin must be a finite number at"),
        (lambda: activation_boundary("a", "a", scope="x"), r"^scope must be one of device, global"),
        (lambda: fitnet("a", "a", scope="x"), r"^scope must be one of device, global; got 'x'"),
        (lambda: factor_transfer("a", scope="x"), r"^scope must be one of device, global"),
        (lambda: factor_transfer("a", p=3), r"^p must be 1 or 2, got int 3"),
        (lambda: ft.paraphraser(TEACHER, "two", rate=0.0), r"^rate must be a finite number above"),
        (lambda: ft.factored_teacher(TEACHER, "two", rate=-1), r"^rate must be a finite number"),
        (lambda: ft.factored_variables(({}, {}), {}), r"^paraphraser has no entry 'encoder'"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_other_kinds():
    for make in (attention_transfer, nst, fsp, vid, activation_boundary):
        with pytest.raises(TypeError, match=r"^student_taps must be the name of an output, or one"):
            make([1], ["a"])
        with pytest.raises(TypeError, match=r"^teacher_taps must be the name of an output, or one"):
            make("a", None)
    with pytest.raises(TypeError, match=r"^teacher must be a kdjax.Model"):
        ft.paraphraser(None, "two")
    with pytest.raises(TypeError, match=r"^augment must be a function"):
        ft.paraphraser(TEACHER, "two", augment=3)


def test_outputs_that_do_not_fit():
    x, flat = {"f": drawn(3, 4, 4, 5)}, {"f": drawn(3, 5)}
    for term in (attention_transfer("f", "f"), nst("f", "f"), fsp(["f", "f"], ["f", "f"])):
        with pytest.raises(ValueError, match=r"^the student's output 'f' must be feature maps"):
            mean(term, {}, flat, x)
        with pytest.raises(ValueError, match=r"^the teacher's output 'f' must be feature maps"):
            mean(term, {}, x, flat)
    for term in (vid("f", "f"), activation_boundary("f", "f"), factor_transfer("f", factor="f")):
        with pytest.raises(ValueError, match=r"^the teacher's output 'f' must be feature maps"):
            started(term, x["f"], flat["f"])
        with pytest.raises(ValueError, match=r"^the student's outputs has no entry 'f'"):
            term.init(KEY, {}, x)
    with pytest.raises(ValueError, match=r"^the teacher's output 'f' must have 2 dimensions"):
        started(fitnet("f", "f"), flat["f"], x["f"])
    with pytest.raises(ValueError, match=r"^the teacher's output 'f' must be feature maps"):
        started(fitnet("f", "f"), x["f"], flat["f"])
    for size in ((3, 3), (4, 6), (8, 4), (5, 4)):
        with pytest.raises(ValueError, match=r"^the student's maps must be as large as the teach"):
            started(fitnet("f", "f"), drawn(3, *size, 2), x["f"])
    with pytest.raises(ValueError, match=r"^teacher_first must have shape \(3, 4, 4, 5\)"):
        mean(fsp(["f", "f"], ["f", "f"]), {}, x, {"f": x["f"][..., :4]})


def test_a_factor_is_there_already():
    twice = ft.factored_teacher(ft.factored_teacher(TEACHER, "two"), "two")
    with pytest.raises(ValueError, match=r'^teacher must have no output "factor" of its own'):
        twice.init(jax.random.key(0), drawn(2, 4, 4, 3))
