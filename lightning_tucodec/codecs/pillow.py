"""`.tuc` files in Pillow: `import lightning_tucodec.codecs.pillow`, then `Image.open` and `Image.save`.

>>> Image.open("photo.tuc").show()                        # doctest: +SKIP
>>> image.save("photo.tuc", model="tiny-ssim-3", effort=2)  # doctest: +SKIP
"""

import io
from typing import IO, Any, cast

from PIL import Image, ImageFile

from lightning_tucodec.coding.container import MAGIC, unpack


class TucImageFile(ImageFile.ImageFile):
    """A `.tuc` file. Opening checks it and reads its size; pixels are decoded when first needed.

    Raises:
        CorruptStreamError, UnsupportedVersionError: damaged, or of a later version.
        UnknownModelError: none of the known models wrote it (when pixels are needed).
    """

    format = "TUC"
    format_description = "lightning_tucodec"
    _data: bytes | None = None

    def _open(self) -> None:
        assert self.fp is not None
        self._data = self.fp.read()
        container = unpack(self._data)
        self._size = container.width, container.height
        self._mode = "RGB"

    def load(self) -> Any:
        """Decode, once."""
        if self._data is not None:
            from lightning_tucodec.codecs.decode import decompress

            pixels = decompress(self._data).tobytes()
            self._data = None
            if self.fp is not None and self._exclusive_fp:
                self.fp.close()
            self.fp = io.BytesIO(pixels)
            self.tile = [ImageFile._Tile("raw", (0, 0, *self.size), 0, self.mode)]
        return super().load()


def _save(image: Image.Image, stream: IO[bytes], filename: str | bytes) -> None:
    """Options of `Image.save`: `model`, a name or a file (`tiny-mse-2`); `effort`, 0 … 9 (0)."""
    from lightning_tucodec.codecs.library import load

    options = cast("dict[str, Any]", getattr(image, "encoderinfo", {}))
    model = load(options.get("model", "tiny-mse-2"))
    stream.write(model.compress(image, options.get("effort", 0)))


Image.register_open(TucImageFile.format, TucImageFile, lambda prefix: prefix.startswith(MAGIC))
Image.register_save(TucImageFile.format, _save)
Image.register_extension(TucImageFile.format, ".tuc")
