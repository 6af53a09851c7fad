"""Shared by tests of several folders: photographs, shards of them, a network of few weights, a bucket."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray
from PIL import Image

from tests.support import MICRO, PHOTOS, photo, s3_environment

settings.register_profile("deterministic", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("deterministic")

torch.set_num_threads(1)
# Autograd starts its threads at the first backward pass, one a device that is known by then. Compiling makes
# more known; after threads a process of a test could not be forked.
torch.ones(1, requires_grad=True).sum().backward()


@pytest.hookimpl(optionalhook=True)  # where pytest-xdist is not installed
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files side by side; those of `cluster` one after the other, each wants the machine for itself."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "cluster" if file.startswith("tests/cluster/") else file

    return Scheduling(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is marked `gpu` is collected everywhere."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here; `make gpu` runs it where there is one")


class Failures:
    """Tells what failed when it fails: a run that is killed shows no summary."""

    def __init__(self, reporter: Any) -> None:
        self.reporter = reporter

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.reporter.ensure_newline()
            self.reporter.write_line(f"{report.nodeid} ({report.when}) failed:")
            self.reporter.write_line("\n".join(report.longreprtext.splitlines()[-12:]))


@pytest.hookimpl(trylast=True)  # the reporter is made in this hook
def pytest_configure(config: pytest.Config) -> None:
    if reporter := config.pluginmanager.get_plugin("terminalreporter"):
        config.pluginmanager.register(Failures(reporter))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A test leaves PyTorch one thread: Lightning's launcher of DDP sets them, also for child processes."""
    name = "OMP_NUM_THREADS"
    before = os.environ.get(name)
    yield
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    if before is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = before


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
    from data_pipelines.options import BuildOptions
    from data_pipelines.shards import build

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
def precoded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve patches of 32×32 beside what H.266 makes of them: more than one batch."""
    from data_pipelines.precode_vvc import PrecodeOptions, precode

    folder = tmp_path_factory.mktemp("precoded")
    (folder / "photos").mkdir()
    Image.fromarray(photo("coffee.png", 128, 96)).save(folder / "photos" / "cup.png")
    out = folder / "out"
    codec = "vvc:qp=40,preset=faster,colour=orthonormal"
    precode(
        [str(folder / "photos")],
        str(out),
        PrecodeOptions((codec,), per_photo=1, patch=32, shard_size=6),
    )
    return out


@pytest.fixture(scope="session")
def micro() -> dict[str, Any]:
    """Overrides of `tiny` for a network of a few thousand weights."""
    return dict(MICRO)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a real S3 server on loopback."""
    pytest.importorskip("moto")
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in s3_environment(f"http://{host}:{port}").items():
        monkeypatch.setenv(name, value)
    # The endpoint is no part of the key of fsspec's cache, and moto's buckets outlive its server.
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("mirror")
    yield "s3://mirror/runs"
    s3fs.S3FileSystem(skip_instance_cache=True).rm("mirror", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
