"""Reading photographs of any common kind as 8-bit sRGB arrays, and writing PNG."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from lightning_tucodec.errors import ImageInputError
from lightning_tucodec.io.quiet import without_warnings
from lightning_tucodec.io.temporary import atomic_write

# fmt: off
READABLE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k", ".jpx", ".jpf", ".png", ".apng",
    ".webp", ".avif", ".tif", ".tiff", ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".gif",
})
# fmt: on
NAMED_SUFFIXES = frozenset({".heic", ".heif", ".jxl"})
"""Photographs that cannot be read here: they are listed, so that an error names them."""

IMAGE_SUFFIXES = READABLE_SUFFIXES | NAMED_SUFFIXES
"""File names that are looked at in folders and tars; `read_image` itself goes by the content."""

MAX_PIXELS = 1 << 27
"""Images above 134 million pixels are refused before they are decoded."""

_TRANSPARENT = "transparency is shown on white"
_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_PROFILE = 1 << 25  # bytes of an ICC profile in a PNG, unpacked

_FOREIGN: tuple[tuple[str, Callable[[bytes], bool]], ...] = (
    ("HEIC", lambda b: b[4:8] == b"ftyp" and b[8:11] in {b"hei", b"hev", b"mif", b"msf"}),
    ("JPEG XL", lambda b: b[:2] == b"\xff\x0a" or b[:12] == b"\0\0\0\x0cJXL \r\n\x87\n"),
    ("PDF", lambda b: b[:4] == b"%PDF"),
    ("SVG", lambda b: b.lstrip()[:4] == b"<svg"),
)

_UPRIGHT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
"""What each EXIF orientation asks for."""

# Pillow keeps the upper byte of such samples; the raw mode beside it has the lower one.
_LOWER_BYTES = {
    f"{bands};16{order}": f"{bands};16{other}"
    for bands in ("RGB", "RGBA", "RGBX")
    for order, other in ("BL", "LB", "NB")
}


def is_image_name(name: str) -> bool:
    """Whether a file of a folder or tar counts as one of its images: by suffix, hidden ones do not."""
    base = PurePath(name)
    return base.suffix.lower() in IMAGE_SUFFIXES and not base.name.startswith(".")


def image_files(folder: Path | str) -> list[Path]:
    """The images directly in a folder, by `is_image_name`, sorted."""
    return sorted(p for p in Path(folder).iterdir() if is_image_name(p.name) and not p.is_dir())


def read_image(
    file: Path | str | BinaryIO, lost: Callable[[str], None] = lambda kind: None
) -> NDArray[np.uint8]:
    """Read one image as RGB.

    JPEG, PNG, WebP, AVIF, TIFF and what else Pillow knows. The EXIF orientation is applied, an
    embedded ICC profile is converted to sRGB (perceptual intent) unless its colours are sRGB's, gray
    becomes three equal channels, 16 bits are scaled to 8 with rounding, transparency is composited
    on white, and of an animation the first frame counts. Damaged metadata count as absent.

    Args:
        file: a path, or a binary stream positioned at the image's first byte.
        lost: is told what the image has and the array has not, in words that do not depend on the file.

    Returns:
        uint8 array H×W×3.

    Raises:
        ImageInputError: not an image, truncated, of more than `MAX_PIXELS`, or with
            floating-point samples. The message names the file.
    """
    name = str(file) if isinstance(file, str | Path) else str(getattr(file, "name", "image"))
    start = b""
    try:
        with _stream(file) as stream:
            start, profile = stream.read(32), None
            stream.seek(0)
            if start.startswith(_PNG):
                data, profile = _without_damage(stream.read())
                stream = io.BytesIO(data)
            with without_warnings():
                image = Image.open(stream)
            with image:
                if profile is not None:
                    image.info["icc_profile"] = profile
                return to_pixels(image, name, lost)
    except ImageInputError:
        raise
    except FileNotFoundError:
        raise ImageInputError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ImageInputError(f"{name}: is a folder, not an image") from None
    except PermissionError:
        raise ImageInputError(f"{name}: may not be read (permissions)") from None
    except Image.UnidentifiedImageError:
        raise ImageInputError(f"{name}: {_unknown(start)}") from None
    except Image.DecompressionBombError:
        raise ImageInputError(f"{name}: more than {MAX_PIXELS} pixels") from None
    # A damaged file can make a decoder raise nearly anything (struct.error, SyntaxError, ...).
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageInputError(f"{name}: damaged or truncated image ({reason})") from error


def image_size(path: Path | str) -> tuple[int, int] | None:
    """Width and height by an image's header; None where `read_image` will say what is wrong."""
    try:
        with without_warnings(), Image.open(path) as image:
            return image.width, image.height
    except Exception:
        return None


def to_pixels(
    image: Image.Image, name: str = "image", lost: Callable[[str], None] = lambda kind: None
) -> NDArray[np.uint8]:
    """What `read_image` gives for the file, of an image that Pillow has opened or made.

    Args:
        image: of any mode; its EXIF orientation, ICC profile and transparency count.
        name: for messages.
        lost: see `read_image`.

    Returns:
        uint8 array H×W×3, contiguous.

    Raises:
        ImageInputError: as `read_image`.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ImageInputError(
            f"{name}: {image.width}×{image.height} pixels are more than the {MAX_PIXELS} that are "
            "supported"
        )
    if image.mode == "F":
        raise ImageInputError(
            f"{name}: floating-point samples have no stated range; use 8 or 16 bits"
        )
    if getattr(image, "is_animated", False):
        lost("of several frames the first is taken")
    profile = image.info.get("icc_profile")
    samples = _sixteen_bits(image, name)
    # Of a PNG this decodes the pixels, since EXIF may follow them.
    orientation = _orientation(image)
    if samples is not None:
        if (samples % 257).any():
            lost("samples of 16 bits are rounded to 8")
        if samples.shape[2] % 2 == 0 and samples[..., -1].min() < 0xFFFF:
            lost(_TRANSPARENT)
        image = Image.fromarray(_eight_bits(samples, image.info.get("transparency")))
    elif image.has_transparency_data:
        image = image.convert("LA" if image.mode in {"L", "LA"} else "RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            lost(_TRANSPARENT)
        white = Image.new(image.mode, image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        image = white.convert(image.mode[:-1])
    elif image.mode not in {"L", "RGB", "CMYK"}:
        image = image.convert("L" if image.mode in {"1", "LA", "La"} else "RGB")
    if profile:
        image = _apply_profile(image, profile)
    pixels = np.asarray(image.convert("RGB"))
    return np.array(_UPRIGHT.get(orientation, lambda a: a)(pixels), order="C")


def write_png(path: Path | str, image: NDArray[np.uint8]) -> None:
    """Write a uint8 array H×W×3 (or H×W gray) as PNG, whole or not at all."""
    buffer = io.BytesIO()
    # On photographs level 4 gives files as small as the default 6 in a third of the time.
    Image.fromarray(image).save(buffer, format="PNG", compress_level=4)
    with atomic_write(path) as stream:
        stream.write(buffer.getvalue())


def _stream(file: Path | str | BinaryIO) -> BinaryIO:
    """The file as a stream of our own, at its beginning."""
    if not isinstance(file, str | Path):
        return io.BytesIO(file.read())
    if is_special(file):
        raise ImageInputError(f"{file}: a pipe, socket or device, not a file")
    return open(file, "rb")


def is_special(path: Path | str) -> bool:
    """Whether something is neither a file nor a folder: to open it could wait for ever."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _unknown(start: bytes) -> str:
    """Why a file of this beginning cannot be opened."""
    if start.startswith(_PNG):
        return "damaged or truncated PNG"
    for kind, fits in _FOREIGN:
        if fits(start):
            return f"{kind} images cannot be read; convert it to PNG or JPEG first"
    return "not an image, or of an unknown format"


def _without_damage(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG with only those ancillary chunks that Pillow can read, and its unpacked ICC profile.

    Chunks of animations go as well: the still picture is what counts. A damaged chunk that carries
    pixels stays, so that reading the file says so.
    """
    kept, profile, place = [_PNG], None, len(_PNG)
    header = b""
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        kind = data[place + 4 : place + 8]
        chunk = data[place : place + length + 12]
        if len(chunk) < length + 12:
            break
        place += len(chunk)
        header = header or chunk
        if kind[:1].isupper():
            kept.append(chunk)
            if kind == b"IEND":
                return b"".join(kept), profile
        elif zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big"):
            if kind == b"iCCP":
                profile = _unpacked_profile(chunk[8:-4])
            elif kind not in {b"acTL", b"fcTL", b"fdAT"} and _harmless(header, chunk):
                kept.append(chunk)
    return b"".join([*kept, data[place:]]), profile


def _harmless(header: bytes, chunk: bytes) -> bool:
    """Whether Pillow opens a PNG that has this chunk."""
    try:
        with Image.open(io.BytesIO(_PNG + header + chunk + b"\0\0\0\0IDAT5\xaf\x06\x1e")):
            return True
    except Exception:  # a damaged chunk can make it raise nearly anything
        return False


def _unpacked_profile(content: bytes) -> bytes | None:
    """The profile of an iCCP chunk: name, zero, method, packed profile."""
    try:
        unpack = zlib.decompressobj()
        profile = unpack.decompress(content[content.index(0) + 2 :], _MAX_PROFILE)
    except (ValueError, zlib.error):
        return None
    return profile if unpack.eof else None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 … 8; 1 where EXIF is damaged or absent."""
    try:
        with without_warnings():
            return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF can make Pillow raise nearly anything
        return 1


def _sixteen_bits(image: Image.Image, name: str) -> NDArray[np.uint16] | None:
    """uint16 H×W×C, 1 to 4 channels, of an image with more than 8 bits a sample; None of others.

    Of colour Pillow only decodes upper bytes, so the file is decoded twice. An image whose file is
    gone has 8 bits.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ImageInputError(f"{name}: samples beyond 16 bits; use 8 or 16 bits")
        return values[..., None].astype(np.uint16)
    tiles: Any = getattr(image, "tile", None)
    stream = getattr(image, "fp", None)
    if not tiles or stream is None or image.format not in {"PNG", "TIFF"}:
        return None
    raw = tiles[0].args if isinstance(tiles[0].args, str) else tiles[0].args[0]
    if raw == "LA;16B":
        # Four bytes a pixel are RGBA to the decoder, whatever they mean.
        both = _decoded(image, "RGBA")
        upper, lower = both[..., ::2], both[..., 1::2]
    elif raw in _LOWER_BYTES:
        # Decoding the image itself lets go of its file.
        lower = _decoded(image, _LOWER_BYTES[raw])
        upper = np.asarray(image)
    else:
        return None
    return (upper * np.uint16(256) + lower).astype(np.uint16)


def _decoded(image: Image.Image, raw: str) -> NDArray[np.uint8]:
    """The file of an image that is not yet decoded, its samples taken for another raw mode."""
    stream = image.fp  # type: ignore[attr-defined]
    place = stream.tell()
    stream.seek(0)
    data = stream.read()
    stream.seek(place)
    with without_warnings():
        view = Image.open(io.BytesIO(data), formats=[image.format or ""])
        view.seek(image.tell())
    with view:
        tiles: Any = view.tile
        view.tile = [
            tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))
            for tile in tiles
        ]
        return np.asarray(view)


def _eight_bits(
    samples: NDArray[np.uint16], key: int | tuple[int, ...] | None
) -> NDArray[np.uint8]:
    """Composited on white and scaled by 255/65535 with rounding; H×W gray or H×W×3.

    Args:
        samples: H×W×C, the last of 2 or 4 channels is the opacity.
        key: the sample, or one a channel, that is transparent.
    """
    channels = samples.shape[2]
    values = samples[..., : channels - (channels % 2 == 0)].astype(np.int64)
    if channels % 2 == 0:
        alpha = samples[..., -1:].astype(np.int64)
        values = (values * alpha + 0xFFFF * (0xFFFF - alpha) + 0x7FFF) // 0xFFFF
    elif isinstance(key, int | tuple):
        values[(values == np.array(key)).all(2)] = 0xFFFF
    found = ((values + 128) // 257).astype(np.uint8)
    return found[..., 0] if found.shape[2] == 1 else found


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert L, RGB or CMYK to sRGB; a profile that is broken or of another space is ignored.

    What the profile calls itself does not count. Colours that it moves by one level at most are
    left alone: that is sRGB, and converting would only add rounding errors.
    """
    try:
        convert = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            image.mode,
            "RGB",
        )
        if image.mode == "RGB":
            levels = np.linspace(0, 255, 18).astype(np.uint8)
            probe = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(18, -1, 3)
            shown = np.asarray(ImageCms.applyTransform(Image.fromarray(probe), convert))
            if np.abs(shown.astype(int) - probe).max() <= 1:
                return image
        converted = ImageCms.applyTransform(image, convert)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    return image if converted is None else converted
