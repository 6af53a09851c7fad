"""The Tucodec image codecs of CLIC 2019, rebuilt and trainable.

>>> import lightning_tucodec as tuc
>>> model = tuc.load("tiny-mse-2")                          # doctest: +SKIP
>>> data = model.compress(image)                          # doctest: +SKIP
>>> image = tuc.decompress(data)                          # doctest: +SKIP
"""

from typing import Any

from lightning_tucodec.errors import (
    CorruptStreamError,
    ImageInputError,
    ModelFileError,
    TucodecError,
    UnknownModelError,
    UnsupportedVersionError,
)

_LAZY = ("decompress", "load", "models", "untrained")

__all__ = [
    "CorruptStreamError",
    "ImageInputError",
    "ModelFileError",
    "TucodecError",
    "UnknownModelError",
    "UnsupportedVersionError",
    "decompress",
    "load",
    "models",
    "untrained",
]


def __getattr__(name: str) -> Any:
    """Import the coding functions, and with them torch, when one is first used."""
    if name in _LAZY:
        from lightning_tucodec.codecs import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
