"""One attempt of a run, from the lock of its folder to the last entry in its manifest."""

import contextlib
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from lightning_tucodec.errors import DatasetError, redacted
from lightning_tucodec.training.beside.companions import UNMIRRORED, Companion
from lightning_tucodec.training.beside.pull import check_writable, pull
from lightning_tucodec.training.beside.wandb_view import mode
from lightning_tucodec.training.data import check_crop_size, check_validation
from lightning_tucodec.training.module import TrainingModule
from lightning_tucodec.training.runs.folder import RunFolder
from lightning_tucodec.training.runs.identity import identity
from lightning_tucodec.training.runs.launcher import attempt_key
from lightning_tucodec.training.runs.manifest import ECHO, PREEMPTED, Manifest
from lightning_tucodec.training.runs.preemption import Preemption, several_processes

_MIRROR_SECONDS = {"finished": 900.0, "preempted": 60.0, "failed": 60.0}
"""How long the last copy to the mirror may take; before a requeue there is little time."""

_WANDB_SECONDS = {"online": 20.0, "offline": 120.0, "disabled": 20.0}
"""How long W&B may take at the end; what it misses, `tucodec wandb-sync` sends."""


class Attempt:
    """What surrounds a training: what it goes on from, its entry in the manifest, the processes beside it.

    Args:
        config: resolved.
        folder: of the run.
        model: counts the steps.
        preemption: knows about signals.
        cleanup: what it holds is ended by the attempt's own last acts.

    Attributes:
        resume: the checkpoint to go on from, with its content; None where there is none, or it is in use.
        unmirrored: the end of the run did not reach its mirror.
    """

    def __init__(
        self,
        config: dict[str, Any],
        folder: RunFolder,
        model: TrainingModule,
        preemption: Preemption,
        cleanup: contextlib.ExitStack,
    ) -> None:
        self.config, self.folder, self.model = config, folder, model
        self.preemption, self.cleanup = preemption, cleanup
        self.resume: tuple[Path, dict[str, Any]] | None = None
        self.unmirrored = False
        self._outcome = "finished"
        self._mirror: Companion | None = None
        self._wandb: Companion | None = None

    def begin(self, trainer: pl.Trainer) -> None:
        """Find what to go on from; rank 0 first, who announces the attempt to the others.

        Raises:
            ConfigError: the folder is in use or belongs to another configuration.
        """
        config, folder = self.config, self.folder
        manifest = Manifest(folder)
        if not trainer.is_global_zero:
            manifest.wait_for_rank_0(lambda: self.preemption.received is not None)
            self.preemption.begun = True
            self.resume = folder.latest()
            return
        if attempt_key() is None:  # the ranks that Lightning starts inherit it
            os.environ["TUCODEC_ATTEMPT"] = uuid.uuid4().hex
            self.cleanup.callback(os.environ.pop, "TUCODEC_ATTEMPT", None)
        check_crop_size(config)
        check_validation(config)
        self.cleanup.enter_context(folder.locked())
        manifest.check(identity(config))
        self.resume = folder.latest()
        step = 0 if self.resume is None else int(self.resume[1]["tucodec"]["opt_step"])
        if mirror := config["run"]["mirror"]:
            step = self._pull(mirror)
            manifest.check(identity(config))
        folder.write_config(config)
        images = 0 if self.resume is None else int(self.resume[1]["tucodec"]["images_seen"])
        self.preemption.begun = True
        manifest.begin(config, step, trainer.world_size, images)
        self.cleanup.callback(self._finish_companions)
        self.cleanup.push(self._end)

    def _pull(self, mirror: str) -> int:
        """Take over the mirror's state if it is further; returns the step to go on from.

        Raises:
            DatasetError: it cannot be read or written, and there is nothing here to go on from.
        """
        own = None
        if self.resume is not None:
            counters = self.resume[1]["tucodec"]
            own = int(counters["opt_step"]), int(counters["images_seen"])
        pulled = None
        try:
            pulled = pull(self.folder, mirror, own)
            check_writable(mirror)
        except DatasetError as error:
            if own is None and pulled is None:
                raise
            print(f"tucodec: {redacted(str(error))}; goes on with what is here", file=sys.stderr)
        if pulled is None:
            return 0 if own is None else own[0]
        print(
            f"run {self.folder.path}: step {pulled} comes from {redacted(mirror)}", file=sys.stderr
        )
        self.resume = self.folder.latest()
        return pulled

    def start_companions(self) -> None:
        """Start the processes that copy the run elsewhere while it trains."""
        run = self.config["run"]
        package = "lightning_tucodec.training.beside"
        path = str(self.folder.path)
        if run["mirror"]:
            log = self.folder.path / "mirror.log"
            url = run["mirror"]
            self._mirror = Companion(f"{package}.mirror", [path], log, TUCODEC_MIRROR=url)
        if run["wandb"] and mode() != "disabled":
            log = self.folder.path / "wandb.log"
            self._wandb = Companion(f"{package}.wandb_view", [path], log)

    @property
    def preempted(self) -> bool:
        """Whether a signal ended the run before its last step."""
        unfinished = self.model.opt_step < self.model.max_steps
        stopping = self.preemption.stopping is not None
        return stopping and (unfinished or self.preemption.owes_validation)

    @property
    def status(self) -> int:
        """Exit status of the process, see `fit.main`."""
        if self.preempted:
            return PREEMPTED
        return UNMIRRORED if self.unmirrored else 0

    def words(self) -> str:
        """How it ended, for its last line."""
        step = f"step {self.model.opt_step}"
        if self.preempted:
            assert self.preemption.stopping is not None
            return (
                f"saved at {step} after {self.preemption.stopping.name}; the same command goes on"
            )
        return f"finished at {step}"

    def _finish_companions(self) -> None:
        if self._mirror is not None and not self._mirror.finish(_MIRROR_SECONDS[self._outcome]):
            self.unmirrored = True
            log = self._mirror.log
            last = log.read_text(errors="replace").splitlines()[-1:] if log.exists() else []
            reason = "".join(last).removeprefix("tucodec: ") or "it did not answer"
            print(
                f"tucodec: the end of this run, step {self.model.opt_step}, is not in its mirror ({reason}); "
                f"it is in {log.parent}: start the same command again when the mirror works",
                file=sys.stderr,
            )
        if self._wandb is not None and not self._wandb.finish(_WANDB_SECONDS.get(mode(), 20.0)):
            print("tucodec: wandb_view did not get to its end; see its log", file=sys.stderr)

    def _end(self, kind: type[BaseException] | None, error: BaseException | None, *_: Any) -> None:
        """Leave in the manifest how this attempt ended."""
        reason, status, text = "finished", 0, None
        if error is not None:
            self._outcome = reason = "failed"
            status = 1
            lines = redacted(str(error)).strip().splitlines() or [type(error).__name__]
            text = lines[-1][:500]
            step = several_processes()
            # What is raised where a connection is closed; TERM may have come before or come yet.
            if step and isinstance(error, RuntimeError) and self.preemption.is_echo():
                text = f"{ECHO}: {text}"
        elif self.preempted:
            assert self.preemption.stopping is not None
            self._outcome = "preempted"
            reason, status = f"preempted ({self.preemption.stopping.name})", PREEMPTED
        Manifest(self.folder).end(self.model.opt_step, reason, status, text)
