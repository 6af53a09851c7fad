"""Networks of every family of CompressAI with few channels, and models of them."""

from typing import Any

import torch
from torch import nn

from lightning_tucodec.codecs.learned.model_file import ModelFile
from lightning_tucodec.codecs.network.build import build
from lightning_tucodec.codecs.network.codec import freeze_network

FAMILIES: dict[str, dict[str, Any]] = {
    "FactorizedPrior": {"N": 8, "M": 12},
    "ScaleHyperprior": {"N": 8, "M": 12},
    "MeanScaleHyperprior": {"N": 8, "M": 12},
    "JointAutoregressiveHierarchicalPriors": {"N": 8, "M": 12},
    "Cheng2020Anchor": {"N": 8},
    "Cheng2020Attention": {"N": 8},
    "Cheng2020AnchorCheckerboard": {"N": 8},
    "Elic2022Official": {"N": 8, "M": 12, "groups": [2, 4, 6]},
    "Elic2022Chandelier": {"N": 8, "M": 12, "groups": [2, 4, 6]},
    "ScaleHyperpriorVbr": {"N": 8, "M": 12, "vr_entbttlnck": True},
    "MeanScaleHyperpriorVbr": {"N": 8, "M": 12},
    "JointAutoregressiveHierarchicalPriorsVbr": {"N": 8, "M": 12},
}
"""Class and arguments."""


def described(family: str) -> dict[str, Any]:
    return {"class_path": f"compressai.models.{family}", "init_args": FAMILIES[family]}


def network(family: str, gain: float = 20.0) -> nn.Module:
    """Untrained, always the same, with latents large enough to be worth bits."""
    torch.manual_seed(0)
    made = build(described(family))
    with torch.no_grad():
        last = [layer for layer in made.g_a.modules() if isinstance(layer, nn.Conv2d)][-1]  # type: ignore[union-attr]
        last.weight.mul_(gain)
    return made.eval()


def model(family: str, name: str = "micro") -> ModelFile:
    return freeze_network(network(family), described(family), name, {"recipe": "compressai-mse"})
