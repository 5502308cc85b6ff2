"""Published methods: one module per paper, whose factories return a `Method` with its defaults."""

from kdjax.methods import adr, adversarial, awp, projector_distillation

__all__ = ["adr", "adversarial", "awp", "projector_distillation"]
