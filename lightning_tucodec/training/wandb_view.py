"""W&B as a view of `metrics.jsonl`: one replay, for a run that trains and for one that is over.

Line i of the file is W&B's step i, and the server says how far it got, so that a replay after an outage, a
kill or a change of cluster sends what is missing and nothing twice. Charts have our own counters as their
axes. Offline there is no server to ask: each attempt writes one complete offline run in the place of the
earlier one, so there are no fragments to put in order.

    python -m lightning_tucodec.training.wandb_view RUN_FOLDER     follows until standard input is closed
    tucodec wandb-sync RUN…                                        sends all of it, online
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.training.companions import wait
from lightning_tucodec.training.runs import Manifest, RunFolder, read_metrics

POLL_SECONDS = 5.0
ARRAY_SECONDS = 60.0
"""Sixteen tasks of an array start spread over this time, not at once."""

PICTURE_LIMIT = 200
"""Validations with pictures in one run."""


def mode() -> str:
    """`online` with a key, else `offline`; WANDB_MODE overrides."""
    return os.environ.get("WANDB_MODE") or (
        "online" if os.environ.get("WANDB_API_KEY") else "offline"
    )


class View:
    """One open W&B run that lines are sent to.

    Args:
        folder: of the run.
        online: send to the server, else write an offline run below the folder.
    """

    def __init__(self, folder: RunFolder, online: bool) -> None:
        import wandb

        try:
            config = yaml.safe_load((folder.path / "config.yaml").read_text(encoding="utf-8"))
            run = config["run"]
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise ConfigError(f"{folder.path}: not a run folder ({error})") from None
        identifier = Manifest(folder).read().get("run_id") or folder.path.name.rpartition("-")[2]
        if not online:
            for old in (folder.path / "wandb").glob("offline-run-*"):
                shutil.rmtree(old, ignore_errors=True)
        self.folder = folder
        self.images = wandb.Image
        self.run = wandb.init(
            project=run["project"],
            id=identifier,
            name=folder.path.name,
            group=run.get("group"),
            job_type=run.get("job_type"),
            tags=run.get("tags"),
            dir=str(folder.path),
            config=config,
            mode="online" if online else "offline",
            resume="allow" if online else None,
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        self.run.define_metric("opt_step")
        self.run.define_metric("images_seen")
        self.run.define_metric("rd/bpp")
        self.run.define_metric("rd/*", step_metric="rd/bpp")
        self.run.define_metric("*", step_metric="opt_step")
        self.sent = int(self.run.starting_step)  # `step` is zero until the first line

    def send(self) -> int:
        """Send the lines that are new; returns how many."""
        rows = read_metrics(self.folder.metrics)
        new = rows[self.sent :]
        for number, row in enumerate(new, start=self.sent):
            self.run.log({**row, **_rd_point(row), **self._pictures(row)}, step=number)
        self.sent = max(self.sent, len(rows))
        return len(new)

    def _pictures(self, row: dict[str, Any]) -> dict[str, Any]:
        if not any(name.startswith("val/") for name in row):
            return {}
        pattern = f"step-{int(row['opt_step']):08d}*.png"
        return {
            f"pictures/{path.stem.partition('-')[2].partition('-')[2] or 'validation'}": self.images(
                str(path)
            )
            for path in sorted(self.folder.images.glob(pattern))
        }

    def close(self) -> None:
        """Send the rest and end."""
        self.run.finish()


def _rd_point(row: dict[str, Any]) -> dict[str, float]:
    """Quality against rate: a validation is one point of the rate-distortion chart."""
    if "val/bpp" not in row:
        return {}
    names = {"rd/bpp": "val/bpp", "rd/psnr": "val/psnr", "rd/ms_ssim": "val/ms_ssim"}
    return {name: row[source] for name, source in names.items() if source in row}


def follow(folder: RunFolder, failures: int = 0) -> None:
    """Send lines as they come until standard input is closed; when W&B fails, start as a new process."""
    view: View | None = None
    wait(ARRAY_SECONDS * (int(os.environ.get("SLURM_ARRAY_TASK_ID", 0)) % 16) / 16)
    last = False
    while not last:
        last = wait(POLL_SECONDS)
        try:
            view = view or View(folder, mode() == "online")
            view.send()
            if last:
                view.close()
        except Exception as error:  # whatever W&B does, the run goes on
            text = " ".join(str(error).split())[:300]
            print(f"tucodec: W&B, failure {failures + 1}: {text}", file=sys.stderr, flush=True)
            if not last:
                wait(min(300, 10 * 2**failures))
                words = ["-m", "lightning_tucodec.training.wandb_view", str(folder.path)]
                os.execv(sys.executable, [sys.executable, *words, str(failures + 1)])


def sync(run: Path, online: bool = True) -> int:
    """Replay a run's lines.

    Args:
        run: a run folder.
        online: to the server, else into an offline run below the folder.

    Returns:
        Number of lines that were sent.

    Raises:
        ConfigError: it is no run folder, or W&B does not take it.
    """
    folder = RunFolder(run)
    if not folder.metrics.exists():
        raise ConfigError(f"{run}: no metrics.jsonl; is it a run folder?")
    if online and mode() != "online":
        raise ConfigError("wandb-sync needs WANDB_API_KEY (or --offline)")
    try:
        view = View(folder, online)
        count = view.send()
        view.close()
    except ConfigError:
        raise
    except Exception as error:  # W&B's errors have no common base
        raise ConfigError(f"{run}: W&B: {' '.join(str(error).split())[:300]}") from None
    return count


def run_sync(arguments: argparse.Namespace) -> int:
    """Replay each run; one that fails does not keep the others back."""
    status = 0
    for run in arguments.runs:
        try:
            count = sync(Path(run), not arguments.offline)
            print(f"{run}  {count} lines sent")
        except ConfigError as error:
            print(f"tucodec: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    follow(RunFolder(Path(sys.argv[1])), int((sys.argv[2:] or ["0"])[0]))
