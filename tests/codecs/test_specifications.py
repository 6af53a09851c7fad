"""Paths in codec specifications and references to curves may hold what separates their parts."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from lightning_tucodec.cli import main
from lightning_tucodec.codecs import library, registry
from lightning_tucodec.errors import ConfigError, ModelFileError
from lightning_tucodec.quality.curve_files import read_named
from tests.support import photo

HOSTILE = st.text(":,=#@ .~{}[]é'\"\\%-+qp1a", min_size=1, max_size=12).filter(
    lambda name: name.strip(".") != ""
)
MODEL = "tiny-mse-2"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@given(folder=HOSTILE, stem=HOSTILE, decoy=st.booleans())
@example("run 2026-11-29T10:00,x=3", "model", True)
@example("a,filter=none", "b:effort=9", True)
@example("exp#3", "A.json#jpeg", True)
@example("$HOME,lmbda=2", "~", False)
def test_any_path_that_exists_is_whole(root: Path, folder: str, stem: str, decoy: bool) -> None:
    shutil.rmtree(root)
    model, curve = root / folder / f"{stem}.safetensors", root / folder / f"{stem}.json"
    model.parent.mkdir(parents=True)
    model.touch()
    results = {"bpp": [0.1, 0.2, 0.4, 0.8], "psnr-rgb": [28.0, 30.0, 33.0, 36.0]}
    curve.write_text(json.dumps({"name": "A", "results": results}))
    if decoy:  # a file at each place where the path could be cut
        for path in (str(model), str(curve)):
            for place, letter in enumerate(path):
                short = Path(path[:place])
                if letter in ":,=#" and place > len(str(root)) + 1 and short.parent.is_dir():
                    short.exists() or short.touch()

    for options in ("", "effort=4,lmbda=150"):
        text = f"{model}:{options}" if options else str(model)
        assert registry.split(text) == (str(model), options)
        assert registry.expand([text]) == [text]
        assert registry.files(text) == [str(model)]
    text = f"vvc+postfilter:qp=42,filter={model},turn=3"
    assert registry.split(text) == ("vvc+postfilter", text.partition(":")[2])
    options = {"qp": "42", "filter": str(model), "turn": "3"}
    assert dict(registry.pairs(registry.split(text)[1])) == options
    assert registry.codec(text).name == text
    assert registry.needs_model(text)
    assert registry.files(text) == [str(model)]
    for reference in (str(curve), f"{curve}#A"):
        assert read_named(reference).name == "A"


def test_a_path_that_is_missing_is_named_whole(tmp_path: Path) -> None:
    path = tmp_path / "run T10:00,x=3" / "model.safetensors"
    for text in (str(path), f"{path}:effort=3"):
        with pytest.raises(ModelFileError, match=r"x=3/model\.safetensors: No such file"):
            registry.codec(text)
    with pytest.raises(ModelFileError, match=r"x=3/model\.safetensors: No such file"):
        registry.codec(f"vvc+postfilter:qp=42,filter={path},turn=3").model()  # type: ignore[attr-defined]


def test_a_codecs_name_is_not_taken_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("jpeg:q=30").touch()
    assert registry.codec("jpeg:q=30").name == "jpeg:q=30"
    with pytest.raises(ConfigError, match="30 is not KEY=VALUE"):
        registry.codec("jpeg:30")


def test_commands_take_such_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("run 2026-11-29T10:00,x=3#{a}")
    folder.mkdir()
    for name in (MODEL, "vvc-postfilter"):
        shutil.copy(library.find(name), folder)
    model, filter_ = folder / f"{MODEL}.safetensors", folder / "vvc-postfilter.safetensors"
    Image.fromarray(photo("coffee.png", 48, 40)).save("a.png")
    fixed = "preset=faster,chroma_qp_offset=-4,tools=preset,turn=0"
    filtered = f"vvc+postfilter:qp=42,filter={filter_},{fixed}"
    codecs = ["jpeg:q=30", f"{model}:effort=1", filtered]
    assert main(["evaluate", "a.png", "--codec", *codecs, "-o", f"{folder}/r#1.json"]) == 0
    assert read_named(f"{folder}/r#1.json#jpeg").name == "jpeg"
    report = [
        "compare",
        f"{folder}/r#1.json",
        "-o",
        "r.html",
        "--images",
        "a.png",
        "--samples",
        "9",
    ]
    assert main(report) == 0
    allocate = ["allocate", "a.png", "--max-bpp", "9", "--workers", "1", "--candidate"]
    assert main([*allocate, *codecs[1:], "-o", str(folder)]) == 1
    assert "lies in" in capsys.readouterr().err
    assert main([*allocate, codecs[2], "-o", "submission"]) == 0
    # Elsewhere, where the submitter's path does not exist.
    shutil.rmtree(folder)
    capsys.readouterr()
    assert main(["clic", "decode", "submission", "-o", "decoded"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["vvc:qp=40", "vvc+postfilter:qp=40", "hevc:qp=30", "av1-aom:q=30", "av1-svt:q=30"]
)
@pytest.mark.parametrize("option", ["timeout=0", "timeout=-1", "threads=-1", "threads=1000"])
def test_limits_of_processes_are_possible_ones(name: str, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option.partition('=')[0]}=.* is not within"):
        registry.codec(f"{name},{option}")
    assert registry.codec(f"{name},timeout=60,threads=2").name == registry.codec(name).name
