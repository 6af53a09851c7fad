"""Entropy models: Laplacian mass of Voronoi cells for y, a factorised density for z.

Everything here is computed in float32 under any autocast.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_tucodec.nn.blocks import lower_bound
from lightning_tucodec.nn.noise import HYPER, Noise, uniform_like

MIN_SCALE = 2.0**-6
"""Least scale b of the Laplacian, in latent units: at most 0.04 of any two centres' distance, so that
a certain symbol costs next to nothing."""

MAX_SCALE = 64.0
"""Largest scale b; a Laplacian as wide as 200 unit-spaced centres is flat enough."""

MIN_LIKELIHOOD = 2.0**-28
"""Least probability of a symbol; the coder's frequencies have 28 bits."""

_FAR = 1e6
"""Stands for infinity, in latent units: exp(−_FAR / MAX_SCALE) is zero in float32."""


def laplace_interval(lower: Tensor, upper: Tensor, scale: Tensor) -> Tensor:
    """Mass of a zero-mean Laplacian of scale b between `lower` and `upper` (broadcasting).

    The interval is mirrored onto the left tail first, where both CDF values are small and their
    difference keeps its relative precision. Infinite ends are allowed.
    """
    # An infinite end has no mass behind it, but its gradient for b would be 0·∞.
    lower, upper = lower.clamp(min=-_FAR), upper.clamp(max=_FAR)
    mirrored = lower + upper > 0
    left = torch.where(mirrored, -upper, lower) / scale
    right = torch.where(mirrored, -lower, upper) / scale

    def cdf(t: Tensor) -> Tensor:
        half = 0.5 * torch.exp(-t.abs())
        return torch.where(t < 0, half, 1 - half)

    return cdf(right) - cdf(left)


class LaplacePrior(nn.Module):
    """P(k) = F(½(c_k + c_{k+1})) − F(½(c_{k−1} + c_k)), F the Laplacian CDF, ends open.

    The cells tile the line, so Σ_k P(k) = 1 for any centres; with unit spacing it is Z19 eq. 4.
    """

    def scale(self, log_scale: Tensor) -> Tensor:
        """b = exp(log b) inside [MIN_SCALE, MAX_SCALE], with a gradient that leads back inside."""
        bounded = lower_bound(log_scale.float(), math.log(MIN_SCALE))
        return torch.exp(-lower_bound(-bounded, -math.log(MAX_SCALE)))

    def forward(
        self, value: Tensor, below: Tensor, above: Tensor, mu: Tensor, log_scale: Tensor
    ) -> Tensor:
        """Mass between value − below and value + above; all of y's shape.

        With `value` a centre and `below`, `above` the distances to its cell's edges (infinite at the
        ends), this is P(k).
        """
        with torch.autocast(value.device.type, enabled=False):
            centred = value.float() - mu.float()
            mass = laplace_interval(centred - below, centred + above, self.scale(log_scale))
            return lower_bound(mass, MIN_LIKELIHOOD)


class FactorizedPrior(nn.Module):
    """Non-parametric factorised density of z (Ballé et al. 2018, appendix 6.1).

    The CDF of a channel is sigmoid(f_4 ∘ … ∘ f_1), f_k(v) = g_k(softplus(H_k)·v + b_k),
    g_k(v) = v + tanh(a_k)·tanh(v), with inner widths (1, 3, 3, 3, 1). z is rounded around the channel's
    median, which is found by bisection: there is no auxiliary loss to train and nothing to update.
    """

    _WIDTHS = (1, 3, 3, 3, 1)
    _INIT_SCALE = 10.0
    MEDIAN_BITS = 8
    """Medians are multiples of 2^-8, so that the integer path holds them exactly."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        layers = len(self._WIDTHS) - 1
        scale = self._INIT_SCALE ** (1 / layers)
        self.matrices = nn.ParameterList()
        self.biases = nn.ParameterList()
        self.factors = nn.ParameterList()
        for k in range(layers):
            rows, columns = self._WIDTHS[k + 1], self._WIDTHS[k]
            initial = math.log(math.expm1(1 / scale / rows))
            self.matrices.append(nn.Parameter(torch.full((channels, rows, columns), initial)))
            self.biases.append(nn.Parameter(torch.empty(channels, rows, 1).uniform_(-0.5, 0.5)))
            if k < layers - 1:
                self.factors.append(nn.Parameter(torch.zeros(channels, rows, 1)))

    def logits(self, z: Tensor) -> Tensor:
        """Logit of the CDF; channels × 1 × n to the same."""
        for k, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            z = F.softplus(matrix.float()) @ z + bias.float()
            if k < len(self.factors):
                z = z + torch.tanh(self.factors[k].float()) * torch.tanh(z)
        return z

    @torch.no_grad()
    def medians(self) -> Tensor:
        """Median of every channel, a multiple of 2^-8; shape (channels,)."""
        low = self.biases[0].new_full((self.channels, 1, 1), -1024.0)
        high = -low
        for _ in range(2 * 10 + self.MEDIAN_BITS):
            middle = (low + high) / 2
            below = self.logits(middle) < 0
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        steps = 2**self.MEDIAN_BITS
        return torch.round(low[:, 0, 0] * steps) / steps

    def likelihood(self, z: Tensor) -> Tensor:
        """Mass of the unit bin around every value; N×C×h×w to the same."""
        with torch.autocast(z.device.type, enabled=False):
            values = z.float().movedim(1, 0)
            flat = values.reshape(self.channels, 1, -1)
            lower, upper = self.logits(flat - 0.5), self.logits(flat + 0.5)
            # Both ends are moved to the tail where a sigmoid keeps its relative precision.
            sign = torch.where(lower + upper > 0, -1.0, 1.0)
            mass = (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs()
            return lower_bound(mass, MIN_LIKELIHOOD).reshape(values.shape).movedim(0, 1)

    def forward(self, z: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """(ẑ, likelihoods): z + U(−½, ½) in training, rounding around the medians otherwise."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if self.training:
                z_hat = z + uniform_like(z, noise, HYPER) - 0.5
            else:
                medians = self.medians()[:, None, None]
                z_hat = torch.round(z - medians) + medians
            return z_hat, self.likelihood(z_hat)
