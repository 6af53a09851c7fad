"""A fast slice of the campaign on allocation."""

import allocation
import pytest


@pytest.mark.parametrize("start", range(0, 300, 100))
def test_small_instances_equal_brute_force(start: int) -> None:
    assert [seed for seed in range(start, start + 100) if not allocation.check_small(seed)] == []


def test_medium_instances_equal_highs() -> None:
    assert [seed for seed in range(20) if not allocation.check_medium(seed)] == []


def test_two_limits_equal_brute_force() -> None:
    assert [seed for seed in range(20) if not allocation.check_pair(seed)] == []


def test_many_candidates_equal_the_plain_programme() -> None:
    assert [seed for seed in range(8) if not allocation.check_many(seed)] == []
