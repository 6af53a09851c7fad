"""A run's folder: its files, its lock, and its newest checkpoint.

It is `<runs_dir>/<name>-<run_id>`, run_id a hash of everything that decides the result. The same config finds
the same folder and resumes there, without a further option.
"""

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.files import check_name, read_json_lines
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.quality.curves import decibels
from lightning_tucodec.training.runs.identity import (
    run_id,
    without_credentials,
)
from lightning_tucodec.training.runs.weights import CHECKPOINTS, load_checkpoint

MANIFEST = "manifest.json"
_OWN_START = 120.0  # seconds to wait for whoever still holds the folder


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file, without those that a kill cut short or of another kind."""
    rows = read_json_lines(path)
    return [row for row in rows if isinstance(row, dict) and type(row.get("opt_step")) is int]


def validation_point(rows: Sequence[dict[str, Any]]) -> tuple[float, float, float | None] | None:
    """bpp, PSNR and MS-SSIM in dB of the last validation; real files where they were written.

    Args:
        rows: lines of `metrics.jsonl`.
    """
    for row in reversed(rows):
        bpp, psnr = row.get("val/real_bpp", row.get("val/bpp")), row.get("val/psnr")
        if bpp is not None and psnr is not None:
            similarity = row.get("val/ms_ssim")
            in_decibels = None if similarity is None else float(decibels(similarity))
            return float(bpp), float(psnr), in_decibels
    return None


class RunFolder:
    """The folder of one run: config.yaml, manifest.json, metrics.jsonl, checkpoints/, images/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.images = path / "images"

    @classmethod
    def of(cls, config: dict[str, Any]) -> "RunFolder":
        """The folder that this config always gets.

        Raises:
            ConfigError: `run.name` is no name; and see `identity`.
        """
        name = f"{check_name(config['run']['name'], 'run.name')}-{run_id(config)}"
        return cls(Path(config["run"]["runs_dir"]) / name)

    def write_config(self, config: dict[str, Any]) -> None:
        """Leave the fully resolved config, without credentials, beside the results."""
        with atomic_write(self.path / "config.yaml", "w") as stream:
            yaml.safe_dump(without_credentials(config), stream, sort_keys=False, allow_unicode=True)

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """Newest checkpoint that loads, with its content; None when there is none to go on from.

        A damaged one is named on stderr, and the generation before it is taken.
        """
        for name in CHECKPOINTS:
            path = self.checkpoints / name
            if path.exists():
                try:
                    return path, load_checkpoint(path)
                except ConfigError as error:
                    print(f"tucodec: {error}; trying an older one", file=sys.stderr, flush=True)
        return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder; the kernel drops the lock of the dead.

        A run that is refused before it begins leaves no folder.

        Raises:
            ConfigError: another one does not end.
        """
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock():
            try:
                yield
            finally:
                if not (self.path / MANIFEST).exists():
                    self._remove(missing)

    def _remove(self, folders: Sequence[Path]) -> None:
        """Take a folder away in which nothing has begun, and parents that were made for it."""
        with contextlib.suppress(OSError):
            if any(path.name not in (".lock", "checkpoints") for path in self.path.iterdir()):
                return
            if self.checkpoints.exists():
                self.checkpoints.rmdir()
            (self.path / ".lock").unlink()
            for path in folders or (self.path,):
                path.rmdir()

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        deadline = time.monotonic() + _OWN_START
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.path / ".lock", "a+", encoding="utf-8") as stream:
                if self._acquire(stream, deadline):
                    yield
                    return

    def _acquire(self, stream: TextIO, deadline: float) -> bool:
        """Whether the lock is ours; not if its last holder has taken the file away with the folder."""
        told = False
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                holder = stream.read().strip() or "another process"
                left = deadline - time.monotonic()
                if left < 0:
                    raise ConfigError(
                        f"{self.path}: {holder} trains this run; stop it first, or change the config"
                    ) from None
                if not told:
                    told = True
                    print(
                        f"run {self.path}: waits for {holder}, which trains it, at most {left:.0f} s",
                        file=sys.stderr,
                        flush=True,
                    )
                time.sleep(0.5)
            except OSError:  # a file system without locks
                return True
            else:
                if os.fstat(stream.fileno()).st_nlink == 0:
                    return False
                stream.truncate(0)
                stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                stream.flush()
                return True
