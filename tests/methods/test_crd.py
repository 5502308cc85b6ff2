"""CRD: published steps, its banks on one and several devices, and how it answers mistakes."""

from __future__ import annotations

from pathlib import Path

import contracts
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kdjax as kd
from kdjax._pairs import Model
from kdjax.methods import crd as module
from kdjax.methods.crd import crd

GOLDEN = Path(__file__).parents[1] / "losses" / "golden_families" / "crd.npz"
EXAMPLES, ROWS, WIDTH = 40, 12, 6
STEP, KEY = jnp.zeros((), jnp.int32), jax.random.key(0)


def net(width):
    """One hidden layer of a width of its own, whose units are the features."""

    def init(key, x):
        first, second = jax.random.split(key)
        return {
            "in": jax.random.normal(first, (x.shape[-1], width)) / 3,
            "out": jax.random.normal(second, (width, 4)) / 3,
        }, {}

    def apply(params, extra, x, *, train=False, key=None):
        hidden = jnp.tanh(x @ params["in"])
        return {"logits": hidden @ params["out"], "feat": hidden}, extra

    return Model(init, apply)


STUDENT, TEACHER = net(5), net(7)
TERMS = {"hard": (1.0, kd.terms.hard_labels())}


def make(**options):
    given = {
        "student_tap": "feat", "teacher_tap": "feat", "examples": EXAMPLES, "features": 3,
        "negatives": 8, "temperature": 0.5,
    }  # fmt: skip
    return crd(STUDENT, TEACHER, TERMS, **{**given, **options})


def batch(seed=0, rows=ROWS, **more):
    rng = np.random.default_rng(seed)
    made = {
        "image": rng.standard_normal((rows, WIDTH)).astype(np.float32),
        "label": rng.integers(0, 4, rows).astype(np.int32),
        "index": rng.permutation(EXAMPLES)[:rows].astype(np.int32),
    }
    return {**made, **more}


FROZEN = TEACHER.init(jax.random.key(1), batch()["image"])


def start(method=None, data=None):
    learner = kd.minimize(make() if method is None else method, optax.sgd(0.3))
    return learner, learner.init(jax.random.key(0), data or batch(), FROZEN)


# --- published steps ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("wide", [False, True])
def test_published_steps(dtype, wide, monkeypatch):
    """Two steps: values, gradients, banks and normalisers, by either way to the scores."""
    golden = np.load(GOLDEN)
    if not wide:  # a fixture so small would take the product with the whole bank

        def chosen_rows(v, bank, chosen):
            return jnp.einsum("bf,bkf->bk", v, bank[chosen].astype(v.dtype))

        monkeypatch.setattr(module, "_scores", chosen_rows)
    identity = Model(
        lambda key, x: ({"w": jnp.zeros(())}, {}),
        lambda params, extra, x, **_: ({"feat": x, "logits": 0 * x + params["w"]}, extra),
    )
    names = {"temperature": 1, "momentum": 4}
    constants = {k: float(golden["w__crd__contrast.params"][i]) for k, i in names.items()}
    other = {"feat": (0.0, kd.terms.matching(lambda s, t: s[:, 0]))}
    method = crd(
        identity, kd.from_batch(feat="teacher_feat", logits="teacher_feat"), other,
        student_tap="feat", teacher_tap="feat", examples=50, features=8, negatives=12,
        weight=1.0, **constants,
    )  # fmt: skip
    tolerance = 1e-9 if dtype is np.float64 else 1e-5

    def close(found, wanted):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())

    def layer(side):
        name = f"w__crd__embed_{side}.linear"
        return {
            "kernel": jnp.asarray(golden[f"{name}.weight"].T, dtype),
            "bias": jnp.asarray(golden[f"{name}.bias"], dtype),
        }

    with jax.enable_x64(dtype is np.float64):
        params = {
            "student": {"w": jnp.zeros(())},
            "terms": {"crd": {"student": layer("s"), "teacher": layer("t")}},
        }
        banks = {
            side: jnp.asarray(golden[f"w__crd__contrast.memory_v{i}"], dtype)
            for side, i in (("student", 1), ("teacher", 2))
        }
        log_z = {"student": jnp.zeros((), dtype), "teacher": jnp.zeros((), dtype)}
        extra = {"student": {}, "crd": {**banks, "log_z": log_z, "started": jnp.zeros((), bool)}}

        @jax.jit
        def run(params, image, extra, batch):
            batch = {**batch, "image": image}
            batch = method.prepare(params, extra, batch, None, key=KEY)
            return method.loss(params, extra, batch, None, step=STEP, key=KEY, axis_name=None)

        for name in ("step1", "step2"):
            data = {
                "teacher_feat": jnp.asarray(golden[f"in__f_t_{name}"], dtype),
                "index": jnp.asarray(golden[f"in__idx_{name}"]),
                "negatives": jnp.asarray(golden[f"in__contrast_idx_{name}"][:, 1:]),
            }
            image = jnp.asarray(golden[f"in__f_s_{name}"], dtype)
            (value, (extra, metrics)), (grads, of_image) = jax.jit(
                jax.value_and_grad(run, (0, 1), has_aux=True)
            )(params, image, extra, data)
            np.testing.assert_allclose(value, golden[f"loss__repdistiller__{name}"], rtol=tolerance)
            np.testing.assert_allclose(metrics["loss/crd"], value, rtol=1e-6)
            close(of_image, golden[f"grad__f_s_{name}__repdistiller__{name}"])
            for side in ("student", "teacher"):
                found = grads["terms"]["crd"][side]
                prefix = f"wgrad__crd__embed_{side[0]}.linear"
                close(found["kernel"], golden[f"{prefix}.weight__repdistiller__{name}"].T)
                close(found["bias"], golden[f"{prefix}.bias__repdistiller__{name}"])
        for side, i in (("student", 1), ("teacher", 2)):
            close(extra["crd"][side], golden[f"aux__repdistiller__memory_v{i}_after_step2"])
            z = golden["aux__repdistiller__params_after_step2_K_T_Zv1_Zv2_momentum"][1 + i]
            # theirs is stored in float32
            np.testing.assert_allclose(
                np.exp(extra["crd"]["log_z"][side]), z, rtol=max(tolerance, 2e-7)
            )


# --- negatives ------------------------------------------------------------------------------


def drawn(index, number=400, examples=EXAMPLES, labels=None, key=KEY):
    classes = None if labels is None else module._classes(labels, examples)
    classes = jax.tree.map(jnp.asarray, classes)
    return np.asarray(module._drawn(key, jnp.asarray(index), number, examples, classes))


def test_negatives_are_all_the_others():
    index = np.array([0, 3, EXAMPLES - 1])
    found = drawn(index, 4000)
    for i, row in zip(index, found, strict=True):
        counts = np.bincount(row, minlength=EXAMPLES)
        assert counts[i] == 0
        others = np.delete(counts, i)
        # Each is binomial with a deviation of 10 around 102.6.
        assert np.abs(others - 4000 / (EXAMPLES - 1)).max() < 45
    assert np.any(found[0] != found[1])


def test_negatives_of_other_classes():
    labels = np.random.default_rng(0).integers(0, 3, EXAMPLES)
    index = np.arange(EXAMPLES)
    found = drawn(index, 400, labels=labels)
    for i, row in zip(index, found, strict=True):
        assert set(row) == set(np.flatnonzero(labels != labels[i]))
    method = make(labels=labels)
    _, state = start(method)
    data = method.prepare(state.params, state.extra, batch(), FROZEN, key=KEY)
    assert np.all(labels[data["negatives"]] != labels[batch()["index"]][:, None])


def test_it_can_be_made_in_a_trace():
    """With a weight that is traced, say; the labels are known all the same."""
    labels = np.random.default_rng(0).integers(0, 3, EXAMPLES)

    @jax.jit
    def one(data, weight):
        return start(make(labels=labels, weight=weight), data)[1].extra["crd"]["classes"]

    wanted = module._classes(labels, EXAMPLES)
    for name, found in one(batch(), 0.5).items():
        np.testing.assert_array_equal(found, wanted[name])


def test_negatives_belong_to_the_example():
    """Whatever else is in the batch, and new in every step."""
    index = np.array([7, 2, 30, 5])
    whole = drawn(index)
    np.testing.assert_array_equal(drawn(index[2:]), whole[2:])
    assert np.any(drawn(index, key=jax.random.key(1)) != whole)


def test_scores_of_either_way():
    """With the whole bank or with the chosen rows, whichever is smaller."""
    v, bank = (jax.random.normal(jax.random.key(i), (n, 4)) for i, n in ((0, 3), (1, 30)))
    chosen = jax.random.randint(jax.random.key(2), (3, 11), 0, 30)
    for columns in (2, 11):  # 30 rows against 2 * 4 and 11 * 4
        some = chosen[:, :columns]
        found = module._scores(v, bank, some)
        wanted = np.einsum("bf,bkf->bk", v, np.asarray(bank)[some])
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


# --- banks ----------------------------------------------------------------------------------


def test_banks_start_and_are_written():
    method = make(momentum=0.25)
    learner, state = start(method)
    first = state.extra["crd"]
    bound = (3 / 3) ** -0.5
    for side in ("student", "teacher"):
        assert first[side].shape == (EXAMPLES, 3)
        assert 0.9 * bound < np.abs(first[side]).max() <= bound
    assert np.any(first["student"] != first["teacher"])
    assert not first["started"]
    update = jax.jit(learner.update)
    second, metrics = update(state, batch(), FROZEN)
    banks = second.extra["crd"]
    rows = np.zeros(EXAMPLES, bool)
    rows[batch()["index"]] = True
    for side, model, variables in (
        ("student", STUDENT, (state.params["student"], {})),
        ("teacher", TEACHER, FROZEN),
    ):
        np.testing.assert_array_equal(banks[side][~rows], first[side][~rows])
        layer = state.params["terms"]["crd"][side]
        features = model.apply(*variables, batch()["image"])[0]["feat"]
        v = np.asarray(features @ layer["kernel"] + layer["bias"][None])
        v = v / np.linalg.norm(v, axis=1, keepdims=True)
        new = 0.25 * np.asarray(first[side])[batch()["index"]] + 0.75 * v
        new = new / np.linalg.norm(new, axis=1, keepdims=True)
        np.testing.assert_allclose(banks[side][batch()["index"]], new, rtol=1e-5, atol=1e-6)
    assert banks["started"]
    third, _ = update(second, batch(1), FROZEN)
    for side in ("student", "teacher"):
        assert third.extra["crd"]["log_z"][side] == banks["log_z"][side] != 0
    assert np.any(third.params["terms"]["crd"]["teacher"]["kernel"]
                  != second.params["terms"]["crd"]["teacher"]["kernel"])  # fmt: skip
    assert set(metrics) == {"loss", "loss/hard", "loss/crd", "accuracy"}
    np.testing.assert_allclose(
        metrics["loss"], metrics["loss/hard"] + 0.8 * metrics["loss/crd"], rtol=1e-6
    )


def test_padding_neither_counts_nor_writes():
    """Rows of weight 0 may hold anything, any index too."""
    learner, state = start()
    update = jax.jit(learner.update)
    data = batch()
    padded = {k: np.concatenate([x, x[:4]]) for k, x in data.items()}
    padded["weight"] = np.r_[np.ones(ROWS), np.zeros(4)].astype(np.float32)
    padded["image"][ROWS:] = np.nan
    padded["index"][ROWS:] = [data["index"][0], -5, EXAMPLES + 9, 3]
    contracts.assert_close(
        update(state, padded, FROZEN), update(state, data, FROZEN), tolerance=1e-6
    )
    none = {**data, "weight": np.zeros(ROWS, np.float32)}
    kept, metrics = update(state, none, FROZEN)
    contracts.assert_same_bits(kept.extra, state.extra)
    assert metrics["loss/crd"] == 0
    np.testing.assert_array_equal(kept.params["student"]["in"], state.params["student"]["in"])


def test_of_rows_with_one_index_the_last_is_written():
    method = make()
    learner, state = start(method)
    data = batch()
    data["index"][[2, 9]] = data["index"][5]
    weight = np.ones(ROWS, np.float32)
    weight[9] = 0
    twice = jax.jit(learner.update)(state, {**data, "weight": weight}, FROZEN)[0]
    weight[2] = 0
    once = jax.jit(learner.update)(state, {**data, "weight": weight}, FROZEN)[0]
    for side in ("student", "teacher"):
        np.testing.assert_array_equal(
            twice.extra["crd"][side][data["index"][5]], once.extra["crd"][side][data["index"][5]]
        )


@pytest.mark.parametrize(
    "route",
    ["jit", "shard_map", pytest.param("shard_map_unchecked", marks=pytest.mark.slow), "pmap"],
)
def test_devices_agree(route):
    """Values, parameters and banks of four devices are those of one; duplicates across devices."""

    def weighted(seed):
        data = batch(seed, rows=16)
        data["index"][[1, 14]] = data["index"][6]
        # Padding falls unevenly over the devices: one has none of its rows left.
        weight = np.where(np.arange(16) % 5 == 1, 0, np.linspace(0.3, 2, 16))
        return {**data, "weight": np.where(np.arange(16) // 4 == 2, 0, weight).astype(np.float32)}

    learner, first = start(data=weighted(0))
    update = jax.jit(learner.update)
    mesh = jax.make_mesh((4,), (contracts.AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = kd.minimize(make(), optax.sgd(0.3), axis_name=contracts.AXIS)
    if route == "jit":
        run = contracts.jit_route(learner, mesh)
    elif route == "pmap":
        run = contracts.pmap_route(sharded, 4)
    else:
        run = contracts.shard_map_route(sharded, mesh, route)
    found = expected = first
    for seed in range(2):
        expected, metrics = update(expected, weighted(seed), FROZEN)
        found, found_metrics = run(found, jax.tree.map(jnp.asarray, weighted(seed)), FROZEN)
        contracts.assert_close((found, found_metrics), (expected, metrics), 2e-6)
    assert np.any(expected.extra["crd"]["student"] != first.extra["crd"]["student"])


def test_hyperparameters_are_traced():
    """Temperature, momentum and weight are annealed by schedules and never recompile."""

    @jax.jit
    def update(temperature, momentum, weight, state):
        method = make(temperature=temperature, momentum=momentum, weight=weight)
        return kd.minimize(method, optax.sgd(0.3)).update(state, batch(), FROZEN)[0]

    method = make(
        temperature=lambda step: 0.2 + step, momentum=lambda step: 0.9, weight=lambda step: 0.3
    )
    learner, state = start(method)
    found = update(0.2, 0.9, 0.3, state)
    contracts.assert_close(jax.jit(learner.update)(state, batch(), FROZEN)[0], found, 1e-5)
    update(0.4, 0.1, 0.5, state)
    assert update._cache_size() == 1


def test_augmented_images_are_what_both_see():
    """All images alike: so are the rows written, and drawn negatives belong to the index still."""

    def augment(key, batch):
        return {**batch, "image": batch["image"] * 0 + 1.0}

    learner, state = start(make(augment=augment, momentum=0.0))
    after, _ = jax.jit(learner.update)(state, batch(), FROZEN)
    for side in ("student", "teacher"):
        written = np.asarray(after.extra["crd"][side])[batch()["index"]]
        np.testing.assert_allclose(written, np.tile(written[:1], (ROWS, 1)), rtol=1e-5)


# --- mistakes -------------------------------------------------------------------------------


def test_microbatches_are_refused_by_name():
    learner = kd.minimize(make(), optax.sgd(0.1), microbatches=2)
    state = learner.init(jax.random.key(0), batch(), FROZEN)
    with pytest.raises(ValueError, match=r"microbatches must be 1 with the term 'crd'"):
        learner.update(state, batch(), FROZEN)


def test_index():
    learner = kd.minimize(make(), optax.sgd(0.1))
    data = batch()
    index = data.pop("index")
    with pytest.raises(ValueError, match=r"^batch has no entry 'index'.*CRD keeps a memory"):
        learner.init(KEY, data, FROZEN)
    for wrong in (EXAMPLES, -1):
        data["index"] = np.where(np.arange(ROWS) == 3, wrong, index)
        sentence = rf"^batch\['index'\] must be from 0 to 39, as examples=40, got {wrong}"
        with pytest.raises(ValueError, match=sentence):
            learner.init(KEY, data, FROZEN)
        # In a compiled update nobody can say so: the loss does, and the banks stay whole.
        state = start()[1]
        after, metrics = jax.jit(learner.update)(state, data, FROZEN)
        assert np.isnan(metrics["loss/crd"])
        for side in ("student", "teacher"):
            changed = np.any(after.extra["crd"][side] != state.extra["crd"][side], axis=1)
            assert set(np.flatnonzero(changed)) == set(np.delete(index, 3))
            assert np.all(np.isfinite(after.extra["crd"][side]))
    with pytest.raises(TypeError, match=r"^batch\['index'\] must be an integer array"):
        learner.init(KEY, {**data, "index": index.astype(np.float32)}, FROZEN)


def test_given_negatives_are_checked():
    learner, state = start()
    with pytest.raises(ValueError, match=r"^batch\['negatives'\] must have shape \(12, 8\)"):
        learner.update(state, batch(negatives=np.zeros((ROWS, 5), np.int32)), FROZEN)
    wrong = np.zeros((ROWS, 8), np.int32)
    wrong[3, 3] = EXAMPLES
    _, metrics = jax.jit(learner.update)(state, batch(negatives=wrong), FROZEN)
    assert np.isnan(metrics["loss/crd"])


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"examples": 1}, ValueError, r"^examples must be an integer at least 2, got 1"),
        ({"negatives": 0}, ValueError, r"^negatives must be an integer at least 1, got 0"),
        ({"features": 2.5}, TypeError, r"^features must be an integer at least 1, got float"),
        ({"temperature": 0.0}, ValueError, r"^temperature must be a finite number above 0"),
        ({"momentum": 1.5}, ValueError, r"^momentum must be a finite number at least 0 and at"),
        ({"weight": "all"}, TypeError, r"^weight must be a finite number, got str"),
        ({"labels": np.zeros(5, int)}, ValueError, r"^labels must have shape \(40,\)"),
        ({"labels": np.zeros(40, int)}, ValueError, r"^labels must have at least 2 classes"),
        ({"labels": np.arange(40) - 1}, ValueError, r"^labels must be classes from 0, got -1"),
        ({"labels": np.zeros(40)}, TypeError, r"^labels must be an integer array"),
    ],
)
def test_mistaken_options(options, error, sentence):
    with pytest.raises(error, match=sentence):
        make(**options)


def test_mistaken_parts():
    taps = {"student_tap": "feat", "teacher_tap": "feat", "examples": EXAMPLES}
    with pytest.raises(ValueError, match=r"^terms must have names other than 'crd'"):
        crd(STUDENT, TEACHER, {"crd": TERMS["hard"]}, **taps)
    with pytest.raises(TypeError, match=r"^teacher must be a kdjax.Model"):
        crd(STUDENT, None, TERMS, **taps)
    method = make(student_tap="nothing")
    with pytest.raises(ValueError, match=r"^the student's outputs has no entry 'nothing'"):
        start(method)
