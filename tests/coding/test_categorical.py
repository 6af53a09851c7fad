"""Table-driven symbols: exact tables, lossless values near and far, safe on any stream."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_tucodec.coding.categorical import (
    CategoricalTables,
    build_cdf,
    decode_table,
    encode_table,
)
from lightning_tucodec.coding.rans import TOTAL, RansDecoder, encode
from lightning_tucodec.errors import CorruptStreamError, ModelFileError


def tables(channels: int = 3, cells: int = 12, seed: int = 0) -> CategoricalTables:
    rng = np.random.default_rng(seed)
    pmf = rng.dirichlet(np.full(cells, 0.3), size=channels)
    return CategoricalTables(build_cdf(pmf), rng.integers(-9, 5, channels).astype(np.int32))


@given(
    st.lists(
        st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-300, 1e300])), min_size=1, max_size=300
    ).filter(lambda pmf: 0 < sum(pmf) < 1e308)
)
def test_tables_are_exact(pmf: list[float]) -> None:
    cumulative = build_cdf(np.array(pmf)).astype(np.int64)
    assert cumulative[0] == 0
    assert cumulative[-1] == TOTAL
    counts = np.diff(cumulative)
    assert counts.min() >= 1
    share = np.array(pmf) / sum(pmf) * (TOTAL - len(pmf))
    assert np.abs(counts - 1 - share).max() <= 1.01


def test_leading_axes_are_kept() -> None:
    pmf = np.random.default_rng(1).random((2, 3, 5))
    cumulative = build_cdf(pmf)
    assert cumulative.shape == (2, 3, 6)
    assert cumulative.dtype == np.uint32
    np.testing.assert_array_equal(cumulative[1, 2], build_cdf(pmf[1, 2]))


@pytest.mark.parametrize("pmf", [[0.0, 0.0], [0.5, -0.1], [np.nan, 1.0], [np.inf, 1.0]])
def test_impossible_distributions_are_refused(pmf: list[float]) -> None:
    with pytest.raises(ValueError, match="probabilities"):
        build_cdf(np.array(pmf))


@given(
    st.integers(0, 20),
    st.integers(0, 2**32 - 1),
    st.sampled_from([3, 30, 3_000, 2**26]),
)
def test_values_come_back(n: int, seed: int, reach: int) -> None:
    model = tables(seed=seed % 7)
    values = np.random.default_rng(seed).integers(-reach, reach, (3, n))
    decoder = RansDecoder(encode(*encode_table(values, model)))
    np.testing.assert_array_equal(decode_table(decoder, n, model), values)
    decoder.finish()


def test_every_value_around_the_table_comes_back() -> None:
    model = CategoricalTables(build_cdf(np.array([[0.7, 0.2, 0.1]])), np.array([-1], np.int32))
    values = np.arange(-300, 300)[None]
    start, frequency = encode_table(values, model)
    assert start.size == 600 + 2 * 598  # −1 and 0 are in the table, the others escape
    decoder = RansDecoder(encode(start, frequency))
    np.testing.assert_array_equal(decode_table(decoder, 600, model), values)
    decoder.finish()


def test_cost_is_that_of_the_distribution() -> None:
    rng = np.random.default_rng(5)
    pmf = np.append(rng.dirichlet(np.ones(30), size=4), np.full((4, 1), 1e-9), axis=1)
    model = CategoricalTables(build_cdf(pmf), np.full(4, -15, dtype=np.int32))
    values = np.stack([rng.choice(30, 20_000, p=row[:-1]) - 15 for row in pmf])
    ideal = -np.log2(np.take_along_axis(pmf, values + 15, axis=1)).sum()
    assert 8 * len(encode(*encode_table(values, model))) == pytest.approx(ideal, abs=48)


@pytest.mark.parametrize("far", [2**27 + 20, -(2**27) - 20, 2**40])
def test_values_too_far_out_are_refused(far: int) -> None:
    with pytest.raises(ValueError, match="too far"):
        encode_table(np.full((3, 1), far), tables())


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="channels"):
        encode_table(np.zeros((2, 4), dtype=np.int32), tables(channels=3))


@pytest.mark.parametrize(
    ("cumulative", "offset"),
    [
        ([[0, TOTAL]], [0, 0]),
        ([[0, 5, 5, TOTAL]], [0]),
        ([[0, 9, 5, TOTAL]], [0]),
        ([[1, 5, TOTAL]], [0]),
        ([[0, 5, TOTAL - 1]], [0]),
        ([0, 5, TOTAL], [0]),
        ([[0, 5, TOTAL]], [2**30]),
    ],
)
def test_damaged_tables_are_refused(cumulative: list[list[int]], offset: list[int]) -> None:
    with pytest.raises(ModelFileError, match="damaged"):
        CategoricalTables(np.array(cumulative, np.uint32), np.array(offset, np.int32))


@given(st.binary(max_size=300), st.integers(0, 200))
def test_any_bytes_decode_or_are_refused(stream: bytes, n: int) -> None:
    # Half of the mass escapes: the longest path through the decoder is the usual one.
    model = CategoricalTables(build_cdf(np.full((2, 2), 0.5)), np.zeros(2, dtype=np.int32))
    try:
        values = decode_table(RansDecoder(stream), n, model)
    except CorruptStreamError:
        return
    assert np.abs(values.astype(np.int64)).max(initial=0) <= 2**27
