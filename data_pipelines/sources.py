"""Where photographs come from: a folder, a tar, one image or an object store."""

import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lightning_tucodec.errors import DatasetError, ImageInputError
from lightning_tucodec.io.files import expanded
from lightning_tucodec.io.images import IMAGE_SUFFIXES, is_image_name, is_special
from lightning_tucodec.io.storage import Storage, is_remote

_ARCHIVES = (".tgz", ".gz", ".bz2", ".xz", ".txz", ".zst", ".zip", ".7z", ".rar")


def _is_archive(name: str) -> bool:
    base = PurePosixPath(name).name.lower()
    return base.endswith((".tar", *_ARCHIVES)) and not base.startswith(".")


class Entry(NamedTuple):
    """One image file: number of its source, name in it, first byte (within a tar) and size.

    Also what may hold images but cannot be read, to be rejected as an image is: an unreadable folder (its
    name ends with "/"), an archive, a broken link.
    """

    source: int
    name: str
    offset: int
    size: int


class Source:
    """One SRC of the command line.

    Attributes:
        name: what the shards call it: the last part of its path, which does not depend on where
            the folder is mounted.
    """

    def __init__(self, location: str) -> None:
        if not is_remote(location):
            # Links are resolved, so that a name and its bytes lie in the same folder.
            location = Path(expanded(location.removeprefix("file://"))).resolve().as_posix()
        self.location = location
        self.name = PurePosixPath(location).name
        self.is_tar = self.name.lower().endswith(".tar")
        single = self.is_tar or (not is_remote(location) and Path(location).is_file())
        self.storage = Storage(location.rpartition("/")[0] or "." if single else location)
        self.single = single

    def entries(self, number: int) -> list[Entry]:
        """All images, by name order.

        Raises:
            DatasetError: the source does not exist or cannot be listed.
        """
        if not self.storage.remote and not os.path.exists(self.location):
            raise DatasetError(f"{self.location}: no such folder or file")
        if self.name.lower().endswith(_ARCHIVES):
            raise DatasetError(
                f"{self.location}: a packed archive; unpack it first (only plain tars are read)"
            )
        if self.is_tar:
            return self._tar_entries(number)
        if self.single:
            return [Entry(number, self.name, 0, os.stat(self.location).st_size)]
        return [
            Entry(number, name, 0, size)
            for name, size in self.storage.files()
            if is_image_name(name) or name.endswith("/") or _is_archive(name) or self._is_lost(name)
        ]

    def read(self, entry: Entry) -> bytes:
        """The bytes of one image file.

        Raises:
            PermissionError: it stands for an unreadable folder.
            ImageInputError: it is an archive, or no file at all.
        """
        if _is_archive(entry.name):
            raise ImageInputError(f"{entry.name}: an archive inside a source; name it as a source")
        if not self.storage.remote and is_special(self.storage.path(entry.name)):
            raise ImageInputError(f"{entry.name}: a pipe, socket or device, not a file")
        if entry.name.endswith("/"):
            raise PermissionError(f"{entry.name}: the folder may not be read (permissions)")
        if self.is_tar:
            return self.storage.read(self.name, entry.offset, entry.offset + entry.size)
        return self.storage.read(entry.name)

    def _is_lost(self, name: str) -> bool:
        """Whether it is a link whose target, perhaps a folder of images, does not exist."""
        path = self.storage.path(name)
        return not self.storage.remote and os.path.islink(path) and not os.path.exists(path)

    def licence(self) -> str | None:
        """First 2,000 characters of a LICENSE file in the source's top folder."""
        if self.single:
            return None
        for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt"):
            if self.storage.size(name) is not None:
                return self.storage.read(name, 0, 2000).decode(errors="replace").strip()
        return None

    def _tar_entries(self, number: int) -> list[Entry]:
        try:
            with tarfile.open(fileobj=_RangeReader(self.storage, self.name), mode="r:") as tar:
                found = [
                    Entry(number, member.name, member.offset_data, member.size)
                    for member in tar
                    if member.isfile() and (is_image_name(member.name) or _is_archive(member.name))
                ]
        except tarfile.TarError as error:
            raise DatasetError(
                f"{self.location}: not an uncompressed tar ({error}); unpack it first"
            ) from None
        return sorted(found, key=lambda entry: entry.name)


def list_entries(sources: Sequence[Source], out: str) -> list[Entry]:
    """The images of all sources, source by source.

    Args:
        sources: of the command line.
        out: where the shards go. Inside a source it is left out, so that a resumed build finds the
            same images again.

    Raises:
        DatasetError: there is no image, or a source is itself `out`.
    """
    found = [entry for number, source in enumerate(sources) for entry in source.entries(number)]
    if not is_remote(out):
        place = Path(expanded(out.removeprefix("file://"))).resolve()
        for number, source in enumerate(sources):
            if source.storage.remote or not place.is_relative_to(source.location):
                continue
            inside = place.relative_to(source.location).as_posix()
            if inside == ".":
                raise DatasetError(f"--out {out}: is the folder of the photographs; name another")
            found = [
                entry
                for entry in found
                if entry.source != number or not entry.name.startswith(f"{inside}/")
            ]
    if not any(is_image_name(entry.name) for entry in found):
        archives = [entry.name for entry in found if _is_archive(entry.name)]
        hint = f"; name {archives[0]} as a source, unpacked if it is packed" if archives else ""
        raise DatasetError(
            f"{', '.join(source.location for source in sources)}: no images "
            f"({' '.join(sorted(IMAGE_SUFFIXES))}) found{hint}"
        )
    return found


def fingerprint(sources: Sequence[Source], entries: Sequence[Entry], settings: str) -> str:
    """Hash of everything that decides a build: names and sizes of all images, and the settings."""
    digest = hashlib.sha256(settings.encode())
    for source in sources:
        digest.update(f"\n{source.name}".encode(errors="surrogateescape"))
    for entry in entries:
        digest.update(
            f"\n{entry.source} {entry.size} {entry.name}".encode("utf-8", "surrogateescape")
        )
    return digest.hexdigest()


class _RangeReader(io.RawIOBase):
    """A file of a storage as a seekable stream, read in pieces of 1 MiB."""

    def __init__(self, storage: Storage, name: str) -> None:
        size = storage.size(name)
        if size is None:
            raise DatasetError(f"{storage.path(name)}: no such file")
        self._storage, self._name, self._size = storage, name, size
        self._position, self._start, self._piece = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def read(self, length: int = -1) -> bytes:
        end = self._size if length < 0 else min(self._size, self._position + length)
        if not self._start <= self._position <= end <= self._start + len(self._piece):
            self._start = self._position
            stop = min(self._size, max(end, self._position + (1 << 20)))
            self._piece = (
                self._storage.read(self._name, self._start, stop) if stop > self._start else b""
            )
        data = self._piece[self._position - self._start : max(end, self._position) - self._start]
        self._position += len(data)
        return data
