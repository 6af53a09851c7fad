"""The multiple-choice knapsack problem with one limit: exact, by dynamic programming in reduced costs.

With a multiplier λ the Lagrangian bound gives each candidate a reduced cost r ≥ 0. A choice whose r and
unused budget (times λ) sum to more than g lies more than g above the bound. The programme therefore
searches within a small g and increases g until a solution exists. No better one can be left out.
(The bound: Everett, 1963; the core idea: Pisinger, 1995.) On photographs that takes milliseconds.

Where sizes and distortions are so similar that the Pareto states exceed the memory, they are thinned
out. The best choice found is then returned with the bound proven so far.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.coding.compiling import compiled
from lightning_tucodec.errors import ConfigError

STATES_MAX = 40_000_000
"""States that the dynamic programme stores over all rows at most, 8 bytes each."""

PAIRS_MAX = 1 << 22
"""Pairs of a state and an option that the dynamic programme looks at in a row at most."""

_BEAM_FIRST, _BEAM = 1 << 11, 1 << 16

SUM_MAX = 1 << 61


METHODS = (
    "unconstrained", "greedy on convex hulls", "dynamic programme", "HiGHS branch and cut",
)  # fmt: skip
"""How an allocation can have been found."""


@dataclass(frozen=True)
class Solution:
    """The bare answer: a choice, its cost, and a proven lower bound on every choice's cost."""

    choice: NDArray[np.int64]
    cost: int
    bound: int
    method: str

    @classmethod
    def checked(
        cls,
        choice: NDArray[np.int64],
        bound: int,
        method: str,
        cost: NDArray[np.int64],
        weights: Sequence[NDArray[np.int64]],
        limits: Sequence[int],
        exists: NDArray[np.bool_],
    ) -> "Solution":
        """The answer with totals computed again from its rows, independent of the search.

        Raises:
            RuntimeError: the choice is outside a limit or below the bound, a fault of this program.
        """
        rows = np.arange(len(cost))
        total = int(cost[rows, choice].sum())
        sums = [int(weight[rows, choice].sum()) for weight in weights]
        within = all(used <= limit for used, limit in zip(sums, limits, strict=True))
        if not exists[rows, choice].all() or not within or total < bound:
            raise RuntimeError(f"{method}: cost {total} below {bound}, or {sums} above {limits}")
        return cls(choice, total, bound, method)


def solve_one_limit(
    cost: NDArray[np.int64],
    weight: NDArray[np.int64],
    limit: int,
    exists: NDArray[np.bool_] | None = None,
    beam_max: int = _BEAM,
) -> Solution:
    """Least Σ cost with Σ weight ≤ limit, one entry a row.

    Args:
        cost: n×k, not negative.
        weight: n×k, not negative.
        limit: of the sum of weights.
        exists: n×k, False where an entry may not be chosen.
        beam_max: states that the dynamic programme keeps per row; 0 gives the greedy answer.

    Raises:
        ConfigError: no choice stays within the limit, or the numbers are too large for 64 bits.
    """
    n = len(cost)
    exists = np.ones(cost.shape, bool) if exists is None else exists
    worst = largest_sum(cost, exists), largest_sum(weight, exists)
    if max(*worst, limit) >= SUM_MAX:
        raise ConfigError("the sums do not fit into 64 bits")
    order, length = _hulls(cost, weight, exists)
    rows = np.arange(n)
    least = int(weight[rows, order[:, 0]].sum())
    if least > limit:
        raise ConfigError(f"the least sum, {least}, is above the limit, {limit}")
    image, step, slope, extra = _segments(cost, weight, order, length)
    by_slope = np.argsort(-slope, kind="stable")
    used = np.cumsum(extra[by_slope])
    fits = int(np.searchsorted(used, limit - least, side="right"))
    level = _greedy(n, image[by_slope], step[by_slope], extra[by_slope], limit - least)
    choice = order[rows, level]
    total = int(cost[rows, choice].sum())
    if fits == len(used):
        return Solution.checked(choice, total, "unconstrained", cost, [weight], [limit], exists)

    # λ = multiplier / scale as a fraction, so that reduced costs and bounds are integers.
    critical = float(slope[by_slope[fits]])
    scale = 1 << max(0, min(40, int(math.log2(SUM_MAX / (worst[0] + critical * worst[1] + 1)))))
    multiplier = max(1, round(critical * scale))
    if max(worst[0] * scale, multiplier * max(worst[1], limit)) >= 2 * SUM_MAX:
        raise ConfigError("the sums do not fit into 64 bits")
    penalised = np.where(exists, cost * scale + multiplier * weight, np.iinfo(np.int64).max)
    base = penalised.argmin(1)
    lowest = penalised[rows, base]
    bound = int(lowest.sum()) - multiplier * limit
    reduced = penalised - lowest[:, None]
    slack = limit - int(weight[rows, base].sum())
    shift = weight - weight[rows, base][:, None]
    widest = total * scale - bound
    width = max(multiplier, widest >> 16) if widest else 0
    proven = bound
    method = "greedy on convex hulls"
    beam = _BEAM_FIRST
    while beam_max:
        width = min(width, widest)
        found, complete = _within(reduced, shift, slack, multiplier, width, min(beam, beam_max))
        if found is not None:
            better = np.where(found >= 0, found, base)
            if int(cost[rows, better].sum()) <= total:
                choice, method = better, "dynamic programme"
                total = int(cost[rows, choice].sum())
        if found is not None and complete:
            proven = total * scale
        if total <= -(-proven // scale):
            break
        if complete:
            # The greedy choice itself lies at `widest`, so this ends there at the latest.
            proven = bound + width + 1
            width = 4 * width
        elif beam < beam_max:
            # Similar sizes and distortions: few states may find the optimum, but do not prove it.
            beam = beam_max
        else:
            break
    proven = min(total, -(-proven // scale))
    return Solution.checked(choice, proven, method, cost, [weight], [limit], exists)


def largest_sum(values: NDArray[np.int64], exists: NDArray[np.bool_]) -> int:
    """The most that one entry a row can add up to, in Python's integers, which do not wrap."""
    return sum(np.where(exists, values, 0).max(1).tolist())


@compiled
def dominated(values, exists):  # type: ignore[no-untyped-def]
    """n×k, True where another existing entry of the row is no worse in all m values of n×k×m."""
    n, k, m = values.shape
    dominated = np.zeros((n, k), np.bool_)
    for i in range(n):
        for j in range(k):
            for other in range(k):
                if other == j or not exists[i, other] or dominated[i, other]:
                    continue
                better = other < j  # of equal entries the first stays
                no_worse = True
                for v in range(m):
                    if values[i, other, v] > values[i, j, v]:
                        no_worse = False
                        break
                    if values[i, other, v] < values[i, j, v]:
                        better = True
                if no_worse and better:
                    dominated[i, j] = True
                    break
    return dominated


def _segments(
    cost: NDArray[np.int64],
    weight: NDArray[np.int64],
    order: NDArray[np.int64],
    length: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """The hulls' edges: image, index of the step, cost saved a unit of weight, weight added."""
    image, step = np.nonzero(np.arange(order.shape[1] - 1)[None] < length[:, None] - 1)
    before, after = order[image, step], order[image, step + 1]
    extra = weight[image, after] - weight[image, before]
    saved = cost[image, before] - cost[image, after]
    return image, step, saved / extra, extra


def _within(
    reduced: NDArray[np.int64],
    shift: NDArray[np.int64],
    slack: int,
    multiplier: int,
    width: int,
    beam: int,
) -> tuple[NDArray[np.int64] | None, bool]:
    """The best choice whose cost is at most `width` above the bound.

    Returns:
        n entries, −1 for the row's entry of reduced cost zero, or None if no choice was found; and
        whether all states were kept, so that there is no better one.
    """
    keep = reduced <= width
    # By weight and by cost, not by reduced cost, which charges for the weight.
    keep &= ~dominated(np.stack([shift, reduced - multiplier * shift], 2), keep)
    active = np.nonzero(keep.sum(1) > 1)[0]
    # Rows with expensive alternatives come first: they keep the early lists short.
    cheapest = np.where(keep[active] & (shift[active] != 0), reduced[active], width).min(1)
    active = active[np.argsort(-cheapest, kind="stable")]
    row, column = np.nonzero(keep[active])
    starts = np.searchsorted(row, np.arange(len(active) + 1))
    shifts, costs = shift[active[row], column], reduced[active[row], column]
    high = np.where(keep[active], shift[active], 0).max(1)
    low = np.where(keep[active], shift[active], 0).min(1)
    # What the rows after each one can still add or take away.
    high_after = np.append(np.cumsum(high[::-1])[::-1], 0)[1:]
    low_after = np.append(np.cumsum(low[::-1])[::-1], 0)[1:]
    most = int(np.diff(starts).max(initial=1))
    beam = max(1, min(beam, STATES_MAX // max(1, len(active)), PAIRS_MAX // most))
    status, complete, picks = _states(
        starts, shifts, costs, high_after, low_after, slack, multiplier, width, beam
    )
    if not status:
        return None, complete
    found = np.full(len(reduced), -1, np.int64)
    found[active] = column[picks]
    return found, complete


@compiled
def _states(  # type: ignore[no-untyped-def]
    starts, shifts, costs, high_after, low_after, slack, multiplier, width, beam
):
    """Pareto states (weight, reduced cost), row by row, and the way back from the best.

    Returns:
        Whether a choice was found, whether every row had at most `beam` states (where there were
        more, an even selection was kept), and the index of the picked entry of each row.
    """
    n = len(starts) - 1
    weight = np.zeros(1, np.int64)
    excess = np.zeros(1, np.int64)
    capacity = 1 << 16
    parents = np.empty(capacity, np.int32)
    entries = np.empty(capacity, np.int32)
    stage = np.zeros(n + 1, np.int64)
    picks = np.zeros(n, np.int64)
    complete = True
    for i in range(n):
        first, options = starts[i], starts[i + 1] - starts[i]
        pointer = np.zeros(options, np.int64)
        heap = [(weight[0] + shifts[first + j], j) for j in range(options)]
        heapq.heapify(heap)
        room = len(weight) * options
        new_weight = np.empty(room, np.int64)
        new_excess = np.empty(room, np.int64)
        while stage[i] + room > capacity:
            capacity *= 2
        if capacity > len(parents):
            larger = np.empty(capacity, np.int32)
            larger[: stage[i]] = parents[: stage[i]]
            parents = larger
            larger_entries = np.empty(capacity, np.int32)
            larger_entries[: stage[i]] = entries[: stage[i]]
            entries = larger_entries
        count = 0
        best = np.iinfo(np.int64).max
        while heap:
            # The lightest of all (state, option) not yet seen: lists are sorted by weight.
            lightest, option = heap[0]
            parent = pointer[option]
            pointer[option] += 1
            if parent + 1 < len(weight):
                heapq.heapreplace(heap, (weight[parent + 1] + shifts[first + option], option))
            else:
                heapq.heappop(heap)
            total = excess[parent] + costs[first + option]
            if total > width or lightest + low_after[i] > slack:
                continue
            unused = slack - lightest - high_after[i]
            if unused > 0 and unused > (width - total) // multiplier:
                continue
            value = total - multiplier * lightest
            if value >= best:
                continue
            best = value
            if count and new_weight[count - 1] == lightest:
                count -= 1
            new_weight[count] = lightest
            new_excess[count] = total
            parents[stage[i] + count] = parent
            entries[stage[i] + count] = option
            count += 1
        if count == 0:
            return False, complete, picks
        if count > beam:
            complete = False
            for kept in range(beam):
                origin = kept * count // beam
                new_weight[kept] = new_weight[origin]
                new_excess[kept] = new_excess[origin]
                parents[stage[i] + kept] = parents[stage[i] + origin]
                entries[stage[i] + kept] = entries[stage[i] + origin]
            count = beam
        stage[i + 1] = stage[i] + count
        weight = new_weight[:count].copy()
        excess = new_excess[:count].copy()
    # With no rows to decide, the base choice remains.
    if n == 0:
        return slack >= 0 and slack <= width // multiplier, complete, picks
    # Weights ascend and costs descend, so that the last state is the cheapest.
    state = len(weight) - 1
    for i in range(n - 1, -1, -1):
        picks[i] = starts[i] + entries[stage[i] + state]
        state = parents[stage[i] + state]
    return True, complete, picks


@compiled
def _hulls(cost, weight, exists):  # type: ignore[no-untyped-def]
    """Lower convex hull of each row's (weight, cost) points, from the lightest to the cheapest.

    Returns:
        n×k indices of the vertices and n lengths.
    """
    n, k = cost.shape
    order = np.zeros((n, k), np.int64)
    length = np.zeros(n, np.int64)
    for i in range(n):
        by_weight = np.argsort(weight[i], kind="mergesort")
        count = 0
        for j in by_weight:
            if not exists[i, j]:
                continue
            if count and weight[i, order[i, count - 1]] == weight[i, j]:
                if cost[i, j] >= cost[i, order[i, count - 1]]:
                    continue
                count -= 1
            if count and cost[i, j] >= cost[i, order[i, count - 1]]:
                continue
            while count > 1:
                a, b = order[i, count - 2], order[i, count - 1]
                before = (cost[i, a] - cost[i, b]) / (weight[i, b] - weight[i, a])
                after = (cost[i, b] - cost[i, j]) / (weight[i, j] - weight[i, b])
                if before > after:
                    break
                count -= 1
            order[i, count] = j
            count += 1
        length[i] = count
    return order, length


@compiled
def _greedy(n, image, step, extra, room):  # type: ignore[no-untyped-def]
    """Walk the edges from the steepest on and take each that still fits and is next in its row."""
    level = np.zeros(n, np.int64)
    for edge in range(len(image)):
        if extra[edge] <= room and level[image[edge]] == step[edge]:
            level[image[edge]] += 1
            room -= extra[edge]
    return level
