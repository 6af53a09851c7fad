"""Any `.tuc` file to an image."""

from pathlib import Path
from typing import Any

from lightning_tucodec.codecs.h266.codec import decode_container
from lightning_tucodec.codecs.library import load_by_id
from lightning_tucodec.coding.container import CodecKind, unpack


def decompress(data: bytes) -> Any:
    """The image (PIL.Image) of a `.tuc` file, whatever known model wrote it."""
    from PIL import Image

    if isinstance(data, str | Path):
        raise TypeError("decompress takes the bytes of a file: Path(name).read_bytes()")
    container = unpack(data)
    if container.kind == CodecKind.VVC:
        return Image.fromarray(decode_container(container))
    return Image.fromarray(load_by_id(container.model_id).decode_pixels(container))
