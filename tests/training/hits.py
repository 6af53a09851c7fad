"""Runs in forked processes, so that they can be killed without killing the test."""

import copy
import hashlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_tucodec.cli import main
from lightning_tucodec.training.module import TrainingModule
from lightning_tucodec.training.runs import writer
from lightning_tucodec.training.vae import VAE


def start(words: list[str], prepare: Callable[[], None] | None = None) -> int:
    """`tucodec …` in a child that begins with `prepare`; its process id.

    The child has one thread: OpenMP's threads are not forked, and GCC's library does not know that. A layer
    that it shared out among them would wait for ever or write into the memory of one that is gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 99
    torch.set_num_threads(1)
    try:
        if prepare is not None:
            prepare()
        status = main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(pid: int) -> int:
    """Exit status of a child; −9 when it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_step(step: int, action: Callable[[], None]) -> Callable[[], None]:
    """Do something in the middle of an optimiser step, before it is counted."""

    def prepare() -> None:
        original = TrainingModule.count_step

        def count_step(self: TrainingModule) -> None:
            if self.opt_step == step:
                action()
            original(self)

        TrainingModule.count_step = count_step  # type: ignore[method-assign]

    return prepare


def kill_at_step(step: int) -> Callable[[], None]:
    """SIGKILL in the middle of an optimiser step."""
    return at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def kill_at_rename(number: int) -> Callable[[], None]:
    """SIGKILL just before the given rename of the checkpoint writer (two a save from the second on)."""

    def prepare() -> None:
        count = 0

        class Counting:
            @staticmethod
            def replace(source: Any, target: Any) -> None:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                os.replace(source, target)

            def __getattr__(self, name: str) -> Any:
                return getattr(os, name)

        writer.os = Counting()  # type: ignore[assignment]

    return prepare


def full_disk_at_step(step: int, limit: int) -> Callable[[], None]:
    """From an optimiser step on no file of this process grows beyond `limit` bytes."""

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return at_step(step, fill)


def note_samples(path: Path) -> Callable[[], None]:
    """Append to a file what each optimiser step is given: [step, {position: digest of the crop}]."""

    def prepare() -> None:
        original = VAE.training_step

        def training_step(self: VAE, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            crops = {
                int(index): hashlib.sha256(image.numpy().tobytes()).hexdigest()
                for index, image in zip(batch["index"], batch["image"].contiguous(), strict=True)
            }
            with open(path, "a") as stream:
                stream.write(json.dumps([self.opt_step, crops]) + "\n")
            return original(self, batch, batch_idx)

        VAE.training_step = training_step  # type: ignore[method-assign]

    return prepare


def note_reads(path: Path) -> Callable[[], None]:
    """Append to a file the name of each checkpoint that is read whole."""

    def prepare() -> None:
        original = torch.load

        def load(file: Any, **options: Any) -> Any:
            if isinstance(file, str | Path):  # not what ranks tell each other
                with open(path, "a") as stream:
                    stream.write(f"{Path(file).name}\n")
            return original(file, **options)

        torch.load = load

    return prepare


def rank_of(rank: int, world: int, port: int) -> Callable[[], None]:
    """Make the child one rank of several, as torchrun would."""

    def prepare() -> None:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), NODE_RANK="0",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TUCODEC_ATTEMPT=f"{port}",
            GLOO_SOCKET_IFNAME="lo",
        )  # fmt: skip
        pl.utilities.rank_zero_only.rank = rank  # type: ignore[attr-defined]  # it was read when Lightning was imported

    return prepare


class Duel(TrainingModule):
    """Two optimisers in manual optimisation, and noise from the global generators."""

    optimizers_a_step = 2

    def __init__(self, width: int = 4, lr: float = 0.01) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first = torch.nn.Linear(3, width)
        self.second = torch.nn.Linear(width, 3)
        self.lr = lr

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), self.lr) for part in (self.first, self.second)]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        x = batch["image"].mean((2, 3))
        x = x + torch.randn_like(x)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            loss = (self.second(self.first(x)) - x).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.images_seen += len(x) * self.trainer.world_size
        self.count_step()
        self.log("train/loss", loss.detach())

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Lightning asks for one where there are images."""

    def describe(self) -> dict[str, Any]:
        return {"width": self.first.out_features}


class Averaged(TrainingModule):
    """A user's module: its average moves in the last hook of a batch, and even validation draws numbers."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)
        self.average = copy.deepcopy(self.layer).requires_grad_(False)
        self.batches = 0

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.layer.parameters(), 0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = batch["image"].mean((2, 3))
        loss = (self.layer(x + torch.randn_like(x)) - x).square().mean()
        self.images_seen += len(x)
        self.log("train/loss", loss)
        return loss

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1
        for own, other in zip(self.average.parameters(), self.layer.parameters(), strict=True):
            own.lerp_(other, torch.rand(()))

    def on_validation_epoch_start(self) -> None:
        self.rows: list[dict[str, float]] = []

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.rows.append({"index": int(batch["index"]), "seen": float(self.average.bias.sum())})
        torch.rand(3)

    def on_validation_epoch_end(self) -> None:
        rows = self.rows_of_all_ranks(self.rows)
        self.keep_rows(rows)
        self.log("val/seen", sum(row["seen"] for row in rows) / len(rows))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["tucodec"]["batches"] = self.batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.batches = checkpoint["tucodec"]["batches"]
