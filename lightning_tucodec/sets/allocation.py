"""Choose one coding of each image so that a whole set meets its budget, with a proof of optimality.

For every image one of several codings ("candidates") is chosen so that a sum over the set is minimal
while other sums stay within limits: the multiple-choice knapsack problem. Set-level PSNR and
MS-SSIM as CLIC defines them are such sums: of squared errors, and of pixels·(1 − MS-SSIM).

Everything is compared in integers. Bytes and squared errors of uint8 images are integers; MS-SSIM
is taken in units of 2⁻²⁴, which holds every fp32 value from one half to one exactly.

One limit: exact by dynamic programming over Pareto states in reduced costs. With a multiplier λ the
Lagrangian bound gives each candidate a reduced cost r ≥ 0, and a choice whose r and unused budget
(times λ) sum to more than g lies more than g above the bound. The programme therefore
searches within a small g and increases g until a solution exists. No better one can be left out.
(The bound: Everett, 1963; the core idea: Pisinger, 1995.) On photographs that takes milliseconds.
Where sizes and distortions are so similar that the states exceed the memory, they are thinned out. The best
choice found is then returned with the bound proven so far.

Several limits: HiGHS' branch and cut through SciPy, its answer checked in integers.
"""

import contextlib
import ctypes
import heapq
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.coding.compiling import compiled
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.quality.decibels import psnr_from_sse

Quantity = Literal["bytes", "sse", "ms_ssim", "seconds"]
"""What can be minimised or limited: `ms_ssim` stands for the loss pixels·(1 − MS-SSIM)."""

MS_SSIM_UNITS = 1 << 24
SECONDS_UNITS = 1_000_000
STATES_MAX = 40_000_000
"""States that the dynamic programme stores over all rows at most, 8 bytes each."""

PAIRS_MAX = 1 << 22
"""Pairs of a state and an option that the dynamic programme looks at in a row at most."""

_BEAM_FIRST, _BEAM = 1 << 11, 1 << 16

_SUM_MAX = 1 << 61
_IN_WORDS: dict[Quantity, str] = {
    "bytes": "the bytes",
    "sse": "the squared error",
    "ms_ssim": "the loss 1 − MS-SSIM",
    "seconds": "the decoding time",
}


@dataclass(frozen=True)
class Table:
    """Size and distortion of every image under every candidate.

    Attributes:
        images: names of the n images.
        candidates: names of the k candidates.
        pixels: n, of the original images.
        bytes: n×k file sizes, headers included; −1 where a candidate does not exist.
        sse: n×k sums of squared errors over all RGB values of uint8 images.
        ms_ssim: n×k values.
        seconds: n×k decoding times, if known.
    """

    images: Sequence[str]
    candidates: Sequence[str]
    pixels: NDArray[np.int64]
    bytes: NDArray[np.int64]
    sse: NDArray[np.int64]
    ms_ssim: NDArray[np.float64]
    seconds: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        shape = (len(self.images), len(self.candidates))
        for name in ("bytes", "sse", "ms_ssim", "seconds"):
            values = getattr(self, name)
            if values is not None and values.shape != shape:
                raise ValueError(f"{name} is {values.shape}, not {shape}")
        if self.pixels.shape != shape[:1]:
            raise ValueError(f"pixels is {self.pixels.shape}, not {shape[:1]}")
        if not shape[0] or not (self.bytes >= 0).any(axis=1).all():
            raise ConfigError("nothing to choose from: an image has no candidate")

    def amounts(self, quantity: Quantity) -> NDArray[np.int64]:
        """The n×k integers that are summed for a quantity."""
        if quantity == "bytes":
            return self.bytes
        if quantity == "sse":
            return self.sse
        if quantity == "seconds":
            if self.seconds is None:
                raise ConfigError("the table holds no decoding times")
            return np.ceil(self.seconds * SECONDS_UNITS).astype(np.int64)
        loss = np.rint((1.0 - self.ms_ssim) * MS_SSIM_UNITS).astype(np.int64)
        return loss * self.pixels[:, None]

    def limit(self, quantity: Quantity, value: float) -> int:
        """A limit in the integers of `amounts`.

        Args:
            quantity: what is limited.
            value: bytes; seconds; for `sse` the pooled PSNR in dB and for `ms_ssim` the
                pixel-weighted MS-SSIM that must be reached.
        """
        pixels = int(self.pixels.sum())
        if quantity == "bytes":
            return math.floor(value)
        if quantity == "seconds":
            return math.floor(value * SECONDS_UNITS)
        if quantity == "ms_ssim":
            return math.floor((1 - Fraction(str(value))) * pixels * MS_SSIM_UNITS)
        with localcontext(prec=50):
            mse = 255**2 * Decimal(10) ** (-Decimal(str(value)) / 10)
            return math.floor(mse * 3 * pixels)


METHODS = (
    "unconstrained", "greedy on convex hulls", "dynamic programme", "HiGHS branch and cut",
)  # fmt: skip
"""How an allocation can have been found."""


def relative_gap(objective: int, bound: int) -> float:
    """How far the optimum can be below `objective`; 0 means proven optimal."""
    return (objective - bound) / max(1, objective)


@dataclass(frozen=True)
class Allocation:
    """A choice for every image, its totals and its bound.

    Attributes:
        choice: n indices into the candidates.
        bytes: of the set.
        bpp: bits a pixel of the set.
        psnr: pooled over all values of the set, dB.
        ms_ssim: weighted by pixels.
        objective: what was minimised, in the units of `Table.amounts`.
        bound: no choice within the limits is below this.
        method: how it was found.
    """

    choice: NDArray[np.int64]
    bytes: int
    bpp: float
    psnr: float
    ms_ssim: float
    objective: int
    bound: int
    method: str

    @property
    def gap(self) -> float:
        """How far the optimum can be below, see `relative_gap`."""
        return relative_gap(self.objective, self.bound)


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


def allocate(
    table: Table,
    minimise: Quantity,
    *,
    max_bytes: int | None = None,
    min_psnr: float | None = None,
    min_ms_ssim: float | None = None,
    max_seconds: float | None = None,
) -> Allocation:
    """Choose a candidate for every image.

    CLIC's low-rate track: `minimise="sse"` or `"ms_ssim"` with `max_bytes`; its transparent track:
    `minimise="bytes"` with `min_psnr=40, min_ms_ssim=0.993`.

    Args:
        table: sizes and distortions.
        minimise: the quantity to minimise.
        max_bytes: limit on the sum of sizes.
        min_psnr: minimum PSNR pooled over all values of the set, dB.
        min_ms_ssim: minimum MS-SSIM weighted by pixels.
        max_seconds: limit on the sum of decoding times.

    Raises:
        ConfigError: no choice meets the limits; says by how much and what would help.
    """
    given: dict[Quantity, float | None] = {
        "bytes": max_bytes,
        "sse": min_psnr,
        "ms_ssim": min_ms_ssim,
        "seconds": max_seconds,
    }
    limits = {key: table.limit(key, value) for key, value in given.items() if value is not None}
    weights = {key: table.amounts(key) for key in limits}
    exists = table.bytes >= 0
    for key, limit in limits.items():
        asked = given[key]
        assert asked is not None
        _check_reachable(table, key, weights[key], limit, asked, exists)
    cost = table.amounts(minimise)
    if len(limits) == 1:
        (key,) = limits
        solution = solve_one_limit(cost, weights[key], limits[key], exists)
    else:
        solution = solve_limits(
            cost, list(weights.values()), list(limits.values()), exists, [*limits]
        )
    rows = np.arange(len(table.images))
    size = int(table.bytes[rows, solution.choice].sum())
    pixels = int(table.pixels.sum())
    error = int(table.sse[rows, solution.choice].sum())
    return Allocation(
        choice=solution.choice,
        bytes=size,
        bpp=8 * size / pixels,
        psnr=psnr_from_sse(error, 3 * pixels),
        ms_ssim=float(np.average(table.ms_ssim[rows, solution.choice], weights=table.pixels)),
        objective=solution.cost,
        bound=solution.bound,
        method=solution.method,
    )


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
    worst = _largest_sum(cost, exists), _largest_sum(weight, exists)
    if max(*worst, limit) >= _SUM_MAX:
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
    scale = 1 << max(0, min(40, int(math.log2(_SUM_MAX / (worst[0] + critical * worst[1] + 1)))))
    multiplier = max(1, round(critical * scale))
    if max(worst[0] * scale, multiplier * max(worst[1], limit)) >= 2 * _SUM_MAX:
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
            # Alike sizes and distortions: few states may do as well, but do not prove it.
            beam = beam_max
        else:
            break
    proven = min(total, -(-proven // scale))
    return Solution.checked(choice, proven, method, cost, [weight], [limit], exists)


def solve_limits(
    cost: NDArray[np.int64],
    weights: Sequence[NDArray[np.int64]],
    limits: Sequence[int],
    exists: NDArray[np.bool_] | None = None,
    names: Sequence[Quantity] = (),
    gap: float = 0.0,
    seconds: float = 120.0,
) -> Solution:
    """Least Σ cost with Σ weights[m] ≤ limits[m] for every m, one entry a row, by HiGHS.

    Args:
        cost: n×k.
        weights: n×k each.
        limits: one for each of the weights.
        exists: n×k, False where an entry may not be chosen.
        names: of the limits, for messages.
        gap: relative gap at which the search may end.
        seconds: time limit of the search; the best answer so far is returned with its bound.

    Raises:
        ConfigError: no choice meets all limits, or none was found in time.
    """
    exists = np.ones(cost.shape, bool) if exists is None else exists
    if max(_largest_sum(values, exists) for values in (cost, *weights)) >= _SUM_MAX:
        raise ConfigError("the sums do not fit into 64 bits")
    useful = exists & ~_dominated(np.stack([cost, *weights], 2), exists)
    # HiGHS accepts a row that is violated by its tolerance; then the limits are drawn in as much.
    bound: int | None = None
    for margin in (0.0, 1e-6, 1e-5, 1e-4):
        drawn = [limit - math.ceil(margin * limit) for limit in limits]
        choice, reached, lower = _milp(cost, weights, drawn, useful, gap, seconds)
        if choice is None:
            if bound is None and reached:
                raise ConfigError(_joint_violation(cost, weights, limits, useful, names, seconds))
            break
        # Both are bounds of the true problem only without margin.
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
    # The least of each row is no choice; leaving it out keeps the digits for what is.
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
    names: Sequence[Quantity],
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
            name = _IN_WORDS.get(names[index]) if names else f"limit {index}"
            parts.append(f"{name} would be {least / max(1, limit) - 1:.2%} over")
    return "no choice meets all limits together; with the others met, " + ", ".join(parts)


def _check_reachable(
    table: Table,
    quantity: Quantity,
    weight: NDArray[np.int64],
    limit: int,
    asked: float,
    exists: NDArray[np.bool_],
) -> None:
    """Refuse a limit that even the most favourable choice misses, with what would help.

    `asked` is the limit as it was given, of which `limit` is what whole numbers allow.
    """
    filled = np.where(exists, weight, np.iinfo(np.int64).max)
    best = filled.argmin(1)
    least = int(filled.min(1).sum())
    if least <= limit:
        return
    favourite = table.candidates[int(np.bincount(best).argmax())]
    worst = table.images[int(filled.min(1).argmax())]
    pixels = int(table.pixels.sum())
    if quantity == "bytes":
        reached = f"the smallest files have {least} bytes ({8 * least / pixels:.4f} bpp)"
        wanted = f"{limit} are allowed ({8 * limit / pixels:.4f} bpp), {least - limit} fewer"
        help_ = f"add a candidate coarser than {favourite}"
    elif quantity == "sse":
        have = psnr_from_sse(max(1, least), 3 * pixels)
        reached = f"the best choice reaches {have:.3f} dB pooled PSNR"
        wanted = f"{asked:.3f} dB are asked for, {asked - have:.3f} dB more"
        help_ = f"add a candidate finer than {favourite}; {worst} has the largest error"
    elif quantity == "ms_ssim":
        have = 1 - least / (pixels * MS_SSIM_UNITS)
        reached = f"the best choice reaches an MS-SSIM of {have:.5f}"
        wanted = f"{asked:.5f} is asked for, {asked - have:.5f} more"
        help_ = f"add a candidate finer than {favourite}; {worst} loses most"
    else:
        have = least / SECONDS_UNITS
        reached = f"the fastest choice decodes in {have:.4g} s"
        wanted = f"{asked:.4g} s are allowed, {have - asked:.4g} s fewer"
        help_ = f"add a candidate faster than {favourite}; {worst} takes longest"
    raise ConfigError(f"cannot be met: {reached}, but {wanted}; {help_}")


def _largest_sum(values: NDArray[np.int64], exists: NDArray[np.bool_]) -> int:
    """The most that one entry a row can add up to, in Python's integers, which do not wrap."""
    return sum(np.where(exists, values, 0).max(1).tolist())


@compiled
def _dominated(values, exists):  # type: ignore[no-untyped-def]
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
    keep &= ~_dominated(np.stack([shift, reduced - multiplier * shift], 2), keep)
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
        Whether a choice was found, whether no more than `beam` states came together in any row (if
        so, an even selection of them went on), and the index of the picked entry of each row.
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
    # Without rows to decide, what is left is the base choice.
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
