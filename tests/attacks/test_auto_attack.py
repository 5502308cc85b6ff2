"""AutoAttack: the published results, and a driver whose result depends on nothing but the images.

The reference masks were made with the authors' implementation in float32. Its attacks by name run
five times from random starts where "standard" runs once, which is ``version="plus"`` here.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import attacks
from kdjax.attacks import _auto_attack as driver
from kdjax.attacks import _auto_attack_plan as plans
from kdjax.attacks import _auto_attack_progress as files

FILE = Path(__file__).parent / "golden_auto_attack.npz"
Partial = jax.tree_util.Partial
BROKEN_BY_SQUARE = "ignore:square, which uses no gradients"


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def key():
    return jax.random.key(0)


def apply_mlp(params, x):
    h = x.reshape(len(x), -1)
    for i in (0, 1):
        h = jax.nn.relu(jnp.dot(h, params[f"W{i}"]) + params[f"b{i}"][None])
    return jnp.dot(h, params["W2"]) + params["b2"][None]


def apply_conv(params, x):
    for name, stride in (("c1", 1), ("c2", 2), ("c3", 2)):
        x = jax.lax.conv_general_dilated(
            x, params[f"{name}_kernel"], (stride, stride), ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        x = jax.nn.relu(x + params[f"{name}_bias"].reshape(1, 1, 1, -1))
    return jnp.dot(x.reshape(len(x), -1), params["fc_kernel"]) + params["fc_bias"][None]


def network(golden, name):
    start = f"{name}_params_"
    params = {k.removeprefix(start): jnp.asarray(v) for k, v in golden.items() if start in k}
    return Partial({"mlp": apply_mlp, "conv": apply_conv}[name], params)


def images(golden, name="mlp"):
    return golden[f"{name}_x"], golden[f"{name}_y"]


def mask(golden, name, which):
    """[eps, seed, N] bool"""
    return np.unpackbits(golden[f"{name}_{which}"], axis=-1)[..., : len(golden[f"{name}_x"])] > 0


# A small problem for the driver: 30 images of 2 by 2 by 1 pixels, one class for each pixel.


def pixels(weights, x):
    return x.reshape(len(x), -1) * weights[None]


MODEL = Partial(pixels, jnp.ones(4))


def small(count=30, *, gap=0.6):
    x = np.random.default_rng(0).uniform(0, 0.4, (count, 4)).astype(np.float32)
    labels = (np.arange(count) % 4).astype(np.int32)
    x[np.arange(count), labels] = np.delete(x, 0, 1).max(1) + np.linspace(0, gap, count)
    x = np.clip(x, 0, 1)
    return x.reshape(count, 2, 2, 1), labels


def stand_in(strength, *, by_target=False):
    """An attack that draws once: it lowers the label's pixel, by a share of eps of its own."""

    def run(logits_fn, batch, eps, keys, settings):
        flat = batch.x.reshape(len(batch.x), -1)
        share = strength * jax.vmap(jax.random.uniform)(keys)[:, None]
        move = -jax.nn.one_hot(batch.labels, 4)
        if by_target:
            move = jax.nn.one_hot(batch.targets, 4) - 0.1 * jax.nn.one_hot(batch.labels, 4)
        x_adv = jnp.clip(flat + share * eps * move, 0, 1).reshape(batch.x.shape)
        return x_adv, jnp.argmax(logits_fn(x_adv), axis=-1) == batch.labels

    return run


# One object each, so that tests share their programs.
STAND_INS = {
    "apgd_ce": (stand_in(0.5), 1),
    "apgd_dlr": (stand_in(0.7), 1),
    "apgd_t": (stand_in(0.8, by_target=True), 1),
    "fab": (stand_in(0.8), 1),
    "fab_t": (stand_in(1.2, by_target=True), 1),
    "square": (stand_in(1.0), 1),
}


@pytest.fixture
def one_size(monkeypatch):
    """Smaller batches are filled up, so that there are few programs."""
    monkeypatch.setattr(driver, "_SIZES", 1)


@pytest.fixture
def stand_ins(monkeypatch, one_size):
    """Attacks that compile in no time, each of which leaves something to the next."""
    monkeypatch.setattr(plans, "_ATTACKS", STAND_INS)


@pytest.fixture
def several_sizes(stand_ins, monkeypatch):
    monkeypatch.setattr(driver, "_SIZES", 4)


def attack(x, labels, key, model=MODEL, **options):
    """On the small problem, without the warnings that it always gives."""
    options = {"eps": 0.2, "targets": 3, "progress": False, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "square, which uses")
        return attacks.auto_attack(model, x, labels, key=key, **options)


def same(found, wanted, *, tolerance=0.0):
    """Programs for batches of another size may round differently."""
    np.testing.assert_array_equal(found.robust, wanted.robust)
    np.testing.assert_allclose(found.x_adv, wanted.x_adv, rtol=0, atol=tolerance)
    assert list(found.per_attack) == list(wanted.per_attack)
    for name, survived in wanted.per_attack.items():
        np.testing.assert_array_equal(found.per_attack[name], survived)


# Against the published implementation.


@pytest.mark.filterwarnings(BROKEN_BY_SQUARE)
def test_standard_linf_is_the_published_one(golden, key, one_size):
    """With a tenth of the queries; the rest break no image here."""
    x, labels = images(golden)
    model, wanted = network(golden, "mlp"), mask(golden, "mlp", "aa_standard_linf_robust")[2]
    eps = golden["mlp_eps_linf"][2]
    found = attacks.auto_attack(model, x, labels, eps=eps, key=key, queries=500, targets=3)
    assert abs(found.robust.sum() - wanted.sum(-1).mean()) <= 2
    assert (found.robust != wanted[0]).sum() <= 2
    check_result(found, model, x, labels, eps, "linf")
    np.testing.assert_array_equal(found.per_attack["clean"], mask(golden, "mlp", "clean_correct"))


def test_one_attack_alone_is_the_published_one(golden, key, one_size):
    x, labels = images(golden)
    wanted = mask(golden, "mlp", "apgd_t_linf_robust")[0].sum(-1).mean()
    options = {"eps": 0.15, "attacks": ("apgd_t",), "key": key}
    found = attacks.auto_attack(network(golden, "mlp"), x, labels, **options)
    assert abs(found.robust.sum() - wanted) <= 2
    np.testing.assert_array_equal(found.robust, found.per_attack["apgd_t"])


@pytest.mark.slow
@pytest.mark.filterwarnings(BROKEN_BY_SQUARE)
@pytest.mark.parametrize(
    ("name", "norm", "seeds"), [("mlp", "linf", 2), ("mlp", "l2", 1), ("conv", "linf", 1)]
)
def test_standard_in_full(golden, name, norm, seeds):
    x, labels = images(golden, name)
    model, wanted = network(golden, name), mask(golden, name, f"aa_standard_{norm}_robust")
    for i, eps in enumerate(golden[f"{name}_eps_{norm}"]):
        found = [
            attacks.auto_attack(model, x, labels, eps=eps, norm=norm, key=jax.random.key(seed))
            for seed in range(seeds)
        ]
        robust = np.stack([each.robust for each in found])
        assert abs(robust.sum(-1).mean() - wanted[i].sum(-1).mean()) <= 2
        assert (robust[0] != wanted[i, 0]).sum() <= 2
        for each in found:
            check_result(each, model, x, labels, eps, norm)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_single_attacks_in_full(golden, name):
    x, labels = images(golden, name)
    model = network(golden, name)
    counts = {"apgd_ce": 3, "apgd_dlr": 3, "apgd_t": 1, "fab_t": 1, "square": 3}
    for which, seeds in counts.items():
        wanted = mask(golden, name, f"{which}_linf_robust")[0].sum(-1).mean()
        found = [
            attacks.auto_attack(
                model, x, labels, eps=0.15, version="plus", attacks=(which,),
                key=jax.random.key(seed),
            ).robust.sum()
            for seed in range(seeds)
        ]  # fmt: skip
        assert abs(np.mean(found) - wanted) <= (1 if which == "fab_t" else 2), which


def check_result(found, model, x, labels, eps, norm):
    """The invariants of any evaluation."""
    offset = (found.x_adv - x).reshape(len(x), -1)
    length = np.abs(offset).max(1) if norm == "linf" else np.linalg.norm(offset, axis=1)
    assert length.max() <= eps + 1e-6
    assert 0 <= found.x_adv.min() <= found.x_adv.max() <= 1
    np.testing.assert_array_equal(found.x_adv[found.robust], x[found.robust])
    wrong = np.asarray(jnp.argmax(jax.jit(model)(found.x_adv), -1)) != labels
    np.testing.assert_array_equal(wrong, ~found.robust)
    np.testing.assert_array_equal(found.robust, np.all([*found.per_attack.values()], axis=0))
    # An image is broken by one attack, or by none where the clean prediction is wrong.
    clean = found.per_attack["clean"]
    broken = sum((~m).astype(int) for name, m in found.per_attack.items() if name != "clean")
    np.testing.assert_array_equal(broken[clean], (~found.robust)[clean])
    assert (broken[~clean] == len(found.per_attack) - 1).all()


# The driver.


def test_batches_change_nothing_with_real_attacks(golden, key, one_size):
    check_batches(golden, key, attacks=("apgd_ce", "apgd_t"), targets=2)


@pytest.mark.slow
@pytest.mark.filterwarnings(BROKEN_BY_SQUARE)
@pytest.mark.parametrize("version", ["standard", "plus"])
def test_batches_change_nothing_in_full(golden, key, version):
    check_batches(golden, key, version=version, steps=20, queries=500)


def check_batches(golden, key, **options):
    x, labels = images(golden)
    model = network(golden, "mlp")
    found = {
        size: attacks.auto_attack(model, x, labels, eps=0.15, key=key, batch_size=size, **options)
        for size in (7, 100, None)
    }
    for name, survived in found[None].per_attack.items():
        np.testing.assert_array_equal(found[7].per_attack[name], survived)
        np.testing.assert_array_equal(found[100].per_attack[name], survived)
    assert 0.4 < found[7].robust.mean() < 0.8


@pytest.mark.parametrize("version", ["standard", "plus"])
def test_batches_and_other_images_change_nothing(several_sizes, key, version):
    x, labels = small()
    whole = attack(x, labels, key, version=version)
    assert len({mask.sum() for mask in whole.per_attack.values()}) > 2
    assert 0 < whole.robust.sum() < len(x)
    for size in (8, 1000):
        same(attack(x, labels, key, version=version, batch_size=size), whole, tolerance=1e-6)
    # The first twenty are what they were among thirty: nothing depends on who else is there.
    first = attack(x[:20], labels[:20], key, version=version, batch_size=8)
    np.testing.assert_array_equal(first.robust, whole.robust[:20])
    np.testing.assert_allclose(first.x_adv, whole.x_adv[:20], rtol=0, atol=1e-6)
    other = attack(x, labels, jax.random.key(1), version=version)
    assert (other.x_adv != whole.x_adv).any()


def test_versions_run_these_attacks(stand_ins, key):
    x, labels = small()
    order = {
        "standard": ["apgd_ce", "apgd_t", "fab_t", "square"],
        "plus": ["apgd_ce", "apgd_dlr", "fab", "square", "apgd_t", "fab_t"],
    }
    for version, names in order.items():
        assert list(attack(x, labels, key, version=version).per_attack) == ["clean", *names]
        plan = plan_of(version, classes=10)
        assert [s.name for s in plan if s.rank <= 1] == names
        for stage in plan:
            several = version == "plus" and stage.name in ("apgd_ce", "apgd_dlr", "fab")
            assert stage.settings.restarts == (5 if several else 1)
            assert stage.settings.samples == 1
            assert stage.settings.steps == (5000 if stage.name == "square" else 100)
        assert [s.rank for s in plan if s.name == "fab_t"] == list(range(1, 10))
    plan = plan_of("rand", classes=10)
    assert [(s.name, s.settings.samples) for s in plan] == [("apgd_ce", 20), ("apgd_dlr", 20)]
    found = attack(x, labels, key, attacks=("square", "apgd_ce"))
    assert list(found.per_attack) == ["clean", "square", "apgd_ce"]


def plan_of(version, *, classes, attacks=None):
    names = plans.names_of(version, attacks)
    return plans.stages(
        names, version, norm="linf", classes=classes, targets=9, steps=100, queries=5000,
        chosen=attacks is not None,
    )  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """(attack, rank, batch, settings) of every call of a compiled attack."""
    seen = []
    compiled = plans.attack

    def call(method, settings, model, batch, eps, key, number, rank):
        name = next(n for n, value in plans._NUMBERS.items() if value == number)
        seen.append((name, int(rank), batch, settings))
        return compiled(method, settings, model, batch, eps, key, number, rank)

    monkeypatch.setattr(plans, "attack", call)
    return seen


def test_only_what_is_robust_is_attacked(several_sizes, calls, key):
    x, labels = small()
    found = attack(x, labels, key, batch_size=8)
    left = found.per_attack["clean"].copy()
    for name in ("apgd_ce", "apgd_t", "fab_t", "square"):
        sizes = [batch.x.shape[0] for n, rank, batch, _ in calls if n == name and rank <= 1]
        attacked = [batch.place for n, rank, batch, _ in calls if n == name and rank <= 1]
        np.testing.assert_array_equal(np.unique(np.concatenate(attacked)), np.flatnonzero(left))
        assert set(sizes[:-1]) <= {8}
        assert sizes[-1] < 2 * (left.sum() - 8 * (len(sizes) - 1)) or sizes[-1] == 1
        left &= found.per_attack[name]
    # After each target too.
    ranks = [{*batch.place} for n, rank, batch, _ in calls if n == "apgd_t" and len(batch.place)]
    assert len(ranks) > 3
    shapes = {batch.x.shape[0] for *_, batch, _ in calls}
    assert shapes <= {8, 4, 2, 1}


def test_targets_are_ranked_by_the_clean_logits(stand_ins, calls, key):
    x, labels = small()
    attack(x, labels, key, batch_size=30)
    ranked = np.argsort(-x.reshape(30, 4), axis=1)
    seen = [(rank, batch) for name, rank, batch, _ in calls if name == "apgd_t"]
    assert [rank for rank, _ in seen] == [1, 2, 3]
    for rank, batch in seen:
        np.testing.assert_array_equal(batch.targets, ranked[batch.place, rank])
        assert (batch.targets != batch.labels).all()
    left = [len(set(batch.place.tolist())) for _, batch in seen]
    assert left[0] > left[-1]


def test_padding_and_batches_have_few_sizes():
    x = np.zeros((1000, 1))
    assert driver._sizes(None, x) == (256, 128, 64, 32)
    assert driver._sizes(100, x) == (100, 64, 32, 16)
    assert driver._sizes(3, x) == (3, 2, 1)
    assert driver._sizes(1, x) == (1,)
    assert driver._sizes(500, x[:5]) == (5, 4, 2, 1)


def test_other_weights_and_radii_compile_nothing(key, one_size):
    x, labels = small()
    traces = []

    def counted(weights, images):
        traces.append(images.shape)
        return pixels(weights, images)

    options = {"steps": 3, "queries": 3, "attacks": ("apgd_t", "fab_t", "square")}
    attack(x, labels, key, Partial(counted, jnp.ones(4)), eps=0.0, **options)
    before = len(traces)
    assert before > 4
    attack(x, labels, key, Partial(counted, 2 * jnp.ones(4)), eps=0.0, **options)
    attack(x, labels, jax.random.key(3), Partial(counted, jnp.ones(4)), eps=1e-6, **options)
    assert len(traces) == before


def test_a_plain_function_is_no_other_model(stand_ins, key):
    x, labels = small()
    options = {"attacks": ("apgd_ce",)}
    found = attack(x, labels, key, lambda images: images.reshape(-1, 4), **options)
    same(found, attack(x, labels, key, **options))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_radius_of_zero_moves_nothing(key, norm, one_size):
    x = np.random.default_rng(1).uniform(size=(8, 3, 3, 1)).astype(np.float32)
    labels = x.reshape(8, -1)[:, :4].argmax(1).astype(np.int32)
    labels[0] = (labels[0] + 1) % 4
    found = attack(
        x,
        labels,
        key,
        lambda z: z.reshape(-1, 9)[:, :4],
        eps=0.0,
        norm=norm,
        steps=2,
        queries=2,
        attacks=("apgd_ce", "square"),
    )
    np.testing.assert_array_equal(found.x_adv, x)
    np.testing.assert_array_equal(found.robust, np.arange(8) > 0)


def test_more_radius_breaks_more(golden, key):
    x, labels = images(golden)
    model = network(golden, "mlp")
    left = [
        attacks.auto_attack(model, x, labels, eps=eps, key=key, attacks=("apgd_ce",), steps=20)
        .robust.sum()
        for eps in (0.0, 0.05, 0.15, 0.3, 1.0)
    ]  # fmt: skip
    assert all(after <= before + 1 for before, after in itertools.pairwise(left))
    assert left[0] == 92
    assert left[-1] == 0


def test_nan_is_never_robust(key, one_size):
    """Where an attack walks into it; a gradient alone that is none says nothing but a warning."""
    x, labels = small()

    def cliff(images):
        z = images.reshape(-1, 4)
        edge = jnp.where(z[:, :1] < 0.95 * jnp.asarray(0.2), jnp.nan, 0.0)
        return 5 * z + edge

    x = np.clip(x, 0.2, 1)
    labels = x.reshape(30, 4).argmax(1).astype(np.int32)
    for names in (("apgd_ce",), ("square",)):
        found = attack(x, labels, key, cliff, attacks=names, eps=0.15, steps=10, queries=50)
        z = np.asarray(cliff(found.x_adv))
        broken = (z.argmax(1) != labels) | ~np.isfinite(z).all(1)
        np.testing.assert_array_equal(found.robust, ~broken)
        assert np.isnan(z).any()

    @jax.custom_vjp
    def steep(images):
        return images.reshape(-1, 4)

    steep.defvjp(lambda z: (steep(z), z.shape), lambda shape, g: (jnp.full(shape, jnp.nan),))
    with pytest.warns(UserWarning, match="zero or not finite for 100 %"):
        found = attack(x, labels, key, steep, attacks=("fab_t",), eps=0.001, steps=3)
    np.testing.assert_array_equal(found.robust, found.per_attack["clean"])
    np.testing.assert_array_equal(found.x_adv, x)


def test_what_a_fresh_look_classifies_correctly_is_not_broken(monkeypatch, key):
    """As in the published code: only what ends misclassified replaces an image."""

    def boast(logits_fn, batch, eps, keys, settings):
        return jnp.clip(batch.x + eps / 10, 0, 1), batch.labels < 0

    monkeypatch.setattr(plans, "_ATTACKS", {"apgd_ce": (boast, 1)})
    x, labels = small()
    found = attack(x, labels, key, attacks=("apgd_ce",))
    np.testing.assert_array_equal(found.robust, found.per_attack["clean"])
    np.testing.assert_array_equal(found.x_adv, x)


# Randomised defences.


def jittery(weights, x, key):
    """A defence that adds noise to its logits, from one key for a whole batch."""
    return pixels(weights, x) + 0.02 * jax.random.normal(key, (len(x), 4))


def test_randomised_models(key, one_size):
    x, labels = small()
    model = Partial(jittery, jnp.ones(4))
    options = {"version": "rand", "attacks": ("apgd_ce",), "steps": 5}
    found = attack(x, labels, key, model, **options)
    assert 0 < found.robust.sum() < found.per_attack["clean"].sum()
    # Every image draws for itself, though the model draws for a batch.
    few = attack(x, labels, key, model, batch_size=7, **options)
    np.testing.assert_array_equal(few.robust, found.robust)
    np.testing.assert_allclose(few.x_adv, found.x_adv, atol=1e-6)
    # A margin of more than twice the radius can't be lost but for the noise.
    ordered = np.sort(x.reshape(30, 4), axis=1)
    assert found.robust[ordered[:, 3] - ordered[:, 2] > 0.4 + 0.15].all()


# Warnings.


def test_changing_logits_are_told(stand_ins, key):
    x, labels = small()
    drawn = np.random.default_rng(0)

    def changing(images):
        return images.reshape(-1, 4) + 1e-2 * drawn.normal(size=(len(images), 4))

    with pytest.warns(UserWarning, match='use version="rand"') as seen:
        attack(x, labels, key, changing, attacks=("apgd_ce",))
    assert seen[0].filename == __file__


def test_probabilities_are_told(stand_ins, key):
    x, labels = small()
    with pytest.warns(UserWarning, match="probabilities rather than logits"):
        attack(x, labels, key, lambda z: jax.nn.softmax(z.reshape(-1, 4)), attacks=("apgd_ce",))


def test_vanishing_gradients_are_told(stand_ins, key):
    x, labels = small()

    def quantised(images):
        stepped = jnp.round(50 * images) / 50
        return jnp.where(images[:, :1] > 0.5, images, stepped).reshape(-1, 4)

    with pytest.warns(UserWarning, match=r"zero or not finite for (\d+\.?\d*) % of") as seen:
        attack(x, labels, key, quantised, attacks=("apgd_ce",))
    assert len(seen) == 1
    # Attacks without gradients don't ask for them.
    attack(x, labels, key, quantised, attacks=("square",))


def test_masked_gradients_are_told(key, one_size):
    """What only Square breaks is suspicious."""
    x, labels = small()

    def hidden(images):
        z = images.reshape(-1, 4)
        return jax.lax.stop_gradient(2 * z) - z

    with pytest.warns(UserWarning, match="square, which uses no gradients, broke"):
        attacks.auto_attack(
            hidden, x, labels, eps=0.2, key=key, attacks=("apgd_ce", "square"), steps=5,
            queries=100,
        )  # fmt: skip


def test_few_classes(stand_ins, key):
    x, _ = small()

    def classes(count):
        return lambda images: images.reshape(-1, 4)[:, :count]

    def run(count, **options):
        known = x.reshape(30, 4)[:, :count].argmax(1).astype(np.int32)
        return attack(x, known, key, classes(count), **{"targets": 9, **options})

    with pytest.warns(UserWarning, match="targets is reduced from 9 to 3: logits_fn has 4 classes"):
        assert len(run(4).per_attack) == 5
    with (
        pytest.warns(UserWarning, match="targets is reduced from 9 to 2"),
        pytest.warns(UserWarning, match="apgd_t needs at least 4 classes, logits_fn has 3"),
    ):
        assert list(run(3).per_attack) == ["clean", "apgd_ce", "fab_t", "square"]
    with (
        pytest.warns(UserWarning, match="apgd_dlr needs at least 3 classes, logits_fn has 2"),
        pytest.warns(UserWarning, match="apgd_t needs"),
    ):
        found = run(2, version="plus", targets=1)
    assert list(found.per_attack) == ["clean", "apgd_ce", "fab", "square", "fab_t"]
    with pytest.raises(ValueError, match="apgd_t needs at least 4 classes, logits_fn has 3"):
        run(3, attacks=("apgd_t",), targets=1)
    with pytest.raises(ValueError, match="at least 2 classes"):
        run(1)


# Continuing.


class Killed(Exception):
    pass


@pytest.fixture
def kill(monkeypatch):
    """kill(n): the n-th call of an attack from now on is the last. Gives the calls so far."""
    seen = [0, 0]
    compiled = plans.attack

    def call(*arguments):
        seen[0] += 1
        if seen[0] == seen[1]:
            raise Killed
        return compiled(*arguments)

    def arm(number):
        seen[:] = [0, number]
        return seen

    monkeypatch.setattr(plans, "attack", call)
    return arm


@pytest.mark.parametrize("at", [1, 2, 6, 11])
def test_a_killed_evaluation_continues(stand_ins, kill, key, tmp_path, at):
    x, labels = small()
    file = tmp_path / "state.npz"
    seen = kill(0)
    whole = attack(x, labels, key, batch_size=8)
    needed = seen[0]
    assert needed > 11
    seen = kill(at)
    with pytest.raises(Killed):
        attack(x, labels, key, batch_size=8, checkpoint=file)
    assert [p.name for p in tmp_path.iterdir()] == (["state.npz"] if at > 1 else [])
    seen = kill(0)
    same(attack(x, labels, key, batch_size=8, checkpoint=file), whole)
    assert seen[0] == needed - (at - 1)  # nothing is done twice
    seen = kill(1)
    same(attack(x, labels, key, batch_size=5, checkpoint=str(file)), whole)  # none is left
    assert seen[0] == 0


def test_it_may_continue_with_other_batches(several_sizes, kill, key, tmp_path):
    x, labels = small()
    file = tmp_path / "state.npz"
    kill(7)
    with pytest.raises(Killed):
        attack(x, labels, key, batch_size=8, checkpoint=file)
    kill(0)
    found = attack(x, labels, key, batch_size=4, checkpoint=file)
    same(found, attack(x, labels, key), tolerance=1e-6)


def test_a_write_that_fails_leaves_the_last_one(stand_ins, kill, key, tmp_path, monkeypatch):
    x, labels = small()
    file = tmp_path / "state.npz"
    written, save = [], np.savez

    def full(target, **arrays):
        written.append(1)
        if len(written) == 4:
            target.write(b"half")
            raise OSError("No space left on device")
        save(target, **arrays)

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        attack(x, labels, key, batch_size=8, checkpoint=file)
    assert [p.name for p in tmp_path.iterdir()] == ["state.npz"]
    seen = kill(0)
    found = attack(x, labels, key, batch_size=8, checkpoint=file)
    done = seen[0]
    seen = kill(0)
    same(found, attack(x, labels, key, batch_size=8))
    assert done == seen[0] - 3


def test_other_evaluations_are_refused(stand_ins, key, tmp_path):
    x, labels = small()
    file = tmp_path / "state.npz"
    attack(x, labels, key, checkpoint=file)
    brighter = x.copy()
    brighter[3, 0, 0, 0] += 1e-6
    changed = {
        r"\(images\)": {"x": brighter},
        r"\(labels\)": {"labels": np.roll(labels, 1)},
        r"\(key\)": {"key": jax.random.key(1)},
        r"\(eps\)": {"eps": 0.21},
        r"\(norm, attacks\)": {"norm": "l2", "attacks": ("apgd_ce",)},
        r"\(version, attacks\)": {"version": "plus"},
        r"\(targets\)": {"targets": 2},
        r"\(steps\)": {"steps": 99},
        r"\(queries\)": {"queries": 4999},
        r"\(weights\)": {"model": Partial(pixels, jnp.array([1.0, 1.0, 1.0, 1.001]))},
    }
    for words, change in changed.items():
        given = {"x": x, "labels": labels, "key": key, **change}
        with pytest.raises(ValueError, match=f"checkpoint must be of this evaluation.*{words}"):
            attack(**given, checkpoint=file)
    # A function that closes over its weights shows them only by what it answers.
    other = tmp_path / "closed.npz"
    attack(x, labels, key, lambda z: z.reshape(-1, 4), checkpoint=other)
    attack(x, labels, key, lambda z: (1 + 1e-6) * z.reshape(-1, 4), checkpoint=other)
    with pytest.raises(ValueError, match=r"\(the model\)"):
        attack(x, labels, key, lambda z: 1.05 * z.reshape(-1, 4), checkpoint=other)


@pytest.mark.parametrize("content", [b"", b"no archive", "arrays"])
def test_other_files_are_refused(stand_ins, key, tmp_path, content):
    x, labels = small()
    file = tmp_path / "state.npz"
    if content == "arrays":
        np.savez(file, x=x)
    else:
        file.write_bytes(content)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="checkpoint must be a file that auto_attack has written"):
        attack(x, labels, key, checkpoint=file)
    assert file.read_bytes() == before


def test_large_checkpoints_are_written_seldom(tmp_path, monkeypatch):
    """At a megabyte per second on average; the small ones of other tests after every batch."""
    x = np.zeros((64, 64, 64, 16), np.float32)  # 16 MiB
    now = [100.0]
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    state = files.Progress(x, np.ones(64, bool))
    file = files.Checkpoint(tmp_path / "large.npz", {}, np.zeros((64, 10)))
    written, save = [], np.savez
    monkeypatch.setattr(np, "savez", lambda *a, **k: (written.append(now[0]), save(*a, **k)))
    state.record(np.arange(48), 0, np.ones(48, bool), x[:48])  # 12 MiB
    for _ in range(60):
        now[0] += 1
        file.save(state)
    assert written == [101.0, 112.0, 123.0, 134.0, 145.0, 156.0]
    file.save(state, last=True)
    assert len(written) == 7


def test_a_stopped_bar_gives_back_the_terminal(stand_ins, kill, key, monkeypatch, capsys):
    x, labels = small()
    bars = []
    make = files.tqdm

    def shown(**options):
        assert options.pop("disable") is None
        bars.append(make(**options, disable=False, ascii=True, mininterval=0))
        return bars[-1]

    monkeypatch.setattr(files, "tqdm", shown)
    found = attack(x, labels, key, batch_size=8, progress=True)
    text = capsys.readouterr().err
    for word in ("apgd_ce", "apgd_t, target 3", "square", "100%"):
        assert word in text
    assert f"robust {100 * found.robust.mean():.1f} %" in text
    assert bars[0].n == pytest.approx(30)
    kill(5)
    with pytest.raises(Killed):
        attack(x, labels, key, batch_size=8, progress=True)
    assert capsys.readouterr().err.endswith("\n")


# Bad input.


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": np.full((4, 2, 2, 1), 1.5)}, ValueError, r"x must be images in \[0, 1\]"),
        (
            {"x": np.eye(4).reshape(4, 2, 2, 1) * [[[[1]]], [[[1]]], [[[2]]], [[[1]]]]},
            ValueError,
            "x must",
        ),
        ({"x": np.full((4, 2, 2, 1), np.nan)}, ValueError, r"x must be images in \[0, 1\]"),
        ({"x": np.zeros((4, 2, 2, 1), int)}, TypeError, "x must be floating-point"),
        ({"x": np.zeros((0, 2, 2, 1)), "labels": np.zeros(0, int)}, ValueError, "at least one"),
        ({"x": np.zeros((4, 4))}, ValueError, r"x must be images \[N, H, W, C\] for the attack"),
        ({"x": None}, TypeError, "x must be an array"),
        ({"norm": "l2"}, ValueError, "x must have at least 3 rows"),
        ({"labels": np.zeros(4)}, TypeError, "labels must be an integer"),
        ({"labels": np.zeros(3, int)}, ValueError, "labels must have shape"),
        ({"labels": np.array([0, 1, 2, 4])}, ValueError, "labels must be class indices.*got 4"),
        ({"labels": np.array([0, 1, 2, -1])}, ValueError, "labels must be class indices.*got -1"),
        ({"eps": -0.1}, ValueError, "eps must be"),
        ({"eps": np.nan}, ValueError, "eps must be"),
        ({"eps": np.ones(4)}, ValueError, "eps must be"),
        ({"norm": "l1"}, ValueError, "norm must be one of"),
        ({"version": "custom"}, ValueError, "version must be one of"),
        ({"attacks": ("apgd",)}, ValueError, "attacks must be one of"),
        ({"attacks": "square"}, TypeError, "attacks must be a sequence"),
        ({"attacks": ()}, TypeError, "attacks must be a sequence"),
        ({"attacks": ("square", "square")}, ValueError, "attacks must name each attack once"),
        ({"attacks": ("square",), "version": "rand"}, ValueError, "attacks must be one of"),
        ({"key": 0}, TypeError, "key must be a typed key"),
        ({"key": jax.random.split(jax.random.key(0), 4)}, ValueError, "key must"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"targets": 0}, ValueError, "targets must be"),
        ({"steps": -1}, ValueError, "steps must be"),
        ({"queries": 1.5}, TypeError, "queries must be"),
        ({"model": 3}, TypeError, "logits_fn must be a function"),
        ({"model": lambda z: z}, ValueError, "logits_fn must return logits of shape"),
        ({"model": lambda z: z.reshape(-1, 4) / 0}, ValueError, "finite logits.*4 of 4, image 0"),
    ],
)
def test_bad_input(stand_ins, key, change, error, words):
    x = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 2, 2, 1)
    given = {"x": x, "labels": np.full(4, 3), "key": key, **change}
    with pytest.raises(error, match=words) as raised:
        attack(**given)
    assert "\n" not in str(raised.value)


def test_it_is_no_function_to_jit(stand_ins, key):
    x, labels = small()
    with pytest.raises(TypeError, match=r"x must be known.*can't be jitted"):
        jax.jit(lambda x: attack(x, labels, key).robust)(x)
    with pytest.raises(TypeError, match="eps must be known"):
        jax.jit(lambda eps: attack(x, labels, key, eps=eps).robust)(0.1)
    with pytest.raises(TypeError, match="key must be known"):
        jax.jit(lambda key: attack(x, labels, key).robust)(key)
    with pytest.raises(TypeError, match="labels must be known"):
        jax.jit(lambda labels: attack(x, labels, key).robust)(labels)


def test_dtypes(stand_ins, key):
    """float64 stays where it is enabled; half precision is widened; jax arrays will do."""
    x, labels = small()
    options = {"attacks": ("apgd_ce",)}
    assert attack(x, labels, key, **options).x_adv.dtype == np.float32
    half = attack(
        jnp.asarray(x, jnp.bfloat16), jnp.asarray(labels), key, eps=jnp.float32(0.2), **options
    )
    assert half.x_adv.dtype == np.float32
    assert isinstance(half.robust, np.ndarray)
    same(attack(x.astype(np.float64), labels, key, **options), attack(x, labels, key, **options))
    with jax.enable_x64(True):
        wide = attack(x.astype(np.float64), labels, key, Partial(pixels, jnp.ones(4)), **options)
        assert wide.x_adv.dtype == np.float64


def test_bfloat16_models(golden, key, one_size):
    x, labels = images(golden)
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), network(golden, "mlp").args[0])
    model = Partial(lambda p, z: apply_mlp(p, z.astype(jnp.bfloat16)), params)
    found = attacks.auto_attack(model, x, labels, eps=0.15, key=key, attacks=("apgd_ce",))
    assert abs(found.robust.sum() - 54) <= 5


@pytest.mark.slow
def test_the_benchmark_runs():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "auto_attack.py"), "--quick"],
        env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        "clean", "apgd_ce", "apgd_t", "fab_t", "square", "all, warm", "all, first run",
    ]  # fmt: skip
