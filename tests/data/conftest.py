"""Shards of generated photographs."""

from collections.abc import Callable
from pathlib import Path

import pytest
from generated import OPTIONS, photo_folder

from data_pipelines.shards import build


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
