import json
import math
import re
from pathlib import Path
from typing import Any

import bjontegaard
import numpy as np
import pytest
from PIL import Image

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.quality.curve_files import read_curve, read_results
from lightning_tucodec.quality.curves import Curve, ImageCurves
from lightning_tucodec.quality.deltas import (
    bd_quality,
    bd_rate,
    bd_rate_interval,
    quality_at_rate,
    rate_at_quality,
)
from lightning_tucodec.report.figures import (
    DASHES,
    MARKERS,
    Panel,
    comparison_figure,
    rd_figure,
    style,
)
from lightning_tucodec.report.page import DASH_ARRAYS, MARKER_PATHS

BPP = np.array([0.1, 0.2, 0.4, 0.8, 1.6])
PSNR = np.array([26.0, 29.0, 32.0, 35.0, 38.0])


def curve(name: str = "a", factor: float = 1.0) -> Curve:
    return Curve.of(name, BPP * factor, {"psnr": PSNR})


def test_bd_rate_of_a_scaled_curve_is_the_scale() -> None:
    result = bd_rate(curve(), curve("b", 0.9))
    assert result.percent == pytest.approx(-10.0)
    assert (result.low, result.high, result.overlap) == (26.0, 38.0, 1.0)


@pytest.mark.parametrize("method", ["akima", "pchip", "cubic"])
def test_bd_rate_is_the_packages_own(method: str) -> None:
    # The example of the package's README.
    rate_a, psnr_a = [9487.76, 4593.60, 2486.44, 1358.24], [40.037, 38.615, 36.845, 34.851]
    rate_t, psnr_t = [9787.80, 4469.00, 2451.52, 1356.24], [40.121, 38.651, 36.970, 34.987]
    expected = bjontegaard.bd_rate(rate_a, psnr_a, rate_t, psnr_t, method=method)
    ours = bd_rate(
        Curve.of("a", rate_a, {"psnr": psnr_a}),
        Curve.of("t", rate_t, {"psnr": psnr_t}),
        method=method,  # type: ignore[arg-type]
    )
    assert ours.percent == pytest.approx(float(expected), abs=1e-9)
    assert ours.method == method
    gain = bd_quality(
        Curve.of("a", rate_a, {"psnr": psnr_a}),
        Curve.of("t", rate_t, {"psnr": psnr_t}),
        method=method,  # type: ignore[arg-type]
    )
    published = bjontegaard.bd_psnr(rate_a, psnr_a, rate_t, psnr_t, method=method)
    assert gain == pytest.approx(float(published), abs=1e-9)
    if method == "cubic":  # Bjøntegaard's own definition (VCEG-M33): polynomials of log-rate
        logs = [np.polyfit(p, np.log(r), 3) for r, p in ((rate_a, psnr_a), (rate_t, psnr_t))]
        low, high = max(psnr_a[-1], psnr_t[-1]), min(psnr_a[0], psnr_t[0])
        areas = [np.diff(np.polyval(np.polyint(log), [low, high]))[0] for log in logs]
        mean = (areas[1] - areas[0]) / (high - low)
        assert ours.percent == pytest.approx(100 * (np.exp(mean) - 1), abs=1e-6)


def test_bd_rate_is_refused_over_little_overlap_and_few_points() -> None:
    far = Curve.of("far", BPP * 10, {"psnr": PSNR + 11})
    with pytest.raises(ConfigError, match="share 4% of their psnr range"):
        bd_rate(curve(), far)
    with pytest.raises(ConfigError, match="4 rising points, not 3"):
        bd_rate(curve(), Curve.of("few", BPP[:3], {"psnr": PSNR[:3]}))
    with pytest.raises(ConfigError, match="has no ms_ssim_db"):
        bd_rate(curve(), curve(), "ms_ssim_db")


def test_points_that_cost_more_for_less_are_left_out() -> None:
    rates, values = Curve.of("x", [3, 1, 2, 4], {"psnr": [33, 31, 30, 34]}).points("psnr")
    assert rates.tolist() == [1, 3, 4]
    assert values.tolist() == [31, 33, 34]
    twice = Curve.of("x", [1, 2, 2, 2, 3], {"psnr": [30, 31, 33, 32, 34]})
    assert twice.points("psnr")[0].tolist() == [1, 2, 3]
    assert quality_at_rate(twice, 2) == pytest.approx(33)


def test_read_curve(tmp_path: Path) -> None:
    path = tmp_path / "jpeg.json"
    results = {"bpp": [0.5, 0.25], "psnr-rgb": [30, 28], "ms-ssim-rgb": [0.99, 0.9]}
    path.write_text(json.dumps({"name": "JPEG", "description": "d", "results": results}))
    read = read_curve(path)
    assert read.name == "JPEG"
    assert read.lines["psnr"][0].tolist() == [0.25, 0.5]
    assert read.lines["ms_ssim_db"][1] == pytest.approx([10.0, 20.0])
    path.write_text(json.dumps({"name": "JPEG", "results": {"bpp": [1], "psnr-rgb": [1, 2]}}))
    with pytest.raises(ConfigError, match=r"not a rate-distortion curve \((?!\w+Error)"):
        read_curve(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_curve(tmp_path / "none.json")


def test_rate_at_quality() -> None:
    assert rate_at_quality(BPP, PSNR, 32.0) == pytest.approx(0.4)
    assert rate_at_quality(BPP, PSNR, 33.5) == pytest.approx(0.4 * 2**0.5)
    with pytest.raises(ConfigError, match=r"40\.00 dB is outside .* 26\.00 … 38\.00"):
        rate_at_quality(BPP, PSNR, 40.0)


def test_quality_at_rate() -> None:
    ours = curve("ours")
    assert quality_at_rate(ours, 0.4) == pytest.approx(32.0)
    between = quality_at_rate(ours, 0.4 * 2**0.5)
    assert between == pytest.approx(33.5)
    assert quality_at_rate(ours, 0.01) is None
    assert quality_at_rate(ours, 100.0) is None


def test_rd_figure_is_deterministic_and_labelled(tmp_path: Path) -> None:
    curves = [curve("ours", 0.8), curve("theirs")]
    png, svg = rd_figure(curves, tmp_path / "a.png", title="Kodak", bpp_range=(0, 1))
    again = rd_figure(curves, tmp_path / "b", title="Kodak", bpp_range=(0, 1))
    assert svg.read_bytes() == again[1].read_bytes()
    assert all(label in svg.read_text() for label in ("ours", "theirs", "Kodak", "bits per pixel"))
    with Image.open(png) as drawn:
        assert drawn.size == (1280, 840)


def test_sixteen_curves_can_be_told_apart() -> None:
    for measured in (True, False):
        styles = [style(index, measured) for index in range(16)]
        for index, one in enumerate(styles):
            for other in styles[:index]:
                parts = (one.colour, one.marker, one.dash), (other.colour, other.marker, other.dash)
                differing = sum(a != b for a, b in zip(*parts, strict=True))
                assert differing >= (2 if measured else 1)
    assert set(MARKERS) == set(MARKER_PATHS)
    assert set(DASHES) == set(DASH_ARRAYS)


def test_comparison_shows_the_pictures_pixel_for_pixel(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 60, 80, 3), dtype=np.uint8)
    panels = [Panel(f"codec {i}", "0.15 bpp", image) for i, image in enumerate(images)]
    path = comparison_figure(panels, tmp_path / "x.png", columns=2, crop=(10, 20, 64, 32))
    with Image.open(path) as drawn:
        page = np.array(drawn.convert("RGB"))
    for image in images:
        part = image[20:52, 10:74]
        starts = np.argwhere((page == part[0, 0]).all(2))
        assert any(np.array_equal(page[y : y + 32, x : x + 64], part) for y, x in starts.tolist())
    with pytest.raises(ConfigError, match="one size"):
        comparison_figure([*panels, Panel("x", "", images[0, :10])], path)


def simulated(images: int, seed: int) -> tuple[ImageCurves, ImageCurves]:
    """Images of different difficulty; the second codec needs 0.95 of the rate, give or take."""
    rng = np.random.default_rng(seed)
    names = [str(i) for i in range(images)]
    bpp = BPP * np.exp(rng.normal(0, 0.5, (images, 1)))
    psnr = PSNR + rng.normal(0, 2, (images, 1))
    gain = 0.95 * np.exp(rng.normal(0, 0.06, (images, 1)))
    similarity = np.tile(1 - 0.1 / BPP / 10, (images, 1))
    return (
        ImageCurves("anchor", names, bpp, psnr, similarity),
        ImageCurves("test", names, bpp * gain, psnr, similarity),
    )


def test_the_bootstrap_interval_covers_the_truth() -> None:
    anchor, test = simulated(20_000, 999)
    truth = bd_rate(anchor.mean(), test.mean()).percent
    covered = {0.95: 0, 0.5: 0}
    for seed in range(40):
        for level in covered:
            interval = bd_rate_interval(*simulated(24, seed), samples=100, level=level, seed=seed)
            covered[level] += interval.low <= truth <= interval.high
    assert interval.images == 24
    # Neither too narrow nor too wide: 38 and 20 are nominal, the limits about three standard deviations.
    assert covered[0.95] >= 34
    assert 10 <= covered[0.5] <= 30


def test_results_become_one_curve_a_family(tmp_path: Path) -> None:
    codecs = ["jpeg:q=10", "jpeg:q=50", "vvc:qp=40,preset=slow", "vvc:qp=40", "tiny-1", "tiny-2"]
    codecs += ["tiny-1:effort=3", "tiny-1:effort=3,lmbda=40"]
    rows = [
        {"image": image, "codec": codec, "bpp": 0.1 * (i + 1) + j, "psnr": 30 + i, "ms_ssim": 0.9}
        for j, image in enumerate(("a", "b"))
        for i, codec in enumerate(codecs)
    ]
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"rows": rows}))
    curves = {curve.name: curve for curve in read_results(path)}
    assert list(curves) == ["jpeg", "vvc:preset=slow", "vvc", "tiny", "tiny:effort=3"]
    assert curves["jpeg"].mean().lines["psnr"][0] == pytest.approx([0.6, 0.7])
    assert curves["tiny"].part(np.array([1, 1])).mean().points("psnr")[0] == pytest.approx(
        [1.5, 1.6]
    )
    assert curves["vvc"].mean().lines["ms_ssim_db"][1] == pytest.approx([10.0])
    path.write_text(json.dumps({"rows": rows[:-1]}))
    with pytest.raises(ConfigError, match=r"not a whole result of tucodec evaluate \((?!\w+Error)"):
        read_results(path)
    path.write_text(json.dumps({"rows": [*rows, {**rows[0], "bpp": 0.01}]}))
    with pytest.raises(ConfigError, match="jpeg:q=10 has two rows for a"):
        read_results(path)
    path.write_text(json.dumps({"rows": [{**row, "pixels": ["a"]} for row in rows]}))
    with pytest.raises(ConfigError, match="pixels of a row is not a line of text"):
        read_results(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bpp": 0.3}, "bpp is 0.3, where 100 bytes for 40×50 pixels are 0.4"),
        ({"bytes": 50}, "bpp is 0.4, where 50 bytes"),
        ({"psnr": 3.0}, "psnr is 3, where the squared error gives 30"),
        ({"ms_ssim": 1.5}, "ms_ssim cannot be 1.5"),
        ({"decode_seconds": math.inf}, "decode_seconds cannot be inf"),
        ({"decode_seconds": math.nan}, "decode_seconds cannot be nan"),
        ({"encode_seconds": -1.0}, "encode_seconds cannot be -1.0"),
        ({"image": "new\nline.png"}, "image of entry 1 is not a line of text"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    row = {
        **{"codec": "jpeg:q=1", "image": "emoji \u200d and narrow space \u202f.png"},
        **{"width": 40, "height": 50, "bytes": 100, "bpp": 0.4, "sse": 390150, "psnr": 30.0},
        **{"ms_ssim": 0.9, "encode_seconds": 1.0, "decode_seconds": 0.0},
    }
    path = tmp_path / "r.json"
    for whole in (row, {**row, "psnr": None, "ms_ssim": None}, {**row, "sse": None}):
        path.write_text(json.dumps({"rows": [whole]}))
        assert read_results(path)[0].images == [row["image"]]
    path.write_text(json.dumps({"rows": [{**row, **change}]}))
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_results(path)


def test_one_unlucky_sample_does_not_refuse_the_interval() -> None:
    """Half of the images alone have three rising points; their samples are left out."""
    bpp = np.tile([0.1, 0.2, 0.4, 0.8], (4, 1))
    psnr = np.tile([26.0, 29, 32, 35], (4, 1))
    psnr[1:, 3] = 31.9
    images = [f"{i}" for i in range(4)]
    anchor, test = (
        ImageCurves(name, images, rate * bpp, psnr, np.full((4, 4), 0.9))
        for name, rate in (("a", 1.0), ("b", 0.9))
    )
    interval = bd_rate_interval(anchor, test, samples=50)
    assert interval.low <= interval.estimate.percent <= interval.high
    assert interval.estimate.percent == pytest.approx(-10, abs=1e-6)
    assert 0 < interval.kept < interval.samples == 50


def spoiled(cells: list[tuple[int, int]]) -> ImageCurves:
    """Six images at five rates, of which these have no finite PSNR."""
    curves, _ = simulated(6, 0)
    for (image, point), value in zip(cells, (np.nan, np.inf, -np.inf) * 9, strict=False):
        curves.psnr[image, point] = value
    return curves


@pytest.mark.parametrize(
    ("cells", "images", "points"),
    [
        ([(2, 3)], "01345", "01234"),  # one null
        ([(4, 1), (4, 2), (4, 3), (4, 4)], "01235", "01234"),  # a white image
        ([(i, 4) for i in range(6)], "012345", "0123"),  # a lossless setting
        ([*((i, 4) for i in range(6)), (1, 0)], "02345", "0123"),
        ([(i, i) for i in range(5)], None, None),
    ],
)
def test_a_value_that_is_not_finite_leaves_out_what_it_spoils(
    cells: list[tuple[int, int]], images: str | None, points: str | None
) -> None:
    curves, sound = spoiled(cells), spoiled([])
    own = curves.whole("psnr")
    if images is not None and points is not None:
        assert ["".join(map(str, part)) for part in own] == [images, points]
    assert min(map(len, own)) > 0
    mean = curves.mean()
    expected = sound.part(*own).mean()
    for line, theirs in zip(mean.lines["psnr"], expected.lines["psnr"], strict=True):
        np.testing.assert_array_equal(line, theirs)
    for line, theirs in zip(
        mean.lines["ms_ssim_db"], sound.mean().lines["ms_ssim_db"], strict=True
    ):
        np.testing.assert_array_equal(line, theirs)
    assert all(text.startswith("PSNR") for text in mean.left_out)
    assert len(mean.left_out) == (len(own[0]) < 6) + (len(own[1]) < 5)


def test_both_sides_of_a_difference_leave_out_the_same_images() -> None:
    anchor, test = simulated(6, 0)
    anchor.psnr[1, 2], test.psnr[3, :3], test.bpp[0, 1] = np.nan, np.inf, 0
    for quality, count in (("psnr", 3), ("ms_ssim_db", 5)):
        interval = bd_rate_interval(anchor, test, quality, samples=5)  # type: ignore[arg-type]
        assert interval.images == count
        assert interval.low <= interval.estimate.percent <= interval.high


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["bpp", "psnr-rgb", "ms-ssim-rgb"])
def test_a_published_point_that_is_not_finite_is_named(
    bad: float | None, key: str, tmp_path: Path
) -> None:
    results: dict[str, list[float | None]] = {
        "bpp": [*BPP, 2.0], "psnr-rgb": [*PSNR, 40.0], "ms-ssim-rgb": [0.8, 0.85, 0.9, 0.95, 0.97, 0.99],
    }  # fmt: skip
    results[key][1] = bad
    (tmp_path / "c.json").write_text(json.dumps({"name": "c", "results": results}))
    read = read_curve(tmp_path / "c.json")
    spoils = {"bpp": ["psnr", "ms_ssim_db"], "psnr-rgb": ["psnr"], "ms-ssim-rgb": ["ms_ssim_db"]}
    for quality, (rates, values) in read.lines.items():
        assert len(read.points(quality)[0]) == (5 if quality in spoils[key] else 6)  # type: ignore[arg-type]
        assert np.isfinite(rates).all()
        assert np.isfinite(values).all()
    assert len(read.left_out) == len(spoils[key])
    assert all("at points 2 of 6" in text for text in read.left_out)
