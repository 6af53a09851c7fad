"""Parameters and multiply-accumulates of a network.

Counted by torch's flop counter on a 256×256 image: matrix products and convolutions, one
multiply-accumulate = two flops; elementwise work is not counted.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_tucodec.nn.codec import TucodecVAE

SIDE = 256


class Complexity(NamedTuple):
    """One network.

    Attributes:
        name: of the preset or of CompressAI's model.
        parameters: in millions.
        encoder: g_a and h_a, kMAC per image pixel.
        decoder: g_s, kMAC per image pixel.
        entropy: h_s, context and entropy parameters, kMAC per image pixel.
    """

    name: str
    parameters: float
    encoder: float
    decoder: float
    entropy: float


def kmac_per_pixel(work: Callable[[], object]) -> float:
    """The cost of one call of `work` on an image of `SIDE` × `SIDE` pixels."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2 / SIDE**2 / 1000


def millions(network: nn.Module) -> float:
    """Parameters, in millions."""
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


@torch.no_grad()
def of_network(name: str, network: TucodecVAE) -> Complexity:
    """One of this package's networks, in eval mode."""
    x = torch.rand(1, 3, SIDE, SIDE)
    y = network.g_a(x)
    y_hat = network.quantizer(y).y_hat
    z = network.h_a(y)
    return Complexity(
        name,
        millions(network),
        kmac_per_pixel(lambda: network.h_a(network.g_a(x))),
        kmac_per_pixel(lambda: network.g_s(y_hat)),
        kmac_per_pixel(lambda: network.parameters_of(z, y_hat)),
    )
