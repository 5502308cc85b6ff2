"""Kernels and kernel ridge regression with any of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdjax import kernels

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((5, 4)), RNG.standard_normal((7, 4))
PAIRS = [RNG.standard_normal(s) for s in ((6, 9), (6, 3), (8, 9), (8, 3))]
KERNELS = {
    "linear": lambda: kernels.linear(bias=0.5),
    "rbf": lambda: kernels.rbf(scale=1.5),
    "arc_cosine_0": lambda: kernels.arc_cosine(order=0),
    "arc_cosine_1": lambda: kernels.arc_cosine(),
    "arc_cosine_2": lambda: kernels.arc_cosine(order=2),
}


def cho_and_saul(x, y, order):
    sizes = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(y, axis=1)[None]
    angle = np.arccos(np.clip(x @ y.T / sizes, -1, 1))
    part = {
        0: np.pi - angle,
        1: np.sin(angle) + (np.pi - angle) * np.cos(angle),
        2: 3 * np.sin(angle) * np.cos(angle) + (np.pi - angle) * (1 + 2 * np.cos(angle) ** 2),
    }[order]
    return sizes**order * part / np.pi


def test_rbf():
    with jax.enable_x64(True):
        found = jax.jit(kernels.rbf(scale=0.7))(X, Y)
        wanted = np.exp(-((X[:, None] - Y[None]) ** 2).sum(-1) / (2 * 0.7**2))
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    # In float32 a common offset of both costs no digits but those of the numbers themselves.
    x, y = ((z + 1000).astype(np.float32) for z in (X, Y))
    wanted = np.exp(-((x[:, None] - y[None]).astype(np.float64) ** 2).sum(-1) / (2 * 0.7**2))
    np.testing.assert_allclose(jax.jit(kernels.rbf(scale=0.7))(x, y), wanted, atol=1e-6)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_arc_cosine_is_the_formula(order):
    with jax.enable_x64(True):
        found = jax.jit(kernels.arc_cosine(order=order))(X, Y)
    np.testing.assert_allclose(found, cho_and_saul(X, Y, order), rtol=1e-10)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_arc_cosine_is_a_wide_layer(order):
    """2 E[step(w x) step(w y) (w x)^n (w y)^n] over Gaussian w; the standard error is 0.5 %."""
    weights = np.random.default_rng(1).standard_normal((4, 400_000))
    layers = [np.where(z @ weights > 0, (z @ weights) ** order, 0.0) for z in (X[:2], Y[:2])]
    wanted = 2 * layers[0] @ layers[1].T / weights.shape[1]
    sizes = np.sqrt(np.diag(cho_and_saul(X[:2], X[:2], order))[:, None])
    sizes = sizes * np.sqrt(np.diag(cho_and_saul(Y[:2], Y[:2], order)))[None]
    found = jax.jit(kernels.arc_cosine(order=order))(X[:2], Y[:2])
    np.testing.assert_allclose(found / sizes, wanted / sizes, atol=0.025)


@pytest.mark.parametrize("name", KERNELS)
def test_is_a_kernel(name):
    kernel = jax.jit(KERNELS[name]())
    with jax.enable_x64(True):
        gram = np.asarray(kernel(Y, Y))
    np.testing.assert_allclose(gram, gram.T, rtol=1e-12)
    assert np.linalg.eigvalsh(gram).min() > -1e-10
    assert kernel(X.astype(np.float16), Y.astype(np.float16)).dtype == jnp.float32
    assert kernel(X, Y).shape == (5, 7)


@pytest.mark.parametrize("name", KERNELS)
def test_gradients(name):
    kernel = jax.jit(KERNELS[name]())
    with jax.enable_x64(True):
        check_grads(kernel, (X, Y), order=1, modes=("rev",), rtol=1e-6)
        # Identical rows, and a row of zeros, as a dead layer makes it.
        z = np.concatenate([X, X[:2], np.zeros((1, 4))])
        factors = np.sin(np.arange(64.0).reshape(8, 8))
        weighted = jax.jit(jax.value_and_grad(lambda z: (kernel(z, z) * factors).sum()))
        slope = np.asarray(weighted(z)[1])
        assert np.isfinite(slope).all()
        if name != "arc_cosine_0":  # which has a kink there
            moved = np.random.default_rng(2).standard_normal(z.shape)
            moved[-1] = 0
            ahead, behind = (weighted(z + t * moved)[0] for t in (1e-5, -1e-5))
            np.testing.assert_allclose((slope * moved).sum(), (ahead - behind) / 2e-5, rtol=1e-6)


def test_hyperparameters_are_traced():
    traces = []

    @jax.jit
    def sums(scale):
        traces.append(scale)
        return kernels.rbf(scale=scale)(X, Y).sum() + kernels.linear(bias=scale)(X, Y).sum()

    scales = jnp.array([0.5, 2.0])
    single = [sums(s) for s in scales]
    assert len(traces) == 1
    np.testing.assert_allclose(jax.vmap(sums)(scales), single, rtol=1e-5)
    assert single[0] != single[1]


@pytest.mark.parametrize(
    ("reg_scale", "reg_grad"), [("trace", False), ("mean_trace", True), ("absolute", False)]
)
def test_linear_with_ones_is_krr(reg_scale, reg_grad):
    options = {"reg": 1e-3, "reg_scale": reg_scale, "reg_grad": reg_grad}
    kernel = kernels.linear(bias=1.0)
    with jax.enable_x64(True):
        found, wanted = (
            jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*PAIRS)
            for loss in (
                lambda *a: kernels.kernel_ridge_loss(kernel, *a, **options),
                lambda *a: kernels.krr_loss(*a, **options),
            )
        )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    assert not np.any(found[1][2])
    assert not np.any(found[1][3])


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_ridge_is_the_naive_formula(name):
    kernel = KERNELS[name]()

    def naive(x_s, y_s):
        gram = kernel(x_s, x_s)
        lam = 1e-2 * jax.lax.stop_gradient(jnp.trace(gram))
        alpha = jnp.linalg.solve(gram + lam * jnp.eye(len(gram)), y_s)
        return jnp.mean((kernel(PAIRS[2], x_s) @ alpha - PAIRS[3]) ** 2)

    def ours(x_s, y_s):
        return kernels.kernel_ridge_loss(kernel, x_s, y_s, *PAIRS[2:], reg=1e-2)

    with jax.enable_x64(True):
        found = jax.jit(jax.value_and_grad(ours, (0, 1)))(*PAIRS[:2])
        wanted = jax.jit(jax.value_and_grad(naive, (0, 1)))(*PAIRS[:2])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        program = str(jax.make_jaxpr(jax.grad(ours))(*PAIRS[:2]))
    assert program.count("= cholesky") == 1


def test_of_features_computes_each_input_once():
    calls = []
    weights = RNG.standard_normal((16, 5)).astype(np.float32)

    def network(images):
        calls.append(images.shape)
        return jnp.tanh(images.reshape(len(images), -1) @ weights).reshape(-1, 5, 1)

    images = [RNG.standard_normal((n, 4, 4, 1)).astype(np.float32) for n in (3, 6)]
    targets = [RNG.standard_normal((n, 2)).astype(np.float32) for n in (3, 6)]
    flat = [np.tanh(x.reshape(len(x), -1) @ weights) for x in images]
    plain = kernels.rbf(scale=2.0)
    kernel = kernels.of_features(network, plain)
    np.testing.assert_allclose(
        jax.jit(kernel)(*images), jax.jit(plain)(*flat), rtol=1e-5, atol=1e-6
    )
    jax.eval_shape(lambda x: kernel(x, x), images[0])
    assert calls == [(3, 4, 4, 1), (6, 4, 4, 1), (3, 4, 4, 1)]
    calls.clear()

    def loss(x_s, y_s, x_t, y_t):
        return kernels.kernel_ridge_loss(kernel, x_s, y_s, x_t, y_t, reg=1e-2)

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(
        images[0], targets[0], images[1], targets[1]
    )
    assert sorted(calls) == [(3, 4, 4, 1), (6, 4, 4, 1)]
    direct = jax.jit(lambda *a: kernels.kernel_ridge_loss(plain, *a, reg=1e-2))(
        flat[0], targets[0], flat[1], targets[1]
    )
    np.testing.assert_allclose(value, direct, rtol=1e-5)
    assert np.any(grads[0])
    assert not np.any(grads[2])


def test_solve_dtype_and_low_precision():
    low = [jnp.asarray(x, jnp.bfloat16) for x in PAIRS]

    def loss(*arguments, solve_dtype=None):
        kernel = kernels.rbf(scale=3.0)
        return kernels.kernel_ridge_loss(kernel, *arguments, solve_dtype=solve_dtype)

    assert jax.eval_shape(loss, *low).dtype == jnp.float32
    with pytest.raises(ValueError, match="solve_dtype must be float32 while x64 is off"):
        loss(*low, solve_dtype=jnp.float64)
    with jax.enable_x64(True):
        exact = jax.jit(loss)(*PAIRS)
        single = [x.astype(np.float32) for x in PAIRS]
        found = jax.jit(lambda *a: loss(*a, solve_dtype=jnp.float64))(*single)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5)


X_S, Y_S, X_T, Y_T = (x.astype(np.float32) for x in PAIRS)
BAD = {
    "scale 0": (lambda: kernels.rbf(scale=0.0), ValueError, "scale must be a finite number above"),
    "scale nan": (lambda: kernels.rbf(scale=np.nan), ValueError, "scale must be"),
    "bias": (
        lambda: kernels.linear(bias=-1.0),
        ValueError,
        "bias must be a finite number at least",
    ),
    "order": (lambda: kernels.arc_cosine(order=3), ValueError, "order must be an integer"),
    "order 1.0": (lambda: kernels.arc_cosine(order=1.0), TypeError, "order must be an integer"),
    "widths": (lambda: kernels.linear()(X_S, Y_S), ValueError, "y must have rows of 9 columns"),
    "integers": (lambda: kernels.linear()(X_S.astype(int), X_S), TypeError, "x must be a floating"),
    "no function": (lambda: kernels.of_features(3, kernels.linear()), TypeError, "feature_fn must"),
    "no kernel": (lambda: kernels.of_features(jnp.tanh, "rbf"), TypeError, "kernel must be"),
    "a name": (lambda: loss("rbf"), TypeError, "kernel must be a function"),
    "reg": (lambda: loss(reg=0.0), ValueError, "reg must be a finite number above 0"),
    "reg_scale": (lambda: loss(reg_scale="max"), ValueError, "reg_scale must be one of"),
    "empty": (lambda: loss(x_s=X_S[:0], y_s=Y_S[:0]), ValueError, "x_s must not be empty"),
    "rows": (lambda: loss(y_s=Y_S[:2]), ValueError, "y_s must have 6 rows, as x_s has"),
    "columns": (lambda: loss(x_t=X_T[:, :4]), ValueError, "x_t must have rows of 9 columns"),
    "targets": (lambda: loss(y_t=Y_T[:, :2]), ValueError, "y_t must have rows of 3 columns"),
    "shape": (lambda: loss(lambda x, y: jnp.ones(3)), ValueError, "the kernel's matrix must have"),
}


def loss(kernel=None, *, x_s=X_S, y_s=Y_S, x_t=X_T, y_t=Y_T, **options):
    kernel = kernels.linear() if kernel is None else kernel
    return kernels.kernel_ridge_loss(kernel, x_s, y_s, x_t, y_t, **options)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()
