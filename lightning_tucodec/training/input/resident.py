"""Training crops in the device's own memory: a pack of patches, read once; a batch costs 40 bytes a sample.

For one process on one device. The pack is a file of some tens of megabytes that goes where shards cannot.
"""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor

from lightning_tucodec.errors import ConfigError, DatasetError
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.training.data import PatchDataModule, crop_within
from lightning_tucodec.training.input.batches import Batch, RankBatches, as_floats, for_transfer
from lightning_tucodec.training.input.loader import PlanLoader
from lightning_tucodec.training.input.plan import DataPlan
from lightning_tucodec.training.input.shards import ShardReader

QUALITY = 95
"""Of the JPEGs in a pack, without subsampled chroma: what they lose lies well below what a codec loses."""


class Packed(NamedTuple):
    """What `pack` wrote.

    Attributes:
        patches: how many.
        bytes: of the file.
        psnr: of all pixels against the shards' patches, dB.
    """

    patches: int
    bytes: int
    psnr: float


def pack(
    shards: Sequence[str], out: Path, limit: int = 45_000_000, seed: int = 0, quality: int = QUALITY
) -> Packed:
    """Write patches of shards, drawn evenly, until a file would exceed a limit.

    Args:
        shards: folders or URLs made by `tucodec shards build`, of patches of one size.
        out: the file.
        limit: bytes.
        seed: of the draw.
        quality: of the JPEGs.

    Raises:
        ConfigError: the patches differ in size, or none fits.
        DatasetError: shards cannot be read.
    """
    readers = [ShardReader(location) for location in shards]
    sides = {reader.index.patch for reader in readers}
    if len(sides) != 1:
        raise ConfigError(f"a pack has patches of one size, these shards have {sorted(sides)}")
    samples = [(reader, number) for reader in readers for number in range(len(reader))]
    order = np.random.default_rng(seed).permutation(len(samples))
    coded: list[bytes] = []
    room, squares = limit - 4096, 0.0  # the file's header
    for place in order.tolist():
        reader, number = samples[place]
        pixels = reader.pixels(number)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=quality, subsampling=0, optimize=True)
        room -= len(stream.getvalue()) + 8
        if room < 0:
            break
        coded.append(stream.getvalue())
        squares += float(np.square(decoded(coded[-1]).astype(np.int32) - pixels).mean())
    if not coded:
        raise ConfigError(f"no patch fits into {limit} bytes")
    sizes = np.array([len(data) for data in coded], np.int64)
    data = np.frombuffer(b"".join(coded), np.uint8)
    content = save({"data": data, "sizes": sizes, "side": np.array(sides.pop())})
    with atomic_write(out) as target:
        target.write(content)
    psnr = 10 * np.log10(255**2 / max(squares / len(coded), 1e-9))
    return Packed(len(coded), len(content), float(psnr))


def decoded(data: bytes) -> NDArray[np.uint8]:
    """The pixels of a JPEG, H×W×3."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def unpack(path: Path) -> NDArray[np.uint8]:
    """All patches of a pack, uint8 N×P×P×3.

    Raises:
        DatasetError: it is no pack, or damaged.
    """
    try:
        content = load_file(path)
        ends = np.cumsum(content["sizes"])
        starts = ends - content["sizes"]
        data, side = content["data"].tobytes(), int(content["side"])
        patches = np.empty((len(ends), side, side, 3), np.uint8)

        def read(number: int) -> None:
            patches[number] = decoded(data[starts[number] : ends[number]])

        with ThreadPoolExecutor() as pool:
            list(pool.map(read, range(len(ends))))
    except (OSError, SafetensorError, LookupError, ValueError, SyntaxError) as error:
        raise DatasetError(f"{path}: no pack of patches, or damaged ({error})") from None
    return patches


class _Index(NamedTuple):
    patch: int


class _Memory:
    """The reader that `RankBatches` needs, over patches in the host's memory."""

    cache = None

    def __init__(self, patches: NDArray[np.uint8]) -> None:
        self.patches = patches
        self.index = _Index(patches.shape[1])

    def __len__(self) -> int:
        return len(self.patches)

    def pixels(self, sample: int) -> NDArray[np.uint8]:
        """P×P×3."""
        return self.patches[sample]


class PlaceBatches(RankBatches):
    """As `RankBatches`, with where the crops lie instead of their pixels.

    A batch has place, int64 N×4 (patch, left, top, whether to flip), and index.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.shape = (len(self._share), 32)

    def read(self, start: int, out: NDArray[np.uint8]) -> None:
        """The places, as bytes."""
        out.view(np.int64)[:] = self.places(start)

    def tensors(self, pixels: NDArray[np.uint8]) -> Batch:
        """The places."""
        return {"place": for_transfer(pixels.view(np.int64))}


def crops(patches: Tensor, place: Tensor, side: int) -> Tensor:
    """Cut out and flip on the device.

    Args:
        patches: uint8 M×P×P×3.
        place: int64 N×4, see `PlaceBatches`; on the same device.
        side: of the crops.

    Returns:
        uint8 N×side×side×3.
    """
    sample, left, top, flip = (column[:, None] for column in place.unbind(1))
    steps = torch.arange(side, device=place.device)
    rows = top + steps
    columns = left + torch.where(flip > 0, side - 1 - steps, steps)
    return patches[sample[:, :, None], rows[:, :, None], columns[:, None, :]]


class ResidentDataModule(PatchDataModule):
    """Training crops out of a pack that lies in the device's memory; on one process.

    Order, crops and flips are those of `PatchDataModule` over the same patches: a function of the seed and
    of the global position, so that a run goes on exactly.

    Args:
        source: file that `pack` wrote.
        batch_size: crops a step.
        crop: side of the random crop; None takes whole patches.
        seed: decides order and augmentation.
        val_images: folder of whole images for validation.
        flip: mirror half of the patches left to right.
    """

    def __init__(
        self,
        source: str,
        batch_size: int,
        crop: int | None = None,
        seed: int = 0,
        val_images: str | None = None,
        flip: bool = True,
    ) -> None:
        super().__init__(source, batch_size, crop, seed=seed, val_images=val_images, flip=flip)
        self._patches: Tensor | None = None

    def train_dataloader(self) -> PlanLoader:
        """Batches of place int64 N×4 and index int64 N.

        Raises:
            DatasetError: no pack.
            ConfigError: the crop does not fit, or there are several processes.
        """
        if self._loader is not None and self.trainer is not None:
            return self._loader
        if self._place()[1] > 1:
            raise ConfigError("a pack is for one process; use shards for several")
        memory = _Memory(unpack(Path(self.shards)))
        crop = crop_within(self.crop, memory.index.patch)
        plan = DataPlan(len(memory), self.seed)
        self._patches = torch.from_numpy(memory.patches)
        self._loader = PlanLoader(PlaceBatches(memory, plan, self.batch_size, crop, self.flip))
        return self._loader

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """What modules get: image float32 N×3×crop×crop in [0, 1], channels last, and index."""
        if "place" not in batch:
            return super().on_after_batch_transfer(batch, dataloader_idx)
        assert self._patches is not None
        assert self._loader is not None
        place = batch.pop("place")
        if self._patches.device != place.device:  # once
            self._patches = self._patches.to(place.device)
        image = crops(self._patches, place, self._loader.batches.crop)
        return {**batch, "image": as_floats(image)}
