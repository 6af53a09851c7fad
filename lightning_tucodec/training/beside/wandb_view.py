"""W&B as a view of `metrics.jsonl`: one replay, for a run that trains and for one that is over.

Line i of the file is W&B's step i, and the server reports the last step that it has. So a replay after an
outage, a kill or a change of cluster sends missing lines only, and none twice. Charts use our own counters as
axes. Offline there is no server: each attempt writes one complete offline run that replaces the earlier one.

| at every validation | what |
|---|---|
| `rd/psnr`, `rd/ms_ssim` over `rd/bpp` | its point of the rate-distortion chart |
| `pictures/…`, `images` | pictures, and a table of all images with rate and quality of each |
| `baseline/…` | with `run.baseline`: percent of rate above the baseline's at equal quality |
| summary `bd_rate/…` | BD-rate against `run.baseline` of all runs with this one's group and tags |

    python -m lightning_tucodec.training.beside.wandb_view RUN_FOLDER    follows until stdin is closed
    tucodec wandb-sync RUN…                                               sends all of it, online
"""

import argparse
import base64
import contextlib
import io
import json
import netrc
import os
import shutil
import sys
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.files import read_yaml
from lightning_tucodec.quality.curve_files import read_named
from lightning_tucodec.quality.curves import Curve, Quality
from lightning_tucodec.quality.deltas import bd_rate, rate_at_quality
from lightning_tucodec.training.beside.companions import wait
from lightning_tucodec.training.runs.folder import RunFolder, read_metrics, validation_point
from lightning_tucodec.training.runs.manifest import Manifest

POLL_SECONDS = 5.0
ARRAY_SECONDS = 60.0
"""Sixteen tasks of an array start spread over this time, not at once."""

_QUALITIES: tuple[Quality, ...] = ("psnr", "ms_ssim_db")
"""In the order of `validation_point`."""

_NOT_IN_PROJECTS = "/\\#?%:"
_PROJECT_LENGTH = 128
_TAG_LENGTH = 64
_THUMBNAIL = 640
_STYLE = "body { font: 14px sans-serif } td { padding: 4px 12px; text-align: right; vertical-align: top }"


def server() -> str:
    """URL of W&B's server."""
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def has_key() -> bool:
    """Whether W&B will find a key: in the environment, or in `~/.netrc`, where `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = os.environ.get("NETRC") or "~/.netrc"
    try:
        entry = netrc.netrc(os.path.expanduser(path)).authenticators(urlsplit(server()).netloc)
    except (OSError, ValueError, netrc.NetrcParseError):
        return False
    return entry is not None and bool(entry[2])


def mode() -> str:
    """`online` with a key, else `offline`; WANDB_MODE overrides."""
    return os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")


def check_names(run: dict[str, Any]) -> None:
    """Refuse what W&B's client would not open a run with.

    Args:
        run: group `run` of a configuration.

    Raises:
        ConfigError: which option it is and what it can be.
    """
    project = run.get("project") or ""
    if len(project) > _PROJECT_LENGTH or any(letter in project for letter in _NOT_IN_PROJECTS):
        raise ConfigError(
            f"run.project: W&B takes at most {_PROJECT_LENGTH} letters and none of {_NOT_IN_PROJECTS}, "
            f"got {project!r:.80}"
        )
    for tag in run.get("tags") or ():
        if not 1 <= len(tag) <= _TAG_LENGTH:
            raise ConfigError(
                f"run.tags: W&B takes 1 to {_TAG_LENGTH} letters, got {len(tag)}: {tag!r:.80}"
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
            config = read_yaml(folder.path / "config.yaml")
            run = config["run"]
        except (ConfigError, KeyError) as error:
            raise ConfigError(f"{folder.path}: not a run folder ({error})") from None
        identifier = Manifest(folder).read().get("run_id") or folder.path.name.rpartition("-")[2]
        if not online:
            for old in (folder.path / "wandb").glob("offline-run-*"):
                shutil.rmtree(old, ignore_errors=True)
        self.folder = folder
        self.wandb = wandb
        self.baseline = _baseline(run.get("baseline"))
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
            settings=wandb.Settings(
                silent=True, console="off", x_disable_stats=True, disable_git=True
            ),
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
            seen = {**_rd_point(row), **self._against_baseline(row), **self._pictures(row)}
            self.run.log({**row, **seen}, step=number)
        self.sent = max(self.sent, len(rows))
        if any("val/bpp" in row for row in new):
            self._summarise()
        return len(new)

    def _against_baseline(self, row: dict[str, Any]) -> dict[str, float]:
        """How much more rate than the baseline's this validation needs, in percent."""
        point = validation_point([row])
        if self.baseline is None or point is None:
            return {}
        rate, *qualities = point
        percents = {}
        for name, value in zip(_QUALITIES, qualities, strict=True):
            if value is not None and name in self.baseline.lines:
                with contextlib.suppress(ConfigError):  # beyond the baseline's ends
                    same = rate_at_quality(*self.baseline.points(name), value)
                    percents[f"baseline/rate_percent_at_{name}"] = 100 * (rate / same - 1)
        return percents

    def _summarise(self) -> None:
        """BD-rates of the curve that this run is a point of, or why there are none."""
        if self.baseline is None:
            return
        points = sibling_points(self.folder)
        summary: dict[str, Any] = {"baseline": self.baseline.name, "bd_rate/runs": len(points)}
        for index, name in enumerate(_QUALITIES, start=1):
            known = [point for point in points if point[index] is not None]
            bpp = [point[0] for point in known]
            values: list[Any] = [point[index] for point in known]
            try:
                curve = Curve.of("this group", bpp, {name: values})
                summary[f"bd_rate/{name}"] = bd_rate(self.baseline, curve, name).percent
            except ConfigError as error:
                summary[f"bd_rate/{name}"] = f"none yet: {error}"
        self.run.summary.update(summary)

    def _pictures(self, row: dict[str, Any]) -> dict[str, Any]:
        if not any(name.startswith("val/") for name in row):
            return {}
        pattern = f"step-{int(row['opt_step']):08d}*.png"
        found = {_label(path): path for path in sorted(self.folder.images.glob(pattern))}
        shown = {
            f"pictures/{label or 'validation'}": self.wandb.Image(str(path))
            for label, path in found.items()
        }
        return {**shown, **self._table(int(row["opt_step"]), found)}

    def _table(self, step: int, pictures: dict[str, Path]) -> dict[str, Any]:
        """All validation images of a step: rate, quality, and a small picture of those that have one.

        As HTML: W&B's own tables are artifacts, and a server that takes none would lose the lines after one.
        """
        try:
            path = self.folder.images / f"step-{step:08d}.json"
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # a model that keeps none, or a run of an earlier version
        names = [
            name for name in dict.fromkeys(key for row in rows for key in row) if name != "index"
        ]
        lines = [["image", *map(escape, names), "original and decoded"]]
        for row in rows:
            number = int(row["index"])
            picture = pictures.get(str(number)) or (pictures.get("") if number == 0 else None)
            values = [f"{row[name]:.4f}" if name in row else "" for name in names]
            lines.append([str(number), *values, "" if picture is None else _small(picture)])
        cells = "".join(f"<tr><td>{'<td>'.join(line)}" for line in lines)
        text = f"<style>{_STYLE}</style><p>Validation at step {step}</p><table>{cells}</table>"
        return {"images": self.wandb.Html(text, inject=False)}

    def close(self) -> None:
        """Send the rest and end."""
        self._summarise()
        self.run.finish()


def _label(path: Path) -> str:
    """The label that distinguishes the pictures of one step, see `TrainingModule.picture_path`."""
    return path.stem.split("-", 2)[2] if path.stem.count("-") > 1 else ""


def _small(path: Path) -> str:
    """A picture for a table."""
    from PIL import Image

    with Image.open(path) as image:
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=85)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _baseline(specification: str | None) -> Curve | None:
    """The curve that a config names; a view on another machine may do without."""
    if specification is None:
        return None
    try:
        return read_named(specification)
    except ConfigError as error:
        print(f"tucodec: no BD-rates: {error}", file=sys.stderr, flush=True)
        return None


def sibling_points(folder: RunFolder) -> list[tuple[float, float, float | None]]:
    """Last validations of all runs beside this one with its group and tags; its own alone without group.

    A sweep's runs have its name as their group and their stage among the tags, so that these are the
    points of one curve.
    """
    own = _place(folder.path)
    folders = [folder.path]
    if own[0] is not None:
        folders = [p for p in sorted(folder.path.parent.iterdir()) if _place(p) == own]
    points = (validation_point(read_metrics(RunFolder(path).metrics)) for path in folders)
    return [point for point in points if point is not None]


def _place(path: Path) -> tuple[str | None, tuple[str, ...]]:
    """Group and tags of a run."""
    try:
        run = read_yaml(path / "config.yaml")["run"]
        return run.get("group"), tuple(sorted(run.get("tags") or ()))
    except (ConfigError, KeyError, TypeError, AttributeError):
        return None, ()


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
                words = ["-m", "lightning_tucodec.training.beside.wandb_view", str(folder.path)]
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
        raise ConfigError("wandb-sync needs a key, in WANDB_API_KEY or ~/.netrc (or --offline)")
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
