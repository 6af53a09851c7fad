"""Every subcommand with every kind of unusable path and number: one line, status 1 or 2, nothing left."""

import os
from pathlib import Path

import pytest
from PIL import Image

from lightning_tucodec.cli import main
from lightning_tucodec.codecs.library import find
from tests.support import photo

MODEL = "tiny-mse-1"
READING = [
    f"compress {{}} -o out/ --model {MODEL}",
    "decompress {} -o out/",
    "info {}",
    "evaluate {} --codec jpeg:q=30 -o out/r.json --workers 1",
    "evaluate photo.png --codec {} -o out/r.json --workers 1",
    "compare {} -o out/r.html",
    "allocate {} --candidate jpeg:q=30 --max-bpp 9 -o out --workers 1",
    "export {} -o out/m.safetensors",
    "export model.safetensors --card {} -o out/m.safetensors",
    f"bench effort {{}} --model {MODEL} --effort 1 --seconds --rows out/b.rows.jsonl",
    "bench h266 {} --rows out/b.rows.jsonl",
    "clic verify {} --originals photo.png",
    "clic decode {} -o out",
    "clic check {}",
    "shards build {} --out out --workers 1",
    "shards precode {} --out out --codec vvc:qp=40 --per-photo 1 --workers 1",
    "shards verify {}",
    "shards stats {} -o out/s.png",
    "wandb-sync {} --offline",
    "sweep status {}",
    "sweep run {}",
    "fit --config {}",
    "doctor --config {}",
]
"""Commands that read a path."""

PATHS = {
    "missing": "nothing.png",
    "forbidden": "forbidden",
    "folder": "folder",
    "empty": "empty.png",
    "not-utf8": os.fsdecode(b"bad\xff.png"),
    "too-long": "x" * 300,
    "device": "/dev/null",
}

WRITING = [
    f"compress photo.png --model {MODEL} -o {{}}",
    f"compress photo.png --model {MODEL} -o fine.tuc --recon {{}}",
    "decompress photo.tuc -o {}",
    "evaluate photo.png --codec jpeg:q=30 --workers 1 -o {}.json",
    "compare curve.json -o {}.html",
    "export model.safetensors -o {}.safetensors",
    "allocate photo.png --candidate jpeg:q=30 --max-bpp 9 --workers 1 -o {}",
    f"bench effort photo.png --model {MODEL} --effort 1 --seconds --rows {{}}.jsonl",
    "demo --out {}",
]
"""Commands that write to a path."""

TARGETS = {
    "below-a-file": "photo.png/below",
    "below-null": "/dev/null/below",
    "too-long": "y" * 300,
    "not-allowed": "/proc/below",
}

NUMBERS = [
    "compress photo.png -o x.tuc --target-bpp {}",
    "compress photo.png -o x.tuc --target-psnr {}",
    "compress photo.png -o x.tuc --target-ms-ssim {}",
    "compress photo.png -o x.tuc --model vvc --qp {}",
    "compress photo.png -o x.tuc --effort {}",
    "evaluate photo.png --codec jpeg:q=30 -o x.json --workers {}",
    "evaluate photo.png --codec jpeg:q={} -o x.json",
    "evaluate photo.png --codec jxl:distance={} -o x.json",
    *(f"compare curve.json -o x.html --{name} {{}}" for name in ("at", "bpp", "pictures", "samples")),
    *(
        f"allocate photo.png --candidate jpeg:q=30 -o x --{name} {{}}"
        for name in ("max-bpp", "max-bytes", "min-psnr", "min-ms-ssim", "workers", "slurm",
                     "max-decode-seconds", "part")
    ),
    "export model.safetensors -o x.safetensors --average {}",
    "bench allocate --repeats {}",
    "bench effort photo.png --model tiny-mse-1 --effort {}",
    "bench effort photo.png --model tiny-mse-1 --seconds {}",
    "bench h266 photo.png --bpp {}",
    "bench h266 photo.png --qp {}",
    "bench codec --bpp {}",
    "bench train --steps {}",
    *(f"shards build photo.png --out x --{name} {{}}" for name in
      ("patch", "count", "shard-size", "workers", "long-edge", "max-overlap", "min-contrast")),
    *(f"shards precode photo.png --out x --codec vvc:qp=40 --{name} {{}}" for name in
      ("per-photo", "patch", "shard-size", "workers")),
]  # fmt: skip
"""Commands with a number."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the tables name."""
    folder = tmp_path_factory.mktemp("awkward")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Image.fromarray(photo("coffee.png", 40, 32)).save("photo.png")
        Path("model.safetensors").write_bytes(find(MODEL).read_bytes())
        Path("curve.json").write_text(
            '{"name": "A", "results": {"bpp": [1, 2], "psnr-rgb": [30, 33]}}'
        )
        for name in ("empty.png", PATHS["not-utf8"]):
            Path(name).write_bytes(b"")
        Path("folder").mkdir()
        Path("forbidden").mkdir(mode=0)
        assert main(["compress", "photo.png", "-o", "photo.tuc", "--model", MODEL]) == 0
    return folder


def check(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command fails in one line and leaves no file."""
    before = listing(folder)
    capsys.readouterr()
    try:
        status: object = main(words)
    except SystemExit as end:
        status = end.code
        usage = True
    else:
        usage = words[0] == "fit"
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    assert status == 1 or (status == 2 and usage), words
    said = [
        line for line in lines if line.startswith("tucodec")
    ]  # the others are progress or usage
    assert len(said) == 1, lines
    assert len(said[0]) > len("tucodec: ") + 8
    assert listing(folder) == before, words


def listing(folder: Path) -> set[str]:
    """Files below a folder; rows of measurements and logs of shards that hold no sample do not count."""
    return {
        path
        for parent, _, names in os.walk(folder)
        for name in names
        if not (path := os.path.join(parent, name)).endswith((".rows.jsonl", "rejected.jsonl"))
        and "/.build/" not in path
    }


@pytest.mark.parametrize("command", READING)
@pytest.mark.parametrize("kind", PATHS)
def test_unusable_inputs(
    kind: str,
    command: str,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(files)
    check([word.format(PATHS[kind]) for word in command.split()], files, capsys)


@pytest.mark.parametrize("command", WRITING)
@pytest.mark.parametrize("kind", TARGETS)
def test_unusable_outputs(
    kind: str,
    command: str,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(files)
    check([word.format(TARGETS[kind]) for word in command.split()], files, capsys)


@pytest.mark.parametrize("command", NUMBERS)
@pytest.mark.parametrize("number", ["nan", "inf", "-1"])
def test_unusable_numbers(
    number: str,
    command: str,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(files)
    *words, last = command.split() if "{}" in command.split()[-1] else [*command.split(), ""]
    check([word.format(number) for word in [*words, last] if word], files, capsys)
