"""What tests of several folders share: real photographs, shards of them, a network of a few thousand weights."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray
from PIL import Image

settings.register_profile("deterministic", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("deterministic")

torch.set_num_threads(1)

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
"""Photographs inside scikit-image's wheel; its other ones would be downloaded."""

MICRO: dict[str, Any] = {
    "transform.widths": [0, 8, 12, 16],
    "transform.latent_channels": 8,
    "transform.attention_mask_channels": 8,
    "hyper.channels": 8,
    "hyper.latent_channels": 4,
    "hyper.out_channels": 12,
    "hyper.entropy_widths": [16, 16],
    "context.channels": 6,
    "context.out_channels": 12,
    "centres": 40,
}
"""`tiny` with everything that costs time made small."""


def photo(name: str, width: int, height: int, left: int = 100, top: int = 60) -> NDArray[np.uint8]:
    """A part of a photograph, H×W×3."""
    with Image.open(str(files("skimage") / "data" / name)) as image:
        box = (left, top, left + width, top + height)
        return np.array(image.convert("RGB").crop(box))


@pytest.fixture(scope="session")
def cat() -> NDArray[np.uint8]:
    """75×101 pixels, both sides odd."""
    return photo("chelsea.png", 101, 75)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photographs of 200×200."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in PHOTOS:
        Image.fromarray(photo(name, 200, 200)).save(folder / f"{Path(name).stem}.png")
    return folder


@pytest.fixture(scope="session")
def val_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs of odd sizes."""
    folder = tmp_path_factory.mktemp("validation")
    Image.fromarray(photo("chelsea.png", 101, 75)).save(folder / "cat.png")
    Image.fromarray(photo("coffee.png", 64, 50)).save(folder / "cup.png")
    return folder


def _shards(photos: Path, out: Path, patch: int, count: int) -> Path:
    from data_pipelines.shards import BuildOptions, build

    options = BuildOptions(patch=patch, count=count, shard_size=4, duplicate_bits=-1)
    build([str(photos)], str(out), options)
    return out


@pytest.fixture(scope="session")
def shard_folder(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 patches of 64×64."""
    return _shards(photo_folder, tmp_path_factory.mktemp("shards") / "small", 64, 12)


@pytest.fixture(scope="session")
def large_shard_folder(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 patches of 192×192, large enough for MS-SSIM."""
    return _shards(photo_folder, tmp_path_factory.mktemp("shards") / "large", 192, 4)


@pytest.fixture(scope="session")
def micro() -> dict[str, Any]:
    """Overrides of `tiny` for a network of a few thousand weights."""
    return dict(MICRO)
