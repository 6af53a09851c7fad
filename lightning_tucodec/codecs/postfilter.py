"""Decoded planes to RGB through a PostFilter."""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_tucodec.codecs.colour import Planes, planes_to_float, to_eight_bits
from lightning_tucodec.codecs.model_file import ModelFile
from lightning_tucodec.errors import ModelFileError
from lightning_tucodec.nn.postfilter import DecodedPicture, PostFilter, PostFilterConfig

_PEAK = 1023.0

ROWS = 512
"""Rows that are filtered at a time, besides what the network reaches beyond them: it bounds memory."""


def decoded_picture(planes: Planes, qp: float, transform: str) -> DecodedPicture:
    """One decoded 4:2:0 picture as a batch of one, float32."""
    luma = torch.from_numpy(planes.y.astype(np.float32))[None, None]
    chroma = torch.from_numpy(np.stack(planes[1:]).astype(np.float32))[None]
    plain = torch.from_numpy(planes_to_float(planes, transform))[None]
    return DecodedPicture(luma / _PEAK, chroma / _PEAK - 0.5, plain / 255.0, torch.tensor([qp]))


@torch.inference_mode()
def apply(network: PostFilter, planes: Planes, qp: float, transform: str) -> NDArray[np.uint8]:
    """The filtered H×W×3 image of decoded planes.

    Rows are filtered in bands that see as far beyond their ends as the network does, so that there
    are no seams and memory does not grow with the height.
    """
    picture = decoded_picture(planes, qp, transform)
    height, reach = planes.y.shape[0], network.reach
    bands = []
    for top in range(0, height, ROWS):
        first, end = max(0, top - reach), min(height, top + ROWS + reach)
        band = DecodedPicture(
            picture.luma[:, :, first:end],
            picture.chroma[:, :, first // 2 : end // 2],
            picture.plain[:, :, first:end],
            picture.qp,
        )
        bands.append(network(band)[0, :, top - first : top - first + ROWS])
    return to_eight_bits(torch.cat(bands, 1).mul_(255.0).numpy())


class FilterModel:
    """An exported post-filter, ready for decoded pictures."""

    KIND = "postfilter"

    def __init__(self, file: ModelFile) -> None:
        self.file = file
        self.id, self.name, self.card = file.id, file.name, file.card

    @classmethod
    def freeze(cls, network: PostFilter, name: str, card: dict[str, Any]) -> "FilterModel":
        """An exported model of a network; convolution weights in half precision."""
        tensors = {
            f"network.{key}": value.detach().to(
                torch.float16 if value.ndim == 4 else torch.float32, copy=True
            )
            for key, value in network.state_dict().items()
        }
        config = {"kind": cls.KIND, **vars(network.config)}
        return cls(ModelFile(name, config, tensors, card))

    @cached_property
    def network(self) -> PostFilter:
        """The network in eval mode.

        Raises:
            ModelFileError: the file's content is inconsistent.
        """
        try:
            config = {key: value for key, value in self.file.config.items() if key != "kind"}
            network = PostFilter(PostFilterConfig(**config))
            network.load_state_dict(
                {k.removeprefix("network."): v.float() for k, v in self.file.tensors.items()}
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelFileError(
                f"model {self.name}: its content is inconsistent ({error})"
            ) from None
        return network.eval().to(memory_format=torch.channels_last)

    def apply(self, planes: Planes, qp: float, transform: str) -> NDArray[np.uint8]:
        """See `apply`."""
        return apply(self.network, planes, qp, transform)
