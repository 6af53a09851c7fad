"""Transforms: sizes, the drawn shape of RNAB, the non-local block, cost of the presets."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_tucodec.nn.blocks import (
    GDN,
    NonLocalBlock,
    PixelShuffle,
    PixelUnshuffle,
    ResidualAttentionBlock,
    ResidualBlock,
    lower_bound,
)
from lightning_tucodec.nn.codec import PRESETS, CodecConfig, TucodecVAE
from lightning_tucodec.nn.transforms import AnalysisTransform, SynthesisTransform, TransformConfig
from lightning_tucodec.training.vae import resolve_codec
from tests.support import MICRO, photo


def narrow(config: CodecConfig) -> CodecConfig:
    """The same layers with widths that cost nothing."""
    transform = dataclasses.replace(
        config.transform,
        widths=tuple(4 if width else 0 for width in config.transform.widths),
        latent_channels=4,
        attention_mask_channels=config.transform.attention_mask_channels and 2,
    )
    hyper = dataclasses.replace(
        config.hyper, channels=4, latent_channels=3, out_channels=5, entropy_widths=(6, 6)
    )
    context = dataclasses.replace(config.context, channels=4, out_channels=5)
    return dataclasses.replace(config, transform=transform, hyper=hyper, context=context)


@pytest.fixture(scope="module", params=["paper", "fast", "tiny", "non_local"])
def any_network(request: pytest.FixtureRequest) -> TucodecVAE:
    """Every preset's layers, narrow; and the paper's with non-local blocks."""
    torch.manual_seed(0)
    config = narrow(PRESETS["paper" if request.param == "non_local" else request.param])
    if request.param == "non_local":
        config = dataclasses.replace(
            config, transform=dataclasses.replace(config.transform, non_local=True)
        )
    return TucodecVAE(config).eval()


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 31), (65, 16), (33, 130), (1, 1)])
def test_any_size(any_network: TucodecVAE, height: int, width: int) -> None:
    output = any_network(torch.rand(2, 3, height, width))
    h, w = -(-height // 16), -(-width // 16)
    assert output.x_hat.shape == (2, 3, height, width)
    assert output.y_likelihoods.shape == output.y.shape == output.index.shape == (2, 4, h, w)
    assert output.z_likelihoods.shape == (2, 3, -(-h // 4), -(-w // 4))
    for values in (output.x_hat, output.y_likelihoods, output.z_likelihoods):
        assert torch.isfinite(values).all()


@torch.no_grad()
@pytest.mark.parametrize("preset", ["paper", "fast", "tiny"])
def test_presets_as_they_are(preset: str) -> None:
    torch.manual_seed(0)
    network = TucodecVAE(PRESETS[preset]).eval()
    output = network(torch.rand(1, 3, 21, 37))
    assert output.x_hat.shape == (1, 3, 21, 37)
    bits_y, bits_z = output.bits()
    assert bits_y.shape == bits_z.shape == (1,)
    assert torch.isfinite(bits_y + bits_z).all()


@torch.no_grad()
@pytest.mark.parametrize("preset", ["paper", "fast", "tiny"])
def test_training_starts_from_sound_numbers(preset: str) -> None:
    """A photograph's latent spans a few centres, and the first picture is no explosion."""
    torch.manual_seed(0)
    network = TucodecVAE(PRESETS[preset]).eval()
    pixels = torch.from_numpy(photo("chelsea.png", 64, 64)).permute(2, 0, 1)[None]
    output = network(pixels.float() / 255)
    assert 0.5 < float(output.y.std()) < 8
    assert float(output.x_hat.std()) < 1
    assert float((output.x_hat - 0.5).abs().max()) < 5


def test_images_of_a_batch_do_not_touch_each_other(any_network: TucodecVAE) -> None:
    images = torch.rand(2, 3, 40, 24)
    with torch.no_grad():
        both = any_network(images).x_hat
        second = any_network(images[1:]).x_hat
    torch.testing.assert_close(both[1:], second, atol=1e-5, rtol=0)


def test_unfit_sides_are_refused() -> None:
    g_a = AnalysisTransform(narrow(PRESETS["tiny"]).transform)
    with pytest.raises(ValueError, match="multiples of 16"):
        g_a(torch.zeros(1, 3, 16, 24))


@pytest.mark.parametrize(
    "changes", [{"widths": (8, 0, 8, 8)}, {"widths": (0, 0, 8, 8)}, {"widths": (8, 8, 8, 0)}]
)
def test_stages_that_cannot_be_are_refused(changes: dict[str, tuple[int, ...]]) -> None:
    """The second asks for attention at the quarter resolution that it leaves out."""
    with pytest.raises(ValueError, match=r"left out|quarter"):
        dataclasses.replace(TransformConfig(), **changes)


def test_folded_transforms_are_pointwise_but_for_the_depthwise_taps() -> None:
    network = TucodecVAE(PRESETS["tiny"])
    for part in (network.g_a, network.g_s):
        for layer in convolutions(part):
            assert layer.kernel_size == (1, 1) or layer.groups == layer.in_channels


def convolutions(module: nn.Module) -> Iterator[nn.Conv2d | nn.ConvTranspose2d]:
    return (m for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d))


def test_attention_block_as_drawn() -> None:
    """Z19 Fig. 1: 3 RBs of data, 2 + Conv/2 + 2 + Up×2 + 2 + Conv of mask, all 3×3 and equally wide."""
    block = ResidualAttentionBlock(8)
    assert len(block.trunk) == 3
    mask = [*block.before, *block.inside, *block.after]
    counts = [sum(isinstance(m, ResidualBlock) for m in part.modules()) for part in mask]
    assert counts == [2, 0, 2, 0, 2, 0]
    strides = [next(convolutions(part)).stride for part in (block.inside[0], block.inside[2])]
    assert strides == [(2, 2), (2, 2)]
    assert isinstance(block.inside[2], nn.ConvTranspose2d)
    # 9 residual blocks of two convolutions, and down, up, and the last one.
    layers = list(convolutions(block))
    assert len(layers) == 9 * 2 + 3
    assert all(m.kernel_size == (3, 3) and m.in_channels == m.out_channels == 8 for m in layers)


def test_attention_block_computes_x_plus_gated_trunk() -> None:
    torch.manual_seed(0)
    block = ResidualAttentionBlock(4, non_local=True)
    x = torch.randn(1, 4, 9, 13)
    with torch.no_grad():
        mask = torch.sigmoid(block.after(block.inside(block.before(x))[..., :9, :13]))
        torch.testing.assert_close(block(x), x + block.trunk(x) * mask)
    assert isinstance(block.before[0], NonLocalBlock)


def test_paper_transforms_have_the_drawn_stages() -> None:
    g_a, g_s = AnalysisTransform(TransformConfig()), SynthesisTransform(TransformConfig())
    assert len(g_a.stages) == 4
    assert [branch.stride[0] for branch in g_a.branches] == [8, 4, 2]
    assert g_a.to_latent.in_channels == 4 * 192
    assert [sum(isinstance(m, GDN) for m in t.modules()) for t in (g_a, g_s)] == [3, 3]
    rnabs = [sum(isinstance(m, ResidualAttentionBlock) for m in t.modules()) for t in (g_a, g_s)]
    assert rnabs == [2, 2]
    assert all(m.inverse for m in g_s.modules() if isinstance(m, GDN))
    assert sum(isinstance(m, nn.ConvTranspose2d) and m.stride == (2, 2) for m in g_s.layers) == 4


class TestNonLocalBlock:
    def test_starts_as_the_identity(self) -> None:
        x = torch.randn(2, 6, 19, 33)
        assert torch.equal(NonLocalBlock(6)(x), x)

    @staticmethod
    def _random(window: int) -> NonLocalBlock:
        torch.manual_seed(1)
        block = NonLocalBlock(4, window)
        nn.init.normal_(block.out.weight)
        return block

    def test_sees_its_window_only(self) -> None:
        block = self._random(4)
        x = torch.randn(1, 4, 8, 8, requires_grad=True)
        (gradient,) = torch.autograd.grad(block(x)[0, :, 1, 2].sum(), x)
        reached = gradient[0].abs().sum(0) > 0
        expected = torch.zeros(8, 8, dtype=torch.bool)
        expected[:4, :4] = True
        assert torch.equal(reached, expected)

    def test_masks_the_padding(self) -> None:
        """A 3×5 plane in windows of 4 is attended to as if nothing else were there."""
        block = self._random(4)
        x = torch.randn(1, 4, 3, 5)
        with torch.no_grad():
            for columns in (slice(0, 4), slice(4, 5)):
                part = x[..., columns]
                theta, phi, g = (f(part).flatten(2)[0] for f in (block.theta, block.phi, block.g))
                attended = g @ torch.softmax(theta.T @ phi, dim=1).T
                expected = part + block.out(attended.view(1, 2, *part.shape[2:]))
                torch.testing.assert_close(block(x)[..., columns], expected)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_pixel_shuffles_invert_each_other(factor: int, h: int, w: int) -> None:
    x = torch.randn(2, 3, h * factor, w * factor)
    folded = PixelUnshuffle(factor)(x)
    assert torch.equal(folded, F.pixel_unshuffle(x, factor))
    assert torch.equal(PixelShuffle(factor)(folded), x)


def test_gdn_and_its_inverse() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 4, 4)
    gdn, igdn = GDN(3), GDN(3, inverse=True)
    norm = (1 + 0.1 * x.square()).sqrt()
    torch.testing.assert_close(gdn(x), x / norm, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(igdn(x), x * norm, atol=1e-5, rtol=1e-5)


def test_lower_bound_lets_values_come_back() -> None:
    def gradient(target: float) -> Tensor:
        x = torch.tensor([-1.0, 1.0], requires_grad=True)
        (lower_bound(x, 0.0) * target).sum().backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(lower_bound(torch.tensor([-1.0, 1.0]), 0.0), torch.tensor([0.0, 1.0]))
    assert torch.equal(gradient(1.0), torch.tensor([0.0, 1.0]))  # descent would lower it: no
    assert torch.equal(gradient(-1.0), torch.tensor([-1.0, -1.0]))  # descent raises it: yes


def test_fast_synthesis_stays_below_60_kmac_a_pixel() -> None:
    with torch.device("meta"):
        g_s = SynthesisTransform(PRESETS["fast"].transform)
        y_hat = torch.zeros(1, PRESETS["fast"].transform.latent_channels, 16, 16)
        with FlopCounterMode(display=False) as counter:
            g_s(y_hat)
    assert counter.get_total_flops() / 2 / 256**2 <= 60_000


@pytest.mark.parametrize(("preset", "limit"), [("paper", 2.5e6), ("fast", 1e6), ("tiny", 1e6)])
def test_entropy_weights_touched_a_step(preset: str, limit: float) -> None:
    """A decoding step runs the context and the entropy parameters; h_s runs once an image."""
    with torch.device("meta"):
        network = TucodecVAE(PRESETS[preset])
    assert network.context is not None
    parts = (network.context, network.entropy_parameters)
    assert sum(p.numel() for part in parts for p in part.parameters()) <= limit


def test_micro_is_tiny_made_small() -> None:
    network = TucodecVAE(resolve_codec("tiny", MICRO))
    assert sum(p.numel() for p in network.parameters()) < 100_000
