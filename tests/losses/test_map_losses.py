"""Losses of feature maps: the reference codes' numbers, our reading of formulas, invariants."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdjax.losses._connected import activation_boundary, factor_transfer, vid
from kdjax.losses._maps import attention_map, attention_transfer, fsp, nst

GOLDEN = Path(__file__).parent / "golden_families"


def golden(name):
    """Arrays of a fixture in float64, feature maps with their channels last."""
    with np.load(GOLDEN / f"{name}.npz") as stored:
        found = {k: stored[k].astype(np.float64) for k in stored.files}
    return {
        k: np.moveaxis(x, 1, -1) if k.startswith(("in__", "grad__")) and x.ndim == 4 else x
        for k, x in found.items()
    }


def maps(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def compare(loss, students, others, value, gradients, **options):
    """The batch mean and its gradients: 1e-9 in float64 and 1e-5 in float32."""
    places = tuple(range(len(students)))
    both = jax.jit(jax.value_and_grad(lambda *a: jnp.mean(loss(*a, **options)), places))
    given = (*students, *others)
    with jax.enable_x64(True):
        exact = both(*given)
        assert exact[0].dtype == jnp.float64
    single = both(*(np.float32(x) for x in given))
    assert single[0].dtype == jnp.float32
    for (found_value, found), tolerance in ((exact, 1e-9), (single, 1e-5)):
        np.testing.assert_allclose(found_value, value, rtol=tolerance)
        for g, wanted in zip(found, gradients, strict=True):
            np.testing.assert_allclose(g, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def numerically(function, x, eps=1e-5):
    """The gradient of a NumPy function by central differences, to about 1e-9."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[place] = eps
        gradient[place] = (function(x + step) - function(x - step)) / (2 * eps)
    return gradient


# --- attention maps -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["at", "at_pool_student", "at_pool_teacher"])
def test_attention_transfer_is_the_reference_code(name):
    g = golden(name)
    given = [g["in__f_s"]], [g["in__f_t"]]
    compare(attention_transfer, *given, g["loss__repdistiller"], [g["grad__f_s__repdistiller"]])


def test_attention_transfer_of_the_paper():
    g = golden("at")
    value, gradient = g["loss__torchdistill_paper"], g["grad__f_s__torchdistill_paper"]
    given = [g["in__f_s"]], [g["in__f_t"]]
    compare(attention_transfer, *given, value, [gradient], squared=False)


def read_attention(x, power):
    m = np.mean(x**power, axis=-1)
    return m / np.sqrt(np.sum(m**2, axis=(1, 2), keepdims=True))


@pytest.mark.parametrize("power", [1.0, 3.0, 4.0])
def test_attention_transfer_of_other_powers(power):
    """Our reading, in NumPy: odd powers keep the sign, as in the codes (no fixture is at hand)."""
    s, t = maps(2, 3, 2, 3), maps(2, 3, 2, 4, seed=1)

    def read(x):
        return np.mean((read_attention(x, power) - read_attention(t, power)) ** 2)

    with jax.enable_x64(True):
        found = jax.jit(jax.value_and_grad(lambda x, p: attention_transfer(x, t, power=p).mean()))(
            s, power
        )
    np.testing.assert_allclose(found[0], read(s), rtol=1e-12)
    np.testing.assert_allclose(found[1], numerically(read, s), atol=1e-9)


def test_attention_maps_of_broken_powers_take_sizes():
    x = maps(2, 3, 3, 4).astype(np.float32)
    found = attention_map(x, power=2.5)
    np.testing.assert_allclose(found, read_attention(np.abs(x), 2.5), rtol=1e-5)
    assert np.any(np.abs(attention_map(x, power=3.0) - attention_map(np.abs(x), power=3.0)) > 0.1)


def test_attention_maps_have_length_1_whatever_the_scale():
    x = maps(4, 5, 3, 6)
    with jax.enable_x64(True):
        found = attention_map(x)
        np.testing.assert_allclose(np.sum(found**2, axis=(1, 2)), 1, rtol=1e-12)
        np.testing.assert_allclose(attention_map(7.0 * x), found, rtol=1e-12)
        np.testing.assert_allclose(attention_map(-x), found, rtol=1e-12)
        # The order of channels and their number don't matter.
        np.testing.assert_allclose(
            attention_map(np.concatenate([x, x[..., ::-1]], -1)), found, rtol=1e-12
        )
        loss = attention_transfer(3.0 * x, np.tile(x, 2))
        assert np.max(np.abs(loss)) < 1e-30


def test_attention_slopes_at_zero():
    """1 for p = 1 and 0 for all other powers; none is NaN."""
    x = jnp.zeros((1, 2, 2, 1)).at[0, 0, 0, 0].set(3.0)
    for power in (0.5, 1.0, 1.5, 2.0, 3.0):
        gradient = jax.grad(lambda x, p: attention_map(x, power=p)[0, 1, 1])(x, power)
        wanted = np.zeros((1, 2, 2, 1))
        wanted[0, 1, 1, 0] = (power == 1) / 3
        np.testing.assert_allclose(gradient, wanted, atol=1e-7)


def test_each_side_is_averaged_down_in_each_direction():
    s, t = maps(2, 4, 6, 3), maps(2, 8, 3, 3, seed=1)
    small_s = s.reshape(2, 4, 3, 2, 3).mean(3)
    small_t = t.reshape(2, 4, 2, 3, 3).mean(2)
    for loss in (attention_transfer, nst):
        with jax.enable_x64(True):
            np.testing.assert_allclose(loss(s, t), loss(small_s, small_t), rtol=1e-10)


# --- neuron selectivity ---------------------------------------------------------------------


def test_nst_is_the_reference_code():
    g = golden("nst")
    gradient = [g["grad__f_s__repdistiller"]]
    compare(nst, [g["in__f_s"]], [g["in__f_t"]], g["loss__repdistiller"], gradient)


def read_nst(s, t):
    def kernel(a, b):
        return np.mean(np.einsum("nc,nd->cd", a, b) ** 2)

    found = []
    for a, b in zip(s, t, strict=True):
        a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
        a, b = (x / np.sqrt(np.sum(x**2, 0)) for x in (a, b))
        found.append(kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))
    return found


@pytest.mark.parametrize("size", [2, 8])
def test_both_ways_to_compute_nst(size):
    """Over pairs of places where there are few, over pairs of channels where there are many."""
    s, t = maps(3, size, size, 7), maps(3, size, size, 9, seed=1)
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.jit(nst)(s, t), read_nst(s, t), rtol=1e-10)
        check_grads(lambda x: nst(x, t), (jnp.asarray(s),), order=1, modes=["rev"], rtol=1e-6)


@pytest.mark.parametrize("size", [2, 8])
def test_nst_sees_patterns_and_neither_scales_signs_nor_orders(size):
    s = maps(3, size, size, 6)
    scales = np.array([2.0, -1.0, 0.3, 5.0, -4.0, 1.0])
    with jax.enable_x64(True):
        assert np.max(np.abs(nst(scales * s[..., ::-1], s))) < 1e-14
        assert np.min(nst(s, maps(3, size, size, 6, seed=1))) > 1e-3
        # Places are as good as each other, if they move together.
        order = np.random.default_rng(0).permutation(size)
        t = maps(3, size, size, 4, seed=1)
        np.testing.assert_allclose(nst(s[:, order], t[:, order]), nst(s, t), rtol=1e-10)


# --- flow -----------------------------------------------------------------------------------


def test_fsp_is_the_reference_code():
    g = golden("fsp")
    s, t = ([g[f"in__f_{side}{i}"] for i in range(3)] for side in "st")
    for i in range(2):
        compare(
            fsp, s[i : i + 2], t[i : i + 2], g[f"loss__repdistiller__pair{i}"],
            [
                # That of the first stage in the first pair is all of its gradient, ...
                g["grad__f_s0__repdistiller__sum" if i == 0 else "grad__f_s1__repdistiller__pair1"],
                g["grad__f_s1__repdistiller__pair0" if i == 0 else "grad__f_s2__repdistiller__sum"],
            ],
        )  # fmt: skip


def test_fsp_averages_the_larger_stage_on_either_side():
    first, second = maps(2, 4, 4, 3), maps(2, 8, 8, 5, seed=1)
    zero = np.zeros_like(first), np.zeros_like(second)
    small = second.reshape(2, 4, 2, 4, 2, 5).mean((2, 4))
    flow = np.einsum("bhwc,bhwd->bcd", first, small) / 16
    with jax.enable_x64(True):
        wanted = np.mean(flow**2, axis=(1, 2))
        np.testing.assert_allclose(fsp(first, second, *zero), wanted, rtol=1e-12)
        np.testing.assert_allclose(fsp(second, first, *zero[::-1]), wanted, rtol=1e-12)
        # Sizes on the teacher's side are its own, and moving both stages' places changes nothing.
        rolled = [np.roll(x, x.shape[1] // 2, 1) for x in (first, second)]
        assert np.max(fsp(*rolled, first, small)) < 1e-28
        # G is bilinear: twice as large features give four times the flow.
        bent = fsp(2 * first, 2 * second, first, second)
        np.testing.assert_allclose(bent, 9 * wanted, rtol=1e-12)


# --- variational information ----------------------------------------------------------------


def regressed(x, *kernels):
    for i, kernel in enumerate(kernels):
        x = jnp.maximum(x, 0) if i else x
        x = jnp.einsum("bhwc,dc->bhwd", x, kernel[..., 0, 0])
    return x


def test_vid_is_the_reference_code():
    g = golden("vid")
    names = ["log_scale", *(f"regressor.{i}.weight" for i in (0, 2, 4))]
    weights = [g[f"w__vid__{name}"] for name in names]

    def loss(x, log_scale, *rest):
        *kernels, t = rest
        return vid(regressed(x, *kernels), t, log_scale)

    compare(
        loss,
        [g["in__f_s"], *weights],
        [g["in__f_t"]],
        g["loss__repdistiller"],
        [g["grad__f_s__repdistiller"]] + [g[f"wgrad__vid__{n}__repdistiller"] for n in names],
    )


def test_vid_is_a_density():
    """Least at the true mean and at the variance of the errors, where it is (1 + log v) / 2."""
    mean, teacher = maps(1, 50, 40, 2), maps(1, 50, 40, 2, seed=1)
    with jax.enable_x64(True):
        variance = np.mean((mean - teacher) ** 2, axis=(0, 1, 2))

        def at(v, shift=0.0):
            return float(vid(mean + shift, teacher, jnp.log(jnp.expm1(v)), eps=1e-30)[0])

        best = at(variance)
        np.testing.assert_allclose(best, np.mean(1 + np.log(variance)) / 2, rtol=1e-12)
        for factor in (0.9, 1.1):
            assert at(factor * variance) > best + 1e-4
        exact = vid(teacher, teacher, jnp.log(jnp.expm1(variance)), eps=1e-30)
        np.testing.assert_allclose(exact[0], np.mean(np.log(variance)) / 2, rtol=1e-12)


def test_vid_of_large_and_small_scales():
    """The published softplus overflows above 88; below, the variance ends at eps."""
    mean, teacher = (x.astype(np.float32) for x in (maps(2, 4), maps(2, 4, seed=1)))
    for log_scale, variance in ((500.0, 500.0), (-500.0, 0.25)):
        scale = np.full(4, log_scale, np.float32)
        loss = functools.partial(vid, eps=0.25)
        value, gradient = jax.value_and_grad(lambda a, loss=loss: loss(mean, teacher, a).sum())(
            scale
        )
        wanted = np.mean((mean - teacher) ** 2 / variance + np.log(variance), -1) / 2
        np.testing.assert_allclose(value, wanted.sum(), rtol=2e-3)
        assert np.all(np.isfinite(gradient))


def test_vid_takes_one_scale_for_each_channel_or_value():
    mean, teacher, scale = maps(3, 2, 2, 4), maps(3, 2, 2, 4, seed=1), maps(4, seed=2)
    found = vid(mean, teacher, scale)
    np.testing.assert_allclose(found, vid(mean, teacher, np.tile(scale, (3, 2, 2, 1))), rtol=1e-6)
    with pytest.raises(ValueError, match=r"^log_scale must have shape \(4,\)"):
        vid(mean, teacher, scale[:3])
    with pytest.raises(ValueError, match=r"^eps must be a finite number .*above 0, got 0"):
        vid(mean, teacher, scale, eps=0.0)


# --- factors --------------------------------------------------------------------------------


def test_factor_transfer_is_the_reference_code():
    g = golden("ft")
    gradient = [g["grad__f_s__torchdistill"]]
    given = [g["in__f_s"]], [g["in__f_t"]]
    compare(factor_transfer, *given, g["loss__torchdistill"], gradient)


def test_factor_transfer_by_the_euclidean_norm():
    """Our reading of p = 2, in NumPy."""
    s, t = maps(2, 2, 3, 2), maps(2, 2, 3, 2, seed=1)

    def read(x):
        a, b = (v.reshape(2, -1) for v in (x, t))
        a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
        return np.mean(np.linalg.norm(a - b, axis=1))

    with jax.enable_x64(True):
        both = jax.jit(jax.value_and_grad(lambda x: factor_transfer(x, t, p=2).mean()))
        value, gradient = both(s)
    np.testing.assert_allclose(value, read(s), rtol=1e-12)
    np.testing.assert_allclose(gradient, numerically(read, s), atol=1e-9)


@pytest.mark.parametrize("p", [1, 2])
def test_factors_are_compared_by_direction(p):
    s, t = maps(4, 3, 3, 2), maps(4, 3, 3, 2, seed=1)
    with jax.enable_x64(True):
        found = factor_transfer(s, t, p=p)
        np.testing.assert_allclose(factor_transfer(5.0 * s, 0.1 * t, p=p), found, rtol=1e-12)
        np.testing.assert_allclose(factor_transfer(t, s, p=p), found, rtol=1e-12)
        turned = np.linalg.norm(
            2 * s.reshape(4, -1) / np.linalg.norm(s.reshape(4, -1), axis=1)[:, None], ord=p, axis=1
        )
        wanted = turned / (18 if p == 1 else 1)
        np.testing.assert_allclose(factor_transfer(-s, s, p=p), wanted, rtol=1e-12)


# --- boundaries -----------------------------------------------------------------------------


def test_activation_boundary_is_the_reference_code():
    g = golden("ab")
    (s, t) = ([g[f"in__f_{side}{i}"] for i in range(2)] for side in "st")

    def both(s0, s1, t0, t1):
        return activation_boundary(s0, t0) + activation_boundary(s1, t1)

    name = "torchdistill_mean_unit_weights"
    gradients = [g[f"grad__f_s{i}__{name}"] for i in range(2)]
    compare(both, s, t, g[f"loss__{name}"], gradients)


def test_boundaries_ask_for_the_side_and_the_margin_only():
    s, t = maps(3, 4, 4, 5), maps(3, 4, 4, 5, seed=1)
    with jax.enable_x64(True):
        found = activation_boundary(s, t, margin=0.5)
        np.testing.assert_allclose(activation_boundary(s, 9 * t, margin=0.5), found, rtol=1e-14)
        # The same from the other side of 0, and homogeneous of degree 2.
        np.testing.assert_allclose(activation_boundary(-s, -t, margin=0.5), found, rtol=1e-12)
        np.testing.assert_allclose(activation_boundary(3 * s, t, margin=1.5), 9 * found, rtol=1e-12)
        right = np.sign(t) * (0.5 + np.abs(s))
        assert not np.any(activation_boundary(right, t, margin=0.5))
        wrong = activation_boundary(-right, t, margin=0.5)
        np.testing.assert_allclose(wrong, np.sum((1 + np.abs(s)) ** 2, axis=(1, 2, 3)), rtol=1e-12)


def test_a_silent_teacher_is_off():
    """t = 0 counts as off, as in the codes."""
    assert activation_boundary(np.full((1, 1), -1.0), np.zeros((1, 1)))[0] == 0
    assert activation_boundary(np.full((1, 1), 1.0), np.zeros((1, 1)))[0] == 4


# --- all of them ----------------------------------------------------------------------------

PAIRS = {
    "attention_transfer": attention_transfer,
    "attention_transfer_paper": functools.partial(attention_transfer, squared=False),
    "nst": nst,
    "factor_transfer": factor_transfer,
    "factor_transfer_2": functools.partial(factor_transfer, p=2),
    "activation_boundary": activation_boundary,
    "fsp": lambda s, t, **options: fsp(s, s[..., :2], t, t[..., :2], **options),
    "vid": lambda s, t, **options: vid(s, t, jnp.zeros(s.shape[-1]), **options),
}


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_finite_where_formulas_are_not(name):
    """At equality, at features of zeros on either side and on both, and in one row of many."""
    x = maps(3, 4, 4, 6).astype(np.float32)
    some = x.copy()
    some[1] = 0
    some[..., 0] = 0
    zero = np.zeros_like(x)
    both = jax.jit(jax.value_and_grad(lambda s, t: PAIRS[name](s, t).sum()))
    for s, t in ((x, x), (zero, x), (x, zero), (zero, zero), (some, x), (x, some), (some, some)):
        value, gradient = both(s, t)
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))
        assert np.max(np.abs(gradient)) < 1e3
    if name not in ("activation_boundary", "vid"):
        value, gradient = both(x, x)
        assert abs(value) < 1e-6
        assert np.max(np.abs(gradient)) < 1e-6


@pytest.mark.parametrize("name", PAIRS)
def test_a_nan_is_seen(name):
    """In the row where it is, and in no other."""
    s, t = (maps(3, 4, 4, 6, seed=i).astype(np.float32) for i in range(2))
    s[1, 2, 2, 1] = np.nan
    found = np.asarray(PAIRS[name](s, t))
    assert np.isnan(found[1])
    assert np.all(np.isfinite(found[[0, 2]]))


@pytest.mark.parametrize("name", PAIRS)
def test_masked_rows_are_deleted(name):
    s, t = (maps(4, 4, 4, 6, seed=i).astype(np.float32) for i in range(2))
    keep = np.array([True, False, True, False])
    bad = [np.where(keep[:, None, None, None], x, np.nan) for x in (s, t)]
    total = jax.jit(jax.value_and_grad(lambda s, t, m: PAIRS[name](s, t, where=m).sum()))
    value, gradient = total(*bad, keep)
    np.testing.assert_allclose(value, PAIRS[name](s[keep], t[keep]).sum(), rtol=1e-5)
    np.testing.assert_array_equal(gradient[~keep], 0)
    assert np.all(np.any(gradient[keep], axis=(1, 2, 3)))


@pytest.mark.parametrize("loss", [attention_transfer, nst])
def test_maps_only(loss):
    x = maps(4, 3, 3, 2)
    with pytest.raises(ValueError, match=r"^student must have 4 dimensions, got"):
        loss(x[..., 0], x)
    with pytest.raises(ValueError, match=r"^teacher must have 4 dimensions, got"):
        loss(x, x[..., 0])
    with pytest.raises(ValueError, match=r"^teacher must have shape \(4, 3, 3, 2\) \(examples\)"):
        loss(x, x[:3])
    with pytest.raises(TypeError, match=r"^where must be a boolean array"):
        loss(x, x, where=np.ones(4))
    with pytest.raises(ValueError, match=r"^student must not be empty"):
        loss(x[:0], x[:0])


@pytest.mark.parametrize("loss", [factor_transfer, activation_boundary])
def test_shapes_must_agree(loss):
    x = maps(4, 3, 3, 2)
    with pytest.raises(ValueError, match=r"^student must have shape \(4, 3, 3, 1\) like teacher"):
        loss(x, x[..., :1])
    with pytest.raises(TypeError, match=r"^teacher must be a floating-point array"):
        loss(x, x.astype(int))


def test_options_out_of_range():
    x = maps(4, 3, 3, 2)
    with pytest.raises(ValueError, match=r"^power must be a finite number above 0, got 0"):
        attention_map(x, power=0.0)
    with pytest.raises(ValueError, match=r"^margin must be a finite number at least 0, got -1"):
        activation_boundary(x, x, margin=-1.0)
    for p in (3, 1.5, "1", True):
        with pytest.raises(ValueError, match=r"^p must be 1 or 2, got"):
            factor_transfer(x, x, p=p)
    with pytest.raises(ValueError, match=r"^teacher_first must have shape \(4, 3, 3, 2\)"):
        fsp(x, x, x[..., :1], x)
    with pytest.raises(ValueError, match=r"^teacher_second must have shape \(4, 3, 3, 2\)"):
        fsp(x, x, x, x[..., :1])
    with pytest.raises(ValueError, match=r"^student_second must have shape \(4, 3, 3, 2\)"):
        fsp(x, x[:2], x, x)
