"""How the command answers what goes wrong: one line on stderr, and an exit code."""

from __future__ import annotations

import dataclasses
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import kdjax

BAD_ARGUMENT, DIVERGED, INTERRUPTED = 2, 1, 130
_PACKAGE = Path(kdjax.__file__).parent


class Interrupted(Exception):
    """Ctrl-C, with what to tell."""


def explained(command: Callable[[], int]) -> int:
    """Runs a command and turns the errors that are meant for its user into one line.

    Errors raised by other libraries are faults, not answers: they pass through with a traceback.

    Args:
      command: returns an exit code.

    Returns:
      The exit code.
    """
    try:
        return command()
    except Interrupted as stop:
        return _say(str(stop), INTERRUPTED)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except FloatingPointError as error:
        return _say(_one_line(error), DIVERGED)
    except (ValueError, TypeError, ImportError) as error:
        if not _ours(error):
            raise
        return _say(_as_option(_one_line(error)), BAD_ARGUMENT)
    except (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        return _say(f"{error.strerror}: {error.filename}", BAD_ARGUMENT)
    except SystemExit as stop:  # tyro's --help, and its own errors
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _say(text: str, code: int) -> int:
    print(f"kdjax: {text}", file=sys.stderr)
    return code


def _ours(error: BaseException) -> bool:
    """Whether the error was raised by a line of kdjax."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and Path(frames[-1][0].f_code.co_filename).is_relative_to(_PACKAGE)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _as_option(text: str) -> str:
    """``batch_size must be ...`` as ``--batch-size must be ...``: what was typed."""
    name = re.match(r"[a-z_]+(?= (?:must|needs)\b)", text)
    if name is None or name[0] not in _option_names():
        return text
    return "--" + name[0].replace("_", "-") + text[name.end() :]


def _option_names() -> set[str]:
    from kdjax.cli import _condense_options, _lm_options, _options

    rooms = (_options, _condense_options, _lm_options)
    kinds = {value for room in rooms for value in vars(room).values() if isinstance(value, type)}
    kinds = {kind for kind in kinds if dataclasses.is_dataclass(kind)}
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    return names - {"checkpoint"}  # which is typed without a name
