"""When a run saves, and what a checkpoint holds beside weights: random states, progress, an owed validation.

After a signal during a validation, the run does not wait for the end of the validation or of the current
image. It saves the state after the batch with the number of metric lines written so far. A run that resumes
from it begins with the validation.
"""

import functools
import random
import time
from typing import Any, NoReturn

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.training.module import NonFiniteLossError
from lightning_tucodec.training.runs.folder import read_metrics
from lightning_tucodec.training.runs.preemption import ImageAbandoned, Preemption, ValidationStopped
from lightning_tucodec.training.runs.weights import CHECKPOINTS
from lightning_tucodec.training.runs.writer import BackgroundWriter, SaveError


def rng_state() -> dict[str, Any]:
    """States of this process's global generators, as plain types and tensors."""
    python = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    state = {
        "torch": torch.get_rng_state(),
        "python": [python[0], torch.tensor(python[1]), python[2]],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position),
                  int(has_gauss), float(cached)],
    }  # fmt: skip
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Set this process's global generators."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    words32 = keys.numpy().astype(np.uint32)
    np.random.set_state((name, words32, position, has_gauss, cached))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class Checkpointing(pl.Callback):
    """Saves every so many minutes, and when the run ends or is told to stop.

    Args:
        writer: writes on rank 0.
        minutes: time between two saves.
        preemption: knows about signals and lets ranks agree.
        run_id: stands in every checkpoint; it is the W&B id as well.

    Attributes:
        from_step: steps of the checkpoint that the run goes on from; 0: it starts.
        rng: states of all ranks from that checkpoint.
        owes_validation: that checkpoint was made in a validation, which is still to be done.
    """

    def __init__(
        self, writer: BackgroundWriter, minutes: float, preemption: Preemption, run_id: str
    ) -> None:
        self.writer, self.preemption, self.run_id = writer, preemption, run_id
        self.seconds = 60 * minutes
        self.from_step = 0
        self.rng: list[dict[str, Any]] | None = None
        self.owes_validation = False
        self._after_batch: dict[str, Any] = {}
        self._abandoned = False
        self._saved_at = 0.0
        self._saved_batch = -1

    def _save(self, trainer: pl.Trainer) -> None:
        """On all ranks, since gathering the state may be collective.

        Batches tell states apart: one may end without a step of the optimiser that `opt_step` counts.

        Raises:
            NonFiniteLossError: what would be saved is the state of a training that is broken.
        """
        trainer.lightning_module.check_finite()  # type: ignore[operator]
        if (batch := _batches(trainer)) != self._saved_batch:
            self._saved_batch = batch
            trainer.save_checkpoint(self.writer.folder.checkpoints / CHECKPOINTS[0], False)

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Compare what the ranks go on from: each looks for the newest checkpoint by itself.

        Raises:
            ConfigError: they have found different ones.
        """
        found = self.preemption.gather(self.from_step)
        if len(set(found)) > 1:
            raise ConfigError(
                f"{self.writer.folder.path}: the processes go on from steps {', '.join(map(str, found))}; "
                "run.runs_dir must be on storage that all nodes see alike"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start the clock; go on with each rank's own random numbers if the ranks are the same.

        Raises:
            ConfigError: the learning rate depends on what a validation finds.
        """
        if any(schedule.reduce_on_plateau for schedule in trainer.lr_scheduler_configs):
            raise ConfigError(
                "ReduceLROnPlateau moves after a batch's state is saved, so that a resumed run would "
                "differ; make the learning rate a function of opt_step"
            )
        self._saved_at = time.monotonic()
        self._saved_batch = -1 if self.owes_validation else _batches(trainer)
        if self.rng is not None and len(self.rng) == trainer.world_size:
            restore_rng(self.rng[trainer.global_rank])
        self.rng = None
        self._after_batch["rng"] = rng_state()
        own_hook = pl_module.on_train_batch_end

        def on_train_batch_end(*args: Any) -> None:
            own_hook(*args)
            self._end_batch(trainer)

        own_step = pl_module.validation_step

        @functools.wraps(own_step)  # Lightning looks at its arguments
        def validation_step(*args: Any, **kwargs: Any) -> Any:
            try:
                with self.preemption.abandoning():
                    return own_step(*args, **kwargs)
            except ImageAbandoned:
                self._abandoned = True
                return None

        # Around the step itself: what Lightning does around it may wait for other ranks.
        if pl_module.abandons_images:
            pl_module.validation_step = validation_step

        # After the module's hook, which Lightning calls after those of all callbacks: what it does, such as
        # moving an average of weights, belongs to the batch.
        pl_module.on_train_batch_end = on_train_batch_end

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Prepare an owed validation, and keep what a stop during it would have to save again."""
        loop = self._after_batch["loop"] = checkpoint["loops"]["fit_loop"]
        self.owes_validation = "lines" in checkpoint.get("run", {})
        if self.owes_validation:
            checkpoint["loops"]["fit_loop"] = _owing(loop)  # which Lightning loads after this
            # It validates nothing where no step or pass is left.
            _extend(trainer, 1)

    def _repay(self, trainer: pl.Trainer) -> None:
        """Mark the owed validation as begun."""
        if self.owes_validation:
            self.owes_validation = False
            _extend(trainer, -1)
            # Or else every later checkpoint would look like one made in a validation.
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Give the module its own methods back."""
        for name in ("on_train_batch_end", "validation_step"):
            vars(pl_module).pop(name, None)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Publish the checkpoint of the step before this one, whose lines are all written.

        Raises:
            StopIteration: only a validation was left to do, and there are no images any more.
        """
        self.writer.publish()
        self._repay(trainer)
        if _is_over(trainer):
            _end_pass(trainer)
            raise StopIteration

    def _end_batch(self, trainer: pl.Trainer) -> None:
        """Save when the time has come; rank 0's clock decides for all.

        Raises:
            SaveError: an earlier save went wrong, on whichever rank.
        """
        first = trainer.is_global_zero
        elapsed = time.monotonic() - self._saved_at
        due, failed = self.preemption.agree(
            first and elapsed >= self.seconds and not (self.seconds and self.writer.busy),
            self.writer.failed,
        )
        if failed:
            self.writer.settle()
            raise SaveError("rank 0 could not save; see its message")
        if due or self.preemption.stopping:
            self._save(trainer)
            self._saved_at = time.monotonic()
        self._after_batch = {"rng": rng_state(), "loop": trainer.fit_loop.state_dict()}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Mark an owed validation as begun; refuse to measure a training that is not finite."""
        if _is_within_fit(trainer):
            pl_module.check_finite()
            self._repay(trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Stop before the next image.

        Raises:
            ValidationStopped: the run is saved.
        """
        if _is_within_fit(trainer):
            self.preemption.agree()
            if self.preemption.stopping:
                self._stop_validation(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Stop if the image was abandoned, on whichever rank.

        Raises:
            ValidationStopped: the run is saved.
        """
        (abandoned,) = self.preemption.agree(self._abandoned)
        if abandoned:
            self._stop_validation(trainer)

    def _stop_validation(self, trainer: pl.Trainer) -> NoReturn:
        self.preemption.owes_validation = True
        self.writer.drop()  # it would claim that the validation is done
        self._saved_batch = -1
        self._save(trainer)
        self.writer.settle()
        raise ValidationStopped

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Restore the random state of before the validation: it must not change the training noise."""
        if not _is_within_fit(trainer):
            return
        restore_rng(self._after_batch["rng"])
        if _is_over(trainer):
            _end_pass(trainer)
        self.preemption.agree()
        if self.preemption.stopping:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save the final state and wait until it is on disk."""
        self._save(trainer)
        self.writer.settle()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """The run's identity and the random state of every rank."""
        validating = trainer.validating and _is_within_fit(trainer)
        rng = self.preemption.gather(self._after_batch["rng"] if validating else rng_state())
        checkpoint["run"] = {"run_id": self.run_id, "wandb_id": self.run_id, "rng": rng}
        if validating:
            checkpoint["loops"]["fit_loop"] = self._after_batch["loop"]
            if self.preemption.owes_validation:
                checkpoint["run"]["lines"] = len(read_metrics(self.writer.folder.metrics))

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save the state of a run whose loss was not finite, so that the cause can be found."""
        if isinstance(exception, NonFiniteLossError):
            if trainer.validating:
                self.writer.drop()  # it would claim that the validation is done
            path = self.writer.folder.checkpoints / f"nonfinite-{exception.step}.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
            self.writer.settle()
            exception.args = (f"{exception.args[0]}; state saved in {path}",)


def _batches(trainer: pl.Trainer) -> int:
    """Training batches of the whole run, in all its attempts."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(total.processed)


def _is_within_fit(trainer: pl.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _is_over(trainer: pl.Trainer) -> bool:
    loop = trainer.fit_loop
    passes: Any = loop.epoch_progress.current
    steps_done = 0 <= trainer.max_steps <= trainer.global_step
    return steps_done or 0 <= (loop.max_epochs or -1) <= passes.processed


def _end_pass(trainer: pl.Trainer) -> None:
    """End a run whose last validation was owed: Lightning has counted its pass, and begun one more."""
    trainer.should_stop = True
    loop = trainer.fit_loop
    batches: Any = loop.epoch_loop.batch_progress.current
    if batches.processed == 0:
        passes: tuple[Any, Any] = loop.epoch_progress.current, loop.epoch_progress.total
        for count in passes:
            count.processed -= 1
            count.completed -= 1


def _extend(trainer: pl.Trainer, by: int) -> None:
    """Move the end of the run by a step and a pass."""
    loop = trainer.fit_loop
    loop.epoch_loop.max_steps += by
    if loop.max_epochs is not None and loop.max_epochs > 0:
        loop.max_epochs += by


def _owing(loop: dict[str, Any]) -> dict[str, Any]:
    """The state of Lightning's loop after a batch, changed so that it begins with the validation."""
    own, validation = "epoch_loop.state_dict", "epoch_loop.val_loop.batch_progress"
    progress = loop[validation]
    # As if the first image had been started and not finished.
    done = progress["total"]["completed"]
    total = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
    current = dict.fromkeys(progress["current"], 0)
    # Lightning will count the batch once more after the validation.
    stepped = loop[own]["_batches_that_stepped"] - 1
    return {
        **loop,
        own: {**loop[own], "_batches_that_stepped": stepped},
        validation: {**progress, "total": total, "current": current},
    }
