"""A run: its identity, its folder, its checkpoints and how it goes on.

A run's folder is `<runs_dir>/<name>-<run_id>`, run_id a hash of what decides the result. The same config
finds the same folder and continues there; there is nothing else to say to resume.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml

from lightning_tucodec.errors import ConfigError, TucodecError
from lightning_tucodec.files import atomic_write
from lightning_tucodec.storage import Storage
from lightning_tucodec.training.preemption import Preemption

CHECKPOINTS = ("last.ckpt", "previous.ckpt")
"""Two generations: a save renames last to previous before the new file takes its name."""

_VOLATILE_TRAINER = {
    "accelerator", "devices", "num_nodes", "strategy", "logger", "callbacks", "default_root_dir",
    "enable_progress_bar", "enable_model_summary", "log_every_n_steps", "plugins", "profiler",
}  # fmt: skip
_VOLATILE_DATA = {"shards", "val_images", "num_workers", "cache_dir", "cache_gb"}
_VOLATILE_RUN = {"runs_dir", "wandb", "init_from", "checkpoint_minutes", "threads"}


class NonFiniteLossError(TucodecError):
    """Loss or gradient became NaN or infinite; the run has saved its state and stopped."""

    def __init__(self, step: int) -> None:
        super().__init__(f"loss or gradient is not finite at optimiser step {step}")


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that decides the result.

    Paths, devices, nodes, workers and logging are left out; in their place stand the SHA-256 of the
    shard index and of the initial weights.

    Args:
        config: resolved config of `fit` with the groups run, model, data and trainer.
    """
    data = config["data"]
    run = config["run"]
    return {
        "model": config["model"],
        "data": {
            **{k: v for k, v in data.items() if k not in _VOLATILE_DATA},
            "index_sha256": _sha256(data["shards"], "index.json"),
        },
        "trainer": {k: v for k, v in config["trainer"].items() if k not in _VOLATILE_TRAINER},
        "run": {
            **{k: v for k, v in run.items() if k not in _VOLATILE_RUN},
            "init_from_sha256": _sha256(run["init_from"]) if run.get("init_from") else None,
        },
        "seed": config.get("seed_everything"),
    }


def run_id(config: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that name the run."""
    text = json.dumps(identity(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _sha256(location: str, name: str = "") -> str:
    """SHA-256 of a file, or of `name` in a folder or URL."""
    storage = Storage(location)
    try:
        return hashlib.sha256(storage.read(name)).hexdigest()
    except OSError as error:
        raise ConfigError(f"{storage.path(name)}: {error.strerror or error}") from None


def network_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """State of the TucodecVAE inside a checkpoint of `fit`, by the network's own names."""
    prefix = "network."
    return {
        name.removeprefix(prefix): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }


class RunFolder:
    """The folder of one run: config.yaml, metrics.jsonl, checkpoints/, images/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    @classmethod
    def of(cls, config: dict[str, Any]) -> "RunFolder":
        """The folder that this config always gets."""
        name = f"{config['run']['name']}-{run_id(config)}"
        return cls(Path(config["run"]["runs_dir"]) / name)

    def write_config(self, config: dict[str, Any]) -> None:
        """Leave the fully resolved config beside the results."""
        with atomic_write(self.path / "config.yaml", "w") as stream:
            yaml.safe_dump(config, stream, sort_keys=False, allow_unicode=True)

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """Newest checkpoint that loads, with its content; None when there is none to go on from."""
        found = []
        for name in CHECKPOINTS:
            path = self.checkpoints / name
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
                found.append((content["tucodec"]["opt_step"], path, content))
            except FileNotFoundError:
                continue
            except Exception as error:
                print(f"tucodec: {path}: damaged, trying an older one ({error})", flush=True)
        if not found:
            return None
        _, path, content = max(found, key=lambda entry: entry[0])
        return path, content

    def save(self, trainer: pl.Trainer) -> None:
        """Write a checkpoint: aside, flushed, then renamed; the last one becomes the previous.

        Called on all ranks, since gathering the state may be collective.
        """
        aside = self.checkpoints / "saving.ckpt"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(aside, weights_only=False)
        if trainer.is_global_zero:
            with open(aside, "rb") as stream:
                os.fsync(stream.fileno())
            last, previous = (self.checkpoints / name for name in CHECKPOINTS)
            if last.exists():
                os.replace(last, previous)
            os.replace(aside, last)
        trainer.strategy.barrier()


class Checkpointing(pl.Callback):
    """Saves every so many minutes, and when the run ends or is told to stop."""

    def __init__(self, folder: RunFolder, minutes: float, preemption: Preemption) -> None:
        self.folder = folder
        self.preemption = preemption
        self.seconds = 60 * minutes
        self._saved_at = 0.0
        self._saved_step = -1

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        if step != self._saved_step:
            self.folder.save(trainer)
            self._saved_step = step

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._saved_at = time.monotonic()
        self._saved_step = pl_module.opt_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Save when the time has come; rank 0's clock decides for all."""
        due = trainer.strategy.broadcast(time.monotonic() - self._saved_at >= self.seconds)
        if due or self.preemption.stopping:
            self._save(trainer, pl_module.opt_step)
            self._saved_at = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The final state."""
        self._save(trainer, pl_module.opt_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Keep the state of a run whose loss was not finite for whoever looks for the cause."""
        if isinstance(exception, NonFiniteLossError):
            path = self.folder.checkpoints / f"nonfinite-{pl_module.opt_step}.ckpt"
            self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(path, weights_only=False)
            exception.args = (f"{exception.args[0]}; state saved in {path}",)
