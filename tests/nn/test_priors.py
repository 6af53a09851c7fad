import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.nn.priors import (
    MAX_SCALE,
    MIN_SCALE,
    FactorizedPrior,
    LaplacePrior,
    laplace_interval,
)
from lightning_tucodec.nn.quantizer import ClusterQuantizer, NoiseQuantizer, RoundQuantizer
from lightning_tucodec.training.vae import resolve_codec
from tests.support import MICRO

gaps = st.integers(3, 200).flatmap(
    lambda n: arrays(np.float32, n, elements=st.floats(0.5, 5, width=32))
)


def cell_masses(centres: torch.Tensor, mu: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """P over all M cells."""
    edges = (centres[1:] + centres[:-1]) / 2
    infinity = torch.tensor([torch.inf])
    below = centres - torch.cat([-infinity, edges])
    above = torch.cat([edges, infinity]) - centres
    return LaplacePrior()(centres, below, above, mu, log_scale)


@given(gaps, st.floats(-300, 300), st.floats(-6, 6))
def test_cells_of_any_centres_sum_to_one(widths: np.ndarray, mu: float, log_scale: float) -> None:
    centres = torch.from_numpy(np.cumsum(widths, dtype=np.float64)).float()
    centres = centres - centres.mean()
    masses = cell_masses(centres, torch.tensor(mu), torch.tensor(log_scale))
    assert (masses >= 0).all()
    assert float(masses.double().sum()) == pytest.approx(1, abs=1e-6)


def test_unit_spacing_is_the_unit_bin_laplacian() -> None:
    """Z19 eq. 4: F(ŷ + ½) − F(ŷ − ½), here in double precision."""
    quantizer = RoundQuantizer()
    prior = LaplacePrior()
    y = torch.arange(-20.0, 21.0)
    for mu, scale in [(0.0, 1.0), (0.3, 0.1), (-2.7, 4.0), (5.5, 0.5)]:
        q = quantizer(y)
        got = prior(
            q.y_hat, q.below, q.above, torch.full_like(y, mu), torch.full_like(y, math.log(scale))
        )

        def cdf(x: np.ndarray, mu: float = mu, scale: float = scale) -> np.ndarray:
            t = (x - mu) / scale
            return np.where(t < 0, 0.5 * np.exp(np.minimum(t, 0)), 1 - 0.5 * np.exp(-np.abs(t)))

        exact = y.double().numpy()
        expected = cdf(exact + 0.5) - cdf(exact - 0.5)
        visible = expected > 1e-6
        np.testing.assert_allclose(got.numpy()[visible], expected[visible], rtol=2e-4)


def test_end_cells_are_open() -> None:
    centres = ClusterQuantizer(5).centres().detach()
    masses = cell_masses(centres, torch.tensor(50.0), torch.tensor(0.0))
    assert float(masses[-1]) == pytest.approx(1)
    masses = cell_masses(centres, torch.tensor(-50.0), torch.tensor(0.0))
    assert float(masses[0]) == pytest.approx(1)


def test_open_ends_have_finite_gradients() -> None:
    """An infinite edge times a zero density would be NaN, and one such symbol spoils every weight."""
    quantizer = ClusterQuantizer(5)
    y = torch.tensor([-9.0, -2.6, 0.3, 9.0], requires_grad=True)
    q = quantizer(y)
    mu, log_scale = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    mass = LaplacePrior()(q.y_hat, q.below, q.above, mu, log_scale)
    assert q.below[0] == q.above[3] == torch.inf
    mass.log2().sum().backward()
    for leaf in (y, mu, log_scale, quantizer.raw_gaps, quantizer.middle):
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
    assert log_scale.grad is not None
    assert (log_scale.grad[[0, 3]] != 0).all()


def test_noise_of_the_rate_proxy_fills_the_cell() -> None:
    """u ~ U(−δ⁺, δ⁻): the mass around y + u then averages over every place of the cell."""
    torch.manual_seed(0)
    quantizer = ClusterQuantizer(7)
    with torch.no_grad():
        quantizer.raw_gaps.copy_(torch.tensor([-1.0, 1.0, 0.0, 2.0, -2.0, 1.0]))
    centres = quantizer.centres().detach()
    for index in range(7):
        q = quantizer(centres[index].expand(4000))
        below, above = float(q.below[0].detach()), float(q.above[0].detach())
        # An open side counts as wide as the closed one.
        below, above = (min(side, other) if math.isinf(side) else side
                        for side, other in ((below, above), (above, below)))  # fmt: skip
        noise = (
            TucodecVAE._noisy(q.y_hat, torch.rand_like(q.y_hat), q.below, q.above) - q.y_hat
        ).detach()
        assert float(noise.min()) == pytest.approx(-above, abs=0.02)
        assert float(noise.max()) == pytest.approx(below, abs=0.02)
        assert float(noise.min()) >= -above - 1e-5
        assert float(noise.max()) <= below + 1e-5
        assert float(noise.mean()) == pytest.approx((below - above) / 2, abs=0.05)


@pytest.mark.parametrize("training", [True, False])
def test_likelihoods_of_the_network_are_float32_under_autocast(training: bool) -> None:
    torch.manual_seed(0)
    network = TucodecVAE(resolve_codec("tiny", MICRO)).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(torch.rand(1, 3, 32, 48))
    assert output.x_hat.dtype == torch.bfloat16
    for likelihoods in (output.y_likelihoods, output.z_likelihoods):
        assert likelihoods.dtype == torch.float32
        assert (likelihoods > 0).all()
        assert (likelihoods <= 1).all()


def test_interval_keeps_relative_precision_in_the_tails() -> None:
    mass = laplace_interval(torch.tensor(15.0), torch.tensor(16.0), torch.tensor(1.0))
    assert float(mass) == pytest.approx(0.5 * (math.exp(-15) - math.exp(-16)), rel=1e-5)


def test_scale_is_bounded_and_its_gradient_leads_back() -> None:
    for start, expected, sign in [(-20.0, MIN_SCALE, -1), (20.0, MAX_SCALE, 1)]:
        raw = torch.tensor(start, requires_grad=True)
        scale = LaplacePrior().scale(raw)
        assert float(scale.detach()) == pytest.approx(expected)
        (sign * scale).backward()  # descent on sign·scale moves it back inside
        assert raw.grad is not None
        assert float(raw.grad) * sign > 0


@pytest.mark.parametrize("proxy", ["straight_through", "noise"])
def test_rate_has_a_gradient_for_y_alone(proxy: str) -> None:
    """With z and context out of the graph, ∂R/∂y must still pull y towards the likely symbols."""
    torch.manual_seed(0)
    quantizer = ClusterQuantizer()
    y = torch.randn(4, 5) * 3
    y.requires_grad_()
    q = quantizer.train()(y)
    value = q.y_hat
    if proxy == "noise":
        value = y + torch.rand_like(y) * (q.above + q.below) - q.above
    mu = torch.full_like(y, 0.3)  # not a centre: on a symmetric cell the rate is flat
    mass = LaplacePrior()(value, q.below, q.above, mu, torch.zeros_like(y))
    (-mass.log2().sum()).backward()
    assert y.grad is not None
    assert (y.grad.abs() > 0).all()
    assert float((y.grad * y.detach()).sum()) > 0


def test_noise_quantiser_adds_noise_in_training_and_rounds_otherwise() -> None:
    torch.manual_seed(0)
    y = torch.randn(2000) * 4
    noisy = NoiseQuantizer().train()(y).y_hat - y
    assert float(noisy.abs().max()) <= 0.5
    assert abs(float(noisy.mean())) < 0.03
    assert torch.equal(NoiseQuantizer().eval()(y).y_hat, RoundQuantizer().eval()(y).y_hat)


@pytest.fixture(scope="module")
def factorized() -> FactorizedPrior:
    torch.manual_seed(1)
    prior = FactorizedPrior(6)
    for parameter in prior.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return prior.eval()


@torch.no_grad()
def test_factorised_cdf_is_monotone_and_bins_sum_to_one(factorized: FactorizedPrior) -> None:
    points = torch.linspace(-300, 300, 601).expand(6, 1, -1)
    assert (factorized.logits(points).diff(dim=-1) > 0).all()
    integers = torch.arange(-400.0, 401.0).expand(1, 6, 1, -1)
    total = factorized.likelihood(integers).sum((0, 2, 3))
    torch.testing.assert_close(total, torch.ones(6), atol=1e-3, rtol=0)


@torch.no_grad()
def test_factorised_medians_halve_the_mass(factorized: FactorizedPrior) -> None:
    medians = factorized.medians()
    assert torch.equal(medians * 256, (medians * 256).round())
    step = 1 / 256
    for shift, sign in [(-step, -1), (step, 1)]:
        logits = factorized.logits((medians + shift)[:, None, None])
        assert (sign * logits >= 0).all()


@torch.no_grad()
def test_factorised_likelihood_at_an_exact_median() -> None:
    """Both logits cancel there; the mass must not."""
    prior = FactorizedPrior(1)
    for bias in prior.biases:
        bias.zero_()
    z = torch.zeros(1, 1, 1, 1)
    assert float(prior.likelihood(z)) > 0.01


def test_probabilities_stay_float32_under_autocast(factorized: FactorizedPrior) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = torch.zeros(1, 6, 2, 2, dtype=torch.bfloat16)
        assert factorized.likelihood(half).dtype == torch.float32
        assert ClusterQuantizer()(half).y_hat.dtype == torch.float32
        far = torch.full_like(half, 0.5)
        assert LaplacePrior()(half, far, far, half, half).dtype == torch.float32
