"""Terms of stages, channels, heads and tokens: fixtures, formulas, devices, padding, bad input."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kdjax as kd
from kdjax.losses import _features, _overhaul
from kdjax.models import ViT
from kdjax.terms import _channels, _heads, _review, _stages, _vision_tokens

FOLDER = Path(__file__).parent / "losses" / "golden_families"
DTYPES = {"float64": (np.float64, 1e-9), "float32": (np.float32, 1e-5)}
STEP, KEY = jnp.zeros((), jnp.int32), jax.random.key(0)


def golden(name, kind):
    """NCHW as NHWC, kernels (out, in, h, w) as (h, w, in, out)."""

    def one(name, x):
        if x.ndim == 4 and not name.startswith(("w__", "wgrad__")):
            return np.moveaxis(x, 1, 3)
        return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x

    found = np.load(FOLDER / f"{name}.npz")
    made = {name: one(name, x) for name, x in found.items()}
    return {k: x.astype(kind) if k.startswith(("in__", "w__")) else x for k, x in made.items()}


def conv_norm(g, path, kind="w"):
    """Parameters, or with another prefix and suffix their gradients, of conv and batch norm."""
    (conv, norm), (prefix, suffix) = path, (kind if isinstance(kind, tuple) else (kind, ""))
    return {
        "conv": {"kernel": g[f"{prefix}__{conv}.weight{suffix}"]},
        "norm": {
            "scale": g[f"{prefix}__{norm}.weight{suffix}"],
            "bias": g[f"{prefix}__{norm}.bias{suffix}"],
        },
    }


def close(found, wanted, tolerance):
    """Relative to the largest entry of all: batch normalisation leaves almost no gradient of
    kernels ahead of it."""
    scale = max(np.abs(y).max() for y in jax.tree.leaves(wanted))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.abs(np.asarray(x) - y).max() <= tolerance * scale


def slopes(loss, *arguments):
    places = tuple(range(len(arguments)))
    return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss, places))(*arguments))


def run(term, own, student, teacher, batch, **axis):
    return term.loss(own, student, teacher, batch, step=STEP, key=KEY, **axis)


# --- fixtures -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_fusion_fixture(dtype):
    """One step of ReviewKD's chain, with the residual, and all of its gradients."""
    kind, tolerance = DTYPES[dtype]
    g = golden("reviewkd_abf", kind)

    def params(kind):
        prefix, suffix = kind if isinstance(kind, tuple) else (kind, "")
        gates = {
            "kernel": g[f"{prefix}__abf__att_conv.0.weight{suffix}"],
            "bias": g[f"{prefix}__abf__att_conv.0.bias{suffix}"],
        }
        inner = conv_norm(g, ("abf__conv1.0", "abf__conv1.1"), kind)
        outer = conv_norm(g, ("abf__conv2.0", "abf__conv2.1"), kind)
        return {"inputs": inner, "outputs": outer, "gates": gates}

    def scalar(params, x, y):
        out, residual = _review.abf(params, x, y, (8, 8), axis_name=None, where=None)
        return jnp.mean(out**2) + jnp.mean(residual**3), (out, residual)

    with jax.enable_x64(dtype == "float64"):
        program = jax.jit(jax.value_and_grad(scalar, (0, 1, 2), has_aux=True))
        (value, outputs), grads = jax.tree.map(
            np.asarray, program(params("w"), g["in__x"], g["in__y"])
        )
    code = "__mdistiller__sum_sq_out"
    np.testing.assert_allclose(value, g[f"loss{code}"], rtol=tolerance)
    close(outputs, (g["aux__mdistiller__out"], g["aux__mdistiller__residual"]), tolerance)
    wanted = (params(("wgrad", code)), g[f"grad__x{code}"], g[f"grad__y{code}"])
    close(grads, wanted, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ofd_fixture(dtype):
    """Stage weights, connectors, a pooled teacher, margins of odd channels."""
    kind, tolerance = DTYPES[dtype]
    g = golden("ofd", kind)
    code = "__mdistiller__total"

    def params(kind):
        paths = [tuple(f"ofd__connectors.connectors.{i}.{j}" for j in range(2)) for i in range(2)]
        return {str(i): conv_norm(g, path, kind) for i, path in enumerate(paths)}

    teacher = {
        **{f"t{i}": g[f"in__f_t{i}"] for i in range(2)},
        **{
            f"n{i}": {
                "scale": g[f"in__teacher_bn{i}_weight"],
                "bias": g[f"in__teacher_bn{i}_bias"],
            }
            for i in range(2)
        },
    }
    term = _review.ofd(("s0", "s1"), ("t0", "t1"), norms=("n0", "n1"))
    with jax.enable_x64(dtype == "float64"):
        value, grads = slopes(
            lambda own, *s: run(term, own, dict(zip(("s0", "s1"), s, strict=True)), teacher, {}),
            params("w"), g["in__f_s0"], g["in__f_s1"],
        )  # fmt: skip
    # The published margins are stored in float32.
    tolerance = max(tolerance, 2e-7)
    np.testing.assert_allclose(value, g[f"loss{code}"], rtol=tolerance)
    wanted = (params(("wgrad", code)), *(g[f"grad__f_s{i}{code}"] for i in range(2)))
    close(grads, wanted, tolerance)


def test_ofd_stage_fixture():
    """One stage with the very margins of the published run: the same to 1e-9."""
    g = golden("ofd", np.float64)
    margin = g["aux__mdistiller__margin1"].reshape(-1).astype(np.float64)
    path = ("ofd__connectors.connectors.1.0", "ofd__connectors.connectors.1.1")

    def loss(params, s):
        answer = _stages.conv_norm(params, s, axis_name=None, where=None)
        return _overhaul.ofd(answer, g["in__f_t1"], margin=margin).mean()

    with jax.enable_x64(True):
        value, grads = slopes(loss, conv_norm(g, path), g["in__f_s1"])
    np.testing.assert_allclose(value, g["loss__mdistiller__stage1_unweighted"], rtol=1e-9)
    code = "__mdistiller__total"
    close(grads, (conv_norm(g, path, ("wgrad", code)), g[f"grad__f_s1{code}"]), 1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ickd_fixture(dtype):
    kind, tolerance = DTYPES[dtype]
    g = golden("ickd", kind)
    path = ("ickd__embed_s.conv2d", "ickd__embed_s.l2norm")
    term = _channels.ickd("s", "t")
    with jax.enable_x64(dtype == "float64"):
        value, grads = slopes(
            lambda own, s: run(term, own, {"s": s}, {"t": g["in__f_t"]}, {}),
            conv_norm(g, path), g["in__f_s"],
        )  # fmt: skip
    np.testing.assert_allclose(value, g["loss__ickd_cifar"], rtol=tolerance)
    wanted = (conv_norm(g, path, ("wgrad", "__ickd_cifar")), g["grad__f_s__ickd_cifar"])
    close(grads, wanted, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", ["mgd_det", "mgd_cls"])
def test_mgd_fixture(code, dtype):
    """With the published draws: positions for detection, channels for classification."""
    kind, tolerance = DTYPES[dtype]
    g = golden("mgd" if code == "mgd_det" else "mgd_channel", kind)
    uniform, weight = g["in__mask_uniform"], 2e-5 if code == "mgd_det" else 7e-5
    kept = uniform <= kind(1 - 0.65) if code == "mgd_det" else uniform >= kind(0.15)
    names = {"align": "align", "first": "generation.0", "second": "generation.2"}

    def params(prefix, suffix=""):
        return {
            name: {
                part: g[f"{prefix}__mgd__{path}.{own}{suffix}"]
                for part, own in (("kernel", "weight"), ("bias", "bias"))
            }
            for name, path in names.items()
        }

    def loss(own, s):
        return weight * _channels.generated_distance(own, s, g["in__f_t"], kept).mean()

    with jax.enable_x64(dtype == "float64"):
        value, grads = slopes(loss, params("w"), g["in__f_s"])
    np.testing.assert_allclose(value, g[f"loss__{code}"], rtol=tolerance)
    close(grads, (params("wgrad", f"__{code}"), g[f"grad__f_s__{code}"]), tolerance)


# --- formulas, our reading ------------------------------------------------------------------


def normalised(x, scale, bias):
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


@pytest.mark.parametrize("shape", [(6, 3, 2, 4), (6, 4)])
def test_srrl_formula(shape):
    """Our reading of the published codes, in NumPy: maps, and features as they are."""
    rng = np.random.default_rng(0)
    s, t = rng.standard_normal(shape), np.abs(rng.standard_normal((6, 2, 3, 5)))
    head = {"kernel": rng.standard_normal((5, 7)), "bias": rng.standard_normal(7)}
    logits = t.mean((1, 2)) @ head["kernel"] + head["bias"]
    own = {
        "linear": {"kernel": rng.standard_normal((4, 5))},
        "norm": {"scale": rng.standard_normal(5), "bias": rng.standard_normal(5)},
    }
    z = np.maximum(normalised(s @ own["linear"]["kernel"], **own["norm"]), 0)
    z = z.mean((1, 2)) if z.ndim == 4 else z
    answer = z @ head["kernel"] + head["bias"]
    wanted = ((z - t.mean((1, 2))) ** 2).mean() + ((answer - logits) ** 2).mean()
    term = _heads.srrl("s", "t")
    with jax.enable_x64(True):
        teacher = {"t": t, "head": head, "logits": logits}
        found = jax.jit(lambda own, s: run(term, own, {"s": s}, teacher, {}))(own, s)
        np.testing.assert_allclose(found, wanted, rtol=1e-10)
        pooled = {**teacher, "t": t.mean((1, 2))}  # the same features, averaged already
        np.testing.assert_allclose(
            run(term, own, {"s": jnp.asarray(s)}, pooled, {}), wanted, rtol=1e-10
        )


def test_review_chain():
    """The last stage alone is a plain connector; earlier ones hear of all later ones."""
    student, teacher = outputs(0), outputs(1)
    names = ("stage1", "stage2", "pool")
    term = _review.review_kd(names, names)
    own = jax.jit(term.init)(KEY, student, teacher)
    assert own["0"]["inputs"]["conv"]["kernel"].shape == (1, 1, 4, 8)  # of the last stage
    assert "gates" in own["0"]
    assert "gates" not in own["2"]

    def loss(student):
        return run(term, own, student, teacher, {})

    last = _review.review_kd("pool", "pool")
    value = jax.jit(lambda s: run(last, {"0": own["2"]}, s, teacher, {}))(student)
    answer, _ = _review.abf(
        own["2"], student["pool"][:, None, None], None, (1, 1), axis_name=None, where=None
    )
    # A stage of one position has no levels.
    distance = jnp.mean((answer[:, 0, 0] - teacher["pool"]) ** 2)
    np.testing.assert_allclose(value, distance, rtol=1e-5)
    grads = jax.jit(jax.grad(loss))({n: student[n] for n in names})
    assert all(np.any(g) for g in grads.values())
    # The target of the first stage is reached by the pooled features, too.
    first = jax.jit(jax.grad(lambda s: run_first(s, own, student, teacher)))(student["pool"])
    assert np.any(first)


def run_first(pool, own, student, teacher):
    _, residual = _review.abf(
        own["2"], pool[:, None, None], None, (1, 1), axis_name=None, where=None
    )
    answer, _ = _review.abf(
        own["1"], student["stage2"], residual, (2, 2), axis_name=None, where=None
    )
    return _overhaul.hierarchical_context(answer, teacher["stage2"]).mean()


@pytest.mark.parametrize(("found", "wanted"), [(3, 8), (8, 3), (5, 5), (1, 4)])
def test_nearest(found, wanted):
    """As torch: floor(i * found / wanted), not the nearest centre."""
    x = np.arange(found * found, dtype=np.float32).reshape(1, found, found, 1)
    place = [i * found // wanted for i in range(wanted)]
    np.testing.assert_array_equal(_review.nearest(x, (wanted, wanted)), x[:, place][:, :, place])


def test_mgd_masks():
    """Drawn by index, not by place; for positions or for channels; a share of them."""
    rng = np.random.default_rng(0)
    s = jnp.asarray(np.abs(rng.standard_normal((1, 6, 6, 16))).repeat(4, 0), jnp.float32)
    out = {"s": s}, {"t": jnp.zeros((4, 6, 6, 16))}
    for channels in (False, True):
        term = _channels.mgd("s", "t", channels=channels, share=lambda step: 0.5 * (step < 9))
        own = term.init(KEY, *out)
        assert set(own) == {"first", "second"}  # no alignment without need

        @jax.jit
        def values(index, step, key, term=term, own=own):
            return term.loss(own, *out, {"index": index}, step=step, key=key)

        index = jnp.array([3, 8, 3, 1])
        first = values(index, STEP, KEY)
        assert first[0] == first[2]
        assert len(np.unique(first)) == 3
        np.testing.assert_array_equal(values(index[::-1], STEP, KEY), first[::-1])
        assert np.all(values(index, STEP, jax.random.key(1)) != first)
        none = values(index, jnp.int32(9), KEY)  # the schedule has ended: nothing is masked
        np.testing.assert_allclose(none, none[0], rtol=1e-6)


def vit(seed=0, **options):
    net = ViT(3, patch_size=2, depth=2, mlp_ratio=1, **options)
    taps = {
        "look": "stage1/block1/attention/attention_weights",
        "both": "stage1/block*/attention/attention_weights",
        "tokens": "stage1/block1",
        "patches": "patches",
    }
    model = kd.from_linen(net, taps=taps)
    x = jax.random.normal(jax.random.key(9), (4, 4, 4, 1))
    params, extra = jax.jit(model.init)(jax.random.key(seed), x)
    return model, (jax.tree.map(lambda p: 8 * p, params), extra), x  # no even looks


def looked(model, variables, x):
    return jax.jit(lambda v, x: model.apply(*v, x)[0])(variables, x)


def test_attention_of_our_transformer():
    """What is tapped are distributions that the model's output really depends on."""
    model, variables, x = vit(dim=8, heads=2)
    out = looked(model, variables, x)
    assert out["look"].shape == (4, 2, 5, 5)
    np.testing.assert_allclose(out["look"].sum(-1), 1, rtol=1e-5)
    assert len(out["both"]) == 2
    block = variables[0]["stage1"]["block1"]
    y = looked(kd.from_linen(ViT(3, patch_size=2, depth=2, mlp_ratio=1, dim=8, heads=2),
                             taps={"y": "stage1/block1/norm1"}), variables, x)["y"]  # fmt: skip
    q, k = (
        jnp.einsum("bnd,dhe->bhne", y, block["attention"][name]["kernel"])
        + block["attention"][name]["bias"][None, :, None]
        for name in ("query", "key")
    )
    wanted = jax.nn.softmax(jnp.einsum("bhne,bhme->bhnm", q, k) / 2)
    np.testing.assert_allclose(out["look"], wanted, rtol=1e-4, atol=1e-6)


def test_vit_attention_formula():
    """Other special tokens and numbers of heads; zero where both look alike."""
    student, s_vars, x = vit(0, dim=8, heads=2, distillation=True)
    teacher, t_vars, _ = vit(1, dim=6, heads=3)
    s, t = looked(student, s_vars, x), looked(teacher, t_vars, x)
    term = _vision_tokens.vit_attention(
        ("look", "look"), ("look", "look"), student_skip=2, teacher_skip=1, average_heads=True
    )
    a, b = (
        np.asarray(out["look"], np.float64)[:, :, skip:, skip:] for out, skip in ((s, 2), (t, 1))
    )
    a, b = (y / y.sum(-1, keepdims=True) for y in (a, b))
    a, b = a.mean(1), b.mean(1)
    wanted = (b * np.log(b / a)).sum(-1).mean(-1)
    found = jax.jit(lambda s: run(term, {}, s, t, {}))(s)
    assert wanted.min() > 1e-3
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    same = _vision_tokens.vit_attention("look", "look")
    np.testing.assert_allclose(run(same, {}, t, t, {}), 0, atol=1e-6)
    # What has underflowed to 0 on one side has a finite gradient.
    hard = {"look": jnp.broadcast_to(jnp.eye(5)[None, None], (4, 3, 5, 5))}
    value, (grad,) = slopes(lambda s: run(same, {}, {"look": s}, hard, {}).sum(), t["look"])
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    grad = jax.grad(lambda s: run(same, {}, {"look": s}, t, {}).sum())(hard["look"])
    assert np.isfinite(grad).all()


def test_vit_tokens_formula():
    student, s_vars, x = vit(0, dim=8, heads=2, distillation=True)
    teacher, t_vars, _ = vit(1, dim=6, heads=3)
    s, t = looked(student, s_vars, x), looked(teacher, t_vars, x)
    for normalize, wanted in (
        (_vision_tokens._layer_norm, lambda a, b: 2 - 2 * correlation(a, b)),
        (_features.l2_normalize, lambda a, b: (2 - 2 * cosine(a, b)) / 6),
    ):
        term = _vision_tokens.vit_tokens(
            "tokens", "tokens", student_skip=2, teacher_skip=1, normalize=normalize
        )
        own = term.init(KEY, s, t)
        a = np.asarray(s["tokens"][:, 2:] @ own["0"]["kernel"] + own["0"]["bias"][None, None])
        b = np.asarray(t["tokens"][:, 1:])
        found = jax.jit(lambda s, term=term, own=own: run(term, own, s, t, {}))(s)
        np.testing.assert_allclose(found, wanted(a, b).mean(1), rtol=1e-3)


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def correlation(a, b):
    return cosine(a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True))


# --- training -------------------------------------------------------------------------------


def tiny(width):
    """Two stages of maps, relations of tokens, a classifier and its norm: every output needed."""

    def init(key, x):
        shapes = {
            "w1": (2, width), "w2": (width, 2 * width), "head": (2 * width, 3),
            "low": (width, 3), "high": (2 * width, 3),
        }  # fmt: skip
        keys = jax.random.split(key, len(shapes))
        params = {
            n: jax.random.normal(k, s) / s[0] ** 0.5
            for k, (n, s) in zip(keys, shapes.items(), strict=True)
        }
        return params | {"norm": {"scale": jnp.ones(width), "bias": 0.1 * jnp.arange(width)}}

    def apply(params, x):
        stage1 = jax.nn.relu(x @ params["w1"])
        halved = stage1.reshape(len(x), 2, 2, 2, 2, width).mean((2, 4))
        stage2 = jax.nn.relu(halved @ params["w2"])
        pool = stage2.mean((1, 2))
        tokens = stage1.reshape(len(x), 16, width)
        look = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", tokens, tokens))[:, None]
        return {
            "logits": pool @ params["head"], "stage1": stage1, "stage2": stage2, "pool": pool,
            "low": jax.nn.relu(stage1 @ params["low"]), "high": stage2 @ params["high"],
            "tokens": tokens, "look": look,
            "head": {"kernel": params["head"]}, "norm": params["norm"],
        }  # fmt: skip

    return kd.from_fn(init, apply)


@functools.cache
def outputs(seed):
    model = tiny(4)

    @jax.jit
    def run():
        x = jax.random.normal(jax.random.key(5), (4, 4, 4, 2))
        return model.apply(*model.init(jax.random.key(seed), x), x)[0]

    return run()


def everything(scope="global"):
    stages = ("stage1", "stage2", "pool")
    single = {
        "review": (_review.review_kd(stages, stages, scope=scope), 1.0),
        "ofd": (_review.ofd(stages[:1], stages[:1], norms="norm", scope=scope), 0.01),
        "ickd": (_channels.ickd("stage2", "stage2", scope=scope), 1.0),
        "srrl": (_heads.srrl("stage2", "pool", scope=scope), 1.0),
        "kdsvd": (_channels.kdsvd(("low", "high"), ("low", "high")), 1.0),
        "mgd": (_channels.mgd("stage2", "stage2", share=0.3), 0.01),
        "look": (_vision_tokens.vit_attention("look", "look"), 1.0),
        "tokens": (_vision_tokens.vit_tokens("tokens", "tokens"), 1.0),
    }
    return {name: (weight, term) for name, (term, weight) in single.items()}


COUPLED = ("review", "ofd", "ickd", "srrl")


def batch():
    """Rows of weight 0 in unequal numbers on four devices; what they hold is no number."""
    rng = np.random.default_rng(3)
    weight = np.array([1, 1, 1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 1, 1, 1, 0], np.float32)
    image = rng.standard_normal((16, 4, 4, 2)).astype(np.float32)
    image[weight == 0] = np.nan
    return {"image": image, "weight": weight, "index": np.arange(16, dtype=np.int32)}


STUDENT, TEACHER = tiny(4), tiny(6)


def started(scope="global", names=None):
    chosen = everything(scope)
    chosen = {name: chosen[name] for name in names or chosen}
    method = kd.distill(STUDENT, TEACHER, chosen)
    given = batch()
    frozen = TEACHER.init(jax.random.key(1), given["image"])
    state = kd.minimize(method, optax.sgd(0.05)).init(jax.random.key(0), given, frozen)
    return method, state, given, frozen


@pytest.fixture(scope="module")
def whole():
    method, state, given, frozen = started()
    learner = kd.minimize(method, optax.sgd(0.05))
    return jax.jit(learner.update)(state, given, frozen)


def same(found, wanted, tolerance=3e-5):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance / 10)


def sharded(method, state, given, frozen, devices=4):
    learner = kd.minimize(method, optax.sgd(0.05), axis_name="data")
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    update = jax.shard_map(
        learner.update, mesh=mesh, in_specs=(spec(), spec("data"), spec()), out_specs=spec()
    )
    return jax.jit(update)(state, given, frozen)


def test_every_term_trains(whole):
    state, metrics = whole
    _, start, _, _ = started()
    for name in everything():
        assert np.isfinite(metrics[f"loss/{name}"])
        assert metrics[f"loss/{name}"] > 0
    assert set(state.params["terms"]) == set(everything()) - {"kdsvd", "look"}
    moved = jax.tree.map(lambda x, y: np.any(x != y), state.params, start.params)
    for path, changed in jax.tree.leaves_with_path(moved):
        # The student's own classifier and norm are read by none of them.
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert changed or name.startswith(("student/head", "student/norm")), name
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_devices_are_exact(whole):
    """Batch normalisation and masks, too, with unequal numbers of rows on the devices."""
    state, metrics = sharded(*started())
    same(state.params, whole[0].params)
    same(metrics, whole[1])


def test_padding_is_as_if_deleted(whole):
    """Where rows are coupled; the others' means are the Method's."""
    assert tuple(everything())[: len(COUPLED)] == COUPLED  # so that they start alike
    method, state, given, frozen = started(names=COUPLED)
    kept = {name: x[given["weight"] > 0] for name, x in given.items()}
    learner = kd.minimize(method, optax.sgd(0.05))
    found, metrics = jax.jit(learner.update)(state, kept, frozen)
    for name in COUPLED:
        same(found.params["terms"][name], whole[0].params["terms"][name])
        same(metrics[f"loss/{name}"], whole[1][f"loss/{name}"])


def test_statistics_of_each_device():
    """By name: each device normalises by its own rows; the mean is still over all that count."""
    method, state, given, frozen = started("device", COUPLED)
    _, metrics = sharded(method, state, given, frozen)
    filled = {**given, "image": np.nan_to_num(given["image"])}

    @jax.jit
    def each(rows):
        s = STUDENT.apply(state.params["student"], {}, rows["image"])[0]
        t = TEACHER.apply(*frozen, rows["image"])[0]
        return {
            name: run(everything()[name][1], state.params["terms"][name], s, t, rows)
            for name in COUPLED
        }

    counts = given["weight"].reshape(4, 4).sum(1)
    assert len(set(counts)) > 2
    parts = [each({k: x[i : i + 4] for k, x in filled.items()}) for i in range(0, 16, 4)]
    for name in COUPLED:
        values = np.array([part[name] for part in parts])
        same(metrics[f"loss/{name}"], np.sum(values * counts) / counts.sum())
        assert abs(metrics[f"loss/{name}"] - values.mean()) > 1e-4


def test_nothing_that_counts():
    """A batch of padding only has no loss, and no gradient that isn't a number."""
    method, state, given, frozen = started()
    given["weight"] = np.zeros(16, np.float32)
    learner = kd.minimize(method, optax.sgd(0.05))
    found, metrics = jax.jit(learner.update)(state, given, frozen)
    assert metrics["loss"] == 0
    same(found.params, state.params)


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_terms_refuse_microbatches(name):
    method = kd.distill(STUDENT, TEACHER, {name: everything()[name]})
    given = batch()
    frozen = TEACHER.init(jax.random.key(1), given["image"])
    learner = kd.minimize(method, optax.sgd(0.05), microbatches=2)
    with pytest.raises(ValueError, match=f"microbatches must be 1 with the term '{name}'"):
        learner.update(learner.init(jax.random.key(0), given, frozen), given, frozen)


# --- bad input ------------------------------------------------------------------------------


def start(term, change=lambda s, t: None, **entries):
    """Starts and runs a term on the outputs of `tiny`, changed in some way."""
    s, t = dict(outputs(0)), dict(outputs(1))
    change(s, t)
    own = term.init(KEY, s, t)
    return run(term, own, s, t, {"index": jnp.arange(4), **entries})


def put(side, name, value):
    def change(s, t):
        {"s": s, "t": t}[side][name] = value

    return change


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _review.review_kd(("a", "b"), "a"), ValueError, "student_taps"),
        (lambda: _review.review_kd((), ()), ValueError, "at least one output"),
        (lambda: _review.review_kd("a", "a", scope="mine"), ValueError, "scope must be one of"),
        (lambda: _review.review_kd("a", "a", features=0), ValueError, "features must be an int"),
        (lambda: _review.review_kd("a", "a", levels=(0,)), ValueError, "levels must be an int"),
        (lambda: _review.ofd("a", "a", norms=("b", "c")), ValueError, "norms must name as many"),
        (lambda: _channels.kdsvd("a", "a"), ValueError, "student_taps must name at least two"),
        (lambda: _channels.kdsvd("ab", "ab", k=0), ValueError, "student_taps must name at least"),
        (lambda: _channels.mgd("a", "a", share=1.5), ValueError, "share must be a finite number"),
        (lambda: _heads.srrl("a", "a", activation=3), TypeError, "activation must be a function"),
        (lambda: _vision_tokens.vit_tokens("a", "a", student_skip=-1), ValueError, "student_skip"),
        (lambda: _vision_tokens.vit_tokens("a", "a", normalize="l2"), TypeError, "normalize must"),
        (
            lambda: start(_review.review_kd("tokens", "stage1")),
            ValueError,
            "the student's output 'tokens' must be feature maps",
        ),
        (
            lambda: start(_review.ofd("stage1", "stage1", norms="head")),
            ValueError,
            "the teacher's output 'head' must be a batch normalisation's parameters",
        ),
        (
            lambda: start(_review.ofd("stage2", "stage2", norms="norm")),
            ValueError,
            "the scale of 'norm' must have shape",
        ),
        (
            lambda: start(_channels.kdsvd(("stage1", "low"), ("low", "low"))),
            ValueError,
            "the student's output 'stage1' must have 3 channels",
        ),
        (
            lambda: start(_channels.mgd("stage1", "stage2")),
            ValueError,
            "the student's output 'stage1' must have the height and width",
        ),
        (
            lambda: start(_channels.mgd("stage1", "stage1"), index=jnp.arange(3)),
            ValueError,
            r"batch\['index'\] must have shape",
        ),
        (
            lambda: start(_heads.srrl("stage2", "pool", head="norm")),
            ValueError,
            "the teacher's output 'norm' must be a linear layer's parameters",
        ),
        (
            lambda: start(_heads.srrl("stage2", "stage1")),
            ValueError,
            "the teacher's head must read 4 features",
        ),
        (
            lambda: start(_heads.srrl("stage2", "pool"), put("t", "logits", jnp.zeros((4, 2)))),
            ValueError,
            "the teacher's logits must have shape",
        ),
        (
            lambda: start(_vision_tokens.vit_tokens("tokens", "tokens", student_skip=1)),
            ValueError,
            "the student's output 'tokens' must have 16 tokens",
        ),
        (
            lambda: start(
                _vision_tokens.vit_attention("look", "look"),
                put("t", "look", jnp.ones((4, 3, 16, 16))),
            ),
            ValueError,
            "the student's output 'look' must have the heads and tokens",
        ),
        (
            lambda: start(_vision_tokens.vit_attention("tokens", "look")),
            ValueError,
            "the student's output 'tokens' must have 4 dimensions",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_mgd_needs_the_index():
    term = _channels.mgd("stage1", "stage1")
    s, t = outputs(0), outputs(1)
    with pytest.raises(ValueError, match="batch has no entry 'index'"):
        run(term, term.init(KEY, s, t), s, t, {})
