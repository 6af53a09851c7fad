import hashlib
import json
import os
import shlex
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut

from lightning_tucodec import cli
from lightning_tucodec.codecs.learned.model_file import freeze
from lightning_tucodec.codecs.registry import codec
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io import ffmpeg
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.sets import clic, clic2019
from lightning_tucodec.sets.contents import DECODE_TEXT, budgets, foreign
from lightning_tucodec.sets.evaluate import evaluate
from lightning_tucodec.sets.manifest import (
    FORMAT,
    Limits,
    budget_name,
    byte_budget,
    read_manifest,
)
from lightning_tucodec.training.vae import resolve_codec
from tests.support import MICRO

CANDIDATES = ["jpeg:q=10", "jpeg:q=40", "webp:q=30", "webp:q=80"]


@pytest.fixture(scope="module")
def submission(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three crops of a photograph, coded to 0.6 bpp; `photos` beside holds them."""
    folder = tmp_path_factory.mktemp("clic")
    (folder / "photos").mkdir()
    for index, top in enumerate((0, 150, 300)):
        part = astronaut()[top : top + 100, 150:290]
        Image.fromarray(part).save(folder / "photos" / f"{index}.png")
    words = ["allocate", str(folder / "photos"), "--candidate", *CANDIDATES, "--maximise", "psnr"]
    assert cli.main([*words, "--max-bpp", "0.9", "-o", str(folder / "submission")]) == 0
    return folder / "submission"


@pytest.fixture
def copy(submission: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(submission, tmp_path / "copy"))


def verify(folder: Path, submission: Path, *options: str) -> int:
    words = ["clic", "verify", str(folder), "--originals", str(submission.parent / "photos")]
    return cli.main([*words, "--json", *options])


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_written_keeps_to_the_budget(
    submission: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(submission, submission) == 0
    totals = json.loads(capsys.readouterr().out)
    assert totals["wrong"] == []
    manifest = json.loads((submission / "manifest.json").read_text())
    size = sum(path.stat().st_size for path in (submission / "streams").iterdir())
    assert totals["bytes"] == size == manifest["totals"]["bytes"]
    assert size <= manifest["limits"]["max_bytes"] == byte_budget(0.9, 3 * 100 * 140)
    assert manifest["totals"]["gap"] == 0
    used = {entry["codec"] for entry in manifest["images"]}
    assert used == set(manifest["codecs"]) <= set(CANDIDATES)


def test_decode_gives_the_codecs_pictures(submission: Path, tmp_path: Path) -> None:
    assert cli.main(["clic", "decode", str(submission), "-o", str(tmp_path)]) == 0
    for entry in json.loads((submission / "manifest.json").read_text())["images"]:
        with Image.open(tmp_path / entry["image"]) as decoded:
            expected = codec(entry["codec"]).decode((submission / entry["file"]).read_bytes())
            assert np.array_equal(np.array(decoded), expected)


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "streams/1.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "streams/1.bin").write_bytes(data)


def swap_files(folder: Path) -> None:
    (folder / "streams/0.bin").rename(folder / "x")
    (folder / "streams/1.bin").rename(folder / "streams/0.bin")
    (folder / "x").rename(folder / "streams/1.bin")


def swap_files_and_hashes(folder: Path) -> None:
    swap_files(folder)

    def change(manifest: dict[str, Any]) -> None:
        a, b = manifest["images"][:2]
        for key in ("sha256", "bytes", "codec"):
            a[key], b[key] = b[key], a[key]

    edit(folder, change)


def one_byte_over(folder: Path) -> None:
    edit(folder, lambda m: m["limits"].update(max_bytes=m["totals"]["bytes"] - 1))


def lie_about_quality(folder: Path) -> None:
    edit(folder, lambda m: m["totals"].update(psnr=m["totals"]["psnr"] + 0.01))


def lie_about_the_bound(folder: Path) -> None:
    edit(folder, lambda m: m["totals"].update(bound=10**14, gap=0.0))


def lie_about_the_gap(folder: Path) -> None:
    edit(folder, lambda m: m["totals"].update(gap=-5.0))


def lie_about_what_was_minimised(folder: Path) -> None:
    edit(folder, lambda m: m.update(minimised="bytes" if m["minimised"] != "bytes" else "sse"))


def lie_about_the_method(folder: Path) -> None:
    edit(folder, lambda m: m["totals"].update(method="magic"))


def lie_about_an_image(folder: Path) -> None:
    edit(folder, lambda m: m["images"][2].update(sse=1))


def append_a_byte(folder: Path) -> None:
    data = (folder / "streams/0.bin").read_bytes() + b"\0"
    (folder / "streams/0.bin").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit(folder, lambda m: m["images"][0].update(sha256=digest, bytes=len(data)))


def cut_off_a_byte(folder: Path) -> None:
    data = (folder / "streams/0.bin").read_bytes()[:-1]
    (folder / "streams/0.bin").write_bytes(data)


def hide_a_model(folder: Path) -> None:
    (folder / "models/more.safetensors").write_bytes(b"bits from elsewhere")


def hide_a_file(folder: Path) -> None:
    (folder / "streams/extra.bin").write_bytes(b"bits from elsewhere")


def leave_an_image_out(folder: Path) -> None:
    edit(folder, lambda m: m["images"].pop())


def change_the_script(folder: Path) -> None:
    (folder / "decode").write_text(DECODE_TEXT + "rm -rf ~\n")


def link_to_the_outside(folder: Path) -> None:
    (folder / "streams/more").symlink_to(folder.parent)


def link_a_stream(folder: Path) -> None:
    outside = (folder / "streams/0.bin").rename(folder.parent / "outside")
    (folder / "streams/0.bin").symlink_to(outside)


def stop_at_a_pipe(folder: Path) -> None:
    (folder / "decode").unlink()
    os.mkfifo(folder / "decode")


def take_the_right_to_run(folder: Path) -> None:
    (folder / "decode").chmod(0o644)


def hide_a_folder(folder: Path) -> None:
    (folder / "streams/.hidden").mkdir()


def hide_a_file_deep(folder: Path) -> None:
    (folder / "models/streams").mkdir()
    (folder / "models/streams/0.bin").write_bytes(b"bits from elsewhere")


def a_bomb(folder: Path) -> None:
    """A JPEG that claims 60000×60000 pixels."""
    entry = json.loads((folder / "manifest.json").read_text())["images"][0]
    assert entry["codec"].startswith("jpeg")
    data = (folder / "streams/0.bin").read_bytes()
    at = data.index(b"\xff\xc0") if b"\xff\xc0" in data else data.index(b"\xff\xc2")
    data = data[: at + 5] + struct.pack(">HH", 60000, 60000) + data[at + 9 :]
    (folder / "streams/0.bin").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit(folder, lambda m: m["images"][0].update(sha256=digest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, "streams/1.bin (1.png): is damaged or another file"),
        (swap_files, "streams/0.bin (0.png): is damaged or another file"),
        (swap_files_and_hashes, "sse is"),
        (one_byte_over, "the claimed limit on bytes is missed"),
        (lie_about_quality, "in total psnr is"),
        (lie_about_an_image, "streams/2.bin (2.png): sse is"),
        (lie_about_the_bound, "is reached, which the bound 100000000000000 excludes"),
        (lie_about_the_gap, "above the bound, not -5.0"),
        (lie_about_what_was_minimised, "the bound"),
        (hide_a_folder, "a folder 'streams/.hidden': not in the manifest"),
        (lie_about_the_method, "the choice was made by 'magic', which is no method of `allocate`"),
        (append_a_byte, "in total bytes is"),
        (cut_off_a_byte, "streams/0.bin (0.png): is damaged or another file"),
        (hide_a_model, "models/more.safetensors: not in the manifest"),
        (hide_a_file, "streams/extra.bin: not in the manifest"),
        (leave_an_image_out, "2.png: has no stream"),
        (change_the_script, "decode: is not the script that"),
        (stop_at_a_pipe, "decode: is not a file"),
        (take_the_right_to_run, "decode: cannot be executed; chmod +x decode"),
        (link_to_the_outside, "streams/more: not in the manifest"),
        (link_a_stream, "streams/0.bin (0.png): is a link, or lies behind one"),
        (hide_a_file_deep, "models/streams/0.bin: not in the manifest"),
        (a_bomb, "streams/0.bin (0.png): not a whole JPEG file: Image size (3600000000 pixels)"),
    ],
)
def test_verify_catches(
    damage: Callable[[Path], None],
    message: str,
    copy: Path,
    submission: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(copy)
    assert verify(copy, submission) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert message in "\n".join(json.loads(captured.out)["wrong"])
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("option", "value", "missed"),
    [
        ("--max-bpp", "0.8", "the limit on bytes is missed: 4650 against 4200"),
        ("--max-bytes", "4649", "the limit on bytes is missed: 4650 against 4649"),
        ("--min-psnr", "40", "the limit on sse is missed"),
        ("--min-ms-ssim", "0.999", "the limit on ms_ssim is missed"),
        ("--max-bytes", "4650", ""),
    ],
)
def test_the_caller_sets_the_limits(
    option: str, value: str, missed: str, submission: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(submission, submission, option, value) == int(missed != "")
    assert missed in capsys.readouterr().err


def test_limits_that_nobody_asked_for_are_claims(
    copy: Path, submission: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = str(submission.parent / "photos")
    (copy / ".DS_Store").write_bytes(b"of the Finder")
    assert cli.main(["clic", "verify", str(copy), "--originals", photos]) == 0
    assert "limits claimed by the submission, not asked for by --max-bpp, …: max_bytes 4725" in (
        capsys.readouterr().out
    )


def test_equal_names_of_originals_are_named(
    submission: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = submission.parent / "photos"
    other = Path(shutil.copy(photos / "1.png", tmp_path / "0.png"))
    words = ["clic", "verify", str(submission), "--originals", str(photos)]
    assert cli.main([*words, str(other)]) == 1
    assert f"{photos / '0.png'} and {other}: two originals" in capsys.readouterr().err


def test_nothing_runs_from_the_submission(
    copy: Path, submission: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who stands in a hostile folder: neither `verify` nor `decode` takes modules from there."""
    (copy / "lightning_tucodec.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(copy)
    assert verify(Path("."), submission) == 1
    environment = {**os.environ, "PYTHON": sys.executable}
    (tmp_path / "link").symlink_to(copy / "decode")
    out = str(tmp_path / "out")
    subprocess.run([str(tmp_path / "link"), out], check=True, env=environment, timeout=300)
    assert len(list(Path(out).iterdir())) == 3
    assert not (tmp_path / "ran").exists()


def test_a_decoder_above_the_limit_is_refused(
    submission: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify(submission, submission) == 0
    size = json.loads(capsys.readouterr().out)["decoder_bytes"]
    assert 100_000 < size < clic.MAX_DECODER_BYTES
    monkeypatch.setattr(clic, "MAX_DECODER_BYTES", size - 1)
    assert verify(submission, submission) == 1
    assert f"the decoder has {size} bytes, over {size - 1}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["hevc:qp=30", "jxl:distance=1", "vvc:qp=3", "vvc+postfilter:qp=3"]
)
def test_ffmpeg_counts_whatever_the_manifest_says(name: str, tmp_path: Path) -> None:
    sizes = [
        clic.decoder_bytes(tmp_path, {"images": [], "codecs": {codec_name: {}}})
        for codec_name in (name, "jpeg:q=3")
    ]
    assert sizes[0] - sizes[1] == Path(ffmpeg.executable()).stat().st_size


@pytest.fixture(scope="module")
def learned(submission: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A submission whose streams a learned model and its refining encoder wrote."""
    folder = tmp_path_factory.mktemp("learned")
    torch.manual_seed(0)
    network = TucodecVAE(resolve_codec("tiny", MICRO))
    model = folder / "micro.safetensors"
    freeze(network, "micro", {"recipe": "mse", "lmbda": 100.0}).save(model)
    photos = str(submission.parent / "photos")
    words = ["allocate", photos, "--candidate", str(model), f"{model}:effort=1", "--max-bpp", "99"]
    assert cli.main([*words, "--maximise", "psnr", "-o", str(folder / "submission")]) == 0
    model.unlink()
    return folder / "submission"


def test_models_travel_with_the_submission(
    learned: Path, submission: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model lies nowhere else any more, and the process that decodes knows no other folder."""
    assert verify(learned, submission) == 0
    totals = json.loads(capsys.readouterr().out)
    models = list((learned / "models").iterdir())
    assert len(models) == 1
    assert totals["decoder_bytes"] > models[0].stat().st_size
    folder = Path(shutil.copytree(learned, tmp_path / "copy"))
    data = bytearray(models[0].read_bytes())
    data[-1] ^= 1
    (folder / "models" / models[0].name).write_bytes(data)
    assert verify(folder, submission) == 1
    assert f"models/{models[0].name}: is damaged or another file" in capsys.readouterr().err


def test_models_of_one_name_are_told_apart(
    submission: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for seed in range(2):
        torch.manual_seed(seed)
        (tmp_path / f"run{seed}").mkdir()
        files.append(str(tmp_path / f"run{seed}" / "model.safetensors"))
        freeze(TucodecVAE(resolve_codec("tiny", MICRO)), "model", {}).save(Path(files[seed]))
    photo, out = str(submission.parent / "photos/0.png"), str(tmp_path / "results.json")
    assert cli.main(["evaluate", photo, "--codec", *files, "jpeg:q=9", "-o", out]) == 0
    names = [entry["codec"] for entry in json.loads(Path(out).read_text())["sets"]]
    assert len(set(names)) == 3
    assert [name.partition("@")[0] for name in names] == ["model", "model", "jpeg:q=9"]
    shutil.copy(files[0], files[1])
    assert cli.main(["evaluate", photo, "--codec", *files, "-o", out]) == 1
    assert f"the codec {names[0]} is given twice" in capsys.readouterr().err


def test_the_decode_command_in_the_submission(submission: Path, tmp_path: Path) -> None:
    script = submission / "decode"
    assert script.stat().st_mode & stat.S_IXUSR
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([str(script), str(tmp_path)], check=True, env=environment, timeout=300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png"]


def test_compare_puts_tucodecs_entry_beside(
    submission: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = str(submission.parent / "photos")
    assert cli.main(["clic", "compare", str(submission), "--originals", photos]) == 0
    out = capsys.readouterr().out
    assert "| TucodecPSNR, 2019 | 102 | 251.86 | 4722141 | 0.14999 | 32.520 | 0.9640 |" in out
    assert "TucodecSSIM" not in out
    assert "Not comparable" in out


def test_the_validation_set_is_known_by_its_pixels(
    submission: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["clic", "check", str(submission.parent / "photos")]) == 1
    assert "3 images, 0.04 Mpx" in capsys.readouterr().out
    assert clic2019.is_validation_set(102, 251_858_200)
    assert not clic2019.is_validation_set(102, 251_860_000)
    assert not clic2019.is_validation_set(101, 251_858_200)


def test_a_slurm_array_fills_the_cache_that_the_last_job_chooses_from(
    submission: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What sbatch would run, run by a shell; tests/cluster has a real Slurm."""
    (tmp_path / "site.sh").write_text(f'SITE_TUCODEC="{sys.executable} -m lightning_tucodec.cli"\n')
    monkeypatch.setenv("TUCODEC_SITE", str(tmp_path / "site.sh"))
    photos, out = str(submission.parent / "photos"), tmp_path / "two words"
    words = ["allocate", photos, "--candidate", *CANDIDATES[:2], "--max-bpp", "0.9", "-o", str(out)]
    words += ["--trust", "one", "--trust", "two"]
    assert cli.main([*words, "--maximise", "psnr", "--slurm", "2", "--dry-run"]) == 0
    array, last = (shlex.split(line) for line in capsys.readouterr().out.splitlines())
    assert all("--trust one --trust two" in " ".join(job) for job in (array, last))
    assert {"--array=1-2", "--requeue"} <= set(array)
    assert "--dependency=afterany:ARRAY" in last
    beside = out.with_name(f"{out.name}-candidates")
    assert not beside.exists()
    for command, task in ((array, "1"), (array, "2"), (last, "")):
        launcher = next(i for i, word in enumerate(command) if word.endswith("allocate.sh"))
        environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": task}
        subprocess.run(command[launcher:], check=True, env=environment, timeout=300)
    lines = {path.name: len(path.read_text().splitlines()) for path in beside.glob("rows*")}
    assert lines == {"rows.1-of-2.jsonl": 3, "rows.2-of-2.jsonl": 3, "rows.jsonl": 0}
    assert verify(out, submission) == 0


def test_a_budget_without_a_quality_is_remarked(
    submission: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = str(submission.parent / "photos")
    words = ["allocate", photos, "--candidate", "jpeg:q=10", "jpeg:q=80", "--max-bpp", "9"]
    for number, (quality, told) in enumerate(
        (([], True), (["--maximise", "psnr"], False), (["--min-psnr", "20"], False))
    ):
        assert cli.main([*words, *quality, "-o", str(tmp_path / str(number))]) == 0
        assert ("the smallest files" in capsys.readouterr().err) == told


def test_shares_and_arrays_that_cannot_be(
    submission: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos = str(submission.parent / "photos")
    words = ["allocate", photos, "--candidate", "jpeg:q=5", "-o", str(tmp_path / "s")]
    words += ["--max-bpp", "9"]
    for more, message in (
        (["--part", "3/2"], "there are parts 1 to 2"),
        (["--dry-run"], "belongs to --slurm"),
        (["--slurm", "4", "--dry-run"], "--slurm 4: more jobs than images (3)"),
    ):
        assert cli.main([*words, *more]) == 1
        assert message in capsys.readouterr().err
    if shutil.which("sbatch") is None:
        assert cli.main([*words, "--slurm", "2"]) == 1
        assert "sbatch is not there" in capsys.readouterr().err


def test_another_budget_codes_nothing_again(
    submission: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = submission.with_name("submission-candidates")
    shutil.copytree(beside, tmp_path / "s-candidates")
    before = (beside / "rows.jsonl").read_text()
    photos = str(submission.parent / "photos")
    words = ["allocate", photos, "--candidate", *CANDIDATES, "-o", str(tmp_path / "s"), "--json"]
    assert cli.main([*words, "--min-psnr", "26", "--min-ms-ssim", "0.9"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) >= {"bytes", "bpp", "psnr", "ms_ssim", "bound", "gap"}
    assert result["psnr"] >= 26
    assert result["ms_ssim"] >= 0.9
    assert (tmp_path / "s-candidates" / "rows.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "without a limit"),
        (["--max-bpp", "0.001"], "add a candidate coarser than"),
        (["--max-bpp", "1", "--max-bytes", "9"], "not both"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    options: list[str],
    message: str,
    submission: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos = str(submission.parent / "photos")
    words = ["allocate", photos, "--candidate", *CANDIDATES[:2], "-o", str(tmp_path / "s")]
    assert cli.main([*words, *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_images_that_cannot_be_in_a_submission_are_told_before_anything_is_coded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, width in (("a.png", 20), ("a.jpg", 20), ("b.png", 10)):
        Image.new("RGB", (width, 300)).save(tmp_path / name)
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    words = ["--candidate", "jpeg:q=20", "--max-bpp", "9", "-o", str(tmp_path / "out")]
    for images, message in (
        ([a, b], f"{b}: too small for MS-SSIM, which needs 11 pixels a side"),
        ([a, str(tmp_path / "a.jpg")], "a.jpg: both would be decoded to a.png; rename one"),
    ):
        assert cli.main(["allocate", *images, *words]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out-candidates").exists()


def web_app(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "manifest.json").write_text('{"name": "app", "icons": []}')
    (folder / "index.html").write_text("years of work")


def empty_folder_inside(folder: Path) -> None:
    (folder / "plans").mkdir()


def only_the_manifest(folder: Path) -> None:
    shutil.rmtree(folder / "streams")


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("years of work")


@pytest.mark.parametrize(
    "damage",
    [
        web_app,
        hide_a_file,
        hide_a_model,
        flip_a_byte,
        change_the_script,
        link_to_the_outside,
        empty_folder_inside,
        only_the_manifest,
        a_file,
    ],
)
def test_a_folder_of_something_else_is_not_replaced(
    damage: Callable[[Path], None],
    copy: Path,
    submission: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(copy)
    before = tree(copy)
    words = ["allocate", str(submission.parent / "photos"), "--candidate", "jpeg:q=5"]
    assert cli.main([*words, "--max-bpp", "9", "-o", str(copy)]) == 1
    assert str(copy) in capsys.readouterr().err
    assert tree(copy) == before
    assert [path.name for path in copy.parent.iterdir() if path.name.startswith(".")] == []


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder with its content; links are not followed."""
    return {
        str(path): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted([folder, *folder.rglob("*")])
    }


def test_a_former_submission_is_replaced_and_never_lost(
    copy: Path,
    submission: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whole ones exist whenever a process may be killed; what comes in at the last moment is kept."""
    (copy / ".DS_Store").write_bytes(b"of the Finder")
    (copy.parent / ".copy.new").mkdir()
    (copy.parent / ".copy.new" / "thesis.tex").write_text("years of work")
    photos = str(submission.parent / "photos")
    words = ["allocate", photos, "--candidate", *CANDIDATES, "--max-bpp", "2", "-o", str(copy)]
    rename, seen = Path.rename, []

    def spy(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        found = [foreign(path.parent) for path in copy.parent.rglob("manifest.json")]
        seen.append(found.count(None))
        return moved

    monkeypatch.setattr(Path, "rename", spy)
    assert cli.main(words) == 0
    assert seen == [2, 2]
    assert read_manifest(copy)["limits"]["max_bytes"] == byte_budget(2, 3 * 100 * 140)
    assert (copy.parent / ".copy.new" / "thesis.tex").exists()
    assert {path.name for path in copy.parent.iterdir()} == {"copy", "copy-candidates", ".copy.new"}
    capsys.readouterr()

    before = tree(copy)

    def late(self: Path, target: Path) -> Path:
        if self == copy:
            (copy / "thesis.tex").write_text("years of work")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert cli.main(words) == 1
    assert "thesis.tex: not in the manifest" in capsys.readouterr().err
    assert tree(copy) == {**before, str(copy / "thesis.tex"): b"years of work"}
    assert {path.name for path in copy.parent.iterdir()} == {"copy", "copy-candidates", ".copy.new"}


def test_inputs_inside_the_target_are_kept(
    learned: Path, submission: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(learned)
    (model,) = (learned / "models").iterdir()
    photos = str(submission.parent / "photos")
    for words in ([str(learned / "streams/0.bin"), "--candidate", "jpeg:q=5"],
                  [photos, "--candidate", "jpeg:q=5", f"{model}:effort=1"]):  # fmt: skip
        assert cli.main(["allocate", *words, "--max-bpp", "9", "-o", str(learned)]) == 1
        assert "which is to be replaced" in capsys.readouterr().err
    assert tree(learned) == before


def test_junk_in_the_cache_is_coded_again(
    submission: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = Path(
        shutil.copytree(submission.with_name("submission-candidates"), tmp_path / "s-candidates")
    )
    for path in (beside / "streams").iterdir():
        path.write_bytes(b"junk")
    rows = [json.loads(line) for line in (beside / "rows.jsonl").read_text().splitlines()]
    rows[0]["sha256"] = "../../x"
    rows[1].pop("sse")
    rows[2]["bytes"] = "many"
    lines = [json.dumps(row) for row in [*rows, [1], {"key": []}, {"key": "x"}]]
    (beside / "rows.jsonl").write_text("\n".join([*lines, "[" * 100_000]))
    photos = str(submission.parent / "photos")
    words = ["allocate", photos, "--candidate", *CANDIDATES, "-o", str(tmp_path / "s")]
    assert cli.main([*words, "--max-bpp", "0.9", "--maximise", "psnr"]) == 0
    assert verify(tmp_path / "s", submission) == 0
    expected = json.loads((submission / "manifest.json").read_text())
    assert json.loads((tmp_path / "s/manifest.json").read_text()) == expected


@pytest.mark.parametrize(
    "text", ["", "{}", '{"format": "tucodec-submission-9"}', "[1", "[" * 100_000, "[]", "\xff"]
)
def test_manifests_that_are_none(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert cli.main(["clic", "decode", str(tmp_path), "-o", str(tmp_path / "out")]) == 1
    assert "not the manifest of a submission" in capsys.readouterr().err


@pytest.mark.parametrize("out", [".", "streams", "decoded"])
def test_nothing_is_decoded_into_a_submission(
    out: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(copy.rglob("*"))
    assert cli.main(["clic", "decode", str(copy), "-o", str(copy / out), "--force"]) == 1
    assert "lies in the submission" in capsys.readouterr().err
    assert sorted(copy.rglob("*")) == before
    assert cli.main(["clic", "decode", str(copy), "-o", str(copy / "manifest.json")]) == 1


def several_times(manifest: dict[str, Any]) -> None:
    manifest["images"] = manifest["images"][:1] * 6


def one_picture_of_two_images(manifest: dict[str, Any]) -> None:
    manifest["images"][1]["image"] = "0.jpg"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["images"][0].update(file="../secret"), "image 0: file cannot be '../secret'"),
        (lambda m: m["images"][0].update(image="/etc/a"), "image 0: image cannot be '/etc/a'"),
        (lambda m: m["images"][0].update(image="a\nb"), "image 0: image cannot be 'a\\nb'"),
        (lambda m: m["images"][0].update(image="\ud800"), "image 0: image cannot be"),
        (lambda m: m["images"][1].pop("sse"), "image 1: 'sse' is missing"),
        (lambda m: m["images"][1].update(sse=1.5), "image 1: sse cannot be 1.5"),
        (lambda m: m["images"][1].update(bytes=True), "image 1: bytes cannot be True"),
        (lambda m: m["images"][1].update(note=1), "image 1: 'note' is unknown"),
        (lambda m: m["images"].append([]), "image 3 is no object"),
        (lambda m: m["limits"].pop("max_bytes"), "limits: 'max_bytes' is missing"),
        (lambda m: m["limits"].update(max_stars=5), "limits: 'max_stars' is unknown"),
        (lambda m: m["limits"].update(min_psnr=float("nan")), "limits: min_psnr cannot be nan"),
        (lambda m: m.pop("totals"), "the manifest: 'totals' is missing"),
        (lambda m: m["totals"].update(psnr="good"), "totals: psnr cannot be 'good'"),
        (lambda m: m.update(models=[]), "the manifest: models cannot be []"),
        (lambda m: m.update(minimised="hope"), "the manifest: minimised cannot be 'hope'"),
        (lambda m: m.update(images=[]), "the manifest: images cannot be []"),
        (lambda m: m["images"][0].update(codec="jpeg:q=1"), "codec 'jpeg:q=1' is not described"),
        (lambda m: m["codecs"].update({"jpeg:q=1": {}}), "codec 'jpeg:q=1' is not used"),
        (lambda m: m["codecs"].update({"tiny-mse-2": {}}), "codec 'tiny-mse-2' is not used"),
        (several_times, "image '0.png' is there 6 times"),
        (one_picture_of_two_images, "picture '0.png' is there 2 times"),
    ],
)
def test_manifests_with_a_fault(
    change: Callable[[dict[str, Any]], None],
    message: str,
    copy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit(copy, change)
    for command in (["verify", str(copy), "--originals", str(copy)], ["decode", str(copy)]):
        out = ["-o", str(tmp_path / "out")] if command[0] == "decode" else []
        assert cli.main(["clic", *command, *out]) == 1
        said = capsys.readouterr().err
        assert f"not the manifest of a submission ({message}" in said
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_learned_codec_comes_with_its_model(
    learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped model of that name is not taken: nobody would count its bytes."""
    copy = Path(shutil.copytree(learned, tmp_path / "copy"))

    def change(manifest: dict[str, Any]) -> None:
        manifest["models"] = {}
        for described in manifest["codecs"].values():
            described.pop("model")

    edit(copy, change)
    assert cli.main(["clic", "decode", str(copy), "-o", str(tmp_path / "out")]) == 1
    assert "has no model" in capsys.readouterr().err


def test_decode_replaces_nothing_unasked(
    submission: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "1.png").write_text("the only original")
    words = ["clic", "decode", str(submission), "-o", str(tmp_path)]
    assert cli.main(words) == 1
    assert "1.png: exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["1.png"]
    assert cli.main([*words, "--force"]) == 0
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_numbers_that_cannot_be_limits(value: float, tmp_path: Path) -> None:
    for limits in ({"max_bytes": value}, {"min_psnr": value}, {"min_ms_ssim": value}):
        with pytest.raises(ConfigError, match="cannot be"):
            Limits(**limits)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot be"):
        byte_budget(value, 100)
    with pytest.raises(ConfigError, match="workers"):
        evaluate([], [], tmp_path / "rows.jsonl", workers=-1)


def test_compare_keeps_to_the_callers_limits(
    submission: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = str(submission.parent / "photos")
    words = ["clic", "compare", str(submission), "--originals", photos]
    assert cli.main([*words, "--max-bpp", "0.9", "--min-psnr", "20"]) == 0
    capsys.readouterr()
    for option, value, quantity in (
        ("--max-bpp", "0.1", "bytes"),
        ("--max-bytes", "100", "bytes"),
        ("--min-psnr", "60", "sse"),
        ("--min-ms-ssim", "0.9999", "ms_ssim"),
    ):
        assert cli.main([*words, option, value]) == 1
        assert f"the limit on {quantity} is missed" in capsys.readouterr().err


def test_submissions_of_other_versions_are_told_as_such(
    copy: Path, submission: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither believed nor replaced, and the line says what to do."""
    edit(copy, lambda manifest: manifest.update(format="tucodec-submission-1"))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    photos = str(submission.parent / "photos")
    allocate = ["allocate", photos, "--candidate", "jpeg:q=10", "--max-bpp", "9", "-o", str(copy)]
    for words in (["clic", "verify", str(copy), "--originals", photos], allocate):
        assert cli.main(words) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "another version of this program wrote it, as tucodec-submission-1" in line
        assert "tucodec allocate" in line
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_the_decode_script_belongs_to_the_format() -> None:
    """Who changes the script numbers the format anew: another version's is then told as such."""
    script = {"tucodec-submission-2": "c0d4ed34ef7da35d"}
    digest = hashlib.sha256(DECODE_TEXT.encode()).hexdigest()[:16]
    assert script[FORMAT] == digest


BUDGETS = "0.7,0.9,1.5"


def test_several_budgets_are_one_submission_with_one_decoder(
    submission: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out = str(submission.parent / "photos"), tmp_path / "out"
    words = ["allocate", photos, "--candidate", *CANDIDATES, "--maximise", "psnr", "-o", str(out)]
    assert cli.main([*words, "--max-bpp", BUDGETS]) == 0
    assert foreign(out) is None
    assert sorted(path.name for path in out.iterdir()) == ["0.7", "0.9", "1.5", "decode"]
    for name in BUDGETS.split(","):
        assert read_manifest(out / name)["totals"]["bpp"] <= float(name)
    capsys.readouterr()
    check = ["clic", "verify", str(out), "--originals", photos, "--max-bpp"]
    assert cli.main([*check, BUDGETS]) == 0
    said = capsys.readouterr().out
    assert "bytes for 3 budgets" in said
    assert "not asked for" not in said
    assert cli.main([*check, "0.7,0.9"]) == 0
    assert (
        "not asked for by --max-bpp, checked by their names alone: 1.5" in capsys.readouterr().out
    )
    assert cli.main([*check, "0.8"]) == 1
    assert "has no part for 0.8 bpp" in capsys.readouterr().err
    environment = {**os.environ, "PYTHON": sys.executable}
    script = [str(out / "decode"), str(tmp_path / "decoded")]
    subprocess.run(script, check=True, env=environment, timeout=300)
    pictures = sorted(str(p.relative_to(tmp_path / "decoded")) for p in tmp_path.rglob("*.png"))
    assert pictures == [f"{b}/{i}.png" for b in BUDGETS.split(",") for i in range(3)]
    # It is replaced by its like, and by nothing else's leave.
    assert cli.main([*words, "--max-bpp", "0.9", "--max-image-bpp", "1"]) == 0
    assert all(entry["bytes"] <= 100 * 140 / 8 for entry in read_manifest(out)["images"])
    assert verify(out, submission, "--max-image-bpp", "1") == 0
    assert verify(out, submission, "--max-image-bpp", "0.5") == 1
    assert "above the 0.5 of an image" in capsys.readouterr().err


@pytest.fixture(scope="module")
def parts(submission: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A submission for two budgets."""
    out = tmp_path_factory.mktemp("parts") / "out"
    words = ["allocate", str(submission.parent / "photos"), "--candidate", *CANDIDATES]
    assert cli.main([*words, "--maximise", "psnr", "--max-bpp", "0.9,10", "-o", str(out)]) == 0
    return out


def add_a_file(folder: Path) -> None:
    (folder / "readme").write_text("mine")


def write_a_budget_twice(folder: Path) -> None:
    shutil.copytree(folder / "0.9", folder / "0.90")


def link_a_part(folder: Path) -> None:
    (folder / "10").rename(folder.with_name("elsewhere"))
    (folder / "10").symlink_to(folder.with_name("elsewhere"))


def take_the_script(folder: Path) -> None:
    (folder / "decode").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_a_file, "readme: is no part of the submission"),
        (write_a_budget_twice, "0.90: is no part of the submission"),
        (link_a_part, "10: is no part of the submission"),
        (take_the_script, "decode: No such file or directory"),
        (change_the_script, "decode: is not the script that tucodec allocate writes"),
        (take_the_right_to_run, "decode: cannot be executed"),
    ],
)
def test_verify_looks_at_what_several_budgets_share(
    parts: Path,
    submission: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = Path(shutil.copytree(parts, tmp_path / "copy"))
    change(copy)
    assert verify(copy, submission) == 1
    captured = capsys.readouterr()
    assert f"tucodec: {copy}: {message}" in captured.err
    assert json.loads(captured.out.splitlines()[0])["budget"] == 0.9
    if change is not take_the_right_to_run:
        assert message in (foreign(copy) or "")


def test_submissions_for_several_budgets_are_decoded_and_compared(
    parts: Path, submission: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, photos = tmp_path / "png", str(submission.parent / "photos")
    assert cli.main(["clic", "decode", str(parts), "-o", str(out), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows[:4]] == [f"0.9/streams/{i}.bin" for i in range(3)] + [
        "10/streams/0.bin"
    ]
    pictures = sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))
    assert pictures == [f"{budget}/{i}.png" for budget in ("0.9", "10") for i in range(3)]
    assert cli.main(["clic", "decode", str(parts), "-o", str(out)]) == 1
    assert "exists" in capsys.readouterr().err
    words = ["clic", "compare", str(parts), str(submission), "--originals", photos]
    assert cli.main(words) == 0
    table = capsys.readouterr().out
    assert all(f"| {folder} | 3 |" in table for folder in (parts / "0.9", parts / "10", submission))
    for folder, message in ((submission, "several budgets belong"), (parts, "no part for 0.5 bpp")):
        words = ["clic", "compare", str(folder), "--originals", photos, "--max-bpp", "0.9,0.5"]
        assert cli.main(words) == 1
        assert message in capsys.readouterr().err


def test_a_decoding_time_is_a_claim_of_where_it_was_measured(
    submission: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, photos = tmp_path / "out", str(submission.parent / "photos")
    words = ["allocate", photos, "--candidate", *CANDIDATES[:2], "-o", str(out), "--max-bpp", "2"]
    words += ["--maximise", "psnr", "--max-decode-seconds-per-megapixel"]
    assert cli.main([*words, "1e-9"]) == 1
    assert "fastest choice decodes in" in capsys.readouterr().err
    assert cli.main([*words, "500"]) == 0
    assert read_manifest(out)["limits"]["max_seconds"] == 500 * 0.042
    edit(out, lambda manifest: manifest["limits"].update(max_seconds=1e-6))
    assert (
        cli.main(["clic", "verify", str(out), "--originals", photos]) == 0
    )  # this machine is slower
    said = capsys.readouterr().out
    assert "claimed, as measured where it was made: decoded within 1e-06 s; here within" in said
    assert verify(out, submission, "--max-decode-seconds-per-megapixel", "1e-9") == 1


def test_check_names_what_is_known_of_the_102_images() -> None:
    professional, mobile = clic2019.parts(
        [("alberto-montalesi-176097.webp", 2791424), ("zugr-108.png", 5), ("else.png", 9)]
    )
    assert professional.startswith("professional: 1 of 41, by name and pixels; missing: alejandro-")
    assert professional.endswith("of another size: zugr-108")
    assert "the names of the 61 are not known" in mobile
    assert mobile.endswith("1 other images are here")


def test_a_folder_without_a_manifest_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["clic", "decode", str(tmp_path), "-o", str(tmp_path / "out")]) == 1
    told = f"tucodec: {tmp_path}: not a submission of tucodec allocate, it has no manifest.json\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("budget", "name"), [(0.15, "0.15"), (3, "3"), (1e-5, "0.00001"), (1 / 3, "0.333333333")]
)
def test_a_budgets_folder_is_found_by_its_name(budget: float, name: str, tmp_path: Path) -> None:
    assert budget_name(budget) == name
    (tmp_path / name).mkdir()
    (tmp_path / name / "manifest.json").touch()
    assert budgets(tmp_path) == [name]
