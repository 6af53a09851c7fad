"""Where metrics go: an append-only JSONL file is the truth, W&B is a view of it.

A line is `{"opt_step": …, "images_seen": …, "time": …, "train/loss": …}`. W&B never stops a run: when it
fails, it is said once and the run goes on.
"""

import json
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from lightning_tucodec.files import atomic_write


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file; a line cut short by a kill is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


class JsonlLogger(Logger):
    """Appends every logged dictionary to `metrics.jsonl`, one line each, flushed."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        super().__init__()
        self.path = path
        self.resumed_step = resumed_step
        self.counters: dict[str, int] = {"opt_step": resumed_step, "images_seen": 0}
        self._prepare()

    @rank_zero_only
    def _prepare(self) -> None:
        """Drop the lines after the step that the run goes on from: they will be written again."""
        rows = read_metrics(self.path)
        kept = [row for row in rows if row["opt_step"] <= self.resumed_step]
        if len(kept) != len(rows):
            with atomic_write(self.path, "w") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in kept)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def name(self) -> str:
        """Name of this kind of logger."""
        return "jsonl"

    @property
    def version(self) -> str:
        """The run folder's name."""
        return self.path.parent.name

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """The config is a file of the run folder; nothing to do."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line."""
        values = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        if values:
            row = {**self.counters, "time": round(time.time(), 3), **values}
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")


class WandbView(Logger):
    """Mirrors metrics and pictures to W&B; offline unless a key is set; its failures are ignored."""

    def __init__(self, folder: Path, run_id: str, project: str, config: dict[str, Any]) -> None:
        super().__init__()
        self.folder, self.run_id, self.project, self.config = folder, run_id, project, config
        self.counters: dict[str, int] = {}
        self._run: Any = None
        self._failed = False

    @property
    def name(self) -> str:
        """Name of this kind of logger."""
        return "wandb"

    @property
    def version(self) -> str:
        """The W&B run id."""
        return self.run_id

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """The config is given when the run is opened."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log against our own counters, never W&B's step."""
        self._try(lambda run: run.log({**self.counters, **metrics}))

    @rank_zero_only
    def log_pictures(self, pictures: dict[str, Path]) -> None:
        """Log image files under their names."""

        def send(run: Any) -> None:
            import wandb

            images = {name: wandb.Image(str(path)) for name, path in pictures.items()}
            run.log({**self.counters, **images})

        self._try(send)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the run."""
        if self._run is not None:
            self._try(lambda run: run.finish(exit_code=0 if status == "success" else 1))

    def _open(self) -> Any:
        import wandb

        has_key = bool(os.environ.get("WANDB_API_KEY"))
        run = wandb.init(
            project=self.project,
            id=self.run_id,
            name=self.folder.name,
            dir=str(self.folder),
            config=self.config,
            mode=os.environ.get("WANDB_MODE", "online" if has_key else "offline"),  # type: ignore[arg-type]
            resume="allow" if has_key else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        run.define_metric("opt_step")
        run.define_metric("*", step_metric="opt_step")
        return run

    def _try(self, action: Any) -> None:
        if self._failed:
            return
        try:
            if self._run is None:
                self._run = self._open()
            action(self._run)
        except Exception as error:
            self._failed = True
            print(f"tucodec: W&B is left out from here on: {error}", file=sys.stderr, flush=True)
