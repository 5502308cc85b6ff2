"""Power-law predictions: golden constants, the published table, derivatives, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special

from kdjax import theory as T

# alpha, b: q, exponent, tau_prefactor, omega, noise_multiplier, mask_cut, standard, optimal, mask,
# ratio_optimal, ratio_mask.
GOLDEN = {
    (2.0, 1.5): (0.25, 0.5, 1.5707963267948966, 0.5, 1.0, 2.4142135623730945, 3.332162203618775,
                 2.052344305954062, 2.126174389996699, 0.6159196883408578, 0.6380764981031367),
    (1.5, 1.3): (0.2, 0.3, 2.41839915231229, 1 / 3, 0.5, 4.4494897427831805, 4.275837328462379,
                 3.1618644984212345, 3.2748277347072143, 0.7394725887662015, 0.765891563018106),
    (3.0, 2.0): (1 / 3, 1.0, 1.2091995761561452, 2 / 3, 2.0, 1.3660254037844388,
                 2.4183991523122907, 1.1754395083006928, 1.2342987950398319, 0.48604032430991645,
                 0.5103784434673195),
    (2.0, 3.0): (1.0, 2.0, 1.5707963267948966, 0.5, 1.0, 2.4142135623730945, 1.0,
                 0.7853981633974483, 0.914213562373095, 0.7853981633974483, 0.914213562373095),
    (1.5, 5.5): (3.0, 3.0, 2.41839915231229, 1 / 3, 0.5, 4.4494897427831805, 2.012230885876376,
                 0.6707436286254587, 2.012230885876376, 1 / 3, 1.0),
}  # fmt: skip
# At p = 200000: n, tau, omega, and the risks standard, optimal, mask.
FINITE = {
    (2.0, 1.5): (
        (100, 0.00024419157946003393, 0.4976023783661633, 0.4056525447014373,
         0.25177691238666366, 0.2610015116054831),
        (1600, 9.569682685935617e-07, 0.5014764637768286, 0.09555787610609842,
         0.05976634371177538, 0.06207634902613413),
    ),
    (1.5, 1.3): (
        (400, 0.0004523802505087213, 0.3407379921173386, 0.7969016466125118,
         0.5943409346108763, 0.6182161515775382),
    ),
    (3.0, 2.0): (
        (100, 1.7417895488034112e-06, 0.6650000476499036, 0.02893809499977081,
         0.014120050211994497, 0.014825774559125275),
        (1600, 4.312244001520177e-10, 0.6665745779477678, 0.0018116000042919813,
         0.0008829831791744394, 0.0009274431967415552),
    ),
    (2.0, 3.0): (
        (100, 0.00024419157946003393, 0.4976023783661633, 0.00024301629347491815,
         0.00019086521002341275, 0.00022240850285674813),
        (1600, 9.569682685935617e-07, 0.5014764637768286, 9.597772694846614e-07,
         7.538112541326862e-07, 8.768633315343166e-07),
    ),
    (1.5, 5.5): (
        (400, 0.0004523802505087213, 0.3407379921173386, 4.149135789699713e-07,
         1.4185546478465978e-07, 4.1491355183415086e-07),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("at", GOLDEN)
def test_golden_constants(at):
    np.testing.assert_allclose(T.scaling_constants(*at), GOLDEN[at], rtol=1e-12)
    single = T.scaling_constants(*(np.float32(x) for x in at))
    assert single.mask.dtype == np.float32
    np.testing.assert_allclose(single, GOLDEN[at], rtol=5e-6)
    np.testing.assert_allclose(T.scaling_exponent(*at), GOLDEN[at][1], rtol=1e-14)


# How far p = 200000 and n up to 1600 are from the limit, in a risk and in a ratio: the missing tail
# of the energy weighs most for a small b, the next power of tau for a small alpha.
@pytest.mark.parametrize(
    ("at", "room", "ratio_room"),
    [((2.0, 1.5), 0.1, 0.02), ((1.5, 1.3), 0.17, 0.02), ((3.0, 2.0), 0.02, 0.005),
     ((2.0, 3.0), 0.02, 0.002), ((1.5, 5.5), 0.08, 0.03)],
)  # fmt: skip
def test_finite_size(at, room, ratio_room):
    """The risks at p = 200000 have the golden values, and the law predicts them."""
    lam, beta = T.power_law(200_000, *at)
    for n, tau, omega, *risks in FINITE[at]:
        stats = T.spectral_stats(lam, n)
        np.testing.assert_allclose((stats.tau, stats.omega), (tau, omega), rtol=1e-9)
        found = (
            T.excess_risk(lam, beta, n=n).total,
            T.optimal_surrogate_risk(lam, beta, n),
            T.masked_risk(lam, beta, n),
        )
        np.testing.assert_allclose(found, risks, rtol=1e-9)
        np.testing.assert_allclose(T.scaling_law(*at, n)[1:], risks, rtol=room)
        ratios = T.scaling_constants(*at)[-2:]
        np.testing.assert_allclose(np.array(risks[1:]) / risks[0], ratios, rtol=ratio_room)


@pytest.mark.parametrize(
    ("at", "exponent", "optimal", "mask"),
    [
        ((2.0, 1.5), 0.5, "0.6159", "0.6381"),
        ((1.5, 1.3), 0.3, "0.7395", "0.7659"),
        ((3.0, 2.0), 1.0, "0.4860", "0.5104"),
        ((2.0, 3.0), 2.0, "0.7854", "0.9142"),
        ((1.5, 5.5), 3.0, "0.3333", "1.0000"),
    ],
)
def test_published_table(at, exponent, optimal, mask):
    law = T.scaling_constants(*at)
    assert abs(law.exponent - exponent) < 1e-12
    assert (f"{law.ratio_optimal:.4f}", f"{law.ratio_mask:.4f}") == (optimal, mask)


@pytest.mark.parametrize(("at", "room"), [((2.0, 1.5), 0.025), ((3.0, 2.0), 0.002)])
def test_surrogates_change_the_constant_not_the_exponent(at, room):
    first, last = FINITE[at][0], FINITE[at][-1]
    slopes = np.log(np.array(last[3:]) / first[3:]) / np.log(last[0] / first[0])
    np.testing.assert_allclose(slopes, -T.scaling_exponent(*at), atol=room)
    assert np.ptp(slopes) < 0.006


def integrals(alpha, q):
    """The constants for q < 2, by numerical integration over log u."""

    def integral(log_f, high):
        return sum(
            scipy.integrate.quad(
                lambda x: np.exp(log_f(x) - q * x), *ends, epsabs=0, epsrel=1e-12, limit=500
            )[0]
            for ends in ((-40 / (2 - q), min(0, high)), (min(0, high), high))
        )

    far = 40 / q
    log_cut = -np.log(np.sqrt(alpha) - 1)
    standard = integral(lambda x: 2 * scipy.special.log_expit(x), far)
    optimal = integral(lambda x: scipy.special.log_expit(2 * x + np.log(alpha - 1)), far)
    mask = integral(lambda x: 2 * scipy.special.log_expit(x), log_cut)
    return standard, optimal / alpha, mask + np.exp(-q * log_cut) / (q * alpha)


@pytest.mark.parametrize("alpha", [1.02, 1.7, 3.99, 4.0, 9.0])
@pytest.mark.parametrize("q", [0.1, 0.5, 1.0, 1.3, 1.9])
def test_constants_are_the_integrals(alpha, q):
    law = T.scaling_constants(alpha, 1 + q * alpha)
    standard, optimal, mask = integrals(alpha, q)
    np.testing.assert_allclose(law.standard, standard, rtol=1e-9)
    np.testing.assert_allclose(law.optimal, optimal, rtol=1e-9)
    np.testing.assert_allclose(law.mask, mask, rtol=1e-9)
    assert law.ratio_optimal <= law.ratio_mask <= 1


def test_head_of_the_spectrum_is_zeta():
    for s in (1.001, 1.1, 1.7, 2.0, 3.0, 7.5, 40.0):
        law = T.scaling_constants(1.5, s + 3.0)
        zeta = scipy.special.zeta((s + 3.0) - 3.0)
        np.testing.assert_allclose((law.standard, law.optimal), (1.5 * zeta, 0.5 * zeta))
        assert law.mask == law.standard


def central(f, x, h):
    return (8 * (f(x + h) - f(x - h)) - (f(x + 2 * h) - f(x - 2 * h))) / (12 * h)


@jax.jit
def jacobian(at):
    return jax.jacfwd(lambda x: jnp.stack(T.scaling_constants(x[0], x[1])))(at)


@jax.jit
def reverse_jacobian(at):
    return jax.jacrev(lambda x: jnp.stack(T.scaling_constants(x[0], x[1])))(at)


@pytest.mark.slow
@pytest.mark.parametrize(
    "at",
    [(2.0, 1.5), (1.3, 1.1), (3.0, 4.0), (1.5, 2.5), (6.0, 7.0), (5.0, 2.0), (4.0, 3.0),
     (1.5, 5.5), (1.2, 3.9), (2.0, 4.98), (2.0, 5.02)],
)  # fmt: skip
def test_derivatives(at):
    """In both arguments, also at q = 1 (removable) and alpha = 4 (where a formula changes)."""
    at = np.array(at)
    exact = jacobian(at)
    assert np.all(np.isfinite(exact))
    np.testing.assert_allclose(exact, reverse_jacobian(at), rtol=1e-12, atol=1e-12)
    for i in range(2):
        difference = central(
            lambda x, i=i: np.stack(T.scaling_constants(*(at + x * np.eye(2)[i]))), 0.0, 1e-4
        )
        np.testing.assert_allclose(exact[:, i], difference, rtol=2e-6, atol=1e-9)


def test_second_derivative_at_the_removable_singularity():
    slope = jax.jit(jax.grad(lambda b, alpha: T.scaling_constants(alpha, b).mask))
    curvature = jax.jit(jax.grad(slope))
    for alpha in (2.0, 4.5):
        difference = central(lambda b, alpha=alpha: slope(b, alpha), 1 + alpha, 1e-3)
        np.testing.assert_allclose(curvature(1 + alpha, alpha), difference, rtol=1e-7)


def test_logarithm_at_q_two():
    law = T.scaling_constants(2.0, 5.0)
    assert law.standard == law.optimal == law.mask == np.inf
    np.testing.assert_allclose((law.ratio_optimal, law.ratio_mask), (0.5, 1.0))
    for b in (5 - 1e-6, 5 + 1e-6):
        near = T.scaling_constants(2.0, b)
        assert near.standard > 1e5
        np.testing.assert_allclose((near.ratio_optimal, near.ratio_mask), (0.5, 1.0), rtol=1e-5)
    assert not np.any(np.isnan(jacobian(np.array([2.0, 5.0]))))
    assert T.scaling_law(2.0, 5.0, 100).standard == np.inf


def test_law_adds_the_noise_floor():
    quiet, noisy = T.scaling_law(2.5, 2.0, 300), T.scaling_law(2.5, 2.0, 300, noise_var=0.2)
    np.testing.assert_allclose(np.array(noisy[1:]) - quiet[1:], 1.5 * 0.2, rtol=1e-12)
    lam, beta = T.power_law(100_000, 2.5, 2.0)
    found = T.excess_risk(lam, beta, n=300, noise_var=0.2).total
    np.testing.assert_allclose(noisy.standard, found, rtol=0.01)
    slope = jax.grad(lambda x: jnp.log(T.scaling_law(2.5, 2.0, jnp.exp(x)).mask))(5.0)
    np.testing.assert_allclose(slope, -T.scaling_exponent(2.5, 2.0), rtol=1e-12)


def test_batches_vmap_jit_and_low_precision():
    alpha, b = np.array([2.0, 1.5, 3.0, 2.0, 1.5]), np.array([1.5, 1.3, 2.0, 3.0, 5.5])
    loop = np.stack([np.stack(T.scaling_constants(*x)) for x in zip(alpha, b, strict=True)], 1)
    np.testing.assert_allclose(np.stack(T.scaling_constants(alpha, b)), loop, rtol=1e-13)
    vmapped = jax.jit(jax.vmap(T.scaling_constants))(alpha, b)
    np.testing.assert_allclose(np.stack(vmapped), loop, rtol=1e-13)
    for call in (T.scaling_constants, lambda a, b: T.scaling_law(a, b, 100)):
        assert jax.eval_shape(call, alpha[:, None], b).mask.shape == (5, 5)
    half = T.scaling_constants(jnp.bfloat16(2), jnp.bfloat16(1.5))
    assert half.mask.dtype == jnp.float32
    np.testing.assert_allclose(half, GOLDEN[2.0, 1.5], rtol=1e-5)
    np.testing.assert_allclose(T.scaling_constants(2, 3).mask, GOLDEN[2.0, 3.0][8], rtol=1e-12)


def test_bad_input():
    for call in (T.scaling_exponent, T.scaling_constants, lambda a, b: T.scaling_law(a, b, 10)):
        with pytest.raises(ValueError, match=r"^alpha must be a finite number above 1, got 1"):
            call(1.0, 2.0)
        with pytest.raises(ValueError, match=r"^b must be a finite number above 1, got 0.5"):
            call(2.0, np.array([2.0, 0.5]))
        with pytest.raises(ValueError, match=r"^alpha must have leading axes.*b \(3,\)"):
            call(np.array([2.0, 3.0]), np.array([2.0, 3.0, 4.0]))
        with pytest.raises(TypeError, match=r"^b must"):
            call(2.0, None)
    with pytest.raises(ValueError, match=r"^n must"):
        T.scaling_law(2.0, 2.0, 0)
    with pytest.raises(ValueError, match=r"^noise_var must"):
        T.scaling_law(2.0, 2.0, 10, noise_var=-1.0)


def test_invalid_under_trace_is_nan():
    constants = jax.jit(lambda a, b: jnp.stack(T.scaling_constants(a, b)))
    assert np.all(np.isnan(constants(0.9, jnp.nan)))
    # omega and what else alpha alone decides is known for a bad b
    names = T.scaling_constants(2.0, 2.0)._fields
    known = {"tau_prefactor", "omega", "noise_multiplier", "mask_cut"}
    for at in ((2.0, 1.0), (2.0, jnp.inf)):
        found = dict(zip(names, constants(*at), strict=True))
        assert {name for name, x in found.items() if not np.isnan(x)} == known
    assert np.isnan(jax.jit(T.scaling_exponent)(1.0, 2.0))
    law = jax.jit(lambda n: T.scaling_law(2.0, 1.5, n))
    assert np.all(np.isnan(np.stack(law(-5.0))))
    assert np.all(np.isfinite(np.stack(law(5.0))))
