"""Projector dynamics, collapse and similarity measures: golden numbers, identities, bad input."""

from __future__ import annotations

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses, metrics

GOLDEN = np.load(Path(__file__).parent / "projector_dynamics.npz")
RANDOM = np.random.default_rng(4)
Z_S = RANDOM.standard_normal((20, 4)).astype(np.float32)
Z_T = RANDOM.standard_normal((20, 6)).astype(np.float32)
W = RANDOM.standard_normal((4, 6)).astype(np.float32)


def golden(case):
    """Inputs and results of one case in float64 (inside enable_x64)."""
    return {
        key.removeprefix(f"{case}_"): np.asarray(GOLDEN[key], np.float64)
        for key in GOLDEN.files
        if key.startswith(f"{case}_")
    }


def descended(kernel, z_s, z_t, steps, rate, decay=0.0):
    """The update itself, k times, in numpy."""
    for _ in range(steps):
        kernel = (1 - decay) * kernel + rate * (z_s.T @ (z_t - z_s @ kernel))
    return kernel


# The projector's dynamics.


@pytest.mark.parametrize("case", ["wd", "nowd"])
def test_dynamics_agree_with_golden_values(case):
    g = golden(case)
    rate, decay = float(g["lr"]), float(g["eta"])
    with jax.enable_x64(True):
        velocity = metrics.projector_velocity(g["W0"], g["Z_s"], g["Z_t"])
        np.testing.assert_allclose(velocity, -g["grad_W0"], rtol=1e-11, atol=1e-11)
        fixed = metrics.projector_fixed_point(g["Z_s"], g["Z_t"], ridge=decay / rate)
        np.testing.assert_allclose(fixed, g["W_fixed"], rtol=1e-10, atol=1e-10)
        for steps in (1, 10, 200):
            found = metrics.projector_after_steps(
                g["W0"], g["Z_s"], g["Z_t"], steps, rate=rate, decay=decay
            )
            np.testing.assert_allclose(found, g[f"W_step{steps}"], rtol=1e-10, atol=1e-10)


def test_velocity_is_the_negative_gradient():
    def d(kernel):
        return jnp.sum((Z_S @ kernel - Z_T) ** 2) / 2

    velocity = metrics.projector_velocity(W, Z_S, Z_T)
    np.testing.assert_allclose(velocity, -jax.grad(d)(W), rtol=1e-4, atol=1e-4)
    # LogSum with alpha = 2 and no normalisation has this direction.
    gradient = jax.grad(lambda w: losses.log_sum(Z_S @ w, Z_T, alpha=2.0))(W)
    np.testing.assert_allclose(-gradient, velocity / d(W), rtol=1e-4, atol=1e-6)


def test_whitened_features_arrive_in_one_step():
    q, _ = np.linalg.qr(Z_S.astype(np.float64))
    with jax.enable_x64(True):
        fixed = metrics.projector_fixed_point(q, Z_T.astype(np.float64))
        np.testing.assert_allclose(fixed, q.T @ Z_T, atol=1e-12)
        once = metrics.projector_after_steps(W.astype(np.float64), q, Z_T, 1, rate=1.0)
        np.testing.assert_allclose(once, fixed, atol=1e-12)


def test_the_velocity_of_the_decayed_flow_vanishes_at_its_fixed_point():
    fixed = metrics.projector_fixed_point(Z_S, Z_T, ridge=3.0)
    np.testing.assert_allclose(metrics.projector_velocity(fixed, Z_S, Z_T), 3 * fixed, atol=1e-4)


def test_singular_features_give_the_solution_of_least_norm():
    z_s = np.concatenate([Z_S, Z_S[:, :1], np.zeros((20, 1), np.float32)], axis=1)
    wanted = np.linalg.pinv(z_s.astype(np.float64), rcond=1e-6) @ Z_T
    np.testing.assert_allclose(metrics.projector_fixed_point(z_s, Z_T), wanted, atol=1e-5)
    # There descent from 0 goes; what a start has in the other directions stays.
    start = np.zeros((6, 6), np.float32)
    start[5] = 7
    after = metrics.projector_after_steps(start, z_s, Z_T, 400, rate=0.02)
    np.testing.assert_allclose(after[:5], wanted[:5], atol=1e-4)
    np.testing.assert_allclose(after[5], 7, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_closed_form_is_the_loop(decay):
    """Through all kinds of factors: near 1, negative, beyond -1."""
    z_s, z_t, w = (x.astype(np.float64) for x in (Z_S, Z_T, W))
    largest = np.linalg.norm(z_s, 2) ** 2
    with jax.enable_x64(True):
        closed = jax.jit(
            lambda k, rate: metrics.projector_after_steps(w, z_s, z_t, k, rate=rate, decay=decay)
        )
        for k, rate in itertools.product((0, 1, 2, 7), (0.0, 1e-7, 1 / largest, 2.5 / largest)):
            wanted = descended(w, z_s, z_t, k, rate, decay)
            np.testing.assert_allclose(closed(k, rate), wanted, rtol=1e-9, atol=1e-9)


def test_many_small_steps_keep_their_digits_in_float32():
    """Where q^k is lost in the rounding of q: a million steps of rate 1e-9."""
    found = metrics.projector_after_steps(W, Z_S, Z_T, 1_000_000, rate=1e-9)
    with jax.enable_x64(True):
        exact = metrics.projector_after_steps(
            *(x.astype(np.float64) for x in (W, Z_S, Z_T)), 1_000_000, rate=1e-9
        )
    moved = np.abs(np.asarray(exact) - W).max()
    np.testing.assert_allclose(found, exact, atol=1e-4 * moved)


def test_rate_limit_separates_convergence_from_divergence():
    for decay in (0.0, 0.5):
        limit = float(metrics.projector_rate_limit(Z_S, decay=decay))

        def size(factor, k, decay=decay, limit=limit):
            found = metrics.projector_after_steps(W, Z_S, Z_T, k, rate=factor * limit, decay=decay)
            return float(jnp.linalg.norm(found))

        assert size(0.98, 3001) < 2 * size(0.98, 2)
        assert size(1.02, 401) > 100 * size(1.02, 2)
    assert metrics.projector_rate_limit(np.zeros((3, 2), np.float32)) == np.inf


def test_dynamics_under_transformations():
    ks = jnp.arange(4)
    curve = jax.jit(
        jax.vmap(lambda k: metrics.projector_after_steps(W, Z_S, Z_T, k, rate=0.01, decay=0.1))
    )(ks)
    for k, found in zip(range(4), curve, strict=True):
        np.testing.assert_allclose(
            found, descended(W, Z_S, Z_T, k, 0.01, 0.1), rtol=1e-4, atol=1e-5
        )
    kernels = jnp.stack([W, 2 * W])
    both = jax.vmap(metrics.projector_velocity, (0, None, None))(kernels, Z_S, Z_T)
    np.testing.assert_allclose(both[1], metrics.projector_velocity(2 * W, Z_S, Z_T), rtol=1e-6)


@pytest.mark.parametrize("wrt", ["student", "teacher", "number"])
def test_dynamics_have_the_right_gradients(wrt):
    with jax.enable_x64(True):
        z_s, z_t, w = (jnp.asarray(x, jnp.float64) for x in (Z_S, Z_T, W))
        place = {"student": 0, "teacher": 1, "number": 2}[wrt]

        def value(*arguments):
            student, teacher, number = arguments
            fixed = metrics.projector_fixed_point(student, teacher, ridge=number)
            after = metrics.projector_after_steps(
                w, student, teacher, 5, rate=0.01 * number, decay=0.1 * number
            )
            return jnp.sum(jnp.sin(fixed)) + jnp.sum(jnp.cos(after))

        arguments = (z_s, z_t, jnp.asarray(0.7))
        gradient = jax.jit(jax.grad(value, argnums=place))(*arguments)
        direction = jnp.asarray(RANDOM.standard_normal(gradient.shape))
        moved = [
            value(*(a + sign * 1e-6 * direction if i == place else a
                    for i, a in enumerate(arguments)))
            for sign in (1, -1)
        ]  # fmt: skip
        slope = (moved[0] - moved[1]) / 2e-6
        np.testing.assert_allclose(jnp.sum(gradient * direction), slope, rtol=1e-6)


def test_gradients_stay_finite_where_eigenvalues_are_equal():
    """Fewer examples than channels, dead channels: C_s has the eigenvalue 0 many times."""
    z_s = np.concatenate([Z_S[:3], np.zeros((3, 2), np.float32)], axis=1)

    def value(z_s, w, ridge, rate):
        fixed = metrics.projector_fixed_point(z_s, Z_T[:3], ridge=ridge)
        after = metrics.projector_after_steps(w, jax.lax.stop_gradient(z_s), Z_T[:3], 3, rate=rate)
        return jnp.sum(fixed**2) + jnp.sum(after**2)

    w = np.zeros((6, 6), np.float32)
    for ridge in (0.0, 0.5):
        found = jax.grad(value, argnums=(0, 1, 2, 3))(z_s, w, ridge, 0.1)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))


# Batch normalisation and collapse.


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.0, 1e-4, 0.5])
@pytest.mark.parametrize("loss", ["log_sum", "mse", "odd"])
def test_columns_get_no_gradient_along_themselves(loss, eps):
    compare = {
        "log_sum": losses.log_sum,
        "mse": lambda s, t: losses.feature_mse(s, t).sum(),
        "odd": lambda s, t: jnp.sum(jnp.tanh(s) * t + s**3),
    }[loss]
    with jax.enable_x64(True):
        z_s, z_t, w = (jnp.asarray(x, jnp.float64) for x in (Z_S, Z_T, W))

        def whole(w):
            return compare(losses.standardize(z_s @ w + 3.0, eps=eps), z_t)

        gradient = jax.grad(lambda s: compare(s, z_t))(losses.standardize(z_s @ w, eps=eps))
        along, predicted = metrics.batch_norm_orthogonality(w, z_s, gradient, eps=eps)
        np.testing.assert_allclose(along, predicted, rtol=1e-9, atol=1e-12)
        # Against differentiation of the library's own normalisation, with an offset.
        np.testing.assert_allclose(
            along, jnp.sum(w * jax.grad(whole)(w), axis=0), rtol=1e-9, atol=1e-12
        )
        if eps == 0:
            assert np.abs(along).max() < 1e-12 * np.abs(gradient).max() * 20
        else:
            assert np.abs(along).max() > 1e-8


def test_plain_steps_only_lengthen_columns_and_decay_shortens_them():
    z_t = losses.standardize(Z_T, eps=0.0)

    def loss(w):
        return losses.log_sum(losses.standardize(Z_S @ w, eps=0.0), z_t)

    w = jnp.asarray(W)
    lengths = [jnp.linalg.norm(w, axis=0)]
    for _ in range(5):
        w = w - 0.3 * jax.grad(loss)(w)
        lengths.append(jnp.linalg.norm(w, axis=0))
    for before, after in itertools.pairwise(lengths):
        assert np.all(after > before * (1 - 1e-6))
    moved = w - 0.3 * (jax.grad(loss)(w) + 1.0 * w)
    assert np.all(jnp.linalg.norm(moved, axis=0) < lengths[-1])


def test_orthogonality_with_a_constant_column():
    """A zero column gets 0, not NaN, and leaves the others alone."""
    w = W.copy()
    w[:, 2] = 0
    along, predicted = metrics.batch_norm_orthogonality(w, Z_S, Z_T, eps=0.0)
    assert float(along[2]) == float(predicted[2]) == 0
    full, _ = metrics.batch_norm_orthogonality(W, Z_S, Z_T, eps=0.3)
    part, _ = metrics.batch_norm_orthogonality(w, Z_S, Z_T, eps=0.3)
    np.testing.assert_allclose(np.delete(part, 2), np.delete(full, 2), rtol=1e-6)


def test_singular_values():
    left, _ = np.linalg.qr(RANDOM.standard_normal((5, 5)))
    right, _ = np.linalg.qr(RANDOM.standard_normal((7, 7)))
    wanted = np.array([2.0, 0.5, 0.0, -1.0, -3.0])
    kernel = (left * np.exp(wanted)) @ right[:5]
    found = metrics.log_singular_values(kernel.astype(np.float32))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    batch = metrics.log_singular_values(np.stack([kernel, 2 * kernel]).astype(np.float32))
    np.testing.assert_allclose(batch[1] - batch[0], np.log(2), atol=1e-5)
    assert metrics.log_singular_values(np.zeros((2, 3), np.float32)).tolist() == [-np.inf] * 2
    gradient = jax.grad(lambda w: metrics.log_singular_values(w).sum())(jnp.eye(3))
    np.testing.assert_allclose(gradient, np.eye(3), atol=1e-6)  # equal singular values


# Similarity.


def cka_from_grams(x, y):
    n = len(x)
    h = np.eye(n) - 1 / n
    k, l = h @ x @ x.T @ h, h @ y @ y.T @ h
    return np.sum(k * l) / np.sqrt(np.sum(k * k) * np.sum(l * l))


def debiased_from_grams(x, y):
    """Equation 5 of Song et al., term by term."""
    n = len(x)
    one = np.ones(n)

    def hsic(k, l):
        k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
        total = np.trace(k @ l) + one @ k @ one * (one @ l @ one) / ((n - 1) * (n - 2))
        return (total - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))

    k, l = x @ x.T, y @ y.T
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


@pytest.mark.parametrize("widths", [(4, 6), (30, 40)])
@pytest.mark.parametrize("debiased", [False, True])
def test_cka_against_gram_matrices(widths, debiased):
    """Whether rows or channels are more, which are two ways of computing it."""
    x, y = (RANDOM.standard_normal((20, width)) + 0.5 for width in widths)
    y[:, :4] += 3 * x[:, :4]
    wanted = (debiased_from_grams if debiased else cka_from_grams)(x, y)
    with jax.enable_x64(True):
        np.testing.assert_allclose(metrics.linear_cka(x, y, debiased=debiased), wanted, rtol=1e-10)
    found = metrics.linear_cka(x.astype(np.float32), y.astype(np.float32), debiased=debiased)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_cka_invariances():
    rotation, _ = np.linalg.qr(RANDOM.standard_normal((4, 4)))
    turned = (1e-12 * Z_S @ rotation + 3e-12).astype(np.float32)
    for debiased in (False, True):
        np.testing.assert_allclose(metrics.linear_cka(Z_S, turned, debiased=debiased), 1, rtol=1e-5)
        value = metrics.linear_cka(Z_S, Z_T, debiased=debiased)
        np.testing.assert_allclose(
            metrics.linear_cka(Z_T, Z_S, debiased=debiased), value, rtol=1e-5
        )
        np.testing.assert_allclose(
            metrics.linear_cka(1e15 * turned, Z_T, debiased=debiased), value, rtol=1e-4
        )
        assert value < 0.9


def test_debiased_cka_of_unrelated_features_is_near_zero():
    x, y = jax.random.normal(jax.random.key(0), (2, 30, 500))
    assert metrics.linear_cka(x, y) > 0.9
    assert abs(metrics.linear_cka(x, y, debiased=True)) < 0.1


def test_correlation_against_numpy():
    wanted = np.abs(np.corrcoef(Z_S.T, Z_T.T)[:4, 4:]).mean()
    np.testing.assert_allclose(metrics.input_output_correlation(Z_S, Z_T), wanted, rtol=1e-5)
    scaled = Z_S * np.array([1e-25, -1, 3, 1e20], np.float32)
    np.testing.assert_allclose(metrics.input_output_correlation(scaled, Z_T), wanted, rtol=1e-4)


def test_dead_channels_do_not_count_as_uncorrelated():
    live = metrics.input_output_correlation(Z_S, Z_T)
    for constant in (0.0, 0.1, -1e6):
        dead = np.full((20, 3), constant, np.float32)
        padded = np.concatenate([Z_S, dead], axis=1)
        np.testing.assert_allclose(metrics.input_output_correlation(padded, Z_T), live, rtol=1e-6)
        assert np.isnan(metrics.input_output_correlation(dead, Z_T))
        gradient = jax.grad(metrics.input_output_correlation)(padded, Z_T)
        assert np.isfinite(gradient).all()
        assert np.all(gradient[:, 4:] == 0)


def test_a_nan_is_passed_on():
    bad = Z_S.copy()
    bad[3, 1] = np.nan
    assert np.isnan(metrics.input_output_correlation(bad, Z_T))
    assert np.isnan(metrics.linear_cka(bad, Z_T))
    assert np.isnan(metrics.projector_after_steps(W, bad, Z_T, 2, rate=0.1)).any()
    assert np.isnan(metrics.projector_fixed_point(bad, Z_T)).any()


@pytest.mark.parametrize("name", ["input_output_correlation", "linear_cka", "debiased"])
def test_masked_rows_are_not_there(name):
    options = {"debiased": True} if name == "debiased" else {}
    measure = getattr(metrics, "linear_cka" if name == "debiased" else name)
    keep = np.arange(20) % 3 != 0
    x, y = Z_S.copy(), Z_T.copy()
    x[~keep], y[~keep] = np.nan, 1e30
    wanted = measure(x[keep], y[keep], **options)
    np.testing.assert_allclose(measure(x, y, where=keep, **options), wanted, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: measure(x, y, where=keep, **options)))(x)
    assert np.all(gradient[~keep] == 0)
    np.testing.assert_allclose(
        gradient[keep], jax.grad(lambda x: measure(x, y[keep], **options))(x[keep]), atol=1e-5
    )
    assert np.isnan(measure(x, y, where=np.zeros(20, bool), **options))


# Bad input.

FEATURES = {
    "linear_cka": ("x", "y"),
    "input_output_correlation": ("inputs", "outputs"),
    "projector_fixed_point": ("student", "teacher"),
}


@pytest.mark.parametrize("name", FEATURES)
def test_bad_features(name):
    function, (first, second) = getattr(metrics, name), FEATURES[name]
    with pytest.raises(TypeError, match=f"^{first} must be a floating"):
        function(np.ones((4, 2), int), np.ones((4, 2)))
    with pytest.raises(TypeError, match=f"^{second} must be a floating"):
        function(np.ones((4, 2)), np.ones((4, 2), bool))
    with pytest.raises(ValueError, match=f"^{first} must have 2 dimensions"):
        function(np.ones((4, 2, 2)), np.ones((4, 2)))
    with pytest.raises(ValueError, match=f"^{second} must have 4 rows like {first}"):
        function(np.ones((4, 2)), np.ones((5, 2)))


def test_other_bad_input():
    m = metrics
    cases = [
        (TypeError, "kernel", lambda: m.log_singular_values(np.ones((2, 2), int))),
        (ValueError, "kernel", lambda: m.log_singular_values(np.ones(2))),
        (ValueError, "kernel", lambda: m.projector_velocity(W.T, Z_S, Z_T)),
        (ValueError, "student", lambda: m.projector_velocity(W, Z_S[:0], Z_T[:0])),
        (ValueError, "ridge", lambda: m.projector_fixed_point(Z_S, Z_T, ridge=-1.0)),
        (ValueError, "ridge", lambda: m.projector_fixed_point(Z_S, Z_T, ridge=np.ones(2))),
        (TypeError, "steps", lambda: m.projector_after_steps(W, Z_S, Z_T, 1.5, rate=0.1)),
        (ValueError, "steps", lambda: m.projector_after_steps(W, Z_S, Z_T, -1, rate=0.1)),
        (ValueError, "rate", lambda: m.projector_after_steps(W, Z_S, Z_T, 1, rate=np.nan)),
        (ValueError, "decay", lambda: m.projector_after_steps(W, Z_S, Z_T, 1, rate=1, decay=2.0)),
        (ValueError, "decay", lambda: m.projector_rate_limit(Z_S, decay=-0.1)),
        (ValueError, "student", lambda: m.projector_rate_limit(Z_S[0])),
        (ValueError, "gradient", lambda: m.batch_norm_orthogonality(W, Z_S, Z_T[:5])),
        (ValueError, "kernel", lambda: m.batch_norm_orthogonality(W[:3], Z_S, Z_T)),
        (ValueError, "student", lambda: m.batch_norm_orthogonality(W, Z_S[:1], Z_T[:1])),
        (ValueError, "eps", lambda: m.batch_norm_orthogonality(W, Z_S, Z_T, eps=-1.0)),
        (ValueError, "x must have at least 4", lambda: m.linear_cka(*Z_S[None, :3].repeat(2, 0),
                                                                     debiased=True)),
        (ValueError, "inputs must have at least 2", lambda: m.input_output_correlation(Z_S[:1],
                                                                                       Z_T[:1])),
        (TypeError, "where", lambda: m.linear_cka(Z_S, Z_T, where=np.ones(20))),
        (ValueError, "where", lambda: m.linear_cka(Z_S, Z_T, where=np.ones(3, bool))),
    ]  # fmt: skip
    for error, name, call in cases:
        with pytest.raises(error, match=f"^{name}"):
            call()


def test_cka_of_a_constant():
    """NaN also for one that isn't 0, of which the rounding of the mean leaves something."""
    x, y = jnp.full((10, 3), 0.1), jax.random.normal(jax.random.key(0), (10, 5))
    for debiased in (False, True):
        assert jnp.isnan(metrics.linear_cka(x, y, debiased=debiased))
