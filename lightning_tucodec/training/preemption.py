"""One owner of signals: USR1, TERM and INT set a flag, and the run saves at the end of the batch.

Saving inside a signal handler hangs or corrupts now and then (lessons 34), so the handler only
remembers. Loader workers inherit handlers; the process id tells them apart.
"""

import os
import signal
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch

PREEMPTED = 75
"""Exit status of a run that saved itself and wants to be started again (sysexits' EX_TEMPFAIL)."""

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class Preemption(pl.Callback):
    """Stops the trainer after the batch in which a signal came; all ranks agree on the batch.

    `stopping` is set at the end of that batch, for `Checkpointing` to save. The module skips the next batch.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.stopping = False
        self._previous: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            os._exit(0)  # a loader worker; its parent decides
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice at the keyboard: now
        self.received = signal.Signals(number)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers; earlier Lightning would put its own in their place."""
        self._owner = os.getpid()
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Find out whether any rank was told to stop."""
        self.stopping = self.received is not None
        if trainer.world_size > 1:
            flag = torch.tensor(float(self.stopping), device=pl_module.device)
            self.stopping = bool(trainer.strategy.reduce(flag, reduce_op="sum") > 0)
        if self.stopping:
            self.received = self.received or signal.SIGUSR1

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Stop here, not in `on_train_batch_end`, where Lightning would validate and log once more."""
        if self.stopping:
            trainer.should_stop = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
