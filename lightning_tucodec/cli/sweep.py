"""`tucodec sweep`: many trainings as jobs of Slurm."""

import argparse
from pathlib import Path

from lightning_tucodec.cli.arguments import Subparsers, command, family, location


def _path(text: str) -> Path:
    return Path(location(text))


def register(subparsers: Subparsers) -> None:
    """`tucodec sweep` and its commands."""
    commands = family(subparsers, "sweep", "run many trainings as Slurm jobs")
    plan = command(commands, "plan", run, "resolve a sweep into one configuration for each task")
    submit_ = command(commands, "submit", run, "plan a sweep and submit its tasks to Slurm")
    local = command(
        commands, "run", run, "train a sweep's tasks on this machine, one after the other"
    )
    for parser, what in (
        (plan, "SWEEP.yaml"),
        (submit_, "SWEEP.yaml|PLAN"),
        (local, "SWEEP.yaml|PLAN"),
    ):
        parser.add_argument("sweep", type=_path, metavar=what)
        parser.add_argument("--out", type=_path, default=Path("sweeps"), metavar="DIR")
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override an option in every task",
        )
    submit_.add_argument("--dry-run", action="store_true", help="print the sbatch commands")
    retry = command(
        commands, "retry", run, "submit tasks that are neither complete nor in the queue"
    )
    show = command(commands, "status", run, "show the state of a sweep's tasks")
    resolve = command(commands, "resolve", run, "print a task's final configuration file")
    for parser in (retry, show, resolve):
        parser.add_argument("plan", type=_path, metavar="PLAN", help="folder of a planned sweep")
    show.add_argument("--json", action="store_true")
    retry.add_argument(
        "tasks", nargs="*", metavar="TASK", help="task names, such as ssim-3 (default: all)"
    )
    retry.add_argument("--dry-run", action="store_true", help="print the sbatch commands")
    resolve.add_argument("task", metavar="TASK", help="task name, such as ssim-3")


def run(arguments: argparse.Namespace) -> int:
    """One of the commands."""
    from lightning_tucodec.sweeps import commands

    runners = {
        "plan": commands.run_plan,
        "submit": commands.run_submit,
        "run": commands.run_here,
        "retry": commands.run_retry,
        "status": commands.run_status,
        "resolve": commands.run_resolve,
    }
    return runners[arguments.sweep_command](arguments)
