"""Choosing among models, and among QPs, for a target."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_tucodec.cli import main
from lightning_tucodec.codecs.h266.codec import H266
from lightning_tucodec.codecs.learned.targets import Setting, Target, best, code
from lightning_tucodec.codecs.library import family, load
from lightning_tucodec.codecs.registry import codec, expand
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.quality.metrics import quality
from tests.support import photo

PHOTO = photo("astronaut.png", 96, 128)


@pytest.fixture(scope="module")
def models() -> list[Setting]:
    return [load(name) for name in family("tiny-ssim")]


def test_a_family_is_what_ends_in_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUCODEC_MODELS", str(tmp_path))
    for name in ("my-10", "my-9", "my-x", "your-1", "your"):
        (tmp_path / f"{name}.safetensors").touch()
    assert family("my") == ["my-9", "my-10"]
    assert family("your") == []
    assert expand(["my:effort=2", "jpeg:q=30", "my-9:effort=2", "my-x"]) == [
        "my-9:effort=2", "my-10:effort=2", "jpeg:q=30", "my-x",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="my stands for several models; name one: my-9, my-10"):
        codec("my")


def test_the_models_of_a_family_grow_in_rate(models: list[Setting]) -> None:
    assert len(models) == 5
    sizes = [len(code(model, PHOTO).data) for model in models]
    assert sizes == sorted(sizes)


def test_best_is_the_best_that_meets_the_target(models: list[Setting]) -> None:
    codings = [code(model, PHOTO) for model in models]
    bpp = [8 * len(coding.data) / (96 * 128) for coding in codings]
    similarity = [quality(PHOTO, coding.shown)["ms_ssim"] or 0.0 for coding in codings]
    middle = 2
    within = best([[model] for model in models], PHOTO, Target("bpp", bpp[middle]))
    fitting = [n for n, rate in enumerate(bpp) if rate <= bpp[middle]]
    assert within.data == codings[max(fitting, key=lambda n: similarity[n])].data
    reached = best([[model] for model in models], PHOTO, Target("ms_ssim", similarity[middle]))
    reaching = [n for n, value in enumerate(similarity) if value >= similarity[middle]]
    assert reached.data == codings[min(reaching, key=lambda n: bpp[n])].data
    with pytest.raises(
        ConfigError, match=r"--target-bpp 0.001: even tiny-ssim-\d takes [\d.]+ bpp"
    ):
        best([[model] for model in models], PHOTO, Target("bpp", 0.001))
    with pytest.raises(ConfigError, match=r"--target-psnr 60: even tiny-ssim-\d reaches [\d.]+ dB"):
        best([[model] for model in models], PHOTO, Target("psnr", 60))
    with pytest.raises(ConfigError, match="MS-SSIM needs at least 11 pixels a side"):
        best([models[:1]], PHOTO[:8, :8], Target("ms_ssim", 0.9))


def test_a_search_finds_the_end_of_what_meets_the_target() -> None:
    ladder = [H266(qp, "faster", -4, filter="none") for qp in range(34, 50)]
    found = best([ladder], PHOTO, Target("bpp", 0.3))
    assert isinstance(found.setting, H266)
    assert found.setting.qp > 34
    budget = 0.3 * 96 * 128 / 8
    assert len(found.data) <= budget < len(code(ladder[found.setting.qp - 35], PHOTO).data)
    reached = best([ladder], PHOTO, Target("psnr", 30.0))
    assert isinstance(reached.setting, H266)
    coarser = code(ladder[reached.setting.qp - 33], PHOTO)
    assert (
        (quality(PHOTO, reached.shown)["psnr"] or 0)
        >= 30
        > (quality(PHOTO, coarser.shown)["psnr"] or 0)
    )
    assert not found.is_finest
    assert not reached.is_finest
    finest = best([ladder[-4:]], PHOTO, Target("bpp", 20))
    assert finest.setting is ladder[-4]
    assert finest.is_finest
    with pytest.raises(ConfigError, match=r"--target-bpp 0.01: even vvc\+postfilter:qp=49"):
        best([ladder], PHOTO, Target("bpp", 0.01))
    with pytest.raises(ConfigError, match=r"--target-psnr 60: even vvc\+postfilter:qp=34"):
        best([ladder], PHOTO, Target("psnr", 60))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    Image.fromarray(np.full_like(PHOTO, 90)).save(tmp_path / "gray.png")
    out, shown = tmp_path / "out", tmp_path / "shown"
    words = ["compress", str(tmp_path), "-o", str(out), "--json"]
    assert main([*words, "--target-ms-ssim", "0.9", "--recon", str(shown)]) == 0
    rows = {
        Path(row["file"]).stem: row for row in map(json.loads, capsys.readouterr().out.splitlines())
    }
    assert rows["a"]["ms_ssim"] >= 0.9
    assert rows["a"]["model"].startswith("tiny-vbr-ssim:quality=")
    assert rows["gray"]["bytes"] < rows["a"]["bytes"]
    assert main(["decompress", str(out / "a.tuc"), "-o", str(tmp_path / "back.png")]) == 0
    with Image.open(shown / "a.png") as first, Image.open(tmp_path / "back.png") as second:
        assert np.array_equal(np.asarray(first), np.asarray(second))
    capsys.readouterr()
    # Both are coded with the highest quality that there is: that is said, once.
    assert main([*words, "--force", "--model", "tiny-ssim", "--target-bpp", "20"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"bpp is the highest quality there is, far below --target-bpp 20", line)
    alone = ["compress", str(tmp_path / "a.png"), *words[2:], "--force"]
    assert main([*alone, "--model", "tiny-ssim", "--target-bpp", "0.3"]) == 0
    assert capsys.readouterr().err == ""
    # One image cannot meet the target: it is named, the other is written.
    assert main([*words, "--force", "--model", "tiny-ssim", "--target-psnr", "38"]) == 1
    assert "a.png: --target-psnr 38: even tiny-ssim-" in capsys.readouterr().err
    assert main([*words, "--model", "tiny-ssim-3", "--target-bpp", "1"]) == 1
    assert "--model tiny-ssim-3 is neither" in capsys.readouterr().err
    assert main([*words, "--model", "tiny-ssim"]) == 1
    assert "stands for several models" in capsys.readouterr().err


def test_ms_ssim_is_measured_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes more memory and time than the rest of a coding."""

    def refuse(*_: object) -> float:
        raise AssertionError("MS-SSIM was measured")

    for module in ("quality.metrics", "codecs.learned.targets"):
        monkeypatch.setattr(f"lightning_tucodec.{module}.pixels_ms_ssim", refuse)
    tiny = [load(name) for name in family("tiny-mse")]
    assert best([[model] for model in tiny], PHOTO, Target("psnr", 27)).setting in tiny
    assert best([[model] for model in tiny], PHOTO, Target("bpp", 8)).setting in tiny
    with pytest.raises(AssertionError, match="MS-SSIM was measured"):
        best([[model] for model in tiny], PHOTO, Target("ms_ssim", 0.5))
