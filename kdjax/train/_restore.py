"""Reading what `fit` saved."""

from __future__ import annotations

import os

from kdjax import _checks
from kdjax._pairs import State, Tree
from kdjax.train._checkpoint import Checkpoints


def _open(
    folder: str | os.PathLike[str], step: int | str | None, *, parts: bool = False
) -> tuple[Checkpoints, int]:
    """The checkpoints of a folder, and the step that None, ``"best"`` or a number means there."""
    found = Checkpoints(folder, write=False, parts=parts)
    if step == "best" and found.steps():
        best = found.record(found.steps()[-1]).get("best")
        found.close()
        best = None if best is None else (best[0], best[1])
        found = Checkpoints(folder, best=best, write=False, parts=parts)
    try:
        return found, found.resolve(step)
    except ValueError:
        found.close()
        raise


def restore(
    path: str | os.PathLike[str], state_like: State, *, step: int | str | None = None
) -> State:
    """Reads a State from a checkpoint folder that `fit` wrote.

    Args:
      path: the folder.
      state_like: a State of the same learner, of arrays or abstract:
        ``jax.eval_shape(learner.init, key, batch, frozen)``. Leaves with a sharding are restored
        to it, others to the default device.
      step: a step there is, ``"best"`` for the best by the metric that `fit` was given, or None
        for the newest.

    Returns:
      The `State`, bit for bit as it was saved.

    Raises:
      ValueError: there is no such checkpoint, it is of another model, or it is damaged.

    Example:
      >>> import jax, kdjax as kd
      >>> def resume(learner, batch, path):
      ...     like = jax.eval_shape(learner.init, jax.random.key(0), batch)
      ...     return kd.train.restore(path, like, step="best")
    """
    if not isinstance(state_like, State):
        raise TypeError(
            f"state_like must be a kdjax.State, also abstract, got {_checks.describe(state_like)}."
        )
    found, number = _open(path, step)
    try:
        return found.restore(number, state_like)
    finally:
        found.close()


def load_student(
    path: str | os.PathLike[str], *, step: int | str | None = None
) -> tuple[Tree, Tree]:
    """Reads a trained student's variables, to evaluate it or to make it a teacher.

    Args:
      path: a checkpoint folder that `fit` wrote.
      step: as in `restore`.

    Returns:
      ``(params, extra)`` on the default device, as plain dicts and lists (tuples of a hand-written
      model come back as lists); fit for ``frozen=``.

    Raises:
      ValueError: there is no such checkpoint, it holds no student, or it is damaged.

    Example:
      >>> import kdjax as kd
      >>> def score(student, path, batches):
      ...     return kd.train.evaluate(student, kd.train.load_student(path), batches)
    """
    found, number = _open(path, step, parts=True)
    try:
        return found.student(number)
    finally:
        found.close()
