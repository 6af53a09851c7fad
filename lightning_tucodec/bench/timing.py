"""Timing of actions in turns, and the rows that every bench prints."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any


def in_turns(actions: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each action; the actions take turns, so that a busy moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return times


def rows_of(
    times: dict[str, list[float]], ratios: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """`name`, `median_s`, `min_s`, `max_s` and `ratio_to` of every action."""
    return [
        {
            "name": name,
            "median_s": round(statistics.median(seconds), 4),
            "min_s": round(min(seconds), 4),
            "max_s": round(max(seconds), 4),
            "ratio_to": {key: round(ratio, 3) for key, ratio in ratios.get(name, {}).items()},
        }
        for name, seconds in times.items()
    ]


def machine() -> str:
    """The kind of machine that the times belong to."""
    return f"{platform.machine()}, {os.cpu_count()} cores"
