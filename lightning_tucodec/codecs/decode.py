"""Any `.tuc` file to an image."""

from typing import Any

from lightning_tucodec.codecs.h266.codec import decode_container
from lightning_tucodec.codecs.library import load_by_id
from lightning_tucodec.coding.container import CodecKind, unpack


def decompress(data: bytes) -> Any:
    """The image (PIL.Image) of a `.tuc` file, whatever known model wrote it.

    Raises:
        TypeError: no bytes.
        CorruptStreamError, UnsupportedVersionError: damaged, or of a later version.
        UnknownModelError: none of the known models wrote it.
    """
    from PIL import Image

    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError("decompress takes the bytes of a file: Path(name).read_bytes()")
    data = bytes(data)
    container = unpack(data)
    if container.kind == CodecKind.VVC:
        return Image.fromarray(decode_container(container))
    return Image.fromarray(load_by_id(container.model_id).decode_pixels(container))
