"""The rANS coder: lossless, within five bytes of the ideal, and safe on any stream."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_tucodec.coding import kernels
from lightning_tucodec.coding.categorical import CategoricalTables, decode_table
from lightning_tucodec.coding.rans import PRECISION, TOTAL, RansDecoder, encode
from lightning_tucodec.errors import CorruptStreamError


def walk(decoder: RansDecoder, start: np.ndarray, frequency: np.ndarray) -> None:
    """Take symbols whose intervals are known from a stream, checking each."""
    state, position = (int(v) for v in decoder.head)
    for low, width in zip(start.tolist(), frequency.tolist(), strict=True):
        assert low <= state % TOTAL < low + width
        state, position = kernels._advance(state, position, decoder.words, low, width)
    decoder.head[:] = state, position


def ideal_bits(frequency: np.ndarray) -> float:
    return float(np.sum(PRECISION - np.log2(frequency)))


@st.composite
def intervals(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    seed = draw(st.integers(0, 2**32 - 1))
    size = draw(st.integers(0, 300))
    sharpness = draw(st.floats(0, 28))
    rng = np.random.default_rng(seed)
    frequency = np.exp2(rng.uniform(28 - sharpness, 28, size)).astype(np.uint32).clip(1, TOTAL)
    start = (rng.random(size) * (TOTAL - frequency + 1)).astype(np.uint32)
    return start, frequency


@given(intervals())
def test_intervals_come_back(case: tuple[np.ndarray, np.ndarray]) -> None:
    start, frequency = case
    decoder = RansDecoder(encode(start, frequency))
    walk(decoder, start, frequency)
    decoder.finish()


@pytest.mark.parametrize("width", [1, 2, 3, TOTAL // 2, TOTAL - 1, TOTAL])
def test_extreme_widths(width: int) -> None:
    frequency = np.full(1000, width, dtype=np.uint32)
    start = np.full(1000, TOTAL - width, dtype=np.uint32)
    stream = encode(start, frequency)
    decoder = RansDecoder(stream)
    walk(decoder, start, frequency)
    decoder.finish()
    # One symbol over and over may be rounded against each time; in a real mixture it averages out.
    assert 8 * len(stream) - ideal_bits(frequency) < 40 + 0.01 * 1000


def test_overhead_is_below_five_bytes() -> None:
    rng = np.random.default_rng(3)
    for size in (0, 1, 2, 3, 7, 100, 100_000):
        # Symbols drawn from their own probabilities: a fixed random partition of 64 cells.
        edges = np.sort(rng.choice(TOTAL - 1, 63, replace=False) + 1)
        cumulative = np.concatenate([[0], edges, [TOTAL]])
        symbols = np.searchsorted(cumulative, rng.integers(0, TOTAL, size), side="right") - 1
        frequency = (cumulative[symbols + 1] - cumulative[symbols]).astype(np.uint32)
        stream = encode(cumulative[symbols].astype(np.uint32), frequency)
        assert 8 * len(stream) - ideal_bits(frequency) < 40 + 1e-4 * size


def test_certain_symbols_are_free() -> None:
    frequency = np.full(100_000, TOTAL, dtype=np.uint32)
    assert len(encode(np.zeros_like(frequency), frequency)) == 4


@pytest.mark.parametrize(("low", "width"), [(0, 0), (0, TOTAL + 1), (TOTAL, 1), (2**32 - 1, 1)])
def test_impossible_intervals_are_refused(low: int, width: int) -> None:
    with pytest.raises(ValueError, match="interval"):
        encode(np.array([low], dtype=np.uint32), np.array([width], dtype=np.uint32))


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shapes"):
        encode(np.zeros(2, dtype=np.uint32), np.ones(3, dtype=np.uint32))


@pytest.mark.parametrize("stream", [b"", b"\0", b"\xff" * 3, b"\0" * 4, b"\0" * 7, b"\xff" * 2])
def test_streams_without_a_possible_head(stream: bytes) -> None:
    with pytest.raises(CorruptStreamError, match="truncated or damaged"):
        RansDecoder(stream)


def byte_tables() -> CategoricalTables:
    """One channel, 256 equal cells and an escape of one count."""
    cumulative = np.arange(257, dtype=np.uint32) * (TOTAL // 256)
    cumulative = np.append(cumulative, TOTAL).astype(np.uint32)[None]
    cumulative[0, 256] -= 1
    return CategoricalTables(cumulative, np.zeros(1, dtype=np.int32))


@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_bytes_decode_or_are_refused(stream: bytes, n: int) -> None:
    tables = byte_tables()
    try:
        decoder = RansDecoder(stream)
        values = decode_table(decoder, n, tables)
        decoder.finish()
    except CorruptStreamError:
        return
    assert values.shape == (1, n)


def test_running_out_of_words_is_found_and_repeatable() -> None:
    tables = byte_tables()
    decoder = RansDecoder(b"\xaa" * 24)
    for _ in range(3):
        with pytest.raises(CorruptStreamError, match="too early"):
            decode_table(decoder, 1000, tables)


def test_leftover_words_and_wrong_states_are_found() -> None:
    start = np.arange(100, dtype=np.uint32) << 20
    frequency = np.full(100, 1 << 20, dtype=np.uint32)
    stream = encode(start, frequency)
    for taken in (0, 50, 99):
        decoder = RansDecoder(stream)
        walk(decoder, start[:taken], frequency[:taken])
        with pytest.raises(CorruptStreamError, match="does not end"):
            decoder.finish()
    decoder = RansDecoder(stream + b"\0\0\0\0")
    walk(decoder, start, frequency)
    with pytest.raises(CorruptStreamError, match="does not end"):
        decoder.finish()
