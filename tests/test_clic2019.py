"""The scripts of CLIC 2019's entries ask `tucodec allocate` for what their variables say."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support import photo

FOLDER = Path(__file__).parent.parent / "experiments" / "clic2019"


@pytest.mark.parametrize(
    ("entry", "variables", "candidates", "limits"),
    [
        (
            "tucodecpsnr.sh",
            {},
            ["vvc:qp=36", "vvc:qp=37", "vvc:qp=38"],
            ["--maximise", "psnr", "--max-bpp", "0.15"],
        ),
        (
            "tucodecssim.sh",
            {"MODELS": "tiny-ssim", "LMBDAS": "0.2 0.3", "CANDIDATES": "webp:q=5"},
            ["webp:q=5", "tiny-ssim:effort=3,lmbda=0.2", "tiny-ssim:effort=3,lmbda=0.3"],
            ["--maximise", "ms-ssim", "--max-bpp", "0.15"],
        ),
        (
            "tucodecssim.sh",
            {"EFFORT": "2"},
            [
                f"tiny-vbr-ssim:quality={quality},effort=2"
                for quality in (0, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6)
            ],
            ["--maximise", "ms-ssim", "--max-bpp", "0.15"],
        ),
        (
            "tucodecpsnr40db.sh",
            {"MODELS": "tiny-mse-2", "EFFORT": "2", "CODECS": "vvc:preset=slow", "QPS": "12 14"},
            ["tiny-mse-2:effort=2", "vvc:preset=slow,qp=12", "vvc:preset=slow,qp=14"],
            ["--min-psnr", "40.0", "--min-ms-ssim", "0.993"],
        ),
        (
            "budgets.sh",
            {"MODELS": "tiny-ssim-1", "CODECS": "vvc:preset=faster", "QPS": "37 44"},
            ["tiny-ssim-1", "vvc:preset=faster,qp=37", "vvc:preset=faster,qp=44"],
            ["--maximise", "ms-ssim", "--max-bpp", "0.075,0.15,0.3"],
        ),
    ],
)
def test_entries(
    entry: str, variables: dict[str, str], candidates: list[str], limits: list[str], tmp_path: Path
) -> None:
    for size in (40, 41, 42):  # as many images as jobs
        Image.fromarray(photo("coffee.png", size, 40)).save(tmp_path / f"{size}.png")
    words = [str(FOLDER / entry), str(tmp_path), "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [*words, "--slurm", "3", "--dry-run"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={**os.environ, **variables, "PYTHON": sys.executable},
    )
    array, last = (shlex.split(line) for line in done.stdout.splitlines())
    asked = [str(tmp_path), "--candidate", *candidates, "-o", str(tmp_path / "out")]
    assert array[-len(asked) - 2 :] == ["--share", "3", *asked]
    assert last[-len(asked) - len(limits) :] == [*asked, *limits]


def test_an_entry_that_cannot_be_met_stops_no_other(tmp_path: Path) -> None:
    Image.fromarray(photo("coffee.png", 192, 176)).save(tmp_path / "photo.png")
    words = [str(FOLDER / "all.sh"), str(tmp_path / "out"), str(tmp_path / "photo.png")]
    variables = {
        "ANY_SET": "1",
        "PSNR_CODECS": "vvc:preset=faster",  # QP 36 … 38 takes more than 0.15 bpp here
        "SSIM_MODELS": "tiny-ssim-1",
        "TRANSPARENT_MODELS": "jxl:distance=0.3",
    }
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        env={**os.environ, **variables, "PYTHON": sys.executable},
    )
    made = sorted(path.name for path in (tmp_path / "out").iterdir() if (path / "decode").is_file())
    assert (done.returncode, made) == (1, ["tucodecpsnr40db", "tucodecssim"]), done.stderr
    assert all(str(tmp_path / "out" / name) in done.stdout for name in made)
