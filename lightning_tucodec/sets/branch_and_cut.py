"""The multiple-choice knapsack problem with several limits: HiGHS' branch and cut through SciPy.

Its answer is checked in integers.
"""

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.sets.knapsack import SUM_MAX, Solution, dominated, largest_sum


def solve_limits(
    cost: NDArray[np.int64],
    weights: Sequence[NDArray[np.int64]],
    limits: Sequence[int],
    exists: NDArray[np.bool_] | None = None,
    names: Sequence[str] = (),
    gap: float = 0.0,
    seconds: float = 120.0,
) -> Solution:
    """Least Σ cost with Σ weights[m] ≤ limits[m] for every m, one entry a row, by HiGHS.

    Args:
        cost: n×k.
        weights: n×k each.
        limits: one for each of the weights.
        exists: n×k, False where an entry may not be chosen.
        names: what each limit is a limit of, for messages.
        gap: relative gap at which the search may end.
        seconds: time limit of the search; the best answer so far is returned with its bound.

    Raises:
        ConfigError: no choice meets all limits, or none was found in time.
    """
    exists = np.ones(cost.shape, bool) if exists is None else exists
    if max(largest_sum(values, exists) for values in (cost, *weights)) >= SUM_MAX:
        raise ConfigError("the sums do not fit into 64 bits")
    useful = exists & ~dominated(np.stack([cost, *weights], 2), exists)
    # HiGHS accepts a row that is violated by its tolerance; then the limits are tightened by as much.
    bound: int | None = None
    for margin in (0.0, 1e-6, 1e-5, 1e-4):
        drawn = [limit - math.ceil(margin * limit) for limit in limits]
        choice, reached, lower = _milp(cost, weights, drawn, useful, gap, seconds)
        if choice is None:
            if bound is None and reached:
                raise ConfigError(_joint_violation(cost, weights, limits, useful, names, seconds))
            break
        # Both are bounds of the true problem only if no margin was applied.
        bound = math.ceil(lower) if bound is None else bound
        rows = np.arange(len(cost))
        if all(
            int(weight[rows, choice].sum()) <= limit
            for weight, limit in zip(weights, limits, strict=True)
        ):
            total = int(cost[rows, choice].sum())
            return Solution.checked(
                choice, min(bound, total), "HiGHS branch and cut", cost, weights, limits, exists
            )
    raise ConfigError(f"no choice within the limits was found in {seconds:g} s; allow more time")


def _milp(
    cost: NDArray[np.int64],
    weights: Sequence[NDArray[np.int64]],
    limits: Sequence[int],
    useful: NDArray[np.bool_],
    gap: float,
    seconds: float,
) -> tuple[NDArray[np.int64] | None, bool, float]:
    """The choice if one was found, whether the search was complete, and the lower bound."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    row, column = np.nonzero(useful)
    ones = csr_array((np.ones(len(row)), (row, np.arange(len(row)))), shape=(len(cost), len(row)))
    constraints = [LinearConstraint(ones, 1, 1)]
    for weight, limit in zip(weights, limits, strict=True):
        # Scaled so that a tolerance means the same in every row.
        unit = max(1, abs(limit))
        constraints.append(
            LinearConstraint(csr_array(weight[row, column][None] / unit), -np.inf, limit / unit)
        )
    # Every choice pays its row's minimum; subtracting it keeps the digits for the differences.
    least = np.where(useful, cost, np.iinfo(np.int64).max).min(1)
    above = (cost - least[:, None])[row, column]
    unit = max(1, int(above.max(initial=0)))
    with _native_output_to_stderr():
        result = milp(
            above / unit,
            integrality=np.ones(len(row)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": gap, "time_limit": seconds},
        )
    if result.x is None:
        return None, result.status == 2, -math.inf
    chosen = result.x > 0.5
    choice = np.zeros(len(cost), np.int64)
    choice[row[chosen]] = column[chosen]
    # A dual bound in floating point is trusted to nine digits.
    lower = result.mip_dual_bound * unit
    return choice, True, int(least.sum()) + lower - 1e-9 * abs(lower)


@contextlib.contextmanager
def _native_output_to_stderr() -> Iterator[None]:
    """HiGHS prints debugging lines to the process's stdout, where our results go."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(saved, 1)
        os.close(saved)


def _joint_violation(
    cost: NDArray[np.int64],
    weights: Sequence[NDArray[np.int64]],
    limits: Sequence[int],
    useful: NDArray[np.bool_],
    names: Sequence[str],
    seconds: float,
) -> str:
    """Limits that can be met one by one but not together: by how much each is missed at least."""
    parts = []
    for index, (weight, limit) in enumerate(zip(weights, limits, strict=True)):
        others = [other for other in range(len(weights)) if other != index]
        choice, _, _ = _milp(
            weight, [weights[i] for i in others], [limits[i] for i in others], useful, 1e-6, seconds
        )
        if choice is not None:
            least = int(weight[np.arange(len(cost)), choice].sum())
            name = names[index] if names else f"limit {index}"
            parts.append(f"{name} would be {least / max(1, limit) - 1:.2%} over")
    return "no choice meets all limits together; with the others met, " + ", ".join(parts)
