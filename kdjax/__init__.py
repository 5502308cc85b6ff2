"""kdjax: knowledge distillation for JAX, as pure functions.

``distill`` joins a student, a teacher and weighted terms to a Method; ``minimize`` makes a Learner
of it; ``train.fit`` runs it, and so does any loop of your own. The losses in ``kdjax.losses`` are
functions of arrays and need nothing else of kdjax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdjax import (
        adapters,
        attacks,
        augment,
        core,
        data,
        kernels,
        labels,
        lm,
        losses,
        methods,
        metrics,
        models,
        parallel,
        schedules,
        terms,
        theory,
        train,
    )
    from kdjax.adapters import from_fn, from_linen, from_nnx, load_nnx, nnx_variables
    from kdjax.core import (
        Learner,
        Method,
        Model,
        Part,
        State,
        Term,
        distill,
        ensemble,
        from_batch,
        from_parts,
        minimize,
        started,
    )

__version__ = "0.1.0"

# Loaded on first use: `import kdjax` must not pay for flax, orbax or a data library.
_HOMES = {
    **dict.fromkeys(
        (
            "Learner",
            "Method",
            "Model",
            "Part",
            "State",
            "Term",
            "distill",
            "ensemble",
            "from_batch",
            "from_parts",
            "minimize",
            "started",
        ),
        "core",
    ),
    **dict.fromkeys(("from_fn", "from_linen", "from_nnx", "load_nnx", "nnx_variables"), "adapters"),
}
_ROOMS = (
    "adapters",
    "attacks",
    "augment",
    "core",
    "data",
    "kernels",
    "labels",
    "lm",
    "losses",
    "methods",
    "metrics",
    "models",
    "parallel",
    "schedules",
    "terms",
    "theory",
    "train",
)

__all__ = [
    "Learner",
    "Method",
    "Model",
    "Part",
    "State",
    "Term",
    "adapters",
    "attacks",
    "augment",
    "core",
    "data",
    "distill",
    "ensemble",
    "from_batch",
    "from_fn",
    "from_linen",
    "from_nnx",
    "from_parts",
    "kernels",
    "labels",
    "lm",
    "load_nnx",
    "losses",
    "methods",
    "metrics",
    "minimize",
    "models",
    "nnx_variables",
    "parallel",
    "schedules",
    "started",
    "terms",
    "theory",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"kdjax.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"kdjax.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'kdjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
