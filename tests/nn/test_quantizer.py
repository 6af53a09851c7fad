"""Quantisers: assignment, the soft sum, gradients, the baselines."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from lightning_tucodec.nn.codec import CodecConfig
from lightning_tucodec.nn.noise import Noise
from lightning_tucodec.nn.priors import LaplacePrior
from lightning_tucodec.nn.quantizer import (
    ClusterQuantizer,
    CompandedQuantizer,
    NoiseQuantizer,
    QuantizerKind,
    RoundQuantizer,
    make_quantizer,
)


def learned(raw: np.ndarray, middle: float = 0.0, hardness: float = 2.0) -> ClusterQuantizer:
    """A quantiser whose raw gaps were learned to be `raw`."""
    quantizer = ClusterQuantizer(len(raw) + 1, hardness)
    with torch.no_grad():
        quantizer.raw_gaps.copy_(torch.from_numpy(raw))
        quantizer.middle.fill_(middle)
    return quantizer


gaps = st.integers(4, 60).flatmap(
    lambda n: arrays(np.float32, n, elements=st.floats(-4, 4, width=32))
)


@given(gaps, st.floats(-3, 3), st.sampled_from([1.0, 2.0, 5.0]), st.integers(0, 2**32))
def test_soft_sum_by_tables_equals_the_written_one(
    raw: np.ndarray, middle: float, hardness: float, seed: int
) -> None:
    quantizer = learned(raw, middle, hardness)
    centres = quantizer.centres().detach()
    generator = torch.Generator().manual_seed(seed)
    span = float(centres[-1] - centres[0])
    y = centres[0] - 5 + torch.rand(200, generator=generator) * (span + 10)
    y = torch.cat([y, centres, (centres[1:] + centres[:-1]) / 2])
    found = quantizer.soft(y, quantizer.assign(y)[1])
    exact = centres.double()
    distance = (y.double()[:, None] - exact).abs()
    full = (torch.softmax(-quantizer.sigma(centres).double() * distance, -1) * exact).sum(-1)
    # Single precision rounds a centre's value itself to 2^-24 of its size.
    tolerance = 1e-5 + 2.0**-22 * float(centres.abs().max())
    assert float((found.double() - full).abs().max().detach()) <= tolerance


@pytest.mark.parametrize("spread", [0.0, 3.0, 40.0])
def test_gradients_of_the_soft_sum_of_200_centres(spread: float) -> None:
    """Of y and of all gaps, against eq. 2 as it is written, in double precision; gaps from 0.4 to 40."""
    generator = torch.Generator().manual_seed(0)
    raw = spread * torch.rand(199, generator=generator) ** 4 - 1
    quantizer = learned(raw.numpy(), middle=0.3)
    y = quantizer.centres().detach().repeat(20)
    y = (y + torch.randn(y.shape, generator=generator)).requires_grad_()
    weight = torch.randn(y.shape, generator=generator)
    (weight * quantizer.soft(y, quantizer.assign(y)[1])).sum().backward()
    assert y.grad is not None
    assert quantizer.raw_gaps.grad is not None

    exact_y = y.detach().double().requires_grad_()
    gaps = torch.nn.functional.softplus(quantizer.raw_gaps.detach().double()) + quantizer.min_gap
    gaps.requires_grad_()
    below, above = -gaps[:100].flip(0).cumsum(0).flip(0), gaps[100:].cumsum(0)
    centres = torch.cat([below, gaps.new_zeros(1), above]) + 0.3
    sigma = quantizer.hardness / (centres.detach().diff().mean())
    soft = torch.softmax(-sigma * (exact_y[:, None] - centres).abs(), -1) @ centres
    (weight.double() * soft).sum().backward()
    assert exact_y.grad is not None
    assert gaps.grad is not None
    torch.testing.assert_close(y.grad.double(), exact_y.grad, atol=1e-4, rtol=1e-3)
    slope = torch.sigmoid(quantizer.raw_gaps.detach().double())
    torch.testing.assert_close(
        quantizer.raw_gaps.grad.double(), slope * gaps.grad, atol=2e-3, rtol=1e-3
    )


@given(gaps, st.floats(-3, 3), st.integers(0, 2**32))
def test_hard_forward_is_the_nearest_centre(raw: np.ndarray, middle: float, seed: int) -> None:
    quantizer = learned(raw, middle)
    centres = quantizer.centres().detach()
    y = 40 * torch.randn(300, generator=torch.Generator().manual_seed(seed))
    for training in (True, False):
        quantized = quantizer.train(training)(y)
        nearest = (y[:, None] - centres).abs().min(1).values
        torch.testing.assert_close((y - centres[quantized.index]).abs(), nearest)
        torch.testing.assert_close(quantized.y_hat.detach(), centres[quantized.index])
        inside = (y >= quantized.y_hat - quantized.below - 1e-4) & (
            y <= quantized.y_hat + quantized.above + 1e-4
        )
        assert inside.all()


def test_centres_start_on_the_integers() -> None:
    centres = ClusterQuantizer(200).centres()
    torch.testing.assert_close(centres, torch.arange(-100.0, 100.0), atol=1e-4, rtol=0)
    assert torch.equal(RoundQuantizer(200).centres(), torch.arange(-100.0, 100.0))


@given(arrays(np.float32, 20, elements=st.floats(-100, 100, width=32)))
def test_gaps_have_a_minimum(raw: np.ndarray) -> None:
    quantizer = learned(raw)
    assert float(quantizer.centres().detach().diff().min()) >= quantizer.min_gap - 1e-4


def test_gradient_reaches_y_and_the_centres() -> None:
    quantizer = ClusterQuantizer(9)
    y = torch.tensor([-30.0, -4.3, -0.4, 0.2, 2.7, 3.4, 50.0], requires_grad=True)
    quantizer(y).y_hat.sum().backward()
    assert y.grad is not None
    assert (y.grad > 0).all()
    assert float(y.grad[0]) >= 0.9  # beyond the ends the soft sum alone would be flat
    assert float(y.grad[-1]) >= 0.9
    assert quantizer.raw_gaps.grad is not None
    assert (quantizer.raw_gaps.grad != 0).any()


def test_sigma_times_gap_is_the_hardness() -> None:
    quantizer = learned(np.linspace(-1, 2, 30, dtype=np.float32), hardness=3.0)
    centres = quantizer.centres().detach()
    product = float((quantizer.sigma(centres) * centres.diff().mean()).detach())
    assert product == pytest.approx(3.0, rel=1e-5)


def test_no_gradient_is_built_outside_training() -> None:
    quantizer = ClusterQuantizer(9).eval()
    y = torch.zeros(3, requires_grad=True)
    assert torch.equal(quantizer(y).y_hat, quantizer.centres()[quantizer(y).index])
    with torch.no_grad():
        assert not quantizer.train()(y).y_hat.requires_grad


def test_rounding() -> None:
    quantizer = RoundQuantizer(9)
    y = torch.tensor([-30.0, -1.2, 0.4, 2.6, 9.0], requires_grad=True)
    quantized = quantizer(y)
    assert quantized.y_hat.tolist() == [-4, -1, 0, 3, 4]
    assert quantized.below.tolist() == [np.inf, 0.5, 0.5, 0.5, 0.5]
    assert quantized.above.tolist() == [0.5, 0.5, 0.5, 0.5, np.inf]
    quantized.y_hat.sum().backward()
    assert y.grad is not None
    assert torch.equal(y.grad, torch.ones(5))


def test_noise() -> None:
    torch.manual_seed(0)
    quantizer = NoiseQuantizer(9)
    y = torch.full((20_000,), 0.3)
    noise = quantizer(y).y_hat - y
    assert float(noise.min()) >= -0.5
    assert float(noise.max()) <= 0.5
    assert abs(float(noise.mean())) < 0.01
    assert float(noise.var()) == pytest.approx(1 / 12, rel=0.03)
    assert torch.equal(quantizer.eval()(y).y_hat, torch.zeros_like(y))


def test_the_recipe_names_the_quantizer() -> None:
    kinds = {
        "centres": ClusterQuantizer, "companded": CompandedQuantizer, "round": RoundQuantizer,
        "noise": NoiseQuantizer,
    }  # fmt: skip
    for kind, expected in kinds.items():
        assert type(make_quantizer(kind, 9, 2.0)) is expected  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantizer 'floor' is unknown"):
        CodecConfig(quantizer="floor")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 3 centres"):
        ClusterQuantizer(2)


def companded(raw: np.ndarray) -> CompandedQuantizer:
    quantizer = CompandedQuantizer(len(raw) + 1)
    with torch.no_grad():
        quantizer.raw_gaps.copy_(torch.from_numpy(raw))
    return quantizer


def test_companding_with_unit_gaps_is_additive_noise() -> None:
    quantizer = CompandedQuantizer(60)
    y = 20 * torch.randn(2000, generator=torch.Generator().manual_seed(0))  # some beyond the ends
    torch.manual_seed(1)
    quantized = quantizer(y)
    torch.manual_seed(1)
    torch.testing.assert_close(quantized.y_hat, NoiseQuantizer(60)(y).y_hat, atol=1e-4, rtol=0)
    half = torch.full_like(y, 0.5)
    torch.testing.assert_close(quantized.below, half, atol=1e-4, rtol=0)
    torch.testing.assert_close(quantized.above, half, atol=1e-4, rtol=0)
    rounded, expected = quantizer.eval()(y), RoundQuantizer(60)(y)
    assert torch.equal(rounded.index, expected.index)


@given(gaps, st.integers(0, 2**32))
def test_companded_cells_are_rounding_and_voronoi_cells(raw: np.ndarray, seed: int) -> None:
    quantizer = companded(raw).eval()
    centres = quantizer.centres().detach()
    half = quantizer.count // 2
    assert float(centres[half]) == 0
    y = 40 * torch.randn(300, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        quantized = quantizer(y)
        t = quantizer.compress(y)
        tolerance = 1e-5 * float(1 + centres.abs().max())
        torch.testing.assert_close(quantizer.expand(t), y, atol=tolerance, rtol=1e-5)
        # An edge is midway between its centres, so that φ takes the edges of rounding there.
        edges = quantizer.expand(torch.arange(quantizer.count - 1) - half + 0.5)
    torch.testing.assert_close(edges, (centres[1:] + centres[:-1]) / 2, atol=tolerance, rtol=0)
    torch.testing.assert_close((y - quantized.y_hat).abs(), (y[:, None] - centres).abs().min(1)[0])
    inside = (t - t.floor() - 0.5).abs() > 1e-3
    rounded = (t.round().long() + half).clamp(0, quantizer.count - 1)
    assert torch.equal(quantized.index[inside], rounded[inside])


@given(gaps, st.floats(-3, 3), st.floats(-1, 2))
def test_companded_intervals_tile_the_line_at_any_offset(
    raw: np.ndarray, mu: float, log_scale: float
) -> None:
    """So what training charges is a probability: summed over shifts by whole centres it is one."""
    quantizer = companded(raw)
    steps = torch.arange(-400.0, 400.0) + 0.3
    with torch.no_grad():
        low, middle, high = (quantizer.expand(steps + d) for d in (-0.5, 0.0, 0.5))
        parameters = torch.tensor(mu), torch.tensor(log_scale)
        mass = LaplacePrior()(middle, middle - low, high - middle, *parameters)
    assert float(mass.sum()) == pytest.approx(1, abs=1e-3)


def test_companding_learns_its_gaps_from_distortion_and_from_rate() -> None:
    """By the gradient of a known loss: with the same noise it equals a difference quotient."""
    quantizer = companded(np.linspace(-1, 1, 20, dtype=np.float32))
    y = 4 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    target = 1.1 * y
    y.requires_grad_()

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        q = quantizer(y)
        zero = torch.zeros(())
        rate = -LaplacePrior()(q.y_hat, q.below, q.above, zero, zero).log().mean()
        return rate + (q.y_hat - target).square().mean()

    loss().backward()
    assert y.grad is not None
    assert quantizer.raw_gaps.grad is not None
    for parameter, place in ((quantizer.raw_gaps, 9), (quantizer.raw_gaps, 11), (y, 7)):
        assert parameter.grad is not None
        values = []
        for step in (0.01, -0.01):
            with torch.no_grad():
                parameter.view(-1)[place] += step
            values.append(float(loss().detach()))
            with torch.no_grad():
                parameter.view(-1)[place] -= step
        slope = (values[0] - values[1]) / 0.02
        assert float(parameter.grad[place]) == pytest.approx(slope, rel=0.1, abs=3e-4)


@pytest.mark.parametrize("kind", [ClusterQuantizer, CompandedQuantizer])
def test_float32_under_autocast(kind: type[ClusterQuantizer | CompandedQuantizer]) -> None:
    quantizer = kind(9)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(torch.randn(4).bfloat16())
    assert all(t.dtype == torch.float32 for t in quantized if t.is_floating_point())


@pytest.mark.parametrize("kind", ["centres", "companded"])
def test_gradients_have_the_same_bits_on_several_threads(kind: QuantizerKind) -> None:
    """Most values share a few centres, whose gradients all threads would add up in any order."""
    torch.manual_seed(0)
    quantizer = make_quantizer(kind, 200, 2.0).train()
    y, weight = 2 * torch.randn(400_000), torch.randn(400_000)
    noise = Noise.of(0, torch.arange(1))

    def gradients() -> Tensor:
        quantizer.zero_grad()
        found = quantizer(y[None], noise)
        (
            weight * (found.y_hat + found.below.clamp(-9, 9) + found.above.clamp(-9, 9))
        ).sum().backward()
        return torch.cat([p.grad.flatten() for p in quantizer.parameters() if p.grad is not None])

    threads = torch.get_num_threads()
    expected = gradients()
    torch.set_num_threads(4)
    try:
        assert all(torch.equal(gradients(), expected) for _ in range(8))
    finally:
        torch.set_num_threads(threads)
