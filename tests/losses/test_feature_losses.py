"""Feature losses against official code (golden_projector.npz), their identities, their edges.

The golden values are float64 results of the published code of projector distillation, or, for
`norms` and the `stable_loss` of the edges, of its formulas in torch and NumPy.
"""

from __future__ import annotations

import functools
import math
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses

GOLDEN = np.load(Path(__file__).parent / "golden_projector.npz")
FEATURES = ("gauss", "two_rows", "offset", "alpha_1", "alpha_2", "alpha_5")
EDGES = ("dead_teacher_channels", "dead_student_channel", "outlier_sample")
DTYPES = {"float64": np.float64, "float32": np.float32}


def case(name, dtype=np.float64):
    """The arrays of one case; inputs are float32 numbers, whatever the dtype."""
    found = {k.split("/")[1]: GOLDEN[k] for k in GOLDEN.files if k.startswith(f"{name}/")}
    for entry in ("z_s", "z_t", "kernel", "bias"):
        found[entry] = found[entry].astype(dtype)
    return found


def draw(shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# Compiled: eagerly each of their operations would be compiled alone.
standardize = jax.jit(losses.standardize)
log_sum_of = jax.jit(losses.log_sum)
shares_of = jax.jit(losses.log_sum_shares)
slope_of = jax.jit(jax.grad(losses.log_sum))


def numpy(tree):
    """In NumPy, as float64 arrays of JAX can't be used outside enable_x64."""
    return jax.tree.map(np.asarray, tree)


def projected(z_s, z_t, kernel, bias, alpha, eps=1e-4, where=None):
    """The published loss of features, and both sides after their normalisation."""
    s = losses.standardize(z_s @ kernel + bias[None], eps=eps, where=where)
    t = losses.standardize(z_t, eps=eps, where=where)
    return losses.log_sum(s, t, alpha=alpha, where=where), (s, t)


@functools.cache
def program(argnums=(0, 1, 2, 3)):
    return jax.jit(jax.value_and_grad(projected, argnums=argnums, has_aux=True))


def inputs(c):
    return c["z_s"], c["z_t"], c["kernel"], c["bias"]


def assert_gradient(found, wanted, share):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=share * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FEATURES)
def test_published_values(name, dtype):
    c = case(name, DTYPES[dtype])
    with jax.enable_x64(dtype == "float64"):
        alpha = c["alpha"].astype(c["z_s"].dtype)
        (loss, (s, t)), grads = numpy(program()(*inputs(c), alpha))
        of_norm = numpy(slope_of(s, t, alpha=alpha)) if "norm_s" in c else None
    of_s, of_t, of_kernel, of_bias = grads
    exact = dtype == "float64"
    rough = 1e-3 if name == "offset" else 1e-4
    share = 1e-11 if exact else rough
    assert loss.dtype == dtype
    np.testing.assert_allclose(loss, c["loss"], rtol=1e-12 if exact else 2e-6)
    assert_gradient(of_kernel, c["grad_kernel"], share)
    if "grad_z_s" in c:
        assert_gradient(of_s, c["grad_z_s"], share)
    if "norm_s" in c:
        normalised = 1e-10 if exact else rough
        np.testing.assert_allclose(s, c["norm_s"], rtol=0, atol=normalised)
        np.testing.assert_allclose(t, c["norm_t"], rtol=0, atol=normalised)
        assert_gradient(of_norm, c["grad_norm_s"], share)
    # The mean takes the bias out again, and nothing flows to the teacher.
    assert np.abs(of_bias).max() <= (1e-12 if exact else 1e-3) * np.abs(of_kernel).max()
    assert not of_t.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EDGES)
def test_published_edges(name, dtype):
    """Channels without spread, and one sample far away."""
    c = case(name, DTYPES[dtype])
    with jax.enable_x64(dtype == "float64"):
        (loss, _), grads = numpy(program()(*inputs(c), c["alpha"].astype(c["z_s"].dtype)))
    exact = dtype == "float64"
    np.testing.assert_allclose(loss, c["stable_loss"], rtol=1e-12 if exact else 2e-6)
    assert_gradient(grads[0], c["grad_z_s"], 1e-11 if exact else 1e-4)
    assert_gradient(grads[2], c["grad_kernel"], 1e-11 if exact else 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tiny_diff_4", "tiny_diff_8"])
def test_nearly_equal_features(name, dtype):
    """Differences of 1e-7, whose powers underflow in float32."""
    c = case(name, DTYPES[dtype])
    with jax.enable_x64(dtype == "float64"):
        (loss, _), grads = numpy(program()(*inputs(c), c["alpha"].astype(c["z_s"].dtype)))
    assert abs(loss - c["stable_loss"]) < (1e-6 if dtype == "float64" else 5)
    assert all(np.isfinite(g).all() for g in grads)
    assert np.abs(grads[2]).max() > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_features(dtype):
    c = case("identical", DTYPES[dtype])
    with jax.enable_x64(dtype == "float64"):
        (loss, _), grads = numpy(program()(*inputs(c), c["alpha"].astype(c["z_s"].dtype)))
    assert loss < -40
    assert not np.isnan(loss)
    assert not any(np.isnan(g).any() for g in grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_published_correlations(dtype):
    """The DeiT code: mean of patch tokens and of maps, statistics without eps."""
    c = case("deit", DTYPES[dtype])

    @jax.jit
    def loss(tokens, maps, kernel, bias):
        t = losses.standardize(losses.pool(maps), eps=0.0)

        def of(z_s, kernel, bias):
            s = losses.standardize(z_s @ kernel + bias[None], eps=0.0)
            return losses.correlation_log_sum(s, t), s

        z_s = losses.pool(tokens)
        return jax.value_and_grad(of, (0, 1), has_aux=True)(z_s, kernel, bias), z_s, t

    maps, tokens = (c[k].astype(DTYPES[dtype]) for k in ("map_t_nhwc", "tokens_s"))
    with jax.enable_x64(dtype == "float64"):
        ((value, s), grads), z_s, t = numpy(loss(tokens, maps, c["kernel"], c["bias"]))
    exact = dtype == "float64"
    np.testing.assert_allclose(value, c["loss"], rtol=1e-12 if exact else 2e-6)
    np.testing.assert_allclose(z_s, GOLDEN["deit/z_s"], rtol=0, atol=1e-12 if exact else 1e-6)
    np.testing.assert_allclose(s, c["norm_s"], rtol=0, atol=1e-11 if exact else 1e-4)
    np.testing.assert_allclose(t, c["norm_t"], rtol=0, atol=1e-11 if exact else 1e-4)
    assert_gradient(grads[0], c["grad_z_s"], 1e-11 if exact else 1e-4)
    assert_gradient(grads[1], c["grad_kernel"], 1e-11 if exact else 1e-4)


NORMS = {
    "none": lambda x: x,
    "l2": losses.l2_normalize,
    "group": functools.partial(losses.group_standardize, groups=4),
    "batch": losses.standardize,
}


@pytest.mark.parametrize("norm", NORMS)
def test_normalisations(norm):
    c = case("norms")

    @jax.jit
    def run(z_s, z_t, kernel, bias):
        def both(kernel):
            s, t = NORMS[norm](z_s @ kernel + bias[None]), NORMS[norm](z_t)
            return losses.log_sum(s, t), losses.feature_mse(s, t).mean(), s, t

        return both(kernel), jax.jacrev(lambda kernel: both(kernel)[:2])(kernel)

    with jax.enable_x64(True):
        (log_sum, mse, s, t), (of_log_sum, of_mse) = numpy(run(*inputs(c)))
    np.testing.assert_allclose(log_sum, c[f"{norm}_logsum_loss"], rtol=1e-12)
    np.testing.assert_allclose(mse, c[f"{norm}_mse_loss"], rtol=1e-12)
    assert_gradient(of_log_sum, c[f"{norm}_logsum_grad_kernel"], 1e-11)
    assert_gradient(of_mse, c[f"{norm}_mse_grad_kernel"], 1e-11)
    if norm != "none":
        np.testing.assert_allclose(s, c[f"{norm}_norm_s"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(t, c[f"{norm}_norm_t"], rtol=0, atol=1e-12)


# --- LogSum's identities --------------------------------------------------------------------

DIFFERENCE = draw((6, 5))
ALPHAS = (1.0, 1.5, 4.0, 7.3)


@functools.cache
def of_difference():
    return jax.jit(
        jax.value_and_grad(lambda d, alpha: losses.log_sum(d, jnp.zeros_like(d), alpha=alpha))
    )


def log_sum(d, alpha):
    with jax.enable_x64(True):
        return tuple(map(np.asarray, of_difference()(d, alpha)))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_euler(alpha):
    """sum d dL/dd = alpha; L(c d) = L(d) + alpha log|c|; and dL/dd = alpha p / d."""
    value, gradient = log_sum(DIFFERENCE, alpha)
    np.testing.assert_allclose((DIFFERENCE * gradient).sum(), alpha, rtol=1e-12)
    for c in (-1.0, 1e-30, -3e20):
        scaled, _ = log_sum(c * DIFFERENCE, alpha)
        np.testing.assert_allclose(scaled, value + alpha * np.log(abs(c)), atol=1e-10)
    with jax.enable_x64(True):
        shares = numpy(shares_of(DIFFERENCE, np.zeros_like(DIFFERENCE), alpha=alpha))
    np.testing.assert_allclose(shares.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(gradient, alpha * shares / DIFFERENCE, rtol=1e-11)


def test_log_of_a_sum_not_of_a_mean():
    """Plain sums over batch and channels: the mean would be lower by log(B D)."""
    value, gradient = log_sum(DIFFERENCE, 4.0)
    with jax.enable_x64(True):
        mean, slope = numpy(jax.value_and_grad(lambda d: jnp.log(jnp.mean(d**4)))(DIFFERENCE))
    np.testing.assert_allclose(value, mean + np.log(DIFFERENCE.size), rtol=1e-12)
    np.testing.assert_allclose(gradient, slope, rtol=1e-11)


def test_alpha_two_is_the_log_of_the_squared_distance():
    value, _ = log_sum(DIFFERENCE, 2.0)
    np.testing.assert_allclose(value, np.log((DIFFERENCE**2).sum()), rtol=1e-12)
    with jax.enable_x64(True):
        s, t = numpy([standardize(draw((9, 4), seed), eps=0.0) for seed in (1, 2)])
        found = numpy(log_sum_of(s, t, alpha=2.0))
        of_rho = numpy(jax.jit(losses.correlation_log_sum)(s, t))
        norms = [numpy(jax.jit(losses.correlation_distance)(s, t, power=p)) for p in (2.0, 4.0)]
    rho = np.mean(s * t, 0)
    wanted = [np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)]
    np.testing.assert_allclose(rho, wanted, rtol=1e-12)
    np.testing.assert_allclose(found, np.log(2 * 9 * np.sum(1 - rho)), rtol=1e-12)
    np.testing.assert_allclose(of_rho, np.log(np.sum((rho - 1) ** 4) + 1e-5), rtol=1e-12)
    wanted = [np.sum(np.abs(rho - 1) ** p) ** (1 / p) for p in (2, 4)]
    np.testing.assert_allclose(norms, wanted, rtol=1e-12)


def test_large_alpha_is_the_largest_difference():
    alphas = [1.0, 2.0, 4.0, 8.0, 64.0, 4096.0]
    per_alpha = np.array([log_sum(DIFFERENCE, alpha)[0] / alpha for alpha in alphas])
    top, n = np.log(np.abs(DIFFERENCE).max()), DIFFERENCE.size
    assert (np.diff(per_alpha) <= 1e-12).all()
    assert (per_alpha >= top - 1e-12).all()
    assert (per_alpha <= top + np.log(n) / alphas + 1e-12).all()
    assert per_alpha[-1] - top < 1e-3


def test_the_gradient_grows_with_the_match():
    for size in (1.0, 1e-3, 1e-9):
        _, gradient = log_sum(size * DIFFERENCE, 4.0)
        bound = 4 / (size * np.abs(DIFFERENCE).max())
        assert 0.3 * bound < np.abs(gradient).max() <= bound


@pytest.mark.parametrize("shape", [(64, 128), (256, 32)])
def test_independent_features(shape):
    """For standard normal inputs the loss is log(B D 2^alpha Gamma((alpha + 1) / 2) / sqrt(pi))."""
    s, t = (draw(shape, seed, np.float32) for seed in (3, 4))
    assert s.size >= 8192
    for alpha in (1.0, 2.0, 4.0):
        moment = 2**alpha * math.gamma((alpha + 1) / 2) / math.sqrt(math.pi)
        assert abs(log_sum_of(s, t, alpha=alpha) - math.log(s.size * moment)) < 0.1
    assert abs(log_sum_of(s, t) - math.log(12 * s.size)) < 0.1


def test_independent_correlations():
    """About log D + 6 / B, as the mean over 20 draws."""

    @jax.jit
    @jax.vmap
    def one(key):
        s, t = (
            losses.standardize(jax.random.normal(k, (64, 128)), eps=0.0)
            for k in jax.random.split(key)
        )
        return losses.correlation_log_sum(s, t)

    found = one(jax.random.split(jax.random.key(0), 20)).mean()
    assert abs(found - (math.log(128) + 6 / 64)) < 0.1


# --- with a projector and batch statistics --------------------------------------------------


def problem(eps=1e-4, seed=5, rows=12):
    return {
        "z_s": draw((rows, 5), seed),
        "z_t": draw((rows, 7), seed + 1),
        "kernel": draw((5, 7), seed + 2),
        "bias": draw((7,), seed + 3),
        "alpha": 4.0,
        "eps": eps,
    }


def run(p, **changes):
    p = p | changes
    with jax.enable_x64(True):
        (value, _), grads = program()(*inputs(p), p["alpha"], p["eps"])
    return float(value), [np.asarray(g) for g in grads]


def test_order_of_samples_and_channels():
    p = problem()
    wanted, (of_s, _, of_kernel, _) = run(p)
    rows, channels = (np.random.default_rng(1).permutation(n) for n in (12, 7))
    value, grads = run(p, z_s=p["z_s"][rows], z_t=p["z_t"][rows])
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    np.testing.assert_allclose(grads[0], of_s[rows], rtol=1e-9, atol=1e-11)
    value, grads = run(
        p,
        z_t=p["z_t"][:, channels],
        kernel=p["kernel"][:, channels],
        bias=p["bias"][channels],
    )
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    np.testing.assert_allclose(grads[2], of_kernel[:, channels], rtol=1e-9, atol=1e-11)
    # One side alone is another loss.
    assert abs(run(p, z_t=p["z_t"][rows])[0] - wanted) > 1e-3


def test_constants_are_taken_out():
    """Offsets of either side change nothing, so that the gradient over the samples sums to 0."""
    p = problem()
    wanted, grads = run(p)
    offset = draw((7,), 9)
    for changed in ({"bias": p["bias"] + offset}, {"z_t": p["z_t"] + offset}):
        np.testing.assert_allclose(run(p, **changed)[0], wanted, rtol=1e-11)
    np.testing.assert_allclose(grads[3], 0, atol=1e-12)

    @jax.jit
    @jax.grad
    def of_features(f):
        s = losses.standardize(f)
        return losses.log_sum(s, losses.standardize(p["z_t"]))

    with jax.enable_x64(True):
        gradient = numpy(of_features(p["z_s"] @ p["kernel"]))
    np.testing.assert_allclose(gradient.sum(0), 0, atol=1e-12)
    assert np.abs(gradient).max() > 1e-3


def test_scales_are_taken_out_without_eps():
    p = problem(eps=0.0)
    wanted, _ = run(p)
    scale = np.array([1, 1, 7.0, 1, 1e-3, 1, 1])
    for changed in ({"kernel": p["kernel"] * scale}, {"z_t": p["z_t"] * scale}):
        np.testing.assert_allclose(run(p, **changed)[0], wanted, rtol=1e-11)
    scale[2] = -1
    assert abs(run(p, kernel=p["kernel"] * scale)[0] - wanted) > 1e-3


@pytest.mark.parametrize("eps", [0.0, 1e-4, 0.3])
def test_columns_of_the_projector_only_grow(eps):
    """w_j . dL/dw_j = m_j eps / (var_j + eps): without eps, columns move at right angles."""
    p = problem(eps)
    _, (_, _, of_kernel, _) = run(p)
    with jax.enable_x64(True):
        features = p["z_s"] @ p["kernel"]
        s, t = numpy([standardize(x, eps=eps) for x in (features, p["z_t"])])
        of_s = numpy(slope_of(s, t))
    m = (of_s * s).sum(0)
    wanted = m * eps / (features.var(0) + eps)
    np.testing.assert_allclose((p["kernel"] * of_kernel).sum(0), wanted, atol=1e-11)
    assert np.abs(m).max() > 0.1


def test_a_perfect_projector():
    p = problem(rows=40)
    exact = p["z_s"] @ p["kernel"]
    start, _ = run(p, z_t=exact, kernel=draw((5, 7), 20))
    found, grads = run(p, z_t=exact, bias=np.zeros(7))
    assert found < start - 40
    assert not any(np.isnan(g).any() for g in grads)


# --- numerics -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("log_eps", [0.0, 1e-5])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 4.0, 8.0])
def test_no_difference_has_no_gradient(alpha, log_eps, dtype):
    x = draw((4, 3), dtype=dtype)
    with jax.enable_x64(dtype is np.float64):
        value, grads = numpy(at_match()(x, x, dtype(alpha), dtype(log_eps)))
    np.testing.assert_allclose(value, np.log(log_eps) if log_eps else -np.inf, rtol=1e-6)
    assert np.isfinite(grads[0]).all()
    assert not grads[0].any()
    assert np.isfinite(grads[1:]).all()


@functools.cache
def at_match():
    def loss(s, t, alpha, log_eps):
        return losses.log_sum(s, t, alpha=alpha, log_eps=log_eps)

    return jax.jit(jax.value_and_grad(loss, (0, 2, 3)))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_one_entry_without_difference(alpha):
    """Its gradient is 0, and the others' are what they are without it."""
    d = DIFFERENCE.copy()
    d[2, 3] = 0
    value, gradient = log_sum(d, alpha)
    rest = np.delete(d.ravel(), 2 * 5 + 3)[:, None]
    wanted, of_rest = log_sum(rest, alpha)
    assert gradient[2, 3] == 0
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    np.testing.assert_allclose(np.delete(gradient.ravel(), 13), of_rest[:, 0], rtol=1e-11)


def test_tiny_differences_do_not_underflow():
    d = (1e-7 * DIFFERENCE).astype(np.float32)
    value, gradient = numpy(of_difference()(d, np.float32(8)))
    wanted, slope = log_sum(d.astype(np.float64), 8.0)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4)
    assert (np.abs(d) ** 8).sum() == 0  # as the formula read literally has it


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_passed_on(bad):
    x = draw((6, 3), dtype=np.float32)
    x[2, 1] = bad
    other = draw((6, 3), 1, np.float32)
    assert not np.isfinite(log_sum_of(x, other))
    for eps in (0.0, 1e-4):
        s = numpy(standardize(x, eps=eps))
        assert not np.isfinite(s[:, 1]).any()
        assert np.isfinite(s[:, (0, 2)]).all()
        assert not np.isfinite(log_sum_of(s, other))
        assert not np.isfinite(jax.jit(losses.correlation_log_sum)(s, other))
    assert np.isnan(losses.group_standardize(x, groups=1)[2]).all()
    assert np.isnan(losses.l2_normalize(x)[2, 1])


@pytest.mark.parametrize("offset", [1e2, 1e3, 3e3])
def test_large_means_keep_their_digits(offset):
    """One-pass variances are off by 1e-4, 1e-2 and NaN here."""
    x = (draw((64, 8)) + offset).astype(np.float32)
    found = standardize(x)
    exact = x.astype(np.float64)
    wanted = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-4)
    np.testing.assert_allclose(found, wanted, atol=1e-6 * offset)


@pytest.mark.parametrize("value", [0.1, 3.7, -0.7, 1000 / 3, 0.0])
@pytest.mark.parametrize("rows", [13, 64, 100])
def test_constant_channels(value, rows):
    """Their mean isn't the constant to the last digit, which must not become a deviation."""
    x = draw((rows, 3), dtype=np.float32)
    x[:, 1] = value

    weighted = weighted_program()
    gradient, y = weighted(x, 0.0)
    assert not y[:, 1].any()
    assert not gradient[:, 1].any()
    gradient, y = weighted(x, 1e-4)
    np.testing.assert_allclose(y[:, 1], 0, atol=1e-2)
    # Amplified by up to 1 / sqrt(eps).
    assert 1 < np.abs(gradient[:, 1]).max() <= 110
    assert not losses.group_standardize(np.full((2, 6), value, np.float32), groups=3).any()


@functools.cache
def weighted_program():
    def weighted(x, eps):
        weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
        y = losses.standardize(x, eps=eps)
        return (weights * y).sum(), y

    return jax.jit(jax.grad(weighted, has_aux=True))


def test_half_precision_is_close():
    """Features stored in bfloat16; reductions are float32."""
    s, t = draw((256, 64), 1, np.float32), draw((256, 64), 2, np.float32)

    @jax.jit
    def loss(s, t):
        return losses.log_sum(losses.standardize(s), losses.standardize(t))

    found = loss(jnp.asarray(s, jnp.bfloat16), jnp.asarray(t, jnp.bfloat16))
    assert found.dtype == jnp.float32
    assert abs(found - loss(s, t)) < 0.01
    # float16 would overflow: the sum is above 65504.
    assert loss(s, t) > math.log(65504)
    assert np.isfinite(loss(s.astype(np.float16), t.astype(np.float16)))


def test_seeds_under_vmap():
    seeds = [problem(seed=30 + 10 * i) for i in range(3)]
    with jax.enable_x64(True):
        arrays = [np.stack(a) for a in zip(*map(inputs, seeds), strict=True)]
        mapped = numpy(jax.jit(jax.vmap(projected, (0, 0, 0, 0, None)))(*arrays, 4.0)[0])
    np.testing.assert_allclose(mapped, [run(p)[0] for p in seeds], rtol=1e-12)


def test_alpha_may_change_without_a_new_trace():
    traces = []

    @jax.jit
    def loss(d, alpha, log_eps):
        traces.append(1)
        return losses.log_sum(d, jnp.zeros_like(d), alpha=alpha, log_eps=log_eps)

    d = DIFFERENCE.astype(np.float32)
    for alpha in (1.0, 2.0, 4.0):
        for log_eps in (0.0, 1e-5, 3.0):
            wanted = np.log((np.abs(DIFFERENCE) ** alpha).sum() + log_eps)
            np.testing.assert_allclose(loss(d, alpha, log_eps), wanted, rtol=1e-5)
    assert len(traces) == 1


# --- masks ----------------------------------------------------------------------------------


def test_masked_rows_are_deleted_rows():
    """Through projector, statistics and distance at once, also where they hold NaN."""
    p = problem()
    kept = np.arange(12) % 3 != 1
    hidden = {k: np.where(kept[:, None], p[k], np.nan) for k in ("z_s", "z_t")}
    deleted, wanted = run({**p, "z_s": p["z_s"][kept], "z_t": p["z_t"][kept]})

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 2))
    def loss(z_s, z_t, kernel, bias):
        z_s = losses.center(z_s, where=kept)  # which leaves zeros for the NaN
        return projected(z_s, z_t, kernel, bias, 4.0, where=kept)[0]

    with jax.enable_x64(True):
        value, grads = numpy(loss(hidden["z_s"], hidden["z_t"], p["kernel"], p["bias"]))
    np.testing.assert_allclose(value, deleted, rtol=1e-12)
    np.testing.assert_allclose(grads[0][kept], wanted[0], atol=1e-11)
    assert not grads[0][~kept].any()
    np.testing.assert_allclose(grads[1], wanted[2], atol=1e-11)


# --- bad input ------------------------------------------------------------------------------

X = np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: losses.log_sum(X[0], X[0]), ValueError, "^student must have 2 dimensions"),
        (lambda: losses.log_sum(X[None], X), ValueError, "^student must have 2 dimensions"),
        (lambda: losses.log_sum(X, X[:3]), ValueError, r"\(3, 3\) like teacher, got \(4, 3\)"),
        (lambda: losses.log_sum(X, X[:, :2]), ValueError, r"\(4, 2\) like teacher, got \(4, 3\)"),
        (lambda: losses.log_sum(X[:0], X[:0]), ValueError, "^student must have examples"),
        (lambda: losses.log_sum(X.astype(int), X), TypeError, "^student must be a floating-point"),
        (lambda: losses.log_sum(X > 0, X), TypeError, "^student must be a floating-point"),
        (lambda: losses.log_sum(X, X + 0j), TypeError, "^teacher must be a floating-point"),
        *(
            (lambda alpha=alpha: losses.log_sum(X, X, alpha=alpha), ValueError, "^alpha must be")
            for alpha in (0, -1.0, math.nan, math.inf)
        ),
        (lambda: losses.log_sum(X, X, log_eps=-1e-9), ValueError, "^log_eps must be"),
        (lambda: losses.log_sum(X, X, alpha=X), ValueError, "^alpha must be"),
        (lambda: losses.standardize(X[:1]), ValueError, "at least 2 samples, got .*(1, 3)"),
        (lambda: losses.standardize(X[:0]), ValueError, "^x must have examples"),
        (lambda: losses.standardize(X, eps=-1e-9), ValueError, "^eps must be .* at least 0"),
        (lambda: losses.standardize(X[None]), ValueError, "^x must have 2 dimensions"),
        (lambda: losses.correlation_log_sum(X[:1], X[:1]), ValueError, "at least 2 samples"),
        (lambda: losses.correlation_distance(X[:1], X[:1]), ValueError, "at least 2 samples"),
        (lambda: losses.correlation_log_sum(X, X, power=0.0), ValueError, "^power must be"),
        (lambda: losses.correlation_distance(X, X, power=-2), ValueError, "^power must be"),
        (lambda: losses.group_standardize(X, groups=2), ValueError, "^groups must divide the 3"),
        (lambda: losses.group_standardize(X, groups=0), ValueError, "^groups must be"),
        (lambda: losses.l2_normalize(X, eps=0.0), ValueError, "^eps must be .* above 0"),
        (lambda: losses.pool(X[0]), ValueError, "^features must have at least 2 dimensions"),
        (lambda: losses.pool(np.ones((1, 1, 1, 1, 1))), ValueError, r"^features must be \[B, D\]"),
        (lambda: losses.pool(X, skip_tokens=1), ValueError, "^skip_tokens must be .* at most 0"),
        (lambda: losses.pool(X[None], skip_tokens=4), ValueError, "^skip_tokens must be"),
        (lambda: losses.feature_mse(X, X[:, :2]), ValueError, "like teacher"),
    ],
)  # fmt: skip
def test_bad_input(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_alpha_below_one_is_allowed_with_a_warning():
    with pytest.warns(UserWarning, match=r"^alpha = 0.5 is below 1") as told:
        value = losses.log_sum(X, 0 * X, alpha=0.5)
    assert told[0].filename == __file__
    np.testing.assert_allclose(value, np.log(12), rtol=1e-6)
    with pytest.warns(UserWarning, match=r"^power = 0.5 is below 1"):
        losses.correlation_log_sum(X, X, power=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses.log_sum(X, 0 * X, alpha=jnp.float32(0.5))


def test_an_axis_that_is_not_there():
    with pytest.raises(NameError, match="rows"):
        losses.standardize(X, axis_name="rows")


def test_pools_maps_and_tokens():
    maps = draw((2, 3, 4, 5), dtype=np.float32)
    np.testing.assert_allclose(losses.pool(maps), maps.mean((1, 2)), rtol=1e-5)
    tokens = maps.reshape(2, 12, 5)
    np.testing.assert_allclose(losses.pool(tokens, skip_tokens=2), tokens[:, 2:].mean(1), rtol=1e-5)
    np.testing.assert_array_equal(losses.pool(tokens[:, 0]), tokens[:, 0])
