"""Reading images of every kind as 8-bit sRGB."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from lightning_tucodec import images
from lightning_tucodec.errors import ImageInputError
from lightning_tucodec.images import read_image, write_png

GRADIENT = np.stack(
    np.broadcast_arrays(np.arange(60)[None, :] * 4, np.arange(40)[:, None] * 6, 90), -1
).astype(np.uint8)  # 40×60, smooth, so that lossy formats stay close


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".bmp", ".ppm"])
def test_lossless_formats(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", Image.fromarray(GRADIENT))
    assert np.array_equal(read_image(path), GRADIENT)
    assert np.array_equal(read_image(str(path)), GRADIENT)
    with open(path, "rb") as stream:
        assert np.array_equal(read_image(stream), GRADIENT)


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".avif"])
def test_lossy_formats(tmp_path: Path, suffix: str) -> None:
    found = read_image(save(tmp_path / f"a{suffix}", Image.fromarray(GRADIENT), quality=95))
    assert found.shape == GRADIENT.shape
    assert np.abs(found.astype(int) - GRADIENT).mean() < 3


def test_gray_bilevel_and_cmyk(tmp_path: Path) -> None:
    gray = Image.fromarray(GRADIENT).convert("L")
    found = read_image(save(tmp_path / "gray.png", gray))
    assert np.array_equal(found, np.repeat(np.asarray(gray)[..., None], 3, 2))
    found = read_image(save(tmp_path / "bits.png", gray.point(lambda v: 255 * (v > 99), "1")))
    assert set(np.unique(found)) == {0, 255}
    cmyk = Image.fromarray(GRADIENT).convert("CMYK")
    found = read_image(save(tmp_path / "cmyk.jpg", cmyk, quality=95))
    assert np.abs(found.astype(int) - GRADIENT).mean() < 3
    assert np.array_equal(read_image(save(tmp_path / "cmyk.tiff", cmyk)), GRADIENT)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bits_are_scaled_with_rounding(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257, 385, 386, 65407, 65535]], np.uint16)
    found = read_image(save(tmp_path / f"a{suffix}", Image.fromarray(values)))
    assert found[0, :, 0].tolist() == [0, 0, 1, 1, 1, 2, 255, 255]


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0] = [(10, 20, 30, 255), (10, 20, 30, 0)]
    found = read_image(save(tmp_path / "a.png", Image.fromarray(rgba)))
    assert found[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    found = read_image(save(tmp_path / "p.png", palette, transparency=0))
    assert found[0].tolist() == [[255, 255, 255], [200, 100, 50]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = read_image(save(tmp_path / "a.png", Image.fromarray(GRADIENT), exif=exif))
    turned = {
        1: GRADIENT, 2: GRADIENT[:, ::-1], 3: GRADIENT[::-1, ::-1], 4: GRADIENT[::-1],
        5: GRADIENT.transpose(1, 0, 2), 6: np.rot90(GRADIENT, -1),
        7: GRADIENT[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(GRADIENT, 1),
    }[orientation]  # fmt: skip
    assert np.array_equal(found, turned)


def test_colour_profiles(tmp_path: Path) -> None:
    image = Image.fromarray(GRADIENT)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found = read_image(save(tmp_path / "s.png", image, icc_profile=srgb))
    assert np.array_equal(found, GRADIENT)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for number, profile in enumerate((lab, b"nonsense")):  # not usable: the pixels count
        found = read_image(save(tmp_path / f"{number}.png", image, icc_profile=profile))
        assert np.array_equal(found, GRADIENT)
    linear = _linear_profile(srgb)
    found = read_image(save(tmp_path / "l.png", image, icc_profile=linear))
    # Linear light 128/255 is 188 in sRGB.
    assert abs(int(found[0, 32, 0]) - 188) <= 2


def _linear_profile(srgb: bytes) -> bytes:
    """The sRGB profile with tone curves replaced by straight lines and another description."""
    data = bytearray(srgb)
    for entry in range(struct.unpack(">I", data[128:132])[0]):
        start = 132 + 12 * entry
        name, offset, size = (
            data[start : start + 4],
            *struct.unpack(">II", data[start + 4 : start + 12]),
        )
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            data[offset : offset + 12] = b"curv" + bytes(4) + struct.pack(">I", 0)
        if name == b"desc":
            data[offset : offset + size] = bytes(data[offset : offset + size]).replace(
                "sRGB".encode("utf-16-be"), "line".encode("utf-16-be")
            )
    return bytes(data)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.fromarray(GRADIENT), Image.new("RGB", (60, 40))]
    path = save(
        tmp_path / "a.webp", frames[0], save_all=True, append_images=frames[1:], lossless=True
    )
    assert np.array_equal(read_image(path), GRADIENT)


def test_clear_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    whole = save(tmp_path / "a.png", Image.fromarray(GRADIENT)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    save(tmp_path / "float.tiff", Image.fromarray(np.zeros((4, 4), np.float32)))
    for name, words in {
        "text.jpg": "not an image", "empty.png": "not an image", "cut.png": "truncated",
        "gone.png": "no such file", ".": "folder", "float.tiff": "floating-point",
    }.items():  # fmt: skip
        with pytest.raises(ImageInputError, match=words) as caught:
            read_image(tmp_path / name)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(ImageInputError, match="60×40"):
        read_image(tmp_path / "a.png")


def test_truncation_anywhere_is_an_error_of_ours(tmp_path: Path) -> None:
    for suffix in ("jpg", "png", "webp", "avif", "tiff"):
        buffer = io.BytesIO()
        Image.fromarray(GRADIENT).save(buffer, format={"jpg": "jpeg"}.get(suffix, suffix))
        data = buffer.getvalue()
        for end in range(0, len(data) - 16, max(1, len(data) // 12)):
            with pytest.raises(ImageInputError):
                read_image(io.BytesIO(data[:end]))


def test_write_png(tmp_path: Path) -> None:
    write_png(tmp_path / "new" / "a.png", GRADIENT)
    assert np.array_equal(read_image(tmp_path / "new" / "a.png"), GRADIENT)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
