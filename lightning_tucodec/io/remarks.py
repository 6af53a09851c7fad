"""What is said once of many files."""

import sys
from collections.abc import Callable
from pathlib import Path

from lightning_tucodec.errors import printable


def remarks() -> Callable[[str, Path, str], None]:
    """What takes the kind of a remark, a file and the remark; of each kind one is printed, to stderr."""
    said: dict[str, str] = {}

    def remark(kind: str, source: Path, text: str) -> None:
        from tqdm import tqdm  # only where there is something to say

        line = f"{printable(str(source))}: {text} (said once)"
        if said.setdefault(kind, line) is line:  # one step, whatever the threads
            tqdm.write(line, file=sys.stderr)

    return remark
