"""The protocol of all image codecs of this package."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

ZOO = "compressai"
"""Name under which the networks of CompressAI's zoo are found."""

MODEL_SUFFIX = ".safetensors"
"""Ending of the file of a learned model."""

H266_MODELS = ("vvc", "vvc+postfilter")
"""What `--model` also takes: H.266 without and with the learned post-filter."""

DEFAULT_MODEL = "tiny-mse-2"
"""What codes an image when nothing is said."""


@runtime_checkable
class ImageCodec(Protocol):
    """One codec at one setting: an 8-bit RGB image to real bytes and back.

    `encode` and `decode` are pure functions of their arguments and the setting; a codec may be
    used from several threads and processes at once.
    """

    @property
    def name(self) -> str:
        """The specification that builds this codec again, such as `jpeg:q=30`."""
        ...

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """Code an H×W×3 image.

        Returns:
            Everything the decoder needs; its length is the measured rate.

        Raises:
            ImageInputError: the size is outside what the codec supports.
            ExternalToolError: a program this codec calls is missing, failed or timed out.
        """
        ...

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """The H×W×3 image of what `encode` returned.

        Raises:
            CorruptStreamError: the bytes are not what `encode` returned.
            ExternalToolError: a program this codec calls is missing or timed out.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """The information that is needed to repeat the measurements.

        Returns:
            `codec` and `version` (of the encoder), `options` or `command` in full, and `colour`,
            the conversion from RGB to the coded planes and back.
        """
        ...
