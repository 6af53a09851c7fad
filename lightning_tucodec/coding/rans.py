"""Range asymmetric numeral systems: symbols as integer intervals to bytes and back.

A symbol is an interval [start, start + frequency) of [0, 2^PRECISION). The coder is a stack (Duda,
"Asymmetric numeral systems", arXiv 1311.2540): the encoder takes the whole array and codes it
backwards, so the decoder yields it forwards, a batch at a time and from as many different
models as a stream mixes.

Layout of a stream of n bytes, little-endian:

    head    4 + n mod 4 bytes   the encoder's final state
    words   4 bytes each        in the order in which the decoder takes them

The state lives in [2^31, 2^63). A head has 4 to 7 bytes, as few as hold the state; a state of
2^56 or more sends its low 32 bits to the words first, which the decoder sees by the head lying
below 2^31. The encoder starts at 2^31 and the decoder must end there, with no word left: 31 bits
that check the stream. They are what it costs beyond the information coded: with the rounding to
whole bytes, less than 5 bytes a stream (and, the state being finite, about 2e-5 bit a symbol).
"""

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.coding import kernels
from lightning_tucodec.coding.kernels import PRECISION, STATE_MIN, TOTAL
from lightning_tucodec.errors import CorruptStreamError

__all__ = ["PRECISION", "TOTAL", "RansDecoder", "encode"]

_HEAD_BYTES_MIN = 4
_HEAD_BYTES_MAX = 7
_STATE_MAX = 1 << 63


def encode(start: NDArray[np.uint32], frequency: NDArray[np.uint32]) -> bytes:
    """Code symbols, first to last as the decoder will see them.

    Args:
        start: uint32[N], the lower end of each symbol's interval.
        frequency: uint32[N], its width, at least 1; start + frequency ≤ 2^PRECISION.

    Returns:
        The stream: Σ log2(2^PRECISION / frequency) bits and less than 5 bytes.

    Raises:
        ValueError: an interval is empty or ends beyond 2^PRECISION.
    """
    start = np.ascontiguousarray(start, dtype=np.uint32)
    frequency = np.ascontiguousarray(frequency, dtype=np.uint32)
    if start.ndim != 1 or start.shape != frequency.shape:
        raise ValueError(f"intervals of shapes {start.shape} and {frequency.shape}, not one [N]")
    words = np.empty(start.size, dtype=np.uint32)
    position, state = kernels.encode_words(start, frequency, words)
    if position < 0:
        raise ValueError(f"an interval is empty or ends beyond 2^{PRECISION}")
    body = words[position:].astype("<u4").tobytes()
    if state >> (8 * _HEAD_BYTES_MAX):
        body = (state & kernels.WORD_MASK).to_bytes(4, "little") + body
        state >>= kernels.WORD_BITS
    size = max(_HEAD_BYTES_MIN, -(-state.bit_length() // 8))
    return state.to_bytes(size, "little") + body


class RansDecoder:
    """The resumable decoder of one stream: its unread words and the state, changed in place.

    `laplace.decode_laplace` and `categorical.decode_table` take symbols from it; `finish` says
    whether the stream ended where its encoder began.

    Attributes:
        words: uint32[W + 1], the words of the stream and a sentinel.
        head: int64[2], the state and the index of the next word.
    """

    __slots__ = ("head", "words")

    def __init__(self, stream: bytes) -> None:
        """Read the head of `stream`; CorruptStreamError if no encoder can have written it."""
        size = _HEAD_BYTES_MIN + len(stream) % 4
        state = int.from_bytes(stream[:size], "little")
        body = np.frombuffer(stream[size:], dtype="<u4")
        self.words = np.append(body, 0).astype(np.uint32)
        position = 0
        if state < STATE_MIN and body.size:
            state = state << kernels.WORD_BITS | int(self.words[0])
            position = 1
        if not STATE_MIN <= state < _STATE_MAX:
            raise CorruptStreamError("an entropy-coded segment is truncated or damaged")
        self.head = np.array([state, position], dtype=np.int64)

    def finish(self) -> None:
        """Check that exactly what was encoded has been decoded.

        Raises:
            CorruptStreamError: words are left over or the state is not the encoder's first.
        """
        if self.head[0] != STATE_MIN or self.head[1] != self.words.size - 1:
            raise CorruptStreamError("an entropy-coded segment does not end where it should")
