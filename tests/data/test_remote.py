"""Shards in a real S3 server (moto, on loopback), with connections that drop and bytes that change."""

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import fsspec
import numpy as np
import pytest
import torch
from generated import OPTIONS
from moto.server import ThreadedMotoServer

from data_pipelines.shards import build
from data_pipelines.verify import verify
from lightning_tucodec.errors import ConfigError, DatasetError
from lightning_tucodec.io import storage as storage_module
from lightning_tucodec.io.storage import ShardCache, Storage
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.training.data import PatchDataModule
from lightning_tucodec.training.input.shards import ShardReader
from tests.support import s3_environment

# botocore and aiohttp say things on their own account about clocks and connections left open.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


class Faulty(ThreadingHTTPServer):
    """Passes requests on to the S3 server; `fault` may spoil answers that carry shard bytes."""

    daemon_threads = True

    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.fault = ""
        self.left = 0
        self.seen = 0
        self.lock = threading.Lock()

    def spoil(self, fault: str, times: int) -> None:
        self.fault, self.left, self.seen = fault, times, 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        upstream = http.client.HTTPConnection(*self.server.target)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        data = answer.read()
        headers = answer.getheaders()
        upstream.close()
        spoilt = False
        if self.command == "GET" and ".tar" in self.path and "list-type" not in self.path:
            with self.server.lock:
                self.server.seen += 1
                spoilt = self.server.left > 0
                self.server.left -= spoilt
        if spoilt and self.server.fault == "wrong" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
            # Without the store's own checksum only ours can notice.
            headers = [pair for pair in headers if "checksum" not in pair[0].lower()]
        self.send_response_only(answer.status)
        for name, value in headers:
            if name.lower() not in {"transfer-encoding", "content-length", "connection"}:
                self.send_header(name, value)
        length = dict(answer.getheaders()).get("Content-Length", len(data))
        self.send_header("Content-Length", str(length if self.command == "HEAD" else len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if spoilt and self.server.fault == "drop":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Faulty]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    faulty = Faulty(moto.get_host_and_port())
    thread = threading.Thread(target=faulty.serve_forever, daemon=True)
    thread.start()
    yield faulty
    faulty.shutdown()
    faulty.server_close()
    thread.join()
    moto.stop()


@pytest.fixture
def bucket(server: Faulty, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket's URL; the environment leads to it through the faulty server."""
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in {**s3_environment(endpoint), "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(storage_module, "PAUSE_SECONDS", 0.001)
    server.spoil("", 0)
    client = boto3.client("s3")
    client.create_bucket(Bucket="patches")
    yield "s3://patches"
    found = client.list_objects_v2(Bucket="patches").get("Contents", [])
    for entry in found:
        client.delete_object(Bucket="patches", Key=entry["Key"])
    client.delete_bucket(Bucket="patches")
    client.close()
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture
def remote(bucket: str, shards: Path) -> str:
    """The shards of the local fixture, in the bucket."""
    storage = Storage(f"{bucket}/set")
    for path in sorted(shards.iterdir()):
        storage.write(path.name, path.read_bytes())
    return storage.location


def test_a_build_in_the_bucket_has_the_same_bytes(
    bucket: str, photos: Path, shards: Path, content: Callable[[Path], dict[str, bytes]]
) -> None:
    build([str(photos)], f"{bucket}/out", OPTIONS)
    storage = Storage(f"{bucket}/out")
    assert {name: storage.read(name) for name, _ in storage.files()} == content(shards)
    assert verify(storage.location).wrong == []
    build([str(photos)], f"{bucket}/out", OPTIONS)  # nothing to do


def test_photographs_may_lie_in_the_bucket(
    bucket: str, photos: Path, shards: Path, tmp_path: Path
) -> None:
    storage = Storage(f"{bucket}/set")
    for path in photos.iterdir():
        storage.write(path.name, path.read_bytes())
    build([storage.location], str(tmp_path), OPTIONS)
    assert (tmp_path / "index.json").read_bytes() == (shards / "index.json").read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["", "drop", "wrong"])
def test_training_from_the_bucket_sees_what_local_training_sees(
    remote: str, shards: Path, tmp_path: Path, server: Faulty, fault: str, workers: int
) -> None:
    server.spoil(fault, 4)
    local = PatchDataModule(str(shards), 23, crop=24).train_dataloader()
    module = PatchDataModule(remote, 23, crop=24, num_workers=workers, cache_dir=str(tmp_path))
    loader = module.train_dataloader()
    for _ in range(2):
        for expected, found in zip(local, loader, strict=True):
            assert torch.equal(expected["image"], found["image"])
    loader.close()
    if fault:
        assert server.left == 0
    copies = [path for path in tmp_path.iterdir() if path.suffix == ".tar"]
    assert len(copies) == 9
    assert not list(tmp_path.glob("*.tmp"))


def test_lasting_wrong_bytes_are_refused(remote: str, tmp_path: Path, server: Faulty) -> None:
    server.spoil("wrong", 10**6)
    module = PatchDataModule(remote, 23, cache_dir=str(tmp_path))
    with pytest.raises(DatasetError, match=r"shard-00000\d\.tar: failed 5 times.*hash"):
        list(module.train_dataloader())
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tar"]
    server.spoil("", 0)


def test_no_more_is_downloaded_than_the_index_states(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endless object must not fill the disk."""
    storage, target = Storage(bucket), tmp_path / "copy"
    storage.write("large", bytes(9 << 20))
    written: list[int] = []

    @contextmanager
    def counting(path: Path) -> Iterator[Any]:
        with atomic_write(path) as stream:
            try:
                yield stream
            finally:
                written.append(stream.tell())

    monkeypatch.setattr(storage_module, "atomic_write", counting)
    with pytest.raises(DatasetError, match="more than the 1000 bytes that the index states"):
        storage.download("large", target, 1000, "0" * 64)
    assert written == [0] * storage_module.ATTEMPTS
    assert not list(tmp_path.iterdir())


def test_every_shard_is_fetched_once_by_several_processes(
    remote: str, tmp_path: Path, server: Faulty
) -> None:
    server.spoil("", 0)
    module = PatchDataModule(remote, 8, num_workers=2, cache_dir=str(tmp_path))
    loader = module.train_dataloader()
    assert len(list(loader)) == 18
    loader.close()
    assert server.seen == 9


def test_the_cache_stays_within_its_limit(remote: str, tmp_path: Path) -> None:
    storage = Storage(remote)
    index = ShardReader(remote, str(tmp_path / "x")).index
    cache = ShardCache(storage, tmp_path, 3 * max(index.bytes))
    for shard in (0, 1, 2, 0, 3, 4):
        path = cache.get(index.names[shard], index.bytes[shard], index.sha256[shard])
        assert path.stat().st_size == index.bytes[shard]
        tars = [one for one in tmp_path.iterdir() if one.suffix == ".tar"]
        assert sum(one.stat().st_size for one in tars) <= cache.limit
    kept = {one.stem for one in tars}
    assert kept == {index.sha256[0], index.sha256[3], index.sha256[4]}
    with pytest.raises(ConfigError, match="raise cache_gb"):
        ShardReader(remote, str(tmp_path), 1000).check_cache(2)


def test_equal_names_in_two_folders_do_not_meet(remote: str, bucket: str, tmp_path: Path) -> None:
    index = json.loads(Storage(remote).read("index.json"))
    other = Storage(f"{bucket}/other")
    for shard in index["shards"]:
        other.write(shard["name"], Storage(remote).read(shard["name"]))
    index["shards"] = index["shards"][1:]
    other.write("index.json", json.dumps(index).encode())
    one, two = ShardReader(remote, str(tmp_path)), ShardReader(other.location, str(tmp_path))
    assert np.array_equal(one.pixels(16), two.pixels(0))
    assert not np.array_equal(one.pixels(0), two.pixels(0))


def test_what_does_not_exist_is_said(bucket: str) -> None:
    with pytest.raises(DatasetError, match=r"index\.json: not found"):
        ShardReader(f"{bucket}/nothing")
    with pytest.raises(DatasetError, match="no images"):
        build([f"{bucket}/nothing"], f"{bucket}/out", OPTIONS)
    assert Storage(bucket).size("nothing") is None


def test_a_remote_shard_that_is_missing_is_named(shard_folder: Path, tmp_path: Path) -> None:
    """It was asked for again and again, for ever."""
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/missing/index.json", (shard_folder / "index.json").read_bytes())
    reader = ShardReader("memory://missing", cache_dir=str(tmp_path))
    with pytest.raises(DatasetError, match="is missing"):
        reader.pixels(0)
    memory.rm("/missing", recursive=True)
