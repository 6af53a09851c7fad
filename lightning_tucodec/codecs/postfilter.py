"""Decoded planes to RGB through a PostFilter."""

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_tucodec.codecs.colour import Planes, planes_to_float, to_eight_bits
from lightning_tucodec.nn.postfilter import DecodedPicture, PostFilter

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
