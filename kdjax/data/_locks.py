"""A folder with one writer at a time."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

_held: set[int] = set()


@contextlib.contextmanager
def locked(folder: pathlib.Path, refusal: str) -> Iterator[None]:
    """Keeps a second writer out; the system drops the lock when its owner dies.

    Args:
      folder: an existing folder.
      refusal: what the ValueError says where another one has the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(refusal) from error
        except OSError:
            pass  # A file system without locks, where nobody can be kept out.
        yield
    finally:
        # In a forked child it is closed already.
        if descriptor in _held:
            _held.discard(descriptor)
            os.close(descriptor)


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    # A worker that outlives its killed parent would keep the lock.
    os.register_at_fork(after_in_child=_let_go)
