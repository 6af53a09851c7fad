"""Options that several commands share; imports nothing heavy, so that `--help` is instant."""

import argparse


def add_force(parser: argparse.ArgumentParser) -> None:
    """`--force`: existing files may be replaced; inputs never are."""
    parser.add_argument("--force", action="store_true", help="replace files that exist already")
