"""`tucodec demo`."""

import argparse
from pathlib import Path

from lightning_tucodec.cli.arguments import Subparsers, command, location


def register(subparsers: Subparsers) -> None:
    """`tucodec demo`."""
    parser = command(
        subparsers, "demo", run, "run the whole chain on photos that ship with a dependency"
    )
    parser.add_argument("--out", type=location, default="demo", metavar="DIR")


def run(arguments: argparse.Namespace) -> int:
    """Run it."""
    from lightning_tucodec import demo

    demo.run(Path(arguments.out))
    return 0
