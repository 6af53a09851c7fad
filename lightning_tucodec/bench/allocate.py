"""How long the set-level allocation takes, against HiGHS on the same instances.

The sets are synthetic but like photographs: sizes from half a megapixel to four, complexity
log-normal, rate and distortion of each candidate with a scatter of 3 %, budget 0.15 bpp. The
first set has the numbers of CLIC 2019's test set: 330 images and 15.75 MB.
"""

import platform
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from lightning_tucodec.sets.allocation import Quantity, Table
from lightning_tucodec.sets.branch_and_cut import solve_limits
from lightning_tucodec.sets.knapsack import Solution, solve_one_limit

CLIC_TEST_BYTES = 15_750_000
HIGHS_SECONDS = 120.0


def synthetic_table(images: int, candidates: int, seed: int = 0) -> Table:
    """A set whose rate-distortion curves are like those of photographs near 0.15 bpp."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(500_000, 4_500_000, images)
    step = np.geomspace(0.05, 0.5, candidates) * np.exp(rng.normal(0, 0.5, (images, 1)))
    hardness = np.exp(rng.normal(0, 0.5, (images, 1)))
    scatter = np.exp(rng.normal(0, 0.03, (3, images, candidates)))
    return Table(
        images=[f"image{i}" for i in range(images)],
        candidates=[f"candidate{j}" for j in range(candidates)],
        pixels=pixels,
        bytes=(step * pixels[:, None] / 8 * scatter[0]).astype(np.int64),
        sse=(9 * hardness / step * pixels[:, None] * scatter[1]).astype(np.int64),
        ms_ssim=1 - np.minimum(0.5, 0.004 * hardness / step * scatter[2]),
    )


def rows(repeats: int = 5) -> list[dict[str, Any]]:
    """One row per case.

    Returns:
        `name`, `median_s`, `min_s`, `max_s`, `gap` (0: proven optimal) and, where HiGHS solved the
        same instance, `ratio_to`: its time over ours.
    """
    clic = synthetic_table(330, 15)
    large = synthetic_table(100_000, 10)
    solve_one_limit(clic.sse, clic.bytes, CLIC_TEST_BYTES)  # compiles
    table_rows = []
    minimised: tuple[Quantity, ...] = ("sse", "ms_ssim")
    for minimise in minimised:
        cost = clic.amounts(minimise)
        case = f"330 images x 15 candidates, 15.75 MB, {minimise}"
        ours = _time(case, repeats, partial(solve_one_limit, cost, clic.bytes, CLIC_TEST_BYTES))
        highs = _time(
            f"{case}, HiGHS",
            1,
            partial(solve_limits, cost, [clic.bytes], [CLIC_TEST_BYTES], seconds=HIGHS_SECONDS),
        )
        ours["ratio_to"] = {"HiGHS": round(highs["median_s"] / ours["median_s"], 1)}
        table_rows += [ours, highs]
    budget = int(0.15 * large.pixels.sum() / 8)
    case = "100000 images x 10 candidates, 0.15 bpp, sse"
    table_rows.append(
        _time(case, repeats, partial(solve_one_limit, large.sse, large.bytes, budget))
    )
    return table_rows


def run(repeats: int = 5) -> dict[str, Any]:
    """The rows, the machine and the peak memory of the process in MB."""
    result = {"rows": rows(repeats)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {**result, "peak_memory_mb": peak, "machine": f"{platform.machine()}, one thread"}


def table_text(result: dict[str, Any]) -> str:
    """The rows as a text table."""
    lines = [
        f"{row['name']:60} {1e3 * row['median_s']:10.1f} ms   gap {row['gap']:.2g}"
        for row in result["rows"]
    ]
    return "\n".join([*lines, f"peak memory {result['peak_memory_mb']} MB, {result['machine']}"])


def _time(name: str, repeats: int, solve: Callable[[], Solution]) -> dict[str, Any]:
    """Wall-clock seconds of several runs."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        solution = solve()
        seconds.append(time.perf_counter() - started)
    return {
        "name": name,
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "gap": (solution.cost - solution.bound) / max(1, solution.cost),
    }
