"""Where a run starts: at the caller's state, or at the newest checkpoint of the same run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from kdjax import _checks, parallel
from kdjax._pairs import State
from kdjax.train import _trees
from kdjax.train._checkpoint import Checkpoints


class Start(NamedTuple):
    """The state to start from, its step, and what every checkpoint of the run records."""

    state: State
    step: int
    record: dict[str, Any]


def step_of(state: State) -> int:
    """The step of a State; one number for all members of a vmapped one."""
    steps = np.unique(np.asarray(jax.device_get(state.step)))
    if steps.size != 1:
        raise ValueError(f"state.step must be one number, got {steps.tolist()}.")
    return int(steps[0])


def start(
    state: State,
    data: Any,
    *,
    steps: int,
    checkpoints: Checkpoints | None,
    mesh: Mesh | None,
    fsdp: bool,
) -> Start:
    """Restores the newest checkpoint if there is one, else copies the caller's state.

    Raises:
      ValueError: the checkpoint is of another run or damaged; nothing on disk was changed.
    """
    step = step_of(state)
    record = {"data": describe(data), "start": {"step": step, "key": key_words(state)}}
    latest = None if checkpoints is None else checkpoints.latest()
    if checkpoints is None or latest is None:
        # With a mesh the first update moves the copy there.
        return Start(_trees.copy(state), step, record)
    if latest > steps:
        if steps not in checkpoints.steps():
            raise ValueError(
                f"steps must be at least {latest}, the newest step in checkpoint "
                f"{checkpoints.folder}, got {steps}."
            )
        latest = steps
    if step > latest:
        raise ValueError(
            f"state is at step {step}, beyond step {latest} of checkpoint {checkpoints.folder}: "
            "it belongs to another run, so pass another folder."
        )
    like = state
    if mesh is not None:
        like = _trees.abstract(state, parallel.state_sharding(state, mesh, fsdp=fsdp))
    found = checkpoints.record(latest)
    restored = checkpoints.restore(latest, like)
    record["start"] = found.get("start", record["start"])
    _same_run(record, found, step, key_words(state), checkpoints)
    return Start(restored, latest, record)


def describe(data: Any) -> Any:
    """What the data says about itself, as it reads back from JSON; None if it says nothing."""
    if not callable(getattr(data, "describe", None)):
        return None
    return json.loads(json.dumps(data.describe(), default=str))


def key_words(state: State) -> list[int]:
    """The words of the state's key."""
    return np.asarray(jax.random.key_data(state.key)).ravel().tolist()


def _same_run(
    record: Mapping[str, Any],
    found: Mapping[str, Any],
    step: int,
    key: list[int],
    checkpoints: Checkpoints,
) -> None:
    was = record["start"]
    if was["step"] == step and was["key"] != key:
        raise ValueError(
            f"state.key must be the key that the run in checkpoint {checkpoints.folder} started "
            "from: it has another seed, so pass another folder for it."
        )
    name = _first_other(found.get("data"), record["data"])
    if name is not None:
        there, here = found["data"].get(name), record["data"].get(name)
        raise ValueError(
            f"data must be what the run in checkpoint {checkpoints.folder} was trained on: its "
            f"{name} was {_short(there)} and is {_short(here)}; to go on with other data, start "
            "from kdjax.train.restore(...) in another folder."
        )


def _first_other(there: Any, here: Any) -> str | None:
    """The first key in which two descriptions differ, where both sides have one."""
    if not isinstance(there, dict) or not isinstance(here, dict):
        return None
    return next((k for k in [*there, *here] if there.get(k) != here.get(k)), None)


def _short(value: Any) -> str:
    return "absent" if value is None else _checks.describe(value).partition(" ")[2]
