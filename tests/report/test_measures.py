"""BD-rates by further measures: equal curves, a shift that is known, and what stands in the report."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightning_tucodec import cli
from lightning_tucodec.quality.curves import Curve
from lightning_tucodec.quality.perceptual import JPEG_AI
from lightning_tucodec.report.measures import measure_rows
from lightning_tucodec.report.sources import Entry, read_sources
from tests.support import photo


def entry(codec: str, factor: float, skip: str = "") -> Entry:
    """Four points of two images whose rates are `factor` times a given curve's."""
    rows: list[dict[str, Any]] = []
    for image in ("a", "b"):
        for point in range(4):
            row = {"image": image, "codec": f"{codec}:q={point}", "bpp": factor * 0.1 * 2**point}
            row |= {m: 0.5 + 0.1 * point for m in ("ms_ssim", *JPEG_AI, "flip") if m != skip}
            row["flip"] = 0.5 - 0.1 * point
            rows.append(row)
    return Entry(Curve.of(codec, [0.1], {"psnr": [30.0]}), rows=rows)


def test_a_curve_of_half_the_bits_saves_half_by_every_measure() -> None:
    (row,) = measure_rows([entry("x", 1), entry("y", 0.5)], "x")
    assert row["images"] == 2
    assert set(row["percent"]) == {"ms_ssim", *JPEG_AI, "flip"}
    assert all(value == pytest.approx(-50) for value in row["percent"].values())
    assert row["mean"] == pytest.approx(-50)


def test_without_one_of_the_measures_there_is_no_mean() -> None:
    (row,) = measure_rows([entry("x", 1, "vif"), entry("y", 0.5)], "x")
    assert row["mean"] is None
    assert "vif" not in row["percent"]


def test_two_results_of_one_codec_are_two_rows(tmp_path: Path) -> None:
    """They were merged, and the later one counted."""
    files = []
    for name, codec, factor in (("a", "x", 1.0), ("b", "y", 0.5), ("c", "y", 2.0)):
        rows = [{**row, "psnr": 30.0} for row in entry(codec, factor).rows]
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"rows": rows}))
    rows = measure_rows(read_sources(map(str, files)).entries, "x")
    means = {row["codec"]: row["mean"] for row in rows}
    assert means == {"y (1)": pytest.approx(-50), "y (2)": pytest.approx(100)}


def test_evaluate_and_compare_tell_the_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(photo("chelsea.png", 192, 176)).save(tmp_path / "cat.png")
    out = tmp_path / "r.json"
    codecs = [
        f"{k}:q={q}"
        for k, qs in (("jpeg", (10, 25, 50, 75)), ("webp", (5, 30, 60, 85)))
        for q in qs
    ]
    words = ["evaluate", str(tmp_path / "cat.png"), "--codec", *codecs, "-o", str(out)]
    assert cli.main([*words, "--metrics", "jpeg-ai", "--workers", "1"]) == 0
    assert set(JPEG_AI) <= set(json.loads(out.read_text())["sets"][0])
    capsys.readouterr()
    page = tmp_path / "r.html"
    assert cli.main(["compare", str(out), "--anchor", "jpeg", "-o", str(page)]) == 0
    heading, line = capsys.readouterr().out.splitlines()[-2:]
    assert heading.split() == ["ms_ssim", "vmaf", "fsim", "vif", "psnr_hvs", "iw_ssim", "mean"]
    values = [float(text) for text in line.split()[1:]]
    assert values[-1] == pytest.approx(sum(values[:-1]) / 6, abs=0.1)
    assert all(-90 < value < 0 for value in values)
    assert "by further measures" in page.read_text()
