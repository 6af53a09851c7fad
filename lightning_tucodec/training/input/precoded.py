"""Pre-coded patches: what `tucodec shards precode` writes and the post-filter trains on."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_tucodec.codecs.colour import TRANSFORMS, Planes
from lightning_tucodec.codecs.h266.postfilter import decoded_picture
from lightning_tucodec.errors import ConfigError, DatasetError
from lightning_tucodec.training.input.batches import Batch, RankBatches, for_transfer
from lightning_tucodec.training.input.plan import DataPlan
from lightning_tucodec.training.input.shards import ShardReader

FORMAT = "precoded"
"""Format in the index and extension of the samples in the tars."""


@dataclass(frozen=True)
class Precoded:
    """A patch of a photograph beside the same patch of the coded picture.

    Attributes:
        original: uint8 P×P×3.
        planes: as decoded, 4:2:0; P is even.
        qp: that it was coded at.
        transform: of the planes, one of `colour.TRANSFORMS`.
    """

    original: NDArray[np.uint8]
    planes: Planes
    qp: int
    transform: str

    def cut(self, x: int, y: int, side: int) -> "Precoded":
        """A square of this patch, or of a whole picture; x, y and side are even."""
        half = slice(y // 2, (y + side) // 2), slice(x // 2, (x + side) // 2)
        y_, cb, cr = self.planes
        planes = Planes(y_[y : y + side, x : x + side], cb[half], cr[half])
        original = self.original[y : y + side, x : x + side]
        return Precoded(original, planes, self.qp, self.transform)

    def flipped(self) -> "Precoded":
        """Mirrored left to right."""
        planes = Planes(*(plane[:, ::-1] for plane in self.planes))
        return Precoded(self.original[:, ::-1], planes, self.qp, self.transform)

    def to_bytes(self) -> bytes:
        """The original row by row, the planes as in `Planes.to_bytes`, QP, number of the transform."""
        original = np.ascontiguousarray(self.original).tobytes()
        tail = bytes([self.qp, TRANSFORMS.index(self.transform)])
        return original + self.planes.to_bytes() + tail

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, side: int) -> "Precoded":
        """The inverse of `to_bytes`.

        Raises:
            DatasetError: the length does not fit the side.
        """
        pixels = 3 * side * side
        if len(data) != 2 * pixels + 2 or data[-1] >= len(TRANSFORMS):
            raise DatasetError(f"{len(data)} bytes are not a pre-coded patch of {side} pixels")
        original = np.frombuffer(data[:pixels], np.uint8).reshape(side, side, 3)
        planes = Planes.from_bytes(bytes(data[pixels:-2]), side, side, "420")
        return cls(original, planes, data[-2], TRANSFORMS[data[-1]])


class PrecodedBatches(RankBatches):
    """As `RankBatches`, with the decoded picture of the same crop; crops lie at even places.

    A batch has image (uint8 N×C×C×3, the original), index, and the fields of `nn.postfilter.DecodedPicture`.
    Workers convert the planes, so that the main process only copies.
    """

    def __init__(
        self, reader: ShardReader, plan: DataPlan, batch_size: int, crop: int, flip: bool,
        rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        if crop % 2:
            raise ConfigError(f"crop {crop}: must be even, since chroma is halved")
        _check_format(reader)
        super().__init__(reader, plan, batch_size, crop, flip, rank, world_size)
        self._sample = np.dtype([
            ("image", np.uint8, (crop, crop, 3)),
            ("luma", np.float32, (1, crop, crop)),
            ("chroma", np.float32, (2, crop // 2, crop // 2)),
            ("plain", np.float32, (3, crop, crop)),
            ("qp", np.float32),
        ])  # fmt: skip
        self.shape = (self.shape[0], self._sample.itemsize)

    def read(self, start: int, out: NDArray[np.uint8]) -> None:
        """Crop, flip and convert the share's samples into `out`."""
        side = self.reader.index.patch
        samples = out.view(self._sample)[:, 0]
        for number, (sample, x, y, flip) in enumerate(self.places(start)):
            whole = Precoded.from_bytes(self.reader.encoded(sample), side)
            part = whole.cut(x & ~1, y & ~1, self.crop)
            part = part.flipped() if flip else part
            picture = decoded_picture(part.planes, float(part.qp), part.transform)
            samples["image"][number] = part.original
            for name, values in picture._asdict().items():
                samples[name][number] = values[0].numpy()

    def tensors(self, pixels: NDArray[np.uint8]) -> Batch:
        """The fields named above but index."""
        samples = pixels.view(self._sample)[:, 0]
        return {name: for_transfer(samples[name]) for name in self._sample.fields or ()}


class PrecodedSamples(Dataset[Batch]):
    """Whole patches, eight an item, in the order of the shards, as `PrecodedBatches` has them."""

    BATCH = 8

    def __init__(self, location: str) -> None:
        self.reader = ShardReader(location)
        _check_format(self.reader)

    def __len__(self) -> int:
        return -(-len(self.reader) // self.BATCH)

    def __getitem__(self, item: int) -> Batch:
        """A batch; index holds the numbers of the samples."""
        if not 0 <= item < len(self):
            raise IndexError(item)
        first = item * self.BATCH
        numbers = range(first, min(first + self.BATCH, len(self.reader)))
        return {**_batch([self.read(n) for n in numbers]), "index": torch.tensor(numbers)}

    def read(self, number: int) -> Precoded:
        """One patch.

        Raises:
            DatasetError: it is none; the message names it.
        """
        try:
            return Precoded.from_bytes(self.reader.encoded(number), self.reader.index.patch)
        except DatasetError as error:
            raise DatasetError(f"{self.reader.location}: sample {number}: {error}") from None


def _check_format(reader: ShardReader) -> None:
    if reader.index.format != FORMAT:
        raise ConfigError(f"{reader.location}: not made by `tucodec shards precode`")


def check_samples(location: str) -> int:
    """Read all shards of pre-coded patches for validation; returns the number of patches.

    A run does so before its first step, as with validation images.

    Raises:
        TucodecError: they are missing, damaged or not pre-coded.
    """
    samples = PrecodedSamples(location)
    samples.reader.check_hashes()
    for number in range(len(samples.reader)):
        samples.read(number)
    return len(samples.reader)


def _batch(samples: list[Precoded]) -> Batch:
    """Tensors of samples of one size."""
    pictures = [decoded_picture(s.planes, float(s.qp), s.transform) for s in samples]
    image = torch.from_numpy(np.stack([s.original for s in samples]))
    fields = {
        name: torch.cat([getattr(picture, name) for picture in pictures])
        for name in pictures[0]._fields
    }
    return {"image": image, **fields}
