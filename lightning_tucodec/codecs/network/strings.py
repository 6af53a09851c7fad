"""Coding with a network's own `compress` and `decompress`, made safe."""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tucodec.coding.rans64 import Rans64Decoder, all_read
from lightning_tucodec.errors import CorruptStreamError, ModelFileError

SEGMENTS_MAX = 255
"""A file holds so many segments at most."""

_LARGEST = 1 << 26
"""A symbol may be so far from zero; CompressAI's escape holds less than 32 bits."""


class OwnStrings:
    """A network's own coder.

    Its entropy decoder is replaced by `Rans64Decoder`, which never reads beyond a string. The `shape` that
    `decompress` asks for is found from what `compress` answers for two small images, so that files need not
    hold it.

    Args:
        network: in eval mode, with tables.
        stride: see `build.stride_of`.
    """

    def __init__(self, network: nn.Module, stride: int) -> None:
        self.network, self.stride = network, stride
        guard(network)
        self._form: tuple[Any, int] | None = None

    def encode(self, x: Tensor, **options: Any) -> list[bytes]:
        """The segments of an image 1×3×H×W in [0, 1], both sides multiples of the stride.

        Args:
            x: the image.
            options: more arguments of `compress`.

        Raises:
            ModelFileError: the network does not answer in CompressAI's form.
        """
        segments, shape = self._compress(x, options)
        form, count = self._shape(options)
        name = type(self.network).__name__
        rows, columns = (side // self.stride for side in x.shape[2:])
        # No file is written that its decoder could not read.
        if len(segments) != count or not 1 <= count <= SEGMENTS_MAX:
            raise ModelFileError(
                f"{name}.compress makes {len(segments)} strings; it must be a number from 1 to "
                f"{SEGMENTS_MAX}, the same for all images"
            )
        if _merged(shape, shape, name) != _scaled(form, rows, columns):
            raise ModelFileError(f"{name}: the shapes that it codes do not grow with the image")
        return segments

    def decode(self, segments: Sequence[bytes], height: int, width: int, **options: Any) -> Tensor:
        """The image 1×3×H×W of its segments.

        Args:
            segments: from `encode`.
            height, width: of the image, multiples of the stride.
            options: more arguments of `decompress`.

        Raises:
            CorruptStreamError: the segments are damaged, or were written by a network that computes
                otherwise.
        """
        form, count = self._shape(options)
        if len(segments) != count:
            raise CorruptStreamError(
                f"the file has {len(segments)} segments, its model writes {count}"
            )
        shape = _scaled(form, height // self.stride, width // self.stride)
        with all_read():
            answer = self.network.decompress([[s] for s in segments], shape, **options)  # type: ignore[operator]
        x_hat: Tensor = answer["x_hat"]
        if tuple(x_hat.shape) != (1, 3, height, width):
            raise CorruptStreamError(f"the network makes {tuple(x_hat.shape)} of the file")
        return x_hat

    def _compress(self, x: Tensor, options: dict[str, Any]) -> tuple[list[bytes], Any]:
        answer = self.network.compress(x, **options)  # type: ignore[operator]
        try:
            segments = [strings[0] for strings in answer["strings"]]
            shape = answer["shape"]
            if not all(isinstance(segment, bytes) for segment in segments):
                raise TypeError("strings that are no bytes")
        except (LookupError, TypeError) as error:
            raise ModelFileError(
                f"{type(self.network).__name__}.compress does not return strings and shape as CompressAI's "
                f"networks do ({error})"
            ) from None
        return segments, shape

    def _shape(self, options: dict[str, Any]) -> tuple[Any, int]:
        """The shape of an image of s×s pixels, its sides marked, and the number of segments."""
        if self._form is None:
            some = next(self.network.parameters(), torch.zeros(()))
            found = []
            for rows, columns in ((1, 1), (2, 3)):
                size = (1, 3, rows * self.stride, columns * self.stride)
                found.append(self._compress(some.new_zeros(size), options))
            (one, shape), (_, other) = found
            self._form = _merged(shape, other, type(self.network).__name__), len(one)
        return self._form


class _Side:
    """A number that grows with the rows or the columns of an image."""

    def __init__(self, unit: int, columns: bool) -> None:
        self.unit, self.columns = unit, columns


def _merged(one: Any, other: Any, name: str) -> Any:
    """The shape of an image of 1×1 strides, with `_Side` where that of 2×3 strides differs."""
    if isinstance(one, dict):
        return {key: _merged(value, other[key], name) for key, value in one.items()}
    if isinstance(one, list | tuple):
        return (
            type(one)([_merged(*pair, name) for pair in zip(one, other, strict=True)])
            if not isinstance(one, torch.Size)
            else tuple(_merged(*pair, name) for pair in zip(one, other, strict=True))
        )
    if one == other:
        return one
    for factor in (2, 3):
        if other == factor * one:
            return _Side(one, factor == 3)
    raise ModelFileError(f"{name}: the shapes that it codes do not grow with the image")


def _scaled(form: Any, rows: int, columns: int) -> Any:
    if isinstance(form, dict):
        return {key: _scaled(value, rows, columns) for key, value in form.items()}
    if isinstance(form, list | tuple):
        return type(form)([_scaled(value, rows, columns) for value in form])
    if isinstance(form, _Side):
        return form.unit * (columns if form.columns else rows)
    return form


class _CheckedEncoder:
    """CompressAI's entropy encoder, which would never end on a symbol of 2^28 or more, such as a NaN's."""

    theirs: Any

    def __init__(self) -> None:
        self._own = self.theirs()

    def encode_with_indexes(self, symbols: list[int], *rest: Any) -> Any:
        """See CompressAI's encoder.

        Raises:
            ModelFileError: a symbol is too large.
        """
        if symbols and max(max(symbols), -min(symbols)) > _LARGEST:
            raise ModelFileError(
                "the network makes values of this image that are no numbers, or too large"
            )
        return self._own.encode_with_indexes(symbols, *rest)

    def flush(self) -> bytes:
        """See CompressAI's encoder."""
        data: bytes = self._own.flush()
        return data


@functools.cache
def _replacements() -> dict[Any, Any]:
    """What takes the place of CompressAI's coders."""
    theirs = sys.modules["compressai.ans"]
    encoders = (theirs.RansEncoder, theirs.BufferedRansEncoder)
    checked = {kind: type(kind.__name__, (_CheckedEncoder,), {"theirs": kind}) for kind in encoders}
    return {**checked, theirs.RansDecoder: Rans64Decoder}


def guard(network: nn.Module) -> None:
    """Replace CompressAI's entropy coders wherever the classes of a network find them.

    The names are replaced in the modules of those classes: what these code, they code as before, but for
    what would end the process or never end.
    """
    if "compressai.ans" not in sys.modules:
        return
    for module in network.modules():
        coder = getattr(module, "entropy_coder", None)
        for part in ("_encoder", "_decoder"):
            if (own := _replacements().get(type(getattr(coder, part, None)))) is not None:
                setattr(coder, part, own())
        for kind in type(module).__mro__:
            names = vars(sys.modules.get(kind.__module__, sys))
            for name in ("RansEncoder", "BufferedRansEncoder", "RansDecoder"):
                if (own := _replacements().get(names.get(name))) is not None:
                    names[name] = own
