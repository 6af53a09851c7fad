"""Uniform noise as a function of (seed, position of the sample, stream, element); nothing is stored.

Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3) in integer
operations on tensors. They are exact, so the same bits come out on every device, for any division of a batch,
eager or compiled.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tucodec.io.hashing import MASK_64, derive

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32)
"""Philox's, less 2^32: a 32-bit word times these fits into 64 bits with a sign."""

_BUMPS = (0x9E3779B9, 0xBB67AE85)

_ROUNDS = 7
"""The fewest that pass all of TestU01's BigCrush (ibid., table 2)."""

_NOISE = 0x6E6F69  # separates these random bits from those of order and augmentation

QUANTIZER, RATE, HYPER, ORDER, LEVEL = range(5)
"""Streams: what one sample draws for different purposes is independent."""


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of word · (multiplier + 2^32)."""
    product = word * multiplier
    return (product >> 32) + word, product & _WORD


def philox(
    counter: tuple[Tensor, int | Tensor, Tensor, int | Tensor],
    key: tuple[int, int],
    rounds: int = _ROUNDS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """128 random bits per counter: four words of 32 bits in int64, of the counters' broadcast shape."""
    a, b, c, d = counter
    for turn in range(rounds):
        first, second = ((k + turn * bump) & _WORD for k, bump in zip(key, _BUMPS, strict=True))
        high_a, low_a = _multiply(a, _MULTIPLIERS[0])
        high_c, low_c = _multiply(c, _MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
    assert isinstance(b, Tensor)
    assert isinstance(d, Tensor)
    return a, b, c, d


class Noise(NamedTuple):
    """The noise of a batch of samples.

    Attributes:
        key: two words made of the run's seed.
        positions: global positions of the samples, int64 N, on the device of the noise.
    """

    key: tuple[int, int]
    positions: Tensor

    @classmethod
    def of(cls, seed: int, positions: Tensor) -> "Noise":
        """From a run's seed, any integer."""
        word = derive(seed & MASK_64, _NOISE)
        return cls((word & _WORD, word >> 32), positions)

    def uniform(self, like: Tensor, stream: int) -> Tensor:
        """Multiples of 2^-24 in [0, 1), float32.

        Args:
            like: N×…; the result has its shape.
            stream: which of the independent noises.
        """
        elements = like[0].numel()
        # Masked, because Inductor folds multiples of a bare `arange` into an index, in 32 bits on a CPU.
        blocks = torch.arange(-(-elements // 4), device=like.device) & _WORD
        positions = self.positions[:, None]
        counter = blocks, stream, positions & _WORD, positions >> 32
        bits = torch.stack(torch.broadcast_tensors(*philox(counter, self.key)), -1)
        unit = (bits >> 8).to(torch.float32) * 2.0**-24
        return unit.flatten(1)[:, :elements].reshape(like.shape)


def uniform_like(x: Tensor, noise: Noise | None, stream: int) -> Tensor:
    """U(0, 1) of x's shape, float32: of the samples, or of PyTorch's global generator without `noise`."""
    if noise is None:
        return torch.rand_like(x, dtype=torch.float32)
    return noise.uniform(x, stream)
