"""The `.tuc` file: its bytes, and how they are checked.

    bytes   field
    3       magic, "TUC"
    1       format version, 1
    1       codec kind in the low four bits (0 learned, 1 H.266 + post-filter, 2 a network of CompressAI's
            form), flags of the codec in the high four
    8       model id: the first 8 bytes of the SHA-256 of the model's weights and tables
    1–3     width   } varints: seven bits a byte, low ones first, the high bit set on all
    1–3     height  } bytes but the last
    1–…     number of strips, at most the height
    1–5     length of each strip in bytes
    4       CRC-32 of everything before it, little-endian
    then, strip by strip:
    …       the strip
    4       CRC-32 of the strip, little-endian

A strip is a run of latent rows with its own entropy-coder state; to this layer, bytes that the
codec understands. A small image is one strip, and costs 25 to 32 bytes beside it. (Sides up to
127 pixels take one byte each, up to 16383 two.) The CRC of strip i starts from the header's CRC
plus i instead of from zero, so strips that are exchanged, or come from another file, do not pass.
Any single changed byte is detected, and damage to a strip affects only that strip.

Everything is checked before anything is allocated beyond the size of the file itself: magic,
version, the header's CRC, the size of the image, then the lengths.
"""

import zlib
from dataclasses import dataclass
from enum import IntEnum
from numbers import Real

from lightning_tucodec.errors import (
    ConfigError,
    CorruptStreamError,
    ImageInputError,
    UnsupportedVersionError,
)

MAGIC = b"TUC"
VERSION = 1
MODEL_ID_BYTES = 8

QUALITY = 2
"""Flag of a file of a variable-rate model. Its strips begin with their quality, a level of the model, in
1/QUALITY_STEPS: QUALITY_BYTES, little-endian."""

QUALITY_STEPS = 256
QUALITY_BYTES = 2

MAX_SIDE = 65_535
"""Longest side of an image, in pixels."""

MAX_PIXELS = 1 << 28
"""Largest area: 16384 × 16384 pixels, 0.8 GB as 8-bit RGB."""

_CRC_BYTES = 4
_VARINT_BYTES_MAX = 5


class CodecKind(IntEnum):
    """Which codec wrote the strips."""

    LEARNED = 0
    VVC = 1
    NETWORK = 2


@dataclass(frozen=True)
class Container:
    """The content of one `.tuc` file.

    Attributes:
        kind: the codec of the strips.
        model_id: 8 bytes; zeros where no model is used.
        width: of the image, in pixels.
        height: of the image, in pixels.
        strips: the coded strips from top to bottom; None for one that `unpack(salvage=True)`
            found damaged.
        flags: four bits with a meaning to the codec.
    """

    kind: CodecKind
    model_id: bytes
    width: int
    height: int
    strips: tuple[bytes | None, ...]
    flags: int = 0


def quality_of(container: Container) -> float | None:
    """The quality of the first strip that holds one; None of a model of one rate."""
    if not container.flags & QUALITY or container.kind == CodecKind.VVC:
        return None
    for strip in container.strips:
        if strip is not None and len(strip) >= QUALITY_BYTES:
            return int.from_bytes(strip[:QUALITY_BYTES], "little") / QUALITY_STEPS
    return None


def quality_step(quality: float, levels: int) -> int:
    """A quality as files hold it, in 1/QUALITY_STEPS.

    Raises:
        ConfigError: it is no number within 0 … levels − 1.
    """
    if not isinstance(quality, Real) or not 0 <= quality <= levels - 1:
        shown = f"{quality:g}" if isinstance(quality, Real) else repr(quality)
        raise ConfigError(f"quality {shown} is not within 0 … {levels - 1}")
    return round(quality * QUALITY_STEPS)


def quality_bytes(quality: float) -> bytes:
    """What the strips of a file of this quality begin with."""
    return round(quality * QUALITY_STEPS).to_bytes(QUALITY_BYTES, "little")


def check_size(width: int, height: int) -> None:
    """Refuse an image that a `.tuc` cannot hold, before any work is spent on it.

    Raises:
        ImageInputError: a side or the area is outside the format's limits.
    """
    if width < 1 or height < 1:
        raise ImageInputError(f"{width}×{height} pixels: the image is empty")
    if width > MAX_SIDE or height > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageInputError(
            f"{width}×{height} pixels do not fit in a .tuc: at most {MAX_SIDE} a side "
            f"and {MAX_PIXELS} together"
        )


def pack(container: Container) -> bytes:
    """The file's bytes.

    Raises:
        ImageInputError: the image is outside the format's limits.
        ValueError: another field cannot be written: a missing strip, more strips than rows, flags
            beyond four bits, a model id that is not 8 bytes.
    """
    check_size(container.width, container.height)
    strips = [strip for strip in container.strips if strip is not None]
    if len(strips) != len(container.strips) or not 1 <= len(strips) <= container.height:
        raise ValueError(f"{len(strips)} whole strips of {len(container.strips)}")
    if len(container.model_id) != MODEL_ID_BYTES or not 0 <= container.flags < 16:
        raise ValueError(f"model id {container.model_id!r}, flags {container.flags}")
    header = bytearray(MAGIC)
    header += bytes([VERSION, container.kind | container.flags << 4])
    header += container.model_id
    for value in (container.width, container.height, len(strips), *map(len, strips)):
        header += varint(value)
    header_crc = zlib.crc32(header)
    parts = [bytes(header), header_crc.to_bytes(_CRC_BYTES, "little")]
    for i, strip in enumerate(strips):
        parts += [strip, _strip_crc(strip, header_crc, i).to_bytes(_CRC_BYTES, "little")]
    return b"".join(parts)


def unpack(data: bytes, *, salvage: bool = False) -> Container:
    """Read and check a whole file.

    Args:
        data: the file.
        salvage: hand out damaged or missing strips as None instead of refusing the file; the
            header must be sound all the same.

    Raises:
        UnsupportedVersionError: a newer program wrote the file.
        CorruptStreamError: it is no `.tuc`, or any byte of it is missing, too much or changed, or
            it claims an impossible image.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise CorruptStreamError("this is not a .tuc file (it does not begin with TUC)")
    if len(data) > len(MAGIC) and data[len(MAGIC)] != VERSION:
        raise UnsupportedVersionError(
            f"format version {data[len(MAGIC)]} is unknown (this program reads {VERSION}): "
            "update lightning-tucodec, or the file is damaged"
        )
    position = len(MAGIC) + 2 + MODEL_ID_BYTES
    width, position = read_varint(data, position)
    height, position = read_varint(data, position)
    count, position = read_varint(data, position)
    if count > len(data):
        raise CorruptStreamError(f"the header claims {count} strips in {len(data)} bytes")
    lengths = []
    for _ in range(count):
        length, position = read_varint(data, position)
        lengths.append(length)
    header_crc = zlib.crc32(memoryview(data)[:position])
    if data[position : position + _CRC_BYTES] != header_crc.to_bytes(_CRC_BYTES, "little"):
        raise CorruptStreamError("the header is damaged (its checksum does not match)")
    position += _CRC_BYTES

    # From here on the header is as its writer made it; the writer may still be hostile.
    kind, flags = data[len(MAGIC) + 1] & 15, data[len(MAGIC) + 1] >> 4
    if kind not in set(CodecKind):
        raise UnsupportedVersionError(f"codec kind {kind} is unknown: update lightning-tucodec")
    try:
        check_size(width, height)
    except ImageInputError as error:
        raise CorruptStreamError(f"the header claims an impossible image: {error}") from None
    if not 1 <= count <= height:
        raise CorruptStreamError(f"the header claims {count} strips for {height} rows")
    expected = position + sum(lengths) + _CRC_BYTES * count
    if expected != len(data) and not salvage:
        problem = "is truncated" if len(data) < expected else "goes on after its end"
        raise CorruptStreamError(f"the file {problem}: {len(data)} bytes instead of {expected}")

    strips: list[bytes | None] = []
    for i, length in enumerate(lengths):
        strip = data[position : position + length]
        position += length
        crc = data[position : position + _CRC_BYTES]
        position += _CRC_BYTES
        sound = crc == _strip_crc(strip, header_crc, i).to_bytes(_CRC_BYTES, "little")
        if not sound and not salvage:
            raise CorruptStreamError(
                f"strip {i + 1} of {count} is damaged (its checksum does not match)"
            )
        strips.append(strip if sound else None)
    model_id = data[len(MAGIC) + 2 : len(MAGIC) + 2 + MODEL_ID_BYTES]
    return Container(CodecKind(kind), model_id, width, height, tuple(strips), flags)


def _strip_crc(strip: bytes, header_crc: int, i: int) -> int:
    """CRC-32 of a strip, bound to its file and place."""
    return zlib.crc32(strip, (header_crc + i) & 0xFFFFFFFF)


def varint(value: int) -> bytes:
    """`value` ≥ 0, seven bits a byte, low ones first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The varint at `position` and the position after it; only the shortest form is accepted."""
    value = 0
    for i in range(_VARINT_BYTES_MAX):
        if position + i >= len(data):
            raise CorruptStreamError("the file is truncated within its header")
        byte = data[position + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            if byte == 0 and i > 0:
                break
            return value, position + i + 1
    raise CorruptStreamError("the header is damaged (a number in it is malformed)")
