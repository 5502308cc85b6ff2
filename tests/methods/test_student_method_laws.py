"""The methods around the student keep the laws of `contracts`."""

from __future__ import annotations

from typing import Any

import contracts
import jax
import jax.numpy as jnp
import optax
import pytest
from contracts import Case
from method_cases import WIDTH, batch, counted, from_nnx, linen, plain

import kdjax as kd
from kdjax.core import Method
from kdjax.methods import mean_teacher as mean_teachers
from kdjax.methods import multi_teacher as multi_teachers
from kdjax.methods import mutual as mutuals
from kdjax.methods import teacher_free as teachers_free


def mutual(number: int) -> Case:
    """Students of several kinds; the weight of what they learn from each other is annealed."""
    students, calls = zip(
        *(counted(make()) for make in (plain, linen, from_nnx)[:number]), strict=True
    )

    def make(weight: Any) -> Method:
        peers = {"soft": (weight, kd.terms.soft_labels(temperature=2.0))}
        return mutuals.mutual(students, peers=peers)

    counters = {f"student{i}": call for i, call in enumerate(calls)}
    return Case(make, batch(), counters=counters)


def mean_teacher() -> Case:
    """Two views by noise drawn per example; the weight of the consistency is annealed."""
    student, calls = counted(plain())

    def views(key: jax.Array, batch: Any) -> Any:
        def noise(i: jax.Array) -> jax.Array:
            return 0.3 * jax.random.normal(jax.random.fold_in(key, i), (2, WIDTH))

        drawn = jax.vmap(noise)(batch["index"])
        return {
            **batch,
            "view1": batch["image"] + drawn[:, 0],
            "view2": batch["image"] + drawn[:, 1],
        }

    def make(weight: Any) -> Method:
        return mean_teachers.mean_teacher(
            student,
            consistency=lambda step: weight * kd.schedules.sigmoid_ramp_up(10.0, 4)(step),
            decay=optax.linear_schedule(0.5, 0.9, 4),
            augment=views,
        )

    return Case(make, batch(), counters={"student": calls}, passes={"student": 2})


def virtual(reduction: str) -> Case:
    """Labels and a virtual teacher; the temperature is annealed."""
    student, calls = counted(plain())

    def make(temperature: Any) -> Method:
        return teachers_free.tf_kd_reg(
            student, alpha=0.5, correct=0.9, temperature=temperature, reduction=reduction
        )

    return Case(make, batch(), counters={"student": calls})


def several(kind: str) -> Case:
    """Two teachers by given, learned or per-example weights."""
    student, calls = counted(plain())
    teachers, teacher_calls = zip(*(counted(plain()) for _ in range(2)), strict=True)

    def make(hyper: Any) -> Method:
        soft = {
            "mixture": lambda: multi_teachers.mixture(
                weights=[hyper, optax.linear_schedule(1.0, 0.5, 4)], temperature=2.0
            ),
            "learned": lambda: multi_teachers.learned(temperature=hyper, entropy=0.2),
            "confident": lambda: multi_teachers.confident(temperature=hyper),
        }[kind]()
        return multi_teachers.multi_teacher(student, teachers, soft=soft)

    data = batch()
    frozen = [t.init(jax.random.key(i), data["image"]) for i, t in enumerate(teachers)]
    counters = {"student": calls} | {f"teacher{i}": c for i, c in enumerate(teacher_calls)}
    return Case(make, data, frozen, counters=counters)


CASES = {
    "mutual": lambda: mutual(2),
    "mutual_three": lambda: mutual(3),
    "mean_teacher": mean_teacher,
    "virtual_teacher": lambda: virtual("paper"),
    "virtual_teacher_reference": lambda: virtual("reference"),
    "multi_teacher_mixture": lambda: several("mixture"),
    "multi_teacher_learned": lambda: several("learned"),
    "multi_teacher_confident": lambda: several("confident"),
}
# Like another case in all that the laws look at.
SLOW = {"mutual_three", "virtual_teacher_reference", "multi_teacher_mixture"}
# Built by `kdjax.distill`, so that only the means are their own.
MEANS_ONLY = {"virtual_teacher", "multi_teacher_confident"}
FAST_ROUTES = {
    ("mutual", "shard_map", 4),
    ("mean_teacher", "pmap", 4),
    ("multi_teacher_learned", "shard_map_unchecked", 4),
}


def marked(name, slow):
    return pytest.param(*name, marks=[pytest.mark.slow]) if slow else pytest.param(*name)


@pytest.mark.parametrize(
    ("name", "law"),
    [
        marked(
            (name, law),
            name in SLOW or (name in MEANS_ONLY and law is not contracts.law_4_exact_means),
        )
        for name in CASES
        for law in contracts.LAWS
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_law(name, law):
    law(CASES[name]())


@pytest.mark.parametrize(
    ("name", "route", "devices"),
    [
        marked((name, route, devices), (name, route, devices) not in FAST_ROUTES)
        for name in CASES
        for route in ("jit", "shard_map", "shard_map_unchecked", "pmap")
        for devices in (4, 8)
    ],
)
def test_devices_agree(name, route, devices):
    contracts.law_8_devices(CASES[name](), route, devices)


def test_half_precision_keeps_float32():
    student = linen(dtype=jnp.bfloat16)
    for method in (
        mutuals.mutual([student, student]),
        mean_teachers.mean_teacher(student, consistency=1.0),
    ):
        contracts.law_9_float32_kept(Case(lambda _, m=method: m, batch()))
