"""Moves batches to the device ahead of their use, in a thread of its own."""

from __future__ import annotations

import collections
import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from kdjax import _checks

# How long a wait for data goes on before it looks up, and how long `close` waits for a source that
# is in the middle of a read.
_SLICE = 0.2
_PATIENCE = 1.0


class Prefetch(Iterator[Any]):
    """An iterator over batches that are already on the device; made by ``prefetch``."""

    def __init__(self, batches: Iterable[Any], size: int, sharding: Any) -> None:
        self._buffer = _Buffer(size)
        self._thread = threading.Thread(
            target=_fill, args=(self._buffer, batches, sharding), name="prefetch", daemon=True
        )
        # Also when it is dropped without close, and at exit; the thread holds the buffer only.
        self._stop = weakref.finalize(self, self._buffer.stop)
        self._thread.start()

    def __next__(self) -> Any:
        return self._buffer.get()

    def close(self) -> None:
        """Ends the thread; no batch comes after it.

        A source that is in the middle of a long read is left to itself after a second: the thread
        ends when that read does, and keeps no program from ending.
        """
        self._stop()
        if threading.current_thread() is not self._thread:
            self._thread.join(_PATIENCE)

    def until(self, stop: Callable[[], bool]) -> Iterator[Any]:
        """The batches, but for those still to be waited for once ``stop()`` is true.

        Args:
            stop: asked a few times a second while there is no batch.

        Returns:
            An iterator over the same batches.
        """
        with contextlib.suppress(StopIteration):
            while True:
                yield self._buffer.get(stop)

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def prefetch(batches: Iterable[Any], *, size: int = 2, sharding: Any = None) -> Prefetch:
    """Reads batches and moves them to the device in a background thread, in order.

    An error while reading is raised where its batch would have come. The thread ends with the
    batches, with ``close`` (also as a context manager), or when the iterator is dropped.

    Args:
        batches: an iterable of dicts of arrays (each host's own rows).
        size: batches held ready, at least 1; they take device memory.
        sharding: where the arrays go: a jax.sharding.Sharding for the global arrays, over all
            processes; None puts them on the default device.

    Returns:
        An iterator of the same dicts with jax arrays.

    Raises:
        TypeError: batches is not iterable, or sharding is none.

    Example:
        >>> import kdjax.data
        >>> batches = kdjax.data.digits().batches("train", 32)
        >>> with prefetch(batches) as ready:
        ...     print(next(ready)["image"].shape)
        (32, 8, 8, 1)
    """
    size = _checks.count("size", size)
    if sharding is not None and not isinstance(sharding, jax.sharding.Sharding):
        raise TypeError(
            f"sharding must be a jax.sharding.Sharding or None, got {_checks.describe(sharding)}."
        )
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be iterable, got {_checks.describe(batches)}.")
    return Prefetch(batches, size, sharding)


class _Buffer:
    """A bounded queue that either side can end."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: collections.deque[Any] = collections.deque()
        self._changed = threading.Condition()
        self._ended = False
        self._stopped = False
        self._error: BaseException | None = None

    def put(self, item: Any) -> bool:
        """Waits for room; False once nobody wants items any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._items) < self._size)
            if not self._stopped:
                self._items.append(item)
                self._changed.notify_all()
            return not self._stopped

    def get(self, stop: Callable[[], bool] | None = None) -> Any:
        with self._changed:
            while not (self._items or self._stopped or self._ended):
                if stop is not None and stop():
                    raise StopIteration
                self._changed.wait(_SLICE)
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def end(self, error: BaseException | None = None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    @property
    def stopped(self) -> bool:
        return self._stopped

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._items.clear()
            self._changed.notify_all()


def _fill(buffer: _Buffer, batches: Iterable[Any], sharding: Any) -> None:
    iterator: Any = None
    try:
        iterator = iter(batches)
        for batch in iterator:
            # Checked first: after a long read the program may be ending, and JAX with it.
            if buffer.stopped or not buffer.put(_place(batch, sharding)):
                break
            del batch
        if hasattr(iterator, "close"):
            iterator.close()
        buffer.end()
    except BaseException as error:
        buffer.end(error)


def _place(batch: Any, sharding: Any) -> Any:
    if sharding is None:
        # What is on devices already stays there: it may span several processes.
        return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jax.device_put(x), batch)
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch must be a dict of arrays, got {_checks.describe(batch)}.")
    return {
        key: jax.make_array_from_process_local_data(sharding, np.asarray(value))
        for key, value in batch.items()
    }
