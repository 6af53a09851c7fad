"""`.tuc` files in Pillow: `import lightning_tucodec.codecs.pillow`, then `Image.open` and `Image.save`.

>>> Image.open("photo.tuc").show()                        # doctest: +SKIP
>>> image.save("photo.tuc", model="tiny-ssim-3", effort=2)  # doctest: +SKIP
>>> image.save("photo.tuc", model="tiny-vbr", quality=3.5)  # doctest: +SKIP

Pillow empties a file before it asks any format to save: a save that is refused leaves it empty.
"""

import io
from typing import IO, Any, cast

from PIL import Image, ImageFile

from lightning_tucodec.codecs.base import DEFAULT_MODEL
from lightning_tucodec.coding.container import MAGIC, unpack
from lightning_tucodec.errors import ConfigError


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
    """Options of `Image.save`: `model`, a name or a file (`tiny-mse-2`), and what it takes.

    That is `effort`, 0 … 9 (0), of this package's own networks, and `quality` of variable-rate networks.
    """
    from lightning_tucodec.codecs.learned.latents import as_pixels
    from lightning_tucodec.codecs.library import NetworkModel, load_coder

    options = cast("dict[str, Any]", getattr(image, "encoderinfo", {}))
    model = load_coder(options.get("model", DEFAULT_MODEL))
    effort, quality = options.get("effort", 0), options.get("quality")
    if quality is not None:
        model = model.at(quality)
    if isinstance(model, NetworkModel):
        if effort:
            raise ConfigError(f"effort is for this package's own networks; {model.name} is none")
        stream.write(model.encode(as_pixels(image)))
    else:
        stream.write(model.compress(image, effort))


Image.register_open(TucImageFile.format, TucImageFile, lambda prefix: prefix.startswith(MAGIC))
Image.register_save(TucImageFile.format, _save)
Image.register_extension(TucImageFile.format, ".tuc")
