import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import lightning_tucodec as tuc
from lightning_tucodec.cli import main
from lightning_tucodec.codecs.base import DEFAULT_MODEL
from lightning_tucodec.codecs.learned import latents
from lightning_tucodec.codecs.learned import refine as room
from lightning_tucodec.codecs.learned.codec import RefinedModel, TucModel, with_effort
from lightning_tucodec.codecs.learned.latents import Coded
from lightning_tucodec.codecs.learned.model_file import ModelFile, freeze
from lightning_tucodec.codecs.learned.refine import Refinement, refine
from lightning_tucodec.codecs.registry import codec
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.images import write_png
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.nn.losses import RateDistortionLoss, make_loss
from lightning_tucodec.quality.metrics import as_tensor
from lightning_tucodec.training.vae import resolve_codec
from tests.support import MICRO, photo

CARDS = {
    "mse": {"recipe": "mse", "lmbda": 200.0},
    "ssim": {"recipe": "ssim", "lmbda": 0.05},
}


def micro(recipe: str) -> ModelFile:
    torch.manual_seed(0)
    return freeze(TucodecVAE(resolve_codec("tiny", MICRO)), "micro", CARDS[recipe])


@pytest.fixture(scope="module", params=CARDS)
def model(request: pytest.FixtureRequest) -> TucModel:
    return TucModel(micro(request.param))


def loss_of(
    model: TucModel, loss: RateDistortionLoss, pixels: NDArray[np.uint8], coded: Coded
) -> float:
    """J of the real file, from the definition."""
    height, width = pixels.shape[:2]
    back = torch.from_numpy(model.decode(coded.data)).permute(2, 0, 1)[None] / 255
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    bpp = torch.tensor(8 * len(coded.data) / (height * width))
    return float(loss.total(loss.distortion(back, x), bpp))


def loss_for(model: TucModel) -> RateDistortionLoss:
    return make_loss(model.card["recipe"], model.card["lmbda"])


@pytest.mark.parametrize("size", [(75, 101), (16, 16)])
def test_refined_files_are_better_and_every_decoder_reads_them(
    model: TucModel, size: tuple[int, int]
) -> None:
    pixels = photo("chelsea.png", size[1], size[0])
    plain, refined = model.code(pixels), with_effort(model, 3).code(pixels)
    loss = loss_for(model)
    assert loss_of(model, loss, pixels, refined) < loss_of(model, loss, pixels, plain)
    shown = model.synthesise(refined.latents.y, size[1], size[0])
    np.testing.assert_array_equal(model.decode(refined.data), shown)
    assert 8 * len(refined.data) <= 1.02 * model.bits_of(refined.latents) + 8 * 32


def test_the_same_steps_give_the_same_file(model: TucModel) -> None:
    pixels = photo("coffee.png", 48, 40)
    assert model.compress(pixels, effort=2) == model.compress(pixels, effort=2)
    assert model.compress(pixels, effort=0) == model.compress(pixels)


def test_more_effort_is_not_worse() -> None:
    model = TucModel(micro("mse"))
    pixels, loss = photo("coffee.png", 64, 48), loss_for(model)
    values = [
        loss_of(model, loss, pixels, with_effort(model, e).code(pixels)) for e in (0, 1, 3, 5)
    ]
    # J is minimised on unrounded pixels and floating-point bits.
    assert all(later < 1.002 * earlier for earlier, later in pairwise(values))


def test_shipped_models_gain() -> None:
    names = [name for name, card in tuc.models().items() if card["recipe"] != "postfilter"]
    assert names
    for name in names:
        model = tuc.load(name)
        pixels, loss = photo("chelsea.png", 128, 96), model.loss
        plain, refined = model.code(pixels), with_effort(model, 4).code(pixels)
        rate = 8 * len(plain.data) / (128 * 96)
        _, weight = loss.weights
        gain = loss_of(model, loss, pixels, plain) - loss_of(model, loss, pixels, refined)
        assert gain > 0.02 * weight * rate


def test_what_is_minimised_is_the_loss(model: TucModel) -> None:
    """J of the starting point equals the recipe's loss of the network's own forward pass."""
    pixels = photo("chelsea.png", 64, 48)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    points = []
    original = room._Strip.evaluate

    def evaluate(self: room._Strip, y: torch.Tensor, z: torch.Tensor) -> room._Point:
        points.append(original(self, y, z))
        return points[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room._Strip, "evaluate", evaluate)
        refine(model, loss_for(model), pixels, model.analyse(pixels), steps=4)
    with torch.no_grad():
        output = model.network(x)
        expected = loss_for(model)(output._replace(x_hat=output.x_hat.clamp(0, 1)), x).loss
    assert points[0].loss == pytest.approx(float(expected), rel=2e-3)
    assert min(point.loss for point in points) < points[0].loss


def test_strips_and_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """With three strips, and several bands of g_s in each, the file is still better than the plain one."""
    monkeypatch.setattr(latents, "STRIP_POSITIONS", 64)
    monkeypatch.setattr(room, "_BAND_POSITIONS", 24)
    monkeypatch.setattr(room, "_HALO", 2)
    model = TucModel(micro("mse"))
    pixels, loss = photo("chelsea.png", 60, 300), loss_for(model)
    assert len(latents.strip_bounds(19, 4)) == 2
    assert len(room._bands(0, 16, 19, 4)) == 3
    plain, refined = model.code(pixels), with_effort(model, 2).code(pixels)
    assert loss_of(model, loss, pixels, refined) < loss_of(model, loss, pixels, plain)


def test_another_balance_of_rate_and_distortion() -> None:
    model = tuc.load(DEFAULT_MODEL)
    pixels = photo("coffee.png", 96, 64)
    sizes = [
        len(RefinedModel(model, Refinement(3, factor * model.card["lmbda"])).encode(pixels))
        for factor in (0.1, 1.0, 10.0)
    ]
    assert sizes[0] < sizes[1] < sizes[2]


def test_no_time_means_no_step() -> None:
    model = TucModel(micro("mse"))
    pixels = photo("coffee.png", 64, 48)
    assert RefinedModel(model, Refinement(9, seconds=0.0)).encode(pixels) == model.encode(pixels)


def test_images_too_small_to_judge_stay_as_they_are(model: TucModel) -> None:
    pixels = photo("coffee.png", 9, 40)
    assert model.compress(pixels, effort=5) == model.compress(pixels)


def test_specifications(tmp_path: Path) -> None:
    path = tmp_path / "micro.safetensors"
    micro("mse").save(path)
    coder = codec(f"{path}:effort=4,lmbda=150")
    assert coder.name == "micro:effort=4,lmbda=150"
    assert coder.describe()["options"]["refinement"] == {
        "steps": 10,
        "lmbda": 150.0,
        "seconds": None,
    }
    for text, message in (
        (f"{path}:effort=10", "effort=10 is not within 0 … 9"),
        (f"{path}:quality=3", "has one rate, and takes no quality"),
        (f"{path}:lmbda=3", f"lmbda needs effort, as in {path}:effort=…"),
        (f"{path}:q=3", "no option q; there are quality, of a model of several rates, effort"),
        (f"{path}:effort=1,lmbda=-3", "lmbda=-3"),
    ):
        with pytest.raises(ConfigError, match=message):
            codec(text)
    nameless = tuc.untrained("tiny")
    with pytest.raises(ConfigError, match="names no recipe"):
        with_effort(nameless, 1)
    assert with_effort(nameless, 0) is nameless


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "micro.safetensors"
    micro("mse").save(model)
    write_png(tmp_path / "a.png", photo("coffee.png", 64, 48))
    words = ["compress", str(tmp_path / "a.png"), "--model", str(model), "--json"]
    rows = []
    for effort in ("0", "3"):
        out = tmp_path / effort
        assert main([*words, "-o", str(out / "a.tuc"), "--effort", effort]) == 0
        rows.append(json.loads(capsys.readouterr().out))
        assert 8 * rows[-1]["bytes"] == pytest.approx(rows[-1]["estimated_bits"], abs=8 * 34)
        decoded = ["decompress", str(out / "a.tuc"), "-o", str(out), "--model", str(model)]
        assert main(decoded) == 0
        capsys.readouterr()
    loss = [200 * 10 ** (-row["psnr"] / 10) + row["bpp"] for row in rows]
    assert loss[1] < loss[0]
    with pytest.raises(SystemExit):
        main([*words, "-o", str(tmp_path / "x.tuc"), "--effort", "10"])


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "micro.safetensors"
    micro("mse").save(model)
    write_png(tmp_path / "a.png", photo("coffee.png", 64, 48))
    words = ["bench", "effort", str(tmp_path / "a.png"), "--model", str(model), "--effort", "2"]
    words += ["--seconds", "--rows", str(tmp_path / "rows.jsonl")]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["setting"] for row in rows] == ["effort=0", "effort=2"]
    assert rows[0]["loss_percent"] == 0 > rows[1]["loss_percent"]
    assert main(words) == 0
    assert "effort=2" in capsys.readouterr().out


def test_bands_add_up_to_the_whole() -> None:
    """J of a strip in three bands is J in one, up to what lies beyond the halo."""
    model = TucModel(micro("mse"))
    pixels = photo("chelsea.png", 24, 240, top=30)
    latents = model.analyse(pixels)
    losses = []
    for bands in ([(0, 15)], [(0, 5), (5, 11), (11, 15)]):
        strip = room._Strip(
            model.frozen_network,
            None,
            loss_for(model),
            as_tensor(pixels) / 255,
            model.centres,
            model.frozen_network.factorized_prior.medians()[:, None, None],
            torch.from_numpy(latents.y).long().permute(2, 0, 1)[None],
            0,
            len(latents.y),
        )
        assert strip.bands == [(0, 15)]
        strip.bands = bands
        point = strip.evaluate(strip.start, torch.from_numpy(latents.z[0]).long()[None])
        losses.append((point.loss, point.slope_y))
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-3)
    assert torch.allclose(losses[1][1], losses[0][1], atol=0.02 * float(losses[0][1].abs().max()))


def test_settings_that_differ_have_names_that_differ() -> None:
    names = [Refinement(1, lmbda=value).name for value in (256.00001, 256.00002, 256.0)]
    assert names[2].endswith("lmbda=256")
    assert len(set(names)) == 3
