"""Shards and mirrors over SFTP, through a real server: connections that break, keys that differ."""

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from generated import OPTIONS

from data_pipelines.shards import build
from data_pipelines.verify import verify
from lightning_tucodec.cli import main
from lightning_tucodec.errors import DatasetError
from lightning_tucodec.io import sftp, storage
from lightning_tucodec.io.storage import Storage
from lightning_tucodec.training.beside.mirror import Mirror, read_index
from lightning_tucodec.training.beside.pull import pull
from lightning_tucodec.training.data import PatchDataModule
from lightning_tucodec.training.input.shards import ShardReader
from lightning_tucodec.training.runs.folder import RunFolder
from tests.sftp_server import Server

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setattr(storage, "PAUSE_SECONDS", 0.001)
    running = Server(tmp_path / "home")
    sftp.Sftp.clear_instance_cache()
    yield running
    for system in sftp.Sftp._cache.values():
        system.client.close()
    sftp.Sftp.clear_instance_cache()
    running.close()


@pytest.fixture
def root(server: Server, tmp_path: Path) -> Path:
    (tmp_path / "far").mkdir()
    return tmp_path / "far"


def test_files_come_and_go(root: Path, server: Server, tmp_path: Path) -> None:
    there, data = Storage(f"sftp://box{root}/deep"), os.urandom(300_000)
    with pytest.raises(FileNotFoundError):
        there.read("a/x")
    assert there.size("a/x") is None
    assert there.files() == []
    there.write("a/x", b"old")
    there.write("a/x", data)
    assert (root / "deep" / "a" / "x").read_bytes() == data
    assert there.read("a/x") == data
    assert there.read("a/x", 70_001, 140_002) == data[70_001:140_002]
    assert there.read("a/x", 299_999) == data[299_999:]
    (tmp_path / "here").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    there.upload("b", tmp_path / "here", digest)
    there.download("b", tmp_path / "back", len(data), digest)
    assert (tmp_path / "back").read_bytes() == data
    assert there.files() == [("a/x", len(data)), ("b", len(data))]
    there.remove("b")
    there.remove("b")
    assert there.files() == [("a/x", len(data))]
    assert server.connections == 1


def test_a_broken_connection_is_made_anew(root: Path, server: Server) -> None:
    there, data = Storage(f"sftp://box{root}"), os.urandom(100_000)
    there.write("x", data)
    server.lost = 2
    assert there.read("x") == data
    assert server.connections == 3
    server.lost = 10**6
    with pytest.raises(DatasetError, match=rf"^sftp://box{root}/x: failed 5 times, last with: "):
        there.read("x")


def test_nobody_sees_half_of_a_file(
    root: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Storage(f"sftp://box{root}")
    there.write("x", b"whole")
    server.renames = False
    with pytest.raises(DatasetError, match=r"cannot replace a file in one step"):
        there.write("x", b"new")
    server.renames = True
    seen = []

    def broken(self: object, old: str, new: str) -> None:
        seen.append(Path(new).read_bytes())
        raise EOFError("Server connection dropped")

    with monkeypatch.context() as patch:
        patch.setattr(sftp.paramiko.SFTPClient, "posix_rename", broken)
        with pytest.raises(DatasetError, match="failed 5 times"):
            there.write("x", b"new")
    assert seen == [b"whole"] * 5
    assert there.files() == [("x", 5)]


def unknown_host(home: Path) -> None:
    (home / ".ssh" / "known_hosts").write_text("")


def another_host(home: Path) -> None:
    name, kind, _ = (home / ".ssh" / "known_hosts").read_text().split()
    other = sftp.paramiko.ECDSAKey.generate().get_base64()
    (home / ".ssh" / "known_hosts").write_text(f"{name} {kind} {other}\n")


def another_user(home: Path) -> None:
    sftp.paramiko.ECDSAKey.generate().write_private_key_file(str(home / ".ssh" / "key"))


def no_key(home: Path) -> None:
    (home / ".ssh" / "key").unlink()


def nothing_of_ssh(home: Path) -> None:
    for file in (home / ".ssh").iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unknown_host, r"not found in known_hosts: call `ssh box` once and compare its key"),
        (another_host, r"does not match: .*; see ~/\.ssh/known_hosts"),
        (another_user, r"box takes no key of yours; `ssh box` must work without a question"),
        (no_key, r"`ssh box` must work without a question"),
        (nothing_of_ssh, r"failed 5 times, last with: .*[Nn]ame"),
    ],
)
def test_a_host_that_cannot_be_used_is_one_line(
    change: Callable[[Path], None],
    message: str,
    root: Path,
    server: Server,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(root.parent / "home")
    assert main(["shards", "verify", f"sftp://box{root}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tucodec: sftp://box{root}/index.json: ")
    assert re.search(message, line)
    assert server.connections == (change is not nothing_of_ssh)  # nothing is gained by trying again


def test_paramiko_is_named_where_it_lacks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lightning_tucodec.io.sftp")
    monkeypatch.setitem(sys.modules, "paramiko", None)
    with pytest.raises(
        DatasetError, match=r"needs paramiko: pip install 'lightning-tucodec\[sftp\]'"
    ):
        Storage(f"sftp://box{root}").read("x")


def test_shards_are_built_and_read(
    root: Path, server: Server, photos: Path, shards: Path, tmp_path: Path
) -> None:
    url = f"sftp://box{root}/shards"
    build([str(photos)], url, OPTIONS)
    assert not verify(url).wrong
    there, here = ShardReader(url, str(tmp_path / "cache")), ShardReader(str(shards))
    assert there.index.sha256 == here.index.sha256
    assert np.array_equal(there.pixels(100), here.pixels(100))
    module = PatchDataModule(url, 8, crop=32, num_workers=2, cache_dir=str(tmp_path / "other"))
    loader = module.train_dataloader()
    assert len(list(loader)) == 18  # its processes have connections of their own
    loader.close()
    build([f"sftp://box{photos}"], str(tmp_path / "out"), OPTIONS)
    assert ShardReader(str(tmp_path / "out")).index.sha256 == here.index.sha256


def test_a_run_goes_on_from_its_mirror(root: Path, server: Server, tmp_path: Path) -> None:
    url, folders = f"ssh://box{root}/runs", []
    for place in ("one", "two"):
        folders.append(RunFolder(tmp_path / place / "run-1"))
        folders[-1].checkpoints.mkdir(parents=True)
    assert pull(folders[1], url, None) is None
    mirror = Mirror(folders[0], url)
    for step in (1, 2, 3):
        content = {"tucodec": {"opt_step": step, "images_seen": 2 * step}, "state_dict": {}}
        torch.save(content, folders[0].checkpoints / "last.ckpt")
        folders[0].metrics.write_text(f'{{"opt_step": {step}}}\n')
        server.lost = step
        assert mirror.push()
    server.lost = 0
    assert [entry["step"] for entry in read_index(folders[1], url)["checkpoints"]] == [3, 2]
    assert pull(folders[1], url, None) == 3
    for name in ("checkpoints/last.ckpt", "metrics.jsonl"):
        first, second = (folder.path / name for folder in folders)
        assert first.read_bytes() == second.read_bytes()
    names = sorted(path.name for path in (root / "runs").rglob("*") if path.is_file())
    assert [name.rpartition("-")[0] or name for name in names] == [
        *("metrics", "metrics", "mirror.json", "step-00000002", "step-00000003")
    ]
