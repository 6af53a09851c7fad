import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from lightning_tucodec import cli
from lightning_tucodec.codecs import library
from lightning_tucodec.codecs.registry import codec
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.quality.curves import Curve, ImageCurves
from lightning_tucodec.report import gallery, page, sources
from lightning_tucodec.report.compare import build_page
from lightning_tucodec.report.figures import rd_figure
from lightning_tucodec.report.gallery import bit_map, matched, picture, scenes
from lightning_tucodec.report.numbers import (
    bd_rows,
    choose_anchor,
    complexity,
    differences,
    few_images,
    flatten,
)
from lightning_tucodec.report.page import Page, Table
from lightning_tucodec.report.sources import Entry, Run, read_run, read_sources
from lightning_tucodec.sets.evaluate import evaluate
from lightning_tucodec.sets.results import summarise, write_results
from tests.support import photo

JPEG = [f"jpeg:q={q}" for q in (10, 25, 50, 75)]
WEBP = [f"webp:q={q}" for q in (5, 30, 60, 85)]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/, results.json and kept/ of two images under two codecs."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "images").mkdir()
    for name, kind in (("cat", "chelsea.png"), ("coffee", "coffee.png")):
        Image.fromarray(photo(kind, 176, 112)).save(folder / "images" / f"{name}.png")
    images = sorted((folder / "images").iterdir())
    codecs = [codec(text) for text in [*JPEG, *WEBP]]
    rows = evaluate(images, codecs, folder / "rows.jsonl", workers=1, keep=folder / "kept")
    write_results(folder / "results.json", rows, summarise(rows, codecs), codecs)
    return folder


def write_run(folder: Path, lmbda: float, bpp: float, psnr: float) -> Path:
    """A run folder as `tucodec fit` leaves it."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "seed_everything": 0,
        "run": {"name": folder.name},
        "model": {"recipe": "mse", "lmbda": lmbda, "preset": "tiny", "codec": None},
        "trainer": {"max_steps": 20},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines: list[dict[str, float]] = [
        {"opt_step": step, "time": 100.0 + step, "train/loss": 2.0 - step / 20}
        for step in range(1, 21)
    ]
    lines.insert(10, {"opt_step": 10, "time": 110.5, "val/bpp": 9.0, "val/psnr": 9.0})
    last = {"val/bpp": bpp, "val/psnr": psnr, "val/ms_ssim": 0.9, "val/centres_used": 30.0}
    lines.append({"opt_step": 20, "time": 121.0, **last})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"opt_step": 21, "tra')
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of five λ, run folders behind links, one task not yet started."""
    folder = tmp_path / "sweeps" / "lambdas-0123"
    (folder / "runs").mkdir(parents=True)
    for index in range(5):
        run = write_run(
            tmp_path / "runs" / f"r{index}", 100.0 * 2**index, 0.1 * 2**index, 26 + 3 * index
        )
        (folder / "runs" / f"mse-{index}").symlink_to(run)
    (folder / "runs" / "mse-5").symlink_to(tmp_path / "runs" / "later")
    return folder


def test_a_sweep_is_one_curve(sweep: Path) -> None:
    material = read_sources([str(sweep)])
    (entry,) = material.entries
    assert entry.curve.name == "lambdas-0123: mse"
    assert entry.curve.lines["psnr"][0] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6])
    assert entry.curve.lines["psnr"][1] == pytest.approx([26, 29, 32, 35, 38])
    assert entry.curve.lines["ms_ssim_db"][1] == pytest.approx([10.0] * 5)
    assert [run.name for run in material.runs] == [f"mse-{i}" for i in range(5)]
    table = differences(material.runs)
    assert table["model.lmbda"] == [100.0, 200.0, 400.0, 800.0, 1600.0]
    assert set(table) == {"model.lmbda", "run.name"}


def test_a_run_counts_its_real_files(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "r", 100.0, 0.3, 30.0))
    assert run.point() == pytest.approx((0.3, 30.0, 10.0))
    real = Run("r", {}, [*run.metrics, {"val/bpp": 0.2, "val/real_bpp": 0.25, "val/psnr": 31.0}])
    assert real.point() == (0.25, 31.0, None)
    assert Run("new", {}, [{"train/loss": 1.0}]).point() is None


def test_flatten() -> None:
    model = {"class_path": "VAE", "init_args": {"lmbda": 1}}
    assert flatten({"model": model}) == {"model.class_path": "VAE", "model.lmbda": 1}
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [2]}) == {"a.b.c": 1, "a.d": {}, "e": [2]}


def test_bd_rows_with_and_without_images(evaluated: Path, tmp_path: Path) -> None:
    curve = {"bpp": [0.3, 0.6, 1.2, 2.4], "psnr-rgb": [25, 29, 33, 37]}
    (tmp_path / "x.json").write_text(json.dumps({"name": "paper", "results": curve}))
    far = {"bpp": [0.1, 0.2, 0.3, 0.4], "psnr-rgb": [10, 11, 12, 13]}
    (tmp_path / "y.json").write_text(json.dumps({"name": "far", "results": far}))
    material = read_sources([str(evaluated / "results.json"), str(tmp_path)])
    names = [entry.curve.name for entry in material.entries]
    assert names == ["jpeg", "webp", "paper", "far"]
    assert [entry.measured for entry in material.entries] == [True, True, False, False]
    assert choose_anchor(material.entries, None) == "jpeg"
    rows = bd_rows(material.entries, "jpeg", samples=20)
    by_key = {(row["codec"], row["quality"]): row for row in rows}
    own = by_key["webp", "psnr"]
    assert own["low"] <= own["percent"] <= own["high"] < 0 < own["decibels"]
    assert own["images"] == 2
    paper = by_key["paper", "psnr"]
    assert paper["low"] is None
    assert np.isfinite(paper["percent"])
    assert ("paper", "ms_ssim_db") not in by_key
    assert "share" in by_key["far", "psnr"]["refused"]
    with pytest.raises(ConfigError, match="no curve is called x; there are jpeg"):
        choose_anchor(material.entries, "x")


def test_two_results_of_one_codec_are_told_apart(evaluated: Path) -> None:
    path = str(evaluated / "results.json")
    material = read_sources([path, path])
    names = [entry.curve.name for entry in material.entries]
    assert names == ["jpeg (1)", "webp (1)", "jpeg (2)", "webp (2)"]
    row = bd_rows(material.entries, "jpeg (1)", samples=5)[2]
    assert (row["codec"], row["percent"]) == ("jpeg (2)", pytest.approx(0, abs=1e-9))


class StubApi:
    """Stands for `wandb.Api`; what it returns has the attributes that W&B documents."""

    asked: Any = None

    class Run:
        def __init__(self, number: int) -> None:
            self.name = f"mse-{number}"
            self.config = {"model": {"lmbda": number}, "_wandb": {}}

        def scan_history(self) -> Any:
            number = self.config["model"]["lmbda"]
            yield {"_step": 1, "opt_step": 20, "val/bpp": 0.1 * number, "val/psnr": 20.0 + number}
            yield {"_step": 0, "opt_step": 10, "train/loss": 1.5}

    def runs(self, path: str, filters: Any = None) -> list["StubApi.Run"]:
        StubApi.asked = (path, filters)
        return [] if path == "me/empty" else [StubApi.Run(n) for n in (10, 2, 3, 4)]


def test_wandb_against_a_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(wandb, "Api", StubApi)
    material = read_sources(["wandb:me/project/group"])
    assert StubApi.asked == ("me/project", {"group": "group"})
    assert [run.name for run in material.runs] == ["mse-2", "mse-3", "mse-4", "mse-10"]
    assert material.entries[0].curve.lines["psnr"][0] == pytest.approx([0.2, 0.3, 0.4, 1.0])
    assert [row["opt_step"] for row in material.runs[0].metrics] == [10, 20]
    with pytest.raises(ConfigError, match="has no such run"):
        read_sources(["wandb:me/empty"])
    with pytest.raises(ConfigError, match="not wandb:ENTITY/PROJECT"):
        read_sources(["wandb:a/b/c/d"])


def test_matched_rates() -> None:
    rows = [
        {"codec": f"{name}:q={q}", "bpp": factor * q / 10}
        for name, factor in (("jpeg", 1), ("webp", 0.5))
        for q in (1, 2, 4, 8)
    ]
    assert [row["codec"] for row in matched(rows, None)] == ["jpeg:q=2", "webp:q=4"]
    assert [row["codec"] for row in matched(rows, 0.79)] == ["jpeg:q=8", "webp:q=8"]


def test_a_picture_says_how_it_is_stored() -> None:
    image = photo("chelsea.png", 128, 96)
    assert picture(image, 1_000_000)[1] == "shown exactly"
    uri, how = picture(image, 3_000)
    assert re.fullmatch(r"shown as WebP \d\d", how)
    assert len(uri) < 4_500


def test_many_large_pictures_are_scaled_down_alike(
    evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for 31 images of 2.8 megapixels: even the coarsest WebP of each is too large."""
    monkeypatch.setattr(gallery, "BUDGET", 24_000)
    material = read_sources([str(evaluated / "results.json")])
    shown = scenes(material.evaluations, [str(evaluated / "images")], 1.0, 2)
    for scene in shown:
        scales = {re.search(r"at 1/(\d) of its size", view.detail) for view in scene.views}
        assert len({found and found[1] for found in scales}) == 1
        assert (scene.views[0].width, scene.views[0].height) == (176, 112)
    assert sum(len(view.uri) for scene in shown for view in scene.views) < 24_000 * 1.4
    assert "of its size" in shown[0].views[0].detail


def test_the_gallery_shows_what_was_coded(
    evaluated: Path, val_folder: Path, tmp_path: Path
) -> None:
    material = read_sources([str(evaluated / "results.json")])
    damaged = shutil.copytree(evaluated / "kept", tmp_path / "damaged")
    for file in damaged.iterdir():  # a JPEG still decodes, to another picture
        file.write_bytes(file.read_bytes()[:-200] + bytes(200))
    pictures = []
    for kept in (None, evaluated / "kept", damaged):
        shown = scenes(material.evaluations, [str(evaluated / "images")], 1.0, 1, kept)
        assert [scene.name for scene in shown] == ["cat.png"]
        names = [view.name for view in shown[0].views]
        assert names[0] == "original"
        assert [name.split(":")[0] for name in names[1:]] == ["jpeg", "webp"]
        assert all("shown exactly" in view.detail for view in shown[0].views)
        pictures.append([view.uri for view in shown[0].views])
    assert pictures[0] == pictures[1] == pictures[2]
    with pytest.raises(ConfigError, match="none of the images"):
        scenes(material.evaluations, [str(val_folder / "cup.png")])
    with pytest.raises(ConfigError, match=r"needs a results\.json"):
        scenes([], [str(evaluated / "images")])


def test_a_bit_map_adds_up_to_the_estimate() -> None:
    model = library.untrained("tiny")
    image = photo("coffee.png", 150, 90)
    bits = bit_map(model, image)
    assert bits is not None
    assert bits.shape == (6, 10)
    assert bits.min() > 0
    assert bits.sum() == pytest.approx(model.estimated_bits(image), rel=1e-5)
    assert bit_map(codec("jpeg:q=5"), image) is None


def test_complexity_is_that_of_bench() -> None:
    from lightning_tucodec.bench.complexity import of_preset

    arguments = {"preset": "tiny", "codec": None}
    for model in (arguments, {"class_path": "VAE", "init_args": arguments}):
        assert complexity({"model": model}) == of_preset("tiny")[1:]
    assert complexity({"model": {"preset": "of another version"}}) is None
    assert complexity({"model": {}}) is None


def test_text_from_outside_stays_text() -> None:
    evil = '</script><img src=x onerror="alert(1)">'
    material = sources.Material()
    curve = Curve.of(evil, [1, 2], {"psnr": [30, 31]}, evil)
    material.entries.append(sources.Entry(curve))
    html = page.render(build_page(material, None, evil)[0])
    assert "<img src=x" not in html
    assert html.count("</script>") == 3
    assert "connect-src" not in html
    assert "default-src 'none'" in html


def test_a_page_that_is_too_large_is_refused(tmp_path: Path) -> None:
    table = Table("t", ["c"], [["x" * 16_000_000]], "")
    with pytest.raises(ConfigError, match="show fewer pictures"):
        page.write_page(tmp_path / "r.html", Page("t", [], {"sources": [table]}, []))
    assert not list(tmp_path.iterdir())


def test_command_line(
    evaluated: Path, sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "r.html"
    words = [str(evaluated / "results.json"), str(sweep), "published:kodak#HiFiC"]
    words += ["--samples", "20"]
    words += ["--images", str(evaluated / "images"), "-o", str(out)]
    assert cli.main(["compare", *words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["codec"] for row in rows} == {"webp", "lambdas-0123: mse", "HiFiC"}
    html = out.read_text()
    for text in ("Centres that the validation images use", "model.lmbda", "HiFiC", "libjpeg"):
        assert text in html
    assert not re.search(r"(?:src|href)=[\"']?https?:", html.split("<script>")[0])
    written = {"r.html", "r-psnr.png", "r-psnr.svg", "r-ms-ssim.png", "r-ms-ssim.svg"}
    assert "intervals over 2 images are rough" in html
    assert cli.main(["compare", *words, "--force"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("BD-rate against jpeg, of means over the images\n")
    assert "(intervals over 2 images are rough: use 5 at least)\n" in said
    assert few_images([{"images": 5}, {"images": None}, {"refused": ""}]) == ""
    assert set(os.listdir(out.parent)) == written
    assert out.stat().st_size < page.MAX_BYTES


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.json", "-o", "r.html"], "none.json: no such file or folder"),
        (["published:kodak", "-o", "r.txt"], "must end in .html"),
        (["pyproject.toml", "-o", "r.html"], "pyproject.toml: not JSON"),
        (["tests", "-o", "r.html"], "tests: neither a run, nor a sweep"),
        (["published:kodak", "--anchor", "x", "-o", "r.html"], "no curve is called x"),
        (["published:kodak", "--images", "tests/", "-o", "r.html"], "the gallery needs"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_one_set_of_images_for_all_differences() -> None:
    """The same codec on six and on two of these images differs by nothing."""
    rng = np.random.default_rng(0)
    bpp = np.array([0.2, 0.4, 0.8, 1.6]) * rng.uniform(0.5, 2, (6, 1))
    psnr = np.array([26.0, 30, 34, 38]) + rng.uniform(-5, 5, (6, 1))
    names = [f"{i}.png" for i in range(6)]
    entries = []
    for name, count in (("all", 6), ("two", 2)):
        part = bpp[:count], psnr[:count], np.full((count, 4), 0.9)
        images = ImageCurves(name, names[:count], *part)
        entries.append(Entry(images.mean(), images))
    row = bd_rows(entries, "all", samples=5, rates=(0.5,))[0]
    assert row["percent"] == pytest.approx(0, abs=1e-9)
    assert row["decibels"] == pytest.approx(0, abs=1e-9)
    assert row["at"][0][1] == pytest.approx(0, abs=1e-9)


def test_a_curve_of_ms_ssim_alone_may_come_first() -> None:
    curve = Curve.of("s", [0.1, 0.2, 0.3, 0.4], {"ms_ssim_db": [8, 10, 12, 14]})
    assert choose_anchor([Entry(curve, measured=False)], None) == "s"


def test_names_of_curves_are_text(tmp_path: Path) -> None:
    names = [r"a $\frac$ b", "_hidden", "plain"]
    curves = [Curve.of(n, [0.1, 0.2], {"psnr": [30 + i, 33 + i]}) for i, n in enumerate(names)]
    _, svg = rd_figure(curves, tmp_path / "x.png")
    assert all(name in svg.read_text() for name in names)


def edited(source: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a results.json, or of one that was edited, whose rows have changed."""
    content = json.loads(source.read_text())
    for row in content["rows"]:
        edit(row)
    target.write_text(json.dumps(content))
    return target


@pytest.mark.parametrize(("key", "value"), [("bpp", -0.5), ("bpp", 0), ("bytes", -1), ("width", 0)])
def test_impossible_sizes_are_named(
    key: str,
    value: float,
    evaluated: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = edited(
        evaluated / "results.json", tmp_path / "odd.json", lambda row: row.update({key: value})
    )
    assert cli.main(["compare", str(path), "-o", str(tmp_path / "r.html")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tucodec: {path}: ")
    assert f"{key} of a row is not above 0" in line


def test_the_bootstrap_is_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", "published:kodak", "-o", "r.html", "--samples", "1000000000"])
    assert "it must be 1 at least and 1e+06 at most" in capsys.readouterr().err


def test_an_image_without_a_psnr_is_named_and_left_out(evaluated: Path, tmp_path: Path) -> None:
    """As of a white image, or of a null: PSNR has no `cat`, MS-SSIM all."""

    def white(row: dict[str, Any]) -> None:
        if row["image"] == "cat.png" and row["codec"] in JPEG[1:]:
            row["psnr"] = None
        if row["image"] == "cat.png" and row["codec"] in WEBP[:2]:
            row["bpp"] = None

    path = edited(evaluated / "results.json", tmp_path / "r.json", white)
    material = read_sources([str(path)])
    assert material.notes == [
        "jpeg: PSNR is not finite and leaves out cat.png",
        "webp: PSNR is not finite and leaves out cat.png",
        "webp: MS-SSIM is not finite and leaves out cat.png",
    ]
    page, rows = build_page(material, None, "t", samples=5)
    assert [(row["quality"], row["images"]) for row in rows] == [("psnr", 1), ("ms_ssim_db", 1)]
    table = page.tables["points"][0]
    assert len(table.rows) == 4 + 4 + 4
    gallery = scenes(material.evaluations, [str(evaluated / "images")], None, 1)
    assert len(gallery[0].views) == 3


@pytest.fixture(scope="module")
def other_pictures(evaluated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `evaluated`, under the same names: `cat` is another picture, `coffee` the same one."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "images").mkdir()
    Image.fromarray(photo("rocket.jpg", 176, 112)).save(folder / "images" / "cat.png")
    shutil.copy(evaluated / "images" / "coffee.png", folder / "images" / "coffee.png")
    codecs = [codec(text) for text in JPEG]
    rows = evaluate(sorted((folder / "images").iterdir()), codecs, folder / "rows.jsonl", workers=1)
    write_results(folder / "results.json", rows, summarise(rows, codecs), codecs)
    return folder


def test_a_picture_under_two_names_is_told(evaluated: Path, tmp_path: Path) -> None:
    content = json.loads((evaluated / "results.json").read_text())
    content["rows"] += [
        {**row, "image": "copy.png"} for row in content["rows"] if row["image"] == "cat.png"
    ]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content))
    (note,) = read_sources([str(path)]).notes
    assert "copy.png is the same picture as cat.png; differences and sets count it once" in note


def test_a_picture_is_its_content(evaluated: Path, other_pictures: Path, tmp_path: Path) -> None:
    paths = [str(folder / "results.json") for folder in (evaluated, other_pictures)]
    material = read_sources(paths)
    assert "cat.png: is not the same picture in all results; different ones are not compared" in (
        material.notes
    )
    row = next(r for r in bd_rows(material.entries, "jpeg (1)", 5) if r["codec"] == "jpeg (2)")
    assert (row["images"], row["percent"]) == (1, pytest.approx(0, abs=1e-9))

    def renamed(row: dict[str, Any]) -> None:
        row["image"] = f"x-{row['image']}"

    again = edited(Path(paths[0]), tmp_path / "renamed.json", renamed)
    row = bd_rows(read_sources([paths[0], str(again)]).entries, "jpeg (1)", 5)[2]
    assert (row["images"], row["percent"]) == (2, pytest.approx(0, abs=1e-9))

    def only_cat(row: dict[str, Any]) -> None:
        row["pixels"] = f"{row['image']} of another day"

    alien = edited(Path(paths[0]), tmp_path / "alien.json", only_cat)
    row = bd_rows(read_sources([paths[0], str(alien)]).entries, "jpeg (1)", 5)[2]
    assert "share no image: cat.png, coffee.png are other pictures in each" in row["refused"]

    def forget(row: dict[str, Any]) -> None:
        del row["pixels"]

    old = edited(Path(paths[0]), tmp_path / "old.json", forget)
    material = read_sources([paths[0], str(old)])
    assert f"{old}: does not hold its pictures' content, so they are matched by name" in (
        material.notes
    )
    row = bd_rows(material.entries, "jpeg (1)", 5)[2]
    assert (row["images"], row["percent"]) == (2, pytest.approx(0, abs=1e-9))


def test_the_gallery_finds_originals_of_one_name(evaluated: Path, other_pictures: Path) -> None:
    material = read_sources([str(f / "results.json") for f in (evaluated, other_pictures)])
    originals = [str(folder / "images") for folder in (other_pictures, evaluated)]
    shown = scenes(material.evaluations, originals, 1.0)
    assert [scene.name for scene in shown] == ["cat.png", "coffee.png", "cat.png"]
    names = [[view.name for view in scene.views] for scene in shown]
    assert [len(own) for own in names] == [3, 4, 2]
    assert len(set(names[1])) == 4
    assert shown[0].views[0].uri != shown[2].views[0].uri
