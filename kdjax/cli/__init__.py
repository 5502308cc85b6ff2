"""The command ``kdjax``: parses, calls `kdjax.experiments` and `kdjax.train`, prints tables.

Exit codes: 0; 1 when a training diverged; 2 for a bad argument, after one line on stderr; 130 when
it was interrupted.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from kdjax.cli._errors import explained

_PACKAGES = ("tyro", "rich", "matplotlib")


def console() -> None:
    """The command as a process: `main`, and an end that an interruption can't spoil."""
    sys.unraisablehook = _again
    code = main()
    if code == 130:
        # What was to be saved is saved. Threads of the compiler and of the checkpoint library that
        # are still at work would crash an orderly end of the interpreter.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _again(fault: Any) -> None:
    """Ctrl-C in a callback of the garbage collector would be printed and lost: sends it again."""
    if fault.exc_type is not None and issubclass(fault.exc_type, KeyboardInterrupt):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(fault)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: the arguments without the program's name; by default those of the process.

    Returns:
      The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"kdjax: the command needs {', '.join(missing)}: pip install 'kdjax[cli]'",
            file=sys.stderr,
        )
        return 2
    # The log lines of the checkpoint library say nothing to somebody at a terminal.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from kdjax.cli import _commands

    return explained(lambda: _commands.run(arguments))
