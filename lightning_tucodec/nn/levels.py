"""Rate levels of a variable-rate codec: gains of the latent's channels.

Cui et al., "Asymmetric Gained Deep Image Compression with Continuous Rate Adaptation", CVPR 2021, section 3:
each channel of y is multiplied by a gain before it is quantised, and by another one after. Between two
levels the gains are interpolated geometrically (eq. 8). The entropy parameters also get a bias for the
level, which tells them the rate; the article has none.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

Level = TypeVar("Level", Tensor, float)


class RateLevels(nn.Module):
    """Gains and biases of all levels, level 0 with the fewest bits.

    Args:
        count: number of levels, at least 2.
        ratio: λ of a level in proportion to that of the one below.
        channels: of y.
        biases: width of the first layer of the entropy parameters.
    """

    def __init__(self, count: int, ratio: float, channels: int, biases: int) -> None:
        super().__init__()
        if count < 2 or not ratio > 1:
            raise ValueError(f"{count} levels of ratio {ratio}: at least 2, and a ratio above 1")
        self.count = count
        self.ratio = ratio
        self.middle = (count - 1) / 2
        self.log_gain = nn.Parameter(torch.empty(count, channels))
        self.log_inverse = nn.Parameter(torch.empty(count, channels))
        with torch.no_grad():
            for row in range(count):
                # At high rates the best step of a uniform quantiser goes with the root of 1/λ.
                step = (row - self.middle) * math.log(ratio) / 2
                self.log_gain[row].fill_(step)
                self.log_inverse[row].fill_(-step)
        self.bias = nn.Parameter(torch.zeros(count, biases))

    def _at(self, table: Tensor, level: Tensor) -> Tensor:
        """Values of a table of levels at N levels, also between two, N×C×1×1."""
        rows = torch.arange(self.count, device=table.device)
        share = (1 - (level.float()[:, None] - rows).abs()).clamp(min=0)
        return (share @ table.float())[..., None, None]

    def gain(self, level: Tensor) -> Tensor:
        """What y is multiplied by, N×M×1×1, for N levels in [0, count − 1]."""
        return self._at(self.log_gain, level).exp()

    def inverse(self, level: Tensor) -> Tensor:
        """What ŷ is multiplied by before g_s, N×M×1×1."""
        return self._at(self.log_inverse, level).exp()

    def biases(self, level: Tensor) -> Tensor:
        """What is added in the first layer of the entropy parameters, N×C×1×1."""
        return self._at(self.bias, level)

    def factor(self, level: Level) -> Level:
        """λ of a level, or of each of several, in proportion to that of the middle one."""
        factor: Level = self.ratio ** (level - self.middle)
        return factor
