"""The causal context model: a PixelCNN++-style network with a bounded right reach.

Salimans et al., "PixelCNN++", ICLR 2017 (two streams with shortcuts, gated residual blocks), as used on
latents by Z19 section 2.3. Deviations, each for a reason:

* No down- or upsampling inside; and every tap (Δi, Δj) satisfies Δj + 3·Δi ≤ 0, and ≤ −1 where it
  reads ŷ itself. Then positions with equal j + 3·i do not depend on each other at any depth, and a
  decoder visits w + 3·(h − 1) diagonals instead of h·w positions.
* concat-ELU is a leaky ReLU with slope 1/8, and there is no dropout: the decoder runs this network in
  exact integers (`coding.fixed_point`), where an ELU would need a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Tap = tuple[int, int]

DIAGONAL_SLOPE = 3
"""Positions with equal j + DIAGONAL_SLOPE·i are decoded together."""

LEAKY_SLOPE = 0.125
"""A power of two, so that the integer path computes the same nonlinearity by a shift."""

VERTICAL_INPUT_TAPS: tuple[Tap, ...] = tuple((-2, dj) for dj in range(-2, 3)) + tuple(
    (-1, dj) for dj in range(-2, 3)
)
HORIZONTAL_INPUT_TAPS: tuple[Tap, ...] = ((0, -2), (0, -1))
VERTICAL_TAPS: tuple[Tap, ...] = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 0))
HORIZONTAL_TAPS: tuple[Tap, ...] = ((-1, -1), (-1, 0), (0, -1), (0, 0))
POINT: tuple[Tap, ...] = ((0, 0),)


def leaky(x: Tensor) -> Tensor:
    """The nonlinearity of all entropy networks."""
    return F.leaky_relu(x, LEAKY_SLOPE)


class TapConv2d(nn.Module):
    """A convolution over an explicit list of taps: out(i, j) = b + Σ_t W_t · x(i + Δi_t, j + Δj_t).

    Outside the plane x is zero. The weight holds only the taps, out×in×taps, so there is no mask that
    could be forgotten.

    Args:
        channels_in, channels_out: widths.
        taps: (Δi, Δj) pairs; each must satisfy Δj + 3·Δi ≤ `reach`.
        reach: 0 between hidden planes, −1 where the input is ŷ itself.

    Raises:
        ValueError: a tap breaks the rule.
    """

    def __init__(
        self, channels_in: int, channels_out: int, taps: Sequence[Tap], reach: int = 0
    ) -> None:
        super().__init__()
        for di, dj in taps:
            if dj + DIAGONAL_SLOPE * di > reach:
                raise ValueError(f"tap ({di}, {dj}) is not decoded yet when it is needed")
        self.taps = tuple(taps)
        self._up = max(max(-di for di, _ in taps), 0)
        self._left = max(max(-dj for _, dj in taps), 0)
        self._right = max(max(dj for _, dj in taps), 0)
        columns = self._left + 1 + self._right
        places = {(di + self._up) * columns + dj + self._left: t for t, (di, dj) in enumerate(taps)}
        self._kernel = self._up + 1, columns
        self._order = [places.get(place) for place in range((self._up + 1) * columns)]
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in, len(self.taps)))
        self.bias = nn.Parameter(torch.zeros(channels_out))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """N×in×H×W to N×out×H×W."""
        # By slices: a list of places would be copied to the device in every step.
        none = self.weight.new_zeros(*self.weight.shape[:2], 1)
        taps = self.weight.split(1, 2)
        kernel = torch.cat([none if tap is None else taps[tap] for tap in self._order], 2)
        return F.conv2d(
            F.pad(x, (self._left, self._right, self._up, 0)),
            kernel.unflatten(2, self._kernel),
            self.bias,
        )


class GatedBlock(nn.Module):
    """Gated residual block: x + a ⊙ sigmoid(b), (a, b) = Conv(φ(Conv(φ(x)) + N·φ(shortcut))).

    `gated_resnet` of PixelCNN++, with φ the leaky ReLU. The block with taps ((0, 0),) is the extra
    1×1 block that Z19 inserts between the regular ones.
    """

    def __init__(self, channels: int, taps: Sequence[Tap], shortcut: bool = False) -> None:
        super().__init__()
        self.conv1 = TapConv2d(channels, channels, taps)
        self.shortcut = TapConv2d(channels, channels, POINT) if shortcut else None
        self.conv2 = TapConv2d(channels, 2 * channels, taps)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Shape stays; `shortcut` (same shape) is given when the block was built for one."""
        hidden = self.conv1(leaky(x))
        if self.shortcut is not None:
            assert shortcut is not None
            hidden = hidden + self.shortcut(leaky(shortcut))
        value, gate = self.conv2(leaky(hidden)).chunk(2, dim=1)
        return x + value * torch.sigmoid(gate)


@dataclass(frozen=True)
class ContextConfig:
    """Size of the context model.

    Attributes:
        channels: width of both streams; 0 leaves the context out (an ablation).
        levels: pairs of vertical and horizontal gated blocks.
        point_blocks: insert a 1×1 gated block into the horizontal stream after every level.
        out_channels: channels of Υ.
    """

    channels: int = 96
    levels: int = 2
    point_blocks: bool = True
    out_channels: int = 384


class CausalContext(nn.Module):
    """T_cm: quantised latent ŷ, N×M×h×w, to context features Υ, N×out×h×w.

    ::

        ŷ ─ V taps ─────(+0)─ gated V ──────────┬─ gated V ──────────┬
          │              │                      │ shortcut           │ shortcut
          └─ H taps ──(+)┴── gated H ── 1×1 ────┴─ gated H ── 1×1 ───┴── φ ─ 1×1 ─ Υ

    The vertical stream sees the rows above, the horizontal one also earlier positions of its row.
    """

    def __init__(self, latent_channels: int, config: ContextConfig) -> None:
        super().__init__()
        channels = config.channels
        self.vertical_input = TapConv2d(latent_channels, channels, VERTICAL_INPUT_TAPS, reach=-1)
        self.horizontal_input = TapConv2d(
            latent_channels, channels, HORIZONTAL_INPUT_TAPS, reach=-1
        )
        self.vertical = nn.ModuleList(
            GatedBlock(channels, VERTICAL_TAPS) for _ in range(config.levels)
        )
        self.horizontal = nn.ModuleList(
            GatedBlock(channels, HORIZONTAL_TAPS, shortcut=True) for _ in range(config.levels)
        )
        self.point = nn.ModuleList(
            GatedBlock(channels, POINT) for _ in range(config.levels if config.point_blocks else 0)
        )
        self.out = TapConv2d(channels, config.out_channels, POINT)

    def forward(self, y_hat: Tensor) -> Tensor:
        """Υ at every position from earlier positions of ŷ only."""
        vertical = self.vertical_input(y_hat)
        horizontal = self.horizontal_input(y_hat) + vertical
        for level, (down, right) in enumerate(zip(self.vertical, self.horizontal, strict=True)):
            vertical = down(vertical)
            horizontal = right(horizontal, vertical)
            if level < len(self.point):
                horizontal = self.point[level](horizontal)
        return self.out(leaky(horizontal))
