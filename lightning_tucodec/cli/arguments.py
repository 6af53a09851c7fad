"""Options that several commands share; imports nothing heavy, so that `--help` is instant."""

import argparse
import json
import math
import re
from collections.abc import Callable
from typing import Any

from lightning_tucodec.io.files import expanded

Subparsers = Any
"""What argparse's `add_subparsers` returns; its type has no public name."""


def command(
    subparsers: Subparsers, name: str, run: Callable[[argparse.Namespace], int], summary: str
) -> argparse.ArgumentParser:
    """Add one command, whose parsed arguments go to `run`, which returns the exit status."""
    description = summary[0].upper() + summary[1:] + "."
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=summary, description=description
    )
    parser.set_defaults(run=run)
    return parser


def family(subparsers: Subparsers, name: str, summary: str) -> Subparsers:
    """Add a command that has commands of its own."""
    parser = subparsers.add_parser(name, help=summary)
    return parser.add_subparsers(dest=f"{name}_command", metavar="COMMAND", required=True)


def add_json(*parsers: argparse.ArgumentParser) -> None:
    """`--json`: the result is printed as JSON."""
    for parser in parsers:
        parser.add_argument("--json", action="store_true", help="print the result as JSON")


def show(result: Any, text: Callable[[Any], str], arguments: argparse.Namespace) -> int:
    """Print a result, as `text` writes it or as JSON; the exit status of a success."""
    print(json.dumps(result, indent=1) if arguments.json else text(result))
    return 0


def add_force(parser: argparse.ArgumentParser, but: str = "") -> None:
    """`--force`: existing files may be replaced; inputs never are. `but`: which are without it."""
    parser.add_argument("--force", action="store_true", help=f"replace existing files{but}")


def add_trust(*parsers: argparse.ArgumentParser) -> None:
    """`--trust`: whose classes a model file may name; `cli.main` tells the loaders."""
    for parser in parsers:
        parser.add_argument(
            "--trust",
            action="append",
            default=[],
            metavar="PACKAGE",
            help="also import this package's classes where a model file names them; may be repeated",
        )


def location(text: str) -> str:
    """A type of options: a path or URL, with `~` and `$NAME` as a shell would have replaced them."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return expanded(text)


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Limits that a set of images is to keep to; `sets.limits.Requirements.of` reads them."""
    add = parser.add_argument_group("limits that the set must keep to").add_argument
    add("--max-bpp", type=several(positive), metavar="BPP",
        help="bits a pixel of the set; several, as 0.075,0.15,0.3: budgets of one submission")  # fmt: skip
    add("--max-bytes", type=count)
    add("--min-psnr", type=real(0), metavar="DB", help="minimum PSNR, pooled over the set")
    add("--min-ms-ssim", type=real(0, 1), help="minimum MS-SSIM, weighted by pixels")
    add("--max-decode-seconds-per-megapixel", type=positive, metavar="S",
        help="decoding time of the set, as it was measured here")  # fmt: skip
    add("--max-image-bpp", type=positive, metavar="BPP", help="bits a pixel of each image")


def real(
    low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> Callable[[str], float]:
    """A type of options: finite numbers from `low`, or above it, to `high`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
        return _within(value, low, high, above)

    return convert


def whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """A type of options: whole numbers from `low` to `high`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        return int(_within(value, low, high))

    return convert


def _within(value: float, low: float, high: float, above: bool = False) -> float:
    if value < low or value > high or (above and value == low):
        least = f"above {low:g}" if above else f"{low:g} at least"
        most = f" and {high:g} at most" if high < math.inf else ""
        raise argparse.ArgumentTypeError(f"{value:g} is out of range: it must be {least}{most}")
    return value


def several(one: Callable[[str], float]) -> Callable[[str], list[float]]:
    """A type of options: values with commas between them."""

    def convert(text: str) -> list[float]:
        return [one(value) for value in text.split(",")]

    return convert


positive = real(0, above=True)
count = whole(1)


def part(text: str) -> tuple[int, int]:
    """A type of options: `I/N`, share I (from 1) of N."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form i/n, such as 1/8")
    return int(match[1]), int(match[2])
