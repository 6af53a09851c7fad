import dataclasses
import itertools
import math

import numpy as np
import pytest

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.sets.allocation import Table, allocate
from lightning_tucodec.sets.branch_and_cut import solve_limits
from lightning_tucodec.sets.knapsack import solve_one_limit


def table(n: int = 6, k: int = 5, seed: int = 0) -> Table:
    """Photographs of a megapixel coded from 0.3 to 3 bpp."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(500_000, 2_000_000, n)
    bpp = np.geomspace(0.3, 3, k) * np.exp(rng.normal(0, 0.3, (n, 1)))
    size = (bpp * pixels[:, None] / 8).astype(np.int64)
    return Table(
        images=[f"image{i}" for i in range(n)],
        candidates=[f"qp{40 - 4 * j}" for j in range(k)],
        pixels=pixels,
        bytes=size,
        sse=(6 / bpp * pixels[:, None] * 3).astype(np.int64),
        ms_ssim=1 - 0.005 / bpp,
        seconds=size * 1e-6,
    )


def test_a_byte_budget_is_kept_and_the_answer_is_proven() -> None:
    given = table()
    budget = int(given.bytes[:, 2].sum())
    best = allocate(given, "sse", max_bytes=budget)
    assert best.bytes <= budget
    assert best.gap == 0.0
    assert best.objective <= int(given.sse[:, 2].sum())
    rows = np.arange(6)
    error = int(given.sse[rows, best.choice].sum())
    pixels = int(given.pixels.sum())
    assert best.psnr == pytest.approx(10 * math.log10(65025 * 3 * pixels / error))
    assert best.bpp == 8 * best.bytes / pixels


def test_ms_ssim_is_weighted_by_pixels() -> None:
    given = table()
    best = allocate(given, "ms_ssim", max_bytes=int(given.bytes[:, 2].sum()))
    chosen = given.ms_ssim[np.arange(6), best.choice]
    assert best.ms_ssim == pytest.approx((chosen * given.pixels).sum() / given.pixels.sum())
    assert best.ms_ssim >= (given.ms_ssim[:, 2] * given.pixels).sum() / given.pixels.sum()


def test_transparent_track_meets_both_limits() -> None:
    given = table(12, 8)
    best = allocate(given, "bytes", min_psnr=40, min_ms_ssim=0.993)
    assert best.psnr >= 40
    assert best.ms_ssim >= 0.993
    assert best.bound <= best.bytes
    assert best.gap <= 1e-6
    for limits in ({"min_psnr": 40}, {"min_ms_ssim": 0.993}):
        assert allocate(given, "bytes", **limits).bytes <= best.bytes


def test_decoding_time_is_a_limit_like_the_others() -> None:
    given = table()
    free = allocate(given, "sse", max_bytes=int(given.bytes[:, 3].sum()))
    bound = free.bytes * 1e-6 * 0.9
    quick = allocate(given, "sse", max_bytes=int(given.bytes[:, 3].sum()), max_seconds=bound)
    assert given.seconds is not None
    assert given.seconds[np.arange(6), quick.choice].sum() <= bound
    assert quick.psnr < free.psnr


@pytest.mark.parametrize("seed", range(40))
def test_with_a_third_limit_brute_force_finds_nothing_better(seed: int) -> None:
    """Bytes, MS-SSIM and seconds limited at once; HiGHS' answer is added up again in integers."""
    rng = np.random.default_rng(seed)
    given = table(5, 4, seed)
    noise = np.exp(rng.normal(0, 0.5, given.bytes.shape))
    given = dataclasses.replace(given, seconds=given.bytes * noise * 1e-6)
    assert given.seconds is not None
    middle = [int(rng.integers(4)) for _ in range(5)]  # a choice that keeps to the limits
    rows = np.arange(5)
    limits: dict[str, float] = {
        "max_bytes": int(given.bytes[rows, middle].sum()),
        "max_seconds": float(given.seconds[rows, middle].sum()) + 1e-5,
        "min_ms_ssim": float(np.average(given.ms_ssim[rows, middle], weights=given.pixels)) - 1e-9,
    }
    best = allocate(given, "sse", **limits)  # type: ignore[arg-type]
    seconds, losses = given.amounts("seconds"), given.amounts("ms_ssim")
    feasible = [
        int(given.sse[rows, choice].sum())
        for choice in map(list, itertools.product(range(4), repeat=5))
        if given.bytes[rows, choice].sum() <= limits["max_bytes"]
        and seconds[rows, choice].sum() <= given.limit("seconds", limits["max_seconds"])
        and losses[rows, choice].sum() <= given.limit("ms_ssim", limits["min_ms_ssim"])
    ]
    assert best.objective == min(feasible)
    assert best.bound <= best.objective
    assert best.gap < 1e-6


def test_a_cap_on_every_image_is_exact() -> None:
    given = table()
    size = given.bytes.copy()
    size[0, 1], size[1, 1] = given.pixels[0] // 8, given.pixels[1] // 8 + 1  # a byte around 1 bpp
    capped = dataclasses.replace(given, bytes=size).capped(1.0)
    most = (given.pixels // 8)[:, None]
    assert np.array_equal(capped.bytes, np.where(size <= most, size, -1))
    assert capped.bytes[0, 1] > 0 > capped.bytes[1, 1]
    with pytest.raises(ConfigError, match=r"image\d: its smallest file has .* above the 0\.01 "):
        given.capped(0.01)


def test_the_limit_of_40_db_is_exact() -> None:
    one = Table(
        ["a"], ["x"], np.array([10_000]), np.array([[5]]), np.array([[195_075]]), np.ones((1, 1))
    )
    assert one.limit("sse", 40) == 195_075  # 255² · 3 · 10⁴ · 10⁻⁴
    assert allocate(one, "bytes", min_psnr=40).psnr == pytest.approx(40)
    worse = dataclasses.replace(one, sse=one.sse + 1)
    with pytest.raises(ConfigError, match="add a candidate finer than x"):
        allocate(worse, "bytes", min_psnr=40)


def test_the_limit_on_ms_ssim_is_exact_for_fp32_values() -> None:
    value = np.float32(0.993)
    one = Table(
        ["a"], ["x"], np.array([999]), np.array([[5]]), np.array([[1]]), np.full((1, 1), value)
    )
    assert allocate(one, "bytes", min_ms_ssim=float(value)).bytes == 5
    with pytest.raises(ConfigError, match="MS-SSIM"):
        allocate(one, "bytes", min_ms_ssim=float(np.nextafter(value, np.float32(1))))


def test_a_candidate_that_does_not_exist_is_never_chosen() -> None:
    given = table()
    size = given.bytes.copy()
    size[:, 4] = -1
    given = dataclasses.replace(given, bytes=size)
    assert (allocate(given, "sse", max_bytes=10**9).choice == 3).all()
    size[2] = -1
    with pytest.raises(ConfigError, match="no candidate"):
        dataclasses.replace(given, bytes=size)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_bytes": 1000}, r"smallest files have \d+ bytes .* fewer; add a candidate coarser"),
        ({"min_psnr": 70}, r"reaches .* dB pooled PSNR, but 70\.000 dB .* finer than qp24"),
        ({"min_ms_ssim": 0.9999}, r"0\.99990 is asked for, 0\.\d+ more"),
        ({"max_seconds": 0.01}, r"faster than qp40; image\d takes longest"),
    ],
)
def test_infeasible_says_by_how_much_and_what_would_help(
    limits: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        allocate(table(), "bytes", **limits)


def test_a_limit_is_told_as_it_was_given() -> None:
    """Not as what whole numbers of squared error allow: one pixel has 90.17 dB with an error of 3."""
    given = dataclasses.replace(table(), pixels=np.full(len(table().images), 1000))
    with pytest.raises(ConfigError, match=r"but 90\.000 dB are asked for"):
        allocate(given, "bytes", min_psnr=90)


def test_limits_that_exclude_each_other() -> None:
    given = table()
    with pytest.raises(ConfigError, match=r"all limits together.*squared error would be"):
        allocate(given, "ms_ssim", min_psnr=45, max_bytes=int(given.bytes[:, 1].sum()))


def test_nothing_of_highs_reaches_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    allocate(table(40, 10), "bytes", min_psnr=40, min_ms_ssim=0.993)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("cost", "weight", "limit", "best"),
    [
        ([[7]], [[3]], 3, 7),  # one image, one candidate
        ([[5, 4, 3]], [[2, 2, 2]], 2, 3),  # equal bytes
        ([[1, 1], [1, 1]], [[0, 0], [0, 0]], 0, 2),  # zero budget, zero size
        ([[9, 8, 8, 1]], [[1, 5, 6, 9]], 8, 8),  # dominated candidates
        ([[4, 4], [4, 4]], [[1, 2], [3, 4]], 4, 8),  # equal costs
        ([[10, 0]] * 3, [[0, 2]] * 3, 5, 10),  # never fits evenly
    ],
)
def test_degenerate_instances(
    cost: list[list[int]], weight: list[list[int]], limit: int, best: int
) -> None:
    solution = solve_one_limit(np.array(cost), np.array(weight), limit)
    assert solution.cost == best
    assert np.array(weight)[np.arange(len(cost)), solution.choice].sum() <= limit
    assert solve_limits(np.array(cost), [np.array(weight)], [limit]).cost == best


def test_one_byte_less_than_the_least_is_refused() -> None:
    cost, weight = np.array([[1, 2], [3, 4]]), np.array([[5, 4], [7, 6]])
    assert solve_one_limit(cost, weight, 10).cost == 6
    with pytest.raises(ConfigError, match="least sum, 10, is above the limit, 9"):
        solve_one_limit(cost, weight, 9)


def test_sums_beyond_64_bits_are_refused() -> None:
    huge = np.full((4, 2), 1 << 60)
    with pytest.raises(ConfigError, match="64 bits"):
        solve_one_limit(huge, huge, 1 << 60)


def test_states_that_outgrow_the_beam_still_come_with_a_bound() -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(1, 10_000, (40, 6)) * 2
    cost = 20_000 - weight  # the most alike that can be
    limit = int(weight.mean(1).sum()) | 1  # odd, where all sums are even: one byte stays unused
    solution = solve_one_limit(cost, weight, limit, beam_max=500)
    assert solution.bound <= solution.cost <= solution.bound + 1
    greedy = solve_one_limit(cost, weight, limit, beam_max=0)
    assert greedy.bound <= solution.cost <= greedy.cost


def test_many_alike_options_end_with_a_bound() -> None:
    rng = np.random.default_rng(1)
    weight = rng.integers(0, 10**6, (40, 100))
    cost = 10**6 - weight + rng.integers(0, 50, weight.shape)
    solution = solve_one_limit(cost, weight, int(weight.mean(1).sum()))
    assert solution.cost - solution.bound <= 1e-3 * solution.cost


@pytest.mark.parametrize("light", [0, 1])
def test_sums_that_wrap_in_64_bits_are_refused(light: int) -> None:
    huge = np.full((8, 2), 1 << 60)
    with pytest.raises(ConfigError, match="64 bits"):
        solve_one_limit(huge, light * huge, 1 << 60)
    with pytest.raises(ConfigError, match="64 bits"):
        solve_limits(huge, [light * huge], [1 << 60])
