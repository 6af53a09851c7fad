"""Photographs that are generated, and shards of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.shards import BuildOptions, build

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


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 pictures of 100×70, six patches each at patch 32."""
    return photo_folder(tmp_path_factory.mktemp("photos") / "set", 23)


@pytest.fixture(scope="session")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """138 patches in 9 shards."""
    out = tmp_path_factory.mktemp("shards") / "out"
    build([str(photos)], str(out), OPTIONS)
    return out


@pytest.fixture(scope="session")
def content() -> Callable[[Path], dict[str, bytes]]:
    """Names and bytes of all files below a folder."""

    def read(folder: Path) -> dict[str, bytes]:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return read
