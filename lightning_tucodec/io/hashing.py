"""Random numbers as pure functions of a key and a position: the same on every machine, rank and worker."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
MASK_64 = 0xFFFFFFFFFFFFFFFF


def mix(values: NDArray[np.uint64] | int) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64-bit words that leaves no visible pattern.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    x = np.atleast_1d(np.asarray(values, np.uint64))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive(key: int, *words: int) -> int:
    """A 64-bit key that depends on `key` and every word."""
    for word in words:
        key = int(mix((key * _GOLDEN + word + 1) & MASK_64)[0])
    return key


def hash_positions(key: int, positions: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for each position, a function of (key, position)."""
    return mix(mix(positions.astype(np.uint64) + np.uint64(key)) ^ np.uint64(derive(key, 1)))


def permute(
    values: NDArray[np.integer[Any]], size: NDArray[np.uint64] | int, keys: NDArray[np.uint64] | int
) -> NDArray[np.uint64]:
    """A keyed pseudorandom permutation of {0, …, size − 1}, evaluated at `values` alone.

    A Feistel network on the smallest even number of bits that holds `size`, walked again while the
    result lies outside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        values: where to evaluate, each below its `size`.
        size: size of the permuted set, one for all or one a value.
        keys: 64-bit key, one for all or one a value.
    """
    start = values.astype(np.uint64)
    size, keys = np.broadcast_arrays(
        np.asarray(size, np.uint64), np.asarray(keys, np.uint64), start
    )[:2]
    bits = int(size.max(initial=1) - np.uint64(1)).bit_length()
    half = np.uint64(max(1, (bits + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    result = start
    pending = np.arange(len(start))
    while len(pending):
        key = keys[pending]
        x = result[pending]
        left, right = x >> half, x & low
        for turn in range(6):
            noise = mix(right + key + np.uint64((turn + 1) * _GOLDEN & MASK_64))
            left, right = right, left ^ (noise & low)
        x = (left << half) | right
        result[pending] = x
        pending = pending[x >= size[pending]]
    return result
