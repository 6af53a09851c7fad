"""The data plan: a permutation in every epoch, from any position, for any size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tucodec.io.hashing import hash_positions, permute
from lightning_tucodec.training.input.plan import DataPlan


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@settings(deadline=None)
@given(
    samples=st.integers(1, 2000),
    seed=st.integers(-(2**63), 2**63),
    block=st.integers(1, 300),
    window=st.integers(1, 20),
    epoch=st.integers(0, 10**6),
)
def test_every_epoch_has_every_sample_once(
    samples: int, seed: int, block: int, window: int, epoch: int
) -> None:
    plan = DataPlan(samples, seed, block, window)
    places = np.arange(epoch * samples, (epoch + 1) * samples)
    order = plan.indices(places)
    assert sorted(order.tolist()) == list(range(samples))
    # Any subset of positions, in any order, gives the same answers.
    some = np.random.default_rng(0).permutation(samples)[:50]
    assert plan.indices(places[some]).tolist() == order[some].tolist()


def test_order_depends_on_seed_and_epoch() -> None:
    first = DataPlan(500, 1, 50, 4)
    orders = {
        tuple(first.indices(np.arange(500))),
        tuple(first.indices(np.arange(500, 1000))),
        tuple(DataPlan(500, 2, 50, 4).indices(np.arange(500))),
    }
    assert len(orders) == 3


def test_a_window_reads_few_blocks_and_mixes_them() -> None:
    plan = DataPlan(100_000, 3, block=100, window=10)
    for window in (0, 7, 99):
        blocks = plan.indices(np.arange(window * 1000, (window + 1) * 1000)) // 100
        assert len(set(blocks.tolist())) <= 12  # the incomplete block may shift the others
        assert set(blocks.tolist()) == set(plan.blocks_of_window(window).tolist())
        assert len(set(blocks[:50].tolist())) >= 9


@pytest.mark.parametrize("size", [1000, 1 << 10, 77_777])
def test_permute_looks_random(size: int) -> None:
    """Mean displacement and lag-one correlation lie where those of random permutations do."""
    values = permute(np.arange(size), size, 12345).astype(float)
    assert abs(np.abs(values - np.arange(size)).mean() / size - 1 / 3) < 0.04
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / np.sqrt(size)


def test_augmentation_bits_are_balanced() -> None:
    bits = hash_positions(9, np.arange(100_000))
    for shift in (0, 20, 40, 63):
        share = float((bits >> np.uint64(shift) & np.uint64(1)).mean())
        assert abs(share - 0.5) < 0.01


def test_a_thousand_million_samples_need_no_preparation() -> None:
    plan = DataPlan(10**9, 0)
    found = plan.indices(np.arange(7 * 10**9 + 123, 7 * 10**9 + 187))
    assert len(set(found.tolist())) == 64
    assert found.min() >= 0
    assert found.max() < 10**9
