"""Small networks of CompressAI's classes whose entropy models are not trained but lively."""

import math

import torch
from torch import nn


def lively(network, seed=0):
    """Random weights that keep the size of activations, scales from 0.1 to 5, tables made."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        parts = (
            (network.h_s, 1.2),
            (network.context_prediction, 0.7),
            (network.entropy_parameters, 1.3),
        )
        for part, gain in parts:
            for layer in part.modules():
                if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                    continue
                inputs = layer.in_channels * math.prod(layer.kernel_size) / math.prod(layer.stride)
                mask = getattr(layer, "mask", torch.ones(1))
                inputs *= float(mask.mean())
                layer.weight.copy_(mask * normal(*layer.weight.shape) * gain / inputs**0.5)
                layer.bias.copy_(0.1 * normal(*layer.bias.shape))
        last = network.entropy_parameters[-1]
        half = last.out_channels // 2
        last.weight[:half] *= 0.2
        last.bias[:half] = torch.exp(normal(half) - 1)
        bottleneck = network.entropy_bottleneck
        bottleneck.quantiles[:, 0, 1] = 0.3 * normal(bottleneck.channels)
    network.update(force=True)
    return network.eval()


def latents(network, height, width, seed=0):
    """y and z of sizes that such a network might see, z of height×width."""
    generator = torch.Generator().manual_seed(seed)
    y = 3 * torch.randn(1, network.M, 4 * height, 4 * width, generator=generator)
    z = 2 * torch.randn(1, network.N, height, width, generator=generator)
    return y, z
