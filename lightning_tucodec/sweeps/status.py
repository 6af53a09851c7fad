"""What the tasks of a plan are doing, from their files and the queue."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_tucodec.io.files import read_yaml
from lightning_tucodec.sweeps.plan import Plan
from lightning_tucodec.sweeps.queue import Job
from lightning_tucodec.sweeps.spec import Task, entry
from lightning_tucodec.training.runs.folder import RunFolder, read_metrics
from lightning_tucodec.training.runs.manifest import ECHO, PREEMPTED, Manifest


@dataclass(frozen=True)
class Row:
    """A task's line in the status table; None where a value is not known yet.

    Attributes:
        task: its name.
        label: values of the grid.
        state: planned, waiting, pending, running, complete, stopped (it saved itself after a signal),
            failed, lost (its job is gone without an end), started (the same, but the queue is not known).
        step: optimiser steps done.
        steps: optimiser steps in all.
        bpp: of the last validation, else of the last training line.
        psnr: the same.
        restarts: starts after the first.
        note: why it waits, or the last error.
        run: its run folder.
    """

    task: str
    label: dict[str, Any]
    state: str
    step: int
    steps: int | None
    bpp: float | None
    psnr: float | None
    restarts: int
    note: str
    run: str | None


def status(plan: Plan, jobs: dict[str, Job] | None) -> list[Row]:
    """Every task of a plan, from its files and the queue; None for `jobs`: the queue is not known."""
    known = jobs is not None
    return [_row(plan, task, (jobs or {}).get(task.name), known) for task in plan.tasks.values()]


def _row(plan: Plan, task: Task, job: Job | None, known: bool) -> Row:
    attempts = plan.attempts(task)
    starts = sum(row["event"] == "start" for row in attempts)
    ended = attempts[-1].get("status") if attempts and attempts[-1]["event"] == "end" else None
    note = ""
    if plan.is_complete(task):
        state = "complete"
    elif job is not None:
        state = "running" if job.state in ("running", "completing") else "pending"
        if state == "pending":
            waits = job.reason in ("Dependency", "DependencyNeverSatisfied")
            state = "waiting" if waits else "pending"
            note = f"for {task.after}" if waits else _reason(task, job)
    elif ended == PREEMPTED and not attempts[-1].get("reason"):  # else Slurm says why it stays down
        state, note = "stopped", "saved; `tucodec sweep run` goes on"
    elif ended is not None:
        state, note = "failed", _last_error(plan, task, attempts) or f"exit status {ended}"
    elif attempts:
        state, note = "lost" if known else "started", _last_error(plan, task, attempts)
    else:
        state = "planned"
    folder = plan.run_folder(task)
    metrics = read_metrics(folder / "metrics.jsonl") if folder else []
    bpp, psnr = _newest(metrics, "bpp"), _newest(metrics, "psnr")
    config = next(
        (p for part in ("configs", "waiting") if (p := plan.file(part, task, ".yaml")).exists()),
        None,
    )
    steps = entry(read_yaml(config), "trainer.max_steps") if config else None
    step = max((row["opt_step"] for row in metrics), default=0)
    if state == "stopped" and folder is not None:  # the save need not be at a step that is logged
        saved = _last_attempt(folder).get("step")
        step = max(step, saved) if isinstance(saved, int) else step
    if state == "complete" and steps is not None:
        step = steps  # the last step need not be one that is logged
    run = str(folder) if folder else None
    return Row(task.name, task.label, state, step, steps, bpp, psnr, max(0, starts - 1), note, run)


def _reason(task: Task, job: Job) -> str:
    """Why a task is pending; what Slurm holds waits for somebody to release it."""
    if "held" not in job.reason.lower():
        return job.reason
    index = int(task.name.rpartition("-")[2]) - job.before
    return f"{job.reason}; when the cause is mended: scontrol release {job.array}_{index}"


def _newest(metrics: Sequence[dict[str, Any]], name: str) -> float | None:
    """The last value of a metric, from a validation if there was one."""
    for key in (f"val/{name}", f"train/{name}"):
        for row in reversed(metrics):
            if key in row:
                return float(row[key])
    return None


def _last_attempt(folder: Path) -> dict[str, Any]:
    """What a run's manifest says of its last attempt; empty without one."""
    attempts: list[dict[str, Any]] = Manifest(RunFolder(folder)).read().get("attempts") or [{}]
    return attempts[-1]


def _last_error(plan: Plan, task: Task, attempts: Sequence[dict[str, Any]]) -> str:
    """Why the last attempt ended: as its launcher says, or its manifest, or the log's last error.

    The manifest may know nothing of an attempt that was refused, or only that another process ended first.
    """
    if reason := attempts[-1].get("reason"):
        return str(reason)
    said = ""
    folder = plan.run_folder(task)
    if folder is not None:
        started = max(
            (row.get("time", 0) for row in attempts if row["event"] == "start"), default=0
        )
        entry = _last_attempt(folder)
        if entry.get("error") and _seconds(entry["start"]) >= started:
            said = str(entry["error"])
    ours, others = _lines_of_errors(plan.file("logs", task, ".log"))
    if said and not said.startswith(ECHO):
        return said
    return (ours or [said] * bool(said) or others or [""])[-1]


def _seconds(time: str) -> float:
    try:
        return datetime.fromisoformat(time).timestamp()
    except ValueError:
        return 0.0


def _lines_of_errors(log: Path) -> tuple[list[str], list[str]]:
    """Of the last attempt in a log: lines of this program, lines of others that look like errors."""
    if not log.exists():
        return [], []
    with open(log, "rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(0, stream.tell() - 65536))
        lines = stream.read().decode("utf-8", "replace").splitlines()
    starts = [
        i for i, line in enumerate(lines) if line.startswith("train.sh: job") and ", start " in line
    ]
    lines = lines[max(starts, default=0) :]
    ours = [line.strip() for line in lines if line.startswith("tucodec")]
    others = [line.strip() for line in lines if re.search(r"error|Error|CANCELLED|Killed", line)]
    return ours, others


def table_text(rows: Sequence[Row]) -> str:
    """The status table, one line a task."""
    lines: list[tuple[str, ...]] = [("task", "", "state", "step", "bpp", "PSNR", "restarts", "")]
    for row in rows:
        label = " ".join(f"{key.split('.')[-1]}={value}" for key, value in row.label.items())
        steps = f"{row.step}/{row.steps}" if row.steps is not None else str(row.step)
        numbers = ("-" if v is None else f"{v:.{n}f}" for v, n in ((row.bpp, 4), (row.psnr, 2)))
        lines.append((row.task, label, row.state, steps, *numbers, str(row.restarts), row.note))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )
