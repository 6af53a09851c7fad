"""One owner of signals: USR1, TERM and INT set a flag, and the run saves at the end of the batch.

Saving inside a signal handler can hang or corrupt state, so the handler only sets the flag. Loader
workers inherit the handlers; the process id distinguishes them from the training process.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_tucodec.errors import TucodecError
from lightning_tucodec.training.beside.companions import SIGNALS
from lightning_tucodec.training.runs.manifest import PREEMPTED

FAILED = 200
"""Added to the status of a process that failed by itself beside others in a step of Slurm."""

_PEER_SECONDS = 30.0
"""How long after the death of one process srun's TERM may take to reach the others."""


def several_processes() -> bool:
    """Whether this is one process of several in a Slurm step."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def in_step(run: Callable[[], int], preemption: "Preemption") -> int:
    """The exit status of one process of a Slurm step.

    srun ends with the highest status of all processes. Once one has ended with another than 0, it sends TERM
    to the others and later KILL (143, 137), so whoever failed by itself must come out above those. An error
    of ours is such a failure. Any other may only say that the connection to a dead process is gone: then TERM
    is on its way. It must not kill a process that has saved itself either: the signals stay ours until the
    status is known and are ignored from then on, because Python gives handlers back while it ends.

    Args:
        run: what the process does; returns a status.
        preemption: knows whether it was told to stop.
    """
    if not several_processes():
        return run()
    preemption.__enter__()
    try:
        status = run()
    except TucodecError as error:
        print(f"tucodec: {error}", file=sys.stderr)
        status = 1
    except Exception:
        preemption.begun = True  # from here on a signal is an answer, also to a set-up that failed
        traceback.print_exc()
        status = PREEMPTED if preemption.is_echo() else 1
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return status if status in (0, PREEMPTED) else FAILED + status


class ImageAbandoned(BaseException):
    """A signal came in the middle of a validation image; no error, so that no `except Exception` hides it."""


class ValidationStopped(Exception):
    """A signal came during a validation: the run is saved and goes on with that validation."""


class SetupStopped(BaseException):
    """A signal came before this attempt had begun: nothing is to be saved, nobody waits for this process."""


class Preemption(pl.Callback):
    """Stops the trainer between two batches once any rank was told to stop.

    A context manager: inside it the signals are ours, from before the set-up to after the last save.

    Attributes:
        begun: this attempt is in the manifest, or other processes count on this one. Before that a signal
            raises SetupStopped: a server that does not answer may be waited for.
        received: the signal that this rank was sent.
        stopping: the one that all ranks have agreed to stop for.
        owes_validation: they stopped in a validation.
    """

    def __init__(self) -> None:
        self.begun = "TUCODEC_ATTEMPT" in os.environ  # Lightning has started this rank
        self.received: signal.Signals | None = None
        self.stopping: signal.Signals | None = None
        self.owes_validation = False
        self._previous: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()
        self._group: Any = None
        self._deadline: float | None = None

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
        if not self.begun:
            raise SetupStopped

    @contextlib.contextmanager
    def abandoning(self) -> Iterator[None]:
        """In this block a signal abandons this rank's work before the next layer of a network.

        Raises:
            ImageAbandoned: that has happened.
        """

        def look(*_: Any) -> None:
            if self.received is not None:
                raise ImageAbandoned

        hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
        try:
            yield
        finally:
            hook.remove()

    def is_echo(self) -> bool:
        """Whether an error only says that another process of the step has ended, which srun confirms by TERM.

        Waits for that; asked again, it answers at once.
        """
        self._deadline = self._deadline or time.monotonic() + _PEER_SECONDS
        while self.received is None and time.monotonic() < self._deadline:
            time.sleep(0.1)
        return self.received is not None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Open a connection between the ranks that does not wait for a GPU."""
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")

    def agree(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank; called on all ranks at the same place.

        They agree as well whether to stop: `stopping`.
        """
        values = torch.tensor([self.received or 0, *flags], dtype=torch.int64)
        if self._group is not None:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, self._group)
        number, *agreed = values.tolist()
        self.stopping = signal.Signals(number) if number else None
        return [bool(flag) for flag in agreed]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on all ranks."""
        if self._group is None:
            return [value]
        values = [None] * torch.distributed.get_world_size(self._group)
        torch.distributed.all_gather_object(values, value, self._group)
        return values

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A signal may have come during the set-up."""
        self.agree()

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
