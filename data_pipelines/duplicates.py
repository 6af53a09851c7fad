"""Near duplicates among many images, by the Hamming distance of their perceptual hashes."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


def near_duplicates(
    digests: Sequence[str], hashes: NDArray[np.uint64], max_bits: int
) -> dict[int, int]:
    """Images to leave out: each is a near duplicate of an earlier one that is kept.

    Args:
        digests: hashes of the files; equal files are always duplicates.
        hashes: 64-bit perceptual hashes, in the order of preference.
        max_bits: hashes that differ in at most so many bits mean the same picture; −1: none do.

    Returns:
        {number of the image to leave out: number of the image that stays for it}.
    """
    same: dict[int, int] = {}
    first: dict[str, int] = {}
    for number, digest in enumerate(digests):
        kept = first.setdefault(digest, number)
        if kept != number:
            same[number] = kept
    if max_bits < 0:
        return same
    rivals: dict[int, list[int]] = {}
    for early, late in _close_pairs(hashes, max_bits):
        rivals.setdefault(late, []).append(early)
    for late in sorted(rivals):
        stays = [early for early in sorted(rivals[late]) if early not in same]
        if late not in same and stays:
            same[late] = stays[0]
    return same


def _close_pairs(hashes: NDArray[np.uint64], max_bits: int) -> set[tuple[int, int]]:
    """All pairs (earlier, later) at most `max_bits` apart.

    Of `max_bits` + 1 bands of the hash at least one is equal in such a pair, so only images that
    share a band are compared.
    """
    values, place, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    pairs = {(int(place[u]), n) for n, u in enumerate(inverse.tolist()) if place[u] != n}
    edges = np.linspace(0, 64, max_bits + 2).astype(int)
    for low, high in pairwise(edges.tolist()):
        mask = np.uint64((1 << high - low) - 1)
        band = (values >> np.uint64(low)) & mask
        order = np.argsort(band, kind="stable")
        bounds = np.flatnonzero(np.diff(band[order], prepend=band[order[:1]] ^ np.uint64(1)))
        for group in np.split(order, bounds[1:]):
            for one in range(len(group) - 1):
                distance = _bit_count(values[group[one]] ^ values[group[one + 1 :]])
                for two in group[one + 1 :][distance <= max_bits]:
                    a, b = int(place[group[one]]), int(place[two])
                    pairs.add((min(a, b), max(a, b)))
    return pairs


def _bit_count(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    return np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1).sum(1, dtype=np.int64)
