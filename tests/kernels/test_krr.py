"""Ridge regression and the loss of KRR-ST: recorded values, invariants, precision, bad input."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import kernels

# Values and gradients of the published code in float64 (db-Lee/selfsup_dd, distill.py).
GOLDEN = np.load(Path(__file__).parent / "golden_krr.npz")
CASES = ("dual_m5_d24", "primal_m20_d6", "square_m8_d7", "m1", "dup_row")
METHODS = ("auto", "dual", "primal", "svd")


def case(name):
    return {k.split("/")[1]: GOLDEN[k] for k in GOLDEN.files if k.startswith(f"{name}/")}


def arrays(golden, dtype):
    return [golden[k].astype(dtype) for k in ("f_syn", "y_syn", "f_real", "y_real")]


def distance(found, wanted):
    """Relative, in the Frobenius norm."""
    wanted = np.asarray(wanted, np.float64)
    return np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)


def value_and_grad(arguments, wrt=(0, 1), **options):
    def loss(*arguments):
        return kernels.krr_loss(*arguments, **options)

    return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss, wrt))(*arguments))


def problem(m=6, d=9, n=8, k=3, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(dtype) for s in ((m, d), (m, k), (n, d), (n, k))]


def closed_form(f, y, lam, *, bias=True):
    """W (and the bias in its last row) by NumPy, from the side that was not asked for."""
    full = np.concatenate([f, np.ones((len(f), 1))], 1) if bias else f
    return np.linalg.solve(full.T @ full + lam * np.eye(full.shape[1]), full.T @ y)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_recorded_in_float64(name, method):
    golden = case(name)

    def everything(f, y, real, wanted):
        found = jax.value_and_grad(kernels.krr_loss, (0, 1))(f, y, real, wanted, method=method)
        fit = kernels.ridge(f, y, method=method)
        return *found, kernels.ridge_predict(fit, real), fit.penalty

    with jax.enable_x64(True):
        found = jax.jit(everything)(*arrays(golden, np.float64))
        loss, grads, predicted, penalty = jax.tree.map(np.asarray, found)
    limit = 1e-9 if golden["cond_f64"] < 1e5 else 1e-8
    assert distance(loss, golden["loss_f64"]) < 1e-10
    assert distance(grads[0], golden["grad_f_syn_f64"]) < limit
    assert distance(grads[1], golden["grad_y_syn_f64"]) < limit
    assert distance(penalty, golden["lambda_f64"]) < 1e-14
    assert distance(predicted, golden["pred_f64"]) < limit


@pytest.mark.parametrize("name", CASES)
def test_recorded_in_float32(name):
    golden = case(name)
    fast = value_and_grad(arrays(golden, np.float32))[1]
    accurate = value_and_grad(arrays(golden, np.float32), method="svd")[1]
    for i, key in enumerate(("grad_f_syn", "grad_y_syn")):
        wanted = golden[f"{key}_f64"]
        official = distance(golden[f"{key}_f32"], wanted)
        if golden["cond_f64"] < 1e4:
            assert distance(fast[i], wanted) < 1e-5
        assert distance(fast[i], wanted) < 3 * official + 1e-6
        assert distance(accurate[i], wanted) < 1e-5
    assert all(x.dtype == np.float32 for x in (*fast, *accurate))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_solving_in_float64_makes_float32_right_on_either_side(name, method):
    golden = case(name)
    with jax.enable_x64(True):
        found = value_and_grad(arrays(golden, np.float32), method=method, solve_dtype=jnp.float64)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(found))
    assert distance(found[1][0], golden["grad_f_syn_f64"]) < 1e-6
    assert distance(found[1][1], golden["grad_y_syn_f64"]) < 1e-6


@pytest.mark.parametrize(("m", "d"), [(6, 9), (9, 4), (5, 5), (5, 4), (1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_closed_form(m, d, bias):
    f, y, real, wanted = problem(m, d)
    lam = 1e-3 * ((f**2).sum() + m * bias)
    expected = closed_form(f, y, lam, bias=bias)
    full = np.concatenate([real, np.ones((len(real), 1))], 1) if bias else real

    def every(f, y, real, wanted):
        options = [{"reg": 1e-3, "add_bias": bias, "method": method} for method in METHODS]
        fits = [kernels.ridge(f, y, **o) for o in options]
        return fits, [kernels.krr_loss(f, y, real, wanted, **o) for o in options]

    with jax.enable_x64(True):
        for fit, loss in zip(*jax.jit(every)(f, y, real, wanted), strict=True):
            found = np.concatenate([fit.weights, fit.bias[None]])[: d + bias]
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
            assert bias or not np.any(fit.bias)
            np.testing.assert_allclose(loss, np.mean((full @ expected - wanted) ** 2), rtol=1e-10)


@pytest.mark.parametrize(
    ("shape", "reg_grad", "reg_scale"),
    [
        ((6, 9), False, "trace"),
        ((6, 9), True, "mean_trace"),
        ((9, 4), True, "trace"),
        ((9, 4), False, "absolute"),
    ],
)
def test_gradients_are_those_of_the_naive_formula(shape, reg_grad, reg_scale):
    f, y, real, wanted = problem(*shape)

    def naive(f, y, reg):
        full, ahead = (
            jnp.concatenate([x, jnp.ones((len(x), 1))], 1) for x in (f, jnp.asarray(real))
        )
        gram = full @ full.T
        trace = jnp.trace(gram if reg_grad else jax.lax.stop_gradient(gram))
        scale = {"trace": trace, "mean_trace": trace / len(f), "absolute": 1.0}[reg_scale]
        alpha = jnp.linalg.solve(gram + reg * scale * jnp.eye(len(f)), y)
        return jnp.mean((ahead @ full.T @ alpha - wanted) ** 2)

    with jax.enable_x64(True):
        expected = jax.jit(jax.value_and_grad(naive, (0, 1, 2)))(f, y, 1e-2)

        def ours(method):
            def loss(f, y, reg):
                return kernels.krr_loss(
                    f, y, real, wanted,
                    reg=reg, reg_scale=reg_scale, reg_grad=reg_grad, method=method,
                )  # fmt: skip

            return jax.value_and_grad(loss, (0, 1, 2))

        for found in jax.jit(lambda *a: [ours(m)(*a) for m in METHODS[1:]])(f, y, 1e-2):
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                assert distance(a, b) < 1e-9


@pytest.mark.parametrize("method", METHODS[1:])
def test_central_differences_with_lambda_frozen(method):
    f, y, real, wanted = problem()
    rng = np.random.default_rng(1)
    moves = rng.standard_normal(f.shape), rng.standard_normal(y.shape)
    lam = 1e-3 * ((f**2).sum() + len(f))
    with jax.enable_x64(True):
        _, grads = value_and_grad((f, y, real, wanted), reg=1e-3, method=method)

        @jax.jit
        def at(step):
            moved = f + step * moves[0], y + step * moves[1]
            return kernels.krr_loss(
                *moved, real, wanted, reg=lam, reg_scale="absolute", method=method
            )

        slope = (at(1e-5) - at(-1e-5)) / 2e-5
    np.testing.assert_allclose(
        slope, sum((g * v).sum() for g, v in zip(grads, moves, strict=True)), rtol=1e-6
    )


def test_the_real_side_and_nothing_else_is_data():
    with jax.enable_x64(True):
        _, grads = value_and_grad(problem(), (0, 1, 2, 3))
    assert np.any(grads[0])
    assert np.any(grads[1])
    assert not np.any(grads[2])
    assert not np.any(grads[3])


def test_invariants():
    f, y, real, wanted = problem(dtype=np.float64)
    rng = np.random.default_rng(2)
    rows, columns, others = (rng.permutation(n) for n in (len(f), f.shape[1], len(real)))
    turn = np.linalg.qr(rng.standard_normal((f.shape[1],) * 2))[0]
    with jax.enable_x64(True):
        loss, (df, dy) = value_and_grad((f, y, real, wanted))
        again, (df2, dy2) = value_and_grad((f[rows], y[rows], real, wanted))
        np.testing.assert_allclose(again, loss, rtol=1e-12)
        np.testing.assert_allclose(df2, df[rows], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(dy2, dy[rows], rtol=1e-8, atol=1e-10)
        loss_of = jax.jit(kernels.krr_loss)
        for changed in (
            (f[:, columns], y, real[:, columns], wanted),
            (f @ turn, y, real @ turn, wanted),
            (f, y, real[others], wanted[others]),
            (f, y, np.tile(real, (2, 1)), np.tile(wanted, (2, 1))),
        ):
            np.testing.assert_allclose(loss_of(*changed), loss, rtol=1e-10)
        halves = [loss_of(f, y, real[i::2], wanted[i::2]) for i in range(2)]
        np.testing.assert_allclose(np.mean(halves), loss, rtol=1e-12)
        at = [float(loss_of(f, t * y, real, wanted)) for t in range(4)]
        np.testing.assert_allclose(np.diff(at, 3), 0, atol=1e-10 * max(at))


def test_limits_of_the_penalty():
    f, y, real, wanted = problem()

    def fitted(f, y):
        fits = [kernels.ridge(f, y, reg=1e-12, method=method) for method in METHODS]
        return [kernels.ridge_predict(fit, f) for fit in fits]

    with jax.enable_x64(True):
        heavy = jax.jit(lambda *a: kernels.krr_loss(*a, reg=1e12))(f, y, real, wanted)
        np.testing.assert_allclose(heavy, np.mean(wanted**2), rtol=1e-9)
        for method, found in zip(METHODS, jax.jit(fitted)(f, y), strict=True):
            limit = 1e-3 if method == "primal" else 1e-9  # the side that is singular without lam
            np.testing.assert_allclose(found, y, atol=limit)


def test_scaling_the_features():
    """With lam from the trace it changes nothing, unless a column of ones keeps its size."""
    f, y, real, wanted = problem()
    with jax.enable_x64(True):
        for bias, same in ((False, True), (True, False)):
            loss = jax.jit(lambda *a, bias=bias: kernels.krr_loss(*a, reg=1e-2, add_bias=bias))
            one, other = (float(loss(c * f, y, c * real, wanted)) for c in (1.0, 7.0))
            assert (abs(other - one) < 1e-12 * one) == same


def test_every_product_is_exact_and_there_is_one_small_factor():
    """A TPU's default is bfloat16 passes, a recent GPU's TF32: far too little for Gram matrices."""
    for m, d, size in ((6, 9, 6), (9, 4, 5)):
        program = jax.make_jaxpr(jax.value_and_grad(kernels.krr_loss, (0, 1)))(
            *problem(m, d, dtype=np.float32)
        )
        found = list(equations(program.jaxpr))
        products = [e for e in found if e.primitive.name == "dot_general"]
        exact = jax.lax.Precision.HIGHEST
        assert products
        assert all(e.params["precision"] == (exact, exact) for e in products)
        factors = [e.invars[0].aval.shape for e in found if e.primitive.name == "cholesky"]
        assert factors == [(size, size)]


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("method", METHODS[1:])
def test_one_program_for_all_penalties_and_vmap(method):
    arguments, traces = problem(dtype=np.float32), []

    @jax.jit
    def loss(reg):
        traces.append(reg)
        return kernels.krr_loss(*arguments, reg=reg, method=method)

    regs = jnp.array([1e-4, 1e-2, 1.0])
    single = [loss(reg) for reg in regs]
    assert len(traces) == 1
    np.testing.assert_allclose(jax.vmap(loss)(regs), single, rtol=1e-5)
    assert len({float(x) for x in single}) == 3
    stacked = [np.stack([x, 2 * x]) for x in arguments]
    options = {"reg": 1e-2, "method": method}
    many = jax.jit(jax.vmap(jax.grad(lambda *a: kernels.krr_loss(*a, **options))))(*stacked)
    one = value_and_grad(arguments, **options)[1][0]
    np.testing.assert_allclose(many[0], one, rtol=1e-3, atol=1e-5)


def test_low_precision_comes_in_and_float32_goes_out():
    low = [jnp.asarray(x, jnp.bfloat16) for x in problem(dtype=np.float32)]
    high = [np.asarray(x, np.float32) for x in low]
    loss, grads = value_and_grad(low)
    assert loss.dtype == np.float32
    assert all(g.dtype == jnp.bfloat16 for g in grads)  # of the inputs, as always
    np.testing.assert_array_equal(loss, value_and_grad(high)[0])
    assert kernels.ridge(*low[:2]).weights.dtype == jnp.float32


def test_finite_tells_of_a_lost_factor():
    f, y, real, wanted = problem(dtype=np.float32)
    f[1] = f[0]  # singular without a penalty that float32 can see

    @jax.jit
    def look(f):
        lost = kernels.krr_loss(f, y, real, wanted, reg=1e-12, method="dual")
        made = {m: kernels.ridge(f, y, reg=1e-12, method=m).finite for m in ("dual", "svd")}
        return lost, made, kernels.ridge(f, y).finite

    lost, made, usual = look(f)
    assert np.isnan(lost)
    assert not made["dual"]
    assert made["svd"]
    assert usual
    f[0, 0] = np.nan
    assert not look(f)[2]


F, Y, REAL, WANTED = problem(dtype=np.float32)
BAD = {
    "no synthetic rows": ({"f_s": F[:0], "y_s": Y[:0]}, {}, ValueError, "f_s must not be empty"),
    "no real rows": ({"f_t": REAL[:0], "y_t": WANTED[:0]}, {}, ValueError, "f_t must not be empty"),
    "no targets": ({"y_s": Y[:, :0]}, {}, ValueError, "y_s must not be empty"),
    "widths": ({"f_t": REAL[:, :3]}, {}, ValueError, r"f_t must have rows of 9 columns, as f_s"),
    "target widths": ({"y_t": WANTED[:, :2]}, {}, ValueError, "y_t must have rows of 3 columns"),
    "rows": ({"y_s": Y[:4]}, {}, ValueError, "y_s must have 6 rows, as f_s has"),
    "real rows": ({"y_t": WANTED[:4]}, {}, ValueError, "y_t must have 8 rows, as f_t has"),
    "vector": ({"f_s": F[0]}, {}, ValueError, "f_s must have 2 dimensions"),
    "integers": ({"f_s": F.astype(int)}, {}, TypeError, "f_s must be a floating-point array"),
    "no array": ({"y_s": None}, {}, TypeError, "y_s must be an array"),
    "zero": ({}, {"reg": 0.0}, ValueError, "reg must be a finite number above 0, got 0"),
    "negative": ({}, {"reg": -1.0}, ValueError, "reg must be a finite number above 0"),
    "infinite": ({}, {"reg": np.inf}, ValueError, "reg must be a finite number above 0"),
    "many": ({}, {"reg": jnp.ones(2)}, ValueError, "reg must be a finite number"),
    "method": ({}, {"method": "lu"}, ValueError, "method must be one of auto, dual, primal, svd"),
    "scale": ({}, {"reg_scale": "max"}, ValueError, "reg_scale must be one of absolute"),
    "x64 off": ({}, {"solve_dtype": jnp.float64}, ValueError, "solve_dtype must be float32 while"),
    "half": ({}, {"solve_dtype": jnp.bfloat16}, ValueError, "solve_dtype must be float32 or"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changed, options, kind, message = BAD[name]
    arguments = {"f_s": F, "y_s": Y, "f_t": REAL, "y_t": WANTED, **changed}
    with pytest.raises(kind, match=message):
        kernels.krr_loss(*arguments.values(), **options)


def test_bad_input_of_predict():
    fit = kernels.ridge(F, Y)
    with pytest.raises(ValueError, match="features must have 9 columns"):
        kernels.ridge_predict(fit, REAL[:, :4])
    with pytest.raises(ValueError, match="targets must have 6 rows, as features has"):
        kernels.ridge(F, Y[:3])
