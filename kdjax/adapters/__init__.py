"""Adapters: a Flax Linen module, a Flax NNX module or plain functions become a `Model`.

The module itself is never edited. What the methods need besides logits is named in ``taps`` (any
submodule's output, by path) and ``expose`` (any subtree of the parameters).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdjax.adapters._function import from_fn
    from kdjax.adapters._linen import from_linen
    from kdjax.adapters._nnx import from_nnx, load_nnx, nnx_variables

__all__ = ["from_fn", "from_linen", "from_nnx", "load_nnx", "nnx_variables"]

# Loaded on first use: plain functions need no flax, Linen modules no NNX.
_HOMES = {
    "from_fn": "_function",
    "from_linen": "_linen",
    "from_nnx": "_nnx",
    "load_nnx": "_nnx",
    "nnx_variables": "_nnx",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
