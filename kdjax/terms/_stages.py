"""Taps of several stages, and whose batch the statistics of connectors are taken over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from kdjax import _checks
from kdjax._pairs import Outputs, Tree
from kdjax.terms._connectors import batch_norm, conv, conv_init, maps, norm_init

Taps = str | Sequence[str]
SCOPES = ("global", "device")


def tap_pairs(student_taps: Taps, teacher_taps: Taps) -> list[tuple[str, str]]:
    """The student's and the teacher's tap of every stage."""
    both = []
    for name, taps in (("student_taps", student_taps), ("teacher_taps", teacher_taps)):
        names = [taps] if isinstance(taps, str) else taps
        if not (isinstance(names, Sequence) and all(isinstance(tap, str) for tap in names)):
            raise TypeError(
                f"{name} must be the name of an output, or one for each stage, got "
                f"{_checks.describe(taps)}."
            )
        both.append(list(names))
    if not both[0]:
        raise ValueError("student_taps must name at least one output, got none.")
    if len(both[0]) != len(both[1]):
        raise ValueError(
            f"teacher_taps must name as many outputs as student_taps, {len(both[0])}, got "
            f"{len(both[1])}."
        )
    return list(zip(*both, strict=True))


def map_stages(
    pairs: Sequence[tuple[str, str]], student_out: Outputs, teacher_out: Outputs
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The maps of all stages, of the student and of the teacher."""
    return (
        [maps("student", student_out, tap) for tap, _ in pairs],
        [maps("teacher", teacher_out, tap) for _, tap in pairs],
    )


def statistics_axis(scope: str, axis_name: Any) -> Any:
    """The axis for batch statistics: none where each device has its own."""
    return axis_name if scope == "global" else None


def checked_scope(scope: str) -> str:
    return _checks.choice("scope", scope, SCOPES)


def conv_norm_init(
    key: jax.Array, inputs: int, outputs: int, *, size: int = 1, gain: float = 1.0
) -> dict[str, Any]:
    """Parameters of a convolution without bias and batch normalisation.

    The kernel is uniform in ``+-gain / sqrt(fan_in)``.
    """
    made = conv_init(key, inputs, outputs, size=size, bias=False)
    return {"conv": {"kernel": gain * made["kernel"]}, "norm": norm_init(outputs)}


def conv_norm(params: Tree, x: jax.Array, *, axis_name: Any, where: jax.Array | None) -> jax.Array:
    """A convolution and batch normalisation by the statistics of the batch."""
    return batch_norm(params["norm"], conv(params["conv"], x), axis_name=axis_name, where=where)
