"""Reading images of every kind as 8-bit sRGB."""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_pipelines.sources import Source
from lightning_tucodec.codecs.learned.latents import as_pixels
from lightning_tucodec.errors import ImageInputError
from lightning_tucodec.io import images
from lightning_tucodec.io.images import image_files, read_image, write_png

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


def png_chunk(kind: bytes, content: bytes, flip: int = 0) -> bytes:
    """A chunk; `flip` spoils its check sum."""
    crc = zlib.crc32(kind + content) ^ flip
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(samples: np.ndarray, *ancillary: bytes, interlace: bool = False) -> bytes:
    """A PNG of uint8 or uint16 samples H×W×C, with chunks before the pixels."""
    height, width, channels = samples.shape
    passes = [(0, 0, 1, 1)]
    if interlace:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
                  (0, 1, 1, 2)]  # fmt: skip
    rows = b""
    for x, y, across, down in passes:
        for row in samples[y::down, x::across]:
            if row.size:
                rows += b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes()
    head = struct.pack(">IIBBBBB", width, height, 8 * samples.itemsize,
                       {1: 0, 3: 2, 2: 4, 4: 6}[channels], 0, 0, interlace)  # fmt: skip
    chunks = [png_chunk(b"IHDR", head), *ancillary, png_chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*chunks, png_chunk(b"IEND", b"")])


def both_readers(data: bytes) -> np.ndarray:
    """Pixels of a file, which are the same when Pillow has opened it."""
    found = read_image(io.BytesIO(data))
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(as_pixels(image), found)
    return found


@pytest.mark.parametrize("container", ["png", "interlaced", "tiff"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_of_any_channels(container: str, channels: int) -> None:
    samples = np.random.default_rng(channels).integers(0, 65536, (13, 11, channels), np.uint16)
    if container == "tiff":
        if channels == 2:
            pytest.skip("Pillow reads no 16-bit gray TIFF with alpha")
        data = tiff(samples)
    else:
        data = png(samples, interlace=container == "interlaced")
    exact = samples.astype(float)
    if channels in (2, 4):
        alpha = exact[..., -1:] / 65535
        exact = exact[..., :-1] * alpha + 65535 * (1 - alpha)
    expected = np.broadcast_to(exact / 257, (13, 11, 3))
    # Half a level, and the rounding of the composite to 16 bits.
    assert np.abs(both_readers(data) - expected).max() <= 0.5 + 0.5 / 257 + 1e-9


def tiff(samples: np.ndarray) -> bytes:
    """An uncompressed little-endian TIFF of uint16 samples."""
    height, width, channels = samples.shape
    bits = struct.pack(f"<{channels}H", *[16] * channels)
    pixels = samples.astype("<u2").tobytes()
    tags = [(256, 4, 1, width), (257, 4, 1, height), (259, 3, 1, 1),
            (262, 3, 1, 2 if channels > 2 else 1), (273, 4, 1, 8 + len(bits)),
            (277, 3, 1, channels), (278, 4, 1, height), (279, 4, 1, len(pixels))]  # fmt: skip
    tags.append((258, 3, channels, 8 if channels > 2 else 16))
    if channels == 4:
        tags.append((338, 3, 1, 2))
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    start = 8 + len(bits) + len(pixels)
    return b"II*\0" + struct.pack("<I", start) + bits + pixels + directory


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_transparent_key_is_exact(channels: int, dtype: type) -> None:
    samples = np.zeros((2, 2, channels), dtype)
    samples[0, 0] = samples[0, 1] = samples[1, 0] = np.iinfo(dtype).max // 5
    samples[0, 1, 0] += 1  # nearly the key: of 16 bits only the lower byte differs
    key = png_chunk(b"tRNS", samples[0, 0].astype(">u2").tobytes())
    found = both_readers(png(samples, key))
    assert (found[0, 0] == 255).all()
    assert (found[1, 0] == 255).all()
    assert found[0, 1].max() <= 52
    assert (found[1, 1] == 0).all()


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("name", ["sRGB", "line"])
@pytest.mark.parametrize("linear", [False, True])
def test_profiles_count_by_their_curves(name: str, linear: bool) -> None:
    """Whatever a profile is called: sRGB's curves change nothing, straight lines do."""
    profile = rewritten_profile(name, linear)
    for suffix in ("png", "jpeg", "tiff", "webp"):
        buffer = io.BytesIO()
        options = {"lossless": True} if suffix == "webp" else {}
        Image.fromarray(GRADIENT).save(buffer, suffix, icc_profile=profile, **options)
        found = both_readers(buffer.getvalue())
        if suffix == "jpeg":  # its own error is larger than what the test looks for
            assert (found[0, 32, 0] > 170) == linear
        elif linear:
            light = GRADIENT / 255
            curve = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
            assert np.abs(found - 255 * curve).max() <= 2
        else:
            assert np.array_equal(found, GRADIENT)


def test_unusable_profiles_are_ignored() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (lab, b"nonsense", SRGB[:300], b"x" * (2 << 20)):
        buffer = io.BytesIO()
        Image.fromarray(GRADIENT).save(buffer, "png", icc_profile=profile)
        assert np.array_equal(read_image(io.BytesIO(buffer.getvalue())), GRADIENT)


def test_a_large_profile_counts() -> None:
    """A megabyte that follows the profile's tags, as tables would."""
    profile = bytearray(rewritten_profile("sRGB", True) + bytes(1 << 21))
    profile[:4] = struct.pack(">I", len(profile))
    found = read_image(io.BytesIO(png(GRADIENT, iccp(bytes(profile)))))
    assert abs(int(found[0, 32, 0]) - 188) <= 2


def iccp(profile: bytes) -> bytes:
    return png_chunk(b"iCCP", b"name\0\0" + zlib.compress(profile))


def rewritten_profile(name: str, linear: bool) -> bytes:
    """The sRGB profile with another description of four letters, perhaps with straight tone curves."""
    data = bytearray(SRGB)
    for entry in range(struct.unpack(">I", data[128:132])[0]):
        start = 132 + 12 * entry
        tag, offset, size = (
            data[start : start + 4],
            *struct.unpack(">II", data[start + 4 : start + 12]),
        )
        if linear and tag in (b"rTRC", b"gTRC", b"bTRC"):
            data[offset : offset + 12] = b"curv" + bytes(4) + struct.pack(">I", 0)
        if tag == b"desc":
            data[offset : offset + size] = bytes(data[offset : offset + size]).replace(
                "sRGB".encode("utf-16-be"), name.encode("utf-16-be")
            )
    return bytes(data)


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"tEXt", b"Comment\0hello", flip=1),
        png_chunk(b"tRNS", bytes(6), flip=1),
        png_chunk(b"gAMA", b"\0"),
        png_chunk(b"cHRM", bytes(5)),
        png_chunk(b"pHYs", bytes(3)),
        png_chunk(b"sRGB", b""),
        png_chunk(b"acTL", b""),
        png_chunk(b"eXIf", b"\xff" * 40),
        png_chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 30),
        png_chunk(b"iCCP", b"name"),
        png_chunk(b"iCCP", b"name\0\0" + b"not packed"),
        iccp(bytes(64 << 20)),
        png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20))),
        png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(2 << 20))),
        png_chunk(b"tEXt", b"Comment\0" + b"a" * (2 << 20)),
        png_chunk(b"tEXt", b"Raw profile type exif\0nonsense"),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x" + b"\xff" * 9),
    ],
    ids=lambda chunk: f"{chunk[4:8].decode()}-{len(chunk)}",
)
def test_damaged_metadata_leave_the_pixels(chunk: bytes) -> None:
    assert np.array_equal(read_image(io.BytesIO(png(GRADIENT, chunk))), GRADIENT)


@pytest.mark.parametrize("kind", ["exif", "xmp", "icc_profile"])
@pytest.mark.parametrize("suffix", ["jpeg", "webp", "tiff"])
def test_damaged_metadata_of_other_formats(suffix: str, kind: str) -> None:
    if (suffix, kind) == ("tiff", "exif"):
        pytest.skip("a TIFF's EXIF is what places its pixels")
    options = {"lossless": True} if suffix == "webp" else {}
    plain, damaged = io.BytesIO(), io.BytesIO()
    Image.fromarray(GRADIENT).save(plain, suffix, **options)
    Image.fromarray(GRADIENT).save(damaged, suffix, **options, **{kind: b"Exif\0\0" + b"\xff" * 50})
    assert np.array_equal(both_readers(damaged.getvalue()), both_readers(plain.getvalue()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_one_reader_for_files_and_pillow(mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(GRADIENT).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    buffer = io.BytesIO()
    image.save(buffer, "jpeg" if mode == "CMYK" else "png", exif=exif)
    assert both_readers(buffer.getvalue()).shape == (
        (40, 60, 3) if orientation < 5 else (60, 40, 3)
    )


def test_mirrored_arrays_are_taken() -> None:
    assert as_pixels(GRADIENT[::-1, ::-1]).flags.c_contiguous
    assert np.array_equal(as_pixels(GRADIENT[::-1, ::-1]), GRADIENT[::-1, ::-1])


def test_reading_in_threads_leaves_the_warnings_alone() -> None:
    data, before = png(GRADIENT), list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: read_image(io.BytesIO(data)), range(200)):
            assert found.shape == GRADIENT.shape
    assert warnings.filters == before


def test_the_images_of_a_folder(tmp_path: Path) -> None:
    formats = Image.registered_extensions()
    readable = sorted(images.READABLE_SUFFIXES)
    assert {"PNG", "JPEG", "WEBP", "AVIF", "TIFF"} <= {formats[suffix] for suffix in readable}
    for suffix in readable:
        Image.fromarray(GRADIENT).save(tmp_path / f"a{suffix.upper()}", formats[suffix])
    for name in ("._a.png", ".DS_Store", "notes.txt", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "folder.png").mkdir()
    assert sorted(path.suffix.lower() for path in image_files(tmp_path)) == readable
    assert [entry.name for entry in Source(str(tmp_path)).entries(0)] == [
        path.name for path in image_files(tmp_path)
    ]
    for path in image_files(tmp_path):
        assert read_image(path).shape == (40, 60, 3), path


@pytest.mark.parametrize(
    ("name", "start", "kind"),
    [
        ("a.heic", b"\0\0\0\x18ftypheic", "HEIC"),
        ("a.heif", b"\0\0\0\x18ftypmif1", "HEIC"),
        ("a.jxl", b"\xff\x0a", "JPEG XL"),
        ("b.jxl", b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    ],
)
def test_formats_that_are_only_named(tmp_path: Path, name: str, start: bytes, kind: str) -> None:
    (tmp_path / name).write_bytes(start + bytes(200))
    assert [path.name for path in image_files(tmp_path)] == [name]
    with pytest.raises(ImageInputError, match=f"{kind} images cannot be read; convert"):
        read_image(tmp_path / name)


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
