"""`python -m qzo.bench` is `qzo bench`."""

import sys

from ..cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
