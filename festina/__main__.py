"""`python -m festina` is the `festina` command."""

import sys

from festina.cli import main

if __name__ == "__main__":
    sys.exit(main())
