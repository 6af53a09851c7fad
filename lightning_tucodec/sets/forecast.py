"""What an evaluation will need: the workers that fit into memory, and the minutes left."""

import contextlib
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_tucodec.io.processes import cores

BYTES_A_PIXEL = 450
"""What a worker holds at its peak, a pixel of its image: 430 measured with a learned model and MS-SSIM."""

_TOLD_FROM = 1.0
"""Minutes; an evaluation that takes less says nothing."""


def affordable_workers(pixels: int, available: int | None = None) -> int:
    """As many workers as processors and memory allow.

    Args:
        pixels: of the largest image; 0 where that is not known.
        available: bytes of memory; what the machine has free when None.

    Returns:
        At least 1.
    """
    available = available_memory() if available is None else available
    if available is None or not pixels:
        return cores()
    return max(1, min(cores(), available // (BYTES_A_PIXEL * pixels)))


_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Limit and use in control groups of version 2 and of version 1."""


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that are free for programs, in the limit of a container too (Linux); None where unknown.

    Args:
        root: of the file system, for tests.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    except (OSError, ValueError, StopIteration):
        return None
    for names in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            most, used = (int((root / "sys/fs/cgroup" / name).read_text()) for name in names)
            free = min(free, most - used)  # version 1 writes a huge number for no limit
    return max(0, free)


class Forecast:
    """The minutes that are left, reported once when every setting has been timed.

    Args:
        jobs: setting and pixels of every coding that has yet to be done.
        workers: codings that run at a time.
    """

    def __init__(self, jobs: Sequence[tuple[str, int]], workers: int) -> None:
        self._left: dict[str, int] = {}
        counts = Counter(setting for setting, _ in jobs)
        for setting, pixels in jobs:
            self._left[setting] = self._left.get(setting, 0) + pixels
        # A much smaller image says nothing of the others: its time is that of starting.
        self._enough = {setting: self._left[setting] / n / 2 for setting, n in counts.items()}
        self._pace: dict[str, tuple[float, int]] = {}
        self._workers = workers
        self._codings = len(jobs)
        self._told = not jobs
        self._lock = threading.Lock()

    def known(self, setting: str, pixels: int, row: Mapping[str, Any]) -> None:
        """Record a coding that was measured before; these take no time, so no forecast follows them."""
        with self._lock:
            self._note(setting, pixels, row["encode_seconds"] + row["decode_seconds"])

    def finished(self, setting: str, pixels: int, seconds: float) -> str | None:
        """Record a coding.

        Returns:
            A line for the user, once: when every setting has been timed on half the pixels of a mean image
            and more than a minute is left.
        """
        with self._lock:
            self._note(setting, pixels, seconds)
            if self._told or any(
                left > 0 and self._pace.get(s, (0.0, 0))[1] < self._enough.get(s, 0)
                for s, left in self._left.items()
            ):
                return None
            self._told = True
            total = sum(
                left * self._pace[s][0] / self._pace[s][1]
                for s, left in self._left.items()
                if left > 0 and self._pace[s][1]
            )
        minutes = total / self._workers / 60
        if minutes < _TOLD_FROM:
            return None
        return (
            f"evaluate: about {minutes:.0f} min for the {self._codings} codings that are left, "
            f"{self._workers} at a time, judged by one of each setting"
        )

    def _note(self, setting: str, pixels: int, seconds: float) -> None:
        before, area = self._pace.get(setting, (0.0, 0))
        self._pace[setting] = before + seconds, area + pixels
        self._left[setting] = self._left.get(setting, pixels) - pixels
        self._codings -= 1
