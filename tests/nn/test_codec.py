import dataclasses
import json

import pytest
import torch
from compressai.losses import RateDistortionLoss

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.nn.codec import (
    PRESETS,
    CodecConfig,
    CodecOutput,
    TucodecVAE,
    config_from_dict,
    config_to_dict,
)
from lightning_tucodec.nn.levels import RateLevels
from lightning_tucodec.nn.losses import (
    CompressAIMSELoss,
    MSERateLoss,
    MSSSIMRateLoss,
    make_loss,
)
from lightning_tucodec.nn.losses import RateDistortionLoss as OurLoss
from lightning_tucodec.training.vae import resolve_codec
from tests.support import MICRO


@pytest.fixture(scope="module")
def micro() -> TucodecVAE:
    torch.manual_seed(0)
    return TucodecVAE(resolve_codec("tiny", MICRO)).eval()


@pytest.mark.parametrize("size", [(16, 16), (17, 33), (40, 31), (1, 1)])
@torch.no_grad()
def test_any_size(micro: TucodecVAE, size: tuple[int, int]) -> None:
    output = micro(torch.rand(2, 3, *size))
    assert output.x_hat.shape == (2, 3, *size)
    assert output.y.shape[-2:] == tuple(-(-side // 16) for side in size)
    for bits in output.bits():
        assert bits.shape == (2,)
        assert (bits > 0).all()


@torch.no_grad()
def test_dictionary_form_runs_in_compressais_loss(micro: TucodecVAE) -> None:
    x = torch.rand(2, 3, 32, 48)
    output = micro(x)
    theirs = RateDistortionLoss(lmbda=0.01)(output.as_dict(), x)
    ours = MSERateLoss(0.01 * 255**2)(output, x)
    torch.testing.assert_close(theirs["bpp_loss"], ours.bpp_y + ours.bpp_z)
    torch.testing.assert_close(theirs["loss"], ours.loss)


def output_with(x_hat: torch.Tensor, likelihood: float) -> CodecOutput:
    y = torch.full((1, 4, 2, 2), likelihood)
    z = torch.full((1, 2, 1, 1), 1.0)
    return CodecOutput(x_hat, y, z, y, torch.zeros(1, 4, 2, 2, dtype=torch.int64))


def test_loss_conventions_by_hand() -> None:
    x = torch.zeros(1, 3, 32, 32)
    output = output_with(x + 0.1, 0.25)  # MSE 0.01; 16 symbols of 2 bits over 1,024 pixels
    assert float(MSERateLoss(4096.0)(output, x).loss) == pytest.approx(40.96 + 0.03125)
    image = torch.rand(1, 3, 192, 192)
    terms = MSSSIMRateLoss(0.4)(output_with(image, 0.25), image)
    assert float(terms.distortion) == pytest.approx(0, abs=1e-6)
    assert float(terms.loss) == pytest.approx(0.4 * 32 / 192**2, abs=1e-6)


@pytest.mark.parametrize(("recipe", "lmbda"), [("psnr", 1.0), ("ssim", 0.0), ("ssim", -1.0)])
def test_unknown_losses_are_refused(recipe: str, lmbda: float) -> None:
    with pytest.raises(ConfigError):
        make_loss(recipe, lmbda)


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    network = TucodecVAE(resolve_codec("tiny", MICRO)).train()
    x = torch.rand(2, 3, 64, 64)
    MSERateLoss(500.0)(network(x), x).loss.backward()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_latent_and_rate_keep_their_precision_under_autocast(micro: TucodecVAE) -> None:
    """bfloat16 holds 8 bits: a y or a μ of 100 would be off by half a centre's distance."""
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    y_hat = 100 * torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = micro(x)
        mu, log_scale = micro.parameters_of(torch.zeros(2, 4, 1, 1), y_hat)
        terms = MSERateLoss(500.0)(output, x)
    for value in (output.y, mu, log_scale):
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.bfloat16().float())
    for likelihoods in (output.y_likelihoods, output.z_likelihoods):
        assert likelihoods.dtype == torch.float32
    assert terms.loss.dtype == terms.mse.dtype == torch.float32


@pytest.mark.parametrize(
    "overrides",
    [
        {"context.channels": 0},
        {"hyper.as_drawn": True},
        {"quantizer": "round"},
        {"quantizer": "companded"},
        {"quantizer": "noise", "rate_proxy": "straight_through"},
        {"transform.non_local": True},
        {"transform.attention_latent": False},
        {"context.levels": 2, "context.point_blocks": False},
    ],
)
def test_variants_train_and_code(overrides: dict[str, object]) -> None:
    torch.manual_seed(0)
    network = TucodecVAE(resolve_codec("tiny", {**MICRO, **overrides})).train()
    x = torch.rand(1, 3, 48, 32)
    loss = MSERateLoss(500.0)(network(x), x).loss
    loss.backward()
    assert torch.isfinite(loss.detach())


@pytest.mark.parametrize("kind", ["centres", "companded", "round", "noise"])
def test_hard_symbols_in_training_are_the_coders(kind: str) -> None:
    torch.manual_seed(0)
    overrides = {**MICRO, "quantizer": kind, "rate_proxy": "hard"}
    network = TucodecVAE(resolve_codec("tiny", overrides))
    y = 3 * torch.randn(2, 8, 8, 8)
    coded = network.eval().rate(y)[0]
    network.train()
    quantized, y_likelihoods, _ = network.rate(y)
    for mine, theirs in zip(quantized, coded, strict=True):
        assert torch.equal(mine, theirs)
    z_hat = torch.zeros(2, 4, 2, 2)
    parameters = network.parameters_of(z_hat, quantized.y_hat)
    network.eval()
    expected = network.prior(*(t for t in (coded.y_hat, coded.below, coded.above)), *parameters)
    assert y_likelihoods.shape == expected.shape
    assert not network.rate(y)[0].index.is_floating_point()


def test_config_survives_json() -> None:
    for config in PRESETS.values():
        assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    assert dataclasses.is_dataclass(CodecConfig)


def test_a_part_can_be_named_with_dots_or_as_a_mapping() -> None:
    dotted = resolve_codec("tiny", {"hyper.channels": 32, "transform.widths": [0, 0, 64, 96]})
    assert (
        resolve_codec("tiny", {"hyper": {"channels": 32}, "transform.widths": (0, 0, 64, 96)})
        == dotted
    )
    # as `fit --model.codec.hyper.channels 32` hands it on
    words = {"hyper": {"channels": "32"}, "transform": {"widths": "[0, 0, 64, 96]"}}
    assert resolve_codec("tiny", words) == dotted


@pytest.mark.parametrize("name", ["contxt.channels", "centers", "context.width"])
def test_unknown_fields_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name.split(".")[-1]):
        resolve_codec("tiny", {name: 3})
    with pytest.raises(ConfigError, match="huge"):
        resolve_codec("huge")


@pytest.mark.parametrize("recipe", ["mse", "ssim", "compressai-mse", "compressai-ms-ssim"])
def test_the_images_of_a_batch_have_the_distortions_that_each_has_alone(recipe: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 3, 192, 200)
    x_hat = (x + torch.tensor([0.01, 0.1, 0.3])[:, None, None, None] * torch.randn_like(x)).clamp(
        0, 1
    )
    loss = make_loss(recipe, 0.3)
    together = loss.distortion(x_hat, x, each=True)
    alone = [loss.distortion(a[None], b[None]) for a, b in zip(x_hat, x, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(together.mean(), loss.distortion(x_hat, x), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("loss", [MSERateLoss(100.0), MSSSIMRateLoss(0.3), CompressAIMSELoss(0.01)])
def test_each_image_has_the_balance_of_its_level(loss: OurLoss) -> None:
    """The batch's loss is the mean of the images', each by the loss of its level and its weight."""
    torch.manual_seed(0)
    x = torch.rand(3, 3, 192, 192)
    network = TucodecVAE(resolve_codec("tiny", {**MICRO, "levels": 5})).eval()
    levels = network.levels
    assert levels is not None
    level = torch.tensor([0.0, 1.75, 4.0])
    with torch.no_grad():
        together = loss.at_levels(network(x, level=level), x, levels.factor(level))
        alone = [
            loss.scaled(levels.factor(one))(network(x[n : n + 1], level=one), x[n : n + 1]).loss
            * levels.factor(one) ** -0.6
            for n, one in enumerate(level.tolist())
        ]
        if isinstance(loss, MSSSIMRateLoss):  # D + (λ/f)·R is (f·D + λ·R) / f
            alone = [
                value * factor for value, factor in zip(alone, levels.factor(level), strict=True)
            ]
    assert float(together.loss) == pytest.approx(float(torch.stack(alone).mean()), rel=1e-5)


def test_gains_between_levels_are_geometric_means() -> None:
    levels = RateLevels(3, 4.0, channels=2, biases=5)
    with torch.no_grad():
        levels.bias.copy_(torch.arange(15.0).reshape(3, 5))
    at = torch.tensor([0.0, 0.5, 1.0, 2.0])
    gains = levels.gain(at)[:, 0, 0, 0].tolist()
    assert gains == pytest.approx([0.5, 0.5**0.5, 1, 2])
    assert (levels.gain(at) * levels.inverse(at)).flatten().tolist() == pytest.approx([1] * 8)
    assert levels.biases(at)[1, :, 0, 0].tolist() == pytest.approx([2.5, 3.5, 4.5, 5.5, 6.5])


def test_a_codec_of_one_rate_is_described_as_before() -> None:
    """So that ids of models and runs stay."""
    plain = config_to_dict(resolve_codec("tiny"))
    assert "levels" not in plain
    assert config_from_dict(plain) == resolve_codec("tiny")
    several = resolve_codec("tiny", {"levels": 7, "level_ratio": 3.0})
    assert config_from_dict(config_to_dict(several)) == several
    for wrong in ({"levels": 0}, {"levels": -1}):
        with pytest.raises(ConfigError, match="levels"):
            resolve_codec("tiny", wrong)
    with pytest.raises(ValueError, match="ratio"):
        TucodecVAE(resolve_codec("tiny", {**MICRO, "levels": 2, "level_ratio": 1.0}))
