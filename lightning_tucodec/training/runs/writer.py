"""Checkpoints written in the background, renamed when their step is complete.

A save has three parts. At the end of a batch all tensors are copied; training waits only for this copy. A
thread writes the copy to `saving.ckpt` and flushes it to disk. When the step's metric lines and validation
are written as well, the thread renames: last becomes previous, saving becomes last. So every
checkpoint on disk has complete metrics, and a kill at any moment leaves at least one.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from lightning_tucodec.errors import TucodecError
from lightning_tucodec.training.runs.folder import RunFolder
from lightning_tucodec.training.runs.manifest import Manifest
from lightning_tucodec.training.runs.staging import stage
from lightning_tucodec.training.runs.weights import CHECKPOINTS, load_checkpoint


class SaveError(TucodecError):
    """A checkpoint could not be written; the earlier ones are intact."""


class CheckpointReader(TorchCheckpointIO):
    """Lightning's reader of checkpoints; see `hand_over`."""

    def __init__(self) -> None:
        self._read: tuple[Path, dict[str, Any]] | None = None

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """See `load_checkpoint`; what was handed over is not read again."""
        handed, self._read = self._read, None
        if handed is not None and handed[0] == Path(path):
            return handed[1]
        return load_checkpoint(path)

    def hand_over(self, path: Path, content: dict[str, Any]) -> None:
        """What the next `load_checkpoint` of this path returns: each rank reads a checkpoint once."""
        self._read = path, content


class BackgroundWriter(CheckpointReader):
    """Lightning's checkpoint writer of rank 0: copy now, write in a thread, rename on `publish`.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self.folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._future: Future[None] | None = None
        self._complete = threading.Event()
        self._abandoned = False

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._future is not None and not self._future.done()

    @property
    def failed(self) -> bool:
        """Whether the last save went wrong; `settle` says how."""
        future = self._future
        return future is not None and future.done() and future.exception() is not None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Copy all tensors and start writing."""
        self.settle()
        self._complete.clear()
        self._future = self._thread.submit(self._write, *stage(checkpoint), Path(path))

    def publish(self) -> None:
        """The step of the last save has all its metric lines: its checkpoint may be found."""
        self._complete.set()

    def settle(self) -> None:
        """Wait until the last save is published.

        Raises:
            SaveError: it went wrong.
        """
        if self._future is not None:
            self.publish()
            self._future.result()

    def drop(self) -> None:
        """Forget the last save if it is not published."""
        if self._future is not None and not self._complete.is_set():
            self._abandoned = True
            self.settle()
            self._abandoned = False

    def _write(self, checkpoint: dict[str, Any], complete: Callable[[], None], path: Path) -> None:
        complete()
        step = int(checkpoint["tucodec"]["opt_step"])
        aside = self.folder.checkpoints / "saving.ckpt"
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            torch.save(checkpoint, aside)
            _flush(aside)
            self._complete.wait()
            if self._abandoned:
                aside.unlink()
                return
            if Manifest(self.folder).overtaken():
                aside.unlink()
                raise SaveError(f"{path}: not saved, the run goes on in another job")
            if self.folder.metrics.exists():
                _flush(self.folder.metrics)
            last, previous = (self.folder.checkpoints / name for name in CHECKPOINTS)
            if path == last and last.exists():
                os.replace(last, previous)
            os.replace(aside, path)
            _flush(path.parent)
        # The zip writer of PyTorch turns "disk full" into a RuntimeError.
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise SaveError(
                f"{path}: step {step} could not be saved ({_reason(error, path.parent)}); earlier "
                "checkpoints are intact: make room and start the same command again"
            ) from None

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint. Lightning does not call this here, because saves rename two generations."""
        Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        """End the thread; a save whose step was never completed is dropped."""
        self._abandoned = True
        self._complete.set()
        self._thread.shutdown(wait=True)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception, folder: Path) -> str:
    text = (getattr(error, "strerror", None) or str(error).strip().splitlines()[0])[:120]
    with contextlib.suppress(OSError):
        text += f", {shutil.disk_usage(folder).free // 2**20} MiB free on this disk"
    return text
