"""What sets reach: each family alone, together, and beside published points that have no streams."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_tucodec import cli
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.quality.curves import Curve, ImageCurves
from lightning_tucodec.quality.decibels import psnr_from_sse
from lightning_tucodec.report.set_level import candidates, reached, text
from lightning_tucodec.report.sources import Entry, Evaluation, Material
from lightning_tucodec.sets.limits import Requirements
from lightning_tucodec.sets.manifest import Limits

SIDE = 1000  # so that a file of n bytes has 8·n·10⁻⁶ bpp


def row(image: str, codec: str, size: int, sse: int, ms_ssim: float, seconds: float) -> Any:
    shape = {"width": SIDE, "height": SIDE, "bpp": 8e-6 * size}
    shape["psnr"] = psnr_from_sse(sse, 3 * SIDE**2)
    return {
        **{"image": image, "pixels": f"digest of {image}", "codec": codec, "bytes": size},
        **{"sse": sse, "ms_ssim": ms_ssim, "decode_seconds": seconds, **shape},
    }


def material() -> Material:
    """Two images; `fine` is better and slow, `quick` is worse, and a published table is best of all."""
    rows = []
    for image in ("a.png", "b.png"):
        for point in (1, 2):
            rows.append(row(image, f"fine:q={point}", 10_000 * point, 10**8 // point, 0.96, 3.0))
            rows.append(
                row(image, f"quick:q={point}", 10_000 * point, 2 * 10**8 // point, 0.94, 0.5)
            )
    evaluation = Evaluation(Path("r.json"), [], rows, {}, {})
    bpp, psnr = np.array([[0.08, 0.16]] * 2), np.array([[36.0, 39.0]] * 2)
    pixels = [f"digest of {name}" for name in ("a.png", "b.png")]
    table = ImageCurves("Best", ["a.png", "b.png"], bpp, psnr, np.full((2, 2), np.nan), pixels)
    published = Entry(Curve.of("Best", [0.08, 0.16], {"psnr": [36.0, 39.0]}), table, False, 2)
    return Material([published], [], [evaluation], [])


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {each["candidates"]: each for each in rows}


def test_each_alone_and_together() -> None:
    given = candidates(material())
    rows = by_name(reached(given, "sse", Requirements(Limits(), budgets=(0.12,))))
    assert list(rows) == ["fine", "quick", "Best", "fine + quick", "fine + quick + Best"]
    assert [rows[name]["published"] for name in rows] == [False, False, True, False, True]
    # 0.12 bpp over two images: one at 0.08 and one at 0.16.
    assert rows["fine"]["bytes"] == 30_000
    values = 6 * SIDE**2
    assert rows["fine"]["psnr"] == pytest.approx(10 * np.log10(255**2 * values / 1.5e8))
    assert rows["fine + quick"]["shares"].keys() <= {"fine:q=1", "fine:q=2"}
    assert rows["fine + quick + Best"]["psnr"] >= rows["Best"]["psnr"] > rows["fine"]["psnr"]
    assert np.isnan(rows["Best"]["ms_ssim"])
    shown = text(list(rows.values()), given.table, "sse")
    assert "Best (published, not decodable here) |" in shown
    assert "TucodecPSNR, 2019 | 0.14999 | 4722141 | 32.520" in shown
    assert "over other images: 102, 251.86 Mpx; here 2 images, 2.00 Mpx" in shown


def test_published_points_without_ms_ssim_or_times_are_not_asked_for_them() -> None:
    given = candidates(material())
    rows = by_name(reached(given, "ms_ssim", Requirements(Limits(), budgets=(0.12,))))
    assert rows["Best"]["refused"] == "a.png: no coding states its bytes and MS-SSIM"
    assert rows["fine + quick + Best"]["shares"].keys() <= {"fine:q=1", "fine:q=2"}
    quick = Requirements(Limits(), budgets=(0.16,), max_seconds_per_megapixel=2.0)
    rows = by_name(reached(given, "sse", quick))
    assert "fastest choice" in rows["fine"]["refused"]
    share = rows["fine + quick"]["shares"]
    assert share == {n: {"images": 1, "bytes": 20_000} for n in ("fine:q=2", "quick:q=2")}
    assert rows["fine + quick"]["seconds_per_megapixel"] == pytest.approx(1.75)


def test_results_that_contradict_each_other_are_refused() -> None:
    """One of them counted, without a word which."""
    given = material()
    (evaluation,) = given.evaluations
    again = replace(evaluation, path=Path("again.json"))
    given.evaluations.append(again)
    assert candidates(given).table.bytes.shape == (2, 6)
    rows = [*evaluation.rows[:-1], {**evaluation.rows[-1], "bytes": 7}]
    given.evaluations[1] = replace(again, rows=rows)
    with pytest.raises(ConfigError, match=r"again\.json: quick:q=2 has another result for b\.png"):
        candidates(given)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("sse", value) for value in (None, -1, 1.5, 10**30, True)),
        *(("bytes", 0), ("width", 10**20), ("height", 1 << 30), ("decode_seconds", "x")),
    ],
)
def test_rows_without_counts_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    rows = [dict(each) for each in material().evaluations[0].rows]
    rows[-1][key] = value
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"rows": rows}))
    assert cli.main(["clic", "reach", str(path), "--max-bpp", "1", "--maximise", "psnr"]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "r.json: " in error


def test_a_cap_on_each_image() -> None:
    given = candidates(material())
    asked = Requirements(Limits(), budgets=(0.12,), max_image_bpp=0.1)
    rows = by_name(reached(given, "sse", asked))
    assert rows["fine"]["bytes"] == 20_000
    tight = Requirements(Limits(), budgets=(0.12,), max_image_bpp=0.05)
    assert "a.png: its smallest file has 0.0800 bpp" in reached(given, "sse", tight)[0]["refused"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = material().evaluations[0]
    sets = [{"codec": c, "images": 2, "encode_seconds": 1.0, "decode_seconds": 1.0}
            for c in ("fine:q=1", "fine:q=2", "quick:q=1", "quick:q=2")]  # fmt: skip
    content = {"rows": evaluation.rows, "sets": sets, "codecs": {}, "definitions": {}}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content))
    assert cli.main(["clic", "reach", str(path), "--max-bpp", "0.12", "--maximise", "psnr"]) == 0
    assert "| fine + quick | 0.12000 | 30000 |" in capsys.readouterr().out
    times = [("fine:q=1", 1.5), ("fine:q=2", 1.2), ("quick:q=1", 0.2), ("quick:q=2", 0.2)]
    parts = [{"codec": n, "decode": {"processor_s_per_megapixel": s}} for n, s in times]
    (tmp_path / "parts.json").write_text(json.dumps({"rows": parts}))
    words = ["clic", "reach", str(path), "--max-bpp", "0.12", "--maximise", "psnr", "--json"]
    words += ["--max-decode-seconds-per-megapixel", "1", "--times", str(tmp_path / "parts.json")]
    assert cli.main(words) == 0
    timed = by_name(json.loads(capsys.readouterr().out))["fine + quick"]
    assert timed["shares"].keys() == {"fine:q=1", "quick:q=2"}
    assert timed["seconds_per_megapixel"] == pytest.approx(0.85)
    words = ["clic", "reach", str(path), "--max-bpp", "0.05,0.12", "--maximise", "psnr"]
    assert cli.main([*words, "--json"]) == 0
    several = json.loads(capsys.readouterr().out)
    assert list(several) == ["0.05", "0.12"]
    assert by_name(several["0.12"])["fine + quick"]["bytes"] == 30000
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("0.05 bpp\n| candidates |")
    for words, message in (
        (["--times", str(path), "--max-bpp", "1"], "not of bench parts"),
        ([], "without a limit"),
        (["--max-bpp", "0.1,0.1"], "given twice"),
    ):
        assert cli.main(["clic", "reach", str(path), *words]) == 1
        assert message in capsys.readouterr().err
