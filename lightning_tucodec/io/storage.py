"""Folders, local or at any fsspec URL, with retries and hashes; a bounded local cache of them."""

import fcntl
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from lightning_tucodec.errors import DatasetError
from lightning_tucodec.io.files import read_bytes
from lightning_tucodec.io.temporary import atomic_write

T = TypeVar("T")

ATTEMPTS = 5
"""How often a remote operation is tried before the error is given to the user."""

PAUSE_SECONDS = 0.1
"""First pause between two attempts; each further one is twice as long."""

_PIECE = 1 << 22


def is_remote(location: str | Path) -> bool:
    """Whether `location` is a URL such as `s3://bucket/prefix` and not a path."""
    return "://" in str(location) and not str(location).startswith("file://")


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a local file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


class Storage:
    """Files under one folder or URL.

    Writes are atomic: a local file is renamed into place, an object store shows an object only when
    it is complete. Remote operations are repeated with growing pauses when they fail.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = str(location).removeprefix("file://").rstrip("/") or "/"
        self.remote = is_remote(location)
        self._made: set[str] = set()

    def path(self, name: str) -> str:
        """Path or URL of a file."""
        return f"{self.location}/{name}" if name else self.location

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes [start, end) of a file.

        Raises:
            FileNotFoundError: it does not exist.
            DatasetError: a remote read kept failing.
        """
        if not self.remote:
            if (start, end) == (0, None):
                return read_bytes(self.path(name))
            with open(self.path(name), "rb") as stream:
                stream.seek(start)
                return stream.read() if end is None else stream.read(end - start)
        data: bytes = self._retry(
            name, lambda fs, path: fs.cat_file(path, start=start or None, end=end)
        )
        return data

    def write(self, name: str, data: bytes) -> None:
        """Store `data` under `name`, replacing what was there."""
        if not self.remote:
            with atomic_write(self.path(name)) as stream:
                stream.write(data)
            return

        def put(fs: Any, path: str) -> None:
            self._make_parent(fs, path)
            fs.pipe_file(path, data)
            if fs.cat_file(path) != data:
                raise OSError("what was stored is not what was sent")

        self._retry(name, put)

    def upload(self, name: str, source: Path, sha256: str) -> None:
        """Copy a local file to a remote storage and read it back to compare hashes."""

        def put(fs: Any, path: str) -> None:
            self._make_parent(fs, path)
            fs.put_file(str(source), path)
            digest = hashlib.sha256()
            with fs.open(path, "rb", block_size=_PIECE) as stream:
                while piece := stream.read(_PIECE):
                    digest.update(piece)
            if digest.hexdigest() != sha256:
                raise OSError("what was stored is not what was sent")

        self._retry(name, put)

    def download(self, name: str, target: Path, size: int, sha256: str) -> None:
        """Copy a remote file to `target`, which appears only if size and hash are right."""

        def get(fs: Any, path: str) -> None:
            digest, received = hashlib.sha256(), 0
            with atomic_write(target) as output, fs.open(path, "rb", block_size=_PIECE) as stream:
                while piece := stream.read(_PIECE):
                    digest.update(piece)
                    received += len(piece)
                    if received > size:
                        raise OSError(f"more than the {size} bytes that the index states")
                    output.write(piece)
                if received != size or digest.hexdigest() != sha256:
                    raise OSError(f"{received} bytes do not have the hash that the index states")

        self._retry(name, get)

    def size(self, name: str) -> int | None:
        """Size in bytes; None when there is no such file."""
        try:
            if not self.remote:
                return os.stat(self.path(name)).st_size
            size: int = self._retry(name, lambda fs, path: int(fs.info(path)["size"]))
            return size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def files(self) -> list[tuple[str, int]]:
        """Names relative to the folder, at any depth, with sizes, in the order of the names.

        Linked folders are entered; a folder that may not be read is listed by its name and "/".
        """
        if not self.remote:
            return sorted(_walk(Path(self.location)))

        def find(fs: Any, path: str) -> list[tuple[str, int]]:
            entries = fs.find(path, detail=True)
            return sorted(
                (PurePosixPath(key).relative_to(path).as_posix(), int(entry["size"]))
                for key, entry in entries.items()
            )

        names: list[tuple[str, int]] = self._retry("", find)
        return names

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        if not self.remote:
            Path(self.path(name)).unlink(missing_ok=True)
        elif self.size(name) is not None:
            self._retry(name, lambda fs, path: fs.rm_file(path))

    def _make_parent(self, fs: Any, path: str) -> None:
        """Make the folder of a file where folders are made: a bucket has none, and is never made."""
        parent = path.rpartition("/")[0]
        if path.startswith("/") and parent not in self._made:
            fs.makedirs(parent, exist_ok=True)
            self._made.add(parent)

    def _retry(self, name: str, action: Callable[[Any, str], T]) -> T:
        url = self.path(name)
        for attempt in range(ATTEMPTS):
            try:
                with _file_system(url) as (fs, path):
                    fs.invalidate_cache()  # others write here too; not every backend can do without one
                    return action(fs, path)
            except (FileNotFoundError, IsADirectoryError):
                raise
            except (ImportError, ValueError, PermissionError) as error:
                raise DatasetError(f"{url}: {_one_line(error)}") from error
            # Each backend has its own family of connection errors; all of them may pass.
            except Exception as error:
                if attempt == ATTEMPTS - 1:
                    raise DatasetError(
                        f"{url}: failed {ATTEMPTS} times, last with: {_one_line(error)}"
                    ) from error
                time.sleep(PAUSE_SECONDS * 2**attempt * (1 + random.random()))
        raise AssertionError("unreachable")


class ShardCache:
    """Local copies of remote shards, shared by all processes of a node and bounded in size.

    A copy appears under its final name only when size and SHA-256 are right, so a reader never sees
    half of one. The name is the shard's own hash, so shards of equal names in different folders do
    not meet. A lock, which the kernel drops when its holder dies, keeps the processes of a node
    from fetching the same shard twice. The copies used least recently go first; on POSIX a reader
    that still has one mapped keeps its data.

    Args:
        storage: where the shards lie.
        folder: the cache, on a local disk.
        limit: bytes that the cache may hold; at least the newest shard always stays.
    """

    def __init__(self, storage: Storage, folder: Path, limit: int) -> None:
        self.storage, self.folder, self.limit = storage, folder, limit

    def get(self, name: str, size: int, sha256: str) -> Path:
        """Path of a verified local copy."""
        path = self.folder / f"{sha256}{PurePosixPath(name).suffix}"
        if not self._has(path, size):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f".{sha256}.lock", "wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not self._has(path, size):
                    self._make_room(size)
                    self.storage.download(name, path, size, sha256)
                    self._has(path, size)
        return path

    @staticmethod
    def _has(path: Path, size: int) -> bool:
        try:
            if path.stat().st_size != size:
                return False
            # The time of last use, finer than the kernel's own clock for files.
            os.utime(path, ns=(time.time_ns(), time.time_ns()))
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, size: int) -> None:
        copies = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            if not path.name.startswith("."):  # locks, and downloads, which io.temporary sweeps
                copies.append((status.st_mtime_ns, status.st_size, path))
        total = sum(entry[1] for entry in copies) + size
        for _, length, path in sorted(copies):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= length


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    """Files below a local folder; each folder is entered once on every way down, so loops end."""
    unreadable: list[str] = []
    above = {str(root): frozenset({os.path.realpath(root)})}

    def note(error: OSError) -> None:
        if isinstance(error, PermissionError):
            unreadable.append(str(error.filename))

    for folder, inner, files in os.walk(root, onerror=note, followlinks=True):
        own = above.pop(folder)
        for name in inner[:]:
            path = os.path.join(folder, name)
            target = os.path.realpath(path)
            if target in own:
                inner.remove(name)
            else:
                above[path] = own | {target}
        for name in files:
            file = Path(folder, name)
            try:
                yield file.relative_to(root).as_posix(), file.stat().st_size
            except FileNotFoundError:  # another process took it away, or a link leads nowhere
                if file.is_symlink():
                    yield file.relative_to(root).as_posix(), 0
    for folder in unreadable:
        yield Path(folder).relative_to(root).as_posix() + "/", 0


@contextmanager
def _file_system(url: str) -> Iterator[tuple[Any, str]]:
    """fsspec's file system of a URL, and the path on it."""
    if url.startswith(("sftp://", "ssh://")):
        try:
            from lightning_tucodec.io.sftp import connected
        except ModuleNotFoundError:
            raise ImportError("needs paramiko: pip install 'lightning-tucodec[sftp]'") from None

        with connected(url) as found:
            yield found
    else:
        import fsspec

        yield fsspec.core.url_to_fs(url)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
