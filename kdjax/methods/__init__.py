"""Published methods: one module per paper, whose factories return a `Method` with its defaults."""

from kdjax.methods import (
    adr,
    adversarial,
    adversarial_distillation,
    awp,
    barlow_twins,
    distilgpt2,
    gkd,
    krr_st,
    minilm,
    projector_distillation,
    simclr,
    tinybert,
)

__all__ = [
    "adr",
    "adversarial",
    "adversarial_distillation",
    "awp",
    "barlow_twins",
    "distilgpt2",
    "gkd",
    "krr_st",
    "minilm",
    "projector_distillation",
    "simclr",
    "tinybert",
]
