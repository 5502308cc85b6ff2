"""Adversarial training, TRADES, ADR and AWP: the published updates, and what must hold of each."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import contracts
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from method_cases import plain

import kdjax as kd
from kdjax.methods import adr, adversarial, awp

HERE = Path(__file__).parent
STEPS = dict(np.load(HERE / "golden_training.npz"))
AWP = dict(np.load(HERE / "golden_awp.npz"))
ATTACK = {"eps": 0.1, "step_size": 0.04, "steps": 2, "unroll": False}
ADR = {"temperature": 1.5, "mix": 0.8, "ema_decay": 0.9}


def normed() -> kd.Model:
    """A small network with batch statistics, which counts its passes in training mode."""

    def init(key, x):
        params, _ = plain().init(key, x)
        stats = {"mean": jnp.zeros(8), "var": jnp.ones(8), "passes": jnp.zeros((), jnp.int32)}
        return {**params, "scale": jnp.ones(8)}, stats

    def apply(params, extra, x, *, train=False, key=None):
        hidden = x @ params["w0"]
        if train:
            mean, var = hidden.mean(0), hidden.var(0)
            extra = {
                "mean": 0.9 * extra["mean"] + 0.1 * mean,
                "var": 0.9 * extra["var"] + 0.1 * var,
                "passes": extra["passes"] + 1,
            }
        else:
            mean, var = extra["mean"], extra["var"]
        hidden = params["scale"][None] * (hidden - mean[None]) / jnp.sqrt(var[None] + 1e-3)
        return {"logits": jax.nn.relu(hidden) @ params["w1"]}, extra

    return kd.Model(init, apply)


def batch(rows=16, **more):
    rng = np.random.default_rng(1)
    image = jnp.asarray(rng.uniform(size=(rows, 6)), jnp.float32)
    label = jnp.asarray(rng.integers(0, 5, rows), jnp.int32)
    return {"image": image, "label": label, "index": jnp.arange(rows), **more}


def with_noise(rows=16):
    noise = np.random.default_rng(2).uniform(-0.1, 0.1, size=(rows, 6))
    return batch(rows, noise=jnp.asarray(noise, jnp.float32))


def begin(method, data=None, **options):
    learner = kd.minimize(method, optax.sgd(0.1, momentum=0.9), **options)
    return learner, learner.init(jax.random.key(7), batch() if data is None else data)


def prepared(method, state, data, key=None):
    key = jax.random.key(3) if key is None else key
    prepare = jax.jit(partial(method.prepare, axis_name=None))
    return prepare(state.params, state.extra, data, None, step=state.step, key=key)


# The published codes


def published_network():
    init = {k.removeprefix("init/"): v for k, v in STEPS.items() if k.startswith("init/")}
    params = {k: jnp.asarray(v) for k, v in init.items() if "mean" not in k and "var" not in k}
    stats = {k: jnp.asarray(v) for k, v in init.items() if k not in params}

    def convolve(x, kernel, stride):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    def apply(params, extra, x, *, train=False, key=None):
        extra = dict(extra)
        for i in (1, 2):
            x = convolve(x, params[f"c{i}_kernel"], i)
            mean, var = extra[f"b{i}_mean"], extra[f"b{i}_var"]
            if train:
                moments = x.mean((0, 1, 2)), x.var((0, 1, 2))
                extra[f"b{i}_mean"] = 0.9 * mean + 0.1 * moments[0]
                extra[f"b{i}_var"] = 0.9 * var + 0.1 * moments[1]
                mean, var = moments
            one = (None, None, None)
            x = (x - mean[one]) / jnp.sqrt(var[one] + 1e-5) * params[f"b{i}_scale"][one]
            x = jax.nn.relu(x + params[f"b{i}_bias"][one])
        return {"logits": x.mean((1, 2)) @ params["fc_kernel"] + params["fc_bias"][None]}, extra

    return kd.Model(lambda key, x: (params, stats), apply), init


@pytest.mark.parametrize("name", ["plain_at", "pgd_awp", "trades_sgd"])
def test_two_updates_equal_the_published_code(name):
    with jax.enable_x64(True):
        student, init = published_network()
        number = {k: STEPS[k].item() for k in ("eps", "alpha", "attack_steps", "lr", "momentum")}
        options = {
            "eps": number["eps"], "step_size": number["alpha"], "steps": number["attack_steps"],
            "attack_mode": "batch_update", "ema_decay": STEPS["ema_decay"].item(), "unroll": False,
        }  # fmt: skip
        if name == "plain_at":
            method = adversarial.adversarial_training(student, **options)
        else:
            for hyper, short in (("temperature", "tau"), ("mix", "lam")):
                values = jnp.stack([STEPS[f"{name}/step{s}/{short}"] for s in (0, 1)])
                options[hyper] = lambda t, values=values: values[t]
            if name == "trades_sgd":
                options |= {"beta": STEPS["beta"].item(), "forward": "joint"}
            method = (adr.adr_trades if name == "trades_sgd" else adr.adr)(student, **options)
        optimizer = optax.chain(
            optax.add_decayed_weights(STEPS["weight_decay"].item()),
            optax.sgd(number["lr"], number["momentum"], nesterov=bool(STEPS[f"{name}/nesterov"])),
        )
        if name == "pgd_awp":
            learner = awp.minimize_all(method, optimizer, rho=STEPS[f"{name}/rho"].item())
        else:
            learner = kd.minimize(method, optimizer)
        update, state = jax.jit(learner.update), None
        for step in (0, 1):
            x, y, u = (jnp.asarray(STEPS[f"step{step}/{k}"]) for k in ("x", "y", "noise_u01"))
            noise = 0.001 * u if name == "trades_sgd" else number["eps"] * (2 * u - 1)
            data = {"image": x, "label": y, "noise": noise}
            state = learner.init(jax.random.key(0), data) if state is None else state
            if step == 1 and name == "plain_at":
                attacked = prepared(method, state, data)["attack_extra"]
                for k in ("b1_mean", "b2_var"):
                    wanted = STEPS[f"{name}/step1/after_attack/{k}"]
                    np.testing.assert_allclose(attacked[k], wanted, atol=1e-8)
            state, metrics = update(state, data)
            for k, wanted in (("loss", "loss"), ("adversarial_accuracy", "train_adv_acc")):
                found = metrics[k]
                np.testing.assert_allclose(found, STEPS[f"{name}/step{step}/{wanted}"], atol=1e-7)
        ema = state.extra["ema"]
        for kind, found in (
            ("student", {**state.params["student"], **state.extra["student"]}),
            ("ema", {**ema["params"], **ema["extra"]}),
        ):
            for k, start in init.items():
                moved = found[k] - start
                np.testing.assert_allclose(moved, STEPS[f"{name}/{kind}/{k}"], atol=1e-8)


def test_both_forms_of_awp_equal_the_published_codes():
    golden = dict(np.load(HERE.parent / "attacks" / "golden_gradient.npz"))
    names = ["W0", "b0", "W1", "b1", "W2", "b2"]

    def apply(params, extra, x, *, train=False, key=None):
        hidden = x.reshape(len(x), -1)
        for i in range(3):
            hidden = hidden @ params[f"W{i}"] + params[f"b{i}"][None]
            hidden = jax.nn.relu(hidden) if i < 2 else hidden
        return {"logits": hidden}, extra

    with jax.enable_x64(True):
        params = {k: jnp.asarray(golden[k]) for k in names}
        student = kd.Model(lambda key, x: (params, {}), apply)
        method = kd.distill(student, None, {"hard": (1.0, kd.terms.hard_labels())})
        data = {
            "image": jnp.asarray(golden["trades_linf_10"]),
            "label": jnp.asarray(golden["trades_y"]),
        }
        optimizer = optax.chain(
            optax.add_decayed_weights(AWP["weight_decay"].item()),
            optax.sgd(AWP["lr"].item(), AWP["momentum"].item()),
        )
        first = awp.minimize(method, optimizer, gamma=AWP["gamma"].item())
        second = awp.minimize_all(method, optimizer, rho=AWP["rho"].item())
        losses = {
            "at_after": ("loss_before", "at_loss_perturbed"),
            "adr_after1": ("adr_loss_first", "adr_loss_second"),
        }
        for learner, stages in ((first, ["at_after"]), (second, ["adr_after1", "adr_after2"])):
            state, update = learner.init(jax.random.key(0), data), jax.jit(learner.update)
            for stage in stages:
                state, metrics = update(state, data)
                for k in names[1:]:
                    moved = state.params["student"][k] - params[k]
                    np.testing.assert_allclose(moved, AWP[f"{stage}_{k}"], atol=1e-8)
                if stage in losses:
                    found = metrics["loss"], metrics["loss_perturbed"]
                    np.testing.assert_allclose(found, [AWP[k] for k in losses[stage]], atol=1e-8)


# Labels


def test_a_mix_of_zero_is_plain_adversarial_training():
    found = []
    for method in (
        adversarial.adversarial_training(normed(), ema_decay=0.9, **ATTACK),
        adr.adr(normed(), **{**ADR, "mix": 0.0}, **ATTACK),
    ):
        learner, state = begin(method)
        update = jax.jit(learner.update)
        for _ in range(2):
            state, _ = update(state, batch())
        found.append(state)
    contracts.assert_same_bits(*found)


def test_pgd_sees_the_rectified_labels_and_the_attack_of_trades_does_not():
    for make in (adr.adr, adr.adr_trades):

        def method(mix, make=make):
            return make(plain(), **{**ADR, "mix": mix}, **ATTACK)

        _, state = begin(method(0.0))
        options = {"step": state.step, "key": state.key, "axis_name": None}

        @jax.jit
        def run(mix, method=method, state=state, options=options):
            return method(mix).prepare(state.params, state.extra, with_noise(), None, **options)

        none, much = run(0.0), run(0.9)
        assert np.abs(none["target"] - much["target"]).max() > 0.1
        moved = np.abs(none["adversarial"] - much["adversarial"]).max()
        assert moved == 0 if make is adr.adr_trades else moved > 0.01


def test_the_teacher_sees_what_the_student_sees_in_evaluation_mode():
    """The same augmented images, the average's own statistics, no training mode."""
    modes = []
    model = normed()

    def apply(params, extra, x, *, train=False, key=None):
        modes.append(train)
        return model.apply(params, extra, x, train=train, key=key)

    def augment(key, data):
        return {**data, "image": jax.random.uniform(key, data["image"].shape)}

    method = adr.adr(kd.Model(model.init, apply), augment=augment, **ADR, **ATTACK)
    _, state = begin(method)
    shifted = jax.tree.map(lambda x: x + 0.5 if x.ndim else x, state.extra["ema"])
    state = state._replace(extra={**state.extra, "ema": shifted})
    modes.clear()
    found = prepared(method, state, batch())
    assert modes == [False, False]  # the teacher, and the attack's body
    logits, _ = model.apply(shifted["params"], shifted["extra"], found["image"])
    wanted = kd.labels.rectify(logits["logits"], batch()["label"], temperature=1.5, mix=0.8)
    np.testing.assert_allclose(found["target"], wanted, atol=1e-6)
    np.testing.assert_array_less(np.abs(found["adversarial"] - found["image"]), 0.1 + 1e-6)
    mass = np.take_along_axis(np.asarray(wanted), np.asarray(batch()["label"])[:, None], 1)
    np.testing.assert_allclose(found["true_class_mass"], mass[:, 0], atol=1e-6)


@pytest.mark.parametrize("make", [adr.adr, adr.adr_trades])
def test_the_average_gets_no_gradient(make):
    method = make(plain(), **ADR, **ATTACK, norm="l2")
    _, state = begin(method)

    @jax.jit
    @jax.grad
    def gradient(ema, params):
        options = {"step": state.step, "key": jax.random.key(0), "axis_name": None}
        extra = {**state.extra, "ema": ema}
        data = method.prepare(params, extra, batch(), None, **options)
        return method.loss(params, extra, data, None, **options)[0]

    for leaf in jax.tree.leaves(gradient(state.extra["ema"], state.params)):
        np.testing.assert_array_equal(leaf, jnp.zeros_like(leaf))


def test_unlabelled_rows_and_padding_do_not_count():
    data = with_noise()
    data["label"] = data["label"].at[10:].set(-1)
    few = jax.tree.map(lambda x: x[:10], data)
    learner, state = begin(adr.adr(plain(), **ADR, **ATTACK))
    update = jax.jit(learner.update)
    found, expected = update(state, data), update(state, few)
    contracts.assert_close(found, expected)
    after, metrics = update(state, {**few, "label": jnp.full(10, -1)})
    contracts.assert_same_bits(after.params, state.params)
    assert metrics["loss"] == 0
    assert np.isnan(metrics["adversarial_accuracy"])
    assert np.isnan(metrics["rectified_true_class_mass"])
    padded = {**data, "weight": jnp.r_[jnp.ones(10), jnp.zeros(6)]}
    padded["label"] = padded["label"].at[10:].set(255)
    padded["image"] = padded["image"].at[12:].set(jnp.nan)
    contracts.assert_close(update(state, padded), expected)


def test_probabilities_are_labels_of_plain_training():
    data = with_noise()
    hot = jax.nn.one_hot(data["label"], 5)
    method = adversarial.adversarial_training(plain(), **ATTACK)
    learner, state = begin(method)
    update = jax.jit(learner.update)
    expected, found = update(state, data), update(state, {**data, "label": hot})
    contracts.assert_close(found, expected)
    mixed = update(state, {**data, "label": 0.7 * hot + 0.3 * hot[::-1]})
    assert mixed[1]["loss"] != expected[1]["loss"]


# The average


def test_the_average_starts_as_the_student_and_follows_it_geometrically():
    for decay in (0.0, 0.5, 1.0):
        method = adversarial.adversarial_training(normed(), ema_decay=decay, **ATTACK)
        _, state = begin(method)
        now = {"params": state.params["student"], "extra": state.extra["student"]}
        contracts.assert_same_bits(state.extra["ema"], now)
        far = jax.tree.map(lambda x: x + jnp.asarray(2, x.dtype), now)
        extra = {"student": far["extra"], "ema": now}
        options = {"step": state.step, "key": state.key, "axis_name": None}
        for n in (1, 2, 3):
            extra = method.after({"student": far["params"]}, extra, {}, None, **options)
            for start, end, average in zip(
                *map(jax.tree.leaves, (now, far, extra["ema"])), strict=True
            ):
                if not jnp.issubdtype(start.dtype, jnp.floating):
                    assert average == end  # counters are copied
                    continue
                wanted = end + decay**n * (start - end)
                np.testing.assert_allclose(average, wanted, rtol=1e-6, atol=1e-6)
                if decay in (0.0, 1.0):
                    np.testing.assert_array_equal(average, end if decay == 0 else start)
        assert adr.averaged(state._replace(extra=extra))[1] is extra["ema"]["extra"]


def test_the_decay_may_be_a_schedule():
    method = adversarial.adversarial_training(
        plain(), ema_decay=lambda step: jnp.where(step < 1, 0.0, 1.0), **ATTACK
    )
    learner, state = begin(method)
    update = jax.jit(learner.update)
    first, _ = update(state, batch())
    second, _ = update(first, batch())
    contracts.assert_same_bits(first.extra["ema"]["params"], first.params["student"])
    contracts.assert_same_bits(second.extra["ema"]["params"], first.params["student"])


# The attack inside an update


@pytest.mark.parametrize(
    ("make", "options", "passes"),
    [
        (adversarial.adversarial_training, {}, 1),
        (adr.adr, {**ADR, "attack_mode": "batch_update"}, 3),
        (adversarial.trades, {}, 2),
        (adversarial.trades, {"forward": "joint"}, 1),
        (adversarial.trades, {"attack_mode": "batch_update"}, 5),
        (adr.adr_trades, {**ADR, "attack_mode": "batch_frozen", "forward": "joint"}, 1),
    ],
)
def test_which_passes_move_batch_statistics(make, options, passes):
    method = make(normed(), **ATTACK, **options)
    learner, state = begin(method)
    state, _ = jax.jit(learner.update)(state, batch())
    assert state.extra["student"]["passes"] == passes
    if "ema_decay" in options:
        assert state.extra["ema"]["extra"]["passes"] == passes
    lone = "attack_extra" in jax.eval_shape(
        partial(method.prepare, axis_name=None),
        state.params, state.extra, batch(), None, step=state.step, key=state.key,
    )  # fmt: skip
    assert lone == (options.get("attack_mode") == "batch_update")


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        (adversarial.adversarial_training, "eval"),
        (adversarial.adversarial_training, "batch_frozen"),
        (adversarial.trades, "eval"),
    ],
)
def test_in_evaluation_mode_an_image_does_not_see_the_others(make, mode):
    method = make(normed(), attack_mode=mode, **ATTACK)
    _, state = begin(method)
    data, order = with_noise(), np.random.default_rng(0).permutation(16)
    whole = prepared(method, state, data)["adversarial"]
    some = prepared(method, state, jax.tree.map(lambda x: x[order[:6]], data))["adversarial"]
    apart = np.abs(some - whole[order[:6]]).max()
    assert apart < 1e-6 if mode == "eval" else apart > 1e-3


def test_a_random_start_belongs_to_the_image():
    method = adversarial.adversarial_training(plain(), **{**ATTACK, "steps": 0})
    _, state = begin(method)
    whole = prepared(method, state, batch())
    order = np.random.default_rng(0).permutation(16)
    moved = prepared(method, state, jax.tree.map(lambda x: x[order], batch()))
    np.testing.assert_array_equal(moved["adversarial"], whole["adversarial"][order])
    unnamed = {k: v for k, v in batch().items() if k != "index"}
    found = prepared(method, state, unnamed)["adversarial"]
    np.testing.assert_array_equal(found, whole["adversarial"])
    later = prepared(method, state, batch(), jax.random.key(4))["adversarial"]
    assert (later != whole["adversarial"]).mean() > 0.9  # some are cut at the range
    method = adversarial.adversarial_training(plain(), random_start=False, **{**ATTACK, "steps": 0})
    np.testing.assert_array_equal(prepared(method, state, batch())["adversarial"], batch()["image"])


def test_a_radius_of_zero_is_training_without_an_attack():
    method = adversarial.adversarial_training(plain(), **{**ATTACK, "eps": 0.0})
    bare = kd.distill(plain(), None, {"hard": (1.0, kd.terms.hard_labels())})
    learner, state = begin(method)
    found = jax.jit(learner.update)(state, batch())[0]
    expected = jax.jit(begin(bare)[0].update)(state, batch())[0]
    contracts.assert_close(found.params, expected.params)


def test_without_its_divergence_trades_is_natural_training():
    data = with_noise()
    method = adversarial.trades(plain(), beta=0.0, **ATTACK)
    learner, state = begin(method)
    _, metrics = jax.jit(learner.update)(state, data)
    np.testing.assert_allclose(metrics["loss"], metrics["loss/natural"], rtol=1e-6)
    logits = plain().apply(state.params["student"], {}, data["image"])[0]["logits"]
    wanted = kd.losses.hard_label_cross_entropy(logits, data["label"]).mean()
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-5)
    assert metrics["loss/robust"] > 0


def test_separate_and_joint_passes_agree_without_batch_norm():
    found = []
    for how in ("joint", "separate"):
        learner, state = begin(adversarial.trades(plain(), forward=how, **ATTACK))
        found.append(jax.jit(learner.update)(state, with_noise()))
    contracts.assert_close(*found, 1e-5)


def test_batch_norm_under_attack_is_sharded_by_every_route():
    """Statistics are each device's own, so only that it runs, and that devices agree after."""
    method = adr.adr(normed(), attack_mode="batch_update", **ADR, **ATTACK)
    for route in ("jit", "shard_map", "shard_map_unchecked", "pmap"):
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        learner, state = begin(method, **({} if route == "jit" else {"axis_name": "data"}))
        if route == "jit":
            run = contracts.jit_route(learner, mesh)
        elif route == "pmap":
            run = contracts.pmap_route(learner, 2)
        else:
            run = contracts.shard_map_route(learner, mesh, route)
        state, metrics = run(state, with_noise(), None)
        assert state.extra["student"]["passes"] == 3
        assert np.isfinite(metrics["loss"])


def test_a_state_moved_by_the_attack_has_no_slices():
    method = adversarial.adversarial_training(normed(), attack_mode="batch_update", **ATTACK)
    with pytest.raises(ValueError, match="microbatches must be 1"):
        kd.minimize(method, optax.sgd(0.1), microbatches=2)


def products(learner, state):
    """How many matrix products an update has; a loop's body counts once."""
    return str(jax.make_jaxpr(learner.update)(state, batch())).count("dot_general")


def test_rectified_labels_cost_one_forward_pass():
    """`plain` has two products; those of the attack's body and the loss are back and forth."""
    counts = [
        products(*begin(method))
        for method in (
            adversarial.adversarial_training(plain(), **ATTACK),
            adversarial.adversarial_training(plain(), ema_decay=0.9, **ATTACK),
            adr.adr(plain(), **ADR, **ATTACK),
        )
    ]
    assert counts == [4 + 5, 4 + 5, 4 + 5 + 2]


# Schedules


def test_one_program_for_the_whole_schedule():
    schedule = adr.annealed((2.0, 1.0), (0.2, 0.9), total_steps=6)
    method = adr.adr(plain(), ema_decay=0.9, **schedule, **ATTACK)
    learner, state = begin(method)
    counted = contracts.Counter(learner.update)
    update = jax.jit(counted)
    for step in range(6):
        average = state.extra["ema"]["params"]
        logits = plain().apply(average, {}, batch()["image"])[0]["logits"]
        target = kd.labels.rectify(
            logits, batch()["label"],
            temperature=schedule["temperature"](step), mix=schedule["mix"](step),
        )  # fmt: skip
        wanted = jnp.take_along_axis(target, batch()["label"][:, None], 1).mean()
        state, metrics = update(state, batch())
        np.testing.assert_allclose(metrics["rectified_true_class_mass"], wanted, rtol=1e-5)
    assert counted.calls == 1


def test_schedules_approach_their_end():
    total = 200
    schedule = adr.annealed((2.5, 2.0), (0.7, 0.95), total_steps=total)
    for name, start, end in (("temperature", 2.5, 2.0), ("mix", 0.7, 0.95)):
        values = np.asarray(schedule[name](jnp.arange(total)))
        assert values[0] == np.float32(start)
        assert (np.diff(values) * np.sign(end - start) >= 0).all()
        gap = (start - end) * np.pi**2 / (4 * total**2)
        np.testing.assert_allclose(values[-1] - end, gap, atol=5e-7)
        assert schedule[name](5 * total) == np.float32(end)


def rates(recipe, steps_per_epoch, steps):
    optimizer = adr.optimizer(
        recipe, steps_per_epoch=steps_per_epoch, weight_decay=0.0, momentum=0.0
    )

    def step(state, _):
        update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        return state, -update

    return np.asarray(jax.lax.scan(step, optimizer.init(jnp.zeros(())), None, length=steps)[1])


def test_published_learning_rates():
    found = rates(adr.RECIPES["cifar10"], 2, 400)
    wanted = 0.1 * 0.1 ** ((np.arange(400) >= 200).astype(int) + (np.arange(400) >= 300))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    t = np.maximum(np.arange(400) - 1, 0)
    warm = 1e-6 + (0.4 - 1e-6) * t / 10
    wanted = np.where(t < 10, warm, 0.2 * (1 + np.cos(np.pi * t / 400)))
    np.testing.assert_allclose(
        rates(adr.RECIPES["cifar10+ddpm"], 4, 400), wanted, rtol=1e-4, atol=1e-8
    )


def test_published_optimizers():
    """Weight decay before momentum; none on normalisation with generated images."""
    params = {"bn": {"scale": jnp.ones(2), "bias": jnp.ones(2)}, "fc": {"kernel": jnp.ones((2, 2))}}
    zero = jax.tree.map(jnp.zeros_like, params)
    for name, on_norm in (("cifar10", True), ("cifar100+ddpm", False)):
        optimizer = adr.optimizer(adr.RECIPES[name], steps_per_epoch=1, weight_decay=0.5)
        state = optimizer.init(params)
        updates, state = optimizer.update(zero, state, params)
        assert (updates["fc"]["kernel"] < 0).all()
        assert (updates["bn"]["scale"] < 0).all() == on_norm
        assert (updates["bn"]["bias"] < 0).all() == on_norm
    for name, nesterov in (("cifar10", True), ("cifar10+awp", False)):
        ours = adr.optimizer(adr.RECIPES[name], steps_per_epoch=9)
        theirs = optax.chain(
            optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9, nesterov=nesterov)
        )
        states = [o.init(params) for o in (ours, theirs)]
        for _ in range(2):
            found, states[0] = ours.update(params, states[0], params)
            expected, states[1] = theirs.update(params, states[1], params)
            contracts.assert_close(found, expected)


# Adversarial weight perturbation


def shown():
    """An optimizer whose updates are the parameters that it is shown."""
    return optax.GradientTransformation(lambda p: (), lambda g, s, p=None: (p, s))


def test_without_perturbation_awp_is_the_plain_update():
    method = adversarial.adversarial_training(plain(), **ATTACK)
    learner, state = begin(method)
    expected, plain_metrics = jax.jit(learner.update)(state, batch())
    for make, size in ((awp.minimize, "gamma"), (awp.minimize_all, "rho")):
        one = make(method, optax.sgd(0.1, momentum=0.9), **{size: 0.0})
        found, metrics = jax.jit(one.update)(state, batch())
        contracts.assert_close(found, expected, 1e-7)
        assert metrics["loss"] == metrics["loss_perturbed"]
        np.testing.assert_allclose(metrics["loss"], plain_metrics["loss"], rtol=1e-6)


def test_awp_moves_uphill_by_its_size_and_restores_the_weights():
    method = adversarial.adversarial_training(normed(), **ATTACK)
    usual, state = begin(method)
    usual, _ = jax.jit(usual.update)(state, batch())
    state = state._replace(opt=())
    for make, size in ((awp.minimize, "gamma"), (awp.minimize_all, "rho")):
        learner = make(method, shown(), **{size: 0.05})
        found, metrics = jax.jit(learner.update)(state, batch())
        assert metrics["loss_perturbed"] > metrics["loss"]
        assert found.extra["student"]["passes"] == 1
        same = np.array_equal(found.extra["student"]["mean"], usual.extra["student"]["mean"])
        assert same == (make is awp.minimize_all)  # statistics of the first or the second pass
        for name, w in state.params["student"].items():
            # The weights themselves, and what the optimizer was shown: kernels, moved.
            away = found.params["student"][name] - w - w
            length = np.linalg.norm(np.ravel(away)) / np.linalg.norm(np.ravel(w))
            moved = make is awp.minimize and w.ndim > 1
            np.testing.assert_allclose(length, 0.05 if moved else 0.0, atol=1e-5)


def test_awp_leaves_zeros_and_what_its_mask_leaves():
    method = adversarial.adversarial_training(plain(), **ATTACK)
    _, state = begin(method)
    state = state._replace(opt=())

    def nothing(params):
        return jax.tree.map(lambda _: False, params)

    masked = awp.minimize(method, shown(), mask=nothing, gamma=0.5)
    _, metrics = jax.jit(masked.update)(state, batch())
    assert metrics["loss"] == metrics["loss_perturbed"]
    zeros = state._replace(params=jax.tree.map(jnp.zeros_like, state.params))
    after, metrics = jax.jit(awp.minimize_all(method, shown(), rho=0.5).update)(zeros, batch())
    assert metrics["loss"] == metrics["loss_perturbed"]
    contracts.assert_same_bits(after.params, zeros.params)


def test_sizes_of_awp_are_traced():
    method = adversarial.adversarial_training(plain(), **ATTACK)
    traces = []

    @jax.jit
    def perturbed(gamma, state):
        traces.append(1)
        learner = awp.minimize(method, optax.sgd(0.1), gamma=gamma)
        return learner.update(state, batch())[1]["loss_perturbed"]

    state = kd.minimize(method, optax.sgd(0.1)).init(jax.random.key(7), batch())
    assert perturbed(0.02, state) > perturbed(0.01, state) > perturbed(0.0, state)
    assert len(traces) == 1
    annealed = awp.minimize(
        method, optax.sgd(0.1), gamma=lambda step: jnp.where(step < 1, 0.0, 0.1)
    )
    state = annealed.init(jax.random.key(7), batch())
    update = jax.jit(annealed.update)
    state, first = update(state, batch())
    _, second = update(state, batch())
    assert first["loss_perturbed"] == first["loss"]
    assert second["loss_perturbed"] > second["loss"]


# Resuming


class Rows:
    """Batches that depend on the step alone."""

    def from_step(self, step):
        while True:
            rows = np.random.default_rng(step).integers(0, 16, 8)
            yield {k: np.asarray(v)[rows] for k, v in batch().items()}
            step += 1

    def describe(self):
        return {"dataset": "rows"}


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    schedule = adr.annealed((2.0, 1.0), (0.2, 0.9), total_steps=6)
    method = adr.adr(normed(), ema_decay=0.9, **schedule, **ATTACK)
    learner = kd.minimize(method, optax.sgd(0.1, momentum=0.9))
    fit = partial(kd.train.fit, learner, data=Rows(), progress=False)

    def start():
        return learner.init(jax.random.key(7), batch())

    unbroken = fit(state=start(), steps=6)
    for steps in (3, 6):
        state = fit(state=start(), steps=steps, checkpoint=tmp_path)
    contracts.assert_same_bits(state, unbroken)
    assert np.any(state.extra["ema"]["params"]["w0"] != state.params["student"]["w0"])


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"student": None}, TypeError, "student must be a kdjax.Model"),
        ({"eps": -0.1}, ValueError, "eps must be a finite number at least 0, got -0.1"),
        ({"step_size": -1.0}, ValueError, "step_size must be a finite number at least 0"),
        ({"steps": -1}, ValueError, "steps must be an integer at least 0, got -1"),
        ({"norm": "l1"}, ValueError, "norm must be one of l2, linf; got 'l1'"),
        ({"attack_mode": "train"}, ValueError, "attack_mode must be one of .*'train'"),
        ({"ema_decay": 1.5}, ValueError, "ema_decay must be .* at most 1, got 1.5"),
        ({"augment": 3}, TypeError, "augment must be a function"),
        ({"beta": -1.0}, ValueError, "beta must be a finite number at least 0, got -1"),
        ({"forward": "both"}, ValueError, "forward must be one of joint, separate; got 'both'"),
        ({"random_start": False}, ValueError, "random_start must be True"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number above 0, got 0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a finite number above 0"),
        ({"mix": 1.2}, ValueError, "mix must be .* at least 0 and at most 1, got 1.2"),
        ({"mix": -0.2}, ValueError, "mix must be .* at least 0 and at most 1, got -0.2"),
        ({"ema_decay": None, "mix": 0.5}, ValueError, "ema_decay must be a number"),
    ],
)  # fmt: skip
def test_factories_refuse(change, error, text):
    rectified = {"temperature", "mix"} & set(change)
    only_trades = {"beta", "forward", "random_start"} & set(change)
    makes = [adr.adr_trades]
    makes += [] if rectified else [adversarial.trades]
    makes += [] if only_trades else [adr.adr]
    makes += [] if rectified | only_trades else [adversarial.adversarial_training]
    for make in makes:
        good = {"temperature": 1.0, "mix": 0.5} if make in (adr.adr, adr.adr_trades) else {}
        with pytest.raises(error, match=text):
            make(**{"student": plain(), **good, **change})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"temperature": (1.0, 2.0)}, r"temperature must fall over training.*any_direction"),
        ({"mix": (0.9, 0.5)}, r"mix must rise over training.*any_direction"),
        ({"mix": (0.5, 1.2)}, "mix must be a finite number at least 0 and at most 1, got 1.2"),
        ({"temperature": (1.0, 0.0)}, "temperature must be a finite number above 0, got 0"),
        ({"temperature": 1.0}, r"temperature must be a pair \(start, end\)"),
        ({"total_steps": 0}, "total_steps must be an integer at least 1, got 0"),
    ],
)
def test_schedules_refuse(change, text):
    good = {"temperature": (2.0, 1.0), "mix": (0.5, 0.9), "total_steps": 10}
    with pytest.raises(ValueError, match=text):
        adr.annealed(**{**good, **change})
    if "any_direction" in text:
        adr.annealed(**{**good, **change}, any_direction=True)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"image": batch()["image"] * 3}, ValueError, r"x must be images in \[0, 1\].*inside the"),
        ({"image": batch()["image"][:0]}, ValueError, "x must have at least one image"),
        ({"image": jnp.ones((16, 6), jnp.int32)}, TypeError, "x must be floating-point images"),
        ({"image": jnp.ones((16, 6), jnp.uint8)}, TypeError, r"batch\['image'\] must be floating"),
        ({"label": jnp.full((16, 5), 0.3)}, ValueError, r"batch\['label'\] .* sum to 1"),
        ({"label": jnp.tile(jnp.array([-0.5, 1.5, 0, 0, 0]), (16, 1))}, ValueError, "from -0.5"),
    ],
)
def test_the_first_batch_is_looked_at(change, error, text):
    learner = kd.minimize(adversarial.adversarial_training(plain(), **ATTACK), optax.sgd(0.1))
    jax.eval_shape(learner.init, jax.random.key(0), batch())  # unless it has no values yet
    with pytest.raises(error, match=text):
        learner.init(jax.random.key(0), {**batch(), **change})


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"label": jax.nn.one_hot(batch()["label"], 5)},
            TypeError,
            "labels must be integer.*mixup",
        ),
        ({"label": batch()["label"][:3]}, ValueError, r"labels must have shape \(16,\)"),
        ({"label": None}, ValueError, "batch has no entry 'label'"),
        ({"noise": jnp.zeros((16, 5))}, ValueError, "noise must have shape .* like x"),
    ],
)
def test_updates_of_adr_refuse(change, error, text):
    learner, state = begin(adr.adr(plain(), **ADR, **ATTACK))
    data = {k: v for k, v in {**batch(), **change}.items() if v is not None}
    with pytest.raises(error, match=text):
        jax.eval_shape(learner.update, state, data)


def test_a_label_that_is_no_class_fails_loudly():
    learner, state = begin(adr.adr(plain(), **ADR, **ATTACK))
    data = batch()
    data["label"] = data["label"].at[0].set(5)
    _, metrics = jax.jit(learner.update)(state, data)
    assert np.isnan(metrics["loss"])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, o: awp.minimize(m, o, gamma=-0.1), ValueError, "gamma must be .* at least 0"),
        (lambda m, o: awp.minimize(m, o, proxy_learning_rate=-1.0), ValueError, "proxy_learning_r"),
        (lambda m, o: awp.minimize_all(m, o, rho=-0.1), ValueError, "rho must be .* got -0.1"),
        (lambda m, o: awp.minimize_all(m, o, rho="a"), TypeError, "rho must be a finite number"),
        (lambda m, o: awp.minimize(None, o), TypeError, "method must be a kdjax.Method"),
        (lambda m, o: awp.minimize_all(m, 0.1), TypeError, "optimizer must be an optax"),
        (lambda *_: adr.optimizer(adr.RECIPES["cifar10"], steps_per_epoch=0), ValueError, "steps"),
        (lambda m, o: adr.averaged(begin(m)[1]), ValueError, "state must be a State .* ema_decay"),
    ],
)  # fmt: skip
def test_awp_and_helpers_refuse(call, error, text):
    method = adversarial.adversarial_training(plain(), **ATTACK)
    with pytest.raises(error, match=text):
        call(method, optax.sgd(0.1))
