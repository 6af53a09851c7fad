"""Parameters and multiply-accumulates of the networks, beside CompressAI's autoregressive ones.

Counted by torch's flop counter on a 256×256 image: matrix products and convolutions, one
multiply-accumulate = two flops; elementwise work is not counted.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_tucodec.nn.codec import PRESETS, TucodecVAE

_SIDE = 256


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


def _kmac_per_pixel(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2 / _SIDE**2 / 1000


def _millions(network: nn.Module) -> float:
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


@torch.no_grad()
def of_preset(name: str) -> Complexity:
    """One of this package's presets."""
    network = TucodecVAE(PRESETS[name]).eval()
    x = torch.rand(1, 3, _SIDE, _SIDE)
    y = network.g_a(x)
    y_hat = network.quantizer(y).y_hat
    z = network.h_a(y)
    return Complexity(
        name,
        _millions(network),
        _kmac_per_pixel(lambda: network.h_a(network.g_a(x))),
        _kmac_per_pixel(lambda: network.g_s(y_hat)),
        _kmac_per_pixel(lambda: network.parameters_of(z, y_hat)),
    )


@torch.no_grad()
def of_compressai(name: str, quality: int) -> Complexity:
    """One of CompressAI's joint autoregressive models."""
    from compressai.models import Cheng2020Attention, JointAutoregressiveHierarchicalPriors

    network = (
        JointAutoregressiveHierarchicalPriors(192, 192 if quality <= 4 else 320)
        if name == "mbt2018"
        else Cheng2020Attention(128 if quality <= 3 else 192)
    ).eval()
    x = torch.rand(1, 3, _SIDE, _SIDE)
    y = network.g_a(x)
    z = network.h_a(y)

    def entropy() -> None:
        features = torch.cat((network.h_s(z), network.context_prediction(y)), dim=1)
        network.entropy_parameters(features)

    return Complexity(
        f"CompressAI {name}, quality {quality}",
        _millions(network),
        _kmac_per_pixel(lambda: network.h_a(network.g_a(x))),
        _kmac_per_pixel(lambda: network.g_s(y)),
        _kmac_per_pixel(entropy),
    )


def table() -> list[Complexity]:
    """All presets, then CompressAI's networks at both of their widths."""
    peers = [(name, quality) for name in ("mbt2018", "cheng2020-attn") for quality in (3, 6)]
    return [*map(of_preset, PRESETS), *(of_compressai(*peer) for peer in peers)]


def markdown(rows: list[Complexity]) -> str:
    """Rows of `table()` as they stand in docs/networks.md."""
    lines = [
        "| network | parameters, M | encoder, kMAC/px | decoder, kMAC/px | entropy path, kMAC/px |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.parameters:.1f} | {row.encoder:.1f} | {row.decoder:.1f} "
        f"| {row.entropy:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)
