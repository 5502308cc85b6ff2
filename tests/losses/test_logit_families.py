"""The logit losses against numbers that the authors' own PyTorch code gave."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses

FOLDER = Path(__file__).parent / "golden_families"


def soft(s, t, y):
    return losses.soft_label_kl(s, t, temperature=4.0).mean()


def standardised(s, t, y):
    # torch: over the unbiased deviation, plus 1e-7.
    s, t = (losses.standardize_logits(z, eps=1e-7) for z in (s, t))
    return losses.soft_label_kl(s, t, temperature=2.0).mean()


def dkd(s, t, y, *, alpha=1.0, beta=8.0):
    return losses.dkd(s, t, y, alpha=alpha, beta=beta, temperature=4.0).mean()


def dkd_standardised(s, t, y):
    return dkd(*(losses.standardize_logits(z, eps=1e-7) for z in (s, t)), y)


def nkd(s, t, y):
    return losses.nkd(s, t, y, gamma=1.5, temperature=1.0).mean()


def dist(s, t, y, *, beta=1.0, gamma=2.0, **options):
    return losses.dist(s, t, beta=beta, gamma=gamma, **options)


def dense(s, t, y):
    # Pixels are examples; their order doesn't matter.
    return dist(*(jnp.moveaxis(z, 1, -1) for z in (s, t)), y)


CASES = {
    ("kd", "repdistiller"): soft,
    ("logit_std_kd", "logit_standardization_kd"): standardised,
    ("dkd", "mdistiller__total"): dkd,
    ("dkd", "logit_standardised"): dkd_standardised,
    ("dkd", "mdistiller__tckd"): partial(dkd, alpha=1.0, beta=0.0),
    ("dkd", "mdistiller__nckd"): partial(dkd, alpha=0.0, beta=1.0),
    ("nkd", "cls_kd"): nkd,
    ("dist", "dist_kd_seg_tau1__total"): dist,
    ("dist", "dist_kd_seg_tau1__inter"): partial(dist, gamma=0.0),
    ("dist", "dist_kd_seg_tau1__intra"): partial(dist, beta=0.0, gamma=1.0),
    ("dist_dense", "dist_kd_seg_tau1"): dense,
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("family", "variant"), CASES)
def test_authors_numbers(family, variant, dtype):
    golden = np.load(FOLDER / f"{family}.npz")
    loss = jax.jit(jax.value_and_grad(CASES[family, variant]))
    with jax.enable_x64(dtype is np.float64):
        s, t = (jnp.asarray(golden[f"in__{name}"], dtype) for name in ("z_s", "z_t"))
        y = jnp.asarray(golden["in__y"]) if "in__y" in golden.files else None
        value, gradient = jax.tree.map(np.asarray, loss(s, t, y))
    tolerance = 1e-9 if dtype is np.float64 else 1e-5
    wanted = golden[f"grad__z_s__{variant}"]
    np.testing.assert_allclose(value, golden[f"loss__{variant}"], rtol=tolerance)
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("variant", "temperature"), [("torchdistill", 4.0), ("torchdistill_tau1", 1.0)]
)
def test_dist_of_torchdistill_differs_by_its_eps(variant, temperature):
    """It bounds each norm by 1e-8 where the authors add 1e-8 to the product, as we do."""
    golden = np.load(FOLDER / "dist.npz")
    with jax.enable_x64(True):
        s, t = (jnp.asarray(golden[f"in__{name}"], np.float64) for name in ("z_s", "z_t"))
        loss = partial(dist, y=None, temperature=temperature)
        ours, gradient = jax.value_and_grad(loss)(s, t)
        theirs = float(golden[f"loss__{variant}"])
        assert 1e-9 < abs(float(ours) / theirs - 1) < 1e-6
        # With next to no eps on either side they are one formula.
        value, gradient = jax.value_and_grad(partial(loss, eps=1e-30))(s, t)
    np.testing.assert_allclose(value, theirs, rtol=1e-12)
    wanted = golden[f"grad__z_s__{variant}"]
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-9 * np.abs(wanted).max())
