"""Published figures: whole, plausible, with sources, and never compared as if of images they are not of."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.quality.deltas import quality_at_rate
from lightning_tucodec.report.compare import bd_text, build_page
from lightning_tucodec.report.numbers import bd_rows
from lightning_tucodec.report.published import Published, names, read_published
from lightning_tucodec.report.sources import read_sources

KODAK, PROFESSIONAL = "kodak", "clic2020-professional"
REPOSITORY = re.compile(r"github\.com/\S+/\S+, \S+, commit [0-9a-f]{7}, 20\d\d-\d\d-\d\d\b")
CURVES = [(name, each) for name in names() for each in read_published(name)]


@pytest.mark.parametrize(("name", "each"), CURVES, ids=[f"{n}-{c.curve.name}" for n, c in CURVES])
def test_a_curve_rises_and_names_its_source(name: str, each: Published) -> None:
    assert each.curve.lines
    for rates, values in each.curve.lines.values():
        assert np.all(np.diff(rates) > 0)
        assert np.all(np.diff(values) > 0)
        assert 0.01 < rates[0] < rates[-1] < 3 or len(rates) == 1
        assert values[0] > 8
        assert values[-1] < 45
    assert each.curve.left_out == ()
    assert f"{each.count} images; averaging: " in each.curve.source
    assert "; rate: " in each.curve.source
    if name in (KODAK, PROFESSIONAL) and each.curve.name != "HiFiC":
        assert REPOSITORY.match(each.curve.source)


@pytest.mark.parametrize("name", [KODAK, PROFESSIONAL])
def test_what_is_published(name: str) -> None:
    curves = {each.curve.name.removesuffix(" (41 images)"): each for each in read_published(name)}
    expected = {"LALIC", "FTIC", "TCM-L", "HPCM-Large", "Cool-chic 5.0", "LotteryCodec"}
    expected |= {"shallow-ntc 2-layer", "VTM-9.1", "VTM-19.1"}
    assert expected <= set(curves)
    assert ("ELIC" in curves) == (name == KODAK)
    # VTM's rates differ by its versions, and learned codecs by more, but not by decibels.
    reference = quality_at_rate(curves["VTM-9.1"].curve, 0.15)
    assert reference == pytest.approx({KODAK: 29.4, PROFESSIONAL: 32.3}[name], abs=0.1)
    for curve in (each.curve for each in curves.values() if "psnr" in each.curve.lines):
        at = quality_at_rate(curve, 0.3)
        if at is not None and "(MS-SSIM" not in curve.name and curve.name != "HiFiC":
            assert -2 < at - (quality_at_rate(curves["VTM-9.1"].curve, 0.3) or 0) < 1
    # Not all of these 41 are at hand everywhere.
    means = [each.curve.name for each in read_published(PROFESSIONAL) if each.images is None]
    assert all("41 images)" in label for label in means)


@pytest.mark.parametrize(("name", "count"), [(KODAK, 24), (PROFESSIONAL, 41)])
def test_tables_are_of_every_image(name: str, count: int) -> None:
    tables = [each for each in read_published(name) if each.images is not None]
    assert [each.curve.name for each in tables] == ["Cool-chic 5.0", "shallow-ntc 2-layer SGA"]
    for each in tables:
        assert each.images is not None
        assert len(set(each.images.images)) == each.count == count
        assert each.sizes == tables[0].sizes
        assert np.isfinite(each.images.bpp).all()
        assert np.isfinite(each.images.psnr).all()
        assert np.all(np.diff(each.images.bpp) > 0)


def test_one_curve_or_what_there_is() -> None:
    (entry,) = read_sources(["published:kodak#VTM-9.1"]).entries
    assert (entry.curve.name, entry.measured, entry.count) == ("VTM-9.1", False, 24)
    with pytest.raises(
        ConfigError, match=r"published:x: unknown; there are clic2019-test, .*kodak"
    ):
        read_sources(["published:x"])
    with pytest.raises(ConfigError, match="published:kodak has no curve VTM; there are HiFiC, "):
        read_sources(["published:kodak#VTM"])
    for short, name in (
        ("VTM-9.1", "VTM-9.1 (41 images)"),
        ("HPCM-Large", "HPCM-Large (41 images)"),
        ("HPCM-Large (MS-SSIM)", "HPCM-Large (MS-SSIM, 41 images)"),
    ):
        (entry,) = read_sources([f"published:{PROFESSIONAL}#{short}"]).entries
        assert entry.curve.name == name


def test_one_image_gives_no_interval(tmp_path: Path) -> None:
    path = measured(tmp_path / "r.json", {"kodim03.webp": (768, 512)}, 0.8, True)
    material = read_sources(["published:kodak#Cool-chic 5.0", str(path)])
    page, rows = build_page(material, "x", "t", samples=5)
    assert (rows[0]["images"], rows[0]["low"]) == (1, None)
    assert rows[0]["percent"] == pytest.approx(25)
    assert bd_text(rows, "x").splitlines()[1].endswith("+25.0 %  (of one image)")
    (table, *_) = page.tables["bd"]
    assert table.rows[0][3:5] == ["–", "of one image; no interval"]
    assert "Interval:" not in table.note


def test_decibels_of_another_kind_are_named() -> None:
    notes = read_sources(["published:kodak"]).notes
    named = [note.split(":")[0] for note in notes if "mean of the images' dB" in note]
    assert named == ["LALIC (MS-SSIM)", "FTIC (MS-SSIM)", "HPCM-Large (MS-SSIM)"]


def measured(path: Path, sizes: dict[str, tuple[int, int]], saved: float, digests: bool) -> Path:
    """A results.json of a codec that has the published points at a share of their rate."""
    (table,) = read_published("kodak#Cool-chic 5.0")
    assert table.images is not None
    rows: list[dict[str, Any]] = []
    for image, (width, height) in sizes.items():
        index = list(table.images.images).index(Path(image).stem)
        for point, (bpp, psnr) in enumerate(
            zip(table.images.bpp[index], table.images.psnr[index], strict=True)
        ):
            row = {"image": image, "codec": f"x:q={point}", "width": width, "height": height}
            row |= {"bpp": bpp * saved, "psnr": psnr, "ms_ssim": 0.9 + point / 100}
            rows.append(row | ({"pixels": f"of {image}"} if digests else {}))
    path.write_text(json.dumps({"rows": rows, "sets": []}))
    return path


@pytest.mark.parametrize("digests", [True, False])
def test_a_table_counts_on_shared_images_only(tmp_path: Path, digests: bool) -> None:
    sizes = {f"kodim{n:02}.webp": (768, 512) for n in (3, 5, 13, 19, 23)}
    sizes["kodim08.webp"] = (384, 256)  # smaller, so another picture
    path = measured(tmp_path / "r.json", sizes, 0.8, digests)
    material = read_sources(["published:kodak", str(path)])
    entries = {entry.curve.name: entry for entry in material.entries}
    assert "Cool-chic 5.0: over 5 of its 24 images, those measured here" in material.notes
    assert "LALIC: mean over 24 images; measured here are 6" in material.notes
    # What is drawn is of these images too: as much quality, a quarter more bits.
    (whole,) = read_published("kodak#Cool-chic 5.0")
    part = entries["Cool-chic 5.0"]
    assert part.count == 5
    assert not np.allclose(part.curve.lines["psnr"][0], whole.curve.lines["psnr"][0], rtol=0.01)
    rows = {(row["codec"], row["quality"]): row for row in bd_rows(material.entries, "x", 20)}
    row = rows["Cool-chic 5.0", "psnr"]
    assert (row["images"], row["percent"]) == (5, pytest.approx(25))
    assert (row["low"], row["high"]) == (pytest.approx(25), pytest.approx(25))
    row = rows["shallow-ntc 2-layer SGA", "psnr"]
    assert row["images"] == 5
    assert row["low"] < row["percent"] < row["high"]
    # Means are of other images, and the row says so.
    row = rows["LALIC", "psnr"]
    assert (row["images"], row["counts"]) == (None, [6, 24])
    text = bd_text(list(rows.values()), "x")
    assert re.search(r"LALIC +PSNR .* %  \(means over 24 and 6 images\)", text)
    page, _ = build_page(material, "x", "t", samples=5)
    (row,) = [row for row in page.tables["bd"][0].rows if row[0] == "LALIC"]
    assert "means over 24 and 6 images; no interval" in row


def test_the_whole_set_needs_no_warning(tmp_path: Path) -> None:
    (table,) = read_published("kodak#Cool-chic 5.0")
    sizes = {f"{name}.png": (768, 512) for name in table.sizes}
    path = measured(tmp_path / "r.json", sizes, 1.0, True)
    material = read_sources([str(path), "published:kodak#VTM-9.1", "published:kodak#Cool-chic 5.0"])
    assert material.notes == []
    row = {r["codec"]: r for r in bd_rows(material.entries, "x", 5)}
    assert row["Cool-chic 5.0"]["percent"] == pytest.approx(0, abs=1e-9)
    assert "images" not in bd_text([row["VTM-9.1"]], "x").partition("\n")[2]


def test_images_of_another_set_are_named(tmp_path: Path) -> None:
    path = measured(tmp_path / "r.json", {"kodim03.png": (768, 512)}, 1.0, True)
    material = read_sources([str(path), f"published:{PROFESSIONAL}#Cool-chic 5.0"])
    assert material.notes == ["Cool-chic 5.0: none of its 41 images is measured here"]
    (row,) = bd_rows(material.entries, "x", 5)
    assert "share no image" in row["refused"]


def test_a_curve_given_twice_keeps_what_is_known_of_it() -> None:
    entries = read_sources(["published:kodak#Cool-chic 5.0"] * 2).entries
    assert [entry.curve.name for entry in entries] == ["Cool-chic 5.0 (1)", "Cool-chic 5.0 (2)"]
    assert [entry.count for entry in entries] == [24, 24]
    assert entries[0].sizes == entries[1].sizes != {}
