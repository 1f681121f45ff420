"""``python -m lazarus`` is the command ``lazarus``."""

import sys

from lazarus.cli import main

if __name__ == "__main__":
    sys.exit(main())
