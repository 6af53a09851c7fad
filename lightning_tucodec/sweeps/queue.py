"""A plan's jobs in Slurm: what is in the queue, and how tasks become arrays."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_tucodec.errors import ConfigError, ExternalToolError
from lightning_tucodec.io.files import launchers
from lightning_tucodec.sweeps.plan import Plan
from lightning_tucodec.sweeps.spec import Task


@dataclass(frozen=True)
class Job:
    """A task in Slurm's queue.

    Attributes:
        array: id of its array of jobs.
        state: as `squeue` says, in lower case.
        reason: why it is not running.
        before: number of the task that is element 0 of the array.
    """

    array: str
    state: str
    reason: str
    before: int = 0


def queued(plan: Plan) -> dict[str, Job]:
    """The plan's tasks that are in the queue; empty where there is no Slurm.

    Raises:
        ExternalToolError: Slurm is there but does not answer.
    """
    # Only this user's: others may have jobs of the same names.
    command = [
        "squeue",
        "--noheader",
        "--array",
        f"--user={os.getuid()}",
        "--format=%F|%K|%T|%r|%j",
    ]
    stages = {_job_name(plan, task.stage, 0): task.stage for task in plan.tasks.values()}
    try:
        printed = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
    except FileNotFoundError:
        return {}
    except subprocess.TimeoutExpired:
        raise ExternalToolError("squeue: no answer after 60 s") from None
    if printed.returncode:
        raise ExternalToolError(f"squeue failed: {' '.join(printed.stderr.split())}")
    found = {}
    for line in printed.stdout.splitlines():
        array, index, state, reason, name = line.split("|", 4)
        stem, before = _split(name)
        if stem in stages and index.isdecimal():
            number = before + int(index)
            found[f"{stages[stem]}-{number}"] = Job(array, state.lower(), reason, before)
    return found


def _job_name(plan: Plan, stage: str, before: int) -> str:
    """What a stage's array is called; plans of one name in two folders differ by their keys."""
    key = f".{plan.key}" if plan.key else ""
    return f"{plan.folder.name}-{stage}{key}" + (f"+{before}" if before else "")


def _split(name: str) -> tuple[str, int]:
    """Such a name without `before`, and `before`."""
    found = re.fullmatch(r"(.*)\+(\d+)", name, re.DOTALL)
    return (found[1], int(found[2])) if found else (name, 0)


def _array_size() -> int | None:
    """How many elements an array may have here, rounded down to 10, 100, …; None where that is not known."""
    try:
        printed = subprocess.run(
            ["scontrol", "show", "config"], capture_output=True, text=True, timeout=60, check=False
        ).stdout
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^MaxArraySize *= *(\d+)$", printed, re.MULTILINE)
    return 10 ** (len(found[1]) - 1) if found else None  # indices are smaller than MaxArraySize


def outstanding(plan: Plan, jobs: dict[str, Job]) -> list[Task]:
    """Tasks that are neither complete nor in the queue."""
    return [t for t in plan.tasks.values() if t.name not in jobs and not plan.is_complete(t)]


def submit(plan: Plan, tasks: Sequence[Task], jobs: dict[str, Job], dry: bool = False) -> None:
    """Submit tasks; those of a stage that may start together form one job array.

    Where the cluster's MaxArraySize is smaller they form several arrays, each with indices from 0 on.

    A stage whose tasks each start from the task of the same number in another stage depends on that
    stage's array by `aftercorr`; other predecessors are waited for one by one.

    Args:
        plan: the sweep.
        tasks: what to submit.
        jobs: what is in the queue, see `queued`.
        dry: print the commands of sbatch instead.

    Raises:
        ConfigError: a task's predecessor is neither complete nor in the queue nor submitted.
        ExternalToolError: sbatch refuses them; the message holds the command to run elsewhere.
    """
    size = _array_size()
    arrays = {name: (job.array, job.before) for name, job in jobs.items()}
    remaining = list(tasks)
    while remaining:
        groups: dict[tuple[str, str, int], list[Task]] = {}
        for task in remaining:
            done = task.after is None or plan.is_complete(plan.task(task.after))
            if done or task.after in arrays:
                before = task.number // size * size if size else 0
                after = "" if done else _dependency(plan, task, before, arrays)
                groups.setdefault((task.stage, after, before), []).append(task)
        if not groups:
            first = remaining[0]
            raise ConfigError(f"{first.name}: starts from {first.after}, which is not submitted")
        for (stage, after, before), members in groups.items():
            log = f"{stage}-{_number_in_log(before, size)}.log"
            identifier = _sbatch(plan, stage, after, members, before, log, dry)
            arrays.update({task.name: (identifier, before) for task in members})
        remaining = [task for task in remaining if task.name not in arrays]


def _dependency(plan: Plan, task: Task, before: int, arrays: dict[str, tuple[str, int]]) -> str:
    """The value of `sbatch --dependency` for a task whose predecessor is in an array."""
    assert task.after is not None
    previous = plan.task(task.after)
    array, start = arrays[previous.name]
    index = previous.number - start
    stage = [other for other in plan.tasks.values() if other.stage == task.stage]
    if index == task.number - before and all(
        other.after == f"{previous.stage}-{other.number}" for other in stage
    ):
        return f"aftercorr:{array}"
    return f"afterok:{array}_{index}"


def _number_in_log(before: int, size: int | None) -> str:
    """The number of a task in the name of its log, for sbatch, which knows only the index in the array."""
    digits = len(str(size or 10)) - 1
    if before == 0 and digits:
        return "%a"
    return f"{before // (size or 1)}%{digits}a" if digits else str(before)


def _sbatch(
    plan: Plan, stage: str, after: str, tasks: Sequence[Task], before: int, log: str, dry: bool
) -> str:
    """Submit one array; returns its id."""
    launcher = launchers()
    command = [
        str(launcher / "submit.sh"), *(["--dry-run"] if dry else []), "--before", str(before),
        f"--job-name={_job_name(plan, stage, before)}",
        f"--array={','.join(str(task.number - before) for task in tasks)}",
        f"--output={str(plan.folder).replace('%', '%%')}/logs/{log}",
        *([f"--dependency={after}", "--kill-on-invalid-dep=yes"] if after else []),
        "--", str(launcher / "train.sh"), "--sweep", str(plan.folder), stage,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines()
        again = (
            f"cd {shlex.quote(os.getcwd())} && tucodec sweep submit {shlex.quote(str(plan.folder))}"
        )
        raise ExternalToolError(
            f"{words[-1] if words else 'sbatch failed'}; the plan stands: where jobs may be "
            f"submitted, call: {again}"
        )
    names = ", ".join(task.name for task in tasks)
    if dry:
        print(done.stdout.strip())
        return f"<{stage}{f'+{before}' if before else ''}>"
    print(f"job {done.stdout.strip()}: {names}", file=sys.stderr)
    return done.stdout.strip()
