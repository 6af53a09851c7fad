"""A training step alone: Lightning's trainer without any extras, and a clock for its steps."""

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.environments import LightningEnvironment

from lightning_tucodec.bench.timing import synchronise


class Clock(pl.Callback):
    """Times steps, with the device's queue empty at both ends.

    Args:
        device: of the training.
        warm: steps at the start that do not count.
        steps: steps that count.

    Attributes:
        seconds: of one step; None before all have been made.
    """

    def __init__(self, device: str, warm: int, steps: int) -> None:
        self.device, self.warm, self.steps = device, warm, steps
        self.seconds: float | None = None
        self._done, self._began = 0, 0.0

    def tick(self) -> None:
        """A step was enqueued."""
        self._done += 1
        if self._done == self.warm:
            synchronise(self.device)
            self._began = time.perf_counter()
        if self._done == self.warm + self.steps:
            synchronise(self.device)
            self.seconds = (time.perf_counter() - self._began) / self.steps

    def on_train_batch_end(self, *args: Any) -> None:
        """Lightning's."""
        self.tick()


def bare_trainer(device: str, steps: int, precision: Any, **options: Any) -> pl.Trainer:
    """A trainer on one device without logger, checkpoints, progress bar or validation.

    Args:
        device: "cpu" or "cuda".
        steps: at most.
        precision: Lightning's.
        options: more of `Trainer`.
    """
    return pl.Trainer(
        accelerator="gpu" if device.startswith("cuda") else "cpu", devices=1, precision=precision,
        max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, plugins=[LightningEnvironment()], **options,
    )  # fmt: skip
