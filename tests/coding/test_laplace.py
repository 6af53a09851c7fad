"""Integer Laplace probabilities: a partition always, lossless, and close to the exact masses."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_tucodec.coding.laplace import (
    MU_BITS,
    SCALE_COUNT,
    SCALE_MIN,
    SCALE_STEPS,
    LaplaceTables,
    build_tables,
    decode_laplace,
    encode_laplace,
)
from lightning_tucodec.coding.rans import TOTAL, RansDecoder, encode
from lightning_tucodec.errors import CorruptStreamError, ModelFileError
from lightning_tucodec.nn.priors import MAX_SCALE, MIN_SCALE

GOLDEN = Path(__file__).parents[1] / "golden" / "laplace.rans"
UNIT = np.arange(-100.0, 100.0)
IRREGULAR = np.cumsum(np.random.default_rng(7).uniform(0.3, 1.7, 200)) - 100
ONE_FAR_OUT = np.append(np.arange(50) * 0.01, 9_000.0)
PAIR = np.array([0.0, 2 / (1 << MU_BITS)])
CENTRES = {"unit": UNIT, "irregular": IRREGULAR, "one far out": ONE_FAR_OUT, "pair": PAIR}
TABLES = {name: LaplaceTables(**build_tables(centres)) for name, centres in CENTRES.items()}


def all_intervals(
    tables: LaplaceTables, mu: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """start, frequency [N, M] of every cell under each of N distributions."""
    cells = tables.centres.size
    symbols = np.tile(np.arange(cells), mu.size)
    start, frequency = encode_laplace(
        symbols, np.repeat(mu, cells), np.repeat(scale, cells), tables
    )
    return start.reshape(-1, cells).astype(np.int64), frequency.reshape(-1, cells).astype(np.int64)


def exact_masses(centres: np.ndarray, mu: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64[N, M]: the Laplacian's mass of each Voronoi cell, without cancellation."""
    t = ((centres[1:] + centres[:-1]) / 2 - mu[:, None]) / b[:, None]
    tail = np.exp(-np.abs(t)) / 2
    ends = np.zeros((mu.size, 1)), np.ones((mu.size, 1))
    below = np.hstack([ends[0], np.where(t < 0, tail, 1 - tail), ends[1]])
    above = np.hstack([ends[1], np.where(t < 0, 1 - tail, tail), ends[0]])
    left_of_mean = np.hstack([np.ones((mu.size, 1)), t]) < 0
    return np.where(left_of_mean, np.diff(below), -np.diff(above))


@given(
    st.sampled_from(sorted(TABLES)),
    st.lists(
        st.tuples(
            st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**20), 2**20)),
            st.one_of(st.integers(0, SCALE_COUNT - 1), st.integers(-(2**31), 2**31 - 1)),
        ),
        min_size=1,
        max_size=20,
    ),
)
def test_cells_partition_the_counts(name: str, parameters: list[tuple[int, int]]) -> None:
    mu, scale = np.array(parameters, dtype=np.int32).T
    start, frequency = all_intervals(TABLES[name], mu, scale)
    assert (start[:, 0] == 0).all()
    assert (frequency >= 1).all()
    np.testing.assert_array_equal(start[:, 1:], (start + frequency)[:, :-1])
    assert ((start + frequency)[:, -1] == TOTAL).all()


@given(st.sampled_from(sorted(TABLES)), st.integers(0, 2**32 - 1), st.integers(0, 400))
def test_symbols_come_back(name: str, seed: int, n: int) -> None:
    tables = TABLES[name]
    rng = np.random.default_rng(seed)
    cells = tables.centres.size
    near = rng.choice(tables.centres, n) + rng.integers(-(2**13), 2**13, n)
    mu = np.where(rng.random(n) < 0.1, rng.integers(-(2**31), 2**31, n), near)
    mu = mu.clip(-(2**31), 2**31 - 1).astype(np.int32)
    scale = rng.integers(-3, SCALE_COUNT + 3, n)
    likely = np.searchsorted(tables.edges, mu) + rng.integers(-1, 2, n)
    symbols = np.where(rng.random(n) < 0.2, rng.integers(0, cells, n), likely).clip(0, cells - 1)
    decoder = RansDecoder(encode(*encode_laplace(symbols, mu, scale, tables)))
    # In pieces of any length, as the diagonals of an image come.
    cuts = np.sort(rng.integers(0, n + 1, 5))
    pieces = [
        decode_laplace(decoder, m, s, tables)
        for m, s in zip(np.split(mu, cuts), np.split(scale, cuts), strict=True)
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), symbols)
    decoder.finish()


def test_every_slot_finds_its_cell() -> None:
    """The decoder's search agrees with the encoder's intervals at both ends of every cell."""
    for tables in TABLES.values():
        rng = np.random.default_rng(2)
        cells = tables.centres.size
        mu = np.concatenate(
            [
                rng.choice(tables.edges, 10) + rng.integers(-1, 2, 10),
                rng.integers(tables.edges[0] - 9000, int(tables.edges[-1]) + 9000, 10),
            ]
        )
        scale = rng.integers(0, SCALE_COUNT, 20)
        start, frequency = all_intervals(tables, mu, scale)
        for i in range(20):
            for slots in (start[i], start[i] + frequency[i] - 1):
                for k, slot in enumerate(slots.tolist()):
                    decoder = RansDecoder((TOTAL << 20 | slot).to_bytes(7, "little") + bytes(4))
                    assert decode_laplace(decoder, mu[i : i + 1], scale[i : i + 1], tables) == k
        assert start.shape == (20, cells)


@pytest.mark.parametrize("name", ["unit", "irregular"])
@pytest.mark.parametrize(
    ("low", "high", "bits"),
    [(0.0157, 0.1, 1e-5), (0.1, 0.5, 3e-5), (0.5, 4, 5e-5), (4, 63, 5e-5)],
)
def test_rate_loss(name: str, low: float, high: float, bits: float) -> None:
    """Cross-entropy against entropy, with means, scales and counts all rounded."""
    centres = CENTRES[name]
    rng = np.random.default_rng(11)
    b = np.exp(rng.uniform(np.log(low), np.log(high), 1500))
    mu = rng.uniform(centres[0] - 20, centres[-1] + 20, 1500)
    scale = np.rint(np.log2(b / SCALE_MIN) * SCALE_STEPS).astype(np.int32)
    _, frequency = all_intervals(TABLES[name], np.rint(mu * (1 << MU_BITS)), scale)
    p = exact_masses(centres, mu, b)
    possible = p > 0
    entropy = -np.sum(p[possible] * np.log2(p[possible])) / b.size
    loss = -np.sum(p * np.log2(frequency / TOTAL)) / b.size - entropy
    assert -1e-9 < loss < bits
    assert loss < 1e-4 * entropy


def test_scales_are_those_of_training() -> None:
    assert (SCALE_MIN, SCALE_MIN * 2 ** ((SCALE_COUNT - 1) / SCALE_STEPS)) == (MIN_SCALE, MAX_SCALE)


def test_certain_symbols_cost_nothing() -> None:
    n = 100_000
    zeros = np.zeros(n, dtype=np.int32)
    stream = encode(*encode_laplace(zeros + 100, zeros, zeros, TABLES["unit"]))
    assert len(stream) <= 5


def test_golden_stream() -> None:
    """Model files and streams of today must decode to the same symbols for ever."""
    integers = np.arange(5_000, dtype=np.int64) * 2_654_435_761 % 2**32
    mu = (integers % 400_000 - 200_000).astype(np.int32)
    scale = (integers >> 20) % SCALE_COUNT
    symbols = ((integers >> 7) % 5 - 2 + (mu >> MU_BITS) + 100).clip(0, 199)
    stream = GOLDEN.read_bytes()
    decoder = RansDecoder(stream)
    np.testing.assert_array_equal(decode_laplace(decoder, mu, scale, TABLES["unit"]), symbols)
    decoder.finish()
    assert encode(*encode_laplace(symbols, mu, scale, TABLES["unit"])) == stream


def test_tables_are_integers_that_never_change() -> None:
    digest = hashlib.sha256()
    for name, array in sorted(build_tables(UNIT).items()):
        assert array.dtype == np.int32
        digest.update(name.encode() + array.astype("<i4").tobytes())
    assert digest.hexdigest() == "0c5feeb9addbaddb29c5c1fa3d7815f0908801707c8dc021546a3a15d18ab771"


@given(st.binary(max_size=400), st.integers(0, 500), st.integers(0, 2**32 - 1))
def test_any_bytes_decode_or_are_refused(stream: bytes, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mu = rng.integers(-(2**31), 2**31, n).astype(np.int32)
    scale = rng.integers(-(2**31), 2**31, n).astype(np.int32)
    try:
        symbols = decode_laplace(RansDecoder(stream), mu, scale, TABLES["irregular"])
    except CorruptStreamError:
        return
    assert ((symbols >= 0) & (symbols < 200)).all()


@pytest.mark.parametrize("symbol", [-1, 200])
def test_symbols_that_are_no_centre_are_refused(symbol: int) -> None:
    zero = np.zeros(1, dtype=np.int32)
    with pytest.raises(ValueError, match="outside"):
        encode_laplace(zero + symbol, zero, zero, TABLES["unit"])


def test_shapes_are_checked() -> None:
    zeros = np.zeros(3, dtype=np.int32)
    with pytest.raises(ValueError, match="shapes"):
        encode_laplace(zeros, zeros, zeros[:2], TABLES["unit"])
    with pytest.raises(ValueError, match="shapes"):
        decode_laplace(RansDecoder(b"\0\0\0\x80"), zeros, zeros[:2], TABLES["unit"])


@pytest.mark.parametrize(
    "centres",
    [[0.0], [0.0, 1.0, 1.0], [1.0, 0.0], [0.0, 0.0003], [0.0, np.nan], [0.0, 1e6], [[0.0, 1.0]]],
)
def test_impossible_centres_are_refused(centres: list[float]) -> None:
    with pytest.raises(ValueError, match="centres must"):
        build_tables(np.array(centres))


@pytest.mark.parametrize(
    "damage",
    [
        {"edges": np.zeros(199)},
        {"edges": np.arange(198)},
        {"edges": np.zeros((199, 1))},
        {"inverse_scale": np.zeros(4)},
        {"inverse_scale": np.full(4, 2**31 - 1)},
        {"tail": np.array([TOTAL, 0, 0])},
        {"tail": np.array([5, 9, 0, 0])},
        {"tail": np.array([9, 5, 0])},
        {"tail": np.zeros(0)},
    ],
)
def test_damaged_tables_are_refused(damage: dict[str, np.ndarray]) -> None:
    with pytest.raises(ModelFileError, match="damaged"):
        LaplaceTables(**{**build_tables(UNIT), **damage})
