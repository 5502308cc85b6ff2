"""Losses of attacks and TRADES' divergence against the published codes, and their invariants."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses

GOLDEN = dict(np.load(Path(__file__).parent / "golden_adversarial.npz"))


def golden(name):
    return jnp.asarray(GOLDEN[name])


def with_gradient(loss, z):
    values, pull = jax.vjp(loss, z)
    return values, pull(jnp.ones_like(values))[0]


@pytest.mark.parametrize("name", ["cw_margin", "dlr", "dlr_t"])
def test_equals_the_published_code(name):
    with jax.enable_x64(True):
        y = golden("labels")
        loss = {
            "cw_margin": lambda z: losses.margin(z, y),
            "dlr": lambda z: losses.dlr(z, y),
            "dlr_t": lambda z: losses.targeted_dlr(z, y, golden("targets")),
        }[name]
        values, gradient = with_gradient(loss, golden("logits"))
        np.testing.assert_allclose(values, GOLDEN[name], atol=1e-10)
        np.testing.assert_allclose(gradient, GOLDEN[f"{name}_grad"], atol=1e-10)


def test_dlr_of_ties_and_of_a_label_in_third_place():
    with jax.enable_x64(True):
        y = golden("special_labels")
        values, gradient = with_gradient(lambda z: losses.dlr(z, y), golden("special_logits"))
        np.testing.assert_allclose(values, GOLDEN["special_dlr"], atol=1e-10)
        wanted = GOLDEN["special_dlr_grad_rows_0_3"]
        np.testing.assert_allclose(gradient[jnp.array([0, 3])], wanted, atol=1e-10)
        np.testing.assert_allclose(gradient[0], 0, atol=1e-10)  # constantly 1 there
        assert jnp.isfinite(gradient).all()


def test_dlr_sees_neither_shift_nor_scale():
    z, y = golden("logits").astype(jnp.float32), golden("labels")
    moved = 3.7 * z + 2.0
    np.testing.assert_allclose(losses.dlr(moved, y), losses.dlr(z, y), rtol=2e-4, atol=1e-5)
    targets = golden("targets")
    found = losses.targeted_dlr(moved, y, targets)
    np.testing.assert_allclose(found, losses.targeted_dlr(z, y, targets), rtol=2e-4, atol=1e-5)


def test_signs_say_whether_an_image_is_misclassified():
    z, y = golden("logits"), golden("labels")
    wrong = np.asarray(z.argmax(-1) != y)
    assert 0 < wrong.sum() < len(wrong)
    for loss in (losses.margin, losses.dlr):
        np.testing.assert_array_equal(loss(z, y) > 0, wrong)


def trades_loss(bias, beta, detach=False, soft=False):
    """The loss as a function of the last bias, which enters both sides."""
    natural, moved = (golden(f"{n}_logits") + bias[None] for n in ("natural", "adversarial"))
    held = jax.lax.stop_gradient(natural) if detach else natural
    target = golden("trades_soft_labels") if soft else golden("trades_labels")
    first = losses.hard_label_cross_entropy(natural, target).mean()
    return first + beta * losses.trades_kl(moved, held).mean()


def test_trades_equals_the_published_code():
    with jax.enable_x64(True):
        bias = jnp.zeros(10)
        moved, natural = golden("adversarial_logits"), golden("natural_logits")
        kl = losses.trades_kl(moved, natural).mean()
        np.testing.assert_allclose(kl, GOLDEN["trades_kl"], atol=1e-10)
        for beta in (1, 6):
            value, gradient = jax.value_and_grad(trades_loss)(bias, float(beta))
            np.testing.assert_allclose(value, GOLDEN[f"trades_b{beta}_loss"], atol=1e-10)
            np.testing.assert_allclose(gradient, GOLDEN[f"trades_b{beta}_g_b2"], atol=1e-10)
        value, gradient = jax.value_and_grad(trades_loss)(bias, 6.0, soft=True)
        np.testing.assert_allclose(value, GOLDEN["adr_trades_loss"], atol=1e-10)
        np.testing.assert_allclose(gradient, GOLDEN["adr_trades_g_b2"], atol=1e-10)


def test_the_natural_side_of_trades_is_not_held_fixed():
    with jax.enable_x64(True):
        detached = jax.grad(trades_loss)(jnp.zeros(10), 6.0, detach=True, soft=False)
        assert np.abs(detached - GOLDEN["trades_b6_g_b2"]).max() > 1e-3
        wrong = jax.grad(trades_loss)(jnp.zeros(10), 6.0, detach=True, soft=True)
        hard = np.abs(detached - GOLDEN["wrong_detached_g_b2"]).max()
        soft = np.abs(wrong - GOLDEN["wrong_detached_g_b2"]).max()
        assert min(hard, soft) < 1e-10  # that is the fault which others had


def test_trades_of_equal_outputs_is_zero_with_a_zero_gradient():
    z = golden("logits").astype(jnp.float32)
    value, pull = jax.vjp(losses.trades_kl, z, z)
    np.testing.assert_array_equal(value, jnp.zeros(len(z)))
    for gradient in pull(jnp.ones(len(z))):
        np.testing.assert_allclose(gradient, 0, atol=1e-6)
    one, two = jax.grad(lambda a, b: losses.trades_kl(a, b).sum(), (0, 1))(z, z[::-1])
    assert jnp.abs(one).max() > 0.1
    assert jnp.abs(two).max() > 0.1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_computed_in_float32(dtype):
    z, y = golden("logits").astype(dtype), golden("labels")
    for loss in (losses.margin, losses.dlr):
        found = loss(z, y)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, loss(z.astype(jnp.float32), y), rtol=1e-6)
    assert losses.trades_kl(z, z[::-1]).dtype == jnp.float32


def test_masked_and_unlabelled_rows_are_zero():
    z = golden("logits").astype(jnp.float32).at[0].set(jnp.nan)
    y = golden("labels").at[1].set(-1)
    where = jnp.arange(len(z)) > 0
    for loss in (losses.margin, losses.dlr):
        values, gradient = with_gradient(lambda z, loss=loss: loss(z, y, where=where), z)
        np.testing.assert_array_equal(values[:2], 0)
        np.testing.assert_array_equal(gradient[:2], 0)
        assert (values[2:] != 0).all()
    values, gradient = with_gradient(lambda z: losses.trades_kl(z, z[::-1], where=where), z)
    assert jnp.isnan(values[-1])  # its partner is the row that is NaN
    assert values[0] == 0


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda z, y: losses.margin(z[:, :1], y * 0), ValueError, "logits must have at least 2 cl"),
        (lambda z, y: losses.dlr(z[:, :2], y * 0), ValueError, "logits must have at least 3 cl"),
        (
            lambda z, y: losses.targeted_dlr(z[:, :3], y * 0, y * 0),
            ValueError,
            "logits must have at least 4 cl",
        ),
        (lambda z, y: losses.dlr(z, y + 10), ValueError, "labels must be class indices"),
        (lambda z, y: losses.dlr(z, y * 1.0), TypeError, "labels must be an integer"),
        (lambda z, y: losses.dlr(y[:, None], y), TypeError, "logits must be a floating"),
        (lambda z, y: losses.margin(z, y[:3]), ValueError, "labels must have shape"),
        (lambda z, y: losses.targeted_dlr(z, y, y[:3]), ValueError, "targets must have shape"),
        (lambda z, y: losses.targeted_dlr(z, y, y * 1.0), TypeError, "targets must be an integer"),
        (lambda z, y: losses.trades_kl(z, z[:3]), ValueError, "natural_logits must have shape"),
        (lambda z, y: losses.trades_kl(z, z, temperature=0.0), ValueError, "temperature must be a"),
    ],
)
def test_refuses(call, error, text):
    with pytest.raises(error, match=text):
        call(golden("logits").astype(jnp.float32), golden("labels"))
