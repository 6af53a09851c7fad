"""A copy of a run folder at any fsspec URL, kept up to date while the run trains.

    <url>/<run folder's name>/
        mirror.json                     complete files, with size and SHA-256; checkpoints newest first
        checkpoints/step-….ckpt         two generations, named by step and content
        metrics-….jsonl manifest-….json config-….yaml       named by content
        images/

`mirror.json` is written last, so the files that it names are complete, and files left incomplete by a lost
connection are never read. Only a picture may be written over another: what `mirror.json` names stays as it is
until the next one names something else, wherever the copying is interrupted. So bytes without the stated hash
are damaged, and are never taken (`pull`). `mirror.json` may name only these files, whoever wrote it.

A process of its own copies the files, so that a training step does not wait for a server that hangs. It ends
when its parent closes its standard input or dies.

    TUCODEC_MIRROR=URL python -m lightning_tucodec.training.beside.mirror RUN_FOLDER
"""

import hashlib
import io
import json
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

from lightning_tucodec.errors import DatasetError, one_line, redacted
from lightning_tucodec.io.storage import Storage
from lightning_tucodec.training.beside.companions import wait
from lightning_tucodec.training.runs.folder import MANIFEST, RunFolder
from lightning_tucodec.training.runs.weights import CHECKPOINTS

INDEX = "mirror.json"
POLL_SECONDS = 2.0
"""Pause between two looks at the run folder."""

SMALL = ("metrics.jsonl", MANIFEST, "config.yaml")
"""Files that change while a run trains."""

_PICTURE = re.compile(r"images/step-\d{8}[^/\0]*\.(png|json)")
_CHANGING = re.compile(r"(metrics|manifest|config)(-[0-9a-f]{16})?\.(jsonl|json|yaml)")
_GENERATIONS = 2


Progress = tuple[int, int]
"""Steps and images of a state; a GAN's discriminator learns between two steps of its codec."""


def mirror_of(folder: RunFolder, url: str) -> Storage:
    """The folder of a run's copy."""
    return Storage(f"{url.rstrip('/')}/{folder.path.name}")


def read_index(folder: RunFolder, url: str) -> dict[str, Any]:
    """What the mirror of a run holds; empty when there is none.

    Raises:
        DatasetError: the storage cannot be reached, or the index is damaged or names what no mirror holds.
    """
    storage = mirror_of(folder, url)
    try:
        index: dict[str, Any] = json.loads(storage.read(INDEX))
        problem = _problem(index)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        problem = one_line(error)
    if problem:
        raise DatasetError(f"{storage.path(INDEX)}: damaged ({problem}); remove the mirror")
    return index


def _mirrored(name: str) -> bool:
    """Whether a file of a run folder, besides its checkpoints, belongs to the mirror."""
    return name in SMALL or _PICTURE.fullmatch(name) is not None


def _problem(index: dict[str, Any]) -> str | None:
    """Refuse impossible values: names become paths."""
    for name, entry in index["files"].items():
        if not _mirrored(name) or entry["name"] not in (_stored(name, entry["sha256"]), name):
            return f"{entry['name']!r} as {name!r}"
    for entry in index["checkpoints"]:
        if entry["name"] not in (_checkpoint(entry["step"], entry["sha256"]), _old(entry["step"])):
            return f"{entry['name']!r} as step {entry['step']}"
    for entry in (*index["files"].values(), *index["checkpoints"]):
        numbers = (entry["size"], entry.get("images", 0))
        if any(type(number) is not int for number in numbers) or not re.fullmatch(
            "[0-9a-f]{64}", entry["sha256"]
        ):
            return f"{entry['name']} has no size, images or SHA-256"
    return None


def _checkpoint(step: int, sha256: str) -> str:
    """The name of a checkpoint in a mirror: of its content, as a GAN has two states at one step."""
    return f"checkpoints/step-{step:08d}-{sha256[:16]}.ckpt"


def _stored(name: str, sha256: str) -> str:
    """Name in a mirror of a file that changes while a run trains; earlier versions kept its own."""
    stem, _, suffix = name.partition(".")
    return f"{stem}-{sha256[:16]}.{suffix}" if name in SMALL else name


def _old(step: int) -> str:
    """Name in mirrors of earlier versions."""
    return f"checkpoints/step-{step:08d}.ckpt"


def progress(entry: dict[str, Any]) -> Progress:
    """Step and images of a checkpoint in an index; earlier versions wrote no number of images."""
    return entry["step"], entry.get("images", 0)


def _names(index: dict[str, Any]) -> set[str]:
    """Names of all files in an index."""
    return {entry["name"] for entry in (*index["checkpoints"], *index["files"].values())}


class Mirror:
    """Copies what has changed since the last time.

    Args:
        folder: of the run.
        url: parent of all mirrored runs.
    """

    def __init__(self, folder: RunFolder, url: str) -> None:
        self.folder = folder
        self.storage = mirror_of(folder, url)
        self.index = read_index(folder, url) or {"checkpoints": [], "files": {}}
        self._seen: dict[str, tuple[int, int]] = {}
        self._caught_up = False
        self._published = False
        self._former = _names(self.index)

    def push(self) -> bool:
        """Copy once; returns whether anything had changed.

        The newest checkpoint goes first and the metrics after it, so that they reach at least as far.
        """
        if self._behind():
            return False
        changed = self._push_all()
        if changed:
            if self._published and self.storage.size(INDEX) is None:
                # Somebody has removed the copy; what was copied before is not there any more.
                self._seen.clear()
                self.index = {"checkpoints": [], "files": {}}
                self._push_all()
            self.storage.write(INDEX, json.dumps(self.index, indent=1).encode())
            self._published = True
            self._prune()
        return changed

    def _push_all(self) -> bool:
        changed = self._push_checkpoint()
        names = list(SMALL)
        names += [f"images/{p.name}" for p in sorted(self.folder.images.glob("step-*"))]
        for name in filter(_mirrored, names):
            changed |= self._push_file(name)
        return changed

    def _behind(self) -> bool:
        """Whether the mirror holds more than this run has reached so far; then it stays as it is."""
        there = [progress(entry) for entry in self.index["checkpoints"]]
        if not there or self._caught_up:
            return False
        try:
            own = _progress_of((self.folder.checkpoints / CHECKPOINTS[0]).read_bytes())
        except FileNotFoundError:
            own = None
        self._caught_up = own is not None and own >= max(there)
        return not self._caught_up

    def _push_checkpoint(self) -> bool:
        path = self.folder.checkpoints / CHECKPOINTS[0]
        stamp = self._changed(path)
        if stamp is None:
            return False
        with open(path, "rb") as stream:  # a rename while we read does not take it away
            data = stream.read()
        own = _progress_of(data)
        if own is None:
            return False
        digest = hashlib.sha256(data).hexdigest()
        entry = self._put(_checkpoint(own[0], digest), data, digest)
        older = [e for e in self.index["checkpoints"] if progress(e) < own]
        newest = {"step": own[0], "images": own[1], **entry}
        self.index["checkpoints"] = [newest, *older][:_GENERATIONS]
        self._seen[str(path)] = stamp
        return True

    def _push_file(self, name: str) -> bool:
        path = self.folder.path / name
        stamp = self._changed(path)
        if stamp is None:
            return False
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        self.index["files"][name] = self._put(_stored(name, digest), data, digest)
        self._seen[str(path)] = stamp
        return True

    def _put(self, name: str, data: bytes, sha256: str) -> dict[str, Any]:
        self.storage.write(name, data)
        return {"name": name, "size": len(data), "sha256": sha256}

    def _changed(self, path: Path) -> tuple[int, int] | None:
        """Time and inode of a file that is new since it was copied; None otherwise."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        stamp = (status.st_mtime_ns, status.st_ino)
        return None if self._seen.get(str(path)) == stamp else stamp

    def _prune(self) -> None:
        """Remove what is no longer named; small files one push later, since somebody may be reading them."""
        named = _names(self.index)
        for name, _ in self.storage.files():
            old = name.startswith("checkpoints/") or (
                _CHANGING.fullmatch(name) and name not in self._former
            )
            if old and name not in named:
                self.storage.remove(name)
        self._former = named


class _Nothing:
    """Placeholder of every class in a checkpoint when only its step is read."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler of dictionaries and numbers; it runs nothing else that a pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        return _Nothing

    def persistent_load(self, pid: Any) -> None:
        return None


def _progress_of(data: bytes) -> Progress | None:
    """How far a checkpoint is, without PyTorch; None when it is damaged."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
            content = _PlainUnpickler(io.BytesIO(archive.read(name))).load()
        own = content["tucodec"]
        return int(own["opt_step"]), int(own.get("images_seen", 0))
    except (
        zipfile.BadZipFile, pickle.UnpicklingError, KeyError, ValueError, TypeError, AttributeError, EOFError,
    ):  # fmt: skip
        return None


def follow(folder: RunFolder, url: str) -> bool:
    """Push until standard input is closed, then once more; an error is printed once, until it changes.

    Returns:
        Whether the last push went well.
    """
    mirror: Mirror | None = None
    said = ""
    last_time = False
    while True:
        try:
            mirror = mirror or Mirror(folder, url)
            mirror.push()
            if said:
                print(f"tucodec: mirror {redacted(url)}: works again", file=sys.stderr, flush=True)
            said = ""
        except Exception as error:  # whatever a storage does, the run goes on
            text = " ".join(str(error).split()) or type(error).__name__
            if text != said:
                print(redacted(f"tucodec: mirror {url}: {text}"), file=sys.stderr, flush=True)
            said = text
        if last_time:
            return not said
        last_time = wait(POLL_SECONDS)


if __name__ == "__main__":
    sys.exit(not follow(RunFolder(Path(sys.argv[1])), os.environ["TUCODEC_MIRROR"]))
