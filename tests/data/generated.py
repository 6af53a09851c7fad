"""Photographs that are generated, and how the tests cut them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.options import BuildOptions

OPTIONS = BuildOptions(patch=32, shard_size=16, duplicate_bits=-1)


def picture(seed: int, width: int = 100, height: int = 70) -> NDArray[np.uint8]:
    """A smooth random picture with some grain, uint8 H×W×3."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def photo_folder(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(picture(number)).save(folder / f"photo{number:03d}.png")
    return folder
