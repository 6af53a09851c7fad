"""`tucodec fit | validate | test`: LightningCLI with run folders, resume and preemption."""

import logging
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentError
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.training.data import PatchDataModule
from lightning_tucodec.training.preemption import PREEMPTED, Preemption
from lightning_tucodec.training.runs import Checkpointing, RunFolder, network_weights, run_id
from lightning_tucodec.training.tracking import JsonlLogger, WandbView
from lightning_tucodec.training.vae import VAE


@dataclass
class RunConfig:
    """Where a run lives and how it starts.

    Attributes:
        name: first part of the folder's name.
        runs_dir: parent of all run folders.
        init_from: checkpoint whose weights a fresh run starts with; a run that can be resumed
            ignores it.
        checkpoint_minutes: time between two saves.
        wandb: mirror metrics to W&B (offline unless WANDB_API_KEY is set).
        project: W&B project.
        threads: CPU threads; None leaves PyTorch's choice.
    """

    name: str = "vae"
    runs_dir: str = "runs"
    init_from: str | None = None
    checkpoint_minutes: float = 5.0
    wandb: bool = False
    project: str = "lightning-tucodec"
    threads: int | None = None


class _Counters(pl.Callback):
    """Gives the loggers our own counters."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, JsonlLogger | WandbView):
                logger.counters["opt_step"] = pl_module.opt_step
                logger.counters["images_seen"] = pl_module.images_seen


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
            print(f"step {pl_module.opt_step}/{trainer.max_steps} {words}", file=sys.stderr)


def load_weights(network: torch.nn.Module, path: str) -> None:
    """Warm start: weights of a checkpoint into `network`; nothing else is taken over.

    The quantiser may be of another kind: learned centres start on the integers that rounding and
    noise use.

    Raises:
        ConfigError: the checkpoint is of another network.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    weights = network_weights(content)
    own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items()}
    differing = [
        name for name, _ in own.items() ^ theirs.items() if not name.startswith("quantizer.")
    ]
    if differing:
        raise ConfigError(f"{path}: another network (differs in {min(differing)}, …)")
    fitting = {name: value for name, value in weights.items() if own.get(name) == value.shape}
    network.load_state_dict(fitting, strict=False)


class TucodecCLI(LightningCLI):
    """Adds the `run` group; finds the run's folder and goes on from its newest checkpoint."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run's own options."""
        parser.add_argument("--run", type=RunConfig, default=RunConfig())

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Loggers and callbacks of the run folder."""
        if self.subcommand != "fit":
            return self._build_trainer(logger=False, enable_checkpointing=False, **kwargs)
        config = self._plain_config()
        run = config["run"]
        if run["threads"]:
            torch.set_num_threads(run["threads"])
        self.folder = RunFolder.of(config)
        self.resume = self.folder.latest()
        step = 0 if self.resume is None else int(self.resume[1]["tucodec"]["opt_step"])
        loggers: list[Any] = [JsonlLogger(self.folder.path / "metrics.jsonl", step)]
        if run["wandb"]:
            identifier = run_id(config)
            loggers.append(WandbView(self.folder.path, identifier, run["project"], config))
        self.preemption = Preemption()
        interactive = sys.stderr.isatty()
        callbacks: list[pl.Callback] = [
            _Counters(),
            self.preemption,
            Checkpointing(self.folder, run["checkpoint_minutes"], self.preemption),
        ]
        if not interactive:
            callbacks.append(_PlainProgress())
        trainer = self._build_trainer(
            logger=loggers,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=interactive,
            default_root_dir=str(self.folder.path),
            **kwargs,
        )
        if trainer.is_global_zero:
            self.folder.write_config(config)
        return trainer

    def _build_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer as Lightning builds it.

        Raises:
            ConfigError: its options do not fit together or this machine.
        """
        try:
            trainer: pl.Trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from None
        return trainer

    def fit(self, model: VAE, datamodule: pl.LightningDataModule, **kwargs: Any) -> None:
        """Start, or go on from the newest checkpoint."""
        del kwargs  # ckpt_path: the resolver decides
        where = self.folder.path
        path: Path | None = None
        init_from = self._get(self.config, "run")["init_from"]
        if self.resume is not None:
            path = self.resume[0]
            print(f"run {where}: goes on at step {self.resume[1]['tucodec']['opt_step']}",
                  file=sys.stderr)  # fmt: skip
        else:
            print(f"run {where}: starts", file=sys.stderr)
            if init_from:
                load_weights(model.network, init_from)
        self.trainer.fit(model, datamodule, ckpt_path=path, weights_only=True)

    def validate(self, model: VAE, datamodule: pl.LightningDataModule, **kwargs: Any) -> None:
        """Measure a checkpoint on the whole images."""
        path = self._checkpoint(kwargs["ckpt_path"], datamodule)
        self.trainer.validate(model, datamodule, ckpt_path=path, weights_only=True)

    def test(self, model: VAE, datamodule: pl.LightningDataModule, **kwargs: Any) -> None:
        """As `validate`, under another name."""
        path = self._checkpoint(kwargs["ckpt_path"], datamodule)
        self.trainer.test(model, datamodule, ckpt_path=path, weights_only=True)

    def _checkpoint(self, named: str | None, datamodule: pl.LightningDataModule) -> Path:
        """The checkpoint that was named, else the newest of this config's run.

        Raises:
            ConfigError: there is none, or no images to measure it on.
        """
        if not getattr(datamodule, "val_images", None):
            raise ConfigError("no images: name a folder of them with --data.val_images")
        if named is not None:
            if not Path(named).is_file():
                raise ConfigError(f"{named}: no such checkpoint")
            return Path(named)
        folder = RunFolder.of(self._plain_config())
        found = folder.latest()
        if found is None:
            raise ConfigError(f"{folder.path}: nothing was trained with this config; --ckpt_path?")
        return found[0]

    def _plain_config(self) -> dict[str, Any]:
        """The resolved config of the subcommand as plain types."""
        config = self.config[self.subcommand].clone()
        config.pop("config", None)
        text = self._parser(self.subcommand).dump(config, skip_none=False)
        import yaml

        plain: dict[str, Any] = yaml.safe_load(text)
        return plain


def main(arguments: Sequence[str]) -> int:
    """Run a LightningCLI subcommand.

    Args:
        arguments: words from the subcommand on, as in ["fit", "--config", "recipe.yaml"].

    Returns:
        Exit status: 0; 2 when the words or the file are not understood; 75 when a signal stopped the
        run after it had saved itself.

    Raises:
        ConfigError: the configuration cannot work.
    """
    # Advice that says nothing to a user of this command: tips, devices found, deprecations inside.
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric.utilities.seed").setLevel(logging.WARNING)
    for message in (
        ".*LightningCLI's args parameter is intended.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*Total length of `list` across ranks is zero.*",
        ".*does not have many workers.*",
        # It counts steps over all passes, whatever one pass holds.
        ".*number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    raising = {"exit_on_error": False}
    try:
        cli = TucodecCLI(
            VAE,
            PatchDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"prog": "tucodec", **raising}
            | dict.fromkeys(TucodecCLI.subcommands(), raising),
            args=list(arguments),
        )
    except ArgumentError as error:
        print(f"tucodec {arguments[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except MisconfigurationException as error:
        raise ConfigError(" ".join(str(error).split())) from None
    preemption = getattr(cli, "preemption", None)
    return PREEMPTED if preemption is not None and preemption.received else 0
