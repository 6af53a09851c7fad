"""What a run costs beside its network: `tucodec fit` against a bare Lightning loop on the same batches.

Both train the same module on the same shards, in turns, in processes of their own. The fit has everything
on: identity, metrics, W&B offline, a mirror, signals and saves. A step's time is from the end of one batch to
the end of the next.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from data_pipelines.shards import BuildOptions, build
from lightning_tucodec.bench.data import photographs
from lightning_tucodec.bench.timing import machine
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.training.vae import VAE

WARM_STEPS = 10
"""Steps at the start that do not count."""


class TimedVAE(VAE):
    """Notes when each batch ended, and leaves the times in the file that $TUCODEC_BENCH names."""

    def on_fit_start(self) -> None:
        """Begin."""
        super().on_fit_start()
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Callbacks have done their part before this is called."""
        self.ends.append(time.perf_counter())

    def on_train_end(self) -> None:
        """Leave the times."""
        Path(os.environ["TUCODEC_BENCH"]).write_text(json.dumps(self.ends), encoding="utf-8")


def _config(shards: Path, folder: Path, preset: str, steps: int, saving: bool) -> dict[str, Any]:
    return {
        "seed_everything": 0,
        "run": {
            "name": "bench",
            "runs_dir": str(folder / "runs"),
            "mirror": str(folder / "mirror"),
            "wandb": True,
            "threads": 1,
            "checkpoint_minutes": 1e-9 if saving else 5.0,
        },
        "model": {
            "class_path": "lightning_tucodec.bench.train.TimedVAE",
            "init_args": {"preset": preset},
        },
        "data": {"shards": str(shards), "batch_size": 8, "crop": 128},
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_steps": steps, "max_epochs": -1,
            "log_every_n_steps": 10, "num_sanity_val_steps": 0, "enable_model_summary": False,
            "check_val_every_n_epoch": None, "val_check_interval": steps,
        },
    }  # fmt: skip


_BARE = """
import sys, torch, yaml, pytorch_lightning as pl
from lightning_tucodec.bench.train import TimedVAE
from lightning_tucodec.training.data import PatchDataModule
torch.set_num_threads(1)
config = yaml.safe_load(open(sys.argv[1]))
pl.seed_everything(0)
trainer = pl.Trainer(**config["trainer"], logger=False, enable_checkpointing=False,
                     enable_progress_bar=False)
trainer.fit(TimedVAE(**config["model"]["init_args"]), PatchDataModule(**config["data"]))
"""


def _steps(command: list[str], folder: Path) -> list[float]:
    """Seconds of each step of one training."""
    out = folder / "ends.json"
    environment = {**os.environ, "TUCODEC_BENCH": str(out), "WANDB_MODE": "offline"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"a training of the bench failed: {done.stderr.strip()[-500:]}")
    ends = json.loads(out.read_text(encoding="utf-8"))
    return [after - before for before, after in itertools.pairwise(ends)][WARM_STEPS:]


def run(
    source: str | None, preset: str = "tiny", steps: int = 60, repeats: int = 3
) -> dict[str, Any]:
    """Median step of the bare loop, of a fit, and of a fit that saves after every single step.

    The last shows what a step costs during which a checkpoint is copied, written and mirrored.
    """
    times: dict[str, list[float]] = {"bare loop": [], "fit": [], "fit, saving in every step": []}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        source = source or str(photographs(scratch / "photographs", 8))
        shards = scratch / "shards"
        build([source], str(shards), BuildOptions(patch=128, count=64, shard_size=16))
        for turn in range(repeats):
            for kind, found in times.items():
                folder = scratch / f"{turn}-{kind}"
                folder.mkdir()
                config = _config(shards, folder, preset, steps, "saving" in kind)
                path = folder / "config.yaml"
                path.write_text(yaml.safe_dump(config), encoding="utf-8")
                fit = ["-m", "lightning_tucodec.cli", "fit", "--config", str(path)]
                words = ["-c", _BARE, str(path)] if kind == "bare loop" else fit
                found += _steps([sys.executable, *words], folder)
    bare = statistics.median(times["bare loop"])
    rows = [
        {
            "name": kind,
            "median_s": statistics.median(found),
            "min_s": min(found),
            "max_s": max(found),
            "ratio_to": {}
            if kind == "bare loop"
            else {"bare loop": statistics.median(found) / bare},
        }
        for kind, found in times.items()
    ]
    return {"rows": rows, "preset": preset, "steps": steps * repeats, "machine": machine()}
