"""The compiled loops of the entropy coder. Signed 64-bit integers throughout; no floating point.

All of them stand in this one file because numba's disk cache watches only the file that a
function is defined in: a kernel that inlined a helper from elsewhere would go on running the
helper's old code after an update. The typed interfaces are in `rans`, `laplace` and
`categorical`; the functions here trust their arguments, except that no stream, however hostile,
makes one read or write outside an array.

A decoder's state is `head = int64[2]`: the rANS state and the index of the next unread word.
Its `words` end with a sentinel, which a sound stream never uses up.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Ints = NDArray[Any]
Int = Any  # an int or an np.int64: to numba the same

# Every probability is a whole number of counts out of 2^28. At 28 bits the one-count floor of 200
# symbols costs 1e-6 bit a symbol, and the finite state of the coder (at least 2^31) about 2e-5.
PRECISION = 28
TOTAL = 1 << PRECISION

STATE_MIN = 1 << 31  # the state lives in [2^31, 2^63): words of 32 bits move in and out
WORD_BITS = 32
WORD_MASK = (1 << WORD_BITS) - 1

# The Laplace tail is tabulated every 1/64 of the scale and interpolated with 12 more bits.
TAIL_STEP_BITS = 6
TAIL_FRACTION_BITS = 12
# Bits dropped after multiplying a distance by the inverse scale: 2^32 · 2^30 stays below 2^63.
INVERSE_SCALE_SHIFT = 18

# An escaped value is coded as its bit length (uniform over 32) and the bits below the leading one.
ESCAPE_LENGTH_BITS = 5
ESCAPE_MAX_LENGTH = PRECISION


def compiled(function: Callable[..., Any]) -> Any:
    """`numba.njit` without the global lock, cached on disk where there is a place for it."""
    try:
        return njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return njit(nogil=True, error_model="numpy")(function)


@compiled
def encode_words(start: Ints, frequency: Ints, words: Ints) -> tuple[Int, Int]:
    """Code all intervals, last one first, filling `words` from its end.

    Returns (index of the first word written, final state); the index is −1 where an interval is
    empty or ends beyond 2^PRECISION.
    """
    state = np.int64(STATE_MIN)
    position = words.size
    for i in range(start.size - 1, -1, -1):
        low = np.int64(start[i])
        width = np.int64(frequency[i])
        if width < 1 or low + width > TOTAL:
            return -1, state
        if (state >> (63 - PRECISION)) >= width:
            position -= 1
            words[position] = state & WORD_MASK
            state >>= WORD_BITS
        quotient = np.int64(np.uint64(state) // np.uint64(width))
        state = (quotient << PRECISION) + (state - quotient * width) + low
    return position, state


@compiled
def _advance(state: Int, position: Int, words: Ints, low: Int, width: Int) -> tuple[Int, Int]:
    """Remove the interval [low, low + width) from the state.

    The last word is a sentinel: the stream has run out when the position has passed it.
    """
    # One path, for the reason given in _laplace_cumulative.
    state = width * (state >> PRECISION) + (state & (TOTAL - 1)) - low
    word = np.int64(words[position])
    refill = state < STATE_MIN
    return (state << WORD_BITS) | word if refill else state, position + refill


@compiled
def _laplace_cumulative(k: Int, mean: Int, inverse_scale: Int, edges: Ints, tail: Ints) -> Int:
    """C(k) = k + the Laplace distribution function at cell k's lower edge, in counts."""
    # Written without early returns: branches around `tail` make numba count references to it,
    # atomically and at every symbol, which takes longer than all of the arithmetic.
    cells = edges.size + 1
    distance = np.int64(edges[min(max(k, 1), cells - 1) - 1]) - mean
    end = ((tail.size - 1) << TAIL_FRACTION_BITS) - 1
    scaled = min((abs(distance) * inverse_scale) >> INVERSE_SCALE_SHIFT, end)
    step = scaled >> TAIL_FRACTION_BITS
    fraction = scaled & ((1 << TAIL_FRACTION_BITS) - 1)
    here = np.int64(tail[step])
    beyond = here - (((here - np.int64(tail[step + 1])) * fraction) >> TAIL_FRACTION_BITS)
    value = k + (beyond if distance < 0 else TOTAL - cells - beyond)
    value = 0 if k <= 0 else value
    return TOTAL if k >= cells else value


@compiled
def laplace_intervals(
    symbols: Ints,
    mean: Ints,
    scale: Ints,
    edges: Ints,
    inverse_scale: Ints,
    tail: Ints,
    start: Ints,
    frequency: Ints,
) -> bool:
    """Write each symbol's interval; returns False where a symbol is no cell."""
    cells = edges.size + 1
    last_scale = inverse_scale.size - 1
    for i in range(symbols.size):
        k = np.int64(symbols[i])
        if k < 0 or k >= cells:
            return False
        inverse = np.int64(inverse_scale[min(max(scale[i], 0), last_scale)])
        low = _laplace_cumulative(k, np.int64(mean[i]), inverse, edges, tail)
        high = _laplace_cumulative(k + 1, np.int64(mean[i]), inverse, edges, tail)
        start[i] = low
        frequency[i] = high - low
    return True


@compiled
def laplace_decode(
    words: Ints,
    head: Ints,
    mean: Ints,
    scale: Ints,
    edges: Ints,
    inverse_scale: Ints,
    tail: Ints,
    bins: Ints,
    bin_shift: int,
    out: Ints,
) -> bool:
    """Decode `out.size` symbols; returns False when the words ran out."""
    cells = edges.size + 1
    first_edge = np.int64(edges[0])
    last_edge = np.int64(edges[cells - 2])
    last_scale = inverse_scale.size - 1
    state = head[0]
    position = head[1]
    for i in range(out.size):
        slot = state & (TOTAL - 1)
        centre = np.int64(mean[i])
        inverse = np.int64(inverse_scale[min(max(scale[i], 0), last_scale)])

        # The cell of the mean holds most of the mass: look there first.
        if centre < first_edge:
            left: Int = np.int64(0)
        elif centre >= last_edge:
            left = np.int64(cells - 1)
        else:
            left = np.int64(bins[(centre - first_edge) >> bin_shift])
            while edges[left] <= centre:
                left += 1
        right = left + 1
        low = _laplace_cumulative(left, centre, inverse, edges, tail)
        high = _laplace_cumulative(right, centre, inverse, edges, tail)

        # Else gallop away from it (C(0) = 0 and C(cells) = 2^PRECISION end the search) ...
        stride: Int = np.int64(1)
        while slot < low:
            right = left
            high = low
            left = max(left - stride, 0)
            low = _laplace_cumulative(left, centre, inverse, edges, tail)
            stride *= 2
        while slot >= high:
            left = right
            low = high
            right = min(right + stride, cells)
            high = _laplace_cumulative(right, centre, inverse, edges, tail)
            stride *= 2
        # ... and halve the last stride.
        while right - left > 1:
            middle = (left + right) >> 1
            value = _laplace_cumulative(middle, centre, inverse, edges, tail)
            if slot < value:
                right = middle
                high = value
            else:
                left = middle
                low = value

        out[i] = left
        state, position = _advance(state, position, words, low, high - low)
        if position == words.size:
            return False
    head[0] = state
    head[1] = position
    return True


@compiled
def table_intervals(
    values: Ints, cumulative: Ints, offset: Ints, start: Ints, frequency: Ints
) -> int:
    """Write the intervals of values[channels, n]; returns their number, −1: a value is too far."""
    channels, n = values.shape
    escape = cumulative.shape[1] - 2
    written = 0
    for c in range(channels):
        for i in range(n):
            index = np.int64(values[c, i]) - np.int64(offset[c])
            inside = 0 <= index < escape
            k = index if inside else escape
            start[written] = cumulative[c, k]
            frequency[written] = cumulative[c, k + 1] - cumulative[c, k]
            written += 1
            if inside:
                continue
            # Distances beyond the two ends interleave: 1, 3, 5, … above and 2, 4, 6, … below.
            rank = 2 * (index - escape) + 1 if index >= escape else -2 * index
            length = np.int64(0)
            while rank >> (length + 1):
                length += 1
            if length >= ESCAPE_MAX_LENGTH:
                return -1
            start[written] = length << (PRECISION - ESCAPE_LENGTH_BITS)
            frequency[written] = 1 << (PRECISION - ESCAPE_LENGTH_BITS)
            start[written + 1] = (rank - (1 << length)) << (PRECISION - length)
            frequency[written + 1] = 1 << (PRECISION - length)
            written += 2
    return written


@compiled
def table_decode(words: Ints, head: Ints, cumulative: Ints, offset: Ints, out: Ints) -> bool:
    """Decode out[channels, n]; returns False when the words ran out or an escape is impossible."""
    channels, n = out.shape
    escape = cumulative.shape[1] - 2
    state = head[0]
    position = head[1]
    for c in range(channels):
        row = cumulative[c]
        for i in range(n):
            slot = state & (TOTAL - 1)
            left = 0
            right = escape + 1
            while right - left > 1:
                middle = (left + right) >> 1
                if slot < row[middle]:
                    right = middle
                else:
                    left = middle
            low = np.int64(row[left])
            state, position = _advance(state, position, words, low, np.int64(row[right]) - low)
            if position == words.size:
                return False
            index = np.int64(left)
            if left == escape:
                length = (state & (TOTAL - 1)) >> (PRECISION - ESCAPE_LENGTH_BITS)
                if length >= ESCAPE_MAX_LENGTH:
                    return False
                width = np.int64(1) << (PRECISION - ESCAPE_LENGTH_BITS)
                state, position = _advance(state, position, words, length * width, width)
                if position == words.size:
                    return False
                width = np.int64(1) << (PRECISION - length)
                bits = (state & (TOTAL - 1)) >> (PRECISION - length)
                state, position = _advance(state, position, words, bits * width, width)
                if position == words.size:
                    return False
                rank = (np.int64(1) << length) + bits
                index = escape + (rank >> 1) if rank & 1 else -(rank >> 1)
            out[c, i] = index + np.int64(offset[c])
    head[0] = state
    head[1] = position
    return True
