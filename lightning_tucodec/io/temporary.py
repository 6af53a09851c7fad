"""Files and folders while they are written: whole at their name or not there, and swept after a kill."""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

FORMER = "former"
"""In a temporary folder: what stood at its target. It goes back there when nothing else does."""

_temporary: set[str] = set()
"""Files that are being written; with a folder of the same name but `.tmp`, if they are locks of one."""

_swept: set[str] = set()
"""Folders in which this process has looked for what killed ones have left."""

_TEMPORARY = re.compile(r"\.tucodec\..+\.([0-9a-f]{8})([0-9a-f]{8})([0-9a-f]{8})\.tmp", re.DOTALL)
"""Names of temporary files: random digits, a digest of them that marks them as ours, one of the machine."""

_ABANDONED_SECONDS = 86_400
"""From this age on, what other machines have left counts: not every file system shows them our locks."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of writing, which do not name a file."""


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on a clean exit flush it to disk and rename it to `path`.

    If the block raises, `path` keeps what it held before and the temporary file is removed. What a killed
    process has left in the same folder goes as well. The parent folder is made when it is missing.

    Args:
        path: the final name.
        mode: "wb" or "w" (text is UTF-8).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Names that are not UTF-8 are escaped in texts.
    encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
    with _temporary_file(path) as (handle, temporary):
        try:
            with os.fdopen(handle, mode, encoding=encoding, errors=errors, closefd=False) as stream:
                yield stream
                stream.flush()
                os.fsync(handle)
            os.replace(temporary, path)
        except OSError as error:
            # Errors of other files, which the block may read, keep their names.
            if error.filename == temporary or error.errno in _FULL:
                raise _named(error, path) from error
            raise


@contextmanager
def temporary_folder(target: str | Path | None = None) -> Iterator[Path]:
    """A new folder that is removed with all that is in it, however the block or the process ends.

    After `kill -9` the next one that writes there removes it.

    Args:
        target: the folder lies beside this one; its entry `FORMER` is put back when `target` is missing.
            By default it lies where the system wants temporary files.
    """
    place = Path(tempfile.gettempdir(), "files") if target is None else Path(target)
    with _temporary_file(place) as (handle, temporary):
        os.write(handle, os.fsencode(place.name))
        folder = _folder_of(temporary)
        os.mkdir(folder, 0o700)
        yield Path(folder)


@contextmanager
def _temporary_file(path: Path) -> Iterator[tuple[int, str]]:
    """A locked file beside `path`, by descriptor and name, that is gone when the block ends."""
    _sweep(path.parent)
    handle = -1
    temporary = ""
    try:
        while handle < 0:
            random = secrets.token_hex(4)
            # A part of the name: the whole one and what is added may be longer than names can be.
            name = f".tucodec.{path.name[:50]}.{random}{_short(random)}{_short(os.uname().nodename)}.tmp"
            temporary = str(path.parent / name)
            _temporary.add(temporary)
            try:
                handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except OSError as error:
                raise _named(error, path) from error
            # The kernel drops the lock when this process dies. Who sweeps may have been faster than we.
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            if not os.fstat(handle).st_nlink:
                os.close(handle)
                handle = -1
        yield handle, temporary
    finally:
        _remove(temporary)
        if handle >= 0:
            os.close(handle)
        _temporary.discard(temporary)


def remove_temporary() -> None:
    """Remove what is being written, for a process that ends at once."""
    for temporary in list(_temporary):
        with suppress(OSError):
            _remove(temporary)


def forget_temporary() -> None:
    """What is being written is another process's, from which this one was forked."""
    _temporary.clear()


def _remove(temporary: str) -> None:
    """Remove a temporary file, and before it, as it is the lock, its folder."""
    folder = _folder_of(temporary)
    if os.path.isdir(folder):
        former = os.path.join(folder, FORMER)
        if os.path.lexists(former):
            target = os.path.join(
                os.path.dirname(temporary), os.fsdecode(Path(temporary).read_bytes())
            )
            with suppress(OSError):  # what is not empty is not replaced
                os.rename(former, target)
        shutil.rmtree(folder, ignore_errors=True)
    Path(temporary).unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove the temporary files of ours in a folder whose process is dead; once for each process."""
    place = os.path.realpath(folder)
    if place in _swept:
        return
    _swept.add(place)
    with suppress(OSError), os.scandir(place) as entries:
        for name in [entry.name for entry in entries]:
            found = _TEMPORARY.fullmatch(name)
            if not found or _short(found[1]) != found[2]:
                continue
            path = os.path.join(place, name)
            with suppress(OSError):
                handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    status = os.fstat(handle)
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    near = found[3] == _short(os.uname().nodename)
                    old = time.time() - status.st_mtime > _ABANDONED_SECONDS
                    own = status.st_uid == os.geteuid() and stat.S_ISREG(status.st_mode)
                    if own and (near or old):
                        _remove(path)
                finally:
                    os.close(handle)


def _folder_of(temporary: str) -> str:
    return temporary.removesuffix(".tmp")


def _short(text: str) -> str:
    """Eight digits of a digest."""
    return hashlib.sha256(b"tucodec" + os.fsencode(text)).hexdigest()[:8]


def _named(error: OSError, path: Path) -> OSError:
    """The same error of the file that was to be written."""
    return OSError(error.errno, error.strerror, str(path))
