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

from lightning_tucodec.training.companions import SIGNALS

PREEMPTED = 75
"""Exit status of a run that saved itself and wants to be started again (sysexits' EX_TEMPFAIL)."""


class Preemption(pl.Callback):
    """Stops the trainer between two batches once any rank was told to stop.

    A context manager: inside it the signals are ours, from before the set-up to after the last save.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.stopping = False
        self._previous: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()
        self._group: Any = None

    def __enter__(self) -> "Preemption":
        """Take the signals."""
        self._owner = os.getpid()
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            os._exit(0)  # a loader worker; its parent decides
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice at the keyboard: now
        self.received = signal.Signals(number)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Open a line between the ranks that does not wait for a GPU."""
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")

    def agree(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank; called on all ranks at the same place."""
        if self._group is None:
            return list(flags)
        values = torch.tensor([int(flag) for flag in flags])
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, self._group)
        return [bool(value) for value in values]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on all ranks."""
        if self._group is None:
            return [value]
        values = [None] * torch.distributed.get_world_size(self._group)
        torch.distributed.all_gather_object(values, value, self._group)
        return values

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A signal may have come during the set-up."""
        (self.stopping,) = self.agree(self.received is not None)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Stop here, not in `on_train_batch_end`, where Lightning would validate and log once more.

        Raises:
            StopIteration: which ends Lightning's loop over the batches.
        """
        if self.stopping:
            trainer.should_stop = True
            raise StopIteration
