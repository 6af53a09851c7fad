"""The `tucodec` command: one small function a subcommand.

Heavy imports (torch above all) stand inside the functions, so that `tucodec --help` is instant.
Results go to stdout, progress and logs to stderr. Exit status: 0 ok, 1 the input or the run is at
fault (one line says which and why), 2 usage.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lightning_tucodec.errors import TucodecError

Command = Callable[[argparse.Namespace], int]


def _command(subparsers: Any, name: str, run: Command, summary: str) -> argparse.ArgumentParser:
    """Add one subcommand whose parsed arguments go to `run`, which returns the exit status."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + "."
    )
    parser.set_defaults(run=run)
    return parser


def build_parser() -> argparse.ArgumentParser:
    """All subcommands with their options."""
    parser = argparse.ArgumentParser(prog="tucodec", description="Learned image compression.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for register in _REGISTER:
        register(subparsers)
    return parser


# One line a subcommand family; each function adds its parser(s) and names what runs.
_REGISTER: list[Callable[[Any], None]] = []


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Args:
        argv: the words after `tucodec`; the process's own when None.

    Returns:
        The exit status.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except TucodecError as error:
        print(f"tucodec: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tucodec: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; that is not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
