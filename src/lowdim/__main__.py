"""`python -m lowdim`, and the command `lowdim`."""

import sys

from lowdim.interrupts import interruptible

__all__ = ["start"]


def start() -> None:
    """The command line; a signal that arrives during its import ends it clearly, too."""
    with interruptible(sys.argv[1:]):
        from lowdim.cli import main

        main()


if __name__ == "__main__":
    start()
