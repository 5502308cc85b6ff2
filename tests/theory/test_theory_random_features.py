"""Random features and early stopping: golden values, limits, simulations, derivatives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import theory as T

P = 200
INDEX = np.arange(1.0, P + 1)
LAM, V = INDEX**-1.8, INDEX**-0.75
# teacher (n, k, ridge, noise) -> student (n, k, ridge); gamma and kappa of both; both risks.
GOLDEN = (
    ((100, 60, 0.01, 0.05), (100, 150, 0.01),
     (0.001579449815991232, 0.0002086536347701501),
     (0.0007342403015853532, 0.00037520652709765236),
     0.43953573522222655, 0.4599552200700877),
    ((100, 400, 0.001, 0.1), (80, np.inf, 0.1),
     (0.0003694941261885857, 0.0002804147696121412),
     (0.0025768951137283363, 0.0025768951137283363),
     0.34777142980850634, 0.3559667432321231),
    ((300, 80, 0.001, 0.1), (150, 300, 0.001),
     (0.0006071861715771142, 4.5331477443541955e-06),
     (0.00012635698206619797, 6.925979598406327e-05),
     0.24143319436326083, 0.26403920925336055),
)  # fmt: skip


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def fixed(v):
    return T.Moments(v, v**2)


def rf_risk(n, k, ridge=0.0, noise_var=0.0, lam=LAM, v=V):
    return T.rf_excess_risk(
        v, T.rf_moments(lam, fixed(v), n=n, k=k, noise_var=noise_var, ridge=ridge)
    )


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-9), (np.float32, 5e-5)])
def test_golden_random_features(case, dtype, rtol):
    (n, k, ridge, noise), (n2, k2, ridge2), point, point2, risk, risk2 = case
    lam, v = LAM.astype(dtype), V.astype(dtype)
    found = T.rf_fixed_point(lam, n, k, ridge), T.rf_fixed_point(lam, n2, k2, ridge2)
    teacher = T.rf_moments(lam, fixed(v), n=n, k=k, noise_var=noise, ridge=ridge)
    student = T.rf_moments(lam, teacher, n=n2, k=k2, ridge=ridge2)
    risks = T.rf_excess_risk(v, teacher), T.rf_excess_risk(v, student)
    assert found[0].gamma.dtype == risks[0].dtype == dtype
    np.testing.assert_allclose(found, (point, point2), rtol=rtol)
    np.testing.assert_allclose(risks, (risk, risk2), rtol=rtol)


def test_golden_population_teacher_and_early_stopping():
    lam = np.arange(1.0, 301.0) ** -1.5
    v = np.zeros(300)
    v[:3] = 1.0, 0.7, 0.5
    times = np.array([1.0, 3.0, 10.0, 25.0, 100.0, 1e6])
    golden = [
        0.5566012651807459, 0.14925202412578126, 0.00903070108214669, 0.001346106053861462,
        0.003519653108841532, 0.024558029327907432,
    ]  # fmt: skip
    teacher = T.rf_moments(lam, fixed(v), n=np.inf, k=50)
    gamma, kappa = T.rf_fixed_point(lam, np.inf, 50)
    np.testing.assert_allclose(gamma, 0.006807215096151657, rtol=1e-12)
    assert kappa == 0
    np.testing.assert_allclose(T.rf_excess_risk(v, teacher), golden[-1], rtol=1e-12)
    student = T.gradient_flow_moments(lam, teacher, times)
    np.testing.assert_allclose(T.rf_excess_risk(v, student), golden, rtol=1e-12)


def test_published_early_stopping_exponents():
    """Best stopping time: below the teacher's error to a power that grows towards 2."""
    lam = np.arange(1.0, 301.0) ** -1.5
    v = np.zeros(300)
    v[:3] = 1.0, 0.7, 0.5
    times = jnp.geomspace(1.0, 300.0, 1200)
    published = {20: (0.1065, 0.01982, 1.75), 50: (0.02456, 0.001349, 1.78),
                 100: (0.006657, 0.000116, 1.81)}  # fmt: skip
    for k, (error, best, exponent) in published.items():
        teacher = T.rf_moments(lam, fixed(v), n=np.inf, k=k)
        own = T.rf_excess_risk(v, teacher)
        student = T.rf_excess_risk(v, T.gradient_flow_moments(lam, teacher, times)).min()
        np.testing.assert_allclose(own, error, rtol=5e-4)
        np.testing.assert_allclose(student, best, rtol=5e-3)
        assert abs(jnp.log(student) / jnp.log(own) - exponent) < 0.006


def test_agrees_with_simon_et_al():
    """Their closed form of the test error of RF ridge regression (2311.14646)."""
    for n, k, ridge, noise in [(50, 80, 0.01, 0.1), (120, 40, 0.3, 0.0), (70, 70, 1e-4, 0.5)]:
        gamma, kappa = (float(x) for x in T.rf_fixed_point(LAM, n, k, ridge))
        learned = LAM / (LAM + gamma)
        z, q = learned.sum(), (learned**2).sum()
        weights = gamma / (LAM + gamma) - kappa * LAM / (LAM + gamma) ** 2 * k / (k - q)
        error = (weights @ V**2 + noise) / (1 - (q * (k - 2 * z) + z**2) / (n * (k - q)))
        np.testing.assert_allclose(rf_risk(n, k, ridge, noise) + noise, error, rtol=1e-10)


@pytest.mark.parametrize("ridge", [0.0, 1e-9, 0.02, 30.0])
def test_fixed_point_solves_both_equations(ridge):
    rng = np.random.default_rng(0)
    lam = rng.permutation(np.concatenate([np.exp(3 * rng.normal(size=60)), np.zeros(7)]))
    for n, k in itertools.product([3.5, 20.0, 59.0, 75.0, 1e4], repeat=2):
        gamma, kappa = (float(x) for x in T.rf_fixed_point(lam, n, k, ridge))
        if ridge == 0 and min(n, k) >= 60:
            assert gamma == kappa == 0
            continue
        learned = (lam / (lam + gamma)).sum()
        np.testing.assert_allclose(learned + k * kappa / gamma, k, rtol=1e-11)
        if ridge > 1e-3:  # for less, n - z has no digits here
            np.testing.assert_allclose((n - learned) * kappa, ridge, rtol=1e-9)
        np.testing.assert_allclose(
            T.rf_fixed_point(lam * 7, n, k, ridge * 7), (7 * gamma, 7 * kappa), rtol=1e-12
        )


def test_without_a_ridge_the_smaller_size_decides():
    for n, k in [(30, 90), (90, 30), (40.5, np.inf), (np.inf, 40.5)]:
        gamma, kappa = T.rf_fixed_point(LAM, n, k)
        np.testing.assert_allclose(gamma, T.effective_reg(LAM, min(n, k)), rtol=1e-13)
        np.testing.assert_allclose(kappa, gamma * max(0.0, 1 - n / k), rtol=1e-13)
    point = T.rf_fixed_point(LAM, 30, 90)
    for other in (T.rf_fixed_point(LAM, 30, 90, 1e-12), T.rf_fixed_point(LAM, 30, 90, 1e-15)):
        np.testing.assert_allclose(other, point, rtol=1e-7)


def test_infinitely_many_features_are_linear_regression():
    beta = V / np.sqrt(LAM)
    for n, ridge, noise in [(60, 0.0, 0.1), (60, 0.03, 0.1), (250, 0.0, 0.2), (250, 0.5, 0.0)]:
        linear = T.estimator_moments(LAM, fixed(beta), n=n, noise_var=noise, ridge=ridge)
        features = T.rf_moments(LAM, fixed(V), n=n, k=np.inf, noise_var=noise, ridge=ridge)
        many = T.rf_moments(LAM, fixed(V), n=n, k=1e13, noise_var=noise, ridge=ridge)
        np.testing.assert_allclose(features.mean, np.sqrt(LAM) * linear.mean, rtol=1e-12)
        np.testing.assert_allclose(features.second, LAM * linear.second, rtol=1e-12)
        np.testing.assert_allclose(many.second, features.second, rtol=1e-9)


def test_everything_infinite_is_the_identity():
    second = V**2 + 0.1
    for ridge in (0.0, 2.0):
        same = T.rf_moments(
            LAM, T.Moments(V, second), n=np.inf, k=np.inf, ridge=ridge, noise_var=3.0
        )
        np.testing.assert_allclose(same.mean, V, rtol=1e-15)
        np.testing.assert_allclose(same.second, second, rtol=1e-15)
        assert rf_risk(np.inf, np.inf, ridge) == 0
    far = rf_risk(1e9, np.inf, 0.1), rf_risk(np.inf, 1e9), rf_risk(1e9, 1e9, 0.1)
    assert max(far) < 1e-6


def test_peak_at_as_many_features_as_samples():
    assert rf_risk(50, 50, noise_var=0.1) == np.inf
    below, above = rf_risk(50, 49.9, noise_var=0.1), rf_risk(50, 50.1, noise_var=0.1)
    assert min(below, above) > 20 * rf_risk(50, 500, noise_var=0.1)
    assert rf_risk(50, 50, 0.1, 0.1) < 1


def simulated(rng, lam, target, n, k, ridge, noise):
    """The coefficients of one random-feature regression, in function coordinates."""
    features = np.sqrt(lam)[:, None] * rng.normal(size=(lam.size, k)) / np.sqrt(k)
    inputs = rng.normal(size=(n, lam.size))
    labels = inputs @ target + np.sqrt(noise) * rng.normal(size=n)
    design = inputs @ features
    if ridge == 0:
        weights = np.linalg.lstsq(design, labels, rcond=None)[0]
    else:
        weights = np.linalg.solve(design.T @ design + ridge * np.eye(k), design.T @ labels)
    return features @ weights


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ((60, 90, 0.01, 0.05), (80, 40, 0.02, 0.0)),
        ((100, 40, 0.0, 0.1), (50, 150, 0.0, 0.02)),
        ((50, 50, 0.1, 0.2), (120, 60, 0.003, 0.0)),
    ],
)
def test_monte_carlo(teacher, student):
    rng, trials = np.random.default_rng(7), 250
    lam, v = LAM[:120], V[:120]
    risks = []
    for _ in range(trials):
        first = simulated(rng, lam, v, *teacher)
        second = simulated(rng, lam, first, *student)
        risks.append([((v - first) ** 2).sum(), ((v - second) ** 2).sum()])
    risks = np.array(risks)
    moments, room = fixed(v), 0.0
    for i, (n, k, ridge, noise) in enumerate((teacher, student)):
        moments = T.rf_moments(lam, moments, n=n, k=k, ridge=ridge, noise_var=noise)
        risk = float(T.rf_excess_risk(v, moments))
        room += 3 * risk / min(n, k)
        error = abs(risks[:, i].mean() - risk)
        assert error <= 4 * risks[:, i].std() / np.sqrt(trials) + room
        assert room < 0.4 * risk


@jax.jit
def everything(n, k, ridge, noise, scale, v):
    """A scalar that all results of a teacher and its student enter."""
    lam = LAM * (1 + scale * jnp.cos(INDEX))
    moments = T.rf_moments(lam, fixed(v), n=n, k=k, noise_var=noise, ridge=ridge)
    moments = T.rf_moments(lam, moments, n=n, k=k, ridge=ridge)
    return T.rf_excess_risk(v, moments) + sum(T.rf_fixed_point(lam, n, k, ridge))


everything_gradient = jax.jit(jax.grad(everything, argnums=tuple(range(6))))


def central(f, x, h):
    return (8 * (f(x + h) - f(x - h)) - (f(x + 2 * h) - f(x - 2 * h))) / (12 * h)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "k", "ridge"),
    [(50.0, 90.0, 0.0), (90.0, 50.0, 0.0), (50.0, 90.0, 0.02), (90.0, 50.0, 0.02),
     (60.0, 60.0, 0.01), (50.0, np.inf, 0.02), (np.inf, 50.0, 0.0), (250.0, 300.0, 0.0),
     (300.0, 250.0, 0.4)],
)  # fmt: skip
def test_derivatives(n, k, ridge):
    at = (n, k, ridge, 0.1, 0.3, jnp.asarray(V))
    gradients = everything_gradient(*at)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
    for i, x in enumerate(at[:5]):
        if np.isinf(x):
            assert gradients[i] == 0
            continue
        if x == 0:
            continue
        difference = central(lambda y, i=i: everything(*at[:i], y, *at[i + 1 :]), x, 1e-3 * x)
        np.testing.assert_allclose(gradients[i], difference, rtol=2e-7, atol=1e-12)
    along = jnp.sin(INDEX) * V
    difference = central(lambda y: everything(*at[:5], at[5] + y * along), 0.0, 1e-3)
    np.testing.assert_allclose(gradients[5] @ along, difference, rtol=1e-8, atol=1e-12)


@jax.jit
def slope_in_ridge(lam, n, k, ridge):
    return jax.jacfwd(lambda r: jnp.stack(T.rf_fixed_point(lam, n, k, r)))(ridge)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), [(20.0, 50.0), (50.0, 20.0), (70.0, 90.0), (90.0, 70.0)])
def test_slope_at_no_ridge(n, k):
    """From the right, also where the smaller size is above the rank and gamma is 0."""
    lam = np.concatenate([LAM[:60], np.zeros(5)])
    point = slope_in_ridge(lam, n, k, 0.0)
    h = 1e-7
    steps = [np.array(T.rf_fixed_point(lam, n, k, r)) for r in (0.0, h, 2 * h)]
    np.testing.assert_allclose(point, (4 * steps[1] - 3 * steps[0] - steps[2]) / (2 * h), rtol=1e-4)


@pytest.mark.slow
def test_second_derivatives():
    @jax.jit
    def slopes(at):
        return jax.grad(lambda a: rf_risk(a[0], a[1], a[2], 0.1))(at)

    hessian = jax.jit(jax.jacfwd(slopes))
    for at in (np.array([50.0, 90.0, 0.02]), np.array([90.0, 50.0, 0.02])):
        for i in range(3):
            unit = at * np.eye(3)[i]
            difference = central(lambda x, at=at, unit=unit: slopes(at + x * unit), 0.0, 1e-3)
            np.testing.assert_allclose(hessian(at) @ unit, difference, rtol=1e-6)


def test_gradient_flow():
    moments = T.Moments(V, V**2 + 0.1)
    start = T.gradient_flow_moments(LAM, moments, 0.0)
    assert not np.any(start.mean)
    assert not np.any(start.second)
    end = T.gradient_flow_moments(np.append(LAM[:-1], 0.0), moments, np.inf)
    np.testing.assert_array_equal(end.mean, np.append(V[:-1], 0.0))
    np.testing.assert_array_equal(end.second[:-1], moments.second[:-1])
    # slow coordinates keep their digits
    slow = T.gradient_flow_moments(np.array([1.0, 1e-30]), T.Moments(jnp.ones(2), jnp.ones(2)), 1.0)
    np.testing.assert_allclose(slow.mean, [1 - np.exp(-1), 1e-30], rtol=1e-14)

    def risk(t, scale):
        flow = T.gradient_flow_moments(LAM * scale, moments, t)
        return T.rf_excess_risk(V, flow)

    for t in (0.7, 40.0):
        gradient = jax.grad(risk, argnums=(0, 1))(t, 1.0)
        np.testing.assert_allclose(gradient[0], central(lambda t: risk(t, 1.0), t, 1e-3), rtol=1e-8)
        np.testing.assert_allclose(
            gradient[1], central(lambda s, t=t: risk(t, s), 1.0, 1e-3), rtol=1e-7
        )
    assert np.all(np.isfinite(jax.grad(risk, argnums=(0, 1))(np.inf, 1.0)))


@pytest.mark.slow
def test_batches_vmap_and_jit():
    n, k = np.array([30.0, 90.0, np.inf, 40.0]), np.array([50.0, np.inf, 70.0, 40.0])
    loop = [rf_risk(a, b, 0.01, 0.1) for a, b in zip(n, k, strict=True)]
    np.testing.assert_allclose(rf_risk(n, k, 0.01, 0.1), loop, rtol=1e-13)
    vmapped = jax.jit(jax.vmap(lambda a, b: rf_risk(a, b, 0.01, 0.1)))(n, k)
    np.testing.assert_allclose(vmapped, loop, rtol=1e-13)
    grid = jax.eval_shape(lambda k: T.rf_fixed_point(LAM, n[:, None], k), k)
    assert grid.gamma.shape == grid.kappa.shape == (4, 4)
    spectra = T.rf_fixed_point(np.stack([LAM, LAM[::-1]]), 20, 30, 0.1)
    np.testing.assert_allclose(spectra.gamma[0], spectra.gamma[1], rtol=1e-13)
    assert spectra.kappa.shape == (2,)


def test_low_precision():
    lam, v = jnp.asarray(LAM, jnp.bfloat16), jnp.asarray(V, jnp.bfloat16)
    moments = T.rf_moments(lam, T.Moments(v, v), n=50, k=80, ridge=0.01)
    assert moments.mean.dtype == moments.second.dtype == jnp.float32
    wide = np.asarray(lam, np.float32), np.asarray(v, np.float32)
    np.testing.assert_array_equal(
        moments.second, T.rf_moments(wide[0], T.Moments(*2 * wide[1:]), n=50, k=80, ridge=0.01)[1]
    )
    for n, k, ridge in [(60, 61, 1e-4), (150, 60, 0.0), (190.0, np.inf, 0.0), (300, 400, 1e-5)]:
        args = (n, k, ridge, 0.1)
        single = rf_risk(*args, LAM.astype(np.float32), V.astype(np.float32))
        np.testing.assert_allclose(single, rf_risk(*args), rtol=3e-5)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lam", {"lam": -LAM}), ("n", {"n": 0}), ("n", {"n": np.nan}), ("k", {"k": -3}),
        ("k", {"k": np.array([5.0, 0.0])}), ("ridge", {"ridge": -0.1}),
        ("ridge", {"ridge": np.inf}), ("noise_var", {"noise_var": -1.0}), ("n", {"n": -np.inf}),
    ],
)  # fmt: skip
def test_bad_values(name, change):
    arguments = {"lam": LAM, "n": 10, "k": 20, "ridge": 0.1, "noise_var": 0.0, **change}
    with pytest.raises(ValueError, match=f"^{name} must"):
        T.rf_moments(arguments.pop("lam"), fixed(V), **arguments)
    arguments = {"lam": LAM, "n": 10, "k": 20, "ridge": 0.1, **change}
    if arguments.pop("noise_var", None) is None:
        with pytest.raises(ValueError, match=f"^{name} must"):
            T.rf_fixed_point(**arguments)


def test_bad_shapes_and_kinds():
    with pytest.raises(ValueError, match=r"^second must have 200 entries"):
        T.rf_moments(LAM, T.Moments(V, V[:9]), n=3, k=4)
    with pytest.raises(ValueError, match=r"^mean must have 200 entries"):
        T.rf_excess_risk(V, fixed(V[:9]))
    with pytest.raises(ValueError, match=r"^t must be a number at least 0"):
        T.gradient_flow_moments(LAM, fixed(V), -1.0)
    with pytest.raises(TypeError, match=r"^k must"):
        T.rf_fixed_point(LAM, 3, "many")
    with pytest.raises(ValueError, match=r"^max_steps must"):
        T.rf_fixed_point(LAM, 3, 4, max_steps=0)


@pytest.mark.slow
def test_invalid_under_trace_is_nan():
    good = jnp.array([20.0, 30.0, 0.1, 0.1])
    risk = jax.jit(lambda a: rf_risk(a[0], a[1], a[2], a[3]))
    assert np.isfinite(risk(good))
    for i, bad in [(0, 0.0), (0, jnp.nan), (1, -1.0), (1, -jnp.inf), (2, -0.1), (3, -0.1)]:
        assert np.isnan(risk(good.at[i].set(bad))), (i, bad)
    assert np.isnan(jax.jit(lambda x: rf_risk(20, 30, lam=x))(LAM - 0.1))
    flow = jax.jit(lambda t: T.gradient_flow_moments(LAM, fixed(V), t).mean)
    assert np.all(np.isnan(flow(-1.0)))
    assert np.isnan(T.rf_fixed_point(LAM, 50, 70, 0.01, max_steps=1).gamma)
