"""One Slurm cluster for all tests of the folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaigns.cluster import Box, make_data, missing_programs, write_recipe


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """Two nodes; skipped where Slurm is not installed."""
    why = missing_programs()
    if why:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("box")
    made = Box(folder)
    yield made
    made.stop()
    assert not made.processes()


@pytest.fixture(scope="session")
def box_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that trains a small network on small shards for 240 steps."""
    folder = tmp_path_factory.mktemp("recipe")
    write_recipe(folder / "recipe.yaml", make_data(folder / "data"))
    return folder / "recipe.yaml"
