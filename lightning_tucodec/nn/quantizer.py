"""Quantisers of the latent y.

`ClusterQuantizer` is Z19 section 2.2 (eqs 1–3): hard assignment to learned scalar centres forward, the
soft assignment's gradient backward. `CompandedQuantizer` learns centres too, by additive noise.
`RoundQuantizer` and `NoiseQuantizer` are the baselines they are compared with; they use the integers as
centres, so priors and coder treat all alike.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_tucodec.nn.noise import QUANTIZER, Noise, uniform_like

QuantizerKind = Literal["centres", "companded", "round", "noise"]


class Quantized(NamedTuple):
    """A quantised latent; all tensors have the shape of y.

    Attributes:
        y_hat: what g_s and the context see.
        index: hard assignment, int64 in [0, M).
        below: distance from the assigned centre to its cell's lower edge (+inf in the first cell);
            from y_hat to the lower end of the interval around it where the quantiser is `joint`.
        above: distance to the upper edge (+inf in the last cell), or end.
    """

    y_hat: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    below: Tensor
    above: Tensor


def cell_edges(centres: Tensor) -> Tensor:
    """Inner Voronoi edges of sorted centres: M values to M − 1 midpoints."""
    return (centres[1:] + centres[:-1]) / 2


def look_up(index: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    """`table[index]` of every table; int64 indices of any shape into tables of one length.

    Most values share a few centres. The gradient of indexing adds up what one entry gets in an order that
    changes from call to call on a CPU with several threads, and one by one on a GPU; that of an embedding is
    parallel and has the same bits always.
    """
    rows: Tensor = F.embedding(index, torch.stack(tables, 1))
    return rows.unbind(-1)


class Quantizer(nn.Module):
    """What the quantisers share: assignment to sorted centres and the cells around them.

    Attributes:
        joint: in training the rate is that of the very ŷ that g_s sees, in the interval around it.
    """

    joint: bool = False

    def centres(self) -> Tensor:
        """The M centres in increasing order, float32."""
        raise NotImplementedError

    def assign(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Index of the nearest centre, that centre, and the distances to its cell's edges."""
        centres = self.centres().float()
        edges = cell_edges(centres)
        index = torch.bucketize(y.detach().float().contiguous(), edges.detach())
        infinity = centres.new_full((1,), torch.inf)
        below = centres - torch.cat([-infinity, edges])
        above = torch.cat([edges, infinity]) - centres
        centre, low, high = look_up(index, centres, below, above)
        return index, centre, low, high

    def hard(self, y: Tensor) -> Quantized:
        """y quantised as the coder does it, in any mode; float32."""
        with torch.autocast(y.device.type, enabled=False):
            index, centre, below, above = self.assign(y)
            return Quantized(centre, index, below, above)


class LearnedCentres(Quantizer):
    """M learned centres, parametrised by their gaps.

    Gaps are positive with a minimum and are cumulated outward from the middle centre: one gap that grows
    moves the outer centres, not the busy middle ones.

    Args:
        count: M.
        min_gap: lower bound of the gaps; the prior's least scale is 0.04 of it.
        free_middle: the middle centre is learned as well; otherwise it is zero.
    """

    middle: nn.Parameter | None

    def __init__(self, count: int, min_gap: float = 0.4, free_middle: bool = False) -> None:
        super().__init__()
        if count < 3:
            raise ValueError(f"at least 3 centres are needed, got {count}")
        self.count = count
        self.min_gap = min_gap
        self.register_parameter("middle", nn.Parameter(torch.zeros(())) if free_middle else None)
        # softplus(raw) + min_gap = 1: the centres start on the integers −M/2 … M/2 − 1.
        self.raw_gaps = nn.Parameter(torch.full((count - 1,), math.log(math.expm1(1 - min_gap))))

    def gaps(self) -> Tensor:
        """The M − 1 distances between neighbours, float32."""
        return F.softplus(self.raw_gaps.float()) + self.min_gap

    def centres(self) -> Tensor:
        """The M centres in increasing order, float32; the middle one has the index M // 2."""
        gaps = self.gaps()
        half = self.count // 2
        lower = -torch.cumsum(gaps[:half].flip(0), 0).flip(0)
        upper = torch.cumsum(gaps[half:], 0)
        around_zero = torch.cat([lower, gaps.new_zeros(1), upper])
        return around_zero if self.middle is None else self.middle.float() + around_zero


class CompandedQuantizer(LearnedCentres):
    """Learned centres as a companded uniform quantiser: ŷ = φ(t̃), t = φ⁻¹(y), t̃ = t + u, u ~ U(−½, ½).

    φ is the piecewise linear map through (k, c_k), continued beyond the end centres. In training g_s and
    the rate see the same ŷ, and the rate is the mass between φ(t̃ − ½) and φ(t̃ + ½): for any u these
    intervals tile the line. Otherwise t is rounded, and the cells φ(k ± ½) are exactly the Voronoi cells.
    With unit gaps this is additive noise (Ballé et al. 2017).

    The middle centre stays at zero. Additive noise is blind to where a cell's edge lies, so a free grid
    drifts until the edge stands on the most frequent value, which costs bits in real files.
    """

    joint = True

    def compress(self, y: Tensor) -> Tensor:
        """t = φ⁻¹(y), float32."""
        centres, gaps = self.centres(), self.gaps()
        cell = torch.bucketize(y.detach().contiguous(), centres[1:-1].detach(), right=True)
        centre, gap = look_up(cell, centres[:-1], gaps)
        return cell - self.count // 2 + (y - centre) / gap

    def expand(self, t: Tensor) -> Tensor:
        """φ(t), float32."""
        half = self.count // 2
        cell = (t.detach().floor().long() + half).clamp(0, self.count - 2)
        centre, gap = look_up(cell, self.centres()[:-1], self.gaps())
        return centre + (t - (cell - half)) * gap

    def forward(self, y: Tensor, noise: Noise | None = None) -> Quantized:
        """Quantise; float32 whatever autocast says."""
        with torch.autocast(y.device.type, enabled=False):
            y = y.float()
            hard = self.hard(y)
            if not self.training:
                return hard
            t = self.compress(y) + uniform_like(y, noise, QUANTIZER) - 0.5
            y_hat = self.expand(t)
            below, above = y_hat - self.expand(t - 0.5), self.expand(t + 0.5) - y_hat
            return Quantized(y_hat, hard.index, below, above)


class ClusterQuantizer(LearnedCentres):
    """Quantisation to M learned centres, hard forward and soft backward (Z19 eqs 1–3).

    ŷ = c_j*, j* = argmin_j |y − c_j|; the gradient is that of
    ỹ = Σ_j c_j·exp(−σ|y − c_j|) / Σ_l exp(−σ|y − c_l|). Beyond the end centres, where ỹ is flat, the gradient
    of y is passed straight through so that such values can return.

    The middle centre is learned as well.

    Args:
        count: M.
        hardness: σ times the mean gap. From 5 on the gradient vanishes on most of a cell.
        min_gap: see LearnedCentres.
    """

    def __init__(self, count: int = 200, hardness: float = 2.0, min_gap: float = 0.4) -> None:
        super().__init__(count, min_gap, free_middle=True)
        self.hardness = hardness

    def sigma(self, centres: Tensor) -> Tensor:
        """σ of the soft assignment, a constant for the gradient."""
        mean_gap = (centres[-1] - centres[0]).detach() / (self.count - 1)
        return self.hardness / mean_gap

    def _sums(self, centres: Tensor, sigma: Tensor) -> Tensor:
        """What the soft sum needs to know of the centres on both sides of y; (M + 1)×6.

        Row k is for values y with k centres at or below. Its first three values are the nearest centre c
        below, Σ exp(−σ(c − c_j)) and Σ (c_j − c)·exp(−σ(c − c_j)) over all centres j below; the others are
        the same of the centres above. Where there are none, the sums are zero.
        """
        offsets = centres - centres[:, None]
        weights = torch.exp(-sigma * offsets.abs())

        def side(part: Tensor) -> Tensor:
            return torch.stack([centres, part.sum(1), (part * offsets).sum(1)], 1)

        below, above = side(weights.tril()), side(weights.triu())
        first, last = (
            torch.stack([end, torch.zeros_like(end), torch.zeros_like(end)])[None]
            for end in (centres[0], centres[-1])
        )
        return torch.cat([torch.cat([first, below]), torch.cat([above, last])], 1)

    def soft(self, y: Tensor, origin: Tensor) -> Tensor:
        """ỹ of eq. 2; float32.

        A change of y scales the weights of all centres below it by one factor, and of those above by another.
        So two table look-ups give the whole sum.

        Args:
            y: any shape.
            origin: a centre close to y, of y's shape; the sum is around it, so that rounding does not grow
                with the centres' size.
        """
        y, origin = y.float(), origin.detach()
        centres = self.centres()
        sigma = self.sigma(centres)
        place = torch.bucketize(y.detach().contiguous(), centres.detach(), right=True)
        rows = F.embedding(place, self._sums(centres, sigma))
        low, low_sum, low_moment, high, high_sum, high_moment = rows.unbind(-1)
        to_low, to_high = (y - low).abs(), (high - y).abs()
        nearest = torch.minimum(to_low, to_high).detach()
        low_factor = torch.exp(sigma * (nearest - to_low))
        high_factor = torch.exp(sigma * (nearest - to_high))
        moment = low_factor * (low_moment + (low - origin) * low_sum)
        moment = moment + high_factor * (high_moment + (high - origin) * high_sum)
        return origin + moment / (low_factor * low_sum + high_factor * high_sum)

    def forward(self, y: Tensor, noise: Noise | None = None) -> Quantized:
        """Quantise; float32 whatever autocast says."""
        with torch.autocast(y.device.type, enabled=False):
            y = y.float()
            index, hard, below, above = self.assign(y)
            if not (self.training and torch.is_grad_enabled()):
                return Quantized(hard, index, below, above)
            centres = self.centres().detach()
            beyond = y - y.clamp(centres[0], centres[-1])
            soft = self.soft(y, hard) + beyond
            return Quantized(soft + (hard - soft).detach(), index, below, above)


class RoundQuantizer(Quantizer):
    """Rounding to the integers −M/2 … M/2 − 1 with the straight-through gradient."""

    def __init__(self, count: int = 200) -> None:
        super().__init__()
        self.count = count
        integers = torch.arange(-(count // 2), count - count // 2, dtype=torch.float32)
        self.register_buffer("integers", integers, persistent=False)

    def centres(self) -> Tensor:
        """The integers, float32."""
        assert isinstance(self.integers, Tensor)
        return self.integers

    def forward(self, y: Tensor, noise: Noise | None = None) -> Quantized:
        """Quantise; the gradient of ŷ is that of y."""
        with torch.autocast(y.device.type, enabled=False):
            y = y.float()
            index, hard, below, above = self.assign(y)
            return Quantized(y + (hard - y).detach(), index, below, above)


class NoiseQuantizer(RoundQuantizer):
    """Uniform noise in training (Ballé et al. 2017), rounding otherwise."""

    def forward(self, y: Tensor, noise: Noise | None = None) -> Quantized:
        """y + U(−½, ½) in training."""
        quantized = super().forward(y)
        if not self.training:
            return quantized
        noisy = y.float() + uniform_like(y, noise, QUANTIZER) - 0.5
        return quantized._replace(y_hat=noisy)


def make_quantizer(kind: QuantizerKind, count: int, hardness: float) -> Quantizer:
    """The quantiser that a recipe names."""
    if kind == "centres":
        return ClusterQuantizer(count, hardness)
    if kind == "companded":
        return CompandedQuantizer(count)
    return RoundQuantizer(count) if kind == "round" else NoiseQuantizer(count)
