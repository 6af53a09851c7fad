"""`make gpu`: what it says without a GPU, what it needs, and a rehearsal of its parts on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import __main__ as gpu

ROOT = gpu.ROOT

BARRED = """
import importlib.machinery
original = importlib.machinery.PathFinder.find_spec
class Bar:  # no function, which would become a method where pytest keeps it
    def __call__(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {names} else original(name, path, target)
importlib.machinery.PathFinder.find_spec = Bar()
"""

OTHERS = {
    "compressai", "jsonargparse", "wandb", "imageio_ffmpeg", "bjontegaard",
    "plotly", "jinja2", "flip_evaluator", "ssimulacra2", "s3fs", "paramiko", "skimage", "sklearn", "moto",
    "pytorch_msssim",
}  # fmt: skip
"""Packages that other commands need."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--results", str(tmp_path / "gpu.json")]) == 0
    assert "no CUDA GPU here" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu/test_gpu.py", "-m", "gpu", "-rs",
         "-p", "no:cacheprovider"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "no CUDA GPU here; `make gpu` runs it" in done.stdout
    assert " passed" not in done.stdout


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu.NEEDED, "torch", "99.0")
    monkeypatch.setitem(gpu.NEEDED, "no-such-package", "1")
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == (
        "make gpu: install these first: torch>=99.0 no-such-package>=1\n"
    )


def test_rehearsal_without_other_packages(tmp_path: Path) -> None:
    """Every part runs with the packages that are named, and with no other of this project's."""
    (tmp_path / "sitecustomize.py").write_text(BARRED.format(names=sorted(OTHERS)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "--rehearse", "--results", str(tmp_path / "gpu.json")],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["tests"]["passed"] == 1
    assert found["left_out"] == []
    assert set(found["machine"]["packages"]) == set(gpu.NEEDED)
    assert found["train"]["tiny"]["images_per_s"]
    assert found["codec"]["tiny"]["rows"]


def test_what_the_time_cuts_off_is_named(tmp_path: Path) -> None:
    session = gpu.Session(tmp_path / "gpu.json", gpu.RESERVE / 60 + 2 / 60)
    assert session.run("sleeper", ["-c", "import time; time.sleep(60)"]) is None
    assert session.run("next", ["-c", "pass"]) is None
    session.keep()
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["left_out"] == [
        "sleeper: cut off when the time was over",
        "next: no time was left",
    ]
