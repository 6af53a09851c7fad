"""Causality of the context model, proved on Jacobians, and TapConv2d against masked convolutions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.nn.context import (
    HORIZONTAL_TAPS,
    VERTICAL_INPUT_TAPS,
    VERTICAL_TAPS,
    CausalContext,
    ContextConfig,
    Tap,
    TapConv2d,
)
from lightning_tucodec.training.vae import resolve_codec
from tests.support import MICRO

HEIGHT, WIDTH = 4, 7


def dependence(network: nn.Module, channels: int) -> torch.Tensor:
    """Whether any output at (i, j) depends on any input at (k, l): bool h×w×h×w."""
    torch.manual_seed(2)
    x = torch.randn(1, channels, HEIGHT, WIDTH, dtype=torch.float64)
    network = network.double()
    jacobian = torch.func.jacrev(lambda v: network(v).abs().sum(1)[0])(x)
    return jacobian[:, :, 0].abs().sum(2) > 0


def earlier() -> torch.Tensor:
    """Whether (k, l) may be read at (i, j): Δj + 3·Δi ≤ −1."""
    i, j = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    diagonal = j + 3 * i
    return diagonal[None, None] - diagonal[:, :, None, None] <= -1


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("point_blocks", [False, True])
def test_every_output_depends_on_earlier_diagonals_only(levels: int, point_blocks: bool) -> None:
    torch.manual_seed(levels)
    context = CausalContext(3, ContextConfig(4, levels, point_blocks, 5))
    for parameter in context.parameters():  # biases too, so that nothing is hidden by a zero
        nn.init.normal_(parameter, std=0.5)
    reached = dependence(context, 3)
    assert not (reached & ~earlier()).any()
    # The rule is used to its edge: left neighbour, and two to the right in the row above.
    assert reached[2, 3, 2, 2]
    assert reached[2, 3, 1, 5]
    assert not reached[2, 3, 1, 6]


def test_the_whole_entropy_path_is_causal() -> None:
    """μ and log b at a position, through context and entropy parameters together."""
    torch.manual_seed(0)
    network = TucodecVAE(resolve_codec("tiny", MICRO)).double().eval()
    z_hat = torch.randn(1, 4, 1, 2, dtype=torch.float64)

    class Parameters(nn.Module):
        def forward(self, y_hat: torch.Tensor) -> torch.Tensor:
            return torch.cat(network.parameters_of(z_hat, y_hat), dim=1)

    reached = dependence(Parameters(), 8)
    assert not (reached & ~earlier()).any()
    assert reached.any()


@pytest.mark.parametrize(
    ("tap", "reach"), [((0, 1), 0), ((-1, 4), 0), ((1, -2), 0), ((0, 0), -1), ((-1, 3), -1)]
)
def test_a_forbidden_tap_is_refused(tap: Tap, reach: int) -> None:
    with pytest.raises(ValueError, match="not decoded yet"):
        TapConv2d(1, 1, ((0, -1), tap), reach)


@given(
    st.lists(
        st.sampled_from(
            [(di, dj) for di in (-2, -1, 0) for dj in range(-3, 4) if dj + 3 * di <= 0]
        ),
        min_size=1,
        unique=True,
    ),
    st.integers(0, 2**32),
)
def test_equals_a_masked_convolution(taps: list[Tap], seed: int) -> None:
    torch.manual_seed(seed)
    layer = TapConv2d(2, 3, taps).double()
    nn.init.normal_(layer.bias)
    kernel = torch.zeros(3, 2, 5, 7, dtype=torch.float64)
    for number, (di, dj) in enumerate(taps):
        kernel[:, :, 2 + di, 3 + dj] = layer.weight[:, :, number].detach()
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, kernel, layer.bias, padding=(2, 3)))


def test_the_taps_are_those_of_the_figure() -> None:
    assert len(VERTICAL_INPUT_TAPS) == 10
    assert set(HORIZONTAL_TAPS) < set(VERTICAL_TAPS)
