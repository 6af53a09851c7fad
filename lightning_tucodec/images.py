"""Reading photographs of any common kind as 8-bit sRGB arrays, and writing PNG."""

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from lightning_tucodec.errors import ImageInputError
from lightning_tucodec.files import atomic_write

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".gif"}
)
"""File names that are looked at in folders and tars; `read_image` itself goes by the content."""

MAX_PIXELS = 1 << 27
"""Images above 134 million pixels are refused before they are decoded."""


def image_files(folder: Path | str) -> list[Path]:
    """Files directly in a folder whose names say that they are images, sorted."""
    return sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)


def read_image(file: Path | str | BinaryIO) -> NDArray[np.uint8]:
    """Read one image as RGB.

    JPEG, PNG, WebP, AVIF, TIFF and what else Pillow knows. The EXIF orientation is applied, an
    embedded ICC profile is converted to sRGB (perceptual intent), gray becomes three equal
    channels, 16 bits are scaled to 8 with rounding, transparency is composited on white, and of an
    animation the first frame counts.

    Args:
        file: a path, or a binary stream positioned at the image's first byte.

    Returns:
        uint8 array H×W×3.

    Raises:
        ImageInputError: not an image, truncated, of more than `MAX_PIXELS`, or with
            floating-point samples. The message names the file.
    """
    name = str(file) if isinstance(file, str | Path) else str(getattr(file, "name", "image"))
    try:
        # Damaged metadata only makes Pillow warn; the pixels are what counts here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageInputError(
                        f"{name}: {image.width}×{image.height} pixels are more than the "
                        f"{MAX_PIXELS} that are supported"
                    )
                return np.array(_to_srgb(image, name))
    except ImageInputError:
        raise
    except FileNotFoundError:
        raise ImageInputError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ImageInputError(f"{name}: is a folder, not an image") from None
    except PermissionError:
        raise ImageInputError(f"{name}: may not be read (permissions)") from None
    except Image.UnidentifiedImageError:
        raise ImageInputError(f"{name}: not an image, or of an unknown format") from None
    except Image.DecompressionBombError:
        raise ImageInputError(f"{name}: more than {MAX_PIXELS} pixels") from None
    # A damaged file can make a decoder raise nearly anything (struct.error, SyntaxError, ...).
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageInputError(f"{name}: damaged or truncated image ({reason})") from error


def write_png(path: Path | str, image: NDArray[np.uint8]) -> None:
    """Write a uint8 array H×W×3 (or H×W gray) as PNG, whole or not at all."""
    buffer = io.BytesIO()
    # On photographs level 4 gives files as small as the default 6 in a third of the time.
    Image.fromarray(image).save(buffer, format="PNG", compress_level=4)
    with atomic_write(path) as stream:
        stream.write(buffer.getvalue())


def _to_srgb(image: Image.Image, name: str) -> Image.Image:
    """The first frame, upright, 8 bits, opaque, in sRGB."""
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ImageInputError(
            f"{name}: floating-point samples have no stated range; use 8 or 16 bits"
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _sixteen_to_eight(image, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image).convert("RGB")
    elif image.mode in {"P", "1", "LA", "PA", "RGBX", "RGBa"}:
        image = image.convert("RGB")
    if profile:
        image = _apply_profile(image, profile)
    return image if image.mode == "RGB" else image.convert("RGB")


def _sixteen_to_eight(image: Image.Image, name: str) -> Image.Image:
    """Gray of 16 bits (or of 32 that hold 16) scaled by 255/65535 with rounding."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ImageInputError(f"{name}: samples beyond 16 bits; use 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert to sRGB; a profile that is broken or of another colour space is ignored."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        description = ImageCms.getProfileDescription(source)
        # Converting sRGB to sRGB would only add rounding errors.
        if "srgb" in description.lower():
            return image
        converted = ImageCms.profileToProfile(
            image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return image if converted is None else converted
