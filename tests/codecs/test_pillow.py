"""Pillow opens and saves `.tuc` files."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lightning_tucodec as tuc
import lightning_tucodec.codecs.pillow
from lightning_tucodec.codecs.network.codec import NetworkModel
from tests.codecs import zoo


@pytest.fixture
def photo() -> Image.Image:
    ramp = np.linspace(0, 255, 70 * 50 * 3).reshape(50, 70, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def test_what_is_saved_is_what_compress_writes(photo: Image.Image, tmp_path: Path) -> None:
    target = tmp_path / "photo.tuc"
    photo.save(target, model="tiny-ssim-1")

    assert target.read_bytes() == tuc.load("tiny-ssim-1").compress(photo)
    with Image.open(target) as back:
        assert (back.format, back.size, back.mode) == ("TUC", (70, 50), "RGB")
        assert back.tobytes() == tuc.decompress(target.read_bytes()).tobytes()
        assert back.copy().tobytes() == back.convert("RGB").tobytes()


def test_options_and_streams(photo: Image.Image) -> None:
    stream = io.BytesIO()
    photo.save(stream, "TUC", effort=1)

    assert stream.getvalue() == tuc.load("tiny-mse-2").compress(photo, effort=1)
    stream.seek(0)
    assert Image.open(stream).resize((7, 5)).size == (7, 5)


def test_a_damaged_file_is_named_as_such_and_another_is_not_ours(
    photo: Image.Image, tmp_path: Path
) -> None:
    data = tuc.load("tiny-mse-2").compress(photo)
    (tmp_path / "cut.tuc").write_bytes(data[:-1])
    (tmp_path / "other.tuc").write_bytes(b"GIF without sense")

    with pytest.raises(tuc.CorruptStreamError):
        Image.open(tmp_path / "cut.tuc")
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(tmp_path / "other.tuc")


def test_a_save_that_fails_leaves_no_file(photo: Image.Image, tmp_path: Path) -> None:
    with pytest.raises(tuc.TucodecError):
        photo.save(tmp_path / "photo.tuc", model="no-such-model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "options"), [("ScaleHyperprior", {}), ("ScaleHyperpriorVbr", {"quality": 1.5})]
)
def test_networks_of_another_form_save_too(
    photo: Image.Image, tmp_path: Path, kind: str, options: dict[str, float]
) -> None:
    file = zoo.model(kind)
    file.save(tmp_path / "own.safetensors")
    stream = io.BytesIO()
    photo.save(stream, "TUC", model=str(tmp_path / "own.safetensors"), **options)

    coder = NetworkModel(file, quality=options.get("quality"))
    assert stream.getvalue() == coder.encode(np.asarray(photo))
    with pytest.raises(tuc.TucodecError, match="effort is for"):
        photo.save(stream, "TUC", model=str(tmp_path / "own.safetensors"), effort=1)
    with pytest.raises(tuc.TucodecError, match="has one rate, and takes no quality"):
        photo.save(stream, "TUC", quality=80)


def test_a_variable_rate_model_takes_a_quality(photo: Image.Image) -> None:
    stream = io.BytesIO()
    photo.save(stream, "TUC", model="tiny-vbr", quality=1.5, effort=1)
    assert stream.getvalue() == tuc.load("tiny-vbr").at(1.5).compress(photo, effort=1)
    with pytest.raises(tuc.TucodecError, match="quality 80 is not within 0 … 6"):
        photo.save(stream, "TUC", model="tiny-vbr", quality=80)
