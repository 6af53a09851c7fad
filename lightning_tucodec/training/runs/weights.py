"""Weights in files: the checkpoints of runs, and what a run starts from.

PyTorch is imported only when a checkpoint is read, so that commands that only list runs are fast.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tucodec.codecs.base import MODEL_SUFFIX
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.once import once

if TYPE_CHECKING:
    import torch

CHECKPOINTS = ("last.ckpt", "previous.ckpt")
"""Two generations: a save renames last to previous before the new file takes its name."""

_ZIP = b"PK\x03\x04"


def initial_weights(source: str) -> Path:
    """The file that `run.init_from` means: a checkpoint, a run folder, an exported model, a model's name.

    Raises:
        UnknownModelError: a name that no model has.
        ConfigError: a URL.
    """
    path = Path(source)
    if "://" in source:
        raise ConfigError(f"{source}: weights are read from files here, not from URLs")
    if path.is_dir():
        found = [path / "checkpoints" / name for name in CHECKPOINTS]
        return next((file for file in found if file.exists()), found[0])
    if path.exists() or path.suffix or os.sep in source:
        return path
    from lightning_tucodec.codecs.library import find

    return find(source)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Content of a checkpoint, on the CPU, plain types and tensors only.

    Raises:
        ConfigError: it is missing, damaged, or holds something else.
    """
    return _load(path, mapped=False)


def _load(path: str | Path, mapped: bool) -> dict[str, Any]:
    import torch

    with _opened(path) as stream:
        start = stream.read(len(_ZIP))
    if start not in (_ZIP, b""):  # of which PyTorch would say how to load it unsafely
        raise ConfigError(
            f"{path}: neither a checkpoint of a run (last.ckpt) nor an exported model ({MODEL_SUFFIX})"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        content["tucodec"]["opt_step"], content["state_dict"]
    # torch.load has no error of its own: zip, pickle and type errors all mean the same here.
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ConfigError(f"{path}: damaged, or not a checkpoint ({reason[0][:200]})") from None
    return dict(content)


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[BufferedReader]:
    """A file; devices and pipes may have no end.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ConfigError(f"{path}: not a file")
        with open(path, "rb") as stream:
            yield stream
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None


def network_weights(checkpoint: dict[str, Any]) -> "dict[str, torch.Tensor]":
    """State of the codec or post-filter inside a checkpoint of `fit`, by the network's own names.

    If the checkpoint has an average of the weights, the average is returned.
    """
    averaged = any(name.startswith("averaged.") for name in checkpoint["state_dict"])
    prefix = "averaged." if averaged else "network."
    return {
        name.removeprefix(prefix): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }


def load_trained(
    network: "torch.nn.Module", weights: "dict[str, torch.Tensor]", source: Path
) -> None:
    """Give a network the weights of a file; its tables, empty until they are made, stay as they are.

    Raises:
        ConfigError: they are of another network; names the first that differs.
    """
    own = network.state_dict()
    trained = {name: value for name, value in own.items() if value.numel()}
    differing = [
        name
        for name, value in trained.items()
        if name not in weights or weights[name].shape != value.shape
    ]
    if differing := [*differing, *sorted(weights.keys() - own.keys())]:
        raise ConfigError(f"{source}: weights of another network (differs in {differing[0]}, …)")
    network.load_state_dict({**own, **{name: weights[name] for name in trained}})


def weights_sha256(path: Path) -> str:
    """What tells the weights in a file from others; read once, as long as the file stays as it is.

    Of a checkpoint that is the SHA-256 of the names, types, shapes and values of its `state_dict`, from
    which every module takes its start: the bytes of the file differ after a resume, in how Python writes
    equal texts and in Lightning's counters. Of any other file it is the SHA-256 of its bytes.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    return _sha256(path.absolute(), found.st_ino, found.st_size, found.st_mtime_ns)


@once
def _sha256(path: Path, inode: int, size: int, modified_ns: int) -> str:
    if path.suffix != MODEL_SUFFIX:
        # What another kind of file may be, the module that reads it knows.
        with contextlib.suppress(ConfigError, TypeError):
            return _content_sha256(_load(path, mapped=True)["state_dict"])
    with _opened(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _content_sha256(state: "dict[str, torch.Tensor]") -> str:
    """SHA-256 of tensors, in order of their names.

    Raises:
        TypeError: a value is no plain tensor.
    """
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise TypeError(name)
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
