"""The Tucodec image codecs of CLIC 2019, rebuilt and trainable.

>>> import lightning_tucodec as tuc
>>> model = tuc.load("tiny-mse-2")                          # doctest: +SKIP
>>> data = model.compress(image)                          # doctest: +SKIP
>>> image = tuc.decompress(data)                          # doctest: +SKIP
"""

from importlib import import_module
from typing import Any

from lightning_tucodec.errors import (
    CorruptStreamError,
    ImageInputError,
    ModelFileError,
    TucodecError,
    UnknownModelError,
    UnsupportedVersionError,
)

_LAZY = {"decompress": "decode", "load": "library", "models": "cards", "untrained": "library"}
"""Coding functions, each with the module of `codecs` that it stands in."""

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
        return getattr(import_module(f"lightning_tucodec.codecs.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
