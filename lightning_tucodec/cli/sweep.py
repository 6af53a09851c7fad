"""`tucodec sweep`: many trainings as jobs of Slurm."""

import argparse
from pathlib import Path

from lightning_tucodec.cli.arguments import Subparsers, command, family, location


def _path(text: str) -> Path:
    return Path(location(text))


def register(subparsers: Subparsers) -> None:
    """`tucodec sweep` and its commands."""
    commands = family(subparsers, "sweep", "many trainings as jobs of Slurm")
    plan = command(commands, "plan", run, "resolve a sweep into one configuration a task")
    submit_ = command(commands, "submit", run, "plan a sweep and submit its tasks to Slurm")
    local = command(commands, "run", run, "train a sweep's tasks here, one after the other")
    for parser, what in (
        (plan, "SWEEP.yaml"),
        (submit_, "SWEEP.yaml|PLAN"),
        (local, "SWEEP.yaml|PLAN"),
    ):
        parser.add_argument("sweep", type=_path, metavar=what)
        parser.add_argument("--out", type=_path, default=Path("sweeps"), metavar="DIR")
        parser.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="into every task"
        )
    submit_.add_argument("--dry-run", action="store_true", help="print the commands of sbatch")
    retry = command(
        commands, "retry", run, "submit again what is neither complete nor in the queue"
    )
    show = command(commands, "status", run, "what the tasks of a sweep are doing")
    resolve = command(commands, "resolve", run, "print a task's final configuration file")
    for parser in (retry, show, resolve):
        parser.add_argument("plan", type=_path, metavar="PLAN", help="folder of a planned sweep")
    show.add_argument("--json", action="store_true")
    retry.add_argument("tasks", nargs="*", metavar="TASK", help="as in ssim-3; all by default")
    retry.add_argument("--dry-run", action="store_true", help="print the commands of sbatch")
    resolve.add_argument("task", metavar="TASK", help="as in ssim-3")


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
