"""Threads of the linear algebra library."""

from __future__ import annotations

from typing import Any

import threadpoolctl

_LARGE = 256  # rows of a matrix whose factor gains from several threads


def few_threads(size: int = 1) -> Any:
    """One thread for linear algebra where matrices are small: several only wait, and spin."""
    return threadpoolctl.threadpool_limits(1 if size <= _LARGE else None)
