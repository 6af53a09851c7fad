"""`tucodec fit | validate | test`: LightningCLI with run folders, resume and preemption.

The recipe chooses the model (`training.module` states the protocol) and the data by `class_path`;
without one they are `VAE` and `PatchDataModule`.
"""

import contextlib
import logging
import os
import re
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import ArgumentError
from lightning_fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_tucodec.errors import ConfigError, DatasetError, TucodecError, redacted
from lightning_tucodec.io.files import expanded, read_text
from lightning_tucodec.io.processes import announce, when_parent_ends
from lightning_tucodec.nn.losses import check_crop
from lightning_tucodec.quality.curves import read_named
from lightning_tucodec.training.arithmetic import Arithmetic, arithmetic
from lightning_tucodec.training.beside.companions import UNMIRRORED, Companion
from lightning_tucodec.training.beside.pull import check_writable, pull
from lightning_tucodec.training.beside.wandb_view import check_names, mode
from lightning_tucodec.training.data import check_crop_size, check_validation
from lightning_tucodec.training.limits import check_numbers
from lightning_tucodec.training.module import TrainingModule
from lightning_tucodec.training.options import check_options
from lightning_tucodec.training.runs.checkpoints import BackgroundWriter, Checkpointing
from lightning_tucodec.training.runs.folder import (
    ECHO,
    Manifest,
    RunFolder,
    attempt_key,
    started_by_srun,
)
from lightning_tucodec.training.runs.identity import (
    DEFAULT_DATA,
    DEFAULT_MODEL,
    expand_locations,
    flat,
    identity,
    locations,
    run_id,
)
from lightning_tucodec.training.runs.identity import arguments as class_arguments
from lightning_tucodec.training.runs.preemption import (
    PREEMPTED,
    Preemption,
    SetupStopped,
    ValidationStopped,
    in_step,
)
from lightning_tucodec.training.runs.tracking import Counters, JsonlLogger
from lightning_tucodec.training.runs.weights import load_checkpoint

_MIRROR_SECONDS = {"finished": 900.0, "preempted": 60.0, "failed": 60.0}
"""How long the last copy to the mirror may take; before a requeue there is little time."""

_WANDB_SECONDS = {"online": 20.0, "offline": 120.0, "disabled": 20.0}
"""How long W&B may take at the end; what it misses, `tucodec wandb-sync` sends."""


_ADVICE = (
    ".*LightningCLI's args parameter is intended.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*Total length of `list` across ranks is zero.*",
    ".*does not have many workers.*",
    ".*It is recommended to use `self.log.*sync_dist=True.*",  # what is logged is a mean already
    # A login node or a notebook; `tucodec doctor` says what is wrong inside a job.
    ".*The `srun` command is available on your system but is not used.*",
    # It counts steps over all passes, whatever one pass holds.
    ".*number of training batches .* is smaller than the logging interval.*",
)


TALKATIVE = ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.seed")
"""Loggers whose information is none to a user of this command."""


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


class _PlainProgress(pl.Callback):
    """Progress as lines, for logs that are not a terminal."""

    def __init__(self, every_seconds: float = 30.0) -> None:
        self.every = every_seconds
        self._last = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        now = time.monotonic()
        if trainer.is_global_zero and now - self._last >= self.every:
            self._last = now
            shown = {k: f"{float(v):.4g}" for k, v in trainer.progress_bar_metrics.items()}
            words = " ".join(f"{k}={v}" for k, v in shown.items())
            print(f"step {pl_module.opt_step}/{pl_module.max_steps} {words}", file=sys.stderr)


def slurm_environment() -> list[Any]:
    """What tells Lightning about ranks inside a job of Slurm, whose variables it believes everywhere.

    Raises:
        ConfigError: srun was called in a way that Lightning does not know.
    """
    if not SLURMEnvironment.detect():
        return []
    if TorchElasticEnvironment.detect():
        return [TorchElasticEnvironment()]
    if not started_by_srun():
        return [LightningEnvironment()]
    if int(os.environ["SLURM_STEP_NUM_TASKS"]) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ConfigError("srun: give the processes as --ntasks-per-node, not as --ntasks")
    return [SLURMEnvironment(auto_requeue=False)]


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


class TucodecCLI(LightningCLI):
    """Adds the `run` group; finds the run's folder and goes on from its newest checkpoint."""

    preemption: Preemption
    folder: RunFolder | None = None
    resume: tuple[Path, dict[str, Any]] | None = None
    mirror: Companion | None = None
    wandb: Companion | None = None
    outcome = "finished"
    unmirrored = False

    def __init__(
        self, *args: Any, command: str, named: set[str], preemption: Preemption, **kwargs: Any
    ) -> None:
        self.command = command
        self.named = named
        self.preemption = preemption
        self.cleanup = contextlib.ExitStack()
        with self.cleanup:
            super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that runs: each parser costs half a second."""
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

    def before_instantiate_classes(self) -> None:
        """Look at the configuration before anything is built."""
        config = self._plain_config()
        if self.subcommand == "fit":
            check_config(config)
        else:
            check_options(config, self.command)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Loggers, callbacks and signals of a run."""
        self.cleanup.enter_context(arithmetic(self._get(self.config, "run")["arithmetic"]))
        if self.subcommand != "fit":
            return self._build_trainer(logger=False, enable_checkpointing=False, **kwargs)
        config = self._plain_config()
        run = config["run"]
        if run["threads"]:
            torch.set_num_threads(run["threads"])
        folder = RunFolder.of(config)
        log = JsonlLogger(folder.metrics)
        writer = BackgroundWriter(folder)
        checkpointing = Checkpointing(
            writer, run["checkpoint_minutes"], self.preemption, run_id(config)
        )
        bar = self._get(self.config, "trainer")["enable_progress_bar"]
        interactive = sys.stderr.isatty() if bar is None else bar
        callbacks: list[pl.Callback] = [Counters(log), self.preemption, checkpointing]
        if not interactive:
            callbacks.append(_PlainProgress())
        trainer = self._build_trainer(
            logger=log,
            callbacks=callbacks,
            plugins=[writer],
            enable_checkpointing=False,
            enable_progress_bar=interactive,
            default_root_dir=str(folder.path),
            **kwargs,
        )
        # One owner of signals: Lightning's own handlers talk to other ranks from inside a signal.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        self._begin(config, folder, trainer)
        if self.resume is not None:
            state = self.resume[1]
            counters = {k: int(state["tucodec"][k]) for k in log.counters}
            checkpointing.rng = state.get("run", {}).get("rng")
            log.go_on_from(counters, state.get("run", {}).get("lines"))
        else:
            log.go_on_from(log.counters)
        if trainer.is_global_zero:
            self._start_companions(run)
        return trainer

    def _begin(self, config: dict[str, Any], folder: RunFolder, trainer: pl.Trainer) -> None:
        """Find what to go on from; rank 0 first, who announces the attempt to the others.

        Raises:
            ConfigError: the folder is in use or belongs to another configuration.
        """
        self.folder = folder
        manifest = Manifest(folder)
        if not trainer.is_global_zero:
            manifest.wait_for_rank_0(lambda: self.preemption.received is not None)
            self.preemption.begun = True
            self.resume = folder.latest()
            return
        if attempt_key() is None:  # the ranks that Lightning starts inherit it
            os.environ["TUCODEC_ATTEMPT"] = uuid.uuid4().hex
            self.cleanup.callback(os.environ.pop, "TUCODEC_ATTEMPT", None)
        check_crop_size(config)
        check_validation(config)
        self.cleanup.enter_context(folder.locked())
        manifest.check(identity(config))
        self.resume = folder.latest()
        step = 0 if self.resume is None else int(self.resume[1]["tucodec"]["opt_step"])
        if mirror := config["run"]["mirror"]:
            step = self._pull(folder, mirror)
            manifest.check(identity(config))
        folder.write_config(config)
        images = 0 if self.resume is None else int(self.resume[1]["tucodec"]["images_seen"])
        self.preemption.begun = True
        manifest.begin(config, step, trainer.world_size, images)
        self.cleanup.callback(self._finish_companions)
        self.cleanup.push(self._end)

    def _pull(self, folder: RunFolder, mirror: str) -> int:
        """Take over the mirror's state if it is further; returns the step to go on from.

        Raises:
            DatasetError: it cannot be read or written, and there is nothing here to go on from.
        """
        own = None
        if self.resume is not None:
            counters = self.resume[1]["tucodec"]
            own = int(counters["opt_step"]), int(counters["images_seen"])
        pulled = None
        try:
            pulled = pull(folder, mirror, own)
            check_writable(mirror)
        except DatasetError as error:
            if own is None and pulled is None:
                raise
            print(f"tucodec: {redacted(str(error))}; goes on with what is here", file=sys.stderr)
        if pulled is None:
            return 0 if own is None else own[0]
        print(f"run {folder.path}: step {pulled} comes from {redacted(mirror)}", file=sys.stderr)
        self.resume = folder.latest()
        return pulled

    def _start_companions(self, run: dict[str, Any]) -> None:
        assert self.folder is not None
        package = "lightning_tucodec.training.beside"
        path = str(self.folder.path)
        if run["mirror"]:
            log = self.folder.path / "mirror.log"
            url = run["mirror"]
            self.mirror = Companion(f"{package}.mirror", [path], log, TUCODEC_MIRROR=url)
        if run["wandb"] and mode() != "disabled":
            log = self.folder.path / "wandb.log"
            self.wandb = Companion(f"{package}.wandb_view", [path], log)

    def _finish_companions(self) -> None:
        if self.mirror is not None and not self.mirror.finish(_MIRROR_SECONDS[self.outcome]):
            self.unmirrored = True
            log = self.mirror.log
            last = log.read_text(errors="replace").splitlines()[-1:] if log.exists() else []
            reason = "".join(last).removeprefix("tucodec: ") or "it did not answer"
            print(
                f"tucodec: the end of this run, step {self.model.opt_step}, is not in its mirror ({reason}); "
                f"it is in {log.parent}: start the same command again when the mirror works",
                file=sys.stderr,
            )
        if self.wandb is not None and not self.wandb.finish(_WANDB_SECONDS.get(mode(), 20.0)):
            print("tucodec: wandb_view did not get to its end; see its log", file=sys.stderr)

    def _end(self, kind: type[BaseException] | None, error: BaseException | None, *_: Any) -> None:
        """Leave in the manifest how this attempt ended."""
        assert self.folder is not None
        reason, status, text = "finished", 0, None
        if error is not None:
            self.outcome = reason = "failed"
            status = 1
            lines = redacted(str(error)).strip().splitlines() or [type(error).__name__]
            text = lines[-1][:500]
            step = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
            # What is raised where a connection is closed; TERM may have come before or come yet.
            if step and isinstance(error, RuntimeError) and self.preemption.is_echo():
                text = f"{ECHO}: {text}"
        elif self.preempted:
            assert self.preemption.stopping is not None
            self.outcome = "preempted"
            reason, status = f"preempted ({self.preemption.stopping.name})", PREEMPTED
        Manifest(self.folder).end(self.model.opt_step, reason, status, text)

    @property
    def preempted(self) -> bool:
        """Whether a signal ended the run before its last step."""
        unfinished = self.model.opt_step < self.model.max_steps
        stopping = self.preemption.stopping is not None
        return stopping and (unfinished or self.preemption.owes_validation)

    def _build_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer as Lightning builds it; `max_steps` counts batches also with several optimisers.

        Raises:
            ConfigError: its options do not fit together or this machine.
        """
        options = self.config_init[self.subcommand]["trainer"]
        plugins = options.get("plugins") or []
        kwargs["plugins"] = [
            *(plugins if isinstance(plugins, list) else [plugins]),
            *kwargs.get("plugins", []),
            *slurm_environment(),
        ]
        if options["max_steps"] > 0:
            kwargs["max_steps"] = options["max_steps"] * self.model.optimizers_a_step
        try:
            trainer: pl.Trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from None
        return trainer

    def fit(self, model: TrainingModule, datamodule: pl.LightningDataModule, **kw: Any) -> None:
        """Start, or go on from the newest checkpoint."""
        del kw  # ckpt_path: the resolver decides
        assert self.folder is not None
        where = self.folder.path
        path: Path | None = None
        init_from = self._get(self.config, "run")["init_from"]
        start = "starts"
        if self.resume is not None:
            path = self.resume[0]
            start = f"goes on at step {self.resume[1]['tucodec']['opt_step']}"
        elif init_from:
            model.warm_start(init_from)
        if self.trainer.is_global_zero:
            print(f"run {where}: {start}", file=sys.stderr)
            if self.trainer.num_nodes > 1:
                limit = getattr(self.trainer.strategy, "_timeout", None)
                print(
                    f"run {where}: waits for the processes of {self.trainer.num_nodes} nodes, "
                    f"{self.trainer.world_size} in all{f', at most {limit}' if limit else ''}",
                    file=sys.stderr,
                    flush=True,
                )
        self.resume = None  # its tensors are not needed twice
        try:
            with contextlib.suppress(ValidationStopped):
                self.trainer.fit(model, datamodule, ckpt_path=path, weights_only=True)
        except torch.distributed.DistStoreError as error:
            raise ConfigError(
                f"trainer.num_nodes {self.trainer.num_nodes}, trainer.devices {self.trainer.num_devices}: "
                f"not all processes have come ({' '.join(str(error).split())}); are all started?"
            ) from None
        if self.trainer.is_global_zero:
            print(f"run {where}: {self._end_words()}", file=sys.stderr)

    def _end_words(self) -> str:
        step = f"step {self.model.opt_step}"
        if self.preempted:
            assert self.preemption.stopping is not None
            return (
                f"saved at {step} after {self.preemption.stopping.name}; the same command goes on"
            )
        return f"finished at {step}"

    def validate(
        self, model: TrainingModule, datamodule: pl.LightningDataModule, **kw: Any
    ) -> None:
        """Measure a checkpoint on the whole images."""
        path = self._checkpoint(kw["ckpt_path"], model, datamodule)
        self.trainer.validate(
            model, datamodule, ckpt_path=path, verbose=kw["verbose"], weights_only=True
        )

    def test(self, model: TrainingModule, datamodule: pl.LightningDataModule, **kw: Any) -> None:
        """As `validate`, under another name."""
        path = self._checkpoint(kw["ckpt_path"], model, datamodule)
        self.trainer.test(
            model, datamodule, ckpt_path=path, verbose=kw["verbose"], weights_only=True
        )

    def _checkpoint(
        self, named: str | None, model: TrainingModule, datamodule: pl.LightningDataModule
    ) -> Path:
        """The checkpoint that was named, else the newest of this config's run.

        Raises:
            ConfigError: there is none, it is damaged or of another network, or there are no images to
                measure it on.
        """
        if not getattr(datamodule, "val_images", None):
            raise ConfigError("no images: name a folder of them with --data.val_images")
        if named is not None:
            path, content = Path(named), load_checkpoint(named)
        else:
            folder = RunFolder.of(self._plain_config())
            found = folder.latest()
            if found is None:
                raise ConfigError(
                    f"{folder.path}: nothing was trained with this config; --ckpt_path?"
                )
            path, content = found
        try:
            model.load_state_dict(content["state_dict"], strict=model.strict_loading)
        except (RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{path}: weights of another network ({reason})") from None
        return path

    def _plain_config(self) -> dict[str, Any]:
        """The resolved config of the subcommand as plain types."""
        config = self.config[self.subcommand].clone()
        config.pop("config", None)
        text = self._parser(self.subcommand).dump(config, skip_none=False)
        plain: dict[str, Any] = yaml.safe_load(text)
        mirror = plain.pop("mirror", None)
        if mirror is not None:
            plain["run"]["mirror"] = mirror
        return flat(plain)


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
    """The groups, of model and data, whose class the words or their configuration files name."""
    found = set()
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, sign, value = word.partition("=")
        value = value if sign else following
        for group in ("model", "data"):
            if option in (f"--{group}", f"--{group}.class_path"):
                found.add(group)
        if option in ("--config", "-c"):
            with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
                content = yaml.safe_load(Path(value).read_bytes())
                groups = content if isinstance(content, dict) else {}
                found |= {
                    group
                    for group in ("model", "data")
                    if isinstance(groups.get(group), dict) and "class_path" in groups[group]
                }
    return found


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
    message = re.sub(r'^Parser key "([\w.]+)": ', r"\1: ", message)
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message)
    return re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1", message)


def _own_error(error: BaseException) -> BaseException:
    """What a class of ours refused, out of what the parser made of it; else the error itself."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, TucodecError):
        inner = inner.__cause__ or inner.__context__
    return inner or error


def main(arguments: Sequence[str]) -> int:
    """Run a LightningCLI subcommand.

    Args:
        arguments: words from the subcommand on, as in ["fit", "--config", "recipe.yaml"].

    Returns:
        Exit status: 0; 2 when the words or the file are not understood; 3 when the run is complete and its
        end did not reach its mirror; 75 when a signal stopped the run after it had saved itself. In a step
        of several processes see `preemption.in_step`.

    Raises:
        ConfigError: the configuration cannot work.
    """
    preemption = Preemption()
    if parent := os.environ.pop(
        "TUCODEC_PARENT", None
    ):  # the ranks that Lightning starts have another
        when_parent_ends(int(parent), lambda: os.kill(os.getpid(), signal.SIGTERM))
    if arguments[0] == "fit":
        return in_step(lambda: _main(arguments, preemption), preemption)
    return _main(arguments, preemption)


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Nothing that is of no use to a user of this command: tips, devices found, deprecations inside.

    A caller's filters of warnings and levels of logs are given back.
    """
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        for message in _ADVICE:
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _main(arguments: Sequence[str], preemption: Preemption) -> int:
    raising = {"exit_on_error": False}
    words = _expanded_config(arguments)
    try:
        with _without_advice(), preemption if arguments[0] == "fit" else contextlib.nullcontext():
            cli = TucodecCLI(
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
                preemption=preemption,
            )
    except (UnicodeDecodeError, MemoryError) as error:
        for word in arguments:  # the parser does not say which file
            if Path(name := word.partition("=")[2] if word.startswith("-") else word).is_file():
                read_text(name)
        if isinstance(error, MemoryError):
            raise
        raise ConfigError(f"not UTF-8: {error.object[:60]!r}") from None
    except ArgumentError as error:
        text = redacted(_in_plain_words(" ".join(str(error).split())))
        print(f"tucodec {arguments[0]}: {text}", file=sys.stderr)
        return 2
    except MisconfigurationException as error:
        raise ConfigError(" ".join(str(error).split())) from None
    except ValueError as error:
        raise _own_error(error) from None
    except SetupStopped:
        announce()
        return PREEMPTED
    if arguments[0] == "fit" and cli.preempted:
        return PREEMPTED
    return UNMIRRORED if cli.unmirrored else 0
