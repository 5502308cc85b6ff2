"""FGSM, PGD and TRADES' attack: the published codes' images, and what must hold of any attack."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import attacks, losses

GOLDEN = dict(np.load(Path(__file__).parent / "golden_gradient.npz"))
NORMS = ("linf", "l2")


def mlp(x, dtype=None):
    hidden = x.reshape(len(x), -1)
    for i in range(3):
        kernel, bias = (jnp.asarray(GOLDEN[f"{name}{i}"], dtype) for name in "Wb")
        hidden = hidden @ kernel + bias[None]
        hidden = jax.nn.relu(hidden) if i < 2 else hidden
    return hidden


def golden(name):
    return jnp.asarray(GOLDEN[name])


def largest_loss(labels, of=losses.hard_label_cross_entropy, scale=1.0):
    return lambda x: of(mlp(x, x.dtype), labels) * scale


# The published codes


@pytest.mark.parametrize(
    ("name", "steps"), [("hard", 0), ("hard", 1), ("hard", 10), ("soft", 5), ("cw", 10)]
)
def test_pgd_equals_the_published_code(name, steps):
    with jax.enable_x64(True):
        labels = golden("pgd_soft_labels" if name == "soft" else "pgd_y")
        of = losses.margin if name == "cw" else losses.hard_label_cross_entropy
        found = attacks.pgd(
            largest_loss(labels, of), golden("pgd_x"), eps=GOLDEN["pgd_eps"],
            step_size=GOLDEN["pgd_alpha"], steps=steps, noise=golden("pgd_noise_linf"),
        )  # fmt: skip
        np.testing.assert_allclose(found, GOLDEN[f"pgd_{name}_{steps}"], atol=1e-8)


@pytest.mark.parametrize("steps", [0, 10])
def test_l2_pgd_equals_the_published_code(steps):
    with jax.enable_x64(True):
        normal, radius = golden("pgd_l2_normal"), golden("pgd_l2_radius_u")
        length = jnp.sqrt((normal**2).sum((1, 2, 3), keepdims=True))
        noise = normal / length * radius[:, None, None, None] * GOLDEN["pgd_l2_eps"]
        # That code's gradient is of the mean over its 32 images, beside a guard of 1e-10.
        found = attacks.pgd(
            largest_loss(golden("pgd_y"), scale=1 / 32), golden("pgd_x"),
            eps=GOLDEN["pgd_l2_eps"], step_size=GOLDEN["pgd_l2_alpha"], steps=steps,
            noise=noise, norm="l2",
        )  # fmt: skip
        np.testing.assert_allclose(found, GOLDEN[f"pgd_l2_{steps}"], atol=1e-8)


@pytest.mark.parametrize(("norm", "steps"), [("linf", 0), ("linf", 10), ("l2", 1), ("l2", 5)])
def test_trades_attack_equals_the_published_code(norm, steps):
    with jax.enable_x64(True):
        wanted = GOLDEN[f"trades_{norm}_{steps}"]
        rows = len(wanted)
        found = attacks.trades_attack(
            mlp, golden("trades_x")[:rows], steps=steps, norm=norm,
            eps=GOLDEN["trades_eps" if norm == "linf" else "trades_l_2_eps"],
            step_size=GOLDEN["trades_step_size"] if norm == "linf" else None,
            noise=0.001 * golden("trades_noise")[:rows],
        )  # fmt: skip
        np.testing.assert_allclose(found, wanted, atol=1e-8)


# Any attack, in float32


X = jnp.asarray(GOLDEN["pgd_x"], jnp.float32)
Y = jnp.asarray(GOLDEN["pgd_y"])
KEY = jax.random.key(0)


def fgsm(x, labels, key, *, eps, norm, steps=1):
    return attacks.fgsm(largest_loss(labels), x, eps=eps, norm=norm)


def pgd(x, labels, key, *, eps, norm, steps=3, **options):
    loss_fn = largest_loss(labels)
    options = {"step_size": eps / 2, "steps": steps, "unroll": False, **options}
    return attacks.pgd(loss_fn, x, eps=eps, norm=norm, key=key, **options)


def trades(x, labels, key, *, eps, norm, steps=3):
    return attacks.trades_attack(
        partial(mlp, dtype=x.dtype), x, eps=eps, steps=steps, norm=norm, key=key, unroll=False
    )


ATTACKS = {"fgsm": fgsm, "pgd": pgd, "best_pgd": partial(pgd, best=True), "trades": trades}


def length(d, norm):
    flat = np.asarray(d, np.float64).reshape(len(d), -1)
    return np.abs(flat).max(1) if norm == "linf" else np.sqrt((flat**2).sum(1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("name", "steps"), [("fgsm", 1), ("pgd", 0), ("trades", 0), ("best_pgd", 3), ("trades", 3)]
)
def test_stays_in_the_ball_and_in_the_range(name, norm, steps):
    # A ball so wide that the range cuts it, and one that it doesn't; one program for both.
    attack = jax.jit(partial(ATTACKS[name], norm=norm, steps=steps))
    for eps in (0.1, 0.6 if norm == "linf" else 5.0):
        found = attack(X, Y, KEY, eps=eps)
        assert found.dtype == jnp.float32
        assert found.min() >= 0
        assert found.max() <= 1
        assert length(found - X, norm).max() <= eps + 1e-6
        if steps:
            assert length(found - X, norm).max() > 0.9 * min(eps, 0.5)
    np.testing.assert_array_equal(attack(X, Y, KEY, eps=0.0), X)


@pytest.mark.parametrize("name", ["pgd", "trades"])
def test_stays_in_the_ball_in_float64(name):
    with jax.enable_x64(True):
        x = golden("pgd_x")
        for norm in NORMS:
            found = ATTACKS[name](x, golden("pgd_y"), KEY, eps=0.3, norm=norm)
            assert found.dtype == jnp.float64
            assert length(found - x, norm).max() <= 0.3 + 1e-12


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["best_pgd", "trades"])
def test_an_image_does_not_see_the_others(name, norm):
    """Rows of a batch in another order, or alone, with keys of their own, give the same."""
    attack = jax.jit(partial(ATTACKS[name], eps=0.2, norm=norm))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(len(X)))
    whole = attack(X, Y, keys)
    np.testing.assert_array_equal(whole, attack(X, Y, KEY))
    order = np.random.default_rng(0).permutation(len(X))
    np.testing.assert_allclose(attack(X[order], Y[order], keys[order]), whole[order], atol=1e-6)
    np.testing.assert_allclose(attack(X[:2], Y[:2], keys[:2]), whole[:2], atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_and_the_best_iterate_are_stronger(norm):
    eps, loss_fn = 0.1 if norm == "linf" else 1.0, largest_loss(Y)
    direction = jnp.sin(jnp.arange(64.0)) * (2 if norm == "linf" else 9)

    def waves(x):  # which long steps overshoot
        return jnp.sin(x.reshape(len(x), -1) @ direction)

    @jax.jit
    def run():
        attack = partial(pgd, X, Y, KEY, eps=eps, norm=norm)
        start, last = loss_fn(attack(steps=0)), loss_fn(attack())
        options = {"eps": eps, "step_size": eps, "steps": 3, "norm": norm, "key": KEY}
        return (
            start,
            last,
            *(
                waves(attacks.pgd(waves, X, best=best, unroll=False, **options))
                for best in (False, True)
            ),
        )

    start, last, wave_last, wave_best = run()
    assert last.mean() > start.mean() + 0.2
    assert (wave_best >= wave_last - 1e-6).all()
    assert (wave_best > wave_last + 1e-2).any()


def test_best_never_returns_worse_than_the_start():
    """A loss that falls along its own gradient: steps of twice the distance to the top."""

    def peak(x):
        return -((x - 0.5) ** 2).sum((1, 2, 3))

    x = jnp.full((2, 2, 2, 1), 0.5)
    found = attacks.pgd(peak, x, eps=0.3, step_size=0.3, steps=3, best=True, unroll=False)
    np.testing.assert_array_equal(found, x)


def test_nan_losses_do_not_win():
    def broken(x):
        return jnp.where(x[:, 0, 0, 0] > 0.55, jnp.nan, x.sum((1, 2, 3)))

    x = jnp.full((1, 2, 2, 1), 0.5)
    found = attacks.pgd(broken, x, eps=0.2, step_size=0.04, steps=4, best=True, unroll=False)
    np.testing.assert_allclose(found, 0.54, atol=1e-6)


def test_eager_jitted_looped_and_unrolled_agree():
    options = {"eps": 0.1, "norm": "linf", "steps": 3}
    wanted = pgd(X, Y, KEY, unroll=True, **options)
    np.testing.assert_allclose(pgd(X, Y, KEY, unroll=False, **options), wanted, atol=1e-6)
    np.testing.assert_allclose(jax.jit(partial(pgd, **options))(X, Y, KEY), wanted, atol=1e-6)
    # On the CPU short loops are unrolled unless told otherwise, long ones never.
    for steps, unroll, written in ((3, False, 1), (3, None, 3), (40, None, 1), (40, True, 40)):
        attack = partial(pgd, eps=0.1, norm="linf", steps=steps, unroll=unroll)
        assert f"unroll={written}\n" in str(jax.make_jaxpr(attack)(X, Y, KEY))


def test_radius_and_step_are_traced():
    traces = []

    @jax.jit
    def attack(eps, step_size):
        traces.append(1)
        return attacks.pgd(largest_loss(Y), X, eps=eps, step_size=step_size, steps=2)

    moved = [length(attack(eps, eps / 2) - X, "linf").max() for eps in (0.05, 0.1)]
    np.testing.assert_allclose(moved, [0.05, 0.1], rtol=1e-5)
    assert len(traces) == 1


def test_bfloat16_models_are_attacked_in_float32():
    def loss_fn(x):
        return losses.hard_label_cross_entropy(mlp(x.astype(jnp.bfloat16), jnp.bfloat16), Y)

    attack = jax.jit(lambda x: attacks.fgsm(loss_fn, x, eps=2 / 255))
    found = attack(X)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(length(found - X, "linf"), 2 / 255, rtol=1e-5)
    assert attack(X.astype(jnp.float16)).dtype == jnp.float32


def test_fgsm_is_one_step_of_the_radius():
    @jax.jit
    def run():
        gradient = jax.grad(lambda x: largest_loss(Y)(x).sum())(X)
        wanted = jnp.clip(X + 0.1 * jnp.sign(gradient), 0, 1)
        return wanted, attacks.fgsm(largest_loss(Y), X, eps=0.1)

    wanted, found = run()
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_state_goes_through_every_pass():
    def loss_fn(x, state):
        calls, total = state
        return x.sum((1, 2, 3)), (calls + 1, total + x.mean())

    x = jnp.full((2, 2, 2, 1), 0.5)
    _, (calls, total) = attacks.stateful_pgd(
        loss_fn, x, (0, jnp.zeros(())), eps=0.3, step_size=0.1, steps=3
    )
    assert calls == 3
    np.testing.assert_allclose(total, 0.5 + 0.6 + 0.7, rtol=1e-6)


def test_trades_attack_moves_away_from_given_outputs():
    """From a model's own outputs by default; labels never enter."""
    attack = partial(attacks.trades_attack, mlp, X, eps=0.1, steps=3, key=KEY, unroll=False)

    @jax.jit
    def run():
        own = mlp(X)
        other = jnp.roll(own, 1, axis=1)
        default, same, away = (attack(natural_logits=n) for n in (None, own, other))
        return default, same, *(losses.trades_kl(mlp(x), other) for x in (away, same))

    default, same, far, near = run()
    np.testing.assert_allclose(default, same, atol=1e-6)
    assert (far >= near).all()
    assert (far > near).any()


# Bad input


def loss_of(x):
    return x.sum(tuple(range(1, x.ndim)))


GOOD = jnp.full((2, 2, 2, 1), 0.5)
PGD = {"eps": 0.1, "step_size": 0.1, "steps": 1}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": GOOD * 4}, ValueError, r"x must be images in \[0, 1\].* inside the model"),
        ({"x": GOOD * jnp.nan}, ValueError, r"x must be images in \[0, 1\]"),
        ({"x": jnp.ones((2, 2), jnp.uint8)}, TypeError, "x must be floating-point images"),
        ({"x": GOOD[:0]}, ValueError, "x must have at least one image"),
        ({"eps": -0.1}, ValueError, "eps must be a finite number at least 0, got -0.1"),
        ({"eps": float("nan")}, ValueError, "eps must be a finite number"),
        ({"step_size": -1.0}, ValueError, "step_size must be a finite number at least 0"),
        ({"steps": -1}, ValueError, "steps must be an integer at least 0, got -1"),
        ({"steps": 1.5}, TypeError, "steps must be an integer"),
        ({"norm": "l1"}, ValueError, "norm must be one of l2, linf; got 'l1'"),
        ({"key": jnp.zeros(2, jnp.uint32)}, TypeError, "key must be a typed key"),
        ({"key": jax.random.split(KEY, 3)}, ValueError, r"key must have shape \(2,\)"),
        ({"noise": jnp.zeros((2, 2))}, ValueError, "noise must have shape .* like x"),
        ({"noise": jnp.zeros((2, 2, 2, 1), int)}, TypeError, "noise must be a floating"),
        ({"noise": GOOD, "key": KEY}, ValueError, "one of key and noise"),
        ({"loss_fn": lambda x: x.sum()}, ValueError, "loss_fn must return one value per image"),
        ({"loss_fn": None}, TypeError, "loss_fn must be a function"),
    ],
)
def test_pgd_refuses(change, error, text):
    with pytest.raises(error, match=text):
        attacks.pgd(**{"loss_fn": loss_of, "x": GOOD, **PGD, **change})


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": GOOD + 1}, ValueError, r"x must be images in \[0, 1\]"),
        ({"x": jnp.ones((2, 2), jnp.int32)}, TypeError, "x must be floating-point images"),
        ({"eps": -1.0}, ValueError, "eps must"),
        ({"step_size": -1.0}, ValueError, "step_size must"),
        ({"steps": -2}, ValueError, "steps must"),
        ({"norm": 2}, ValueError, "norm must be one of"),
        ({"key": None}, ValueError, "one of key and noise must be given"),
        ({"noise": GOOD}, ValueError, "one of key and noise must be given"),
        ({"logits_fn": loss_of}, ValueError, "logits_fn must return logits of shape"),
        ({"logits_fn": 3}, TypeError, "logits_fn must be a function"),
        ({"natural_logits": jnp.zeros((2, 3))}, ValueError, "natural_logits must have shape"),
        ({"natural_logits": jnp.zeros((2, 4), int)}, TypeError, "natural_logits must be a float"),
    ],
)
def test_trades_attack_refuses(change, error, text):
    good = {"logits_fn": lambda x: x.reshape(len(x), -1), "x": GOOD, "eps": 0.1, "key": KEY}
    with pytest.raises(error, match=text):
        attacks.trades_attack(**{**good, **change})


def test_fgsm_refuses():
    with pytest.raises(ValueError, match="eps must be a finite number at least 0"):
        attacks.fgsm(loss_of, GOOD, eps=-1.0)
    with pytest.raises(ValueError, match=r"x must be images in \[0, 1\]"):
        attacks.fgsm(loss_of, GOOD - 1, eps=0.1)
