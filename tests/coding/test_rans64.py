"""The decoder of CompressAI's strings: the same symbols as theirs, and never a byte too many."""

import contextlib

import numpy as np
import pytest
from compressai.ans import BufferedRansEncoder, RansDecoder, RansEncoder
from hypothesis import given
from hypothesis import strategies as st

from lightning_tucodec.coding.rans64 import Rans64Decoder, all_read, check_tables
from lightning_tucodec.errors import CorruptStreamError, ModelFileError

TOTAL = 1 << 16


def tables(rng: np.random.Generator, count: int) -> tuple[list[list[int]], list[int], list[int]]:
    """Random tables of equal length as CompressAI pads them, their sizes and offsets."""
    sizes = [int(n) for n in rng.integers(3, 20, count)]
    rows = []
    for size in sizes:
        inner = np.sort(rng.choice(np.arange(1, TOTAL), size - 2, replace=False)).tolist()
        rows.append([0, *inner, TOTAL, *[0] * (20 - size)])
    return rows, sizes, [int(n) for n in rng.integers(-9, 9, count)]


def drawn(
    seed: int, count: int = 300
) -> tuple[list[int], list[int], list[list[int]], list[int], list[int]]:
    """Symbols, some of them far outside of their table, and what codes them."""
    rng = np.random.default_rng(seed)
    rows, sizes, offsets = tables(rng, 5)
    indexes = rng.integers(0, 5, count).tolist()
    spread = rng.choice([1, 8, 3000, 10**6], count, p=[0.4, 0.4, 0.15, 0.05])
    return (rng.normal(size=count) * spread).astype(int).tolist(), indexes, rows, sizes, offsets


@given(st.integers(0, 1 << 30))
def test_the_symbols_are_theirs(seed: int) -> None:
    symbols, *rest = drawn(seed)
    string = RansEncoder().encode_with_indexes(symbols, *rest)
    assert Rans64Decoder().decode_with_indexes(string, *rest) == symbols
    assert RansDecoder().decode_with_indexes(string, *rest) == symbols


@given(st.integers(0, 1 << 30), st.integers(1, 50))
def test_a_stream_is_read_in_parts(seed: int, step: int) -> None:
    symbols, indexes, *rest = drawn(seed)
    encoder = BufferedRansEncoder()
    encoder.encode_with_indexes(symbols, indexes, *rest)
    decoder, found = Rans64Decoder(), []
    with all_read():
        decoder.set_stream(encoder.flush())
        for start in range(0, len(symbols), step):
            found += decoder.decode_stream(indexes[start : start + step], *rest)
    assert found == symbols


@given(st.integers(0, 1 << 30), st.data())
def test_another_length_is_an_error(seed: int, data: st.DataObject) -> None:
    symbols, *rest = drawn(seed, 60)
    string = RansEncoder().encode_with_indexes(symbols, *rest)
    damaged = data.draw(
        st.one_of(
            st.integers(0, len(string) - 1).map(lambda end: string[:end]),
            st.binary(min_size=1, max_size=9).map(lambda more: string + more),
        )
    )
    with pytest.raises(CorruptStreamError):
        Rans64Decoder().decode_with_indexes(damaged, *rest)


@given(st.integers(0, 1 << 30), st.binary(max_size=400))
def test_any_bytes_end(seed: int, string: bytes) -> None:
    _, *rest = drawn(seed, 60)
    with contextlib.suppress(CorruptStreamError):
        assert len(Rans64Decoder().decode_with_indexes(string, *rest)) == 60


def test_more_symbols_than_were_written() -> None:
    symbols, indexes, *rest = drawn(1)
    string = RansEncoder().encode_with_indexes(symbols, indexes, *rest)
    with pytest.raises(CorruptStreamError, match="another processor"):
        Rans64Decoder().decode_with_indexes(string, indexes * 50, *rest)
    with pytest.raises(CorruptStreamError, match="another processor"):
        Rans64Decoder().decode_with_indexes(string, indexes[:-1], *rest)
    decoder = Rans64Decoder()
    with pytest.raises(CorruptStreamError, match="another processor"), all_read():  # noqa: PT012
        decoder.set_stream(string)
        decoder.decode_stream(indexes[:-1], *rest)


@pytest.mark.parametrize(
    ("row", "size", "offset"),
    [
        ([0, 9, 9, TOTAL], 4, 0), ([0, 9, 5, TOTAL], 4, 0), ([1, 9, 10, TOTAL], 4, 0),
        ([0, 9, 10, TOTAL - 1], 4, 0), ([0, 9, 10, TOTAL], 5, 0), ([0, TOTAL, 0, 0], 2, 0),
        ([0, 9, 10, TOTAL], -1, 0), ([0, 9, 10, TOTAL], 4, 1 << 30),
    ],
)  # fmt: skip
def test_tables_that_are_none(row: list[int], size: int, offset: int) -> None:
    sound = np.array([[0, 9, 10, TOTAL]], np.int32), np.array([4]), np.array([0])
    check_tables(*sound)
    with pytest.raises(ModelFileError):
        check_tables(np.array([row], np.int32), np.array([size]), np.array([offset]))
    with pytest.raises(ModelFileError):
        check_tables(sound[0], np.array([4, 4]), np.array([0, 0]))
    with pytest.raises(ModelFileError):
        check_tables(sound[0][0], *sound[1:])
