"""Every option of every subcommand with every kind of unusable path or number: one line, nothing left.

Which options there are, and which of them are paths and numbers, the parser itself says.
"""

import itertools
import os
import re
from pathlib import Path

import pytest
import torch
from compressai.models import MeanScaleHyperprior
from PIL import Image

from lightning_tucodec.cli import build_parser, main
from lightning_tucodec.codecs.library import find
from tests.support import options, photo

MODEL = "tiny-mse-1"
READING = [
    f"compress {{}} -o out/ --model {MODEL}",
    "compress photo.png -o out/ --model {}.safetensors",
    "decompress {} -o out/",
    "decompress photo.tuc -o out/ --model {}.safetensors",
    "info {}",
    "evaluate {} --codec jpeg:q=30 -o out/r.json --workers 1",
    "evaluate photo.png --codec {} -o out/r.json --workers 1",
    "compare {} -o out/r.html",
    "compare curve.json -o out/r.html --images {}",
    "compare curve.json -o out/r.html --kept {}",
    "allocate {} --candidate jpeg:q=30 --max-bpp 9 -o out --workers 1",
    "export {} -o out/m.safetensors",
    "export model.safetensors --card {} -o out/m.safetensors",
    f"bench effort {{}} --model {MODEL} --effort 1 --seconds --rows out/b.rows.jsonl",
    "bench effort photo.png --model {} --effort 1 --seconds --rows out/b.rows.jsonl",
    "bench h266 {} --rows out/b.rows.jsonl",
    "bench parts {} --codec jpeg:q=30",
    "bench h266 photo.png --filter {} --rows out/b.rows.jsonl",
    "import {} --network mbt2018-mean -o out/m.safetensors",
    "import checkpoint.pth --network mbt2018-mean --card {} -o out/m.safetensors",
    "bench codec --models {} --peers",
    f"bench codec --models {MODEL} --peers --image {{}}",
    "bench entropy --models {} --peers",
    "bench shards --photos {} --count 1",
    "bench loader --photos {} --count 1",
    "bench fit --photos {} --steps 1",
    "bench train --photos {} --steps 1 --crop 64",
    "clic verify {} --originals photo.png",
    "clic verify submission --originals {}",
    "clic compare {} --originals photo.png",
    "clic compare submission --originals {}",
    "clic decode {} -o out",
    "clic check {}",
    "clic reach {} --max-bpp 1",
    "clic reach results.json --max-bpp 1 --times {}",
    "shards build {} --out out --workers 1",
    "shards precode {} --out out --codec vvc:qp=40 --per-photo 1 --workers 1",
    "shards verify {}",
    "shards stats {} -o out/s.png",
    "wandb-sync {} --offline",
    "sweep plan {} --out out",
    "sweep submit {} --out out --dry-run",
    "sweep run {} --out out",
    "sweep retry {} --dry-run",
    "sweep status {}",
    "sweep resolve {} one-0",
    "fit --config {}",
    "validate --config {}",
    "test --config {}",
    "doctor --config {}",
    "doctor --script {}",
]
"""Commands that read a path."""

PATHS = {
    "missing": "nothing.png",
    "forbidden": "forbidden",
    "folder": "folder",
    "empty": "empty.png",
    "huge": "huge.png",
    "not-utf8": os.fsdecode(b"bad\xff.png"),
    "too-long": "x" * 300,
    "device": "/dev/null",
}

WRITING = [
    f"compress photo.png --model {MODEL} -o {{}}",
    f"compress photo.png --model {MODEL} -o fine.tuc --recon {{}}",
    "decompress photo.tuc -o {}",
    "evaluate photo.png --codec jpeg:q=30 --workers 1 -o {}.json",
    "evaluate photo.png --codec jpeg:q=30 --workers 1 -o out.json --keep {}",
    "compare curve.json -o {}.html",
    "export model.safetensors -o {}.safetensors",
    "import checkpoint.pth --network mbt2018-mean -o {}.safetensors",
    "allocate photo.png --candidate jpeg:q=30 --max-bpp 9 --workers 1 -o {}",
    f"bench effort photo.png --model {MODEL} --effort 1 --seconds --rows {{}}.jsonl",
    "bench h266 photo.png --qp 40 --preset faster --whole --workers 1 --rows {}.jsonl",
    "clic decode submission -o {}",
    "demo --out {}",
    "shards build photo.png --patch 16 --workers 1 --out {}",
    "shards precode photo.png --patch 16 --codec vvc:qp=40 --per-photo 1 --workers 1 --out {}",
    "shards precode photo.png --patch 16 --codec vvc:qp=40 --per-photo 1 --workers 1 --out out --cache {}",
    "shards stats shards -o {}.png",
    "sweep plan sweep.yaml --out {}",
    "sweep submit sweep.yaml --dry-run --out {}",
    "sweep run sweep.yaml --out {}",
    "doctor --mirror {} --config recipe.yaml",
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
    "compress photo.png -o x.tuc --quality {}",
    "import checkpoint.pth --network mbt2018-mean -o x.safetensors --quality {}",
    "evaluate photo.png --codec jpeg:q=30 -o x.json --workers {}",
    "evaluate photo.png --codec jpeg:q={} -o x.json",
    "evaluate photo.png --codec jxl:distance={} -o x.json",
    *(f"compare curve.json -o x.html --{name} {{}}" for name in ("at", "bpp", "pictures", "samples")),
    *(
        f"allocate photo.png --candidate jpeg:q=30 -o x --{name} {{}}"
        for name in ("max-bpp", "max-bytes", "min-psnr", "min-ms-ssim", "workers", "slurm",
                     "max-decode-seconds", "max-decode-seconds-per-megapixel", "max-image-bpp", "part")
    ),
    *(f"clic {command} submission --originals photo.png --{name} {{}}"
      for command in ("verify", "compare")
      for name in ("max-bpp", "max-bytes", "min-psnr", "min-ms-ssim",
                   "max-decode-seconds-per-megapixel", "max-image-bpp")),
    *(f"clic reach results.json --{name} {{}}"
      for name in ("max-bpp", "max-bytes", "min-psnr", "min-ms-ssim",
                   "max-decode-seconds-per-megapixel", "max-image-bpp")),
    "export model.safetensors -o x.safetensors --average {}",
    "bench allocate --repeats {}",
    "bench effort photo.png --model tiny-mse-1 --effort {}",
    "bench effort photo.png --model tiny-mse-1 --seconds {}",
    *(f"bench h266 photo.png --{name} {{}}" for name in ("bpp", "qp", "workers")),
    *(f"bench {kind} --{name} {{}}" for kind in ("codec", "entropy") for name in
      ("bpp", "repeats", "size 64")),
    *(f"bench {kind} --{name} {{}}" for kind in ("shards", "loader") for name in ("count", "repeats")),
    *(f"bench fit --{name} {{}}" for name in ("steps", "repeats")),
    *(f"bench train --{name} {{}}" for name in ("steps", "repeats", "batch", "crop", "workers")),
    *(f"shards build photo.png --out x --{name} {{}}" for name in
      ("patch", "count", "shard-size", "seed", "workers", "part", "long-edge", "scales", "max-overlap",
       "min-contrast", "duplicate-bits")),
    *(f"shards precode photo.png --out x --codec vvc:qp=40 --{name} {{}}" for name in
      ("per-photo", "patch", "shard-size", "seed", "workers")),
]  # fmt: skip
"""Commands with a number."""

ROWS = [
    *itertools.product(READING, PATHS.items()),
    *itertools.product(WRITING, TARGETS.items()),
    *itertools.product(NUMBERS, zip(("nan", "inf", "-1"), ("nan", "inf", "-1"), strict=True)),
]
FINE = {
    ("sweep submit sweep.yaml --dry-run --out {}", kind)
    for kind in TARGETS  # which writes nothing
}
FINE |= {("compare curve.json -o out/r.html --kept {}", kind) for kind in ("folder", "forbidden")}
"""Rows that are none: what is asked for has a meaning."""


RECIPE = """
run: {runs_dir: out/runs}
model: {preset: tiny}
data: {shards: shards, batch_size: 2, crop: 16}
trainer: {accelerator: cpu, devices: 1, max_steps: 1}
"""

HONEST = [
    f"compress photo.png -o photo.tuc --model {MODEL}",
    "allocate photo.png --candidate jpeg:q=30 --max-bpp 9 -o submission --workers 1",
    "shards build photo.png --out shards --patch 16 --count 2 --workers 1",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the tables name."""
    folder = tmp_path_factory.mktemp("awkward")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Image.fromarray(photo("coffee.png", 40, 32)).save("photo.png")
        Path("model.safetensors").write_bytes(find(MODEL).read_bytes())
        torch.manual_seed(0)
        torch.save(MeanScaleHyperprior(4, 6).state_dict(), "checkpoint.pth")
        Path("curve.json").write_text(
            '{"name": "A", "results": {"bpp": [1, 2], "psnr-rgb": [30, 33]}}'
        )
        for name in ("empty.png", "huge.png", PATHS["not-utf8"]):
            Path(name).write_bytes(b"")
        os.truncate("huge.png", 1 << 40)
        Path("folder").mkdir()
        Path("forbidden").mkdir(mode=0)
        Path("recipe.yaml").write_text(RECIPE)
        Path("sweep.yaml").write_text("name: s\nstages: {one: {config: recipe.yaml}}\n")
        for command in HONEST:
            assert main(command.split()) == 0
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
        usage = words[0] in ("fit", "validate", "test")
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert not any("Traceback" in line for line in lines)
    assert status == 1 or (status == 2 and usage), words
    said = [line for line in lines if line.startswith("tucodec")]  # others are progress or usage
    if words[0] == "doctor" and not said:  # its findings are its result
        assert re.search(r"^fail +(script|signal|mirror)", captured.out, re.MULTILINE), captured.out
    else:
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


@pytest.mark.parametrize(
    ("command", "value"),
    [
        pytest.param(command, value, id=f"{kind}-{command}")
        for command, (kind, value) in ROWS
        if (command, kind) not in FINE
    ],
)
def test_unusable(
    command: str,
    value: str,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(files)
    check([word.format(value) for word in command.split()], files, capsys)


def tried(command: str, rows: list[str]) -> set[str]:
    """The arguments of a subcommand that some rows vary: an option's name, "" for what has none."""
    found = set()
    for row in rows:
        if row.startswith(f"{command} "):
            words = row.removeprefix(command).split()
            at = next(i for i, word in enumerate(words) if "{}" in word)
            found.add(next((word for word in words[at::-1] if word.startswith("-")), ""))
    return found


def test_every_option_has_a_row() -> None:
    """A subcommand, a path or a number that is new to the parser and not to the tables fails here."""
    lacking = set()
    for command, action in options(build_parser()):
        kind = getattr(action.type, "__name__", "")
        if kind in ("location", "_path"):
            rows = READING + WRITING
        elif kind in ("convert", "int", "float", "part", "_scales"):
            rows = NUMBERS
        else:
            assert kind == "", (command, action)
            continue
        if not tried(command, rows) & {
            *action.option_strings,
            *([] if action.option_strings else [""]),
        }:
            lacking.add((command, action.dest))
    assert not lacking
    for command in ("fit", "validate", "test"):  # Lightning has their options
        assert tried(command, READING) == {"--config"}
