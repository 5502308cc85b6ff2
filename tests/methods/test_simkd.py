"""SimKD: the published formula, running averages, devices, and the model that is deployed."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kdjax as kd
from kdjax.methods import simkd

CLASSES, ROWS = 3, 16


class Stage(nn.Module):
    """Maps after a ReLU."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.features, (3, 3), strides=self.stride, use_bias=False)(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, use_fast_variance=False)(x))


class Net(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train=False):
        x = Stage(self.features, self.stride, name="stage")(x, train)
        return nn.Dense(CLASSES, name="classifier")(x.mean((1, 2)))


def net(features, stride=1):
    taps, expose = {"feat": "stage"}, {"head": "classifier"}
    return kd.from_linen(Net(features, stride), taps=taps, expose=expose)


STUDENT, TEACHER = net(3), net(4, stride=2)  # the student's maps are larger


def plain(width):
    """Without batch normalisation, so that devices may agree with one."""

    def init(key, x):
        first, second = jax.random.split(key)
        return {
            "w": jax.random.normal(first, (2, width)),
            "head": {"kernel": jax.random.normal(second, (width, CLASSES)), "bias": jnp.ones(3)},
        }

    def apply(params, x):
        maps = jax.nn.relu(x @ params["w"])
        logits = maps.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"][None]
        return {"logits": logits, "feat": maps, "head": params["head"]}

    return kd.from_fn(init, apply)


def batch():
    rng = np.random.default_rng(0)
    image = rng.standard_normal((ROWS, 4, 4, 2)).astype(np.float32)
    return {
        "image": image,
        "label": rng.integers(0, CLASSES, ROWS).astype(np.int32),
        "index": np.arange(ROWS, dtype=np.int32),
    }


def start(student, teacher, given, rate=0.1, **options):
    method = simkd.simkd(student, teacher, **options)
    learner = kd.minimize(method, optax.sgd(rate, momentum=0.9))
    frozen = jax.jit(teacher.init)(jax.random.key(1), given["image"])
    return learner, learner.init(jax.random.key(0), given, frozen), frozen


@pytest.fixture(scope="module")
def trained():
    """Ten steps."""
    given = batch()
    learner, first, frozen = start(STUDENT, TEACHER, given)
    update, state, seen = jax.jit(learner.update), first, []
    for _ in range(10):
        state, metrics = update(state, given, frozen)
        seen.append(jax.device_get(metrics))
    return first, state, frozen, given, seen


def deployed(state, frozen, given, student=STUDENT, teacher=TEACHER):
    return simkd.deploy(student, teacher, state, given, frozen)


def numbers(updated):
    """What an update returns, without its key."""
    state, metrics = updated
    return state.params, state.extra, metrics


def same(found, wanted, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


# --- the formula ----------------------------------------------------------------------------


def convolved(x, kernel):
    """A convolution of stride 1 that keeps the size."""
    half = kernel.shape[0] // 2
    padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:2], (1, 2))
    return np.einsum("bhwcij,ijcd->bhwd", windows, kernel)


def projected(params, x, extra=None):
    """Our reading of the published projector, by batch statistics or running averages."""
    statistics = []
    for i in range(3):
        own = jax.tree.map(lambda a: np.asarray(a, np.float64), params[str(i)])
        x = convolved(x, own["conv"]["kernel"])
        axes = (0, 1, 2)
        mean, var = (
            (x.mean(axes), x.var(axes))
            if extra is None
            else (np.asarray(extra[str(i)]["mean"]), np.asarray(extra[str(i)]["var"]))
        )
        statistics.append((mean, var))
        x = (x - mean) / np.sqrt(var + 1e-5) * own["norm"]["scale"] + own["norm"]["bias"]
        x = np.maximum(x, 0)
    return x, statistics


def halved(x):
    return np.asarray(x, np.float64).reshape(len(x), 2, 2, 2, 2, -1).mean((2, 4))


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_published_formula(larger):
    """The larger maps are averaged down, and nothing but features is compared."""
    given = batch()
    student, teacher = (net(3), net(4, 2)) if larger == "student" else (net(3, 2), net(4))
    learner, state, frozen = start(student, teacher, given, feature_weight=3.0)
    after, metrics = jax.jit(learner.update)(state, given, frozen)
    s = jax.jit(lambda v, x: student.apply(*v, x, train=True))(
        (state.params["student"], state.extra["student"]), given["image"]
    )[0]["feat"]
    t = np.asarray(jax.jit(lambda v, x: teacher.apply(*v, x)[0]["feat"])(frozen, given["image"]))
    s, t = (halved(s), t) if larger == "student" else (np.asarray(s, np.float64), halved(t))
    found, statistics = projected(state.params["projector"], s)
    np.testing.assert_allclose(metrics["loss/feature"], ((found - t) ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], 3 * metrics["loss/feature"], rtol=1e-6)
    # The student's classifier is read by nothing; running averages move by a tenth.
    same(after.params["student"]["classifier"], state.params["student"]["classifier"], 0)
    for i, (mean, var) in enumerate(statistics):
        wanted = {"mean": 0.1 * mean, "var": 0.9 + 0.1 * var}
        same(after.extra["projector"][str(i)], wanted)
    kernels = state.params["projector"]
    shapes = [kernels[str(i)]["conv"]["kernel"].shape for i in range(3)]
    assert shapes == [(1, 1, 3, 2), (3, 3, 2, 2), (1, 1, 2, 4)]


def test_it_learns(trained):
    first, state, _, _, seen = trained
    assert seen[-1]["loss"] < 0.7 * seen[0]["loss"]
    assert set(seen[0]) == {"loss", "loss/feature", "accuracy"}
    assert set(state.params) == set(state.extra) == {"student", "projector"}
    assert np.any(
        state.params["student"]["stage"]["Conv_0"]["kernel"]
        != first.params["student"]["stage"]["Conv_0"]["kernel"]
    )


def test_devices_and_padding():
    """One device, four with unequal rows that count, and rows deleted are the same."""
    given = batch()
    weight = np.array([1, 1, 1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 1, 1, 1, 0], np.float32)
    padded = {**given, "weight": weight, "image": given["image"].copy()}
    padded["image"][weight == 0] = np.nan
    student, teacher = plain(3), plain(4)
    learner, state, frozen = start(student, teacher, padded)
    whole = numbers(jax.jit(learner.update)(state, padded, frozen))
    kept = {name: x[weight > 0] for name, x in given.items()}
    same(numbers(jax.jit(learner.update)(state, kept, frozen)), whole, 2e-5)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    split = kd.minimize(
        simkd.simkd(student, teacher), optax.sgd(0.1, momentum=0.9), axis_name="data"
    )
    for check in (True, False):
        run = jax.jit(
            jax.shard_map(
                split.update,
                mesh=mesh,
                in_specs=(spec(), spec("data"), spec()),
                out_specs=spec(),
                check_vma=check,
            )
        )
        same(numbers(run(state, padded, frozen)), whole, 2e-5)


def test_augmented_batches():
    """Both models see what the augmentation makes, of another size than what comes in."""
    given = batch()

    def halve(key, batch):
        return {**batch, "image": batch["image"][:, ::2, ::2]}

    learner, state, frozen = start(plain(3), plain(4), given, augment=halve)
    _, metrics = jax.jit(learner.update)(state, given, frozen)
    small = {**given, "image": given["image"][:, ::2, ::2]}
    learner, _, _ = start(plain(3), plain(4), small)
    same(metrics, jax.jit(learner.update)(state, small, frozen)[1])


# --- deployment -----------------------------------------------------------------------------


def test_deployed_logits(trained):
    """Those of training in evaluation mode: student, projector, teacher's classifier."""
    _, state, frozen, given, _ = trained
    model, variables = deployed(state, frozen, given)
    out, extra = jax.jit(lambda v, x: model.apply(*v, x))(variables, given["image"])
    student = state.params["student"], state.extra["student"]
    s = jax.jit(lambda v, x: STUDENT.apply(*v, x)[0]["feat"])(student, given["image"])
    maps, _ = projected(state.params["projector"], halved(s), state.extra["projector"])
    head = frozen[0]["classifier"]
    wanted = maps.mean((1, 2)) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(out["logits"], wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out["features"], maps.mean((1, 2)), rtol=1e-4, atol=1e-5)
    assert out["feat"].shape == s.shape
    same(extra, variables[1], 0)
    # In training mode they are those that the metric has seen.
    learner, _, _ = start(STUDENT, TEACHER, given)
    _, metrics = jax.jit(learner.update)(state, given, frozen)
    out, _ = jax.jit(lambda v, x: model.apply(*v, x, train=True))(variables, given["image"])
    assert metrics["accuracy"] == (out["logits"].argmax(1) == given["label"]).mean()


def test_a_perfect_student_is_the_teacher():
    """With the teacher's features, its own logits come out."""
    given = batch()
    teacher = plain(4)
    _, state, frozen = start(teacher, teacher, given, factor=1)
    params = {
        "student": frozen[0],
        "projector": jax.tree.map(jnp.zeros_like, state.params["projector"]),
    }
    for i, size in enumerate((1, 3, 1)):
        middle = size // 2
        kernel = params["projector"][str(i)]["conv"]["kernel"].at[middle, middle].set(jnp.eye(4))
        params["projector"][str(i)] = {
            "conv": {"kernel": kernel},
            "norm": {"scale": jnp.full(4, np.sqrt(1 + 1e-5)), "bias": jnp.zeros(4)},
        }
    state = state._replace(params=params)
    model, variables = deployed(state, frozen, given, teacher, teacher)
    wanted = teacher.apply(*frozen, given["image"])[0]["logits"]
    same(model.apply(*variables, given["image"])[0]["logits"], wanted)


def test_deployed_is_a_model(trained, tmp_path):
    """It is evaluated, taken for a teacher, and saved as a student like any other."""
    _, state, frozen, given, _ = trained
    model, variables = deployed(state, frozen, given)
    fresh = jax.eval_shape(model.init, jax.random.key(0), given["image"])
    assert jax.tree.structure(fresh) == jax.tree.structure(variables)
    shapes = jax.tree.map(lambda a, b: a.shape == b.shape, fresh, variables)
    assert all(jax.tree.leaves(shapes))
    found = kd.train.evaluate(model, variables, [given])
    logits = model.apply(*variables, given["image"])[0]["logits"]
    np.testing.assert_allclose(found["accuracy"], (logits.argmax(1) == given["label"]).mean())
    # As a teacher, and trained further itself, through a checkpoint on disk.
    method = kd.distill(model, model, {"soft": (1.0, kd.terms.soft_labels())})
    learner = kd.minimize(method, optax.sgd(0.0))
    started = learner.init(jax.random.key(0), given, frozen=variables)
    params, extra = jax.tree.map(jnp.copy, variables)
    started = started._replace(params={"student": params}, extra={"student": extra})
    kd.train.fit(
        learner, started, [given], frozen=variables, steps=1, checkpoint=tmp_path / "run",
        progress=False,
    )  # fmt: skip
    saved = kd.train.load_student(tmp_path / "run")
    same(saved[0], variables[0], 1e-6)
    again = kd.train.evaluate(model, (saved[0], variables[1]), [given])
    np.testing.assert_allclose(again["nll"], found["nll"], rtol=1e-6)


# --- bad input ------------------------------------------------------------------------------


def without(model, *names):
    def apply(*args, **kwargs):
        outputs, extra = model.apply(*args, **kwargs)
        return {k: v for k, v in outputs.items() if k not in names}, extra

    return model._replace(apply=apply)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (plain(3), plain(4), {"factor": 0}, "factor must be an integer at least 1"),
        (plain(3), plain(4), {"factor": 3}, "factor must divide the teacher's 4 channels"),
        (plain(3), plain(4), {"feature_weight": float("nan")}, "feature_weight must be a finite"),
        (plain(3), plain(4), {"student_tap": "logits"}, "output 'logits' must be feature maps"),
        (plain(3), plain(4), {"teacher_tap": "last"}, "the teacher's outputs has no entry 'last'"),
        (plain(3), plain(4), {"head": "feat"}, "'feat' must be a linear layer's parameters"),
        (plain(3), without(plain(4), "head"), {}, "teacher's outputs has no entry 'head'"),
    ],
)
def test_bad_input(student, teacher, options, message):
    with pytest.raises(ValueError, match=message):
        start(student, teacher, batch(), **options)


def test_a_teacher_needs_variables():
    learner = kd.minimize(simkd.simkd(plain(3), plain(4)), optax.sgd(0.1))
    with pytest.raises(ValueError, match="frozen is missing"):
        learner.init(jax.random.key(0), batch())


def test_only_its_own_states_are_deployed():
    given = batch()
    method = kd.distill(plain(3), None, {"hard": (1.0, kd.terms.hard_labels())})
    state = kd.minimize(method, optax.sgd(0.1)).init(jax.random.key(0), given)
    with pytest.raises(ValueError, match="state must be one of simkd"):
        simkd.deploy(plain(3), plain(4), state, given, plain(4).init(KEY, given["image"]))


KEY = jax.random.key(1)


def test_microbatches_are_refused():
    given = batch()
    _, state, frozen = start(plain(3), plain(4), given)
    learner = kd.minimize(simkd.simkd(plain(3), plain(4)), optax.sgd(0.1, momentum=0.9),
                          microbatches=2)  # fmt: skip
    with pytest.raises(ValueError, match="microbatches must be 1 with the term 'feature'"):
        learner.update(state, given, frozen)
