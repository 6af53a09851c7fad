"""The integer tables of rounded Gaussians beside the exact probabilities."""

import hashlib
import math

import numpy as np
import pytest

from lightning_tucodec.coding import gaussian, kernels, rans
from lightning_tucodec.coding.gaussian import SYMBOL_LIMIT, gaussian_tables, scale_indices
from lightning_tucodec.coding.laplace import decode_laplace, encode_laplace


def index_of(scale):
    """The index of a standard deviation."""
    return scale_indices(np.array([round(scale * 4096)], np.int32), 450)[0]


def frequencies(symbols, scale):
    symbols = np.asarray(symbols, np.int32) + np.int32(SYMBOL_LIMIT)
    index = np.full(symbols.size, index_of(scale), np.int32)
    zeros = np.zeros(symbols.size, np.int32)
    return encode_laplace(symbols, zeros, index, gaussian_tables())[1].astype(float)


def mass(k, scale):
    return 0.5 * (
        math.erfc((abs(k) - 0.5) / scale / math.sqrt(2))
        - math.erfc((abs(k) + 0.5) / scale / math.sqrt(2))
    )


@pytest.mark.parametrize("scale", [0.11, 0.13, 0.3, 0.777, 1, 2.5, 17, 100, 256])
def test_rate_is_that_of_the_exact_gaussian(scale):
    reach = int(7 * scale) + 1
    symbols = range(-reach, reach + 1)
    exact = np.array([mass(k, scale) for k in symbols])
    counts = frequencies(symbols, scale) / kernels.TOTAL
    entropy = -(exact * np.log2(np.maximum(exact, 1e-300))).sum()
    rate = -(exact * np.log2(counts)).sum()
    assert rate - entropy < 5e-5 + 2e-4 * entropy


@pytest.mark.parametrize("scale", [0, 0.11, 1, 300])
def test_cells_fill_the_range(scale):
    every = frequencies(np.arange(-SYMBOL_LIMIT, SYMBOL_LIMIT + 1), scale)
    assert every.min() >= 1
    assert every.sum() == kernels.TOTAL
    np.testing.assert_allclose(every, every[::-1], rtol=1e-4, atol=1.5)


def test_scales_are_found_on_their_grid():
    scales = np.exp(np.linspace(math.log(0.11), math.log(255), 500))
    middle = 2.0**24 / gaussian_tables().inverse_scale
    found = np.array([middle[index_of(scale)] for scale in scales])
    assert np.abs(found / scales - 1).max() < 2**-gaussian.SCALE_BITS
    assert index_of(0) == index_of(0.05) == index_of(0.11)
    assert index_of(400) == index_of(5000) == gaussian.SCALE_COUNT - 1


def test_every_symbol_comes_back():
    rng = np.random.default_rng(0)
    symbols = rng.integers(0, 2 * SYMBOL_LIMIT + 1, 3000).astype(np.int32)
    scale = rng.integers(0, gaussian.SCALE_COUNT, 3000).astype(np.int32)
    zeros = np.zeros_like(symbols)
    decoder = rans.RansDecoder(
        rans.encode(*encode_laplace(symbols, zeros, scale, gaussian_tables()))
    )
    np.testing.assert_array_equal(decode_laplace(decoder, zeros, scale, gaussian_tables()), symbols)
    decoder.finish()


def test_tables_are_frozen():
    """Files depend on them."""
    tables = gaussian_tables()
    steps = np.arange(tables.tail.size) / 64
    exact = [(kernels.TOTAL - 4095) / 2 * math.erfc(t / math.sqrt(2)) for t in steps]
    np.testing.assert_allclose(tables.tail, exact, atol=0.51)
    digest = hashlib.sha256()
    for array in (tables.centres, tables.edges, tables.inverse_scale, tables.tail):
        digest.update(array.astype("<i4").tobytes())
    assert digest.hexdigest()[:16] == "dbbf7a2ff5351e5d"
