"""The evaluation as a whole, and the signs of gradient masking, on a network trained for it."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from kdjax import attacks, augment, metrics
from kdjax.attacks import _batches, _masking, _report, _report_store

GOLDEN = np.load(Path(__file__).parent / "golden_report.npz")
PARAMS = {k[4:]: np.atleast_2d(GOLDEN[k]) for k in GOLDEN if k.startswith("mlp_")}
X = (GOLDEN["x"] / 16).astype(np.float32)[..., None]
Y = GOLDEN["y"].astype(np.int32)
EPS, KEY = 0.15, jax.random.key(0)
TESTED, HELD = slice(0, 70), slice(70, 100)


def apply(params, images):
    h = images.reshape(len(images), -1)
    h = jax.nn.relu(h @ params["W0"] + params["b0"])
    h = jax.nn.relu(h @ params["W1"] + params["b1"])
    return h @ params["W2"] + params["b2"]


MODEL = Partial(apply, PARAMS)


def evaluate(model=MODEL, *, x=X[TESTED], labels=Y[TESTED], **options):
    settings = {"eps": EPS, "key": KEY, "auto": False, "corruptions": False, "batch_size": 32}
    return attacks.evaluate(model, x, labels, **{**settings, **options})


@pytest.fixture(scope="module")
def whole():
    """Everything at once, with an AutoAttack of few steps."""
    small = functools.partial(
        attacks.auto_attack, steps=8, queries=20, attacks=("apgd_ce", "square")
    )
    few = {name: augment.corruptions(3)[name] for name in ("brightness", "pixelate")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_report, "auto_attack", small)
        return evaluate(
            auto=True, corruptions=few, validation=(X[HELD], Y[HELD]), keep=3, progress=False
        )


def test_reference_masks(whole):
    """The published implementations' figures, whose steps and starts are others."""
    robust = whole.robust
    np.testing.assert_array_equal(robust["clean"], GOLDEN["clean_correct"][TESTED])
    for name, wanted in (("pgd_20", "pgd20"), ("pgd_100", "pgd100"), ("cw_100", "cw100")):
        agrees = (robust[name] == GOLDEN[wanted][:, TESTED]).mean(axis=-1)
        assert agrees.min() >= 0.94, name
    lost = robust["worst_case"] != GOLDEN["auto_attack"][0, TESTED]
    assert lost.sum() <= 2


def test_worst_case_is_of_each_image(whole):
    robust = whole.robust
    names = ("clean", "pgd_20", "pgd_100", "cw_100", "auto_attack")
    wanted = np.logical_and.reduce([robust[name] for name in names])
    np.testing.assert_array_equal(robust["worst_case"], wanted)
    others = [whole.accuracy[name] for name in names]
    assert whole.accuracy["worst_case"] <= min(others) < np.mean(others)
    assert list(whole.accuracy) == list(robust)
    for name, mask in robust.items():
        assert mask.shape == (70,)
        assert mask.dtype == bool
        assert whole.accuracy[name] == mask.mean()
        if not name.startswith("auto_attack/"):
            assert not (mask & ~robust["clean"]).any()
    assert {name for name in robust if "/" in name} == {
        f"auto_attack/{name}" for name in ("apgd_ce", "square")
    }


def test_calibration(whole):
    logits = jnp.asarray(apply(PARAMS, X[TESTED]))
    held = jnp.asarray(apply(PARAMS, X[HELD]))
    temperature = metrics.fit_temperature(held, Y[HELD])
    scaled = whole.calibration["clean_scaled"]
    np.testing.assert_allclose(scaled["temperature"], temperature, rtol=1e-4)
    for found, z in ((whole.calibration["clean"], logits), (scaled, logits / temperature)):
        probs = jax.nn.softmax(z)
        wanted = {
            "ece": metrics.expected_calibration_error(probs, Y[TESTED]),
            "mce": metrics.maximum_calibration_error(probs, Y[TESTED]),
            "nll": metrics.negative_log_likelihood(z, Y[TESTED]),
            "brier": metrics.brier_score(probs, Y[TESTED]),
            "confidence": probs.max(-1).mean(),
        }
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)
    attacked = whole.calibration["pgd_20"]
    assert attacked["nll"] > 2 * whole.calibration["clean"]["nll"]
    assert whole.calibration["pgd_20_scaled"]["temperature"] > scaled["temperature"]
    assert whole.calibration["pgd_20_scaled"]["nll"] < attacked["nll"]


def test_stability_and_examples(whole):
    assert list(whole.stability) == ["random_noise", "brightness", "pixelate"]
    rows = _batches.split(X, Y, None)
    assert _report._functions(True, rows).keys() == augment.corruptions(3).keys()
    for found in whole.stability.values():
        assert 0.5 < found["unchanged"] <= 1
        assert 0.5 < found["accuracy"] <= 1
    assert whole.stability["random_noise"]["accuracy"] > whole.accuracy["pgd_20"] + 0.2
    shown = whole.examples
    np.testing.assert_array_equal(shown["image"], X[:3])
    assert 0.9 * EPS < np.abs(shown["x_adv"] - X[:3]).max() <= EPS + 1e-6
    clean, moved = (apply(PARAMS, shown[name]).argmax(-1) for name in ("image", "x_adv"))
    np.testing.assert_array_equal(shown["prediction"], clean)
    np.testing.assert_array_equal(shown["prediction_adv"], moved)
    np.testing.assert_array_equal((moved == Y[:3]) & (clean == Y[:3]), whole.robust["pgd_20"][:3])
    assert whole.examples.keys() == {"image", "x_adv", "label", "prediction", "prediction_adv"}
    assert evaluate().examples == {}


def test_batches_do_not_matter(whole):
    """Masks, temperatures and noise are those of the data set, not of its batches."""
    other = evaluate(batch_size=17, validation=(X[HELD], Y[HELD]))
    for name in ("clean", "pgd_20", "pgd_100", "cw_100"):
        np.testing.assert_array_equal(other.robust[name], whole.robust[name])
    assert other.stability["random_noise"] == whole.stability["random_noise"]
    for name, found in other.calibration.items():
        for number in found:
            np.testing.assert_allclose(
                found[number], whole.calibration[name][number], rtol=2e-3, err_msg=number
            )


def test_other_weights_compile_nothing(whole):
    """And neither do other radii, step sizes and severities."""
    programs = (_batches.attacked, _batches.logits_of)
    evaluate()
    before = [program._cache_size() for program in programs]
    other = evaluate(
        Partial(apply, jax.tree.map(lambda w: 0.5 * w, PARAMS)), eps=0.1, step_size=0.02
    )
    assert [program._cache_size() for program in programs] == before
    assert other.accuracy["clean"] != 0
    assert other.accuracy["pgd_100"] > whole.accuracy["pgd_100"]


def test_no_radius_no_attack():
    found = evaluate(eps=0.0)
    for mask in found.robust.values():
        np.testing.assert_array_equal(mask, found.robust["clean"])
    assert found.stability["random_noise"]["unchanged"] == 1


@pytest.fixture
def only_pgd_20(monkeypatch):
    """Programs of a hundred steps take long to compile, and add nothing here."""
    for name in ("pgd_100", "cw_100"):
        monkeypatch.delitem(_batches.ATTACKS, name)


@pytest.mark.usefixtures("only_pgd_20")
def test_a_nan_is_never_robust():
    """Off the data, logits of NaN for the label 0, whose argmax would be 0 as well."""

    def poisoned(images):
        off = jnp.abs(images * 16 - jnp.round(images * 16)).max((1, 2, 3)) > 1e-3
        return jnp.where(off[:, None], jnp.nan, jax.nn.one_hot(jnp.zeros(len(images), int), 10))

    zeros = np.zeros(70, np.int32)
    found = evaluate(lambda images: 5 * poisoned(images), labels=zeros)
    assert found.accuracy["clean"] == 1
    assert found.accuracy["pgd_20"] == found.accuracy["worst_case"] == 0
    assert found.stability["random_noise"]["unchanged"] == 0
    assert np.isnan(found.calibration["pgd_20"]["nll"])


@pytest.mark.usefixtures("only_pgd_20")
def test_l2_and_half_precision():
    half = Partial(lambda p, x: apply(p, x.astype(jnp.bfloat16)), jax.tree.map(
        lambda w: jnp.asarray(w, jnp.bfloat16), PARAMS
    ))  # fmt: skip
    found = evaluate(half, eps=0.4, norm="l2", keep=2)
    assert 0.5 < found.accuracy["worst_case"] < found.accuracy["clean"]
    length = np.sqrt(((found.examples["x_adv"] - X[:2]) ** 2).sum((1, 2, 3)))
    assert (length <= 0.4 + 1e-6).all()
    assert found.examples["x_adv"].dtype == np.float32


def test_killed_and_continued(tmp_path, monkeypatch):
    whole = evaluate(validation=(X[HELD], Y[HELD]), key=jax.random.key(1))
    calls = []

    def counting(stop):
        real = _batches.attacked

        def attacked(*arguments, steps, **options):
            if steps:
                calls.append(steps)
                if len(calls) == stop:
                    raise KeyboardInterrupt
            return real(*arguments, steps=steps, **options)

        return attacked

    settings = {
        "validation": (X[HELD], Y[HELD]),
        "key": jax.random.key(1),
        "checkpoint": tmp_path / "run",
    }
    monkeypatch.setattr(_report_store, "_SAVE_SECONDS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(_batches, "attacked", counting(6))
        with pytest.raises(KeyboardInterrupt):
            evaluate(**settings)
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(_batches, "attacked", counting(0))
        again = evaluate(**settings)
    assert len(calls) == 3 * 3 + 1 - 5  # three attacks of three batches, one held-out batch
    for name, mask in whole.robust.items():
        np.testing.assert_array_equal(again.robust[name], mask)
    assert again.calibration == whole.calibration
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"evaluation.npz"}
    for wrong, message in (
        ({"eps": 0.1}, "eps"), ({"key": KEY}, "key"), ({"validation": None}, "validation"),
        ({"model": Partial(apply, jax.tree.map(lambda w: 2 * w, PARAMS))}, "weights"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^checkpoint must be of this.*\(.*{message}"):
            evaluate(**{**settings, **wrong})
    (tmp_path / "run" / "evaluation.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^checkpoint must be a folder that evaluate has written"):
        evaluate(**settings)


def test_probabilities_are_noticed():
    """Before any attack runs: here every warning is an error."""
    with pytest.raises(UserWarning, match="probabilities rather than logits"):
        evaluate(lambda images: jax.nn.softmax(apply(PARAMS, images)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[TESTED] * 16}, ValueError, r"x must be images in \[0, 1\]"),
        ({"x": GOLDEN["x"][TESTED][..., None]}, TypeError, "x must be floating-point images"),
        ({"x": X[:0], "labels": Y[:0]}, ValueError, "x must be images"),
        ({"labels": Y[:69]}, ValueError, r"labels must have shape \(70,\)"),
        ({"labels": Y[TESTED] + 5}, ValueError, "labels must be class indices from 0 to 9"),
        ({"labels": X[:70, 0, 0, 0]}, TypeError, "labels must be an integer array"),
        ({"eps": -0.1}, ValueError, "eps must be .* at least 0"),
        ({"eps": float("nan")}, ValueError, "eps must be a finite number"),
        ({"step_size": -0.1}, ValueError, "step_size must be .* at least 0"),
        ({"norm": "l1"}, ValueError, "norm must be one of"),
        ({"batch_size": 0}, ValueError, "batch_size must be .* at least 1"),
        ({"keep": 71}, ValueError, "keep must be .* at most 70"),
        ({"key": 0}, TypeError, "key must be a typed key"),
        ({"key": jax.random.split(KEY, 70)}, ValueError, "key must be a single typed key"),
        ({"model": "net"}, TypeError, "logits_fn must be a function"),
        ({"model": lambda x: x}, ValueError, "logits_fn must return logits of shape"),
        ({"model": lambda x: apply(PARAMS, x) / 0}, ValueError, "logits_fn must return finite"),
        ({"validation": X}, TypeError, "validation must be a pair"),
        ({"validation": (X * 2, Y)}, ValueError, "validation must hold images like x"),
        ({"validation": (X, Y[:5])}, ValueError, "labels must have shape"),
        ({"corruptions": 5}, TypeError, "corruptions must be True, False or a dict"),
        ({"x": X[TESTED, ..., 0], "corruptions": True}, ValueError, "corruptions must be False"),
    ],
)
def test_bad_input(change, error, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error, match=f"^{message}"):
            evaluate(**change)


def test_not_inside_jit():
    with pytest.raises(TypeError, match=r"^x must be known"):
        jax.jit(lambda x: evaluate(x=x).accuracy)(X[TESTED])


# Models that hide their gradients, each in its own way.


def coarse(params, images):
    return jax.lax.stop_gradient(jnp.round(2 * apply(params, images)) / 2)


def saturated(params, images):
    return 1e3 * apply(params, images)


def backwards(params, images):
    """The right values with gradients of the wrong sign."""
    return apply(params, 2 * jax.lax.stop_gradient(images) - images)


@jax.custom_vjp
def _one_row(images):
    return images


def _one_row_backward(images, gradient):
    row = jnp.floor(1e3 * images.sum((1, 2, 3))).astype(int) % 8
    kept = jnp.arange(8)[None, :] == row[:, None]
    return (gradient * kept[:, :, None, None],)


_one_row.defvjp(lambda images: (images, images), _one_row_backward)


def shattered(params, images):
    """Only one row of pixels has a gradient, another one after every step."""
    return apply(params, _one_row(images))


@functools.cache
def masking(function, **options):
    settings = {"eps": EPS, "key": KEY, "queries": 200, "progress": False}
    found = attacks.gradient_masking(Partial(function, PARAMS), X, Y, **{**settings, **options})
    assert all(type(check.passed) is bool for check in found)
    return {check.name: check for check in found}


CHECKS = (
    "black_box", "more_steps", "unbounded", "zero_gradients", "rising_loss", "random_noise",
)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"norm": "l2", "eps": 0.8}, marks=pytest.mark.slow)],
    ids=["linf", "l2"],
)
def test_an_honest_model_passes(options):
    found = masking(apply, **options)
    assert tuple(found) == CHECKS
    assert all(check.passed for check in found.values()), found


@pytest.mark.parametrize(
    ("function", "signs"),
    [
        (coarse, {"black_box", "unbounded", "zero_gradients", "rising_loss", "random_noise"}),
        (saturated, {"unbounded", "zero_gradients", "rising_loss"}),
        pytest.param(
            backwards,
            {"black_box", "unbounded", "rising_loss", "random_noise"},
            marks=pytest.mark.slow,
        ),
        (shattered, {"more_steps"}),
    ],
    ids=["coarse", "saturated", "backwards", "shattered"],
)
def test_a_masking_model_is_caught(function, signs):
    found = masking(function)
    failed = {name for name, check in found.items() if not check.passed}
    assert signs <= failed, found
    # The network is as right as it was: only the gradients are other.
    assert found["black_box"].measured > -0.2


def test_gradients_of_nan_are_no_gradients():
    def broken(params, images):
        return apply(params, images + 0 * jnp.sqrt(images - jax.lax.stop_gradient(images)))

    _, batch = next(_batches.batches(_batches.split(X[:5], Y[:5], None)))
    assert _masking._vanishes(Partial(broken, PARAMS), batch).all()
    assert not _masking._vanishes(MODEL, batch).any()


def test_bad_input_of_masking():
    for change, message in (
        ({"eps": 0.0}, "eps must be .* above 0"),
        ({"queries": 0}, "queries must be .* at least 1"),
        ({"draws": 0}, "draws must be .* at least 1"),
        ({"x": X[..., 0]}, r"x must be images \[N, H, W, C\]"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            attacks.gradient_masking(
                MODEL, **{"x": X, "labels": Y, "eps": EPS, "key": KEY, **change}
            )
