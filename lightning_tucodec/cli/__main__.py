"""`python -m lightning_tucodec.cli` is `tucodec`."""

import sys

from lightning_tucodec.cli import main

if __name__ == "__main__":
    sys.exit(main())
