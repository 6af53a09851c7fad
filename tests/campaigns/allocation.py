"""Optimality of the set-level allocation: against brute force and against HiGHS.

    python -m tests.campaigns.allocation [--small 2000] [--medium 200] [--pairs 200] [--many 300]

Small instances (up to 6 images and 6 candidates, missing ones among them) equal brute force over all
choices; medium ones (up to 60 × 12, realistic and random) equal HiGHS; those with two limits equal brute
force; those with many candidates (2 or 3 images, up to 2,000 each) stay within the limit, and the optimum
of the plain programme lies between bound and cost. Instance i of a seed is always the same. Counts go to
docs/campaigns.json under the key "allocation"; the exit status is 1 when any instance differs.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.sets.branch_and_cut import solve_limits
from lightning_tucodec.sets.knapsack import solve_one_limit

RESULTS = Path(__file__).parents[2] / "docs" / "campaigns.json"
Ints = NDArray[np.int64]


def small(seed: int, limits: int = 1) -> tuple[Ints, list[Ints], list[int], NDArray[np.bool_]]:
    """Cost, weights, limits and which entries exist: tiny numbers, so ties and infeasibility."""
    rng = np.random.default_rng([seed, limits])
    n, k = (int(rng.integers(1, high + 1)) for high in (6, 6))
    scale = int(rng.choice([2, 5, 30, 10_000]))
    cost, *weights = rng.integers(0, scale, (1 + limits, n, k))
    if rng.random() < 0.3:
        cost = np.ascontiguousarray(weights[0].max() - weights[0])
    exists = rng.random((n, k)) < 0.8
    exists[np.arange(n), rng.integers(0, k, n)] = True
    caps = [int(rng.integers(0, max(1, w.max(1).sum()) + 2)) for w in weights]
    return cost, weights, caps, exists


def medium(seed: int) -> tuple[Ints, Ints, int]:
    """Cost, weight and limit: every other instance like photographs, the others random."""
    rng = np.random.default_rng([seed, 0])
    n, k = int(rng.integers(5, 61)), int(rng.integers(2, 13))
    if seed % 2:
        cost, weight = rng.integers(0, 10 ** int(rng.integers(2, 6)), (2, n, k))
    else:
        pixels = rng.integers(500_000, 4_000_000, n)[:, None]
        step = np.geomspace(0.05, 0.5, k) * np.exp(rng.normal(0, 0.4, (n, 1)))
        jitter = np.exp(rng.normal(0, 0.03, (2, n, k)))
        weight = (step * pixels / 8 * jitter[0]).astype(np.int64)
        cost = (3 * pixels / step * jitter[1]).astype(np.int64)
    least, most = int(weight.min(1).sum()), int(weight.max(1).sum())
    return cost, weight, least + int(rng.uniform(0, 0.8) * (most - least))


def brute_force(
    cost: Ints, weights: list[Ints], limits: list[int], exists: NDArray[np.bool_]
) -> int | None:
    """The least cost over all choices within the limits."""
    rows = np.arange(len(cost))
    best = None
    for choice in itertools.product(*(np.nonzero(row)[0] for row in exists)):
        if all(int(w[rows, choice].sum()) <= cap for w, cap in zip(weights, limits, strict=True)):
            total = int(cost[rows, choice].sum())
            best = total if best is None else min(best, total)
    return best


def many(seed: int) -> tuple[Ints, Ints, int]:
    """Cost, weight and limit: candidates nearly on a line, so that most of them come into question."""
    rng = np.random.default_rng([seed, 3])
    n, k = int(rng.integers(2, 4)), int(rng.integers(1, 2001))
    weight = rng.integers(0, 4000, (n, k))
    cost = 4000 - weight + rng.integers(0, int(rng.choice([1, 1, 2, 1000])), (n, k))
    least, most = int(weight.min(1).sum()), int(weight.max(1).sum())
    return cost, weight, least + int(rng.random() * (most - least))


def plain_programme(cost: Ints, weight: Ints, limit: int) -> int:
    """The least cost, over every sum of weights."""
    best = np.zeros(limit + 1, np.int64)  # of sums up to the index
    for values, sizes in zip(cost, weight, strict=True):
        following = np.full(limit + 1, np.iinfo(np.int64).max // 2)
        for size, value in zip(sizes, values, strict=True):
            if size <= limit:
                shifted = best[: limit + 1 - size] + value
                following[size:] = np.minimum(following[size:], shifted)
        best = following
    return int(best[limit])


def check_many(seed: int) -> bool:
    """One limit and up to 2,000 candidates an image against the plain programme."""
    cost, weight, limit = many(seed)
    solution = solve_one_limit(cost, weight, limit)
    rows = np.arange(len(cost))
    return (
        solution.bound <= plain_programme(cost, weight, limit) <= solution.cost
        and solution.cost == int(cost[rows, solution.choice].sum())
        and int(weight[rows, solution.choice].sum()) <= limit
    )


def check_small(seed: int) -> bool:
    """One limit against brute force, certificate and feasibility included."""
    cost, weights, limits, exists = small(seed)
    expected = brute_force(cost, weights, limits, exists)
    try:
        solution = solve_one_limit(cost, weights[0], limits[0], exists)
    except ConfigError:
        return expected is None
    rows = np.arange(len(cost))
    return (
        solution.cost == expected == solution.bound == int(cost[rows, solution.choice].sum())
        and int(weights[0][rows, solution.choice].sum()) <= limits[0]
        and bool(exists[rows, solution.choice].all())
    )


def check_medium(seed: int) -> bool:
    """One limit against HiGHS."""
    cost, weight, limit = medium(seed)
    ours = solve_one_limit(cost, weight, limit)
    theirs = solve_limits(cost, [weight], [limit])
    return ours.cost == ours.bound == theirs.cost


def check_pair(seed: int) -> bool:
    """Two limits against brute force."""
    cost, weights, limits, exists = small(seed, limits=2)
    expected = brute_force(cost, weights, limits, exists)
    try:
        solution = solve_limits(cost, weights, limits, exists)
    except ConfigError:
        return expected is None
    return solution.cost == expected and solution.bound <= solution.cost


def main() -> int:
    """Run all parts and record the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", type=int, default=2000)
    parser.add_argument("--medium", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--many", type=int, default=300)
    arguments = parser.parse_args()
    record: dict[str, object] = {}
    wrong = 0
    for name, check, count in (
        ("one_limit_equals_brute_force", check_small, arguments.small),
        ("one_limit_equals_highs", check_medium, arguments.medium),
        ("two_limits_equal_brute_force", check_pair, arguments.pairs),
        ("many_candidates_equal_plain_programme", check_many, arguments.many),
    ):
        started = time.perf_counter()
        differ = [seed for seed in tqdm(range(count), name) if not check(seed)]
        seconds = round(time.perf_counter() - started, 1)
        record[name] = {"instances": count, "differ": differ, "seconds": seconds}
        wrong += len(differ)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with atomic_write(RESULTS, "w") as stream:
        json.dump({**results, "allocation": record}, stream, indent=2, sort_keys=True)
        stream.write("\n")
    print(json.dumps(record))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
