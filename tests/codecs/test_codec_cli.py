"""compress, decompress, info, models, export: files in, files out, and every bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_tucodec.cli import main
from lightning_tucodec.codecs.learned.model_file import freeze
from lightning_tucodec.io.images import read_image
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.training.vae import resolve_codec
from tests.support import MICRO, photo


@pytest.fixture(autouse=True)
def model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one small untrained model, `micro`."""
    folder = tmp_path / "models"
    torch.manual_seed(0)
    network = TucodecVAE(resolve_codec("tiny", MICRO))
    freeze(network, "micro", {"opt_step": 0}).save(folder / "micro.safetensors")
    monkeypatch.setenv("TUCODEC_MODELS", str(folder))
    return folder


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def picture(width: int = 48, height: int = 40) -> Image.Image:
    return Image.fromarray(photo("coffee.png", width, height))


def compress(*words: object) -> int:
    return main(["compress", *map(str, words), "--model", "micro"])


def test_round_trip_in_another_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [save(tmp_path / "a.png", picture()), save(tmp_path / "b.jpg", picture(33, 17))]
    out, recon = tmp_path / "out", tmp_path / "recon"
    assert compress(*sources, "-o", out, "--recon", recon, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(row["output"]).name for row in rows] == ["a.tuc", "b.tuc"]
    for row, source in zip(rows, sources, strict=True):
        assert set(row) >= {
            "file", "output", "width", "height", "bytes", "bpp", "estimated_bits", "psnr",
            "ms_ssim", "seconds", "model",
        }  # fmt: skip
        assert row["file"] == str(source)
        assert row["bytes"] == Path(row["output"]).stat().st_size
        assert row["bpp"] == pytest.approx(8 * row["bytes"] / (row["width"] * row["height"]))
    decoded = tmp_path / "decoded"
    code = "import torch, sys; torch.set_num_threads(1)\nfrom lightning_tucodec.cli import main\n"
    code += "sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "decompress", str(out / "a.tuc"), str(out / "b.tuc")]
    subprocess.run([*words, "-o", str(decoded)], check=True, timeout=120, capture_output=True)
    for name in ("a.png", "b.png"):
        np.testing.assert_array_equal(read_image(decoded / name), read_image(recon / name))


def cmyk(path: Path) -> Path:
    return save(path / "cmyk.jpg", picture().convert("CMYK"))


def sixteen_bits(path: Path) -> Path:
    values = np.array(picture().convert("L")).astype(np.uint16) * 257
    return save(path / "deep.png", Image.fromarray(values))


def palette(path: Path) -> Path:
    image = picture().convert("P")
    return save(path / "palette.png", image, transparency=3)


def rotated(path: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees
    return save(path / "rotated.jpg", picture(), exif=exif)


def one_pixel(path: Path) -> Path:
    return save(path / "one.png", picture(1, 1))


def very_wide(path: Path) -> Path:
    return save(path / "wide.png", Image.new("RGB", (20000, 8), (10, 200, 90)))


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (cmyk, (48, 40)),
        (sixteen_bits, (48, 40)),
        (palette, (48, 40)),
        (rotated, (40, 48)),
        (one_pixel, (1, 1)),
        (very_wide, (20000, 8)),
    ],
)
def test_unusual_images_are_converted(make: Any, size: tuple[int, int], tmp_path: Path) -> None:
    source = make(tmp_path)
    assert compress(source, "-o", tmp_path / "x.tuc") == 0
    assert main(["decompress", str(tmp_path / "x.tuc"), "-o", str(tmp_path / "x.png")]) == 0
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == size


def test_what_a_file_does_not_hold_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    fine = picture().convert("RGBA")
    save(folder / "opaque.png", fine)
    deep = np.arange(1600, dtype=np.uint16).reshape(40, 40)
    save(folder / "eight.png", Image.fromarray(deep // 8 * 257))
    assert compress(folder, "-o", tmp_path / "out") == 0
    assert capsys.readouterr().err == ""
    for name in "ab":
        fine.putalpha(100)
        save(folder / f"{name}.png", fine)
        save(folder / f"{name}16.png", Image.fromarray(deep * 40))
    assert compress(folder, "-o", tmp_path / "out", "--force") == 0
    first, second = sorted(capsys.readouterr().err.splitlines(), key=lambda line: "rounded" in line)
    assert re.search(r"[ab]\.png: transparency is shown on white; 8-bit RGB is coded", first)
    assert re.search(r"[ab]16\.png: samples of 16 bits are rounded to 8; 8-bit RGB", second)


def test_of_an_animation_one_frame_is_coded_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    assert compress(tmp_path / "still.gif", "-o", tmp_path / "still.tuc") == 0
    assert capsys.readouterr().err == ""
    assert compress(tmp_path / "a.gif", "-o", tmp_path / "a.tuc") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.gif: of several frames the first is taken; 8-bit RGB is coded" in line


def test_models_that_are_no_folder_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    monkeypatch.setenv("TUCODEC_MODELS", str(plain))
    assert main(["models"]) == 1
    assert f"{plain}: not a folder" in capsys.readouterr().err
    assert main(["doctor"]) == 0
    assert f"{plain}: not a folder" in capsys.readouterr().out
    monkeypatch.setenv("TUCODEC_MODELS", str(tmp_path / "none yet"))
    assert main(["models"]) == 0


def test_one_bad_file_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [save(tmp_path / f"{name}.png", picture()) for name in "ab"]
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    cut = save(tmp_path / "cut.jpg", picture(200, 160))
    cut.write_bytes(cut.read_bytes()[:2000])
    missing = tmp_path / "missing.png"
    out = tmp_path / "out"
    assert compress(good[0], text, cut, missing, good[1], "-o", out) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for line, bad in zip(lines, (text, cut, missing), strict=True):
        assert str(bad) in line
    assert sorted(p.name for p in out.iterdir()) == ["a.tuc", "b.tuc"]


@pytest.fixture
def stream(tmp_path: Path) -> bytes:
    assert compress(save(tmp_path / "a.png", picture()), "-o", tmp_path / "a.tuc") == 0
    return (tmp_path / "a.tuc").read_bytes()


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda d: d[:-5], "truncated"),
        (lambda d: d[:7], "truncated"),
        (lambda d: b"", "not a .tuc"),
        (lambda d: changed(d, len(d) // 2), "damaged"),
        (lambda d: changed(d, 3), "version"),
        (lambda d: changed(d, 6), "damaged"),
        (lambda d: d[:13] + b"\xff\xff\x03" + d[14:], ""),
    ],
)
def test_bad_streams_end_in_one_line_and_no_file(
    damage: Any, text: str, stream: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.tuc"
    bad.write_bytes(damage(stream))
    capsys.readouterr()
    assert main(["decompress", str(bad), "-o", str(tmp_path / "bad.png")]) == 1
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert "bad.tuc" in errors
    assert text in errors
    assert not (tmp_path / "bad.png").exists()
    assert main(["info", str(bad)]) == 1
    assert "bad.tuc" in capsys.readouterr().err


def test_unknown_model_is_named(
    stream: bytes, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    (model_folder / "micro.safetensors").rename(elsewhere)
    words = ["decompress", str(tmp_path / "a.tuc"), "-o", str(tmp_path / "out.png")]
    assert main(words) == 1
    assert "--model" in capsys.readouterr().err
    assert main([*words, "--model", str(elsewhere)]) == 0


def test_info_and_models(
    stream: bytes, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["info", str(tmp_path / "a.tuc"), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["width"], row["height"], row["model"], row["kind"]) == (48, 40, "micro", "learned")
    assert row["bytes"] == len(stream)
    assert row["header_bytes"] <= 32
    other = tmp_path / "b.tuc"
    other.write_bytes(b"no file of ours")
    assert main(["info", str(other), str(tmp_path / "a.tuc"), str(tmp_path / "a.tuc")]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"tucodec: {other}: ")
    assert err.count("\n") == 1
    first, second = out.split("\n\n")
    assert second == first + "\n"
    assert f"\nbpp           {8 * len(stream) / (48 * 40):.4f}\n" in out
    (model_folder / "micro.safetensors").rename(tmp_path / "away.safetensors")
    assert main(["info", str(tmp_path / "a.tuc")]) == 0
    assert "\nmodel         not known here" in capsys.readouterr().out
    (tmp_path / "away.safetensors").rename(model_folder / "micro.safetensors")
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.index("bpp=") for line in lines if "bpp=" in line}) == 1
    assert len({line.index("psnr=") for line in lines if "psnr=" in line}) == 1
    assert main(["models", "--json"]) == 0
    assert "micro" in [row["name"] for row in json.loads(capsys.readouterr().out)]


def test_targets_that_collide_or_do_not_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sub").mkdir()
    first = save(tmp_path / "a.png", picture())
    second = save(tmp_path / "sub" / "a.png", picture())
    assert compress(first, second, "-o", tmp_path / "out") == 1
    assert "would both be written" in capsys.readouterr().err
    assert compress(first, second, "-o", tmp_path / "one.tuc") == 1
    assert "name a folder" in capsys.readouterr().err
    assert compress(tmp_path / "sub", "-o", tmp_path / "out") == 0
    assert (tmp_path / "out" / "a.tuc").exists()


def test_damaged_models_are_named_and_do_not_stop_decoding(
    stream: bytes, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model_folder / "broken.safetensors").write_bytes(b"nothing")
    assert main(["decompress", str(tmp_path / "a.tuc"), "-o", str(tmp_path / "out.png")]) == 0
    assert main(["models"]) == 1
    assert "broken.safetensors" in capsys.readouterr().err


def test_a_folder_of_many_sizes_is_coded_as_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches by size, bad files between them: each file's bytes and pixels are those it has alone."""
    from lightning_tucodec.codecs import batch
    from lightning_tucodec.codecs.learned import codec, transforms

    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    sizes = [(48, 40), (40, 48), (48, 40), (17, 5), (48, 33), (40, 48), (48, 40), (48, 40)]
    for number, size in enumerate(sizes):
        pixels = np.roll(photo("coffee.png", *size), number, axis=0)
        save(folder / f"{number}.png", Image.fromarray(pixels))
    (folder / "3b.png").write_bytes(b"no image")
    monkeypatch.setattr(batch, "PIXELS_IN_FLIGHT", 6000)
    monkeypatch.setattr(transforms, "WHOLE_POSITIONS", 27)  # three of 48×40
    batches: list[int] = []
    analyse = codec.TucModel.analyse_batch

    def noted(self: codec.TucModel, images: Any) -> Any:
        batches.append(len(images))
        return analyse(self, images)

    threads = torch.get_num_threads()
    with monkeypatch.context() as patch:
        patch.setattr(codec.TucModel, "analyse_batch", noted)
        assert compress(folder, "-o", out, "--json") == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "3b.png" in captured.err
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [Path(row["file"]).stem for row in rows] == list("01234567")
    assert sum(batches) == 8
    assert 1 < max(batches) <= 3
    assert torch.get_num_threads() == threads
    for name in "01234567":
        assert compress(folder / f"{name}.png", "-o", tmp_path / "alone.tuc", "--force") == 0
        assert (tmp_path / "alone.tuc").read_bytes() == (out / f"{name}.tuc").read_bytes()
    files = sorted(out.glob("*.tuc"))
    assert main(["decompress", *map(str, files), "-o", str(tmp_path / "png")]) == 0
    for file in files:
        assert main(["decompress", str(file), "-o", str(tmp_path / "alone.png"), "--force"]) == 0
        alone = read_image(tmp_path / "alone.png")
        np.testing.assert_array_equal(alone, read_image(tmp_path / "png" / f"{file.stem}.png"))


def test_folders_of_files_are_decoded_and_shown(
    stream: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "coded"
    (folder / "deeper.tuc").mkdir(parents=True)
    for name in ("b.tuc", "a.TUC", ".hidden.tuc", "readme.txt"):
        (folder / name).write_bytes(stream)
    assert main(["decompress", str(folder), "-o", str(tmp_path / "png")]) == 0
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == ["a.png", "b.png"]
    assert main(["info", str(folder), "--json"]) == 0
    shown = [json.loads(line)["file"] for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [Path(file).name for file in shown] == ["a.TUC", "b.tuc"]
    empty = folder / "deeper.tuc"
    for words in (["info", str(empty)], ["decompress", str(empty), "-o", str(tmp_path / "x.png")]):
        assert main(words) == 1
        assert f"{empty}: no .tuc files in this folder" in capsys.readouterr().err


def test_salvage_hatches_what_is_lost_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_tucodec.codecs.learned import latents

    monkeypatch.setattr(latents, "STRIP_POSITIONS", 16)
    assert compress(save(tmp_path / "a.png", picture(60, 300)), "-o", tmp_path / "a.tuc") == 0
    data = (tmp_path / "a.tuc").read_bytes()
    (tmp_path / "cut.tuc").write_bytes(data[:-2])
    capsys.readouterr()
    words = ["decompress", str(tmp_path / "cut.tuc"), "-o", str(tmp_path / "cut.png")]
    assert main(words) == 1
    assert not (tmp_path / "cut.png").exists()
    assert "truncated" in capsys.readouterr().err
    assert main([*words, "--salvage", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["damaged_rows"] == [[256, 300]]
    assert "rows 256–299" in captured.err
    assert captured.err.count("\n") == 1
    shown = read_image(tmp_path / "cut.png")
    assert shown.shape == (300, 60, 3)
    assert set(np.unique(shown[256:])) == {0, 255}
    assert (
        main(["decompress", str(tmp_path / "a.tuc"), "-o", str(tmp_path / "a2.png"), "--salvage"])
        == 0
    )


def test_a_device_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    source = save(tmp_path / "a.png", picture())
    assert compress(source, "-o", tmp_path / "a.tuc", "--device", "cuda") == 1
    assert "no GPU" in capsys.readouterr().err


def test_help_is_instant() -> None:
    code = (
        "import sys; from lightning_tucodec.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'numba', 'scipy', 'pytorch_lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_export_of_a_run_codes(
    tmp_path: Path, shard_folder: Path, micro: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    values = {
        "run": {"name": "r", "runs_dir": str(tmp_path / "runs")},
        "model": {"preset": "tiny", "codec": micro},
        "data": {"shards": str(shard_folder), "batch_size": 2, "crop": 32},
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_steps": 2, "max_epochs": -1,
            "log_every_n_steps": 1, "enable_model_summary": False,
        },
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["fit", "--config", str(path)]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    out = tmp_path / "exported.safetensors"
    assert main(["export", str(run), "-o", str(out)]) == 0
    source = save(tmp_path / "a.png", picture())
    words = ["compress", str(source), "-o", str(tmp_path / "e.tuc"), "--model", str(out)]
    assert main(words) == 0
    assert main(["export", str(tmp_path / "nothing"), "-o", str(out), "--force"]) == 1
    assert "nothing" in capsys.readouterr().err


def test_loading_models_imports_no_compiler() -> None:
    """PyTorch imports SymPy and its compiler for some operations on shapes: as long as to decode an image."""
    code = """
import sys
from lightning_tucodec.codecs.cards import coding_files
from lightning_tucodec.codecs.library import load_any
models = [load_any(path) for path in coding_files()]
print(len(models) > 10, {"sympy", "torch._dynamo"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True set()"


def test_a_process_that_ends_at_once_has_said_everything(stream: bytes, tmp_path: Path) -> None:
    """Its status and output, also into a pipe."""
    tucodec = [sys.executable, "-m", "lightning_tucodec.cli"]
    files = [str(tmp_path / "a.tuc")] * 300
    for words, status, lines in (
        (["info", *files, "--json"], 0, 300),
        (["info", *files, str(tmp_path / "none.tuc"), "--json"], 1, 300),
        (["decompress", files[0], "-o", str(tmp_path / "back.png")], 0, 1),
        (["decompress", "none.tuc", "-o", str(tmp_path / "b.png")], 1, 0),
        (["info"], 2, 0),
    ):
        done = subprocess.run([*tucodec, *words], capture_output=True, text=True, check=False)
        assert (done.returncode, len(done.stdout.splitlines())) == (status, lines)
        assert bool(done.stderr) == (status > 0)


def test_info_needs_no_pytorch() -> None:
    stream = Path(__file__).parents[1] / "golden" / "tiny-mse-2.tuc"
    code = (
        "import sys; from lightning_tucodec.cli import main\n"
        f"assert main(['info', {str(stream)!r}]) == 0\n"
        "assert 'torch' not in sys.modules, 'it was imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "tiny-mse-2" in done.stdout


def test_a_pipe_among_images_holds_nothing_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "a.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "b.png")
    assert main(["compress", str(tmp_path), "-o", str(tmp_path / "out")]) == 1
    assert "a.png: a pipe, socket or device, not a file" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.tuc"]


def test_what_has_no_end_is_no_tuc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["info", "/dev/zero"],
        ["decompress", "/dev/zero", "-o", str(tmp_path / "a.png")],
    ):
        assert main(words) == 1
        assert "/dev/zero: " in capsys.readouterr().err
