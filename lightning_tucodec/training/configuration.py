"""Command line and files → one resolved configuration, for `fit`, `doctor` and sweeps."""

import contextlib
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import yaml
from jsonargparse import ArgumentError
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_tucodec.errors import ConfigError, TucodecError, redacted
from lightning_tucodec.io.files import expanded, read_text
from lightning_tucodec.nn.losses import check_crop
from lightning_tucodec.quality.curve_files import read_named
from lightning_tucodec.training.advice import without_advice
from lightning_tucodec.training.arithmetic import Arithmetic
from lightning_tucodec.training.beside.wandb_view import check_names
from lightning_tucodec.training.limits import check_numbers
from lightning_tucodec.training.module import TrainingModule
from lightning_tucodec.training.options import check_options
from lightning_tucodec.training.runs.identity import (
    DEFAULT_DATA,
    DEFAULT_MODEL,
    expand_locations,
    flat,
    locations,
)
from lightning_tucodec.training.runs.identity import arguments as class_arguments

Config = dict[str, Any]


@dataclass
class RunConfig:
    """Where a run lives and how it starts.

    Attributes:
        name: first part of the folder's name.
        runs_dir: parent of all run folders.
        init_from: what a fresh run takes its weights from: a checkpoint, a run folder, an exported
            model or its name. A run that can be resumed ignores it.
        checkpoint_minutes: time between two saves; 0 saves after every step and waits for it.
        mirror: parent folder or fsspec URL of copies of run folders; a run goes on from there when it
            is further there.
        wandb: mirror metrics to W&B (offline without a key in WANDB_API_KEY or ~/.netrc).
        project: W&B project.
        group: W&B group, such as the sweep.
        job_type: W&B job type.
        tags: W&B tags.
        baseline: curve that W&B's summary holds BD-rates against: FILE#NAME of a `results.json` of
            `tucodec evaluate`, or the FILE of a published curve.
        threads: CPU threads; None leaves PyTorch's choice.
        arithmetic: of a GPU: "reproducible", or "fast" (TF32, fastest kernels), see `training.arithmetic`.
    """

    name: str = "vae"
    runs_dir: str = "runs"
    init_from: str | None = None
    checkpoint_minutes: float = 5.0
    mirror: str | None = None
    wandb: bool = False
    project: str = "lightning-tucodec"
    group: str | None = None
    job_type: str = "train"
    tags: list[str] | None = None
    baseline: str | None = None
    threads: int | None = None
    arithmetic: Arithmetic = "reproducible"


class UsageError(ConfigError):
    """The parser does not understand a word or an entry of a file."""


def check_config(config: dict[str, Any]) -> None:
    """Refuse what a resolved configuration alone shows to be impossible.

    Raises:
        ConfigError: numbers out of range, options that would have no effect, crops that the recipe's
            distortion cannot be measured on, names that W&B refuses, no such baseline, or URLs out of a run
            folder's `config.yaml`, which has no credentials.
    """
    check_numbers(config)
    check_options(config)
    for values, name in locations(config):
        _check_location(name, values[name])
    if config["run"].get("wandb"):
        check_names(config["run"])
    if baseline := config["run"].get("baseline"):
        read_named(baseline)
    recipe = class_arguments(config, "model").get("recipe")
    crop = class_arguments(config, "data").get("crop")
    if recipe is not None and crop is not None:
        check_crop(recipe, crop)


def _check_location(name: str, location: str) -> None:
    if not location:
        raise ConfigError(f"{name}: is empty; leave it out, or give a path or URL")
    if "://" in location and "***" in location:
        raise ConfigError(f"{name}: {location} has lost its credentials; give the URL again")
    if location.startswith("file://") and re.search(r"\?\w+=", location):
        raise ConfigError(f"{name}: a file:// URL has no parameters (?…=): {location}")


class ConfiguredCLI(LightningCLI):
    """A subcommand with the `run` group, its paths as a shell would have given them."""

    def __init__(self, *args: Any, command: str, named: set[str], **kwargs: Any) -> None:
        self.command = command
        self.named = named
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Build only the parser of the command that runs: each costs half a second."""
        return {self.command: super().subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run's own options."""
        parser.add_argument("--run", type=RunConfig, default=RunConfig())
        parser.add_argument("--mirror", help="the same as --run.mirror")
        defaults = {"model": DEFAULT_MODEL, "data": DEFAULT_DATA}
        # Where another class is named: it would take over the default one's arguments of equal names.
        parser.set_defaults(
            {group: {"class_path": p} for group, p in defaults.items() if group not in self.named}
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Paths and URLs as a shell would have given them, before anything uses one."""
        super().parse_arguments(parser, args)
        config = self.config[self.command]
        check_numbers(config)  # Lightning seeds before it asks us
        expand_locations(config)
        for name in ("mirror", "ckpt_path"):
            if isinstance(config.get(name), str):
                config[name] = expanded(config[name])

    def _parse_ckpt_path(self) -> None:
        """The config alone says what is built. Lightning would look into the checkpoint, unchecked."""

    def plain_config(self) -> dict[str, Any]:
        """The resolved config of the subcommand as plain types."""
        config = self.config[self.command].clone()
        config.pop("config", None)
        text = self._parser(self.command).dump(config, skip_none=False)
        plain: dict[str, Any] = yaml.safe_load(text)
        mirror = plain.pop("mirror", None)
        if mirror is not None:
            plain["run"]["mirror"] = mirror
        return flat(plain)


class _Resolver(ConfiguredCLI):
    """Only parses; builds and runs nothing."""

    def _set_seed(self) -> None:
        """Nothing will run."""

    def before_instantiate_classes(self) -> None:
        """Nothing will be instantiated."""

    def instantiate_classes(self) -> None:
        """Nothing is."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing runs."""


def resolve(*layers: Config, words: Sequence[str] = ()) -> Config:
    """A configuration as `tucodec fit` understands it, with all defaults filled in.

    Args:
        layers: contents of its files; later ones win as those of `fit --config A --config B`.
        words: further options of `fit`, which win over the files.

    Raises:
        ConfigError: it is not one.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = ["fit"]
        for number, layer in enumerate(layers):
            path = Path(folder, f"{number}.yaml")
            path.write_text(yaml.safe_dump(layer), encoding="utf-8")
            given += ["--config", str(path)]
        try:
            with without_advice():
                return parsed(_Resolver, [*given, *words]).plain_config()
        except ConfigError as error:
            told = re.sub(rf"{folder}/\d+\.yaml", "configuration", str(error))
            raise type(error)(told) from None


CLI = TypeVar("CLI", bound=ConfiguredCLI)


def parsed(kind: type[CLI], arguments: Sequence[str], **more: Any) -> CLI:
    """The command of these words, run as far as its class goes.

    Raises:
        UsageError: the words or a file are not understood.
        ConfigError: the configuration cannot work.
    """
    raising = {"exit_on_error": False}
    words = _expanded_config(arguments)
    try:
        return kind(
            TrainingModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"prog": "tucodec", **raising, arguments[0]: raising},
            args=words,
            command=arguments[0],
            named=_named_classes(words),
            **more,
        )
    except (UnicodeDecodeError, MemoryError) as error:
        for word in arguments:  # the parser does not say which file
            if Path(name := word.partition("=")[2] if word.startswith("-") else word).is_file():
                read_text(name)
        if isinstance(error, MemoryError):
            raise
        raise ConfigError(f"not UTF-8: {error.object[:60]!r}") from None
    except ArgumentError as error:
        raise UsageError(redacted(_in_plain_words(" ".join(str(error).split())))) from None
    except MisconfigurationException as error:
        raise ConfigError(" ".join(str(error).split())) from None
    except ValueError as error:
        raise _own_error(error) from None


def _expanded_config(words: Sequence[str]) -> list[str]:
    """The words, with the paths of configuration files as a shell would have given them."""
    result: list[str] = []
    for word in words:
        option, sign, value = word.partition("=")
        if result and result[-1] in ("--config", "-c"):
            word = expanded(word)
        elif sign and option == "--config":
            word = f"{option}={expanded(value)}"
        result.append(word)
    return result


def _named_classes(words: Sequence[str]) -> set[str]:
    """The groups, of model and data, whose class is named where a word or file first mentions them.

    Where arguments come first, they are the default class's until another class takes them over.
    """
    named: dict[str, bool] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, sign, value = word.partition("=")
        value = value if sign else following
        for group in ("model", "data"):
            if option == f"--{group}" or option.startswith(f"--{group}."):
                named.setdefault(group, option in (f"--{group}", f"--{group}.class_path"))
        if option in ("--config", "-c"):
            with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
                content = yaml.safe_load(Path(value).read_bytes())
                groups = content if isinstance(content, dict) else {}
                for group in {"model", "data"} & groups.keys():
                    given = groups[group]
                    named.setdefault(group, isinstance(given, dict) and "class_path" in given)
    return {group for group, is_named in named.items() if is_named}


def _in_plain_words(message: str) -> str:
    """What the parser says of a wrong value, without its account of the types that it tried in vain."""
    inside = re.search(
        r'Parser key "([\w.]+)": .*Problem with given class_path \'[^\']*\': (.*?)'
        r"( - Expected a <class 'NoneType'>.*)?$",
        message,
    )
    if inside:
        group, told = inside[1], inside[2]
        inner = re.match(r'Parser key "([\w.]+)": (.*)', told)
        message = f"{group}.{inner[1]}: {inner[2]}" if inner else f"{group}: {told}"
    # What it makes of --model.network.class_path after a file that has arguments for that class.
    message = message.replace(
        "model: 'dict' object has no attribute 'init_args'",
        "model.network: another class is named together with its arguments, as in --model.network "
        "'{class_path: compressai.models.FactorizedPrior, init_args: {N: 128, M: 192}}'",
    )
    message = re.sub(r'^Parser key "([\w.]+)": ', r"\1: ", message)
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message)
    return re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1", message)


def _own_error(error: BaseException) -> BaseException:
    """What a class of ours refused, out of what the parser made of it; else the error itself."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, TucodecError):
        inner = inner.__cause__ or inner.__context__
    return inner or error
