"""`tucodec fit | validate | test`: LightningCLI with run folders, resume and preemption.

The recipe chooses the model (`training.module` states the protocol) and the data by `class_path`;
without one they are `VAE` and `PatchDataModule`.
"""

import contextlib
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
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

from lightning_tucodec.errors import ConfigError, DatasetError, redacted
from lightning_tucodec.io.processes import announce, when_parent_ends
from lightning_tucodec.training.arithmetic import arithmetic
from lightning_tucodec.training.beside.companions import UNMIRRORED, Companion
from lightning_tucodec.training.beside.pull import check_writable, pull
from lightning_tucodec.training.beside.wandb_view import mode
from lightning_tucodec.training.configuration import (
    ConfiguredCLI,
    UsageError,
    check_config,
    parsed,
    without_advice,
)
from lightning_tucodec.training.data import check_crop_size, check_validation
from lightning_tucodec.training.module import TrainingModule
from lightning_tucodec.training.options import check_options
from lightning_tucodec.training.runs.checkpoints import BackgroundWriter, Checkpointing
from lightning_tucodec.training.runs.folder import (
    ECHO,
    Manifest,
    RunFolder,
    attempt_key,
    started_by_srun,
)
from lightning_tucodec.training.runs.identity import (
    identity,
    run_id,
)
from lightning_tucodec.training.runs.preemption import (
    PREEMPTED,
    Preemption,
    SetupStopped,
    ValidationStopped,
    in_step,
    several_processes,
)
from lightning_tucodec.training.runs.tracking import Counters, JsonlLogger
from lightning_tucodec.training.runs.weights import load_checkpoint

_MIRROR_SECONDS = {"finished": 900.0, "preempted": 60.0, "failed": 60.0}
"""How long the last copy to the mirror may take; before a requeue there is little time."""

_WANDB_SECONDS = {"online": 20.0, "offline": 120.0, "disabled": 20.0}
"""How long W&B may take at the end; what it misses, `tucodec wandb-sync` sends."""


class _PlainProgress(pl.Callback):
    """Progress as lines, for logs that are not a terminal."""

    def __init__(self, every_seconds: float = 30.0) -> None:
        self.every = every_seconds
        self._last = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        now = time.monotonic()
        if trainer.is_global_zero and now - self._last >= self.every:
            self._last = now
            shown = {k: f"{float(v):.4g}" for k, v in trainer.progress_bar_metrics.items()}
            words = " ".join(f"{k}={v}" for k, v in shown.items())
            print(f"step {pl_module.opt_step}/{pl_module.max_steps} {words}", file=sys.stderr)


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
    """Adds the `run` group; finds the run's folder and goes on from its newest checkpoint."""

    preemption: Preemption
    folder: RunFolder | None = None
    resume: tuple[Path, dict[str, Any]] | None = None
    mirror: Companion | None = None
    wandb: Companion | None = None
    outcome = "finished"
    unmirrored = False

    def __init__(self, *args: Any, preemption: Preemption, **kwargs: Any) -> None:
        self.preemption = preemption
        self.cleanup = contextlib.ExitStack()
        with self.cleanup:
            super().__init__(*args, **kwargs)

    def before_instantiate_classes(self) -> None:
        """Look at the configuration before anything is built."""
        config = self.plain_config()
        if self.subcommand == "fit":
            check_config(config)
        else:
            check_options(config, self.command)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Loggers, callbacks and signals of a run."""
        self.cleanup.enter_context(arithmetic(self._get(self.config, "run")["arithmetic"]))
        if self.subcommand != "fit":
            return self._build_trainer(logger=False, enable_checkpointing=False, **kwargs)
        config = self.plain_config()
        run = config["run"]
        if run["threads"]:
            torch.set_num_threads(run["threads"])
            # Without it Lightning gives each process of DDP its share of the cores.
            os.environ["OMP_NUM_THREADS"] = str(run["threads"])
        folder = RunFolder.of(config)
        log = JsonlLogger(folder.metrics)
        writer = BackgroundWriter(folder)
        checkpointing = Checkpointing(
            writer, run["checkpoint_minutes"], self.preemption, run_id(config)
        )
        bar = self._get(self.config, "trainer")["enable_progress_bar"]
        interactive = sys.stderr.isatty() if bar is None else bar
        callbacks: list[pl.Callback] = [Counters(log), self.preemption, checkpointing]
        if not interactive:
            callbacks.append(_PlainProgress())
        trainer = self._build_trainer(
            logger=log,
            callbacks=callbacks,
            plugins=[writer],
            enable_checkpointing=False,
            enable_progress_bar=interactive,
            default_root_dir=str(folder.path),
            **kwargs,
        )
        # One owner of signals: Lightning's own handlers talk to other ranks from inside a signal.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        self._begin(config, folder, trainer)
        if self.resume is not None:
            state = self.resume[1]
            counters = {k: int(state["tucodec"][k]) for k in log.counters}
            checkpointing.rng = state.get("run", {}).get("rng")
            log.go_on_from(counters, state.get("run", {}).get("lines"))
        else:
            log.go_on_from(log.counters)
        if trainer.is_global_zero:
            self._start_companions(run)
        return trainer

    def _begin(self, config: dict[str, Any], folder: RunFolder, trainer: pl.Trainer) -> None:
        """Find what to go on from; rank 0 first, who announces the attempt to the others.

        Raises:
            ConfigError: the folder is in use or belongs to another configuration.
        """
        self.folder = folder
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
            step = self._pull(folder, mirror)
            manifest.check(identity(config))
        folder.write_config(config)
        images = 0 if self.resume is None else int(self.resume[1]["tucodec"]["images_seen"])
        self.preemption.begun = True
        manifest.begin(config, step, trainer.world_size, images)
        self.cleanup.callback(self._finish_companions)
        self.cleanup.push(self._end)

    def _pull(self, folder: RunFolder, mirror: str) -> int:
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
            pulled = pull(folder, mirror, own)
            check_writable(mirror)
        except DatasetError as error:
            if own is None and pulled is None:
                raise
            print(f"tucodec: {redacted(str(error))}; goes on with what is here", file=sys.stderr)
        if pulled is None:
            return 0 if own is None else own[0]
        print(f"run {folder.path}: step {pulled} comes from {redacted(mirror)}", file=sys.stderr)
        self.resume = folder.latest()
        return pulled

    def _start_companions(self, run: dict[str, Any]) -> None:
        assert self.folder is not None
        package = "lightning_tucodec.training.beside"
        path = str(self.folder.path)
        if run["mirror"]:
            log = self.folder.path / "mirror.log"
            url = run["mirror"]
            self.mirror = Companion(f"{package}.mirror", [path], log, TUCODEC_MIRROR=url)
        if run["wandb"] and mode() != "disabled":
            log = self.folder.path / "wandb.log"
            self.wandb = Companion(f"{package}.wandb_view", [path], log)

    def _finish_companions(self) -> None:
        if self.mirror is not None and not self.mirror.finish(_MIRROR_SECONDS[self.outcome]):
            self.unmirrored = True
            log = self.mirror.log
            last = log.read_text(errors="replace").splitlines()[-1:] if log.exists() else []
            reason = "".join(last).removeprefix("tucodec: ") or "it did not answer"
            print(
                f"tucodec: the end of this run, step {self.model.opt_step}, is not in its mirror ({reason}); "
                f"it is in {log.parent}: start the same command again when the mirror works",
                file=sys.stderr,
            )
        if self.wandb is not None and not self.wandb.finish(_WANDB_SECONDS.get(mode(), 20.0)):
            print("tucodec: wandb_view did not get to its end; see its log", file=sys.stderr)

    def _end(self, kind: type[BaseException] | None, error: BaseException | None, *_: Any) -> None:
        """Leave in the manifest how this attempt ended."""
        assert self.folder is not None
        reason, status, text = "finished", 0, None
        if error is not None:
            self.outcome = reason = "failed"
            status = 1
            lines = redacted(str(error)).strip().splitlines() or [type(error).__name__]
            text = lines[-1][:500]
            step = several_processes()
            # What is raised where a connection is closed; TERM may have come before or come yet.
            if step and isinstance(error, RuntimeError) and self.preemption.is_echo():
                text = f"{ECHO}: {text}"
        elif self.preempted:
            assert self.preemption.stopping is not None
            self.outcome = "preempted"
            reason, status = f"preempted ({self.preemption.stopping.name})", PREEMPTED
        Manifest(self.folder).end(self.model.opt_step, reason, status, text)

    @property
    def preempted(self) -> bool:
        """Whether a signal ended the run before its last step."""
        unfinished = self.model.opt_step < self.model.max_steps
        stopping = self.preemption.stopping is not None
        return stopping and (unfinished or self.preemption.owes_validation)

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
        assert self.folder is not None
        where = self.folder.path
        path: Path | None = None
        init_from = self._get(self.config, "run")["init_from"]
        start = "starts"
        if self.resume is not None:
            path = self.resume[0]
            start = f"goes on at step {self.resume[1]['tucodec']['opt_step']}"
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
        self.resume = None  # its tensors are not needed twice
        try:
            with contextlib.suppress(ValidationStopped):
                self.trainer.fit(model, datamodule, ckpt_path=path, weights_only=True)
        except torch.distributed.DistStoreError as error:
            raise ConfigError(
                f"trainer.num_nodes {self.trainer.num_nodes}, trainer.devices {self.trainer.num_devices}: "
                f"not all processes have come ({' '.join(str(error).split())}); are all started?"
            ) from None
        if self.trainer.is_global_zero:
            print(f"run {where}: {self._end_words()}", file=sys.stderr)

    def _end_words(self) -> str:
        step = f"step {self.model.opt_step}"
        if self.preempted:
            assert self.preemption.stopping is not None
            return (
                f"saved at {step} after {self.preemption.stopping.name}; the same command goes on"
            )
        return f"finished at {step}"

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
    if arguments[0] == "fit" and cli.preempted:
        return PREEMPTED
    return UNMIRRORED if cli.unmirrored else 0
