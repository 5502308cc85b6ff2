"""``python -m kdjax`` is the command ``kdjax``."""

from kdjax.cli import console

if __name__ == "__main__":
    console()
