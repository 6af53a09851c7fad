import pytest
import torch

from lightning_tucodec.coding.fixed_point import (
    EXACT,
    FRACTION_BITS,
    LIMIT,
    IntegerEntropyModel,
    IntegerLinear,
    WholePlane,
    leaky,
)
from lightning_tucodec.coding.integer_weights import quantise_network, restore_network
from lightning_tucodec.errors import ModelFileError
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.training.vae import resolve_codec
from tests.support import MICRO

VARIANTS: dict[str, dict[str, object]] = {
    "one level": {},
    "two levels": {"context.levels": 2},
    "no 1x1 blocks": {"context.point_blocks": False},
    "no context": {"context.channels": 0},
}


def network(variant: str) -> TucodecVAE:
    torch.manual_seed(0)
    return TucodecVAE(resolve_codec("tiny", {**MICRO, **VARIANTS[variant]})).eval()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_integers_follow_the_floating_point_network(variant: str) -> None:
    net = network(variant)
    integers = IntegerEntropyModel(quantise_network(net))
    height, width = 9, 7
    z = torch.randint(-3, 4, (1, 4, 3, 2)).float()
    y_hat = torch.randint(-4, 5, (1, 8, height, width)).float()
    expected = net.parameters_of(z, y_hat)
    gamma = integers.hyper(z[0].permute(1, 2, 0).double() * 2**FRACTION_BITS, height, width)
    plane = WholePlane(height, width)
    plane.put("y", y_hat[0].permute(1, 2, 0).flatten(0, 1).double() * 2**FRACTION_BITS)
    mu, scale = integers.parameters(gamma, plane)
    mu_float = expected.mu[0].permute(1, 2, 0).flatten(0, 1)
    assert float((mu / 2**FRACTION_BITS - mu_float).abs().max()) < 0.01
    octaves = expected.log_scale[0].permute(1, 2, 0).flatten(0, 1) / torch.log(torch.tensor(2.0))
    assert float((scale - 32 * (octaves + 6)).abs().max()) < 1
    assert torch.equal(mu, mu.round())


def test_sums_that_could_be_inexact_are_refused() -> None:
    weight = torch.full((4, 1), EXACT / LIMIT)
    with pytest.raises(ModelFileError, match="not exact"):
        IntegerLinear("layer", weight, torch.zeros(1), 16)


def test_activations_are_clamped_and_rounded_half_up() -> None:
    layer = IntegerLinear("layer", torch.tensor([[3.0]]), torch.tensor([0.0]), 1)
    x = torch.tensor([[1.0], [-1.0], [float(LIMIT)], [-float(LIMIT)]], dtype=torch.float64)
    assert layer(x).flatten().tolist() == [2, -1, LIMIT, -LIMIT]
    assert leaky(torch.tensor([-1.0, -8.0, 5.0]).double()).tolist() == [-1, -1, 5]


def test_missing_tensors_are_named() -> None:
    tensors = quantise_network(network("one level"))
    del tensors["parameters.mu.bias"]
    with pytest.raises(ModelFileError, match="lacks"):
        IntegerEntropyModel(tensors)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_network_can_be_restored_from_its_integers(variant: str) -> None:
    net, other = network(variant), TucodecVAE(resolve_codec("tiny", {**MICRO, **VARIANTS[variant]}))
    restore_network(other, quantise_network(net))
    for name, value in net.state_dict().items():
        if name.startswith(("h_s.", "context.", "entropy_parameters.")):
            torch.testing.assert_close(other.state_dict()[name], value, atol=2e-4, rtol=0)
