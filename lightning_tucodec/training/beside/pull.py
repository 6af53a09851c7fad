"""A run's mirror before the first step: fetch a newer state from it, and check that it can be written.

No server can hold up the start: one that gives no answer for a while is given up.
"""

import hashlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lightning_tucodec.errors import DatasetError, TucodecError
from lightning_tucodec.io.storage import Storage, sha256_file
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.training.beside.mirror import (
    INDEX,
    SMALL,
    Progress,
    mirror_of,
    progress,
    read_index,
)
from lightning_tucodec.training.runs.folder import MANIFEST, RunFolder
from lightning_tucodec.training.runs.manifest import Manifest
from lightning_tucodec.training.runs.weights import CHECKPOINTS

T = TypeVar("T")

ANSWER_SECONDS = 60.0
"""How long one request may take."""

_SLOWEST = 1 << 20
"""Bytes a second of the slowest connection that is waited for."""


class DamagedError(DatasetError):
    """A file is missing in a mirror, or has other bytes than were stored."""


class NoAnswerError(DatasetError):
    """A server does not answer."""


def check_writable(url: str) -> None:
    """Write, read and remove a small file at a mirror's parent.

    Raises:
        DatasetError: that does not work.
    """
    if not _answer(url, lambda: _is_writable(url)):
        raise DatasetError(f"mirror {url}: what was read is not what was written")


def _is_writable(url: str) -> bool:
    storage = Storage(url)
    probe = f".tucodec-probe-{os.getpid()}"
    try:
        storage.write(probe, b"tucodec")
        same = storage.read(probe) == b"tucodec"
        storage.remove(probe)
    except OSError as error:
        raise DatasetError(f"mirror {url}: {error.strerror or error}") from None
    except TucodecError as error:
        raise DatasetError(f"mirror {url}: {error}") from None
    return same


def pull(folder: RunFolder, url: str, own: Progress | None) -> int | None:
    """Bring a run's state here if the mirror is further than `own`, or holds any where that is None.

    The newest checkpoint whose bytes have the stated hash is taken, with metrics, manifest and pictures.
    Local checkpoints stay as the older generation. A damaged picture is left out.

    Returns:
        The step, or None when the mirror has nothing newer.

    Raises:
        DatasetError: the storage cannot be reached or does not answer, or metrics, manifest or configuration
            are damaged; then the state here is as it was.
    """
    storage = mirror_of(folder, url)
    index = _answer(url, lambda: read_index(folder, url))
    last, previous = (folder.checkpoints / name for name in CHECKPOINTS)
    incoming = folder.checkpoints / "incoming.ckpt"
    for entry in index.get("checkpoints", []):
        if own is not None and progress(entry) <= own:
            break
        try:
            _get(storage, entry, incoming)
        except NoAnswerError:
            raise
        except (TucodecError, OSError) as error:
            print(f"tucodec: {error}; trying an older one", file=sys.stderr, flush=True)
            incoming.unlink(missing_ok=True)
            continue
        try:
            small = _get_small(storage, index["files"])
            _get_pictures(storage, index["files"], folder)
        except DatasetError:
            incoming.unlink()
            raise
        for name, data in small.items():
            if name == MANIFEST:
                Manifest(folder).merge(data)
                continue
            with atomic_write(folder.path / name) as stream:
                stream.write(data)
        if last.exists():
            last.replace(previous)
        incoming.replace(last)
        return int(entry["step"])
    return None


def _get(storage: Storage, entry: dict[str, Any], target: Path) -> None:
    """Fetch a file and compare size and hash.

    Raises:
        DatasetError: they differ.
    """

    def fetch() -> None:
        name, size, sha256 = (entry[key] for key in ("name", "size", "sha256"))
        if storage.remote:
            storage.download(name, target, size, sha256)
            return
        with atomic_write(target) as stream:
            stream.write(storage.read(name))
        if sha256_file(target) != sha256:
            raise DatasetError(f"{storage.path(name)}: its bytes are not what was stored")

    _answer(storage.location, fetch, entry["size"])


def _get_small(storage: Storage, files: dict[str, Any]) -> dict[str, bytes]:
    """Metrics, manifest and configuration."""
    try:
        return {name: _content(storage, files[name]) for name in SMALL if name in files}
    except DamagedError as error:
        raise DamagedError(f"{error}; restore it, or remove {storage.location}") from None


def _get_pictures(storage: Storage, files: dict[str, Any], folder: RunFolder) -> None:
    """Fetch the files that are missing here."""
    for name, file in files.items():
        target = folder.path / name
        if name not in SMALL and not target.exists():
            try:
                data = _content(storage, file)
            except DamagedError as error:
                print(f"tucodec: {error}; left out", file=sys.stderr, flush=True)
                continue
            with atomic_write(target) as stream:
                stream.write(data)


def _content(storage: Storage, entry: dict[str, Any]) -> bytes:
    """A small file.

    Earlier versions wrote the next state of a file over the one that the index names. Where that only
    added lines, the stated bytes are still there.

    Raises:
        DamagedError: the stated bytes are not there.
    """
    name, size = entry["name"], entry["size"]
    where = storage.path(name)
    try:
        data = _answer(storage.location, lambda: storage.read(name), size)[:size]
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{where}: is not there, although {INDEX} names it") from None
    except OSError as error:
        raise DatasetError(f"{where}: {error.strerror or error}") from None
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise DamagedError(f"{where}: its bytes are not what was stored")
    return data


def _answer(url: str, request: Callable[[], T], size: int = 0) -> T:
    """What a storage answers.

    A thread that waits for a server cannot be ended. It changes no state here when it wakes up: the files of
    a run are put in their places by the caller, after the answer.

    Args:
        url: of the storage.
        request: asks.
        size: bytes that come with the answer.

    Raises:
        NoAnswerError: it takes too long.
        Exception: of the request.
    """
    seconds = ANSWER_SECONDS + max(size, 0) / _SLOWEST
    answers: list[T] = []
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            answers.append(request())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask, name="mirror", daemon=True)
    thread.start()
    thread.join(seconds)
    for error in errors:
        raise error
    for answer in answers:
        return answer
    raise NoAnswerError(f"mirror {url}: no answer within {seconds:.0f} s; is its server up?")
