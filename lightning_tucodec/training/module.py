"""The protocol of a LightningModule that `tucodec fit` can name, stop, resume, mirror and chart.

A recipe chooses its model by class:

    model:
      class_path: lightning_tucodec.training.postfilter.PostFilterModule
      init_args: {lr: 1.0e-4}

Recipes without `class_path` mean `lightning_tucodec.training.vae.VAE`, and their keys are its arguments. A
new model derives from `TrainingModule` and then

- counts steps: `opt_step` and `images_seen` are the only counters that schedules, logs and checkpoints use.
  With automatic optimisation `opt_step` is counted for you. With manual optimisation call `count_step()`
  once per training step, for any number of optimisers, and set `optimizers_a_step` to their number.
- describes the network: `describe()` returns everything an export needs to rebuild it, as plain types. It is
  stored under the key `tucodec` of every checkpoint.
- changes its state only in the hooks of a batch, up to `on_train_batch_end`: checkpoints are saved after it.
- draws random numbers from PyTorch's, NumPy's or Python's global generators, whose states are saved for
  every rank. If results must not depend on the number of ranks, it derives them from a seed and
  `batch["index"]`, the global position of each sample.
- measures each validation image once on any number of ranks: rows carry `batch["index"]`, and
  `rows_of_all_ranks(…)` gathers them.
- may set `abandons_images`, so that a signal can interrupt a validation image between two layers.
- keeps validation pictures at `picture_path(…)`, labelled with the number of the image, and stores
  the measurements of every image with `keep_rows(…)`: W&B shows them as a table for the same step.
- overrides `warm_start` if it supports `run.init_from`.

`ScheduledModule` adds what our own models share: the schedule of the learning rate, clipping, and validation
means in which each image counts once.

State outside of optimisers, parameters and buffers goes through Lightning's `on_save_checkpoint` and
`on_load_checkpoint`; call the base class's own there.
"""

import contextlib
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_tucodec.errors import ConfigError, TucodecError, first_sentence
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.training.beside.companions import SIGNALS
from lightning_tucodec.training.optimizers import FusedAdam
from lightning_tucodec.training.schedules import warmup_cosine


class NonFiniteLossError(TucodecError):
    """Loss, gradient or a validation became NaN or infinite; the run has saved its state and stopped.

    Attributes:
        step: optimiser steps before the one that was not done, or before the validation.
    """

    def __init__(self, step: int, what: str = "loss or gradient") -> None:
        super().__init__(f"{what} is not finite at optimiser step {step}")
        self.step = step


class TrainingModule(pl.LightningModule):
    """Base of all models that `tucodec fit` trains; the module's docstring states the protocol.

    Attributes:
        opt_step: training steps done; a step is one batch, for any number of optimisers.
        images_seen: samples of all ranks so far.
        optimizers_a_step: how many optimisers step in one training step; Lightning counts each.
        abandons_images: `validation_step` waits for no other rank, so that a signal may end it between two
            layers; its image is measured again when the run goes on. Otherwise a stop waits for its end.
    """

    optimizers_a_step: int = 1
    abandons_images: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.opt_step = 0
        self.images_seen = 0

    @property
    def max_steps(self) -> int:
        """Training steps of the whole run, in units of `opt_step`."""
        steps = int(self.trainer.max_steps)
        return steps if steps < 0 else steps // self.optimizers_a_step

    @property
    def is_fresh(self) -> bool:
        """Whether this run begins here, and does not go on from a checkpoint."""
        return self.trainer.ckpt_path is None

    @property
    def logging_is_due(self) -> bool:
        """Whether this training step is logged; only then may it wait for the device and other ranks."""
        if self._trainer is None:  # a bench steps it by hand
            return False
        every = int(self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        step = self.opt_step + 1
        # `fit` tells the last step's values, however short the run.
        return every > 0 and (step % every == 0 or step == self.max_steps)

    def log_step(self, values: dict[str, Tensor], bar: dict[str, Tensor]) -> None:
        """Log scalars of this step, read from the device at once.

        Lightning itself reads what stands in the progress bar after every batch: on a GPU that waits for the
        whole step. So call this where `logging_is_due`, and nothing else that logs.

        Args:
            values: by the names that `metrics.jsonl` has; means over the ranks already.
            bar: what the progress bar shows.
        """
        both = [*values.values(), *bar.values()]
        numbers = torch.stack([value.detach().float() for value in both]).cpu().unbind()
        self.log_dict(dict(zip(values, numbers, strict=False)))
        shown = zip(bar, numbers[len(values) :], strict=True)
        self.log_dict(dict(shown), prog_bar=True, logger=False)

    def check_finite(self) -> None:
        """Called on all ranks before state is saved, before a validation, and whenever a module logs.

        Raises:
            NonFiniteLossError: the training is broken.
        """

    def count_step(self) -> None:
        """One training step is done."""
        self.opt_step += 1

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Count steps of automatic optimisation; Lightning does not call this in manual optimisation."""
        super().optimizer_step(*args, **kwargs)
        self.count_step()

    def describe(self) -> dict[str, Any]:
        """Further entries of a checkpoint under `tucodec`; plain types."""
        return {}

    def warm_start(self, source: str) -> None:
        """Take over weights before the first step of a fresh run.

        Args:
            source: `run.init_from`: a checkpoint, a run folder, an exported model or its name.

        Raises:
            ConfigError: they do not fit, or this model has no use for them.
        """
        raise ConfigError(f"run.init_from: {type(self).__name__} has no warm start ({source})")

    def picture_path(self, label: str = "") -> Path:
        """Where a picture of this step's validation goes.

        Args:
            label: tells pictures of one step apart.
        """
        name = f"step-{self.opt_step:08d}{f'-{label}' if label else ''}.png"
        return Path(self.trainer.default_root_dir) / "images" / name

    def rows_of_all_ranks(self, rows: list[dict[str, float]]) -> list[dict[str, float]]:
        """What all ranks measured in a validation, each image once, in order; called on all ranks.

        Ranks are padded with repeats, which the index removes again.

        Args:
            rows: this rank's, each with `index`, the number of the image.
        """
        gathered = [rows]
        if self.trainer.world_size > 1:
            gathered = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(gathered, rows)
        by_index = {row["index"]: row for rows in gathered for row in rows}
        return [by_index[index] for index in sorted(by_index)]

    def keep_rows(self, rows: Sequence[dict[str, float]]) -> None:
        """Write what this step's validation measured, a row an image, beside its pictures.

        Args:
            rows: each with `index`, the number of the image.
        """
        # A disk that is full is noticed by what matters: the metrics and the checkpoint.
        with (
            contextlib.suppress(OSError),
            atomic_write(self.picture_path().with_suffix(".json"), "w") as stream,
        ):
            json.dump(list(rows), stream)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Our own counters and what describes the network."""
        checkpoint["tucodec"] = {
            "opt_step": self.opt_step,
            "images_seen": self.images_seen,
            **self.describe(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue our own counters."""
        self.opt_step = checkpoint["tucodec"]["opt_step"]
        self.images_seen = checkpoint["tucodec"]["images_seen"]


class ScheduledModule(TrainingModule):
    """Learning rate, clipping and validation rows.

    The learning rate of the first optimiser is a pure function of the number of steps done: a linear
    warm-up, a plateau, then half a cosine down to `final_lr`.

    Args:
        lr: learning rate on the plateau.
        final_lr: learning rate at the end.
        warmup_steps: length of the warm-up.
        decay_start: fraction of `max_steps` at which the cosine begins.
        clip_norm: gradients are scaled down to this norm.

    Attributes:
        found_inf: on the device, 1 from the first step on whose gradients were not finite, or else 0; None
            before the first step.
        validation_rows: this rank's numbers of the running validation, one row an image; `index` is the
            image's number.
    """

    abandons_images = True

    def __init__(
        self, lr: float, final_lr: float, warmup_steps: int, decay_start: float, clip_norm: float
    ) -> None:
        super().__init__()
        self.lr, self.final_lr = lr, final_lr
        self.warmup_steps, self.decay_start = warmup_steps, decay_start
        self.clip_norm = clip_norm
        self._compiles = False
        self._broken_at: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.validation_rows: list[dict[str, float]] = []

    def whole(self, function: Callable[..., Any], compiles: bool) -> Callable[..., Any]:
        """A function of the training step as one compiled graph, for one size of crops; or as it is.

        Raises:
            ConfigError: a CPU's graphs need a C++ compiler, and there is none. The returned function raises
                it at its first call where it is no graph.
        """
        if not compiles:
            return function
        compiler = os.environ.get("CXX", "g++")
        if not torch.cuda.is_available() and shutil.which(compiler) is None:
            raise ConfigError(
                f"model.compile: needs a C++ compiler, and there is no {compiler} here"
            )
        self._compiles = True
        compiled = torch.compile(function, fullgraph=True, dynamic=False)

        def call(*arguments: Any) -> Any:
            with _compiling():
                return compiled(*arguments)

        return call

    def learning_rate(self, step: int, max_steps: int) -> float:
        """Learning rate of the optimiser step that follows `step` steps."""
        return warmup_cosine(
            step,
            max_steps,
            lr=self.lr,
            final_lr=self.final_lr,
            warmup_steps=self.warmup_steps,
            decay_start=self.decay_start,
        )

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Set the step's learning rate."""
        rate = self.learning_rate(self.opt_step, self.max_steps)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Where a loss is not finite its gradients are not either: so `clip` sees it, on all ranks.

        Of themselves they may be finite: a NaN that no weight has a part in has no gradient.
        """
        # The first backward pass of a graph compiles it.
        with _compiling() if self._compiles else contextlib.nullcontext():
            super().backward(
                loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan), *args, **kwargs
            )

    def clip(self, optimizer: torch.optim.Optimizer, *others: torch.optim.Optimizer) -> Tensor:
        """Clip the gradients of an optimiser's parameters, and return the norm they had.

        A loss that is not finite shows here, on all ranks at once. The device judges: from that step on the
        optimisers change neither weights nor their own state. The host asks when it logs or saves (see
        `check_finite`), or at once where an optimiser cannot be told to leave a step out.

        Args:
            optimizer: whose gradients are clipped.
            others: that leave out the same steps.

        Raises:
            NonFiniteLossError: before the step, so that weights and optimiser are still sound.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        with torch.no_grad():
            if self._broken_at is None:
                self._broken_at = torch.full_like(norm, -1, dtype=torch.int64)
            fresh = (self._broken_at < 0) & ~torch.isfinite(norm)
            self._broken_at.masked_fill_(fresh, self.opt_step)
            self.found_inf = (self._broken_at >= 0).float()
        obedient = [one for one in (optimizer, *others) if isinstance(one, FusedAdam)]
        for one in obedient:
            one.found_inf = self.found_inf
        if self.logging_is_due or len(obedient) <= len(others):
            self.check_finite()
        return norm

    def clip_and_log(
        self, optimizer: torch.optim.Optimizer, *others: torch.optim.Optimizer
    ) -> None:
        """`clip`; logs the norm where the step is logged."""
        norm = self.clip(optimizer, *others)
        if self.logging_is_due:
            self.log_step({"train/grad_norm": norm}, {})

    def check_finite(self) -> None:
        """Check whether the training is still finite; waits for the device.

        Raises:
            NonFiniteLossError: names the step; the weights are those of before it.
        """
        if self._broken_at is not None and (step := int(self._broken_at)) >= 0:
            raise NonFiniteLossError(step)

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation's numbers."""
        self.validation_rows = []

    def on_test_epoch_start(self) -> None:
        """A test is a validation under another name."""
        self.on_validation_epoch_start()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """See `validation_step`."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the means.

        Raises:
            NonFiniteLossError: a number is not finite; on all ranks, and nothing is logged.
        """
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        """Log the means."""
        self._log_means("test")

    def _log_means(self, stage: str) -> None:
        rows = self.rows_of_all_ranks(self.validation_rows)
        for row in rows:
            # The PSNR of equal pictures is infinite.
            broken = [
                k
                for k, v in row.items()
                if not (math.isfinite(v) or (v == math.inf and k == "psnr"))
            ]
            if broken:
                what = f"{', '.join(broken)} of validation image {row['index']:.0f}"
                raise NonFiniteLossError(self.opt_step, what)
        if self.trainer.is_global_zero and self.trainer.loggers:
            self.keep_rows(rows)
        means = self.means(rows)
        self.log_dict({f"{stage}/{k}": v for k, v in means.items()}, rank_zero_only=True)

    def means(self, rows: list[dict[str, float]]) -> dict[str, float]:
        """What is logged of a validation; called on all ranks.

        Args:
            rows: one an image, each image once whatever the number of ranks, in order.
        """
        raise NotImplementedError


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """In this block a function may become a compiled graph.

    Its compilers are child processes, and those who stop a training send the signal to all processes of a job
    or a terminal. Children keep the mask that they start with, so the signal is blocked here: the compiler
    ends its work, and the training stops after the batch.

    Raises:
        ConfigError: the function is no graph, or the compiler fails.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ConfigError(f"model.compile: {_no_graph(error)}; leave it out") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _no_graph(error: Exception) -> str:
    """Why a function is no compiled graph, with the place in its code where PyTorch knows it."""
    failed = isinstance(error, torch._dynamo.exc.BackendCompilerFailed)
    what = (
        "the compiler of this training step fails" if failed else "this training step is no graph"
    )
    reason = first_sentence(getattr(error, "inner_exception", error))
    stack = getattr(error, "real_stack", None)
    where = f" ({os.path.basename(stack[-1].filename)}:{stack[-1].lineno})" if stack else ""
    return f"{what}: {reason}{where}"
