"""From a sweep's file to tasks, each with its configuration, defaults not yet filled in."""

import copy
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.files import check_name, expanded, parse_yaml, read_yaml
from lightning_tucodec.training.runs.identity import arguments

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
        label: the values of the grid that distinguish it within its stage.
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
                return entry(values[option], rest)
        return None

    def set(self, key: str, value: Any) -> None:
        """Put in a value.

        Args:
            key: as in `model.lmbda`, the same as `model.init_args.lmbda`. Names inside an option hold
                dots themselves, as in `model.codec.hyper.channels`.
            value: replaces the option's value, as `fit` does.

        Raises:
            ConfigError: its parent is a value that has no entries.
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
    """Group, option and the name inside the option of a key.

    Raises:
        ConfigError: it is not a valid key.
    """
    found = re.fullmatch(r"(\w+)(?:\.init_args)?(?:\.(\w+)(?:\.(\S+))?)?", str(key))
    if found is None:
        raise ConfigError(f"{key}: a key is written as in model.lmbda")
    return found[1], found[2] or "", found[3] or ""


def entry(value: Any, key: str) -> Any:
    """An entry inside a value, None where there is none; names in it may hold dots."""
    if not key:
        return value
    if not isinstance(value, dict):
        return None
    head, _, rest = key.partition(".")
    return value[key] if key in value else entry(value.get(head), rest) if rest else None


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
        ConfigError: the file holds something invalid.
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
        ConfigError: something is invalid.
    """
    if not isinstance(entries, dict) or set(entries) - _STAGE.keys() or "config" not in entries:
        raise ConfigError(f"needs `config`, knows {', '.join(sorted(_STAGE))}")
    for key, (kinds, words) in _STAGE.items():
        if entries.get(key) is not None and not isinstance(entries[key], kinds):
            raise ConfigError(f"{key}: must be {words}")
    files = entries["config"] if isinstance(entries["config"], list) else [entries["config"]]
    if not files or not all(isinstance(file, str) for file in files):
        raise ConfigError(f"config: must be {_STAGE['config'][1]}")
    contents = [read_yaml(folder / expanded(file)) for file in files]
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
    """The task that a stage's `init_from` refers to for its task `number`.

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
