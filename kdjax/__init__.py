"""kdjax: knowledge distillation for JAX."""
