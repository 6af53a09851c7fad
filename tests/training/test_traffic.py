"""A training step reads nothing from the device and sends nothing to it, but where it logs."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_tucodec.training.adversarial import AdversarialModule
from lightning_tucodec.training.game import Turn
from lightning_tucodec.training.gan import GANCodec, GANNetwork
from lightning_tucodec.training.module import ScheduledModule
from lightning_tucodec.training.network import NetworkModule
from lightning_tucodec.training.postfilter import PostFilterModule
from lightning_tucodec.training.vae import VAE
from tests.codecs import zoo
from tests.support import MICRO, MUON
from tests.training.traffic import Traffic, watched

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")

BATCHES, SIDE = 4, 32
Batch = dict[str, Tensor]


def crops() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    for first in range(0, 2 * BATCHES, 2):
        image = torch.rand(2, 3, SIDE, SIDE, generator=generator)
        yield {"image": image, "index": torch.arange(first, first + 2)}


def precoded() -> Iterator[Batch]:
    for batch in crops():
        image = batch["image"]
        decoded = {
            "luma": image[:, :1],
            "chroma": image[:, 1:, ::2, ::2] - 0.5,
            "plain": 0.9 * image,
        }
        yield {**batch, **decoded, "qp": torch.tensor([36, 40])}


def vae(**options: Any) -> VAE:
    codec = {**MICRO, **options.pop("codec", {})}
    return VAE(codec=codec, **options)


def gan(**options: Any) -> GANCodec:
    codec = {**MICRO, **options.pop("codec", {})}
    return GANCodec(
        recipe="mse", lmbda=256.0, codec=codec, discriminator_widths=[8, 8], ema=0.9,
        gate_lower=0.0, gate_upper=2.0, **options,
    )  # fmt: skip


def network(family: str) -> NetworkModule:
    return NetworkModule(zoo.described(family), lmbda=None if family.endswith("Vbr") else 0.01)


NETWORKS = {
    "FactorizedPrior": (0, 0),
    "ScaleHyperprior": (0, 0),
    "MeanScaleHyperprior": (0, 0),
    "JointAutoregressiveHierarchicalPriors": (0, 0),
    "Cheng2020Anchor": (0, 0),
    "Cheng2020Attention": (0, 0),
    "Cheng2020AnchorCheckerboard": (0, 13),
    "Elic2022Official": (0, 39),
    "Elic2022Chandelier": (0, 39),
    "ScaleHyperpriorVbr": (28, 1),
    "MeanScaleHyperpriorVbr": (0, 1),
    "JointAutoregressiveHierarchicalPriorsVbr": (0, 16),
}
"""Reads and copies of a step in CompressAI's own code; the copies fill tensors with constants."""

MODULES: dict[str, Callable[[], ScheduledModule]] = {
    **{
        f"vae {kind}": lambda kind=kind: vae(codec={"quantizer": kind})  # type: ignore[misc]
        for kind in ("centres", "companded", "round", "noise")
    },
    "vae straight through": lambda: vae(codec={"rate_proxy": "straight_through"}),
    "vae hard": lambda: vae(codec={"rate_proxy": "hard"}, frozen=["g_a"]),
    "vae levels": lambda: vae(codec={"levels": 3}),
    "vae muon": lambda: vae(optimizer="muon", codec=MUON),
    "vae attention, gdn": lambda: vae(
        codec={
            "transform.attention_latent": True,
            "transform.non_local": True,
            "transform.gdn": True,
        }
    ),
    "gan pair": gan,
    "gan patch": lambda: gan(
        discriminator="patch", adversarial="hinge", optimizer="muon", codec=MUON
    ),
    "gan network": lambda: GANNetwork(
        network=zoo.described("MeanScaleHyperprior"),
        lmbda=0.01,
        recipe="compressai-mse",
        discriminator_widths=[8, 8],
        ema=0.9,
        gate_lower=0.0,
        gate_upper=2.0,
    ),
    **{
        family: lambda family=family: network(family)  # type: ignore[misc]
        for family, asked in NETWORKS.items()
        if asked == (0, 0)
    },
    "post-filter": lambda: PostFilterModule(network={"channels": 32, "blocks": 2}),
    "post-filter taught": lambda: PostFilterModule(
        network={"channels": 8, "blocks": 1}, teacher="vvc-postfilter"
    ),
}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> ScheduledModule:
    torch.manual_seed(0)
    return MODULES[request.param]()


def batches(module: ScheduledModule) -> list[Batch]:
    return list(precoded() if isinstance(module, PostFilterModule) else crops())


def test_no_step_reads_or_copies(module: ScheduledModule) -> None:
    """Lightning's own part of a step included; the first two steps make the optimisers' state."""
    for traffic in watched(module, batches(module))[2:]:
        # The game's rules get last batch's means: on a GPU by a copy that nothing waits for (`Observed`).
        told = [
            asker
            for asker in traffic.reads
            if "training/game.py" in asker or "training/adversarial.py" in asker
        ]
        assert len(told) == (2 if isinstance(module, AdversarialModule) else 0)
        assert set(traffic.reads) == set(told)
        assert not traffic.copies
    assert module.opt_step == BATCHES


@pytest.mark.parametrize("family", [name for name, asked in NETWORKS.items() if asked != (0, 0)])
def test_what_a_step_of_compressais_own_code_asks(family: str) -> None:
    torch.manual_seed(0)
    _, _, traffic, _ = watched(network(family), crops())
    asked = [traffic.reads, traffic.copies]
    assert tuple(sum(counts.values()) for counts in asked) == NETWORKS[family]
    assert all(asker.startswith("compressai/") for counts in asked for asker in counts)


@pytest.mark.parametrize("kind", ["vae centres", "gan pair", "post-filter", "MeanScaleHyperprior"])
def test_a_step_that_logs_reads_a_few_times(kind: str) -> None:
    module = MODULES[kind]()
    *_, traffic = watched(module, batches(module), log_every_n_steps=BATCHES)
    ours = sum(n for asker, n in traffic.reads.items() if asker.startswith("lightning_tucodec/"))
    assert 0 < ours <= 8


def test_what_is_looked_for_is_found() -> None:
    with Traffic() as traffic:
        x = torch.ones(3)
        float(x.sum())
        x.nonzero()
        torch.tensor([1, 2])
        x.cpu()
        x.to("meta")
        x.sum().item()
    assert sum(traffic.reads.values()) == 4
    assert sum(traffic.copies.values()) == 2


def test_a_step_on_a_device_that_holds_no_values(
    module: ScheduledModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be read there: forward, backward, clipping, optimisers and averages do without."""
    optimizer_module = importlib.import_module("torch.optim.optimizer")
    asked = "_get_fused_kernels_supported_devices"
    supported = [*getattr(optimizer_module, asked)(), "meta"]
    monkeypatch.setattr(optimizer_module, asked, lambda: supported)
    monkeypatch.setattr(
        torch, "autocast", lambda *_, **__: nullcontext()
    )  # it knows no such device
    if isinstance(module, PostFilterModule) and module.teacher is not None:
        module.teacher.network.to("meta")
    # As on the way to a GPU, the parameters stay the same objects.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.to("meta").train()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    trainer = SimpleNamespace(
        log_every_n_steps=0, world_size=1, precision="32-true", model=None, optimizers=[]
    )
    module._trainer = trainer  # type: ignore[assignment]
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign,assignment]
    found = module.configure_optimizers()
    optimizers: list[Any] = found if isinstance(found, list) else [found]
    trainer.optimizers = optimizers
    module.optimizers = lambda: optimizers  # type: ignore[method-assign,assignment]
    batch = {name: value.to("meta") for name, value in next(iter(batches(module))).items()}
    for _ in range(2):
        with Traffic() as traffic:
            if isinstance(module, AdversarialModule):
                module.play(batch["image"], batch["index"], Turn(True, True), 1.0, rated=True)
            elif isinstance(module, NetworkModule):
                module.training_step(batch, 0)  # clips and steps
            else:
                module.training_step(batch, 0).backward()  # type: ignore[union-attr]
            for optimizer in [] if isinstance(module, NetworkModule) else optimizers:
                module.clip(optimizer)
                optimizer.step()
            module.on_train_batch_end(None, batch, 0)
    assert not traffic.reads
    assert not traffic.copies
