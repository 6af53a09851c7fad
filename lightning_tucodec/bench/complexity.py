"""Parameters and multiply-accumulates of the presets, beside CompressAI's; FLOPs of a training step."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_tucodec.codecs.network.zoo import of_zoo
from lightning_tucodec.nn.codec import PRESETS, TucodecVAE
from lightning_tucodec.nn.complexity import SIDE, Complexity, kmac_per_pixel, millions, of_network
from lightning_tucodec.nn.noise import Noise
from lightning_tucodec.training.vae import VAE


def of_preset(name: str) -> Complexity:
    """One of this package's presets."""
    return of_network(name, TucodecVAE(PRESETS[name]).eval())


@torch.no_grad()
def of_compressai(name: str, quality: int) -> Complexity:
    """One of CompressAI's joint autoregressive models."""
    network: Any = of_zoo(name, quality).eval()
    x = torch.rand(1, 3, SIDE, SIDE)
    y = network.g_a(x)
    z = network.h_a(y)

    def entropy() -> None:
        features = torch.cat((network.h_s(z), network.context_prediction(y)), dim=1)
        network.entropy_parameters(features)

    return Complexity(
        f"CompressAI {name}, quality {quality}",
        millions(network),
        kmac_per_pixel(lambda: network.h_a(network.g_a(x))),
        kmac_per_pixel(lambda: network.g_s(y)),
        kmac_per_pixel(entropy),
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


def step_flops(module: VAE, batch: int, crop: int) -> int:
    """FLOPs of forward and backward of a step, as PyTorch counts them: products and convolutions.

    Nothing is computed: the tensors have shapes and no values.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        x = torch.zeros(batch, 3, crop, crop)
        noise = Noise.of(0, torch.arange(batch))
        module.loss(module.network(x, noise), x).loss.backward()
    return counter.get_total_flops()
