"""What a run costs besides its network: `tucodec fit` against a bare Lightning loop on the same batches.

Both train the same module on the same shards, in turns, in separate processes. The fit has everything
on: identity, metrics, W&B offline, a mirror, signals and saves. A step's time is from the end of one batch to
the end of the next.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from data_pipelines.options import BuildOptions
from data_pipelines.shards import build
from lightning_tucodec.bench.data import photographs
from lightning_tucodec.bench.timing import asked, machine, rows_of
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io import processes
from lightning_tucodec.io.temporary import temporary_folder
from lightning_tucodec.training.vae import VAE

BARE, FIT, SAVING = "bare loop", "fit", "fit, saving all the time"

WARM_STEPS = 10
"""Steps at the start that do not count."""


class TimedVAE(VAE):
    """Records when each batch ended and which ones began a save, in the file $TUCODEC_BENCH."""

    def on_fit_start(self) -> None:
        """Begin."""
        super().on_fit_start()
        self.ends: list[float] = []
        self.saves: list[int] = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A callback's save, before the end of its batch is noted."""
        super().on_save_checkpoint(checkpoint)
        self.saves.append(len(self.ends))

    def on_train_batch_end(self, *args: Any) -> None:
        """Callbacks have done their part before this is called."""
        self.ends.append(time.perf_counter())

    def on_train_end(self) -> None:
        """Write the times."""
        text = json.dumps({"ends": self.ends, "saves": self.saves})
        Path(os.environ["TUCODEC_BENCH"]).write_text(text, encoding="utf-8")


def _config(
    shards: Path, folder: Path, model: dict[str, Any], steps: int, saving: bool
) -> dict[str, Any]:
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
            "class_path": "lightning_tucodec.bench.fit.TimedVAE",
            "init_args": model,
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
from lightning_tucodec.bench.fit import TimedVAE
from lightning_tucodec.training.data import PatchDataModule
torch.set_num_threads(1)
config = yaml.safe_load(open(sys.argv[1]))
pl.seed_everything(0)
trainer = pl.Trainer(**config["trainer"], logger=False, enable_checkpointing=False,
                     enable_progress_bar=False)
trainer.fit(TimedVAE(**config["model"]["init_args"]), PatchDataModule(**config["data"]))
"""


def _train(command: list[str], folder: Path) -> tuple[list[float], int]:
    """Seconds of each step of one training, and how many of these steps began a save."""
    out = folder / "times.json"
    environment = {**os.environ, "TUCODEC_BENCH": str(out), "WANDB_MODE": "offline"}
    done = processes.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise ConfigError(f"a training of the bench failed: {done.stderr.strip()[-500:]}")
    times = json.loads(out.read_text(encoding="utf-8"))
    seconds = [after - before for before, after in itertools.pairwise(times["ends"])][WARM_STEPS:]
    return seconds, sum(WARM_STEPS < step < len(times["ends"]) for step in times["saves"])


def run(
    source: str | None,
    preset: str = "tiny",
    steps: int = 60,
    repeats: int = 3,
    codec: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Steps of the bare loop, of a fit, and of a fit that begins a save whenever the last one is written.

    The last shows the cost of a step while a checkpoint is copied, written and mirrored. A ratio divides
    two medians of one turn. Bounds apply to the median of the ratios over the turns.

    Args:
        source: photographs; by default generated ones.
        preset: size of the network.
        steps: of each training; the first ten do not count.
        repeats: turns.
        codec: replaced fields of the preset, see `training.vae.resolve_codec`.

    Raises:
        ConfigError: no step would count.
    """
    if steps < WARM_STEPS + 2:
        raise ConfigError(f"--steps {steps}: the first {WARM_STEPS + 1} do not count")
    model = {"preset": preset, "codec": codec}
    times: dict[str, list[list[float]]] = {name: [] for name in (BARE, FIT, SAVING)}
    saves = 0
    with temporary_folder() as scratch:
        source = source or str(photographs(scratch / "photographs", 8))
        shards = scratch / "shards"
        build([source], str(shards), BuildOptions(patch=128, count=64, shard_size=16))
        for turn, kind in tqdm(list(itertools.product(range(repeats), times)), unit="training"):
            folder = scratch / f"{turn}-{kind}"
            folder.mkdir()
            config = _config(shards, folder, model, steps, kind == SAVING)
            path = folder / "config.yaml"
            path.write_text(yaml.safe_dump(config), encoding="utf-8")
            fit = ["-m", "lightning_tucodec.cli", "fit", "--config", str(path)]
            words = ["-c", _BARE, str(path)] if kind == BARE else fit
            seconds, begun = _train([sys.executable, *words], folder)
            times[kind].append(seconds)
            saves += begun if kind == SAVING else 0
    by_turn = {
        kind: [
            statistics.median(a) / statistics.median(b)
            for a, b in zip(found, times[BARE], strict=True)
        ]
        for kind, found in times.items()
    }
    ratios = {kind: statistics.median(found) for kind, found in by_turn.items()}
    counted = sum(map(len, times[SAVING]))
    return {
        "rows": rows_of(
            {kind: [s for seconds in found for s in seconds] for kind, found in times.items()},
            {kind: {BARE: ratios[kind]} for kind in (FIT, SAVING)},
        ),
        "asked": [
            asked("what fit adds to a step", ratios[FIT] - 1, at_most=0.03),
            asked(
                "what saving and mirroring add to it",
                ratios[SAVING] / ratios[FIT] - 1,
                at_most=0.10,
            ),
        ],
        "steps that began a save": f"{saves} of {counted}",
        "ratios by turn": {kind: [round(r, 3) for r in by_turn[kind]] for kind in (FIT, SAVING)},
        "preset": preset,
        "machine": machine(),
    }
