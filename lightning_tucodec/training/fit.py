"""`tucodec fit | validate | test`: LightningCLI with run folders, resume and preemption.

The recipe chooses the model (`training.module` states the protocol) and the data by `class_path`;
without one they are `VAE` and `PatchDataModule`.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_tucodec.errors import ConfigError, first_sentence
from lightning_tucodec.io.processes import announce, when_parent_ends
from lightning_tucodec.training.advice import without_advice
from lightning_tucodec.training.arithmetic import arithmetic
from lightning_tucodec.training.attempt import Attempt
from lightning_tucodec.training.configuration import (
    ConfiguredCLI,
    UsageError,
    check_config,
    parsed,
)
from lightning_tucodec.training.module import TrainingModule
from lightning_tucodec.training.options import check_options
from lightning_tucodec.training.runs.checkpoints import Checkpointing
from lightning_tucodec.training.runs.folder import RunFolder
from lightning_tucodec.training.runs.identity import (
    run_id,
)
from lightning_tucodec.training.runs.launcher import started_by_srun
from lightning_tucodec.training.runs.manifest import PREEMPTED
from lightning_tucodec.training.runs.preemption import (
    Preemption,
    SetupStopped,
    ValidationStopped,
    in_step,
    several_processes,
)
from lightning_tucodec.training.runs.tracking import Counters, JsonlLogger
from lightning_tucodec.training.runs.weights import load_checkpoint
from lightning_tucodec.training.runs.writer import BackgroundWriter, CheckpointReader


def _words(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={float(value):.4g}" for key, value in values.items())


def _step_line(trainer: pl.Trainer, model: Any) -> str:
    """How far a training is, with the values that were measured last, if any were."""
    line = f"step {model.opt_step}/{model.max_steps} {_words(trainer.progress_bar_metrics)}"
    return line.rstrip()


class _LastValues(pl.Callback):
    """What a training measured last, for its end: a short one has shown nothing yet.

    Attributes:
        validation: a line on the last validation.
    """

    validation = ""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        values = {
            key.removeprefix("val/"): value
            for key, value in trainer.callback_metrics.items()
            if key.startswith("val/")
        }
        if values and not trainer.sanity_checking:
            self.validation = f"step {pl_module.opt_step} validation: {_words(values)}"

    def lines(self, trainer: pl.Trainer, model: TrainingModule) -> list[str]:
        """The last step's values and the last validation's, where this process measured them."""
        step = _step_line(trainer, model) if trainer.progress_bar_metrics else ""
        return [line for line in (step, self.validation) if line]


class _PlainProgress(pl.Callback):
    """Progress as lines, for logs that are not a terminal."""

    def __init__(self, every_seconds: float = 30.0) -> None:
        self.every = every_seconds
        self._last = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        now = time.monotonic()
        if trainer.is_global_zero and now - self._last >= self.every:
            self._last = now
            print(_step_line(trainer, pl_module), file=sys.stderr)


def slurm_environment() -> list[Any]:
    """What tells Lightning about ranks inside a job of Slurm, whose variables it believes everywhere.

    Raises:
        ConfigError: srun was called in a way that Lightning does not know.
    """
    if not SLURMEnvironment.detect():
        return []
    if TorchElasticEnvironment.detect():
        return [TorchElasticEnvironment()]
    if not started_by_srun():
        return [LightningEnvironment()]
    if int(os.environ["SLURM_STEP_NUM_TASKS"]) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ConfigError("srun: give the processes as --ntasks-per-node, not as --ntasks")
    return [SLURMEnvironment(auto_requeue=False)]


class TucodecCLI(ConfiguredCLI):
    """LightningCLI with the `run` group; `fit` is an attempt of a run."""

    preemption: Preemption
    attempt: Attempt | None = None

    def __init__(self, *args: Any, preemption: Preemption, **kwargs: Any) -> None:
        self.preemption = preemption
        self.cleanup = contextlib.ExitStack()
        with self.cleanup:
            super().__init__(*args, **kwargs)

    def before_instantiate_classes(self) -> None:
        """Check the configuration before anything is built."""
        config = self.plain_config()
        if self.subcommand == "fit":
            check_config(config)
        else:
            check_options(config, self.command)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Loggers, callbacks and signals of a run."""
        self.cleanup.enter_context(arithmetic(self._get(self.config, "run")["arithmetic"]))
        if self.subcommand != "fit":
            self.reader = CheckpointReader()
            return self._build_trainer(
                logger=False, enable_checkpointing=False, plugins=[self.reader], **kwargs
            )
        config = self.plain_config()
        run = config["run"]
        if run["threads"]:
            torch.set_num_threads(run["threads"])
            # Without it Lightning gives each process of DDP its share of the cores.
            os.environ["OMP_NUM_THREADS"] = str(run["threads"])
        folder = RunFolder.of(config)
        log = JsonlLogger(folder.metrics)
        self.writer = BackgroundWriter(folder)
        checkpointing = Checkpointing(
            self.writer, run["checkpoint_minutes"], self.preemption, run_id(config)
        )
        bar = self._get(self.config, "trainer")["enable_progress_bar"]
        interactive = sys.stderr.isatty() if bar is None else bar
        self.last = _LastValues()
        callbacks: list[pl.Callback] = [Counters(log), self.last, self.preemption, checkpointing]
        if not interactive:
            callbacks.append(_PlainProgress())
        trainer = self._build_trainer(
            logger=log,
            callbacks=callbacks,
            plugins=[self.writer],
            enable_checkpointing=False,
            enable_progress_bar=interactive,
            default_root_dir=str(folder.path),
            **kwargs,
        )
        # One owner of signals: Lightning's own handlers talk to other ranks from inside a signal.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        self.attempt = Attempt(config, folder, self.model, self.preemption, self.cleanup)
        self.attempt.begin(trainer)
        if self.attempt.resume is not None:
            state = self.attempt.resume[1]
            counters = {k: int(state["tucodec"][k]) for k in log.counters}
            checkpointing.from_step = counters["opt_step"]
            checkpointing.rng = state.get("run", {}).get("rng")
            log.go_on_from(counters, state.get("run", {}).get("lines"))
        else:
            log.go_on_from(log.counters)
        if trainer.is_global_zero:
            self.attempt.start_companions()
        return trainer

    def _build_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer as Lightning builds it; `max_steps` counts batches also with several optimisers.

        Raises:
            ConfigError: its options do not fit together or this machine.
        """
        options = self.config_init[self.subcommand]["trainer"]
        plugins = options.get("plugins") or []
        kwargs["plugins"] = [
            *(plugins if isinstance(plugins, list) else [plugins]),
            *kwargs.get("plugins", []),
            *slurm_environment(),
        ]
        if options["max_steps"] > 0:
            kwargs["max_steps"] = options["max_steps"] * self.model.optimizers_a_step
        try:
            trainer: pl.Trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from None
        return trainer

    def fit(self, model: TrainingModule, datamodule: pl.LightningDataModule, **kw: Any) -> None:
        """Start, or go on from the newest checkpoint."""
        del kw  # ckpt_path: the resolver decides
        attempt = self.attempt
        assert attempt is not None
        where = attempt.folder.path
        path: Path | None = None
        init_from = self._get(self.config, "run")["init_from"]
        start = "starts"
        if attempt.resume is not None:
            path, content = attempt.resume
            start = f"goes on at step {content['tucodec']['opt_step']}"
            self.writer.hand_over(path, content)
            del content
            attempt.resume = None
        elif init_from:
            model.warm_start(init_from)
        if self.trainer.is_global_zero:
            print(f"run {where}: {start}", file=sys.stderr)
            if self.trainer.num_nodes > 1:
                limit = getattr(self.trainer.strategy, "_timeout", None)
                print(
                    f"run {where}: waits for the processes of {self.trainer.num_nodes} nodes, "
                    f"{self.trainer.world_size} in all{f', at most {limit}' if limit else ''}",
                    file=sys.stderr,
                    flush=True,
                )
        try:
            with contextlib.suppress(ValidationStopped):
                self.trainer.fit(model, datamodule, ckpt_path=path, weights_only=True)
        except torch.distributed.DistStoreError as error:
            raise ConfigError(
                f"trainer.num_nodes {self.trainer.num_nodes}, trainer.devices {self.trainer.num_devices}: "
                f"not all processes have come ({' '.join(str(error).split())}); are all started?"
            ) from None
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"step {model.opt_step}: not enough memory on the GPU ({first_sentence(error)}): "
                "take a smaller data.batch_size or data.crop, more GPUs, or trainer.precision bf16-mixed"
            ) from None
        if self.trainer.is_global_zero:
            measured = [] if attempt.preempted else self.last.lines(self.trainer, model)
            print(*measured, f"run {where}: {attempt.words()}", sep="\n", file=sys.stderr)

    def validate(
        self, model: TrainingModule, datamodule: pl.LightningDataModule, **kw: Any
    ) -> None:
        """Measure a checkpoint on the whole images."""
        path = self._checkpoint(kw["ckpt_path"], model, datamodule)
        self.trainer.validate(
            model, datamodule, ckpt_path=path, verbose=kw["verbose"], weights_only=True
        )

    def test(self, model: TrainingModule, datamodule: pl.LightningDataModule, **kw: Any) -> None:
        """As `validate`, under another name."""
        path = self._checkpoint(kw["ckpt_path"], model, datamodule)
        self.trainer.test(
            model, datamodule, ckpt_path=path, verbose=kw["verbose"], weights_only=True
        )

    def _checkpoint(
        self, named: str | None, model: TrainingModule, datamodule: pl.LightningDataModule
    ) -> Path:
        """The checkpoint that was named, else the newest of this config's run.

        Raises:
            ConfigError: there is none, it is damaged or of another network, or there are no images to
                measure it on.
        """
        if not getattr(datamodule, "val_images", None):
            raise ConfigError("no images: name a folder of them with --data.val_images")
        if named is not None:
            path, content = Path(named), load_checkpoint(named)
        else:
            folder = RunFolder.of(self.plain_config())
            found = folder.latest()
            if found is None:
                raise ConfigError(
                    f"{folder.path}: nothing was trained with this config; --ckpt_path?"
                )
            path, content = found
        try:
            model.load_state_dict(content["state_dict"], strict=model.strict_loading)
        except (RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{path}: weights of another network ({reason})") from None
        self.reader.hand_over(path, content)
        return path


def main(arguments: Sequence[str]) -> int:
    """Run a LightningCLI subcommand.

    Args:
        arguments: words from the subcommand on, as in ["fit", "--config", "recipe.yaml"].

    Returns:
        Exit status: 0; 2 when the words or the file are not understood; 3 when the run is complete and its
        end did not reach its mirror; 75 when a signal stopped the run after it had saved itself. In a step
        of several processes see `preemption.in_step`.

    Raises:
        ConfigError: the configuration cannot work.
    """
    preemption = Preemption()
    if parent := os.environ.pop(
        "TUCODEC_PARENT", None
    ):  # the ranks that Lightning starts have another
        when_parent_ends(int(parent), lambda: os.kill(os.getpid(), signal.SIGTERM))
    if arguments[0] == "fit":
        return in_step(lambda: _main(arguments, preemption), preemption)
    return _main(arguments, preemption)


def _main(arguments: Sequence[str], preemption: Preemption) -> int:
    try:
        with without_advice(), preemption if arguments[0] == "fit" else contextlib.nullcontext():
            cli = parsed(TucodecCLI, arguments, preemption=preemption)
    except UsageError as error:
        print(f"tucodec {arguments[0]}: {error}", file=sys.stderr)
        return 2
    except SetupStopped:
        # In a step of several processes another one may say why it is being ended: that stays the last line.
        if not several_processes():
            announce()
        return PREEMPTED
    return 0 if cli.attempt is None else cli.attempt.status
