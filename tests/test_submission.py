import hashlib
import json
import os
import shlex
import shutil
import stat
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

from lightning_tucodec import cli, clic
from lightning_tucodec.codecs.model_file import freeze
from lightning_tucodec.codecs.registry import codec
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.submission import byte_budget
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


def verify(folder: Path, submission: Path) -> int:
    originals = submission.parent / "photos"
    return cli.main(["clic", "verify", str(folder), "--originals", str(originals), "--json"])


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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, "streams/1.bin (1.png): is damaged or another file"),
        (swap_files, "streams/0.bin (0.png): is damaged or another file"),
        (swap_files_and_hashes, "sse is"),
        (one_byte_over, "the limit on bytes is missed"),
        (lie_about_quality, "in total psnr is"),
        (lie_about_an_image, "streams/2.bin (2.png): sse is"),
        (append_a_byte, "in total bytes is"),
        (cut_off_a_byte, "streams/0.bin (0.png): is damaged or another file"),
        (hide_a_model, "models/more.safetensors: not in the manifest"),
        (hide_a_file, "streams/extra.bin: not in the manifest"),
        (leave_an_image_out, "2.png: has no stream"),
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


def test_a_decoder_above_the_limit_is_refused(
    submission: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify(submission, submission) == 0
    size = json.loads(capsys.readouterr().out)["decoder_bytes"]
    assert 100_000 < size < clic.MAX_DECODER_BYTES
    monkeypatch.setattr(clic, "MAX_DECODER_BYTES", size - 1)
    assert verify(submission, submission) == 1
    assert f"the decoder has {size} bytes, over {size - 1}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def learned(submission: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A submission whose streams a learned model and its refining encoder wrote."""
    folder = tmp_path_factory.mktemp("learned")
    torch.manual_seed(0)
    network = TucodecVAE(resolve_codec("tiny", MICRO))
    model = folder / "micro.safetensors"
    freeze(network, "micro", {"recipe": "transparent", "lmbda": 100.0}).save(model)
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
    assert f"models/{models[0].name}: is damaged or another model" in capsys.readouterr().err


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
    assert clic.is_validation_set(102, 251_858_200)
    assert not clic.is_validation_set(102, 251_860_000)
    assert not clic.is_validation_set(101, 251_858_200)


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
    assert cli.main([*words, "--maximise", "psnr", "--slurm", "2", "--dry-run"]) == 0
    array, last = (shlex.split(line) for line in capsys.readouterr().out.splitlines())
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


def test_shares_and_arrays_that_cannot_be(
    submission: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos = str(submission.parent / "photos")
    words = ["allocate", photos, "--candidate", "jpeg:q=5", "-o", str(tmp_path / "s")]
    words += ["--max-bpp", "9"]
    for more, message in (
        (["--slurm", "0"], "at least one job"),
        (["--part", "3/2"], "there are parts 1 to 2"),
        (["--dry-run"], "belongs to --slurm"),
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


def test_a_folder_of_something_else_is_not_replaced(
    submission: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    photos = str(submission.parent / "photos")
    words = ["allocate", photos, "--candidate", "jpeg:q=5", "--max-bpp", "9", "-o", str(tmp_path)]
    assert cli.main(words) == 1
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("text", ["", "{}", '{"format": "tucodec-submission-9"}', "[1"])
def test_manifests_that_are_none(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert cli.main(["clic", "decode", str(tmp_path), "-o", str(tmp_path / "out")]) == 1
    assert "not the manifest of a submission" in capsys.readouterr().err


def test_files_outside_of_the_submission_are_not_read(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copy, lambda m: m["images"][0].update(file="../secret"))
    assert cli.main(["clic", "decode", str(copy), "-o", str(tmp_path / "out")]) == 1
    assert "not the manifest of a submission (file ../secret)" in capsys.readouterr().err
