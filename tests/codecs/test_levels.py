"""A variable-rate network of our own: one model file, and the level in each coded file."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_tucodec.bench import codec, effort
from lightning_tucodec.bench.codec import subjects_of
from lightning_tucodec.bench.effort import _loss_percent
from lightning_tucodec.cli import main
from lightning_tucodec.codecs import library, registry
from lightning_tucodec.codecs.learned import latents as layout
from lightning_tucodec.codecs.learned.codec import RefinedModel, TucModel
from lightning_tucodec.codecs.learned.model_file import ModelFile, freeze
from lightning_tucodec.codecs.learned.refine import Refinement
from lightning_tucodec.coding.container import pack, quality_of, unpack
from lightning_tucodec.errors import (
    ConfigError,
    CorruptStreamError,
    ModelFileError,
    UnknownModelError,
    UnsupportedVersionError,
)
from lightning_tucodec.io.images import write_png
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.training.vae import resolve_codec
from tests.support import MICRO, photo

PIXELS = photo("chelsea.png", 96, 75)


@pytest.fixture(scope="module")
def network() -> TucodecVAE:
    torch.manual_seed(0)
    network = TucodecVAE(resolve_codec("tiny", {**MICRO, "levels": 3, "level_ratio": 8.0}))
    assert network.levels is not None
    with torch.no_grad():  # as training leaves them
        network.levels.bias.normal_(std=0.3)
        network.levels.log_gain.add_(0.2 * torch.randn_like(network.levels.log_gain))
    return network


@pytest.fixture(scope="module")
def file(network: TucodecVAE) -> ModelFile:
    return freeze(network, "micro", {"recipe": "mse", "lmbda": 100.0})


@pytest.fixture
def saved(file: ModelFile, tmp_path: Path) -> Path:
    path = tmp_path / "micro.safetensors"
    file.save(path)
    return path


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0, 1.23, 2.0])
def test_any_decoder_of_the_model_shows_what_the_encoder_knows(
    file: ModelFile, level: float
) -> None:
    """The decoder's own level does not matter: that of the file does."""
    model = TucModel(file).at(level)
    coded = model.code(PIXELS)
    shown = model.synthesise(coded.latents.y, 96, 75)
    for decoder in (model, TucModel(file), TucModel(file, level=0.25)):
        np.testing.assert_array_equal(decoder.decode(coded.data), shown)
    assert 8 * len(coded.data) == pytest.approx(model.bits_of(coded.latents), rel=0.01, abs=8 * 34)
    assert model.estimated_bits(PIXELS) == pytest.approx(model.bits_of(coded.latents), rel=0.01)
    assert model.bit_map(PIXELS).sum() == pytest.approx(model.estimated_bits(PIXELS), rel=1e-6)


def test_a_higher_level_takes_more_bits_and_is_closer(file: ModelFile) -> None:
    codings = [TucModel(file).at(level).code(PIXELS) for level in (0, 1, 2)]
    sizes = [len(coding.data) for coding in codings]
    assert sizes[0] < sizes[1] < sizes[2]
    assert len(TucModel(file).code(PIXELS).data) == sizes[2]  # none given: the highest


def test_biases_are_whole_at_levels_and_exact_between(file: ModelFile) -> None:
    """The integers of a level are those of its row; between two they lie between."""
    biases = file.tensors["entropy.levels.bias"]
    base = file.tensors["entropy.parameters.gamma.bias"]

    def at(step: int) -> torch.Tensor:
        layers = file.entropy_model(step).network._layers
        return layers["parameters.gamma"].bias - 2.0 ** (layers["parameters.gamma"].shift - 1)

    for row in range(3):
        assert torch.equal(at(256 * row), (base + biases[row]).double())
    between = base + (biases[0] * 192 + biases[1] * 64) // 256
    assert torch.equal(at(64), between.double())


def test_what_was_trained_comes_back_from_the_file(network: TucodecVAE, file: ModelFile) -> None:
    """A training that starts from an exported model starts where its training ended."""
    restored = file.network().state_dict()
    for name, value in network.state_dict().items():
        if name.startswith(("levels.", "entropy_parameters.", "context.", "h_s.")):
            torch.testing.assert_close(restored[name], value, rtol=0, atol=1e-3)


def test_the_network_in_floating_point_is_that_of_the_file(file: ModelFile) -> None:
    """`forward` at a level and the coder quantise alike and estimate alike."""
    model = TucModel(file).at(1.5)
    x = torch.from_numpy(PIXELS).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        output = model.network(x, level=1.5)
    symbols = output.index[0].permute(1, 2, 0).numpy()
    assert (symbols == model.analyse(PIXELS).y).mean() > 0.999
    bits = sum(float(part.sum()) for part in output.bits())
    assert bits == pytest.approx(model.estimated_bits(PIXELS), rel=1e-3)


def test_strips_of_other_levels_are_refused(
    file: ModelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "STRIP_POSITIONS", 12)
    one, other = (unpack(TucModel(file).at(level).encode(PIXELS)) for level in (1, 2))
    assert len(one.strips) > 1
    mixed = dataclasses.replace(one, strips=(*one.strips[:-1], other.strips[-1]))
    with pytest.raises(CorruptStreamError, match="another quality"):
        TucModel(file).decode(pack(mixed))
    salvaged = TucModel(file).salvage(mixed)
    assert len(salvaged.damaged) == 1
    beyond = tuple(b"\x01\x02" + strip[2:] for strip in one.strips if strip)
    with pytest.raises(CorruptStreamError, match=r"quality 2\.00391"):
        TucModel(file).decode(pack(dataclasses.replace(one, strips=beyond)))
    with pytest.raises(CorruptStreamError, match="no quality"):
        TucModel(file).decode(pack(dataclasses.replace(one, flags=0)))
    with pytest.raises(UnknownModelError):
        TucModel(file).decode(pack(dataclasses.replace(one, model_id=bytes(8))))


@pytest.mark.parametrize("start", [None, b"", b"\x01"])
def test_a_strip_that_is_lost_or_too_short_holds_no_quality(
    file: ModelFile, monkeypatch: pytest.MonkeyPatch, start: bytes | None
) -> None:
    monkeypatch.setattr(layout, "STRIP_POSITIONS", 12)
    coded = unpack(TucModel(file).at(1).encode(PIXELS))
    empty = dataclasses.replace(coded, strips=(start,) * len(coded.strips))
    assert quality_of(empty) is None
    with pytest.raises(CorruptStreamError, match="every strip is damaged"):
        TucModel(file).salvage(empty)
    first = dataclasses.replace(coded, strips=(start, *coded.strips[1:]))
    assert quality_of(first) == 1
    assert len(TucModel(file).salvage(first).damaged) == 1


def test_one_rate_takes_no_level() -> None:
    torch.manual_seed(0)
    plain = TucModel(freeze(TucodecVAE(resolve_codec("tiny", MICRO)), "plain", {}))
    with pytest.raises(ConfigError, match="plain has one rate, and takes no quality"):
        plain.at(0)
    flagged = dataclasses.replace(unpack(plain.encode(PIXELS)), flags=2)
    with pytest.raises(UnsupportedVersionError, match="flags 0x2"):
        plain.decode(pack(flagged))


def test_a_level_has_its_own_balance(file: ModelFile) -> None:
    """λ of a level is the middle one's times a power of the ratio; the effort works on it."""
    model = TucModel(file)
    assert [model.at(level).loss.lmbda for level in (0, 1, 2)] == pytest.approx([12.5, 100, 800])
    ssim = TucModel(dataclasses.replace(file, card={"recipe": "ssim", "lmbda": 0.2}))
    assert ssim.at(2).loss.lmbda == pytest.approx(0.2 / 8)
    refined = RefinedModel(model.at(0.5), Refinement(3))
    assert refined.name == "micro:quality=0.5,effort=3"
    plain = model.at(0.5).code(PIXELS)
    better = refined.code(PIXELS)
    assert refined._true_loss(PIXELS, better.latents) < refined._true_loss(PIXELS, plain.latents)
    shown = model.at(0.5).synthesise(better.latents.y, 96, 75)
    np.testing.assert_array_equal(refined.decode(better.data), shown)


def test_specifications(saved: Path) -> None:
    names = [
        registry.codec(f"{saved}{options}").name
        for options in ("", ":quality=2", ":quality=0.5", ":effort=2", ":quality=1,effort=2")
    ]
    assert names == [
        *("micro", "micro:quality=2", "micro:quality=0.5", "micro:effort=2"),
        "micro:quality=1,effort=2",
    ]
    described = registry.codec(f"{saved}:quality=0").describe()
    assert described["options"]["quality"] == 0
    assert described["options"]["lmbda"] == pytest.approx(12.5)
    for wrong in ("quality=2.1", "quality=-1", "quality=nan", "quality=high"):
        with pytest.raises(ConfigError, match="quality"):
            registry.codec(f"{saved}:{wrong}")


def test_compress_takes_a_quality_or_a_target(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "photo.png"
    write_png(image, PIXELS)
    given = [str(image), "--model", str(saved)]
    for name, options in (
        ("low", ["--quality", "0"]),
        ("high", ["--quality", "2"]),
        ("target", ["--target-bpp", "2.5"]),
        ("effort", ["--quality", "0.5", "--effort", "1"]),
    ):
        assert main(["compress", *given, "-o", str(tmp_path / f"{name}.tuc"), *options]) == 0
    sizes = {path.stem: path.stat().st_size for path in tmp_path.glob("*.tuc")}
    assert sizes["low"] < sizes["target"] <= 2.5 * PIXELS.size / 3 / 8
    files = [str(tmp_path / f"{name}.tuc") for name in ("low", "high", "target")]
    out = tmp_path / "shown"
    assert main(["decompress", *files, "--model", str(saved), "-o", str(out)]) == 0
    assert len(list(out.iterdir())) == 3
    capsys.readouterr()
    assert main(["info", str(tmp_path / "effort.tuc")]) == 0
    shown = capsys.readouterr().out
    assert "quality       0.5\n" in shown
    assert "model         not known here" in shown
    assert main(["compress", *given, "-o", str(tmp_path / "no.tuc"), "--quality", "2.5"]) == 1
    assert "quality 2.5 is not within 0 … 2" in capsys.readouterr().err
    for options in (["--quality", "1"], ["--effort", "1", "--qp", "40"]):
        words = ["compress", str(image), "--model", "vvc", "-o", str(tmp_path / "vvc.tuc")]
        assert main([*words, *options]) == 1
        assert f"{options[0]} is for" in capsys.readouterr().err


def test_a_quality_is_a_number(file: ModelFile) -> None:
    for wrong, shown in (("2", "'2'"), (None, "None"), (math.nan, "nan"), (2.01, "2.01")):
        with pytest.raises(ConfigError, match=f"quality {shown} is not within 0 … 2"):
            TucModel(file).at(wrong)  # type: ignore[arg-type]
    assert TucModel(file).at(np.float32(1.5)).level == 1.5  # type: ignore[arg-type]


def test_a_run_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="a folder; `tucodec export` makes"):
        library.load(str(tmp_path / ""))


def test_options_are_no_part_of_a_name() -> None:
    with pytest.raises(UnknownModelError, match="quality and effort are given apart"):
        library.load("tiny-vbr:quality=2")


def test_benches_take_a_quality(saved: Path, tmp_path: Path) -> None:
    image = tmp_path / "photo.png"
    write_png(image, PIXELS)
    names = [f"{saved}:quality=0", f"{saved}:quality=2"]
    result = effort.run([str(image)], names, [1], [], tmp_path / "rows.jsonl")
    assert result["models"] == ["micro:quality=0", "micro:quality=2"]
    low, high = result["rows"][0]["bpp"]
    assert low < high
    assert [subject.model.level for subject in subjects_of(names, [], PIXELS)] == [0, 2]
    for wrong, said in (("quality=3", "not within 0 … 2"), ("effort=1", "and no effort")):
        with pytest.raises(ConfigError, match=said):
            effort.run([str(image)], [f"{saved}:{wrong}"], [1], [], tmp_path / "rows.jsonl")
    coded = codec.large(names[0], (40, 60))["large"]
    assert coded["compress"]["seconds"] > 0 < coded["decompress"]["seconds"]


def test_bench_effort_weighs_as_the_level_does(file: ModelFile) -> None:
    model = TucModel(file)
    before, after = {"psnr": 20.0, "bpp": 1.0}, {"psnr": 23.0, "bpp": 1.5}
    expected = 100 * (0.5 + 800 * (10**-2.3 - 10**-2))
    assert _loss_percent([model], [before], [after]) == pytest.approx(expected)
