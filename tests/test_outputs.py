"""What commands write: no input and no existing file is replaced unless that was asked for."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lightning_tucodec.cli import main
from lightning_tucodec.codecs.library import find
from tests.support import photo

MODEL = "tiny-mse-1"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: photo.png, its stream photo.tuc, a model and a published curve."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo("coffee.png", 40, 32)).save("photo.png")
    Path("model.safetensors").write_bytes(find(MODEL).read_bytes())
    curve = {"name": "VTM", "results": {"bpp": [0.2, 0.8, 2, 6], "psnr-rgb": [25, 29, 34, 44]}}
    Path("curve.json").write_text(json.dumps(curve))
    assert main(["compress", "photo.png", "-o", "photo.tuc", "--model", MODEL]) == 0
    return tmp_path


COMPRESS = f"compress photo.png --model {MODEL}"
EVALUATE = "evaluate photo.png --codec jpeg:q=30 --workers 1"
TARGETS = [
    (f"{COMPRESS} -o new.tuc --recon .", "photo.png"),
    (f"{COMPRESS} -o new.tuc --recon link.png", "photo.png"),
    (f"{COMPRESS} -o .", "photo.tuc"),
    (f"{COMPRESS} -o photo.tuc --target-bpp 8 --model tiny-mse", "photo.tuc"),
    (f"{COMPRESS} -o new.tuc --recon other.png", "other.png"),
    ("decompress photo.tuc -o .", "photo.png"),
    ("decompress photo.tuc -o other.png", "other.png"),
    ("export model.safetensors -o model.safetensors", "model.safetensors"),
    ("export model.safetensors -o other.safetensors", "other.safetensors"),
    ("compare curve.json -o other.html", "other.html"),
    ("compare curve.json -o new.html", "new-psnr.svg"),
    (f"{EVALUATE} -o curve.json", "curve.json"),
    (f"{EVALUATE} -o new.json", "new.csv"),
    (f"{EVALUATE} -o new.json", "new.rows.jsonl"),
    (f"bench effort photo.png --model {MODEL} --effort 1 --seconds --rows other.txt", "other.txt"),
    ("demo --out other", "other/index.html"),
]
BELOW = [
    f"{COMPRESS} -o photo.png/x.tuc",
    f"{COMPRESS} -o photo.png/below/x.tuc",
    f"{COMPRESS} -o new.tuc --recon photo.png/x.png",
    "decompress photo.tuc -o photo.png/x.png",
    f"{EVALUATE} -o photo.png/r.json",
    "compare curve.json -o photo.png/r.html",
    "export model.safetensors -o photo.png/m.safetensors",
    "allocate photo.png --candidate jpeg:q=30 --max-bpp 9 --workers 1 -o photo.png/s",
    "shards build photo.png --patch 16 --workers 1 --out photo.png/s",
    "demo --out photo.png/d",
]


@pytest.mark.parametrize("line", BELOW)
def test_a_file_in_the_way_of_a_folder_is_named(
    line: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(line.split()) == 1
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("tucodec:")]
    assert len(said) == 1
    assert "photo.png: is no folder; a folder is needed here" in said[0]


INPUTS = {"photo.png", "model.safetensors"}


@pytest.mark.parametrize(("line", "target"), TARGETS)
def test_what_is_there_is_not_replaced(
    line: str, target: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(target)
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_text("mine")
    if "link.png" in line:
        Path("link.png").symlink_to("photo.png")
    before = {p: p.read_bytes() for p in files.rglob("*") if p.is_file()}
    is_input = target in INPUTS and "decompress" not in line
    for words in [line, f"{line} --force"] if is_input else [line]:
        assert main(words.split()) == 1
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert any(reason in said[0] for reason in ("is an input", "exists", "is no folder of"))
    assert {p: p.read_bytes() for p in files.rglob("*") if p.is_file()} == before


def test_force_replaces_and_an_evaluation_knows_its_own(files: Path) -> None:
    assert main(f"{COMPRESS} -o photo.tuc --recon new.png --force".split()) == 0
    Path("new.png").write_text("mine")
    assert main(["decompress", "photo.tuc", "-o", "new.png", "--force"]) == 0
    assert Path("new.png").read_bytes()[:4] == b"\x89PNG"
    Path("results.csv").write_text("mine")
    assert main(f"{EVALUATE} -o results.json".split()) == 1
    assert main(f"{EVALUATE} -o results.json --force".split()) == 0
    assert main(f"{EVALUATE} -o results.json --codec jpeg:q=50".split()) == 0
    assert "jpeg:q=50" in Path("results.csv").read_text()
    Path("report.html").write_text("mine")
    assert main(["compare", "results.json", "curve.json", "-o", "report.html", "--force"]) == 0
    Path("new.safetensors").write_text("mine")
    assert main(["export", "model.safetensors", "-o", "new.safetensors", "--force"]) == 0
    assert Path("new.safetensors").stat().st_size > 1000


@pytest.mark.parametrize("out", ["y.jpg", "-", "out.bin"])
def test_a_name_of_another_kind_is_no_folder(
    out: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in (f"{COMPRESS} -o {out}", f"decompress photo.tuc -o {out}"):
        assert main(line.split()) == 1
        assert "\n" not in capsys.readouterr().err.strip()
    assert not Path(out).exists()
    assert main(f"{COMPRESS} -o v1.2/".split()) == 0
    assert Path("v1.2/photo.tuc").exists()
