"""The command ``kdjax``: parses, calls `kdjax.experiments` and `kdjax.train`, prints tables.

Exit codes: 0; 1 when a training diverged; 2 for a bad argument, after one line on stderr; 130 when
it was interrupted.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

from kdjax.cli._errors import explained

_PACKAGES = ("tyro", "rich", "matplotlib")


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
