"""Sweeps: a file of stages and grids to one immutable configuration a task, and their jobs in Slurm.

A plan is a folder `sweeps/<name>-<id>`, the id a hash of all resolved configurations:

    plan.yaml            tasks, where each starts from, labels
    configs/TASK.yaml    what `tucodec fit` gets; that of a task which starts from another task's weights is
                         written when that one has finished (the run's id depends on the weights)
    waiting/TASK.yaml    the same without those weights
    runs/TASK            link to the run folder, from the moment that the configuration is final
    attempts/TASK.jsonl  a line at each start and end of a job (slurm/train.sh writes it)
    logs/TASK.log        what its jobs printed

A task is complete when its last line in attempts/ is an end with status 0.
"""

import argparse
import copy
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_tucodec.errors import ConfigError, ExternalToolError, TucodecError
from lightning_tucodec.files import atomic_write, check_name, parse_yaml, read_json_lines, read_yaml
from lightning_tucodec.training.identity import arguments
from lightning_tucodec.training.runs import Manifest, RunFolder, read_metrics

Config = dict[str, Any]

_STAGE: dict[str, tuple[Any, str]] = {
    "config": ((str, list), "a file or a list of files"),
    "set": (dict, "KEY: VALUE"),
    "grid": (dict, "KEY: [VALUE, …]"),
    "init_from": ((str, dict), "a path, the name of a model, or {stage: NAME}"),
    "chain": (bool, "true or false"),
}
"""What a stage may say: types, and the same in words."""


@dataclass(frozen=True)
class Task:
    """One training of a sweep.

    Attributes:
        stage: its stage.
        number: its place in the stage and in the stage's array of jobs.
        label: the values of the grid that make it different from its neighbours.
        after: name of the task whose final weights it starts with.
    """

    stage: str
    number: int
    label: dict[str, Any] = field(default_factory=dict, hash=False)
    after: str | None = None

    @property
    def name(self) -> str:
        """As in `ssim-3`."""
        return f"{self.stage}-{self.number}"


# --- From a sweep's file to tasks ------------------------------------------------------------


class Draft:
    """A task's configuration before defaults: files as `fit --config A --config B` reads them, and values.

    Args:
        files: contents, later ones win.
    """

    def __init__(self, files: Sequence[Config]) -> None:
        self.files = files
        self.values: Config = {}

    def layers(self) -> list[Config]:
        """What `fit` is to read, one file after the other."""
        values: Config = {}
        for group, options in self.values.items():
            if isinstance(options, dict) and "class_path" in options:
                inner = {name: value for name, value in options.items() if name != "class_path"}
                values[group] = {"class_path": options["class_path"], "init_args": inner}
            else:
                values[group] = options
        return [*self.files, values] if values else list(self.files)

    def get(self, key: str) -> Any:
        """The value of an entry, None where there is none; keys as those of `set`."""
        group, option, rest = _parts(key)
        for layer in (self.values, *reversed(self.files)):
            if not option and group in layer:
                return layer[group]
            values = arguments(layer, group) if isinstance(layer.get(group), dict) else None
            if isinstance(values, dict) and option in values:
                return _at(values[option], rest)
        return None

    def set(self, key: str, value: Any) -> None:
        """Put in a value.

        Args:
            key: as in `model.lmbda`, the same as `model.init_args.lmbda`. Names inside an option hold
                dots themselves, as in `model.codec.hyper.channels`.
            value: replaces the option's value, as `fit` does.

        Raises:
            ConfigError: it is an entry of something that has none.
        """
        group, option, rest = _parts(key)
        if not option:
            if isinstance(value, dict):
                for name, inner in value.items():
                    self.set(f"{group}.{name}", inner)
            else:
                self.values[group] = value
            return
        if rest:
            whole = copy.deepcopy(self.get(f"{group}.{option}"))
            whole = {} if whole is None else whole
            if not isinstance(whole, dict):
                raise ConfigError(f"{key}: no such entry")
            _put(whole, rest, value)
            value = whole
        options = self.values.setdefault(group, {})
        if not isinstance(options, dict):
            raise ConfigError(f"{key}: no such entry")
        options[option] = value


def _parts(key: str) -> tuple[str, str, str]:
    """Group, option and what is inside the option of a key.

    Raises:
        ConfigError: it is no key.
    """
    found = re.fullmatch(r"(\w+)(?:\.init_args)?(?:\.(\w+)(?:\.(\S+))?)?", str(key))
    if found is None:
        raise ConfigError(f"{key}: a key is written as in model.lmbda")
    return found[1], found[2] or "", found[3] or ""


def _at(value: Any, key: str) -> Any:
    """An entry inside a value, None where there is none; names in it may hold dots."""
    if not key:
        return value
    if not isinstance(value, dict):
        return None
    head, _, rest = key.partition(".")
    return value[key] if key in value else _at(value.get(head), rest) if rest else None


def _put(into: Config, key: str, value: Any) -> None:
    head, _, rest = key.partition(".")
    if rest and isinstance(into.get(head), dict):
        _put(into[head], rest, value)
    else:
        into[key] = value


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> tuple[str, dict[Task, Draft]]:
    """Name and tasks of a sweep's file, each task with its configuration, defaults not yet filled in.

    Args:
        path: YAML with `name` and `stages`; see docs/cluster.md.
        overrides: "group.key=value", put into every configuration last.

    Raises:
        ConfigError: the file says something that has no meaning.
    """
    content = read_yaml(path)
    if set(content) != {"name", "stages"} or not isinstance(content["stages"], dict):
        raise ConfigError(f"{path}: a sweep has two entries, `name` and `stages`")
    name = check_name(content["name"], f"{path}: name")
    last = dict(map(_setting, overrides))
    tasks: dict[Task, Draft] = {}
    for stage, entries in content["stages"].items():
        where = f"{path}: stage {stage}"
        if not isinstance(stage, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,49}", stage):
            raise ConfigError(f"{where}: a name consists of at most 50 letters and digits")
        try:
            tasks |= _read_stage(path.parent, stage, entries, last, tasks)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    if not tasks:
        raise ConfigError(f"{path}: stages: there is none")
    return name, tasks


def _setting(text: str) -> tuple[str, Any]:
    """Key and value of a --set."""
    key, sign, value = text.partition("=")
    try:
        if not sign:
            raise ConfigError("write KEY=VALUE, as in data.shards=shards/train")
        _parts(key)
        return key, parse_yaml(value, "its value")
    except ConfigError as error:
        raise ConfigError(f"--set {text}: {error}") from None


def _read_stage(
    folder: Path, name: str, entries: Any, last: Config, earlier: dict[Task, Draft]
) -> dict[Task, Draft]:
    """Tasks of one stage.

    Args:
        folder: what the names of its configuration files are relative to.
        name: of the stage.
        entries: what the file says about it.
        last: values that are put into every configuration.
        earlier: tasks of the stages before it.

    Raises:
        ConfigError: something has no meaning.
    """
    if not isinstance(entries, dict) or set(entries) - _STAGE.keys() or "config" not in entries:
        raise ConfigError(f"needs `config`, knows {', '.join(sorted(_STAGE))}")
    for key, (kinds, words) in _STAGE.items():
        if entries.get(key) is not None and not isinstance(entries[key], kinds):
            raise ConfigError(f"{key}: must be {words}")
    files = entries["config"] if isinstance(entries["config"], list) else [entries["config"]]
    if not files or not all(isinstance(file, str) for file in files):
        raise ConfigError(f"config: must be {_STAGE['config'][1]}")
    contents = [read_yaml(folder / file) for file in files]
    grid: dict[str, list[Any]] = entries.get("grid") or {}
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grid.{key} must be a list of values")
    init_from = entries.get("init_from")
    made: dict[Task, Draft] = {}
    points = list(itertools.product(*grid.values()))
    for number, point in enumerate(points):
        label = dict(zip(grid, point, strict=True))
        draft = Draft(contents)
        for key, value in {**(entries.get("set") or {}), **label, **last}.items():
            draft.set(key, value)
        after: str | None = None
        if entries.get("chain") and number:
            after = f"{name}-{number - 1}"
        elif isinstance(init_from, dict):
            after = _predecessor(init_from, number, len(points), earlier)
        elif init_from is not None:
            draft.set("run.init_from", init_from)
        made[Task(name, number, label, after)] = draft
    return made


def _predecessor(init_from: Config, number: int, count: int, tasks: dict[Task, Draft]) -> str:
    """The task that `init_from` of a stage means for its task `number`.

    Raises:
        ConfigError: none or several fit.
    """
    wanted = dict(init_from)
    stage = wanted.pop("stage", None)
    found = [task for task in tasks if task.stage == stage]
    if not found:
        raise ConfigError(f"init_from: no earlier stage {stage!r}")
    chosen = [task for task in found if all(tasks[task].get(k) == v for k, v in wanted.items())]
    if len(chosen) == 1:
        return chosen[0].name
    if not wanted and len(found) == count:
        return found[number].name
    raise ConfigError(
        f"init_from: {len(chosen)} of the {len(found)} tasks of {stage} fit; one must, "
        f"or both stages must have equally many"
    )


# --- Plans -----------------------------------------------------------------------------------


class Plan:
    """A planned sweep; see the module's docstring for its folder."""

    def __init__(self, folder: Path, tasks: list[Task]) -> None:
        self.folder = folder
        self.tasks = {task.name: task for task in tasks}

    @classmethod
    def open(cls, folder: Path) -> "Plan":
        """Read a plan's folder.

        Raises:
            ConfigError: there is none.
        """
        if not (folder / "plan.yaml").is_file():
            raise ConfigError(f"{folder}: holds no plan (plan.yaml is missing)")
        content = read_yaml(folder / "plan.yaml")
        try:
            return cls(folder, [Task(**entry) for entry in content["tasks"]])
        except (KeyError, TypeError):
            raise ConfigError(f"{folder / 'plan.yaml'}: damaged; plan the sweep again") from None

    @classmethod
    def make(cls, sweep: Path, overrides: Sequence[str], parent: Path) -> "tuple[Plan, Writer]":
        """Resolve a sweep; nothing is written before the second value is called.

        Raises:
            ConfigError: the sweep, or a configuration in it, cannot work.
        """
        from lightning_tucodec.training.fit import check_config

        name, drafts = read_sweep(sweep, overrides)
        resolved: dict[Task, Config] = {}
        for task, draft in drafts.items():
            try:
                resolved[task] = resolve_config(*draft.layers())
                check_config(resolved[task])
                RunFolder.of(resolved[task])  # looks at shards and weights; better now than in jobs
            except TucodecError as error:
                raise ConfigError(f"{sweep}: {task.name}: {error}") from None
        named = [[asdict(task), config] for task, config in resolved.items()]
        text = json.dumps(named, sort_keys=True, default=str)
        folder = parent / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        for task, config in resolved.items():
            _tag(config, folder.name, task)
        return cls(folder, list(resolved)), Writer(folder, name, resolved)

    def file(self, part: str, task: Task, suffix: str) -> Path:
        """As `configs/ssim-3.yaml`."""
        return self.folder / part / f"{task.name}{suffix}"

    def task(self, name: str) -> Task:
        """By name.

        Raises:
            ConfigError: there is no such task.
        """
        if name not in self.tasks:
            raise ConfigError(
                f"{self.folder}: has no task {name!r}; it has {', '.join(self.tasks)}"
            )
        return self.tasks[name]

    def run_folder(self, task: Task) -> Path | None:
        """Where the task's run lives; None before that is known."""
        link = self.folder / "runs" / task.name
        return (
            Path(os.path.normpath(link.parent / os.readlink(link))) if link.is_symlink() else None
        )

    def attempts(self, task: Task) -> list[dict[str, Any]]:
        """Starts and ends of the task's jobs."""
        rows = read_json_lines(self.file("attempts", task, ".jsonl"))
        return [row for row in rows if "event" in row]

    def is_complete(self, task: Task) -> bool:
        """Whether its last job ended well."""
        rows = self.attempts(task)
        return bool(rows) and rows[-1]["event"] == "end" and rows[-1].get("status") == 0

    def finish_config(self, task: Task) -> Path:
        """The task's final configuration, made now if it had to wait for another task's weights.

        Raises:
            ConfigError: that task has not finished.
        """
        path = self.file("configs", task, ".yaml")
        if path.exists():
            return path
        assert task.after is not None
        before = self.task(task.after)
        folder = self.run_folder(before)
        if folder is None or not self.is_complete(before):
            raise ConfigError(f"{task.name}: starts from {before.name}, which is not complete")
        config = read_yaml(self.file("waiting", task, ".yaml"))
        config["run"]["init_from"] = str(folder / "checkpoints" / "last.ckpt")
        _write_final(self.folder, task, config)
        return path


class Writer:
    """Writes a new plan's folder; does nothing where it is there, since its name says what it holds."""

    def __init__(self, folder: Path, name: str, configs: dict[Task, Config]) -> None:
        self.folder, self.name, self.configs = folder, name, configs

    def __call__(self) -> None:
        """Write."""
        if (self.folder / "plan.yaml").exists():
            return
        for part in ("configs", "waiting", "runs", "attempts", "logs"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        for task, config in self.configs.items():
            if task.after is None:
                _write_final(self.folder, task, config)
            else:
                _dump(self.folder / "waiting" / f"{task.name}.yaml", config)
        tasks = [asdict(task) for task in self.configs]
        _dump(self.folder / "plan.yaml", {"name": self.name, "tasks": tasks})


def _write_final(folder: Path, task: Task, config: Config) -> None:
    """The link to the run folder, then the configuration."""
    target = RunFolder.of(config).path
    link = folder / "runs" / task.name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    relative = target if target.is_absolute() else os.path.relpath(target, link.parent)
    link.symlink_to(relative, target_is_directory=True)
    _dump(folder / "configs" / f"{task.name}.yaml", config)


def _dump(path: Path, content: Any) -> None:
    with atomic_write(path, "w") as stream:
        yaml.safe_dump(content, stream, sort_keys=False, allow_unicode=True)


def resolve_config(*layers: Config) -> Config:
    """A configuration as `tucodec fit` understands it, with all defaults filled in.

    Args:
        layers: contents of its files; later ones win as those of `fit --config A --config B`.

    Raises:
        ConfigError: it is not one.
    """
    from lightning_tucodec.training.fit import main as fit
    from lightning_tucodec.training.identity import expand_locations, flat

    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        words = ["fit"]
        for number, layer in enumerate(layers):
            path = Path(folder, f"{number}.yaml")
            path.write_text(yaml.safe_dump(layer), encoding="utf-8")
            words += ["--config", str(path)]
        with redirect_stdout(out), redirect_stderr(err):
            try:
                status = fit([*words, "--print_config"])
            except SystemExit as end:  # how that option ends
                status = int(end.code or 0)
        if status:
            message = re.sub(
                rf"{folder}/\d+\.yaml", "configuration", " ".join(err.getvalue().split())
            )
            raise ConfigError(message.removeprefix("tucodec fit: "))
    resolved: Config = yaml.safe_load(out.getvalue())
    resolved.pop("config", None)
    expand_locations(resolved)
    return flat(resolved)


def _tag(config: Config, sweep: str, task: Task) -> None:
    """Name sweep and stage for trackers."""
    run = config["run"]
    if "group" in run:
        run["group"] = sweep
    if "tags" in run:
        run["tags"] = [*(run["tags"] or []), task.stage]


# --- Slurm -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A task in Slurm's queue.

    Attributes:
        array: id of its array of jobs.
        state: as `squeue` says, in lower case.
        reason: why it is not running.
    """

    array: str
    state: str
    reason: str


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
    stages = {f"{plan.folder.name}-{task.stage}": task.stage for task in plan.tasks.values()}
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
        array, number, state, reason, name = line.split("|", 4)
        if name in stages:
            found[f"{stages[name]}-{number}"] = Job(array, state.lower(), reason)
    return found


def root() -> Path:
    """The folder that holds slurm/.

    Raises:
        ConfigError: this package was installed without it, and TUCODEC_ROOT does not say where it is.
    """
    for folder in (os.environ.get("TUCODEC_ROOT"), Path.cwd(), Path(__file__).parents[1]):
        if folder and (Path(folder) / "slurm" / "submit.sh").is_file():
            return Path(folder)
    raise ConfigError("no slurm/submit.sh here: call from the repository, or set TUCODEC_ROOT")


def outstanding(plan: Plan, jobs: dict[str, Job]) -> list[Task]:
    """Tasks that are neither complete nor in the queue."""
    return [t for t in plan.tasks.values() if t.name not in jobs and not plan.is_complete(t)]


def submit(plan: Plan, tasks: Sequence[Task], jobs: dict[str, Job], dry: bool = False) -> None:
    """Submit tasks: of a stage, all that may start together are one array of jobs.

    A stage whose tasks each start from the task of the same number in another stage depends on that
    stage's array by `aftercorr`; other predecessors are waited for one by one.

    Args:
        plan: the sweep.
        tasks: what to submit.
        jobs: what is in the queue, see `queued`.
        dry: print the commands of sbatch instead.

    Raises:
        ConfigError: a task's predecessor is neither complete nor in the queue nor submitted.
        ExternalToolError: sbatch does not take them; the message holds the command to give elsewhere.
    """
    arrays = {name: job.array for name, job in jobs.items()}
    remaining = list(tasks)
    while remaining:
        groups: dict[tuple[str, str], list[Task]] = {}
        for task in remaining:
            done = task.after is None or plan.is_complete(plan.task(task.after))
            if done or task.after in arrays:
                after = "" if done else _dependency(plan, task, arrays)
                groups.setdefault((task.stage, after), []).append(task)
        if not groups:
            first = remaining[0]
            raise ConfigError(f"{first.name}: starts from {first.after}, which is not submitted")
        for (stage, after), members in groups.items():
            identifier = _sbatch(plan, stage, after, members, dry)
            arrays.update({task.name: identifier for task in members})
        remaining = [task for task in remaining if task.name not in arrays]


def _dependency(plan: Plan, task: Task, arrays: dict[str, str]) -> str:
    """What `sbatch --dependency` is to say for a task whose predecessor is in an array."""
    assert task.after is not None
    before = plan.task(task.after)
    stage = [other for other in plan.tasks.values() if other.stage == task.stage]
    if all(other.after == f"{before.stage}-{other.number}" for other in stage):
        return f"aftercorr:{arrays[before.name]}"
    return f"afterok:{arrays[before.name]}_{before.number}"


def _sbatch(plan: Plan, stage: str, after: str, tasks: Sequence[Task], dry: bool) -> str:
    """Submit one array; returns its id."""
    launcher = root() / "slurm"
    command = [
        str(launcher / "submit.sh"), *(["--dry-run"] if dry else []),
        f"--job-name={plan.folder.name}-{stage}",
        f"--array={','.join(str(task.number) for task in tasks)}",
        f"--output={str(plan.folder).replace('%', '%%')}/logs/{stage}-%a.log",
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
        return f"<{stage}>"
    print(f"job {done.stdout.strip()}: {names}", file=sys.stderr)
    return done.stdout.strip()


# --- Status ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A task's line in the status table; None where there is nothing to say yet.

    Attributes:
        task: its name.
        label: values of the grid.
        state: planned, waiting, pending, running, complete, failed, lost (its job is gone without an
            end), started (the same, but the queue is not known).
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
            note = f"for {task.after}" if waits else job.reason
    elif ended is not None:
        state, note = "failed", _last_error(plan, task) or f"exit status {ended}"
    elif attempts:
        state, note = "lost" if known else "started", _last_error(plan, task)
    else:
        state = "planned"
    folder = plan.run_folder(task)
    metrics = read_metrics(folder / "metrics.jsonl") if folder else []
    bpp, psnr = _newest(metrics, "bpp"), _newest(metrics, "psnr")
    config = next(
        (p for part in ("configs", "waiting") if (p := plan.file(part, task, ".yaml")).exists()),
        None,
    )
    steps = _at(read_yaml(config), "trainer.max_steps") if config else None
    step = max((row["opt_step"] for row in metrics), default=0)
    if state == "complete" and steps is not None:
        step = steps  # the last step need not be one that is logged
    run = str(folder) if folder else None
    return Row(task.name, task.label, state, step, steps, bpp, psnr, max(0, starts - 1), note, run)


def _newest(metrics: Sequence[dict[str, Any]], name: str) -> float | None:
    """The last value of a metric, of a validation if there was any."""
    for key in (f"val/{name}", f"train/{name}"):
        for row in reversed(metrics):
            if key in row:
                return float(row[key])
    return None


def _last_error(plan: Plan, task: Task) -> str:
    """What the manifest says of the last attempt, else the log's last line about an error."""
    folder = plan.run_folder(task)
    if folder is not None:
        entries = Manifest(RunFolder(folder)).read().get("attempts")
        if entries and entries[-1].get("error"):
            return str(entries[-1]["error"])
    path = plan.file("logs", task, ".log")
    if not path.exists():
        return ""
    with open(path, "rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(0, stream.tell() - 65536))
        lines = stream.read().decode("utf-8", "replace").splitlines()
    ours = [line.strip() for line in lines if line.startswith("tucodec")]
    others = [line.strip() for line in lines if re.search(r"error|Error|CANCELLED|Killed", line)]
    return (ours or others or [""])[-1]


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


# --- The command -----------------------------------------------------------------------------


def add_arguments(commands: Any, command: Any) -> None:
    """The subcommands of `tucodec sweep`.

    Args:
        commands: argparse's subparsers.
        command: adds one: (subparsers, name, function, summary) to parser.
    """
    plan = command(commands, "plan", run_plan, "resolve a sweep into one configuration a task")
    submit_ = command(commands, "submit", run_submit, "plan a sweep and submit its tasks to Slurm")
    local = command(commands, "run", run_here, "train a sweep's tasks here, one after the other")
    for parser, what in (
        (plan, "SWEEP.yaml"),
        (submit_, "SWEEP.yaml|PLAN"),
        (local, "SWEEP.yaml|PLAN"),
    ):
        parser.add_argument("sweep", type=Path, metavar=what)
        parser.add_argument("--out", type=Path, default=Path("sweeps"), metavar="DIR")
        parser.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="into every task"
        )
    submit_.add_argument("--dry-run", action="store_true", help="print the commands of sbatch")
    retry = command(
        commands, "retry", run_retry, "submit again what is neither complete nor in the queue"
    )
    show = command(commands, "status", run_status, "what the tasks of a sweep are doing")
    resolve = command(commands, "resolve", run_resolve, "print a task's final configuration file")
    for parser in (retry, show, resolve):
        parser.add_argument("plan", type=Path, metavar="PLAN", help="folder of a planned sweep")
    show.add_argument("--json", action="store_true")
    retry.add_argument("tasks", nargs="*", metavar="TASK", help="as in ssim-3; all by default")
    retry.add_argument("--dry-run", action="store_true", help="print the commands of sbatch")
    resolve.add_argument("task", metavar="TASK", help="as in ssim-3")


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
    """`tucodec sweep run`: without Slurm; called again it goes on where it was stopped."""
    plan = _planned(arguments)
    for task in plan.tasks.values():
        if plan.is_complete(task):
            continue
        config = plan.finish_config(task)
        _note(plan, task, "start", None)
        status = 1
        try:
            print(f"task {task.name}", file=sys.stderr)
            status = _fit(config)
        finally:
            _note(plan, task, "end", status)
        if status:
            return status
    print(plan.folder)
    return 0


def _fit(config: Path) -> int:
    """Train in a process of its own, and return its exit status.

    Lightning starts the other ranks with the words and the environment of its own process; what one task
    leaves in them is nothing to the next. Whoever stops this process stops that one.
    """
    from lightning_tucodec.training.companions import SIGNALS

    children: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        for child in children:
            if number != signal.SIGINT:  # the terminal gives it to both
                child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        words = [sys.executable, "-m", "lightning_tucodec.cli", "fit", "--config", str(config)]
        children.append(subprocess.Popen(words))
        if received:  # in the moment before
            children[0].terminate()
        status = children[0].wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _note(plan: Plan, task: Task, event: str, status: int | None) -> None:
    """A line in attempts/, as slurm/train.sh writes them."""
    row = {"event": event, "job": "here", "restart": 0, "time": int(time.time()), "status": status}
    with plan.file("attempts", task, ".jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def _planned(arguments: argparse.Namespace, dry: bool = False) -> Plan:
    """The plan that is named, or the plan of the sweep that is named, written unless `dry`."""
    if arguments.sweep.is_dir():
        if arguments.set:
            raise ConfigError(f"{arguments.sweep}: a plan does not change; --set needs SWEEP.yaml")
        return Plan.open(arguments.sweep)
    plan, write = Plan.make(arguments.sweep, arguments.set, arguments.out)
    if not dry:
        write()
    return plan


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
