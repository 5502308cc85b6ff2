"""The published totals of projector distillation, and the optimizers they were trained with."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kdjax as kd
from kdjax import losses
from kdjax.methods import projector_distillation as projector

GOLDEN = np.load(Path(__file__).parent.parent / "losses" / "golden_projector.npz")
KEY = jax.random.key(0)


def case(name):
    return {k.split("/")[1]: GOLDEN[k] for k in GOLDEN.files if k.startswith(f"{name}/")}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def numpy(tree):
    return jax.tree.map(np.asarray, tree)


def free(*names):
    """A student whose outputs are its parameters, so that their gradients can be looked at."""

    def init(key, batch):
        return {name: batch[f"start_{name}"] for name in names}, {}

    def apply(params, extra, batch, *, train=False, key=None):
        return dict(params), extra

    return kd.Model(init, apply, lambda batch: batch)


def value_and_grad(method, params, batch):
    def loss(params):
        found, (_, metrics) = method.loss(
            params, {"student": {}}, batch, None, step=jnp.int32(0), key=KEY, axis_name=None
        )
        return found, metrics

    (value, metrics), grads = numpy(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
    return value, metrics, grads


def assert_gradient(found, wanted, share):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=share * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_published_imagenet_total(dtype):
    """Cross-entropy + 2 LogSum + KL of the official code, on maps of 7x7."""
    c = case("full")
    arrays = {k: v.astype(dtype) for k, v in c.items() if np.issubdtype(v.dtype, np.floating)}
    batch = {"label": c["labels"].astype(np.int32), "feat": arrays["map_t_nhwc"]}
    batch["logits"] = arrays["logits_t"]
    teacher = kd.from_batch(feat="feat", logits="logits")
    method = projector.imagenet(free("feat", "logits"), teacher, log_eps=0.0)
    params = {
        "student": {"feat": arrays["map_s_nhwc"], "logits": arrays["logits_s"]},
        "terms": {"feature": {"0": {"kernel": arrays["kernel"], "bias": arrays["bias"]}}},
    }
    with jax.enable_x64(dtype is np.float64):
        value, metrics, grads = value_and_grad(method, params, batch)
    exact = dtype is np.float64
    rtol, share = (1e-12, 1e-11) if exact else (2e-6, 1e-4)
    np.testing.assert_allclose(value, c["loss_total"], rtol=rtol)
    for name, wanted in (("hard", "ce"), ("feature", "logsum"), ("soft", "kl")):
        np.testing.assert_allclose(metrics[f"loss/{name}"], c[f"loss_{wanted}"], rtol=rtol)
    of_map = grads["student"]["feat"]
    assert np.ptp(of_map, axis=(1, 2)).max() <= 1e-6 * np.abs(of_map).max()
    assert_gradient(of_map[:, 0, 0], c["grad_map_s_pixel"], share)
    assert_gradient(grads["student"]["logits"], c["grad_logits_s"], share)
    layer = grads["terms"]["feature"]["0"]
    assert_gradient(layer["kernel"], c["grad_kernel"], share)
    assert not layer["bias"].any()


def test_published_trajectory():
    """50 updates of the projector alone by SGD with momentum and coupled weight decay."""
    c = case("traj")
    method = kd.distill(
        kd.Model(
            lambda key, batch: ({}, {}),
            lambda params, extra, batch, **_: ({"feat": batch["z_s"]}, extra),
            lambda batch: batch,
        ),
        kd.from_batch(feat="z_t"),
        {"feature": (2.0, kd.terms.projector("feat", "feat", log_eps=0.0))},
    )
    optimizer = projector.imagenet_optimizer(steps_per_epoch=10**6)
    learner = kd.minimize(method, optimizer)
    with jax.enable_x64(True):
        batch = {k: c[k].astype(float) for k in ("z_s", "z_t")}
        state = learner.init(KEY, batch)
        layer = {k: jnp.asarray(c[k], float) for k in ("kernel", "bias")}
        params = {**state.params, "terms": {"feature": {"0": layer}}}
        state = state._replace(params=params, opt=optimizer.init(params))

        def update(state, _):
            layer = state.params["terms"]["feature"]["0"]
            state, metrics = learner.update(state, batch)
            return state, (layer, metrics["loss"])

        run = jax.jit(lambda state: jax.lax.scan(update, state, length=51)[1])
        layers, found = numpy(run(state))
    np.testing.assert_allclose(found, c["losses"], rtol=1e-9)
    for k in (10, 50):
        for name in ("kernel", "bias"):
            assert_gradient(layers[name][k], c[f"{name}_step{k}"], 1e-8)
    values = np.linalg.svd(layers["kernel"], compute_uv=False)
    np.testing.assert_allclose(values, c["singular_values"], rtol=1e-7, atol=1e-9)
    assert values[50, 0] > 1.05 * values[0, 0]


B, CLASSES = 8, 5


def classified(*extra, label=None):
    """A batch for `free`, with noise in all the student's and the teacher's outputs."""
    found = {
        "label": np.arange(B, dtype=np.int32) % CLASSES if label is None else label,
        "t_feat": draw(B, 7, seed=1),
        "t_logits": draw(B, CLASSES, seed=2),
        "start_feat": draw(B, 4, seed=3),
        "start_logits": draw(B, CLASSES, seed=4),
    }
    return found | dict(extra)


TEACHER = kd.from_batch(feat="t_feat", logits="t_logits")


def start(method, batch):
    return method.init(KEY, batch)[0]


def test_cifar100_total():
    """Cross-entropy + 2 LogSum through an MLP; no soft labels."""
    batch = classified()
    method = projector.cifar100(free("feat", "logits"), TEACHER)
    params = start(method, batch)
    layers = params["terms"]["feature"]
    assert [layers[i]["kernel"].shape for i in "01"] == [(4, 1024), (1024, 7)]
    value, metrics, grads = value_and_grad(method, params, batch)
    assert sorted(metrics) == ["accuracy", "loss", "loss/feature", "loss/hard"]
    np.testing.assert_allclose(value, metrics["loss/hard"] + 2 * metrics["loss/feature"], rtol=1e-6)
    f = jax.nn.relu(batch["start_feat"] @ layers["0"]["kernel"] + layers["0"]["bias"][None])
    f = f @ layers["1"]["kernel"] + layers["1"]["bias"][None]
    wanted = losses.log_sum(losses.standardize(f), losses.standardize(batch["t_feat"]))
    np.testing.assert_allclose(metrics["loss/feature"], wanted, rtol=1e-5)
    assert all(np.any(layer["kernel"]) for layer in grads["terms"]["feature"].values())


def deit_batch():
    mixed = np.eye(CLASSES, dtype=np.float32)[np.arange(B) % CLASSES]
    return classified(
        ("start_patches", draw(B, 9, 4, seed=5)),
        ("start_class_logits", draw(B, CLASSES, seed=6)),
        ("start_distillation_logits", draw(B, CLASSES, seed=7)),
        label=0.7 * mixed + 0.3 * mixed[::-1],
    )


def deit(**options):
    outputs = ("patches", "class_logits", "distillation_logits", "logits")
    return projector.deit(free(*outputs), TEACHER, **options)


def test_deit_total():
    """The class head learns from the labels only, the other head from the teacher only."""
    batch = deit_batch()
    method = deit()
    params = start(method, batch)
    value, metrics, grads = value_and_grad(method, params, batch)
    parts = [metrics[f"loss/{name}"] for name in ("hard", "feature", "soft")]
    np.testing.assert_allclose(value, sum(parts), rtol=1e-6)
    target = 0.9 * batch["label"] + 0.1 / CLASSES
    log_p = jax.nn.log_softmax(batch["start_class_logits"])
    np.testing.assert_allclose(parts[0], -(target * log_p).sum(1).mean(), rtol=1e-5)
    layer = numpy(params["terms"]["feature"]["0"])
    f = batch["start_patches"].mean(1) @ layer["kernel"] + layer["bias"]
    rho = [np.corrcoef(a, b)[0, 1] for a, b in zip(f.T, batch["t_feat"].T, strict=True)]
    wanted = np.log((np.abs(np.array(rho) - 1) ** 4).sum() + 1e-5)
    np.testing.assert_allclose(parts[1], wanted, rtol=1e-5)
    wanted = losses.soft_label_kl(batch["start_distillation_logits"], batch["t_logits"])
    np.testing.assert_allclose(parts[2], wanted.mean(), rtol=1e-5)
    p = jax.nn.softmax(batch["start_class_logits"])
    assert_gradient(grads["student"]["class_logits"], (p - target) / B, 1e-5)
    assert np.any(grads["student"]["distillation_logits"])
    assert np.any(grads["student"]["patches"])
    assert not grads["student"]["logits"].any()  # the mean of both, which is only used


@pytest.mark.slow
def test_deit_student_runs():
    """The published script can't: here is the whole of it at a small size."""
    student = kd.from_linen(
        kd.models.ViT(CLASSES, patch_size=4, dim=8, depth=1, heads=2, distillation=True),
        taps={
            "patches": "patches",
            "class_logits": "classifier",
            "distillation_logits": "distillation_classifier",
        },
    )
    teacher = kd.from_linen(kd.models.MLP(CLASSES, (6,)), taps={"feat": "pool"})
    augment = functools.partial(kd.augment.mixup, alpha=0.8, num_classes=CLASSES)
    method = projector.deit(student, teacher, augment=augment)
    learner = kd.minimize(method, projector.deit_optimizer(steps_per_epoch=1, warm_up=0))
    batch = {
        "image": draw(16, 8, 8, 1),
        "label": np.arange(16, dtype=np.int32) % CLASSES,
        "index": np.arange(16, dtype=np.int32),
    }
    frozen = jax.jit(teacher.init)(KEY, batch["image"])
    state = jax.jit(learner.init)(KEY, batch, frozen)
    update = jax.jit(learner.update)
    after, metrics = update(state, batch, frozen)
    assert all(np.isfinite(x) for x in metrics.values())
    for name in ("classifier", "distillation_classifier"):
        before, now = (x.params["student"][name]["kernel"] for x in (state, after))
        assert np.any(before != now), name
    for _ in range(20):
        after, later = update(after, batch, frozen)
    assert later["loss/feature"] < metrics["loss/feature"]


def test_cifar100_with_another_projector():
    """Which has no hidden layers of ours."""
    for projector_of in ({"projector": None}, {"hidden": 12}, {"hidden": ()}):
        assert isinstance(
            projector.cifar100(free("feat", "logits"), TEACHER, **projector_of), kd.Method
        )


def test_first_imagenet_code():
    """Correlations with weight 2 and no KL: what ran before the publication."""
    batch = classified()
    student = free("feat", "logits")
    first = {"loss": "correlation_log_sum", "log_eps": 1e-5, "soft_weight": 0.0}
    method = projector.imagenet(student, TEACHER, **first)
    params = start(method, batch)
    value, metrics, _ = value_and_grad(method, params, batch)
    np.testing.assert_allclose(value, metrics["loss/hard"] + 2 * metrics["loss/feature"], rtol=1e-6)
    assert abs(metrics["loss/feature"] - np.log(7)) < 3


def test_more_terms():
    batch = classified()
    dkd = kd.terms.matching(kd.losses.dkd, labels="label", alpha=1.0, beta=8.0)
    student = free("feat", "logits")
    method = projector.cifar100(student, TEACHER, hidden=(), more_terms={"dkd": (0.5, dkd)})
    value, metrics, _ = value_and_grad(method, start(method, batch), batch)
    wanted = metrics["loss/hard"] + 2 * metrics["loss/feature"] + 0.5 * metrics["loss/dkd"]
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    with pytest.raises(ValueError, match=r"^more_terms must not use the name 'hard'"):
        projector.cifar100(student, TEACHER, more_terms={"hard": (1.0, dkd)})


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda s: projector.imagenet(s, TEACHER, norm="layer"), ValueError, "^norm must be one"),
        (lambda s: projector.imagenet(s, TEACHER, alpha=-1.0), ValueError, "^alpha must be"),
        (lambda s: projector.imagenet(s, TEACHER, temperature=0), ValueError, "^temperature must"),
        (lambda s: projector.deit(s, TEACHER, smoothing=2.0), ValueError, "^smoothing must be"),
        (lambda s: projector.imagenet(None, TEACHER), TypeError, "^student must be a kdjax.Model"),
        (
            lambda s: projector.imagenet(s, TEACHER, feature_weight=float("nan")),
            ValueError,
            "^the weight of terms",
        ),
    ],
)
def test_bad_input(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make(free("feat", "logits"))


@pytest.mark.parametrize(
    "wrong", [{"t_logits": draw(B, 4)}, {"label": np.zeros((B, 4), np.float32)}]
)
def test_other_numbers_of_classes(wrong):
    method = projector.imagenet(free("feat", "logits"), TEACHER)
    params = start(method, classified())
    with pytest.raises(ValueError, match=r"\(8, 4\)"):
        value_and_grad(method, params, classified() | wrong)


def test_missing_outputs():
    with pytest.raises(ValueError, match=r"has no entry 'patches'.*taps="):
        start(projector.deit(free("feat", "logits"), TEACHER), classified())


# --- optimizers -----------------------------------------------------------------------------


def moves(optimizer, steps, params, grads):
    """The updates of each step, for the same gradients."""

    def one(carry, _):
        params, state = carry
        found, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, found), state), found

    return numpy(jax.lax.scan(one, (params, optimizer.init(params)), length=steps)[1])


@pytest.mark.parametrize(
    ("make", "rate", "drops"),
    [
        (projector.imagenet_optimizer, 0.1, (30, 60, 90)),
        (projector.cifar100_optimizer, 0.05, (150, 180, 210)),
    ],
)
def test_rate_drops_at_the_start_of_epochs(make, rate, drops):
    optimizer = make(steps_per_epoch=2, weight_decay=0.0, momentum=0.0)
    found = -moves(optimizer, 2 * drops[-1] + 2, {"w": jnp.zeros(())}, {"w": jnp.ones(())})["w"]
    epoch = np.arange(len(found)) // 2
    wanted = rate * 0.1 ** np.sum([epoch >= drop for drop in drops], 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_decay_is_coupled():
    """It goes into the momentum, as in torch's SGD, and holds for biases, too."""
    optimizer = projector.cifar100_optimizer(steps_per_epoch=100)
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, -1.0)}
    found = moves(optimizer, 2, params, jax.tree.map(jnp.zeros_like, params))
    for name, start_value in (("kernel", 3.0), ("bias", -1.0)):
        first = -0.05 * 5e-4 * start_value
        np.testing.assert_allclose(found[name][0], first, rtol=1e-5)
        second = 0.9 * first - 0.05 * 5e-4 * (start_value + first)
        np.testing.assert_allclose(found[name][1], second, rtol=1e-4)


def test_deit_rates():
    optimizer = projector.deit_optimizer(
        steps_per_epoch=2, batch_size=1024, epochs=30, warm_up=10, weight_decay=0.0
    )
    # Steps of Adam with constant gradients are the rate.
    found = -moves(optimizer, 61, {"w": jnp.zeros(())}, {"w": jnp.ones(())})["w"]
    # The cosine counts the epochs of the warm-up too: 3 / 4 of the way is left after a third.
    np.testing.assert_allclose(found[[0, 1, 60]], [1e-6, 1e-6, 1e-5], rtol=1e-4)
    np.testing.assert_allclose(found[10], (1e-6 + 1e-3) / 2, rtol=1e-4)
    np.testing.assert_allclose(found[20], 1e-5 + 0.75 * (1e-3 - 1e-5), rtol=1e-4)
    np.testing.assert_allclose(found[40], 1e-5 + 0.25 * (1e-3 - 1e-5), rtol=1e-4)


def test_deit_decays_weights_only():
    """Biases of attention have two dimensions in Flax, positions and tokens three."""
    student = kd.models.ViT(3, patch_size=4, dim=8, depth=1, heads=2, distillation=True)
    shapes = jax.eval_shape(student.init, KEY, jnp.zeros((1, 8, 8, 1)))["params"]
    params = {
        "student": jax.tree.map(lambda x: jnp.ones(x.shape), shapes),
        "terms": {"feature": {"0": {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}}},
    }
    optimizer = projector.deit_optimizer(steps_per_epoch=1, warm_up=0)
    found = moves(optimizer, 1, params, jax.tree.map(jnp.zeros_like, params))
    seen = set()
    for path, x in jax.tree.leaves_with_path(found):
        name = path[-1].key
        seen.add(name)
        wanted = -5e-4 * 0.05 if name == "kernel" else 0.0
        np.testing.assert_allclose(x, wanted, rtol=1e-5)
    assert seen == {"kernel", "bias", "scale", "positions", "class_token"}


def test_deit_clips_the_gradient():
    optimizer = projector.deit_optimizer(steps_per_epoch=1)
    state = optimizer.init({"w": jnp.zeros(4)})
    _, state = optimizer.update({"w": jnp.full(4, 1e6)}, state, {"w": jnp.zeros(4)})
    mean = optax.tree_utils.tree_get(state, "mu")["w"]
    np.testing.assert_allclose(np.linalg.norm(mean), 0.1 * 15, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps_per_epoch": 0}, "^steps_per_epoch must be"),
        ({"steps_per_epoch": 1, "warm_up": 300}, "^warm_up must be .* at most 299"),
        ({"steps_per_epoch": 1, "batch_size": 0}, "^batch_size must be"),
    ],
)
def test_bad_recipes(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        projector.deit_optimizer(**options)
    if options["steps_per_epoch"] == 0:
        with pytest.raises(ValueError, match=sentence):
            projector.cifar100_optimizer(**options)
