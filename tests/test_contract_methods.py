"""Every Method keeps the laws of `contracts`."""

from __future__ import annotations

import contracts
import jax.numpy as jnp
import pytest
from method_cases import CASES, distilled, linen

ROUTES = ("jit", "shard_map", "shard_map_unchecked", "pmap")
# A covering subset; the full product is marked slow.
FAST_ROUTES = {
    ("distill_plain", "shard_map", 4),
    ("distill_linen", "jit", 8),
    ("distill_nnx", "pmap", 4),
    ("coupled", "shard_map", 8),
    ("coupled", "shard_map_unchecked", 4),
    ("coupled", "pmap", 4),
    ("projector_imagenet", "jit", 4),
    ("projector_deit", "pmap", 4),
    ("adr", "jit", 8),
    ("adr", "shard_map", 4),
    ("awp", "shard_map", 4),
    ("krr_st", "shard_map", 8),
    ("self_distilled", "pmap", 8),
    ("distilgpt2_fused", "jit", 4),
    ("crd", "shard_map", 4),
    ("simkd", "pmap", 4),
    ("factor_transfer", "shard_map", 4),
    ("paraphraser", "shard_map", 8),
}


# Like another case in all that the laws look at.
SLOW = {
    "projector_cifar100", "adversarial_training", "trades", "adr_trades", "ard", "rslad", "stored",
    "distill_linen", "ensemble", "minilm", "tinybert", "distilgpt2",
}  # fmt: skip


@pytest.mark.parametrize("law", contracts.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow]) if n in SLOW else n for n in CASES],
)
def test_law(name, law):
    law(CASES[name]())


def device_cases():
    for name in CASES:
        if name == "distill_dropout":  # dropout draws depend on the partition, as in every library
            continue
        for route in ROUTES:
            for devices in (1, 4, 8):
                slow = (name, route, devices) not in FAST_ROUTES
                marks = [pytest.mark.slow] if slow else []
                yield pytest.param(name, route, devices, marks=marks)


@pytest.mark.parametrize(("name", "route", "devices"), list(device_cases()))
def test_devices_agree(name, route, devices):
    contracts.law_8_devices(CASES[name](), route, devices)


def test_mixed_precision_keeps_float32():
    contracts.law_9_float32_kept(distilled(linen(dtype=jnp.bfloat16)))
