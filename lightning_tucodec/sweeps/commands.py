"""The command `tucodec sweep`."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lightning_tucodec.errors import ConfigError, ExternalToolError
from lightning_tucodec.io.processes import Interrupted, announced
from lightning_tucodec.sweeps.plan import Plan
from lightning_tucodec.sweeps.queue import Job, outstanding, queued, submit
from lightning_tucodec.sweeps.spec import Task
from lightning_tucodec.sweeps.status import status, table_text

HERE = "here"
"""The job of an attempt that `sweep run` made, where no queue has had a part in it."""


def run_plan(arguments: argparse.Namespace) -> int:
    """`tucodec sweep plan`."""
    plan, write = Plan.make(arguments.sweep, arguments.set, arguments.out)
    write()
    print(table_text(status(plan, {})), file=sys.stderr)
    print(plan.folder)
    return 0


def run_submit(arguments: argparse.Namespace) -> int:
    """`tucodec sweep submit`."""
    return _submit(_planned(arguments, dry=arguments.dry_run), [], arguments.dry_run)


def run_here(arguments: argparse.Namespace) -> int:
    """`tucodec sweep run`: without Slurm; when called again it resumes where it was stopped."""
    from lightning_tucodec.training.beside.companions import UNMIRRORED

    plan = _planned(arguments)
    result = 0
    for task in plan.tasks.values():
        if plan.is_complete(task):
            continue
        config = plan.finish_config(task)
        _note(plan, task, "start", None)
        status, told = 1, 0
        try:
            print(f"task {task.name}", file=sys.stderr)
            status, told = _fit(config)
            if status == UNMIRRORED:  # the training is complete; `fit` has said what is missing
                result, status = UNMIRRORED, 0
        finally:
            _note(plan, task, "end", status)
        if told and status in (0, 128 + told):
            raise Interrupted(told)
        if status:
            return status
    print(plan.folder)
    return result


def _fit(config: Path) -> tuple[int, int]:
    """Train in a separate process.

    Lightning starts the other ranks with the arguments and environment of its process, and no task may
    change them for the next. Signals that stop this process are forwarded to the child. The child has its
    own session, so it receives Ctrl-C only once, even if the whole group was signalled. It watches its
    parent and ends when this process is killed.

    Returns:
        Its exit status; the signal that told this process to stop, or 0.
    """
    from lightning_tucodec.training.beside.companions import SIGNALS

    children: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        for child in children:
            # The first Ctrl-C is forwarded as SIGTERM, on which a Python that is still starting prints no
            # traceback; the second one stops the training at once.
            first_interrupt = received == [signal.SIGINT]
            child.send_signal(signal.SIGTERM if first_interrupt else number)

    previous = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        words = [sys.executable, "-m", "lightning_tucodec.cli", "fit", "--config", str(config)]
        environment = {**os.environ, "TUCODEC_PARENT": str(os.getpid())}
        children.append(subprocess.Popen(words, env=environment, start_new_session=True))
        if received:  # before the child existed
            children[0].terminate()
        status = children[0].wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    told = received[0] if received else 0
    if told and status == 128 + signal.SIGTERM:  # by itself, not killed by the signal
        announced()
    if status < 0:
        status = 128 - status
    return 128 + told if told and status == 128 + signal.SIGTERM else status, told


def _note(plan: Plan, task: Task, event: str, status: int | None) -> None:
    """A line in attempts/, as slurm/train.sh writes them."""
    row = {"event": event, "job": HERE, "restart": 0, "time": int(time.time()), "status": status}
    with plan.file("attempts", task, ".jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def _planned(arguments: argparse.Namespace, dry: bool = False) -> Plan:
    """The named plan, or the plan of the named sweep, written unless `dry`."""
    if arguments.sweep.is_dir():
        if arguments.set:
            raise ConfigError(f"{arguments.sweep}: a plan does not change; --set needs SWEEP.yaml")
        return Plan.open(arguments.sweep)
    plan, write = Plan.make(arguments.sweep, arguments.set, arguments.out)
    if not dry:
        write()
    return Plan.open(plan.folder) if (plan.folder / "plan.yaml").exists() else plan


def run_retry(arguments: argparse.Namespace) -> int:
    """`tucodec sweep retry`."""
    return _submit(Plan.open(arguments.plan), arguments.tasks, arguments.dry_run)


def _submit(plan: Plan, names: Sequence[str], dry: bool) -> int:
    jobs = (_queued_or_unknown(plan) or {}) if dry else queued(plan)
    wanted = {plan.task(name).name for name in names or plan.tasks}
    tasks = [task for task in outstanding(plan, jobs) if task.name in wanted]
    if tasks:
        submit(plan, tasks, jobs, dry)
    else:
        print("nothing to submit: all tasks are complete or in the queue", file=sys.stderr)
    if not dry:
        print(plan.folder)
    return 0


def _queued_or_unknown(plan: Plan) -> dict[str, Job] | None:
    try:
        return queued(plan)
    except ExternalToolError as error:
        rows = [row for task in plan.tasks.values() for row in plan.attempts(task)]
        if not rows or any(
            row.get("job") != HERE for row in rows
        ):  # else no queue has had a part in it
            print(f"tucodec: the queue is not known, {error}", file=sys.stderr)
        return None


def run_status(arguments: argparse.Namespace) -> int:
    """`tucodec sweep status`."""
    plan = Plan.open(arguments.plan)
    rows = status(plan, _queued_or_unknown(plan))
    print(
        json.dumps([asdict(row) for row in rows], indent=1, default=str)
        if arguments.json
        else table_text(rows)
    )
    return 0


def run_resolve(arguments: argparse.Namespace) -> int:
    """`tucodec sweep resolve`, which slurm/train.sh calls when a task starts."""
    plan = Plan.open(arguments.plan)
    print(plan.finish_config(plan.task(arguments.task)))
    return 0
