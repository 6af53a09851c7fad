"""Timing of actions in turns, and the rows that every bench prints."""

import io
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from lightning_tucodec.errors import ConfigError


def in_turns(actions: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each action; the actions take turns, so that other load affects all alike."""
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


def machine(device: str = "cpu") -> str:
    """The kind of machine on which the times were measured."""
    text = f"{platform.machine()}, {os.cpu_count()} cores"
    return f"{text}, {torch.cuda.get_device_name()}" if device.startswith("cuda") else text


def check_device(device: str) -> None:
    """Refuse a device that cannot be measured.

    Raises:
        ConfigError: there is no such device here.
    """
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU here")


def synchronise(device: str) -> None:
    """Wait for a device's queued work, so that a time includes it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def asked(
    what: str, value: float, *, at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    """A measured value beside the bound that is required of it."""
    met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    bound = f"≥ {at_least}" if at_least is not None else f"≤ {at_most}"
    return {"what": what, "value": round(value, 4), "asked": bound, "met": met}


def table_text(result: dict[str, Any]) -> str:
    """The rows as a text table."""
    text = io.StringIO()
    for row in result["rows"]:
        beside = ", ".join(f"{ratio:.2f} × {name}" for name, ratio in row["ratio_to"].items())
        print(
            f"{row['name']:24s} {row['median_s']:8.3f} s ({row['min_s']:.3f} to "
            f"{row['max_s']:.3f})  {beside}",
            file=text,
        )
    for line in result["asked"]:
        verdict = "met" if line["met"] else "NOT MET"
        print(f"{line['what']}: {line['value']:.4g}, asked {line['asked']}: {verdict}", file=text)
    for key, value in result.items():
        if key not in ("rows", "asked"):
            print(f"{key}: {value}", file=text)
    return text.getvalue().rstrip()
