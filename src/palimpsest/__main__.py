"""``python -m palimpsest``: the command line."""

import sys

from palimpsest.cli import main

if __name__ == "__main__":
    sys.exit(main())
