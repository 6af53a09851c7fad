"""Decoded planes to RGB through a PostFilter."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_tucodec.codecs.cards import UNFIT
from lightning_tucodec.codecs.colour import Planes, planes_to_float, to_eight_bits
from lightning_tucodec.codecs.learned.latents import own_modes
from lightning_tucodec.codecs.learned.model_file import (
    ModelFile,
    check_depths,
    check_tensors,
    shapes_only,
)
from lightning_tucodec.errors import ModelFileError, one_line
from lightning_tucodec.io.once import once_property
from lightning_tucodec.nn.postfilter import (
    WEIGHT_STEPS,
    DecodedPicture,
    Normal,
    PostFilter,
    PostFilterConfig,
    corrected,
)

_PEAK = 1023.0

PIXELS = 1 << 21
"""About so many are filtered at a time, besides what the network reaches beyond them: it bounds memory."""

KEPT_PIXELS = 1 << 22
"""Up to so many an encoder keeps the corrections of a picture, 36 bytes a pixel with three of them."""


def decoded_picture(planes: Planes, qp: float, transform: str) -> DecodedPicture:
    """One decoded 4:2:0 picture as a batch of one, float32."""
    luma = torch.from_numpy(planes.y.astype(np.float32))[None, None]
    chroma = torch.from_numpy(np.stack(planes[1:]).astype(np.float32))[None]
    plain = torch.from_numpy(planes_to_float(planes, transform))[None]
    return DecodedPicture(luma / _PEAK, chroma / _PEAK - 0.5, plain / 255.0, torch.tensor([qp]))


def _bands(network: PostFilter, picture: DecodedPicture) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of a picture and their corrections, 1×M×3×rows×W.

    Rows are filtered in bands that see as far beyond their ends as the network does, so that there
    are no seams and memory does not grow with the height.
    """
    (height, width), reach = picture.luma.shape[2:], network.reach
    step = max(2 * reach, PIXELS // width // 2 * 2)
    for top in range(0, height, step):
        first, end = max(0, top - reach), min(height, top + step + reach)
        band = DecodedPicture(
            picture.luma[:, :, first:end],
            picture.chroma[:, :, first // 2 : end // 2],
            picture.plain[:, :, first:end],
            picture.qp,
        )
        rows = slice(top, min(height, top + step))
        yield rows, network.ensemble(band)[:, :, :, top - first : rows.stop - first]


@own_modes()
@torch.inference_mode()
def fit(
    network: PostFilter, planes: Planes, qp: float, transform: str, image: NDArray[np.uint8]
) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
    """The weights that bring decoded planes closest to an image (as padded for them), M×3, and the filtered
    H×W×3 image that `apply` gives with them.

    The network runs once; a second time where its corrections would take too much memory in between.
    """
    picture = decoded_picture(planes, qp, transform)
    bands = _bands(network, picture)
    kept = list(bands) if image.shape[0] * image.shape[1] <= KEPT_PIXELS else None
    original = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 255.0)[None]
    parts = [
        Normal.of(corrections, original[:, :, rows] - picture.plain[:, :, rows])
        for rows, corrections in kept or bands
    ]
    normal = Normal(*(torch.stack(terms).double().sum(0) for terms in zip(*parts, strict=True)))
    weights = (normal.weights()[0] * WEIGHT_STEPS).to(torch.int8).numpy()
    return weights, _filtered(picture, kept or _bands(network, picture), weights)


@own_modes()
@torch.inference_mode()
def apply(
    network: PostFilter, planes: Planes, qp: float, transform: str, weights: NDArray[np.int8]
) -> NDArray[np.uint8]:
    """The filtered H×W×3 image of decoded planes."""
    picture = decoded_picture(planes, qp, transform)
    return _filtered(picture, _bands(network, picture), weights)


def _filtered(
    picture: DecodedPicture,
    bands: Iterable[tuple[slice, torch.Tensor]],
    weights: NDArray[np.int8],
) -> NDArray[np.uint8]:
    factors = torch.from_numpy(weights)[None] / WEIGHT_STEPS
    shown = [
        corrected(picture.plain[:, :, rows], corrections, factors)[0] for rows, corrections in bands
    ]
    return to_eight_bits(torch.cat(shown, 1).mul_(255.0).numpy())


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

    @once_property
    def checked(self) -> PostFilterConfig:
        """The configuration, once every tensor has the shape that it asks for.

        Raises:
            ModelFileError: they do not agree.
        """
        try:
            config = {key: value for key, value in self.file.config.items() if key != "kind"}
            shape = PostFilterConfig(**config)
            check_depths([shape.blocks], self.file.tensors)
            with shapes_only():
                expected = PostFilter(shape).state_dict()
            check_tensors(
                {f"network.{k}": (v.shape, None) for k, v in expected.items()}, self.file.tensors
            )
        except UNFIT as error:
            raise ModelFileError(
                f"model {self.name}: its content is inconsistent ({one_line(error)})"
            ) from None
        return shape

    @once_property
    @own_modes()
    def network(self) -> PostFilter:
        """The network in eval mode.

        Raises:
            ModelFileError: the file's content is inconsistent.
        """
        shape = self.checked
        try:
            with torch.random.fork_rng(devices=[]):  # the first values are drawn, and replaced
                network = PostFilter(shape)
            network.load_state_dict(
                {k.removeprefix("network."): v.float() for k, v in self.file.tensors.items()}
            )
        except UNFIT as error:
            raise ModelFileError(
                f"model {self.name}: its content is inconsistent ({one_line(error)})"
            ) from None
        return network.eval().to(memory_format=torch.channels_last)

    @property
    def weight_bytes(self) -> int:
        """Length of an image's weights in a file."""
        return 3 * self.network.config.corrections

    def fit(
        self, planes: Planes, qp: float, transform: str, image: NDArray[np.uint8]
    ) -> tuple[bytes, NDArray[np.uint8]]:
        """The image's weights as its file carries them, and the filtered image; see `fit`."""
        weights, shown = fit(self.network, planes, qp, transform, image)
        return weights.tobytes(), shown

    def apply(self, planes: Planes, qp: float, transform: str, weights: bytes) -> NDArray[np.uint8]:
        """See `apply`; `weights` are `weight_bytes` long."""
        factors = np.frombuffer(weights, np.int8).reshape(-1, 3).copy()
        return apply(self.network, planes, qp, transform, factors)
