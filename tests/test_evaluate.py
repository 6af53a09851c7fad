import csv
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut

from lightning_tucodec import cli
from lightning_tucodec.codecs.base import ImageCodec
from lightning_tucodec.codecs.registry import codec
from lightning_tucodec.errors import ConfigError, ImageInputError
from lightning_tucodec.quality.decibels import psnr_from_sse
from lightning_tucodec.quality.metrics import sse
from lightning_tucodec.sets.allocation import allocate
from lightning_tucodec.sets.evaluate import evaluate, find_images, run
from lightning_tucodec.sets.measure import measure
from lightning_tucodec.sets.results import allocation_table, summarise, write_results

SPECIFICATIONS = ["jpeg:q=20", "jpeg:q=70", "vvc:qp=40,preset=faster"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photo = astronaut()
    (tmp_path / "images").mkdir()
    for name, part in (("b", photo[:96, 150:310]), ("a", photo[60:131, 200:300])):
        Image.fromarray(part).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    return tmp_path


class Counting:
    """A codec that counts its codings and can fail at one of them."""

    def __init__(self, inner: ImageCodec, fail_at: int = -1) -> None:
        self.inner, self.fail_at, self.codings = inner, fail_at, 0

    @property
    def name(self) -> str:
        return self.inner.name

    def encode(self, image: np.ndarray) -> bytes:
        if self.codings == self.fail_at:
            raise KeyboardInterrupt
        self.codings += 1
        return self.inner.encode(image)

    def decode(self, data: bytes) -> np.ndarray:
        return self.inner.decode(data)

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def test_rows_and_sets_by_hand(folder: Path) -> None:
    images = find_images([folder / "images"])
    assert [path.name for path in images] == ["a.png", "b.png"]
    codecs = [codec(text) for text in SPECIFICATIONS]
    rows = evaluate(images, codecs, folder / "rows.jsonl", workers=2)
    assert [(row["image"], row["codec"]) for row in rows] == [
        (path.name, coder.name) for path in images for coder in codecs
    ]
    for index, coder in enumerate(codecs):
        error, values, size = 0, 0, 0
        for path in images:
            image = np.array(Image.open(path).convert("RGB"))
            data = coder.encode(image)
            error += sse(image, coder.decode(data))
            values, size = values + image.size, size + len(data)
        entry = summarise(rows, codecs)[index]
        assert entry["bytes"] == size
        assert entry["bpp"] == pytest.approx(8 * size / (values / 3))
        assert entry["psnr"] == pytest.approx(psnr_from_sse(error, values))
        assert entry["psnr_mean"] == np.mean([r["psnr"] for r in rows[index::3]])
        assert entry["ms_ssim"] != entry["ms_ssim_mean"]
        assert ("ceiling_psnr" in entry) == (coder.name == SPECIFICATIONS[2])
    table = allocation_table(rows)
    assert table.bytes.tolist() == [
        [row["bytes"] for row in rows[:3]],
        [row["bytes"] for row in rows[3:]],
    ]
    best = allocate(table, "sse", max_bytes=int(table.bytes[:, 0].sum()))
    assert best.bytes <= int(table.bytes[:, 0].sum())


def test_an_interrupted_evaluation_continues(folder: Path) -> None:
    images, journal = find_images([folder / "images"]), folder / "rows.jsonl"
    inner = [codec(text) for text in SPECIFICATIONS[:2]]
    whole = evaluate(images, inner, folder / "other.jsonl")
    stopped: list[ImageCodec] = [Counting(inner[0]), Counting(inner[1], fail_at=1)]
    with pytest.raises(KeyboardInterrupt):
        evaluate(images, stopped, journal, workers=1)
    finished = len(journal.read_text().splitlines())
    assert 2 <= finished <= 3
    with journal.open("a") as stream:
        stream.write('{"key": "torn')
    again: list[ImageCodec] = [Counting(coder) for coder in inner]
    rows = evaluate(images, again, journal, workers=1)
    assert without_seconds(rows) == without_seconds(whole)
    assert sum(coder.codings for coder in again) == 4 - finished  # type: ignore[attr-defined]
    more: list[ImageCodec] = [Counting(coder) for coder in inner]
    assert evaluate(images, more, journal) == rows
    assert sum(coder.codings for coder in more) == 0  # type: ignore[attr-defined]


def test_a_killed_process_continues_with_the_same_numbers(folder: Path) -> None:
    specifications = [
        "jpeg:q=20",
        "jpeg:q=60",
        "jpeg2000:bpp=0.5",
        "hevc:qp=40,chroma=420,preset=fast",
    ]
    specifications += ["hevc:qp=40,preset=fast", "av1-svt:q=50,preset=10", "av1-aom:q=50"]

    def words(name: str) -> list[str]:
        paths = [str(folder / "images"), "-o", str(folder / name), "--workers", "1"]
        return ["evaluate", *paths, "--codec", *specifications]

    assert cli.main(words("whole.json")) == 0
    command = [sys.executable, "-m", "lightning_tucodec.cli", *words("killed.json")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = folder / "killed.rows.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    finished = journal.read_bytes().count(b"\n")
    assert finished < 2 * len(specifications)
    assert not (folder / "killed.json").exists()
    assert cli.main(words("killed.json")) == 0
    assert journal.read_bytes().count(b"\n") >= 2 * len(specifications)
    whole, killed = (json.loads((folder / f"{n}.json").read_text()) for n in ("whole", "killed"))
    for part in ("rows", "sets"):
        assert without_seconds(killed[part]) == without_seconds(whole[part])
    assert killed["codecs"] == whole["codecs"]
    with (folder / "killed.sets.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [line["codec"] for line in lines] == specifications
    assert all(line["version"] and line["colour"] for line in lines)
    assert "libx265" in lines[3]["command"]
    assert "pooled" in lines[0]["averaging"]


def test_a_journal_leaves_the_half_line_of_another_process_to_it(folder: Path) -> None:
    images, coder = find_images([folder / "images"]), codec("jpeg:q=20")
    rows = evaluate(images, [coder], folder / "rows.1-of-2.jsonl")
    others = folder / "rows.1-of-2.jsonl"
    half = others.read_text() + '{"key": "half'
    others.write_text(half)
    again = Counting(coder)
    continued = evaluate(images, [again], folder / "new" / "rows.jsonl", others=[others])
    assert (again.codings, continued) == (0, rows)
    assert others.read_text() == half


def test_rows_that_contradict_themselves_are_measured_again(folder: Path) -> None:
    image, coder = [folder / "images" / "a.png"], Counting(codec("jpeg:q=20"))
    journal = folder / "rows.jsonl"
    (first,) = evaluate(image, [coder], journal)
    for key, value in (("bytes", 7), ("psnr", 99.0), ("sse", 3), ("decode_seconds", math.inf)):
        journal.write_text(json.dumps(json.loads(journal.read_text()) | {key: value}) + "\n")
        (again,) = evaluate(image, [coder], journal)
        assert without_seconds([again]) == without_seconds([first])
        journal.write_text(journal.read_text().splitlines(keepends=True)[-1])
    assert coder.codings == 5


def test_peak_memory_of_a_coder_and_of_the_program_it_calls(folder: Path) -> None:
    out, image = folder / "r.json", folder / "images" / "b.png"
    specifications = ["jpeg:q=20", "vvc:qp=40,preset=faster"]
    sets = run([str(image)], specifications, str(out), memory=True)
    small, program = (entry["peak_memory"] for entry in sets)
    # An interpreter with numpy and Pillow; libvvenc holds tables of its own.
    assert 20 << 20 < small < program < 4 << 30
    again = run([str(image)], specifications, str(out), memory=True)
    assert [entry["peak_memory"] for entry in again] == [small, program]


def test_coded_files_are_kept(folder: Path) -> None:
    images, codecs = find_images([folder / "images"]), [codec("jpeg:q=30")]
    evaluate(images, codecs, folder / "rows.jsonl")
    rows = evaluate(images, codecs, folder / "rows.jsonl", keep=folder / "kept")
    kept = {path.name: path.stat().st_size for path in (folder / "kept").iterdir()}
    assert kept == {f"{row['sha256']}.bin": row["bytes"] for row in rows}


def test_a_lossless_coding_and_a_tiny_image(tmp_path: Path) -> None:
    row = measure(codec("jpeg:q=95"), np.full((8, 8, 3), 128, np.uint8))
    assert row["psnr"] == math.inf
    assert row["ms_ssim"] is None
    rows = [{"image": "x", "codec": "jpeg:q=95", **row}]
    codecs = [codec("jpeg:q=95")]
    write_results(tmp_path / "r.json", rows, summarise(rows, codecs), codecs)
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["rows"][0]["psnr"] is None
    with pytest.raises(ConfigError, match="too small for MS-SSIM"):
        allocation_table(rows)


def test_files_of_one_name_are_told_apart(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "images" / "a.png").rename(folder / "more" / "b.png")
    rows = evaluate(
        find_images([folder / "images", folder / "more"]), [codec("jpeg:q=9")], folder / "rows"
    )
    assert len({row["image"] for row in rows}) == 2


def test_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "results" / "r.json"
    words = ["evaluate", str(folder / "images"), "--codec", *SPECIFICATIONS[:2], "-o", str(out)]
    assert cli.main([*words, "--json"]) == 0
    sets = json.loads(capsys.readouterr().out)
    assert [entry["codec"] for entry in sets] == SPECIFICATIONS[:2]
    content = json.loads(out.read_text())
    assert content["sets"] == sets
    assert "pooled" in content["definitions"]["psnr"]
    assert content["codecs"]["jpeg:q=20"]["version"].startswith("libjpeg")
    with out.with_suffix(".csv").open() as stream:
        assert [int(row["bytes"]) for row in csv.DictReader(stream)] == [
            row["bytes"] for row in content["rows"]
        ]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "jpeg:q=70" in said
    assert "bytes, bpp, PSNR, PSNR-Y: of the set as a whole" in said


def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = folder / "bad.png"
    bad.write_bytes(b"nothing")
    lines = folder / "two\nlines.png"
    lines.write_bytes((folder / "images" / "a.png").read_bytes())
    for words, message in (
        ([str(folder / "none"), "--codec", "jpeg:q=1", "-o", "r.json"], "no such file"),
        ([str(folder), "--codec", "jpeg:q=1", "-o", "r.txt"], "must end in .json"),
        ([str(bad), "--codec", "jpeg:q=1", "-o", str(folder / "r.json")], "bad.png"),
        ([str(bad), "--codec", "jpg:q=1", "-o", "r.json"], "jpg"),
        ([str(lines), "--codec", "jpeg:q=1", "-o", "r.json"], "a name with control characters"),
    ):
        assert cli.main(["evaluate", *words]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    with pytest.raises(ImageInputError, match=r"bad\.png"):
        evaluate([bad], [codec("jpeg:q=1")], folder / "rows.jsonl")


def test_what_is_not_coded_of_an_image_is_said_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "de":
        Image.new("RGBA", (20, 20), (9, 8, 7, 6)).save(folder / "images" / f"{name}.png")
    evaluate(find_images([folder / "images"]), [codec("jpeg:q=20")], folder / "rows", workers=1)
    remark = "transparency is shown on white; 8-bit RGB is coded and compared (said once)"
    assert capsys.readouterr().err.count(remark) == 1


def test_a_damaged_image_is_told_before_anything_is_coded(folder: Path) -> None:
    """Not after the hours that the images before it take."""
    last = folder / "images" / "c.png"
    last.write_bytes((folder / "images" / "b.png").read_bytes()[:9000])
    coder = Counting(codec("jpeg:q=20"))
    with pytest.raises(ImageInputError, match=r"c\.png: damaged or truncated"):
        evaluate(find_images([folder / "images"]), [coder], folder / "rows.jsonl", workers=1)
    assert coder.codings == 0


def test_a_further_measure_needs_no_second_coding(folder: Path) -> None:
    images, keep, coder = (
        [folder / "images" / "b.png"],
        folder / "kept",
        Counting(codec("jpeg:q=20")),
    )
    for metrics, codings in (((), 1), (["xpsnr"], 1), (["xpsnr"], 1)):
        (row,) = evaluate(images, [coder], folder / "rows.jsonl", 1, keep, metrics=metrics)
        assert coder.codings == codings
        assert set(metrics) <= set(row)
    assert row["encode_seconds"] > 0
    (file,) = keep.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    evaluate(images, [coder], folder / "rows.jsonl", 1, keep)
    assert coder.codings == 2
    assert file.read_bytes() == whole


def test_an_image_named_twice_counts_once(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    named = [tmp_path / "b.png", tmp_path, str(tmp_path / "." / "a.png")]
    assert [path.name for path in find_images(named)] == ["b.png", "a.png"]
