"""`python -m switchable` is the command `switchable`."""

import sys

from switchable.cli import main

if __name__ == "__main__":
    sys.exit(main())
