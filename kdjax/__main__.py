"""``python -m kdjax`` is the command ``kdjax``."""

import sys

from kdjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
