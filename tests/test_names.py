"""File names as long as names can be, and names that are not UTF-8: files come out, or one line says why."""

import os
from pathlib import Path

import pytest
from PIL import Image

from lightning_tucodec.cli import main
from lightning_tucodec.codecs.library import find
from tests.support import photo

MODEL = "tiny-mse-1"
STEMS = {
    **{f"{count}-bytes": "n" * (count - 4) for count in (249, 255)},
    "wide-letters": "\N{EURO SIGN}" * 83 + "ab",
    "not-utf8": os.fsdecode(b"a\xff\xe9b"),
}


@pytest.mark.parametrize("kind", STEMS)
def test_names(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stem = STEMS[kind]
    image = f"{stem}.png"
    Image.fromarray(photo("coffee.png", 40, 32)).save("photo.png")
    os.rename("photo.png", image)
    Path("model.safetensors").write_bytes(find(MODEL).read_bytes())

    def done(*words: str) -> None:
        assert main([*words]) == 0, capsys.readouterr().err

    def refused(*words: str) -> str:
        before = sorted(os.listdir())
        capsys.readouterr()
        assert main([*words]) == 1
        said = capsys.readouterr().err
        assert said.startswith("tucodec: ")
        assert said.count("\n") == 1
        assert sorted(os.listdir()) == before
        return said

    done("compress", image, "-o", f"{stem}.tuc", "--recon", "rec/", "--model", MODEL)
    done("decompress", f"{stem}.tuc", "-o", "decoded/")
    assert Path("decoded", image).read_bytes() == Path("rec", image).read_bytes()
    results = ["evaluate", image, "--codec", "jpeg:q=30", "--workers", "1"]
    done(*results, "-o", "results.json", "--keep", "kept")
    allocate = ["--candidate", "jpeg:q=30", "--max-bpp", "9", "--workers", "1"]
    done("allocate", image, *allocate, "-o", "chosen")
    done("clic", "decode", "chosen", "-o", "chosen-decoded")
    assert (Path("chosen-decoded") / image).is_file()
    build = ["--patch", "16", "--count", "2", "--workers", "1"]
    done("shards", "build", image, *build, "--out", "shards")
    done("shards", "verify", "shards")
    export = ["export", "model.safetensors", "-o"]
    if kind == "not-utf8":
        done(*results, "-o", f"{stem}.json")
        done("allocate", image, *allocate, "-o", f"{stem}-chosen")
        assert "must be UTF-8" in refused(*export, f"{stem}.safetensors")
        assert "must be UTF-8" in refused(*export, "new.safetensors", "--name", stem)
    else:
        assert "too long" in refused(*export, f"{stem}.safetensors")
        assert "too long" in refused(*results, "-o", f"{stem}.json")
    assert not [name for name in os.listdir() if ".tucodec." in name]
