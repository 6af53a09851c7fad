"""Transforms of planes too large to hold at once: tile by tile, equal to the whole up to rounding.

A tile is read with a halo from its neighbours and cropped afterwards. The width of the halo
is not configured; `measure` finds it by experiment. It fills the plane beyond an edge with NaN, which every
sum and every nonlinearity passes on, and checks how far inside the edge NaN arrives. Values that NaN does
not reach do not depend on anything beyond the edge. Two properties of a network are assumed, and
tests/nn/test_tiles.py compares tiles with the whole for every preset: its layers repeat with a period that
divides ALIGNMENT positions (strides, windows of attention), and a layer's value at a position depends on
the layer's input there, so that padding at a tile's edge lies where NaN would.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ALIGNMENT = 16
"""Tiles begin and end at multiples of this many latent positions, or where the image does."""

_LONGEST = 64 * ALIGNMENT

_ALIVE = 4
"""So many activations of the largest kind are held at a time (measured on all presets)."""


class Halo(NamedTuple):
    """What a transform needs around a tile.

    Attributes:
        before: latent positions inside a tile's first edge (top, left) that its outside can change.
        after: those inside its last edge (bottom, right).
        bytes_per_position: memory for the activations over one latent position, about.
    """

    before: int
    after: int
    bytes_per_position: int


class Span(NamedTuple):
    """One axis of a tile, in latent positions: it reads [first, last) and keeps [start, stop)."""

    start: int
    stop: int
    first: int
    last: int

    @property
    def read(self) -> slice:
        """What the tile reads."""
        return slice(self.first, self.last)

    @property
    def keep(self) -> slice:
        """What is kept, in the whole plane."""
        return slice(self.start, self.stop)

    @property
    def inside(self) -> slice:
        """What is kept, in the tile."""
        return slice(self.start - self.first, self.stop - self.first)


@torch.inference_mode()
def measure(transform: nn.Module, channels: int, stride_in: int, stride_out: int) -> Halo:
    """The halo of a transform.

    Args:
        transform: N×channels×(stride_in·h)×(stride_in·w) to N×any×(stride_out·h)×(stride_out·w).
        channels: of its input.
        stride_in, stride_out: values of input and output per latent position, along each side.
    """
    device = next(transform.parameters()).device
    largest = 0

    def note(module: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel() * output.element_size() // output.shape[0])

    length = 4 * ALIGNMENT
    while length <= _LONGEST:
        edge = ALIGNMENT * stride_in
        before = after = largest = 0
        for axis in (2, 3):
            shape = [2, channels, stride_in, stride_in]
            shape[axis] = length * stride_in
            x = torch.zeros(shape, device=device)
            x[0].narrow(axis - 1, 0, edge).fill_(torch.nan)
            x[1].narrow(axis - 1, x.shape[axis] - edge, edge).fill_(torch.nan)
            hooks = [module.register_forward_hook(note) for module in transform.modules()]
            try:
                reached = transform(x).isnan().any(1).any(4 - axis)  # 2×(stride_out·length)
            finally:
                for hook in hooks:
                    hook.remove()
            first, second = reached.unflatten(1, (length, stride_out)).any(2)
            before = max(before, int(first.nonzero().max()) + 1 - ALIGNMENT)
            after = max(after, length - int(second.nonzero().min()) - ALIGNMENT)
        if max(before, after) < length - 2 * ALIGNMENT:
            return Halo(before, after, _ALIVE * largest // length)
        length *= 2
    return Halo(
        length, length, _ALIVE * largest // length
    )  # every output may depend on every input


def _spans(length: int, step: int, halo: Halo) -> list[Span]:
    """`length` positions in spans that keep at most `step`."""

    def span(start: int) -> Span:
        stop = min(start + step, length)
        first = max(0, (start - halo.before) // ALIGNMENT * ALIGNMENT)
        last = -(-(stop + halo.after) // ALIGNMENT) * ALIGNMENT if stop < length else length
        return Span(start, stop, first, min(last, length))

    return [span(start) for start in range(0, length, step)]


def _divisions(length: int, halo: Halo) -> Iterator[list[Span]]:
    """Ways to divide a side evenly, from one span down to spans that keep as much as their halo."""
    seen = 0
    for parts in range(1, -(-length // ALIGNMENT) + 1):
        step = -(-length // (parts * ALIGNMENT)) * ALIGNMENT
        if parts > 1 and step < halo.before + halo.after:
            return
        if step != seen:
            seen = step
            yield _spans(length, step, halo)


def tiles(height: int, width: int, halo: Halo, memory: int) -> list[tuple[Span, Span]]:
    """Tiles (rows, columns) that cover an h×w plane with the least work within about `memory` bytes.

    Tiles keep at least as many rows and columns as their halo adds. The smallest such tiles are used even
    if they need more memory.
    """

    def sides(spans: list[Span]) -> tuple[int, int]:
        lengths = [span.last - span.first for span in spans]
        return sum(lengths), max(lengths)

    limit = memory // max(1, halo.bytes_per_position)
    columns = [(spans, *sides(spans)) for spans in _divisions(width, halo)]
    best: tuple[int, int, list[tuple[Span, Span]]] | None = None
    for rows in _divisions(height, halo):
        rows_total, rows_most = sides(rows)
        for spans, total, most in columns:
            # Within memory, by work; beyond it, by memory.
            excess = max(0, rows_most * most - limit)
            if best is None or (excess, rows_total * total) < best[:2]:
                best = excess, rows_total * total, [(r, c) for r in rows for c in spans]
    assert best is not None
    return best[2]
