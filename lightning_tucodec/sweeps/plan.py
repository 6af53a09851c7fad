"""Plans: the folder of a sweep, its configurations and the outcome of its tasks."""

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lightning_tucodec.errors import ConfigError, TucodecError
from lightning_tucodec.io.files import read_json_lines, read_yaml
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.sweeps.spec import Config, Task, read_sweep
from lightning_tucodec.training.runs.folder import RunFolder


class Plan:
    """A planned sweep; see the package's docstring for its folder.

    Args:
        folder: of the plan.
        tasks: all of them.
        key: part of its jobs' names, different for each folder that was written; older plans have none.
    """

    def __init__(self, folder: Path, tasks: list[Task], key: str = "") -> None:
        self.folder = folder
        self.key = key
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
            tasks = [Task(**entry) for entry in content["tasks"]]
            return cls(folder, tasks, str(content.get("key", "")))
        except (KeyError, TypeError):
            raise ConfigError(f"{folder / 'plan.yaml'}: damaged; plan the sweep again") from None

    @classmethod
    def make(cls, sweep: Path, overrides: Sequence[str], parent: Path) -> "tuple[Plan, Writer]":
        """Resolve a sweep; nothing is written before the second value is called.

        Raises:
            ConfigError: the sweep, or a configuration in it, cannot work.
        """
        from lightning_tucodec.training.configuration import check_config, resolve

        name, drafts = read_sweep(sweep, overrides)
        resolved: dict[Task, Config] = {}
        for task, draft in drafts.items():
            try:
                resolved[task] = resolve(*draft.layers())
                check_config(resolved[task])
                RunFolder.of(resolved[task])  # checks shards and weights now, not only in the jobs
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
    """Writes a new plan's folder; does nothing if it exists, since its name is a hash of its content."""

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
        key = uuid.uuid4().hex[:6]
        _dump(self.folder / "plan.yaml", {"name": self.name, "key": key, "tasks": tasks})


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


def _tag(config: Config, sweep: str, task: Task) -> None:
    """Name sweep and stage for trackers."""
    run = config["run"]
    if "group" in run:
        run["group"] = sweep
    if "tags" in run:
        run["tags"] = [*(run["tags"] or []), task.stage]
