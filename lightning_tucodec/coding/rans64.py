"""Decoder of CompressAI's entropy-coded strings that never reads beyond them.

The format is ryg's rANS with a 64-bit state in [2^31, 2^63) and 32-bit words (Duda, arXiv 1311.2540),
probabilities of 16 bits; what a table does not hold is escaped: nibbles with the number of nibbles, then the
value. CompressAI's own decoder trusts its input: a string that is too short, or tables that differ from the
encoder's, give noise or end the process. This one raises an error.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.coding.compiling import compiled
from lightning_tucodec.errors import CorruptStreamError, ModelFileError

PRECISION = 16

_STATE_MIN = 1 << 31
_WORDS_OF_STATE = 2
_TABLES_KEPT = 8
_open = threading.local()

_UNFIT = (
    "an entropy-coded segment does not end where its symbols do: it is damaged, or its probabilities come "
    "out differently here than where it was written (another processor, device, PyTorch or number of threads)"
)


@compiled
def _decode(words, head, indexes, cumulative, lengths, offsets, values):  # type: ignore[no-untyped-def]
    """Decode a symbol for each index; returns their number, or −1 − i if symbol i is invalid."""
    state, position = head[0], head[1]
    lowest, low_bits = np.uint64(1 << 31), np.uint64(0xFFFF)
    for i in range(len(indexes)):
        table = indexes[i]
        if table < 0 or table >= len(lengths):
            return -1 - i
        escape = lengths[table] - 2
        slot = np.int64(state & low_bits)
        low, high = 0, lengths[table] - 1
        while high - low > 1:
            middle = (low + high) // 2
            if cumulative[table, middle] > slot:
                high = middle
            else:
                low = middle
        start = cumulative[table, low]
        width = cumulative[table, low + 1] - start
        state = np.uint64(width) * (state >> np.uint64(16)) + np.uint64(slot - start)
        if state < lowest:
            if position >= len(words):
                return -1 - i
            state = (state << np.uint64(32)) | words[position]
            position += np.uint64(1)
        value = np.int64(low)
        if value == escape:
            count, read, raw = np.int64(-1), np.int64(0), np.int64(0)
            while count < 0 or read < count:
                nibble = np.int64(state & np.uint64(15))
                state = state >> np.uint64(4)
                if state < lowest:
                    if position >= len(words):
                        return -1 - i
                    state = (state << np.uint64(32)) | words[position]
                    position += np.uint64(1)
                if count < 0:
                    count = nibble
                    if count > 8:  # a 32-bit value has at most eight
                        return -1 - i
                else:
                    raw |= nibble << (np.int64(4) * read)
                    read += 1
            value = raw >> 1
            value = -value - 1 if raw & 1 else value + escape
        values[i] = value + offsets[table]
    head[0], head[1] = state, position
    return len(indexes)


def check_tables(
    cumulative: NDArray[np.int32], lengths: NDArray[np.int32], offsets: NDArray[np.int32]
) -> None:
    """Refuse tables that no encoder and no decoder could use.

    Args:
        cumulative: T×L, each row rising from 0 to 2^16 in its first `lengths[t]` entries.
        lengths: T, each from 3 to L: one symbol alone would have a probability that 16 bits do not hold.
        offsets: T, values of the first symbols.

    Raises:
        ModelFileError: says what is wrong.
    """
    if (
        cumulative.ndim != 2
        or lengths.shape != (len(cumulative),)
        or offsets.shape != lengths.shape
    ):
        raise ModelFileError("its tables of probabilities differ in number")
    inside = np.arange(cumulative.shape[1]) < lengths[:, None]
    steps = np.diff(cumulative.astype(np.int64), axis=1)
    if (
        not len(lengths)
        or not ((lengths >= 3) & (lengths <= cumulative.shape[1])).all()
        or cumulative[:, 0].any()
        or (cumulative[np.arange(len(lengths)), lengths - 1] != 1 << PRECISION).any()
        or (steps[inside[:, 1:]] <= 0).any()
        or (np.abs(offsets.astype(np.int64)) > 1 << 24).any()
    ):
        raise ModelFileError("its tables of probabilities are none")


_Tables = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]


class Rans64Decoder:
    """A replacement for `compressai.ans.RansDecoder`, with the same three methods.

    Between `set_stream` and the end of `all_read` it remembers a stream and its unread rest.
    """

    # Lists by their identity: a raster network hands in the same ones for every position.
    _tables: "OrderedDict[int, tuple[object, _Tables]]"

    def __init__(self) -> None:
        self._tables = OrderedDict()

    def set_stream(self, stream: bytes) -> None:
        """Begin with a string.

        Raises:
            CorruptStreamError: it cannot have been written by the encoder.
        """
        if len(stream) < 4 * _WORDS_OF_STATE or len(stream) % 4:
            raise CorruptStreamError("an entropy-coded segment is truncated or damaged")
        words = np.frombuffer(stream, "<u4").astype(np.uint64)
        state = int(words[0]) | int(words[1]) << 32
        if not _STATE_MIN <= state < 1 << 63:
            raise CorruptStreamError("an entropy-coded segment is damaged")
        self._words = words
        self._head = np.array([state, _WORDS_OF_STATE], np.uint64)
        if (streams := getattr(_open, "streams", None)) is not None:
            streams.append(self)

    @property
    def finished(self) -> bool:
        """Whether the stream has been read to its end, in the state that its encoder began in."""
        return int(self._head[0]) == _STATE_MIN and int(self._head[1]) == len(self._words)

    def decode_stream(
        self,
        indexes: Sequence[int],
        cdfs: Sequence[Sequence[int]],
        cdfs_sizes: Sequence[int],
        offsets: Sequence[int],
    ) -> list[int]:
        """The next symbols.

        Args:
            indexes: table of each symbol.
            cdfs, cdfs_sizes, offsets: see `check_tables`.

        Raises:
            CorruptStreamError: the stream ends before they do.
        """
        values = np.empty(len(indexes), np.int32)
        tables = self._arrays(cdfs, cdfs_sizes, offsets)
        wanted = np.asarray(indexes, np.int32)
        if _decode(self._words, self._head, wanted, *tables, values) < 0:
            raise CorruptStreamError(_UNFIT)
        decoded: list[int] = values.tolist()
        return decoded

    def decode_with_indexes(
        self,
        encoded: bytes,
        indexes: Sequence[int],
        cdfs: Sequence[Sequence[int]],
        cdfs_sizes: Sequence[int],
        offsets: Sequence[int],
    ) -> list[int]:
        """All symbols of a string; otherwise as `decode_stream`.

        Raises:
            CorruptStreamError: the string does not end with them.
        """
        own = Rans64Decoder()  # the network's own object is shared by all threads
        own.set_stream(encoded)
        values = own.decode_stream(indexes, cdfs, cdfs_sizes, offsets)
        _check_finished(own)
        return values

    def _arrays(
        self, cdfs: Sequence[Sequence[int]], sizes: Sequence[int], offsets: Sequence[int]
    ) -> _Tables:
        held = self._tables.get(id(cdfs))
        if held is None:
            width = max(map(len, cdfs), default=0)
            rows = [row if len(row) == width else [*row, *[0] * (width - len(row))] for row in cdfs]
            cumulative = np.array(rows, np.int32).reshape(len(rows), width)
            tables = cumulative, np.array(sizes, np.int32), np.array(offsets, np.int32)
            check_tables(*tables)
            held = self._tables[id(cdfs)] = cdfs, tables
            if len(self._tables) > _TABLES_KEPT:
                self._tables.popitem(last=False)
        return held[1]


def _check_finished(decoder: Rans64Decoder) -> None:
    if not decoder.finished:
        raise CorruptStreamError(_UNFIT)


@contextlib.contextmanager
def all_read() -> Iterator[None]:
    """Every stream that is set in this context, in this thread, must be read to its end.

    Raises:
        CorruptStreamError: one is not.
    """
    before, _open.streams = getattr(_open, "streams", None), []
    try:
        yield
        for decoder in _open.streams:
            _check_finished(decoder)
    finally:
        _open.streams = before
