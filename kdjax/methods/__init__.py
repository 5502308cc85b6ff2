"""Published methods: one module per paper, whose factories return a `Method` with its defaults."""

from kdjax.methods import projector_distillation

__all__ = ["projector_distillation"]
