"""The compiled loops of the entropy coder: integers throughout, some of them carried in float64.

One file because numba's disk cache watches only the file that a function is defined in: a kernel
that inlined a helper from elsewhere would go on running the helper's old code after an update.
The typed interfaces are in `rans`, `laplace` and `categorical`, that of `decode_strip` in
`fixed_point` and `wavefront`. The functions here trust their arguments, except that no stream,
however hostile, makes one read or write outside an array.

A decoder's state is `head = int64[2]`: the rANS state and the index of the next unread word.
Its `words` end with a sentinel, which a sound stream never uses up.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.coding.compiling import compiled

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
    """Write each symbol's interval; returns False if a symbol is not a cell's index."""
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


# The context model and the entropy parameters, one diagonal of a strip at a time. Rows of
# `Network.layers` in this order; those of a level repeat from LEVELS on, LEVEL_LAYERS each.
VERTICAL_INPUT, HORIZONTAL_INPUT, OUT, UPSILON, HIDDEN, MU, SCALE, LEVELS = range(8)
VERTICAL, HORIZONTAL, SHORTCUT, POINT, LEVEL_LAYERS = 0, 2, 4, 5, 7

ACTIVATION_LIMIT = (1 << 20) - 1  # also exact in float32, in which the planes are held
SLOPE = 3  # positions with equal j + SLOPE·i make a diagonal
REACH = 2  # a tap lies at most so many rows above and so many columns to either side
BLOCK = 8  # rows of a weight matrix that are added in one pass over the sums
GATE_STEP_BITS = 3  # the sigmoid's argument is looked up in steps of 2^3
GATE_BITS = 16  # fractional bits of the sigmoid's values


class Network(NamedTuple):
    """The layers that run at every diagonal, in flat arrays.

    Attributes:
        weights: int16, all matrices [in, out], row by row.
        biases: float64, all biases with their rounding offsets.
        layers: int64[L, 7], for every layer: where its weights begin, in, out, where its bias
            begins, shift, where its taps begin, their number (0: it reads one point).
        taps: int64[T, 2], (Δi, Δj).
        sigmoid: float64[G], values of the gates.
        levels: pairs of vertical and horizontal blocks.
        points: whether a 1×1 block follows each pair.
    """

    weights: Ints
    biases: Ints
    layers: Ints
    taps: Ints
    sigmoid: Ints
    levels: int
    points: bool


class Tables(NamedTuple):
    """What `laplace_decode` needs of a model, and the centres."""

    centres: Ints
    edges: Ints
    inverse_scale: Ints
    tail: Ints
    bins: Ints
    bin_shift: int


class _Points(NamedTuple):
    """Positions (i, d − SLOPE·i), top ≤ i < bottom."""

    d: int
    top: int
    bottom: int


class _Work(NamedTuple):
    """Scratch: inputs of a layer, a block of its weights, and results."""

    inputs: Ints
    block: Ints
    result: Ints


@compiled
def _multiply(network: Network, layer: int, n: int, work: _Work, sums: Ints) -> None:
    """Add inputs · W to the sums of n points."""
    start, rows, columns = network.layers[layer, :3]
    inputs, block = work.inputs, work.block
    a, b, c, d = block[0], block[1], block[2], block[3]
    e, f, g, h = block[4], block[5], block[6], block[7]
    for k in range(0, rows, BLOCK):
        # The weights become float64 here, in the L1 cache, once for all points. Stored as int16 they
        # need a quarter of the memory traffic, which limits the speed on short diagonals.
        for row in range(BLOCK):
            target = block[row]
            if k + row < rows:
                first = start + (k + row) * columns
                source = network.weights[first : first + columns]
                for j in range(columns):
                    target[j] = source[j]
            else:
                target[:columns] = 0
        for p in range(n):
            x = inputs[p, k : k + BLOCK]
            out = sums[p, :columns]
            x0, x1, x2, x3, x4, x5, x6, x7 = x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
            for j in range(out.size):
                out[j] += (
                    x0 * a[j] + x1 * b[j] + x2 * c[j] + x3 * d[j]
                    + x4 * e[j] + x5 * f[j] + x6 * g[j] + x7 * h[j]
                )  # fmt: skip


@compiled
def _finish(network: Network, layer: int, n: int, sums: Ints) -> None:
    """Shift, round and clamp the sums of n points."""
    columns = network.layers[layer, 2]
    scale = 0.5 ** network.layers[layer, 4]
    for p in range(n):
        for j in range(columns):
            value = np.floor(sums[p, j] * scale)
            sums[p, j] = min(max(value, -ACTIVATION_LIMIT), ACTIVATION_LIMIT)


@compiled
def _affine(network: Network, layer: int, n: int, work: _Work, out: Ints) -> None:
    """An affine layer over the inputs of n points."""
    columns, start = network.layers[layer, 2], network.layers[layer, 3]
    for p in range(n):
        out[p, :columns] = network.biases[start : start + columns]
    _multiply(network, layer, n, work, out)
    _finish(network, layer, n, out)


@compiled
def _leaky(x: Any) -> Any:
    return max(x, np.floor(x * 0.125))


@compiled
def _gather(network: Network, layer: int, plane: Ints, points: _Points, work: _Work) -> None:
    """The activations at all taps around every point become the layer's inputs."""
    first, count = network.layers[layer, 5], network.layers[layer, 6]
    channels = plane.shape[2]
    for i in range(points.top, points.bottom):
        row = work.inputs[i - points.top]
        for t in range(count):
            di, dj = network.taps[first + t]
            source = plane[i + di + REACH, points.d - SLOPE * i + dj + REACH]
            target = row[t * channels : (t + 1) * channels]
            for c in range(channels):
                target[c] = source[c]


@compiled
def _convolve(
    network: Network, layer: int, x: Ints, plane: Ints, points: _Points, work: _Work, out: Ints
) -> None:
    """A layer over φ(x) of the points and, where it has taps, of earlier ones in `plane`."""
    n = points.bottom - points.top
    channels = plane.shape[2]
    if network.layers[layer, 6] == 0:
        for p in range(n):
            for c in range(channels):
                work.inputs[p, c] = _leaky(x[p, c])
    else:
        for p in range(n):
            i = points.top + p
            here = plane[i + REACH, points.d - SLOPE * i + REACH]
            for c in range(channels):
                here[c] = _leaky(x[p, c])
        _gather(network, layer, plane, points, work)
    _affine(network, layer, n, work, out)


@compiled
def _gated(
    network: Network,
    layer: int,
    x: Ints,
    shortcut: Ints,
    shortcut_layer: int,
    hidden: Ints,
    planes: Ints,
    points: _Points,
    work: _Work,
) -> None:
    """`nn.context.GatedBlock` in integers, in place; shortcut_layer < 0: it has none."""
    n = points.bottom - points.top
    channels = planes.shape[3]
    _convolve(network, layer, x, planes[0], points, work, hidden)
    if shortcut_layer >= 0:
        _convolve(network, shortcut_layer, shortcut, planes[0], points, work, work.result)
        _add(hidden, work.result, n, channels)
    _convolve(network, layer + 1, hidden, planes[1], points, work, work.result)
    half = network.sigmoid.size // 2
    for p in range(n):
        for c in range(channels):
            step = np.floor(work.result[p, channels + c] * 0.5**GATE_STEP_BITS)
            gate = network.sigmoid[np.int64(min(max(step, -half), half - 1)) + half]
            work.result[p, c] = np.floor(work.result[p, c] * gate * 0.5**GATE_BITS + 0.5)
    _add(x, work.result, n, channels)


@compiled
def _add(x: Ints, y: Ints, n: int, channels: int) -> None:
    """x + y of n points, clamped, in x."""
    for p in range(n):
        for c in range(channels):
            x[p, c] = min(max(x[p, c] + y[p, c], -ACTIVATION_LIMIT), ACTIVATION_LIMIT)


@compiled
def decode_strip(
    network: Network, tables: Tables, gamma: Ints, words: Ints, head: Ints, y: Ints
) -> bool:
    """Decode y, int32 h×w×M; returns False when the words ran out.

    gamma is float64 (h·w)×wide: the Γ part of the first entropy-parameter layer, before its shift.
    """
    height, width, latent = y.shape
    channels = network.layers[VERTICAL_INPUT, 2]
    wide = gamma.shape[1]
    n_max = min(height, (width + SLOPE - 1) // SLOPE)
    most_in = BLOCK * ((network.layers[:, 1].max() + BLOCK - 1) // BLOCK)
    most_out = network.layers[:, 2].max()
    work = _Work(
        np.zeros((n_max, most_in)), np.zeros((BLOCK, most_out)), np.zeros((n_max, most_out))
    )
    vertical = np.empty((n_max, channels))
    horizontal = np.empty((n_max, channels))
    hidden = np.empty((n_max, max(channels, wide)))
    mean = np.empty((n_max, latent), np.int32)
    scale = np.empty((n_max, latent), np.int32)
    symbols = np.empty((n_max, latent), np.int32)
    extent = (height + REACH, width + 2 * REACH)
    y_plane = np.zeros((*extent, latent), np.float32)
    planes = np.zeros((2 * network.levels, 2, *extent, channels), np.float32)

    for d in range(width + SLOPE * (height - 1)):
        points = _Points(d, max(0, (d - width + SLOPE) // SLOPE), min(height - 1, d // SLOPE) + 1)
        n = points.bottom - points.top
        if n <= 0:
            continue
        _gather(network, VERTICAL_INPUT, y_plane, points, work)
        _affine(network, VERTICAL_INPUT, n, work, vertical)
        _gather(network, HORIZONTAL_INPUT, y_plane, points, work)
        _affine(network, HORIZONTAL_INPUT, n, work, horizontal)
        _add(horizontal, vertical, n, channels)
        for level in range(network.levels):
            base = LEVELS + LEVEL_LAYERS * level
            down, right = planes[2 * level], planes[2 * level + 1]
            _gated(network, base + VERTICAL, vertical, vertical, -1, hidden, down, points, work)
            _gated(
                network, base + HORIZONTAL, horizontal, vertical, base + SHORTCUT,
                hidden, right, points, work,
            )  # fmt: skip
            if network.points:
                _gated(
                    network, base + POINT, horizontal, horizontal, -1, hidden, right, points, work
                )
        for p in range(n):
            for c in range(channels):
                work.inputs[p, c] = _leaky(horizontal[p, c])
        _affine(network, OUT, n, work, work.result)

        work.inputs[:n, : network.layers[OUT, 2]] = work.result[:n, : network.layers[OUT, 2]]
        for p in range(n):
            i = points.top + p
            hidden[p, :wide] = gamma[i * width + d - SLOPE * i]
        _multiply(network, UPSILON, n, work, hidden)
        _finish(network, UPSILON, n, hidden)
        for p in range(n):
            for c in range(wide):
                work.inputs[p, c] = _leaky(hidden[p, c])
        _affine(network, HIDDEN, n, work, work.result)
        for p in range(n):
            for c in range(network.layers[HIDDEN, 2]):
                work.inputs[p, c] = _leaky(work.result[p, c])
        _affine(network, MU, n, work, work.result)
        mean[:n] = work.result[:n, :latent]
        _affine(network, SCALE, n, work, work.result)
        scale[:n] = work.result[:n, :latent]

        if not laplace_decode(
            words, head, mean[:n].reshape(-1), scale[:n].reshape(-1), tables.edges,
            tables.inverse_scale, tables.tail, tables.bins, tables.bin_shift,
            symbols[:n].reshape(-1),
        ):  # fmt: skip
            return False
        for p in range(n):
            i = points.top + p
            j = d - SLOPE * i
            for c in range(latent):
                symbol = symbols[p, c]
                y[i, j, c] = symbol
                y_plane[i + REACH, j + REACH, c] = tables.centres[symbol]
    return True
