import dataclasses

import pytest
import torch

from lightning_tucodec.nn.postfilter import (
    SIZES,
    WEIGHT_STEPS,
    DecodedPicture,
    Normal,
    PostFilter,
    PostFilterConfig,
    axes,
    corrected,
)

SMALL = PostFilterConfig(channels=8, blocks=2)


def picture(height: int = 32, width: int = 48, qp: float = 40.0, seed: int = 0) -> DecodedPicture:
    generator = torch.Generator().manual_seed(seed)
    luma = torch.rand(1, 1, height, width, generator=generator)
    chroma = torch.rand(1, 2, height // 2, width // 2, generator=generator) - 0.5
    plain = torch.rand(1, 3, height, width, generator=generator)
    return DecodedPicture(luma, chroma, plain, torch.tensor([qp]))


def trained(config: PostFilterConfig) -> PostFilter:
    """A network whose every layer does something."""
    torch.manual_seed(1)
    network = PostFilter(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("size", sorted(SIZES))
def test_an_untrained_filter_gives_the_plain_conversion(size: str) -> None:
    one = picture()
    corrections = PostFilter(SIZES[size])(one)
    first = torch.eye(corrections.shape[1])[None, :, :1].expand(-1, -1, 3)
    assert torch.equal(corrected(one.plain, corrections, first), one.plain)


def test_weights_are_those_that_fit_best() -> None:
    generator = torch.Generator().manual_seed(0)
    corrections = torch.randn(2, 3, 3, 16, 24, generator=generator)
    plain = torch.rand(2, 3, 16, 24, generator=generator)
    weights = torch.randint(-100, 100, (2, 3, 3), generator=generator) / WEIGHT_STEPS
    shown = corrected(plain, corrections, weights)
    assert torch.equal(Normal.of(corrections, shown - plain).weights(), weights)
    noise = 3 * torch.randn(shown.shape, generator=generator)
    found = Normal.of(corrections, shown + noise - plain).weights()
    least = (corrected(plain, corrections, found) - shown - noise).square().sum()
    for place in ((0, 0, 0), (1, 2, 1)):
        for step in (-0.1, 0.1):
            moved = found.clone()
            moved[place] += step
            assert (corrected(plain, corrections, moved) - shown - noise).square().sum() > least


def test_weights_that_no_byte_holds_and_corrections_that_are_nothing() -> None:
    plain = torch.zeros(1, 3, 8, 8)
    corrections = torch.zeros(1, 2, 3, 8, 8)
    corrections[:, 1] = 0.1
    error = corrected(plain, corrections, torch.full((1, 2, 3), 9.0))
    weights = Normal.of(corrections, error).weights()
    assert torch.equal(weights[0, 0], torch.ones(3))
    assert torch.equal(weights[0, 1], torch.full((3,), 127 / WEIGHT_STEPS))


def test_axes_keep_lengths() -> None:
    rows = axes(torch.zeros(1))
    assert torch.allclose(rows @ rows.T, torch.eye(3), atol=1e-6)


def test_qp_matters_where_it_is_asked_for() -> None:
    for conditioned in (True, False):
        config = PostFilterConfig(channels=8, blocks=2, conditioned=conditioned)
        network = trained(config)
        with torch.no_grad():
            low, high = network(picture(qp=32)), network(picture(qp=44))
        assert torch.equal(low, high) is not conditioned


@pytest.mark.parametrize("half", [True, False])
def test_reach_is_where_the_input_stops_to_matter(half: bool) -> None:
    network = trained(PostFilterConfig(channels=4, blocks=2, half_resolution=half)).double()
    one = DecodedPicture(*(tensor.double() for tensor in picture(64, 64)))
    luma, plain = (tensor.clone().requires_grad_() for tensor in (one.luma, one.plain))
    chroma = one.chroma.clone().requires_grad_()
    shown = network(DecodedPicture(luma, chroma, plain, one.qp))
    shown[0, :, :, 0].sum().backward()
    seen = [g.abs().sum((0, 1, 3)).nonzero().max() for g in (plain.grad,) if g is not None]
    if half:
        assert luma.grad is not None
        assert chroma.grad is not None
        seen.append(luma.grad.abs().sum((0, 1, 3)).nonzero().max())
        seen.append(2 * chroma.grad.abs().sum((0, 1, 3)).nonzero().max() + 1)
    assert network.reach - 4 <= int(max(seen)) <= network.reach
    assert network.reach % 2 == 0


def test_the_fast_size_is_fast() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    one = picture(16, 16)
    costs = {}
    for size, config in SIZES.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            PostFilter(config)(one)
        costs[size] = counter.get_total_flops() / 2 / 16**2 / 1000
    assert costs["tiny"] < costs["fast"] <= 120
    assert costs["paper"] == pytest.approx(446, abs=1)


def test_shapes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="channels, blocks and corrections"):
        PostFilter(PostFilterConfig(channels=0))


def test_the_ensemble_is_the_mean_with_the_mirror_image() -> None:
    one = picture()
    mirror = DecodedPicture(one.luma.flip(-1), one.chroma.flip(-1), one.plain.flip(-1), one.qp)
    network = trained(SMALL)
    with torch.no_grad():
        both = (network(one) + network(mirror).flip(-1)) / 2
        assert torch.equal(network.ensemble(one), both)
        assert torch.allclose(network.ensemble(mirror).flip(-1), both, atol=1e-6)
        network = trained(dataclasses.replace(SMALL, mirrored=False))
        assert torch.equal(network.ensemble(one), network(one))
