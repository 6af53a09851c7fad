"""Perceptual measures: their direction, their scale, and that an evaluation holds them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from lightning_tucodec import cli
from lightning_tucodec.errors import ConfigError, ExternalToolError
from lightning_tucodec.io import ffmpeg
from lightning_tucodec.quality.perceptual import MEASURES, SMALLEST_SIDE, check_names, measured
from tests.support import photo


def blurred(image: NDArray[np.uint8], radius: float) -> NDArray[np.uint8]:
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


@pytest.fixture(scope="module")
def portrait() -> NDArray[np.uint8]:
    return photo("astronaut.png", 177, 163)


@pytest.mark.parametrize(
    ("name", "best", "sign"),
    [
        *(("vmaf", 95.0, 1), ("xpsnr", 60.0, 1), ("flip", 0.0, -1), ("ssimulacra2", 100.0, 1)),
        *(("fsim", 1.0, 1), ("vif", 1.0, 1), ("psnr_hvs", 100.0, 1), ("iw_ssim", 1.0, 1)),
    ],
)
def test_more_blur_is_worse(name: str, best: float, sign: int, portrait: NDArray[np.uint8]) -> None:
    measure = MEASURES[name]
    values = [
        measure(portrait, portrait),
        *(measure(portrait, blurred(portrait, r)) for r in (1, 3)),
    ]
    ordered = [sign * value for value in values]
    assert ordered == sorted(ordered, reverse=True)
    assert len(set(values)) == 3
    assert sign * values[0] >= sign * best - 1e-6


def test_xpsnr_follows_the_error_of_luma() -> None:
    """On a flat picture, shifts of 8 and 16 of 255; the conversion to 8-bit luma dithers."""
    flat = np.full((64, 64, 3), 100, np.uint8)
    small, large = (MEASURES["xpsnr"](flat, flat + np.uint8(shift)) for shift in (8, 16))
    assert small - large == pytest.approx(20 * np.log10(2), abs=0.5)


def test_names_are_checked() -> None:
    assert check_names(["vmaf", "flip", "vmaf"]) == ["vmaf", "flip"]
    with pytest.raises(ConfigError, match="'lpip' is unknown"):
        check_names(["lpip"])


def test_jpeg_ai_is_a_group_of_names() -> None:
    assert check_names(["vif", "jpeg-ai"]) == ["vif", "vmaf", "fsim", "psnr_hvs", "iw_ssim"]


def test_psnr_hvs_and_vif_follow_their_definitions() -> None:
    """Both are linear in something known: PSNR-HVS in the logarithm of a flat error, VIF in contrast."""
    flat = np.full((64, 64, 3), 100, np.uint8)
    small, large = (MEASURES["psnr_hvs"](flat, flat + np.uint8(shift)) for shift in (8, 16))
    assert small - large == pytest.approx(20 * np.log10(2), abs=0.5)
    rng = np.random.default_rng(0)
    noise = np.repeat(rng.integers(96, 160, (96, 96, 1), np.uint8), 3, axis=2)
    doubled = (2 * noise.astype(int) - 128).astype(np.uint8)
    assert MEASURES["vif"](noise, doubled) > MEASURES["vif"](noise, noise)


def test_a_picture_that_is_too_small_is_one_line(portrait: NDArray[np.uint8]) -> None:
    with pytest.raises(ConfigError, match="information_weighted_ssim of piq"):
        MEASURES["iw_ssim"](portrait[:64, :64], portrait[:64, :64])


@pytest.mark.parametrize("name", sorted(set(MEASURES) - {"lpips", "dists"}))
def test_a_measure_has_a_value_from_its_smallest_side_on(
    name: str, portrait: NDArray[np.uint8]
) -> None:
    side = SMALLEST_SIDE.get(name, 1)
    shown = blurred(portrait, 2)
    for height, width in ((side, 180), (180, side), (side, side)):
        value = measured(name, portrait[:height, :width], shown[:height, :width])
        assert value is not None
        assert math.isfinite(value)
    if side > 1:
        assert measured(name, portrait[: side - 1], shown[: side - 1]) is None


def test_a_small_image_has_no_value_and_stops_nothing(
    tmp_path: Path, portrait: NDArray[np.uint8], capsys: pytest.CaptureFixture[str]
) -> None:
    for index, side in enumerate((180, 16)):
        Image.fromarray(portrait[:side, :side]).save(tmp_path / f"{index}.png")
    out = str(tmp_path / "r.json")
    codecs = [f"{name}:q={q}" for name in ("jpeg", "webp") for q in (5, 20, 40, 80)]
    words = ["evaluate", str(tmp_path), "--codec", *codecs, "--metrics", "jpeg-ai", "flip"]
    assert cli.main([*words, "-o", out]) == 0
    heads, cells = (line.split()[-6:] for line in capsys.readouterr().out.splitlines()[:2])
    lacking = {name for name, cell in zip(heads, cells, strict=True) if cell == "–"}
    assert lacking == {"vmaf", "vif", "psnr_hvs", "iw_ssim"}
    content = json.loads(Path(out).read_text())
    assert content["rows"][0]["vmaf"] is not None
    assert [row["vmaf"] for row in content["rows"] if row["image"] == "1.png"] == [None] * 8
    assert cli.main(["compare", out, "-o", str(tmp_path / "r.html")]) == 0
    said = capsys.readouterr().out.splitlines()
    heads, cells = (line.split() for line in said[-2:])
    shown = dict(zip(heads, cells[1:], strict=True))
    assert shown["vmaf"] == shown["mean"] == "–" != shown["flip"]


def test_a_filter_that_is_missing_is_named(portrait: NDArray[np.uint8]) -> None:
    with pytest.raises(ExternalToolError, match="no filter nofilter"):
        ffmpeg.compare("nofilter=x=1", portrait, portrait, pixel_format="yuv444p", timeout=60.0)


def test_evaluate_prints_them_and_measures_only_what_is_lacking(
    tmp_path: Path, portrait: NDArray[np.uint8], capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(portrait).save(tmp_path / "a.png")
    out = tmp_path / "r.json"
    words = [
        "evaluate",
        str(tmp_path / "a.png"),
        "--codec",
        "jpeg:q=10",
        "jpeg:q=80",
        "-o",
        str(out),
    ]
    assert cli.main(words) == 0
    assert cli.main([*words, "--metrics", "vmaf,xpsnr"]) == 0
    heading, low, high = capsys.readouterr().out.splitlines()[-4:-1]
    assert heading.split()[-2:] == ["vmaf", "xpsnr"]
    assert all(
        float(a) < float(b) for a, b in zip(low.split()[-2:], high.split()[-2:], strict=True)
    )
    lines = out.with_suffix(".rows.jsonl").read_text().count("\n")
    assert cli.main([*words, "--metrics", "xpsnr"]) == 0
    assert out.with_suffix(".rows.jsonl").read_text().count("\n") == lines == 4
    content = json.loads(out.read_text())
    assert "VMAF" in content["definitions"]["vmaf"]
    assert content["sets"][0]["xpsnr"] == content["rows"][0]["xpsnr"]
    assert cli.main([*words, "--metrics", "mos"]) == 1
    assert "'mos' is unknown" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "file"), [("lpips", "alexnet"), ("dists", "vgg16")])
def test_weights_are_never_fetched(
    name: str,
    file: str,
    tmp_path: Path,
    portrait: NDArray[np.uint8],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=f"needs {tmp_path}.*{file}"):
        MEASURES[name](portrait, portrait)
    assert list(tmp_path.iterdir()) == []
