"""Condensing with targets of every update, from the device, in groups and on several devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kdjax as kd
from kdjax.experiments import condense

KEY = jax.random.key(3)
STEPS, BATCH = 4, 8


@functools.cache
def net():
    return kd.from_linen(kd.models.MLP(3, features=(8,)), taps={"features": "pool"})


@functools.cache
def target():
    """Another network, which is not linear, and its variables."""
    model = kd.from_linen(kd.models.MLP(3, features=(5,)))
    return model, model.init(jax.random.key(7), images())


@functools.cache
def images(size=20):
    return np.random.default_rng(0).uniform(size=(size, 4, 4, 1)).astype(np.float32)


def pairs():
    labels = condense.outputs(*target(), images()[:4])
    return {"image": images()[:4], "target": labels}


def learned(given=None, targets=None, **options):
    settings = {
        "steps": STEPS, "batch_size": BATCH, "learning_rate": 1e-2, "pool_size": 2, "max_age": 5,
        "warm_up": False, "progress": False, "key": KEY,
    }  # fmt: skip
    given = images() if given is None else given
    return condense.condense(net(), given, targets, pairs(), **{**settings, **options})


@functools.cache
def stored():
    return learned(targets=condense.outputs(*target(), images()))


def live(**options):
    model, frozen = target()
    return learned(target=model, frozen=frozen, **options)


def close(a, b, tolerance=1e-4):  # where images move by some 1e-2
    return all(np.abs(a[name] - b[name]).max() < tolerance for name in ("image", "target"))


def equal(a, b):
    return all(np.array_equal(a[name], b[name]) for name in ("image", "target"))


def doubled(key, batch):
    return {**batch, "image": 2 * batch["image"]}


def test_live_targets_of_images_as_they_are_are_the_stored_ones():
    assert np.abs(stored()["image"] - images()[:4]).max() > 1e-2
    assert close(live(), stored())


def test_both_networks_see_the_augmented_images():
    wanted = learned(2 * images(), condense.outputs(*target(), 2 * images()))
    assert close(live(augment=doubled), wanted)
    # Targets of the images as they were would be others.
    assert not close(learned(2 * images(), condense.outputs(*target(), images())), wanted, 1e-3)


def test_augmentation_is_drawn_anew_in_every_update_and_repeats_to_the_bit():
    crop = kd.augment.compose(functools.partial(kd.augment.random_crop, padding=1))
    found = live(augment=crop)
    assert not close(found, stored(), 1e-3)
    assert equal(found, live(augment=crop))
    shifts = []

    def watched(key, batch):
        batch = crop(key, batch)
        jax.debug.callback(lambda x: shifts.append(np.asarray(x)), batch["image"])
        return batch

    # Every batch is all images, in another order.
    live(augment=watched, batch_size=20, steps=2)
    jax.effects_barrier()
    first, second = (np.sort(x.reshape(20, -1).sum(1)) for x in shifts)
    assert not np.allclose(first, second)


def test_the_target_network_runs_once_in_an_update():
    model, frozen = target()
    seen = []

    def apply(params, extra, x, *, train=False, key=None):
        jax.debug.callback(lambda rows: seen.append((len(rows), train)), x)
        return model.apply(params, extra, x, train=train, key=key)

    learned(target=model._replace(apply=apply), frozen=frozen)
    jax.effects_barrier()
    assert seen == [(BATCH, False)] * STEPS


@pytest.mark.parametrize("how", ["stored", "live"])
def test_from_the_device_in_groups_and_on_a_mesh_it_is_the_same(how):
    model, frozen = target()
    given = {"target": model, "frozen": frozen, "augment": doubled}
    if how == "stored":
        given = {"targets": condense.outputs(model, frozen, images())}
    plain = learned(**given)
    assert close(learned(**given, on_device=True), plain)
    mesh = kd.parallel.data_mesh(4)
    assert close(learned(**given, on_device=True, steps_per_call=3, mesh=mesh), plain)
    assert close(learned(**given, mesh=mesh), plain)


def test_uint8_images_are_scaled_in_the_update():
    raw = (255 * images()).astype(np.uint8)
    scaled = raw.astype(np.float32) * np.float32(1 / 255)
    wanted = learned(scaled, condense.outputs(*target(), scaled))
    targets = condense.outputs(*target(), scaled)
    assert close(learned(raw, targets), wanted)
    model, frozen = target()
    assert close(learned(raw, target=model, frozen=frozen, on_device=True), wanted)


def test_a_stopped_run_goes_on_to_the_bit_and_other_images_are_refused(tmp_path):
    flip = kd.augment.compose(kd.augment.random_flip)
    options = {"augment": flip, "on_device": True, "save_every": 2}
    unbroken = live(**options)

    def stop(step, record):
        if step == 2:
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    short = {**options, "checkpoint": folder}
    with pytest.raises(KeyboardInterrupt):
        live(**short, evaluate=lambda pairs: {}, report=stop)
    assert equal(live(**short), unbroken)
    other = images()[::-1].copy()
    with pytest.raises(ValueError, match="data must be what the run"):
        live(given=other, **short)


def test_bad_inputs():
    model, frozen = target()
    targets = condense.outputs(model, frozen, images())
    with pytest.raises(ValueError, match="targets must be None with a target network"):
        learned(targets=targets, target=model, frozen=frozen)
    with pytest.raises(ValueError, match="targets must be None with a target network"):
        learned()
    with pytest.raises(ValueError, match="frozen is missing"):
        learned(target=model)
    with pytest.raises(ValueError, match="augment must be None without a target network"):
        learned(targets=targets, augment=doubled)
    with pytest.raises(TypeError, match="images must be a floating-point array"):
        learned((9 * images()).astype(np.int32), targets)
    with pytest.raises(ValueError, match="targets must"):
        learned(targets=targets[1:])
    wide = kd.from_linen(kd.models.MLP(9, features=(5,)))
    other = wide.init(KEY, jnp.asarray(images()))
    with pytest.raises(ValueError, match=r"batch\['target'\] must have shape"):
        learned(target=wide, frozen=other)
