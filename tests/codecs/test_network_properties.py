"""What CompressAI's own tests ask of its models, entropy models and training, asked of our forms of them.

Shapes of what a network answers, noise in training and rounding after it, an auxiliary loss of the quantiles
alone, tables that survive a file, a decoder that shows what `forward` does.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lightning_tucodec.codecs.learned.model_file import ModelFile
from lightning_tucodec.codecs.network.build import build
from lightning_tucodec.codecs.network.codec import NetworkModel, freeze_network, load
from lightning_tucodec.quality.metrics import as_tensor
from lightning_tucodec.training.network import NetworkModule
from tests.codecs import zoo


@pytest.fixture(scope="module", params=zoo.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def training(family: str) -> NetworkModule:
    module = NetworkModule(zoo.described(family), lmbda=None if family.endswith("Vbr") else 0.01)
    module.network.load_state_dict(zoo.network(family).state_dict())
    return module


def options_of(module: NetworkModule) -> dict[str, Any]:
    """A level in training, and as a coder asks for it."""
    if module.rates is None:
        return {}
    last = module.rates.levels - 1
    return {"s": last} if module.training else module.rates.arguments(last)


def test_shapes_and_noise(family: str, cat: NDArray[np.uint8]) -> None:
    """N×3×75×101: padded to multiples of the stride inside, and cut again."""
    module = training(family)
    arguments = zoo.FAMILIES[family]
    x = as_tensor(cat).repeat(2, 1, 1, 1) / 255
    for is_training in (True, False):
        module.train(is_training)
        with torch.no_grad():
            one, other = (module(x, **options_of(module)) for _ in range(2))
        assert one.x_hat.shape == x.shape
        shapes = {name: tuple(values.shape) for name, values in one.likelihoods.items()}
        y_size = tuple(-(-side // module.stride) * module.stride // 16 for side in (75, 101))
        assert shapes.pop("y") == (2, arguments.get("M", arguments["N"]), *y_size)
        assert family == "FactorizedPrior" or shapes == {"z": (2, arguments["N"], 2, 2)}
        for values in one.likelihoods.values():
            assert 0 < float(values.min()) <= float(values.max()) <= 1
        # Some hand rounded values to the synthesis in training too; their rates are of noisy ones.
        noisy = [not torch.equal(a, other.likelihoods[name]) for name, a in one.likelihoods.items()]
        assert any(noisy) == is_training
        assert is_training or torch.equal(one.x_hat, other.x_hat)
        bits_y, bits_z = one.bits()
        assert bits_y.shape == bits_z.shape == (2,)
        assert bool((bits_z > 0).all()) == (family != "FactorizedPrior")


def test_the_auxiliary_loss_is_of_the_quantiles_alone(family: str, cat: NDArray[np.uint8]) -> None:
    """So that one backward pass serves both optimisers; and it brings the quantiles to where they belong."""
    module = training(family).train()
    network: Any = module.network
    auxiliary = network.aux_loss()
    if not isinstance(
        auxiliary, torch.Tensor
    ):  # a bottleneck of variable steps has none in CompressAI
        assert auxiliary == 0
        assert zoo.FAMILIES[family].get("vr_entbttlnck")
        return
    assert auxiliary.shape == ()
    auxiliary.backward()
    reached = {
        name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert reached
    assert all(name.endswith("quantiles") for name in reached)
    module.zero_grad()
    module.loss(
        module(as_tensor(cat) / 255, **options_of(module)), as_tensor(cat) / 255
    ).loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in module.auxiliary)
    assert any(p.grad is not None and p.grad.any() for p in module.main)
    module.zero_grad()
    optimizer = torch.optim.Adam(module.auxiliary, lr=0.3)
    for _ in range(20):
        optimizer.zero_grad()
        network.aux_loss().backward()
        optimizer.step()
    assert float(network.aux_loss().detach()) < float(auxiliary.detach())


def test_a_file_is_the_network(family: str, tmp_path: Path, cat: NDArray[np.uint8]) -> None:
    """Weights and tables survive; tables that a network has are kept; a decoder shows what `forward` does."""
    file = zoo.model(family)
    file.save(tmp_path / "m.safetensors")
    coder = NetworkModel(ModelFile.load(tmp_path / "m.safetensors"))
    again = freeze_network(coder.network, zoo.described(family), "micro", dict(file.card))
    assert again.id == coder.id == file.id
    fresh = build(zoo.described(family))
    load(fresh, {k.removeprefix("network."): v for k, v in file.tensors.items()})
    module = training(family).eval()
    x = as_tensor(cat) / 255
    with torch.no_grad():
        expected = module.code(fresh.eval(), x, **options_of(module))
        assert torch.equal(module(x, **options_of(module)).x_hat, expected.x_hat)
    shown = as_tensor(coder.decode(coder.encode(cat)))
    if (
        coder.engine is None
    ):  # those of a raster context round y - μ when they code, and y in `forward`
        assert torch.equal(shown, (expected.x_hat.clamp(0, 1) * 255).round().to(torch.uint8))
