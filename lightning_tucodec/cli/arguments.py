"""Options that several commands share; imports nothing heavy, so that `--help` is instant."""

import argparse
import math
from collections.abc import Callable

from lightning_tucodec.io.files import expanded


def add_force(parser: argparse.ArgumentParser) -> None:
    """`--force`: existing files may be replaced; inputs never are."""
    parser.add_argument("--force", action="store_true", help="replace files that exist already")


def location(text: str) -> str:
    """A type of options: a path or URL, with `~` and `$NAME` as a shell would have replaced them."""
    return expanded(text)


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


positive = real(0, above=True)
count = whole(1)
