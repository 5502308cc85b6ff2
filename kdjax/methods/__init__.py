"""Published methods: one module per paper, whose factories return a `Method` with its defaults."""

from kdjax.methods import (
    adr,
    adversarial,
    adversarial_distillation,
    awp,
    barlow_twins,
    krr_st,
    projector_distillation,
    simclr,
)

__all__ = [
    "adr",
    "adversarial",
    "adversarial_distillation",
    "awp",
    "barlow_twins",
    "krr_st",
    "projector_distillation",
    "simclr",
]
