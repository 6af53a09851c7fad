"""Where metrics go: an append-only JSONL file is the reference; W&B (`wandb_view`) is a view of it.

A line is `{"opt_step": …, "images_seen": …, "time": …, "train/loss": …}`.
"""

import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from lightning_tucodec.errors import TucodecError
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.training.runs.folder import read_metrics


class JsonlLogger(Logger):
    """Appends every logged dictionary to `metrics.jsonl`, one line each, flushed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.counters: dict[str, int] = {"opt_step": 0, "images_seen": 0}

    @rank_zero_only
    def go_on_from(self, counters: dict[str, int], lines: int | None = None) -> None:
        """Drop the lines after the place that the run goes on from: they will be written again.

        A line that a kill has cut short goes as well, or else the next one would be glued to it.

        Args:
            counters: `opt_step` and `images_seen` there; either may stand still while the other moves.
            lines: how many there were; None: whatever belongs to the last step is complete.
        """
        kept = [
            row
            for row in read_metrics(self.path)[:lines]
            if all(row.get(name, 0) <= reached for name, reached in counters.items())
        ]
        self.counters = dict(counters)
        text = "".join(json.dumps(row) + "\n" for row in kept)
        if self.path.exists() and self.path.read_bytes() != text.encode():
            with atomic_write(self.path, "w") as stream:
                stream.write(text)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def name(self) -> str:
        """Name of this kind of logger."""
        return "jsonl"

    @property
    def version(self) -> str:
        """The run folder's name."""
        return self.path.parent.name

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """The config is a file of the run folder; nothing to do."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line.

        Raises:
            TucodecError: the disk takes no more.
        """
        values = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        if values:
            row = {**self.counters, "time": round(time.time(), 3), **values}
            try:
                with open(self.path, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
            except OSError as error:
                raise TucodecError(
                    f"{self.path}: {error.strerror}; checkpoints are intact: make room and start "
                    "the same command again"
                ) from None


class Counters(pl.Callback):
    """Gives the log our own counters."""

    def __init__(self, log: JsonlLogger) -> None:
        self.rows = log

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """The next lines belong to the step that was just done."""
        self.rows.counters = {
            "opt_step": pl_module.opt_step,
            "images_seen": pl_module.images_seen,
        }
